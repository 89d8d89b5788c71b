"""Stages of the lots `loss` and `loss_more`: the contrastive losses compared with their peers' own packages.

T = 2·N²·D flops is one matmul pass. `useful_tflops` counts 3 passes for every form (the least with the matrix of
logits in memory), `tflops_4t` counts 4 (the least without). `share_of_peak` is the former over the rate of one large
bf16 product in the same lot. Memory is the highest point of a call above its inputs, gradients included.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import peers, timing
from bench.compare import ceilings, compare
from bench.gpu.profiled import profiled
from bench.peers import SCALE
from bench.run import NOT_REACHED, Case, Entry, Row, Run, dtype_name, significant
from fastclap.kernels.contrastive.shared import QueueRows
from fastclap.losses import info_nce, sigmoid_loss

# Relative error that is always accepted; above it, the error of the materialised form on the same numbers is the bound.
BOUND = {torch.bfloat16: 2e-3, torch.float32: 1e-5}
THREE_PASSES = "fastclap Triton, 3 passes"
MAIN_FORMS = (
    *("fastclap Triton", THREE_PASSES, "materialised, compiled", "open_clip, compiled", "open_clip", "materialised"),
    *("inf_cl", "memeff", "fastclap torch"),
)
LATENCY_FORMS = ("fastclap Triton", "fastclap torch", "materialised, compiled", "materialised", "open_clip")
LOSSES: dict[str, Callable[..., Any]] = {
    "info_nce": info_nce,
    "sigmoid": functools.partial(sigmoid_loss, logit_bias=peers.SIGMOID_BIAS),
}
OUR_KERNELS = (  # of `fastclap.kernels.contrastive.triton_kernels`
    *("rows", "sums", "combine", "gradient", "finish", "total", "upstream", "best", "sigmoid"),
)
CALLS = 20  # in a row, of a sample of the latency
PROFILED = 3  # steps


@dataclass(frozen=True)
class LossSizes:
    main: tuple[int, ...]
    dim: int
    accuracy: tuple[tuple[int, int], ...]  # N and D
    stages: tuple[tuple[int, int], ...]
    small: tuple[int, ...]
    more: tuple[tuple[int, int], ...]
    others: tuple[int, ...]  # N of the other peers, at `dim`
    sigmoid: tuple[int, ...]
    contrasts: tuple[int, int, int]  # N, D, and the queue's entries of each side
    largest: tuple[int, int]
    case_seconds: float  # of the timed loop of one case
    warm_up_seconds: float  # the most one form may take to compile, tune and run twice


GPU = LossSizes(
    main=(65536, 16384, 4096, 1024, 256),
    dim=768,
    accuracy=((4096, 768), (8191, 1024), (1000, 512)),
    stages=((65536, 768),),
    small=(256, 1024, 4096),
    more=((65536, 512), (65536, 1024), (16384, 512), (16384, 1024)),
    others=(65536, 16384),
    sigmoid=(65536, 16384),
    contrasts=(16384, 768, 65536),
    largest=(1 << 20, 768),
    case_seconds=4.0,
    warm_up_seconds=25.0,
)
CPU = LossSizes(
    main=(256, 32),
    dim=48,
    accuracy=((257, 48),),
    stages=((256, 64),),
    small=(32,),
    more=((128, 32),),
    others=(64,),
    sigmoid=(128,),
    contrasts=(64, 32, 128),
    largest=(512, 32),
    case_seconds=0.02,
    warm_up_seconds=20.0,
)


def sizes_of(run: Run) -> LossSizes:
    return CPU if run.tiny else GPU


# ---------------------------------------------------------------------------------------------------------------------
# errors


def errors(run: Run) -> None:
    """Loss and gradients of our engine against float64 at three scales, exponentials kept and formed twice."""
    for rows, dim in sizes_of(run).accuracy:
        for scale in (1.0, SCALE, 100.0):
            inputs = timing.embeddings(rows, dim, scale, run.device, run.dtype, seed=rows)
            for loss in LOSSES:
                case = {"check": "float64", "loss": loss, "rows": rows, "dim": dim, "scale": round(scale, 2)}
                ways: dict[str, dict[str, Any]] = {"one way": {}}
                if loss == "info_nce" and not run.tiny:
                    ways = {f"{n} passes": {"keep_exponentials": n == 3} for n in (3, 4)}
                cases = {way: {**case, "exponentials": way} for way in ways}
                if all(run.known(case) for case in cases.values()):
                    continue
                first = next(iter(cases.values()))
                expected = run.attempt(first, functools.partial(peers.reference, loss, *inputs), 30.0)
                if expected is None:
                    continue
                for way, case in cases.items():
                    engine = functools.partial(LOSSES[loss], backend=run.engine, **ways[way])
                    run.measure(case, functools.partial(_checked, engine, loss, expected, inputs, run.dtype), 30.0)


def _checked(
    engine: peers.Loss, loss: str, expected: tuple[Tensor, ...], inputs: tuple[Tensor, ...], dtype: torch.dtype
) -> Row:
    found = peers.errors(engine, expected, *inputs)
    naive = peers.errors(peers.MATERIALISED[loss], expected, *inputs)
    # A gradient that is missing, or NaN, fails.
    good = all(error is not None and error <= max(BOUND[dtype], naive[name] or 0.0) for name, error in found.items())
    first, second = (timing.output_and_gradients(engine, inputs) for _ in range(2))
    repeats = all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    facts = {"errors_of_materialised": naive, "bound": BOUND[dtype], "repeats": repeats}
    return {"passed": good and repeats, "errors": found, **facts}


# ---------------------------------------------------------------------------------------------------------------------
# times


def main(run: Run) -> None:
    """InfoNCE forward and backward, the sizes that matter most first."""
    for rows in sizes_of(run).main:
        _loss_case(run, "info_nce", rows, sizes_of(run).dim, MAIN_FORMS)


def more(run: Run) -> None:
    """Other widths, and the other peers."""
    for rows in sizes_of(run).others:
        others = [peer.name for peer in peers.info_nce_peers(torch.device("cpu"), SCALE) if peer.name not in MAIN_FORMS]
        _loss_case(run, "info_nce", rows, sizes_of(run).dim, ("fastclap Triton", *others))
    for rows, dim in sizes_of(run).more:
        _loss_case(run, "info_nce", rows, dim, MAIN_FORMS)


def sigmoid(run: Run) -> None:
    """SigLIP's loss, forward and backward."""
    for rows in sizes_of(run).sigmoid:
        _loss_case(run, "sigmoid", rows, sizes_of(run).dim, None)


