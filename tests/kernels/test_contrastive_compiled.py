"""The Triton kernels of the contrastive losses, compiled for GPUs that need not be here."""

from __future__ import annotations

import os
from collections import Counter

import pytest

pytest.importorskip("triton")
from fastclap.kernels.offline import ARCHITECTURES, Compilation, compile_offline, problems

# The interpreter's kernels cannot be compiled, and one process has either those or the others.
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1")

MOST_USED = (
    "sums bf16 columns fixed",
    "sums bf16 columns store fixed",
    "sums bf16 ids columns",
    "sums fp32 tf32x3 columns fixed",
    "gradient bf16 columns inverse fixed",
    "gradient bf16 columns fixed",
    "gradient bf16 ids columns inverse fixed",
    "gradient fp32 tf32x3 columns inverse",
    "gradient bf16 columns inverse teacher",
    "convert bf16 columns inverse",
    "sigmoid bf16 inverse gradient",
    "combine ids logits",
    "factors ids logits two_sided",
    "rows bf16",
    "finish bf16 normalize",
)


def compilations(arch: int) -> dict[str, Compilation]:
    from fastclap.kernels.contrastive_triton import compilations

    return {c.name: c for c in compilations(arch)}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_compilation_has_a_name_of_its_own_and_covers_the_launchers_choices(arch: int) -> None:
    from fastclap.kernels.contrastive_triton import compilations as generate

    names = Counter(c.name for c in generate(arch))
    assert max(names.values()) == 1
    assert set(MOST_USED) <= set(names)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", MOST_USED)
def test_most_used_kernels_compile_without_a_problem(name: str, arch: int) -> None:
    compilation = compilations(arch)[name]
    compiled = compile_offline(compilation, arch)
    assert problems(compilation, compiled, arch) == []
    assert compiled.loop_spills == 0


@pytest.mark.parametrize("name", ["sums bf16 columns fixed", "gradient bf16 columns inverse fixed"])
def test_two_programs_share_a_hopper_multiprocessor(name: str) -> None:
    """One's exponentials hide behind the other's matrix products."""
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
