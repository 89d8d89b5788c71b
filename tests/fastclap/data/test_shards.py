"""Packed folders: the same batches as from files, from bytes that are checked and the same whoever wrote them."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastclap.audio import AudioError, AudioFile, whole_clip
from fastclap.commands.main import main
from fastclap.data import BatchSampler, ClipDataset, Manifest, Quarantine, eval_batches, load_manifest, make_loader
from fastclap.data.pack import pack
from fastclap.data.shards import BLOCK, PackedFile, index_checksum, open_clip
from fastclap.errors import ConfigError, DataError

RATE = 16000
MakeSet = Callable[..., str]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def equal(first: Any, second: Any) -> bool:
    """Whether two batches are alike in all that training sees."""
    names = ("audio", "lengths", "samples", "mean", "std", "captions", "caption_ids", "rows")
    values = [(getattr(first, name), getattr(second, name)) for name in names]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in values)


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    """Long and short clips in several formats, some of several rows."""
    random = np.random.default_rng(0)
    formats = [
        ("wav", "PCM_16", 1),
        ("flac", "PCM_16", 1),
        ("wav", "FLOAT", 1),
        ("wav", "PCM_16", 2),
        ("flac", "PCM_24", 2),
    ]
    rows = []
    for index in range(15):
        extension, subtype, channels = formats[index % 5]
        seconds = 0.3 + 0.45 * (index * 7 % 15)
        wave = random.normal(0.01, 0.1, (round(seconds * RATE), channels))
        soundfile.write(tmp_path / f"{index}.{extension}", wave, RATE, subtype=subtype)
        row = {
            "audio": f"{index}.{extension}",
            "text_description": [f"clip {index}", f"the {index}. clip"],
            "fine_description": f"fine {index}" if index % 2 else None,
            "classification_tag": "odd" if index % 2 else "even",
            "situational_tags": ["calm"] if index % 3 else [],
            "speaker": index % 4,
            "text_style_prompt": f"style {index}" if index == 3 else None,
            "duration": seconds if index % 2 else None,
        }
        rows.append(row)
    rows.append({**rows[3], "text_description": "another caption of a clip"})
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def packed(source: str, folder: Path, **options: Any) -> Manifest:
    pack(load_manifest(source), folder, **options)
    return load_manifest(str(folder))


# The same clips


def test_a_packed_folder_is_the_whole_manifest(mixed: str, tmp_path: Path) -> None:
    files = load_manifest(mixed)
    shards = packed(mixed, tmp_path / "pack", shard_mb=0.3)
    assert (len(shards), shards.columns, shards.source_sizes) == (16, files.columns, (16,))
    for index, (file, row) in enumerate(zip(files, shards, strict=True)):
        assert row[:5] == file[:5]
        assert row.style_prompt == file.style_prompt
        assert row.origin == f"{tmp_path / 'pack'}:{index + 1}"
        assert row.packed is not None
        assert row.packed.origin == file.origin
        assert row.duration == (file.duration or soundfile.info(file.audio).duration)
        with AudioFile(file.audio, RATE) as source, open_clip(row, RATE) as clip:
            expected, found = whole_clip(source), whole_clip(clip)
        np.testing.assert_array_equal(found.wave, expected.wave)
        assert (found.mean, found.variance, found.std) == (expected.mean, expected.variance, expected.std)
    assert shards[15].packed is not None
    assert shards[15].packed[:2] == shards[3].packed[:2]  # type: ignore[index] # one file, one place
    assert sorted(os.listdir(tmp_path / "pack")) == [
        "index.parquet",
        "pack.json",
        *(f"shard-{number:05d}.pcm" for number in range(7)),
    ]


@pytest.mark.parametrize("crop", [0.25, 1.1, 3.0])
@pytest.mark.parametrize("statistics", [False, True])
def test_batches_are_those_from_the_files(mixed: str, tmp_path: Path, crop: float, statistics: bool) -> None:
    files, shards = load_manifest(mixed), packed(mixed, tmp_path / "pack", shard_mb=0.4)
    options: dict[str, Any] = {"seed": 1, "crop_seconds": crop, "file_statistics": statistics, "caption": "both"}
    from_files, from_shards = ClipDataset(files, RATE, **options), ClipDataset(shards, RATE, **options)
    cached = ClipDataset(shards, RATE, **options, cache_mb=1)
    for path in (row.audio for row in files):
        assert os.path.exists(path)
    for step in range(6):
        expected = from_files[step, step, list(range(step, 16))]
        assert equal(from_shards[step, step, list(range(step, 16))], expected)
        assert equal(cached[step, step, list(range(step, 16))], expected)


def test_the_files_are_not_needed_any_more(mixed: str, tmp_path: Path) -> None:
    files = load_manifest(mixed)
    sampler = BatchSampler(files, 4, seed=3, stop_step=9)
    options: dict[str, Any] = {"seed": 3, "crop_seconds": 1.3, "file_statistics": True}
    expected = list(make_loader(ClipDataset(files, RATE, **options), sampler))
    shards = packed(mixed, tmp_path / "pack")
    for path in {row.audio for row in files}:
        os.unlink(path)
    shards = load_manifest(str(tmp_path / "pack"))
    sampler = BatchSampler(shards, 4, seed=3, stop_step=9)
    dataset = pickle.loads(pickle.dumps(ClipDataset(shards, RATE, **options)))
    for workers in (0, 2):
        found = list(make_loader(dataset, sampler, num_workers=workers))
        assert len(found) == 9
        assert all(map(equal, found, expected))


def test_silent_crop_moves_to_the_sound_as_in_a_file(tmp_path: Path) -> None:
    wave = np.zeros(4 * RATE)
    wave[50000:50100] = 0.5
    soundfile.write(tmp_path / "clip.wav", wave, RATE)
    (tmp_path / "m.jsonl").write_text('{"audio": "clip.wav", "text_description": "a click"}\n')
    files, shards = load_manifest(str(tmp_path / "m.jsonl")), packed(str(tmp_path / "m.jsonl"), tmp_path / "pack")
    datasets = [
        ClipDataset(manifest, RATE, seed=0, crop_seconds=0.5, file_statistics=True) for manifest in (files, shards)
    ]
    for epoch in range(10):
        first, second = (dataset[epoch, epoch, [0]] for dataset in datasets)
        assert first.audio.any()
        assert equal(first, second)


def test_packed_and_other_manifests_mix(mixed: str, make_set: MakeSet, tmp_path: Path) -> None:
    other = make_set(9, name="other", duration=True)
    packed(mixed, tmp_path / "pack")
    files = load_manifest([mixed, other], mix="interleave")
    both = load_manifest([str(tmp_path / "pack"), other], mix="interleave")
    assert both.source_sizes == files.source_sizes
    options: dict[str, Any] = {"seed": 0, "crop_seconds": 0.7}
    for step, epoch, rows in BatchSampler(files, 6, seed=2, stop_step=8):
        assert BatchSampler(both, 6, seed=2).batch(step) == (epoch, rows)
        batch = ClipDataset(both, RATE, **options)[step, epoch, rows]
        assert equal(batch, ClipDataset(files, RATE, **options)[step, epoch, rows])
    with pytest.raises(DataError, match=r"duplicate of .*pack:4 \(same audio, captions and tags\)"):
        load_manifest([str(tmp_path / "pack"), mixed])


def test_evaluation_reads_shards(mixed: str, tmp_path: Path) -> None:
    files, shards = load_manifest(mixed), packed(mixed, tmp_path / "pack", shard_mb=0.5)
    pairs = zip(eval_batches(files, RATE, 5), eval_batches(shards, RATE, 5), strict=True)
    for (rows, *tensors), (packed_rows, *packed_tensors) in pairs:
        assert rows == packed_rows
        assert all(map(torch.equal, tensors, packed_tensors))


def test_columns_can_be_renamed_before_and_after(mixed: str, tmp_path: Path) -> None:
    pack(load_manifest(mixed, columns={"classification_tag": "speaker"}), tmp_path / "pack")
    row = load_manifest(str(tmp_path / "pack"))[5]
    assert (row.classification_tag, row.tags) == ("1", {"situational_tags": ("calm",)})
    pack(load_manifest(mixed), tmp_path / "plain")
    row = load_manifest(str(tmp_path / "plain"), columns={"classification_tag": "speaker"})[5]
    assert row.classification_tag == "1"


def test_manifest_without_captions_packs_for_classification(make_set: MakeSet, tmp_path: Path) -> None:
    source = make_set(3, text_description=None)
    pack(load_manifest(source, require_captions=False), tmp_path / "pack")
    assert len(load_manifest(str(tmp_path / "pack"), require_captions=False)) == 3
    with pytest.raises(DataError, match="pack:1: column 'text_description' has an empty caption"):
        load_manifest(str(tmp_path / "pack"))


def test_other_rates_are_resampled_once_and_refused_later(tmp_path: Path) -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, 22050)
    soundfile.write(tmp_path / "clip.wav", wave, 22050)
    (tmp_path / "m.jsonl").write_text('{"audio": "clip.wav", "text_description": "noise"}\n')
    shards = packed(str(tmp_path / "m.jsonl"), tmp_path / "pack", sampling_rate=8000)
    assert ClipDataset(shards, 8000, seed=0)[0, 0, [0]].samples == [8000]
    with pytest.raises(DataError, match=r"pack: packed at 8000 Hz, but 16000 Hz are wanted; .*--sampling-rate 16000"):
        ClipDataset(shards, RATE, seed=0)[0, 0, [0]]


# The same bytes


def test_bytes_do_not_depend_on_the_processes(mixed: str, tmp_path: Path) -> None:
    manifest = load_manifest(mixed)
    seen: list[tuple[int, int]] = []
    pack(manifest, tmp_path / "alone", shard_mb=0.3)
    summary = pack(manifest, tmp_path / "two", shard_mb=0.3, workers=2, advance=lambda *at: seen.append(at))
    assert contents(tmp_path / "alone") == contents(tmp_path / "two")
    assert seen == [(done, 15) for done in range(16)]
    size = sum(path.stat().st_size for path in (tmp_path / "two").glob("*.pcm"))
    assert summary == {
        "folder": str(tmp_path / "two"),
        "rows": 16,
        "clips": 15,
        "hours": size / 2 / RATE / 3600,
        "bytes": size,
        "shards": 7,
        "skipped": 0,
    }
    for path in (tmp_path / "two").glob("*.pcm"):
        clips = [
            row.packed for row in load_manifest(str(tmp_path / "two")) if row.packed and row.packed.shard == str(path)
        ]
        assert path.stat().st_size <= 300_000 or len(clips) == 1


def test_a_pack_of_a_pack_has_the_same_shards(mixed: str, tmp_path: Path) -> None:
    shards = packed(mixed, tmp_path / "one", shard_mb=0.3)
    pack(shards, tmp_path / "two", shard_mb=0.3)
    first, second = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {name: data for name, data in first.items() if name.endswith("pcm")} == {
        name: data for name, data in second.items() if name.endswith("pcm")
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_interrupted_anywhere_it_goes_on_to_the_same_result(mixed: str, tmp_path: Path, workers: int) -> None:
    manifest = load_manifest(mixed)
    damaged = Path(manifest[14].audio)  # the last one, after which no shard follows
    damaged.write_bytes(damaged.read_bytes()[:1000])
    pack(manifest, tmp_path / "whole", shard_mb=0.4)

    def attempt(stop: int) -> list[int]:
        decoded = []

        def advance(done: int, total: int) -> None:
            decoded.append(done)
            if done == stop:
                raise KeyboardInterrupt

        pack(manifest, tmp_path / "parts", shard_mb=0.4, workers=workers, advance=advance)
        return decoded

    for stop in (0, 1, 5, 10, 15):
        with pytest.raises(KeyboardInterrupt):
            attempt(stop)
        with pytest.raises(DataError, match="parts: an unfinished pack; run the same `fastclap pack` command again"):
            load_manifest(str(tmp_path / "parts"))
    decoded = attempt(-1)
    assert decoded[0] > 10  # finished shards were not decoded again
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    before = contents(tmp_path / "parts")
    again = pack(manifest, tmp_path / "parts", shard_mb=0.4, advance=lambda *_: pytest.fail("decoded a finished pack"))
    assert (again["rows"], again["skipped"]) == (15, 1)
    assert contents(tmp_path / "parts") == before


KILLED = """
import sys, time
from fastclap.data import load_manifest
from fastclap.data.pack import pack
if __name__ == "__main__":
    def advance(done, total):
        print(done, flush=True)
        time.sleep(0.02)
    pack(load_manifest(sys.argv[1]), sys.argv[2], shard_mb=0.3, workers=1, advance=advance)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_it_goes_on_to_the_same_result(mixed: str, tmp_path: Path) -> None:
    pack(load_manifest(mixed), tmp_path / "whole", shard_mb=0.3)
    (tmp_path / "run.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "run.py"), mixed, str(tmp_path / "parts")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True) as run:
        assert run.stdout is not None
        while (line := run.stdout.readline()) and line != b"9\n":
            pass
        run.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while session_members(run.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not session_members(run.pid)
    with pytest.raises(DataError, match="an unfinished pack"):
        load_manifest(str(tmp_path / "parts"))
    shards_before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("shard-*")}
    assert len(shards_before) >= 3
    pack(load_manifest(mixed), tmp_path / "parts", shard_mb=0.3)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert shards_before.items() <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()}.items()


