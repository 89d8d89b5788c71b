"""GradCache's losses (package `grad_cache`).

Replaced: SimpleContrastiveLoss.__call__ and DistributedContrastiveLoss.__call__. Left to the client: reduction="none",
and targets that are probabilities.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastclap.drop_in.open_clip import ClipLoss
from fastclap.drop_in.shared import Client, Method, overrides

IGNORED_TARGET = -100  # as torch.nn.functional.cross_entropy's ignore_index


class GradCacheLoss:
    """GradCache's `SimpleContrastiveLoss`, for `GradCache(models, chunk_sizes, loss_fn=GradCacheLoss())`.

    The logits are plain dot products, and the loss is one-sided, from x to y.

    Args:
        n_hard_negatives: for each row of x, y holds its positive followed by this many negatives.
    """

    def __init__(self, n_hard_negatives: int = 0) -> None:
        self.target_per_qry = n_hard_negatives + 1

    def __call__(
        self,
        x: Tensor,  # [N, D]
        y: Tensor,  # [M, D]
        target: Tensor | None = None,  # [N]
        reduction: str = "mean",
    ) -> Tensor:
        """0-d. `target` is the row of y that belongs to each row of x, -100 to leave a row out.

        Raises:
            ValueError: sizes or targets do not fit.
            NotImplementedError: the reduction is neither "mean" nor "sum", or the targets are not integers.
        """
        return _target_loss(x, y, self.target_per_qry, target, reduction)


class GradCacheDistributedLoss(GradCacheLoss):
    """GradCache's `DistributedContrastiveLoss`: the loss over all ranks of the default process group.

    As there, x and y are this rank's rows, as many on every rank, and `target` covers all ranks; the gradients of
    x and y are those of the whole batch, so averaging over W ranks leaves 1/W of them.
    """

    def __init__(self, n_hard_negatives: int = 0) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("GradCacheDistributedLoss needs torch.distributed.init_process_group first")
        super().__init__(n_hard_negatives)

    def __call__(self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """As `GradCacheLoss`."""
        return _target_loss(x, y, self.target_per_qry, target, reduction, dist.get_rank(), dist.get_world_size())


def _simple_call(owner: type, original: Method) -> Method:
    def __call__(self: Any, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        if not _is_fused(target, reduction):
            return original(self, x, y, target=target, reduction=reduction)
        return _target_loss(x, y, self.target_per_qry, target, reduction)

    return __call__


def _distributed_call(owner: type, original: Method) -> Method:
    def __call__(self: Any, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        if not _is_fused(target, reduction) or overrides(self, owner, "gather_tensor"):
            return original(self, x, y, target=target, reduction=reduction)
        return _target_loss(x, y, self.target_per_qry, target, reduction, self.rank, self.word_size)

    return __call__


# The package of the repository, and the one on the package index.
CLIENT = Client(
    "grad_cache",
    modules=("grad_cache.loss", "gradcache.loss"),
    install="pip install git+https://github.com/luyug/GradCache",
    methods={
        "SimpleContrastiveLoss.__call__": _simple_call,
        "DistributedContrastiveLoss.__call__": _distributed_call,
    },
)


def _target_loss(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    step: int,  # rows of y for each row of x
    target: Tensor | None,  # [W*N]
    reduction: str,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    if not _is_fused(target, reduction):
        raise NotImplementedError(
            f"reduction={reduction!r} with this target is not supported: use 'mean' or 'sum' and integer targets, or "
            "GradCache's own class (drop_in.patch('grad_cache') leaves this case to it)"
        )
    rows, columns = x.shape[0], y.shape[0]
    if target is None:
        if rows * step != columns:
            raise ValueError(f"{rows} rows of x with {step} rows of y each need {rows * step} rows of y, got {columns}")
        target = torch.arange(0, columns * world_size, step)
    target = target.cpu()
    used = target != IGNORED_TARGET
    if target.shape != (rows * world_size,):
        raise ValueError(f"target must have shape [{rows * world_size}], got {list(target.shape)}")
    if bool((used & ((target < 0) | (target >= columns * world_size))).any()):
        raise ValueError(f"a target is outside the {columns * world_size} rows of y")
    device = x.device if world_size > 1 else target.device  # a process group gathers the ids on its own device
    a_ids = target[rank * rows : (rank + 1) * rows].to(device)
    b_ids = torch.arange(rank * columns, (rank + 1) * columns, device=device)
    loss = ClipLoss(rank=rank, world_size=world_size, direction="a_to_b")(x, y, 1.0, a_ids=a_ids, b_ids=b_ids)
    return loss if reduction == "mean" else loss * int(used.sum())


def _is_fused(target: Tensor | None, reduction: str) -> bool:
    return reduction in ("mean", "sum") and (target is None or not target.is_floating_point())
