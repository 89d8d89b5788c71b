"""The file of summaries: killed writers, two at once, damage, and what makes a clip, a caption or a tower another."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastclap.config import AudioTowerConfig
from fastclap.data import load_manifest
from fastclap.data.hashing import draw, draws
from fastclap.data.pack import pack
from fastclap.data.summaries import (
    SummaryStore,
    cache_folder,
    caption_key,
    clip_identities,
    clip_key,
    crop_start,
    fingerprint,
)
from fastclap.errors import DataError

FORK = multiprocessing.get_context("fork")
TOWER = "0123456789abcdef0123456789abcdef"
RECORD = 16 + 8 + 4 * 6 + 16  # bytes of one with a summary of six float32 numbers


def key_of(number: int) -> bytes:
    return blake2b(str(number).encode(), digest_size=16).digest()


def summary_of(number: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(number).normal(size=(2, 3))).float()


def append(store: SummaryStore, *numbers: int) -> None:
    store.append([key_of(n) for n in numbers], [10 * n for n in numbers], torch.stack([summary_of(n) for n in numbers]))


def held(folder: Path, among: int) -> set[int]:
    """Which of the first numbers are in the file, after every one of them was compared with what it has to be."""
    store = SummaryStore(folder, TOWER)
    found = {number for number in range(among) if key_of(number) in store}
    assert len(store) == len(found)
    for number in found:
        assert store.gather(torch.tensor([store.place(key_of(number))]))[0].equal(summary_of(number))
        assert store.extent(key_of(number)) == 10 * number
    return found


@pytest.fixture
def five(tmp_path: Path) -> Path:
    """The file of five summaries, in two goes."""
    store = SummaryStore(tmp_path / "kept", TOWER)
    append(store, 0, 1)
    append(store, 2, 3, 4)
    assert store.path is not None
    return store.path


# ---------------------------------------------------------------------------------------------------------------------
# the file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5)])
def test_summaries_come_back_as_they_were(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randn(9, *shape).to(dtype)
    values[3] = torch.nan
    writer, reader = SummaryStore(tmp_path / "a" / "b", TOWER), SummaryStore(tmp_path / "a" / "b", TOWER)
    for part in (slice(0, 4), slice(4, 9)):
        writer.append([key_of(n) for n in range(9)[part]], range(9)[part], values[part])
    assert len(writer) == 9 and len(reader) == 0 and key_of(0) not in reader
    reader.refresh()
    places = torch.tensor([reader.place(key_of(n)) for n in (8, 3, 3, 0)])
    found = reader.gather(places)
    assert found.dtype == dtype and torch.equal(found.nan_to_num(9), values[[8, 3, 3, 0]].nan_to_num(9))
    found.zero_()  # a copy
    assert reader.gather(places[:1]).equal(values[8:9]) and reader.extent(key_of(7)) == 7
    with pytest.raises(KeyError):
        reader.place(key_of(9))


def test_of_two_records_with_one_key_the_first_counts_for_everybody(tmp_path: Path) -> None:
    first, second = (SummaryStore(tmp_path, TOWER) for _ in range(2))
    append(first, 0)
    second.append([key_of(0), key_of(1)], [5, 6], torch.ones(2, 2, 3))
    first.refresh()
    for store in (first, second, SummaryStore(tmp_path, TOWER)):
        assert store.gather(torch.tensor([store.place(key_of(0))]))[0].equal(summary_of(0))
        assert len(store) == 2


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_whole_records_only(tmp_path: Path, kills: int) -> None:
    """SIGKILL at a random moment, of every second one in the middle of a record: nothing wrong, nothing before lost."""
    moments, torn, before = random.Random(0), 0, set[int]()
    for kill in range(kills):
        writer = FORK.Process(target=_write_for_ever, args=(tmp_path, kill % 2 == 1))
        writer.start()
        path = tmp_path / f"{TOWER}.float32.2x3"
        size = path.stat().st_size if path.exists() else 0
        while not path.exists() or path.stat().st_size <= size:
            assert writer.is_alive()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        torn += path.stat().st_size % RECORD != 0
        found = held(tmp_path, 100_000)
        assert found >= before
        before = found
    assert torn, "no kill fell into a record"
    store = SummaryStore(tmp_path, TOWER)
    assert store.damaged == 0
    append(store, 100_000)
    assert held(tmp_path, 100_001) == before | {100_000}
    assert (tmp_path / f"{TOWER}.float32.2x3").stat().st_size % RECORD == 0


def _write_for_ever(folder: Path, in_pieces: bool) -> None:
    if in_pieces:
        write = os.write

        def piece(descriptor: int, data: Any) -> int:
            time.sleep(0.0005)
            return write(descriptor, bytes(data[:11]))

        os.write = piece  # type: ignore[assignment]
    store = SummaryStore(folder, TOWER)
    while True:
        append(store, *range(len(store), len(store) + 3))


def test_two_writers_at_once(tmp_path: Path) -> None:
    """Both have much the same to write, in pieces: every record is whole, and none is there more than twice."""
    writers = [FORK.Process(target=_write_half, args=(tmp_path, part)) for part in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert held(tmp_path, 300) == set(range(300))
    size = (tmp_path / f"{TOWER}.float32.2x3").stat().st_size
    assert size % RECORD == 0 and 300 <= size // RECORD <= 600
    assert SummaryStore(tmp_path, TOWER).damaged == 0


def _write_half(folder: Path, part: int) -> None:
    write = os.write
    os.write = lambda descriptor, data: write(descriptor, bytes(data[:37]))  # type: ignore[assignment]
    store = SummaryStore(folder, TOWER)
    numbers = list(range(200)) if part == 0 else list(range(299, 99, -1))
    for first in range(0, 200, 2):
        store.refresh()
        missing = [number for number in numbers[first : first + 2] if key_of(number) not in store]
        if missing:
            append(store, *missing)


def test_any_flipped_bit_costs_its_record_alone(five: Path) -> None:
    whole = five.read_bytes()
    assert len(whole) == 5 * RECORD
    for place in range(2 * RECORD, 3 * RECORD):  # of the record of number 2
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        five.write_bytes(damaged)
        assert held(five.parent, 5) == {0, 1, 3, 4}
        assert SummaryStore(five.parent, TOWER).damaged == 1
    append(SummaryStore(five.parent, TOWER), 2)
    assert held(five.parent, 5) == {0, 1, 2, 3, 4}


def test_cut_at_any_length_the_rest_is_right_and_can_be_added_to(five: Path) -> None:
    whole = five.read_bytes()
    for size in range(len(whole)):
        five.write_bytes(whole[:size])
        assert held(five.parent, 5) == set(range(size // RECORD))
        if size % 17 == 0:
            append(SummaryStore(five.parent, TOWER), 4)
            assert held(five.parent, 5) == set(range(size // RECORD)) | {4}


def test_a_block_of_zeros_as_after_a_power_cut_holds_nothing(five: Path) -> None:
    five.write_bytes(five.read_bytes()[: 2 * RECORD] + bytes(3 * RECORD))
    assert held(five.parent, 5) == {0, 1}
    assert SummaryStore(five.parent, TOWER).damaged == 3


def test_the_file_of_another_tower_under_this_name_holds_nothing(five: Path) -> None:
    other = TOWER[::-1]
    five.rename(five.with_name(five.name.replace(TOWER, other)))
    assert len(SummaryStore(five.parent, other)) == 0 and len(SummaryStore(five.parent, TOWER)) == 0


def test_what_is_read_does_not_change_with_the_file_growing_or_deleted(five: Path) -> None:
    store = SummaryStore(five.parent, TOWER)
    append(SummaryStore(five.parent, TOWER), 5)
    five.unlink()
    assert store.gather(torch.tensor([store.place(key_of(4))]))[0].equal(summary_of(4))
    assert len(SummaryStore(five.parent, TOWER)) == 0


def test_a_file_that_shrinks_while_in_use_is_named(five: Path) -> None:
    store = SummaryStore(five.parent, TOWER)
    os.truncate(five, RECORD)
    with pytest.raises(DataError, match=rf"{five.name}: was cut short while in use"):
        store.refresh()


def test_a_full_disk_is_named_and_leaves_what_was_there(five: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, write, written = SummaryStore(five.parent, TOWER), os.write, [0]

    def full(descriptor: int, data: Any) -> int:
        if written[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written[0] = write(descriptor, bytes(data[:20]))
        return written[0]

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(
            DataError, match=rf"{five.name}: cannot be written \(No space left.*--data.frozen-cache off"
        ):
            append(store, 5)
    assert written == [20] and held(five.parent, 6) == {0, 1, 2, 3, 4}
    append(store, 5)
    assert held(five.parent, 6) == {0, 1, 2, 3, 4, 5}


def test_summaries_of_another_shape_are_refused(five: Path) -> None:
    with pytest.raises(DataError, match=r"shape \(3, 3\) and torch.float32 does not fit"):
        SummaryStore(five.parent, TOWER).append([key_of(9)], [0], torch.zeros(1, 3, 3))


@pytest.mark.parametrize(
    "name", ["", ".float32", ".float32.", ".int8.2x3", ".float32.0x3", ".float32.-2x3", ".nn.2x3", ".float32.2x3.bak"]
)
@pytest.mark.parametrize("kind", ["file", "pipe", "folder"])
def test_what_others_put_into_the_folder_is_left_alone(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / f"{TOWER}{name}"
    if kind == "file":
        path.write_bytes(b"x" * 100)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    store = SummaryStore(tmp_path, TOWER)
    append(store, 1)
    assert held(tmp_path, 3) == {1}
    assert path.exists()


@pytest.mark.parametrize("shape", ["999999999x999999999x999999999x999999999", "1", "4294967296"])
def test_a_name_with_a_shape_that_is_none_of_its_own(tmp_path: Path, shape: str) -> None:
    (tmp_path / f"{TOWER}.float32.{shape[:39]}").write_bytes(b"x" * 1000)
    store = SummaryStore(tmp_path, TOWER)
    assert len(store) == 0
    if len(shape) < 10 or "x" in shape:
        with pytest.raises(DataError, match=r"does not fit; remove the file"):
            append(store, 1)


def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("FASTCLAP_CACHE", str(tmp_path / "cache"))
    assert cache_folder("auto") == tmp_path / "cache" / "summaries"
    monkeypatch.delenv("FASTCLAP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("auto") == tmp_path / ".cache" / "fastclap" / "summaries"


# ---------------------------------------------------------------------------------------------------------------------
# clips, captions and towers


def test_a_changed_clip_is_another_even_with_its_size_and_time_set_back(make_set: Callable[..., str]) -> None:
    manifest = load_manifest(make_set(3))
    before = clip_identities(manifest)
    assert clip_identities(manifest) == before and len(set(before)) == 3
    path = Path(manifest[1].audio)
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    time.sleep(0.02)  # a tick of the kernel's clock
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.stat().st_mtime_ns == status.st_mtime_ns
    after = clip_identities(manifest)
    assert after[1] != before[1] and after[::2] == before[::2]
    path.unlink()
    assert clip_identities(manifest)[1] not in (*before, *after)


def test_a_packed_clip_is_known_by_its_shard_place_and_checksums(make_set: Callable[..., str], tmp_path: Path) -> None:
    manifest = load_manifest(make_set(3))
    pack(manifest, tmp_path / "packed")
    packed = load_manifest(str(tmp_path / "packed"))
    before = clip_identities(packed)
    assert len({*before, *clip_identities(manifest)}) == 6
    clip = packed[1].packed
    assert clip is not None
    for change in ({"offset": clip.offset + 2}, {"checksums": clip.checksums[::-1]}, {"samples": clip.samples - 1}):
        row = packed[1]._replace(packed=clip._replace(**change))
        assert clip_identities([row])[0] not in before
    time.sleep(0.02)
    shard = Path(clip.shard)
    shard.write_bytes(shard.read_bytes())
    assert not set(clip_identities(packed)) & set(before)


def test_keys_tell_apart_rate_crop_number_padding_and_captions() -> None:
    identity = bytes(range(16))
    keys = {
        clip_key(identity, rate, crop, number, padded)
        for rate in (8000, 16000)
        for crop in (None, 8000, 16000)
        for number in (0, 1)
        for padded in (False, True)
    }
    captions = {caption_key(ids, most) for ids in ([1, 2, 3], [1, 2], [3, 2, 1], [12, 3]) for most in (64, 77)}
    assert len(keys) == 24 and len(captions) == 8 and not keys & captions
    assert clip_key(identity[::-1], 8000, None) not in keys


def test_crops_are_spread_and_stay_where_they_are_when_there_are_more() -> None:
    for clip in range(50):
        identity = blake2b(bytes([clip]), digest_size=16).digest()
        for count in (2, 4, 8):
            starts = sorted(crop_start(identity, number, 10_000) for number in range(count))
            assert starts == sorted(crop_start(identity, number, 10_000) for number in range(count))
            gaps = np.diff([*starts, starts[0] + 10_000])
            assert starts[0] >= 0 and starts[-1] < 10_000 and gaps.min() > 10_000 / (2.7 * count)
    assert crop_start(bytes(16), 3, 1) == 0


def test_many_draws_are_the_draws_one_by_one() -> None:
    rows = np.array([0, 1, 5, 2**31, 2**40])
    below = np.array([1, 2, 7, 2**31, 2**32 - 1])
    for values in ((3, 4, 5), (-1, 0), (2**63, 7, 1)):
        found = draws(below, *values, rows, 9)
        assert found.tolist() == [draw(int(b), *values, int(r), 9) for b, r in zip(below, rows, strict=True)]
    assert len(set(draws(np.full(1000, 10**9), 1, np.arange(1000)).tolist())) > 990


def test_the_fingerprint_changes_with_whatever_a_summary_depends_on() -> None:
    def tower() -> nn.Module:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        return module.requires_grad_(False)

    config = AudioTowerConfig(width=16)
    same = fingerprint(tower(), config, bf16=False)
    assert len(same) == 32 and fingerprint(tower(), config, bf16=False) == same
    unaffected = AudioTowerConfig(width=16, pretrained="elsewhere", freeze=True, freeze_layers=2)
    assert fingerprint(tower(), unaffected, bf16=False) == same

    weight, buffer, trained = tower(), tower(), tower()
    weight[0].weight[1, 1] += 1e-6
    buffer[1].running_mean[0] = 1.0
    trained.requires_grad_(True)
    others = [
        fingerprint(weight, config, bf16=False),
        fingerprint(buffer, config, bf16=False),
        fingerprint(tower().double(), config, bf16=False),
        fingerprint(tower(), AudioTowerConfig(width=17), bf16=False),
        fingerprint(tower(), config, bf16=True),
    ]
    assert len({same, *others}) == 6
    before = fingerprint(trained, config, bf16=False)
    with torch.no_grad():
        trained[0].weight += 1.0  # it trains, so it has no part in a summary
    assert fingerprint(trained, config, bf16=False) == before
