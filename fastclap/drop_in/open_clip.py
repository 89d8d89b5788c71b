"""open_clip's losses, and `fastclap.ClipLoss` and `fastclap.SigLipLoss`, which have their signatures.

Replaced: ClipLoss.forward, and so the contrastive part of CoCaLoss, and SigLipLoss.forward. Left to the client:
subclasses with logits or labels of their own (DistillClipLoss), and Horovod.

Values and gradients are open_clip's on every rank, with one exception: for SigLipLoss in a distributed run each rank
gets the loss, and the gradient of scale and bias, of the whole batch, where open_clip gives each rank its own part.
Their averages over the ranks, all that training sees, are equal.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastclap.drop_in.shared import Client, Method, local_rows_loss, overrides, rows_of_all_ranks
from fastclap.kernels.contrastive.shared import Teacher
from fastclap.losses import info_nce, sigmoid_loss


class ClipLoss(nn.Module):
    """`info_nce` under open_clip's signature, its four distributed modes included.

    Like open_clip's it expects features that are already normalised (pass `normalize=True` otherwise). With
    world_size > 1 it works on the default process group and keeps open_clip's conventions:

    | local_loss | gather_with_grad | value              | gradient of the features                |
    |------------|------------------|--------------------|-----------------------------------------|
    | False      | False            | global             | that of the batch (1/W after averaging) |
    | False      | True             | global             | W times that, exact after averaging     |
    | True       | False            | mean of local rows | gathered features are constants         |
    | True       | True             | mean of local rows | W times that, exact after averaging     |

    A subclass that calls `get_logits` and `get_ground_truth` gets the whole matrix of logits, and one that overrides
    them decides the loss, as in open_clip.

    Args:
        local_loss, gather_with_grad: as above.
        cache_labels: accepted for open_clip's callers; there are no label tensors to cache.
        rank, world_size: of the default process group.
        normalize, label_smoothing, direction, teacher_weight: as in `info_nce`. With world_size > 1 and local_loss
            only `normalize` and `label_smoothing` apply.
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
        if self._is_local and (direction != "both" or teacher_weight > 0):
            raise ValueError(
                "local_loss is two-sided and takes no teacher; use local_loss=False, gather_with_grad=True"
            )

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [M, D]
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        a_ids: Tensor | None = None,  # [N]
        b_ids: Tensor | None = None,  # [M]
        teacher: Teacher | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or {"contrastive_loss": loss} with `output_dict`. A bias cancels in the softmax."""
        if overrides(self, ClipLoss, "get_logits", "get_ground_truth"):
            loss = self._loss_of_logits(image_features, text_features, logit_scale, logit_bias)
            return {"contrastive_loss": loss} if output_dict else loss
        if self._is_local:
            if teacher is not None or a_ids is not None or b_ids is not None:
                raise ValueError(
                    "local_loss takes neither ids nor a teacher; use local_loss=False, gather_with_grad=True"
                )
            loss = self._local_loss(image_features, text_features, logit_scale)
        else:
            if self.world_size > 1 and not self.gather_with_grad:
                image_features = _with_divided_gradient(image_features, self.world_size)
                text_features = _with_divided_gradient(text_features, self.world_size)
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

    def get_logits(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [M, D]
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits per image and per text, of all ranks or, with local_loss, of this rank's rows."""
        images, texts = self._gathered(image_features), self._gathered(text_features)
        if not self._is_local:
            image_features, text_features = images, texts
        bias = 0.0 if logit_bias is None else logit_bias
        return logit_scale * image_features @ texts.T + bias, logit_scale * text_features @ images.T + bias

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The column of each row's positive."""
        first = num_logits * self.rank if self._is_local else 0
        return torch.arange(first, first + num_logits, device=device)

    @property
    def _is_local(self) -> bool:
        return self.local_loss and self.world_size > 1

    def _loss_of_logits(
        self,
        images: Tensor,  # [N, D]
        texts: Tensor,  # [M, D]
        scale: float | Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """open_clip's own loss, for subclasses that compute logits or labels in their own way."""
        per_image, per_text = self.get_logits(images, texts, scale, logit_bias=bias)
        labels = self.get_ground_truth(images.device, per_image.shape[0])
        return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2

    def _local_loss(
        self,
        images: Tensor,  # [N, D]
        texts: Tensor,  # [N, D]
        scale: float | Tensor,
    ) -> Tensor:
        options = {"normalize": self.normalize, "label_smoothing": self.label_smoothing}
        per_image = local_rows_loss(images, self._gathered(texts), scale, self.rank, **options)
        return (per_image + local_rows_loss(texts, self._gathered(images), scale, self.rank, **options)) / 2

    def _gathered(
        self,
        features: Tensor,  # [N, D]
    ) -> Tensor:
        """The rows of all ranks, with the gradients that the mode lets through."""
        if self.world_size == 1:
            return features
        if self.gather_with_grad:
            return rows_of_all_ranks(features)
        gathered = features.new_empty(features.shape[0] * self.world_size, *features.shape[1:])
        dist.all_gather_into_tensor(gathered, features.detach().contiguous())
        if self.local_loss:
            return gathered
        before, _, after = gathered.tensor_split([self.rank * features.shape[0], (self.rank + 1) * features.shape[0]])
        return torch.cat([before, features, after])


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
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [M, D]
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        a_ids: Tensor | None = None,  # [N]
        b_ids: Tensor | None = None,  # [M]
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or {"contrastive_loss": loss} with `output_dict`."""
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


OpenClipLoss, OpenClipSigLipLoss = ClipLoss, SigLipLoss


def _clip_loss_forward(owner: type, original: Method) -> Method:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if overrides(self, owner, "get_logits", "get_ground_truth") or getattr(self, "use_horovod", False):
            return original(self, *args, **kwargs)
        loss = ClipLoss(self.local_loss, self.gather_with_grad, rank=self.rank, world_size=self.world_size)
        return loss(*args, **kwargs)

    return forward


def _siglip_loss_forward(owner: type, original: Method) -> Method:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if overrides(self, owner, "get_logits", "get_ground_truth", "_loss"):
            return original(self, *args, **kwargs)
        return SigLipLoss(rank=self.rank, world_size=self.world_size)(*args, **kwargs)

    return forward


CLIENT = Client(
    "open_clip",
    modules=("open_clip.loss",),
    install="pip install open_clip_torch",
    methods={"ClipLoss.forward": _clip_loss_forward, "SigLipLoss.forward": _siglip_loss_forward},
)


def _with_divided_gradient(features: Tensor, divisor: int) -> Tensor:
    """The features, whose gradient is divided on its way back."""
    if not (torch.is_grad_enabled() and features.requires_grad):
        return features
    alias = features.view_as(features)
    alias.register_hook(lambda gradient: gradient / divisor)
    return alias
