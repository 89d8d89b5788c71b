"""A training run: everything it is made of, prepared once, and what is done with all of it: validate, save, export."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastclap.audio import AudioError, AudioFile, whole_clip
from fastclap.data import Batch, BatchSampler, ClipDataset, Manifest, Quarantine, load_manifest, make_loader
from fastclap.data.demo_voices import write_demo
from fastclap.data.rows import check_column, with_fine_captions, within_seconds
from fastclap.data.tags import TagPrompts
from fastclap.errors import ConfigError, DataError, FastclapError, TrainingError
from fastclap.evaluation import ClassificationTask, caption_sets, evaluate, write_report
from fastclap.evaluation.evaluate import candidate_classes
from fastclap.fork_server import fork_server
from fastclap.models.audio_towers import LogMelTower
from fastclap.models.clap import CLAP
from fastclap.models.tokenizer import train_tokenizer
from fastclap.prompts import load_prompts
from fastclap.train import checkpoint, distributed, memory
from fastclap.train import frozen as frozen_towers
from fastclap.train.best import Best, comparable_figures
from fastclap.train.config import TrainConfig, ValidConfig
from fastclap.train.distributed import World
from fastclap.train.journal import Journal
from fastclap.train.meter import Meter, build_meter
from fastclap.train.step import Step, applied, frozen

_STATISTICS_CLIPS = 512  # plenty for a mean and a deviation
_CLIPS_TO_TRY = 32


@dataclass(frozen=True)
class Run:
    """A run, ready for its next step; `prepare` makes it."""

    config: TrainConfig
    world: World
    model: CLAP
    step: Step
    tags: TagPrompts | None  # of the tag loss
    valid: Manifest | None
    kept: frozen_towers.Kept  # of frozen towers
    loader: Iterable[Batch]
    quarantine: Quarantine
    meter: Meter
    journal: Journal
    saver: checkpoint.Saver
    data: str  # fingerprint of the rows to train on
    was_finished: bool  # an earlier start had come to the end

    @property
    def folder(self) -> Path:
        """Where everything that the run writes goes."""
        return Path(self.config.run_dir)

    @property
    def model_folder(self) -> Path:
        """Where the model of the last step goes."""
        return self.folder / "model"

    @property
    def best_folder(self) -> Path:
        """Where the model of the best validation goes."""
        return self.folder / "best"

    @property
    def is_finished(self) -> bool:
        """Whether an earlier start has done all that belongs to the end of the run."""
        return self.was_finished and self.model_folder.exists()

    def is_to_validate(self, step: int) -> bool:
        """Whether a validation follows this step, which is not the last."""
        every = self.config.valid_every
        return 0 < step < self.config.steps and every > 0 and step % every == 0

    def validate(self) -> None:
        """Retrieval and zero-shot classification with the weights to use, which are kept if they are the best so far.

        The ranks share the work; every one of them calls this. A checkpoint of this step learns of it.
        """
        if self.valid is None:
            return
        config = self.config.valid
        with applied(self.step.average):
            figures = evaluate(
                self.model,
                self.valid,
                tasks=classification_tasks(config, self.valid),
                batch_size=config.batch_size,
                process_group=self.world.group,
                known=self.kept.known,
            )
        if self.journal.write_validation(self.step.number, figures):
            try:
                self.export(self.best_folder)
            except TrainingError as error:
                self.journal.say(f"warning: {error}; training goes on")
            else:
                self.journal.say(f"the best so far: {self.journal.best}   model: {self.best_folder}")
        self.saver.amend(self.step, totals=self.journal.state())

    def save(self, *, required: bool) -> None:
        """Write a checkpoint (every rank calls this): a required one before this returns, or the run ends."""
        tags = None if self.tags is None else self.tags.vocabulary
        self.saver.save(self.step, self.journal.state(), tags, self.data, required=required)

    def finish(self) -> None:
        """Export the model at the end of the run, and write its report."""
        self.export(self.model_folder)
        if self.world.is_main:
            try:
                write_report(self.folder / "report", run=self.folder)
            except (FastclapError, OSError) as error:
                self.journal.say(f"warning: the report could not be written ({error}); `fastclap report` makes it")
        self.saver.amend(self.step, finished=True)

    def rescue(self, error: BaseException) -> None:
        """Save what the run has reached before an error ends it, where that is possible. Never fails itself."""
        if type(error) is KeyboardInterrupt or not self.world.is_main:  # a second Ctrl-C is not to wait for a disk
            return
        alarm = self.world.alarm
        try:
            with alarm.saving if alarm is not None else contextlib.nullcontext():
                with contextlib.suppress(FastclapError):
                    self.journal.report()
                if self.saver.is_settled(self.step.number):
                    return
                if self.config.shard or not self.step.between_steps:
                    self.journal.say("warning: the steps since the last checkpoint could not be saved")
                    return
                self.journal.say(f"saving what was reached, after step {self.step.number}")
                self.save(required=True)
        except Exception as failure:
            self.journal.say(f"warning: what was reached could not be saved: {failure}")

    def export(self, folder: Path) -> None:
        """Write the model to use; an older one in the folder stays until the new one is complete."""
        with applied(self.step.average):
            weights = distributed.whole(self.model.state_dict())
            if not self.world.is_main:
                return
            try:
                self.model.save_pretrained(folder, state_dict=weights, run=self.folder)
            except (OSError, SafetensorError) as error:
                raise TrainingError(
                    f"{folder}: the model could not be written ({error}); the checkpoints hold it"
                ) from error


def prepare(config: TrainConfig, world: World, stopping: Callable[[], bool] = lambda: False) -> Run:
    """Read the data, build the model and its step, and take over the state of the run to continue, if there is one.

    Args:
        config: of the run.
        world: this process.
        stopping: whether to give up waiting for a batch.

    Raises:
        ConfigError, DataError, ModelError: as `fastclap.train.loop.train` says.
    """
    make_demo_data(config, world)
    config.check(world.size)

    # Rank 0 chooses, so that all ranks continue from the same place.
    found = distributed.agree(lambda: checkpoint.find_checkpoint(config), world)
    resume_path, state = found if found is not None else (None, None)
    start_step = int(state["step"]) if state else 0
    threads = set_threads(config, world, state)
    if config.data.workers and not config.model.audio.freeze:  # a frozen tower's clips are seldom loaded
        fork_server()  # it imports torch while this process builds the model; no sooner, or its core counts as busy

    # Data: a pure function of (seed, step).
    torch.manual_seed(config.seed)
    data = config.data
    manifest, valid, left_out = read_manifests(config)
    data_read = check_data(config, manifest, valid, state)
    sampler = BatchSampler(
        manifest,
        config.batch_size,
        seed=config.seed,
        bucket_by_length=data.bucket_by_length,
        batch_seconds=data.batch_seconds,
        max_seconds=data.crop_seconds,
        balance=data.balance,
        tag_column=data.tag_column,
        rare_clips=data.rare_clips,
        rank=world.rank,
        world_size=world.size,
        start_step=start_step * config.accumulate,
    )
    if config.epochs:
        config.steps = max(1, config.epochs * sampler.batches_per_epoch // config.accumulate)
    sampler.stop_step = config.steps * config.accumulate
    tags = find_tags(config, manifest, state)
    best = best_validation(config, valid, state)

    # The model, and the weights that it continues from.
    model = build_model(config, manifest, resume_path)
    meter = build_meter(config, model, world)
    model = model.to(world.device)
    if resume_path is not None:
        checkpoint.restore_weights(resume_path, model, averaged=config.optimizer.ema_decay > 0)
    distributed.broadcast_weights(model, world)
    teacher = load_teacher(config, model, world)
    dataset = ClipDataset(
        manifest,
        model.sampling_rate,
        crop_seconds=data.crop_seconds,
        seed=config.seed,
        caption=data.captions,
        cache_mb=data.cache_mb,
        file_statistics=any(each.config.audio.kind == "wav2vec2" for each in (model, teacher) if each is not None),
        tokenize=loader_tokenizer(model),
        tags=tags,
        repeats=data.balance != "none",
        pad_to_crop=data.pad_to_crop,
    )
    if resume_path is None:
        fit_feature_statistics(model, dataset, world)
    quarantine = Quarantine(Path(config.run_dir) / "quarantine.jsonl", len(manifest), data.max_bad_share)
    with meter.paused():
        kept = frozen_towers.keep(model, config, world, dataset, valid, quarantine, other_teacher=teacher is not None)
    towers: list[Any] = [model.audio_branch, model.text_branch]
    model.set_frozen(config.optimizer.unfreeze_step == 0)  # what will ever train, and the memory that it will need
    unchanging = checkpoint.keep_frozen(config, model, world, resume_path)
    plan = memory.plan(model, manifest, config, world)
    model.set_frozen(True)
    for tower in towers:
        tower.prepare_training(compile=config.compiles(world.device.type), checkpoint=plan.checkpoint)
    at_rest = [tower for tower, table in zip(towers, (kept.clips, kept.texts), strict=True) if table is not None]
    at_work = [tower for tower in towers if tower not in at_rest]
    sharded = distributed.shard(at_work, world) if config.shard else []

    # The step, and the state of the optimizer and of the average that it continues from.
    chunk_sizes = (state or {}).get("chunk_sizes") or [plan.chunk_size] * 2
    step = Step(
        model,
        config,
        world,
        sharded=sharded,
        teacher=teacher,
        at_rest=at_rest,
        number=start_step,
        chunk_sizes=chunk_sizes,
    )
    if resume_path is not None:
        checkpoint.restore_step(resume_path, step)

    journal = Journal(config, world, meter, state, best)
    journal.say(opening_line(config, model, manifest, valid, start_step))
    for line in (threads, *left_out, plan.text, *kept.text):
        if line:
            journal.say(line)
    on_gpu = world.device.type == "cuda"
    workers = data.workers if kept.clips is None else 0
    loader = make_loader(
        kept.dataset(dataset),
        sampler,
        num_workers=workers,
        prefetch=data.prefetch,
        pin_memory=on_gpu,
        timeout=data.worker_timeout,
        stopping=stopping,
    )
    saver = checkpoint.Saver(journal.say, unchanging, saved=start_step)
    return Run(
        config,
        world,
        model,
        step,
        tags,
        valid,
        kept,
        kept.loader(loader),
        quarantine,
        meter,
        journal,
        saver,
        data_read,
        state is not None and bool(state.get("finished", True)),
    )


def make_demo_data(config: TrainConfig, world: World) -> None:
    """Fill in the manifests of a run on procedural voices, generating the clips on rank 0 if they are not there."""
    if not config.data.demo_clips or config.data.train:
        return
    folder = Path(config.run_dir) / "data"
    if world.is_main:
        if not (folder / "valid.jsonl").exists():
            print(f"making {config.data.demo_clips} demo clips in {folder}", flush=True)
        write_demo(str(folder), config.data.demo_clips, max(120, config.data.demo_clips // 8), seed=config.seed)
    distributed.barrier(world)
    config.data.train, config.data.valid = [str(folder / "train.jsonl")], [str(folder / "valid.jsonl")]


def set_threads(config: TrainConfig, world: World, state: dict[str, Any] | None) -> str:
    """Set torch's threads: those of the flag, of the checkpoint, or without a GPU the cores that are free.

    A parallel part of a step ends with its slowest thread, and one that shares its core with another process takes
    twice as long or longer: a step beside busy processes is faster without it.

    Returns:
        What to tell the user; "": nothing.
    """
    before = config.threads or (state or {}).get("threads", 0)
    if before:
        torch.set_num_threads(before)
        return ""
    most = torch.get_num_threads()
    if world.device.type != "cpu" or most == 1 or "OMP_NUM_THREADS" in os.environ:
        return ""
    busy = busy_cores()
    torch.set_num_threads(max(1, most - round(busy)))
    if torch.get_num_threads() == most:
        return ""
    return f"{torch.get_num_threads()} of {most} CPU threads, as other processes keep {busy:.1f} cores busy (--threads)"


def busy_cores(seconds: float = 0.1) -> float:
    """Of the cores that this process may use, how many others keep busy, but for those of lower priority.

    Found by waiting so long; 0 where the system does not say (Linux does).
    """

    def ticks() -> float:
        with open("/proc/stat") as lines:
            fields = [line.split() for line in lines if line.startswith("cpu")][1:]
        mine = os.sched_getaffinity(0)
        # user, system, interrupts, and what a virtual machine's host took
        return sum(sum(int(x[i]) for i in (1, 3, 6, 7, 8)) for x in fields if int(x[0][3:]) in mine)

    try:
        begin, first, own = time.monotonic(), ticks(), sum(os.times()[:2])
        time.sleep(seconds)
        taken = (ticks() - first) / os.sysconf("SC_CLK_TCK") - (sum(os.times()[:2]) - own)
        return max(0.0, taken / (time.monotonic() - begin))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def read_manifests(config: TrainConfig) -> tuple[Manifest, Manifest | None, list[str]]:
    """The manifest to train on, the one to validate on, if there is one, and what was left out of the former."""
    data = config.data
    manifest = load_manifest(
        data.train, audio_root=data.audio_root, columns=data.columns, mix=data.mix, probabilities=data.probabilities
    )
    left_out, total = [], len(manifest)
    if data.min_seconds or data.max_seconds is not None:
        longest = math.inf if data.max_seconds is None else data.max_seconds
        manifest = within_seconds(manifest, data.min_seconds, longest)
        left_out.append(
            f"left out: {total - len(manifest)} of {total} clips, shorter than {data.min_seconds:g} s or longer than "
            f"{longest:g} s"
        )
    if data.fine_characters is not None:
        total = len(manifest)
        manifest = with_fine_captions(manifest, *data.fine_characters)
        first, last = data.fine_characters
        left_out.append(
            f"left out: {total - len(manifest)} of {total} clips without a fine caption of {first} to {last} characters"
        )
    valid = load_manifest(data.valid, audio_root=data.audio_root, columns=data.columns) if data.valid else None
    return manifest, valid, left_out


def check_data(config: TrainConfig, manifest: Manifest, valid: Manifest | None, state: dict[str, Any] | None) -> str:
    """The fingerprint of what is trained on, after a look at all that only a later step would stumble over.

    Raises:
        ConfigError: the rows are not those that the run has begun with, or a manifest lacks a column.
        DataError: prompts, templates or the clips to validate on are unusable.
    """
    fingerprint = manifest.fingerprint()
    before = (state or {}).get("data", fingerprint)
    if before != fingerprint:
        raise ConfigError(
            f"{', '.join(config.data.train)}: the rows, their captions or tags are not those of the checkpoint; the "
            "run would not go on as it began; give the manifests of that run, or another --run-dir with --init-from"
        )
    check_column(manifest, config.data.tag_column, "--data.tag-column")
    if valid is not None:
        for column in config.valid.classify:
            if column != "classification_tag":
                check_column(valid, column, "--valid.classify")
        for task in classification_tasks(config.valid, valid):
            candidate_classes(valid, task)
        check_some_clips(valid)
    return fingerprint


def check_some_clips(manifest: Manifest) -> None:
    """Raise DataError if no clip of a manifest can be used, as far as a few of them, evenly spread, tell."""
    reasons = []
    for row in manifest[:: max(1, len(manifest) // _CLIPS_TO_TRY)]:
        if row.packed is not None:  # whose clips were all usable
            return
        try:
            with AudioFile(row.audio) as clip:
                whole_clip(clip)
            return
        except AudioError as error:
            reasons.append(str(error))
    raise DataError(f"--data.valid: none of {len(reasons)} clips that were tried can be used; the first: {reasons[0]}")


def classification_tasks(config: ValidConfig, manifest: Manifest) -> list[ClassificationTask]:
    """The columns to classify in a validation: those asked for that the manifest has."""
    columns = [column for column in config.classify if column in manifest.tag_columns]
    prompts = {c: load_prompts(config.prompts, c) for c in columns} if config.prompts else {}
    return [ClassificationTask(c, config.template, prompts.get(c) or None) for c in columns]


def best_validation(config: TrainConfig, valid: Manifest | None, state: dict[str, Any] | None) -> Best:
    """What compares the validations of a run, as far as an earlier start has come.

    Raises:
        ConfigError: `valid.best` is no figure of this manifest's validation.
    """
    figures: dict[str, tuple[str, ...]] = {}
    if config.valid.best is not None and valid is not None:
        tasks = classification_tasks(config.valid, valid)
        figures = comparable_figures(caption_sets(valid), [task.column for task in tasks])
    return Best(config.valid, figures, state["totals"].get("best") if state else None)


def find_tags(config: TrainConfig, manifest: Manifest, state: dict[str, Any] | None) -> TagPrompts | None:
    """The vocabulary and prompts of the tag loss, if the run has one; on resume the vocabulary must be the saved one.

    Raises:
        ConfigError: the manifest's tags are no longer those of the checkpoint.
        DataError: no clip has a tag, or the file of prompts is unusable.
    """
    if not config.loss.tag_weight or config.data.tag_column is None:
        return None
    tags = TagPrompts(manifest, config.data.tag_column, config.loss.tag_prompts, seed=config.seed)
    before = set((state or {}).get("tags") or tags.vocabulary)
    changed = sorted(before ^ set(tags.vocabulary))
    if changed:
        raise ConfigError(
            f"--data.train: the tags in {config.data.tag_column} have changed since the checkpoint "
            f"({', '.join(changed[:5])}); continue on the manifest of that run, or name another --run-dir"
        )
    return tags


def build_model(config: TrainConfig, manifest: Manifest, resume_path: Path | None) -> CLAP:
    """The model to train; with `init_from` (and on resume) its architecture and vocabulary come from the folder."""
    source = resume_path or config.init_from
    if source:
        model = CLAP.from_pretrained(source)
        model.card = None  # it describes the weights that training starts from
        if config.init_from:  # else it stays as it was asked for, which is what a further start compares
            config.model = model.config
            if resume_path is None:
                model.audio_branch.go_on_training()
        return model
    tokenizer = None
    if config.model.text.kind == "small":
        captions = sorted({text for row in manifest for text in (*row.captions, *row.fine_captions)})
        tokenizer = train_tokenizer(captions, config.model.text.vocab_size)
    return CLAP(config.model, tokenizer)


def load_teacher(config: TrainConfig, model: CLAP, world: World) -> CLAP | None:
    """The frozen teacher of a self-distillation, on the device; None: there is none, or it is the moving average.

    Raises:
        ConfigError: it takes audio of another sampling rate.
    """
    source = config.init_from if config.loss.teacher == "init" else config.loss.teacher
    if source is None or source == "ema":
        return None
    teacher = CLAP.from_pretrained(source).to(world.device)
    if teacher.sampling_rate != model.sampling_rate:
        raise ConfigError(
            f"--loss.teacher {source} takes audio at {teacher.sampling_rate} Hz and the model at "
            f"{model.sampling_rate} Hz; both see the same clips, so choose a teacher of the same rate"
        )
    return frozen(teacher)


def loader_tokenizer(model: CLAP) -> Callable[[list[str]], dict[str, Tensor]] | None:
    """What loader processes tokenize with; None: the model has no tokenizer."""
    return None if model.tokenizer is None else partial(model.tokenizer, max_tokens=model.config.text.max_tokens)


def fit_feature_statistics(model: CLAP, dataset: ClipDataset, world: World) -> None:
    """Set a from-scratch tower's feature normalisation from clips spread over the manifest, alike on every rank."""
    tower = model.audio_branch
    if not isinstance(tower, LogMelTower) or tower.config.feature_normalization == "clip":
        return
    if world.is_main:
        rows = list(range(0, len(dataset.manifest), max(1, len(dataset.manifest) // _STATISTICS_CLIPS)))
        batches = (dataset[(0, 0, rows[first : first + 32])].to(world.device) for first in range(0, len(rows), 32))
        tower.fit_feature_statistics((batch.audio, batch.lengths) for batch in batches if batch.audio is not None)
    distributed.broadcast_weights(tower, world)


def opening_line(config: TrainConfig, model: CLAP, manifest: Manifest, valid: Manifest | None, start_step: int) -> str:
    """The first line of the log: the size of model, data and batch, and the step that the run begins after."""
    parameters, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or whole) / 1e6 for whole in (True, False)
    )
    part = f" ({trained:.2f} M train)" if trained < parameters else ""
    chunks = f" in chunks of {config.chunk_size}" if config.chunk_size not in (0, "auto") else ""
    start = f"resumed at step {start_step}" if start_step else "from step 0"
    held_out = f", {len(valid)} to validate" if valid is not None else ""
    return (
        f"{parameters:.2f} M parameters{part}, {len(manifest)} clips to train on{held_out}, "
        f"batch {config.batch_size}{chunks}, {start}"
    )
