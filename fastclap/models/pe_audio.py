"""The audio encoder of PE-AV (Meta's Perception Encoder, arXiv 2512.19687), as transformers has it, as a tower.

A codec's convolutions (DAC, always fixed) make a frame of every 40 ms of the waveform at 48 kHz; a transformer reads
the frames with a class token before them, whose output is the clip's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastclap.config import AudioTowerConfig
from fastclap.errors import ConfigError
from fastclap.models.audio_tower import AudioTower
from fastclap.models.freezing import Stages
from fastclap.models.layers import length_mask, prepare_waveform
from fastclap.models.pretrained import checkpoint_layers, complete_config, transformers_config


class PEAudioTower(AudioTower):
    """transformers' `PeAudioEncoder` on whole clips, each of which is reflected at its end to fill the last frame.

    As in transformers and in Meta's code, the convolutions see past a clip's end, into the padding of a batch, and no
    gradient reaches the waveform.
    """

    base: Any
    sampling_rate = 48000
    equal_lengths_only = True

    def __init__(self, config: AudioTowerConfig) -> None:
        super().__init__()
        from transformers import PeAudioEncoder, PeAudioEncoderConfig

        if config.pretrained is not None:
            raise ConfigError(
                "a pe-audio tower starts from a whole PE-AV: convert its folder, and start from the model"
            )
        if config.pooling is not None or config.hidden_states != "last" or config.window != "full":
            raise ConfigError("pe-audio pools by its class token: leave pooling, hidden_states and window as they are")
        model_config, _ = transformers_config(config, PeAudioEncoderConfig, False)
        self.hf_config = complete_config(model_config)
        self.base = PeAudioEncoder(model_config)
        self.width = model_config.hidden_size
        self.hop = math.prod(model_config.dac_config.downsampling_ratios)
        for module in self._codec:  # transformers computes it without a graph
            module.requires_grad_(False)

    @property
    def _codec(self) -> list[Any]:
        return [self.base.embedder.dac_encoder, self.base.embedder.bottleneck]

    def stages(self) -> Stages:
        between = [*self.base.embedder.data_proj.parameters(), *self.base.patch_embedder.parameters()]
        return Stages(self._codec, between, list(self.base.layers))

    def prepare_training(self, *, compile: bool = False, checkpoint: bool = False) -> None:
        if checkpoint:
            checkpoint_layers(self.base)

    def summarize(
        self,
        audio: Tensor,
        lengths: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        host_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        everything = lengths is None or (host_lengths is not None and set(host_lengths) == {audio.shape[1]})
        waveform, lengths = prepare_waveform(audio, lengths)
        waveform, lengths = reflect_to_frames(waveform, lengths, self.hop)
        valid = None if everything else length_mask(lengths, waveform.shape[1])
        return self.base(waveform[:, None].to(self.base.dtype), padding_mask=valid).pooler_output


def reflect_to_frames(
    waveform: Tensor,  # [B, T]
    lengths: Tensor,  # [B], at least 1
    hop: int,
) -> tuple[Tensor, Tensor]:  # [B, whole frames], [B]
    """Clips that go on backwards from their end until a frame is full, as NumPy's mode reflect; zeros after that."""
    filled = -(-lengths // hop) * hop
    position = torch.arange(-(-waveform.shape[1] // hop) * hop, device=waveform.device)
    period = (2 * (lengths - 1)).clamp(min=1)[:, None]
    turned = position % period
    turned = torch.where(turned < lengths[:, None], turned, period - turned)
    source = torch.where(position < lengths[:, None], position, turned)
    return waveform.gather(1, source).masked_fill(position >= filled[:, None], 0.0), filled
