"""The training loop, to be read from top to bottom.

A run is a function of its configuration. The data order, crops and captions follow from (seed, step), and so do
dropout and every other random number: all generators are seeded anew before each step from (seed, step, rank). A
resumed run therefore needs no stored generator state and repeats the uninterrupted one bit for bit on the same kind of
device.

The loop does not wait for the device between log lines: what a step leaves stays there, and one small copy every
`log_every` steps brings the numbers back.
"""

from __future__ import annotations

import hashlib
import random
import signal
from collections import deque
from collections.abc import Generator
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from fastclap.data import Batch
from fastclap.errors import TrainingError
from fastclap.files import write_atomic
from fastclap.grad_cache import is_out_of_memory
from fastclap.models.packing import HostCopy
from fastclap.train import distributed
from fastclap.train.config import TrainConfig
from fastclap.train.distributed import World
from fastclap.train.run import Run, prepare


def train(config: TrainConfig) -> Path:
    """Train as configured and return the folder of the exported model (`run_dir/model`).

    Raises:
        ConfigError: an impossible or, on resume, a changed configuration.
        DataError: unusable manifests, or more unusable clips than `data.max_bad_share`.
        ModelError: a damaged checkpoint or one of another model.
        TrainingError: too many non-finite steps in a row, or a last checkpoint that could not be written.
    """
    world = distributed.join(config.device)
    try:
        if config.threads:
            torch.set_num_threads(config.threads)
        if world.device.type == "cuda":
            torch.set_float32_matmul_precision(config.matmul_precision)
        return take_steps(prepare(config, world))
    except Exception as error:
        stated = in_words(error, world)
        if stated is error:
            raise
        raise stated from error
    finally:
        distributed.leave(world)


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


def take_steps(run: Run) -> Path:
    """The steps of a run, from where it stands to its end."""
    config, world, step, journal = run.config, run.world, run.step, run.journal
    first, last_step = step.number + 1, config.steps
    if journal.best.out_of_patience:  # an earlier start ended for that reason
        last_step = step.number
    batches = run.meter.received(batches_on_device(run), config.data.workers)
    interrupt = Interrupt()
    profiler = Profiler(run.folder, world) if config.profile and world.is_main else None
    run.model.train()
    try:
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
            validate_now = bool(config.valid_every) and number % config.valid_every == 0 and not last
            save_now = number % config.save_every == 0 and not last and not stop

            # On a GPU a line is written a step late: its figures have arrived by then, and the device has more to do.
            journal.report()
            if number % config.log_every == 0 or last:
                journal.end_interval(number, result, run.model.logit_scale)
            if world.device.type == "cpu" or save_now or validate_now or stop or last:
                journal.report()
            run.saver.report()

            if validate_now:
                with run.meter.paused():
                    run.validate()
                if journal.best.out_of_patience:
                    if number % config.log_every:
                        journal.end_interval(number, result, run.model.logit_scale)
                        journal.report()
                    break
            if save_now:
                with run.meter.paused():
                    run.save(required=False)
            if stop:
                run.save(required=True)
                journal.say(f"stopped by {interrupt.name or 'another process'} at step {number}; --resume continues")
                return run.model_folder

        if journal.best.out_of_patience and step.number < config.steps:
            journal.say(
                f"ended at step {step.number} of {config.steps}: the patience of {config.valid.patience} is used up, "
                f"the best is {journal.best}; --resume with a larger --valid.patience goes on"
            )
        if step.number >= first or not run.model_folder.exists():
            run.finish()
        journal.say(f"model: {run.model_folder}   report: {run.folder / 'report' / 'report.html'}")
        distributed.barrier(world)
        return run.model_folder
    finally:
        interrupt.restore()
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


class Interrupt:
    """SIGTERM and SIGINT become a wish to stop after the current step; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.wanted = False
        self.name: str | None = None
        self._earlier: deque[HostCopy] = deque()
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.wanted:
            raise KeyboardInterrupt
        self.wanted, self.name = True, signal.Signals(number).name

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

    def __init__(self, run_dir: Path, world: World) -> None:
        self._folder = run_dir / "profile"
        activities = [torch.profiler.ProfilerActivity.CPU]
        if world.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._order = f"self_{world.device.type}_time_total"
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
        self._folder.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(self._folder / "trace.json"))
        table = profile.key_averages().table(sort_by=self._order, row_limit=25, max_name_column_width=80)
        write_atomic(self._folder / "longest.txt", table.encode())
