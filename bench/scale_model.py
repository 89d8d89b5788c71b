"""Step time, memory and traffic on 1 to 1,024 GPUs and batches of up to 8 million clips, by arithmetic.

    python -m bench.scale_model [--machine H100|H200] [--records bench/records/gpu/DEVICE]
        [--embeddings float32|bfloat16] > docs/scaling.md

Single-GPU figures come from the records of a device's lots `step` and `loss` (`bench.gpu`) where there are any, and are
predictions where not; the page says which. Traffic is that of the collectives that the code really calls, tensor by
tensor: a test compares it with what processes hand to torch.distributed. Time on a wire is its bytes over the
slowest link's rate; every constant is a flag.

With N clips, W GPUs, D dimensions, P parameters, e bytes a number of an embedding:

    encoders       N/W · (time of a clip, forward and backward)        · 4/3 − 1/3n in n chunks of the gradient cache;
                   where that takes longer, the launches of all chunks, one after the other, by the host
    loss           4 · 2·N²·D / W over the rate of large products      (3 once a GPU's exponentials take up to 256 MiB)
    b, ids, norms  all-gather; column sums and maxima: all-reduce; db: reduce-scatter, float32
    gradients      all-reduce of 4·P bytes, hidden behind the last chunk's backward pass as far as that takes
    optimizer      28 bytes a parameter through memory (weight, gradient and two moments read, all but one written)

The training loop compares what ranks pass to the loss once for each batch size of a run, and no step counts that here.
An all-gather or a reduce-scatter of S bytes in all sends S·(W − 1)/W from each GPU, an all-reduce twice that (ring).
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from bench import model_flops
from bench.gpu.records import read_all
from bench.machines import H200, MACHINES, MULTIPROCESSORS, Machine
from bench.run import SIZES
from bench.tables import markdown
from fastclap.train.distributed import _BUCKET_BYTES

WORLDS = (1, 8, 64, 256, 1024)
BATCHES = (8192, 65536, 524288, 1 << 20, 1 << 21, 1 << 23)
GPUS_A_NODE = 8
KEPT_BYTES = 256 << 20  # of exponentials, up to which the loss keeps them
HEADER_FIELDS = 19  # numbers that ranks compare before a loss
OWN_FLAGS = 3  # of the training loop: finite, stop, and the norm of sharded gradients
# Traced by `bench.step_trace --tags 0 --compile`: kernels that the host launches for the forward and the backward pass
# of a chunk, whatever its size, and for the optimizer; MB of gradients that leave in the last part of the backward
# pass.
TRACED = "32 clips of 10 s, layers compiled"
LAUNCHES, OPTIMIZER_LAUNCHES = (1047, 1505), 30
LAST_MB, LAST_PART = 19, 0.05


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


def loss_collectives(
    rows: int, dim: int, world: int, itemsize: int, engine: str, ids: bool = True, agreed: bool = False
) -> list[Collective]:
    """What `fastclap.info_nce` sends with a process group, both directions and all gradients.

    Args:
        rows: global batch, N = M, shared equally.
        dim: of the embeddings.
        world: number of ranks.
        itemsize: bytes of a number of an embedding, 2 or 4.
        engine: "triton" or "torch".
        ids: whether positives are given by ids.
        agreed: whether ranks have agreed on such a call before, with `agree_once`.
    """
    found = [
        Collective("embeddings b", "all-gather", rows * dim * itemsize),
        Collective("gradient of b", "reduce-scatter", 4 * rows * dim),
    ]
    if not agreed:
        found.append(Collective("agreement on shapes and flags", "all-gather", 8 * HEADER_FIELDS * world))
    if ids:
        found += [Collective("ids of a", "all-gather", 8 * rows), Collective("ids of b", "all-gather", 8 * rows)]
    if engine == "torch":
        return [
            *found,
            Collective("largest logit", "all-reduce", 4),
            Collective("column sums", "all-reduce", 8 * rows),
            Collective("loss", "all-reduce", 8),
            Collective("gradient of the scale", "all-reduce", 8),
        ]
    return [
        *found,
        Collective("norms of b", "all-gather", 4 * rows),
        Collective("bounds of the logits", "all-reduce", 3 * 4),
        Collective("column maxima", "all-reduce", 8 * rows),
        Collective("column sums", "all-reduce", 3 * 8 * rows),
        Collective("loss and gradient of the scale", "all-reduce", 2 * 8),
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
class Cluster:
    """Rates of one GPU, its host and its links; `source` says where they come from."""

    gpu: Machine
    clip_ms: float  # forward and backward of one pair, no cache
    second_forward: float = 4 / 3  # cost with many chunks in the gradient cache over cost without
    loss_share: float = 0.71  # of the rate of large products, reached inside the loss by 16-bit embeddings
    launch_us: float = 5.0  # of the host, for a kernel: assumed
    nvlink_gbytes: float = 450.0  # each way, per GPU
    infiniband_gbytes: float = 50.0  # each way, per GPU (one 400 Gb/s adapter for each)
    link_share: float = 0.8  # of a link's rate that a collective reaches
    latency_us: float = 20.0  # of a hop; a collective has log2(W) of them
    tcp_us: float = 50.0  # of a hop between hosts: assumed
    source: dict[str, str] = field(default_factory=dict)

    @property
    def loss_tflops(self) -> float:
        return self.loss_share * self.gpu.tflops

    @property
    def memory(self) -> float:
        """In bytes."""
        return 1e9 * self.gpu.gbytes

    def link(self, world: int) -> float:
        """Bytes a second that a collective of `world` ranks sends each way."""
        return 1e9 * self.link_share * (self.nvlink_gbytes if world <= GPUS_A_NODE else self.infiniband_gbytes)


@dataclass(frozen=True)
class Model:
    """What is trained: parameters under training, embedding dimension, and bytes kept for a clip at a time."""

    parameters: int
    dim: int
    itemsize: int  # of an embedding
    chunk: int  # of the gradient cache
    clip_gb: float  # activations of a clip
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


def encoder_seconds(model: Model, cluster: Cluster, local: float) -> tuple[float, float]:
    """What `local` clips take the device, and what their launches take the host; a step takes at least the longer."""
    chunks = math.ceil(local / model.chunk)
    again = chunks - 1  # one chunk has its graph already
    device = 1e-3 * cluster.clip_ms * local * (1 + (cluster.second_forward - 1) * again / chunks)
    return device, 1e-6 * cluster.launch_us * (chunks * sum(LAUNCHES) + again * LAUNCHES[0])


def predict(model: Model, cluster: Cluster, rows: int, world: int) -> Prediction:
    """A step of training, not its first, with a global batch of `rows` on `world` GPUs."""
    local = rows / world
    rate = cluster.loss_tflops * 1e12 / (2 if model.itemsize == 4 else 1)  # TF32 has half the rate of 16-bit products
    one_pass = 2 * rows**2 * model.dim / world
    kept = local * rows * model.itemsize <= KEPT_BYTES

    def on_the_wire(collectives: Sequence[Collective]) -> tuple[float, float]:
        sent = sum(wire_bytes(c.kind, c.nbytes, world) for c in collectives)
        hops = len(collectives) * math.ceil(math.log2(world)) if world > 1 else 0
        return sent, sent / cluster.link(world) + 1e-6 * cluster.latency_us * hops

    loss = loss_collectives(rows, model.dim, world, model.itemsize, "triton", agreed=True)
    loss_sent, loss_seconds = on_the_wire(loss)
    gradients_sent, gradient_seconds = on_the_wire(gradient_collectives(model.parameters))
    launch = 1e-6 * cluster.launch_us
    last_backward = max(2e-3 / 3 * cluster.clip_ms * min(local, model.chunk), launch * LAUNCHES[1])
    seconds = {
        "encoders": max(encoder_seconds(model, cluster, local)),
        "loss": (3 if kept else 4) * one_pass / rate,
        "loss, links": loss_seconds,
        "gradients, links": max(0.0, gradient_seconds - last_backward),
        "optimizer": max(28 * model.parameters / (1e12 * cluster.gpu.tbytes), launch * OPTIMIZER_LAUNCHES),
    }
    chunk = min(local, chunk_rows(MULTIPROCESSORS, model.dim, rows * model.itemsize))
    held = {
        "weights, gradients, optimizer": 16.0 * model.parameters,
        "activations": 1e9 * model.clip_gb * min(local, model.chunk),
        "own samples and embeddings": local * (model.clip_bytes + 4 * 4 * model.dim),
        "gathered b and its gradient": rows * model.dim * (model.itemsize + 4.0),
        "chunk of the matrix": float(rows) * (local if kept else chunk) * model.itemsize,
        "partial sums": (3 + 2 * 4) * 4.0 * rows * math.ceil(chunk / 128),  # of columns, and of rows: two a tile
    }
    return Prediction(seconds, {"loss": loss_sent, "gradients": gradients_sent}, held)


def chunk_rows(multiprocessors: int, dim: int, row_bytes: int = 0) -> int:
    """Rows of a chunk of the loss; the Triton engine's own rule."""
    wave = min(8448, max(1024, multiprocessors * 128 * 256 // dim // 128 * 128))
    return max(128, min(wave, (16 << 30) // max(row_bytes, 1) // 128 * 128))


# ---------------------------------------------------------------------------------------------------------------------
# single-GPU figures


def cluster_from(records: Path | None, flops: float, gpu: Machine, constants: dict[str, Any]) -> Cluster:
    """Rates from the records in a device's folder, predictions of what they do not have.

    Raises:
        SystemExit: the folder holds neither a timed step nor a timed loss.
    """
    cluster = Cluster(gpu, clip_ms=1e3 * flops / (0.5e12 * gpu.tflops), **constants)
    source = {
        "a clip": f"PREDICTION: {flops / 1e12:.3g} TFLOP at half of {gpu.tflops:g} TFLOP/s",
        "the gradient cache": "PREDICTION: a second forward pass of all chunks but one, up to a third more work",
        "the loss": f"PREDICTION: products at {cluster.loss_share:.0%} of {gpu.tflops:g} TFLOP/s for 16-bit "
        "embeddings, half of that for float32",
    }
    if records is None:
        return replace(cluster, source=source)
    found = read_all(records)
    plain, cached = (_timed(found, "step", form=form) for form in ("fastclap", "fastclap, gradient cache"))
    losses = _timed(found, "loss", loss="info_nce", form="fastclap Triton")
    if not plain and not losses:
        raise SystemExit(f"{records}: no timed row of our step or loss in it; run python -m bench.gpu --lots step loss")
    if plain:
        best = max(plain, key=_clips_per_second)
        cluster = replace(cluster, clip_ms=1e3 / _clips_per_second(best))
        where = f"batch of {best['case']['rows']}, {found['step']['device']}"
        source["a clip"] = f"measured: {_clips_per_second(best):.4g} clips/s ({where})"
        if cached:
            most = max(cached, key=_clips_per_second)
            cluster = replace(cluster, second_forward=_clips_per_second(best) / _clips_per_second(most))
            where = f"batch of {most['case']['rows']}, {found['step']['device']}"
            source["the gradient cache"] = f"measured: {_clips_per_second(most):.4g} clips/s ({where})"
    if losses:
        best = max(losses, key=_loss_tflops)
        cluster = replace(cluster, loss_share=_loss_tflops(best) / gpu.tflops)
        source["the loss"] = (
            f"measured: {_loss_tflops(best):.4g} TFLOP/s at N = {best['case']['rows']:,} in bfloat16 "
            f"({found['loss']['device']}); float32 half"
        )
    return replace(cluster, source=source)


def _timed(records: dict[str, dict[str, Any]], lot: str, **case: str) -> list[dict[str, Any]]:
    """A lot's rows of these cases that have a time."""
    rows = records.get(lot, {}).get("rows", [])
    return [r for r in rows if "median_ms" in r and all(r["case"].get(name) == value for name, value in case.items())]


def _clips_per_second(row: dict[str, Any]) -> float:
    return 1e3 * row["case"]["rows"] / row["median_ms"]


def _loss_tflops(row: dict[str, Any]) -> float:
    """Of a loss that multiplies four times, forward and backward, or three where it keeps exponentials of 16 bits."""
    rows = row["case"]["rows"]
    passes = 3 if 2 * rows**2 <= KEPT_BYTES else 4
    return passes * 2e-9 * rows**2 * row["case"]["dim"] / row["median_ms"]


# ---------------------------------------------------------------------------------------------------------------------
# page


def page(model: Model, clusters: Sequence[Cluster], command: str) -> str:
    """The page: assumptions, tables of the first of `clusters` and of all side by side, and what they say."""
    cluster, gpu = clusters[0], clusters[0].gpu
    cells = {(n, w): predict(model, cluster, n, w) for n in BATCHES for w in WORLDS if n >= w}
    predicted = any(text.startswith("PREDICTION") for text in cluster.source.values())
    parts = [
        "# Scaling: where a step's time, memory and traffic go",
        f"Written by `{command}`; see `bench/scale_model.py` for the formulas. **Every number is computed, not measured"
        f"{'' if predicted else ', except the single-GPU rates'}.** Rates of one {gpu.name}:",
        "\n".join(f"- {name}: {text}" for name, text in cluster.source.items()),
        f"Links: {cluster.nvlink_gbytes:g} GB/s each way per GPU within a node of {GPUS_A_NODE}, "
        f"{cluster.infiniband_gbytes:g} GB/s between nodes, {cluster.link_share:.0%} of it reached, "
        f"{cluster.latency_us:g} µs a hop. Memory: {gpu.tbytes:g} TB/s, {gpu.gbytes:g} GB. Host: {cluster.launch_us:g} "
        f"µs a launch (assumed), {sum(LAUNCHES):,} launches a chunk (traced). Model: {model.parameters / 1e6:.0f} M "
        f"parameters, {model.dim} dimensions, embeddings of {model.itemsize} bytes a number, activations of "
        f"{model.clip_gb:g} GB a clip (traced), chunks of {model.chunk} clips in the gradient cache, which hold "
        f"{model.chunk * model.clip_gb:.3g} GB.",
        "## Step time in seconds",
        "Share of the loss with its links in brackets; † where a GPU's memory does not suffice.",
        markdown(
            ["global batch", *(f"{w:,} GPU{'s' if w > 1 else ''}" for w in WORLDS)],
            [[f"{n:,}", *(_step_cell(cells.get((n, w)), cluster) for w in WORLDS)] for n in BATCHES],
        ),
    ]
    shown = [(n, w) for n, w in ((65536, 8), (524288, 64), (1 << 20, 256), (1 << 23, 1024)) if (n, w) in cells]
    if len(clusters) > 1:
        parts += [f"## {' beside '.join(c.gpu.name for c in clusters)}", *_side_by_side(model, clusters, shown)]
    parts += ["## Few clips a GPU", *_few_clips(model, clusters, min(BATCHES), max(WORLDS)), "## Parts of a step"]
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
    parts += ["## What ranks exchange", _exchange(model, *shown[-1])]
    parts += [_headers(cluster, max(WORLDS)), _sharded(model)]
    parts += ["## Where the next bottleneck lies", *_conclusions(model, clusters, cells)]
    return "\n\n".join(parts) + "\n"


def _step_cell(cell: Prediction | None, cluster: Cluster) -> str:
    if cell is None:
        return ""
    loss_share = (cell.seconds["loss"] + cell.seconds["loss, links"]) / cell.step
    full = "" if sum(cell.held.values()) <= cluster.memory else " †"
    return f"{cell.step:.3g} ({loss_share:.1%}){full}"


def _side_by_side(model: Model, clusters: Sequence[Cluster], keys: Sequence[tuple[int, int]]) -> Iterator[str]:
    rows = []
    for n, w in keys:
        found = [(predict(model, cluster, n, w), cluster) for cluster in clusters]
        steps = (_step_cell(cell, cluster) for cell, cluster in found)
        rows.append([f"{n:,} on {w:,}", *steps, " / ".join(f"{sum(c.held.values()) / 1e9:.3g}" for c, _ in found)])
    memory = " / ".join(f"{cluster.gpu.gbytes:g}" for cluster in clusters)
    yield markdown(["global batch", *(f"{c.gpu.name}, s" for c in clusters), f"held, GB of {memory}"], rows)
    rates = ", ".join(f"{c.gpu.name} {c.gpu.tflops:g} TFLOP/s and {c.gpu.tbytes:.1f} TB/s" for c in clusters)
    yield (
        f"Assumed rates: {rates}. A clip takes half of the rate of products on each, whatever bytes it moves, so these "
        "times hardly differ; `bench/records/PREDICTED.md` adds the bytes up, on one GPU, and predicts the "
        f"{min(clusters, key=lambda c: c.gpu.tbytes).gpu.name} to be slower."
    )


def _few_clips(model: Model, clusters: Sequence[Cluster], rows: int, world: int) -> Iterator[str]:
    """Where the host or the links take longer than the device."""
    local, reduced = rows / world, wire_bytes("all-reduce", 4 * model.parameters, world)

    def figures(cluster: Cluster) -> list[str]:
        device, host = encoder_seconds(model, cluster, local)
        cell = predict(model, cluster, rows, world)
        sent, backward = reduced / cluster.link(world), 2e-3 / 3 * cluster.clip_ms
        milliseconds = (device, host, sent, cell.seconds["gradients, links"], cell.step)
        return [
            *(f"{1e3 * x:.3g}" for x in milliseconds),
            str(_host_bound(model, cluster)),
            str(math.ceil(sent / backward)),
        ]

    names = (
        *("encoders, device, ms", "encoders, host, ms", "gradients' links, ms", "of them not hidden, ms", "step, ms"),
        *("the host takes longer up to, clips a GPU", "gradients are hidden from, clips a GPU"),
    )
    columns = [figures(cluster) for cluster in clusters]
    yield markdown(
        [f"{rows:,} clips on {world:,} GPUs, {local:g} a GPU", *(c.gpu.name for c in clusters)],
        [[name, *row] for name, row in zip(names, zip(*columns, strict=True), strict=True)],
    )
    last = wire_bytes("all-reduce", LAST_MB * 1_000_000, world) / clusters[0].link(world)
    yield (
        f"The encoders take the longer of device and host. A chunk is {sum(LAUNCHES):,} launches and the optimizer "
        f"{OPTIMIZER_LAUNCHES} (traced: {TRACED}), however few clips it has; their time is assumed, and so is that the "
        "device keeps its rate with few clips. Gradients hide behind the last backward pass as far as it takes: "
        f"traced, {LAST_MB} MB of {4e-9 * model.parameters:.3g} GB leave in its last {LAST_PART:.0%}, in buckets of "
        f"{_BUCKET_BYTES >> 20} MB; on these links they take {1e3 * last:.2g} ms. More GPUs want a larger batch."
    )


def _host_bound(model: Model, cluster: Cluster) -> int:
    """Most clips a GPU, up to a chunk, that take the host longer than the device; 0 where none does."""

    def is_bound(local: int) -> bool:
        device, host = encoder_seconds(model, cluster, local)
        return host > device

    return max(filter(is_bound, range(1, model.chunk + 1)), default=0)


def _exchange(model: Model, rows: int, world: int) -> str:
    calls = loss_collectives(rows, model.dim, world, model.itemsize, "triton", agreed=True)
    calls = sorted((c for c in calls if c.nbytes > 4096), key=lambda c: -wire_bytes(c.kind, c.nbytes, world))
    table = markdown(
        ["tensor of the loss", "collective", f"sent by each GPU at {rows:,} on {world:,}, GB"],
        [[c.what, c.kind, f"{wire_bytes(c.kind, c.nbytes, world) / 1e9:.3g}"] for c in calls],
    )
    return f"{table}\n\nThe rest is a few numbers."


def _headers(cluster: Cluster, world: int) -> str:
    """What a step is spared once ranks have agreed; gloo's ring is that of its `allgather.cc`."""
    return (
        "**Checks before the loss.** Ranks compare shapes and options once for each batch size of a run, and no step "
        "above counts that. In every step, as `info_nce` does by default, gloo would pass "
        f"{8 * HEADER_FIELDS} bytes of each rank around a ring of hosts: {world - 1:,} hops on {world:,} GPUs, a "
        f"predicted {1e-3 * cluster.tcp_us * (world - 1):.2g} ms at {cluster.tcp_us:g} µs a hop over TCP (assumed). "
        "The host of each rank would wait there for the slowest one, and no longer run ahead of its GPU."
    )


def _sharded(model: Model) -> str:
    weights = 4e-9 * model.parameters
    return (
        f"**Sharded towers** (`--shard`; P parameters in the towers, GB as if all {model.parameters / 1e6:.0f} M were "
        f"there). A step of several backward passes gathers 4·P bytes ({weights:.3g} GB) once, whatever the number of "
        "chunks; a step of one pass gathers them twice. Gradients are reduce-scattered once, 4·P bytes. During several "
        f"passes a process holds weights and gradients whole, 8·P bytes ({2 * weights:.3g} GB); of the optimizer's "
        "state, another 8·P, it holds one part in W."
    )


def _conclusions(model: Model, clusters: Sequence[Cluster], cells: dict[tuple[int, int], Prediction]) -> Iterator[str]:
    cluster, largest = clusters[0], max(cells)
    cell = cells[largest]
    first = max(cell.seconds, key=lambda name: cell.seconds[name])
    yield (
        f"**Time: the {first}.** At {largest[0]:,} clips on {largest[1]:,} GPUs they take "
        f"{cell.seconds[first] / cell.step:.1%} of a step; the loss takes {cell.seconds['loss'] / cell.step:.2%}, the "
        f"exchange of embeddings {cell.seconds['loss, links'] / cell.step:.2%}, gradients beyond what hides behind the "
        f"backward pass {cell.seconds['gradients, links'] / cell.step:.2%}."
    )
    clip = cluster.clip_ms * cluster.second_forward
    rate = cluster.loss_tflops * 1e12 / (2 if model.itemsize == 4 else 1)
    per_clip = 1e3 * 8 * largest[0] * model.dim / rate
    yield (
        f"The loss costs 8·N·D/rate a clip, {per_clip:.3g} ms at N = {largest[0]:,}, however many GPUs share it, "
        f"against {clip:.3g} ms in the encoders. It is half of the step only where a clip takes {per_clip:.2g} ms in "
        f"its encoders, {clip / per_clip:.0f} times less than here, or at a global batch of "
        f"{largest[0] * clip / per_clip:.2g} clips."
    )
    name = max(cell.held, key=lambda part: cell.held[part])
    limits = " and ".join(f"{_limit(model, c, largest[1]) / 1e6:.1f} M clips on {c.gpu.name}s" for c in clusters)
    yield (
        f"**Memory: the {name}.** At {largest[0]:,} clips on {largest[1]:,} GPUs that is {cell.held[name] / 1e9:.3g} "
        f"of {sum(cell.held.values()) / 1e9:.4g} GB; by the formulas the largest batch of {largest[1]:,} GPUs is "
        f"{limits}. Every GPU holds all of b and its gradient "
        f"({cell.held['gathered b and its gradient'] / 1e9:.3g} GB there), which only a loss that passes blocks of b "
        "around a ring would avoid."
    )
    node = GPUS_A_NODE * 1e3 / clip
    yield (
        f"**Input.** A node encodes {node:,.0f} clips a second and reads {node * model.clip_bytes / 1e9:.2g} GB/s of "
        "int16 samples; packed shards and a local disk or page cache have to keep up with that, decoders of compressed "
        "files as a rule do not."
    )


def _limit(model: Model, cluster: Cluster, world: int) -> int:
    """Largest global batch, to 65,536 clips, before the first that does not fit."""
    rows = step = 1 << 16
    while sum(predict(model, cluster, rows, world).held.values()) <= cluster.memory:
        rows += step
    return rows - step


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=[m.name for m in MACHINES], default=H200.name)
    parser.add_argument("--records", type=Path, help="a folder of records of that machine, bench/records/gpu/DEVICE")
    parser.add_argument("--parameters", type=float, default=594e6, help="under training")
    parser.add_argument("--embeddings", choices=("float32", "bfloat16"), default="float32", help="given to the loss")
    parser.add_argument("--chunk", type=int, default=64, help="clips a chunk of the gradient cache")
    parser.add_argument("--clip-gb", type=float, default=0.41, help="activations of a clip of 10 s, traced")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip")
    for constant in fields(Cluster):
        if isinstance(constant.default, float) and constant.name not in ("second_forward", "loss_share"):
            parser.add_argument(f"--{constant.name.replace('_', '-')}", type=float, default=constant.default)
    return parser


def report(arguments: argparse.Namespace) -> str:
    """The page for parsed arguments: of both machines, or of the one whose records these are."""
    size = SIZES["large"]
    samples = round(arguments.seconds * 16000)
    flops = model_flops.training_step(size.wavlm, size.xlm_roberta, size.dim, [samples], [32])
    constants = {c.name: getattr(arguments, c.name) for c in fields(Cluster) if c.name in vars(arguments)}
    machines = sorted(MACHINES, key=lambda machine: machine.name != arguments.machine)
    clusters = [
        cluster_from(arguments.records, flops, machine, constants)
        for machine in (machines if arguments.records is None else machines[:1])
    ]
    itemsize = 4 if arguments.embeddings == "float32" else 2
    model = Model(round(arguments.parameters), size.dim, itemsize, arguments.chunk, arguments.clip_gb, 2 * samples)
    flags = "" if arguments.records is None else f" --records {arguments.records}"
    if arguments.machine != H200.name:
        flags += f" --machine {arguments.machine}"
    if arguments.embeddings != "float32":
        flags += f" --embeddings {arguments.embeddings}"
    return page(model, clusters, f"python -m bench.scale_model{flags}")


def main() -> None:
    print(report(parser().parse_args()), end="")


if __name__ == "__main__":
    main()
