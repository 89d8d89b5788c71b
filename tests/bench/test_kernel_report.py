"""The report on compiled kernels, on a module of two: a good one and one without the matrix instruction."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
MODULE = """
import triton
import triton.language as tl
from fastclap.kernels.offline import Compilation

@triton.jit
def double(x, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    tl.store(x + at, 2 * tl.load(x + at))

def compilations(arch):
    for name, matrix in (("double", False), ("should multiply", True)):
        yield Compilation(name, double, {"x": "*fp32", "WIDTH": "constexpr"}, {"WIDTH": 64}, {}, 1, 1, matrix)
    yield Compilation("mistaken", double, {"y": "*fp32"}, {}, {}, 1, 1, False)
"""


def test_report_prints_a_row_a_compilation_and_fails_on_a_problem(tmp_path: Path) -> None:
    (tmp_path / "two_kernels.py").write_text(MODULE)
    out = tmp_path / "report.md"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    environment.pop("TRITON_INTERPRET", None)
    arguments = ["--module", "two_kernels", "--arch", "90", "--processes", "1", "--out", str(out)]
    command = [sys.executable, "-m", "bench.kernel_report", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert out.read_text() == done.stdout
    good, bad, mistaken = (line.split(" | ") for line in done.stdout.splitlines()[2:5])
    assert good[0] == "| double" and good[-1] == "ok |" and int(good[3]) > 0  # registers
    assert bad[-1] == "no wgmma.mma_async |"
    assert mistaken[-1].startswith("ValueError: mistaken: the signature has ['y']")
    assert done.stdout.endswith("3 compilations, 2 with a problem.\n")
