"""Progress on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Advance = Callable[[int, int], None]
"""Called with how many units are done, and how many there are in all."""


@contextlib.contextmanager
def progress(doing: str, done: str, unit: str, show: bool = True) -> Iterator[Advance]:
    """A function that shows the units done and in all: as a bar on a terminal, else as a line now and then.

    Args:
        doing, done: the verb, as in "packing" and "packed".
        unit: what is counted, as in "clips".
        show: False shows nothing.
    """
    if not show:
        yield lambda count, total: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(f"{doing} {unit}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda count, total: bar.update(task, completed=count, total=total)
        return
    last = time.monotonic()

    def advance(count: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10 or count == total:
            last = time.monotonic()
            print(f"{done} {count} of {total} {unit}", file=sys.stderr, flush=True)

    yield advance
