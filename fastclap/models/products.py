"""Matrix products of inference on processors that torch's default library serves badly.

torch multiplies float32 matrices on x86 with MKL, whose widest instructions are reserved for Intel's processors. On an
AMD EPYC (Zen 5) a core reaches 95 GFLOP/s that way and 210 with oneDNN, which torch carries as well and uses for
convolutions: as accurate, in float32 throughout. torch has no switch for it, so `fast_products` takes linear
layers and products of matrices to oneDNN while it is entered.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def fast_products(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Float32 products by oneDNN within this context where they are faster: on a CPU that MKL does not favour.

    For inference alone: what is computed has no gradient. Products under autocast and of other types are left to torch.
    """
    return _OneDNN() if device.type == "cpu" and _onednn_is_faster() else contextlib.nullcontext()


@functools.cache
def _onednn_is_faster() -> bool:
    """Whether torch multiplies with MKL on an AMD processor and has the operator, which is not a public one."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and _vendor() == "AuthenticAMD"):
        return False
    try:
        return bool(torch.allclose(_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)), torch.full((2, 4), 4.0)))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _vendor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")), "")
    return platform.processor().rsplit(" ", 1)[-1]  # Windows: "..., AuthenticAMD"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # a view with gaps would send oneDNN to its slowest code
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")


def _matmul(x: Tensor, other: Tensor) -> Tensor | None:
    return _linear(x, other.t()) if x.dim() == other.dim() == 2 else None


def _addmm_(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x.add_(_linear(a, b.t()))


def _addmm(x: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    return _linear(a, b.t(), x) if x.dim() == 1 and x.shape[0] == b.shape[1] else None


_PRODUCTS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    torch.addmm: _addmm,
    torch.Tensor.addmm_: _addmm_,
}


class _OneDNN(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = _PRODUCTS.get(func)
        if product is not None and not kwargs and not torch.is_autocast_enabled("cpu"):
            tensors = [x for x in args if x is not None]
            plain = all(isinstance(x, Tensor) and x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
            if plain and len(tensors) <= 3 and args[0].dim() > 1 and all(x.numel() for x in tensors):
                found = product(*args)
                if found is not None:
                    return found
        return func(*args, **(kwargs or {}))
