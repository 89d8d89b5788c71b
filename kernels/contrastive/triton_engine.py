"""Triton engine of the contrastive losses (see `operator`).

The loss walks over chunks of rows of A. With T = 2·N·M·D floating-point operations, forward and backward take

* P1 (1T), `sums_kernel`: a tile of S = scale · â·b̂ᵀ and, from one exponential, its share of the row and column sums;
* P2 (1T), `gradient_kernel`: the tile again, turned into G = dL/dS (without the loss's common factor) and stored;
* P3, P4 (2T): dA_chunk = G·B and dB += Gᵀ·A, plain products with float32 accumulation, left to torch.

4T and 2·chunk·M bytes. Where N·M elements fit into a stated share of the free memory, P1 stores its exponentials and an
elementwise pass (`convert_kernel`) turns them into G: 3T (`stores_exponentials`). SigLIP needs no sums: 3T.

Exponentials. With |logit| ≤ bound, e = 2^(x - bound·log2(e) + bias) with the largest bias that keeps sums finite serves
rows and columns alike, in float32, as long as the best logit of every row and column stays representable. A lower bound
of those best logits comes from pairing row i with column i (mod M), which costs O(N·D); the device decides from it
between this fixed maximum and maxima per tile, with two exponentials. The host never waits for the answer.

Row norms enter S, G and the gradients as factors in float32, so embeddings are never rounded after a normalisation. In
float16 G is scaled by 4096 and the products P3 and P4 take unit rows instead: G times two inverse norms would leave
float16's range.

Partial sums go to one slot a tile and are added in float64 in a fixed order: results are bit-identical from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    match_ids,
)
from fastclap.kernels.contrastive.triton_kernels import (
    combine_kernel,
    convert_kernel,
    factors_kernel,
    finish_kernel,
    gradient_kernel,
    rows_kernel,
    sigmoid_kernel,
    sums_kernel,
)
from fastclap.kernels.offline import Compilation, signature_and_attrs
from fastclap.kernels.triton_tools import LOG2E, PRECISIONS, TYPE_NAMES, for_architecture

HALF_GAIN = 4096.0  # of G in float16: the target becomes 4096, probabilities down to 1e-11 stay non-zero
STORED_SHARE = 0.25  # of the free memory that stored exponentials may take
ALWAYS_STORED = 256 << 20  # bytes of exponentials that are stored without asking how much memory is free
LOST_BITS = 40  # a term that underflows is below 2^-40 of its row's best
LARGEST_CHUNK = 8448
LARGEST_CHUNK_BYTES = 16 << 30  # reached by a wave of rows beyond a million columns only


@dataclass(frozen=True)
class ProductTile:
    """One configuration of the matrix kernels.

    `registers`: the limit a thread for the forms that are used most, where it lets two programs share an SM without
    a spill in the main loop.
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


def stores_exponentials(num_bytes: int, device: torch.device) -> bool:
    """Whether P1 keeps its exponentials (3T instead of 4T): always up to 256 MiB, else within a quarter of the memory
    that is free or held unused by torch's allocator."""
    if num_bytes <= ALWAYS_STORED:
        return True
    return num_bytes <= STORED_SHARE * _free_memory(device)


def _free_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if torch.cuda.is_current_stream_capturing():  # a capture must not ask the driver
        return held
    return held + torch.cuda.mem_get_info(device)[0]


