"""What every engine of the contrastive losses shares: ranks, the values of a call, and the definitions in float64."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-12  # as torch.nn.functional.normalize

Teacher = tuple[Tensor, Tensor, "float | Tensor"]
Gradients = tuple["Tensor | None", ...]
Function = TypeVar("Function", bound=Callable[..., Any])


def positive_mask(num_rows: int, num_columns: int, a_ids: Tensor | None, b_ids: Tensor | None) -> Tensor:
    """Boolean [num_rows, num_columns]: equal ids, or without ids the main diagonal."""
    if a_ids is None or b_ids is None:
        return torch.eye(num_rows, num_columns, dtype=torch.bool)
    return a_ids[:, None] == b_ids


def info_nce_reference(
    a: Tensor,  # (N, D)
    b: Tensor,  # (M, D)
    logit_scale: float | Tensor,
    *,
    a_ids: Tensor | None = None,  # (N,)
    b_ids: Tensor | None = None,  # (M,)
    teacher: Teacher | None = None,
    teacher_weight: float = 0.0,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    direction: str = "both",
) -> Tensor:
    """InfoNCE with the whole matrix in memory, in the dtype of its inputs; the oracle in float64. See `info_nce`."""

    def logits(left: Tensor, right: Tensor, scale: float | Tensor) -> Tensor:
        if normalize:
            left, right = F.normalize(left, dim=1, eps=NORM_EPS), F.normalize(right, dim=1, eps=NORM_EPS)
        return scale * (left @ right.t())

    def one_direction(log_p: Tensor, mask: Tensor, teacher_logits: Tensor | None) -> Tensor:
        count = mask.sum(1)
        target = mask.to(log_p.dtype) / count.clamp_min(1)[:, None]
        target = (1 - label_smoothing) * target + label_smoothing / mask.shape[1]
        loss = -(target * log_p).sum(1)
        if teacher_logits is not None:
            log_teacher = teacher_logits.log_softmax(1)
            divergence = (log_teacher.exp() * (log_teacher - log_p)).sum(1)
            loss = (1 - teacher_weight) * loss + teacher_weight * divergence
        return loss[count > 0].mean()

    s = logits(a, b, logit_scale)
    mask = positive_mask(a.shape[0], b.shape[0], a_ids, b_ids).to(s.device)
    t = None
    if teacher is not None and teacher_weight > 0:
        t = logits(teacher[0].detach(), teacher[1].detach(), teacher[2]).to(s.dtype)
    losses = []
    if direction != "b_to_a":
        losses.append(one_direction(s.log_softmax(1), mask, t))
    if direction != "a_to_b":
        losses.append(one_direction(s.t().log_softmax(1), mask.t(), None if t is None else t.t()))
    return torch.stack(losses).mean()


def sigmoid_loss_reference(
    a: Tensor,  # (N, D)
    b: Tensor,  # (M, D)
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    a_ids: Tensor | None = None,  # (N,)
    b_ids: Tensor | None = None,  # (M,)
    normalize: bool = True,
) -> Tensor:
    """SigLIP's loss (Zhai et al. 2023, eq. 1) with the whole matrix in memory; the oracle in float64."""
    if normalize:
        a, b = F.normalize(a, dim=1, eps=NORM_EPS), F.normalize(b, dim=1, eps=NORM_EPS)
    logits = logit_scale * (a @ b.t()) + logit_bias
    mask = positive_mask(a.shape[0], b.shape[0], a_ids, b_ids).to(logits.device)
    return -F.logsigmoid(torch.where(mask, logits, -logits)).sum() / a.shape[0]


