"""The engines of shared attention against float64: on a GPU, or the Triton one in its interpreter.

The interpreter (`TRITON_INTERPRET=1`) knows float32 and float16 only, and its products are exact float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclap.kernels.shared_attention import shared_attention
from fastclap.testing import assert_close_rel
from tests.kernels.shared_attention_cases import NAMES, Case, case, check, oracle

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1 (`make test` runs it)"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
# A GPU adds the three products of TF32 parts with fewer bits than float32 has.
TOLERANCE = {torch.float32: 2e-5 if INTERPRETED else 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TORCH_TOLERANCE = {torch.float32: 3e-3, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # may multiply float32 in TF32
# Clips' rows, heads, width of heads, channels, wide and narrow values: tiles are 32 x 32 in the interpreter.
SHAPES: tuple[dict[str, Any], ...] = (
    {"lengths": (1,), "heads": 1, "width": 16, "more": 0},
    {"lengths": (2, 1), "heads": 2, "width": 32},
    {"lengths": (33, 32, 1, 45), "heads": 1, "width": 32, "wide": 70},
    {"lengths": (100,), "heads": 1, "width": 20, "channels": 3, "narrow": 5, "wide": 65},
    {"lengths": (17, 40), "heads": 2, "width": 16, "channels": 1, "narrow": 66, "wide": 12, "more": 90},
)
# CLSP's layer: its heads, and long and short clips that no tile divides
LARGE: tuple[dict[str, Any], ...] = (
    {"lengths": (499, 3, 250), "heads": 8, "width": 32, "wide": 960},
    {"lengths": (1001,), "heads": 2, "width": 32, "wide": 960},
    {"lengths": (63, 65, 127, 129, 1) * 5, "heads": 4, "width": 64, "wide": 128},
)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    assert torch.get_float32_matmul_precision() == "highest"
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU all of them meet, below")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: dict[str, Any]) -> None:
    for dtype in DTYPES:
        matches_float64("triton", shape, dtype, torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="is for GPUs")
@pytest.mark.parametrize("engine", ("triton", "torch"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_all_dtypes_and_shapes_match_float64(engine: str, dtype: torch.dtype, shape: dict[str, Any]) -> None:
    for side in {torch.float32, dtype}:
        matches_float64(engine, shape, dtype, side)


def matches_float64(engine: str, shape: dict[str, Any], dtype: torch.dtype, side: torch.dtype) -> None:
    x = case(**shape, dtype=dtype, side=side, device=DEVICE)
    results = x.results(engine)
    assert {value.dtype for value in (*results[:6], *results[7:])} == {dtype} and results[6].dtype == side
    tol = (TOLERANCE if engine == "triton" else TORCH_TOLERANCE)[dtype]
    check(f"{shape}, {dtype}", x, results, exact(x), tol)


def exact(x: Case, penalty: float = 0.0) -> tuple[Tensor, ...]:
    """In float64: of few rows from the definition, of many from the reference, which its own test compares with it."""
    if len(x.q) < 50:
        return oracle(x, penalty)
    leaves = [leaf.detach().double().requires_grad_() for leaf in x.leaves]
    upstreams = tuple(upstream.double() for upstream in x.upstreams)
    return Case(*leaves[:4], tuple(leaves[4:]), upstreams, x.starts, x.lengths).results("reference", penalty)


def test_large_scores() -> None:
    """Scores of some hundreds: only the running maximum keeps their exponentials finite."""
    x = case((40,), heads=1, scale=60.0, device=DEVICE)
    # Scores of 500 are themselves rounded to 3e-5, and to more by tf32x3.
    check("large scores", x, x.results("triton"), exact(x), 3e-4 if INTERPRETED else 2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_penalty_is_a_term_of_the_loss_and_counts_once(dtype: torch.dtype) -> None:
    # Multiples of 1/4 in q and k and of 1/2 in p and the table: every score is exact, and none is at ±25.
    x = case((40, 9), wide=12, scale=12.0, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        for leaf, step in ((x.q, 0.5), (x.k, 0.5), (x.p, 2.0), (x.table, 0.5)):
            leaf.copy_((leaf / step).round() * step)
        x.p[..., 0] = 1.0
        x.table[:, 0] += 0.125
    plain, penalized = exact(x), exact(x, 0.5)
    for before, after in zip(plain[3:7], penalized[3:7], strict=True):
        assert (before - after).norm() > 0.1 * before.norm(), "there are such scores"
    check("penalized", x, x.results("triton", 0.5), penalized, 4 * TOLERANCE[dtype])


def test_any_strides_and_a_table_of_16_bits() -> None:
    """Heads that do not lie side by side, transposed values, a gradient that is expanded."""
    plain = case((21, 12), device=DEVICE, side=torch.float16)
    q, k, p = (
        leaf.detach().repeat_interleave(2, 2)[..., ::2].requires_grad_() if at else
        leaf.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        for at, leaf in enumerate(plain.leaves[:3])
    )  # fmt: skip
    values = tuple(v.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_() for v in plain.values)
    upstreams = tuple(upstream[:, :1, :1].expand_as(upstream) for upstream in plain.upstreams)
    assert not any(leaf.is_contiguous() for leaf in (q, k, p, *values))
    x = Case(q, k, p, plain.table, values, upstreams, plain.starts, plain.lengths)
    check("strided", x, x.results("triton"), exact(x), 1e-3)  # the table's gradient is rounded to 16 bits


def test_a_clip_alone_is_the_clip_in_a_batch_whatever_the_others_hold() -> None:
    x = case((20, 33, 9), heads=1, wide=70, device=DEVICE)
    with torch.no_grad():
        for leaf in (x.q, x.k, x.p, *x.values):
            leaf[:20] = float("nan")
            leaf[53:] = float("nan")
    weights = shared_attention(*x.leaves[:4], x.starts, x.lengths, backend="triton")
    outputs = [weights.attend(v) for v in x.values]
    inside = [out[20:53] for out in outputs]
    gradients = torch.autograd.grad(inside, (x.q, x.k, x.p, *x.values), [u[20:53] for u in x.upstreams])
    starts = torch.tensor([0, 33], dtype=torch.int32, device=DEVICE)
    q, k, p = (leaf.detach()[20:53].requires_grad_() for leaf in x.leaves[:3])
    values = tuple(v.detach()[20:53].requires_grad_() for v in x.values)
    alone = Case(q, k, p, x.table, values, tuple(u[20:53] for u in x.upstreams), starts, (33,))
    results = alone.results("triton")
    assert all(map(torch.equal, inside, results[:3]))
    own = (*results[3:6], *results[7:])
    assert all(torch.equal(gradient[20:53], value) for gradient, value in zip(gradients, own, strict=True))


def test_two_runs_are_equal_bit_by_bit() -> None:
    x = case((45, 12), heads=1, wide=70, dtype=DTYPES[-1], scale=12.0, device=DEVICE)
    assert all(map(torch.equal, x.results("triton", 0.5), x.results("triton", 0.5)))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has tiles of its own, and `LARGE`")
@pytest.mark.parametrize("sides", ((16, 32), (32, 64), (64, 64)), ids=str)
def test_tiles_of_all_gpus_sum_the_same_distances(sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastclap.kernels import shared_attention_triton as engine

    used = {tiles[engine.KERNELS.index("queries")][:2] for some in engine.TILES.values() for tiles in some.values()}
    assert used == {(16, 32), (32, 64), (64, 64)}, "those of this test"
    monkeypatch.setattr(engine, "INTERPRETER_TILE", engine.Tile(*sides, 32, 4, 1))
    x = case((100, 41), heads=1, wide=12)
    check(f"{sides}", x, x.results("triton"), exact(x), TOLERANCE[torch.float32])


def test_only_the_gradients_asked_for() -> None:
    x = case((19,), heads=1, wide=70, device=DEVICE)
    expected = oracle(x)[3:]
    for index in range(len(x.leaves)):
        leaves = [leaf.detach().requires_grad_(i == index) for i, leaf in enumerate(x.leaves)]
        weights = shared_attention(*leaves[:4], x.starts, x.lengths, backend="triton")
        outputs = [weights.attend(v) for v in leaves[4:]]
        torch.autograd.backward(
            [out for out in outputs if out.requires_grad],
            [u for out, u in zip(outputs, x.upstreams, strict=True) if out.requires_grad],
        )
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (i == index)
        assert_close_rel(NAMES[3 + index], expected[index], leaves[index].grad, TOLERANCE[torch.float32])


@pytest.mark.parametrize("user", (0, 1))
def test_second_differentiation_is_an_error(user: int) -> None:
    x = case((5,), device=DEVICE)
    for penalty in (0.0, 0.5):
        weights = shared_attention(*x.leaves[:4], x.starts, x.lengths, penalty=penalty, backend="triton")
        with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*create_graph"):
            torch.autograd.grad(weights.attend(x.values[user]).sum(), x.q, create_graph=True)


def test_autocast() -> None:
    x = case((19, 7), device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        weights = shared_attention(*x.leaves[:4], x.starts, x.lengths, backend="triton")
        outputs = [weights.attend(v) for v in x.values]
    assert {out.dtype for out in outputs} == {torch.float16}
    gradients = torch.autograd.grad(outputs, x.leaves, [u.half() for u in x.upstreams])
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    check("autocast", x, (*outputs, *gradients), exact(x), 1e-2)


def test_operators_pass_opcheck() -> None:
    x = case((7, 4), heads=1, device=DEVICE)
    ops = torch.ops.fastclap
    made_of = tuple(leaf.detach() for leaf in x.leaves[:4])
    torch.library.opcheck(ops.shared_attention_sums.default, (*made_of, x.starts, 7))
    log_sum, packed = ops.shared_attention_sums(*made_of, x.starts, 7)
    tests = ("test_schema", "test_faketensor")
    for v, upstream in zip(x.values[:2], x.upstreams[:2], strict=True):
        torch.library.opcheck(
            ops.shared_attention.default, (*x.leaves[:4], v, log_sum, packed, x.starts, 7), rtol=1e-4, atol=1e-5
        )
        v = v.detach()
        out = ops.shared_attention(*made_of, v, log_sum, packed, x.starts, 7)
        saved = (out, *made_of, v, log_sum, packed, x.starts, 7)
        torch.library.opcheck(ops.shared_attention_backward.default, ([True] * 5, upstream, *saved), test_utils=tests)
    torch.library.opcheck(
        ops.shared_attention_penalty.default, ([True] * 4, *made_of, packed, x.starts, 7, 0.5), test_utils=tests
    )


@pytest.mark.parametrize("penalty", (0.0, 0.5))
def test_compiles_without_a_graph_break(penalty: float) -> None:
    x = case((5, 3), heads=1, scale=6.0, device=DEVICE)

    def attend(*leaves: Tensor) -> list[Tensor]:
        weights = shared_attention(*leaves[:4], x.starts, x.lengths, penalty=penalty, backend="triton")
        return [weights.attend(v) * 2.0 for v in leaves[4:]]

    outputs = torch.compile(attend, fullgraph=True, backend="aot_eager")(*x.leaves)
    gradients = torch.autograd.grad(outputs, x.leaves, [u / 2 for u in x.upstreams])
    halves = [out / 2 for out in outputs]
    expected, plain = oracle(x, penalty), oracle(x)
    assert not penalty or (expected[3] - plain[3]).norm() > 0.1 * plain[3].norm(), "there are such scores"
    check("compiled", x, (*halves, *gradients), expected, 10 * TOLERANCE[torch.float32])


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_graph_replays_forward_and_backward(dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(False)  # poison is not for a capture's memory
    x = case((150, 77), width=32, wide=960, dtype=dtype, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = [value.clone() for value in x.results("triton")]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = x.results("triton")
    graph.replay()
    assert all(map(torch.equal, eager, captured))


@pytest.mark.skipif(INTERPRETED, reason="is for GPUs")
def test_the_host_does_not_wait() -> None:
    x = case((45, 12), width=32, wide=960, dtype=torch.bfloat16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = x.results("auto", 1e-4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite().all() for value in results)
