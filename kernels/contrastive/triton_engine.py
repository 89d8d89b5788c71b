"""Triton engine of the contrastive losses (see `fastclap.kernels.contrastive.operator` for the definitions).

The loss walks over chunks of rows of A. With T = 2·N·M·D floating-point operations, forward and backward take

* P1 (1T), `_sums_kernel`: a tile of S = scale · â·b̂ᵀ and, from one exponential, its share of the row and column sums;
* P2 (1T), `_gradient_kernel`: the tile again, turned into G = dL/dS (without the loss's common factor) and stored;
* P3, P4 (2T): dA_chunk = G·B and dB += Gᵀ·A, plain products with float32 accumulation, left to torch.

4T and 2·chunk·M bytes. Where N·M elements fit into a stated share of the free memory, P1 stores its exponentials and an
elementwise pass (`_convert_kernel`) turns them into G: 3T (`stores_exponentials`). SigLIP needs no sums: 3T.

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
from fastclap.kernels.contrastive.shared import NORM_EPS, Gradients, Need, Ranks, Teacher, occurrences
from fastclap.kernels.contrastive.torch_engine import LabelSmoothing
from fastclap.kernels.contrastive.triton_kernels import (
    LOG2E,
    _combine_kernel,
    _convert_kernel,
    _factors_kernel,
    _finish_kernel,
    _gradient_kernel,
    _rows_kernel,
    _sigmoid_kernel,
    _sums_kernel,
)
from fastclap.kernels.offline import Compilation, signature_and_attrs

HALF_GAIN = 4096.0  # of G in float16: the target becomes 4096, probabilities down to 1e-11 stay non-zero
STORED_SHARE = 0.25  # of the free memory that stored exponentials may take
ALWAYS_STORED = 256 << 20  # bytes of exponentials that are stored without asking how much memory is free
LOST_BITS = 40  # a term that underflows is below 2^-40 of its row's best
LARGEST_CHUNK = 8448
LARGEST_CHUNK_BYTES = 16 << 30  # reached by a wave of rows beyond a million columns only


@dataclass(frozen=True)
class Tile:
    """One configuration of the matrix kernels.

    ``registers``: the limit a thread for the forms that are used most, where it lets two programs share an SM without
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
TILES: dict[int, dict[torch.dtype, Tile]] = {
    80: {
        torch.bfloat16: Tile(128, 128, 32, 8, 3),
        torch.float16: Tile(128, 128, 32, 8, 3),
        torch.float32: Tile(64, 64, 32, 4, 2),
    },
    90: {
        torch.bfloat16: Tile(128, 128, 64, 8, 3, registers=128),
        torch.float16: Tile(128, 128, 64, 8, 3, registers=128),
        torch.float32: Tile(64, 128, 32, 4, 3),
    },
    100: {
        torch.bfloat16: Tile(128, 128, 64, 8, 3),
        torch.float16: Tile(128, 128, 64, 8, 3),
        torch.float32: Tile(64, 64, 32, 4, 2),
    },
}
INTERPRETER_TILE = Tile(32, 32, 32, 4, 1)
PRECISIONS = {"highest": "tf32x3", "high": "tf32", "medium": "tf32"}


def tile_for(arch: int, dtype: torch.dtype) -> Tile:
    """The configuration for an architecture: that of the nearest one below it."""
    if arch == 0:
        return INTERPRETER_TILE
    known = [a for a in TILES if a <= arch]
    if not known:
        raise RuntimeError(f"the Triton losses need compute capability 8.0 or later, this GPU has {arch / 10}")
    return TILES[max(known)][dtype]


