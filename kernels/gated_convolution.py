"""Gated depthwise convolution of the Zipformer over packed rows, which keeps its input alone.

    g = value · sigmoid(gate)       the two halves of u
    y[r, c] = bias[c] + Σ_k weight[c, 0, k] · g[r + k - K // 2, c]      over rows of the same clip

(Yao et al. 2023, "Zipformer", section 3.2; Gulati et al. 2020, "Conformer".) Rows outside a clip count as zeros, as
torch's convolution pads a clip alone.

With torch the gated values are written, spread into padding, transposed, convolved and transposed back, and both u and
the padded values are kept. The Triton engine (`fastclap.kernels.gated_convolution_triton`) reads u and writes y; its
backward pass reads u and the gradient and writes that of u, the sums for weight and bias on the way: in bf16 6 and 10
bytes a value.

Eager calls of the Triton engine go through an autograd.Function. Under torch.compile the same kernels are the operator
`fastclap::gated_convolution`, so that a graph stays whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.rows import check_floating, check_index, why_not_triton

MOST_TAPS = 31  # of the Triton engine, which holds weights and a window of rows in registers


def gated_convolution_reference(
    u: Tensor,  # [R, 2 C]
    weight: Tensor,  # [C, 1, K]
    bias: Tensor | None,  # [C]
    starts: Tensor,  # int [B + 1]
) -> Tensor:
    """The definition, written out in the dtype of its inputs; the reference in float64."""
    value, gate = u.chunk(2, -1)
    gated = value * gate.sigmoid()
    row = torch.arange(len(u), device=u.device)
    clip = torch.bucketize(row, starts[1:].long(), right=True)
    y = torch.zeros_like(gated)
    for k in range(weight.shape[2]):
        source = row + k - weight.shape[2] // 2
        within = source.clamp(0, max(len(u) - 1, 0))
        same = (source == within) & (clip[within] == clip)
        y = y + weight[:, 0, k] * gated[within].where(same[:, None], 0.0)
    return y if bias is None else y + bias


def gated_convolution(
    u: Tensor,  # [R, 2 C]
    weight: Tensor,  # [C, 1, K]
    bias: Tensor | None,  # [C]
    starts: Tensor,  # int32 [B + 1]
    *,
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution of u[:, :C] · sigmoid(u[:, C:]) along the rows of each clip.

    Differentiable in u, weight and bias, on the Triton engine once. Never waits for the device.

    Args:
        u: [R, 2 C] of a floating dtype: the values, then their gates.
        weight: [C, 1, K] with an odd K, as of `nn.Conv1d` with C groups, in any floating dtype.
        bias: [C] in any floating dtype, or None.
        starts: int32 or int64 [B + 1], the first row of every clip, and R at the end; they rise from 0. Values are not
            checked.
        backend: "triton", "torch", "reference", or "auto": Triton on CUDA devices from sm_80 on for float32, bfloat16
            and float16 with K ≤ 31, else torch. On a CPU "triton" needs TRITON_INTERPRET=1.

    Returns:
        [R, C] in the dtype of u, under autocast too. The arithmetic is in float32, or float64 where u is.

    Raises:
        TypeError: a tensor is of a wrong dtype.
        ValueError: shapes or devices do not fit, K is even, or the backend is unknown or cannot take these tensors.
        RuntimeError: at a second differentiation of the Triton engine.
    """
    _check(u, weight, bias, starts)
    reason = why_not_triton({"u": u, "weight": weight, "bias": bias}, weight.shape[2], MOST_TAPS)
    engine = dispatch.engine(u, backend, reason and reason.replace("rows have", "a kernel has"))
    if engine == "reference":
        return gated_convolution_reference(u, weight, bias, starts)
    if engine == "torch":
        return _torch_engine(u, weight, bias, starts)
    compute = torch.ops.fastclap.gated_convolution if torch.compiler.is_compiling() else _GatedConvolution.apply
    y: Tensor = compute(u, weight, bias, starts)
    return y


