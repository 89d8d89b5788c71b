"""What the machine code of every Triton kernel looks like, for GPUs that need not be there.

    python -m bench.kernel_report [--module MODULE ...] [--arch 80 90 100] [--out FILE]

Every (kernel, configuration, dtypes) that a launcher may pick is compiled and looked at as `fastclap.kernels.offline`
describes. Prints a Markdown table with a row for each compilation as it ends; the page that `--out` writes has a row
for each kernel and architecture. Exits with 1 where a kernel would spill, would not launch or is without the matrix
instruction. Compilations are cached by Triton, so a second report is quick.
"""

from __future__ import annotations

import argparse
import importlib
import math
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from bench import machine_code
from bench.tables import markdown
from fastclap.kernels.offline import (
    ARCHITECTURES,
    MATRIX_INSTRUCTION,
    Compilation,
    _cuobjdump,
    compile_offline,
    operator_name,
    problems,
)

MODULES = (  # each offers compilations(arch)
    "fastclap.kernels.contrastive.triton_engine",
    "fastclap.kernels.log_mel.triton_engine",
    "fastclap.kernels.toeplitz_attention_triton",
    "fastclap.kernels.layer_norm_gelu_triton",
    "fastclap.kernels.residual_layer_norm_triton",
    "fastclap.kernels.waveform_triton",
    "fastclap.kernels.waveform_convolution_triton",
    "fastclap.kernels.feed_forward_triton",
    "fastclap.kernels.shared_attention_triton",
    "fastclap.kernels.scaled_adam_triton",
    "fastclap.kernels.swoosh_triton",
    "fastclap.kernels.bias_norm_triton",
    "fastclap.kernels.gated_convolution_triton",
    "fastclap.kernels.resampling_triton",
)
COLUMNS = (
    *("kernel", "arch", "matrix instructions", "registers", "stack B", "spill B"),
    *("shared B", "programs/SM", "issue / tensor", "verdict"),
)
SUMMARY_COLUMNS = (
    *("kernel", "arch", "forms", "matrix instruction", "registers", "stack B"),
    *("shared B", "programs/SM", "issue / tensor", "verdict"),
)
OK = "ok"


@dataclass(frozen=True)
class Numbers:
    """Of one compilation; sizes in bytes, as in `fastclap.kernels.offline.Compiled`.

    `issue`: `bench.machine_code.issue_to_tensor` of a tile inside the matrix, of what that module counts.
    """

    matrix_instructions: int
    registers: int
    stack: int
    spills: int
    shared: int
    programs: int
    issue: float | None = None


@dataclass(frozen=True)
class Result:
    """One compilation: its name, the kernel that it is a form of, and what came out.

    Attributes:
        name: of the compilation.
        kernel: the function, as "contrastive.sums".
        arch: compute capability, 80, 90 or 100.
        matrix_instruction: the one that is looked for.
        numbers: None where it did not compile.
        verdict: `OK`, what is wrong with the machine code, or the error.
    """

    name: str
    kernel: str
    arch: int
    matrix_instruction: str
    numbers: Numbers | None
    verdict: str

    def cells(self) -> tuple[str, ...]:
        """Of its row under `COLUMNS`."""
        n = self.numbers
        if n is None:
            return (self.name, str(self.arch), *[""] * 7, self.verdict)
        matrix = f"{n.matrix_instructions} {self.matrix_instruction}" if n.matrix_instructions else "none"
        numbers = (n.registers, n.stack, n.spills, n.shared, n.programs)
        return (self.name, str(self.arch), matrix, *map(str, numbers), _percent(n.issue), self.verdict)


def result(module: str, arch: int, index: int) -> Result:
    """Compiles the index-th compilation of a module; a JIT function itself cannot travel between processes."""
    c = list(importlib.import_module(module).compilations(arch))[index]
    kernel = f"{operator_name(module)}.{c.function.__name__.strip('_').removesuffix('_kernel')}"
    matrix = c.matrix_instruction if isinstance(c.matrix_instruction, str) else MATRIX_INSTRUCTION[arch]
    try:
        compiled = compile_offline(c, arch)
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:200].replace("|", "/")
        return Result(c.name, kernel, arch, matrix, None, message)
    numbers = Numbers(
        compiled.matrix_instructions,
        compiled.registers,
        compiled.stack,
        compiled.spills,
        compiled.shared,
        compiled.programs,
        _issue(c, compiled.cubin) if kernel.startswith("contrastive.") and arch == machine_code.ARCH else None,
    )
    return Result(c.name, kernel, arch, matrix, numbers, "; ".join(problems(c, compiled, arch)) or OK)


