"""The offline compiler finds in real machine code what it is there to find."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from fastclap.kernels.offline import (  # noqa: E402
    ARCHITECTURES,
    MATRIX_INSTRUCTION,
    SHARED_LIMIT,
    Compilation,
    cache_key,
    compile_offline,
    is_cached,
    problems,
    signature_and_attrs,
)

ROOT = Path(__file__).resolve().parents[2]
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)


@triton.jit
def product(a, b, c, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        left = tl.load(a + rows * k + start + inner[None, :])
        right = tl.load(b + columns[None, :] * k + start + inner[:, None])
        total = tl.dot(left, right, total)
    tl.store(c + rows * N + columns[None, :], total)


@triton.jit(debug=True)  # or assertions are left out
def asserts_and_traps(x, TRAP: tl.constexpr):
    value = tl.load(x)
    tl.device_assert(value > 0, "positive")
    if TRAP:
        value = tl.inline_asm_elementwise("trap; mov.b32 $0, $1;", "=r,r", [value], tl.int32, is_pure=False, pack=1)
    tl.store(x, value + 1)


def a_product(block: tuple[int, int, int], num_warps: int, num_stages: int, dtype: str = "bf16") -> Compilation:
    return Compilation(
        name=f"product {block} {dtype}",
        function=product,
        signature={"a": f"*{dtype}", "b": f"*{dtype}", "c": "*fp32", "k": "i32"} | dict.fromkeys("MNK", "constexpr"),
        constexprs=dict(zip("MNK", block, strict=True)),
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
        num_warps=num_warps,
        num_stages=num_stages,
        matrix_instruction=True,
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_good_product_has_no_problem(arch: int) -> None:
    compilation = a_product((128, 128, 64), 8, 3)
    compiled = compile_offline(compilation, arch)
    assert problems(compilation, compiled, arch) == []
    assert MATRIX_INSTRUCTION[arch] in compiled.ptx and compiled.matrix_instructions > 0
    assert compiled.cubin[:4] == b"\x7fELF"
    assert compiled.stack == compiled.spills == 0
    assert 32 < compiled.registers < 256
    # Two or three buffers of both operands, as the compiler pipelines three stages; then as many programs as fit.
    assert 2 * 32768 <= compiled.shared <= 3 * 32768 + 4096
    assert compiled.programs == min(65536 // (256 * -(-compiled.registers // 8) * 8), 2)
    assert (compiled.tensor_memory > 0) == (arch == 100)


def test_spilled_accumulators_are_named() -> None:
    compilation = a_product((256, 256, 64), 4, 2)
    compiled = compile_offline(compilation, 90)
    assert compiled.stack > 1000 and compiled.spills > compiled.stack
    assert compiled.spills > compiled.loop_spills > 0  # the accumulators travel in every step
    assert problems(compilation, compiled, 90) == [
        f"{compiled.loop_spills} bytes of local loads and stores in the main loop",
        f"stack of {compiled.stack} bytes a thread, {compiled.spills} bytes of local loads and stores",
    ]


def test_shared_memory_above_the_limit_is_named() -> None:
    compilation = a_product((128, 128, 128), 8, 5)
    compiled = compile_offline(compilation, 90)
    assert compiled.shared > SHARED_LIMIT[90] and compiled.programs == 0
    assert problems(compilation, compiled, 90) == [
        f"shared memory of {compiled.shared} bytes, above the limit of 232448"
    ]


def test_a_missing_matrix_instruction_is_named() -> None:
    compilation = a_product((16, 64, 64), 4, 2)  # too few rows for Hopper's
    compiled = compile_offline(compilation, 90)
    assert problems(compilation, compiled, 90) == ["no wgmma.mma_async"]
    assert problems(replace(compilation, matrix_instruction=False), compiled, 90) == []


def test_only_traps_outside_assertions_count() -> None:
    signature = {"x": "*i32", "TRAP": "constexpr"}
    for trap in (False, True):
        compilation = Compilation("traps", asserts_and_traps, signature, {"TRAP": trap}, {}, 4, 1, False)
        compiled = compile_offline(compilation, 90)
        assert compiled.ptx.count("trap;") > trap and "__assertfail" in compiled.ptx
        assert compiled.lone_traps == int(trap)
        assert problems(compilation, compiled, 90) == (["1 trap(s) outside assertions"] if trap else [])


def test_a_signature_that_does_not_fit_is_an_error() -> None:
    compilation = a_product((64, 64, 64), 4, 2)
    with pytest.raises(ValueError, match=r"the signature has .*'z'"):
        compile_offline(replace(compilation, signature={"z": "i32"}), 90)
    with pytest.raises(ValueError, match="constexpr arguments"):
        compile_offline(replace(compilation, constexprs={"M": 64, "N": 64}), 90)


@triton.jit(do_not_specialize=["count", "scale"], do_not_specialize_on_alignment=["index"])
def copies(x, index, out, stride, count, scale, MODE: tl.constexpr, WIDTH: tl.constexpr):
    tl.store(out + tl.arange(0, WIDTH), scale * tl.load(x + tl.arange(0, WIDTH) * stride))


def test_arguments_are_described_as_a_launch_does() -> None:
    constants = {"MODE": "tf32", "WIDTH": 64}
    types = {"index": "*i64", "out": "*bf16", "stride": "i32", "scale": "fp32"}
    signature, attrs = signature_and_attrs(copies, types, constants)
    assert signature == {
        **{"x": "*fp32", "index": "*i64", "out": "*bf16", "stride": "i32", "count": "i32", "scale": "fp32"},
        **dict.fromkeys(constants, "constexpr"),
    }
    divisible = [["tt.divisibility", 16]]
    # What is looked at and gives nothing to say has an empty list: a pointer, and a constant that is a string.
    assert attrs == {(0,): divisible, (1,): [], (2,): divisible, (3,): divisible, (6,): []}
    _, attrs = signature_and_attrs(copies, types, constants, ("x", "stride"))
    assert attrs == {(0,): [], (1,): [], (2,): divisible, (3,): [], (6,): []}
    signature, attrs = signature_and_attrs(copies, types, {**constants, "stride": 1, "index": None})
    assert signature["stride"] == signature["index"] == "constexpr"
    assert attrs == {(0,): divisible, (2,): divisible, (6,): []}


def test_keys_tell_compilations_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    good = a_product((64, 64, 64), 4, 2)
    keys = {cache_key(good, 90)}
    assert cache_key(replace(good, name="another name", matrix_instruction=False), 90) in keys
    changes: tuple[dict[str, Any], ...] = (
        {"num_warps": 8},
        {"num_stages": 3},
        {"maxnreg": 128},
        {"attrs": {(0,): []}},
        {"constexprs": dict(zip("MNK", (64, 64, 32), strict=True))},
        {"signature": {**good.signature, "k": "i64"}},
    )
    keys |= {cache_key(replace(good, **change), 90) for change in changes}
    keys.add(cache_key(good, 80))
    assert len(keys) == 8
    assert not is_cached(good, 90)
    compile_offline(good, 90)
    assert is_cached(good, 90) and not is_cached(good, 80)


def test_interpreted_functions_are_refused() -> None:
    script = (
        "import triton\n"
        "from fastclap.kernels.offline import Compilation, compile_offline\n"
        "def f(x): pass\n"
        "compile_offline(Compilation('f', triton.jit(f), {'x': '*fp32'}, {}, {}, 4, 1, False), 90)\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode != 0
    assert "f: cannot compile a InterpretedFunction" in run.stderr and "TRITON_INTERPRET=1" in run.stderr
