"""Everything that only a GPU can show about the kernels, inside ten minutes and in one record.

    python -m bench.gpu_evidence --out bench/records/NAME [--seconds 560] [--only SECTION ...]
    python -m bench.gpu_evidence --out DIR --only log_mel attention    # these sections, with all of the time
    python -m bench.gpu_evidence --out DIR --dry-run        # the same code at tiny sizes on a CPU

Correctness comes first: the tests of the loss' engine, its errors against float64, and two runs bit for bit; the
sections of the other kernels (`bench.kernel_sections`) begin with theirs. Then every benchmark beside its peers. Last,
where time is left, ``kernel_tests`` runs the other kernels' own tests; alone it has all of the time. Each section is a
process of its own with a share of the time: a peer that hangs or crashes ends its section and nothing else, and every
figure is in ``record.json`` as soon as it exists. Plots come last.

How figures are taken: see `bench.timing`. What is counted for the loss: T = 2·N²·D flops is one matmul pass.
``useful_tflops`` counts 3 passes for every form (the least with the matrix of logits in memory), ``tflops_4t`` counts 4
(the least without). ``share_of_peak`` is the former over the rate of one large bf16 product in the same run. Memory is
the highest point of a call above its inputs, gradients included.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastclap
from bench import kernel_sections, peers, timing
from bench.comparison import (
    SCALE,
    Comparison,
    Row,
    copy_rate,
    dtype_name,
    matmul_rate,
    rates,
    significant,
    time_in_turn,
)
from fastclap.files import write_atomic
from fastclap.losses import info_nce, sigmoid_loss

ROOT = Path(__file__).resolve().parents[1]
RESERVE = 15  # seconds kept for the plots
TIME_UP = 124  # exit code of tests that were stopped
# Relative error that is always accepted; above it, the error of the materialised form on the same numbers is the bound.
BOUND = {torch.bfloat16: 2e-3, torch.float32: 1e-5}
LATENCY_FORMS = ("fastclap Triton", "fastclap torch", "materialised, compiled", "materialised", "open_clip")

LOSSES: dict[str, Callable[..., Any]] = {
    "info_nce": info_nce,
    "sigmoid": functools.partial(sigmoid_loss, logit_bias=peers.SIGMOID_BIAS),
}


class Record:
    """record.json, rewritten whole at every addition; one process writes at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def update(self, **fields: Any) -> None:
        self.content |= fields
        self._write()

    def section(self, name: str, **fields: Any) -> None:
        self.content.setdefault("sections", {}).setdefault(name, {"rows": []}).update(fields)
        self._write()

    def add(self, section: str, row: Row) -> None:
        self.content["sections"][section]["rows"].append(row)
        self._write()
        print(f"[{section}] " + json.dumps(row), flush=True)

    def _write(self) -> None:
        write_atomic(self.path, (json.dumps(self.content, indent=1) + "\n").encode())


@dataclass
class Run:
    """What a section works with."""

    record: Record
    name: str
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    deadline: float  # of time.monotonic()

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def engine(self) -> str:
        return "triton" if self.device.type == "cuda" else "torch"

    def add(self, row: Row) -> None:
        self.record.add(self.name, row)

    def ceiling(self, what: str, unit: str) -> float | None:
        """What a large "matmul" or "copy" reached in this run."""
        rows = (row for section in self.record.content["sections"].values() for row in section["rows"])
        return next((float(row[unit]) for row in rows if row.get("what") == what), None)


@dataclass(frozen=True)
class Sizes:
    tests: tuple[str, str]  # of the loss' engine: path, keyword
    kernel_tests: tuple[tuple[str, str], ...]  # of the other kernels
    accuracy: tuple[tuple[int, int], ...]  # (N, D)
    matmul: int
    copy_bytes: int
    main: tuple[tuple[int, int], ...]
    more: tuple[tuple[int, int], ...]
    sigmoid: tuple[tuple[int, int], ...]
    stages: tuple[tuple[int, int], ...]
    largest: tuple[int, int]
    small: tuple[int, ...]
    small_dim: int
    case_seconds: float  # of the timed loop of one case
    warm_up_seconds: float  # the most one form may take to compile, tune and run once


