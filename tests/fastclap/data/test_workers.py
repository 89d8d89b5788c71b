"""Helpers that die, stop or hang: nobody waits for them for good, and what they owed comes from another one."""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastclap.audio import Clip
from fastclap.data import BatchSampler, ClipDataset, load_manifest, make_loader
from fastclap.data.dataset import eval_batches
from fastclap.data.rows import Row, clip_durations
from fastclap.data.workers import (
    WorkerGone,
    in_processes,
    map_rows,
    now_at,
    zeros,
)
from fastclap.errors import DataError
from fastclap.threads import ELSEWHERE, LoaderStopped, in_threads

RATE = 16000
MakeSet = Callable[..., str]


def square(number: int) -> int:
    return number * number


def tensors(most: int) -> list[Tensor]:
    """Small ones of several dtypes, and one of `most` numbers."""
    return [torch.arange(most), torch.zeros(0, 3), torch.tensor(True), torch.ones(2, 3, dtype=torch.bfloat16)]


def zeros_with_one(number: int) -> tuple[bool, Tensor]:
    """A tensor of `zeros`, and whether it lies where it is sent from."""
    made = zeros((2, 50_000), torch.int16)
    made[1, number] = 1
    return made.is_shared(), made


def at_a_clip(number: int) -> str | int:
    """Hangs at every third clip."""
    reason = now_at(number)
    if number % 3 == 2 and reason is None:
        time.sleep(600)
    now_at(ELSEWHERE)
    return reason or number


def hang(item: Any) -> None:
    time.sleep(600)


def fail(number: int) -> int:
    raise DataError("a known one") if number else ValueError("an unknown one")


def die_while_sending(item: Any) -> None:
    """Send a length and the first of so many bytes as the result, and be killed."""

    def send(connection: Any, message: Any) -> None:
        os.write(connection.fileno(), struct.pack("!i", 100) + b"x")
        os.kill(os.getpid(), signal.SIGKILL)

    multiprocessing.connection.Connection._send_bytes = send  # type: ignore[attr-defined]


