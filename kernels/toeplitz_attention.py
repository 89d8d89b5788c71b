"""Self-attention with WavLM's gated relative-position bias (Chen et al. 2022, "WavLM", eq. 3 to 5).

    bias[b, h, i, j] = gate[b, h, i] · table[h, j - i + T - 1]

The bias of a head is a Toeplitz matrix, 2T - 1 numbers, times one gate a row, so it never has to exist as a matrix: the
Triton engine (`fastclap.kernels.toeplitz_attention_triton`) forms it tile by tile inside a flash-attention kernel,
forward and backward. The torch engine writes it out, [B, H, T, T] in the dtype of q, and hands it to torch's
scaled_dot_product_attention; it is for CPUs, GPUs before sm_80, float64 and heads wider than 128. Without gradients on
a CPU it writes out one head at a time.

Dropout of the Triton engine comes from a counter, not from a stream: whether a probability is kept is a function of a
seed and of (b, h, i, j), written out in `dropout_mask`, so every tile of every kernel finds the same answer for itself.
The seed is drawn on the device from torch's generator, which costs no synchronisation; whoever restores the generator,
as activation checkpointing and `fastclap.GradCache` do, gets the same mask again.

Eager calls of the Triton engine go through an autograd.Function. Under torch.compile the same kernels are the operator
`fastclap::gated_toeplitz_attention`, so that a graph stays whole.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.kernels import dispatch

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST_HEAD = 128  # of the Triton engine
WIDEST_EXACT_HEAD = 64  # of it at float32 precision "highest": wider tiles, split in two, would not fit the registers
HEADS_ALONE = 192  # queries from which on, without gradients on a CPU, a head by itself is faster than all together
MASK_ALIGNMENT = 8  # elements: rows of an additive mask of torch's memory-efficient kernel start at multiples of it

Gradients = tuple["Tensor | None", ...]


# ---------------------------------------------------------------------------------------------------------------------
# The definition
# ---------------------------------------------------------------------------------------------------------------------


def toeplitz(table: Tensor, columns: int | None = None) -> Tensor:
    """[H, T, T] with out[h, i, j] = table[h, j - i + T - 1], a table being [H, 2T - 1]; a view as far as possible.

    `columns` beyond T are zero.
    """
    rows = (table.shape[1] + 1) // 2
    columns = rows if columns is None else columns
    return F.pad(table, (0, columns - rows)).unfold(1, columns, 1).flip(1)


def gated_toeplitz_attention_reference(
    q: Tensor,  # [B, H, T, d]
    k: Tensor,  # [B, H, T, d]
    v: Tensor,  # [B, H, T, d]
    table: Tensor,  # [H, 2T - 1]
    gate: Tensor,  # [B, H, T]
    lengths: Tensor | None = None,  # [B]
    *,
    dropout: float = 0.0,
    scale: float | None = None,
    keep: Tensor | None = None,  # [B, H, T, T] bool
) -> Tensor:
    """The definition with all matrices in memory, in the dtype of its inputs; the reference in float64.

    `keep` says which probabilities dropout leaves; without it they are drawn from torch's generator.
    See `gated_toeplitz_attention`.
    """
    logits = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.transpose(-1, -2))
    logits = logits + (gate[..., None] * toeplitz(table)).to(logits.dtype)
    if lengths is not None:
        beyond = torch.arange(q.shape[2], device=q.device) >= lengths[:, None, None, None]
        logits = logits.masked_fill(beyond, -math.inf)
        logits = logits.where(lengths[:, None, None, None] > 0, 0.0)
    p = logits.softmax(-1)
    if lengths is not None:
        p = p.where(lengths[:, None, None, None] > 0, 0.0)
    p = F.dropout(p, dropout) if keep is None else p.where(keep, 0.0) / (1 - dropout)
    return p @ v


def dropout_mask(seed: Tensor, batch: int, heads: int, length: int, dropout: float) -> Tensor:
    """Bool [batch, heads, length, length]: the probabilities that dropout of the Triton engine keeps.

    `seed` is int64 [1]. Every (b, h) has two 32-bit keys mixed from the seed. One hash, of
    key_0 + (i without its bit 3) · length + j with key_1 between its two rounds, serves two rows: i with bit 3 takes
    its upper 16 bits, i without it the lower ones (a thread of a matrix instruction holds rows i and i + 8). Read as a
    signed number they have to reach round(dropout · 2¹⁶) - 2¹⁵. The steps and constants of the mixing are those of
    Wellons' "lowbias32" (2018, public domain).
    """
    key0, key1 = (key[:, None, None] for key in _dropout_keys(seed, batch * heads))
    at = torch.arange(length, device=seed.device)
    x = _mix(key0 + (at & ~8)[:, None] * length + at, key1)
    half = torch.where((at & 8)[:, None] > 0, x >> 16, x & 0xFFFF)
    signed = half - ((half >> 15) << 16)
    return (signed >= round(dropout * 2**16) - 2**15).view(batch, heads, length, length)


def _dropout_keys(seed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Two 32-bit keys, as int64 [count], mixed from the seed for each of the numbers 0, 1, …"""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    number = torch.arange(count, device=seed.device)
    return _mix(_mix(low + number * 0x9E3779B9) ^ high), _mix(_mix(high + number * 0x85EBCA6B) ^ low)


