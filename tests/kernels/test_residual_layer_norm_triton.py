"""The engines of residual_layer_norm against float64: on a GPU, or the Triton one in its interpreter.

Every mixture of dtypes meets every shape, with dropout and without. On a GPU the float64 reference is computed there as
well; the interpreter (`TRITON_INTERPRET=1`) knows float32 and float16 only.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastclap.kernels.residual_layer_norm import dropout_mask, residual_layer_norm, residual_layer_norm_reference
from fastclap.testing import assert_close_rel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1 (`make test` runs it)"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
FULL = torch.float32
LOW = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
# Of x and total, branch, and norm.
MIXTURES = [(FULL, FULL, FULL), *((FULL, low, low) for low in LOW), *((low, low, low) for low in LOW)]
# In the interpreter 16 or 32 programs share the rows: one row, less than a tile, several tiles a program.
SHAPES = [(1, 1), (2, 1), (5, 3), (127, 7), (300, 24), (2, 3, 100), (23, 768), (3, 1023), (9, 1024), (2, 4096)]
SHAPES += [(3, 8192)] if INTERPRETED else [(6, 8192), (20_001, 1024), (1_500, 8192)]
ENGINES = ("triton",) if INTERPRETED else ("triton", "torch")
# Of the 16-bit types: rounding of the results. Where total itself is of 16 bits, the norm is that of what was rounded.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
TORCH_TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
NAMES = ("x", "branch", "branch_bias", "weight", "bias")
Optional = Tensor | None


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def tensors(
    *shape: int, mixture: Sequence[torch.dtype] = (FULL, FULL, FULL)
) -> tuple[list[Optional], tuple[Tensor, Tensor]]:
    """The inputs in the order of `NAMES`, parameters in float32, and the gradients of total and norm."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, branch, d_total, d_norm = torch.randn(4, *shape, generator=generator).to(DEVICE)
    parameters = torch.randn(3, shape[-1], generator=generator).to(DEVICE)
    of_x, of_branch, of_norm = mixture
    return [(2 * x + 1).to(of_x), branch.to(of_branch), *parameters], (d_total.to(of_x), d_norm.to(of_norm))


def leaves_of(inputs: Sequence[Optional], dtype: torch.dtype | None = None) -> list[Any]:
    return [None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in inputs]


def next_mask(x: Tensor, dropout: float) -> Optional:
    """The mask of the next call, which draws one seed from the generator of the device; leaves that as it is."""
    if dropout == 0:
        return None
    with torch.random.fork_rng([0] if DEVICE == "cuda" else []):
        seed = torch.randint(0, 2**63 - 1, (1,), device=DEVICE)
    return dropout_mask(seed, x[..., 0].numel(), x.shape[-1], dropout).view(x.shape)


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Optional], upstream: Sequence[Optional]) -> list[Tensor]:
    """Of the leaves that are there; an upstream gradient may not be."""
    pairs = [(out, d) for out, d in zip(outputs, upstream, strict=True) if d is not None]
    there = [leaf for leaf in leaves if leaf is not None]
    return list(torch.autograd.grad([out for out, _ in pairs], there, [d.to(out.dtype) for out, d in pairs]))


def expected(
    inputs: Sequence[Optional], upstream: Sequence[Optional], dropout: float, keep: Optional, eps: float = 1e-5
) -> list[Tensor]:
    """Total, norm and the gradients of what is there, in float64."""
    leaves = leaves_of(inputs, torch.float64)
    outputs = residual_layer_norm_reference(*leaves, eps, dropout=dropout, keep=keep)
    return [*outputs, *gradients(outputs, leaves, upstream)]


def run(inputs: Sequence[Optional], upstream: Sequence[Optional], **options: Any) -> list[Tensor]:
    leaves = leaves_of(inputs)
    outputs = residual_layer_norm(*leaves, **{"backend": "triton", **options})
    return [*outputs, *gradients(outputs, leaves, upstream)]


