"""Triton kernels of the contrastive losses; `triton_engine` launches them.

Logits are in units of ln 2. Arguments that belong together travel between the device functions as tuples. A kernel that
serves two sides (rows and columns, a and b) has programs for the one and then for the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastclap.kernels.triton_tools import INF, LN2, LOG2E, jit_for_any_size

NO_ROW = tl.constexpr(-(1 << 31))  # keys outside the matrix: equal to no other
NO_COLUMN = tl.constexpr(1 - (1 << 31))
NAN_BITS = tl.constexpr(0x7FFFFFFF)  # above those of all other numbers
LOST_BITS = tl.constexpr(40)  # a term that underflows is below 2^-40 of its row's best


# ---------------------------------------------------------------------------------------------------------------------
# before the tiles


@triton.jit
def _maximum_of_bits(pointer, x):
    """Of numbers ≥ 0, whose bits are ordered as they are: the same in any order."""
    bits = tl.where(x == x, tl.maximum(x, 0.0).to(tl.int32, bitcast=True), NAN_BITS)
    tl.atomic_max(pointer, tl.max(bits, 0))


@jit_for_any_size("num_rows num_columns depth a_stride b_stride eps units normalize pairs", "scale a_factor a_inverse")
def rows_kernel(
    a, b, scale, a_factor, a_inverse, b_inverse, bounds,  # [N, D], [M, D], [1]; [N], [N], [M]; [3] int32, from 0
    num_rows, num_columns, depth, a_stride, b_stride, eps, units, normalize, pairs,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """1 / norms (or 1), those of a times scale · units, and bounds of all logits, as bits.

    bounds: the largest norms of a and b as logits see them, and the largest of -scale · â_i·b̂_i, i modulo N and M.
    """
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i, j = index % num_rows, index % num_columns
    a_at, b_at = a + i[:, None] * a_stride, b + j[:, None] * b_stride
    aa = tl.zeros((ROWS, DEPTH), tl.float32)
    bb = tl.zeros((ROWS, DEPTH), tl.float32)
    ab = tl.zeros((ROWS, DEPTH), tl.float32)
    for k in tl.range(0, depth, DEPTH):
        at = k + tl.arange(0, DEPTH)[None, :]
        x = tl.load(a_at + at, mask=at < depth, other=0.0).to(tl.float32)
        y = tl.load(b_at + at, mask=at < depth, other=0.0).to(tl.float32)
        aa += x * x
        bb += y * y
        ab += x * y
    a_norm, b_norm = tl.sqrt(tl.sum(aa, 1)), tl.sqrt(tl.sum(bb, 1))
    pair = tl.sum(ab, 1) * tl.load(scale)
    of_a, of_b = tl.full((ROWS,), 1.0, tl.float32), tl.full((ROWS,), 1.0, tl.float32)
    if normalize:
        # A comparison with NaN is false: a norm that is NaN stays.
        of_a = 1.0 / tl.where(a_norm < eps, eps, a_norm)
        of_b = 1.0 / tl.where(b_norm < eps, eps, b_norm)
        pair *= of_a * of_b
        a_norm, b_norm = tl.where(a_norm == a_norm, 1.0, a_norm), tl.where(b_norm == b_norm, 1.0, b_norm)
    tl.store(a_factor + index, of_a * tl.load(scale) * units, mask=index < num_rows)
    tl.store(a_inverse + index, of_a, mask=index < num_rows)
    tl.store(b_inverse + index, of_b, mask=index < num_columns)
    _maximum_of_bits(bounds, a_norm)
    _maximum_of_bits(bounds + 1, b_norm)
    if pairs:
        _maximum_of_bits(bounds + 2, -pair)


@triton.jit
def _fixed_maximum(bounds, scale, bias):
    """The constant that one exponential may use for rows and columns, and whether it may (see `triton_engine`)."""
    a_norm = tl.load(bounds).to(tl.float32, bitcast=True)
    b_norm = tl.load(bounds + 1).to(tl.float32, bitcast=True)
    largest = tl.abs(tl.load(scale)) * a_norm * b_norm * LOG2E
    lowest = tl.load(bounds + 2).to(tl.float32, bitcast=True) * LOG2E
    return largest - bias, largest + lowest < bias + 126 - LOST_BITS  # false for NaN


# ---------------------------------------------------------------------------------------------------------------------
# parts of a tile


@triton.jit
def _product(a, b, row, column, depth, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """[BM, BN] float32 of A·Bᵀ; the descriptors give zeros outside the matrices."""
    total = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, depth, BK):
        total = tl.dot(a.load([row, k]), b.load([column, k]).T, total, input_precision=PRECISION)
    return total


@triton.jit
def _halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """Left and right half of a tile's columns: what follows then needs half as many registers for column vectors."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _keys(keys, row, column, BM: tl.constexpr, BN: tl.constexpr):
    """Keys of the rows and columns from there on that are equal for positives."""
    a_key, b_key, end, num_columns, diagonal, ids = keys
    i, j = row + tl.arange(0, BM), column + tl.arange(0, BN)
    if ids:
        left = tl.load(a_key + i, mask=i < end, other=NO_ROW)
        right = tl.load(b_key + j, mask=j < num_columns, other=NO_COLUMN)
    else:
        left = tl.where(i < end, i + diagonal, NO_ROW)
        right = tl.where(j < num_columns, j, NO_COLUMN)
    return left, right