def _mix(x: Tensor, key: int | Tensor = 0) -> Tensor:
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15) ^ key) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


# ---------------------------------------------------------------------------------------------------------------------
# The function
# ---------------------------------------------------------------------------------------------------------------------


def gated_toeplitz_attention(
    q: Tensor,  # [B, H, T, d]
    k: Tensor,  # [B, H, T, d]
    v: Tensor,  # [B, H, T, d]
    table: Tensor,  # [H, 2T - 1]
    gate: Tensor,  # [B, H, T]
    lengths: Tensor | None = None,  # [B]
    *,
    dropout: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale · q·kᵀ + gate · table) · v, the bias being gate[b, h, i] · table[h, j - i + T - 1].

    Differentiable in q, k, v, table and gate; on the Triton engine once. Never waits for the device.

    Args:
        q, k, v: [B, H, T, d] of one floating dtype, any strides; views of [B, T, H, d] are read in place.
        table: [H, 2T - 1], one value for each distance j - i, from -(T - 1) to T - 1. It may be float32 where q, k
            and v are 16-bit.
        gate: [B, H, T], a factor for each query; dtype as for table.
        lengths: int [B] on the device of q, the number of valid keys of each row of the batch: keys at or past it get
            no weight. Queries past it attend to the valid keys like all others, so that their values are finite. The
            caller keeps them in 0..T; for a length of 0 the output is zero.
        dropout: probability in [0, 1) with which a weight is set to zero; the others are divided by 1 - dropout. The
            Triton engine rounds it to a multiple of 2⁻¹⁶.
        scale: of q·kᵀ, by default d^-0.5.
        backend: "triton", "torch", "reference", or "auto": Triton on CUDA devices from sm_80 on for float16, bfloat16
            and float32 with d ≤ 128 (float32 at matmul precision "highest": d ≤ 64), else torch. On a CPU "triton"
            needs TRITON_INTERPRET=1.

    Returns:
        [B, H, T, d] in the dtype of q; on the Triton engine a view of a contiguous [B, T, H, d]. Under autocast q, k
        and v are taken to its dtype first, and the result has that dtype; table and gate are left as they are.
        Products are accumulated in float32. For float32 the Triton engine multiplies as
        torch.get_float32_matmul_precision() says: "highest" with the accuracy of float32, else in TF32.

    Raises:
        TypeError: an argument is not a floating tensor, lengths are not integers, or dtypes differ.
        ValueError: shapes, devices or values do not fit, or the backend is unknown or cannot take these tensors.
        RuntimeError: at a second differentiation of the Triton engine.
    """
    dtype = dispatch.autocast_dtype(q)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    inputs = Inputs(q, k, v, table, gate, lengths)
    _check(inputs, dropout, scale)
    engine = dispatch.engine(q, backend, _why_not_triton(q))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if engine == "reference":
        return gated_toeplitz_attention_reference(*inputs, dropout=dropout, scale=scale)
    if engine == "torch":
        return _torch_engine(inputs, dropout, scale)
    dropout = min(round(dropout * 2**16), 2**16 - 1) / 2**16
    seed = torch.randint(0, 2**63 - 1, (1,), device=q.device) if dropout > 0 else None
    if torch.compiler.is_compiling():
        return torch.ops.fastclap.gated_toeplitz_attention(*inputs, seed, dropout, scale)[0]
    return _Attention.apply(*inputs, seed, dropout, scale)


class Inputs(NamedTuple):
    """The tensors of a call."""

    q: Tensor  # [B, H, T, d]
    k: Tensor  # [B, H, T, d]
    v: Tensor  # [B, H, T, d]
    table: Tensor  # [H, 2T - 1]
    gate: Tensor  # [B, H, T]
    lengths: Tensor | None  # [B]


def _check(inputs: Inputs, dropout: float, scale: float | None) -> None:
    q, lengths = inputs.q, inputs.lengths
    if q.dim() != 4:
        raise ValueError(f"q must be [batch, heads, length, head width], is {list(q.shape)}")
    batch, heads, length, width = q.shape
    if length < 1 or width < 1:
        raise ValueError(f"q has no positions or no width: {list(q.shape)}")
    named = {name: x for name, x in inputs._asdict().items() if name != "lengths"}
    shapes = {
        "k": (batch, heads, length, width),
        "v": (batch, heads, length, width),
        "table": (heads, 2 * length - 1),
        "gate": (batch, heads, length),
    }
    for name, shape in shapes.items():
        if named[name].shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for q {list(q.shape)}, is {list(named[name].shape)}")
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, is {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}; move it there first")
    dtypes = (q.dtype, inputs.k.dtype, inputs.v.dtype)
    if len(set(dtypes)) > 1:
        raise TypeError("q, k and v must have one dtype, have {}, {} and {}".format(*dtypes))
    if lengths is not None:
        if lengths.shape != (batch,):
            raise ValueError(f"lengths must be [{batch}], one for each row of the batch, is {list(lengths.shape)}")
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"lengths must be integers, are {lengths.dtype}")
        if lengths.device != q.device:
            raise ValueError(f"lengths are on {lengths.device}, q on {q.device}; move them there first")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), is {dropout}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, is {scale}")


def _why_not_triton(q: Tensor) -> str | None:
    if q.dtype not in TRITON_DTYPES:
        return f"q is {q.dtype}, not float16, bfloat16 or float32"
    if q.shape[-1] > WIDEST_HEAD:
        return f"heads are {q.shape[-1]} wide, more than {WIDEST_HEAD}"
    exact = q.dtype == torch.float32 and _float32_precision() == "highest"
    if q.is_cuda and exact and q.shape[-1] > WIDEST_EXACT_HEAD:
        return (
            f"heads are {q.shape[-1]} wide, more than {WIDEST_EXACT_HEAD} in float32 at precision 'highest' "
            "(torch.set_float32_matmul_precision('high') allows it)"
        )
    return None


def _float32_precision() -> str:
    return torch.get_float32_matmul_precision()


# All that torch.compiler.assume_constant_result does, without its import of torch._dynamo: a second of every start.
_float32_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------------------------
# Torch engine
# ---------------------------------------------------------------------------------------------------------------------


def _torch_engine(inputs: Inputs, dropout: float, scale: float) -> Tensor:
    q, k, v, table, gate, lengths = inputs
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in inputs[:5])
    alone_pays = q.device.type == "cpu" and q.shape[2] >= HEADS_ALONE and not torch.compiler.is_compiling()
    if alone_pays and not differentiable and not dropout:
        return _head_by_head(inputs, scale)
    length = q.shape[2]
    padded = -(-length // MASK_ALIGNMENT) * MASK_ALIGNMENT
    bias = (gate[..., None] * toeplitz(table, padded)).to(q.dtype)[..., :length]
    if lengths is not None:
        # A row without any key is left as it is and its result dropped: softmax and its gradient stay finite.
        some = (lengths > 0)[:, None, None, None]
        beyond = (torch.arange(length, device=q.device) >= lengths[:, None, None, None]) & some
        # In place, so that rows stay aligned; the product's gradient does not need its result.
        bias = bias.masked_fill_(beyond, -math.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    return out if lengths is None else out.where(some, 0.0)


def _head_by_head(inputs: Inputs, scale: float) -> Tensor:
    """The torch engine without gradients on a CPU: the scores of one head at a time, which fit the cache."""
    q, k, v, table, gate, lengths = inputs
    batch, heads, length, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(batch, length, heads, v.shape[-1]).transpose(1, 2)
    # row r of the table's windows is the bias of query T - 1 - r: a view, where that of query r would be a copy
    bias = table.to(wide).unfold(1, length, 1)
    gate, q = gate.to(wide).flip(2), (q.to(wide) * scale).flip(2)
    with torch.autocast("cpu", enabled=False):
        for row, keys in enumerate([length] * batch if lengths is None else lengths.tolist()):
            for head in range(heads if keys else 0):
                scores = bias[head, :, :keys] * gate[row, head, :, None]
                scores += F.linear(q[row, head], k[row, head, :keys].to(wide))
                out[row, head] = torch.mm(scores.softmax(1), v[row, head, :keys].to(wide)).flip(0)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Triton engine: eager calls and the operator
# ---------------------------------------------------------------------------------------------------------------------


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    from fastclap.kernels.toeplitz_attention_triton import Launch, forward

    return forward(Launch(*inputs))


def _backward(
    need: list[bool], upstream: Tensor, out: Tensor, log_sum: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fastclap.kernels.toeplitz_attention_triton import Launch, backward

    return backward(Launch(*inputs), upstream, out, log_sum, need)


class _Attention(torch.autograd.Function):
    """An eager call, without the tens of microseconds that an operator costs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out, log_sum = _forward(*inputs)
        _save(ctx, inputs, (out, log_sum))
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Gradients:
        return _gradients(_backward, ctx, upstream)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:7])
    ctx.options = inputs[7:]


