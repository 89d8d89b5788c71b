"""Triton kernels of the contrastive losses; `triton_engine` launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from fastclap.kernels.triton_tools import INF, LN2, LOG2E, jit_for_any_size


@jit_for_any_size("num_rows num_columns depth")
def rows_kernel(a, b, a_norm, b_norm, pair, num_rows, num_columns, depth, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Norms of the rows of a and b (at least NORM_EPS is the caller's business) and a_i·b_i, i modulo N and M."""
    depth = tl.multiple_of(depth, 16)
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i, j = index % num_rows, index % num_columns
    aa = tl.zeros((ROWS, DEPTH), tl.float32)
    bb = tl.zeros((ROWS, DEPTH), tl.float32)
    ab = tl.zeros((ROWS, DEPTH), tl.float32)
    for k in tl.range(0, depth, DEPTH):
        at = k + tl.arange(0, DEPTH)
        x = tl.load(a + i[:, None] * depth + at[None, :], mask=at[None, :] < depth, other=0.0).to(tl.float32)
        y = tl.load(b + j[:, None] * depth + at[None, :], mask=at[None, :] < depth, other=0.0).to(tl.float32)
        aa += x * x
        bb += y * y
        ab += x * y
    tl.store(a_norm + index, tl.sqrt(tl.sum(aa, 1)), mask=index < num_rows)
    tl.store(b_norm + index, tl.sqrt(tl.sum(bb, 1)), mask=index < num_columns)
    tl.store(pair + index, tl.sum(ab, 1), mask=(index < num_rows) | (index < num_columns))


@triton.jit
def _product(a, b, row, column, depth, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """[BM, BN] float32 of A·Bᵀ; the descriptors give zeros outside the matrices."""
    total = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, depth, BK):
        total = tl.dot(a.load([row, k]), b.load([column, k]).T, total, input_precision=PRECISION)
    return total


@triton.jit
def _keys(a_class, b_class, i, j, end, num_columns, diagonal, IDS: tl.constexpr):
    """Keys of rows i and columns j that are equal for positives and differ outside the matrix."""
    if IDS:
        left = tl.load(a_class + i, mask=i < end, other=-1)
        right = tl.load(b_class + j, mask=j < num_columns, other=-2)
    else:
        left = tl.where(i < end, i + diagonal, -1)
        right = tl.where(j < num_columns, j, -2)
    return left, right


@triton.jit
def _has_positives(left, right, row, column, diagonal, BM: tl.constexpr, BN: tl.constexpr, IDS: tl.constexpr):
    if IDS:
        return tl.max(tl.max((left[:, None] == right[None, :]).to(tl.int32), 1), 0) > 0
    else:
        return (row + diagonal < column + BN) & (column < row + diagonal + BM)


