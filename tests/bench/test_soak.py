"""What bench.soak says of runs; the runs themselves take minutes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import soak
from bench.soak import Figures, Outcome


def finished(folder: Path, *, loss: float = 1.0, time: float = 0.0, weights: bytes = b"weights") -> Path:
    """A run folder with a result."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(weights)
    (folder / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "loss": loss, "time": time}) + "\n")
    return folder


def outcome(run: Path, last: Figures) -> Outcome:
    """A run of 100 steps that begins with 100 MB, 10 descriptors and 5 threads."""
    samples = [(float(step), step, Figures(100.0, 10, 5)) for step in range(20, 41)]
    return Outcome(run, samples=[*samples, (90.0, 90, last)])


def test_times_are_no_part_of_a_result(tmp_path: Path) -> None:
    one, other = finished(tmp_path / "one"), finished(tmp_path / "other", time=2.0)
    assert soak.result(one) == soak.result(other)


@pytest.mark.parametrize(
    ("change", "last", "fault"),
    [
        ({}, Figures(110.0, 11, 6), None),
        ({"loss": 2.0}, Figures(100.0, 10, 5), "weights or metrics differ"),
        ({"weights": b"others"}, Figures(100.0, 10, 5), "weights or metrics differ"),
        ({}, Figures(130.0, 10, 5), "memory of rank 0, MB grow from 100 to 130"),
        ({}, Figures(100.0, 20, 5), "descriptors grow from 10 to 20"),
        ({}, Figures(100.0, 10, 9), "threads grow from 5 to 9"),
    ],
)
def test_what_differs_or_grows_is_a_fault(tmp_path: Path, change: dict, last: Figures, fault: str | None) -> None:
    whole = outcome(finished(tmp_path / "whole"), Figures(100.0, 10, 5))
    struck = outcome(finished(tmp_path / "struck", **change), last)
    lines = soak.told(1, 2, 100, whole, struck)
    assert [line for line in lines if line.startswith("FAULT")] == ([] if fault is None else [f"FAULT: {fault}"])


def test_a_run_without_a_result_is_a_fault(tmp_path: Path) -> None:
    whole, struck = (outcome(path, Figures(100.0, 10, 5)) for path in (finished(tmp_path / "whole"), tmp_path / "none"))
    assert any(line.startswith("FAULT: a run has no result") for line in soak.told(2, 1, 100, whole, struck))


def test_descendants_and_figures_of_a_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        try:
            assert child.pid in soak.helpers(os.getpid())
            found = soak.figures(child.pid)
            assert found is not None and found.threads == 1 and found.descriptors >= 3
        finally:
            child.communicate(b"\n")
    assert soak.figures(child.pid) is None


@pytest.mark.parametrize("act", soak.DISTURBANCES[:3])
def test_a_disturbance_of_a_process_that_has_gone_is_none(
    tmp_path: Path, act: Callable[[soak.Start, Path, random.Random], str]
) -> None:
    start = object.__new__(soak.Start)
    start.processes, start._statuses = [(1 << 22) + 1], {}  # more than Linux has
    assert act(start, tmp_path, random.Random(0)).startswith("SIG")
