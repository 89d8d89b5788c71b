"""Best of N with a reward: synthesise a description several times and keep the clip that fits it best.

    python examples/tts_reward.py MODEL [MODEL ...]

MODEL is a folder, a run, a hub id or a published checkpoint; of several, the mean of their cosines is the reward.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import fastclap
from fastclap.apps.scoring import Reward

RATE = 16000


def synthesise(text: str, seed: int) -> Tensor:
    """Two seconds of noise in the place of your text-to-speech system: [samples], float in ±1."""
    return 0.1 * torch.randn(2 * RATE, generator=torch.Generator().manual_seed(seed))


def best_of(score: Reward, text: str, n: int = 10) -> tuple[Tensor, float]:
    """The clip of n that fits the text best, and its score."""
    clips = [synthesise(text, seed) for seed in range(n)]
    scores = score(clips, text, sampling_rate=RATE)
    best = int(scores.argmax())
    return clips[best], float(scores[best])


def improved(score: Reward, clip: Tensor, text: str, steps: int = 5) -> float:
    """The score after following the reward's gradient in the waveform itself, as a differentiable synthesiser would."""
    wave = clip[None].clone().requires_grad_()
    optimizer = torch.optim.Adam([wave], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (-score(wave, text, sampling_rate=RATE, grad=True).sum()).backward()
        optimizer.step()
    return float(score(wave.detach(), text, sampling_rate=RATE))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    reward = fastclap.reward(sys.argv[1:])
    for description in ("A person is speaking in a calm style.", "A person is speaking in an angry style."):
        clip, fit = best_of(reward, description)
        print(f"{description} best of 10: {fit:.3f}, along its gradient: {improved(reward, clip, description):.3f}")
