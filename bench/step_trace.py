"""What one full-size training step costs, by shapes alone: the step is run on tensors without data, without a GPU.

    python -m bench.step_trace [--size large|base|tiny] [--batch 32] [--seconds 10] [--tags 28] [--compile] [--chunk 0]
        [--checkpoint-activations] [--ranks 8] [--top 25] [--ablation] [--out FOLDER]
    python -m bench.step_trace --system clsp [--size spear-xlarge|spear-base|tiny] [--batch 26] [--seconds 30]
        [--icefall CHECKOUT] ...

It is `fastclap.train.step.Step` of `fastclap-train paraspeechclap-intrinsic` (WavLM-Large, XLM-R base, contrastive and
tag loss, bf16 autocast, AdamW) on fake CUDA tensors (`bench.fake_gpu`), whose operations are counted as they come.
Clips are of equal length, half of the captions are distinct; how many tags there are is a guess.

    operation   a call of torch's or ours that reads or writes data on the GPU; mostly one launch, but a few in the
                operators of ours, and of those that take lists of tensors one for some dozens
    bytes       of all inputs and outputs of an operation, each element once, whatever the caches hold; what a kernel
                keeps for itself while it runs (workspaces, a second pass over its inputs) is not seen
    products    operations that multiply matrices, convolutions and attention among them, a multiply-add counting two;
                attention's backward pass makes five products of its two
    alive       bytes of the tensors that exist, each allocation rounded up to 512; the caching allocator, the CUDA
                context and workspaces come on top
    predicted   every operation takes the longer of its products at 650 TFLOP/s and its bytes at 2.7 TB/s, and none
                waits. That is a PREDICTION from assumed rates; no GPU has been near it.

With `--compile`, which is what `fastclap-train` does on a GPU, the towers' layers are compiled (`bench.fake_compiler`):
an operation is then a kernel that torch's compiler would generate or call. Of the tensors inside a compiled layer only
those are seen to be alive that it gives out or keeps.

With `--chunk` the forward pass counts both passes of the gradient cache, the first backward pass is that of the loss,
when no activations are alive but embeddings, and nothing is said of how gradients leave. With
`--checkpoint-activations` what is computed again counts in the backward pass. Gradients leave a rank in the buckets of
`Gradients`: from the order in which they arrive in this step, and an assumed rate of the link, it follows how many
bytes are left to send when the last one is there.

With `--system clsp` it is the step of `bench.clsp_step`: the second stage of CLSP, two captions a clip, without tags.
Which limits act in it, and which clips skip what, is drawn as in training, from one seed. With `--icefall` it is that
of the published code: numbers that it reads off the device, which has none here, are replaced by what they would be for
clips of equal length (see `bench.icefall.without_numbers`).

`--ablation` traces the forms of `bench.train_step` instead, each with one optimisation more than the one before, with
its batch and loss (no tags).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench import clsp_step, icefall, model_flops, timing, train_step
from bench.fake_compiler import Graph, fake_compiler
from bench.fake_gpu import fake_gpu
from bench.parity import CAPTIONS, synthetic_batch
from bench.reference_step import build_ours
from bench.run import SIZES, Record, Row, Size, dtype_name, significant
from bench.tables import markdown
from fastclap import CLAP
from fastclap.data import Batch
from fastclap.data.dataset import distinct_texts
from fastclap.files import write_atomic
from fastclap.models.tokenizer import Tokenizer, train_tokenizer
from fastclap.models.zipformer.encoder import frames_of
from fastclap.models.zipformer.limits import RARELY
from fastclap.prompts import DEFAULT_TEMPLATE, fill_template
from fastclap.train import step
from fastclap.train.config import TrainConfig
from fastclap.train.distributed import Gradients, World
from fastclap.train.recipes import RECIPES
from fastclap.train.step import Step, StepResult

RECIPE = "paraspeechclap-intrinsic"
TFLOPS, TBYTES = 650.0, 2.7  # a second: assumed
LINK_GBYTES = 200.0  # of gradients that ranks average in a second: assumed, for GPUs of one machine
END = 0.05
LOSSES = ("info_nce", "sigmoid_loss", "tag_loss")  # by which names the step calls them
DISTINCT = 0.5  # share of a batch's captions
MAX_TOKENS = 64
PHASES = ("forward", "loss", "backward", "optimizer")
GRANULE = 512  # bytes, to which torch's allocator rounds up

# Without an alias in their schema, and yet nothing moves
_FREE = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "resize_"}
)
_OVERWRITING = frozenset({"zero_", "fill_", "copy_", "normal_", "uniform_", "random_", "bernoulli_"})
_UNTOUCHED = frozenset({"grads"})  # fused optimizers write to gradients only where a loss was scaled
_PICKING = frozenset({"embedding", "index_select", "index", "gather"})  # read what they give, not all they could


# ---------------------------------------------------------------------------------------------------------------------
# operations and memory


@dataclass
class Cost:
    """Of some operations."""

    operations: int = 0
    bytes: int = 0
    flops: int = 0
    product_bytes: int = 0
    predicted_ms: float = 0.0

    def add(self, num_bytes: int, flops: int) -> None:
        self.operations += 1
        self.bytes += num_bytes
        self.flops += flops
        self.product_bytes += num_bytes if flops else 0
        self.predicted_ms += 1e3 * max(flops / (TFLOPS * 1e12), num_bytes / (TBYTES * 1e12))

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


class Trace(TorchDispatchMode):
    """Counts the operations on a device in its context, and the bytes that are alive on it.

    Args:
        device_type: "cuda" or "cpu"; tensors elsewhere do not count.
        standing: tensors that are there from the start and stay, such as weights. Copies of them in another dtype or
            layout are `casts`.

    Attributes:
        phase: what an operation is counted under; see `during`.
        costs: by phase and name.
        alive, casts, peak: bytes, `standing` left out.
        is_paused: nothing counts.
    """

    def __init__(self, device_type: str, standing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.device_type, self.phase = device_type, PHASES[0]
        self.costs: dict[tuple[str, str], Cost] = {}
        self.alive = self.casts = self.peak = 0
        self._sizes: dict[int, tuple[int, bool]] = {}  # of storages: their bytes, whether they are casts
        self._standing = {tensor.untyped_storage()._cdata for tensor in standing}
        self.is_paused = False

    def run_graph(self, graph: Graph, inputs: list[Any]) -> Any:
        """Counts the kernels of a compiled graph, of whose tensors its results alone are taken to be alive."""
        flops: dict[torch.fx.Node, int] = {}
        of_weights: set[torch.fx.Node] = set()
        trace = self

        class Operations(torch.fx.Interpreter):
            def run_node(self, node: torch.fx.Node) -> Any:
                out = super().run_node(node)
                if isinstance(node.target, torch._ops.OpOverload):
                    args, kwargs = self.fetch_args_kwargs_from_env(node)
                    flops[node] = _flops(node.target, args, kwargs, out)
                sources = node.all_input_nodes
                if all(source in of_weights for source in sources) if sources else trace._is_weight(out):
                    of_weights.add(node)
                return out

        with self.paused():
            made = Operations(graph.module).run(*inputs)
        if not self.is_paused:
            results = next(node for node in graph.module.graph.nodes if node.op == "output").args[0]
            for node, value in zip(results, made, strict=True):
                for tensor in self._tensors(value):
                    self._hold(tensor.untyped_storage(), node in of_weights)
            for kernel in graph.kernels:
                cost = self.costs.setdefault((self.phase, kernel.name), Cost())
                cost.add(kernel.bytes, 0 if kernel.node is None else flops[kernel.node])
        return made

    def _is_weight(self, value: Any) -> bool:
        """Whether it stands, or is made of what does."""
        if not isinstance(value, Tensor):
            return False
        key = value.untyped_storage()._cdata
        return key in self._standing or self._sizes.get(key, (0, False))[1]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Operations inside it do not count."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without it torch.compile leaves everything within a dispatch mode as it is."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.is_paused:
            return out
        read, made = list(self._tensors((args, kwargs))), list(self._tensors(out))
        of_weights = bool(read) and all(self._is_weight(x) for x in read)
        for tensor in made:
            self._hold(tensor.untyped_storage(), of_weights)
        name = func.overloadpacket.__name__
        changed = [x for value in _written_arguments(func, args) for x in self._tensors(value)]
        written = [*made, *(x for x in changed if all(x is not other for other in made))]
        if written and name not in _FREE and not _is_view(func):
            cost = self.costs.setdefault((self.phase, _label(name, args, out)), Cost())
            cost.add(_moved_bytes(name, read, written), _flops(func, args, kwargs, out))
        return out

    def _tensors(self, value: Any) -> Iterator[Tensor]:
        """Those on the device, in nested lists and dicts."""
        if isinstance(value, Tensor):
            if value.device.type == self.device_type:
                yield value
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from self._tensors(item)
        elif isinstance(value, dict):
            yield from self._tensors(list(value.values()))

    def _hold(self, storage: Any, of_weights: bool) -> None:
        key = storage._cdata
        if key in self._sizes or key in self._standing:
            return
        size = -(-storage.nbytes() // GRANULE) * GRANULE
        self._sizes[key] = size, of_weights
        self.alive += size
        self.casts += size if of_weights else 0
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        size, of_weights = self._sizes.pop(key)
        self.alive -= size
        self.casts -= size if of_weights else 0

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Operations inside it count under this phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def within(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call with its operations under this phase."""

        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                return call(*args, **kwargs)

        return wrapped


