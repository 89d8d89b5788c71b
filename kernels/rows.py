"""Checks that the operators on packed rows share: all clips' frames one after the other, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastclap.kernels.layer_norm_gelu import DTYPES

# Values of a row that BiasNorm's Triton engine keeps in registers; beside 8192 its sums do not fit those of sm_100.
WIDEST_BIAS_NORM = 4096


def check_floating(x: Tensor, others: Mapping[str, tuple[Tensor | None, Sequence[int]]], name: str = "x") -> None:
    """Checks that x is floating, and the others too, on its device and of their shapes; None among them is left out.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: a shape or device does not fit.
    """
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, is {x.dtype}")
    for other, (tensor, shape) in others.items():
        if tensor is None:
            continue
        if tensor.shape != tuple(shape):
            raise ValueError(f"{other} must be {list(shape)} beside {name} {list(x.shape)}, is {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{other} must be a floating tensor, is {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{other} is on {tensor.device}, {name} on {x.device}; move it there first")


def check_index(
    x: Tensor, name: str, index: Tensor, shape: Sequence[int] | None = None, *, name_of_x: str = "x"
) -> None:
    """Checks an index tensor beside x: int32 or int64, on its device, of that shape, or of one dimension; not its
    values, which would make the host wait.

    Raises:
        TypeError: it is of another dtype.
        ValueError: the shape or device does not fit.
    """
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, is {index.dtype}")
    if index.dim() != 1 if shape is None else index.shape != tuple(shape):
        wanted = "of one dimension" if shape is None else str(list(shape))
        raise ValueError(f"{name} must be {wanted} beside {name_of_x} {list(x.shape)}, is {list(index.shape)}")
    if index.device != x.device:
        raise ValueError(f"{name} is on {index.device}, {name_of_x} on {x.device}; move it there first")


def why_not_triton(named: Mapping[str, Tensor | None], columns: int = 0, widest: int = 0) -> str | None:
    """A reason of these tensors not to take the Triton engine: a dtype, or more columns than `widest`, if given."""
    for name, tensor in named.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, not float32, bfloat16 or float16"
    return f"rows have {columns} values, more than {widest}" if widest and columns > widest else None
