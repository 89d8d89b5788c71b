"""The Triton kernels of gated-Toeplitz attention, compiled for GPUs that need not be here."""

from __future__ import annotations

import os
from collections import Counter

import pytest

pytest.importorskip("triton")
from fastclap.kernels.offline import ARCHITECTURES, Compilation, compile_offline, problems

# The interpreter's kernels cannot be compiled, and one process has either those or the others.
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1")

MOST_USED = (
    "attention forward 64 bf16 dropout lengths",
    "attention keys 64 bf16 dropout lengths",
    "attention queries 64 bf16 dropout lengths",
    "attention diagonals 64 bf16 dropout lengths",
    "attention rows 64 bf16",
)


def compilations(arch: int) -> dict[str, Compilation]:
    from fastclap.kernels.toeplitz_attention_triton import compilations

    return {c.name: c for c in compilations(arch)}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_compilation_has_a_name_of_its_own_and_covers_the_launchers_choices(arch: int) -> None:
    from fastclap.kernels.toeplitz_attention_triton import KERNELS
    from fastclap.kernels.toeplitz_attention_triton import compilations as generate

    names = Counter(c.name for c in generate(arch))
    assert max(names.values()) == 1
    assert set(MOST_USED) <= set(names)
    for kernel in KERNELS:  # dropout or not, lengths or not; fp32 in both precisions
        assert sum(name.startswith(f"attention {kernel} 64 ") for name in names) == 4 * 4


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", MOST_USED)
def test_most_used_kernels_compile_without_a_problem(name: str, arch: int) -> None:
    compilation = compilations(arch)[name]
    assert problems(compilation, compile_offline(compilation, arch), arch) == []


def test_two_forward_programs_share_a_hopper_multiprocessor() -> None:
    """One's exponentials hide behind the other's matrix products."""
    name = "attention forward 64 bf16 dropout lengths"
    assert compile_offline(compilations(90)[name], 90).programs == 2


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_kernels_compile_without_a_problem(arch: int) -> None:
    found = {}
    for name, compilation in compilations(arch).items():
        wrong = problems(compilation, compile_offline(compilation, arch), arch)
        if wrong:
            found[name] = wrong
    assert found == {}