def session_members(session: int) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:  # the process ended meanwhile
            continue
        if int(of) == session and state != "Z":
            found.append(path.parent.name)
    return found


def test_a_decoding_process_that_dies_is_named(mixed: str, tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:
        if done == 2:
            for process in multiprocessing.active_children():
                os.kill(process.pid or 0, signal.SIGKILL)

    with pytest.raises(DataError, match=r"a decoding process died at .*\.(wav|flac).*; run the same command again"):
        pack(load_manifest(mixed), tmp_path / "pack", workers=1, advance=kill)
    assert not list((tmp_path / "pack").glob("shard*"))
    pack(load_manifest(mixed), tmp_path / "pack")
    assert len(load_manifest(str(tmp_path / "pack"))) == 16


FULL = """
import resource, sys
from fastclap.data import load_manifest
from fastclap.data.pack import pack
resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, resource.RLIM_INFINITY))  # as on a full disk
try:
    pack(load_manifest(sys.argv[1]), sys.argv[2], shard_mb=0.2)
except ValueError as error:
    print(error)
"""


def test_no_room_is_a_clear_error_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = []
    for index, seconds in enumerate((2, 3, 4, 9, 2)):  # 288 kB is more than the limit
        soundfile.write(tmp_path / f"{index}.wav", random.normal(0, 0.1, seconds * RATE), RATE)
        rows.append({"audio": f"{index}.wav", "text_description": "noise"})
    source = tmp_path / "m.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", FULL, str(source), str(tmp_path / "pack")]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert (
        "pack/shard-00002.pcm: cannot be written: File too large; make room or choose another folder; the same"
        in output
    )
    assert sorted(path.name for path in (tmp_path / "pack").glob("*shard*")) == [
        ".shard-00000.json",
        ".shard-00001.json",
        "shard-00000.pcm",
        "shard-00001.pcm",
    ]
    assert not (tmp_path / "pack" / "index.parquet").exists()
    assert len(packed(str(source), tmp_path / "pack", shard_mb=0.2)) == 5


