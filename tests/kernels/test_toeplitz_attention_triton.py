"""The Triton engine of gated-Toeplitz attention against float64: on a GPU, or in Triton's interpreter
(`TRITON_INTERPRET=1`), which knows float32 and float16 only and whose products are exact float32."""

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
# (batch, heads, length, head width, dropout): tiles are 64×32 in the interpreter, the table's are 64×64.
SHAPES = (
    (3, 2, 1, 16, 0.0),
    (3, 2, 2, 16, 0.25),
    (3, 2, 17, 80, 0.0),
    (2, 2, 63, 20, 0.125),
    (1, 1, 127, 128, 0.5),
    (2, 1, 129, 32, 0.0),
    (1, 1, 200, 16, 0.125),
)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    assert torch.get_float32_matmul_precision() == "highest"
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def some_lengths(batch: int, length: int) -> Tensor:
    return torch.tensor([length, max(1, length * 5 // 8), 0][:batch], device=DEVICE)


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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, int, int, int, float]) -> None:
    batch, heads, length, width, dropout = shape
    for index, dtype in enumerate(DTYPES):
        if dtype == torch.float32 and width > 64 and not INTERPRETED:
            continue  # left to the torch engine
        x = case(batch, heads, length, width, dtype, device=DEVICE, seed=length)
        lengths = some_lengths(batch, length) if (index + length) % 2 else None
        keep = next_mask(batch, heads, length, dropout)
        out = gated_toeplitz_attention(*x.leaves, lengths, dropout=dropout, backend="triton")
        assert out.dtype == dtype
        check(f"{shape}, {dtype}", x, out, reference(x, lengths, dropout, keep), TOLERANCE[dtype])


def test_large_logits() -> None:
    """Logits of some hundreds, of one sign in a row: only the running maximum keeps their exponentials finite."""
    x = case(1, 2, 40, 16, device=DEVICE)
    with torch.no_grad():
        x.q.mul_(40)
        x.gate.add_(100)
    out = gated_toeplitz_attention(*x.leaves, backend="triton")
    check("large logits", x, out, reference(x, None), 2e-4)


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
    check("strided", x, gated_toeplitz_attention(*x.leaves, backend="triton"), reference(x, None), 2e-5)


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


def test_groups_of_clips_share_the_work_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastclap.kernels import toeplitz_attention_triton

    x = case(5, 1, 70, 16, device=DEVICE)
    expected = reference(x, None)[1][3]
    for programs in (1, 6):  # one group of five clips; groups of three and two
        monkeypatch.setattr(toeplitz_attention_triton, "DIAGONAL_PROGRAMS", programs)
        out = gated_toeplitz_attention(*x.leaves, backend="triton")
        (gradient,) = torch.autograd.grad(out, x.table, x.upstream)
        assert_close_rel(f"table, {programs} programs", expected, gradient, 2e-5)


def test_only_the_gradients_asked_for() -> None:
    x = case(2, 1, 19, 16, device=DEVICE)
    expected = reference(x, None)[1]
    for index in range(5):
        leaves = [leaf.detach().requires_grad_(i == index) for i, leaf in enumerate(x.leaves)]
        gated_toeplitz_attention(*leaves, backend="triton").backward(x.upstream)
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (i == index)
        assert_close_rel(str(index), expected[index], leaves[index].grad, 2e-5)


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
    saved = (*(leaf.detach() for leaf in x.leaves), None, None, out, log_sum, 0.0, 0.25)
    backward = torch.ops.fastclap.gated_toeplitz_attention_backward.default
    for need in ([True] * 5, [False, True, False, True, False]):
        torch.library.opcheck(backward, (x.upstream, *saved, need), test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_a_graph_break() -> None:
    x = case(2, 2, 11, 16, device=DEVICE)
    lengths = torch.tensor([11, 4], device=DEVICE)

    def attention(*inputs: Tensor) -> Tensor:
        return gated_toeplitz_attention(*inputs, lengths, backend="triton") * 2.0

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    expected, gradients = reference(x, lengths)
    check("compiled", x, compiled(*x.leaves), (2 * expected, tuple(2 * g for g in gradients)), 2e-5)
