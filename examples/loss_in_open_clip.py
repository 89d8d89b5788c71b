"""A training step in the style of open_clip, with fastclap's loss in the place of open_clip's.

    python examples/loss_in_open_clip.py

The loss has open_clip's constructor and is called as open_clip's training loop calls it. In a codebase that builds its
own loss (`open_clip.create_loss`, CoCa) one line does the same without touching it:
`fastclap.drop_in.patch("open_clip")`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastclap import ClipLoss  # was: from open_clip.loss import ClipLoss


class TwoTowers(nn.Module):
    """Stands for an open_clip model: it returns what open_clip's models return."""

    def __init__(self, audio_width: int, text_width: int, dim: int) -> None:
        super().__init__()
        self.audio, self.text = nn.Linear(audio_width, dim), nn.Linear(text_width, dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, audio: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": nn.functional.normalize(self.audio(audio), dim=-1),
            "text_features": nn.functional.normalize(self.text(text), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


def main(steps: int = 20) -> list[float]:
    """Learns to pair random vectors; returns the losses."""
    torch.manual_seed(0)
    audio, text = torch.randn(256, 64), torch.randn(256, 32)
    model, loss = TwoTowers(64, 32, 128), ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = loss(**model(audio, text), output_dict=True)["contrastive_loss"]
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return losses


if __name__ == "__main__":
    for step, value in enumerate(main(), 1):
        print(f"step {step}: {value:.4f}")
