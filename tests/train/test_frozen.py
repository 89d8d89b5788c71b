"""Frozen towers computed once: the training is that without a file, whatever is killed, shared, changed or damaged."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

import fastclap
from fastclap.config import AudioTowerConfig, HeadConfig, TextTowerConfig
from fastclap.data import BatchSampler, ClipDataset, Quarantine, load_manifest
from fastclap.data import dataset as data_set
from fastclap.data.pack import pack
from fastclap.data.summaries import SummaryStore, clip_identities, crop_start
from fastclap.data.tags import TagPrompts
from fastclap.errors import ConfigError, DataError
from fastclap.models.audio_towers import LogMelTower
from fastclap.models.text_towers import SmallTextTower
from fastclap.testing import assert_close_rel
from fastclap.train.config import DataConfig, LossConfig, OptimizerConfig, TrainConfig
from fastclap.train.distributed import World
from fastclap.train.frozen import Kept, keep
from fastclap.train.loop import train
from fastclap.train.run import build_model, loader_tokenizer
from tests.train.test_distributed import on_ranks
from tests.train.test_resume import FORK, assert_same_run, metrics

Build = Callable[..., TrainConfig]
ALONE = World(0, 1, torch.device("cpu"), None)
ROUNDING = 2e-5
"""Largest difference of summaries or losses, relative to the largest value, that a batch of another shape makes in
float32, because a matrix product adds up in an order that depends on the number of rows."""


@pytest.fixture
def frozen(tiny: Build, tmp_path: Path) -> Build:
    """frozen(name, sides, cache, **changes): a run with frozen towers, dropout in the heads, and clips as they are."""

    def build(name: str = "run", sides: str = "audio text", cache: str = "cache", **changes: Any) -> TrainConfig:
        config = tiny(name, **{"log_every": 1, "valid_every": 0, "save_every": 100, **changes})
        config.data.crop_seconds, config.data.cache_mb = 10.0, 0
        config.data.frozen_cache = cache if cache in ("off", "auto") else str(tmp_path / cache)
        config.model.audio.freeze, config.model.text.freeze = "audio" in sides, "text" in sides
        config.model.head = HeadConfig(kind="paraspeechclap", dim=16)
        return config

    return build


def losses(config: TrainConfig) -> list[float]:
    return [record["loss"] for record in metrics(config.run_dir) if record["kind"] == "train"]


def files(folder: str | Path) -> dict[str, int]:
    """Size of every file below a folder."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()}


def assert_same_training(expected: TrainConfig, actual: TrainConfig, tolerance: float = ROUNDING) -> None:
    """Loss by loss, the validation, and the weights in the end."""
    assert len(losses(expected)) == expected.steps
    assert_close_rel("losses", torch.tensor(losses(expected)), torch.tensor(losses(actual)), tolerance)
    figures = [[r for r in metrics(config.run_dir) if r["kind"] == "valid"][-1] for config in (expected, actual)]
    for found in figures:
        assert found["clips"] == 16 and not found["skipped"]
    assert figures[0]["classification"] == figures[1]["classification"]
    weights = [load_file(Path(config.run_dir) / "model" / "model.safetensors") for config in (expected, actual)]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor.float(), weights[1][name].float(), rtol=1e-3, atol=5e-5), name


