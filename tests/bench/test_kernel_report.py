"""The report on compiled kernels, on a module of two: a good one and one without the matrix instruction."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench import kernel_report
from bench.kernel_report import Numbers, Result
from fastclap.kernels.offline import operator_name

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


def test_report_prints_a_row_a_compilation_writes_a_page_and_fails_on_a_problem(tmp_path: Path) -> None:
    (tmp_path / "two_kernels.py").write_text(MODULE)
    out = tmp_path / "report.md"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    environment.pop("TRITON_INTERPRET", None)
    arguments = ["--module", "two_kernels", "--arch", "90", "--processes", "1", "--out", str(out)]
    command = [sys.executable, "-m", "bench.kernel_report", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    good, bad, mistaken = (line.split(" | ") for line in done.stdout.splitlines()[2:5])
    assert good[0] == "| double" and good[-2:] == ["-", "ok |"] and int(good[3]) > 0  # registers
    assert bad[-1] == "no wgmma.mma_async |"
    assert mistaken[-1].startswith("ValueError: mistaken: the signature has ['y']")
    assert done.stdout.endswith("3 compilations, 2 with a problem.\n")

    page = out.read_text()
    assert page.startswith("# Machine code of two_kernels\n")
    assert f"    python -m bench.kernel_report --module two_kernels --arch 90 --out {out}\n" in page
    assert "**3 compilations (3 for sm_90), 2 with a problem.**" in page
    (row,) = (line for line in page.splitlines() if line.startswith("| two_kernels.double |"))
    assert row.startswith(f"| two_kernels.double | 90 | 3 | none | {good[3]} | 0 | ")
    assert "| 2 of 3, worst mistaken: ValueError: " in row, "one that does not even compile"


def _result(name: str, kernel: str, arch: int, numbers: Numbers | None, verdict: str = "ok") -> Result:
    return Result(name, kernel, arch, "mma.sync", numbers, verdict)


def test_a_summary_has_a_row_for_each_kernel_and_architecture_with_ranges_over_its_forms() -> None:
    results = [
        _result("sums bf16", "m.sums", 80, Numbers(32, 184, 0, 0, 12288, 1)),
        _result("sums fp32", "m.sums", 80, Numbers(32, 255, 24, 48, 16384, 2)),
        _result("rows bf16", "m.rows", 80, Numbers(0, 40, 0, 0, 0, 12)),
        _result("sums bf16", "m.sums", 90, Numbers(4, 128, 0, 0, 98328, 2, 0.617)),
        _result("sums fp32", "m.sums", 90, Numbers(0, 130, 80, 160, 98328, 2), "stack of 80 bytes"),
        _result("sums fp16", "m.sums", 90, Numbers(0, 130, 8, 16, 98328, 2, 0.49), "stack of 8 bytes"),
    ]
    assert list(kernel_report.summary_rows(results)) == [
        ("m.sums", "80", "2", "mma.sync", "184 to 255", "0 to 24", "12,288 to 16,384", "1 to 2", "-", "ok"),
        (
            *("m.sums", "90", "3", "mma.sync in 1", "128 to 130", "0 to 80", "98,328", "2", "49% to 62%"),
            "2 of 3, worst sums fp32: stack of 80 bytes",
        ),
        ("m.rows", "80", "1", "none", "40", "0", "0", "12", "-", "ok"),
    ]
    page = kernel_report.page(results, "COMMAND")
    assert "**6 compilations (3 for sm_80, 3 for sm_90), 2 with a problem.**" in page and "    COMMAND\n" in page
    assert "**3 compilations (3 for sm_80), none with a problem.**" in kernel_report.page(results[:3], "COMMAND")


@pytest.mark.parametrize("page", ["kernels", "kernels-towers", "kernels-zipformer", "kernels-logmel"])
def test_pages_in_the_records_name_every_kernel_of_their_modules_and_fit_on_a_page(page: str) -> None:
    text = (ROOT / "bench" / "records" / f"{page}.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 85
    (command,) = (line for line in text.splitlines() if line.startswith("    python -m bench.kernel_report"))
    modules = command.split("--module ")[1].split(" --")[0].split()
    assert command.endswith(f"--out bench/records/{page}.md")
    for module in modules:
        # By name: a module of kernels cannot be looked into where TRITON_INTERPRET is set.
        file = module.removeprefix("fastclap.kernels.").replace(".", "/").replace("triton_engine", "triton_*kernels")
        source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob(f"{file}.py"))
        for kernel in re.findall(r"^def _?(\w+)_kernel\(", source, re.MULTILINE):
            rows = [line for line in text.splitlines() if line.startswith(f"| {operator_name(module)}.{kernel} |")]
            assert [row.split(" | ")[1] for row in rows] == ["80", "90", "100"], kernel
