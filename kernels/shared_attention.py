"""Attention whose weights have several users: the Zipformer's (Yao et al. 2024, "Zipformer", section 4.2).

    scores[h, i, j] = q[i, h] · k[j, h] + Σ_c p[i, h, c] · table[h, c, j - i],   A[h] = softmax_j(scores[h])

within each clip; there is no 1/√d. The position's part is upstream's `linear_pos` of the encoding at j - i. A layer
multiplies A with three sets of values: head 0 alone with wide ones, then all heads twice with narrow ones.

Rows are packed: the frames of all clips one after the other, no padding between them.

The torch engine keeps A, and autograd adds the users' gradients of it. Clips of one length that follow one another are
one batch, on a CPU the short ones only.

The Triton engine (`fastclap.kernels.shared_attention_triton`) keeps the logarithms of the rows' sums alone and makes A
anew for every user; the softmax's gradient is linear in that of A, so that the users' gradients of q, k, p and table
add up here too. Eager calls go through an autograd.Function, and under torch.compile through operators
`fastclap::shared_attention…`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastclap.kernels import dispatch

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST_HEAD = 64  # of q and k, in the Triton engine
MOST_CHANNELS = 4  # of a position, in the Triton engine
ALONE = 64  # rows from which on a CPU is faster with a clip by itself: its scores stay in the cache
PENALIZED = 25.0  # absolute value of a score above which the penalty pushes it back

Gradients = tuple["Tensor | None", ...]


class Weights(Protocol):
    """Attention weights, to be multiplied with any number of values."""

    def attend(self, v: Tensor) -> Tensor:
        """A · v within each clip, differentiable in v and in what A was made of.

        Args:
            v: [R, H, dv], or [R, 1, dv] for head 0 alone. Under autocast it is taken to autocast's dtype.

        Returns:
            The shape and dtype of v.

        Raises:
            TypeError: v is not of the dtype of q.
            ValueError: v has other rows, heads or another device.
            RuntimeError: at a second differentiation of the Triton engine.
        """


def shared_attention(
    q: Tensor,  # [R, H, d]
    k: Tensor,  # [R, H, d]
    p: Tensor,  # [R, H, c]
    table: Tensor,  # [H, c, 2L - 1]
    starts: Tensor,  # [B + 1]
    lengths: Sequence[int],  # [B]
    *,
    penalty: float = 0.0,
    backend: str = "auto",
) -> Weights:
    """softmax(q·kᵀ + Σ_c p_c · table_c[j - i]) within each clip, for any number of users.

    Differentiable in q, k, p and table; on the Triton engine once. Never waits for the device.

    Args:
        q, k: [R, H, d] of one floating dtype, the packed rows of B clips. On the Triton engine slices of a projection's
            output, whose heads lie side by side, are read in place.
        p: [R, H, c], the query of the position; dtype of q.
        table: [H, c, 2L - 1], one value for each distance j - i from -(L - 1) to L - 1, where L is at least the longest
            clip. Its dtype may be another; with a 16-bit q the Triton engine rounds it to that of q.
        starts: int32 [B + 1] on the device of q: the first row of each clip, and R.
        lengths: the same as numbers of rows on the host, each at least 1.
        penalty: added to the gradient of every score above 25, and subtracted from that of every one below -25; once,
            however many users there are. It is not scaled with the loss.
        backend: "triton", "torch", "reference", or "auto": Triton on CUDA devices from sm_80 on for float16, bfloat16
            and float32 with d ≤ 64 and c ≤ 4, else torch. On a CPU "triton" needs TRITON_INTERPRET=1.

    Returns:
        The weights, whose `attend(v)` multiplies. Under autocast q, k and p are taken to its dtype. Scores and softmax
        are float32 (float64 for float64), the weights are rounded to the dtype of v. For float32 the Triton engine
        multiplies as torch.get_float32_matmul_precision() says.

    Raises:
        TypeError: an argument is not a floating tensor, starts are not int32, or dtypes differ.
        ValueError: shapes, devices, lengths or values do not fit, or the backend is unknown or cannot take these
            tensors.
    """
    dtype = dispatch.autocast_dtype(q)
    if dtype is not None:
        q, k, p = q.to(dtype), k.to(dtype), p.to(dtype)
    _check(q, k, p, table, starts, lengths, penalty)
    engine = dispatch.engine(q, backend, _why_not_triton(q, p))
    if engine == "triton":
        return _TritonWeights(q, k, p, table, starts, max(lengths), float(penalty))
    return _TorchWeights(q, k, p, table, lengths, float(penalty), by_index=engine == "reference")


def _check(
    q: Tensor, k: Tensor, p: Tensor, table: Tensor, starts: Tensor, lengths: Sequence[int], penalty: float
) -> None:  # fmt: skip
    if q.dim() != 3 or 0 in q.shape[1:]:
        raise ValueError(f"q must be [rows, heads, head width], none of the latter 0, is {list(q.shape)}")
    rows, heads, _ = q.shape
    named = {"q": q, "k": k, "p": p, "table": table}
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, is {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}; move it there first")
    if k.shape != q.shape:
        raise ValueError(f"k must be {list(q.shape)} as q, is {list(k.shape)}")
    if p.dim() != 3 or p.shape[:2] != q.shape[:2] or not p.shape[2]:
        raise ValueError(f"p must be [{rows}, {heads}, channels] for q {list(q.shape)}, is {list(p.shape)}")
    if len({q.dtype, k.dtype, p.dtype}) > 1:
        raise TypeError(f"q, k and p must have one dtype, have {q.dtype}, {k.dtype} and {p.dtype}")
    if not lengths or min(lengths) < 1:
        raise ValueError("lengths must name at least one clip, and none without rows")
    if sum(lengths) != rows:
        raise ValueError(f"lengths add up to {sum(lengths)} rows, q has {rows}")
    if table.dim() != 3 or table.shape[:2] != (heads, p.shape[2]) or table.shape[2] % 2 == 0:
        shape = f"[{heads}, {p.shape[2]}, an odd number of distances]"
        raise ValueError(f"table must be {shape} for p {list(p.shape)}, is {list(table.shape)}")
    if table.shape[2] < 2 * max(lengths) - 1:
        needed = 2 * max(lengths) - 1
        raise ValueError(f"table has {table.shape[2]} distances, a clip of {max(lengths)} rows needs {needed}")
    if starts.dtype != torch.int32:
        raise TypeError(f"starts must be int32, are {starts.dtype}")
    if starts.shape != (len(lengths) + 1,):
        raise ValueError(f"starts must be [{len(lengths) + 1}] for {len(lengths)} clips, are {list(starts.shape)}")
    if starts.device != q.device:
        raise ValueError(f"starts are on {starts.device}, q on {q.device}; move them there first")
    if not 0 <= penalty < math.inf:  # false for NaN; torch.compile cannot follow math.isfinite
        raise ValueError(f"penalty must be finite and at least 0, is {penalty}")


def _check_values(v: Tensor, q: Tensor) -> Tensor:
    """v in autocast's dtype."""
    dtype = dispatch.autocast_dtype(q)
    v = v if dtype is None else v.to(dtype)
    rows, heads, _ = q.shape
    if v.dim() != 3 or v.shape[0] != rows or v.shape[1] not in (1, heads) or not v.shape[2]:
        raise ValueError(f"v must be [{rows}, {heads}, width] or [{rows}, 1, width], is {list(v.shape)}")
    if v.device != q.device:
        raise ValueError(f"v is on {v.device}, q on {q.device}; move it there first")
    if v.dtype != q.dtype:
        raise TypeError(f"v must be {q.dtype} as q, is {v.dtype}")
    return v


