"""Gated-Toeplitz attention: its definition, the torch engine, the dropout mask and the checks of arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.toeplitz_attention import (
    HEADS_ALONE,
    dropout_mask,
    gated_toeplitz_attention,
    gated_toeplitz_attention_reference,
    toeplitz,
)
from fastclap.testing import assert_close_rel
from tests.kernels.toeplitz_attention_cases import Case, case, check, oracle

LENGTHS = (1, 2, 17, 63, 127, 129, 200)


def reference(x: Case, lengths: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [leaf.detach().double().requires_grad_() for leaf in x.leaves]
    out = gated_toeplitz_attention_reference(*leaves, lengths)
    return out.detach(), torch.autograd.grad(out, leaves, x.upstream.double())


def test_toeplitz_matrix() -> None:
    table = torch.tensor([[1.0, 2, 3, 4, 5]])
    assert toeplitz(table).tolist() == [[[3, 4, 5], [2, 3, 4], [1, 2, 3]]]
    assert toeplitz(table, 5)[0, 1].tolist() == [2, 3, 4, 5, 0]


@pytest.mark.parametrize("backend", ("reference", "torch"))
@pytest.mark.parametrize("length", (1, 2, 17))
def test_matches_the_definition_element_by_element(length: int, backend: str) -> None:
    x = case(3, 2, length, 8, torch.float64, torch.float64)
    for lengths in (None, torch.tensor([length, max(1, length // 2), 0])):
        for scale in (None, 0.7):
            out = gated_toeplitz_attention(*x.leaves, lengths, scale=scale, backend=backend)
            check(f"{backend}, {length}", x, out, oracle(x, lengths, scale=scale), 1e-12)


@pytest.mark.parametrize("length", LENGTHS)
def test_torch_engine_matches_float64(length: int) -> None:
    for lengths, (dtype, tol) in itertools.product(
        (None, torch.tensor([max(1, length - 5), length])), ((torch.float32, 1e-5), (torch.bfloat16, 3e-2))
    ):
        x = case(2, 2, length, 24, dtype)
        out = gated_toeplitz_attention(*x.leaves, lengths)
        assert out.dtype == dtype
        check(f"{dtype}, {length}", x, out, reference(x, lengths), tol)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_torch_engine_without_gradients(dtype: torch.dtype, tol: float) -> None:
    length = HEADS_ALONE + 7
    x = case(3, 2, length, 24, dtype, torch.promote_types(dtype, torch.float32))
    for lengths in (None, torch.tensor([length, 11, 0])):
        expected = reference(x, lengths)[0]
        for autocast in (False, True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = gated_toeplitz_attention(*x.leaves, lengths)
            given = torch.bfloat16 if autocast and dtype != torch.float64 else dtype
            assert out.dtype == given and out.transpose(1, 2).is_contiguous()
            assert_close_rel(f"{lengths}", expected, out, tol if given == dtype else 3e-2)
        with_gradients = gated_toeplitz_attention(*x.leaves, lengths)
        assert_close_rel("with gradients", expected, with_gradients.detach(), tol)


def test_bias_is_that_of_attention_with_a_written_out_mask() -> None:
    x = case(2, 3, 21, 16)
    at = torch.arange(21)
    bias = x.gate[..., None] * x.table[:, at - at[:, None] + 20]
    expected = F.scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=bias)
    assert_close_rel("output", expected, gated_toeplitz_attention(*x.leaves), 1e-6)


def test_keys_past_the_length_do_not_matter() -> None:
    x, lengths = case(2, 2, 13, 8), torch.tensor([6, 13])
    out = gated_toeplitz_attention(*x.leaves, lengths)
    changed = [leaf.detach().clone() for leaf in (x.k, x.v)]
    for leaf in changed:
        leaf[0, :, 6:] = 1e4
    assert torch.equal(out, gated_toeplitz_attention(x.q, *changed, x.table, x.gate, lengths))


def test_dropout_of_the_torch_engine_repeats_with_the_generator_and_keeps_the_mean() -> None:
    x = case(2, 2, 50, 8, torch.float64, torch.float64)
    ones = torch.ones_like(x.v)
    state = torch.get_rng_state()
    out = gated_toeplitz_attention(x.q, x.k, ones, x.table, x.gate, dropout=0.3)
    torch.set_rng_state(state)
    assert torch.equal(out, gated_toeplitz_attention(x.q, x.k, ones, x.table, x.gate, dropout=0.3))
    assert not torch.equal(out, gated_toeplitz_attention(x.q, x.k, ones, x.table, x.gate, dropout=0.3))
    assert abs(out.mean().item() - 1) < 0.05


@pytest.mark.parametrize("dropout", (0.1, 0.5))
def test_dropout_mask_is_as_independent_draws(dropout: float) -> None:
    """Rate, and correlations within rows and columns, between heads and clips, as normal scores."""
    keep = dropout_mask(torch.tensor([0x1234_5678_9ABC_DEF]), 4, 3, 200, dropout)
    x = (keep.double() - (1 - dropout)) / (dropout * (1 - dropout)) ** 0.5
    products = {"rate": x, "heads": x[:, 1:] * x[:, :-1], "clips": x[1:] * x[:-1]}
    for rows, columns in itertools.product((0, 1, 2, 7, 8, 9, 16, 64), (0, 1, 2, 8, 16, 64)):
        if rows or columns:
            shifted = x[..., rows:, columns:] * x[..., : 200 - rows, : 200 - columns]
            products[f"{rows} rows, {columns} columns"] = shifted
    for name, values in products.items():
        score = values.sum() / values.numel() ** 0.5
        # A rate of k / 2^16 differs from the one asked for by up to 2^-17.
        assert abs(score) < 5, f"{name}: {score:.1f}"
    for axes, size in (((3,), 200), ((2,), 200), ((0, 1), 12)):
        assert abs(x.sum(axes).var() / size - 1) < 0.2
    again = dropout_mask(torch.tensor([0x1234_5678_9ABC_DEF]), 2, 3, 200, dropout)
    assert torch.equal(again, keep[:2])
    assert not torch.equal(again, dropout_mask(torch.tensor([0x1234_5678_9ABC_DF0]), 2, 3, 200, dropout))


def test_autocast_takes_q_k_and_v_only() -> None:
    x = case(2, 2, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = gated_toeplitz_attention(*x.leaves)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out, x.leaves, x.upstream.to(out.dtype))
    assert {g.dtype for g in gradients} == {torch.float32}
    assert_close_rel("output", gated_toeplitz_attention(*x.leaves), out, 2e-2)


def test_empty_batch() -> None:
    x = case(0, 2, 9, 8)
    assert gated_toeplitz_attention(*x.leaves).shape == (0, 2, 9, 8)


def test_compiles_without_a_graph_break() -> None:
    x, lengths = case(2, 2, 9, 8), torch.tensor([9, 4])
    compiled = torch.compile(gated_toeplitz_attention, fullgraph=True, backend="aot_eager")
    check("compiled", x, compiled(*x.leaves, lengths), reference(x, lengths), 1e-5)


ERRORS: dict[str, tuple[Callable[[Case], object], type[Exception], str]] = {
    "three dimensions": (
        lambda x: gated_toeplitz_attention(x.q[0], x.k, x.v, x.table, x.gate), ValueError, r"q must be \[batch, heads",
    ),
    "no positions": (
        lambda x: gated_toeplitz_attention(x.q[:, :, :0], x.k, x.v, x.table, x.gate), ValueError, "no positions",
    ),
    "other keys": (
        lambda x: gated_toeplitz_attention(x.q, x.k[:, :, 1:], x.v, x.table, x.gate), ValueError,
        r"k must be \[2, 2, 9, 8\].*is \[2, 2, 8, 8\]",
    ),
    "short table": (
        lambda x: gated_toeplitz_attention(x.q, x.k, x.v, x.table[:, 1:], x.gate), ValueError,
        r"table must be \[2, 17\].*is \[2, 16\]",
    ),
    "gate of another shape": (
        lambda x: gated_toeplitz_attention(x.q, x.k, x.v, x.table, x.gate[..., None]), ValueError, "gate must be",
    ),
    "integers": (
        lambda x: gated_toeplitz_attention(x.q, x.k, x.v, x.table.long(), x.gate), TypeError, "table must be a float",
    ),
    "two dtypes": (
        lambda x: gated_toeplitz_attention(x.q, x.k.double(), x.v, x.table, x.gate), TypeError, "must have one dtype",
    ),
    "other device": (
        lambda x: gated_toeplitz_attention(x.q, x.k, x.v.to("meta"), x.table, x.gate), ValueError, "v is on meta",
    ),
    "lengths of another batch": (
        lambda x: gated_toeplitz_attention(*x.leaves, torch.tensor([1, 2, 3])), ValueError, r"lengths must be \[2\]",
    ),
    "lengths as numbers": (
        lambda x: gated_toeplitz_attention(*x.leaves, torch.tensor([0.5, 1.0])), TypeError, "lengths must be integers",
    ),
    "lengths as a mask": (
        lambda x: gated_toeplitz_attention(*x.leaves, torch.tensor([True, True])), TypeError, "integers",
    ),
    "all dropped": (
        lambda x: gated_toeplitz_attention(*x.leaves, dropout=1.0), ValueError, r"dropout must be in \[0, 1\), is 1.0",
    ),
    "infinite scale": (
        lambda x: gated_toeplitz_attention(*x.leaves, scale=float("inf")), ValueError, "scale must be finite",
    ),
    "unknown backend": (
        lambda x: gated_toeplitz_attention(*x.leaves, backend="flash"), ValueError, "backend must be one of auto",
    ),
    "double on Triton": (
        lambda x: gated_toeplitz_attention(*(leaf.double() for leaf in x.leaves), backend="triton"), ValueError,
        "q is torch.float64",
    ),
    "wide heads on Triton": (
        lambda x: gated_toeplitz_attention(*case(1, 1, 3, 129).leaves, backend="triton"), ValueError, "129 wide",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call(case(2, 2, 9, 8))


def test_triton_on_a_cpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    with pytest.raises(ValueError, match=r'backend="triton" cannot be used: the tensor is on cpu.*TRITON_INTERPRET=1'):
        gated_toeplitz_attention(*case(1, 1, 3, 8).leaves, backend="triton")
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        gated_toeplitz_attention(*case(1, 1, 3, 8).leaves, backend="triton")
