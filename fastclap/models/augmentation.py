"""What towers that are trained from scratch on log-mel features change in them: level, frequencies, spans left out.

Drawn by torch on the device: no host sync, and a gradient cache that restores torch's generators sees the same again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastclap.config import AudioTowerConfig
from fastclap.models.layers import as_float


def louder_or_softer(
    audio: Tensor,  # int16 or float [B, T]
    config: AudioTowerConfig,
) -> Tensor:
    """Each clip by up to `random_gain` dB."""
    if not config.random_gain:
        return audio
    decibels = config.random_gain * (2 * torch.rand(len(audio), 1, device=audio.device) - 1)
    return as_float(audio) * 10 ** (decibels / 20)


def augmented(
    x: Tensor,  # [B, T, bands], around 0
    frames: Tensor,  # [B]
    config: AudioTowerConfig,
) -> Tensor:
    """Stretched or squeezed over the bands (`frequency_warp`), and SpecAugment's spans of frames and bands set to 0."""
    if config.frequency_warp:
        x = warp_bands(x, config.frequency_warp)
    if config.time_masks:
        spans = uniform_spans(frames, x.shape[1], config.time_masks, config.time_mask_width)
        x = x.masked_fill(spans[..., None], 0.0)
    if config.frequency_masks:
        bands = torch.full_like(frames, x.shape[2])
        spans = uniform_spans(bands, x.shape[2], config.frequency_masks, config.frequency_mask_width)
        x = x.masked_fill(spans[:, None], 0.0)
    return x


def uniform_spans(
    lengths: Tensor,  # [B] valid size of the axis
    size: int,
    count: int,
    max_width: int,
) -> Tensor:  # bool [B, size], True where masked
    """SpecAugment: union of `count` spans an item, width uniform in 0..max_width, at most half of the item each."""
    draws = torch.rand(2, lengths.shape[0], count, 1, device=lengths.device)
    lengths = lengths[:, None, None]
    width = torch.minimum((draws[0] * (max_width + 1)).long(), lengths // 2)
    start = (draws[1] * (lengths - width + 1)).long()
    position = torch.arange(size, device=lengths.device)
    return ((position >= start) & (position < start + width)).any(1)


def warp_bands(
    features: Tensor,  # [B, T, bands]
    share: float,
) -> Tensor:  # [B, T, bands]
    """Vocal tract length perturbation (Jaitly & Hinton 2013) on the mel axis: band i takes the value at i·(1 ± share).

    The factor is drawn for each clip, uniformly; values between bands are interpolated and the last band is repeated.
    """
    batch, frames, bands = features.shape
    factor = 1 + share * (2 * torch.rand(batch, 1, device=features.device) - 1)
    position = (torch.arange(bands, device=features.device) * factor).clamp(max=bands - 1)
    low = position.long().clamp(max=bands - 2)
    left, right = (features.gather(2, at[:, None].expand(-1, frames, -1)) for at in (low, low + 1))
    return torch.lerp(left, right, (position - low)[:, None].to(features.dtype))
