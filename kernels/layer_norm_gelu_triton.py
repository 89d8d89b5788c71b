"""Triton engine of `fastclap.kernels.layer_norm_gelu`: one kernel forward, one backward.

Both are bound by memory, and a program keeps whole rows in registers: x is read once, also for the variance about the
mean. There are as many programs as stay on the GPU at once, and they walk over the rows, so that each reads weight and
bias once. A tile holds 16 values a thread: in the backward pass the sums for dweight and dbias, one number for each
value of a tile, then fit in registers too, and for them nothing crosses between threads before a program's end.

Every program writes its sums for dweight and dbias to a slot of its own, and torch adds the slots in a fixed order:
results are bit-identical from run to run.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.offline import Compilation, signature_and_attrs
from fastclap.kernels.triton_tools import TYPE_NAMES, jit_for_any_size

VALUES = 16  # of a tile, a thread
NARROWEST = 16
RELOADED = 8192  # from this width on weight and bias do not stay in registers
# Registers a thread, which no form needs to spill for; so many warps fit a multiprocessor at once, and no more start:
# a program that waits for another's end would come last.
FORWARD_REGISTERS, BACKWARD_REGISTERS = 80, 128
FORWARD_WARPS, BACKWARD_WARPS = 24, 16


@triton.jit
def _rows_at(x, row, stride, column, inside):
    return tl.load(x + (row.to(tl.int64) * stride)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _affine(weight, bias, COLUMNS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr):
    """Weight and bias as [1, WIDTH] float32."""
    column = tl.arange(0, WIDTH)
    w = tl.full((WIDTH,), 1.0, tl.float32)
    b = tl.zeros((WIDTH,), tl.float32)
    if WEIGHT:
        w = tl.load(weight + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    if BIAS:
        b = tl.load(bias + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    return w[None, :], b[None, :]


@jit_for_any_size("rows eps")
def _forward_kernel(
    x, weight, bias, y, mean, inverse_std,  # [rows, columns] with a stride; [columns]; [rows, columns]; [rows] float32
    rows, stride, eps,
    COLUMNS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RELOAD: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    w, b = _affine(weight, bias, COLUMNS, WEIGHT, BIAS, WIDTH)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
        if RELOAD:
            w, b = _affine(weight, bias, COLUMNS, WEIGHT, BIAS, WIDTH)
        values = _rows_at(x, row, stride, column, inside)
        average = tl.sum(values, 1) / COLUMNS
        centred = tl.where(inside, values - average[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 1) / COLUMNS + eps)
        z = centred * inverse[:, None] * w + b
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
        at = (row.to(tl.int64) * COLUMNS)[:, None] + column[None, :]
        tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)
        tl.store(mean + row, average, mask=row < rows)
        tl.store(inverse_std + row, inverse, mask=row < rows)


@jit_for_any_size("rows")
def _backward_kernel(
    upstream, x, weight, bias, mean, inverse_std,  # [rows, columns] twice, with strides; [columns]; [rows] float32
    dx, sums,  # [rows, columns]; [2, programs, columns] float32: dweight and dbias
    rows, stride, upstream_stride,
    COLUMNS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SUMS: tl.constexpr, RELOAD: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    w, b = _affine(weight, bias, COLUMNS, WEIGHT, BIAS, WIDTH)
    if SUMS:
        dweight = tl.zeros((ROWS, WIDTH), tl.float32)
        dbias = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
        if RELOAD:
            w, b = _affine(weight, bias, COLUMNS, WEIGHT, BIAS, WIDTH)
        values = _rows_at(x, row, stride, column, inside)
        dy = _rows_at(upstream, row, upstream_stride, column, inside)
        average = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        inverse = tl.load(inverse_std + row, mask=row < rows, other=0.0)[:, None]
        normal = tl.where(inside, (values - average) * inverse, 0.0)
        z = normal * w + b
        share = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        dz = dy * (share + z * density)
        if SUMS:
            dweight += dz * normal
            dbias += dz
        dz *= w
        along = tl.sum(dz * normal, 1) / COLUMNS
        level = tl.sum(dz, 1) / COLUMNS
        dz = (dz - level[:, None] - normal * along[:, None]) * inverse
        at = (row.to(tl.int64) * COLUMNS)[:, None] + column[None, :]
        tl.store(dx + at, dz.to(dx.dtype.element_ty), mask=inside)
    if SUMS:
        sums += tl.program_id(0).to(tl.int64) * COLUMNS + column
        tl.store(sums, tl.sum(dweight, 0), mask=column < COLUMNS)
        sums += tl.num_programs(0).to(tl.int64) * COLUMNS
        tl.store(sums, tl.sum(dbias, 0), mask=column < COLUMNS)


# ---------------------------------------------------------------------------------------------------------------------
# Launch
# ---------------------------------------------------------------------------------------------------------------------


@cache
def _tile(columns: int) -> tuple[int, int, int]:
    """(rows, width, warps) of a tile: 4 warps, or as many as a row needs."""
    width = max(triton.next_power_of_2(columns), NARROWEST)
    warps = max(4, width // (32 * VALUES))
    return warps * 32 * VALUES // width, width, warps


def _programs(x: Tensor, tiles: int, warps: int, resident: int) -> int:
    return min(tiles, dispatch.multiprocessors(x.device.index) * max(1, resident // warps))


def _rows(x: Tensor, columns: int) -> Tensor:
    """x as [rows, columns], its rows contiguous; a view where it can be one."""
    rows = x.reshape(-1, columns)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def forward(
    x: Tensor,  # [..., C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [..., C] in the dtype of x, mean and inverse standard deviation [...] float32), for checked arguments."""
    columns = x.shape[-1]
    matrix = _rows(x, columns)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, inverse_std = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    rows, width, warps = _tile(columns)
    programs = _programs(x, triton.cdiv(len(matrix), rows), warps, FORWARD_WARPS)
    with torch.cuda.device_of(x):
        _forward_kernel[(programs,)](
            matrix, matrix if weight is None else weight, matrix if bias is None else bias, y, mean, inverse_std,
            len(matrix), matrix.stride(0), eps,
            COLUMNS=columns, WEIGHT=weight is not None, BIAS=bias is not None, RELOAD=width >= RELOADED,
            ROWS=rows, WIDTH=width, num_warps=warps, maxnreg=FORWARD_REGISTERS,
        )  # fmt: skip
    return y, mean, inverse_std


