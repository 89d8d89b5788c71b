"""Stages of the lots `towers` and `log_mel`: all kernels but the loss's, compared with those of `bench.kernel_peers`.

`floor_ms` is the larger of the least bytes (inputs once, results once) at the measured copy rate and, for attention,
the least flops at the measured matmul rate; `share_of_floor` is that over the median. The lot `smoke` checks every
kernel form against float64; here a row holds the errors of its form along with the times. Graphs are captured in a
stage of their own, as a form that cannot be captured may leave its process in disorder.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.compare import ceilings, compare
from bench.gpu.forms import log_mel_engine
from bench.kernel_peers import (
    FRONT_ENDS,
    attention_forms,
    feed_forward_forms,
    in_dtype,
    layer_norm_gelu_forms,
    log_mel_forms,
    log_mel_gradient_forms,
    ragged,
    residual_layer_norm_forms,
    waveform_convolution_forms,
    waveform_forms,
)
from bench.peers import Peer
from bench.run import Case, Entry, Row, Run, dtype_name, significant
from fastclap.kernels.feed_forward import feed_forward_reference
from fastclap.kernels.layer_norm_gelu import layer_norm_gelu, layer_norm_gelu_reference
from fastclap.kernels.log_mel.operator import log_mel as log_mel_kernel
from fastclap.kernels.log_mel.spec import LogMelSpec
from fastclap.kernels.log_mel.torch_engine import log_mel_reference
from fastclap.kernels.residual_layer_norm import residual_layer_norm_reference
from fastclap.kernels.toeplitz_attention import gated_toeplitz_attention, gated_toeplitz_attention_reference
from fastclap.kernels.waveform import normalize_waveform, normalize_waveform_reference
from fastclap.kernels.waveform_convolution import waveform_convolution, waveform_convolution_reference
from fastclap.testing import relative_error

ERROR_CLIPS = 2  # of a timed batch that go through the float64 reference
HEAD_WIDTH = 64
KERNEL, STRIDE = 10, 5  # of WavLM's first convolution
NAMES = ("q", "k", "v", "table", "gate")


@dataclass(frozen=True)
class KernelSizes:
    clips: int
    seconds: float  # a clip
    graph_seconds: float  # a clip, where a graph is captured
    attention_batches: tuple[int, ...]
    frames: int
    heads: int
    rows: int  # of LayerNorm + GELU
    channels: int
    case_seconds: float  # of the timed loop of one case
    warm_up_seconds: float  # the most one form may take to compile, tune and run twice


GPU = KernelSizes(
    clips=1024,
    seconds=10.0,
    graph_seconds=1.0,
    attention_batches=(32, 128),
    frames=499,
    heads=16,
    rows=32 * 16000,
    channels=512,
    case_seconds=2.0,
    warm_up_seconds=30.0,
)
CPU = KernelSizes(
    clips=2,
    seconds=0.1,
    graph_seconds=0.06,
    attention_batches=(2,),
    frames=29,
    heads=4,
    rows=64,
    channels=48,
    case_seconds=0.02,
    warm_up_seconds=20.0,
)


def sizes_of(run: Run) -> KernelSizes:
    return CPU if run.tiny else GPU


def rates_and_floor(least_gbytes: float, gbytes: float | None, gflop: float = 0.0, tflops: float | None = None) -> Any:
    """What a row says of its median: the floor of bytes and flops at the measured rates, and the rates reached."""
    floors = [1e3 * least_gbytes / gbytes if gbytes else 0.0, gflop / tflops if tflops else 0.0]

    def work(ms: float) -> Row:
        found: Row = {"gbytes_s": significant(1e3 * least_gbytes / ms)}
        if max(floors):
            found |= {"floor_ms": significant(max(floors)), "share_of_floor": significant(max(floors) / ms)}
        return {**found, **({"tflops": significant(gflop / ms)} if gflop else {})}

    return work


def errors_of(names: Sequence[str], expected: Sequence[Tensor], found: Sequence[Tensor]) -> dict[str, float]:
    errors = {name: relative_error(x, y) for name, x, y in zip(names, expected, found, strict=True)}
    return {name: float(f"{error:.3g}") for name, error in errors.items()}


def _compare(
    run: Run,
    case: Case,
    peers: Sequence[tuple[Peer, Callable[..., Any] | None]],
    call: Callable[..., Any],
    work: Callable[[float], Row],
) -> None:
    """Compares what peers run in one case.

    Args:
        run: of the stage.
        case: what all forms share.
        peers: each with a function of what it runs that gives its errors, or None.
        call: a function of what a peer runs: what is timed.
        work: what a row says of its median in ms.
    """
    sizes = sizes_of(run)
    entries = [Entry({**case, "form": peer.name}, None, peer.facts, work) for peer, _ in peers]
    for entry, (peer, errors) in zip(entries, peers, strict=True):
        entry.seconds = sizes.warm_up_seconds
        if peer.run is not None:
            entry.make = functools.partial(functools.partial, call, peer.run)
            entry.errors = None if errors is None else functools.partial(errors, peer.run)
    compare(run, entries, seconds=sizes.case_seconds)


# ---------------------------------------------------------------------------------------------------------------------
# log-mel


def noise(run: Run, rate: int, clips: int, seconds: float, dtype: torch.dtype) -> Tensor:
    return timing.noise(clips, int(seconds * rate), dtype, run.device)


def log_mel(run: Run) -> None:
    """All front-ends compared with their peers, then other dtypes of ours alone."""
    compared = [(torch.float32, torch.float32), (torch.int16, torch.bfloat16)]
    for audio, features in [*compared, (torch.float32, torch.bfloat16), (torch.int16, torch.float32)]:
        for name, spec in FRONT_ENDS.items():
            _log_mel_case(run, name, spec, audio, features, ours_only=(audio, features) not in compared)


def _log_mel_case(
    run: Run, name: str, spec: LogMelSpec, audio: torch.dtype, features: torch.dtype, *, ours_only: bool
) -> None:
    sizes, (_, gbytes) = sizes_of(run), ceilings(run)
    clips = noise(run, spec.sampling_rate, sizes.clips, sizes.seconds, audio)
    references: dict[LogMelSpec, Tensor] = {}  # several peers compute the same front-end

    def errors(function: Callable[[Tensor], Tensor], computed: LogMelSpec) -> dict[str, float]:
        first = clips[:ERROR_CLIPS]
        if computed not in references:
            references[computed] = log_mel_reference(first.cpu(), None, computed)[0]
        expected, found = references[computed], function(first).double().cpu()
        frames = min(found.shape[1], expected.shape[1])  # some have one more
        expected, found = expected[:, :frames], found[:, :frames]
        largest = float(f"{(found - expected).abs().max().item():.3g}")
        return {**errors_of(["features"], [expected], [found]), "largest": largest}

    frames = int(spec.frames(clips.shape[1]))
    moved = (clips.numel() * audio.itemsize + sizes.clips * frames * spec.n_mels * features.itemsize) / 1e9
    case = {
        **{"kernel": "log-mel", "front_end": name, "clips": sizes.clips, "seconds": sizes.seconds},
        **{"audio": dtype_name(audio), "dtype": dtype_name(features)},
    }
    peers = [
        (peer, None if computed is None else functools.partial(errors, computed=computed))
        for peer, computed in log_mel_forms(spec, run.device, audio, features, ours_only=ours_only)
    ]
    _compare(run, case, peers, lambda function: function(clips), rates_and_floor(moved, gbytes))


def log_mel_gradients(run: Run) -> None:
    """The gradient of the waveform, which is torch's, beside torchaudio's: of as many clips as autograd has room."""
    sizes, (_, gbytes) = sizes_of(run), ceilings(run)
    for name, spec in FRONT_ENDS.items():
        clips = noise(run, spec.sampling_rate, max(1, sizes.clips // 16), sizes.seconds, torch.float32)
        case = {"kernel": "log-mel gradient", "front_end": name, "clips": len(clips)}
        case |= {"seconds": sizes.seconds, "audio": "float32", "dtype": "float32"}
        peers = [(peer, None) for peer in log_mel_gradient_forms(spec, run.device)]
        leaf = clips.requires_grad_()

        def call(function: Callable[[Tensor], Tensor], leaf: Tensor = leaf) -> Tensor:
            return torch.autograd.grad(function(leaf).sum(), leaf)[0]

        moved = 2 * clips.numel() * 4 / 1e9
        _compare(run, case, peers, call, rates_and_floor(moved, gbytes))


def log_mel_graphs(run: Run) -> None:
    """Each front-end replayed on other samples."""
    for name, spec in FRONT_ENDS.items():
        spec = in_dtype(spec, torch.bfloat16)
        clips = noise(run, spec.sampling_rate, 4, sizes_of(run).graph_seconds, torch.int16)
        call = functools.partial(log_mel_kernel, clips, None, spec, backend=log_mel_engine(run.engine))
        _graph(run, {"kernel": "log-mel", "front_end": name}, call, [clips])


# ---------------------------------------------------------------------------------------------------------------------
# towers


def towers(run: Run) -> None:
    """Attention, then the kernels that are bound by memory or instructions."""
    for batch in sizes_of(run).attention_batches:
        for passes in ("forward", "forward and backward"):
            _attention_case(run, batch, passes)
    for passes in ("forward", "forward and backward"):
        _layer_norm_gelu_case(run, passes)
    for passes in ("forward", "forward and backward"):
        _residual_case(run, passes)
    for passes in ("forward", "forward and backward"):
        _feed_forward_case(run, passes)
    for passes in ("forward", "forward and backward"):
        _convolution_case(run, passes)
    for statistics in ("given", "measured"):
        _waveform_case(run, statistics)


def attention_inputs(run: Run, batch: int, frames: int, seed: int) -> list[Tensor]:
    """q, k, v [B, H, T, d] as views of [B, T, H, d]; table and gate float32; all require gradients."""
    generator = torch.Generator(run.device).manual_seed(seed)
    heads = sizes_of(run).heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=run.device)

    q, k, v = (normal(batch, frames, heads, HEAD_WIDTH).to(run.dtype).transpose(1, 2) for _ in range(3))
    leaves = (q, k, v, normal(heads, 2 * frames - 1), 1 + normal(batch, heads, frames))
    return [leaf.requires_grad_() for leaf in leaves]


def _timed_call(
    passes: str, sets: Sequence[Sequence[Tensor]], upstream: Tensor
) -> Callable[[Callable[..., Tensor]], object]:
    """What runs a function forward, or forward and backward, on the next of several sets of inputs."""
    turns = itertools.cycle(sets)

    def call(function: Callable[..., Tensor]) -> object:
        leaves = next(turns)
        if passes != "forward":
            return timing.output_and_gradients(function, leaves, upstream)
        with torch.no_grad():
            return function(*leaves)

    return call


def _errors_against(
    names: Sequence[str], reference: Callable[..., Tensor], leaves: Sequence[Tensor]
) -> Callable[[Callable[..., Tensor]], dict[str, float]]:
    """What gives the errors of a function's output and gradients against float64 on small inputs."""
    upstream = torch.randn_like(leaves[0]).detach()

    def errors(function: Callable[..., Tensor]) -> dict[str, float]:
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        expected = timing.output_and_gradients(reference, exact, upstream.double())
        return errors_of(("output", *names), expected, timing.output_and_gradients(function, leaves, upstream))

    return errors


