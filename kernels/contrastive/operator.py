"""Contrastive losses (InfoNCE and SigLIP) over row chunks of the logits, so that the N×M matrix never exists.

Every loss is S = scale · â·b̂ᵀ followed by softmaxes over its rows and columns, or by a sigmoid. Both engines, plain
torch in this file and Triton in `fastclap.kernels.contrastive_triton`, walk over chunks of rows of A; a chunk of logits
is the only thing of size M that they hold, so memory is O(chunk·M + N·D):

* pass 1 forms a chunk of S and adds to the row and column sums of exponentials;
* pass 2 forms it again (or takes it back, as far as a fixed budget lets chunks be kept), turns it into
  G = dL/dS and multiplies: dA_chunk = G·B, dB += Gᵀ·A.

Both passes run in the forward call, as soon as any input needs a gradient, and the backward call only multiplies by
the upstream gradient: nothing but the gradients is kept between the two, and in a distributed run every collective
sits in the forward call, where the ranks agree on the shapes first. A loss over one direction or with sigmoids needs
no sums over columns; here it takes a single pass.

Three things keep float32 accurate to 1e-5 at any scale and alignment. Where |logit| ≤ bound is known on the host and
small enough, exp(S) itself serves both row and column sums; otherwise each row and column carries its maximum.
Positives are summed apart, in float64: with p → 1 the gradient p - 1 is then a sum of small terms, not a difference
of large ones. And logarithms are taken of float64 sums.

Which pairs are positives this engine works out on the host from sorted ids, never as an N×M comparison.

Eager calls go through an autograd.Function. Under torch.compile the same arithmetic is an operator,
`fastclap::info_nce` or `fastclap::sigmoid_loss`, so that a graph stays whole.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastclap.kernels import dispatch

NORM_EPS = 1e-12  # as torch.nn.functional.normalize
CPU_CHUNK_BYTES = 32 << 20  # one chunk of logits: about a last-level cache
GPU_CHUNK_BYTES = 256 << 20  # enough rows for one wave of large tiles
KEEP_BYTES = 384 << 20  # logits kept from pass 1 to pass 2; the rest is formed twice
MIN_CHUNK_ROWS = 64  # fewer rows make the products memory bound
SAFE_EXPONENT = {torch.float32: 70.0, torch.float64: 600.0}  # exp(±x), its sums and their inverses stay normal
SMALLEST_EXPONENT = {torch.float32: -86.0, torch.float64: -700.0}  # below, exp is no normal number and 30 times slower

Teacher = tuple[Tensor, Tensor, "float | Tensor"]
Pairs = tuple[Tensor, Tensor]
Gradients = tuple["Tensor | None", ...]
Function = TypeVar("Function", bound=Callable[..., Any])


# ---------------------------------------------------------------------------------------------------------------------
# References: the definitions, written with the whole matrix
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Ranks: which rows live where, and the collectives over them
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Positives
# ---------------------------------------------------------------------------------------------------------------------


class Positives:
    """The positive pairs of this rank's rows with the columns of all ranks, kept as sorted lists on the host.

    Attributes:
        row_count: int64 [N], positive columns of each local row.
        column_count: int64 [M], positive rows (of all ranks) of each column.
        sibling_count: int64 [N], rows (of all ranks) that share the row's id, i.e. column_count of its positives.
        num_rows, num_columns: rows and columns, over all ranks, that have a positive.
    """

    def __init__(self, ranks: Ranks, a_ids: Tensor | None, b_ids: Tensor | None) -> None:
        total_rows, total_columns = sum(ranks.a_rows), sum(ranks.b_rows)
        local = slice(ranks.a_offset, ranks.a_offset + ranks.a_rows[ranks.rank])
        if a_ids is None or b_ids is None:
            # Ids that make row i and column i equal: one code path for both.
            a_all, b_all = torch.arange(total_rows), torch.arange(total_columns)
            first, row_count, column_count = a_all, (a_all < total_columns).long(), (b_all < total_rows).long()
            sibling_count, self._order = torch.ones_like(a_all), b_all
        else:
            a_all = ranks.gather(a_ids.long(), ranks.a_rows).cpu()
            b_all = ranks.gather(b_ids.long(), ranks.b_rows).cpu()
            sorted_a, (sorted_b, self._order) = a_all.sort().values, b_all.sort(stable=True)
            first = torch.searchsorted(sorted_b, a_all)
            row_count = torch.searchsorted(sorted_b, a_all, right=True) - first
            column_count = occurrences(sorted_a, b_all)
            sibling_count = occurrences(sorted_a, a_all)
        self.num_rows, self.num_columns = int((row_count > 0).sum()), int((column_count > 0).sum())
        self._first, self.row_count, self.sibling_count = first[local], row_count[local], sibling_count[local]
        self.column_count = column_count

    def pairs(self, at: slice, device: torch.device) -> Pairs:
        """Row (counted from at.start) and column of every positive in a chunk of rows."""
        count, first = self.row_count[at], self._first[at]
        rows = torch.arange(count.numel()).repeat_interleave(count)
        before = count.cumsum(0) - count  # pairs of the chunk that precede the row's own
        columns = self._order[(first - before)[rows] + torch.arange(rows.numel())]
        return rows.to(device, non_blocking=True), columns.to(device, non_blocking=True)


def occurrences(sorted_values: Tensor, queries: Tensor) -> Tensor:
    return torch.searchsorted(sorted_values, queries, right=True) - torch.searchsorted(sorted_values, queries)


# ---------------------------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------------------------


class Logits:
    """S = scale · â·b̂ᵀ of this rank's rows against the columns of all ranks, one chunk of rows at a time."""

    def __init__(
        self, a: Tensor, b: Tensor, scale: float | Tensor, normalize: bool, ranks: Ranks, dtype: torch.dtype
    ) -> None:
        self.ranks, self.normalize = ranks, normalize
        scale_on_host = not isinstance(scale, Tensor) or scale.device.type == "cpu"
        self.a = a.detach().to(dtype).contiguous()  # (N, D)
        self.b = ranks.gather(b.detach(), ranks.b_rows).to(dtype).contiguous()  # (M, D)
        self.scale = _scalar(scale, self.a)
        self.a_norm = self.b_norm = self.a.new_ones(())
        if normalize:
            self.a_norm, self.b_norm = _row_norms(self.a), _row_norms(self.b)
            self.a, self.b = self.a / self.a_norm, self.b / self.b_norm
        self.bound = math.inf
        if a.device.type == "cpu":
            self.bound = float(self.scale.abs() * _largest_norm(self.a) * _largest_norm(self.b))
        elif normalize and scale_on_host:
            self.bound = abs(float(scale)) * 1.001  # rounding of the unit vectors
        if ranks.group is not None:
            finite = self.bound if self.bound < math.inf else math.inf  # all ranks must take one path, NaN or not
            self.bound = float(ranks.max_(torch.tensor(finite, device=a.device)))

    def chunks(self) -> Iterator[slice]:
        rows, row_bytes = self.a.shape[0], self.b.shape[0] * self.b.element_size()
        chunk_bytes = CPU_CHUNK_BYTES if self.a.device.type == "cpu" else GPU_CHUNK_BYTES
        step = max(MIN_CHUNK_ROWS, chunk_bytes // row_bytes)
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def empty(self, at: slice) -> Tensor:
        return self.a.new_empty(at.stop - at.start, self.b.shape[0])

    def tile(self, at: slice, out: Tensor) -> Tensor:
        return torch.mm(self.a[at] * self.scale, self.b.t(), out=out[: at.stop - at.start])


class Softmaxes:
    """Sums of exponentials over the rows and, if asked, the columns of a matrix that is seen in chunks of rows.

    With ``bounded`` logits exp(x) is summed as it is; otherwise relative to the maximum of each row and column.
    """

    def __init__(self, logits: Logits, columns: bool) -> None:
        num_rows, num_columns, device = logits.a.shape[0], logits.b.shape[0], logits.a.device
        safe = SAFE_EXPONENT[logits.a.dtype] - math.log(max(sum(logits.ranks.a_rows), num_columns))
        self.bounded, self.columns, self.ranks = logits.bound < safe, columns, logits.ranks
        self.row_max = logits.a.new_zeros(num_rows)
        self.column_max = logits.a.new_full((num_columns,), 0.0 if self.bounded else -math.inf)
        self.row_sum = torch.zeros(num_rows, dtype=torch.float64, device=device)
        self.column_sum = torch.zeros(num_columns, dtype=torch.float64, device=device)

    def add(self, x: Tensor, at: slice, pairs: Pairs, x_pos: Tensor, scratch: Tensor) -> None:
        """Adds a chunk x [c, M]; the float64 logits x_pos of the pairs enter exactly. ``x`` is left as it is."""
        rows, columns = pairs
        if not self.bounded:
            torch.amax(x, 1, out=self.row_max[at])
        e = self._exp(x, self.row_max[at, None], scratch).index_put_(pairs, x.new_zeros(()))
        at_pairs = (x_pos - self.row_max[at][rows]).exp_()
        self.row_sum[at] = e.sum(1).double().index_add_(0, rows, at_pairs)
        if not self.columns:
            return
        if not self.bounded:
            column_max = torch.maximum(self.column_max, x.amax(0))
            self.column_sum *= (self.column_max - column_max).double().exp_()
            self.column_max = column_max
            e = self._exp(x, column_max, scratch).index_put_(pairs, x.new_zeros(()))
            at_pairs = (x_pos - column_max[columns]).exp_()
        self.column_sum += e.sum(0)
        self.column_sum.index_add_(0, columns, at_pairs)

    def reduce(self) -> None:
        """Completes the column sums over the ranks."""
        if not self.columns or self.ranks.group is None:
            return
        if not self.bounded:
            column_max = self.ranks.max_(self.column_max.clone())
            self.column_sum *= (self.column_max - column_max).double().exp_()
            self.column_max = column_max
        self.ranks.sum_(self.column_sum)

    def weighted_log_sum(self, row_weight: Tensor, column_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Σ weight · log Σ exp over the rows of this rank, and over the columns of all ranks."""
        over_rows = (row_weight * (self.row_sum.log() + self.row_max)).sum()
        if not self.columns:
            return over_rows, torch.zeros_like(over_rows)
        return over_rows, (column_weight * (self.column_sum.log() + self.column_max)).sum()

    def probabilities(
        self,
        x: Tensor,
        at: slice,
        pairs: Pairs,
        x_pos: Tensor,
        row_weight: Tensor,
        column_weight: Tensor,
        scratch: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """row_weight · P + column_weight · Q of a chunk, and the same in float64 at the pairs. Overwrites ``x``."""
        rows, columns = pairs
        per_row, per_column = row_weight[at] / self.row_sum[at], column_weight / self.column_sum
        p = self._exp(x, self.row_max[at, None], scratch)
        p_pos = (x_pos - self.row_max[at][rows]).exp_()
        if not self.columns:
            return p.mul_(per_row.to(x.dtype)[:, None]), p_pos * per_row[rows]
        if self.bounded:
            weight = torch.add(per_row.to(x.dtype)[:, None], per_column.to(x.dtype), out=x)
            return p.mul_(weight), p_pos * (per_row[rows] + per_column[columns])
        q = self._exp(x, self.column_max, x).mul_(per_column.to(x.dtype))
        q_pos = (x_pos - self.column_max[columns]).exp_()
        return p.mul_(per_row.to(x.dtype)[:, None]).add_(q), p_pos * per_row[rows] + q_pos * per_column[columns]

    def _exp(self, x: Tensor, shift: Tensor, out: Tensor) -> Tensor:
        out = out[: x.shape[0]]
        if self.bounded:
            return torch.exp(x, out=out)
        return torch.sub(x, shift, out=out).clamp_(min=SMALLEST_EXPONENT[x.dtype]).exp_()


class GradientSums:
    """dA = G·B, dB = Gᵀ·A and dscale = Σ G∘cos, gathered chunk by chunk, then taken back through the normalisation."""

    def __init__(self, logits: Logits, need: Need) -> None:
        self.logits, self.need = logits, need
        self.by_rows = need.a or (need.scale and not need.b)  # one of the two products also gives dscale
        self.a = torch.empty_like(logits.a) if need.a else None
        self.b = torch.zeros_like(logits.b) if need.b else None
        self.scale = torch.zeros((), dtype=torch.float64, device=logits.a.device)

    def add(self, at: slice, g: Tensor, correction: Tensor | None = None) -> None:
        """Adds a chunk of G [c, M]; ``correction`` [c, D] is added to its G·B."""
        a = self.logits.a[at]
        if self.b is not None:
            self.b.addmm_(g.t(), a)
        if self.by_rows:
            da = torch.mm(g, self.logits.b)
            if correction is not None:
                da += correction
            along = (da * a).sum(1, keepdim=True)
            self.scale += along.sum(dtype=torch.float64)
            if self.a is not None:
                self.a[at] = da.sub_(along * a).div_(self.logits.a_norm[at]) if self.logits.normalize else da

    def finish(self, factor: float) -> Gradients:
        """(da, db, dscale) of the loss that is ``factor`` times the sum, for averaging over ranks."""
        logits, ranks = self.logits, self.logits.ranks
        if self.b is not None:
            if not self.by_rows:
                self.scale += (self.b * logits.b).sum(1).sum(dtype=torch.float64)
            self.b = ranks.scatter_sum(self.b, ranks.b_rows)
            if logits.normalize:
                local = slice(ranks.b_offset, ranks.b_offset + ranks.b_rows[ranks.rank])
                b = logits.b[local]
                along = (self.b * b).sum(1, keepdim=True)
                self.b.sub_(along * b).div_(logits.b_norm[local])
        for gradient in (self.a, self.b):
            if gradient is not None:
                gradient.mul_(logits.scale * (factor * ranks.size))
        dscale = ranks.sum_(self.scale) * factor if self.need.scale else None
        return self.a, self.b, dscale


class LabelSmoothing:
    """The uniform targets, -amount·(row_weight_i/M + column_weight_j/N) in G: two rank-one terms, no tile."""

    def __init__(
        self,
        a: Tensor,  # (N, D), as the logits see it
        b: Tensor,  # (M, D)
        scale: Tensor,
        ranks: Ranks,
        row_weight: Tensor,  # (N,)
        column_weight: Tensor,  # (M,)
        amount: float,
    ) -> None:
        self.scale = scale
        self.row_share = (row_weight * (-amount / sum(ranks.b_rows))).to(a.dtype)
        self.column_share = (column_weight * (-amount / sum(ranks.a_rows))).to(a.dtype)
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


class Top1:
    """In-batch top-1: the share of rows, and of columns, whose largest logit is that of one of their positives."""

    def __init__(self, logits: Logits) -> None:
        self.ranks = logits.ranks
        self.rows = logits.a.new_full((2, logits.a.shape[0]), -math.inf)  # of all columns, of the positive ones
        self.columns = logits.a.new_full((2, logits.b.shape[0]), -math.inf)

    def add(self, x: Tensor, at: slice, pairs: Pairs) -> None:
        rows, columns = pairs
        torch.amax(x, 1, out=self.rows[0, at])
        self.rows[1, at] = self.rows[1, at].scatter_reduce(0, rows, x[pairs], "amax")
        self.columns[0] = torch.maximum(self.columns[0], x.amax(0))
        self.columns[1] = self.columns[1].scatter_reduce(0, columns, x[pairs], "amax")

    def shares(self, num_rows: int, num_columns: int, two_sided: bool) -> Tensor:
        """[2] float32 over the ranks' whole batch; NaN for the columns if they have no part in the loss."""
        self.columns = self.ranks.max_(self.columns)
        rows = self.ranks.sum_((self.rows[1] >= self.rows[0]).sum(dtype=torch.float64))
        columns = (self.columns[1] >= self.columns[0]).sum() / (num_columns if two_sided else math.nan)
        return torch.stack([rows / num_rows, columns]).float()


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


def _row_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(NORM_EPS)


def _largest_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1).max()


# ---------------------------------------------------------------------------------------------------------------------
# The two losses
# ---------------------------------------------------------------------------------------------------------------------


def _info_nce_chunks(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    positives: Positives,
    teacher: Teacher | None,
    teacher_weight: float,
    label_smoothing: float,
    normalize: bool,
    two_sided: bool,
    ranks: Ranks,
    need: Need,
    top1: bool,
) -> tuple[Tensor, Gradients, Tensor | None]:
    """InfoNCE of the rows (and, two_sided, the columns), its gradients and in-batch top-1.

    Weights are relative to that of one row.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    device = a.device
    logits = Logits(a, b, scale, normalize, ranks, dtype)
    softmax = Softmaxes(logits, two_sided)
    teacher_logits = teacher_softmax = None
    if teacher is not None:
        teacher_logits = Logits(*teacher, normalize, ranks, dtype)
        teacher_softmax = Softmaxes(teacher_logits, two_sided)
    gradients = GradientSums(logits, need) if need.any else None
    accuracy = Top1(logits) if top1 else None

    unit = (0.5 if two_sided else 1.0) / positives.num_rows  # weight of one row in the loss
    column_unit = positives.num_rows / positives.num_columns if two_sided else 0.0
    row_weight = (positives.row_count > 0).double().to(device)
    column_weight = (positives.column_count > 0).double().mul_(column_unit).to(device)
    # Both directions give every positive of a row the same mass: 1/k depends on the id only.
    target = 1.0 / positives.row_count.clamp_min(1).double() + column_unit / positives.sibling_count.double()
    target = target.to(device)
    hard, smooth = (1 - teacher_weight) * (1 - label_smoothing), (1 - teacher_weight) * label_smoothing

    smoothing = None
    if smooth:
        smoothing = LabelSmoothing(logits.a, logits.b, logits.scale, ranks, row_weight, column_weight, smooth)

    none = torch.empty(0, dtype=torch.long, device=device)
    no_pairs, no_logits = (none, none), none.double()
    total = torch.zeros((), dtype=torch.float64, device=device)  # this rank's share of the loss
    chunks = list(logits.chunks())
    buffer, scratch = logits.empty(chunks[0]), logits.empty(chunks[0])

    def finish(x: Tensor, at: slice, pairs: Pairs) -> None:
        nonlocal total
        x_pos = x[pairs].double()
        teacher_p = None
        if teacher_logits is not None and teacher_softmax is not None:
            t = teacher_logits.tile(at, torch.empty_like(x))
            difference = t - x
            p, _ = teacher_softmax.probabilities(
                t, at, no_pairs, no_logits, row_weight, column_weight, torch.empty_like(x)
            )
            teacher_p = p
            total += teacher_weight * difference.mul_(p).sum(1).sum(dtype=torch.float64)
        if gradients is None:
            return
        g, g_pos = softmax.probabilities(x, at, pairs, x_pos, row_weight, column_weight, scratch)
        g.index_put_(pairs, (g_pos - hard * target[at][pairs[0]]).to(dtype))
        if teacher_p is not None:
            g.sub_(teacher_p, alpha=teacher_weight)
        gradients.add(at, g, None if smoothing is None else smoothing.row_gradient(at))

    kept: dict[int, Tensor] = {}
    budget = KEEP_BYTES if two_sided and need.any else 0
    for at in chunks:
        tile_bytes = (at.stop - at.start) * logits.b.shape[0] * buffer.element_size()
        keep = tile_bytes <= budget
        x = logits.tile(at, logits.empty(at) if keep else buffer)
        pairs = positives.pairs(at, device)
        x_pos = x[pairs].double()
        total -= hard * (target[at][pairs[0]] * x_pos).sum()
        softmax.add(x, at, pairs, x_pos, scratch)
        if accuracy is not None:
            accuracy.add(x, at, pairs)
        if teacher_logits is not None and teacher_softmax is not None:
            t = teacher_logits.tile(at, torch.empty_like(x))
            teacher_softmax.add(t, at, no_pairs, no_logits, scratch)
        if not two_sided:
            finish(x, at, pairs)
        elif keep:
            kept[at.start] = x
            budget -= tile_bytes
    softmax.reduce()
    if teacher_softmax is not None:
        teacher_softmax.reduce()
    if two_sided and (gradients is not None or teacher_logits is not None):
        for at in chunks:
            x = kept.pop(at.start) if at.start in kept else logits.tile(at, buffer)
            finish(x, at, positives.pairs(at, device))

    rows_part, columns_part = softmax.weighted_log_sum(row_weight, column_weight)
    if teacher_softmax is not None:
        teacher_rows, teacher_columns = teacher_softmax.weighted_log_sum(row_weight, column_weight)
        rows_part, columns_part = (
            rows_part - teacher_weight * teacher_rows,
            columns_part - teacher_weight * teacher_columns,
        )
    total += rows_part
    if smoothing is not None:
        total += smoothing.loss()
    loss = unit * (ranks.sum_(total) + columns_part)
    shares = None if accuracy is None else accuracy.shares(positives.num_rows, positives.num_columns, two_sided)
    if gradients is None:
        return loss, (), shares
    if smoothing is not None and gradients.b is not None:
        gradients.b += smoothing.column_gradient()
    return loss, gradients.finish(unit), shares


def _sigmoid_chunks(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    positives: Positives,
    normalize: bool,
    ranks: Ranks,
    need: Need,
) -> tuple[Tensor, Gradients]:
    """SigLIP's loss and its gradients, in one pass: no sums over rows or columns are needed first."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    logits = Logits(a, b, scale, normalize, ranks, dtype)
    gradients = GradientSums(logits, need) if need.any else None
    shift = _scalar(bias, logits.a)
    sums = torch.zeros(2, dtype=torch.float64, device=a.device)  # the loss and dbias
    chunks = list(logits.chunks())
    buffer, scratch = logits.empty(chunks[0]), logits.empty(chunks[0])
    zero = buffer.new_zeros(())
    for at in chunks:
        x = logits.tile(at, buffer).add_(shift)
        pairs = positives.pairs(at, a.device)
        x.index_put_(pairs, -x[pairs])  # -log σ(z) = log(1 + exp(-z)), so x is now the exponent of every term
        sums[0] += torch.logaddexp(x, zero, out=scratch[: x.shape[0]]).sum(1).sum(dtype=torch.float64)
        if gradients is None:
            continue
        g = x.sigmoid_()
        g.index_put_(pairs, -g[pairs])
        if need.bias:
            sums[1] += g.sum(1).sum(dtype=torch.float64)
        if gradients.by_rows or need.b:
            gradients.add(at, g)
    factor = 1.0 / sum(ranks.a_rows)
    sums = ranks.sum_(sums) * factor
    if gradients is None:
        return sums[0], ()
    return sums[0], (*gradients.finish(factor), sums[1] if need.bias else None)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd and torch.compile
# ---------------------------------------------------------------------------------------------------------------------

Results = tuple[Tensor, Gradients, "Tensor | None"]  # the loss, the gradients that are needed, in-batch top-1
ONCE = (
    "this loss can be differentiated once only, so create_graph=True would lose terms; backend='reference' has all "
    "derivatives"
)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are computed along with it; backward only multiplies them by the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Results], *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        loss, gradients, top1 = compute()
        ctx.save_for_backward(*gradients)
        ctx.like = [(x.shape, x.dtype, x.device) for x in inputs]
        if top1 is not None:
            ctx.mark_non_differentiable(top1)
        return loss, top1

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> Gradients:
        if torch.is_grad_enabled():
            raise RuntimeError(ONCE)
        return None, *_times_upstream(upstream, ctx.saved_tensors, ctx.like)


