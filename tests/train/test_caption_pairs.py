"""CLSP's second stage: two captions a clip, drawn on schedule, and the loss of the rectangular batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from bench.icefall import parts
from fastclap.data import BatchSampler, ClipDataset, Manifest, load_manifest
from fastclap.data.dataset import both_fine_probability
from fastclap.data.rows import Row, with_fine_captions, within_seconds
from fastclap.errors import ConfigError, DataError
from fastclap.train.config import LossConfig, TrainConfig
from fastclap.train.distributed import World
from fastclap.train.loop import train
from fastclap.train.run import build_model, loader_tokenizer
from fastclap.train.step import Objective

Build = Callable[..., TrainConfig]
ALONE = World(0, 1, torch.device("cpu"), None)


def with_more_fine(manifest: Manifest, count: int = 3) -> Manifest:
    return Manifest(
        row._replace(fine_captions=tuple(f"{row.fine_captions[0]} ({number})" for number in range(count)))
        for row in manifest
    )


@pytest.mark.parametrize("chunk", [0, 3])
def test_the_loss_is_the_formula(tiny: Build, chunk: int) -> None:
    """a→t: mass ½ on each of a clip's two captions; t→a: one positive for each of the 2N captions; their mean."""
    config = tiny()
    manifest = with_more_fine(load_manifest(config.data.train))
    torch.manual_seed(0)
    model = build_model(config, manifest, None).double().eval()
    tokenize = loader_tokenizer(model)
    rows = BatchSampler(manifest, 8, seed=0).batch(0)[1]
    batch = ClipDataset(manifest, 16000, crop_seconds=0.5, seed=0, caption="pair", tokenize=tokenize)[0, 0, rows]
    assert len(batch.captions) == 16
    found = Objective(model, LossConfig(), chunk, None, ALONE)(batch)

    audio = torch.nn.functional.normalize(model.encode_audio(batch.audio, batch.lengths), dim=1)
    text = torch.nn.functional.normalize(model.encode_text(**model.tokenize(batch.captions)), dim=1)
    logits = (model.logit_scale * audio @ text.T).tolist()
    loss = 0.0
    for clip, row in enumerate(logits):
        total = math.log(sum(math.exp(x) for x in row))
        for caption in (clip, clip + 8):
            loss -= 0.5 * (0.5 * (row[caption] - total)) / 8
    for caption in range(16):
        column = [row[caption] for row in logits]
        loss -= 0.5 * (column[caption % 8] - math.log(sum(math.exp(x) for x in column))) / 16
    assert found.item() == pytest.approx(loss, rel=1e-7)


def test_captions_are_drawn_on_schedule(tiny: Build) -> None:
    manifest = with_more_fine(load_manifest(tiny().data.train))
    dataset = ClipDataset(manifest, 16000, crop_seconds=0.1, seed=0, caption="pair")
    rows = [3, 11]
    for begin, expected in ((0, 0.05 + 0.45 * 250 / 1e4), (20_000, 0.5)):
        both = 0
        for step in range(begin, begin + 500):
            captions = dataset[step, step, rows].captions
            kinds = set()
            for position, row in enumerate(rows):
                first, second = captions[position], captions[position + 2]
                assert second in manifest[row].fine_captions and first != second
                assert first in (*manifest[row].captions, *manifest[row].fine_captions)
                kinds.add(first in manifest[row].fine_captions)
            assert len(kinds) == 1  # one decision a batch
            both += kinds.pop()
        assert abs(both / 500 - expected) < 4 * math.sqrt(expected * (1 - expected) / 500)
    expected_at = [0.05 + 0.45e-4, 0.275, 0.5, 0.5]  # the published code counts from 1
    assert [both_fine_probability(step) for step in (0, 4999, 9999, 99_999)] == pytest.approx(expected_at, rel=1e-12)


def test_a_single_fine_caption_has_a_global_one_beside_it(tiny: Build) -> None:
    manifest = load_manifest(tiny().data.train)
    dataset = ClipDataset(manifest, 16000, crop_seconds=0.1, seed=0, caption="pair")
    for step in range(30_000, 30_020):
        first, second = dataset[step, step, [5]].captions
        assert first in manifest[5].captions and (second,) == manifest[5].fine_captions


