"""Step time, memory and traffic on 1 to 1,024 GPUs and batches of up to 8 million clips, by arithmetic.

    python -m bench.scale_model [--records bench/records/gpu/DEVICE] [--embeddings float32|bfloat16] > docs/scaling.md

Single-GPU figures come from the records of a device's lots `step` and `loss` (`bench.gpu`) where there are any, and are
predictions where not; the page says which. Traffic is that of the collectives that the code really calls, tensor by
tensor: a test compares it with what processes hand to torch.distributed. Time on a wire is its bytes over the
slowest link's rate; every constant is a flag.

With N clips, W GPUs, D dimensions, P parameters, e bytes a number of an embedding:

    encoders       N/W · (time of a clip, forward and backward)        · 4/3 − 1/3n in n chunks of the gradient cache
    loss           4 · 2·N²·D / W over the rate of large products      (3 once the exponentials fit into memory)
    b, ids, norms  all-gather; column sums and maxima: all-reduce; db: reduce-scatter, float32
    gradients      all-reduce of 4·P bytes, hidden behind the last chunk's backward pass as far as that takes
    optimizer      28 bytes a parameter through memory (weight, gradient and two moments read, all but one written)

An all-gather or a reduce-scatter of S bytes in all sends S·(W − 1)/W from each GPU, an all-reduce twice that (ring).
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from bench import model_flops
from bench.gpu.records import read_all
from bench.run import SIZES
from bench.tables import markdown

WORLDS = (1, 8, 64, 256, 1024)
BATCHES = (8192, 65536, 524288, 1 << 20, 1 << 21, 1 << 23)
GPUS_A_NODE = 8
HEADER_FIELDS = 15  # numbers that ranks compare before a loss
OWN_FLAGS = 3  # of the training loop: finite, stop, and the norm of sharded gradients


# ---------------------------------------------------------------------------------------------------------------------
# traffic


@dataclass(frozen=True)
class Collective:
    """One call: what it carries, its kind, and the bytes of the whole tensor (over all ranks, for a gather)."""

    what: str
    kind: str  # all-gather, reduce-scatter or all-reduce
    nbytes: int


def wire_bytes(kind: str, nbytes: int, world: int) -> float:
    """Bytes that each rank sends in a ring."""
    return nbytes * (world - 1) / world * (2 if kind == "all-reduce" else 1)


def loss_collectives(rows: int, dim: int, world: int, itemsize: int, engine: str, ids: bool = True) -> list[Collective]:
    """What `fastclap.info_nce` sends with a process group, both directions and all gradients.

    Args:
        rows: global batch, N = M, shared equally.
        dim: of the embeddings.
        world: number of ranks.
        itemsize: bytes of a number of an embedding, 2 or 4.
        engine: "triton" or "torch".
        ids: whether positives are given by ids.
    """
    depth = dim if engine == "torch" else -(-dim // 16) * 16
    found = [
        Collective("agreement on shapes and flags", "all-gather", 8 * HEADER_FIELDS * world),
        Collective("embeddings b", "all-gather", rows * depth * itemsize),
        Collective("loss", "all-reduce", 8),
        Collective("gradient of the scale", "all-reduce", 8),
        Collective("gradient of b", "reduce-scatter", 4 * rows * depth),
        Collective("largest logit", "all-reduce", 4),
    ]
    if ids:
        found += [Collective("ids of a", "all-gather", 8 * rows), Collective("ids of b", "all-gather", 8 * rows)]
    if engine == "torch":
        return [*found, Collective("column sums", "all-reduce", 8 * rows)]
    if not ids:
        found.append(Collective("logits of the pairs", "all-reduce", 4 * rows))
    return [
        *found,
        Collective("norms of b", "all-gather", 4 * rows),
        Collective("column maxima", "all-reduce", 4 * rows),
        Collective("column sums", "all-reduce", 3 * 8 * rows),
    ]


def gradient_collectives(parameters: int, flags: int = OWN_FLAGS) -> list[Collective]:
    """What `fastclap.train.distributed.Gradients` sends in a step, its buckets taken together."""
    return [
        Collective("gradients", "all-reduce", 4 * parameters),
        Collective("flags", "all-reduce", 4 * flags),
    ]


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[tuple[str, int]]]:
    """Records (kind, bytes of the whole tensor) of what goes through torch.distributed inside the block."""
    found: list[tuple[str, int]] = []

    def counting(kind: str, function: Any, position: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor: Tensor = args[position]
            found.append((kind, tensor.numel() * tensor.element_size()))
            return function(*args, **kwargs)

        return call

    with (
        mock.patch.object(
            dist, "all_gather_into_tensor", counting("all-gather", dist.all_gather_into_tensor, position=0)
        ),
        mock.patch.object(
            dist, "reduce_scatter_tensor", counting("reduce-scatter", dist.reduce_scatter_tensor, position=1)
        ),
        mock.patch.object(dist, "all_reduce", counting("all-reduce", dist.all_reduce, position=0)),
    ):
        yield found


# ---------------------------------------------------------------------------------------------------------------------
# time and memory


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU and its links; `source` says where they come from."""

    clip_ms: float  # forward and backward of one pair, no cache
    second_forward: float = 4 / 3  # cost with many chunks in the gradient cache over cost without
    loss_tflops: float = 0.71 * 790  # of large products inside the loss, for 16-bit embeddings
    copy_tbytes: float = 4.3
    memory_gb: float = 141.0
    multiprocessors: int = 132
    nvlink_gbytes: float = 450.0  # each way, per GPU
    infiniband_gbytes: float = 50.0  # each way, per GPU (one 400 Gb/s adapter for each)
    link_share: float = 0.8  # of a link's rate that a collective reaches
    latency_us: float = 20.0  # of a hop; a collective has log2(W) of them
    source: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """What is trained: parameters under training, embedding dimension, and bytes kept for a clip at a time."""

    parameters: int
    dim: int
    itemsize: int  # of an embedding
    chunk: int  # of the gradient cache
    chunk_gb: float  # activations of a chunk
    clip_bytes: int  # int16 samples of a clip


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step's parts on each of W GPUs, bytes that each sends, and bytes that each holds."""

    seconds: dict[str, float]
    sent: dict[str, float]
    held: dict[str, float]

    @property
    def step(self) -> float:
        return sum(self.seconds.values())


