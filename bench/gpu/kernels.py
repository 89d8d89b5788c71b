"""Stages of the lots `towers` and `log_mel`: the kernels beside the loss, with the peers of `bench.kernel_peers`.

``floor_ms`` is the larger of the least bytes (inputs once, results once) at the measured copy rate and, for attention,
the least flops at the measured matmul rate; ``share_of_floor`` is that over the median. The lot `smoke` checks every
kernel form against float64; here a row holds the errors of its form along with the times. Graphs are captured in a
stage of their own, as a form that cannot be captured may leave its process in disorder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.comparison import dtype_name, significant
from bench.gpu.compare import Form, ceilings, compare
from bench.gpu.record import Case, Row
from bench.gpu.run import Run
from bench.kernel_peers import (
    FRONT_ENDS,
    attention_forms,
    in_dtype,
    layer_norm_gelu_forms,
    log_mel_forms,
    ragged,
    waveform_forms,
)
from bench.peers import Peer
from fastclap.kernels.layer_norm_gelu import layer_norm_gelu, layer_norm_gelu_reference
from fastclap.kernels.log_mel.operator import log_mel as log_mel_kernel
from fastclap.kernels.log_mel.spec import LogMelSpec
from fastclap.kernels.log_mel.torch_engine import log_mel_reference
from fastclap.kernels.toeplitz_attention import gated_toeplitz_attention, gated_toeplitz_attention_reference
from fastclap.kernels.waveform import normalize_waveform, normalize_waveform_reference
from fastclap.testing import relative_error

ERROR_CLIPS = 2  # of a timed batch that go through the float64 reference
HEAD_WIDTH = 64
NAMES = ("q", "k", "v", "table", "gate")


@dataclass(frozen=True)
class Sizes:
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


GPU = Sizes(1024, 10.0, 1.0, (32, 128), 499, 16, 32 * 16000, 512, 2.0, 30.0)
CPU = Sizes(2, 0.1, 0.06, (2,), 29, 4, 64, 48, 0.02, 20.0)


def sizes_of(run: Run) -> Sizes:
    return CPU if run.tiny else GPU


def against(least_gbytes: float, gbytes: float | None, gflop: float = 0.0, tflops: float | None = None) -> Any:
    """What a row says of its median: the floor of bytes and flops at the measured rates, and the rates reached."""
    floors = [1e3 * least_gbytes / gbytes if gbytes else 0.0, gflop / tflops if tflops else 0.0]

    def work(ms: float) -> Row:
        found: Row = {"gbytes_s": significant(1e3 * least_gbytes / ms)}
        if max(floors):
            found |= {"floor_ms": significant(max(floors)), "share_of_floor": significant(max(floors) / ms)}
        return {**found, **({"tflops": significant(gflop / ms)} if gflop else {})}

    return work


def both_ways(function: Callable[..., Tensor], leaves: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def errors_of(names: Sequence[str], expected: Sequence[Tensor], found: Sequence[Tensor]) -> dict[str, float]:
    errors = {name: relative_error(x, y) for name, x, y in zip(names, expected, found, strict=True)}
    return {name: float(f"{error:.3g}") for name, error in errors.items()}


def _timed(run: Run, case: Case, forms: Sequence[Form], work: Callable[[float], Row]) -> None:
    sizes = sizes_of(run)
    compare(run, case, forms, seconds=sizes.case_seconds, warm_up_seconds=sizes.warm_up_seconds, work=work)


def _form(peer: Peer, call: Callable[..., Any], errors: Callable[..., Any] | None) -> Form:
    """A form whose call and errors are functions of what the peer runs."""

    def make() -> Callable[[], Any]:
        return functools.partial(call, peer.run)

    return Form(peer, make, None if errors is None else functools.partial(errors, peer.run))


# ---------------------------------------------------------------------------------------------------------------------
# log-mel


def noise(run: Run, spec: LogMelSpec, clips: int, seconds: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(run.device).manual_seed(0)
    wave = torch.randn(clips, int(seconds * spec.sampling_rate), generator=generator, device=run.device).mul_(0.1)
    return wave.mul_(32768).clamp_(-32768, 32767).to(torch.int16) if dtype == torch.int16 else wave.to(dtype)


def log_mel(run: Run) -> None:
    """All front-ends beside the peers, then other dtypes of ours alone."""
    beside_peers = [(torch.float32, torch.float32), (torch.int16, torch.bfloat16)]
    for audio, features in [*beside_peers, (torch.float32, torch.bfloat16), (torch.int16, torch.float32)]:
        for name, spec in FRONT_ENDS.items():
            _log_mel_case(run, name, spec, audio, features, ours_only=(audio, features) not in beside_peers)


def _log_mel_case(
    run: Run, name: str, spec: LogMelSpec, audio: torch.dtype, features: torch.dtype, *, ours_only: bool
) -> None:
    sizes, (_, gbytes) = sizes_of(run), ceilings(run)
    clips = noise(run, spec, sizes.clips, sizes.seconds, audio)
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
    forms = [
        _form(
            peer,
            lambda function: function(clips),
            None if computed is None else functools.partial(errors, computed=computed),
        )
        for peer, computed in log_mel_forms(spec, run.device, audio, features, ours_only=ours_only)
    ]
    _timed(run, case, forms, against(moved, gbytes))


def log_mel_graphs(run: Run) -> None:
    """Each front-end replayed on other samples."""
    for name, spec in FRONT_ENDS.items():
        spec = in_dtype(spec, torch.bfloat16)
        clips = noise(run, spec, 4, sizes_of(run).graph_seconds, torch.int16)
        call = functools.partial(log_mel_kernel, clips, None, spec, backend=run.engine)
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


def _both_or_forward(
    passes: str, sets: Sequence[Sequence[Tensor]], upstream: Tensor
) -> Callable[[Callable[..., Tensor]], object]:
    """A call of a function on the next of several sets of inputs."""
    turn = [0]

    def call(function: Callable[..., Tensor]) -> object:
        turn[0] += 1
        leaves = sets[turn[0] % len(sets)]
        if passes != "forward":
            return both_ways(function, leaves, upstream)
        with torch.no_grad():
            return function(*leaves)

    return call


def _off(
    names: Sequence[str], reference: Callable[..., Tensor], leaves: Sequence[Tensor]
) -> Callable[[Callable[..., Tensor]], dict[str, float]]:
    """Errors of a function's output and gradients against float64 on small inputs."""
    upstream = torch.randn_like(leaves[0]).detach()

    def errors(function: Callable[..., Tensor]) -> dict[str, float]:
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        expected = both_ways(reference, exact, upstream.double())
        return errors_of(("output", *names), expected, both_ways(function, leaves, upstream))

    return errors