# What is left out, and what is refused


def test_unusable_clips_are_listed_and_left_out(make_set: MakeSet, tmp_path: Path) -> None:
    manifest = load_manifest(make_set(8))
    paths = [Path(row.audio) for row in manifest]
    wave = np.random.default_rng(0).normal(0, 0.1, RATE)
    paths[0].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:2000])
    soundfile.write(paths[3], np.where(np.arange(RATE) == 5000, np.nan, wave), RATE, subtype="FLOAT")
    soundfile.write(paths[5], wave * 0, RATE)
    soundfile.write(paths[7], wave[:500], RATE)
    summary = pack(manifest, tmp_path / "pack", workers=1)
    assert (summary["rows"], summary["clips"], summary["skipped"]) == (3, 3, 5)
    lines = [json.loads(line) for line in (tmp_path / "pack" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["row"], line["path"], line["origin"]) for line in lines] == [
        (row, manifest[row].audio, manifest[row].origin) for row in (0, 2, 3, 5, 7)
    ]
    for line, reason in zip(lines, ("no such file", "truncated", "is NaN", "silent", "too short"), strict=True):
        assert reason in line["reason"]
    assert [row.audio for row in load_manifest(str(tmp_path / "pack"))] == [manifest[row].audio for row in (1, 4, 6)]


