"""Triton engine of `fastclap.kernels.feed_forward`: one kernel, between the products of its backward pass.

It is made to be bound by memory. A program is one warp and has a strip of columns, of which each thread reads 16 bytes
a row and tensor. It walks down the rows, so that the sum of du over them stays in its registers, and nothing crosses
between threads. There are as many programs as fit a GPU's registers at once, which keeps 32 KB a multiprocessor under
way. Each writes its sums to a slot of its own, in float32 and of du before it is rounded, and torch adds the slots in a
fixed order: results are bit-identical from run to run.

du takes the place of da: a value is read and written by the same thread, and by no other.

GELU and its derivative are those of `fastclap.kernels.layer_norm_gelu_triton`, with their errors.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.layer_norm_gelu_triton import (
    _float32,
    _gelu_of_twice,
    _gelu_slope,
    programs_of_multiprocessor,
)
from fastclap.kernels.offline import Compilation, signature_and_attrs
from fastclap.kernels.triton_tools import TYPE_NAMES, jit_for_any_size

BYTES_OF_ROW = 512  # of a program, and of each tensor: 16 for each thread of a warp
REGISTERS = 64  # of a thread, which no form needs to spill for


@jit_for_any_size("rows")
def _backward_kernel(
    u, da, a, sums,  # [rows, columns] three times; [slots, columns] float32
    rows, columns,
    A: tl.constexpr, SUMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    fine: tl.constexpr = u.dtype.element_ty == tl.float32
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    wide = tl.cast(columns, tl.int64)
    total = tl.zeros((WIDTH,), tl.float32)
    for row in tl.range(tl.program_id(1), rows, tl.num_programs(1)):
        at = row * wide + column
        z = _float32(tl.load(u + at, mask=inside, other=0.0))
        du = _float32(tl.load(da + at, mask=inside, other=0.0)) * _gelu_slope(z, fine)
        tl.store(da + at, du.to(da.dtype.element_ty), mask=inside)
        if A:
            tl.store(a + at, _gelu_of_twice(z * 0.5, fine).to(a.dtype.element_ty), mask=inside)
        if SUMS:
            total += du
    if SUMS:
        tl.store(sums + tl.program_id(1) * wide + column, total, mask=inside)


def _width(dtype: torch.dtype) -> int:
    return BYTES_OF_ROW // dtype.itemsize


def gelu_backward(
    u: Tensor,  # [rows, H]
    da: Tensor,  # [rows, H], overwritten
    need_a: bool,
    need_sum: bool,
) -> tuple[Tensor, Tensor]:
    """Overwrites `da` with du = da · gelu'(u), for checked arguments of one dtype.

    Returns:
        gelu(u) in the dtype of u, and the sums of du over the rows, [H] float32; an empty tensor for what is not
        needed.
    """
    u, du = u.contiguous(), da.contiguous()
    rows, columns = u.shape
    a = torch.empty(u.shape if need_a else 0, dtype=u.dtype, device=u.device)
    strips = triton.cdiv(columns, _width(u.dtype))
    programs = dispatch.multiprocessors(u.device.index) * programs_of_multiprocessor(1, REGISTERS)
    slots = min(rows, triton.cdiv(programs, max(strips, 1)))
    sums = torch.empty((slots, columns) if need_sum else 0, dtype=torch.float32, device=u.device)
    with torch.cuda.device_of(u):
        _backward_kernel[(strips, slots)](
            u, du, a, sums, rows, columns,
            A=need_a, SUMS=need_sum, WIDTH=_width(u.dtype), num_warps=1, maxnreg=REGISTERS,
        )  # fmt: skip
    if du is not da:
        da.copy_(du)
    return a, sums.sum(0) if need_sum else sums


# ---------------------------------------------------------------------------------------------------------------------
# What the launcher may ask Triton to compile
# ---------------------------------------------------------------------------------------------------------------------


def compilations(arch: int) -> Iterator[Compilation]:
    """Every form at a hidden width that is a multiple of 16; at others, whose code differs in loads and stores, all."""
    both = (False, True)
    for aligned, dtype, need_a, need_sum in product((True, False), TYPE_NAMES, both, both):
        if dtype == torch.int16:
            continue
        types = dict.fromkeys(("u", "da", "a"), f"*{TYPE_NAMES[dtype]}") | {"columns": "i32"}
        constants = {"A": need_a, "SUMS": need_sum, "WIDTH": _width(dtype)}
        signature, attrs = signature_and_attrs(_backward_kernel, types, constants, () if aligned else ("columns",))
        name = f"feed forward {TYPE_NAMES[dtype]}{' a' * need_a}{' sums' * need_sum}{' unaligned' * (not aligned)}"
        yield Compilation(name, _backward_kernel, signature, constants, attrs, 1, 3, False, REGISTERS)
