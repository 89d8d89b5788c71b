"""What the arithmetic predicts for the kernels on a GPU, written down before it is measured.

    python -m bench.predictions [--tflops 790] [--tbytes 4.3] [--name H200] > bench/records/PREDICTED.md

No figure of this comes from a run. Compare it with a record of `bench.gpu_evidence`, and explain a miss in either
direction.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.kernel_peers import FRONT_ENDS
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


# Beside the loss. Shares of the matmul peak that the log-mel kernel may reach; the page says why.
LOG_MEL_SHARES = (0.45, 0.25)
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


def log_mel_gflop(spec: LogMelSpec) -> float:
    """Of the products of a batch, as the Triton kernel's own tables for sm_90 lay them out.

    A block of bins costs a frame four folded products of depth x bins, three times over for fp16x3, and two with the
    mel bank, three times over for tf32x3 at half the rate of float16.
    """
    from fastclap.kernels import logmel_triton

    plan = logmel_triton._plan(spec, torch.device("cpu"), logmel_triton.tile_for(90))
    blocks, _, depth, bins = plan.dft.shape
    mels = plan.bank.shape[3]
    frames = CLIPS * int(spec.frames(SECONDS * spec.sampling_rate))
    return 2e-9 * frames * blocks * (3 * 4 * depth * bins + 2 * 3 * 2 * bins * mels)


def log_mel_gbytes(spec: LogMelSpec, sample_bytes: int, feature_bytes: int) -> float:
    """Samples in once, features out once."""
    samples = SECONDS * spec.sampling_rate
    return 1e-9 * CLIPS * (samples * sample_bytes + int(spec.frames(samples)) * spec.n_mels * feature_bytes)


def log_mel_rows(args: argparse.Namespace) -> Iterator[list[str]]:
    for name, spec in FRONT_ENDS.items():
        gflop = log_mel_gflop(spec)
        features = CLIPS * int(spec.frames(SECONDS * spec.sampling_rate)) * spec.n_mels
        epilogue = 0.0 if spec.dynamic_range is None else 1e-9 * features * EPILOGUE_BYTES / args.tbytes
        for kind, sizes in (("float32 to float32", (4, 4)), ("int16 to bfloat16", (2, 2))):
            floor = log_mel_gbytes(spec, *sizes) / args.tbytes
            low, high = (gflop / (share * args.tflops) + floor + epilogue + 0.01 for share in LOG_MEL_SHARES)
            yield [
                name,
                kind,
                f"{floor:.2g}",
                f"{gflop:,.0f}",
                f"{gflop / args.tflops:.2g}",
                f"{low:.2g} to {high:.2g}",
            ]


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

{CLIPS} clips of {SECONDS} s. The floor is samples in and features out, once each, at {args.tbytes:g} TB/s. GFLOP are
those of the Triton kernel's own tables for sm_90: four folded products a block of bins, three times over for fp16x3,
and the mel bank in tf32x3, which counts twice.

    ms = GFLOP / (share · {args.tflops:g} TFLOP/s) + floor + 0.01
         + {EPILOGUE_BYTES} bytes a feature / ({args.tbytes:g} TB/s) where there is a dynamic range

for a share from {LOG_MEL_SHARES[0]:.0%} down to {LOG_MEL_SHARES[1]:.0%}, a guess. Its upper end: a folded sample meets
96 multiply-adds on the tensor cores, which could take 18 of them a cycle and multiprocessor, and about 9 other
instructions for loading, folding, windowing and splitting, which allow 14; one stage hides little of the one behind the
other, and 14 / (14 + 18) = 44 %. The products outweigh the bytes in every row: the way down is fewer products, not less
traffic.
"""
    )
    print(markdown(("front-end", "", "floor ms", "GFLOP", "at the full peak", "predicted ms"), log_mel_rows(args)))
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


if __name__ == "__main__":
    main()
