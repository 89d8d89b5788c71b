"""What a lot works with, and the process that watches over it.

A lot is a row of stages, functions of a `Run`, each in a process of its own, which alone touches the GPU. A stage works
case by case with `Run.attempt`, which puts the reason on the disk where a case comes to no result. The watching process
learns from a page of shared memory what a stage is working on and until when; a stage that hangs past that, is killed
or crashes leaves a row with that reason, and starts anew behind that case. So no form can take another one's figures
along, whatever it does to its process or to the GPU's context.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import mmap
import multiprocessing
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import timing
from bench.gpu.record import NOT_REACHED, Case, Record, Row

GRACE = 5.0  # seconds past its limit after which a case is killed
PR_SET_PDEATHSIG = 1  # of prctl(2)
CONTEXT_SECONDS = 10.0  # for what is still running on the GPU after an error
CONTEXT_LOST = 77  # exit code of a stage whose GPU context an error took along; the case has its row

UNSAID = ("case", "run", "notes", "errors", "package", "version", "scale_gradient", "passes")  # on the terminal


@dataclass(frozen=True)
class Settings:
    """Of all lots of a call.

    Attributes:
        device: "cuda", or "cpu" for a dry run: the same code at tiny sizes, in float32, which says nothing about speed.
        reference: a checkout of ParaSpeechCLAP.
        open_clip: a checkout of open_clip with CLAP.
    """

    device: str
    reference: Path | None = None
    open_clip: Path | None = None


class Page:
    """Memory that a process shares with those it forks: the case that is worked on, and until when it may take."""

    SIZE = 1 << 16

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self.SIZE)
        self.set(None, 0.0)

    def set(self, case: Case | None, until: float) -> None:
        text = json.dumps(case).encode()[: self.SIZE - 12]
        self._memory[8:12] = struct.pack("I", len(text))
        self._memory[12 : 12 + len(text)] = text
        self._memory[:8] = struct.pack("d", until)

    @property
    def until(self) -> float:
        """Of time.monotonic(); 0 between cases."""
        return struct.unpack("d", self._memory[:8])[0]

    @property
    def case(self) -> Case | None:
        (length,) = struct.unpack("I", self._memory[8:12])
        return json.loads(self._memory[12 : 12 + length])


class Run:
    """What a stage works with.

    Attributes:
        record: of the lot; see `add`.
        device: that everything runs on.
        tiny: whether this is a dry run.
        dtype: of the embeddings and activations that are measured: bfloat16, in a dry run float32.
        engine: what a kernel's ``backend`` should be for the engine that is measured: "triton", in a dry run "auto".
    """

    def __init__(self, record: Record, settings: Settings, page: Page, deadline: float) -> None:
        self.record, self.settings, self._page, self._deadline = record, settings, page, deadline
        self.device = torch.device(settings.device)
        self.tiny = self.device.type == "cpu"
        self.dtype = torch.float32 if self.tiny else torch.bfloat16
        self.engine = "auto" if self.tiny else "triton"

    @property
    def left(self) -> float:
        """Seconds until the lot's time is up."""
        return self._deadline - time.monotonic()

    def add(self, case: Case, **figures: Any) -> Row:
        """A row on the disk, and a line of it on the terminal. ``case`` tells it from all others of the lot."""
        row = self.record.add(case, **figures)
        print(f"[{self.record.content['lot']}] {describe(row)}", flush=True)
        return row

    def known(self, case: Case) -> Row | None:
        """This run's row of the case, from before the stage was started anew."""
        return self.record.row(case)

    def failed(self, case: Case) -> bool:
        """Whether the case came to no result in this run already."""
        row = self.known(case)
        return row is not None and "reason" in row

    def attempt(self, case: Case, call: Callable[[], Any], seconds: float) -> Any:
        """The result of a call; or None, with a row that says why: what it raised, or that it took too long.

        Args:
            case: what the row would be of.
            call: what to do. A hang that Python cannot interrupt ends the process, and the stage starts anew.
            seconds: the most it may take.
        """
        if self.failed(case):
            return None
        result, reason = self.result(case, call, seconds)
        if reason is not None:
            self.add(case, reason=reason)
        return result

    def result(self, case: Case, call: Callable[[], Any], seconds: float) -> tuple[Any, str | None]:
        """The result of a call, or None and why there is none; for what is no reason to give the case up.

        An error that takes the GPU's context along ends the process, with a row for the case; the stage starts anew.
        """
        seconds = min(seconds, self.left)
        if seconds <= 0:
            return None, f"{NOT_REACHED}: no time left"
        with self.watched(case, seconds):
            result, reason = timing.attempt(call, seconds)
            if reason is not None:
                self.end_if_lost(case, reason)
        if reason is not None and self.left <= 0:
            reason = f"{NOT_REACHED}: the lot's time was up"
        return result, reason

    def end_if_lost(self, case: Case, reason: str) -> None:
        """Within `watched`, after an error: ends the process, with a row for the case, if the GPU's context is gone."""
        self.at(case, CONTEXT_SECONDS)  # a kernel that never ends would hold up whoever asks
        if not self._context_lives():
            self.add(case, reason=reason)
            sys.stdout.flush()
            os._exit(CONTEXT_LOST)

    def _context_lives(self) -> bool:
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except Exception:  # of any kind: nothing works on this GPU in this process any more
                return False
        return True

    def at(self, case: Case, seconds: float) -> None:
        """Within `watched`: from now on it is this case's doing."""
        self._page.set(case, time.monotonic() + seconds)

    @contextlib.contextmanager
    def watched(self, case: Case, seconds: float) -> Iterator[None]:
        """Whatever happens to the process in here is the case's doing, and it may take so many seconds."""
        before = (self._page.case, self._page.until)
        self._page.set(case, time.monotonic() + seconds)
        try:
            yield
        finally:
            self._page.set(*before)


