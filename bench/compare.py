"""Several forms of one computation in one case: what each needs, how far it is off, and their times in turn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import timing
from bench.comparison import copy_rate, dtype_name, matmul_rate, significant
from bench.gpu.record import ABSENT, Case, Row
from bench.gpu.run import Run
from bench.peers import Peer

CEILING_SECONDS = 1.0
MATMUL, COPY_BYTES = 8192, 4 << 30


@dataclass(frozen=True)
class Form:
    """One way to compute what a case asks for.

    Attributes:
        peer: its name, package and notes; ``peer.run`` is None where it cannot run here.
        make: returns the call that is timed; what it builds or compiles is part of the warm-up.
        errors: relative errors against float64 by name; None where the form computes something else.
        facts: that its row holds besides.
    """

    peer: Peer
    make: Callable[[], Callable[[], Any]]
    errors: Callable[[], Mapping[str, float | None]] | None = None
    facts: Row = field(default_factory=dict)


def compare(
    run: Run,
    case: Case,
    forms: Sequence[Form],
    *,
    seconds: float,
    warm_up_seconds: float,
    work: Callable[[float], Row] = lambda _: {},
) -> None:
    """One row a form: each is warmed up and checked alone, then all that run are timed in turn.

    A form's row is on the disk from its warm-up on, with the time of its second call (``preliminary``).

    Args:
        run: of the stage.
        case: what all forms share.
        forms: those whose time matters most come first.
        seconds: of the timed loop.
        warm_up_seconds: the most that one form may take to build, compile, tune and run twice.
        work: what a row says of its median in ms.
    """
    cases = {form.peer.name: {**case, "form": form.peer.name} for form in forms}
    if all(_finished(run, case) for case in cases.values()):
        return
    if run.device.type == "cuda":  # where forms are compiled
        torch.compiler.reset()  # or the ninth shape silently runs eagerly
    timing.release()
    calls: dict[str, Callable[[], Any]] = {}
    rows: dict[str, Row] = {}
    alone: dict[str, timing.Timing] = {}
    for form in forms:
        name, of = form.peer.name, cases[form.peer.name]
        facts = {"package": form.peer.package, "version": form.peer.version, "notes": form.peer.notes, **form.facts}
        if form.peer.run is None:
            if not _finished(run, of):
                run.add(of, reason=ABSENT, **facts)
            continue
        warm = run.attempt(of, functools.partial(_warm_up, form, run.device), warm_up_seconds)
        if warm is None:
            continue
        calls[name], peak, milliseconds = warm
        rows[name] = {"peak_bytes": peak, **facts}
        if form.errors is not None:
            errors, reason = run.result(of, form.errors, warm_up_seconds)
            rows[name] |= {"errors_reason": reason} if reason else {"errors": errors}
        alone[name] = timing.Timing.of([milliseconds])
        run.add(of, **alone[name].as_dict(), **rows[name], **work(milliseconds), preliminary=True)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()  # forms differ in the sizes that they ask for
    # Where three rounds of one form would take half of the seconds of all, its one call so far has to do.
    slow = {name for name in calls if 3e-3 * alone[name].median_ms > seconds / 2}
    quick = {name: call for name, call in calls.items() if name not in slow}
    figures: dict[str, timing.Timing] = {}
    while quick:
        figures, broken, reason = _in_turn(run, quick, cases, seconds)
        if broken is None:
            break
        rows[broken]["in_turn_reason"] = reason  # what it did alone stands; the others go again
        del quick[broken]
    for name in calls:
        timed = figures.get(name, alone[name])
        run.add(cases[name], **timed.as_dict(), **rows[name], **work(timed.median_ms))
    del calls
    timing.release()


def _finished(run: Run, case: Case) -> bool:
    row = run.known(case)
    return row is not None and not row.get("preliminary")


def _warm_up(form: Form, device: torch.device) -> tuple[Callable[[], Any], int | None, float]:
    """Builds, compiles and tunes; the call, the peak and the time of its second run."""
    call = form.make()
    call()
    milliseconds: list[float] = []
    peak = timing.peak_bytes(lambda: milliseconds.append(timing.elapsed_ms(call, device)), device)
    return call, peak, milliseconds[0]


def _in_turn(
    run: Run, calls: Mapping[str, Callable[[], Any]], cases: Mapping[str, Case], seconds: float
) -> tuple[dict[str, timing.Timing], str | None, str | None]:
    """(timings, None, None) of warmed-up calls, or ({}, the form that ended the loop, its reason)."""
    last = next(iter(calls))

    def announce(name: str) -> None:
        nonlocal last
        last = name
        run.at(cases[name], 2 * seconds + 20)

    with run.watched(cases[last], 4 * seconds + 30):
        found, reason = timing.attempt(
            lambda: timing.interleaved(calls, run.device, min(seconds, max(0.1, run.left / 3)), announce=announce),
            max(5.0, run.left),
        )
        if reason is not None:
            run.end_if_lost(cases[last], reason)
            return {}, last, reason
    return found, None, None


def ceilings(run: Run) -> tuple[float | None, float | None]:
    """(TFLOP/s of one large product in the run's dtype, GB/s of one large copy), measured once a lot; None if not."""
    n, nbytes = (256, 1 << 20) if run.tiny else (MATMUL, COPY_BYTES)
    found: list[float | None] = []
    for what, unit, measure in (
        ("matmul", "tflops", lambda: matmul_rate(n, run.device, run.dtype, CEILING_SECONDS)),
        ("copy", "gbytes_s", lambda: copy_rate(nbytes, run.device, CEILING_SECONDS)),
    ):
        case = {"ceiling": what, "size": n if what == "matmul" else nbytes, "dtype": dtype_name(run.dtype)}
        row = run.known(case)
        if row is None:
            measured = run.attempt(case, measure, 30.0)
            if measured is not None:
                rate, figures = measured
                row = run.add(case, **{unit: significant(rate)}, **figures.as_dict())
            timing.release()
        found.append(None if row is None else row.get(unit))
    return found[0], found[1]
