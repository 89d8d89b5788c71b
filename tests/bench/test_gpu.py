"""`bench.gpu`: whatever ends a form, a stage or the whole run, every row before it is on the disk."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import run
from bench.gpu import __main__ as door
from bench.gpu import lots, watch
from bench.gpu.lots import Lot
from bench.gpu.records import folder_of, merge
from bench.run import Record, read_record

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = run.Settings("cpu")


def begun(path: Path, code: str = "code") -> Record:
    made = Record(path)
    made.begin("lot", "NVIDIA H100 80GB HBM3", code, date="2026-01-01")
    return made


def stages(path: Path, *names: str, seconds: float = 60.0) -> tuple[str, dict[str, Any]]:
    """How the stages ended, and the figures or reasons of all rows by form or stage."""
    made = begun(path)
    status = watch.run_stages(
        made, tuple(f"tests.bench.gpu_stages:{name}" for name in names), SETTINGS, time.monotonic() + seconds
    )
    rows = read_record(path)["rows"]  # type: ignore[index]
    found = {next(iter(row["case"].values())): row.get("reason", row.get("figure")) for row in rows}
    assert len(found) == len(rows)
    return status, found


# ---------------------------------------------------------------------------------------------------------------------
# records


def test_rows_of_the_same_code_are_kept_and_replaced_case_by_case(tmp_path: Path) -> None:
    path = tmp_path / "h100" / "lot.json"
    first = begun(path)
    first.add({"form": "a", "rows": 1}, figure=1)
    first.add({"rows": 1, "form": "b"}, figure=2)
    second = begun(path)
    assert second.row({"form": "a", "rows": 1}) is None  # of an earlier run
    second.add({"form": "b", "rows": 1}, figure=3)
    rows = read_record(path)["rows"]  # type: ignore[index]
    assert [(row["case"]["form"], row["figure"], row["run"]) for row in rows] == [("a", 1, 0), ("b", 3, 1)]
    assert begun(path, "other code").content["rows"] == []


def test_a_lack_of_time_or_of_a_package_does_not_replace_figures(tmp_path: Path) -> None:
    path = tmp_path / "lot.json"
    begun(path).add({"form": "a"}, figure=1)
    second = begun(path)
    second.add({"form": "a"}, reason="not reached: no time left")
    second.add({"form": "a"}, reason="not available")
    assert read_record(path)["rows"][0]["figure"] == 1  # type: ignore[index]
    second.add({"form": "a"}, reason="RuntimeError: it fails now")
    assert "figure" not in read_record(path)["rows"][0]  # type: ignore[index]


def test_records_from_elsewhere_are_merged(tmp_path: Path) -> None:
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    begun(here).add({"form": "a"}, figure=1)
    made = Record(there)
    made.begin("lot", "H100", "code", date="2026-01-02")
    made.add({"form": "a"}, figure=2)
    made.add({"form": "b"}, figure=3)
    assert "2 rows merged" in merge(there, here, "0123")
    merged = read_record(here)
    assert merged is not None and [run.get("commit") for run in merged["runs"]] == [None, "0123"]
    assert [(row["figure"], merged["runs"][row["run"]]["date"]) for row in merged["rows"]] == [
        (2, "2026-01-02"),
        (3, "2026-01-02"),
    ]
    made.begin("lot", "H100", "new code", date="2026-01-03")
    assert "replaced" in merge(there, here) and read_record(here)["code"] == "new code"  # type: ignore[index]
    old = tmp_path / "old.json"
    begun(old).add({"form": "a"}, figure=9)
    assert "left as it is" in merge(old, here) and read_record(here)["rows"] == []  # type: ignore[index]


def test_a_device_has_a_folder() -> None:
    assert folder_of("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert folder_of("NVIDIA H200") == "h200" and folder_of("CPU") == "cpu"


# ---------------------------------------------------------------------------------------------------------------------
# ends


def test_forms_that_raise_hang_or_are_killed_are_rows_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "GRACE", 0.3)
    start = time.monotonic()
    status, found = stages(tmp_path / "lot.json", "all_kinds_of_ends")
    assert status == "done" and time.monotonic() - start < 50  # no hang lasted its minute
    assert found == {
        "good": 1,
        "raises": "RuntimeError: no such case",
        "hangs": "stopped: longer than 0 s",
        "hangs for good": "killed: it hung past its time",
        "asks for too much memory": "MemoryError: ",
        "is killed": "killed by SIGKILL",
        "exits": "the process ended with 3",
        "good too": 1,
    }


def test_a_lost_or_hanging_gpu_costs_the_case_that_did_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "GRACE", 0.3)
    monkeypatch.setattr(run, "CONTEXT_SECONDS", 0.3)
    status, found = stages(tmp_path / "lot.json", "loses_the_gpu")
    assert status == "done"
    assert found == {
        "loses": "RuntimeError: no such case",
        "holds up": "killed: it hung past its time",
        "good": 1,
    }


def test_a_stage_that_dies_or_raises_between_cases_is_a_row_and_the_next_begins(tmp_path: Path) -> None:
    status, found = stages(tmp_path / "lot.json", "dies_between_cases", "raises_outside_of_a_case", "one_row")
    assert status == "done"
    assert found == {
        "before": 1,
        "tests.bench.gpu_stages:dies_between_cases": "the process ended with 4",
        "tests.bench.gpu_stages:raises_outside_of_a_case": "RuntimeError: a mistake of the stage's own",
        "only": 1,
    }


def test_a_lot_stops_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, found = stages(tmp_path / "lot.json", "slow_and_steady", "one_row", seconds=1.5)
    assert status.startswith("cut off")
    assert list(found.values()).count(1) >= 3
    assert next(reason for reason in found.values() if reason != 1).startswith("not reached")
    assert "only" not in found


def test_ten_kills_at_random_moments_lose_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, told = tmp_path / "lot.json", tmp_path / "told"
    monkeypatch.setenv("FASTCLAP_TEST_TOLD", str(told))
    moments = random.Random(0)
    for _ in range(10):
        child = os.fork()
        if not child:
            try:
                watch.run_stages(begun(path), ("tests.bench.gpu_stages:counting",), SETTINGS, time.monotonic() + 60)
            finally:
                os._exit(1)
        _wait_for_a_row(told)
        time.sleep(moments.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lines = _ended(told)
        content = read_record(path)
        assert content is not None and content["runs"][-1]["status"] == "running"
        figures = {row["case"]["form"]: row["figure"] for row in content["rows"]}
        assert lines and set(lines) <= set(figures)
        assert all(figure == number**2 for number, figure in figures.items())
        told.unlink()
    assert len(content["runs"]) == 10 and len(figures) == max(figures) + 1  # no row of any run is missing


def _wait_for_a_row(told: Path) -> None:
    end = time.monotonic() + 20
    while not told.exists() or told.read_text(encoding="utf-8").count("\n") < 2:
        assert time.monotonic() < end, "the stage did not start"
        time.sleep(0.005)


def _ended(told: Path) -> list[int]:
    """The rows that the stage said were on the disk, once its process is no more."""
    first = told.read_text(encoding="utf-8").splitlines()[0]
    pid, end = int(first.removeprefix("pid ")), time.monotonic() + 10
    while _lives(pid):
        assert time.monotonic() < end, "the stage outlived the run"
        time.sleep(0.01)
    return [int(line) for line in told.read_text(encoding="utf-8").splitlines()[1:] if line]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---------------------------------------------------------------------------------------------------------------------
# the plan


@pytest.fixture
def two_lots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Lots "first" and "second" over one file; returns the folder of records."""
    (tmp_path / "measured.py").write_text("1\n", encoding="utf-8")
    monkeypatch.setattr(lots, "ROOT", tmp_path)
    monkeypatch.setattr(door, "RECORDS", tmp_path / "records")
    options: dict[str, Any] = {"what": "it shows", "forms": (), "measures": ("*.py",)}
    two = {
        name: Lot(name, stages=("tests.bench.gpu_stages:one_row",), seconds=30, **options)
        for name in ("first", "second")
    }
    monkeypatch.setattr(door, "LOTS", two)
    yield tmp_path / "records"


