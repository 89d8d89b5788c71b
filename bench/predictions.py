"""What the arithmetic predicts for the kernels on a GPU, written down before it is measured.

    python -m bench.predictions [--tflops 790] [--tbytes 4.3] [--name H200] > bench/records/PREDICTED.md

No figure of this comes from a run. Compare it with a record of `bench.gpu_evidence`, and explain a miss in either
direction.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from bench import model_flops, scale_model
from bench.kernel_peers import FRONT_ENDS
from bench.reference_step import SIZES
from bench.tables import markdown
from fastclap.kernels.logmel import LogMelSpec

ROWS, DIMS = (4096, 16384, 65536, 262144), (512, 768, 1024)
LAUNCHES_MS = 0.08


@dataclass(frozen=True)
class Model:
    passes: int
    share: float  # of the matmul peak that its products reach
    bytes_per_pair: float  # of device memory traffic, over all kernels
    kept_per_pair: float  # bytes of the whole matrix that it holds at once
    share_of_memory: float = 0.9  # that they may take


MODELS = {
    "fastclap, 4 passes": Model(4, 0.71, 0, 0),
    "fastclap, 3 passes": Model(3, 0.71, 0, 2, share_of_memory=0.25),
    "materialised, compiled": Model(3, 0.80, 25, 4),
    "open_clip, compiled": Model(6, 0.78, 32, 8),
}
FLOORS = {"memeff": 5, "quack (two calls)": 6, "liger-kernel (two calls)": 6, "cut-cross-entropy (two calls)": 8}
FLOORS |= {"inf_cl (two calls)": 10}


def milliseconds(model: Model, rows: int, dim: int, tflops: float, tbytes: float) -> float:
    """passes · 2·N²·D / (share · peak) + bytes · N² / copy rate + launches."""
    products = model.passes * 2e-9 * rows**2 * dim / (model.share * tflops)
    return products + model.bytes_per_pair * 1e-9 * rows**2 / tbytes + LAUNCHES_MS


# Beside the loss. Instructions that a warp of the log-mel kernel issues for a tile inside of a clip: counted in the
# machine code for sm_90, float32 to float32, as `fastclap.kernels.offline` compiles it with Triton 3.6: its loop over
# tiles, without the copy of a clip's ends, its loop over groups of 32 mels as often as that runs; rounded.
ISSUED = {"whisper-80": 5740, "kaldi-80": 5870, "clsp-128": 6230, "clap-64": 10150}
MMA_CYCLES = 8  # of m16n8k16 in float16 on a quarter of a multiprocessor
MULTIPROCESSORS, HERTZ = 132, 1.755e9
ISSUE_SHARES = (0.8, 0.55)  # of the cycles, in which an instruction issues
TORCHAUDIO_BYTES = 13e3  # a frame of 400 samples: frames, complex spectrum, magnitudes, squares, mels, logarithm
LOGARITHM_BYTES = 16  # a feature: clamp and log, in place, as float32
CLIPS, SECONDS = 1024, 10
EPILOGUE_BYTES = 8  # a value of a front-end with a dynamic range: written and read once more, as float32
HEADS, FRAMES, WIDTH = 16, 499, 64
# Of attention: flash kernels with a bias on this kind of GPU reach about half of the peak forward, less backward.
ATTENTION_SHARES = {"forward": (0.55, 0.35), "forward and backward": (0.45, 0.3)}
EXPONENTIALS = 3.7e12  # a second: 16 a cycle of each of 132 multiprocessors at 1.75 GHz
READ = 0.75  # of the samples of clips that are half to all of the batch's width
COPY_SHARE = 0.9  # of the copy rate, which a kernel of one pass over memory should reach


def log_mel_cycles(name: str, spec: LogMelSpec) -> tuple[float, float]:
    """Cycles a frame of one multiprocessor: of issuing all instructions, and of the matrix ones on the tensor cores.

    One warp instruction a cycle and quarter. Every warp multiplies its 8 frames by 16 x 2·16 matrices: two (the number,
    what float16 cut off it) for cosine and for sine of N1 rows, and of row N1/2.
    """
    from fastclap.kernels import logmel_triton

    flags = logmel_triton._flags(spec)
    if flags["DEPTH"] > 1:
        raise ValueError(f"{name}: only front-ends of one step are counted, n_fft is {spec.n_fft}")
    products = 2 * 2 * 2 * (flags["N1"] + 1)
    warps = logmel_triton.TILE.warps
    per_frame = warps / 4 / flags["BM"]
    return ISSUED[name] * per_frame, products * MMA_CYCLES * per_frame


def log_mel_gbytes(spec: LogMelSpec, sample_bytes: int, feature_bytes: int) -> float:
    """Samples in once, features out once."""
    samples = SECONDS * spec.sampling_rate
    return 1e-9 * CLIPS * (samples * sample_bytes + int(spec.frames(samples)) * spec.n_mels * feature_bytes)


def log_mel_rows(args: argparse.Namespace) -> Iterator[list[str]]:
    for name, spec in FRONT_ENDS.items():
        issue, tensor = log_mel_cycles(name, spec)
        frames = CLIPS * int(spec.frames(SECONDS * spec.sampling_rate))
        second = 0.0 if spec.dynamic_range is None else 1e-9 * frames * spec.n_mels * EPILOGUE_BYTES / args.tbytes
        for kind, sizes in (("float32 to float32", (4, 4)), ("int16 to bfloat16", (2, 2))):
            floor = log_mel_gbytes(spec, *sizes) / args.tbytes
            ms = 1e3 * frames / (MULTIPROCESSORS * HERTZ)
            low = max(issue / ISSUE_SHARES[0], tensor) * ms + second + 0.01
            high = (issue / ISSUE_SHARES[1] + tensor) * ms + floor + second + 0.01
            cells = (f"{floor:.2g}", f"{issue:.0f}", f"{tensor:.0f}", f"{issue * ms:.2g}", f"{low:.2g} to {high:.2g}")
            yield [name, kind, *cells]


def log_mel_peers(args: argparse.Namespace) -> Iterator[str]:
    """What bytes alone allow them, float32 in and out."""
    for name in ("whisper-80", "clap-64"):
        spec = FRONT_ENDS[name]
        frames = CLIPS * int(spec.frames(SECONDS * spec.sampling_rate))
        fused = log_mel_gbytes(spec, 4, 4) + 1e-9 * frames * spec.n_mels * LOGARITHM_BYTES
        yield f"flashmel and a logarithm, {name}: not below {fused / args.tbytes:.2g} ms."
        if spec.n_fft == 400:
            yield f"torchaudio and a logarithm, {name}: about {1e-9 * frames * TORCHAUDIO_BYTES / args.tbytes:.2g} ms."


def attention_rows(args: argparse.Namespace) -> Iterator[list[str]]:
    for batch in (32, 128):
        for passes, shares in ATTENTION_SHARES.items():
            backward = passes != "forward"
            gflop = 4e-9 * batch * HEADS * FRAMES**2 * WIDTH * (3.5 if backward else 1)
            gbytes = 2e-9 * batch * HEADS * FRAMES * WIDTH * (12 if backward else 4)
            exponentials = 1e3 * batch * HEADS * FRAMES**2 * (2 if backward else 1) / EXPONENTIALS
            floors = (gflop / args.tflops, gbytes / args.tbytes, exponentials)
            low, high = (max(gflop / (share * args.tflops), exponentials) for share in shares)
            yield [str(batch), passes, *(f"{floor:.2g}" for floor in floors), f"{low:.2g} to {high:.2g}"]


def shares(of: dict[str, tuple[float, float]]) -> str:
    return ", ".join(f"{high:.0%} to {low:.0%} ({passes})" for passes, (high, low) in of.items())


def tower_rows(args: argparse.Namespace) -> Iterator[list[str]]:
    """GB that have to move, the floor and the prediction."""
    layer_norm, waveform = 1e-9 * 32 * 16000 * 512, 1e-9 * CLIPS * SECONDS * 16000
    for name, size, gbytes in (
        ("layer_norm_gelu, forward", "512,000 × 512 bf16", layer_norm * 2 * 2),
        ("layer_norm_gelu, forward and backward", "512,000 × 512 bf16", layer_norm * 2 * 5),
        ("normalize_waveform, statistics given", "1024 × 160,000 int16 to bf16", waveform * (READ * 2 + 2)),
        ("normalize_waveform, statistics measured", "1024 × 160,000 int16 to bf16", waveform * (READ * 4 + 2)),
    ):
        floor = gbytes / args.tbytes
        yield [name, size, f"{gbytes:.3g}", f"{floor:.2g}", f"{floor / COPY_SHARE + 0.01:.2g}"]


# Of the training step, with WavLM-Large and an XLM-R base. Every share of a peak is a guess; the page says of what.
BATCHES = (32, 128, 512, 2048, 8192)
CAPTION_TOKENS = 32
STEP_SHARES = (0.55, 0.45)  # ours: of the rate of large bf16 products
TUNED_SHARES = (0.35, 0.25)  # the reference with TF32 and bf16 autocast
FLOAT32_TFLOPS = 67.0  # of an H100 or H200 without tensor cores, as the vendor states it
RELEASED_SHARES = (0.7, 0.5)  # the reference as released: of FLOAT32_TFLOPS
HOST_READS, READ_US = 250, 30.0  # numbers that the released step reads off the device, and what each costs
KEPT_BY_A_CONVOLUTION = (16, 12)  # bytes a value of its output, in float32 and under autocast


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


def convolution_gb(bytes_a_value: int) -> float:
    """What the reference's convolutions keep of one clip for the backward pass."""
    wavlm = SIZES["large"].wavlm
    return 1e-9 * 512 * sum(model_flops.wavlm_frames(wavlm, SECONDS * 16000)) * bytes_a_value


