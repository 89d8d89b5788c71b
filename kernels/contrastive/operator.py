"""The contrastive losses as differentiable operators: InfoNCE and SigLIP without the N×M matrix of logits.

Every loss is S = scale · â·b̂ᵀ followed by softmaxes over its rows and columns, or by a sigmoid. Two engines compute
it, plain torch in `torch_engine` and Triton in `triton_engine`, and `shared` has the definitions. Both walk over chunks
of rows of A; a chunk of logits is the only thing of size M that they hold, so memory is O(chunk·M + N·D):

* pass 1 forms a chunk of S and adds to the row and column sums of exponentials;
* pass 2 forms it again (or takes it back, as far as a fixed budget lets chunks be kept), turns it into
  G = dL/dS and multiplies: dA_chunk = G·B, dB += Gᵀ·A.

Both passes run in the forward call, as soon as any input needs a gradient, and the backward call only multiplies by
the upstream gradient: nothing but the gradients is kept between the two, and in a distributed run every collective
sits in the forward call, where the ranks agree on the shapes first.

Eager calls go through an autograd.Function. Under torch.compile the same arithmetic is an operator,
`fastclap::info_nce` or `fastclap::sigmoid_loss`, so that a graph stays whole.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.contrastive import torch_engine
from fastclap.kernels.contrastive.shared import (
    Contrast,
    Gradients,
    Ids,
    Need,
    QueueRows,
    Ranks,
    Results,
    Teacher,
    agree,
    reject,
)


def info_nce(
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
    logit_scale: float | Tensor,
    ids: Ids | None,  # [N], [M]
    teacher: Teacher | None,
    queue: QueueRows | None,
    contrast: Contrast,
    group: dist.ProcessGroup | None,
    backend: str,
    top1: bool,
    agree_once: bool,
) -> tuple[Tensor, Tensor | None]:
    """`fastclap.losses.info_nce` of checked arguments: (loss, in-batch top-1 if asked for).

    Raises:
        ValueError: the backend cannot take the embeddings, ranks disagree, or no row has a positive column.
    """
    a, b = _as_autocast(a), _as_autocast(b)
    if torch.compiler.is_compiling():
        inputs = (a, b, _graph_scalar(logit_scale, a))
        t = (None, None, None) if teacher is None else (teacher[0], teacher[1], _graph_scalar(teacher[2], a))
        results = torch.ops.fastclap.info_nce(
            *inputs, *(ids or (None, None)), *t, contrast.key, "" if group is None else group.group_name, agree_once,
            backend, list(_need(*inputs)[:3]), top1, *(queue or (None, None, None, None)),
        )  # fmt: skip
        return results[0], results[4] if top1 else None
    inputs = (a, b, torch.as_tensor(logit_scale))
    need = _need(*inputs)
    results = _info_nce(*inputs, ids, teacher, queue, contrast, group, agree_once, backend, need, top1)
    return _WithGradients.apply(*inputs, results) if any(need) else results[0], results[2]


def sigmoid_loss(
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    ids: Ids | None,  # [N], [M]
    normalize: bool,
    group: dist.ProcessGroup | None,
    backend: str,
    agree_once: bool,
) -> Tensor:
    """`fastclap.losses.sigmoid_loss` of checked arguments.

    Raises:
        ValueError: the backend cannot take the embeddings, or ranks disagree.
    """
    a, b = _as_autocast(a), _as_autocast(b)
    if torch.compiler.is_compiling():
        inputs = (a, b, _graph_scalar(logit_scale, a), _graph_scalar(logit_bias, a))
        name = "" if group is None else group.group_name
        return torch.ops.fastclap.sigmoid_loss(
            *inputs, *(ids or (None, None)), normalize, name, agree_once, backend, list(_need(*inputs))
        )[0]
    inputs = (a, b, torch.as_tensor(logit_scale), torch.as_tensor(logit_bias))
    need = _need(*inputs)
    results = _sigmoid_loss(*inputs, ids, normalize, group, agree_once, backend, need)
    return _WithGradients.apply(*inputs, results) if any(need) else results[0]


def _as_autocast(x: Tensor) -> Tensor:
    """On a GPU under autocast, what torch.matmul would take; CPU engines compute in float32 either way."""
    dtype = dispatch.autocast_dtype(x)
    return x if dtype is None or not dispatch.on_gpu(x) else x.to(dtype)


def _need(*inputs: Tensor) -> Need:
    enabled = torch.is_grad_enabled()
    return Need(*(enabled and x.requires_grad for x in inputs))


def _graph_scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A scalar as a tensor that a compiled graph can take."""
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


# ---------------------------------------------------------------------------------------------------------------------
# the loss and its gradients, by the engine of choice


