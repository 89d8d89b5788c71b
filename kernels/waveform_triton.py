"""Triton engine of `fastclap.kernels.waveform`: samples in, normalised waveform out.

With given statistics one launch reads 2 bytes of an int16 sample and writes one value. Measured statistics take two
launches before it: every program leaves the mean and the sum of squared deviations of a block of a clip, taken about
the block's own mean, and one program a clip puts them together (Chan, Golub & LeVeque 1983), in float64 and in a fixed
order. Nothing cancels, whatever the constant part of the signal, and results are bit-identical from run to run. They do
not depend on what else is in the batch.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclap.kernels.offline import Compilation, signature_and_attrs
from fastclap.kernels.triton_tools import TYPE_NAMES, jit_for_any_size

BLOCK, WARPS = 4096, 4  # samples of a program: 32 a thread
PARTS = 256  # blocks of a clip that are put together at a time


@triton.jit
def _bounds(
    audio, lengths, offsets, b, held, row_stride, width, min_samples, OFFSETS: tl.constexpr, LENGTHS: tl.constexpr
):
    """(first sample, samples, samples with the zeros that count) of clip b."""
    clip = audio + b * row_stride
    length = tl.minimum(held, width)
    if OFFSETS:
        first = tl.minimum(tl.maximum(tl.load(offsets + b), 0), held)
        clip += first
        length = tl.minimum((held - first).to(tl.int32), width)
    if LENGTHS:
        length = tl.minimum(tl.maximum(tl.load(lengths + b), 0), length).to(tl.int32)
    return clip, length, tl.maximum(length, min_samples)


@jit_for_any_size("held row_stride width min_samples blocks plane scale", "audio lengths offsets")
def _blocks_kernel(
    audio, lengths, offsets, parts,  # [B, held]; [B] int64, where OFFSETS and LENGTHS; [2, B, blocks] float32
    held, row_stride, width, min_samples, blocks, plane, scale,
    OFFSETS: tl.constexpr, LENGTHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations from it of every block of every clip."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    clip, length, valid = _bounds(audio, lengths, offsets, b, held, row_stride, width, min_samples, OFFSETS, LENGTHS)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(clip + at, mask=at < length, other=0.0).to(tl.float32) * scale
    count = tl.minimum(tl.maximum(valid - block * BLOCK, 1), BLOCK)
    mean = tl.sum(x, 0) / count
    deviation = tl.where(at < valid, x - mean, 0.0)
    tl.store(parts + b * blocks + block, mean)
    tl.store(parts + plane + b * blocks + block, tl.sum(deviation * deviation, 0))


@jit_for_any_size("held row_stride width min_samples blocks plane", "audio lengths offsets std")
def _statistics_kernel(
    audio, lengths, offsets, parts, mean, std,  # as above; [B] float32
    held, row_stride, width, min_samples, blocks, plane,
    OFFSETS: tl.constexpr, LENGTHS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Mean and population standard deviation of every clip, from those of its blocks."""
    b = tl.program_id(0).to(tl.int64)
    _, _, valid = _bounds(audio, lengths, offsets, b, held, row_stride, width, min_samples, OFFSETS, LENGTHS)
    parts += b * blocks
    used = tl.cdiv(valid, BLOCK)
    total = tl.zeros((PARTS,), tl.float64)
    for k in tl.range(0, used, PARTS):
        block = k + tl.arange(0, PARTS)
        count = tl.minimum(valid - block * BLOCK, BLOCK).to(tl.float64)
        total += tl.load(parts + block, mask=block < used, other=0.0).to(tl.float64) * count
    average = tl.sum(total, 0) / valid
    squares = tl.zeros((PARTS,), tl.float64)
    for k in tl.range(0, used, PARTS):
        block = k + tl.arange(0, PARTS)
        count = tl.minimum(valid - block * BLOCK, BLOCK).to(tl.float64)
        away = tl.load(parts + block, mask=block < used, other=0.0).to(tl.float64) - average
        inner = tl.load(parts + plane + block, mask=block < used, other=0.0).to(tl.float64)
        squares += tl.where(block < used, inner + count * away * away, 0.0)
    tl.store(mean + b, average.to(tl.float32))
    tl.store(std + b, tl.sqrt(tl.sum(squares, 0) / valid).to(tl.float32))


