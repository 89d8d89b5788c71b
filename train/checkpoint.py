"""Checkpoints that survive kills, full disks and truncated files, and the choice of the one to continue from.

A checkpoint is one folder, `checkpoints/step-N`. It is written under a temporary name, every file is flushed to the
disk, `state.json` (with the size of every other file) comes last, and one rename makes it visible; so a folder with
the final name is complete or was damaged later, which the sizes show. Nothing in it is a pickle: tensors are
safetensors, the rest is JSON. The folder is also a model folder: `CLAP.from_pretrained` reads it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastclap.errors import ConfigError, ModelError, TrainingError
from fastclap.files import fsync
from fastclap.models.clap import CLAP
from fastclap.models.folder import WEIGHTS_FILE, check_weights, load_state_dict_file
from fastclap.train.config import TrainConfig
from fastclap.train.distributed import placed_like, whole
from fastclap.train.step import Step, applied

FORMAT = 1
_STATE = "state.json"
_TRAINER = "trainer.safetensors"
_TEMPORARY = ".writing-"
_OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")  # AdamW's

# A resumed run may change these; anything else would make it another training.
_MAY_CHANGE = [
    "run_dir",
    "resume",
    "init_from",
    "steps",
    "epochs",
    "log_every",
    "valid_every",
    "save_every",
    "keep",
    "threads",
    "tensorboard",
    "wandb",
    "device",
    "max_bad_steps",
    "chunk_size",
    "compile",
    "checkpoint_activations",
    "shard",
    "profile",
    "data.workers",
    "data.prefetch",
    "data.cache_mb",
    "data.valid",
    "data.max_bad_share",
    "valid",
]


def find_checkpoint(config: TrainConfig) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that a run continues from and its state, or None to begin at step 0.

    Raises:
        ConfigError: the folder holds a run and `resume` is off, or the configuration differs from that run's.
        ModelError: every checkpoint is damaged.
    """
    run_dir = Path(config.run_dir)
    for partial in (run_dir / "checkpoints").glob(f"{_TEMPORARY}*"):  # what a killed save left behind
        shutil.rmtree(partial, ignore_errors=True)
    if not config.resume:
        existing = checkpoints(run_dir)
        if existing:
            raise ConfigError(
                f"{run_dir} already holds a run (newest checkpoint {existing[-1].name}): continue it with --resume, "
                "or name another --run-dir"
            )
        return None
    newest = newest_checkpoint(run_dir)
    if newest is None:
        return None
    path, state, complaints = newest
    for complaint in complaints:
        print(f"warning: skipped a damaged checkpoint: {complaint}", file=sys.stderr, flush=True)
    before, now = _flat(state["config"]), _flat(config.to_dict())
    changed = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not (_may_change(name) and not (name == "init_from" and config.loss.teacher == "init"))
        and not (config.init_from and name.startswith("model."))
    ]
    if changed:
        raise ConfigError(
            f"{path} belongs to a run with another configuration: {'; '.join(changed)}. Give the same flags, "
            "or name another --run-dir"
        )
    return path, state


