"""Named starting points of ``fastclap-train``: each is a function that returns a complete configuration."""

from __future__ import annotations

from collections.abc import Callable

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.train.config import DataConfig, OptimizerConfig, TrainConfig


def small() -> TrainConfig:
    """Log-mel and text towers from scratch (0.6 M parameters), for some hundred to some ten thousand clips."""
    return TrainConfig(
        run_dir="runs/small",
        data=DataConfig(crop_seconds=1.5, cache_mb=256),
        model=CLAPConfig(
            audio=AudioTowerConfig(
                features="torchaudio",
                # A long window resolves the harmonics of a voice, hence its pitch.
                feature_options={
                    "n_fft": 2048,
                    "win_length": 2048,
                    "hop_length": 320,
                    "n_mels": 128,
                    "f_min": 20.0,
                    "f_max": 8000.0,
                    "floor": 1e-5,
                },
                feature_normalization="clip",
                random_gain=6.0,
                frequency_warp=0.04,
                time_mask_width=10,
                frequency_mask_width=20,
            ),
            text=TextTowerConfig(width=128, layers=0, vocab_size=512),
            head=HeadConfig(kind="linear", dim=128),
        ),
        optimizer=OptimizerConfig(warmup_steps=50, ema_decay=0.99),
        steps=1000,
        save_every=250,
    )


def demo() -> TrainConfig:
    """The small recipe on procedural demo voices that are made on the spot: see a model learn in a few minutes."""
    config = small()
    config.run_dir = "runs/demo"
    config.data.demo_clips = 960
    config.steps = 400
    config.valid_every = 100
    return config


RECIPES: dict[str, Callable[[], TrainConfig]] = {"demo": demo, "small": small}