def _info_nce(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    ids: Ids | None,
    teacher: Teacher | None,
    queue: QueueRows | None,
    contrast: Contrast,
    group: dist.ProcessGroup | None,
    agree_once: bool,
    backend: str,
    need: Need,
    top1: bool,
) -> Results:
    engine = _engine(a, b, backend, group, agree_once)
    ranks = agree(group, "info_nce", a, b, ids, teacher, queue, contrast, need, agree_once)
    transposed = contrast.direction == "b_to_a"  # engines know the rows, and both directions
    if transposed:
        a, b, ranks, need = b, a, ranks.transposed(), Need(need.b, need.a, need.scale)
        ids = None if ids is None else (ids[1], ids[0])
        teacher = None if teacher is None else (teacher[1], teacher[0], teacher[2])
        queue = None if queue is None else queue.transposed()
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False), torch.cuda.device_of(a):
        compute = functools.partial(_prefixes, engine) if contrast.matryoshka else engine.info_nce
        loss, gradients, shares = compute(a, b, scale, ids, teacher, queue, contrast, ranks, need, top1)
        if transposed:
            gradients = (gradients[1], gradients[0], gradients[2]) if gradients else ()
            shares = None if shares is None else shares.flip(0)
        return loss, gradients, shares


def _prefixes(
    engine: ModuleType,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    ids: Ids | None,
    teacher: Teacher | None,
    queue: QueueRows | None,
    contrast: Contrast,
    ranks: Ranks,
    need: Need,
    top1: bool,
) -> Results:
    """The weighted sum over the first features of a and b (Kusupati et al. 2022, arXiv 2205.13147), by an engine.

    Gradients are summed in float32 or wider. In-batch top-1 is that of the widest.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    da, db = (torch.zeros_like(x, dtype=dtype) if wanted else None for x, wanted in zip((a, b), need, strict=False))
    losses, dscales, shares = [], [], None
    for width, weight in contrast.matryoshka:
        widest = width == contrast.matryoshka[-1][0]
        entries = None if queue is None else queue.cut(width)
        loss, gradients, shares = engine.info_nce(
            a[:, :width], b[:, :width], scale, ids, teacher, entries, contrast, ranks, need, top1 and widest
        )
        losses.append(weight * loss)
        for total, gradient in zip((da, db), gradients, strict=False):
            if total is not None:
                total[:, :width].add_(gradient, alpha=weight)
        if need.scale:
            dscales.append(weight * gradients[2])
    dscale = torch.stack(dscales).sum(0) if dscales else None
    return torch.stack(losses).sum(), (da, db, dscale) if any(need) else (), shares


def _sigmoid_loss(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    ids: Ids | None,
    normalize: bool,
    group: dist.ProcessGroup | None,
    agree_once: bool,
    backend: str,
    need: Need,
) -> Results:
    engine = _engine(a, b, backend, group, agree_once)
    ranks = agree(group, "sigmoid_loss", a, b, ids, None, None, Contrast(normalize=normalize), need, agree_once)
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False), torch.cuda.device_of(a):
        return engine.sigmoid_loss(a, b, scale, bias, ids, normalize, ranks, need)


def _engine(a: Tensor, b: Tensor, backend: str, group: dist.ProcessGroup | None, agree_once: bool) -> ModuleType:
    """The module that computes the loss of these embeddings."""
    double = torch.float64 in (a.dtype, b.dtype)
    why_not = "it takes float16, bfloat16 and float32; float64 needs backend='torch'" if double else None
    try:
        chosen = dispatch.engine(a, backend, why_not, tensor="embeddings")
    except ValueError as error:
        reject(error, group, agree_once)
    if chosen == "torch":
        return torch_engine
    from fastclap.kernels.contrastive import triton_engine

    return triton_engine


# ---------------------------------------------------------------------------------------------------------------------
# autograd


def _multiply_by_upstream(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> Gradients:
    """The backward call: of every input, its gradient that came with the loss times the upstream gradient."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this loss can be differentiated once only, so create_graph=True would lose terms; backend='reference' has "
            "all derivatives"
        )
    found: list[Tensor | None] = [None] * ctx.num_inputs
    if upstream is None:
        return tuple(found)
    gradients: list[Tensor | None] = [*ctx.saved_tensors]
    if dispatch.on_gpu(upstream) and not dispatch.why_only_torch(upstream):
        from fastclap.kernels.contrastive import triton_engine

        gradients[:3] = triton_engine.times_upstream(gradients[:3], upstream, [dtype for _, dtype, _ in ctx.like[:3]])
        gradients[3:] = [None if g is None else g * upstream for g in gradients[3:]]
    else:  # in float32, in which the upstream gradient is
        gradients = [
            None if g is None else g.to(torch.promote_types(g.dtype, upstream.dtype)) * upstream for g in gradients
        ]
    for index, (gradient, (shape, dtype, device)) in enumerate(zip(gradients, ctx.like, strict=True)):
        found[index] = None if gradient is None else gradient.to(device, dtype).reshape(shape)
    return tuple(found)