@triton.jit
def _is_plain(keys, row, column, BM: tl.constexpr, BN: tl.constexpr):
    """Whether a tile lies inside the matrix and has no positive."""
    _, _, end, num_columns, diagonal, ids = keys
    if ids:
        left, right = _keys(keys, row, column, BM, BN)
        positives = tl.max((left[:, None] == right[None, :]).to(tl.int32)) > 0
    else:
        positives = (row + diagonal < column + BN) & (column < row + diagonal + BM)
    return (row + BM <= end) & (column + BN <= num_columns) & (positives == 0)


@triton.jit
def _sum_of_rows(x):
    """Of a vector; as it is, Triton 3.6 fails on sm_100."""
    return tl.sum(tl.expand_dims(x, 0))


@triton.jit
def _left_out(t, guide, i, j, end, num_columns, left, right, COLUMNS: tl.constexpr):
    """Who is too much like a positive to be a negative, by the guide: of each row, and of each column."""
    ta_inverse, tb_inverse, row_threshold, column_threshold = guide
    t *= tl.load(ta_inverse + i, mask=i < end, other=0.0)[:, None]
    t *= tl.load(tb_inverse + j, mask=j < num_columns, other=0.0)[None, :]
    others = left[:, None] != right[None, :]
    of_row = others & (t > tl.load(row_threshold + i, mask=i < end, other=INF)[:, None])
    of_column = of_row
    if COLUMNS:
        of_column = others & (t > tl.load(column_threshold + j, mask=j < num_columns, other=INF)[None, :])
    return of_row, of_column


# ---------------------------------------------------------------------------------------------------------------------
# P1


