"""BiasNorm and the bypass of the Zipformer, in one pass over packed rows.

    z = x + branch
    y = z · e^log_scale / √mean((z - bias)²)        the mean is over a row      `bias_norm`
    y = original + (y - original) · scale           with an original
    y = original + (z - original) · scale           without a norm              `bypass`

(Yao et al. 2023, "Zipformer", sections 3.1 and 3.4.) Scale is a vector, or one for each clip, as where a layer is
skipped for some clips.

Run one after the other, the steps read and write every value several times. The Triton engine
(`fastclap.kernels.bias_norm_triton`) reads each tensor once and writes the result; its backward pass reads the gradient
and what is kept, and writes each gradient. Kept are z, which is x where there is no branch, one number a row, and
original where scale needs a gradient; a bypass whose scale needs none keeps nothing of its rows.

Eager calls of the Triton engine go through an autograd.Function. Under torch.compile the same kernels are the operator
`fastclap::bias_norm`, so that a graph stays whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.rows import WIDEST_BIAS_NORM, check_floating, check_index, why_not_triton

Optional = Tensor | None
NAMES = ("x", "branch", "original", "bias", "log_scale", "scale")  # of what gets a gradient, in the operator's order


def bias_norm_reference(
    x: Tensor,  # [R, C]
    bias: Tensor,  # [C]
    log_scale: Tensor,  # []
    original: Tensor | None = None,  # [R, C]
    scale: Tensor | None = None,  # [C] or [B, C]
    sequence: Tensor | None = None,  # int [R]
    branch: Tensor | None = None,  # [R, C]
) -> Tensor:
    """The definition, written out in the dtypes of its inputs; the reference in float64."""
    z = x if branch is None else x + branch
    y = z * log_scale.exp() / (z - bias).square().mean(-1, keepdim=True).sqrt()
    return y if original is None or scale is None else bypass_reference(original, y, scale, sequence)


def bypass_reference(
    original: Tensor,  # [R, C]
    x: Tensor,  # [R, C]
    scale: Tensor,  # [C] or [B, C]
    sequence: Tensor | None = None,  # int [R]
    branch: Tensor | None = None,  # [R, C]
) -> Tensor:
    """The definition, written out in the dtypes of its inputs; the reference in float64."""
    z = x if branch is None else x + branch
    return original + (z - original) * (scale if scale.dim() == 1 or sequence is None else scale[sequence])


def bias_norm(
    x: Tensor,  # [R, C]
    bias: Tensor,  # [C]
    log_scale: Tensor,  # []
    original: Tensor | None = None,  # [R, C]
    scale: Tensor | None = None,  # [C] or [B, C]
    sequence: Tensor | None = None,  # int [R]
    branch: Tensor | None = None,  # [R, C]
    *,
    backend: str = "auto",
) -> Tensor:
    """BiasNorm of x + branch; with `original`, original + (that - original) · scale.

    Differentiable in all tensors but `sequence`, on the Triton engine once. Never waits for the device.

    Args:
        x: [R, C] of a floating dtype. A row that is its bias has no norm: the result is not finite.
        bias: [C], which is subtracted in the mean square alone.
        log_scale: a scalar, the logarithm of the result's gain.
        original, scale: [R, C], and [C] or, with `sequence`, [B, C]; both or neither.
        sequence: int32 or int64 [R], the clip of each row, from 0 to B - 1; rows of a clip follow each other, in the
            order of the clips. Values are not checked.
        branch: [R, C], which is added to x; the sum is rounded to the dtype of x.
        backend: "triton", "torch", "reference", or "auto": Triton on CUDA devices from sm_80 on for float32, bfloat16
            and float16 with C ≤ 4096, else torch. On a CPU "triton" needs TRITON_INTERPRET=1.

    Every tensor has a floating dtype of its own.

    Returns:
        [R, C] in the dtype of `original`, or of x without one, under autocast too. The arithmetic is in float32, or
        float64 where x or original is.

    Raises:
        TypeError: a tensor is of a wrong dtype.
        ValueError: shapes or devices do not fit, or the backend is unknown or cannot take these tensors.
        RuntimeError: at a second differentiation of the Triton engine.
    """
    if log_scale.dim():
        raise ValueError(f"log_scale must be a scalar, is {list(log_scale.shape)}")
    return _compute((x, branch, original, bias, log_scale, scale), sequence, backend)


def bypass(
    original: Tensor,  # [R, C]
    x: Tensor,  # [R, C]
    scale: Tensor,  # [C] or [B, C]
    sequence: Tensor | None = None,  # int [R]
    branch: Tensor | None = None,  # [R, C]
    *,
    backend: str = "auto",
) -> Tensor:
    """original + (x + branch - original) · scale: of arguments, results and errors see `bias_norm`."""
    return _compute((x, branch, original, None, None, scale), sequence, backend)


def _compute(tensors: tuple[Optional, ...], sequence: Optional, backend: str) -> Tensor:
    x, branch, original, bias, log_scale, scale = tensors
    assert x is not None
    _check(x, branch, original, bias, log_scale, scale, sequence)
    named = {name: tensor for name, tensor in zip(NAMES, tensors, strict=True) if tensor is not None}
    engine = dispatch.engine(x, backend, why_not_triton(named, x.shape[1], WIDEST_BIAS_NORM))
    if scale is None or scale.dim() == 1:
        sequence = None
    if engine != "triton":
        return _torch_engine(x, branch, original, bias, log_scale, scale, sequence)
    needing = named.values() if bias is not None else (scale,)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in needing)
    inputs = (*tensors, sequence, keep)
    compute = torch.ops.fastclap.bias_norm if torch.compiler.is_compiling() else _BiasNorm.apply
    y: Tensor = compute(*inputs)[0]
    return y


def _check(
    x: Tensor,
    branch: Optional,
    original: Optional,
    bias: Optional,
    log_scale: Optional,
    scale: Optional,
    sequence: Optional,
) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be [R, C], is {list(x.shape)}")
    if (original is None) != (scale is None):
        raise ValueError("original and scale go together: give both or neither")
    rows, columns = x.shape
    of_scale = (columns,) if scale is None or scale.dim() != 2 else (len(scale), columns)
    shapes = {"branch": (branch, x.shape), "original": (original, x.shape), "bias": (bias, (columns,))}
    check_floating(x, {**shapes, "log_scale": (log_scale, ()), "scale": (scale, of_scale)})
    if scale is not None and scale.dim() == 2 and sequence is None:
        raise ValueError(f"scale {list(scale.shape)} is one for each clip: give sequence, the clip of each row of x")
    if sequence is not None:
        check_index(x, "sequence", sequence, (rows,))


def _torch_engine(
    x: Tensor,
    branch: Optional,
    original: Optional,
    bias: Optional,
    log_scale: Optional,
    scale: Optional,
    sequence: Optional,
) -> Tensor:
    z: Any = x if branch is None else (x + branch).to(x.dtype)
    dtype = x.dtype if original is None else original.dtype
    wide = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
    z, original, bias, log_scale, scale = (
        None if t is None else t.to(wide) for t in (z, original, bias, log_scale, scale)
    )
    if bias is not None and log_scale is not None:
        return bias_norm_reference(z, bias, log_scale, original, scale, sequence).to(dtype)
    assert original is not None and scale is not None
    return bypass_reference(original, z, scale, sequence).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Triton engine: eager calls and the operator
# ---------------------------------------------------------------------------------------------------------------------


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fastclap.kernels import bias_norm_triton

    return bias_norm_triton.forward(*inputs)


def _backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fastclap.kernels import bias_norm_triton

    return bias_norm_triton.backward(*inputs)


class _BiasNorm(torch.autograd.Function):
    """An eager call, without the tens of microseconds that an operator costs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        outputs = _forward(*inputs)
        _save(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Optional, ...]:
        return _gradients(_backward, ctx, dy)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, branch, original, bias, log_scale, scale, sequence, keep = inputs
    _, z, inverse_rms = outputs
    ctx.mark_non_differentiable(z, inverse_rms)
    ctx.set_materialize_grads(False)
    need_scale = ctx.needs_input_grad[5]
    ctx.save_for_backward(
        (x if branch is None else z) if keep else None,
        original if need_scale else None,
        bias,
        log_scale,
        scale,
        None if scale is None else sequence,
        inverse_rms if keep and bias is not None else None,
    )
    ctx.dtypes = x.dtype, None if branch is None else branch.dtype


