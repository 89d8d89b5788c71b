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
from collections.abc import Generator, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastclap.data import Batch, BatchSampler, ClipDataset, Manifest, Quarantine, load_manifest, make_loader
from fastclap.errors import ConfigError, TrainingError
from fastclap.evaluation import ClassificationTask, evaluate, write_report
from fastclap.model import CLAP
from fastclap.prompts import load_prompts
from fastclap.train import checkpoint, distributed
from fastclap.train.averaging import WeightAverage, applied
from fastclap.train.config import OptimizerConfig, TrainConfig
from fastclap.train.distributed import World
from fastclap.train.journal import Journal, Stopwatch, clock
from fastclap.train.objective import Objective
from fastclap.train.setup import (
    build_model,
    build_optimizer,
    describe,
    find_checkpoint,
    fit_feature_statistics,
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
        return _train(config, world)
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
        max_seconds=config.data.crop_seconds,
        rank=world.rank,
        world_size=world.size,
        start_step=start_step * config.accumulate,
        stop_step=config.steps * config.accumulate,
    )

    # Model, optimizer, and the state they continue from.
    model = build_model(config, manifest, resume_path).to(world.device)
    distributed.broadcast_weights(model, world)
    dataset = ClipDataset(
        manifest,
        model.sampling_rate,
        crop_seconds=config.data.crop_seconds,
        seed=config.seed,
        caption=config.data.captions,
        cache_mb=config.data.cache_mb,
        file_statistics=config.model.audio.kind == "wav2vec2",
    )
    if resume_path is None:
        fit_feature_statistics(model, dataset, world)
    optimizer = build_optimizer(model, config.optimizer)
    average = WeightAverage(model, config.optimizer.ema_decay) if config.optimizer.ema_decay else None
    if resume_path is not None:
        checkpoint.restore(resume_path, model, optimizer, average)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    bf16 = config.precision == "bf16" or (config.precision == "auto" and world.device.type == "cuda")
    objective = Objective(model, config.loss, config.chunk_size, torch.bfloat16 if bf16 else None, world)
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
    watch = Stopwatch()
    model.train()
    step = start_step
    try:
        while step < config.steps:
            step += 1
            seed_step(config, step, world)
            learning_rate = scheduled(config.optimizer, step, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            loss = torch.zeros((), device=world.device)
            for _ in range(config.accumulate):
                batch = next(batches)
                loss += objective(batch, weight=1 / config.accumulate) / config.accumulate

            # Every rank must take or skip the step alike: the flags are summed together with the gradients.
            flags = torch.stack([(~loss.isfinite()).float(), torch.tensor(float(interrupt.wanted)).to(world.device)])
            flags = distributed.average_gradients(parameters, flags, world)
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if config.optimizer.clip_norm:
                nn.utils.clip_grads_with_norm_(parameters, config.optimizer.clip_norm, norm)
            skip = (flags[0] > 0) | ~norm.isfinite()
            setattr(optimizer, "found_inf", skip.float())  # noqa: B010 - read by the fused kernel, unknown to its class
            optimizer.step()
            optimizer.zero_grad()
            model.clamp_logit_scale_()
            if average is not None:
                average.update(model, step)
            totals.add(loss, norm, skip)
            watch.add(config.batch_size * config.accumulate)
            stop = interrupt.agreed(flags[1], world)

            if step % config.log_every == 0 or step == config.steps:
                record = totals.harvest(model.logit_scale)
                if record.pop("worst_run") >= config.max_bad_steps:
                    raise TrainingError(
                        f"step {step}: {config.max_bad_steps} steps in a row had a non-finite loss or gradient. The "
                        "weights are those before them; look at the last batches, or lower --optimizer.learning-rate"
                    )
                if journal is not None:
                    lap = watch.lap()
                    record = {
                        "kind": "train",
                        "step": step,
                        "epoch": batch.epoch,
                        "learning_rate": learning_rate,
                        **record,
                    }
                    journal.write({**record, "time": lap}, log_line(record, lap, config))
            if journal is not None:
                journal.advance(step)
            if valid is not None and step != config.steps and config.valid_every and step % config.valid_every == 0:
                with watch.paused():
                    validate(config, model, average, valid, step, journal, world)
            if step % config.save_every == 0 and step != config.steps and not stop:
                with watch.paused():
                    save(config, run_dir, step, model, optimizer, average, totals, journal, world, required=False)
            if stop:
                save(config, run_dir, step, model, optimizer, average, totals, journal, world, required=True)
                if journal is not None:
                    journal.say(f"stopped by {interrupt.name or 'another process'} at step {step}; --resume continues")
                return run_dir / "model"

        if step > start_step or not (run_dir / "model").exists():
            if valid is not None:
                validate(config, model, average, valid, step, journal, world)
            save(config, run_dir, step, model, optimizer, average, totals, journal, world, required=True)
            if world.is_main:
                export(run_dir, model, average)
                write_report(run_dir / "report", run=run_dir)
        if journal is not None:
            journal.say(f"model: {run_dir / 'model'}   report: {run_dir / 'report' / 'report.html'}")
        distributed.barrier(world)
        return run_dir / "model"
    finally:
        interrupt.restore()
        batches.close()
        if journal is not None:
            journal.close()


class Totals:
    """Sums of a log interval, kept on the device: loss and gradient norm of the steps taken, and the steps skipped."""

    _NAMES = ("loss", "grad_norm", "taken", "skipped", "skipped_in_all", "run", "worst_run")

    def __init__(self, device: torch.device, saved: dict[str, float] | None) -> None:
        start = [(saved or {}).get(name, 0.0) for name in self._NAMES]
        self._sums = torch.tensor(start, dtype=torch.float64, device=device)

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

    def harvest(self, logit_scale: Tensor) -> dict[str, Any]:
        """Means of the interval, with one copy off the device; the interval starts anew."""
        values = torch.cat([self._sums, logit_scale.detach().double().reshape(1)]).tolist()
        sums = dict(zip(self._NAMES, values, strict=False))
        self._sums = self._sums * torch.tensor([0, 0, 0, 0, 1, 1, 0], device=self._sums.device)
        taken = sums["taken"]
        return {
            "loss": sums["loss"] / taken if taken else None,
            "grad_norm": sums["grad_norm"] / taken if taken else None,
            "logit_scale": values[-1],
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
        self._last_flag: Tensor | None = None
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.wanted:
            raise KeyboardInterrupt
        self.wanted, self.name = True, signal.Signals(number).name

    def agreed(self, flag: Tensor, world: World) -> bool:
        """Whether all ranks stop now. Of several ranks: the summed flag of the step before, so nobody waits."""
        if world.group is None:
            return self.wanted
        last, self._last_flag = self._last_flag, flag.to("cpu", non_blocking=True)
        return last is not None and bool(last > 0)

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


def on_device(loader: Iterable[Batch], device: torch.device, quarantine: Quarantine) -> Generator[Batch, None, None]:
    """Batches on the training device; unusable clips found on the way are set aside on disk."""
    for batch in loader:
        if batch.bad:
            quarantine.add(batch.bad)
        yield batch.to(device, non_blocking=True)


def log_line(record: dict[str, Any], lap: dict[str, float], config: TrainConfig) -> str:
    rate = lap["clips_per_second"]
    left = (config.steps - record["step"]) * config.batch_size * config.accumulate / max(rate, 1e-9)
    loss = "none taken" if record["loss"] is None else f"{record['loss']:.4f}"
    norm = "-" if record["grad_norm"] is None else f"{record['grad_norm']:.2f}"
    skipped = f"  skipped {record['skipped_steps']}" if record["skipped_steps"] else ""
    return (
        f"step {record['step']}/{config.steps}  epoch {record['epoch']}  loss {loss}  "
        f"scale {record['logit_scale']:.2f}  lr {record['learning_rate']:.2e}  |g| {norm}  "
        f"{rate:.1f} clips/s  left {clock(left)}{skipped}"
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
    """Retrieval and zero-shot classification with the weights to use; on the main rank, the others wait."""
    if journal is not None:
        columns = [c for c in config.valid.classify if c in manifest.columns or c == "classification_tag"]
        if not any(row.classification_tag for row in manifest):
            columns = [column for column in columns if column != "classification_tag"]
        prompts = {c: load_prompts(config.valid.prompts, c) for c in columns} if config.valid.prompts else {}
        tasks = [ClassificationTask(c, config.valid.template, prompts.get(c) or None) for c in columns]
        with applied(average, model):
            figures = evaluate(model, manifest, tasks=tasks, batch_size=config.valid.batch_size)
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
    totals: Totals,
    journal: Journal | None,
    world: World,
    *,
    required: bool,
) -> None:
    """Write a checkpoint on the main rank. One that fails is reported; only a required one ends the run."""
    if journal is None:
        return
    journal.sync()
    state = {"config": config.to_dict(), "world_size": world.size, "totals": totals.state()}
    try:
        checkpoint.save_checkpoint(run_dir, step, model, optimizer, average, state, config.keep)
    except TrainingError as error:
        if required:
            raise
        journal.say(f"warning: {error}; training goes on")


def export(run_dir: Path, model: CLAP, average: WeightAverage | None) -> None:
    """Write ``run_dir/model``; an older export stays until the new one is complete."""
    final = run_dir / "model"
    try:
        with applied(average, model):
            model.save_pretrained(final)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{final}: the model could not be written ({error}); the checkpoints hold it") from error
