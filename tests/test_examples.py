"""The programs in examples/ do what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

import fastclap
from examples import loss_in_open_clip, train_on_a_folder, tts_reward
from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.data.demo_voices import write_demo
from fastclap.models.tokenizer import train_tokenizer


def test_loss_in_open_clip() -> None:
    losses = loss_in_open_clip.main(10)
    torch.manual_seed(0)
    audio, text = torch.randn(256, 64), torch.randn(256, 32)
    out = loss_in_open_clip.TwoTowers(64, 32, 128)(audio, text)
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    target = torch.arange(256)
    expected = sum(torch.nn.functional.cross_entropy(x, target) for x in (logits, logits.T)) / 2
    assert abs(losses[0] - expected.item()) < 1e-5  # the loss of open_clip
    assert losses[-1] < losses[0] - 0.5


def test_train_on_a_folder(tmp_path: Path) -> None:
    manifest, _ = write_demo(str(tmp_path / "demo"), num_train=24, num_valid=6)
    classes = set()
    for line in Path(manifest).read_text().splitlines():
        row = json.loads(line)
        target = tmp_path / "recordings" / row["classification_tag"]
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(manifest).parent / row["relative_audio_path"], target)
        classes.add(row["classification_tag"])
    found = train_on_a_folder.main(
        str(tmp_path / "recordings"),
        *("--steps", "3", "--batch-size", "8", "--data.workers", "0", "--threads", "1", "--data.crop-seconds", "0.5"),
    )
    assert {Path(clip).parent.name for clip in found} == classes
    assert set(found.values()) <= {f"A person sounds {name}." for name in classes}
    rows = [json.loads(line) for line in (tmp_path / "recordings/train.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and {row["classification_tag"] for row in rows} == classes


def test_tts_reward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CLAPConfig(
        audio=AudioTowerConfig(width=16, layers=1, heads=2, feature_options={"n_mels": 16}),
        text=TextTowerConfig(width=16, layers=1, heads=2, vocab_size=300),
        head=HeadConfig(kind="linear", dim=16),
    )
    fastclap.CLAP(config, train_tokenizer(["A calm voice.", "An angry voice."], 300)).save_pretrained(
        tmp_path / "model"
    )
    score, text = fastclap.reward(tmp_path / "model"), "A calm voice."
    clip, best = tts_reward.best_of(score, text, n=4)
    every = [float(score([tts_reward.synthesise(text, seed)], text)) for seed in range(4)]
    assert abs(best - max(every)) < 1e-5 and best > min(every)
    assert torch.equal(clip, tts_reward.synthesise(text, max(range(4), key=every.__getitem__)))
    assert tts_reward.improved(score, clip, text) > best
