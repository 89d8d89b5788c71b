"""Triton engine of the log-mel front-ends: waveform in, features out, one launch (see `fastclap.kernels.logmel`).

Nothing but the waveform is read and nothing but the features written. A program takes a tile of frames of one clip. The
DFT is a matrix product on the tensor cores, made four times smaller by two folds; a shift of the frame changes no
power, so phases are counted from the window's centre c:

* x[c+i] and x[c-i] meet: cosines act on their sum, sines on their difference;
* i and n_fft/2 - i meet, as sum or difference, which serves the even or the odd bins.

The products are fp16x3: samples and matrix are each split into two float16 parts, and three of the four partial
products are added in float32. The error is that of a float32 FFT within a factor of about two, and of four where a
constant that the front-end does not remove stands in every partial sum. A power of two brings the samples of a tile
into float16's range whatever their scale. The mean and the pre-emphasis of a frame are taken in float32 before the
split. Mels are taken in groups, each with the blocks of bins that it has weights in, so no other bin is computed.

Reflection at a clip's ends costs index arithmetic, which tiles inside a clip do without. A dynamic range needs the
maximum of the whole clip: the launch then leaves the log-mel and the maximum of every tile to a second, smaller one.

Every value is computed by one program in a fixed order: results are bit-identical from run to run, and a clip's do not
depend on what else is in the batch.

The gradient recomputes the spectra, turns them to gradients of frames by the transposed products, and lets every sample
of the waveform gather those of its frames and reflections: no atomics.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclap.kernels.logmel import LogMelSpec, finished, masked, mel_bank, recorded, window
from fastclap.kernels.offline import Compilation

EDGES = {"snip_edges": 0, "center": 1, "no_snip_edges": 2}
FRAME_FLAGS = ("EDGES", "DC", "PREEMPHASIS")
PRODUCT_FLAGS = ("FOLD", "POWER", "BM", "BN", "BK", "MELS")
LARGEST_TRANSFORM = 4096  # the matrices of a longer one would take more memory than is worth it
LN_FACTOR = {"ln": 1.0, "log10": 1.0 / math.log(10.0), "db": 10.0 / math.log(10.0)}
DTYPES = (torch.int16, torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Tile:
    """Frames and bins of a program and samples of one step of its products."""

    frames: int
    bins: int  # of each parity
    depth: int
    warps: int
    stages: int


# By arithmetic, checked by offline compilation; other architectures take the nearest lower one.
TILES = {80: Tile(64, 32, 16, 8, 1), 90: Tile(128, 32, 16, 8, 1), 100: Tile(64, 32, 32, 8, 1)}
BACKWARD_TILES = {80: Tile(32, 32, 16, 8, 1), 90: Tile(128, 16, 16, 8, 1), 100: Tile(64, 16, 16, 8, 1)}
INTERPRETER_TILE = Tile(32, 64, 128, 4, 1)
GRADIENT_CHUNK = 256 << 20  # bytes of frames' gradients held at a time
ENOUGH_PROGRAMS = 1024


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


def _launched(scalars: str, vectors: str) -> Callable[[Any], Any]:
    """triton.jit that compiles once whatever the sizes and the alignment of slices: no compilation in a step."""
    return triton.jit(do_not_specialize=scalars.split(), do_not_specialize_on_alignment=vectors.split())


@triton.jit
def _samples(clip, start, n, mask, length, turns, EDGES: tl.constexpr):
    """Samples n [1, BK] of the frames that start at [BM, 1], float32, reflected `turns` times; 0: none is outside."""
    at = start + n
    if EDGES == 0:
        mask = mask & (at < length)
    else:
        REPEAT: tl.constexpr = 1 if EDGES == 2 else 0
        for _ in tl.range(0, turns):
            at = tl.where(at < 0, -at - REPEAT, at)
            at = tl.where(at >= length, 2 * length - 2 + REPEAT - at, at)
        at = tl.maximum(tl.minimum(at, length - 1), 0)
    return tl.load(clip + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _turns(inside, length, win, shift):
    """Reflections that bring every sample of a frame into its clip; a clip of one sample needs but a clamp."""
    return tl.where(inside | (length < 2), 0, (2 * win + tl.abs(shift)) // tl.maximum(length - 1, 1) + 1)


@triton.jit
def _means(clip, start, valid, length, turns, win, EDGES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    total = tl.zeros((BM, BK), tl.float32)
    for k in tl.range(0, win, BK):
        n = (k + tl.arange(0, BK))[None, :]
        total += _samples(clip, start, n, (n < win) & valid, length, turns, EDGES)
    return tl.sum(total, 1) / win


@triton.jit
def _conditioned(
    clip, start, n, valid, length, turns, win, mean, rest,
    EDGES: tl.constexpr, DC: tl.constexpr, PREEMPHASIS: tl.constexpr,
):  # fmt: skip
    """Samples with the frame's mean removed and pre-emphasis; the window is zero where that reads nothing."""
    x = _samples(clip, start, n, (n >= 0) & (n < win) & valid, length, turns, EDGES)
    if PREEMPHASIS:
        # x - c·y as (x - y) + (1 - c)·y: the difference of neighbours is nearly exact, a product with c is not.
        y = _samples(clip, start, n - 1, (n >= 1) & (n < win) & valid, length, turns, EDGES)
        x -= y
        if DC:
            y -= mean
        x += rest * y
    elif DC:
        x -= mean
    return x


