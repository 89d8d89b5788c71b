"""Triton engine of `fastclap.kernels.residual_layer_norm`: one kernel forward, one backward.

Both are made to be bound by memory, with the tiles of `fastclap.kernels.layer_norm_gelu_triton`: whole rows in
registers, a row of up to 1024 values one warp's, as many programs as fit a GPU's registers at once, which walk over the
rows. Every tensor is read or written once; in bytes a value, with x in float32 and the others in 16 bits,

    forward     x 4, branch 2; total 4, normalized 2                        12
    backward    total 4, its gradient 4, that of normalized 2; dx 4, dbranch 2    16

and two float32 a row, mean and inverse standard deviation, on the way from one to the other. Accesses of both widths
are of four values a thread, so that the tensors of a tile lie in the threads alike and none has to be exchanged: 16
bytes of float32, 8 of 16 bits, and whole sectors of either.

Dropout comes from a counter (`residual_layer_norm.dropout_mask`): the backward kernel computes the mask again.

Weight, bias and the branch's bias are read again for every tile, from the nearest cache: the backward kernel has its
registers for the sums of the gradients of all three, one number for each value of a tile. Every program writes its
sums to a slot of its own, and torch adds the slots in a fixed order: results are bit-identical from run to run.
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
from fastclap.kernels.layer_norm_gelu_triton import ONE_WARP, _programs, _rows, _rows_at, _tile
from fastclap.kernels.offline import Compilation, signature_and_attrs
from fastclap.kernels.toeplitz_attention_triton import _dropout_keys, _mix
from fastclap.kernels.triton_tools import jit_for_any_size

# Of a thread with 16 values, and with 32; of one with 16 in a row of several warps. No form needs to spill.
FORWARD_REGISTERS, BACKWARD_REGISTERS, WIDE_BACKWARD_REGISTERS = (112, 128), (168, 255), 128


@triton.jit
def _columns(WIDTH: tl.constexpr):
    """The columns of a tile, of which a thread has four in a row, whatever it reads there."""
    return tl.max_contiguous(tl.arange(0, WIDTH), 4)


@triton.jit
def _parameter(values, column, COLUMNS: tl.constexpr):
    """[1, WIDTH] float32."""
    return tl.load(values + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _dropped(values, seed, row, column, threshold, gain):
    """What dropout makes of a tile: see `residual_layer_norm.dropout_mask`."""
    if seed is None:
        return values
    else:
        key0, key1 = _dropout_keys(seed, row)
        # two neighbours, which one thread holds, have the same hash: it is computed once
        x = _mix(key0[:, None] + (column >> 1).to(tl.uint32)[None, :], key1[:, None])
        x = tl.where((column & 1)[None, :] > 0, x, x << 16)
        return tl.where(x.to(tl.int32, bitcast=True) >= threshold, values * gain, 0.0)


@jit_for_any_size("rows eps threshold gain")
def _forward_kernel(
    x, branch, branch_bias, seed, weight, bias,  # [rows, columns] with strides; [columns]; [1]; [columns]
    total, normalized, mean, inverse_std,  # [rows, columns] twice; [rows] float32 twice
    rows, stride, branch_stride, eps, threshold, gain,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = _columns(WIDTH)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        known = (row < rows) | (ROWS == 1)  # a tile of one row exists
        inside = known[:, None] & ((column < COLUMNS) | (COLUMNS == WIDTH))[None, :]
        at = (row.to(tl.int64) * COLUMNS)[:, None] + column[None, :]
        values = _rows_at(x, row, stride, column, inside)
        if branch is not None:
            added = _rows_at(branch, row, branch_stride, column, inside)
            if branch_bias is not None:
                added += _parameter(branch_bias, column, COLUMNS)
            values += _dropped(added, seed, row, column, threshold, gain)
            rounded = values.to(total.dtype.element_ty)
            tl.store(total + at, rounded, mask=inside)
            values = rounded.to(tl.float32)
        average = tl.sum(tl.where(inside, values, 0.0), 1) / COLUMNS
        centred = tl.where(inside, values - average[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 1) / COLUMNS + eps)
        y = centred * inverse[:, None] * _parameter(weight, column, COLUMNS) + _parameter(bias, column, COLUMNS)
        tl.store(normalized + at, y.to(normalized.dtype.element_ty), mask=inside)
        tl.store(mean + row, average, mask=known)
        tl.store(inverse_std + row, inverse, mask=known)


@jit_for_any_size("rows threshold gain")
def _backward_kernel(
    d_total, d_normalized, total,  # [rows, columns] with strides
    seed, weight, mean, inverse_std,  # [1]; [columns]; [rows] float32 twice
    dx, d_branch, sums,  # [rows, columns] twice; [3, programs, columns] float32: of weight, bias and branch_bias
    rows, d_total_stride, d_normalized_stride, stride, threshold, gain,
    NORM_SUMS: tl.constexpr, BRANCH_SUM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = _columns(WIDTH)
    if NORM_SUMS:
        dweight = tl.zeros((ROWS, WIDTH), tl.float32)
        dbias = tl.zeros((ROWS, WIDTH), tl.float32)
    if BRANCH_SUM:
        dbranch_bias = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        known = (row < rows) | (ROWS == 1)  # a tile of one row exists
        inside = known[:, None] & ((column < COLUMNS) | (COLUMNS == WIDTH))[None, :]
        at = (row.to(tl.int64) * COLUMNS)[:, None] + column[None, :]
        if d_normalized is None:
            gradient = _rows_at(d_total, row, d_total_stride, column, inside)
        else:
            values = _rows_at(total, row, stride, column, inside)
            gradient = _rows_at(d_normalized, row, d_normalized_stride, column, inside)
            average = tl.load(mean + row, mask=known, other=0.0)[:, None]
            inverse = tl.load(inverse_std + row, mask=known, other=0.0)[:, None]
            normal = values * inverse + -average * inverse  # one multiply-add a value
            if NORM_SUMS:
                dweight += gradient * normal
                dbias += gradient
            gradient *= _parameter(weight, column, COLUMNS)
            along = tl.sum(gradient * normal, 1) / COLUMNS
            level = tl.sum(gradient, 1) / COLUMNS
            gradient = (gradient - level[:, None] - normal * along[:, None]) * inverse
            if d_total is not None:
                gradient += _rows_at(d_total, row, d_total_stride, column, inside)
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=inside)
        if d_branch is not None:
            gradient = _dropped(gradient, seed, row, column, threshold, gain)
            tl.store(d_branch + at, gradient.to(d_branch.dtype.element_ty), mask=inside)
            if BRANCH_SUM:
                dbranch_bias += gradient
    sums += tl.program_id(0).to(tl.int64) * COLUMNS + column
    slots = tl.num_programs(0).to(tl.int64) * COLUMNS
    if NORM_SUMS:
        tl.store(sums, tl.sum(dweight, 0), mask=column < COLUMNS)
        tl.store(sums + slots, tl.sum(dbias, 0), mask=column < COLUMNS)
    if BRANCH_SUM:
        tl.store(sums + 2 * slots, tl.sum(dbranch_bias, 0), mask=column < COLUMNS)


# ---------------------------------------------------------------------------------------------------------------------
# Launch
# ---------------------------------------------------------------------------------------------------------------------


def launch_tile(columns: int, backward: bool) -> tuple[int, int, int, int]:
    """(rows, width, warps, registers) of a tile."""
    rows, width, warps = _tile(columns)
    if backward and width > ONE_WARP:  # what several warps exchange would not fit beside the sums of 32 values
        return rows, width, 2 * warps, WIDE_BACKWARD_REGISTERS
    with_16, with_32 = BACKWARD_REGISTERS if backward else FORWARD_REGISTERS
    return rows, width, warps, with_32 if width >= ONE_WARP else with_16


def forward(
    x: Tensor,  # [..., C]
    branch: Tensor | None,  # [..., C]
    branch_bias: Tensor | None,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    seed: Tensor | None,  # int64 [1]; None: no dropout
    dropout: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, norm [..., C] in `dtype`, mean and inverse standard deviation [...] float32), for checked arguments.

    Total is [..., C] in the dtype of x; without a branch it is empty.
    """
    columns = x.shape[-1]
    matrix, added = _rows(x, columns), None if branch is None else _rows(branch, columns)
    total = torch.empty(0 if branch is None else x.shape, dtype=x.dtype, device=x.device)
    normalized = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, inverse_std = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    rows, width, warps, registers = launch_tile(columns, backward=False)
    programs = _programs(x, triton.cdiv(len(matrix), rows), warps, registers)
    with torch.cuda.device_of(x):
        _forward_kernel[(programs,)](
            matrix, added, None if branch_bias is None else branch_bias.contiguous(), seed,
            weight.contiguous(), bias.contiguous(), None if branch is None else total, normalized, mean, inverse_std,
            len(matrix), matrix.stride(0), (matrix if added is None else added).stride(0), eps, *_of_mask(dropout),
            COLUMNS=columns, ROWS=rows, WIDTH=width, num_warps=warps, maxnreg=registers,
        )  # fmt: skip
    return total, normalized, mean, inverse_std


