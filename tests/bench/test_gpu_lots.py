"""The lots of the loss and the kernels at tiny sizes on a CPU: what their rows hold, and the tables made of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import timing
from bench.compare import compare
from bench.gpu import kernels, loss, report
from bench.gpu.lots import LOTS
from bench.gpu.records import complete, folder_of
from bench.run import Entry, Record, Row, Run, Settings, read_record

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("loss", "loss_more", "towers", "log_mel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of a dry run where the packages that a bare GPU image lacks cannot be found."""
    root = tmp_path_factory.mktemp("records")
    paths = os.pathsep.join(map(str, (ROOT / "tests" / "lean_image", ROOT)))
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(root), "--lots", *NAMES, "smoke", "tests"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root / folder_of("CPU")


@pytest.fixture(scope="module")
def rows(folder: Path) -> Callable[..., list[Row]]:
    records = {name: read_record(folder / f"{name}.json") for name in NAMES}

    def of(name: str, **case: Any) -> list[Row]:
        return report.rows_of(records, name, **case)  # type: ignore[arg-type]

    return of


def test_every_lot_came_to_its_end(folder: Path) -> None:
    for name in (*NAMES, "smoke", "tests"):
        record = read_record(folder / f"{name}.json")
        assert record is not None and complete(record, LOTS[name].code), name
        (run,) = record["runs"]
        assert run["machine"]["device"] == "CPU" and run["software"]["torch"] == torch.__version__
        assert run["command"].startswith("python -m bench.gpu --dry-run") and run["seconds"] > 0
        assert all(row.get("passed") is not False for row in record["rows"]), name


def test_no_stage_failed(rows: Callable[..., list[Row]]) -> None:
    for name in NAMES:
        assert rows(name) and not rows(name, stage=..., form=None)
        reasons = {row["reason"] for row in rows(name) if "reason" in row}
        assert reasons <= {"not available", "RuntimeError: a CPU has no CUDA graphs"}
        assert not any(row.get("preliminary") for row in rows(name))
        for ceiling, unit in (("matmul", "tflops"), ("copy", "gbytes_s")):
            (row,) = rows(name, ceiling=ceiling)
            assert row[unit] > 0 and row["repeats"] >= 3


def test_losses_are_checked_at_three_scales(rows: Callable[..., list[Row]]) -> None:
    checks = rows("loss", check="float64")
    assert {(row["case"]["loss"], row["case"]["scale"]) for row in checks} == {
        (name, scale) for name in ("info_nce", "sigmoid") for scale in (1.0, 14.29, 100.0)
    }
    for row in checks:
        assert row["passed"] is True and row["repeats"] is True
        assert set(row["errors"]) == {"loss", "da", "db", "dscale"}
        assert 0 < max(row["errors"]["da"], row["errors"]["db"]) < 1e-5  # float32 against float64 is never exact


def test_forms_of_the_loss_are_timed_or_say_why_not(rows: Callable[..., list[Row]]) -> None:
    peak = rows("loss", ceiling="matmul")[0]["tflops"]
    timed = [row for row in rows("loss", loss=..., form=...) if "median_ms" in row and "check" not in row["case"]]
    assert {"fastclap torch", "materialised"} == {row["case"]["form"] for row in timed}
    for row in timed:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert max(row["errors"].values()) < 1e-5
        flops = 3 * 2 * row["case"]["rows"] ** 2 * row["case"]["dim"]
        assert row["useful_tflops"] == pytest.approx(flops / row["median_ms"] / 1e9, rel=1e-3)
        assert row["share_of_peak"] == pytest.approx(row["useful_tflops"] / peak, rel=1e-2)
    others = {row["case"]["form"]: row for row in rows("loss", loss=..., form=...) if "reason" in row}
    assert {"fastclap Triton", "inf_cl", "memeff"} <= set(others)
    assert all(row["notes"] for row in others.values())
    assert {"quack", "liger-kernel"} <= {row["case"]["form"] for row in rows("loss_more", loss="info_nce", form=...)}
    assert {row["case"]["form"] for row in rows("loss_more", loss="sigmoid", form=...) if "median_ms" in row} == {
        *("fastclap torch", "materialised")
    }


def test_what_else_is_contrasted_is_timed_beside_the_plain_loss(rows: Callable[..., list[Row]]) -> None:
    found = {row["case"]["form"]: row for row in rows("loss_more", contrast="info_nce", form=...)}
    passes = {"plain": 4, "guide": 7, "debias": 4, "matryoshka 32, 16, 8, 4": 7.5, "queue of 128": 16}
    assert {form: row["passes"] for form, row in found.items()} == passes
    peak = rows("loss_more", ceiling="matmul")[0]["tflops"]
    for row in found.values():
        assert row["median_ms"] > 0 and max(row["errors"].values()) < 1e-5
        assert row["floor_ms"] == pytest.approx(row["passes"] * 2e-9 * 64**2 * 32 / peak, rel=1e-2)
    table = "\n".join(report._contrasts({"loss_more": {"rows": list(found.values())}}))
    assert "N = 64, D = 32" in table and "| matryoshka 32, 16, 8, 4 | " in table


