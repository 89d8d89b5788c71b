"""Batches: the same whatever loads them, always full, and honest about what could not be used."""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from fastclap.audio import read_audio
from fastclap.data import (
    BadClip,
    Batch,
    BatchSampler,
    ClipDataset,
    Manifest,
    Quarantine,
    Row,
    eval_batches,
    load_manifest,
    make_loader,
)
from fastclap.data.dataset import text_id
from fastclap.data.workers import describe_deaths
from fastclap.errors import DataError, TrainingError
from fastclap.models.tokenizer import train_tokenizer
from fastclap.testing import assert_close_rel

RATE = 16000
MakeSet = Callable[..., str]


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


def equal(first: Batch, second: Batch) -> bool:
    pure = [{name: value for name, value in vars(batch).items() if name != "seconds"} for batch in (first, second)]
    return plain(pure[0]) == plain(pure[1])  # type: ignore[no-any-return]


def damage(manifest: Manifest, row: int, kind: str) -> None:
    path = Path(manifest[row].audio)
    wave = np.random.default_rng(0).normal(0, 0.1, RATE)
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "corrupted":
        path.write_bytes(b"no audio" * 1000)
    elif kind == "zero length":
        soundfile.write(path, wave[:0], RATE)
    elif kind == "all zero":
        soundfile.write(path, wave * 0, RATE)
    elif kind == "NaN":
        wave[5000] = np.nan
        soundfile.write(path, wave, RATE, subtype="FLOAT")
    elif kind == "too short":
        soundfile.write(path, wave[:500], RATE)


def test_a_batch_holds_the_clips(make_set: MakeSet) -> None:
    manifest = load_manifest(make_set(8))
    batch = ClipDataset(manifest, RATE, seed=0)[3, 0, [5, 1, 2]]
    assert (batch.step, batch.epoch, batch.rows, batch.bad) == (3, 0, [5, 1, 2], [])
    assert batch.audio.dtype == torch.int16
    assert batch.audio.shape == (3, int(batch.lengths.max()))
    for index, row in enumerate(batch.rows):
        wave = read_audio(manifest[row].audio)
        assert batch.lengths[index] == len(wave)
        np.testing.assert_array_equal(batch.audio[index, : len(wave)], wave)
        assert not batch.audio[index, len(wave) :].any()
        assert batch.captions[index] in manifest[row].captions
        assert batch.caption_ids[index] == text_id(batch.captions[index])
    assert batch.samples == batch.lengths.tolist()
    assert batch.mean is batch.std is batch.text is batch.text_rows is None


def test_crop_is_a_part_of_the_clip_and_is_redrawn_each_epoch(make_set: MakeSet) -> None:
    manifest = load_manifest(make_set(4))
    dataset = ClipDataset(manifest, RATE, seed=0, crop_seconds=0.1)
    wave = read_audio(manifest[2].audio).tolist()
    starts = set()
    for epoch in range(30):
        batch = dataset[epoch, epoch, [2]]
        assert batch.audio.shape == (1, 1600)
        crop = batch.audio[0].tolist()
        starts.add(next(i for i in range(len(wave) - 1599) if wave[i : i + 1600] == crop))
    assert len(starts) > 20
    assert min(starts) < 500
    assert max(starts) > len(wave) - 1600 - 500


@pytest.mark.parametrize("rate", [RATE, 44100])
def test_statistics_are_those_of_the_whole_file(tmp_path: Path, rate: int) -> None:
    wave = np.random.default_rng(0).normal(0.02, 0.1, rate)
    soundfile.write(tmp_path / "clip.wav", wave, rate, subtype="PCM_16")
    manifest = Manifest([Row(str(tmp_path / "clip.wav"), ("x",), (), {}, None, None, None, "m:1", 0)])
    batch = ClipDataset(manifest, RATE, seed=0, crop_seconds=0.25, file_statistics=True)[0, 0, [0]]
    whole = torch.from_numpy(read_audio(tmp_path / "clip.wav")).double() / 32768
    assert batch.audio.shape == (1, 4000)
    assert batch.mean is not None
    assert batch.std is not None
    assert batch.mean.dtype == batch.std.dtype == torch.float32
    assert_close_rel("mean", whole.mean()[None], batch.mean, 1e-6)
    assert_close_rel("std", whole.std(correction=0)[None], batch.std, 1e-6)


