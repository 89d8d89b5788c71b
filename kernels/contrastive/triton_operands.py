"""What the matrix kernels of the contrastive losses work on: tiles and chunks, keys, operands and blocks of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastclap.kernels import dispatch
from fastclap.kernels.contrastive.shared import NORM_EPS, Ids, QueueRows, Ranks
from fastclap.kernels.contrastive.triton_kernels import rows_kernel
from fastclap.kernels.triton_tools import LOG2E, PRECISIONS, for_architecture, launch

HALF_GAIN = 4096.0  # of G in float16: the target becomes 4096, probabilities down to 1e-11 stay non-zero
LARGEST_CHUNK = 8448
LARGEST_CHUNK_BYTES = 16 << 30  # reached by a wave of rows beyond a million columns only
NOT_PAIRED = -(1 << 30)  # a diagonal on which no row meets a column
ROWS = {"ROWS": 8, "DEPTH": 256}  # of `rows_kernel`


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


def on_device(value: float | Tensor, device: torch.device) -> Tensor:
    """A scalar as one float32; those of the host are filled in, since a copy could not be captured in a graph."""
    if isinstance(value, Tensor) and value.device == device:
        return value if value.dtype == torch.float32 else value.to(torch.float32)
    return torch.full((1,), float(value), dtype=torch.float32, device=device)


def aligned_matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix whose rows start at multiples of 16 bytes, as descriptors need."""
    found = torch.empty(rows, -(-columns // 16) * 16, dtype=dtype, device=device)
    return found if found.shape[1] == columns else found[:, :columns]


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, D] in that dtype, as descriptors need it."""
    x = x if x.dtype == dtype else x.to(dtype)
    step = x.stride(0) * x.element_size()
    if x.stride(1) == 1 and step % 16 == 0 and x.data_ptr() % 16 == 0 and step > 0:
        return x
    return aligned_matrix(x.shape[0], x.shape[1], dtype, x.device).copy_(x)


def taken(x: Tensor, at: slice) -> Tensor:
    """x[at]; all of it costs the host nothing."""
    return x if at.stop - at.start == x.shape[0] else x[at]


def vector(x: Tensor, at: slice) -> Tensor:
    """x[at] as tiles read a vector of columns, several at a time."""
    part = taken(x, at)
    return part if part.data_ptr() % 16 == 0 else part.clone()


class PositiveKeys:
    """Which pairs are positives, on the device: keys to compare and counts to weight by. Nothing waits for the host.

    Without ids row i's positive is column i + diagonal, and the tensors are never read.

    Attributes:
        number: of rows, and of columns, with a positive, without ids.
        numbers: int32 [2], the two with ids.
        a_key, b_key: int32 [N], [M], classes that are equal where ids are.
        row_count, column_count: int32 [N], [M], positives of each.
        siblings: int32 [N], rows with the row's id.
        queue_a_key, queue_b_key: int32 [Qa], [Qb], classes of the queue's entries.
        row_queue, column_queue: int32 [N], [M], entries of the other side with the id of a row, or column.
    """

    def __init__(self, ids: Ids | None, queue: QueueRows | None, ranks: Ranks, unread: Tensor) -> None:
        self.ids, self.diagonal, self.ranks = int(ids is not None), ranks.own_rows.start, ranks
        self.number = float(min(ranks.num_rows, ranks.num_columns))
        self.numbers = self.a_key = self.b_key = self.row_count = self.column_count = self.siblings = unread
        self.queue_a_key = self.queue_b_key = self.row_queue = self.column_queue = unread
        if ids is None:
            return
        parts = [x.to(unread.device, torch.int64, non_blocking=True) for x in ids]
        parts = [ranks.gather(x, rows) for x, rows in zip(parts, (ranks.a_rows, ranks.b_rows), strict=True)]
        if queue is not None and queue.a_ids is not None and queue.b_ids is not None:
            parts += [x.to(unread.device, torch.int64) for x in (queue.a_ids, queue.b_ids)]
        values, order = torch.cat(parts).sort()
        steps = torch.zeros_like(values)
        torch.cumsum(values[1:] != values[:-1], 0, out=steps[1:])
        a, b, *of_queue = torch.empty_like(steps).scatter_(0, order, steps).split([len(part) for part in parts])

        def count(among: Tensor, of: Tensor) -> Tensor:
            found = torch.zeros(len(values), dtype=torch.int32, device=unread.device)
            return found.scatter_add_(0, among, torch.ones_like(among, dtype=torch.int32))[of]

        own, row_count, self.column_count = ranks.own_rows, count(b, a), count(a, b)
        self.row_count, self.siblings = row_count[own], count(a, a[own])
        self.numbers = torch.stack([(x > 0).sum() for x in (row_count, self.column_count)]).int()
        self.a_key, self.b_key = a[own].int(), b.int()
        if of_queue:
            self.queue_a_key, self.queue_b_key = (x.int() for x in of_queue)
            self.row_queue, self.column_queue = count(of_queue[1], a[own]), count(of_queue[0], b)

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
        bounds: int32 [3], of `rows_kernel`: those of this rank.
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
        beside: Operands | None = None,
    ) -> None:
        """`beside`: operands whose bounds are to hold for these as well, which are equal on all ranks."""
        self.ranks, self.normalize, self.depth, self.device, self.dtype = ranks, normalize, a.shape[1], a.device, dtype
        self.unit = normalize and dtype == torch.float16
        self.gain = HALF_GAIN if dtype == torch.float16 else 1.0
        self.a, self.local_b, self.scale = _rows(a, dtype), _rows(b, dtype), on_device(scale, a.device)
        self.bounds: Tensor = beside.bounds if beside else torch.zeros(3, dtype=torch.int32, device=a.device)
        rows, columns = a.shape[0], b.shape[0]
        factors = torch.empty(columns + 2 * rows, device=a.device)
        b_inverse, self.a_factor, self.a_inverse = factors.split([columns, rows, rows])
        launch(
            rows_kernel, -(-max(rows, columns) // ROWS["ROWS"]), dtype,
            self.a, self.local_b, self.scale, self.a_factor, self.a_inverse, b_inverse, self.bounds, rows, columns,
            self.depth, self.a.stride(0), self.local_b.stride(0), NORM_EPS, units, int(normalize), int(not beside),
            **ROWS,
        )  # fmt: skip
        self._finish_gather = ranks.start_gather(self.local_b, ranks.b_rows)
        self._b = self.local_b if ranks.group is None else None
        self.b_inverse = ranks.gather(b_inverse, ranks.b_rows)
        self.a_out, self.b_out = self.a_inverse, self.b_inverse
        if self.unit:
            self.a_out, self.b_out = torch.ones_like(self.a_inverse), torch.ones_like(self.b_inverse)
        # The fixed maximum: sums stay below 2^126.
        self.bias = 126.0 - math.ceil(math.log2(max(ranks.num_rows, ranks.num_columns)))

    @property
    def b(self) -> Tensor:
        """All rows of B, [M, D]; waits (on the device) for those of the other ranks."""
        if self._b is None:
            self._b = _rows(self._finish_gather(), self.dtype)
        return self._b


class Launch:
    """What all matrix kernels of one call share: a tile and how many rows are worked on at a time."""

    def __init__(self, arch: int, dtype: torch.dtype, precision: str = "tf32", chunk: int = 0) -> None:
        self.arch, self.dtype, self.chunk = arch, dtype, chunk
        self.tile = tile = INTERPRETER_TILE if arch == 0 else for_architecture(TILES, arch)[dtype]
        self.constants = {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "PRECISION": precision}
        limit = {"maxnreg": tile.registers} if tile.registers else {}
        self.options = {"num_warps": tile.warps, "num_stages": tile.stages, **limit}

    @classmethod
    def of(cls, a: Tensor, dtype: torch.dtype, num_columns: int) -> Launch:
        arch, multiprocessors = dispatch.architecture(a.device.index), dispatch.multiprocessors(a.device.index)
        precision = PRECISIONS[torch.get_float32_matmul_precision()] if dtype == torch.float32 else "tf32"
        return cls(arch, dtype, precision, chunk_rows(arch, multiprocessors, a.shape[1], num_columns * dtype.itemsize))

    def __call__(self, kernel: Any, tiles: tuple[int, int], *args: Any, **flags: bool) -> None:
        """A matrix kernel, a program a tile."""
        launch(kernel, tiles[0] * tiles[1], self.dtype, *args, **self.constants, **flags, **self.options)

    def tiles(self, rows: int, columns: int) -> tuple[int, int]:
        """Of rows and of columns."""
        return -(-rows // self.tile.rows), -(-columns // self.tile.columns)

    def described(self, x: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
        return TensorDescriptor(x, x.shape, x.stride(), [rows, columns or self.tile.depth])

    def halves(self, x: Tensor) -> TensorDescriptor:
        """A chunk of S or G, as the halves of a tile are stored."""
        return self.described(x, self.tile.rows, self.tile.columns // 2)

    def operands(self, a: Tensor, b: Tensor) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor]:
        """Rows of A as a tile reads them; those of B as a tile, and as half a tile reads them."""
        tile = self.tile
        return self.described(a, tile.rows), self.described(b, tile.columns), self.described(b, tile.columns // 2)

    def chunks(self, rows: int) -> Iterator[slice]:
        for start in range(0, rows, self.chunk):
            yield slice(start, min(start + self.chunk, rows))


class Block:
    """A rectangle of the matrix of logits, or one beside it.

    Attributes:
        rows, columns: embeddings [R, D], [C, D].
        first: where its columns begin in the matrix; None: they are the queue's.
        factors: what makes logits of products, of rows and of columns.
        out: what G carries.
        keys: classes, with ids.
        diagonal: row i is paired with column i + diagonal, without.
        described: the matrices as tiles read them.
        no_second: arguments in the place of those of a `Second`.
    """

    def __init__(
        self,
        launch: Launch,
        rows: Tensor,
        columns: Tensor,
        first: int | None,
        factors: tuple[Tensor, Tensor],
        out: tuple[Tensor, Tensor],
        keys: tuple[Tensor, Tensor],
        diagonal: int = NOT_PAIRED,
    ) -> None:
        self.rows, self.columns, self.first, self.num_columns = rows, columns, first, columns.shape[0]
        self.factors, self.out, self.keys, self.diagonal = factors, out, keys, diagonal
        self.described = a, _, half_b = launch.operands(rows, columns)
        self.no_second = (a, half_b, *(factors[0],) * 4)


class Second:
    """A teacher's or guide's part of tiles.

    Attributes:
        depth: columns of its embeddings.
        weight: a teacher's.
        arguments: of a tile's kernel.
    """

    def __init__(
        self,
        operands: Operands,
        launch: Launch,
        row_factor: Tensor,
        row: Tensor,
        column: Tensor,
        weight: float = 0.0,
    ) -> None:
        """
        Args:
            row_factor: what makes its logits, or its cosines, of products.
            row, column: a teacher's factors; a guide's cosines above which a column is no negative of a row, and a row
                none of a column.
        """
        self.depth, self.weight = operands.depth, weight
        a, _, half_b = launch.operands(operands.a, operands.b)
        self.arguments = a, half_b, row_factor, operands.b_inverse, row, column


class Blocks:
    """The matrix of this rank's rows and all columns, and the queue's blocks beside and below it."""

    def __init__(
        self, operands: Operands, keys: PositiveKeys, queue: QueueRows | None, launch: Launch, two_sided: bool
    ) -> None:
        self.operands, self.keys, self.launch, self.two_sided = operands, keys, launch, two_sided
        self.queue_rows, self.queue_columns = (0, 0) if queue is None else (queue.a.shape[0], queue.b.shape[0])
        if queue is not None:
            # A side without entries is never read, but has to be something.
            sides = (queue.a if self.queue_rows else queue.b, queue.b if self.queue_columns else queue.a)
            one, o = Ranks(None, 0, (len(sides[0]),), (len(sides[1]),)), operands
            self.queue = Operands(*sides, o.scale, o.normalize, one, o.dtype, beside=o)

    @functools.cached_property
    def all(self) -> Block:
        """The matrix."""
        return self.part(slice(0, self.operands.ranks.num_columns))

    def part(self, columns: slice | None) -> Block:
        """Columns of the matrix; None: this rank's own, which are there before the others'."""
        o, keys, at = self.operands, self.keys, columns or self.operands.ranks.own_columns
        return Block(
            self.launch, o.a, o.local_b if columns is None else taken(o.b, at), at.start,
            (o.a_factor, vector(o.b_inverse, at)), (o.a_out, vector(o.b_out, at)),
            (keys.a_key, taken(keys.b_key, at) if keys.ids else keys.b_key), keys.diagonal - at.start,
        )  # fmt: skip

    @functools.cached_property
    def beside(self) -> Block:
        """This rank's rows against the queue's entries of B."""
        o, q, keys = self.operands, self.queue, self.keys
        factors, out = (o.a_factor, q.b_inverse), (o.a_out, q.b_out)
        return Block(self.launch, o.a, q.local_b, None, factors, out, (keys.a_key, keys.queue_b_key))

    @functools.cached_property
    def below(self) -> Block:
        """This rank's columns, in the place of rows, against the queue's entries of A."""
        o, q, keys, own = self.operands, self.queue, self.keys, self.operands.ranks.own_columns
        every = slice(0, q.a.shape[0])
        factors = o.b_inverse[own] * (o.scale * LOG2E.value), vector(q.a_inverse, every)
        out = o.b_out[own], vector(q.a_out, every)
        key = keys.b_key[own] if keys.ids else keys.b_key
        return Block(self.launch, o.local_b, q.a, None, factors, out, (key, keys.queue_a_key))
