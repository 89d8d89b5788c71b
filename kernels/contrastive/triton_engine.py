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

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastclap.kernels import dispatch
from fastclap.kernels.contrastive.shared import (
    NORM_EPS,
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
from fastclap.kernels.offline import Compilation, signature_and_attrs
from fastclap.kernels.triton_tools import LOG2E, PRECISIONS, TYPE_NAMES, for_architecture

HALF_GAIN = 4096.0  # of G in float16: the target becomes 4096, probabilities down to 1e-11 stay non-zero
KEPT_BYTES = 256 << 20  # of exponentials that are kept without being asked
LARGEST_CHUNK = 8448
LARGEST_CHUNK_BYTES = 16 << 30  # reached by a wave of rows beyond a million columns only
NOT_PAIRED = -(1 << 30)  # a diagonal on which no row meets a column
ROWS = {"ROWS": 8, "DEPTH": 256}  # of `rows_kernel`
FINISHED = {"ROWS": 4, "DEPTH": 256}  # of `finish_kernel`
COMBINED = {"TILES": 64, "WIDTH": 32}  # of `combine_kernel`
TOTAL, UPSTREAM = {"BLOCK": 1024}, {"BLOCK": 2048}


@dataclass(frozen=True)
class ProductTile:
    """One configuration of the matrix kernels.

    `registers`: the limit a thread, where it lets two programs share an SM without a spill in the main loop.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None


# By arithmetic, checked by offline compilation. On sm_90 128×128 keeps the accumulator at 64 registers a thread and two
# programs on an SM, so that one's exponentials hide behind the other's matrix products. One entry per (architecture,
# dtype); other architectures take the nearest lower one.
TILES: dict[int, dict[torch.dtype, ProductTile]] = {
    80: {
        torch.bfloat16: ProductTile(128, 128, 32, 8, 3),
        torch.float16: ProductTile(128, 128, 32, 8, 3),
        torch.float32: ProductTile(64, 64, 32, 4, 2),
    },
    90: {
        torch.bfloat16: ProductTile(128, 128, 64, 8, 3, registers=128),
        torch.float16: ProductTile(128, 128, 64, 8, 3, registers=128),
        torch.float32: ProductTile(64, 128, 32, 4, 3),
    },
    100: {
        torch.bfloat16: ProductTile(128, 128, 64, 8, 3),
        torch.float16: ProductTile(128, 128, 64, 8, 3),
        torch.float32: ProductTile(64, 64, 32, 4, 2),
    },
}
INTERPRETER_TILE = ProductTile(32, 32, 32, 4, 1)


def chunk_rows(arch: int, multiprocessors: int, depth: int, row_bytes: int = 0) -> int:
    """Rows of A at a time: G·B and Gᵀ·A then fill one wave of 128×256 tiles (8448 / 5632 / 4224 rows at D = 512 / 768 /
    1024 on 132 multiprocessors). Where rows of the matrix are so long, `row_bytes`, that a chunk would take more than
    `LARGEST_CHUNK_BYTES`, it has fewer."""
    if arch == 0:
        return 2 * INTERPRETER_TILE.rows
    wave = min(LARGEST_CHUNK, max(1024, multiprocessors * 128 * 256 // depth // 128 * 128))
    return max(128, min(wave, LARGEST_CHUNK_BYTES // max(row_bytes, 1) // 128 * 128))


def _on_device(value: float | Tensor, device: torch.device) -> Tensor:
    """A scalar as a float32 [1]; those of the host are filled in, since a copy could not be captured in a graph."""
    if isinstance(value, Tensor) and value.device == device:
        return value.detach().to(torch.float32).reshape(1)
    return torch.full((1,), float(value), dtype=torch.float32, device=device)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, D] in that dtype as descriptors need it: rows that begin at multiples of 16 bytes and are contiguous."""
    x = x.detach().to(dtype)
    step = x.stride(0) * x.element_size()
    if x.stride(1) == 1 and step % 16 == 0 and x.data_ptr() % 16 == 0 and step > 0:
        return x
    rows = _aligned_matrix(x.shape[0], x.shape[1], dtype, x.device)
    return rows.copy_(x)


def _aligned_matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix whose rows start at multiples of 16 bytes, as descriptors need."""
    return torch.empty(rows, -(-columns // 16) * 16, dtype=dtype, device=device)[:, :columns]


def _aligned(x: Tensor) -> Tensor:
    """A vector as tiles read it, in pairs."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _multiply(left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor:
    """left @ right with float32 accumulation and result, added to `total` if there is one."""
    if left.dtype == torch.float32 or left.device.type != "cuda":
        left, right = left.float(), right.float()
        return left @ right if total is None else total.addmm_(left, right)
    if total is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


class PositiveKeys:
    """Which pairs are positives, on the device: keys to compare and counts to weight by. Nothing waits for the host.

    Without ids row i's positive is column i + diagonal and there are no tensors at all.

    Attributes:
        a_key, b_key: int32 [N], [M], classes that are equal where ids are.
        row_count, column_count: int32 [N], [M], positives of each.
        siblings: int32 [N], rows with the row's id.
        numbers: int32 [2], rows and columns with a positive; `number`: without ids, where the two are equal.
        queue_a_key, queue_b_key: int32 [Qa], [Qb], classes of the queue's entries.
        row_queue, column_queue: int32 [N], [M], entries of the other side with the id of a row, or column.
    """

    def __init__(self, ids: Ids | None, queue: QueueRows | None, ranks: Ranks, unused: Tensor) -> None:
        self.ids, self.diagonal = int(ids is not None), ranks.own_rows.start
        self.number = float(min(ranks.num_rows, ranks.num_columns))
        self.a_key = self.b_key = self.row_count = self.column_count = self.siblings = self.numbers = unused
        self.queue_a_key = self.queue_b_key = self.row_queue = self.column_queue = unused
        self.ranks = ranks
        if ids is None:
            return
        parts = [ranks.gather(ids[0].to(unused.device, torch.int64, non_blocking=True), ranks.a_rows)]
        parts.append(ranks.gather(ids[1].to(unused.device, torch.int64, non_blocking=True), ranks.b_rows))
        if queue is not None and queue.a_ids is not None and queue.b_ids is not None:
            parts += [x.to(unused.device, torch.int64) for x in (queue.a_ids, queue.b_ids)]
        values, order = torch.cat(parts).sort()
        steps = torch.zeros_like(values)
        torch.cumsum(values[1:] != values[:-1], 0, out=steps[1:])
        classes = torch.empty_like(steps).scatter_(0, order, steps).split([len(part) for part in parts])

        def count(among: Tensor, of: Tensor) -> Tensor:
            found = torch.zeros(len(values), dtype=torch.int32, device=unused.device)
            return found.scatter_add_(0, among, torch.ones_like(among, dtype=torch.int32))[of]

        a, b = classes[:2]
        own = ranks.own_rows
        row_count, self.column_count = count(b, a), count(a, b)
        self.row_count, self.siblings = row_count[own], count(a, a[own])
        self.numbers = torch.stack([(x > 0).sum() for x in (row_count, self.column_count)]).int()
        self.a_key, self.b_key = a[own].int(), b.int()
        if len(classes) == 4:
            self.queue_a_key, self.queue_b_key = classes[2].int(), classes[3].int()
            self.row_queue, self.column_queue = count(classes[3], a[own]), count(classes[2], b)

    def numbers_of_positives(self) -> tuple[Tensor | float, Tensor | float]:
        """Rows and columns, of all ranks, that have a positive."""
        return (self.numbers[0], self.numbers[1]) if self.ids else (self.number, self.number)

    def weights(self, rows: bool) -> Tensor:
        """Weight of each row of this rank, or of each column, in its direction's mean, relative to that of a row."""
        if self.ids:
            share = 1.0 if rows else self.numbers[0].double() / self.numbers[1]
            return ((self.row_count if rows else self.column_count) > 0) * share
        own, others = self.ranks.own_rows, self.ranks.num_columns if rows else self.ranks.num_rows
        start, stop = (own.start, own.stop) if rows else (0, self.ranks.num_columns)
        return torch.arange(start, stop, device=self.numbers.device) < others


class Operands:
    """A and B as the matrix kernels take them: rows, their inverse norms, and factors that make logits of products.

    `b` is gathered over the ranks while the first tiles run on this rank's own block, `local_b`.

    Attributes:
        a_factor, a_inverse, b_inverse: float32 [N], [N], [M]; the first with the scale, in units of the logits.
        a_out, b_out: what G carries, so that it multiplies the rows as they are: the inverse norms. In float16 ones.
        unit: whether it multiplies unit rows instead (see the module).
        gain: what G is multiplied by.
        bounds: int32 [3], of `rows_kernel`.
        bias: of the fixed maximum.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        scale: float | Tensor,
        normalize: bool,
        ranks: Ranks,
        dtype: torch.dtype,
        units: float = LOG2E.value,
        constants: Operands | None = None,
    ) -> None:
        """`constants`: the operands whose bounds are also to hold for these, which are equal on all ranks."""
        self.ranks, self.normalize, self.depth, self.device = ranks, normalize, a.shape[1], a.device
        self.unit = normalize and dtype == torch.float16
        self.gain = HALF_GAIN if dtype == torch.float16 else 1.0
        self.a, self.local_b = _rows(a, dtype), _rows(b, dtype)
        self.scale = _on_device(scale, self.device)
        self.bounds = constants.bounds if constants else torch.zeros(3, dtype=torch.int32, device=self.device)
        num_rows, num_columns = len(a), len(b)
        factors = torch.empty(num_columns + 2 * num_rows, device=self.device)
        b_inverse, self.a_factor, self.a_inverse = factors.split([num_columns, num_rows, num_rows])
        rows_kernel[(triton.cdiv(max(num_rows, num_columns), ROWS["ROWS"]),)](
            self.a, self.local_b, self.scale, self.a_factor, self.a_inverse, b_inverse, self.bounds,
            num_rows, num_columns, self.depth, self.a.stride(0), self.local_b.stride(0), NORM_EPS, units,
            int(normalize), int(constants is None), **ROWS,
        )  # fmt: skip
        self._b: Tensor | None = None
        if constants is not None:
            self.b_inverse, self._b = b_inverse, self.local_b
            return
        self._finish_gather = ranks.start_gather(self.local_b, ranks.b_rows)
        self.b_inverse = ranks.gather(b_inverse, ranks.b_rows)
        self.a_out, self.b_out = self.a_inverse, self.b_inverse
        if self.unit:
            ones = torch.ones(max(num_rows, ranks.num_columns), device=self.device)
            self.a_out, self.b_out = ones[:num_rows], ones[: ranks.num_columns]
        # The fixed maximum: sums stay below 2^126.
        self.bias = 126.0 - math.ceil(math.log2(max(ranks.num_rows, ranks.num_columns)))

    @property
    def b(self) -> Tensor:
        """All rows of B, [M, D]; waits (on the device) for those of the other ranks."""
        if self._b is None:
            self._b = self._finish_gather()
        return self._b


class Launch:
    """What all matrix kernels of one call share: a tile and how many rows are worked on at a time."""

    def __init__(self, arch: int, dtype: torch.dtype, precision: str = "tf32", chunk: int = 0) -> None:
        self.arch, self.chunk = arch, chunk
        self.tile = INTERPRETER_TILE if arch == 0 else for_architecture(TILES, arch)[dtype]
        self.precision = precision

    def constants(self) -> dict[str, Any]:
        """Constants and options of a matrix kernel."""
        tile = self.tile
        sizes = {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "PRECISION": self.precision}
        limit = {"maxnreg": tile.registers} if tile.registers else {}
        return {**sizes, "num_warps": tile.warps, "num_stages": tile.stages, **limit}

    def tiles(self, rows: int, columns: int) -> tuple[int, int]:
        """Of rows and of columns."""
        return -(-rows // self.tile.rows), -(-columns // self.tile.columns)

    def left(self, x: Tensor) -> TensorDescriptor:
        """Rows as a tile reads them."""
        return TensorDescriptor(x, x.shape, x.stride(), [self.tile.rows, self.tile.depth])

    def right(self, x: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
        """Columns as a tile, and as half a tile reads them."""
        depth, width = self.tile.depth, self.tile.columns
        return tuple(TensorDescriptor(x, x.shape, x.stride(), [n, depth]) for n in (width, width // 2))  # type: ignore[return-value]

    def halves(self, x: Tensor) -> TensorDescriptor:
        """A chunk of S or G, as the halves of a tile are stored."""
        return TensorDescriptor(x, x.shape, x.stride(), [self.tile.rows, self.tile.columns // 2])

    def chunks(self, rows: int) -> Iterator[slice]:
        for start in range(0, rows, self.chunk):
            yield slice(start, min(start + self.chunk, rows))


def _launch(operands: Operands) -> Launch:
    a, index = operands.a, operands.device.index
    arch, multiprocessors = dispatch.architecture(index), dispatch.multiprocessors(index)
    precision = PRECISIONS[torch.get_float32_matmul_precision()] if a.dtype == torch.float32 else "tf32"
    chunk = chunk_rows(arch, multiprocessors, operands.depth, operands.ranks.num_columns * a.element_size())
    return Launch(arch, a.dtype, precision, chunk)


@dataclass(frozen=True)
class Block:
    """A rectangle of the matrix of logits, or one beside it: rows and columns with their factors and keys.

    Attributes:
        rows, columns: embeddings [R, D], [C, D].
        row_factor, column_factor: what makes logits of their products.
        row_out, column_out: what G carries.
        row_key, column_key: classes, with ids.
        diagonal: row i is paired with column i + diagonal, without.
    """

    rows: Tensor
    columns: Tensor
    row_factor: Tensor
    column_factor: Tensor
    row_out: Tensor
    column_out: Tensor
    row_key: Tensor
    column_key: Tensor
    diagonal: int


class Blocks:
    """The matrix of this rank's rows and all columns, and the queue's blocks beside and below it."""

    def __init__(
        self, operands: Operands, positives: PositiveKeys, queue: QueueRows | None, launch: Launch, two_sided: bool
    ) -> None:
        self.operands, self.positives, self.launch, self.two_sided = operands, positives, launch, two_sided
        self.queue: Operands | None = None
        self.queue_rows, self.queue_columns = (0, 0) if queue is None else (len(queue.a), len(queue.b))
        if queue is not None:
            # A side without entries is never read, but has to be something.
            o, sides = operands, (queue.a if len(queue.a) else queue.b, queue.b if len(queue.b) else queue.a)
            one = Ranks(None, 0, (len(sides[0]),), (len(sides[1]),))
            self.queue = Operands(*sides, o.scale, o.normalize, one, o.a.dtype, constants=o)

    def part(self, columns: slice | None) -> Block:
        """Columns of the matrix; None: this rank's own, which are there before the others'."""
        o, keys, own = self.operands, self.positives, self.operands.ranks.own_columns
        at = own if columns is None else columns
        b = o.local_b if columns is None else o.b[at]
        b_key = keys.b_key[at] if keys.ids else keys.b_key
        factor, out = _aligned(o.b_inverse[at]), _aligned(o.b_out[at])
        return Block(o.a, b, o.a_factor, factor, o.a_out, out, keys.a_key, b_key, keys.diagonal - at.start)

    def beside(self) -> Block:
        """This rank's rows against the queue's entries of B."""
        o, keys, queue = self.operands, self.positives, self.queue
        assert queue is not None
        out = torch.ones_like(queue.b_inverse) if o.unit else queue.b_inverse
        return Block(
            o.a, queue.local_b, o.a_factor, queue.b_inverse, o.a_out, out, keys.a_key, keys.queue_b_key, NOT_PAIRED
        )

    def below(self) -> Block:
        """This rank's columns, in the place of rows, against the queue's entries of A."""
        o, keys, queue, own = self.operands, self.positives, self.queue, self.operands.ranks.own_columns
        assert queue is not None
        inverse = o.b_inverse[own]
        out = torch.ones_like(queue.a_inverse) if o.unit else queue.a_inverse
        key = keys.b_key[own] if keys.ids else keys.b_key
        factor = inverse * (o.scale * LOG2E.value)
        return Block(
            o.local_b, queue.a, factor, _aligned(queue.a_inverse), o.b_out[own], _aligned(out), key, keys.queue_a_key,
            NOT_PAIRED,
        )


class Guide:
    """A teacher's cosines, and above which of them a column is no negative of a row, and a row none of a column."""

    def __init__(self, teacher: Teacher, contrast: Contrast, blocks: Blocks) -> None:
        o, launch = blocks.operands, blocks.launch
        self.operands = Operands(teacher[0], teacher[1], 1.0, True, o.ranks, o.a.dtype)
        margin = float(contrast.guide_margin or 0.0)
        self.row, self.column = (
            best[1] * (1.0 - margin) if contrast.guide_relative else best[1] - margin
            for best in _best(self.operands, self.operands.a_inverse, blocks.positives, launch)
        )


def _best(operands: Operands, factor: Tensor, positives: PositiveKeys, launch: Launch) -> tuple[Tensor, Tensor]:
    """[2, N] and [2, M]: the largest entry of each row, and column, and the largest of its positives."""
    ranks, num_rows, device = operands.ranks, len(operands.a), operands.device
    rows = torch.full((2, num_rows), -math.inf, device=device)
    columns = torch.full((2, ranks.num_columns), -math.inf, device=device)
    a, (b, _) = launch.left(operands.a), launch.right(operands.b)
    for at in launch.chunks(num_rows):
        best_kernel[(math.prod(launch.tiles(at.stop - at.start, ranks.num_columns)),)](
            a, b, factor, operands.b_inverse, positives.a_key, positives.b_key, rows, columns, at.start, at.stop,
            ranks.num_columns, operands.depth, positives.diagonal, positives.ids, num_rows, ranks.num_columns,
            **launch.constants(),
        )  # fmt: skip
    return rows, ranks.all_reduce(columns, maximum=True)


def _top1(operands: Operands, positives: PositiveKeys, launch: Launch, two_sided: bool) -> Tensor:
    """Share of the rows (and columns) whose best match is one of their positives, [2] float32."""
    rows, columns = _best(operands, operands.a_factor, positives, launch)
    of_rows, of_columns = positives.numbers_of_positives()
    hits = operands.ranks.all_reduce((rows[1] >= rows[0]).sum(dtype=torch.float64)) / of_rows
    if not two_sided:
        return torch.stack([hits, torch.full_like(hits, math.nan)]).float()
    return torch.stack([hits, (columns[1] >= columns[0]).sum(dtype=torch.float64) / of_columns]).float()


class TiledSoftmax:
    """P1: sums of exponentials over all rows of a rank and all columns, and what P2 and the loss take from them.

    Attributes:
        row, column: float32 [5, N], [5, M] of `combine_kernel`.
        terms, scale_terms: float64, a number a block of rows, then of columns: of the loss, and of dscale.
        kept: [N, M], the exponentials of plain tiles; None: they are not kept.
    """

    def __init__(
        self,
        blocks: Blocks,
        hard: float,
        debias: float = 0.0,
        kept: Tensor | None = None,
        guide: Guide | None = None,
        operands: Operands | None = None,
    ) -> None:
        """`operands`: others than those of the blocks, a teacher's."""
        self.blocks, self.hard, self.debias, self.kept, self.guide = blocks, hard, debias, kept, guide
        self.operands = operands = operands or blocks.operands
        ranks, device, launch = operands.ranks, operands.device, blocks.launch
        num_rows, num_columns = len(operands.a), ranks.num_columns
        self.num_rows, self.num_columns = num_rows, num_columns
        self.row_blocks = -(-num_rows // COMBINED["WIDTH"])
        self.all_blocks = self.row_blocks + (-(-num_columns // COMBINED["WIDTH"]) if blocks.two_sided else 0)
        self.row = torch.empty(5, num_rows, device=device)
        self.column = _aligned_matrix(5, num_columns, torch.float32, device)
        self.terms, self.scale_terms = torch.empty(2, self.all_blocks, dtype=torch.float64, device=device)
        self._row_state = torch.empty(4, num_rows, dtype=torch.float64, device=device)
        self._column_state = torch.empty(4, num_columns, dtype=torch.float64, device=device)
        whole = ranks.group is None and blocks.queue is None  # sums are complete with the last tile
        for at in launch.chunks(num_rows):
            everything = operands is not blocks.operands or ranks.group is None or kept is not None or at.start > 0
            # Only the first chunk can overlap with the arrival of the other ranks' rows.
            own = ranks.own_columns
            parts: list[slice | None] = [slice(0, num_columns)]
            if not everything:
                parts = [None, slice(0, own.start), slice(own.stop, num_columns)]
            for index, part in enumerate(p for p in parts if p is None or p.stop > p.start):
                block = self._block(part)
                first = own.start if part is None else part.start
                fresh = (int(index == 0), int(at.start == 0))
                done = (int(whole), int(whole and at.stop == num_rows))
                self._add(block, at, first, fresh, done)
            if blocks.queue_columns:
                self._add(blocks.beside(), at, None, (0, 0), (0, 0))
        if blocks.queue_rows and blocks.two_sided:
            own, block = ranks.own_columns, blocks.below()
            for at in launch.chunks(len(block.rows)):
                self._add(block, at, None, (0, 0), (0, 0), first_row=own.start, rows_are_columns=True)
        if not whole:
            self._reduce()

    def _block(self, part: slice | None) -> Block:
        if self.operands is self.blocks.operands:
            return self.blocks.part(part)
        o, keys = self.operands, self.blocks.positives
        return Block(
            o.a, o.b, o.a_factor, o.b_inverse, o.a_inverse, o.b_inverse, keys.a_key, keys.b_key, keys.diagonal
        )

    def _add(
        self,
        block: Block,
        at: slice,
        first_column: int | None,
        fresh: tuple[int, int],
        done: tuple[int, int],
        first_row: int = 0,
        rows_are_columns: bool = False,
    ) -> None:
        """Rows `at` of a block; `first_column`: where its columns begin in the matrix, None for those of the queue.

        `fresh`, `done`: whether rows, and columns, have no sums yet, and whether they will have no more.
        """
        launch, operands, guide = self.blocks.launch, self.operands, self.guide
        rows, columns, device = at.stop - at.start, len(block.columns), operands.device
        two_sided = self.blocks.two_sided and first_column is not None
        row_tiles, column_tiles = launch.tiles(rows, columns)
        row_parts = torch.empty(4, 2 * column_tiles, rows, device=device)
        column_parts = torch.empty(3, row_tiles, columns, device=device) if two_sided else row_parts
        special = torch.empty(row_tiles, column_tiles, dtype=torch.int8, device=device)
        kept = self.kept if first_column is not None else None
        a, (b, half_b) = launch.left(block.rows), launch.right(block.columns)
        ta, tb, of_guide, teacher_depth = a, half_b, (block.row_factor,) * 4, 0
        if guide is not None:
            g, part = guide.operands, slice(first_column, (first_column or 0) + columns)
            ta, (_, tb), teacher_depth = launch.left(g.a), launch.right(g.b[part]), g.depth
            of_guide = (g.a_inverse, g.b_inverse[part], guide.row, guide.column[part])
        sums_kernel[(row_tiles * column_tiles,)](
            a, b, half_b, launch.halves(block.rows if kept is None else kept[at]),
            block.row_factor, block.column_factor, block.row_key, block.column_key, operands.bounds, operands.scale,
            ta, tb, *of_guide, row_parts, column_parts, special,
            at.start, at.stop, columns, operands.depth, teacher_depth, block.diagonal, self.blocks.positives.ids,
            int(kept is not None), operands.bias,
            COLUMNS=two_sided, GUIDE=guide is not None, **launch.constants(),
        )  # fmt: skip
        self._combine(
            row_parts, column_parts, special, (first_row + at.start, rows, 2 * column_tiles),
            (first_column or 0, columns, row_tiles), fresh, done, two_sided,
            int(first_column is not None), rows_are_columns,
        )  # fmt: skip

    def _combine(
        self,
        row_parts: Tensor,
        column_parts: Tensor,
        special: Tensor,
        rows: tuple[int, int, int],
        columns: tuple[int, int, int],
        fresh: tuple[int, int],
        done: tuple[int, int],
        with_columns: bool,
        positives: int = 1,
        rows_are_columns: bool = False,
    ) -> None:
        """`rows`, `columns`: the first, how many, and in how many parts."""
        blocks, operands, keys, launch = self.blocks, self.operands, self.blocks.positives, self.blocks.launch
        width = COMBINED["WIDTH"]
        state, num_rows = (self._column_state, self.num_columns) if rows_are_columns else (self._row_state, self.num_rows)
        combine_kernel[(-(-rows[1] // width) + (-(-columns[1] // width) if with_columns else 0),)](
            row_parts, column_parts, special, state, self._column_state,
            operands.bounds, operands.scale, keys.row_count, keys.column_count, keys.siblings, keys.numbers,
            keys.row_queue, keys.column_queue, self.row, self.column, self.terms, self.scale_terms,
            *rows, *columns, num_rows, self.num_columns, self.column.stride(0), operands.ranks.num_rows,
            keys.diagonal, keys.ids, int(blocks.two_sided), positives, *fresh, *done,
            self.hard, self.debias, blocks.queue_rows, blocks.queue_columns, operands.bias, launch.tile.rows, launch.tile.columns, **COMBINED,
        )  # fmt: skip

    def _reduce(self) -> None:
        """Adds the columns' sums of all ranks, and turns all sums into factors."""
        ranks, state = self.operands.ranks, self._column_state
        columns = self.num_columns if self.blocks.two_sided else 0
        if columns and ranks.group is not None:
            maximum = ranks.all_reduce(state[0].clone(), maximum=True)
            state[1:] *= torch.exp2(state[0] - maximum)
            state[0] = maximum
            ranks.all_reduce(state[1:])
        nothing = self.row
        self._combine(nothing, nothing, nothing.view(torch.int8), (0, self.num_rows, 0), (0, columns, 0), (0, 0), (1, 1),
                      self.blocks.two_sided)


class EmbeddingGradients:
    """P2 to P4, and the way back through the normalisation."""

    def __init__(
        self, operands: Operands, launch: Launch, need: Need, unit: float, keys: PositiveKeys, by_ids: bool = True
    ) -> None:
        """`unit`: factor of the loss, without the number of rows: those that have a positive (`by_ids`), or all."""
        self.operands, self.need, self.launch, self.unit, self.keys = operands, need, launch, unit, keys
        self._ids = int(keys.ids and by_ids)
        self.along_queue: list[Tensor] = []  # what the queue adds to dscale and `along` has not
        self.by_rows = need.a or (need.scale and not need.b)  # one of the two products also gives dscale
        self.num_rows, depth, device = len(operands.a), operands.depth, operands.device
        self.a_rows, self.b_rows = operands.a, operands.b
        if operands.unit:
            self.a_rows = (operands.a * operands.a_inverse[:, None]).to(torch.float16)
            self.b_rows = (operands.b * operands.b_inverse[:, None]).to(torch.float16)
        # bfloat16 gradients keep their dtype; float16 ones would underflow before a loss scale reaches them.
        dtype = torch.bfloat16 if operands.a.dtype == torch.bfloat16 else torch.float32
        own = operands.ranks.own_columns
        self.a_blocks, self.b_blocks = -(-self.num_rows // FINISHED["ROWS"]), -(-(own.stop - own.start) // FINISHED["ROWS"])
        self.along = torch.empty(self.a_blocks + self.b_blocks, dtype=torch.float64, device=device)
        self.a = torch.empty(self.num_rows, depth, dtype=dtype, device=device) if need.a else None
        self.b = torch.empty(own.stop - own.start, depth, dtype=dtype, device=device) if need.b else None
        self._raw_b: Tensor | None = None

    def add(self, at: slice, g: Tensor, correction: Tensor | None = None, raw: Tensor | None = None,
            last: bool = False) -> None:  # fmt: skip
        """Adds a chunk of G; `raw` [c, D] belongs to its G·B, `correction` likewise, for unit rows.

        `last`: nothing will be added to Gᵀ·A by others, so that its way back can begin along with the rows'.
        """
        operands = self.operands
        if self.need.b:
            self._raw_b = _multiply(g.t(), self.a_rows[at], self._raw_b)
        if not self.by_rows:
            if last:
                self._through_norms(slice(0, 0), None, True)
            return
        raw = _multiply(g, self.b_rows, raw)
        if correction is not None:
            raw += correction * (operands.gain if operands.unit else operands.gain * operands.a_inverse[at, None])
        self._through_norms(at, raw, last and self.need.b)

    def _through_norms(self, at: slice, raw_a: Tensor | None, with_b: bool) -> None:
        """Rows `at` of A, and all of B."""
        operands, keys, own = self.operands, self.keys, self.operands.ranks.own_columns
        raw_b = self._raw_b if with_b else None
        rows_a, rows_b = 0 if raw_a is None else len(raw_a), 0 if raw_b is None else len(raw_b)
        raw = raw_a if raw_a is not None else raw_b
        assert raw is not None
        any_gradient = self.a if self.a is not None else self.b if self.b is not None else raw
        a, b = self.a_rows[at], self.b_rows[own]
        finish_kernel[(-(-rows_a // FINISHED["ROWS"]) + -(-rows_b // FINISHED["ROWS"]),)](
            raw_a if raw_a is not None else raw, raw_b if raw_b is not None else raw, a, b,
            operands.a_inverse[at], operands.b_inverse[own], operands.scale, keys.numbers,
            any_gradient if self.a is None else self.a[at], any_gradient if self.b is None else self.b, self.along,
            rows_a, rows_b, operands.depth, a.stride(0), b.stride(0), raw.stride(0), raw.stride(0),
            at.start // FINISHED["ROWS"] if raw_a is not None else self.a_blocks,
            self.unit * operands.ranks.size, float(operands.normalize), int(operands.unit), operands.gain, keys.number,
            self._ids, int(self.need.a), int(self.need.b), **FINISHED,
        )  # fmt: skip

    @property
    def blocks_of_scale(self) -> tuple[int, int]:
        """Of `along`, those whose sum is dscale."""
        return (0, self.a_blocks) if self.by_rows else (self.a_blocks, self.a_blocks + self.b_blocks)

    def beside(self, softmax: TiledSoftmax, at: slice) -> Tensor | None:
        """G·B of rows `at` and the queue's entries of B."""
        if not (self.by_rows or self.need.scale):
            return None
        raw = self._of_queue(softmax, softmax.blocks.beside(), at, softmax.row)
        if not self.by_rows:
            self._add_along(raw, self.a_rows[at])
        return raw

    def below(self, softmax: TiledSoftmax) -> Tensor | None:
        """Gᵀ·A of this rank's columns and the queue's entries of A."""
        if not (self.need.b or self.need.scale):
            return None
        block, own = softmax.blocks.below(), self.operands.ranks.own_columns
        found = [
            self._of_queue(softmax, block, at, softmax.column[:, own]) for at in self.launch.chunks(len(block.rows))
        ]
        raw = torch.cat(found)
        if self.by_rows:
            self._add_along(raw, self.b_rows[own])
        return raw

    def _of_queue(self, softmax: TiledSoftmax, block: Block, at: slice, factors: Tensor) -> Tensor:
        entries = block.columns
        if self.operands.unit:
            entries = (entries * block.column_factor[:, None]).to(torch.float16)
        g = _aligned_matrix(at.stop - at.start, len(entries), entries.dtype, entries.device)
        _write_gradient(softmax, block, at, g, False, factors, target=0.0)
        return _multiply(g, entries)

    def _add_along(self, raw: Tensor, x: Tensor) -> None:
        if self.need.scale:
            self.along_queue.append((raw * x).sum(dtype=torch.float64) / self.operands.gain)

    def finish_columns(self, correction: Tensor | None, queue: Tensor | None) -> None:
        """B's way back; `queue` [own rows, D] is what the queue's entries add to Gᵀ·A of this rank's columns."""
        operands, ranks = self.operands, self.operands.ranks
        raw = self._raw_b
        assert raw is not None
        if correction is not None:
            raw += correction * (operands.gain if operands.unit else operands.gain * operands.b_inverse[:, None])
        raw = ranks.scatter_sum(raw, ranks.b_rows)
        self._raw_b = raw if queue is None else raw + queue
        self._through_norms(slice(0, 0), None, True)


@dataclass(frozen=True)
class Distillation:
    """A teacher's part of P2: what its tiles are made of, and where their shares of the loss go."""

    operands: Operands
    softmax: TiledSoftmax
    weight: float


def _write_gradient(
    softmax: TiledSoftmax,
    block: Block,
    at: slice,
    g: Tensor,
    two_sided: bool,
    row: Tensor,
    target: float = 1.0,
    distillation: Distillation | None = None,
) -> Tensor | None:
    """P2 of rows `at` of a block into g; `row`: factors of all its rows. Returns the teacher's share of the loss."""
    launch, operands, guide, keys = softmax.blocks.launch, softmax.operands, softmax.guide, softmax.blocks.positives
    columns = len(block.columns)
    tiles = math.prod(launch.tiles(at.stop - at.start, columns))
    a, (b, half_b) = launch.left(block.rows), launch.right(block.columns)
    ta, tb, of_teacher, losses, teacher_depth = a, half_b, (block.row_factor,) * 4, row, 0
    if guide is not None:
        other = guide.operands
        of_teacher = (other.a_inverse, other.b_inverse, guide.row, guide.column)
    elif distillation is not None:
        other, t = distillation.operands, distillation.softmax
        of_teacher = (other.a_factor, other.b_inverse, t.row, t.column)
        losses = torch.empty(2 * tiles, launch.tile.rows, device=g.device)
    if guide is not None or distillation is not None:
        ta, (_, tb), teacher_depth = launch.left(other.a), launch.right(other.b), other.depth
    gradient_kernel[(tiles,)](
        a, b, half_b, launch.halves(g),
        block.row_factor, block.column_factor, block.row_out, block.column_out, block.row_key, block.column_key,
        operands.bounds, operands.scale, row, softmax.column, ta, tb, *of_teacher, losses,
        at.start, at.stop, columns, operands.depth, teacher_depth, block.diagonal, keys.ids,
        int(softmax.kept is not None and target > 0), row.stride(0), softmax.column.stride(0),
        target, 0.0 if distillation is None else distillation.weight, operands.gain, operands.bias,
        COLUMNS=two_sided, TEACHER=distillation is not None, GUIDE=guide is not None, **launch.constants(),
    )  # fmt: skip
    return None if distillation is None else losses.sum(dtype=torch.float64)


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
    two_sided, weight = contrast.direction == "both", contrast.teacher_weight
    dtype, num_rows, num_columns = torch.promote_types(a.dtype, b.dtype), len(a), ranks.num_columns
    operands = Operands(a, b, scale, contrast.normalize, ranks, dtype)
    launch, device = _launch(operands), a.device
    positives = PositiveKeys(ids, queue, ranks, operands.bounds)
    queue = None if queue is None or not len(queue.a) + len(queue.b) else queue
    blocks = Blocks(operands, positives, queue, launch, two_sided)
    ranks.all_reduce(operands.bounds, maximum=True)
    guide = Guide(teacher, contrast, blocks) if teacher is not None and contrast.guide_margin is not None else None
    kept = None
    if any(need) and keeps_exponentials(contrast, dtype, num_rows * num_columns * dtype.itemsize):
        kept = _aligned_matrix(num_rows, num_columns, dtype, device)
    hard, smooth = (1 - weight) * (1 - contrast.label_smoothing), (1 - weight) * contrast.label_smoothing
    softmax = TiledSoftmax(blocks, hard, contrast.debias, kept, guide)

    smoothing = distillation = None
    if smooth:
        a_hat, b_hat = a.detach().float(), operands.b.float()
        if contrast.normalize:
            a_hat, b_hat = a_hat * operands.a_inverse[:, None], b_hat * operands.b_inverse[:, None]
        row_weight = positives.weights(rows=True).double()
        column_weight = positives.weights(rows=False).double() * (1.0 if two_sided else 0.0)
        smoothing = LabelSmoothing(a_hat, b_hat, operands.scale[0], ranks, row_weight, column_weight, smooth)
    if teacher is not None and weight:
        other = Operands(teacher[0], teacher[1], teacher[2], contrast.normalize, ranks, dtype)
        ranks.all_reduce(other.bounds, maximum=True)
        alone = Blocks(operands, positives, None, launch, two_sided)
        distillation = Distillation(other, TiledSoftmax(alone, 0.0, operands=other), weight)

    unit = 0.5 if two_sided else 1.0
    gradients = EmbeddingGradients(operands, launch, need, unit, positives) if any(need) else None
    shares: list[Tensor] = []  # of the teacher's part of the loss
    if gradients is not None or distillation is not None:
        main = blocks.part(slice(0, num_columns))
        buffer = kept
        if buffer is None:
            buffer = _aligned_matrix(min(launch.chunk, num_rows), num_columns, dtype, device)
        alone = ranks.group is None and smoothing is None and queue is None
        for at in launch.chunks(num_rows):
            g = buffer[at] if kept is not None else buffer[: at.stop - at.start]
            share = _write_gradient(softmax, main, at, g, two_sided, softmax.row, 1.0, distillation)
            shares += [] if share is None else [share]
            if gradients is not None:
                raw = gradients.beside(softmax, at) if blocks.queue_columns else None
                correction = None if smoothing is None else smoothing.row_gradient(at)
                gradients.add(at, g, correction, raw, last=alone and at.stop == num_rows)
        if gradients is not None and not alone:
            below = gradients.below(softmax) if blocks.queue_rows and two_sided else None
            if need.b:
                gradients.finish_columns(None if smoothing is None else smoothing.column_gradient(), below)

    extras: dict[int, list[Tensor]] = {0: shares, 1: [] if gradients is None else gradients.along_queue, 2: []}
    if smoothing is not None:
        extras[0].append(smoothing.loss())
    if distillation is not None:
        of_rows = distillation.softmax.row_blocks
        for index, terms in ((0, distillation.softmax.terms[:of_rows]), (2, distillation.softmax.terms[of_rows:])):
            extras[index].append(-weight * terms.sum())
    loss, dscale = _totals(softmax, gradients, unit, extras)
    best = _top1(operands, positives, launch, two_sided) if top1 else None
    if gradients is None:
        return loss, (), best
    return loss, (gradients.a, gradients.b, dscale if need.scale else None), best


def _totals(
    softmax: TiledSoftmax, gradients: EmbeddingGradients | None, unit: float, extras: dict[int, list[Tensor]]
) -> tuple[Tensor, Tensor]:
    """The loss and dscale; `extras`: what else belongs to rows, to their dscale, and to columns."""
    keys, ranks, device = softmax.blocks.positives, softmax.operands.ranks, softmax.operands.device
    loss, dscale = torch.empty((), device=device), torch.empty((), dtype=torch.float64, device=device)
    along, first, last = softmax.terms, 0, 0
    if gradients is not None:
        along, (first, last) = gradients.along, gradients.blocks_of_scale

    def launch(add: int, finish: int) -> None:
        total_kernel[(1,)](
            softmax.terms, softmax.scale_terms, along, totals, keys.numbers, loss, dscale,
            softmax.row_blocks, softmax.all_blocks, first, last, unit, keys.number, keys.ids, add, finish, **TOTAL,
        )  # fmt: skip

    if ranks.group is None and not any(extras.values()):
        totals = dscale
        launch(1, 1)
        return loss, dscale
    totals = torch.empty(4, dtype=torch.float64, device=device)
    launch(1, 0)
    for index, values in extras.items():
        for value in values:
            totals[index] += value
    ranks.all_reduce(totals[:2])
    launch(0, 1)
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
    operands = Operands(a, b, scale, normalize, ranks, dtype, units=1.0)
    keys = PositiveKeys(ids, None, ranks, operands.bounds)
    keys.number = float(ranks.num_rows)
    launch = _launch(operands)
    num_rows, num_columns = len(a), ranks.num_columns
    products = need.a or need.b or need.scale
    gradients = EmbeddingGradients(operands, launch, need, 1.0, keys, by_ids=False) if products else None
    shift = _on_device(bias, device)
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # the loss and dbias
    left, right = launch.left(operands.a), launch.right(operands.b)
    buffer = _aligned_matrix(min(launch.chunk, num_rows), num_columns, dtype, device) if products else operands.a
    for at in launch.chunks(num_rows):
        rows = at.stop - at.start
        tiles = math.prod(launch.tiles(rows, num_columns))
        shares = torch.empty(2, 2 * tiles, device=device)
        g = buffer[:rows]
        sigmoid_kernel[(tiles,)](
            left, *right, launch.halves(g), operands.a_factor, operands.b_inverse, operands.a_out, operands.b_out,
            keys.a_key, keys.b_key, shift, shares[0], shares[1],
            at.start, at.stop, num_columns, operands.depth, keys.diagonal, keys.ids, int(products), operands.gain,
            **launch.constants(),
        )  # fmt: skip
        totals += shares.sum(1, dtype=torch.float64)
        if gradients is not None:
            gradients.add(at, g, last=ranks.group is None and at.stop == num_rows)
    if gradients is not None and need.b and ranks.group is not None:
        gradients.finish_columns(None, None)
    factor = 1.0 / ranks.num_rows
    loss, dbias = ranks.all_reduce(totals) * factor
    dscale = None
    if gradients is not None and need.scale:
        dscale = ranks.all_reduce(gradients.along[slice(*gradients.blocks_of_scale)].sum()) * factor
    if not any(need):
        return loss.float(), (), None
    a_b = (None, None) if gradients is None else (gradients.a, gradients.b)
    return loss.float(), (*a_b, dscale, dbias if need.bias else None), None


def times_upstream(gradients: Gradients, upstream: Tensor, wanted: Sequence[torch.dtype]) -> list[Tensor | None]:
    """Gradients of a loss (da, db, dscale), as above, times the upstream gradient, in the dtypes wanted; one launch."""
    found = [None if g is None else torch.empty_like(g, dtype=x) for g, x in zip(gradients, wanted, strict=True)]
    sizes = [0 if g is None else g.numel() for g in gradients[:2]]
    scale_wanted = gradients[2] is not None
    # An absent one of a pair is replaced by the other, so that there are no further forms of the kernel.
    given, written = [*gradients], [*found]
    for values in (given, written):
        values[0], values[1] = values[0] if sizes[0] else values[1], values[1] if sizes[1] else values[0]
    scalar = given[2] if scale_wanted else torch.empty((), dtype=torch.float64, device=upstream.device)
    out = written[2] if scale_wanted else torch.empty((), device=upstream.device)
    block = UPSTREAM["BLOCK"]
    upstream_kernel[(max(1, -(-sizes[0] // block) + -(-sizes[1] // block)),)](
        scalar if given[0] is None else given[0], scalar if given[1] is None else given[1], scalar, upstream,
        out if written[0] is None else written[0], out if written[1] is None else written[1], out, *sizes, **UPSTREAM,
    )  # fmt: skip
    return found


def compilations(arch: int) -> Iterator[Compilation]:
    """Every (kernel, configuration, dtype, flags) that the launchers may pick on an architecture."""
    both = (False, True)
    for dtype in TILES[90]:
        name = TYPE_NAMES[dtype]
        for precision in ("tf32x3", "tf32") if dtype == torch.float32 else ("tf32",):
            label = f"{name} {precision}" if dtype == torch.float32 else name
            launch = Launch(arch, dtype, precision)
            constants = launch.constants()
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
    for given, wanted in (("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "fp16")):
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
    doubles = ("row_state", "column_state", "terms", "scale_terms", "along", "totals", "scale_gradient", "dscale",
               "dbias")  # fmt: skip
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
