"""The evidence script, in the mode that runs the same code at tiny sizes on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_evidence
from bench.tables import tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("evidence")
    command = [sys.executable, "-m", "bench.gpu_evidence", "--dry-run", "--seconds", "150", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def record(run: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((run[0] / "record.json").read_text())


def test_record_says_that_it_is_of_a_cpu(record: dict[str, Any]) -> None:
    assert record["hardware"].startswith("CPU")
    assert record["machine"]["device"] == "CPU" and record["machine"]["cpu"]
    assert "driver" not in record["machine"]
    assert record["software"]["torch"] and record["date"] and "commit" in record
    assert 0 < record["left_s"] < record["budget_s"] == 150


def test_every_section_finishes_with_figures(record: dict[str, Any]) -> None:
    assert list(record["sections"]) == list(gpu_evidence.SECTIONS)
    for name, section in record["sections"].items():
        assert section["status"] == "done", name
        assert section["rows"], name


def test_correctness_is_measured_not_assumed(record: dict[str, Any]) -> None:
    assert record["correct"] is True
    rows = record["sections"]["correctness"]["rows"]
    tests = rows[0]
    assert tests["what"] == "tests of the engine" and tests["passed"] and " passed" in tests["output"][-1]
    errors = [row["errors"] for row in rows if row["what"] == "error"]
    assert len(errors) == 2 * 3 * 2  # sizes, scales, losses
    for found in errors:
        assert set(found) == {"loss", "da", "db", "dscale"}
        assert all(error < 1e-5 for error in found.values())
        assert max(found["da"], found["db"]) > 0  # float32 against float64 is never exact
    assert sum(row["what"] == "two runs bit for bit" for row in rows) == 12


def test_forms_are_timed_or_say_why_not(record: dict[str, Any]) -> None:
    rows = [row for name in ("main", "more", "sigmoid") for row in record["sections"][name]["rows"]]
    timed = {row["peer"]: row for row in rows if "median_ms" in row}
    assert {"fastclap torch", "materialised"} <= set(timed)
    for row in timed.values():
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["repeats"] >= 3
        assert max(row["errors"].values()) < 1e-5
        flops = 3 * 2 * row["rows"] ** 2 * row["dim"]
        assert row["useful_tflops"] == pytest.approx(flops / row["median_ms"] / 1e9, rel=1e-3)
        peak = record["sections"]["ceilings"]["rows"][0]["tflops"]
        assert row["share_of_peak"] == pytest.approx(row["useful_tflops"] / peak, rel=1e-2)
    others = [row for row in rows if "median_ms" not in row]
    assert {"fastclap Triton", "inf_cl", "memeff"} <= {row["peer"] for row in others}
    assert all(row["reason"] == "not available" and row["notes"] for row in others)


def test_stages_latency_and_the_largest_batch(record: dict[str, Any]) -> None:
    stages = {row["stage"]: row for row in record["sections"]["stages"]["rows"]}
    assert {"whole step", "products", "P3 G·B", "P4 Gᵀ·A", "kernels"} <= set(stages)
    floor = stages["whole step"]["floor_ms"]
    assert stages["products"]["floor_ms"] == pytest.approx(floor / 2, rel=1e-3)
    assert stages["products"]["kernel_ms"] < stages["whole step"]["median_ms"] * 2
    modes = {row["mode"]: row for row in record["sections"]["latency"]["rows"]}
    assert modes["eager"]["median_ms"] > 0 and "no CUDA graphs" in modes["graph"]["reason"]
    (largest,) = record["sections"]["largest"]["rows"]
    assert 0 < largest["loss_value"] < 20 and largest["median_ms"] > 0


def test_tables_and_plots_come_from_the_record(run: tuple[Path, str], record: dict[str, Any]) -> None:
    out, printed = run
    text = tables(record)
    assert text in printed
    assert "| materialised |" in text and "CPU" in text.splitlines()[0]
    assert "not for use" not in text
    assert "not for use" in tables(record | {"correct": False})
    for plot in ("time.png", "stages.png"):
        assert (out / plot).read_bytes()[:4] == b"\x89PNG"


def test_a_hanging_a_crashing_and_a_failing_section_end_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(run: gpu_evidence.Run) -> None:
        run.add({"figure": 1})
        time.sleep(60)

    def crashes(run: gpu_evidence.Run) -> None:
        run.add({"figure": 2})
        os._exit(7)

    def fails(run: gpu_evidence.Run) -> None:
        run.add({"figure": 3})
        raise ValueError("a reason")

    sections = {"hangs": (hangs, 0.5), "crashes": (crashes, 5), "fails": (fails, 5), "ceilings": (None, 5)}
    sections["ceilings"] = gpu_evidence.SECTIONS["ceilings"]
    monkeypatch.setattr(gpu_evidence, "SECTIONS", sections)
    monkeypatch.setattr(gpu_evidence, "GRACE", 0.5)
    record = gpu_evidence.run_all(tmp_path, 60, dry_run=True, only=list(sections))
    found = {name: (section["status"], len(section["rows"])) for name, section in record["sections"].items()}
    assert found == {
        "hangs": ("killed: past its time", 1),
        "crashes": ("died: exit code 7", 1),
        "fails": ("failed: ValueError: a reason", 1),
        "ceilings": ("done", 2),
    }
    assert record["correct"] is False  # nothing was checked


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    record = gpu_evidence.run_all(tmp_path, 1, dry_run=True, only=["main", "latency"])
    assert {section["status"] for section in record["sections"].values()} == {"not reached: no time left"}
