"""CUDA engine of the log-mel front-ends: waveform in, features out, one launch of csrc/log_mel_cuda.cuh.

The kernel is compiled for each front-end, with its numbers as constants; here they are chosen and the tables made.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastclap.kernels import cuda_tools, dispatch
from fastclap.kernels.cuda_tools import CudaError, Kernel, compile_cubin, warn_once
from fastclap.kernels.log_mel.spec import EDGES, Batch, LogMelSpec, exponent_step, mel_bank, window

SOURCE = Path(__file__).parents[1] / "csrc" / "log_mel_cuda.cuh"
INPUTS = {torch.float32: "float", torch.int16: "short"}
OUTPUTS = {"float32": "float", "bfloat16": "BFloat16", "float16": "Float16"}
LONGEST_FFT = 64, 40  # of a thread: real numbers, complex numbers
# A block's shared memory: the most that leaves room for four on a multiprocessor of an H100, the most there may be.
ROOM, MOST_SHARED = 56 << 10, 99 << 10
# Threads of a multiprocessor, which leave each some 80 registers, or 128 where FFTs of more than 32 points want them.
SHORT_THREADS, LONG_THREADS, SHORT_FFT = 768, 512, 32
MOST_GRID = 65535


class _Arguments(ctypes.Structure):
    """`Arguments` of the kernel."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("waveform", "offsets", "lengths", "columns", "weights", "runs")),
        *((name, ctypes.c_void_p) for name in ("first_bins", "logarithms", "affine", "time_masks", "mel_masks")),
        *((name, ctypes.c_void_p) for name in ("features", "frame_lengths", "states")),
        ("row_stride", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("samples", "clips", "frames", "time_spans", "mel_spans")),
        *((name, ctypes.c_int) for name in ("count_add", "count_plus", "most_frames")),
        *((name, ctypes.c_float) for name in ("preemphasis", "floor", "padding", "dynamic_range")),
        *((name, ctypes.c_float) for name in ("log_high", "log_low", "log_scale")),
    ]


class Layout(NamedTuple):
    """How a block computes the frames of a front-end; the names in csrc/log_mel_cuda.cuh are the same in capitals.

    Attributes:
        r1, r2: n_fft = r1·r2.
        frames: of a block.
        group: neighbouring frames of a thread in the first step.
        threads: of a block.
        pad: words after every hop of samples, so that frames begin 32 / frames times an odd number of banks apart.
        row_stride, frame_stride: of the numbers between the steps, for the same end.
        shared_bytes: of a block.
        blocks: the fewest that must fit on a multiprocessor, which limits their registers.
    """

    r1: int
    r2: int
    frames: int
    group: int
    threads: int
    pad: int
    row_stride: int
    frame_stride: int
    shared_bytes: int
    blocks: int