GPU_SIZES = Sizes(
    tests=("tests/kernels/test_contrastive_triton.py", ""),
    kernel_tests=tuple(
        (f"tests/kernels/test_{name}.py", "")
        for name in ("layer_norm_gelu_triton", "waveform_triton", "toeplitz_attention_triton", "logmel_triton")
    ),
    accuracy=((1000, 512), (4096, 768), (16384, 768), (8191, 1024)),
    matmul=8192,
    copy_bytes=4 << 30,
    main=((65536, 768), (16384, 768), (4096, 768), (262144, 768)),
    more=((65536, 512), (65536, 1024), (16384, 512), (16384, 1024), (4096, 512), (4096, 1024)),
    sigmoid=((65536, 768), (16384, 768)),
    stages=((65536, 768), (65536, 512), (65536, 1024)),
    largest=(1 << 20, 768),
    small=(256, 1024, 4096),
    small_dim=768,
    case_seconds=6.0,
    warm_up_seconds=45.0,
)
CPU_SIZES = Sizes(
    tests=("tests/kernels/test_contrastive.py", "without_any_positive"),
    kernel_tests=(("tests/kernels/test_waveform.py", "meaning_of_each_argument"),),
    accuracy=((257, 48), (64, 32)),
    matmul=256,
    copy_bytes=1 << 20,
    main=((256, 48),),
    more=((128, 32),),
    sigmoid=((128, 32),),
    stages=((256, 64),),
    largest=(512, 32),
    small=(32, 64),
    small_dim=32,
    case_seconds=0.05,
    warm_up_seconds=20.0,
)


# ---------------------------------------------------------------------------------------------------------------------
# Sections
# ---------------------------------------------------------------------------------------------------------------------


def correctness(run: Run) -> None:
    """The engine's tests on this device, errors against float64, determinism."""
    run.add(_engine_tests(*run.sizes.tests, seconds=0.6 * run.left))
    for rows, dim in run.sizes.accuracy:
        for scale in (1.0, SCALE, 100.0):
            inputs = timing.embeddings(rows, dim, scale, run.device, run.dtype, seed=rows)
            for loss in LOSSES:
                case = {"rows": rows, "dim": dim, "scale": round(scale, 2), "loss": loss, "engine": run.engine}
                row, reason = timing.attempt(lambda: _accuracy(run, loss, inputs), run.left)  # noqa: B023
                run.add({"what": "error", **case, **(row or {"passed": False, "reason": reason})})
                same, reason = timing.attempt(lambda: _repeats_exactly(_engine(run, loss), inputs), run.left)  # noqa: B023
                run.add({"what": "two runs bit for bit", **case, "passed": same is True, "reason": reason})
    run.record.section(run.name, checked=True)


def kernel_tests(run: Run) -> None:
    """The tests of the kernels beside the loss, each file with an equal share of what is left."""
    files = run.sizes.kernel_tests
    for at, (path, keyword) in enumerate(files):
        row = _engine_tests(path, keyword, seconds=run.left / (len(files) - at))
        if row["exit_code"] == TIME_UP:  # says nothing about the kernel
            row["passed"] = None
        run.add(row)
    run.record.section(run.name, checked=True)


def _engine(run: Run, loss: str) -> peers.Loss:
    return functools.partial(LOSSES[loss], backend=run.engine)


def _accuracy(run: Run, loss: str, inputs: tuple[Tensor, Tensor, Tensor]) -> Row:
    expected = peers.reference(loss, *inputs)
    found = peers.errors(_engine(run, loss), expected, *inputs)
    naive = peers.errors(peers.MATERIALISED[loss], expected, *inputs)
    bound = BOUND[run.dtype]
    # A gradient that is missing, or NaN, fails.
    passed = all(error is not None and error <= max(bound, naive[name] or 0.0) for name, error in found.items())
    return {"passed": passed, "errors": found, "errors_of_materialised": naive, "bound": bound}


