"""Triton engine of `fastclap.kernels.feed_forward`: one kernel, between the products of its backward pass.

The kernel serves other activations too (`fastclap.kernels.swoosh_triton`), then with the dropout that follows them.

It is made to be bound by memory. A program is one warp and has a strip of columns, of which each thread reads 16 bytes
a row and tensor. It walks down the rows, so that the sum of du over them stays in its registers, and nothing crosses
between threads. There are as many programs as fit a GPU's registers at once, which keeps 32 KB a multiprocessor under
way. Each writes its sums to a slot of its own, in float32 and of du before it is rounded, and torch adds the slots in a
fixed order: results are bit-identical from run to run. Beside a mask of dropout, which has a row of factors a clip, a
program has rows that follow each other, and reads the factors again only where the clip changes.

du takes the place of da: a value is read and written by the same thread, and by no other.

GELU and its derivative are those of `fastclap.kernels.layer_norm_gelu_triton`, with their errors. Swoosh, whose
formulas stand in `fastclap.kernels.swoosh`, is ln(1 + e^t) = max(t, 0) + ln(1 + e^-|t|) and a line: no exponential
overflows, and the logarithm is a polynomial.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from fastclap.kernels.triton_tools import LOG2E, TYPE_NAMES, jit_for_any_size

BYTES_OF_ROW = 512  # of a program, and of each tensor: 16 for each thread of a warp
REGISTERS = 64  # of a thread, which no form needs to spill for

# ln(1 + s) / s for 0 ≤ s ≤ 1, highest power first: for 16-bit tensors, with a relative error of 8.6e-6, and for
# float32, calculated in which it is 1.9e-7. Triton's logarithm takes 20 instructions.
# fmt: off
LOG1P = (-0.0238691531, 0.101222299, -0.21004872, 0.325206697, -0.499361366, 0.999991596)
FINE_LOG1P = (
    0.00523269456, -0.0295052435, 0.0782259628, -0.136632472, 0.191060081, -0.24842982, 0.333190978, -0.499994934,
    0.99999994,
)
# fmt: on
_LOG1P, _FINE_LOG1P = tl.constexpr(LOG1P), tl.constexpr(FINE_LOG1P)


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, COUNT: tl.constexpr):
    total = x * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, COUNT):
        total = total * x + COEFFICIENTS[i]
    return total


@triton.jit
def _value_and_slope(z, ACTIVATION: tl.constexpr, FINE: tl.constexpr):
    """An activation and its derivative; what is not used of the two is not computed."""
    if ACTIVATION == "gelu":
        return _gelu_of_twice(z * 0.5, FINE), _gelu_slope(z, FINE)
    else:
        t = z - (4.0 if ACTIVATION == "swoosh l" else 1.0)
        # One exponential, of at most 1, gives ln(1 + e^t) and the logistic function of t.
        small = tl.exp2(-tl.abs(t) * LOG2E)
        value = tl.maximum(t, 0.0) + small * _polynomial(small, _FINE_LOG1P if FINE else _LOG1P, 9 if FINE else 6)
        logistic = tl.where(t >= 0, 1.0, small) / (1.0 + small)
        return value - 0.08 * z - (0.035 if ACTIVATION == "swoosh l" else 0.313261687), logistic - 0.08


@jit_for_any_size("rows chunk")
def _activation_kernel(
    u, da, mask, sequence,  # [rows, columns] twice; float [clips, columns]; int [rows]
    a, du, sums,  # [rows, columns] twice; [slots, columns] float32
    rows, columns, chunk,
    ACTIVATION: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    fine: tl.constexpr = u.dtype.element_ty == tl.float32
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    wide = tl.cast(columns, tl.int64)
    total = tl.zeros((WIDTH,), tl.float32)
    first, end, step = tl.program_id(1), rows, tl.num_programs(1)
    if mask is not None:  # rows in a row, so that a program reads the factors of a clip once
        first, end, step = first * chunk, tl.minimum(first * chunk + chunk, rows), 1
        clip = tl.cast(-1, tl.int64)
        factor = tl.zeros((WIDTH,), tl.float32)
    for row in tl.range(first, end, step):
        at = row * wide + column
        z = _float32(tl.load(u + at, mask=inside, other=0.0))
        if da is not None:
            gradient = _float32(tl.load(da + at, mask=inside, other=0.0))
        value, slope = _value_and_slope(z, ACTIVATION, fine)
        if mask is not None:
            of_row = tl.load(sequence + row).to(tl.int64)
            if of_row != clip:
                factor = tl.load(mask + of_row * columns + column, mask=inside, other=0.0).to(tl.float32)
                clip = of_row
            value *= factor
            slope *= factor
        if da is not None:
            gradient *= slope
            tl.store(du + at, gradient.to(du.dtype.element_ty), mask=inside)
        if a is not None:
            tl.store(a + at, value.to(a.dtype.element_ty), mask=inside)
        if sums is not None:
            total += gradient
    if sums is not None:
        tl.store(sums + tl.program_id(1) * wide + column, total, mask=inside)


def _width(dtype: torch.dtype) -> int:
    return BYTES_OF_ROW // dtype.itemsize


def run(
    activation: str,  # "gelu", "swoosh l" or "swoosh r"
    u: Tensor,  # [rows, H]
    da: Tensor | None = None,  # [rows, H]
    mask: Tensor | None = None,  # [B, H]
    sequence: Tensor | None = None,  # int [rows], of the mask
    *,
    a: Tensor | None = None,  # [rows, H], to be written
    du: Tensor | None = None,  # [rows, H], to be written, or `da` itself
    need_sum: bool = False,
) -> Tensor | None:
    """Writes a = f(u) · mask and du = da · mask · f'(u), for contiguous tensors of one dtype but the mask.

    Returns:
        The sums of du over the rows, [H] float32, where they are needed.
    """
    rows, columns = u.shape
    strips = triton.cdiv(columns, _width(u.dtype))
    programs = dispatch.multiprocessors(u.device.index) * programs_of_multiprocessor(1, REGISTERS)
    slots = min(rows, triton.cdiv(programs, max(strips, 1)))
    chunk = triton.cdiv(rows, slots)
    if mask is not None:
        slots = triton.cdiv(rows, chunk)
    sums = torch.empty((slots, columns), dtype=torch.float32, device=u.device) if need_sum else None
    with torch.cuda.device_of(u):
        _activation_kernel[(strips, slots)](
            u, da, mask, sequence, a, du, sums, rows, columns, chunk,
            ACTIVATION=activation, WIDTH=_width(u.dtype), num_warps=1, maxnreg=REGISTERS,
        )  # fmt: skip
    return None if sums is None else sums.sum(0)


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
    a = torch.empty(u.shape if need_a else 0, dtype=u.dtype, device=u.device)
    sums = run("gelu", u, du, a=a if need_a else None, du=du, need_sum=need_sum)
    if du is not da:
        da.copy_(du)
    return a, u.new_empty(0, dtype=torch.float32) if sums is None else sums


# ---------------------------------------------------------------------------------------------------------------------
# What the launcher may ask Triton to compile
# ---------------------------------------------------------------------------------------------------------------------


def compilations(arch: int) -> Iterator[Compilation]:
    """Every form at a hidden width that is a multiple of 16; at others, whose code differs in loads and stores, all."""
    both = (False, True)
    for aligned, dtype, need_a, need_sum in product((True, False), TYPE_NAMES, both, both):
        if dtype != torch.int16:
            absent = [name for name, there in (("a", need_a), ("sums", need_sum)) if not there]
            name = f"feed forward {TYPE_NAMES[dtype]}{' a' * need_a}{' sums' * need_sum}"
            yield compilation(name, "gelu", dtype, {}, ("mask", "sequence", *absent), aligned)


def compilation(
    name: str, activation: str, dtype: torch.dtype, types: dict[str, str], absent: Sequence[str], aligned: bool
) -> Compilation:
    """One of `run`, with `types` of mask and sequence, and without what is `absent`."""
    types = types | dict.fromkeys(("u", "da", "a", "du"), f"*{TYPE_NAMES[dtype]}") | {"columns": "i32"}
    constants = {**dict.fromkeys(absent), "ACTIVATION": activation, "WIDTH": _width(dtype)}
    signature, attrs = signature_and_attrs(_activation_kernel, types, constants, () if aligned else ("columns",))
    label = f"{name}{' unaligned' * (not aligned)}"
    return Compilation(label, _activation_kernel, signature, constants, attrs, 1, 3, False, REGISTERS)
