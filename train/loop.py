"""The training loop, to be read from top to bottom.

A run is a function of its configuration. The data order, crops and captions follow from (seed, step), and so do
dropout and every other random number: all generators are seeded anew before each step from (seed, step, rank). A
resumed run therefore needs no stored generator state and repeats the uninterrupted one bit for bit on the same kind of
device.

The loop does not wait for the device between log lines. Losses, norms and the verdict "this step is not finite" stay
there as tensors; the optimizer reads the verdict itself (the ``found_inf`` argument of the fused kernel), and one small
copy every ``log_every`` steps brings the numbers back.
"""

from __future__ import annotations

import hashlib
import math
import random
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastclap.data import Batch, BatchSampler, ClipDataset, Manifest, Quarantine, load_manifest, make_loader
from fastclap.data.rows import with_fine_captions
from fastclap.errors import ConfigError, TrainingError
from fastclap.evaluation import ClassificationTask, evaluate, write_report
from fastclap.files import write_atomic
from fastclap.models.clap import CLAP
from fastclap.prompts import load_prompts
from fastclap.train import checkpoint, distributed
from fastclap.train.averaging import WeightAverage, applied
from fastclap.train.config import OptimizerConfig, TrainConfig
from fastclap.train.distributed import World
from fastclap.train.journal import Journal, clock
from fastclap.train.meter import FlopCount, Meter, peak_flops
from fastclap.train.objective import Objective
from fastclap.train.setup import (
    averaged_teacher,
    build_model,
    build_optimizer,
    describe,
    find_checkpoint,
    find_tags,
    fit_feature_statistics,
    load_teacher,
    make_demo_data,
    write_run_files,
)


def train(config: TrainConfig) -> Path:
    """Train as configured and return the folder of the exported model (``run_dir/model``).

    Raises:
        ConfigError: an impossible or, on resume, a changed configuration.
        DataError: unusable manifests, or more unusable clips than ``data.max_bad_share``.
        ModelError: a damaged checkpoint or one of another model.
        TrainingError: too many non-finite steps in a row, or a last checkpoint that could not be written.
    """
    world = distributed.join(config.device)
    try:
        if config.threads:
            torch.set_num_threads(config.threads)
        if world.device.type == "cuda":
            torch.set_float32_matmul_precision(config.matmul_precision)
        return _train(config, world)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory on {world.device} (rank {world.rank}): {error}. Continue with --resume and less at a time: "
            "a smaller --chunk-size (auto finds one by itself in a single process), --checkpoint-activations, "
            "--shard over several processes, or a shorter --data.crop-seconds"
        ) from error
    except RuntimeError as error:
        if not distributed.is_lost_connection(error, world):
            raise
        raise TrainingError(
            f"rank {world.rank} lost the connection to another process ({str(error).splitlines()[0]}). That one's own "
            "last message says why; --resume continues, and torchrun --max-restarts N does so by itself"
        ) from error
    finally:
        distributed.leave(world)


