"""Which engine works on a tensor, and what the GPU is that it would work on.

Every operator asks here whether a tensor is on a GPU, and for its architecture and multiprocessors, so that a GPU that
is not there can be put in the place of one that is.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("auto", "triton", "torch", "reference")  # of the losses and the towers' operators
LOG_MEL_BACKENDS = ("auto", "torch", "native", "cuda", "triton")
LOG_MEL_ON_GPU = ("cuda", "triton")  # the quicker first, which is predicted: no record of a GPU has both yet
TRANSFORMED = "torch.func and forward-mode differentiation follow only torch operations"
WIDEST_NORM = 8192  # values of a row that the Triton engines of layer norms keep in registers
HAS_TRITON = importlib.util.find_spec("triton") is not None  # found here, as torch.compile cannot trace the search


def on_gpu(x: Tensor) -> bool:
    """Whether "auto" looks for a Triton kernel for this tensor."""
    return x.is_cuda


def autocast_dtype(*tensors: Tensor) -> torch.dtype | None:
    """What autocast gives to products of these tensors; None: it is off on their device, or one of them is float64."""
    kind = tensors[0].device.type
    enabled = torch.is_autocast_enabled(kind) and all(x.dtype != torch.float64 for x in tensors)
    return torch.get_autocast_dtype(kind) if enabled else None


def refuse_second_order(function: str, backend: str = "torch") -> None:
    """For the backward pass of a Triton engine; `backend` is one that can be differentiated again.

    Raises:
        RuntimeError: the gradient is itself to be differentiated.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the gradient of {function} cannot be differentiated again: call backward without create_graph=True, "
            f'or use backend="{backend}"'
        )


def index_of(device: torch.device) -> int | None:
    """The number of a CUDA device, where it has none of the current one; None for others, as in the interpreter."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def architecture(index: int | None) -> int:
    """Compute capability of a CUDA device as 80, 90, 100, …; 0 in the interpreter and for GPUs of other makers."""
    if index is None or torch.version.cuda is None:
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


@functools.cache
def multiprocessors(index: int | None) -> int:
    """Of a CUDA device; 1 in the interpreter."""
    return 1 if index is None else torch.cuda.get_device_properties(index).multi_processor_count


def why_only_torch(x: Tensor) -> str | None:
    """Why no engine but torch can follow this tensor: a subclass, a trace, forward-mode or a functorch transform."""
    if type(x) is not Tensor:
        return f"it takes a plain tensor, not a {type(x).__name__}"
    if torch.jit.is_tracing():
        return "torch.jit.trace follows only torch operations"
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None:
        return TRANSFORMED
    return None


def is_transformed(*inputs: Tensor) -> bool:
    """Whether torch.func transforms a call with these inputs, or one of them has a tangent of forward-mode: what an
    operator and an autograd.Function without rules of their own refuse in torch's words, or drop without a word."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    # A trace shows no tangents; its graph is made anew for the first call that may have some.
    return torch.compiler.is_compiling() or any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)


def engine(x: Tensor, backend: str, why_not: str | None = None, *, tensor: str = "") -> str:
    """The engine of a loss or of a tower's operator: "triton", "torch" or "reference".

    Args:
        x: the tensor that is worked on.
        backend: one of `BACKENDS`. "auto" is Triton for CUDA devices from sm_80 on, else torch; an empty tensor has
            nothing to launch a kernel for.
        why_not: a reason of the operator's own not to take Triton, such as "x is float64".
        tensor: what the operator's user calls `x`, such as "embeddings".

    Raises:
        ValueError: the backend is unknown, or "triton" cannot take the tensor.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, is {backend!r}")
    if backend in ("torch", "reference"):
        return backend
    if backend == "auto" and (why_not or not on_gpu(x)):
        return "torch"
    reason = why_not or _why_no_triton(x)
    if backend == "triton" and reason:
        if tensor and not why_not and not on_gpu(x):
            raise ValueError(f"backend='triton' needs {tensor} on a GPU, got {x.device}; backend='torch' runs anywhere")
        raise ValueError(f'backend="triton" cannot be used: {reason}; use backend="auto"')
    return "torch" if reason or x.numel() == 0 else "triton"


def log_mel_engine(waveform: Tensor, backend: str, why_not: Mapping[str, Callable[[], str | None]]) -> str:
    """The engine of the log-mel features: "torch", "native", "cuda" or "triton".

    Args:
        waveform: the tensor that is worked on.
        backend: one of `LOG_MEL_BACKENDS`. "auto" is the native engine on a CPU and the first that can of
            `LOG_MEL_ON_GPU` on a GPU, else torch.
        why_not: for each engine but torch what gives a reason not to take it, asked only where it would be taken.

    Raises:
        ValueError: the backend is unknown or cannot take the waveform.
    """
    if backend not in LOG_MEL_BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(map(repr, LOG_MEL_BACKENDS))}")
    if backend == "torch":
        return backend
    only_torch = why_only_torch(waveform)
    on_cpu = waveform.device.type == "cpu" and not on_gpu(waveform)
    engines = (backend,) if backend != "auto" else ("native",) if on_cpu else LOG_MEL_ON_GPU
    for name in engines:
        reason = only_torch or why_not[name]()
        if name == "triton":
            name = engine(waveform, backend, reason, tensor="a waveform")
            if name == "triton":
                return name
        elif reason is None:
            return name
        elif backend != "auto":
            raise ValueError(f'backend="{backend}" cannot be used: {reason}; use backend="auto"')
    return "torch"


def _why_no_triton(x: Tensor) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed"
    if not on_gpu(x):
        if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"the tensor is on {x.device}; on a CPU set TRITON_INTERPRET=1 before the first import"
    # Nor can it trace this question, and a GPU that it generates code for is new enough.
    if torch.compiler.is_compiling() or architecture(index_of(x.device)) >= 80:
        return None
    return "the GPU is not one of NVIDIA from sm_80 on"
