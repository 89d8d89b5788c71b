"""The lots of the training step, of fastclap-train and of embedding at tiny sizes: the rows that they promise.

Dry runs are processes of their own, in which the packages that a bare GPU machine lacks cannot be found.
"""

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

from bench import steady
from bench.gpu import profiled
from bench.gpu.step import Steps
from bench.gpu.train import Trace
from bench.run import ABSENT, Entry, Record, Run, Settings, key
from bench.steady import Steady
from bench.train_step import work

ROOT = Path(__file__).resolve().parents[2]
# Imports are for all stages, which are forked.
DRY_RUN = """
import sys, time
from pathlib import Path
import torch._dynamo, transformers.models.wavlm.modeling_wavlm, transformers.models.xlm_roberta.modeling_xlm_roberta
import bench.gpu.embed, bench.gpu.step, bench.gpu.train
from bench.gpu.watch import run_stages
from bench.run import Record, Settings
for lot in sys.argv[2:]:
    name, *stages = lot.split()
    record = Record(Path(sys.argv[1], f"{name}.json"))
    record.begin("dry run", "CPU", "", date="")
    if run_stages(record, tuple(stages), Settings("cpu"), time.monotonic() + 240) != "done":
        sys.exit(name)
"""
STEP = ("small", "larger", "profile", "ablation", "open_clip")
STAGES = {"step": [f"bench.gpu.step:{name}" for name in STEP], "train": ["bench.gpu.train:train"]}
STAGES["step"].append("bench.gpu.embed:embed")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Rows of a dry run, of the stages of the step and of embedding, and of the stage of training."""
    folder = tmp_path_factory.mktemp("dry-run")
    paths = os.pathsep.join(map(str, (ROOT / "tests" / "lean_image", ROOT)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    lots = [" ".join((name, *stages)) for name, stages in STAGES.items()]
    subprocess.run([sys.executable, "-c", DRY_RUN, str(folder), *lots], env=environment, timeout=500, check=True)
    return {name: json.loads((folder / f"{name}.json").read_text())["rows"] for name in STAGES}


def of(rows: list[dict[str, Any]], /, **case: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row["case"].get(name) == value for name, value in case.items())]


def one(rows: list[dict[str, Any]], /, **case: Any) -> dict[str, Any]:
    (row,) = of(rows, **case)
    return row


def timed(row: dict[str, Any]) -> bool:
    return row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["repeats"] >= 1 and not row.get("preliminary")


# ---------------------------------------------------------------------------------------------------------------------
# step


def test_our_step_comes_first_and_its_figures_agree(rows: dict[str, list[dict[str, Any]]]) -> None:
    steps = [row for row in rows["step"] if "rows" in row["case"]]
    assert steps[0]["case"] == {"form": "fastclap", "rows": 3, "seconds": 0.25}
    ceiling = one(rows["step"], ceiling="matmul")["tflops"]
    for n in (3, 4):
        for form in ("fastclap", "fastclap, compiled", *(["fastclap, gradient cache"] if n == 4 else [])):
            row = one(steps, form=form, rows=n)
            assert timed(row) and row["loss"] > 0 and "passed" not in row and row["block_calls"] >= 1
            assert row["clips_per_s"] == pytest.approx(1e3 * n / row["median_ms"], rel=1e-3)
            assert row["mfu"] == pytest.approx(row["model_tflops"] / ceiling, rel=2e-3)
            assert row["first_ms"] > 0 and row["peak_bytes"] is None  # of a CPU
    assert one(steps, form="fastclap, compiled", rows=3)["in_turn_with"] == ["fastclap"]
    assert one(steps, form="fastclap, compiled", rows=3)["others_ms"]["fastclap"] > 0
    assert one(steps, form="fastclap, gradient cache")["chunk_sizes"] == [2, 2]


def test_without_a_checkout_there_are_rows_that_say_so(rows: dict[str, list[dict[str, Any]]]) -> None:
    absent = [row for row in rows["step"] if "reason" in row]
    assert {row["reason"] for row in absent} == {ABSENT}
    assert {row["notes"] for row in absent} == {"no checkout given"}
    forms = {row["case"]["form"] for row in absent}
    assert {"reference, as released", "reference, bf16", "open_clip CLAP-HTSAT-tiny"} < forms and len(forms) == 6


def test_the_profile_accounts_for_the_step(rows: dict[str, list[dict[str, Any]]]) -> None:
    whole = one(rows["step"], profile="whole step")
    kernels = [row for row in rows["step"] if "kernel" in row["case"]]
    parts = {row["case"]["part"]: row for row in rows["step"] if "part" in row["case"]}
    assert len(kernels) == 20 and kernels == sorted(kernels, key=lambda row: -row["ms"])
    assert sum(row["ms"] for row in parts.values()) == pytest.approx(whole["device_ms"], rel=0.01)
    assert sum(row["share"] for row in parts.values()) == pytest.approx(1.0, abs=0.01)
    named = {"convolutions", "positional convolution", "products", "attention", "norms", "optimizer", "loss", "copies"}
    assert named <= set(parts)


def test_one_optimisation_at_a_time(rows: dict[str, list[dict[str, Any]]]) -> None:
    ablation = [row for row in rows["step"] if row["case"].get("form", "").startswith(("+", "transformers' WavLM, fl"))]
    ablation = [row for row in ablation if "rows" in row["case"]]
    assert [row["case"]["form"] for row in ablation][:2] == ["transformers' WavLM, float32", "+ no host syncs"]
    assert ablation[-1]["case"]["form"] == "+ fused loss" and all(timed(row) for row in ablation)
    assert len(ablation[0]["in_turn_with"]) == len(ablation) - 1


# ---------------------------------------------------------------------------------------------------------------------
# training and embedding


def test_a_training_run_is_followed_line_by_line(rows: dict[str, list[dict[str, Any]]]) -> None:
    found = rows["train"]
    assert not [row for row in found if "reason" in row]
    laps = [row for row in found if "step" in row["case"]]
    assert [row["case"] for row in laps] == [{"run": "fastclap-train", "step": step} for step in (2, 4, 6)]
    for row in laps:
        assert row["clips_per_s"] > 0 and 0 <= row["waiting"] <= 1 and row["loss"] > 0 and row["skipped_steps"] == 0
        assert row["used_bytes"] is None and row["clips"] == 4
    phases = {(row["case"]["run"], row["case"]["phase"]): row for row in found if "phase" in row["case"]}
    plain = {phase: row for (run, phase), row in phases.items() if run == "fastclap-train"}
    assert 0 < plain["start"]["seconds"] < plain["all"]["seconds"] and plain["end"]["seconds"] > 0
    traced = phases["fastclap-train, profiled", "three steps"]
    assert traced["span_ms"] > 0 and 0 < traced["busy"] <= 1
    assert len([row for row in found if "kernel" in row["case"]]) == 20


def test_embedding_is_compared_on_equal_terms(rows: dict[str, list[dict[str, Any]]]) -> None:
    found = [row for row in rows["step"] if {"clips", "lengths"} <= set(row["case"])]
    assert {row["case"]["lengths"] for row in found} == {"0.4 s", "0.2 to 0.5 s"} and len(found) == 8
    for row in found:
        assert timed(row) and row["clips_per_s"] == pytest.approx(1e3 * 5 / row["median_ms"], rel=1e-3)
        assert row["vectors_differ"] < (1e-5 if row["case"]["form"].endswith("float32") else 0.05)
        assert len(row["in_turn_with"]) == 3
    captions = [row for row in rows["step"] if "captions" in row["case"]]
    assert len(captions) == 4
    assert all(row["captions_per_s"] == pytest.approx(7e3 / row["median_ms"], rel=1e-3) for row in captions)
    assert max(row["vectors_differ"] for row in captions) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# what forms may do


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Of a stage in this process, in which forms take at most two turns."""
    monkeypatch.setattr(steady, "MOST_ROUNDS", 2)
    record = Record(tmp_path / "record.json")
    record.begin("lot", "CPU", "", date="")
    return Run(record, Settings("cpu"), time.monotonic() + 60)