@triton.jit
def _plain_sums(x, e, factors, fixed, row_parts, column_parts, strides, row, column, tile_row, part, start, kept,
                BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Of a half inside the matrix, without positives, under the fixed maximum: one exponential, no mask."""
    a_factor, b_factor = factors
    row_stride, row_plane, column_stride, column_plane = strides
    x *= tl.load(a_factor + row + tl.arange(0, BM))[:, None]
    x = tl.exp2(x * tl.load(b_factor + column + tl.arange(0, BN))[None, :] - fixed)
    if kept:
        e.store([row - start, column], x.to(e.dtype))
    tl.store(row_parts + row_plane + part * row_stride + (row - start) + tl.arange(0, BM), tl.sum(x, 1))
    if COLUMNS:
        tl.store(column_parts + column_plane + tile_row * column_stride + column + tl.arange(0, BN), tl.sum(x, 0))


@triton.jit
def _special_sums(x, t, factors, keys, guide, row_parts, column_parts, strides, row, column, tile_row, part, start,
                  BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr, GUIDE: tl.constexpr):  # fmt: skip
    """Of any half, relative to maxima of its own, positives by themselves."""
    a_factor, b_factor = factors
    _, _, end, num_columns, _, _ = keys
    row_stride, row_plane, column_stride, column_plane = strides
    i, j = row + tl.arange(0, BM), column + tl.arange(0, BN)
    row_inside, column_inside = i < end, j < num_columns
    x *= tl.load(a_factor + i, mask=row_inside, other=0.0)[:, None]
    x *= tl.load(b_factor + j, mask=column_inside, other=0.0)[None, :]
    x = tl.where(row_inside[:, None] & column_inside[None, :], x, -INF)
    left, right = _keys(keys, row, column, BM, BN)
    row_x, column_x = x, x
    if GUIDE:
        of_row, of_column = _left_out(t, guide, i, j, end, num_columns, left, right, COLUMNS)
        row_x, column_x = tl.where(of_row, -INF, x), tl.where(of_column, -INF, x)

    at = row_parts + part * row_stride + (row - start) + tl.arange(0, BM)
    maximum = tl.max(row_x, 1)
    tl.store(at, maximum, mask=row_inside)
    maximum = tl.where(maximum == -INF, 0.0, maximum)  # a half without columns
    y = tl.exp2(row_x - maximum[:, None])
    positive = tl.where(left[:, None] == right[None, :], y, 0.0)
    tl.store(at + row_plane, tl.sum(y - positive, 1), mask=row_inside)
    tl.store(at + 2 * row_plane, tl.sum(positive, 1), mask=row_inside)
    logit = tl.sum(tl.where(left[:, None] == right[None, :], x, 0.0), 1)
    tl.store(at + 3 * row_plane, logit, mask=row_inside)
    if COLUMNS:
        at = column_parts + tile_row * column_stride + column + tl.arange(0, BN)
        maximum = tl.max(column_x, 0)
        tl.store(at, maximum, mask=column_inside)
        maximum = tl.where(maximum == -INF, 0.0, maximum)
        y = tl.exp2(column_x - maximum[None, :])
        positive = tl.where(left[:, None] == right[None, :], y, 0.0)
        tl.store(at + column_plane, tl.sum(y - positive, 0), mask=column_inside)
        tl.store(at + 2 * column_plane, tl.sum(positive, 0), mask=column_inside)


@jit_for_any_size(
    "start end num_columns depth teacher_depth diagonal ids kept bias",
    "a_factor a_key b_key scale ta_inverse tb_inverse row_threshold column_threshold",
)
def sums_kernel(
    a, b, half_b, e,  # descriptors [N, D], [M, D] of the columns of a tile and of half of one, [chunk, M]
    a_factor, b_factor,  # [N] scale · log2(e) / norm, [M] 1 / norm
    a_key, b_key, bounds, scale,  # [N], [M] int32, with ids; [3], [1]
    ta, tb, ta_inverse, tb_inverse, row_threshold, column_threshold,  # the guide's; tb of half a tile
    row_parts, column_parts,  # [4, half tiles, chunk], [3, row tiles, M]: maximum, negatives, positives, logits
    special,  # [row tiles, column tiles] int8: which tiles have all these, and which the second alone
    start, end, num_columns, depth, teacher_depth, diagonal, ids, kept, bias,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, GUIDE: tl.constexpr,
):  # fmt: skip
    """P1: partial sums of exponentials over the rows and columns of a tile; `kept` exponentials of plain tiles."""
    HALF: tl.constexpr = BN // 2
    tiles, tile_columns, tile = tl.cdiv(end - start, BM), tl.cdiv(num_columns, BN), tl.program_id(0)
    tile_row, tile_column = tile % tiles, tile // tiles
    row, column = start + tile_row * BM, tile_column * BN
    keys = (a_key, b_key, end, num_columns, diagonal, ids)
    factors, guide = (a_factor, b_factor), (ta_inverse, tb_inverse, row_threshold, column_threshold)
    row_stride, column_stride = (end - start).to(tl.int64), num_columns.to(tl.int64)
    strides = (row_stride, 2 * tile_columns * row_stride, column_stride, tiles * column_stride)
    fixed, plain = _fixed_maximum(bounds, scale, bias)
    if GUIDE:
        plain = tile < 0
    elif plain:
        plain = _is_plain(keys, row, column, BM, BN)
    tl.store(special + tile_row * tile_columns + tile_column, 1 - plain.to(tl.int8))
    if plain:
        x = _halves(_product(a, b, row, column, depth, BM, BN, BK, PRECISION), BM, BN)
        for half in tl.static_range(2):
            _plain_sums(x[half], e, factors, fixed, row_parts, column_parts, strides, row, column + half * HALF,
                        tile_row, 2 * tile_column + half, start, kept, BM, HALF, COLUMNS)  # fmt: skip
    else:
        for half in tl.range(2, num_stages=1, disable_licm=True):
            edge = column + half * HALF
            if GUIDE:
                t = _product(ta, tb, row, edge, teacher_depth, BM, HALF, BK, PRECISION)
            s = _product(a, half_b, row, edge, depth, BM, HALF, BK, PRECISION)
            if not GUIDE:
                t = s
            _special_sums(s, t, factors, keys, guide, row_parts, column_parts, strides, row, edge, tile_row,
                          2 * tile_column + half, start, BM, HALF, COLUMNS, GUIDE)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# between P1 and P2


@triton.jit
def _power_of_difference(x, y):
    """2^(x - y) in float64; the difference, which may be 126, is not rounded to float32 before."""
    d = tl.maximum(x.to(tl.float64) - y.to(tl.float64), -1000.0)
    whole = tl.floor(d.to(tl.float32))
    return (tl.exp2((d - whole.to(tl.float64)).to(tl.float32)) * tl.exp2(whole)).to(tl.float64)


@triton.jit
def _added_parts(at, inside, fixed, parts, special, state, tiles, length, flags, positives, logits,
                 TILES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """(maximum, negatives, positives, logits) of rows or columns, with the partial sums of some tiles added.

    In a fixed order and in float64, relative to the running maximum. `state` is what there was before, `flags` where
    in `special` the tile of a partial sum is.
    """
    top, negative, positive, logit = state
    tile_per, tile_stride, at_per, at_stride = flags
    plane = tiles.to(tl.int64) * length
    for first in tl.range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        mask = (tile < tiles)[:, None] & inside[None, :]
        where = parts + tile.to(tl.int64)[:, None] * length + at[None, :]
        which = (tile // tile_per * tile_stride).to(tl.int64)[:, None] + (at // at_per * at_stride)[None, :]
        all_planes = mask & (tl.load(special + which, mask=mask, other=0) != 0)
        m = tl.where(all_planes, tl.load(where, mask=all_planes, other=0.0), tl.where(mask, fixed, -INF))
        new = tl.maximum(top, tl.max(m, 0))
        new = tl.where(new == -INF, 0.0, new)
        factor, before = _power_of_difference(m, new[None, :]), _power_of_difference(top, new)
        negative = negative * before + tl.sum(tl.load(where + plane, mask=mask, other=0.0).to(tl.float64) * factor, 0)
        counted = all_planes & (positives != 0)
        part = tl.load(where + 2 * plane, mask=counted, other=0.0).to(tl.float64)
        positive = positive * before + tl.sum(part * factor, 0)
        logit += tl.sum(tl.load(where + 3 * plane, mask=counted & logits, other=0.0).to(tl.float64), 0)
        top = new
    return top, negative, positive, logit


@triton.jit
def _factors(at, inside, fixed, state, weights, debiasing, outputs, length, block):
    """What P2 needs of rows or columns, and their terms of the loss and of dscale.

    Factors: the maximum that exponentials are relative to; what multiplies those of negatives under the fixed maximum;
    the same of positives; the positives' mean; a constant; what multiplies negatives relative to the maximum.

    With k positives, of which e is one, and total = Σ positives + Neg, G is
    weight · (κ · e / total - 1/k) = weight · κ/total · (e - mean) - weight/(k · total) · (Neg + (1 - κ) · Σ positives),
    so that nothing is lost to a difference of large numbers where a positive has all the probability. Neg is the sum
    of the negatives and κ = 1, unless they are debiased (Chuang et al. 2020, eq. 8).
    """
    top, negative, positive, logit = state
    k, weight, siblings, other_weight, hard = weights
    scale, debias, negatives = debiasing
    factors, terms, scale_terms = outputs
    top = tl.where(inside, top, 0.0)
    positives = tl.maximum(k, 1.0)
    number = negatives - k
    lowest = number * tl.exp2(-tl.abs(scale) * LOG2E - top).to(tl.float64)
    debiased = (negative - debias * number * positive / positives) / (1.0 - debias)
    bound = (debias > 0) & (debiased <= lowest)
    weight = tl.where(inside, weight, 0.0)
    total = tl.where(weight > 0, positive + tl.where(bound, lowest, debiased), 1.0)
    share = weight / total
    of_negatives = tl.where(bound, 0.0, share / (1.0 - debias))
    kappa = tl.where(bound, 1.0, 1.0 - debias * number / (positives * (1.0 - debias)))
    of_positives = tl.where(k == 1, 0.0, share * kappa)  # a single one is its own mean
    lost = tl.where(bound, lowest, negative / (1.0 - debias))
    factors += at
    tl.store(factors, top, mask=inside)
    under_fixed = of_negatives * _power_of_difference(fixed, top)
    tl.store(factors + length, under_fixed.to(tl.float32), mask=inside)
    tl.store(factors + 5 * length, of_negatives.to(tl.float32), mask=inside)
    tl.store(factors + 2 * length, of_positives.to(tl.float32), mask=inside)
    tl.store(factors + 3 * length, (positive / positives).to(tl.float32), mask=inside)
    constant = (share * lost - (1.0 - hard) * weight) / positives
    tl.store(factors + 4 * length, constant.to(tl.float32), mask=inside)
    target = weight / positives + other_weight / siblings
    term = weight * (top.to(tl.float64) * LN2 + tl.log(total)) - hard * target * logit * LN2  # no logits of columns
    tl.store(terms + block, tl.sum(tl.where(weight > 0, term, 0.0), 0))
    of_scale = tl.where(bound, -share * lowest, 0.0)
    tl.store(scale_terms + block, tl.sum(of_scale, 0) * tl.where(scale < 0, -1.0, 1.0))


@triton.jit
def _loaded(state, at, inside, length, fresh, WIDTH: tl.constexpr):
    """(maximum, negatives, positives, logits) as they are in memory, [4, L], or at the beginning."""
    top = tl.full((WIDTH,), -INF, tl.float32)
    negative = tl.zeros((WIDTH,), tl.float64)
    positive = tl.zeros((WIDTH,), tl.float64)
    logit = tl.zeros((WIDTH,), tl.float64)
    if fresh == 0:
        top = tl.load(state + at, mask=inside, other=-INF).to(tl.float32)
        negative = tl.load(state + length + at, mask=inside, other=0.0)
        positive = tl.load(state + 2 * length + at, mask=inside, other=0.0)
        logit = tl.load(state + 3 * length + at, mask=inside, other=0.0)
    return top, negative, positive, logit


@triton.jit
def _keep(state, values, at, inside, length):
    top, negative, positive, logit = values
    state += at
    tl.store(state, top.to(tl.float64), mask=inside)
    tl.store(state + length, negative, mask=inside)
    tl.store(state + 2 * length, positive, mask=inside)
    tl.store(state + 3 * length, logit, mask=inside)


@jit_for_any_size(
    "first_row rows row_tiles first_column columns column_tiles num_rows num_columns column_stride all_rows blocks "
    "diagonal ids two_sided positives fresh_rows fresh_columns finish_rows finish_columns hard debias queue_rows "
    "queue_columns bias tile_height tile_width",
    "scale row_state column_state row_count column_count siblings row_queue column_queue",
)
def combine_kernel(
    row_parts, column_parts, special, row_state, column_state,  # of `sums_kernel`; [4, N], [4, M] float64
    bounds, scale, row_count, column_count, siblings, numbers, row_queue, column_queue,  # see `PositiveKeys`
    row_factors, column_factors, terms,  # [6, N], [6, column_stride]; [2, row blocks + column blocks] float64
    first_row, rows, row_tiles, first_column, columns, column_tiles,  # of this launch, and in how many parts
    num_rows, num_columns, column_stride, all_rows, blocks, diagonal,  # of this rank, the matrix, all ranks; terms
    ids, two_sided, positives, fresh_rows, fresh_columns, finish_rows, finish_columns,
    hard, debias, queue_rows, queue_columns, bias,
    tile_height, tile_width, TILES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds partial sums to those of rows and columns, and where these are complete turns them into factors for P2."""
    fixed, _ = _fixed_maximum(bounds, scale, bias)
    tile_columns, row_blocks, block = tl.cdiv(columns, tile_width), tl.cdiv(rows, WIDTH), tl.program_id(0)
    of_rows = block < row_blocks
    ratio = tl.full((), 1.0, tl.float64)  # weight of a column, relative to that of a row
    if ids:
        ratio = tl.load(numbers).to(tl.float64) / tl.load(numbers + 1).to(tl.float64)
    if of_rows:
        parts, tiles, length, first = row_parts, row_tiles, rows, first_row
        flags = (2, 1, tile_height, tile_columns)
        state, stride, fresh, finish = row_state, num_rows, fresh_rows, finish_rows
        factors, factor_stride, others = row_factors, num_rows, num_columns + queue_columns
        counts, in_queue, from_queue, paired = row_count, row_queue, queue_columns, num_columns - diagonal
        block_of_terms, weight = first_row // WIDTH + block, tl.full((), 1.0, tl.float64)
    else:
        block -= row_blocks
        parts, tiles, length, first = column_parts, column_tiles, columns, first_column
        flags = (1, tile_columns, tile_width, 1)
        state, stride, fresh, finish = column_state, num_columns, fresh_columns, finish_columns
        factors, factor_stride, others = column_factors, column_stride, all_rows + queue_rows
        counts, in_queue, from_queue, paired = column_count, column_queue, queue_rows, all_rows
        block_of_terms, weight = tl.cdiv(num_rows, WIDTH) + block, ratio
    at = block * WIDTH + tl.arange(0, WIDTH)
    inside, index = at < length, first + at
    sums = _loaded(state, index, inside, stride, fresh, WIDTH)
    sums = _added_parts(at, inside, fixed, parts, special, sums, tiles, length, flags, positives, of_rows,
                        TILES, WIDTH)  # fmt: skip
    if finish:
        one = tl.full((WIDTH,), 1.0, tl.float64)
        k, sibling, negatives = tl.where(index < paired, 1.0, 0.0).to(tl.float64), one, one * others
        if ids:
            k = tl.load(counts + index, mask=inside, other=0).to(tl.float64)
            sibling = tl.load(siblings + index, mask=inside & of_rows, other=1).to(tl.float64)
            negatives -= tl.load(in_queue + index, mask=inside & (from_queue > 0), other=0).to(tl.float64)
        weights = (k, tl.where(k > 0, weight, 0.0), sibling, ratio * two_sided, hard)
        _factors(index, inside, fixed, sums, weights, (tl.load(scale), debias, negatives),
                 (factors, terms, terms + blocks), factor_stride, block_of_terms)  # fmt: skip
    else:
        _keep(state, sums, index, inside, stride)


# ---------------------------------------------------------------------------------------------------------------------
# P2


@triton.jit
def _probabilities(x, row, column, i, j, sizes, of_row, of_column, COLUMNS: tl.constexpr, GUIDE: tl.constexpr):
    """weight · P + weight · Q of a tile, as negatives have them, from maxima and factors of `combine_kernel`."""
    end, num_columns, num_rows, column_stride = sizes
    p = tl.exp2(x - tl.load(row + i, mask=i < end, other=0.0)[:, None])
    p *= tl.load(row + 5 * num_rows + i, mask=i < end, other=0.0)[:, None]
    if GUIDE:
        p = tl.where(of_row, 0.0, p)
    if COLUMNS:
        q = tl.exp2(x - tl.load(column + j, mask=j < num_columns, other=0.0)[None, :])
        q *= tl.load(column + 5 * column_stride + j, mask=j < num_columns, other=0.0)[None, :]
        if GUIDE:
            q = tl.where(of_column, 0.0, q)
        p += q
    return p


@triton.jit
def _of_positives(x, factors, stride, at, inside, ROW: tl.constexpr):
    """G of positives in one direction."""
    maximum = tl.load(factors + at, mask=inside, other=0.0)
    factor = tl.load(factors + 2 * stride + at, mask=inside, other=0.0)
    mean = tl.load(factors + 3 * stride + at, mask=inside, other=0.0)
    constant = tl.load(factors + 4 * stride + at, mask=inside, other=0.0)
    if ROW:
        return (tl.exp2(x - maximum[:, None]) - mean[:, None]) * factor[:, None] - constant[:, None]
    else:
        return (tl.exp2(x - maximum[None, :]) - mean[None, :]) * factor[None, :] - constant[None, :]


@triton.jit
def _plain_gradient(x, g, factors, out, fixed, row, column, sizes, top, left_edge, start, logits,
                    BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """G of a half inside the matrix, without positives, under the fixed maximum; x: products, or exponentials."""
    _, _, num_rows, column_stride = sizes
    a_factor, b_factor = factors
    a_out, b_out, gain = out
    i, j = top + tl.arange(0, BM), tl.arange(0, BN)
    if logits:
        x *= tl.load(a_factor + i)[:, None]
        x = tl.exp2(x * tl.load(b_factor + left_edge + j)[None, :] - fixed)
    of_row = tl.load(a_out + i) * gain
    factor = (of_row * tl.load(row + num_rows + i))[:, None]
    if COLUMNS:
        factor += of_row[:, None] * tl.load(column + column_stride + left_edge + j)[None, :]
    x = x * factor * tl.load(b_out + left_edge + j)[None, :]
    g.store([top - start, left_edge], x.to(g.dtype))


@triton.jit
def _special_gradient(
    x, t, g, factors, out, keys, row, column, teacher, losses, sizes, top, left_edge, start, target,
    BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr, TEACHER: tl.constexpr, GUIDE: tl.constexpr,
):  # fmt: skip
    """G of any half; with a teacher also its share of the loss."""
    end, num_columns, num_rows, column_stride = sizes
    a_factor, b_factor = factors
    a_out, b_out, gain = out
    i, j = top + tl.arange(0, BM), left_edge + tl.arange(0, BN)
    row_inside, column_inside = i < end, j < num_columns
    x *= tl.load(a_factor + i, mask=row_inside, other=0.0)[:, None]
    x *= tl.load(b_factor + j, mask=column_inside, other=0.0)[None, :]
    left, right = _keys(keys, top, left_edge, BM, BN)
    of_row = left[:, None] != right[None, :]
    of_column = of_row
    if TEACHER:
        ta_factor, tb_factor, teacher_row, teacher_column, weight = teacher
        t *= tl.load(ta_factor + i, mask=row_inside, other=0.0)[:, None]
        t *= tl.load(tb_factor + j, mask=column_inside, other=0.0)[None, :]
        wanted = weight * _probabilities(
            t, teacher_row, teacher_column, i, j, sizes, of_row, of_column, COLUMNS, False
        )  # fmt: skip
        t = tl.where(row_inside[:, None] & column_inside[None, :], wanted * (t - x), 0.0)
        tl.store(losses, _sum_of_rows(tl.sum(t, 1)) * LN2)
    if GUIDE:
        ta_factor, tb_factor, row_threshold, column_threshold, _ = teacher
        guide = (ta_factor, tb_factor, row_threshold, column_threshold)
        of_row, of_column = _left_out(t, guide, i, j, end, num_columns, left, right, COLUMNS)
    p = _probabilities(x, row, column, i, j, sizes, of_row, of_column, COLUMNS, GUIDE)
    q = _of_positives(x, row, num_rows, i, row_inside, True)
    if COLUMNS:
        q += _of_positives(x, column, column_stride, j, column_inside, False)
    p = tl.where(left[:, None] == right[None, :], q * target, p)
    if TEACHER:
        p -= wanted
    p *= tl.load(a_out + i, mask=row_inside, other=0.0)[:, None] * gain
    p *= tl.load(b_out + j, mask=column_inside, other=0.0)[None, :]
    g.store([top - start, left_edge], p.to(g.dtype))


@jit_for_any_size(
    "start end num_columns depth teacher_depth diagonal ids kept num_rows column_stride target teacher_weight gain "
    "bias",
    "a_factor a_out a_key b_key scale row ta_factor tb_factor teacher_row teacher_column losses",
)
def gradient_kernel(
    a, b, half_b, g,  # descriptors as those of `sums_kernel`
    a_factor, b_factor, a_out, b_out, a_key, b_key, bounds, scale,
    row, column,  # [6, N], [6, M] of `combine_kernel`
    ta, tb, ta_factor, tb_factor, teacher_row, teacher_column, losses,  # the teacher's or guide's; [half tiles]
    start, end, num_columns, depth, teacher_depth, diagonal, ids, kept, num_rows, column_stride,
    target, teacher_weight, gain, bias,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, TEACHER: tl.constexpr, GUIDE: tl.constexpr,
):  # fmt: skip
    """P2: G = dL/dS, times gain, the rows' a_out and the columns' b_out.

    kept: what P1 kept of plain tiles is in the place of G. target: 1, or 0 where positives are no part of the loss.
    """
    HALF: tl.constexpr = BN // 2
    tiles, tile = tl.cdiv(end - start, BM), tl.program_id(0)
    top, left_edge = start + tile % tiles * BM, tile // tiles * BN
    column_stride = tl.multiple_of(column_stride, 16)
    keys = (a_key, b_key, end, num_columns, diagonal, ids)
    factors, out, sizes = (a_factor, b_factor), (a_out, b_out, gain), (end, num_columns, num_rows, column_stride)
    fixed, plain = _fixed_maximum(bounds, scale, bias)
    if TEACHER or GUIDE:
        plain = tile < 0
    elif plain:
        plain = _is_plain(keys, top, left_edge, BM, BN)
    if plain & (kept != 0):
        for half in tl.range(2, num_stages=1, disable_licm=True):
            edge = left_edge + half * HALF
            e = g.load([top - start, edge]).to(tl.float32)
            _plain_gradient(e, g, factors, out, fixed, row, column, sizes, top, edge, start, False,
                            BM, HALF, COLUMNS)  # fmt: skip
    elif plain:
        x = _halves(_product(a, b, top, left_edge, depth, BM, BN, BK, PRECISION), BM, BN)
        for half in tl.static_range(2):
            _plain_gradient(x[half], g, factors, out, fixed, row, column, sizes, top, left_edge + half * HALF,
                            start, True, BM, HALF, COLUMNS)  # fmt: skip
    else:
        teacher = (ta_factor, tb_factor, teacher_row, teacher_column, teacher_weight)
        for half in tl.range(2, num_stages=1, disable_licm=True):
            edge = left_edge + half * HALF
            if TEACHER or GUIDE:
                t = _product(ta, tb, top, edge, teacher_depth, BM, HALF, BK, PRECISION)
            s = _product(a, half_b, top, edge, depth, BM, HALF, BK, PRECISION)
            if not (TEACHER or GUIDE):
                t = s
            _special_gradient(s, t, g, factors, out, keys, row, column, teacher, losses + 2 * tile + half,
                              sizes, top, edge, start, target, BM, HALF, COLUMNS, TEACHER, GUIDE)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# after P3 and P4


@triton.jit
def _number(numbers, number, ids):
    """Of positive rows, or of all that count."""
    count = tl.zeros((), tl.float64) + number
    if ids:
        count = tl.load(numbers).to(tl.float64)
    return count


@jit_for_any_size(
    "a_rows b_rows depth a_stride b_stride first_block factor normalize unit gain number ids write_a write_b",
    "raw_a raw_b a b a_inverse b_inverse scale numbers da db along",
)
def finish_kernel(
    raw_a, raw_b, a, b, a_inverse, b_inverse, scale, numbers, da, db,  # G·B and Gᵀ·A float32; embeddings; gradients
    along,  # [blocks] float64: shares of Σ ⟨x, raw⟩, from first_block on
    a_rows, b_rows, depth, a_stride, b_stride, first_block,
    factor, normalize, unit, gain, number, ids, write_a, write_b,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradients of the embeddings: alpha · after · (raw - x · square · ⟨x, raw⟩), alpha = scale · factor / number.

    `number` of positive rows is in `numbers` with ids. unit: x are unit rows that were multiplied, else raw is already
    what the rows themselves get.
    """
    block, blocks = tl.program_id(0), tl.cdiv(a_rows, ROWS)
    along += first_block + block
    if block < blocks:
        raw, x, inverse, out, rows, stride, write = raw_a, a, a_inverse, da, a_rows, a_stride, write_a
    else:
        raw, x, inverse, out, rows, stride, write = raw_b, b, b_inverse, db, b_rows, b_stride, write_b
        block -= blocks
    i = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    raw_at, x_at, inside = raw + i[:, None] * depth, x + i[:, None] * stride, (i < rows)[:, None]
    dots = tl.zeros((ROWS, DEPTH), tl.float32)
    for k in tl.range(0, depth, DEPTH):
        at = k + tl.arange(0, DEPTH)[None, :]
        gradient = tl.load(raw_at + at, mask=inside & (at < depth), other=0.0)
        dots += gradient * tl.load(x_at + at, mask=inside & (at < depth), other=0.0).to(tl.float32)
    dot = tl.sum(dots, 1)
    tl.store(along, tl.sum(dot.to(tl.float64), 0) / gain)
    if write:
        of_row = tl.load(inverse + i, mask=i < rows, other=0.0)
        alpha = (tl.load(scale).to(tl.float64) * factor / _number(numbers, number, ids) / gain).to(tl.float32)
        after = tl.where(unit != 0, of_row, 1.0) * alpha
        part = dot * normalize * tl.where(unit != 0, 1.0, of_row * of_row)
        for k in tl.range(0, depth, DEPTH):
            at = k + tl.arange(0, DEPTH)[None, :]
            mask = inside & (at < depth)
            gradient = tl.load(raw_at + at, mask=mask, other=0.0)
            value = tl.load(x_at + at, mask=mask, other=0.0).to(tl.float32)
            gradient = (gradient - value * part[:, None]) * after[:, None]
            tl.store(out + i[:, None] * depth + at, gradient.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sum(values, first, last, BLOCK: tl.constexpr):
    """In float64 and a fixed order."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in tl.range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values + at, mask=at < last, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@jit_for_any_size("row_terms all_terms first_along last_along half number ids add finish", "terms along totals")
def total_kernel(
    terms, along, totals, numbers, loss, scale_gradient,  # totals [4] float64: of rows, of columns
    row_terms, all_terms, first_along, last_along, half, number, ids, add, finish, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss and dscale from their terms (add), by way of totals that ranks may add up (finish)."""
    if add:
        rows, columns = _sum(terms, 0, row_terms, BLOCK), _sum(terms, row_terms, all_terms, BLOCK)
        of_rows = _sum(along, first_along, last_along, BLOCK) + _sum(terms, all_terms, all_terms + row_terms, BLOCK)
        of_columns = _sum(terms, all_terms + row_terms, 2 * all_terms, BLOCK)
    else:
        rows, columns = tl.load(totals), tl.load(totals + 2)
        of_rows, of_columns = tl.load(totals + 1), tl.load(totals + 3)
    if finish:
        count = _number(numbers, number, ids)
        tl.store(loss, ((rows + columns) * half / count).to(tl.float32))
        tl.store(scale_gradient, (of_rows + of_columns) * half / count)
    else:
        tl.store(totals, rows)
        tl.store(totals + 1, of_rows)
        tl.store(totals + 2, columns)
        tl.store(totals + 3, of_columns)


@jit_for_any_size("a_size b_size", "upstream da db dscale scaled_a scaled_b scaled_scale")
def upstream_kernel(
    da, db, dscale, upstream, scaled_a, scaled_b, scaled_scale, a_size, b_size, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradients times the upstream gradient, which no dtype of theirs rounds; dscale [1] float64."""
    block, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(a_size, BLOCK)
    first = block == 0
    if block < blocks:
        gradient, scaled, size = da, scaled_a, a_size
    else:
        gradient, scaled, size = db, scaled_b, b_size
        block -= blocks
    at = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(gradient + at, mask=at < size).to(tl.float32) * tl.load(upstream).to(tl.float32)
    tl.store(scaled + at, value.to(scaled.dtype.element_ty), mask=at < size)
    if first:
        of_scale = tl.load(dscale) * tl.load(upstream).to(tl.float64)
        tl.store(scaled_scale, of_scale.to(scaled_scale.dtype.element_ty))


# ---------------------------------------------------------------------------------------------------------------------
# in-batch top-1, and thresholds of a guide


@jit_for_any_size("start end num_columns depth diagonal ids num_rows", "a_factor b_factor a_key b_key rows columns")
def best_kernel(
    a, b, a_factor, b_factor, a_key, b_key, rows, columns,  # [2, N], [2, M], from -inf
    start, end, num_columns, depth, diagonal, ids, num_rows,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest logit of each row and column, and the largest of its positives; the same in any order."""
    tiles = tl.cdiv(end - start, BM)
    tile = tl.program_id(0)
    top, left_edge = start + tile % tiles * BM, tile // tiles * BN
    keys = (a_key, b_key, end, num_columns, diagonal, ids)
    x = _halves(_product(a, b, top, left_edge, depth, BM, BN, BK, PRECISION), BM, BN)
    for half in tl.static_range(2):
        edge = left_edge + half * (BN // 2)
        i, j = top + tl.arange(0, BM), edge + tl.arange(0, BN // 2)
        row_inside, column_inside = i < end, j < num_columns
        s = x[half] * tl.load(a_factor + i, mask=row_inside, other=0.0)[:, None]
        s = s * tl.load(b_factor + j, mask=column_inside, other=0.0)[None, :] + 0.0  # no -0.0, whose bits are lowest
        s = tl.where(row_inside[:, None] & column_inside[None, :], s, -INF)
        left, right = _keys(keys, top, edge, BM, BN // 2)
        best = tl.where(left[:, None] == right[None, :], s, -INF)
        tl.atomic_max(rows + i, tl.max(s, 1), mask=row_inside)
        tl.atomic_max(rows + num_rows + i, tl.max(best, 1), mask=row_inside)
        tl.atomic_max(columns + j, tl.max(s, 0), mask=column_inside)
        tl.atomic_max(columns + num_columns + j, tl.max(best, 0), mask=column_inside)


# ---------------------------------------------------------------------------------------------------------------------
# SigLIP


@triton.jit
def _times(x, y):
    return x * y


@triton.jit
def _sigmoid_half(
    x, g, factors, out, keys, shift, shares, half_tiles, top, left_edge, start, share, gradient,
    BM: tl.constexpr, BN: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    a_factor, b_factor = factors
    a_out, b_out, gain = out
    _, _, end, num_columns, _, _ = keys
    i, j = top + tl.arange(0, BM), left_edge + tl.arange(0, BN)
    row_inside, column_inside = i < end, j < num_columns
    x *= tl.load(a_factor + i, mask=row_inside, other=0.0)[:, None]
    x = x * tl.load(b_factor + j, mask=column_inside, other=0.0)[None, :] + shift
    if not PLAIN:
        left, right = _keys(keys, top, left_edge, BM, BN)
        inside = row_inside[:, None] & column_inside[None, :]
        x = tl.where(left[:, None] == right[None, :], -x, x)
    # -log σ(-x) = max(x, 0) + log(1 + y), y = exp(-|x|). Where y is larger, a row's 1 + y are multiplied and need one
    # logarithm; the series keeps smaller ones from rounding away in 1 + y.
    y = tl.exp2(-tl.abs(x) * LOG2E)
    term = tl.maximum(x, 0.0) + tl.where(y < 0.01, y * (1.0 - y * (0.5 - y * 0.33333334)), 0.0)
    root = tl.rsqrt(1.0 + y)  # of numbers from 1 to 2, where a division takes more care than is needed
    p = tl.where(x >= 0, 1.0, y) * (root * root)
    larger = tl.where(y < 0.01, 1.0, 1.0 + y)  # at most 2, and 64 in a row
    if not PLAIN:
        term, larger = tl.where(inside, term, 0.0), tl.where(inside, larger, 1.0)
        p = tl.where(left[:, None] == right[None, :], -p, p)
        p = tl.where(inside, p, 0.0)
    tl.store(shares + share, _sum_of_rows(tl.sum(term, 1) + tl.log(tl.reduce(larger, 1, _times))))
    tl.store(shares + half_tiles + share, _sum_of_rows(tl.sum(p, 1)))
    if gradient:
        p *= tl.load(a_out + i, mask=row_inside, other=0.0)[:, None] * gain
        p *= tl.load(b_out + j, mask=column_inside, other=0.0)[None, :]
        g.store([top - start, left_edge], p.to(g.dtype))


@jit_for_any_size(
    "start end num_columns depth diagonal ids gradient gain",
    "a_factor a_out a_key b_key bias shares",
)
def sigmoid_kernel(
    a, b, half_b, g,  # descriptors as those of `sums_kernel`
    a_factor, b_factor, a_out, b_out, a_key, b_key, bias,
    shares,  # [2, half tiles], of the loss and of dbias
    start, end, num_columns, depth, diagonal, ids, gradient, gain,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SigLIP in one pass: a tile's share of the loss and of dbias, and its G."""
    HALF: tl.constexpr = BN // 2
    tiles = tl.cdiv(end - start, BM)
    tile = tl.program_id(0)
    top, left_edge = start + tile % tiles * BM, tile // tiles * BN
    keys = (a_key, b_key, end, num_columns, diagonal, ids)
    factors, out = (a_factor, b_factor), (a_out, b_out, gain)
    shift, half_tiles = tl.load(bias), 2 * tiles.to(tl.int64) * tl.cdiv(num_columns, BN)
    if _is_plain(keys, top, left_edge, BM, BN):
        x = _halves(_product(a, b, top, left_edge, depth, BM, BN, BK, PRECISION), BM, BN)
        for half in tl.static_range(2):
            _sigmoid_half(x[half], g, factors, out, keys, shift, shares, half_tiles, top,
                          left_edge + half * HALF, start, 2 * tile + half, gradient, BM, HALF, True)  # fmt: skip
    else:
        for half in tl.range(2, num_stages=1, disable_licm=True):
            edge = left_edge + half * HALF
            s = _product(a, half_b, top, edge, depth, BM, HALF, BK, PRECISION)
            _sigmoid_half(s, g, factors, out, keys, shift, shares, half_tiles, top, edge, start,
                          2 * tile + half, gradient, BM, HALF, False)  # fmt: skip