@triton.jit
def _halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """Left and right half of a tile's columns: what follows then needs half as many registers for column vectors."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _half_sums(
    x, e, a_factor, b_factor, a_class, b_class, shift, row_logit, row_parts, column_parts, row_tops, column_tops,
    start, end, num_columns, diagonal, row_stride, row_plane, column_stride, column_plane,
    tile_row, part, BM: tl.constexpr, BN: tl.constexpr,
    IDS: tl.constexpr, COLUMNS: tl.constexpr, STORE: tl.constexpr, TOP1: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    row, column = start + tile_row * BM, part * BN
    i, j = row + tl.arange(0, BM), column + tl.arange(0, BN)
    row_inside, column_inside = i < end, j < num_columns
    x *= tl.load(a_factor + i, mask=row_inside, other=0.0)[:, None]
    x *= tl.load(b_factor + j, mask=column_inside, other=0.0)[None, :]
    if (row + BM > end) | (column + BN > num_columns):
        x = tl.where(row_inside[:, None] & column_inside[None, :], x, -INF)
    left, right = _keys(a_class, b_class, i, j, end, num_columns, diagonal, IDS)
    has_positives = _has_positives(left, right, row, column, diagonal, BM, BN, IDS)

    row_parts += part.to(tl.int64) * row_stride + tile_row * BM + tl.arange(0, BM)
    column_parts += tile_row.to(tl.int64) * column_stride + j
    if TOP1:
        row_tops += part.to(tl.int64) * row_stride + tile_row * BM + tl.arange(0, BM)
        column_tops += tile_row.to(tl.int64) * column_stride + j
        best = tl.where(left[:, None] == right[None, :], x, -INF)
        tl.store(row_tops, tl.max(x, 1), mask=row_inside)
        tl.store(row_tops + row_plane, tl.max(best, 1), mask=row_inside)
        if COLUMNS:
            tl.store(column_tops, tl.max(x, 0), mask=column_inside)
            tl.store(column_tops + column_plane, tl.max(best, 0), mask=column_inside)
    if IDS:
        zero = tl.zeros((BM,), tl.float32)
        tl.store(row_parts + 2 * row_plane, zero, mask=row_inside)
        tl.store(row_parts + 3 * row_plane, zero, mask=row_inside)
        if COLUMNS:
            tl.store(column_parts + 2 * column_plane, tl.zeros((BN,), tl.float32), mask=column_inside)
    if has_positives:
        logit = tl.sum(tl.where(left[:, None] == right[None, :], x, 0.0), 1)
        if IDS:
            tl.store(row_parts + 3 * row_plane, logit, mask=row_inside)
        else:
            tl.store(row_logit + i, logit, mask=row_inside & (left >= column) & (left < column + BN))

    if FIXED:
        x = tl.exp2(x - tl.load(shift))
        if STORE:
            e.store([tile_row * BM, column], x.to(e.dtype))
        if has_positives:
            positive = tl.where(left[:, None] == right[None, :], x, 0.0)
            x -= positive
            if IDS:
                tl.store(row_parts + 2 * row_plane, tl.sum(positive, 1), mask=row_inside)
                if COLUMNS:
                    tl.store(column_parts + 2 * column_plane, tl.sum(positive, 0), mask=column_inside)
        tl.store(row_parts, tl.sum(x, 1), mask=row_inside)
        if COLUMNS:
            tl.store(column_parts, tl.sum(x, 0), mask=column_inside)
    else:
        maximum = tl.max(x, 1)
        tl.store(row_parts + row_plane, maximum, mask=row_inside)
        maximum = tl.where(maximum == -INF, 0.0, maximum)  # a half without columns
        y = tl.exp2(x - maximum[:, None])
        if has_positives:
            positive = tl.where(left[:, None] == right[None, :], y, 0.0)
            y -= positive
            if IDS:
                tl.store(row_parts + 2 * row_plane, tl.sum(positive, 1), mask=row_inside)
        tl.store(row_parts, tl.sum(y, 1), mask=row_inside)
        if COLUMNS:
            maximum = tl.max(x, 0)
            tl.store(column_parts + column_plane, maximum, mask=column_inside)
            maximum = tl.where(maximum == -INF, 0.0, maximum)
            y = tl.exp2(x - maximum[None, :])
            if has_positives:
                positive = tl.where(left[:, None] == right[None, :], y, 0.0)
                y -= positive
                if IDS:
                    tl.store(column_parts + 2 * column_plane, tl.sum(positive, 0), mask=column_inside)
            tl.store(column_parts, tl.sum(y, 0), mask=column_inside)


@triton.jit
def _sums_tile(
    tile, a, b, e, a_factor, b_factor, a_class, b_class, shift, row_logit, row_parts, column_parts, row_tops,
    column_tops, start, end, num_columns, depth, diagonal, row_stride, row_plane, column_stride, column_plane,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    IDS: tl.constexpr, COLUMNS: tl.constexpr, STORE: tl.constexpr, TOP1: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(end - start, BM)
    tile_row, tile_column = tile % tiles, tile // tiles
    x = _product(a, b, start + tile_row * BM, tile_column * BN, depth, BM, BN, BK, PRECISION)
    x, y = _halves(x, BM, BN)
    _half_sums(
        x, e, a_factor, b_factor, a_class, b_class, shift, row_logit, row_parts, column_parts, row_tops, column_tops,
        start, end, num_columns, diagonal, row_stride, row_plane, column_stride, column_plane,
        tile_row, 2 * tile_column, BM, BN // 2, IDS, COLUMNS, STORE, TOP1, FIXED,
    )  # fmt: skip
    _half_sums(
        y, e, a_factor, b_factor, a_class, b_class, shift, row_logit, row_parts, column_parts, row_tops, column_tops,
        start, end, num_columns, diagonal, row_stride, row_plane, column_stride, column_plane,
        tile_row, 2 * tile_column + 1, BM, BN // 2, IDS, COLUMNS, STORE, TOP1, FIXED,
    )  # fmt: skip


@jit_for_any_size(
    "start end num_columns depth diagonal row_stride row_plane column_stride column_plane",
    "a_factor b_factor a_class b_class",
)
def sums_kernel(
    a, b, e,  # descriptors [N, D], [M, D], [chunk, M]
    a_factor, b_factor,  # [N] scale · log2(e) / norm, [M] 1 / norm
    a_class, b_class,  # [N], [M] int32
    shift,  # [2]: the fixed maximum, and whether it is to be used
    row_logit,  # [N], written without ids
    row_parts, column_parts,  # [4, half tiles, chunk], [3, row tiles, M]: negatives, maximum; ids: positives, logits
    row_tops, column_tops,  # [2, …]: largest logit, largest logit of a positive
    start, end, num_columns, depth, diagonal, row_stride, row_plane, column_stride, column_plane,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    IDS: tl.constexpr, COLUMNS: tl.constexpr, STORE: tl.constexpr, TOP1: tl.constexpr, FIXED: tl.constexpr,
    LOOP: tl.constexpr,
):  # fmt: skip
    """P1: partial sums of exponentials over the rows and columns of a tile; logits are in units of ln 2.

    FIXED: one exponential with the fixed maximum, else two with the tile's maxima. Both are launched, one works.
    LOOP: a program takes several tiles.
    """
    if (tl.load(shift + 1) > 0) != FIXED:
        return
    if not LOOP:
        _sums_tile(
            tl.program_id(0), a, b, e, a_factor, b_factor, a_class, b_class, shift, row_logit, row_parts, column_parts,
            row_tops, column_tops, start, end, num_columns, depth, diagonal, row_stride, row_plane,
            column_stride, column_plane, BM, BN, BK, PRECISION, IDS, COLUMNS, STORE, TOP1, FIXED,
        )  # fmt: skip
    else:
        total = tl.cdiv(end - start, BM) * tl.cdiv(num_columns, BN)
        for tile in tl.range(tl.program_id(0), total, tl.num_programs(0)):
            _sums_tile(
                tile, a, b, e, a_factor, b_factor, a_class, b_class, shift, row_logit, row_parts, column_parts,
                row_tops, column_tops, start, end, num_columns, depth, diagonal, row_stride, row_plane,
                column_stride, column_plane, BM, BN, BK, PRECISION, IDS, COLUMNS, STORE, TOP1, FIXED,
            )  # fmt: skip


@jit_for_any_size("length tiles stride plane total_stride first", "parts maximum sums")
def combine_kernel(
    parts, shift, maximum, sums,  # [planes, tiles, stride]; [2]; [L] float32 and [3, L] float64, added to
    length, tiles, stride, plane, total_stride, first,
    IDS: tl.constexpr, LOGITS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds the tiles' partial sums in a fixed order, in float64, relative to the running maximum."""
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = at < length
    fixed = tl.load(shift + 1) > 0
    constant = tl.load(shift)
    top = tl.load(maximum + first + at, mask=inside, other=0.0)
    negative = tl.load(sums + first + at, mask=inside, other=0.0)
    positive = tl.load(sums + total_stride + first + at, mask=inside, other=0.0)
    logit = tl.zeros((WIDTH,), tl.float64)
    for t in tl.range(0, tiles, TILES):
        tile = t + tl.arange(0, TILES)
        mask = (tile < tiles)[:, None] & inside[None, :]
        where = tile.to(tl.int64)[:, None] * stride + at[None, :]
        if fixed:
            m = tl.zeros((TILES, WIDTH), tl.float32) + constant
        else:
            m = tl.load(parts + plane + where, mask=mask, other=-INF)
        new = tl.maximum(top, tl.max(m, 0))
        new = tl.where(new == -INF, 0.0, new)
        factor = tl.exp2(m - new[None, :]).to(tl.float64)
        kept = tl.exp2(top - new).to(tl.float64)
        part = tl.load(parts + where, mask=mask, other=0.0)
        negative = negative * kept + tl.sum(part.to(tl.float64) * factor, 0)
        if IDS:
            part = tl.load(parts + 2 * plane + where, mask=mask, other=0.0)
            positive = positive * kept + tl.sum(part.to(tl.float64) * factor, 0)
            if LOGITS:
                part = tl.load(parts + 3 * plane + where, mask=mask, other=0.0)
                logit += tl.sum(part.to(tl.float64), 0)
        top = new
    tl.store(maximum + first + at, top, mask=inside)
    tl.store(sums + first + at, negative, mask=inside)
    if IDS:
        tl.store(sums + total_stride + first + at, positive, mask=inside)
        if LOGITS:
            logit += tl.load(sums + 2 * total_stride + first + at, mask=inside, other=0.0)
            tl.store(sums + 2 * total_stride + first + at, logit, mask=inside)