def _times_upstream(
    upstream: Tensor,
    gradients: Sequence[Tensor | None],
    like: Sequence[tuple[torch.Size, torch.dtype, torch.device]],
) -> Gradients:
    scaled: list[Tensor | None] = []
    for gradient, (shape, dtype, device) in zip(gradients, like, strict=True):
        if gradient is not None:
            gradient = (gradient * upstream.to(gradient.dtype)).to(device, dtype).reshape(shape)
        scaled.append(gradient)
    return tuple(scaled)


def needs_gradient(*inputs: float | Tensor) -> tuple[bool, ...]:
    """For each input, whether a gradient will be asked for."""
    enabled = torch.is_grad_enabled()
    return tuple(enabled and isinstance(x, Tensor) and x.requires_grad for x in inputs)


def on_triton(engine: str, a: Tensor, b: Tensor) -> bool:
    """Whether the Triton engine does the work: asked for, or "auto" on a GPU that it supports."""
    if engine == "auto" and dispatch.on_gpu(a) and torch.float64 not in (a.dtype, b.dtype):
        return dispatch.HAS_TRITON and dispatch.architecture(dispatch.index_of(a.device)) >= 80
    return engine == "triton"


def _info_nce(
    a: Tensor,  # (N, D)
    b: Tensor,  # (M, D)
    logit_scale: Tensor,
    a_ids: Tensor | None,  # (N,)
    b_ids: Tensor | None,  # (M,)
    teacher: Teacher | None,
    teacher_weight: float,
    label_smoothing: float,
    normalize: bool,
    direction: str,
    ranks: Ranks,
    engine: str,
    need: Need,
    top1: bool,
) -> Results:
    swap = direction == "b_to_a"  # then the rows of the transposed matrix
    if swap:
        a, b, a_ids, b_ids, ranks = b, a, b_ids, a_ids, ranks.swapped()
        need = Need(need.b, need.a, need.scale)
    if teacher is not None and (teacher_weight == 0 or swap):
        teacher = None if teacher_weight == 0 else (teacher[1], teacher[0], teacher[2])
    weight = teacher_weight if teacher is not None else 0.0
    double = torch.float64 in (a.dtype, b.dtype)
    two_sided = direction == "both"
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False), torch.cuda.device_of(a):
        if on_triton(engine, a, b):
            from fastclap.kernels.contrastive_triton import info_nce_gradients

            loss, gradients, shares = info_nce_gradients(
                a, b, logit_scale, a_ids=a_ids, b_ids=b_ids, teacher=teacher, teacher_weight=weight,
                label_smoothing=label_smoothing, normalize=normalize, two_sided=two_sided, ranks=ranks, need=need,
                top1=top1,
            )  # fmt: skip
        else:
            positives = Positives(ranks, a_ids, b_ids)
            if positives.num_rows == 0:
                raise ValueError("no row of a has a positive in b: a_ids and b_ids have no value in common")
            loss, gradients, shares = _info_nce_chunks(
                a, b, logit_scale, positives, teacher, weight, label_smoothing, normalize, two_sided, ranks, need, top1
            )
    if swap and gradients:
        gradients = (gradients[1], gradients[0], gradients[2])
    if swap and shares is not None:
        shares = shares.flip(0)
    return loss.to(torch.float64 if double else torch.float32), gradients, shares


