"""Inputs shared by the tests of normalize_waveform."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def clips(batch: int, samples: int) -> tuple[Tensor, dict[str, Tensor]]:
    """int16 noise on a constant, and lengths, offsets, mean and std; some out of range."""
    generator = torch.Generator().manual_seed(batch + samples)
    audio = (3000 * torch.randn(batch, samples, generator=generator) + 8000).clamp(-32768, 32767).to(torch.int16)
    options = {
        "lengths": torch.randint(-1, samples + 3, (batch,), generator=generator),
        "offsets": torch.randint(-1, samples + 3, (batch,), generator=generator),
        "mean": torch.rand(batch, generator=generator),
        "std": torch.rand(batch, generator=generator),
    }
    return audio, options


def combinations(options: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Given or measured statistics, with and without lengths and offsets."""
    groups = (("lengths",), ("offsets",), ("mean", "std"))
    return [
        {name: options[name] for group, use in zip(groups, chosen, strict=True) if use for name in group}
        for chosen in itertools.product((False, True), repeat=3)
    ]


# (clips, samples of the batch, shape of the result): also wider, narrower, and as long as the shortest clip
SHAPES: list[tuple[int, int, dict[str, int]]] = [
    (1, 1, {}),
    (3, 127, {}),
    (5, 1000, {"min_samples": 400}),
    (5, 1023, {"samples": 300, "min_samples": 300}),
    (4, 130, {"min_samples": 400}),
    (4, 130, {"samples": 1000}),
]
