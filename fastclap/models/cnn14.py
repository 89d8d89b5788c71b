"""Cnn14 of PANNs (Kong et al., arXiv 1912.10211), the audio tower of MS-CLAP 2022."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastclap.config import AudioTowerConfig
from fastclap.errors import ConfigError
from fastclap.models.fixed_window import FixedWindowTower

BLOCKS = 6
HALVINGS = 5  # of frames and bands: every block's but the last's


class ConvBlock(nn.Module):
    """Two 3 × 3 convolutions with batch norm and ReLU, then the mean over `pool` × `pool`."""

    def __init__(self, inner: int, outer: int, pool: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.bn2 = nn.BatchNorm2d(outer)
        self.pool = pool

    def forward(
        self,
        x: Tensor,  # [B, inner, T, bands]
    ) -> Tensor:  # [B, outer, T // pool, bands // pool]
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.avg_pool2d(x, self.pool)


class Cnn14(nn.Module):
    """Six convolution blocks, mean over the bands, maximum plus mean over time, and a linear layer with ReLU.

    Parameters have the names of the published code. Its dropout (0.2 after a block, 0.5 around the linear layer) and
    initialisation are as published; its SpecAugment and mixup are not part of it.

    Args:
        bands: mel bands, at least 32.
        channels: of the first block, 64 as published; each further block has twice as many.
        width: of the output, 2048 as published.
    """

    def __init__(self, bands: int, channels: int, width: int) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(bands)
        sizes = [1, *(channels << index for index in range(BLOCKS))]
        for index in range(BLOCKS):
            pool = 2 if index < HALVINGS else 1
            self.add_module(f"conv_block{index + 1}", ConvBlock(sizes[index], sizes[index + 1], pool))
        self.fc1 = nn.Linear(sizes[-1], width)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(self.fc1.bias)

    def forward(
        self,
        features: Tensor,  # [B, T, bands], at least 32 frames
    ) -> Tensor:  # [B, width]
        x = self.bn0(features[:, None].transpose(1, 3)).transpose(1, 3)  # statistics of each band
        for index in range(BLOCKS):
            x = F.dropout(self.get_submodule(f"conv_block{index + 1}")(x), 0.2, self.training)
        x = x.mean(3)
        x = F.dropout(x.amax(2) + x.mean(2), 0.5, self.training)
        return F.dropout(F.relu(self.fc1(x)), 0.5, self.training)


class Cnn14Tower(FixedWindowTower):
    """Cnn14 on log-mel features of a window."""

    def __init__(self, config: AudioTowerConfig) -> None:
        super().__init__(config)
        bands = self.log_mel.n_mels
        if min(self.frames, bands) < 1 << HALVINGS:
            raise ConfigError(f"cnn14 needs {1 << HALVINGS} frames and bands at least, not {self.frames} and {bands}")
        if config.pooling is not None or config.hidden_states != "last" or config.window != "full":
            raise ConfigError("cnn14 has a pooling of its own: leave pooling, hidden_states and window as they are")
        self.base = Cnn14(bands, config.convolution_channels, config.width)
        self.width = config.width

    def summarize(
        self,
        audio: Tensor,
        lengths: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        host_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        return self.base(self.features(audio, lengths).to(self.base.fc1.weight.dtype))
