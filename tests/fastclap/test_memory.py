"""Memory that batches free: whether the next ones find it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Page faults of twenty blocks of 8 MiB, one after the other, with the most that one of them can cause.
FAULTS = """
import resource, numpy
from fastclap.memory import keep_freed_memory
keep_freed_memory()
numpy.ones(1 << 20)
begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    numpy.ones(1 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin, (8 << 20) // resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has these limits")
@pytest.mark.parametrize("environment", [{}, {"MALLOC_TRIM_THRESHOLD_": "0"}], ids=["default", "set by the user"])
def test_blocks_of_a_batch_are_not_fetched_from_the_system_again(environment: dict[str, str]) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS], env=clean | environment, capture_output=True, text=True, check=True
    )
    faults, of_a_block = map(int, run.stdout.split())
    assert (faults < of_a_block) == (not environment), run.stdout
