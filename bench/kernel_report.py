"""What the machine code of every Triton kernel looks like, for GPUs that need not be there.

    python -m bench.kernel_report [--arch 80 90 100] [--out FILE]

Every (kernel, configuration, dtypes) that a launcher may pick is compiled and looked at as `fastclap.kernels.offline`
describes. Prints a Markdown table; exits with 1 where a kernel would spill, would not launch or is without the matrix
instruction. Compilations are cached by Triton, so a second report is quick.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fastclap.kernels.offline import ARCHITECTURES, MATRIX_INSTRUCTION, compile_offline, problems

MODULES = (  # each offers compilations(arch)
    "fastclap.kernels.contrastive_triton",
    "fastclap.kernels.logmel_triton",
    "fastclap.kernels.toeplitz_attention_triton",
    "fastclap.kernels.layer_norm_gelu_triton",
    "fastclap.kernels.waveform_triton",
)
COLUMNS = (
    *("kernel", "arch", "matrix instructions", "registers", "stack B", "spill B"),
    *("shared B", "programs/SM", "verdict"),
)

Row = tuple[str, ...]


def row(module: str, arch: int, index: int) -> Row:
    """Compiles the index-th compilation of a module; a JIT function itself cannot travel between processes."""
    c = list(importlib.import_module(module).compilations(arch))[index]
    try:
        compiled = compile_offline(c, arch)
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:200].replace("|", "/")
        return (c.name, str(arch), "", "", "", "", "", "", message)
    name = c.matrix_instruction if isinstance(c.matrix_instruction, str) else MATRIX_INSTRUCTION[arch]
    matrix = f"{compiled.matrix_instructions} {name}" if compiled.matrix_instructions else "none"
    numbers = (compiled.registers, compiled.stack, compiled.spills, compiled.shared, compiled.programs)
    return (c.name, str(arch), matrix, *map(str, numbers), "; ".join(problems(c, compiled, arch)) or "ok")


def report(modules: Sequence[str], architectures: Sequence[int], processes: int) -> Iterator[Row]:
    """One row a compilation, in the modules' order."""
    work = [
        (module, arch, index)
        for module in modules
        for arch in architectures
        for index in range(len(list(importlib.import_module(module).compilations(arch))))
    ]
    if work:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(row, *zip(*work, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--module", nargs="+", default=list(MODULES), help="modules that offer compilations(arch)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    lines, rows, bad = [], 0, 0

    def add(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    for cells in (COLUMNS, ("---",) * len(COLUMNS)):
        add(markdown_row(cells))
    for cells in report(args.module, args.arch, args.processes):
        add(markdown_row(cells))
        rows, bad = rows + 1, bad + (cells[-1] != "ok")
    add(f"\n{rows} compilations, {bad} with a problem.")
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if bad or not rows else 0


def markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
