"""Shared attention: its definition, upstream's modules, the torch engine and the checks of arguments."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclap.kernels.shared_attention import shared_attention
from fastclap.testing import assert_close_rel
from tests.kernels.shared_attention_cases import Case, case, check, oracle

CLIPS = ((1,), (2,), (33,), (100,), (7, 7, 7), (33, 2, 1, 50, 50), (65, 65))
HEADS, WIDTH, CHANNELS, VALUE, MODEL, ENCODED = 4, 32, 4, 12, 48, 24  # of upstream's modules


@pytest.mark.parametrize("backend", ("reference", "torch"))
@pytest.mark.parametrize("lengths", CLIPS, ids=str)
def test_matches_the_definition_row_by_row(lengths: tuple[int, ...], backend: str) -> None:
    x = case(lengths, dtype=torch.float64, side=torch.float64)
    check(backend, x, x.results(backend), oracle(x), 1e-12)


@pytest.mark.parametrize(("dtype", "tol"), ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)), ids=str)
def test_torch_engine_matches_float64(dtype: torch.dtype, tol: float) -> None:
    for lengths, side in itertools.product(((33, 2, 1, 50, 50), (64, 64)), (torch.float32, dtype)):
        x = case(lengths, dtype=dtype, side=side)
        results = x.results("torch")
        assert {value.dtype for value in (*results[:6], *results[7:])} == {dtype} and results[6].dtype == side
        check(f"{lengths}, {side}", x, results, oracle(x), tol)


@pytest.mark.parametrize("backend", ("reference", "torch"))
def test_penalty_is_a_term_of_the_loss_and_counts_once(backend: str) -> None:
    """Of scores beyond ±25, whichever and however many users there are."""
    x = case((30, 30, 9), dtype=torch.float64, side=torch.float64, scale=12.0)
    plain, penalized = oracle(x), oracle(x, 0.3)
    for exact, other in zip(plain[3:7], penalized[3:7], strict=True):
        assert (exact - other).norm() > 0.1 * exact.norm(), "there are such scores"
    check("penalized", x, x.results(backend, 0.3), penalized, 1e-12)
    # One user alone: the same amount on top of that user's own gradients.
    gradients = []
    for penalty in (0.0, 0.3):
        weights = shared_attention(*x.leaves[:4], x.starts, x.lengths, penalty=penalty, backend=backend)
        gradients.append(torch.autograd.grad(weights.attend(x.values[2]), x.leaves[:4], x.upstreams[2]))
    for without, added, one, all_three in zip(*gradients, plain[3:7], penalized[3:7], strict=True):
        assert_close_rel("one user", all_three - one, added - without, 1e-9)


def test_gradient_can_be_differentiated_again_by_the_torch_engine() -> None:
    x = case((5, 3), 1, 4, 2, wide=2, narrow=2, dtype=torch.float64, side=torch.float64)

    def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
        weights = shared_attention(*leaves[:4], x.starts, x.lengths)
        return tuple(weights.attend(v) for v in leaves[4:])

    assert torch.autograd.gradgradcheck(outputs, x.leaves)


def test_a_clip_alone_is_the_clip_in_a_batch() -> None:
    x = case((9, 20, 9), dtype=torch.float64, side=torch.float64)
    weights = shared_attention(*x.leaves[:4], x.starts, x.lengths)
    q, k, p = (leaf[9:29] for leaf in x.leaves[:3])
    alone = shared_attention(q, k, p, x.table, torch.tensor([0, 20], dtype=torch.int32), [20])
    for v in x.values:
        assert_close_rel("alone", weights.attend(v)[9:29], alone.attend(v[9:29]), 1e-13)


def test_other_clips_may_hold_anything() -> None:
    x = case((9, 20))
    with torch.no_grad():
        for leaf in (x.q, x.k, x.p, *x.values):
            leaf[9:] = float("nan")
        weights = shared_attention(*x.leaves[:4], x.starts, x.lengths)
        assert all(weights.attend(v)[:9].isfinite().all() for v in x.values)


def test_autocast() -> None:
    x = case((20, 9))
    expected = oracle(x)
    with torch.autocast("cpu", torch.bfloat16):
        weights = shared_attention(*x.leaves[:4], x.starts, x.lengths)
        outputs = [weights.attend(v) for v in x.values]
    assert {out.dtype for out in outputs} == {torch.bfloat16}
    gradients = torch.autograd.grad(outputs, x.leaves, [u.bfloat16() for u in x.upstreams])
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    check("autocast", x, (*outputs, *gradients), expected, 2e-2)


def test_compiles_without_a_graph_break() -> None:
    x = case((9, 9, 4), scale=12.0)

    def attend(*leaves: Tensor) -> tuple[Tensor, ...]:
        weights = shared_attention(*leaves[:4], x.starts, x.lengths, penalty=0.3)
        return tuple(weights.attend(v) for v in leaves[4:])

    outputs = torch.compile(attend, fullgraph=True, backend="aot_eager")(*x.leaves)
    gradients = torch.autograd.grad(outputs, x.leaves, x.upstreams)
    check("compiled", x, (*outputs, *gradients), oracle(x, 0.3), 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Upstream's modules
# ---------------------------------------------------------------------------------------------------------------------


def upstream_layer(icefall: SimpleNamespace) -> tuple[torch.nn.Module, ...]:
    """Weights, self-attention, nonlinear attention and the encoding of positions, in float64, as in training."""
    torch.manual_seed(0)
    zipformer = icefall.zipformer2
    weights = zipformer.RelPositionMultiheadAttentionWeights(MODEL, ENCODED, HEADS, WIDTH, CHANNELS)
    encoding = zipformer.CompactRelPositionalEncoding(ENCODED, 0.0, length_factor=1.0)
    attention, nonlinear = zipformer.SelfAttention(MODEL, HEADS, VALUE), zipformer.NonlinAttention(MODEL, 36)
    with torch.no_grad():  # so large that scores differ and the position matters
        weights.in_proj.weight *= 3
        weights.linear_pos.weight *= 30
    return tuple(module.double().eval() for module in (weights, attention, nonlinear, encoding))


def our_table(weights: Any, encoded: Tensor) -> Tensor:
    """[H, c, 2T - 1] of upstream's [1, 2T - 1, encoding]."""
    return weights.linear_pos(encoded)[0].unflatten(1, (HEADS, CHANNELS)).permute(1, 2, 0)


