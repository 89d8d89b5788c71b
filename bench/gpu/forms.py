"""Every form of a kernel that the lots launch, at small odd sizes: what it computes, and what that should be.

Lots name their forms by how the names begin (`bench.gpu.lots`); their kernels are compiled before anything is timed
(`bench.gpu.compiling`), and the lot `smoke` runs every form once against float64 (`bench.gpu.smoke`). A form makes the
launcher pick the same kernels as the lot's own call: dtypes, strides and options are those of the call, only the sizes
are small.

Inputs are drawn on the host, so that a form computes with the same numbers everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench import peers, timing
from bench.kernel_peers import FRONT_ENDS, in_dtype
from bench.peers import SCALE
from bench.run import dtype_name
from fastclap.features import PRESETS
from fastclap.kernels.bias_norm import bias_norm, bias_norm_reference, bypass, bypass_reference
from fastclap.kernels.contrastive.shared import QueueRows
from fastclap.kernels.feed_forward import feed_forward, feed_forward_reference
from fastclap.kernels.gated_convolution import gated_convolution, gated_convolution_reference
from fastclap.kernels.layer_norm_gelu import layer_norm_gelu, layer_norm_gelu_reference
from fastclap.kernels.log_mel.operator import log_mel
from fastclap.kernels.log_mel.spec import LogMelSpec
from fastclap.kernels.log_mel.torch_engine import log_mel_reference
from fastclap.kernels.resampling import (
    downsample,
    downsample_reference,
    upsample_bypass,
    upsample_bypass_reference,
)
from fastclap.kernels.residual_layer_norm import dropout_mask as residual_dropout_mask
from fastclap.kernels.residual_layer_norm import residual_layer_norm, residual_layer_norm_reference
from fastclap.kernels.scaled_adam import Change, sums, update_
from fastclap.kernels.shared_attention import shared_attention
from fastclap.kernels.swoosh import swoosh_linear, swoosh_linear_reference
from fastclap.kernels.toeplitz_attention import (
    dropout_mask,
    gated_toeplitz_attention,
    gated_toeplitz_attention_reference,
)
from fastclap.kernels.waveform import normalize_waveform, normalize_waveform_reference
from fastclap.kernels.waveform_convolution import waveform_convolution, waveform_convolution_reference
from fastclap.losses import info_nce, sigmoid_loss

Tensors = dict[str, Tensor]

# Relative error that is always accepted: the rounding of a result in that dtype, a few times over.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
LOSS_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-3}  # of a loss and its gradients
TF32_ROUNDING = 4e-3  # 10 bits, and the kernels cut the others off
DROPOUT = 0.1  # WavLM's
DROPOUT_SEED = 17
ROWS, DIM = 201, 72  # of embeddings: two tiles by two, and a dimension that is padded
SHORTEST = 400  # samples that one frame of WavLM takes


@dataclass(frozen=True)
class KernelForm:
    """One form of one kernel.

    Attributes:
        name: differs from that of every other form; lots choose by how it begins.
        dtype: to which its products are rounded.
        draw: makes the inputs, on the host.
        call: of inputs and a `backend`, the output and every gradient by name.
        reference: of inputs, the same in float64, from the definition.
        rounding: relative error that is always accepted.
        precision: torch's float32 matmul precision while it runs.
        instead: of inputs, what it is compared with where the torch engine computes something else; None elsewhere.
    """

    name: str
    dtype: torch.dtype
    draw: Callable[[], Tensors]
    call: Callable[[Tensors, str], Tensors]
    reference: Callable[[Tensors], Tensors]
    rounding: float
    precision: str = "highest"
    instead: Callable[[Tensors], Tensors] | None = None

    def inputs(self, device: torch.device) -> Tensors:
        return {name: x.to(device) for name, x in self.draw().items()}

    def ours(self, inputs: Tensors, engine: str = "triton") -> Tensors:
        """What the kernel computes, or the engine that "auto" takes on a CPU."""
        if engine != "triton" and self.instead is not None:
            return self.plain(inputs)
        with _precision(self.precision):
            return self.call(inputs, engine)

    def plain(self, inputs: Tensors) -> Tensors:
        """What plain torch computes in the same dtypes: the yardstick of the kernel's error."""
        with _precision(self.precision):
            return self.call(inputs, "torch") if self.instead is None else self.instead(inputs)


def chosen(prefixes: Sequence[str]) -> list[KernelForm]:
    """The forms whose names begin with any of these.

    Raises:
        ValueError: no name begins with one of them.
    """
    for prefix in prefixes:
        if not any(form.name.startswith(prefix) for form in FORMS):
            raise ValueError(f"no kernel form begins with {prefix!r}")
    return [form for form in FORMS if form.name.startswith(tuple(prefixes))]