def _loss_case(run: Run, loss: str, rows: int, dim: int, names: Sequence[str] | None) -> None:
    """All forms of those names, in their order, at one size."""
    sizes, (tflops, _) = sizes_of(run), ceilings(run)
    entries = loss_entries(run, loss, rows, dim, sizes.warm_up_seconds, tflops)
    if names is not None:
        entries = sorted((entry for entry in entries if entry.form in names), key=lambda entry: names.index(entry.form))
    compare(run, entries, seconds=sizes.case_seconds)


def loss_entries(
    run: Run, loss: str, rows: int, dim: int, seconds: float, peak_tflops: float | None = None
) -> list[Entry]:
    """Every form of a loss at one size, forward and backward, on the same inputs.

    Args:
        run: whose device and dtype they have.
        loss: "info_nce" or "sigmoid".
        rows: N.
        dim: D.
        seconds: the most that one form may take to compile, to tune and to run for the first times.
        peak_tflops: of large products, for the share that a form reaches.
    """
    inputs = timing.larger_than_cache(rows, dim, SCALE, run.device, run.dtype)
    expected = functools.cache(lambda: peers.reference(loss, *inputs[0]))  # once, when the first form needs it
    entries = []
    for peer in peers.info_nce_peers(run.device, SCALE) if loss == "info_nce" else peers.sigmoid_peers(run.device):
        case = {"loss": loss, "rows": rows, "dim": dim, "dtype": dtype_name(run.dtype), "form": peer.name}
        entry = Entry(
            case,
            make=None,
            facts={**peer.facts, "passes": peer.passes, "scale_gradient": peer.scale_gradient},
            work=lambda ms: peers.loss_rates(rows, dim, ms, peak_tflops),
            seconds=seconds,
        )
        if peer.run is not None:
            entry.make = functools.partial(timing.forward_backward, peer.run, inputs)
            if rows <= 65536:
                entry.errors = functools.partial(lambda form: peers.errors(form, expected(), *inputs[0]), peer.run)
        entries.append(entry)
    return entries


