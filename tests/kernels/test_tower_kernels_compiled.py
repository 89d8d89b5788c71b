"""The Triton kernels of layer_norm_gelu and normalize_waveform, compiled for GPUs that need not be here."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
from fastclap.kernels.offline import ARCHITECTURES, Compilation, Compiled, compile_offline, problems
from tests.kernels.compiling import all_problems, compilations

# The interpreter's kernels cannot be compiled, and one process has either those or the others.
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1")

MODULES = ("layer_norm_gelu_triton", "waveform_triton")
MOST_USED = (
    "layer norm gelu forward 512 bf16 fp32 weight bias",
    "layer norm gelu backward 512 bf16 fp32 weight bias sums",
    "layer norm gelu backward 512 fp32 fp32 weight bias sums",
    "layer norm gelu backward 8192 fp32 fp32 weight bias sums",
    "waveform i16 lengths to bf16",
    "waveform i16 offsets lengths to fp32",
    "waveform blocks i16 lengths",
    "waveform statistics i16 lengths",
)


def towers(arch: int) -> dict[str, Compilation]:
    first, second = (compilations(module, arch) for module in MODULES)
    assert not first.keys() & second.keys()
    return {**first, **second}


def compiled(name: str, arch: int) -> tuple[Compilation, Compiled]:
    compilation = towers(arch)[name]
    return compilation, compile_offline(compilation, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", MOST_USED)
def test_most_used_kernels_compile_without_a_problem(name: str, arch: int) -> None:
    compilation, result = compiled(name, arch)
    assert problems(compilation, result, arch) == []
    assert result.spills == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_are_read_and_written_16_bytes_at_a_time(arch: int) -> None:
    for name in MOST_USED[:2]:
        _, result = compiled(name, arch)
        assert "ld.global" in result.ptx and ".v4.b32" in result.ptx
        assert "ld.global.b16" not in result.ptx and "st.global.b16" not in result.ptx


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_as_many_programs_stay_on_a_multiprocessor_as_the_launcher_counts_on(arch: int) -> None:
    from fastclap.kernels import layer_norm_gelu_triton as module

    for name, warps in zip(MOST_USED[:4], (module.FORWARD_WARPS, *3 * (module.BACKWARD_WARPS,)), strict=True):
        compilation, result = compiled(name, arch)
        assert result.programs >= warps // compilation.num_warps, name


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_kernels_compile_without_a_problem(arch: int) -> None:
    assert all_problems(towers(arch), arch) == {}
