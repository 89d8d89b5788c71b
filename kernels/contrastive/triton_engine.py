"""Triton engine of the contrastive losses (see `operator`).

The loss walks over chunks of rows of A. With T = 2·N·M·D floating-point operations, forward and backward take

* P1 (1T), `sums_kernel`: a tile of S = scale · â·b̂ᵀ and, from one exponential, its share of the row and column sums;
* P2 (1T), `gradient_kernel`: the tile again, turned into G = dL/dS (without the loss's common factor) and stored;
* P3, P4 (2T): dA_chunk = G·B and dB += Gᵀ·A, plain products with float32 accumulation, left to torch.

4T and 2·chunk·M bytes. Where exponentials are kept (`Contrast.keep_exponentials`) P1 stores them and P2 forms only the
few tiles again that are not plain: 3T and 2·N·M bytes.

A tile is *plain* where it lies inside the matrix, has no positive, and the fixed maximum holds. It then takes a form
without a mask, chosen once a tile: nearly all of them do.

Exponentials. With |logit| ≤ bound, e = 2^(x - bound·log2(e) + bias) with the largest bias that keeps sums finite serves
rows and columns alike, in float32, as long as the best logit of every row and column stays representable. A lower bound
of those best logits comes from pairing row i with column i (mod M), which costs O(N·D); each tile decides from it
between this fixed maximum and maxima of its own, with two exponentials. The host never waits for the answer.

Row norms enter S, G and the gradients as factors in float32, so embeddings are never rounded after a normalisation. In
float16 G is scaled by 4096 and the products P3 and P4 take unit rows instead: G times two inverse norms would leave
float16's range. float32 products are three TF32 ones (tf32x3), which Triton begins anew every 32 columns of depth and
adds up in float32: matrix instructions accumulate with fewer bits.

Partial sums go to one slot a tile and are added in float64 in a fixed order, and nothing depends on how much memory is
free: results are bit-identical from run to run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastclap.kernels.contrastive.shared import (
    Contrast,
    Gradients,
    Ids,
    LabelSmoothing,
    Need,
    QueueRows,
    Ranks,
    Results,
    Teacher,
)
from fastclap.kernels.contrastive.triton_kernels import (
    best_kernel,
    combine_kernel,
    finish_kernel,
    gradient_kernel,
    rows_kernel,
    sigmoid_kernel,
    sums_kernel,
    total_kernel,
    upstream_kernel,
)
from fastclap.kernels.contrastive.triton_operands import (
    ROWS,
    TILES,
    Block,
    Blocks,
    Launch,
    Operands,
    PositiveKeys,
    Second,
    aligned_matrix,
    on_device,
    taken,
)
from fastclap.kernels.offline import Compilation, compile_together, signature_and_attrs
from fastclap.kernels.triton_tools import TYPE_NAMES, launch

KEPT_BYTES = 256 << 20  # of exponentials that are kept without being asked
FINISHED = {"ROWS": 4, "DEPTH": 256}  # of `finish_kernel`
COMBINED = {"TILES": 32, "WIDTH": 32}  # of `combine_kernel`
TOTAL, UPSTREAM = {"BLOCK": 1024}, {"BLOCK": 2048}


def _multiply(left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor:
    """left @ right with float32 accumulation and result, added to `total` if there is one."""
    if left.dtype == torch.float32 or left.device.type != "cuda":
        left, right = left.float(), right.float()
        return left @ right if total is None else total.addmm_(left, right)
    if total is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _guide(teacher: Teacher, contrast: Contrast, blocks: Blocks) -> Second:
    """The teacher as a guide, with thresholds for its cosines."""
    o, margin = blocks.operands, float(contrast.guide_margin or 0.0)
    operands = Operands(teacher[0], teacher[1], 1.0, True, o.ranks, o.dtype)
    row, column = (
        best[1] * (1.0 - margin) if contrast.guide_relative else best[1] - margin
        for best in _best(operands, operands.a_inverse, blocks)
    )
    return Second(operands, blocks.launch, operands.a_inverse, row, column)


def _best(operands: Operands, factor: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """[2, N] and [2, M]: the largest entry of each row, and column, and the largest of its positives."""
    ranks, keys, launch, device = operands.ranks, blocks.keys, blocks.launch, operands.device
    num_rows, num_columns = operands.a.shape[0], ranks.num_columns
    rows, columns = (torch.full((2, n), -math.inf, device=device) for n in (num_rows, num_columns))
    a, b, _ = launch.operands(operands.a, operands.b)
    for at in launch.chunks(num_rows):
        launch(
            best_kernel, launch.tiles(at.stop - at.start, num_columns),
            a, b, factor, operands.b_inverse, keys.a_key, keys.b_key, rows, columns,
            at.start, at.stop, num_columns, operands.depth, keys.diagonal, keys.ids, num_rows,
        )  # fmt: skip
    return rows, ranks.all_reduce(columns, maximum=True)


def _top1(blocks: Blocks) -> Tensor:
    """Share of the rows (and columns) whose best match is one of their positives, [2] float32."""
    keys, ranks = blocks.keys, blocks.operands.ranks
    rows, columns = _best(blocks.operands, blocks.operands.a_factor, blocks)
    numbers = keys.numbers if keys.ids else (keys.number, keys.number)
    of_rows = ranks.all_reduce((rows[1] >= rows[0]).sum(dtype=torch.float64)) / numbers[0]
    of_columns = (columns[1] >= columns[0]).sum(dtype=torch.float64) / (numbers[1] if blocks.two_sided else math.nan)
    return torch.stack([of_rows, of_columns]).float()


class TiledSoftmax:
    """P1: sums of exponentials over all rows of a rank and all columns, and what P2 and the loss take from them.

    Attributes:
        row, column: float32 [6, N], [6, M] of `combine_kernel`.
        terms: float64 [2, blocks of rows and then of columns], of the loss and of dscale.
        kept: [N, M], the exponentials of plain tiles; None: they are not kept.
    """

    def __init__(
        self,
        blocks: Blocks,
        hard: float,
        debias: float = 0.0,
        kept: Tensor | None = None,
        guide: Second | None = None,
    ) -> None:
        self.blocks, self.hard, self.debias, self.kept, self.guide = blocks, hard, debias, kept, guide
        self.operands, launch, ranks = blocks.operands, blocks.launch, blocks.operands.ranks
        ranks.all_reduce(self.operands.bounds, maximum=True)
        self.num_rows, self.num_columns = self.operands.a.shape[0], ranks.num_columns
        width, device = COMBINED["WIDTH"], self.operands.device
        self.row_blocks, column_blocks = -(-self.num_rows // width), -(-self.num_columns // width)
        self.row = torch.empty(6, self.num_rows, device=device)
        self.column = aligned_matrix(6, self.num_columns, torch.float32, device)
        self.terms = torch.empty(
            2, self.row_blocks + column_blocks * blocks.two_sided, dtype=torch.float64, device=device
        )
        whole = ranks.group is None and not blocks.queue_rows + blocks.queue_columns  # complete with the last tile
        self._row_state = self._column_state = self.terms
        if not whole or self.num_rows > launch.chunk:
            self._row_state = torch.empty(4, self.num_rows, dtype=torch.float64, device=device)
            self._column_state = torch.empty(4, self.num_columns, dtype=torch.float64, device=device)
        for at in launch.chunks(self.num_rows):
            for index, block in enumerate(self._parts(at)):
                fresh, done = (index == 0, at.start == 0), (whole, whole and at.stop == self.num_rows)
                self._add(block, at, fresh, done)
            if blocks.queue_columns:
                self._add(blocks.beside, at)
        if blocks.queue_rows and blocks.two_sided:
            for at in launch.chunks(blocks.below.rows.shape[0]):
                self._add(blocks.below, at, below=True)
        if not whole:
            self._reduce()

    def _parts(self, at: slice) -> Iterator[Block]:
        """Blocks that make up the rows `at`. Only the first chunk can overlap with the other ranks' rows' arrival."""
        ranks, own = self.operands.ranks, self.operands.ranks.own_columns
        if ranks.group is None or at.start > 0 or self.kept is not None or self.guide is not None:
            yield self.blocks.all
            return
        yield self.blocks.part(None)
        for part in (slice(0, own.start), slice(own.stop, self.num_columns)):
            if part.stop > part.start:
                yield self.blocks.part(part)

    def _add(
        self,
        block: Block,
        at: slice,
        fresh: tuple[bool, bool] = (False, False),
        done: tuple[bool, bool] = (False, False),
        below: bool = False,
    ) -> None:
        """Rows `at` of a block. `fresh`, `done`: whether rows, and columns, have no sums yet, and will have no more."""
        launch, operands, guide, device = self.blocks.launch, self.operands, self.guide, self.operands.device
        rows, columns, in_matrix = at.stop - at.start, block.num_columns, block.first is not None
        tiles, two_sided = launch.tiles(rows, columns), self.blocks.two_sided and in_matrix
        row_parts = torch.empty(4, 2 * tiles[1], rows, device=device)
        column_parts = torch.empty(3, tiles[0], columns, device=device) if two_sided else row_parts
        special = torch.empty(tiles, dtype=torch.int8, device=device)
        kept = self.kept if in_matrix else None
        second = block.no_second if guide is None else guide.arguments
        launch(
            sums_kernel, tiles, *block.described, launch.halves(block.rows if kept is None else taken(kept, at)),
            *block.factors, *block.keys, operands.bounds, operands.scale, *second, row_parts, column_parts, special,
            at.start, at.stop, columns, operands.depth, guide.depth if guide else 0, block.diagonal,
            self.blocks.keys.ids, int(kept is not None), operands.bias, COLUMNS=two_sided, GUIDE=guide is not None,
        )  # fmt: skip
        first_row = operands.ranks.own_columns.start + at.start if below else at.start
        part = (first_row, rows, 2 * tiles[1], block.first or 0, columns, tiles[0])
        self._combine((row_parts, column_parts, special), part, two_sided, fresh, done, in_matrix, below)

    def _combine(
        self,
        parts: tuple[Tensor, Tensor, Tensor],
        part: tuple[int, ...],
        with_columns: bool,
        fresh: tuple[bool, bool] = (False, False),
        done: tuple[bool, bool] = (True, True),
        positives: bool = True,
        below: bool = False,
    ) -> None:
        """`part`: the first row, how many, in how many parts; the same of columns. below: these rows are columns."""
        blocks, o, keys, tile = self.blocks, self.operands, self.blocks.keys, self.blocks.launch.tile
        width = COMBINED["WIDTH"]
        launch(
            combine_kernel, -(-part[1] // width) + (-(-part[4] // width) if with_columns else 0), None,
            *parts, self._column_state if below else self._row_state, self._column_state, o.bounds, o.scale,
            keys.row_count, keys.column_count, keys.siblings, keys.numbers, keys.row_queue, keys.column_queue,
            self.row, self.column, self.terms, *part, self.num_columns if below else self.num_rows, self.num_columns,
            self.column.stride(0), o.ranks.num_rows, self.terms.shape[1], keys.diagonal, keys.ids,
            int(blocks.two_sided), int(positives), *map(int, fresh), *map(int, done),
            self.hard, self.debias, blocks.queue_rows, blocks.queue_columns, o.bias, tile.rows, tile.columns,
            **COMBINED,
        )  # fmt: skip

    def _reduce(self) -> None:
        """Adds the columns' sums of all ranks, and turns all sums into factors."""
        ranks, state, nothing = self.operands.ranks, self._column_state, self.row
        if self.blocks.two_sided and ranks.group is not None:
            maximum = ranks.all_reduce(state[0].clone(), maximum=True)
            state[1:] *= torch.exp2(state[0] - maximum)
            state[0] = maximum
            ranks.all_reduce(state[1:])
        part = (0, self.num_rows, 0, 0, self.num_columns, 0)
        self._combine((nothing, nothing, nothing.view(torch.int8)), part, self.blocks.two_sided)

    def write_gradient(
        self, block: Block, at: slice, g: Tensor, row: Tensor, teacher: Second | None = None
    ) -> Tensor | None:
        """P2 of rows `at` of a block into g. Returns the teacher's share of the loss, [half tiles].

        `row`: factors of all rows of the block.
        """
        launch, operands, second = self.blocks.launch, self.operands, self.guide or teacher
        columns, in_matrix = block.num_columns, block.first is not None
        tiles = launch.tiles(at.stop - at.start, columns)
        losses = row if teacher is None else torch.empty(2 * tiles[0] * tiles[1], device=g.device)
        arguments = block.no_second if second is None else second.arguments
        launch(
            gradient_kernel, tiles, *block.described, launch.halves(g), *block.factors, *block.out, *block.keys,
            operands.bounds, operands.scale, row, self.column, *arguments, losses,
            at.start, at.stop, columns, operands.depth, second.depth if second else 0, block.diagonal,
            self.blocks.keys.ids, int(self.kept is not None and in_matrix), row.stride(0), self.column.stride(0),
            float(in_matrix), second.weight if second else 0.0, operands.gain, operands.bias,
            COLUMNS=self.blocks.two_sided and in_matrix, TEACHER=teacher is not None, GUIDE=self.guide is not None,
        )  # fmt: skip
        return None if teacher is None else losses