def _is_view(func: Any) -> bool:
    """Whether an operation gives its input in another form, by its schema, and writes nothing."""
    returns = func._schema.returns
    return bool(returns) and all(x.alias_info is not None and not x.alias_info.is_write for x in returns)


def _written_arguments(func: Any, args: Any) -> Iterator[Any]:
    """The arguments that an operation changes."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name not in _UNTOUCHED:
            yield value


def _label(name: str, args: Any, out: Any) -> str:
    if name == "_to_copy" and args[0].dtype != out.dtype:
        return f"{dtype_name(args[0].dtype)} to {dtype_name(out.dtype)}"
    if name in ("_to_copy", "copy_") and args[0].device.type != out.device.type:
        return "copy between host and device"
    return "copy" if name in ("_to_copy", "clone") else name


def _moved_bytes(name: str, read: Sequence[Tensor], written: Sequence[Tensor]) -> int:
    if name in _OVERWRITING:
        read = read[1:]
    elif name in _PICKING:
        read = [*read[1:], *written]
    return sum(map(_num_bytes, (*read, *written)))


def _num_bytes(x: Tensor) -> int:
    """Of its elements in memory: those that it repeats with stride 0 count once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * x.element_size()


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    name = func.overloadpacket.__name__
    formula = _FLOPS.get(name)
    if formula is not None:
        return formula(*args)
    counted = flop_registry.get(getattr(torch.ops.aten, name.removesuffix("_"), None))  # addmm_ is an addmm
    return 0 if counted is None else int(counted(*args, **kwargs, out_val=out))