def backward(
    d_total: Tensor | None,  # [..., C]
    d_normalized: Tensor | None,  # [..., C]; one of the two is there
    total: Tensor,  # [..., C]
    branch_bias: Tensor | None,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    seed: Tensor | None,  # int64 [1]
    mean: Tensor,  # [...]
    inverse_std: Tensor,  # [...]
    dropout: float,
    branch_dtype: torch.dtype | None,
    need: list[bool],  # of x, branch, branch_bias, weight and bias; of the latter two with d_normalized only
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, branch_bias, weight and bias; an empty tensor for each that is not needed."""
    columns = total.shape[-1]
    matrix = _rows(total, columns)
    upstream = [None if d is None else _rows(d, columns) for d in (d_total, d_normalized)]
    strides = [(matrix if d is None else d).stride(0) for d in upstream]
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    d_branch = torch.empty(total.shape, dtype=branch_dtype, device=total.device) if need[1] or need[2] else None
    rows, width, warps, registers = launch_tile(columns, backward=True)
    programs = _programs(total, triton.cdiv(len(matrix), rows), warps, registers)
    norm_sums = need[3] or need[4]
    summed = norm_sums or need[2]
    sums = torch.empty((3, programs, columns) if summed else (1,), dtype=torch.float32, device=total.device)
    with torch.cuda.device_of(total):
        _backward_kernel[(programs,)](
            *upstream, matrix, None if d_branch is None else seed, weight.contiguous(),
            mean.contiguous(), inverse_std.contiguous(),
            dx, d_branch, sums, len(matrix), *strides, matrix.stride(0), *_of_mask(dropout),
            NORM_SUMS=norm_sums, BRANCH_SUM=need[2],
            COLUMNS=columns, ROWS=rows, WIDTH=width, num_warps=warps, maxnreg=registers,
        )  # fmt: skip
    wanted = [dx if need[0] else None, d_branch if need[1] else None]
    for slot, parameter, needed in zip((2, 0, 1), (branch_bias, weight, bias), need[2:], strict=True):
        wanted.append(sums[slot].sum(0).to(parameter.dtype) if needed and parameter is not None else None)
    return tuple(total.new_empty(0) if x is None else x for x in wanted)  # type: ignore[return-value]


def _of_mask(dropout: float) -> tuple[int, float]:
    """What a hash has to reach, and the factor of what is kept."""
    return (round(dropout * 2**16) - 2**15) << 16, 1.0 / (1.0 - dropout)


# ---------------------------------------------------------------------------------------------------------------------
# What the launcher may ask Triton to compile
# ---------------------------------------------------------------------------------------------------------------------

# Large models' and base models'; several rows a warp; neither a power of two nor a multiple of 16; the widest.
WIDTHS = (1024, 768, 80, 500, dispatch.WIDEST_NORM)
# Dtypes of x, branch, norm and parameters: under autocast; of a model of one dtype; and of the large models' encoder,
# whose stream has 16 bits, with its last norm, and of the base models', whose stream is the norm.
KINDS = (
    ("fp32", "bf16", "bf16", "fp32"),
    ("fp32", "fp16", "fp16", "fp32"),
    ("fp32", "fp32", "fp32", "fp32"),
    ("bf16", "bf16", "bf16", "bf16"),
    ("fp16", "fp16", "fp16", "fp16"),
)
WAVLM = (("bf16", "bf16", "bf16", "fp32"), ("bf16", "bf16", "fp32", "fp32"), ("fp32", "bf16", "fp32", "fp32"))
ABSENT_BRANCH = ("branch", "branch_bias", "seed", "total")


def compilations(arch: int) -> Iterator[Compilation]:
    """Every form at the large models' width with x in float32; of the others, whose code differs in the tile or in
    loads and stores alone, at that width what an encoder launches, at further ones all that may be."""
    large, *widths = WIDTHS
    for kinds in (*KINDS, *WAVLM):
        every = kinds in KINDS[:3]
        yield from _compilations(large, kinds, _absent_forward(), _absent_backward() if every else _of_an_encoder())
    for columns, kinds in product(widths, (KINDS[0], *KINDS[2:4])):
        backward = [(absent, (True, True)) for absent in ((), ("seed",))]
        yield from _compilations(columns, kinds, ((), ABSENT_BRANCH), backward)


def _compilations(columns: int, kinds: tuple[str, ...], forward: Any, backward: Any) -> Iterator[Compilation]:
    for absent in forward:
        yield _compilation(_forward_kernel, columns, kinds, absent, {})
    for absent, sums in backward:
        flags = dict(zip(("NORM_SUMS", "BRANCH_SUM"), sums, strict=True))
        yield _compilation(_backward_kernel, columns, kinds, absent, flags)


def _of_an_encoder() -> Iterator[tuple[tuple[str, ...], tuple[bool, bool]]]:
    for total, seed in product(((), ("d_total",)), ((), ("seed",))):
        yield (*total, *seed), (True, True)
    yield ("d_total", "seed", "d_branch"), (True, False)


def _absent_forward() -> Iterator[tuple[str, ...]]:
    yield ABSENT_BRANCH
    for bias, seed in product(((), ("branch_bias",)), ((), ("seed",))):
        yield (*bias, *seed)


def _absent_backward() -> Iterator[tuple[tuple[str, ...], tuple[bool, bool]]]:
    """With what a launch sums: for the norm's parameters only with its gradient, for a branch's bias only with that."""
    for upstream, branch in product(((), ("d_total",), ("d_normalized",)), ((), ("seed",), ("seed", "d_branch"))):
        norms = (False,) if "d_normalized" in upstream else (False, True)
        for sums in product(norms, (False,) if "d_branch" in branch else (False, True)):
            yield (*upstream, *branch), sums


def _compilation(
    function: Any, columns: int, kinds: tuple[str, ...], absent: tuple[str, ...], flags: dict[str, bool]
) -> Compilation:
    is_forward = function is _forward_kernel
    rows, width, warps, registers = launch_tile(columns, not is_forward)
    x, branch, norm, parameters = kinds
    types = dict.fromkeys(("x", "total", "d_total", "dx"), x) | dict.fromkeys(("branch", "d_branch"), branch)
    types |= dict.fromkeys(("normalized", "d_normalized"), norm)
    types |= dict.fromkeys(("weight", "bias", "branch_bias"), parameters)
    types |= dict.fromkeys(("mean", "inverse_std", "sums"), "fp32")
    strides = ("stride", "branch_stride", "d_total_stride", "d_normalized_stride")
    types = {name: f"*{kind}" for name, kind in types.items()} | {"seed": "*i64"} | dict.fromkeys(strides, "i32")
    types |= dict.fromkeys(("eps", "gain"), "fp32")
    constants = {**dict.fromkeys(absent), **flags, "COLUMNS": columns, "ROWS": rows, "WIDTH": width}
    signature, attrs = signature_and_attrs(function, types, constants, strides if columns % 16 else ())
    without = "".join(f" no {name}" for name in absent) if absent != ABSENT_BRANCH else " no branch"
    sums = "".join(f" {name.lower()}" for name, wanted in flags.items() if wanted)
    dtypes = f"{x} {branch}{f' {norm}' * (norm != branch)}{' parameters too' * (parameters == x != 'fp32')}"
    name = f"residual layer norm {'forward' if is_forward else 'backward'} {columns} {dtypes}{sums}{without}"
    return Compilation(name, function, signature, constants, attrs, warps, 3, False, registers)