def _gradients(compute: Any, ctx: Any, upstream: Tensor) -> Gradients:
    dispatch.refuse_second_order("gated_toeplitz_attention", "reference")
    need = list(ctx.needs_input_grad[:5])
    gradients = compute(need, upstream, *ctx.saved_tensors, *ctx.options)
    return (*(x if wanted else None for x, wanted in zip(gradients, need, strict=True)), None, None, None, None)


@torch.library.custom_op("fastclap::gated_toeplitz_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    gate: Tensor,
    lengths: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm (to base 2) of every row's sum of exponentials, [B, H, T] float32."""
    return _forward(q, k, v, table, gate, lengths, seed, dropout, scale)


@torch.library.custom_op("fastclap::gated_toeplitz_attention_backward", mutates_args=())
def attention_backward_op(
    need: list[bool],
    upstream: Tensor,
    out: Tensor,
    log_sum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    gate: Tensor,
    lengths: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, table and gate; an empty tensor for each that is not needed."""
    return _backward(need, upstream, out, log_sum, q, k, v, table, gate, lengths, seed, dropout, scale)


@attention_op.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    from fastclap.kernels.toeplitz_attention_triton import empty_projection

    return empty_projection(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@attention_backward_op.register_fake
def _(need: list[bool], upstream: Tensor, out: Tensor, log_sum: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    from fastclap.kernels.toeplitz_attention_triton import empty_projection

    gradients = [empty_projection(x) for x in inputs[:3]]
    gradients += [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[3:5]]
    return tuple(x if wanted else x.new_empty(0) for x, wanted in zip(gradients, need, strict=True))


def _save_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


def _op_backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> Gradients:
    return _gradients(torch.ops.fastclap.gated_toeplitz_attention_backward, ctx, upstream)


attention_op.register_autograd(_op_backward, setup_context=_save_op)
