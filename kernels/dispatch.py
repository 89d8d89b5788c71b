"""Which engine works on a tensor: the one rule of the memory-bound operators."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch", "reference")
HAS_TRITON = importlib.util.find_spec("triton") is not None  # found here, as torch.compile cannot trace the search


def engine(x: Tensor, backend: str, why_not: str | None = None) -> str:
    """ "triton", "torch" or "reference".

    Args:
        x: the tensor that is worked on.
        backend: one of `BACKENDS`. "auto" is Triton for CUDA devices from sm_80 on, else torch; an empty tensor has
            nothing to launch a kernel for.
        why_not: a reason of the operator's own not to take Triton, as "x is float64".

    Raises:
        ValueError: the backend is unknown, or "triton" cannot take the tensor.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, is {backend!r}")
    if backend in ("torch", "reference"):
        return backend
    if backend == "auto" and (why_not or not x.is_cuda):
        return "torch"
    reason = why_not or _why_no_triton(x)
    if backend == "triton" and reason:
        raise ValueError(f'backend="triton" cannot be used: {reason}; use backend="auto"')
    return "torch" if reason or x.numel() == 0 else "triton"


def _why_no_triton(x: Tensor) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed"
    if not x.is_cuda:
        if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"the tensor is on {x.device}; on a CPU set TRITON_INTERPRET=1 before the first import"
    # Nor can it trace this question, and a GPU that it generates code for is new enough.
    if torch.compiler.is_compiling() or _capability(x.device.index) >= (8, 0):
        return None
    return "the GPU is older than sm_80"


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
