"""The plain torch engine of the log-mel features, and their float64 definition.

It is quick on a CPU for three reasons. Frames are contiguous rows [B, frames, n_fft], so the FFT and the mel product
read memory in order (torchaudio's and torch.stft's [n_fft/2, frames] layout makes the mel product a strided one). The
mel bank is banded: four products, each over the bins that its mels touch, do a quarter of the work of the dense one.
The batch goes through in chunks of a few hundred frames, so that they stay in cache; this also bounds the memory beyond
input and output, whatever the batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastclap.kernels.log_mel.spec import Batch, LogMelSpec, mel_bank, window

# Samples of framed signal that go through at once. A CPU wants them in its cache, a GPU wants few launches.
CPU_CHUNK = 1 << 18
GPU_CHUNK = 1 << 26


def log_mel_torch(batch: Batch, spec: LogMelSpec) -> tuple[Tensor, Tensor]:
    """`operator.log_mel` of a batch, before masks: (features [B, frames, n_mels], frame lengths [B]).

    Differentiable; `spec` is without dither.
    """
    waveform, lengths, frames, frame_lengths = batch.cropped(spec)
    chunk = GPU_CHUNK if waveform.is_cuda else CPU_CHUNK * torch.get_num_threads()
    frames_a_chunk = max(1, chunk // spec.n_fft)
    clips_a_chunk = max(1, frames_a_chunk // frames)
    parts = []
    with torch.autocast(waveform.device.type, enabled=False), _full_precision_matmul():
        for first in range(0, len(waveform), clips_a_chunk):
            clips = slice(first, first + clips_a_chunk)
            signal = _extended(scaled(waveform[clips], spec), None if lengths is None else lengths[clips], spec)
            energies = _mel_energies(signal, frames, frames_a_chunk, spec)
            parts.append(finished(energies, None if lengths is None else frame_lengths[clips], spec))
    features = torch.cat(parts) if len(parts) > 1 else parts[0]
    return features.to(getattr(torch, spec.dtype)), frame_lengths


def log_mel_torch_gradient(
    gradient: Tensor,  # [B, frames, n_mels], of the features
    batch: Batch,
    spec: LogMelSpec,
) -> Tensor:
    """Gradient of the waveform [B, T], in its dtype; a few clips at a time, as autograd keeps their frames."""
    chunk = GPU_CHUNK if batch.waveform.is_cuda else CPU_CHUNK
    clips_a_chunk = max(1, chunk // (spec.n_fft * gradient.shape[1]))
    parts = []
    for first in range(0, len(batch.waveform), clips_a_chunk):
        some = slice(first, first + clips_a_chunk)
        clips = batch.clips(some)
        with autograd_in_operator():
            leaf = clips.waveform.detach().requires_grad_()
            features, _ = log_mel_torch(clips._replace(waveform=leaf), spec)
            features = masked(features, clips.time_masks, clips.mel_masks, spec)
            parts.append(torch.autograd.grad(features, leaf, gradient[some])[0])
    return torch.cat(parts)


@contextlib.contextmanager
def autograd_in_operator() -> Iterator[None]:
    """Autograd inside a custom operator, where the dispatcher may have left it behind."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


@lru_cache(maxsize=64)
def _constants(spec: LogMelSpec, device: torch.device) -> tuple[Tensor, list[tuple[int, int, Tensor]]]:
    """Window and banded mel bank on the device, float32.

    The bank comes as (first bin, end bin, weights [bins, mels]) for consecutive groups of mels. Pre-emphasis leaves
    frames without their first sample, so their window lacks it too: all three windows are zero there, and the sample
    before the frame is never read.
    """
    taps = window(spec)[1:] if spec.preemphasis else window(spec)
    bank = mel_bank(spec)
    bands = []
    # inference_mode(False): a constant made inside a user's inference_mode could not be used for training later.
    with torch.inference_mode(False):
        for mels in np.array_split(np.arange(spec.n_mels), min(4, spec.n_mels)):
            columns = bank[:, mels]
            bins = np.flatnonzero(columns.any(axis=1))
            low, high = (int(bins[0]), int(bins[-1]) + 1) if bins.size else (0, 1)
            weights = np.ascontiguousarray(columns[low:high], dtype=np.float32)
            bands.append((low, high, torch.from_numpy(weights).to(device)))
        return torch.from_numpy(taps.astype(np.float32)).to(device), bands


