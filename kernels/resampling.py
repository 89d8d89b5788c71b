"""Down- and upsampling of the Zipformer between stacks of different frame rates, over packed rows.

Both speak of groups of rows that follow each other, one for each row of the lower rate; a clip's last group may be
shorter than the others, and then its last row stands for those that it lacks.

    downsampled[d]  = Σ_k weights[k] · x[min(first[d] + k, first[d + 1] - 1)]        `downsample`
    y[r]            = original[r] + (x[group of r] - original[r]) · scale            `upsample_bypass`

(Yao et al. 2023, "Zipformer", section 3.1; SimpleDownsample, SimpleUpsample and the bypass after it.) With torch the
rows are gathered first, which writes and reads all of them once more, and the gradients are scattered. The Triton
engine (`fastclap.kernels.resampling_triton`) reads and writes every row once: with four rows a group and a float32
stream 5 bytes a value of the higher rate downsampling and 9 upsampling, where gathering moves 13 and 17.

Eager calls of the Triton engine go through an autograd.Function. Under torch.compile the same kernels are the operators
`fastclap::downsample` and `fastclap::upsample_bypass`, so that a graph stays whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.rows import check_floating, check_index, why_not_triton


def downsample_reference(x: Tensor, weights: Tensor, first: Tensor) -> Tensor:
    """The definition of `downsample`, written out in the dtype of its inputs; the reference in float64."""
    first = first.long()
    rows = first[:-1, None] + torch.arange(len(weights), device=x.device)
    return (x[rows.minimum(first[1:, None] - 1)] * weights[:, None]).sum(1)


def upsample_bypass_reference(
    original: Tensor, x: Tensor, scale: Tensor, first: Tensor, sequence: Tensor | None = None
) -> Tensor:
    """The definition of `upsample_bypass`, written out in the dtypes of its inputs; the reference in float64."""
    group = torch.bucketize(torch.arange(len(original), device=x.device), first[1:].long(), right=True)
    factor = scale if scale.dim() == 1 or sequence is None else scale[sequence]
    return original + (x[group] - original) * factor


def downsample(
    x: Tensor,  # [R, C]
    weights: Tensor,  # [S]
    first: Tensor,  # int32 [D + 1]
    *,
    backend: str = "auto",
) -> Tensor:
    """The weighted sums of groups of S rows.

    Differentiable in x and weights, on the Triton engine once. Never waits for the device.

    Args:
        x: [R, C] of a floating dtype.
        weights: [S] of a floating dtype, as a softmax gives them.
        first: int32 or int64 [D + 1], the first row of every group, and R at the end: groups of 1 to S rows, the first
            from 0. Values are not checked.
        backend: "triton", "torch", "reference", or "auto": Triton on CUDA devices from sm_80 on for float32, bfloat16
            and float16 with C ≤ 8192, else torch. On a CPU "triton" needs TRITON_INTERPRET=1.

    Returns:
        [D, C] in the dtype of x, under autocast too. The arithmetic is in float32, or float64 where x is.

    Raises:
        TypeError: a tensor is of a wrong dtype.
        ValueError: shapes or devices do not fit, or the backend is unknown or cannot take these tensors.
        RuntimeError: at a second differentiation of the Triton engine.
    """
    if x.dim() != 2 or weights.dim() != 1 or not len(weights):
        raise ValueError(f"x must be [R, C] and weights [S], are {list(x.shape)} and {list(weights.shape)}")
    check_floating(x, {"weights": (weights, weights.shape)})
    _check_first(x, first)
    reason = why_not_triton({"x": x, "weights": weights}, x.shape[1], dispatch.WIDEST_NORM)
    engine = dispatch.engine(x, backend, reason)
    if engine == "triton":
        compiling = torch.compiler.is_compiling()
        y: Tensor = (torch.ops.fastclap.downsample if compiling else _Downsample.apply)(x, weights, first)
        return y
    wide = torch.promote_types(x.dtype, torch.float32)
    return downsample_reference(x.to(wide), weights.to(wide), first).to(x.dtype)


def upsample_bypass(
    original: Tensor,  # [R, C]
    x: Tensor,  # [D, C]
    scale: Tensor,  # [C] or [B, C]
    first: Tensor,  # int32 [D + 1]
    sequence: Tensor | None = None,  # int [R]
    *,
    backend: str = "auto",
) -> Tensor:
    """original + (x of the row's group - original) · scale.

    Differentiable in original, x and scale, on the Triton engine once. Never waits for the device.

    Args:
        original: [R, C] of a floating dtype, of the higher rate.
        x: [D, C] of a floating dtype, a row for each group.
        scale: [C] or, with `sequence`, [B, C], of a floating dtype.
        first: as of `downsample`.
        sequence: int32 or int64 [R], the clip of each row.
        backend: as of `downsample`; Triton takes a scale [C] alone.

    Returns:
        [R, C] in the dtype of original, under autocast too. The arithmetic is in float32, or float64 where original is.

    Raises:
        TypeError, ValueError, RuntimeError: as `downsample`.
    """
    if original.dim() != 2:
        raise ValueError(f"original must be [R, C], is {list(original.shape)}")
    columns = original.shape[1]
    of_scale = (columns,) if scale.dim() != 2 else (len(scale), columns)
    shape = (max(len(first) - 1, 0) if first.dim() == 1 else 0, columns)
    _check_first(original, first, "original")
    check_floating(original, {"x": (x, shape), "scale": (scale, of_scale)}, "original")
    if sequence is not None:
        check_index(original, "sequence", sequence, original.shape[:1], name_of_x="original")
    if scale.dim() == 2 and sequence is None:
        raise ValueError(f"scale {list(scale.shape)} is one for each clip: give sequence, the clip of each row")
    reason = why_not_triton({"original": original, "x": x, "scale": scale}, columns, dispatch.WIDEST_NORM)
    engine = dispatch.engine(original, backend, reason or ("scale is one for each clip" if scale.dim() == 2 else None))
    if engine == "triton":
        compiling = torch.compiler.is_compiling()
        compute = torch.ops.fastclap.upsample_bypass if compiling else _UpsampleBypass.apply
        y: Tensor = compute(original, x, scale, first)
        return y
    wide = torch.promote_types(original.dtype, torch.float32)
    y = upsample_bypass_reference(original.to(wide), x.to(wide), scale.to(wide), first, sequence)
    return y.to(original.dtype)


def _check_first(x: Tensor, first: Tensor, name_of_x: str = "x") -> None:
    check_index(x, "first", first, name_of_x=name_of_x)
    if len(first) < 1 or (len(first) < 2 and len(x)):
        raise ValueError(f"first must be [D + 1], each group's first row and then {len(x)}, is {len(first)} long")


# ---------------------------------------------------------------------------------------------------------------------
# Triton engine: eager calls and the operators
# ---------------------------------------------------------------------------------------------------------------------


def _downsample(x: Tensor, weights: Tensor, first: Tensor) -> Tensor:
    from fastclap.kernels import resampling_triton

    return resampling_triton.downsample(x, weights, first)


def _downsample_backward(
    dy: Tensor, x: Tensor, weights: Tensor, first: Tensor, need_weights: bool
) -> tuple[Tensor, Tensor]:
    from fastclap.kernels import resampling_triton

    return resampling_triton.downsample_backward(dy, x, weights, first, need_weights)


def _upsample_bypass(original: Tensor, x: Tensor, scale: Tensor, first: Tensor) -> Tensor:
    from fastclap.kernels import resampling_triton

    return resampling_triton.upsample_bypass(original, x, scale, first)


def _upsample_bypass_backward(
    dy: Tensor, original: Tensor, x: Tensor, scale: Tensor, first: Tensor, need_scale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from fastclap.kernels import resampling_triton

    return resampling_triton.upsample_bypass_backward(dy, original, x, scale, first, need_scale)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor | None) -> None:
    ctx.save_for_backward(*inputs)


def _downsample_gradients(compute: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dispatch.refuse_second_order("downsample")
    need_x, need_weights, _ = ctx.needs_input_grad
    dx, of_weights = compute(dy, *ctx.saved_tensors, need_weights)
    return dx if need_x else None, of_weights.to(ctx.saved_tensors[1].dtype) if need_weights else None, None


def _upsample_gradients(compute: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dispatch.refuse_second_order("upsample_bypass")
    need_original, need_x, need_scale, _ = ctx.needs_input_grad
    of_original, dx, of_scale = compute(dy, *ctx.saved_tensors, need_scale)
    of_scale = of_scale.to(ctx.saved_tensors[2].dtype) if need_scale else None
    return of_original if need_original else None, dx if need_x else None, of_scale, None


class _Downsample(torch.autograd.Function):
    """An eager call, without the tens of microseconds that an operator costs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        _save(ctx, inputs, None)
        return _downsample(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _downsample_gradients(_downsample_backward, ctx, dy)


class _UpsampleBypass(torch.autograd.Function):
    """Likewise."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        _save(ctx, inputs, None)
        return _upsample_bypass(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _upsample_gradients(_upsample_bypass_backward, ctx, dy)


@torch.library.custom_op("fastclap::downsample", mutates_args=())
def downsample_op(x: Tensor, weights: Tensor, first: Tensor) -> Tensor:
    """[D, C] in the dtype of x."""
    return _downsample(x, weights, first)


@torch.library.custom_op("fastclap::downsample_backward", mutates_args=())
def downsample_backward_op(
    dy: Tensor, x: Tensor, weights: Tensor, first: Tensor, need_weights: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of weights in float32, an empty tensor where that is not needed."""
    return _downsample_backward(dy, x, weights, first, need_weights)


@torch.library.custom_op("fastclap::upsample_bypass", mutates_args=())
def upsample_bypass_op(original: Tensor, x: Tensor, scale: Tensor, first: Tensor) -> Tensor:
    """[R, C] in the dtype of original."""
    return _upsample_bypass(original, x, scale, first)


@torch.library.custom_op("fastclap::upsample_bypass_backward", mutates_args=())
def upsample_bypass_backward_op(
    dy: Tensor, original: Tensor, x: Tensor, scale: Tensor, first: Tensor, need_scale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of original and x, and of scale in float32, an empty tensor where that is not needed."""
    return _upsample_bypass_backward(dy, original, x, scale, first, need_scale)


@downsample_op.register_fake
def _(x: Tensor, weights: Tensor, first: Tensor) -> Tensor:
    return x.new_empty(first.shape[0] - 1, x.shape[1])


@downsample_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weights: Tensor, first: Tensor, need_weights: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape if need_weights else 0, dtype=torch.float32)


@upsample_bypass_op.register_fake
def _(original: Tensor, x: Tensor, scale: Tensor, first: Tensor) -> Tensor:
    return original.new_empty(original.shape)


@upsample_bypass_backward_op.register_fake
def _(
    dy: Tensor, original: Tensor, x: Tensor, scale: Tensor, first: Tensor, need_scale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    of_scale = scale.new_empty(scale.shape if need_scale else 0, dtype=torch.float32)
    return original.new_empty(original.shape), x.new_empty(x.shape), of_scale


def _downsample_op_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _downsample_gradients(torch.ops.fastclap.downsample_backward, ctx, dy)


def _upsample_op_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _upsample_gradients(torch.ops.fastclap.upsample_bypass_backward, ctx, dy)


downsample_op.register_autograd(_downsample_op_backward, setup_context=_save)
upsample_bypass_op.register_autograd(_upsample_op_backward, setup_context=_save)