def _why_not_triton(q: Tensor, p: Tensor) -> str | None:
    if q.dtype not in TRITON_DTYPES:
        return f"q is {q.dtype}, not float16, bfloat16 or float32"
    if q.shape[2] > WIDEST_HEAD:
        return f"heads are {q.shape[2]} wide, more than {WIDEST_HEAD}"
    if p.shape[2] > MOST_CHANNELS:
        return f"positions have {p.shape[2]} channels, more than {MOST_CHANNELS}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Torch engine
# ---------------------------------------------------------------------------------------------------------------------


def _runs(lengths: Sequence[int], alone: float) -> Iterator[tuple[int, int]]:
    """(rows of a clip, clips) of each run of clips of one length; clips of `alone` rows or more by themselves."""
    for length, group in itertools.groupby(lengths):
        clips = len(list(group))
        yield from [(length, 1)] * clips if length >= alone else [(length, clips)]


class _TorchWeights:
    """A of each run of clips, [clips, H, T, T]."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        p: Tensor,
        table: Tensor,
        lengths: Sequence[int],
        penalty: float,
        by_index: bool,
    ) -> None:
        self.q, self.runs = q, list(_runs(lengths, ALONE if q.device.type == "cpu" else math.inf))
        wide = torch.promote_types(q.dtype, torch.float32)
        parts = zip(*(self._batches(x.to(wide)) for x in (q, k, p)), strict=True)
        bias = _biases_by_index if by_index else _biases
        self.weights: list[Tensor] = []
        with torch.autocast(q.device.type, enabled=False):
            for (length, _), (queries, keys, positions) in zip(self.runs, parts, strict=True):
                scores = queries @ keys.transpose(-1, -2) + bias(positions, _middle(table.to(wide), length))
                if penalty:
                    scores = _Penalized.apply(scores, penalty)
                self.weights.append(scores.softmax(-1).to(q.dtype))

    def _batches(self, x: Tensor) -> list[Tensor]:
        """[clips, H, T, d] of each run, views of x [R, H, d]."""
        parts = x.split([length * clips for length, clips in self.runs])
        return [
            part.view(clips, length, *x.shape[1:]).transpose(1, 2)
            for part, (length, clips) in zip(parts, self.runs, strict=True)
        ]

    def attend(self, v: Tensor) -> Tensor:
        """See `Weights.attend`."""
        v = _check_values(v, self.q)
        heads = v.shape[1]
        out = [a[:, :heads] @ x for a, x in zip(self.weights, self._batches(v.contiguous()), strict=True)]
        return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in out])


def _middle(table: Tensor, length: int) -> Tensor:
    """[H, c, 2 · length - 1]: the distances within a clip."""
    around = table.shape[2] // 2
    return table[:, :, around - length + 1 : around + length]


def _biases(p: Tensor, table: Tensor) -> Tensor:
    """Σ_c p_c · table_c[j - i], [clips, H, T, T], p being [clips, H, T, c]: upstream's relative shift."""
    # By distance, then row i from distance -i on: a row is one element shorter than the step from one to the next.
    by_distance = p @ table
    length, distances = by_distance.shape[2:]
    if length == 1:
        return by_distance
    shifted = by_distance.flatten(2)[..., length - 1 : -1].unflatten(2, (length, distances - 1))
    return shifted[..., :length]


