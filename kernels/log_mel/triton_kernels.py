"""Triton kernels of the log-mel features; `fastclap.kernels.log_mel.triton_engine` launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from fastclap.kernels.triton_tools import jit_for_any_size


@triton.jit
def _samples(clip, at, mask, length, EDGES: tl.constexpr):
    """Samples at positions that may lie outside of the clip, float32: of its reflection, or zeros."""
    if EDGES == 0:
        mask = mask & (at >= 0) & (at < length)
    else:
        REPEAT: tl.constexpr = 1 if EDGES == 2 else 0  # whether the end sample is
        period = tl.maximum(2 * length - 2 * (1 - REPEAT), 1)
        at = at % period  # C's: of the sign of `at`
        at = tl.where(at < 0, at + period, at)
        at = tl.maximum(tl.minimum(at, period - REPEAT - at), 0)
    return tl.load(clip + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _clip_bounds(
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


@jit_for_any_size(
    "first tiles samples row_stride hop shift count_add count_plus most_frames rest",
    "waveform offsets lengths frame_lengths",
)
def _frames_kernel(
    waveform, offsets, lengths, taps, out, frame_lengths,  # [B, T]; [B] int64; [WIN]; [programs·BM, N_FFT]; [B] int64
    first, tiles, samples, row_stride, hop, shift, count_add, count_plus, most_frames, rest,
    EDGES: tl.constexpr, OFFSETS: tl.constexpr, LENGTHS: tl.constexpr, DC: tl.constexpr, PREEMPHASIS: tl.constexpr,
    WIN: tl.constexpr, N_FFT: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Windowed frames of the tiles of BM frames of a clip from `first` on, `tiles` of each clip."""
    item = first + tl.program_id(0)
    tile = item % tiles
    b = (item // tiles).to(tl.int64)
    clip, length, count = _clip_bounds(
        waveform, offsets, lengths, b, samples, row_stride, hop, count_add, count_plus, most_frames, OFFSETS, LENGTHS
    )
    if tile == 0:
        tl.store(frame_lengths + b, count.to(tl.int64))
    if tile * BM < count:
        t = tile * BM + tl.arange(0, BM)[:, None]
        n = tl.arange(0, WIDTH)[None, :]
        known = (t < count) & (n < WIN)
        at = t * hop - shift + n
        x = _samples(clip, at, known, length, EDGES)
        average = tl.zeros((BM, 1), tl.float32)
        if DC:
            average = (tl.sum(x, 1) / WIN)[:, None]
        if PREEMPHASIS:
            # x - c·y as (x - y) + (1 - c)·y: the difference of neighbours is nearly exact, a product is not. The first
            # sample, which has no neighbour in its frame, is zero in all windows.
            y = _samples(clip, at - 1, known & (n > 0), length, EDGES)
            x = tl.where(n > 0, (x - y) + rest * (y - average), 0.0)
        else:
            x -= average
        x *= tl.load(taps + n, mask=n < WIN, other=0.0)
        row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
        tl.store(out + row * N_FFT + n, tl.where(n < WIN, x, 0.0), mask=n < N_FFT)


@triton.jit
def _logarithm(x, high, low):
    """ln(x)·(high + low)/ln 2, rounded about once: a float32's exponent times `high` is exact.

    ln(1 + f) for 2/3 <= 1 + f < 4/3 by a polynomial in f that is off by 2^-25 of it.
    """
    subnormal = x < 1.1754944e-38
    bits = tl.where(subnormal, x * 8388608.0, x).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    y = f * 0.143740997 - 0.153727442
    y = y * f + 0.139209241
    y = y * f - 0.164193496
    y = y * f + 0.200160593
    y = y * f - 0.250075996
    y = y * f + 0.333331048
    y = y * f - 0.499999404
    y = tl.fma(f * f, y, f) * ((high + low) * 1.4426950408889634)
    exponent = tl.where(subnormal, exponent - 23, exponent).to(tl.float32)
    y = tl.fma(exponent, high, tl.fma(exponent, low, y))
    return tl.where(x < float("inf"), y, float("nan"))


@triton.jit
def _in_spans(at, spans, count):
    """Which of the positions lie in one of the `count` spans [begin, end)."""
    hit = at < 0
    for i in tl.range(0, count):
        hit = hit | ((at >= tl.load(spans + 2 * i)) & (at < tl.load(spans + 2 * i + 1)))
    return hit


@jit_for_any_size(
    "first tiles frames mels groups time_spans mel_spans factor floor log_high log_low padding",
    "frame_lengths time_masks mel_masks",
)
def _features_kernel(
    spectra, bank, runs, affine, time_masks, mel_masks,  # [programs·BM, BINS, 2]; tables of a plan; [B, spans, 2] int64
    frame_lengths, out, tops,  # [B] int64; [B, frames, mels]; [B, tiles] where RANGE
    first, tiles, frames, mels, groups, time_spans, mel_spans, factor, floor, log_high, log_low, padding,
    BINS: tl.constexpr, POWER: tl.constexpr, RANGE: tl.constexpr, MASKS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Features of the tiles that `_frames_kernel` made the frames of; where RANGE, log-mels and each tile's largest."""
    item = first + tl.program_id(0)
    tile = item % tiles
    b = (item // tiles).to(tl.int64)
    count = tl.load(frame_lengths + b)
    t = tile * BM + tl.arange(0, BM)
    rows = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]) * BINS
    top = tl.full((BM,), float("-inf"), tl.float32)
    for group in tl.range(0, groups):
        begin = tl.load(runs + 3 * group)  # the first bin, how many, and where their weights are
        bins = tl.load(runs + 3 * group + 1)
        weights = bank + tl.load(runs + 3 * group + 2)
        mel = group * BN + tl.arange(0, BN)
        energy = tl.zeros((BM, BN), tl.float32)
        if tile * BM < count:
            for k in tl.range(0, bins, BK):
                i = k + tl.arange(0, BK)
                at = spectra + 2 * (rows + (begin + i)[None, :])
                known = (i < bins)[None, :] & (t < count)[:, None]
                real = tl.load(at, mask=known, other=0.0)
                imaginary = tl.load(at + 1, mask=known, other=0.0)
                power = real * real + imaginary * imaginary
                if not POWER:
                    power = tl.sqrt(power)
                weight = tl.load(
                    weights + i[:, None] * BN + tl.arange(0, BN)[None, :], mask=(i < bins)[:, None], other=0.0
                )
                energy = tl.dot(power, weight, energy, input_precision="ieee")
        x = energy * factor
        x = _logarithm(tl.where(x < floor, floor, x), log_high, log_low)  # a NaN stays
        x = tl.where((t < count)[:, None], x, padding)
        kept = (t < frames)[:, None] & (mel < mels)[None, :]
        if RANGE:
            # An infinity stands for NaN, which a maximum would lose.
            y = tl.where(x == x, x, float("inf"))
            top = tl.maximum(top, tl.max(tl.where(kept, y, float("-inf")), 1))
        else:
            mean = tl.load(affine + mel, mask=mel < mels, other=0.0)[None, :]
            inverse_std = tl.load(affine + mels + mel, mask=mel < mels, other=0.0)[None, :]
            x = (x - mean) * inverse_std
            if MASKS:
                hit = _in_spans(t, time_masks + b * (2 * time_spans), time_spans)[:, None]
                hit = hit | _in_spans(mel, mel_masks + b * (2 * mel_spans), mel_spans)[None, :]
                x = tl.where(hit, (padding - mean) * inverse_std, x)
        features = out + (b * frames + t[:, None]) * mels + mel[None, :]
        tl.store(features, x.to(out.dtype.element_ty), mask=kept)
    if RANGE:
        tl.store(tops + b * tiles + tile, tl.max(top, 0))


@jit_for_any_size(
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
