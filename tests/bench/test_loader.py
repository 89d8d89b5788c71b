"""The loader benchmark: every form holds the same clips, and every measurement ends up in the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from bench.loader import FILES, KINDS, made_clips, measure, rate_of_loader, table, write_forms
from fastclap.data import ClipDataset, load_manifest


def test_every_form_holds_the_same_clips(tmp_path: Path) -> None:
    waves = list(made_clips(3, 0.5, 1.5))
    forms = write_forms(waves, tmp_path)
    assert list(forms) == [*FILES, "packed"]
    batches = {}
    for name, path in forms.items():
        manifest = load_manifest(path, audio_root=str(tmp_path / "audio"))
        batches[name] = ClipDataset(manifest, 16000, seed=0, file_statistics=True)[0, 0, [0, 1, 2]]
    for name in ("FLAC", "packed"):
        assert torch.equal(batches[name].audio, batches["WAV"].audio)
        assert torch.equal(batches[name].std, batches["WAV"].std)  # type: ignore[arg-type]
    for index, wave in enumerate(waves):
        assert np.array_equal(batches["WAV"].audio[index, : len(wave)], wave)
    assert batches["MP3"].lengths.min() > 0.4 * 16000


def test_measurements_are_in_the_table(tmp_path: Path) -> None:
    forms = write_forms(made_clips(4, 0.5, 1.0), tmp_path)
    row = measure(load_manifest(forms["packed"]), "crop", [0], 2, 0.01)
    assert row["per_core"] > 0
    assert 0 <= row["waiting"] <= 1
    record = {
        "date": "today",
        "fastclap": "1",
        "torch": "2",
        "libsndfile": "3",
        "machine": {"cpu": "a CPU", "cores": 2},
        "load": 0.1,
        "source": "noise",
        "clips": 4,
        "seconds": [0.5, 1.0],
        "batch_size": 2,
        "workers": [0, 1],
        "reference_notes": ["one change"],
        "rows": [
            {"kind": kind, "form": "packed", "loader": "fastclap", **row, "workers": {"1": 7.0}} for kind in KINDS
        ],
    }
    text = table(record)
    for kind in KINDS:
        assert f"| {kind} | packed | fastclap | {row['per_core']:g} | 7 |" in text
    assert "4 clips of 0.5 to 1.0 s (noise), 16 kHz mono, batches of 2" in text
    assert "The reference runs as it is, except: one change." in text


def test_what_was_loaded_ahead_is_not_counted() -> None:
    taken = []

    def batches():  # type: ignore[no-untyped-def]
        for index in range(10**6):
            taken.append(index)
            yield index

    assert rate_of_loader(batches(), 8, workers=2, seconds=0) > 0
    assert len(taken) == 2 * 3 + 2 * 2 * 2
