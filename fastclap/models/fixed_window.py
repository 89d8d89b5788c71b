"""Audio towers that see a window of one length, whatever the clip's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclap.config import AudioTowerConfig
from fastclap.models.audio_tower import AudioTower, features_of, zeros_that_count
from fastclap.models.layers import prepare_waveform


class FixedWindowTower(AudioTower):
    """Log-mel features of `clip_seconds` of every clip: a longer one is cut, a shorter one repeated.

    Args:
        config: of which the features, the window and the way of repeating are taken.
        n_mels: mel bands where the encoder fixes them.

    Attributes:
        window: samples.
        frames: of its features.

    Raises:
        ConfigError: features that are impossible.
    """

    window: int

    def __init__(self, config: AudioTowerConfig, n_mels: int | None = None) -> None:
        super().__init__()
        bands = {} if n_mels is None else {"n_mels": n_mels}
        self.log_mel = features_of("clap", {**bands, **config.feature_options})
        self.sampling_rate = self.log_mel.sampling_rate
        self.window = round(config.clip_seconds * self.sampling_rate)
        self.frames = int(self.log_mel.frame_lengths(torch.tensor(self.window)))
        self.whole_repeats = config.repeat == "whole"

    def features(
        self,
        audio: Tensor,  # int16 or float [B, T]
        lengths: Tensor | None,  # [B]
    ) -> Tensor:  # float32 [B, frames, bands]
        """Features of the window."""
        waveform, lengths = prepare_waveform(audio[:, : self.window], lengths)
        lengths = lengths.clamp(max=self.window)[:, None]
        position = torch.arange(self.window, device=waveform.device)
        repeated = waveform.gather(1, position % lengths)
        ends = None
        if self.whole_repeats:
            whole = self.window // lengths * lengths
            repeated = repeated.masked_fill(position >= whole, 0.0)
            ends = (whole[:, 0] + zeros_that_count(self.log_mel, self.window)).clamp(max=self.window)
        with torch.autocast(waveform.device.type, enabled=False):
            return self.log_mel(repeated, ends)[0]
