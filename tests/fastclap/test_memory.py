"""Memory that batches free: whether the next ones find it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Page faults of twenty batches of three blocks of 8 MiB, after a first one, and the most that one block can
# cause; without huge pages, of which there may or may not be some.
FAULTS = """
import ctypes, resource, numpy
from fastclap.memory import keep_freed_memory
PR_SET_THP_DISABLE = 41
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
keep_freed_memory()
for number in range(21):
    if number == 1:
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [numpy.ones(1 << 20) for _ in range(3)]
    del blocks
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
