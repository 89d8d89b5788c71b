"""What arithmetic predicts for the kernels and the training step on a GPU, written down before it is measured.

    python -m bench.predictions > bench/records/PREDICTED.md

No figure of this comes from a run. Compare it with the records of `bench.gpu`, and explain a miss in either direction.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import machine_code, model_flops, scale_model
from bench.kernel_peers import FRONT_ENDS
from bench.machines import H100, MACHINES, MULTIPROCESSORS, Machine
from bench.run import SIZES
from bench.tables import markdown
from fastclap.kernels.log_mel.spec import LogMelSpec

# Of both machines
SCHEDULERS, HERTZ = 4, 1.755e9
L2_TBYTES = 8.1  # a second, from others' kernels
# Shares of the rates above that a kernel reaches: assumed.
PRODUCT_SHARE, COPY_SHARE = 0.81, 0.9
GAP_US = 2.0  # between two operations on the device: assumed

# ---------------------------------------------------------------------------------------------------------------------
# InfoNCE

TILE, DEPTH, WARPS = 128, 64, 8  # of P1, P2 and SigLIP's: rows and columns of a tile, a step of its depth


@dataclass(frozen=True)
class FormCost:
    """What a form of the loss and its gradients costs.

    Attributes:
        issued: for each pass of a kernel of ours, instructions that a warp issues a tile and a step: counted in the
            machine code (`bench.machine_code`), no edge of the matrix and no positive in the tile.
        products: passes left to the library's products.
        bytes_per_pair: of device memory, in passes of their own.
        kept_per_pair: bytes of the whole matrix that it holds at once.
        operations: on the device, Triton launches and products among them.
        host_ms: of a call, forward and backward.
    """

    issued: tuple[tuple[int, int], ...]
    products: int
    bytes_per_pair: float
    kept_per_pair: float
    operations: int
    host_ms: float


OURS_OPERATIONS = 7 + 2 + 2  # traced at N = 256 (`bench.host_time`): Triton launches, products and others of torch
# The engine before this one, of 74 operations, was predicted at 0.93; on a CPU this one takes 0.4 of its time
# (`bench/records/host-time`).
OURS_HOST_MS, MATERIALISED_HOST_MS = 0.37, 0.29
FOUR, THREE, MATERIALISED, OPEN_CLIP = (
    *("fastclap, 4 passes", "fastclap, 3 passes"),
    *("materialised, compiled", "open_clip, compiled"),
)
FORMS = {
    FOUR: FormCost(((1028, 73), (884, 85)), 2, 0, 0, OURS_OPERATIONS, OURS_HOST_MS),
    THREE: FormCost(((1122, 73),), 2, 4, 2, OURS_OPERATIONS, OURS_HOST_MS),
    MATERIALISED: FormCost((), 3, 25, 4, 15, MATERIALISED_HOST_MS),
    OPEN_CLIP: FormCost((), 6, 32, 8, 20, MATERIALISED_HOST_MS),
}
SIGMOID = FormCost(((2931, 94),), 2, 0, 0, 4 + 2 + 9, OURS_HOST_MS)
LOSS_ISSUE_SHARE = 0.6  # of the cycles, in which a scheduler issues an instruction: assumed, for 16 warps and barriers
SHARE_OF_MEMORY = 0.9  # that a matrix may take
FLOAT32 = "tf32x3, 32 columns"  # our product of float32 embeddings, in `bench/records/float32-errors`
FLOORS = {"memeff": 5, "quack (two calls)": 6, "liger-kernel (two calls)": 6, "cut-cross-entropy (two calls)": 8}
FLOORS |= {"inf_cl (two calls)": 10}
SIZES_OF_LOSS = (
    *((256, 768), (1024, 768), (4096, 768)),
    *((rows, dim) for rows in (16384, 65536) for dim in (512, 768, 1024)),
    (262144, 768),
)


def issue_to_tensor(issued: tuple[int, int], dim: int) -> float:
    """`bench.machine_code`'s of our tiles."""
    return machine_code.issue_to_tensor(*issued, dim, rows=TILE, columns=TILE, depth=DEPTH, warps=WARPS)


