"""Triton kernels of the log-mel features; `fastclap.kernels.log_mel.triton_engine` launches them."""

# Triton joins tuples with + only, and its values have types that mypy cannot follow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import math

import triton
import triton.language as tl

from fastclap.kernels.triton_tools import jit_for_any_size


@triton.jit
def reflected_samples(clip, start, n, mask, length, turns, EDGES: tl.constexpr):
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
def reflections(inside, length, win, shift):
    """Reflections that bring every sample of a frame into its clip; a clip of one sample needs but a clamp."""
    return tl.where(inside | (length < 2), 0, (2 * win + tl.abs(shift)) // tl.maximum(length - 1, 1) + 1)


@triton.jit
def _add_transformed(at, x, total, LANES: tl.constexpr, COLS: tl.constexpr):
    """total + matrix·x in fp16x3, x [LANES, N].

    The parts of a sample lie side by side; so do, at `at`, a number of the matrix and a zero, and after those what
    float16 cut off the number and the number again. The small products come first: they meet no large sum.
    """
    coarse = x.to(tl.float16)
    fine = (x - coarse.to(tl.float32)).to(tl.float16)
    both = tl.reshape(tl.permute(tl.join(coarse, fine), (0, 2, 1)), (2 * LANES, x.shape[1]))
    total = tl.dot(tl.load(at + 2 * COLS * LANES), both, total)
    return tl.dot(tl.load(at), both, total)


@triton.constexpr_function
def _cosine(k, n):
    return math.cos(2 * math.pi * k / n)


@triton.jit
def _real_fft(x):
    """DFT of N real tensors: the real parts of bins 0 … N/2, then the imaginary parts of bins 1 … N/2 - 1."""
    N: tl.constexpr = len(x)
    if N == 2:
        return x[0] + x[1], x[0] - x[1]
    else:
        QUARTER: tl.constexpr = N // 4
        even = _real_fft(x[0::2])
        odd = _real_fft(x[1::2])
        re_low = (even[0] + odd[0],)
        re_high = (even[0] - odd[0],)
        im_low = ()
        im_high = ()
        for k in tl.static_range(1, QUARTER):
            cos = _cosine(k, N)
            sin = _cosine(N // 4 - k, N)
            re = even[k]
            im = even[QUARTER + k]
            re_odd = odd[k]
            im_odd = odd[QUARTER + k]
            re_low = re_low + (re + cos * re_odd + sin * im_odd,)
            im_low = im_low + (im + cos * im_odd - sin * re_odd,)
            re_high = (re - cos * re_odd - sin * im_odd,) + re_high
            im_high = (cos * im_odd - sin * re_odd - im,) + im_high
        return re_low + (even[QUARTER],) + re_high + im_low + (-odd[QUARTER],) + im_high


@triton.jit
def _complex_fft(re, im):
    """DFT of N complex tensors: the real parts of its bins, then their imaginary parts."""
    N: tl.constexpr = len(re)
    if N == 1:
        return re[0], im[0]
    else:
        HALF: tl.constexpr = N // 2
        even = _complex_fft(re[0::2], im[0::2])
        odd = _complex_fft(re[1::2], im[1::2])
        re_low = ()
        im_low = ()
        re_high = ()
        im_high = ()
        for k in tl.static_range(HALF):
            if k == 0:
                x = odd[0]
                y = odd[HALF]
            elif 4 * k == N:
                x = odd[HALF + k]
                y = -odd[k]
            else:
                cos = _cosine(k, N)
                sin = _cosine(4 * k - N, 4 * N)
                x = cos * odd[k] + sin * odd[HALF + k]
                y = cos * odd[HALF + k] - sin * odd[k]
            re_low = re_low + (even[k] + x,)
            im_low = im_low + (even[HALF + k] + y,)
            re_high = re_high + (even[k] - x,)
            im_high = im_high + (even[HALF + k] - y,)
        return re_low + re_high + im_low + im_high


@triton.jit
def _odd_fft(x):
    """Bins 1/2, 3/2, …, N/2 - 1/2 of N real tensors: the real parts, then the imaginary ones.

    x[n] - i·x[n + N/2], shifted by half a bin, has every other of these bins; the rest are their mirror images.
    """
    HALF: tl.constexpr = len(x) // 2
    re = ()
    im = ()
    for n in tl.static_range(HALF):
        cos = _cosine(n, 4 * HALF)
        sin = _cosine(n - HALF, 4 * HALF)
        re = re + (cos * x[n] - sin * x[HALF + n],)
        im = im + (-sin * x[n] - cos * x[HALF + n],)
    bins = _complex_fft(re, im)
    re = ()
    im = ()
    for j in tl.static_range(HALF // 2):
        re = re + (bins[j], bins[HALF - 1 - j])
        im = im + (bins[HALF + j], -bins[2 * HALF - 1 - j])
    return re + im


@triton.jit
def _slices(at, n, known, FIRST: tl.constexpr, COUNT: tl.constexpr, N2: tl.constexpr, WIN: tl.constexpr):
    """Samples n + i·N2 of the frames at `at`, i from FIRST on, float32."""
    slices = ()
    at += n
    for i in tl.static_range(FIRST, FIRST + COUNT):
        mask = known
        if i == 0:
            mask = mask & (n >= 0)
        if (i + 1) * N2 > WIN:
            mask = mask & (n + i * N2 < WIN)
        slices = slices + (tl.load(at + i * N2, mask=mask, other=0.0).to(tl.float32),)
    return slices


@triton.jit
def _windowed(
    at, n, lane, average, rest, taps, FIRST: tl.constexpr, NUMBER: tl.constexpr,
    DC: tl.constexpr, PREEMPHASIS: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    WIN: tl.constexpr, LANES: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """NUMBER slices from FIRST on, less the mean, with pre-emphasis, windowed: sums of samples n2 and N2 - 1 - n2.

    Then their differences, and the largest absolute value before the window. The mean is that of these slices if they
    are all there are, else `average`.
    """
    PAIRS: tl.constexpr = (N2 + 1) // 2
    LEFT: tl.constexpr = (WIN + N2 - 1) // N2 - FIRST  # the slices after those are zero
    COUNT: tl.constexpr = max(min(NUMBER, LEFT), 0)
    sums = ()
    differences = ()
    peak = tl.zeros((LANES, BM), tl.float32)
    if COUNT > 0:
        known = n < PAIRS
        # These descend, but lie as close together: told that they are contiguous, the compiler takes the same layout.
        # It loads one at a time all the same, since nothing is known of the alignment of what they are offsets to.
        back = tl.max_contiguous(N2 - 1 - n, (LANES, 1))
        x = _slices(at, n, known, FIRST, COUNT, N2, WIN) + _slices(at, back, known, FIRST, COUNT, N2, WIN)
        if PREEMPHASIS:
            x = x + _slices(at, n - 1, known, FIRST, COUNT, N2, WIN)
            x = x + _slices(at, back - 1, known, FIRST, COUNT, N2, WIN)
        if DC and NUMBER == N1 and LANES >= PAIRS:
            total = x[0] + x[COUNT]
            for i in tl.static_range(1, COUNT):
                total += x[i] + x[COUNT + i]
            if N2 % 2:
                total = tl.where(n == PAIRS - 1, 0.5 * total, total)  # its own mirror image
            average = (tl.sum(total, 0) / WIN)[None, :]
        for i in tl.static_range(COUNT):
            after = x[i]
            before = x[COUNT + i]
            if PREEMPHASIS:
                # x - c·y as (x - y) + (1 - c)·y: the difference of neighbours is nearly exact, a product is not.
                after -= x[2 * COUNT + i]
                before -= x[3 * COUNT + i]
                if DC:
                    after += rest * (x[2 * COUNT + i] - average)
                    before += rest * (x[3 * COUNT + i] - average)
                else:
                    after += rest * x[2 * COUNT + i]
                    before += rest * x[3 * COUNT + i]
            elif DC:
                after -= average
                before -= average
            peak = tl.maximum(peak, tl.maximum(tl.abs(after), tl.abs(before)))
            after *= tl.load(taps + (FIRST + i) * LANES + lane)
            tap = tl.load(taps + (N1 + FIRST + i) * LANES + lane)
            sums = sums + (tl.fma(before, tap, after),)
            differences = differences + (tl.fma(before, -tap, after),)
    for _ in tl.static_range(NUMBER - COUNT):
        sums = sums + (tl.zeros((LANES, BM), tl.float32),)
        differences = differences + (tl.zeros((LANES, BM), tl.float32),)
    return sums + differences + (peak,)


@triton.jit
def _first_stage(
    at, n, lane, average, rest, taps, ODD: tl.constexpr,
    DC: tl.constexpr, PREEMPHASIS: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    WIN: tl.constexpr, LANES: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """DFTs over n1 of the sums, then of the differences, of samples n2 and N2 - 1 - n2; then the samples' peak.

    N1 = 32 takes two turns, which keep within the registers: the even rows k1, then, ODD, the odd ones.
    """
    if N1 < 32:
        x = _windowed(
            at, n, lane, average, rest, taps, 0, N1,
            DC, PREEMPHASIS, N1, N2, WIN, LANES, BM,
        )  # fmt: skip
        return _real_fft(x[:N1]) + _real_fft(x[N1 : 2 * N1]) + (x[2 * N1],)
    else:
        sums = ()
        differences = ()
        peak = tl.zeros((LANES, BM), tl.float32)
        for first in tl.static_range(0, 16, 8):
            x = _windowed(
                at, n, lane, average, rest, taps, first, 8,
                DC, PREEMPHASIS, N1, N2, WIN, LANES, BM,
            )  # fmt: skip
            y = _windowed(
                at, n, lane, average, rest, taps, 16 + first, 8,
                DC, PREEMPHASIS, N1, N2, WIN, LANES, BM,
            )  # fmt: skip
            peak = tl.maximum(peak, tl.maximum(x[16], y[16]))
            for i in tl.static_range(8):
                if ODD:
                    sums = sums + (x[i] - y[i],)
                    differences = differences + (x[8 + i] - y[8 + i],)
                else:
                    sums = sums + (x[i] + y[i],)
                    differences = differences + (x[8 + i] + y[8 + i],)
        if ODD:
            return _odd_fft(sums) + _odd_fft(differences) + (peak,)
        else:
            return _real_fft(sums) + _real_fft(differences) + (peak,)


@triton.jit
def _frame_means(at, WIN: tl.constexpr, BM: tl.constexpr):
    """Means [1, BM] of the WIN samples from `at` on."""
    total = tl.zeros((16, BM), tl.float32)
    for k in tl.range(0, WIN, 16):
        n = k + tl.arange(0, 16)[:, None]
        total += tl.load(at + n, mask=n < WIN, other=0.0).to(tl.float32)
    return (tl.sum(total, 0) / WIN)[None, :]


@triton.jit
def _peak_exponent(peak, target):
    """Biased exponent of the power of two that takes these samples into float16's range."""
    peak = tl.max(peak, 0)
    peak = tl.max(tl.where(peak < float("inf"), peak, 0.0), 0)  # a bad frame is not finite anyway
    exponent = target - (peak.to(tl.int32, bitcast=True) >> 23)
    return tl.minimum(tl.maximum(exponent, 1), 227)  # both the scale and its inverse are normal


@triton.jit
def _stacked(x):
    """Tensors of one shape as one, with a new last axis for each bit of their number, the lowest bit last."""
    if len(x) == 1:
        return x[0]
    else:
        return tl.join(_stacked(x[0::2]), _stacked(x[1::2]))


@triton.jit
def _unstacked(x):
    """The tensors that `_stacked` put together from matrices."""
    if len(x.shape) == 2:
        return (x,)
    else:
        first, second = tl.split(x)
        first = _unstacked(first)
        second = _unstacked(second)
        both = ()
        for i in tl.static_range(len(first)):
            both = both + (first[i], second[i])
        return both


@triton.jit
def _side_by_side(x, LANES: tl.constexpr, BM: tl.constexpr):
    """Matrices [LANES, BM] as one of [LANES, their number·BM]."""
    stacked = tl.reshape(_stacked(x), (LANES, BM, len(x)))
    return tl.reshape(tl.permute(stacked, (0, 2, 1)), (LANES, len(x) * BM))


@triton.jit
def _split_matrices(x, NUMBER: tl.constexpr, COLS: tl.constexpr, BM: tl.constexpr):
    """The NUMBER matrices [COLS, BM] that stand side by side."""
    x = tl.permute(tl.reshape(x, (COLS, NUMBER, BM)), (0, 2, 1))
    if NUMBER == 2:
        return _unstacked(tl.reshape(x, (COLS, BM, 2)))
    elif NUMBER == 4:
        return _unstacked(tl.reshape(x, (COLS, BM, 2, 2)))
    elif NUMBER == 8:
        return _unstacked(tl.reshape(x, (COLS, BM, 2, 2, 2)))
    else:
        return _unstacked(tl.reshape(x, (COLS, BM, 2, 2, 2, 2)))


@triton.jit
def _second_stage(
    rows, scale, twiddles, lane, dft, sums, ODD: tl.constexpr, STEP: tl.constexpr,
    LANES: tl.constexpr, COLS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Adds what these lanes, scaled, bring to the `sums`: products with cosine and sine of every STEP-th row, and N1/2.

    Of the rows, the real parts stand at their number, the imaginary ones HALF after it; row 0, which has none, and row
    N1/2 at HALF come with the even ones.
    """
    N: tl.constexpr = len(rows) // 2  # rows[:N] came from sums, the others from differences
    HALF: tl.constexpr = N // 2
    cosines = ()
    sines = ()
    for imaginary in tl.static_range(2):
        for k in tl.static_range(HALF):
            if k == 0 and not ODD:
                cosines = cosines + (rows[0] * scale,)
                sines = sines + (rows[N] * scale,)
            else:
                at = twiddles + (STEP * k + ODD - 1) * (2 * LANES) + lane
                cos = tl.load(at) * scale
                sin = tl.load(at + LANES) * scale
                if imaginary:
                    cosines = cosines + (rows[HALF + k] * cos + rows[N + k] * sin,)
                    sines = sines + (rows[N + HALF + k] * cos + rows[k] * sin,)
                else:
                    cosines = cosines + (rows[k] * cos - rows[N + HALF + k] * sin,)
                    sines = sines + (rows[N + k] * cos - rows[HALF + k] * sin,)
    at = dft + tl.arange(0, COLS)[:, None] * (2 * LANES) + tl.arange(0, 2 * LANES)[None, :]
    PLANES: tl.constexpr = 4 * COLS * LANES
    cosines = _add_transformed(at, _side_by_side(cosines, LANES, BM), sums[0], LANES, COLS)
    sines = _add_transformed(at + PLANES, _side_by_side(sines, LANES, BM), sums[1], LANES, COLS)
    if ODD:
        return cosines, sines
    else:
        cosine = _add_transformed(at + 2 * PLANES, rows[HALF] * scale, sums[2], LANES, COLS)
        return cosines, sines, cosine, _add_transformed(at + 3 * PLANES, rows[N + HALF] * scale, sums[3], LANES, COLS)


@triton.jit
def _powers(sums, paired, ODD: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr, BM: tl.constexpr):
    """Powers of bins N1·k2 + r with r ascending, tensors [COLS, BM] of k2: of the rows k1 = r and k1 = -r.

    `paired` is 0 where the columns of cosine and sine belong to two bins, which is so at k2 = 0 of an even N2.
    """
    HALF: tl.constexpr = N // 2
    cosines = _split_matrices(sums[0], N, COLS, BM)
    sines = _split_matrices(sums[1], N, COLS, BM)
    below = ()
    above = ()
    for k in tl.static_range(HALF):
        if k == 0 and not ODD:
            above = above + (cosines[0] * cosines[0] + sines[0] * sines[0],)
        else:
            re = cosines[k] + paired * sines[HALF + k]
            im = cosines[HALF + k] - paired * sines[k]
            above = above + (re * re + im * im,)
            re = paired * cosines[k] - sines[HALF + k]
            im = paired * cosines[HALF + k] + sines[k]
            below = (re * re + im * im,) + below
    if not ODD:
        above = above + (sums[2] * sums[2] + sums[3] * sums[3],)
    return below + above


@triton.jit
def _zero_sums(ODD: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr, BM: tl.constexpr):
    """What `_second_stage` begins with."""
    both = (tl.zeros((COLS, N * BM), tl.float32), tl.zeros((COLS, N * BM), tl.float32))
    if ODD:
        return both
    else:
        return both + (tl.zeros((COLS, BM), tl.float32), tl.zeros((COLS, BM), tl.float32))


@triton.jit
def _store_energies(powers, weights, ends, column, parts, POWER: tl.constexpr, BM: tl.constexpr, COLS: tl.constexpr):
    """Weighted sums of powers over the bins of every mel, to `parts` [parts, BM].

    Mels of one parity do not overlap, so that each is one run of bins, and a sum for the even and one for the odd ones
    do. A mel that goes on in the next column leaves a part in each.
    """
    even = tl.zeros((COLS, BM), tl.float32)
    odd = tl.zeros((COLS, BM), tl.float32)
    SLOTS: tl.constexpr = min(len(powers), 4)  # stored at a time
    number = tl.arange(0, 2 * SLOTS)[:, None, None]
    for first in tl.static_range(0, len(powers), SLOTS):
        sums = ()
        for i in tl.static_range(first, first + SLOTS):
            x = powers[i]
            if not POWER:
                x = tl.sqrt(x)
            weight = tl.load(weights + 2 * i * COLS + column)
            even = tl.where(weight < 0, 0.0, even) + x * tl.abs(weight)
            weight = tl.load(weights + (2 * i + 1) * COLS + column)
            odd = tl.where(weight < 0, 0.0, odd) + x * tl.abs(weight)
            sums = sums + (even, odd)
        stacked = tl.permute(tl.reshape(_stacked(sums), (COLS, BM, 2 * SLOTS)), (2, 0, 1))
        end = tl.load(ends + (2 * first + number) * COLS + tl.arange(0, COLS)[None, :, None])
        tl.store(parts + end * BM + tl.arange(0, BM)[None, None, :], stacked, mask=end >= 0)


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
    return tl.where(x < float("inf"), y, x)  # or NaN


@triton.jit
def clip_bounds(
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
def tile_exponent(clip, begin, end, length, win, target):
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


@jit_for_any_size(
    "work samples row_stride tiles frames hop shift mels count_add count_plus most_frames "
    "time_spans mel_spans rest target input_scale floor log_high log_low padding",
    "waveform offsets lengths edges frame_lengths time_masks mel_masks",
)
def _log_mel_kernel(
    waveform, offsets, lengths,  # [B, T]; [B] int64, where OFFSETS and LENGTHS
    taps, twiddles, dft, weights, ends, counts,  # tables of a `FeaturePlan`
    affine, time_masks, mel_masks,  # [2, mels]; [B, time_spans, 2], [B, mel_spans, 2] int64 where MASKS
    edges, scratch,  # [programs, BM·min(hop, WIN) + WIN], [programs, TERMS, mels, BM]
    out, tops, frame_lengths,  # [B, frames, mels], [B, tiles] where RANGE, [B] int64
    work, samples, row_stride, tiles, frames, hop, shift, mels,
    count_add, count_plus, most_frames, time_spans, mel_spans, rest, target, input_scale, floor, log_high, log_low,
    padding,
    EDGES: tl.constexpr, OFFSETS: tl.constexpr, LENGTHS: tl.constexpr, MASKS: tl.constexpr, DC: tl.constexpr,
    PREEMPHASIS: tl.constexpr, POWER: tl.constexpr, RANGE: tl.constexpr, ENERGY: tl.constexpr,
    WIN: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BM: tl.constexpr,
    LANES: tl.constexpr, DEPTH: tl.constexpr, COLS: tl.constexpr, BLOCKS: tl.constexpr,
    MELS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Log-mel (ENERGY: mel energy) of every num_programs(0)-th of the `work` tiles of BM frames of a clip."""
    stride = tl.minimum(hop, WIN)
    edges += tl.program_id(0).to(tl.int64) * (BM * stride + WIN)
    scratch += tl.program_id(0).to(tl.int64) * (TERMS * mels * BM)
    for item in tl.range(tl.program_id(0), work, tl.num_programs(0)):
        tile = item % tiles
        b = (item // tiles).to(tl.int64)
        clip, length, count = clip_bounds(
            waveform, offsets, lengths, b, samples, row_stride, hop, count_add, count_plus, most_frames,
            OFFSETS, LENGTHS,
        )  # fmt: skip
        if tile == 0:
            tl.store(frame_lengths + b, count.to(tl.int64))
        frame = tl.arange(0, BM)[None, :]
        t = tile * BM + tl.arange(0, BM)
        begin = tile * BM * hop - shift
        end = (tl.minimum(tile * BM + BM, count) - 1) * hop - shift + WIN
        inside = (begin >= 0) & (end <= length) & (tile * BM + BM <= count)
        exponent = target
        if tile * BM < count:
            # Frames at a clip's ends are read from a copy, with what the reflection puts before and after the clip.
            at = clip + begin
            step_of_frames = hop
            if not inside:
                # Back and forth, in a clip shorter than its frames.
                turns = reflections(inside, length, WIN, shift)
                for k in tl.range(0, BM * stride + WIN - stride, 1024):
                    i = k + tl.arange(0, 1024)
                    mask = i < BM * stride + WIN - stride
                    x = reflected_samples(clip, begin + i // stride * hop, i % stride, mask, length, turns, EDGES)
                    tl.store(edges + i, x.to(edges.dtype.element_ty), mask=mask)
                tl.debug_barrier()
                at = edges
                step_of_frames = stride
            at += tl.arange(0, BM)[None, :] * step_of_frames
            lane = tl.arange(0, LANES)[:, None]
            column = tl.arange(0, COLS)[:, None]
            average = tl.zeros((1, BM), tl.float32)
            scale = 1.0
            if DC and (DEPTH > 1 or N1 == 32):
                average = _frame_means(at, WIN, BM)
            if clip.dtype.element_ty == tl.int16 or DEPTH > 1:
                exponent = tile_exponent(clip, begin, end, length, WIN, target)
                scale = (exponent << 23).to(tl.float32, bitcast=True)
            N: tl.constexpr = min(N1, 16)  # rows of a turn, imaginary parts counted
            for block in tl.range(0, BLOCKS):
                paired = tl.where((column == 0) & (block == 0), 0.0, 1.0)
                for odd in tl.static_range(N1 // N):
                    if odd:
                        tl.debug_barrier()  # or the samples would be kept from the first turn, in too many registers
                    sums = _zero_sums(odd, N, COLS, BM)
                    for step in tl.range(0, DEPTH):
                        rows = ()
                        for _ in tl.static_range(2 * N + 1):
                            rows = rows + (tl.zeros((LANES, BM), tl.float32),)
                        # A clip with frames has samples, but as a branch this compiles in a third of the time: Triton
                        # walks from every load through all that it reaches in a region.
                        if length > 0:
                            rows = _first_stage(
                                at, step * LANES + lane, lane, average, rest, taps + step * (2 * N1 * LANES), odd,
                                DC, PREEMPHASIS, N1, N2, WIN, LANES, BM,
                            )  # fmt: skip
                        if clip.dtype.element_ty != tl.int16 and DEPTH == 1 and odd == 0:
                            exponent = _peak_exponent(rows[2 * N], target)
                            scale = (exponent << 23).to(tl.float32, bitcast=True)
                        sums = _second_stage(
                            rows, scale, twiddles + step * ((N1 - 2) * LANES), lane,
                            dft + (block * DEPTH + step) * (16 * LANES * COLS), sums, odd, N1 // N, LANES, COLS, BM,
                        )  # fmt: skip
                    offset = (block * (N1 // N) + odd) * (2 * N * COLS)
                    _store_energies(
                        _powers(sums, paired, odd, N, COLS, BM),
                        weights + offset, ends + offset, column, scratch, POWER, BM, COLS,
                    )  # fmt: skip
        tl.debug_barrier()
        factor = input_scale * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        if POWER:
            factor *= factor
        top = tl.full((BM,), float("-inf"), tl.float32)
        for group in tl.range(0, mels, MELS):
            mel = group + tl.arange(0, MELS)
            # Where there is nothing, neither in the mel nor in the clip, no part is read.
            known = tl.load(counts + mel, mask=mel < mels, other=0)[:, None]
            energy = tl.zeros((MELS, BM), tl.float32)
            at = scratch + mel[:, None] * BM + frame
            if TERMS <= 4:
                for term in tl.static_range(TERMS):
                    mask = (term < known) & (t < count)[None, :]
                    energy += tl.load(at + term * (mels * BM), mask=mask, other=0.0)
            else:
                for term in tl.range(0, TERMS):
                    mask = (term < known) & (t < count)[None, :]
                    energy += tl.load(at + term * (mels * BM), mask=mask, other=0.0)
            x = tl.trans(energy) * factor
            if not ENERGY:
                x = _logarithm(tl.where(x < floor, floor, x), log_high, log_low)  # a NaN stays
                x = tl.where((t < count)[:, None], x, padding)
            kept = (t < frames)[:, None] & (mel < mels)[None, :]
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
            features = out + (b * frames + t[:, None]) * mels + mel[None, :]
            tl.store(features, x.to(out.dtype.element_ty), mask=kept)
        if RANGE:
            tl.store(tops + b * tiles + tile, tl.max(top, 0))
        tl.debug_barrier()  # the next tile writes where this one has read


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
