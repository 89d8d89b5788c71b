"""Checkpoints that survive kills, full disks and truncated files, and the choice of the one to continue from.

A checkpoint is one folder, `checkpoints/step-N`. It is written under a temporary name, every file is flushed to the
disk, `state.json` (with the size of every other file) comes last, and one rename makes it visible; so a folder with
the final name is complete or was damaged later, which the sizes show. Nothing in it is a pickle: tensors are
safetensors, the rest is JSON. The folder is also a model folder: `CLAP.from_pretrained` reads it.

What no step of the run changes, such as a frozen tower or the weights that LoRA adapts, is written once, to
`frozen.safetensors` in the run folder. A checkpoint then holds the other tensors, and that file's fingerprint.

Training waits only until its tensors are copied to the host; a thread brings the copy to the disk (`Saver`).
torch.distributed.checkpoint would not make this shorter: it writes shards with a pickled index, which is no model
folder, and leaves the rename, the sizes and the removal of old checkpoints to do.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastclap.config import CLAPConfig
from fastclap.errors import ConfigError, DataError, ModelError, TrainingError
from fastclap.files import fsync, write_atomic
from fastclap.models.card import model_card
from fastclap.models.clap import CLAP
from fastclap.models.folder import (
    FROZEN_FILE,
    FROZEN_NOTE,
    WEIGHTS_FILE,
    check_weights,
    find_frozen,
    fingerprint,
    load_state_dict_file,
    load_weights,
    write_model,
)
from fastclap.models.lora import merged
from fastclap.models.sizes import free_memory
from fastclap.models.tokenizer import Tokenizer
from fastclap.reading import read_json
from fastclap.train.config import TrainConfig
from fastclap.train.distributed import World, placed_like, whole
from fastclap.train.step import Step, state_names

Key = TypeVar("Key", bound=Hashable)

FORMAT = 1
_STATE = "state.json"
_TRAINER = "trainer.safetensors"
_QUEUE, _MEAN, _TOWER = "queue/", "mean/", "audio_tower/"
_TEMPORARY = ".writing-"
_BLOCK_BYTES = 1 << 30

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
    "data.worker_timeout",
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
    # A field that is younger than the checkpoint had its default.
    before, now = _flat(TrainConfig().to_dict()) | _flat(state["config"]), _flat(config.to_dict())
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


class Frozen(NamedTuple):
    """The tensors that no step of a run changes, and the file that holds them for all checkpoints."""

    names: frozenset[str]
    note: dict[str, Any]  # fingerprint of the file; empty on ranks that write nothing


def keep_frozen(config: TrainConfig, model: CLAP, world: World, resumed: Path | None) -> Frozen | None:
    """Write the tensors that no step changes to the run folder, unless it has them; None: every tensor changes.

    Buffers count as changing. Every rank calls this, before towers are sharded.

    Args:
        config: of the run.
        model: as training starts with it, with all that will ever train free to do so.
        world: this process.
        resumed: the checkpoint that the run goes on from, whose own weights the model has been built with.

    Raises:
        TrainingError: the disk refused the write.
        ModelError: the run folder's file holds tensors that train.
    """
    names = frozenset(n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad)
    shared = None if resumed is None else find_frozen(resumed, verify=False)
    if resumed is not None and shared is not None:
        with safe_open(shared, "pt") as file:
            held = frozenset(file.keys())
        if not held <= names:
            raise ModelError(
                f"{shared}: holds tensors that train now, such as {min(held - names)}; use the release that wrote it"
            )
        return Frozen(held, json.loads((resumed / FROZEN_NOTE).read_text()))
    if not names or not world.is_main:
        return Frozen(names, {}) if names else None
    path = Path(config.run_dir) / FROZEN_FILE
    partial = path.with_name(f"{_TEMPORARY}{FROZEN_FILE}")  # a killed write's is written over by the next
    weights = model.state_dict()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: weights[name].cpu().contiguous() for name in sorted(names)}, partial)
        fsync(partial)
        os.replace(partial, path)
        fsync(path.parent)
        return Frozen(names, fingerprint(path))
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise TrainingError(f"{path}: the tensors that do not change could not be written ({error})") from error


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint is written from; nothing of it changes while training goes on."""

    run_dir: Path
    keep: int
    state: dict[str, Any]  # of `state.json`, but for the sizes of the files
    config: CLAPConfig
    tokenizer: Tokenizer | None
    card: str
    tensors: dict[tuple[str, str], Tensor]  # by file and name
    frozen: Frozen | None = None  # what is left out


