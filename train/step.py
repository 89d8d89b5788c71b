"""A training step: towers, loss and backward pass of its batches, the average over the ranks, and the optimizer.

`Objective` makes the gradients of one batch, with or without gradient caching; `Step` makes a step of them. Nothing
here waits for the device: loss, norm and the verdict "this step is not finite" stay there as tensors, and the optimizer
reads the verdict itself (the `found_inf` argument of its fused kernel).
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastclap.data import Batch
from fastclap.data.dataset import distinct_texts
from fastclap.errors import ConfigError
from fastclap.grad_cache import GradCache, SecondPassMemoryError
from fastclap.losses import EmbeddingQueue, info_nce, local_loss, sigmoid_loss, tag_loss
from fastclap.models.clap import CLAP
from fastclap.models.freezing import depths
from fastclap.train.config import LossConfig, OptimizerConfig, TrainConfig
from fastclap.train.distributed import Gradients, World, is_sharded, local, placed_like
from fastclap.train.scaled_adam import ScaledAdam


class StepResult(NamedTuple):
    """What a step leaves on the device, and the learning rate and epoch that it had."""

    loss: Tensor  # []: the mean over its batches
    norm: Tensor  # []: of all gradients, before clipping
    skipped: Tensor  # bool []: on some rank loss or gradients were not finite, and no weight has changed
    stop: Tensor  # []: how many ranks want to stop
    learning_rate: float
    epoch: int


class Step:
    """Takes optimizer steps on a model.

    Args:
        model: in training mode, on its device.
        config: its loss, optimizer, schedule, precision, chunk size and accumulation are the step's.
        world: this process; None for a single process on the model's device.
        sharded: the model's modules that `distributed.shard` returned.
        teacher: model in evaluation mode whose similarities the loss approaches; the moving average of `--loss.teacher
            ema` needs none.
        at_rest: towers of the model that never run, because batches hold their summaries.
        number: steps that were taken before.
        chunk_sizes: of the gradient cache, as an earlier start with `--chunk-size auto` has found them.

    Attributes:
        number: steps taken.
        between_steps: whether everything is as it was after that step, so that it can be saved; False after an error
            amid the optimizer's update, or of a loss whose embeddings may be in the queue.
        average: the moving average of the weights; None: there is none.
        mean: the mean of the weights since the start; None: there is none.
        queue: embeddings of earlier batches, the same on every rank; None: there are none.

    Raises:
        ConfigError: the model lacks what the configuration needs.
    """

    def __init__(
        self,
        model: CLAP,
        config: TrainConfig,
        world: World | None = None,
        *,
        sharded: Iterable[Any] = (),
        teacher: CLAP | None = None,
        at_rest: Iterable[nn.Module] = (),
        number: int = 0,
        chunk_sizes: list[int] | None = None,
    ) -> None:
        self.model, self.config, self.number, self.between_steps = model, config, number, True
        self.world = world = world or World(0, 1, model.device, None)
        if config.optimizer.unfreeze_step and not model.has_frozen_parts:
            raise ConfigError(
                "--optimizer.unfreeze-step: nothing is frozen; set a freeze option of a tower, such as "
                "--model.audio.freeze, or leave it out"
            )
        if 0 < config.optimizer.unfreeze_step < number:
            model.set_frozen(False)
        self.optimizer = build_optimizer(model, config.optimizer)
        self.average = WeightAverage(model, config.optimizer.ema_decay) if config.optimizer.ema_decay else None
        self.mean = WeightMean(model, config.optimizer.average_every) if config.optimizer.average_every else None
        if config.loss.teacher == "ema" and self.average is not None:
            teacher = averaged_teacher(model, self.average)
        self.gradients = Gradients(in_order_of_arrival(model), world, sharded)
        self.queue = build_queue(model, config, world.device) if config.loss.queue_size else None
        automatic = chunk_sizes or config.batch_size // world.size
        self.objective = Objective(
            model,
            config.loss,
            automatic if config.chunk_size == "auto" else config.chunk_size,
            torch.bfloat16 if config.uses_bf16(world.device.type) else None,
            world,
            self.gradients.held,
            every_caption=config.shard,
            teacher=teacher,
            queue=self.queue,
            at_rest=at_rest,
        )

    def __call__(self, batches: Iterable[Batch], stop: Callable[[], bool] = lambda: False) -> StepResult:
        """Take a step on the next `accumulate` batches, which are on the device.

        Args:
            batches: an iterator that goes on after them, or just these.
            stop: whether this rank wants to stop, asked after the backward pass.
        """
        if self.number and self.number == self.config.optimizer.unfreeze_step:
            self._unfreeze()
        data = self.config.data
        seconds = data.batch_seconds or self.config.batch_size * data.crop_seconds
        self.model.audio_branch.begin_step(self.number, seconds * self.config.accumulate)
        loss = torch.zeros((), device=self.world.device)
        for remaining, batch in zip(reversed(range(self.config.accumulate)), batches, strict=False):
            with self.gradients.held() if remaining else nullcontext():
                loss = loss + self._loss_of(batch) / self.config.accumulate
        return self.update(loss, stop(), batch.epoch)

    def _unfreeze(self) -> None:
        """What was frozen trains from now on, and everything here is as if this were a run that goes on from here.

        The optimizer knows nothing of the gradients of the new parameters yet: for them it begins as at its first step.
        """
        self.model.set_frozen(False)
        state = self.optimizer.state
        self.optimizer = build_optimizer(self.model, self.config.optimizer)
        for parameter, held in state.items():
            self.optimizer.state[parameter] = held
        self.gradients.take(in_order_of_arrival(self.model))
        if self.config.compiles(self.world.device.type):
            torch.compiler.reset()  # graphs of what was frozen serve no more, and torch keeps only so many

    def _loss_of(self, batch: Batch) -> Tensor:
        """The batch's loss, with its gradients; NaN if memory ran out too late for this rank to repeat its part.

        The others have gone on then. So this rank goes on too, in all that ranks do together, and the NaN makes all of
        them skip the step.
        """
        try:
            self.objective.use_queue = self.number >= self.config.loss.queue_after
            self.between_steps = self.queue is None
            return self.objective(batch, weight=1 / self.config.accumulate)
        except SecondPassMemoryError as error:
            # Towers that communicate by themselves wait for this rank in the middle of a layer.
            if self.config.shard:
                raise
            print(
                f"rank {self.world.rank} ran out of memory after the loss of step {self.number + 1}, which all ranks "
                f"skip; it goes on with chunks of {self.objective.chunk_sizes} clips and captions ({error})",
                file=sys.stderr,
                flush=True,
            )
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return torch.full((), math.nan, device=self.world.device)

    def update(self, loss: Tensor, stop: bool, epoch: int) -> StepResult:
        """The optimizer's part of a step, on the gradients as they are."""
        config, number = self.config.optimizer, self.number + 1
        learning_rate = scheduled_learning_rate(config, number, self.config.steps, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        # Every rank must take or skip the step alike: the flags are summed together with the gradients.
        flags = torch.stack([(~loss.isfinite()).float(), torch.full((), float(stop), device=loss.device)])
        findings = self.model.audio_branch.findings()
        if findings is not None:
            flags = torch.cat([flags, findings])
        flags, norm = self.gradients.finish(flags, config.clip_norm if config.kind == "adamw" else 0.0)
        self.between_steps = False
        if findings is not None:
            self.model.audio_branch.end_step(flags[2:])
        skipped = (flags[0] > 0) | ~norm.isfinite()
        setattr(self.optimizer, "found_inf", skipped.float())  # noqa: B010 - AdamW's class does not know it, its kernel does
        self.optimizer.step()
        self.gradients.clear()
        self.model.clamp_logit_scale_()
        if self.average is not None:
            self.average.update(number)
        if self.mean is not None:
            self.mean.update(number)
        self.number, self.between_steps = number, True
        return StepResult(loss, norm, skipped, flags[1], learning_rate, epoch)


class Objective:
    """Callable that adds the gradient of a batch's loss to the model's `.grad` and returns the loss.

    Captions that occur several times in a batch are encoded once and their embedding is repeated, which changes nothing
    in the loss. The prompts of a tag loss and perturbed captions are further texts of the same batch. With several
    ranks the loss is that of the global batch, and the gradients are scaled so that averaging them over the ranks gives
    its exact gradient. At each call all ranks must have equally many clips and captions: they check that once for each
    number (`agree_once`).

    Args:
        model: in training mode, on its device.
        config: of the loss.
        chunk_size: clips and captions that go through the towers at once; 0: all of them without a gradient cache.
        autocast: dtype of the towers' autocast, None for none.
        world: this process.
        held: makes the context in which gradients add up without being sent, as `Gradients.held` does.
        every_caption: encode every caption, however often it occurs: the ranks of sharded towers have to go through
            them equally often.
        teacher: model in evaluation mode whose similarities the loss approaches, or that guides it; see `LossConfig`.
        queue: receives the embeddings of every batch, once its loss is known. The embedding of a clip or caption that
            is not finite goes in as zeros, which have the cosine 0 with all others: it would make the loss of every
            batch NaN for as long as it stays.
        at_rest: towers of the model that never run, because batches hold their summaries.

    Attributes:
        use_queue: whether the entries of the queue are negatives.

    Raises:
        ConfigError: the model lacks what the loss needs.
    """

    def __init__(
        self,
        model: CLAP,
        config: LossConfig,
        chunk_size: int | list[int],
        autocast: torch.dtype | None,
        world: World,
        held: Callable[[], AbstractContextManager[Any]] | None = None,
        *,
        every_caption: bool = False,
        teacher: CLAP | None = None,
        queue: EmbeddingQueue | None = None,
        at_rest: Iterable[nn.Module] = (),
    ) -> None:
        if config.kind == "sigmoid" and model.logit_bias is None:
            raise ConfigError("--loss.kind sigmoid needs a logit bias: set --model.init-logit-bias (SigLIP uses -10)")
        dim = model.config.head.dim
        if any(width > dim for width in config.matryoshka):
            raise ConfigError(
                f"--loss.matryoshka has width {max(config.matryoshka)} and the embeddings have {dim} columns: leave it "
                "out, or set --model.head.dim"
            )
        self.model, self.config, self.world = model, config, world
        self._autocast_dtype, self._every_caption, self._teacher = autocast, every_caption, teacher
        self._held = held if world.group is not None else None
        self._queue, self.use_queue = queue, True
        self._unqueued: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None
        self.targets = Targets(torch.empty(0), None, None, 1.0)
        towers = [self.encode_audio, self.encode_text]
        self._cache = (
            GradCache(towers, chunk_size, self.loss, modules=[_at_work(model, at_rest)]) if chunk_size else None
        )

    @property
    def chunk_sizes(self) -> list[int] | None:
        """Clips and captions that go through the towers at once, as reduced where memory ran out; None: all."""
        return None if self._cache is None else self._cache.chunk_sizes

    def __call__(self, batch: Batch, weight: float = 1.0) -> Tensor:
        """Forward and backward of `weight` times the loss; returns the unweighted loss, detached, on the device."""
        text: dict[str, Any] = {**(batch.text or {}), "token_counts": batch.tokens or None}
        rows, prompt_rows = batch.text_rows, batch.prompt_rows
        if rows is None:
            text, rows, prompt_rows = self._tokenized(self.model, batch.captions, batch.prompts)
        if self._every_caption:
            every = rows if prompt_rows is None else torch.cat([rows, prompt_rows])
            text = {name: value[every] for name, value in text.items() if isinstance(value, Tensor)}
            order = torch.arange(len(every), device=rows.device)
            rows, prompt_rows = order[: len(rows)], None if prompt_rows is None else order[len(rows) :]
        audio: dict[str, Any] = {"summary": batch.audio_summary}
        if batch.audio_summary is None:
            audio = {
                "audio": batch.audio,
                "lengths": batch.lengths,
                "mean": batch.mean,
                "std": batch.std,
                "host_lengths": batch.samples,
            }
        clip_ids = caption_ids = batch.caption_ids if self.config.share_equal_captions else None
        captions_each = len(rows) // batch.clips
        perturbed_rows = perturbed = None
        if captions_each > 2:  # the third ones have no part in the contrast of the batch
            first, contradicting = batch.caption_ids[: batch.clips], batch.caption_ids[2 * batch.clips :]
            perturbed_rows, perturbed = rows[2 * batch.clips :], contradicting != first
            rows, captions_each = rows[: 2 * batch.clips], 2
        if captions_each > 1:  # the positives of a clip are its own captions
            clip_ids = torch.arange(batch.clips, device=rows.device) + (self.world.rank << 32)
            if self._queue is not None:  # which has clips of other batches too
                clip_ids = torch.tensor(batch.rows).to(rows.device, non_blocking=True)
            caption_ids = clip_ids.repeat(captions_each)
        teacher = self._teacher_embeddings(batch, audio, text, rows)
        self.targets = Targets(
            rows, clip_ids, caption_ids, weight, prompt_rows, batch.tags, teacher, perturbed_rows, perturbed
        )
        try:
            if self._cache is not None:
                return self._cache(audio, text, no_sync=self._held) / weight
            total = self.loss(self.encode_audio(**audio), self.encode_text(**text))
            total.backward()
            return total.detach() / weight
        finally:
            self._push()

    def _push(self) -> None:
        """Put the embeddings of the last loss in the queue, if they are not there yet."""
        if self._queue is not None and self._unqueued is not None:
            entries, self._unqueued = self._unqueued, None
            self._queue.push(*entries, process_group=self.world.group, agree_once=True)

    def _teacher_embeddings(
        self, batch: Batch, audio: dict[str, Any], text: dict[str, Any], rows: Tensor
    ) -> tuple[Tensor, Tensor, float | Tensor] | None:
        """The teacher's embeddings of the clips and of their captions, and its scale; None: there is no teacher."""
        teacher = self._teacher
        if teacher is None:
            return None
        if self.config.teacher != "ema":  # another model, perhaps with another tokenizer
            text, rows, _ = self._tokenized(teacher, batch.captions[: len(rows)], [])
        sizes = self.chunk_sizes or [batch.clips, len(rows)]
        with torch.no_grad(), self._autocast():
            audio_embeddings = _embeddings(teacher.encode_audio, audio, sizes[0])
            text_embeddings = _embeddings(teacher.encode_text, text, sizes[1])[rows]
        temperature = self.config.teacher_temperature
        scale = teacher.logit_scale.detach() if temperature is None else 1 / temperature
        return audio_embeddings, text_embeddings, scale

    def _tokenized(
        self, model: CLAP, captions: list[str], prompts: list[str]
    ) -> tuple[dict[str, Any], Tensor, Tensor | None]:
        """The distinct texts as token ids, and which of them each clip and each tag has."""
        distinct, rows, prompt_rows = distinct_texts(captions, prompts)
        text = model.tokenize(distinct)
        device = self.world.device
        moved: dict[str, Any] = {name: x.to(device, non_blocking=True) for name, x in text.items()}
        moved["token_counts"] = text["attention_mask"].sum(1).tolist()
        rows = rows.to(device, non_blocking=True)
        return moved, rows, None if prompt_rows is None else prompt_rows.to(device, non_blocking=True)

    def encode_audio(self, **inputs: Any) -> Tensor:
        """The audio tower under autocast."""
        with self._autocast():
            return self.model.encode_audio(**inputs)

    def encode_text(self, **inputs: Any) -> Tensor:
        """The text tower under autocast."""
        with self._autocast():
            return self.model.encode_text(**inputs)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=self._autocast_dtype)

    def loss(
        self,
        audio: Tensor,  # [B, D]
        distinct_text: Tensor,  # [U, D]
    ) -> Tensor:
        """The weighted loss of these embeddings with the `targets` of the batch."""
        targets, group = self.targets, self.world.group
        loss = self._contrastive_loss(audio, distinct_text[targets.text_rows])
        if self.config.tag_weight and targets.prompt_rows is not None and targets.tags is not None:
            prompts, scale = distinct_text[targets.prompt_rows], self.config.tag_scale
            loss = loss + self.config.tag_weight * tag_loss(
                audio, prompts, targets.tags, scale=scale, process_group=group
            )
        if self.config.local_weight and targets.perturbed_rows is not None:
            own, contradicting = distinct_text[targets.text_rows[: len(audio)]], distinct_text[targets.perturbed_rows]
            loss = loss + self.config.local_weight * local_loss(
                audio, own, contradicting, self.model.logit_scale, where=targets.perturbed, process_group=group
            )
        return targets.weight * loss

    def _contrastive_loss(self, audio: Tensor, text: Tensor) -> Tensor:
        targets, scale = self.targets, self.model.logit_scale
        ids: dict[str, Any] = {
            "a_ids": targets.clip_ids,
            "b_ids": targets.caption_ids,
            "process_group": self.world.group,
            "agree_once": True,  # equal shares of every batch, and options from one configuration
        }
        if self.config.kind == "sigmoid":
            bias = self.model.logit_bias
            assert bias is not None  # checked at construction
            return sigmoid_loss(audio, text, scale, bias, **ids)
        config = self.config
        loss = info_nce(
            audio,
            text,
            scale,
            teacher=targets.teacher,
            teacher_weight=config.teacher_weight if targets.teacher is not None else 0.0,
            label_smoothing=config.label_smoothing,
            guide_margin=config.guide_margin,
            guide_relative=config.guide_relative,
            debias=config.debias,
            queue=self._queue if self.use_queue else None,
            matryoshka=dict(zip(config.matryoshka, config.matryoshka_weights or repeat(1.0), strict=False)),
            **ids,
        )
        if self._queue is not None:
            self._unqueued = (_finite(audio), _finite(text), targets.clip_ids, targets.caption_ids)
            # A single process may run out of memory in the backward pass and repeat the loss, so it waits. Of several
            # none does, and here all of them are at the same place.
            if self.world.group is not None:
                self._push()
        return loss