def test_nothing_usable_is_an_error(make_set: MakeSet, tmp_path: Path) -> None:
    manifest = load_manifest(make_set(3))
    for row in manifest:
        Path(row.audio).write_bytes(b"none")
    with pytest.raises(
        DataError, match=r"none of the 3 clips can be used; the first: .*000\.wav: not readable as audio"
    ):
        pack(manifest, tmp_path / "pack")
    assert not list((tmp_path / "pack").glob("*shard*"))


def test_a_folder_of_something_else_is_refused(make_set: MakeSet, tmp_path: Path) -> None:
    manifest, other = load_manifest(make_set(4)), load_manifest(make_set(5, name="other"))
    pack(manifest, tmp_path / "pack")
    before = contents(tmp_path / "pack")
    with pytest.raises(DataError, match=r"pack: holds the pack of another input \(other rows\); name another folder"):
        pack(other, tmp_path / "pack")
    with pytest.raises(
        DataError, match=r"another input \(sampling_rate was 16000, now 8000; shard_mb was 512.0, now 1.0\)"
    ):
        pack(manifest, tmp_path / "pack", sampling_rate=8000, shard_mb=1)
    assert contents(tmp_path / "pack") == before
    with pytest.raises(DataError, match="is not empty and holds no pack; name a new folder"):
        pack(manifest, tmp_path / "set")
    with pytest.raises(DataError, match=r"set\.jsonl: cannot be written: File exists"):
        pack(manifest, tmp_path / "set.jsonl")
    with pytest.raises(ConfigError, match="shard_mb=0, workers=0: the first is 1000 to 1000000, the second positive"):
        pack(manifest, tmp_path / "none", shard_mb=0)


