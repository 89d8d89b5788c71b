"""The benchmark of frozen towers, on procedural voices: it takes the steps that it says, and its record is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import frozen
from fastclap.train.step import Step


def test_the_record_holds_every_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FASTCLAP_TEST_WEIGHTS", raising=False)
    taken: list[tuple[int, bool]] = []
    call = Step.__call__

    def counted(self: Step, batches: object, *rest: object) -> object:
        taken.append((self.config.batch_size, self.config.data.frozen_cache == "off"))
        return call(self, batches, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Step, "__call__", counted)
    out = tmp_path / "record"
    flags = ["--clips", "20", "--batches", "8", "24", "--threads", "1", "--steps", "3", "--plain", "2"]
    assert frozen.main([*flags, "--out", str(out)]) == 0
    assert [taken.count(kind) for kind in ((8, False), (24, False), (8, True))] == [8, 8, 2]
    record = json.loads((out / "record.json").read_text())
    assert record["clips"] == 20 and record["captions"] > 0 and record["towers"] == ["log-mel", "small"]
    assert record["cold_clips"] == 20 and record["cold_captions"] == record["captions"]
    assert [row["batch"] for row in record["rows"]] == [8, 24] and record["plain"]["batch"] == 8
    for row in (*record["rows"], record["plain"]):
        assert row["clips_per_second"] == pytest.approx(1e3 * row["batch"] / row["step"]["median_ms"], abs=0.1)
    lines = capsys.readouterr().out.splitlines()
    assert (out / "README.md").read_text().splitlines()[-3:] == lines[-3:]
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| 8", "| 24", "| 8, without the file"]