@jit_for_any_size(
    "length diagonal num_others hard",
    "maximum sums logits count siblings ratio other_ratio factors terms",
)
def factors_kernel(
    maximum, sums, logits,  # [L] float32, [3, L] float64, [L] float32 (the positive's, without ids)
    count, siblings, ratio, other_ratio,  # positives of a row, rows with its id; weights (number over number) [1]
    factors, terms,  # [5, L] float32, [L] float64
    length, diagonal, num_others, hard,
    IDS: tl.constexpr, LOGITS: tl.constexpr, TWO_SIDED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What P2 needs of a row (or column): maximum, weight/Σ; for positives that again, their mean e, a constant.

    With k positives, weight·(p - 1/k) = weight/Σ · (e - mean e) - weight/Σ · (Σ negatives)/k: where p → 1/k nothing is
    lost to a difference of large numbers, and a single positive needs the constant alone.
    """
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = at < length
    negative = tl.load(sums + at, mask=inside, other=1.0)
    top = tl.load(maximum + at, mask=inside, other=0.0)
    if IDS:
        positive = tl.load(sums + length + at, mask=inside, other=1.0)
        k = tl.load(count + at, mask=inside, other=0).to(tl.float64)
        weight = tl.where(k > 0, tl.load(ratio), 0.0)
    else:
        k = tl.where(at + diagonal < num_others, 1.0, 0.0).to(tl.float64)
        weight = k
        x = tl.load(logits + at, mask=inside, other=0.0)
        positive = tl.exp2(x - top).to(tl.float64)
    total = negative + positive
    share = weight / total
    single = k == 1
    k = tl.maximum(k, 1.0)
    tl.store(factors + at, top, mask=inside)
    tl.store(factors + length + at, share.to(tl.float32), mask=inside)
    tl.store(factors + 2 * length + at, tl.where(single, 0.0, share).to(tl.float32), mask=inside)
    tl.store(factors + 3 * length + at, (positive / k).to(tl.float32), mask=inside)
    tl.store(factors + 4 * length + at, ((share * negative - (1.0 - hard) * weight) / k).to(tl.float32), mask=inside)
    term = tl.where(weight > 0, weight * (top.to(tl.float64) * LN2 + tl.log(total)), 0.0)
    if LOGITS:
        target = weight / k
        if TWO_SIDED:
            if IDS:
                target += tl.load(other_ratio) / tl.load(siblings + at, mask=inside, other=1).to(tl.float64)
            else:
                target += weight
        logit = tl.load(sums + 2 * length + at, mask=inside, other=0.0) if IDS else x.to(tl.float64)
        term -= tl.where(weight > 0, hard * target * logit * LN2, 0.0)
    tl.store(terms + at, term, mask=inside)


@triton.jit
def _probabilities(
    x, shift, row, column, row_factor, column_factor, i, j, end, num_columns,
    COLUMNS: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """weight · P + weight · Q of a tile, from maxima and factors of `factors_kernel`."""
    r = tl.load(row_factor + i, mask=i < end, other=0.0)
    if COLUMNS:
        c = tl.load(column_factor + j, mask=j < num_columns, other=0.0)
    if FIXED:
        if COLUMNS:
            return tl.exp2(x - tl.load(shift)) * (r[:, None] + c[None, :])
        else:
            return tl.exp2(x - tl.load(shift)) * r[:, None]
    else:
        p = tl.exp2(x - tl.load(row + i, mask=i < end, other=0.0)[:, None]) * r[:, None]
        if COLUMNS:
            p += tl.exp2(x - tl.load(column + j, mask=j < num_columns, other=0.0)[None, :]) * c[None, :]
        return p


@triton.jit
def _half_gradient(
    x, t, g, a_factor, b_factor, a_inverse, a_class, b_class, shift, row, column,
    ta_factor, tb_factor, teacher_row, teacher_column, losses,
    start, end, num_columns, diagonal, num_rows, column_stride, gain, tile_row, part,
    BM: tl.constexpr, BN: tl.constexpr,
    IDS: tl.constexpr, COLUMNS: tl.constexpr, INVERSE: tl.constexpr, TEACHER: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    top, left_edge = start + tile_row * BM, part * BN
    i, j = top + tl.arange(0, BM), left_edge + tl.arange(0, BN)
    x *= tl.load(a_factor + i, mask=i < end, other=0.0)[:, None]
    of_column = tl.load(b_factor + j, mask=j < num_columns, other=0.0)[None, :]  # the inverse norm
    x *= of_column
    if TEACHER:
        t *= tl.load(ta_factor + i, mask=i < end, other=0.0)[:, None]
        t *= tl.load(tb_factor + j, mask=j < num_columns, other=0.0)[None, :]
        target = _probabilities(
            t, shift, teacher_row, teacher_column, teacher_row + num_rows, teacher_column + column_stride,
            i, j, end, num_columns, COLUMNS, False,
        )  # fmt: skip
        t = tl.where((i < end)[:, None] & (j < num_columns)[None, :], target * (t - x), 0.0)
        # Left to be added by the host: summing the rows here too makes Triton 3.6 fail on sm_100.
        tl.store(losses + tl.arange(0, BM), tl.sum(t, 1) * LN2)
    left, right = _keys(a_class, b_class, i, j, end, num_columns, diagonal, IDS)
    p = _probabilities(
        x, shift, row, column, row + num_rows, column + column_stride, i, j, end, num_columns, COLUMNS, FIXED
    )
    if _has_positives(left, right, top, left_edge, diagonal, BM, BN, IDS):
        q = -tl.load(row + 4 * num_rows + i, mask=i < end, other=0.0)[:, None]
        if COLUMNS:
            q -= tl.load(column + 4 * column_stride + j, mask=j < num_columns, other=0.0)[None, :]
        if IDS:  # without, all positives are single
            factor = tl.load(row + 2 * num_rows + i, mask=i < end, other=0.0)[:, None]
            mean = tl.load(row + 3 * num_rows + i, mask=i < end, other=0.0)[:, None]
            maximum = tl.load(row + i, mask=i < end, other=0.0)[:, None]
            q += (tl.exp2(x - maximum) - mean) * factor
            if COLUMNS:
                factor = tl.load(column + 2 * column_stride + j, mask=j < num_columns, other=0.0)[None, :]
                mean = tl.load(column + 3 * column_stride + j, mask=j < num_columns, other=0.0)[None, :]
                maximum = tl.load(column + j, mask=j < num_columns, other=0.0)[None, :]
                q += (tl.exp2(x - maximum) - mean) * factor
        p = tl.where(left[:, None] == right[None, :], q, p)
    if TEACHER:
        p -= target
    if INVERSE:
        p *= tl.load(a_inverse + i, mask=i < end, other=0.0)[:, None] * gain
        p *= of_column
    else:
        p *= gain
    g.store([tile_row * BM, left_edge], p.to(g.dtype))


@triton.jit
def _gradient_tile(
    tile, a, b, g, a_factor, b_factor, a_inverse, a_class, b_class, shift, row, column, ta, tb, ta_factor, tb_factor,
    teacher_row, teacher_column, losses, start, end, num_columns, depth, teacher_depth, diagonal, num_rows,
    column_stride, gain, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    IDS: tl.constexpr, COLUMNS: tl.constexpr, INVERSE: tl.constexpr, TEACHER: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(end - start, BM)
    tile_row, tile_column = tile % tiles, tile // tiles
    top, left_edge = start + tile_row * BM, tile_column * BN
    x = _product(a, b, top, left_edge, depth, BM, BN, BK, PRECISION)
    if TEACHER:  # two accumulators: the tile is half as wide to begin with
        t = _product(ta, tb, top, left_edge, teacher_depth, BM, BN, BK, PRECISION)
        _half_gradient(
            x, t, g, a_factor, b_factor, a_inverse, a_class, b_class, shift, row, column, ta_factor, tb_factor,
            teacher_row, teacher_column, losses + tile.to(tl.int64) * BM, start, end, num_columns, diagonal, num_rows,
            column_stride, gain, tile_row, tile_column, BM, BN, IDS, COLUMNS, INVERSE, TEACHER, FIXED,
        )  # fmt: skip
    else:
        x, y = _halves(x, BM, BN)
        _half_gradient(
            x, x, g, a_factor, b_factor, a_inverse, a_class, b_class, shift, row, column, ta_factor, tb_factor,
            teacher_row, teacher_column, losses, start, end, num_columns, diagonal, num_rows, column_stride, gain,
            tile_row, 2 * tile_column, BM, BN // 2, IDS, COLUMNS, INVERSE, TEACHER, FIXED,
        )  # fmt: skip
        _half_gradient(
            y, y, g, a_factor, b_factor, a_inverse, a_class, b_class, shift, row, column, ta_factor, tb_factor,
            teacher_row, teacher_column, losses, start, end, num_columns, diagonal, num_rows, column_stride, gain,
            tile_row, 2 * tile_column + 1, BM, BN // 2, IDS, COLUMNS, INVERSE, TEACHER, FIXED,
        )  # fmt: skip


@jit_for_any_size(
    "start end num_columns depth teacher_depth diagonal num_rows column_stride gain",
    "a_factor b_factor a_inverse a_class b_class shift row column ta_factor tb_factor teacher_row teacher_column",
)
def gradient_kernel(
    a, b, g,  # descriptors [N, D], [M, D], [chunk, M]
    a_factor, b_factor, a_inverse, a_class, b_class, shift,
    row, column,  # [5, N], [5, M]
    ta, tb, ta_factor, tb_factor, teacher_row, teacher_column, losses,  # the teacher's; [tiles, BM]
    start, end, num_columns, depth, teacher_depth, diagonal, num_rows, column_stride, gain,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    IDS: tl.constexpr, COLUMNS: tl.constexpr, INVERSE: tl.constexpr, TEACHER: tl.constexpr, FIXED: tl.constexpr,
    LOOP: tl.constexpr,
):  # fmt: skip
    """P2: a tile of G = dL/dS, times both inverse norms (INVERSE), times gain; FIXED, LOOP as in `sums_kernel`.

    With a teacher also its share of the loss, and maxima are taken from the factors whichever way they were found.
    """
    if not TEACHER and (tl.load(shift + 1) > 0) != FIXED:
        return
    if not LOOP:
        _gradient_tile(
            tl.program_id(0), a, b, g, a_factor, b_factor, a_inverse, a_class, b_class, shift, row, column, ta, tb,
            ta_factor, tb_factor, teacher_row, teacher_column, losses, start, end, num_columns, depth, teacher_depth,
            diagonal, num_rows, column_stride, gain, BM, BN, BK, PRECISION, IDS, COLUMNS, INVERSE, TEACHER, FIXED,
        )  # fmt: skip
    else:
        total = tl.cdiv(end - start, BM) * tl.cdiv(num_columns, BN)
        for tile in tl.range(tl.program_id(0), total, tl.num_programs(0)):
            _gradient_tile(
                tile, a, b, g, a_factor, b_factor, a_inverse, a_class, b_class, shift, row, column, ta, tb, ta_factor,
                tb_factor, teacher_row, teacher_column, losses, start, end, num_columns, depth, teacher_depth,
                diagonal, num_rows, column_stride, gain, BM, BN, BK, PRECISION, IDS, COLUMNS, INVERSE, TEACHER, FIXED,
            )  # fmt: skip


@jit_for_any_size(
    "start end num_columns diagonal num_rows column_stride",
    "a_inverse b_inverse shift row column",
)
def convert_kernel(
    e,  # descriptor [chunk, M], read and overwritten
    a_inverse, b_inverse, shift, row, column,
    start, end, num_columns, diagonal, num_rows, column_stride,
    BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """The exponentials that P1 stored become G, in place, if they were formed with the fixed maximum."""
    if tl.load(shift + 1) == 0:
        return
    tiles = tl.cdiv(end - start, BM)
    tile_row, tile_column = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i, j = start + tile_row * BM + tl.arange(0, BM), tile_column * BN + tl.arange(0, BN)
    p = e.load([tile_row * BM, tile_column * BN]).to(tl.float32)
    factor = tl.load(row + num_rows + i, mask=i < end, other=0.0)[:, None]
    subtract = tl.load(row + 4 * num_rows + i, mask=i < end, other=0.0)[:, None]
    if COLUMNS:
        factor += tl.load(column + column_stride + j, mask=j < num_columns, other=0.0)[None, :]
        subtract += tl.load(column + 4 * column_stride + j, mask=j < num_columns, other=0.0)[None, :]
    p = tl.where((i + diagonal)[:, None] == j[None, :], -subtract, p * factor)
    if INVERSE:
        p *= tl.load(a_inverse + i, mask=i < end, other=0.0)[:, None]
        p *= tl.load(b_inverse + j, mask=j < num_columns, other=0.0)[None, :]
    e.store([tile_row * BM, tile_column * BN], p.to(e.dtype))


@triton.jit
def _half_sigmoid(
    x, g, a_factor, b_factor, a_inverse, a_class, b_class, bias, losses, bias_gradients,
    start, end, num_columns, diagonal, gain, tile_row, part, share, BM: tl.constexpr, BN: tl.constexpr,
    IDS: tl.constexpr, INVERSE: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    top, left_edge = start + tile_row * BM, part * BN
    i, j = top + tl.arange(0, BM), left_edge + tl.arange(0, BN)
    x *= tl.load(a_factor + i, mask=i < end, other=0.0)[:, None]
    of_column = tl.load(b_factor + j, mask=j < num_columns, other=0.0)[None, :]  # the inverse norm
    x = x * of_column + tl.load(bias)
    left, right = _keys(a_class, b_class, i, j, end, num_columns, diagonal, IDS)
    has_positives = _has_positives(left, right, top, left_edge, diagonal, BM, BN, IDS)
    if has_positives:
        x = tl.where(left[:, None] == right[None, :], -x, x)
    inside = (i < end)[:, None] & (j < num_columns)[None, :]
    # -log σ(-x) = max(x, 0) + log(1 + y), y = exp(-|x|); the series keeps small y from rounding away in 1 + y.
    y = tl.exp2(-tl.abs(x) * LOG2E)
    term = tl.maximum(x, 0.0) + tl.where(y < 0.01, y * (1.0 - y * (0.5 - y * 0.33333334)), tl.log(1.0 + y))
    tl.store(losses + share, tl.sum(tl.sum(tl.where(inside, term, 0.0), 1), 0))
    if GRADIENT:
        p = tl.where(x >= 0, 1.0, y) / (1.0 + y)
        if has_positives:
            p = tl.where(left[:, None] == right[None, :], -p, p)
        tl.store(bias_gradients + share, tl.sum(tl.sum(tl.where(inside, p, 0.0), 1), 0))
        if INVERSE:
            p *= tl.load(a_inverse + i, mask=i < end, other=0.0)[:, None] * gain
            p *= of_column
        else:
            p *= gain
        g.store([tile_row * BM, left_edge], p.to(g.dtype))


@jit_for_any_size(
    "start end num_columns depth diagonal gain",
    "a_factor b_factor a_inverse a_class b_class bias losses bias_gradients",
)
def sigmoid_kernel(
    a, b, g,  # descriptors [N, D], [M, D], [chunk, M]
    a_factor, b_factor, a_inverse, a_class, b_class, bias,
    losses, bias_gradients,  # [half tiles]
    start, end, num_columns, depth, diagonal, gain,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    IDS: tl.constexpr, INVERSE: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """SigLIP in one pass: a tile's share of the loss and of dbias, and its G."""
    tiles = tl.cdiv(end - start, BM)
    tile = tl.program_id(0)
    tile_row, tile_column = tile % tiles, tile // tiles
    x = _product(a, b, start + tile_row * BM, tile_column * BN, depth, BM, BN, BK, PRECISION)
    x, y = _halves(x, BM, BN)
    _half_sigmoid(
        x, g, a_factor, b_factor, a_inverse, a_class, b_class, bias, losses, bias_gradients, start, end,
        num_columns, diagonal, gain, tile_row, 2 * tile_column, 2 * tile, BM, BN // 2, IDS, INVERSE, GRADIENT,
    )  # fmt: skip
    _half_sigmoid(
        y, g, a_factor, b_factor, a_inverse, a_class, b_class, bias, losses, bias_gradients, start, end,
        num_columns, diagonal, gain, tile_row, 2 * tile_column + 1, 2 * tile + 1, BM, BN // 2, IDS, INVERSE, GRADIENT,
    )  # fmt: skip


@jit_for_any_size(
    "num_rows depth stride",
    "after square alpha out along",
)
def finish_kernel(
    raw, x, after, square, alpha, out, along,  # [R, D] float32, [R, D]; [R], [R], [1]; [R, D], [R]
    num_rows, depth, stride, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out = alpha · after · (raw - x · square · ⟨x, raw⟩) and along = ⟨x, raw⟩: back through the normalisation."""
    stride = tl.multiple_of(stride, 16)
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (i < num_rows)[:, None]
    dots = tl.zeros((ROWS, DEPTH), tl.float32)
    for k in tl.range(0, depth, DEPTH):
        at = k + tl.arange(0, DEPTH)
        mask = inside & (at < depth)[None, :]
        gradient = tl.load(raw + i[:, None] * stride + at[None, :], mask=mask, other=0.0)
        value = tl.load(x + i[:, None] * stride + at[None, :], mask=mask, other=0.0).to(tl.float32)
        dots += gradient * value
    dot = tl.sum(dots, 1)
    tl.store(along + i, dot, mask=i < num_rows)
    factor = tl.load(alpha)
    if NORMALIZE:
        part = dot * tl.load(square + i, mask=i < num_rows, other=0.0)
        factor = factor * tl.load(after + i, mask=i < num_rows, other=0.0)[:, None]
    for k in tl.range(0, depth, DEPTH):
        at = k + tl.arange(0, DEPTH)
        mask = inside & (at < depth)[None, :]
        gradient = tl.load(raw + i[:, None] * stride + at[None, :], mask=mask, other=0.0)
        if NORMALIZE:
            value = tl.load(x + i[:, None] * stride + at[None, :], mask=mask, other=0.0).to(tl.float32)
            gradient -= value * part[:, None]
        tl.store(out + i[:, None] * depth + at[None, :], (gradient * factor).to(out.dtype.element_ty), mask=mask)