# ---------------------------------------------------------------------------------------------------------------------
# what else InfoNCE may contrast


def contrasts(run: Run) -> None:
    """InfoNCE with a guide, a queue, debiasing and Matryoshka prefixes, beside the plain one."""
    rows, dim, entries = sizes_of(run).contrasts
    compare(run, contrast_entries(run, rows, dim, entries), seconds=sizes_of(run).case_seconds)


def contrast_entries(run: Run, rows: int, dim: int, entries: int) -> list[Entry]:
    """A form for each, ours; `entries` of the queue on each side."""
    tflops, _ = ceilings(run)
    one_pass = 2e-9 * rows**2 * dim / (tflops or math.inf)  # ms
    inputs = timing.larger_than_cache(rows, dim, SCALE, run.device, run.dtype)
    found = []
    for name, (passes, options) in _contrasts(run, rows, dim, entries).items():
        entry = Entry(
            {"contrast": "info_nce", "rows": rows, "dim": dim, "dtype": dtype_name(run.dtype), "form": name},
            make=functools.partial(
                timing.forward_backward, functools.partial(info_nce, backend=run.engine, **options), inputs
            ),
            facts={"passes": passes, "floor_ms": significant(passes * one_pass)},
            seconds=sizes_of(run).warm_up_seconds,
        )
        entry.errors = functools.partial(_contrast_errors, run.engine, options, inputs[0])
        found.append(entry)
    return found


def _contrasts(run: Run, rows: int, dim: int, entries: int) -> dict[str, tuple[float, dict[str, Any]]]:
    """By name: products of 2·N²·D flops, where no exponentials are kept, and options of `info_nce`.

    A guide's product gives the thresholds, and is formed again with each of our two. Each side of a queue is a block of
    its own in both of ours, and in one of the other two: its entries get no gradient.
    """
    teacher = timing.embeddings(rows, dim, 1.0, run.device, run.dtype, seed=rows)
    sides = timing.embeddings(entries, dim, 1.0, run.device, run.dtype, seed=entries)
    widths = tuple(dim >> n for n in (0, 1, 2, 3))
    return {
        "plain": (4, {}),
        "guide": (7, {"teacher": tuple(x.detach() for x in teacher), "guide_margin": 0.05}),
        "debias": (4, {"debias": 0.01}),
        f"matryoshka {', '.join(map(str, widths))}": (4 * sum(widths) / dim, {"matryoshka": widths}),
        f"queue of {entries:,}": (4 + 6 * entries / rows, {"queue": QueueRows(*(x.detach() for x in sides[:2]))}),
    }


def _contrast_errors(
    engine: str, options: dict[str, Any], inputs: tuple[Tensor, Tensor, Tensor]
) -> dict[str, float | None]:
    expected = peers.reference("info_nce", *inputs, **options)
    return peers.errors(functools.partial(info_nce, backend=engine, **options), expected, *inputs)


# ---------------------------------------------------------------------------------------------------------------------
# small batches


def latency(run: Run) -> None:
    """Small batches as a program calls them: many calls in a row by the wall clock, the slower of host and device."""
    for case, form, call in _small_calls(run, "calls in a row"):
        run.measure(case, functools.partial(_successive, call, run.device, form.notes), sizes_of(run).warm_up_seconds)


def _successive(call: Callable[[], object], device: torch.device, notes: str) -> Row:
    timing.warmed_up(call)
    times = timing.Timing.of([timing.steady_ms(call, device, CALLS) for _ in range(5)])
    return {**times.as_dict(), "notes": notes}


def graphs(run: Run) -> None:
    """Small batches as a captured CUDA graph: device time of a replay, and whether it gives what a call gives."""
    for case, form, call in _small_calls(run, "graph"):
        run.measure(case, functools.partial(_replayed, call, run.device, form.notes), sizes_of(run).warm_up_seconds)