def _factors(spec: LogMelSpec) -> tuple[int, int] | None:
    """(r1, r2) that take the fewest registers; None where n_fft has no such factors."""

    def smooth(n: int) -> bool:
        for prime in (2, 3, 5):
            while n % prime == 0:
                n //= prime
        return n == 1

    real, complex_ = LONGEST_FFT
    found = [(r1, spec.n_fft // r1) for r1 in range(4, real + 1, 2) if spec.n_fft % r1 == 0]
    found = [(r1, r2) for r1, r2 in found if 2 <= r2 <= complex_ and smooth(r1) and smooth(r2)]
    return min(found, key=lambda x: (max(x[0], 2 * x[1]), spec.hop_length % x[1] != 0, -x[1]), default=None)


def _next(start: int, step: int) -> int:
    """The least odd multiple of `step` from `start` on."""
    return next(n for n in range(start, start + 2 * step + 1) if n % step == 0 and n // step % 2)


@functools.lru_cache(maxsize=64)
def layout(spec: LogMelSpec) -> Layout | str:
    """The layout, or why the kernel does not cover this front-end."""
    factors = _factors(spec)
    if factors is None:
        real, complex_ = LONGEST_FFT
        return (
            f"n_fft {spec.n_fft} is no product of an even number up to {real} and one up to {complex_} whose prime "
            "factors are 2, 3 and 5"
        )
    if spec.floor < 1.2e-38:
        return f"the floor {spec.floor} is no normal float32"
    r1, r2 = factors
    for frames in (16, 8):
        pad = _next(spec.hop_length, 32 // frames) - spec.hop_length
        row_stride = r2 | 1 if frames < 16 else r2
        frame_stride = _next(r1 // 2 * row_stride, 16 // frames)
        group = {2.0: 2, 4.0: 4}.get(2 * r2 / r1, 1)  # for as many threads in both FFTs
        threads = -(-max(r1 // 2 * frames, r2 * frames // group if spec.remove_dc else 1) // 32) * 32
        mels = mel_runs(spec, frames)
        last = (frames - 1) * spec.hop_length + -(-spec.win_length // r2) * r2
        samples = -(-(last + pad * (last // spec.hop_length)) // 4) * 4
        means = frames if spec.remove_dc else 0
        shared = 4 * (max(samples, (mels.high - mels.low) * frames) + 2 * frames * frame_stride + means)
        if shared <= ROOM:
            break
    if shared > MOST_SHARED or threads > 1024 or 4 * (4 + spec.n_mels) > shared:
        return f"{frames} frames of {spec.n_fft} samples, {spec.hop_length} apart, do not fit shared memory"
    together = SHORT_THREADS if max(r1, r2) <= SHORT_FFT else LONG_THREADS
    blocks = max(1, min(ROOM * 4 // shared, together // threads))
    return Layout(r1, r2, frames, group, threads, pad, row_stride, frame_stride, shared, blocks)


class Mels(NamedTuple):
    """The mel bank as the third step reads it."""

    low: int  # bins that are kept, from here
    high: int  # to here
    firsts: np.ndarray  # [mels of all warps] the first bin of each
    runs: np.ndarray  # [warps, 2] where the weights of a warp's mels begin, in fours, and over how many bins they go
    weights: np.ndarray  # of four bins, for the mels of a warp side by side, then of the next four


@functools.lru_cache(maxsize=64)
def mel_runs(spec: LogMelSpec, frames: int) -> Mels:
    """Runs of equal length for the mels of a warp.

    A warp reads the bins of 128 / frames mels; those of 32 / frames neighbours lie in different banks if their first
    bins differ modulo that number. A run begins with zeros for that, where it must.
    """
    bank, together, apart = mel_bank(spec), 128 // frames, 32 // frames
    warps = -(-spec.n_mels // together)
    bank = np.pad(bank, ((0, 0), (0, warps * together - spec.n_mels)))
    bins = len(bank)
    firsts, ends = np.zeros((2, warps * together), int)
    for mel in range(warps * together):
        used = np.flatnonzero(bank[:, mel])
        # A filter without a bin has one of no weight: NaN of a bad frame is then NaN in all mels.
        begin, ends[mel] = (used[0], used[-1] + 1) if used.size else (min(1, bins - 1), min(2, bins))
        firsts[mel] = max(0, begin - (begin - mel) % apart)
    counts = -(-(ends - firsts).reshape(warps, together).max(1) // 4) * 4
    bank = np.pad(bank, ((0, counts.max()), (0, 0)))  # the kernel has zeros for what a run has past the last bin
    weights, starts = [], [0]
    for warp, count in enumerate(counts):
        mels = range(warp * together, (warp + 1) * together)
        columns = np.stack([bank[firsts[mel] : firsts[mel] + count, mel] for mel in mels])
        weights.append(columns.reshape(together, -1, 4).transpose(1, 0, 2).ravel())
        starts.append(starts[-1] + weights[-1].size // 4)
    low, high = int(firsts.min()), int((firsts + np.repeat(counts, together)).max())
    return Mels(low, high, firsts, np.stack((starts[:-1], counts), 1), np.concatenate(weights))


def options(spec: LogMelSpec, dtype: torch.dtype, masks: bool) -> tuple[str, ...]:
    """Of the compiler, for a front-end that has a layout."""
    found = layout(spec)
    assert isinstance(found, Layout)
    mels = mel_runs(spec, found.frames)
    constants = {
        **found._asdict(),
        "n_fft": spec.n_fft,
        "win_length": spec.win_length,
        "hop_length": spec.hop_length,
        "n_mels": spec.n_mels,
        "low_bin": mels.low,
        "high_bin": mels.high,
        "offset": spec.offset,
        "edges": EDGES[spec.framing],
        "remove_dc": int(spec.remove_dc),
        "preemphasis": int(spec.preemphasis > 0),
        "magnitude": int(spec.power == 1),
        "range": int(spec.dynamic_range is not None),
        "masks": int(masks),
        "input": INPUTS[dtype],
        "output": OUTPUTS[spec.dtype],
    }
    return tuple(f"-DLOG_MEL_{name.upper()}={value}" for name, value in constants.items())


@functools.lru_cache(maxsize=256)
def cubin(spec: LogMelSpec, dtype: torch.dtype, masks: bool, arch: int) -> bytes:
    """Machine code of a form for compute capability `arch`.

    Raises:
        CudaError: it cannot be compiled.
    """
    return compile_cubin(SOURCE.read_text(), SOURCE.name, options(spec, dtype, masks), arch)


def is_compiled(spec: LogMelSpec, dtype: torch.dtype, masks: bool, arch: int) -> bool:
    """Whether the machine code lies on disk. Raises as `cubin`, but for an error in the source."""
    return cuda_tools.is_compiled(SOURCE.read_text(), options(spec, dtype, masks), arch)


@dataclass(frozen=True)
class _Plan:
    """A front-end on a device, for samples of one dtype."""

    kernel: Kernel
    layout: Layout
    tables: dict[str, Tensor]  # by argument
    numbers: dict[str, float]  # likewise


def _load(spec: LogMelSpec, dtype: torch.dtype, masks: bool, device: torch.device) -> Kernel:
    index, found = dispatch.index_of(device), layout(spec)
    assert isinstance(found, Layout) and index is not None
    return Kernel(cubin(spec, dtype, masks, dispatch.architecture(index)), "log_mel", found.shared_bytes, index)


@functools.lru_cache(maxsize=256)
def _plan(spec: LogMelSpec, dtype: torch.dtype, masks: bool, device: torch.device) -> _Plan | str:
    """The plan, or why there is none."""
    found = layout(spec)
    if isinstance(found, str):
        return found
    try:
        kernel = _load(spec, dtype, masks, device)
    except (CudaError, OSError) as error:
        warn_once(f"log-mel features are computed without the CUDA engine, some times slower: {error}")
        return str(error)
    add, plus = spec.count_terms
    # inference_mode(False): a constant made inside a user's inference_mode could not be used for training later.
    with torch.inference_mode(False):
        tables = {name: torch.from_numpy(table).to(device) for name, table in _tables(spec, found, dtype).items()}
    log_high, log_low, log_scale = _logarithm(spec.log_scale)
    numbers = {
        "count_add": add,
        "count_plus": plus,
        "most_frames": spec.num_frames or 2**31 - 1,
        "preemphasis": spec.preemphasis,
        "floor": spec.floor,
        "padding": spec.log_padding,
        "dynamic_range": spec.dynamic_range or 0.0,
        **{"log_high": log_high, "log_low": log_low, "log_scale": log_scale},
    }
    return _Plan(kernel, found, tables, numbers)


def _logarithm(scale: float) -> tuple[float, float, float]:
    """(high, low, scale·ln 2): `exponent_step` for exponents that are 2^23 times as large, and of a mantissa's log2."""
    high, low = exponent_step(scale)
    return math.ldexp(high, -23), math.ldexp(low, -23), high + low


def _tables(spec: LogMelSpec, found: Layout, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """The kernel's arrays, by argument."""
    r1, r2 = found.r1, found.r2
    slices = -(-spec.win_length // r2)
    n2 = np.arange(r2)
    taps = np.zeros((-(-slices // 4) * 4, r2))
    taps.ravel()[: spec.win_length] = window(spec)
    turns = np.zeros((-(-(r1 - 2) // 4) * 4, r2))
    for row in range(1, r1 // 2):
        phase = 2 * math.pi * (row * n2 % spec.n_fft) / spec.n_fft
        turns[2 * row - 2 : 2 * row] = np.cos(phase), np.sin(phase)
    columns = np.concatenate((taps, turns)).reshape(-1, 4, r2).transpose(0, 2, 1)

    mels = mel_runs(spec, found.frames)
    # Of the samples' units; the special row's factors are the kernel's own.
    gain = spec.sample_scale(dtype) ** spec.power
    mean, std = np.broadcast_arrays(spec.mean, spec.std, np.zeros(spec.n_mels))[:2]
    logarithms = [(*_logarithm(spec.log_scale / s), -m / s) for m, s in zip(mean, std, strict=True)]
    tables = {
        "columns": columns,
        "weights": mels.weights * gain,
        "logarithms": np.array(logarithms),
        "affine": np.stack((mean, 1 / std), 1),
    }
    return {
        **{name: np.ascontiguousarray(table, np.float32) for name, table in tables.items()},
        "runs": mels.runs.astype(np.int32),
        "first_bins": (mels.firsts - mels.low).astype(np.int32),
    }


def _dtype(waveform: Tensor) -> torch.dtype:
    """Of the samples that the kernel reads: others are converted first."""
    return waveform.dtype if waveform.dtype in INPUTS else torch.float32


def _plan_for(batch: Batch, spec: LogMelSpec) -> _Plan | str:
    masks = batch.time_masks is not None or batch.mel_masks is not None
    return _plan(spec, _dtype(batch.waveform), masks, batch.waveform.device)


def why_not(batch: Batch, spec: LogMelSpec) -> str | None:
    """Why `log_mel_cuda` cannot compute these features; None if it can."""
    waveform = batch.waveform
    if not dispatch.on_gpu(waveform):
        return f"the waveform is on {waveform.device}"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    arch = dispatch.architecture(dispatch.index_of(waveform.device))
    if arch < 80:
        return f"the GPU has compute capability {arch / 10}, and the kernel needs 8.0"
    samples = waveform.shape[1]
    if max(samples + spec.n_fft, spec.n_mels * spec.padded_frames(samples)) >= 2**31:
        return "a clip has 2^31 samples or features"
    plan = _plan_for(batch, spec)
    return plan if isinstance(plan, str) else None


def log_mel_cuda(batch: Batch, spec: LogMelSpec) -> tuple[Tensor, Tensor]:
    """`operator.log_mel` of a batch, without gradient: (features [B, frames, n_mels], frame lengths [B]).

    `spec` is without dither.

    Raises:
        CudaError: there is a reason `why_not`, or the driver refuses the launch.
    """
    plan = _plan_for(batch, spec)
    if isinstance(plan, str):
        raise CudaError(plan)
    batch = batch.readable(INPUTS)
    waveform, time, mel = batch.waveform, batch.time_masks, batch.mel_masks
    (clips, samples), device = waveform.shape, waveform.device
    frames = spec.padded_frames(samples)
    features = torch.empty(clips, frames, spec.n_mels, dtype=getattr(torch, spec.dtype), device=device)
    frame_lengths = torch.empty(clips, dtype=torch.int64, device=device)
    tensors = {
        "waveform": waveform,
        "offsets": batch.offsets,
        "lengths": batch.lengths,
        "time_masks": time,
        "mel_masks": mel,
        "features": features,
        "frame_lengths": frame_lengths,
        "states": torch.zeros(clips, 2, dtype=torch.int32, device=device) if spec.dynamic_range is not None else None,
    }
    arguments = _Arguments(
        **{name: x.data_ptr() for name, x in {**plan.tables, **tensors}.items() if x is not None},
        **plan.numbers,
        row_stride=waveform.stride(0),
        samples=samples,
        clips=clips,
        frames=frames,
        time_spans=0 if time is None else time.shape[1],
        mel_spans=0 if mel is None else mel.shape[1],
    )
    rows = min(clips, MOST_GRID)
    grid = (-(-frames // plan.layout.frames), rows, -(-clips // rows))
    plan.kernel.launch(grid, plan.layout.threads, arguments)
    return features, frame_lengths