def _attention_case(run: Run, batch: int, passes: str) -> None:
    sizes, (tflops, gbytes) = sizes_of(run), ceilings(run)
    sets = [attention_inputs(run, batch, sizes.frames, seed) for seed in range(2)]
    few = attention_inputs(run, 2, min(37, sizes.frames), seed=7)
    call = _timed_call(passes, sets, torch.randn_like(sets[0][0]))
    errors = _errors_against(NAMES, gated_toeplitz_attention_reference, few)
    value = batch * sizes.heads * sizes.frames * HEAD_WIDTH * run.dtype.itemsize / 1e9
    # Forward: q, k, v and the output, two products. Backward: those and the output's gradient in, three out, five.
    backward = passes != "forward"
    gflop = 4e-9 * batch * sizes.heads * sizes.frames**2 * HEAD_WIDTH * (3.5 if backward else 1.0)
    moved = value * (4 + (8 if backward else 0))
    case = {
        **{"kernel": "attention", "passes": passes, "batch": batch, "heads": sizes.heads, "frames": sizes.frames},
        **{"head_width": HEAD_WIDTH, "dtype": dtype_name(run.dtype)},
    }
    peers = [(peer, errors) for peer in attention_forms(run.device)]
    _compare(run, case, peers, call, rates_and_floor(moved, gbytes, gflop, tflops))


