"""LayerNorm of a residual stream to which dropout of a branch is added: what stands between a transformer's layers.

    total      = x + dropout(branch + branch_bias)
    normalized = (total - mean) / sqrt(variance + eps) · weight + bias

Run one after the other, the steps read and write every value several times, and the backward pass has a step of its own
for each, and for the bias. The Triton engine (`fastclap.kernels.residual_layer_norm_triton`) reads x and branch once
and writes both results once; its backward pass reads total and the two gradients and writes those of x and branch. With
x in float32 and the others in 16 bits that is 12 and 16 bytes a value. What is kept between the two is total, which is
the next layer's x, and two numbers a row: neither the branch nor a mask.

Dropout of the Triton engine is a function of a seed and of the value's place, written out in `dropout_mask`. The seed
is drawn on the device from torch's generator, which costs no synchronisation; whoever restores the generator, as
activation checkpointing and `fastclap.GradCache` do, gets the same mask again.

Eager calls of the Triton engine go through an autograd.Function. Under torch.compile the same kernels are the operator
`fastclap::residual_layer_norm`, so that a graph stays whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.layer_norm_gelu import DTYPES
from fastclap.kernels.toeplitz_attention import _dropout_keys, _mix

Gradients = tuple["Tensor | None", ...]


def residual_layer_norm_reference(
    x: Tensor,  # [..., C]
    branch: Tensor | None,  # [..., C]
    branch_bias: Tensor | None,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float = 1e-5,
    *,
    dropout: float = 0.0,
    keep: Tensor | None = None,  # bool [..., C]
) -> tuple[Tensor, Tensor]:
    """The definition, written out in the dtypes of its inputs; the reference in float64.

    `keep` says which values of the branch dropout leaves; without it they are drawn from torch's generator.
    """
    total = x
    if branch is not None:
        branch = branch if branch_bias is None else branch + branch_bias
        kept = F.dropout(branch, dropout) if keep is None else branch.where(keep, 0.0) / (1 - dropout)
        total = (x + kept).to(x.dtype)
    centred = total - total.mean(-1, keepdim=True)
    return total, centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def dropout_mask(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """Bool [rows, columns]: the values of a branch that dropout of the Triton engine keeps.

    `seed` is int64 [1]. Rows are those of the branch as a matrix. Every row has two 32-bit keys mixed from the seed, as
    a head has in `toeplitz_attention.dropout_mask`. One hash, of key_0 + column // 2 with key_1 between its two rounds,
    serves two columns: the odd one takes its upper 16 bits, the even one the lower. Read as a signed number they have
    to reach round(dropout · 2¹⁶) - 2¹⁵.
    """
    key0, key1 = (key[:, None] for key in _dropout_keys(seed, rows))
    column = torch.arange(columns, device=seed.device)
    x = _mix(key0 + column // 2, key1)
    half = torch.where(column % 2 > 0, x >> 16, x & 0xFFFF)
    return half - ((half >> 15) << 16) >= round(dropout * 2**16) - 2**15


def residual_layer_norm(
    x: Tensor,  # [..., C]
    branch: Tensor | None,  # [..., C]
    branch_bias: Tensor | None,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float = 1e-5,
    *,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(x + dropout(branch + branch_bias), LayerNorm of that over the last dimension).

    Differentiable in all tensors; on the Triton engine once. Never waits for the device.

    Args:
        x: [..., C] of a floating dtype, the residual stream. Rows that are contiguous are read in place, whatever the
            stride between them.
        branch: [..., C] in any floating dtype, such as bfloat16 beside a float32 x; None: the norm of x alone.
        branch_bias: [C] or None, the bias of the linear layer that made the branch, if that left it out.
        weight, bias: [C], of the norm, in any floating dtype.
        eps: added to the variance.
        dropout: probability in [0, 1) with which a value of the branch is set to zero; the others are divided by
            1 - dropout. The Triton engine rounds it to a multiple of 2⁻¹⁶. Without a branch nothing is dropped.
        dtype: of the norm; None: under autocast that of autocast, unless x is float64, else that of x.
        backend: "triton", "torch", "reference", or "auto": Triton on CUDA devices from sm_80 on for float32, bfloat16
            and float16 with C ≤ 8192, else torch. On a CPU "triton" needs TRITON_INTERPRET=1.

    Returns:
        Total, [..., C] in the dtype of x, which without a branch is x itself, and the norm, [..., C] in `dtype`. The
        arithmetic is in float32, or float64 where x is; the norm is that of total as it is given.

    Raises:
        TypeError: an argument is not a floating tensor, or `dtype` not a floating dtype.
        ValueError: shapes, devices or values do not fit, or the backend is unknown or cannot take these tensors.
        RuntimeError: at a second differentiation of the Triton engine.
    """
    _check(x, branch, branch_bias, weight, bias, dropout, dtype)
    if dtype is None:
        dtype = dispatch.autocast_dtype(x) or x.dtype
    engine = dispatch.engine(x, backend, _why_not_triton(x, branch, dtype))
    if engine == "reference":
        total, y = residual_layer_norm_reference(x, branch, branch_bias, weight, bias, eps, dropout=dropout)
        return total, y.to(dtype)
    if engine == "torch":
        return _torch_engine(x, branch, branch_bias, weight, bias, eps, dropout, dtype)
    dropout = min(round(dropout * 2**16), 2**16 - 1) / 2**16
    drops = branch is not None and dropout > 0
    seed = torch.randint(0, 2**63 - 1, (1,), device=x.device) if drops else None
    inputs = (x, branch, branch_bias, weight, bias, seed, dropout, float(eps), dtype)
    if torch.compiler.is_compiling():
        total, y, *_ = torch.ops.fastclap.residual_layer_norm(*inputs)
    else:
        total, y = _ResidualLayerNorm.apply(*inputs)
    return x if branch is None else total, y


