"""Triton engine of `fastclap.kernels.scaled_adam`: one launch steps any number of parameters.

A table on the device says where each parameter, its gradient and its state are; programs take equal parts of one
parameter each. Values are read and written once: sums in two launches (parts, then the parts of each parameter in a
fixed order, so that they are bit-identical from run to run), the step in one. A step that is skipped reads a flag.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclap.kernels.offline import Compilation, signature_and_attrs
from fastclap.kernels.triton_tools import jit_for_any_size, launch

BLOCK, PART = 1024, 16384  # values that a program has in registers, and that it goes through
WARPS = 4
COLUMNS = 5  # of the table: addresses of p, g, Δ and v, and whether there is a gradient


@triton.jit
def _pointer(table, column, ALIGNED: tl.constexpr):
    """The float32 tensor whose address stands in a row of the table."""
    pointer = tl.load(table + column).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _read(pointers, inside):
    """A block of float32, zero where not `inside`; None: all of it."""
    return tl.load(pointers) if inside is None else tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _added(square, total, p, g, at, inside, gain):
    """Σg² and Σp·g with the values of a block."""
    x = _read(p + at, inside)
    y = _read(g + at, inside) * gain
    return square + y * y, total + x * y


@jit_for_any_size("")
def _sums_kernel(
    table, owner, first, sizes, partial,
    COLUMNS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Σg² and Σp·g of a part, [parts, 2]."""
    part = tl.program_id(0)
    index = tl.load(owner + part)
    size = tl.load(sizes + index)
    begin = (part - tl.load(first + index)).to(tl.int64) * PART
    row = table + index * COLUMNS
    p, g = _pointer(row, 0, ALIGNED), _pointer(row, 1, ALIGNED)
    gain = tl.load(row + 4).to(tl.float32)
    square, total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for block in range(begin, tl.minimum(begin + PART, size), BLOCK):
        at = block + tl.arange(0, BLOCK)
        if block + BLOCK <= size:
            square, total = _added(square, total, p, g, at, None, gain)
        else:
            square, total = _added(square, total, p, g, at, at < size, gain)
    tl.store(partial + 2 * part, tl.sum(square))
    tl.store(partial + 2 * part + 1, tl.sum(total))


@jit_for_any_size("")
def _totals_kernel(partial, first, out, WIDTH: tl.constexpr):
    """The sums of a parameter's parts, [n, 2]."""
    index = tl.program_id(0)
    end = tl.load(first + index + 1)
    square, total = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for begin in range(tl.load(first + index), end, WIDTH):
        part = begin + tl.arange(0, WIDTH)
        square += tl.load(partial + 2 * part, mask=part < end, other=0.0)
        total += tl.load(partial + 2 * part + 1, mask=part < end, other=0.0)
    tl.store(out + 2 * index, tl.sum(square))
    tl.store(out + 2 * index + 1, tl.sum(total))


@triton.jit
def _advance(p, g, delta, square, at, inside, gain, rate, grown, beta1, beta2, remainder, inverse, eps):
    """The step of a block."""
    x = _read(p + at, inside)
    y = _read(g + at, inside) * gain
    d = _read(delta + at, inside)
    v = beta2 * _read(square + at, inside) + remainder * y * y
    d = beta1 * d + grown * x + rate * tl.math.div_rn(y, tl.math.sqrt_rn(v * inverse) + eps)
    tl.store(square + at, v, mask=inside)
    tl.store(delta + at, d, mask=inside)
    tl.store(p + at, x + d, mask=inside)


