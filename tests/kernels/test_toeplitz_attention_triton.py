"""The engines of gated-Toeplitz attention against float64: on a GPU, or the Triton one in its interpreter.

On a GPU every engine, dtype and shape meet each other, with lengths and without, most with dropout and without. The
interpreter (`TRITON_INTERPRET=1`) knows float32 and float16 only, and its products are exact float32; there one dtype
of a shape has lengths and the other has none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastclap.kernels.toeplitz_attention import (
    dropout_mask,
    gated_toeplitz_attention,
    gated_toeplitz_attention_reference,
)
from fastclap.testing import assert_close_rel
from tests.kernels.toeplitz_attention_cases import NAMES, Case, case, check

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1 (`make test` runs it)"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
# torch's attention takes the bias in the dtype of q, and may multiply float32 in TF32.
TORCH_TOLERANCE = {torch.float32: 3e-3, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# (batch, heads, length, head width, dropout): tiles are 64×32 in the interpreter.
SHAPES = (
    (3, 2, 1, 16, 0.0),
    (3, 2, 2, 16, 0.25),
    (3, 2, 17, 80, 0.0),
    (2, 2, 63, 20, 0.125),
    (1, 1, 127, 128, 0.5),
    (2, 1, 129, 32, 0.0),
    (1, 1, 200, 16, 0.125),
)
# WavLM's heads; more keys than a few tiles; more tiles on a diagonal than programs share
LARGE = ((2, 4, 499, 64, 0.125), (1, 2, 1499, 64, 0.125), (24, 2, 150, 64, 0.125), (3, 2, 333, 128, 0.25))


def tolerance(dtype: torch.dtype, length: int, width: int, exact: float = TOLERANCE[torch.float32]) -> float:
    """The Triton engine's largest relative error; `exact`: of float32 products in float32, as in the interpreter.

    A GPU adds the three products of TF32 parts (tf32x3) with fewer bits than float32 has: of emulated sums of 768
    products that costs 2.6e-6 of the factors' norms, which logits of up to 8 multiply; admitted two and a half times.
    """
    if dtype != torch.float32:
        return TOLERANCE[dtype]
    return exact if INTERPRETED else exact + 2.5 * 8 * 2.6e-6 * (max(length, width) / 768) ** 0.5


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    assert torch.get_float32_matmul_precision() == "highest"
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def some_lengths(batch: int, length: int) -> Tensor:
    return torch.tensor(([length, max(1, length * 5 // 8), 0] * batch)[:batch], device=DEVICE)


def reference(
    x: Case, lengths: Tensor | None, dropout: float = 0.0, keep: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [leaf.detach().double().requires_grad_() for leaf in x.leaves]
    out = gated_toeplitz_attention_reference(*leaves, lengths, dropout=dropout, keep=keep)
    return out.detach(), torch.autograd.grad(out, leaves, x.upstream.double())


def next_mask(batch: int, heads: int, length: int, dropout: float) -> Tensor | None:
    """The mask of the next call, which draws one seed from the generator of the device; leaves that as it is."""
    if dropout == 0:
        return None
    state = torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()
    seed = torch.randint(0, 2**63 - 1, (1,), device=DEVICE)
    (torch.cuda.set_rng_state if DEVICE == "cuda" else torch.set_rng_state)(state)
    return dropout_mask(seed, batch, heads, length, dropout)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU all of them meet, below")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, int, int, int, float]) -> None:
    length = shape[2]
    for index, dtype in enumerate(DTYPES):
        matches_float64("triton", shape, dtype, bool((index + length) % 2))


@pytest.mark.skipif(INTERPRETED, reason="is for GPUs")
@pytest.mark.parametrize("engine", ("triton", "torch"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@pytest.mark.parametrize("with_lengths", (False, True), ids=("whole", "lengths"))
def test_all_dtypes_and_shapes_match_float64(
    engine: str, dtype: torch.dtype, shape: tuple[int, int, int, int, float], with_lengths: bool
) -> None:
    *sizes, dropout = shape
    for rate in {0.0, dropout} if engine == "triton" else {0.0}:  # torch's mask nobody knows
        matches_float64(engine, (*sizes, rate), dtype, with_lengths)


def matches_float64(
    engine: str, shape: tuple[int, int, int, int, float], dtype: torch.dtype, with_lengths: bool
) -> None:
    batch, heads, length, width, dropout = shape
    if engine == "triton" and dtype == torch.float32 and width > 64 and not INTERPRETED:
        return  # left to the torch engine
    x = case(batch, heads, length, width, dtype, device=DEVICE, seed=length)
    lengths = some_lengths(batch, length) if with_lengths else None
    keep = next_mask(batch, heads, length, dropout)
    out = gated_toeplitz_attention(*x.leaves, lengths, dropout=dropout, backend=engine)
    assert out.dtype == dtype
    tol = tolerance(dtype, length, width) if engine == "triton" else TORCH_TOLERANCE[dtype]
    check(f"{shape}, {dtype}", x, out, reference(x, lengths, dropout, keep), tol)


def test_large_logits() -> None:
    """Logits of some hundreds, of one sign in a row: only the running maximum keeps their exponentials finite."""
    x = case(1, 2, 40, 16, device=DEVICE)
    with torch.no_grad():
        x.q.mul_(40)
        x.gate.add_(100)
    out = gated_toeplitz_attention(*x.leaves, backend="triton")
    # Logits of 500 are themselves rounded to 3e-5, and to more by tf32x3.
    check("large logits", x, out, reference(x, None), 2e-4 if INTERPRETED else 5e-4)


def test_any_strides_and_dtypes_of_table_and_gate() -> None:
    """q, k, v as parts of one projection; gate transposed; table of 16 bits; gradients that are views or expanded."""
    batch, heads, length, width = 2, 2, 21, 16
    plain = case(batch, heads, length, width, device=DEVICE)
    packed = torch.stack([leaf.detach().transpose(1, 2) for leaf in plain.leaves[:3]], 2).requires_grad_()
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    table = plain.table.detach().half().requires_grad_()
    gate = plain.gate.detach().transpose(1, 2).contiguous().requires_grad_()
    x = Case(q, k, v, table, gate.transpose(1, 2), plain.upstream[:1].expand(batch, -1, -1, -1))
    check("views", x, gated_toeplitz_attention(*x.leaves, backend="triton"), reference(x, None), 1e-3)
    (gradient,) = torch.autograd.grad(gated_toeplitz_attention(*x.leaves, backend="triton").sum(), gate)
    (same,) = torch.autograd.grad(gated_toeplitz_attention_reference(*x.leaves).sum(), gate)
    assert_close_rel("gate", same, gradient, 1e-4)
    # The innermost dimension strided.
    x = Case(*(leaf.detach().repeat_interleave(2, 3)[..., ::2].requires_grad_() for leaf in plain.leaves[:3]),
             plain.table, plain.gate, plain.upstream.repeat_interleave(2, 3)[..., ::2])  # fmt: skip
    tol = tolerance(torch.float32, length, width)
    check("strided", x, gated_toeplitz_attention(*x.leaves, backend="triton"), reference(x, None), tol)


def test_padding_may_hold_anything() -> None:
    """NaN in keys and values past a clip's end touches nothing, and their gradients are exactly zero."""
    lengths = torch.tensor([20, 37], device=DEVICE)
    x = case(2, 1, 37, 16, device=DEVICE)
    with torch.no_grad():
        x.k[0, :, 20:] = float("nan")
        x.v[0, :, 20:] = float("nan")
    for kind in (torch.int64, torch.int32):
        out = gated_toeplitz_attention(*x.leaves, lengths.to(kind), backend="triton")
        gradients = torch.autograd.grad(out, x.leaves, x.upstream)
        assert all(value.isfinite().all() for value in (out, *gradients))
        assert not gradients[1][0, :, 20:].any() and not gradients[2][0, :, 20:].any()
    with torch.no_grad():
        x.k.nan_to_num_(0.5), x.v.nan_to_num_(0.5)
    again = gated_toeplitz_attention(*x.leaves, lengths, backend="triton")
    assert torch.equal(out, again)
    assert all(map(torch.equal, gradients, torch.autograd.grad(again, x.leaves, x.upstream)))


