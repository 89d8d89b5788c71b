"""Projection heads: from a tower's pooled output to the space that audio and text share.

Module names and shapes are those of the published models, so that their checkpoints map one to one.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fastclap.config import HeadConfig
from fastclap.errors import ConfigError


class ParaSpeechCLAPHead(nn.Module):
    """LN(e1 + dropout(W2·gelu(e1))) with e1 = W1·x and no biases in W1 and W2 (ParaSpeechCLAP, arXiv 2603.28737).

    Args:
        in_dim: width of the tower.
        dim: dimension of the shared space.
        dropout: probability on the second branch, 0.5 as published.
    """

    def __init__(self, in_dim: int, dim: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.linear1 = nn.Linear(in_dim, dim, bias=False)
        self.linear2 = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,  # [B, in_dim]
    ) -> Tensor:  # [B, dim]
        e1 = self.linear1(x)
        return self.layer_norm(e1 + self.dropout(self.linear2(F.gelu(e1))))


class CLSPHead(nn.Module):
    """Linear-ReLU-Linear (`projection`), then Linear-ReLU-Dropout-Linear (`transform`); CLSP, arXiv 2601.03065.

    Args:
        in_dim: width of the tower.
        dim: dimension of the shared space and of both hidden layers.
        dropout: probability inside `transform`, 0.1 as published.
    """

    def __init__(self, in_dim: int, dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(in_dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.transform = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim, dim))

    def forward(
        self,
        x: Tensor,  # [B, in_dim]
    ) -> Tensor:  # [B, dim]
        return self.transform(self.projection(x))


class LAIONHead(nn.Module):
    """Linear-ReLU-Linear (LAION-CLAP, arXiv 2211.06687).

    Args:
        in_dim: width of the tower.
        dim: dimension of the shared space and of the hidden layer.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(in_dim, dim)
        self.linear2 = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,  # [B, in_dim]
    ) -> Tensor:  # [B, dim]
        return self.linear2(F.relu(self.linear1(x)))


class PEAudioHead(nn.Module):
    """Layer norm, then one matrix (PE-AV, arXiv 2512.19687).

    Args:
        in_dim: width of the tower.
        dim: dimension of the shared space.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(in_dim, eps=1e-6)
        self.proj = nn.Linear(in_dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,  # [B, in_dim]
    ) -> Tensor:  # [B, dim]
        return self.proj(self.layer_norm(x))


class VoiceCLAPAudioHead(nn.Module):
    """One matrix with a bias (`proj`), then Linear-GELU-Linear (VoiceCLAP-Small, arXiv 2609.32016).

    Args:
        in_dim: width of the tower.
        dim: dimension of the shared space and of every layer.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, dim)
        self.linear1 = nn.Linear(dim, dim)
        self.linear2 = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,  # [B, in_dim]
    ) -> Tensor:  # [B, dim]
        return self.linear2(F.gelu(self.linear1(self.proj(x))))


class VoiceCLAPTextHead(nn.Module):
    """Linear-GELU-Linear without biases (VoiceCLAP-Small), as wide inside as the mean of both ends.

    Args:
        in_dim: width of the tower.
        dim: dimension of the shared space.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        between = (in_dim + dim) // 2
        self.linear1 = nn.Linear(in_dim, between, bias=False)
        self.linear2 = nn.Linear(between, dim, bias=False)

    def forward(
        self,
        x: Tensor,  # [B, in_dim]
    ) -> Tensor:  # [B, dim]
        return self.linear2(F.gelu(self.linear1(x)))


def build_head(config: HeadConfig, in_dim: int, side: Literal["audio", "text"] = "audio") -> nn.Module:
    """Head of `config.kind` for the tower of one side, of width `in_dim`.

    Raises:
        ConfigError: unknown kind.
    """
    dropout = {} if config.dropout is None else {"dropout": config.dropout}
    if config.kind == "paraspeechclap":
        return ParaSpeechCLAPHead(in_dim, config.dim, **dropout)
    if config.kind == "clsp":
        return CLSPHead(in_dim, config.dim, **dropout)
    if config.kind == "laion":
        return LAIONHead(in_dim, config.dim)
    if config.kind == "pe-audio":
        return PEAudioHead(in_dim, config.dim)
    if config.kind == "voiceclap":
        return (VoiceCLAPAudioHead if side == "audio" else VoiceCLAPTextHead)(in_dim, config.dim)
    if config.kind == "linear":
        return nn.Linear(in_dim, config.dim, bias=False)
    raise ConfigError(
        f"unknown projection head {config.kind!r}; known: paraspeechclap, clsp, laion, pe-audio, voiceclap, linear"
    )