def test_cache_changes_nothing_but_the_reading(make_set: MakeSet) -> None:
    manifest = load_manifest(make_set(6))
    plain = ClipDataset(manifest, RATE, seed=0, crop_seconds=0.15)
    cached = ClipDataset(manifest, RATE, seed=0, crop_seconds=0.15, cache_mb=1)
    small = ClipDataset(manifest, RATE, seed=0, crop_seconds=0.15, cache_mb=0.02)  # two clips fit
    first = [plain[e, e, [0, 3, 5]] for e in range(3)]
    assert all(equal(batch, cached[e, e, [0, 3, 5]]) for e, batch in enumerate(first))
    for row in (0, 3, 5):
        Path(manifest[row].audio).unlink()
    assert all(equal(batch, cached[e, e, [0, 3, 5]]) for e, batch in enumerate(first))
    assert small[0, 0, [1, 2, 4]].rows == [1, 2, 4]
    Path(manifest[1].audio).unlink()
    Path(manifest[4].audio).unlink()
    assert 1 in small[0, 0, [1, 2, 4]].rows
    assert 4 not in small[0, 0, [1, 2, 4]].rows
    assert 1 not in pickle.loads(pickle.dumps(small))[0, 0, [1, 2]].rows  # a loader process starts without clips


def test_captions_are_drawn_by_seed_and_epoch(make_set: MakeSet) -> None:
    manifest = load_manifest(make_set(6))
    rows = list(range(6))
    drawn = [ClipDataset(manifest, RATE, seed=1)[0, epoch, rows].captions for epoch in range(30)]
    assert drawn == [ClipDataset(manifest, RATE, seed=1)[99, epoch, rows].captions for epoch in range(30)]
    for row in rows:
        assert {captions[row] for captions in drawn} == set(manifest[row].captions)
    assert drawn[0] != ClipDataset(manifest, RATE, seed=2)[0, 0, rows].captions


def test_kinds_of_captions(make_set: MakeSet) -> None:
    manifest = load_manifest(make_set(4))
    fine = ClipDataset(manifest, RATE, seed=0, caption="fine")[0, 0, [2]]
    assert fine.captions == ["fine 2"]
    both = [ClipDataset(manifest, RATE, seed=0, caption="both")[0, epoch, [2]].captions[0] for epoch in range(60)]
    assert set(both) == {*manifest[2].captions, "fine 2"}
    assert 15 < both.count("fine 2") < 45
    with pytest.raises(DataError, match="it is one of 'global', 'fine', 'both', 'pair', 'perturbed'"):
        ClipDataset(manifest, RATE, seed=0, caption="coarse")  # type: ignore[arg-type]


def test_fine_captions_must_be_there(make_set: MakeSet) -> None:
    manifest = load_manifest(make_set(4, fine_description=None))
    with pytest.raises(DataError, match=r"set\.jsonl:1: no fine_description; add one, or train with caption='global'"):
        ClipDataset(manifest, RATE, seed=0, caption="fine")
    assert ClipDataset(manifest, RATE, seed=0, caption="both")[0, 0, [1]].captions[0] in manifest[1].captions


def test_equal_captions_have_equal_ids() -> None:
    assert text_id("A man speaks.") == text_id("A man speaks.") != text_id("A man speaks")
    assert 0 <= text_id("é") < 2**63


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file"),
        ("truncated", "truncated: the header promises"),
        ("corrupted", "not readable as audio"),
        ("zero length", "zero length"),
        ("all zero", "all samples are zero: the recording is silent"),
        ("NaN", "sample 5000 is NaN or infinite"),
        ("too short", "too short: 0.031 s, at least 0.1 s are needed"),
    ],
)
def test_bad_clip_is_replaced_and_reported(make_set: MakeSet, kind: str, reason: str) -> None:
    manifest = load_manifest(make_set(12))
    damage(manifest, 3, kind)
    batch = ClipDataset(manifest, RATE, seed=0)[0, 0, [1, 3, 5, 7]]
    assert len(batch.rows) == len(batch.captions) == len(batch.audio) == 4
    assert batch.rows[0::2] + batch.rows[3:] == [1, 5, 7]
    assert batch.rows[1] not in (1, 3, 5, 7)
    assert batch.captions[1] in manifest[batch.rows[1]].captions
    (bad,) = batch.bad
    assert (bad.row, bad.path, bad.origin) == (3, manifest[3].audio, manifest[3].origin)
    assert reason in bad.reason
    assert equal(batch, ClipDataset(manifest, RATE, seed=0)[0, 0, [1, 3, 5, 7]])