def test_two_runs_are_equal_bit_by_bit_and_dropout_repeats_with_the_generator() -> None:
    x = case(1, 2, 45, 16, DTYPES[-1], device=DEVICE)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        out = gated_toeplitz_attention(*x.leaves, some_lengths(1, 45), dropout=0.25, backend="triton")
        runs.append((out, *torch.autograd.grad(out, x.leaves, x.upstream)))
    assert all(map(torch.equal, *runs))
    assert not torch.equal(out, gated_toeplitz_attention(*x.leaves, dropout=0.25, backend="triton"))


def test_a_clip_alone_is_the_clip_in_a_batch() -> None:
    x = case(3, 2, 33, 16, device=DEVICE)
    out = gated_toeplitz_attention(*x.leaves, backend="triton")
    alone = gated_toeplitz_attention(x.q[1:2], x.k[1:2], x.v[1:2], x.table, x.gate[1:2], backend="triton")
    assert torch.equal(out[1:2], alone)


def test_weights_dropped_are_those_of_the_mask() -> None:
    """v = unit vectors returns the weights themselves."""
    batch, heads, length, dropout = 2, 2, 40, 0.25
    x = case(batch, heads, length, 64, device=DEVICE)
    v = torch.eye(length, 64, device=DEVICE).expand(batch, heads, length, 64)
    keep = next_mask(batch, heads, length, dropout)
    weights = gated_toeplitz_attention(x.q, x.k, v, x.table, x.gate, dropout=dropout, backend="triton")
    assert keep is not None and torch.equal(weights[..., :length] != 0, keep)
    assert not weights[..., length:].any()


