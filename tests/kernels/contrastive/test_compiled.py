"""The Triton kernels of the contrastive losses, compiled for GPUs that need not be here."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
from fastclap.kernels.offline import ARCHITECTURES, compile_offline, problems
from tests.kernels.compiling import all_problems, compilations

# The interpreter's kernels cannot be compiled, and one process has either those or the others.
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1")

MODULE = "contrastive.triton_engine"
MOST_USED = (
    "sums bf16 columns",
    "sums bf16",
    "sums bf16 columns guide",
    "sums fp32 tf32x3 columns",
    "gradient bf16 columns",
    "gradient fp32 tf32x3 columns",
    "gradient bf16 columns teacher",
    "gradient bf16 columns guide",
    "sigmoid bf16",
    "best bf16",
    "combine",
    "rows bf16",
    "finish bf16",
    "total",
    "upstream bf16 to bf16",
)
MOST_COMPILATIONS = 60  # of an architecture


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_compilation_has_a_name_of_its_own_and_covers_the_launchers_choices(arch: int) -> None:
    found = compilations(MODULE, arch)
    assert set(MOST_USED) <= set(found) and len(found) <= MOST_COMPILATIONS


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", MOST_USED)
def test_most_used_kernels_compile_without_a_problem(name: str, arch: int) -> None:
    compilation = compilations(MODULE, arch)[name]
    compiled = compile_offline(compilation, arch)
    assert problems(compilation, compiled, arch) == []
    assert compiled.loop_spills == 0


@pytest.mark.parametrize("name", ["sums bf16 columns", "gradient bf16 columns", "sigmoid bf16"])
def test_two_programs_share_a_hopper_multiprocessor(name: str) -> None:
    """One's exponentials hide behind the other's matrix products."""
    assert compile_offline(compilations(MODULE, 90)[name], 90).programs == 2


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_kernels_compile_without_a_problem(arch: int) -> None:
    assert all_problems(compilations(MODULE, arch), arch) == {}
