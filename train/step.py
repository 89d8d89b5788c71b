"""One contrastive step: towers, loss and backward pass, with or without gradient caching."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclap.data import Batch
from fastclap.data.dataset import distinct_texts
from fastclap.errors import ConfigError
from fastclap.grad_cache import GradCache
from fastclap.losses import info_nce, sigmoid_loss, tag_loss
from fastclap.models.clap import CLAP
from fastclap.train.config import LossConfig
from fastclap.train.distributed import World


class Objective:
    """Callable that adds the gradient of a batch's loss to the model's ``.grad`` and returns the loss.

    Captions that occur several times in a batch are encoded once and their embedding is repeated, which changes nothing
    in the loss. The prompts of a tag loss are further texts of the same batch. With several ranks the loss is that of
    the global batch, and the gradients are scaled so that averaging them over the ranks gives its exact gradient.

    Attributes:
        vocabulary: the tags of the tag loss, in the order of its columns, for the checkpoints; None: there are none.

    Args:
        chunk_size: clips and captions that go through the towers at once; 0: all of them without a gradient cache.
        autocast: dtype of the towers' autocast, None for none.
        held: makes the context in which gradients add up without being sent, as `Gradients.held` does.
        in_step: encode every caption, however often it occurs: the ranks of sharded towers have to go through them
            equally often.
        teacher: model in evaluation mode whose similarities the loss approaches; see `LossConfig`.
    """

    def __init__(
        self,
        model: CLAP,
        config: LossConfig,
        chunk_size: int | list[int],
        autocast: torch.dtype | None,
        world: World,
        held: Callable[[], AbstractContextManager[Any]] | None = None,
        in_step: bool = False,
        teacher: CLAP | None = None,
    ) -> None:
        if config.kind == "sigmoid" and model.logit_bias is None:
            raise ConfigError("--loss.kind sigmoid needs a logit bias: set --model.init-logit-bias (SigLIP uses -10)")
        self.model = model
        self.config = config
        self.autocast_dtype = autocast
        self.world = world
        self.vocabulary: list[str] | None = None
        self._in_step = in_step
        self._teacher = teacher
        self._held = held if world.group is not None else None
        self._batch = _Captions(torch.empty(0), None, None, 1.0)
        towers = [self._encode_audio, self._encode_text]
        self._cache = GradCache(towers, chunk_size, self._loss, modules=[model]) if chunk_size else None

    @property
    def chunk_sizes(self) -> list[int] | None:
        """Clips and captions that go through the towers at once, as reduced where memory ran out; None: all."""
        return None if self._cache is None else self._cache.chunk_sizes

    def __call__(self, batch: Batch, weight: float = 1.0) -> Tensor:
        """Forward and backward of ``weight`` times the loss; returns the unweighted loss, detached, on the device."""
        text: dict[str, Any] = {**(batch.text or {}), "token_counts": batch.tokens}
        rows, prompt_rows = batch.text_rows, batch.prompt_rows
        if rows is None:
            text, rows, prompt_rows = self._tokenized(self.model, batch.captions, batch.prompts)
        if self._in_step:
            every = rows if prompt_rows is None else torch.cat([rows, prompt_rows])
            text = {name: value[every] for name, value in text.items() if isinstance(value, Tensor)}
            order = torch.arange(len(every), device=rows.device)
            rows, prompt_rows = order[: len(rows)], None if prompt_rows is None else order[len(rows) :]
        audio = {
            "audio": batch.audio,
            "lengths": batch.lengths,
            "mean": batch.mean,
            "std": batch.std,
            "host_lengths": batch.samples,
        }
        clip_ids = ids = batch.caption_ids if self.config.share_equal_captions else None
        captions_each = len(rows) // len(batch.samples)
        if captions_each > 1:  # the positives of a clip are its own captions
            clip_ids = torch.arange(len(batch.samples), device=rows.device) + (self.world.rank << 32)
            ids = clip_ids.repeat(captions_each)
        taught = self._taught(batch, audio, text, rows)
        self._batch = _Captions(rows, clip_ids, ids, weight, prompt_rows, batch.tags, taught)
        if self._cache is not None:
            return self._cache(audio, text, no_sync=self._held) / weight
        total = self._loss(self._encode_audio(**audio), self._encode_text(**text))
        total.backward()
        return total.detach() / weight

    def _taught(
        self, batch: Batch, audio: dict[str, Any], text: dict[str, Any], rows: Tensor
    ) -> tuple[Tensor, Tensor, float | Tensor] | None:
        """The teacher's embeddings of the clips and of their captions, and its scale."""
        teacher = self._teacher
        if teacher is None:
            return None
        if self.config.teacher != "ema":  # another model, perhaps with another tokenizer
            text, rows, _ = self._tokenized(teacher, batch.captions, [])
        sizes = self.chunk_sizes or [len(batch.samples), len(rows)]
        with torch.no_grad(), self._autocast():
            of_audio = _in_chunks(teacher.encode_audio, audio, sizes[0])
            of_text = _in_chunks(teacher.encode_text, text, sizes[1])[rows]
        temperature = self.config.teacher_temperature
        return of_audio, of_text, teacher.logit_scale.detach() if temperature is None else 1 / temperature

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

    def _encode_audio(self, **inputs: Any) -> Tensor:
        with self._autocast():
            return self.model.encode_audio(**inputs)

    def _encode_text(self, **inputs: Any) -> Tensor:
        with self._autocast():
            return self.model.encode_text(**inputs)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=self.autocast_dtype)

    def _loss(self, audio: Tensor, unique_text: Tensor) -> Tensor:
        weight, prompt_rows, tags = self._batch.weight, self._batch.prompt_rows, self._batch.tags
        loss = self._contrastive(audio, unique_text)
        if self.config.tag_weight and prompt_rows is not None and tags is not None:
            scale, group = self.config.tag_scale, self.world.group
            of_tags = tag_loss(audio, unique_text[prompt_rows], tags, scale=scale, process_group=group)
            loss = loss + self.config.tag_weight * of_tags
        return weight * loss

    def _contrastive(self, audio: Tensor, unique_text: Tensor) -> Tensor:
        rows, clip_ids, ids = self._batch.rows, self._batch.clip_ids, self._batch.ids
        text, scale, group = unique_text[rows], self.model.logit_scale, self.world.group
        if self.config.kind == "sigmoid":
            bias = self.model.logit_bias
            assert bias is not None  # checked at construction
            return sigmoid_loss(audio, text, scale, bias, a_ids=clip_ids, b_ids=ids, process_group=group)
        return info_nce(
            audio,
            text,
            scale,
            a_ids=clip_ids,
            b_ids=ids,
            teacher=self._batch.taught,
            teacher_weight=self.config.teacher_weight if self._batch.taught is not None else 0.0,
            label_smoothing=self.config.label_smoothing,
            process_group=group,
        )


def _in_chunks(encode: Callable[..., Tensor], inputs: dict[str, Any], size: int) -> Tensor:
    """Embeddings of all rows, ``size`` rows at a time."""
    rows = max(len(value) for value in inputs.values() if isinstance(value, Tensor))

    def part(value: Any, begin: int) -> Any:
        return value[begin : begin + size] if isinstance(value, (Tensor, list)) and len(value) == rows else value

    chunks = [{name: part(value, begin) for name, value in inputs.items()} for begin in range(0, rows, size)]
    return torch.cat([encode(**chunk) for chunk in chunks])


class _Captions(NamedTuple):
    """What the loss needs to know of a batch besides its embeddings."""

    rows: Tensor  # int64 [captions]: which of the unique texts each is
    clip_ids: Tensor | None  # int64 [B]: equal to the ids of a clip's captions, on every rank
    ids: Tensor | None  # int64 [captions]
    weight: float
    prompt_rows: Tensor | None = None  # int64 [tags]: the unique text of each prompt
    tags: Tensor | None = None  # bool [B, tags]
    taught: tuple[Tensor, Tensor, float | Tensor] | None = None  # the teacher's embeddings [B, D] and its scale
