"""The plain torch engine of the contrastive losses, over row chunks of the logits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastclap.kernels.contrastive.shared import (
    NORM_EPS,
    Gradients,
    Need,
    Ranks,
    Teacher,
    _scalar,
    occurrences,
)

CPU_CHUNK_BYTES = 32 << 20  # one chunk of logits: about a last-level cache
GPU_CHUNK_BYTES = 256 << 20  # enough rows for one wave of large tiles
KEEP_BYTES = 384 << 20  # logits kept from pass 1 to pass 2; the rest is formed twice
MIN_CHUNK_ROWS = 64  # fewer rows make the products memory bound
SAFE_EXPONENT = {torch.float32: 70.0, torch.float64: 600.0}  # exp(±x), its sums and their inverses stay normal
SMALLEST_EXPONENT = {torch.float32: -86.0, torch.float64: -700.0}  # below, exp is no normal number and 30 times slower
Pairs = tuple[Tensor, Tensor]


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


def _row_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(NORM_EPS)


def _largest_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1).max()


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