def pass_tflops(issued: tuple[int, int], dim: int, machine: Machine) -> float:
    """The least of what the tensor cores, the instructions and the L2 cache allow a kernel's pass."""
    tensor = 1e-12 * MULTIPROCESSORS * HERTZ * 4096
    by_issue = LOSS_ISSUE_SHARE * tensor / issue_to_tensor(issued, dim)
    by_l2 = L2_TBYTES * TILE / 2  # flops a byte: 2·128·128 over two rows of 128 numbers of 2 bytes
    return min(PRODUCT_SHARE * machine.tflops, by_issue, by_l2)


def device_ms(form: FormCost, rows: int, dim: int, machine: Machine) -> float:
    """Passes of 2·N²·D at the rate of each, bytes of N² pairs, and gaps between operations."""
    one = 2e-9 * rows**2 * dim
    passes = sum(one / pass_tflops(issued, dim, machine) for issued in form.issued)
    products = form.products * one / (PRODUCT_SHARE * machine.tflops)
    moved = form.bytes_per_pair * 1e-9 * rows**2 / (COPY_SHARE * machine.tbytes)
    return passes + products + moved + 1e-3 * GAP_US * form.operations


def fits(form: FormCost, rows: int, machine: Machine) -> bool:
    return form.kept_per_pair * rows**2 <= 1e9 * machine.gbytes * SHARE_OF_MEMORY


def loss_cell(form: FormCost, rows: int, dim: int, machine: Machine) -> str:
    """The longer of device and host; the device's in brackets where that is the host's."""
    if not fits(form, rows, machine):
        return "–"
    ms = device_ms(form, rows, dim, machine)
    return f"{ms:.3g}" if ms >= form.host_ms else f"{form.host_ms:.2g} ({ms:.2g})"


def emulated_error(product: str) -> list[str]:
    """Of float32 gradients with that product: the median of seeds and the largest, from `bench.float32_errors`."""
    lines = Path(__file__).with_name("records").joinpath("float32-errors", "h100.md").read_text(encoding="utf-8")
    cells = next(line.strip("| ").split(" | ") for line in lines.splitlines() if line.startswith(f"| {product} |"))
    return [cells[1], cells[3]]


def loss_rows() -> Iterator[list[str]]:
    for rows, dim in SIZES_OF_LOSS:
        cells = (pair(loss_cell(form, rows, dim, m) for m in MACHINES) for form in FORMS.values())
        yield [f"{rows:,}", str(dim), *cells]


# ---------------------------------------------------------------------------------------------------------------------
# Log-mel

# Of a frame inside a clip, all of its warps, float32 to float32, counted in the machine code for sm_90
# (`bench.machine_code`): instructions, wavefronts of shared memory and L1.
LOG_MEL = {
    "whisper-80": (400, 92),
    "kaldi-80": (505, 108),
    "clsp-128": (548, 113),
    "clap-64": (778, 189),
}
BUSY_SHARES = (0.8, 0.6)  # of the cycles of the pipe that has most to do: assumed, for 16 to 24 warps a multiprocessor
TORCHAUDIO_BYTES = 13e3  # a frame of 400 samples: frames, complex spectrum, magnitudes, squares, mels, logarithm
LOGARITHM_BYTES = 16  # a feature: clamp and log, in place, as float32
CLIPS, SECONDS = 1024, 10


def log_mel_cycles(name: str) -> tuple[float, float]:
    """Cycles a frame of one multiprocessor: to issue, and of the pipe to shared memory and L1."""
    instructions, wavefronts = LOG_MEL[name]
    return instructions / SCHEDULERS, wavefronts


def log_mel_frames(spec: LogMelSpec) -> int:
    return CLIPS * int(spec.frames(SECONDS * spec.sampling_rate))


def log_mel_gbytes(spec: LogMelSpec, sample_bytes: int, feature_bytes: int) -> float:
    """Samples in once, features out once."""
    samples = CLIPS * SECONDS * spec.sampling_rate
    return 1e-9 * (samples * sample_bytes + log_mel_frames(spec) * spec.n_mels * feature_bytes)


