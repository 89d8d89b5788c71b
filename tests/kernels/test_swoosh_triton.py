"""The Triton engine of Swoosh and of Swoosh before a linear layer against float64: on a GPU, or in the interpreter.

On a GPU the float64 reference is computed there as well; the interpreter (`TRITON_INTERPRET=1`) knows float32 and
float16 only.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastclap.kernels.swoosh import swoosh, swoosh_linear, swoosh_linear_reference, swoosh_reference
from fastclap.testing import assert_close_rel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1 (`make test` runs it)"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
LOW = DTYPES[-1]
KINDS = ("l", "r")
OUT = 20
# Lengths of the clips, some of one row and of none, and the hidden width: below, at and above a program's 128 or 256
# columns; rows below and above the interpreter's 32 programs.
CASES = [((1,), 1), ((1, 1, 3), 24), ((5, 0, 7), 300), ((21, 9, 1), 128), ((35,), 131), ((9, 8), 520), ((2, 1), 4800)]
CASES += [] if INTERPRETED else [((9_000, 3, 11_000), 2880)]
# ‖error‖ / ‖value‖ of a, dx and what is made of them: their rounding by half a unit, 2⁻¹¹ or 2⁻⁸ of the 16-bit types,
# and that of da before; of float32 the sum of up to 4,800 products decides.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 5 * 2.0**-11, torch.bfloat16: 5 * 2.0**-8}
NAMES = ("y", "x", "weight", "bias")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def tensors(lengths: Sequence[int], hidden: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """[x, weight, bias], mask, the clip of every row, and the gradient of y."""
    rows = sum(lengths)
    generator = torch.Generator().manual_seed(rows + hidden + 1)
    sizes = ((rows, hidden), (OUT, hidden), (OUT,), (rows, OUT))
    x, weight, bias, upstream = (torch.randn(size, generator=generator) for size in sizes)
    mask = (torch.rand(len(lengths), hidden, generator=generator) > 0.25) / 0.75
    clips = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return [4 * x, weight * hidden**-0.5, bias], mask.to(DEVICE), clips.to(DEVICE), upstream


def run(function: Any, inputs: Sequence[Tensor | None], upstream: Tensor, need: Sequence[bool] = (True,) * 3) -> Any:
    """y, and the gradients that are needed of what is there, None for the others."""
    leaves = [
        None if t is None else t.detach().to(DEVICE).requires_grad_(wanted)
        for t, wanted in zip(inputs, need, strict=True)
    ]
    y = function(*leaves)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, upstream.to(DEVICE, y.dtype)) if wanted else ())
    return [y, *(next(found) if t is not None and t.requires_grad else None for t in leaves)]


def engine(kind: str, mask: Tensor | None, clips: Tensor | None, backend: str = "triton") -> Any:
    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return swoosh_linear(x, kind, weight, bias, mask, clips, backend=backend)

    return call


def expected(kind: str, mask: Tensor | None, clips: Tensor | None, inputs: Any, upstream: Tensor) -> Any:
    mask = None if mask is None else mask.double()

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return swoosh_linear_reference(x, kind, weight, bias, mask, clips)

    return run(call, [None if t is None else t.double() for t in inputs], upstream)


@pytest.mark.parametrize(("lengths", "hidden"), CASES, ids=str)
def test_values_and_gradients_match_float64(lengths: tuple[int, ...], hidden: int) -> None:
    inputs, mask, clips, upstream = tensors(lengths, hidden)
    for kind, dtype in itertools.product(KINDS, DTYPES):
        for masked, bias in ((True, True), (False, False)):
            used = [t.to(dtype) if bias or i < 2 else None for i, t in enumerate(inputs)]
            of_mask = (mask, clips) if masked else (None, None)
            wanted = expected(kind, *of_mask, used, upstream.to(dtype))
            for name, one, other in zip(
                NAMES, wanted, run(engine(kind, *of_mask), used, upstream.to(dtype)), strict=True
            ):
                assert (one is None) == (other is None) == (name == "bias" and not bias)
                if one is not None:
                    assert other.dtype == dtype and other.is_contiguous()
                    assert_close_rel(f"{name}, {kind}, {dtype}, mask {masked}", one, other, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_alone_it_matches_float64_near_zero_and_far_out(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for shape in ((), (1,), (37,), (3, 2, 131), (33, 40)):
        for dtype in DTYPES:
            x, upstream = ((4 * torch.randn(shape, generator=generator)).to(DEVICE, dtype) for _ in range(2))
            leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
            y, wanted = swoosh(leaf, kind, backend="triton"), swoosh_reference(exact, kind)
            assert y.dtype == dtype
            # half a unit of rounding; of a value of a few hundredths the error of 6e-6 shows in 16 bits
            tol = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}[dtype]
            assert_close_rel(f"y, {shape}, {dtype}", wanted, y, tol)
            (dx,), (of_it,) = (torch.autograd.grad(v, t, upstream.to(v.dtype)) for v, t in ((wanted, exact), (y, leaf)))
            assert_close_rel(f"dx, {shape}, {dtype}", dx, of_it, tol)
    x = torch.tensor([-3e38, -1e4, -90.0, 90.0, 1e4, 3e38, math.nan, math.inf, -math.inf], device=DEVICE)
    leaf = x.clone().requires_grad_()
    y = swoosh(leaf, kind, backend="triton")
    plain = swoosh(x, kind, backend="torch")
    assert torch.allclose(y, plain, rtol=1e-6, equal_nan=True)
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    slopes = torch.tensor([-0.08] * 3 + [0.92] * 3, device=DEVICE)
    assert torch.allclose(dx[:6], slopes) and dx[6].isnan() and torch.allclose(dx[7:], slopes[[3, 0]])
    small = 1e-3 * torch.randn(500, generator=generator).to(DEVICE)
    error = (swoosh(small, kind, backend="triton") - swoosh_reference(small.double(), kind)).abs().max()
    assert error < 3e-7


def test_strided_inputs_wide_masks_and_narrow_clips() -> None:
    """Of the mask in the dtypes that it may have, and clips of 32 bits."""
    inputs, mask, clips, upstream = tensors((5, 1, 9), 131)
    x, *parameters = inputs
    full = run(engine("l", mask, clips), inputs, upstream)
    spread = torch.stack((x, torch.full_like(x, math.nan)), 2)[..., 0]
    again = run(engine("l", mask.t().contiguous().t(), clips.int()), [spread, *parameters], upstream)
    assert all(torch.equal(one, other) for one, other in zip(full, again, strict=True))
    ones = torch.ones(1).expand(15, OUT)
    for name, one, other in zip(
        NAMES, expected("l", mask, clips, inputs, ones), run(engine("l", mask, clips), inputs, ones), strict=True
    ):
        assert_close_rel(name, one, other, 3e-6)
    halves = (mask > 0).to(LOW) * 1.5
    wanted = expected("r", halves, clips, inputs, upstream)
    for name, one, other in zip(NAMES, wanted, run(engine("r", halves, clips), inputs, upstream), strict=True):
        assert_close_rel(name, one, other, 3e-6)
    of_three = run(engine("l", mask, clips.view(3, 5)), [x.view(3, 5, 131), *parameters], upstream.view(3, 5, OUT))
    assert of_three[0].shape == (3, 5, OUT) and torch.equal(of_three[0].view(15, OUT), full[0])


def test_clips_out_of_order_are_right_too() -> None:
    inputs, mask, clips, upstream = tensors((20, 15), 24)
    mixed = clips[torch.randperm(35, generator=torch.Generator().manual_seed(3)).to(DEVICE)]
    wanted = expected("l", mask, mixed, inputs, upstream)
    for name, one, other in zip(NAMES, wanted, run(engine("l", mask, mixed), inputs, upstream), strict=True):
        assert_close_rel(name, one, other, 3e-6)


def test_partial_gradients_equal_the_full_ones_and_keep_no_more_than_they_need() -> None:
    inputs, mask, clips, upstream = tensors((3, 2), 131)
    full = run(engine("l", mask, clips), inputs, upstream)
    for need in itertools.product((True, False), repeat=3):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            found = run(engine("l", mask, clips), inputs, upstream, need)
        x = [(5, 131), (2, 131), (5,)] if need[0] or need[1] else []
        assert [tuple(t.shape) for t in kept] == [*x, *([(OUT, 131)] if need[0] else [])], need
        assert found[0].requires_grad == any(need) and [t is not None for t in found[1:]] == list(need)
        for name, one, other in zip(NAMES, full, found, strict=True):
            assert other is None or torch.equal(one, other), (name, need)


def test_runs_are_bit_identical_and_checkpoints_change_nothing() -> None:
    for (lengths, hidden), dtype in itertools.product((((9, 0, 8), 131), ((1, 4), 520)), DTYPES):
        inputs, mask, clips, upstream = tensors(lengths, hidden)
        inputs = [t.to(dtype) for t in inputs]
        call = engine("r", mask, clips)
        first, second = (run(call, inputs, upstream.to(dtype)) for _ in range(2))
        third = run(lambda *t, call=call: checkpoint(call, *t, use_reentrant=False), inputs, upstream.to(dtype))
        for one, other, again in zip(first, second, third, strict=True):
            assert one.isfinite().all() and torch.equal(one, other) and torch.equal(one, again)


def test_a_second_differentiation_is_refused() -> None:
    inputs, mask, clips, _ = tensors((3,), 16)
    leaves = [t.to(DEVICE).requires_grad_() for t in inputs]
    for y in (engine("l", mask, clips)(*leaves), swoosh(leaves[0], "l", backend="triton")):
        with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*create_graph"):
            torch.autograd.grad(y.sum(), leaves[0], create_graph=True)


def test_operators_are_registered_properly() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    (x, *_), mask, clips, _ = tensors((3, 2), 131)
    x = x.to(DEVICE)
    for of_mask in ((mask, clips), (None, None)):
        torch.library.opcheck(torch.ops.fastclap.swoosh, (x, *of_mask, "l"), test_utils=checks)
        for need_a in (True, False):
            arguments = (x, torch.randn_like(x), *of_mask, "r", need_a)
            torch.library.opcheck(torch.ops.fastclap.swoosh_linear_backward, arguments, test_utils=checks)


@pytest.mark.parametrize("dynamic", (None, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("need", ((True,) * 3, (True, False, False), (False, True, False)), ids=str)
def test_a_compiled_graph_stays_whole(need: tuple[bool, ...], dynamic: bool | None) -> None:
    torch._dynamo.reset()

    def call(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, clips: Tensor, backend: str) -> Tensor:
        return swoosh_linear(swoosh(x, "r", backend=backend), "l", weight, bias, mask, clips, backend=backend)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for backend, lengths in itertools.product(("triton", "auto"), ((5, 4), (9, 3)) if dynamic else ((5, 4),)):
        inputs, mask, clips, upstream = tensors(lengths, 131)
        results = (
            run(partial(way, mask=mask, clips=clips, backend=backend), inputs, upstream, need)
            for way in (call, compiled)
        )
        for one, other in zip(*results, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, atol=1e-5)


def test_autocast_gives_masters_their_own_dtype() -> None:
    inputs, mask, clips, upstream = tensors((9, 8), 131)

    def cast(*leaves: Tensor) -> Tensor:
        with torch.autocast(DEVICE, dtype=LOW):
            return engine("l", mask, clips)(*leaves)

    upstream = upstream.to(LOW)
    wanted = expected("l", mask, clips, [t.to(LOW) for t in inputs], upstream)
    found = run(cast, inputs, upstream)
    assert found[0].dtype == LOW
    for name, one, other in zip(NAMES, wanted, found, strict=True):
        assert name == "y" or other.dtype == torch.float32
        assert_close_rel(name, one, other, TOLERANCE[LOW])
    y = engine("l", mask, clips)(*(leaves := [t.to(DEVICE).requires_grad_() for t in inputs]))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):  # of the backward pass alone
        gradients = torch.autograd.grad(y, leaves, upstream.to(DEVICE, y.dtype))
    wanted = expected("l", mask, clips, inputs, upstream)
    for name, one, other in zip(NAMES[1:], wanted[1:], gradients, strict=True):
        assert_close_rel(name, one, other, 5 * 2.0**-8)


@pytest.mark.skipif(INTERPRETED, reason="is for GPUs")
def test_the_host_does_not_wait() -> None:
    inputs, mask, clips, upstream = tensors((100, 64), 512)
    leaves, upstream = [t.cuda().requires_grad_() for t in inputs], upstream.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        swoosh_linear(leaves[0], "l", *leaves[1:], mask, clips).backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
