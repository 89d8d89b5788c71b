"""The error record: every engine of a front-end on short generated sounds, its verdict and its tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import logmel_errors
from bench.logmel_errors import FRONT_ENDS, LOUD, MANY, loud, measure, sounds, tables, worse
from fastclap.features import PRESETS


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_ours_is_never_worse_than_the_float32_fft(name: str) -> None:
    front_end = FRONT_ENDS[name]
    origin = next(iter(front_end.origins))
    rows = measure(front_end, sounds(front_end.spec.sampling_rate, longest=0.5))
    if origin in rows[0].get("absent", {}):
        pytest.skip(rows[0]["absent"][origin])
    assert worse(rows, origin) == []
    assert all({"fastclap torch", origin} <= row["engines"].keys() for row in rows)
    for row in rows:
        if row["sound"] == "silence":
            assert row["engines"]["fastclap torch"]["max"] <= 5e-6 and row["loud"] == 0


def test_a_larger_error_is_found() -> None:
    rows = []
    for sound in ("noise", "clicks", "hum"):
        engines = {}
        for engine in ("fastclap torch", "other"):
            engines[engine] = {"rms": 1e-4, "rms_loud": 1e-5, "max": 1.0, "max_loud": 1.0}
        rows.append({"sound": sound, "values": MANY, "loud": MANY // 2, "engines": engines})
    assert worse(rows, "other") == []
    ours = rows[0]["engines"]["fastclap torch"]
    ours["rms"] = 1.25e-4  # of one sound this may be luck; of the two together it is 1.13
    assert [line.split(":")[0] for line in worse(rows, "other")] == ["all sounds but pure tones and hum"]
    few = [{**row, "values": 100, "loud": 50} for row in rows]
    assert worse(few, "other") == []
    ours["rms"] = 1.6e-4
    assert worse(rows, "other")[-1] == "noise: rms of fastclap torch 1.6e-04, 1.0e-04"


def test_what_counts_as_loud() -> None:
    spec = PRESETS["clap"]  # decibels
    truth = torch.tensor([[0.0, -LOUD + 1, -LOUD - 1], [-95.0, -99.0, -100.0]])
    assert loud(truth, spec).tolist() == [[True, True, False], [True, True, False]]


def test_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import soundfile

    (tmp_path / "audio").mkdir()
    for n in range(3):
        soundfile.write(tmp_path / "audio" / f"{n}.wav", 0.1 * torch.randn(8000).numpy(), 8000)
    out = tmp_path / "record"
    arguments = ["--out", str(out), "--audio", str(tmp_path / "audio"), "--clips", "2", "--longest", "0.3"]
    monkeypatch.setattr(sys, "argv", ["logmel_errors", *arguments, "--front-ends", "kaldi", "torchaudio"])
    assert logmel_errors.main() == 0
    record = json.loads((out / "errors.json").read_text())
    assert list(record["front_ends"]) == ["kaldi", "torchaudio"]
    rows = record["front_ends"]["kaldi"]["rows"]
    assert rows[-1]["sound"] == "real speech" and rows[-1]["clips"] == 2
    text = (out / "errors.md").read_text()
    assert text == tables(record) and "On no front-end" in text
    assert str(tmp_path) not in text + json.dumps(record)
