"""A small committed model gives the embeddings that are committed with it, on every machine and release of torch.

The folder `golden` holds an export of random weights (log-mel tower, small text tower) and what it gave for the clips
and captions below. `python -m tests.fastclap.models.test_golden` writes both anew: only where a change of what models
compute is meant.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.models.clap import CLAP
from fastclap.models.tokenizer import train_tokenizer

GOLDEN = Path(__file__).parent / "golden"
RATE = 16000
CAPTIONS = [
    "A person is speaking in a calm style.",
    "A person is speaking in an angry style.",
    "A high-pitched female voice.",
    "A low-pitched male voice, which speaks slowly.",
    "whispered",
    "SHOUTED",
    "Ein Mann flüstert.",
    "一个平静的声音",
    "It is loud, then soft; then loud again.",
    "x",
]


def clips() -> list[np.ndarray]:
    """Ten sweeps with harmonics, of 0.2 to 1.1 s, float32 in ±1."""
    found = []
    for number in range(10):
        time = np.arange(RATE // 5 + number * RATE // 10) / RATE
        phase = 2 * np.pi * (90 + 25 * number) * (time + 0.2 * time**2)
        wave = np.sum([np.sin(harmonic * phase) / harmonic**1.5 for harmonic in range(1, 8)], axis=0)
        found.append((0.1 * wave * (1.2 + np.sin(2 * np.pi * (3 + number) * time))).astype(np.float32))
    return found


def test_embeddings_are_the_committed_ones() -> None:
    model = CLAP.from_pretrained(GOLDEN / "model")
    expected = json.loads((GOLDEN / "embeddings.json").read_text(encoding="utf-8"))
    assert expected["captions"] == CAPTIONS
    for name, vectors in (("audio", model.embed_audio(clips())), ("text", model.embed_text(CAPTIONS))):
        torch.testing.assert_close(vectors, torch.tensor(expected[name]), atol=1e-5, rtol=0)
        assert (vectors @ vectors.T).fill_diagonal_(0).max() < 0.999, "no two are the same"
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()) < 200_000


def write() -> None:
    """Make the model, and its embeddings."""
    torch.manual_seed(0)
    config = CLAPConfig(
        audio=AudioTowerConfig(width=16, layers=2, heads=2, feature_options={"n_mels": 20}, convolution_channels=4),
        text=TextTowerConfig(width=16, layers=1, heads=2, vocab_size=300),
        head=HeadConfig(kind="linear", dim=16),
    )
    model = CLAP(config, train_tokenizer(CAPTIONS, 300)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    branch: Any = model.audio_branch
    branch.feature_mean.fill_(-6.0)
    branch.feature_std.fill_(4.0)
    model.save_pretrained(GOLDEN / "model")
    vectors = {"audio": model.embed_audio(clips()), "text": model.embed_text(CAPTIONS)}
    rounded = {name: [[round(x, 7) for x in row] for row in found.tolist()] for name, found in vectors.items()}
    text = json.dumps({"captions": CAPTIONS, **rounded}, ensure_ascii=False)
    (GOLDEN / "embeddings.json").write_text(text.replace("], [", "],\n[") + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
