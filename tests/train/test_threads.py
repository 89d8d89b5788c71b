"""The number of CPU threads of a run: as given, as before, or what other processes leave."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastclap.train import run
from fastclap.train.config import TrainConfig
from fastclap.train.distributed import World

WORLD = World(0, 1, torch.device("cpu"), None)


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("given", "saved", "busy", "threads", "line"),
    [
        (3, {"threads": 2}, 9.0, 3, ""),
        (0, {"threads": 2}, 9.0, 2, ""),
        (0, {}, 0.4, 4, ""),
        (0, None, 1.6, 2, "2 of 4 CPU threads, as other processes keep 1.6 cores busy (--threads)"),
        (0, None, 9.0, 1, "1 of 4 CPU threads, as other processes keep 9.0 cores busy (--threads)"),
    ],
)
def test_threads_are_those_of_the_flag_of_the_run_or_what_is_free(
    given: int, saved: dict[str, Any] | None, busy: float, threads: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "busy_cores", lambda: busy)
    assert run.set_threads(TrainConfig(threads=given), WORLD, saved) == line and torch.get_num_threads() == threads


def test_a_number_of_threads_in_the_environment_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(run, "busy_cores", lambda: 9.0)
    assert run.set_threads(TrainConfig(), WORLD, None) == "" and torch.get_num_threads() == 4


def spin() -> None:
    while True:
        pass


def test_busy_cores_are_those_of_other_processes() -> None:
    child = multiprocessing.get_context("fork").Process(target=spin, daemon=True)
    child.start()
    try:
        assert run.busy_cores(0.3) > 0.2
    finally:
        child.kill()
        child.join()
