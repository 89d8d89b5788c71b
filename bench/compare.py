"""Entries that are timed in turn, call by call, on the device's own clock; and the rates that they are judged by.

Each entry is built, warmed up and checked alone; then all that run are timed in turn, so that all see the same machine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench import timing
from bench.run import ABSENT, Case, Entry, Row, Run, dtype_name, significant

CEILING_SECONDS = 1.0
MATMUL, COPY_BYTES = 8192, 4 << 30


@dataclass
class Warm:
    """An entry that runs.

    Attributes:
        entry: that was warmed up.
        call: that is timed.
        alone_ms: of its second call.
        facts: what its row holds besides times.
    """

    entry: Entry
    call: Callable[[], Any]
    alone_ms: float
    facts: Row

    def add(self, run: Run, timed: timing.Timing, **more: Any) -> None:
        run.add(self.entry.case, **timed.as_dict(), **self.facts, **self.entry.work(timed.median_ms), **more)


def compare(run: Run, entries: Sequence[Entry], *, seconds: float) -> None:
    """One row an entry, on the disk from its warm-up on, with the time of its second call (`preliminary`).

    Args:
        run: of the stage.
        entries: those whose time matters most come first.
        seconds: of the timed loop.
    """
    if all(run.finished(entry.case) for entry in entries):
        return
    warm = warm_up(run, entries)
    # Where three rounds of one form would take half of the seconds of all, its one call so far has to do.
    quick = {form: found for form, found in warm.items() if 3e-3 * found.alone_ms <= seconds / 2}
    times: dict[str, timing.Timing] = {}
    while quick:
        times, broken, reason = _in_turn(run, quick, seconds)
        if broken is None:
            break
        warm[broken].facts["in_turn_reason"] = reason  # what it did alone stands; the others go again
        del quick[broken]
    for form, found in warm.items():
        found.add(run, times.get(form, timing.Timing.of([found.alone_ms])))
    del warm, quick
    timing.release()


def warm_up(run: Run, entries: Sequence[Entry]) -> dict[str, Warm]:
    """The entries that run, by form, each with a preliminary row; the others have a row with the reason."""
    if run.device.type == "cuda":  # where forms are compiled
        torch.compiler.reset()  # or the ninth shape silently runs eagerly
    timing.release()
    warm: dict[str, Warm] = {}
    for entry in entries:
        if entry.make is None:
            if not run.finished(entry.case):
                run.add(entry.case, reason=ABSENT, **entry.facts)
            continue
        found = run.attempt(entry.case, functools.partial(_second_call, entry.make, run.device), entry.seconds)
        if found is None:
            continue
        call, peak, milliseconds = found
        facts: Row = {"peak_bytes": peak, **entry.facts}
        if entry.errors is not None:
            errors, reason = run.result(entry.case, entry.errors, entry.seconds)
            facts |= {"errors_reason": reason} if reason else {"errors": errors}
        warm[entry.form] = Warm(entry, call, timing.Timing.of([milliseconds]).median_ms, facts)
        warm[entry.form].add(run, timing.Timing.of([milliseconds]), preliminary=True)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()  # forms differ in the sizes that they ask for
    return warm


def _second_call(
    make: Callable[[], Callable[[], Any]], device: torch.device
) -> tuple[Callable[[], Any], int | None, float]:
    """Builds, compiles and tunes; the call, its peak of memory and the time of its second run."""
    call = make()
    call()
    milliseconds: list[float] = []
    peak = timing.peak_bytes(lambda: milliseconds.append(timing.elapsed_ms(call, device)), device)
    return call, peak, milliseconds[0]


def _in_turn(
    run: Run, warm: Mapping[str, Warm], seconds: float
) -> tuple[dict[str, timing.Timing], str | None, str | None]:
    """(times by form, None, None), or ({}, the form that ended the loop, its reason)."""
    last = next(iter(warm))

    def announce(form: str) -> None:
        nonlocal last
        last = form
        run.blame(warm[form].entry.case, 2 * seconds + 20)

    calls = {form: found.call for form, found in warm.items()}
    with run.watched(warm[last].entry.case, 4 * seconds + 30):
        times, reason = timing.attempt(
            lambda: timing.interleaved(calls, run.device, min(seconds, max(0.1, run.left / 3)), announce=announce),
            max(5.0, run.left),
        )
        if reason is not None:
            run.end_if_lost(warm[last].entry.case, reason)
            return {}, last, reason
    return times, None, None


# ---------------------------------------------------------------------------------------------------------------------
# ceilings


def ceilings(run: Run) -> tuple[float | None, float | None]:
    """(TFLOP/s of one large product in the run's dtype, GB/s of one large copy), measured once a lot; None if not."""
    n, nbytes = (256, 1 << 20) if run.tiny else (MATMUL, COPY_BYTES)
    found: list[float | None] = []
    for what, size, unit, measure in (
        ("matmul", n, "tflops", lambda: matmul_rate(n, run.device, run.dtype, CEILING_SECONDS)),
        ("copy", nbytes, "gbytes_s", lambda: copy_rate(nbytes, run.device, CEILING_SECONDS)),
    ):
        case: Case = {"ceiling": what, "size": size, "dtype": dtype_name(run.dtype)}
        row = run.known(case)
        if row is None:
            measured = run.attempt(case, measure, 30.0)
            if measured is not None:
                rate, figures = measured
                row = run.add(case, **{unit: significant(rate)}, **figures.as_dict())
            timing.release()
        found.append(None if row is None else row.get(unit))
    return found[0], found[1]


def matmul_rate(n: int, device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[float, timing.Timing]:
    """TFLOP/s of one n×n×n product of random matrices."""
    sets = [[torch.randn(n, n, device=device).to(dtype) for _ in range(2)] for _ in range(2)]
    turn = 0

    def product() -> None:
        nonlocal turn
        turn += 1
        torch.mm(*sets[turn % 2])

    call = timing.warmed_up(product)
    figures = timing.interleaved({"matmul": call}, device, seconds, most=100)["matmul"]
    return 2 * n**3 / figures.median_ms / 1e9, figures


def copy_rate(nbytes: int, device: torch.device, seconds: float) -> tuple[float, timing.Timing]:
    """GB/s of one copy of random float32 numbers, read and written."""
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    figures = timing.interleaved({"copy": lambda: target.copy_(source)}, device, seconds, most=50)["copy"]
    return 2 * source.nbytes / figures.median_ms / 1e6, figures
