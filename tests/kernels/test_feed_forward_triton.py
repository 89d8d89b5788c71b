"""The Triton engine of the feed-forward against float64: on a GPU, or in Triton's interpreter.

Every dtype meets every shape. On a GPU the float64 reference is computed there as well; the interpreter
(`TRITON_INTERPRET=1`) knows float32 and float16 only.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastclap.kernels.feed_forward import feed_forward, feed_forward_reference
from fastclap.kernels.layer_norm_gelu import gelu_reference
from fastclap.testing import assert_close_rel, relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1 (`make test` runs it)"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
LOW = DTYPES[-1]
# Of x, then the hidden width: one value; one row; more and fewer rows than the interpreter's 32 programs, of
# widths below, at and above a program's 128 or 256 columns; the model's width.
SHAPES = [
    ((1, 1), 1),
    ((1, 24), 300),
    ((24,), 16),
    ((37, 9), 128),
    ((2, 33, 16), 131),
    ((3, 7, 2), 512),
    ((9, 8), 4096),
]
SHAPES += [] if INTERPRETED else [((20_001, 64), 520), ((3_001, 256), 4096)]
# ‖error‖ / ‖value‖ of the kernel: half a unit of rounding, plus what the polynomials are off by.
KERNEL_TOLERANCE = {torch.float32: 3e-7, torch.float16: 3e-4, torch.bfloat16: 3e-3}
# Of all of it: u, gelu(u), da, du and the result are each rounded once, by up to half a unit, 2⁻¹¹ or 2⁻⁸ of the 16-bit
# types; of float32 the sum of up to 4,096 products decides.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 5 * 2.0**-11, torch.bfloat16: 5 * 2.0**-8}
NAMES = ("x", "weight_in", "bias_in", "weight_out")
OUT = 20
triton_engine: Any = partial(feed_forward, backend="triton")


def tensors(shape: Sequence[int], hidden: int) -> tuple[list[Tensor], Tensor]:
    """x, weight_in, bias_in and weight_out, for values of u and y of about 1, and the gradient of y."""
    generator = torch.Generator().manual_seed(sum(shape) + hidden)
    channels = shape[-1]
    sizes = (shape, (hidden, channels), (hidden,), (OUT, hidden), (*shape[:-1], OUT))
    scales = (1.0, channels**-0.5, 1.0, hidden**-0.5, 1.0)
    *inputs, upstream = (torch.randn(s, generator=generator) * scale for s, scale in zip(sizes, scales, strict=True))
    return inputs, upstream


def run(function: Any, inputs: Sequence[Tensor | None], upstream: Tensor, need: Sequence[bool] = (True,) * 4) -> Any:
    """y, and the gradients that are needed of what is there, None for the others."""
    leaves = [
        None if t is None else t.detach().to(DEVICE).requires_grad_(wanted)
        for t, wanted in zip(inputs, need, strict=True)
    ]
    y = function(*leaves)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, upstream.to(DEVICE, y.dtype)) if wanted else ())
    return [y, *(next(found) if t is not None and t.requires_grad else None for t in leaves)]


def expected(inputs: Sequence[Tensor | None], upstream: Tensor) -> Any:
    return run(feed_forward_reference, [None if t is None else t.double() for t in inputs], upstream)


def layers(inputs: Sequence[Tensor]) -> nn.Sequential:
    """The layers of torch that it stands for, on the device."""
    _, weight_in, bias_in, weight_out = inputs
    first, second = nn.Linear(*weight_in.shape[::-1]), nn.Linear(*weight_out.shape[::-1], bias=False)
    parameters = (nn.Parameter(t.detach().clone()) for t in (weight_in, bias_in, weight_out))
    first.weight, first.bias, second.weight = parameters
    return nn.Sequential(first, nn.GELU(), second).to(DEVICE)


# ---------------------------------------------------------------------------------------------------------------------
# the kernel


def backward(u: Tensor, da: Tensor, need_a: bool = True, need_sum: bool = True) -> list[Tensor]:
    """du, gelu(u) and the sums, of the operator on a copy of da."""
    du = da.to(DEVICE, copy=True)
    return [du, *torch.ops.fastclap.gelu_backward(u.to(DEVICE), du, need_a, need_sum)]


def expected_backward(u: Tensor, da: Tensor) -> list[Tensor]:
    u = u.to(DEVICE).double().requires_grad_()
    a = gelu_reference(u)
    (du,) = torch.autograd.grad(a, u, da.to(DEVICE).double())
    return [du, a.detach(), du.sum(0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (131, 16), (40, 129), (33, 520), (5, 4096)], ids=str)
def test_the_kernel_matches_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    u, da = (2 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)
    found = backward(u, da)
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32]
    for name, one, other in zip(("du", "a"), expected_backward(u, da), found, strict=False):
        assert_close_rel(name, one, other, KERNEL_TOLERANCE[dtype])
    # The sums are of values before they are rounded, so of all dtypes as exact as the derivative: 2.8e-5 off at most.
    error = (found[2] - expected_backward(u, da)[2]).abs().max()
    assert error < da.abs().sum(0).max() * (3e-7 if dtype == torch.float32 else 3e-5)


def test_only_what_is_needed_is_computed_and_du_stands_where_da_was() -> None:
    u, da = torch.randn(2, 13, 300)
    full = backward(u, da)
    for need_a, need_sum in itertools.product((True, False), repeat=2):
        du, a, sums = backward(u, da, need_a, need_sum)
        assert torch.equal(du, full[0])
        assert torch.equal(a, full[1] if need_a else a.new_empty(0))
        assert torch.equal(sums, full[2] if need_sum else sums.new_empty(0))
    strided = da.t().contiguous().t().to(DEVICE)
    torch.ops.fastclap.gelu_backward(u.to(DEVICE), strided, False, False)
    assert torch.equal(strided, full[0])
    spread = torch.stack((u, u), 2)[..., 0]
    assert all(torch.equal(one, other) for one, other in zip(full, backward(spread, da), strict=True))


def test_tails_keep_their_digits_and_what_is_not_finite_comes_out_as_with_torch() -> None:
    level = torch.linspace(-12.9, 12.9, 4096)[None]
    for low, high, tol in ((-3.0, 3.0, 2e-6), (-6.5, -3.0, 4e-5), (-9.0, -6.5, 7e-4), (9.0, 12.9, 1e-6)):
        u = level[:, (level[0] >= low) & (level[0] <= high)]
        for name, one, other in zip(("du", "a"), expected_backward(u, u), backward(u, u), strict=False):
            assert_close_rel(f"{name} of {low} to {high}", one, other, tol)
    u = torch.tensor([[0.0, math.inf, -math.inf, math.nan, 100.0, -100.0, 1.0, 1.0]])
    da = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, math.inf, math.nan]])
    leaf = u.double().requires_grad_()  # on some processors torch's gelu of a float32 infinity is NaN
    a = F.gelu(leaf)
    a.backward(da.double())
    assert leaf.grad is not None
    for name, one, other in zip(("du", "a"), (leaf.grad, a), backward(u, da), strict=False):
        assert torch.equal(one.isnan(), other.cpu().isnan()) and torch.equal(one.isinf(), other.cpu().isinf()), name
        assert torch.allclose(one.float(), other.cpu(), equal_nan=True), name


# ---------------------------------------------------------------------------------------------------------------------
# all of it


@pytest.mark.parametrize(("shape", "hidden"), SHAPES, ids=str)
def test_values_and_gradients_match_float64(shape: tuple[int, ...], hidden: int) -> None:
    inputs, upstream = tensors(shape, hidden)
    for dtype, bias in itertools.product(DTYPES, (True, False)):
        used = [t.to(dtype) if bias or name != "bias_in" else None for name, t in zip(NAMES, inputs, strict=True)]
        upstream = upstream.to(dtype)
        found = run(triton_engine, used, upstream)
        for name, one, other in zip(("y", *NAMES), expected(used, upstream), found, strict=True):
            assert (one is None) == (other is None) == (name == "bias_in" and not bias)
            if one is not None:
                assert other.dtype == dtype and other.is_contiguous()
                assert_close_rel(f"{name}, {dtype}, bias {bias}", one, other, TOLERANCE[dtype])


def test_the_forward_pass_is_that_of_the_layers_and_the_gradients_are_as_near_to_float64() -> None:
    inputs, upstream = tensors((3, 7, 24), 300)
    for dtype in DTYPES:
        used = [t.to(dtype) for t in inputs]
        model, x = layers(used), used[0].to(DEVICE).requires_grad_()
        y = model(x)
        theirs = [y, *torch.autograd.grad(y, [x, *model.parameters()], upstream.to(DEVICE, dtype))]
        ours = run(triton_engine, used, upstream.to(dtype))
        assert torch.equal(y, ours[0])
        for name, one, mine, other in zip(
            NAMES, expected(used, upstream.to(dtype))[1:], ours[1:], theirs[1:], strict=True
        ):
            error, allowed = relative_error(one, mine), 1.1 * relative_error(one, other)
            assert error < max(allowed, KERNEL_TOLERANCE[dtype]), name


def test_strided_inputs_and_an_expanded_gradient() -> None:
    inputs, _ = tensors((30, 48), 131)
    x, weight_in, bias_in, weight_out = inputs
    for view in (x[:, ::2], x.view(2, 15, 48)[:, 3:9, :24], x[:24].t()):
        used = [
            view.to(DEVICE),
            torch.cat([weight_in.t()] * 2)[: view.shape[-1]].t(),
            bias_in,
            weight_out.t().contiguous().t(),
        ]
        upstream = torch.ones(1).expand(*view.shape[:-1], OUT)
        for name, one, other in zip(
            ("y", *NAMES), expected(used, upstream), run(triton_engine, used, upstream), strict=True
        ):
            assert_close_rel(f"{name}, {list(view.stride())}", one, other, 1e-6)


def test_partial_gradients_equal_the_full_ones() -> None:
    inputs, upstream = tensors((17, 24), 131)
    full = run(triton_engine, inputs, upstream)
    for need in itertools.product((True, False), repeat=4):
        found = run(triton_engine, inputs, upstream, need)
        assert found[0].requires_grad == any(need)
        assert [t is not None for t in found[1:]] == list(need)
        for name, one, other in zip(("y", *NAMES), full, found, strict=True):
            if other is not None and (need[:3] != (False,) * 3 or name == "y"):
                assert torch.equal(one, other), (name, need)
            elif other is not None:  # torch's own gelu, where no kernel runs
                assert_close_rel(f"{name}, {need}", one, other, 1e-6)


@contextmanager
def saved() -> Iterator[list[Tensor]]:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def test_one_hidden_activation_is_kept_and_nothing_that_frozen_weights_do_without() -> None:
    inputs, upstream = tensors((2, 5, 24), 131)
    shapes = {"x": (10, 24), "weight_in": (131, 24), "bias_in": (131,), "weight_out": (OUT, 131)}
    before = ("weight_in", "bias_in", "weight_out")
    for need, names in (
        ((True, True, True, True), ("x", *before)),
        ((False, True, True, True), ("x", "bias_in", "weight_out")),
        ((True, False, False, False), ("weight_in", "weight_out")),
        ((False, False, True, False), ("bias_in", "weight_out")),
        ((False, False, False, True), ()),
        ((False, False, False, False), None),
    ):
        with saved() as kept:
            run(triton_engine, inputs, upstream, need)
        wanted = [] if names is None else [*(shapes[name] for name in names), (10, 131)]
        assert [tuple(t.shape) for t in kept] == wanted, need
    with saved() as kept:
        run(partial(feed_forward, backend="torch"), inputs, upstream)
    assert sum(t.numel() == 10 * 131 for t in kept) == 2, "torch keeps two"


def test_hooks_that_move_what_is_saved_and_checkpoints_change_nothing() -> None:
    inputs, upstream = tensors((2, 5, 24), 131)
    full = run(triton_engine, inputs, upstream)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.float().t().contiguous().t()):
        moved = run(triton_engine, inputs, upstream)
    again = run(lambda *leaves: checkpoint(triton_engine, *leaves, use_reentrant=False), inputs, upstream)
    for name, one, other, third in zip(("y", *NAMES), full, moved, again, strict=True):
        assert_close_rel(name, one, other, 1e-6)  # products of other strides
        assert torch.equal(one, third), name


def test_uninitialised_memory_is_never_read_and_runs_are_bit_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    for (shape, hidden), dtype in itertools.product((((40, 24), 131), ((3, 9), 520)), DTYPES):
        inputs, upstream = tensors(shape, hidden)
        first, second = (run(triton_engine, [t.to(dtype) for t in inputs], upstream.to(dtype)) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert one.isfinite().all() and torch.equal(one, other), (shape, dtype)


def test_a_row_that_is_not_finite_stays_alone() -> None:
    inputs, upstream = tensors((50, 24), 131)
    clean = run(triton_engine, inputs, upstream)
    inputs[0][7, 3] = float("inf")
    y, dx, *_ = run(triton_engine, inputs, upstream)
    others = torch.arange(50, device=DEVICE) != 7
    assert y[7].isnan().all() and dx[7].isnan().all()
    assert torch.equal(y[others], clean[0][others]) and torch.equal(dx[others], clean[1][others])


def test_nothing_in_nothing_out() -> None:
    inputs, upstream = tensors((3, 0, 24), 131)
    y, dx, *gradients = run(triton_engine, inputs, upstream)
    assert y.shape == (3, 0, OUT) and dx.shape == (3, 0, 24) and not any(g.any() for g in gradients)
    inputs, upstream = tensors((3, 24), 131)
    none = [inputs[0], *(t[:0] for t in inputs[1:3]), inputs[3][:, :0]]
    y, dx, *gradients = run(triton_engine, none, upstream)
    assert y.shape == (3, OUT) and not y.any() and not dx.any() and [g.numel() for g in gradients] == [0, 0, 0]


def test_a_second_differentiation_is_refused() -> None:
    inputs, _ = tensors((3, 24), 16)
    leaves = [t.to(DEVICE).requires_grad_() for t in inputs]
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*create_graph"):
        torch.autograd.grad(triton_engine(*leaves).sum(), leaves, create_graph=True)


def test_products_are_counted_as_those_of_the_layers() -> None:
    inputs, upstream = tensors((2, 5, 24), 131)
    with FlopCounterMode(display=False) as ours:
        run(triton_engine, inputs, upstream)
    assert ours.get_total_flops() == 3 * 2 * 10 * 131 * (24 + OUT)
    with FlopCounterMode(display=False) as frozen:
        run(triton_engine, inputs, upstream, (True, False, False, False))
    assert frozen.get_total_flops() == 2 * 2 * 10 * 131 * (24 + OUT)


def test_the_operator_is_registered_properly() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for need_a, need_sum in itertools.product((True, False), repeat=2):
        u, da = torch.randn(2, 5, 131, device=DEVICE)
        torch.library.opcheck(torch.ops.fastclap.gelu_backward, (u, da.clone(), need_a, need_sum), test_utils=checks)


@pytest.mark.parametrize("dynamic", (None, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("need", ((True,) * 4, (True, False, False, False), (False, False, False, True)), ids=str)
def test_a_compiled_graph_stays_whole(need: tuple[bool, ...], dynamic: bool | None) -> None:
    torch._dynamo.reset()
    for backend in ("triton", "auto"):
        graphs = 0
        function = partial(feed_forward, backend=backend)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for frames in (5, 9) if dynamic else (5,):
            inputs, upstream = tensors((2, frames, 24), 131)
            for one, other in zip(
                run(triton_engine, inputs, upstream, need), run(compiled, inputs, upstream, need), strict=True
            ):
                assert (one is None) == (other is None)
                if one is not None:
                    assert torch.equal(one, other) if backend == "triton" else torch.allclose(one, other, atol=1e-5)
            graphs = graphs or torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "other sizes, the same graph"


def test_autocast_gives_masters_their_own_dtype_and_the_bias_its_float32_sum() -> None:
    inputs, upstream = tensors((60, 24), 131)

    def cast(function: Any) -> Any:
        def under_autocast(*leaves: Tensor) -> Tensor:
            with torch.autocast(DEVICE, dtype=LOW):
                return function(*leaves)

        return under_autocast

    upstream = upstream.to(LOW)
    wanted = expected([t.to(LOW) for t in inputs], upstream)
    ours = run(cast(triton_engine), inputs, upstream)
    theirs = run(cast(partial(feed_forward, backend="torch")), inputs, upstream)
    compiled = run(torch.compile(cast(triton_engine), backend="aot_eager", fullgraph=True), inputs, upstream)
    assert ours[0].dtype == LOW and torch.equal(ours[0], theirs[0])
    for name, one, mine, other, third in zip(NAMES, wanted[1:], ours[1:], theirs[1:], compiled[1:], strict=True):
        assert mine.dtype == other.dtype == torch.float32 and torch.equal(mine, third)
        assert_close_rel(name, one, mine, TOLERANCE[LOW])
        assert torch.equal(mine, mine.to(LOW).float()) == (name != "bias_in"), "rounded as products, or a sum"
    mixed = [inputs[0].to(LOW), *inputs[1:]]  # a layer before has cast x
    assert run(cast(triton_engine), mixed, upstream)[1].dtype == LOW


def test_a_backward_pass_under_autocast_is_as_exact_as_its_products() -> None:
    inputs, upstream = tensors((60, 24), 131)
    leaves = [t.to(DEVICE).requires_grad_() for t in inputs]
    y = triton_engine(*leaves)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        gradients = torch.autograd.grad(y, leaves, upstream.to(DEVICE))
    for name, one, other in zip(NAMES, expected(inputs, upstream)[1:], gradients, strict=True):
        assert other.dtype == torch.float32
        assert_close_rel(name, one, other, 5 * 2.0**-8)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_graph_replays_forward_and_backward(dtype: torch.dtype) -> None:
    inputs, upstream = tensors((1000, 64), 512)
    leaves = [t.to("cuda", dtype).requires_grad_() for t in inputs]
    upstream = upstream.to("cuda", dtype)

    def step() -> list[Tensor]:
        y = feed_forward(*leaves)
        return [y, *torch.autograd.grad(y, leaves, upstream)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = [t.clone() for t in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(eager, captured, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="is for GPUs")
def test_the_host_does_not_wait() -> None:
    inputs, upstream = tensors((100, 64), 512)
    leaves, upstream = [t.cuda().requires_grad_() for t in inputs], upstream.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        feed_forward(*leaves).backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
