"""A run small enough to repeat dozens of times: 48 demo clips, towers of width 16, a dozen steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.data.demo_voices import write_demo
from fastclap.train.config import DataConfig, OptimizerConfig, TrainConfig


@pytest.fixture(scope="session")
def demo_manifests(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("voices")
    write_demo(folder, 48, 16, seed=1)
    return str(folder / "train.jsonl"), str(folder / "valid.jsonl")


@pytest.fixture
def pictures() -> None:
    """For a test that wants the pictures in the report of a run."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without pictures unless `pictures` is asked for: to draw them takes twice as long as the tiny run."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("fastclap.evaluation.report._pictures", lambda *_: {})


@pytest.fixture
def tiny(demo_manifests: tuple[str, str], tmp_path: Path) -> Callable[..., TrainConfig]:
    """tiny(name, **changes): the configuration of a tiny run in its own folder; changes replace top-level fields."""

    def build(name: str = "run", **changes: Any) -> TrainConfig:
        train, valid = demo_manifests
        config = TrainConfig(
            run_dir=str(tmp_path / name),
            data=DataConfig(train=[train], valid=[valid], workers=0, crop_seconds=0.5, cache_mb=64),
            model=CLAPConfig(
                audio=AudioTowerConfig(width=16, layers=1, heads=2, feature_options={"n_mels": 16}),
                text=TextTowerConfig(width=16, layers=1, heads=2, vocab_size=300),
                head=HeadConfig(kind="linear", dim=16),
            ),
            optimizer=OptimizerConfig(warmup_steps=2, ema_decay=0.9),
            steps=12,
            batch_size=8,
            log_every=2,
            save_every=3,
            valid_every=6,
            device="cpu",
        )
        for field, value in changes.items():
            setattr(config, field, value)
        return config

    return build