def _replayed(call: Callable[[], Tensor], device: torch.device, notes: str) -> Row:
    expected = call().clone()
    replay = timing.captured(call, device)
    same = torch.equal(expected, replay())
    times = timing.interleaved({"replay": replay}, device, 0.5, least=10, most=100)["replay"]
    return {"passed": same, **times.as_dict(), "notes": notes}


def _small_calls(run: Run, mode: str) -> Iterator[tuple[Case, peers.Peer, Callable[[], Tensor]]]:
    """Forward and backward passes of small batches that this run has no row of."""
    sizes = sizes_of(run)
    for rows in sizes.small:
        if run.device.type == "cuda":
            torch.compiler.reset()
        inputs = timing.embeddings(rows, sizes.dim, SCALE, run.device, run.dtype)
        for form in peers.info_nce_peers(run.device, SCALE):
            case = {"latency": mode, "rows": rows, "dim": sizes.dim, "dtype": dtype_name(run.dtype), "form": form.name}
            if form.run is not None and form.name in LATENCY_FORMS and not run.known(case):
                yield case, form, timing.forward_backward(form.run, [inputs])


# ---------------------------------------------------------------------------------------------------------------------
# stages of a step


def stages(run: Run) -> None:
    """Where the time of a step goes, by kernel, and the floor of each stage; then the products by themselves."""
    tflops, gbytes = ceilings(run)
    names = ("fastclap torch",) if run.tiny else ("fastclap Triton", THREE_PASSES)
    for rows, dim in sizes_of(run).stages:
        one_pass = 2e-9 * rows**2 * dim / (tflops or math.inf)  # ms
        inputs = timing.larger_than_cache(rows, dim, SCALE, run.device, run.dtype)
        for form in peers.info_nce_peers(run.device, SCALE):
            case = {"rows": rows, "dim": dim, "form": form.name}
            whole = {**case, "stage": "whole step"}
            if form.name not in names or form.run is None or run.known(whole):
                continue
            call = timing.forward_backward(form.run, inputs)
            found = run.attempt(whole, functools.partial(_profiled, call, run.device), 30.0)
            if found is None:
                continue
            step, kernels = found
            for stage, row in _by_stage(kernels, step, form.passes).items():
                passes = row.pop("passes", None)
                if passes:
                    row["floor_ms"] = significant(passes * one_pass)
                elif stage == "gradient" and gbytes:  # reads and writes what was kept, one 16-bit number a pair
                    row["floor_ms"] = significant(4e-6 * rows**2 / gbytes)
                run.add({**case, "stage": stage}, **row)
        chunk = _chunk_rows(run.device, rows, dim)
        case = {"rows": rows, "dim": dim, "form": "torch.mm"}
        products = {**case, "stage": "P3 G·B"}
        if run.known(products):
            continue
        measured = run.attempt(products, functools.partial(_products, run, chunk, rows, dim), 30.0)
        for name, timed in (measured or {}).items():
            floor = significant(one_pass * chunk / rows)
            run.add({**case, "stage": name}, chunk_rows=chunk, **timed.as_dict(), floor_ms=floor)
        timing.release()


def _profiled(call: Callable[[], object], device: torch.device) -> tuple[timing.Timing, dict[str, float]]:
    """Times of a step, and its milliseconds by kernel."""
    for _ in range(2):
        call()
    step = timing.interleaved({"step": call}, device, 2.0, most=20)["step"]
    kernels = profiled(lambda: [call() for _ in range(PROFILED)], device).kernels
    return step, {name: ms / PROFILED for name, (ms, _) in kernels.items()}


def _by_stage(by_kernel: dict[str, float], step: timing.Timing, passes_of_step: int) -> dict[str, Row]:
    """Figures of the whole step, of each stage and of the longest kernels; `passes` of those that multiply."""
    grouped: dict[str, float] = {}
    for kernel, milliseconds in by_kernel.items():
        grouped[stage_of(kernel)] = grouped.get(stage_of(kernel), 0.0) + milliseconds
    passes = {"sums": 1, "gradient": passes_of_step - 3, "products": 2}
    found: dict[str, Row] = {"whole step": {**step.as_dict(), "passes": passes_of_step}}
    for stage, milliseconds in sorted(grouped.items(), key=lambda item: -item[1]):
        found[stage] = {"kernel_ms": significant(milliseconds), "passes": passes.get(stage)}
    longest = sorted(by_kernel.items(), key=lambda item: -item[1])[:12]
    found["kernels"] = {"kernels_ms": {name[:120]: significant(ms) for name, ms in longest}}
    return found


