"""The comparisons of systems: their commands are ones that the command line takes, their data and tables are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.systems import COMPARISONS, KINDS, RUNS, page, train_flags, write_manifests
from fastclap.train.cli import parse
from fastclap.train.config import TrainConfig

ROW: dict[str, Any] = {
    "relative_audio_path": "a.wav",
    "text_description": ["A man sounds happy."],
    "fine_description": "A man sounds happy, then calm.",
    "classification_tag": "happy",
    "intrinsic_tags": ["male", "deep"],
    "situational_tags": ["happy"],
}


@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_a_valid_training(name: str) -> None:
    config = parse([*train_flags(RUNS[name], 5, "runs", ["--steps", "9"]), "--data.train", "a.jsonl"])
    assert isinstance(config, TrainConfig)
    config.check()
    kind = "zipformer" if "Zipformer" in name else "log-mel"
    assert (config.seed, config.steps, config.model.audio.kind) == (5, 9, kind)
    assert (config.optimizer.kind == "scaled-adam") == (kind == "zipformer" and "AdamW" not in name)
    tagged, taught = "tags" in name, name == "with teacher"
    paired = name == "global and fine" or "second stage" in name
    assert bool(config.loss.tag_weight or config.data.balance != "none") == tagged
    assert (config.loss.teacher == "init") == taught and (config.data.captions == "pair") == paired
    assert (config.init_from is None) == (RUNS[name].start is None)


def test_comparisons_name_runs_and_their_starts() -> None:
    assert {name for comparison in COMPARISONS.values() for name in comparison.runs} == set(RUNS)
    assert all(run.start is None or run.start in RUNS for run in RUNS.values())


def test_manifests_of_one_kind_and_of_both(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(2 * (json.dumps(ROW) + "\n"))
    data = write_manifests(tmp_path / "train.jsonl", tmp_path / "test.jsonl", tmp_path)
    texts = {name: [json.loads(line) for line in Path(data[name][0]).read_text().splitlines()] for name in data}
    assert texts["intrinsic_tags"][0]["text_description"][0] == "A voice that is male and deep."
    assert len(texts["situational_tags"][1]["text_description"]) == len(KINDS["situational_tags"])
    assert texts["compositional"][1]["text_description"] == [
        "The speaker's voice is male and deep. Someone speaks like this: happy."
    ]
    assert texts["compositional"][0]["relative_audio_path"] == str(tmp_path / "a.wav")
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "intrinsic_tags": []}) + "\n")
    with pytest.raises(SystemExit, match=r"train\.jsonl:2: no intrinsic_tags"):
        write_manifests(tmp_path / "train.jsonl", tmp_path / "test.jsonl", tmp_path)


def test_the_page_has_means_spreads_and_the_best() -> None:
    names = {figure for comparison in COMPARISONS.values() for figure in comparison.figures}

    def scores(value: float) -> dict[str, float]:
        return {**dict.fromkeys(names, value), "train seconds": 60.0}

    record = {
        "data": "x", "hardware": "y", "parallel": 1, "versions": {"torch": "2"}, "commands": dict.fromkeys(RUNS, "z"),
        "figures": {"with teacher": {"0": scores(0.5), "1": scores(0.7)}, "without teacher": {"0": scores(0.4)}},
    }  # fmt: skip
    text = page(record)
    assert "| with teacher | **60.0 ± 14.1** |" in text and "| without teacher | 40.0 ± 0.0 |" in text
    assert COMPARISONS["fine"].title not in text and "Seeds 0, 1" in text
