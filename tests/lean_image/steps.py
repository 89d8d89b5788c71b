"""What has to work without the packages that read audio files: ``python steps.py PACK CONFIG``, run by test_lean_image.

Imports every module but the commands, goes from arrays to embeddings, losses and features, and trains from packed
shards as a configuration file says.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastclap
from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import MissingPackageError
from fastclap.models.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("commands", "__main__")


def modules() -> list[str]:
    """Names of all modules of the package and of the benchmarks, those that read arguments left out."""
    folders = {"fastclap": "fastclap", "kernels": "fastclap.kernels", "train": "fastclap.train", "bench": "bench"}
    names = []
    for folder, package in folders.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if not set(parts) & {*COMMANDS, "csrc", "records"}:
                names.append(".".join((package, *parts)).removesuffix(".__init__"))
    return names


def use_arrays() -> None:
    model = CLAPConfig(AudioTowerConfig(width=32), TextTowerConfig(width=32, vocab_size=300), HeadConfig("linear", 32))
    clap = fastclap.CLAP(model, train_tokenizer(["A calm voice.", "An angry voice."], 300))
    clips = [0.1 * torch.randn(16000), torch.randint(-999, 999, (9000,)).short()]
    audio, text = clap.embed_audio(clips, sampling_rate=16000), clap.embed_text(["A calm voice.", "An angry voice."])
    assert audio.shape == text.shape == (2, 32)
    weights = audio.clone().requires_grad_()
    fastclap.info_nce(weights, text.clone(), 14.3).backward()
    assert weights.grad is not None and weights.grad.isfinite().all()
    features, frames = fastclap.LogMel("whisper")(torch.stack([clips[0], clips[0]]))
    assert features.shape == (2, 100, 80) and frames.tolist() == [100, 100]
    expect_missing("soxr", lambda: clap.embed_audio(clips, sampling_rate=48000))


def expect_missing(package: str, call: Callable[[], Any]) -> None:
    """The call has to say in one line which package it needs and how to get it."""
    try:
        call()
    except MissingPackageError as error:
        assert f"pip install {package}" in str(error) and "\n" not in str(error), error
    else:
        raise AssertionError(f"worked without {package}")


def train(pack: str, config: str) -> None:
    from fastclap.audio import read_audio
    from fastclap.data import load_manifest
    from fastclap.train import cli

    run = Path(cli.parse(["small", "--config", config]).run_dir)  # type: ignore[attr-defined]
    cli.main(["small", "--config", config])
    assert (run / "model" / "model.safetensors").is_file()
    assert len(load_manifest([pack])) == 8
    expect_missing("soundfile", lambda: read_audio(run / "config.yaml"))
    expect_missing("datasets", lambda: load_manifest(["hf:name"]))
    expect_missing("tyro", lambda: cli.parse(["small", "--steps", "2"]))


if __name__ == "__main__":
    for name in modules():
        importlib.import_module(name)
    use_arrays()
    train(*sys.argv[1:])
    print("done")
