"""The Triton kernels of the towers but attention, compiled for GPUs that need not be here."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
from fastclap.kernels.offline import ARCHITECTURES, Compilation, Compiled, compile_offline, problems
from tests.kernels.compiling import all_problems, compilations

# The interpreter's kernels cannot be compiled, and one process has either those or the others.
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1")

MODULES = (
    "layer_norm_gelu_triton",
    "residual_layer_norm_triton",
    "waveform_triton",
    "waveform_convolution_triton",
    "feed_forward_triton",
    "swoosh_triton",
    "bias_norm_triton",
    "gated_convolution_triton",
    "resampling_triton",
)
MOST_USED = (
    "layer norm gelu forward 512 bf16 fp32 weight bias",
    "layer norm gelu backward 512 bf16 fp32 weight bias sums",
    "layer norm gelu forward 1024 bf16 fp32 weight bias",
    "layer norm gelu backward 1024 bf16 fp32 weight bias sums",
    "layer norm gelu backward 512 fp32 fp32 weight bias sums",
    "layer norm gelu backward 8192 fp32 fp32 weight bias sums",
    "waveform i16 lengths to bf16",
    "waveform i16 offsets lengths to fp32",
    "waveform blocks i16 lengths",
    "waveform statistics i16 lengths",
    "waveform convolution forward 512 fp32 bf16 fp32",
    "waveform convolution backward 512 fp32 bf16 fp32",
    "waveform convolution forward 512 fp32 fp32 fp32 tf32",
    "waveform convolution backward 512 fp32 fp32 fp32 tf32x3",
    "feed forward bf16 a sums",
    "feed forward fp16 a sums unaligned",
    "feed forward fp32 a sums",
    "swoosh l forward bf16 mask",
    "swoosh l backward a bf16 mask",
    "swoosh l backward a fp32 mask",
    "bias norm forward 1280 fp32 bf16 norm bypass branch",
    "bias norm backward 1280 fp32 bf16 norm bypass branch clips",
    "bias norm backward 1280 fp32 fp32 norm bypass branch",
    "bias norm backward 4096 fp32 fp32 norm bypass branch",
    "gated convolution forward 1280 of 15 bf16 fp32",
    "gated convolution backward 1280 of 15 bf16 fp32",
    "resampling down 4 1280 fp32",
    "resampling down backward 4 sums 1280 fp32",
    "resampling up backward sums 1280 fp32",
)
RESIDUAL = (
    "residual layer norm forward 1024 fp32 bf16",
    "residual layer norm backward 1024 fp32 bf16 norm_sums branch_sum",
    "residual layer norm forward 1024 fp32 fp32",
    "residual layer norm backward 1024 fp32 fp32 norm_sums branch_sum",
    "residual layer norm backward 8192 fp32 fp32 norm_sums branch_sum",
)


def towers(arch: int) -> dict[str, Compilation]:
    found: dict[str, Compilation] = {}
    for module in MODULES:
        new = compilations(module, arch)
        assert not found.keys() & new.keys()
        found |= new
    return found


def compiled(name: str, arch: int) -> tuple[Compilation, Compiled]:
    compilation = towers(arch)[name]
    return compilation, compile_offline(compilation, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", (*MOST_USED, *RESIDUAL))
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

    for name in MOST_USED[:6]:
        compilation, result = compiled(name, arch)
        warps, registers = compilation.num_warps, compilation.maxnreg
        assert result.programs >= module.programs_of_multiprocessor(warps, registers) > 0, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_row_of_one_warp_waits_for_no_other_and_shares_nothing(arch: int) -> None:
    for name in MOST_USED[:5]:
        compilation, result = compiled(name, arch)
        assert (compilation.num_warps, compilation.constexprs["ROWS"]) == (1, 1)
        assert result.shared == 0 and "bar.sync" not in result.ptx and "barrier" not in result.ptx
    _, wide = compiled(MOST_USED[5], arch)
    assert wide.shared > 0 and "bar" in wide.ptx, "several warps meet"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_residual_stream_is_read_16_bytes_at_a_time_beside_8_of_16_bits_and_nothing_changes_threads(
    arch: int,
) -> None:
    from fastclap.kernels.layer_norm_gelu_triton import programs_of_multiprocessor

    for name in RESIDUAL[:4]:
        compilation, result = compiled(name, arch)
        assert (compilation.num_warps, compilation.constexprs["ROWS"]) == (1, 1)
        assert result.shared == 0 and "bar.sync" not in result.ptx and "barrier" not in result.ptx
        assert ".v4.b32" in result.ptx and "global.b16" not in result.ptx
        assert ("st.global.v2.b32" in result.ptx) == ("bf16" in name)
        assert result.ptx.count("shfl.sync") == 10, "the two sums of a row"
    for name in RESIDUAL:
        compilation, result = compiled(name, arch)
        assert compilation.maxnreg is not None
        assert result.programs >= programs_of_multiprocessor(compilation.num_warps, compilation.maxnreg) > 0, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_convolution_of_waveforms_moves_rows_16_bytes_at_a_time_and_fits_as_its_launcher_counts(arch: int) -> None:
    from fastclap.kernels.waveform_convolution_triton import Tile

    for backward, kind in enumerate(("forward", "backward")):
        _, result = compiled(f"waveform convolution {kind} 512 fp32 bf16 fp32", arch)
        assert ("ld.global.v4.b32" if backward else "st.global.v4.b32") in result.ptx
        assert result.programs >= Tile(512, 11, torch.bfloat16, arch, bool(backward)).resident
        assert "mma.sync" in result.ptx and result.stack == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_feed_forward_moves_16_bytes_at_a_time_and_its_threads_share_nothing(arch: int) -> None:
    from fastclap.kernels import feed_forward_triton as module
    from fastclap.kernels.layer_norm_gelu_triton import programs_of_multiprocessor

    for name in ("feed forward bf16 a sums", "feed forward fp32 a sums"):
        _, result = compiled(name, arch)
        assert ".v4.b32" in result.ptx and "ld.global.b16" not in result.ptx and "st.global.b16" not in result.ptx
        assert result.shared == 0 and "bar.sync" not in result.ptx and "shfl.sync.bfly" not in result.ptx
        assert result.programs >= programs_of_multiprocessor(1, module.REGISTERS) > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_zipformers_kernels_leave_threads_alone_and_fit_as_their_launchers_count(arch: int) -> None:
    from fastclap.kernels.layer_norm_gelu_triton import programs_of_multiprocessor

    for name in (name for name in MOST_USED if name.startswith(("swoosh", "bias norm", "gated"))):
        compilation, result = compiled(name, arch)
        assert compilation.maxnreg is not None
        assert result.programs >= programs_of_multiprocessor(compilation.num_warps, compilation.maxnreg) > 0, name
        if not name.startswith("bias norm"):
            assert result.shared == 0 and "bar.sync" not in result.ptx and "shfl.sync" not in result.ptx
        if not name.startswith("gated"):
            assert ".v4.b32" in result.ptx and "ld.global.b16" not in result.ptx and "st.global.b16" not in result.ptx


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_kernels_compile_without_a_problem(arch: int) -> None:
    assert all_problems(towers(arch), arch) == {}