def _check(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dropout: float,
    dtype: torch.dtype | None,
) -> None:
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor [..., C], is {x.dtype} of shape {list(x.shape)}")
    if branch is None and branch_bias is not None:
        raise ValueError("branch_bias is given without a branch to which it would be added")
    columns = x.shape[-1:]
    for name, tensor, shape in (
        ("branch", branch, x.shape),
        ("branch_bias", branch_bias, columns),
        ("weight", weight, columns),
        ("bias", bias, columns),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} beside x {list(x.shape)}, is {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, is {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; move it there first")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), is {dropout}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype, is {dtype}")


def _why_not_triton(x: Tensor, branch: Tensor | None, dtype: torch.dtype) -> str | None:
    named = {"x is": x.dtype, "the norm would be": dtype} | ({} if branch is None else {"branch is": branch.dtype})
    for name, kind in named.items():
        if kind not in DTYPES:
            return f"{name} {kind}, not float32, bfloat16 or float16"
    columns, widest = x.shape[-1], dispatch.WIDEST_NORM
    return f"rows have {columns} values, more than {widest}" if columns > widest else None


def _torch_engine(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    total = x
    if branch is not None:
        branch = branch if branch_bias is None else branch + branch_bias
        total = (x + F.dropout(branch, dropout)).to(x.dtype)
    # torch takes few mixtures of dtypes, and rounds a norm of 16 bits before it could be given in another dtype
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(total.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return total, y.to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Triton engine: eager calls and the operator
# ---------------------------------------------------------------------------------------------------------------------


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastclap.kernels import residual_layer_norm_triton

    return residual_layer_norm_triton.forward(*inputs)


def _backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fastclap.kernels import residual_layer_norm_triton

    return residual_layer_norm_triton.backward(*inputs)


class _ResidualLayerNorm(torch.autograd.Function):
    """An eager call, without the tens of microseconds that an operator costs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        outputs = _forward(*inputs)
        _save(ctx, inputs, outputs)
        return outputs[:2]

    @staticmethod
    def backward(ctx: Any, d_total: Tensor | None, d_normalized: Tensor | None) -> Gradients:
        return _gradients(_backward, ctx, d_total, d_normalized)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, branch, branch_bias, weight, bias, seed, dropout, *_ = inputs
    total, _, mean, inverse_std = outputs
    ctx.set_materialize_grads(False)
    if branch is None:
        ctx.mark_non_differentiable(total)  # an empty tensor
    ctx.save_for_backward(x if branch is None else total, branch_bias, weight, bias, seed, mean, inverse_std)
    ctx.options = dropout, None if branch is None else branch.dtype


def _gradients(compute: Any, ctx: Any, d_total: Tensor | None, d_normalized: Tensor | None) -> Gradients:
    dispatch.refuse_second_order("residual_layer_norm")
    need = list(ctx.needs_input_grad[:5])
    if d_normalized is None:
        need[3:] = False, False
    if not any(need) or (d_total is None and d_normalized is None):
        return (None,) * 9
    gradients = compute(d_total, d_normalized, *ctx.saved_tensors, *ctx.options, need)
    return (*(x if wanted else None for x, wanted in zip(gradients, need, strict=True)), None, None, None, None)


@torch.library.custom_op("fastclap::residual_layer_norm", mutates_args=())
def residual_layer_norm_op(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    dropout: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, norm, mean, inverse standard deviation); the latter two are [...] float32. Without a branch total is x,
    which an operator must not return: an empty tensor stands in for it."""
    return _forward(x, branch, branch_bias, weight, bias, seed, dropout, eps, dtype)


@torch.library.custom_op("fastclap::residual_layer_norm_backward", mutates_args=())
def residual_layer_norm_backward_op(
    d_total: Tensor | None,
    d_normalized: Tensor | None,
    total: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    dropout: float,
    branch_dtype: torch.dtype | None,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, branch_bias, weight and bias; an empty tensor for each that is not needed."""
    inputs = (total, branch_bias, weight, bias, seed, mean, inverse_std, dropout, branch_dtype, need)
    return _backward(d_total, d_normalized, *inputs)


@residual_layer_norm_op.register_fake
def _(x: Tensor, branch: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(0 if branch is None else x.shape)
    mean, inverse_std = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return total, x.new_empty(x.shape, dtype=others[-1]), mean, inverse_std


@residual_layer_norm_backward_op.register_fake
def _(
    d_total: Tensor | None,
    d_normalized: Tensor | None,
    total: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    *_, branch_dtype, need = others
    parameters = (branch_bias, weight, bias)
    made = [total.new_empty(total.shape), total.new_empty(total.shape, dtype=branch_dtype)]
    made += [total.new_empty(0) if p is None else p.new_empty(p.shape) for p in parameters]
    return tuple(x if wanted else total.new_empty(0) for x, wanted in zip(made, need, strict=True))


def _save_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[2:], *output[: inputs[1] is None])


def _op_backward(ctx: Any, d_total: Tensor | None, d_normalized: Tensor | None, *_: Tensor | None) -> Gradients:
    return _gradients(torch.ops.fastclap.residual_layer_norm_backward, ctx, d_total, d_normalized)


residual_layer_norm_op.register_autograd(_op_backward, setup_context=_save_op)
