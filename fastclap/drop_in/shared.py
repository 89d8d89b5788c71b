"""What several drop-ins share: losses with targets, distributed gathering, presets of front-ends."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastclap.features import PRESETS
from fastclap.kernels.log_mel.spec import LogMelSpec, mel_bank

IGNORED_TARGET = -100  # as torch.nn.functional.cross_entropy's ignore_index
FUSED_SIMILARITIES = {"cos_sim": True, "pytorch_cos_sim": True, "dot_score": False}  # whether it normalises

Method = Callable[..., Any]


def _overrides(instance: Any, owner: type, *names: str) -> bool:
    """Whether the instance's class, or the instance, has one of owner's methods of its own."""
    return any(
        name in vars(instance) or getattr(type(instance), name) is not getattr(owner, name, None) for name in names
    )


def _gather(x: Tensor) -> Tensor:
    """The rows of all ranks, with gradients."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


@functools.lru_cache(maxsize=64)
def _preset(name: str, **numbers: Any) -> LogMelSpec | None:
    """A preset with a client's numbers; None where they make no front-end of ours."""
    try:
        return dataclasses.replace(PRESETS[name], **numbers)
    except ValueError:
        return None


@functools.lru_cache(maxsize=64)
def _bank(spec: LogMelSpec) -> np.ndarray:
    return mel_bank(spec)


def _same_bank(
    theirs: Any,  # [n_fft/2 + 1, n_mels]
    spec: LogMelSpec,
) -> bool:
    ours = _bank(spec)
    return theirs.shape == ours.shape and bool(np.abs(theirs - ours).max() <= 1e-6 * ours.max())
