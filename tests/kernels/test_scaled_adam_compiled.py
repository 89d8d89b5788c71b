"""The Triton kernels of scaled_adam, compiled for GPUs that need not be here."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
from bench.gpu.rehearsal import launched
from fastclap.kernels import scaled_adam
from fastclap.kernels.offline import ARCHITECTURES, cache_key, compile_offline, problems
from tests.kernels.compiling import compilations

# The interpreter's kernels cannot be compiled, and one process has either those or the others.
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1")
MODULE = "scaled_adam_triton"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_form_compiles_without_a_problem(arch: int) -> None:
    """Aligned tensors are read and written 16 bytes at a time, by enough programs to keep the memory busy."""
    for name, compilation in compilations(MODULE, arch).items():
        result = compile_offline(compilation, arch)
        assert problems(compilation, result, arch) == [] and result.spills == 0, name
        assert result.programs >= 5, name
        wide = "ld.global.v4.b32" in result.ptx
        assert wide == ("unaligned" not in name and "totals" not in name), name
        if "step" in name and wide:
            assert result.ptx.count("st.global.v4.b32") >= 3, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_launched_is_among_the_compilations(arch: int) -> None:
    known = {cache_key(c, arch) for c in compilations(MODULE, arch).values()}
    found = set()
    for offset in (0, 1):  # aligned or not
        tensors = [torch.zeros(40 + offset)[offset:] for _ in range(4)]
        p, g, d, v = ([x] for x in tensors)
        for growth in (torch.zeros(1), None):
            change = scaled_adam.Change(
                torch.zeros(1), growth, torch.ones(()), torch.tensor(False), 0.9, 0.98, 1.0, 1e-8
            )

            def call(p: list, g: list, d: list, v: list, change: scaled_adam.Change) -> None:
                scaled_adam.sums(p, g, "triton")
                scaled_adam.update_(p, g, d, v, change, "triton")

            found |= launched(lambda: call(p, g, d, v, change), arch).keys()  # noqa: B023 - at once
    assert found == known
