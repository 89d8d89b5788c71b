"""Triton kernels compiled for a GPU that need not be there, and what their machine code says about them.

A kernel that keeps its accumulators in local memory, that asks for more shared memory than a chip has, or whose
product fell back to scalar arithmetic is right and slow, or does not launch at all. All of that stands in the PTX and
in the resource report of `cuobjdump`, which comes with Triton, so it is found on any machine and before any run.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes one program may have
SHARED_OF_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # bytes, of which each resident program takes
SHARED_RESERVED = 1 << 10  # this many besides its own
REGISTERS_OF_SM, WARPS_OF_SM, PROGRAMS_OF_SM = 65536, 64, 32
TILE_STACK = 1024  # bytes a thread that a matrix kernel may keep across its tile, outside the main loop
TENSOR_MEMORY_COLUMNS = 512  # sm_100, for all programs of an SM
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

_ASSERTION = re.compile(r"\b__assertfail\b[^;]*;\s*\}[^\n]*\n\s*trap;")
_LOCAL_ACCESS = re.compile(r"\b(?:LDL|STL)\b((?:\.\w+)*)")
_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_MATRIX_SASS = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
_BRANCH_SASS = re.compile(r"^(@\S+\s+)?BRA\b.*?0x([0-9a-f]+)")


@dataclass(frozen=True)
class Compilation:
    """One (kernel, configuration, dtypes, flags) that a launcher may pick.

    Attributes:
        name: unique among those of one architecture, as "sums bf16 diagonal".
        function: the triton.JITFunction.
        signature: the Triton type of every argument in order, as a launch names it (`signature_and_attrs`): "*bf16",
            "i32", "tensordesc<bf16[128, 64]>", "constexpr".
        constexprs: the value of every argument of type "constexpr".
        attrs: by the argument's position, as {(2,): [["tt.divisibility", 16]]}; [] for one without that is looked at.
        num_warps, num_stages, maxnreg: the launch options.
        matrix_instruction: whether the kernel is worth its name only with the chip's matrix instruction; or, by name,
            the one that it is made for on every chip, as "mma.sync" for matrices too small for the others.
        tile_loop: whether the outermost loop around matrix instructions is that over a program's tiles, no main loop.
    """

    name: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], Any]
    num_warps: int
    num_stages: int
    matrix_instruction: bool | str
    maxnreg: int | None = None
    tile_loop: bool = False


def operator_name(module: str) -> str:
    """The operator that a module of kernels belongs to: "log_mel" of "fastclap.kernels.log_mel.triton_kernels"."""
    return module.removeprefix("fastclap.kernels.").split(".")[0].removesuffix("_triton")


def signature_and_attrs(
    function: Any, types: Mapping[str, str], constexprs: Mapping[str, Any], not_divisible: Collection[str] = ()
) -> tuple[dict[str, str], dict[tuple[int, ...], list[list[Any]]]]:
    """The fields of a `Compilation` of a JITFunction, as a launch would have them.

    Args:
        function: the triton.JITFunction.
        types: Triton types of arguments by name, "*bf16", "i32", "tensordesc<bf16[128, 64]>". Those that are not named
            are "i32" where the function is not specialised on them, else "*fp32".
        constexprs: the constants, an argument that is None or 1 where the function is specialised on it among them.
        not_divisible: pointers that are not aligned to 16 bytes and integers that are no multiple of 16, of those that
            the function is specialised on; all others are taken to be.
    """
    divisible: list[list[Any]] = [["tt.divisibility", 16]]
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(function.params):
        name = parameter.name
        default = "i32" if parameter.do_not_specialize else "*fp32"
        signature[name] = "constexpr" if name in constexprs else types.get(name, default)
        if name in constexprs:
            # The launcher reads what it should know of an argument from a string, and so from one that is a constant.
            if isinstance(constexprs[name], str):
                attrs[(index,)] = divisible if "D" in constexprs[name] else []
        elif signature[name].startswith(("*", "i", "u")) and not parameter.do_not_specialize:
            unknown = parameter.do_not_specialize_on_alignment or name in not_divisible
            attrs[(index,)] = [] if unknown else divisible
    return signature, attrs


@dataclass(frozen=True)
class Compiled:
    """What came out. Sizes are bytes: shared per program, stack and spills per thread.

    Attributes:
        spills: of the loads and stores of local memory in the machine code, loops counted once.
        loop_spills: those of them in a loop around matrix instructions.
        matrix_instructions: how often the one meant stands in the PTX: the compilation's own, or the architecture's
            (`MATRIX_INSTRUCTION`).
        lone_traps: traps that are not the end of an assertion; Triton leaves one where it cannot lower something.
        warps: per program; more than asked for where Triton specialises warps.
        tensor_memory: columns (sm_100).
        programs: how many fit an SM at once.
    """

    ptx: str
    cubin: bytes
    shared: int
    registers: int
    stack: int
    spills: int
    loop_spills: int
    matrix_instructions: int
    lone_traps: int
    warps: int
    tensor_memory: int
    programs: int


def cache_key(c: Compilation, arch: int) -> str:
    """What Triton's cache knows a compilation by, offline and at a launch on a GPU of that architecture.

    Raises:
        TypeError, ValueError: as `compile_offline`.
    """
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.runtime.cache import get_cache_key

    source, backend, options = _prepared(c, arch)
    key = get_cache_key(source, backend, backend.parse_options(options), env_vars=get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()


def is_cached(c: Compilation, arch: int) -> bool:
    """Whether Triton's cache holds it, so that neither `compiled_kernel` nor a launch would compile it."""
    from triton.runtime.cache import get_cache_manager

    metadata = f"{c.function.__name__[:150]}.json"
    return metadata in (get_cache_manager(cache_key(c, arch)).get_group(metadata) or {})


