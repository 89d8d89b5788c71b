"""Named starting points of ``fastclap-train``: each is a function that returns a complete configuration."""

from __future__ import annotations

from collections.abc import Callable

from fastclap.train.config import TrainConfig


def small() -> TrainConfig:
    """Log-mel and text towers from scratch (about 2 M parameters), for a few hundred to some ten thousand clips."""
    return TrainConfig(run_dir="runs/small")


def demo() -> TrainConfig:
    """The small recipe on procedural demo voices that are made on the spot: see a model learn in a few minutes."""
    config = small()
    config.run_dir = "runs/demo"
    return config


RECIPES: dict[str, Callable[[], TrainConfig]] = {"demo": demo, "small": small}
