"""Triton engine of `fastclap.kernels.swoosh`: launches of the kernel of `fastclap.kernels.feed_forward_triton`.

Forward it reads x and writes a, 4 bytes a value in bf16; backward it reads x and da and writes dx and a, 8 bytes. The
mask's factors, 4 bytes a value, are read once for each clip and program.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from fastclap.kernels.feed_forward_triton import compilation, run
from fastclap.kernels.offline import Compilation
from fastclap.kernels.triton_tools import TYPE_NAMES


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward(
    x: Tensor,  # [rows, H]
    mask: Tensor | None,  # [B, H]
    sequence: Tensor | None,  # int [rows]
    kind: str,
) -> Tensor:
    """swoosh(x) · mask[sequence], for checked arguments."""
    a = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    run(f"swoosh {kind}", x.contiguous(), None, _contiguous(mask), _contiguous(sequence), a=a)
    return a


def slope(x: Tensor, dy: Tensor, kind: str) -> Tensor:
    """dx = dy · swoosh'(x), [...]."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns = x.shape[-1] if x.dim() else 1
    flat = [t.to(x.dtype).contiguous().view(-1, columns) for t in (x, dy, dx)]
    run(f"swoosh {kind}", *flat[:2], du=flat[2])
    return dx


def backward(
    x: Tensor,  # [rows, H]
    da: Tensor,  # [rows, H], overwritten
    mask: Tensor | None,  # [B, H]
    sequence: Tensor | None,  # int [rows]
    kind: str,
    need_a: bool,
) -> Tensor:
    """Overwrites `da` with dx = da · mask[sequence] · swoosh'(x), for checked arguments.

    Returns:
        swoosh(x) · mask[sequence] in the dtype of x, if it is needed, else an empty tensor.
    """
    dx = da.contiguous()
    a = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_a else None
    run(f"swoosh {kind}", x.contiguous(), dx, _contiguous(mask), _contiguous(sequence), a=a, du=dx)
    if dx is not da:
        da.copy_(dx)
    return x.new_empty(0) if a is None else a


# ---------------------------------------------------------------------------------------------------------------------
# What the launcher may ask Triton to compile
# ---------------------------------------------------------------------------------------------------------------------


def compilations(arch: int) -> Iterator[Compilation]:
    """Both kinds, forward, backward with and without a, without a mask and with one in float32, whose clips are int64;
    then the other dtypes of masks and clips, which change a conversion alone, of the step's kind."""
    passes = {"forward": ("da", "du"), "backward": ("a",), "backward a": ()}
    dtypes = [dtype for dtype in TYPE_NAMES if dtype != torch.int16]
    for aligned, kind, dtype, (name, absent), masked in product((True, False), "lr", dtypes, passes.items(), (0, 1)):
        types = {"mask": "*fp32", "sequence": "*i64"} if masked else {}
        missing = ("sums", *absent, *(() if masked else ("mask", "sequence")))
        label = f"swoosh {kind} {name} {TYPE_NAMES[dtype]}{' mask' * masked}"
        yield compilation(label, f"swoosh {kind}", dtype, types, missing, aligned)
    for mask, clips in (("bf16", "i64"), ("fp16", "i64"), ("fp32", "i32"), ("bf16", "i32"), ("fp16", "i32")):
        for name, absent in (("forward", ("da", "du")), ("backward a", ())):
            types = {"mask": f"*{mask}", "sequence": f"*{clips}"}
            label = f"swoosh l {name} bf16 mask {mask} of {clips}"
            yield compilation(label, "swoosh l", torch.bfloat16, types, ("sums", *absent), True)
