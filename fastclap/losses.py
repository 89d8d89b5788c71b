"""Contrastive losses for dual encoders: InfoNCE with its queue of earlier embeddings, SigLIP, tag and local loss.

The arguments are checked here, with messages meant for the caller; the arithmetic is in `kernels/contrastive`, which
never holds the N×M matrix of logits. With a process group the ranks exchange their shapes first, so that a wrong
argument on one rank is an error on all of them and not a hang; `agree_once` leaves that to the first call of a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastclap.kernels import dispatch
from fastclap.kernels.contrastive import operator
from fastclap.kernels.contrastive.shared import (
    Contrast,
    Ids,
    Need,
    QueueRows,
    Teacher,
    agree,
    info_nce_reference,
    prefix_weights,
    reject,
    sigmoid_loss_reference,
)

MAX_SCALAR = torch.finfo(torch.float32).max


@overload
def info_nce(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    return_top1: Literal[False] = False,
    **options: Any,
) -> Tensor: ...
@overload
def info_nce(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    return_top1: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor]: ...
def info_nce(  # type: ignore[misc]
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
    logit_scale: float | Tensor,
    *,
    a_ids: Tensor | None = None,  # [N]
    b_ids: Tensor | None = None,  # [M]
    teacher: Teacher | None = None,
    teacher_weight: float = 0.0,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    direction: str = "both",
    guide_margin: float | None = None,
    guide_relative: bool = False,
    debias: float = 0.0,
    queue: EmbeddingQueue | QueueRows | None = None,
    matryoshka: Sequence[int] | Mapping[int, float] = (),
    process_group: dist.ProcessGroup | None = None,
    agree_once: bool = False,
    backend: str = "auto",
    keep_exponentials: bool | None = None,
    return_top1: bool = False,
    check_finite: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """InfoNCE (van den Oord et al. 2018; symmetric as in CLIP, Radford et al. 2021) without the matrix of logits.

    With S = logit_scale · â·b̂ᵀ, a→b is the cross-entropy of each row's softmax over all M columns with its target
    (1/k on each of its k positives; with label smoothing ε, (1-ε)·target + ε/M), averaged over the rows that have a
    positive; b→a is the same on Sᵀ; "both" is their mean. A row or column without a positive takes part only as a
    negative. With a teacher each direction becomes (1-λ)·cross-entropy + λ·KL(P_teacher‖P).

    A row's loss is so log(Σ_positives exp S + Neg) - Σ_j target_j·S_j, with Neg = Σ exp S over all other columns. Three
    options change Neg, each for rows and, with rows and columns exchanged, for columns:

    * a guide (GISTEmbed, Solatorio 2024, arXiv 2402.16829) leaves out columns that the teacher finds closer to the row
      than the closest of its positives, which are probably no negatives;
    * debiasing (Chuang et al. 2020, arXiv 2007.00224, eq. 8) takes off what the negatives owe to positives among them:
      with n negatives and the prior τ, max((Neg - τ·n·mean_positives exp S) / (1-τ), n·exp(-|logit_scale|));
    * a queue (cross-batch memory, Wang et al. 2020, arXiv 1912.06798) adds embeddings of earlier batches.

    Matryoshka prefixes (Kusupati et al. 2022, arXiv 2205.13147) sum the loss over several widths of the embeddings.

    Args:
        a: [N, D] embeddings, float16, bfloat16, float32 or float64. Sums and exponentials are in float32 (float64 for
            float64). On a GPU the products take 16-bit embeddings as they are and float32 ones at
            torch.get_float32_matmul_precision(), and under autocast embeddings are rounded as for torch.matmul.
        b: [M, D] embeddings on the same device. N and M need not be equal.
        logit_scale: the multiplier itself (already exponentiated); a number or a one-element tensor.
        a_ids: integer [N]. Equal ids are positives. Without ids, row i's positive is column i and surplus rows or
            columns are negatives only. Best on the device of a.
        b_ids: integer [M], given with a_ids.
        teacher: (a_t [N, Dt], b_t [M, Dt], scale_t), a second pair of embeddings taken as constants.
        teacher_weight: λ in [0, 1].
        label_smoothing: ε in [0, 1).
        normalize: scale rows to unit length first (the teacher's too), as torch.nn.functional.normalize does.
        direction: "both", "a_to_b" or "b_to_a".
        guide_margin: makes the teacher a guide. A column that is no positive is left out of a row's loss where their
            cosine by the teacher (always of unit rows; scale_t does not matter) is above the largest of the row's
            positives less the margin. Any finite number: with a negative one only columns that are closer by so much
            are left out. Cannot be combined with teacher_weight, label_smoothing, debias or queue.
        guide_relative: the margin is a share of the positive's cosine, below 1: what is above cosine·(1 - margin) is
            left out.
        debias: τ in [0, 1), how probable it is that a negative is a positive. Needs normalize.
        queue: an `EmbeddingQueue`, or its `rows()`: a [Qa, D] and b [Qb, D], and integer a_ids [Qa] and b_ids [Qb]
            if the call has ids; constants, on the device of a and the same on every rank. The entries of b are further
            negatives of every row, those of a of every column, except (with ids) for what has their own. Label
            smoothing and teacher concern the batch alone. Under torch.compile give `rows()`, taken outside of the
            graph: a queue that still fills up would have it compiled anew at every step.
        matryoshka: widths, at most D and each of them once: the loss is the sum of those of a[:, :width], b[:, :width]
            and the queue's likewise, each prefix normalised by itself, with the whole teacher. A mapping gives every
            width its weight in the sum, a sequence 1. The full width counts only if it is among them.
        process_group: a, b, ids and teacher are then this rank's rows, row counts may differ between ranks, and ids
            have one meaning on all ranks (without ids each rank needs as many rows of a as of b). Every rank gets
            the loss of the whole batch. The gradients of a and b are multiplied by the number of ranks, and that of
            the scale is complete on every rank, so that averaging parameter gradients over ranks, as
            DistributedDataParallel does, gives the gradient of the whole batch.
        agree_once: a promise that, whenever this rank repeats the row counts and options of an earlier call in the
            group, each other rank repeats its own of that call. The ranks then exchange them only at the first call of
            a kind instead of at every one, and no host waits for the slowest. Where a rank breaks the promise, or
            rejects its arguments at a later call, the others wait in a collective that never completes, until it
            leaves the group or the group's time is up.
        backend: "triton" for the fused kernels (compute capability 8.0 and later; on a CPU only in Triton's
            interpreter), "torch" for the same algorithm in plain torch, "auto" for the former where it runs and else
            the latter, "reference" for the definition with the whole matrix in memory.
        keep_exponentials: whether the Triton engine keeps a matrix of N×M exponentials between its passes, where it
            can, instead of forming them twice; None lets it decide from the shapes. Other backends ignore it.
        return_top1: also return in-batch top-1: among all columns of the batch and no entries, of the widest prefix.
        check_finite: look for NaN and infinity in a and b first (waits for the GPU).

    Returns:
        0-d float32 (float64 for float64 embeddings), differentiable once in a, b and logit_scale by `backward`. The
        gradients are computed along with the loss, those that are needed and no others. Under torch.func (`grad`,
        `vmap`, `jvp`, `hessian`, ...) and forward-mode differentiation the loss is that of the backend "reference",
        with the matrix in memory and all derivatives. With return_top1 a pair: the loss, and [2]
        float32 with the share of rows, and of columns, whose best match is one of their positives (NaN for
        a direction that is left out).

    Raises:
        TypeError, ValueError: an argument is unusable, no row has a positive, or ranks disagree. With the Triton engine
            the loss is NaN if no row has a positive: to raise, the host would have to wait for the GPU.
    """
    _check_group(process_group)
    try:
        prefixes = prefix_weights(matryoshka) if matryoshka else ()
        contrast = Contrast(
            teacher_weight, label_smoothing, normalize, direction, prefixes, guide_margin, guide_relative, debias,
            keep_exponentials,
        )  # fmt: skip
        scalars = {"logit_scale": logit_scale}
        definition = _takes_definition(backend, process_group, (a, b, logit_scale), return_top1, check_finite)
        ids = _checked_ids(a, b, a_ids, b_ids, scalars, process_group, backend, check_finite)
        teacher = _checked_teacher(teacher, contrast, a, b)
        rows = None if queue is None else _checked_queue(queue, contrast, a, ids)
        if prefixes and prefixes[-1][0] > a.shape[1]:
            raise ValueError(f"matryoshka has width {prefixes[-1][0]} and the embeddings have {a.shape[1]} features")
        if return_top1 and backend == "reference":
            raise ValueError("backend='reference' has no in-batch top-1; use another backend")
        if definition:
            _check_some_positive(ids)
    except (TypeError, ValueError) as error:
        reject(error, process_group, agree_once)
    if definition:
        return _by_definition(info_nce_reference, a, b, (logit_scale,), ids, teacher, rows, contrast)
    loss, top1 = operator.info_nce(
        a, b, logit_scale, ids, teacher, rows, contrast, process_group, backend, return_top1, agree_once
    )
    return loss if top1 is None else (loss, top1)


class EmbeddingQueue(nn.Module):
    """The last embeddings of earlier batches, as further negatives of `info_nce` (XBM, arXiv 1912.06798; MoCo).

    Everything is in its state_dict; it has no parameters. Entries are what was pushed, not normalised.

    Args:
        size: how many rows of a, and how many of b, it holds at most.
        dim: features of a row.
        dtype: that rows are kept in.
        ids: whether rows have ids: needed exactly if the loss is given ids.

    Raises:
        TypeError, ValueError: an argument is unusable, or so many rows do not fit into memory.
    """

    a: Tensor
    b: Tensor
    a_ids: Tensor | None
    b_ids: Tensor | None

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32, ids: bool = False) -> None:
        super().__init__()
        if type(size) is not int or type(dim) is not int or size < 1 or dim < 1:
            raise ValueError(f"a queue needs whole numbers from 1 up, got size={size!r} and dim={dim!r}")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"a queue keeps floating-point rows, got dtype={dtype!r}")
        self.size = size
        self._pushed = [0, 0]  # rows of a and of b so far; known here so that nobody asks the device
        try:
            for name in ("a", "b"):
                self.register_buffer(name, torch.zeros(size, dim, dtype=dtype))
                self.register_buffer(f"{name}_ids", torch.zeros(size, dtype=torch.int64) if ids else None)
        except (RuntimeError, TypeError) as error:  # TypeError: more than an int64 can count
            raise ValueError(f"a queue of {size} rows of {dim} features does not fit into memory") from error

    def rows(self) -> QueueRows:
        """The entries so far, in no particular order: views of the buffers, which the next `push` writes to."""
        filled_a, filled_b = (min(count, self.size) for count in self._pushed)
        if self.a_ids is None or self.b_ids is None:
            return QueueRows(self.a[:filled_a], self.b[:filled_b])
        return QueueRows(self.a[:filled_a], self.b[:filled_b], self.a_ids[:filled_a], self.b_ids[:filled_b])

    @torch.no_grad()
    def push(
        self,
        a: Tensor,  # [N, D]
        b: Tensor,  # [M, D]
        a_ids: Tensor | None = None,  # [N]
        b_ids: Tensor | None = None,  # [M]
        process_group: dist.ProcessGroup | None = None,
        agree_once: bool = False,
    ) -> None:
        """Takes a batch in, in place of the oldest entries. Of more rows than it holds it keeps the last.

        Call it after the loss of the batch, whose own rows would be negatives of themselves otherwise.

        Args:
            process_group: a, b and ids are this rank's rows; every rank's queue gets those of all ranks.
            agree_once: as in `info_nce`.

        Raises:
            TypeError, ValueError: an argument is unusable, ids are given to a queue without ids or not given to one
                with ids, or ranks disagree.
        """
        _check_group(process_group)
        try:
            if dispatch.is_transformed():
                raise ValueError("a queue outlives torch.func (grad, vmap, jvp, ...): push to it outside of them")
            ids = _checked_ids(a, b, a_ids, b_ids, {}, None, "auto", False)
            if (ids is not None) != (self.a_ids is not None):
                raise ValueError(f"this queue has {'no ids' if ids else 'ids'}: make it with ids={ids is not None}")
            if a.shape[1] != self.a.shape[1]:
                raise ValueError(f"the queue has {self.a.shape[1]} features and the batch has {a.shape[1]}")
        except (TypeError, ValueError) as error:
            reject(error, process_group, agree_once)
        ranks = agree(
            process_group,
            "EmbeddingQueue.push",
            a,
            b,
            ids,
            None,
            None,
            Contrast(),
            Need(False, False, False),
            agree_once,
        )
        for side, (name, x, count) in enumerate((("a", a, ranks.a_rows), ("b", b, ranks.b_rows))):
            buffer = getattr(self, name)
            self._write(buffer, ranks.gather(x.detach().to(buffer), count), self._pushed[side])
            if ids is not None:
                buffer = getattr(self, f"{name}_ids")
                self._write(buffer, ranks.gather(ids[side].to(buffer), count), self._pushed[side])
            self._pushed[side] += sum(count)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self._pushed)

    def set_extra_state(self, state: Tensor) -> None:
        self._pushed = state.tolist()

    def _write(self, buffer: Tensor, rows: Tensor, pushed: int) -> None:
        """Row t of all that were ever pushed goes to slot t mod size."""
        pushed += max(0, len(rows) - self.size)
        rows, at = rows[-self.size :], pushed % self.size
        head = rows[: self.size - at]
        buffer[at : at + len(head)] = head
        buffer[: len(rows) - len(head)] = rows[len(head) :]


def sigmoid_loss(
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    a_ids: Tensor | None = None,  # [N]
    b_ids: Tensor | None = None,  # [M]
    normalize: bool = True,
    process_group: dist.ProcessGroup | None = None,
    agree_once: bool = False,
    backend: str = "auto",
    check_finite: bool = False,
) -> Tensor:
    """SigLIP's pairwise sigmoid loss (Zhai et al. 2023, eq. 1) without the matrix of logits.

    -1/N · Σ_ij log σ(z_ij · (logit_scale · â_i·b̂_j + logit_bias)), z = 1 for positives and -1 for all other pairs.
    N counts the rows of a over all ranks. Each positive counts in full (no 1/k), and a batch without positives is
    allowed.

    Args:
        logit_bias: a number or a one-element tensor, added to every logit.
        (the others): as in `info_nce`.

    Returns:
        0-d float32 (float64 for float64 embeddings), differentiable in a, b, logit_scale and logit_bias as `info_nce`.

    Raises:
        TypeError, ValueError: an argument is unusable, or ranks disagree.
    """
    _check_group(process_group)
    try:
        scalars = {"logit_scale": logit_scale, "logit_bias": logit_bias}
        definition = _takes_definition(backend, process_group, (a, b, *scalars.values()), False, check_finite)
        ids = _checked_ids(a, b, a_ids, b_ids, scalars, process_group, backend, check_finite)
    except (TypeError, ValueError) as error:
        reject(error, process_group, agree_once)
    if definition:
        return _by_definition(sigmoid_loss_reference, a, b, (logit_scale, logit_bias), ids, normalize)
    return operator.sigmoid_loss(a, b, logit_scale, logit_bias, ids, normalize, process_group, backend, agree_once)


def tag_loss(
    audio: Tensor,  # [N, D]
    prompts: Tensor,  # [T, D]
    targets: Tensor,  # [N, T]
    *,
    scale: float = 1.0,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Multi-label classification against the embeddings of one prompt per tag (ParaSpeechCLAP, arXiv 2603.28737).

    The mean, over the clips that have a tag and over all tags, of the binary cross-entropy between the target and
    σ(scale · cosine). Clips without a tag take no part; a batch without any gives 0.

    Args:
        audio: [N, D] embeddings of clips, not necessarily of unit length.
        prompts: [T, D] embeddings of the prompts, likewise.
        targets: bool [N, T], which clip has which tag.
        scale: multiplier of the cosines; 1 is published. σ of a raw cosine stays between 0.27 and 0.73, so that the
            loss keeps pulling on clips that are right; a larger scale lets them rest.
        process_group: audio and targets are then this rank's rows, and prompts the same texts on every rank. The value
            is that of all ranks' clips, and gradients are multiplied by the number of ranks, so that averaging
            parameter gradients over ranks gives the gradient of the whole batch, as with `info_nce`.

    Returns:
        0-d float32 (float64 for float64 embeddings).

    Raises:
        ValueError: shapes do not match.
    """
    _check_rows(audio=audio, prompts=prompts)
    _check_flags("targets", targets, audio, [audio.shape[0], prompts.shape[0]])
    _check_scalar("scale", scale)
    _check_group(process_group)
    dtype = torch.promote_types(audio.dtype, torch.float32)
    unit_audio, unit_prompts = (F.normalize(x.to(dtype), dim=-1) for x in (audio, prompts))
    logits = _as_factor(scale, audio) * unit_audio @ unit_prompts.t()
    of_clips = F.binary_cross_entropy_with_logits(logits, targets.to(dtype), reduction="none").mean(1)
    return _mean_over_ranks(of_clips, targets.any(1), process_group)


def local_loss(
    audio: Tensor,  # [N, D]
    text: Tensor,  # [N, D]
    contradicting: Tensor,  # [N, D]
    logit_scale: float | Tensor,
    *,
    where: Tensor | None = None,  # [N]
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """A clip's caption against one that contradicts it (CLSP's third stage, yfyeung/icefall, branch clsp).

    The mean over the clips of the cross-entropy of a choice between the two,
    -log σ(logit_scale · â·(t̂ - ĉ)) with rows of unit length.

    Args:
        audio: [N, D] embeddings of clips, not necessarily of unit length.
        text: [N, D] of each clip's caption, likewise.
        contradicting: [N, D] of the caption that contradicts it, likewise.
        logit_scale: the multiplier itself (already exponentiated); a number or a one-element tensor.
        where: bool [N], the clips that have such a caption; the others take no part, and a batch of none gives 0.
        process_group: the rows are then this rank's. The value is that of all ranks' clips, and gradients are
            multiplied by the number of ranks, so that averaging parameter gradients over ranks gives the gradient of
            the whole batch, as with `info_nce`.

    Returns:
        0-d float32 (float64 for float64 embeddings).

    Raises:
        ValueError: shapes do not match.
    """
    _check_rows(audio=audio, text=text, contradicting=contradicting)
    shapes = [list(x.shape) for x in (audio, text, contradicting)]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"audio, text and contradicting must have one shape [clips, dim], got {shapes}")
    if where is not None:
        _check_flags("where", where, audio, shapes[0][:1])
    _check_scalar("logit_scale", logit_scale)
    _check_group(process_group)
    dtype = torch.promote_types(audio.dtype, torch.float32)
    unit_audio, unit_text, other = (F.normalize(x.to(dtype), dim=-1) for x in (audio, text, contradicting))
    of_clips = -F.logsigmoid(_as_factor(logit_scale, audio) * (unit_audio * (unit_text - other)).sum(1))
    counted = torch.ones_like(of_clips, dtype=torch.bool) if where is None else where
    return _mean_over_ranks(of_clips, counted, process_group)


def _mean_over_ranks(values: Tensor, counted: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """The mean of the `counted` values [N] of all ranks, or 0; with the gradient of this rank's, times the ranks."""
    total, count = torch.where(counted, values, 0.0).sum(), counted.sum().to(values.dtype)
    if process_group is None:
        return total / count.clamp(min=1)
    both = torch.stack([total.detach(), count])
    dist.all_reduce(both, group=process_group)
    count = both[1].clamp(min=1)
    own = total * dist.get_world_size(process_group) / count
    return both[0] / count + (own - own.detach())


def _takes_definition(
    backend: str,
    group: dist.ProcessGroup | None,
    inputs: Sequence[float | Tensor],
    top1: bool,
    check_finite: bool,
) -> bool:
    """Whether the definition computes the loss: it is asked for, or torch.func or forward-mode differentiation is at
    work, which can follow nothing else.

    Raises:
        ValueError: the backend is unknown, or is to do under such a transform what only the others can.
    """
    if backend not in dispatch.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(dispatch.BACKENDS)}, is {backend!r}")
    if not dispatch.is_transformed(*(x for x in inputs if isinstance(x, Tensor))):
        return backend == "reference"
    for option, given in (
        ("backend='triton'", backend == "triton"),
        ("process_group", group is not None),
        ("return_top1", top1),
        ("check_finite", check_finite),
    ):
        if given:
            raise ValueError(
                f"{option} cannot be combined with torch.func (grad, vmap, jvp, ...) and forward-mode differentiation, "
                "under which the loss is computed from its definition: leave it out, or take the gradient by backward()"
            )
    return True


def _by_definition(
    definition: Callable[..., Tensor], a: Tensor, b: Tensor, scalars: Sequence[float | Tensor], *others: Any
) -> Tensor:
    """The loss with the whole matrix in memory, in the precision that other backends have."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    scalars = [_as_factor(x, a) for x in scalars]
    with torch.autocast(a.device.type, enabled=False):
        return definition(a.to(dtype), b.to(dtype), *scalars, *others)


def _as_factor(scalar: float | Tensor, like: Tensor) -> float | Tensor:
    """What multiplies a matrix on the device of `like` without another shape or precision."""
    return scalar.reshape(()).to(like.device) if isinstance(scalar, Tensor) else float(scalar)


def _check_some_positive(ids: Ids | None) -> None:
    """What other engines see for themselves; neither a graph nor a transform lets the ids be looked at."""
    if ids is None or torch.compiler.is_compiling() or dispatch.is_transformed():
        return
    if not torch.isin(ids[0].long(), ids[1].long().to(ids[0].device)).any():
        raise ValueError("no row of a has a positive in b: a_ids and b_ids have no value in common")


def _checked_ids(
    a: Tensor,
    b: Tensor,
    a_ids: Tensor | None,
    b_ids: Tensor | None,
    scalars: Mapping[str, float | Tensor],
    group: dist.ProcessGroup | None,
    backend: str,
    check_finite: bool,
) -> Ids | None:
    """The ids as a pair, after checks of all that the losses have in common."""
    _check_embeddings(a=a, b=b)
    if check_finite:
        _check_finite("a", a)
        _check_finite("b", b)
    for name, value in scalars.items():
        _check_scalar(name, value)
    if backend == "reference" and group is not None:
        raise ValueError("backend='reference' works in a single process; leave out process_group")
    if a_ids is None and b_ids is None:
        if group is not None and a.shape[0] != b.shape[0]:
            raise ValueError(
                f"with a process group and no ids each rank pairs its own rows, so a and b need the same number of "
                f"rows (got {a.shape[0]} and {b.shape[0]}); give a_ids and b_ids to pair them otherwise"
            )
        return None
    if a_ids is None or b_ids is None:
        raise ValueError("give both a_ids and b_ids, or neither")
    for name, ids, rows in (("a_ids", a_ids, a.shape[0]), ("b_ids", b_ids, b.shape[0])):
        if not isinstance(ids, Tensor):
            raise TypeError(f"{name} must be a tensor of integers, got {type(ids).__name__}")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"{name} must hold integers, got {ids.dtype}")
        if ids.is_meta:
            raise TypeError(f"{name} is on the meta device, where tensors have no values")
        if tuple(ids.shape) != (rows,):
            raise ValueError(f"{name} must have shape [{rows}], one id per row, got {list(ids.shape)}")
    return a_ids, b_ids


def _checked_teacher(teacher: Teacher | None, contrast: Contrast, a: Tensor, b: Tensor) -> Teacher | None:
    """The teacher, if it has a weight or guides."""
    weight, guides = contrast.teacher_weight, contrast.guide_margin is not None
    if teacher is None:
        if weight > 0 or guides:
            option = f"guide_margin={contrast.guide_margin}" if guides else f"teacher_weight={weight}"
            raise ValueError(f"{option} needs teacher=(a_t, b_t, scale_t)")
        return None
    if not isinstance(teacher, (tuple, list)) or len(teacher) != 3:
        raise TypeError("teacher must be a tuple (a_t, b_t, scale_t)")
    a_t, b_t, scale = teacher
    _check_embeddings(**{"teacher a_t": a_t, "teacher b_t": b_t})
    for name, x, own_name, own in (("teacher a_t", a_t, "a", a), ("teacher b_t", b_t, "b", b)):
        if x.shape[0] != own.shape[0]:
            raise ValueError(f"{name} has {x.shape[0]} rows and {own_name} has {own.shape[0]}; they must be equal")
        if x.device != own.device:
            raise ValueError(f"{name} is on {x.device} and {own_name} on {own.device}; move them to one device")
    _check_scalar("teacher scale_t", scale)
    return (a_t, b_t, scale) if weight > 0 or guides else None


def _checked_queue(
    queue: EmbeddingQueue | QueueRows, contrast: Contrast, a: Tensor, ids: Ids | None
) -> QueueRows | None:
    """The queue's entries, if there are any."""
    if not isinstance(queue, (EmbeddingQueue, QueueRows)):
        raise TypeError(f"queue must be an EmbeddingQueue or its rows(), got {type(queue).__name__}")
    if contrast.guide_margin is not None:
        raise ValueError("guide_margin cannot be combined with a queue, whose entries the teacher has not seen")
    rows = queue.rows() if isinstance(queue, EmbeddingQueue) else queue
    for name, x, entry_ids in (("a", rows.a, rows.a_ids), ("b", rows.b, rows.b_ids)):
        if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point() or x.shape[1] != a.shape[1]:
            raise ValueError(
                f"the queue's {name} must be floating-point rows of {a.shape[1]} features like the batch, "
                f"got {x.dtype} of shape {list(x.shape)}"
            )
        if x.device != a.device:
            raise ValueError(f"the queue is on {x.device} and a on {a.device}; move them to one device")
        if (ids is None) != (entry_ids is None):
            has, lacks = ("the queue", "the call") if ids is None else ("the call", "the queue")
            raise ValueError(f"{has} has ids and {lacks} has none; give a_ids and b_ids to both, or to neither")
        if entry_ids is not None and tuple(entry_ids.shape) != (len(x),):
            raise ValueError(f"the queue's {name}_ids must have shape [{len(x)}], got {list(entry_ids.shape)}")
    return rows if len(rows.a) or len(rows.b) else None


def _check_embeddings(**pair: Tensor) -> None:
    """Two matrices by name: each alone, that they go together, and that neither is empty."""
    _check_rows(**pair)
    for name, x in pair.items():
        if 0 in x.shape:
            raise ValueError(f"{name} is empty: shape {list(x.shape)}")


def _check_rows(**matrices: Tensor) -> None:
    """Matrices by name: each alone, and that they go together."""
    for name, x in matrices.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.layout != torch.strided or x.is_meta:
            kind = "on the meta device" if x.is_meta else str(x.layout)
            raise TypeError(f"{name} must be a dense tensor with values, and is {kind}")
        if x.dim() != 2:
            raise ValueError(f"{name} must be 2-D [rows, features], got shape {list(x.shape)}")
    (name, x), *others = matrices.items()
    for other_name, other in others:
        if x.shape[1] != other.shape[1]:
            raise ValueError(
                f"{name} has {x.shape[1]} features and {other_name} has {other.shape[1]}; they must be equal"
            )
        if x.device != other.device:
            raise ValueError(f"{name} is on {x.device} and {other_name} on {other.device}; move them to one device")


def _check_flags(name: str, flags: Tensor, embeddings: Tensor, shape: list[int]) -> None:
    """Which clips, or which of their tags."""
    if not isinstance(flags, Tensor) or flags.dtype != torch.bool:
        got = flags.dtype if isinstance(flags, Tensor) else type(flags).__name__
        raise TypeError(f"{name} must be a tensor of bool, got {got}")
    if list(flags.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {list(flags.shape)}")
    if flags.device != embeddings.device:
        raise ValueError(f"{name} is on {flags.device} and audio on {embeddings.device}; move them to one device")


def _check_group(group: dist.ProcessGroup | None) -> None:
    if group is not None and not torch.compiler.is_compiling() and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed process group, got {type(group).__name__}")


def _check_finite(name: str, x: Tensor) -> None:
    bad = (~torch.isfinite(x.detach()).all(1)).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", …" if len(bad) > 8 else "")
        raise ValueError(f"{name} has NaN or infinite values in {len(bad)} of {x.shape[0]} rows: {shown}")


def _check_scalar(name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {list(value.shape)}")
        if value.is_meta:
            raise TypeError(f"{name} is on the meta device, where tensors have no values")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a one-element tensor, got {type(value).__name__}")
    elif not abs(value) <= MAX_SCALAR:  # a comparison, which integers of any size survive
        shown = value if isinstance(value, float) else f"an integer of {value.bit_length()} bits"
        raise ValueError(f"{name} must be finite, and so in float32, got {shown}")
