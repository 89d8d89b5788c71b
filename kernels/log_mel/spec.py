"""Log-mel spectrogram of a padded batch of waveforms: one definition, a torch engine and a float64 reference.

    waveform -> frames -> (DC removal, pre-emphasis) -> window -> |DFT|^p -> mel bank -> log -> (clamp) -> affine

Every front-end of the CLAP family (Whisper, LAION-CLAP, AST, BEATs, Kaldi, torchaudio) is one set of numbers in
`LogMelSpec`. What none of them has is lengths: here each clip is reflected at its own end, so a clip alone, in a
batch or zero-padded gives the same features.

The engine is quick on a CPU for three reasons. Frames are contiguous rows [clips, frames, n_fft], so the FFT and the
mel product read memory in order (torchaudio's and torch.stft's [n_fft/2, frames] layout makes the mel product a
strided one). The mel bank is banded: four products, each over the bins its mels touch, do a quarter of the work of the
dense one. The batch goes through in chunks of a few hundred frames, so that they stay in cache; this also bounds the
memory beyond input and output, whatever the batch.

Other engines compute the same: C++ on the CPU (`fastclap.kernels.native`) and one Triton launch on a GPU
(`fastclap.kernels.logmel_triton`); `log_mel` picks. torch.compile sees one operator, `fastclap::log_mel`, whichever it
is; eager calls that need no gradient take a shorter way than an operator's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastclap.kernels import dispatch

# Samples of framed signal that go through at once. A CPU wants them in its cache, a GPU wants few launches.
CPU_CHUNK = 1 << 18
GPU_CHUNK = 1 << 26

BACKENDS = ("auto", "torch", "native", "triton")
# Masks of a batch: spans of frames [B, n, 2] and of mels [B, m, 2], begin and end, integers on the waveform's device.
Masks = tuple[Tensor | None, Tensor | None]

_IntOrTensor = TypeVar("_IntOrTensor", int, Tensor)


@dataclass(frozen=True)
class LogMelSpec:
    """The numbers that define a log-mel front-end. Lengths are in samples at `sampling_rate`, frequencies in Hz.

    Framing, with its origin:
      "center"         torch.stft / librosa: frame t is centred on sample t*hop, the ends are reflected without
                       repeating the end sample; 1 + length//hop frames.
      "snip_edges"     Kaldi: frames lie inside the clip; 1 + (length - win)//hop frames.
      "no_snip_edges"  Kaldi with snip_edges=false: (length + hop//2)//hop frames, the ends are reflected and the end
                       sample is repeated.
    A clip with at least one sample has at least one frame: a reflection longer than the clip goes on back and forth
    (as numpy.pad does), and under "snip_edges" a clip shorter than the window is followed by zeros.
    """

    sampling_rate: int
    n_fft: int  # even; longer than win_length: the windowed frame is zero-padded
    win_length: int
    hop_length: int
    n_mels: int
    window: Literal["hann", "hann_symmetric", "povey"] = "hann"  # "hann" is the periodic one; povey = symmetric^0.85
    framing: Literal["center", "snip_edges", "no_snip_edges"] = "center"
    input_scale: float = 1.0  # full scale in the units of the origin (Kaldi: 32768)
    dither: float = 0.0  # standard deviation of the Gaussian noise added to the scaled samples
    remove_dc: bool = False  # subtract each frame's mean
    preemphasis: float = 0.0  # x[i] - c*x[i-1] inside each frame
    power: float = 2.0  # 1: magnitude, 2: power
    mel_scale: Literal["htk", "slaney", "kaldi"] = "htk"  # "kaldi": HTK scale, triangles straight in mel, not in Hz
    mel_norm: Literal["slaney"] | None = None  # "slaney": each triangle has unit area in Hz
    f_min: float = 0.0
    f_max: float | None = None  # None: half the sampling rate
    mel_sampling_rate: int | None = None  # the rate the mel bank is laid out for, where it is not the audio's
    log: Literal["ln", "log10", "db"] = "ln"  # "db" is 10*log10
    floor: float = 1e-10  # mel energies below it are raised to it before the log
    dynamic_range: float | None = None  # per clip: raise values below (clip maximum - dynamic_range), in log units
    mean: float | tuple[float, ...] = 0.0  # features = (log-mel - mean) / std; a tuple has a number for each mel
    std: float | tuple[float, ...] = 1.0
    drop_last_frame: bool = False
    num_frames: int | None = None  # cut or fill every clip to this many frames
    padding_value: float | None = None  # log-mel of frames past a clip's end; None: digital silence, the log of `floor`
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the features; they are computed in float32

    key: ClassVar[str]  # all of the fields, from which `_spec_of` makes an equal spec
    noiseless: ClassVar[LogMelSpec]  # for samples to which `_scaled` has added the dither

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            self._check_statistic(name)
        for name, expected in _field_types().items():
            value = getattr(self, name)
            if float in expected and type(value) is int:
                value = float(value)
                object.__setattr__(self, name, value)
            choices = tuple(option for option in expected if isinstance(option, str))
            if choices and value not in choices and type(value) not in expected:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}")
            if not choices and type(value) not in expected:
                kinds = " or ".join("None" if kind is type(None) else kind.__name__ for kind in expected)
                raise ValueError(f"{name}={value!r}: expected {kinds}, got {type(value).__name__}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}={value!r}: must be finite")
        for name in ("sampling_rate", "n_fft", "win_length", "hop_length", "n_mels", "mel_sampling_rate", "num_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        for name in ("input_scale", "floor"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        if self.n_fft % 2:
            raise ValueError(f"n_fft={self.n_fft}: must be even")
        if not 2 <= self.win_length <= self.n_fft:
            raise ValueError(f"win_length={self.win_length}: must lie in [2, n_fft={self.n_fft}]; set n_fft too")
        if not 0 <= self.preemphasis <= 1:
            raise ValueError(f"preemphasis={self.preemphasis}: must lie in [0, 1]")
        if self.power not in (1.0, 2.0):
            raise ValueError(f"power={self.power}: choose 1 (magnitude) or 2 (power)")
        if self.dither < 0:
            raise ValueError(f"dither={self.dither}: must not be negative")
        if self.dynamic_range is not None and self.dynamic_range < 0:
            raise ValueError(f"dynamic_range={self.dynamic_range}: must not be negative")
        if not 0 <= self.f_min < self.mel_f_max:
            raise ValueError(f"f_min={self.f_min} Hz: must lie in [0, f_max={self.mel_f_max} Hz)")
        if self.mel_f_max > self.mel_rate / 2:
            raise ValueError(
                f"f_max={self.f_max} Hz: above half the sampling rate of {self.mel_rate} Hz; lower it or set it to None"
            )
        # Attributes, not properties: a compiler reads them where it could not follow their making.
        object.__setattr__(self, "key", json.dumps(dataclasses.asdict(self)))
        quiet = dataclasses.replace(self, dither=0.0, input_scale=1.0) if self.dither else self
        object.__setattr__(self, "noiseless", quiet)

    def _check_statistic(self, name: str) -> None:
        value = getattr(self, name)
        many = isinstance(value, (list, tuple))
        values = value if many else (value,)
        for number in values:
            if type(number) not in (int, float):
                kind = type(number).__name__
                raise ValueError(f"{name}={value!r}: expected float or {self.n_mels} floats, got {kind}")
            if not math.isfinite(number):
                raise ValueError(f"{name}={value!r}: must be finite")
            if name == "std" and number <= 0:
                raise ValueError(f"{name}={value!r}: must be above 0")
        if many and len(values) != self.n_mels:
            raise ValueError(f"{name} has {len(values)} numbers for n_mels={self.n_mels}")
        floats = tuple(float(number) for number in values)
        object.__setattr__(self, name, floats if many else floats[0])

    @property
    def mel_rate(self) -> int:
        """The sampling rate that the mel bank is laid out for."""
        return self.mel_sampling_rate or self.sampling_rate

    @property
    def mel_f_max(self) -> float:
        """Upper edge of the mel bank, Hz."""
        return self.mel_rate / 2 if self.f_max is None else self.f_max

    @property
    def offset(self) -> int:
        """Samples by which the first frame's window starts before the clip (negative: after its first sample)."""
        if self.framing == "center":
            return self.n_fft // 2 - (self.n_fft - self.win_length) // 2
        if self.framing == "snip_edges":
            return 0
        return self.win_length // 2 - self.hop_length // 2

    @property
    def log_padding(self) -> float:
        """Log-mel of the frames past a clip's end, before `dynamic_range` and the affine step."""
        if self.padding_value is not None:
            return self.padding_value
        return {"ln": math.log, "log10": math.log10, "db": lambda x: 10 * math.log10(x)}[self.log](self.floor)

    def _count(self, samples: _IntOrTensor) -> _IntOrTensor:
        """Frames by the origin's rule alone; not positive for a clip that is too short for it."""
        if self.framing == "center":
            frames = samples // self.hop_length + 1
        elif self.framing == "snip_edges":
            frames = (samples - self.win_length) // self.hop_length + 1
        else:
            frames = (samples + self.hop_length // 2) // self.hop_length
        return frames - int(self.drop_last_frame)

    def frames(self, samples: int) -> int:
        """Frames of a clip of `samples` samples: none if it is empty, else at least 1 and at most num_frames."""
        frames = max(1, self._count(samples)) if samples > 0 else 0
        return frames if self.num_frames is None else min(frames, self.num_frames)

    def frame_lengths(self, lengths: Tensor) -> Tensor:
        """`frames` of each of `lengths` (integer tensor of any shape, on any device), int64."""
        lengths = lengths.to(torch.int64)
        return self._count(lengths).clamp(min=1, max=self.num_frames).masked_fill(lengths < 1, 0)


@lru_cache(maxsize=1)
def _field_types() -> dict[str, tuple[Any, ...]]:
    """What each field of LogMelSpec may be: types, and for a choice the strings."""
    expected = {}
    hints = typing.get_type_hints(LogMelSpec)
    for name in (field.name for field in dataclasses.fields(LogMelSpec)):
        if name in ("mean", "std"):
            continue
        hint = hints[name]
        options: list[Any] = []
        for option in typing.get_args(hint) or (hint,):
            options += typing.get_args(option) or (option,)
        expected[name] = tuple(options)
    return expected


def hz_to_mel(frequency: np.ndarray, scale: str) -> np.ndarray:
    """Hz to mel, float64. HTK: 2595 log10(1 + f/700). Slaney (Auditory Toolbox): linear to 1 kHz, then logarithmic."""
    if scale != "slaney":
        return 2595.0 * np.log10(1.0 + frequency / 700.0)
    log_part = 15.0 + np.log(np.maximum(frequency, 1000.0) / 1000.0) * (27.0 / np.log(6.4))
    return np.where(frequency < 1000.0, frequency * 3.0 / 200.0, log_part)


def mel_to_hz(mel: np.ndarray, scale: str) -> np.ndarray:
    """Inverse of `hz_to_mel`."""
    if scale != "slaney":
        return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    return np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * np.exp((mel - 15.0) * (np.log(6.4) / 27.0)))


def mel_bank(spec: LogMelSpec) -> np.ndarray:
    """Mel filter bank [n_fft/2 + 1, n_mels], float64: triangles between points equally spaced in mel.

    A filter narrower than the DFT's bins can miss them all; its column is zero, as in torchaudio and librosa.
    """
    edges = hz_to_mel(np.array([spec.f_min, spec.mel_f_max]), spec.mel_scale)
    points = np.linspace(edges[0], edges[1], spec.n_mels + 2)
    frequencies = np.arange(spec.n_fft // 2 + 1) * (spec.mel_rate / spec.n_fft)
    points_hz = mel_to_hz(points, spec.mel_scale)
    x, corners = (
        (hz_to_mel(frequencies, spec.mel_scale), points) if spec.mel_scale == "kaldi" else (frequencies, points_hz)
    )
    rise = (x[:, None] - corners[None, :-2]) / (corners[1:-1] - corners[:-2])
    fall = (corners[None, 2:] - x[:, None]) / (corners[2:] - corners[1:-1])
    bank = np.maximum(0.0, np.minimum(rise, fall))
    if spec.mel_norm == "slaney":
        bank *= 2.0 / (points_hz[2:] - points_hz[:-2])
    return bank


def window(spec: LogMelSpec) -> np.ndarray:
    """Analysis window [win_length], float64."""
    period = spec.win_length if spec.window == "hann" else spec.win_length - 1
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(spec.win_length) / period)
    return np.maximum(hann, 0.0) ** 0.85 if spec.window == "povey" else hann


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


def log_mel(
    waveform: Tensor,  # [B, T] int16, or floating point in [-1, 1]
    lengths: Tensor | None,  # [B] integers, samples of each clip; None: all T, or all from its offset
    spec: LogMelSpec,
    *,
    offsets: Tensor | None = None,  # [B] integers, first sample of each clip; None: 0
    masks: Masks | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-mel features of a batch: (features [B, frames, n_mels] of spec.dtype, frame_lengths [B] int64).

    int16 is scaled by 1/32768. Features are always computed in float32, also under autocast, and are differentiable
    in a floating-point waveform (a gradient on the CPU keeps the frames of the whole batch in memory; without one,
    memory beyond input and output is that of a chunk or of one clip). `frames` is that of a clip of T samples, or
    spec.num_frames.

    A clip is waveform[b, offset : offset + length]: samples outside of it are never used, its ends are where the
    reflection is, and the features are those of the same samples alone. Frames past its last are set after the log to
    `spec.padding_value`, then clamped and normalised as the rest. Frames that contain a NaN or infinite sample are NaN,
    and with a `dynamic_range` all frames of that clip; other clips are not touched.

    `masks` (SpecAugment) are two tensors of spans, begin and end, or None: of frames and of mels. What lies in a span
    is set last of all to the normalised `spec.log_padding`, the value of digital silence unless the front-end has its
    own, and gets no gradient; an empty span (end <= begin) masks nothing.

    With `spec.dither`, noise is drawn from torch's generator of the waveform's device, once a sample.

    `backend`: "torch"; "native", C++ on the CPU without a gradient; "triton", a GPU of compute capability 8.0 or later
    (or any tensor in Triton's interpreter); "auto", the quickest of them that can.

    Raises ValueError for a waveform that is not [B, T] or is empty, for a dtype other than int16 or floating point, for
    lengths or offsets that are not B integers with 0 <= offset <= offset + length <= T, for masks of another shape, and
    for a backend that cannot. Lengths and offsets on a GPU are clamped instead: reading them would stall it.
    """
    if spec.dither:
        lengths, offsets = _check(waveform, lengths, offsets, masks)
        waveform, spec = _scaled(waveform, spec), spec.noiseless
    time_masks, mel_masks = (None, None) if masks is None else masks
    if torch.compiler.is_compiling():
        return torch.ops.fastclap.log_mel(waveform, lengths, offsets, time_masks, mel_masks, spec.key, backend)
    lengths, offsets = _check(waveform, lengths, offsets, masks)
    engine = _engine(waveform, spec, backend)
    if engine == "triton" and waveform.requires_grad and torch.is_grad_enabled():
        return torch.ops.fastclap.log_mel(waveform, lengths, offsets, time_masks, mel_masks, spec.key, backend)
    return _compute(waveform, lengths, offsets, time_masks, mel_masks, spec, engine)


def _engine(waveform: Tensor, spec: LogMelSpec, backend: str) -> str:
    """The engine for checked arguments: "torch", "native" or "triton"."""
    from fastclap.kernels import native  # which builds on this module

    if backend == "auto":
        if dispatch.on_gpu(waveform):
            return "triton" if native.plain(waveform) and _triton_runs(waveform, spec) else "torch"
        return "native" if waveform.device.type == "cpu" and native.usable(waveform, spec) else "torch"
    if backend == "native":
        if not native.usable(waveform, spec):
            raise ValueError(f"backend='native' cannot compute this: {native.description()}; see native.usable")
    elif backend == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if not (dispatch.on_gpu(waveform) or interpreted):
            raise ValueError(f"backend='triton' needs a waveform on a GPU, got {waveform.device}")
        if not (native.plain(waveform) and _triton_runs(waveform, spec)):
            raise ValueError(
                "backend='triton' needs triton, compute capability 8.0 or later, n_fft of at most 4096 and a plain "
                "tensor; backend='torch' computes anything"
            )
    elif backend != "torch":
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(map(repr, BACKENDS))}")
    return backend


def _triton_runs(waveform: Tensor, spec: LogMelSpec) -> bool:
    return spec.n_fft <= 4096 and _gpu_has_triton(waveform.get_device())


@lru_cache(maxsize=16)
def _gpu_has_triton(index: int) -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return index < 0 or (torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= (8, 0))


def _compute(
    waveform: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    time_masks: Tensor | None,
    mel_masks: Tensor | None,
    spec: LogMelSpec,
    engine: str,
) -> tuple[Tensor, Tensor]:
    """`log_mel` of checked arguments, without dither, by one engine; of them only torch's is differentiable."""
    if engine == "triton":
        from fastclap.kernels.logmel_triton import log_mel_triton

        return log_mel_triton(waveform, lengths, spec, offsets, time_masks, mel_masks)
    if offsets is not None:
        waveform, lengths = _cropped(waveform, lengths, offsets)
    if engine == "native":
        from fastclap.kernels import native

        features, frame_lengths = native.log_mel_native(waveform, lengths, spec)
        return masked(features, time_masks, mel_masks, spec), frame_lengths
    batch, samples = waveform.shape
    frames = spec.frames(samples)
    if lengths is None:
        frame_lengths = torch.full((batch,), frames, device=waveform.device)
    else:
        frame_lengths = spec.frame_lengths(lengths)
    chunk = GPU_CHUNK if waveform.is_cuda else CPU_CHUNK * torch.get_num_threads()
    frames_a_chunk = max(1, chunk // spec.n_fft)
    clips_a_chunk = max(1, frames_a_chunk // frames)
    parts = []
    with torch.autocast(waveform.device.type, enabled=False), _full_precision_matmul():
        for first in range(0, batch, clips_a_chunk):
            clips = slice(first, first + clips_a_chunk)
            signal = _extend(_scaled(waveform[clips], spec), None if lengths is None else lengths[clips], spec)
            energies = _mel_energies(signal, frames, frames_a_chunk, spec)
            parts.append(finished(energies, None if lengths is None else frame_lengths[clips], spec))
    features = torch.cat(parts) if len(parts) > 1 else parts[0]
    return masked(features, time_masks, mel_masks, spec).to(getattr(torch, spec.dtype)), frame_lengths


def _cropped(waveform: Tensor, lengths: Tensor | None, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Each clip moved to the front, and its length."""
    samples = waveform.shape[1]
    left = samples - offsets
    at = offsets[:, None] + torch.arange(samples, device=waveform.device)
    return waveform.gather(1, at.clamp(max=samples - 1)), left if lengths is None else torch.minimum(lengths, left)


def masked(features: Tensor, time_masks: Tensor | None, mel_masks: Tensor | None, spec: LogMelSpec) -> Tensor:
    """Features [B, frames, n_mels] with the spans set to silence."""
    for spans, dim in ((time_masks, 1), (mel_masks, 2)):
        if spans is not None:
            at = torch.arange(features.shape[dim], device=features.device)
            hit = ((at >= spans[..., :1]) & (at < spans[..., 1:])).any(dim=1)
            features = torch.where(hit.unsqueeze(3 - dim), _silence(spec, features.device).to(features.dtype), features)
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


@lru_cache(maxsize=256)
def _spec_of(key: str) -> LogMelSpec:
    return LogMelSpec(**json.loads(key))


@torch.library.custom_op("fastclap::log_mel", mutates_args=())
def log_mel_op(
    waveform: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    time_masks: Tensor | None,
    mel_masks: Tensor | None,
    spec: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """What torch.compile sees of `log_mel`, whose dither comes before. ``spec`` is the key of one."""
    numbers, waveform = _spec_of(spec), waveform.detach()
    masks = (time_masks, mel_masks)
    lengths, offsets = _check(waveform, lengths, offsets, masks)
    with torch.no_grad():
        features, frame_lengths = _compute(
            waveform, lengths, offsets, *masks, numbers, _engine(waveform, numbers, backend)
        )
    return features.contiguous(), frame_lengths


@log_mel_op.register_fake
def _(
    waveform: Tensor, lengths: Tensor | None, offsets: Tensor | None, time_masks: Tensor | None,
    mel_masks: Tensor | None, spec: str, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    numbers = _spec_of(spec)
    batch, samples = waveform.shape
    shape = (batch, numbers.num_frames or numbers.frames(samples), numbers.n_mels)
    features = waveform.new_empty(shape, dtype=getattr(torch, numbers.dtype))
    return features, waveform.new_empty(batch, dtype=torch.int64)


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Autograd inside of an operator, where the dispatcher may have left it behind."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


@torch.library.custom_op("fastclap::log_mel_backward", mutates_args=())
def log_mel_backward_op(
    gradient: Tensor,  # [B, frames, n_mels], of the features
    waveform: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    time_masks: Tensor | None,
    mel_masks: Tensor | None,
    spec: str,
    backend: str,
) -> Tensor:
    """Gradient of the waveform [B, T], in its dtype, from what the forward pass was given: nothing else is kept."""
    numbers, waveform = _spec_of(spec), waveform.detach()
    masks = (time_masks, mel_masks)
    lengths, offsets = _check(waveform, lengths, offsets, masks)
    if _engine(waveform, numbers, backend) == "triton":
        from fastclap.kernels.logmel_triton import log_mel_gradient

        return log_mel_gradient(gradient, waveform, lengths, numbers, offsets, *masks)
    # A few clips at a time: autograd keeps their frames.
    chunk = GPU_CHUNK if waveform.is_cuda else CPU_CHUNK
    clips_a_chunk = max(1, chunk // (numbers.n_fft * gradient.shape[1]))
    parts = []
    for first in range(0, len(waveform), clips_a_chunk):
        clips = slice(first, first + clips_a_chunk)
        some = tuple(None if x is None else x[clips] for x in (lengths, offsets, *masks))
        with recorded():
            leaf = waveform[clips].detach().requires_grad_()
            features, _ = _compute(leaf, some[0], some[1], some[2], some[3], numbers, "torch")
            parts.append(torch.autograd.grad(features, leaf, gradient[clips])[0])
    return torch.cat(parts)


@log_mel_backward_op.register_fake
def _(
    gradient: Tensor, waveform: Tensor, lengths: Tensor | None, offsets: Tensor | None, time_masks: Tensor | None,
    mel_masks: Tensor | None, spec: str, backend: str,
) -> Tensor:  # fmt: skip
    return waveform.new_empty(waveform.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.spec, ctx.backend = inputs[5:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None or not ctx.needs_input_grad[0]:
        return (None,) * 7
    return torch.ops.fastclap.log_mel_backward(gradient, *ctx.saved_tensors, ctx.spec, ctx.backend), *(None,) * 6


log_mel_op.register_autograd(_backward, setup_context=_save)


def _check(
    waveform: Tensor, lengths: Tensor | None, offsets: Tensor | None = None, masks: Masks | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Validate the arguments of `log_mel`; lengths and offsets come back as int64 on the waveform's device."""
    if waveform.ndim != 2 or 0 in waveform.shape:
        hint = "; add a batch dimension: waveform[None]" if waveform.ndim == 1 else ""
        raise ValueError(f"waveform must be [batch, samples], neither of them 0, got {list(waveform.shape)}{hint}")
    if waveform.dtype != torch.int16 and not waveform.is_floating_point():
        raise ValueError(f"waveform must be int16 or floating point in [-1, 1], got {waveform.dtype}")
    if masks is not None:
        for name, spans in zip(("frames", "mels"), masks, strict=True):
            if spans is not None and (
                spans.ndim != 3 or spans.shape[0] != len(waveform) or spans.shape[2] != 2 or spans.dtype != torch.int64
            ):
                raise ValueError(
                    f"masks of {name} must be int64 [{len(waveform)}, spans, 2], got {spans.dtype} {list(spans.shape)}"
                )
    given = _integers("offsets", offsets, waveform)
    return _integers("lengths", lengths, waveform, given), given


def _integers(name: str, values: Tensor | None, waveform: Tensor, offsets: Tensor | None = None) -> Tensor | None:
    """Lengths or offsets, checked against what the clips hold; on the device they are clamped."""
    if values is None:
        return None
    values = torch.as_tensor(values)
    if values.shape != waveform.shape[:1] or values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(
            f"{name} must be {waveform.shape[0]} integers, got {values.dtype} of shape {list(values.shape)}"
        )
    samples = waveform.shape[1]
    if not torch.compiler.is_compiling() and values.device.type == "cpu":
        room = samples if offsets is None or offsets.device.type != "cpu" else samples - offsets
        wrong = ((values < 0) | (values > room)).nonzero()
        if wrong.numel():
            clip = int(wrong[0])
            after = "" if offsets is None else f", from offsets[{clip}]={int(offsets[clip])} on"
            raise ValueError(f"{name}[{clip}]={int(values[clip])}: the waveform holds {samples} samples a clip{after}")
    return values.to(waveform.device, torch.int64).clamp(0, samples)


def _scaled(
    waveform: Tensor,  # [B, T]
    spec: LogMelSpec,
) -> Tensor:
    """Samples in the units of the front-end, float32, with dither."""
    scale = spec.input_scale / 32768.0 if waveform.dtype == torch.int16 else spec.input_scale
    signal = waveform.to(torch.float32)
    if scale != 1.0:
        signal = signal * scale
    return signal + spec.dither * torch.randn_like(signal) if spec.dither else signal


def _mirror(index: Tensor, length: Tensor, repeat_end: bool) -> Tensor:
    """Indices reflected back and forth into [0, length): "reflect" of numpy.pad, or "symmetric" with `repeat_end`."""
    period = (2 * length - (0 if repeat_end else 2)).clamp(min=1)
    index = index % period
    return torch.minimum(index, period - int(repeat_end) - index).clamp(min=0)


def _extend(
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
    inner = _mirror(steps, length[:, None], repeat_end=spec.framing == "no_snip_edges")
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
    """`log_mel` in float64 from the definitions, clip by clip: the oracle of every engine. Slow; no dither.

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
