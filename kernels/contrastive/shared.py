"""What the engines of the contrastive losses share: the values of a call, the ranks, the definitions in float64."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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


class QueueRows(NamedTuple):
    """Embeddings of earlier batches, the same on every rank: constants that serve as further negatives.

    Attributes:
        a: [Qa, D], further negatives of the columns.
        b: [Qb, D], further negatives of the rows.
        a_ids, b_ids: integer [Qa] and [Qb]; an entry is no negative of what has its id.
    """

    a: Tensor
    b: Tensor
    a_ids: Tensor | None = None
    b_ids: Tensor | None = None

    def transposed(self) -> QueueRows:
        """That of b and a."""
        return QueueRows(self.b, self.a, self.b_ids, self.a_ids)

    def cut(self, width: int) -> QueueRows:
        """The first `width` features of every entry."""
        return QueueRows(self.a[:, :width], self.b[:, :width], self.a_ids, self.b_ids)


@dataclass(frozen=True)
class Contrast:
    """The options that define an InfoNCE, as `fastclap.losses.info_nce` explains them.

    Attributes:
        matryoshka: widths with their weights, in ascending order (`prefix_weights`).
        keep_exponentials: not what is computed but how, and so the only one that need not be the same on all ranks.

    Raises:
        TypeError, ValueError: an option is none of its values, or cannot be combined with another.
    """

    teacher_weight: float = 0.0
    label_smoothing: float = 0.0
    normalize: bool = True
    direction: str = "both"
    matryoshka: tuple[tuple[int, float], ...] = ()
    guide_margin: float | None = None
    guide_relative: bool = False
    debias: float = 0.0
    keep_exponentials: bool | None = None

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {self.direction!r}")
        for name, value, below in (
            ("label_smoothing", self.label_smoothing, 1.0),
            ("debias", self.debias, 1.0),
            ("teacher_weight", self.teacher_weight, math.inf),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not (0 <= value <= 1 and value < below):
                raise ValueError(f"{name} must be in [0, 1{')' if below == 1 else ']'}, got {value}")
        if self.debias and not self.normalize:
            raise ValueError("debias needs normalize=True: what it keeps of negatives at least is known of unit rows")
        if self.keep_exponentials is not None and not isinstance(self.keep_exponentials, bool):
            raise TypeError(f"keep_exponentials must be True, False or None, got {self.keep_exponentials!r}")
        if self.guide_margin is not None:
            self._check_guide(self.guide_margin)
        elif self.guide_relative:
            raise ValueError("guide_relative says how guide_margin is meant; give guide_margin too")
        if self.matryoshka:
            self._check_prefixes()

    def _check_guide(self, margin: float) -> None:
        if isinstance(margin, bool) or not isinstance(margin, (int, float)):
            raise TypeError(f"guide_margin must be a number or None, got {type(margin).__name__}")
        if not isinstance(self.guide_relative, bool):
            raise TypeError(f"guide_relative must be True or False, got {self.guide_relative!r}")
        if not math.isfinite(margin):
            raise ValueError(f"guide_margin must be finite, got {margin}")
        if self.guide_relative and margin >= 1:
            raise ValueError(f"guide_margin must be below 1 with guide_relative, a share of the cosine, got {margin}")
        for name, value in (
            ("teacher_weight", self.teacher_weight),
            ("label_smoothing", self.label_smoothing),
            ("debias", self.debias),
        ):
            if value:
                raise ValueError(
                    f"guide_margin cannot be combined with {name}={value}, which counts on every column being there; "
                    f"leave out one of them"
                )

    def _check_prefixes(self) -> None:
        seen = []
        for width, weight in self.matryoshka:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise TypeError(f"matryoshka must have numbers as weights, got {weight!r} for width {width}")
            if width < 1 or width in seen:
                raise ValueError(f"matryoshka must have widths from 1 up, each of them once, got {width}")
            if not (0 < weight < math.inf):
                raise ValueError(f"matryoshka must have weights that are positive and finite, got {weight} for {width}")
            seen.append(width)

    @property
    def key(self) -> str:
        """What `from_key` makes an equal one of. Its conversions are those that torch.compile follows."""
        prefixes = ",".join([f"{int(width)}:{float(weight)}" for width, weight in self.matryoshka])
        margin = "None" if self.guide_margin is None else f"{float(self.guide_margin)}"
        return (
            f"{float(self.teacher_weight)} {float(self.label_smoothing)} {bool(self.normalize)} {self.direction} "
            f"{margin} {bool(self.guide_relative)} {float(self.debias)} {self.keep_exponentials} {prefixes}"
        )

    @classmethod
    def from_key(cls, key: str) -> Contrast:
        weight, smoothing, normalize, direction, margin, relative, debias, keep, prefixes = key.split(" ")
        pairs = [pair.split(":") for pair in prefixes.split(",")] if prefixes else []
        return cls(
            float(weight), float(smoothing), normalize == "True", direction,
            tuple((int(width), float(of_width)) for width, of_width in pairs),
            None if margin == "None" else float(margin), relative == "True", float(debias),
            None if keep == "None" else keep == "True",
        )  # fmt: skip


def prefix_weights(matryoshka: Sequence[int] | Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    """`Contrast.matryoshka` of what `fastclap.losses.info_nce` takes: widths alone have the weight 1.

    Raises:
        TypeError: it is neither widths nor widths with weights.
    """
    if not isinstance(matryoshka, (Mapping, list, tuple, range)):
        raise TypeError(f"matryoshka must be a sequence of widths, or a mapping to weights, got {matryoshka!r}")
    for width in matryoshka:
        if isinstance(width, bool) or not isinstance(width, int):
            raise TypeError(f"matryoshka must have whole numbers as widths, got {width!r}")
    if isinstance(matryoshka, Mapping):
        return tuple(sorted(matryoshka.items()))
    return tuple([(width, 1.0) for width in sorted(matryoshka)])


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
    return ids[0].long()[:, None] == ids[1].long().to(ids[0].device)


def info_nce_reference(
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
    logit_scale: float | Tensor,
    ids: Ids | None,  # [N], [M]
    teacher: Teacher | None,
    queue: QueueRows | None,
    contrast: Contrast,
) -> Tensor:
    """InfoNCE with the whole matrix in memory, in the dtype of its inputs; the oracle in float64. See `info_nce`."""
    if contrast.matryoshka:
        whole, losses = replace(contrast, matryoshka=()), []
        for width, weight in contrast.matryoshka:
            entries = None if queue is None else queue.cut(width)
            loss = info_nce_reference(a[:, :width], b[:, :width], logit_scale, ids, teacher, entries, whole)
            losses.append(weight * loss)
        return torch.stack(losses).sum()

    def logits(left: Tensor, right: Tensor, scale: float | Tensor) -> Tensor:
        if contrast.normalize:
            left, right = F.normalize(left, dim=1, eps=NORM_EPS), F.normalize(right, dim=1, eps=NORM_EPS)
        return scale * (left @ right.t())

    s = logits(a, b, logit_scale)
    mask = _positive_mask(a.shape[0], b.shape[0], ids).to(s.device)
    t = cosines = None
    if contrast.guide_margin is not None and teacher is not None:
        a_t, b_t = (F.normalize(x.detach().to(s.dtype), dim=1, eps=NORM_EPS) for x in teacher[:2])
        cosines = a_t @ b_t.t()
    elif teacher is not None:
        t = logits(teacher[0].detach(), teacher[1].detach(), teacher[2]).to(s.dtype)
    further = [(s.new_zeros(len(x), 0), mask.new_zeros(len(x), 0)) for x in (a, b)]  # logits, which are left out
    if queue is not None:
        further = []
        for side, (x, rows, entry_ids) in enumerate(((a, queue.b, queue.b_ids), (b, queue.a, queue.a_ids))):
            s_q = logits(x, rows.detach().to(x.dtype), logit_scale)
            same = torch.zeros_like(s_q, dtype=torch.bool)
            if ids is not None and entry_ids is not None:
                same = ids[side].to(s.device)[:, None] == entry_ids.to(s.device)
            further.append((s_q, same))
    losses = []
    if contrast.direction != "b_to_a":
        losses.append(_reference_direction(s, mask, t, cosines, *further[0], logit_scale, contrast))
    if contrast.direction != "a_to_b":
        t, cosines = (None if x is None else x.t() for x in (t, cosines))
        losses.append(_reference_direction(s.t(), mask.t(), t, cosines, *further[1], logit_scale, contrast))
    return torch.stack(losses).mean()


def _reference_direction(
    s: Tensor,  # [N, M]
    mask: Tensor,  # bool [N, M], the positives
    teacher_logits: Tensor | None,  # [N, M]
    cosines: Tensor | None,  # [N, M], of the guide
    further: Tensor,  # [N, Q], logits of the queue's entries
    same: Tensor,  # bool [N, Q], entries that are left out
    scale: float | Tensor,
    contrast: Contrast,
) -> Tensor:
    """The mean over the rows that have a positive."""
    smoothing, weight, prior = contrast.label_smoothing, contrast.teacher_weight, contrast.debias
    count = mask.sum(1)
    left_out = mask.new_zeros(mask.shape)
    if cosines is not None and contrast.guide_margin is not None:
        best = cosines.masked_fill(~mask, -math.inf).amax(1, keepdim=True).masked_fill(count[:, None] == 0, math.inf)
        margin = contrast.guide_margin
        left_out = (cosines > (best * (1 - margin) if contrast.guide_relative else best - margin)) & ~mask
    positives = s.masked_fill(~mask, -math.inf)
    negatives = torch.cat([s.masked_fill(mask | left_out, -math.inf), further.masked_fill(same, -math.inf)], 1)
    largest = torch.maximum(positives.amax(1), negatives.amax(1)).detach()
    positive, negative = ((x - largest[:, None]).exp().sum(1) for x in (positives, negatives))
    if prior:
        num = ((~mask).sum(1) + (~same).sum(1)).to(s.dtype)
        unbiased = (negative - prior * num * positive / count.clamp_min(1)) / (1 - prior)
        negative = torch.maximum(unbiased, num * torch.exp(-torch.as_tensor(scale).reshape(()).abs() - largest))
    log_p = s - ((positive + negative).log() + largest)[:, None]
    target = mask.to(s.dtype) / count.clamp_min(1)[:, None]
    target = (1 - smoothing) * target + smoothing / mask.shape[1]
    loss = -(target * log_p).sum(1)
    if teacher_logits is not None:
        log_teacher = teacher_logits.log_softmax(1)
        divergence = (log_teacher.exp() * (log_teacher - log_p)).sum(1)
        loss = (1 - weight) * loss + weight * divergence
    some = count > 0
    return torch.where(some, loss, 0.0).sum() / some.sum()  # by the index of some, vmap could not follow


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
    "need for gradients of a, b, logit_scale, logit_bias", "matryoshka", "guide_margin or guide_relative", "debias",
    "the queue's sizes or dtypes",
)  # fmt: skip


def agree(
    group: dist.ProcessGroup | None,
    loss: str,
    a: Tensor,
    b: Tensor,
    ids: Ids | None,
    teacher: Teacher | None,
    queue: QueueRows | None,
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
        contrast.matryoshka, (contrast.guide_margin, bool(contrast.guide_relative)), float(contrast.debias),
        None if queue is None else tuple((len(x), x.dtype) for x in queue[:2]),
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
