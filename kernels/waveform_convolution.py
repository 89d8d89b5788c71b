"""The first layer of the wav2vec2 family's convolutions: of the waveform, then LayerNorm over channels and GELU.

    y[b, n] = gelu(layer_norm(weight · x[b, n · stride : n · stride + kernel] + bias))

Run one after the other, the windows of samples are written out, their product with the weights is written, read and
kept for the backward pass, and its gradient is written and read again: 512 values for each window of 10 samples. The
Triton engine (`fastclap.kernels.waveform_convolution_triton`) reads samples and writes y; its backward pass reads
samples and dy and computes the rest again. In bf16 that is 2 and 2 bytes a value, against 6 and 10, and nothing of that
size is kept for the backward pass.

LayerNorm takes out whatever all channels have in common. The Triton engine takes it out of the filters beforehand, once
a call: its products are centred then, and a row needs no mean.

Eager calls of the Triton engine go through an autograd.Function. Under torch.compile the same kernels are the operator
`fastclap::waveform_convolution`, so that a graph stays whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.layer_norm_gelu import layer_norm_gelu, layer_norm_gelu_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the Triton engine
WIDEST = 512  # channels of the Triton engine, all of which a program keeps in registers
LONGEST_KERNEL = 29  # of the Triton engine: with the bias and two columns of its own, 32


def waveform_convolution_reference(
    waveform: Tensor,  # [B, samples]
    weight: Tensor,  # [C, 1, kernel]
    bias: Tensor | None,  # [C]
    norm_weight: Tensor,  # [C]
    norm_bias: Tensor,  # [C]
    stride: int,
    rows: int | None = None,
    eps: float = 1e-5,
) -> Tensor:  # [B, rows, C]
    """The definition, written out in the dtype of its inputs; the reference in float64. See `waveform_convolution`."""
    (batch, samples), kernel = waveform.shape, weight.shape[2]
    rows = (samples - kernel) // stride + 1 if rows is None else rows
    extended = torch.cat([waveform, waveform.new_zeros(batch, rows * stride + kernel)], 1)
    first, tap = torch.arange(rows, device=waveform.device), torch.arange(kernel, device=waveform.device)
    x = extended[:, first[:, None] * stride + tap] @ weight.squeeze(1).t()
    return layer_norm_gelu_reference(x if bias is None else x + bias, norm_weight, norm_bias, eps)


def waveform_convolution(
    waveform: Tensor,  # [B, samples]
    weight: Tensor,  # [C, 1, kernel]
    bias: Tensor | None,  # [C]
    norm_weight: Tensor,  # [C]
    norm_bias: Tensor,  # [C]
    stride: int,
    rows: int | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:  # [B, rows, C]
    """gelu(layer_norm(conv1d(waveform))), the norm over channels and the GELU exact; channels last.

    Differentiable in all tensors; on the Triton engine once, and not in the waveform. Never waits for the device.

    Args:
        waveform: [B, samples] of a floating dtype. Clips that are contiguous are read in place, whatever the stride
            between them.
        weight, bias: of an nn.Conv1d of one input channel without padding; bias may be None. Without autocast they
            have the dtype of the waveform.
        norm_weight, norm_bias: of an nn.LayerNorm over the channels, in any floating dtype.
        stride: samples from one row to the next.
        rows: of each clip, as many as the caller wants: clips count as extended with zeros. By default those that lie
            within the samples.
        eps: added to the variance.
        backend: "triton", "torch", "reference", or "auto": Triton on CUDA devices from sm_80 on for float32, bfloat16
            and float16 with C ≤ 512 and kernel ≤ 29, where the waveform wants no gradient; else torch. On a CPU
            "triton" needs TRITON_INTERPRET=1.

    Returns:
        [B, rows, C], contiguous on the Triton engine; under autocast in its dtype, else in that of the waveform.
        Samples and weights are rounded to that dtype, and products accumulated in float32; statistics and GELU are in
        float32. Of float32 the Triton engine multiplies as torch.get_float32_matmul_precision() says: "highest" with
        the accuracy of float32, else in TF32.

    Raises:
        TypeError: a tensor is not floating, or dtypes differ without autocast.
        ValueError: shapes, devices or values do not fit, or the backend is unknown or cannot take these tensors.
        RuntimeError: at a second differentiation of the Triton engine.
    """
    rows, dtype = _checked(waveform, weight, bias, norm_weight, norm_bias, stride, rows)
    engine = dispatch.engine(waveform, backend, _why_not_triton(waveform, weight, dtype))
    if engine == "reference":
        return waveform_convolution_reference(waveform, weight, bias, norm_weight, norm_bias, stride, rows, eps)
    if engine == "torch":
        x = window_products(waveform, weight, bias, stride, rows)
        y = layer_norm_gelu(x, norm_weight, norm_bias, eps, backend="auto" if backend == "auto" else "torch")
        return y.unflatten(0, (len(waveform), rows))
    inputs = (waveform, _centred(weight, bias), norm_weight, norm_bias, stride, rows, float(eps), dtype)
    if torch.compiler.is_compiling():
        return torch.ops.fastclap.waveform_convolution(*inputs)[0]
    return _WaveformConvolution.apply(*inputs)


def window_products(
    waveform: Tensor,  # [B, samples]
    weight: Tensor,  # [C, 1, kernel]
    bias: Tensor | None,  # [C]
    stride: int,
    rows: int,
) -> Tensor:  # [B · rows, C]
    """The convolution alone, as one GEMM on the windows of the waveform, which counts as extended with zeros."""
    kernel = weight.shape[2]
    waveform = F.pad(waveform, (0, (rows - 1) * stride + kernel - waveform.shape[1]))
    # GEMMs on tensor cores want rows of a multiple of 16 bytes
    windows = F.pad(waveform.unfold(1, kernel, stride), (0, -kernel % 8)).flatten(0, 1)
    return F.linear(windows, F.pad(weight.squeeze(1), (0, -kernel % 8)), bias)


def _checked(
    waveform: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    rows: int | None,
) -> tuple[int, torch.dtype]:
    """Rows of a clip, and the dtype of the result.

    Raises:
        TypeError, ValueError: as `waveform_convolution`.
    """
    if waveform.dim() != 2:
        raise ValueError(f"waveform must be [batch, samples], is {list(waveform.shape)}")
    if weight.dim() != 3 or weight.shape[1] != 1 or not weight.numel():
        raise ValueError(f"weight must be [channels, 1, kernel], is {list(weight.shape)}")
    channels, _, kernel = weight.shape
    named = {"waveform": waveform, "weight": weight, "norm_weight": norm_weight, "norm_bias": norm_bias}
    named |= {} if bias is None else {"bias": bias}
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, is {tensor.dtype}")
        if name not in ("waveform", "weight") and tensor.shape != (channels,):
            raise ValueError(f"{name} must be [{channels}] beside weight {list(weight.shape)}, is {list(tensor.shape)}")
        if tensor.device != waveform.device:
            raise ValueError(f"{name} is on {tensor.device}, waveform on {waveform.device}; move it there first")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, is {stride}")
    if rows is None:
        rows = (waveform.shape[1] - kernel) // stride + 1
    if rows < 1:
        raise ValueError(
            f"{waveform.shape[1]} samples give {rows} rows of {kernel} samples each; pad the waveform, or say rows"
        )
    autocast = dispatch.autocast_dtype(waveform, weight)
    if autocast is not None:
        return rows, autocast
    dtypes = [x.dtype for x in (waveform, weight, bias) if x is not None]
    if len(set(dtypes)) > 1:
        raise TypeError(f"waveform, weight and bias must have one dtype without autocast, have {dtypes}")
    return rows, waveform.dtype


def _why_not_triton(waveform: Tensor, weight: Tensor, dtype: torch.dtype) -> str | None:
    for kind in (waveform.dtype, dtype):
        if kind not in DTYPES:
            return f"waveform is {kind}, not float32, bfloat16 or float16"
    channels, _, kernel = weight.shape
    if channels > WIDEST:
        return f"there are {channels} channels, more than {WIDEST}"
    if kernel > LONGEST_KERNEL:
        return f"the kernel is {kernel} samples long, more than {LONGEST_KERNEL}"
    if torch.is_grad_enabled() and waveform.requires_grad:
        return "waveform requires a gradient, which the torch engine gives"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Triton engine: eager calls and the operator
# ---------------------------------------------------------------------------------------------------------------------


def _centred(weight: Tensor, bias: Tensor | None) -> Tensor:  # [C, kernel + 1] float32
    """Weight and bias less their means over the channels, the bias as the last column."""
    filters = weight.squeeze(1).float()
    filters = F.pad(filters, (0, 1)) if bias is None else torch.cat([filters, bias.float()[:, None]], 1)
    return filters - filters.mean(0)


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    from fastclap.kernels import waveform_convolution_triton

    return waveform_convolution_triton.forward(*inputs)


def _backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fastclap.kernels import waveform_convolution_triton

    return waveform_convolution_triton.backward(*inputs)


class _WaveformConvolution(torch.autograd.Function):
    """An eager call, without the tens of microseconds that an operator costs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, inverse_std = _forward(*inputs)
        _save(ctx, inputs, (y, inverse_std))
        return y

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(_backward, ctx, upstream)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.stride = inputs[4]


