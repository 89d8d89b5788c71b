"""What people see, and how a command ends: one door for text, tables, JSON, notes and progress, and `run_command`.

Whatever comes from data (a name, a caption, a path) is shown through this module: as it is where it can be shown, with
control characters and halves of characters as Python would write them, and never as markup. Notes and progress go to
stderr, and a stderr that is closed or full never ends what is being done.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, TextIO, cast
from unicodedata import category, east_asian_width

from fastclap.errors import DataError, FastclapError, TrainingError
from fastclap.memory import keep_freed_memory

_JOINERS = "\u200c\u200d"  # of Persian words, and of the parts of an emoji
_LONGEST = 60  # columns of a terminal that a name in a table may have
_LONGEST_LINE = 4000  # characters of a line of a message

STATUSES = """\
  0      done
  1      `fastclap doctor` found a problem
  2      a mistake in the arguments, the data or the model, or a file that cannot be written (a full disk)
  3      training stopped by itself; its message says why
  128+N  ended by signal N: 130 Ctrl-C, 141 the reader of the output went away (as in "| head"), 143 SIGTERM
"""
"""The exit statuses of both commands, for their help."""

Advance = Callable[[int, int], None]
"""Called with how many units are done, and how many there are in all."""


# ---------------------------------------------------------------------------------------------------------------------
# text


def printable(text: str) -> str:
    """Text for a line that is shown: control characters and halves of characters as Python would write them.

    A terminal takes an escape sequence in a file's name for a command, and no encoding has a lone surrogate, which is
    what Python makes of a name that is not UTF-8. Letters of every script, and spaces of every kind, stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _JOINERS or category(c) == "Zs" else repr(c)[1:-1] for c in text)


def shortened(text: str, longest: int = _LONGEST) -> str:
    """Text that takes at most `longest` columns of a terminal; an ellipsis stands for what is left out at its end."""
    columns = 0
    for place, character in enumerate(text):
        columns += 2 if east_asian_width(character) in "WF" else 1
        if columns > longest:
            return f"{text[: max(0, place - 1)]}…"
    return text


def json_text(value: Any, *, indent: int | None = None) -> str:
    """A value as JSON that every reader takes: UTF-8, no NaN (null), no half of a character (as `printable` has it).

    Args:
        value: of dicts, lists, strings, numbers, booleans and None; anything else as its text.
        indent: as `json.dumps` has it.

    Raises:
        DataError: it is nested too deeply.
    """
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=str)
        text.encode()
    except ValueError:  # NaN or infinity; a UnicodeEncodeError is one too
        text = json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    except RecursionError as error:
        raise DataError("what is to be written as JSON is nested too deeply") from error
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return str(value).encode("utf-8", "backslashreplace").decode()


# ---------------------------------------------------------------------------------------------------------------------
# what is written


Column = Literal["left", "right", "whole"]


@dataclass
class Table:
    """Rows of text under heads, to `show`. Nothing in it is taken for markup.

    A column is "left" (a name, cut short beyond 60 columns), "right" (a figure) or "whole" (folded, never cut).
    """

    title: str
    columns: Mapping[str, Column]
    rows: list[Sequence[Any]] = field(default_factory=list)


def show(*what: str | Table) -> None:
    """Lines and tables on stdout."""
    for thing in what:
        if isinstance(thing, Table):
            sys.stdout.write(_drawn(thing))
        else:
            print(printable(thing))


def _drawn(table: Table) -> str:
    from rich import box
    from rich import table as tables
    from rich.console import Console
    from rich.text import Text

    drawn = tables.Table(
        title=Text(shortened(printable(table.title), 100), "bold"), title_justify="left", box=box.SIMPLE_HEAD
    )
    for head, kind in table.columns.items():
        lines = (Text(shortened(printable(line))) for line in head.split("\n"))
        drawn.add_column(Text("\n").join(lines), justify="right" if kind == "right" else "left", overflow="fold")
    kinds = list(table.columns.values())
    for row in table.rows:
        texts = [printable(str(cell)) for cell in row]
        drawn.add_row(*(Text(t if kind == "whole" else shortened(t)) for t, kind in zip(texts, kinds, strict=True)))
    memory = _Memory(sys.stdout, vital=True)  # rich ends the process itself when the reader of the output has gone
    Console(file=cast(TextIO, memory)).print(drawn)
    return "".join(memory.text)


def show_json(value: Any, *, lines: bool = False) -> None:
    """A result on stdout as `--json` asks for; with `lines` as one line of several, to be seen at once."""
    text = json_text(value, indent=None if lines else 1)
    if "utf" not in (sys.stdout.encoding or "utf-8").lower():
        text = json.dumps(json.loads(text), indent=None if lines else 1)
    print(text, flush=lines)


