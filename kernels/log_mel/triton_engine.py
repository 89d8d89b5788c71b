"""Triton engine of the log-mel front-ends: waveform in, features out, one launch (see `fastclap.kernels.logmel`).

Nothing but the waveform is read and nothing but the features written. A program takes tiles of frames of one clip, and
their DFT in two stages, n_fft = N1·N2 with sample n = N2·n1 + n2 and bin k = k1 + N1·k2:

* Over n1, float32 FFTs of N1 tensors [n2, frames], all in registers. Samples n2 and N2 - 1 - n2 of a slice are added
  and subtracted first. A shift of the frame changes no power, so phases are counted from the middle of a slice: cosines
  then act on what comes of the sums, sines on what comes of the differences, each at half the length.
* Over n2, after the twiddles, products with those cosines and sines on the tensor cores, the same for every k1. They
  are fp16x3: both factors are split in two float16 parts, and three of the four partial products are added in float32,
  the small ones first. A power of two brings the samples of a tile into float16's range whatever their scale.

No sum of a product is longer than 16 for the transforms that occur (at most 32 values of n2): the error is that of a
float32 FFT. The mean, the pre-emphasis and the window are applied in float32, once a frame. Lengths without a fitting
power of two take N1 = 2 to 8 and steps over n2.

A thread then has N1 neighbouring bins of a frame in registers. Mel filters of one parity do not overlap: one running
sum serves the even mels, one the odd ones, in float32, and only what stands at a filter's end goes, through a scratch
buffer of the program's own, to the thread that takes the logarithm.

Frames at a clip's ends are read from a copy of their samples with the reflection, made by the program. A dynamic range
needs the maximum of the whole clip: the launch then leaves the log-mel and the maximum of every tile to a second one.

Every value is computed by one program in a fixed order: results are bit-identical from run to run, and a clip's do not
depend on what else is in the batch.

The gradient recomputes the spectra as products alone, with frames folded twice about the window's centre, turns them to
gradients of frames by the transposed products, and lets every sample of the waveform gather those of its frames and
reflections: no atomics.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.logmel import LogMelSpec, finished, masked, mel_bank, recorded, window
from fastclap.kernels.offline import Compilation, signature_and_attrs

# Tuples of tensors grow by + in the kernels: Triton knows no starred expressions, mypy no growing tuples.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

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


# Of the forward pass: columns for bins, lanes for depth. A warp has 8 frames, a thread 4 elements of a matrix.
TILE = Tile(32, 16, 16, 4, 1)
# By arithmetic, checked by offline compilation; other architectures take the nearest lower one.
BACKWARD_TILES = {80: Tile(32, 16, 16, 8, 1), 90: Tile(128, 16, 16, 8, 1), 100: Tile(64, 16, 16, 8, 1)}
INTERPRETER_TILE = Tile(32, 64, 128, 4, 1)
PROGRAMS_OF_SM = 2  # of the forward pass, which takes all of the registers
GRADIENT_CHUNK = 256 << 20  # bytes of frames' gradients held at a time


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
def _apart(x, NUMBER: tl.constexpr, COLS: tl.constexpr, BM: tl.constexpr):
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
    cosines = _apart(sums[0], N, COLS, BM)
    sines = _apart(sums[1], N, COLS, BM)
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
def _zeros(ODD: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr, BM: tl.constexpr):
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
    "work samples row_stride tiles frames hop shift mels count_add count_plus most_frames "
    "time_spans mel_spans rest target input_scale floor log_high log_low padding",
    "waveform offsets lengths edges frame_lengths time_masks mel_masks",
)
def _log_mel_kernel(
    waveform, offsets, lengths,  # [B, T]; [B] int64, where OFFSETS and LENGTHS
    taps, twiddles, dft, weights, ends, counts,  # tables of a `Plan`
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
        clip, length, count = _clip(
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
            # Frames at a clip's ends are read from a copy, with what the reflection puts beside the clip.
            at = clip + begin
            step_of_frames = hop
            if not inside:
                # Back and forth, in a clip shorter than its frames.
                turns = _turns(inside, length, WIN, shift)
                for k in tl.range(0, BM * stride + WIN - stride, 1024):
                    i = k + tl.arange(0, 1024)
                    mask = i < BM * stride + WIN - stride
                    x = _samples(clip, begin + i // stride * hop, i % stride, mask, length, turns, EDGES)
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
                exponent = _exponent(clip, begin, end, length, WIN, target)
                scale = (exponent << 23).to(tl.float32, bitcast=True)
            N: tl.constexpr = min(N1, 16)  # rows of a turn, imaginary parts counted
            for block in tl.range(0, BLOCKS):
                paired = tl.where((column == 0) & (block == 0), 0.0, 1.0)
                for odd in tl.static_range(N1 // N):
                    if odd:
                        tl.debug_barrier()  # or the samples would be kept from the first turn, in too many registers
                    sums = _zeros(odd, N, COLS, BM)
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

    taps: Tensor  # [DEPTH, 2, N1, LANES] window of samples n2 and N2 - 1 - n2 of every slice
    twiddles: Tensor  # [DEPTH, N1/2 - 1, 2, LANES] cosine, sine of rows k1 = 1 … N1/2 - 1
    dft: Tensor  # [BLOCKS, DEPTH, 4, 2, COLS, LANES, 2] float16: cosine, sine, of row N1/2 both, for `_add_transformed`
    weights: Tensor  # [BLOCKS, turns, rows, 2, COLS] of the even, the odd mel; negative where a mel's run begins
    ends: Tensor  # int32, alike: the part of a mel that a sum is here, term·n_mels + mel, or -1
    counts: Tensor  # [n_mels] int32: parts of each mel
    affine: Tensor  # [2, mels]: mean, 1/std
    numbers: tuple[float, ...]  # hop … target, but for what depends on the call
    flags: dict[str, Any]


def _factors(n_fft: int) -> tuple[int, int]:
    """(N1, N2), n_fft = N1·N2: N1 the smallest power of two, up to 32, that leaves N2 at most 32.

    Where there is none, steps over the lanes keep sums in registers, which leaves room for N1 = 8.
    """
    sizes = [n1 for n1 in (2, 4, 8, 16, 32) if n_fft % n1 == 0]
    n1 = next((n1 for n1 in sizes if n_fft // n1 <= 32), max(n1 for n1 in sizes if n1 <= 8))
    return n1, n_fft // n1


def _slots(spec: LogMelSpec) -> np.ndarray:
    """[turns, columns, rows]: the bin of every turn (even k1, odd k1), column k2 and row r, ascending; -1 for none."""
    n1, n2 = _factors(spec.n_fft)
    rows = np.arange(1 - n1 // 2, n1 // 2 + 1)
    turns = rows[None] if n1 < 32 else np.stack((rows[1::2], rows[::2]))
    bins = (n1 * np.arange((n2 + 1) // 2)[:, None, None] + turns).transpose(1, 0, 2)
    if n2 % 2 == 0:
        bins[:, 0] = np.where(bins[:, 0] < 0, bins[:, 0] + spec.n_fft // 2, bins[:, 0])
    return np.where((bins <= 0) | (bins >= spec.n_fft // 2), -1, bins)  # no mel has the first or the last bin


@lru_cache(maxsize=64)
def _runs(spec: LogMelSpec) -> tuple[np.ndarray, list[list[tuple[int, ...]]]]:
    """Weights [turns, columns, rows, 2] of even and odd mels, and where in there the sums stand that make up each mel.

    The weight of the first bin of a mel's run is negative.

    Filters are triangles with strictly growing corners: two of one parity have no bin in common.
    """
    slots, bank = _slots(spec), mel_bank(spec)
    turns, columns, size = slots.shape
    weights = np.zeros((*slots.shape, 2))
    parts: list[list[tuple[int, ...]]] = [[] for _ in range(spec.n_mels)]
    for turn, column in np.ndindex(turns, columns):
        bins = slots[turn, column]
        used = np.where((bins >= 0)[:, None], bank[bins], 0.0)
        for mel in np.flatnonzero(used.any(0)):
            at, parity = np.flatnonzero(used[:, mel]), int(mel) % 2
            # In the first column the rows -k1, in its lower half, have the highest bins.
            middle = size // 2 if turn else size // 2 - 1
            for run in (at[at < middle], at[at >= middle]) if column == 0 else (at,):
                if run.size:
                    weights[turn, column, run, parity] = used[run, mel]
                    weights[turn, column, run[0], parity] *= -1
                    parts[mel].append((turn, column, int(run[-1]), parity))
    return weights, parts


def _flags(spec: LogMelSpec) -> dict[str, Any]:
    n1, n2 = _factors(spec.n_fft)
    pairs = (n2 + 1) // 2
    mels = 16 if spec.n_mels <= 16 else 32
    return {
        "EDGES": EDGES[spec.framing],
        "DC": spec.remove_dc,
        "PREEMPHASIS": spec.preemphasis > 0,
        "POWER": spec.power == 2,
        "RANGE": spec.dynamic_range is not None,
        "WIN": spec.win_length,
        "N1": n1,
        "N2": n2,
        "BM": TILE.frames,
        "LANES": TILE.depth,
        "DEPTH": -(-pairs // TILE.depth),
        "COLS": TILE.bins,
        "BLOCKS": -(-pairs // TILE.bins),
        "MELS": mels,
        "TERMS": max(1, *(len(parts) for parts in _runs(spec)[1])),
    }


@lru_cache(maxsize=64)
def _plan(spec: LogMelSpec, device: torch.device) -> Plan:
    flags = _flags(spec)
    n1, n2, lanes, depth, columns, blocks = (flags[x] for x in ("N1", "N2", "LANES", "DEPTH", "COLS", "BLOCKS"))
    pairs, count = (n2 + 1) // 2, lanes * depth
    n = np.arange(pairs)
    after, before = (n2 * np.arange(n1)[:, None] + x for x in (n, n2 - 1 - n))
    window_of_frame = np.pad(window(spec), (0, max(0, n1 * n2 - spec.win_length)))
    taps = np.zeros((2, n1, count))
    taps[:, :, :pairs] = window_of_frame[np.stack((after, before))]
    if n2 % 2:
        taps[:, :, pairs - 1] /= 2  # its own mirror image
    # Phases are counted from the middle of a slice, in units of 2π/(4·n_fft): exact, reduced before the cosine.
    middle = 2 * n - (n2 - 1)
    k2 = np.arange(pairs)

    def wave(turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        phase = turns % (4 * spec.n_fft) * (math.pi / (2 * spec.n_fft))
        return np.cos(phase), np.sin(phase)

    twiddles = np.zeros((max(n1 // 2 - 1, 1), 2, count))
    for k1 in range(1, n1 // 2):
        cos, sin = wave(-2 * middle * k1)
        twiddles[k1 - 1, :, :pairs] = cos, sin
    cos, sin = wave(2 * n1 * np.outer(middle, k2))
    if n2 % 2 == 0:
        sin[:, 0] = wave(n1 * n2 * middle)[1]  # of k2 = N2/2, whose cosine is zero as is the sine of k2 = 0
    exact = np.zeros((4, count, columns * blocks))
    exact[:, :pairs, :pairs] = cos, sin, *wave(n1 * np.outer(middle, 2 * k2 + 1))
    coarse = exact.astype(np.float16)
    dft = np.zeros((4, 2, *exact.shape[1:], 2), np.float16)
    dft[:, 0, ..., 0] = dft[:, 1, ..., 1] = coarse
    dft[:, 1, ..., 0] = exact - coarse
    dft = dft.reshape(4, 2, depth, lanes, blocks, columns, 2).transpose(4, 2, 0, 1, 5, 3, 6)

    weights, parts = _runs(spec)
    turns, given, rows, _ = weights.shape
    weights = np.pad(weights, ((0, 0), (0, columns * blocks - given), (0, 0), (0, 0)))
    ends = np.full(weights.shape, -1)
    for mel, places in enumerate(parts):
        for term, place in enumerate(places):
            ends[place] = term * spec.n_mels + mel
    counts = [len(places) for places in parts]

    def by_block(values: np.ndarray) -> np.ndarray:
        return values.reshape(turns, blocks, columns, rows, 2).transpose(1, 0, 3, 4, 2)

    affine = np.stack(np.broadcast_arrays(spec.mean, 1.0 / np.asarray(spec.std), np.zeros(spec.n_mels))[:2])

    # Bound of what is split into float16, which ends at 2^16, over that of a sample.
    gain = taps.sum((0, 1)).max() * (2 if spec.remove_dc or spec.preemphasis else 1)
    target = 253 + 15 - math.ceil(math.log2(max(gain, 1e-3)))
    count_add, count_plus = _frame_counts(spec)
    numbers = (
        spec.hop_length, spec.offset, spec.n_mels, count_add, count_plus, spec.num_frames or 2**31 - 1,
        1.0 - spec.preemphasis, target,
    )  # fmt: skip

    def table(values: Any, dtype: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype)).to(device)

    # inference_mode(False): a constant made inside a user's inference_mode could not be used for training later.
    with torch.inference_mode(False):
        return Plan(
            table(taps.reshape(2, n1, depth, lanes).transpose(2, 0, 1, 3), np.float32),
            table(twiddles.reshape(-1, 2, depth, lanes).transpose(2, 0, 1, 3), np.float32),
            table(dft, np.float16),
            table(by_block(weights), np.float32),
            table(by_block(ends), np.int32),
            table(counts, np.int32),
            table(affine, np.float32),
            numbers,
            flags,
        )


def _frame_counts(spec: LogMelSpec) -> tuple[int, int]:
    """(count_add, count_plus) of `_clip`."""
    add, plus = {
        "center": (0, 1),
        "snip_edges": (-spec.win_length, 1),
        "no_snip_edges": (spec.hop_length // 2, 0),
    }[spec.framing]
    return add, plus - int(spec.drop_last_frame)


@dataclass(frozen=True)
class FoldedPlan:
    """What `_frame_gradients_kernel` needs of a front-end besides the waveform."""

    taps: Tensor  # [2, depth] folded window
    dft: Tensor  # [blocks, 8, depth, BN] float16: cosine, sine of even, odd bins, each with its float16 remainder
    bank: Tensor  # [blocks, 2, BN, MELS]: weights of the even, the odd bins
    blocks: Tensor  # [groups + 1] int32, first block of each group of mels
    firsts: Tensor  # [groups + 1] int32, first mel of each group
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


def _folded_flags(spec: LogMelSpec, tile: Tile) -> dict[str, Any]:
    mels = 32 if spec.n_mels <= 32 else 64
    return {
        "EDGES": EDGES[spec.framing],
        "DC": spec.remove_dc,
        "PREEMPHASIS": spec.preemphasis > 0,
        "FOLD": bool(_fold(spec)[2][1].any()),
        "POWER": spec.power == 2,
        "BM": tile.frames,
        "BN": tile.bins,
        "BK": tile.depth,
        "MELS": mels,
    }


@lru_cache(maxsize=64)
def _folded_plan(spec: LogMelSpec, device: torch.device, tile: Tile) -> FoldedPlan:
    flags = _folded_flags(spec, tile)
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
    # Bound of a folded sample over that of a sample; float16 ends at 2^16.
    gain = 2 * taps.sum(0).max() * (2 if spec.remove_dc or spec.preemphasis else 1)
    target = 253 + 15 - math.ceil(math.log2(max(gain, 1e-3)))
    count_add, count_plus = _frame_counts(spec)
    numbers = (
        spec.win_length, spec.hop_length, spec.offset, spec.n_fft // 2, low, high, depth, len(groups), spec.n_mels,
        count_add, count_plus, spec.num_frames or 2**31 - 1, 1.0 - spec.preemphasis, target,
    )  # fmt: skip

    def table(values: Any, dtype: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype)).to(device)

    # inference_mode(False): a constant made inside a user's inference_mode could not be used for training later.
    with torch.inference_mode(False):
        return FoldedPlan(
            table(taps, np.float32),
            table(dft, np.float16),
            table(bank, np.float32),
            table(blocks, np.int32),
            table(firsts, np.int32),
            len(groups),
            numbers,
            flags,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Launch
# ---------------------------------------------------------------------------------------------------------------------


def backward_tile_for(arch: int) -> Tile:
    """The configuration of the gradient for an architecture: that of the nearest one below it."""
    if arch == 0:
        return INTERPRETER_TILE
    _check_arch(arch)
    return BACKWARD_TILES[max(a for a in BACKWARD_TILES if a <= arch)]


def _check_arch(arch: int) -> None:
    if 0 < arch < min(BACKWARD_TILES):
        raise RuntimeError(f"the Triton log-mel needs compute capability 8.0 or later, this GPU has {arch / 10}")


def _resident(index: int | None) -> int:
    """Programs that a GPU holds at once, each with its own scratch."""
    return PROGRAMS_OF_SM * dispatch.multiprocessors(index) if dispatch.architecture(index) else 3


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
    index = dispatch.index_of(device)
    _check_arch(dispatch.architecture(index))
    plan = _plan(spec, device)
    batch, samples = waveform.shape
    frames = spec.num_frames or spec.frames(samples)
    tiles = triton.cdiv(frames, TILE.frames)
    programs = min(batch * tiles, _resident(index))
    ranged = spec.dynamic_range is not None and not energy
    dtype = torch.float32 if energy else getattr(torch, spec.dtype)
    features = torch.empty(batch, frames, spec.n_mels, dtype=dtype, device=device)
    log_mels = torch.empty_like(features, dtype=torch.float32) if ranged else features
    tops = torch.empty((batch, tiles) if ranged else (1,), device=device)
    edge = TILE.frames * min(spec.hop_length, spec.win_length) + spec.win_length
    edges = torch.empty(programs, edge, dtype=waveform.dtype, device=device)
    scratch = torch.empty(programs, plan.flags["TERMS"], spec.n_mels, TILE.frames, device=device)
    frame_lengths = torch.empty(batch, dtype=torch.int64, device=device)
    spans = tuple(0 if x is None else x.shape[1] for x in masks)
    masks = tuple(frame_lengths if x is None else x for x in masks)
    hidden = any(spans)
    flags = {**plan.flags, "RANGE": ranged, "ENERGY": energy, "MASKS": hidden and not ranged}
    with _on(index):
        _log_mel_kernel[(programs,)](
            waveform, frame_lengths if offsets is None else offsets, frame_lengths if lengths is None else lengths,
            plan.taps, plan.twiddles, plan.dft, plan.weights, plan.ends, plan.counts, plan.affine, *masks,
            edges, scratch, log_mels, tops, frame_lengths,
            batch * tiles, samples, waveform.stride(0), tiles, frames, *plan.numbers[:-2], *spans, *plan.numbers[-2:],
            _input_scale(waveform, spec), spec.floor, *_of_exponent(spec), spec.log_padding,
            OFFSETS=offsets is not None, LENGTHS=lengths is not None,
            num_warps=TILE.warps, num_stages=TILE.stages, **flags,
        )  # fmt: skip
        if ranged:
            size = frames * spec.n_mels
            _range_kernel[(batch * triton.cdiv(size, 1024),)](
                log_mels, tops, plan.affine, *masks, features, size, spec.n_mels, tiles, *spans,
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
    index = dispatch.index_of(waveform.device)
    tile = backward_tile_for(dispatch.architecture(index))
    plan = _folded_plan(spec, waveform.device, tile)
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


def _of_exponent(spec: LogMelSpec) -> tuple[float, float]:
    """What one more in the exponent of an energy adds to its logarithm: 12 bits of it, and the rest."""
    step = math.log(2.0) * LN_FACTOR[spec.log]
    fraction, exponent = math.frexp(step)
    high = math.ldexp(round(fraction * 4096), exponent - 12)
    return high, step - high


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
    """The forms of every preset with each dtype of a waveform and the usual ones of features, and with lengths."""
    both = (False, True)
    for name, spec in FORMS.items():
        flags = {**_flags(spec), "ENERGY": False}
        if flags["RANGE"]:  # features have their dtype and masks from the second kernel
            kinds = [(kind, "fp32") for kind in TYPES.values()]
        else:
            kinds = [(kind, kind) for kind in ("fp32", "fp16", "bf16")]
            kinds += [("fp32", "bf16"), ("i16", "fp32"), ("i16", "bf16")]
        forms = [(kind, out, lengths, False) for (kind, out), lengths in product(kinds, both)]
        for kind, out, lengths, masks in forms if flags["RANGE"] else [*forms, ("i16", "bf16", True, True)]:
            label = f"log-mel {name} {kind} to {out}{' lengths' * lengths}{' offsets masks' * masks}"
            constants = {**flags, "OFFSETS": masks, "LENGTHS": lengths, "MASKS": masks}
            types = {**dict.fromkeys(("waveform", "edges"), f"*{kind}"), "out": f"*{out}"}
            yield _compilation(label, _log_mel_kernel, types, constants, TILE.warps, TILE.stages)
        for dtype in (torch.float32, torch.bfloat16):
            types = {**dict.fromkeys(("waveform", "edges"), f"*{TYPES[dtype]}"), "out": "*fp32"}
            given = {"OFFSETS": False, "LENGTHS": True}
            constants = {**flags, **given, "MASKS": False, "RANGE": False, "ENERGY": True}
            label = f"{name} {TYPES[dtype]}"
            yield _compilation(f"mel energy {label}", _log_mel_kernel, types, constants, TILE.warps, TILE.stages)
            back = backward_tile_for(arch)
            names = (*FRAME_FLAGS, *PRODUCT_FLAGS)
            constants = {**given, **{flag: value for flag, value in _folded_flags(spec, back).items() if flag in names}}
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
    numbers = ["preemphasis", "rest", "input_scale", "floor", "log_high", "log_low", "padding", "dynamic_range"]
    types = {
        **dict.fromkeys(numbers, "fp32"),
        **dict.fromkeys(("offsets", "lengths", "frame_lengths", "time_masks", "mel_masks"), "*i64"),
        **dict.fromkeys(("blocks", "firsts", "ends", "counts"), "*i32"),
        "dft": "*fp16",
        **types,
    }
    signature, attrs = signature_and_attrs(function, types, constants)
    # Matrices of 16 rows: no chip's larger instruction takes them.
    matrix_instruction: bool | str = "mma.sync" if "N1" in constants else "BN" in constants
    return Compilation(
        name, function, signature, constants, attrs, warps, stages, matrix_instruction, tile_loop="N1" in constants
    )
