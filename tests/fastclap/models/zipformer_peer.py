"""Zipformers of small sizes whose every parameter differs from what it begins with."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclap.config import AudioTowerConfig, ZipformerConfig
from fastclap.models.packing import Packing
from fastclap.models.zipformer.encoder import frames_of
from fastclap.models.zipformer.tower import ZipformerTower

SMALL = ZipformerConfig(
    downsampling=[1, 2, 4, 2],
    layers=[1, 1, 2, 1],
    width=[64],
    unmasked_width=[48],
    feedforward=[96],
    heads=[4],
    kernel=[15, 7, 7, 15],
    query_width=8,
    schedule_start=0.0,
)
WIDTHS = ZipformerConfig(  # stacks of several widths, the last not the widest
    downsampling=[1, 2, 3],
    layers=[2, 1, 1],
    width=[32, 48, 40],
    unmasked_width=[24, 32, 32],
    feedforward=[64, 96, 80],
    heads=[2, 4, 4],
    kernel=[9, 5, 31],
    query_width=16,
    position_width=4,
    value_width=12,
    encoding_width=24,
    output_downsampling=1,
    schedule_start=0.0,
)


def tower(config: ZipformerConfig, mels: int = 40) -> ZipformerTower:
    """A tower of these sizes whose every parameter differs from what it begins with."""
    torch.manual_seed(0)
    built = ZipformerTower(
        AudioTowerConfig(kind="zipformer", features="clsp", feature_options={"n_mels": mels}, zipformer=config)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return built


def run(built: ZipformerTower, features: Tensor, frames: list[int]) -> tuple[Tensor, Packing]:
    """Ours, packed."""
    packing = Packing([frames_of(count) for count in frames], features.device)
    return built.encode(features, packing)
