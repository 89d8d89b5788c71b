"""Helper processes: where they come from, how they begin, and what to say when one of them dies."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import TYPE_CHECKING, TypeVar

from fastclap.errors import DataError

if TYPE_CHECKING:
    from fastclap.data.rows import Row

_GRACE_SECONDS = 30

T = TypeVar("T")


def fork_server() -> BaseContext:
    """A context whose processes come from a server that has imported torch and this package and holds no CUDA state."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastclap.data.dataset"])
    return context


def start_worker(worker: int = 0) -> None:
    """Tie this helper process to its parent.

    It ends when the parent ends; torch watches the fork server instead, which survives a killed run. It survives a
    signal to the whole process group (Ctrl-C, a scheduler's SIGTERM), so that the parent can finish its step and save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_SECONDS))  # then SIGALRM ends it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a thread for each core in each process gains nothing

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def describe_deaths(ended: Iterable[tuple[int, int | None]]) -> str:
    """How helper processes ended, from their (process id, exit code) pairs, in words that explain the signal."""
    found = []
    for pid, code in ended:
        if code is None or code >= 0:
            found.append(f"process {pid} ended" + (f" with status {code}" if code is not None else ""))
            continue
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        meaning = {
            "SIGKILL": ", which is how the system ends processes when memory runs out",
            "SIGBUS": ", which is what a full /dev/shm (shared memory) or a shrinking file leads to",
            "SIGSEGV": ", a crash inside a decoder or another native library",
        }.get(name, "")
        found.append(f"process {pid} was ended by {name}{meaning}")
    return "; ".join(found) or "a process ended"


def map_rows(
    function: Callable[[Row], T], rows: Iterable[Row], workers: int, *, ahead: int, doing: str, goes_on: str
) -> Generator[T, None, None]:
    """What `function` makes of each row, in order; made in processes a little ahead of the caller.

    Args:
        function: picklable.
        rows: taken as they are needed.
        workers: processes; 0: everything is made in this one.
        ahead: rows a process that are under way or waiting for the caller.
        doing: what the processes are doing, such as "decoding", and
        goes_on: where the same command goes on, such as "from there"; both for the message of the error.

    Raises:
        DataError: a process died.
    """
    if not workers:
        yield from map(function, rows)
        return
    pool = ProcessPoolExecutor(workers, fork_server(), initializer=start_worker)
    pending: deque[tuple[Row, Future[T]]] = deque()
    try:
        for row in rows:
            pending.append((row, pool.submit(function, row)))
            if len(pending) == ahead * workers:
                yield pooled_result(pending[0][1], pool)
                pending.popleft()
        while pending:
            yield pooled_result(pending[0][1], pool)
            pending.popleft()
    except BrokenProcessPool as error:
        suspects = ", ".join(row.audio for row, _ in itertools.islice(pending, workers))
        raise DataError(
            f"a {doing} process died, most likely because memory ran out or a decoder crashed, at about {suspects}; "
            f"run the same command again, which goes on {goes_on}, with fewer --workers, or with --workers 0 to see "
            "which clip it is"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def pooled_result(future: Future[T], pool: ProcessPoolExecutor) -> T:
    """What a future gives.

    The pool notices a process that dies, unless that happens while it sends a result: then the pool reads on forever,
    as its own end of the pipe is open. So the processes are watched here too, and that end is closed.
    """
    while not wait([future], timeout=1).done:
        processes = list((pool._processes or {}).values())
        if any(process.exitcode is not None for process in processes):
            for process in processes:
                process.kill()
            pool._result_queue._writer.close()  # type: ignore[attr-defined]
    return future.result()
