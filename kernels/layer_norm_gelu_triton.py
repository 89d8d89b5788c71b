"""Triton engine of `fastclap.kernels.layer_norm_gelu`: one kernel forward, one backward.

Both are made to be bound by memory. A program keeps whole rows in registers: x is read once, also for the variance
about the mean. Up to a width of 1024 a row is one warp's, or shares it with others: no warp waits for another, and of
tiles of one row nothing goes through shared memory. Wider rows have a warp for each 1024 values. There are as many
programs as fit a GPU's registers at once, which for bf16 keeps 32 KB a multiprocessor under way, and they walk over the
rows, so that each reads weight and bias once. In the backward pass the sums for dweight and dbias, one number for each
value of a tile, stay in registers too, and for them nothing crosses between threads before a program's end.

Every program writes its sums for dweight and dbias to a slot of its own, and torch adds the slots in a fixed order:
results are bit-identical from run to run.

GELU and its derivative take one exponential each. With a = |z|, Q(a) = 1 - Φ(a), φ the density, and a₀ the zero of
Q(a) - a φ(a),

    z Φ(z)        = max(z, 0) - a Q(a)
    Φ(z) + z φ(z) = u(a) (z + a₀) for z < 0, 1 + u(a) (z - a₀) for z > 0,    u(a) = (Q(a) - a φ(a)) / (a₀ - a)

Q and u are positive and smooth: each is 2 to the power of a polynomial, which leaves tails their digits, where 1 + erf
loses them. The polynomials are minimax fits of log₂ Q and log₂ u on 0 ≤ a ≤ 13.5, which let an error grow beyond a = 2:
tenfold in 2.5 for 16-bit tensors, in 2 for float32, whose polynomials have a higher degree: of degree 7 the error of y,
9.6e-7, would be 13 times that of torch. Largest relative errors, calculated in float32:

    up to a =       2        4        6.5      9        13         of that, absolute
    Q, degree 7     1.3e-5   4.2e-5   7.0e-4   5.4e-3   0.22       2.0e-6 in y
    u, degree 7     5.5e-5   2.8e-4   3.5e-3   3.2e-2   0.69       2.8e-5 in the derivative
    Q, degree 11    5.0e-7   2.6e-6   3.3e-5   6.7e-4   4.5e-2     7.3e-8 in y
    u, degree 11    3.0e-7   2.0e-6   2.5e-5   2.3e-4   5.2e-2     6.9e-8 in the derivative

‖error‖ / ‖value‖ of y, dx, dweight and dbias against float64 on 256 rows of 512 in Triton's interpreter, whose exp2 is
exact (that of a GPU adds 2⁻²²); torch's two functions on a CPU:

    float32, N(0, 1) weight and bias    6.6e-8  9.3e-8  1.3e-7  1.2e-7    torch 8.6e-8  1.2e-7  3.0e-7  3.2e-7
    float32, |z| ~ 1e-4                 3.3e-7  1.8e-7  2.1e-7  2.0e-7    torch 1.5e-7  1.5e-7  3.4e-7  3.0e-7
    float32, z ~ -3                     4.8e-7  2.8e-7  2.8e-7  3.2e-7    torch 1.7e-5  1.6e-6  1.6e-6  2.7e-6
    float32, z ~ -10                    2.3e-5  2.0e-5  1.7e-5  1.7e-5    torch 1       1       1       1
    float32, mean of 1,000 deviations   2.2e-5  4.0e-5  4.9e-5  2.8e-5    torch 2.4e-5  3.1e-5  3.7e-5  1.7e-5
    float16, N(0, 1) weight and bias    2.1e-4  2.1e-4  2.1e-4  2.1e-4    rounding 2.1e-4  2.1e-4  2.0e-4  2.0e-4
    float16, z ~ -3                     2.0e-4  2.2e-4  2.2e-4  2.3e-4    rounding 2.0e-4  2.1e-4  2.1e-4  2.1e-4

NaN and infinities come out where torch has them, also for z = inf and -inf.
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
from fastclap.kernels.offline import REGISTERS_OF_SM, Compilation, signature_and_attrs
from fastclap.kernels.triton_tools import TYPE_NAMES, jit_for_any_size

NARROWEST = 16
ONE_WARP = 1024  # up to this width a row is one warp's
FORWARD_REGISTERS, BACKWARD_REGISTERS = 64, 128  # of a thread with 16 values, which no form needs to spill for

# Highest power first. log₂ Q(a) for 16-bit tensors and for float32, and log₂ u(a).
# fmt: off
LOG_TAIL = (
    -1.12199996e-06, 4.60128358e-05, -0.000800453417, 0.0079845367, -0.0529031157, -0.459471881, -1.15088499,
    -1.00001907,
)
FINE_LOG_TAIL = (
    3.20022869e-10, -1.78507271e-08, 4.20785483e-07, -5.41988356e-06, 4.00816934e-05, -0.000140456264,
    -0.000321232626, 0.00738804322, -0.052782312, -0.459089249, -1.15112364, -0.999999523,
)
LOG_SLOPE = (
    -2.4412584e-06, 8.6616521e-05, -0.00124715734, 0.00971936993, -0.046855282, -0.56670332, -0.381478369,
    -0.58848393,
)
FINE_LOG_SLOPE = (
    -1.77569945e-10, 1.21199815e-08, -3.62432075e-07, 6.3161915e-06, -7.21614779e-05, 0.00057840196, -0.00341367093,
    0.0154355625, -0.0552969836, -0.560520768, -0.383208126, -0.588404357,
)
# fmt: on
A0 = 0.7517915246935645  # the zero of Q(a) - a φ(a)


def _of_half(coefficients: tuple[float, ...]) -> tuple[float, ...]:
    """The polynomial for 2 Q(2 h) of that for Q(a): the forward kernel calculates with h = z / 2."""
    *higher, last = (c * 2.0 ** (len(coefficients) - 1 - i) for i, c in enumerate(coefficients))
    return (*higher, last + 1)


_TAIL, _FINE_TAIL = tl.constexpr(_of_half(LOG_TAIL)), tl.constexpr(_of_half(FINE_LOG_TAIL))
_SLOPE, _FINE_SLOPE, _A0 = tl.constexpr(LOG_SLOPE), tl.constexpr(FINE_LOG_SLOPE), tl.constexpr(A0)


@triton.jit
def _power_of_two(a, COEFFICIENTS: tl.constexpr, FINE: tl.constexpr):
    """2 to the power of a polynomial in a."""
    exponent = a * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, 12 if FINE else 8):
        exponent = exponent * a + COEFFICIENTS[i]
    return tl.exp2(exponent)


@triton.jit
def _gelu_of_twice(half, FINE: tl.constexpr):
    """gelu(2 half). half + |half| is max(z, 0) exactly, and NaN at -inf as with torch."""
    # From a = 14.5 on Q underflows; beyond, its polynomial may turn, and at inf a product with Q would be NaN.
    a = tl.minimum(tl.abs(half), 7.25)
    return half + tl.abs(half) - a * _power_of_two(a, _FINE_TAIL if FINE else _TAIL, FINE)


@triton.jit
def _gelu_slope(z, FINE: tl.constexpr):
    """The derivative of gelu; NaN at inf and -inf, where u is 0, as with torch."""
    sign = ((z.to(tl.int32, bitcast=True) & -0x80000000) | 0x3F000000).to(tl.float32, bitcast=True)  # ±0.5
    u = _power_of_two(tl.abs(z), _FINE_SLOPE if FINE else _SLOPE, FINE)
    return (z - 2 * _A0 * sign) * u + (sign + 0.5)


@triton.jit
def _float32(values):
    if values.dtype == tl.bfloat16:
        # The upper half of a float32; the conversion takes ptxas two instructions for every second value, this one.
        values = (values.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def _rows_at(x, row, stride, column, inside):
    return _float32(tl.load(x + (row.to(tl.int64) * stride)[:, None] + column[None, :], mask=inside, other=0.0))


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
    COLUMNS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    w, b = _affine(weight, bias, COLUMNS, WEIGHT, BIAS, WIDTH)
    w *= 0.5
    b *= 0.5
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        known = (row < rows) | (ROWS == 1)  # a tile of one row exists
        inside = known[:, None] & ((column < COLUMNS) | (COLUMNS == WIDTH))[None, :]
        values = _rows_at(x, row, stride, column, inside)
        average = tl.sum(values, 1) / COLUMNS
        centred = tl.where(inside, values - average[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 1) / COLUMNS + eps)
        half = centred * inverse[:, None] * w + b
        at = (row.to(tl.int64) * COLUMNS)[:, None] + column[None, :]
        tl.store(y + at, _gelu_of_twice(half, x.dtype.element_ty == tl.float32).to(y.dtype.element_ty), mask=inside)
        tl.store(mean + row, average, mask=known)
        tl.store(inverse_std + row, inverse, mask=known)


@jit_for_any_size("rows")
def _backward_kernel(
    upstream, x, weight, bias, mean, inverse_std,  # [rows, columns] twice, with strides; [columns]; [rows] float32
    dx, sums,  # [rows, columns]; [2, programs, columns] float32: dweight and dbias
    rows, stride, upstream_stride,
    COLUMNS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    w, b = _affine(weight, bias, COLUMNS, WEIGHT, BIAS, WIDTH)
    if SUMS:
        dweight = tl.zeros((ROWS, WIDTH), tl.float32)
        dbias = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        known = (row < rows) | (ROWS == 1)  # a tile of one row exists
        inside = known[:, None] & ((column < COLUMNS) | (COLUMNS == WIDTH))[None, :]
        values = _rows_at(x, row, stride, column, inside)
        dy = _rows_at(upstream, row, upstream_stride, column, inside)
        average = tl.load(mean + row, mask=known, other=0.0)[:, None]
        inverse = tl.load(inverse_std + row, mask=known, other=0.0)[:, None]
        normal = values * inverse + -average * inverse  # one multiply-add a value
        dz = dy * _gelu_slope(normal * w + b, x.dtype.element_ty == tl.float32)
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
    """(rows, width, warps) of a tile: 16 values a thread, 32 from a width of 1024 on."""
    width = max(triton.next_power_of_2(columns), NARROWEST)
    return max(1, 512 // width), width, max(1, width // ONE_WARP)


def _registers(width: int, most: int) -> int:
    """At most so many a thread: `most` with 16 values, twice as many with 32; no thread has more than 255."""
    return min(255, most * (2 if width >= ONE_WARP else 1))


def programs_of_multiprocessor(warps: int, registers: int) -> int:
    """As many as fit the registers at once: one that waits for another's end would come last."""
    return REGISTERS_OF_SM // (32 * registers) // warps