def compare(
    inputs: Sequence[Optional],
    upstream: Sequence[Optional],
    label: object,
    *,
    dropout: float = 0.0,
    eps: float = 1e-5,
    dtype: torch.dtype = FULL,
    engine: str = "triton",
    scale: float = 1.0,
) -> None:
    """Every result within `scale` times what rounding to its dtype allows; with x in 16 bits that of x for all."""
    x = inputs[0]
    assert x is not None
    keep = next_mask(x, dropout) if engine == "triton" and inputs[1] is not None else None
    wanted = expected(inputs, upstream, dropout, keep, eps)
    found = run(inputs, upstream, dropout=dropout, eps=eps, dtype=dtype, backend=engine)
    assert found[0].dtype == x.dtype and found[1].dtype == dtype and found[1].is_contiguous()
    names = ["total", "norm", *(f"gradient of {name}" for name, t in zip(NAMES, inputs, strict=True) if t is not None)]
    allowed = TOLERANCE if engine == "triton" else TORCH_TOLERANCE
    for name, one, other in zip(names, wanted, found, strict=True):
        assert_close_rel(f"{name}, {label}", one, other, scale * max(allowed[other.dtype], allowed[x.dtype]))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_match_float64(shape: tuple[int, ...], engine: str) -> None:
    for mixture in MIXTURES:
        inputs, upstream = tensors(*shape, mixture=mixture)
        for dropout in (0.0, 0.25) if engine == "triton" else (0.0,):  # torch's mask nobody knows
            # the variance of a row of two is the square of their difference, of which rounding may leave little
            label = (shape, mixture, dropout)
            compare(inputs, upstream, label, dropout=dropout, eps=0.1, dtype=mixture[2], engine=engine)


@pytest.mark.parametrize("branch", (True, False), ids=("branch", "no branch"))
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
def test_what_may_be_absent(branch: bool, bias: bool) -> None:
    """Of the inputs and of the upstream gradients."""
    if bias and not branch:
        return
    for mixture, dropout in itertools.product(MIXTURES, (0.0, 0.125)):
        inputs, (d_total, d_norm) = tensors(50, 24, mixture=mixture)
        inputs[1:3] = inputs[1] if branch else None, inputs[2] if bias else None
        for upstream in ((d_total, d_norm), (None, d_norm)):
            compare(inputs, upstream, (mixture, dropout), dropout=dropout, eps=0.1, dtype=mixture[2])


@pytest.mark.parametrize("dropout", (0.0, 0.125))
def test_total_alone_has_no_gradient_of_the_norm(dropout: float) -> None:
    inputs, (d_total, _) = tensors(50, 24, mixture=MIXTURES[1])
    leaves = leaves_of(inputs)
    keep = next_mask(leaves[0], dropout)
    total, _ = residual_layer_norm(*leaves, dropout=dropout, backend="triton")
    total.backward(d_total)
    kept = torch.ones_like(d_total) if keep is None else keep / (1 - dropout)
    assert torch.equal(leaves[0].grad, d_total)
    assert torch.equal(leaves[1].grad, (kept * d_total).to(leaves[1].dtype))
    assert_close_rel("branch_bias", (kept * d_total).double().sum(0), leaves[2].grad, 1e-6)
    assert leaves[3].grad is None and leaves[4].grad is None


def test_nothing_reached_has_no_gradient() -> None:
    """Both results are used, and what used them passes no gradient on."""

    class Ends(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *_: Tensor) -> Tensor:
            return torch.zeros(3, device=DEVICE)

        @staticmethod
        def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
            return None, None

    inputs, _ = tensors(5, 24)
    leaves = leaves_of(inputs)
    Ends.apply(*residual_layer_norm(*leaves, backend="triton")).sum().backward()
    assert all(leaf.grad is None for leaf in leaves)