def _check(u: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> None:
    if u.dim() != 2 or u.shape[1] % 2:
        raise ValueError(f"u must be [R, 2 C], is {list(u.shape)}")
    columns = u.shape[1] // 2
    if weight.dim() != 3 or weight.shape[:2] != (columns, 1) or weight.shape[2] % 2 == 0:
        raise ValueError(
            f"weight must be [{columns}, 1, K] with an odd K beside u {list(u.shape)}, is {list(weight.shape)}"
        )
    check_floating(u, {"weight": (weight, weight.shape), "bias": (bias, (columns,))}, "u")
    check_index(u, "starts", starts, name_of_x="u")
    if len(starts) < 1 or (len(starts) < 2 and len(u)):
        raise ValueError(
            f"starts must be [B + 1], the first row of every clip and then {len(u)}, is {len(starts)} long"
        )


def _torch_engine(u: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> Tensor:
    """Clips one after the other with K // 2 rows of zeros between them, in one convolution."""
    wide = torch.promote_types(u.dtype, torch.float32)
    gap, row = weight.shape[2] // 2, torch.arange(len(u), dtype=starts.dtype, device=u.device)
    place = row + gap * torch.bucketize(row, starts[1:], right=True)
    gated = F.glu(u.to(wide), -1)
    if not len(u):
        return (gated + 0 * weight.sum()).to(u.dtype)
    spread = gated.new_zeros(len(u) + gap * (len(starts) - 2), gated.shape[1]).index_copy(0, place.long(), gated)
    with torch.autocast(u.device.type, enabled=False):
        bias = None if bias is None else bias.to(wide)
        y = F.conv1d(spread.t()[None], weight.to(wide), bias, padding=gap, groups=len(weight))[0].t()
    return y[place].to(u.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Triton engine: eager calls and the operator
# ---------------------------------------------------------------------------------------------------------------------


def _forward(u: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> Tensor:
    from fastclap.kernels import gated_convolution_triton

    return gated_convolution_triton.forward(u, weight, bias, starts)


def _backward(dy: Tensor, u: Tensor, weight: Tensor, starts: Tensor, need_sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    from fastclap.kernels import gated_convolution_triton

    return gated_convolution_triton.backward(dy, u, weight, starts, need_sums)


class _GatedConvolution(torch.autograd.Function):
    """An eager call, without the tens of microseconds that an operator costs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs, None)
        return _forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(_backward, ctx, dy)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    u, weight, bias, starts = inputs
    ctx.save_for_backward(u, weight, starts)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(compute: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dispatch.refuse_second_order("gated_convolution")
    u, weight, starts = ctx.saved_tensors
    need_u, need_weight, need_bias, _ = ctx.needs_input_grad
    du, of_weight, of_bias = compute(dy, u, weight, starts, need_weight or need_bias)
    return (
        du if need_u else None,
        of_weight.to(weight.dtype) if need_weight else None,
        of_bias.to(ctx.bias_dtype) if need_bias else None,
        None,
    )


@torch.library.custom_op("fastclap::gated_convolution", mutates_args=())
def gated_convolution_op(u: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> Tensor:
    """[R, C] in the dtype of u."""
    return _forward(u, weight, bias, starts)


@torch.library.custom_op("fastclap::gated_convolution_backward", mutates_args=())
def gated_convolution_backward_op(
    dy: Tensor, u: Tensor, weight: Tensor, starts: Tensor, need_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, and of weight [C, 1, K] and bias [C] in float32; empty tensors where these are not needed."""
    return _backward(dy, u, weight, starts, need_sums)


@gated_convolution_op.register_fake
def _(u: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> Tensor:
    return u.new_empty(u.shape[0], u.shape[1] // 2)


@gated_convolution_backward_op.register_fake
def _(dy: Tensor, u: Tensor, weight: Tensor, starts: Tensor, need_sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    of_weight = weight.new_empty(weight.shape if need_sums else 0, dtype=torch.float32)
    return u.new_empty(u.shape), of_weight, weight.new_empty(len(weight) if need_sums else 0, dtype=torch.float32)


def _op_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(torch.ops.fastclap.gated_convolution_backward, ctx, dy)


gated_convolution_op.register_autograd(_op_backward, setup_context=_save)
