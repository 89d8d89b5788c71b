"""Helper processes: results in order, made a little ahead, by processes that are watched (`fastclap.threads`).

A process may be stopped, or be killed when memory runs out. Each has a pipe of its own, served by a thread of its own,
and notes in shared memory what it is at. (torch's DataLoader has one pipe for all of its processes: one that is stopped
while it writes stops them all, and none can be replaced.)

A process that makes no progress is killed, and a new one makes the same result, so that an accident (a stopped process,
a drive that was away) changes nothing. A clip at which the second one stops too is left out like any other that cannot
be read. Whoever needs a third replacement has no clip with a fault but a machine, and the run ends, to be continued.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import multiprocessing
import multiprocessing.process
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, MutableSequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastclap import console
from fastclap.errors import DataError, FastclapError
from fastclap.fork_server import fork_server
from fastclap.memory import keep_freed_memory
from fastclap.threads import ELSEWHERE, SLICE, TIMEOUT, Results, Tasks, in_order, never

ROW_TIMEOUT = 600.0
"""`TIMEOUT` for commands that decode whole recordings, which may last hours."""

_GRACE_SECONDS = 30
_START_SECONDS = 300  # for a process to begin; importing torch takes long on a busy machine
_END_SECONDS = 2  # for one that was killed to be gone
_BY_VALUE, _MOST_BY_VALUE = (torch.int64, torch.float32, torch.bool), 1 << 16  # bytes
_SMALL = 4096  # bytes of a task that fit into any pipe beside another one


class HasOrigin(Protocol):
    """A row of a manifest, as far as messages need it."""

    @property
    def audio(self) -> str: ...
    @property
    def origin(self) -> str: ...


R = TypeVar("R", bound=HasOrigin)
S = TypeVar("S")
T = TypeVar("T")


class WorkerGone(Exception):
    """A helper process has ended.

    Attributes:
        deaths: (process id, exit code) of those that have.
        item: what it had been given.
    """

    def __init__(self, deaths: list[tuple[int | None, int | None]], item: Any) -> None:
        super().__init__(describe_deaths(deaths))
        self.deaths = deaths
        self.item = item


class WorkerStuck(Exception):
    """A helper process made no progress, and neither did the one in its place.

    Attributes:
        pid: of the process.
        item: what it had been given.
        place: what it noted with `now_at`.
    """

    def __init__(self, pid: int | None, item: Any, place: int) -> None:
        super().__init__(f"process {pid} is stuck")
        self.pid, self.item, self.place = pid, item, place


def start_worker() -> None:
    """Tie this helper process to its parent.

    It ends when the parent ends. It survives a signal to the whole process group (Ctrl-C, a scheduler's SIGTERM), so
    that the parent can finish its step and save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_SECONDS))  # then SIGALRM ends it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a thread for each core in each process gains nothing

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # A parent that died while this process handed it a tensor: the thread that did so has nobody to tell.
        if not issubclass(kind, (ConnectionError, EOFError)):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = excepthook
    threading.Thread(target=wait, daemon=True).start()


def describe_deaths(ended: Iterable[tuple[int | None, int | None]]) -> str:
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


# ---------------------------------------------------------------------------------------------------------------------
# in a helper process

_noted: MutableSequence[int] = [0, 0]  # how often this process has noted something, and what
_left_out: Mapping[int, str] = {}
_serving = False