def test_replacement_comes_from_the_same_source(make_set: MakeSet) -> None:
    manifest = load_manifest([make_set(20, name="large"), make_set(3, name="small")])
    damage(manifest, 21, "missing")
    for epoch in range(10):
        assert ClipDataset(manifest, RATE, seed=0)[0, epoch, [0, 21]].rows[1] in (20, 22)


def test_replacements_differ_from_each_other(make_set: MakeSet) -> None:
    manifest = load_manifest(make_set(24))
    for row in range(8):
        damage(manifest, row, "missing")
    for epoch in range(10):
        batch = ClipDataset(manifest, RATE, seed=0)[0, epoch, list(range(12))]
        assert len(set(batch.rows)) == 12
        assert set(range(8)) <= {bad.row for bad in batch.bad}


def test_batch_of_the_whole_set_repeats_a_row_rather_than_shrink(make_set: MakeSet) -> None:
    manifest = load_manifest(make_set(4))
    damage(manifest, 0, "all zero")
    for epoch in range(20):
        batch = ClipDataset(manifest, RATE, seed=0)[0, epoch, [0, 1, 2, 3]]
        assert batch.rows[1:] == [1, 2, 3]
        assert batch.rows[0] in (1, 2, 3)
        assert [bad.row for bad in batch.bad] == [0]


def test_nothing_usable_stops_with_the_reason(make_set: MakeSet) -> None:
    manifest = load_manifest(make_set(5))
    for row in range(5):
        damage(manifest, row, "all zero")
    with pytest.raises(DataError, match=r"set\.jsonl:2: neither this clip nor any of 64 replacements .* are zero"):
        ClipDataset(manifest, RATE, seed=0)[0, 0, [1]]


def test_crop_moves_from_silence_to_sound(tmp_path: Path) -> None:
    wave = np.zeros(RATE)
    wave[15000:15100] = 0.5
    soundfile.write(tmp_path / "clip.wav", wave, RATE)
    manifest = Manifest([Row(str(tmp_path / "clip.wav"), ("x",), (), {}, None, None, None, "m:1", 0)])
    for statistics in (False, True):
        dataset = ClipDataset(manifest, RATE, seed=0, crop_seconds=0.2, file_statistics=statistics)
        assert all(dataset[epoch, epoch, [0]].audio.any() for epoch in range(20))


# Loading in other processes


def test_loader_processes_change_nothing(make_set: MakeSet) -> None:
    manifest = load_manifest([make_set(25, name="one"), make_set(9, name="two")], mix="interleave")
    damage(manifest, 4, "truncated")
    damage(manifest, 30, "NaN")
    dataset = ClipDataset(manifest, RATE, seed=5, crop_seconds=0.25, file_statistics=True)
    sampler = BatchSampler(manifest, 6, seed=5, start_step=2, stop_step=22)
    alone = list(make_loader(dataset, sampler))
    assert [batch.step for batch in alone] == list(range(2, 22))
    assert {bad.row for batch in alone for bad in batch.bad} == {4, 30}
    together = list(make_loader(dataset, sampler, num_workers=2))
    assert len(together) == 20
    assert all(map(equal, alone, together))


