"""The plain torch engine of the contrastive losses, over chunks of rows of the logits (see `operator`).

A loss over one direction or with sigmoids needs no sums over columns; it takes a single pass.

Three things keep float32 accurate to 1e-5 at any scale and alignment. Where |logit| ≤ bound is known on the host and
small enough, exp(S) itself serves both row and column sums; otherwise each row and column carries its maximum.
Positives are summed separately, in float64: with p → 1 the gradient p - 1 is then a sum of small terms, not a
difference of large ones. And logarithms are taken of float64 sums.

Which pairs are positives is worked out on the host from sorted ids, never as an N×M comparison.

A queue's logits are two more matrices, rows × b entries and columns × a entries, each in chunks of its own: before the
walk over the batch they enter the sums, after it the gradients. Debiasing gives positives and negatives weights of
their own. A guide takes some logits out of the rows' sums and others out of the columns', so that neither shares its
exponentials with the other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastclap.kernels.contrastive.shared import (
    NORM_EPS,
    Contrast,
    Gradients,
    Ids,
    LabelSmoothing,
    Need,
    QueueRows,
    Ranks,
    Results,
    Teacher,
)

CPU_CHUNK_BYTES = 32 << 20  # one chunk of logits: about a last-level cache
GPU_CHUNK_BYTES = 256 << 20  # enough rows for one wave of large tiles
KEEP_BYTES = 384 << 20  # logits kept from pass 1 to pass 2; the rest is formed twice
MIN_CHUNK_ROWS = 64  # fewer rows make the products memory bound
SAFE_EXPONENT = {torch.float32: 70.0, torch.float64: 600.0}  # exp(±x), its sums and their inverses stay normal
SMALLEST_EXPONENT = {torch.float32: -86.0, torch.float64: -700.0}  # below, exp is no normal number and 30 times slower
LEFT_OUT = -1e30  # the logit of what takes no part in a sum; finite, so that it is no NaN beside its like
Pairs = tuple[Tensor, Tensor]
Views = tuple[Tensor, Tensor]  # a chunk of logits as the rows' sums see it, and as the columns' sums do


class PositivePairs:
    """The positive pairs of this rank's rows with the columns of all ranks, kept as sorted lists on the host.

    Attributes:
        row_count: int64 [N], positive columns of each local row.
        column_count: int64 [M], positive rows (of all ranks) of each column.
        sibling_count: int64 [N], rows (of all ranks) that share the row's id, i.e. column_count of its positives.
        num_rows, num_columns: rows and columns, over all ranks, that have a positive.
    """

    def __init__(self, ids: Ids | None, ranks: Ranks) -> None:
        if ids is None:
            # Ids that make row i and column i equal: one code path for both.
            first, self._order = torch.arange(ranks.num_rows), torch.arange(ranks.num_columns)
            row_count, self.column_count = (first < ranks.num_columns).long(), (self._order < ranks.num_rows).long()
            sibling_count = torch.ones_like(first)
        else:
            # Counted by sorting: no N×M comparison.
            a, b = ranks.gather(ids[0].long().cpu(), ranks.a_rows), ranks.gather(ids[1].long().cpu(), ranks.b_rows)
            sorted_a, (sorted_b, self._order) = a.sort().values, b.sort(stable=True)
            first = torch.searchsorted(sorted_b, a)
            row_count = torch.searchsorted(sorted_b, a, right=True) - first
            self.column_count, sibling_count = (
                torch.searchsorted(sorted_a, x, right=True) - torch.searchsorted(sorted_a, x) for x in (b, a)
            )
        self.num_rows, self.num_columns = int((row_count > 0).sum()), int((self.column_count > 0).sum())
        self._first, self.row_count = first[ranks.own_rows], row_count[ranks.own_rows]
        self.sibling_count = sibling_count[ranks.own_rows]

    def pairs(self, at: slice, device: torch.device) -> Pairs:
        """Row (counted from at.start) and column of every positive in a chunk of rows."""
        count, first = self.row_count[at], self._first[at]
        rows = torch.arange(count.numel()).repeat_interleave(count)
        before = count.cumsum(0) - count  # pairs of the chunk that precede the row's own
        columns = self._order[(first - before)[rows] + torch.arange(rows.numel())]
        return rows.to(device, non_blocking=True), columns.to(device, non_blocking=True)


class Logits:
    """S = scale · â·b̂ᵀ of this rank's rows against the columns of all ranks, one chunk of rows at a time.

    With `gather` b is this rank's rows of them, otherwise all.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        scale: float | Tensor,
        normalize: bool,
        ranks: Ranks,
        dtype: torch.dtype,
        gather: bool = True,
    ) -> None:
        self.ranks, self.normalize = ranks, normalize
        self.a = a.detach().to(dtype).contiguous()  # [N, D]
        b = ranks.gather(b.detach(), ranks.b_rows) if gather else b.detach()
        self.b = b.to(dtype).contiguous()  # [M, D]
        self.scale = _scalar_like(scale, self.a)
        self.a_norm = self.b_norm = self.a.new_ones(())
        if normalize:
            self.a_norm, self.b_norm = (
                torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(NORM_EPS) for x in (self.a, self.b)
            )
            self.a, self.b = self.a / self.a_norm, self.b / self.b_norm
        self.bound = math.inf
        if a.device.type == "cpu":
            longest_a, longest_b = (torch.linalg.vector_norm(x, dim=1).max() for x in (self.a, self.b))
            self.bound = float(self.scale.abs() * longest_a * longest_b)
        elif normalize and (not isinstance(scale, Tensor) or scale.device.type == "cpu"):
            self.bound = abs(float(scale)) * 1.001  # rounding of the unit vectors
        if ranks.group is not None:
            finite = self.bound if self.bound < math.inf else math.inf  # all ranks must take one path, NaN or not
            self.bound = float(ranks.all_reduce(torch.tensor(finite, device=a.device), maximum=True))
        chunk_bytes = CPU_CHUNK_BYTES if a.device.type == "cpu" else GPU_CHUNK_BYTES
        step = max(MIN_CHUNK_ROWS, chunk_bytes // (self.b.shape[0] * self.b.element_size()))
        self.chunks = [slice(start, min(start + step, len(a))) for start in range(0, len(a), step)]

    def chunk(self, at: slice, out: Tensor) -> Tensor:
        """The rows `at` of S, in the first rows of `out`."""
        return torch.mm(self.a[at] * self.scale, self.b.t(), out=out[: at.stop - at.start])


class QueueLogits:
    """The logits of this rank's rows of one side against the queue's entries of the other, in chunks of rows.

    Attributes:
        count: int64 [N], entries that take part for each row: all but those with the row's id.
    """

    def __init__(
        self,
        x: Tensor,  # [N, D]
        entries: Tensor,  # [Q, D]
        ids: Ids | None,  # [N], [Q]
        scale: Tensor,
        normalize: bool,
        ranks: Ranks,
        dtype: torch.dtype,
    ) -> None:
        self.logits = Logits(x, entries, scale, normalize, ranks, dtype, gather=False)
        self.chunks, self.entries = self.logits.chunks, self.logits.b
        self.count = torch.full((x.shape[0],), entries.shape[0])
        self._same: PositivePairs | None = None
        if ids is not None:
            self._same = PositivePairs(ids, Ranks(None, 0, (x.shape[0],), (entries.shape[0],)))
            self.count -= self._same.row_count
        self._buffer = self.entries.new_empty(self.chunks[0].stop, entries.shape[0])

    def chunk(self, at: slice) -> Tensor:
        """The rows `at` of the logits; the next chunk takes its memory."""
        x = self.logits.chunk(at, self._buffer)
        if self._same is not None:
            x.index_put_(self._same.pairs(at, x.device), x.new_full((), LEFT_OUT))
        return x


class Guide:
    """Which columns that are no positives a row leaves out, and which rows a column: those that a guide finds closer.

    Closer, that is, than the closest of its positives less a margin (GISTEmbed, arXiv 2402.16829).
    """

    def __init__(
        self,
        teacher: Teacher,
        margin: float,
        relative: bool,
        positives: PositivePairs,
        ranks: Ranks,
        dtype: torch.dtype,
    ) -> None:
        # The pairs' cosines are taken from chunks like all others, so that equal rows are equally close.
        self.cosines = Logits(teacher[0], teacher[1], 1.0, True, ranks, dtype)
        rows = self.cosines.a.new_full((self.cosines.a.shape[0],), -math.inf)
        columns = self.cosines.a.new_full((self.cosines.b.shape[0],), -math.inf)
        self._buffer = rows.new_empty(self.cosines.chunks[0].stop, columns.shape[0])
        for at in self.cosines.chunks:
            pairs = positives.pairs(at, rows.device)
            t = self.cosines.chunk(at, self._buffer)[pairs]
            rows[at] = rows[at].scatter_reduce(0, pairs[0], t, "amax")
            columns = columns.scatter_reduce(0, pairs[1], t, "amax")
        columns = ranks.all_reduce(columns, maximum=True)
        self.row_threshold, self.column_threshold = (
            (x * (1 - margin) if relative else x - margin).masked_fill_(x == -math.inf, math.inf)  # no positive
            for x in (rows, columns)
        )

    def views(self, x: Tensor, at: slice, pairs: Pairs) -> Views:
        """The chunk x [c, M] of logits without what is left out."""
        t = self.cosines.chunk(at, self._buffer)
        t.index_put_(pairs, t.new_full((), -math.inf))
        rows = x.masked_fill(t > self.row_threshold[at, None], LEFT_OUT)
        return rows, x.masked_fill(t > self.column_threshold, LEFT_OUT)


class Debias(NamedTuple):
    """What debiased negatives (Chuang et al. 2020, arXiv 2007.00224, eq. 8) need to know of rows, or of columns.

    Attributes:
        prior: that a negative is a positive.
        scale: float64 0-d.
        negatives, positives: float64 [n], how many each has.
    """

    prior: float
    scale: Tensor
    negatives: Tensor
    positives: Tensor


class Sums:
    """Sums of exponentials over the rows or the columns of a matrix, and their part in the loss.

    Exponents are relative to `maximum`, which is 0 where the logits are bounded. With a `debias` the positives are
    summed apart from the negatives; without one the two sums are one tensor.
    """

    def __init__(self, weight: Tensor, bounded: bool, dtype: torch.dtype, debias: Debias | None, once: bool) -> None:
        self.weight, self.debias = weight, debias  # float64 [n], of each row in the loss
        self.once = once  # whether a row's terms come all at once
        self.maximum = weight.new_full(weight.shape, 0.0 if bounded else -math.inf, dtype=dtype)
        self.total = torch.zeros_like(weight)
        self.positive = self.total if debias is None else torch.zeros_like(weight)

    def raise_maximum(self, at: slice, maximum: Tensor) -> None:
        if self.once:
            self.maximum[at] = maximum
            return
        maximum = torch.maximum(self.maximum[at], maximum)
        self._rescale(at, maximum)
        self.maximum[at] = maximum

    def reduce(self, ranks: Ranks, bounded: bool) -> None:
        """Completes the sums over the ranks."""
        if not bounded:
            maximum = ranks.all_reduce(self.maximum.clone(), maximum=True)
            self._rescale(slice(None), maximum)
            self.maximum = maximum
        for x in self._sums():
            ranks.all_reduce(x)

    def add(self, at: slice, others: Tensor, index: Tensor, positives: Tensor) -> None:
        """Adds sums of negatives for the rows `at` and float64 terms of positives, whose rows `index` counts from
        at.start."""
        self.total[at].add_(others)
        self.positive[at].index_add_(0, index, positives)

    def weighted_log(self) -> Tensor:
        """Σ weight · log Σ exp."""
        total = self.total if self.debias is None else self._debiased(slice(None))[0]
        return (self.weight * (total.log() + self.maximum)).sum()

    def shares(self, at: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The factors of a negative's exponential in the gradient, and of a positive's."""
        if self.debias is None:
            share = self.weight[at] / self.total[at]
            return share, share
        total, held, _ = self._debiased(at)
        share, prior = self.weight[at] / total, self.debias.prior
        taken_off = prior / (1 - prior) * self.debias.negatives[at] / self.debias.positives[at]
        return share.masked_fill(held, 0.0) / (1 - prior), share * (1 - taken_off.masked_fill_(held, 0.0))

    def bound_gradient(self, at: slice = slice(None)) -> Tensor:
        """The gradient of the scale through the lower bound of the negatives, where it holds."""
        assert self.debias is not None
        total, held, least = self._debiased(at)
        return -(self.weight[at] * held * least / total).sum() * self.debias.scale.sign()

    def _debiased(self, at: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The total of positives and debiased negatives, where the negatives' lower bound holds, and that bound."""
        assert self.debias is not None
        prior, scale, num, count = self.debias
        least = num[at] * torch.exp(-scale.abs() - self.maximum[at])
        negative = (self.total[at] - prior * num[at] / count[at] * self.positive[at]) / (1 - prior)
        held = negative < least
        return self.positive[at] + torch.where(held, least, negative), held, least

    def _rescale(self, at: slice, maximum: Tensor) -> None:
        factor = (self.maximum[at] - maximum).double().exp_()
        for x in self._sums():
            x[at].mul_(factor)

    def _sums(self) -> tuple[Tensor, ...]:
        return (self.total,) if self.debias is None else (self.total, self.positive)


class RunningSoftmax:
    """Sums of exponentials over the rows and, if asked, the columns of a matrix that is seen in chunks of rows.

    With `bounded` logits exp(x) is summed as it is; otherwise relative to the maximum of each row and column.
    """

    def __init__(
        self,
        logits: Logits,
        row_weight: Tensor,  # [N] float64, of each row in the loss
        column_weight: Tensor,  # [M]
        columns: bool,
        debias: tuple[Debias, Debias] | None = None,
        queues: tuple[QueueLogits | None, QueueLogits | None] = (None, None),
        guided: bool = False,
    ) -> None:
        bound, terms = logits.bound, max(logits.ranks.num_rows, logits.b.shape[0])
        for queue in queues:
            if queue is not None:
                bound, terms = max(bound, queue.logits.bound), terms + queue.entries.shape[0]
        safe = SAFE_EXPONENT[logits.a.dtype] - math.log(terms)
        # With a guide rows and columns leave out different logits, and have no exponential in common.
        self.bounded, self.two_sided, self.ranks = bound < safe and not guided, columns, logits.ranks
        of_rows, of_columns = (None, None) if debias is None else debias
        dtype = logits.a.dtype
        self.rows = Sums(row_weight, self.bounded, dtype, of_rows, once=queues[0] is None)
        self.columns = Sums(column_weight, self.bounded, dtype, of_columns, once=False)
        self._column_shares: tuple[Tensor, Tensor] | None = None

    def add(self, views: Views, at: slice, pairs: Pairs, x_pos: Tensor, scratch: Tensor) -> None:
        """Adds a chunk [c, M]; the float64 logits x_pos of the pairs enter exactly. The views are left as they are."""
        (x, of_columns), (rows, columns) = views, pairs
        if not self.bounded:
            self.rows.raise_maximum(at, x.amax(1))
        row_max = self.rows.maximum[at]
        e = self._exp(x, row_max[:, None], scratch).index_put_(pairs, x.new_zeros(()))
        at_pairs = (x_pos - row_max[rows]).exp_()
        self.rows.add(at, e.sum(1), rows, at_pairs)
        if not self.two_sided:
            return
        if not self.bounded:
            self.columns.raise_maximum(slice(None), of_columns.amax(0))
            e = self._exp(of_columns, self.columns.maximum, scratch).index_put_(pairs, x.new_zeros(()))
            at_pairs = (x_pos - self.columns.maximum[columns]).exp_()
        self.columns.add(slice(None), e.sum(0), columns, at_pairs)

    def add_queue(self, sums: Sums, first: int, queue: QueueLogits) -> None:
        """Adds a queue to the sums of the rows, or columns, that begin with `first`, before any chunk."""
        for at in queue.chunks:
            x, own = queue.chunk(at), slice(first + at.start, first + at.stop)
            if not self.bounded:
                sums.raise_maximum(own, x.amax(1))
            sums.total[own].add_(self._exp(x, sums.maximum[own, None], x).sum(1))

    def queue_probabilities(self, sums: Sums, first: int, queue: QueueLogits, at: slice) -> Tensor:
        """weight · P of a chunk of the queue's logits."""
        x, own = queue.chunk(at), slice(first + at.start, first + at.stop)
        return self._exp(x, sums.maximum[own, None], x).mul_(sums.shares(own)[0].to(x.dtype)[:, None])

    def reduce(self) -> None:
        """Completes the column sums over the ranks."""
        if self.two_sided and self.ranks.group is not None:
            self.columns.reduce(self.ranks, self.bounded)

    def weighted_log_sum(self) -> tuple[Tensor, Tensor]:
        """Σ weight · log Σ exp over the rows of this rank, and over the columns of all ranks."""
        over_rows = self.rows.weighted_log()
        return over_rows, self.columns.weighted_log() if self.two_sided else torch.zeros_like(over_rows)

    def probabilities(
        self, views: Views, at: slice, pairs: Pairs, x_pos: Tensor, scratch: Tensor
    ) -> tuple[Tensor, Tensor]:
        """row_weight · P + column_weight · Q of a chunk, and the same in float64 at the pairs. Overwrites the views."""
        (x, of_columns), (rows, columns) = views, pairs
        row_max = self.rows.maximum[at]
        per_row, per_row_pos = self.rows.shares(at)
        p = self._exp(x, row_max[:, None], scratch)
        p_pos = (x_pos - row_max[rows]).exp_()
        if not self.two_sided:
            return p.mul_(per_row.to(x.dtype)[:, None]), p_pos * per_row_pos[rows]
        if self._column_shares is None:  # complete, and the same for all chunks
            self._column_shares = self.columns.shares()
        per_column, per_column_pos = self._column_shares
        if self.bounded:
            weight = torch.add(per_row.to(x.dtype)[:, None], per_column.to(x.dtype), out=x)
            return p.mul_(weight), p_pos * (per_row_pos[rows] + per_column_pos[columns])
        q = self._exp(of_columns, self.columns.maximum, of_columns).mul_(per_column.to(x.dtype))
        q_pos = (x_pos - self.columns.maximum[columns]).exp_()
        return p.mul_(per_row.to(x.dtype)[:, None]).add_(q), p_pos * per_row_pos[rows] + q_pos * per_column_pos[columns]

    def _exp(self, x: Tensor, shift: Tensor, out: Tensor) -> Tensor:
        out = out[: x.shape[0]]
        if self.bounded:
            return torch.exp(x, out=out)
        return torch.sub(x, shift, out=out).clamp_(min=SMALLEST_EXPONENT[x.dtype]).exp_()


class ChunkGradients:
    """dA = G·B, dB = Gᵀ·A and dscale = Σ G∘cos, gathered chunk by chunk, then taken back through the normalisation."""

    def __init__(self, logits: Logits, need: Need) -> None:
        self.logits, self.need = logits, need
        self.by_rows = need.a or (need.scale and not need.b)  # one of the two products also gives dscale
        self.a = torch.empty_like(logits.a) if need.a else None
        self.b = torch.zeros_like(logits.b) if need.b else None
        self.scale = torch.zeros((), dtype=torch.float64, device=logits.a.device)

    def add(self, at: slice, g: Tensor, correction: Tensor | None = None) -> None:
        """Adds a chunk of G [c, M]; `correction` [c, D] is added to its G·B."""
        a = self.logits.a[at]
        if self.b is not None:
            self.b.addmm_(g.t(), a)
        if self.by_rows:
            da = torch.mm(g, self.logits.b)
            if correction is not None:
                da += correction
            da = self._of_rows(at, da)
            if self.a is not None:
                self.a[at] = da

    def add_queue_of_rows(self, at: slice, g: Tensor, entries: Tensor) -> None:
        """Adds a chunk of G [c, Qb] of the queue's entries of b, after all rows of the batch."""
        if self.need.a or self.need.scale:
            da = self._of_rows(at, torch.mm(g, entries))
            if self.a is not None:
                self.a[at] += da

    def add_queue_of_columns(self, at: slice, g: Tensor, entries: Tensor) -> None:
        """Adds a chunk of G [c, Qa] of the queue's entries of a; `at` counts from this rank's first column."""
        if self.need.b or self.need.scale:
            first = self.logits.ranks.own_columns.start
            own = slice(first + at.start, first + at.stop)
            db = torch.mm(g, entries)
            if self.by_rows:
                self.scale += (db * self.logits.b[own]).sum(1).sum(dtype=torch.float64)
            if self.b is not None:
                self.b[own] += db

    def _of_rows(self, at: slice, da: Tensor) -> Tensor:
        """The gradient of rows of a from that of their unit rows, whose part in dscale it adds."""
        a = self.logits.a[at]
        along = (da * a).sum(1, keepdim=True)
        self.scale += along.sum(dtype=torch.float64)
        if self.a is None or not self.logits.normalize:
            return da
        return da.sub_(along * a).div_(self.logits.a_norm[at])

    def finish(self, factor: float) -> Gradients:
        """(da, db, dscale) of the loss that is `factor` times the sum, for averaging over ranks."""
        logits, ranks = self.logits, self.logits.ranks
        if self.b is not None:
            if not self.by_rows:
                self.scale += (self.b * logits.b).sum(1).sum(dtype=torch.float64)
            self.b = ranks.scatter_sum(self.b, ranks.b_rows)
            if logits.normalize:
                b = logits.b[ranks.own_columns]
                along = (self.b * b).sum(1, keepdim=True)
                self.b.sub_(along * b).div_(logits.b_norm[ranks.own_columns])
        for gradient in (self.a, self.b):
            if gradient is not None:
                gradient.mul_(logits.scale * (factor * ranks.size))
        dscale = ranks.all_reduce(self.scale) * factor if self.need.scale else None
        return self.a, self.b, dscale


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
        self.columns = self.ranks.all_reduce(self.columns, maximum=True)
        rows = self.ranks.all_reduce((self.rows[1] >= self.rows[0]).sum(dtype=torch.float64))
        columns = (self.columns[1] >= self.columns[0]).sum() / (num_columns if two_sided else math.nan)
        return torch.stack([rows / num_rows, columns]).float()


def _scalar_like(value: float | Tensor, like: Tensor) -> Tensor:
    """0-d, in the dtype and on the device of `like`."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(like.device, like.dtype)
    return torch.full((), value, dtype=like.dtype, device=like.device)


def info_nce(
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
    scale: Tensor,
    ids: Ids | None,  # [N], [M]
    teacher: Teacher | None,
    queue: QueueRows | None,
    contrast: Contrast,
    ranks: Ranks,
    need: Need,
    top1: bool,
) -> Results:
    """InfoNCE of the rows, with both directions also of the columns; its gradients (da, db, dscale); in-batch top-1.

    Weights are relative to that of one row.

    Raises:
        ValueError: no row has a positive.
    """
    two_sided, teacher_weight = contrast.direction == "both", contrast.teacher_weight
    positives = PositivePairs(ids, ranks)
    if positives.num_rows == 0:
        raise ValueError("no row of a has a positive in b: a_ids and b_ids have no value in common")
    unit = (0.5 if two_sided else 1.0) / positives.num_rows  # weight of one row in the loss
    column_unit = positives.num_rows / positives.num_columns if two_sided else 0.0
    device = a.device
    row_weight = (positives.row_count > 0).double().to(device)
    column_weight = (positives.column_count > 0).double().mul_(column_unit).to(device)
    # Both directions give every positive of a row the same mass: 1/k depends on the id only.
    target = 1.0 / positives.row_count.clamp_min(1).double() + column_unit / positives.sibling_count.double()
    target = target.to(device)
    hard = (1 - teacher_weight) * (1 - contrast.label_smoothing)
    smooth = (1 - teacher_weight) * contrast.label_smoothing

    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    logits = Logits(a, b, scale, contrast.normalize, ranks, dtype)
    queues = _queue_logits(a, b, scale, ids, queue, contrast, ranks, dtype)
    debias = _debias(contrast.debias, logits.scale, positives, queues, ranks) if contrast.debias else None
    teacher_logits = teacher_softmax = smoothing = guide = None
    if teacher is not None and contrast.guide_margin is not None:
        guide = Guide(teacher, contrast.guide_margin, contrast.guide_relative, positives, ranks, dtype)
    elif teacher is not None:
        teacher_logits = Logits(*teacher, contrast.normalize, ranks, dtype)
        teacher_softmax = RunningSoftmax(teacher_logits, row_weight, column_weight, two_sided)
    softmax = RunningSoftmax(logits, row_weight, column_weight, two_sided, debias, queues, guide is not None)
    if smooth:
        smoothing = LabelSmoothing(logits.a, logits.b, logits.scale, ranks, row_weight, column_weight, smooth)
    gradients = ChunkGradients(logits, need) if any(need) else None
    accuracy = Top1(logits) if top1 else None

    none = torch.empty(0, dtype=torch.long, device=device)
    no_pairs, no_logits = (none, none), none.double()
    total = torch.zeros((), dtype=torch.float64, device=device)  # this rank's share of the loss
    buffer = logits.a.new_empty(logits.chunks[0].stop, logits.b.shape[0])
    scratch = torch.empty_like(buffer)

    def second_pass(x: Tensor, views: Views, at: slice, pairs: Pairs) -> None:
        nonlocal total
        x_pos = x[pairs].double()
        teacher_p = None
        if teacher_logits is not None and teacher_softmax is not None:
            t = teacher_logits.chunk(at, torch.empty_like(x))
            difference = t - x
            teacher_p, _ = teacher_softmax.probabilities((t, t), at, no_pairs, no_logits, torch.empty_like(x))
            total += teacher_weight * difference.mul_(teacher_p).sum(1).sum(dtype=torch.float64)
        if gradients is None:
            return
        g, g_pos = softmax.probabilities(views, at, pairs, x_pos, scratch)
        g.index_put_(pairs, (g_pos - hard * target[at][pairs[0]]).to(dtype))
        if teacher_p is not None:
            g.sub_(teacher_p, alpha=teacher_weight)
        gradients.add(at, g, None if smoothing is None else smoothing.row_gradient(at))

    # Rows and columns of this rank that meet a queue: their sums, the first of them there, the logits.
    queued = [
        (sums, first, side)
        for sums, first, side in zip((softmax.rows, softmax.columns), (0, ranks.own_columns.start), queues, strict=True)
        if side is not None
    ]
    for sums, first, side in queued:
        softmax.add_queue(sums, first, side)
    kept: dict[int, Tensor] = {}
    budget = KEEP_BYTES if two_sided and gradients is not None else 0
    for at in logits.chunks:
        out = buffer[: at.stop - at.start]
        keep = out.nbytes <= budget
        x = logits.chunk(at, torch.empty_like(out) if keep else out)
        pairs = positives.pairs(at, device)
        x_pos = x[pairs].double()
        total -= hard * (target[at][pairs[0]] * x_pos).sum()
        views = (x, x) if guide is None else guide.views(x, at, pairs)
        softmax.add(views, at, pairs, x_pos, scratch)
        if accuracy is not None:
            accuracy.add(x, at, pairs)
        if teacher_logits is not None and teacher_softmax is not None:
            t = teacher_logits.chunk(at, torch.empty_like(x))
            teacher_softmax.add((t, t), at, no_pairs, no_logits, scratch)
        if not two_sided:
            second_pass(x, views, at, pairs)
        elif keep:
            kept[at.start] = x
            budget -= x.nbytes
    softmax.reduce()
    if teacher_softmax is not None:
        teacher_softmax.reduce()
    if two_sided and (gradients is not None or teacher_logits is not None):
        for at in logits.chunks:
            x = kept.pop(at.start) if at.start in kept else logits.chunk(at, buffer)
            pairs = positives.pairs(at, device)
            second_pass(x, (x, x) if guide is None else guide.views(x, at, pairs), at, pairs)
    if gradients is not None:
        for sums, first, side in queued:
            add = gradients.add_queue_of_rows if sums is softmax.rows else gradients.add_queue_of_columns
            for at in side.chunks:
                add(at, softmax.queue_probabilities(sums, first, side, at), side.entries)
        if debias is not None and need.scale:
            gradients.scale += softmax.rows.bound_gradient()
            if two_sided:
                gradients.scale += softmax.columns.bound_gradient(ranks.own_columns)

    rows_part, columns_part = softmax.weighted_log_sum()
    if teacher_softmax is not None:
        teacher_rows, teacher_columns = teacher_softmax.weighted_log_sum()
        rows_part = rows_part - teacher_weight * teacher_rows
        columns_part = columns_part - teacher_weight * teacher_columns
    total += rows_part
    if smoothing is not None:
        total += smoothing.loss()
    loss = (unit * (ranks.all_reduce(total) + columns_part)).to(dtype)
    shares = None if accuracy is None else accuracy.shares(positives.num_rows, positives.num_columns, two_sided)
    if gradients is None:
        return loss, (), shares
    if smoothing is not None and gradients.b is not None:
        gradients.b += smoothing.column_gradient()
    return loss, gradients.finish(unit), shares


def _queue_logits(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    ids: Ids | None,
    queue: QueueRows | None,
    contrast: Contrast,
    ranks: Ranks,
    dtype: torch.dtype,
) -> tuple[QueueLogits | None, QueueLogits | None]:
    """The rows against the queue's entries of b, the columns against those of a; None where there are none."""
    if queue is None:
        return None, None
    found: list[QueueLogits | None] = []
    a_ids, b_ids = ids or (None, None)
    for x, x_ids, entries, entry_ids in ((a, a_ids, queue.b, queue.b_ids), (b, b_ids, queue.a, queue.a_ids)):
        if len(entries) == 0 or (found and contrast.direction != "both"):
            found.append(None)
            continue
        pair = None if x_ids is None or entry_ids is None else (x_ids.long().cpu(), entry_ids.long().cpu())
        found.append(QueueLogits(x, entries, pair, scale, contrast.normalize, ranks, dtype))
    return found[0], found[1]


def _debias(
    prior: float,
    scale: Tensor,
    positives: PositivePairs,
    queues: tuple[QueueLogits | None, QueueLogits | None],
    ranks: Ranks,
) -> tuple[Debias, Debias]:
    """For this rank's rows, and for the columns of all ranks."""
    negatives = [ranks.num_columns - positives.row_count, ranks.num_rows - positives.column_count]
    if queues[0] is not None:
        negatives[0] = negatives[0] + queues[0].count
    if queues[1] is not None:
        negatives[1] = negatives[1] + ranks.gather(queues[1].count, ranks.b_rows)
    of_rows, of_columns = (
        Debias(prior, scale.double(), n.double().to(scale.device), k.clamp_min(1).double().to(scale.device))
        for n, k in zip(negatives, (positives.row_count, positives.column_count), strict=True)
    )
    return of_rows, of_columns


def sigmoid_loss(
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
    scale: Tensor,
    bias: Tensor,
    ids: Ids | None,  # [N], [M]
    normalize: bool,
    ranks: Ranks,
    need: Need,
) -> Results:
    """SigLIP's loss and its gradients, in one pass: no sums over rows or columns are needed first."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    positives = PositivePairs(ids, ranks)
    logits = Logits(a, b, scale, normalize, ranks, dtype)
    gradients = ChunkGradients(logits, need) if any(need) else None
    shift = _scalar_like(bias, logits.a)
    sums = torch.zeros(2, dtype=torch.float64, device=a.device)  # the loss and dbias
    buffer = logits.a.new_empty(logits.chunks[0].stop, logits.b.shape[0])
    scratch = torch.empty_like(buffer)
    zero = buffer.new_zeros(())
    for at in logits.chunks:
        x = logits.chunk(at, buffer).add_(shift)
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
    factor = 1.0 / ranks.num_rows
    loss, dbias = ranks.all_reduce(sums) * factor
    loss = loss.to(dtype, copy=True)  # no view, which could not be changed in place
    if gradients is None:
        return loss, (), None
    return loss, (*gradients.finish(factor), dbias if need.bias else None), None
