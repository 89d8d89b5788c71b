"""The Triton engine of the gated convolution against float64: on a GPU, or in Triton's interpreter.

On a GPU the float64 reference is computed there as well; the interpreter (`TRITON_INTERPRET=1`) knows float32 and
float16 only, and takes a second for a few rows.
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

from fastclap.kernels.gated_convolution import gated_convolution, gated_convolution_reference
from fastclap.testing import assert_close_rel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1 (`make test` runs it)"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
LOW = torch.float16 if INTERPRETED else torch.bfloat16
# Lengths of clips, columns and K: one value; a clip of one row and of none, a strip and a bit of it; K beyond a clip's
# length; more rows than a share of 64, with a clip's border in each; the Zipformer's K.
CASES = [((1,), 1, 1), ((3, 1, 0, 2), 40, 5), ((2, 1), 3, 7), ((50, 9, 10), 3, 3), ((4,), 2, 31)]
CASES += [] if INTERPRETED else [((0, 7_000, 1, 9_000, 30), 1280, 31), ((3_000, 17), 1280, 15), ((500, 77), 33, 9)]
# ‖error‖ / ‖value‖: the rounding of results in 16 bits; of float32 that of sums over the rows.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
NAMES = ("y", "u", "weight", "bias")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def tensors(lengths: Sequence[int], columns: int, taps: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """[u, weight, bias], starts, and the gradient of y."""
    generator = torch.Generator().manual_seed(sum(lengths) + columns + taps)
    sizes = ((sum(lengths), 2 * columns), (columns, 1, taps), (columns,), (sum(lengths), columns))
    *found, upstream = (torch.randn(size, generator=generator).to(DEVICE) for size in sizes)
    starts = torch.cat((torch.zeros(1, dtype=torch.long), torch.tensor(lengths).cumsum(0))).int()
    return found, starts.to(DEVICE), upstream


def triton_engine(*arguments: Any) -> Tensor:
    return gated_convolution(*arguments, backend="triton")


def run(function: Any, inputs: Sequence[Any], starts: Tensor, upstream: Tensor, dtype: Any = None) -> list[Tensor]:
    """y, and the gradients of what is there."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in inputs]
    y = function(*leaves, starts)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], upstream.to(y.dtype))]


@pytest.mark.parametrize(("lengths", "columns", "taps"), CASES, ids=str)
def test_values_and_gradients_match_float64(lengths: tuple[int, ...], columns: int, taps: int) -> None:
    inputs, starts, upstream = tensors(lengths, columns, taps)
    for stream, parameters, bias in ((torch.float32,) * 2 + (True,), (LOW, torch.float32, False), (LOW, LOW, True)):
        used = [inputs[0].to(stream), inputs[1].to(parameters), inputs[2].to(parameters) if bias else None]
        wanted = run(gated_convolution_reference, used, starts, upstream.to(stream), torch.float64)
        found = run(triton_engine, used, starts, upstream.to(stream))
        for name, of, one, other in zip(NAMES, (used[0], *used), wanted, found, strict=False):
            assert other.dtype == of.dtype and other.is_contiguous()
            assert_close_rel(f"{name}, {stream}, {parameters}", one, other, TOLERANCE[of.dtype])


def test_strided_inputs_narrow_starts_and_an_expanded_gradient() -> None:
    (u, weight, bias), starts, _ = tensors((3, 2), 6, 3)
    wide = torch.cat((u, torch.full_like(u, torch.nan)), 1)
    used = [wide[:, :12], weight.transpose(0, 2).contiguous().transpose(0, 2), torch.stack((bias, bias), 1)[:, 0]]
    ones = torch.ones((), device=DEVICE).expand(5, 6)
    wanted = run(gated_convolution_reference, used, starts, ones, torch.float64)
    for index in (starts, starts.long()):
        for name, one, other in zip(NAMES, wanted, run(triton_engine, used, index, ones), strict=True):
            assert_close_rel(name, one, other, 2e-6)


def test_partial_gradients_equal_the_full_ones_and_u_alone_is_kept_of_the_rows() -> None:
    inputs, starts, upstream = tensors((3, 2), 6, 3)
    full = run(triton_engine, inputs, starts, upstream)
    for need in itertools.product((True, False), repeat=3):
        leaves = [t.clone().requires_grad_(wanted) for t, wanted in zip(inputs, need, strict=True)]
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = triton_engine(*leaves, starts)
        assert [tuple(t.shape) for t in kept] == ([(5, 12), (6, 1, 3), (3,)] if any(need) else [])
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad(y, wanted, upstream) if wanted else ()
        for one, other in zip(itertools.compress(full[1:], need), found, strict=True):
            assert torch.equal(one, other), need


def test_runs_are_bit_identical_and_no_clip_touches_another() -> None:
    inputs, starts, upstream = tensors((3, 1, 4), 6, 5)
    first = run(triton_engine, inputs, starts, upstream)
    call = lambda *t: checkpoint(triton_engine, *t, use_reentrant=False)  # noqa: E731
    for way in (triton_engine, call):
        for one, other in zip(first, run(way, inputs, starts, upstream), strict=True):
            assert one.isfinite().all() and torch.equal(one, other)
    inputs[0][3] = torch.inf  # the clip of one row
    y, du, *_ = run(triton_engine, inputs, starts, upstream)
    others = torch.arange(8, device=DEVICE) != 3
    assert not y[3].isfinite().any()
    assert torch.equal(y[others], first[0][others]) and torch.equal(du[others], first[1][others])


def test_a_second_differentiation_is_refused() -> None:
    inputs, starts, _ = tensors((3,), 2, 3)
    leaves = [t.requires_grad_() for t in inputs]
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(triton_engine(*leaves, starts).sum(), leaves, create_graph=True)


def test_operators_are_registered_properly() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    (u, weight, bias), starts, upstream = tensors((3, 2), 2, 3)
    leaves = [t.clone().requires_grad_() for t in (u, weight, bias)]
    for of_bias in (leaves[2], None):
        torch.library.opcheck(torch.ops.fastclap.gated_convolution, (*leaves[:2], of_bias, starts), test_utils=checks)
    for need_sums in (True, False):
        arguments = (upstream, u, weight, starts, need_sums)
        torch.library.opcheck(torch.ops.fastclap.gated_convolution_backward, arguments, test_utils=checks)


def test_a_compiled_graph_stays_whole_and_autocast_changes_nothing() -> None:
    torch._dynamo.reset()
    inputs, starts, upstream = tensors((3, 2), 2, 3)
    eager = run(triton_engine, inputs, starts, upstream)
    for backend in ("triton", "auto"):

        def call(*arguments: Any, backend: str = backend) -> Tensor:
            return gated_convolution(*arguments, backend=backend)

        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        for one, other in zip(eager, run(compiled, inputs, starts, upstream), strict=True):
            assert torch.equal(one, other) if backend == "triton" else torch.allclose(one, other, atol=1e-5)
    with torch.autocast(DEVICE, dtype=LOW):
        cast = run(triton_engine, inputs, starts, upstream)
    assert all(map(torch.equal, eager, cast))


@pytest.mark.skipif(INTERPRETED, reason="is for GPUs")
def test_the_host_does_not_wait() -> None:
    inputs, starts, upstream = tensors((300, 200), 1280, 31)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(triton_engine, inputs, starts, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(t.isfinite().all() for t in found)