@triton.jit
def _folded(
    clip, start, valid, length, turns, win, mean, rest, taps, scale, low, high, half, depth, j,
    EDGES: tl.constexpr, DC: tl.constexpr, PREEMPHASIS: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """What the cosines and the sines of the even, and of the odd, bins act on: four of [BM, BK]."""
    n = j[None, :]
    tap = (tl.load(taps + j) * scale)[None, :]
    after = _conditioned(clip, start, high + n, valid, length, turns, win, mean, rest, EDGES, DC, PREEMPHASIS)
    before = _conditioned(clip, start, low - n, valid, length, turns, win, mean, rest, EDGES, DC, PREEMPHASIS)
    total = (after + before) * tap
    difference = (after - before) * tap
    cos_even, cos_odd, sin_even, sin_odd = total, total, difference, difference
    if FOLD:
        tap = (tl.load(taps + depth + j) * scale)[None, :]
        after = _conditioned(clip, start, low + half - n, valid, length, turns, win, mean, rest, EDGES, DC, PREEMPHASIS)
        before = _conditioned(
            clip, start, high - half + n, valid, length, turns, win, mean, rest, EDGES, DC, PREEMPHASIS
        )
        total = (after + before) * tap
        difference = (after - before) * tap
        cos_even += total
        cos_odd -= total
        sin_even -= difference
        sin_odd += difference
    return cos_even, sin_even, cos_odd, sin_odd


@triton.jit
def _add_product(x, at, plane, total):
    """total + x·matrix in fp16x3; the matrix lies at `at`, what float16 cut off it a plane further on."""
    coarse = x.to(tl.float16)
    fine = (x - coarse.to(tl.float32)).to(tl.float16)
    matrix = tl.load(at)
    total = tl.dot(fine, matrix, total)
    total = tl.dot(coarse, tl.load(at + plane), total)
    return tl.dot(coarse, matrix, total)


@triton.jit
def _spectrum(
    clip, start, valid, length, turns, win, mean, rest, taps, dft, scale, low, high, half, depth,
    EDGES: tl.constexpr, DC: tl.constexpr, PREEMPHASIS: tl.constexpr, FOLD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Real and imaginary parts of a block's even bins and odd bins, four of [BM, BN], times the scale."""
    re_even = tl.zeros((BM, BN), tl.float32)
    im_even = tl.zeros((BM, BN), tl.float32)
    re_odd = tl.zeros((BM, BN), tl.float32)
    im_odd = tl.zeros((BM, BN), tl.float32)
    plane = depth * BN
    for k in tl.range(0, depth, BK):
        j = k + tl.arange(0, BK)
        cos_even, sin_even, cos_odd, sin_odd = _folded(
            clip, start, valid, length, turns, win, mean, rest, taps, scale, low, high, half, depth, j,
            EDGES, DC, PREEMPHASIS, FOLD,
        )  # fmt: skip
        at = dft + j[:, None] * BN + tl.arange(0, BN)[None, :]
        re_even = _add_product(cos_even, at, plane, re_even)
        im_even = _add_product(sin_even, at + 2 * plane, plane, im_even)
        re_odd = _add_product(cos_odd, at + 4 * plane, plane, re_odd)
        im_odd = _add_product(sin_odd, at + 6 * plane, plane, im_odd)
    return re_even, im_even, re_odd, im_odd


@triton.jit
def _logarithm(x):
    """Natural logarithm; the hardware's is absolute to 2^-22 near 1 and relative to that elsewhere."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) >> 23  # mantissa in [2/3, 4/3)
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    y = tl.log(mantissa) + exponent.to(tl.float32) * 0.6931471805599453
    normal = (x >= 1.1754944e-38) & (x < float("inf"))
    return tl.where(normal, y, tl.log(x))


@triton.jit
def _clip(
    waveform, offsets, lengths, b, samples, row_stride, hop, count_add, count_plus, most_frames,
    OFFSETS: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """(first sample, samples, frames) of clip b."""
    clip = waveform + b * row_stride
    length = samples
    if OFFSETS:
        first = tl.minimum(tl.maximum(tl.load(offsets + b), 0), samples)
        clip += first
        length = (samples - first).to(tl.int32)
    if LENGTHS:
        length = tl.minimum(tl.maximum(tl.load(lengths + b), 0), length).to(tl.int32)
    count = tl.minimum(tl.maximum(tl.maximum(length + count_add, 0) // hop + count_plus, 1), most_frames)
    return clip, length, tl.where(length > 0, count, 0)


@triton.jit
def _exponent(clip, begin, end, length, win, target):
    """Biased exponent of the power of two that takes a tile's samples into float16's range."""
    if clip.dtype.element_ty == tl.int16:
        return tl.maximum(target - 142, 1)  # of 2^15
    # The largest finite sample near the tile, reflections included.
    peak = tl.zeros((4096,), tl.float32)
    for k in tl.range(tl.maximum(begin - win, 0), tl.minimum(end + win, length), 4096):
        at = k + tl.arange(0, 4096)
        x = tl.abs(tl.load(clip + at, mask=at < length, other=0.0).to(tl.float32))
        peak = tl.maximum(peak, tl.where(x < float("inf"), x, 0.0))
    exponent = tl.max(peak, 0).to(tl.int32, bitcast=True) >> 23
    return tl.minimum(tl.maximum(target - exponent, 1), 227)  # both the scale and its inverse are normal


@triton.jit
def _in_spans(at, spans, count):
    """Which of the positions lie in one of the `count` spans [begin, end)."""
    hit = at < 0
    for i in tl.range(0, count):
        hit = hit | ((at >= tl.load(spans + 2 * i)) & (at < tl.load(spans + 2 * i + 1)))
    return hit


@_launched(
    "samples row_stride tiles frames win hop shift half low high depth groups mels count_add count_plus "
    "most_frames time_spans mel_spans rest target input_scale floor log_factor padding",
    "waveform offsets lengths frame_lengths time_masks mel_masks",
)
def _log_mel_kernel(
    waveform, offsets, lengths,  # [B, T]; [B] int64, where OFFSETS and LENGTHS
    taps, dft, bank, blocks, firsts,  # tables of a `Plan`
    affine, time_masks, mel_masks,  # [2, mels]; [B, time_spans, 2], [B, mel_spans, 2] int64 where MASKS
    out, tops, frame_lengths,  # [B, frames, mels], [B, programs, tiles] where RANGE, [B] int64
    samples, row_stride, tiles, frames, win, hop, shift, half, low, high, depth, groups, mels,
    count_add, count_plus, most_frames, time_spans, mel_spans, rest, target, input_scale, floor, log_factor,
    padding,
    EDGES: tl.constexpr, OFFSETS: tl.constexpr, LENGTHS: tl.constexpr, MASKS: tl.constexpr, DC: tl.constexpr,
    PREEMPHASIS: tl.constexpr, FOLD: tl.constexpr, POWER: tl.constexpr, RANGE: tl.constexpr, ENERGY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MELS: tl.constexpr,
):  # fmt: skip
    """Log-mel (ENERGY: mel energy) of BM frames of a clip, for every num_programs(1)-th group of mels."""
    tile = tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles).to(tl.int64)
    clip, length, count = _clip(
        waveform, offsets, lengths, b, samples, row_stride, hop, count_add, count_plus, most_frames, OFFSETS, LENGTHS
    )
    if (tile == 0) & (tl.program_id(1) == 0):
        tl.store(frame_lengths + b, count.to(tl.int64))

    t = tile * BM + tl.arange(0, BM)
    start = (t * hop - shift)[:, None]
    begin = tile * BM * hop - shift
    end = (tl.minimum(tile * BM + BM, count) - 1) * hop - shift + win
    inside = (begin >= 0) & (end <= length) & (tile * BM + BM <= count)
    # Back and forth, in a clip shorter than its frames.
    turns = _turns(inside, length, win, shift)
    valid = (t < count)[:, None]
    exponent = _exponent(clip, begin, end, length, win, target)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    factor = input_scale * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    if POWER:
        factor *= factor
    average = tl.zeros((BM,), tl.float32)
    if DC:
        average = _means(clip, start, valid, length, turns, win, EDGES, BM, BK)
    out += b * frames * mels
    top = tl.full((BM,), float("-inf"), tl.float32)
    for group in tl.range(tl.program_id(1), groups, tl.num_programs(1)):
        first_block = tl.load(blocks + group)
        energy = tl.zeros((BM, MELS), tl.float32)
        if tile * BM < count:
            for block in tl.range(first_block, tl.load(blocks + group + 1)):
                matrices = dft + block * (8 * depth * BN)
                re_even, im_even, re_odd, im_odd = _spectrum(
                    clip, start, valid, length, turns, win, average[:, None], rest, taps, matrices,
                    scale, low, high, half, depth, EDGES, DC, PREEMPHASIS, FOLD, BM, BN, BK,
                )  # fmt: skip
                even = re_even * re_even + im_even * im_even
                odd = re_odd * re_odd + im_odd * im_odd
                if not POWER:
                    even = tl.sqrt(even)
                    odd = tl.sqrt(odd)
                at = bank + block * (2 * BN * MELS) + tl.arange(0, BN)[:, None] * MELS + tl.arange(0, MELS)[None, :]
                energy = tl.dot(even, tl.load(at), energy, input_precision="tf32x3")
                energy = tl.dot(odd, tl.load(at + BN * MELS), energy, input_precision="tf32x3")
        x = energy * factor
        if not ENERGY:
            x = _logarithm(tl.where(x < floor, floor, x)) * log_factor  # a NaN stays
            x = tl.where(valid, x, padding)
        mel = tl.load(firsts + group) + tl.arange(0, MELS)
        kept = (t < frames)[:, None] & (mel < tl.load(firsts + group + 1))[None, :]
        if RANGE:
            # An infinity stands for NaN, which a maximum would lose.
            y = tl.where(x == x, x, float("inf"))
            top = tl.maximum(top, tl.max(tl.where(kept, y, float("-inf")), 1))
        elif not ENERGY:
            mean = tl.load(affine + mel, mask=mel < mels, other=0.0)[None, :]
            inverse_std = tl.load(affine + mels + mel, mask=mel < mels, other=0.0)[None, :]
            x = (x - mean) * inverse_std
            if MASKS:
                hit = _in_spans(t, time_masks + b * (2 * time_spans), time_spans)[:, None]
                hit = hit | _in_spans(mel, mel_masks + b * (2 * mel_spans), mel_spans)[None, :]
                x = tl.where(hit, (padding - mean) * inverse_std, x)
        tl.store(out + t[:, None].to(tl.int64) * mels + mel[None, :], x.to(out.dtype.element_ty), mask=kept)
    if RANGE:
        tl.store(tops + (b * tl.num_programs(1) + tl.program_id(1)) * tiles + tile, tl.max(top, 0))


@_launched(
    "size mels tops_size time_spans mel_spans dynamic_range padding",
    "tops time_masks mel_masks",
)
def _range_kernel(
    log_mels, tops, affine, time_masks, mel_masks, out,  # [B, size] float32, [B, tops_size] float32, …, [B, size]
    size, mels, tops_size, time_spans, mel_spans, dynamic_range, padding,
    MASKS: tl.constexpr, WIDTH: tl.constexpr, TOPS: tl.constexpr,
):  # fmt: skip
    """Raises a clip's values below its maximum less the dynamic range, then normalises and masks."""
    programs = tl.cdiv(size, WIDTH)
    b = (tl.program_id(0) // programs).to(tl.int64)
    top = tl.full((TOPS,), float("-inf"), tl.float32)
    for k in tl.range(0, tops_size, TOPS):
        at = k + tl.arange(0, TOPS)
        top = tl.maximum(top, tl.load(tops + b * tops_size + at, mask=at < tops_size, other=float("-inf")))
    lowest = tl.max(top, 0) - dynamic_range
    at = tl.program_id(0) % programs * WIDTH + tl.arange(0, WIDTH)
    mel = at % mels
    mean = tl.load(affine + mel)
    inverse_std = tl.load(affine + mels + mel)
    x = tl.load(log_mels + b * size + at, mask=at < size, other=0.0)
    x = tl.where(x < lowest, lowest, x)
    x = tl.where(lowest < float("inf"), (x - mean) * inverse_std, float("nan"))
    if MASKS:
        hit = _in_spans(at // mels, time_masks + b * (2 * time_spans), time_spans)
        hit = hit | _in_spans(mel, mel_masks + b * (2 * mel_spans), mel_spans)
        x = tl.where(hit, (padding - mean) * inverse_std, x)
    tl.store(out + b * size + at, x.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _coefficients(even, odd, POWER: tl.constexpr, re_even, im_even, re_odd, im_odd):
    """Gradients of the real and imaginary parts from those of the power or magnitude, without a factor of 2."""
    if not POWER:
        size = tl.sqrt(re_even * re_even + im_even * im_even)
        even = tl.where(size > 0, even / size, 0.0)
        size = tl.sqrt(re_odd * re_odd + im_odd * im_odd)
        odd = tl.where(size > 0, odd / size, 0.0)
    return even * re_even, even * im_even, odd * re_odd, odd * im_odd


@triton.jit
def _add_transposed(coarse, fine, at, plane, BM: tl.constexpr, BK: tl.constexpr):
    """(coarse + fine)·matrixᵀ in fp16x3; `at` are the addresses of the transposed matrix."""
    matrix = tl.load(at)
    total = tl.dot(fine, matrix, tl.zeros((BM, BK), tl.float32))
    total = tl.dot(coarse, tl.load(at + plane), total)
    return tl.dot(coarse, matrix, total)


@triton.jit
def _accumulate(rows, n, mask, win, x):
    """Adds x to samples n of the frames at `rows`, which are this program's own; returns the sums of what it added."""
    mask = mask & (n >= 0) & (n < win)
    tl.store(rows + n, tl.load(rows + n, mask=mask, other=0.0) + x, mask=mask)
    return tl.sum(tl.where(mask, x, 0.0), 1)


@_launched(
    "samples row_stride tiles frames win hop shift half low high depth groups mels count_add count_plus "
    "most_frames rest target input_scale",
    "waveform offsets lengths",
)
def _frame_gradients_kernel(
    waveform, offsets, lengths,  # [B, T]; [B] int64, where OFFSETS and LENGTHS
    taps, dft, bank, blocks, firsts,  # tables of a `Plan`
    d_energy, d_frames, d_sums,  # [B, frames, mels] float32; [B, frames, win], [B, frames]
    samples, row_stride, tiles, frames, win, hop, shift, half, low, high, depth, groups, mels,
    count_add, count_plus, most_frames, rest, target, input_scale,
    EDGES: tl.constexpr, OFFSETS: tl.constexpr, LENGTHS: tl.constexpr, DC: tl.constexpr,
    PREEMPHASIS: tl.constexpr, FOLD: tl.constexpr, POWER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MELS: tl.constexpr,
):  # fmt: skip
    """Gradients of BM conditioned frames, before the adjoints of pre-emphasis and mean, and their sums."""
    tile = tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles).to(tl.int64)
    clip, length, count = _clip(
        waveform, offsets, lengths, b, samples, row_stride, hop, count_add, count_plus, most_frames, OFFSETS, LENGTHS
    )
    if tile * BM >= count:
        return
    t = tile * BM + tl.arange(0, BM)
    start = (t * hop - shift)[:, None]
    begin = tile * BM * hop - shift
    end = (tl.minimum(tile * BM + BM, count) - 1) * hop - shift + win
    inside = (begin >= 0) & (end <= length) & (tile * BM + BM <= count)
    turns = _turns(inside, length, win, shift)
    valid = (t < count)[:, None]
    exponent = _exponent(clip, begin, end, length, win, target)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    factor = input_scale
    if POWER:
        factor *= 2.0 * input_scale * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    average = tl.zeros((BM,), tl.float32)
    if DC:
        average = _means(clip, start, valid, length, turns, win, EDGES, BM, BK)
    row = b * frames + t.to(tl.int64)
    rows = d_frames + (row * win)[:, None]
    total = tl.zeros((BM,), tl.float32)
    plane = depth * BN
    for group in tl.range(0, groups):
        mel = tl.load(firsts + group) + tl.arange(0, MELS)
        mask = valid & (mel < tl.load(firsts + group + 1))[None, :]
        upstream = tl.load(d_energy + row[:, None] * mels + mel[None, :], mask=mask, other=0.0)
        for block in tl.range(tl.load(blocks + group), tl.load(blocks + group + 1)):
            matrices = dft + block * (8 * depth * BN)
            re_even, im_even, re_odd, im_odd = _spectrum(
                clip, start, valid, length, turns, win, average[:, None], rest, taps, matrices,
                scale, low, high, half, depth, EDGES, DC, PREEMPHASIS, FOLD, BM, BN, BK,
            )  # fmt: skip
            at = bank + block * (2 * BN * MELS) + tl.arange(0, BN)[None, :] * MELS + tl.arange(0, MELS)[:, None]
            even = tl.dot(upstream, tl.load(at), input_precision="tf32x3")
            odd = tl.dot(upstream, tl.load(at + BN * MELS), input_precision="tf32x3")
            re_even, im_even, re_odd, im_odd = _coefficients(even, odd, POWER, re_even, im_even, re_odd, im_odd)
            # A power of two brings a frame's coefficients into float16's range, whatever the loss.
            largest = tl.maximum(tl.max(tl.abs(re_even), 1), tl.max(tl.abs(im_even), 1))
            largest = tl.maximum(largest, tl.maximum(tl.max(tl.abs(re_odd), 1), tl.max(tl.abs(im_odd), 1)))
            up = tl.minimum(tl.maximum(253 + 15 - (largest.to(tl.int32, bitcast=True) >> 23), 27), 227)
            down = (((254 - up) << 23).to(tl.float32, bitcast=True) * factor)[:, None]
            up = (up << 23).to(tl.float32, bitcast=True)[:, None]
            re_even *= up
            im_even *= up
            re_odd *= up
            im_odd *= up
            a_coarse = re_even.to(tl.float16)
            b_coarse = im_even.to(tl.float16)
            c_coarse = re_odd.to(tl.float16)
            d_coarse = im_odd.to(tl.float16)
            a_fine = (re_even - a_coarse.to(tl.float32)).to(tl.float16)
            b_fine = (im_even - b_coarse.to(tl.float32)).to(tl.float16)
            c_fine = (re_odd - c_coarse.to(tl.float32)).to(tl.float16)
            d_fine = (im_odd - d_coarse.to(tl.float32)).to(tl.float16)
            for k in tl.range(0, depth, BK):
                j = k + tl.arange(0, BK)
                n = j[None, :]
                turned = matrices + j[None, :] * BN + tl.arange(0, BN)[:, None]
                cos_even = _add_transposed(a_coarse, a_fine, turned, plane, BM, BK) * down
                sin_even = _add_transposed(b_coarse, b_fine, turned + 2 * plane, plane, BM, BK) * down
                cos_odd = _add_transposed(c_coarse, c_fine, turned + 4 * plane, plane, BM, BK) * down
                sin_odd = _add_transposed(d_coarse, d_fine, turned + 6 * plane, plane, BM, BK) * down
                tap = tl.load(taps + j)[None, :]
                x = (cos_even + cos_odd) * tap
                y = (sin_even + sin_odd) * tap
                centre = (n == 0) & (high == low)  # both are one sample, of which each had half
                total += _accumulate(rows, high + n, valid & (tap > 0), win, tl.where(centre, 2 * x, x + y))
                total += _accumulate(rows, low - n, valid & (tap > 0) & (centre == 0), win, x - y)
                if FOLD:
                    tap = tl.load(taps + depth + j)[None, :]
                    x = (cos_even - cos_odd) * tap
                    y = (sin_odd - sin_even) * tap
                    total += _accumulate(rows, low + half - n, valid & (tap > 0), win, x + y)
                    total += _accumulate(rows, high - half + n, valid & (tap > 0), win, x - y)
    tl.store(d_sums + row, total, mask=t < count)


@triton.jit
def _gathered(
    p, known, rows, sums, win, hop, shift, count, preemphasis, overlap, DC: tl.constexpr, PREEMPHASIS: tl.constexpr
):  # fmt: skip
    """What the frames say, in their order, of the samples that stand at positions p."""
    at = p + shift
    last = at // hop
    total = tl.zeros_like(p).to(tl.float32)
    for back in tl.range(0, overlap):
        t = last - (overlap - 1 - back)
        n = at - t * hop
        mask = known & (at >= 0) & (t >= 0) & (t < count) & (n < win)
        frame = rows + t.to(tl.int64) * win
        total += tl.load(frame + n, mask=mask, other=0.0)
        if PREEMPHASIS:
            total -= preemphasis * tl.load(frame + n + 1, mask=mask & (n + 1 < win), other=0.0)
        if DC:
            total -= (1.0 - preemphasis) / win * tl.load(sums + t, mask=mask, other=0.0)
    return total


@_launched(
    "samples frames win hop shift count_add count_plus most_frames overlap preemphasis",
    "offsets lengths out",
)
def _samples_gradients_kernel(
    d_frames, d_sums, offsets, lengths, out,  # [B, frames, win], [B, frames], [B] int64, [B, T]
    samples, frames, win, hop, shift, count_add, count_plus, most_frames, overlap, preemphasis,
    EDGES: tl.constexpr, OFFSETS: tl.constexpr, LENGTHS: tl.constexpr, DC: tl.constexpr,
    PREEMPHASIS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradient of the waveform: every sample adds up its frames, and those of its reflections, in a fixed order."""
    programs = tl.cdiv(samples, WIDTH)
    b = (tl.program_id(0) // programs).to(tl.int64)
    begin = tl.program_id(0) % programs * WIDTH
    row = out + b * samples
    _, length, count = _clip(
        row, offsets, lengths, b, samples, 0, hop, count_add, count_plus, most_frames, OFFSETS, LENGTHS
    )
    at = begin + tl.arange(0, WIDTH)
    s = at
    if OFFSETS:
        s = at - tl.minimum(tl.maximum(tl.load(offsets + b), 0), samples).to(tl.int32)
    known = (s >= 0) & (s < length)
    rows = d_frames + b * frames * win
    sums = d_sums + b * frames
    total = tl.zeros((WIDTH,), tl.float32)
    if EDGES == 0:
        total = _gathered(s, known, rows, sums, win, hop, shift, count, preemphasis, overlap, DC, PREEMPHASIS)
    else:
        REPEAT: tl.constexpr = 1 if EDGES == 2 else 0
        period = tl.maximum(2 * length - 2 + 2 * REPEAT, 1)
        end = (count - 1) * hop - shift + win
        # The end samples are their own reflection, unless they are repeated.
        reflected = known & ((s > 0) & (s < length - 1) | (REPEAT == 1))
        low = tl.min(s, 0)
        high = tl.max(s, 0)
        for turn in tl.range(-(tl.abs(shift) // period) - 1, end // period + 2):
            if (turn * period + high >= -shift) & (turn * period + low < end):
                p = turn * period + s
                total += _gathered(p, known, rows, sums, win, hop, shift, count, preemphasis, overlap, DC, PREEMPHASIS)
            if (turn * period - REPEAT - low >= -shift) & (turn * period - REPEAT - high < end):
                p = turn * period - REPEAT - s
                total += _gathered(
                    p, reflected, rows, sums, win, hop, shift, count, preemphasis, overlap, DC, PREEMPHASIS
                )
    tl.store(row + at, total.to(out.dtype.element_ty), mask=at < samples)


# ---------------------------------------------------------------------------------------------------------------------
# Tables of a front-end
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What `_log_mel_kernel` needs of a front-end besides the waveform."""

    taps: Tensor  # [2, depth] folded window
    dft: Tensor  # [blocks, 8, depth, BN] float16: cosine, sine of even, odd bins, each with its float16 remainder
    bank: Tensor  # [blocks, 2, BN, MELS]: weights of the even, the odd bins
    blocks: Tensor  # [groups + 1] int32, first block of each group of mels
    firsts: Tensor  # [groups + 1] int32, first mel of each group
    affine: Tensor  # [2, mels]: mean, 1/std
    groups: int
    numbers: tuple[float, ...]  # win … target, but for what depends on the call
    flags: dict[str, Any]


def _fold(spec: LogMelSpec) -> tuple[int, int, np.ndarray]:
    """(ceil(c), floor(c), taps [2, count]) of the folded window, for its centre c.

    taps[0, j] is the weight of samples ceil(c) + j and floor(c) - j, taps[1, j] that of those n_fft/2 away from them,
    floor(c) + n_fft/2 - j and ceil(c) - n_fft/2 + j. All windows are symmetric, and zero at their first sample.
    """
    win, half, taps = spec.win_length, spec.n_fft // 2, window(spec)
    twice = win if spec.window == "hann" else win - 1  # 2c
    high, low = (twice + 1) // 2, twice // 2
    # i = j + 1/2 for a centre between samples; each i up to n_fft/4 meets n_fft/2 - i.
    j = np.arange(min((half - twice % 2) // 2, max(low, win - 1 - high)) + 1)
    i = j + twice % 2 / 2

    def weights(after: np.ndarray, before: np.ndarray) -> np.ndarray:
        paired = (before >= 0) & (after < win)
        return np.where(paired, taps[before.clip(0, win - 1)], 0.0)

    first, second = weights(high + j, low - j), weights(low + half - j, high - half + j)
    first[i == 0] /= 2  # both are the centre
    second[2 * i == half] = 0.0  # i meets itself
    return high, low, np.stack((first, second))


def _groups(spec: LogMelSpec, bins: int, mels: int) -> list[tuple[int, int, int]]:
    """(first mel, first bin, blocks) of groups of at most `mels` mels in a row whose bins fill few blocks of `bins`."""
    bank = mel_bank(spec)
    groups: list[tuple[int, int, int]] = []
    low, high = len(bank), 0
    for mel in range(spec.n_mels):
        used = np.flatnonzero(bank[:, mel])
        first, last = (int(used[0]), int(used[-1])) if used.size else (len(bank), 0)
        together = (min(low, first), max(high, last))

        def blocks(low: int, high: int) -> int:
            return max(1, -(-(high + 1 - low // 2 * 2) // bins))

        alone = blocks(first, last)
        if groups and mel - groups[-1][0] < mels and blocks(*together) <= max(groups[-1][2], alone):
            low, high = together
            groups[-1] = (groups[-1][0], low // 2 * 2, blocks(low, high))
        else:
            low, high = first, last
            groups.append((mel, min(low // 2 * 2, len(bank) - 1), alone))
    return groups


def _flags(spec: LogMelSpec, tile: Tile) -> dict[str, Any]:
    mels = 32 if spec.n_mels <= 32 else 64
    return {
        "EDGES": EDGES[spec.framing],
        "DC": spec.remove_dc,
        "PREEMPHASIS": spec.preemphasis > 0,
        "FOLD": bool(_fold(spec)[2][1].any()),
        "POWER": spec.power == 2,
        "RANGE": spec.dynamic_range is not None,
        "BM": tile.frames,
        "BN": tile.bins,
        "BK": tile.depth,
        "MELS": mels,
    }


@lru_cache(maxsize=64)
def _plan(spec: LogMelSpec, device: torch.device, tile: Tile) -> Plan:
    flags = _flags(spec, tile)
    high, low, taps = _fold(spec)
    odd_centre = high != low
    count = taps.shape[1]
    depth = -(-count // tile.depth) * tile.depth
    taps = np.pad(taps, ((0, 0), (0, depth - count)))
    weights = mel_bank(spec)
    groups = _groups(spec, 2 * tile.bins, flags["MELS"])
    firsts = [first for first, _, _ in groups] + [spec.n_mels]
    blocks = np.cumsum([0] + [blocks for _, _, blocks in groups])
    dft = np.zeros((blocks[-1], 8, depth, tile.bins), np.float16)
    bank = np.zeros((blocks[-1], 2, tile.bins, flags["MELS"]), np.float32)
    for group, (mel, first_bin, num_blocks) in enumerate(groups):
        for block in range(num_blocks):
            at = blocks[group] + block
            for parity in (0, 1):
                bins = first_bin + 2 * tile.bins * block + parity + 2 * np.arange(tile.bins)
                bins = bins[bins < len(weights)]
                # Exact multiples of 2π/(2·n_fft), reduced before the cosine.
                turns = np.outer(2 * np.arange(count) + odd_centre, bins) % (2 * spec.n_fft)
                phase = turns * (math.pi / spec.n_fft)
                for index, exact in enumerate((np.cos(phase), np.sin(phase))):
                    plane = dft[at, 4 * parity + 2 * index : 4 * parity + 2 * index + 2, :count, : len(bins)]
                    plane[0] = exact
                    plane[1] = exact - plane[0]
                mels = weights[bins, mel : firsts[group + 1]]
                bank[at, parity, : len(bins), : mels.shape[1]] = mels
    affine = np.stack(np.broadcast_arrays(spec.mean, 1.0 / np.asarray(spec.std), np.zeros(spec.n_mels))[:2])

    # Bound of a folded sample over that of a sample; float16 ends at 2^16.
    gain = 2 * taps.sum(0).max() * (2 if spec.remove_dc or spec.preemphasis else 1)
    target = 253 + 15 - math.ceil(math.log2(max(gain, 1e-3)))
    count_add, count_plus = {
        "center": (0, 1),
        "snip_edges": (-spec.win_length, 1),
        "no_snip_edges": (spec.hop_length // 2, 0),
    }[spec.framing]
    numbers = (
        spec.win_length, spec.hop_length, spec.offset, spec.n_fft // 2, low, high, depth, len(groups), spec.n_mels,
        count_add, count_plus - int(spec.drop_last_frame), spec.num_frames or 2**31 - 1, 1.0 - spec.preemphasis, target,
    )  # fmt: skip

    def table(values: Any, dtype: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype)).to(device)

    # inference_mode(False): a constant made inside a user's inference_mode could not be used for training later.
    with torch.inference_mode(False):
        return Plan(
            table(taps, np.float32),
            table(dft, np.float16),
            table(bank, np.float32),
            table(blocks, np.int32),
            table(firsts, np.int32),
            table(affine, np.float32),
            len(groups),
            numbers,
            flags,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Launch
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _arch(index: int | None) -> int:
    """Architecture (80, 90, 100, …); 0 in the interpreter."""
    if index is None:
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


def tile_for(arch: int) -> Tile:
    """The configuration for an architecture: that of the nearest one below it."""
    return _nearest(TILES, arch)


def backward_tile_for(arch: int) -> Tile:
    return _nearest(BACKWARD_TILES, arch)


def _nearest(tiles: dict[int, Tile], arch: int) -> Tile:
    if arch == 0:
        return INTERPRETER_TILE
    known = [a for a in tiles if a <= arch]
    if not known:
        raise RuntimeError(f"the Triton log-mel needs compute capability 8.0 or later, this GPU has {arch / 10}")
    return tiles[max(known)]


def _device_index(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _on(index: int | None) -> contextlib.AbstractContextManager[object]:
    """The device's context, which costs a few microseconds, unless it is the current one."""
    if index is None or index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(index)


def log_mel_triton(
    waveform: Tensor,  # [B, T] int16, or floating point in [-1, 1]
    lengths: Tensor | None,  # [B] int64
    spec: LogMelSpec,  # without dither
    offsets: Tensor | None = None,  # [B] int64
    time_masks: Tensor | None = None,  # [B, n, 2] int64
    mel_masks: Tensor | None = None,  # [B, n, 2] int64
) -> tuple[Tensor, Tensor]:
    """`fastclap.kernels.logmel.log_mel` for arguments that it has checked: (features, frame lengths), no gradient."""
    masks = tuple(None if x is None else x.contiguous() for x in (time_masks, mel_masks))
    return _launch(_readable(waveform), lengths, spec, offsets, masks, energy=False)


def _launch(
    waveform: Tensor,
    lengths: Tensor | None,
    spec: LogMelSpec,
    offsets: Tensor | None,
    masks: tuple[Tensor | None, ...],
    energy: bool,
) -> tuple[Tensor, Tensor]:
    """Features and frame lengths; `energy`: mel energies [B, frames, n_mels] float32, 0 past a clip's end."""
    device = waveform.device
    index = _device_index(device)
    tile = tile_for(_arch(index))
    plan = _plan(spec, device, tile)
    batch, samples = waveform.shape
    frames = spec.num_frames or spec.frames(samples)
    tiles = triton.cdiv(frames, tile.frames)
    # A large batch fills the GPU by its tiles; a small one takes a program for each group of mels.
    programs = plan.groups if batch * tiles < ENOUGH_PROGRAMS else 1
    ranged = spec.dynamic_range is not None and not energy
    dtype = torch.float32 if energy else getattr(torch, spec.dtype)
    features = torch.empty(batch, frames, spec.n_mels, dtype=dtype, device=device)
    log_mels = torch.empty_like(features, dtype=torch.float32) if ranged else features
    tops = torch.empty((batch, programs, tiles) if ranged else (1,), device=device)
    frame_lengths = torch.empty(batch, dtype=torch.int64, device=device)
    spans = tuple(0 if x is None else x.shape[1] for x in masks)
    masks = tuple(frame_lengths if x is None else x for x in masks)
    hidden = any(spans)
    flags = {**plan.flags, "RANGE": ranged, "ENERGY": energy, "MASKS": hidden and not ranged}
    with _on(index):
        _log_mel_kernel[(batch * tiles, programs)](
            waveform, frame_lengths if offsets is None else offsets, frame_lengths if lengths is None else lengths,
            plan.taps, plan.dft, plan.bank, plan.blocks, plan.firsts, plan.affine, *masks, log_mels, tops,
            frame_lengths,
            samples, waveform.stride(0), tiles, frames, *plan.numbers[:-2], *spans, *plan.numbers[-2:],
            _input_scale(waveform, spec), spec.floor, LN_FACTOR[spec.log], spec.log_padding,
            OFFSETS=offsets is not None, LENGTHS=lengths is not None,
            num_warps=tile.warps, num_stages=tile.stages, **flags,
        )  # fmt: skip
        if ranged:
            size = frames * spec.n_mels
            _range_kernel[(batch * triton.cdiv(size, 1024),)](
                log_mels, tops, plan.affine, *masks, features, size, spec.n_mels, programs * tiles, *spans,
                spec.dynamic_range, spec.log_padding, MASKS=hidden, WIDTH=1024, TOPS=64,
            )  # fmt: skip
    return features, frame_lengths


def log_mel_gradient(
    gradient: Tensor,  # [B, frames, n_mels], of the features
    waveform: Tensor,  # and what else `log_mel_triton` was given
    lengths: Tensor | None,
    spec: LogMelSpec,
    offsets: Tensor | None = None,
    time_masks: Tensor | None = None,
    mel_masks: Tensor | None = None,
) -> Tensor:
    """Gradient of the waveform [B, T], in its dtype; from the recomputed mel energies on, a few clips at a time.

    What lies between energies and features is differentiated by torch: floor, dynamic range and masks keep autograd's
    rules.
    """
    readable = _readable(waveform)
    index = _device_index(waveform.device)
    tile = backward_tile_for(_arch(index))
    plan = _plan(spec, waveform.device, tile)
    batch, samples = waveform.shape
    frames = gradient.shape[1]
    result = torch.empty(batch, samples, dtype=readable.dtype, device=waveform.device)
    few = max(1, GRADIENT_CHUNK // (4 * frames * spec.win_length))
    tiles = triton.cdiv(frames, tile.frames)
    flags = {name: plan.flags[name] for name in FRAME_FLAGS}
    flags |= {"OFFSETS": offsets is not None, "LENGTHS": lengths is not None}
    products = {name: plan.flags[name] for name in PRODUCT_FLAGS}
    win, hop, shift, *_ = plan.numbers
    for first in range(0, batch, few):
        some = slice(first, first + few)
        clips = readable[some]
        edges = tuple(None if x is None else x[some] for x in (offsets, lengths))
        time, mel = (None if x is None else x[some].contiguous() for x in (time_masks, mel_masks))
        energies, frame_lengths = _launch(clips, edges[1], spec, edges[0], (None, None), energy=True)
        with recorded():
            energies.requires_grad_()
            features = masked(finished(energies, frame_lengths, spec), time, mel, spec).to(gradient.dtype)
            (d_energy,) = torch.autograd.grad(features, energies, gradient[some])
        # Zeros: the window's own are not written.
        d_frames = torch.zeros(len(clips), frames, spec.win_length, device=waveform.device)
        d_sums = torch.zeros(len(clips), frames, device=waveform.device)
        given = tuple(frame_lengths if x is None else x for x in edges)
        with _on(index):
            _frame_gradients_kernel[(len(clips) * tiles,)](
                clips, *given, plan.taps, plan.dft, plan.bank, plan.blocks, plan.firsts, d_energy.contiguous(),
                d_frames, d_sums, samples, clips.stride(0), tiles, frames, *plan.numbers, _input_scale(clips, spec),
                num_warps=tile.warps, num_stages=tile.stages, **flags, **products,
            )  # fmt: skip
            _samples_gradients_kernel[(len(clips) * triton.cdiv(samples, 256),)](
                d_frames, d_sums, *given, result[some], samples, frames, win, hop, shift, *plan.numbers[9:12],
                triton.cdiv(spec.win_length, spec.hop_length), spec.preemphasis, WIDTH=256, **flags,
            )  # fmt: skip
    return result.to(waveform.dtype)


def _readable(waveform: Tensor) -> Tensor:
    """The waveform in a dtype and layout that the kernels read."""
    if waveform.dtype not in DTYPES:
        waveform = waveform.to(torch.float32)
    return waveform if waveform.stride(1) == 1 else waveform.contiguous()


def _input_scale(waveform: Tensor, spec: LogMelSpec) -> float:
    return spec.input_scale / 32768.0 if waveform.dtype == torch.int16 else spec.input_scale


# ---------------------------------------------------------------------------------------------------------------------
# What the launcher may ask Triton to compile
# ---------------------------------------------------------------------------------------------------------------------

TYPES = {torch.int16: "i16", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_WHISPER = LogMelSpec(16000, 400, 400, 160, 80, mel_scale="slaney", dynamic_range=8.0)
_KALDI = LogMelSpec(
    16000, 512, 400, 160, 80, window="povey", framing="snip_edges", remove_dc=True, preemphasis=0.97,
    mel_scale="kaldi", f_min=20.0,
)  # fmt: skip
# The forms of the kernel that the family of CLAP takes; overrides of a front-end may lead to more.
FORMS = {
    "whisper": _WHISPER,
    "whisper 128": dataclasses.replace(_WHISPER, n_mels=128),
    "kaldi": _KALDI,
    "kaldi 128": dataclasses.replace(_KALDI, n_mels=128),
    "kaldi unsnipped 80": dataclasses.replace(_KALDI, framing="no_snip_edges"),
    "kaldi unsnipped 128": dataclasses.replace(_KALDI, framing="no_snip_edges", n_mels=128),
    "clap": LogMelSpec(48000, 1024, 1024, 480, 64, f_min=50.0, f_max=14000.0),
    "torchaudio": LogMelSpec(16000, 400, 400, 200, 128),
    "torchaudio 2048": LogMelSpec(44100, 2048, 2048, 512, 128),
}


def compilations(arch: int) -> Iterator[Compilation]:
    """The forms of every preset with each dtype of a waveform, and with lengths; features in 16 bits for int16."""
    for name, spec in FORMS.items():
        tile = tile_for(arch)
        flags = {**_flags(spec, tile), "ENERGY": False}
        for dtype, offsets, lengths, masks, out in (
            (torch.float32, False, False, False, "fp32"),
            (torch.float32, False, True, False, "fp32"),
            (torch.int16, False, True, False, "fp32"),
            (torch.int16, False, True, False, "bf16"),
            (torch.int16, True, True, True, "bf16"),
            (torch.float16, False, True, False, "fp16"),
            (torch.bfloat16, False, True, False, "bf16"),
        ):
            if flags["RANGE"] and (masks or out != "fp32"):
                continue  # that is the second kernel's
            label = f"log-mel {name} {TYPES[dtype]} to {out}{' lengths' * lengths}{' offsets masks' * masks}"
            constants = {**flags, "OFFSETS": offsets, "LENGTHS": lengths, "MASKS": masks}
            types = {"waveform": f"*{TYPES[dtype]}", "out": f"*{out}"}
            yield _compilation(label, _log_mel_kernel, types, constants, tile.warps, tile.stages)
        for dtype in (torch.float32, torch.bfloat16):
            types = {"waveform": f"*{TYPES[dtype]}", "out": "*fp32"}
            given = {"OFFSETS": False, "LENGTHS": True}
            constants = {**flags, **given, "MASKS": False, "RANGE": False, "ENERGY": True}
            label = f"{name} {TYPES[dtype]}"
            yield _compilation(f"mel energy {label}", _log_mel_kernel, types, constants, tile.warps, tile.stages)
            back = backward_tile_for(arch)
            names = (*FRAME_FLAGS, *PRODUCT_FLAGS)
            constants = {**given, **{flag: value for flag, value in _flags(spec, back).items() if flag in names}}
            yield _compilation(
                f"frame gradients {label}", _frame_gradients_kernel, types, constants, back.warps, back.stages
            )
            constants = {**given, **{flag: flags[flag] for flag in FRAME_FLAGS}, "WIDTH": 256}
            types = {"out": f"*{TYPES[dtype]}"}
            yield _compilation(f"sample gradients {label}", _samples_gradients_kernel, types, constants, 4, 3)
    for out in ("fp32", "fp16", "bf16"):
        for masks in (False, True):
            constants = {"MASKS": masks, "WIDTH": 1024, "TOPS": 64}
            label = f"range to {out}{' masks' * masks}"
            yield _compilation(label, _range_kernel, {"out": f"*{out}"}, constants, 4, 3)


def _compilation(
    name: str, function: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int
) -> Compilation:
    numbers = ["preemphasis", "rest", "input_scale", "floor", "log_factor", "padding", "dynamic_range"]
    types = {
        **dict.fromkeys(numbers, "fp32"),
        **dict.fromkeys(("offsets", "lengths", "frame_lengths", "time_masks", "mel_masks"), "*i64"),
        **dict.fromkeys(("blocks", "firsts"), "*i32"),
        "dft": "*fp16",
        **types,
    }
    signature = {}
    for parameter in function.params:
        if parameter.is_constexpr:
            kind = "constexpr"
        elif parameter.name in types:
            kind = types[parameter.name]
        else:
            kind = "i32" if parameter.do_not_specialize else "*fp32"
        signature[parameter.name] = kind
    attrs: dict[tuple[int, ...], Any] = {
        (index,): [["tt.divisibility", 16]]
        for index, parameter in enumerate(function.params)
        if signature[parameter.name].startswith("*") and not parameter.do_not_specialize_on_alignment
    }
    return Compilation(name, function, signature, constants, attrs, warps, stages, "BN" in constants)