def _sigmoid(
    a: Tensor,  # (N, D)
    b: Tensor,  # (M, D)
    logit_scale: Tensor,
    logit_bias: Tensor,
    a_ids: Tensor | None,  # (N,)
    b_ids: Tensor | None,  # (M,)
    normalize: bool,
    ranks: Ranks,
    engine: str,
    need: Need,
) -> Results:
    double = torch.float64 in (a.dtype, b.dtype)
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False), torch.cuda.device_of(a):
        if on_triton(engine, a, b):
            from fastclap.kernels.contrastive_triton import sigmoid_gradients

            loss, gradients = sigmoid_gradients(
                a, b, logit_scale, logit_bias, a_ids=a_ids, b_ids=b_ids, normalize=normalize, ranks=ranks, need=need
            )
        else:
            positives = Positives(ranks, a_ids, b_ids)
            loss, gradients = _sigmoid_chunks(a, b, logit_scale, logit_bias, positives, normalize, ranks, need)
    return loss.to(torch.float64 if double else torch.float32), gradients, None


def _graph_outputs(loss: Tensor, gradients: Gradients, count: int, dtype: torch.dtype) -> list[Tensor]:
    """Loss and ``count`` gradients as the graph was promised them: the absent ones empty."""
    outputs = [loss]
    for x in [*gradients, *[None] * (count - len(gradients))]:
        outputs.append(loss.new_empty(0) if x is None else x.to(dtype if x.dim() == 2 else torch.float64, copy=True))
    return outputs