class Calls:
    """How many clips and captions go through the towers, and how many clips are decoded."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clips = self.captions = self.decoded = 0
        audio, text, load = LogMelTower.summarize, SmallTextTower.summarize, ClipDataset.load

        def audio_summarize(tower: LogMelTower, waves: Any, *rest: Any) -> Any:
            self.clips += len(waves)
            return audio(tower, waves, *rest)

        def text_summarize(tower: SmallTextTower, ids: Any, *rest: Any) -> Any:
            self.captions += len(ids)
            return text(tower, ids, *rest)

        def loaded(clips: ClipDataset, *arguments: Any) -> Any:
            self.decoded += 1
            return load(clips, *arguments)

        patch.setattr(LogMelTower, "summarize", audio_summarize)
        patch.setattr(SmallTextTower, "summarize", text_summarize)
        patch.setattr(ClipDataset, "load", loaded)

    def take(self) -> tuple[int, int, int]:
        found = self.clips, self.captions, self.decoded
        self.clips = self.captions = self.decoded = 0
        return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    # the statistics of a tower from scratch are measured on clips
    monkeypatch.setattr("fastclap.train.run.fit_feature_statistics", lambda *_: None)
    return Calls(monkeypatch)


# ---------------------------------------------------------------------------------------------------------------------
# the same training


OPTIONS: dict[str, Callable[[TrainConfig], None]] = {
    "plain": lambda config: None,
    "no gradient cache": lambda config: setattr(config, "chunk_size", 0),
    "chunks, accumulated": lambda config: (setattr(config, "chunk_size", 3), setattr(config, "accumulate", 2)),
    "pairs": lambda config: setattr(config.data, "captions", "pair"),
    "padded to the crop": lambda config: setattr(config.data, "pad_to_crop", True),
    "tags, balanced": lambda config: (
        setattr(config, "loss", LossConfig(tag_weight=1.0)),
        setattr(config.data, "tag_column", "intrinsic_tags"),
        setattr(config.data, "balance", "sqrt"),
    ),
    "queue": lambda config: setattr(config, "loss", LossConfig(queue_size=12)),
    "sigmoid": lambda config: (
        setattr(config, "loss", LossConfig(kind="sigmoid")),
        setattr(config.model, "init_logit_bias", -10.0),
    ),
    "average as teacher": lambda config: setattr(config, "loss", LossConfig(teacher="ema", teacher_weight=0.3)),
}


ONE_SIDED = [(side, option) for side in ("audio", "text") for option in ("plain", "tags, balanced")]


@pytest.mark.parametrize(("sides", "option"), [*(("audio text", option) for option in OPTIONS), *ONE_SIDED])
def test_a_run_with_the_file_is_the_run_without(frozen: Build, sides: str, option: str) -> None:
    plain, kept = frozen("plain", sides, "off", steps=6), frozen("kept", sides, steps=6)
    for config in (plain, kept):
        OPTIONS[option](config)
        train(config)
    assert {name.split("/")[0] for name in files(kept.data.frozen_cache)} == set(sides.split())
    assert_same_training(plain, kept)


@pytest.mark.parametrize("kind", ["global", "fine", "both", "pair"])
@pytest.mark.parametrize("repeats", [False, True])
def test_batches_are_those_of_the_waveforms(frozen: Build, tmp_path: Path, kind: Any, repeats: bool) -> None:
    """Rows, replacements, captions, ids, tags and prompts are equal, and the summaries are the tower's."""
    clips, model = with_bad_clips(frozen(), tmp_path, kind, repeats)
    kept = keep(model, frozen(), ALONE, clips, None, Quarantine(tmp_path / "q.jsonl", 48, 0.5))
    assert kept.clips is not None and set(kept.clips.bad) == {3, 17}
    plain, tower = copy.copy(clips), model.audio_branch.eval()
    plain.tokenize = loader_tokenizer(model)
    made, sampler = kept.dataset(clips), BatchSampler(clips.manifest, 16, seed=5)
    replaced = 0
    for step in range(9):
        item = (step * 1000, *sampler.batch(step))  # far steps: pairs of two fine captions too
        expected, found = plain[item], made[item]
        for name in ("step", "epoch", "rows", "bad", "captions", "prompts"):
            assert getattr(found, name) == getattr(expected, name), name
        for name in ("caption_ids", "text_rows", "prompt_rows", "tags"):
            assert getattr(found, name).equal(getattr(expected, name)), name
        replaced += len(expected.bad)
        with torch.no_grad():
            summary = tower.summarize(expected.audio, expected.lengths)
            text = model.text_branch.eval().summarize(**expected.text)
        assert_close_rel("clips", summary, found.audio_summary, ROUNDING)
        assert_close_rel("texts", text, found.text["summary"], ROUNDING)
        assert found.audio is None and not found.samples and not found.tokens
    assert replaced > 2


