"""Threads that make results in order, a little ahead, and are watched.

A read of a hung network drive cannot be interrupted. So nobody here waits without looking: the wait for a result is
made of slices, between which a wish to stop is heeded and the helper that owes the result is looked at.
`fastclap.data.workers` has the same with processes. Nothing here imports torch.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from fastclap.errors import DataError

TIMEOUT = 120.0
"""Seconds without any progress after which a helper counts as stuck."""

ELSEWHERE = -1
"""What a helper is at when it is at no item."""

SLICE = 0.5
"""Seconds of a wait, after which it is looked around."""

S = TypeVar("S")
T = TypeVar("T")
Tasks = queue.SimpleQueue[Any]  # of (number, item); None ends a helper
Results = queue.SimpleQueue[tuple[int, Any, "BaseException | None"]]  # (number, result, error)


class LoaderStopped(Exception):
    """The wait for a batch was given up because `stopping` said so."""


def never() -> bool:
    """No wish to stop."""
    return False


def in_threads(
    function: Callable[[S], T],
    items: Iterable[S],
    threads: int,
    *,
    ahead: int,
    timeout: float = TIMEOUT,
    stopping: Callable[[], bool] = never,
    describe: Callable[[S], str] = str,
) -> Generator[T, None, None]:
    """What `function` makes of each item, in order; made in threads a little ahead of the caller.

    A thread that is stuck is left behind, and does not keep the process from ending.

    Args:
        function: may raise.
        items: taken as they are needed.
        threads: how many, at least one.
        ahead: items in all that are under way or waiting for the caller.
        timeout: seconds that the caller waits for one result.
        stopping: asked about twice a second while waiting.
        describe: an item, for the message.

    Raises:
        LoaderStopped: `stopping` said so.
        DataError: a thread is stuck.
        Exception: what `function` raised.
    """
    tasks: Tasks = queue.SimpleQueue()
    results: Results = queue.SimpleQueue()
    pause = min(SLICE, timeout / 2)
    under_way: dict[int, S] = {}
    ended = False
    silent, last = 0.0, ELSEWHERE

    def work() -> None:
        while (task := tasks.get()) is not None and not ended:
            number, item = task
            under_way[number] = item
            try:
                results.put((number, function(item), None))
            except BaseException as error:
                results.put((number, None, error))
            del under_way[number], task, item

    def watch(due: int) -> None:
        nonlocal silent, last
        silent, last = (silent + pause if due == last else 0.0), due
        if silent >= timeout:
            item = under_way.get(due)
            what = "a clip" if item is None else describe(item)
            raise DataError(f"{what}: could not be read within {timeout:g} s; see to its drive, and run it again")

    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    try:
        yield from in_order(items, ahead, tasks, results, watch, stopping, pause)
    finally:
        ended = True
        for _ in range(threads):
            tasks.put(None)


def in_order(
    items: Iterable[Any],
    ahead: int,
    tasks: Tasks,
    results: Results,
    watch: Callable[[int], None],
    stopping: Callable[[], bool],
    pause: float,
) -> Generator[Any, None, None]:
    """Hand out items as numbered tasks, at most `ahead` before the caller, and yield their results in order.

    Args:
        watch: called with the number of the result that is due, after each `pause` seconds without any result.
    """
    source = enumerate(items)
    done: dict[int, tuple[Any, BaseException | None]] = {}
    given = 0
    for due in itertools.count():
        for task in itertools.islice(source, due + ahead - given):
            tasks.put(task)
            given += 1
        if due == given:
            return
        begin = time.monotonic()
        while due not in done:
            try:
                number, result, error = results.get(timeout=pause)
            except queue.Empty:
                watch(due)
            else:
                if number == ELSEWHERE and error is not None:
                    raise error
                if number >= due:  # else made twice: by a process that was given up, and by the one in its place
                    done[number] = result, error
            if due not in done and time.monotonic() - begin >= pause and stopping():
                raise LoaderStopped("stopped while waiting for data")
        result, error = done.pop(due)
        if error is not None:
            raise error
        yield result
        del result
