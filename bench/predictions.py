"""What the arithmetic predicts for the contrastive loss on a GPU, written down before it is measured.

    python -m bench.predictions [--tflops 790] [--tbytes 4.3] [--name H200] > bench/records/PREDICTED.md

No figure of this comes from a run. Compare it with a record of `bench.gpu_evidence`, and explain a miss in either
direction.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from bench.tables import markdown

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


if __name__ == "__main__":
    main()