def _gradients(compute: Any, ctx: Any, dy: Optional) -> tuple[Optional, ...]:
    dispatch.refuse_second_order("bias_norm and bypass", "torch")
    need = list(ctx.needs_input_grad[:6])
    if dy is None or not any(need):
        return (None,) * 8
    gradients = compute(dy, *ctx.saved_tensors, *ctx.dtypes, need)
    return (*(g if wanted else None for g, wanted in zip(gradients, need, strict=True)), None, None)


@torch.library.custom_op("fastclap::bias_norm", mutates_args=())
def bias_norm_op(
    x: Tensor,
    branch: Tensor | None,
    original: Tensor | None,
    bias: Tensor | None,
    log_scale: Tensor | None,
    scale: Tensor | None,
    sequence: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, z, 1 / √mean((z - bias)²) [R] float32); the latter two are empty where they are not kept, and z without a
    branch, where it is x."""
    return _forward(x, branch, original, bias, log_scale, scale, sequence, keep)


@torch.library.custom_op("fastclap::bias_norm_backward", mutates_args=())
def bias_norm_backward_op(
    dy: Tensor,
    z: Tensor | None,
    original: Tensor | None,
    bias: Tensor | None,
    log_scale: Tensor | None,
    scale: Tensor | None,
    sequence: Tensor | None,
    inverse_rms: Tensor | None,
    dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, original, bias, log_scale and scale; an empty tensor for each that is not needed."""
    return _backward(dy, z, original, bias, log_scale, scale, sequence, inverse_rms, dtype, branch_dtype, need)


@bias_norm_op.register_fake
def _(x: Tensor, branch: Optional, original: Optional, bias: Optional, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    keep = others[-1]
    y = x.new_empty(x.shape, dtype=x.dtype if original is None else original.dtype)
    z = x.new_empty(x.shape if keep and branch is not None else 0)
    return y, z, x.new_empty(x.shape[:1] if keep and bias is not None else 0, dtype=torch.float32)


@bias_norm_backward_op.register_fake
def _(
    dy: Tensor,
    z: Optional,
    original: Optional,
    bias: Optional,
    log_scale: Optional,
    scale: Optional,
    *others: Any,
) -> tuple[Tensor, ...]:
    *_, dtype, branch_dtype, need = others
    made = [dy.new_empty(dy.shape, dtype=kind) for kind in (dtype, branch_dtype, dy.dtype)]
    made += [dy.new_empty(0) if p is None else p.new_empty(p.shape) for p in (bias, log_scale, scale)]
    return tuple(x if wanted else dy.new_empty(0) for x, wanted in zip(made, need, strict=True))


def _op_backward(ctx: Any, dy: Optional, *_: Any) -> tuple[Optional, ...]:
    return _gradients(torch.ops.fastclap.bias_norm_backward, ctx, dy)


def _save_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _save(ctx, inputs, output)


bias_norm_op.register_autograd(_op_backward, setup_context=_save_op)