def _repeats_exactly(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> bool:
    def once() -> tuple[Tensor, ...]:
        value = loss(*inputs)
        return (value.detach(), *torch.autograd.grad(value, inputs))

    return all(torch.equal(x, y) for x, y in zip(once(), once(), strict=True))


def _engine_tests(path: str, keyword: str, seconds: float) -> Row:
    """Tests whose name or marker has the keyword, in pytest's own process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", keyword, path]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, seconds))
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = TIME_UP, (error.stdout or b"").decode(errors="replace")
    return {
        "what": "tests of the engine",
        "command": "python " + " ".join(command[1:]),
        "passed": code == 0,  # 5 where no test was collected
        "exit_code": code,
        "output": output.splitlines()[-12:],
    }


def ceilings(run: Run) -> None:
    """The rate of one large product and of one large copy, on random data."""
    n = run.sizes.matmul
    tflops, figures = matmul_rate(n, run.device, run.dtype, min(3.0, run.left))
    row = {"what": "matmul", "size": n, "dtype": dtype_name(run.dtype), "tflops": significant(tflops)}
    run.add({**row, **figures.as_dict()})
    gbytes, figures = copy_rate(run.sizes.copy_bytes, run.device, 2.0)
    run.add({"what": "copy", "gbytes_s": significant(gbytes), **figures.as_dict()})


def main_cases(run: Run) -> None:
    """Forward and backward of InfoNCE beside the peers, the sizes that matter most first."""
    for rows, dim in run.sizes.main:
        _compare(run, "info_nce", rows, dim)


def more_cases(run: Run) -> None:
    """The other sizes, as far as the time goes."""
    for rows, dim in run.sizes.more:
        _compare(run, "info_nce", rows, dim)


def sigmoid_cases(run: Run) -> None:
    """Forward and backward of SigLIP's loss beside the peers."""
    for rows, dim in run.sizes.sigmoid:
        _compare(run, "sigmoid", rows, dim)


def _compare(run: Run, loss: str, rows: int, dim: int) -> None:
    """One row a form: warmed up and checked alone, then all that run are timed in turn."""
    if run.left < 3:
        run.add({"loss": loss, "rows": rows, "dim": dim, "peer": None, "reason": "not reached: no time left"})
        return
    seconds = run.sizes.case_seconds
    case = Comparison(loss, rows, dim, run.device, run.dtype, run.sizes.warm_up_seconds, lambda: run.left)
    time_in_turn(
        *(case.results, case.calls, case.first_ms, run.device, seconds, run.left),
        lambda ms: rates(rows, dim, ms, run.ceiling("matmul", "tflops")),
    )
    for row in case.results.values():
        run.add(row)


def stages(run: Run) -> None:
    """Where the time of a step goes, by kernel, beside the floor of each stage; then the products by themselves."""
    names = ("fastclap Triton", "fastclap Triton, 4 passes") if run.device.type == "cuda" else ("fastclap torch",)
    for rows, dim in run.sizes.stages:
        inputs = timing.larger_than_cache(rows, dim, SCALE, run.device, run.dtype)
        one_pass = 2e-9 * rows**2 * dim / (run.ceiling("matmul", "tflops") or math.inf)  # ms
        for form in peers.info_nce_peers(run.device, SCALE):
            if form.name in names and form.run is not None:
                case = {"rows": rows, "dim": dim, "peer": form.name}
                call = timing.forward_backward(form.run, inputs)
                step, reason = timing.attempt(lambda: _step(call, run.device), run.left)  # noqa: B023
                kernels: dict[str, float] | None = None
                if step is not None:
                    kernels, reason = timing.attempt(lambda: _kernels(call, run.device), run.left)  # noqa: B023
                if step is None or kernels is None:
                    run.add({**case, "stage": "whole step", **(step.as_dict() if step else {}), "reason": reason})
                    continue
                for row in _by_stage(kernels, step):
                    passes = row.pop("passes", None)
                    if passes:
                        row["floor_ms"] = significant(passes * one_pass)
                    elif row["stage"] == "convert":  # reads and writes one 16-bit number a pair
                        row["floor_ms"] = significant(4e-6 * rows**2 / (run.ceiling("copy", "gbytes_s") or math.inf))
                    run.add({**case, **row})
        chunk = _chunk_rows(run.device, rows, dim)
        measured, reason = timing.attempt(lambda: _products(run, chunk, rows, dim), run.left)  # noqa: B023
        case = {"rows": rows, "dim": dim, "peer": "torch.mm", "chunk_rows": chunk}
        for name, timed in (measured or {}).items():
            run.add({**case, "stage": name, **timed.as_dict(), "floor_ms": significant(one_pass * chunk / rows)})
        if measured is None:
            run.add({**case, "stage": "P3, P4", "reason": reason})
        timing.release()


def _by_stage(by_kernel: dict[str, float], step: timing.Timing) -> list[Row]:
    """Rows for the whole step, for each stage and for the longest kernels; ``passes`` of those that multiply."""
    grouped: dict[str, float] = {}
    for kernel, milliseconds in by_kernel.items():
        grouped[_stage(kernel)] = grouped.get(_stage(kernel), 0.0) + milliseconds
    passes = {"sums": 1, "gradient": 1, "products": 2}
    stored = "convert" in grouped
    rows: list[Row] = [{"stage": "whole step", **step.as_dict(), "passes": 3 if stored else 4}]
    for stage, milliseconds in sorted(grouped.items(), key=lambda item: -item[1]):
        rows.append({"stage": stage, "kernel_ms": significant(milliseconds), "passes": passes.get(stage)})
    longest = sorted(by_kernel.items(), key=lambda item: -item[1])[:12]
    return [*rows, {"stage": "kernels", "kernels_ms": {name[:120]: significant(ms) for name, ms in longest}}]


def _step(call: Callable[[], object], device: torch.device) -> timing.Timing:
    for _ in range(2):
        call()
    return timing.interleaved({"step": call}, device, 3.0, most=20)["step"]


def _kernels(call: Callable[[], object], device: torch.device, steps: int = 3) -> dict[str, float]:
    """Milliseconds a step by kernel name (by operator on a CPU)."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU):
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            if microseconds > 0:
                times[event.key] = times.get(event.key, 0.0) + microseconds / 1e3 / steps
    if not times:
        raise RuntimeError("the profiler saw no kernel")
    return times


def _stage(kernel: str) -> str:
    name = kernel.lower()
    for stage in ("sums", "gradient", "convert", "sigmoid"):
        if f"_{stage}_kernel" in name:
            return stage
    if any(part in name for part in ("gemm", "nvjet", "cutlass", "xmma", "aten::mm", "aten::addmm")):
        return "products"
    return "other"


def _chunk_rows(device: torch.device, rows: int, dim: int) -> int:
    """As many as the engine takes at a time."""
    if device.type != "cuda":
        return max(1, rows // 4)
    from fastclap.kernels.contrastive_triton import chunk_rows

    properties = torch.cuda.get_device_properties(device)
    return min(rows, chunk_rows(10 * properties.major + properties.minor, properties.multi_processor_count, dim))


def _products(run: Run, chunk: int, rows: int, dim: int) -> dict[str, timing.Timing]:
    """dA = G·B and dB += Gᵀ·A of one chunk as the library multiplies them, into float32."""
    sets = []
    for _ in range(2):
        g = torch.randn(chunk, rows, device=run.device, dtype=run.dtype)
        a, b = (torch.randn(n, dim, device=run.device, dtype=run.dtype) for n in (chunk, rows))
        sets.append((g, a, b))
    turn = {"P3 G·B": 0, "P4 Gᵀ·A": 0}

    def product(name: str) -> Tensor:
        turn[name] += 1
        g, a, b = sets[turn[name] % len(sets)]
        left, right = (g, b) if name.startswith("P3") else (g.t(), a)
        return torch.mm(left, right, out_dtype=torch.float32) if run.device.type == "cuda" else torch.mm(left, right)

    calls = {name: (lambda name=name: product(name)) for name in turn}
    for call in calls.values():
        call()
    return timing.interleaved(calls, run.device, 2.0, most=50)


def largest(run: Run) -> None:
    """One step at the largest batch: does it fit, and how long does it take."""
    rows, dim = run.sizes.largest
    small = timing.embeddings(min(rows, 16384), dim, SCALE, run.device, run.dtype)
    step = {"rows": rows, "dim": dim, "dtype": dtype_name(run.dtype), "engine": run.engine}
    result, reason = timing.attempt(lambda: _one_step(run, small, rows, dim), run.left)
    if result is None:
        run.add({**step, "reason": reason})
        return
    milliseconds, peak, loss = result
    row = {**step, **timing.Timing.of([milliseconds]).as_dict(), "peak_bytes": peak, "loss_value": loss}
    run.add({**row, **rates(rows, dim, milliseconds, run.ceiling("matmul", "tflops"))})


def _one_step(run: Run, small: tuple[Tensor, Tensor, Tensor], rows: int, dim: int) -> tuple[float, int | None, float]:
    loss = _engine(run, "info_nce")
    timing.forward_backward(loss, [small])()
    inputs = timing.embeddings(rows, dim, SCALE, run.device, run.dtype)
    call = timing.forward_backward(loss, [inputs])
    values: list[float] = []

    def timed() -> None:
        def step() -> None:
            values.append(call().item())

        values.append(timing.elapsed_ms(step, run.device))

    peak = timing.peak_bytes(timed, run.device)
    value, milliseconds = values
    if not math.isfinite(value) or not all(t.grad is not None and bool(t.grad.isfinite().all()) for t in inputs):
        raise ArithmeticError("the loss or a gradient is not finite")
    return milliseconds, peak, value


def latency(run: Run) -> None:
    """Small batches, where launches count: eager calls, then replays of a captured CUDA graph.

    Graphs come last, as a form that cannot be captured may leave the process in disorder.
    """
    dim = run.sizes.small_dim
    for mode in ("eager", "graph"):
        for rows in run.sizes.small:
            case = {"rows": rows, "dim": dim, "dtype": dtype_name(run.dtype), "mode": mode}
            if run.device.type == "cuda":
                torch.compiler.reset()
            inputs = timing.embeddings(rows, dim, SCALE, run.device, run.dtype)
            calls: dict[str, Callable[[], object]] = {}
            for form in peers.info_nce_peers(run.device, SCALE):
                if form.run is None or form.name not in LATENCY_FORMS:
                    continue
                call = timing.forward_backward(form.run, [inputs])
                prepare = functools.partial(timing.warmed_up if mode == "eager" else timing.captured, call, run.device)
                ready, reason = timing.attempt(prepare, min(run.sizes.warm_up_seconds, max(1.0, run.left)))
                if ready is None:
                    run.add({**case, "peer": form.name, "reason": reason})
                else:
                    calls[form.name] = ready
            seconds = min(run.sizes.case_seconds / 4, max(0.1, run.left))
            for name, figures in timing.interleaved(calls, run.device, seconds, least=10, most=200).items():
                run.add({**case, "peer": name, **figures.as_dict()})


SECTIONS: dict[str, tuple[Callable[[Run], None], float]] = {  # with the seconds each may take in a run of all
    "correctness": (correctness, 90),
    "ceilings": (ceilings, 15),
    "main": (main_cases, 120),
    "log_mel": (kernel_sections.log_mel_section, 90),
    "attention": (kernel_sections.attention_section, 65),
    "layer_norm_gelu": (kernel_sections.layer_norm_gelu_section, 25),
    "normalize_waveform": (kernel_sections.normalize_waveform_section, 25),
    "stages": (stages, 30),
    "largest": (largest, 30),
    "latency": (latency, 30),
    "sigmoid": (sigmoid_cases, 25),
    "more": (more_cases, 600),
    "kernel_tests": (kernel_tests, 600),
}
# Sections that check what they, and those that follow them, measure.
CHECKED = ("correctness", "log_mel", "attention", "layer_norm_gelu", "normalize_waveform", "kernel_tests")
GRACE = 10  # seconds past its time after which a section is killed


# ---------------------------------------------------------------------------------------------------------------------
# The run as a whole
# ---------------------------------------------------------------------------------------------------------------------


def _commit() -> str | None:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    head = git("rev-parse", "HEAD")
    return f"{head}, with changes" if head and git("status", "--porcelain", "--untracked-files=no") else head


def _software() -> Row:
    versions: Row = {"python": platform.python_version(), "torch": torch.__version__, "fastclap": fastclap.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    return versions


def _child(path: Path, name: str, dry_run: bool, seconds: float) -> None:
    """One section, in a process group of its own."""
    os.setsid()
    record = Record(path)
    device = torch.device("cpu" if dry_run else "cuda")
    if "machine" not in record.content:
        record.update(machine=timing.machine(device))
    run = Run(
        record=record,
        name=name,
        device=device,
        dtype=torch.float32 if dry_run else torch.bfloat16,
        sizes=CPU_SIZES if dry_run else GPU_SIZES,
        deadline=time.monotonic() + seconds,
    )
    try:
        SECTIONS[name][0](run)
        record.section(name, status="done")
    except Exception as error:
        traceback.print_exc()
        record.section(name, status=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise SystemExit(1) from error


def _run_section(path: Path, name: str, dry_run: bool, seconds: float) -> None:
    Record(path).section(name, status="running", budget_s=round(seconds, 1))
    start = time.monotonic()
    # A fork needs no second import of torch; this process itself never touches the GPU.
    process = multiprocessing.get_context("fork").Process(target=_child, args=(path, name, dry_run, seconds))
    process.start()
    status = None
    try:
        process.join(seconds + GRACE)
    finally:
        if process.is_alive():
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            status = "killed: past its time"
    record = Record(path)
    if record.content["sections"][name]["status"] == "running":
        record.section(name, status=status or f"died: exit code {process.exitcode}")
    record.section(name, seconds=round(time.monotonic() - start, 1))


def _passed(section: dict[str, Any]) -> bool:
    """Whether all checks of a section were made and none failed."""
    return section.get("checked") is True and all(row.get("passed") is not False for row in section["rows"])


def _not_reached(section: dict[str, Any]) -> bool:
    return section["status"].startswith("not reached")


def run_all(out: Path, seconds: float, dry_run: bool, only: Sequence[str]) -> dict[str, Any]:
    """Runs the sections in order and returns the record."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "record.json"
    path.unlink(missing_ok=True)
    start = time.monotonic()
    Record(path).update(
        what="kernels: correctness and speed",
        hardware="CPU (dry run: tiny sizes, wall clock; says nothing about speed)" if dry_run else "GPU",
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=" ".join(["python -m bench.gpu_evidence", *sys.argv[1:]]),
        commit=_commit(),
        software=_software(),
        budget_s=seconds,
    )
    share = max(1.0, (seconds - RESERVE) / sum(SECTIONS[name][1] for name in only))  # few sections: more time for each
    for name in only:
        left = seconds - RESERVE - (time.monotonic() - start)
        if left < 5:
            Record(path).section(name, status="not reached: no time left")
            continue
        _run_section(path, name, dry_run, min(share * SECTIONS[name][1], left - 1))
    record = Record(path)
    sections = record.content["sections"]
    # The figures of the loss rest on "correctness"; a run of all may have no time for "kernel_tests".
    needed = dict.fromkeys(name if name in CHECKED else "correctness" for name in only if name != "ceilings")
    reached = [name for name in needed if name != "kernel_tests" or not _not_reached(sections[name])]
    checks = {name: name in only and _passed(sections[name]) for name in reached}
    correct = bool(checks) and all(checks.values())
    record.update(correct=correct, checks=checks, left_s=round(seconds - (time.monotonic() - start), 1))
    from bench.tables import plots

    for file, draw in plots(record.content):
        draw(out / file)
    return record.content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives record.json and the plots")
    parser.add_argument("--seconds", type=float, default=560, help="of the whole run")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: tests this script")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    args = parser.parse_args()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asks for the GPU without a context, so a fork works
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run runs the same code at tiny sizes on the CPU")
    # Peers may leave large files in the compilers' caches: theirs go with the run.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        record = run_all(args.out, args.seconds, args.dry_run, args.only)
    from bench.tables import tables

    print(tables(record))
    return 0 if record["correct"] else 1


if __name__ == "__main__":
    sys.exit(main())
