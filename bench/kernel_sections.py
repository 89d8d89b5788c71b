"""The sections of `bench.gpu_evidence` beside the loss: log-mel, attention, LayerNorm + GELU, waveforms.

Every section first checks its kernel on the device: errors against float64, in every dtype that it is timed in, two
runs bit for bit, and the replay of a CUDA graph on new inputs. Then come the figures, beside the peers of
`bench.kernel_peers`: warmed up alone, which gives memory and error, and timed in turn.

``floor_ms`` is the larger of the least bytes (inputs once, results once) at the measured copy rate and, for attention,
the least flops at the measured matmul rate; ``share_of_floor`` is that over the median. Rates that the run has no
figure for are measured at the start of the section.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench import timing
from bench.comparison import Row, copy_rate, dtype_name, matmul_rate, significant, time_in_turn
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
from fastclap.kernels.logmel import LogMelSpec, log_mel, log_mel_reference
from fastclap.kernels.toeplitz_attention import gated_toeplitz_attention, gated_toeplitz_attention_reference
from fastclap.kernels.waveform import normalize_waveform, normalize_waveform_reference
from fastclap.testing import relative_error

if TYPE_CHECKING:
    from bench.gpu_evidence import Run

# Relative error that is always accepted: the rounding of a result in that dtype, a few times over.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 6e-4}
# Above it, this multiple of the torch engine's error on the same numbers is the bound.
WORSE = 4.0
ERROR_CLIPS = 2  # of a timed batch that go through the float64 reference


@dataclass(frozen=True)
class Sizes:
    clips: int
    seconds: float  # a clip
    check_seconds: float
    attention_batches: tuple[int, ...]
    frames: int
    heads: int
    rows: int  # of LayerNorm + GELU
    channels: int
    case_seconds: float  # of the timed loop of one case
    warm_up_seconds: float  # the most one form may take to compile, tune and run once
    copy_bytes: int  # where the run has not measured a copy
    matmul: int


GPU = Sizes(
    clips=1024,
    seconds=10.0,
    check_seconds=1.0,
    attention_batches=(32, 128),
    frames=499,
    heads=16,
    rows=32 * 16000,
    channels=512,
    case_seconds=2.0,
    warm_up_seconds=30.0,
    copy_bytes=4 << 30,
    matmul=8192,
)
CPU = Sizes(
    clips=2,
    seconds=0.1,
    check_seconds=0.06,
    attention_batches=(2,),
    frames=29,
    heads=4,
    rows=64,
    channels=48,
    case_seconds=0.02,
    warm_up_seconds=20.0,
    copy_bytes=1 << 20,
    matmul=256,
)
HEAD_WIDTH = 64
NAMES = ("q", "k", "v", "table", "gate")


@dataclass(frozen=True)
class Form:
    """What one peer runs in a case, and its errors against float64 (None: it computes something else)."""

    peer: Peer
    call: Callable[[], Any]
    errors: Callable[[], dict[str, float]] | None


# ---------------------------------------------------------------------------------------------------------------------
# What the sections share
# ---------------------------------------------------------------------------------------------------------------------


def sizes_of(run: Run) -> Sizes:
    return GPU if run.device.type == "cuda" else CPU


def engine_of(run: Run) -> str:
    return "triton" if run.device.type == "cuda" else "auto"


def measured_copy(run: Run) -> float:
    """GB/s of a large copy, read and written."""
    known = run.ceiling("copy", "gbytes_s")
    if known is None:
        known, figures = copy_rate(sizes_of(run).copy_bytes, run.device, 1.0)
        run.add({"what": "copy", "gbytes_s": significant(known), **figures.as_dict()})
    return known


def measured_matmul(run: Run) -> float:
    """TFLOP/s of a large product in the run's dtype."""
    known = run.ceiling("matmul", "tflops")
    if known is None:
        size = sizes_of(run).matmul
        known, figures = matmul_rate(size, run.device, run.dtype, 1.0)
        run.add({"what": "matmul", "size": size, "tflops": significant(known), **figures.as_dict()})
    return known


def check_error(run: Run, case: Row, found: Callable[[], tuple[dict[str, float], dict[str, float], float]]) -> None:
    """Adds a row for (errors, errors of the torch engine, accepted rounding)."""
    result, reason = timing.attempt(found, max(1.0, run.left))
    if result is None:
        run.add({"what": "error", **case, "passed": False, "reason": reason})
        return
    errors, plain, rounding = result
    passed = all(error <= max(rounding, WORSE * plain[name]) for name, error in errors.items())  # a NaN fails
    run.add(
        {"what": "error", **case, "passed": passed, "errors": errors, "errors_of_torch": plain, "rounding": rounding}
    )