@torch.library.custom_op("fastclap::info_nce", mutates_args=())
def info_nce_op(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    a_ids: Tensor | None,
    b_ids: Tensor | None,
    teacher_a: Tensor | None,
    teacher_b: Tensor | None,
    teacher_scale: Tensor | None,
    teacher_weight: float,
    label_smoothing: float,
    normalize: bool,
    direction: str,
    group: str,
    engine: str,
    need: list[bool],
    top1: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What torch.compile sees of `info_nce`: (loss, da, db, dscale, top-1), empty where not needed.

    ``group`` is the name of a process group, or "". Eager calls take a shorter way to the same arithmetic.
    """
    teacher = None
    if teacher_a is not None and teacher_b is not None and teacher_scale is not None:
        teacher = (teacher_a, teacher_b, teacher_scale)
    ranks = ranks_of(
        _resolve(group), None, "info_nce", a, b, a_ids, normalize, need, direction, label_smoothing, teacher,
        teacher_weight,
    )  # fmt: skip
    loss, gradients, shares = _info_nce(
        a, b, logit_scale, a_ids, b_ids, teacher, teacher_weight, label_smoothing, normalize, direction, ranks, engine,
        Need(*need), top1,
    )  # fmt: skip
    loss, da, db, dscale = _graph_outputs(loss, gradients, 3, _gradient_dtype(a, b))
    return loss, da, db, dscale, loss.new_empty(0) if shares is None else shares


@torch.library.custom_op("fastclap::sigmoid_loss", mutates_args=())
def sigmoid_op(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    a_ids: Tensor | None,
    b_ids: Tensor | None,
    normalize: bool,
    group: str,
    engine: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What torch.compile sees of `sigmoid_loss`: (loss, da, db, dscale, dbias)."""
    ranks = ranks_of(_resolve(group), None, "sigmoid_loss", a, b, a_ids, normalize, need)
    loss, gradients, _ = _sigmoid(
        a, b, logit_scale, logit_bias, a_ids, b_ids, normalize, ranks, engine, Need(*need)
    )  # fmt: skip
    loss, da, db, dscale, dbias = _graph_outputs(loss, gradients, 4, _gradient_dtype(a, b))
    return loss, da, db, dscale, dbias


def _resolve(group: str) -> dist.ProcessGroup | None:
    if not group:
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(group)  # type: ignore[arg-type]


def _gradient_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """bfloat16 gradients may keep their dtype; float16 ones would underflow before a loss scale reaches them."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return dtype if dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)


def _fake(a: Tensor, b: Tensor, need: list[bool]) -> list[Tensor]:
    loss_dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    dtype = _gradient_dtype(a, b)
    results = [a.new_empty((), dtype=loss_dtype)]
    for wanted, like in zip(need, (a, b), strict=False):
        results.append(like.new_empty(like.shape, dtype=dtype) if wanted else a.new_empty(0, dtype=loss_dtype))
    for wanted in need[2:]:
        results.append(a.new_empty((), dtype=torch.float64) if wanted else a.new_empty(0, dtype=loss_dtype))
    return results


@info_nce_op.register_fake
def _(
    a: Tensor, b: Tensor, logit_scale: Tensor, a_ids: Tensor | None, b_ids: Tensor | None, teacher_a: Tensor | None,
    teacher_b: Tensor | None, teacher_scale: Tensor | None, teacher_weight: float, label_smoothing: float,
    normalize: bool, direction: str, group: str, engine: str, need: list[bool], top1: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    results = _fake(a, b, need)
    shares = a.new_empty(2, dtype=torch.float32) if top1 else a.new_empty(0, dtype=results[0].dtype)
    return (*results, shares)


@sigmoid_op.register_fake
def _(
    a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor, a_ids: Tensor | None, b_ids: Tensor | None,
    normalize: bool, group: str, engine: str, need: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(_fake(a, b, need))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    need = next(x for x in inputs if isinstance(x, list))
    tensors = inputs[: len(need)]
    ctx.num_inputs, ctx.need = len(inputs), need
    ctx.like = [(x.shape, x.dtype, x.device) for x in tensors]
    ctx.save_for_backward(*output[1 : 1 + len(need)])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> Gradients:
    if torch.is_grad_enabled():
        raise RuntimeError(ONCE)
    nothing: list[Tensor | None] = [None] * ctx.num_inputs
    if upstream is None:
        return tuple(nothing)
    gradients = [x if wanted else None for x, wanted in zip(ctx.saved_tensors, ctx.need, strict=True)]
    nothing[: len(gradients)] = _times_upstream(upstream, gradients, ctx.like)
    return tuple(nothing)


info_nce_op.register_autograd(_backward, setup_context=_save)
sigmoid_op.register_autograd(_backward, setup_context=_save)


def info_nce_engine(
    a: Tensor,  # (N, D)
    b: Tensor,  # (M, D)
    logit_scale: float | Tensor,
    *,
    a_ids: Tensor | None,  # (N,)
    b_ids: Tensor | None,  # (M,)
    teacher: Teacher | None,
    teacher_weight: float,
    label_smoothing: float,
    normalize: bool,
    direction: str,
    group: dist.ProcessGroup | None,
    error: Exception | None,
    engine: str,
    top1: bool,
) -> tuple[Tensor, Tensor | None]:
    """`info_nce` by chunks: (loss, in-batch top-1). ``error``: what this rank found wrong with its arguments.

    Raises:
        ValueError: ranks disagree, or no row has a positive column.
    """
    if torch.compiler.is_compiling():
        if error is not None:
            raise error
        inputs = (a, b, _tensor(logit_scale, a))
        t = (None, None, None) if teacher is None else (teacher[0], teacher[1], _tensor(teacher[2], a))
        results = torch.ops.fastclap.info_nce(
            *inputs, a_ids, b_ids, *t, teacher_weight, label_smoothing, normalize, direction,
            "" if group is None else group.group_name, engine, list(needs_gradient(*inputs)), top1,
        )  # fmt: skip
        return results[0], results[4] if top1 else None
    need = needs_gradient(a, b, logit_scale)
    ranks = ranks_of(
        group, error, "info_nce", a, b, a_ids, normalize, need, direction, label_smoothing, teacher, teacher_weight
    )
    tensors = (a, b, torch.as_tensor(logit_scale))

    def compute() -> Results:
        return _info_nce(
            *tensors, a_ids, b_ids, teacher, teacher_weight, label_smoothing, normalize, direction, ranks, engine,
            Need(*need), top1,
        )  # fmt: skip

    if any(need):
        return _WithGradients.apply(compute, *tensors)
    loss, _, shares = compute()
    return loss, shares


def sigmoid_engine(
    a: Tensor,  # (N, D)
    b: Tensor,  # (M, D)
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    a_ids: Tensor | None,  # (N,)
    b_ids: Tensor | None,  # (M,)
    normalize: bool,
    group: dist.ProcessGroup | None,
    error: Exception | None,
    engine: str,
) -> Tensor:
    """`sigmoid_loss` by chunks."""
    if torch.compiler.is_compiling():
        if error is not None:
            raise error
        inputs = (a, b, _tensor(logit_scale, a), _tensor(logit_bias, a))
        name = "" if group is None else group.group_name
        return torch.ops.fastclap.sigmoid_loss(
            *inputs, a_ids, b_ids, normalize, name, engine, list(needs_gradient(*inputs))
        )[0]
    need = needs_gradient(a, b, logit_scale, logit_bias)
    ranks = ranks_of(group, error, "sigmoid_loss", a, b, a_ids, normalize, need)
    tensors = (a, b, torch.as_tensor(logit_scale), torch.as_tensor(logit_bias))

    def compute() -> Results:
        return _sigmoid(*tensors, a_ids, b_ids, normalize, ranks, engine, Need(*need))

    return _WithGradients.apply(compute, *tensors)[0] if any(need) else compute()[0]


def _tensor(value: float | Tensor, like: Tensor) -> Tensor:
    """A scalar as a tensor that a compiled graph can take."""
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def ranks_of(
    group: dist.ProcessGroup | None,
    error: Exception | None,
    loss: str,
    a: Tensor,
    b: Tensor,
    a_ids: Tensor | None,
    normalize: bool,
    need: Sequence[bool],
    direction: str = "both",
    label_smoothing: float = 0.0,
    teacher: Teacher | None = None,
    teacher_weight: float = 0.0,
) -> Ranks:
    """The row blocks of the ranks, after they have agreed on everything that must be equal."""
    if group is None:
        if error is not None:
            raise error
        return Ranks(None, 0, (a.shape[0],), (b.shape[0],))
    names = (
        "loss", "embedding size", "dtype of a", "dtype of b", "use of ids", "normalize", "direction", "label_smoothing",
        "teacher_weight", "teacher's embedding size", "teacher's dtypes",
        "need for gradients of a, b, logit_scale, logit_bias",
    )  # fmt: skip
    if error is not None:
        return agree(group, (0, 0), dict.fromkeys(names, 0), error)
    used = teacher if teacher_weight > 0 else None
    values = (
        loss, a.shape[1], a.dtype, b.dtype, a_ids is not None, bool(normalize), direction, label_smoothing,
        teacher_weight, 0 if used is None else used[0].shape[1],
        None if used is None else f"{used[0].dtype} and {used[1].dtype}",
        tuple(bool(x) for x in need),
    )  # fmt: skip
    return agree(group, (a.shape[0], b.shape[0]), dict(zip(names, values, strict=True)), None)
