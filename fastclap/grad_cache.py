"""Gradient caching (Gao et al. 2021): one large contrastive batch, with the activations of only one chunk in memory.

All inputs are embedded in chunks without a graph; the loss is called once on all embeddings and gives their
gradients; then each chunk is embedded again, this time with a graph, and its embeddings' gradients are sent back
through it. The sum over chunks is the gradient of the whole batch. That is exact only if the second forward repeats
the first, so per chunk the random states of torch (CPU and CUDA), NumPy and Python are put back, towers get copies
of their inputs (some write into them), the autocast cache of cast weights is cleared, and BatchNorm updates its
running statistics in the first pass only.

One chunk of each tower, the last of full size, builds its graph in the first pass and keeps it through the loss; the
second pass begins with it and has one chunk less to embed. This graph shows whether the tower trains at all (a frozen
one is not repeated and its side of the loss is not differentiated), and it meets most out-of-memory errors before the
loss has communicated with other ranks. Where several towers' graphs do not fit together, they are dropped.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastclap.kernels import dispatch

# What error texts say besides "out of memory": the allocators of cuBLAS and cuDNN, that of the CPU, and what is left of
# an out-of-memory error after torch has tried all engines of cuDNN for a convolution.
_SIGNS = (
    "out of memory", "STATUS_ALLOC_FAILED", "ALLOCATION_FAILED", "DefaultCPUAllocator",
    "unable to find an engine to execute this computation",
)  # fmt: skip

Input = Tensor | Mapping[str, Any]
Tower = Callable[..., Tensor]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, which a smaller chunk may cure.

    Only torch's own allocator raises `torch.OutOfMemoryError`. CUDA (`torch.AcceleratorError`), cuBLAS, cuDNN, Triton's
    launcher and the allocator of the CPU raise other errors that are known by their text. Triton's `OutOfResources` is
    none of them: that kernel does not fit into a multiprocessor, however small the batch.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


class SecondPassMemoryError(torch.OutOfMemoryError):
    """Memory ran out in the second pass of a step that cannot be repeated, and the next call needs less of it.

    Other ranks have gone on from the loss, or nobody knows which parameters have received gradients. Those of this step
    are incomplete.
    """


class GradCache:
    """Forward and backward of one big batch in chunks.

    Args:
        towers: one callable per input, e.g. `[model.encode_audio, model.encode_text]`; each returns [rows, ...]
            embeddings. A row must depend on its own chunk only through BatchNorm, if at all.
        chunk_size: rows per chunk, one number or one per tower. A batch of one chunk a tower costs no second pass.
        loss: called as `loss(*embeddings)` with leaf tensors, returns a scalar. It may use tensors of its own,
            such as the logit scale; they receive their gradients too.
        modules: the modules behind the towers, searched for BatchNorm, parameters and `no_sync`. May be left out
            where every tower is a module or a method of one.

    Attributes:
        chunk_sizes: rows per chunk of each tower, as reduced after out-of-memory errors.
        keeps_graphs: whether the graphs of the first pass last through the loss; no longer where memory ran out beside
            them and chunks of the same size fit without.
    """

    def __init__(
        self,
        towers: Sequence[Tower],
        chunk_size: int | Sequence[int],
        loss: Callable[..., Tensor],
        *,
        modules: Sequence[nn.Module] | None = None,
    ) -> None:
        self.towers = list(towers)
        if not self.towers:
            raise ValueError("towers is empty; give at least one callable")
        sizes = [chunk_size] * len(self.towers) if isinstance(chunk_size, int) else list(chunk_size)
        if len(sizes) != len(self.towers) or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sizes):
            raise ValueError(f"chunk_size must be a positive integer, or one for each tower, got {chunk_size!r}")
        self.chunk_sizes = sizes
        self.keeps_graphs = True
        self.loss = loss
        found = [_module_behind(tower) for tower in self.towers] if modules is None else list(modules)
        self._knows_modules = all(module is not None for module in found)
        self._modules = list(dict.fromkeys(module for module in found if module is not None))

    def __call__(self, *inputs: Input, no_sync: Callable[[], AbstractContextManager[Any]] | None = None) -> Tensor:
        """Add the gradient of `loss` to `.grad` of everything it depends on, and return the loss, detached.

        Args:
            inputs: inputs[i] goes to towers[i] in chunks along dimension 0: a tensor, or a dict that is passed as
                keyword arguments. In a dict all tensors must have the same number of rows; a list with one entry a
                row (lengths that the host knows) is cut like them, and anything else goes to every chunk as it is.
                Towers may have different numbers of rows. An input that requires gradients must be a leaf.
            no_sync: makes the context that suppresses gradient synchronisation during all backward passes but the
                last; by default `no_sync()` of each module that has it (DistributedDataParallel).

        Raises:
            ValueError, TypeError: unusable inputs, embeddings or loss.
            SecondPassMemoryError: memory ran out in the second pass of a distributed run, or of towers that are neither
                modules nor methods of one.
            RuntimeError: called under torch.func or within forward-mode differentiation.
            RuntimeError (see `is_out_of_memory`): chunks of one row do not fit, or memory ran out where one rank cannot
                repeat its part: in the loss of a distributed run, or in sharded towers (FSDP2).
        """
        if dispatch.is_transformed() or forward_ad._current_level >= 0:
            raise RuntimeError(
                "GradCache adds to .grad by its own backward passes, which torch.func and forward-mode differentiation "
                "cannot follow: call it outside of them"
            )
        if len(inputs) != len(self.towers):
            raise ValueError(f"{len(self.towers)} towers need as many inputs, got {len(inputs)}")
        sizes = [_checked_rows(index, batch) for index, batch in enumerate(inputs)]
        found: list[Any] = [getattr(module, "no_sync", None) for module in self._modules]
        contexts = [context for context in ([no_sync] if no_sync is not None else found) if context is not None]
        alone = not contexts and not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        while True:
            step = _Step(self, inputs, sizes, contexts, alone)
            try:
                return step.run()
            except RuntimeError as error:
                if not (is_out_of_memory(error) and self._reduce(step, sizes)):
                    raise
                if not step.repeatable:
                    if step.second_pass:
                        raise SecondPassMemoryError(str(error)) from error
                    raise
                step.undo()
            # Past the except clause the traceback, and with it the graph that did not fit, is gone.
            del step
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _reduce(self, step: _Step, sizes: Sequence[int]) -> bool:
        """Make the next attempt need less memory than `step`, which ran out of it; False if nothing can be reduced."""
        chunks = [min(self.chunk_sizes[index], sizes[index]) for index in step.working]
        if step.kept:
            self.keeps_graphs = False
        elif any(chunk > 1 for chunk in chunks):
            self.keeps_graphs = True  # of smaller chunks, they may fit
            for index, chunk in zip(step.working, chunks, strict=True):
                self.chunk_sizes[index] = (chunk + 1) // 2
        else:
            return False
        return True


class _Step:
    """One attempt at a batch with the current chunk sizes."""

    def __init__(
        self,
        cache: GradCache,
        inputs: Sequence[Input],
        sizes: Sequence[int],
        contexts: Sequence[Callable[[], AbstractContextManager[Any]]],
        alone: bool,
    ) -> None:
        self.cache, self.inputs, self.contexts, self.alone = cache, inputs, contexts, alone
        self.working: list[int] = []  # towers at work, for out-of-memory errors
        # Whether `undo` leads back to the beginning, without other ranks. Sharded towers communicate in every chunk.
        self.repeatable = not any(hasattr(p, "device_mesh") for module in cache._modules for p in module.parameters())
        self.second_pass = False
        self.random = _RandomState()
        self.statistics = [
            (buffer, buffer.clone())
            for layer in _batch_norms(cache._modules)
            for buffer in layer.buffers(recurse=False)
        ]
        self.chunks = [
            [slice(at, min(at + chunk, rows)) for at in range(0, rows, chunk)]
            for rows, chunk in zip(sizes, cache.chunk_sizes, strict=True)
        ]
        self.states: list[list[_RandomState]] = [[] for _ in self.chunks]
        self.kept: dict[int, Tensor] = {}  # tower → embeddings of its chunk `_with_graph`, with their graph
        self.earlier: dict[Tensor, Tensor | None] = {}

    def run(self) -> Tensor:
        if all(len(chunks) == 1 for chunks in self.chunks):
            return self._run_unchunked()
        torch.clear_autocast_cache()  # casts made without a graph cut the weights off from a pass that needs one
        embeddings = [self._embed(index) for index in range(len(self.chunks))]
        torch.clear_autocast_cache()
        self.working, self.repeatable = [], self.alone
        loss, gradients, own = self._differentiate(embeddings)
        after_loss = _RandomState()
        self._set_gradients_aside()
        served = self._use_kept_graphs(gradients)
        with _frozen_batch_norm(self.cache._modules):
            self._run_second_pass(gradients, own, served)
        self._add_earlier_gradients()
        if not self.contexts:
            for tensor, gradient in own:
                tensor.grad = gradient.clone() if tensor.grad is None else tensor.grad.add_(gradient)
        after_loss.restore()
        return loss

    def _run_unchunked(self) -> Tensor:
        """Every tower has one chunk, so nothing is embedded twice."""
        self.working = list(range(len(self.chunks)))
        with torch.enable_grad():
            embeddings = [self._forward(index, at) for index, (at,) in enumerate(self.chunks)]
            self.repeatable = self.alone
            if not self.alone:
                self.working = []
            loss = self._loss(embeddings)
        self.working = list(range(len(self.chunks)))
        self._set_gradients_aside()
        loss.backward()
        self._add_earlier_gradients()
        return loss.detach()

    def undo(self) -> None:
        """Put gradients, running statistics and random states back to where they were."""
        for tensor, gradient in self.earlier.items():
            tensor.grad = gradient
        for buffer, value in self.statistics:
            buffer.copy_(value)
        self.random.restore()

    def _embed(self, index: int) -> Tensor:
        """The tower's embeddings of all rows, as a leaf that requires gradients if the tower trains."""
        self.working = [index]
        parts: list[Tensor] = []
        trains = False
        with self._no_sync():
            for number, at in enumerate(self.chunks[index]):
                self.states[index].append(_RandomState())
                with_graph = number == self._with_graph(index)
                if with_graph:
                    torch.clear_autocast_cache()
                with torch.set_grad_enabled(with_graph):
                    out = self._forward(index, at)
                if with_graph:
                    trains = out.requires_grad
                    # Where gradients are synchronised, a forward pass outside `no_sync` has to precede that.
                    if trains and self.cache.keeps_graphs and not (self.contexts and len(self.chunks[index]) == 1):
                        self.kept[index] = out
                parts.append(out.detach())
                del out
        return torch.cat(parts).requires_grad_(trains)

    def _with_graph(self, index: int) -> int:
        """Number of the tower's chunk that has a graph in the first pass: the last one that is not a remainder."""
        chunks = self.chunks[index]
        return max(0, chunks[-1].stop // chunks[0].stop - 1)

    def _loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        with torch.enable_grad():
            loss = self.cache.loss(*embeddings)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss must return a scalar tensor, got {what}")
        if not loss.requires_grad:
            raise ValueError("the loss depends on nothing that requires gradients")
        return loss

    def _differentiate(
        self, embeddings: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None], list[tuple[Tensor, Tensor]]]:
        """The detached loss, its gradient for each tower's embeddings, and for the tensors that only the loss uses."""
        loss = self._loss(embeddings)
        wanted = [embedding for embedding in embeddings if embedding.requires_grad]
        leaves = [leaf for leaf in _leaves(loss) if not any(leaf is embedding for embedding in wanted)]
        found = torch.autograd.grad(loss.sum(), [*wanted, *leaves], allow_unused=True)
        received = iter(found[: len(wanted)])
        gradients = [next(received) if embedding.requires_grad else None for embedding in embeddings]
        own = [
            (leaf, gradient)
            for leaf, gradient in zip(leaves, found[len(wanted) :], strict=True)
            if gradient is not None
        ]
        return loss.detach(), gradients, own

    def _use_kept_graphs(self, gradients: Sequence[Tensor | None]) -> set[int]:
        """The part of the second pass that needs no forward pass, which frees the graphs before others are built.

        Returns:
            The towers that have kept one.
        """
        served = set(self.kept)
        statistics = [(buffer, buffer.clone()) for buffer, _ in self.statistics]
        for index, gradient in enumerate(gradients):
            out = self.kept.pop(index, None)
            if out is not None and gradient is not None:
                self.working = [index]
                with torch.enable_grad(), self._no_sync():
                    (out * gradient[self.chunks[index][self._with_graph(index)]]).sum().backward()
        for buffer, value in statistics:  # activation checkpoints have run BatchNorm again
            buffer.copy_(value)
        return served

    def _run_second_pass(
        self, gradients: Sequence[Tensor | None], own: Sequence[tuple[Tensor, Tensor]], served: set[int]
    ) -> None:
        """The second pass. Where gradients are synchronised, the last chunks of all towers share one backward pass.

        DistributedDataParallel waits in that pass until every parameter has its gradient, so each tower, and whatever
        the loss itself uses of the module, must take part in it.
        """
        shared: list[tuple[int, int, Tensor]] = []
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            # First the chunk of the kept graph, so that sums do not depend on whether there was one.
            numbers = list(range(len(self.chunks[index])))
            first = numbers.pop(self._with_graph(index))
            if index not in served:
                numbers.insert(0, first)
            if self.contexts:
                shared.append((index, numbers.pop(), gradient))
            for number in numbers:
                with self._no_sync():
                    self._surrogate(index, number, gradient).backward()
        if self.contexts:
            roots = [self._surrogate(*chunk) for chunk in shared]
            with torch.enable_grad():
                roots.extend((tensor * part).sum() for tensor, part in own)
            torch.autograd.backward(roots)
        torch.clear_autocast_cache()

    def _surrogate(
        self,
        index: int,
        number: int,  # of the chunk
        gradient: Tensor,  # [rows of the tower, ...]
    ) -> Tensor:
        """Σ embedding · gradient of a chunk, embedded as in the first pass: its backward pass is that of the loss."""
        self.working = [index]
        torch.clear_autocast_cache()
        self.states[index][number].restore()
        at = self.chunks[index][number]
        with torch.enable_grad():
            return (self._forward(index, at) * gradient[at]).sum()

    def _forward(self, index: int, at: slice) -> Tensor:
        tower, batch = self.cache.towers[index], self.inputs[index]
        if isinstance(batch, Tensor):
            out = tower(batch[at].clone())
        else:
            rows = self.chunks[index][-1].stop
            out = tower(**{key: _chunk_of(x, at, rows) for key, x in batch.items()})
        if not isinstance(out, Tensor):
            raise TypeError(f"tower {index} must return a tensor of embeddings, got {type(out).__name__}")
        if out.dim() == 0 or out.shape[0] != at.stop - at.start:
            raise ValueError(f"tower {index} returned shape {list(out.shape)} for {at.stop - at.start} rows")
        return out

    def _set_gradients_aside(self) -> None:
        """Let the backward passes begin at no gradient, so that what they add can be undone; not with other ranks."""
        self.second_pass = True
        self.repeatable = self.alone and self.cache._knows_modules
        if not self.repeatable:
            return
        tensors: list[Tensor] = [p for module in self.cache._modules for p in module.parameters()]
        for batch in self.inputs:
            values = [batch] if isinstance(batch, Tensor) else batch.values()
            tensors.extend(x for x in values if isinstance(x, Tensor) and x.requires_grad)
        self.earlier = {tensor: tensor.grad for tensor in tensors}
        for tensor in tensors:
            tensor.grad = None

    def _add_earlier_gradients(self) -> None:
        for tensor, gradient in self.earlier.items():
            if gradient is not None:
                tensor.grad = gradient if tensor.grad is None else gradient.add_(tensor.grad)

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            yield


