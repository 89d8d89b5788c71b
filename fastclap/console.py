"""What people see: text that a terminal shows as it is, and progress, as a bar or a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from unicodedata import category

_JOINERS = "\u200c\u200d"  # of Persian words, and of the parts of an emoji

Advance = Callable[[int, int], None]
"""Called with how many units are done, and how many there are in all."""


def printable(text: str) -> str:
    """Text for a line that is shown: control characters and halves of characters as Python would write them.

    A terminal takes an escape sequence in a file's name for a command, and no encoding has a lone surrogate, which is
    what Python makes of a name that is not UTF-8. Letters of every script, and spaces of every kind, stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _JOINERS or category(c) == "Zs" else repr(c)[1:-1] for c in text)


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
