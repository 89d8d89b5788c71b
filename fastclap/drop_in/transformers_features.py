"""The drop-in for transformers_features; see `fastclap.drop_in`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastclap.drop_in.shared import (
    Method,
    _preset,
    _same_bank,
)
from fastclap.kernels.log_mel.operator import log_mel


def _whisper_features(owner: type, original: Method) -> Method:
    def _torch_extract_fbank_features(self: Any, waveform: np.ndarray, device: str = "cpu") -> np.ndarray:
        bank = self.mel_filters
        spec = _preset(
            "whisper",
            sampling_rate=self.sampling_rate,
            n_fft=self.n_fft,
            win_length=self.n_fft,
            hop_length=self.hop_length,
            n_mels=bank.shape[1],
            dither=getattr(self, "dither", 0.0),
        )
        samples = waveform.shape[-1]
        if spec is None or samples <= spec.n_fft // 2 or samples < spec.hop_length or not _same_bank(bank, spec):
            return original(self, waveform, device)
        clips = torch.from_numpy(waveform).to(device, torch.float32)  # integers are not scaled there
        features, _ = log_mel(clips.reshape(-1, samples), None, spec)
        return features.mT.reshape(*waveform.shape[:-1], spec.n_mels, -1).contiguous().cpu().numpy()

    return _torch_extract_fbank_features


def _clap_features(owner: type, original: Method) -> Method:
    def _np_extract_fbank_features(
        self: Any, waveform: np.ndarray, mel_filters: np.ndarray | None = None
    ) -> np.ndarray:
        usable = mel_filters is not None and waveform.ndim == 1 and waveform.size > 0 and np.isrealobj(waveform)
        for preset in ("clap", "clap-fusion") if usable else ():
            spec = _preset(
                preset,
                sampling_rate=self.sampling_rate,
                n_fft=self.fft_window_size,
                win_length=self.fft_window_size,
                hop_length=self.hop_length,
                n_mels=mel_filters.shape[1],  # type: ignore[union-attr]
                f_min=self.frequency_min,
                f_max=self.frequency_max,
            )
            if spec is not None and _same_bank(mel_filters, spec):
                return log_mel(torch.from_numpy(waveform.astype(np.float32))[None], None, spec)[0][0].numpy()
        return original(self, waveform, mel_filters)

    return _np_extract_fbank_features


def _ast_features(owner: type, original: Method) -> Method:
    def _extract_fbank_features(self: Any, waveform: np.ndarray, max_length: int) -> np.ndarray:
        rate = self.sampling_rate
        window = int(rate * 25.0 * 0.001)  # torchaudio.compliance.kaldi's rounding
        spec = _preset(
            "ast",
            sampling_rate=rate,
            n_fft=1 << max(window - 1, 0).bit_length(),
            win_length=window,
            hop_length=int(rate * 10.0 * 0.001),
            n_mels=self.num_mel_bins,
            num_frames=max_length,
            mean=0.0,  # the client normalises
            std=1.0,
        )
        # Without torchaudio the extractor has a mel bank and a window of its own, laid out for 16 kHz.
        same = spec is not None and (rate == 16000 or not hasattr(self, "mel_filters"))
        if not same or waveform.ndim != 1 or waveform.dtype != np.float32 or len(waveform) < window:
            return original(self, waveform, max_length)
        return log_mel(torch.from_numpy(waveform)[None], None, spec)[0][0].numpy()  # type: ignore[arg-type]

    return _extract_fbank_features
