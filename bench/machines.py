"""Assumed rates of the GPUs for which `bench.predictions` and `bench.scale_model` do their arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Assumed rates of one GPU: TFLOP/s of large bf16 products, TB/s of copies (read + written); GB of memory."""

    name: str
    tflops: float
    tbytes: float
    gbytes: float


H100 = Machine("H100", 798, 3.0, 80)
H200 = Machine("H200", 790, 4.3, 141)
MACHINES = (H100, H200)
MULTIPROCESSORS = 132  # of both
