"""Triton engine of gated-Toeplitz attention (see `fastclap.kernels.toeplitz_attention` for the definition).

Flash attention whose bias is made inside the tile. With row block i and column block j of a [BM, BN] tile the bias is
gate_i · table[j - i]: a tile needs BM + BN - 1 consecutive values of the table, which go through shared memory once and
are gathered from there straight into the layout of the matrix instruction's result.

* `_forward_kernel`: a block of queries against all keys with a running maximum; keeps log2 of each row's sum.
* `_rows_kernel`: δ_i = Σ_c out_ic · dout_ic, for the gradient of the softmax, and what else a row needs.
* `_keys_kernel`: a block of keys against all queries, transposed tiles: dK and dV.
* `_queries_kernel`: a block of queries against all keys: dQ, dgate_i = Σ_j ds_ij · table[j - i], and sums of gate · ds
  along the diagonals of 32 rows at a time.
* `_table_kernel`: dtable[r] = Σ_b Σ_i ds_{i,i+r} · gate_i, out of these sums.

Logits are in units of ln 2: table and scale are multiplied by log2(e). Every value is computed by one program in a
fixed order: results are bit-identical from run to run. In the backward pass numbers of rows are padded to a multiple
of the largest block, so that their loads need no masks; rows past T have log-sum +∞, so their probabilities are 0.
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
from fastclap.kernels.triton_tools import INF, LN2, LOG2E, PRECISIONS, TYPE_NAMES, jit_for_any_size

LARGEST_BLOCK = 128
SLACK = tl.constexpr(2 * LARGEST_BLOCK)  # values after a row of the padded table that a window may reach into
STRIP = tl.constexpr(32)  # rows, whose diagonals are summed together
TABLE_PROGRAMS = 2048  # at least so many share the work of dq where it gives dtable too; clips that share one are added
NARROW = 64  # heads up to this width have tiles of their own, and tf32x3


@dataclass(frozen=True)
class AttentionTile:
    """Queries and keys of a tile, warps of a program, stages of its loop.

    `registers`: the limit a thread, where it lets more programs share an SM without a spill in the main loop.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None


KERNELS = ("forward", "keys", "queries")
# By offline compilation: no spill in a main loop, then the most warps on an SM, then the fewest instructions. By
# architecture, bytes of an element and (padded) width of a head, up to 64 or 128; in the order of KERNELS,
# the fields of an `AttentionTile`. Tiles of queries have at least 32 rows and columns: see `_diagonal_sums`.
TILES: dict[int, dict[tuple[int, int], tuple[tuple[int, ...], ...]]] = {
    80: {
        (2, 64): ((128, 64, 8, 3, 128), (32, 64, 4, 2), (64, 32, 4, 2)),
        (2, 128): ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        (4, 64): ((64, 32, 4, 2), (32, 32, 4, 1), (32, 32, 4, 2)),
        (4, 128): ((64, 32, 4, 2), (32, 32, 8, 1), (64, 32, 8, 1)),
    },
    90: {
        (2, 64): ((128, 64, 8, 3, 128), (64, 64, 4, 2), (64, 64, 4, 2)),
        (2, 128): ((128, 64, 8, 2), (32, 128, 8, 2), (64, 32, 4, 2)),
        (4, 64): ((64, 32, 4, 2), (32, 64, 8, 1), (64, 32, 4, 1)),
        (4, 128): ((64, 32, 4, 2), (32, 64, 8, 1), (32, 32, 4, 1)),
    },
    100: {
        (2, 64): ((128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2)),
        (2, 128): ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
        (4, 64): ((64, 32, 4, 2), (32, 64, 8, 1), (64, 32, 8, 1)),
        (4, 128): ((64, 32, 4, 2), (32, 64, 8, 1), (64, 32, 8, 1)),
    },
}
INTERPRETER_TILE = AttentionTile(64, 32, 4, 1)
ROWS = 32  # of a program that prepares the numbers of rows
SUMMED_STRIPS, SUMMED_DISTANCES = 32, 64  # of a step of the program that sums strips; its distances


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_rows(base, first, stride, limit, ROWS: tl.constexpr, HEAD: tl.constexpr, D: tl.constexpr):
    """[ROWS, D] from row `first` on of a matrix of HEAD columns; zeros outside of it."""
    row, at = tl.arange(0, ROWS)[:, None], tl.arange(0, D)[None, :]
    mask = row < limit - first
    if HEAD < D:
        mask = mask & (at < HEAD)
    return tl.load(base + first * stride + (row * stride + at), mask=mask, other=0.0)