def test_stages_latency_and_the_largest_batch(rows: Callable[..., list[Row]]) -> None:
    stages = {row["case"]["stage"]: row for row in rows("loss", stage=..., form=...)}
    assert {"whole step", "products", "P3 G·B", "P4 Gᵀ·A", "kernels"} <= set(stages)
    assert stages["products"]["floor_ms"] == pytest.approx(stages["whole step"]["floor_ms"] / 2, rel=1e-3)
    assert all(row["median_ms"] > 0 for row in rows("loss", latency="calls in a row"))
    assert {row["reason"] for row in rows("loss", latency="graph")} == {"RuntimeError: a CPU has no CUDA graphs"}
    (largest,) = rows("loss_more", largest=...)
    assert 0 < largest["loss_value"] < 20 and largest["median_ms"] > 0


def test_a_kernel_of_ours_belongs_to_its_stage() -> None:
    kernels = pytest.importorskip("fastclap.kernels.contrastive.triton_kernels")
    for stage in loss.OUR_KERNELS:
        assert loss.stage_of(getattr(kernels, f"{stage}_kernel").__name__) == stage
    assert loss.stage_of("nvjet_tst_128x256") == "products" and loss.stage_of("vectorized_add") == "other"


def test_kernels_are_timed_with_their_peers_and_floors(rows: Callable[..., list[Row]]) -> None:
    for lot, kernel, peer in (
        ("log_mel", "log-mel", "torchaudio"),
        ("towers", "attention", "multi_head_attention_forward"),
        ("towers", "layer_norm_gelu", "torch eager"),
        ("towers", "waveform_convolution", "torch eager"),
        ("towers", "normalize_waveform", "torch eager"),
    ):
        copy, peak = rows(lot, ceiling="copy")[0]["gbytes_s"], rows(lot, ceiling="matmul")[0]["tflops"]
        timed = [row for row in rows(lot, kernel=kernel, form=...) if "median_ms" in row]
        assert {"fastclap", peer} <= {row["case"]["form"] for row in timed}
        for row in timed:
            bytes_ms = row["gbytes_s"] * row["median_ms"] / copy
            assert row["floor_ms"] >= 0.98 * bytes_ms
            assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["median_ms"], rel=1e-2)
            if "tflops" in row:
                case = row["case"]
                passes = 1 if case["passes"] == "forward" else 3.5
                flops = passes * 4 * case["batch"] * case["heads"] * case["frames"] ** 2 * case["head_width"]
                assert row["tflops"] == pytest.approx(flops / row["median_ms"] / 1e9, rel=1e-2)
                assert row["floor_ms"] == pytest.approx(max(bytes_ms, flops / peak / 1e9), rel=2e-2)
            else:
                assert row["floor_ms"] == pytest.approx(bytes_ms, rel=2e-2)
        bound = 5e-3 if kernel == "log-mel" else 1e-5  # features in bfloat16
        ours = [row["errors"] for row in timed if row["case"]["form"] == "fastclap"]
        assert all(error < bound for errors in ours for name, error in errors.items() if name != "largest")


