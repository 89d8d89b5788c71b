"""Triton engine of `fastclap.kernels.resampling`: one kernel each way for both operators.

A program has whole rows in registers, as those of `fastclap.kernels.residual_layer_norm_triton`, and works group by
group: it reads a group's rows of the higher rate, and its one row of the lower, once. There are as many programs as fit
a GPU's registers at once. The gradient of scale is summed in registers, a slot a program; that of the few weights is
summed over a row, a number for each weight and group. torch adds both in a fixed order: results are bit-identical from
run to run.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclap.kernels.layer_norm_gelu_triton import _float32, _programs
from fastclap.kernels.offline import Compilation, signature_and_attrs
from fastclap.kernels.residual_layer_norm_triton import _columns, launch_tile
from fastclap.kernels.triton_tools import jit_for_any_size


@triton.jit
def _row(x, row, column, inside, COLUMNS: tl.constexpr):
    return _float32(tl.load(x + tl.cast(row, tl.int64) * COLUMNS + column, mask=inside, other=0.0))


@triton.jit
def _store(x, row, column, inside, values, COLUMNS: tl.constexpr):
    tl.store(x + tl.cast(row, tl.int64) * COLUMNS + column, values.to(x.dtype.element_ty), mask=inside)


@jit_for_any_size("groups", "weights first")
def _down_kernel(
    x, weights, first, y, groups,  # [rows, COLUMNS]; [SIZE]; int [groups + 1]; [groups, COLUMNS]
    COLUMNS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = _columns(WIDTH)
    inside = column < COLUMNS
    for group in tl.range(tl.program_id(0), groups, tl.num_programs(0)):
        begin, end = tl.load(first + group), tl.load(first + group + 1)
        total = tl.zeros((WIDTH,), tl.float32)
        for k in tl.static_range(SIZE):
            weight = tl.load(weights + k).to(tl.float32)
            total += weight * _row(x, tl.minimum(begin + k, end - 1), column, inside, COLUMNS)
        _store(y, group, column, inside, total, COLUMNS)


@jit_for_any_size("groups", "weights first")
def _down_backward_kernel(
    dy, x, weights, first, dx, sums, groups,  # sums: [groups, SIZE] float32, of weights
    COLUMNS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = _columns(WIDTH)
    inside = column < COLUMNS
    for group in tl.range(tl.program_id(0), groups, tl.num_programs(0)):
        begin, end = tl.load(first + group), tl.load(first + group + 1)
        gradient = _row(dy, group, column, inside, COLUMNS)
        share = 0.0
        for k in tl.static_range(SIZE):
            # from the last weight on: a group's last row has the weights of those that it lacks too
            at = SIZE - 1 - k
            share += tl.load(weights + at).to(tl.float32)
            if sums is not None:
                values = _row(x, tl.minimum(begin + at, end - 1), column, inside, COLUMNS)
                tl.store(sums + tl.cast(group, tl.int64) * SIZE + at, tl.sum(gradient * values, 0))
            _store(dx, begin + at, column, inside & (begin + at < end), gradient * share, COLUMNS)
            share = tl.where(begin + at < end, 0.0, share)


@jit_for_any_size("groups", "first")
def _up_kernel(
    original, x, scale, first, y, groups,  # [rows, COLUMNS]; [groups, COLUMNS]; [COLUMNS]; int [groups + 1]
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = _columns(WIDTH)
    inside = column < COLUMNS
    factor = tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    for group in tl.range(tl.program_id(0), groups, tl.num_programs(0)):
        values = _row(x, group, column, inside, COLUMNS)
        for row in tl.range(tl.load(first + group), tl.load(first + group + 1)):
            before = _row(original, row, column, inside, COLUMNS)
            _store(y, row, column, inside, before + (values - before) * factor, COLUMNS)


@jit_for_any_size("groups", "first")
def _up_backward_kernel(
    dy, original, x, scale, first, d_original, dx, sums, groups,  # sums: [programs, COLUMNS] float32, of scale
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = _columns(WIDTH)
    inside = column < COLUMNS
    factor = tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    of_scale = tl.zeros((WIDTH,), tl.float32)
    for group in tl.range(tl.program_id(0), groups, tl.num_programs(0)):
        if sums is not None:
            values = _row(x, group, column, inside, COLUMNS)
        total = tl.zeros((WIDTH,), tl.float32)
        for row in tl.range(tl.load(first + group), tl.load(first + group + 1)):
            gradient = _row(dy, row, column, inside, COLUMNS)
            part = gradient * factor
            total += part
            _store(d_original, row, column, inside, gradient - part, COLUMNS)
            if sums is not None:
                of_scale += gradient * (values - _row(original, row, column, inside, COLUMNS))
        _store(dx, group, column, inside, total, COLUMNS)
    if sums is not None:
        _store(sums, tl.program_id(0), column, inside, of_scale, COLUMNS)


# ---------------------------------------------------------------------------------------------------------------------
# Launch
# ---------------------------------------------------------------------------------------------------------------------


def _run(
    kernel: Any, groups: int, columns: int, tensors: Sequence[Tensor | None], programs: int, **constants: Any
) -> None:
    _, width, warps, registers = launch_tile(columns, backward=True)
    device = next(t for t in tensors if t is not None)
    with torch.cuda.device_of(device):
        kernel[(programs,)](
            *tensors, groups, COLUMNS=columns, **constants, WIDTH=width, num_warps=warps, maxnreg=registers
        )


def _resident(x: Tensor, groups: int, columns: int) -> int:
    return _programs(x, groups, *launch_tile(columns, backward=True)[2:])


def downsample(
    x: Tensor,  # [R, C]
    weights: Tensor,  # [S]
    first: Tensor,  # int [D + 1]
) -> Tensor:
    """[D, C] in the dtype of x, for checked arguments."""
    groups, columns = len(first) - 1, x.shape[1]
    y = torch.empty((groups, columns), dtype=x.dtype, device=x.device)
    tensors = [x.contiguous(), weights.contiguous(), first.contiguous(), y]
    _run(_down_kernel, groups, columns, tensors, _resident(x, groups, columns), SIZE=len(weights))
    return y


def downsample_backward(
    dy: Tensor,  # [D, C]
    x: Tensor,  # [R, C]
    weights: Tensor,  # [S]
    first: Tensor,  # int [D + 1]
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of weights in float32, an empty tensor where that is not needed."""
    groups, columns, size = *dy.shape, len(weights)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty((groups, size), dtype=torch.float32, device=x.device) if need_weights else None
    tensors = [dy.contiguous(), x.contiguous(), weights.contiguous(), first.contiguous(), dx, sums]
    _run(_down_backward_kernel, groups, columns, tensors, _resident(x, groups, columns), SIZE=size)
    return dx, x.new_empty(0, dtype=torch.float32) if sums is None else sums.sum(0)