def _biases_by_index(p: Tensor, table: Tensor) -> Tensor:
    """The same, element by element."""
    at = torch.arange(p.shape[2], device=p.device)
    return torch.einsum("bhic,hcij->bhij", p, table[:, :, at - at[:, None] + p.shape[2] - 1])


class _Penalized(torch.autograd.Function):
    """The scores as they are, and `penalty` more or less in the gradient of those beyond ±25."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, penalty: float) -> Tensor:
        beyond = (scores > PENALIZED).to(torch.int8) - (scores < -PENALIZED).to(torch.int8)
        ctx.save_for_backward(beyond)
        ctx.penalty = penalty
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        (beyond,) = ctx.saved_tensors
        return torch.add(upstream, beyond, alpha=ctx.penalty), None


# ---------------------------------------------------------------------------------------------------------------------
# Triton engine: eager calls and the operators
# ---------------------------------------------------------------------------------------------------------------------


class _TritonWeights:
    """What A is made of, and log2 of each row's sum of exponentials."""

    def __init__(
        self, q: Tensor, k: Tensor, p: Tensor, table: Tensor, starts: Tensor, longest: int, penalty: float
    ) -> None:  # fmt: skip
        prepare: Any = torch.ops.fastclap.shared_attention_sums if torch.compiler.is_compiling() else _prepare
        with torch.no_grad():
            self.log_sum, self.packed = prepare(q, k, p, table, starts, longest)
        if penalty:
            q, k, p, table = _Penalty.apply(q, k, p, table, self.packed, starts, longest, penalty)
        self.made_of = (q, k, p, table)
        self.starts, self.longest = starts, longest

    def attend(self, v: Tensor) -> Tensor:
        """See `Weights.attend`."""
        q, k, p, table = self.made_of
        v = _check_values(v, q)
        log_sum, packed = self.log_sum, self.packed
        if v.shape[1] < q.shape[1]:
            q, k, p, table, log_sum, packed = q[:, :1], k[:, :1], p[:, :1], table[:1], log_sum[:1], packed[:1]
        apply = torch.ops.fastclap.shared_attention if torch.compiler.is_compiling() else _Attention.apply
        return apply(q, k, p, table, v, log_sum, packed, self.starts, self.longest)