def test_log_mel_counts_samples_in_and_features_out(rows: Callable[..., list[Row]]) -> None:
    found = {
        (row["case"]["front_end"], row["case"]["audio"], row["case"]["dtype"]): row["gbytes_s"]
        * row["median_ms"]
        * 1e6
        / 2
        for row in rows("log_mel", kernel="log-mel", form="fastclap")
    }
    assert len(found) == 4 * 4  # front-ends, pairs of dtypes
    samples, frames = 1600, 10
    assert found["whisper-80", "float32", "float32"] == pytest.approx(4 * samples + 4 * 80 * frames, rel=1e-3)
    assert found["clsp-128", "int16", "bfloat16"] == pytest.approx(2 * samples + 2 * 128 * frames, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# comparing


def a_run(tmp_path: Path) -> Run:
    record = Record(tmp_path / "lot.json")
    record.begin("lot", "CPU", "code", date="2026")
    return Run(record, Settings("cpu"), time.monotonic() + 60)


def entry(name: str, call: Callable[[], Any] | None, **more: Any) -> Entry:
    make = None if call is None else lambda: call
    return Entry({"case": 1, "form": name}, make, {"notes": "notes"}, seconds=5.0, **more)


def test_forms_have_rows_whatever_becomes_of_them(tmp_path: Path) -> None:
    run = a_run(tmp_path)

    def fails() -> None:
        raise ValueError("no such shape")

    calls: list[str] = []
    quick = entry("quick", lambda: calls.append("quick"), work=lambda ms: {"per_s": 1e3 / ms})
    entries = [quick, entry("broken", fails), entry("slow", lambda: time.sleep(0.2)), entry("absent", None)]
    compare(run, entries, seconds=0.1)
    rows = {row["case"]["form"]: row for row in run.record.rows()}
    assert rows["broken"]["reason"] == "ValueError: no such shape" and rows["absent"]["reason"] == "not available"
    assert rows["quick"]["repeats"] >= 3 and rows["slow"]["repeats"] == 1  # too slow to be repeated
    assert rows["quick"]["per_s"] == pytest.approx(1e3 / rows["quick"]["median_ms"])
    before = len(calls)
    compare(run, entries, seconds=0.1)  # after the stage was started anew
    assert len(calls) == before


def test_a_form_that_breaks_in_its_turn_leaves_the_others_their_times(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    calls = iter(range(3))  # one to warm up, one for the peak, one in turn
    compare(run, [entry("lasts", lambda: None), entry("breaks", lambda: next(calls))], seconds=0.1)
    rows = {row["case"]["form"]: row for row in run.record.rows()}
    assert rows["lasts"]["repeats"] >= 3 and "in_turn_reason" not in rows["lasts"]
    assert rows["breaks"]["repeats"] == 1 and rows["breaks"]["in_turn_reason"].startswith("StopIteration")
    assert not any(row.get("preliminary") for row in rows.values())


def test_a_wrong_loss_fails_its_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = loss.LOSSES["info_nce"]
    monkeypatch.setitem(loss.LOSSES, "info_nce", lambda *x, backend: 1.001 * right(*x, backend=backend))
    run = a_run(tmp_path)
    loss.errors(run)
    passed = {row["case"]["loss"]: row["passed"] for row in run.record.rows()}
    assert passed == {"info_nce": False, "sigmoid": True}


@pytest.mark.parametrize("stage", (kernels.towers,))
def test_stages_in_the_dtype_of_a_gpu(tmp_path: Path, stage: Callable[[Run], None]) -> None:
    run = a_run(tmp_path)
    run.dtype = torch.bfloat16
    stage(run)
    timed = [row for row in run.record.rows() if row["case"].get("form") == "fastclap"]
    assert len(timed) == 12 and all(row["case"]["dtype"] == "bfloat16" and row["share_of_floor"] > 0 for row in timed)
    assert all(max(row["errors"].values()) < 2e-2 for row in timed)


def test_graphs_are_refused_on_a_cpu() -> None:
    with pytest.raises(RuntimeError, match="no CUDA graphs"):
        timing.captured(lambda: None, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# tables


def test_the_page_of_a_device_comes_from_its_records(folder: Path) -> None:
    written = report.write_reports(folder.parent)
    assert [path.name for path in written] == ["loss.png", "README.md"]
    assert written[0].read_bytes()[:4] == b"\x89PNG"
    page = written[1].read_text(encoding="utf-8")
    for text in ("# CPU", "| materialised |", "N = 256", "| torch.mm | P3 G·B |", "calls in a row", "clap-64, float32"):
        assert text in page, text
    checks = sum("passed" in row for name in (*NAMES, "smoke") for row in read_record(folder / f"{name}.json")["rows"])  # type: ignore[index]
    assert checks > 100 and f"{checks} of {checks} checks against float64 passed" in page
    assert "fastclap Triton (needs a GPU), " in page
    assert "a CPU has no CUDA graphs" in page  # what failed is said


def test_the_page_gets_the_tables_between_its_marks(folder: Path) -> None:
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.with_tables(readme, {}) == f"before\n{report.BEGIN}\n{report.UNMEASURED}\n{report.END}\nafter\n"
    record = {"device": "NVIDIA H200", "runs": [{}], "rows": []}
    for name, ms in (("ours, compiled", 100.0), ("reference, as released", 1200.0), ("reference, bf16", 300.0)):
        figures = {"median_ms": ms, "p10_ms": ms, "p90_ms": ms, "repeats": 5, "clips_per_s": 32e3 / ms, "mfu": 0.5}
        record["rows"].append({"case": {"form": name, "rows": 32, "seconds": 10.0}, "run": 0, **figures})  # type: ignore[attr-defined]
    made = report.with_tables(readme, {Path("h200"): {"step": record}})
    assert "| ours, compiled | 100 (100-100) | 320 | 50% |  | 12.0 | 3.0 |" in made
    assert "On one NVIDIA H200" in made and "old" not in made and made.endswith("after\n")
    with pytest.raises(ValueError, match="begin"):
        report.with_tables("no marks", {})


def test_the_page_is_up_to_date() -> None:
    root = report.ROOT / "bench" / "records" / "gpu"
    devices = {folder: report.read_all(folder) for folder in sorted(root.glob("*")) if folder.is_dir()}
    readme = report.PAGE.read_text(encoding="utf-8")
    assert report.with_tables(readme, devices) == readme, "python -m bench.gpu --report"
