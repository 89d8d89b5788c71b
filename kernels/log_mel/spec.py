"""`LogMelSpec`: the numbers of a log-mel front-end, and the mel bank and window that follow from them.

`Batch` is what they are applied to: the clips, checked by `operator.log_mel`, as every engine receives them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

_IntOrTensor = TypeVar("_IntOrTensor", int, Tensor)

LARGEST = 1 << 24  # of the integers: engines count samples and frames with 32 bits
LARGEST_BANK = 1 << 27  # numbers of a mel bank, twice over: 512 MB
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)  # that float32 tells from 0
EDGES = {"snip_edges": 0, "center": 1, "no_snip_edges": 2}  # the framings, as the compiled engines number them


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

    # What follows from them. Attributes, not properties: a compiler reads them where it could not follow their making.
    mel_rate: ClassVar[int]  # the sampling rate that the mel bank is laid out for
    mel_f_max: ClassVar[float]  # upper edge of the mel bank, Hz
    count_terms: ClassVar[tuple[int, int]]  # frames of a clip: (samples + the first) // hop_length + the second
    offset: ClassVar[int]  # samples by which the first frame's window starts before the clip; negative: after its start
    log_scale: ClassVar[float]  # what the natural logarithm is multiplied by
    log_padding: ClassVar[float]  # log-mel of frames past a clip's end, before `dynamic_range` and the affine step
    one_affine: ClassVar[bool]  # whether `mean` and `std` are the same for all mels
    key: ClassVar[str]  # all of the fields, from which an operator of torch makes an equal spec
    noiseless: ClassVar[LogMelSpec]  # for samples to which `scaled` has added the dither

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            self._check_statistic(name)
        for name, expected in _field_types().items():
            value = getattr(self, name)
            if float in expected and type(value) is int:
                value = _as_float(name, value)
                object.__setattr__(self, name, value)
            choices = tuple(option for option in expected if isinstance(option, str))
            if choices and value not in choices and type(value) not in expected:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}")
            if not choices and type(value) not in expected:
                kinds = " or ".join("None" if kind is type(None) else kind.__name__ for kind in expected)
                raise ValueError(f"{name}={value!r}: expected {kinds}, got {type(value).__name__}")
            if isinstance(value, float):
                _as_float(name, value)
        for name in ("sampling_rate", "n_fft", "win_length", "hop_length", "n_mels", "mel_sampling_rate", "num_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={_shown(value)}: must be at least 1")
            if value is not None and value > LARGEST:
                raise ValueError(f"{name}={_shown(value)}: must be at most {LARGEST}")
        if self.n_mels * self.n_fft > LARGEST_BANK:
            raise ValueError(f"n_mels={self.n_mels} filters over n_fft={self.n_fft} bins: more than memory is for")
        for name in ("input_scale", "floor"):
            if getattr(self, name) < SMALLEST:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0, at least {SMALLEST:.4g}")
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
        mel_rate = self.mel_sampling_rate or self.sampling_rate
        object.__setattr__(self, "mel_rate", mel_rate)
        object.__setattr__(self, "mel_f_max", mel_rate / 2 if self.f_max is None else self.f_max)
        if not 0 <= self.f_min < self.mel_f_max:
            raise ValueError(f"f_min={self.f_min} Hz: must lie in [0, f_max={self.mel_f_max} Hz)")
        if self.mel_f_max > self.mel_rate / 2:
            raise ValueError(
                f"f_max={self.f_max} Hz: above half the sampling rate of {self.mel_rate} Hz; lower it or set it to None"
            )
        offsets = {
            "center": self.n_fft // 2 - (self.n_fft - self.win_length) // 2,
            "snip_edges": 0,
            "no_snip_edges": self.win_length // 2 - self.hop_length // 2,
        }
        object.__setattr__(self, "offset", offsets[self.framing])
        add, plus = {
            "center": (0, 1),
            "snip_edges": (-self.win_length, 1),
            "no_snip_edges": (self.hop_length // 2, 0),
        }[self.framing]
        object.__setattr__(self, "count_terms", (add, plus - int(self.drop_last_frame)))
        log_scales = {"ln": 1.0, "log10": 1.0 / math.log(10.0), "db": 10.0 / math.log(10.0)}
        object.__setattr__(self, "log_scale", log_scales[self.log])
        padding = self.padding_value
        if padding is None:
            padding = {"ln": math.log, "log10": math.log10, "db": lambda x: 10 * math.log10(x)}[self.log](self.floor)
        object.__setattr__(self, "log_padding", padding)
        object.__setattr__(self, "one_affine", isinstance(self.mean, float) and isinstance(self.std, float))
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
            _as_float(name, number)
            if name == "std" and number < SMALLEST:
                raise ValueError(f"{name}={value!r}: must be above 0, at least {SMALLEST:.4g}")
        if many and len(values) != self.n_mels:
            raise ValueError(f"{name} has {len(values)} numbers for n_mels={self.n_mels}")
        floats = tuple(float(number) for number in values)
        object.__setattr__(self, name, floats if many else floats[0])

    def sample_scale(self, dtype: torch.dtype) -> float:
        """Factor from samples of a dtype to the units of the front-end."""
        return self.input_scale / 32768.0 if dtype == torch.int16 else self.input_scale

    def _count(self, samples: _IntOrTensor) -> _IntOrTensor:
        """Frames by the origin's rule alone; not positive for a clip that is too short for it."""
        add, plus = self.count_terms
        return (samples + add) // self.hop_length + plus

    def frames(self, samples: int) -> int:
        """Frames of a clip of `samples` samples: none if it is empty, else at least 1 and at most num_frames."""
        frames = max(1, self._count(samples)) if samples > 0 else 0
        return frames if self.num_frames is None else min(frames, self.num_frames)

    def padded_frames(self, samples: int) -> int:
        """Frames that the features of a batch have whose clips are padded to `samples`."""
        return self.num_frames or self.frames(samples)

    def frame_lengths(self, lengths: Tensor) -> Tensor:
        """`frames` of each of `lengths` (integer tensor of any shape, on any device), int64."""
        lengths = lengths.to(torch.int64)
        return self._count(lengths).clamp(min=1, max=self.num_frames).masked_fill(lengths < 1, 0)


