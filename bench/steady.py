"""Calls that a user makes many times in succession, such as training steps, timed as such, by the wall clock.

What a user sees of a step is its time among others: while the device works, the host is already preparing the next. So
a sample here is the mean of a block of consecutive calls, and forms take turns by the block. Before a form's block the
memory that the others have left to the allocator goes back to the device, and one call is not timed, so that forms of
different sizes fit one device and none pays for another.

A form's row is on the disk from its first block on, which is timed alone (`preliminary`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench import timing
from bench.run import Entry, Row, Run, significant

BLOCK_SECONDS = 1.0
MOST_CALLS = 50  # of a block
SLOW_MS = 700.0  # a call of this length is as good as a block, and alone enough for a preliminary row
MOST_ROUNDS = 20


class Steady:
    """Measures entries; what was made for one stays as long as this does.

    Args:
        run: of the stage.
        block_seconds: length of a block.
    """

    def __init__(self, run: Run, block_seconds: float = BLOCK_SECONDS) -> None:
        self.run = run
        self.block_seconds = block_seconds
        self._calls: dict[Entry, Callable[[], Any]] = {}
        self._rows: dict[Entry, Row] = {}  # what a row holds apart from times in turn
        self._alone_ms: dict[Entry, float] = {}

    def alone(self, entry: Entry) -> None:
        """Makes the form and times a block of it alone, for a preliminary row."""
        if not self.run.finished(entry.case):
            self._runs(entry)

    def in_turn(self, entries: Sequence[Entry], seconds: float, least: int = 3) -> None:
        """Takes blocks of the entries that run, one of each in turn, for about so many seconds, and completes rows.

        An entry whose row is complete takes part for the comparison alone; where all are complete nothing is done.

        Args:
            entries: those that do not run yet are made first.
            seconds: of the blocks; past three times as many it ends wherever it is, with what it has.
            least: rounds.
        """
        pending = [entry for entry in entries if not self.run.finished(entry.case) and self._runs(entry)]
        if not pending:
            return
        ready = [entry for entry in entries if entry in pending or self._runs(entry)]
        samples: dict[Entry, list[float]] = {entry: [] for entry in ready}
        start = time.monotonic()
        for rounds in range(MOST_ROUNDS):
            passed = time.monotonic() - start
            enough = rounds >= least and passed * (rounds + 1) / rounds > seconds
            if enough or (rounds and passed > 3 * seconds):
                break
            for entry in list(ready):
                block, reason = self.run.result(entry.case, lambda: self._block(entry), self._limit(entry))  # noqa: B023
                if reason is None:
                    samples[entry].append(block)
                else:  # what it did alone stands
                    self._rows[entry]["in_turn_reason"] = reason
                    ready.remove(entry)
        taken = {entry: timing.Timing.of(samples[entry]) for entry in entries if samples.get(entry)}
        for entry in pending:
            others = [other for other in entries if other is not entry and other in taken and entry in taken]
            row = self._rows[entry] | {"in_turn_with": [other.form for other in others]}
            known = {other.form: taken[other].median_ms for other in others if other not in pending}
            if known:  # their rows hold earlier times
                row["others_ms"] = known
            self._rows[entry] = row
            self._add(entry, taken.get(entry) or timing.Timing.of([self._alone_ms[entry]]))

    def _runs(self, entry: Entry) -> bool:
        """Whether the entry has a call to time; it is made where there is none yet."""
        if entry in self._calls:
            return True
        self._free_memory()
        found = self.run.attempt(entry.case, lambda: self._first_block(entry), entry.seconds)
        if found is None:
            return False
        self._calls[entry], self._rows[entry], self._alone_ms[entry] = found
        if not self.run.finished(entry.case):
            self._add(entry, timing.Timing.of([self._alone_ms[entry]]), preliminary=True)
        return True

    def _first_block(self, entry: Entry) -> tuple[Callable[[], Any], Row, float]:
        assert entry.make is not None
        device, start = self.run.device, time.perf_counter()
        call = entry.make()
        made = time.perf_counter() - start
        results: list[Any] = []
        milliseconds: list[float] = []

        def timed() -> None:
            results[:] = [call()]

        def once() -> None:
            milliseconds.append(timing.elapsed_ms(timed, device))

        once()  # compiles, tunes, makes the optimizer's state
        peak = timing.peak_bytes(once, device)
        row: Row = {"build_s": round(made, 2), "first_ms": significant(milliseconds[0]), "peak_bytes": peak}
        row |= {**entry.facts, **entry.outcome(results[0])}
        results.clear()
        alone = milliseconds[-1]
        if alone > SLOW_MS:
            return call, row, alone
        alone = timing.steady_ms(call, device, self._calls_of_a_block(alone))
        if device.type == "cuda":
            on_device, on_host = timing.queued_ms(call, device, 1.5 * timing.host_ms(call, device) + 0.2)
            row |= {"device_ms": significant(on_device), "host_ms": significant(on_host)}
        return call, row, alone

    def _block(self, entry: Entry) -> float:
        self._free_memory()
        call = self._calls[entry]
        call()
        calls = self._calls_of_a_block(self._alone_ms[entry])
        return timing.steady_ms(call, self.run.device, calls)

    def _calls_of_a_block(self, ms: float) -> int:
        return min(MOST_CALLS, max(1, math.ceil(1e3 * self.block_seconds / ms)))

    def _limit(self, entry: Entry) -> float:
        """Seconds after which a block must have hung."""
        ms = self._alone_ms[entry]
        return 20.0 + 5e-3 * ms * (1 + self._calls_of_a_block(ms))

    def _free_memory(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
            torch.cuda.empty_cache()

    def _add(self, entry: Entry, timed: timing.Timing, **more: Any) -> None:
        block = {"block_calls": self._calls_of_a_block(self._alone_ms[entry])}
        self.run.add(entry.case, **timed.as_dict(), **block, **entry.work(timed.median_ms), **self._rows[entry], **more)