def upsample_bypass(
    original: Tensor,  # [R, C]
    x: Tensor,  # [D, C]
    scale: Tensor,  # [C]
    first: Tensor,  # int [D + 1]
) -> Tensor:
    """[R, C] in the dtype of original, for checked arguments."""
    groups, columns = x.shape
    y = torch.empty(original.shape, dtype=original.dtype, device=x.device)
    tensors = [original.contiguous(), x.contiguous(), scale.contiguous(), first.contiguous(), y]
    _run(_up_kernel, groups, columns, tensors, _resident(x, groups, columns))
    return y


def upsample_bypass_backward(
    dy: Tensor,  # [R, C]
    original: Tensor,  # [R, C]
    x: Tensor,  # [D, C]
    scale: Tensor,  # [C]
    first: Tensor,  # int [D + 1]
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of original and x, and of scale in float32, an empty tensor where that is not needed."""
    groups, columns = x.shape
    of_original = torch.empty(original.shape, dtype=original.dtype, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = _resident(x, groups, columns)
    sums = torch.empty((programs, columns), dtype=torch.float32, device=x.device) if need_scale else None
    inputs = [t.contiguous() for t in (dy, original, x, scale, first)]
    _run(_up_backward_kernel, groups, columns, [*inputs, of_original, dx, sums], programs)
    return of_original, dx, x.new_empty(0, dtype=torch.float32) if sums is None else sums.sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# What the launcher may ask Triton to compile
# ---------------------------------------------------------------------------------------------------------------------


def compilations(arch: int) -> Iterator[Compilation]:
    """The Zipformer's: its width, groups of 2, 4 and 8 rows, and a narrow one of 3; float32 and 16-bit streams."""
    for (columns, sizes), kind in product(((1280, (2, 4, 8)), (80, (3,))), ("fp32", "bf16", "fp16")):
        for size in sizes:
            for sums in (True, False):
                if sums:
                    yield _compilation(_down_kernel, columns, kind, f"down {size}", {"SIZE": size})
                missing = {} if sums else {"sums": None}
                label = f"down backward {size}{' sums' * sums}"
                yield _compilation(_down_backward_kernel, columns, kind, label, {"SIZE": size, **missing})
        yield _compilation(_up_kernel, columns, kind, "up", {})
        yield _compilation(_up_backward_kernel, columns, kind, "up backward sums", {})
        yield _compilation(_up_backward_kernel, columns, kind, "up backward", {"sums": None})


def _compilation(function: Any, columns: int, kind: str, label: str, constants: dict[str, Any]) -> Compilation:
    _, width, warps, registers = launch_tile(columns, backward=True)
    types = dict.fromkeys(("dy", "x", "dx", "y", "original", "d_original"), f"*{kind}") | {"first": "*i32"}
    constants = {"COLUMNS": columns, "WIDTH": width, **constants}
    signature, attrs = signature_and_attrs(function, types, constants)
    return Compilation(
        f"resampling {label} {columns} {kind}", function, signature, constants, attrs, warps, 3, False, registers
    )