def note(text: str, program: str = "fastclap") -> None:
    """A line for the user on stderr, or several; never fails."""
    lines = [shortened(printable(line), _LONGEST_LINE) for line in f"{program}: {text}".split("\n")]
    if sys.stderr is not None:  # print takes None for stdout
        with contextlib.suppress(OSError, ValueError):
            print("\n".join(lines), file=sys.stderr, flush=True)


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
    stream = _Stream(sys.stderr, vital=False)
    if stream.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(f"{doing} {unit}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(file=cast(TextIO, stream)), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda count, total: bar.update(task, completed=count, total=total)
        return
    last = time.monotonic()

    def advance(count: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10 or count == total:
            last = time.monotonic()
            print(f"{done} {count} of {total} {unit}", file=cast(TextIO, stream), flush=True)

    yield advance


# ---------------------------------------------------------------------------------------------------------------------
# how a command ends


class _Ended(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Stream:
    """stdout or stderr, of which a letter that the encoding lacks is escaped.

    Args:
        stream: what stands behind it; None: it was closed when the process began, and takes everything.
        vital: whether what cannot be written is an error; on stderr it is lost in silence.

    Attributes:
        lost: the last error, None where all could be written.
    """

    def __init__(self, stream: Any, vital: bool) -> None:
        self._stream = io.StringIO() if stream is None else stream
        self._closed = stream is None
        self._vital = vital
        self.lost: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return 0 if self._closed else cast(int, self._stream.write(text))
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: it was closed since
            self._failed(error)
        return 0

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.lost = error
        if self._vital:
            raise error

    def abandon(self) -> None:
        self.lost, self._closed = None, True
        abandon(self._stream)

    def settle(self) -> None:
        """Write what is still buffered; where that fails, nothing is left for Python to complain about at its end."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.lost = self.lost or error
        if self.lost:
            abandon(self._stream)


class _Memory(_Stream):
    """Keeps what is written to a stream that is asked for its terminal and encoding only."""

    def __init__(self, stream: Any, vital: bool) -> None:
        super().__init__(stream, vital)
        self.text: list[str] = []

    def write(self, text: str) -> int:
        self.text.append(text)
        return len(text)

    def flush(self) -> None:
        pass


def abandon(stream: Any) -> None:
    """Send all that is, and will be, written to a stream nowhere: its reader has gone, or its disk is full."""
    if isinstance(stream, _Stream):
        stream.abandon()
        return
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
        stream.flush()


def run_command(function: Callable[[], int | None], program: str = "fastclap") -> int:
    """Run what a command line asks for, and return its exit status; errors of the user become one line on stderr.

    The statuses are those of `STATUSES`. SIGTERM and SIGHUP become exceptions, so that what is to be kept is kept; a
    second one ends the process at once. `SystemExit` (of help and mistyped flags) is passed on. Both streams are left
    such that Python has nothing to flush, and so nothing to complain about, at its end.

    Args:
        function: does the work; what it returns is the status, None being 0. It may install handlers of signals itself.
        program: begins every message.
    """
    keep_freed_memory()
    _open_descriptors()
    out, err = _Stream(sys.stdout, vital=True), _Stream(sys.stderr, vital=False)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    stop: SystemExit | None = None
    status: int | None = None
    try:
        with _signals_raised():
            status = _status(function, program, out)
    except SystemExit as error:
        stop = error
    finally:
        out.settle()
        if out.lost is not None and status in (None, 0):
            stop, status = None, _lost_status(out.lost, program)
        err.settle()
        sys.stdout, sys.stderr = before
    if stop is not None:
        raise stop
    assert status is not None
    return status


def _status(function: Callable[[], int | None], program: str, out: _Stream) -> int:
    try:
        return function() or 0
    except FastclapError as error:
        note(str(error), program)
        return 3 if isinstance(error, TrainingError) else 2
    except KeyboardInterrupt as error:
        return 128 + getattr(error, "number", signal.SIGINT)
    except MemoryError:
        note("memory ran out; make batches or models smaller", program)
        return 2
    except (OSError, ValueError) as error:
        if error is out.lost:
            return 0  # which `run_command` turns into what it means
        if not isinstance(error, OSError):
            raise
        note(os_error_text(error), program)
        return 2
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):  # torch's
            note(f"memory ran out; make batches or models smaller ({str(error).splitlines()[0]})", program)
            return 2
        raise


def _lost_status(error: Exception, program: str) -> int:
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    note(f"standard output: cannot be written ({getattr(error, 'strerror', None) or error})", program)
    return 2


def os_error_text(error: OSError) -> str:
    """One line about an error of the operating system: the file that it happened to, and what it was."""
    name = error.filename2 or error.filename  # of a copy and of a renaming the second is what is written
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{printable(os.fsdecode(name) if isinstance(name, bytes) else str(name))}: {reason}" if name else reason


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an error of the operating system name the output that the user asked for.

    A full disk names no file, and what is written is first a hidden file or folder with the process's number in its
    name. Errors of other files, such as one that is copied to there and cannot be read, stay as they are.
    """
    try:
        yield
    except OSError as error:
        named = error.filename2 or error.filename
        if named is None or str(os.getpid()) in os.fsdecode(str(named)):
            error.filename, error.filename2 = os.fspath(path), None
        raise


@contextlib.contextmanager
def _signals_raised() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `_Ended` once, where they are not ignored or handled otherwise."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _Ended(number)

    wanted = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in wanted:
            signal.signal(number, end)
        yield
    finally:
        for number in wanted:
            signal.signal(number, signal.SIG_DFL)


def _open_descriptors() -> None:
    """The null device for a standard descriptor that is closed: else the next file that is opened would get its number,
    and whatever a library writes to "stderr"."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one


def version_line(program: str) -> str:
    """What `--version` prints: this program's version, and those of Python and torch."""
    import importlib.metadata
    import platform

    from fastclap import __version__

    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "missing"
    return f"{program} {__version__} (Python {platform.python_version()}, torch {torch})"