class _WithGradients(torch.autograd.Function):
    """The loss as a function of the inputs, followed by the results that were computed for them."""

    @staticmethod
    def forward(ctx: Any, *inputs_and_results: Any) -> Tensor:
        *inputs, (loss, gradients, _) = inputs_and_results
        ctx.num_inputs, ctx.like = len(inputs_and_results), [(x.shape, x.dtype, x.device) for x in inputs]
        ctx.save_for_backward(*gradients)
        return loss

    backward = staticmethod(_multiply_by_upstream)


# ---------------------------------------------------------------------------------------------------------------------
# operators


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
    contrast: str,
    group: str,
    agree_once: bool,
    backend: str,
    need: list[bool],
    top1: bool,
    queue_a: Tensor | None = None,
    queue_b: Tensor | None = None,
    queue_a_ids: Tensor | None = None,
    queue_b_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What torch.compile sees of `info_nce`: (loss, da, db, dscale, top-1), empty where not needed.

    `contrast` is the key of one, `group` the name of a process group, or "".
    """
    teacher = None
    if teacher_a is not None and teacher_b is not None and teacher_scale is not None:
        teacher = (teacher_a, teacher_b, teacher_scale)
    queue = None
    if queue_a is not None and queue_b is not None:
        queue = QueueRows(queue_a, queue_b, queue_a_ids, queue_b_ids)
    loss, gradients, shares = _info_nce(
        a, b, logit_scale, _pair(a_ids, b_ids), teacher, queue, Contrast.from_key(contrast), _resolve(group),
        agree_once, backend, Need(*need), top1,
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
    agree_once: bool,
    backend: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What torch.compile sees of `sigmoid_loss`: (loss, da, db, dscale, dbias)."""
    loss, gradients, _ = _sigmoid_loss(
        a, b, logit_scale, logit_bias, _pair(a_ids, b_ids), normalize, _resolve(group), agree_once, backend, Need(*need)
    )
    loss, da, db, dscale, dbias = _graph_outputs(loss, gradients, 4, _gradient_dtype(a, b))
    return loss, da, db, dscale, dbias


def _pair(a_ids: Tensor | None, b_ids: Tensor | None) -> Ids | None:
    return None if a_ids is None or b_ids is None else (a_ids, b_ids)


def _resolve(group: str) -> dist.ProcessGroup | None:
    if not group:
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(group)  # type: ignore[arg-type]


def _graph_outputs(loss: Tensor, gradients: Gradients, count: int, dtype: torch.dtype) -> list[Tensor]:
    """Loss and `count` gradients as the graph was promised them: the absent ones empty."""
    outputs = [loss]
    for x in [*gradients, *[None] * (count - len(gradients))]:
        outputs.append(loss.new_empty(0) if x is None else x.to(dtype if x.dim() == 2 else torch.float64, copy=True))
    return outputs


def _gradient_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """bfloat16 gradients may keep their dtype; float16 ones would underflow before a loss scale reaches them."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return dtype if dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)


def _fake_outputs(a: Tensor, b: Tensor, need: list[bool]) -> list[Tensor]:
    """What `_graph_outputs` gives, without values."""
    loss_dtype, dtype = torch.promote_types(a.dtype, torch.promote_types(b.dtype, torch.float32)), _gradient_dtype(a, b)
    results = [a.new_empty((), dtype=loss_dtype)]
    for wanted, like in zip(need, (a, b), strict=False):
        results.append(like.new_empty(like.shape, dtype=dtype) if wanted else a.new_empty(0, dtype=loss_dtype))
    for wanted in need[2:]:
        results.append(a.new_empty((), dtype=torch.float64) if wanted else a.new_empty(0, dtype=loss_dtype))
    return results


@info_nce_op.register_fake
def _(a: Tensor, b: Tensor, *others: Any) -> tuple[Tensor, ...]:
    need, top1 = others[10:12]
    results = _fake_outputs(a, b, need)
    shares = a.new_empty(2, dtype=torch.float32) if top1 else a.new_empty(0, dtype=results[0].dtype)
    return (*results, shares)


@sigmoid_op.register_fake
def _(a: Tensor, b: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(_fake_outputs(a, b, others[-1]))


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    need = next(x for x in inputs if isinstance(x, list))
    ctx.num_inputs, ctx.like = len(inputs), [(x.shape, x.dtype, x.device) for x in inputs[: len(need)]]
    ctx.save_for_backward(*(x if wanted else None for x, wanted in zip(output[1:], need, strict=False)))
    ctx.set_materialize_grads(False)


info_nce_op.register_autograd(_multiply_by_upstream, setup_context=_save_gradients)
sigmoid_op.register_autograd(_multiply_by_upstream, setup_context=_save_gradients)