def check_repeats(run: Run, case: Row, call: Callable[[], Sequence[Tensor]]) -> None:
    """Two runs bit for bit."""

    def same() -> bool:
        first = [x.clone() for x in call()]
        return all(torch.equal(x, y) for x, y in zip(first, call(), strict=True))

    passed, reason = timing.attempt(same, max(1.0, run.left))
    run.add({"what": "two runs bit for bit", **case, "passed": passed is True, "reason": reason})


def check_graph(run: Run, case: Row, call: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
    """A captured graph replayed on other inputs gives what an eager call gives; last, as a failure leaves disorder."""
    if run.device.type != "cuda":
        run.add({"what": "replay of a CUDA graph", **case, "reason": "a CPU has no CUDA graphs"})
        return

    def replayed() -> bool:
        replay = timing.captured(call, run.device)
        with torch.no_grad():
            for x in inputs:
                x.copy_(x.flip(0))
        expected = [x.clone() for x in call()]
        found = replay()
        torch.cuda.synchronize(run.device)
        return all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))

    passed, reason = timing.attempt(replayed, max(1.0, run.left))
    run.add({"what": "replay of a CUDA graph", **case, "passed": passed is True, "reason": reason})


def rounded(errors: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{error:.3g}") for name, error in errors.items()}


def compare(run: Run, case: Row, forms: Sequence[tuple[Peer, Form | None]], work: Callable[[float], Row]) -> None:
    """One row a form: warmed up and checked alone, then all that run are timed in turn."""
    sizes = sizes_of(run)
    if run.device.type == "cuda":  # where forms are compiled
        torch.compiler.reset()  # or the ninth shape silently runs eagerly
    results: dict[str, Row] = {}
    calls: dict[str, Callable[[], object]] = {}
    first_ms: dict[str, float] = {}
    for peer, form in forms:
        row: Row = {**case, "peer": peer.name, "package": peer.package, "version": peer.version, "notes": peer.notes}
        results[peer.name] = row
        if form is None:
            row["reason"] = "not available"
            continue
        if run.left < 2:
            row["reason"] = "not reached: no time left"
            continue
        call, errors = form.call, form.errors
        warm, reason = timing.attempt(lambda: _warm_up(call, run.device), min(sizes.warm_up_seconds, run.left))  # noqa: B023
        if warm is None:
            row["reason"] = reason
            continue
        row["peak_bytes"], first_ms[peer.name] = warm
        calls[peer.name] = call
        if errors is not None:
            limit = min(sizes.warm_up_seconds, max(1.0, run.left))
            row["errors"], reason = timing.attempt(errors, limit)
            if reason:
                row["errors_reason"] = reason
        if run.device.type == "cuda":
            torch.cuda.empty_cache()  # forms differ in the sizes that they ask for
    time_in_turn(results, calls, first_ms, run.device, sizes.case_seconds, run.left, work)
    for row in results.values():
        run.add(row)
    if run.device.type == "cuda":
        timing.release()


def _warm_up(call: Callable[[], Any], device: torch.device) -> tuple[int | None, float]:
    """Compiles and tunes in one call; the peak and the time of a second."""
    call()
    milliseconds: list[float] = []
    peak = timing.peak_bytes(lambda: milliseconds.append(timing.elapsed_ms(call, device)), device)
    return peak, milliseconds[0]


def against(floor_ms: float, **figures: float) -> Callable[[float], Row]:
    """What a row says of its median beside the floor; of each figure, an amount of work in 1e9, the rate."""

    def work(ms: float) -> Row:
        rates = {name: significant(amount / ms * 1e3) for name, amount in figures.items()}
        return {"floor_ms": significant(floor_ms), "share_of_floor": significant(floor_ms / ms), **rates}

    return work


def both_ways(function: Callable[..., Tensor], leaves: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def errors_of(names: Sequence[str], expected: Sequence[Tensor], found: Sequence[Tensor]) -> dict[str, float]:
    return rounded({name: relative_error(x, y) for name, x, y in zip(names, expected, found, strict=True)})


# ---------------------------------------------------------------------------------------------------------------------
# Log-mel
# ---------------------------------------------------------------------------------------------------------------------


def noise(run: Run, spec: LogMelSpec, clips: int, seconds: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(run.device).manual_seed(0)
    wave = torch.randn(clips, int(seconds * spec.sampling_rate), generator=generator, device=run.device).mul_(0.1)
    return wave.mul_(32768).clamp_(-32768, 32767).to(torch.int16) if dtype == torch.int16 else wave.to(dtype)


def log_mel_section(run: Run) -> None:
    """All front-ends: checks, then times beside the peers, the plainest input and the leanest first."""
    sizes = sizes_of(run)
    checked = [(torch.float32, torch.float32), (torch.int16, torch.bfloat16)]
    for name, spec in FRONT_ENDS.items():
        for audio, features in checked:
            _check_log_mel(run, name, spec, audio, features)
    for audio, features in ((torch.bfloat16, torch.bfloat16), (torch.int16, torch.float32)):
        _check_log_mel(run, "kaldi-80", FRONT_ENDS["kaldi-80"], audio, features)
    for name, spec in FRONT_ENDS.items():
        case = {"kernel": "log-mel gradient", "front_end": name, "dtype": "float32"}
        check_error(run, case, functools.partial(_log_mel_gradient, run, spec))
    spec = in_dtype(FRONT_ENDS["whisper-80"], torch.bfloat16)
    clips = noise(run, spec, 4, sizes.check_seconds, torch.int16)
    call = lambda: log_mel(clips, None, spec, backend=engine_of(run))  # noqa: E731
    check_graph(run, {"kernel": "log-mel", "front_end": "whisper-80"}, call, [clips])
    run.record.section(run.name, checked=True)

    gbytes = measured_copy(run)
    everything = [*checked, (torch.float32, torch.bfloat16), (torch.int16, torch.float32)]
    for audio, features in everything:
        for name, spec in FRONT_ENDS.items():
            if run.left < 3:
                run.add({"front_end": name, "peer": None, "reason": "not reached: no time left"})
                return
            _log_mel_case(run, name, spec, audio, features, gbytes, ours_only=(audio, features) not in checked)


def _check_log_mel(run: Run, name: str, spec: LogMelSpec, audio: torch.dtype, features: torch.dtype) -> None:
    """A ragged batch, the second clip too short for a frame's reflection, against the float64 of its own clips."""
    spec = in_dtype(spec, features)
    clips = noise(run, spec, 4, sizes_of(run).check_seconds, audio)
    lengths = ragged(clips)
    lengths[1] = spec.hop_length
    call = lambda: log_mel(clips, lengths, spec, backend=engine_of(run))  # noqa: E731

    def found() -> tuple[dict[str, float], dict[str, float], float]:
        expected = log_mel_reference(clips.cpu(), lengths.cpu(), in_dtype(spec, torch.float32))[0]
        torch_engine = log_mel(clips, lengths, spec, backend="torch")[0]
        return (
            errors_of(["features"], [expected], call()[:1]),
            errors_of(["features"], [expected], [torch_engine]),
            ROUNDING[features],
        )

    case = {"kernel": "log-mel", "front_end": name, "audio": dtype_name(audio), "dtype": dtype_name(features)}
    check_error(run, case, found)
    check_repeats(run, case, call)


def _log_mel_gradient(run: Run, spec: LogMelSpec) -> tuple[dict[str, float], dict[str, float], float]:
    clips = noise(run, spec, 2, sizes_of(run).check_seconds / 2, torch.float32)
    lengths = ragged(clips)

    def gradient(clips: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = clips.clone().requires_grad_()
        features = compute(leaf)
        weights = torch.linspace(-1.0, 1.0, features.numel(), dtype=features.dtype, device=features.device)
        return torch.autograd.grad(features, leaf, weights.view_as(features))[0]

    expected = gradient(clips.cpu().double(), lambda x: log_mel_reference(x, lengths.cpu(), spec)[0])
    ours, plain = (
        gradient(clips, lambda x: log_mel(x, lengths, spec, backend=backend)[0])  # noqa: B023
        for backend in (engine_of(run), "torch")
    )
    return errors_of(["waveform"], [expected], [ours]), errors_of(["waveform"], [expected], [plain]), 2e-3


def _log_mel_case(
    run: Run, name: str, spec: LogMelSpec, audio: torch.dtype, features: torch.dtype, gbytes: float, ours_only: bool
) -> None:
    sizes = sizes_of(run)
    clips = noise(run, spec, sizes.clips, sizes.seconds, audio)
    first = clips[:ERROR_CLIPS]
    on_host = first.cpu()
    references: dict[LogMelSpec, Tensor] = {}  # several peers compute the same front-end

    def form(peer: Peer, computed: LogMelSpec | None) -> Form | None:
        if peer.run is None:
            return None
        function = peer.run
        return Form(peer, lambda: function(clips), None if computed is None else lambda: errors(function, computed))

    def errors(function: Callable[[Tensor], Tensor], computed: LogMelSpec) -> dict[str, float]:
        if computed not in references:
            references[computed] = log_mel_reference(on_host, None, computed)[0]
        expected = references[computed]
        found = function(first).double().cpu()
        frames = min(found.shape[1], expected.shape[1])  # some have one more
        expected, found = expected[:, :frames], found[:, :frames]
        largest = (found - expected).abs().max().item()
        return rounded({"features": relative_error(expected, found), "largest": largest})

    frames = int(spec.frames(clips.shape[1]))
    moved = (clips.numel() * audio.itemsize + sizes.clips * frames * spec.n_mels * features.itemsize) / 1e9
    case = {
        **{"kernel": "log-mel", "front_end": name, "clips": sizes.clips, "seconds": sizes.seconds},
        **{"audio": dtype_name(audio), "dtype": dtype_name(features), "least_gbytes": significant(moved)},
    }
    forms = log_mel_forms(spec, run.device, audio, features, ours_only=ours_only)
    pairs = [(peer, form(peer, computed)) for peer, computed in forms]
    compare(run, case, pairs, against(1e3 * moved / gbytes, gbytes_s=moved))


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def attention_inputs(run: Run, batch: int, heads: int, frames: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """q, k, v [B, H, T, d] as views of [B, T, H, d]; table and gate float32; all require gradients."""
    generator = torch.Generator(run.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=run.device)

    q, k, v = (normal(batch, frames, heads, HEAD_WIDTH).to(dtype).transpose(1, 2) for _ in range(3))
    leaves = (q, k, v, normal(heads, 2 * frames - 1), 1 + normal(batch, heads, frames))
    return [leaf.requires_grad_() for leaf in leaves]


def attention_section(run: Run) -> None:
    """Gated-Toeplitz attention: checks, then the forward pass and both passes beside the peers."""
    sizes = sizes_of(run)
    engine = engine_of(run)
    for dtype in dict.fromkeys((torch.float32, run.dtype)):
        for frames in (37, sizes.frames):
            for lengths in (None, [frames, frames // 3]):
                given = None if lengths is None else torch.tensor(lengths, device=run.device)
                x = attention_inputs(run, 2, sizes.heads, frames, dtype, seed=frames)
                upstream = torch.randn_like(x[0]).detach()
                case = {"kernel": "attention", "frames": frames, "dtype": dtype_name(dtype), "lengths": lengths}
                check_error(run, case, functools.partial(_attention_errors, run, x, upstream, given))
                ours = functools.partial(gated_toeplitz_attention, lengths=given, backend=engine)
                check_repeats(run, case, functools.partial(both_ways, ours, x, upstream))
    x = attention_inputs(run, 2, sizes.heads, sizes.frames, run.dtype, seed=1)
    ours = functools.partial(gated_toeplitz_attention, backend=engine)
    call = functools.partial(both_ways, ours, x, torch.ones_like(x[0]))
    check_graph(run, {"kernel": "attention", "dtype": dtype_name(run.dtype)}, call, x)
    run.record.section(run.name, checked=True)

    tflops, gbytes = measured_matmul(run), measured_copy(run)
    for batch in sizes.attention_batches:
        for passes in ("forward", "forward and backward"):
            if run.left < 3:
                run.add({"batch": batch, "passes": passes, "peer": None, "reason": "not reached: no time left"})
                return
            _attention_case(run, batch, passes, tflops, gbytes)


def _attention_errors(
    run: Run, x: list[Tensor], upstream: Tensor, lengths: Tensor | None
) -> tuple[dict[str, float], dict[str, float], float]:
    exact = [leaf.detach().double().requires_grad_() for leaf in x]
    reference = functools.partial(gated_toeplitz_attention_reference, lengths=lengths)
    expected = both_ways(reference, exact, upstream.double())
    names = ("output", *NAMES)
    ours, plain = (
        errors_of(
            names,
            expected,
            both_ways(functools.partial(gated_toeplitz_attention, lengths=lengths, backend=backend), x, upstream),
        )
        for backend in (engine_of(run), "torch")
    )
    return ours, plain, 2.5 * ROUNDING[x[0].dtype]


def _attention_case(run: Run, batch: int, passes: str, tflops: float, gbytes: float) -> None:
    sizes = sizes_of(run)
    sets = [attention_inputs(run, batch, sizes.heads, sizes.frames, run.dtype, seed) for seed in range(2)]
    small = attention_inputs(run, 2, sizes.heads, min(37, sizes.frames), run.dtype, seed=7)
    upstream, small_upstream = torch.randn_like(sets[0][0]), torch.randn_like(small[0])
    exact = [leaf.detach().double().requires_grad_() for leaf in small]
    expected = both_ways(gated_toeplitz_attention_reference, exact, small_upstream.double())
    backward = passes != "forward"

    def form(peer: Peer) -> Form | None:
        if peer.run is None:
            return None
        function, turn = peer.run, [0]

        def call() -> object:
            turn[0] += 1
            x = sets[turn[0] % len(sets)]
            if backward:
                return both_ways(function, x, upstream)
            with torch.no_grad():
                return function(*x)

        def errors() -> dict[str, float]:
            return errors_of(("output", *NAMES), expected, both_ways(function, small, small_upstream))

        return Form(peer, call, errors)

    value = batch * sizes.heads * sizes.frames * HEAD_WIDTH * run.dtype.itemsize / 1e9
    # Forward: q, k, v and the output, two products. Backward: those and the output's gradient in, three out, five.
    gflop = 4e-9 * batch * sizes.heads * sizes.frames**2 * HEAD_WIDTH * (3.5 if backward else 1.0)
    moved = value * (4 + (8 if backward else 0))
    floor = max(gflop / tflops, 1e3 * moved / gbytes)
    case = {
        **{"kernel": "attention", "passes": passes, "batch": batch, "heads": sizes.heads, "frames": sizes.frames},
        **{"head_width": HEAD_WIDTH, "dtype": dtype_name(run.dtype), "least_gbytes": significant(moved)},
    }
    peers = attention_forms(run.device)
    compare(run, case, [(peer, form(peer)) for peer in peers], against(floor, tflops=gflop / 1e3, gbytes_s=moved))


# ---------------------------------------------------------------------------------------------------------------------
# The memory-bound kernels of the towers
# ---------------------------------------------------------------------------------------------------------------------


def layer_norm_gelu_section(run: Run) -> None:
    """GELU of a LayerNorm: checks, then the rows of WavLM's first convolution for 16 clips of 10 s."""
    sizes = sizes_of(run)
    engine = engine_of(run)
    names = ("output", "x", "weight", "bias")

    def inputs(rows: int, channels: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator(run.device).manual_seed(rows)
        x, upstream = (torch.randn(rows, channels, device=run.device, generator=generator).to(dtype) for _ in range(2))
        weight, bias = torch.randn(2, channels, device=run.device, generator=generator).to(dtype)
        return [x.requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()], upstream

    for dtype in dict.fromkeys((torch.float32, run.dtype)):
        for rows, channels in ((1, sizes.channels), (1001, sizes.channels), (64, 33)):
            x, upstream = inputs(rows, channels, dtype)
            case = {"kernel": "layer_norm_gelu", "rows": rows, "channels": channels, "dtype": dtype_name(dtype)}

            def found(x: list[Tensor] = x, upstream: Tensor = upstream, dtype: torch.dtype = dtype) -> Any:
                exact = [leaf.detach().double().requires_grad_() for leaf in x]
                expected = both_ways(layer_norm_gelu_reference, exact, upstream.double())
                ours, plain = (
                    errors_of(
                        names, expected, both_ways(functools.partial(layer_norm_gelu, backend=backend), x, upstream)
                    )
                    for backend in (engine, "torch")
                )
                return ours, plain, ROUNDING[dtype]

            check_error(run, case, found)
            ours = functools.partial(layer_norm_gelu, backend=engine)
            check_repeats(run, case, functools.partial(both_ways, ours, x, upstream))
    x, upstream = inputs(1001, sizes.channels, run.dtype)
    call = functools.partial(both_ways, functools.partial(layer_norm_gelu, backend=engine), x, upstream)
    check_graph(run, {"kernel": "layer_norm_gelu", "dtype": dtype_name(run.dtype)}, call, [*x, upstream])
    run.record.section(run.name, checked=True)

    gbytes = measured_copy(run)
    leaves, upstream = inputs(sizes.rows, sizes.channels, run.dtype)
    few, few_upstream = inputs(8, sizes.channels, run.dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in few]
    expected = both_ways(layer_norm_gelu_reference, exact, few_upstream.double())
    for passes, times in (("forward", 2), ("forward and backward", 5)):  # x, y; and x, dy, dx

        def form(peer: Peer, passes: str = passes) -> Form | None:
            if peer.run is None:
                return None
            function = peer.run

            def call() -> object:
                if passes != "forward":
                    return both_ways(function, leaves, upstream)
                with torch.no_grad():
                    return function(*leaves)

            return Form(peer, call, lambda: errors_of(names, expected, both_ways(function, few, few_upstream)))

        moved = times * sizes.rows * sizes.channels * run.dtype.itemsize / 1e9
        case = {
            **{"kernel": "layer_norm_gelu", "passes": passes, "rows": sizes.rows, "channels": sizes.channels},
            **{"dtype": dtype_name(run.dtype), "least_gbytes": significant(moved)},
        }
        peers = layer_norm_gelu_forms(run.device)
        compare(run, case, [(p, form(p)) for p in peers], against(1e3 * moved / gbytes, gbytes_s=moved))


def normalize_waveform_section(run: Run) -> None:
    """Normalised waveforms: checks, then a large int16 batch with given and with measured statistics."""
    sizes = sizes_of(run)
    engine = engine_of(run)
    spec = FRONT_ENDS["kaldi-80"]

    def inputs(clips: int, seconds: float, audio: torch.dtype, given: bool) -> list[Any]:
        wave = noise(run, spec, clips, seconds, audio)
        statistic = torch.full((clips,), 0.1, device=run.device) if given else None
        return [wave, ragged(wave), statistic, statistic]

    for audio, dtype in dict.fromkeys(
        ((torch.float32, torch.float32), (torch.int16, torch.float32), (torch.int16, run.dtype))
    ):
        for given in (False, True):
            x = inputs(3, sizes.check_seconds, audio, given)
            case = {"kernel": "normalize_waveform", "audio": dtype_name(audio), "dtype": dtype_name(dtype)}
            case |= {"statistics": "given" if given else "measured"}

            def found(x: list[Any] = x, dtype: torch.dtype = dtype) -> Any:
                on_host: list[Any] = [None if value is None else value.cpu() for value in x]
                expected = normalize_waveform_reference(*on_host)
                ours, plain = (
                    errors_of(["waveform"], [expected], [normalize_waveform(*x, dtype=dtype, backend=backend)])
                    for backend in (engine, "torch")
                )
                return ours, plain, ROUNDING[dtype]

            check_error(run, case, found)
            ours = functools.partial(normalize_waveform, *x, dtype=dtype, backend=engine)
            check_repeats(run, case, lambda ours=ours: [ours()])  # type: ignore[misc]
    x = inputs(3, sizes.check_seconds, torch.int16, False)
    call = lambda: [normalize_waveform(*x, dtype=run.dtype, backend=engine)]  # noqa: E731
    check_graph(run, {"kernel": "normalize_waveform", "dtype": dtype_name(run.dtype)}, call, x[:2])
    run.record.section(run.name, checked=True)

    gbytes = measured_copy(run)
    for given in (True, False):
        x = inputs(sizes.clips, sizes.seconds, torch.int16, given)
        first: list[Any] = [None if value is None else value[:1] for value in x]
        on_host: list[Any] = [None if value is None else value.cpu() for value in first]
        exact = normalize_waveform_reference(*on_host)

        def form(peer: Peer, x: list[Any] = x, first: list[Any] = first, exact: Tensor = exact) -> Form | None:
            if peer.run is None:
                return None
            function = peer.run
            return Form(peer, lambda: function(*x), lambda: errors_of(["waveform"], [exact], [function(*first)]))

        # Statistics need all samples before the first result: read twice, as no cache holds them. Padding is written.
        read = int(x[1].sum()) * (1 if given else 2)
        moved = (2 * read + x[0].numel() * run.dtype.itemsize) / 1e9
        timed: Row = {
            **{"kernel": "normalize_waveform", "statistics": "given" if given else "measured", "clips": sizes.clips},
            **{"seconds": sizes.seconds, "audio": "int16", "dtype": dtype_name(run.dtype)},
            **{"least_gbytes": significant(moved)},
        }
        peers = waveform_forms(run.device, run.dtype)
        compare(run, timed, [(p, form(p)) for p in peers], against(1e3 * moved / gbytes, gbytes_s=moved))
