"""Peak memory and time of InfoNCE forward and backward at a large batch: the chunked engine, and the whole matrix.

Memory is read in a fresh process per form: the peak resident set during the call, less the resident set after the
inputs exist and a small warm-up call has loaded the libraries. It includes both gradients. Time is wall and processor
time of repeats in turn, in one process, after one warm-up each; medians, with the smallest and largest.

    python -m bench.contrastive_memory [--rows 16384] [--dim 768] [--scale 14.3] [--threads 2] [--repeats 5]

The materialised form is the shared-S one: S = scale·a@b.T once, cross-entropy over S and over its transpose.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.peers import materialised
from bench.timing import embeddings
from fastclap.losses import info_nce

FORMS: dict[str, Callable[..., Any]] = {
    "fastclap": info_nce,
    "materialised": materialised,
}


def inputs(rows: int, dim: int, scale: float) -> tuple[Tensor, ...]:
    return embeddings(rows, dim, scale, "cpu", torch.float32)


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def peak_memory(form: str, rows: int, dim: int, scale: float) -> int:
    """Bytes above the inputs at the highest point of one forward and backward; call it in a fresh process."""
    FORMS[form](*inputs(64, dim, scale)).backward()
    tensors = inputs(rows, dim, scale)
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:  # ru_maxrss would hold the peak of making the inputs
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    FORMS[form](*tensors).backward()
    done.set()
    watcher.join()
    return max(peak, resident_bytes()) - before


def one_call(form: str, tensors: tuple[Tensor, ...]) -> tuple[float, float]:
    """Wall and processor seconds of one forward and backward."""
    for tensor in tensors:
        tensor.grad = None
    usage, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    FORMS[form](*tensors).backward()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return wall, after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--scale", type=float, default=14.3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["fastclap", "materialised"])
    parser.add_argument("--memory-of", choices=FORMS, help="print only this form's peak, in this process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_memory(args.memory_of, args.rows, args.dim, args.scale))
        return
    shape = ["--rows", str(args.rows), "--dim", str(args.dim), "--scale", str(args.scale)]
    result: dict[str, dict[str, object]] = {form: {} for form in args.forms}
    for form in args.forms:
        command = [sys.executable, "-m", "bench.contrastive_memory", *shape, "--threads", str(args.threads)]
        output = subprocess.run([*command, "--memory-of", form], check=True, capture_output=True, text=True).stdout
        result[form]["peak_extra_gb"] = round(int(output) / 1e9, 3)
    tensors = inputs(args.rows, args.dim, args.scale)
    samples: dict[str, list[tuple[float, float]]] = {form: [] for form in args.forms}
    for repeat in range(args.repeats + 1):
        for form in args.forms:
            sample = one_call(form, tensors)
            if repeat:  # the first round warms up
                samples[form].append(sample)
    for form in args.forms:
        for index, name in enumerate(("wall_s", "processor_s")):
            values = [sample[index] for sample in samples[form]]
            result[form][name] = {
                "median": round(statistics.median(values), 3),
                "min": round(min(values), 3),
                "max": round(max(values), 3),
            }
    print(json.dumps({"torch": torch.__version__, **vars(args), "results": result}, indent=1))


if __name__ == "__main__":
    main()
