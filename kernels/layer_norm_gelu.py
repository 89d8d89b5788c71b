"""GELU of a LayerNorm over the last dimension, the pair between the convolutions of the wav2vec2 family.

    y = gelu((x - mean) / sqrt(variance + eps) · weight + bias),   gelu(z) = z · Φ(z)

Run one after the other, they read and write every value twice and keep two activations for the backward pass. The
Triton engine (`fastclap.kernels.layer_norm_gelu_triton`) reads x once and writes y once; its backward pass reads x and
dy, computes the rest again from the mean and the inverse standard deviation of each row, and writes dx. In bf16 that is
4 and 6 bytes a value, against 8 and 12, and one saved activation instead of two.

Eager calls of the Triton engine go through an autograd.Function. Under torch.compile the same kernels are the operator
`fastclap::layer_norm_gelu`, so that a graph stays whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.kernels import dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the Triton engine


def gelu_reference(z: Tensor) -> Tensor:
    """The exact GELU, z · Φ(z), with the digits of its tail."""
    return z * torch.erfc(z * -math.sqrt(0.5)) / 2


def layer_norm_gelu_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """The definition, written out in the dtype of its inputs; the reference in float64."""
    centred = x - x.mean(-1, keepdim=True)
    z = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    z = z if weight is None else z * weight
    return gelu_reference(z if bias is None else z + bias)


def layer_norm_gelu(
    x: Tensor,  # [..., C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """gelu(layer_norm(x)) over the last dimension, with the exact GELU (Hendrycks & Gimpel 2016).

    Differentiable in x, weight and bias; on the Triton engine once. Never waits for the device.

    Args:
        x: [..., C] of a floating dtype. Rows that are contiguous are read in place, whatever the stride between them.
        weight, bias: [C] or None, in any floating dtype, such as float32 with a bfloat16 x.
        eps: added to the variance.
        backend: "triton", "torch", "reference", or "auto": Triton on CUDA devices from sm_80 on for float32, bfloat16
            and float16 with C ≤ 8192, else torch. On a CPU "triton" needs TRITON_INTERPRET=1.

    Returns:
        [..., C], contiguous on the Triton engine, in the dtype of x, under autocast too. Statistics and arithmetic are
        in float32 always, so that autocast has nothing to add: where torch would give float32 under it, the value here
        is that, rounded to the dtype of x.

    Raises:
        TypeError: weight or bias is not floating.
        ValueError: shapes or devices do not fit, or the backend is unknown or cannot take these tensors.
        RuntimeError: at a second differentiation of the Triton engine.
    """
    if backend == "auto" and not dispatch.on_gpu(x):
        return _torch_engine(x, weight, bias, eps)
    _check(x, weight, bias)
    engine = dispatch.engine(x, backend, _why_not_triton(x))
    if engine == "torch":
        return _torch_engine(x, weight, bias, eps)
    if engine == "reference":
        return layer_norm_gelu_reference(x, weight, bias, eps)
    if torch.compiler.is_compiling():
        return torch.ops.fastclap.layer_norm_gelu(x, weight, bias, float(eps))[0]
    return _LayerNormGELU.apply(x, weight, bias, float(eps))


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor [..., C], is {x.dtype} of shape {list(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be [{x.shape[-1]}] beside x {list(x.shape)}, is {list(parameter.shape)}")
        if not parameter.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, is {parameter.dtype}")
        if parameter.device != x.device:
            raise ValueError(f"{name} is on {parameter.device}, x on {x.device}; move it there first")


def _why_not_triton(x: Tensor) -> str | None:
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, not float32, bfloat16 or float16"
    columns, widest = x.shape[-1], dispatch.WIDEST_NORM
    return f"rows have {columns} values, more than {widest}" if columns > widest else None


def _torch_engine(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    dtype = x.dtype
    if (weight is not None and weight.dtype != dtype) or (bias is not None and bias.dtype != dtype):
        # torch takes few mixtures, and not the same ones on every device
        wide = torch.promote_types(dtype, torch.float32)
        x = x.to(wide)
        weight = None if weight is None else weight.to(wide)
        bias = None if bias is None else bias.to(wide)
    return F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias, eps)).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Triton engine: eager calls and the operator
# ---------------------------------------------------------------------------------------------------------------------


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fastclap.kernels import layer_norm_gelu_triton

    return layer_norm_gelu_triton.forward(*inputs)


def _backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fastclap.kernels import layer_norm_gelu_triton

    return layer_norm_gelu_triton.backward(*inputs)


class _LayerNormGELU(torch.autograd.Function):
    """An eager call, without the tens of microseconds that an operator costs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, inverse_std = _forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse_std)
        return y

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(_backward, ctx, upstream)


def _gradients(compute: Any, ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    dispatch.refuse_second_order("layer_norm_gelu")
    need = list(ctx.needs_input_grad[:3])
    gradients = compute(upstream, *ctx.saved_tensors, need)
    return (*(gradient if wanted else None for gradient, wanted in zip(gradients, need, strict=True)), None)


@torch.library.custom_op("fastclap::layer_norm_gelu", mutates_args=())
def layer_norm_gelu_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, inverse standard deviation); the latter two are [...] float32."""
    return _forward(x, weight, bias, eps)


@torch.library.custom_op("fastclap::layer_norm_gelu_backward", mutates_args=())
def layer_norm_gelu_backward_op(
    upstream: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; an empty tensor for each that is not needed."""
    return _backward(upstream, x, weight, bias, mean, inverse_std, need)


@layer_norm_gelu_op.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


@layer_norm_gelu_backward_op.register_fake
def _(upstream: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *inputs, _, _, need = others
    return tuple(
        upstream.new_empty(0) if x is None or not wanted else x.new_empty(x.shape)
        for x, wanted in zip(inputs, need, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _op_backward(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(torch.ops.fastclap.layer_norm_gelu_backward, ctx, upstream)


layer_norm_gelu_op.register_autograd(_op_backward, setup_context=_save)