class Batch(NamedTuple):
    """A padded batch of clips, as engines receive it: sizes agree, integers are int64 on the waveform's device.

    Masks are spans of frames and of mels, begin and end. See `operator.log_mel`.
    """

    waveform: Tensor  # [B, T] int16, or floating point in [-1, 1]
    lengths: Tensor | None = None  # [B] samples of each clip
    offsets: Tensor | None = None  # [B] first sample of each clip
    time_masks: Tensor | None = None  # [B, n, 2]
    mel_masks: Tensor | None = None  # [B, m, 2]

    def cropped(self, spec: LogMelSpec) -> tuple[Tensor, Tensor | None, int, Tensor]:
        """Each clip moved to the front: (waveform, lengths, frames of its whole width, frame lengths [B] int64)."""
        waveform, lengths = self.waveform, self.lengths
        batch, samples = waveform.shape
        if self.offsets is not None:
            index = self.offsets[:, None] + torch.arange(samples, device=waveform.device)
            waveform = waveform.gather(1, index.clamp(max=samples - 1))
            left = samples - self.offsets
            lengths = left if lengths is None else torch.minimum(lengths, left)
        frames = spec.frames(samples)
        if lengths is None:
            return waveform, None, frames, torch.full((batch,), frames, device=waveform.device)
        return waveform, lengths, frames, spec.frame_lengths(lengths)

    def readable(self, dtypes: Collection[torch.dtype]) -> Batch:
        """As compiled code reads it: samples of one of these dtypes, else float32, side by side; spans in order."""
        waveform, _, _, time, mel = self
        waveform = (waveform if waveform.dtype in dtypes else waveform.to(torch.float32)).resolve_neg()
        if waveform.stride(1) != 1:
            waveform = waveform.contiguous()
        time, mel = (None if spans is None else spans.contiguous() for spans in (time, mel))
        return self._replace(waveform=waveform, time_masks=time, mel_masks=mel)

    def clips(self, some: slice) -> Batch:
        """Some of the clips."""
        return Batch(*(None if x is None else x[some] for x in self))  # type: ignore[arg-type]


def _as_float(name: str, value: float) -> float:
    """The number, which float32 has to hold.

    Raises:
        ValueError: it does not.
    """
    if not abs(value) <= float(np.finfo(np.float32).max):
        raise ValueError(f"{name}={_shown(value)}: must be finite, and so in float32")
    return float(value)


def _shown(value: float) -> str:
    """A number, but not thousands of digits of one, which Python refuses to write."""
    return repr(value) if isinstance(value, float) or value.bit_length() < 64 else f"({value.bit_length()} bits)"


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


def exponent_step(scale: float) -> tuple[float, float]:
    """What one more in the exponent of a number adds to `scale` times its natural logarithm: 12 bits, and the rest.

    An exponent times the first is exact in float32.
    """
    step = math.log(2.0) * scale
    fraction, exponent = math.frexp(step)
    high = math.ldexp(round(fraction * 4096), exponent - 12)
    return high, step - high
