"""Where a run's numbers go: ``metrics.jsonl``, one console line a log step, a progress bar on a terminal, trackers.

``metrics.jsonl`` is the record. Each line is one JSON object; wall-clock figures sit under its ``time`` key and nothing
else does, so two runs of the same training differ in that key only.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from fastclap.errors import ConfigError
from fastclap.files import write_atomic


class Journal:
    """Open on the main rank only. On a resumed run, lines after ``start_step`` are cut: they will be written again."""

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        total_steps: int,
        *,
        tensorboard: bool,
        wandb: bool,
        config: dict[str, Any],
    ) -> None:
        self.path = run_dir / "metrics.jsonl"
        _truncate(self.path, start_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        self._progress = _progress_bar(start_step, total_steps)
        self._tensorboard = _open_tensorboard(run_dir) if tensorboard else None
        self._wandb = _open_wandb(run_dir, config) if wandb else None

    def say(self, message: str) -> None:
        """One line for the person who watches."""
        if self._progress is not None:
            self._progress.console.print(message, highlight=False, markup=False)
        else:
            print(message, flush=True)

    def advance(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def write(self, record: dict[str, Any], line: str) -> None:
        """Append a record to ``metrics.jsonl`` and the trackers, and show ``line``."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self.say(line)
        values = {f"{record['kind']}/{name}": value for name, value in _numbers(record) if name not in ("step", "kind")}
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(values, step=record["step"])

    def sync(self) -> None:
        """Force what was written onto the disk (before a checkpoint that refers to it)."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()
        if self._progress is not None:
            self._progress.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def clock(seconds: float) -> str:
    """12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _truncate(path: Path, last_step: int) -> None:
    """Keep the records up to ``last_step``; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
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
    if not sys.stdout.isatty():
        return None
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    progress = Progress(
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )
    progress.add_task("training", total=total, completed=start)
    progress.start()
    return progress


def _open_tensorboard(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("--tensorboard needs the tensorboard package: pip install tensorboard") from error
    return SummaryWriter(str(run_dir / "tensorboard"))


def _open_wandb(run_dir: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("--wandb needs the wandb package: pip install wandb") from error
    return wandb.init(project="fastclap", name=run_dir.name, dir=str(run_dir), config=config, resume="allow")