def with_bad_clips(
    config: TrainConfig, folder: Path, kind: Any = "global", repeats: bool = False
) -> tuple[ClipDataset, fastclap.CLAP]:
    """48 clips with tags of which row 3 is cut short and row 17 missing, and a model for them."""
    data = folder / "voices"
    shutil.copytree(Path(config.data.train[0]).parent, data)
    manifest = load_manifest(str(data / "train.jsonl"))
    Path(manifest[3].audio).write_bytes(Path(manifest[3].audio).read_bytes()[:3000])
    Path(manifest[17].audio).unlink()
    torch.manual_seed(0)
    model = build_model(config, manifest, None)
    tags = TagPrompts(manifest, "intrinsic_tags")
    return ClipDataset(manifest, 16000, crop_seconds=10, seed=5, caption=kind, tags=tags, repeats=repeats), model


def test_the_second_run_decodes_and_encodes_nothing(frozen: Build, calls: Calls, tmp_path: Path) -> None:
    """Another seed of data order and captions, with the same weights, finds everything in the file."""
    first, again = frozen("first", steps=3), frozen("again", steps=3)
    start = tmp_path / "start"
    torch.manual_seed(0)
    build_model(first, load_manifest(first.data.train), None).save_pretrained(start)
    first.init_from = again.init_from = str(start)
    again.seed = 9
    train(first)
    clips, captions, decoded = calls.take()
    assert clips == decoded == 48 + 16 and captions > 0
    kept = files(first.data.frozen_cache)
    train(again)
    assert calls.take() == (0, 0, 0) and files(again.data.frozen_cache) == kept
    assert losses(first) != losses(again)