def test_the_plan_says_what_is_current_and_what_changed(two_lots: Path, tmp_path: Path) -> None:
    assert door.plan(two_lots).count("| none |") == 2
    assert door.run_lots(["first"], two_lots, SETTINGS, 600, chosen=True)
    first, second = door.plan(two_lots).splitlines()[-2:]
    assert "| first |" in first and "done, 1 rows" in first and "| current |" in first
    assert "| second | none |" in second and "| 30 s |" in second
    (tmp_path / "measured.py").write_text("2\n", encoding="utf-8")
    assert "code changed since" in door.plan(two_lots)


def test_what_has_a_current_record_is_left_and_the_time_is_kept(
    two_lots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert door.run_lots(["first"], two_lots, SETTINGS, 600, chosen=False)
    assert door.run_lots(["first", "second"], two_lots, SETTINGS, 600, chosen=False)
    assert "[first] has a current record" in capsys.readouterr().out
    content = read_record(two_lots / "cpu" / "second.json")
    assert content is not None and content["runs"][-1]["status"] == "done"
    assert content["runs"][-1]["seconds"] < 60 and content["runs"][-1]["software"]["torch"] == torch.__version__
    assert not door.run_lots(["second"], two_lots, SETTINGS, 5, chosen=True)
    assert "[second] not reached" in capsys.readouterr().out


def test_lots_measure_files_that_exist() -> None:
    for lot in lots.LOTS.values():
        assert all(list(ROOT.glob(pattern)) for pattern in lot.measures), lot.name
        assert lot.seconds <= 240 and lot.stages
    assert list(lots.LOTS)[:4] == ["smoke", "tests", "step", "clsp"]


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--plan", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and all(f"| {name} |" in done.stdout for name in lots.LOTS), done.stderr
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--dry-run"])
    with pytest.raises(SystemExit):
        door.main()
    assert "--dry-run needs --out" in capsys.readouterr().err
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["bench.gpu", "--lots", "smoke", "--out", str(tmp_path)])
        with pytest.raises(SystemExit, match="no GPU here"):
            door.main()


def test_json_of_a_record_is_plain(tmp_path: Path) -> None:
    begun(tmp_path / "lot.json").add({"form": "ü"}, figure=1.5)
    assert json.loads((tmp_path / "lot.json").read_text(encoding="utf-8"))["rows"][0]["case"] == {"form": "ü"}