def entry(form: str, call: Any, seconds: float = 5.0) -> Entry:
    return Entry(
        {"form": form, "rows": 8}, lambda: call, {"notes": form}, work(8, 10**9, 0.5), lambda x: {"x": x}, seconds
    )


def test_a_form_that_fails_is_a_row_and_the_rest_goes_on(run: Run) -> None:
    def broken() -> None:
        raise torch.OutOfMemoryError("no")

    def hangs() -> None:
        time.sleep(60)

    lab = Steady(run, block_seconds=0.0)
    lab.in_turn([entry("broken", broken), entry("hangs", hangs, 0.3), entry("good", lambda: 1)], 5.0)
    found = {row["case"]["form"]: row for row in run.record.rows()}
    assert found["broken"]["reason"] == "out of memory" and found["hangs"]["reason"].startswith("stopped")
    good = found["good"]
    assert good["repeats"] == 2 and good["x"] == 1 and good["in_turn_with"] == [] and "preliminary" not in good
    assert good["clips_per_s"] == pytest.approx(8e3 / good["median_ms"], rel=1e-3)
    assert good["mfu"] == pytest.approx(1e-9 * 1e9 / good["median_ms"] / 0.5, rel=1e-3)


def test_a_form_that_fails_in_turn_keeps_what_it_did_alone(run: Run) -> None:
    calls = 0

    def tires() -> int:
        nonlocal calls
        calls += 1
        if calls > 3:  # two to warm up and a block
            raise RuntimeError("enough")
        return calls

    lab = Steady(run, block_seconds=0.0)
    lab.in_turn([entry("tires", tires), entry("good", lambda: 1)], 5.0)
    found = {row["case"]["form"]: row for row in run.record.rows()}
    assert found["tires"]["in_turn_reason"] == "RuntimeError: enough"
    assert found["tires"]["repeats"] == 1 and found["tires"]["in_turn_with"] == []
    assert found["good"]["repeats"] == 2