def compiled_kernel(c: Compilation, arch: int) -> Any:
    """The triton.compiler.CompiledKernel for compute capability `arch` (80, 90, 100), through Triton's own cache.

    Raises:
        TypeError, ValueError: as `compile_offline`.
    """
    import triton

    source, backend, options = _prepared(c, arch)
    return triton.compile(source, target=backend.target, options=options)


def compile_together(compilations: Collection[Compilation], arch: int) -> None:
    """Compiles kernels and their launchers side by side, which at their first launches go one after the other."""
    from triton.runtime import driver

    def compile_one(c: Compilation) -> None:
        kernel = compiled_kernel(c, arch)
        driver.active.launcher_cls(kernel.src, kernel.metadata)

    with ThreadPoolExecutor(len(compilations)) as pool:
        list(pool.map(compile_one, compilations))


def _prepared(c: Compilation, arch: int) -> tuple[Any, Any, dict[str, Any]]:
    """What triton.compile is given, as at a launch: the source, the backend of the target, and the options."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    if not isinstance(c.function, triton.JITFunction):
        raise TypeError(
            f"{c.name}: cannot compile a {type(c.function).__name__}; it takes the bare triton.jit function, which "
            f"must have been made without TRITON_INTERPRET=1 (now {os.environ.get('TRITON_INTERPRET', 'unset')})"
        )
    if list(c.signature) != c.function.arg_names:
        raise ValueError(f"{c.name}: the signature has {list(c.signature)}, the kernel {c.function.arg_names}")
    constants = {name for name, kind in c.signature.items() if kind == "constexpr"}
    if constants != set(c.constexprs):
        raise ValueError(f"{c.name}: constexpr arguments {sorted(constants)}, values for {sorted(c.constexprs)}")
    options = {
        "num_warps": c.num_warps,
        "num_stages": c.num_stages,
        "maxnreg": c.maxnreg,
        "debug": bool(c.function.debug or knobs.runtime.debug),
        "instrumentation_mode": knobs.compilation.instrumentation_mode,
    }
    source = ASTSource(fn=c.function, signature=c.signature, constexprs=c.constexprs, attrs=c.attrs)
    return source, make_backend(GPUTarget("cuda", arch, 32)), options


def compile_offline(c: Compilation, arch: int) -> Compiled:
    """Compiles for compute capability `arch` (80, 90, 100), through Triton's own cache, and reads the machine code.

    Raises:
        TypeError: the function is not a triton.JITFunction; under TRITON_INTERPRET=1 none is.
        ValueError: the signature and the function's arguments, or the constants, do not go together.
    """
    kernel = compiled_kernel(c, arch)
    ptx, cubin, metadata = kernel.asm["ptx"], kernel.asm["cubin"], kernel.metadata
    usage = _resource_usage(cubin, metadata.name)
    registers, stack = usage["REG"], usage["STACK"] + usage["LOCAL"]
    spills, loop_spills = _local_bytes(cubin, arch, c.tile_loop) if stack else (0, 0)
    tensor_memory = getattr(metadata, "tmem_size", None) or 0
    return Compiled(
        ptx=ptx,
        cubin=cubin,
        shared=metadata.shared,
        registers=registers,
        stack=stack,
        spills=spills,
        loop_spills=loop_spills,
        matrix_instructions=ptx.count(_matrix_instruction(c, arch)),
        lone_traps=len(re.findall(r"\btrap;", _ASSERTION.sub("", ptx))),
        warps=metadata.num_warps,
        tensor_memory=tensor_memory,
        programs=_programs(arch, metadata.shared, registers, metadata.num_warps, tensor_memory),
    )


def _matrix_instruction(c: Compilation, arch: int) -> str:
    return c.matrix_instruction if isinstance(c.matrix_instruction, str) else MATRIX_INSTRUCTION[arch]


def problems(c: Compilation, compiled: Compiled, arch: int) -> list[str]:
    """What keeps it from launching or from full speed on `arch`; empty when nothing does."""
    found = []
    if c.matrix_instruction and not compiled.matrix_instructions:
        found.append(f"no {_matrix_instruction(c, arch)}")
    if compiled.lone_traps:
        found.append(f"{compiled.lone_traps} trap(s) outside assertions")
    # Around the matrix instructions a spill costs time in every step; a few bytes once a tile are hidden by the other
    # program on the SM, and cheaper than having no other program.
    if compiled.loop_spills:
        found.append(f"{compiled.loop_spills} bytes of local loads and stores in the main loop")
    if compiled.stack > (TILE_STACK if c.matrix_instruction else 0):
        found.append(f"stack of {compiled.stack} bytes a thread, {compiled.spills} bytes of local loads and stores")
    if compiled.shared > SHARED_LIMIT[arch]:
        found.append(f"shared memory of {compiled.shared} bytes, above the limit of {SHARED_LIMIT[arch]}")
    if compiled.tensor_memory > TENSOR_MEMORY_COLUMNS:
        found.append(f"{compiled.tensor_memory} columns of tensor memory, above the limit of {TENSOR_MEMORY_COLUMNS}")
    if not found and not compiled.programs:
        found.append(f"{compiled.registers} registers times {compiled.warps} warps do not fit an SM")
    return found


def _cuobjdump(cubin: bytes, option: str) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, option, str(file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _resource_usage(cubin: bytes, kernel: str) -> dict[str, int]:
    report = _cuobjdump(cubin, "-res-usage")
    line = re.search(rf"Function {re.escape(kernel)}:\s*\n\s*(.+)", report)
    if line is None:
        raise RuntimeError(f"cuobjdump reports nothing about {kernel}:\n{report}")
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line[1])}


def _local_bytes(cubin: bytes, arch: int, tile_loop: bool) -> tuple[int, int]:
    """Bytes of local loads and stores, in all and in the innermost loops around matrix instructions.

    cuobjdump has no count of spilled bytes: the accesses themselves, 4 bytes unless their suffix says otherwise.
    """
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    code = [(int(at, 16), text) for at, text in _SASS.findall(_cuobjdump(cubin, "-sass"))]
    products = [at for at, text in code if _MATRIX_SASS.search(text)]
    loops: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for at, text in code:
        branch = _BRANCH_SASS.search(text)
        if branch is not None and int(branch[2], 16) < at:
            loops[branch[1] is not None].append((int(branch[2], 16), at))
    # The smallest loop around each product; a program's outer loop over its tiles is none of the main loops.
    # A loop ends in a conditional branch or, before sm_90, in a plain one: there it is no return from a barrier's wait.
    main = set()
    every = [
        loop for some in loops.values() for loop in some if any(loop[0] <= product <= loop[1] for product in products)
    ]
    outermost = {max(every, key=lambda loop: loop[1] - loop[0])} if tile_loop and every else set()
    for product in products:
        for conditional in (True, False) if arch < 90 else (True,):
            around = [loop for loop in loops[conditional] if loop[0] <= product <= loop[1] and loop not in outermost]
            if around:
                main.add(min(around, key=lambda loop: loop[1] - loop[0]))
                break
    total = in_loop = 0
    for at, text in code:
        for suffixes in _LOCAL_ACCESS.findall(text):
            size = next((widths[suffix] for suffix in suffixes.split(".") if suffix in widths), 4)
            total += size
            in_loop += size * any(loop[0] <= at <= loop[1] for loop in main)
    return total, in_loop


def _programs(arch: int, shared: int, registers: int, warps: int, tensor_memory: int) -> int:
    warp_registers = -(-registers * 32 // 256) * 256  # allocated by the warp, in units of 256
    limits = [
        PROGRAMS_OF_SM,
        WARPS_OF_SM // warps,
        REGISTERS_OF_SM // (warp_registers * warps),
        SHARED_OF_SM[arch] // (shared + SHARED_RESERVED),
    ]
    if tensor_memory:
        limits.append(TENSOR_MEMORY_COLUMNS // tensor_memory)
    return min(limits)
