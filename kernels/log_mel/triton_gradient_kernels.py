"""Triton kernels of the gradient of the log-mel features; `fastclap.kernels.log_mel.triton_engine` launches them."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from fastclap.kernels.log_mel.triton_kernels import clip_bounds, reflected_samples, reflections, tile_exponent
from fastclap.kernels.triton_tools import jit_for_any_size


@triton.jit
def _means(clip, start, valid, length, turns, win, EDGES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    total = tl.zeros((BM, BK), tl.float32)
    for k in tl.range(0, win, BK):
        n = (k + tl.arange(0, BK))[None, :]
        total += reflected_samples(clip, start, n, (n < win) & valid, length, turns, EDGES)
    return tl.sum(total, 1) / win


@triton.jit
def _conditioned(
    clip, start, n, valid, length, turns, win, mean, rest,
    EDGES: tl.constexpr, DC: tl.constexpr, PREEMPHASIS: tl.constexpr,
):  # fmt: skip
    """Samples with the frame's mean removed and pre-emphasis; the window is zero where that reads nothing."""
    x = reflected_samples(clip, start, n, (n >= 0) & (n < win) & valid, length, turns, EDGES)
    if PREEMPHASIS:
        # x - c·y as (x - y) + (1 - c)·y: the difference of neighbours is nearly exact, a product with c is not.
        y = reflected_samples(clip, start, n - 1, (n >= 1) & (n < win) & valid, length, turns, EDGES)
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


@jit_for_any_size(
    "samples row_stride tiles frames win hop shift half low high depth groups mels count_add count_plus "
    "most_frames rest target input_scale",
    "waveform offsets lengths",
)
def _frame_gradients_kernel(
    waveform, offsets, lengths,  # [B, T]; [B] int64, where OFFSETS and LENGTHS
    taps, dft, bank, blocks, firsts,  # tables of a `GradientPlan`
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
    clip, length, count = clip_bounds(
        waveform, offsets, lengths, b, samples, row_stride, hop, count_add, count_plus, most_frames, OFFSETS, LENGTHS
    )
    if tile * BM >= count:
        return
    t = tile * BM + tl.arange(0, BM)
    start = (t * hop - shift)[:, None]
    begin = tile * BM * hop - shift
    end = (tl.minimum(tile * BM + BM, count) - 1) * hop - shift + win
    inside = (begin >= 0) & (end <= length) & (tile * BM + BM <= count)
    turns = reflections(inside, length, win, shift)
    valid = (t < count)[:, None]
    exponent = tile_exponent(clip, begin, end, length, win, target)
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


@jit_for_any_size(
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
    _, length, count = clip_bounds(
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