def test_off_keeps_nothing_and_auto_goes_where_the_environment_says(
    frozen: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTCLAP_CACHE", str(tmp_path / "cache"))
    train(frozen("off", cache="off", steps=1))
    train(frozen("training", "", cache="auto", steps=1))
    assert not (tmp_path / "cache").exists()
    assert "frozen" not in capfd.readouterr().out
    train(frozen("auto", cache="auto", steps=1))
    assert len(files(tmp_path / "cache" / "summaries")) == 2
    said = capfd.readouterr().out
    for side in ("audio", "text"):
        assert f"frozen {side} tower: computed beforehand, kept in {tmp_path}/cache/summaries/{side}/" in said
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTCLAP_CACHE", str(tmp_path / "file"))
    train(frozen("nowhere", cache="auto", steps=1))
    assert f"computed at every step, because {tmp_path}/file/summaries cannot be written to" in capfd.readouterr().out


def test_impossible_settings(frozen: Build) -> None:
    for change, message in (({"frozen_crops": 0}, r"--data.frozen-crops is 0"), ({"frozen_cache": ""}, r"is empty")):
        config = frozen()
        for name, value in change.items():
            setattr(config.data, name, value)
        with pytest.raises(ConfigError, match=message):
            config.check()


# ---------------------------------------------------------------------------------------------------------------------
# kills, ranks


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_while_it_computes_and_while_it_trains(frozen: Build, kills: int) -> None:
    """SIGKILL at random moments, each with a file of its own in the making, then on: bit-identical in the end."""
    whole, killed = (frozen(name, cache=f"of {name}", steps=20, save_every=2, valid_every=8) for name in ("a", "b"))
    whole.valid.batch_size = killed.valid.batch_size = 1  # so that the file takes many writes
    train(whole)
    killed.resume, moments = True, random.Random(0)
    for kill in range(kills):
        child = FORK.Process(target=_train_and_die, args=(killed, moments.randint(0, 3) if kill < kills - 2 else None))
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL, kill
    train(killed)
    assert_same_run(whole.run_dir, killed.run_dir)
    sizes = [files(config.data.frozen_cache) for config in (whole, killed)]
    assert sizes[0] == sizes[1], "computed once, and nothing torn is left"


def _train_and_die(config: TrainConfig, groups: int | None) -> None:
    """Train, up to the middle of a write of the file after so many whole ones; None: up to some step."""
    write, left = os.write, groups

    def die(descriptor: int, data: Any) -> int:
        nonlocal left
        if left is not None and len(data) > 64:
            if not left:
                write(descriptor, bytes(data[: len(data) // 2 - 3]))
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return write(descriptor, data)

    if groups is None:
        steps = itertools.count()
        original = data_set.Loader.__iter__

        def batches(self: Any) -> Any:
            for batch in original(self):
                if next(steps) == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        data_set.Loader.__iter__ = batches  # type: ignore[method-assign]
    os.write = die  # type: ignore[assignment]
    train(config)


def test_two_runs_at_once_share_the_work(frozen: Build) -> None:
    runs = [frozen(name, steps=4) for name in ("one", "other")]
    for config in runs:
        config.valid.batch_size = 4
    children = [FORK.Process(target=train, args=(config,)) for config in runs]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    assert_same_run(*(config.run_dir for config in runs))
    for name, size in files(runs[0].data.frozen_cache).items():
        side, file = name.split("/")
        store = SummaryStore(Path(runs[0].data.frozen_cache) / side, file.split(".")[0])
        records = size // (16 + 8 + 4 * math.prod(map(int, file.split(".")[2].split("x"))) + 16)
        assert store.damaged == 0 and len(store) <= records <= 2 * len(store)


def test_two_ranks_are_one_process(frozen: Build) -> None:
    """Each computes half of the file, no record is there twice, and the run is that of one process."""
    alone, shared = frozen("alone", cache="of one", steps=5), frozen("shared", cache="of two", steps=5)
    for config in (alone, shared):
        config.valid.batch_size, config.model.head.dropout = 4, 0.0  # ranks draw their own dropout
    train(alone)
    assert on_ranks(2, train, shared) == [0, 0]
    assert files(alone.data.frozen_cache) == files(shared.data.frozen_cache)
    assert_same_training(alone, shared)


def test_ranks_with_folders_of_their_own(frozen: Build, tmp_path: Path) -> None:
    """As on two machines: each computes what the other has put elsewhere, and a bad clip is bad on both."""
    config = frozen(steps=3, cache="auto")
    config.data.train = [str(Path(with_bad_clips(config, tmp_path)[0].manifest[0].audio).parents[1] / "train.jsonl")]
    config.data.max_bad_share = 0.1
    assert on_ranks(2, _train_at_home, config, tmp_path) == [0, 0]
    assert files(tmp_path / "home 0") == files(tmp_path / "home 1")
    listed = (Path(config.run_dir) / "quarantine.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["row"] for line in listed) == [3, 17]


def _train_at_home(config: TrainConfig, folder: Path) -> None:
    os.environ["FASTCLAP_CACHE"] = str(folder / f"home {os.environ['RANK']}")
    train(config)


def test_a_frozen_tower_beside_a_sharded_one(frozen: Build) -> None:
    plain, shared = frozen("plain", "text", "off", steps=3), frozen("shared", "text", steps=3)
    for config in (plain, shared):
        config.model.audio.dropout, config.optimizer.ema_decay = 0.0, 0.0
        config.model.audio.time_masks = config.model.audio.frequency_masks = 0
        config.model.head.dropout = 0.0
    shared.shard = True
    train(plain)
    assert on_ranks(2, train, shared) == [0, 0]
    assert_same_training(plain, shared)


# ---------------------------------------------------------------------------------------------------------------------
# what has changed is computed again


def fill(config: TrainConfig, model: fastclap.CLAP, clips: ClipDataset) -> Kept:
    return keep(model, config, ALONE, clips, None, Quarantine(Path(config.run_dir) / "q.jsonl", len(clips.manifest), 0))


@pytest.fixture
def long_clips(tmp_path: Path) -> Path:
    """Six clips of 1 s and two of 0.3 s, with captions; the path of their manifest."""
    rows, generator = [], np.random.default_rng(0)
    for index in range(8):
        wave = generator.normal(0, 0.1, 16000 if index < 6 else 4800)
        soundfile.write(tmp_path / f"{index}.wav", wave, 16000, subtype="PCM_16")
        rows.append({"audio": f"{index}.wav", "text_description": [f"clip {index}"], "duration": len(wave) / 16000})
    path = tmp_path / "clips.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def model_for(config: TrainConfig) -> fastclap.CLAP:
    torch.manual_seed(0)
    return build_model(copy.deepcopy(config), load_manifest(config.data.train), None)


def test_crops_are_kept_and_shared_by_runs_of_any_seed(frozen: Build, calls: Calls, long_clips: Path) -> None:
    """Each clip longer than the crop has so many summaries, and epochs take different ones."""
    config = frozen()
    config.data.train, config.data.frozen_crops = [str(long_clips)], 3
    manifest, model = load_manifest(str(long_clips)), model_for(config)
    seen: dict[int, set[int]] = {row: set() for row in range(8)}
    for seed in (0, 1):
        clips = ClipDataset(manifest, 16000, crop_seconds=0.5, seed=seed)
        kept = fill(config, model, clips)
        assert kept.clips is not None and kept.clips.crops.tolist() == [3] * 6 + [1] * 2
        assert calls.take()[0] == (6 * 3 + 2 if seed == 0 else 0)
        made = kept.dataset(clips)
        for epoch in range(12):
            batch = made[epoch, epoch, list(range(8))]
            assert batch.audio_summary is not None
            for row, summary in enumerate(batch.audio_summary):
                places = kept.clips.places[row, : kept.clips.crops[row]]
                number = [
                    n for n, at in enumerate(places) if kept.clips.store.gather(torch.tensor([at]))[0].equal(summary)
                ]
                assert len(number) == 1
                seen[row].add(number[0])
    assert all(numbers == set(range(3 if row < 6 else 1)) for row, numbers in seen.items())
    with torch.no_grad():  # each is the summary of its own place
        for number, place in enumerate(kept.clips.places[0].tolist()):
            start = crop_start(clip_identities(manifest)[0], number, 8001)
            wave = torch.tensor(soundfile.read(manifest[0].audio, dtype="int16")[0][start : start + 8000])
            expected = model.audio_branch.eval().summarize(wave[None])[0]
            found = kept.clips.store.gather(torch.tensor([place]))[0]
            assert_close_rel(f"crop {number}", expected, found, ROUNDING)
    calls.take()
    config.data.frozen_crops = 4  # one more of each: those before stay
    assert fill(config, model, ClipDataset(manifest, 16000, crop_seconds=0.5, seed=0)).clips is not None
    assert calls.take()[0] == 6


def test_what_changes_is_computed_again_and_nothing_else(
    frozen: Build, calls: Calls, long_clips: Path, tmp_path: Path
) -> None:
    config = frozen()
    config.data.train, config.data.frozen_crops = [str(long_clips)], 2
    manifest, model = load_manifest(str(long_clips)), model_for(config)

    def computed(model: fastclap.CLAP = model, seconds: float = 0.5, **options: Any) -> tuple[int, int]:
        """Clips and captions that this costs, after every summary was compared with what the tower says of the crop."""
        clips = ClipDataset(manifest, 16000, crop_seconds=seconds, seed=0, **options)
        kept = fill(config, model, clips)
        cost = calls.take()[:2]
        assert kept.clips is not None
        audio = kept.dataset(clips)[0, 0, [6, 7]].audio_summary  # whole, unless cropped to 0.2 s
        if seconds > 0.3:
            with torch.no_grad():
                batch = clips[0, 0, [6, 7]]
                assert_close_rel(
                    "summary", model.audio_branch.eval().summarize(batch.audio, batch.lengths), audio, ROUNDING
                )
            calls.take()
        return cost

    assert computed() == (14, 8)
    assert computed() == (0, 0)
    assert computed(seconds=0.25) == (16, 0)
    assert computed(pad_to_crop=True) == (14, 0)

    path = Path(manifest[6].audio)  # the same path, size and time, other sound
    status = path.stat()
    time.sleep(0.02)
    soundfile.write(path, soundfile.read(path)[0][::-1], 16000, subtype="PCM_16")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    cost = computed()
    assert 1 <= cost[0] <= 8 and cost[1] == 0  # with the rest of its group

    other = copy.deepcopy(model)
    with torch.no_grad():
        other.audio_branch.input.bias += 0.01
        other.text_branch.embedding.weight += 0.01
    assert computed(other) == (14, 8)
    assert computed() == (0, 0)

    for file in Path(config.data.frozen_cache).rglob("*.float32.*"):  # one bit of one record, and the end of the file
        data = bytearray(file.read_bytes())
        data[100] ^= 4
        file.write_bytes(data[:-5])
    cost = computed()
    assert cost[0] > 0 and cost[1] > 0
    assert computed(other)[0] > 0
    assert computed() == computed(other) == (0, 0)


def test_packed_clips(frozen: Build, calls: Calls, long_clips: Path, tmp_path: Path) -> None:
    config = frozen()
    manifest, model = load_manifest(str(long_clips)), None
    config.data.train = [str(long_clips)]
    model = model_for(config)
    pack(manifest, tmp_path / "packed")
    packed = load_manifest(str(tmp_path / "packed"))
    summaries = []
    for source, expected in ((manifest, 26), (packed, 26), (packed, 0)):
        clips = ClipDataset(source, 16000, crop_seconds=0.5, seed=0)
        kept = fill(config, model, clips)
        assert kept.clips is not None and calls.take()[0] == expected
        summaries.append(kept.clips.gather(np.arange(6, 8)))  # the crops of longer ones lie elsewhere
    assert_close_rel("packed", summaries[0], summaries[1], ROUNDING)


def test_rows_of_one_file_share_its_summary(frozen: Build, calls: Calls, long_clips: Path) -> None:
    config = frozen()
    lines = long_clips.read_text().splitlines()
    long_clips.write_text("\n".join([*lines, *(line.replace("clip ", "again ") for line in lines)]) + "\n")
    config.data.train = [str(long_clips)]
    clips = ClipDataset(load_manifest(str(long_clips)), 16000, crop_seconds=0.5, seed=0)
    kept = fill(config, model_for(config), clips)
    assert kept.clips is not None and calls.take()[:2] == (26, 16)
    assert (kept.clips.places[:8] == kept.clips.places[8:]).all()


def test_a_clip_that_changes_while_it_is_read_is_named(
    frozen: Build, long_clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, load = frozen(), ClipDataset.load
    config.data.train = [str(long_clips)]
    clips = ClipDataset(load_manifest(str(long_clips)), 16000, crop_seconds=0.5, seed=0)

    def touching(self: ClipDataset, row: int, start: Any) -> Any:
        clip = load(self, row, start)
        if row == 2:
            os.utime(self.manifest[row].audio)
        return clip

    monkeypatch.setattr(ClipDataset, "load", touching)
    with pytest.raises(DataError, match=r"2\.wav: has changed while it was read"):
        fill(config, model_for(config), clips)


def test_too_many_bad_clips_end_the_run_before_the_first_step(frozen: Build, tmp_path: Path) -> None:
    config = frozen()
    manifest = with_bad_clips(config, tmp_path)[0].manifest
    config.data.train = [str(Path(manifest[0].audio).parents[1] / "train.jsonl")]
    with pytest.raises(DataError, match=r"2 of 48 clips are unusable, more than the tolerated share 0\.01"):
        train(config)
    assert len((Path(config.run_dir) / "quarantine.jsonl").read_text().splitlines()) == 2
    config.data.max_bad_share = 0.05
    train(config)
    assert len(losses(config)) == config.steps


# ---------------------------------------------------------------------------------------------------------------------
# what a file cannot stand for


def test_a_teacher_that_hears_the_clips(frozen: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = tmp_path / "start"
    torch.manual_seed(0)
    build_model(frozen(), load_manifest(frozen().data.train), None).save_pretrained(start)
    plain, kept = frozen("plain", cache="off", steps=3), frozen("kept", steps=3)
    for config in (plain, kept):
        config.init_from, config.loss = str(start), LossConfig(teacher="init")
        train(config)
    assert (
        "frozen audio tower: computed at every step, because the teacher init hears the clips" in capfd.readouterr().out
    )
    assert_same_training(plain, kept)


def test_a_tower_that_will_train_is_not_kept(frozen: Build) -> None:
    config, model = frozen(), model_for(frozen())
    clips = ClipDataset(load_manifest(config.data.train), 16000, seed=0)
    config.optimizer.unfreeze_step = 5  # type: ignore[attr-defined]
    kept = fill(config, model, clips)
    assert kept.clips is None and kept.texts is None and kept.dataset(clips) is clips


def test_adapters_in_a_frozen_tower_are_noticed_and_what_combines_is_not(frozen: Build) -> None:
    """A parameter that trains and has a part in the summary forbids the file; one that comes after it does not."""
    config = frozen()
    clips = ClipDataset(load_manifest(config.data.train), 16000, seed=0)
    model = model_for(config)
    model.audio_branch.gain = torch.nn.Parameter(torch.ones(()))
    assert fill(config, model, clips).clips is not None
    model.audio_branch.input.bias.requires_grad_(True)
    kept = fill(config, model, clips)
    assert kept.clips is None and kept.texts is not None


def test_what_a_tower_combines_trains(frozen: Build) -> None:
    """The weights of a frozen tower's layers get their gradient, with the file and without."""
    plain, kept = frozen("plain", "audio text", "off", steps=5), frozen("kept", "audio text", steps=5)
    wavlm = {"model_type": "wavlm", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    wavlm |= {"intermediate_size": 16, "conv_dim": [8] * 7, "feat_extract_norm": "layer", "num_conv_pos_embeddings": 16}
    wavlm |= {"num_conv_pos_embedding_groups": 2}
    for config in (plain, kept):
        config.model.audio = AudioTowerConfig("wav2vec2", hf_config=wavlm, hidden_states="weighted", freeze=True)
        train(config)
    assert_same_training(plain, kept)
    name = "audio_branch.pooling.layer_weights"
    weights = [load_file(Path(c.run_dir) / "model" / "model.safetensors")[name] for c in (plain, kept)]
    assert weights[1].any() and torch.allclose(*weights, atol=1e-5)
    assert files(kept.data.frozen_cache)


# ---------------------------------------------------------------------------------------------------------------------
# real weights


def test_whisper_and_minilm_on_real_speech(real_weights: Path, real_speech: Path, tmp_path: Path) -> None:
    """Twelve clips, three steps: the losses of the run with the file are those of the run without."""
    lines = (real_speech / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[::28][:12]) + "\n")

    def config(name: str, cache: str) -> TrainConfig:
        built = TrainConfig(
            run_dir=str(tmp_path / name),
            data=DataConfig(
                train=[str(tmp_path / "train.jsonl")],
                audio_root=str(real_speech),
                crop_seconds=2.0,
                workers=0,
                frozen_cache=cache,
            ),
            optimizer=OptimizerConfig(warmup_steps=0),
            steps=3,
            batch_size=6,
            log_every=1,
            device="cpu",
        )
        whisper, minilm = (str(real_weights / name) for name in ("whisper-tiny.en-encoder", "all-MiniLM-L6-v2"))
        built.model.audio = AudioTowerConfig(kind="whisper", pretrained=whisper, freeze=True)
        built.model.text = TextTowerConfig(kind="hf", pretrained=minilm, freeze=True)
        return built

    plain, kept, again = (
        config("plain", "off"),
        config("kept", str(tmp_path / "c")),
        config("again", str(tmp_path / "c")),
    )
    for run in (plain, kept, again):
        train(run)
    assert losses(again) == losses(kept)
    assert_close_rel("losses", torch.tensor(losses(plain)), torch.tensor(losses(kept)), ROUNDING)
