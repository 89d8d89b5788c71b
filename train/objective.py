"""One contrastive step: towers, loss and backward pass, with or without gradient caching."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastclap.data import Batch
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
    """

    def __init__(self, model: CLAP, config: LossConfig, chunk_size: int, autocast: torch.dtype | None, world: World) -> None:
        self.model = model
        self.config = config
        self.autocast_dtype = autocast
        self.world = world
        self.chunk_size = chunk_size
        self.logit_bias: Tensor | None = getattr(model, "logit_bias", None)

    def __call__(self, batch: Batch, weight: float = 1.0) -> Tensor:
        """Forward and backward of ``weight`` times the loss; returns the unweighted loss, detached, on the device."""
        device = self.world.device
        unique = list(dict.fromkeys(batch.captions))
        position = {caption: index for index, caption in enumerate(unique)}
        expand = torch.tensor([position[caption] for caption in batch.captions]).to(device, non_blocking=True)
        text = {name: tensor.to(device, non_blocking=True) for name, tensor in self.model.tokenize(unique).items()}
        audio = {"audio": batch.audio, "lengths": batch.lengths, "mean": batch.mean, "std": batch.std}
        ids = batch.caption_ids if self.config.share_equal_captions else None

        def loss(audio_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
            return weight * self._loss(audio_embeddings, text_embeddings[expand], ids)

        if self.chunk_size:
            cache = GradCache([self._encode_audio, self._encode_text], self.chunk_size, loss, modules=[self.model])
            return cache(audio, text) / weight
        total = loss(self._encode_audio(**audio), self._encode_text(**text))
        total.backward()
        return total.detach() / weight

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

    def _loss(self, audio: Tensor, text: Tensor, ids: Tensor | None) -> Tensor:
        if self.config.kind == "sigmoid":
            assert self.logit_bias is not None
            return sigmoid_loss(
                audio, text, self.model.logit_scale, self.logit_bias, a_ids=ids, b_ids=ids, process_group=self.world.group
            )
        return info_nce(
            audio,
            text,
            self.model.logit_scale,
            a_ids=ids,
            b_ids=ids,
            label_smoothing=self.config.label_smoothing,
            process_group=self.world.group,
        )
