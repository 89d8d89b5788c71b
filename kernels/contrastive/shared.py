"""What the engines of the contrastive losses share: the values of a call, the ranks, the definitions in float64."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-12  # as torch.nn.functional.normalize
DIRECTIONS = ("both", "a_to_b", "b_to_a")

Ids = tuple[Tensor, Tensor]  # of the rows of a, and of those of b
Teacher = tuple[Tensor, Tensor, "float | Tensor"]  # a_t, b_t, scale_t
Gradients = tuple["Tensor | None", ...]
Results = tuple[Tensor, Gradients, "Tensor | None"]  # the loss, the gradients that are needed, in-batch top-1


@dataclass(frozen=True)
class Contrast:
    """The options that define an InfoNCE, as `fastclap.losses.info_nce` explains them.

    Raises:
        TypeError, ValueError: an option is none of its values.
    """

    teacher_weight: float = 0.0
    label_smoothing: float = 0.0
    normalize: bool = True
    direction: str = "both"

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {self.direction!r}")
        for name, value, below in (
            ("label_smoothing", self.label_smoothing, 1.0),
            ("teacher_weight", self.teacher_weight, math.inf),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not (0 <= value <= 1 and value < below):
                raise ValueError(f"{name} must be in [0, 1{')' if below == 1 else ']'}, got {value}")

    @property
    def key(self) -> str:
        """What `from_key` makes an equal one of. Its conversions are those that torch.compile follows."""
        return f"{float(self.teacher_weight)} {float(self.label_smoothing)} {bool(self.normalize)} {self.direction}"

    @classmethod
    def from_key(cls, key: str) -> Contrast:
        weight, smoothing, normalize, direction = key.split()
        return cls(float(weight), float(smoothing), normalize == "True", direction)


class Need(NamedTuple):
    """Which inputs want a gradient."""

    a: bool
    b: bool
    scale: bool
    bias: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# definitions


def _positive_mask(num_rows: int, num_columns: int, ids: Ids | None) -> Tensor:
    """Boolean [num_rows, num_columns]: equal ids, or without ids the main diagonal."""
    if ids is None:
        return torch.eye(num_rows, num_columns, dtype=torch.bool)
    return ids[0][:, None] == ids[1]


def info_nce_reference(
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
    logit_scale: float | Tensor,
    ids: Ids | None,  # [N], [M]
    teacher: Teacher | None,
    contrast: Contrast,
) -> Tensor:
    """InfoNCE with the whole matrix in memory, in the dtype of its inputs; the oracle in float64. See `info_nce`."""
    smoothing, weight = contrast.label_smoothing, contrast.teacher_weight

    def logits(left: Tensor, right: Tensor, scale: float | Tensor) -> Tensor:
        if contrast.normalize:
            left, right = F.normalize(left, dim=1, eps=NORM_EPS), F.normalize(right, dim=1, eps=NORM_EPS)
        return scale * (left @ right.t())

    def one_direction(log_p: Tensor, mask: Tensor, teacher_logits: Tensor | None) -> Tensor:
        count = mask.sum(1)
        target = mask.to(log_p.dtype) / count.clamp_min(1)[:, None]
        target = (1 - smoothing) * target + smoothing / mask.shape[1]
        loss = -(target * log_p).sum(1)
        if teacher_logits is not None:
            log_teacher = teacher_logits.log_softmax(1)
            divergence = (log_teacher.exp() * (log_teacher - log_p)).sum(1)
            loss = (1 - weight) * loss + weight * divergence
        return loss[count > 0].mean()

    s = logits(a, b, logit_scale)
    mask = _positive_mask(a.shape[0], b.shape[0], ids).to(s.device)
    t = None
    if teacher is not None:
        t = logits(teacher[0].detach(), teacher[1].detach(), teacher[2]).to(s.dtype)
    losses = []
    if contrast.direction != "b_to_a":
        losses.append(one_direction(s.log_softmax(1), mask, t))
    if contrast.direction != "a_to_b":
        losses.append(one_direction(s.t().log_softmax(1), mask.t(), None if t is None else t.t()))
    return torch.stack(losses).mean()


def sigmoid_loss_reference(
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    ids: Ids | None,  # [N], [M]
    normalize: bool,
) -> Tensor:
    """SigLIP's loss (Zhai et al. 2023, eq. 1) with the whole matrix in memory; the oracle in float64."""
    if normalize:
        a, b = F.normalize(a, dim=1, eps=NORM_EPS), F.normalize(b, dim=1, eps=NORM_EPS)
    logits = logit_scale * (a @ b.t()) + logit_bias
    mask = _positive_mask(a.shape[0], b.shape[0], ids).to(logits.device)
    return -F.logsigmoid(torch.where(mask, logits, -logits)).sum() / a.shape[0]


