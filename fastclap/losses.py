"""Contrastive losses for dual encoders: InfoNCE, SigLIP and the tag loss.

The arguments are checked here, with messages meant for the caller; the arithmetic is in `kernels/contrastive`, which
never holds the N×M matrix of logits. With a process group the ranks exchange their shapes first, so that a wrong
argument on one rank is an error on all of them and not a hang; `agree_once` leaves that to the first call of a kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastclap.kernels.contrastive import operator
from fastclap.kernels.contrastive.shared import (
    Contrast,
    Ids,
    Teacher,
    info_nce_reference,
    reject,
    sigmoid_loss_reference,
)


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
    process_group: dist.ProcessGroup | None = None,
    agree_once: bool = False,
    backend: str = "auto",
    return_top1: bool = False,
    check_finite: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """InfoNCE (van den Oord et al. 2018; symmetric as in CLIP, Radford et al. 2021) without the matrix of logits.

    With S = logit_scale · â·b̂ᵀ, a→b is the cross-entropy of each row's softmax over all M columns with its target
    (1/k on each of its k positives; with label smoothing ε, (1-ε)·target + ε/M), averaged over the rows that have a
    positive; b→a is the same on Sᵀ; "both" is their mean. A row or column without a positive takes part only as a
    negative. With a teacher each direction becomes (1-λ)·cross-entropy + λ·KL(P_teacher‖P).

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
        return_top1: also return in-batch top-1.
        check_finite: look for NaN and infinity in a and b first (waits for the GPU).

    Returns:
        0-d float32 (float64 for float64 embeddings), differentiable once in a, b and logit_scale. The gradients are
        computed along with the loss, those that are needed and no others. With return_top1 a pair: the loss, and [2]
        float32 with the share of rows, and of columns, whose best match is one of their positives (NaN for
        a direction that is left out).

    Raises:
        TypeError, ValueError: an argument is unusable, no row has a positive, or ranks disagree. With the Triton engine
            the loss is NaN if no row has a positive: to raise, the host would have to wait for the GPU.
    """
    try:
        contrast = Contrast(teacher_weight, label_smoothing, normalize, direction)
        scalars = {"logit_scale": logit_scale}
        ids = _checked_ids(a, b, a_ids, b_ids, scalars, process_group, backend, check_finite)
        teacher = _checked_teacher(teacher, teacher_weight, a, b)
        if return_top1 and backend == "reference":
            raise ValueError("backend='reference' has no in-batch top-1; use another backend")
    except (TypeError, ValueError) as error:
        reject(error, process_group, agree_once)
    if backend == "reference":
        return info_nce_reference(a, b, logit_scale, ids, teacher, contrast)
    loss, top1 = operator.info_nce(
        a, b, logit_scale, ids, teacher, contrast, process_group, backend, return_top1, agree_once
    )
    return loss if top1 is None else (loss, top1)


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
        0-d float32 (float64 for float64 embeddings), differentiable once in a, b, logit_scale and logit_bias.

    Raises:
        TypeError, ValueError: an argument is unusable, or ranks disagree.
    """
    try:
        scalars = {"logit_scale": logit_scale, "logit_bias": logit_bias}
        ids = _checked_ids(a, b, a_ids, b_ids, scalars, process_group, backend, check_finite)
    except (TypeError, ValueError) as error:
        reject(error, process_group, agree_once)
    if backend == "reference":
        return sigmoid_loss_reference(a, b, logit_scale, logit_bias, ids, normalize)
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
    wanted = (audio.shape[0], prompts.shape[0])
    if tuple(targets.shape) != wanted or audio.shape[1:] != prompts.shape[1:]:
        raise ValueError(
            f"targets have shape {list(targets.shape)}, audio {list(audio.shape)} and prompts {list(prompts.shape)}; "
            "they must be [clips, tags], [clips, dim] and [tags, dim]"
        )
    dtype = torch.promote_types(audio.dtype, torch.float32)
    unit_audio, unit_prompts = (F.normalize(x.to(dtype), dim=-1) for x in (audio, prompts))
    logits = scale * unit_audio @ unit_prompts.t()
    of_clips = F.binary_cross_entropy_with_logits(logits, targets.to(dtype), reduction="none").mean(1)
    tagged = targets.any(1)
    total, count = torch.where(tagged, of_clips, 0.0).sum(), tagged.sum().to(dtype)
    if process_group is None:
        return total / count.clamp(min=1)
    both = torch.stack([total.detach(), count])
    dist.all_reduce(both, group=process_group)
    count = both[1].clamp(min=1)
    own = total * dist.get_world_size(process_group) / count
    return both[0] / count + (own - own.detach())


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
        if tuple(ids.shape) != (rows,):
            raise ValueError(f"{name} must have shape [{rows}], one id per row, got {list(ids.shape)}")
    return a_ids, b_ids


def _checked_teacher(teacher: Teacher | None, weight: float, a: Tensor, b: Tensor) -> Teacher | None:
    """The teacher, if it has a weight."""
    if teacher is None:
        if weight > 0:
            raise ValueError(f"teacher_weight={weight} needs teacher=(a_t, b_t, scale_t)")
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
    return (a_t, b_t, scale) if weight > 0 else None


def _check_embeddings(**pair: Tensor) -> None:
    """Two matrices by name: each alone, and that they go together."""
    for name, x in pair.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dim() != 2:
            raise ValueError(f"{name} must be 2-D [rows, features], got shape {list(x.shape)}")
        if x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError(f"{name} is empty: shape {list(x.shape)}")
    (name, x), (other_name, other) = pair.items()
    if x.shape[1] != other.shape[1]:
        raise ValueError(f"{name} has {x.shape[1]} features and {other_name} has {other.shape[1]}; they must be equal")
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device} and {other_name} on {other.device}; move them to one device")


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
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a one-element tensor, got {type(value).__name__}")
    elif not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