def test_parameters_of_16_bits_get_gradients_of_16_bits() -> None:
    for low, dropout in itertools.product(LOW, (0.0, 0.25)):
        inputs, upstream = tensors(50, 24, mixture=(low, low, low))
        inputs = [None if t is None else t.to(low) for t in inputs]
        compare(inputs, upstream, low, dropout=dropout, eps=0.1, dtype=low)


def test_large_means_and_constant_rows_keep_their_digits() -> None:
    (x, branch, *parameters), upstream = tensors(40, 100)
    assert x is not None
    # The variance is taken about the mean: a mean of 1,000 deviations costs what rounding total itself costs.
    compare([x + 2000.0, branch, *parameters], upstream, "far from zero", scale=300)
    constant = torch.full_like(x, 5.0)
    compare([constant, torch.zeros_like(x), None, *parameters[1:]], upstream, "constant rows", eps=0.1)


def test_strided_inputs_and_gradients_are_read_where_they_are() -> None:
    (x, branch, *_), (d_total, d_norm) = tensors(60, 48)
    parameters = tensors(60, 24)[0][2:]
    assert x is not None and branch is not None
    wide = [x, branch, d_total, torch.cat((d_norm, d_norm), 1)]
    x, branch, *upstream = [t[:, :24] for t in wide]
    keep = next_mask(x, 0.25)
    wanted = expected([x, branch, *parameters], upstream, 0.25, keep)
    alone = expected([x, None, None, *parameters[1:]], upstream, 0.0, None)
    for t in wide:
        t[:, 24:] = torch.nan  # which must not be read
    leaves = leaves_of([*wide[:2], *parameters])
    outputs = residual_layer_norm(leaves[0][:, :24], leaves[1][:, :24], *leaves[2:], dropout=0.25, backend="triton")
    for name, one, other in zip(("total", "norm"), wanted[:2], outputs, strict=True):
        assert_close_rel(name, one, other, 1e-6)
    for name, one, other in zip(NAMES, wanted[2:], gradients(outputs, leaves, upstream), strict=True):
        assert_close_rel(f"gradient of {name}", one, other[..., :24], 1e-6)
        assert not other[..., 24:].any()
    norm = residual_layer_norm(leaves[0][:, :24], None, None, *leaves[3:], backend="triton")[1]
    assert_close_rel("norm of x alone", alone[1], norm, 1e-6)
    dx = gradients([leaves[0][:, :24], norm], leaves[:1], upstream)[0][:, :24]
    assert_close_rel("gradient of x alone", alone[2], dx, 1e-6)

    (x, branch, *_), _ = tensors(24, 60)
    parameters = [torch.ones(48, device=DEVICE)[::2] for _ in range(3)]
    assert x is not None and branch is not None
    one_number = torch.ones((), device=DEVICE).expand(60, 24)
    inputs = [x.t(), branch.t(), *parameters]
    compare(inputs, (one_number, one_number), "transposed, and the gradient of one number", dropout=0.25)


def test_partial_gradients_equal_the_full_ones() -> None:
    inputs, upstream = tensors(50, 24, mixture=MIXTURES[1])
    torch.manual_seed(0)
    full = run(inputs, upstream, dropout=0.25, dtype=LOW[0])[2:]
    for need in itertools.product((True, False), repeat=5):
        leaves = [leaf.requires_grad_(wanted) for leaf, wanted in zip(leaves_of(inputs), need, strict=True)]
        torch.manual_seed(0)
        outputs = residual_layer_norm(*leaves, dropout=0.25, dtype=LOW[0], backend="triton")
        assert all(output.requires_grad == any(need) for output in outputs)
        if any(need):
            torch.autograd.backward(outputs, upstream)
        for leaf, wanted, gradient in zip(leaves, need, full, strict=True):
            assert (leaf.grad is not None) == wanted
            assert leaf.grad is None or torch.equal(leaf.grad, gradient)