class _RandomState:
    """The global random states at one moment. CUDA states live on the host: reading them does not synchronise."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.numpy = np.random.get_state()
        self.python = random.getstate()

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


@contextmanager
def _frozen_batch_norm(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Lets training-mode BatchNorm and InstanceNorm use batch statistics without recording them again."""
    layers = _batch_norms(modules)
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def _batch_norms(modules: Sequence[nn.Module]) -> set[nn.modules.batchnorm._NormBase]:
    """The layers that a forward pass would write statistics into."""
    return {
        layer
        for module in modules
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.training and layer.track_running_stats
    }


def _module_behind(tower: Tower) -> nn.Module | None:
    if isinstance(tower, nn.Module):
        return tower
    if isinstance(tower, functools.partial):
        return _module_behind(tower.func)
    owner = getattr(tower, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _leaves(root: Tensor) -> list[Tensor]:
    """The leaf tensors whose gradients a backward pass from `root` accumulates."""
    leaves: list[Tensor] = []
    if root.grad_fn is None:
        return [root]
    seen, stack = {root.grad_fn}, [root.grad_fn]
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and not node.next_functions:
            leaves.append(variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return leaves


def _chunk_of(value: Any, at: slice, rows: int) -> Any:
    """A chunk of what a dict input holds for its `rows` rows."""
    if isinstance(value, Tensor):
        return value[at].clone()
    return value[at] if isinstance(value, list) and len(value) == rows else value


def _checked_rows(index: int, batch: Input) -> int:
    """Number of rows of a tower's input, after checking that it can be cut into chunks."""
    if isinstance(batch, Tensor):
        tensors = {"input": batch}
    elif isinstance(batch, Mapping):
        tensors = {key: x for key, x in batch.items() if isinstance(x, Tensor)}
    else:
        raise TypeError(f"input {index} must be a tensor or a dict of tensors, got {type(batch).__name__}")
    if not tensors:
        raise ValueError(f"input {index} holds no tensor, so it cannot be cut into chunks")
    for key, x in tensors.items():
        if x.dim() == 0:
            raise ValueError(f"input {index}: {key!r} is a 0-d tensor; dimension 0 must be the rows")
        if x.requires_grad and not x.is_leaf:
            raise ValueError(f"input {index}: {key!r} has a graph behind it that each chunk would run again; detach it")
    rows = {key: x.shape[0] for key, x in tensors.items()}
    if len(set(rows.values())) > 1:
        raise ValueError(f"input {index}: tensors differ in their number of rows: {rows}")
    count = next(iter(rows.values()))
    if count == 0:
        raise ValueError(f"input {index} is empty")
    return count