def report(kind: type[BaseException]) -> str:
    """What multiprocessing's own thread prints of what it raises, such as when a tensor's receiver has died."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        sys.excepthook(kind, kind("in a thread"), None)
    return printed.getvalue()


class Hanging(ClipDataset):
    """Hangs at row 3."""

    def load(self, row: int, crop_start: Callable[[int], int]) -> Clip:
        if row == 3:
            time.sleep(600)
        return super().load(row, crop_start)


@pytest.fixture
def children() -> Iterator[Callable[[], list[Any]]]:
    """The processes that a test has started; none of them may be left."""
    before = set(multiprocessing.active_children())
    yield lambda: [process for process in multiprocessing.active_children() if process not in before]
    assert set(multiprocessing.active_children()) <= before


Children = Callable[[], list[Any]]


def test_tensors_arrive_as_they_are_and_small_ones_without_a_file() -> None:
    small, large = in_processes(tensors, [10, 100_000], 1, ahead=2)
    for found, most in ((small, 10), (large, 100_000)):
        for tensor, expected in zip(found, tensors(most), strict=True):
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
            tensor.zero_()
    assert [tensor.is_shared() for tensor in large] == [True, False, False, True]  # NumPy knows no bfloat16
    assert not small[0].is_shared()


def test_zeros_are_made_where_they_are_sent_from_by_helpers_alone() -> None:
    for number, (shared, found) in enumerate(in_processes(zeros_with_one, range(3), 1, ahead=1)):
        assert shared and torch.equal(found, zeros_with_one(number)[1])
    assert not zeros_with_one(0)[0]


@pytest.mark.parametrize(("workers", "ahead", "count"), [(1, 1, 0), (2, 1, 5), (2, 3, 3), (1, 4, 9)])
def test_results_come_in_order(children: Children, workers: int, ahead: int, count: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(count):
            taken.append(number)
            yield number

    found = []
    for result in in_processes(square, items(), workers, ahead=ahead):
        found.append(result)
        assert len(taken) == min(count, len(found) - 1 + ahead * workers)  # no more than are wanted
    assert found == [number * number for number in range(count)]


def test_large_items_and_results_do_not_block_each_other(children: Children) -> None:
    items = [bytes([index]) * size for index, size in enumerate((10, 1 << 20, 10, 1 << 20, 1 << 20))]
    assert list(in_processes(bytes, items, 1, ahead=3)) == items


def test_a_stopped_process_is_replaced_and_changes_nothing(
    children: Children, capsys: pytest.CaptureFixture[str]
) -> None:
    results = in_processes(square, itertools.count(), 1, ahead=1, timeout=0.3)
    assert next(results) == 0
    (process,) = children()
    os.kill(process.pid, signal.SIGSTOP)
    assert [next(results), next(results)] == [1, 4]
    assert not process.is_alive()
    assert f"process {process.pid} made no progress for 0.3 s; another one takes over" in capsys.readouterr().err
    results.close()


def test_a_clip_at_which_two_processes_hang_is_left_out(children: Children) -> None:
    found = list(in_processes(at_a_clip, range(5), 2, ahead=1, timeout=0.3))
    assert found[:2] + found[3:] == [0, 1, 3, 4]
    assert found[2] == "could not be read within 0.3 s, twice; see to its drive, or remove its row"


def test_the_wish_to_stop_is_heeded_while_waiting(children: Children) -> None:
    asked = itertools.count()
    with pytest.raises(LoaderStopped):
        next(in_processes(hang, [1, 2], 2, ahead=1, timeout=9e9, stopping=lambda: next(asked) > 1))


def test_a_forked_process_has_processes_of_its_own(children: Children) -> None:
    assert list(in_processes(square, range(2), 1, ahead=1)) == [0, 1]  # whose server the child cannot use

    def work() -> None:
        os._exit(list(in_processes(square, range(5), 1, ahead=1)) != [0, 1, 4, 9, 16])

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(100)
    assert child.exitcode == 0


def test_helpers_do_not_report_that_their_parent_died(children: Children) -> None:
    printed = in_processes(report, [ConnectionResetError, EOFError, ZeroDivisionError], 1, ahead=1)
    assert list(printed) == ["", "", "ZeroDivisionError: in a thread\n"]


@pytest.mark.parametrize("number", [0, 1])
def test_errors_arrive(children: Children, number: int) -> None:
    error, message = (
        (DataError, "^a known one$") if number else (RuntimeError, "(?s)in process .*Traceback.*ValueError")
    )
    with pytest.raises(error, match=message):
        list(in_processes(fail, [number], 1, ahead=1))


def test_a_process_that_dies_while_it_sends_is_noticed(children: Children) -> None:
    with pytest.raises(WorkerGone, match="was ended by SIGKILL, which is how") as caught:
        list(in_processes(die_while_sending, ["item"], 1, ahead=1))
    assert caught.value.item == "item"


def row(path: str) -> Row:
    return Row(path, ("x",), (), {}, None, None, None, "m.jsonl:7", 0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            hang,
            r"m.jsonl:7: a.wav: measuring it took more than 0.3 s, twice \(process \d+\): .* which goes on from there",
        ),
        (die_while_sending, "a measuring process died at a.wav .*SIGKILL.* which goes on from there"),
    ],
)
def test_a_command_names_the_clip(children: Children, function: Callable[[Any], Any], message: str) -> None:
    options: Any = {"ahead": 2, "doing": "measuring", "goes_on": "from there", "timeout": 0.3}
    with pytest.raises(DataError, match=message):
        list(map_rows(function, [row("a.wav")], 1, **options))


# The batches of training


def test_a_loader_process_that_stops_changes_no_batch(make_set: MakeSet, children: Children) -> None:
    manifest = load_manifest(make_set(9))
    dataset, sampler = ClipDataset(manifest, RATE, seed=0), BatchSampler(manifest, 4, seed=0, stop_step=8)
    found = []
    for batch in make_loader(dataset, sampler, num_workers=2, prefetch=1, timeout=0.3):
        if batch.step == 2:
            os.kill(children()[0].pid, signal.SIGSTOP)
        found.append(batch)
    expected = list(make_loader(dataset, sampler))
    assert [batch.step for batch in found] == list(range(8))
    for one, other in zip(found, expected, strict=True):
        assert one.rows == other.rows and one.audio is not None and other.audio is not None
        assert torch.equal(one.audio, other.audio)


def test_a_clip_whose_read_hangs_is_replaced_and_reported(make_set: MakeSet, children: Children) -> None:
    manifest = load_manifest(make_set(8))
    sampler = BatchSampler(manifest, 8, seed=0, stop_step=2)
    batches = list(make_loader(Hanging(manifest, RATE, seed=0), sampler, num_workers=1, timeout=0.3))
    for batch in batches:
        assert len(batch.rows) == 8 and 3 not in batch.rows
        (bad,) = batch.bad
        assert (bad.row, bad.path, bad.origin) == (3, manifest[3].audio, manifest[3].origin)
        assert bad.reason.startswith("could not be read within 0.3 s, twice")


def test_a_drive_that_does_not_answer_ends_the_run(make_set: MakeSet, children: Children) -> None:
    manifest = load_manifest(make_set(8))
    sampler = BatchSampler(manifest, 4, seed=0)
    loader = make_loader(Everywhere(manifest, RATE, seed=0), sampler, num_workers=1, timeout=0.3)
    with pytest.raises(
        DataError, match=r"set\.jsonl:\d: .*\.wav: data loading process \d+ made no progress for 0\.3 s"
    ):
        next(iter(loader))


class Everywhere(ClipDataset):
    """Hangs at every clip, at another one each time."""

    def load(self, row: int, crop_start: Callable[[int], int]) -> Clip:
        now_at(os.getpid() % 8)
        time.sleep(600)
        raise AssertionError


# Threads


def test_threads_give_results_in_order_and_pass_errors_on() -> None:
    assert list(in_threads(square, range(50), 4, ahead=8)) == [number * number for number in range(50)]
    with pytest.raises(ValueError, match="an unknown one"):
        list(in_threads(fail, [0], 2, ahead=8))


def test_a_thread_that_hangs_is_left_behind() -> None:
    released = threading.Event()

    def wait(number: int) -> int:
        return number if number != 1 else released.wait(600)

    with pytest.raises(DataError, match=r"clip 1: could not be read within 0\.2 s; see to its drive"):
        list(in_threads(wait, range(3), 2, ahead=2, timeout=0.2, describe=lambda number: f"clip {number}"))
    with pytest.raises(LoaderStopped):
        list(in_threads(wait, range(3), 2, ahead=2, timeout=0.2, stopping=lambda: True))
    released.set()


def test_evaluation_names_the_clip_that_hangs(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, released = load_manifest(make_set(3)), threading.Event()
    monkeypatch.setattr("fastclap.data.dataset.whole_clip", lambda file: released.wait(600))
    with pytest.raises(DataError, match=r"set\.jsonl:\d: .*\.wav: could not be read within 0\.1 s"):
        next(eval_batches(manifest, RATE, 2, timeout=0.1))
    with pytest.raises(LoaderStopped):
        next(eval_batches(manifest, RATE, 2, timeout=9, stopping=lambda: True))
    released.set()


def test_lengths_are_read_in_order(make_set: MakeSet) -> None:
    manifest = load_manifest(make_set(20, duration=False))
    Path(manifest[5].audio).unlink()
    seconds = clip_durations(manifest)
    expected = [(RATE // 5 + 160 * (index * 7 % 20)) / RATE for index in range(20)]
    expected[5] = 0
    np.testing.assert_allclose(seconds, expected)