def test_a_row_is_there_before_the_next_form_is_made_and_stays_when_complete(run: Run) -> None:
    seen: list[list[str]] = []

    def made(form: str) -> Entry:
        def make() -> Any:
            seen.append([key(row["case"]) for row in run.record.rows() if row.get("preliminary")])
            return lambda: 1

        return Entry({"form": form}, make)

    lab = Steady(run, block_seconds=0.0)
    first = made("first")
    lab.alone(first)
    lab.in_turn([first, made("second")], 5.0)
    assert seen == [[], [key({"form": "first"})]]
    complete = run.known({"form": "first"})
    lab.in_turn([first, made("third")], 5.0)
    assert run.known({"form": "first"}) == complete  # it took part once more
    third = run.known({"form": "third"})
    assert third is not None and list(third["others_ms"]) == ["first"]
    lab.in_turn([first], 5.0)  # nothing is left to do
    assert run.known({"form": "first"}) == complete


def test_blocks_are_of_consecutive_calls(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    lab = Steady(run, block_seconds=10.0)
    monkeypatch.setattr(steady, "MOST_CALLS", 3)
    entries = [entry(name, lambda name=name: order.append(name)) for name in "ab"]  # type: ignore[misc]
    for each in entries:
        lab.alone(each)
    order.clear()
    lab.in_turn(entries, 5.0)
    assert order == ["a"] * 4 + ["b"] * 4 + ["a"] * 4 + ["b"] * 4  # the first of each is not timed


def test_a_slow_call_is_not_repeated_before_its_turn(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steady, "SLOW_MS", 1.0)
    calls: list[int] = []
    lab = Steady(run, block_seconds=0.0)
    lab.alone(entry("slow", lambda: calls.append(time.sleep(0.005))))  # type: ignore[func-returns-value]
    assert len(calls) == 2
    row = run.known({"form": "slow", "rows": 8})
    assert row is not None and row["median_ms"] >= 5 and row["preliminary"]


def test_a_wrong_checkout_costs_the_reference_alone(run: Run, tmp_path: Path) -> None:
    steps = Steps(Run(run.record, Settings("cpu", reference=tmp_path), time.monotonic() + 60))
    ours = steps.forms.complete("fastclap", "")
    steps.in_turn([steps.entry(form, 2) for form in (*steps.forms.reference_forms(), ours)], 1.0)
    found = {row["case"]["form"]: row for row in run.record.rows() if "form" in row["case"]}
    for name in ("reference, as released", "reference, bf16"):
        assert "no checkout of ParaSpeechCLAP" in found[name]["reason"]
    assert timed(found["fastclap"])


# ---------------------------------------------------------------------------------------------------------------------
# profiles


def test_a_backward_pass_belongs_to_the_part_of_its_forward_pass() -> None:
    first, second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    x = torch.randn(256, 64, requires_grad=True)

    def call() -> None:
        second(first(x)).square().sum().backward()

    with profiled.labelled({"first": first}, {}):
        found = profiled.profiled(call, torch.device("cpu"))
    products = sum(calls for name, (_, calls) in found.kernels.items() if name in ("aten::mm", "aten::addmm"))
    assert products == 6  # a layer has one forward and two backward
    assert found.parts["first"][1] > 0 and found.parts["products"][1] > 0
    assert sum(ms for ms, _ in found.parts.values()) == pytest.approx(found.total_ms, rel=0.01)
    assert not first._forward_hooks and not first._forward_pre_hooks


def test_a_trace_on_a_gpu(tmp_path: Path) -> None:
    def event(cat: str, name: str, ts: float, dur: float) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [
        event("kernel", "gemm", 1000.0, 300.0),
        event("kernel", "gemm", 1400.0, 400.0),
        event("gpu_memcpy", "Memcpy HtoD", 1700.0, 300.0),
        event("cpu_op", "aten::mm", 0.0, 5000.0),
        {"ph": "i", "name": "no duration", "ts": 0.0},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    trace = Trace(tmp_path / "trace.json", torch.device("cuda"))
    assert trace.whole == {"span_ms": 1.0, "busy": 0.9, "launches": 3}
    assert dict(trace.longest(1)) == {"gemm": {"calls": 2, "ms": 0.7, "share": 0.7}}
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events[3:]}))
    with pytest.raises(RuntimeError, match="no kernel in it"):
        Trace(tmp_path / "trace.json", torch.device("cuda"))