def test_uninitialised_memory_is_never_read_and_runs_are_bit_identical() -> None:
    for shape, mixture in itertools.product(((40, 24), (3, 1023)), MIXTURES):
        inputs, upstream = tensors(*shape, mixture=mixture)
        runs = []
        for _ in range(2):
            torch.manual_seed(1)
            runs.append(run(inputs, upstream, dropout=0.25, dtype=mixture[2]))
        for one, other in zip(*runs, strict=True):
            assert one.isfinite().all() and torch.equal(one, other), (shape, mixture)


def test_a_row_that_is_not_finite_stays_alone() -> None:
    inputs, upstream = tensors(50, 24)
    clean = run(inputs, upstream)
    assert inputs[1] is not None
    inputs[1][7, 3] = float("inf")
    found = run(inputs, upstream)
    others = torch.arange(50, device=DEVICE) != 7
    for one, other in zip(found[1:4], clean[1:4], strict=True):  # norm, and gradients of x and branch
        assert one[7].isnan().all() and torch.equal(one[others], other[others])


@pytest.mark.parametrize("dropout", (0.1, 0.5))
@pytest.mark.parametrize("shape", ((40, 24), (2, 3, 1023), (4, 4096)), ids=str)
def test_what_is_dropped_is_that_of_the_mask_in_both_passes(shape: tuple[int, ...], dropout: float) -> None:
    """x = 0 and a branch of ones give the kept values themselves, upstream gradients of ones those of the branch."""
    zeros, ones = torch.zeros(shape, device=DEVICE), torch.ones(shape, device=DEVICE)
    branch, parameter = ones.clone().requires_grad_(), torch.ones(shape[-1], device=DEVICE)
    keep = next_mask(zeros, dropout)
    total, _ = residual_layer_norm(zeros, branch, None, parameter, parameter, dropout=dropout, backend="triton")
    total.backward(ones)
    assert keep is not None and branch.grad is not None
    assert torch.equal(total != 0, keep) and torch.equal(branch.grad != 0, keep)
    scale = 1 / (1 - round(dropout * 2**16) / 2**16)
    for values in (total, branch.grad):
        assert torch.allclose(values[keep], torch.tensor(scale, device=DEVICE), rtol=1e-6)
    assert abs(keep.double().mean().item() - (1 - dropout)) < 5 * (dropout * (1 - dropout) / keep.numel()) ** 0.5


def test_dropout_repeats_with_the_generator_and_only_then() -> None:
    inputs, upstream = tensors(50, 24)
    torch.manual_seed(1)
    first = run(inputs, upstream, dropout=0.25)
    torch.manual_seed(1)
    again = run(inputs, upstream, dropout=0.25)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], run(inputs, upstream, dropout=0.25)[0])


def test_activation_checkpointing_replays_the_mask() -> None:
    inputs, upstream = tensors(50, 24, mixture=MIXTURES[1])
    call = partial(residual_layer_norm, dropout=0.25, backend="triton")
    found = []
    for way in (call, partial(checkpoint, call, use_reentrant=False)):
        leaves = leaves_of(inputs)
        torch.manual_seed(1)
        outputs = way(*leaves)
        torch.rand(7, device=DEVICE)  # the generator moves on
        found.append([*outputs, *gradients(outputs, leaves, upstream)])
    assert all(map(torch.equal, *found))


def test_nothing_in_nothing_out() -> None:
    leaves = leaves_of([torch.empty(0, 24), torch.empty(0, 24), *torch.ones(3, 24)])
    total, y = residual_layer_norm(*leaves, dropout=0.1, backend="triton")
    (total.sum() + y.sum()).backward()
    assert total.shape == y.shape == (0, 24)
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def test_a_second_differentiation_is_refused() -> None:
    inputs, _ = tensors(3, 24)
    leaves = leaves_of(inputs)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(residual_layer_norm(*leaves, backend="triton")[1].sum(), leaves, create_graph=True)


