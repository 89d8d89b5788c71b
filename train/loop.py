"""The training loop, to be read from top to bottom.

A run is a function of its configuration. The data order, crops and captions follow from (seed, step), and so do
dropout and every other random number: all generators are seeded anew before each step from (seed, step, rank). A
resumed run therefore needs no stored generator state and repeats the uninterrupted one bit for bit on the same kind of
device.

The loop does not wait for the device between log lines: what a step leaves stays there, and one small copy every
`log_every` steps brings the numbers back.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastclap.data import Batch
from fastclap.errors import ConfigError, TrainingError, TrainingStopped
from fastclap.files import locked, write_atomic
from fastclap.grad_cache import is_out_of_memory
from fastclap.models.packing import HostCopy
from fastclap.threads import LoaderStopped
from fastclap.train import distributed
from fastclap.train.config import TrainConfig
from fastclap.train.distributed import World
from fastclap.train.run import Run, prepare

_OVERDUE_SECONDS = 5.0  # after a signal, for the batch of the step that it came in


def train(config: TrainConfig) -> Path:
    """Train as configured and return the folder of the exported model (`run_dir/model`).

    What an error or a signal ends is saved first, as far as it has come, if that is possible.

    Raises:
        ConfigError: an impossible or, on resume, a changed configuration, or changed data.
        DataError: unusable manifests, more unusable clips than `data.max_bad_share`, or another process trains into the
            run folder.
        ModelError: a damaged checkpoint or one of another model.
        TrainingStopped: SIGTERM, SIGINT or SIGHUP asked for it.
        TrainingError: too many non-finite steps in a row, or a last checkpoint that could not be written.
    """
    interrupt, world = Interrupt(), World(0, 1, torch.device("cpu"), None)
    try:
        world = distributed.join(config.device)
        if world.device.type == "cuda":
            torch.set_float32_matmul_precision(config.matmul_precision)
        with run_folder(config, world):
            return take_steps(prepare(config, world, interrupt.is_overdue), interrupt)
    except (StopAtOnce, LoaderStopped) as error:
        raise interrupt.stopped() from error
    except Exception as error:
        stated = in_words(error, world)
        if stated is error:
            raise
        raise stated from error
    finally:
        interrupt.restore()
        distributed.leave(world)


@contextlib.contextmanager
def run_folder(config: TrainConfig, world: World) -> Iterator[None]:
    """The run folder, for this training alone.

    Raises:
        ConfigError: it cannot be made or written, or a file has the name of a folder in it.
        DataError: another process trains into it.
    """
    if not world.is_main:
        yield
        return
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("checkpoints", "model", "best", "report"):
            if (folder / name).exists() and not (folder / name).is_dir():
                raise ConfigError(f"{folder / name}: is a file, where the run writes a folder; move it away")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--run-dir {folder}: cannot be written ({error.strerror}); name another folder") from error
    with locked(folder, "training into"):
        yield


def in_words(error: Exception, world: World) -> Exception:
    """What this rank says of an error that ends the run; the other ranks are told, so that none waits for this one."""
    alarm = world.alarm
    if is_out_of_memory(error):
        error = TrainingError(
            f"out of memory on {world.device} (rank {world.rank}): {error}. Continue with --resume and less at a time: "
            "a smaller --chunk-size (auto finds one by itself, except with --shard), --checkpoint-activations on, "
            "--shard over several processes, or a shorter --data.crop-seconds"
        )
    elif distributed.is_lost_connection(error, world):
        reason = None if alarm is None else alarm.reason()
        return TrainingError(
            f"rank {world.rank} lost the connection to another process "
            + (
                f"({str(error).splitlines()[0]}). That one's own last message says why"
                if reason is None
                else f"({reason})"
            )
            + "; --resume continues, and torchrun --max-restarts N does so by itself"
        )
    if alarm is not None:
        alarm.sound(f"rank {world.rank}: {error}")
    return error


def take_steps(run: Run, interrupt: Interrupt) -> Path:
    """The steps of a run, from where it stands to its end."""
    config, world, step, journal = run.config, run.world, run.step, run.journal
    first, last_step = step.number + 1, config.steps
    if journal.best.out_of_patience:  # an earlier start ended for that reason
        last_step = step.number
    batches = run.meter.received(batches_on_device(run), config.data.workers)
    profiler = Profiler(run) if config.profile and world.is_main else None
    run.model.train()

    def validate() -> None:
        with run.meter.paused(), interrupt.at_once():
            run.validate()

    interrupt.immediate = False
    try:
        if first <= last_step and run.is_to_validate(step.number) and journal.validated != step.number:
            validate()  # which the end of an earlier start came before
        for number in range(first, last_step + 1):
            seed_step(config, number, world)
            if number == config.optimizer.unfreeze_step + 1 > 1:
                journal.say(f"from step {number} on what was frozen trains")
            result = step(batches, lambda: interrupt.wanted)
            journal.count(number, result)
            stop = interrupt.agreed(result.stop, world)
            if profiler is not None:
                profiler.step()

            last = number == config.steps
            validate_now = run.is_to_validate(number)
            save_now = number % config.save_every == 0 and not last and not stop

            # On a GPU a line is written a step late: its figures have arrived by then, and the device has more to do.
            journal.report()
            if number % config.log_every == 0 or last:
                journal.end_interval(number, result, run.model.logit_scale)
            if world.device.type == "cpu" or save_now or validate_now or stop or last:
                journal.report()
            run.saver.report()

            if save_now:
                with run.meter.paused():
                    run.save(required=False)
            if stop:
                run.save(required=True)
                raise interrupt.stopped()
            if validate_now:
                validate()
                if journal.best.out_of_patience:
                    if number % config.log_every:
                        journal.end_interval(number, result, run.model.logit_scale)
                        journal.report()
                    break

        if journal.best.out_of_patience and step.number < config.steps:
            journal.say(
                f"ended at step {step.number} of {config.steps}: the patience of {config.valid.patience} is used up, "
                f"the best is {journal.best}; --resume with a larger --valid.patience goes on"
            )
        if step.number >= first or not run.is_finished:
            run.save(required=True)  # before all else that belongs to the end
            if journal.validated != step.number:
                validate()
            with interrupt.at_once():
                run.finish()
        journal.say(f"model: {run.model_folder}   report: {run.folder / 'report' / 'report.html'}")
        distributed.barrier(world)
        return run.model_folder
    except BaseException as error:
        run.rescue(error)
        raise
    finally:
        batches.close()
        if profiler is not None:
            profiler.close()
        run.saver.close()
        journal.close()


def batches_on_device(run: Run) -> Generator[Batch, None, None]:
    """Batches on the training device; unusable clips found on the way are set aside on disk.

    The host is ahead of the device, so a copy on a stream of its own takes place during the step before.
    """
    device = run.world.device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in run.loader:
        if batch.bad:
            run.quarantine.add(batch.bad)
        with torch.cuda.stream(stream):
            moved = batch.to(device, non_blocking=True)
        if stream is not None:
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            moved.record_stream(current)
        yield moved


def seed_step(config: TrainConfig, step: int, world: World) -> None:
    """Seed torch (CPU and GPU), NumPy and Python from (seed, step, rank)."""
    digest = hashlib.blake2b(f"{config.seed}/{step}/{world.rank}".encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack trace where there is no GPU
    if world.device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


class StopAtOnce(KeyboardInterrupt):
    """A signal ends what is being done. No `except Exception` on the way takes it for an error of its own."""


class Interrupt:
    """What SIGTERM, SIGINT and SIGHUP do: the run ends, once what it has reached is saved.

    Among the steps they wait for the end of one (a second SIGINT does not); during all else, such as a validation, they
    end it at once. A signal that the process ignores, as SIGHUP under nohup, stays ignored, and in a thread other than
    the main one Python takes none.

    Attributes:
        number: of the signal that came; None: none did.
        immediate: whether a signal ends at once what is being done.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.immediate = True
        self._since = 0.0
        self._earlier: deque[HostCopy] = deque()
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._note)

    @property
    def wanted(self) -> bool:
        """Whether this rank wants to stop."""
        return self.number is not None

    def is_overdue(self) -> bool:
        """Whether a step has gone on for so long since the signal that its batch may never come."""
        return self.wanted and time.monotonic() - self._since > _OVERDUE_SECONDS

    def stopped(self) -> TrainingStopped:
        """The error that ends a run for a signal, of this rank or of another."""
        name = "another process" if self.number is None else signal.Signals(self.number).name
        return TrainingStopped(f"stopped by {name}; --resume continues", self.number or signal.SIGTERM)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Signals within, and one that has come before, end at once what is being done."""
        self.immediate = True
        try:
            if self.wanted:
                raise StopAtOnce
            yield
        finally:
            self.immediate = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.wanted, number
        self._since = self._since or time.monotonic()
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.immediate and not again:
            raise StopAtOnce

    def agreed(
        self,
        ranks: Tensor,  # []: how many want to stop
        world: World,
    ) -> bool:
        """Whether all ranks stop now. Several ranks go by the number of two steps before, so that nobody waits."""
        if world.group is None:
            return self.wanted
        self._earlier.append(HostCopy(ranks))
        return len(self._earlier) > 2 and bool(self._earlier.popleft().read() > 0)

    def restore(self) -> None:
        """Give the signals back to the handlers that they had before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


class Profiler:
    """Traces steps 6 to 8 of this start: `profile/trace.json` for a viewer and `profile/longest.txt` to read."""

    def __init__(self, run: Run) -> None:
        self._folder, self._say, kind = run.folder / "profile", run.journal.say, run.world.device.type
        activities = [torch.profiler.ProfilerActivity.CPU]
        if kind == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._order = f"self_{kind}_time_total"
        self._profile = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=4, warmup=1, active=3, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def step(self) -> None:
        """A step has ended."""
        self._profile.step()

    def close(self) -> None:
        """Stop tracing."""
        self._profile.stop()

    def _write(self, profile: torch.profiler.profile) -> None:
        table = profile.key_averages().table(sort_by=self._order, row_limit=25, max_name_column_width=80)
        try:
            self._folder.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(self._folder / "trace.json"))
            write_atomic(self._folder / "longest.txt", table.encode())
        except OSError as error:
            self._say(f"warning: {self._folder}: the trace could not be written ({error.strerror}); training goes on")