# ---------------------------------------------------------------------------------------------------------------------
# ranks


class Ranks:
    """The row blocks of a and b over the ranks of a process group (one rank and no group: a single process).

    Attributes:
        a_rows, b_rows: how many rows of a, and of b, each rank has.
        num_rows, num_columns: their sums, the shape of the matrix of logits.
        own_rows, own_columns: this rank's among them.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, rank: int, a_rows: tuple[int, ...], b_rows: tuple[int, ...]
    ) -> None:
        self.group, self.rank, self.size = group, rank, len(a_rows)
        self.a_rows, self.b_rows = a_rows, b_rows
        self.num_rows, self.num_columns = sum(a_rows), sum(b_rows)
        self.own_rows = slice(sum(a_rows[:rank]), sum(a_rows[: rank + 1]))
        self.own_columns = slice(sum(b_rows[:rank]), sum(b_rows[: rank + 1]))

    def transposed(self) -> Ranks:
        """Those of b and a."""
        return Ranks(self.group, self.rank, self.b_rows, self.a_rows)

    def gather(self, block: Tensor, rows: tuple[int, ...]) -> Tensor:
        """Concatenates the ranks' blocks, rank r holding rows[r] rows."""
        return self.start_gather(block, rows, async_op=False)()

    def start_gather(self, block: Tensor, rows: tuple[int, ...], async_op: bool = True) -> Callable[[], Tensor]:
        """`gather` that other work on the GPU may overtake: gives what waits for the result and returns it."""
        if self.group is None:
            return lambda: block
        group = self.group if block.is_cuda else _host_group(self.group)
        largest, padded = max(rows), block.contiguous()
        if block.shape[0] < largest:
            padded = block.new_zeros(largest, *block.shape[1:])
            padded[: block.shape[0]] = block
        gathered = padded.new_empty(largest * self.size, *block.shape[1:])
        work = dist.all_gather_into_tensor(gathered, padded, group=group, async_op=async_op and block.is_cuda)

        def finish() -> Tensor:
            if work is not None:
                work.wait()
            if min(rows) == largest:
                return gathered
            return torch.cat([part[:n] for part, n in zip(gathered.split(largest), rows, strict=True)])

        return finish

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

    def all_reduce(self, x: Tensor, maximum: bool = False) -> Tensor:
        """Sums x over the ranks, or takes its maximum, in place."""
        if self.group is not None:
            dist.all_reduce(x, op=dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=self.group)
        return x


AGREED = (
    "loss or agree_once", "embedding size", "dtype of a", "dtype of b", "use of ids", "normalize", "direction",
    "label_smoothing", "teacher_weight", "teacher's embedding size", "teacher's dtypes",
    "need for gradients of a, b, logit_scale, logit_bias",
)  # fmt: skip


def agree(
    group: dist.ProcessGroup | None,
    loss: str,
    a: Tensor,
    b: Tensor,
    ids: Ids | None,
    teacher: Teacher | None,
    contrast: Contrast,
    need: Need,
    once: bool,
) -> Ranks:
    """Exchanges row counts and options in one all_gather: a disagreement is an error on every rank, not a deadlock.

    The host waits for the slowest one here. With `once`, a call whose row counts and options this rank has had agreed
    before takes the others' as they were then.

    Raises:
        ValueError: a rank has rejected its arguments (`reject`), or one has something else than this one, which is
            named.
    """
    if group is None:
        return Ranks(None, 0, (a.shape[0],), (b.shape[0],))
    values = (
        f"{loss}, agree_once={once}", a.shape[1], a.dtype, b.dtype, ids is not None, bool(contrast.normalize),
        contrast.direction, float(contrast.label_smoothing), float(contrast.teacher_weight),
        0 if teacher is None else teacher[0].shape[1],
        None if teacher is None else f"{teacher[0].dtype} and {teacher[1].dtype}", tuple(map(bool, need)),
    )  # fmt: skip
    signature, agreed = (a.shape[0], b.shape[0], *values), _agreed_once(group)
    if once and signature in agreed:
        return agreed[signature]
    codes = [float(zlib.crc32(str(value).encode())) for value in values]
    headers = _gather_headers(group, [0.0, a.shape[0], b.shape[0], *codes])
    rejecting = [r for r, other in enumerate(headers) if other[0]]
    if rejecting:
        raise ValueError(f"rank(s) {rejecting} rejected their arguments; their own message says why")
    rank = dist.get_rank(group)
    for index, (name, value) in enumerate(zip(AGREED, values, strict=True)):
        others = [r for r, other in enumerate(headers) if other[3 + index] != codes[index]]
        if others:
            raise ValueError(f"ranks disagree on {name}: rank {rank} has {value}, rank(s) {others} something else")
    ranks = Ranks(group, rank, tuple(int(h[1]) for h in headers), tuple(int(h[2]) for h in headers))
    if once:
        agreed[signature] = ranks
    return ranks