def _at_work(model: CLAP, at_rest: Iterable[nn.Module]) -> nn.Module:
    """The model without some of its parts: a gradient cache goes through all modules at each step."""
    left = set(at_rest)
    if not left:
        return model
    parts = nn.ModuleList(part for part in model.children() if part not in left)
    learned = [p for tower in left for p in tower.parameters() if p.requires_grad]  # what combines a summary
    return nn.ModuleList([parts, nn.ParameterList([*model.parameters(recurse=False), *learned])])


class Targets(NamedTuple):
    """What the loss needs to know of a batch besides its embeddings."""

    text_rows: Tensor  # int64 [captions]: which of the distinct texts each is
    clip_ids: Tensor | None  # int64 [B]: equal to the ids of a clip's captions, on every rank
    caption_ids: Tensor | None  # int64 [captions]
    weight: float
    prompt_rows: Tensor | None = None  # int64 [tags]: the distinct text of each prompt
    tags: Tensor | None = None  # bool [B, tags]
    teacher: tuple[Tensor, Tensor, float | Tensor] | None = None  # its embeddings [B, D], [captions, D] and its scale
    perturbed_rows: Tensor | None = None  # int64 [B]: the distinct text that contradicts each clip's first caption
    perturbed: Tensor | None = None  # bool [B]: which clips have such a text