class EmbeddingGradients:
    """P2 to P4, and the way back through the normalisation."""

    def __init__(self, blocks: Blocks, need: Need, unit: float, rows: int | None = None) -> None:
        """The loss is `unit` times a mean over so many rows (None: those that have a positive)."""
        operands, keys = blocks.operands, blocks.keys
        self.operands, self.launch, self.keys, self.need, self.unit = operands, blocks.launch, keys, need, unit
        self._ids, self._number = (keys.ids, keys.number) if rows is None else (0, float(rows))
        self.by_rows = need.a or (need.scale and not need.b)  # one of the two products also gives dscale
        self.a_rows, self.b_rows, own = operands.a, operands.b, operands.ranks.own_columns
        if operands.unit:
            self.a_rows = (operands.a * operands.a_inverse[:, None]).to(torch.float16)
            self.b_rows = (operands.b * operands.b_inverse[:, None]).to(torch.float16)
        # bfloat16 gradients keep their dtype; float16 ones would underflow before a loss scale reaches them.
        self._dtype = dtype = torch.bfloat16 if operands.dtype == torch.bfloat16 else torch.float32
        shapes = ((operands.a.shape[0], operands.depth), (own.stop - own.start, operands.depth))
        self.a, self.b = (
            torch.empty(shape, dtype=dtype, device=operands.device) if wanted else None
            for shape, wanted in zip(shapes, need, strict=False)
        )
        self._blocks = tuple(-(-rows // FINISHED["ROWS"]) for rows, _ in shapes)
        self.along = torch.empty(sum(self._blocks), dtype=torch.float64, device=operands.device)
        self.along_queue: list[Tensor] = []  # what the queue adds to dscale and `along` has not
        self._raw_b: Tensor | None = None

    @property
    def blocks_of_scale(self) -> tuple[int, int]:
        """Of `along`, those whose sum is dscale."""
        return (0, self._blocks[0]) if self.by_rows else (self._blocks[0], sum(self._blocks))

    def add(
        self,
        at: slice,
        g: Tensor,
        correction: Tensor | None = None,
        raw: Tensor | None = None,
        last: bool = False,
    ) -> None:
        """Adds a chunk of G; `raw` [c, D] belongs to its G·B, `correction` likewise, for unit rows.

        `last`: nothing else will be added to Gᵀ·A, so that its way back can begin along with the rows'.
        """
        a, with_b = taken(self.a_rows, at), last and self.need.b
        if self.need.b:
            self._raw_b = _multiply(g.t(), a, self._raw_b)
        if self.by_rows:
            raw = _multiply(g, self.b_rows, raw)
            if correction is not None:
                raw += self._corrected(correction, self.operands.a_inverse[at])
            self._through_norms(at, a, raw, with_b)
        elif with_b:
            self._through_norms(slice(0, 0), a, None, True)

    def _corrected(self, correction: Tensor, inverse: Tensor) -> Tensor:
        return correction * (self.operands.gain if self.operands.unit else self.operands.gain * inverse[:, None])

    def _through_norms(self, at: slice, a: Tensor, raw_a: Tensor | None, with_b: bool) -> None:
        """Rows `at` of A, which are `a`, and all of B."""
        o, keys, own = self.operands, self.keys, self.operands.ranks.own_columns
        raw_b, b = self._raw_b if with_b else None, taken(self.b_rows, own)
        rows = 0 if raw_a is None else raw_a.shape[0], 0 if raw_b is None else raw_b.shape[0]
        blocks = [-(-n // FINISHED["ROWS"]) for n in rows]
        da, db = None if self.a is None else taken(self.a, at), self.b
        # What stands for what is absent.
        raw, unwritten = raw_a if raw_a is not None else raw_b, da if da is not None else db
        if unwritten is None:
            unwritten = torch.empty(1, dtype=self._dtype, device=o.device)
        first = at.start // FINISHED["ROWS"] if raw_a is not None else self._blocks[0]
        launch(
            finish_kernel, sum(blocks), o.dtype,
            raw if raw_a is None else raw_a, raw if raw_b is None else raw_b, a, b, taken(o.a_inverse, at),
            taken(o.b_inverse, own), o.scale, keys.numbers, unwritten if da is None else da,
            unwritten if db is None else db, self.along, *rows, o.depth, a.stride(0), b.stride(0), first,
            self.unit * o.ranks.size, float(o.normalize), int(o.unit), o.gain, self._number, self._ids,
            int(self.need.a), int(self.need.b), **FINISHED,
        )  # fmt: skip

    def finish_columns(self, correction: Tensor | None = None, below: Tensor | None = None) -> None:
        """B's way back; `below` [own rows, D] is what the queue's entries add to Gᵀ·A of this rank's columns."""
        raw, ranks = self._raw_b, self.operands.ranks
        assert raw is not None
        if correction is not None:
            raw += self._corrected(correction, self.operands.b_inverse)
        raw = ranks.scatter_sum(raw, ranks.b_rows)
        self._raw_b = raw if below is None else raw + below
        self._through_norms(slice(0, 0), self.a_rows, None, True)

    def beside(self, softmax: TiledSoftmax, at: slice) -> Tensor | None:
        """G·B of rows `at` and the queue's entries of B."""
        if not (self.by_rows or self.need.scale):
            return None
        raw = self._of_queue(softmax, softmax.blocks.beside, at, softmax.row)
        if not self.by_rows:
            self._add_along(raw, self.a_rows[at])
        return raw

    def below(self, softmax: TiledSoftmax) -> Tensor | None:
        """Gᵀ·A of this rank's columns and the queue's entries of A."""
        if not (self.need.b or self.need.scale):
            return None
        block, own = softmax.blocks.below, self.operands.ranks.own_columns
        factors = softmax.column[:, own]
        raw = torch.cat([self._of_queue(softmax, block, at, factors) for at in self.launch.chunks(len(block.rows))])
        if self.by_rows:
            self._add_along(raw, self.b_rows[own])
        return raw

    def _of_queue(self, softmax: TiledSoftmax, block: Block, at: slice, factors: Tensor) -> Tensor:
        entries = block.columns
        if self.operands.unit:
            entries = (entries * block.factors[1][:, None]).to(torch.float16)
        g = aligned_matrix(at.stop - at.start, len(entries), entries.dtype, entries.device)
        softmax.write_gradient(block, at, g, factors)
        return _multiply(g, entries)

    def _add_along(self, raw: Tensor, x: Tensor) -> None:
        if self.need.scale:
            self.along_queue.append((raw * x).sum(dtype=torch.float64) / self.operands.gain)


def keeps_exponentials(contrast: Contrast, dtype: torch.dtype, num_bytes: int) -> bool:
    """Whether P1 keeps its exponentials: as asked for, else up to `KEPT_BYTES`.

    float16 cannot hold them, and with a teacher or guide no tile is plain.
    """
    if dtype == torch.float16 or contrast.teacher_weight > 0 or contrast.guide_margin is not None:
        return False
    return num_bytes <= KEPT_BYTES if contrast.keep_exponentials is None else contrast.keep_exponentials


def info_nce(
    a: Tensor,  # [N, D] float16, bfloat16 or float32
    b: Tensor,  # [M, D]
    scale: Tensor,
    ids: Ids | None,  # [N], [M]
    teacher: Teacher | None,
    queue: QueueRows | None,
    contrast: Contrast,
    ranks: Ranks,
    need: Need,
    top1: bool,
) -> Results:
    """InfoNCE of the rows, with both directions also of the columns; its gradients (da, db, dscale); in-batch top-1."""
    two_sided, weight, normalize = contrast.direction == "both", contrast.teacher_weight, contrast.normalize
    dtype, num_rows, num_columns = torch.promote_types(a.dtype, b.dtype), a.shape[0], ranks.num_columns
    launch = Launch.of(a, dtype, num_columns)
    if launch.arch:
        options = two_sided, weight > 0, contrast.guide_margin is not None, any(need)
        _compile_ahead(launch.arch, dtype, launch.constants["PRECISION"], *options)
    operands = Operands(a, b, scale, normalize, ranks, dtype)
    keys = PositiveKeys(ids, queue, ranks, operands.bounds)
    blocks = Blocks(operands, keys, queue, launch, two_sided)
    kept = guide = smoothing = distilled = student = None
    if any(need) and keeps_exponentials(contrast, dtype, num_rows * num_columns * dtype.itemsize):
        kept = aligned_matrix(num_rows, num_columns, dtype, a.device)
    if teacher is not None and contrast.guide_margin is not None:
        guide = _guide(teacher, contrast, blocks)
    hard, smooth = (1 - weight) * (1 - contrast.label_smoothing), (1 - weight) * contrast.label_smoothing
    softmax = TiledSoftmax(blocks, hard, contrast.debias, kept, guide)
    if smooth:
        a_hat, b_hat = a.detach().float(), operands.b.float()
        if normalize:
            a_hat, b_hat = a_hat * operands.a_inverse[:, None], b_hat * operands.b_inverse[:, None]
        row_weight = keys.weights(rows=True).double()
        column_weight = keys.weights(rows=False).double() * (1.0 if two_sided else 0.0)
        smoothing = LabelSmoothing(a_hat, b_hat, operands.scale.reshape(()), ranks, row_weight, column_weight, smooth)
    if teacher is not None and weight:
        other = Operands(*teacher, normalize, ranks, dtype)
        distilled = TiledSoftmax(Blocks(other, keys, None, launch, two_sided), 0.0)
        student = Second(other, launch, other.a_factor, distilled.row, distilled.column, weight)

    unit = 0.5 if two_sided else 1.0
    gradients = EmbeddingGradients(blocks, need, unit) if any(need) else None
    # What else belongs to the loss of rows, to their dscale, and to the loss of columns.
    extras: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    if gradients is not None or student is not None:
        alone = ranks.group is None and smoothing is None and queue is None
        buffer = kept
        if buffer is None:
            buffer = aligned_matrix(min(launch.chunk, num_rows), num_columns, dtype, a.device)
        for at in launch.chunks(num_rows):
            g = taken(buffer, at if kept is not None else slice(0, at.stop - at.start))
            share = softmax.write_gradient(blocks.all, at, g, softmax.row, student)
            if share is not None:
                extras[0].append(share.sum(dtype=torch.float64))
            if gradients is not None:
                raw = gradients.beside(softmax, at) if blocks.queue_columns else None
                correction = None if smoothing is None else smoothing.row_gradient(at)
                gradients.add(at, g, correction, raw, last=alone and at.stop == num_rows)
        if gradients is not None and not alone:
            below = gradients.below(softmax) if blocks.queue_rows and two_sided else None
            extras[1].extend(gradients.along_queue)
            if need.b:
                gradients.finish_columns(None if smoothing is None else smoothing.column_gradient(), below)
    if smoothing is not None:
        extras[0].append(smoothing.loss())
    if distilled is not None:
        for found, terms in zip(extras[::2], distilled.terms[0].tensor_split([distilled.row_blocks]), strict=True):
            found.append(-weight * terms.sum())
    loss, dscale = _totals(softmax, gradients, unit, extras)
    best = _top1(blocks) if top1 else None
    if gradients is None:
        return loss, (), best
    return loss, (gradients.a, gradients.b, dscale if need.scale else None), best


def _totals(
    softmax: TiledSoftmax, gradients: EmbeddingGradients | None, unit: float, extras: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor]:
    """The loss and dscale, from all parts of them."""
    keys, ranks, device, terms = softmax.blocks.keys, softmax.operands.ranks, softmax.operands.device, softmax.terms
    loss, dscale = torch.empty((), device=device), torch.empty((), dtype=torch.float64, device=device)
    along, totals, span = (terms, dscale, (0, 0)) if gradients is None else (
        gradients.along, dscale, gradients.blocks_of_scale
    )  # fmt: skip
    alone = ranks.group is None and not any(extras)
    if not alone:
        totals = torch.empty(4, dtype=torch.float64, device=device)
    arguments = (terms, along, totals, keys.numbers, loss, dscale, softmax.row_blocks, terms.shape[1], *span, unit)
    launch(total_kernel, 1, None, *arguments, keys.number, keys.ids, 1, int(alone), **TOTAL)
    if not alone:
        for total, values in zip(totals, extras, strict=False):
            for value in values:
                total += value
        ranks.all_reduce(totals[:2])
        launch(total_kernel, 1, None, *arguments, keys.number, keys.ids, 0, 1, **TOTAL)
    return loss, dscale


def sigmoid_loss(
    a: Tensor,  # [N, D] float16, bfloat16 or float32
    b: Tensor,  # [M, D]
    scale: Tensor,
    bias: Tensor,
    ids: Ids | None,  # [N], [M]
    normalize: bool,
    ranks: Ranks,
    need: Need,
) -> Results:
    """SigLIP's loss and its gradients (da, db, dscale, dbias), in one pass."""
    device, dtype = a.device, torch.promote_types(a.dtype, b.dtype)
    launch = Launch.of(a, dtype, ranks.num_columns)
    operands = Operands(a, b, scale, normalize, ranks, dtype, units=1.0)
    keys = PositiveKeys(ids, None, ranks, operands.bounds)
    blocks, num_rows, num_columns = Blocks(operands, keys, None, launch, True), a.shape[0], ranks.num_columns
    products = need.a or need.b or need.scale
    gradients = EmbeddingGradients(blocks, need, 1.0, ranks.num_rows) if products else None
    shift = on_device(bias, device)
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # the loss and dbias
    buffer = aligned_matrix(min(launch.chunk, num_rows), num_columns, dtype, device) if products else operands.a
    block = blocks.all
    for at in launch.chunks(num_rows):
        tiles, g = launch.tiles(at.stop - at.start, num_columns), taken(buffer, slice(0, at.stop - at.start))
        shares = torch.empty(2, 2 * tiles[0] * tiles[1], device=device)
        launch(
            sigmoid_kernel, tiles, *block.described, launch.halves(g), *block.factors, *block.out, *block.keys,
            shift, shares, at.start, at.stop, num_columns, operands.depth, block.diagonal, keys.ids, int(products),
            operands.gain,
        )  # fmt: skip
        totals += shares.sum(1, dtype=torch.float64)
        if gradients is not None:
            gradients.add(at, g, last=ranks.group is None and at.stop == num_rows)
    if gradients is not None and need.b and ranks.group is not None:
        gradients.finish_columns()
    factor, dscale = 1.0 / ranks.num_rows, None
    loss, dbias = ranks.all_reduce(totals) * factor
    if gradients is not None and need.scale:
        dscale = ranks.all_reduce(gradients.along[slice(*gradients.blocks_of_scale)].sum()) * factor
    if not any(need):
        return loss.float(), (), None
    da, db = (None, None) if gradients is None else (gradients.a, gradients.b)
    return loss.float(), (da, db, dscale, dbias if need.bias else None), None


def times_upstream(gradients: Sequence[Tensor | None], upstream: Tensor, dtypes: Sequence[torch.dtype]) -> Gradients:
    """Gradients of a loss (da, db, dscale), as above, times the upstream gradient, in the dtypes wanted; one launch."""
    found = [None if g is None else torch.empty_like(g, dtype=x) for g, x in zip(gradients, dtypes, strict=True)]
    (da, db, dscale), (a, b, scale) = gradients, found
    # What is absent is never read or written, but has to be something of the dtypes that there are otherwise.
    if dscale is None or scale is None:
        dscale, scale = (torch.empty((), dtype=x, device=upstream.device) for x in (torch.float64, torch.float32))
    sizes = [0 if g is None else g.numel() for g in (da, db)]
    da, a = (db, b) if da is None else (da, a)
    db, b = (da, a) if db is None else (db, b)
    da, db, a, b = (scale if x is None else x for x in (da, db, a, b))
    block = UPSTREAM["BLOCK"]
    form = (*(x.dtype for x in (da, a, b, scale, upstream)), max(sizes) >= 1 << 31)
    programs = max(1, sum(-(-size // block) for size in sizes))
    launch(upstream_kernel, programs, form, da, db, dscale, upstream, a, b, scale, *sizes, **UPSTREAM)
    return tuple(found)


@functools.cache
def _compile_ahead(
    arch: int, dtype: torch.dtype, precision: str, columns: bool, teacher: bool, guide: bool, gradients: bool
) -> None:
    """Compiles what a call of a new kind will launch all at once."""
    name, label = TYPE_NAMES[dtype], _label(dtype, precision)
    flags = " columns" * columns
    wanted = {f"rows {name}", "combine", "total", f"sums {label}{flags}{' guide' * guide}"}
    if gradients or teacher:
        wanted.add(f"gradient {label}{flags}{' teacher' * teacher}{' guide' * guide}")
    if gradients:
        out = "bf16" if dtype == torch.bfloat16 else "fp32"
        wanted |= {f"finish {name}", f"upstream {out} to {name}"}
    compile_together([c for c in compilations(arch) if c.name in wanted], arch)


def _label(dtype: torch.dtype, precision: str) -> str:
    return f"{TYPE_NAMES[dtype]} {precision}" if dtype == torch.float32 else TYPE_NAMES[dtype]


def compilations(arch: int) -> Iterator[Compilation]:
    """Every (kernel, configuration, dtype, flags) that the launchers may pick on an architecture."""
    both = (False, True)
    for dtype in TILES[90]:
        name = TYPE_NAMES[dtype]
        for precision in ("tf32x3", "tf32") if dtype == torch.float32 else ("tf32",):
            label, launch = _label(dtype, precision), Launch(arch, dtype, precision)
            constants = {**launch.constants, **launch.options}
            for columns, guide in product(both, both):
                yield _compilation("sums", sums_kernel, label, name, constants, {"COLUMNS": columns, "GUIDE": guide})
            for columns, (teacher, guide) in product(both, ((False, False), (True, False), (False, True))):
                flags = {"COLUMNS": columns, "TEACHER": teacher, "GUIDE": guide}
                yield _compilation("gradient", gradient_kernel, label, name, constants, flags)
            yield _compilation("sigmoid", sigmoid_kernel, label, name, constants, {})
            yield _compilation("best", best_kernel, label, name, constants, {})
        yield _compilation("rows", rows_kernel, name, name, ROWS, {})
        yield _compilation("finish", finish_kernel, name, name, FINISHED, {})
    yield _compilation("combine", combine_kernel, "", "fp32", COMBINED, {})
    yield _compilation("total", total_kernel, "", "fp32", TOTAL, {})
    for given, wanted in (("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "fp16"), ("fp32", "bf16")):
        yield _compilation("upstream", upstream_kernel, f"{given} to {wanted}", given, UPSTREAM, {"to": wanted})


def _compilation(
    kind: str, function: Any, label: str, dtype: str, launch: dict[str, Any], flags: dict[str, Any]
) -> Compilation:
    constants = dict(launch)
    warps, stages = constants.pop("num_warps", 4), constants.pop("num_stages", 3)  # else Triton's defaults
    maxnreg, to = constants.pop("maxnreg", None), flags.pop("to", None)
    constexprs = {**constants, **flags}
    types = dict.fromkeys(
        ("eps", "units", "bias", "hard", "debias", "target", "teacher_weight", "gain", "factor", "normalize", "number",
         "half"), "fp32"
    )  # fmt: skip
    integers = ("a_key", "b_key", "bounds", "row_count", "column_count", "siblings", "numbers", "row_queue",
                "column_queue")  # fmt: skip
    doubles = ("row_state", "column_state", "terms", "along", "totals", "scale_gradient", "dscale")
    types |= {"bias": "*fp32"} if kind == "sigmoid" else {}
    types |= dict.fromkeys(integers, "*i32") | dict.fromkeys(doubles, "*fp64") | {"special": "*i8"}
    if kind == "rows":
        types |= {"a": f"*{dtype}", "b": f"*{dtype}"} | {"normalize": "i32"}
    elif kind == "finish":
        gradient = "bf16" if dtype == "bf16" else "fp32"
        types |= {"a": f"*{dtype}", "b": f"*{dtype}", "da": f"*{gradient}", "db": f"*{gradient}"}
    elif kind == "upstream":
        types |= dict.fromkeys(("da", "db"), f"*{dtype}") | dict.fromkeys(("scaled_a", "scaled_b"), f"*{to}")
    elif "BK" in constants:
        left = f"tensordesc<{dtype}[{constants['BM']}, {constants['BK']}]>"
        right, half = (f"tensordesc<{dtype}[{constants['BN'] // n}, {constants['BK']}]>" for n in (1, 2))
        chunk = f"tensordesc<{dtype}[{constants['BM']}, {constants['BN'] // 2}]>"
        types |= {"a": left, "ta": left, "b": right, "half_b": half, "tb": half, "g": chunk, "e": chunk}
    signature, attrs = signature_and_attrs(function, types, constexprs)
    name = " ".join([kind, *label.split(), *(flag.lower() for flag, value in flags.items() if value)])
    return Compilation(name, function, signature, constexprs, attrs, warps, stages, "BK" in constants, maxnreg)
