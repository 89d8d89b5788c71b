"""The project's own tests on the device: those of the kernels and of the training step, in parallel, a row a file.

pytest runs as a process of its own, which reports what happens through `bench.gpu.pytest_rows`; rows are on the disk a
second later, so a run that is cut off says how far it came, what had failed by then and what was running.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.gpu.lots import ROOT
from bench.gpu.pytest_rows import PIPE
from bench.gpu.watch import die_with_parent
from bench.run import Run

FILES = (  # those that compile longest first
    "tests/kernels/log_mel/test_gpu_engines.py",
    "tests/kernels/contrastive/test_triton_engine.py",
    "tests/kernels/test_toeplitz_attention_triton.py",
    "tests/kernels/test_shared_attention_triton.py",
    "tests/kernels/test_layer_norm_gelu_triton.py",
    "tests/kernels/test_residual_layer_norm_triton.py",
    "tests/kernels/test_waveform_triton.py",
    "tests/kernels/test_waveform_convolution_triton.py",
    "tests/kernels/test_feed_forward_triton.py",
    "tests/kernels/test_scaled_adam_triton.py",
    "tests/kernels/test_swoosh_triton.py",
    "tests/kernels/test_bias_norm_triton.py",
    "tests/kernels/test_gated_convolution_triton.py",
    "tests/kernels/test_resampling_triton.py",
    "tests/train/test_device.py",
)
ON_A_GPU = (*FILES, "-k", "not cpu")  # some tests run on both
DRY_RUN = ("tests/train/test_device.py", "-k", "test_gradients_of_a_step and cpu")
WORKERS = 12  # processes that share the GPU, on a machine of 16 cores
LONGEST = 150.0  # seconds of a test, its kernels' compilation included
RESERVE = 5.0  # seconds of the lot kept for ending in time
INTERVAL = 1.0  # seconds between two writings of the rows
MOST_FAILURES = 10  # of a file whose messages are kept
LAST_LINES = 40  # of pytest's output, shown where it did not end well


def device_tests(run: Run) -> None:
    """The stage of `bench.gpu.lots`: all of `FILES` on a GPU, one test of them in a dry run."""
    run_tests(run, DRY_RUN if run.tiny else ON_A_GPU, workers=0 if run.tiny else WORKERS)


@dataclass
class TestState:
    """What is known about one test."""

    outcome: str = "passed"
    seconds: float = 0.0
    message: str | None = None
    started: bool = False
    ended: bool = False

    def report(self, outcome: str, seconds: float, message: str | None) -> None:
        """Takes the outcome of one phase; the worst counts."""
        order = ("passed", "skipped", "failed")
        if order.index(outcome) > order.index(self.outcome):
            self.outcome, self.message = outcome, message
        self.seconds += seconds


@dataclass
class Results:
    """All tests of a run by their id, and what has changed since the last writing."""

    tests: dict[str, TestState] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    def take(self, event: dict[str, Any]) -> None:
        """An event of `bench.gpu.pytest_rows`."""
        if event["event"] == "collected":
            for name in event["tests"]:
                self._state_of(name)
            return
        test = self._state_of(event["test"])
        if event["event"] == "started":
            test.started = True
        elif event["event"] == "ended":
            test.ended = True
        else:
            test.report(event["outcome"], event["seconds"], event["message"])
            if "::" not in event["test"]:  # a file that could not be collected
                test.ended = True

    def _state_of(self, name: str) -> TestState:
        self.changed.add(file_of(name))
        return self.tests.setdefault(name, TestState())

    def figures(self, file: str | None = None) -> dict[str, Any]:
        """Figures of one file, or of all; `passed` if every test came to its end and none failed."""
        chosen = {name: test for name, test in self.tests.items() if file is None or file_of(name) == file}
        shown = name_of if file else str
        count = Counter(test.outcome for test in chosen.values() if test.ended)
        failed = [name for name, test in chosen.items() if test.outcome == "failed"]
        unfinished = [name for name, test in chosen.items() if not test.ended and test.outcome != "failed"]
        figures: dict[str, Any] = {f"{outcome}_tests": count[outcome] for outcome in ("passed", "skipped")}
        figures["failed_tests"] = len(failed)
        figures["unfinished_tests"] = len(unfinished)
        figures["passed"] = bool(chosen) and not failed and not unfinished
        figures["seconds"] = round(sum(test.seconds for test in chosen.values()), 1)
        figures["failures"] = [f"{shown(name)}: {self.tests[name].message}" for name in failed[:MOST_FAILURES]]
        if count["skipped"]:
            skips = Counter(str(test.message) for test in chosen.values() if test.outcome == "skipped")
            figures["skips"] = dict(skips.most_common(5))
        running = [name for name in unfinished if self.tests[name].started]
        if running:
            figures["running"] = [shown(name) for name in running]
        return figures

    def slowest(self, number: int = 10) -> dict[str, float]:
        """Seconds of the tests that took longest."""
        by_time = sorted(self.tests.items(), key=lambda item: -item[1].seconds)
        return {name: round(test.seconds, 1) for name, test in by_time[:number]}


def file_of(test: str) -> str:
    return test.partition("::")[0]


def name_of(test: str) -> str:
    """Its name in the file; of a file that could not be collected the file's."""
    return test.partition("::")[2] or test