def reject(error: Exception, group: dist.ProcessGroup | None, once: bool) -> NoReturn:
    """Raises the error, after telling the ranks that wait in `agree`; with `once` nobody does after a first call."""
    if group is not None and not torch.compiler.is_compiling() and not (once and _agreed_once(group)):
        _gather_headers(group, [1.0] + [0.0] * (2 + len(AGREED)))
    raise error


def _gather_headers(group: dist.ProcessGroup, header: list[float]) -> list[list[float]]:
    """The headers of all ranks."""
    own = torch.tensor(header, dtype=torch.float64)
    gathered = own.new_empty(dist.get_world_size(group) * len(header))
    dist.all_gather_into_tensor(gathered, own, group=_host_group(group))
    return gathered.view(-1, len(header)).tolist()


@functools.cache
def _agreed_once(group: dist.ProcessGroup) -> dict[tuple[Any, ...], Ranks]:
    """What `agree` has found with `once`, by this rank's own row counts and options."""
    return {}


@functools.cache
def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that exchanges tensors of the CPU, so that no GPU has to catch up with its host."""
    if any(device.type == "cpu" for device in group._device_types):
        return group
    members = dist.get_process_group_ranks(group)
    return dist.new_group(members, backend="gloo", use_local_synchronization=True)


# ---------------------------------------------------------------------------------------------------------------------
# parts of the loss


class IdMatches(NamedTuple):
    """Who has whose id, over all ranks: N rows and M columns.

    Attributes:
        b: int64 [M], the ids of the columns.
        order: int64 [M], the columns in the order of their ids.
        first: int64 [N], where in `order` the columns with the row's id begin.
        row_count: int64 [N], columns with the row's id.
        column_count: int64 [M], rows with the column's id.
        sibling_count: int64 [N], rows with the row's id.
    """

    b: Tensor
    order: Tensor
    first: Tensor
    row_count: Tensor
    column_count: Tensor
    sibling_count: Tensor


def match_ids(ids: Ids, ranks: Ranks) -> IdMatches:
    """Gathers the ids of the ranks, and counts on their device by sorting: no N×M comparison, no wait."""
    a, b = ranks.gather(ids[0], ranks.a_rows), ranks.gather(ids[1], ranks.b_rows)
    sorted_a, (sorted_b, order) = a.sort().values, b.sort(stable=True)
    first = torch.searchsorted(sorted_b, a)
    row_count = torch.searchsorted(sorted_b, a, right=True) - first
    column_count, sibling_count = (
        torch.searchsorted(sorted_a, x, right=True) - torch.searchsorted(sorted_a, x) for x in (b, a)
    )
    return IdMatches(b, order, first, row_count, column_count, sibling_count)


class LabelSmoothing:
    """The uniform targets, -amount·(row_weight_i/M + column_weight_j/N) in G: two rank-one terms, no tile."""

    def __init__(
        self,
        a: Tensor,  # [N, D], as the logits see it
        b: Tensor,  # [M, D]
        scale: Tensor,
        ranks: Ranks,
        row_weight: Tensor,  # [N]
        column_weight: Tensor,  # [M]
        amount: float,
    ) -> None:
        self.scale = scale
        self.row_share = (row_weight * (-amount / ranks.num_columns)).to(a.dtype)
        self.column_share = (column_weight * (-amount / ranks.num_rows)).to(a.dtype)
        self.a_sum, self.b_sum = a.sum(0), b.sum(0)
        self.a_shared, self.b_shared = self.row_share @ a, self.column_share @ b

    def loss(self) -> Tensor:
        """Its contribution through this rank's rows."""
        return self.scale * (
            self.a_shared.double() @ self.b_sum.double() + self.a_sum.double() @ self.b_shared.double()
        )

    def row_gradient(self, at: slice) -> Tensor:
        return self.row_share[at, None] * self.b_sum + self.b_shared

    def column_gradient(self) -> Tensor:
        return self.a_shared + self.column_share[:, None] * self.a_sum