@jit_for_any_size("")
def _update_kernel(
    table, owner, first, sizes, rates, growth, scale, skip, beta1, beta2, remainder, inverse, eps,
    COLUMNS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    if tl.load(skip) == 0:
        index = tl.load(owner + part)
        size = tl.load(sizes + index)
        begin = (part - tl.load(first + index)).to(tl.int64) * PART
        row = table + index * COLUMNS
        p, g = _pointer(row, 0, ALIGNED), _pointer(row, 1, ALIGNED)
        delta, square = _pointer(row, 2, ALIGNED), _pointer(row, 3, ALIGNED)
        gain = tl.load(scale) * tl.load(row + 4).to(tl.float32)
        rate = tl.load(rates + index)
        grown = 0.0
        if growth is not None:
            grown = tl.load(growth + index)
        for block in range(begin, tl.minimum(begin + PART, size), BLOCK):
            at = block + tl.arange(0, BLOCK)
            if block + BLOCK <= size:
                _advance(p, g, delta, square, at, None, gain, rate, grown, beta1, beta2, remainder, inverse, eps)
            else:
                _advance(p, g, delta, square, at, at < size, gain, rate, grown, beta1, beta2, remainder, inverse, eps)


class _Layout(NamedTuple):
    """Which parameter each part belongs to; on the device."""

    parts: int
    owner: Tensor  # int32 [parts]
    first: Tensor  # int32 [n + 1]: part of each parameter
    sizes: Tensor  # int64 [n]


@functools.lru_cache(maxsize=16)
def _layout(sizes: tuple[int, ...], device: torch.device) -> _Layout:
    """Made once for a model; this waits for the device."""
    size = torch.tensor(sizes)
    counts = (size + PART - 1) // PART
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    owner = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(counts)
    return _Layout(int(first[-1]), owner.to(device), first.to(device), size.to(device))


def _table(columns: list[list[Tensor]], gradients: list[Tensor | None]) -> tuple[Tensor, bool]:
    """The table of p, Δ and v (or of p alone, which then stands for them), and whether all are aligned to 16 bytes.

    In the place of a gradient that is None the parameter is read, and multiplied by zero.
    """
    addresses = [[x.data_ptr() for x in column] for column in columns]
    addresses += [addresses[0]] * (3 - len(columns))
    p, delta, square = addresses
    g = [own if x is None else x.data_ptr() for own, x in zip(p, gradients, strict=True)]
    present = [int(x is not None) for x in gradients]
    rows = list(zip(p, g, delta, square, present, strict=True))
    aligned = not any(address % 16 for row in rows for address in row[:4])
    table = torch.tensor(rows, dtype=torch.int64)
    device = columns[0][0].device
    return (table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table), aligned


def sums(parameters: list[Tensor], gradients: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """As `scaled_adam.sums`."""
    layout = _layout(tuple(p.numel() for p in parameters), parameters[0].device)
    table, aligned = _table([parameters], gradients)
    partial = parameters[0].new_empty(layout.parts, 2)
    out = parameters[0].new_empty(len(parameters), 2)
    launch(
        _sums_kernel, layout.parts, aligned, table, layout.owner, layout.first, layout.sizes, partial,
        COLUMNS=COLUMNS, PART=PART, BLOCK=BLOCK, ALIGNED=aligned, num_warps=WARPS,
    )  # fmt: skip
    launch(_totals_kernel, len(parameters), (), partial, layout.first, out, WIDTH=256, num_warps=WARPS)
    return out[:, 0], out[:, 1]


def update_(
    parameters: list[Tensor],
    gradients: list[Tensor | None],
    deltas: list[Tensor],
    squares: list[Tensor],
    rates: Tensor,  # [n]
    growth: Tensor | None,  # [n]
    scale: Tensor,  # []
    skip: Tensor,  # bool []
    beta1: float,
    beta2: float,
    correction: float,
    eps: float,
) -> None:
    """As `scaled_adam.update_`; gradients stay as they are."""
    layout = _layout(tuple(p.numel() for p in parameters), parameters[0].device)
    table, aligned = _table([parameters, deltas, squares], gradients)
    growth = None if growth is None else growth.contiguous()
    launch(
        _update_kernel, layout.parts, (aligned, growth is None),
        table, layout.owner, layout.first, layout.sizes, rates.contiguous(), growth, scale, skip,
        beta1, beta2, 1 - beta2, 1 / correction, eps,
        COLUMNS=COLUMNS, PART=PART, BLOCK=BLOCK, ALIGNED=aligned, num_warps=WARPS,
    )  # fmt: skip


def compilations(arch: int) -> Iterator[Compilation]:
    """All forms; `arch` changes none of them."""
    types = {"table": "*i64", "sizes": "*i64", "owner": "*i32", "first": "*i32", "skip": "*u1"}
    types |= dict.fromkeys(("beta1", "beta2", "remainder", "inverse", "eps"), "fp32")
    for aligned, kernel in product((True, False), (_sums_kernel, _update_kernel)):
        for absent in ((), ("growth",)) if kernel is _update_kernel else ((),):
            constants = {**dict.fromkeys(absent), "COLUMNS": COLUMNS, "PART": PART, "BLOCK": BLOCK, "ALIGNED": aligned}
            signature, attrs = signature_and_attrs(kernel, types, constants)
            name = f"scaled adam {'sums' if kernel is _sums_kernel else 'step'}{' no growth' * bool(absent)}"
            name += "" if aligned else " unaligned"
            yield Compilation(name, kernel, signature, constants, attrs, WARPS, 3, False)
    signature, attrs = signature_and_attrs(_totals_kernel, types, {"WIDTH": 256})
    yield Compilation("scaled adam totals", _totals_kernel, signature, {"WIDTH": 256}, attrs, WARPS, 3, False)