@dataclass(frozen=True)
class Ranks:
    """The row blocks of a and b over the ranks of a process group (one rank and no group: a single process)."""

    group: dist.ProcessGroup | None
    rank: int
    a_rows: tuple[int, ...]
    b_rows: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.a_rows)

    @property
    def a_offset(self) -> int:
        return sum(self.a_rows[: self.rank])

    @property
    def b_offset(self) -> int:
        return sum(self.b_rows[: self.rank])

    def swapped(self) -> Ranks:
        return Ranks(self.group, self.rank, self.b_rows, self.a_rows)

    def gather(self, block: Tensor, rows: tuple[int, ...]) -> Tensor:
        """Concatenates the ranks' blocks, rank r holding rows[r] rows."""
        if self.group is None:
            return block
        group = self.group if block.is_cuda else _host_group(self.group)
        largest = max(rows)
        padded = block.new_zeros(largest, *block.shape[1:])
        padded[: block.shape[0]] = block
        gathered = padded.new_empty(largest * self.size, *block.shape[1:])
        dist.all_gather_into_tensor(gathered, padded, group=group)
        if min(rows) == largest:
            return gathered
        return torch.cat([part[:n] for part, n in zip(gathered.split(largest), rows, strict=True)])

    def gather_async(self, block: Tensor, rows: tuple[int, ...]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """`gather` that other work may overtake: a buffer, and what makes the result of it once it is needed."""
        if self.group is None or block.device.type != "cuda":
            return self.gather(block, rows), lambda gathered: gathered
        largest = max(rows)
        padded = block
        if block.shape[0] < largest:
            padded = block.new_zeros(largest, *block.shape[1:])
            padded[: block.shape[0]] = block
        gathered = padded.new_empty(largest * self.size, *block.shape[1:])
        work = dist.all_gather_into_tensor(gathered, padded.contiguous(), group=self.group, async_op=True)

        def arrived(buffer: Tensor) -> Tensor:
            if work is not None:
                work.wait()
            if min(rows) == largest:
                return buffer
            return torch.cat([part[:n] for part, n in zip(buffer.split(largest), rows, strict=True)])

        return gathered, arrived

    def scatter_sum(self, total: Tensor, rows: tuple[int, ...]) -> Tensor:
        """Sums the ranks' tensors and returns this rank's block of rows: the transpose of `gather`."""
        if self.group is None:
            return total
        largest = max(rows)
        if min(rows) < largest:
            padded = total.new_zeros(self.size, largest, *total.shape[1:])
            for slot, part in zip(padded, total.split(rows), strict=True):
                slot[: part.shape[0]] = part
            total = padded.flatten(0, 1)
        block = total.new_empty(largest, *total.shape[1:])
        dist.reduce_scatter_tensor(block, total.contiguous(), group=self.group)
        return block[: rows[self.rank]]

    def sum_(self, x: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def max_(self, x: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x


def agree(
    group: dist.ProcessGroup,
    rows: tuple[int, int],  # of a and b on this rank; ignored when there is an error
    fields: Mapping[str, Any],
    error: Exception | None,
) -> Ranks:
    """Exchanges shapes and flags in one all_gather, so that a disagreement is an error on every rank, not a deadlock.

    Args:
        group: the process group.
        rows: rows of a and of b on this rank; they may differ between ranks.
        fields: what must be equal on all ranks. The names must be the same in every call, whatever the loss.
        error: what this rank's own argument check found, if anything; then ``fields`` holds arbitrary values.

    Raises:
        Exception: ``error`` itself where there is one, else ValueError naming the rank and field at fault.
    """
    codes = [_code(value) for value in fields.values()]
    header = torch.tensor([error is not None, *rows, *codes], dtype=torch.float64)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    gathered = header.new_empty(size * header.numel())
    dist.all_gather_into_tensor(gathered, header, group=_host_group(group))
    headers = gathered.view(size, -1).tolist()
    if error is not None:
        raise error
    rejecting = [r for r, other in enumerate(headers) if other[0]]
    if rejecting:
        raise ValueError(f"rank(s) {rejecting} rejected their arguments; their own message says why")
    for index, (name, value) in enumerate(fields.items()):
        others = [r for r, other in enumerate(headers) if other[3 + index] != codes[index]]
        if others:
            raise ValueError(f"ranks disagree on {name}: rank {rank} has {value}, rank(s) {others} something else")
    return Ranks(group, rank, tuple(int(h[1]) for h in headers), tuple(int(h[2]) for h in headers))


@functools.cache
def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that exchanges tensors of the CPU, so that no GPU has to catch up with its host."""
    if any(device.type == "cpu" for device in group._device_types):
        return group
    members = dist.get_process_group_ranks(group)
    return dist.new_group(members, backend="gloo", use_local_synchronization=True)


def _code(value: Any) -> float:
    if isinstance(value, (bool, int, float)):
        return float(value)
    return float(zlib.crc32(str(value).encode()))


def occurrences(sorted_values: Tensor, queries: Tensor) -> Tensor:
    return torch.searchsorted(sorted_values, queries, right=True) - torch.searchsorted(sorted_values, queries)


@dataclass(frozen=True)
class Need:
    """Which inputs want a gradient."""

    a: bool = False
    b: bool = False
    scale: bool = False
    bias: bool = False

    @property
    def any(self) -> bool:
        return self.a or self.b or self.scale or self.bias


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(like.device, like.dtype)
    return torch.full((), value, dtype=like.dtype, device=like.device)


Results = tuple[Tensor, Gradients, "Tensor | None"]  # the loss, the gradients that are needed, in-batch top-1
