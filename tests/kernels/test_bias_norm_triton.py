"""The Triton engine of BiasNorm and bypass against float64: on a GPU, or in Triton's interpreter.

Every mixture of dtypes meets every shape, in each way that the Zipformer calls it. On a GPU the float64 reference is
computed there as well; the interpreter (`TRITON_INTERPRET=1`) knows float32 and float16 only.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastclap.kernels.bias_norm import NAMES, bias_norm, bias_norm_reference, bypass, bypass_reference
from fastclap.testing import assert_close_rel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1 (`make test` runs it)"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
FULL = torch.float32
LOW = torch.float16 if INTERPRETED else torch.bfloat16
# Of x and original, and of the branch.
MIXTURES = [(FULL, FULL), (FULL, LOW), (LOW, LOW)]
# Lengths of the clips, some of one row and of none, and columns: in the interpreter a few programs share the rows.
CASES = [((1,), 3), ((2, 1), 40), ((5, 0, 1), 3), ((40, 1, 30), 24), ((5, 4), 768), ((3,), 1280), ((2, 1), 2048)]
CASES += [] if INTERPRETED else [((9_000, 3, 11_000), 1280), ((7, 500), 4096)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
WAYS = ("norm", "norm and bypass", "norm and bypass of clips", "bypass", "bypass of clips")
Optional = Tensor | None


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def tensors(
    lengths: Sequence[int], columns: int, way: str, branch: bool = True, mixture: Sequence[torch.dtype] = (FULL, FULL)
) -> tuple[list[Optional], Tensor, Tensor]:
    """What has gradients, in the order of `NAMES`; the clip of every row; and the gradient of the result."""
    rows = sum(lengths)
    generator = torch.Generator().manual_seed(rows + columns)
    x, added, original, upstream = torch.randn(4, rows, columns, generator=generator).to(DEVICE)
    bias = torch.randn(columns, generator=generator).to(DEVICE) / 2
    log_scale = torch.randn((), generator=generator).to(DEVICE)
    of_clips = (len(lengths), columns) if "clips" in way else (columns,)
    scale = torch.rand(of_clips, generator=generator).to(DEVICE)
    clips = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(DEVICE)
    stream, of_branch = mixture
    skips, norms = "bypass" in way, "norm" in way
    found = {
        "x": (2 * x + 1).to(stream),
        "branch": added.to(of_branch) if branch else None,
        "original": original.to(stream) if skips else None,
        "bias": bias if norms else None,
        "log_scale": log_scale if norms else None,
        "scale": scale if skips else None,
    }
    return [found[name] for name in NAMES], clips, upstream.to(stream)


def call(inputs: Sequence[Any], clips: Tensor, backend: str = "triton") -> Tensor:
    x, branch, original, bias, log_scale, scale = inputs
    if bias is None:
        return bypass(original, x, scale, clips, branch, backend=backend)
    return bias_norm(x, bias, log_scale, original, scale, clips, branch, backend=backend)


def defined(inputs: Sequence[Any], clips: Tensor) -> Tensor:
    x, branch, original, bias, log_scale, scale = inputs
    if bias is None:
        return bypass_reference(original, x, scale, clips, branch)
    return bias_norm_reference(x, bias, log_scale, original, scale, clips, branch)


def run(function: Any, inputs: Sequence[Optional], *others: Any, upstream: Tensor, dtype: Any = None) -> list[Tensor]:
    """The result, and the gradients of what is there."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in inputs]
    y = function(leaves, *others)
    return [y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], upstream.to(y.dtype))]