def log_mel_ms(name: str, share: float, machine: Machine) -> float:
    """The pipe with most to do, busy in a share of the cycles, or the bytes."""
    spec = FRONT_ENDS[name]
    busy = 1e3 * log_mel_frames(spec) * max(log_mel_cycles(name)) / (MULTIPROCESSORS * HERTZ * share)
    return max(busy, log_mel_gbytes(spec, 4, 4) / (COPY_SHARE * machine.tbytes))


def log_mel_rows() -> Iterator[list[str]]:
    for name, spec in FRONT_ENDS.items():
        floors = (copies(log_mel_gbytes(spec, *sizes)) for sizes in ((4, 4), (2, 2)))
        cycles = (f"{cycles:.0f}" for cycles in log_mel_cycles(name))
        predicted = pair(span(log_mel_ms(name, share, m) for share in BUSY_SHARES) for m in MACHINES)
        yield [name, *cycles, *floors, predicted]


def log_mel_peers() -> Iterator[str]:
    """What bytes alone allow them, float32 in and out."""
    for name in ("whisper-80", "clap-64"):
        spec = FRONT_ENDS[name]
        fused = log_mel_gbytes(spec, 4, 4) + 1e-9 * log_mel_frames(spec) * spec.n_mels * LOGARITHM_BYTES
        yield f"flashmel + log, {name}, {copies(fused)}"
        if spec.n_fft == 400:
            unfused = copies(1e-9 * log_mel_frames(spec) * TORCHAUDIO_BYTES)
            yield f"torchaudio + log, {name}, {unfused}"


# ---------------------------------------------------------------------------------------------------------------------
# Towers

HEADS, FRAMES, WIDTH = 16, 499, 64
# Of attention's kernels in bf16, without dropout and lengths: rows, columns and warps of a tile, and the instructions
# of a warp for it, counted in the machine code for sm_90 (`bench.machine_code`).
ATTENTION = {"forward": (128, 64, 8, 410), "keys": (64, 64, 4, 409), "queries": (64, 64, 4, 493)}
EXPONENTIALS = 16 * MULTIPROCESSORS * HERTZ  # a second
READ = 0.75  # of the samples of clips that are half to all of the batch's width
NORM_ROWS, NORM_COLUMNS = 512_000, 512
NORM_ISSUED = {"forward": 332, "backward": 473}  # of a row's one warp: counted in the machine code
NORM_SHARES = (0.8, 0.6)  # of the cycles, in which a scheduler issues: assumed, for 16 to 32 warps a multiprocessor
NORM_PASSES = {"forward": 2, "backward": 3}  # over [rows, columns] in bf16


