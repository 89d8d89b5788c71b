"""The drop-in for open_clip; see `fastclap.drop_in`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastclap.drop_in.shared import (
    Method,
    _gather,
    _overrides,
)
from fastclap.kernels.contrastive.shared import Teacher
from fastclap.losses import info_nce, sigmoid_loss


class ClipLoss(nn.Module):
    """`info_nce` under open_clip's signature, its four distributed modes included.

    Like open_clip's it expects features that are already normalised (pass ``normalize=True`` otherwise). With
    world_size > 1 it works on the default process group and keeps open_clip's conventions:

    ==========  ================  ====================  ==================================================
    local_loss  gather_with_grad  value                 gradient of the features
    ==========  ================  ====================  ==================================================
    False       False             global                that of the batch (1/W of it after averaging)
    False       True              global                W times, exact after averaging
    True        False             mean of local rows    gathered features are constants
    True        True              mean of local rows    W times, exact after averaging
    ==========  ================  ====================  ==================================================

    Args:
        local_loss, gather_with_grad: as above.
        cache_labels: accepted for open_clip's callers; there are no label tensors to cache.
        rank, world_size: of the default process group.
        normalize, label_smoothing, direction, teacher_weight: as in `info_nce`. With world_size > 1 and local_loss
            only ``normalize`` and ``label_smoothing`` apply.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        *,
        normalize: bool = False,
        label_smoothing: float = 0.0,
        direction: str = "both",
        teacher_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.normalize = normalize
        self.label_smoothing = label_smoothing
        self.direction = direction
        self.teacher_weight = teacher_weight
        if local_loss and world_size > 1 and (direction != "both" or teacher_weight > 0):
            raise ValueError(
                "local_loss is two-sided and takes no teacher; use local_loss=False, gather_with_grad=True"
            )

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (M, D)
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        a_ids: Tensor | None = None,  # (N,)
        b_ids: Tensor | None = None,  # (M,)
        teacher: Teacher | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or {"contrastive_loss": loss} with ``output_dict``. A bias cancels in the softmax."""
        if self.world_size > 1 and self.local_loss:
            loss = self._local_loss(image_features, text_features, logit_scale, a_ids, b_ids, teacher)
        else:
            if self.world_size > 1 and not self.gather_with_grad:
                image_features = _divide_gradient(image_features, self.world_size)
                text_features = _divide_gradient(text_features, self.world_size)
            loss = info_nce(
                image_features,
                text_features,
                logit_scale,
                a_ids=a_ids,
                b_ids=b_ids,
                teacher=teacher,
                teacher_weight=self.teacher_weight,
                label_smoothing=self.label_smoothing,
                normalize=self.normalize,
                direction=self.direction,
                process_group=dist.group.WORLD if self.world_size > 1 else None,
            )
        if logit_bias is not None:
            loss = loss + 0.0 * logit_bias.sum()  # a parameter without a gradient would stall DistributedDataParallel
        return {"contrastive_loss": loss} if output_dict else loss

    def _local_loss(
        self,
        a: Tensor,
        b: Tensor,
        scale: float | Tensor,
        a_ids: Tensor | None,
        b_ids: Tensor | None,
        teacher: Teacher | None,
    ) -> Tensor:
        if teacher is not None or a_ids is not None or b_ids is not None:
            raise ValueError("local_loss takes neither ids nor a teacher; use local_loss=False, gather_with_grad=True")
        own = torch.arange(a.shape[0], device=a.device) + self.rank * a.shape[0]
        every = torch.arange(a.shape[0] * self.world_size, device=a.device)
        losses = [
            info_nce(
                local,
                self._gather(other),
                scale,
                a_ids=own,
                b_ids=every,
                normalize=self.normalize,
                label_smoothing=self.label_smoothing,
                direction="a_to_b",
            )
            for local, other in ((a, b), (b, a))
        ]
        return (losses[0] + losses[1]) / 2

    def _gather(self, features: Tensor) -> Tensor:
        if self.gather_with_grad:
            from torch.distributed.nn.functional import all_gather

            return torch.cat(all_gather(features))
        gathered = features.new_empty(features.shape[0] * self.world_size, *features.shape[1:])
        dist.all_gather_into_tensor(gathered, features.detach().contiguous())
        return gathered


class SigLipLoss(nn.Module):
    """`sigmoid_loss` under open_clip's signature, on features that are already normalised.

    With world_size > 1 it works on the default process group: the value is that of the whole batch, and after
    averaging the gradients equal open_clip's, whichever of its exchange schemes is named.

    Args:
        cache_labels, dist_impl, chunk_size: accepted for open_clip's callers; one exact exchange serves all of them.
        rank, world_size: of the default process group.
        normalize: as in `sigmoid_loss`.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl
        self.chunk_size = chunk_size
        self.normalize = normalize

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (M, D)
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        a_ids: Tensor | None = None,  # (N,)
        b_ids: Tensor | None = None,  # (M,)
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or {"contrastive_loss": loss} with ``output_dict``."""
        loss = sigmoid_loss(
            image_features,
            text_features,
            logit_scale,
            0.0 if logit_bias is None else logit_bias,
            a_ids=a_ids,
            b_ids=b_ids,
            normalize=self.normalize,
            process_group=dist.group.WORLD if self.world_size > 1 else None,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class OpenClipLoss(ClipLoss):
    """`fastclap.ClipLoss` with what open_clip's subclasses build on: ``get_logits`` and ``get_ground_truth``.

    A subclass that calls them gets the whole matrix of logits, and one that overrides them decides the loss.
    """

    def get_logits(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (M, D)
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits per image and per text, of all ranks or, with local_loss, of this rank's rows."""
        images, texts = self._of_all_ranks(image_features), self._of_all_ranks(text_features)
        if not (self.local_loss and self.world_size > 1):
            image_features, text_features = images, texts
        bias = 0.0 if logit_bias is None else logit_bias
        return logit_scale * image_features @ texts.T + bias, logit_scale * text_features @ images.T + bias

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The column of each row's positive."""
        first = num_logits * self.rank if self.local_loss and self.world_size > 1 else 0
        return torch.arange(first, first + num_logits, device=device)

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (M, D)
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        **options: Any,
    ) -> Tensor | dict[str, Tensor]:
        """As `fastclap.ClipLoss.forward`."""
        if not _overrides(self, OpenClipLoss, "get_logits", "get_ground_truth"):
            return super().forward(
                image_features, text_features, logit_scale, logit_bias=logit_bias, output_dict=output_dict, **options
            )
        per_image, per_text = self.get_logits(image_features, text_features, logit_scale, logit_bias=logit_bias)
        labels = self.get_ground_truth(image_features.device, per_image.shape[0])
        loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        return {"contrastive_loss": loss} if output_dict else loss

    def _of_all_ranks(self, features: Tensor) -> Tensor:
        if self.world_size == 1:
            return features
        if self.gather_with_grad:
            return _gather(features)
        parts = [torch.empty_like(features) for _ in range(self.world_size)]
        dist.all_gather(parts, features.detach().contiguous())
        if not self.local_loss:
            parts[self.rank] = features
        return torch.cat(parts)


OpenClipSigLipLoss = SigLipLoss


def _open_clip_forward(owner: type, original: Method) -> Method:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _overrides(self, owner, "get_logits", "get_ground_truth") or getattr(self, "use_horovod", False):
            return original(self, *args, **kwargs)
        loss = ClipLoss(self.local_loss, self.gather_with_grad, rank=self.rank, world_size=self.world_size)
        return loss(*args, **kwargs)

    return forward


def _open_clip_sigmoid_forward(owner: type, original: Method) -> Method:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _overrides(self, owner, "get_logits", "get_ground_truth", "_loss"):
            return original(self, *args, **kwargs)
        return SigLipLoss(rank=self.rank, world_size=self.world_size)(*args, **kwargs)

    return forward


def _divide_gradient(features: Tensor, by: int) -> Tensor:
    if not (torch.is_grad_enabled() and features.requires_grad):
        return features
    alias = features.view_as(features)
    alias.register_hook(lambda gradient: gradient / by)
    return alias