def stage_of(kernel: str) -> str:
    name = kernel.lower()
    for stage in OUR_KERNELS:
        if name.strip("_").startswith(f"{stage}_kernel"):
            return stage
    if any(part in name for part in ("gemm", "nvjet", "cutlass", "xmma", "aten::mm", "aten::addmm")):
        return "products"
    return "other"


def _chunk_rows(device: torch.device, rows: int, dim: int) -> int:
    """As many as the engine takes at a time."""
    if device.type != "cuda":
        return max(1, rows // 4)
    from fastclap.kernels.contrastive.triton_operands import chunk_rows

    properties = torch.cuda.get_device_properties(device)
    return min(rows, chunk_rows(10 * properties.major + properties.minor, properties.multi_processor_count, dim))


def _products(run: Run, chunk: int, rows: int, dim: int) -> dict[str, timing.Timing]:
    """dA = G·B and dB += Gᵀ·A of one chunk as the library multiplies them, into float32."""
    sets = []
    for _ in range(2):
        g = torch.randn(chunk, rows, device=run.device, dtype=run.dtype)
        a, b = (torch.randn(n, dim, device=run.device, dtype=run.dtype) for n in (chunk, rows))
        sets.append((g, a, b))
    turn = {"P3 G·B": 0, "P4 Gᵀ·A": 0}

    def product(name: str) -> Tensor:
        turn[name] += 1
        g, a, b = sets[turn[name] % len(sets)]
        left, right = (g, b) if name.startswith("P3") else (g.t(), a)
        return torch.mm(left, right, out_dtype=torch.float32) if run.device.type == "cuda" else torch.mm(left, right)

    calls = {name: (lambda name=name: product(name)) for name in turn}
    for call in calls.values():
        call()
    return timing.interleaved(calls, run.device, 2.0, most=50)


# ---------------------------------------------------------------------------------------------------------------------
# the largest batch


def largest(run: Run) -> None:
    """One step at the largest batch: does it fit, and how long does it take."""
    rows, dim = sizes_of(run).largest
    tflops, _ = ceilings(run)
    case = {"largest": "one step", "loss": "info_nce", "rows": rows, "dim": dim, "dtype": dtype_name(run.dtype)}
    if run.known(case):
        return
    # Four passes at 40 % of the peak: no use to begin with less time.
    needed = 4 * 2e-12 * rows**2 * dim / (0.4 * tflops) if tflops else 0.0
    if needed > run.left:
        run.add(case, reason=f"{NOT_REACHED}: a step takes about {needed:.0f} s, {run.left:.0f} s are left")
        return
    run.measure(case, functools.partial(_one_step, run, rows, dim, tflops), run.left)


def _one_step(run: Run, rows: int, dim: int, peak_tflops: float | None) -> Row:
    loss = functools.partial(info_nce, backend=run.engine)
    timing.forward_backward(loss, [timing.embeddings(min(rows, 16384), dim, SCALE, run.device, run.dtype)])()
    inputs = timing.embeddings(rows, dim, SCALE, run.device, run.dtype)
    call = timing.forward_backward(loss, [inputs])
    values: list[float] = []

    def timed() -> None:
        def step() -> None:
            values.append(call().item())

        values.append(timing.elapsed_ms(step, run.device))

    peak = timing.peak_bytes(timed, run.device)
    value, milliseconds = values
    if not math.isfinite(value) or not all(t.grad is not None and bool(t.grad.isfinite().all()) for t in inputs):
        raise ArithmeticError("the loss or a gradient is not finite")
    figures = {**timing.Timing.of([milliseconds]).as_dict(), "peak_bytes": peak, "loss_value": value}
    return {**figures, **peers.loss_rates(rows, dim, milliseconds, peak_tflops)}