def _gradients(compute: Any, ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    dispatch.refuse_second_order("waveform_convolution")
    gradients = compute(upstream, *ctx.saved_tensors, ctx.stride)
    wanted = (x if need else None for x, need in zip(gradients, ctx.needs_input_grad[1:4], strict=True))
    return (None, *wanted, None, None, None, None)


@torch.library.custom_op("fastclap::waveform_convolution", mutates_args=())
def waveform_convolution_op(
    waveform: Tensor,
    filters: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    rows: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(y [B, rows, C], inverse standard deviation [B, rows] float32) of filters as `_centred` makes them.

    It has no gradient of the waveform.
    """
    return _forward(waveform, filters, norm_weight, norm_bias, stride, rows, eps, dtype)


@torch.library.custom_op("fastclap::waveform_convolution_backward", mutates_args=())
def waveform_convolution_backward_op(
    upstream: Tensor,
    waveform: Tensor,
    filters: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    inverse_std: Tensor,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of filters (up to what all channels have in common), norm_weight and norm_bias."""
    return _backward(upstream, waveform, filters, norm_weight, norm_bias, inverse_std, stride)


@waveform_convolution_op.register_fake
def _(waveform: Tensor, filters: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, rows, _, dtype = others
    shape = (waveform.shape[0], rows)
    y = waveform.new_empty((*shape, filters.shape[0]), dtype=dtype)
    return y, waveform.new_empty(shape, dtype=torch.float32)


@waveform_convolution_backward_op.register_fake
def _(upstream: Tensor, waveform: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in others[:3])


def _save_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


def _op_backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(torch.ops.fastclap.waveform_convolution_backward, ctx, upstream)


waveform_convolution_op.register_autograd(_op_backward, setup_context=_save_op)
