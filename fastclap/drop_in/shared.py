"""What several drop-ins share: what a client is, gathering over ranks, and recognising a client's front-end."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastclap.features import PRESETS
from fastclap.kernels.log_mel.spec import LogMelSpec, mel_bank
from fastclap.losses import info_nce

Method = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Client:
    """A package whose methods `fastclap.drop_in.patch` replaces.

    Attributes:
        name: what `patch` is given.
        modules: where the classes may be; some are one module under two names, some are two copies.
        install: how to get the package.
        methods: "Class.method" to a function of the class and its own method that returns the replacement.
        takes_corrected: whether those functions also take `corrected`, as `patch` does.
    """

    name: str
    modules: tuple[str, ...]
    install: str
    methods: Mapping[str, Callable[..., Method]]
    takes_corrected: bool = False

    def installed_modules(self) -> list[ModuleType]:
        """Those of `modules` that exist, imported.

        Raises:
            ModuleNotFoundError: there are none.
        """
        found = [module for module in map(_module, self.modules) if module is not None]
        if not found:
            raise ModuleNotFoundError(f"{self.name} is not installed ({self.install})", name=self.name)
        return found


def _module(name: str) -> ModuleType | None:
    """The module, or None if it or its package does not exist. Whatever else an import may raise is raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # for old names of modules
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return None
        raise


def overrides(instance: Any, owner: type, *names: str) -> bool:
    """Whether the instance, or its class, has a method of its own in place of one of the owner's."""
    return any(
        name in vars(instance) or getattr(type(instance), name) is not getattr(owner, name, None) for name in names
    )


def rows_of_all_ranks(
    x: Tensor,  # [N, ...]
) -> Tensor:
    """[W*N, ...], with gradients that reach every rank."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


def local_rows_loss(
    rows: Tensor,  # [N, D]
    columns: Tensor,  # [M, D]
    logit_scale: float | Tensor,
    rank: int,
    **options: Any,
) -> Tensor:
    """One-sided InfoNCE of this rank's rows against the columns of all ranks; row i's positive is column rank*N + i."""
    a_ids = torch.arange(rows.shape[0], device=rows.device) + rank * rows.shape[0]
    b_ids = torch.arange(columns.shape[0], device=rows.device)
    return info_nce(rows, columns, logit_scale, a_ids=a_ids, b_ids=b_ids, direction="a_to_b", **options)


@functools.lru_cache(maxsize=64)
def preset_spec(name: str, **numbers: Any) -> LogMelSpec | None:
    """A preset with a client's numbers; None where no front-end of ours has such numbers."""
    try:
        return dataclasses.replace(PRESETS[name], **numbers)
    except ValueError:
        return None


@functools.lru_cache(maxsize=64)
def cached_mel_bank(spec: LogMelSpec) -> np.ndarray:
    """`mel_bank`, computed once for each spec; not to be written to."""
    return mel_bank(spec)


def has_mel_bank(
    spec: LogMelSpec,
    bank: np.ndarray,  # [n_fft/2 + 1, n_mels]
) -> bool:
    """Whether a client's mel bank is the one that follows from the spec."""
    ours = cached_mel_bank(spec)
    return bank.shape == ours.shape and bool(np.abs(bank - ours).max() <= 1e-6 * ours.max())
