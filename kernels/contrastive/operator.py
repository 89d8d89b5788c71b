"""Contrastive losses (InfoNCE and SigLIP) over row chunks of the logits, so that the N×M matrix never exists.

Every loss is S = scale · â·b̂ᵀ followed by softmaxes over its rows and columns, or by a sigmoid. Both engines, plain
torch in `torch_engine` and Triton in `triton_engine`, walk over chunks of rows of A; a chunk of logits
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

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.contrastive.shared import (
    Gradients,
    Need,
    Ranks,
    Results,
    Teacher,
    agree,
)
from fastclap.kernels.contrastive.torch_engine import (
    Positives,
    _info_nce_chunks,
    _sigmoid_chunks,
)

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
            from fastclap.kernels.contrastive.triton_engine import info_nce_gradients

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
            from fastclap.kernels.contrastive.triton_engine import sigmoid_gradients

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
