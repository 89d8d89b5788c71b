"""Feed-forward of a transformer layer that keeps one activation for its backward pass, where autograd keeps two.

    y = gelu(u) · weight_outᵀ,   u = x · weight_inᵀ + bias_in,   gelu(u) = u · Φ(u)

Of what is hidden, [rows, H], only u is kept. The backward pass computes gelu(u) again in the kernel that multiplies
da = dy · weight_out by gelu'(u): `fastclap.kernels.feed_forward_triton` reads u and da once, writes gelu(u), overwrites
da with du, and adds up the columns of du for the gradient of the bias on the way. In bf16 that is 8 bytes a value of
memory traffic and two bytes a value kept for the backward pass, where torch moves 8 and keeps 4: 6 in its kernel for
du, and 2 to read du again for the bias.

Matrix products stay torch's own, in sight of torch.compile and of counters of operations. The kernel is the operator
`fastclap::gelu_backward` under torch.compile; eager calls reach it without the tens of microseconds that an operator
costs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.layer_norm_gelu import DTYPES, gelu_reference


def feed_forward_reference(x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor) -> Tensor:
    """The definition, written out in the dtype of its inputs; the reference in float64."""
    u = x @ weight_in.t()
    return gelu_reference(u if bias_in is None else u + bias_in) @ weight_out.t()


def feed_forward(
    x: Tensor,  # [..., C]
    weight_in: Tensor,  # [H, C]
    bias_in: Tensor | None,  # [H]
    weight_out: Tensor,  # [D, H]
    *,
    backend: str = "auto",
) -> Tensor:
    """gelu(x · weight_inᵀ + bias_in) · weight_outᵀ with the exact GELU (Hendrycks & Gimpel 2016).

    The output's bias is left to the caller, who may have something to add it with. Differentiable in every tensor, on
    the Triton engine once; computed and kept is only what the gradients that are needed take. Never waits for the
    device.

    Args:
        x: [..., C] of a floating dtype.
        weight_in, bias_in, weight_out: [H, C], [H] or None, and [D, H] in the dtype of x; under autocast each is cast
            to its dtype, once, as by F.linear.
        backend: "triton", "torch", "reference", or "auto": Triton on CUDA devices from sm_80 on for float32, bfloat16
            and float16, else torch. On a CPU "triton" needs TRITON_INTERPRET=1. All but "reference" have the same
            forward pass, and "torch" leaves its gradients to autograd, which keeps both activations.

    Returns:
        [..., D] in the dtype of x; under autocast in its dtype.

    Raises:
        TypeError: a tensor is not floating, or dtypes differ without autocast.
        ValueError: shapes or devices do not fit, or the backend is unknown or cannot take these tensors.
        RuntimeError: at a second differentiation of the Triton engine.
    """
    dtype = _checked(x, weight_in, bias_in, weight_out)
    why_not = None if dtype in DTYPES else f"x is {dtype}, not float32, bfloat16 or float16"
    engine = dispatch.engine(x, backend, why_not)
    if engine == "torch":
        return F.linear(F.gelu(F.linear(x, weight_in, bias_in)), weight_out)
    # The bias stays as it is: the sum that is its gradient is float32's until then.
    x, weight_in, weight_out = x.to(dtype), weight_in.to(dtype), weight_out.to(dtype)
    if engine == "reference":
        return feed_forward_reference(x, weight_in, None if bias_in is None else bias_in.to(dtype), weight_out)
    y = _FeedForward.apply(x.reshape(-1, x.shape[-1]), weight_in, bias_in, weight_out)
    return y.view(*x.shape[:-1], weight_out.shape[0])


def _checked(x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor) -> torch.dtype:
    """The dtype of the products.

    Raises:
        TypeError, ValueError: as `feed_forward`.
    """
    if x.dim() < 1:
        raise ValueError("x must be [..., C], is a scalar")
    if weight_in.dim() != 2 or weight_in.shape[1] != x.shape[-1]:
        raise ValueError(f"weight_in must be [H, {x.shape[-1]}] beside x {list(x.shape)}, is {list(weight_in.shape)}")
    hidden = weight_in.shape[0]
    if bias_in is not None and bias_in.shape != (hidden,):
        raise ValueError(f"bias_in must be [{hidden}] beside weight_in, is {list(bias_in.shape)}")
    if weight_out.dim() != 2 or weight_out.shape[1] != hidden:
        raise ValueError(f"weight_out must be [D, {hidden}] beside weight_in, is {list(weight_out.shape)}")
    named = {"x": x, "weight_in": weight_in, "bias_in": bias_in, "weight_out": weight_out}
    dtypes = {name: tensor.dtype for name, tensor in named.items() if tensor is not None}
    for name, tensor in named.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, is {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; move it there first")
    autocast = dispatch.autocast_dtype(*(tensor for tensor in named.values() if tensor is not None))
    if autocast is not None:
        return autocast
    if len(set(dtypes.values())) > 1:
        raise TypeError(f"x, weights and bias must have one dtype without autocast, have {dtypes}")
    return x.dtype


# ---------------------------------------------------------------------------------------------------------------------
# Triton engine: eager calls and the operator
# ---------------------------------------------------------------------------------------------------------------------


def _gelu_backward(u: Tensor, da: Tensor, need_a: bool, need_sum: bool) -> tuple[Tensor, Tensor]:
    from fastclap.kernels import feed_forward_triton

    return feed_forward_triton.gelu_backward(u, da, need_a, need_sum)


@torch.library.custom_op("fastclap::gelu_backward", mutates_args=("da",))
def gelu_backward_op(u: Tensor, da: Tensor, need_a: bool, need_sum: bool) -> tuple[Tensor, Tensor]:
    """Overwrites `da` with du = da · gelu'(u); gives gelu(u), and the sums of du over the rows, [H] float32.

    An empty tensor stands for what is not needed.
    """
    return _gelu_backward(u, da, need_a, need_sum)


@gelu_backward_op.register_fake
def _(u: Tensor, da: Tensor, need_a: bool, need_sum: bool) -> tuple[Tensor, Tensor]:
    sums = u.new_empty(u.shape[1] if need_sum else 0, dtype=torch.float32)
    return u.new_empty(u.shape if need_a else 0), sums


class _FeedForward(torch.autograd.Function):
    """All of it on [rows, C], eager and in a compiled graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor) -> Tensor:
        u = F.linear(x, weight_in, None if bias_in is None else bias_in.to(x.dtype))
        need_x, need_weight_in, need_bias_in, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_weight_in else None,
            weight_in if need_x else None,
            bias_in if need_bias_in else None,
            weight_out if need_x or need_weight_in or need_bias_in else None,
            u,
        )
        return F.linear(F.gelu(u), weight_out)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dispatch.refuse_second_order("feed_forward")
        x, weight_in, bias_in, weight_out, u = ctx.saved_tensors
        need_x, need_weight_in, need_bias_in, need_weight_out = ctx.needs_input_grad
        if weight_out is None:
            return None, None, None, dy.t() @ F.gelu(u)
        compute = torch.ops.fastclap.gelu_backward if torch.compiler.is_compiling() else _gelu_backward
        du = (dy @ weight_out).to(u.dtype)  # da until the kernel; of another dtype where backward is under autocast
        a, sums = compute(u, du, need_weight_out, need_bias_in)
        dweight_out = dy.t() @ a if need_weight_out else None
        del a, u
        return (
            du @ weight_in if need_x else None,
            du.t() @ x if need_weight_in else None,
            sums.to(bias_in.dtype) if need_bias_in else None,
            dweight_out,
        )