class Written(NamedTuple):
    """A checkpoint that has been written."""

    size: int  # bytes
    seconds: float


class Saver:
    """Writes the checkpoints of a run, in a thread of its own while training goes on.

    A save copies the weights, the optimizer's state and the average to the host, into memory that is kept from save to
    save; then the thread writes, flushes, renames, and removes what is older than the `keep` newest. At most one write
    is in flight: the next save waits for it. Where the host lacks the memory for a copy, training waits for the write.

    Args:
        say: shows a line to the person who watches; never called by the thread.
        frozen: what checkpoints leave out.
        saved: step of the newest checkpoint that there is.
    """

    def __init__(self, say: Callable[[str], None], frozen: Frozen | None = None, saved: int = 0) -> None:
        self._say, self._frozen = say, frozen
        self._saved, self._failed = saved, -1  # steps
        self._changes: tuple[Path, dict[str, Any]] | None = None  # of a state, for when it is written
        self._memory = HostMemory()
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=_step_aside)
        self._writing: Future[Written] | None = None
        self._step, self._paused, self._lacking = 0, 0.0, ""
        self._tokenizer: Tokenizer | None = None

    def save(self, step: Step, totals: dict[str, Any], tags: list[str] | None, data: str, *, required: bool) -> None:
        """Write `checkpoints/step-<number>` of the run folder.

        The main rank writes; every rank calls this, because sharded tensors are put together here.

        Args:
            step: model, optimizer, average and configuration.
            totals: sums of the log interval, by name.
            tags: the tags of the tag loss, in the order of its columns; None: there are none.
            data: fingerprint of the rows that are trained on.
            required: wait until the checkpoint is on the disk.

        Raises:
            TrainingError: the disk refused a required one. What was there before is untouched and the partial folder
                removed. Of the others a warning says so, once the write has failed.
        """
        begin = time.perf_counter()
        self.report(wait=True)
        tensors, lacking = self._copied(step)
        if not step.world.is_main:
            return
        model, config = step.model, step.config
        if self._tokenizer is None:  # the thread's own, because writing it changes it for a moment
            self._tokenizer = copy.deepcopy(model.tokenizer)
        state = {
            "format": FORMAT,
            "step": step.number,
            "config": config.to_dict(),
            "world_size": step.world.size,
            "totals": totals,
            "chunk_sizes": copy.copy(step.objective.chunk_sizes),
            "tags": tags,
            "data": data,
            "threads": torch.get_num_threads(),
            "finished": False,
        }
        card = model_card(model.facts) if model.card is None else model.card
        snapshot = Snapshot(
            Path(config.run_dir), config.keep, state, model.config, self._tokenizer, card, tensors, self._frozen
        )
        self._step, self._lacking = step.number, lacking
        self._writing = self._thread.submit(write_checkpoint, snapshot)
        if lacking:
            futures.wait([self._writing])
        self._paused = time.perf_counter() - begin
        if required:
            self.report(wait=True, required=True)

    def report(self, *, wait: bool = False, required: bool = False) -> None:
        """Say how the last save went, if it is over and this has not been said; with `wait`, once it is over.

        Raises:
            TrainingError: a `required` one has failed; of others a warning says so.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return
        futures.wait([self._writing])
        writing, self._writing = self._writing, None
        try:
            written = writing.result()
        except TrainingError as error:
            self._failed = self._step
            if required:
                raise
            self._say(f"warning: {error}; training goes on")
            return
        self._saved = self._step
        line = f"checkpoint at step {self._step}: paused {self._paused:.1f} s, written in {written.seconds:.1f} s"
        reason = f"; training waited, because {self._lacking}" if self._lacking else ""
        self._say(f"{line} ({_bytes(written.size)}){reason}")
        self._amend()

    def is_settled(self, step: int) -> bool:
        """Whether the checkpoint of this step is on the disk, or could not be written."""
        self.report(wait=True)
        return step in (self._saved, self._failed)

    def amend(self, step: Step, **changes: Any) -> None:
        """Change entries of the state in the checkpoint of this step, once it is written and if there is one."""
        if step.world.is_main:
            self._changes = (Path(step.config.run_dir) / "checkpoints" / f"step-{step.number}" / _STATE, changes)
            self._amend()

    def _amend(self) -> None:
        if self._writing is not None or self._changes is None:
            return
        (path, changes), self._changes = self._changes, None
        if path.exists():
            try:
                write_atomic(path, json.dumps({**read_json(path), **changes}, indent=1).encode())
            except (OSError, DataError) as error:
                self._say(f"warning: {path}: could not be brought up to date ({error}); training goes on")

    def close(self) -> None:
        """Wait for the write in flight and say how it went."""
        self.report(wait=True)
        self._thread.shutdown()

    def _copied(self, step: Step) -> tuple[dict[tuple[str, str], Tensor], str]:
        """On the main rank the tensors by file and name, copied to the host; and why they are not copied, if so."""
        device, is_main, lacking = step.world.device, step.world.is_main, ""
        tensors = {(file, name): x for file, held in _contents(step, self._frozen).items() for name, x in held.items()}
        places: dict[tuple[str, str], Tensor] = {}
        if is_main:
            try:
                places = self._memory.like(tensors, pinned=device.type == "cuda")
            except MemoryError as error:
                lacking = str(error)
        copies = {}
        for key, tensor in tensors.items():  # one at a time, so that no rank holds all of a sharded model
            tensor = whole({"": tensor})[""]
            if is_main:
                copies[key] = places[key].copy_(tensor, non_blocking=True) if places else tensor
        if device.type == "cuda":
            # One wait for all copies. A stream of their own would be waited for just the same: the next optimizer step
            # changes these tensors.
            torch.cuda.current_stream(device).synchronize()
        return copies, lacking


def write_checkpoint(snapshot: Snapshot) -> Written:
    """Write a checkpoint, then remove all but the `keep` newest. safetensors writes without Python's lock.

    Raises:
        TrainingError: the disk refused the write. What was there before is untouched and the partial folder removed.
    """
    begin = time.perf_counter()
    root, name = snapshot.run_dir / "checkpoints", f"step-{snapshot.state['step']}"
    final, partial = root / name, root / f"{_TEMPORARY}{name}"
    weights, trainer = (
        {name: tensor for (file, name), tensor in snapshot.tensors.items() if file == wanted}
        for wanted in (WEIGHTS_FILE, _TRAINER)
    )
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        write_model(partial, snapshot.config, weights, snapshot.tokenizer, snapshot.card)
        save_file({key: tensor.contiguous().cpu() for key, tensor in trainer.items()}, partial / _TRAINER)
        if snapshot.frozen is not None:
            (partial / FROZEN_NOTE).write_text(json.dumps(snapshot.frozen.note))
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        (partial / _STATE).write_text(json.dumps({**snapshot.state, "files": sizes}, indent=1))
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
    for old in checkpoints(snapshot.run_dir)[: -snapshot.keep]:
        shutil.rmtree(old, ignore_errors=True)
    return Written(sum(sizes.values()), time.perf_counter() - begin)


def _contents(step: Step, frozen: Frozen | None = None) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file by name; the optimizer's state is named `<state>/<parameter name>`.

    What does not change is left out of the weights, and of their average, which equals them there to the last bit.
    The queue of the loss is that of every rank, so that a run may go on with another number of them.
    """
    left_out = frozenset() if frozen is None else frozen.names
    weights = {name: tensor for name, tensor in step.model.state_dict().items() if name not in left_out}
    trainer = {
        f"{key}/{name}": torch.as_tensor(value)
        for name, parameter in step.model.named_parameters()
        for key, value in step.optimizer.state.get(parameter, {}).items()
    }
    if step.queue is not None:
        trainer |= {f"{_QUEUE}{name}": value for name, value in step.queue.state_dict().items()}
    if step.mean is not None:
        trainer |= {f"{_MEAN}{name}": step.mean.tensors[name] for name in weights}
    trainer |= {f"{_TOWER}{name}": x for name, x in step.model.audio_branch.training_state().items()}
    if step.average is None:
        return {WEIGHTS_FILE: weights, _TRAINER: trainer}
    averaged = {name: step.average.tensors[name] for name in weights}
    return {WEIGHTS_FILE: averaged, _TRAINER: trainer | {f"weights/{n}": x for n, x in weights.items()}}


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _step_aside() -> None:
    """Give other threads and processes, the loader's above all, precedence over this thread."""
    if sys.platform == "linux":  # elsewhere this is the whole process's
        os.nice(10)