def _attention_product(q: Tensor) -> int:
    """Of all positions of q with all others: [T, d] × [d, T] in every head."""
    batch, heads, length, width = q.shape
    return 2 * batch * heads * length**2 * width


def _pairs(x: Tensor, longest: int) -> int:
    """Twice the pairs of rows of equally long clips in every head of x [R, H, d]."""
    return 2 * x.shape[0] * x.shape[1] * longest


def _convolution_backward(up: Tensor, _: Tensor, weight: Tensor, *options: Any) -> int:
    """Of the gradients that are wanted, of input and weight; torch's own formula forgets the groups."""
    return 2 * up.numel() * weight[0].numel() * sum(options[-1][:2])


_FLOPS: dict[str, Callable[..., int]] = {  # the others are torch's
    "convolution_backward": _convolution_backward,
    "gated_toeplitz_attention": lambda q, *_: 2 * _attention_product(q),
    "gated_toeplitz_attention_backward": lambda need, upstream, *_: 5 * _attention_product(upstream),
    "shared_attention_sums": lambda q, k, p, table, starts, longest: _pairs(q, longest) * (q.shape[2] + p.shape[2]),
    "shared_attention": lambda q, k, p, table, v, *others: (
        _pairs(v, others[-1]) * (q.shape[2] + p.shape[2] + v.shape[2])
    ),
    "shared_attention_backward": lambda need, upstream, out, q, k, p, table, v, *others: (
        _pairs(v, others[-1]) * (3 * (q.shape[2] + p.shape[2]) + 2 * v.shape[2])
    ),
    "shared_attention_penalty": lambda need, q, k, p, table, packed, starts, longest, penalty: (
        3 * _pairs(q, longest) * (q.shape[2] + p.shape[2])
    ),
    "info_nce": lambda a, b, *_: 6 * len(a) * len(b) * a.shape[1],  # the logits and both gradients
}


# ---------------------------------------------------------------------------------------------------------------------
# one step