def test_clips_of_a_group_are_added_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter clips before longer ones, and one without keys."""
    from fastclap.kernels import toeplitz_attention_triton

    x, lengths = case(5, 1, 70, 16, device=DEVICE), torch.tensor([5, 70, 0, 33, 64], device=DEVICE)
    expected = reference(x, lengths)[1]
    for programs in (1, 6):  # one group of five clips; groups of two, two and one
        monkeypatch.setattr(toeplitz_attention_triton, "TABLE_PROGRAMS", programs)
        out = gated_toeplitz_attention(*x.leaves, lengths, backend="triton")
        for name, exact, value in zip(NAMES, expected, torch.autograd.grad(out, x.leaves, x.upstream), strict=True):
            assert_close_rel(f"{name}, {programs} programs", exact, value, tolerance(torch.float32, 70, 16))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has tiles of its own, and `LARGE`")
@pytest.mark.parametrize("sides", ((32, 32), (64, 64), (128, 64)), ids=str)
def test_tiles_of_all_gpus_sum_the_same_diagonals(sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastclap.kernels import toeplitz_attention_triton as engine

    used = {tiles[engine.KERNELS.index("queries")][:2] for some in engine.TILES.values() for tiles in some.values()}
    assert used == {(32, 32), (64, 32), (64, 64), (128, 64)}, "those of this test, and the interpreter's"
    monkeypatch.setattr(engine, "INTERPRETER_TILE", engine.AttentionTile(*sides, 4, 1))
    for length, lengths in ((131, None), (64, torch.tensor([64, 41]))):
        x = case(2, 1, length, 16)
        out = gated_toeplitz_attention(*x.leaves, lengths, backend="triton")
        check(f"{sides}, {length}", x, out, reference(x, lengths), tolerance(torch.float32, length, 16))


def test_only_the_gradients_asked_for() -> None:
    x = case(2, 1, 19, 16, device=DEVICE)
    expected = reference(x, None)[1]
    for index in range(5):
        leaves = [leaf.detach().requires_grad_(i == index) for i, leaf in enumerate(x.leaves)]
        gated_toeplitz_attention(*leaves, backend="triton").backward(x.upstream)
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (i == index)
        assert_close_rel(str(index), expected[index], leaves[index].grad, tolerance(torch.float32, 19, 16))


def test_second_differentiation_is_an_error() -> None:
    x = case(1, 1, 5, 16, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*create_graph"):
        torch.autograd.grad(gated_toeplitz_attention(*x.leaves, backend="triton").sum(), x.q, create_graph=True)


def test_autocast() -> None:
    x = case(2, 1, 19, 16, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        out = gated_toeplitz_attention(*x.leaves, backend="triton")
    assert out.dtype == torch.float16
    gradients = torch.autograd.grad(out, x.leaves, x.upstream.half())
    for name, expected, value in zip(NAMES, reference(x, None)[1], gradients, strict=True):
        assert value.dtype == torch.float32
        assert_close_rel(name, expected, value, 5e-3)


def test_operator_passes_opcheck() -> None:
    x, lengths = case(2, 1, 7, 16, device=DEVICE), torch.tensor([7, 4], device=DEVICE)
    seed = torch.tensor([77], device=DEVICE)
    op = torch.ops.fastclap.gated_toeplitz_attention.default
    torch.library.opcheck(op, (*x.leaves, lengths, seed, 0.25, 0.25))
    with torch.no_grad():
        out, log_sum = op(*x.leaves, None, None, 0.0, 0.25)
    saved = (out, log_sum, *(leaf.detach() for leaf in x.leaves), None, None, 0.0, 0.25)
    backward = torch.ops.fastclap.gated_toeplitz_attention_backward.default
    for need in ([True] * 5, [False, True, False, True, False]):
        torch.library.opcheck(backward, (need, x.upstream, *saved), test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_a_graph_break() -> None:
    x = case(2, 2, 11, 16, device=DEVICE)
    lengths = torch.tensor([11, 4], device=DEVICE)

    def attention(*inputs: Tensor) -> Tensor:
        return gated_toeplitz_attention(*inputs, lengths, backend="triton") * 2.0

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    expected, gradients = reference(x, lengths)
    tol = tolerance(torch.float32, 11, 16)
    check("compiled", x, compiled(*x.leaves), (2 * expected, tuple(2 * g for g in gradients)), tol)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_graph_replays_forward_and_backward(dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(False)  # poison is not for a capture's memory
    x = case(2, 2, 150, 64, dtype, device="cuda")
    lengths = some_lengths(2, 150)

    def step() -> list[Tensor]:
        out = gated_toeplitz_attention(*x.leaves, lengths)
        return [out, *torch.autograd.grad(out, x.leaves, x.upstream)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = [value.clone() for value in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(map(torch.equal, eager, captured))


@pytest.mark.skipif(INTERPRETED, reason="is for GPUs")
def test_the_host_does_not_wait() -> None:
    x, lengths = case(2, 2, 45, 64, torch.bfloat16, device="cuda"), some_lengths(2, 45)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = gated_toeplitz_attention(*x.leaves, lengths, dropout=0.1)
        gradients = torch.autograd.grad(out, x.leaves, x.upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(gradient.isfinite().all() for gradient in gradients)
