"""What the Triton engines share: constants, names, and the choice of a configuration for a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from triton.runtime import driver

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


def launch(function: Any, programs: int, form: Hashable, *args: Any, **constants: Any) -> None:
    """function[(programs,)](*args, **constants), which looks at the arguments only once for each `form`.

    For kernels of `jit_for_any_size`, whose compilation depends on what the caller knows: a launch then costs the host
    two thirds.

    Args:
        function: what triton.jit made.
        form: all that decides on the compilation besides the constants: the dtypes of the arguments. Pointers that are
            specialised on alignment are always aligned to 16 bytes, or never.
        args: all arguments in order, without the constants.
        constants: those, in the order of the arguments, which follow all others; and options of the launch.
    """
    if function.__class__ is not triton.JITFunction:  # the interpreter's
        function[(programs,)](*args, **constants)
        return
    # Among the kernels that Triton itself keeps for this device.
    kernels = function.device_caches[driver.active.get_current_device()][0]
    key = (form, *constants.values())
    found = kernels.get(key)
    if found is None:
        kernel = function[(programs,)](*args, **constants)
        kernels[key] = kernel, tuple(constants[p.name] for p in function.params if p.name in constants)
    else:
        kernel, values = found
        kernel[(programs, 1, 1)](*args, *values)


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
