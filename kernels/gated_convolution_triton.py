"""Triton engine of `fastclap.kernels.gated_convolution`: one kernel forward, one backward.

A program is one warp and has a column a thread. It walks down the rows of its share with a window of K of them in
registers, the gated values forward, the gradients backward, beside the column's weights, so that every row is read
once, gated once, and nothing crosses between threads. In a turn it reads a few rows at once, which then are many
loads under way, and moves the window by as many.

Forward a value takes K multiply-adds; backward, where y[r] took g[i] with weight k = i - r + K // 2, one window of dy
around row i serves both

    dg[i] = Σ_k weight[k] · dy[i - k + K // 2]    and    dweight[k] += dy[i - k + K // 2] · g[i],

2 K multiply-adds, and g is computed again from u. Shares are of equal length whatever the clips: at a share's start,
and where a clip begins in it, the window is filled anew. There are as many programs as fit a GPU's registers at once.
The sums for weight and bias stay in registers; each program writes its own to a slot, and torch adds the slots in a
fixed order: results are bit-identical from run to run.
"""

# mypy: disallow-untyped-defs=False
# ruff: noqa: RUF005 - Triton knows sums of tuples, and no (*tuple, element)

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.layer_norm_gelu_triton import _float32, programs_of_multiprocessor
from fastclap.kernels.offline import Compilation, signature_and_attrs
from fastclap.kernels.triton_tools import LOG2E, TYPE_NAMES, jit_for_any_size

WIDTH = 32  # columns of a program
FORWARD_REGISTERS, BACKWARD_REGISTERS = 128, 168  # of a thread, which no form needs to spill for
TURN = 8  # rows that are read at once
SHORTEST_SHARE = 64  # rows: of shorter ones the filling of the window would be most of the work


@triton.jit
def _clip_of(starts, clips, row):
    """The last clip that begins at or before a row."""
    low, high = tl.cast(0, tl.int32), tl.cast(clips, tl.int32)
    while low + 1 < high:
        middle = (low + high) // 2
        before = tl.load(starts + middle) <= row
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    return low


@triton.jit
def _bounds(starts, clip, row, stop):
    """First row of a clip, and its end; and where the rows of a share that are of this clip end."""
    begin, end = tl.load(starts + clip).to(tl.int32), tl.load(starts + clip + 1).to(tl.int32)
    return begin, end, tl.maximum(row, tl.minimum(end, stop))


@triton.jit
def _weights(weight, column, inside, TAPS: tl.constexpr):
    found = ()
    for k in tl.static_range(TAPS):
        found = found + (tl.load(weight + column * TAPS + k, mask=inside, other=0.0).to(tl.float32),)
    return found


@triton.jit
def _row_of(x, row, begin, end, stride, column, inside):
    """A row's values in these columns, zeros outside of begin ≤ row < end."""
    there = inside & (row >= begin) & (row < end)
    return _float32(tl.load(x + row * stride + column, mask=there, other=0.0))


@triton.jit
def _gates(u, row, begin, end, columns, column, inside):
    """Value and sigmoid(gate) of a row; the value is 0 outside of begin ≤ row < end."""
    value = _row_of(u, row, begin, end, 2 * columns, column, inside)
    gate = _row_of(u + columns, row, begin, end, 2 * columns, column, inside)
    return value, 1.0 / (1.0 + tl.exp2(-LOG2E * gate))


@triton.jit
def _gated(u, row, begin, end, columns, column, inside):
    value, gate = _gates(u, row, begin, end, columns, column, inside)
    return value * gate


