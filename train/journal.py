"""Where a run's numbers go: from sums on the device to `metrics.jsonl`, the console, a progress bar and trackers.

`metrics.jsonl` is the record. Each line is one JSON object; wall-clock figures sit under its `time` key and nothing
else does, so two runs of the same training differ in that key only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

import fastclap
from fastclap.console import abandon, printable, show
from fastclap.errors import ConfigError, TrainingError
from fastclap.files import write_atomic
from fastclap.models.packing import HostCopy
from fastclap.reading import read_text
from fastclap.train.best import Best
from fastclap.train.config import TrainConfig
from fastclap.train.distributed import World
from fastclap.train.meter import Meter
from fastclap.train.step import StepResult


class Journal:
    """The numbers of a run. Every rank counts its steps; the main one writes.

    It also writes `config.yaml` (resolved; usable as --config) and `environment.json`. On a resumed run, lines of
    `metrics.jsonl` after the step to continue from are cut: they will be written again.

    Args:
        config: of the run.
        world: this process.
        meter: whose figures the lines of the log end with.
        state: of the checkpoint that the run continues from.
        best: compares the validations.

    Attributes:
        validated: step of the last validation; None before the first.
    """

    def __init__(
        self, config: TrainConfig, world: World, meter: Meter, state: dict[str, Any] | None, best: Best
    ) -> None:
        self.totals = Totals(world.device, state["totals"] if state else None)
        self.best = best
        self.validated: int | None = state["totals"].get("validated") if state else None
        self._config, self._meter = config, meter
        self._pending: LogStep | None = None
        self._file: Any = None
        self._progress: Any = None
        self._trackers: dict[str, Tracker] = {}
        self._unwritten = ""  # lines that `metrics.jsonl` could not take yet
        self._warned = False  # whether that was said
        if not world.is_main:
            return
        run_dir, start_step = Path(config.run_dir), int(state["step"]) if state else 0
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(run_dir / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False).encode())
        write_atomic(run_dir / "environment.json", json.dumps(environment(world), indent=1).encode())
        path = run_dir / "metrics.jsonl"
        _truncate(path, start_step, self.validated)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the run
        self._progress = _progress_bar(start_step, config.steps)
        if config.tensorboard:
            self._trackers["TensorBoard"] = _open_tensorboard(run_dir)
        if config.wandb:
            self._trackers["wandb"] = _open_wandb(run_dir, config.to_dict())

    def count(self, step: int, result: StepResult) -> None:
        """Count a step."""
        self.totals.add(result.loss, result.norm, result.skipped)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def end_interval(self, step: int, result: StepResult, logit_scale: Tensor) -> None:
        """Send the figures of the log interval that ends with this step on their way off the device."""
        self._pending = LogStep(step, result.epoch, result.learning_rate, self.totals.harvest(logit_scale))
        self._meter.mark()

    def report(self) -> None:
        """Write the line of the last log interval, if it is still to be written.

        Raises:
            TrainingError: too many steps in a row were not finite; on every rank alike.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        figures = Totals.figures(pending.totals)
        worst_run = figures.pop("worst_run")
        if self._file is not None:
            lap = self._meter.lap()
            head = {"step": pending.step, "epoch": pending.epoch, "learning_rate": pending.learning_rate}
            record = {"kind": "train", **head, **figures}
            self._write({**record, "time": lap}, train_line(record, lap, self._config))
        if worst_run >= self._config.max_bad_steps:
            raise TrainingError(
                f"step {pending.step}: {self._config.max_bad_steps} steps in a row had a non-finite loss or gradient. "
                "The weights are those before them; look at the last batches, or lower --optimizer.learning-rate"
            )

    def write_validation(self, step: int, figures: dict[str, Any]) -> bool:
        """Write the figures of a validation, and say whether it is the best so far; every rank calls this."""
        self._write({"kind": "valid", "step": step, **figures}, valid_line(step, figures))
        self.validated = step
        return self.best.is_beaten(step, figures)

    def say(self, message: str) -> None:
        """One line for the person who watches. Where it cannot be written, nobody watches any more."""
        try:
            if self._progress is not None:
                self._progress.console.print(printable(message), highlight=False, markup=False)
            elif self._file is not None:
                show(message)
                sys.stdout.flush()
        except (OSError, ValueError):  # a full disk, a pipe without a reader
            abandon(sys.stdout)

    def _write(self, record: dict[str, Any], line: str) -> None:
        """Append a record to `metrics.jsonl` and the trackers, and show `line`. None of them ever ends a run."""
        if self._file is None:
            return
        self._unwritten += json.dumps(record) + "\n"
        self._flush()
        self.say(line)
        values = {f"{record['kind']}/{name}": value for name, value in _numbers(record) if name not in ("step", "kind")}
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(values, record["step"])
            except Exception as error:  # of whatever kind its package has
                self.say(f"warning: {name} is left out from here on ({error})")
                del self._trackers[name]

    def _flush(self) -> None:
        """Write what is still to be written to `metrics.jsonl`: whole lines, or nothing."""
        if self._file is None or not self._unwritten:
            return
        end = self._file.tell()
        try:
            data = self._unwritten.encode()
            if self._file.write(data) < len(data):  # the last room on a disk is given without an error
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unwritten = ""
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
                self._file.seek(end)
            if not self._warned:
                self.say(f"warning: {self._file.name}: {error.strerror}; its lines are kept until it can be written")
            self._warned = True

    def state(self) -> dict[str, Any]:
        """The sums and the best validation, for a checkpoint; the record is forced onto the disk first."""
        self._sync()
        return {**self.totals.state(), "validated": self.validated, "best": self.best.state()}

    def close(self) -> None:
        """Close every file, and leave the terminal as it was."""
        self._sync()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        if self._progress is not None:
            with contextlib.suppress(OSError, ValueError):  # of a terminal that has gone
                self._progress.stop()
        for tracker in self._trackers.values():
            with contextlib.suppress(Exception):  # the run is what counts
                tracker.close()

    def _sync(self) -> None:
        self._flush()
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# from the device to the host


