"""The Triton kernels of shared attention, compiled for GPUs that need not be here."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
from fastclap.kernels.offline import ARCHITECTURES, _cuobjdump, compile_offline, problems
from tests.kernels.compiling import all_problems, compilations

# The interpreter's kernels cannot be compiled, and one process has either those or the others.
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1")

MODULE = "shared_attention_triton"
MOST_USED = (
    "shared attention log_sum bf16",
    "shared attention forward bf16",
    "shared attention keys bf16 values",
    "shared attention queries bf16 values",
    "shared attention matrix bf16",
    "shared attention product bf16",
    "shared attention product bf16 transposed",
    "shared attention change bf16",
)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_compilation_has_a_name_of_its_own_and_covers_the_launchers_choices(arch: int) -> None:
    from fastclap.kernels.shared_attention_triton import SOURCES

    names = compilations(MODULE, arch)
    assert set(MOST_USED) <= set(names)
    for dtype in ("bf16", "fp16", "fp32 tf32x3", "fp32 tf32"):
        for kernel in ("keys", "queries"):
            assert {f"shared attention {kernel} {dtype} {source}" for source in SOURCES} <= set(names)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_tile_reaches_beyond_the_padding_or_waits_for_two_tiles(arch: int) -> None:
    from fastclap.kernels.shared_attention_triton import DTYPES, KERNELS, PADDING, tile_for

    for dtype in DTYPES:
        for kernel in KERNELS:
            tile = tile_for(arch, dtype, kernel)
            assert max(tile.rows, tile.columns, tile.depth) <= PADDING and PADDING % tile.columns == 0
        queries = tile_for(arch, dtype, "queries")
        assert queries.rows <= queries.columns


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", MOST_USED)
def test_most_used_kernels_compile_without_a_problem(name: str, arch: int) -> None:
    compilation = compilations(MODULE, arch)[name]
    assert problems(compilation, compile_offline(compilation, arch), arch) == []


def test_a_score_takes_little_more_than_half_a_load_of_the_table() -> None:
    """In the machine code of sm_90: four channels are one word, and rows i and i + 8 share what they have in common.

    A thread has 32 of 64 x 64 scores, of 18 distances; the loop over whole tiles comes with one other load.
    """
    compilation = compilations(MODULE, 90)["shared attention forward bf16"]
    code = _cuobjdump(compile_offline(compilation, 90).cubin, "-sass")
    assert 2 * 18 <= code.count("LDS.64") <= 2 * 20  # the loop, and the tile at the end


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_kernels_compile_without_a_problem(arch: int) -> None:
    assert all_problems(compilations(MODULE, arch), arch) == {}