def test_two_packs_into_one_folder_do_not_meet(make_set: MakeSet, tmp_path: Path) -> None:
    manifest = load_manifest(make_set(3))

    def another(done: int, total: int) -> None:
        with pytest.raises(DataError, match="pack: another process is packing into it"):
            pack(manifest, tmp_path / "pack")

    assert pack(manifest, tmp_path / "pack", advance=another)["rows"] == 3


def test_text_that_is_none_is_refused_at_once(make_set: MakeSet, tmp_path: Path) -> None:
    rows = [row._replace(captions=("half \ud83d",)) for row in load_manifest(make_set(1))]
    with pytest.raises(
        DataError, match=r"set\.jsonl:1: half of a character \('\\ud83d', a lone surrogate\) in the caption"
    ):
        pack(Manifest(rows), tmp_path / "pack")


# Damage


@pytest.fixture
def long_clips(tmp_path: Path) -> Manifest:
    """Eight packed clips of ten seconds, in shards of four."""
    random = np.random.default_rng(1)
    for index in range(8):
        soundfile.write(tmp_path / f"{index}.wav", random.normal(0, 0.1, 10 * RATE), RATE, subtype="PCM_16")
    lines = (json.dumps({"audio": f"{index}.wav", "text_description": f"clip {index}"}) + "\n" for index in range(8))
    (tmp_path / "m.jsonl").write_text("".join(lines))
    return packed(str(tmp_path / "m.jsonl"), tmp_path / "pack", shard_mb=4 * 0.32)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def test_a_crop_reads_and_checks_only_its_blocks(long_clips: Manifest, tmp_path: Path) -> None:
    row = long_clips[2]
    assert row.packed is not None
    expected, _ = soundfile.read(tmp_path / "2.wav", dtype="int16")
    flip(tmp_path / "pack" / "shard-00000.pcm", row.packed.offset + 2 * (4 * BLOCK + 17))
    with PackedFile(row.packed, RATE) as clip:
        for start, size in ((0, 4 * BLOCK), (5 * BLOCK, 3 * BLOCK), (BLOCK - 1, 2), (9 * BLOCK + 5, None)):
            stop = None if size is None else start + size
            np.testing.assert_array_equal(clip.read(start, size), expected[start:stop])
        for start, size in ((0, None), (4 * BLOCK, 1), (5 * BLOCK - 1, 10), (3 * BLOCK, BLOCK + 1)):
            with pytest.raises(AudioError, match="damaged: the block at byte"):
                clip.read(start, size)
        for start in (-1, 10 * RATE):
            with pytest.raises(AudioError, match=f"start={start} lies outside the clip, which has 160000 samples"):
                clip.read(start, 5)