@dataclass
class Traced:
    """What a traced step says.

    Attributes:
        costs: by phase and operation.
        rows: clips of the batch.
        held: bytes alive when the first backward pass begins, above what was there before the step; `casts` of them
            are weights in another dtype or layout.
        peak: the most that was alive, above the same.
        standing: bytes of weights and optimizer state.
        arrivals: parameters in the order in which their gradients were complete, each with the milliseconds that are
            predicted for the operations of the backward passes until then.
        seconds: of the host, for the step on tensors without data.
    """

    costs: dict[tuple[str, str], Cost]
    rows: int
    held: int = 0
    casts: int = 0
    peak: int = 0
    standing: int = 0
    arrivals: dict[nn.Parameter, float] = field(default_factory=dict)
    seconds: float = 0.0

    def phase(self, wanted: str) -> Cost:
        return sum((cost for (phase, _), cost in self.costs.items() if phase == wanted), Cost())

    @property
    def total(self) -> Cost:
        return sum(self.costs.values(), Cost())

    @property
    def held_a_clip(self) -> float:
        return (self.held - self.casts) / self.rows


Parts = Sequence[tuple[Any, str, str]]  # a function's owner, its name, and the phase that it belongs to
OUR_PARTS: Parts = (*((step, name, "loss") for name in LOSSES), (Step, "update", "optimizer"))