def _on_device(value: float | Tensor, device: torch.device) -> Tensor:
    """A scalar as a float32 [1]; those of the host are filled in, since a copy could not be captured in a graph."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.detach().to(torch.float32).reshape(1)
    return torch.full((1,), float(value), dtype=torch.float32, device=device)


def _padded(x: Tensor) -> Tensor:
    """Rows in the layout that descriptors need: contiguous, a multiple of 16 columns (zeros change no product)."""
    short = -x.shape[1] % 16
    if short:
        return torch.nn.functional.pad(x, (0, short))
    x = x.contiguous()
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
    """

    def __init__(self, ids: Ids | None, ranks: Ranks, device: torch.device) -> None:
        self.ids = ids is not None
        self.diagonal = ranks.own_rows.start
        self.ranks = ranks
        self.one = torch.ones(1, dtype=torch.float64, device=device)
        self.ratio = self.one
        self.num_rows: int | Tensor = min(ranks.num_rows, ranks.num_columns)
        # Without ids the kernels never look at these.
        self.a_class = self.b_class = torch.empty(1, dtype=torch.int32, device=device)
        self.row_count = self.column_count = self.siblings = torch.empty(1, dtype=torch.int64, device=device)
        if ids is None:
            return
        a_ids, b_ids = (x.to(device, torch.int64, non_blocking=True) for x in ids)
        matches = match_ids((a_ids, b_ids), ranks)
        self.row_count, self.siblings = matches.row_count[ranks.own_rows], matches.sibling_count[ranks.own_rows]
        self.column_count = matches.column_count
        self.num_rows = (matches.row_count > 0).sum()
        self.ratio = (self.num_rows.double() / (self.column_count > 0).sum()).reshape(1)
        # 32-bit classes: equal where ids are equal, so that a tile compares half the bytes.
        values, order = torch.cat([a_ids, matches.b]).sort()
        step = torch.ones_like(values, dtype=torch.int32)
        step[1:] = (values[1:] != values[:-1]).to(torch.int32)
        classes = torch.empty_like(step).scatter_(0, order, step.cumsum(0, dtype=torch.int32))
        self.a_class, self.b_class = classes[: a_ids.shape[0]], classes[a_ids.shape[0] :]

    def weights(self, rows: bool) -> Tensor:
        """Weight of each row of this rank, or of each column, in its direction's mean, relative to that of a row."""
        if self.ids:
            count = self.row_count if rows else self.column_count
            return (count > 0) * (self.one if rows else self.ratio)
        if rows:
            own = self.ranks.own_rows
            return torch.arange(own.start, own.stop, device=self.one.device) < self.ranks.num_columns
        return torch.arange(self.ranks.num_columns, device=self.one.device) < self.ranks.num_rows


class Operands:
    """A and B as the matrix kernels take them: padded rows, their norms, and the factors that make logits of products.

    `b` is gathered over the ranks while the first tiles run on this rank's own block, `local_b`.

    Attributes:
        inverse: whether G carries both inverse norms, so that it multiplies the rows as they are.
        unit: whether it multiplies unit rows (see the module).
        gain: what G is multiplied by.
    """

    def __init__(
        self, a: Tensor, b: Tensor, scale: float | Tensor, normalize: bool, ranks: Ranks, units: float = LOG2E.value
    ) -> None:
        dtype = torch.promote_types(a.dtype, b.dtype)
        self.ranks, self.normalize, self.depth = ranks, normalize, a.shape[1]
        self.unit = normalize and dtype == torch.float16
        self.inverse = normalize and not self.unit
        self.gain = HALF_GAIN if dtype == torch.float16 else 1.0
        self.device = a.device
        self.a, self.local_b = _padded(a.detach().to(dtype)), _padded(b.detach().to(dtype))
        self.scale = _on_device(scale, self.device)
        num_rows, num_columns = a.shape[0], b.shape[0]
        total = max(num_rows, num_columns)
        self.a_norm = torch.empty(num_rows, device=self.device)
        b_norm = torch.empty(num_columns, device=self.device)
        pair = torch.empty(total, device=self.device)
        rows_kernel[(triton.cdiv(total, 8),)](
            self.a, self.local_b, self.a_norm, b_norm, pair, num_rows, num_columns, self.a.shape[1], ROWS=8, DEPTH=256
        )
        self._finish_gather = ranks.start_gather(self.local_b, ranks.b_rows)
        self._b: Tensor | None = None

        size = self.scale.abs()
        if normalize:
            self.a_norm.clamp_(min=NORM_EPS)
            self.a_inverse, b_inverse = self.a_norm.reciprocal(), b_norm.clamp_(min=NORM_EPS).reciprocal()
            steps = torch.arange(total, device=self.device)
            pair *= self.a_inverse[steps % num_rows] if num_rows < total else self.a_inverse
            pair *= b_inverse[steps % num_columns] if num_columns < total else b_inverse
        else:
            self.a_inverse = torch.ones_like(self.a_norm)
            b_inverse = torch.ones_like(b_norm)
            largest = ranks.all_reduce(torch.stack([self.a_norm.amax(), b_norm.amax()]), maximum=True)
            size = size * largest.prod()
        self.a_factor = self.a_inverse * (self.scale * units)
        self.b_inverse = ranks.gather(b_inverse, ranks.b_rows)
        # The fixed maximum: all logits are below `size`; sums stay below 2^126; every row and column has at least the
        # logit of its pair, which must not vanish.
        worst = ranks.all_reduce(size - (pair * self.scale).amin().reshape(1), maximum=True) * LOG2E.value
        bias = 126 - math.ceil(math.log2(max(ranks.num_rows, ranks.num_columns)))
        usable = worst < bias + 126 - LOST_BITS  # False for NaN
        self.shift = torch.cat([size * LOG2E.value - bias, usable.to(torch.float32)])

    @property
    def b(self) -> Tensor:
        """All rows of B, [M, D]; waits (on the device) for those of the other ranks."""
        if self._b is None:
            self._b = self._finish_gather()
        return self._b