def layer_norm_inputs(run: Run, rows: int) -> list[Tensor]:
    channels = sizes_of(run).channels
    generator = torch.Generator(run.device).manual_seed(rows)
    x = torch.randn(rows, channels, device=run.device, generator=generator).to(run.dtype)
    weight, bias = torch.randn(2, channels, device=run.device, generator=generator).to(run.dtype)
    return [leaf.clone().requires_grad_() for leaf in (x, weight, bias)]


def _layer_norm_gelu_case(run: Run, passes: str) -> None:
    """The rows of WavLM's first convolution for 16 clips of 10 s."""
    sizes, (_, gbytes) = sizes_of(run), ceilings(run)
    leaves = layer_norm_inputs(run, sizes.rows)
    call = _timed_call(passes, [leaves], torch.randn_like(leaves[0]).detach())
    errors = _errors_against(("x", "weight", "bias"), layer_norm_gelu_reference, layer_norm_inputs(run, 8))
    times = 2 if passes == "forward" else 5  # x, y; and x, dy, dx
    case = {
        **{"kernel": "layer_norm_gelu", "passes": passes, "rows": sizes.rows, "channels": sizes.channels},
        "dtype": dtype_name(run.dtype),
    }
    peers = [(peer, errors) for peer in layer_norm_gelu_forms(run.device)]
    moved = times * sizes.rows * sizes.channels * run.dtype.itemsize / 1e9
    _compare(run, case, peers, call, rates_and_floor(moved, gbytes))