def run_tests(run: Run, arguments: Sequence[str], *, workers: int, root: Path = ROOT) -> None:
    """Runs pytest and adds the rows.

    Args:
        run: of the lot, whose time ends the tests.
        arguments: files, and other arguments of pytest.
        workers: processes of pytest-xdist, where it is installed; 0 for none.
        root: the folder where pytest runs.
    """
    start, results = time.monotonic(), Results()
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            _command(arguments, workers),
            cwd=root,
            env=_environment(root, writing),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            preexec_fn=die_with_parent,
        )
        os.close(writing)
        with run.watched({"file": "all"}, run.left), os.fdopen(reading, "rb", buffering=0) as pipe:
            for event in _events(pipe, process, run):
                if event is None:
                    _write_rows(run, results)
                else:
                    results.take(event)
        code = process.poll()
        process.kill()  # if the time is up; its workers end with it
        process.wait()
        for file in sorted({file_of(name) for name in results.tests}):
            run.add({"file": file}, **results.figures(file))
        run.add(
            {"file": "all"},
            **results.figures(),
            exit_code=code,  # None: the time was up
            wall_seconds=round(time.monotonic() - start, 1),
            slowest=results.slowest(),
        )
        if code != 0:
            log.seek(0)
            print("\n".join(log.read().decode(errors="replace").splitlines()[-LAST_LINES:]), flush=True)


def _command(arguments: Sequence[str], workers: int) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu.pytest_rows", "-p", "no:cacheprovider", "-v", "-rf"]
    command += ["-m", "not slow", "--tb=short", "--continue-on-collection-errors", "-o", "faulthandler_timeout=60"]
    if workers and importlib.util.find_spec("xdist"):
        # Neighbours launch the same kernels, which one process should compile; one that is done helps the others.
        command += ["-n", str(workers), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        # By its own thread: a signal does not get through to a process that waits for the GPU.
        command += [f"--timeout={LONGEST:.0f}", "--timeout-method=thread"]
    return [*command, *arguments]


def _environment(root: Path, pipe: int) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST") and k != "TRITON_INTERPRET"}
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    paths = [str(ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        **environment,
        **one_thread,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        PIPE: str(pipe),
    }


def _events(pipe: IO[bytes], process: subprocess.Popen[bytes], run: Run) -> Iterator[dict[str, Any] | None]:
    """The events of a pytest process; None every `INTERVAL` seconds. Ends with it, or when the lot's time is up."""
    rest, written = b"", time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while run.left > RESERVE:
            if selector.select(timeout=0.2):
                data = pipe.read(1 << 16)
                if not data:  # the other end is closed
                    break
                *lines, rest = (rest + data).split(b"\n")
                yield from map(json.loads, lines)
            elif process.poll() is not None:
                break
            if time.monotonic() > written + INTERVAL:
                yield None
                written = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=max(0.0, run.left - RESERVE))


def _write_rows(run: Run, results: Results) -> None:
    """Writes the files' rows as they are by now, without printing them."""
    for file in sorted(results.changed):
        run.record.add({"file": file}, **results.figures(file))
    results.changed.clear()