def predict(model: Model, machine: Machine, rows: int, world: int) -> Prediction:
    """A step with a global batch of `rows` on `world` GPUs."""
    local = rows / world
    chunks = math.ceil(local / model.chunk)
    rate = machine.loss_tflops * 1e12 / (2 if model.itemsize == 4 else 1)  # TF32 has half the rate of 16-bit products
    one_pass = 2 * rows**2 * model.dim / world
    stored = local * rows * model.itemsize <= 0.25e9 * machine.memory_gb
    link = 1e9 * machine.link_share * (machine.nvlink_gbytes if world <= GPUS_A_NODE else machine.infiniband_gbytes)

    def on_the_wire(collectives: Sequence[Collective]) -> tuple[float, float]:
        sent = sum(wire_bytes(c.kind, c.nbytes, world) for c in collectives)
        hops = len(collectives) * math.ceil(math.log2(world)) if world > 1 else 0
        return sent, sent / link + 1e-6 * machine.latency_us * hops

    loss_sent, loss_seconds = on_the_wire(loss_collectives(rows, model.dim, world, model.itemsize, "triton"))
    gradients_sent, gradient_seconds = on_the_wire(gradient_collectives(model.parameters))
    clip = 1e-3 * machine.clip_ms
    overlap = 2 / 3 * clip * min(local, model.chunk)
    seconds = {
        "encoders": local * clip * (1 + (machine.second_forward - 1) * (1 - 1 / chunks)),  # one has its graph already
        "loss": (3 if stored else 4) * one_pass / rate,
        "loss, links": loss_seconds,
        "gradients, links": max(0.0, gradient_seconds - overlap),
        "optimizer": 28 * model.parameters / (1e12 * machine.copy_tbytes),
    }
    chunk = min(local, chunk_rows(machine.multiprocessors, model.dim, rows * model.itemsize))
    held = {
        "weights, gradients, optimizer": 16.0 * model.parameters,
        "activations": 1e9 * model.chunk_gb * min(1.0, local / model.chunk),
        "own samples and embeddings": local * (model.clip_bytes + 4 * 4 * model.dim),
        "gathered b and its gradient": rows * model.dim * (model.itemsize + 4.0),
        "chunk of the matrix": float(rows) * (local if stored else chunk) * model.itemsize,
        "partial sums": 3 * 4.0 * rows * math.ceil(chunk / 128),
    }
    return Prediction(seconds, {"loss": loss_sent, "gradients": gradients_sent}, held)