def test_a_damaged_clip_is_replaced_and_reported(long_clips: Manifest, tmp_path: Path) -> None:
    row = long_clips[5]
    assert row.packed is not None
    flip(tmp_path / "pack" / "shard-00001.pcm", row.packed.offset + 100_000)
    batch = ClipDataset(long_clips, RATE, seed=0, file_statistics=True)[0, 0, [4, 5, 6]]
    assert (batch.rows[0], batch.rows[2], batch.rows[1] not in (4, 5, 6)) == (4, 6, True)
    (bad,) = batch.bad
    block = row.packed.offset + 100_000 // (2 * BLOCK) * 2 * BLOCK
    assert (bad.row, bad.path, bad.origin) == (5, str(tmp_path / "pack" / "shard-00001.pcm"), f"{tmp_path / 'pack'}:6")
    assert f"damaged: the block at byte {block} does not have its checksum" in bad.reason
    assert f"packed from {tmp_path / 'm.jsonl'}:6; copy the folder again from where it came from" in bad.reason
    with pytest.raises(DataError, match=r"1 of 8 clips are unusable, more than the tolerated share 0"):
        Quarantine(tmp_path / "quarantine.jsonl", 8, 0).add(batch.bad)
    unusable: list[Any] = []
    rows = [row for rows, *_ in eval_batches(long_clips, RATE, 3, bad=unusable) for row in rows]
    assert sorted(rows) == [0, 1, 2, 3, 4, 6, 7]
    assert unusable == [bad]


def test_a_shard_that_shrinks_or_goes_while_it_is_used(long_clips: Manifest, tmp_path: Path) -> None:
    shard = tmp_path / "pack" / "shard-00001.pcm"
    dataset = ClipDataset(long_clips, RATE, seed=0)
    assert not dataset[0, 0, [4, 5, 6]].bad
    os.truncate(shard, shard.stat().st_size // 2 + 10)
    bad = {clip.row: clip.reason for clip in dataset[0, 0, [4, 5, 6, 7]].bad}
    assert set(bad) == {6, 7}
    assert all(reason.startswith("truncated: the shard ends within this clip; ") for reason in bad.values())
    shard.rename(tmp_path / "elsewhere.pcm")
    moved = long_clips[5]
    assert moved.packed is not None
    gone = moved.packed._replace(shard=str(tmp_path / "pack" / "none.pcm"))
    with (
        PackedFile(gone) as clip,
        pytest.raises(AudioError, match=r"none\.pcm: cannot be read: No such file.*packed from"),
    ):
        clip.read()


def test_damage_that_is_seen_on_loading(long_clips: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    whole = contents(folder)

    def error_after(change: Callable[[], object]) -> str:
        change()
        with pytest.raises(DataError) as caught:
            load_manifest(str(folder))
        for name, data in whole.items():
            (folder / name).write_bytes(data)
        return str(caught.value)

    shard, index, header = folder / "shard-00001.pcm", folder / "index.parquet", folder / "pack.json"
    assert error_after(lambda: os.truncate(shard, 1000)).startswith(
        f"{shard}: truncated: 1000 bytes instead of 1280000"
    )
    assert error_after(lambda: os.truncate(shard, 1280002)).startswith(f"{shard}: too long: 1280002 bytes")
    assert error_after(shard.unlink).startswith(
        f"{shard}: cannot be read (No such file or directory), but the folder lists"
    )
    assert error_after(index.unlink).startswith(f"{index}: cannot be read (No such file or directory); copy the folder")
    for change in (lambda: os.truncate(index, 500), lambda: flip(index, 300)):
        assert error_after(change).startswith(f"{index}: damaged, or of another pack than {header}: its sum is another")
    assert error_after(lambda: header.write_text("{")).startswith(f"{header}: not valid JSON (")
    newer = json.dumps({**json.loads(whole["pack.json"]), "version": 7})
    assert "was packed in version 7 of the format, this fastclap reads version 1" in error_after(
        lambda: header.write_text(newer)
    )
    assert len(load_manifest(str(folder))) == 8


# The command


def test_the_command_packs_and_sums_up(make_set: MakeSet, tmp_path: Path, capfd: Any) -> None:
    source = make_set(6)
    Path(load_manifest(source)[4].audio).unlink()
    out = str(tmp_path / "pack")
    assert main(["pack", source, "--out", out, "--workers", "0", "--json"]) == 0
    text, notes = capfd.readouterr()
    summary = json.loads(text)
    assert (summary["folder"], summary["rows"], summary["shards"], summary["skipped"]) == (out, 5, 1, 1)
    assert "packed 6 of 6 clips" in notes
    assert f"fastclap: 1 rows left out, see {out}/skipped.jsonl" in notes
    assert main(["pack", source, "--out", out, "--workers", "0"]) == 0
    assert capfd.readouterr().out == f"5 rows, 5 clips, 0.00 h, {summary['bytes'] / 1e6:.1f} MB in 1 shards: {out}\n"
    assert main(["pack", source, "--out", out, "--shard-mb", "1"]) == 2
    assert "holds the pack of another input (shard_mb was 512.0, now 1.0)" in capfd.readouterr().err


# Malice and accidents


@pytest.fixture
def small_pack(make_set: MakeSet, tmp_path: Path) -> Path:
    pack(load_manifest(make_set(4)), tmp_path / "pack", shard_mb=0.02)
    return tmp_path / "pack"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling_rate": -16000}, "sampling_rate is -16000"),
        ({"sampling_rate": 10**9}, "sampling_rate is 1000000000"),
        ({"sampling_rate": 16000.0}, "sampling_rate is 16000.0"),
        ({"sampling_rate": True}, "sampling_rate is True"),
        ({"shards": 3}, "shards is 3"),
        ({"shards": [-1]}, "shards is [-1]"),
        ({"shards": [1 << 70]}, "shards is [1180591620717411303424]"),
        ({"shards": ["64000"]}, "shards is ['64000']"),
        ({"shards": None}, "shards is None"),
        ({"shard_mb": "1"}, "shard_mb is 1"),
        ({"shard_mb": float("nan")}, "shard_mb is nan"),
        ({"shard_mb": 0}, "shard_mb is 0"),
        ({"input": 7}, "input is 7"),
        ({"index": 7}, "index is 7"),
        ({"version": None}, "version is None"),
    ],
)
def test_headers_with_impossible_numbers(small_pack: Path, changes: dict[str, Any], message: str) -> None:
    path = small_pack / "pack.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(DataError) as caught:
        load_manifest(str(small_pack))
    assert str(caught.value).startswith(f"{path}: not the header of a packed folder ({message}); copy the folder again")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"version": 1}', "[" * 10_000, '{"version": ' + "1" * 5000 + "}"]
)
def test_headers_that_are_none(small_pack: Path, text: str) -> None:
    (small_pack / "pack.json").write_text(text)
    with pytest.raises(DataError, match=r"^\S*pack\.json: (not|JSON)"):
        load_manifest(str(small_pack))