def training_rows(args: argparse.Namespace) -> Iterator[list[str]]:
    """For each batch: ours without and with the gradient cache, the reference as released and tuned, memory of ours."""
    model = scale_model.parser().parse_args([])
    sizes = scale_model.Model(round(model.parameters), 768, 4, model.chunk, model.chunk_gb, 2 * SECONDS * 16000)
    machine = scale_model.Machine(clip_ms=0.0, memory_gb=args.gbytes)
    rest = 1e3 * 28 * sizes.parameters / (1e12 * args.tbytes)  # the optimizer
    weights = 16e-9 * sizes.parameters
    for rows in BATCHES:
        loss = milliseconds(MODELS["fastclap, 4 passes"], rows, sizes.dim, args.tflops, args.tbytes)
        ours = [1e3 * rows * pair_tflop() / (share * args.tflops) for share in STEP_SHARES]
        theirs = rows * (pair_tflop() + checkpointed_tflop())
        released = [1e3 * theirs / (share * FLOAT32_TFLOPS) for share in RELEASED_SHARES]
        tuned = [1e3 * theirs / (share * args.tflops) for share in TUNED_SHARES]
        activations = model.chunk_gb * rows / sizes.chunk
        cached = rows > sizes.chunk
        whole = scale_model.Model(sizes.parameters, sizes.dim, 4, rows, activations, sizes.clip_bytes)
        held = sum(scale_model.predict(sizes if cached else whole, machine, rows, 1).held.values())
        fits = {
            "plain": activations + weights < args.gbytes,
            "released": rows * convolution_gb(KEPT_BY_A_CONVOLUTION[0]) + weights < args.gbytes,
            "tuned": rows * convolution_gb(KEPT_BY_A_CONVOLUTION[1]) + weights < args.gbytes,
        }
        yield [
            f"{rows:,}",
            _step([ms + loss + rest for ms in ours], rows) if fits["plain"] else "does not fit",
            _step([4 / 3 * ms + loss + rest for ms in ours], rows) if cached else "",
            _step([ms + 1e-3 * HOST_READS * READ_US + rest for ms in released], rows)
            if fits["released"]
            else "does not fit",
            _step([ms + rest for ms in tuned], rows) if fits["tuned"] else "does not fit",
            f"{held / 1e9:.3g}",
        ]


