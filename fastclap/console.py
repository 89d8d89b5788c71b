"""What the commands show on a terminal and ask of the machine: progress on stderr, tables, the choice of the device.

Nothing heavy is imported before it is needed, because ``--help`` comes through here too.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fastclap.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

Advance = Callable[[int, int], None]
"""Is told how many units are done, and how many there are in all."""


@contextlib.contextmanager
def progress(doing: str, done: str, unit: str, show: bool = True) -> Iterator[Advance]:
    """A callable that is told the units done and in all: a bar on a terminal, else a line now and then, on stderr.

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


def pick_device(name: str) -> str:
    """``name``, or for "auto" a GPU if there is one.

    Raises:
        ConfigError: torch cannot use the device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name


def print_json(result: Any, *, lines: bool = False) -> None:
    """What ``--json`` puts on stdout; one of several results is a line each, seen at once."""
    print(json.dumps(result, indent=None if lines else 1, ensure_ascii=False), flush=lines)


def make_table(title: str, first: str) -> Table:
    """An empty table whose first column is called ``first``."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column(first)
    return table