@pytest.mark.parametrize("lengths", ((1,), (17, 17, 17), (31, 9, 1)), ids=str)
def test_is_upstreams_attention(icefall: SimpleNamespace, lengths: tuple[int, ...]) -> None:
    """Its weights, its two users' outputs, and the gradients of its inputs and parameters; padded and packed."""
    weights, attention, nonlinear, encoding = upstream_layer(icefall)
    longest, batch = max(lengths), len(lengths)
    x = torch.randn(longest, batch, MODEL, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]  # [B, T]
    upstream = torch.randn(longest, batch, MODEL, dtype=torch.float64) * valid.T[..., None]
    encoded = encoding(x)
    a = weights(x, encoded, key_padding_mask=~valid)
    theirs = attention(x, a) + nonlinear(x, a[:1])
    parameters = [x, *weights.in_proj.parameters(), *weights.linear_pos.parameters(), *attention.parameters()]
    parameters += list(nonlinear.parameters())
    expected = torch.autograd.grad(theirs, parameters, upstream)

    rows = x.transpose(0, 1)[valid]  # [R, model]
    q, k, p = (
        part.unflatten(1, (HEADS, -1))
        for part in weights.in_proj(rows).split((HEADS * WIDTH, HEADS * WIDTH, HEADS * CHANNELS), 1)
    )
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    ours = shared_attention(q, k, p, our_table(weights, encoded), starts, lengths)
    out = attention.out_proj(ours.attend(attention.in_proj(rows).unflatten(1, (HEADS, VALUE))).flatten(1))
    s, values, y = nonlinear.in_proj(rows).chunk(3, 1)
    out = out + nonlinear.out_proj(ours.attend((values * s.tanh())[:, None])[:, 0] * y)
    assert_close_rel("output", theirs.transpose(0, 1)[valid].detach(), out.detach(), 1e-12)
    gradients = torch.autograd.grad(out, parameters, upstream.transpose(0, 1)[valid])
    for index, (exact, value) in enumerate(zip(expected, gradients, strict=True)):
        if exact.norm() > 1e-6:  # a single key's weight is 1, whatever its score
            assert_close_rel(str(index), exact, value, 1e-6)  # upstream's softmax takes its gradient in float32
        else:
            assert value.norm() < 1e-6


