"""fastclap: contrastive language-audio pretraining with fused kernels.

Every public name is loaded on first use, so `import fastclap` costs next to nothing beyond ``import torch`` and works
without a GPU, without Triton and without a compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastclap import drop_in as drop_in
    from fastclap.apps.scoring import reward as reward
    from fastclap.drop_in.open_clip import ClipLoss as ClipLoss
    from fastclap.drop_in.open_clip import SigLipLoss as SigLipLoss
    from fastclap.features import LogMel as LogMel
    from fastclap.grad_cache import GradCache as GradCache
    from fastclap.losses import info_nce as info_nce
    from fastclap.losses import sigmoid_loss as sigmoid_loss
    from fastclap.models.clap import CLAP as CLAP

_PUBLIC = {
    "info_nce": "fastclap.losses",
    "sigmoid_loss": "fastclap.losses",
    "ClipLoss": "fastclap.drop_in.open_clip",
    "SigLipLoss": "fastclap.drop_in.open_clip",
    "LogMel": "fastclap.features",
    "GradCache": "fastclap.grad_cache",
    "CLAP": "fastclap.models.clap",
    "reward": "fastclap.apps.scoring",
}

__all__ = ["CLAP", "ClipLoss", "GradCache", "LogMel", "SigLipLoss", "drop_in", "info_nce", "reward", "sigmoid_loss"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name == "drop_in":
        return importlib.import_module("fastclap.drop_in")
    raise AttributeError(f"module 'fastclap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, "drop_in"])
