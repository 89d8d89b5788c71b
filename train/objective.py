"""One contrastive step: towers, loss and backward pass, with or without gradient caching."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclap.data import Batch
from fastclap.errors import ConfigError
from fastclap.grad_cache import GradCache
from fastclap.losses import info_nce, sigmoid_loss
from fastclap.model import CLAP
from fastclap.train.config import LossConfig
from fastclap.train.distributed import World


class Objective:
    """Callable that adds the gradient of a batch's loss to the model's ``.grad`` and returns the loss.

    Captions that occur several times in a batch are encoded once and their embedding is repeated, which changes nothing
    in the loss. With several ranks the loss is that of the global batch, and the gradients are scaled so that averaging
    them over the ranks gives its exact gradient.

    Args:
        chunk_size: clips and captions that go through the towers at once; 0: all of them without a gradient cache.
        autocast: dtype of the towers' autocast, None for none.
        held: makes the context in which gradients add up without being sent, as `Gradients.held` does.
        in_step: encode every caption, however often it occurs: the ranks of sharded towers have to go through them
            equally often.
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
    ) -> None:
        if config.kind == "sigmoid" and model.logit_bias is None:
            raise ConfigError("--loss.kind sigmoid needs a logit bias: set --model.init-logit-bias (SigLIP uses -10)")
        self.model = model
        self.config = config
        self.autocast_dtype = autocast
        self.world = world
        self._in_step = in_step
        self._held = held if world.group is not None else None
        self._batch = _Captions(torch.empty(0), None, 1.0)
        towers = [self._encode_audio, self._encode_text]
        self._cache = GradCache(towers, chunk_size, self._loss, modules=[model]) if chunk_size else None

    @property
    def chunk_sizes(self) -> list[int] | None:
        """Clips and captions that go through the towers at once, as reduced where memory ran out; None: all."""
        return None if self._cache is None else self._cache.chunk_sizes

    def __call__(self, batch: Batch, weight: float = 1.0) -> Tensor:
        """Forward and backward of ``weight`` times the loss; returns the unweighted loss, detached, on the device."""
        text: dict[str, Any] = {**(batch.text or {}), "token_counts": batch.tokens}
        rows = batch.text_rows
        if rows is None:
            text, rows = self._tokenized(batch.captions)
        if self._in_step:
            text = {name: value[rows] for name, value in text.items() if isinstance(value, Tensor)}
            rows = torch.arange(len(rows), device=rows.device)
        audio = {
            "audio": batch.audio,
            "lengths": batch.lengths,
            "mean": batch.mean,
            "std": batch.std,
            "host_lengths": batch.samples,
        }
        ids = batch.caption_ids if self.config.share_equal_captions else None
        self._batch = _Captions(rows, ids, weight)
        if self._cache is not None:
            return self._cache(audio, text, no_sync=self._held) / weight
        total = self._loss(self._encode_audio(**audio), self._encode_text(**text))
        total.backward()
        return total.detach() / weight

    def _tokenized(self, captions: list[str]) -> tuple[dict[str, Any], Tensor]:
        """The distinct captions as token ids, and which of them each clip has."""
        position = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
        text = self.model.tokenize(list(position))
        rows = torch.tensor([position[caption] for caption in captions])
        device = self.world.device
        moved: dict[str, Any] = {name: x.to(device, non_blocking=True) for name, x in text.items()}
        moved["token_counts"] = text["attention_mask"].sum(1).tolist()
        return moved, rows.to(device, non_blocking=True)

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
        rows, ids, weight = self._batch
        text, scale, group = unique_text[rows], self.model.logit_scale, self.world.group
        if self.config.kind == "sigmoid":
            bias = self.model.logit_bias
            assert bias is not None  # checked at construction
            return weight * sigmoid_loss(audio, text, scale, bias, a_ids=ids, b_ids=ids, process_group=group)
        smoothing = self.config.label_smoothing
        return weight * info_nce(
            audio, text, scale, a_ids=ids, b_ids=ids, label_smoothing=smoothing, process_group=group
        )


class _Captions(NamedTuple):
    """What the loss needs to know of a batch besides its embeddings."""

    rows: Tensor  # int64 [B]: the unique caption of each clip
    ids: Tensor | None  # int64 [B]: equal for equal captions on every rank
    weight: float
