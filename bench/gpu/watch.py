"""The process that watches over the stages of a lot.

Each stage is a function of a `bench.run.Run`, in a process of its own, which alone touches the GPU. The watching
process reads in shared memory which case a stage is measuring and until when; a stage that hangs past that, is killed
or crashes leaves a row with that reason, and starts anew after that case. So no form can destroy the figures of
another, whatever it does to its process or to the GPU's context.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from bench import timing
from bench.run import CONTEXT_LOST, NOT_REACHED, Record, Run, Settings, SharedState, describe

GRACE = 5.0  # seconds past its limit after which a case is killed
PR_SET_PDEATHSIG = 1  # of prctl(2)


def run_stages(record: Record, stages: tuple[str, ...], settings: Settings, deadline: float) -> str:
    """Runs the stages ("module:function") of a lot one after the other until the deadline, by time.monotonic().

    Returns:
        "done", or that the time was up.
    """
    for stage in stages:
        with contextlib.suppress(Exception):  # once for all processes; what it raises, the stage itself will say
            importlib.import_module(stage.split(":")[0])
        while True:
            if time.monotonic() > deadline:
                return f"cut off: no time for {stage}"
            state = SharedState()
            process = multiprocessing.get_context("fork").Process(
                target=_run_stage, args=(record.path, stage, settings, deadline, state)
            )
            process.start()
            reason = _wait_for(process, state, deadline)
            record.reload()
            if process.exitcode == CONTEXT_LOST:
                continue
            if reason is None:
                break
            case = state.case
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


def _wait_for(process: multiprocessing.process.BaseProcess, state: SharedState, deadline: float) -> str | None:
    """Waits for a stage to end. Returns the reason where it did not end well, None where it did."""
    assert process.pid is not None
    reason = None
    try:
        while process.is_alive():
            process.join(0.05)
            now, until = time.monotonic(), state.until
            if now > (min(until, deadline) if until else deadline) + GRACE:
                reason = "killed: it hung past its time"
                break
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it started lives in its process group
            os.killpg(process.pid, signal.SIGKILL)
        if process.is_alive():  # it had no group yet
            process.kill()
        process.join()
    if reason is None and process.exitcode:
        code = process.exitcode
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"
    return reason


def _run_stage(path: Path, stage: str, settings: Settings, deadline: float, state: SharedState) -> None:
    die_with_parent()
    os.setsid()
    module, function = stage.split(":")
    gc.freeze()  # what was imported so far is no garbage: collections between forms take no time then
    run = Run(Record(path), settings, deadline, state)
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
