"""A GPU that is not there, for programs on tensors without data (torch's FakeTensorMode); it needs no compiler.

Fake CUDA tensors take the same way through the code as those of a GPU: the operations, shapes, dtypes and strides are
those of a training step on one. What torch and we would ask the device about is answered here:

* Our Triton operators run as the operators of `torch.library` that they are under torch.compile, by their fake
  registrations.
* Attention of torch is its memory-efficient operator; which one a GPU takes depends on its cuDNN too.
* torch's engine for backward passes asks the driver for its streams, so a backward pass is walked in Python
  (`run_backward`), in the order in which the engine walks it.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from fastclap.kernels import (
    bias_norm,
    dispatch,
    feed_forward,
    gated_convolution,
    layer_norm_gelu,
    resampling,
    residual_layer_norm,
    scaled_adam_triton,
    shared_attention,
    swoosh,
    toeplitz_attention,
    waveform,
    waveform_convolution,
)
from fastclap.kernels.contrastive import operator
from fastclap.kernels.contrastive.shared import Results
from fastclap.kernels.log_mel import cuda_engine
from fastclap.kernels.log_mel import operator as log_mel
from fastclap.models import packing
from fastclap.models.zipformer import tower
from fastclap.models.zipformer.limits import Training

ARCHITECTURE, MULTIPROCESSORS = 90, 132  # of an H100 or H200
MASK_ALIGNMENT = 16  # elements, to which torch pads the rows of a mask for its memory-efficient attention


# ---------------------------------------------------------------------------------------------------------------------
# backward passes


class _Saved:
    """A tensor that a node of autograd keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor.detach()  # an output with its node would keep that, and itself, for ever


class Engine:
    """Backward passes in Python, to be run within `installed` together with the forward passes before them.

    A node runs when all its gradients are there; of those, the one that was made last, and gradients of leaves before
    all others, which is the order of torch's engine. What a node has read of its saved tensors is let go after it has
    run. Left out is what our training step does not use: hooks of tensors and modules, `create_graph`, and
    `backward(inputs=...)`.
    """

    def __init__(self) -> None:
        self._read: list[_Saved] = []  # by the node that is running

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Inside it torch.autograd.backward and .grad run here."""
        with (
            mock.patch.object(torch.autograd, "_engine_run_backward", self.run_backward),
            mock.patch.object(torch.autograd.function.FunctionCtx, "set_materialize_grads", _set_materialize_grads),
            mock.patch.object(torch.autograd.Function, "apply", classmethod(_apply)),
            mock.patch.object(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: False),
            # activation checkpointing computes a layer again once for each of these
            mock.patch.object(torch._C, "_current_graph_task_id", lambda: 0),
            saved_tensors_hooks(_Saved, self._unpacked),
        ):
            yield

    def _unpacked(self, saved: _Saved) -> Tensor:
        if saved.tensor is None:
            raise RuntimeError("a second backward pass through a graph needs retain_graph=True in the first")
        self._read.append(saved)
        return saved.tensor

    @torch.no_grad()
    def run_backward(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        retain_graph: bool,
        create_graph: bool,
        inputs: Sequence[Tensor],
        allow_unreachable: bool = False,
        accumulate_grad: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """What torch.autograd hands to its engine; with `inputs` their gradients, and nothing is accumulated."""
        if create_graph or (inputs and accumulate_grad):
            raise NotImplementedError("the backward pass in Python knows neither create_graph nor backward(inputs=...)")
        roots = [get_gradient_edge(output) for output in outputs]
        wanted = [get_gradient_edge(x) for x in inputs]
        waiting = _dependencies(root.node for root in roots)
        needed = _leading_to({edge.node for edge in wanted}, waiting) if inputs else set(waiting)
        found: dict[tuple[Any, int], Tensor | None] = {(edge.node, edge.output_nr): None for edge in wanted}
        buffers: dict[Any, list[Tensor | None]] = defaultdict(list)
        order = itertools.count()
        ready: list[tuple[int, int, Any]] = []

        def receive(node: Any, position: int, gradient: Tensor | None) -> None:
            buffer = buffers[node] = buffers[node] or [None] * len(node._input_metadata)
            if gradient is not None:
                held = buffer[position]
                buffer[position] = gradient if held is None else held + gradient
            waiting[node] -= 1
            if waiting[node] <= 0 and node in needed:
                heapq.heappush(ready, (-node._sequence_nr(), next(order), node))

        for root in roots:
            waiting[root.node] += 1
        for root, gradient in zip(roots, gradients, strict=True):
            receive(root.node, root.output_nr, gradient)
        del gradients
        while ready:
            node = heapq.heappop(ready)[2]
            received = buffers.pop(node)
            for place in [place for place in found if place[0] is node]:
                found[place] = received[place[1]]
            if inputs and not any(edge in needed for edge, _ in node.next_functions):
                continue
            with torch.no_grad():  # whatever the node before has left
                made = _run(node, received)
            del received
            passed_on = made if isinstance(made, tuple) else (made,)
            del made
            for saved in () if retain_graph else self._read:
                saved.tensor = None
            self._read.clear()
            for (successor, position), gradient in zip(node.next_functions, passed_on, strict=False):
                if successor is not None:
                    receive(successor, position, _fitted(gradient, successor._input_metadata[position]))
            passed_on, gradient = (), None
        return tuple(found.values())


def _dependencies(roots: Iterable[Any]) -> dict[Any, int]:
    """All nodes from these on, and how many edges lead to each."""
    counts: dict[Any, int] = dict.fromkeys(roots, 0)
    stack = list(counts)
    while stack:
        for successor, _ in stack.pop().next_functions:
            if successor is not None:
                if successor not in counts:
                    counts[successor] = 0
                    stack.append(successor)
                counts[successor] += 1
    return counts


def _leading_to(targets: set[Any], nodes: Iterable[Any]) -> set[Any]:
    """Of these nodes the targets, and those from which a target is reached."""
    before: dict[Any, list[Any]] = defaultdict(list)
    for node in nodes:
        for successor, _ in node.next_functions:
            before[successor].append(node)
    found, stack = set(targets), list(targets)
    while stack:
        for node in before[stack.pop()]:
            if node not in found:
                found.add(node)
                stack.append(node)
    return found


def _set_materialize_grads(ctx: Any, value: bool) -> None:
    """As torch's, and kept where `_run` can read it, which torch's is not."""
    ctx.materialize_grads = ctx._materialize_grads = value


_plain_apply = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]


def _apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    """As torch's; the node is left word of which inputs are tensors, whose gradients alone are passed on."""
    made = _plain_apply(function, *args, **kwargs)
    for x in made if isinstance(made, tuple) else (made,):
        if isinstance(x, Tensor) and isinstance(x.grad_fn, BackwardCFunction):
            x.grad_fn._takes = [isinstance(value, Tensor) for value in args]  # type: ignore[attr-defined]
    return made