def layer_inputs(run: Run, rows: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator(run.device).manual_seed(rows)
    return {
        name: torch.randn(shape, device=run.device, generator=generator).to(run.dtype) for name, shape in shapes.items()
    }


def _layer_case(
    run: Run,
    kernel: str,
    passes: str,
    inputs: Callable[[int], dict[str, Tensor]],  # of so many rows, by name; the first has the output's shape
    reference: Callable[..., Tensor],
    peers: Sequence[Peer],
    gbytes: float,
    gflop: float = 0.0,
) -> None:
    """A kernel between the products of a transformer layer, on the frames of a batch of clips."""
    sizes, (tflops, rate) = sizes_of(run), ceilings(run)
    rows = sizes.attention_batches[0] * sizes.frames
    few = {name: x.requires_grad_() for name, x in inputs(8).items()}
    leaves = [x.requires_grad_() for x in inputs(rows).values()]
    call = _timed_call(passes, [leaves], torch.randn_like(leaves[0]).detach())
    errors = _errors_against(list(few), reference, list(few.values()))
    case = {"kernel": kernel, "passes": passes, "rows": rows, "channels": leaves[0].shape[1]}
    case["dtype"] = dtype_name(run.dtype)
    _compare(run, case, [(peer, errors) for peer in peers], call, rates_and_floor(gbytes, rate, gflop, tflops))


def _layer_sizes(run: Run) -> tuple[int, int]:
    """Values of the residual stream of a batch, and its width."""
    sizes = sizes_of(run)
    width = sizes.heads * HEAD_WIDTH
    return sizes.attention_batches[0] * sizes.frames * width, width


def _residual_case(run: Run, passes: str) -> None:
    """Without dropout, whose masks differ between peers; the gradient is that of the norm alone."""
    values, width = _layer_sizes(run)

    def inputs(rows: int) -> dict[str, Tensor]:
        shapes = {"x": (rows, width), "branch": (rows, width)}
        return layer_inputs(run, rows, shapes | dict.fromkeys(("branch_bias", "weight", "bias"), (width,)))

    def reference(*leaves: Tensor) -> Tensor:
        return residual_layer_norm_reference(*leaves)[1]

    # x and branch in, total and norm out; for the backward pass total and the norm's gradient in, two out
    moved = values * run.dtype.itemsize * (4 if passes == "forward" else 8) / 1e9
    peers = residual_layer_norm_forms(run.device)
    _layer_case(run, "residual_layer_norm", passes, inputs, reference, peers, moved)


def _feed_forward_case(run: Run, passes: str) -> None:
    values, width = _layer_sizes(run)
    hidden = 4 * width

    def inputs(rows: int) -> dict[str, Tensor]:
        shapes = {"x": (rows, width), "weight_in": (hidden, width), "bias_in": (hidden,), "weight_out": (width, hidden)}
        found = layer_inputs(run, rows, shapes)
        return {name: x / x.shape[1] ** 0.5 if name.startswith("weight") else x for name, x in found.items()}

    backward = passes != "forward"
    # of what is hidden: the products' output, the activation in and out of it, and into the next product; for the
    # backward pass its gradient out of and into a product twice, u and da in, du and the activation out
    moved = 4 * values * run.dtype.itemsize * (4 + (8 if backward else 0)) / 1e9
    gflop = 16e-9 * values * width * (3 if backward else 1)
    peers = feed_forward_forms(run.device)
    _layer_case(run, "feed_forward", passes, inputs, feed_forward_reference, peers, moved, gflop)


def convolution_inputs(run: Run, clips: int, seconds: float) -> list[Tensor]:
    """Samples, weight, and weight and bias of the norm; all but the samples require gradients."""
    channels = sizes_of(run).channels
    generator = torch.Generator(run.device).manual_seed(clips)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=run.device, generator=generator).to(run.dtype)

    parameters = (normal(channels, 1, KERNEL), normal(channels), normal(channels))
    return [normal(clips, int(16000 * seconds)), *(x.requires_grad_() for x in parameters)]