def test_fine_captions_are_filtered_by_length(tiny: Build) -> None:
    manifest = load_manifest(tiny().data.train)
    lengths = [("x" * 127, "x" * 128), ("x" * 768, "x" * 769, "y" * 300), ("x" * 20,), ()]
    rows = [row._replace(fine_captions=fine) for row, fine in zip(manifest[:4], lengths, strict=True)]
    kept = with_fine_captions(Manifest(rows), 128, 768)
    assert [[len(text) for text in row.fine_captions] for row in kept] == [[128], [768, 300], []]
    assert [row.audio for row in kept] == [rows[0].audio, rows[1].audio, rows[3].audio]
    with pytest.raises(DataError, match=r"no fine_description has 500 to 600 characters.*--data\.fine-characters"):
        with_fine_captions(Manifest(rows[:3]), 500, 600)
    with pytest.raises(DataError, match="no fine_description"):
        ClipDataset(kept, 16000, seed=0, caption="pair")


def test_the_published_filter_keeps_the_same_lengths(icefall: SimpleNamespace) -> None:
    """Its other rules are not repeated: it also drops captions with a line break or a negation."""
    wanted = ("filter_long_captions", "NO_PATTERN")
    published = parts(icefall, "local/filter_and_select_captions.py", wanted.__contains__)
    captions = tuple("x" * length for length in (768, 127, 128, 769, 300, 1))
    row = Row("a.wav", ("A voice.",), captions, {}, None, 1.0, None, "a:1", 0)
    (kept,) = with_fine_captions(Manifest([row]), 128, 768)
    assert sorted(kept.fine_captions) == sorted(published["filter_long_captions"](captions))
    assert published["filter_long_captions"](["x" * 200 + " not", "x" * 200 + "\n"]) == []


def test_clips_of_other_lengths_are_left_out(tiny: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both bounds included; lengths come from the files where the manifest has none, and are then known."""
    seconds = [1.9, 2.0, 17.0, 30.0, 30.1]
    for number, length in enumerate(seconds):
        soundfile.write(tmp_path / f"{number}.wav", np.zeros(round(length * 1000)), 1000)
    (tmp_path / "4.wav").unlink()
    names = [*(f"{number}.wav" for number in range(len(seconds))), "5.wav"]
    rows = [
        Row(str(tmp_path / name), ("A voice.",), (), {}, None, 40.0 if name == "5.wav" else None, None, f"m:{name}", 0)
        for name in names
    ]
    kept = within_seconds(Manifest(rows, source_names=["m"]), 2, 30)
    assert [Path(row.audio).name for row in kept] == ["1.wav", "2.wav", "3.wav", "4.wav"], (
        "4.wav is reported when drawn"
    )
    assert [row.duration for row in kept] == [2.0, 17.0, 30.0, None]
    with pytest.raises(DataError, match=r"m: no clip lasts 50 to 60 s; .*--data\.min-seconds, --data\.max-seconds"):
        within_seconds(Manifest([rows[5]], source_names=["m"]), 50, 60)

    config = tiny(steps=1)
    lengths = sorted(row.duration or 0 for row in load_manifest(config.data.train))
    config.data.min_seconds, config.data.max_seconds = lengths[3], lengths[-5]
    train(config)
    said = capfd.readouterr().out
    assert f"left out: 7 of 48 clips, shorter than {lengths[3]:g} s or longer than {lengths[-5]:g} s" in said
    assert "41 clips to train on" in said
    config.data.min_seconds, config.data.max_seconds = 3.0, 2.0
    with pytest.raises(ConfigError, match=r"--data\.min-seconds is 3\.0 and --data\.max-seconds 2\.0"):
        config.check()


def test_pairs_train(tiny: Build, capfd: pytest.CaptureFixture[str]) -> None:
    config = tiny(steps=4, chunk_size=3)
    config.data.captions, config.data.fine_characters = "pair", [10, 700]
    assert (train(config) / "model.safetensors").exists()
    assert "left out: 0 of 48 clips without a fine caption of 10 to 700 characters" in capfd.readouterr().out
    config = tiny("other")
    config.data.fine_characters = [700, 10]
    with pytest.raises(ConfigError, match=r"--data\.fine-characters is \[700, 10\]"):
        train(config)