def _issue(c: Compilation, cubin: bytes) -> float | None:
    if c.name not in machine_code.LOSSES:
        return None
    stores, _ = machine_code.LOSSES[c.name]
    tile, step = machine_code.product_tile(machine_code.parse(_cuobjdump(cubin, "-sass")), stores)
    k = c.constexprs
    sizes = {"rows": k["BM"], "columns": k["BN"], "depth": k["BK"], "warps": c.num_warps}
    return machine_code.issue_to_tensor(tile.instructions, step.instructions, machine_code.DIM, **sizes)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def report(modules: Sequence[str], architectures: Sequence[int], processes: int) -> Iterator[Result]:
    """One result a compilation, in the modules' order."""
    work = [
        (module, arch, index)
        for module in modules
        for arch in architectures
        for index in range(len(list(importlib.import_module(module).compilations(arch))))
    ]
    if work:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(result, *zip(*work, strict=True))


def summary_rows(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    """A row under `SUMMARY_COLUMNS` for each kernel and architecture: ranges over its forms, and the worst verdict."""
    for kernel in dict.fromkeys(r.kernel for r in results):
        for arch in sorted({r.arch for r in results if r.kernel == kernel}):
            forms = [r for r in results if (r.kernel, r.arch) == (kernel, arch)]
            compiled = [r.numbers for r in forms if r.numbers is not None]
            used = Counter(r.matrix_instruction for r in forms if r.numbers and r.numbers.matrix_instructions)
            everywhere = used.total() == len(forms) and len(used) == 1
            matrix = ", ".join(used if everywhere else (f"{name} in {n}" for name, n in used.items())) or "none"
            bad = [r for r in forms if r.verdict != OK]
            worst = max(bad, key=lambda r: math.inf if r.numbers is None else r.numbers.stack, default=None)
            verdict = OK if worst is None else f"{len(bad)} of {len(forms)}, worst {worst.name}: {worst.verdict}"
            ranges = (
                _range([getattr(n, field) for n in compiled]) for field in ("registers", "stack", "shared", "programs")
            )
            shares = sorted(n.issue for n in compiled if n.issue is not None)
            issue = " to ".join(dict.fromkeys(map(_percent, (shares[0], shares[-1])))) if shares else "-"
            yield (kernel, str(arch), str(len(forms)), matrix, *ranges, issue, verdict)


def _range(values: Sequence[int]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def page(results: Sequence[Result], command: str) -> str:
    """What was compiled, by which command, and `summary_rows`."""
    counts = Counter(r.arch for r in results)
    bad = sum(r.verdict != OK for r in results)
    names = list(dict.fromkeys(r.kernel.split(".")[0] for r in results))
    return f"""# Machine code of {" and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)}

Written by

    {command}

which also prints a row for each compilation: every (kernel, configuration, dtypes, flags) that a launcher may pick,
compiled by Triton {version("triton")} for GPUs that need not be there. Nothing here was run.

**{len(results):,} compilations ({", ".join(f"{count:,} for sm_{arch}" for arch, count in sorted(counts.items()))}), {bad or "none"} with a problem.**

A row is a kernel on an architecture. Registers and stack are those of a thread, shared memory that of a program, each
from the smallest to the largest of the forms; programs/SM is how many fit a multiprocessor. *Matrix instruction*: the
one found, "in n" where only n of the forms multiply matrices. *Issue / tensor*, of the losses' kernels in bf16 on
sm_{machine_code.ARCH}: the cycles in which a tile inside the matrix issues instructions, over those of its products on the tensor
cores, at D = {machine_code.DIM} (`bench.machine_code`). *Verdict*: ok, or the worst of the forms with a problem.

{markdown(SUMMARY_COLUMNS, summary_rows(results))}
"""  # noqa: E501


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--module", nargs="+", default=list(MODULES), help="modules that offer compilations(arch)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write a page with a row for each kernel and architecture")
    args = parser.parse_args()
    results = []
    print(markdown(COLUMNS, []), flush=True)
    for found in report(args.module, args.arch, args.processes):
        print("| " + " | ".join(found.cells()) + " |", flush=True)
        results.append(found)
    bad = sum(found.verdict != OK for found in results)
    print(f"\n{len(results)} compilations, {bad} with a problem.")
    if args.out:
        parts = ["python -m bench.kernel_report"]
        if args.module != list(MODULES):
            parts.append("--module " + " ".join(args.module))
        if args.arch != list(ARCHITECTURES):
            parts.append("--arch " + " ".join(map(str, args.arch)))
        args.out.write_text(page(results, " ".join([*parts, f"--out {args.out}"])), encoding="utf-8")
    return 1 if bad or not results else 0


if __name__ == "__main__":
    sys.exit(main())