def chunk_rows(arch: int, multiprocessors: int, depth: int, row_bytes: int = 0) -> int:
    """Rows of A at a time: G·B and Gᵀ·A then fill one wave of 128×256 tiles (8448 / 5632 / 4224 rows at D = 512 / 768 /
    1024 on 132 multiprocessors). Where rows of the matrix are so long, ``row_bytes``, that a chunk would take more than
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


def _mm(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with float32 accumulation and result."""
    if left.dtype == torch.float32 or left.device.type != "cuda":
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def _addmm_(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == torch.float32 or left.device.type != "cuda":
        total.addmm_(left.float(), right.float())
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


class Positives:
    """Which pairs are positives, on the device: keys to compare and counts to weight by. Nothing waits for the host.

    Without ids row i's positive is column i + diagonal and there are no tensors at all.
    """

    def __init__(self, ranks: Ranks, a_ids: Tensor | None, b_ids: Tensor | None, device: torch.device) -> None:
        self.ids = a_ids is not None and b_ids is not None
        self.diagonal = ranks.a_offset
        self.total_rows, self.total_columns = sum(ranks.a_rows), sum(ranks.b_rows)
        self.one = torch.ones(1, dtype=torch.float64, device=device)
        self.ratio = self.one
        self.num_rows: int | Tensor = min(self.total_rows, self.total_columns)
        # Without ids the kernels never look at these.
        self.a_class = self.b_class = torch.empty(1, dtype=torch.int32, device=device)
        self.row_count = self.column_count = self.siblings = torch.empty(1, dtype=torch.int64, device=device)
        if a_ids is None or b_ids is None:
            return
        a_all = ranks.gather(a_ids.to(device, torch.int64, non_blocking=True), ranks.a_rows)
        b_all = ranks.gather(b_ids.to(device, torch.int64, non_blocking=True), ranks.b_rows)
        local = slice(ranks.a_offset, ranks.a_offset + ranks.a_rows[ranks.rank])
        sorted_a, sorted_b = a_all.sort().values, b_all.sort().values
        row_count = occurrences(sorted_b, a_all)
        self.row_count = row_count[local].contiguous()
        self.column_count = occurrences(sorted_a, b_all)
        self.siblings = occurrences(sorted_a, a_all[local])
        self.num_rows = (row_count > 0).sum()
        self.ratio = (self.num_rows.double() / (self.column_count > 0).sum()).reshape(1)
        # 32-bit classes: equal where ids are equal, so that a tile compares half the bytes.
        values, order = torch.cat([a_all[local], b_all]).sort()
        step = torch.ones_like(values, dtype=torch.int32)
        step[1:] = (values[1:] != values[:-1]).to(torch.int32)
        classes = torch.empty_like(step).scatter_(0, order, step.cumsum(0, dtype=torch.int32))
        self.a_class, self.b_class = classes[: a_ids.shape[0]], classes[a_ids.shape[0] :]


class Operands:
    """A and B as the matrix kernels take them: padded rows, their norms, and the factors that make logits of products.

    ``b`` is gathered over the ranks while the first tiles run on this rank's own block: `parts` lists the blocks in the
    order of their arrival.
    """

    def __init__(
        self, a: Tensor, b: Tensor, scale: float | Tensor, normalize: bool, ranks: Ranks, units: float = LOG2E.value
    ) -> None:
        dtype = torch.promote_types(a.dtype, b.dtype)
        self.ranks, self.normalize, self.depth = ranks, normalize, a.shape[1]
        self.device = a.device
        self.a, local_b = _padded(a.detach().to(dtype)), _padded(b.detach().to(dtype))
        self.scale = _on_device(scale, self.device)
        num_rows, num_columns = a.shape[0], b.shape[0]
        total = max(num_rows, num_columns)
        self.a_norm = torch.empty(num_rows, device=self.device)
        b_norm = torch.empty(num_columns, device=self.device)
        pair = torch.empty(total, device=self.device)
        _rows_kernel[(triton.cdiv(total, 8),)](
            self.a, local_b, self.a_norm, b_norm, pair, num_rows, num_columns, self.a.shape[1], ROWS=8, DEPTH=256
        )
        gathered, self._arrival = ranks.gather_async(local_b, ranks.b_rows)
        self._gathered = gathered
        offset = ranks.b_offset
        own = slice(offset, offset + num_columns)
        self.num_columns = sum(ranks.b_rows)
        self.parts = [own]
        for other in (slice(0, offset), slice(own.stop, self.num_columns)):
            if other.stop > other.start:
                self.parts.append(other)
        self.local_b, self._b = local_b, None if ranks.group is not None else local_b

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
            largest = ranks.max_(torch.stack([self.a_norm.amax(), b_norm.amax()]))
            size = size * largest.prod()
        self.a_factor = self.a_inverse * (self.scale * units)
        self.b_inverse = ranks.gather(b_inverse, ranks.b_rows)
        # The fixed maximum: all logits are below `size`; sums stay below 2^126; every row and column has at least the
        # logit of its pair, which must not vanish.
        worst = ranks.max_(size - (pair * self.scale).amin().reshape(1)) * LOG2E.value
        bias = 126 - math.ceil(math.log2(max(sum(ranks.a_rows), self.num_columns)))
        usable = worst < bias + 126 - LOST_BITS  # False for NaN
        self.shift = torch.cat([size * LOG2E.value - bias, usable.to(torch.float32)])

    @property
    def b(self) -> Tensor:
        """All rows of B, [M, D]; waits (on the device) for those of the other ranks."""
        if self._b is None:
            self._b = self._arrival(self._gathered)
        return self._b

    def block(self, part: slice) -> Tensor:
        """Rows of B: this rank's own ones without waiting for the others."""
        return self.local_b if part == self.parts[0] else self.b[part]

    def unit_rows(self) -> tuple[Tensor, Tensor]:
        """What P3 and P4 multiply by: the rows themselves, or in float16 unit rows (see the module)."""
        if self.a.dtype != torch.float16 or not self.normalize:
            return self.a, self.b
        return (
            (self.a * self.a_inverse[:, None]).to(torch.float16),
            (self.b * self.b_inverse[:, None]).to(torch.float16),
        )


@dataclass(frozen=True)
class Launch:
    """What all matrix kernels of one call share."""

    tile: Tile
    precision: str
    chunk: int
    multiprocessors: int
    arch: int

    def loops(self, fixed: bool, teacher: bool = False) -> bool:
        """Whether programs take several tiles: in the form that rarely works, so that its exit costs nothing.

        On sm_100 the loop would spill.
        """
        return not fixed and not teacher and self.arch < 100

    def constants(self, columns: int | None = None, lean: bool = False) -> dict[str, Any]:
        """Constants and options; ``lean``: with the tile's limit on registers."""
        return {
            **({"maxnreg": self.tile.registers} if lean and self.tile.registers else {}),
            "BM": self.tile.rows,
            "BN": columns or self.tile.columns,
            "BK": self.tile.depth,
            "PRECISION": self.precision,
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
        }

    def width(self, teacher: bool) -> int:
        """Columns of a tile of P2: a teacher's second accumulator takes the registers of half a tile."""
        return self.tile.columns // 2 if teacher else self.tile.columns

    def tiles(self, rows: int, columns: int, width: int | None = None) -> int:
        return triton.cdiv(rows, self.tile.rows) * triton.cdiv(columns, width or self.tile.columns)

    def grid(self, tiles: int, loops: bool) -> tuple[int]:
        """One program a tile, or as many as run at once."""
        return (min(tiles, 2 * self.multiprocessors) if loops else tiles,)

    def rows_of(self, x: Tensor) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x, [self.tile.rows, self.tile.depth])

    def columns_of(self, x: Tensor, width: int | None = None) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x, [width or self.tile.columns, self.tile.depth])

    def chunk_of(self, x: Tensor) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x, [self.tile.rows, self.tile.columns // 2])

    def chunks(self, rows: int) -> Iterator[slice]:
        for start in range(0, rows, self.chunk):
            yield slice(start, min(start + self.chunk, rows))


def _launch(operands: Operands) -> Launch:
    index = dispatch.index_of(operands.device)
    arch, multiprocessors = dispatch.architecture(index), dispatch.multiprocessors(index)
    precision = "tf32"
    if operands.a.dtype == torch.float32:
        precision = PRECISIONS[torch.get_float32_matmul_precision()]
    chunk = chunk_rows(arch, multiprocessors, operands.a.shape[1], operands.b.shape[0] * operands.a.element_size())
    return Launch(tile_for(arch, operands.a.dtype), precision, chunk, multiprocessors, arch)


def _lean(fixed: bool, busy: bool) -> bool:
    return fixed and not busy


def _rows_by_columns(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix whose rows start at multiples of 16 bytes, as descriptors need."""
    return torch.empty(rows, -(-columns // 16) * 16, dtype=dtype, device=device)[:, :columns]


class Softmaxes:
    """P1: maxima, sums of exponentials and logits of the positives, of all rows of a rank and all columns."""

    def __init__(
        self,
        operands: Operands,
        positives: Positives,
        launch: Launch,
        two_sided: bool,
        top1: bool,
        stored: Tensor | None,
    ) -> None:
        self.operands, self.positives, self.two_sided = operands, positives, two_sided
        num_rows, num_columns, device = operands.a.shape[0], operands.num_columns, operands.device
        self.row_maximum = torch.full((num_rows,), -math.inf, device=device)
        self.row_sums = torch.zeros(3, num_rows, dtype=torch.float64, device=device)
        self.column_maximum = torch.full((num_columns,), -math.inf, device=device)
        self.column_sums = torch.zeros(3, num_columns, dtype=torch.float64, device=device)
        # Without ids a row has one positive at most, which needs no sums.
        self.row_logit = torch.full((1 if positives.ids else num_rows,), -math.inf, device=device)
        self.column_logit = self.row_logit
        self.row_top = torch.full((2, num_rows), -math.inf, device=device) if top1 else None
        self.column_top = torch.full((2, num_columns), -math.inf, device=device) if top1 else None
        for index, at in enumerate(launch.chunks(num_rows)):
            # Only the first chunk can overlap with the arrival of the other ranks' rows.
            if index == 0 and stored is None:
                for part in operands.parts:
                    self._add(launch, at, part, operands.block(part), None)
            else:
                self._add(launch, at, slice(0, num_columns), operands.b, stored)
        self._reduce()

    def _add(self, launch: Launch, at: slice, part: slice, b: Tensor, stored: Tensor | None) -> None:
        operands, positives, device = self.operands, self.positives, self.operands.device
        rows, columns = at.stop - at.start, part.stop - part.start
        row_tiles, column_tiles = triton.cdiv(rows, launch.tile.rows), 2 * triton.cdiv(columns, launch.tile.columns)
        planes = 4 if positives.ids else 2
        row_parts = torch.empty(planes, column_tiles, rows, device=device)
        column_parts = torch.empty((planes, row_tiles, columns) if self.two_sided else (1,), device=device)
        top1 = self.row_top is not None
        row_tops = torch.empty((2, column_tiles, rows) if top1 else (1,), device=device)
        column_tops = torch.empty((2, row_tiles, columns) if top1 else (1,), device=device)
        b_rows = launch.columns_of(b)
        for fixed in (True, False):
            loops = launch.loops(fixed)
            _sums_kernel[launch.grid(launch.tiles(rows, columns), loops)](
                launch.rows_of(operands.a), b_rows,
                b_rows if stored is None or not fixed else launch.chunk_of(stored[at]),
                operands.a_factor, operands.b_inverse[part],
                positives.a_class, positives.b_class[part] if positives.ids else positives.b_class,
                operands.shift, self.row_logit, row_parts, column_parts, row_tops, column_tops,
                at.start, at.stop, columns, operands.a.shape[1], positives.diagonal - part.start,
                rows, column_tiles * rows, columns, row_tiles * columns,
                IDS=positives.ids, COLUMNS=self.two_sided, STORE=stored is not None and fixed, TOP1=top1, FIXED=fixed,
                LOOP=loops,
                **launch.constants(lean=_lean(fixed, positives.ids or top1)),
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
        _combine_kernel[(triton.cdiv(length, 32),)](
            parts, self.operands.shift, maximum, sums, length, tiles, length, tiles * length, sums.shape[1], first,
            IDS=self.positives.ids, LOGITS=sums is self.row_sums, TILES=64, WIDTH=32,
        )  # fmt: skip

    def _reduce(self) -> None:
        """Completes the columns' sums over the ranks."""
        ranks = self.operands.ranks
        if not self.two_sided:
            return
        if not self.positives.ids:
            first, count = ranks.a_offset, self.column_maximum.shape[0]
            paired = self.row_logit[: max(0, count - first)]
            self.column_logit = torch.full_like(self.column_maximum, -math.inf)
            self.column_logit[first : first + paired.shape[0]] = paired
            ranks.max_(self.column_logit)
        if ranks.group is None:
            return
        maximum = ranks.max_(self.column_maximum.clone())
        self.column_sums *= torch.exp2(self.column_maximum - maximum).double()
        self.column_maximum = maximum
        ranks.sum_(self.column_sums)
        if self.column_top is not None:
            self.column_top = ranks.max_(self.column_top)

    def factors(self, hard: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Factors of the rows [5, N] and columns [5, M] for P2, and their terms of the loss, [N] and [M] float64."""
        positives, device = self.positives, self.operands.device
        num_rows, num_columns = self.row_maximum.shape[0], self.column_maximum.shape[0]
        row, row_terms = torch.empty(5, num_rows, device=device), self.row_sums.new_empty(num_rows)
        column, column_terms = torch.empty(5, num_columns, device=device), self.row_sums.new_zeros(num_columns)
        _factors_kernel[(triton.cdiv(num_rows, 256),)](
            self.row_maximum, self.row_sums, self.row_logit, positives.row_count, positives.siblings, positives.one,
            positives.ratio, row, row_terms, num_rows, positives.diagonal, positives.total_columns, hard,
            IDS=positives.ids, LOGITS=True, TWO_SIDED=self.two_sided, WIDTH=256,
        )  # fmt: skip
        if self.two_sided:
            _factors_kernel[(triton.cdiv(num_columns, 256),)](
                self.column_maximum, self.column_sums, self.column_logit, positives.column_count, positives.siblings,
                positives.ratio, positives.one, column, column_terms, num_columns, 0, positives.total_rows, hard,
                IDS=positives.ids, LOGITS=False, TWO_SIDED=True, WIDTH=256,
            )  # fmt: skip
        return row, column, row_terms, column_terms

    def top1(self) -> Tensor:
        """Share of the rows (and columns) whose best match is one of their positives, [2] float32."""
        assert self.row_top is not None and self.column_top is not None
        positives, ranks = self.positives, self.operands.ranks
        hit = (self.row_top[1] >= self.row_top[0]).sum().double().reshape(1)
        rows = ranks.sum_(hit) / positives.num_rows
        if not self.two_sided:
            return torch.cat([rows, torch.full_like(rows, math.nan)]).float()
        columns = (self.column_top[1] >= self.column_top[0]).sum().double().reshape(1)
        columns = columns / (positives.num_rows / positives.ratio)
        return torch.cat([rows, columns]).float()


class GradientSums:
    """P3 and P4, and the way back through the normalisation."""

    def __init__(self, operands: Operands, need: Need, gain: float) -> None:
        self.operands, self.need, self.gain = operands, need, gain
        self.by_rows = need.a or (need.scale and not need.b)
        self.a_rows, self.b_rows = operands.unit_rows()
        num_rows, depth, device = operands.a.shape[0], operands.depth, operands.device
        # bfloat16 gradients keep their dtype; float16 ones would underflow before a loss scale reaches them.
        self.dtype = torch.bfloat16 if operands.a.dtype == torch.bfloat16 else torch.float32
        self.along = torch.empty(num_rows if self.by_rows else operands.local_b.shape[0], device=device)
        self.a = torch.empty(num_rows, depth, dtype=self.dtype, device=device) if need.a else None
        self.b = torch.zeros_like(self.b_rows, dtype=torch.float32) if need.b else None

    def add(self, at: slice, g: Tensor, alpha: Tensor, correction: Tensor | None = None) -> None:
        """Adds a chunk of G; ``correction`` [c, D] belongs to its G·B, for unit rows."""
        operands, a = self.operands, self.a_rows[at]
        if self.b is not None:
            _addmm_(self.b, g.t(), a)
        if self.by_rows:
            raw = _mm(g, self.b_rows)
            if correction is not None:
                factor = self.gain if self._unit else self.gain * operands.a_inverse[at, None]
                raw[:, : operands.depth] += correction * factor
            out = self.a[at] if self.a is not None else raw
            self._finish(raw, a, operands.a_inverse[at], alpha, out, self.along[at])

    @property
    def _unit(self) -> bool:
        return self.operands.normalize and self.operands.a.dtype == torch.float16

    def _finish(self, raw: Tensor, x: Tensor, inverse: Tensor, alpha: Tensor, out: Tensor, along: Tensor) -> None:
        one = torch.ones_like(inverse)
        after, square = (inverse, one) if self._unit else (one, inverse * inverse)
        _finish_kernel[(triton.cdiv(raw.shape[0], 4),)](
            raw, x, after, square, alpha / self.gain, out, along,
            raw.shape[0], out.shape[1], raw.shape[1], NORMALIZE=self.operands.normalize, ROWS=4, DEPTH=256,
        )  # fmt: skip

    def finish(self, alpha: Tensor, unit: Tensor, correction: Tensor | None = None) -> Gradients:
        """(da, db, dscale); alpha is the factor of all gradients of embeddings, unit that of the loss."""
        operands, ranks = self.operands, self.operands.ranks
        db = None
        if self.b is not None:
            raw = self.b
            local = slice(ranks.b_offset, ranks.b_offset + ranks.b_rows[ranks.rank])
            inverse = operands.b_inverse
            if correction is not None:
                raw[:, : operands.depth] += correction * (self.gain if self._unit else self.gain * inverse[:, None])
            raw = ranks.scatter_sum(raw, ranks.b_rows)
            db = torch.empty(raw.shape[0], operands.depth, dtype=self.dtype, device=raw.device)
            along = self.along if not self.by_rows else torch.empty_like(inverse[local])
            self._finish(raw, self.b_rows[local], inverse[local], alpha, db, along)
        dscale = None
        if self.need.scale:
            dscale = ranks.sum_(self.along.sum(dtype=torch.float64) / self.gain) * unit
        return self.a, db, dscale


def info_nce_gradients(
    a: Tensor,  # (N, D) float16, bfloat16 or float32
    b: Tensor,  # (M, D)
    scale: float | Tensor,
    *,
    a_ids: Tensor | None,
    b_ids: Tensor | None,
    teacher: Teacher | None,
    teacher_weight: float,
    label_smoothing: float,
    normalize: bool,
    two_sided: bool,
    ranks: Ranks,
    need: Need,
    top1: bool,
) -> tuple[Tensor, Gradients, Tensor | None]:
    """InfoNCE of the rows (and, two_sided, the columns), its gradients (da, db, dscale) and in-batch top-1."""
    positives = Positives(ranks, a_ids, b_ids, a.device)
    operands = Operands(a, b, scale, normalize, ranks)
    launch = _launch(operands)
    num_rows, num_columns, dtype = a.shape[0], operands.num_columns, operands.a.dtype
    inverse, gain = normalize and dtype != torch.float16, HALF_GAIN if dtype == torch.float16 else 1.0
    stored = None
    # float16 cannot hold the exponentials, and with several positives a rounded e no longer cancels against their mean.
    storable = need.any and teacher is None and dtype != torch.float16 and not positives.ids
    if storable and stores_exponentials(num_rows * num_columns * dtype.itemsize, a.device):
        stored = _rows_by_columns(num_rows, num_columns, dtype, a.device)
    softmaxes = Softmaxes(operands, positives, launch, two_sided, top1, stored)
    hard, smooth = (1 - teacher_weight) * (1 - label_smoothing), (1 - teacher_weight) * label_smoothing
    row, column, row_terms, column_terms = softmaxes.factors(hard)
    total, columns_part = row_terms.sum(), column_terms.sum()

    unit = (0.5 if two_sided else 1.0) * positives.one[0] / positives.num_rows
    alpha = (unit * ranks.size * operands.scale.double()).float().reshape(1)
    smoothing = None
    if smooth:
        a_hat, b_hat = a.detach().float(), operands.b[:, : operands.depth].float()
        if normalize:
            a_hat, b_hat = a_hat * operands.a_inverse[:, None], b_hat * operands.b_inverse[:, None]
        row_weight = (_weights(positives, num_rows, positives.diagonal, True)).double()
        column_weight = _weights(positives, num_columns, 0, False).double() * (1.0 if two_sided else 0.0)
        smoothing = LabelSmoothing(a_hat, b_hat, operands.scale[0], ranks, row_weight, column_weight, smooth)
        total = total + smoothing.loss()

    t_operands, t_softmaxes, t_row, t_column = operands, softmaxes, row, column
    losses = torch.empty(1, device=a.device)
    if teacher is not None:
        t_operands = Operands(teacher[0].to(dtype), teacher[1].to(dtype), teacher[2], normalize, ranks)
        t_softmaxes = Softmaxes(t_operands, positives, launch, two_sided, False, None)
        t_row, t_column, t_row_terms, t_column_terms = t_softmaxes.factors(0.0)
        total = total - teacher_weight * t_row_terms.sum()
        columns_part = columns_part - teacher_weight * t_column_terms.sum()
        t_row[1] *= teacher_weight
        t_column[1] *= teacher_weight

    gradients = GradientSums(operands, need, gain) if need.any else None
    if gradients is not None or teacher is not None:
        width = launch.width(teacher is not None)
        buffer = stored
        if buffer is None:
            buffer = _rows_by_columns(min(launch.chunk, num_rows), num_columns, dtype, a.device)
        a_rows, b_rows = launch.rows_of(operands.a), launch.columns_of(operands.b, width)
        t_rows, t_columns = launch.rows_of(t_operands.a), launch.columns_of(t_operands.b, width)
        for at in launch.chunks(num_rows):
            rows = at.stop - at.start
            g = buffer[at] if stored is not None else buffer[:rows]
            tiles = launch.tiles(rows, num_columns, width)
            if teacher is not None:
                losses = torch.empty(tiles, launch.tile.rows, device=a.device)
            chunk = launch.chunk_of(g)
            if stored is not None:
                _convert_kernel[(launch.tiles(rows, 2 * num_columns),)](
                    chunk, operands.a_inverse, operands.b_inverse, operands.shift, row, column,
                    at.start, at.stop, num_columns, positives.diagonal, num_rows, num_columns,
                    BM=launch.tile.rows, BN=launch.tile.columns // 2, COLUMNS=two_sided, INVERSE=inverse,
                    num_warps=launch.tile.warps,
                )  # fmt: skip
            for fixed in (True, False):
                if fixed and (stored is not None or teacher is not None):
                    continue
                loops = launch.loops(fixed, teacher is not None)
                _gradient_kernel[launch.grid(tiles, loops)](
                    a_rows, b_rows, chunk,
                    operands.a_factor, operands.b_inverse, operands.a_inverse,
                    positives.a_class, positives.b_class, operands.shift, row, column,
                    t_rows, t_columns, t_operands.a_factor, t_operands.b_inverse, t_row, t_column, losses,
                    at.start, at.stop, num_columns, operands.a.shape[1], t_operands.a.shape[1], positives.diagonal,
                    num_rows, num_columns, gain,
                    IDS=positives.ids, COLUMNS=two_sided, INVERSE=inverse, TEACHER=teacher is not None, FIXED=fixed,
                    LOOP=loops,
                    **launch.constants(width, _lean(fixed, positives.ids)),
                )  # fmt: skip
            if teacher is not None:
                total = total + losses.sum(dtype=torch.float64)
            if gradients is not None:
                gradients.add(at, g, alpha, None if smoothing is None else smoothing.row_gradient(at))

    loss = unit * (ranks.sum_(total.clone()) + columns_part)
    accuracy = softmaxes.top1() if top1 else None
    if gradients is None:
        return loss, (), accuracy
    correction = None
    if smoothing is not None and gradients.b is not None:
        correction = smoothing.column_gradient()
    return loss, gradients.finish(alpha, unit, correction), accuracy


def _weights(positives: Positives, length: int, diagonal: int, rows: bool) -> Tensor:
    """Weight of each row or column in its direction's mean, relative to that of a row."""
    if positives.ids:
        count = positives.row_count if rows else positives.column_count
        return (count > 0) * (positives.one if rows else positives.ratio)
    other = positives.total_columns if rows else positives.total_rows
    return torch.arange(diagonal, diagonal + length, device=positives.one.device) < other


def sigmoid_gradients(
    a: Tensor,  # (N, D) float16, bfloat16 or float32
    b: Tensor,  # (M, D)
    scale: float | Tensor,
    bias: float | Tensor,
    *,
    a_ids: Tensor | None,
    b_ids: Tensor | None,
    normalize: bool,
    ranks: Ranks,
    need: Need,
) -> tuple[Tensor, Gradients]:
    """SigLIP's loss and its gradients (da, db, dscale, dbias), in one pass."""
    device = a.device
    positives = Positives(ranks, a_ids, b_ids, device)
    operands = Operands(a, b, scale, normalize, ranks, units=1.0)
    launch = _launch(operands)
    num_rows, num_columns, dtype = a.shape[0], operands.num_columns, operands.a.dtype
    inverse, gain = normalize and dtype != torch.float16, HALF_GAIN if dtype == torch.float16 else 1.0
    factor = 1.0 / sum(ranks.a_rows)
    alpha = operands.scale * (factor * ranks.size)
    gradients = GradientSums(operands, need, gain) if need.any else None
    shift = _on_device(bias, device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # the loss and dbias
    a_rows, b_rows = launch.rows_of(operands.a), launch.columns_of(operands.b)
    buffer = _rows_by_columns(min(launch.chunk, num_rows), num_columns, dtype, device) if need.any else None
    for at in launch.chunks(num_rows):
        rows = at.stop - at.start
        tiles = launch.tiles(rows, num_columns)
        shares = torch.zeros(2, 2 * tiles, device=device)
        _sigmoid_kernel[(tiles,)](
            a_rows, b_rows, b_rows if buffer is None else launch.chunk_of(buffer[:rows]),
            operands.a_factor, operands.b_inverse, operands.a_inverse,
            positives.a_class, positives.b_class, shift, shares[0], shares[1],
            at.start, at.stop, num_columns, operands.a.shape[1], positives.diagonal, gain,
            IDS=positives.ids, INVERSE=inverse, GRADIENT=need.any, **launch.constants(),
        )  # fmt: skip
        sums += shares.sum(1, dtype=torch.float64)
        if gradients is not None and buffer is not None and (gradients.by_rows or need.b):
            gradients.add(at, buffer[:rows], alpha)
    sums = ranks.sum_(sums) * factor
    if gradients is None:
        return sums[0], ()
    unit = torch.full((), factor, dtype=torch.float64, device=device)
    return sums[0], (*gradients.finish(alpha, unit), sums[1] if need.bias else None)


TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compilations(arch: int) -> Iterator[Compilation]:
    """Every (kernel, configuration, dtype, flags) that the launchers may pick on an architecture."""
    both = (False, True)
    for dtype, name in TYPES.items():
        half = dtype == torch.float16
        for precision in ("tf32x3", "tf32") if dtype == torch.float32 else ("tf32",):
            label = f"{name} {precision}" if dtype == torch.float32 else name
            launch = Launch(tile_for(arch, dtype), precision, 0, 0, arch)
            for ids, columns, store, top1, fixed in product(both, both, both, both, both):
                if not (store and (ids or half or not fixed)):
                    flags = {"IDS": ids, "COLUMNS": columns, "STORE": store, "TOP1": top1, "FIXED": fixed}
                    flags["LOOP"] = launch.loops(fixed)
                    options = launch.constants(lean=_lean(fixed, ids or top1))
                    yield _compilation("sums", _sums_kernel, label, name, options, flags)
            for ids, columns, inverse, teacher, fixed in product(both, both, both, both, both):
                if not ((teacher and fixed) or (inverse and half)):
                    flags = {"IDS": ids, "COLUMNS": columns, "INVERSE": inverse, "TEACHER": teacher, "FIXED": fixed}
                    flags["LOOP"] = launch.loops(fixed, teacher)
                    options = launch.constants(launch.width(teacher), _lean(fixed, ids))
                    yield _compilation("gradient", _gradient_kernel, label, name, options, flags)
            for ids, inverse, gradient in product(both, both, both):
                if not (inverse and half):
                    flags = {"IDS": ids, "INVERSE": inverse, "GRADIENT": gradient}
                    yield _compilation("sigmoid", _sigmoid_kernel, label, name, launch.constants(), flags)
        tile = tile_for(arch, dtype)
        for columns, inverse in product(both, both):
            if not half:
                options = {"BM": tile.rows, "BN": tile.columns // 2, "num_warps": tile.warps}
                flags = {"COLUMNS": columns, "INVERSE": inverse}
                yield _compilation("convert", _convert_kernel, name, name, options, flags)
        yield _compilation("rows", _rows_kernel, name, name, {"ROWS": 8, "DEPTH": 256}, {})
        for normalize in both:
            options = {"ROWS": 4, "DEPTH": 256}
            yield _compilation("finish", _finish_kernel, name, name, options, {"NORMALIZE": normalize})
    for ids, logits in product(both, both):
        options = {"TILES": 64, "WIDTH": 32}
        yield _compilation("combine", _combine_kernel, "", "fp32", options, {"IDS": ids, "LOGITS": logits})
    for ids, (logits, two_sided) in product(both, ((True, True), (True, False), (False, True))):
        flags = {"IDS": ids, "LOGITS": logits, "TWO_SIDED": two_sided}
        yield _compilation("factors", _factors_kernel, "", "fp32", {"WIDTH": 256}, flags)


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
    on = " ".join(name.lower() for name, value in flags.items() if value and name != "LOOP")
    name = " ".join(part for part in (kind, label, on) if part)
    return Compilation(
        name, function, signature, constexprs, attrs, warps, stages, "BK" in constants, maxnreg
    )  # fmt: skip