def traced(
    call: Callable[[], Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: int,
    *,
    compiled: bool = False,
    parts: Parts = OUR_PARTS,
) -> Traced:
    """Traces a call that takes one step of the model, within `fake_gpu` or `without_data`.

    The optimizer's state is made before, as in every step but the first. If parts of the model are to be compiled, that
    too is done before, by a call that does not count. `parts` are what is neither forward nor backward pass.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not optimizer.state:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    standing = [*model.parameters(), *model.buffers(), *states]
    result = Traced({}, rows, standing=sum(map(_num_bytes, standing)))
    trace = Trace(parameters[0].device.type, standing)

    backward = torch.autograd._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        if not trace.is_paused and not result.held:
            result.held, result.casts = trace.alive, trace.casts
        with trace.during("backward"):
            return backward(*args, **kwargs)

    def arrived(parameter: Any) -> None:
        result.arrivals.pop(parameter, None)  # with several backward passes it is complete after the last
        result.costs = trace.costs
        result.arrivals[parameter] = result.phase("backward").predicted_ms

    with contextlib.ExitStack() as stack:
        for owner, name, phase in parts:
            stack.enter_context(mock.patch.object(owner, name, trace.within(phase, getattr(owner, name))))
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", run_backward))
        for parameter in parameters:
            stack.callback(parameter.register_post_accumulate_grad_hook(arrived).remove)
        if compiled:
            stack.enter_context(fake_compiler(trace.run_graph))
            with trace, trace.paused():
                call()
            result.arrivals.clear()
        start = time.perf_counter()
        with trace:
            call()
        result.seconds = time.perf_counter() - start
    result.costs, result.peak = trace.costs, trace.peak
    return result


def recipe(chunk: int = 0, checkpoint_activations: bool = False, tags: bool = True) -> TrainConfig:
    """That of the traced step; a model of the sizes of `bench.run` takes the place of the pretrained towers."""
    config = RECIPES[RECIPE]()
    config.chunk_size, config.checkpoint_activations = chunk, checkpoint_activations
    if not tags:
        config.loss.tag_weight = 0.0
    return config


def host_batch(rows: int, seconds: float, tags: int, tokenizer: Tokenizer, max_tokens: int) -> Batch:
    """Clips of equal length, half of their captions distinct, and the prompts of as many tags, tokenized."""
    batch = train_step.tokenized(synthetic_batch(rows, seconds, 0, distinct=DISTINCT, least=1.0), tokenizer, max_tokens)
    if not tags:
        return batch
    prompts = [fill_template(DEFAULT_TEMPLATE, f"tag {index}") for index in range(tags)]
    distinct, text_rows, prompt_rows = distinct_texts(batch.captions, prompts)
    text = tokenizer(distinct, max_tokens)
    return replace(
        batch,
        text=text,
        text_rows=text_rows,
        tokens=text["attention_mask"].sum(1).tolist(),
        prompts=prompts,
        prompt_rows=prompt_rows,
        tags=torch.arange(rows)[:, None] % tags == torch.arange(tags),
    )


@dataclass(frozen=True)
class Subject:
    """The model and its step, on a device without data."""

    model: CLAP
    config: TrainConfig
    step: Step

    @classmethod
    def on(
        cls, device: torch.device, size: Size, config: TrainConfig, tokenizer: Tokenizer, compiled: bool = False
    ) -> Subject:
        model = build_ours(size, tokenizer, device=device)
        for tower in (model.audio_branch, model.text_branch):
            tower.prepare_training(compile=compiled, checkpoint=config.checkpoint_activations)
        return cls(model, config, Step(model, config, World(0, 1, device, None)))

    def take(self, batch: Batch) -> Callable[[], StepResult]:
        """A call that copies the batch to the device and takes a step on it."""
        device = self.model.device
        return lambda: self.step([batch.to(device, non_blocking=True)])


# ---------------------------------------------------------------------------------------------------------------------
# gradients of several ranks


@dataclass(frozen=True)
class Sending:
    """How a rank's gradients leave it, in bytes; times are those predicted for the backward pass.

    Attributes:
        buckets, total: all of them.
        first_after: share of the backward pass after which the first bucket leaves.
        waited: in buckets that were complete earlier than they left, as they stood behind another.
        at_the_end: in buckets that leave in the last `END` of the backward pass, or after it.
        left: still to send when the last gradient is there, where all ranks average `LINK_GBYTES` a second.
        missing: of parameters without a gradient, whose bucket and all behind it leave after the backward pass.
    """

    buckets: int
    total: int
    first_after: float
    waited: int
    at_the_end: int
    left: int
    missing: int


def sending(
    build: Callable[[World], Gradients], arrivals: Mapping[nn.Parameter, float], device: torch.device, ranks: int
) -> Sending:
    """What `Gradients` sends, and when.

    Args:
        build: makes the gradients of a rank. Their hooks are then called, and what they send is written down.
        arrivals: parameters in the order in which their gradients are complete, and the time of each in ms.
        device: of the parameters.
        ranks: of the world.
    """
    now = end = max(arrivals.values())
    leaves: list[float] = []  # of the buckets, which are sent in their order

    def send(*_: Any, **__: Any) -> Any:
        leaves.append(now)
        return mock.Mock()

    group: Any = mock.Mock()  # never asked
    with mock.patch.object(dist, "all_reduce", send):
        buckets = build(World(0, ranks, device, group))._buckets
        for parameter, now in arrivals.items():  # noqa: B007 - `send` reads it
            for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
                hook(parameter)
    leaves += [end] * (len(buckets) - len(leaves))
    sizes = [_num_bytes(bucket.flat) for bucket in buckets]
    complete = [max(arrivals.get(p, end) for p in bucket.parameters) for bucket in buckets]
    free = 0.0  # when the link is
    for leave, size in zip(leaves, sizes, strict=True):
        free = max(free, leave) + 1e-6 * size / LINK_GBYTES
    return Sending(
        buckets=len(buckets),
        total=sum(sizes),
        first_after=significant(leaves[0] / end),
        waited=sum(size for size, left, done in zip(sizes, leaves, complete, strict=True) if left > done),
        at_the_end=sum(size for size, left in zip(sizes, leaves, strict=True) if left >= (1 - END) * end),
        left=round(1e6 * LINK_GBYTES * (free - end)),
        missing=sum(_num_bytes(p) for bucket in buckets for p in bucket.parameters if p not in arrivals),
    )


# ---------------------------------------------------------------------------------------------------------------------
# the command


def figures(cost: Cost) -> Row:
    return {
        "operations": cost.operations,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "product_bytes": cost.product_bytes,
        "other_bytes": cost.bytes - cost.product_bytes,
        "predicted_ms": significant(cost.predicted_ms),
    }


def memory(result: Traced) -> Row:
    return {
        "held_bytes": result.held,
        "cast_bytes": result.casts,
        "held_bytes_a_clip": round(result.held_a_clip),
        "peak_bytes": result.peak,
        "standing_bytes": result.standing,
        "host_seconds": significant(result.seconds),
    }


def trace_recipe(arguments: argparse.Namespace, device: torch.device, tokenizer: Tokenizer, record: Record) -> None:
    """The rows of the recipe's step."""
    config = recipe(arguments.chunk, arguments.checkpoint_activations, arguments.tags > 0)
    size = SIZES[arguments.size]
    batch = host_batch(arguments.batch, arguments.seconds, arguments.tags, tokenizer, MAX_TOKENS)
    assert batch.text_rows is not None
    tokens = [batch.tokens[row] for row in batch.text_rows.tolist()]
    own_flops = model_flops.training_step(size.wavlm, size.xlm_roberta, size.dim, batch.samples, tokens)
    with fake_gpu():
        subject = Subject.on(device, size, config, tokenizer, arguments.compile)
        call, optimizer = subject.take(batch), subject.step.optimizer
        result = traced(call, subject.model, optimizer, arguments.batch, compiled=arguments.compile)
        sent = None
        if not arguments.chunk:
            sent = sending(
                lambda world: Step(subject.model, config, world).gradients, result.arrivals, device, arguments.ranks
            )
    add_rows(record, result, own_flops)
    case = {"gradients": "sent", "ranks": arguments.ranks}
    if sent is None:
        record.add(case, reason="with --chunk gradients of one rank arrive in another order than those of several")
    else:
        record.add(case, **asdict(sent))


def add_rows(record: Record, result: Traced, own_flops: int) -> None:
    """Of a traced step: its phases, its memory, its operations."""
    for phase in PHASES:
        record.add({"phase": phase}, **figures(result.phase(phase)))
    record.add({"phase": "all"}, **figures(result.total), model_flops=own_flops)
    record.add({"memory": "step"}, **memory(result))
    for (phase, name), cost in sorted(result.costs.items(), key=lambda item: -item[1].bytes):
        record.add({"phase": phase, "operation": name}, **figures(cost))


def trace_clsp(arguments: argparse.Namespace, device: torch.device, _: Tokenizer, record: Record) -> None:
    """The rows of CLSP's step, or of its published code's, whose whiteners have found their limits held."""
    forms = clsp_step.Forms(clsp_step.SIZES[arguments.size], device, arguments.icefall)
    batch = clsp_step.host_batch(forms.size, forms.tokenizer, arguments.batch, arguments.seconds)
    if arguments.icefall is not None:
        theirs, reads = traced_published(forms, batch)
        add_rows(record, theirs, batch.flops)
        record.add({"host": "reads"}, count=len(reads), places=sorted(set(reads)))
        return
    with fake_gpu():
        again = "on" if arguments.checkpoint_activations else "off"
        ours = forms.our_step(chunk_size=arguments.chunk, checkpoint_activations=again)
        for whitener in ours.model.audio_branch.whiteners:
            whitener.launched = RARELY  # most have found their limit held after some steps
        call = functools.partial(ours, [batch.batch.to(device)])
        add_rows(record, traced(call, ours.model, ours.optimizer, arguments.batch), batch.flops)


def traced_published(forms: clsp_step.Forms, batch: clsp_step.HostBatch) -> tuple[Traced, list[str]]:
    """A step of CLSP's published code, and the places where it reads a number off the device."""
    forms.modules = icefall.load(forms.checkout)  # type: ignore[arg-type, misc]  # instead of compiled functions
    frames = frames_of(batch.features[0].shape[1])
    with fake_gpu(), icefall.without_numbers(forms.modules, frames) as reads:
        step = forms.published_step()
        for module in step.model.modules():
            if hasattr(module, "min_prob"):
                module.prob = module.min_prob
        parts = ((type(step.loss), "forward", "loss"), (type(step.optimizer), "step", "optimizer"))
        call = functools.partial(forms.published_call, step, batch)
        return traced(call, step.model, step.optimizer, batch.clips, parts=parts), reads


def trace_forms(arguments: argparse.Namespace, device: torch.device, tokenizer: Tokenizer, record: Record) -> None:
    """A row for each form of `bench.train_step`."""
    size = SIZES[arguments.size]
    made = synthetic_batch(arguments.batch, arguments.seconds, 0, distinct=DISTINCT, least=1.0)
    batch = train_step.host_batch(made, tokenizer, size, pin=False)
    chunk = arguments.chunk or max(1, arguments.batch // 2)
    plain_rand = torch.rand

    def rand(*args: Any, **kwargs: Any) -> Any:
        """transformers draws a number for each layer and looks at it, also where no layer is dropped."""
        return 1.0 if args == ([],) else plain_rand(*args, **kwargs)

    with fake_gpu(), mock.patch.object(torch, "rand", rand):
        forms = train_step.Forms(size, device, None, tokenizer, chunk)
        for form in forms.all():
            if "compile" in form.name:
                continue
            case = {"form": form.name, "rows": arguments.batch, "seconds": arguments.seconds}
            try:
                call = form.call_for(batch)
                result = traced(call, forms.plain, forms.optimizer, arguments.batch)
            except (DataDependentOutputException, DynamicOutputShapeException):
                record.add(case, notes=form.notes, reason="reads numbers off the device, and there are none here")
                continue
            finally:
                forms.optimizer.zero_grad()
                form.step = None
            phases = {f"{phase}_{name}": x for phase in PHASES for name, x in figures(result.phase(phase)).items()}
            record.add(case, notes=form.notes, **figures(result.total), **phases, **memory(result))


def giga(x: float) -> str:
    return f"{x / 1e9:.3g}" if x < 1e11 else f"{x / 1e9:.0f}"


def tables(record: dict[str, Any], top: int) -> str:
    """The record as Markdown, with so many operations."""
    settings, rows = record["runs"][-1]["settings"], record["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in record["runs"][-1]["software"].items() if version)
    forms = [row for row in rows if "form" in row["case"]]
    subject = "each form of `bench.train_step`" if forms else settings["subject"]
    how = [f"towers of size {settings['size']}", f"{settings['batch']} clips of {settings['seconds']:g} s"]
    how += [f"chunks of {settings['chunk']}"] * bool(settings["chunk"])
    how += ["layers compiled"] * settings["compile"]
    how += ["activations checkpointed"] * settings["checkpoint_activations"]
    parts = [
        f"A step of {subject}, {', '.join(how)}, traced by shapes on tensors without data ({versions}).",
        f"**Predicted ms are no measurement**: each operation at {TFLOPS:g} TFLOP/s or {TBYTES:g} TB/s, whichever "
        "takes longer, with nothing in between.",
    ]
    return "\n\n".join([*parts, *(_form_tables(forms) if forms else _recipe_tables(rows, top))]) + "\n"


HEADER = ("operations", "GB read and written", "TFLOP", "GB of products", "GB of the rest", "predicted ms")


def _cost_cells(row: Row) -> list[str]:
    numbers = (giga(row[name]) for name in ("product_bytes", "other_bytes"))
    flops = f"{row['flops'] / 1e12:.3g}"
    return [f"{row['operations']:,}", giga(row["bytes"]), flops, *numbers, f"{row['predicted_ms']:.3g}"]


def _recipe_tables(rows: Sequence[Row], top: int) -> Iterator[str]:
    phases = [row for row in rows if "phase" in row["case"] and "operation" not in row["case"]]
    yield markdown(("", *HEADER), ([row["case"]["phase"], *_cost_cells(row)] for row in phases))
    own = next(row["model_flops"] for row in phases if "model_flops" in row)
    yield f"The model's own products, each caption counted (`bench.model_flops`): {own / 1e12:.3g} TFLOP."
    held = next(row for row in rows if "memory" in row["case"])
    yield (
        f"Weights and optimizer state {giga(held['standing_bytes'])} GB. Above them {giga(held['held_bytes'])} GB are "
        f"alive when the backward pass begins, {giga(held['cast_bytes'])} GB of it weights in another dtype: "
        f"{held['held_bytes_a_clip'] / 1e6:.0f} MB a clip without those. At most {giga(held['peak_bytes'])} GB. "
        f"The trace took the host {held['host_seconds']:.3g} s."
    )
    for sent in (row for row in rows if "gradients" in row["case"]):
        yield _sending_sentence(sent)
    for reads in (row for row in rows if "host" in row["case"]):
        yield f"It reads {reads['count']} numbers off the device."
    operations = [row for row in rows if "operation" in row["case"]][:top]
    if not operations:
        return
    cells = ([row["case"]["phase"], row["case"]["operation"], *_cost_cells(row)] for row in operations)
    yield f"Operations that move the most bytes:\n\n{markdown(('', 'operation', *HEADER), cells)}"


def _sending_sentence(sent: Row) -> str:
    if "reason" in sent:
        return f"Gradients: {sent['reason']}."
    return (
        f"Gradients of a rank of {sent['case']['ranks']}: {giga(sent['total'])} GB in {sent['buckets']} buckets. By "
        f"the predicted times the first leaves after {sent['first_after']:.1%} of the backward pass; "
        f"{giga(sent['waited'])} GB wait, complete, behind another bucket; {giga(sent['at_the_end'])} GB leave in the "
        f"last {END:.0%}; {giga(sent['left'])} GB are left to send when the last gradient is there, at an assumed "
        f"{LINK_GBYTES:g} GB/s of gradients. Parameters without a gradient: {giga(sent['missing'])} GB."
    )


def _form_tables(rows: Sequence[Row]) -> Iterator[str]:
    header = ("form", "operations", "GB forward", "GB backward", "TFLOP", "MB held a clip", "peak GB", "predicted ms")
    yield markdown(header, map(_form_cells, rows))


def _form_cells(row: Row) -> list[str]:
    name = row["case"]["form"]
    if "reason" in row:
        return [name, row["reason"], *[""] * 6]
    return [
        name,
        f"{row['operations']:,}",
        giga(row["forward_bytes"] + row["loss_bytes"]),
        giga(row["backward_bytes"]),
        f"{row['flops'] / 1e12:.3g}",
        f"{row['held_bytes_a_clip'] / 1e6:.0f}",
        giga(row["peak_bytes"]),
        f"{row['predicted_ms']:.3g}",
    ]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--system", choices=SYSTEMS, default="paraspeechclap", help="whose step")
    found.add_argument("--size", choices=[*SIZES, *clsp_step.SIZES], help="default: large, spear-xlarge")
    found.add_argument("--batch", type=int, help="clips (default: 32; of CLSP as many as have 800 s)")
    found.add_argument("--seconds", type=float, help="length of a clip (default: 10; of CLSP 30)")
    found.add_argument("--tags", type=int, default=28, help="of the tag loss; 0: the contrastive loss alone")
    found.add_argument("--chunk", type=int, default=0, help="clips a chunk of the gradient cache; 0: none")
    found.add_argument("--checkpoint-activations", action="store_true", help="as the flag of fastclap-train")
    found.add_argument("--compile", action="store_true", help="as `fastclap-train` does on a GPU")
    found.add_argument("--ranks", type=int, default=8, help="between which gradients are averaged")
    found.add_argument("--icefall", type=Path, help="checkout of CLSP's published code, whose step it then is")
    found.add_argument("--ablation", action="store_true", help="the forms of bench.train_step instead")
    found.add_argument("--top", type=int, default=25, help="operations in the table")
    found.add_argument("--out", type=Path, help="folder that receives record.json and record.md")
    return found


SYSTEMS = {"paraspeechclap": trace_recipe, "clsp": trace_clsp}


def completed(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments with what is not given.

    Raises:
        SystemExit: some do not go together.
    """
    clsp = arguments.system == "clsp"
    sizes: Iterable[str] = clsp_step.SIZES if clsp else SIZES
    arguments.size = arguments.size or ("spear-xlarge" if clsp else "large")
    if arguments.size not in sizes:
        raise SystemExit(
            f"--size {arguments.size} is none of --system {arguments.system}; choose of {', '.join(sizes)}"
        )
    if arguments.seconds is None:
        arguments.seconds = 30.0 if clsp else 10.0
    if arguments.batch is None:
        arguments.batch = int(clsp_step.SECONDS_A_BATCH / max(0.1, arguments.seconds)) if clsp else 32
    unknown = ("ablation", "compile") if clsp else ("icefall",)
    for name in unknown:
        if getattr(arguments, name):
            raise SystemExit(f"--system {arguments.system} knows no --{name}; leave one of them out")
    return arguments


def subject(arguments: argparse.Namespace) -> str:
    """What the traced step is of."""
    if arguments.system == "clsp":
        return "clsp-stage2" if arguments.icefall is None else "CLSP's code, as published"
    return RECIPE


def measure(arguments: argparse.Namespace) -> str:
    """The tables; the record is in `record.json` of `arguments.out`, if that is given."""
    torch.manual_seed(0)
    random.seed(0)  # by which CLSP's published code draws
    tokenizer, device = train_tokenizer(CAPTIONS, 1000), torch.device("cuda", 0)
    with contextlib.ExitStack() as stack:
        out = arguments.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        record = Record(out / "record.json")
        record.content = {"runs": [], "rows": []}  # not to be continued
        record.begin(
            *("step_trace", "fake CUDA", ""),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            software=train_step.software(None),
            machine=timing.machine(torch.device("cpu")),
            settings={name: value for name, value in vars(arguments).items() if name not in ("out", "top", "icefall")}
            | {"subject": subject(arguments), "assumed_tflops": TFLOPS, "assumed_tbytes": TBYTES},
        )
        trace = trace_forms if arguments.ablation else SYSTEMS[arguments.system]
        trace(arguments, device, tokenizer, record)
        record.update_run(status="done")
        text = tables(record.content, arguments.top)
        write_atomic(out / "record.md", text.encode())
    return text


def main(argv: Sequence[str] | None = None) -> None:
    arguments = completed(parser().parse_args(argv))
    for name, least in (("batch", 2), ("tags", 0), ("chunk", 0), ("ranks", 2), ("top", 0)):
        if getattr(arguments, name) < least:
            raise SystemExit(f"--{name} must be at least {least}, is {getattr(arguments, name)}")
    if not 0.1 <= arguments.seconds <= 60:
        raise SystemExit(f"--seconds must be between 0.1 and 60, is {arguments.seconds:g}")
    for name in ("checkpoint_activations", "compile"):
        if arguments.ablation and getattr(arguments, name):
            raise SystemExit(f"--ablation knows no --{name.replace('_', '-')}; leave one of them out")
    print(measure(arguments))


if __name__ == "__main__":
    main()