def test_pipes_in_a_pack_are_not_waited_for(small_pack: Path) -> None:
    for name, message in (
        ("index.parquet", "is a pipe, not a file"),
        ("shard-00000.pcm", "truncated: 0 bytes instead"),
    ):
        whole = (small_pack / name).read_bytes()
        (small_pack / name).unlink()
        os.mkfifo(small_pack / name)
        with pytest.raises(DataError, match=rf"{name}: {message}"):
            load_manifest(str(small_pack))
        (small_pack / name).unlink()
        (small_pack / name).write_bytes(whole)
    assert len(load_manifest(str(small_pack))) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"shard": 99},
        {"shard": -1},
        {"shard": None},
        {"offset": -2},
        {"offset": 1 << 40},
        {"samples": 0},
        {"samples": -5},
        {"samples": 1 << 60},
        {"mean": float("nan")},
        {"variance": -1.0},
        {"variance": float("inf")},
        {"crc32": b""},
        {"crc32": None},
        {"origin": None},
        None,
    ],
)
def test_an_index_that_lies_is_an_error_that_names_the_row(small_pack: Path, changes: dict[str, Any] | None) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(small_pack / "index.parquet")
    rows = table.to_pylist()
    rows[1]["fastclap_clip"] = changes if changes is None else {**rows[1]["fastclap_clip"], **changes}
    write_index(small_pack, pyarrow.Table.from_pylist(rows, table.schema))
    with pytest.raises(
        DataError, match=r"index\.parquet:2: no place in a shard \(fastclap_clip is .*; copy the folder"
    ):
        load_manifest(str(small_pack))


def write_index(folder: Path, table: Any) -> None:
    """Write another index, and its sum into the header."""
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, folder / "index.parquet")
    header = json.loads((folder / "pack.json").read_text())
    header["index"] = index_checksum((folder / "index.parquet").read_bytes())
    (folder / "pack.json").write_text(json.dumps(header))


