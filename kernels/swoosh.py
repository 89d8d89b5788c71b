"""Swoosh, the activation of the Zipformer, and Swoosh + dropout + linear layer, which keeps the pre-activation alone.

    swoosh l:  ln(1 + e^(x - 4)) - 0.08 x - 0.035          derivative  1 / (1 + e^(4 - x)) - 0.08
    swoosh r:  ln(1 + e^(x - 1)) - 0.08 x - 0.313261687    derivative  1 / (1 + e^(1 - x)) - 0.08

(Yao et al. 2023, "Zipformer", section 3.5; the second is 0 at 0 to 5e-10.)

    y = a · weightᵀ + bias,   a = swoosh(x) · mask[clip of the row]

The mask is dropout that all rows of a clip share: a factor for each clip and column, 0 or 1 / (1 - p). Of x and a,
both [rows, H], only x is kept. The forward pass makes a in one kernel, which goes when the product is done; the
backward pass makes it again in the kernel (`fastclap.kernels.swoosh_triton`) that overwrites da = dy · weight with
dx = da · mask · swoosh'(x). In bf16 that is 4 and 8 bytes a value of memory traffic, beside the matrix products, and 2
bytes a value kept.

Matrix products stay torch's own. The kernels are the operators `fastclap::swoosh` and
`fastclap::swoosh_linear_backward` under torch.compile; eager calls reach them without the tens of microseconds that an
operator costs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.rows import check_floating, check_index, why_not_triton

CONSTANTS = {"l": (4.0, 0.035), "r": (1.0, 0.313261687)}  # what is subtracted in the exponent, and at the end
LINEAR_FROM = 40.0  # where ln(1 + e^t) is t in float64 too


def swoosh_reference(x: Tensor, kind: str) -> Tensor:
    """The definition, written out in the dtype of x; the reference in float64."""
    offset, constant = CONSTANTS[kind]
    return torch.logaddexp(x.new_zeros(()), x - offset) - 0.08 * x - constant


def swoosh_linear_reference(
    x: Tensor,  # [rows, H]
    kind: str,
    weight: Tensor,  # [D, H]
    bias: Tensor | None = None,  # [D]
    mask: Tensor | None = None,  # [B, H]
    sequence: Tensor | None = None,  # int [rows]
) -> Tensor:
    """The definition, written out in the dtypes of its inputs; the reference in float64."""
    a = swoosh_reference(x, kind)
    if mask is not None and sequence is not None:
        a = a * mask[sequence]
    y = a @ weight.t()
    return y if bias is None else y + bias


def swoosh(x: Tensor, kind: str, *, backend: str = "auto") -> Tensor:
    """Swoosh of every value, which keeps x alone for its backward pass.

    Differentiable, on the Triton engine once. A compiled graph gets torch's operations, which its compiler puts into
    one kernel with what stands before and after.

    Args:
        x: [...] of a floating dtype.
        kind: "l" or "r".
        backend: as of `swoosh_linear`.

    Returns:
        [...] in the dtype of x. The arithmetic is in float32, or float64 where x is: values are off by up to 3e-7 of
        the largest of 1 and |x|; of the Triton engine in 16 bits by 6e-6, beside their rounding.

    Raises:
        TypeError: x is not floating.
        ValueError: `kind` or `backend` is unknown, or the backend cannot take x.
        RuntimeError: at a second differentiation of the Triton engine.
    """
    _check_kind(kind)
    check_floating(x, {})
    engine = dispatch.engine(x, backend, why_not_triton({"x": x}))
    if engine == "reference":
        return swoosh_reference(x, kind)
    if engine == "torch" or torch.compiler.is_compiling():
        return _swoosh(x, kind)
    y: Tensor = _Swoosh.apply(x, kind)
    return y


def swoosh_linear(
    x: Tensor,  # [..., H]
    kind: str,
    weight: Tensor,  # [D, H]
    bias: Tensor | None = None,  # [D]
    mask: Tensor | None = None,  # [B, H]
    sequence: Tensor | None = None,  # int [...]
    *,
    backend: str = "auto",
) -> Tensor:
    """(swoosh(x) · mask[sequence]) · weightᵀ + bias.

    Differentiable in x, weight and bias, on the Triton engine once; computed and kept is only what the gradients that
    are needed take. Never waits for the device.

    Args:
        x: [..., H] of a floating dtype, the pre-activation.
        kind: "l" or "r".
        weight, bias: [D, H], and [D] or None, in the dtype of x; under autocast each is cast to its dtype, once, as by
            F.linear.
        mask: [B, H] of a floating dtype, factors of the values of a clip's rows, which get no gradient; None: all 1.
        sequence: int32 or int64 [...], the clip of each row, from 0 to B - 1; values are not checked. Rows of a clip
            should follow each other.
        backend: "triton", "torch", "reference", or "auto": Triton on CUDA devices from sm_80 on for float32, bfloat16
            and float16, else torch, which leaves its gradients to autograd. On a CPU "triton" needs
            TRITON_INTERPRET=1.

    Returns:
        [..., D] in the dtype of x; under autocast in its dtype.

    Raises:
        TypeError: a tensor is of a wrong dtype, or dtypes differ without autocast.
        ValueError: shapes or devices do not fit, a mask comes without `sequence` or needs a gradient, `kind` or
            `backend` is unknown, or the backend cannot take these tensors.
        RuntimeError: at a second differentiation of the Triton engine.
    """
    dtype = _checked(x, kind, weight, bias, mask, sequence)
    reason = why_not_triton({"x": x if dtype == x.dtype else x.new_empty(0, dtype=dtype), "mask": mask})
    engine = dispatch.engine(x, backend, reason)
    x, weight = x.to(dtype), weight.to(dtype)
    if engine == "triton":
        rows = None if sequence is None else sequence.reshape(-1)
        y: Tensor = _SwooshLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, mask, rows, kind)
        return y.view(*x.shape[:-1], len(weight))
    bias = None if bias is None else bias.to(dtype)
    if engine == "reference":
        return swoosh_linear_reference(x, kind, weight, bias, mask, sequence)
    a = _swoosh(x, kind)
    if mask is not None:
        a = (a * mask[sequence]).to(dtype)
    return F.linear(a, weight, bias)


def _swoosh(x: Tensor, kind: str) -> Tensor:
    """The torch engine; in 16 bits only the result is rounded."""
    offset, constant = CONSTANTS[kind]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (F.softplus(wide - offset, threshold=LINEAR_FROM) - 0.08 * wide - constant).to(x.dtype)


def _check_kind(kind: str) -> None:
    if kind not in CONSTANTS:
        raise ValueError(f"kind must be one of {', '.join(CONSTANTS)}, is {kind!r}")


def _checked(
    x: Tensor, kind: str, weight: Tensor, bias: Tensor | None, mask: Tensor | None, sequence: Tensor | None
) -> torch.dtype:
    """The dtype of the product.

    Raises:
        TypeError, ValueError: as `swoosh_linear`.
    """
    _check_kind(kind)
    if x.dim() < 1:
        raise ValueError("x must be [..., H], is a scalar")
    if weight.dim() != 2:
        raise ValueError(f"weight must be [D, {x.shape[-1]}] beside x {list(x.shape)}, is {list(weight.shape)}")
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"mask must be [B, {x.shape[-1]}] beside x {list(x.shape)}, is {list(mask.shape)}")
    shapes = {"weight": (weight, (len(weight), x.shape[-1])), "bias": (bias, (len(weight),))}
    check_floating(x, {**shapes, "mask": (mask, (0 if mask is None else len(mask), x.shape[-1]))})
    if (mask is None) != (sequence is None):
        raise ValueError("mask and sequence go together, which says the mask's row for every row of x: give both")
    if mask is not None and mask.requires_grad:
        raise ValueError("mask needs a gradient, which it gets none: give mask.detach()")
    if sequence is not None:
        check_index(x, "sequence", sequence, x.shape[:-1])
    dtypes = {"x": x.dtype, "weight": weight.dtype} | ({} if bias is None else {"bias": bias.dtype})
    autocast = dispatch.autocast_dtype(x, weight)
    if autocast is None and len(set(dtypes.values())) > 1:
        raise TypeError(f"x, weight and bias must have one dtype without autocast, have {dtypes}")
    return autocast or x.dtype


# ---------------------------------------------------------------------------------------------------------------------
# Triton engine: eager calls and the operators
# ---------------------------------------------------------------------------------------------------------------------


def _forward(x: Tensor, mask: Tensor | None, sequence: Tensor | None, kind: str) -> Tensor:
    from fastclap.kernels import swoosh_triton

    return swoosh_triton.forward(x, mask, sequence, kind)


def _slope(x: Tensor, dy: Tensor, kind: str) -> Tensor:
    from fastclap.kernels import swoosh_triton

    return swoosh_triton.slope(x, dy, kind)


def _backward(x: Tensor, da: Tensor, mask: Tensor | None, sequence: Tensor | None, kind: str, need_a: bool) -> Tensor:
    from fastclap.kernels import swoosh_triton

    return swoosh_triton.backward(x, da, mask, sequence, kind, need_a)


@torch.library.custom_op("fastclap::swoosh", mutates_args=())
def swoosh_op(x: Tensor, mask: Tensor | None, sequence: Tensor | None, kind: str) -> Tensor:
    """swoosh(x) · mask[sequence], [rows, H]."""
    return _forward(x, mask, sequence, kind)


@torch.library.custom_op("fastclap::swoosh_linear_backward", mutates_args=("da",))
def swoosh_linear_backward_op(
    x: Tensor, da: Tensor, mask: Tensor | None, sequence: Tensor | None, kind: str, need_a: bool
) -> Tensor:
    """Overwrites `da` with dx = da · mask[sequence] · swoosh'(x); gives what `swoosh_op` does, if it is needed, else an
    empty tensor."""
    return _backward(x, da, mask, sequence, kind, need_a)


@swoosh_op.register_fake
def _(x: Tensor, mask: Tensor | None, sequence: Tensor | None, kind: str) -> Tensor:
    return x.new_empty(x.shape)


@swoosh_linear_backward_op.register_fake
def _(x: Tensor, da: Tensor, mask: Tensor | None, sequence: Tensor | None, kind: str, need_a: bool) -> Tensor:
    return x.new_empty(x.shape if need_a else 0)


class _Swoosh(torch.autograd.Function):
    """Eager only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return _forward(x.reshape(-1, x.shape[-1] if x.dim() else 1), None, None, kind).view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dispatch.refuse_second_order("swoosh")
        (x,) = ctx.saved_tensors
        return _slope(x, dy, ctx.kind), None


