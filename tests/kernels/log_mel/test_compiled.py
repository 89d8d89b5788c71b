"""The Triton kernels of the log-mel, compiled for GPUs that need not be here."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
from fastclap.kernels.offline import ARCHITECTURES, compile_offline, problems
from tests.kernels.compiling import all_problems, compilations

# The interpreter's kernels cannot be compiled, and one process has either those or the others.
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1")

MODULE = "log_mel.triton_engine"
MOST_USED = (
    "log-mel frames whisper fp32 lengths",
    "log-mel frames kaldi i16 lengths offsets",
    "log-mel features kaldi bf16 masks",
    "log-mel range bf16 masks",
)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_most_used_kernels_compile_without_a_problem(arch: int) -> None:
    by_name = compilations(MODULE, arch)
    for name in MOST_USED:
        compiled = compile_offline(by_name[name], arch)
        assert problems(by_name[name], compiled, arch) == [], name
        assert compiled.loop_spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_kernels_compile_without_a_problem(arch: int) -> None:
    assert all_problems(compilations(MODULE, arch), arch) == {}
