"""The embedding benchmark: every side embeds the same clips to the same vectors, and its figures end up in the record.

The comparison with the reference runs where FASTCLAP_REFERENCE names a checkout of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import soundfile
import torch

from bench import embedding
from bench.parity import CAPTIONS
from bench.reference_step import build_ours
from bench.run import SIZES
from fastclap import CLAP
from fastclap.models.tokenizer import train_tokenizer

TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def model() -> CLAP:
    torch.manual_seed(0)
    return build_ours(TINY, train_tokenizer(CAPTIONS, 1000)).eval()


def arguments(**changed: object) -> argparse.Namespace:
    given = {
        "reference": None, "size": "tiny", "clips": 3, "lengths": (0.3, 0.5), "batch_size": 32, "repeats": 1,
        "minutes": 1.0, "threads": torch.get_num_threads(), "search_rows": [400], "no_command": True, "out": None,
    }  # fmt: skip
    return argparse.Namespace(**{**given, **changed})


def test_clips_are_of_the_lengths_asked_for(tmp_path: Path) -> None:
    clips = embedding.make_clips(tmp_path, 3, 0.25, 0.75, seed=0)
    assert clips.samples == [12000, 8000, 4000] and clips.seconds == 1.5
    rows = [json.loads(line) for line in (tmp_path / "table" / "test.jsonl").read_text().splitlines()]
    for row, samples, caption in zip(rows, clips.samples, clips.captions, strict=True):
        assert soundfile.info(tmp_path / "audio" / "bench" / row["relative_audio_path"]).frames == samples
        assert row["duration"] == samples / 16000 and row["text_description"] == caption
    assert (tmp_path / "captions.txt").read_text().splitlines() == clips.captions


def test_every_form_of_ours_gives_the_vectors_of_the_model(tmp_path: Path, model: CLAP) -> None:
    clips = embedding.make_clips(tmp_path, 3, 0.3, 0.5, seed=0)
    files = [str(tmp_path / "audio" / "bench" / f"{index:05d}.wav") for index in range(3)]
    expected = [*model.embed_audio(files), *model.embed_text(clips.captions)]
    ours = embedding.Ours(model, 2)
    for options, tolerance in (({}, 1e-5), ({"products": False}, 1e-5), ({"precision": "bfloat16"}, 0.05)):
        run = ours(clips, **options)  # type: ignore[arg-type]
        for vector, wanted in zip([*run.clips, *run.captions], expected, strict=True):
            assert vector is not None and float((vector - wanted).norm()) < tolerance, options
        assert 0 < run.within["audio"] + run.within["text"] < run.seconds


def test_padding_of_sorted_batches() -> None:
    assert embedding.padding([4, 4, 4], 2) == 0
    assert embedding.padding([1, 4, 2, 3], 2) == pytest.approx(1 - 10 / 12)  # (4, 3) and (2, 1)


def test_the_record_holds_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"torch": 1.0, "fastclap": 2.0, "bfloat16": 4.0}
    monkeypatch.setattr(embedding, "product_rates", lambda: rates)
    record = embedding.record_of(arguments(out=tmp_path / "out", search_rows=[400, 10**12]))
    assert json.loads((tmp_path / "out" / "record.json").read_text()) == record
    text = (tmp_path / "out" / "README.md").read_text()
    assert [case["lengths"] for case in record["cases"]] == ["of 0.3 to 0.5 s", "of 0.5 s"]
    for case in record["cases"]:
        assert [row["form"] for row in case["rows"]] == [
            "fastclap embed, torch's products",
            "fastclap embed",
            "fastclap embed --precision bfloat16",
        ]
        for row in case["rows"]:
            assert row["audio_tower_gflops"] == pytest.approx(case["gflop"] / row["audio_tower_s"], rel=0.01)
            assert row["clips_differ"] < (0.05 if "bfloat16" in row["form"] else 1e-5)
            assert f"| {row['form']} |" in text
    found, too_large = record["search"]
    assert found["repeats"] == 9 and found["median_ms"] > 0
    assert too_large["reason"] == "not enough memory" and "1,000,000,000,000 | not enough memory" in text
    assert "What bounds it. Clips of 0.3 to 0.5 s" in text and str(tmp_path) not in text


def test_the_reference_embeds_the_same_clips_to_the_same_vectors(reference: Path) -> None:
    record = embedding.record_of(arguments(reference=reference, search_rows=[]))
    for case in record["cases"]:
        retrieval, alone, *ours = case["rows"]
        assert retrieval["form"] == "ParaSpeechCLAP, evaluate_retrieval" and alone["captions_differ"] is None
        assert alone["clips_differ"] < 1e-5
        for row in ours:
            tolerance = 0.05 if "bfloat16" in row["form"] else 1e-5
            assert row["clips_differ"] < tolerance and row["captions_differ"] < tolerance
            assert case["nearest_clips"] > 1e-3
    assert "soundfile reads the files instead" in record["reference_notes"][-1] or len(record["reference_notes"]) == 3
