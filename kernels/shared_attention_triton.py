"""Triton engine of attention whose weights have several users (see `fastclap.kernels.shared_attention`).

Scores are made tile by tile, q·kᵀ + Σ_c p_c · table_c[j - i]. The four numbers that the table has for a distance lie
together; in 16 bits they are one 64-bit word, so that a score takes one load from a window of BM + BN - 1 words in
shared memory. Sums of exponentials are computed once for all users; then every weight is one exponential.

* `_log_sum_kernel`: log2 of every row's sum of exponentials.
* Narrow values: `_forward_kernel`, a block of queries against all keys; `_keys_kernel`, a block of keys against all
  queries, for dK and dV; `_queries_kernel` for dQ, dP and sums of the table's gradient; nothing T x T is stored.
* Wide values: `_matrix_kernel` writes the weights of a head, `_product_kernel` multiplies with them or their transpose,
  `_change_kernel` puts dS = A · (dO·Vᵀ - δ) in their place, out of which the two kernels above read. The matrix is
  gone at the end of a pass. Predicted for an H100, 26 clips of 30 s at 50 Hz (58 M weights, 960 columns): 0.1 ms to
  make and write it, 0.2 ms for each of the three products at 70 % of the peak. To make the weights anew for every 256
  columns would cost 0.2 ms a product more, and dO·Vᵀ be needed twice. 160 clips of 5 s have a sixth of it all.
* `_delta_kernel`: δ_i = Σ_c out_ic · dout_ic. `_table_kernel` adds the sums up.

The gradients of p and of the table want dS by distance: each row of a tile is rotated so that its elements of one
distance come under each other, those that wrap around waiting for the next tile. Then both are matrix products:
dp_i += Σ_r y_ir · table[r] and dtable[r] += Σ_i p_i · y_ir.

Every value is computed by one program in a fixed order: results are bit-identical from run to run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.offline import Compilation, signature_and_attrs
from fastclap.kernels.toeplitz_attention_triton import _load_rows, _store_rows, padded_width
from fastclap.kernels.triton_tools import INF, LOG2E, PRECISIONS, TYPE_NAMES, jit_for_any_size

LIMIT = tl.constexpr(25.0)  # of a score, above which it is penalized
CHANNELS = tl.constexpr(4)  # of a position, at most
PADDING = (
    128  # the table has room for so many distances more, a row of the matrix is a multiple of it: no tile is larger
)
NARROW = 64  # values up to this width are multiplied without a matrix in memory
VALUES, MATRIX, PENALTY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # where dS comes from


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a tile, depth of a step of its product, warps of a program, stages of its loop.

    `registers`: the limit a thread, where it lets more programs share an SM without a spill in the main loop.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None


KERNELS = ("log_sum", "forward", "keys", "queries", "matrix", "product", "change")
# By architecture and bytes of an element, in the order of KERNELS: the fields of a `Tile`; the depth is that of the
# last two. Tiles of queries are square: a row is rotated within its columns, and no element waits for two tiles.
TILES: dict[int, dict[int, tuple[tuple[int, ...], ...]]] = {
    80: {
        2: ((64, 64, 0, 4, 2), (64, 64, 0, 4, 2), (64, 64, 0, 4, 2), (32, 64, 0, 4, 2), (64, 64, 0, 4, 2),
            (128, 128, 32, 8, 3), (128, 128, 32, 8, 3)),
        4: ((64, 32, 0, 4, 2), (64, 32, 0, 4, 2), (32, 32, 0, 4, 1), (16, 32, 0, 4, 1), (64, 32, 0, 4, 2),
            (64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
    },
    90: {
        2: ((64, 64, 0, 4, 2), (64, 64, 0, 4, 2), (64, 64, 0, 4, 2), (64, 64, 0, 4, 2), (64, 64, 0, 4, 2),
            (128, 128, 64, 8, 3), (128, 128, 64, 8, 3)),
        4: ((64, 32, 0, 4, 2), (64, 32, 0, 4, 2), (32, 32, 0, 4, 1), (16, 32, 0, 4, 1), (64, 32, 0, 4, 2),
            (64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
    },
    100: {
        2: ((64, 64, 0, 4, 2), (64, 64, 0, 4, 2), (64, 64, 0, 4, 2), (64, 64, 0, 4, 2), (64, 64, 0, 4, 2),
            (128, 128, 64, 8, 3), (128, 128, 64, 8, 3)),
        4: ((64, 32, 0, 4, 2), (64, 32, 0, 4, 2), (32, 32, 0, 4, 1), (16, 32, 0, 4, 1), (64, 32, 0, 4, 2),
            (64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
    },
}  # fmt: skip
INTERPRETER_TILE = Tile(32, 32, 32, 4, 1)
DELTA_ROWS, DELTA_COLUMNS = 32, 64  # of a step of the program for δ
SUMMED_STRIPS, SUMMED_DISTANCES = 32, 64  # of a step of the program that adds the table's sums; its distances


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(starts, program, blocks, heads, BLOCK: tl.constexpr):
    """Of a program: its first row in the clip, the clip's first row and its length, and the head."""
    row, index = (program % blocks) * BLOCK, program // blocks
    first = tl.load(starts + index // heads)
    return row, first.to(tl.int64), tl.load(starts + index // heads + 1) - first, index % heads


@triton.jit
def _position(p, row, stride, length, BM: tl.constexpr, POSITION: tl.constexpr, CHANNEL: tl.constexpr):
    """p of one channel for a block of rows, [BM] float32."""
    i = tl.arange(0, BM)
    if CHANNEL < POSITION:
        return tl.load(p + (row + i) * stride + CHANNEL, mask=i < length - row, other=0.0).to(tl.float32)
    else:
        return tl.zeros((BM,), tl.float32)


@triton.jit
def _positions(p, row, stride, length, BM: tl.constexpr, POSITION: tl.constexpr):
    return (
        _position(p, row, stride, length, BM, POSITION, 0),
        _position(p, row, stride, length, BM, POSITION, 1),
        _position(p, row, stride, length, BM, POSITION, 2),
        _position(p, row, stride, length, BM, POSITION, 3),
    )


@triton.jit
def _halves(word, DTYPE: tl.constexpr):
    """The two 16-bit numbers of a 32-bit word, as float32."""
    if DTYPE.is_bf16():
        return (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        low, high = (word & 0xFFFF).to(tl.uint16), (word >> 16).to(tl.uint16)
        return low.to(DTYPE, bitcast=True).to(tl.float32), high.to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _scores(
    queries, keys, p0, p1, p2, p3, words, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """[BM, BN] of the tile at (row, column); `words` points at the table's entry of the distance column - row."""
    x = tl.dot(queries, keys.T, input_precision=PRECISION)
    WINDOW: tl.constexpr = 2 * BM if BM > BN else 2 * BN
    near = tl.arange(0, WINDOW) - BM
    i = tl.arange(0, BM)[:, None]
    # A thread has rows i and i + 8, which share most distances: written so, their loads are seen to be the same.
    at = tl.reshape(tl.arange(0, BN)[None, :] - (i - (i & 8)) + (BM - (i & 8)), (BM * BN,))
    if words.dtype.element_ty == tl.int64:
        word = tl.reshape(tl.gather(tl.load(words + near), at, 0), (BM, BN))
        t0, t1 = _halves(word.to(tl.uint32), queries.dtype)
        t2, t3 = _halves((word >> 32).to(tl.uint32), queries.dtype)
    else:
        t0 = tl.reshape(tl.gather(tl.load(words + near * 4), at, 0), (BM, BN))
        t1 = tl.reshape(tl.gather(tl.load(words + near * 4 + 1), at, 0), (BM, BN))
        t2 = tl.reshape(tl.gather(tl.load(words + near * 4 + 2), at, 0), (BM, BN))
        t3 = tl.reshape(tl.gather(tl.load(words + near * 4 + 3), at, 0), (BM, BN))
    return x + p0[:, None] * t0 + p1[:, None] * t1 + p2[:, None] * t2 + p3[:, None] * t3


@triton.jit
def _zero_distance(words, head, far):
    """The place of distance 0 in the table of a head."""
    if words.dtype.element_ty == tl.int64:
        return words + (head * (2 * far) + far)
    else:
        return words + (head * (2 * far) + far) * 4


@triton.jit
def _further(words, distance):
    if words.dtype.element_ty == tl.int64:
        return words + distance
    else:
        return words + distance * 4


@triton.jit
def _penalty_of(x, penalty):
    """The gradient of penalty · Σ max(|x| - LIMIT, 0)."""
    return tl.where(x > LIMIT, penalty, 0.0) - tl.where(x < -LIMIT, penalty, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


@jit_for_any_size("blocks heads rows far")
def _log_sum_kernel(
    q, k, p, words, starts, log_sum, q_row, k_row, p_row, blocks, heads, rows, far,
    HEAD: tl.constexpr, D: tl.constexpr, POSITION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, first, length, head = _place(starts, tl.program_id(0), blocks, heads, BM)
    if row >= length:
        return
    words = _further(_zero_distance(words, head, far), -row)
    k += first * k_row + head * HEAD
    i, columns = tl.arange(0, BM), tl.arange(0, BN)
    queries = _load_rows(q + first * q_row + head * HEAD, row, q_row, length, BM, HEAD, D)
    p0, p1, p2, p3 = _positions(p + first * p_row + head * POSITION, row, p_row, length, BM, POSITION)
    maximum = tl.full((BM,), -INF, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    whole = length // BN * BN
    for TAIL in tl.static_range(2):  # the tiles that all keys of are valid, then the last one if there is one more
        for column in tl.range(whole if TAIL else 0, length if TAIL else whole, BN):
            keys = _load_rows(k, column, k_row, length, BN, HEAD, D)
            x = _scores(queries, keys, p0, p1, p2, p3, _further(words, column), BM, BN, PRECISION)
            if TAIL:
                x = tl.where(columns[None, :] < length - column, x, -INF)
            larger = tl.maximum(maximum, tl.max(x, 1))
            total = total * tl.exp2((maximum - larger) * LOG2E)
            total += tl.sum(tl.exp2(x * LOG2E - (larger * LOG2E)[:, None]), 1)
            maximum = larger
    at = head.to(tl.int64) * rows + first + row + i
    tl.store(log_sum + at, maximum * LOG2E + tl.log2(total), mask=i < length - row)


@jit_for_any_size("blocks heads rows far")
def _forward_kernel(
    q, k, p, v, words, starts, log_sum, out, q_row, k_row, p_row, v_row, out_row, blocks, heads, rows, far,
    HEAD: tl.constexpr, D: tl.constexpr, POSITION: tl.constexpr, VALUE: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, first, length, head = _place(starts, tl.program_id(0), blocks, heads, BM)
    if row >= length:
        return
    words = _further(_zero_distance(words, head, far), -row)
    k += first * k_row + head * HEAD
    v += first * v_row + head * VALUE
    i, columns = tl.arange(0, BM), tl.arange(0, BN)
    queries = _load_rows(q + first * q_row + head * HEAD, row, q_row, length, BM, HEAD, D)
    p0, p1, p2, p3 = _positions(p + first * p_row + head * POSITION, row, p_row, length, BM, POSITION)
    shift = tl.load(log_sum + head.to(tl.int64) * rows + first + row + i, mask=i < length - row, other=INF)
    result = tl.zeros((BM, V), tl.float32)
    whole = length // BN * BN
    for TAIL in tl.static_range(2):
        for column in tl.range(whole if TAIL else 0, length if TAIL else whole, BN):
            keys = _load_rows(k, column, k_row, length, BN, HEAD, D)
            x = _scores(queries, keys, p0, p1, p2, p3, _further(words, column), BM, BN, PRECISION)
            weights = tl.exp2(x * LOG2E - shift[:, None])
            if TAIL:
                weights = tl.where(columns[None, :] < length - column, weights, 0.0)
            values = _load_rows(v, column, v_row, length, BN, VALUE, V)
            result = tl.dot(weights.to(values.dtype), values, result, input_precision=PRECISION)
    _store_rows(out + first * out_row + head * VALUE, row, out_row, length, result, BM, VALUE, V)


@jit_for_any_size("blocks heads rows far")
def _matrix_kernel(
    q, k, p, words, starts, log_sum, matrix, q_row, k_row, p_row, matrix_row, blocks, heads, rows, far,
    HEAD: tl.constexpr, D: tl.constexpr, POSITION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All weights of a block of rows, and zeros up to the next multiple of PADDING columns: readers need no mask."""
    row, first, length, head = _place(starts, tl.program_id(0), blocks, heads, BM)
    if row >= length:
        return
    words = _further(_zero_distance(words, head, far), -row)
    k += first * k_row + head * HEAD
    i, columns = tl.arange(0, BM), tl.arange(0, BN)
    queries = _load_rows(q + first * q_row + head * HEAD, row, q_row, length, BM, HEAD, D)
    p0, p1, p2, p3 = _positions(p + first * p_row + head * POSITION, row, p_row, length, BM, POSITION)
    at = head.to(tl.int64) * rows + first
    shift = tl.load(log_sum + at + row + i, mask=i < length - row, other=INF)
    for column in tl.range(0, tl.cdiv(length, 128) * 128, BN):
        keys = _load_rows(k, column, k_row, length, BN, HEAD, D)
        x = _scores(queries, keys, p0, p1, p2, p3, _further(words, column), BM, BN, PRECISION)
        weights = tl.where(columns[None, :] < length - column, tl.exp2(x * LOG2E - shift[:, None]), 0.0)
        _store_rows(matrix + at * matrix_row + column, row, matrix_row, length, weights, BM, BN, BN)


@jit_for_any_size("blocks heads rows")
def _product_kernel(
    matrix, x, starts, out, matrix_row, x_row, out_row, blocks, heads, rows,
    VALUE: tl.constexpr, TRANSPOSED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BN columns of out = A·x, or of Aᵀ·x, clip by clip."""
    CHUNKS: tl.constexpr = (VALUE + BN - 1) // BN
    at = (tl.program_id(0) % CHUNKS) * BN  # programs side by side share the rows of A
    row, first, length, head = _place(starts, tl.program_id(0) // CHUNKS, blocks, heads, BM)
    if row >= length:
        return
    matrix += (head.to(tl.int64) * rows + first) * matrix_row
    x += first * x_row + head * VALUE + at
    result = tl.zeros((BM, BN), tl.float32)
    depth, columns = tl.arange(0, BK)[:, None], tl.arange(0, BN)[None, :]
    inside = at + columns < VALUE
    for step in tl.range(0, length, BK):
        if TRANSPOSED:
            weights = _load_rows(matrix + row, step, matrix_row, length, BK, BM, BM).T
        else:
            weights = _load_rows(matrix + step, row, matrix_row, length, BM, BK, BK)
        values = tl.load(x + step * x_row + (depth * x_row + columns), mask=(depth < length - step) & inside, other=0.0)
        result = tl.dot(weights, values, result, input_precision=PRECISION)
    out += first * out_row + head * VALUE + at
    i = row + tl.arange(0, BM)[:, None]
    tl.store(out + (i * out_row + columns), result.to(out.dtype.element_ty), mask=(i < length) & inside)


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


@jit_for_any_size("heads rows")
def _delta_kernel(
    out, upstream, delta, out_row, up_row, heads, rows,
    VALUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) // heads * BM, tl.program_id(0) % heads
    i, columns = row + tl.arange(0, BM), tl.arange(0, BN)[None, :]
    out += i.to(tl.int64)[:, None] * out_row + head * VALUE
    upstream += i.to(tl.int64)[:, None] * up_row + head * VALUE
    total = tl.zeros((BM, BN), tl.float32)
    for column in tl.range(0, VALUE, BN):
        mask = (i < rows)[:, None] & (column + columns < VALUE)
        x = tl.load(out + (column + columns), mask=mask, other=0.0).to(tl.float32)
        total += x * tl.load(upstream + (column + columns), mask=mask, other=0.0).to(tl.float32)
    tl.store(delta + head.to(tl.int64) * rows + i, tl.sum(total, 1), mask=i < rows)


@jit_for_any_size("blocks heads rows")
def _change_kernel(
    matrix, upstream, v, starts, delta, matrix_row, up_row, v_row, blocks, heads, rows,
    VALUE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS = A · (dO·Vᵀ - δ) of a tile in the place of A; `blocks` is how many of BM rows and of BN columns there are."""
    column = (tl.program_id(0) % blocks) * BN
    row, first, length, head = _place(starts, tl.program_id(0) // blocks, blocks, heads, BM)
    if (row >= length) | (column >= length):
        return
    upstream += first * up_row + head * VALUE
    v += first * v_row + head * VALUE
    result = tl.zeros((BM, BN), tl.float32)
    i, j, depth = row + tl.arange(0, BM)[:, None], column + tl.arange(0, BN)[:, None], tl.arange(0, BK)[None, :]
    for step in tl.range(0, VALUE, BK):
        inside = step + depth < VALUE
        x = tl.load(upstream + step + (i * up_row + depth), mask=(i < length) & inside, other=0.0)
        y = tl.load(v + step + (j * v_row + depth), mask=(j < length) & inside, other=0.0)
        result = tl.dot(x, y.T, result, input_precision=PRECISION)
    at = head.to(tl.int64) * rows + first
    matrix += at * matrix_row + column
    change = tl.load(delta + at + row + tl.arange(0, BM), mask=row + tl.arange(0, BM) < length, other=0.0)
    weights = _load_rows(matrix, row, matrix_row, length, BM, BN, BN).to(tl.float32)
    _store_rows(matrix, row, matrix_row, length, weights * (result - change[:, None]), BM, BN, BN)


@jit_for_any_size("blocks heads rows far penalty")
def _keys_kernel(
    q, k, p, v, words, starts, upstream, log_sum, delta, matrix, dk, dv,
    q_row, k_row, p_row, v_row, up_row, matrix_row, dk_row, dv_row, blocks, heads, rows, far, penalty,
    HEAD: tl.constexpr, D: tl.constexpr, POSITION: tl.constexpr, VALUE: tl.constexpr, V: tl.constexpr,
    SOURCE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column, first, length, head = _place(starts, tl.program_id(0), blocks, heads, BN)
    if column >= length:
        return
    q += first * q_row + head * HEAD
    i = tl.arange(0, BM)
    at = head.to(tl.int64) * rows + first
    key_gradient = tl.zeros((BN, D), tl.float32)
    if SOURCE != MATRIX:
        words = _further(_zero_distance(words, head, far), column)
        p += first * p_row + head * POSITION
        keys = _load_rows(k + first * k_row + head * HEAD, column, k_row, length, BN, HEAD, D)
    if SOURCE == VALUES:
        upstream += first * up_row + head * VALUE
        values = _load_rows(v + first * v_row + head * VALUE, column, v_row, length, BN, VALUE, V)
        value_gradient = tl.zeros((BN, V), tl.float32)
    for row in tl.range(0, length, BM):
        queries = _load_rows(q, row, q_row, length, BM, HEAD, D)
        if SOURCE == MATRIX:
            ds = _load_rows(matrix + at * matrix_row + column, row, matrix_row, length, BM, BN, BN)
        else:
            p0, p1, p2, p3 = _positions(p, row, p_row, length, BM, POSITION)
            x = _scores(queries, keys, p0, p1, p2, p3, _further(words, -row), BM, BN, PRECISION)
            if SOURCE == PENALTY:
                ds = _penalty_of(x, penalty)
            else:
                shift = tl.load(log_sum + at + row + i, mask=i < length - row, other=INF)
                change = tl.load(delta + at + row + i, mask=i < length - row, other=0.0)
                weights = tl.exp2(x * LOG2E - shift[:, None])
                out_gradient = _load_rows(upstream, row, up_row, length, BM, VALUE, V)
                value_gradient = tl.dot(
                    weights.to(q.dtype.element_ty).T, out_gradient, value_gradient, input_precision=PRECISION
                )
                ds = weights * (tl.dot(out_gradient, values.T, input_precision=PRECISION) - change[:, None])
        key_gradient = tl.dot(ds.to(q.dtype.element_ty).T, queries, key_gradient, input_precision=PRECISION)
    _store_rows(dk + first * dk_row + head * HEAD, column, dk_row, length, key_gradient, BN, HEAD, D)
    if SOURCE == VALUES:
        _store_rows(dv + first * dv_row + head * VALUE, column, dv_row, length, value_gradient, BN, VALUE, V)


@triton.jit
def _by_distance(held, x, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN]: row i of the tile before, `held`, and of x, one after the other, from element i on."""
    both = tl.reshape(tl.permute(tl.join(held, x), (0, 2, 1)), (BM * 2 * BN,))
    at = tl.arange(0, BM)[:, None] * (2 * BN + 1) + tl.arange(0, BN)[None, :]
    return tl.reshape(tl.gather(both, tl.reshape(at, (BM * BN,)), 0), (BM, BN))


@triton.jit
def _width(length, BN: tl.constexpr):
    """How many sums tiles of BN columns give for a block of rows: those of one tile more than there are."""
    return (tl.cdiv(length, BN) + 1) * BN


@jit_for_any_size("dp_row blocks heads rows far penalty strips width")
def _queries_kernel(
    q, k, p, v, words, vectors, starts, upstream, log_sum, delta, matrix, dq, dp, sums, places,
    q_row, k_row, p_row, v_row, up_row, matrix_row, dq_row, dp_row, blocks, heads, rows, far, penalty, strips, width,
    HEAD: tl.constexpr, D: tl.constexpr, POSITION: tl.constexpr, VALUE: tl.constexpr, V: tl.constexpr,
    SOURCE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ and dP of a block of rows, a strip; and Σ_i p_i · ds_ij over it, by distance j - i = r - BN - row.

    `places` says of each strip which row it begins at and how long its clip is, `sums` is [heads, strips, 4, width].
    """
    row, first, length, head = _place(starts, tl.program_id(0), blocks, heads, BM)
    if row >= length:
        return
    clip = tl.program_id(0) // blocks // heads
    strip = (first // BM).to(tl.int32) + clip + row // BM  # each number once, clips being rounded up
    if head == 0:
        tl.store(places + 2 * strip, row)
        tl.store(places + 2 * strip + 1, length)
    j = tl.arange(0, BN)[None, :]
    channel = tl.arange(0, 16)
    k += first * k_row + head * HEAD
    vectors += (head * (2 * far) + far - row - BN) * CHANNELS
    slots = sums + (head * strips + strip).to(tl.int64) * (CHANNELS * width) + (channel[:, None] * width + j)
    at = head.to(tl.int64) * rows + first
    p += first * p_row + head * POSITION
    position = _load_rows(p, row, p_row, length, BM, POSITION, 16).T
    if SOURCE == MATRIX:
        matrix += at * matrix_row
    else:
        words = _further(_zero_distance(words, head, far), -row)
        queries = _load_rows(q + first * q_row + head * HEAD, row, q_row, length, BM, HEAD, D)
        p0, p1, p2, p3 = _positions(p, row, p_row, length, BM, POSITION)
    if SOURCE == VALUES:
        v += first * v_row + head * VALUE
        out_gradient = _load_rows(upstream + first * up_row + head * VALUE, row, up_row, length, BM, VALUE, V)
        shift = tl.load(log_sum + at + row + tl.arange(0, BM), mask=row + tl.arange(0, BM) < length, other=INF)
        change = tl.load(delta + at + row + tl.arange(0, BM), mask=row + tl.arange(0, BM) < length, other=0.0)
    query_gradient = tl.zeros((BM, D), tl.float32)
    position_gradient = tl.zeros((BM, 16), tl.float32)
    held = tl.zeros((BM, BN), q.dtype.element_ty)
    entries = tl.arange(0, BN)[:, None] * CHANNELS + channel[None, :]
    known = (channel < CHANNELS)[None, :]
    whole = length // BN * BN
    for TAIL in tl.static_range(2):
        for column in tl.range(whole if TAIL else 0, length if TAIL else whole, BN):
            keys = _load_rows(k, column, k_row, length, BN, HEAD, D)
            if SOURCE == MATRIX:
                ds = _load_rows(matrix + column, row, matrix_row, length, BM, BN, BN)
            else:
                x = _scores(queries, keys, p0, p1, p2, p3, _further(words, column), BM, BN, PRECISION)
                if SOURCE == PENALTY:
                    ds = _penalty_of(x, penalty)
                else:
                    values = _load_rows(v, column, v_row, length, BN, VALUE, V)
                    ds = tl.dot(out_gradient, values.T, input_precision=PRECISION) - change[:, None]
                    ds *= tl.exp2(x * LOG2E - shift[:, None])
                if TAIL:
                    ds = tl.where(j < length - column, ds, 0.0)
            ds = ds.to(q.dtype.element_ty)
            query_gradient = tl.dot(ds, keys, query_gradient, input_precision=PRECISION)
            y = _by_distance(held, ds, BM, BN)
            held = ds
            near = tl.load(vectors + column * CHANNELS + entries, mask=known, other=0.0)
            position_gradient = tl.dot(y, near, position_gradient, input_precision=PRECISION)
            tl.store(slots + column, tl.dot(position, y, input_precision=PRECISION), mask=(channel < CHANNELS)[:, None])
    end = tl.cdiv(length, BN) * BN
    y = _by_distance(held, tl.zeros((BM, BN), held.dtype), BM, BN)
    near = tl.load(vectors + end * CHANNELS + entries, mask=known, other=0.0)
    position_gradient = tl.dot(y, near, position_gradient, input_precision=PRECISION)
    tl.store(slots + end, tl.dot(position, y, input_precision=PRECISION), mask=(channel < CHANNELS)[:, None])
    _store_rows(dq + first * dq_row + head * HEAD, row, dq_row, length, query_gradient, BM, HEAD, D)
    _store_rows(dp + first * dp_row + head * POSITION, row, dp_row, length, position_gradient, BM, POSITION, 16)


@jit_for_any_size("strips width distances")
def _table_kernel(
    sums, places, dtable, strips, width, distances,
    POSITION: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, DISTANCES: tl.constexpr,
):  # fmt: skip
    """dtable of one head, one channel and DISTANCES distances: the sums of all strips, in their order."""
    blocks = tl.cdiv(distances, DISTANCES)
    at, index = tl.program_id(0) % blocks * DISTANCES + tl.arange(0, DISTANCES), tl.program_id(0) // blocks
    head, channel = index // POSITION, index % POSITION
    sums += (head.to(tl.int64) * strips * CHANNELS + channel) * width
    total = tl.zeros((ROWS, DISTANCES), tl.float32)
    for first in tl.range(0, strips, ROWS):
        strip = first + tl.arange(0, ROWS)
        row = tl.load(places + 2 * strip, mask=strip < strips, other=0)
        length = tl.load(places + 2 * strip + 1, mask=strip < strips, other=0)
        r = (at - distances // 2)[None, :] + (row + BN)[:, None]
        mask = (length > 0)[:, None] & (r >= 0) & (r < _width(length, BN)[:, None])
        total += tl.load(sums + strip.to(tl.int64)[:, None] * (CHANNELS * width) + r, mask=mask, other=0.0)
    value = tl.sum(total, 0).to(dtable.dtype.element_ty)
    tl.store(dtable + index.to(tl.int64) * distances + at, value, mask=at < distances)


# ---------------------------------------------------------------------------------------------------------------------
# Host
# ---------------------------------------------------------------------------------------------------------------------


def tile_for(arch: int, dtype: torch.dtype, kernel: str) -> Tile:
    """The configuration of a kernel; sm_80's where the architecture has none of its own: the GPUs for desks have less
    shared memory."""
    if arch == 0:
        return INTERPRETER_TILE
    family = arch // 10 * 10 if arch // 10 * 10 in TILES else 80
    return Tile(*TILES[family][dtype.itemsize][KERNELS.index(kernel)])


class Launch:
    """What the launches of one call share."""

    def __init__(
        self,
        q: Tensor,  # [R, H, d], as k
        k: Tensor,
        p: Tensor,  # [R, H, c]
        packed: Tensor,  # of `pack`
        starts: Tensor,  # [B + 1]
        longest: int,
    ) -> None:
        self.index = dispatch.index_of(q.device)
        self.arch, self.dtype = dispatch.architecture(self.index), q.dtype
        self.rows, self.heads, self.width = q.shape
        self.position, self.longest, self.clips = p.shape[2], longest, starts.shape[0] - 1
        self.q, self.k, self.p = with_contiguous_rows(q), with_contiguous_rows(k), with_contiguous_rows(p)
        self.starts = starts.contiguous()
        self.vectors, self.far = packed, packed.shape[1] // 2
        self.words = packed.view(torch.int64) if packed.element_size() == 2 else packed
        self.precision = "tf32"
        if q.dtype == torch.float32:
            self.precision = PRECISIONS[torch.get_float32_matmul_precision()]

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.q.stride(0), self.k.stride(0), self.p.stride(0)

    def sizes(self, block: int) -> tuple[int, int, int, int]:
        return triton.cdiv(self.longest, block), self.heads, self.rows, self.far

    def programs(self, block: int) -> int:
        return self.clips * self.heads * triton.cdiv(self.longest, block)

    def tile(self, kernel: str) -> Tile:
        return tile_for(self.arch, self.dtype, kernel)

    def options(self, kernel: str, value: int | None = None) -> dict[str, Any]:
        return constants(self.tile(kernel), kernel, self.width, self.position, value, self.precision)

    def device_context(self) -> contextlib.AbstractContextManager[Any]:
        """Of the CUDA device, unless it is the current one: it costs a few microseconds."""
        if self.index is None or self.index == torch.cuda.current_device():
            return contextlib.nullcontext()
        return torch.cuda.device(self.index)


def with_contiguous_rows(x: Tensor) -> Tensor:
    """x [R, H, d] with the heads of a row one after the other, as slices of a projection's output have them."""
    x = x.detach()
    together = (x.stride(2) == 1 or x.shape[2] == 1) and (x.stride(1) == x.shape[2] or x.shape[1] == 1)
    return x if together else x.contiguous()


def constants(
    tile: Tile, kernel: str, width: int, position: int, value: int | None, precision: str
) -> dict[str, Any]:  # fmt: skip
    """Constants and options of a kernel."""
    shape: dict[str, Any] = {"BM": tile.rows, "BN": tile.columns, "PRECISION": precision}
    shape |= {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.registers is not None:
        shape["maxnreg"] = tile.registers
    if kernel in ("product", "change"):
        return {"VALUE": value, "BK": tile.depth, **shape}
    shape = {"HEAD": width, "D": padded_width(width), "POSITION": position, **shape}
    return shape if value is None else {"VALUE": value, "V": padded_width(value), **shape}


def pack(table: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """[H, 2 · far, 4] of `dtype`, distance d at far + d: the c channels of a table [H, c, 2L - 1], and zeros around."""
    heads, channels, distances = table.shape
    far = (triton.cdiv(longest, PADDING) + 1) * PADDING
    packed = table.new_zeros(heads, 2 * far, CHANNELS.value, dtype=dtype)
    middle = distances // 2
    packed[:, far - longest + 1 : far + longest, :channels] = table.detach()[
        :, :, middle - longest + 1 : middle + longest
    ].transpose(1, 2)
    return packed


def log_sums(launch: Launch) -> Tensor:
    """log2 of every row's sum of exponentials, [H, R] float32."""
    log_sum = launch.q.new_empty(launch.heads, launch.rows, dtype=torch.float32)
    tile = launch.tile("log_sum")
    with launch.device_context():
        _log_sum_kernel[(launch.programs(tile.rows),)](
            launch.q, launch.k, launch.p, launch.words, launch.starts, log_sum, *launch.strides,
            *launch.sizes(tile.rows), **launch.options("log_sum"),
        )  # fmt: skip
    return log_sum


def forward(launch: Launch, v: Tensor, log_sum: Tensor) -> Tensor:
    """[R, H, dv], contiguous."""
    v = with_contiguous_rows(v)
    out = v.new_empty(v.shape)
    tile = launch.tile("forward")
    with launch.device_context():
        if v.shape[2] > NARROW:
            _product(launch, _matrix(launch, log_sum), v, out, transposed=False)
        else:
            _forward_kernel[(launch.programs(tile.rows),)](
                launch.q, launch.k, launch.p, v, launch.words, launch.starts, log_sum, out,
                *launch.strides, v.stride(0), out.stride(0), *launch.sizes(tile.rows),
                **launch.options("forward", v.shape[2]),
            )  # fmt: skip
    return out


def _matrix(launch: Launch, log_sum: Tensor) -> Tensor:
    """The weights, [H, R, longest rounded up]: of each row those of its clip."""
    columns = triton.cdiv(launch.longest, PADDING) * PADDING
    matrix = launch.q.new_empty(launch.heads, launch.rows, columns)
    tile = launch.tile("matrix")
    _matrix_kernel[(launch.programs(tile.rows),)](
        launch.q, launch.k, launch.p, launch.words, launch.starts, log_sum, matrix,
        *launch.strides, columns, *launch.sizes(tile.rows), **launch.options("matrix"),
    )  # fmt: skip
    return matrix


def _product(launch: Launch, matrix: Tensor, x: Tensor, out: Tensor, transposed: bool) -> None:
    tile = launch.tile("product")
    _product_kernel[(launch.programs(tile.rows) * triton.cdiv(x.shape[2], tile.columns),)](
        matrix, x, launch.starts, out, matrix.stride(1), x.stride(0), out.stride(0), *launch.sizes(tile.rows)[:3],
        TRANSPOSED=transposed, **launch.options("product", x.shape[2]),
    )  # fmt: skip


def backward(
    launch: Launch,
    upstream: Tensor,  # [R, H, dv]
    out: Tensor,  # as `forward` gave it
    v: Tensor,
    log_sum: Tensor,
    table: Tensor,  # [H, c, 2L - 1], for the shape and dtype of its gradient
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, p, table and v; those of one pass come together, whether `need` asks for them or not."""
    upstream, v = with_contiguous_rows(upstream), with_contiguous_rows(v)
    dv = v.new_empty(v.shape)
    delta = torch.empty_like(log_sum)
    with launch.device_context():
        _delta_kernel[(triton.cdiv(launch.rows, DELTA_ROWS) * launch.heads,)](
            out, upstream, delta, out.stride(0), upstream.stride(0), launch.heads, launch.rows,
            VALUE=v.shape[2], BM=DELTA_ROWS, BN=min(DELTA_COLUMNS, padded_width(v.shape[2])),
        )  # fmt: skip
        if v.shape[2] <= NARROW:
            rest = _from_scores(launch, VALUES, table, need, (v, upstream, log_sum, delta, None), dv)
        else:
            matrix = _matrix(launch, log_sum)
            if need[4]:
                _product(launch, matrix, upstream, dv, transposed=True)
            tile = launch.tile("change")
            blocks = triton.cdiv(launch.longest, min(tile.rows, tile.columns))
            _change_kernel[(launch.clips * launch.heads * blocks * blocks,)](
                matrix, upstream, v, launch.starts, delta, matrix.stride(1), upstream.stride(0), v.stride(0),
                blocks, launch.heads, launch.rows, **launch.options("change", v.shape[2]),
            )  # fmt: skip
            rest = _from_scores(launch, MATRIX, table, need, (None, None, None, None, matrix))
    return *rest, dv


def penalty_gradients(
    launch: Launch, penalty: float, table: Tensor, need: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, p and table of penalty · Σ max(|score| - 25, 0)."""
    with launch.device_context():
        return _from_scores(launch, PENALTY, table, need, (None, None, None, None, None), penalty=penalty)


def _from_scores(
    launch: Launch,
    source: tl.constexpr,
    table: Tensor,
    need: Sequence[bool],
    given: tuple[Tensor | None, ...],  # v, upstream, log_sum, delta, matrix: what the source needs
    dv: Tensor | None = None,
    penalty: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v, upstream, log_sum, delta, matrix = given
    dq, dk, dp = (x.new_empty(x.shape) for x in (launch.q, launch.k, launch.p))
    dtable = table.new_empty(table.shape)
    value = 1 if v is None else v.shape[2]
    strides = (*launch.strides, *(0 if x is None else x.stride(0) for x in (v, upstream)))
    strides += (0 if matrix is None else matrix.stride(1),)
    if need[1] or (dv is not None and need[4]):
        tile = launch.tile("keys")
        _keys_kernel[(launch.programs(tile.columns),)](
            launch.q, launch.k, launch.p, v, launch.words, launch.starts, upstream, log_sum, delta, matrix, dk, dv,
            *strides, dk.stride(0), 0 if dv is None else dv.stride(0), *launch.sizes(tile.columns), penalty,
            SOURCE=source.value, **launch.options("keys", value),
        )  # fmt: skip
    if need[0] or need[2] or need[3]:
        tile = launch.tile("queries")
        strips, width = launch.rows // tile.rows + launch.clips, (triton.cdiv(launch.longest, tile.columns) + 1)
        width *= tile.columns
        sums = dq.new_empty(launch.heads, strips, CHANNELS.value, width, dtype=torch.float32)
        places = torch.zeros(strips, 2, dtype=torch.int32, device=dq.device)
        _queries_kernel[(launch.programs(tile.rows),)](
            launch.q, launch.k, launch.p, v, launch.words, launch.vectors, launch.starts, upstream, log_sum, delta,
            matrix, dq, dp, sums, places, *strides, dq.stride(0), dp.stride(0), *launch.sizes(tile.rows), penalty,
            strips, width, SOURCE=source.value, **launch.options("queries", value),
        )  # fmt: skip
        if need[3]:
            distances = table.shape[2]
            programs = launch.heads * launch.position * triton.cdiv(distances, SUMMED_DISTANCES)
            _table_kernel[(programs,)](
                sums, places, dtable, strips, width, distances, POSITION=launch.position, BN=tile.columns,
                ROWS=SUMMED_STRIPS, DISTANCES=SUMMED_DISTANCES,
            )  # fmt: skip
    return dq, dk, dp, dtable


# ---------------------------------------------------------------------------------------------------------------------
# Everything that the launchers may ask Triton to compile
# ---------------------------------------------------------------------------------------------------------------------

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SOURCES = {"values": VALUES, "matrix": MATRIX, "penalty": PENALTY}


def compilations(
    arch: int, width: int = 32, position: int = 4, narrow: int = 12, wide: int = 960
) -> Iterator[Compilation]:  # fmt: skip
    """Every (kernel, configuration, dtype, flags) that the launchers may pick on an architecture, for one width of
    heads, positions, narrow and wide values."""
    for dtype in DTYPES:
        name = TYPE_NAMES[dtype]
        for precision in ("tf32x3", "tf32") if dtype == torch.float32 else ("tf32",):
            label = f"{name} {precision}" if dtype == torch.float32 else name
            for kernel, function in (("log_sum", _log_sum_kernel), ("matrix", _matrix_kernel)):
                options = constants(tile_for(arch, dtype, kernel), kernel, width, position, None, precision)
                yield _compilation(f"shared attention {kernel} {label}", function, dtype, options)
            options = constants(tile_for(arch, dtype, "forward"), "forward", width, position, narrow, precision)
            yield _compilation(f"shared attention forward {label}", _forward_kernel, dtype, options)
            for kernel, function in (("keys", _keys_kernel), ("queries", _queries_kernel)):
                for source, number in SOURCES.items():
                    value = narrow if source == "values" else 1
                    options = constants(tile_for(arch, dtype, kernel), kernel, width, position, value, precision)
                    options |= {"SOURCE": number.value} | dict.fromkeys(ABSENT[source])
                    yield _compilation(f"shared attention {kernel} {label} {source}", function, dtype, options)
            for transposed in (False, True):
                options = constants(tile_for(arch, dtype, "product"), "product", width, position, wide, precision)
                title = f"shared attention product {label}{' transposed' if transposed else ''}"
                yield _compilation(title, _product_kernel, dtype, {"TRANSPOSED": transposed, **options})
            options = constants(tile_for(arch, dtype, "change"), "change", width, position, wide, precision)
            yield _compilation(f"shared attention change {label}", _change_kernel, dtype, options)
        for value in (narrow, wide):
            options = {"VALUE": value, "BM": DELTA_ROWS, "BN": min(DELTA_COLUMNS, padded_width(value))}
            yield _compilation(f"shared attention delta {name} {value}", _delta_kernel, dtype, options)
    sides = {tiles[KERNELS.index("queries")][1] for tiles in TILES[arch].values()}
    for columns, dtype in product(sorted(sides), DTYPES):
        options = {"POSITION": position, "BN": columns, "ROWS": SUMMED_STRIPS, "DISTANCES": SUMMED_DISTANCES}
        yield _compilation(f"shared attention table {columns} {TYPE_NAMES[dtype]}", _table_kernel, dtype, options)


# Pointers that a source of dS does not need.
ABSENT: dict[str, tuple[str, ...]] = {
    "values": ("matrix",),
    "matrix": ("v", "upstream", "log_sum", "delta", "dv"),
    "penalty": ("v", "upstream", "log_sum", "delta", "matrix", "dv"),
}


def _compilation(title: str, function: Any, dtype: torch.dtype, options: dict[str, Any]) -> Compilation:
    names = [p.name for p in function.params]
    constexprs = {key: value for key, value in options.items() if key in names}
    name, table = TYPE_NAMES[dtype], "fp32" if dtype == torch.float32 else "i64"
    types = dict.fromkeys(("starts", "places"), "*i32") | {"words": f"*{table}", "penalty": "fp32"}
    types |= dict.fromkeys(("log_sum", "delta", "sums"), "*fp32")
    pointers = ("q", "k", "p", "v", "x", "vectors", "upstream", "out", "matrix", "dq", "dk", "dp", "dv", "dtable")
    types |= dict.fromkeys(pointers, f"*{name}")
    types = {n: types.get(n, "i32") for n in names}  # strides and sizes
    signature, attrs = signature_and_attrs(function, types, constexprs)
    # Products of 16 columns or rows are among them, which the instruction for small matrices makes on every chip.
    matrix = "mma" if "PRECISION" in options else False
    warps, stages = options.get("num_warps", 4), options.get("num_stages", 3)  # else Triton's defaults
    maxnreg = options.get("maxnreg")
    return Compilation(title, function, signature, constexprs, attrs, warps, stages, matrix, maxnreg)
