"""Stages for the tests of `bench.gpu`: forms that come to every kind of end."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

from bench.run import Run


def counting(run: Run) -> None:
    """A row every few milliseconds, each noted in a file once it is on the disk; never ends by itself."""
    told = Path(os.environ["FASTCLAP_TEST_TOLD"])
    with told.open("a", encoding="utf-8") as file:
        file.write(f"pid {os.getpid()}\n")
        file.flush()
        start = len(run.record.content["rows"])
        for number in itertools.count(start):
            run.record.add({"form": number}, figure=number**2)
            file.write(f"{number}\n")
            file.flush()
            time.sleep(0.002)


def all_kinds_of_ends(run: Run) -> None:
    for form, limit in (
        *(("good", 5.0), ("raises", 5.0), ("hangs", 0.2), ("hangs for good", 0.2), ("asks for too much memory", 5.0)),
        *(("is killed", 5.0), ("exits", 5.0), ("good too", 5.0)),
    ):
        case = {"form": form}
        if run.known(case):
            continue
        found = run.attempt(case, lambda form=form: _end(form), limit)  # type: ignore[misc]
        if found is not None:
            run.add(case, figure=found)


def _end(form: str) -> int:
    if form == "raises":
        raise RuntimeError("no such\n case")
    if form == "hangs":
        time.sleep(60)
    if form == "hangs for good":  # as a call that never comes back to Python
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(60)
    if form == "asks for too much memory":
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (1 << 33, hard))
        try:
            return len(bytearray(1 << 40))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    if form == "is killed":  # as the system does where memory runs out
        os.kill(os.getpid(), signal.SIGKILL)
    if form == "exits":
        os._exit(3)
    return 1


def loses_the_gpu(run: Run) -> None:
    """After the first error the GPU's context is gone; after the second a kernel runs on for ever."""
    answers: dict[str, Callable[[], bool]] = {"loses": lambda: False, "holds up": lambda: time.sleep(60) is None}
    for form in ("loses", "holds up", "good"):
        case = {"form": form}
        if run.known(case) is None:
            run._context_lives = answers.get(form, lambda: True)  # type: ignore[method-assign]
            found = run.attempt(case, lambda form=form: _end("raises" if form in answers else form), 5.0)  # type: ignore[misc]
            if found is not None:
                run.add(case, figure=found)


def dies_between_cases(run: Run) -> None:
    run.add({"form": "before"}, figure=1)
    os._exit(4)


def raises_outside_of_a_case(run: Run) -> None:
    raise RuntimeError("a mistake of the stage's own")


def slow_and_steady(run: Run) -> None:
    for number in range(1000):
        case = {"form": number}
        if run.attempt(case, lambda: time.sleep(0.05) or 1, 5.0) is None:
            return
        run.add(case, figure=1)


def one_row(run: Run) -> None:
    run.add({"form": "only"}, figure=1)