def _finite(embeddings: Tensor) -> Tensor:
    """The embeddings [n, D] as constants, with zeros for rows that are not finite."""
    embeddings = embeddings.detach()
    return embeddings.where(embeddings.isfinite().all(1, keepdim=True), 0.0)


def build_queue(model: CLAP, config: TrainConfig, device: torch.device) -> EmbeddingQueue:
    """An empty queue of the run's size; it has ids if the loss is given any."""
    ids = config.loss.share_equal_captions or config.data.captions in ("pair", "perturbed")
    return EmbeddingQueue(config.loss.queue_size, model.config.head.dim, ids=ids).to(device)


def _embeddings(encode: Callable[..., Tensor], inputs: dict[str, Any], size: int) -> Tensor:
    """Embeddings of all rows, of which `size` go through the tower at once."""
    rows = max(len(value) for value in inputs.values() if isinstance(value, Tensor))

    def part(value: Any, begin: int) -> Any:
        return value[begin : begin + size] if isinstance(value, (Tensor, list)) and len(value) == rows else value

    chunks = [{name: part(value, begin) for name, value in inputs.items()} for begin in range(0, rows, size)]
    return torch.cat([encode(**chunk) for chunk in chunks])


class Average:
    """An average of a model's weights, kept next to them: of floating tensors; others are copied.

    The model's tensors are looked up once, so they must stay where they are (no `model.to(...)` afterwards).
    """

    def __init__(self, model: nn.Module) -> None:
        self._current: dict[str, Tensor] = model.state_dict()  # the tensors that training writes to
        self.tensors: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in self._current.items()}
        pairs = [(local(self.tensors[name]), local(tensor.detach())) for name, tensor in self._current.items()]
        self._floating = [pair for pair in pairs if pair[0].is_floating_point()]
        parameters = dict(model.named_parameters())
        self._parameters = [
            parameters.get(name) for name, held in self.tensors.items() if held.is_floating_point()
        ]  # of `_floating`; None: a buffer
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def fold_in(self, weight: float) -> None:
        """average ← (1 − weight)·average + weight·weights."""
        # The average of what stands still is what it was.
        moving = [
            pair
            for pair, parameter in zip(self._floating, self._parameters, strict=True)
            if parameter is None or parameter.requires_grad
        ]
        torch._foreach_lerp_([held for held, _ in moving], [new for _, new in moving], weight)
        for held, new in self._others:
            held.copy_(new)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over an average saved earlier (names must be those of the model)."""
        for name, tensor in self.tensors.items():
            tensor.copy_(placed_like(tensor, tensors[name]))


class WeightMean(Average):
    """Mean of the weights at every `every`-th step since the start (icefall's `model_avg`, which is in float64).

    In float32 as the weights. Of 5000 updates it is off by 1e-6 of a weight that changes by a hundredth or more, and by
    up to 3e-5 of one that changes less, because an update that is far below its rounding is lost.

    The mean over the steps between two checkpoints follows from those of both (`checkpoint.average_checkpoints`).
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        super().__init__(model)
        self.every = every

    def update(self, step: int) -> None:
        """Fold in the weights after optimizer step number `step` (from 1), if it is one of those."""
        if step % self.every == 0:
            self.fold_in(self.every / step)


class WeightAverage(Average):
    """Exponential moving average of a model's weights, swapped in for evaluation and export.

    ema ← decay·ema + (1 − decay)·weight after every step. The decay warms up as min(decay, (1 + n) / (10 + n)) over the
    updates n, so that early averages are not dominated by the random initial weights (the schedule TensorFlow's
    ExponentialMovingAverage documents as `num_updates`).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    def update(self, step: int) -> None:
        """Fold in the weights after optimizer step number `step` (from 1)."""
        self.fold_in(1.0 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and the average; a second call restores both exactly."""
        for held, current in self._floating + self._others:
            before = current.clone()
            current.copy_(held)
            held.copy_(before)


@contextmanager
def applied(average: WeightAverage | None) -> Iterator[None]:
    """Its model carries the averaged weights inside the block (if there is an average)."""
    if average is None:
        yield
        return
    average.swap()
    try:
        yield
    finally:
        average.swap()


def averaged_teacher(model: CLAP, average: WeightAverage) -> CLAP:
    """A copy of the model that shares its weights with the moving average, and so follows it."""
    teacher = copy.deepcopy(model)
    teacher.load_state_dict(average.tensors, assign=True)
    return frozen(teacher)


def frozen(model: CLAP) -> CLAP:
    """The model in evaluation mode, with no parameter that trains."""
    model.requires_grad_(False)
    return model.eval()


def build_optimizer(model: CLAP, config: OptimizerConfig) -> torch.optim.AdamW | ScaledAdam:
    """The optimizer of the parameters that train.

    AdamW is fused, with weight decay on linear and convolution matrices only. ScaledAdam has no weight decay, and one
    group for each learning rate, which is clipped by itself.

    Each group's `lr_scale` is what a step multiplies the scheduled learning rate by. With `layer_decay` d it is d^k in
    the k-th layer from the top of a tower, as ELECTRA (Clark et al. 2020, arXiv:2003.10555) and BEiT (Bao et al. 2021,
    arXiv:2106.08254) are fine-tuned; layers at the same depth of both towers share their groups.

    Raises:
        ConfigError: `layer_decay` with a tower that trains and whose layers are not known.
    """
    decayed_names = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
    }
    below = {} if config.layer_decay == 1.0 else _depths_in_towers(model)
    kinds: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_tower = name.startswith(("audio_branch.", "text_branch."))
            scale = (config.tower_lr_scale if in_tower else 1.0) * config.layer_decay ** below.get(parameter, 0)
            decayed = config.kind == "adamw" and name in decayed_names
            # The fused kernel takes tensors of one kind at a time.
            kinds.setdefault((decayed, is_sharded(parameter), scale), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": config.weight_decay if decayed else 0.0, "lr_scale": scale}
        for (decayed, _, scale), parameters in sorted(kinds.items(), key=lambda kind: kind[0], reverse=True)
    ]
    betas = (config.beta1, config.beta2)
    if config.kind == "scaled-adam":
        by_rate = [{"params": group["params"], "lr_scale": group["lr_scale"]} for group in groups]
        return ScaledAdam(by_rate, config.learning_rate, betas, config.eps, config.clipping_scale)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=True)


