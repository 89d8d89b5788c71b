"""What a kernel's machine code has to do for a tile: instructions, and wavefronts of shared memory and L1.

    python -m bench.machine_code

compiles the forms that `bench.predictions` speaks of for sm_90 and prints their counts; no GPU is needed.

*Instructions*: those that a warp goes through, of which each of an SM's four schedulers issues one a cycle.
*Wavefronts*: what the pipe in front of L1 and shared memory, one for the SM, works off at one a cycle. A warp's load or
store of shared, global or local memory takes one for up to 32 bits a lane, two for 64, four for 128; a matrix load or
store one for each 8×8 matrix; a shuffle one. That is the least: lanes that meet in a bank, or a global access that
touches many lines, take more.

*Issue / tensor*, of the losses' matrix kernels: the cycles in which a tile's warps issue instructions, over those of
its products at the full rate of the tensor cores. Above 100 % no kernel with such code can keep them busy.
"""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from bench.tables import markdown
from fastclap.kernels.log_mel import cuda_engine
from fastclap.kernels.log_mel.spec import LogMelSpec

ARCH = 90
DIM = 768  # of the embeddings, for the share of the tensor cores' time
# Of the losses' matrix kernels, and the TMA stores of a tile that are behind a branch and happen; gradients always.
LOSSES = {
    "sums bf16 columns": (0, "P1"),
    "sums bf16 columns, kept": (2, "P1, exponentials kept"),
    "sums bf16": (0, "P1, one direction"),
    "gradient bf16 columns": (2, "P2"),
    "sigmoid bf16": (2, "SigLIP"),
}
NORMS = (  # forms of layer_norm_gelu in which a row is one warp's
    *("forward 512 bf16 bf16 weight bias", "backward 512 bf16 bf16 weight bias sums"),
    *("forward 1024 bf16 fp32 weight bias", "backward 1024 bf16 fp32 weight bias sums"),
)
RESIDUAL = (  # of residual_layer_norm, with float32 parameters
    *("forward 1024 fp32 bf16", "forward 1024 fp32 bf16 no seed", "forward 1024 fp32 bf16 no branch"),
    *(f"backward 1024 fp32 bf16 norm_sums branch_sum{rest}" for rest in ("", " no seed")),
)
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_PREDICATE = re.compile(r"^@\S+\s+")
_BRANCH = re.compile(r"\bBRA\b(\s+\S+,)?.*?0x([0-9a-f]+)")
_MEMORY = {"LDS", "STS", "LDG", "STG", "LDL", "STL", "LD", "ST"}


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    at: int  # address
    text: str

    @property
    def opcode(self) -> list[str]:
        """With its suffixes, as ["LDS", "128"]."""
        return _PREDICATE.sub("", self.text).split()[0].split(".")

    @property
    def target(self) -> int | None:
        """Where it may branch to."""
        branch = _BRANCH.search(self.text)
        return None if branch is None else int(branch[2], 16)

    @property
    def always(self) -> bool:
        """Whether, as a branch or an exit, it is always taken."""
        branch = _BRANCH.search(self.text)
        return not self.text.startswith("@") and (branch is None or branch[1] is None)

    @property
    def wavefronts(self) -> int:
        """The least that it takes of the pipe in front of L1 and shared memory."""
        name, *suffixes = self.opcode
        if name in ("LDSM", "STSM"):
            return int(suffixes[-1]) if suffixes[-1] in ("2", "4") else 1
        if name == "SHFL":
            return 1
        if name not in _MEMORY:
            return 0
        return 4 if "128" in suffixes else 2 if "64" in suffixes else 1


@dataclass(frozen=True)
class Counts:
    """Of one warp; `products` are its matrix instructions. Of a share of its work they may be no whole numbers."""

    instructions: float
    wavefronts: float
    products: float

    @classmethod
    def of(cls, code: Iterable[Instruction]) -> Counts:
        code = list(code)
        products = sum(line.opcode[0] in ("HMMA", "HGMMA") for line in code)
        return cls(len(code), sum(line.wavefronts for line in code), products)

    def __add__(self, other: Counts) -> Counts:
        pairs = zip(self.values, other.values, strict=True)
        return Counts(*(a + b for a, b in pairs))

    def __mul__(self, times: float) -> Counts:
        return Counts(*(times * value for value in self.values))

    @property
    def values(self) -> tuple[float, float, float]:
        return self.instructions, self.wavefronts, self.products


def parse(listing: str) -> list[Instruction]:
    """The instructions of a kernel in what `cuobjdump -sass` prints."""
    return [Instruction(int(at, 16), text) for at, text in _LINE.findall(listing)]


def loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Addresses of the first and last instruction of every loop, in order; a branch to itself is none."""
    return sorted((line.target, line.at) for line in code if line.target is not None and line.target < line.at)


def shortest(code: Sequence[Instruction], start: int, end: int | None) -> list[Instruction]:
    """The fewest instructions from address `start` up to and with `end` (None: an exit always taken).

    Rare branches, such as those of a tile at the matrix's edge, are so left out where they are branches.
    """
    index = {line.at: i for i, line in enumerate(code)}
    before: dict[int, int | None] = {index[start]: None}
    queue = deque(before)
    while queue:
        i = queue.popleft()
        line = code[i]
        leaves = line.opcode[0] == "EXIT"
        if line.at == end or (end is None and leaves and line.always):
            path = [i]
            while (previous := before[path[-1]]) is not None:
                path.append(previous)
            return [code[j] for j in reversed(path)]
        following = [] if line.always and (leaves or line.target is not None) else [i + 1]
        if line.target is not None:
            following.append(index[line.target])
        for j in following:
            if j < len(code) and j not in before:
                before[j] = i
                queue.append(j)
    raise ValueError(f"no way from 0x{start:x} to {'an exit' if end is None else f'0x{end:x}'}")


def product_tile(code: Sequence[Instruction], stores: int = 0) -> tuple[Counts, Counts]:
    """Of a kernel of one tile around a loop over the depth: a tile without that loop, and a step of it.

    `stores`: how many of the TMA stores that follow the loop are on the way, the first of them.
    """
    first = next(line.at for line in code if line.opcode[0] == "HGMMA")
    ends = {line.at: line for line in code}
    around = [loop for loop in loops(code) if loop[0] <= first <= loop[1] and not ends[loop[1]].always]
    start, end = min(around, key=lambda loop: loop[1] - loop[0])
    tile, at = shortest(code, code[0].at, start)[:-1], end
    for store in [line.at for line in code if line.at > end and line.opcode[0] == "UTMASTG"][:stores]:
        tile += shortest(code, at, store)[1:]
        at = store
    tile += shortest(code, at, None)[1:]
    return Counts.of(tile), Counts.of(shortest(code, start, end))


def issue_to_tensor(
    tile: int, step: int, dim: int, *, rows: int = 128, columns: int = 128, depth: int = 64, warps: int = 8
) -> float:
    """Cycles in which a tile issues instructions, over those of its 16-bit products at the full rate.

    A multiprocessor of sm_90 issues four instructions a cycle, one of each scheduler, and multiplies and adds 2,048
    pairs of numbers: 8·D cycles for a tile of 128 x 128.

    Args:
        tile: instructions of a warp for a tile without the loop over the depth.
        step: of a turn of that.
        dim: D.
        rows, columns, depth, warps: of the configuration.
    """
    return warps / 4 * (tile + step * dim / depth) / (rows * columns * dim / 2048)


def attention_tile(code: Sequence[Instruction]) -> Counts:
    """Of a kernel that loops over tiles with products: a turn of its first such loop, that over whole tiles."""
    products = [line.at for line in code if line.opcode[0] in ("HMMA", "HGMMA")]
    around = [loop for loop in loops(code) if any(loop[0] <= product <= loop[1] for product in products)]
    innermost = [loop for loop in around if not any(loop[0] <= o[0] and o[1] <= loop[1] and o != loop for o in around)]
    return Counts.of(shortest(code, *innermost[0]))


def row_tile(code: Sequence[Instruction]) -> Counts:
    """Of a kernel that loops over tiles: a turn of its largest loop."""
    start, end = max(loops(code), key=lambda loop: loop[1] - loop[0])
    return Counts.of(shortest(code, start, end))


def _spliced(code: Sequence[Instruction], first: int, last: int) -> list[Instruction]:
    return [line for line in code if first <= line.at <= last]


def _per(code: Sequence[Instruction], opcode: Sequence[str], start: int, end: int) -> Counts:
    """Of the innermost loop between two addresses with most such instructions, an equal share for each of them."""
    found = [loop for loop in loops(code) if start <= loop[0] and loop[1] <= end]
    found = [loop for loop in found if not any(loop[0] <= x[0] and x[1] <= loop[1] and x != loop for x in found)]
    bodies = [_spliced(code, *loop) for loop in found]
    having = [[line for line in body if line.opcode[: len(opcode)] == list(opcode)] for body in bodies]
    body, marked = max(zip(bodies, having, strict=True), key=lambda x: len(x[1]))
    if not marked:
        raise ValueError(f"no loop with {'.'.join(opcode)} between 0x{start:x} and 0x{end:x}")
    return Counts.of(body) * (1 / len(marked))


def _visiting(code: Sequence[Instruction], start: int, end: int, places: Iterable[int]) -> list[Instruction]:
    """From one address to another by way of all of these that can be reached, always the nearest first."""
    way, left = [], set(places)
    while True:
        found = []
        for place in left:
            with contextlib.suppress(ValueError):
                found.append(shortest(code, start, place)[1:])
        if not found:
            return way + shortest(code, start, end)[1:]
        way += min(found, key=len)
        start = way[-1].at
        left.remove(start)


def _shortest_with_stores(
    code: Sequence[Instruction], before: tuple[int, int], after: tuple[int, int | None], stores: int
) -> list[Instruction]:
    """The fewest instructions along `before`, then along `after` with so many stores that hang on nothing."""
    found = []
    for line in code:
        if line.opcode[0] == "STG" and not line.text.startswith("@"):
            with contextlib.suppress(ValueError):
                way = shortest(code, after[0], line.at) + shortest(code, line.at, after[1])[1:]
                if sum(x.opcode[0] == "STG" for x in way) == stores:
                    found.append(way)
    return shortest(code, *before)[1:] + min(found, key=len)[1:]


def _of_tables(code: Sequence[Instruction]) -> Counts:
    """Where global loads are of tables, in which the lanes of a warp read one line of the cache: a wavefront each."""
    counts = Counts.of(code)
    spared = sum(line.wavefronts - 1 for line in code if line.opcode[0] == "LDG")
    return Counts(counts.instructions, counts.wavefronts - spared, counts.products)


def log_mel_frame(code: Sequence[Instruction], spec: LogMelSpec) -> dict[str, Counts]:
    """Of csrc/log_mel_cuda.cuh, a frame of a tile inside a clip whose samples lie at multiples of 16 bytes, by step.

    Barriers divide the code into its steps. The loops over mels and their bins count as often as they run; the other
    steps are what a thread does once. One warp, which has row 0, also goes through the other side of the second step's
    branch.
    """
    found = cuda_engine.layout(spec)
    assert isinstance(found, cuda_engine.Layout)
    mels = cuda_engine.mel_runs(spec, found.frames)
    barriers = [line.at for line in code if line.opcode[0] == "BAR"]
    sums = barriers[1:3] if spec.remove_dc else []
    loaded, (first, second) = barriers[0], barriers[1 + len(sums) : 3 + len(sums)]
    ranged = spec.dynamic_range is not None
    third = barriers[3 + len(sums)] if ranged else code[-1].at
    warps = found.threads / 32
    # Vectors of samples are loaded without a loop, then stored.
    start = next(line.at for line in code if line.opcode[:3] == ["LDG", "E", "128"])
    moves = [line for line in code if line.opcode[0] in ("LDG", "STS") and start < line.at < loaded]
    wide = [line.at for line in moves if {"64", "128"} & set(line.opcode)]
    steps = {"samples": Counts.of(shortest(code, code[0].at, start) + _visiting(code, start, loaded, wide))}
    if sums:  # what one warp makes of them is left out
        steps["means"] = Counts.of(_spliced(code, loaded, sums[0])[1:])
    turns = found.r2 * found.frames / found.group / found.threads
    steps["first"] = _of_tables(_spliced(code, sums[-1] if sums else loaded, first)[1:]) * turns
    body = _spliced(code, first, second)[1:]
    row_zero = Counts.of(max(_sides(body), key=len))
    turns = found.r1 // 2 * found.frames / found.threads
    steps["second"] = (Counts.of(body) + row_zero * (1 / warps - 1)) * turns
    bins = float(mels.runs[:, 1].sum()) / warps  # of the mels of a warp
    # Of a mel: up to its loop over bins, that, and on to the next mel by the way on which all four frames are stored.
    inside = [loop for loop in loops(code) if second < loop[0] and loop[1] < third]
    inside.sort(key=lambda x: x[1] - x[0])
    start, end = next(x for x in inside if any(line.opcode[0] == "LDS" for line in _spliced(code, *x)))
    around = [x for x in inside if x[0] < start and end < x[1]]  # none where a warp has one turn
    first_line, last_line = around[0] if around else (second, third if ranged else None)
    once = _shortest_with_stores(code, (first_line, start), (end, last_line), stores=4)
    steps["third"] = _of_tables(once) * (len(mels.runs) / warps)
    steps["third"] += _of_tables(_spliced(code, start, end)) * (bins / 4)
    if ranged:
        of_vector = _per(code, ("LDG", "E", "128", "STRONG"), third, code[-1].at)
        steps["range"] = Counts.of(_spliced(code, third, barriers[4 + len(sums)]))
        steps["range"] += of_vector * (found.frames * spec.n_mels / 4 / found.threads)
    return {name: counts * (warps / found.frames) for name, counts in steps.items()}


def _sides(body: Sequence[Instruction]) -> list[list[Instruction]]:
    """The two sides of the branch that is an if with an else: of which one ends in a jump over the other."""
    at = {line.at: i for i, line in enumerate(body)}
    pairs = []
    for line in body:
        if line.target is not None and not line.always and line.target in at and line.target > line.at:
            jump = body[at[line.target] - 1]
            if jump.target is not None and jump.always and jump.target in at and jump.target > jump.at:
                one = body[at[line.at] + 1 : at[line.target]]
                pairs.append([one, body[at[line.target] : at[jump.target]]])
    return max(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))


def main() -> None:
    from bench.kernel_peers import FRONT_ENDS
    from fastclap.kernels import (
        bias_norm_triton,
        feed_forward_triton,
        gated_convolution_triton,
        layer_norm_gelu_triton,
        offline,
        residual_layer_norm_triton,
        shared_attention_triton,
        swoosh_triton,
        toeplitz_attention_triton,
    )
    from fastclap.kernels.contrastive import triton_engine as contrastive

    def machine_code(module: ModuleType, name: str) -> list[Instruction]:
        found = next(c for c in module.compilations(ARCH) if c.name == name)
        return parse(offline._cuobjdump(offline.compile_offline(found, ARCH).cubin, "-sass"))

    rows: list[tuple[str, str, Counts]] = []
    shares = {}
    for name, (stores, what) in LOSSES.items():
        tile, step = product_tile(machine_code(contrastive, name.removesuffix(", kept")), stores)
        rows += [(name, f"a tile: {what}", tile), (name, "a step of 64 in depth", step)]
        shares[name] = issue_to_tensor(tile.instructions, step.instructions, DIM)
    for kernel in ("forward 64 bf16", "keys 64 bf16", "queries 64 bf16 table"):
        tile = attention_tile(machine_code(toeplitz_attention_triton, f"attention {kernel}"))
        rows.append((f"attention {kernel}", "a tile", tile))
    for kernel in ("log_sum bf16", "forward bf16", "keys bf16 values", "queries bf16 values"):
        tile = attention_tile(machine_code(shared_attention_triton, f"shared attention {kernel}"))
        rows.append((f"shared attention {kernel}", "a tile of 64 x 64 scores", tile))
    norms = [(layer_norm_gelu_triton, f"layer norm gelu {name}") for name in NORMS]
    norms += [(residual_layer_norm_triton, f"residual layer norm {name}") for name in RESIDUAL]
    rows += [(name, "a row", row_tile(machine_code(module, name))) for module, name in norms]
    for name in ("feed forward bf16 sums", "feed forward bf16 a sums"):
        rows.append((name, "256 values of a row", row_tile(machine_code(feed_forward_triton, name))))
    for name in ("forward bf16 mask", "backward a bf16 mask"):
        tile = row_tile(machine_code(swoosh_triton, f"swoosh l {name}"))
        rows.append((f"swoosh l {name}", "256 values of a row", tile))
    for name in ("forward 1280 fp32 bf16 norm bypass branch", "backward 1280 fp32 bf16 norm bypass branch"):
        tile = row_tile(machine_code(bias_norm_triton, f"bias norm {name}"))
        rows.append((f"bias norm {name}", "a row, of each of its warps", tile))
    for name in (f"{way} 1280 of {taps} bf16 fp32" for way in ("forward", "backward") for taps in (31, 15)):
        code = machine_code(gated_convolution_triton, f"gated convolution {name}")
        what = f"{gated_convolution_triton.TURN} rows of {gated_convolution_triton.WIDTH} columns"
        rows.append((f"gated convolution {name}", what, Counts.of(shortest(code, *loops(code)[-1]))))
    for label, spec in FRONT_ENDS.items():
        cubin = cuda_engine.cubin(spec, torch.float32, False, ARCH)
        steps = log_mel_frame(parse(offline._cuobjdump(cubin, "-sass")), spec)
        rows += [(f"log-mel {label}", f"a frame, all warps: {step}", counts) for step, counts in steps.items()]
    header = ("kernel", "of a warp", "instructions", "wavefronts", "matrix instructions", f"issue / tensor, D = {DIM}")
    cells = []
    for name, what, counts in rows:
        share = shares.pop(name, None)
        numbers = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in counts.values)
        cells.append((name, what, *numbers, "-" if share is None else f"{share:.0%}"))
    print(markdown(header, cells))


if __name__ == "__main__":
    main()