def compare(inputs: Sequence[Optional], clips: Tensor, upstream: Tensor, label: object, scale: float = 1.0) -> None:
    wanted = run(defined, inputs, clips, upstream=upstream, dtype=torch.float64)
    found = run(call, inputs, clips, upstream=upstream)
    stream = inputs[0].dtype if inputs[2] is None else inputs[2].dtype
    assert found[0].dtype == stream and found[0].is_contiguous()
    there = [(name, t) for name, t in zip(NAMES, inputs, strict=True) if t is not None]
    for (name, t), one, other in zip((("y", found[0]), *there), wanted, found, strict=True):
        assert other.dtype == t.dtype and other.shape == t.shape
        # with a stream of 16 bits the sum of x and branch is rounded, and with it all that follows
        assert_close_rel(f"{name}, {label}", one, other, scale * max(TOLERANCE[t.dtype], TOLERANCE[stream]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("lengths", "columns"), CASES, ids=str)
def test_values_and_gradients_match_float64(lengths: tuple[int, ...], columns: int, way: str) -> None:
    for mixture, branch in itertools.product(MIXTURES, (True, False)):
        if branch or mixture[0] == mixture[1]:
            inputs, clips, upstream = tensors(lengths, columns, way, branch, mixture)
            # sums over one or two clips' rows of terms of either sign: what cancels shows in few columns
            compare(inputs, clips, upstream, (mixture, branch), 4.0 if columns < 10 else 2.0)


def test_every_tensor_may_have_a_dtype_of_its_own() -> None:
    for way in WAYS:
        inputs, clips, upstream = tensors((20, 1), 40, way, True, (FULL, LOW))
        dtypes = (LOW, FULL, FULL, LOW, FULL, LOW)
        inputs = [None if t is None else t.to(dtype) for t, dtype in zip(inputs, dtypes, strict=True)]
        compare(inputs, clips.int(), upstream, way, TOLERANCE[LOW] / TOLERANCE[FULL])


def test_strided_inputs_and_gradients_are_read_where_they_are() -> None:
    for way in WAYS:
        inputs, clips, upstream = tensors((20, 11), 48, way)
        narrow = [None if t is None else t[..., :24] if t.dim() else t for t in inputs]
        wanted = run(defined, narrow, clips, upstream=upstream[:, :24], dtype=torch.float64)
        leaves = [None if t is None else t.clone() for t in inputs]
        for leaf in leaves:
            if leaf is not None and leaf.dim():
                leaf[..., 24:] = torch.nan  # which must not be read
                leaf.requires_grad_()
        y = call([None if t is None else t[..., :24] if t.dim() else t for t in leaves], clips)
        there = [leaf for leaf in leaves if leaf is not None and leaf.dim()]
        found = torch.autograd.grad(y, there, upstream[:, :24])
        assert_close_rel("y", wanted[0], y, 2e-6)
        kept = [one for one in wanted[1:] if one.dim()]
        for one, other in zip(kept, found, strict=True):
            assert_close_rel(way, one, other[..., :24], 4e-6)
        inputs, clips, _ = tensors((20, 11), 24, way)
        turned = [t.t().contiguous().t() if t is not None and t.dim() == 2 else t for t in inputs]
        compare(turned, clips, torch.ones((), device=DEVICE).expand(31, 24), f"turned, {way}", 2.0)


def test_partial_gradients_equal_the_full_ones() -> None:
    for way in WAYS:
        inputs, clips, upstream = tensors((3, 2), 24, way)
        full = run(call, inputs, clips, upstream=upstream)
        there = [t for t in inputs if t is not None]
        for need in itertools.product((True, False), repeat=len(there)):
            flags = iter(need)
            leaves = [None if t is None else t.detach().clone().requires_grad_(next(flags)) for t in inputs]
            y = call(leaves, clips)
            assert torch.equal(y, full[0]) and y.requires_grad == any(need)
            wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            found = torch.autograd.grad(y, wanted, upstream) if wanted else ()
            for one, other in zip(itertools.compress(full[1:], need), found, strict=True):
                assert torch.equal(one, other), (way, need)


def test_no_more_is_kept_than_z_a_number_a_row_and_original() -> None:
    rows, parameters = (17, 24), [(24,), ()]
    scale = {"": [(24,)], "clips": [(2, 24), (17,)]}
    for way in WAYS:
        inputs, clips, _ = tensors((9, 8), 24, way)
        norm, of_scale = "norm" in way, scale["clips" if "clips" in way else ""] if "bypass" in way else []
        for trained in (True, False):
            leaves = [None if t is None else t.clone().requires_grad_(trained or t.dim() == 2) for t in inputs]
            if not trained and leaves[5] is not None:
                leaves[5].requires_grad_(False)
            kept: list[Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
                call(leaves, clips)
            z = [rows] if norm or trained else []
            original = [rows] if of_scale and trained else []
            wanted = [*z, *original, *(parameters if norm else []), *of_scale, *([(17,)] if norm else [])]
            assert [tuple(t.shape) for t in kept] == wanted, (way, trained)
        assert not call([None if t is None else t.detach() for t in inputs], clips).requires_grad


def test_runs_are_bit_identical_and_checkpoints_change_nothing() -> None:
    for way, mixture in itertools.product(WAYS, MIXTURES):
        inputs, clips, upstream = tensors((6, 0, 5), 100, way, True, mixture)
        first, second = (run(call, inputs, clips, upstream=upstream) for _ in range(2))
        third = run(lambda t, clips: checkpoint(call, t, clips, use_reentrant=False), inputs, clips, upstream=upstream)
        for one, other, again in zip(first, second, third, strict=True):
            assert one.isfinite().all() and torch.equal(one, other) and torch.equal(one, again), (way, mixture)


def test_a_row_that_is_not_finite_stays_alone() -> None:
    inputs, clips, upstream = tensors((30, 20), 24, "norm and bypass of clips")
    clean = run(call, inputs, clips, upstream=upstream)
    inputs[1][7, 3] = float("inf")
    found = run(call, inputs, clips, upstream=upstream)
    others = torch.arange(50, device=DEVICE) != 7
    for one, other in zip(found[:3], clean[:3], strict=True):
        assert not one[7].isfinite().all() and torch.equal(one[others], other[others])
    assert torch.equal(found[-1][1], clean[-1][1]) and not found[-1][0].isfinite().all(), "nor the other clip"


def test_a_second_differentiation_is_refused() -> None:
    inputs, clips, _ = tensors((3,), 24, "norm and bypass")
    leaves = [t.requires_grad_() for t in inputs]
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(call(leaves, clips).sum(), leaves, create_graph=True)


@pytest.mark.parametrize("way", WAYS)
def test_operators_are_registered_properly(way: str) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operators = torch.ops.fastclap
    for branch, keep in itertools.product((True, False), repeat=2):
        inputs, clips, upstream = tensors((3, 2), 24, way, branch, MIXTURES[1])
        sequence = clips if "clips" in way else None
        leaves = [None if t is None else t.clone().requires_grad_(keep) for t in inputs]
        torch.library.opcheck(operators.bias_norm, (*leaves, sequence, keep), test_utils=checks)
        if keep:
            x, added, original, bias, log_scale, scale = inputs
            _, z, inverse = operators.bias_norm(*inputs, sequence, True)
            saved = (z if branch else x, original, bias, log_scale, scale, sequence, None if bias is None else inverse)
            dtypes = (x.dtype, None if added is None else added.dtype)
            need = [t is not None for t in inputs]
            for wanted in (need, [need[0], *[False] * 5]):
                arguments = (upstream, *saved, *dtypes, wanted)
                torch.library.opcheck(operators.bias_norm_backward, arguments, test_utils=checks)


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_graph_stays_whole(way: str) -> None:
    torch._dynamo.reset()
    for backend, branch in itertools.product(("triton", "auto"), (True, False)):
        inputs, clips, upstream = tensors((5, 4), 24, way, branch)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        eager = run(call, inputs, clips, backend, upstream=upstream)
        for one, other in zip(eager, run(compiled, inputs, clips, backend, upstream=upstream), strict=True):
            assert torch.equal(one, other) if backend == "triton" else torch.allclose(one, other, atol=1e-5)


def test_autocast_changes_nothing() -> None:
    for way in WAYS:
        inputs, clips, upstream = tensors((9, 8), 24, way, True, (FULL, LOW))
        plain = run(call, inputs, clips, upstream=upstream)
        with torch.autocast(DEVICE, dtype=LOW):
            cast = run(call, inputs, clips, upstream=upstream)
        assert all(map(torch.equal, plain, cast))


@pytest.mark.skipif(INTERPRETED, reason="is for GPUs")
@pytest.mark.parametrize("way", WAYS)
def test_the_host_does_not_wait(way: str) -> None:
    inputs, clips, upstream = tensors((60, 40), 1280, way, True, (FULL, LOW))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(call, inputs, clips, upstream=upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(t.isfinite().all() for t in found)