def describe(row: Row) -> str:
    """A row in one line."""
    case = ", ".join(str(value) for value in row["case"].values())
    if "reason" in row:
        return f"{case}: {row['reason']}"
    figures = {name: value for name, value in row.items() if name not in UNSAID and value is not None}
    if "median_ms" in figures:
        ms = f"{figures.pop('median_ms'):.4g} ms ({figures.pop('p10_ms'):.4g}-{figures.pop('p90_ms'):.4g})"
        return f"{case}: {ms}, {short(figures)}"
    return f"{case}: {short(figures)}"


def short(figures: dict[str, Any]) -> str:
    return json.dumps(figures, default=str)[:300]


# ---------------------------------------------------------------------------------------------------------------------
# the watching process


def run_stages(record: Record, stages: tuple[str, ...], settings: Settings, deadline: float) -> str:
    """Runs the stages ("module:function") of a lot one after the other until the deadline of time.monotonic().

    Returns:
        "done", or that the time was up.
    """
    for stage in stages:
        with contextlib.suppress(Exception):  # once for all processes; what it raises, the stage itself will say
            importlib.import_module(stage.split(":")[0])
        while True:
            if time.monotonic() > deadline:
                return f"cut off: no time for {stage}"
            page = Page()
            process = multiprocessing.get_context("fork").Process(
                target=_worker, args=(record.path, stage, settings, page, deadline)
            )
            process.start()
            reason = _watch(process, page, deadline)
            record.reload()
            if process.exitcode == CONTEXT_LOST:
                continue
            if reason is None:
                break
            case = page.case
            over = time.monotonic() > deadline
            if over:
                reason = f"{NOT_REACHED}: the lot's time was up"
            again = case is not None and not any(row["case"] == case and "reason" in row for row in record.rows())
            case = {"stage": stage} if case is None else case
            print(f"[{record.content['lot']}] {describe(record.add(case, reason=reason))}", flush=True)
            if over:
                return "cut off: the time was up"
            if not again:  # it died between cases, or the same case a second time
                break
    return "done"


def _watch(process: multiprocessing.process.BaseProcess, page: Page, deadline: float) -> str | None:
    """Waits for a stage to end. Returns why it did not end well, None if it did."""
    assert process.pid is not None
    reason = None
    try:
        while process.is_alive():
            process.join(0.05)
            now, until = time.monotonic(), page.until
            if now > (min(until, deadline) if until else deadline) + GRACE:
                reason = "killed: it hung past its time"
                break
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it started lives in its process group
            os.killpg(process.pid, signal.SIGKILL)
        if process.is_alive():  # it had none yet
            process.kill()
        process.join()
    if reason is None and process.exitcode:
        code = process.exitcode
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"
    return reason


def _worker(path: Path, stage: str, settings: Settings, page: Page, deadline: float) -> None:
    die_with_parent()
    os.setsid()
    module, function = stage.split(":")
    gc.freeze()  # what was imported so far is no garbage: collections between forms take no time then
    run = Run(Record(path), settings, page, deadline)
    try:
        getattr(importlib.import_module(module), function)(run)
    except Exception as error:
        traceback.print_exc()
        run.add({"stage": stage}, reason=timing.in_words(error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads that a peer left running must not hold up the next stage


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent ends, so that no stage outlives a killed run."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