def _attention_case(run: Run, batch: int, passes: str) -> None:
    sizes, (tflops, gbytes) = sizes_of(run), ceilings(run)
    sets = [attention_inputs(run, batch, sizes.frames, seed) for seed in range(2)]
    few = attention_inputs(run, 2, min(37, sizes.frames), seed=7)
    call = _both_or_forward(passes, sets, torch.randn_like(sets[0][0]))
    errors = _off(NAMES, gated_toeplitz_attention_reference, few)
    value = batch * sizes.heads * sizes.frames * HEAD_WIDTH * run.dtype.itemsize / 1e9
    # Forward: q, k, v and the output, two products. Backward: those and the output's gradient in, three out, five.
    backward = passes != "forward"
    gflop = 4e-9 * batch * sizes.heads * sizes.frames**2 * HEAD_WIDTH * (3.5 if backward else 1.0)
    moved = value * (4 + (8 if backward else 0))
    case = {
        **{"kernel": "attention", "passes": passes, "batch": batch, "heads": sizes.heads, "frames": sizes.frames},
        **{"head_width": HEAD_WIDTH, "dtype": dtype_name(run.dtype)},
    }
    forms = [_form(peer, call, errors) for peer in attention_forms(run.device)]
    _timed(run, case, forms, against(moved, gbytes, gflop, tflops))


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
    call = _both_or_forward(passes, [leaves], torch.randn_like(leaves[0]).detach())
    errors = _off(("x", "weight", "bias"), layer_norm_gelu_reference, layer_norm_inputs(run, 8))
    times = 2 if passes == "forward" else 5  # x, y; and x, dy, dx
    case = {
        **{"kernel": "layer_norm_gelu", "passes": passes, "rows": sizes.rows, "channels": sizes.channels},
        "dtype": dtype_name(run.dtype),
    }
    forms = [_form(peer, call, errors) for peer in layer_norm_gelu_forms(run.device)]
    _timed(run, case, forms, against(times * sizes.rows * sizes.channels * run.dtype.itemsize / 1e9, gbytes))


def waveform_inputs(run: Run, clips: int, seconds: float, given: bool) -> list[Any]:
    wave = noise(run, FRONT_ENDS["kaldi-80"], clips, seconds, torch.int16)
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
    forms = [_form(peer, lambda function: function(*x), errors) for peer in waveform_forms(run.device, run.dtype)]
    _timed(run, case, forms, against((2 * read + x[0].numel() * run.dtype.itemsize) / 1e9, gbytes))


# ---------------------------------------------------------------------------------------------------------------------
# graphs


def tower_graphs(run: Run) -> None:
    """Each tower kernel replayed on other inputs."""
    x = attention_inputs(run, 2, sizes_of(run).frames, seed=1)
    ours = functools.partial(gated_toeplitz_attention, backend=run.engine)
    _graph(run, {"kernel": "attention"}, functools.partial(both_ways, ours, x, torch.ones_like(x[0])), x)
    x = layer_norm_inputs(run, 1001)
    upstream = torch.randn_like(x[0]).detach()
    ours = functools.partial(layer_norm_gelu, backend=run.engine)
    _graph(run, {"kernel": "layer_norm_gelu"}, functools.partial(both_ways, ours, x, upstream), [*x, upstream])
    given = waveform_inputs(run, 3, sizes_of(run).graph_seconds, False)
    call = lambda: [normalize_waveform(*given, dtype=run.dtype, backend=run.engine)]  # noqa: E731
    _graph(run, {"kernel": "normalize_waveform"}, call, given[:2])


def _graph(run: Run, case: Case, call: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
    """A captured graph replayed on other inputs gives what an eager call gives; and how long a replay takes."""
    case = {"check": "replay of a CUDA graph", **case, "dtype": dtype_name(run.dtype)}

    def replayed() -> tuple[bool, timing.Timing]:
        replay = timing.captured(call, run.device)
        with torch.no_grad():
            for x in inputs:
                x.copy_(x.flip(0))
        expected = [x.clone() for x in call()]
        found = replay()
        torch.cuda.synchronize(run.device)
        same = all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))
        return same, timing.interleaved({"replay": replay}, run.device, 0.3, least=10, most=100)["replay"]

    if not run.known(case):
        found = run.attempt(case, replayed, 30.0)
        if found is not None:
            run.add(case, passed=found[0], **found[1].as_dict())
