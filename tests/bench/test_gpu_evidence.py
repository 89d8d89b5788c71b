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
import torch

from bench import gpu_evidence, kernel_sections, timing
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
    assert record["checks"] == dict.fromkeys(gpu_evidence.CHECKED, True)
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


def test_every_kernel_is_checked_before_it_is_timed(record: dict[str, Any]) -> None:
    for name, values in (
        ("log_mel", {"features", "waveform"}),
        ("attention", {"output", "q", "k", "v", "table", "gate"}),
        ("layer_norm_gelu", {"output", "x", "weight", "bias"}),
        ("normalize_waveform", {"waveform"}),
    ):
        rows = record["sections"][name]["rows"]
        first = next(at for at, row in enumerate(rows) if "peer" in row)
        assert not any("passed" in row for row in rows[first:])
        errors = [row for row in rows[:first] if row["what"] == "error"]
        assert errors and {key for row in errors for key in row["errors"]} == values
        assert all(row["passed"] and max(row["errors"].values()) < 1e-2 for row in errors)
        assert sum(row["what"] == "two runs bit for bit" for row in rows[:first]) >= 3
        (graph,) = [row for row in rows[:first] if row["what"] == "replay of a CUDA graph"]
        assert "no CUDA graphs" in graph["reason"] and "passed" not in graph
    (tests,) = record["sections"]["kernel_tests"]["rows"]
    assert tests["passed"] and "1 passed" in tests["output"][-1]


def test_kernels_are_timed_beside_their_peers_and_floors(record: dict[str, Any]) -> None:
    copy = next(row["gbytes_s"] for row in record["sections"]["ceilings"]["rows"] if row["what"] == "copy")
    peak = next(row["tflops"] for row in record["sections"]["ceilings"]["rows"] if row["what"] == "matmul")
    for name, peer in (
        ("log_mel", "torchaudio"),
        ("attention", "multi_head_attention_forward"),
        ("layer_norm_gelu", "torch eager"),
        ("normalize_waveform", "torch eager"),
    ):
        rows = [row for row in record["sections"][name]["rows"] if "peer" in row]
        timed = [row for row in rows if "median_ms" in row]
        assert {"fastclap", peer} <= {row["peer"] for row in timed}
        for row in timed:
            bytes_ms = 1e3 * row["least_gbytes"] / copy
            assert row["floor_ms"] == pytest.approx(bytes_ms, rel=1e-2) or row["floor_ms"] > bytes_ms
            assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["median_ms"], rel=1e-2)
            assert row["gbytes_s"] == pytest.approx(1e3 * row["least_gbytes"] / row["median_ms"], rel=1e-2)
            if "tflops" in row:
                passes = 1 if row["passes"] == "forward" else 3.5
                flops = passes * 4 * row["batch"] * row["heads"] * row["frames"] ** 2 * row["head_width"]
                assert row["floor_ms"] >= 0.99 * flops / peak / 1e9
        assert all(row["notes"] and row["reason"] == "not available" for row in rows if "median_ms" not in row)
        ours = [row["errors"] for row in timed if row["peer"] == "fastclap"]
        bound = 5e-3 if name == "log_mel" else 1e-5  # features in bfloat16
        assert all(error < bound for errors in ours for key, error in errors.items() if key != "largest")


def test_log_mel_counts_samples_in_and_features_out(record: dict[str, Any]) -> None:
    rows = [row for row in record["sections"]["log_mel"]["rows"] if row.get("peer") == "fastclap"]
    assert len(rows) == 4 * 4  # front-ends, pairs of dtypes
    found = {(row["front_end"], row["audio"], row["dtype"]): 1e9 * row["least_gbytes"] / row["clips"] for row in rows}
    samples, frames = 1600, 10
    assert found["whisper-80", "float32", "float32"] == pytest.approx(4 * samples + 4 * 80 * frames, rel=1e-3)
    assert found["clsp-128", "int16", "bfloat16"] == pytest.approx(2 * samples + 2 * 128 * frames, rel=1e-3)


@pytest.mark.parametrize("name", ["attention", "layer_norm_gelu", "normalize_waveform"])
def test_sections_in_the_dtype_of_a_gpu_run(tmp_path: Path, name: str) -> None:
    record = gpu_evidence.Record(tmp_path / "record.json")
    record.section(name)
    run = gpu_evidence.Run(
        *(record, name, torch.device("cpu"), torch.bfloat16),
        sizes=gpu_evidence.CPU_SIZES,
        deadline=time.monotonic() + 60,
    )
    gpu_evidence.SECTIONS[name][0](run)
    section = record.content["sections"][name]
    assert gpu_evidence._passed(section)
    checked = [row for row in section["rows"] if row.get("what") == "error"]
    assert {"float32", "bfloat16"} <= {row["dtype"] for row in checked}
    assert {"copy"} <= {row["what"] for row in section["rows"] if "what" in row}  # the run had not measured one
    timed = [row for row in section["rows"] if "median_ms" in row and "peer" in row]
    assert timed and all(row["dtype"] == "bfloat16" and row["share_of_floor"] > 0 for row in timed)


def test_a_wrong_kernel_fails_its_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_sections.normalize_waveform

    def wrong(*inputs: Any, backend: str, **options: Any) -> torch.Tensor:
        result = right(*inputs, backend=backend, **options)
        return result if backend == "torch" else result + 1e-3

    monkeypatch.setattr(kernel_sections, "normalize_waveform", wrong)
    record = gpu_evidence.run_all(tmp_path, 60, dry_run=True, only=["normalize_waveform"])
    assert record["correct"] is False and record["checks"] == {"normalize_waveform": False}
    rows = record["sections"]["normalize_waveform"]["rows"]
    failed = [row for row in rows if row.get("passed") is False]
    assert failed and {row["what"] for row in failed} == {"error"}
    assert "not for use" in tables(record) and "(normalize_waveform)" in tables(record)


def test_a_form_that_fails_is_a_row_with_the_reason(tmp_path: Path) -> None:
    record = gpu_evidence.Record(tmp_path / "record.json")
    record.section("log_mel")
    run = gpu_evidence.Run(
        *(record, "log_mel", torch.device("cpu"), torch.float32),
        sizes=gpu_evidence.CPU_SIZES,
        deadline=time.monotonic() + 60,
    )

    def fails() -> None:
        raise RuntimeError("no such case")

    peer = kernel_sections.Peer("one", "package", "1", fails, "notes", 0)
    forms = [(peer, kernel_sections.Form(peer, fails, None))]
    kernel_sections.compare(run, {"kernel": "any"}, forms, kernel_sections.against(1.0))
    (row,) = record.content["sections"]["log_mel"]["rows"]
    assert row["reason"] == "RuntimeError: no such case" and "median_ms" not in row


def test_graphs_are_refused_on_a_cpu() -> None:
    with pytest.raises(RuntimeError, match="no CUDA graphs"):
        timing.captured(lambda: None, torch.device("cpu"))


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
    assert "| clap-64, float32, float32 | torchaudio |" in text and "| B = 2, forward | fastclap |" in text
    assert "`attention`: 8 of 8 checks on the device passed." in text and "The kernels' own tests" in text
    for plot in ("time.png", "stages.png", "kernels.png"):
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
