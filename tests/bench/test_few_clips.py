"""The benchmark of a few hundred clips: its commands are understood, its manifests are what they are said to be."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from bench import few_clips, whisper
from fastclap.data import load_manifest
from fastclap.testing import assert_close_rel
from fastclap.train.cli import parse
from fastclap.train.config import TrainConfig


@pytest.mark.parametrize("name", few_clips.RUNS)
def test_every_command_is_understood(name: str, tmp_path: Path) -> None:
    rows = []
    for number in range(20):
        time = np.arange(8000) / 16000
        wave = sum(0.1 * np.sin(2 * np.pi * (90 + 9 * number) * k * time) / k for k in range(1, 9))
        soundfile.write(tmp_path / f"{number}.wav", wave, 16000)
        rows.append({"audio": f"{number}.wav", "text_description": f"Voice {number}.", "sex": "male"})
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = argparse.Namespace(train=str(manifest), audio="a/whisper", text="a/minilm", cache=None)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    run = few_clips.RUNS[name]
    config = parse([*few_clips.command(run, 3, scratch, arguments), "--run-dir", "run"])
    assert isinstance(config, TrainConfig)
    config.check()
    assert config.seed == 3
    found = load_manifest(config.data.train, audio_root=config.data.audio_root)
    assert len(found) == round(run.share * 20) and all(
        Path(row.audio).samefile(tmp_path / Path(row.audio).name) for row in found
    )
    given = [json.loads(line) for line in Path(config.data.train[0]).read_text().splitlines()]
    assert len(given) == round(run.share * 20)
    if run.labels:
        assert all(row in rows for row in given)
    else:
        texts = [text for row in given for text in row["text_description"]]
        assert texts and not any("Voice" in text for text in texts) and not any("sex" in row for row in given)
    if "whisper" in run.recipe:
        assert (config.model.audio.pretrained, config.model.text.pretrained) == ("a/whisper", "a/minilm")
        assert config.model.audio.freeze == ("trained" not in name and "LoRA" not in name)
    assert run.recipe in few_clips.in_words(run)


def test_shares_follow_the_seed(tmp_path: Path) -> None:
    manifest = tmp_path / "all.jsonl"
    manifest.write_text("".join(f"{number}\n" for number in range(50)))
    drawn = [Path(few_clips.drawn(0.2, seed, tmp_path, str(manifest))).read_text().split() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 10
    assert few_clips.drawn(1.0, 0, tmp_path, str(manifest)) == str(manifest)


def test_page() -> None:
    run = dict.fromkeys(few_clips.FIGURES, 0.5) | {"seconds": 12.4}
    record = {
        "data": "some data",
        "hardware": "a machine",
        "versions": {"torch": "2"},
        "commands": {few_clips.RECIPE: few_clips.in_words(few_clips.RUNS[few_clips.RECIPE]), "not run": "x"},
        "figures": {few_clips.RECIPE: {"0": run, "1": run | {"emotion UAR": 0.7, "seconds": 10.0}}},
    }
    text = few_clips.page(record)
    assert "| whisper-small, as it is | 60.0 ± 14.1 | 50.0 ± 0.0 |" in text and "| 12, 10 |" in text
    assert "`fastclap-train whisper-small --small`" in text and "not run" not in text


def test_the_forms_that_are_timed_compute_the_same() -> None:
    """Off the shelf and ours on the whole window to rounding, given the same weights."""
    theirs, ours = (whisper.tower_of(whisper.FORMS[name]).eval() for name in list(whisper.FORMS)[:2])
    ours.base.load_state_dict(theirs.base.state_dict())  # type: ignore[union-attr]
    audio, sizes = torch.randint(-3000, 3000, (2, 16000), dtype=torch.int16), [16000, 9000]
    with torch.no_grad():
        expected = theirs(audio, torch.tensor(sizes), host_lengths=sizes)
        assert_close_rel("pooled", expected, ours(audio, torch.tensor(sizes), host_lengths=sizes), 1e-5)