def backward(
    upstream: Tensor,  # [..., C]
    x: Tensor,  # [..., C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    mean: Tensor,  # [...]
    inverse_std: Tensor,  # [...]
    need: list[bool],  # of x, weight and bias
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the dtypes of x, weight and bias; an empty tensor for each that is not needed."""
    columns = x.shape[-1]
    matrix, dy = _rows(x, columns), _rows(upstream, columns)
    mean, inverse_std = mean.contiguous(), inverse_std.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    rows, width, warps = _tile(columns)
    programs = _programs(x, triton.cdiv(len(matrix), rows), warps, BACKWARD_WARPS)
    summed = need[1] or need[2]
    sums = torch.empty((2, programs, columns) if summed else (1,), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[(programs,)](
            dy, matrix, matrix if weight is None else weight, matrix if bias is None else bias, mean, inverse_std,
            dx, sums, len(matrix), matrix.stride(0), dy.stride(0),
            COLUMNS=columns, WEIGHT=weight is not None, BIAS=bias is not None, SUMS=summed, RELOAD=width >= RELOADED,
            ROWS=rows, WIDTH=width, num_warps=warps, maxnreg=BACKWARD_REGISTERS,
        )  # fmt: skip
    totals = sums.sum(1) if summed else None
    gradients = [dx if need[0] else x.new_empty(0)]
    for index, parameter in enumerate((weight, bias)):
        wanted = totals is not None and parameter is not None and need[index + 1]
        # a copy, as an operator's results must not share memory
        gradients.append(totals[index].to(parameter.dtype, copy=True) if wanted else x.new_empty(0))  # type: ignore[index,union-attr]
    return gradients[0], gradients[1], gradients[2]


# ---------------------------------------------------------------------------------------------------------------------
# What the launcher may ask Triton to compile
# ---------------------------------------------------------------------------------------------------------------------

# The family's, and one that is neither a power of two nor a multiple of 16; one warp a row and more; the widest.
WIDTHS = (512, 80, 500, 1024, 8192)


def compilations(arch: int) -> Iterator[Compilation]:
    """Every form at the family's width; the others, whose code differs in the tile alone, with weight and bias."""
    both = (False, True)
    kinds = [TYPE_NAMES[dtype] for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    for columns, kind, parameter in product(WIDTHS, kinds, kinds):
        if parameter not in (kind, "fp32") or (columns != WIDTHS[0] and parameter != "fp32"):
            continue
        for weight, bias, sums in product(both, both, both):
            if (columns == WIDTHS[0] or (weight and bias)) and sums <= (weight or bias):
                label = f"{columns} {kind} {parameter}{' weight' * weight}{' bias' * bias}"
                flags = {"WEIGHT": weight, "BIAS": bias}
                if not sums:
                    yield _compilation(f"forward {label}", _forward_kernel, columns, kind, parameter, flags)
                label += " sums" * sums
                flags = {**flags, "SUMS": sums}
                yield _compilation(f"backward {label}", _backward_kernel, columns, kind, parameter, flags)


def _compilation(
    name: str, function: Any, columns: int, kind: str, parameter: str, flags: dict[str, bool]
) -> Compilation:
    rows, width, warps = _tile(columns)
    types = {"x": kind, "y": kind, "dx": kind, "upstream": kind, "mean": "fp32", "inverse_std": "fp32", "sums": "fp32"}
    types["weight"] = parameter if flags["WEIGHT"] else kind  # x stands in for what is not there
    types["bias"] = parameter if flags["BIAS"] else kind
    strides = ("stride", "upstream_stride")
    types = {name: f"*{kind}" for name, kind in types.items()} | dict.fromkeys(strides, "i32") | {"eps": "fp32"}
    constants = {**flags, "COLUMNS": columns, "RELOAD": width >= RELOADED, "ROWS": rows, "WIDTH": width}
    signature, attrs = signature_and_attrs(function, types, constants, strides if columns % 16 else ())
    registers = FORWARD_REGISTERS if function is _forward_kernel else BACKWARD_REGISTERS
    return Compilation(f"layer norm gelu {name}", function, signature, constants, attrs, warps, 3, False, registers)