class HostMemory:
    """Memory on the host for copies of tensors, kept from one save to the next.

    torch rounds page-locked memory up to a power of two, up to twice what a tensor takes; so they share blocks of 1 GiB
    (a larger tensor has one of its own).
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def like(self, tensors: Mapping[Key, Tensor], *, pinned: bool) -> dict[Key, Tensor]:
        """A tensor on the host for each of these, with its shape (as a whole, if it is sharded) and dtype.

        Args:
            tensors: by key.
            pinned: whether the memory is page-locked, for fast copies from a GPU.

        Raises:
            MemoryError: the host has less memory left than that; says so in words.
        """
        places: dict[Key, tuple[int, int]] = {}  # block and first byte in it: the first that fits, largest tensor first
        ends: list[int] = []
        for key, tensor in sorted(tensors.items(), key=lambda item: item[1].nbytes, reverse=True):
            size = -(-tensor.nbytes // 64) * 64  # any dtype may begin there
            block = next((i for i, end in enumerate(ends) if end + size <= _BLOCK_BYTES), len(ends))
            ends += [0] * (block == len(ends))
            places[key] = block, ends[block]
            ends[block] += size
        if ends != [len(block) for block in self._blocks]:  # the first save, or a state has come into being since
            self._blocks = []
            self._blocks = _allocate(ends, pinned)
        return {
            key: self._blocks[block][begin : begin + tensors[key].nbytes]
            .view(tensors[key].dtype)
            .view(tensors[key].shape)
            for key, (block, begin) in places.items()
        }


def _allocate(sizes: list[int], pinned: bool) -> list[Tensor]:
    available = free_memory()
    if available is not None and sum(sizes) > available:  # Linux would promise it, and end the process later
        raise MemoryError(f"a copy takes {_bytes(sum(sizes))} of host memory, of which {_bytes(available)} are left")
    try:
        return [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
    except RuntimeError as error:  # torch's own for an allocation that failed
        reason = str(error).splitlines()[0]
        raise MemoryError(f"a copy takes {_bytes(sum(sizes))} of host memory, which it refused ({reason})") from error


def checkpoints(run_dir: Path) -> list[Path]:
    """All visible checkpoints of a run, oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def average_checkpoints(run_dir: Path, last: int, target: Path) -> list[int]:
    """Write a model of averaged weights from the `last` newest checkpoints; returns their steps.

    With the mean of the run in them (`--optimizer.average-every`), it is the mean over all that was averaged after the
    oldest of these checkpoints up to the newest: with means m and numbers of steps n, (n₁·m₁ − n₀·m₀) / (n₁ − n₀), as
    icefall's `average_checkpoints_with_averaged_model`; of one checkpoint, the mean since the start. Else it is the
    mean of the checkpoints' weights.

    Sums are in float64; tensors that are not floating are the newest ones. Adapters are added to their layers.

    Raises:
        ModelError: there are fewer checkpoints, one is damaged, nothing was averaged between them, or `target` holds
            other files.
        TrainingError: the disk refused the write.
    """
    paths = checkpoints(run_dir)[-last:]
    if last < 1 or len(paths) < last:
        found = ", ".join(path.name for path in paths) or "none"
        raise ModelError(
            f"{run_dir}: asked for the average of {last} checkpoints, found {found}; a run keeps as many as --keep says"
        )
    states = [read_state(path) for path in paths]
    steps = [int(state["step"]) for state in states]
    every = states[-1]["config"]["optimizer"].get("average_every", 0)
    model = CLAP.from_pretrained(paths[-1])
    means = _mean_of_steps(paths, steps, every, model) if every else _mean_of_weights(paths, model)
    try:
        model.save_pretrained(target, state_dict={**merged(model.state_dict(), model.config), **means})
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{target}: the average could not be written ({error})") from error
    return steps