@triton.jit
def _store_rows(base, first, stride, limit, value, ROWS: tl.constexpr, HEAD: tl.constexpr, D: tl.constexpr):
    row, at = tl.arange(0, ROWS)[:, None], tl.arange(0, D)[None, :]
    mask = row < limit - first
    if HEAD < D:
        mask = mask & (at < HEAD)
    tl.store(base + first * stride + (row * stride + at), value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _valid(lengths, clip, length):
    """Number of keys of a clip."""
    if lengths is None:
        return length
    else:
        return tl.minimum(tl.load(lengths + clip).to(tl.int32), length)


@triton.jit
def _table(table, row, column, far, BM: tl.constexpr, BN: tl.constexpr, TRANSPOSED: tl.constexpr):
    """log2(e) · table[j - i] of the tile at (row, column): [BM, BN], TRANSPOSED [BN, BM]."""
    WINDOW: tl.constexpr = 2 * BM if BM > BN else 2 * BN
    window = tl.load(table + (far + column - row - BM) + tl.arange(0, WINDOW))
    if TRANSPOSED:
        at = tl.arange(0, BN)[:, None] - tl.arange(0, BM)[None, :] + BM
        return tl.reshape(tl.gather(window, tl.reshape(at, (BM * BN,)), 0), (BN, BM))
    else:
        at = tl.arange(0, BN)[None, :] - tl.arange(0, BM)[:, None] + BM
        return tl.reshape(tl.gather(window, tl.reshape(at, (BM * BN,)), 0), (BM, BN))


@triton.jit
def _mix(x, key):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ key) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _dropout_keys(seed, head):
    """The two keys of a (clip, head); see `toeplitz_attention.dropout_mask`."""
    if seed is None:
        return 0, 0
    else:
        value = tl.load(seed)
        low, high, head = value.to(tl.uint32), (value >> 32).to(tl.uint32), head.to(tl.uint32)
        return _mix(_mix(low + head * 0x9E3779B9, 0) ^ high, 0), _mix(_mix(high + head * 0x85EBCA6B, 0) ^ low, 0)


@triton.jit
def _kept(key0, key1, row, column, i, j, length, threshold):
    """Whether dropout keeps (row + i, column + j); i and j, ranges from 0, broadcast against each other."""
    # Without bit 3 rows i and i + 8, which one thread holds, have the same hash: it is computed once.
    shared = key0 + (row + (i - (i & 8))).to(tl.uint32) * length.to(tl.uint32)
    x = _mix(shared + (column + j).to(tl.uint32), key1)
    x = tl.where((i & 8) > 0, x, x << 16)
    return x.to(tl.int32, bitcast=True) >= threshold


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


@jit_for_any_size("heads length scale threshold gain")
def _forward_kernel(
    q, k, v, table, gate, lengths, seed, out, log_sum,
    q_clip, q_head, q_row, k_clip, k_head, k_row, v_clip, v_head, v_row, out_clip, out_head, out_row,
    heads, length, far, scale, threshold, gain,
    HEAD: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length, BM)
    row, index = (tl.program_id(0) % blocks) * BM, tl.program_id(0) // blocks
    clip, head = (index // heads).to(tl.int64), index % heads
    valid = _valid(lengths, clip, length)
    key0, key1 = _dropout_keys(seed, index)
    k += clip * k_clip + head * k_head
    v += clip * v_clip + head * v_head
    table += head * (2 * far + SLACK)
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    i = row + rows
    at = index.to(tl.int64) * length + i
    queries = _load_rows(q + clip * q_clip + head * q_head, row, q_row, length, BM, HEAD, D)
    factor = tl.load(gate + at, mask=i < length, other=0.0)
    maximum = tl.full((BM,), -INF, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    result = tl.zeros((BM, D), tl.float32)
    whole = valid // BN * BN
    for TAIL in tl.static_range(2):  # the tiles that all keys of are valid, then the last one if there is one more
        for column in tl.range(whole if TAIL else 0, valid if TAIL else whole, BN):
            x = tl.dot(queries, _load_rows(k, column, k_row, valid, BN, HEAD, D).T, input_precision=PRECISION)
            x = x * scale + factor[:, None] * _table(table, row, column, far, BM, BN, False)
            if TAIL:
                x = tl.where(columns[None, :] < valid - column, x, -INF)
            larger = tl.maximum(maximum, tl.max(x, 1))
            shrink = tl.exp2(maximum - larger)
            p = tl.exp2(x - larger[:, None])
            total = total * shrink + tl.sum(p, 1)
            maximum = larger
            if seed is not None:
                kept = _kept(key0, key1, row, column, rows[:, None], columns[None, :], length, threshold)
                p = tl.where(kept, p, 0.0)
            values = _load_rows(v, column, v_row, valid, BN, HEAD, D)
            result = tl.dot(p.to(values.dtype), values, result * shrink[:, None], input_precision=PRECISION)
    total = tl.where(valid > 0, total, 1.0)
    result *= (gain / total)[:, None]
    tl.store(log_sum + at, tl.where(valid > 0, maximum + tl.log2(total), INF), mask=i < length)
    _store_rows(out + clip * out_clip + head * out_head, row, out_row, length, result, BM, HEAD, D)


# ---------------------------------------------------------------------------------------------------------------------
# Sums along diagonals
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _last(x):
    """The last of x [A, B, C, N] along N: [A, B, C, 1]."""
    if x.shape[3] == 1:
        return x
    else:
        _, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2, 2)))
        return _last(odd)


