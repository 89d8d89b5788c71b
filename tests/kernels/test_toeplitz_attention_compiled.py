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
    "attention diagonals 64 bf16 dropout lengths",
    "attention rows 64 bf16",
)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_compilation_has_a_name_of_its_own_and_covers_the_launchers_choices(arch: int) -> None:
    from fastclap.kernels.toeplitz_attention_triton import KERNELS

    names = compilations(MODULE, arch)
    assert set(MOST_USED) <= set(names)
    for kernel in KERNELS:  # dropout or not, lengths or not; fp32 in both precisions
        assert sum(name.startswith(f"attention {kernel} 64 ") for name in names) == 4 * 4


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