def _run(node: Any, received: list[Tensor | None]) -> Any:
    """What a node makes of its gradients."""
    if isinstance(node, BackwardCFunction):
        if getattr(node, "_materialize_grads", True):
            received = [
                torch.zeros(like.shape, dtype=like.dtype, device=like.device) if gradient is None else gradient
                for gradient, like in zip(received, node._input_metadata, strict=True)
            ]
        made = node.apply(*received)
        made = made if isinstance(made, tuple) else (made,)
        return tuple(itertools.compress(made, node._takes))
    if type(node).__name__ == "AccumulateGrad" and node.variable.grad is None and received[0] is not None:
        leaf, gradient = node.variable, received[0]
        if gradient.stride() == leaf.stride():  # torch's engine takes it as it is; called from here, the node copies
            leaf.grad = gradient
            for hook in list((leaf._post_accumulate_grad_hooks or {}).values()):
                hook(leaf)
            return ()
    return node(*received)


def _fitted(gradient: Tensor | None, of: Any) -> Tensor | None:
    """A gradient in the shape and dtype of what it is the gradient of, as torch's engine sees to."""
    if gradient is None:
        return None
    if gradient.shape != of.shape:
        gradient = gradient.sum_to_size(of.shape)
    return gradient if gradient.dtype == of.dtype else gradient.to(of.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# the GPU


def _info_nce(
    a: Tensor, b: Tensor, scale: Tensor, ids: Any, teacher: Any, queue: Any, contrast: Any, group: Any,
    agree_once: bool, backend: str, need: Any, top1: bool,
) -> Results:  # fmt: skip
    """In place of the loss of an eager call: its operator."""
    inputs = (a, b, scale, *(ids or (None, None)), *(teacher or (None, None, None)))
    with torch.no_grad():
        loss, *gradients, shares = torch.ops.fastclap.info_nce(
            *inputs, contrast.key, "", agree_once, backend, list(need)[:3], top1, *(queue or ())
        )
    return loss, tuple(gradients), shares if top1 else None


def _attention(
    q: Tensor,  # [B, H, T, d]
    k: Tensor,  # [B, H, S, d]
    v: Tensor,  # [B, H, S, d]
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention by torch's memory-efficient operator, with the mask as that wants it."""
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.where(bias, 0.0, float("-inf"))
        bias, length = bias.to(q.dtype), k.shape[2]
        if bias.stride(-2) % MASK_ALIGNMENT:
            bias = F.pad(bias, (0, -length % MASK_ALIGNMENT))[..., :length]
        bias = bias.expand(*q.shape[:3], length)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    options: dict[str, Any] = {"scale": scale}
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, save, dropout_p, is_causal, **options)[
        0
    ]


# What the optimizer's launches read and write; they are no operators.
_launches = torch.library.Library("fastclap_launches", "DEF")
_launches.define("scaled_adam_sums(Tensor[] parameters, Tensor[] gradients) -> Tensor")
_launches.define(
    "scaled_adam_step(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] deltas, Tensor(c!)[] squares) -> ()"
)
torch.library.register_fake(
    "fastclap_launches::scaled_adam_sums", lambda parameters, _: parameters[0].new_empty(len(parameters), 2)
)
torch.library.register_fake("fastclap_launches::scaled_adam_step", lambda *_: None)


def _scaled_adam_sums(parameters: list[Tensor], gradients: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    made = torch.ops.fastclap_launches.scaled_adam_sums(parameters, [g for g in gradients if g is not None])
    return made[:, 0], made[:, 1]


def _scaled_adam_step(
    parameters: list[Tensor], gradients: list[Tensor | None], deltas: list[Tensor], squares: list[Tensor], *_: Any
) -> None:
    present = [g for g in gradients if g is not None]
    torch.ops.fastclap_launches.scaled_adam_step(parameters, present, deltas, squares)


_plain_draws = Training.__init__


def _draws(training: Training, batches: float, draws: int) -> None:
    """A Zipformer's draws on the host, where it looks at them: of numbers, not of shapes."""
    with unset_fake_temporarily():
        _plain_draws(training, batches, draws)


def _deep_copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """`copy.deepcopy` of a tensor without data; torch's own copies the storage, byte by byte from nowhere."""
    made = memo[id(tensor)] = torch.empty_like(tensor, requires_grad=tensor.requires_grad)
    return made


def _operators() -> Iterator[tuple[Any, str, Any]]:
    """Where an eager call goes to a Triton launcher, and what takes its place."""
    ops = torch.ops.fastclap
    yield toeplitz_attention, "_forward", ops.gated_toeplitz_attention
    yield toeplitz_attention, "_backward", ops.gated_toeplitz_attention_backward
    yield layer_norm_gelu, "_forward", ops.layer_norm_gelu
    yield layer_norm_gelu, "_backward", ops.layer_norm_gelu_backward
    yield residual_layer_norm, "_forward", ops.residual_layer_norm
    yield residual_layer_norm, "_backward", ops.residual_layer_norm_backward
    yield shared_attention, "_prepare", ops.shared_attention_sums
    yield shared_attention, "_forward", ops.shared_attention
    yield shared_attention, "_backward", ops.shared_attention_backward
    yield shared_attention, "_penalty_gradients", ops.shared_attention_penalty
    yield feed_forward, "_gelu_backward", ops.gelu_backward
    yield swoosh, "_forward", ops.swoosh
    yield swoosh, "_slope", lambda x, dy, _: x * dy  # which reads and writes as much
    yield swoosh, "_backward", ops.swoosh_linear_backward
    yield bias_norm, "_forward", ops.bias_norm
    yield bias_norm, "_backward", ops.bias_norm_backward
    yield gated_convolution, "_forward", ops.gated_convolution
    yield gated_convolution, "_backward", ops.gated_convolution_backward
    for name in ("downsample", "downsample_backward", "upsample_bypass", "upsample_bypass_backward"):
        yield resampling, f"_{name}", getattr(ops, name)
    yield waveform_convolution, "_forward", ops.waveform_convolution
    yield waveform_convolution, "_backward", ops.waveform_convolution_backward
    yield scaled_adam_triton, "sums", _scaled_adam_sums
    yield scaled_adam_triton, "update_", _scaled_adam_step
    yield log_mel, "_features", lambda batch, spec, _: ops.log_mel(*batch, spec.key, "auto")
    yield waveform, "_triton_engine", lambda crops, dtype: ops.normalize_waveform(*crops, dtype)
    yield operator, "_info_nce", _info_nce


def _answers() -> Iterator[tuple[Any, str, Any]]:
    """Where the device would be asked, and what it would say."""
    yield dispatch, "architecture", lambda _: ARCHITECTURE
    yield cuda_engine, "why_not", lambda *_: None
    yield dispatch, "multiprocessors", lambda _: MULTIPROCESSORS
    yield packing, "_has_flash", lambda _: packing._varlen_attention() is not None
    yield Training, "__init__", _draws
    yield tower, "HostCopy", lambda tensor: None  # of what whiteners found, read a step later
    yield torch.cuda.amp.common, "amp_definitely_not_available", lambda: False
    yield torch.cuda, "is_bf16_supported", lambda *_, **__: True
    yield torch._C, "_select_conv_backend", lambda *_, **__: torch._C._ConvBackend.Cudnn  # type: ignore[attr-defined]
    yield torch._C, "_conv_determine_backend_memory_format", lambda *_: torch.contiguous_format
    yield F, "scaled_dot_product_attention", _attention


def _to(model: nn.Module, device: torch.device | str) -> nn.Module:
    """`Module.to`, which fails on parameters without data: new ones on the device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device != torch.device(device):
                data = torch.empty_like(parameter, device=device)
                module._parameters[name] = nn.Parameter(data, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Inside it tensors have no data; the way that they take through the code is that of their device's."""
    with (
        mock.patch.object(nn.Module, "to", _to),
        mock.patch.object(FakeTensor, "__deepcopy__", _deep_copy, create=True),
        mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, *_: tensor),
        Engine().installed(),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """`without_data`, and tensors on "cuda" are taken for an H100's."""
    with contextlib.ExitStack() as stack:
        for owner, name, instead in (*_operators(), *_answers()):
            stack.enter_context(mock.patch.object(owner, name, instead))
        stack.enter_context(without_data())
        yield