def state_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Of the state that the optimizer keeps for a parameter."""
    return optimizer.STATE if isinstance(optimizer, ScaledAdam) else ("step", "exp_avg", "exp_avg_sq")


def _depths_in_towers(model: CLAP) -> dict[nn.Parameter, int]:
    """`depths` of both towers."""
    found: dict[nn.Parameter, int] = {}
    towers: list[tuple[str, Any, str]] = [
        ("audio", model.audio_branch, model.config.audio.kind),
        ("text", model.text_branch, model.config.text.kind),
    ]
    for side, tower, kind in towers:
        stages = tower.stages()
        if tower.hf_config is not None and not stages.layers and any(p.requires_grad for p in tower.parameters()):
            raise ConfigError(
                f"--optimizer.layer-decay: the {side} tower is of a kind ({kind}) whose layers are not known; "
                "leave it out, or freeze that tower"
            )
        found |= depths(stages)
    return found


def in_order_of_arrival(model: CLAP) -> list[nn.Parameter]:
    """The parameters that train, in about the order in which a backward pass of the loss gives them their gradients.

    A backward pass begins with what ran last: the loss, then the text tower from its head to its embeddings, then the
    audio tower. Inside a tower the order of registration is that of the forward pass, but for details: a final norm
    that is registered before the layers, or a parameter that all layers share.
    """
    order = ["text_projection", "text_branch", "audio_projection", "audio_branch"]  # logit scale and bias before them
    named = [(name.partition(".")[0], p) for name, p in model.named_parameters() if p.requires_grad]
    named.reverse()
    ranked = sorted(named, key=lambda pair: order.index(pair[0]) if pair[0] in order else -1)
    return [parameter for _, parameter in ranked]


def scheduled_learning_rate(config: OptimizerConfig, step: int, total: int, epoch: int = 0) -> float:
    """Learning rate of step 1..total: linear warm-up to the peak, then the chosen decay to `final_share` of it.

    eden is ((b² + B²) / B²)^-¼ · ((e² + E²) / E²)^-¼ at step b and epoch e, from 0, also during the warm-up (icefall).

    cooldown is the schedule of Hägele et al. 2024 (arXiv:2405.18392): constant, then 1 - √(share of the cooldown that
    is over), which ended lower than a linear decay in their runs. Up to the cooldown it does not depend on `total`.
    """
    peak = config.learning_rate
    if config.schedule == "eden":
        peak *= ((1 + (step / config.eden_batches) ** 2) * (1 + (epoch / config.eden_epochs) ** 2)) ** -0.25
    if step <= config.warmup_steps:
        return peak * config.warmup_start + peak * (1 - config.warmup_start) * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    # whole steps, so that rounding errors do not reach into the constant part
    cooldown = max(1, min(round(config.cooldown_share * total), total - config.warmup_steps))
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
        "eden": 1.0,
        "cooldown": 1 - math.sqrt(max(0, step - (total - cooldown)) / cooldown),
    }[config.schedule]
    return peak * (config.final_share + (1 - config.final_share) * remaining)
