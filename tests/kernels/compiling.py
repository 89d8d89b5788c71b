"""What the tests of all modules' offline compilations share."""

from __future__ import annotations

import importlib
from collections import Counter

from fastclap.kernels.offline import Compilation, compile_offline, problems


def compilations(module: str, arch: int) -> dict[str, Compilation]:
    """What the launchers of `fastclap.kernels.<module>` may ask for, by name; no two have the same."""
    found = list(importlib.import_module(f"fastclap.kernels.{module}").compilations(arch))
    assert max(Counter(c.name for c in found).values()) == 1
    return {c.name: c for c in found}


def all_problems(found: dict[str, Compilation], arch: int) -> dict[str, list[str]]:
    """The problems of those compilations that have any."""
    every = {name: problems(c, compile_offline(c, arch), arch) for name, c in found.items()}
    return {name: wrong for name, wrong in every.items() if wrong}
