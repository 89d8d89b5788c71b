"""A tiny saved model, and small audio files, for the tests of what is done with a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.models.clap import CLAP
from fastclap.models.tokenizer import train_tokenizer

RATE = 16000


def tiny_clap(seed: int, dim: int = 16) -> CLAP:
    torch.manual_seed(seed)
    config = CLAPConfig(
        audio=AudioTowerConfig(width=16, layers=1, heads=2, feature_options={"n_mels": 16}),
        text=TextTowerConfig(width=16, layers=1, heads=2, vocab_size=300),
        head=HeadConfig(kind="linear", dim=dim),
    )
    return CLAP(config, train_tokenizer(["A person is speaking in a calm style.", "An angry deep voice."], 300)).eval()


@pytest.fixture(scope="session")
def clap_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An exported model."""
    folder = tmp_path_factory.mktemp("export") / "model"
    tiny_clap(0).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def other_clap_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another one, of the same shape."""
    folder = tmp_path_factory.mktemp("export") / "other"
    tiny_clap(1).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write_clip(tmp_path: Path) -> Callable[..., str]:
    """Writes a clip of its own pitch and length under ``tmp_path`` and returns its path."""

    def write(name: str, number: int) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(number)
        time = np.arange(RATE // 4 + 800 * (number % 5)) / RATE
        wave = 0.3 * np.sin(2 * np.pi * (120 + 61 * number) * time) * np.exp(-3 * time) + random.normal(
            0, 0.02, len(time)
        )
        soundfile.write(path, wave, RATE, subtype="PCM_16")
        return str(path)

    return write


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """What `Module.compile` makes of modules, as it arises. A graph runs as it is, and one that breaks is an error."""
    found: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.append(graph)
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda x, **options: compile_module(x, backend=backend, fullgraph=True, **options)
    )
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()
