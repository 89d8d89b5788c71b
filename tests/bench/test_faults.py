"""Bad inputs to every command: the judge sees each kind of fault, and a handful of inputs has none."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from bench.faults import (
    LINES,
    ROOT,
    Input,
    Outcome,
    Surroundings,
    judge,
    make_input,
    run_input,
    scene_in,
    warm_up,
    worse_file,
    worsened,
)
from bench.faults import worse_words as worse


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    warm_up()
    return scene_in(tmp_path_factory.mktemp("faults"))


def test_valid_lines_are_done(scene: Path, tmp_path: Path) -> None:
    for number, line in enumerate(line for line in LINES if line.words[0] != "fastclap-train"):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome = run_input(worsened(line, "nothing", random.Random(0), scene, folder), folder)
        refused = "{checkpoint}" in line.words  # which no code has written
        assert not outcome.fault and outcome.status == (2 if refused else 0), (line, outcome.err)


def test_a_handful_of_inputs_has_no_fault(scene: Path, tmp_path: Path) -> None:
    faults, kinds = [], set()
    for number in range(16):
        folder = tmp_path / str(number)
        folder.mkdir()
        made = make_input(2, number, scene, folder)
        outcome = run_input(made, folder)
        kinds.add((made.words[0], outcome.status))
        if outcome.fault:
            faults.append((number, outcome.fault, ascii(made.words), outcome.err[-2000:]))
    assert not faults
    assert len(kinds) > 7 and {status for _, status in kinds} >= {0, 2}


def test_an_input_follows_from_its_number(scene: Path, tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        for number in range(30):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            (folder / str(number)).mkdir()
            words = make_input(0, number, scene, folder / str(number)).words
            made.append([word.replace(str(folder), "") for word in words])
    assert made[:30] == made[30:] and len({tuple(words) for words in made}) > 20


def test_valid_lines_get_flags_that_exist(scene: Path) -> None:
    for line in LINES:
        words = {
            word for seed in range(60) for word in worse(list(line.words), random.Random(seed)) if word[:2] == "--"
        }
        assert len(words) >= 4, line


def test_damage_is_done_within_the_copy(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"other")
    for seed in range(60):
        folder = tmp_path / f"folder{seed}"
        folder.mkdir()
        (folder / "x.json").write_text(json.dumps({"a": [1, {"b": 2}]}))
        worse_file(folder / "x.json", random.Random(seed), [other])
        assert other.read_bytes() == b"other"
    found = {tuple(sorted(p.name for p in (tmp_path / f"folder{seed}").iterdir())) for seed in range(60)}
    assert len(found) > 3 and any((tmp_path / f"folder{seed}" / "x.json").is_fifo() for seed in range(60)), (
        "a pipe in place of a file"
    )


TRACEBACK = f"""Traceback (most recent call last):
  File "{ROOT}/fastclap/data/pack.py", line 3, in inner
ValueError: no
"""


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        ({"err": TRACEBACK}, "fastclap/data/pack.py:3 in inner: ValueError: no"),
        ({"err": "Exception ignored in: x"}, "elsewhere: Exception ignored in: x"),
        ({"status": None, "signal": 11}, "ended by SIGSEGV"),
        ({"status": None}, "no end within 20 s"),
        ({"status": 1, "err": "x"}, "exit status 1"),
        ({"status": 2}, "exit status 2 without a word"),
        ({"status": 2, "err": "fastclap: no"}, ""),
        ({"memory": 3 << 30}, "took 3.2 GB"),
        ({"out": "{"}, "embed: stdout is no JSON"),
        ({"out": "NaN"}, "embed: stdout is no JSON (NaN in JSON)"),
        ({"out": '{"a": [{"cosine": 1.5}]}'}, "embed: cosine is 1.5"),
        ({"out": '{"a": [{"cosine": -1.0}]}'}, ""),
    ],
)
def test_the_judge(outcome: dict[str, Any], fault: str) -> None:
    values = {"status": 0, "signal": None, "seconds": 1.0, "memory": 0, "out": "{}", "err": "", "fault": ""}
    found = judge(Input(["embed", "--json"], Surroundings(), 20.0, "file"), Outcome(**{**values, **outcome}))
    assert found.startswith(fault) and bool(found) == bool(fault)


def test_an_input_that_hangs_is_ended(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    made = Input(["doctor"], Surroundings(), 0.0, "file")
    assert run_input(made, tmp_path).fault == "no end within 0 s"