def _convolution_case(run: Run, passes: str) -> None:
    """The first layer of WavLM."""
    sizes, (_, gbytes) = sizes_of(run), ceilings(run)
    clips = max(1, sizes.rows // int(16000 * sizes.seconds / STRIDE))
    waveform, *leaves = convolution_inputs(run, clips, sizes.seconds)
    short = convolution_inputs(run, 2, 0.01)
    rows = (waveform.shape[1] - KERNEL) // STRIDE + 1
    upstream = torch.randn(clips, rows, sizes.channels, device=run.device).to(run.dtype)

    def reference(weight: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        exact = short[0].double()
        return waveform_convolution_reference(exact, weight, None, norm_weight, norm_bias, STRIDE)

    def errors(function: Callable[..., Tensor]) -> dict[str, float]:
        exact = [leaf.detach().double().requires_grad_() for leaf in short[1:]]
        given = upstream[:1, : (short[0].shape[1] - KERNEL) // STRIDE + 1].expand(2, -1, -1)
        expected = timing.output_and_gradients(reference, exact, given)
        found = timing.output_and_gradients(functools.partial(function, short[0]), short[1:], given)
        return errors_of(("output", "weight", "norm_weight", "norm_bias"), expected, found)

    timed = _timed_call(passes, [leaves], upstream)
    # samples in, y out; for the backward pass samples and dy in
    moved = (waveform.numel() + upstream.numel()) * run.dtype.itemsize * (1 if passes == "forward" else 2) / 1e9
    case = {
        **{"kernel": "waveform_convolution", "passes": passes, "clips": clips, "seconds": sizes.seconds},
        **{"channels": sizes.channels, "dtype": dtype_name(run.dtype)},
    }
    peers = [(peer, errors) for peer in waveform_convolution_forms(run.device)]

    def call(function: Callable[..., Tensor]) -> object:
        return timed(functools.partial(function, waveform))

    _compare(run, case, peers, call, rates_and_floor(moved, gbytes))


def waveform_inputs(run: Run, clips: int, seconds: float, given: bool) -> list[Any]:
    wave = noise(run, 16000, clips, seconds, torch.int16)
    statistic = torch.full((clips,), 0.1, device=run.device) if given else None
    return [wave, ragged(wave), statistic, statistic]


def _waveform_case(run: Run, statistics: str) -> None:
    sizes, (_, gbytes) = sizes_of(run), ceilings(run)
    given = statistics == "given"
    x = waveform_inputs(run, sizes.clips, sizes.seconds, given)
    first: list[Any] = [None if value is None else value[:1] for value in x]

    def errors(function: Callable[..., Tensor]) -> dict[str, float]:
        on_host: list[Any] = [None if value is None else value.cpu() for value in first]
        return errors_of(["waveform"], [normalize_waveform_reference(*on_host)], [function(*first)])

    # Statistics need all samples before the first result: read twice, as no cache holds them. Padding is written.
    read = int(x[1].sum()) * (1 if given else 2)
    case = {
        **{"kernel": "normalize_waveform", "statistics": statistics, "clips": sizes.clips, "seconds": sizes.seconds},
        **{"audio": "int16", "dtype": dtype_name(run.dtype)},
    }
    peers = [(peer, errors) for peer in waveform_forms(run.device, run.dtype)]
    moved = (2 * read + x[0].numel() * run.dtype.itemsize) / 1e9
    _compare(run, case, peers, lambda function: function(*x), rates_and_floor(moved, gbytes))


# ---------------------------------------------------------------------------------------------------------------------
# graphs


def tower_graphs(run: Run) -> None:
    """Each tower kernel replayed on other inputs."""
    x = attention_inputs(run, 2, sizes_of(run).frames, seed=1)
    ours = functools.partial(gated_toeplitz_attention, backend=run.engine)
    call = functools.partial(timing.output_and_gradients, ours, x, torch.ones_like(x[0]))
    _graph(run, {"kernel": "attention"}, call, x)
    x = layer_norm_inputs(run, 1001)
    upstream = torch.randn_like(x[0]).detach()
    ours = functools.partial(layer_norm_gelu, backend=run.engine)
    call = functools.partial(timing.output_and_gradients, ours, x, upstream)
    _graph(run, {"kernel": "layer_norm_gelu"}, call, [*x, upstream])
    wave, *x = convolution_inputs(run, 3, sizes_of(run).graph_seconds)

    def convolved(weight: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        return waveform_convolution(wave, weight, None, norm_weight, norm_bias, STRIDE, backend=run.engine)

    call = functools.partial(timing.output_and_gradients, convolved, x)
    call = functools.partial(call, torch.ones_like(convolved(*x)).detach())
    _graph(run, {"kernel": "waveform_convolution"}, call, [wave, *x])
    given = waveform_inputs(run, 3, sizes_of(run).graph_seconds, False)
    waveform = functools.partial(normalize_waveform, *given, dtype=run.dtype, backend=run.engine)
    _graph(run, {"kernel": "normalize_waveform"}, lambda: [waveform()], given[:2])


def _graph(run: Run, case: Case, call: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
    """A captured graph replayed on other inputs gives what an eager call gives; and how long a replay takes."""
    case = {"check": "replay of a CUDA graph", **case, "dtype": dtype_name(run.dtype)}

    def replayed() -> Row:
        replay = timing.captured(call, run.device)
        with torch.no_grad():
            for x in inputs:
                x.copy_(x.flip(0))
        expected = [x.clone() for x in call()]
        found = replay()
        torch.cuda.synchronize(run.device)
        same = all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))
        times = timing.interleaved({"replay": replay}, run.device, 0.3, least=10, most=100)["replay"]
        return {"passed": same, **times.as_dict()}

    run.measure(case, replayed, 30.0)