def _mean_of_weights(paths: list[Path], model: CLAP) -> dict[str, Tensor]:
    """Of the checkpoints, which are of this model; floating tensors only, without adapters."""
    newest = merged(model.state_dict(), model.config)
    sums = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in newest.items() if x.is_floating_point()}
    for path in paths:
        weights = load_weights(path)
        check_weights(model, weights, path)
        weights = merged(weights, model.config)
        for name, held in sums.items():
            held += weights[name]
    return {name: (held / len(paths)).to(newest[name].dtype) for name, held in sums.items()}


def _mean_of_steps(paths: list[Path], steps: list[int], every: int, model: CLAP) -> dict[str, Tensor]:
    """Of the weights averaged after the oldest checkpoint, up to the newest; of one checkpoint, since the start.

    Floating tensors only, without adapters, whose factors are averaged each by itself.
    """
    end, start = steps[-1] // every * every, steps[0] // every * every if len(paths) > 1 else 0
    if end == start:
        raise ModelError(
            f"{paths[-1]}: the weights were averaged every {every} steps, and not after step {start}; ask for more "
            "checkpoints, or save them less often than that"
        )
    sums: dict[str, Tensor] = {}
    for path, count in ((paths[-1], end), (paths[0], -start)):
        if count:
            with safe_open(path / _TRAINER, "pt") as file:
                names = [name for name in file.keys() if name.startswith(_MEAN)]  # noqa: SIM118 - no mapping
                held = {name.removeprefix(_MEAN): file.get_tensor(name) for name in names}
            check_weights(model, load_weights(path) | held, path)
            for name, mean in held.items():
                if mean.is_floating_point():
                    sums[name] = sums.get(name, 0) + mean.double() * (count / (end - start))
    weights = model.state_dict()
    means = merged(weights | {name: held.to(weights[name].dtype) for name, held in sums.items()}, model.config)
    return {name: mean for name, mean in means.items() if mean.is_floating_point()}


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, after checking that each of its files is there in full, and the file it shares.

    Raises:
        ModelError: a file is missing, truncated or of an unknown format.
    """
    state = read_json(path / _STATE, ModelError)
    sizes = state.get("files") if isinstance(state, dict) else None
    if not isinstance(sizes, dict):
        raise ModelError(f"{path / _STATE}: not the state of a checkpoint; the checkpoint is damaged")
    if state.get("format") != FORMAT:
        raise ModelError(f"{path}: checkpoint format {state.get('format')!r}; this version reads format {FORMAT}")
    for name, size in sizes.items():
        actual = (path / name).stat().st_size if (path / name).exists() else None
        if actual != size:
            found = "missing" if actual is None else f"{actual} bytes long"
            raise ModelError(f"{path / name}: {found}, but {size} bytes were written; the checkpoint is damaged")
    find_frozen(path, verify=False)
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
    weights = load_weights(path) | under_training
    check_weights(model, weights, path)
    model.load_state_dict(weights)


def restore_step(path: Path, step: Step) -> None:
    """Load optimizer state, averages and queue of a checkpoint in place, bit for bit; sharded as the model is."""
    trainer = load_state_dict_file(path / _TRAINER)
    if step.queue is not None:
        step.queue.load_state_dict({n.removeprefix(_QUEUE): x for n, x in trainer.items() if n.startswith(_QUEUE)})
    if step.average is not None:
        step.average.load(load_weights(path))
    held = {name.removeprefix(_TOWER): x for name, x in trainer.items() if name.startswith(_TOWER)}
    step.model.audio_branch.load_training_state(held)
    if step.mean is not None:
        means = {name.removeprefix(_MEAN): value for name, value in trainer.items() if name.startswith(_MEAN)}
        step.mean.load(load_weights(path) | means)
    for name, parameter in step.model.named_parameters():
        state = {key: trainer[f"{key}/{name}"] for key in state_names(step.optimizer) if f"{key}/{name}" in trainer}
        if state:  # whole numbers belong to the host
            step.optimizer.state[parameter] = {
                key: placed_like(parameter, value) if value.is_floating_point() else int(value)
                for key, value in state.items()
            }
