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

# mypy: disallow-untyped-defs=False, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 - mypy has no tuples that grow; Triton knows sums of tuples, and no (*tuple, element)

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
from fastclap.kernels.triton_tools import LOG2E, jit_for_any_size

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
def _row_of(x, row, begin, end, inside):
    """Values of a row that x points to, zeros outside of begin ≤ row < end."""
    return _float32(tl.load(x, mask=inside & (row >= begin) & (row < end), other=0.0))


@triton.jit
def _gates(u, row, begin, end, inside, COLUMNS: tl.constexpr):
    """Value and sigmoid(gate) of a row that u points to; the value is 0 outside of begin ≤ row < end."""
    gate = _row_of(u + COLUMNS, row, begin, end, inside)
    return _row_of(u, row, begin, end, inside), 1.0 / (1.0 + tl.exp2(-LOG2E * gate))


@triton.jit
def _gated(u, row, begin, end, inside, COLUMNS: tl.constexpr):
    value, gate = _gates(u, row, begin, end, inside, COLUMNS)
    return value * gate


@triton.jit
def _pointers(x, row, column, STRIDE: tl.constexpr):
    return x + tl.cast(row, tl.int64) * STRIDE + column


@jit_for_any_size("rows clips share")
def _forward_kernel(
    u, weight, bias, starts, y,  # [rows, 2 COLUMNS]; [COLUMNS, TAPS]; [COLUMNS]; int [clips + 1]; [rows, COLUMNS]
    rows, clips, share,
    COLUMNS: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = TAPS // 2
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = (column < COLUMNS) | (COLUMNS % WIDTH == 0)
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
        first = _pointers(u, row - half, column, 2 * COLUMNS)
        for j in tl.static_range(TAPS - 1):
            window = window + (_gated(first + j * 2 * COLUMNS, row - half + j, begin, end, inside, COLUMNS),)
        for at in tl.range(row, last, TURN):
            ahead = _pointers(u, at + half, column, 2 * COLUMNS)
            for j in tl.static_range(TURN):
                window = window + (_gated(ahead + j * 2 * COLUMNS, at + half + j, begin, end, inside, COLUMNS),)
            place = _pointers(y, at, column, COLUMNS)
            for j in tl.static_range(TURN):
                total = level
                for k in tl.static_range(TAPS):
                    total += weights[k] * window[j + k]
                tl.store(place + j * COLUMNS, total.to(y.dtype.element_ty), mask=inside & (at + j < last))
            window = window[TURN:]
        row = last
        clip += 1


@jit_for_any_size("rows clips share")
def _backward_kernel(
    dy, u, weight, starts,  # [rows, COLUMNS]; [rows, 2 COLUMNS]; [COLUMNS, TAPS]; int [clips + 1]
    du, sums,  # [rows, 2 COLUMNS]; [shares, TAPS + 1, COLUMNS] float32: of weight, then of bias
    rows, clips, share,
    COLUMNS: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = TAPS // 2
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = (column < COLUMNS) | (COLUMNS % WIDTH == 0)
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
        first = _pointers(dy, row - half, column, COLUMNS)
        for j in tl.static_range(TAPS - 1):
            window = window + (_row_of(first + j * COLUMNS, row - half + j, begin, end, inside),)
        for at in tl.range(row, last, TURN):
            values = ()
            gates = ()
            ahead = _pointers(dy, at + half, column, COLUMNS)
            here = _pointers(u, at, column, 2 * COLUMNS)
            for j in tl.static_range(TURN):
                window = window + (_row_of(ahead + j * COLUMNS, at + half + j, begin, end, inside),)
                value, gate = _gates(here + j * 2 * COLUMNS, at + j, begin, last, inside, COLUMNS)
                values = values + (value,)
                gates = gates + (gate,)
            place = _pointers(du, at, column, 2 * COLUMNS)
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
                tl.store(place + j * 2 * COLUMNS, (gradient * gates[j]).to(du.dtype.element_ty), mask=there)
                of_gate = (gradient * gated * (1.0 - gates[j])).to(du.dtype.element_ty)
                tl.store(place + (2 * j + 1) * COLUMNS, of_gate, mask=there)
            window = window[TURN:]
        row = last
        clip += 1
    if sums is not None:
        sums += tl.cast(tl.program_id(1), tl.int64) * (TAPS + 1) * COLUMNS + column
        for k in tl.static_range(TAPS + 1):
            tl.store(sums + k * COLUMNS, totals[k], mask=inside)


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
            rows, len(starts) - 1, share,
            COLUMNS=columns, TAPS=weight.shape[2], WIDTH=WIDTH, TURN=TURN, num_warps=1, maxnreg=FORWARD_REGISTERS,
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
            rows, len(starts) - 1, share,
            COLUMNS=columns, TAPS=taps, WIDTH=WIDTH, TURN=TURN, num_warps=1, maxnreg=BACKWARD_REGISTERS,
        )  # fmt: skip
    if sums is None:
        none = [torch.empty(0, dtype=torch.float32, device=u.device) for _ in range(2)]
        return du, none[0], none[1]
    total = sums.sum(0)  # [K + 1, C]
    return du, total[:taps].t().contiguous()[:, None], total[taps].clone()


# ---------------------------------------------------------------------------------------------------------------------
# What the launcher may ask Triton to compile
# ---------------------------------------------------------------------------------------------------------------------

# Dtypes of u and of the parameters.
KINDS = (("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("bf16", "bf16"))
SIZES = ((1280, 31), (1280, 15), (40, 3))  # columns and taps: the Zipformer's two, and a small one


def compilations(arch: int) -> Iterator[Compilation]:
    """Training's forms: the Zipformer's in bf16 and float32, the small ones, which compile in no time, in every dtype;
    and in bf16 the Zipformer's without bias or sums."""
    for (columns, taps), kinds, full in product(SIZES, KINDS, (True, False)):
        model = columns == SIZES[0][0]
        if (full and (not model or kinds in (KINDS[0], KINDS[2]))) or (model and kinds == KINDS[0]):
            for function, absent in ((_forward_kernel, "bias"), (_backward_kernel, "sums")):
                forward = function is _forward_kernel
                types = dict.fromkeys(("u", "y", "dy", "du"), f"*{kinds[0]}") | {"starts": "*i32"}
                types |= dict.fromkeys(("weight", "bias"), f"*{kinds[1]}")
                constants: dict[str, int | None] = {"COLUMNS": columns, "TAPS": taps, "WIDTH": WIDTH, "TURN": TURN}
                constants |= {} if full else {absent: None}
                signature, attrs = signature_and_attrs(function, types, constants)
                label = f"{columns} of {taps} {kinds[0]} {kinds[1]}{'' if full else f' no {absent}'}"
                name = f"gated convolution {'forward' if forward else 'backward'} {label}"
                registers = FORWARD_REGISTERS if forward else BACKWARD_REGISTERS
                yield Compilation(name, function, signature, constants, attrs, 1, 3, False, registers)