def test_captions_are_tokenized_where_they_are_drawn(make_set: MakeSet) -> None:
    manifest = load_manifest(
        [make_set(7, text_description=["It is calm.", "It is loud, very loud."]), make_set(5, name="b")]
    )
    texts = [caption for row in manifest for caption in row.captions]
    tokenizer = train_tokenizer(texts, 300)
    dataset = ClipDataset(manifest, RATE, seed=0, tokenize=functools.partial(tokenizer, max_tokens=8))
    sampler = BatchSampler(manifest, 6, seed=0, stop_step=6)
    alone = list(make_loader(dataset, sampler))
    for batch in alone:
        distinct = list(dict.fromkeys(batch.captions))
        assert batch.text is not None
        assert batch.text_rows is not None
        assert len(distinct) < len(batch.captions) or batch.text_rows.tolist() == list(range(6))
        assert plain(batch.text) == plain(tokenizer(distinct, 8))
        assert [distinct[row] for row in batch.text_rows] == batch.captions
        assert batch.text_rows.dtype == torch.int64
        assert batch.tokens == batch.text["attention_mask"].sum(1).tolist()
    assert any(len(set(batch.captions)) < 6 for batch in alone)
    together = list(make_loader(dataset, sampler, num_workers=1))
    assert all(map(equal, alone, together))
    moved = alone[0].to("meta")
    assert moved.text is not None
    assert moved.text_rows is not None
    assert {tensor.device.type for tensor in (*moved.text.values(), moved.text_rows)} == {"meta"}
    assert moved.samples == alone[0].samples


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_draws_nothing_from_the_global_generators(make_set: MakeSet, num_workers: int) -> None:
    manifest = load_manifest(make_set(6))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    sampler = BatchSampler(manifest, 2, seed=0, stop_step=4)
    assert len(list(make_loader(ClipDataset(manifest, RATE, seed=0), sampler, num_workers=num_workers))) == 4
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_error_of_a_loader_process_arrives_unwrapped(make_set: MakeSet) -> None:
    manifest = load_manifest(make_set(6))
    for row in range(6):
        Path(manifest[row].audio).write_bytes(b"none")
    loader = make_loader(ClipDataset(manifest, RATE, seed=0), BatchSampler(manifest, 2, seed=0), num_workers=1)
    with pytest.raises(DataError) as caught:
        next(iter(loader))
    assert str(caught.value).startswith(f"{Path(manifest[0].audio).parent}.jsonl:")
    assert "not readable as audio" in str(caught.value)
    assert ".wav" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_loader_process_that_dies_ends_the_run_with_its_cause(make_set: MakeSet) -> None:
    manifest = load_manifest(make_set(6))
    loader = make_loader(ClipDataset(manifest, RATE, seed=0), BatchSampler(manifest, 2, seed=0), num_workers=2)
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    next(batches)
    killed, other = set(multiprocessing.active_children()) - before
    os.kill(killed.pid or 0, signal.SIGKILL)
    with pytest.raises(TrainingError) as caught:
        for _ in batches:
            pass
    message = str(caught.value)
    assert f"a data loading process is gone: process {killed.pid} was ended by SIGKILL, which is how the" in message
    assert "Continue the run (--resume)" in message
    assert "(--data.workers)" in message
    assert str(other.pid) not in message
    assert not other.is_alive()


def test_deaths_in_words() -> None:
    assert describe_deaths([(7, -signal.SIGBUS), (8, 1), (9, None)]) == (
        "process 7 was ended by SIGBUS, which is what a full /dev/shm (shared memory) or a shrinking file leads to; "
        "process 8 ended with status 1; process 9 ended"
    )
    assert describe_deaths([(7, -signal.SIGUSR1)]) == "process 7 was ended by SIGUSR1"


