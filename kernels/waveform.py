"""Waveforms for the towers that take samples: crop, normalisation to zero mean and unit variance, zeros past the end.

    y = (x - mean) / sqrt(std² + epsilon)

is the formula of the wav2vec2 family's feature extractors. With mean and std given, such as those of the whole file
that a crop was taken from, the Triton engine (`fastclap.kernels.waveform_triton`) does it in one launch that reads the
samples, int16 or floating point, and writes the result in the dtype that the first layer wants. Otherwise two launches
before it measure them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.kernels import dispatch

FULL_SCALE = 32768  # of int16
AUDIO_DTYPES = (torch.int16, torch.float32, torch.bfloat16, torch.float16)  # of the Triton engine
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normalize_waveform(
    audio: Tensor,  # [B, T]
    lengths: Tensor | None = None,  # [B]
    mean: Tensor | None = None,  # [B]
    std: Tensor | None = None,  # [B]
    *,
    offsets: Tensor | None = None,  # [B]
    samples: int | None = None,
    min_samples: int = 1,
    epsilon: float = 1e-7,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:  # [B, samples]
    """Crops of a batch of clips, each normalised to zero mean and unit variance and zero past its end.

    A clip is what its row holds from its offset on, `lengths` and `samples` at most; the padding in `audio` is
    arbitrary. A clip shorter than `min_samples` counts as extended to it with zeros: they are normalised, and
    measured, like its samples. Never waits for the device.

    Args:
        audio: [B, T] int16, full scale 32768, or floating point, full scale 1.
        lengths: integers [B], the samples of each clip from its offset on, clamped to what the row holds; None: all.
        mean, std: [B] in units of full scale, of whatever the clips are to be measured by, such as the whole file.
            None: mean and population standard deviation of each clip itself.
        offsets: integers [B], the first sample of each clip, clamped to 0..T; None: 0.
        samples: width of the result; by default T, or `min_samples` where that is more.
        min_samples: the shortest clip.
        epsilon: added to the variance. With `mean` 0, `std` 1 and `epsilon` 0 samples are only converted.
        dtype: of the result: float32, bfloat16 or float16, whatever autocast says. Arithmetic is in float32.
        backend: "triton", "torch", "reference", or "auto": Triton on CUDA devices from sm_80 on, else torch. On a CPU
            "triton" needs TRITON_INTERPRET=1.

    Returns:
        [B, samples] in `dtype`, contiguous. Where gradients of audio, mean or std are wanted, "auto" takes the torch
        engine, which autograd differentiates, measured statistics included.

    Raises:
        TypeError: a tensor or `dtype` has another dtype than those above.
        ValueError: shapes or values do not fit, only one of mean and std is given, or the backend is unknown or cannot
            take these tensors.
    """
    crops = Crops(audio, lengths, mean, std, offsets, 0, min_samples, float(epsilon))
    crops = _checked(crops, samples, dtype)
    engine = dispatch.engine(audio, backend, _why_not_triton(crops))
    if engine == "reference":
        audio, lengths, mean, std, offsets, width, *_ = crops
        return normalize_waveform_reference(
            audio, lengths, mean, std, offsets=offsets, samples=width, min_samples=min_samples, epsilon=epsilon
        ).to(dtype)
    if engine == "torch":
        return _torch_engine(crops).to(dtype)
    if torch.compiler.is_compiling():
        return torch.ops.fastclap.normalize_waveform(*crops, dtype)
    return _triton_engine(crops, dtype)


class Crops(NamedTuple):
    """What `normalize_waveform` is given; integers are int64 on the device of audio once they are checked."""

    audio: Tensor  # [B, T]
    lengths: Tensor | None  # [B]
    mean: Tensor | None  # [B]
    std: Tensor | None  # [B]
    offsets: Tensor | None  # [B]
    samples: int  # of the result
    min_samples: int
    epsilon: float


def _checked(crops: Crops, samples: int | None, dtype: torch.dtype) -> Crops:
    """The crops with the width of the result, all tensors on the device of audio.

    Raises:
        TypeError, ValueError: as `normalize_waveform`.
    """
    audio, lengths, mean, std, offsets, _, min_samples, epsilon = crops
    if audio.dim() != 2 or audio.shape[1] < 1:
        raise ValueError(f"audio must be [batch, samples] with at least one sample, is {list(audio.shape)}")
    if audio.dtype != torch.int16 and not audio.is_floating_point():
        raise TypeError(f"audio must be int16 or floating point, is {audio.dtype}")
    for name, integers in (("lengths", lengths), ("offsets", offsets)):
        if integers is None:
            continue
        if integers.is_floating_point() or integers.is_complex() or integers.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, are {integers.dtype}")
        if integers.shape != audio.shape[:1]:
            raise ValueError(f"{name} must be [{len(audio)}], one a clip, are {list(integers.shape)}")
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std go together: {'mean' if mean is None else 'std'} is missing")
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        if not values.is_floating_point():
            raise TypeError(f"{name} must be floating point, is {values.dtype}")
        if values.shape != audio.shape[:1]:
            raise ValueError(f"{name} must be [{len(audio)}], one value a clip, is {list(values.shape)}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, is {dtype}")
    if min_samples < 1:
        raise ValueError(f"min_samples must be at least 1, is {min_samples}")
    if not epsilon >= 0:
        raise ValueError(f"epsilon must not be negative, is {epsilon}")
    width = max(audio.shape[1], min_samples) if samples is None else samples
    if width < min_samples:
        raise ValueError(f"samples must be at least min_samples, {min_samples}, is {samples}")
    device = audio.device
    lengths, offsets = (None if x is None else x.to(device, torch.int64) for x in (lengths, offsets))
    mean, std = (None if x is None else x.to(device) for x in (mean, std))
    return Crops(audio, lengths, mean, std, offsets, width, min_samples, epsilon)


def _why_not_triton(crops: Crops) -> str | None:
    if crops.audio.dtype not in AUDIO_DTYPES:
        return f"audio is {crops.audio.dtype}, not int16, float32, bfloat16 or float16"
    inputs = (crops.audio, crops.mean, crops.std)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return "audio, mean or std requires a gradient, which the torch engine gives"
    return None


def normalize_waveform_reference(
    audio: Tensor,  # [B, T]
    lengths: Tensor | None = None,  # [B]
    mean: Tensor | None = None,  # [B]
    std: Tensor | None = None,  # [B]
    *,
    offsets: Tensor | None = None,  # [B]
    samples: int | None = None,
    min_samples: int = 1,
    epsilon: float = 1e-7,
) -> Tensor:  # [B, samples] float64
    """The definition, clip by clip in float64; the reference for every engine. See `normalize_waveform`."""
    batch, held = audio.shape
    width = max(held, min_samples) if samples is None else samples
    rows = []
    for clip in range(batch):
        first = 0 if offsets is None else min(max(int(offsets[clip]), 0), held)
        length = width if lengths is None else min(max(int(lengths[clip]), 0), width)
        x = audio[clip, first:][:length].double()
        if audio.dtype == torch.int16:
            x = x / FULL_SCALE
        x = F.pad(x, (0, max(min_samples - len(x), 0)))
        if mean is None or std is None:
            level, variance = x.mean(), x.var(correction=0)
        else:
            level, variance = mean[clip].double(), std[clip].double().square()
        x = (x - level) / (variance + epsilon).sqrt()
        rows.append(F.pad(x, (0, width - len(x))))
    return torch.stack(rows) if rows else audio.new_zeros(0, width, dtype=torch.float64)


def _torch_engine(crops: Crops) -> Tensor:
    """In float32, or in float64 where audio is."""
    audio, lengths, mean, std, offsets, width, min_samples, epsilon = crops
    held = audio.shape[1]
    position = torch.arange(width, device=audio.device)
    if offsets is None:
        waveform = audio[:, :width]
        length: Tensor | int = min(held, width)
    else:
        first = offsets.clamp(0, held)[:, None]
        waveform = audio.gather(1, (first + position).clamp(max=held - 1))
        length = (held - first).clamp(max=width)
    wide = torch.promote_types(audio.dtype, torch.float32)
    waveform = waveform.to(torch.float32) / FULL_SCALE if audio.dtype == torch.int16 else waveform.to(wide)
    if waveform.shape[1] < width:
        waveform = F.pad(waveform, (0, width - waveform.shape[1]))
    if lengths is not None:
        asked = lengths[:, None].clamp(min=0)
        length = torch.minimum(asked, length) if isinstance(length, Tensor) else asked.clamp(max=length)
    count: Tensor | int
    past: Tensor | None
    if isinstance(length, Tensor):
        waveform = waveform.masked_fill(position >= length, 0.0)
        count = length.clamp(min=min_samples)
        past = position >= count
    else:
        count = max(length, min_samples)
        past = (position >= count)[None] if count < width else None
    if mean is None or std is None:
        level = waveform.sum(1, keepdim=True) / count  # zero past the end
        centred = waveform - level
        if past is not None:
            centred = centred.masked_fill(past, 0.0)
        variance = centred.square().sum(1, keepdim=True) / count
        return centred / (variance + epsilon).sqrt()
    normal = (waveform - mean.to(waveform.dtype)[:, None]) / (std.to(waveform.dtype)[:, None].square() + epsilon).sqrt()
    return normal if past is None else normal.masked_fill(past, 0.0)


def _triton_engine(crops: Crops, dtype: torch.dtype) -> Tensor:
    from fastclap.kernels import waveform_triton

    return waveform_triton.normalize(*crops, dtype, 1.0 / FULL_SCALE if crops.audio.dtype == torch.int16 else 1.0)


@torch.library.custom_op("fastclap::normalize_waveform", mutates_args=())
def normalize_waveform_op(
    audio: Tensor,
    lengths: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    offsets: Tensor | None,
    samples: int,
    min_samples: int,
    epsilon: float,
    dtype: torch.dtype,
) -> Tensor:
    """The Triton engine, as torch.compile sees it; without a gradient, as `normalize_waveform` calls it."""
    return _triton_engine(Crops(audio, lengths, mean, std, offsets, samples, min_samples, epsilon), dtype)


@normalize_waveform_op.register_fake
def _(audio: Tensor, *others: Any) -> Tensor:
    *_, samples, _, _, dtype = others
    return audio.new_empty((audio.shape[0], samples), dtype=dtype)