@triton.jit
def _one_later(x, first):
    """x [A, B, C, N] moved by one along N, its last left out and `first` [A, B, C, 1] put in front: in registers."""
    if x.shape[3] == 1:
        return first
    else:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2, 2)))
        return tl.reshape(tl.join(_one_later(odd, first), even), x.shape)


@triton.jit
def _diagonal_sums(x, last, held, BM: tl.constexpr, BN: tl.constexpr):
    """Sums of the tiles [BM, BN] of a block of rows, which come from left to right, along their diagonals.

    Each strip of 32 rows of a tile gives BN sums, [BM / 32 · BN]: sum r is over i of x[i, j] with
    j - i = r - 32 relative to the strip's first row and the tile's first column, as far as j < BN in this tile and
    j ≥ 0 in the one before: what a tile has at greater distances waits in registers for the next.

    A thread of a matrix instruction has rows g and g + 8 of 16, and of every 8 columns the same ones. Therefore
    1. rows g + 8 are added to rows g, these 8 columns later (`last`: the last 8 columns, [BM / 16, 16, 8, 1]);
    2. elements with r ≥ BN make room for those of the tile before (`held`, [BM / 16, 8, 8, BN / 8]);
    3. the rest goes through shared memory, from where a thread adds up the 16 elements of one r. Every lane starts at
       another row, so that a warp writes to 32 banks and reads from 32.

    Returns the sums, and `last` and `held` for the next tile.
    """
    N: tl.constexpr = BN // 8
    SIXTEENS: tl.constexpr = BM // 16
    STRIPS: tl.constexpr = BM // STRIP
    x = tl.reshape(tl.permute(tl.reshape(x, (SIXTEENS, 2, 8, N, 8)), (0, 1, 2, 4, 3)), (SIXTEENS, 16, 8, N))
    upper = tl.arange(0, 16)[None, :, None, None] >= 8
    waiting = tl.where(upper, x, _one_later(x, last))
    waiting = tl.sum(tl.reshape(waiting, (SIXTEENS, 2, 8, 8, N)), 1)
    last = _last(x)
    sixteen, g = tl.arange(0, SIXTEENS)[:, None, None, None] % 2, tl.arange(0, 8)[None, :, None, None]
    column = tl.arange(0, N)[None, None, None, :] * 8 + tl.arange(0, 8)[None, None, :, None]
    inside = column - 16 * sixteen - g + 24 < BN
    x = tl.reshape(tl.where(inside, waiting, held), (SIXTEENS, 8, 4, 2, N))
    x = tl.reshape(tl.permute(x, (4, 3, 0, 1, 2)), (BM // 2 * BN,))
    step, of = tl.arange(0, 16)[:, None], tl.arange(0, STRIPS * BN)[None, :]
    strip, r = of // BN, of % BN
    sixteen, g = step // 8, (step % 8) ^ ((r & 1) | (r >> 2 & 6))
    column = (r + 16 * sixteen + g - 24 + BN) % BN
    at = (column // 8 * 2 + column % 2) * SIXTEENS + 2 * strip + sixteen
    at = (at * 8 + g) * 4 + column // 2 % 4
    x = tl.gather(x, tl.reshape(at, (BM // 2 * BN,)), 0)
    return tl.sum(tl.reshape(x, (16, STRIPS * BN)), 0), last, waiting


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


@jit_for_any_size("heads length keep")
def _rows_kernel(
    gate, log_sum, out, upstream, rows_gate, rows_log_sum, rows_delta,
    out_clip, out_head, out_row, up_clip, up_head, up_row, heads, length, far, keep,
    HEAD: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Gate, log-sum and δ of a block of rows, padded with 0, +∞ and 0; δ times the probability that dropout keeps a
    weight, by which all of ds is too large until the end."""
    blocks = far // BM
    row, index = (tl.program_id(0) % blocks) * BM, tl.program_id(0) // blocks
    clip, head = (index // heads).to(tl.int64), index % heads
    i = row + tl.arange(0, BM)
    at = index.to(tl.int64) * length + i
    to = index.to(tl.int64) * far + i
    x = _load_rows(out + clip * out_clip + head * out_head, row, out_row, length, BM, HEAD, D)
    y = _load_rows(upstream + clip * up_clip + head * up_head, row, up_row, length, BM, HEAD, D)
    tl.store(rows_delta + to, keep * tl.sum(x.to(tl.float32) * y.to(tl.float32), 1))
    tl.store(rows_gate + to, tl.load(gate + at, mask=i < length, other=0.0))
    tl.store(rows_log_sum + to, tl.load(log_sum + at, mask=i < length, other=INF))


@jit_for_any_size("heads length scale threshold gain")
def _keys_kernel(
    q, k, v, table, gate, lengths, seed, upstream, log_sum, delta, dk, dv,
    q_clip, q_head, q_row, k_clip, k_head, k_row, v_clip, v_head, v_row, up_clip, up_head, up_row,
    dk_clip, dk_head, dk_row, dv_clip, dv_head, dv_row,
    heads, length, far, scale, threshold, gain,
    HEAD: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length, BN)
    column, index = (tl.program_id(0) % blocks) * BN, tl.program_id(0) // blocks
    clip, head = (index // heads).to(tl.int64), index % heads
    valid = _valid(lengths, clip, length)
    key0, key1 = _dropout_keys(seed, index)
    q += clip * q_clip + head * q_head
    upstream += clip * up_clip + head * up_head
    table += head * (2 * far + SLACK)
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    gate += index.to(tl.int64) * far
    log_sum += index.to(tl.int64) * far
    delta += index.to(tl.int64) * far
    keys = _load_rows(k + clip * k_clip + head * k_head, column, k_row, valid, BN, HEAD, D)
    values = _load_rows(v + clip * v_clip + head * v_head, column, v_row, valid, BN, HEAD, D)
    key_gradient = tl.zeros((BN, D), tl.float32)
    value_gradient = tl.zeros((BN, D), tl.float32)
    for row in tl.range(0, length if column < valid else 0, BM):
        queries = _load_rows(q, row, q_row, length, BM, HEAD, D)
        x = tl.dot(keys, queries.T, input_precision=PRECISION)
        factor = tl.load(gate + row + rows)
        distance = _table(table, row, column, far, BM, BN, True)
        p = tl.exp2(x * scale + (factor[None, :] * distance - tl.load(log_sum + row + rows)[None, :]))
        out_gradient = _load_rows(upstream, row, up_row, length, BM, HEAD, D)
        ds = tl.dot(values, out_gradient.T, input_precision=PRECISION)
        weight = p
        if seed is not None:
            kept = _kept(key0, key1, row, column, rows[None, :], columns[:, None], length, threshold)
            weight = tl.where(kept, p, 0.0)
            ds = tl.where(kept, ds, 0.0)
        value_gradient = tl.dot(weight.to(q.dtype.element_ty), out_gradient, value_gradient, input_precision=PRECISION)
        ds = p * (ds - tl.load(delta + row + rows)[None, :])
        key_gradient = tl.dot(ds.to(q.dtype.element_ty), queries, key_gradient, input_precision=PRECISION)
    # Columns past the last key hold whatever their logits of 0 led to.
    inside = (columns < valid - column)[:, None]
    key_gradient = tl.where(inside, key_gradient * (gain * scale * LN2), 0.0)
    value_gradient = tl.where(inside, value_gradient * gain, 0.0)
    _store_rows(dk + clip * dk_clip + head * dk_head, column, dk_row, length, key_gradient, BN, HEAD, D)
    _store_rows(dv + clip * dv_clip + head * dv_head, column, dv_row, length, value_gradient, BN, HEAD, D)


@jit_for_any_size("clips heads length scale threshold gain groups")
def _queries_kernel(
    q, k, v, table, gate, lengths, seed, upstream, log_sum, delta, dq, dgate, sums,
    q_clip, q_head, q_row, k_clip, k_head, k_row, v_clip, v_head, v_row, up_clip, up_head, up_row,
    dq_clip, dq_head, dq_row,
    heads, length, far, scale, threshold, gain, clips, groups,
    HEAD: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ and dgate of a block of rows of the clips group, group + groups, …; without `sums` there is one in a group."""
    blocks = tl.cdiv(length, BM)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, group = rest % heads, rest // heads
    row = block * BM
    table += head * (2 * far + SLACK)
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    if sums is not None:
        width = _sums_of_strip(length, BN)
        of = tl.arange(0, BM // STRIP * BN)
        sums += ((head * groups + group) * blocks + block).to(tl.int64) * (BM // STRIP * width)
        slots = sums + (of // BN * width + of % BN)
        for column in tl.range(0, width, BN):
            tl.store(slots + column, tl.zeros((BM // STRIP * BN,), tl.float32))
    for clip in tl.range(group.to(tl.int64), clips, groups):
        index = clip * heads + head
        valid = _valid(lengths, clip, length)
        key0, key1 = _dropout_keys(seed, index)
        clip_keys, clip_values = k + clip * k_clip + head * k_head, v + clip * v_clip + head * v_head
        at = index * far + row + rows
        queries = _load_rows(q + clip * q_clip + head * q_head, row, q_row, length, BM, HEAD, D)
        out_gradient = _load_rows(upstream + clip * up_clip + head * up_head, row, up_row, length, BM, HEAD, D)
        factor, shift, change = tl.load(gate + at), tl.load(log_sum + at), tl.load(delta + at)
        query_gradient = tl.zeros((BM, D), tl.float32)
        gate_gradient = tl.zeros((BM,), tl.float32)
        whole = valid // BN * BN
        if sums is not None:
            tl.debug_barrier()  # other threads may have stored what is loaded here
            last = tl.zeros((BM // 16, 16, 8, 1), tl.float32)
            held = tl.zeros((BM // 16, 8, 8, BN // 8), tl.float32)
        for TAIL in tl.static_range(2):
            for column in tl.range(whole if TAIL else 0, valid if TAIL else whole, BN):
                keys = _load_rows(clip_keys, column, k_row, valid, BN, HEAD, D)
                x = tl.dot(queries, keys.T, input_precision=PRECISION)
                distance = _table(table, row, column, far, BM, BN, False)
                x = x * scale + (factor[:, None] * distance - shift[:, None])
                if TAIL:
                    x = tl.where(columns[None, :] < valid - column, x, -INF)
                p = tl.exp2(x)
                values = _load_rows(clip_values, column, v_row, valid, BN, HEAD, D)
                ds = tl.dot(out_gradient, values.T, input_precision=PRECISION)
                if seed is not None:
                    kept = _kept(key0, key1, row, column, rows[:, None], columns[None, :], length, threshold)
                    ds = tl.where(kept, ds, 0.0)
                ds = p * (ds - change[:, None])
                gate_gradient += tl.sum(ds * distance, 1)
                query_gradient = tl.dot(ds.to(keys.dtype), keys, query_gradient, input_precision=PRECISION)
                if sums is not None:
                    found, last, held = _diagonal_sums(ds * factor[:, None], last, held, BM, BN)
                    tl.store(slots + column, tl.load(slots + column) + found)
        if sums is not None:
            found, last, held = _diagonal_sums(tl.zeros((BM, BN), tl.float32), last, held, BM, BN)
            end = tl.cdiv(valid, BN) * BN
            tl.store(slots + end, tl.load(slots + end) + found)
        query_gradient *= gain * scale * LN2
        _store_rows(dq + clip * dq_clip + head * dq_head, row, dq_row, length, query_gradient, BM, HEAD, D)
        at = index * length + row + rows
        tl.store(dgate + at, gate_gradient * (gain * LN2), mask=rows < length - row)


@triton.jit
def _sums_of_strip(length, BN: tl.constexpr):
    """How many sums tiles of BN columns give for a strip of rows: those of one tile more than there are."""
    return (tl.cdiv(length, BN) + 1) * BN


@jit_for_any_size("heads length groups gain")
def _table_kernel(
    sums, dtable, heads, length, groups, gain,
    BM: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, DISTANCES: tl.constexpr,
):  # fmt: skip
    """dtable of DISTANCES distances: the sum of a strip at r is of distance r - 32 from its first row."""
    blocks = tl.cdiv(2 * length - 1, DISTANCES)
    at, head = tl.program_id(0) % blocks * DISTANCES + tl.arange(0, DISTANCES), tl.program_id(0) // blocks
    width = _sums_of_strip(length, BN)
    strips = tl.cdiv(length, BM) * (BM // STRIP)
    sums += head.to(tl.int64) * (groups * strips) * width
    total = tl.zeros((ROWS, DISTANCES), tl.float32)
    for first in tl.range(0, groups * strips, ROWS):
        row = first + tl.arange(0, ROWS)
        r = (at - (length - 1))[None, :] + (row % strips + 1)[:, None] * STRIP
        mask = (row < groups * strips)[:, None] & (r >= 0) & (r < width)
        total += tl.load(sums + row.to(tl.int64)[:, None] * width + r, mask=mask, other=0.0)
    value = (tl.sum(total, 0) * gain).to(dtable.dtype.element_ty)
    tl.store(dtable + head * (2 * length - 1) + at, value, mask=at < 2 * length - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Host
# ---------------------------------------------------------------------------------------------------------------------


def tile_for(arch: int, dtype: torch.dtype, width: int, kernel: str) -> AttentionTile:
    """The configuration of a kernel for a padded head width; sm_80's, the smallest, where the architecture has none of
    its own: the GPUs for desks have less shared memory."""
    if arch == 0:
        return INTERPRETER_TILE
    family = arch // 10 * 10 if arch // 10 * 10 in TILES else 80
    return AttentionTile(*TILES[family][dtype.itemsize, 64 if width <= NARROW else 128][KERNELS.index(kernel)])


class Launch:
    """What the launches of one call share; 16-bit and 32-bit table and gate become float32."""

    def __init__(
        self,
        q: Tensor,  # [B, H, T, d], as k and v
        k: Tensor,
        v: Tensor,
        table: Tensor,  # [H, 2T - 1]
        gate: Tensor,  # [B, H, T]
        lengths: Tensor | None,  # [B]
        seed: Tensor | None,  # [1]; None: no dropout
        dropout: float,
        scale: float,
    ) -> None:
        self.index = dispatch.index_of(q.device)
        self.arch, self.dtype = dispatch.architecture(self.index), q.dtype
        self.clips, self.heads, self.length, self.width = q.shape
        self.far = triton.cdiv(self.length, LARGEST_BLOCK) * LARGEST_BLOCK
        self.table_dtype, self.gate_dtype = table.dtype, gate.dtype
        self.padded_table = q.new_zeros(self.heads, 2 * self.far + SLACK.value, dtype=torch.float32)
        inside = self.padded_table[:, self.far - self.length + 1 : self.far + self.length]
        torch.mul(table.detach().float(), LOG2E.value, out=inside)
        self.gate = gate.detach().float().contiguous()
        self.q, self.k, self.v = _with_contiguous_rows(q), _with_contiguous_rows(k), _with_contiguous_rows(v)
        self.lengths = None if lengths is None else lengths.contiguous()
        self.seed, self.scale = seed, scale * LOG2E.value
        self.threshold, self.gain = (round(dropout * 2**16) - 2**15) << 16, 1.0 / (1.0 - dropout)
        self.precision = "tf32"
        if q.dtype == torch.float32:
            self.precision = PRECISIONS[torch.get_float32_matmul_precision()]

    def inputs(self, gate: Tensor) -> tuple[Any, ...]:
        return (self.q, self.k, self.v, self.padded_table, gate, self.lengths, self.seed)

    @property
    def strides(self) -> tuple[int, ...]:
        return (*self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3])

    @property
    def sizes(self) -> tuple[Any, ...]:
        return (self.heads, self.length, self.far, self.scale, self.threshold)

    def tile(self, kernel: str) -> AttentionTile:
        return tile_for(self.arch, self.dtype, padded_width(self.width), kernel)

    def programs(self, block: int) -> tuple[int]:
        return (self.clips * self.heads * triton.cdiv(self.length, block),)

    def device_context(self) -> contextlib.AbstractContextManager[Any]:
        """Of the CUDA device, unless it is the current one: it costs a few microseconds."""
        if self.index is None or self.index == torch.cuda.current_device():
            return contextlib.nullcontext()
        return torch.cuda.device(self.index)


def empty_projection(x: Tensor) -> Tensor:
    """An uninitialised tensor of the shape of x, [B, H, T, d], laid out as [B, T, H, d]: what projections multiply."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def _with_contiguous_rows(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def padded_width(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def constants(tile: AttentionTile, width: int, precision: str) -> dict[str, Any]:
    """Constants and options of a kernel."""
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.registers is not None:
        options["maxnreg"] = tile.registers
    sizes = {"HEAD": width, "D": padded_width(width), "BM": tile.rows, "BN": tile.columns}
    return {**sizes, "PRECISION": precision, **options}


def forward(launch: Launch) -> tuple[Tensor, Tensor]:
    """The output, and log2 of the rows' sums of exponentials, [B, H, T] float32 (+∞ for a clip without keys)."""
    out = empty_projection(launch.q)
    log_sum = launch.q.new_empty(launch.q.shape[:3], dtype=torch.float32)
    tile = launch.tile("forward")
    with launch.device_context():
        _forward_kernel[launch.programs(tile.rows)](
            *launch.inputs(launch.gate), out, log_sum, *launch.strides, *out.stride()[:3], *launch.sizes, launch.gain,
            **constants(tile, launch.width, launch.precision),
        )  # fmt: skip
    return out, log_sum


def backward(
    launch: Launch,
    upstream: Tensor,  # [B, H, T, d]
    out: Tensor,  # and the sums, as `forward` gave them
    log_sum: Tensor,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, table and gate; an empty tensor for each that `need` does not ask for."""
    upstream = _with_contiguous_rows(upstream)
    q, k, v = launch.q, launch.k, launch.v
    rows = q.new_empty(3, launch.clips * launch.heads, launch.far, dtype=torch.float32)
    dq, dk, dv = q.new_empty(0), k.new_empty(0), v.new_empty(0)
    dtable, dgate = q.new_empty(0, dtype=launch.table_dtype), q.new_empty(0, dtype=launch.gate_dtype)
    inputs = (*launch.inputs(rows[0]), upstream, rows[1], rows[2])
    strides = (*launch.strides, *upstream.stride()[:3])
    with launch.device_context():
        _rows_kernel[(launch.clips * launch.heads * launch.far // ROWS,)](
            launch.gate, log_sum, out, upstream, *rows, *out.stride()[:3], *upstream.stride()[:3],
            launch.heads, launch.length, launch.far, 1.0 / launch.gain,
            HEAD=launch.width, D=padded_width(launch.width), BM=ROWS,
        )  # fmt: skip
        if need[1] or need[2]:
            dk, dv = empty_projection(k), empty_projection(v)
            tile = launch.tile("keys")
            _keys_kernel[launch.programs(tile.columns)](
                *inputs, dk, dv, *strides, *dk.stride()[:3], *dv.stride()[:3], *launch.sizes,
                launch.gain, **constants(tile, launch.width, launch.precision),
            )  # fmt: skip
        if need[0] or need[3] or need[4]:
            dq, gate_gradient = empty_projection(q), torch.empty_like(launch.gate)
            tile = launch.tile("queries")
            groups, sums = launch.clips, None
            if need[3]:
                groups = table_groups(tile, launch.clips, launch.heads, launch.length)
                sums = q.new_empty(sums_size(tile, launch.heads, launch.length, groups), dtype=torch.float32)
            _queries_kernel[(groups * launch.heads * triton.cdiv(launch.length, tile.rows),)](
                *inputs, dq, gate_gradient, sums, *strides, *dq.stride()[:3], *launch.sizes,
                launch.gain, launch.clips, groups, **constants(tile, launch.width, launch.precision),
            )  # fmt: skip
            dgate = gate_gradient.to(launch.gate_dtype)
            if sums is not None:
                dtable = q.new_empty(launch.heads, 2 * launch.length - 1, dtype=launch.table_dtype)
                _table_kernel[(launch.heads * triton.cdiv(dtable.shape[1], SUMMED_DISTANCES),)](
                    sums, dtable, launch.heads, launch.length, groups, launch.gain,
                    BM=tile.rows, BN=tile.columns, ROWS=SUMMED_STRIPS, DISTANCES=SUMMED_DISTANCES,
                )  # fmt: skip
    gradients = (dq, dk, dv, dtable, dgate)
    return tuple(x if wanted else x.new_empty(0) for x, wanted in zip(gradients, need, strict=True))  # type: ignore[return-value]


def table_groups(tile: AttentionTile, clips: int, heads: int, length: int) -> int:
    """Into how many groups the clips go where dq's programs give dtable too: the clips of one are added up."""
    return min(clips, triton.cdiv(TABLE_PROGRAMS, heads * triton.cdiv(length, tile.rows)))


def sums_size(tile: AttentionTile, heads: int, length: int, groups: int) -> int:
    """How many sums of diagonals, 4 bytes each, the queries kernel leaves: a strip of 32 rows has about `length`.

    Whatever the batch, they belong to fewer than `TABLE_PROGRAMS` + heads · blocks of rows: at most 9.4 MB for 16 heads
    and 499 positions in 16 bits, and length² / 8 bytes a head where one clip has so many blocks.
    """
    strips = triton.cdiv(length, tile.rows) * tile.rows // STRIP.value
    return groups * heads * strips * (triton.cdiv(length, tile.columns) + 1) * tile.columns


# ---------------------------------------------------------------------------------------------------------------------
# Everything that the launchers may ask Triton to compile
# ---------------------------------------------------------------------------------------------------------------------

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FUNCTIONS = dict(zip(KERNELS, (_forward_kernel, _keys_kernel, _queries_kernel), strict=True))


def compilations(arch: int, widths: tuple[int, ...] = (64, 80)) -> Iterator[Compilation]:
    """Every (kernel, configuration, dtype, flags) that the launchers may pick on an architecture, for heads of some
    widths; others take the configuration of the next power of two."""
    both = (False, True)
    for width, dtype in product(widths, DTYPES):
        name = TYPE_NAMES[dtype]
        precisions: tuple[str, ...] = ("tf32",)
        if dtype == torch.float32 and width <= NARROW:
            precisions = ("tf32x3", "tf32")
        for precision, kernel, dropout, lengths in product(precisions, KERNELS, both, both):
            tile = tile_for(arch, dtype, padded_width(width), kernel)
            options = constants(tile, width, precision)
            label = f"{name} {precision}" if dtype == torch.float32 else name
            on = f"{' dropout' if dropout else ''}{' lengths' if lengths else ''}"
            absent = (() if dropout else ("seed",)) + (() if lengths else ("lengths",))
            # Below 64 rows of the result a GPU's own instruction gives way to that of sm_80.
            own = (tile.columns if kernel == "keys" else tile.rows) >= 64 or "mma.sync"
            title = f"attention {kernel} {width} {label}{on}"
            if kernel == "queries":
                yield _compilation(f"{title} table", FUNCTIONS[kernel], name, options, absent, own)
                absent = (*absent, "sums")
            yield _compilation(title, FUNCTIONS[kernel], name, options, absent, own)
        options = {"HEAD": width, "D": padded_width(width), "BM": ROWS}
        yield _compilation(f"attention rows {width} {name}", _rows_kernel, name, options, (), False)
    sides = {tiles[KERNELS.index("queries")][:2] for tiles in TILES[arch].values()}
    for (rows, columns), gradient in product(sorted(sides), [TYPE_NAMES[dtype] for dtype in DTYPES]):
        options = {"BM": rows, "BN": columns, "ROWS": SUMMED_STRIPS, "DISTANCES": SUMMED_DISTANCES}
        title = f"attention table {rows} {columns} {gradient}"
        yield _compilation(title, _table_kernel, gradient, options, (), False)


def _compilation(
    name: str,
    function: Any,
    dtype: str,
    options: dict[str, Any],
    absent: tuple[str, ...],
    matrix_instruction: bool | str,
) -> Compilation:
    constexprs = dict(options)
    warps, stages = constexprs.pop("num_warps", 4), constexprs.pop("num_stages", 3)  # else Triton's defaults
    maxnreg = constexprs.pop("maxnreg", None)
    constexprs |= dict.fromkeys(absent)
    types = dict.fromkeys(("q", "k", "v", "out", "upstream", "dq", "dk", "dv", "dtable"), f"*{dtype}")
    types |= dict.fromkeys(("table", "gate", "log_sum", "delta", "dgate", "sums"), "*fp32")
    types |= dict.fromkeys(("rows_gate", "rows_log_sum", "rows_delta"), "*fp32")
    types |= dict.fromkeys(("lengths", "seed"), "*i64") | dict.fromkeys(("scale", "gain", "keep"), "fp32")
    types = {p.name: types.get(p.name, "i32") for p in function.params}  # strides and sizes
    signature, attrs = signature_and_attrs(function, types, constexprs)
    over_clips = function is _queries_kernel
    return Compilation(
        name, function, signature, constexprs, attrs, warps, stages, matrix_instruction, maxnreg, tile_loop=over_clips
    )