KILLED = """
import sys
from fastclap.data import *
if __name__ == "__main__":
    manifest = load_manifest(sys.argv[1])
    dataset = ClipDataset(manifest, 16000, seed=0)
    for batch in make_loader(dataset, BatchSampler(manifest, 4, seed=0), num_workers=1):
        print(batch.step, flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loader_processes_end_with_a_killed_run(make_set: MakeSet, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "run.py"), make_set(8)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"0\n"
        run.send_signal(signal.SIGKILL)

    def alive() -> list[str]:
        stats = (text for path in Path("/proc").glob("[0-9]*/stat") if (text := read_stat(path)))
        fields = (text.rpartition(")")[2].split() for text in stats)
        return [session for state, _, _, session, *_ in fields if int(session) == run.pid and state != "Z"]

    deadline = time.monotonic() + 30
    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive()


def read_stat(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process ended meanwhile
        return ""


def test_unexpected_error_names_the_clip(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(make_set(3))
    monkeypatch.setattr("fastclap.data.dataset.whole_clip", lambda file: 1 / 0)
    with pytest.raises(RuntimeError, match=r"set\.jsonl:2: .*/001\.wav: ZeroDivisionError: division by zero"):
        ClipDataset(manifest, RATE, seed=0)[0, 0, [1]]


def test_real_speech_is_read_whole(real_speech: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        manifest = load_manifest(str(real_speech / name), check_files=True)
        seen = 0
        for rows, _, lengths, _, std in eval_batches(manifest, RATE, 32):
            assert [round(manifest[row].duration * RATE) for row in rows] == lengths.tolist()  # type: ignore[operator]
            assert (std > 1e-4).all()
            seen += len(rows)
        assert seen == len(manifest)


# Quarantine


def bad_clip(row: int) -> BadClip:
    return BadClip(row, f"{row}.wav", "truncated", f"m.jsonl:{row + 1}")


def test_quarantine_lists_each_clip_once(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 100, 0.05)
    assert quarantine.add([]) == []
    assert not (tmp_path / "quarantine.jsonl").exists()
    assert quarantine.add([bad_clip(1), bad_clip(2), bad_clip(1)]) == [bad_clip(1), bad_clip(2)]
    assert quarantine.add([bad_clip(2), bad_clip(3)]) == [bad_clip(3)]
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [1, 2, 3]
    assert lines[0] == {"row": 1, "path": "1.wav", "reason": "truncated", "origin": "m.jsonl:2"}
    assert len(quarantine) == 3


def test_quarantine_goes_on_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 100, 0.05).add([bad_clip(1), bad_clip(2)])
    with open(path, "a") as file:
        file.write('{"row": 3, "pa')  # killed in the middle of a line
    resumed = Quarantine(path, 100, 0.05)
    assert resumed.add([bad_clip(2), bad_clip(4)]) == [bad_clip(4)]
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [1, 2, 4]


def test_ranks_share_a_quarantine(tmp_path: Path) -> None:
    ranks = [Quarantine(tmp_path / "quarantine.jsonl", 100, 0.03) for _ in range(2)]
    ranks[0].add([bad_clip(1), bad_clip(2)])
    ranks[1].add([bad_clip(2), bad_clip(3)])
    with pytest.raises(DataError, match="4 of 100 clips are unusable"):
        ranks[0].add([bad_clip(4)])


def test_quarantine_stops_above_the_share(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 100, 0.02)
    quarantine.add([bad_clip(1), bad_clip(2)])
    with pytest.raises(DataError) as caught:
        quarantine.add([bad_clip(3)])
    message = str(caught.value)
    assert "3 of 100 clips are unusable, more than the tolerated share 0.02" in message
    assert "the last one is m.jsonl:4: 3.wav: truncated" in message
    assert "--data.max-bad-share" in message
    with pytest.raises(DataError, match="1 of 10 clips"):
        Quarantine(tmp_path / "other.jsonl", 10, 0.0).add([bad_clip(0)])
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 3  # listed before the run ends


def test_one_bad_clip_does_not_end_a_run_on_a_small_set(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 40, 0.01)
    assert quarantine.add([bad_clip(7)]) == [bad_clip(7)]
    with pytest.raises(DataError, match=r"2 of 40 clips are unusable, more than the tolerated share 0\.01"):
        quarantine.add([bad_clip(8)])


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b"7", b'{"row": "1", "path": 2}', b'{"row": 1}', b"\xff", b"[" * 5000, b""]
)
def test_quarantine_skips_lines_that_are_none(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_bytes(line + b'\n{"row": 1, "path": "1.wav"}\n')
    assert Quarantine(path, 100, 0.05).add([bad_clip(1), bad_clip(2)]) == [bad_clip(2)]


@pytest.mark.parametrize("kind", ["full disk", "pipe", "folder"])
def test_a_list_that_cannot_be_written_ends_no_run(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "quarantine.jsonl"
    if kind == "full disk":
        path.symlink_to("/dev/full")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    quarantine = Quarantine(path, 100, 0.02)
    assert quarantine.add([bad_clip(1)]) == [bad_clip(1)]
    assert quarantine.add([bad_clip(1), bad_clip(2)]) == [bad_clip(2)]
    assert capsys.readouterr().err.count(f"{path}: unusable clips cannot be listed here (") == 1
    with pytest.raises(DataError, match=r"3 of 100 clips .* The first are listed in"):
        quarantine.add([bad_clip(3)])


def test_a_disk_that_fills_up_loses_no_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, 100, 0.05)
    quarantine.add([bad_clip(1)])
    with monkeypatch.context() as full:
        full.setattr("builtins.open", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
        quarantine.add([bad_clip(2)])
    assert len(quarantine) == 2
    assert quarantine.add([bad_clip(3)]) == [bad_clip(3)]
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [1, 3]


# Evaluation


def test_evaluation_covers_every_clip_once(make_set: MakeSet) -> None:
    manifest = load_manifest(make_set(11, duration=False))
    batches = list(eval_batches(manifest, RATE, 4))
    assert [len(rows) for rows, *_ in batches] == [4, 4, 3]
    assert sorted(row for rows, *_ in batches for row in rows) == list(range(11))
    lengths = torch.cat([lengths for _, _, lengths, _, _ in batches])
    assert torch.equal(lengths, lengths.sort(descending=True).values)
    for rows, audio, lengths, mean, std in batches:
        for index, row in enumerate(rows):
            wave = read_audio(manifest[row].audio)
            np.testing.assert_array_equal(audio[index, : lengths[index]], wave)
            assert abs(float(mean[index]) - wave.mean() / 32768) < 1e-6
            assert abs(float(std[index]) - wave.std() / 32768) < 1e-6


def test_evaluation_uses_the_beginning_of_long_clips(make_set: MakeSet) -> None:
    manifest = load_manifest(make_set(4))
    ((rows, audio, lengths, mean, _),) = eval_batches(manifest, RATE, 4, max_seconds=0.15)
    assert lengths.tolist() == [2400] * 4
    np.testing.assert_array_equal(audio[0], read_audio(manifest[rows[0]].audio)[:2400])
    assert abs(float(mean[0]) - read_audio(manifest[rows[0]].audio).mean() / 32768) < 1e-6


def test_evaluation_reports_bad_clips(make_set: MakeSet) -> None:
    manifest = load_manifest(make_set(6))
    damage(manifest, 2, "all zero")
    damage(manifest, 4, "missing")
    bad: list[BadClip] = []
    used = [row for rows, *_ in eval_batches(manifest, RATE, 2, bad=bad) for row in rows]
    assert sorted(used) == [0, 1, 3, 5]
    assert {(clip.row, clip.origin) for clip in bad} == {(2, manifest[2].origin), (4, manifest[4].origin)}
    with pytest.raises(DataError, match=r"set\.jsonl:\d+: .*\.wav: (all samples are zero|no such file)"):
        list(eval_batches(manifest, RATE, 2))


def test_a_batch_moves_with_its_tensors(make_set: MakeSet) -> None:
    batch = ClipDataset(load_manifest(make_set(3)), RATE, seed=0, file_statistics=True)[0, 0, [0, 1]]
    moved = batch.to("meta", non_blocking=True)
    tensors = (moved.audio, moved.lengths, moved.mean, moved.std, moved.caption_ids)
    assert all(tensor is not None and tensor.device.type == "meta" for tensor in tensors)
    assert (moved.captions, moved.rows, moved.mean is None) == (batch.captions, batch.rows, False)


def test_clips_can_be_padded_to_the_crop(make_set: MakeSet) -> None:
    manifest = load_manifest(make_set(4))
    plain, padded = (
        ClipDataset(manifest, RATE, seed=0, crop_seconds=9, pad_to_crop=on)[0, 0, [1, 3]] for on in (False, True)
    )
    assert padded.audio.shape == (2, 9 * RATE) and padded.lengths.tolist() == padded.samples == [9 * RATE] * 2
    width = plain.audio.shape[1]
    assert width < 9 * RATE and torch.equal(padded.audio[:, :width], plain.audio) and not padded.audio[:, width:].any()
    with pytest.raises(DataError, match="crop_seconds"):
        ClipDataset(manifest, RATE, seed=0, pad_to_crop=True)