def _may_change(name: str) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in _MAY_CHANGE)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def save_checkpoint(step: Step, totals: dict[str, float], tags: list[str] | None) -> None:
    """Write `checkpoints/step-<number>` of the run folder and then remove all but the `keep` newest.

    `model.safetensors` holds the weights to use (the moving average where there is one), `trainer.safetensors` the
    optimizer's state and, with an average, the weights under training. The main rank writes; every rank calls this,
    because sharded tensors are put together here.

    Args:
        step: model, optimizer, average and configuration.
        totals: sums of the log interval, by name.
        tags: the tags of the tag loss, in the order of its columns; None: there are none.

    Raises:
        TrainingError: the disk refused the write. What was there before is untouched and the partial folder removed.
    """
    run_dir = Path(step.config.run_dir)
    with applied(step.average):
        weights = whole(step.model.state_dict())
        tensors = whole(_optimizer_tensors(step))
        if step.average is not None:  # at the moment it holds the weights under training
            tensors |= {f"weights/{name}": tensor for name, tensor in whole(step.average.tensors).items()}
        if not step.world.is_main:
            return
        root, name = run_dir / "checkpoints", f"step-{step.number}"
        final, partial = root / name, root / f"{_TEMPORARY}{name}"
        try:
            root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            step.model.save_pretrained(partial, state_dict=weights)
            save_file({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}, partial / _TRAINER)
            sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
            state = {
                "format": FORMAT,
                "step": step.number,
                "files": sizes,
                "config": step.config.to_dict(),
                "world_size": step.world.size,
                "totals": totals,
                "chunk_sizes": step.objective.chunk_sizes,
                "tags": tags,
            }
            (partial / _STATE).write_text(json.dumps(state, indent=1))
            for file in partial.iterdir():
                fsync(file)
            if final.exists():  # an older attempt at this step that was found damaged
                shutil.rmtree(final)
            os.rename(partial, final)
            fsync(root)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise TrainingError(
                f"{final}: the checkpoint could not be written ({error}); older ones are untouched"
            ) from error
    for old in checkpoints(run_dir)[: -step.config.keep]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(run_dir: Path) -> list[Path]:
    """All visible checkpoints of a run, oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def average_checkpoints(run_dir: Path, last: int, target: Path) -> list[int]:
    """Write a model whose weights are the mean of those of the `last` newest checkpoints; returns their steps.

    Sums are in float64; tensors that are not floating are the newest ones.

    Raises:
        ModelError: there are fewer checkpoints, one is damaged, or `target` holds other files.
        TrainingError: the disk refused the write.
    """
    paths = checkpoints(run_dir)[-last:]
    if last < 1 or len(paths) < last:
        found = ", ".join(path.name for path in paths) or "none"
        raise ModelError(
            f"{run_dir}: asked for the average of {last} checkpoints, found {found}; a run keeps as many as --keep says"
        )
    steps = [int(read_state(path)["step"]) for path in paths]
    model = CLAP.from_pretrained(paths[-1])
    newest = model.state_dict()
    sums = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in newest.items() if x.is_floating_point()}
    for path in paths:
        weights = load_state_dict_file(path / WEIGHTS_FILE)
        check_weights(model, weights, path)
        for name, held in sums.items():
            held += weights[name]
    means = {name: (held / last).to(newest[name].dtype) for name, held in sums.items()}
    try:
        model.save_pretrained(target, state_dict={**newest, **means})
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{target}: the average could not be written ({error})") from error
    return steps


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, after checking that each of its files is there in full.

    Raises:
        ModelError: a file is missing, truncated or of an unknown format.
    """
    try:
        state = json.loads((path / _STATE).read_text())
        sizes = state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a complete checkpoint ({_STATE} cannot be read: {error})") from error
    if state.get("format") != FORMAT:
        raise ModelError(f"{path}: checkpoint format {state.get('format')!r}; this version reads format {FORMAT}")
    for name, size in sizes.items():
        actual = (path / name).stat().st_size if (path / name).exists() else None
        if actual != size:
            found = "missing" if actual is None else f"{actual} bytes long"
            raise ModelError(f"{path / name}: {found}, but {size} bytes were written; the checkpoint is damaged")
    return state


def newest_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest complete checkpoint of a run, its state, and the complaints about newer ones that are damaged.

    Raises:
        ModelError: there are checkpoints but every one is damaged; starting over silently would lose the run.
    """
    complaints: list[str] = []
    for path in reversed(checkpoints(run_dir)):
        try:
            return path, read_state(path), complaints
        except ModelError as error:
            complaints.append(str(error))
    if complaints:
        raise ModelError("no checkpoint of this run is complete: " + "; ".join(complaints))
    return None


def restore_weights(path: Path, model: CLAP, averaged: bool) -> None:
    """Load the weights under training of a checkpoint in place, bit for bit.

    Raises:
        ModelError: the checkpoint belongs to another model (its tensors have other names or shapes), or was saved with
            weight averaging and `averaged` is off, or the other way round.
    """
    trainer = load_state_dict_file(path / _TRAINER)
    under_training = {name[8:]: value for name, value in trainer.items() if name.startswith("weights/")}
    if averaged != bool(under_training):
        raise ModelError(
            f"{path}: saved {'with' if under_training else 'without'} weight averaging; "
            "set --optimizer.ema-decay as it was"
        )
    weights = under_training or load_state_dict_file(path / WEIGHTS_FILE)
    check_weights(model, weights, path)
    model.load_state_dict(weights)


def restore_step(path: Path, step: Step) -> None:
    """Load optimizer state and moving average of a checkpoint in place, bit for bit; sharded as the model is."""
    trainer = load_state_dict_file(path / _TRAINER)
    if step.average is not None:
        step.average.load(load_state_dict_file(path / WEIGHTS_FILE))
    for name, parameter in step.model.named_parameters():
        entries = {key: trainer[f"{key}/{name}"] for key in _OPTIMIZER_STATE if f"{key}/{name}" in trainer}
        if entries:
            step.optimizer.state[parameter] = {key: placed_like(parameter, value) for key, value in entries.items()}


def _optimizer_tensors(step: Step) -> dict[str, Tensor]:
    """AdamW's state as tensors named `step|exp_avg|exp_avg_sq/<parameter name>`."""
    return {
        f"{key}/{name}": value
        for name, parameter in step.model.named_parameters()
        for key, value in step.optimizer.state.get(parameter, {}).items()
    }