def _prepare(q: Tensor, k: Tensor, p: Tensor, table: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    from fastclap.kernels.shared_attention_triton import Launch, log_sums, pack

    packed = pack(table, longest, q.dtype)
    return log_sums(Launch(q, k, p, packed, starts, longest)), packed


def _forward(
    q: Tensor, k: Tensor, p: Tensor, table: Tensor, v: Tensor, log_sum: Tensor, packed: Tensor, starts: Tensor,
    longest: int,
) -> Tensor:  # fmt: skip
    from fastclap.kernels.shared_attention_triton import Launch, forward

    return forward(Launch(q, k, p, packed, starts, longest), v, log_sum)


def _backward(
    need: list[bool], upstream: Tensor, out: Tensor, q: Tensor, k: Tensor, p: Tensor, table: Tensor, v: Tensor,
    log_sum: Tensor, packed: Tensor, starts: Tensor, longest: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fastclap.kernels.shared_attention_triton import Launch, backward

    return backward(Launch(q, k, p, packed, starts, longest), upstream, out, v, log_sum, table, need)


def _penalty_gradients(
    need: list[bool], q: Tensor, k: Tensor, p: Tensor, table: Tensor, packed: Tensor, starts: Tensor, longest: int,
    penalty: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from fastclap.kernels.shared_attention_triton import Launch, penalty_gradients

    return penalty_gradients(Launch(q, k, p, packed, starts, longest), penalty, table, need)


class _Attention(torch.autograd.Function):
    """An eager call, without the tens of microseconds that an operator costs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out = _forward(*inputs)
        _save(ctx, inputs, out)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        return _gradients(_backward, ctx, upstream)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs[:8])
    ctx.longest = inputs[8]


def _gradients(compute: Any, ctx: Any, upstream: Tensor) -> Gradients:
    dispatch.refuse_second_order("shared_attention")
    need = list(ctx.needs_input_grad[:5])
    gradients = compute(need, upstream, *ctx.saved_tensors, ctx.longest)
    return (*(x if wanted else None for x, wanted in zip(gradients, need, strict=True)), *[None] * 4)


class _Penalty(torch.autograd.Function):
    """q, k, p and table as they are; the penalty's gradients are added to theirs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs[:6])
        ctx.options = inputs[6:]
        return tuple(x.view_as(x) for x in inputs[:4])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Gradients:
        dispatch.refuse_second_order("shared_attention")
        need = list(ctx.needs_input_grad[:4])
        compute = torch.ops.fastclap.shared_attention_penalty if torch.compiler.is_compiling() else _penalty_gradients
        gradients = compute(need, *ctx.saved_tensors, *ctx.options)
        added = (x + y if wanted else None for x, y, wanted in zip(gradients, upstream, need, strict=True))
        return (*added, *[None] * 4)


@torch.library.custom_op("fastclap::shared_attention_sums", mutates_args=())
def sums_op(q: Tensor, k: Tensor, p: Tensor, table: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """log2 of every row's sum of exponentials, [H, R] float32, and the table as the kernels read it."""
    return _prepare(q, k, p, table, starts, longest)


@torch.library.custom_op("fastclap::shared_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    p: Tensor,
    table: Tensor,
    v: Tensor,
    log_sum: Tensor,
    packed: Tensor,
    starts: Tensor,
    longest: int,
) -> Tensor:
    """A · v, as contiguous as can be."""
    return _forward(q, k, p, table, v, log_sum, packed, starts, longest)


@torch.library.custom_op("fastclap::shared_attention_backward", mutates_args=())
def attention_backward_op(
    need: list[bool],
    upstream: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    p: Tensor,
    table: Tensor,
    v: Tensor,
    log_sum: Tensor,
    packed: Tensor,
    starts: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, p, table and v; those that are not needed may hold anything."""
    return _backward(need, upstream, out, q, k, p, table, v, log_sum, packed, starts, longest)


@torch.library.custom_op("fastclap::shared_attention_penalty", mutates_args=())
def penalty_op(
    need: list[bool],
    q: Tensor,
    k: Tensor,
    p: Tensor,
    table: Tensor,
    packed: Tensor,
    starts: Tensor,
    longest: int,
    penalty: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The penalty's gradients of q, k, p and table; those that are not needed may hold anything."""
    return _penalty_gradients(need, q, k, p, table, packed, starts, longest, penalty)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)


@sums_op.register_fake
def _(q: Tensor, k: Tensor, p: Tensor, table: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    from fastclap.kernels.shared_attention_triton import pack

    return q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32), pack(table, longest, q.dtype)


@attention_op.register_fake
def _(q: Tensor, k: Tensor, p: Tensor, table: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape)


@attention_backward_op.register_fake
def _(need: list[bool], upstream: Tensor, out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return _like(*inputs[:5])


@penalty_op.register_fake
def _(need: list[bool], *inputs: Any) -> tuple[Tensor, ...]:
    return _like(*inputs[:4])


def _op_backward(ctx: Any, upstream: Tensor) -> Gradients:
    return _gradients(torch.ops.fastclap.shared_attention_backward, ctx, upstream)


attention_op.register_autograd(_op_backward, setup_context=_save)
