"""Triton engine of `fastclap.kernels.bias_norm`: one kernel forward, one backward.

Both are made to be bound by memory, with the tiles of `fastclap.kernels.residual_layer_norm_triton`: whole rows in
registers, as many programs as fit a GPU's registers at once, which walk over the rows. Every tensor is read or written
once; in bytes a value, with the branch in 16 bits and all else in float32,

    norm, branch, original    forward 4 + 2 + 4, z 4, y 4   18    backward 4 + 4 + 4, dx 4, dbranch 2, doriginal 4   22
    bypass alike              forward                       18    backward                                          22

Sums for the gradients of bias, log_scale and scale stay in registers. Every program writes its own to a slot, and torch
adds the slots in a fixed order: results are bit-identical from run to run. Where scale is one for each clip, so are the
programs of the backward pass: each has a share of the rows of one clip.
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

from fastclap.kernels.layer_norm_gelu_triton import _programs, _rows, _rows_at
from fastclap.kernels.offline import Compilation, signature_and_attrs
from fastclap.kernels.residual_layer_norm_triton import _columns, _parameter, launch_tile
from fastclap.kernels.rows import WIDEST_BIAS_NORM
from fastclap.kernels.triton_tools import jit_for_any_size

NARROW, FULL_REGISTERS = 1536, 160  # up to this width a thread of several warps has 12 values
ROUNDS = 2  # of programs, where a clip has its own: clips are of unequal lengths


@jit_for_any_size("rows", "log_scale")
def _forward_kernel(
    x, branch, original,  # [rows, columns] with strides
    bias, log_scale, scale, sequence,  # [columns]; [1]; [columns] or [clips, columns]; int [rows]
    y, z, inverse_rms,  # [rows, columns] twice; [rows] float32
    rows, stride, branch_stride, original_stride,
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
            rounded = (values + _rows_at(branch, row, branch_stride, column, inside)).to(x.dtype.element_ty)
            if z is not None:
                tl.store(z + at, rounded, mask=inside)
            values = rounded.to(tl.float32)
        if bias is not None:
            centred = tl.where(inside, values - _parameter(bias, column, COLUMNS), 0.0)
            inverse = tl.rsqrt(tl.sum(centred * centred, 1) / COLUMNS)
            if inverse_rms is not None:
                tl.store(inverse_rms + row, inverse, mask=known)
            values *= (inverse * tl.exp(tl.load(log_scale).to(tl.float32)))[:, None]
        if original is not None:
            before = _rows_at(original, row, original_stride, column, inside)
            if sequence is None:
                factor = _parameter(scale, column, COLUMNS)
            else:
                factor = _rows_at(scale, tl.load(sequence + row, mask=known, other=0), COLUMNS, column, inside)
            values = before + (values - before) * factor
        tl.store(y + at, values.to(y.dtype.element_ty), mask=inside)


@jit_for_any_size("rows parts", "log_scale")
def _backward_kernel(
    dy, z, original,  # [rows, columns] with strides
    bias, log_scale, scale, starts,  # [columns]; [1]; [columns] or [clips, columns]; int64 [clips + 1]
    inverse_rms,  # [rows] float32
    dx, d_branch, d_original,  # [rows, columns] three times
    sums, log_sums,  # [2, programs, columns] float32: of bias and scale; [programs] float32
    rows, parts, dy_stride, stride, original_stride,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, NORM_SUMS: tl.constexpr,
):  # fmt: skip
    column = _columns(WIDTH)
    first, step, begin, end = tl.program_id(0), tl.num_programs(0), tl.cast(0, tl.int64), tl.cast(rows, tl.int64)
    if starts is not None:
        clip = tl.program_id(0) // parts
        first, step, begin, end = first % parts, parts, tl.load(starts + clip), tl.load(starts + clip + 1)
        scale += clip.to(tl.int64) * COLUMNS
    if NORM_SUMS:
        dbias = tl.zeros((ROWS, WIDTH), tl.float32)
        dlog_scale = tl.zeros((ROWS,), tl.float32)
    if original is not None:
        dscale = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in tl.range(first, tl.cdiv((end - begin).to(tl.int32), ROWS), step):
        row = begin + tile * ROWS + tl.arange(0, ROWS)
        known = (row < end) | (ROWS == 1)  # a tile of one row exists
        inside = known[:, None] & ((column < COLUMNS) | (COLUMNS == WIDTH))[None, :]
        at = (row * COLUMNS)[:, None] + column[None, :]
        gradient = _rows_at(dy, row, dy_stride, column, inside)
        if z is not None:
            values = _rows_at(z, row, stride, column, inside)
        if bias is not None:
            inverse = tl.load(inverse_rms + row, mask=known, other=0.0)
            gain = inverse * tl.exp(tl.load(log_scale).to(tl.float32))
        if original is not None:  # first, so that its values need no registers beside those that follow
            normal = values if bias is None else values * gain[:, None]
            dscale += gradient * (normal - _rows_at(original, row, original_stride, column, inside))
        if scale is not None:
            share = gradient * _parameter(scale, column, COLUMNS)
            if d_original is not None:
                tl.store(d_original + at, (gradient - share).to(d_original.dtype.element_ty), mask=inside)
            gradient = share
        if bias is not None:
            along = tl.sum(gradient * values, 1) * gain
            by_norm = tl.where(inside, values - _parameter(bias, column, COLUMNS), 0.0)
            by_norm *= (along * inverse * inverse / COLUMNS)[:, None]
            gradient = gradient * gain[:, None] - by_norm
            if NORM_SUMS:
                dbias += by_norm
                dlog_scale += along
        if dx is not None:
            tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=inside)
        if d_branch is not None:
            tl.store(d_branch + at, gradient.to(d_branch.dtype.element_ty), mask=inside)
    sums += tl.program_id(0).to(tl.int64) * COLUMNS + column
    if NORM_SUMS:
        tl.store(sums, tl.sum(dbias, 0), mask=column < COLUMNS)
        tl.store(log_sums + tl.program_id(0), tl.sum(dlog_scale, 0))
    if original is not None:
        tl.store(sums + tl.num_programs(0).to(tl.int64) * COLUMNS, tl.sum(dscale, 0), mask=column < COLUMNS)


# ---------------------------------------------------------------------------------------------------------------------
# Launch
# ---------------------------------------------------------------------------------------------------------------------


def _backward_tile(columns: int) -> tuple[int, int, int, int]:
    """(rows, width, warps, registers) of a tile: with 16 values a thread the sums take more than those of LayerNorm."""
    rows, width, warps, registers = launch_tile(columns, backward=True)
    return rows, width, warps, max(registers, FULL_REGISTERS) if columns > NARROW else registers


def _stride(tensor: Tensor | None, otherwise: Tensor) -> int:
    return (otherwise if tensor is None else tensor).stride(0)


def _matrices(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else _rows(t, t.shape[1]) for t in tensors]


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def forward(
    x: Tensor,  # [R, C]
    branch: Tensor | None,  # [R, C]
    original: Tensor | None,  # [R, C]
    bias: Tensor | None,  # [C]; None: no norm
    log_scale: Tensor | None,  # []
    scale: Tensor | None,  # [C] or [B, C]
    sequence: Tensor | None,  # int [R], with [B, C]
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, z, the inverse root mean square [R] float32), for checked arguments; the latter two as `bias_norm_op`."""
    rows, columns = x.shape
    matrix, added, before = _matrices(x, branch, original)
    assert matrix is not None
    y = torch.empty(x.shape, dtype=x.dtype if original is None else original.dtype, device=x.device)
    z = torch.empty(x.shape if keep and branch is not None else 0, dtype=x.dtype, device=x.device)
    inverse_rms = torch.empty(rows if keep and bias is not None else 0, dtype=torch.float32, device=x.device)
    tile_rows, width, warps, registers = launch_tile(columns, backward=False)
    programs = _programs(x, triton.cdiv(rows, tile_rows), warps, registers)
    with torch.cuda.device_of(x):
        _forward_kernel[(programs,)](
            matrix, added, before, *_contiguous(bias, log_scale, scale, sequence),
            y, z if len(z) else None, inverse_rms if len(inverse_rms) else None,
            rows, matrix.stride(0), _stride(added, matrix), _stride(before, matrix),
            COLUMNS=columns, ROWS=tile_rows, WIDTH=width, num_warps=warps, maxnreg=registers,
        )  # fmt: skip
    return y, z, inverse_rms