class _SwooshLinear(torch.autograd.Function):
    """All of it on [rows, H], eager and in a compiled graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        sequence: Tensor | None,
        kind: str,
    ) -> Tensor:
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        kept = (x, mask, sequence) if need_x or need_weight else (None,) * 3
        ctx.save_for_backward(*kept, weight if need_x else None)
        ctx.kind, ctx.bias_dtype = kind, bias.dtype if need_bias and bias is not None else None
        compute = torch.ops.fastclap.swoosh if torch.compiler.is_compiling() else _forward
        return F.linear(compute(x, mask, sequence, kind), weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dispatch.refuse_second_order("swoosh_linear")
        x, mask, sequence, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        dx = dweight = dbias = None
        a: Any = None
        operators = torch.ops.fastclap
        compiling = torch.compiler.is_compiling()
        if need_x:
            dx = (dy @ weight).to(x.dtype)  # da until the kernel; of another dtype where backward is under autocast
            compute = operators.swoosh_linear_backward if compiling else _backward
            a = compute(x, dx, mask, sequence, ctx.kind, need_weight)
        elif need_weight:
            a = (operators.swoosh if compiling else _forward)(x, mask, sequence, ctx.kind)
        if need_weight:
            dweight = dy.t() @ a
        if need_bias:
            dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dweight, dbias, None, None, None