@jit_for_any_size("held row_stride width min_samples blocks scale epsilon", "audio lengths offsets mean std")
def _normalize_kernel(
    audio, lengths, offsets, mean, std, out,  # [B, held]; [B] int64; [B] floating; [B, width]
    held, row_stride, width, min_samples, blocks, scale, epsilon,
    OFFSETS: tl.constexpr, LENGTHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    clip, length, valid = _bounds(audio, lengths, offsets, b, held, row_stride, width, min_samples, OFFSETS, LENGTHS)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(clip + at, mask=at < length, other=0.0).to(tl.float32) * scale
    deviation = tl.load(std + b).to(tl.float32)
    inverse = 1.0 / tl.sqrt(deviation * deviation + epsilon)
    x = tl.where(at < valid, (x - tl.load(mean + b).to(tl.float32)) * inverse, 0.0)
    tl.store(out + b * width + at, x.to(out.dtype.element_ty), mask=at < width)


def normalize(
    audio: Tensor,  # [B, T]
    lengths: Tensor | None,  # [B] int64
    mean: Tensor | None,  # [B]
    std: Tensor | None,  # [B]
    offsets: Tensor | None,  # [B] int64
    width: int,
    min_samples: int,
    epsilon: float,
    dtype: torch.dtype,
    scale: float,
) -> Tensor:  # [B, width]
    """`fastclap.kernels.waveform.normalize_waveform` for checked arguments; `scale` is the factor of a sample."""
    audio = audio if audio.stride(1) == 1 else audio.contiguous()
    batch, held = audio.shape
    lengths, offsets, mean, std = (None if x is None else x.contiguous() for x in (lengths, offsets, mean, std))
    flags = {"OFFSETS": offsets is not None, "LENGTHS": lengths is not None, "BLOCK": BLOCK, "num_warps": WARPS}
    blocks = triton.cdiv(width, BLOCK)
    clips = (audio, audio if lengths is None else lengths, audio if offsets is None else offsets)
    shape = (held, audio.stride(0), width, min_samples, blocks)
    out = torch.empty(batch, width, dtype=dtype, device=audio.device)
    with torch.cuda.device_of(audio):
        if mean is None or std is None:
            parts = torch.empty(2, batch, blocks, dtype=torch.float32, device=audio.device)
            mean, std = torch.empty(2, batch, dtype=torch.float32, device=audio.device)
            _blocks_kernel[(batch * blocks,)](*clips, parts, *shape, batch * blocks, scale, **flags)
            _statistics_kernel[(batch,)](*clips, parts, mean, std, *shape, batch * blocks, PARTS=PARTS, **flags)
        _normalize_kernel[(batch * blocks,)](*clips, mean, std, out, *shape, scale, epsilon, **flags)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# What the launcher may ask Triton to compile
# ---------------------------------------------------------------------------------------------------------------------


def compilations(arch: int) -> Iterator[Compilation]:
    """Every dtype of audio and result, with and without offsets and lengths; statistics in float32."""
    both = (False, True)
    kinds = [TYPE_NAMES[dtype] for dtype in (torch.int16, torch.float32, torch.bfloat16, torch.float16)]
    for kind, offsets, lengths in product(kinds, both, both):
        label = f"{kind}{' offsets' * offsets}{' lengths' * lengths}"
        flags = {"OFFSETS": offsets, "LENGTHS": lengths, "BLOCK": BLOCK}
        types = {
            "audio": kind,
            "lengths": "i64" if lengths else kind,  # audio stands in for what is not there
            "offsets": "i64" if offsets else kind,
        }
        yield _compilation(f"waveform blocks {label}", _blocks_kernel, types, flags)
        yield _compilation(f"waveform statistics {label}", _statistics_kernel, types, {**flags, "PARTS": PARTS})
        for out in ("fp32", "bf16", "fp16"):
            yield _compilation(f"waveform {label} to {out}", _normalize_kernel, {**types, "out": out}, flags)


def _compilation(name: str, function: Any, types: dict[str, str], constants: dict[str, Any]) -> Compilation:
    pointers = {name: f"*{kind}" for name, kind in types.items()}
    signature, attrs = signature_and_attrs(function, {"scale": "fp32", "epsilon": "fp32", **pointers}, constants)
    return Compilation(name, function, signature, constants, attrs, WARPS, 3, False)