def chunk_rows(multiprocessors: int, dim: int, row_bytes: int = 0) -> int:
    """Rows of a chunk of the loss; the Triton engine's own rule."""
    wave = min(8448, max(1024, multiprocessors * 128 * 256 // dim // 128 * 128))
    return max(128, min(wave, (16 << 30) // max(row_bytes, 1) // 128 * 128))


# ---------------------------------------------------------------------------------------------------------------------
# single-GPU figures


def machine_from(records: Path | None, flops: float, constants: dict[str, Any]) -> Machine:
    """Rates from the records in a device's folder, predictions of what they do not have.

    Raises:
        SystemExit: the folder holds neither a timed step nor a timed loss.
    """
    machine = Machine(clip_ms=1e3 * flops / (0.5 * 790e12), **constants)
    source = {
        "a clip": f"PREDICTION: {flops / 1e12:.3g} TFLOP at half of 790 TFLOP/s",
        "the gradient cache": "PREDICTION: a second forward pass of all chunks but one, up to a third more work",
        "the loss": "PREDICTION: products at 71 % of 790 TFLOP/s for 16-bit embeddings, half of that for float32",
    }
    if records is None:
        return replace(machine, source=source)
    found = read_all(records)
    plain, cached = (_timed(found, "step", form=form) for form in ("fastclap", "fastclap, gradient cache"))
    losses = _timed(found, "loss", loss="info_nce", form="fastclap Triton")
    if not plain and not losses:
        raise SystemExit(f"{records}: no timed row of our step or loss in it; run python -m bench.gpu --lots step loss")
    if plain:
        best = max(plain, key=_clips_per_second)
        machine = replace(machine, clip_ms=1e3 / _clips_per_second(best))
        where = f"batch of {best['case']['rows']}, {found['step']['device']}"
        source["a clip"] = f"measured: {_clips_per_second(best):.4g} clips/s ({where})"
        if cached:
            most = max(cached, key=_clips_per_second)
            machine = replace(machine, second_forward=_clips_per_second(best) / _clips_per_second(most))
            where = f"batch of {most['case']['rows']}, {found['step']['device']}"
            source["the gradient cache"] = f"measured: {_clips_per_second(most):.4g} clips/s ({where})"
    if losses:
        best = max(losses, key=_loss_tflops)
        machine = replace(machine, loss_tflops=_loss_tflops(best))
        source["the loss"] = (
            f"measured: {_loss_tflops(best):.4g} TFLOP/s at N = {best['case']['rows']:,} in bfloat16 "
            f"({found['loss']['device']}); float32 half"
        )
    return replace(machine, source=source)


def _timed(records: dict[str, dict[str, Any]], lot: str, **case: str) -> list[dict[str, Any]]:
    """A lot's rows of these cases that have a time."""
    rows = records.get(lot, {}).get("rows", [])
    return [r for r in rows if "median_ms" in r and all(r["case"].get(name) == value for name, value in case.items())]


def _clips_per_second(row: dict[str, Any]) -> float:
    return 1e3 * row["case"]["rows"] / row["median_ms"]


def _loss_tflops(row: dict[str, Any]) -> float:
    """Of a loss that multiplies four times, forward and backward."""
    return 4 * 2e-9 * row["case"]["rows"] ** 2 * row["case"]["dim"] / row["median_ms"]


# ---------------------------------------------------------------------------------------------------------------------
# page


def page(model: Model, machine: Machine, command: str) -> str:
    """The page: assumptions, tables, and what they say."""
    cells = {(n, w): predict(model, machine, n, w) for n in BATCHES for w in WORLDS if n >= w}
    predicted = any(text.startswith("PREDICTION") for text in machine.source.values())
    parts = [
        "# Scaling: where a step's time, memory and traffic go",
        f"Written by `{command}`; see `bench/scale_model.py` for the formulas. **Every number is computed, not measured"
        f"{'' if predicted else ', except the single-GPU rates'}.** Single-GPU rates:",
        "\n".join(f"- {name}: {text}" for name, text in machine.source.items()),
        f"Links: {machine.nvlink_gbytes:g} GB/s each way per GPU within a node of {GPUS_A_NODE}, "
        f"{machine.infiniband_gbytes:g} GB/s between nodes, {machine.link_share:.0%} of it reached, "
        f"{machine.latency_us:g} µs a hop. Memory: {machine.copy_tbytes:g} TB/s, {machine.memory_gb:g} GB. Model: "
        f"{model.parameters / 1e6:.0f} M parameters, {model.dim} dimensions, embeddings of {model.itemsize} bytes a "
        f"number, chunks of {model.chunk} clips in the gradient cache with {model.chunk_gb:g} GB of activations (an "
        "assumption).",
        "## Step time in seconds",
        "Share of the loss with its links in brackets; † where a GPU's memory does not suffice.",
        markdown(
            ["global batch", *(f"{w:,} GPU{'s' if w > 1 else ''}" for w in WORLDS)],
            [[f"{n:,}", *(_step_cell(cells.get((n, w)), machine) for w in WORLDS)] for n in BATCHES],
        ),
        "## Parts of a step",
    ]
    shown = [(n, w) for n, w in ((65536, 8), (524288, 64), (1 << 20, 256), (1 << 23, 1024)) if (n, w) in cells]
    names = list(cells[shown[0]].seconds)
    parts.append(
        markdown(
            ["part, ms", *(f"{n:,} on {w:,}" for n, w in shown)],
            [[name, *(f"{1e3 * cells[key].seconds[name]:,.4g}" for key in shown)] for name in names],
        )
    )
    parts.append(
        markdown(
            ["sent by each GPU, GB", *(f"{n:,} on {w:,}" for n, w in shown)],
            [[name, *(f"{cells[key].sent[name] / 1e9:,.3g}" for key in shown)] for name in ("loss", "gradients")],
        )
    )
    held = list(cells[shown[0]].held)
    parts.append(
        markdown(
            ["held by each GPU, GB", *(f"{n:,} on {w:,}" for n, w in shown)],
            [
                *([name, *(f"{cells[key].held[name] / 1e9:,.3g}" for key in shown)] for name in held),
                ["all", *(f"{sum(cells[key].held.values()) / 1e9:,.4g}" for key in shown)],
            ],
        )
    )
    parts += ["## What the embeddings' exchange consists of", _exchange(model, *shown[-1])]
    parts += ["## Where the next bottleneck lies", *_conclusions(model, machine, cells)]
    return "\n\n".join(parts) + "\n"


def _step_cell(cell: Prediction | None, machine: Machine) -> str:
    if cell is None:
        return ""
    loss_share = (cell.seconds["loss"] + cell.seconds["loss, links"]) / cell.step
    full = "" if sum(cell.held.values()) <= 1e9 * machine.memory_gb else " †"
    return f"{cell.step:.3g} ({loss_share:.1%}){full}"


def _exchange(model: Model, rows: int, world: int) -> str:
    calls = loss_collectives(rows, model.dim, world, model.itemsize, "triton")
    calls = sorted((c for c in calls if c.nbytes > 4096), key=lambda c: -wire_bytes(c.kind, c.nbytes, world))
    table = markdown(
        ["tensor", "collective", f"sent by each GPU at {rows:,} on {world:,}, GB"],
        [[c.what, c.kind, f"{wire_bytes(c.kind, c.nbytes, world) / 1e9:.3g}"] for c in calls],
    )
    return f"{table}\n\nThe rest is a few numbers."


def _conclusions(model: Model, machine: Machine, cells: dict[tuple[int, int], Prediction]) -> Iterator[str]:
    largest = max(cells)
    cell = cells[largest]
    first = max(cell.seconds, key=lambda name: cell.seconds[name])
    yield (
        f"**Time: the {first}.** At {largest[0]:,} clips on {largest[1]:,} GPUs they take "
        f"{cell.seconds[first] / cell.step:.1%} of a step; the loss takes {cell.seconds['loss'] / cell.step:.2%}, the "
        f"exchange of embeddings {cell.seconds['loss, links'] / cell.step:.2%}, gradients beyond what hides behind the "
        f"backward pass {cell.seconds['gradients, links'] / cell.step:.2%}."
    )
    clip = machine.clip_ms * machine.second_forward
    rate = machine.loss_tflops * 1e12 / (2 if model.itemsize == 4 else 1)
    per_clip = 1e3 * 8 * largest[0] * model.dim / rate
    yield (
        f"The loss costs 8·N·D/rate a clip, {per_clip:.3g} ms at N = {largest[0]:,}, however many GPUs share it, "
        f"against {clip:.3g} ms in the encoders. It is half of the step only where a clip takes {per_clip:.2g} ms in "
        f"its encoders, {clip / per_clip:.0f} times less than here, or at a global batch of "
        f"{largest[0] * clip / per_clip:.2g} clips."
    )
    full = [key for key in sorted(cells) if sum(cells[key].held.values()) > 1e9 * machine.memory_gb]
    many = [key for key in full if key[1] == max(WORLDS)]
    if many:
        key = many[0]
        held = cells[key].held
        name = max(held, key=lambda part: held[part])
        fits = min(
            (n for n in range(1 << 16, 1 << 24, 1 << 16) if not _fits(model, machine, n, max(WORLDS))), default=None
        )
        yield (
            f"**Memory: the {name}.** On {max(WORLDS):,} GPUs the first batch of the table that does not fit is "
            f"{key[0]:,}: the {name} alone takes {held[name] / 1e9:.3g} GB"
            + (f" (by the formulas the limit is near {fits:,})." if fits else ".")
            + f" Every GPU holds all of b and its gradient ({held['gathered b and its gradient'] / 1e9:.3g} GB there), "
            "which only a loss that passes blocks of b around a ring would avoid."
        )
    else:
        yield "**Memory:** every batch of the table fits where it is shared by the largest number of GPUs."
    key = (min(BATCHES), max(WORLDS))
    cell, reduced = cells[key], wire_bytes("all-reduce", 4 * model.parameters, key[1])
    seconds = reduced / (1e9 * machine.link_share * machine.infiniband_gbytes)
    yield (
        f"**Strong scaling: the gradients' all-reduce.** Between nodes it takes {1e3 * seconds:.3g} ms whatever the "
        f"batch, hidden behind the last backward pass from about {math.ceil(seconds / (2e-3 / 3 * machine.clip_ms))} "
        f"clips a GPU on. At {key[0]:,} clips on {key[1]:,} GPUs a GPU has {key[0] / key[1]:g}: "
        f"{1e3 * cell.seconds['encoders']:.3g} ms of encoders, and {1e3 * cell.seconds['gradients, links']:.3g} ms of "
        "waiting. More GPUs want a larger batch."
    )
    node = GPUS_A_NODE * 1e3 / clip
    yield (
        f"**Input.** A node encodes {node:,.0f} clips a second and reads {node * model.clip_bytes / 1e9:.2g} GB/s of "
        "int16 samples; packed shards and a local disk or page cache have to keep up with that, decoders of compressed "
        "files as a rule do not."
    )


def _fits(model: Model, machine: Machine, rows: int, world: int) -> bool:
    return sum(predict(model, machine, rows, world).held.values()) <= 1e9 * machine.memory_gb


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, help="a device's folder of records, bench/records/gpu/DEVICE")
    parser.add_argument("--parameters", type=float, default=594e6, help="under training")
    parser.add_argument("--embeddings", choices=("float32", "bfloat16"), default="float32", help="given to the loss")
    parser.add_argument("--chunk", type=int, default=64, help="clips a chunk of the gradient cache")
    parser.add_argument("--chunk-gb", type=float, default=60.0, help="activations of a chunk, assumed")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip")
    for name, value in vars(Machine(clip_ms=0.0)).items():
        if isinstance(value, (int, float)) and name not in ("clip_ms", "second_forward", "loss_tflops"):
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return parser


def report(arguments: argparse.Namespace) -> str:
    """The page for parsed arguments."""
    size = SIZES["large"]
    samples = round(arguments.seconds * 16000)
    flops = model_flops.training_step(size.wavlm, size.xlm_roberta, size.dim, [samples], [32])
    names = [name for name in vars(Machine(clip_ms=0.0)) if name in vars(arguments)]
    constants = {name: getattr(arguments, name) for name in names}
    machine = machine_from(arguments.records, flops, constants)
    itemsize = 4 if arguments.embeddings == "float32" else 2
    model = Model(round(arguments.parameters), size.dim, itemsize, arguments.chunk, arguments.chunk_gb, 2 * samples)
    flags = "" if arguments.records is None else f" --records {arguments.records}"
    if arguments.embeddings != "float32":
        flags += f" --embeddings {arguments.embeddings}"
    return page(model, machine, f"python -m bench.scale_model{flags}")


def main() -> None:
    print(report(parser().parse_args()), end="")


if __name__ == "__main__":
    main()