@pytest.mark.parametrize("branch", (True, False), ids=("branch", "no branch"))
def test_operators_are_registered_properly(branch: bool) -> None:
    inputs, upstream = tensors(2, 5, 24, mixture=MIXTURES[1])
    if not branch:
        inputs[1:3] = None, None
    seed = torch.tensor([5], device=DEVICE) if branch else None
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operator, backward = torch.ops.fastclap.residual_layer_norm, torch.ops.fastclap.residual_layer_norm_backward
    for seed_or_none, dtype in ((seed, LOW[0]), (None, FULL)):
        arguments = (*leaves_of(inputs), seed_or_none, 0.25 if seed_or_none is not None else 0.0, 1e-5, dtype)
        torch.library.opcheck(operator, arguments, test_utils=checks)
    total, _, mean, inverse_std = operator(*inputs, seed, 0.25, 1e-5, LOW[0])
    assert (total.numel() > 0) == branch
    saved = (total if branch else inputs[0], *inputs[2:], seed, mean, inverse_std)
    options = (0.25, LOW[0] if branch else None)
    for given, need in (
        (upstream, [True, branch, branch, True, True]),
        ((upstream[0], None), [False, branch, branch, False, False]),
        ((None, upstream[1]), [True, False, branch, False, True]),
    ):
        torch.library.opcheck(backward, (*given, *saved, *options, need), test_utils=checks)


@pytest.mark.parametrize("dropout", (0.0, 0.25))
@pytest.mark.parametrize("branch", (True, False), ids=("branch", "no branch"))
def test_a_compiled_graph_stays_whole(branch: bool, dropout: float) -> None:
    inputs, (d_total, d_norm) = tensors(2, 5, 24, mixture=MIXTURES[1])
    if not branch:
        inputs[1:3] = None, None
    for backend, upstream in itertools.product(("triton", "auto"), ((d_total, d_norm), (None, d_norm))):
        if (backend == "auto" and dropout) or (not branch and upstream[0] is not None):
            continue  # a mask that nobody knows; a gradient that goes past the norm
        call = partial(residual_layer_norm, dropout=dropout, backend=backend, dtype=LOW[0])
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        found = []
        for way in (call, compiled):
            leaves = leaves_of(inputs)
            torch.manual_seed(1)
            outputs = way(*leaves)
            assert (outputs[0] is leaves[0]) == (not branch)
            found.append([*outputs, *gradients(outputs, leaves, upstream)])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other) if backend == "triton" else torch.allclose(one, other, atol=1e-5)


def test_autocast_decides_the_dtype_of_the_norm_alone() -> None:
    inputs, upstream = tensors(50, 24, mixture=MIXTURES[1])
    with torch.autocast(DEVICE, dtype=LOW[-1]):
        cast = run(inputs, upstream)
    assert (cast[0].dtype, cast[1].dtype) == (FULL, LOW[-1])
    assert all(map(torch.equal, cast, run(inputs, upstream, dtype=LOW[-1])))
    with torch.autocast(DEVICE, dtype=LOW[-1]):
        assert run(inputs, upstream, dtype=FULL)[1].dtype == FULL


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_a_cuda_graph_replays_forward_and_backward(mixture: tuple[torch.dtype, ...]) -> None:
    inputs, upstream = tensors(1000, 1024, mixture=mixture)

    def step(dropout: float) -> list[Tensor]:
        return run(inputs, upstream, dropout=dropout, dtype=mixture[2])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = [t.clone() for t in step(0.0)]
        step(0.25)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, dropped = step(0.0), step(0.25)
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(eager, captured, strict=True))
    first = dropped[0].clone()
    graph.replay()
    assert not torch.equal(first, dropped[0]), "every replay draws a mask of its own"
    assert all(t.isfinite().all() for t in dropped)


@pytest.mark.skipif(INTERPRETED, reason="is for GPUs")
def test_the_host_does_not_wait() -> None:
    inputs, upstream = tensors(100, 1024, mixture=MIXTURES[1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(inputs, upstream, dropout=0.25)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(t.isfinite().all() for t in found)
