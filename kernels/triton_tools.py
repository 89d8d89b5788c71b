"""What the Triton engines share: constants, names, and the choice of a configuration for a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
INF = tl.constexpr(float("inf"))
PRECISIONS = {"highest": "tf32x3", "high": "tf32", "medium": "tf32"}  # of torch.get_float32_matmul_precision()
TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int16: "i16"}

T = TypeVar("T")


def jit_for_any_size(scalars: str, vectors: str = "") -> Callable[[Any], Any]:
    """triton.jit that compiles once whatever the sizes of a batch and the alignment of slices: never within a step.

    Args:
        scalars: names of the arguments whose values are not specialised on, separated by spaces.
        vectors: likewise of pointers whose alignment is not.
    """
    return triton.jit(do_not_specialize=scalars.split(), do_not_specialize_on_alignment=vectors.split())


def for_architecture(configurations: Mapping[int, T], arch: int) -> T:
    """The configuration of the nearest architecture at or below `arch` (80, 90, …).

    Raises:
        RuntimeError: the GPU is older than all of them.
    """
    known = [a for a in configurations if a <= arch]
    if not known:
        raise RuntimeError(
            f"Triton kernels need compute capability {min(configurations) / 10} or later, got {arch / 10}"
        )
    return configurations[max(known)]