def test_an_index_of_another_table(small_pack: Path) -> None:
    import pyarrow

    write_index(small_pack, pyarrow.table({"audio": ["a.wav"], "text_description": ["x"]}))
    with pytest.raises(DataError, match=r"index\.parquet:1: no place in a shard \(fastclap_clip is None\)"):
        load_manifest(str(small_pack))
    (small_pack / "index.parquet").write_bytes(b"PAR1")
    header = json.loads((small_pack / "pack.json").read_text())
    (small_pack / "pack.json").write_text(json.dumps({**header, "index": index_checksum(b"PAR1")}))
    with pytest.raises(DataError, match=r"index\.parquet: not a readable Parquet file"):
        load_manifest(str(small_pack))


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["pack.json", "index.parquet"]), at=st.floats(0, 1), bytes_=st.binary(min_size=1, max_size=6)
)
def test_a_changed_pack_is_an_error_or_the_same(small_pack: Path, name: str, at: float, bytes_: bytes) -> None:
    whole = (small_pack / name).read_bytes()
    expected = list(load_manifest(str(small_pack)))
    begin = int(at * len(whole))
    (small_pack / name).write_bytes(whole[:begin] + bytes_ + whole[begin + len(bytes_) :])
    try:
        found = list(load_manifest(str(small_pack)))
    except DataError as error:
        assert str(small_pack) in str(error)
    else:
        assert [row[:6] for row in found] == [row[:6] for row in expected]
    finally:
        (small_pack / name).write_bytes(whole)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[" * 9000, '{"size": -1, "next_clip": 1, "clips": [], "skipped": []}']
)
def test_a_damaged_record_of_an_unfinished_pack_is_written_again(make_set: MakeSet, tmp_path: Path, text: str) -> None:
    manifest = load_manifest(make_set(9))
    interrupt_at(manifest, tmp_path / "pack", 8)
    records = sorted((tmp_path / "pack").glob(".shard-*.json"))
    assert len(records) >= 2
    records[1].write_text(text)
    pack(manifest, tmp_path / "pack", shard_mb=0.02)
    pack(manifest, tmp_path / "whole", shard_mb=0.02)
    assert contents(tmp_path / "pack") == contents(tmp_path / "whole")


def interrupt_at(manifest: Manifest, folder: Path, clip: int) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == clip:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(manifest, folder, shard_mb=0.02, advance=interrupt)


def test_a_record_whose_clips_are_others_is_not_believed(make_set: MakeSet, tmp_path: Path) -> None:
    manifest = load_manifest(make_set(9))
    interrupt_at(manifest, tmp_path / "pack", 8)
    path = tmp_path / "pack" / ".shard-00001.json"
    record = json.loads(path.read_text())
    record["clips"][0][0] += 1
    path.write_text(json.dumps(record))
    pack(manifest, tmp_path / "pack", shard_mb=0.02)
    pack(manifest, tmp_path / "whole", shard_mb=0.02)
    assert contents(tmp_path / "pack") == contents(tmp_path / "whole")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_is_named(
    make_set: MakeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    manifest = load_manifest(make_set(4))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as full:
        full.setattr("os.fsync", fail)
        with pytest.raises(DataError, match=rf"pack: cannot be written: {os.strerror(code)}; make room or choose"):
            pack(manifest, tmp_path / "pack")
    with monkeypatch.context() as full:
        full.setattr("fastclap.data.pack._ShardWriter.add", fail)
        with pytest.raises(DataError, match=rf"pack/shard-00000\.pcm: cannot be written: {os.strerror(code)}; make"):
            pack(manifest, tmp_path / "pack")
    assert pack(manifest, tmp_path / "pack")["clips"] == 4


def test_names_and_captions_with_separators_are_packed(tmp_path: Path) -> None:
    name = "a\u2028b\u0085c.wav"
    soundfile.write(tmp_path / name, np.random.default_rng(0).normal(0, 0.1, RATE), RATE)
    rows = [{"audio": wave, "text_description": "x\u2028y\u0085z"} for wave in (name, "gone\u2028.wav")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    summary = pack(load_manifest(str(tmp_path / "m.jsonl")), tmp_path / "pack\u2028")
    assert (summary["rows"], summary["skipped"]) == (1, 1)
    (row,) = load_manifest(str(tmp_path / "pack\u2028"))
    assert (Path(row.audio).name, row.captions) == (name, ("x\u2028y\u0085z",))


@pytest.mark.parametrize(
    "options", [{"sampling_rate": 0}, {"sampling_rate": 10**9}, {"shard_mb": float("inf")}, {"workers": -1}]
)
def test_options_that_cannot_be(make_set: MakeSet, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="the first is 1000 to 1000000, the second positive, the third at least 0"):
        pack(load_manifest(make_set(1)), tmp_path / "pack", **options)
    assert not (tmp_path / "pack").exists()
