"""Triton engine of `fastclap.kernels.waveform_convolution`: one kernel forward, one backward.

Both multiply windows of samples, [rows, kernel + 1] with a last column of ones for the bias, by filters that are
centred over the channels: u = F·x is then the convolution less its mean over channels, and LayerNorm is u / std alone.
A product over 16 columns costs a quarter of an instruction a value, so the backward pass computes u again instead of
reading it.

GELU is that of `fastclap.kernels.layer_norm_gelu_triton`.

*Forward.* A program has all channels of 16 rows in registers, reads the samples of the next 16 while it works on
these, and writes y and each row's 1 / std.

*Backward.* With g = dy · gelu'(z) / std, w the weight of the norm and s = mean over channels of (g·w·u) / std²,

    du = g·w - s·u        dF = Σ du xᵀ = w · Σ g xᵀ - F · Σ s x xᵀ        dw = Σ g·u = Σ over taps of F · Σ g xᵀ

and db = Σ g·std, so that two small matrices are all that is summed over rows: P = Σ g xᵀ, where two more columns of x
hold std (in two parts, as 16 bits are few), and M = Σ s x xᵀ. Each term is linear in g: a program takes 128 channels,
and nothing crosses between those. No du is formed. What is the same for all channels is left in dF: the filters'
centring takes it out.

Channels are the rows of the backward pass's products, as g is then an operand in the registers in which it arises. Its
programs have two warps, because Triton gives four and more other matrix instructions, which want larger tiles.

Every program writes P and M to a slot of its own, and torch adds the slots in a fixed order: results are bit-identical
from run to run.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.layer_norm_gelu_triton import _float32, _gelu_of_twice, _gelu_slope
from fastclap.kernels.offline import REGISTERS_OF_SM, Compilation, signature_and_attrs
from fastclap.kernels.triton_tools import PRECISIONS, TYPE_NAMES, jit_for_any_size

ROWS = 16  # of a tile: the least of a matrix instruction
NARROWEST = 16  # channels of a tile, and columns of windows
CHANNELS_OF_WARP = 64  # 32 values a thread
CHUNK = 128  # channels of a program of the backward pass
# Registers a thread, which no form needs to spill for; as many programs start as a multiprocessor has registers for.
FORWARD_REGISTERS, BACKWARD_REGISTERS, BACKWARD_SM100_REGISTERS, MOST_REGISTERS = 128, 168, 200, 255
PAST_ANY_END = tl.constexpr(1 << 30)


@triton.jit
def _windows(
    waveform, tile, total, rows, samples, stride_of_clips,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """[ROWS, K] float32: a row's samples, those past the clip's end zero, then one, then zeros."""
    row = tile * ROWS + tl.arange(0, ROWS)
    tap = tl.arange(0, K)
    clip = row // rows
    at = ((row - clip * rows) * STRIDE)[:, None] + tl.where(tap < KERNEL, tap, PAST_ANY_END)[None, :]
    inside = at < tl.where(row < total, samples, 0)[:, None]
    one = tl.where(tap == KERNEL, 1.0, 0.0).to(waveform.dtype.element_ty)[None, :]
    x = tl.load(waveform + (clip.to(tl.int64) * stride_of_clips)[:, None] + at, mask=inside, other=one)
    return x.to(tl.float32)


@jit_for_any_size("total rows samples stride_of_clips eps", "waveform")
def _forward_kernel(
    waveform, filters, weight, bias,  # [B, samples] with a stride; [COLUMNS, KERNEL + 1] float32; [COLUMNS]
    y, inverse_std,  # [B, rows, COLUMNS]; [B, rows] float32
    total, rows, samples, stride_of_clips, eps,  # total: B · rows
    COLUMNS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    fine: tl.constexpr = y.dtype.element_ty == tl.float32
    column, tap = tl.arange(0, WIDTH), tl.arange(0, K)
    there = (tap <= KERNEL)[:, None] & (column < COLUMNS)[None, :]
    f = tl.load(filters + column[None, :] * (KERNEL + 1) + tap[:, None], mask=there, other=0.0).to(y.dtype.element_ty)
    w = 0.5 * tl.load(weight + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[None, :]
    b = 0.5 * tl.load(bias + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[None, :]
    x = _windows(waveform, tl.program_id(0), total, rows, samples, stride_of_clips, KERNEL, STRIDE, K, ROWS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0)):
        u = tl.dot(x.to(f.dtype), f, input_precision=PRECISION)
        following = tile + tl.num_programs(0)
        x = _windows(waveform, following, total, rows, samples, stride_of_clips, KERNEL, STRIDE, K, ROWS)
        inverse = tl.rsqrt(tl.sum(u * u, 1) / COLUMNS + eps)
        z = _gelu_of_twice(u * inverse[:, None] * w + b, fine)
        row = tile * ROWS + tl.arange(0, ROWS)
        at = (row.to(tl.int64) * COLUMNS)[:, None] + column[None, :]
        tl.store(y + at, z.to(y.dtype.element_ty), mask=(row < total)[:, None] & (column < COLUMNS)[None, :])
        tl.store(inverse_std + row, inverse, mask=row < total)


@jit_for_any_size("total rows samples stride_of_clips", "waveform")
def _backward_kernel(
    upstream, waveform, filters, weight, bias, inverse_std,  # [B, rows, COLUMNS]; as above
    sums,  # [programs, COLUMNS + chunks · K, K] float32: P, then M of every chunk
    total, rows, samples, stride_of_clips,
    COLUMNS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = upstream.dtype.element_ty
    operand: tl.constexpr = tl.float32 if dtype == tl.float16 else dtype  # g may be beyond float16's range
    chunk = tl.program_id(1)
    column, tap = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, K)
    there = (column < COLUMNS)[:, None] & (tap <= KERNEL)[None, :]
    f = tl.load(filters + column[:, None] * (KERNEL + 1) + tap[None, :], mask=there, other=0.0).to(dtype)
    w = tl.load(weight + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[:, None]
    b = tl.load(bias + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[:, None]
    p = tl.zeros((CHUNK, K), tl.float32)
    m = tl.zeros((K, K), tl.float32)
    x = _windows(waveform, tl.program_id(0), total, rows, samples, stride_of_clips, KERNEL, STRIDE, K, ROWS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0), num_stages=1):
        row = tile * ROWS + tl.arange(0, ROWS)
        at = (row.to(tl.int64) * COLUMNS)[None, :] + column[:, None]
        dy = tl.load(upstream + at, mask=(row < total)[None, :] & (column < COLUMNS)[:, None], other=0.0)
        inverse = tl.load(inverse_std + row, mask=row < total, other=1.0)
        v = tl.dot(f, tl.trans(x.to(dtype)), input_precision=PRECISION) * w
        g = _float32(dy) * _gelu_slope(v * inverse[None, :] + b, dtype == tl.float32) * inverse[None, :]
        share = tl.sum(g * v, 0) * inverse * inverse / COLUMNS
        std = (1.0 / inverse)[:, None]
        coarse = std.to(tl.bfloat16).to(tl.float32)
        more = tl.where((tap == KERNEL + 1)[None, :], coarse, tl.where((tap == KERNEL + 2)[None, :], std - coarse, x))
        p = tl.dot(g.to(operand), more.to(operand), p, input_precision=PRECISION)
        m = tl.dot(tl.trans((share[:, None] * x).to(operand)), x.to(operand), m, input_precision=PRECISION)
        following = tile + tl.num_programs(0)
        x = _windows(waveform, following, total, rows, samples, stride_of_clips, KERNEL, STRIDE, K, ROWS)
    sums += tl.program_id(0).to(tl.int64) * ((COLUMNS + tl.num_programs(1) * K) * K)
    tl.store(sums + column[:, None] * K + tap[None, :], p, mask=(column < COLUMNS)[:, None])
    tl.store(sums + (COLUMNS + chunk * K + tap)[:, None] * K + tap[None, :], m)


# ---------------------------------------------------------------------------------------------------------------------
# Launch
# ---------------------------------------------------------------------------------------------------------------------


class Tile:
    """What a launch of either kernel is compiled with."""

    def __init__(self, columns: int, taps: int, dtype: torch.dtype, arch: int, backward: bool) -> None:
        width = max(triton.next_power_of_2(columns), NARROWEST)
        self.width = min(width, CHUNK) if backward else width
        self.warps = max(1, self.width // CHANNELS_OF_WARP)
        self.chunks = triton.cdiv(columns, self.width)
        self.padded_taps = max(triton.next_power_of_2(taps + 2), NARROWEST)
        self.registers = FORWARD_REGISTERS
        if backward:
            self.registers = MOST_REGISTERS
            if arch < 100 and dtype != torch.float32:
                self.registers = BACKWARD_REGISTERS
            elif dtype == torch.bfloat16:
                self.registers = BACKWARD_SM100_REGISTERS

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor has registers for."""
        return max(1, REGISTERS_OF_SM // (-(-self.registers // 8) * 8 * 32 * self.warps))

    def programs(self, x: Tensor, total: int) -> int:
        """For each chunk of channels."""
        most = max(1, dispatch.multiprocessors(x.device.index) * self.resident // self.chunks)
        return min(triton.cdiv(total, ROWS), most)


def _arch(x: Tensor) -> int:
    return dispatch.architecture(dispatch.index_of(x.device))


def _precision(dtype: torch.dtype) -> str:
    return PRECISIONS[torch.get_float32_matmul_precision()] if dtype == torch.float32 else "tf32"


def _inputs(waveform: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    return (waveform if waveform.stride(1) == 1 else waveform.contiguous(), *(x.contiguous() for x in others))


def forward(
    waveform: Tensor,  # [B, samples]
    filters: Tensor,  # [C, kernel + 1] float32, centred over the channels; the bias last
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    stride: int,
    rows: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(y [B, rows, C] in `dtype`, inverse standard deviation [B, rows] float32), for checked arguments."""
    (columns, taps), (batch, samples) = filters.shape, waveform.shape
    inputs = _inputs(waveform, filters, weight, bias)
    y = torch.empty(batch, rows, columns, dtype=dtype, device=waveform.device)
    inverse_std = torch.empty(batch, rows, dtype=torch.float32, device=waveform.device)
    tile, total = Tile(columns, taps, dtype, _arch(waveform), False), batch * rows
    with torch.cuda.device_of(waveform):
        _forward_kernel[(tile.programs(waveform, total),)](
            *inputs, y, inverse_std, total, rows, samples, inputs[0].stride(0), eps,
            COLUMNS=columns, KERNEL=taps - 1, STRIDE=stride, PRECISION=_precision(dtype), ROWS=ROWS, WIDTH=tile.width,
            K=tile.padded_taps, num_warps=tile.warps, maxnreg=tile.registers,
        )  # fmt: skip
    return y, inverse_std


def backward(
    upstream: Tensor,  # [B, rows, C]
    waveform: Tensor,  # [B, samples]
    filters: Tensor,  # [C, kernel + 1]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    inverse_std: Tensor,  # [B, rows]
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of filters, weight and bias in their dtypes, for checked arguments.

    That of filters is determined up to what all channels have in common.
    """
    (columns, taps), (batch, rows, _), dtype = filters.shape, upstream.shape, upstream.dtype
    tile, total = Tile(columns, taps, dtype, _arch(waveform), True), batch * rows
    programs, padded = tile.programs(waveform, total), tile.padded_taps
    slot = (columns + tile.chunks * padded, padded)
    sums = torch.empty(programs, *slot, dtype=torch.float32, device=waveform.device)
    inputs = _inputs(waveform, filters, weight, bias, inverse_std)
    with torch.cuda.device_of(waveform):
        _backward_kernel[(programs, tile.chunks)](
            upstream.contiguous(), *inputs, sums, total, rows, waveform.shape[1], inputs[0].stride(0),
            COLUMNS=columns, KERNEL=taps - 1, STRIDE=stride, PRECISION=_precision(dtype), ROWS=ROWS, CHUNK=tile.width,
            K=padded, num_warps=tile.warps, maxnreg=tile.registers,
        )  # fmt: skip
    sums = sums.sum(0)
    p, m = sums[:columns], sums[columns:].unflatten(0, (tile.chunks, padded)).sum(0)[:taps, :taps]
    used = filters.to(dtype).float()  # as the kernels round them
    dweight = (used * p[:, :taps]).sum(1)
    dbias = p[:, taps] + p[:, taps + 1]
    # not a matrix product, which autocast and TF32 would round
    dfilters = weight.float()[:, None] * p[:, :taps] - (used[:, :, None] * m).sum(1)
    return dfilters, dweight.to(weight.dtype), dbias.to(bias.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# What the launcher may ask Triton to compile
# ---------------------------------------------------------------------------------------------------------------------

WIDTHS = (512, 80, 64, 500)  # the family's, which is the widest, narrow ones, and one that is no multiple of 16
KERNEL, STRIDE = 10, 5  # the family's


def compilations(arch: int) -> Iterator[Compilation]:
    """The family's convolution in every dtype; other widths with a waveform in that of the result."""
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    for columns, (dtype, audio, parameter) in product(WIDTHS, product(kinds, repeat=3)):
        if audio not in (dtype, torch.float32) or parameter not in (dtype, torch.float32):
            continue
        if columns != WIDTHS[0] and audio != dtype:
            continue
        for precision, backward in product(("tf32x3", "tf32") if dtype == torch.float32 else ("tf32",), (False, True)):
            yield _compilation(arch, columns, dtype, audio, parameter, precision, backward)


def _compilation(
    arch: int,
    columns: int,
    dtype: torch.dtype,
    audio: torch.dtype,
    parameter: torch.dtype,
    precision: str,
    backward: bool,
) -> Compilation:
    tile = Tile(columns, KERNEL + 1, dtype, arch, backward)
    y, x, w = (f"*{TYPE_NAMES[kind]}" for kind in (dtype, audio, parameter))
    types = {"waveform": x, "weight": w, "bias": w, "y": y, "upstream": y, "eps": "fp32"}
    constants = {
        **{"COLUMNS": columns, "KERNEL": KERNEL, "STRIDE": STRIDE, "PRECISION": precision, "ROWS": ROWS},
        **{"CHUNK" if backward else "WIDTH": tile.width, "K": tile.padded_taps},
    }
    function: Any = _backward_kernel if backward else _forward_kernel
    signature, attrs = signature_and_attrs(function, types, constants)
    kinds = " ".join(TYPE_NAMES[kind] for kind in (audio, dtype, parameter))
    name = f"waveform convolution {'backward' if backward else 'forward'} {columns} {kinds}"
    name += f" {precision}" * (dtype == torch.float32)
    return Compilation(name, function, signature, constants, attrs, tile.warps, 3, "mma.sync", tile.registers)
