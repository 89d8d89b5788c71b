"""An evaluation that several processes share: each embeds some of the batches, and all receive every vector.

Batches are dealt whole, and they are those that a single process would make. So a vector, and with it every figure,
does not depend on the number of processes, not even in its last digit. Batches are sorted by length and dealt in turn,
which makes the shares equal to within the longest batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastclap.data import BadClip
from fastclap.errors import TrainingError
from fastclap.models.encoder import DualEncoder

T = TypeVar("T")
Embedded = tuple[list[int], list[Tensor], list[BadClip]]
"""Which clips or texts, their unit vectors in parts [k, D], and the clips that cannot be used."""


class EvaluationRanks:
    """The processes that share an evaluation.

    Args:
        model: the same on every rank, or sharded over them.
        group: of the processes; None: this one works alone.

    Attributes:
        rank, size: of this process, and how many there are.
        in_step: the towers are sharded (FSDP2). Each run of a tower then gathers weights from all ranks, so all of them
            have to run it equally often, and one that fails can only end.
    """

    def __init__(self, model: DualEncoder, group: dist.ProcessGroup | None) -> None:
        self._group, self._device = group, model.device
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.in_step = False
        if group is not None:
            from torch.distributed.tensor import DTensor  # with sympy half a second, which one process alone saves

            self.in_step = any(isinstance(parameter, DTensor) for parameter in model.parameters())

    def most(self, count: int) -> int:
        """The largest of the ranks' counts."""
        most = torch.tensor(count, device=self._device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._group)
        return int(most)

    def gathered(self, embed: Callable[[], Embedded]) -> tuple[list[int], Tensor, list[BadClip]]:
        """What all ranks embed, rank by rank, on each of them.

        Raises:
            TrainingError: `embed` failed on another rank; on the rank where it did, its own error is raised.
        """
        rows: list[int] = []
        parts: list[Tensor] = []
        bad: list[BadClip] = []
        failure: Exception | None = None
        try:
            rows, parts, bad = embed()
        except Exception as error:
            if self._group is None or self.in_step:
                raise
            failure = error
        if self._group is None:
            return rows, torch.cat(parts) if parts else torch.empty(0, 0), bad
        shares: list[Any] = [None] * self.size
        width = parts[0].shape[1] if parts else 0
        dist.all_gather_object(shares, (rows, width, bad, _described(failure)), group=self._group)
        self._raise_alike(failure, [share[3] for share in shares])

        most, width = max(len(share[0]) for share in shares), max(share[1] for share in shares)
        padded = torch.zeros(most, width, device=self._device)
        if parts:
            padded[: len(rows)] = torch.cat(parts)
        found = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(found, padded, group=self._group)
        vectors = torch.cat([part[: len(share[0])] for part, share in zip(found, shares, strict=True)])
        return [row for share in shares for row in share[0]], vectors, [clip for share in shares for clip in share[2]]

    def from_first(self, compute: Callable[[], T]) -> T:
        """What rank 0 computes, on every rank.

        Raises:
            TrainingError: `compute` failed on rank 0, on the others; rank 0 raises its own error.
        """
        if self._group is None:
            return compute()
        box: list[Any] = [None, None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                box[0] = compute()
            except Exception as error:
                failure, box[1] = error, _described(error)
        dist.broadcast_object_list(box, group=self._group, group_src=0, device=self._device)
        self._raise_alike(failure, box[1:])
        return box[0]

    def _raise_alike(self, own: Exception | None, failures: list[str | None]) -> None:
        """Raise an error if there is one on some rank; `failures` are those of rank 0 and the ones after it."""
        if own is not None:
            raise own
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise TrainingError(f"rank {rank} could not take its part in the evaluation: {failure}")


def _described(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"