@contextlib.contextmanager
def _precision(wanted: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _normal(seed: int) -> Callable[..., Tensor]:
    """A function that draws from the standard normal distribution, the same numbers each time."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def _output_and_gradients(
    function: Callable[..., Tensor], leaves: Mapping[str, Tensor], upstream: Tensor | None = None
) -> Tensors:
    """The output, and the gradient of every leaf."""
    tensors = [x.detach().requires_grad_() for x in leaves.values()]
    found = timing.output_and_gradients(function, tensors, upstream)
    return dict(zip(("output", *(f"d{name}" for name in leaves)), found, strict=True))


def _doubled(inputs: Mapping[str, Tensor]) -> Tensors:
    """Floating tensors in float64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def _without(inputs: Mapping[str, Tensor], *names: str) -> Tensors:
    return {name: x for name, x in inputs.items() if name not in names}


# ---------------------------------------------------------------------------------------------------------------------
# losses


def _draw_embeddings(dtype: torch.dtype, also: Sequence[str]) -> Tensors:
    """`also`: "ids", of captions of two clips and more; "class ids", of a few classes; "teacher"; "queue"."""
    normal = _normal(1)
    a = normal(ROWS, DIM)
    found = {"a": a.to(dtype), "b": (0.5 * a + normal(ROWS, DIM)).to(dtype), "scale": torch.tensor(SCALE)}
    if "ids" in also:
        found["ids"] = torch.arange(ROWS) // 2 % 70
    if "class ids" in also:
        found["ids"] = torch.arange(ROWS) % 5
    if "teacher" in also:
        found["teacher a"] = a[:, :56].to(dtype)
        found["teacher b"] = (a + normal(ROWS, DIM))[:, :56].to(dtype)
    if "queue" in also:
        found |= {f"queue {side}": normal(rows, DIM).to(dtype) for side, rows in (("a", 150), ("b", 301))}
    return found


def _loss(inputs: Tensors, engine: str, sigmoid: bool = False, forward: bool = False, **options: Any) -> Tensors:
    """`options` of `info_nce`; top-1 is among the results where they ask for it."""
    shares = options.pop("return_top1", False)
    given: dict[str, Any] = {**options, "backend": engine}
    if "ids" in inputs:
        given |= {"a_ids": inputs["ids"], "b_ids": inputs["ids"]}
    if "teacher a" in inputs:
        given["teacher"] = inputs["teacher a"], inputs["teacher b"], SCALE
    if "queue a" in inputs:
        entries = [inputs["queue a"], inputs["queue b"]]
        # Of the batch's own ids and of others: some are left out.
        ids = [torch.arange(len(x), device=x.device) % 90 for x in entries] if "ids" in inputs else [None, None]
        given["queue"] = QueueRows(*entries, *ids)
    found: Tensors = {}

    def value(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        if sigmoid:
            ids = {name: given[name] for name in ("a_ids", "b_ids") if name in given}
            return sigmoid_loss(a, b, scale, peers.SIGMOID_BIAS, backend=engine, **ids)
        if not shares:
            return info_nce(a, b, scale, **given)
        if engine == "reference":
            found["top1"] = _top1(a.detach(), b.detach(), inputs.get("ids"))
            return info_nce(a, b, scale, **given)
        loss, found["top1"] = info_nce(a, b, scale, **given, return_top1=True)
        return loss

    leaves = {name: inputs[name] for name in ("a", "b", "scale")}
    if forward:
        with torch.no_grad():
            return {"output": value(*leaves.values()), **found}
    return {**_output_and_gradients(value, leaves), **found}


def _top1(a: Tensor, b: Tensor, ids: Tensor | None) -> Tensor:
    """By its definition, of rows and of columns."""
    cosines = torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).t()
    ids = torch.arange(len(a), device=a.device) if ids is None else ids
    return torch.stack([(ids == ids[cosines.argmax(dim)]).double().mean() for dim in (1, 0)])


def _loss_form(
    name: str,
    dtype: torch.dtype,
    *also: str,
    sigmoid: bool = False,
    forward: bool = False,
    tf32: bool = False,
    **options: Any,
) -> KernelForm:
    """`also`: as `_draw_embeddings`; `options`: of `info_nce`."""
    settings: dict[str, Any] = {"sigmoid": sigmoid, "forward": forward, **options}
    ways = {True: ", kept", False: ", formed twice", None: ""}
    on = f"{ways[options.get('keep_exponentials')]}{', forward' * forward}{', TF32' * tf32}"
    return KernelForm(
        f"{name} {dtype_name(dtype)}{on}",
        dtype,
        functools.partial(_draw_embeddings, dtype, also),
        functools.partial(_loss, **settings),
        lambda inputs: _loss(_doubled(inputs), "reference", **settings),
        TF32_ROUNDING if tf32 else LOSS_ROUNDING[dtype],
        "high" if tf32 else "highest",
    )


def _losses() -> Iterator[KernelForm]:
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, keep in product((bf16, fp32), (True, False)):
        yield _loss_form("loss plain", dtype, keep_exponentials=keep)
    yield _loss_form("loss plain", bf16, forward=True)
    # Heads that end in a LayerNorm give float32 embeddings under autocast, others bfloat16; the step allows TF32.
    for dtype, tf32 in ((bf16, False), (fp32, False), (fp32, True)):
        yield _loss_form("loss ids", dtype, "ids", tf32=tf32)
    yield _loss_form("loss of classes", bf16, "class ids")
    yield _loss_form("loss one direction", bf16, direction="a_to_b")
    for dtype, tf32 in ((bf16, False), (fp32, True)):
        yield _loss_form("loss teacher", dtype, "ids", "teacher", tf32=tf32, teacher_weight=0.5)
        yield _loss_form("loss guide of ids", dtype, "ids", "teacher", tf32=tf32, guide_margin=0.05)
        yield _loss_form("loss queue of ids", dtype, "ids", "queue", tf32=tf32)
        yield _loss_form("loss matryoshka", dtype, tf32=tf32, matryoshka=(DIM, DIM // 3, 16))
    yield _loss_form("loss guide", bf16, "teacher", guide_margin=0.05)
    yield _loss_form("loss debias", bf16, debias=0.01)
    yield _loss_form("loss queue", bf16, "queue")
    yield _loss_form("loss top-1", bf16, return_top1=True)
    yield _loss_form("loss top-1 of ids", bf16, "ids", return_top1=True)
    for also in ((), ("ids",)):
        yield _loss_form(f"sigmoid{' of ids' * bool(also)}", bf16, *also, sigmoid=True)


# ---------------------------------------------------------------------------------------------------------------------
# attention


def _draw_attention(dtype: torch.dtype, frames: int, lengths: bool) -> Tensors:
    """As `fastclap.models.wavlm` passes them: views of [B, T, H, d], a float32 table, the gates a view of [B, T, H]."""
    normal, heads = _normal(frames), 3
    found = {name: normal(2, frames, heads, 64).to(dtype).transpose(1, 2) for name in "qkv"}
    found |= {"table": normal(heads, 2 * frames - 1), "gate": (1 + normal(2, frames, heads)).transpose(1, 2)}
    found["upstream"] = normal(2, frames, heads, 64).transpose(1, 2)
    return {**found, "lengths": torch.tensor([frames, frames // 3])} if lengths else found


def _seed(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Torch's generators begin anew in this context, so that the dropout's seed is a known one."""
    context = torch.random.fork_rng([device] if device.type == "cuda" else [])

    @contextlib.contextmanager
    def seeded() -> Iterator[None]:
        with context:
            torch.manual_seed(DROPOUT_SEED)
            yield

    return seeded()


def _drawn_seed(device: torch.device) -> Tensor:
    """The one that a kernel's dropout draws first in the context of `_seed`."""
    with _seed(device):
        return torch.randint(0, 2**63 - 1, (1,), device=device)


def _kept(q: Tensor) -> Tensor:
    """The probabilities that the kernel's dropout keeps in `_attention`."""
    batch, heads, frames, _ = q.shape
    return dropout_mask(_drawn_seed(q.device), batch, heads, frames, DROPOUT)


def _attention(inputs: Tensors, engine: str, dropout: bool, forward: bool) -> Tensors:
    lengths, leaves = inputs.get("lengths"), _without(inputs, "lengths", "upstream")
    rate = DROPOUT if dropout else 0.0
    function = functools.partial(gated_toeplitz_attention, lengths=lengths, dropout=rate, backend=engine)
    with _seed(inputs["q"].device):
        if forward:
            with torch.no_grad():
                return {"output": function(*leaves.values())}
        return _output_and_gradients(function, leaves, inputs["upstream"])


def _defined_attention(inputs: Tensors, dropout: bool, forward: bool) -> Tensors:
    """The definition in the inputs' own dtypes, with the kernel's dropout."""
    rate = round(DROPOUT * 2**16) / 2**16 if dropout else 0.0  # as the kernel rounds it
    function = functools.partial(
        gated_toeplitz_attention_reference,
        lengths=inputs.get("lengths"),
        dropout=rate,
        keep=_kept(inputs["q"]) if dropout else None,
    )
    found = _output_and_gradients(function, _without(inputs, "lengths", "upstream"), inputs["upstream"])
    return {"output": found["output"]} if forward else found


def _attention_form(
    name: str,
    dtype: torch.dtype,
    frames: int,
    *,
    lengths: bool = False,
    dropout: bool = False,
    forward: bool = False,
    tf32: bool = False,
) -> KernelForm:
    options: dict[str, Any] = {"dropout": dropout, "forward": forward}
    defined: Callable[[Tensors], Tensors] = functools.partial(_defined_attention, **options)
    on = f"{', lengths' * lengths}{', dropout' * dropout}{', forward' * forward}{', TF32' * tf32}"
    return KernelForm(
        f"{name} {dtype_name(dtype)}, {frames} frames{on}",
        dtype,
        functools.partial(_draw_attention, dtype, frames, lengths),
        functools.partial(_attention, **options),
        lambda inputs: defined(_doubled(inputs)),
        TF32_ROUNDING if tf32 else 2.5 * ROUNDING[dtype],
        "high" if tf32 else "highest",
        instead=defined if dropout else None,  # the torch engine's dropout is another
    )


def _attentions() -> Iterator[KernelForm]:
    bf16, fp32, both = torch.bfloat16, torch.float32, (False, True)
    for dtype, frames, lengths, dropout in product((bf16, fp32), (37, 101), both, both):
        yield _attention_form("attention", dtype, frames, lengths=lengths, dropout=dropout)
    for dtype in (bf16, fp32):
        yield _attention_form("attention", dtype, 101, forward=True)
    # Training under autocast; embedding in either precision. Batches always come with lengths.
    yield _attention_form("attention step", bf16, 299, lengths=True, dropout=True)
    for dtype, tf32 in ((bf16, False), (fp32, False), (fp32, True)):
        yield _attention_form("attention step", dtype, 299, lengths=True, forward=True, tf32=tf32)


# ---------------------------------------------------------------------------------------------------------------------
# attention weights with several users

SHARING_CLIPS = (37, 101, 64)  # rows of each
SHARING_SIZES = (8 * 32, 8 * 32, 8 * 4)  # CLSP's: queries, keys and positions of eight heads


def _draw_shared_attention(dtype: torch.dtype) -> Tensors:
    normal, rows = _normal(sum(SHARING_CLIPS)), sum(SHARING_CLIPS)
    scales = torch.tensor([32**-0.25, 32**-0.25, 1.0]).repeat_interleave(torch.tensor(SHARING_SIZES))
    found = {"projected": normal(rows, sum(SHARING_SIZES)) * scales, "table": normal(8, 4, 2 * max(SHARING_CLIPS) - 1)}
    for name, shape in (("wide", (1, 960)), ("first", (8, 12)), ("second", (8, 12))):
        found |= {name: normal(rows, *shape), f"upstream_{name}": normal(rows, *shape)}
    return {name: x.to(dtype) for name, x in found.items()}


def _shared_attention(inputs: Tensors, engine: str, penalty: float) -> Tensors:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if not name.startswith("upstream")}
    q, k, p = (x.unflatten(1, (8, -1)) for x in leaves["projected"].split(SHARING_SIZES, 1))
    starts = torch.tensor([0, *itertools.accumulate(SHARING_CLIPS)], dtype=torch.int32, device=q.device)
    weights = shared_attention(q, k, p, leaves["table"], starts, SHARING_CLIPS, penalty=penalty, backend=engine)
    outputs = {name: weights.attend(leaves[name]) for name in ("wide", "first", "second")}
    upstreams = [inputs[f"upstream_{name}"] for name in outputs]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstreams)
    found = {name: out.detach() for name, out in outputs.items()}
    return found | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def _shared_attentions() -> Iterator[KernelForm]:
    for dtype, penalty in product((torch.bfloat16, torch.float32), (0.0, 1e-4)):
        call: Callable[..., Tensors] = functools.partial(_shared_attention, penalty=penalty)
        yield KernelForm(
            f"shared attention {dtype_name(dtype)}{', penalty' * (penalty > 0)}",
            dtype,
            functools.partial(_draw_shared_attention, dtype),
            call,
            lambda inputs, call=call: call(_doubled(inputs), "reference"),  # type: ignore[misc]
            2.5 * ROUNDING[dtype],
        )


# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm + GELU


def _draw_rows(rows: int, channels: int, dtype: torch.dtype, parameters: torch.dtype) -> Tensors:
    normal = _normal(rows)
    found = {"x": normal(rows, channels).to(dtype), "weight": normal(channels).to(parameters)}
    return {**found, "bias": normal(channels).to(parameters), "upstream": normal(rows, channels).to(dtype)}


def _layer_norm_gelu(inputs: Tensors, engine: str) -> Tensors:
    function = functools.partial(layer_norm_gelu, backend=engine)
    return _output_and_gradients(function, _without(inputs, "upstream"), inputs["upstream"])


def _layer_norm_gelu_form(
    name: str, rows: int, channels: int, dtype: torch.dtype, parameters: torch.dtype
) -> KernelForm:
    def reference(inputs: Tensors) -> Tensors:
        exact = _doubled(inputs)
        return _output_and_gradients(layer_norm_gelu_reference, _without(exact, "upstream"), exact["upstream"])

    mixed = f", {dtype_name(parameters)} weights" * (parameters != dtype)
    return KernelForm(
        f"{name} {dtype_name(dtype)}, {rows} of {channels}{mixed}",
        dtype,
        functools.partial(_draw_rows, rows, channels, dtype, parameters),
        _layer_norm_gelu,
        reference,
        ROUNDING[dtype],
    )


def _layer_norm_gelus() -> Iterator[KernelForm]:
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, rows in product((bf16, fp32), (1, 301)):
        yield _layer_norm_gelu_form("layer norm gelu", rows, 512, dtype, dtype)
    for dtype in (bf16, fp32):
        yield _layer_norm_gelu_form("layer norm gelu", 65, 500, dtype, fp32)
        # Activations of autocast, or of embedding without it, with a model's float32 parameters.
        yield _layer_norm_gelu_form("layer norm gelu step", 1003, 512, dtype, fp32)


# ---------------------------------------------------------------------------------------------------------------------
# feed-forward


def _draw_feed_forward(rows: int, hidden: int, dtype: torch.dtype) -> Tensors:
    normal, channels = _normal(rows), 72
    found = {"x": normal(rows, channels), "weight_in": normal(hidden, channels) * channels**-0.5}
    found |= {"bias_in": normal(hidden), "weight_out": normal(channels, hidden) * hidden**-0.5}
    return {name: x.to(dtype) for name, x in (*found.items(), ("upstream", normal(rows, channels)))}


def _feed_forward_form(name: str, rows: int, hidden: int, dtype: torch.dtype) -> KernelForm:
    def call(inputs: Tensors, engine: str) -> Tensors:
        function = functools.partial(feed_forward, backend=engine)
        return _output_and_gradients(function, _without(inputs, "upstream"), inputs["upstream"])

    def reference(inputs: Tensors) -> Tensors:
        exact = _doubled(inputs)
        return _output_and_gradients(feed_forward_reference, _without(exact, "upstream"), exact["upstream"])

    draw = functools.partial(_draw_feed_forward, rows, hidden, dtype)
    return KernelForm(f"{name} {dtype_name(dtype)}, {rows} of {hidden}", dtype, draw, call, reference, ROUNDING[dtype])


def _feed_forwards() -> Iterator[KernelForm]:
    for dtype in (torch.bfloat16, torch.float32):
        yield _feed_forward_form("feed forward", 65, 500, dtype)
        yield _feed_forward_form("feed forward step", 1003, 528, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# the Zipformer's kernels on packed rows

LENGTHS = (70, 1, 130)  # of clips


def _packed_form(
    name: str,
    dtype: torch.dtype,
    found: Tensors,
    constants: Sequence[str],
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
) -> KernelForm:
    """Of a function that takes the inputs by name, of which `constants` have no gradient."""

    def results(inputs: Tensors, function: Callable[..., Tensor]) -> Tensors:
        fixed = {name: inputs[name] for name in constants}
        leaves = _without(inputs, "upstream", *constants)
        return _output_and_gradients(
            lambda *t: function(**dict(zip(leaves, t, strict=True)), **fixed), leaves, inputs["upstream"]
        )

    return KernelForm(
        f"{name}, {sum(LENGTHS)} rows",
        dtype,
        lambda: dict(found),
        lambda inputs, engine: results(inputs, functools.partial(function, backend=engine)),
        lambda inputs: results(_doubled(inputs), reference),
        ROUNDING[dtype],
    )


def _zipformers() -> Iterator[KernelForm]:
    """With a stream in float32, branches and products in bf16 or float32."""
    rows, normal = sum(LENGTHS), _normal(7)
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    starts = torch.cat((torch.zeros(1, dtype=torch.long), torch.tensor(LENGTHS).cumsum(0))).int()
    for dtype in (torch.bfloat16, torch.float32):
        for hidden, kind in ((500, "r"), (528, "l")):
            found = {"x": 3 * normal(rows, hidden), "weight": normal(72, hidden) * hidden**-0.5, "bias": normal(72)}
            found = {name: x.to(dtype) for name, x in (*found.items(), ("upstream", normal(rows, 72)))}
            found |= {"mask": (normal(len(LENGTHS), hidden) > -1) / 0.84, "sequence": sequence}
            ways = (functools.partial(way, kind=kind) for way in (swoosh_linear, swoosh_linear_reference))
            name = f"swoosh {kind} {dtype_name(dtype)} of {hidden}"
            yield _packed_form(name, dtype, found, ("mask", "sequence"), *ways)
        stream = {name: normal(rows, 1280) for name in ("x", "original", "upstream")}
        stream["branch"] = normal(rows, 1280).to(dtype)
        norm = {"bias": normal(1280) / 2, "log_scale": torch.tensor(0.3)}
        scales = {"": {"scale": normal(1280)}, " of clips": {"scale": normal(3, 1280), "sequence": sequence}}
        for name, scale in scales.items() if dtype == torch.bfloat16 else [("", scales[""])]:
            fixed = ("sequence",) if "sequence" in scale else ()
            label = f"{name} float32, {dtype_name(dtype)}"
            found = {**stream, **norm, **scale}
            yield _packed_form(f"bias norm{label}", dtype, found, fixed, bias_norm, bias_norm_reference)
            yield _packed_form(f"bypass{label}", dtype, {**stream, **scale}, fixed, bypass, bypass_reference)
        for taps in (15, 31) if dtype == torch.bfloat16 else (31,):
            found = {"u": normal(rows, 2560).to(dtype), "weight": normal(1280, 1, taps), "bias": normal(1280)}
            found |= {"starts": starts, "upstream": normal(rows, 1280).to(dtype)}
            ways = gated_convolution, gated_convolution_reference
            yield _packed_form(f"gated convolution of {taps} {dtype_name(dtype)}", dtype, found, ("starts",), *ways)
    size = 4
    begins = [torch.arange(start, start + length, size) for start, length in zip(starts, LENGTHS, strict=False)]
    first = torch.cat((*begins, starts[-1:])).int()
    found = {
        "x": normal(rows, 1280),
        "weights": normal(size),
        "first": first,
        "upstream": normal(len(first) - 1, 1280),
    }
    yield _packed_form(f"downsample {size}", torch.float32, found, ("first",), downsample, downsample_reference)
    found = {"original": normal(rows, 1280), "x": normal(len(first) - 1, 1280), "scale": normal(1280)}
    found |= {"first": first, "upstream": normal(rows, 1280)}
    ways = upsample_bypass, upsample_bypass_reference
    yield _packed_form(f"upsample {size}", torch.float32, found, ("first",), *ways)


# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm of a residual stream

RESIDUAL = ("x", "branch", "branch_bias", "weight", "bias")


def _draw_residual(
    rows: int,
    channels: int,
    stream: torch.dtype,
    branch: torch.dtype | None,
    norm: torch.dtype,
    parameters: torch.dtype,
    total: bool,
) -> Tensors:
    """`total`: with a gradient of that too."""
    normal = _normal(rows)
    found = {"x": normal(rows, channels).to(stream)}
    found |= {name: normal(channels).to(parameters) for name in ("weight", "bias")}
    if branch is not None:
        found |= {"branch": normal(rows, channels).to(branch), "branch_bias": normal(channels).to(parameters)}
    if total:
        found["upstream_total"] = normal(rows, channels).to(stream)
    return {**found, "upstream": normal(rows, channels).to(norm)}


def _residual_results(function: Callable[..., tuple[Tensor, Tensor]], inputs: Tensors) -> Tensors:
    leaves = {name: inputs[name].detach().requires_grad_() for name in RESIDUAL if name in inputs}
    total, norm = function(*(leaves.get(name) for name in RESIDUAL))
    outputs = {"upstream": norm, "upstream_total": total}
    upstream = {name: inputs[name].to(outputs[name].dtype) for name in outputs if name in inputs}
    gradients = torch.autograd.grad(
        [outputs[name] for name in upstream], list(leaves.values()), list(upstream.values())
    )
    found = dict(zip((f"d{name}" for name in leaves), gradients, strict=True))
    return {"total": total.detach(), "norm": norm.detach(), **found}


def _residual_layer_norm(inputs: Tensors, engine: str, dtype: torch.dtype, dropout: float) -> Tensors:
    function = functools.partial(residual_layer_norm, dropout=dropout, dtype=dtype, backend=engine)
    with _seed(inputs["x"].device):
        return _residual_results(function, inputs)


def _defined_residual(inputs: Tensors, dropout: float) -> Tensors:
    """The definition in the inputs' own dtypes, with the kernel's dropout."""
    keep = None
    if dropout:
        keep = residual_dropout_mask(_drawn_seed(inputs["x"].device), *inputs["x"].shape, dropout)
    rate = round(dropout * 2**16) / 2**16  # as the kernel rounds it
    return _residual_results(functools.partial(residual_layer_norm_reference, dropout=rate, keep=keep), inputs)


def _residual_form(
    stream: torch.dtype,
    branch: torch.dtype | None,
    norm: torch.dtype,
    *,
    total: bool,
    dropout: float,
    parameters: torch.dtype = torch.float32,
    name: str = "residual layer norm step",
) -> KernelForm:
    rows, channels = 301, 1024
    defined: Callable[[Tensors], Tensors] = functools.partial(_defined_residual, dropout=dropout)
    kinds = ", ".join("no branch" if kind is None else dtype_name(kind) for kind in (stream, branch, norm))
    on = f"{', gradient of total' * total}{', dropout' * (dropout > 0)}"
    coarsest = max((kind for kind in (stream, branch, norm) if kind is not None), key=lambda kind: ROUNDING[kind])
    return KernelForm(
        f"{name} {kinds}, {rows} of {channels}{on}",
        coarsest,
        functools.partial(_draw_residual, rows, channels, stream, branch, norm, parameters, total),
        functools.partial(_residual_layer_norm, dtype=norm, dropout=dropout),
        lambda inputs: defined(_doubled(inputs)),
        ROUNDING[coarsest],
        instead=defined if dropout else None,  # the torch engine's dropout is another
    )


def _residual_layer_norms() -> Iterator[KernelForm]:
    """Before a model's first layer, in and between layers, and after the last, whose norm is the result."""
    low, wide = torch.bfloat16, torch.float32
    for dtype in (low, wide):
        yield _residual_form(dtype, None, dtype, total=False, dropout=0.0)
    for dropout in (0.0, DROPOUT):
        for dtype in (low, wide):
            yield _residual_form(dtype, dtype, dtype, total=True, dropout=dropout)
            yield _residual_form(dtype, dtype, wide, total=False, dropout=dropout)
        yield _residual_form(wide, low, wide, total=False, dropout=dropout)  # norms after the addition, under autocast
    alone: dict[str, Any] = {"total": False, "dropout": 0.0, "name": "residual layer norm"}
    yield _residual_form(low, low, low, parameters=low, **alone)
    yield _residual_form(wide, wide, wide, **alone)


# ---------------------------------------------------------------------------------------------------------------------
# waveforms


def _draw_waveform(audio: torch.dtype, given: bool, lengths: bool, offsets: bool) -> Tensors:
    found = {"audio": timing.noise(3, 5003, audio, seed=2)}
    if lengths:
        found["lengths"] = torch.tensor([4803, 17, 2501])  # the second is extended
    if given:
        found |= {"mean": torch.tensor([0.01, -0.02, 0.0]), "std": torch.tensor([0.1, 0.2, 0.05])}
    return {**found, "offsets": torch.tensor([200, 0, 7])} if offsets else found


def _waveform(inputs: Tensors, engine: str, dtype: torch.dtype) -> Tensors:
    given: dict[str, Any] = {**inputs, "min_samples": SHORTEST}
    return {"output": normalize_waveform(**given, dtype=dtype, backend=engine)}


def _defined_waveform(inputs: Tensors) -> Tensors:
    given: dict[str, Any] = {**{name: x.cpu() for name, x in inputs.items()}, "min_samples": SHORTEST}
    return {"output": normalize_waveform_reference(**given)}


def _waveform_form(
    name: str, audio: torch.dtype, dtype: torch.dtype, *, given: bool, lengths: bool = True, offsets: bool = False
) -> KernelForm:
    on = f"{', lengths' * lengths}{', offsets' * offsets}"
    return KernelForm(
        f"{name} {dtype_name(audio)} to {dtype_name(dtype)}, {'given' if given else 'measured'} statistics{on}",
        dtype,
        functools.partial(_draw_waveform, audio, given, lengths, offsets),
        functools.partial(_waveform, dtype=dtype),
        _defined_waveform,
        ROUNDING[dtype],
    )


def _waveforms() -> Iterator[KernelForm]:
    int16, bf16, fp32 = torch.int16, torch.bfloat16, torch.float32
    for audio, dtype, given in product((int16, fp32), (fp32, bf16), (True, False)):
        yield _waveform_form("waveform", audio, dtype, given=given)
    for given in (True, False):
        yield _waveform_form("waveform", int16, bf16, given=given, lengths=False)
        yield _waveform_form("waveform", int16, bf16, given=given, offsets=True)
    # Training has the statistics of whole files; embedding measures clips, which may be float32.
    yield _waveform_form("waveform step", int16, fp32, given=True)
    for audio in (int16, fp32):
        yield _waveform_form("waveform step", audio, fp32, given=False)


# ---------------------------------------------------------------------------------------------------------------------
# the waveform's convolution


CONVOLUTION = {"stride": 5, "rows": 160}  # of two clips, some rows past their ends


def _draw_convolution(dtype: torch.dtype, parameters: torch.dtype, channels: int, bias: bool) -> Tensors:
    normal = _normal(channels)
    found = {"waveform": normal(2, 777).to(dtype), "weight": normal(channels, 1, 10).to(parameters)}
    found |= {"bias": normal(channels).to(parameters)} if bias else {}
    found |= {"norm_weight": normal(channels).to(parameters), "norm_bias": normal(channels).to(parameters)}
    return {**found, "upstream": normal(2, CONVOLUTION["rows"], channels)}


def _convolution(function: Callable[..., Tensor], inputs: Tensors) -> Tensors:
    leaves = _without(inputs, "waveform", "upstream")

    def call(*tensors: Tensor) -> Tensor:
        given: dict[str, Any] = {"bias": None, **dict(zip(leaves, tensors, strict=True)), **CONVOLUTION}
        return function(inputs["waveform"], **given)

    return _output_and_gradients(call, leaves, inputs["upstream"])


def _convolution_form(
    name: str,
    dtype: torch.dtype,
    *,
    channels: int = 512,
    bias: bool = False,
    autocast: bool = False,
    tf32: bool = False,
) -> KernelForm:
    """Under autocast to `dtype` samples and parameters are float32, as in training."""

    def call(inputs: Tensors, engine: str) -> Tensors:
        with torch.autocast(inputs["waveform"].device.type, dtype=dtype, enabled=autocast):
            return _convolution(functools.partial(waveform_convolution, backend=engine), inputs)

    held = torch.float32 if autocast else dtype
    on = f"{', bias' * bias}{', autocast' * autocast}{', TF32' * tf32}"
    return KernelForm(
        f"{name} {dtype_name(dtype)}, {channels} channels{on}",
        dtype,
        functools.partial(_draw_convolution, held, held, channels, bias),
        call,
        lambda inputs: _convolution(waveform_convolution_reference, _doubled(inputs)),
        TF32_ROUNDING if tf32 else 2 * ROUNDING[dtype],
        "high" if tf32 else "highest",
    )


def _convolutions() -> Iterator[KernelForm]:
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, bias in product((bf16, fp32), (False, True)):
        yield _convolution_form("waveform convolution", dtype, bias=bias)
        yield _convolution_form("waveform convolution", dtype, channels=500, bias=bias)
    # Training and embedding in bfloat16 are autocast's; embedding without it may allow TF32.
    yield _convolution_form("waveform convolution step", bf16, autocast=True)
    for tf32 in (False, True):
        yield _convolution_form("waveform convolution step", fp32, tf32=tf32)


# ---------------------------------------------------------------------------------------------------------------------
# log-mel


def _draw_clips(spec: LogMelSpec, audio: torch.dtype, lengths: bool, gradient: bool = False) -> Tensors:
    """Half a second: two tiles of frames. With lengths, one clip is too short for the reflection at its end."""
    samples = spec.sampling_rate // (4 if gradient else 2) + 1
    found = {"waveform": timing.noise(3, samples, audio, seed=3)}
    return {**found, "lengths": torch.tensor([samples, spec.hop_length, samples // 2])} if lengths else found


@functools.cache
def _defined_log_mel(spec: LogMelSpec, audio: torch.dtype, lengths: bool) -> Tensor:
    """Float64 features of `_draw_clips`; the same whatever the dtype of the features."""
    return log_mel_reference(*_clips(_draw_clips(spec, audio, lengths)), spec)[0]


def _clips(inputs: Tensors) -> tuple[Tensor, Tensor | None]:
    return inputs["waveform"], inputs.get("lengths")


def log_mel_engine(engine: str, on_gpu: str = "cuda") -> str:
    """A log-mel's `backend`: on a GPU other kernels have but Triton's."""
    return on_gpu if engine == "triton" else engine


def _log_mel_form(
    name: str, spec: LogMelSpec, audio: torch.dtype, features: torch.dtype, lengths: bool, on_gpu: str = "cuda"
) -> KernelForm:
    """`on_gpu`: which of the engines for GPUs."""
    spec = in_dtype(spec, features)
    exact = in_dtype(spec, torch.float32)
    return KernelForm(
        name,
        features,
        functools.partial(_draw_clips, spec, audio, lengths),
        lambda inputs, engine: {"output": log_mel(*_clips(inputs), spec, backend=log_mel_engine(engine, on_gpu))[0]},
        lambda _: {"output": _defined_log_mel(exact, audio, lengths)},
        ROUNDING[features],
    )


def _log_mel_gradient_form(front_end: str, spec: LogMelSpec) -> KernelForm:
    def gradient(inputs: Tensors, features: Callable[[Tensor], Tensor]) -> Tensors:
        leaf = inputs["waveform"].detach().requires_grad_()
        out = features(leaf)
        weights = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype, device=out.device)
        return {"dwaveform": torch.autograd.grad(out, leaf, weights.view_as(out))[0]}

    def call(inputs: Tensors, engine: str) -> Tensors:
        return gradient(inputs, lambda leaf: log_mel(leaf, inputs["lengths"], spec, backend=log_mel_engine(engine))[0])

    def reference(inputs: Tensors) -> Tensors:
        exact = {name: x.cpu() for name, x in _doubled(inputs).items()}
        return gradient(exact, lambda leaf: log_mel_reference(leaf, exact["lengths"], spec)[0])

    return KernelForm(
        f"log-mel gradient float32, {front_end}, lengths",
        torch.float32,
        functools.partial(_draw_clips, spec, torch.float32, True, gradient=True),
        call,
        reference,
        2e-3,
    )


def _log_mels() -> Iterator[KernelForm]:
    int16, bf16, fp32, both = torch.int16, torch.bfloat16, torch.float32, (False, True)
    timed = [(fp32, fp32), (int16, bf16), (fp32, bf16), (int16, fp32)]
    for front_end, spec in FRONT_ENDS.items():
        for (audio, features), lengths in product([*timed, *[(bf16, bf16)] * (front_end == "kaldi-80")], both):
            kind = f"{dtype_name(audio)} to {dtype_name(features)}"
            name = f"log-mel {kind}, {front_end}{', lengths' * lengths}"
            yield _log_mel_form(name, spec, audio, features, lengths)
        yield _log_mel_gradient_form(front_end, dataclasses.replace(spec, dtype="float32"))
        for audio, features in timed[:2]:
            kind = f"{dtype_name(audio)} to {dtype_name(features)}"
            yield _log_mel_form(f"log-mel by Triton {kind}, {front_end}", spec, audio, features, False, "triton")
    # The log-mel tower that open_clip's is compared with takes what its loader gives: padded int16 and lengths.
    yield _log_mel_form("log-mel clap tower int16 to float32, lengths", PRESETS["clap"], int16, fp32, True)


# ---------------------------------------------------------------------------------------------------------------------
# ScaledAdam


def _scaled_adams() -> Iterator[KernelForm]:
    """With a step of the sizes and without, of parameters at multiples of 16 bytes and elsewhere."""
    sizes, normal = (4100, 8, 132), _normal(13)
    for grows, offset in product((False, True), (0, 1)):
        found = {name: normal(offset + sum(sizes)) for name in ("p", "g", "delta", "square")}
        found |= {"square": found["square"].square(), "scale": torch.tensor(0.5), "skip": torch.tensor(False)}
        found |= {name: -1e-3 * normal(len(sizes)).abs() for name in ("rates", "growth")[: 1 + grows]}

        def call(inputs: Tensors, engine: str, offset: int = offset) -> Tensors:
            flat = {name: inputs[name].clone() for name in ("p", "g", "delta", "square")}
            p, g, delta, square = (list(x[offset:].split(sizes)) for x in flat.values())
            squares, products = sums(p, list(g), engine)
            numbers = (inputs["rates"], inputs.get("growth"), inputs["scale"], inputs["skip"], 0.9, 0.98, 0.5, 1e-8)
            update_(p, list(g), delta, square, Change(*numbers), engine)
            changed = {name: flat[name][offset:] for name in ("p", "delta", "square")}
            return {"squares": squares.clone(), "products": products.clone(), **changed}

        def reference(inputs: Tensors, offset: int = offset) -> Tensors:
            exact = _doubled(inputs)
            p, g, delta, square = (exact[name][offset:] for name in ("p", "g", "delta", "square"))
            each = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(p.device)
            zeros = torch.zeros(len(sizes), dtype=p.dtype, device=p.device)
            found = {"squares": zeros.index_add(0, each, g.square()), "products": zeros.index_add(0, each, p * g)}
            g = g * exact["scale"]
            square = 0.98 * square + (1 - 0.98) * g.square()
            change = exact["rates"][each] * g / ((square / 0.5).sqrt() + 1e-8)
            delta = 0.9 * delta + change + (exact["growth"][each] * p if "growth" in exact else 0.0)
            return {**found, "p": p + delta, "delta": delta, "square": square}

        label = f"{'with' if grows else 'without'} sizes{', unaligned' * offset}"
        draw = functools.partial(dict, found)
        yield KernelForm(f"scaled adam {label}", torch.float32, draw, call, reference, ROUNDING[torch.float32])


FORMS: tuple[KernelForm, ...] = (
    *_losses(),
    *_attentions(),
    *_shared_attentions(),
    *_layer_norm_gelus(),
    *_feed_forwards(),
    *_residual_layer_norms(),
    *_zipformers(),
    *_waveforms(),
    *_convolutions(),
    *_log_mels(),
    *_scaled_adams(),
)