def attention_issue_ms(batch: int, kernels: Iterable[str]) -> float:
    """Of all tiles, an instruction a cycle on each scheduler; nothing around the loops over tiles counts."""
    cycles = 0.0
    for name in kernels:
        rows, columns, warps, issued = ATTENTION[name]
        cycles += -(-FRAMES // rows) * -(-FRAMES // columns) * issued * warps / SCHEDULERS
    return 1e3 * batch * HEADS * cycles / (MULTIPROCESSORS * HERTZ)


def attention_rows() -> Iterator[list[str]]:
    for batch in (32, 128):
        for passes, kernels in (("forward", ("forward",)), ("forward and backward", tuple(ATTENTION))):
            backward = passes != "forward"
            gflop = 4e-9 * batch * HEADS * FRAMES**2 * WIDTH * (3.5 if backward else 1)
            gbytes = 2e-9 * batch * HEADS * FRAMES * WIDTH * (12 if backward else 4)
            exponentials = 1e3 * batch * HEADS * FRAMES**2 * len(kernels) / EXPONENTIALS
            issue = attention_issue_ms(batch, kernels)
            products = pair(f"{gflop / m.tflops:.2g}" for m in MACHINES)
            predicted = span(issue / share for share in BUSY_SHARES)
            yield [str(batch), passes, products, copies(gbytes), f"{exponentials:.2g}", f"{issue:.2g}", predicted]


def norm_ms(passes: tuple[str, ...], share: float, machine: Machine) -> float:
    """LayerNorm + GELU: the longer of instructions and bytes, in each pass."""
    total = 0.0
    for name in passes:
        issue = 1e3 * NORM_ROWS * NORM_ISSUED[name] / SCHEDULERS / (MULTIPROCESSORS * HERTZ * share)
        total += max(issue, norm_gbytes((name,)) / (COPY_SHARE * machine.tbytes))
    return total


def norm_gbytes(passes: tuple[str, ...]) -> float:
    return 2e-9 * NORM_ROWS * NORM_COLUMNS * sum(NORM_PASSES[name] for name in passes)


def tower_rows() -> Iterator[list[str]]:
    """GB that have to move, the floor and the prediction."""
    size = f"{NORM_ROWS:,} × {NORM_COLUMNS} bf16"
    for passes in (("forward",), ("forward", "backward")):
        predicted = pair(span(norm_ms(passes, share, m) for share in NORM_SHARES) for m in MACHINES)
        gbytes = norm_gbytes(passes)
        yield [f"layer_norm_gelu, {' and '.join(passes)}", size, f"{gbytes:.3g}", copies(gbytes), predicted]
    size, samples = "1024 × 160,000 int16 to bf16", 1e-9 * CLIPS * SECONDS * 16000
    for statistics, read in (("given", 2), ("measured", 4)):
        gbytes = samples * (READ * read + 2)
        cells = (f"{gbytes:.3g}", copies(gbytes), copies(gbytes / COPY_SHARE))
        yield [f"normalize_waveform, statistics {statistics}", size, *cells]


# ---------------------------------------------------------------------------------------------------------------------
# Training step, with WavLM-Large and an XLM-R base

CAPTION_TOKENS = 32


@dataclass(frozen=True)
class TracedStep:
    """Operations and GB of the forward and the backward pass, and how many of these GB are not those of products."""

    operations: tuple[int, int]
    gbytes: tuple[float, float]
    not_products: float


# By `bench.step_trace --tags 0`, of 32 clips of 10 s, eager and with `--compile`.
TRACED_CLIPS = 32
EAGER = TracedStep((1563, 1769), (45.2, 85.7), 59.9)
COMPILED = TracedStep(scale_model.LAUNCHES, (44.5, 85.0), 58.5)
HELD_BY_128 = 62.4  # GB, traced: with weights, gradients and moments
FREE_SHARE = 0.95  # of the memory, which a process can have
CHUNK = 64  # of the gradient cache
TUNED_SHARES = (0.35, 0.25)  # the reference with TF32 and bf16 autocast: of the rate of products
FLOAT32_TFLOPS = 67.0  # of an H100 or H200 without tensor cores, as the vendor states it
RELEASED_SHARES = (0.7, 0.5)  # the reference as released: of FLOAT32_TFLOPS
HOST_READS, READ_US = 250, 30.0  # numbers that the released step reads off the device, and what each costs
STEPS = (  # rows, compiled, gradient cache
    *((32, False, False), (32, True, False), (64, True, False), (128, True, False)),
    *((256, True, True), (8192, True, True)),
)


def passes_of(step: TracedStep) -> str:
    parts = zip(step.operations, step.gbytes, ("forward", "backward"), strict=True)
    counts = ", ".join(f"{operations:,} operations and {gbytes:g} GB {name}" for operations, gbytes, name in parts)
    return f"{counts}, {step.not_products:g} GB of them not of products"


def pair_tflop() -> float:
    """Of the model, forward and backward pass on one clip and one caption."""
    size = SIZES["large"]
    flops = model_flops.training_step(size.wavlm, size.xlm_roberta, size.dim, [SECONDS * 16000], [CAPTION_TOKENS])
    return 1e-12 * flops


def checkpointed_tflop() -> float:
    """What the reference's gradient checkpointing adds to it: the transformer layers' forward pass once more."""
    wavlm, samples = SIZES["large"].wavlm, SECONDS * 16000
    layers = model_flops.wavlm_forward(wavlm, samples)
    return 1e-12 * (layers - model_flops.wavlm_forward({**wavlm, "num_hidden_layers": 0}, samples))


def parameters() -> int:
    return round(scale_model.parser().parse_args([]).parameters)


def clip_gb() -> float:
    """Activations of one clip and its caption: what a batch of 128 holds, less 16 bytes a parameter."""
    return (HELD_BY_128 - 16e-9 * parameters()) / 128


def held_gb(rows: int, cached: bool, machine: Machine) -> float:
    """As `bench.scale_model` adds it up, with the traced activations."""
    chunk = CHUNK if cached else rows
    model = scale_model.Model(parameters(), 768, 4, chunk, clip_gb(), 2 * SECONDS * 16000)
    alone = scale_model.Cluster(machine, clip_ms=0.0)
    return 1e-9 * sum(scale_model.predict(model, alone, rows, 1).held.values())


def step_ms(rows: int, compiled: bool, cached: bool, machine: Machine) -> float:
    """Products, other bytes, gaps between operations, loss and optimizer, one after the other."""
    traced = COMPILED if compiled else EAGER
    flops, passes, traffic, turns = 1.0, sum(traced.operations), 1.0, rows / TRACED_CLIPS
    launches = passes
    if cached:  # the forward pass of all chunks but one once more
        chunks = -(-rows // CHUNK)
        again = 1 - 1 / chunks
        flops, traffic = 1 + again / 3, 1 + again * traced.gbytes[0] / sum(traced.gbytes)
        launches = passes * chunks + traced.operations[0] * (chunks - 1)
    gbytes = turns * traffic * traced.not_products + 28e-9 * parameters()
    products = 1e3 * rows * flops * pair_tflop() / (PRODUCT_SHARE * machine.tflops)
    loss = device_ms(FORMS[FOUR], rows, 768, machine)
    return products + gbytes / (COPY_SHARE * machine.tbytes) + 1e-3 * GAP_US * launches + loss


def step_cell(rows: int, compiled: bool, cached: bool, machine: Machine) -> str:
    if held_gb(rows, cached, machine) > FREE_SHARE * machine.gbytes:
        return "does not fit"
    ms = step_ms(rows, compiled, cached, machine)
    rate = 1e3 * rows / ms
    return f"{duration((ms,))}, {rate:.0f} clips/s, {rate * pair_tflop() / machine.tflops:.0%}"


def step_rows() -> Iterator[list[str]]:
    for rows, compiled, cached in STEPS:
        form = f"{'compiled' if compiled else 'eager'}{', gradient cache' * cached}"
        cells = (step_cell(rows, compiled, cached, machine) for machine in MACHINES)
        yield [f"{rows:,}", f"ours, {form}", *cells, f"{held_gb(rows, cached, H100):.0f}"]
    for name, shares, rate in (("as released", RELEASED_SHARES, FLOAT32_TFLOPS), ("tuned", TUNED_SHARES, None)):
        yield ["32", f"reference, {name}", *(reference_cell(32, shares, rate, machine) for machine in MACHINES), ""]


def reference_cell(rows: int, shares: tuple[float, float], tflops: float | None, machine: Machine) -> str:
    """Work over a share of `tflops`, or of the rate of products, and what the released step reads off the device."""
    work = rows * (pair_tflop() + checkpointed_tflop())
    optimizer = 28e-9 * parameters() / (COPY_SHARE * machine.tbytes)
    reads = 0.0 if tflops is None else 1e-3 * HOST_READS * READ_US
    low, high = (1e3 * work / (share * (tflops or machine.tflops)) + reads + optimizer for share in shares)
    return f"{duration((low, high))}, {1e3 * rows / high:.0f} to {1e3 * rows / low:.0f} clips/s"


# ---------------------------------------------------------------------------------------------------------------------
# CLSP's step, with SPEAR-XLarge and RoBERTa

CLSP_OURS, CLSP_PUBLISHED = "fastclap", "published code"


@dataclass(frozen=True)
class ClspStep:
    """A traced step of 800 s of audio.

    Attributes:
        clips, seconds: how many, and how long each.
        operations: of all phases.
        tflop: of its products.
        gbytes: that are read and written, by all operations and by those that are no products.
        held: GB alive when the backward pass begins, weights and optimizer state among them.
    """

    clips: int
    seconds: int
    operations: int
    tflop: float
    gbytes: tuple[float, float]
    held: float


# By `bench.step_trace --system clsp --seconds ...`, with and without `--icefall`.
CLSP = (
    (CLSP_OURS, ClspStep(26, 30, 5949, 59.2, (341, 250), 35.1)),
    (CLSP_PUBLISHED, ClspStep(26, 30, 10682, 59.3, (1011, 871), 41.0)),
    (CLSP_OURS, ClspStep(160, 5, 5898, 64.9, (406, 296), 42.3)),
    (CLSP_PUBLISHED, ClspStep(160, 5, 10640, 70.4, (911, 779), 47.5)),
)
CLSP_TFLOP = {30: 58.134, 5: 64.386}  # of the model in such a step, by `bench.model_flops`
CLSP_READS = 9  # numbers that the published step reads off the device: traced, in its first hundred steps


def clsp_ms(step: ClspStep, machine: Machine) -> float:
    """Products, other bytes and gaps between operations, one after the other."""
    products = 1e3 * step.tflop / (PRODUCT_SHARE * machine.tflops)
    return products + step.gbytes[1] / (COPY_SHARE * machine.tbytes) + 1e-3 * GAP_US * step.operations


def clsp_rows() -> Iterator[list[str]]:
    for form, step in CLSP:
        traced = (f"{step.operations:,}", f"{step.tflop:.3g}", *(f"{x:,.0f}" for x in (*step.gbytes, step.held)))
        cells = (clsp_cell(step, machine) for machine in MACHINES)
        yield [f"{step.clips} × {step.seconds} s", form, *traced, *cells]


def clsp_cell(step: ClspStep, machine: Machine) -> str:
    ms = clsp_ms(step, machine)
    share = 1e3 * CLSP_TFLOP[step.seconds] / ms / machine.tflops
    return f"{ms:.0f} ms, {1e3 * step.clips * step.seconds / ms:,.0f} s/s, {share:.0%}"


# ---------------------------------------------------------------------------------------------------------------------
# Page


def pair(figures: Iterable[str]) -> str:
    """The figures of `MACHINES`, once where they are alike."""
    return " / ".join(dict.fromkeys(figures))


def span(ms: Iterable[float]) -> str:
    return " to ".join(dict.fromkeys(f"{x:.2g}" for x in ms))


def copies(gbytes: float) -> str:
    """Milliseconds at the rate of copies."""
    return pair(f"{gbytes / m.tbytes:.2g}" for m in MACHINES)


def duration(ms: Sequence[float]) -> str:
    unit, size = ("s", 1e3) if max(ms) >= 1e3 else ("ms", 1.0)
    return f"{' to '.join(f'{x / size:.3g}' for x in ms)} {unit}"


def percent(shares: tuple[float, float]) -> str:
    return f"{shares[0]:.0%} to {shares[1]:.0%}"


def by_dim(number: Callable[[int], float]) -> str:
    return " / ".join(f"{number(dim):.0%}" for dim in (512, 768, 1024))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    one, two = FORMS[FOUR].issued
    kept, bytes_of = FORMS[THREE].issued[0], {name: f"{form.bytes_per_pair:g}" for name, form in FORMS.items()}
    sigmoid = SIGMOID.issued[0]
    rows_kept = math.isqrt(scale_model.KEPT_BYTES // 2)
    ours, plain = emulated_error(FLOAT32), emulated_error("torch float32 on the CPU")
    million = pair(f"{1e-3 * device_ms(FORMS[FOUR], 1 << 20, 768, m):.3g}" for m in MACHINES)
    floors = "; ".join(
        f"{name} {pair(f'{n * 2e-9 * 65536**2 * 768 / m.tflops:.3g}' for m in MACHINES)}" for name, n in FLOORS.items()
    )
    print(
        f"""# Predictions, not measurements

Written by `python -m bench.predictions`. **No GPU produced any figure on this page.** A pair is **H100 / H200**; one
figure stands for both.

{markdown(("assumed", *(m.name for m in MACHINES)), machine_rows())}

Both: {MULTIPROCESSORS} multiprocessors at {HERTZ / 1e9:g} GHz, {L2_TBYTES:g} TB/s from the L2 cache. Constants below are *counted* in the machine code for
sm_90 (`python -m bench.machine_code`), *traced* (a run on tensors without data) or *assumed*. Assumed everywhere: plain
products reach {PRODUCT_SHARE:.0%} of the rate of large ones, passes over memory {COPY_SHARE:.0%} of that of copies; {GAP_US:g} µs pass between operations.

## InfoNCE

N = M, bf16, forward and backward, ms:

{markdown(("N", "D", *FORMS), loss_rows())}

The longer of device and host; where that is the host, the device's time, that of a CUDA graph, is in brackets. –: does
not fit. N = 1,048,576 at D = 768 takes {million} s.

- A pass is 2·N²·D flops. With 4 passes, two (P1, P2) are kernels of ours and two plain products; with 3, P1 is ours.
  P1 and P2 take the longest of: products ({pair(f"{PRODUCT_SHARE * m.tflops:.0f}" for m in MACHINES)} TFLOP/s); L2, of which a tile of 128 × 128 needs a byte
  for 64 flops ({64 * L2_TBYTES:.0f} TFLOP/s); instructions, issued in {LOSS_ISSUE_SHARE:.0%} of the cycles (assumed).
- Instructions (counted) of each of a tile's {WARPS} warps: {one[0]:,} + {one[1]}·D/64 in P1 ({kept[0]:,} + {kept[1]}·D/64 with 3 passes),
  {two[0]:,} + {two[1]}·D/64 in P2. P1's take {by_dim(lambda dim: issue_to_tensor(one, dim))} of the tensor cores' 8·D cycles at D = 512 / 768 / 1024:
  the L2 cache binds P1 and P2 at all three.
- By itself the engine keeps exponentials up to 256 MiB, N = {rows_kept:,} in bf16; `keep_exponentials` decides otherwise.
- SigLIP's loss has one kernel of ours and two products. Its instructions, {sigmoid[0]:,} + {sigmoid[1]}·D/64, take {issue_to_tensor(sigmoid, 768):.0%} of the tensor
  cores' cycles at D = 768 and bind it: {pair(f"{device_ms(SIGMOID, 65536, 768, m):.3g}" for m in MACHINES)} ms at N = 65,536.
- Bytes a pair beside products (assumed): {bytes_of[THREE]} with 3 passes, {bytes_of[MATERIALISED]} materialised, {bytes_of[OPEN_CLIP]} in open_clip.
- Host: {OURS_HOST_MS:g} ms (traced: 7 Triton launches, 2 products, 2 other operations; scaled from 0.93 for the engine before by
  0.4, as on a CPU), {MATERIALISED_HOST_MS:g} for the compiled forms. **Below some 4,500 rows these are predicted to be faster**, unless
  the host is hidden behind other work, as a CUDA graph hides it.
- float32 embeddings (`bench.float32_errors`; emulated, no GPU): relative error of a gradient {ours[0]}, at most {ours[1]} of all
  seeds; torch's float32 on a CPU {plain[0]} and {plain[1]}.
- Of other peers only the floor is known, their passes at the full rate. ms at N = 65,536, D = 768:
  {floors}.

## Log-mel

{CLIPS} clips of {SECONDS} s. Cycles are those of one multiprocessor a frame (counted, inside a clip, float32 to float32).

{markdown(("front-end", "issue", "wavefronts", "floor ms, float32", "int16 to bf16", "predicted ms"), log_mel_rows())}

- *Issue*: the instructions of all warps, one a cycle on each of four schedulers. *Wavefronts*: of the one pipe to shared
  memory and L1, one a cycle: 1, 2 or 4 for a load or store of 32, 64 or 128 bits a lane, 1 where a warp reads one line of
  a table. The layout keeps lanes out of each other's banks but for a few powers of the mels. One is as much a bound as
  the other, and bytes are none.
- ms = frames · the larger of the two / (share · {MULTIPROCESSORS} · {HERTZ / 1e9:g} GHz), share {percent(BUSY_SHARES)} (assumed, for 16 to 24 warps a
  multiprocessor).
- Peers, from bytes alone, ms: {"; ".join(log_mel_peers())}.

## Gated-Toeplitz attention

T = {FRAMES}, {HEADS} heads of {WIDTH}, bf16, ms:

{markdown(("B", "", "flops", "bytes", "exponentials", "instructions", "predicted"), attention_rows())}

4·B·H·T²·d flops forward, 3.5 times that with the backward pass; bytes of q, k, v, output and gradients; one exponential
a logit in each of the three kernels, 16 a cycle. Instructions (counted, without dropout) of a warp for a tile: {ATTENTION["forward"][-1]} forward,
{ATTENTION["keys"][-1]} for dK and dV, {ATTENTION["queries"][-1]} for dQ and the gradients of gate and table, issued in {percent(BUSY_SHARES)} of the cycles (assumed, for
8 or 16 warps a multiprocessor). At B = 32 the host takes longer: these are times behind queued work.

## Between the products

{markdown(("kernel", "size", "GB", "floor ms", "predicted ms"), tower_rows())}

LayerNorm + GELU is bound by its bytes on an H100. A row of {NORM_COLUMNS} takes its warp {NORM_ISSUED["forward"]} instructions forward and {NORM_ISSUED["backward"]} backward
(counted), issued in {percent(NORM_SHARES)} of the cycles (assumed); at the lower share these take longer than the bytes on an H200.
Waveforms are bound by bytes: {READ:.0%} of the width is samples, read once, twice where statistics are measured; all
positions are written.

## Training step

WavLM-Large and an XLM-R base ({parameters() / 1e6:.0f} M parameters), clips of {SECONDS} s, captions of {CAPTION_TOKENS} tokens. %: of the rate of products, by
the model's {pair_tflop():.3g} TFLOP a pair (`bench.model_flops`).

{markdown(("N", "step", "H100", "H200", "GB held"), step_rows())}

- Ours: products + other bytes + gaps + loss (device, four passes) + optimizer (28 bytes a parameter). Traced for 32
  clips: {TRACED_CLIPS * pair_tflop():.1f} TFLOP;
  compiled {passes_of(COMPILED)};
  eager {passes_of(EAGER)}. The gradient cache, with {CHUNK} clips at a time, repeats the forward pass of all but the last.
- GB held: {HELD_BY_128:.0f} for a batch of 128 (traced), which is 16 bytes a parameter and {clip_gb():.2f} GB a clip; at most {FREE_SHARE:.0%} is free.
- The reference multiplies {pair_tflop() + checkpointed_tflop():.3g} TFLOP a pair (gradient checkpointing). As released: float32 without tensor cores, at
  {percent(RELEASED_SHARES)} of {FLOAT32_TFLOPS:g} TFLOP/s, and {HOST_READS} reads of {READ_US:g} µs by the host. Tuned (no statistics, TF32, bf16 autocast):
  {percent(TUNED_SHARES)} of the rate of products. All assumed.

## CLSP's training step

SPEAR-XLarge and RoBERTa (724 M parameters), 800 s of audio, two captions a clip, ScaledAdam, bf16 autocast. s/s:
seconds of audio a second; %: of the rate of products, by the model's own TFLOP ({CLSP_TFLOP[30]:.3g} with clips of 30 s, {CLSP_TFLOP[5]:.3g} of 5 s).

{markdown(("clips", "step", "operations", "TFLOP", "GB", "of which not products", "GB held", *(m.name for m in MACHINES)), clsp_rows())}

- Traced (`bench.step_trace --system clsp`): operations, TFLOP, GB read and written, GB held with weights and optimizer
  state. The time is products + other bytes + gaps, each at the rates above; the host is assumed to keep ahead.
- Which limits on activations act in a step is random; both are traced with one draw, with whiteners that have found
  their limits held and look in a fortieth of the steps. While all of them look in a quarter, it is 3 TFLOP and 43 GB
  more (traced).
- The published step reads {CLSP_READS} numbers off the device, and waits for it each time; that is not in its time. k2's Swoosh
  counts as an operation, and as two where its derivative is wanted."""  # noqa: E501
    )


def machine_rows() -> Iterator[list[str]]:
    yield ["large bf16 products, TFLOP/s", *(f"{m.tflops:g}" for m in MACHINES)]
    yield ["copies, read + written, TB/s", *(f"{m.tbytes:.1f}" for m in MACHINES)]
    yield ["memory, GB", *(f"{m.gbytes:g}" for m in MACHINES)]


if __name__ == "__main__":
    main()
