"""The same Zipformer twice: ours, and that of the published code, with the same weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

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


def published(icefall: SimpleNamespace, config: ZipformerConfig, mels: int = 40) -> nn.Module:
    """The published code's encoder of these sizes, as its training builds it."""
    lists: Any = {name: tuple(values) for name, values in config.lists().items()}
    scheduled = icefall.scaling.ScheduledFloat
    module = nn.Module()
    module.encoder_embed = icefall.subsampling.Conv2dSubsampling(
        mels, lists["width"][0], dropout=scheduled((0.0, 0.3), (20000.0, 0.1))
    )
    module.encoder = icefall.zipformer2.Zipformer2(
        output_downsampling_factor=config.output_downsampling,
        downsampling_factor=lists["downsampling"],
        encoder_dim=lists["width"],
        num_encoder_layers=lists["layers"],
        encoder_unmasked_dim=lists["unmasked_width"],
        query_head_dim=config.query_width,
        pos_head_dim=config.position_width,
        value_head_dim=config.value_width,
        num_heads=lists["heads"],
        feedforward_dim=lists["feedforward"],
        cnn_module_kernel=lists["kernel"],
        pos_dim=config.encoding_width,
        dropout=scheduled((0.0, 0.3), (20000.0, 0.1)),
        warmup_batches=4000.0,
    )
    return module


def run_published(module: Any, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Its result [B, T, C] and lengths."""
    x, lengths = module.encoder_embed(features, frames)
    past = torch.arange(x.shape[1]) >= lengths[:, None]
    x, lengths = module.encoder(x.transpose(0, 1), lengths, past)
    return x.transpose(0, 1), lengths


def run(built: ZipformerTower, features: Tensor, frames: list[int]) -> tuple[Tensor, Packing]:
    """Ours, packed."""
    packing = Packing([frames_of(count) for count in frames], features.device)
    return built.encode(features, packing)