class Launch:
    """What all matrix kernels of one call share: a tile and how many programs work on how many rows at a time."""

    def __init__(
        self, arch: int, dtype: torch.dtype, precision: str = "tf32", multiprocessors: int = 0, chunk: int = 0
    ) -> None:
        self.arch, self.precision, self.multiprocessors, self.chunk = arch, precision, multiprocessors, chunk
        self.tile = INTERPRETER_TILE if arch == 0 else for_architecture(TILES, arch)[dtype]

    def constants(self, width: int | None = None) -> dict[str, Any]:
        """Constants and options; `width`: columns of a tile, if not the usual ones."""
        return {
            "BM": self.tile.rows,
            "BN": width or self.tile.columns,
            "BK": self.tile.depth,
            "PRECISION": self.precision,
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
        }

    def form(self, fixed: bool, busy: bool, teacher: bool = False) -> dict[str, Any]:
        """Constants and options of P1 or P2, in the form for the fixed maximum or in that for maxima per tile.

        Args:
            busy: it needs more registers than the limit that lets two programs share an SM: no limit.
            teacher: P2 has a second accumulator, which takes the registers of half a tile.
        """
        # Programs take several tiles in the form that rarely works, so that its exit costs nothing. On sm_100 the loop
        # would spill.
        loop = not fixed and not teacher and self.arch < 100
        limit = {"maxnreg": self.tile.registers} if self.tile.registers and fixed and not busy else {}
        width = self.tile.columns // 2 if teacher else self.tile.columns
        return {**limit, **self.constants(width), "FIXED": fixed, "LOOP": loop}

    def grid(self, tiles: int, form: dict[str, Any]) -> tuple[int]:
        """One program a tile, or as many as run at once."""
        return (min(tiles, 2 * self.multiprocessors) if form["LOOP"] else tiles,)

    def tiles(self, rows: int, columns: int, width: int | None = None) -> int:
        return triton.cdiv(rows, self.tile.rows) * triton.cdiv(columns, width or self.tile.columns)

    def operand(self, x: Tensor, rows: int) -> TensorDescriptor:
        """A or B, as a tile of so many of its rows reads it."""
        return TensorDescriptor.from_tensor(x, [rows, self.tile.depth])

    def half_tiles(self, x: Tensor) -> TensorDescriptor:
        """A chunk of S or G, as the halves of a tile are stored."""
        return TensorDescriptor.from_tensor(x, [self.tile.rows, self.tile.columns // 2])

    def chunks(self, rows: int) -> Iterator[slice]:
        for start in range(0, rows, self.chunk):
            yield slice(start, min(start + self.chunk, rows))


def _launch(operands: Operands) -> Launch:
    a, index = operands.a, operands.device.index
    arch, multiprocessors = dispatch.architecture(index), dispatch.multiprocessors(index)
    precision = PRECISIONS[torch.get_float32_matmul_precision()] if a.dtype == torch.float32 else "tf32"
    chunk = chunk_rows(arch, multiprocessors, a.shape[1], operands.ranks.num_columns * a.element_size())
    return Launch(arch, a.dtype, precision, multiprocessors, chunk)


def _aligned_matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix whose rows start at multiples of 16 bytes, as descriptors need."""
    return torch.empty(rows, -(-columns // 16) * 16, dtype=dtype, device=device)[:, :columns]


class TiledSoftmax:
    """P1: maxima, sums of exponentials and logits of the positives, of all rows of a rank and all columns."""

    def __init__(
        self,
        operands: Operands,
        positives: PositiveKeys,
        launch: Launch,
        two_sided: bool,
        top1: bool,
        stored: Tensor | None,
    ) -> None:
        self.operands, self.positives, self.two_sided = operands, positives, two_sided
        ranks, device = operands.ranks, operands.device
        num_rows, num_columns = operands.a.shape[0], ranks.num_columns
        self.row_maximum = torch.full((num_rows,), -math.inf, device=device)
        self.row_sums = torch.zeros(3, num_rows, dtype=torch.float64, device=device)
        self.column_maximum = torch.full((num_columns,), -math.inf, device=device)
        self.column_sums = torch.zeros(3, num_columns, dtype=torch.float64, device=device)
        # Without ids a row has one positive at most, which needs no sums.
        self.row_logit = torch.full((1 if positives.ids else num_rows,), -math.inf, device=device)
        self.column_logit = self.row_logit
        self.row_top = torch.full((2, num_rows), -math.inf, device=device) if top1 else None
        self.column_top = torch.full((2, num_columns), -math.inf, device=device) if top1 else None
        own = ranks.own_columns
        for at in launch.chunks(num_rows):
            if at.start == 0 and stored is None:
                # Only the first chunk can overlap with the arrival of the other ranks' rows.
                self._add(launch, at, own, operands.local_b, None)
                for part in (slice(0, own.start), slice(own.stop, num_columns)):
                    if part.stop > part.start:
                        self._add(launch, at, part, operands.b[part], None)
            else:
                self._add(launch, at, slice(0, num_columns), operands.b, stored)
        if not two_sided:
            return
        # The columns' sums over the ranks.
        if not positives.ids:
            first = positives.diagonal
            paired = self.row_logit[: max(0, num_columns - first)]
            self.column_logit = torch.full_like(self.column_maximum, -math.inf)
            self.column_logit[first : first + paired.shape[0]] = paired
            ranks.all_reduce(self.column_logit, maximum=True)
        if ranks.group is None:
            return
        maximum = ranks.all_reduce(self.column_maximum.clone(), maximum=True)
        self.column_sums *= torch.exp2(self.column_maximum - maximum).double()
        self.column_maximum = maximum
        ranks.all_reduce(self.column_sums)
        if self.column_top is not None:
            self.column_top = ranks.all_reduce(self.column_top, maximum=True)

    def _add(self, launch: Launch, at: slice, part: slice, b: Tensor, stored: Tensor | None) -> None:
        """The rows `at` against the columns `part`, whose rows of B are `b`."""
        operands, positives, device = self.operands, self.positives, self.operands.device
        rows, columns = at.stop - at.start, part.stop - part.start
        row_tiles, column_tiles = triton.cdiv(rows, launch.tile.rows), 2 * triton.cdiv(columns, launch.tile.columns)
        planes = 4 if positives.ids else 2
        row_parts = torch.empty(planes, column_tiles, rows, device=device)
        column_parts = torch.empty((planes, row_tiles, columns) if self.two_sided else (1,), device=device)
        top1 = self.row_top is not None
        row_tops = torch.empty((2, column_tiles, rows) if top1 else (1,), device=device)
        column_tops = torch.empty((2, row_tiles, columns) if top1 else (1,), device=device)
        a_rows, b_rows = launch.operand(operands.a, launch.tile.rows), launch.operand(b, launch.tile.columns)
        for fixed in (True, False):
            form = launch.form(fixed, positives.ids or top1)
            sums_kernel[launch.grid(launch.tiles(rows, columns), form)](
                a_rows, b_rows, b_rows if stored is None or not fixed else launch.half_tiles(stored[at]),
                operands.a_factor, operands.b_inverse[part],
                positives.a_class, positives.b_class[part] if positives.ids else positives.b_class,
                operands.shift, self.row_logit, row_parts, column_parts, row_tops, column_tops,
                at.start, at.stop, columns, operands.a.shape[1], positives.diagonal - part.start,
                rows, column_tiles * rows, columns, row_tiles * columns,
                IDS=positives.ids, COLUMNS=self.two_sided, STORE=stored is not None and fixed, TOP1=top1, **form,
            )  # fmt: skip
        self._combine(row_parts, self.row_maximum, self.row_sums, at.start)
        if self.two_sided:
            self._combine(column_parts, self.column_maximum, self.column_sums, part.start)
        if self.row_top is not None and self.column_top is not None:
            self.row_top[:, at] = torch.maximum(self.row_top[:, at], row_tops.amax(1))
            if self.two_sided:
                self.column_top[:, part] = torch.maximum(self.column_top[:, part], column_tops.amax(1))

    def _combine(self, parts: Tensor, maximum: Tensor, sums: Tensor, first: int) -> None:
        _, tiles, length = parts.shape
        combine_kernel[(triton.cdiv(length, 32),)](
            parts, self.operands.shift, maximum, sums, length, tiles, length, tiles * length, sums.shape[1], first,
            IDS=self.positives.ids, LOGITS=sums is self.row_sums, TILES=64, WIDTH=32,
        )  # fmt: skip

    def factors(self, hard: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Factors of the rows [5, N] and columns [5, M] for P2, and their terms of the loss, [N] and [M] float64."""
        positives, device = self.positives, self.operands.device
        num_rows, num_columns = self.row_maximum.shape[0], self.column_maximum.shape[0]
        row, row_terms = torch.empty(5, num_rows, device=device), self.row_sums.new_empty(num_rows)
        column, column_terms = torch.empty(5, num_columns, device=device), self.row_sums.new_zeros(num_columns)
        factors_kernel[(triton.cdiv(num_rows, 256),)](
            self.row_maximum, self.row_sums, self.row_logit, positives.row_count, positives.siblings, positives.one,
            positives.ratio, row, row_terms, num_rows, positives.diagonal, positives.ranks.num_columns, hard,
            IDS=positives.ids, LOGITS=True, TWO_SIDED=self.two_sided, WIDTH=256,
        )  # fmt: skip
        if self.two_sided:
            factors_kernel[(triton.cdiv(num_columns, 256),)](
                self.column_maximum, self.column_sums, self.column_logit, positives.column_count, positives.siblings,
                positives.ratio, positives.one, column, column_terms, num_columns, 0, positives.ranks.num_rows, hard,
                IDS=positives.ids, LOGITS=False, TWO_SIDED=True, WIDTH=256,
            )  # fmt: skip
        return row, column, row_terms, column_terms

    def top1(self) -> Tensor:
        """Share of the rows (and columns) whose best match is one of their positives, [2] float32."""
        assert self.row_top is not None and self.column_top is not None
        positives, ranks = self.positives, self.operands.ranks
        hit = (self.row_top[1] >= self.row_top[0]).sum().double().reshape(1)
        rows = ranks.all_reduce(hit) / positives.num_rows
        if not self.two_sided:
            return torch.cat([rows, torch.full_like(rows, math.nan)]).float()
        columns = (self.column_top[1] >= self.column_top[0]).sum().double().reshape(1)
        columns = columns / (positives.num_rows / positives.ratio)
        return torch.cat([rows, columns]).float()


class EmbeddingGradients:
    """P3 and P4, and the way back through the normalisation."""

    def __init__(self, operands: Operands, need: Need) -> None:
        self.operands, self.need = operands, need
        self.by_rows = need.a or (need.scale and not need.b)
        self.a_rows, self.b_rows = operands.a, operands.b
        if operands.unit:
            self.a_rows = (operands.a * operands.a_inverse[:, None]).to(torch.float16)
            self.b_rows = (operands.b * operands.b_inverse[:, None]).to(torch.float16)
        num_rows, depth, device = operands.a.shape[0], operands.depth, operands.device
        # bfloat16 gradients keep their dtype; float16 ones would underflow before a loss scale reaches them.
        self.dtype = torch.bfloat16 if operands.a.dtype == torch.bfloat16 else torch.float32
        self.along = torch.empty(num_rows if self.by_rows else operands.local_b.shape[0], device=device)
        self.a = torch.empty(num_rows, depth, dtype=self.dtype, device=device) if need.a else None
        self.b = torch.zeros_like(self.b_rows, dtype=torch.float32) if need.b else None

    def add(self, at: slice, g: Tensor, alpha: Tensor, correction: Tensor | None = None) -> None:
        """Adds a chunk of G; `correction` [c, D] belongs to its G·B, for unit rows."""
        operands, a = self.operands, self.a_rows[at]
        if self.b is not None:
            _multiply(g.t(), a, self.b)
        if self.by_rows:
            raw = _multiply(g, self.b_rows)
            if correction is not None:
                factor = operands.gain if operands.unit else operands.gain * operands.a_inverse[at, None]
                raw[:, : operands.depth] += correction * factor
            out = self.a[at] if self.a is not None else raw
            self._normalize_backward(raw, a, operands.a_inverse[at], alpha, out, self.along[at])

    def _normalize_backward(
        self, raw: Tensor, x: Tensor, inverse: Tensor, alpha: Tensor, out: Tensor, along: Tensor
    ) -> None:
        one = torch.ones_like(inverse)
        after, square = (inverse, one) if self.operands.unit else (one, inverse * inverse)
        finish_kernel[(triton.cdiv(raw.shape[0], 4),)](
            raw, x, after, square, alpha / self.operands.gain, out, along,
            raw.shape[0], out.shape[1], raw.shape[1], NORMALIZE=self.operands.normalize, ROWS=4, DEPTH=256,
        )  # fmt: skip

    def finish(self, alpha: Tensor, unit: Tensor, correction: Tensor | None = None) -> Gradients:
        """(da, db, dscale); alpha is the factor of all gradients of embeddings, unit that of the loss."""
        operands, ranks = self.operands, self.operands.ranks
        db = None
        if self.b is not None:
            raw, own, inverse = self.b, ranks.own_columns, operands.b_inverse
            if correction is not None:
                raw[:, : operands.depth] += correction * (
                    operands.gain if operands.unit else operands.gain * inverse[:, None]
                )
            raw = ranks.scatter_sum(raw, ranks.b_rows)
            db = torch.empty(raw.shape[0], operands.depth, dtype=self.dtype, device=raw.device)
            along = self.along if not self.by_rows else torch.empty_like(inverse[own])
            self._normalize_backward(raw, self.b_rows[own], inverse[own], alpha, db, along)
        dscale = None
        if self.need.scale:
            dscale = ranks.all_reduce(self.along.sum(dtype=torch.float64) / operands.gain) * unit
        return self.a, db, dscale


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
    if queue is not None or contrast.debias or contrast.guide_margin is not None:
        raise ValueError("backend='triton' has no queue, debias or guide_margin yet; use backend='torch'")
    two_sided, normalize, teacher_weight = contrast.direction == "both", contrast.normalize, contrast.teacher_weight
    positives = PositiveKeys(ids, ranks, a.device)
    operands = Operands(a, b, scale, normalize, ranks)
    launch = _launch(operands)
    num_rows, num_columns, dtype = a.shape[0], ranks.num_columns, operands.a.dtype
    stored = None
    # float16 cannot hold the exponentials, and with several positives a rounded e no longer cancels against their mean.
    storable = any(need) and teacher is None and dtype != torch.float16 and not positives.ids
    if storable and stores_exponentials(num_rows * num_columns * dtype.itemsize, a.device):
        stored = _aligned_matrix(num_rows, num_columns, dtype, a.device)
    softmax = TiledSoftmax(operands, positives, launch, two_sided, top1, stored)
    hard = (1 - teacher_weight) * (1 - contrast.label_smoothing)
    smooth = (1 - teacher_weight) * contrast.label_smoothing
    row, column, row_terms, column_terms = softmax.factors(hard)
    total, columns_part = row_terms.sum(), column_terms.sum()

    unit = (0.5 if two_sided else 1.0) * positives.one[0] / positives.num_rows
    alpha = (unit * ranks.size * operands.scale.double()).float().reshape(1)
    smoothing = None
    if smooth:
        a_hat, b_hat = a.detach().float(), operands.b[:, : operands.depth].float()
        if normalize:
            a_hat, b_hat = a_hat * operands.a_inverse[:, None], b_hat * operands.b_inverse[:, None]
        row_weight = positives.weights(rows=True).double()
        column_weight = positives.weights(rows=False).double() * (1.0 if two_sided else 0.0)
        smoothing = LabelSmoothing(a_hat, b_hat, operands.scale[0], ranks, row_weight, column_weight, smooth)
        total = total + smoothing.loss()

    t_operands, t_row, t_column = operands, row, column
    losses = torch.empty(1, device=a.device)
    if teacher is not None:
        t_operands = Operands(teacher[0].to(dtype), teacher[1].to(dtype), teacher[2], normalize, ranks)
        t_softmax = TiledSoftmax(t_operands, positives, launch, two_sided, False, None)
        t_row, t_column, t_row_terms, t_column_terms = t_softmax.factors(0.0)
        total = total - teacher_weight * t_row_terms.sum()
        columns_part = columns_part - teacher_weight * t_column_terms.sum()
        t_row[1] *= teacher_weight
        t_column[1] *= teacher_weight

    gradients = EmbeddingGradients(operands, need) if any(need) else None
    if gradients is not None or teacher is not None:
        # With stored exponentials the form for the fixed maximum is `convert_kernel`; with a teacher there is but one.
        forms = [
            launch.form(fixed, positives.ids, teacher is not None)
            for fixed in ((True, False) if stored is None and teacher is None else (False,))
        ]
        width = forms[0]["BN"]
        buffer = stored
        if buffer is None:
            buffer = _aligned_matrix(min(launch.chunk, num_rows), num_columns, dtype, a.device)
        a_rows, b_rows = launch.operand(operands.a, launch.tile.rows), launch.operand(operands.b, width)
        t_rows, t_columns = launch.operand(t_operands.a, launch.tile.rows), launch.operand(t_operands.b, width)
        for at in launch.chunks(num_rows):
            rows = at.stop - at.start
            g = buffer[at] if stored is not None else buffer[:rows]
            tiles = launch.tiles(rows, num_columns, width)
            if teacher is not None:
                losses = torch.empty(tiles, launch.tile.rows, device=a.device)
            chunk = launch.half_tiles(g)
            if stored is not None:
                convert_kernel[(launch.tiles(rows, 2 * num_columns),)](
                    chunk, operands.a_inverse, operands.b_inverse, operands.shift, row, column,
                    at.start, at.stop, num_columns, positives.diagonal, num_rows, num_columns,
                    BM=launch.tile.rows, BN=launch.tile.columns // 2, COLUMNS=two_sided, INVERSE=operands.inverse,
                    num_warps=launch.tile.warps,
                )  # fmt: skip
            for form in forms:
                gradient_kernel[launch.grid(tiles, form)](
                    a_rows, b_rows, chunk,
                    operands.a_factor, operands.b_inverse, operands.a_inverse,
                    positives.a_class, positives.b_class, operands.shift, row, column,
                    t_rows, t_columns, t_operands.a_factor, t_operands.b_inverse, t_row, t_column, losses,
                    at.start, at.stop, num_columns, operands.a.shape[1], t_operands.a.shape[1], positives.diagonal,
                    num_rows, num_columns, operands.gain,
                    IDS=positives.ids, COLUMNS=two_sided, INVERSE=operands.inverse, TEACHER=teacher is not None, **form,
                )  # fmt: skip
            if teacher is not None:
                total = total + losses.sum(dtype=torch.float64)
            if gradients is not None:
                gradients.add(at, g, alpha, None if smoothing is None else smoothing.row_gradient(at))

    loss = (unit * (ranks.all_reduce(total.clone()) + columns_part)).float()
    shares = softmax.top1() if top1 else None
    if gradients is None:
        return loss, (), shares
    correction = None
    if smoothing is not None and gradients.b is not None:
        correction = smoothing.column_gradient()
    return loss, gradients.finish(alpha, unit, correction), shares


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
    device = a.device
    positives = PositiveKeys(ids, ranks, device)
    operands = Operands(a, b, scale, normalize, ranks, units=1.0)
    launch = _launch(operands)
    num_rows, num_columns, dtype = a.shape[0], ranks.num_columns, operands.a.dtype
    factor = 1.0 / ranks.num_rows
    alpha = operands.scale * (factor * ranks.size)
    gradients = EmbeddingGradients(operands, need) if any(need) else None
    shift = _on_device(bias, device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # the loss and dbias
    a_rows, b_rows = launch.operand(operands.a, launch.tile.rows), launch.operand(operands.b, launch.tile.columns)
    buffer = _aligned_matrix(min(launch.chunk, num_rows), num_columns, dtype, device) if any(need) else None
    for at in launch.chunks(num_rows):
        rows = at.stop - at.start
        tiles = launch.tiles(rows, num_columns)
        shares = torch.zeros(2, 2 * tiles, device=device)
        sigmoid_kernel[(tiles,)](
            a_rows, b_rows, b_rows if buffer is None else launch.half_tiles(buffer[:rows]),
            operands.a_factor, operands.b_inverse, operands.a_inverse,
            positives.a_class, positives.b_class, shift, shares[0], shares[1],
            at.start, at.stop, num_columns, operands.a.shape[1], positives.diagonal, operands.gain,
            IDS=positives.ids, INVERSE=operands.inverse, GRADIENT=any(need), **launch.constants(),
        )  # fmt: skip
        sums += shares.sum(1, dtype=torch.float64)
        if gradients is not None and buffer is not None and (gradients.by_rows or need.b):
            gradients.add(at, buffer[:rows], alpha)
    loss, dbias = ranks.all_reduce(sums) * factor
    if gradients is None:
        return loss.float(), (), None
    unit = torch.full((), factor, dtype=torch.float64, device=device)
    return loss.float(), (*gradients.finish(alpha, unit), dbias if need.bias else None), None


def compilations(arch: int) -> Iterator[Compilation]:
    """Every (kernel, configuration, dtype, flags) that the launchers may pick on an architecture."""
    both = (False, True)
    for dtype in TILES[90]:
        name, half = TYPE_NAMES[dtype], dtype == torch.float16
        for precision in ("tf32x3", "tf32") if dtype == torch.float32 else ("tf32",):
            label = f"{name} {precision}" if dtype == torch.float32 else name
            launch = Launch(arch, dtype, precision)
            for ids, columns, store, top1, fixed in product(both, both, both, both, both):
                if not (store and (ids or half or not fixed)):
                    flags = {"IDS": ids, "COLUMNS": columns, "STORE": store, "TOP1": top1, "FIXED": fixed}
                    yield _compilation("sums", sums_kernel, label, name, launch.form(fixed, ids or top1), flags)
            for ids, columns, inverse, teacher, fixed in product(both, both, both, both, both):
                if not ((teacher and fixed) or (inverse and half)):
                    flags = {"IDS": ids, "COLUMNS": columns, "INVERSE": inverse, "TEACHER": teacher, "FIXED": fixed}
                    form = launch.form(fixed, ids, teacher)
                    yield _compilation("gradient", gradient_kernel, label, name, form, flags)
            for ids, inverse, gradient in product(both, both, both):
                if not (inverse and half):
                    flags = {"IDS": ids, "INVERSE": inverse, "GRADIENT": gradient}
                    yield _compilation("sigmoid", sigmoid_kernel, label, name, launch.constants(), flags)
        tile = Launch(arch, dtype).tile
        for columns, inverse in product(both, both):
            if not half:
                options = {"BM": tile.rows, "BN": tile.columns // 2, "num_warps": tile.warps}
                flags = {"COLUMNS": columns, "INVERSE": inverse}
                yield _compilation("convert", convert_kernel, name, name, options, flags)
        yield _compilation("rows", rows_kernel, name, name, {"ROWS": 8, "DEPTH": 256}, {})
        for normalize in both:
            options = {"ROWS": 4, "DEPTH": 256}
            yield _compilation("finish", finish_kernel, name, name, options, {"NORMALIZE": normalize})
    for ids, logits in product(both, both):
        options = {"TILES": 64, "WIDTH": 32}
        yield _compilation("combine", combine_kernel, "", "fp32", options, {"IDS": ids, "LOGITS": logits})
    for ids, (logits, two_sided) in product(both, ((True, True), (True, False), (False, True))):
        flags = {"IDS": ids, "LOGITS": logits, "TWO_SIDED": two_sided}
        yield _compilation("factors", factors_kernel, "", "fp32", {"WIDTH": 256}, flags)


def _compilation(
    kind: str, function: Any, label: str, dtype: str, launch: dict[str, Any], flags: dict[str, bool]
) -> Compilation:
    constants = dict(launch)
    warps, stages = constants.pop("num_warps", 4), constants.pop("num_stages", 3)  # else Triton's defaults
    maxnreg = constants.pop("maxnreg", None)
    constexprs = {**constants, **flags}
    gradient = "bf16" if dtype == "bf16" else "fp32"
    types = dict.fromkeys(("hard", "gain"), "fp32")
    types |= dict.fromkeys(("a_class", "b_class"), "*i32") | dict.fromkeys(("count", "siblings"), "*i64")
    types |= dict.fromkeys(("sums", "ratio", "other_ratio", "terms"), "*fp64")
    if kind == "rows":
        types |= {"a": f"*{dtype}", "b": f"*{dtype}"}
    elif kind == "finish":
        types |= {"x": f"*{dtype}", "out": f"*{gradient}"}
    elif "BM" in constants:
        left = f"tensordesc<{dtype}[{constants['BM']}, {constants.get('BK', 0)}]>"
        right = f"tensordesc<{dtype}[{constants['BN']}, {constants.get('BK', 0)}]>"
        halved = "BK" in constants and not flags.get("TEACHER")
        chunk = f"tensordesc<{dtype}[{constants['BM']}, {constants['BN'] // (2 if halved else 1)}]>"
        types |= {"a": left, "ta": left, "b": right, "tb": right, "g": chunk, "e": chunk}
        if kind == "sums" and not flags["STORE"]:
            types["e"] = right
        if kind == "sigmoid" and not flags["GRADIENT"]:
            types["g"] = right
    signature, attrs = signature_and_attrs(function, types, constexprs)
    name = " ".join([kind, *label.split(), *(flag.lower() for flag, value in flags.items() if value)])
    return Compilation(name, function, signature, constexprs, attrs, warps, stages, "BK" in constants, maxnreg)
