"""transformers' audio feature extractors (`patch("transformers_features")`).

Replaced: the step from samples to log-mel in WhisperFeatureExtractor (on its `device=`), ClapFeatureExtractor and
ASTFeatureExtractor. Left to the client: a mel bank that was exchanged, clips too short for a frame, an odd n_fft, and
AST's input in other types than float32.

Features are computed at the client's own precision, with one exception. Whisper's extractor, which uses torch where
there is one, and AST's, which uses torchaudio, take a float32 FFT. So does fastclap's log-mel; on a CPU its rms error
against float64 is the smaller on every sound where either exceeds 1e-6 (bench/records/logmel-errors). CLAP's extractor
computes in float64 with NumPy. The replacement computes in float64 too, with torch, in a third of the time: both are
within 4e-6 dB of the definition, where a float32 FFT would be off by 0.02 dB on speech and, with truncation="fusion",
by up to 3 dB in bands that hold next to nothing. The exception is AST's extractor without torchaudio, which falls back
to float64 in NumPy: the float32 replacement is faster, and off by up to 2e-4 on speech and 4e-3 next to pure tones (in
normalised features) where the client is within 2e-7.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastclap.drop_in.shared import Client, Method, cached_mel_bank, has_mel_bank, preset_spec
from fastclap.kernels.log_mel.operator import log_mel
from fastclap.kernels.log_mel.spec import LogMelSpec, window


def _whisper_features(owner: type, original: Method) -> Method:
    def _torch_extract_fbank_features(self: Any, waveform: np.ndarray, device: str = "cpu") -> np.ndarray:
        bank = self.mel_filters
        spec = preset_spec(
            "whisper",
            sampling_rate=self.sampling_rate,
            n_fft=self.n_fft,
            win_length=self.n_fft,
            hop_length=self.hop_length,
            n_mels=bank.shape[1],
            dither=getattr(self, "dither", 0.0),
        )
        samples = waveform.shape[-1]
        if spec is None or samples <= spec.n_fft // 2 or samples < spec.hop_length or not has_mel_bank(spec, bank):
            return original(self, waveform, device)
        clips = torch.from_numpy(waveform).to(device, torch.float32)  # integers are not scaled there
        features, _ = log_mel(clips.reshape(-1, samples), None, spec)
        return features.mT.reshape(*waveform.shape[:-1], spec.n_mels, -1).contiguous().cpu().numpy()

    return _torch_extract_fbank_features


def _clap_features(owner: type, original: Method) -> Method:
    def _np_extract_fbank_features(
        self: Any, waveform: np.ndarray, mel_filters: np.ndarray | None = None
    ) -> np.ndarray:
        if mel_filters is None or waveform.ndim != 1 or waveform.size == 0 or not np.isrealobj(waveform):
            return original(self, waveform, mel_filters)
        for preset in ("clap", "clap-fusion"):
            spec = preset_spec(
                preset,
                sampling_rate=self.sampling_rate,
                n_fft=self.fft_window_size,
                win_length=self.fft_window_size,
                hop_length=self.hop_length,
                n_mels=mel_filters.shape[1],
                f_min=self.frequency_min,
                f_max=self.frequency_max,
            )
            if spec is not None and has_mel_bank(spec, mel_filters):
                return decibels_in_float64(waveform, spec)
        return original(self, waveform, mel_filters)

    return _np_extract_fbank_features


def _ast_features(owner: type, original: Method) -> Method:
    def _extract_fbank_features(self: Any, waveform: np.ndarray, max_length: int) -> np.ndarray:
        rate = self.sampling_rate
        samples = int(rate * 25.0 * 0.001)  # of a window, rounded as torchaudio.compliance.kaldi does
        spec = preset_spec(
            "ast",
            sampling_rate=rate,
            n_fft=1 << max(samples - 1, 0).bit_length(),
            win_length=samples,
            hop_length=int(rate * 10.0 * 0.001),
            n_mels=self.num_mel_bins,
            num_frames=max_length,
            mean=0.0,  # the client normalises
            std=1.0,
        )
        # Without torchaudio the extractor has a mel bank and a window of its own, laid out for 16 kHz.
        if rate != 16000 and hasattr(self, "mel_filters"):
            spec = None
        if spec is None or waveform.ndim != 1 or waveform.dtype != np.float32 or len(waveform) < samples:
            return original(self, waveform, max_length)
        return log_mel(torch.from_numpy(waveform)[None], None, spec)[0][0].numpy()

    return _extract_fbank_features


CLIENT = Client(
    "transformers_features",
    modules=("transformers",),
    install="pip install transformers",
    methods={
        "WhisperFeatureExtractor._torch_extract_fbank_features": _whisper_features,
        "ClapFeatureExtractor._np_extract_fbank_features": _clap_features,
        "ASTFeatureExtractor._extract_fbank_features": _ast_features,
    },
)


def decibels_in_float64(
    waveform: np.ndarray,  # [samples]
    spec: LogMelSpec,  # of the CLAP family: centred frames, a window as long as the transform, decibels
) -> np.ndarray:
    """Log-mel [frames, n_mels], float32, of which every step is in float64."""
    padded = np.pad(waveform.astype(np.float64), spec.n_fft // 2, mode="reflect")
    frames = torch.from_numpy(padded).unfold(0, spec.n_fft, spec.hop_length)  # [frames, n_fft]
    taps, bank = torch.from_numpy(window(spec)), torch.from_numpy(cached_mel_bank(spec))
    energies = []
    for chunk in frames.split(128):  # a MB, which stays in the processor's cache
        spectrum = torch.fft.rfft(chunk * taps)
        energies.append((spectrum.real.square() + spectrum.imag.square()) @ bank)
    return (10.0 * torch.cat(energies).clamp(min=spec.floor).log10()).float().numpy()
