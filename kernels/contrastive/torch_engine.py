"""The plain torch engine of the contrastive losses, over chunks of rows of the logits (see `operator`).

A loss over one direction or with sigmoids needs no sums over columns; it takes a single pass.

Three things keep float32 accurate to 1e-5 at any scale and alignment. Where |logit| ≤ bound is known on the host and
small enough, exp(S) itself serves both row and column sums; otherwise each row and column carries its maximum.
Positives are summed separately, in float64: with p → 1 the gradient p - 1 is then a sum of small terms, not a
difference of large ones. And logarithms are taken of float64 sums.

Which pairs are positives is worked out on the host from sorted ids, never as an N×M comparison.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastclap.kernels.contrastive.shared import (
    NORM_EPS,
    Contrast,
    Gradients,
    Ids,
    LabelSmoothing,
    Need,
    Ranks,
    Results,
    Teacher,
    match_ids,
)

CPU_CHUNK_BYTES = 32 << 20  # one chunk of logits: about a last-level cache
GPU_CHUNK_BYTES = 256 << 20  # enough rows for one wave of large tiles
KEEP_BYTES = 384 << 20  # logits kept from pass 1 to pass 2; the rest is formed twice
MIN_CHUNK_ROWS = 64  # fewer rows make the products memory bound
SAFE_EXPONENT = {torch.float32: 70.0, torch.float64: 600.0}  # exp(±x), its sums and their inverses stay normal
SMALLEST_EXPONENT = {torch.float32: -86.0, torch.float64: -700.0}  # below, exp is no normal number and 30 times slower
Pairs = tuple[Tensor, Tensor]


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
            matches = match_ids((ids[0].long().cpu(), ids[1].long().cpu()), ranks)
            first, self._order = matches.first, matches.order
            row_count, self.column_count = matches.row_count, matches.column_count
            sibling_count = matches.sibling_count
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
    """S = scale · â·b̂ᵀ of this rank's rows against the columns of all ranks, one chunk of rows at a time."""

    def __init__(
        self, a: Tensor, b: Tensor, scale: float | Tensor, normalize: bool, ranks: Ranks, dtype: torch.dtype
    ) -> None:
        self.ranks, self.normalize = ranks, normalize
        self.a = a.detach().to(dtype).contiguous()  # [N, D]
        self.b = ranks.gather(b.detach(), ranks.b_rows).to(dtype).contiguous()  # [M, D]
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
    ) -> None:
        num_rows, num_columns, device = logits.a.shape[0], logits.b.shape[0], logits.a.device
        safe = SAFE_EXPONENT[logits.a.dtype] - math.log(max(logits.ranks.num_rows, num_columns))
        self.bounded, self.columns, self.ranks = logits.bound < safe, columns, logits.ranks
        self.row_weight, self.column_weight = row_weight, column_weight
        self.row_max = logits.a.new_zeros(num_rows)
        self.column_max = logits.a.new_full((num_columns,), 0.0 if self.bounded else -math.inf)
        self.row_sum = torch.zeros(num_rows, dtype=torch.float64, device=device)
        self.column_sum = torch.zeros(num_columns, dtype=torch.float64, device=device)

    def add(self, x: Tensor, at: slice, pairs: Pairs, x_pos: Tensor, scratch: Tensor) -> None:
        """Adds a chunk x [c, M]; the float64 logits x_pos of the pairs enter exactly. `x` is left as it is."""
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
            column_max = self.ranks.all_reduce(self.column_max.clone(), maximum=True)
            self.column_sum *= (self.column_max - column_max).double().exp_()
            self.column_max = column_max
        self.ranks.all_reduce(self.column_sum)

    def weighted_log_sum(self) -> tuple[Tensor, Tensor]:
        """Σ weight · log Σ exp over the rows of this rank, and over the columns of all ranks."""
        over_rows = (self.row_weight * (self.row_sum.log() + self.row_max)).sum()
        if not self.columns:
            return over_rows, torch.zeros_like(over_rows)
        return over_rows, (self.column_weight * (self.column_sum.log() + self.column_max)).sum()

    def probabilities(
        self, x: Tensor, at: slice, pairs: Pairs, x_pos: Tensor, scratch: Tensor
    ) -> tuple[Tensor, Tensor]:
        """row_weight · P + column_weight · Q of a chunk, and the same in float64 at the pairs. Overwrites `x`."""
        rows, columns = pairs
        per_row, per_column = self.row_weight[at] / self.row_sum[at], self.column_weight / self.column_sum
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
            along = (da * a).sum(1, keepdim=True)
            self.scale += along.sum(dtype=torch.float64)
            if self.a is not None:
                self.a[at] = da.sub_(along * a).div_(self.logits.a_norm[at]) if self.logits.normalize else da

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
    softmax = RunningSoftmax(logits, row_weight, column_weight, two_sided)
    teacher_logits = teacher_softmax = smoothing = None
    if teacher is not None:
        teacher_logits = Logits(*teacher, contrast.normalize, ranks, dtype)
        teacher_softmax = RunningSoftmax(teacher_logits, row_weight, column_weight, two_sided)
    if smooth:
        smoothing = LabelSmoothing(logits.a, logits.b, logits.scale, ranks, row_weight, column_weight, smooth)
    gradients = ChunkGradients(logits, need) if any(need) else None
    accuracy = Top1(logits) if top1 else None

    none = torch.empty(0, dtype=torch.long, device=device)
    no_pairs, no_logits = (none, none), none.double()
    total = torch.zeros((), dtype=torch.float64, device=device)  # this rank's share of the loss
    buffer = logits.a.new_empty(logits.chunks[0].stop, logits.b.shape[0])
    scratch = torch.empty_like(buffer)

    def second_pass(x: Tensor, at: slice, pairs: Pairs) -> None:
        nonlocal total
        x_pos = x[pairs].double()
        teacher_p = None
        if teacher_logits is not None and teacher_softmax is not None:
            t = teacher_logits.chunk(at, torch.empty_like(x))
            difference = t - x
            teacher_p, _ = teacher_softmax.probabilities(t, at, no_pairs, no_logits, torch.empty_like(x))
            total += teacher_weight * difference.mul_(teacher_p).sum(1).sum(dtype=torch.float64)
        if gradients is None:
            return
        g, g_pos = softmax.probabilities(x, at, pairs, x_pos, scratch)
        g.index_put_(pairs, (g_pos - hard * target[at][pairs[0]]).to(dtype))
        if teacher_p is not None:
            g.sub_(teacher_p, alpha=teacher_weight)
        gradients.add(at, g, None if smoothing is None else smoothing.row_gradient(at))

    kept: dict[int, Tensor] = {}
    budget = KEEP_BYTES if two_sided and gradients is not None else 0
    for at in logits.chunks:
        out = buffer[: at.stop - at.start]
        keep = out.nbytes <= budget
        x = logits.chunk(at, torch.empty_like(out) if keep else out)
        pairs = positives.pairs(at, device)
        x_pos = x[pairs].double()
        total -= hard * (target[at][pairs[0]] * x_pos).sum()
        softmax.add(x, at, pairs, x_pos, scratch)
        if accuracy is not None:
            accuracy.add(x, at, pairs)
        if teacher_logits is not None and teacher_softmax is not None:
            t = teacher_logits.chunk(at, torch.empty_like(x))
            teacher_softmax.add(t, at, no_pairs, no_logits, scratch)
        if not two_sided:
            second_pass(x, at, pairs)
        elif keep:
            kept[at.start] = x
            budget -= x.nbytes
    softmax.reduce()
    if teacher_softmax is not None:
        teacher_softmax.reduce()
    if two_sided and (gradients is not None or teacher is not None):
        for at in logits.chunks:
            x = kept.pop(at.start) if at.start in kept else logits.chunk(at, buffer)
            second_pass(x, at, positives.pairs(at, device))

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