def backward(
    dy: Tensor,  # [R, C]
    z: Tensor | None,  # [R, C]; without a norm only where scale needs a gradient
    original: Tensor | None,  # [R, C]; where scale needs a gradient
    bias: Tensor | None,  # [C]
    log_scale: Tensor | None,  # []
    scale: Tensor | None,  # [C] or [B, C]
    sequence: Tensor | None,  # int [R], with [B, C]
    inverse_rms: Tensor | None,  # [R] float32
    dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, original, bias, log_scale and scale; an empty tensor for each that is not needed."""
    rows, columns = dy.shape
    upstream, kept, before = _matrices(dy, z, original)
    assert upstream is not None
    dx, d_branch, d_original = (
        torch.empty(dy.shape, dtype=kind, device=dy.device) if needed else None
        for kind, needed in zip((dtype, branch_dtype, dy.dtype), need[:3], strict=True)
    )
    tile_rows, width, warps, registers = _backward_tile(columns)
    programs = _programs(dy, triton.cdiv(rows, tile_rows), warps, registers)
    parts, starts = 1, None
    if sequence is not None and scale is not None:
        clips = torch.arange(len(scale) + 1, dtype=sequence.dtype, device=dy.device)
        starts = torch.searchsorted(sequence.contiguous(), clips)
        parts = triton.cdiv(ROUNDS * programs, len(scale))
        programs = parts * len(scale)
    norm_sums, scale_sum = need[3] or need[4], need[5]
    sums = torch.empty((2, programs, columns) if norm_sums or scale_sum else 1, dtype=torch.float32, device=dy.device)
    log_sums = torch.empty(programs, dtype=torch.float32, device=dy.device)
    with torch.cuda.device_of(dy):
        _backward_kernel[(programs,)](
            upstream, kept, before if scale_sum else None, *_contiguous(bias, log_scale, scale), starts,
            *_contiguous(inverse_rms), dx, d_branch, d_original, sums, log_sums,
            rows, parts, upstream.stride(0), _stride(kept, upstream), _stride(before, upstream),
            COLUMNS=columns, ROWS=tile_rows, WIDTH=width, NORM_SUMS=norm_sums,
            num_warps=warps, maxnreg=registers,
        )  # fmt: skip
    found: list[Tensor | None] = [dx, d_branch, d_original, None, None, None]
    if bias is not None and need[3]:
        found[3] = sums[0].sum(0).to(bias.dtype)
    if log_scale is not None and need[4]:
        found[4] = log_sums.sum().to(log_scale.dtype)
    if scale is not None and scale_sum:
        found[5] = (sums[1].sum(0) if starts is None else sums[1].view(-1, parts, columns).sum(1)).to(scale.dtype)
    return tuple(dy.new_empty(0) if d is None else d for d in found)  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------------------------------
# What the launcher may ask Triton to compile
# ---------------------------------------------------------------------------------------------------------------------

# The Zipformer's; several rows a warp; neither a power of two nor a multiple of 16; the widest.
WIDTHS = (1280, 80, 500, WIDEST_BIAS_NORM)
# Dtypes of x and original, which are the stream, and of the branch.
KINDS = (("fp32", "bf16"), ("fp32", "fp16"), ("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"))
WAYS = {"norm": (True, False), "norm bypass": (True, True), "bypass": (False, True)}  # with a norm, and a bypass


def compilations(arch: int) -> Iterator[Compilation]:
    """At the Zipformer's width every way, with a branch and without; with a float32 stream also the scale of a clip,
    and beside a branch of bf16 or float32 for embedding and without gradients of parameters; at further widths, whose
    code differs in the tile or in loads and stores alone, all of it."""
    model, *others = WIDTHS
    for kinds, way, branch, clips in product(KINDS, WAYS, (True, False), (False, True)):
        norm, skips = WAYS[way]
        if clips and (kinds[0] != "fp32" or not skips or not branch):
            continue
        label = f"{way}{' branch' * branch}{' clips' * clips}"
        there = {"norm": norm, "bypass": skips, "branch": branch, "clips": clips}
        embeds = kinds in (KINDS[0], KINDS[2]) and not clips
        for trained in (True, False) if embeds else (True,):
            yield _compilation(label, model, kinds, there, backward=False, trained=trained)
            yield _compilation(label, model, kinds, there, backward=True, trained=trained)
    there = {"norm": True, "bypass": True, "branch": True, "clips": False}
    for columns, kinds, backward in product(others, (KINDS[0], KINDS[2], KINDS[3]), (False, True)):
        yield _compilation("norm bypass branch", columns, kinds, there, backward=backward, trained=True)


def _compilation(
    label: str, columns: int, kinds: tuple[str, str], there: dict[str, bool], *, backward: bool, trained: bool
) -> Compilation:
    """`trained`: forward with what is kept, backward with the gradients of parameters."""
    function: Any = _backward_kernel if backward else _forward_kernel
    absent = {
        "norm": ("bias", "log_scale", "inverse_rms"),
        "bypass": ("original", "scale", "sequence", "starts", "d_original"),
        "branch": ("d_branch",) if backward else ("branch", "z"),
        "clips": ("sequence", "starts"),
    }
    missing = {name for part, names in absent.items() if not there[part] for name in names}
    if not trained:
        missing |= {"original", *(() if there["norm"] else ("z",))} if backward else {"z", "inverse_rms"}
    rows, width, warps, registers = _backward_tile(columns) if backward else launch_tile(columns, backward=False)
    stream, branch = kinds
    types = dict.fromkeys(("x", "original", "y", "z", "dy", "dx", "d_original"), stream)
    types |= dict.fromkeys(("branch", "d_branch"), branch) | dict.fromkeys(("sequence", "starts"), "i64")
    strides = ("stride", "branch_stride", "original_stride", "dy_stride")
    types = {name: f"*{kind}" for name, kind in types.items()} | dict.fromkeys(strides, "i32")
    names = [parameter.name for parameter in function.params]
    constants: dict[str, Any] = {name: None for name in names if name in missing}
    constants |= {"COLUMNS": columns, "ROWS": rows, "WIDTH": width}
    if backward:
        constants["NORM_SUMS"] = there["norm"] and trained
    signature, attrs = signature_and_attrs(function, types, constants, strides if columns % 16 else ())
    kind = f"{'backward' if backward else 'forward'} {columns} {stream} {branch}"
    name = f"bias norm {kind} {label}{'' if trained else ' frozen' if backward else ' for embedding'}"
    return Compilation(name, function, signature, constants, attrs, warps, 3, False, registers)
