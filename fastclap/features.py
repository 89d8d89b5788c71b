"""`LogMel`: the log-mel front-ends of the CLAP family by name, as a module that takes raw waveforms and their lengths.

A preset is a set of numbers for `log_mel`, taken from the code that its models were trained with; any of them can be
overridden. The module has no parameters and no buffers: it runs wherever the waveform is, adds nothing to a checkpoint,
and can be part of a model, so that features are made on the device.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import warnings
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fastclap.kernels.log_mel.operator import Masks, checked, log_mel
from fastclap.kernels.log_mel.spec import Batch, LogMelSpec, mel_bank
from fastclap.kernels.log_mel.torch_engine import silence

# The floor of torchaudio.compliance.kaldi: the spacing of float32 at 1.
_EPSILON = 2.0**-23

_KALDI = LogMelSpec(
    sampling_rate=16000,
    n_fft=512,
    win_length=400,
    hop_length=160,
    n_mels=80,
    window="povey",
    framing="snip_edges",
    remove_dc=True,
    preemphasis=0.97,
    mel_scale="kaldi",
    f_min=20.0,
    floor=_EPSILON,
)
_CLAP = LogMelSpec(
    sampling_rate=48000,
    n_fft=1024,
    win_length=1024,
    hop_length=480,
    n_mels=64,
    mel_scale="slaney",
    mel_norm="slaney",
    f_min=50.0,
    f_max=14000.0,
    log="db",
)

PRESETS = MappingProxyType(
    {
        "whisper": LogMelSpec(
            sampling_rate=16000,
            n_fft=400,
            win_length=400,
            hop_length=160,
            n_mels=80,
            mel_scale="slaney",
            mel_norm="slaney",
            f_max=8000.0,
            log="log10",
            dynamic_range=8.0,
            mean=-4.0,
            std=4.0,
            drop_last_frame=True,
        ),
        "kaldi": _KALDI,
        "clap": _CLAP,
        "clap-fusion": dataclasses.replace(_CLAP, mel_scale="htk", mel_norm=None),
        "ast": dataclasses.replace(
            _KALDI,
            n_mels=128,
            window="hann_symmetric",
            mean=-4.2677393,
            std=2 * 4.5689974,
            num_frames=1024,
            padding_value=0.0,
        ),
        "beats": dataclasses.replace(_KALDI, n_mels=128, input_scale=32768.0, mean=15.41663, std=2 * 6.55582),
        # lhotse's energy_floor, 1e-10, is that of a whole frame; its mel bands have the floor of torchaudio
        "clsp": dataclasses.replace(
            _KALDI, n_mels=128, framing="no_snip_edges", f_max=7600.0, padding_value=math.log(1e-10)
        ),
        "torchaudio": LogMelSpec(sampling_rate=16000, n_fft=400, win_length=400, hop_length=200, n_mels=128),
    }
)


MOST = 100_000  # spans, or mels of one: more only fills memory


@dataclass(frozen=True)
class SpecAugment:
    """Masks of spans of frames and of mels (arXiv 1904.08779), drawn for each clip on the waveform's device.

    A span of frames is 0 to `time_width` of the clip's own frames long, a span of mels 0 to `mel_width` mels; each
    width and each place in the clip is as likely as any other. Numbers come from torch's generator of the device.

    Raises:
        ValueError: a number is out of range, or none.
    """

    time_masks: int = 2
    time_width: float = 0.05  # of a clip's frames
    mel_masks: int = 2
    mel_width: int = 15

    def __post_init__(self) -> None:
        for name in ("time_masks", "mel_masks", "mel_width"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= MOST:
                raise ValueError(f"{name}={value!r}: must be an integer from 0 to {MOST}")
        if type(self.time_width) not in (int, float) or not 0 <= self.time_width <= 1:
            raise ValueError(f"time_width={self.time_width!r}: must lie in [0, 1], a share of a clip's frames")

    def masks(self, frame_lengths: Tensor, n_mels: int) -> Masks:
        """Spans [B, time_masks, 2] of frames and [B, mel_masks, 2] of mels for clips of `frame_lengths` [B] frames."""
        mels = torch.full_like(frame_lengths, n_mels)
        widest = torch.full_like(frame_lengths, min(self.mel_width, n_mels))
        time = self._spans(frame_lengths, (self.time_width * frame_lengths).long(), self.time_masks)
        return time, self._spans(mels, widest, self.mel_masks)

    @staticmethod
    def _spans(size: Tensor, widest: Tensor, count: int) -> Tensor | None:
        if count == 0:
            return None
        # float64: a float32 draw may round up to 1 times the number of places.
        draw = torch.rand(2, len(size), count, dtype=torch.float64, device=size.device)
        width = (draw[0] * (widest[:, None] + 1)).long()
        begin = (draw[1] * (size[:, None] - width + 1)).long()
        return torch.stack((begin, begin + width), dim=2)


class LogMel(nn.Module):
    """Log-mel features of a padded batch: `features, frame_lengths = LogMel("whisper")(waveform, lengths)`.

    Presets, each equal to its origin on a whole clip:

      whisper      transformers.WhisperFeatureExtractor; n_mels=128 for large-v3. It pads every clip with zeros to 30 s
                   first: to feed a Whisper encoder do the same (480,000 samples) and pass no lengths.
      kaldi        torchaudio.compliance.kaldi.fbank(num_mel_bins=80) on a waveform in [-1, 1]; Kaldi itself reads
                   16-bit values: input_scale=32768. framing="no_snip_edges" is snip_edges=False.
      clap         LAION-CLAP and transformers.ClapFeatureExtractor, truncation="rand_trunc" (mel bank of librosa)
      clap-fusion  the same, truncation="fusion" (mel bank of torchaudio); one channel, not its stack of four
      ast          transformers.ASTFeatureExtractor: 1024 frames
      beats        BEATs' preprocess: Kaldi on 16-bit values, normalised
      clsp         CLSP and lhotse: Kaldi, snip_edges=False, 128 mels, 20-7600 Hz, padding ln 1e-10
      torchaudio   MelSpectrogram() with its defaults, then log(max(mel, 1e-10))

    Overrides are the fields of `LogMelSpec`; window and hop stay in samples when sampling_rate changes. Two that are
    often asked for:

      speech from scratch  LogMel("kaldi", framing="no_snip_edges", mean=..., std=...)
      MS-CLAP 2023         LogMel("clap", sampling_rate=44100, hop_length=320, mel_sampling_rate=32000): its bank was
                           laid out for 32 kHz

    `mean` and `std` may hold a number for each mel, and dtype="bfloat16" or "float16" stores features in 16 bits.

    Dither and `spec_augment` are noise, for training: they are left out in eval mode, so that embeddings are
    reproducible. Masked features are `silence`. A warning says when overrides leave mel filters that no DFT bin falls
    into: their feature is constant.

    Raises:
        ValueError: the preset or an override is unknown, or a value is out of range.
    """

    def __init__(self, preset: str, *, spec_augment: SpecAugment | None = None, **overrides: object) -> None:
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
        fields = [field.name for field in dataclasses.fields(LogMelSpec)]
        for name in overrides:
            if name not in fields:
                close = difflib.get_close_matches(name, fields, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f": choose among {', '.join(fields)}"
                raise ValueError(f"LogMel({preset!r}) has no option {name!r}{hint}")
        self.preset = preset
        self.spec_augment = spec_augment
        self.overrides = dict(overrides)
        self.spec = dataclasses.replace(PRESETS[preset], **overrides)  # type: ignore[arg-type]
        self._spec_without_dither = dataclasses.replace(self.spec, dither=0.0)
        if overrides:
            empty = int((mel_bank(self.spec).max(axis=0) == 0).sum())
            if empty > int((mel_bank(PRESETS[preset]).max(axis=0) == 0).sum()):
                warnings.warn(
                    f"{empty} of {self.n_mels} mel filters contain no DFT bin: use fewer n_mels or a longer n_fft",
                    stacklevel=2,
                )

    @property
    def sampling_rate(self) -> int:
        """Hz."""
        return self.spec.sampling_rate

    @property
    def hop_length(self) -> int:
        """Samples from one frame to the next."""
        return self.spec.hop_length

    @property
    def n_mels(self) -> int:
        """Features a frame."""
        return self.spec.n_mels

    @property
    def silence(self) -> float | tuple[float, ...]:
        """The feature of every frame past a clip's end and of every masked one, except that past the end a
        `dynamic_range` raises it to the clip's own lower limit: (clip maximum - dynamic_range - mean) / std, if that is
        higher. A number for each mel where `mean` or `std` has."""
        return silence(self.spec)

    def frame_lengths(self, lengths: Tensor) -> Tensor:
        """Frames of clips of `lengths` samples (integer tensor of any shape), int64.

        Raises:
            TypeError: they are no tensor of integers.
        """
        if not isinstance(lengths, Tensor) or lengths.dtype.is_floating_point or lengths.dtype.is_complex:
            got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
            raise TypeError(f"lengths must be a tensor of integers, got {got}")
        return self.spec.frame_lengths(lengths)

    def forward(
        self,
        waveform: Tensor,  # [B, T] int16, or floating point in [-1, 1]
        lengths: Tensor | None = None,  # [B] samples of each clip; None: all T, or all from its offset
        offsets: Tensor | None = None,  # [B] first sample of each clip; None: 0
    ) -> tuple[Tensor, Tensor]:
        """(features [B, frames, n_mels], frame_lengths [B] int64), both on the waveform's device.

        Features are float32 unless `dtype` says otherwise. `log_mel` states what holds for short clips, crops, padding,
        NaN, gradients and errors.
        """
        spec = self.spec if self.training else self._spec_without_dither
        masks = None
        if self.training and self.spec_augment is not None:
            batch = checked(Batch(waveform, lengths, offsets))
            lengths, offsets = batch.lengths, batch.offsets
            masks = self.spec_augment.masks(self.frame_lengths(self._clip_lengths(batch)), self.n_mels)
        return log_mel(waveform, lengths, spec, offsets=offsets, masks=masks)

    @staticmethod
    def _clip_lengths(batch: Batch) -> Tensor:
        """Samples of each clip, on the waveform's device."""
        clips, samples = batch.waveform.shape
        whole = torch.full((clips,), samples, device=batch.waveform.device)
        if batch.offsets is not None:
            whole = samples - batch.offsets
        return whole if batch.lengths is None else torch.minimum(batch.lengths, whole)

    def extra_repr(self) -> str:
        augment = [] if self.spec_augment is None else [repr(self.spec_augment)]
        return ", ".join(
            [repr(self.preset), *augment, *(f"{name}={value!r}" for name, value in self.overrides.items())]
        )