@jit_for_any_size("rows clips columns share")
def _forward_kernel(
    u, weight, bias, starts, y,  # [rows, 2 columns]; [columns, TAPS]; [columns]; int [clips + 1]; [rows, columns]
    rows, clips, columns, share,
    TAPS: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = TAPS // 2
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    wide = tl.cast(columns, tl.int64)
    weights = _weights(weight, column, inside, TAPS)
    level = tl.zeros((WIDTH,), tl.float32)
    if bias is not None:
        level += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    row = tl.program_id(1) * share
    stop = tl.minimum(row + share, rows)
    clip = _clip_of(starts, clips, row)
    while (row < stop) & (clip < clips):
        begin, end, last = _bounds(starts, clip, row, stop)
        window = ()
        for j in tl.static_range(TAPS - 1):
            window = window + (_gated(u, row - half + j, begin, end, wide, column, inside),)
        for at in tl.range(row, last, TURN):
            for j in tl.static_range(TURN):
                window = window + (_gated(u, at + half + j, begin, end, wide, column, inside),)
            for j in tl.static_range(TURN):
                total = level
                for k in tl.static_range(TAPS):
                    total += weights[k] * window[j + k]
                tl.store(y + (at + j) * wide + column, total.to(y.dtype.element_ty), mask=inside & (at + j < last))
            window = window[TURN:]
        row = last
        clip += 1


@jit_for_any_size("rows clips columns share")
def _backward_kernel(
    dy, u, weight, starts,  # [rows, columns]; [rows, 2 columns]; [columns, TAPS]; int [clips + 1]
    du, sums,  # [rows, 2 columns]; [shares, TAPS + 1, columns] float32: of weight, then of bias
    rows, clips, columns, share,
    TAPS: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = TAPS // 2
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    wide = tl.cast(columns, tl.int64)
    weights = _weights(weight, column, inside, TAPS)
    totals = ()
    for _ in tl.static_range(TAPS + 1):
        totals = totals + (tl.zeros((WIDTH,), tl.float32),)
    row = tl.program_id(1) * share
    stop = tl.minimum(row + share, rows)
    clip = _clip_of(starts, clips, row)
    while (row < stop) & (clip < clips):
        begin, end, last = _bounds(starts, clip, row, stop)
        window = ()
        for j in tl.static_range(TAPS - 1):
            window = window + (_row_of(dy, row - half + j, begin, end, wide, column, inside),)
        for at in tl.range(row, last, TURN):
            values = ()
            gates = ()
            for j in tl.static_range(TURN):
                window = window + (_row_of(dy, at + half + j, begin, end, wide, column, inside),)
                value, gate = _gates(u, at + j, begin, last, wide, column, inside)
                values = values + (value,)
                gates = gates + (gate,)
            for j in tl.static_range(TURN):
                gated = values[j] * gates[j]
                gradient = tl.zeros((WIDTH,), tl.float32)
                new = ()
                for k in tl.static_range(TAPS):
                    gradient += weights[k] * window[j + TAPS - 1 - k]
                    if sums is not None:
                        new = new + (totals[k] + window[j + TAPS - 1 - k] * gated,)
                if sums is not None:
                    totals = new + (totals[TAPS] + tl.where(at + j < last, window[j + half], 0.0),)
                there = inside & (at + j < last)
                place = du + (at + j) * (2 * wide) + column
                tl.store(place, (gradient * gates[j]).to(du.dtype.element_ty), mask=there)
                of_gate = gradient * gated * (1.0 - gates[j])
                tl.store(place + wide, of_gate.to(du.dtype.element_ty), mask=there)
            window = window[TURN:]
        row = last
        clip += 1
    if sums is not None:
        sums += tl.program_id(1) * (TAPS + 1) * wide + column
        for k in tl.static_range(TAPS + 1):
            tl.store(sums + k * wide, totals[k], mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Launch
# ---------------------------------------------------------------------------------------------------------------------


def _shares(x: Tensor, rows: int, columns: int, registers: int) -> tuple[int, int, int]:
    """(strips of columns, shares of rows, rows of a share)."""
    strips = triton.cdiv(columns, WIDTH)
    programs = dispatch.multiprocessors(x.device.index) * programs_of_multiprocessor(1, registers)
    share = max(SHORTEST_SHARE, triton.cdiv(rows, triton.cdiv(programs, strips)))
    return strips, triton.cdiv(rows, share), share


def forward(
    u: Tensor,  # [R, 2 C]
    weight: Tensor,  # [C, 1, K]
    bias: Tensor | None,  # [C]
    starts: Tensor,  # int [B + 1]
) -> Tensor:
    """[R, C] in the dtype of u, for checked arguments."""
    rows, columns = len(u), u.shape[1] // 2
    y = torch.empty((rows, columns), dtype=u.dtype, device=u.device)
    strips, shares, share = _shares(u, rows, columns, FORWARD_REGISTERS)
    with torch.cuda.device_of(u):
        _forward_kernel[(strips, shares)](
            u.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), starts.contiguous(), y,
            rows, len(starts) - 1, columns, share,
            TAPS=weight.shape[2], WIDTH=WIDTH, TURN=TURN, num_warps=1, maxnreg=FORWARD_REGISTERS,
        )  # fmt: skip
    return y


def backward(
    dy: Tensor,  # [R, C]
    u: Tensor,  # [R, 2 C]
    weight: Tensor,  # [C, 1, K]
    starts: Tensor,  # int [B + 1]
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, and of weight and bias in float32, empty tensors where these are not needed."""
    rows, columns, taps = *dy.shape, weight.shape[2]
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    strips, shares, share = _shares(u, rows, columns, BACKWARD_REGISTERS)
    sums = torch.empty((shares, taps + 1, columns), dtype=torch.float32, device=u.device) if need_sums else None
    with torch.cuda.device_of(u):
        _backward_kernel[(strips, shares)](
            dy.contiguous(), u.contiguous(), weight.contiguous(), starts.contiguous(), du, sums,
            rows, len(starts) - 1, columns, share,
            TAPS=taps, WIDTH=WIDTH, TURN=TURN, num_warps=1, maxnreg=BACKWARD_REGISTERS,
        )  # fmt: skip
    if sums is None:
        return du, *(torch.empty(0, dtype=torch.float32, device=u.device) for _ in range(2))
    total = sums.sum(0)  # [K + 1, C]
    return du, total[:taps].t().contiguous()[:, None], total[taps].clone()


# ---------------------------------------------------------------------------------------------------------------------
# What the launcher may ask Triton to compile
# ---------------------------------------------------------------------------------------------------------------------

# Dtypes of u and of the parameters.
KINDS = (("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"))


def compilations(arch: int) -> Iterator[Compilation]:
    """The Zipformer's two kernels, and a small one, with bias and without, backward with sums and without."""
    assert all(kind in TYPE_NAMES.values() for kinds in KINDS for kind in kinds)
    for taps, (kind, parameters), full in product((31, 15, 3), KINDS, (True, False)):
        types = dict.fromkeys(("u", "y", "dy", "du"), f"*{kind}") | {"starts": "*i32"}
        types |= dict.fromkeys(("weight", "bias"), f"*{parameters}")
        for function, absent in ((_forward_kernel, "bias"), (_backward_kernel, "sums")):
            constants = {"TAPS": taps, "WIDTH": WIDTH, "TURN": TURN} | ({} if full else {absent: None})
            signature, attrs = signature_and_attrs(function, types, constants)
            forward = function is _forward_kernel
            label = f"{'forward' if forward else 'backward'} {taps} {kind} {parameters}{f' {absent}' * full}"
            registers = FORWARD_REGISTERS if forward else BACKWARD_REGISTERS
            name = f"gated convolution {label}"
            yield Compilation(name, function, signature, constants, attrs, 1, 3, False, registers)