class LogStep(NamedTuple):
    """A step whose line of the log is still to be written."""

    step: int
    epoch: int
    learning_rate: float
    totals: HostCopy


class Totals:
    """Sums of a log interval, kept on the device: loss and gradient norm of the steps taken, and the steps skipped."""

    _NAMES = ("loss", "grad_norm", "taken", "skipped", "skipped_in_all", "run", "worst_run")

    def __init__(self, device: torch.device, saved: dict[str, float] | None) -> None:
        start = [(saved or {}).get(name, 0.0) for name in self._NAMES]
        self._sums = torch.tensor(start, dtype=torch.float64, device=device)
        self._kept = torch.tensor([name in ("skipped_in_all", "run") for name in self._NAMES], device=device)

    def add(self, loss: Tensor, norm: Tensor, skipped: Tensor) -> None:
        """Count a step."""
        loss_sum, norm_sum, taken, skips, skips_in_all, run, worst_run = self._sums.unbind()
        missed = skipped.double()
        run = (run + missed) * missed
        self._sums = torch.stack(
            [
                loss_sum + torch.where(skipped, 0.0, loss.double()),
                norm_sum + torch.where(skipped, 0.0, norm.double()),
                taken + 1 - missed,
                skips + missed,
                skips_in_all + missed,
                run,
                torch.maximum(worst_run, run),
            ]
        )

    def harvest(self, logit_scale: Tensor) -> HostCopy:
        """The sums and the logit scale, on their way off the device; the interval starts anew."""
        copy = HostCopy(torch.cat([self._sums, logit_scale.detach().double().reshape(1)]))
        self._sums = torch.where(self._kept, self._sums, 0.0)
        return copy

    @classmethod
    def figures(cls, copy: HostCopy) -> dict[str, Any]:
        """Means of the interval."""
        *values, logit_scale = copy.read().tolist()
        sums = dict(zip(cls._NAMES, values, strict=True))
        taken = sums["taken"]
        return {
            "loss": sums["loss"] / taken if taken else None,
            "grad_norm": sums["grad_norm"] / taken if taken else None,
            "logit_scale": logit_scale,
            "skipped_steps": int(sums["skipped_in_all"]),
            "worst_run": int(sums["worst_run"]),
        }

    def state(self) -> dict[str, float]:
        """The sums by name, as a checkpoint holds them."""
        return dict(zip(self._NAMES, self._sums.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# lines


def train_line(record: dict[str, Any], lap: dict[str, float], config: TrainConfig) -> str:
    """The line of a log step, from its record and the meter's figures."""
    left = (config.steps - record["step"]) * lap["seconds"] / config.log_every
    loss = "none taken" if record["loss"] is None else f"{record['loss']:.4f}"
    norm = "-" if record["grad_norm"] is None else f"{record['grad_norm']:.2f}"
    skipped = f"  skipped {record['skipped_steps']}" if record["skipped_steps"] else ""
    gpu = f"  mfu {lap['mfu']:.0%}" if "mfu" in lap else ""
    loader = f" (loader {lap['loader_clips_per_second']:.0f})" if "loader_clips_per_second" in lap else ""
    gpu += f"  {lap['watts']:.0f} W  {lap['joules_per_clip']:.2f} J/clip" if "watts" in lap else ""
    return (
        f"step {record['step']}/{config.steps}  epoch {record['epoch']}  loss {loss}  "
        f"scale {record['logit_scale']:.2f}  lr {record['learning_rate']:.2e}  |g| {norm}  "
        f"{lap['clips_per_second']:.1f} clips/s{loader}  waiting {lap['waiting']:.0%}{gpu}  left {clock(left)}{skipped}"
    )


def valid_line(step: int, figures: dict[str, Any]) -> str:
    """The line of a validation, from its figures."""
    parts = [f"valid at step {step}"]
    for name, both in figures["retrieval"].items():
        for way, arrow in (("audio_to_text", "A→T"), ("text_to_audio", "T→A")):
            parts.append(f"{name} {arrow} R@1 {both[way]['R@1']:.3f} R@10 {both[way]['R@10']:.3f}")
    for column, scores in figures["classification"].items():
        parts.append(
            f"{column} UAR {scores['uar']:.3f} accuracy {scores['accuracy']:.3f} (chance {scores['chance']:.3f})"
        )
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def environment(world: World) -> dict[str, Any]:
    """Versions, hardware, commit and command line of this process."""
    commit = subprocess.run(
        ["git", "-C", str(Path(fastclap.__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    on_gpu = world.device.type == "cuda"
    return {
        "fastclap": fastclap.__version__,
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "tokenizers": version("tokenizers"),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if on_gpu else None,
        "threads": torch.get_num_threads(),
        "world_size": world.size,
        "command": sys.argv,
    }


# ---------------------------------------------------------------------------------------------------------------------
# files and trackers


def _truncate(path: Path, last_step: int, validated: int | None) -> None:
    """Keep the records up to `last_step`; a torn last line goes too, and a validation that the checkpoint has not."""
    if not path.exists():
        return
    kept = []
    for line in read_text(path, limit=1 << 40).split("\n"):
        try:
            record = json.loads(line)
            known = record["kind"] != "valid" or record["step"] <= (-1 if validated is None else validated)
            if record["step"] <= last_step and known:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    write_atomic(path, "".join(kept).encode())


def _numbers(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((f"{prefix}{key}", value))
    return found


def _progress_bar(start: int, total: int) -> Any:
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("training"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    bar.add_task("training", total=total, completed=start)
    bar.start()
    return bar


class Tracker(NamedTuple):
    """Where figures go besides: `log(values, step)`, and `close()` at the end."""

    log: Callable[[dict[str, float], int], Any]
    close: Callable[[], Any]


def _open_tensorboard(run_dir: Path) -> Tracker:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("--tensorboard needs the tensorboard package: pip install tensorboard") from error
    writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _open_wandb(run_dir: Path, config: dict[str, Any]) -> Tracker:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("--wandb needs the wandb package: pip install wandb") from error
    run = wandb.init(project="fastclap", name=run_dir.name, dir=str(run_dir), config=config, resume="allow")
    return Tracker(lambda values, step: run.log(values, step=step), run.finish)
