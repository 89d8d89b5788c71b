"""The Triton kernels of gated-Toeplitz attention, compiled for GPUs that need not be here."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
from fastclap.kernels.offline import ARCHITECTURES, compile_offline, problems
from tests.kernels.compiling import all_problems, compilations

# The interpreter's kernels cannot be compiled, and one process has either those or the others.
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1")

MODULE = "toeplitz_attention_triton"
MOST_USED = (
    "attention forward 64 bf16 dropout lengths",
    "attention keys 64 bf16 dropout lengths",
    "attention queries 64 bf16 dropout lengths",
    "attention queries 64 bf16 dropout lengths table",
    "attention rows 64 bf16",
)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_compilation_has_a_name_of_its_own_and_covers_the_launchers_choices(arch: int) -> None:
    from fastclap.kernels.toeplitz_attention_triton import KERNELS

    names = compilations(MODULE, arch)
    assert set(MOST_USED) <= set(names)
    for kernel in KERNELS:  # dropout or not, lengths or not; fp32 in both precisions; of queries, the table or not
        forms = sum(name.startswith(f"attention {kernel} 64 ") for name in names)
        assert forms == 4 * 4 * (2 if kernel == "queries" else 1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiles_of_queries_are_wide_enough_for_sums_of_strips(arch: int) -> None:
    """What is at a distance of more than a tile's width would have to wait for two tiles."""
    from fastclap.kernels.toeplitz_attention_triton import KERNELS, STRIP, TILES

    for tiles in TILES[arch].values():
        rows, columns, *_ = tiles[KERNELS.index("queries")]
        assert rows % STRIP.value == 0 and columns >= STRIP.value


def test_memory_of_the_sums_does_not_grow_with_the_batch() -> None:
    """At most what the programs of `TABLE_PROGRAMS` and one clip more leave; as the docstring says."""
    from fastclap.kernels.toeplitz_attention_triton import AttentionTile, sums_size, table_groups

    tile = AttentionTile(64, 64, 4, 2)
    sizes = [4 * sums_size(tile, 16, 499, table_groups(tile, clips, 16, 499)) for clips in (8, 16, 32, 1024)]
    assert sizes == [4718592, 9437184, 9437184, 9437184]
    alone = 4 * sums_size(tile, 16, 1 << 16, table_groups(tile, 64, 16, 1 << 16))
    assert alone == pytest.approx(16 * (1 << 16) ** 2 / 8, rel=2e-3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", MOST_USED)
def test_most_used_kernels_compile_without_a_problem(name: str, arch: int) -> None:
    compilation = compilations(MODULE, arch)[name]
    assert problems(compilation, compile_offline(compilation, arch), arch) == []


def test_two_forward_programs_share_a_hopper_multiprocessor() -> None:
    """One's exponentials hide behind the other's matrix products."""
    name = "attention forward 64 bf16 dropout lengths"
    assert compile_offline(compilations(MODULE, 90)[name], 90).programs == 2


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_kernels_compile_without_a_problem(arch: int) -> None:
    assert all_problems(compilations(MODULE, arch), arch) == {}