def test_penalty_is_upstreams(icefall: SimpleNamespace) -> None:
    """Of equally long clips: upstream penalizes the scores of padding, too."""
    x = case((12, 12), dtype=torch.float64, side=torch.float64, scale=12.0)
    weights = shared_attention(*x.leaves[:4], x.starts, x.lengths, penalty=0.3)
    ours = torch.autograd.grad(weights.attend(x.values[1]), x.leaves[:4], x.upstreams[1])
    q, k, p = (leaf.view(2, 12, *leaf.shape[1:]).transpose(1, 2) for leaf in x.leaves[:3])
    at = torch.arange(12)
    near = x.table[:, :, at - at[:, None] + x.table.shape[2] // 2]
    scores = q @ k.transpose(-1, -2) + torch.einsum("bhic,hcij->bhij", p, near)
    scores = icefall.scaling.penalize_abs_values_gt(scores, limit=25.0, penalty=0.3)
    out = (scores.softmax(-1) @ x.values[1].view(2, 12, 2, -1).transpose(1, 2)).transpose(1, 2).flatten(0, 1)
    theirs = torch.autograd.grad(out, x.leaves[:4], x.upstreams[1])
    for name, exact, value in zip("qkpt", theirs, ours, strict=True):
        assert_close_rel(name, exact, value, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def call(x: Case, **changes: Any) -> None:
    """With other arguments than those of the case; `v` and `backend` among them."""
    v, backend = changes.pop("v", x.values[1]), changes.pop("backend", "auto")
    penalty = changes.pop("penalty", 0.0)
    x = dataclasses.replace(x, **changes)
    shared_attention(*x.leaves[:4], x.starts, x.lengths, penalty=penalty, backend=backend).attend(v)


ERRORS: dict[str, tuple[Callable[[Case], object], type[Exception], str]] = {
    "two dimensions": (lambda x: call(x, q=x.q[0]), ValueError, r"q must be \[rows, heads, head width\]"),
    "other keys": (lambda x: call(x, k=x.k[1:]), ValueError, r"k must be \[9, 2, 16\] as q, is \[8, 2, 16\]"),
    "other positions": (lambda x: call(x, p=x.p[:, :1]), ValueError, r"p must be \[9, 2, channels\]"),
    "integers": (lambda x: call(x, table=x.table.long()), TypeError, "table must be a floating tensor"),
    "two dtypes": (lambda x: call(x, k=x.k.double()), TypeError, "q, k and p must have one dtype"),
    "other device": (lambda x: call(x, p=x.p.to("meta")), ValueError, "p is on meta, q on cpu"),
    "even table": (lambda x: call(x, table=x.table[:, :, 1:]), ValueError, r"\[2, 4, an odd number of distances\]"),
    "table of other channels": (lambda x: call(x, table=x.table[:, 1:]), ValueError, r"table must be \[2, 4,"),
    "short table": (lambda x: call(x, table=x.table[:, :, 4:-4]), ValueError, "a clip of 6 rows needs 11"),
    "no clips": (lambda x: call(x, lengths=()), ValueError, "at least one clip"),
    "an empty clip": (lambda x: call(x, lengths=(9, 0)), ValueError, "none without rows"),
    "other lengths": (lambda x: call(x, lengths=(6, 2)), ValueError, "lengths add up to 8 rows, q has 9"),
    "starts of another batch": (lambda x: call(x, starts=x.starts[1:]), ValueError, r"starts must be \[3\]"),
    "starts of 64 bits": (lambda x: call(x, starts=x.starts.long()), TypeError, "starts must be int32"),
    "starts elsewhere": (lambda x: call(x, starts=x.starts.to("meta")), ValueError, "starts are on meta"),
    "negative penalty": (lambda x: call(x, penalty=-1.0), ValueError, "penalty must be finite and at least 0, is -1"),
    "values of other rows": (lambda x: call(x, v=x.values[1][1:]), ValueError, r"v must be \[9, 2, width\] or"),
    "values of another dtype": (lambda x: call(x, v=x.values[1].double()), TypeError, "v must be torch.float32 as q"),
    "values elsewhere": (lambda x: call(x, v=x.values[1].to("meta")), ValueError, "v is on meta"),
    "unknown backend": (lambda x: call(x, backend="flash"), ValueError, "backend must be one of auto"),
    "double on Triton": (
        lambda x: call(case((3,), dtype=torch.float64), backend="triton"), ValueError, "q is torch.float64",
    ),
    "wide heads on Triton": (lambda x: call(case((3,), width=65), backend="triton"), ValueError, "65 wide"),
    "many channels on Triton": (lambda x: call(case((3,), channels=5), backend="triton"), ValueError, "5 channels"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(name: str) -> None:
    wrong, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        wrong(case((3, 6), more=1))