def masked(features: Tensor, time_masks: Tensor | None, mel_masks: Tensor | None, spec: LogMelSpec) -> Tensor:
    """Features [B, frames, n_mels] with the spans set to silence."""
    for spans, dim in ((time_masks, 1), (mel_masks, 2)):
        if spans is not None:
            index = torch.arange(features.shape[dim], device=features.device)
            hidden = ((index >= spans[..., :1]) & (index < spans[..., 1:])).any(dim=1)
            silent = _silence(spec, features.device).to(features.dtype)
            features = torch.where(hidden.unsqueeze(3 - dim), silent, features)
    return features


def silence(spec: LogMelSpec) -> float | tuple[float, ...]:
    """The feature of frames past a clip's end, before `dynamic_range`; a number for each mel if `mean` or `std` has."""
    if isinstance(spec.mean, float) and isinstance(spec.std, float):
        return (spec.log_padding - spec.mean) / spec.std
    mean, std = np.broadcast_arrays(spec.mean, spec.std)
    return tuple(float(x) for x in (spec.log_padding - mean) / std)


@lru_cache(maxsize=64)
def _silence(spec: LogMelSpec, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(silence(spec), device=device)


@lru_cache(maxsize=64)
def _statistic(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


def normalised(features: Tensor, spec: LogMelSpec) -> Tensor:
    """(features - mean) / std."""
    if not isinstance(spec.mean, float):
        features = features - _statistic(spec.mean, features.device)
    elif spec.mean != 0.0:
        features = features - spec.mean
    if not isinstance(spec.std, float):
        return features / _statistic(spec.std, features.device)
    return features / spec.std if spec.std != 1.0 else features


def scaled(
    waveform: Tensor,  # [B, T]
    spec: LogMelSpec,
) -> Tensor:
    """Samples in the units of the front-end, float32, with dither."""
    scale = spec.sample_scale(waveform.dtype)
    signal = waveform.to(torch.float32)
    if scale != 1.0:
        signal = signal * scale
    return signal + spec.dither * torch.randn_like(signal) if spec.dither else signal


def _mirrored(index: Tensor, length: Tensor, repeat_end: bool) -> Tensor:
    """Indices reflected back and forth into [0, length): "reflect" of numpy.pad, or "symmetric" with `repeat_end`."""
    period = (2 * length - (0 if repeat_end else 2)).clamp(min=1)
    index = index % period
    return torch.minimum(index, period - int(repeat_end) - index).clamp(min=0)


def _extended(
    signal: Tensor,  # [B, T] float32
    lengths: Tensor | None,  # [B]
    spec: LogMelSpec,
) -> Tensor:
    """Each clip with what its frames need before its start and after its own end; the first frame starts at 0."""
    batch, samples = signal.shape
    if lengths is not None:
        inside = torch.arange(samples, dtype=torch.int32, device=signal.device) < lengths[:, None].int()
        signal = torch.where(inside, signal, 0.0)  # not a product: NaN in the padding stays out
    if spec.framing == "snip_edges":
        return torch.nn.functional.pad(signal, (0, max(0, spec.win_length - samples)))
    before, after = max(0, spec.offset), max(0, spec.win_length - spec.offset)
    length = torch.full((1,), samples, device=signal.device) if lengths is None else lengths
    steps = torch.arange(-before, after, device=signal.device)
    steps = torch.where(steps < 0, steps, length[:, None] + steps)  # outside the clip, [B or 1, before + after]
    inner = _mirrored(steps, length[:, None], repeat_end=spec.framing == "no_snip_edges")
    ends = signal.gather(1, inner.expand(batch, -1))
    head, tail = ends.split((before, after), dim=1)
    extended = torch.cat((head, signal, tail), dim=1)
    if lengths is not None:
        extended.scatter_(1, before + steps[:, before:], tail)
    return extended[:, max(0, -spec.offset) :]


def _mel_energies(
    signal: Tensor,  # [B, extended samples] float32
    frames: int,
    frames_a_chunk: int,
    spec: LogMelSpec,
) -> Tensor:
    """Mel energies [B, frames, n_mels]; a clip longer than a chunk is cut into several."""
    taps, bands = _constants(spec, signal.device)
    framed = signal.unfold(1, spec.win_length, spec.hop_length)[:, :frames]  # view
    energies = []
    for frame in framed.split(frames_a_chunk, dim=1):
        if spec.remove_dc:
            frame = frame - frame.mean(dim=-1, keepdim=True)
        if spec.preemphasis:
            frame = torch.sub(frame[..., 1:], frame[..., :-1], alpha=spec.preemphasis)
        spectrum = torch.fft.rfft(frame * taps, n=spec.n_fft)
        # The square on the parts: complex abs() takes a square root only to undo it, at five times the cost.
        magnitude = spectrum.real.square() + spectrum.imag.square() if spec.power == 2 else spectrum.abs()
        energies.append(torch.cat([magnitude[..., low:high] @ weights for low, high, weights in bands], dim=-1))
    return torch.cat(energies, dim=1) if len(energies) > 1 else energies[0]


def finished(
    energies: Tensor,  # [B, frames, n_mels]
    frame_lengths: Tensor | None,  # [B]
    spec: LogMelSpec,
) -> Tensor:
    """Mel energies to features: log, the frames past a clip's end, dynamic range, normalisation."""
    energies = energies.clamp(min=spec.floor)
    features = energies.log() if spec.log == "ln" else energies.log10()
    if spec.log == "db":
        features = 10.0 * features
    frames = features.shape[1]
    if frame_lengths is not None:
        past_end = torch.arange(frames, device=features.device) >= frame_lengths[:, None]  # [B, frames]
        features = features.masked_fill(past_end[:, :, None], spec.log_padding)
    if spec.num_frames is not None:
        features = torch.nn.functional.pad(features, (0, 0, 0, spec.num_frames - frames), value=spec.log_padding)
    if spec.dynamic_range is not None:
        features = torch.maximum(features, features.amax(dim=(1, 2), keepdim=True) - spec.dynamic_range)
    return normalised(features, spec)


@contextlib.contextmanager
def _full_precision_matmul() -> Iterator[None]:
    """Keep the mel product in float32 where the user allows TF32 or bfloat16: those shift a log-mel by up to 0.01."""
    chosen = torch.get_float32_matmul_precision()
    if chosen == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


def log_mel_reference(waveform: Tensor, lengths: Tensor | None, spec: LogMelSpec) -> tuple[Tensor, Tensor]:
    """`log_mel` in float64 from the definitions, clip by clip: the reference for every engine. Slow; no dither.

    The transform is the DFT's own sum, the mel weights are interpolated filter by filter, the ends of a clip are
    walked sample by sample. Same arguments as `log_mel`, on the CPU; features are float64 and differentiable.
    """
    batch, samples = waveform.shape
    sizes = [samples] * batch if lengths is None else [int(length) for length in lengths]
    scale = spec.input_scale / (32768 if waveform.dtype == torch.int16 else 1)
    n_fft, win, hop = spec.n_fft, spec.win_length, spec.hop_length

    def number_of_frames(size: int) -> int:
        if size == 0:
            return 0
        count = {
            "center": 1 + size // hop,
            "snip_edges": 1 + (size - win) // hop if size >= win else 0,
            "no_snip_edges": (size + hop // 2) // hop,
        }[spec.framing]
        count = max(1, count - 1 if spec.drop_last_frame else count)
        return count if spec.num_frames is None else min(count, spec.num_frames)

    def source(position: int, size: int) -> int:
        """The sample of a clip that stands at a position, which may lie outside of it; -1 for a zero."""
        if spec.framing == "snip_edges":
            return position if position < size else -1
        repeat = spec.framing == "no_snip_edges"
        while size > 1 and not 0 <= position < size:
            position = -position - repeat if position < 0 else 2 * (size - 1) + repeat - position
        return position if size > 1 else 0

    n = np.arange(win)
    angle = 2 * np.pi * n / (win if spec.window == "hann" else win - 1)
    taps = torch.from_numpy(((1 - np.cos(angle)) / 2).clip(0) ** (0.85 if spec.window == "povey" else 1.0))
    phase = torch.from_numpy(2 * np.pi * (np.outer(n, np.arange(n_fft // 2 + 1)) % n_fft) / n_fft)

    def to_mel(frequency: float) -> float:
        if spec.mel_scale == "slaney" and frequency >= 1000:
            return 15 + 27 * math.log(frequency / 1000, 6.4)
        return frequency * 3 / 200 if spec.mel_scale == "slaney" else 1127 * math.log1p(frequency / 700)

    def to_hz(mel: float) -> float:
        if spec.mel_scale == "slaney" and mel >= 15:
            return 1000 * 6.4 ** ((mel - 15) / 27)
        return mel * 200 / 3 if spec.mel_scale == "slaney" else 700 * math.expm1(mel / 1127)

    rate = spec.mel_sampling_rate or spec.sampling_rate
    top = to_mel(rate / 2 if spec.f_max is None else spec.f_max)
    bottom = to_mel(spec.f_min)
    bins = [k * rate / n_fft for k in range(n_fft // 2 + 1)]
    bank = np.zeros((len(bins), spec.n_mels))
    for m in range(spec.n_mels):
        corners = [bottom + (top - bottom) * (m + i) / (spec.n_mels + 1) for i in range(3)]
        corners_hz = [to_hz(corner) for corner in corners]
        if spec.mel_scale == "kaldi":
            bank[:, m] = np.interp([to_mel(f) for f in bins], corners, [0, 1, 0])
        else:
            bank[:, m] = np.interp(bins, corners_hz, [0, 1, 0])
        if spec.mel_norm == "slaney":
            bank[:, m] *= 2 / (corners_hz[2] - corners_hz[0])
    weights = torch.from_numpy(bank)

    counts = [number_of_frames(size) for size in sizes]
    total = spec.num_frames or number_of_frames(samples)
    log_base = {"ln": 1.0, "log10": math.log(10), "db": math.log(10) / 10}[spec.log]
    padding = math.log(spec.floor) / log_base if spec.padding_value is None else spec.padding_value
    first = {"center": -(n_fft // 2) + (n_fft - win) // 2, "snip_edges": 0, "no_snip_edges": hop // 2 - win // 2}
    clips = []
    for clip, size, count in zip(waveform, sizes, counts, strict=True):
        rows = [[source(first[spec.framing] + t * hop + i, size) for i in range(win)] for t in range(count)]
        index = torch.tensor(rows, dtype=torch.int64).reshape(count, win)
        frame = torch.where(index < 0, 0.0, clip.double()[index.clamp(min=0)] * scale)
        if spec.remove_dc:
            frame = frame - frame.mean(1, keepdim=True)
        frame = frame - spec.preemphasis * torch.cat((frame[:, :1], frame[:, :-1]), 1)
        frame = frame * taps
        power = (frame @ phase.cos()) ** 2 + (frame @ phase.sin()) ** 2
        energy = (power if spec.power == 2 else power.sqrt()) @ weights
        logs = energy.clamp(min=spec.floor).log() / log_base
        logs = torch.cat((logs, torch.full((total - count, spec.n_mels), padding, dtype=torch.float64)))
        if spec.dynamic_range is not None:
            logs = torch.maximum(logs, logs.max() - spec.dynamic_range)
        mean, std = (torch.tensor(x, dtype=torch.float64) for x in (spec.mean, spec.std))
        clips.append((logs - mean) / std)
    return torch.stack(clips), torch.tensor(counts)