def _step(range_ms: list[float], rows: int) -> str:
    low, high = range_ms
    unit, ms = ("s", 1e3) if high >= 1e3 else ("ms", 1.0)
    return f"{low / ms:.3g} to {high / ms:.3g} {unit}, {1e3 * rows / high:.3g} to {1e3 * rows / low:.3g} clips/s"


def cell(model: Model, rows: int, dim: int, args: argparse.Namespace) -> str:
    if model.kept_per_pair * rows**2 > 1e9 * args.gbytes * model.share_of_memory:
        return "does not fit"
    return f"{milliseconds(model, rows, dim, args.tflops, args.tbytes):.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="H200")
    parser.add_argument("--tflops", type=float, default=790, help="assumed rate of large bf16 products")
    parser.add_argument("--tbytes", type=float, default=4.3, help="assumed TB/s of a copy, read and written")
    parser.add_argument("--gbytes", type=float, default=141, help="assumed memory")
    args = parser.parse_args()
    print(
        f"""# Predictions, not measurements

Written by `python -m bench.predictions` from operation counts. **No GPU produced any figure on this page.** Assumed for
one {args.name}: {args.tflops:g} TFLOP/s for large bf16 products, {args.tbytes:g} TB/s for copies, {args.gbytes:g} GB.

InfoNCE, N = M, bf16, forward and backward:

    ms = passes · 2·N²·D / (share · {args.tflops:g} TFLOP/s) + bytes · N² / ({args.tbytes:g} TB/s) + {LAUNCHES_MS:g} ms of launches
"""  # noqa: E501
    )
    names = ("form", "passes", "share of the matmul peak", "bytes a pair", "bytes a pair kept")
    fields = ((m.passes, m.share, m.bytes_per_pair, m.kept_per_pair) for m in MODELS.values())
    print(markdown(names, [(name, *map(str, values)) for name, values in zip(MODELS, fields, strict=True)]))
    print("\nThe shares are guesses. Traffic of chunks, mostly within the L2 cache, is part of fastclap's share.\n")
    print(f"Predicted ms at D = {' / '.join(map(str, DIMS))}:\n")
    print(
        markdown(
            ["N", *MODELS],
            [[f"{n:,}", *(" / ".join(cell(m, n, d, args) for d in DIMS) for m in MODELS.values())] for n in ROWS],
        )
    )
    largest = milliseconds(MODELS["fastclap, 4 passes"], 1 << 20, 768, args.tflops, args.tbytes)
    print(f"\nN = 1,048,576 at D = 768: {largest / 1e3:.3g} s.\n")
    print(
        "For the other peers only the floor is known, their matmul passes at the full peak. Milliseconds at "
        "N = 65,536, D = 768:\n"
    )
    floors = [(name, str(p), f"{p * 2e-9 * 65536**2 * 768 / args.tflops:.3g}") for name, p in FLOORS.items()]
    print(markdown(("peer", "passes", "not below"), floors))
    print(
        f"""
## Log-mel

{CLIPS} clips of {SECONDS} s. The floor is samples in and features out, once each, at {args.tbytes:g} TB/s. Cycles are
those of one multiprocessor a frame. *Issue*: the instructions of a tile's four warps in the machine code for sm_90,
one a cycle on each of four schedulers, over its 32 frames. *Tensor*: the matrix instructions among them,
{MMA_CYCLES} cycles each on the tensor core of a quarter. With {MULTIPROCESSORS} multiprocessors at {HERTZ / 1e9:g} GHz,

    least ms = issue / {ISSUE_SHARES[0]:g}
    most ms  = issue / {ISSUE_SHARES[1]:g} + tensor + floor
    each + {EPILOGUE_BYTES} bytes a feature / ({args.tbytes:g} TB/s) where there is a dynamic range, + 0.01

The shares of cycles in which an instruction issues are guesses: two programs of four warps share a multiprocessor, so
latency is hidden by each thread's four independent frames more than by other warps. At least, the tensor cores and
memory work beside them; at most, nothing does. Issue outweighs the rest in every row: the way down is fewer
instructions. float32 samples are counted, of which int16 needs fewer.
"""
    )
    print(markdown(("front-end", "", "floor ms", "issue", "tensor", "ms of issue", "predicted ms"), log_mel_rows(args)))
    print("\nFor the peers, from bytes alone:\n")
    print("\n".join(f"- {line}" for line in log_mel_peers(args)))
    print(
        f"""
## Gated-Toeplitz attention

T = {FRAMES}, {HEADS} heads of {WIDTH}, bf16. Flops: 4·B·H·T²·d forward, 3.5 times that with the backward pass. Bytes:
q, k, v and the output forward; q, k, v, the output and its gradient read again and three gradients written backward.
Exponentials: one a logit and pass, {EXPONENTIALS / 1e12:g}·10¹² a second. Predicted: the flops at a share of the peak,
{shares(ATTENTION_SHARES)}, guesses, or the exponentials where those take
longer.
"""
    )
    columns = ("B", "", "flops ms", "bytes ms", "exponentials ms", "predicted ms")
    print(markdown(columns, attention_rows(args)))
    print(
        f"""
## Memory-bound kernels of the towers

Predicted: the floor at {COPY_SHARE:.0%} of the copy rate, and 0.01 ms. Of the waveforms, half to all of the width is
samples: {READ:.0%} are read, twice where statistics are measured, and all positions are written.
"""
    )
    print(markdown(("kernel", "size", "GB", "floor ms", "predicted ms"), tower_rows(args)))
    print(
        f"""
## Training step

WavLM-Large and an XLM-R base (594 M parameters), clips of {SECONDS} s, captions of {CAPTION_TOKENS} tokens, one {args.name}. A pair costs
the model {pair_tflop():.3g} TFLOP forward and backward (`bench.model_flops`).

    ours      ms = N · {pair_tflop():.3g} TFLOP · (4/3 with the gradient cache) / (share · {args.tflops:g} TFLOP/s) + loss + optimizer
    released  ms = N · ({pair_tflop():.3g} + {checkpointed_tflop():.3g}) TFLOP / (share · {FLOAT32_TFLOPS:g} TFLOP/s) + {HOST_READS} host reads of {READ_US:g} µs + optimizer
    tuned     ms = N · ({pair_tflop():.3g} + {checkpointed_tflop():.3g}) TFLOP / (share · {args.tflops:g} TFLOP/s) + optimizer

Shares are guesses. Ours {STEP_SHARES[1]:.0%} to {STEP_SHARES[0]:.0%}, since attention, norms and activations are bound by memory. The reference as
released multiplies in float32 without tensor cores ({FLOAT32_TFLOPS:g} TFLOP/s by the data sheet, of which {RELEASED_SHARES[1]:.0%} to {RELEASED_SHARES[0]:.0%}; its
convolutions may take TF32, which would help it), computes the transformer layers' forward pass twice (gradient
checkpointing, the {checkpointed_tflop():.3g} TFLOP) and reads its statistics off the device. Tuned: statistics off, TF32, bf16 autocast,
{TUNED_SHARES[1]:.0%} to {TUNED_SHARES[0]:.0%} of the bf16 rate: its attention writes the position bias and the weights out, and its convolutions
transpose around each norm. Loss: four passes, as above. Optimizer: 28 bytes a parameter through memory.

Memory. Ours as in [scaling.md](../../docs/scaling.md): 16 bytes a parameter, chunks of 64 clips with an assumed 60 GB
of activations, samples and embeddings of the whole batch; from N = 128 on it is that of the gradient cache. The
reference keeps at least {convolution_gb(KEPT_BY_A_CONVOLUTION[0]):.2g} GB of each clip for its convolutions ({convolution_gb(KEPT_BY_A_CONVOLUTION[1]):.2g} GB under autocast): outputs of
convolution and norm and their transposed copies.
"""  # noqa: E501
    )
    columns = ("N", "ours", "ours, gradient cache", "reference as released", "reference, tuned", "ours, GB held")
    print(markdown(columns, training_rows(args)))


if __name__ == "__main__":
    main()
