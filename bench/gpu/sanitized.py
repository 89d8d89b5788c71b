"""NVIDIA's compute-sanitizer over the CUDA log-mel kernel: on the device what g++'s sanitizers see on a CPU.

The lot `sanitized`. Run as a program it is what compute-sanitizer watches: every front-end once at odd shapes,
with lengths, offsets and masks.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import timing
from bench.kernel_peers import FRONT_ENDS, in_dtype
from bench.run import ABSENT, Row, Run
from fastclap.kernels.log_mel.operator import log_mel
from fastclap.testing import relative_error

TOOLS = ("memcheck", "racecheck", "synccheck")
SECONDS = 60.0  # of a tool, most of it the start of torch under it
FOUND = 9  # exit status
LAST_LINES = 12


def _programs() -> Iterator[str]:
    found = shutil.which("compute-sanitizer")
    if found:
        yield found
    for folder in sys.path:  # of the package nvidia-cuda-sanitizer-api
        yield from map(str, Path(folder).glob("nvidia/*/bin/compute-sanitizer"))


def sanitized(run: Run) -> None:
    """A row for each of `TOOLS`: whether it finds nothing."""
    program = None if run.tiny else next(_programs(), None)
    for tool in TOOLS:
        case = {"check": "compute-sanitizer", "tool": tool}
        if program is not None:
            run.measure(case, functools.partial(_watched, program, tool), SECONDS)
        elif run.known(case) is None:
            run.add(case, reason=ABSENT, notes="of the package nvidia-cuda-sanitizer-api, for a GPU")


def _watched(program: str, tool: str) -> Row:
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "3"]
    command += ["--kernel-name", "kernel_substring=log_mel", sys.executable, "-m", "bench.gpu.sanitized"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    lines = (result.stdout + result.stderr).splitlines()
    if result.returncode not in (0, FOUND):
        raise RuntimeError(f"it ended with {result.returncode}: {' / '.join(lines[-LAST_LINES:])}")
    return {"passed": result.returncode == 0, "failures": lines[-LAST_LINES:] if result.returncode else []}


def main() -> None:
    device = torch.device("cuda")
    for spec in FRONT_ENDS.values():
        samples = 3 * spec.win_length + 37 * spec.hop_length + 5
        lengths, offsets = torch.tensor([samples - 3, samples // 2, 1]), torch.tensor([3, 11, 7])
        time = torch.tensor([[[1, 3]], [[0, 0]], [[0, 1]]])
        for audio, features in ((torch.float32, torch.float32), (torch.int16, torch.bfloat16)):
            wanted = dataclasses.replace(in_dtype(spec, features), num_frames=60)
            clips = timing.noise(3, samples, audio, device)
            given = (lengths.to(device), wanted)
            options = {"offsets": offsets.to(device), "masks": (time.to(device), None)}
            found, expected = (log_mel(clips, *given, **options, backend=name)[0] for name in ("cuda", "torch"))
            assert relative_error(expected.double(), found.double()) < 1e-2


if __name__ == "__main__":
    main()
