"""Triton engine of the log-mel front-ends: waveform in, features out, one launch (see `operator`).

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

The gradient recomputes the spectra as products alone, with frames folded twice about the window's centre, turns them
into gradients of frames by the transposed products, and lets every sample of the waveform gather those of its frames
and reflections: no atomics.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.log_mel.spec import EDGES, Batch, LogMelSpec, mel_bank, window
from fastclap.kernels.log_mel.torch_engine import autograd_in_operator, finished, masked
from fastclap.kernels.log_mel.triton_gradient_kernels import _frame_gradients_kernel, _samples_gradients_kernel
from fastclap.kernels.log_mel.triton_kernels import _log_mel_kernel, _range_kernel
from fastclap.kernels.offline import Compilation, signature_and_attrs
from fastclap.kernels.triton_tools import TYPE_NAMES, for_architecture

FRAME_FLAGS = ("EDGES", "DC", "PREEMPHASIS")


class FrameTile(NamedTuple):
    """Frames and bins of a program and samples of one step of its products."""

    frames: int
    bins: int  # of each parity
    depth: int
    warps: int
    stages: int


# Columns for bins, lanes for depth. A warp has 8 frames, a thread 4 elements of a matrix.
FEATURE_TILE = FrameTile(32, 16, 16, 4, 1)
# By arithmetic, checked by offline compilation; other architectures take the nearest lower one, 0 is the interpreter.
GRADIENT_TILES = {
    0: FrameTile(32, 64, 128, 4, 1),
    80: FrameTile(32, 16, 16, 8, 1),
    90: FrameTile(128, 16, 16, 8, 1),
    100: FrameTile(64, 16, 16, 8, 1),
}
PROGRAMS_OF_SM = 2  # of the forward pass, which takes all of the registers
GRADIENT_CHUNK = 256 << 20  # bytes of frames' gradients held at a time
RANGE_WIDTH, RANGE_TOPS = 1024, 64  # values of a program of `_range_kernel`, maxima of tiles read at a time
SAMPLES_WIDTH = 256  # samples of a program of `_samples_gradients_kernel`


@dataclass(frozen=True)
class FeaturePlan:
    """What `_log_mel_kernel` needs to know of a front-end."""

    taps: Tensor  # [DEPTH, 2, N1, LANES] window of samples n2 and N2 - 1 - n2 of every slice
    twiddles: Tensor  # [DEPTH, N1/2 - 1, 2, LANES] cosine, sine of rows k1 = 1 … N1/2 - 1
    dft: Tensor  # [BLOCKS, DEPTH, 4, 2, COLS, LANES, 2] float16: cosine, sine, of row N1/2 both, for `_add_transformed`
    weights: Tensor  # [BLOCKS, turns, rows, 2, COLS] of the even, the odd mel; negative where a mel's run begins
    ends: Tensor  # int32, alike: the part of a mel that a sum is here, term·n_mels + mel, or -1
    counts: Tensor  # [n_mels] int32: parts of each mel
    affine: Tensor  # [2, mels]: mean, 1/std
    numbers: dict[str, float]  # by the kernel's argument
    flags: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the kernel, by name."""
        tables = ("taps", "twiddles", "dft", "weights", "ends", "counts", "affine")
        return {**{name: getattr(self, name) for name in tables}, **self.numbers, **self.flags}


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
    """Weights [turns, columns, rows, 2] of even and odd mels, and the places in them of the sums that make up each mel.

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


def feature_flags(spec: LogMelSpec) -> dict[str, Any]:
    """Constants of `_log_mel_kernel` for a front-end, by name."""
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
        "BM": FEATURE_TILE.frames,
        "LANES": FEATURE_TILE.depth,
        "DEPTH": -(-pairs // FEATURE_TILE.depth),
        "COLS": FEATURE_TILE.bins,
        "BLOCKS": -(-pairs // FEATURE_TILE.bins),
        "MELS": mels,
        "TERMS": max(1, *(len(parts) for parts in _runs(spec)[1])),
    }


@lru_cache(maxsize=64)
def _feature_plan(spec: LogMelSpec, device: torch.device) -> FeaturePlan:
    flags = feature_flags(spec)
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

    log_high, log_low = _logarithm_of_two(spec)
    return FeaturePlan(
        _table(taps.reshape(2, n1, depth, lanes).transpose(2, 0, 1, 3), np.float32, device),
        _table(twiddles.reshape(-1, 2, depth, lanes).transpose(2, 0, 1, 3), np.float32, device),
        _table(dft, np.float16, device),
        _table(by_block(weights), np.float32, device),
        _table(by_block(ends), np.int32, device),
        _table(counts, np.int32, device),
        _table(affine, np.float32, device),
        {
            **_numbers(spec, taps.sum((0, 1)).max()),
            "floor": spec.floor,
            "log_high": log_high,
            "log_low": log_low,
            "padding": spec.log_padding,
        },
        flags,
    )


def _table(values: Any, dtype: Any, device: torch.device) -> Tensor:
    # inference_mode(False): a constant made inside a user's inference_mode could not be used for training later.
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(values, dtype)).to(device)


def _numbers(spec: LogMelSpec, largest_sum: float) -> dict[str, float]:
    """Arguments of both kernels that read frames, by name.

    Args:
        spec: the front-end.
        largest_sum: the largest sum of window values that go into one number before it is split into float16.
    """
    # Bound of what is split into float16, which ends at 2^16, over that of a sample.
    gain = largest_sum * (2 if spec.remove_dc or spec.preemphasis else 1)
    return {
        "hop": spec.hop_length,
        "shift": spec.offset,
        "mels": spec.n_mels,
        **_frame_count_terms(spec),
        "rest": 1.0 - spec.preemphasis,
        "target": 253 + 15 - math.ceil(math.log2(max(gain, 1e-3))),
    }


def _frame_count_terms(spec: LogMelSpec) -> dict[str, int]:
    """What `clip_bounds` makes a clip's frames of, by argument."""
    add, plus = {
        "center": (0, 1),
        "snip_edges": (-spec.win_length, 1),
        "no_snip_edges": (spec.hop_length // 2, 0),
    }[spec.framing]
    plus -= int(spec.drop_last_frame)
    return {"count_add": add, "count_plus": plus, "most_frames": spec.num_frames or 2**31 - 1}


def _logarithm_of_two(spec: LogMelSpec) -> tuple[float, float]:
    """What one more in the exponent of an energy adds to its logarithm: 12 bits of it, and the rest."""
    step = math.log(2.0) * spec.log_scale
    fraction, exponent = math.frexp(step)
    high = math.ldexp(round(fraction * 4096), exponent - 12)
    return high, step - high


@dataclass(frozen=True)
class GradientPlan:
    """What `_frame_gradients_kernel` needs to know of a front-end."""

    taps: Tensor  # [2, depth] folded window
    dft: Tensor  # [blocks, 8, depth, BN] float16: cosine, sine of even, odd bins, each with its float16 remainder
    bank: Tensor  # [blocks, 2, BN, MELS]: weights of the even, the odd bins
    blocks: Tensor  # [groups + 1] int32, first block of each group of mels
    firsts: Tensor  # [groups + 1] int32, first mel of each group
    numbers: dict[str, float]  # by the kernel's argument
    flags: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the kernel, by name."""
        tables = ("taps", "dft", "bank", "blocks", "firsts")
        return {**{name: getattr(self, name) for name in tables}, **self.numbers, **self.flags}


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


def _gradient_flags(spec: LogMelSpec, tile: FrameTile) -> dict[str, Any]:
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
def _gradient_plan(spec: LogMelSpec, device: torch.device, tile: FrameTile) -> GradientPlan:
    flags = _gradient_flags(spec, tile)
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
    return GradientPlan(
        _table(taps, np.float32, device),
        _table(dft, np.float16, device),
        _table(bank, np.float32, device),
        _table(blocks, np.int32, device),
        _table(firsts, np.int32, device),
        {
            **_numbers(spec, 2 * taps.sum(0).max()),
            "win": spec.win_length,
            "half": spec.n_fft // 2,
            "low": low,
            "high": high,
            "depth": depth,
            "groups": len(groups),
        },
        flags,
    )


def _resident_programs(index: int | None) -> int:
    """How many a GPU holds at once, each with its own scratch."""
    return PROGRAMS_OF_SM * dispatch.multiprocessors(index) if dispatch.architecture(index) else 3


def _device_context(index: int | None) -> contextlib.AbstractContextManager[object]:
    """Of a CUDA device, unless it is the current one: it costs a few microseconds."""
    if index is None or index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(index)


def log_mel_triton(batch: Batch, spec: LogMelSpec) -> tuple[Tensor, Tensor]:
    """`operator.log_mel` of a batch, without gradient: (features [B, frames, n_mels], frame lengths [B]).

    `spec` is without dither.
    """
    time, mel = (None if x is None else x.contiguous() for x in (batch.time_masks, batch.mel_masks))
    batch = batch._replace(waveform=_readable(batch.waveform), time_masks=time, mel_masks=mel)
    return _launch(batch, spec, energy=False)


def _launch(batch: Batch, spec: LogMelSpec, energy: bool) -> tuple[Tensor, Tensor]:
    """Features and frame lengths; `energy`: mel energies [B, frames, n_mels] float32, 0 past a clip's end."""
    waveform, device = batch.waveform, batch.waveform.device
    index = dispatch.index_of(device)
    plan = _feature_plan(spec, device)
    clips, samples = waveform.shape
    frames = spec.num_frames or spec.frames(samples)
    tiles = triton.cdiv(frames, FEATURE_TILE.frames)
    programs = min(clips * tiles, _resident_programs(index))
    ranged = spec.dynamic_range is not None and not energy
    dtype = torch.float32 if energy else getattr(torch, spec.dtype)
    features = torch.empty(clips, frames, spec.n_mels, dtype=dtype, device=device)
    log_mels = torch.empty_like(features, dtype=torch.float32) if ranged else features
    tops = torch.empty((clips, tiles) if ranged else (1,), device=device)
    edge = FEATURE_TILE.frames * min(spec.hop_length, spec.win_length) + spec.win_length
    frame_lengths = torch.empty(clips, dtype=torch.int64, device=device)
    masks = _mask_arguments(batch, frame_lengths)
    hidden = bool(masks["time_spans"] or masks["mel_spans"])
    with _device_context(index):
        _log_mel_kernel[(programs,)](
            **_clip_arguments(batch, spec, frame_lengths),
            **{**plan.arguments, "RANGE": ranged, "ENERGY": energy, "MASKS": hidden and not ranged},
            **masks,
            edges=torch.empty(programs, edge, dtype=waveform.dtype, device=device),
            scratch=torch.empty(programs, plan.flags["TERMS"], spec.n_mels, FEATURE_TILE.frames, device=device),
            out=log_mels,
            tops=tops,
            frame_lengths=frame_lengths,
            work=clips * tiles,
            tiles=tiles,
            frames=frames,
            num_warps=FEATURE_TILE.warps,
            num_stages=FEATURE_TILE.stages,
        )
        if ranged:
            size = frames * spec.n_mels
            _range_kernel[(clips * triton.cdiv(size, RANGE_WIDTH),)](
                log_mels,
                tops,
                plan.affine,
                **masks,
                out=features,
                size=size,
                mels=spec.n_mels,
                tops_size=tiles,
                dynamic_range=spec.dynamic_range,
                padding=spec.log_padding,
                MASKS=hidden,
                WIDTH=RANGE_WIDTH,
                TOPS=RANGE_TOPS,
            )
    return features, frame_lengths


def _clip_arguments(batch: Batch, spec: LogMelSpec, absent: Tensor) -> dict[str, Any]:
    """What the kernels that read frames know of the clips; `absent` stands for lengths and offsets that are not given.

    Its dtype is theirs, int64.
    """
    return {
        "waveform": batch.waveform,
        "samples": batch.waveform.shape[1],
        "row_stride": batch.waveform.stride(0),
        "input_scale": spec.sample_scale(batch.waveform.dtype),
        **_bounds_arguments(batch, absent),
    }


def _bounds_arguments(batch: Batch, absent: Tensor) -> dict[str, Any]:
    return {
        "offsets": absent if batch.offsets is None else batch.offsets,
        "lengths": absent if batch.lengths is None else batch.lengths,
        "OFFSETS": batch.offsets is not None,
        "LENGTHS": batch.lengths is not None,
    }


def _mask_arguments(batch: Batch, absent: Tensor) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name, masks in (("time", batch.time_masks), ("mel", batch.mel_masks)):
        arguments[f"{name}_masks"] = absent if masks is None else masks
        arguments[f"{name}_spans"] = 0 if masks is None else masks.shape[1]
    return arguments


def log_mel_triton_gradient(
    gradient: Tensor,  # [B, frames, n_mels], of the features
    batch: Batch,  # as given to `log_mel_triton`
    spec: LogMelSpec,
) -> Tensor:
    """Gradient of the waveform [B, T], in its dtype; from the recomputed mel energies on, a few clips at a time.

    What lies between energies and features is differentiated by torch: floor, dynamic range and masks keep autograd's
    rules.
    """
    readable = batch._replace(waveform=_readable(batch.waveform))
    device = batch.waveform.device
    index = dispatch.index_of(device)
    tile = for_architecture(GRADIENT_TILES, dispatch.architecture(index))
    plan = _gradient_plan(spec, device, tile)
    clips, samples = batch.waveform.shape
    frames = gradient.shape[1]
    result = torch.empty(clips, samples, dtype=readable.waveform.dtype, device=device)
    few = max(1, GRADIENT_CHUNK // (4 * frames * spec.win_length))
    tiles = triton.cdiv(frames, tile.frames)
    for first in range(0, clips, few):
        some = slice(first, first + few)
        chunk = readable.clips(some)
        count = len(chunk.waveform)
        energies, frame_lengths = _launch(chunk._replace(time_masks=None, mel_masks=None), spec, energy=True)
        with autograd_in_operator():
            energies.requires_grad_()
            features = finished(energies, frame_lengths, spec)
            features = masked(features, chunk.time_masks, chunk.mel_masks, spec).to(gradient.dtype)
            (d_energy,) = torch.autograd.grad(features, energies, gradient[some])
        # Zeros: the window's own are not written.
        d_frames = torch.zeros(count, frames, spec.win_length, device=device)
        d_sums = torch.zeros(count, frames, device=device)
        with _device_context(index):
            _frame_gradients_kernel[(count * tiles,)](
                **_clip_arguments(chunk, spec, frame_lengths),
                **plan.arguments,
                d_energy=d_energy.contiguous(),
                d_frames=d_frames,
                d_sums=d_sums,
                tiles=tiles,
                frames=frames,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
            _samples_gradients_kernel[(count * triton.cdiv(samples, SAMPLES_WIDTH),)](
                d_frames,
                d_sums,
                **_bounds_arguments(chunk, frame_lengths),
                **_frame_count_terms(spec),
                **{name: plan.flags[name] for name in FRAME_FLAGS},
                out=result[some],
                samples=samples,
                frames=frames,
                win=spec.win_length,
                hop=spec.hop_length,
                shift=spec.offset,
                overlap=triton.cdiv(spec.win_length, spec.hop_length),
                preemphasis=spec.preemphasis,
                WIDTH=SAMPLES_WIDTH,
            )
    return result.to(batch.waveform.dtype)


def _readable(waveform: Tensor) -> Tensor:
    """The waveform in a dtype and layout that the kernels read."""
    if waveform.dtype not in TYPE_NAMES:
        waveform = waveform.to(torch.float32)
    return waveform if waveform.stride(1) == 1 else waveform.contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# What the launcher may ask Triton to compile
# ---------------------------------------------------------------------------------------------------------------------

_WHISPER = LogMelSpec(16000, 400, 400, 160, 80, mel_scale="slaney", dynamic_range=8.0)
_KALDI = LogMelSpec(
    16000, 512, 400, 160, 80, window="povey", framing="snip_edges", remove_dc=True, preemphasis=0.97,
    mel_scale="kaldi", f_min=20.0,
)  # fmt: skip
# The front-ends of the CLAP family, so far as the kernels tell them apart; overrides may lead to more.
COMPILED_SPECS = {
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
    for name, spec in COMPILED_SPECS.items():
        yield from _feature_compilations(name, spec)
        yield from _gradient_compilations(name, spec, arch)
    for out in ("fp32", "fp16", "bf16"):
        for masks in (False, True):
            constants = {"MASKS": masks, "WIDTH": RANGE_WIDTH, "TOPS": RANGE_TOPS}
            label = f"range to {out}{' masks' * masks}"
            yield _compilation(label, _range_kernel, {"out": f"*{out}"}, constants)


def _feature_compilations(name: str, spec: LogMelSpec) -> Iterator[Compilation]:
    both = (False, True)
    flags = {**feature_flags(spec), "ENERGY": False}
    if flags["RANGE"]:  # features have their dtype and masks from the second kernel
        kinds = [(kind, "fp32") for kind in ("i16", "fp32", "fp16", "bf16")]
    else:
        kinds = [(kind, kind) for kind in ("fp32", "fp16", "bf16")]
        kinds += [("fp32", "bf16"), ("i16", "fp32"), ("i16", "bf16")]
    forms = [(kind, out, lengths, False) for (kind, out), lengths in product(kinds, both)]
    for kind, out, lengths, masks in forms if flags["RANGE"] else [*forms, ("i16", "bf16", True, True)]:
        label = f"log-mel {name} {kind} to {out}{' lengths' * lengths}{' offsets masks' * masks}"
        constants = {**flags, "OFFSETS": masks, "LENGTHS": lengths, "MASKS": masks}
        types = {**dict.fromkeys(("waveform", "edges"), f"*{kind}"), "out": f"*{out}"}
        yield _compilation(label, _log_mel_kernel, types, constants, FEATURE_TILE)


def _gradient_compilations(name: str, spec: LogMelSpec, arch: int) -> Iterator[Compilation]:
    tile = for_architecture(GRADIENT_TILES, arch)
    given = {"OFFSETS": False, "LENGTHS": True}
    flags = _gradient_flags(spec, tile)
    for kind in ("fp32", "bf16"):
        types = {**dict.fromkeys(("waveform", "edges"), f"*{kind}"), "out": "*fp32"}
        constants: dict[str, Any] = {**feature_flags(spec), **given, "MASKS": False, "RANGE": False, "ENERGY": True}
        yield _compilation(f"mel energy {name} {kind}", _log_mel_kernel, types, constants, FEATURE_TILE)
        yield _compilation(f"frame gradients {name} {kind}", _frame_gradients_kernel, types, {**given, **flags}, tile)
        constants = {**given, **{flag: flags[flag] for flag in FRAME_FLAGS}, "WIDTH": SAMPLES_WIDTH}
        yield _compilation(f"sample gradients {name} {kind}", _samples_gradients_kernel, {"out": f"*{kind}"}, constants)


def _compilation(
    name: str, function: Any, types: dict[str, str], constants: dict[str, Any], tile: FrameTile | None = None
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
    warps, stages = (4, 3) if tile is None else (tile.warps, tile.stages)
    # Matrices of 16 rows: no chip's larger instruction takes them.
    matrix_instruction: bool | str = "mma.sync" if "N1" in constants else "BN" in constants
    return Compilation(
        name, function, signature, constants, attrs, warps, stages, matrix_instruction, tile_loop="N1" in constants
    )