def now_at(place: int) -> str | None:
    """Note, for whoever watches this process, that it is alive and what it is at, such as the row of a clip.

    Returns:
        Why this clip is to be left out; None: it is not.
    """
    _noted[1] = place
    _noted[0] += 1
    return _left_out.get(place)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.zeros`, but in a helper process in shared memory, where a result would be copied to on its way."""
    if not _serving:
        return torch.zeros(shape, dtype=dtype)
    memory = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # begins as zeros
    return torch.empty(0, dtype=dtype).set_(memory, 0, shape)  # type: ignore[call-overload]


def _serve(connection: Connection, function: Callable[[Any], Any], noted: Any) -> None:
    """What a helper process does: make results of what arrives until the other end of the pipe is closed."""
    global _noted, _left_out, _serving
    start_worker()
    keep_freed_memory()
    torch.set_num_threads(1)
    _noted, _serving = noted, True
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            now_at(ELSEWHERE)
            item, _left_out = connection.recv()
            now_at(ELSEWHERE)
            connection.send_bytes(_packed_result(function, item))


class _ResultPickler(ForkingPickler):
    """Sends small tensors by value: of others the parent asks for a file descriptor each, which takes a millisecond."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in _BY_VALUE and value.nbytes <= _MOST_BY_VALUE:
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _packed_result(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return _ResultPickler.dumps((function(item), None))
    except FastclapError as error:
        return ForkingPickler.dumps((None, error))
    except Exception:
        return ForkingPickler.dumps((None, RuntimeError(f"in process {os.getpid()}:\n{traceback.format_exc()}")))


# ---------------------------------------------------------------------------------------------------------------------
# in the process that wants the results


class _Worker(threading.Thread):
    """A helper process, and the thread that hands it tasks and takes its results."""

    def __init__(
        self,
        function: Callable[[Any], Any],
        tasks: Tasks,
        results: Results,
        left_out: Mapping[int, str],
        receive: Callable[[Any], Any],
        ahead: int,
        given: tuple[tuple[int, Any], ...] = (),
    ) -> None:
        super().__init__(daemon=True)
        self._tasks, self._results, self._left_out, self._receive = tasks, results, left_out, receive
        self._ahead = ahead
        self.given = given  # the task that the process is at, and one that waits for it there
        self.given_up = False  # whether nobody waits for it any more
        context = fork_server()
        self.noted = context.RawArray("q", 2)
        self._connection, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, function, self.noted), daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        there.close()
        self.start()

    def run(self) -> None:
        try:
            sent = 0  # of the tasks that are given
            while self._take():
                # The second one only if it fits into the pipe: the process may be waiting to be rid of a result.
                for _, item in self.given[sent:]:
                    data = ForkingPickler.dumps((item, dict(self._left_out)))
                    if sent and len(data) > _SMALL:
                        break
                    self._connection.send_bytes(data)
                    sent += 1
                result, error = self._connection.recv()
                number, _ = self.given[0]
                self.given, sent = self.given[1:], sent - 1
                self._results.put((number, self._receive(result) if error is None else None, error))
        except Exception as error:  # of many kinds, by what the process was doing when it died
            if not self.given_up:
                self.process.join(timeout=1)
                gone = self.process.exitcode is not None
                item = self.given[0][1] if self.given else None
                death = WorkerGone([(self.process.pid, self.process.exitcode)], item) if gone else error
                self._results.put((ELSEWHERE, None, death))
        finally:
            self._connection.close()

    def _take(self) -> bool:
        """Take a task for the process, and one more that it need not wait for; False: it is given up."""
        with contextlib.suppress(queue.Empty):
            while len(self.given) < min(2, self._ahead) and not self.given_up:
                task = self._tasks.get(block=not self.given)
                if task is None or self.given_up:  # None ends all of them
                    self.given_up = True
                    self._tasks.put(task)
                else:
                    self.given = (*self.given, task)
        return not self.given_up

    def give_up(self) -> None:
        """End the process, whatever it is at: it holds nothing of value."""
        self.given_up = True
        self.process.kill()

    def wait(self) -> None:
        """Wait for the end of a process that was given up."""
        self.process.join(_END_SECONDS)
        self.join(_END_SECONDS)
        if self.process.is_alive():  # within a system call that nothing ends; Python would wait for it at its own end
            multiprocessing.process._children.discard(self.process)  # type: ignore[attr-defined]


def in_processes(
    function: Callable[[S], T],
    items: Iterable[S],
    workers: int,
    *,
    ahead: int,
    timeout: float = TIMEOUT,
    stopping: Callable[[], bool] = never,
    receive: Callable[[T], T] = lambda result: result,
) -> Generator[T, None, None]:
    """What `function` makes of each item, in order; made in processes a little ahead of the caller.

    Args:
        function: picklable. What it notes with `now_at` is its progress, and a clip that it can leave out.
        items: taken as they are needed.
        workers: processes, at least one. They end with the generator, or with this process however it ends.
        ahead: items a process that are under way or waiting for the caller.
        timeout: seconds that a process may make no progress while the caller waits for it; the first one is replaced.
        stopping: asked about twice a second while waiting.
        receive: called with each result as it arrives, in a thread.

    Raises:
        LoaderStopped: `stopping` said so.
        WorkerGone: a process died.
        WorkerStuck: a process made no progress, nor did the one that replaced it.
        Exception: what `function` raised; if it was no FastclapError, a RuntimeError with its traceback.
    """
    tasks: Tasks = queue.SimpleQueue()
    results: Results = queue.SimpleQueue()
    left_out: dict[int, str] = {}
    crew: list[_Worker] = []
    pause = min(SLICE, timeout / 2)

    def hire(given: tuple[tuple[int, Any], ...] = ()) -> None:
        crew.append(_Worker(function, tasks, results, left_out, receive, ahead, given))

    def dismiss() -> None:
        tasks.put(None)
        for worker in crew:
            worker.give_up()
        for worker in crew:
            worker.wait()

    # Seconds are counted while somebody waits, not by a clock, which goes on while this process is suspended.
    silent = 0.0
    last: tuple[int | None, int] = None, 0  # the process that owes the result, and how often it had noted something
    stuck_at: dict[int, list[int]] = {}  # by the number of a result: where processes that owed it stood still

    def watch(due: int) -> None:
        nonlocal silent, last
        at_work = ((worker, given) for worker in crew if (given := worker.given))
        worker, given = next(((worker, given) for worker, given in at_work if given[0][0] == due), (None, ()))
        if worker is None:
            return
        pid = worker.process.pid
        count, place = worker.noted
        silent, last = (silent + pause if last == (pid, count) else 0.0), (pid, count)
        if silent < (timeout if count else max(timeout, _START_SECONDS)):
            return
        silent = 0.0
        before = stuck_at.setdefault(due, [])
        before.append(place)
        if len(before) > 1 and (before[1:] != before[:1] or place == ELSEWHERE):
            raise WorkerStuck(pid, given[0][1], place)
        if len(before) > 1:
            left_out[place] = f"could not be read within {timeout:g} s, twice; see to its drive, or remove its row"
        console.note(f"process {pid} made no progress for {timeout:g} s; another one takes over")
        worker.give_up()
        crew.remove(worker)
        worker.wait()
        hire(worker.given)

    atexit.register(dismiss)  # before multiprocessing waits for processes, which may be stuck
    try:
        for _ in range(workers):
            hire()
        yield from in_order(items, ahead * workers, tasks, results, watch, stopping, pause)
    finally:
        atexit.unregister(dismiss)
        dismiss()


def map_rows(
    function: Callable[[R], T],
    rows: Iterable[R],
    workers: int,
    *,
    ahead: int,
    doing: str,
    goes_on: str,
    timeout: float = ROW_TIMEOUT,
) -> Generator[T, None, None]:
    """What `function` makes of each row, in order; made in processes a little ahead of the caller.

    Args:
        function: picklable.
        rows: taken as they are needed.
        workers: processes; 0: everything is made in this one, where nothing watches it.
        ahead: rows a process that are under way or waiting for the caller.
        doing: what the processes are doing, such as "decoding", and
        goes_on: where the same command goes on, such as "from there"; both for the message of the error.
        timeout: seconds that one row may take; it is tried twice.

    Raises:
        DataError: a process died or is stuck.
    """
    if not workers:
        yield from map(function, rows)
        return
    try:
        yield from in_processes(function, rows, workers, ahead=ahead, timeout=timeout)
    except WorkerGone as error:
        where = "" if error.item is None else f" at {error.item.audio}"
        raise DataError(
            f"a {doing} process died{where} ({error}), most likely because memory ran out or a decoder crashed; run "
            f"the same command again, which goes on {goes_on}, with fewer --workers"
        ) from error
    except WorkerStuck as error:
        raise DataError(
            f"{error.item.origin}: {error.item.audio}: {doing} it took more than {timeout:g} s, twice (process "
            f"{error.pid}): its drive does not answer, or it is too long; see to that or remove the row, and run the "
            f"same command again, which goes on {goes_on}"
        ) from error