def _train(config: TrainConfig, world: World) -> Path:
    run_dir = Path(config.run_dir)
    make_demo_data(config, run_dir, world)
    config.check()
    if config.batch_size % world.size:
        raise ConfigError(f"--batch-size {config.batch_size} cannot be shared equally by {world.size} processes")

    # What to continue from, if anything. Rank 0 decides, so that all ranks continue from the same place.
    found = distributed.agree(find_checkpoint(config, run_dir) if world.is_main else None, world)
    resume_path, state = found if found is not None else (None, None)
    start_step = int(state["step"]) if state else 0

    # Data: a pure function of (seed, step).
    torch.manual_seed(config.seed)
    manifest = load_manifest(
        config.data.train,
        audio_root=config.data.audio_root,
        columns=config.data.columns,
        mix=config.data.mix,
        probabilities=config.data.probabilities,
    )
    if config.data.fine_characters is not None:
        manifest = with_fine_captions(manifest, *config.data.fine_characters)
    valid = (
        load_manifest(config.data.valid, audio_root=config.data.audio_root, columns=config.data.columns)
        if config.data.valid
        else None
    )
    sampler = BatchSampler(
        manifest,
        config.batch_size,
        seed=config.seed,
        bucket_by_length=config.data.bucket_by_length,
        batch_seconds=config.data.batch_seconds,
        max_seconds=config.data.crop_seconds,
        balance=config.data.balance,
        tag_column=config.data.tag_column,
        rare_clips=config.data.rare_clips,
        rank=world.rank,
        world_size=world.size,
        start_step=start_step * config.accumulate,
    )
    if config.epochs:
        config.steps = max(1, config.epochs * sampler.batches_per_epoch // config.accumulate)
    sampler.stop_step = config.steps * config.accumulate

    tags = find_tags(config, manifest, state)

    # Model, optimizer, and the state they continue from.
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
        crop_seconds=config.data.crop_seconds,
        seed=config.seed,
        caption=config.data.captions,
        cache_mb=config.data.cache_mb,
        file_statistics=any(each.config.audio.kind == "wav2vec2" for each in (model, teacher) if each is not None),
        tokenize=tokenizer_of(model),
        tags=tags,
        repeats=config.data.balance != "none",
        pad_to_crop=config.data.pad_to_crop,
    )
    if resume_path is None:
        fit_feature_statistics(model, dataset, world)
    towers: list[Any] = [model.audio_branch, model.text_branch]
    for tower in towers:
        tower.prepare_training(compile=config.compile, checkpoint=config.checkpoint_activations)
    sharded = distributed.shard(towers, world) if config.shard else []
    optimizer = build_optimizer(model, config.optimizer)
    average = WeightAverage(model, config.optimizer.ema_decay) if config.optimizer.ema_decay else None
    if resume_path is not None:
        checkpoint.restore_trainer(resume_path, model, optimizer, average)
    if config.loss.teacher == "ema" and average is not None:
        teacher = averaged_teacher(model, average)
    gradients = distributed.Gradients(
        [parameter for group in optimizer.param_groups for parameter in group["params"]], world, sharded
    )

    bf16 = config.precision == "bf16" or (config.precision == "auto" and world.device.type == "cuda")
    chunk = first_chunk(config, state, world)
    autocast = torch.bfloat16 if bf16 else None
    objective = Objective(
        model, config.loss, chunk, autocast, world, gradients.held, in_step=config.shard, teacher=teacher
    )
    objective.vocabulary = None if tags is None else tags.vocabulary
    totals = Totals(world.device, state["totals"] if state else None)

    journal = None
    if world.is_main:
        write_run_files(config, run_dir, world)
        journal = Journal(
            run_dir,
            start_step,
            config.steps,
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            config=config.to_dict(),
        )
        journal.say(describe(config, model, manifest, valid, start_step))
    quarantine = Quarantine(run_dir / "quarantine.jsonl", len(manifest), config.data.max_bad_share)

    loader = make_loader(
        dataset,
        sampler,
        num_workers=config.data.workers,
        prefetch=config.data.prefetch,
        pin_memory=world.device.type == "cuda",
    )
    batches = on_device(loader, world.device, quarantine)
    interrupt = Interrupt()
    profiler = Profiler(run_dir, world) if config.profile and world.is_main else None
    model.train()
    step = start_step
    pending: LogStep | None = None
    try:
        while step < config.steps:
            step += 1
            seed_step(config, step, world)
            learning_rate = scheduled(config.optimizer, step, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_scale"]

            loss = torch.zeros((), device=world.device)
            for remaining in reversed(range(config.accumulate)):
                with meter.waiting():
                    batch = next(batches)
                with gradients.held() if remaining else nullcontext():
                    loss += objective(batch, weight=1 / config.accumulate) / config.accumulate
                meter.add(len(batch.rows) * world.size, batch.samples, batch.tokens)
                meter.loaded(len(batch.rows), batch.seconds, config.data.workers)

            # Every rank must take or skip the step alike: the flags are summed together with the gradients.
            flags = torch.stack([(~loss.isfinite()).float(), interrupt.flag(world.device)])
            flags, norm = gradients.finish(flags)
            if config.optimizer.clip_norm:
                gradients.clip_(norm, config.optimizer.clip_norm)
            skip = (flags[0] > 0) | ~norm.isfinite()
            setattr(optimizer, "found_inf", skip.float())  # noqa: B010 - read by the fused kernel, unknown to its class
            optimizer.step()
            gradients.clear()
            model.clamp_logit_scale_()
            if average is not None:
                average.update(step)
            totals.add(loss, norm, skip)
            stop = interrupt.agreed(flags[1], world)
            if profiler is not None:
                profiler.step()

            # On a GPU a line is written a step late: its figures have arrived by then, and the device has more to do.
            if pending is not None:
                report(pending, config, journal, meter)
                pending = None
            if step % config.log_every == 0 or step == config.steps:
                pending = LogStep(step, batch.epoch, learning_rate, totals.harvest(model.logit_scale))
                meter.mark()
            save_now = step % config.save_every == 0 and step != config.steps and not stop
            valid_now = bool(config.valid_every) and step % config.valid_every == 0 and step != config.steps
            on_time = world.device.type == "cpu" or save_now or valid_now or stop or step == config.steps
            if pending is not None and on_time:
                report(pending, config, journal, meter)
                pending = None
            if journal is not None:
                journal.advance(step)
            if valid is not None and valid_now:
                with meter.paused():
                    validate(config, model, average, valid, step, journal, world)
            if save_now:
                with meter.paused():
                    save(
                        config,
                        run_dir,
                        step,
                        model,
                        optimizer,
                        average,
                        objective,
                        totals,
                        journal,
                        world,
                        required=False,
                    )
            if stop:
                save(config, run_dir, step, model, optimizer, average, objective, totals, journal, world, required=True)
                if journal is not None:
                    journal.say(f"stopped by {interrupt.name or 'another process'} at step {step}; --resume continues")
                return run_dir / "model"

        if step > start_step or not (run_dir / "model").exists():
            if valid is not None:
                validate(config, model, average, valid, step, journal, world)
            save(config, run_dir, step, model, optimizer, average, objective, totals, journal, world, required=True)
            export(run_dir, model, average, world)
            if world.is_main:
                write_report(run_dir / "report", run=run_dir)
        if journal is not None:
            journal.say(f"model: {run_dir / 'model'}   report: {run_dir / 'report' / 'report.html'}")
        distributed.barrier(world)
        return run_dir / "model"
    finally:
        interrupt.restore()
        batches.close()
        if profiler is not None:
            profiler.close()
        if journal is not None:
            journal.close()


class HostCopy:
    """A tensor on its way from the device to the host; reading it waits for no later work."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor.detach()
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host


class LogStep(NamedTuple):
    """A step whose line of the log is still to be written."""

    step: int
    epoch: int
    learning_rate: float
    totals: HostCopy


def report(pending: LogStep, config: TrainConfig, journal: Journal | None, meter: Meter) -> None:
    """Write the line of a log step.

    Raises:
        TrainingError: too many steps in a row were not finite; on every rank alike.
    """
    record = Totals.figures(pending.totals)
    if record.pop("worst_run") >= config.max_bad_steps:
        raise TrainingError(
            f"step {pending.step}: {config.max_bad_steps} steps in a row had a non-finite loss or gradient. The "
            "weights are those before them; look at the last batches, or lower --optimizer.learning-rate"
        )
    if journal is not None:
        lap = meter.lap()
        head = {"kind": "train", "step": pending.step, "epoch": pending.epoch, "learning_rate": pending.learning_rate}
        journal.write({**head, **record, "time": lap}, log_line({**head, **record}, lap, config))


class Totals:
    """Sums of a log interval, kept on the device: loss and gradient norm of the steps taken, and the steps skipped."""

    _NAMES = ("loss", "grad_norm", "taken", "skipped", "skipped_in_all", "run", "worst_run")

    def __init__(self, device: torch.device, saved: dict[str, float] | None) -> None:
        start = [(saved or {}).get(name, 0.0) for name in self._NAMES]
        self._sums = torch.tensor(start, dtype=torch.float64, device=device)
        self._kept = torch.tensor([name in ("skipped_in_all", "run") for name in self._NAMES], device=device)

    def add(self, loss: Tensor, norm: Tensor, skip: Tensor) -> None:
        loss_sum, norm_sum, taken, skipped, in_all, run, worst = self._sums.unbind()
        missed = skip.double()
        run = (run + missed) * missed
        self._sums = torch.stack(
            [
                loss_sum + torch.where(skip, 0.0, loss.double()),
                norm_sum + torch.where(skip, 0.0, norm.double()),
                taken + 1 - missed,
                skipped + missed,
                in_all + missed,
                run,
                torch.maximum(worst, run),
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
        return dict(zip(self._NAMES, self._sums.tolist(), strict=True))


class Interrupt:
    """SIGTERM and SIGINT become a wish to stop after the current step; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.wanted = False
        self.name: str | None = None
        self._earlier: deque[HostCopy] = deque()
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.wanted:
            raise KeyboardInterrupt
        self.wanted, self.name = True, signal.Signals(number).name

    def flag(self, device: torch.device) -> Tensor:
        return torch.full((), float(self.wanted), device=device)

    def agreed(self, flags: Tensor, world: World) -> bool:
        """Whether all ranks stop now. Of several ranks: the summed flag of two steps before, so nobody waits."""
        if world.group is None:
            return self.wanted
        self._earlier.append(HostCopy(flags))
        return len(self._earlier) > 2 and bool(self._earlier.popleft().read() > 0)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def seed_step(config: TrainConfig, step: int, world: World) -> None:
    """Seed torch (CPU and GPU), NumPy and Python from (seed, step, rank)."""
    digest = hashlib.blake2b(f"{config.seed}/{step}/{world.rank}".encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    torch.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def scheduled(config: OptimizerConfig, step: int, total: int) -> float:
    """Learning rate of step 1..total: linear warm-up to the peak, then the chosen decay to ``final_share`` of it."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    remaining = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[
        config.schedule
    ]
    return config.learning_rate * (config.final_share + (1 - config.final_share) * remaining)


class Profiler:
    """Traces steps 6 to 8 of this start: ``profile/trace.json`` for a viewer and ``profile/longest.txt`` to read."""

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
        self._profile.step()

    def close(self) -> None:
        self._profile.stop()

    def _write(self, profile: torch.profiler.profile) -> None:
        self._folder.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(self._folder / "trace.json"))
        table = profile.key_averages().table(sort_by=self._order, row_limit=25, max_name_column_width=80)
        write_atomic(self._folder / "longest.txt", table.encode())


def on_device(loader: Iterable[Batch], device: torch.device, quarantine: Quarantine) -> Generator[Batch, None, None]:
    """Batches on the training device; unusable clips found on the way are set aside on disk.

    The host is ahead of the device, so on a stream of its own a copy runs beside the step before.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in loader:
        if batch.bad:
            quarantine.add(batch.bad)
        with torch.cuda.stream(stream):
            moved = batch.to(device, non_blocking=True)
        if stream is not None:
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            moved.record_stream(current)
        yield moved


def tokenizer_of(model: CLAP) -> Callable[[list[str]], dict[str, Tensor]] | None:
    """What loader processes tokenize with."""
    return None if model.tokenizer is None else partial(model.tokenizer, max_tokens=model.config.text.max_tokens)


def first_chunk(config: TrainConfig, state: dict[str, Any] | None, world: World) -> int | list[int]:
    """Clips that go through the towers at once: as configured, or as an earlier start has found out."""
    if config.chunk_size != "auto":
        return config.chunk_size
    return (state or {}).get("chunk_sizes") or config.batch_size // world.size


def build_meter(config: TrainConfig, model: CLAP, world: World) -> Meter:
    """A meter that knows the model's FLOPs, where they can be compared with the device's. The model is on the CPU."""
    if peak_flops(world.device) is None:
        return Meter(world)
    longest = round(config.data.crop_seconds * model.sampling_rate)
    model.eval()
    return Meter(world, FlopCount(model, longest, config.model.text.max_tokens))


def log_line(record: dict[str, Any], lap: dict[str, float], config: TrainConfig) -> str:
    rate = lap["clips_per_second"]
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
        f"{rate:.1f} clips/s{loader}  waiting {lap['waiting']:.0%}{gpu}  left {clock(left)}{skipped}"
    )


def validate(
    config: TrainConfig,
    model: CLAP,
    average: WeightAverage | None,
    manifest: Manifest,
    step: int,
    journal: Journal | None,
    world: World,
) -> None:
    """Retrieval and zero-shot classification with the weights to use; on the main rank, the others wait.

    Of sharded towers each rank holds a part, so that all of them take part.
    """
    if world.is_main or config.shard:
        columns = [c for c in config.valid.classify if c in manifest.columns or c == "classification_tag"]
        if not any(row.classification_tag for row in manifest):
            columns = [column for column in columns if column != "classification_tag"]
        prompts = {c: load_prompts(config.valid.prompts, c) for c in columns} if config.valid.prompts else {}
        tasks = [ClassificationTask(c, config.valid.template, prompts.get(c) or None) for c in columns]
        with applied(average):
            figures = evaluate(model, manifest, tasks=tasks, batch_size=config.valid.batch_size)
        if journal is not None:
            journal.write({"kind": "valid", "step": step, **figures}, valid_line(step, figures))
    distributed.barrier(world)


def valid_line(step: int, figures: dict[str, Any]) -> str:
    parts = [f"valid at step {step}"]
    for name, both in figures["retrieval"].items():
        for way, arrow in (("audio_to_text", "A→T"), ("text_to_audio", "T→A")):
            parts.append(f"{name} {arrow} R@1 {both[way]['R@1']:.3f} R@10 {both[way]['R@10']:.3f}")
    for column, scores in figures["classification"].items():
        parts.append(
            f"{column} UAR {scores['uar']:.3f} accuracy {scores['accuracy']:.3f} (chance {scores['chance']:.3f})"
        )
    return "  ".join(parts)


def save(
    config: TrainConfig,
    run_dir: Path,
    step: int,
    model: CLAP,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    objective: Objective,
    totals: Totals,
    journal: Journal | None,
    world: World,
    *,
    required: bool,
) -> None:
    """Write a checkpoint (every rank calls this). One that fails is reported; only a required one ends the run."""
    if journal is not None:
        journal.sync()
    state = {
        "config": config.to_dict(),
        "world_size": world.size,
        "totals": totals.state(),
        "chunk_sizes": objective.chunk_sizes,
        "tags": objective.vocabulary,
    }
    try:
        checkpoint.save_checkpoint(run_dir, step, model, optimizer, average, state, config.keep, world)
    except TrainingError as error:
        if required or journal is None:
            raise
        journal.say(f"warning: {error}; training goes on")


def export(run_dir: Path, model: CLAP, average: WeightAverage | None, world: World) -> None:
    """Write ``run_dir/model``; an older export stays until the new one is complete."""
    final = run_dir / "model"
    with applied(average):
        weights = distributed.whole(model.state_dict())
        if not world.is_main:
            return
        try:
            model.save_pretrained(final, state_dict=weights, run=run_dir)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"{final}: the model could not be written ({error}); the checkpoints hold it"
            ) from error
