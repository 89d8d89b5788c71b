"""Counts of launches and operations, in processes of their own: they take Triton's driver from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="the stand-in of a driver needs a C compiler")

PROGRAM = """
import json, sys
from dataclasses import asdict
import torch
from triton.tools.tensor_descriptor import TensorDescriptor
from bench import host_time

def known(x):
    for _ in range(3):
        host_time.empty_kernel[(2,)](x, x.numel(), WIDTH=16)
    host_time.described_kernel[(1,)](TensorDescriptor.from_tensor(x, [4, 16]), TensorDescriptor.from_tensor(x, [8, 16]))
    y = torch.empty_like(x).t()
    return (x + 1) @ y.t().reshape(16, 8) + x.sum()

def nothing(): ...

found = {}
with host_time.driver() as driver:
    x = torch.zeros(8, 16)
    known(x)
    found["known"] = asdict(driver.counts(lambda: known(x)))
    found["nothing"] = asdict(driver.counts(nothing))
    with host_time.on_gpu():
        for name in ("fastclap", "fastclap, forward only", "fastclap, guide", "fastclap, queue", "materialised"):
            call = host_time.forms()[name].ready(16, 16)
            call()
            found[name] = asdict(driver.counts(call))
            assert asdict(driver.counts(call)) == found[name], name
    try:
        with host_time.driver():
            pass
    except RuntimeError as error:
        found["second"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts: dict[str, Any] = json.loads(done.stdout)
    return counts


@needs_compiler
def test_a_known_sequence_is_counted(found: dict[str, Any]) -> None:
    # x + 1, sum and the last addition; a product; empty_like, two transpositions and a view
    assert found["known"] == {"launches": 4, "descriptors": 2, "products": 1, "operations": 3, "views": 4}
    assert set(found["nothing"].values()) == {0}


@needs_compiler
def test_losses_launch_what_they_should(found: dict[str, Any]) -> None:
    ours, forward, materialised = (found[name] for name in ("fastclap", "fastclap, forward only", "materialised"))
    assert ours["products"] == 2 and forward["products"] == 0 and materialised["products"] == 3
    assert ours["launches"] > forward["launches"] > 0 and materialised["launches"] == 0
    assert ours["descriptors"] >= forward["descriptors"] > 0
    assert found["fastclap, guide"]["launches"] > ours["launches"] and found["fastclap, guide"]["products"] == 2
    assert found["fastclap, queue"]["products"] == 4, "one for the queue's entries on each side"


@needs_compiler
def test_a_second_driver_is_refused(found: dict[str, Any]) -> None:
    assert "take a process that has not launched a kernel" in found["second"]