def _programs(x: Tensor, tiles: int, warps: int, registers: int) -> int:
    return min(tiles, dispatch.multiprocessors(x.device.index) * programs_of_multiprocessor(warps, registers))


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
    registers = _registers(width, FORWARD_REGISTERS)
    programs = _programs(x, triton.cdiv(len(matrix), rows), warps, registers)
    with torch.cuda.device_of(x):
        _forward_kernel[(programs,)](
            matrix, matrix if weight is None else weight, matrix if bias is None else bias, y, mean, inverse_std,
            len(matrix), matrix.stride(0), eps,
            COLUMNS=columns, WEIGHT=weight is not None, BIAS=bias is not None,
            ROWS=rows, WIDTH=width, num_warps=warps, maxnreg=registers,
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
    registers = _registers(width, BACKWARD_REGISTERS)
    programs = _programs(x, triton.cdiv(len(matrix), rows), warps, registers)
    summed = need[1] or need[2]
    sums = torch.empty((2, programs, columns) if summed else (1,), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[(programs,)](
            dy, matrix, matrix if weight is None else weight, matrix if bias is None else bias, mean, inverse_std,
            dx, sums, len(matrix), matrix.stride(0), dy.stride(0),
            COLUMNS=columns, WEIGHT=weight is not None, BIAS=bias is not None, SUMS=summed,
            ROWS=rows, WIDTH=width, num_warps=warps, maxnreg=registers,
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

# The family's; several rows a warp; neither a power of two nor a multiple of 16; the widest of one warp, and of all.
WIDTHS = (512, 80, 500, 1024, dispatch.WIDEST_NORM)


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
    constants = {**flags, "COLUMNS": columns, "ROWS": rows, "WIDTH": width}
    signature, attrs = signature_and_attrs(function, types, constants, strides if columns % 16 else ())
    registers = _registers(width, FORWARD_REGISTERS if function is _forward_kernel else BACKWARD_REGISTERS)
    return Compilation(f"layer norm gelu {name}", function, signature, constants, attrs, warps, 3, False, registers)
