r"""Contrastive losses, forward and backward: ours compared with their peers (`bench.peers`), on this machine.

    pytest --benchmark-only --benchmark-group-by=group -rs bench/test_contrastive.py
    FASTCLAP_BENCH_ROWS=65536 FASTCLAP_BENCH_DIM=768 pytest --benchmark-only -rs bench/test_contrastive.py

On a GPU N = 4,096 to 262,144, D = 512, 768 and 1024, bf16 (minutes to an hour, the largest N dominates); on a CPU small
float32 sizes. FASTCLAP_BENCH_ROWS, _DIM, _DEVICE, _DTYPE and _ROUNDS change that. Before every timed round of a form
another form of the group runs, in turn, so that all see the same machine; inputs rotate as `bench.timing` says; a call
on a GPU ends with a synchronisation. A form that is not installed, or runs out of memory, is skipped with that reason
(`-rs` lists them). Memory, errors and rates are in the `extra_info` of `--benchmark-json`. One record of it all, with
stages and plots, is `python -m bench.gpu --lots loss loss_more`.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peers, timing
from bench.compare import Warm, matmul_rate, warm_up
from bench.gpu.loss import loss_entries
from bench.peers import SCALE
from bench.run import ABSENT, Record, Run, Settings, dtype_name
from fastclap.losses import info_nce

DEVICE = torch.device(os.environ.get("FASTCLAP_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "cpu"))
ON_GPU = DEVICE.type == "cuda"
DTYPE = getattr(torch, os.environ.get("FASTCLAP_BENCH_DTYPE", "bfloat16" if ON_GPU else "float32"))
ROUNDS = int(os.environ.get("FASTCLAP_BENCH_ROUNDS", "7" if ON_GPU else "5"))


def numbers(variable: str, gpu: str, cpu: str) -> list[int]:
    return [int(number) for number in os.environ.get(variable, gpu if ON_GPU else cpu).split(",")]


ROWS = numbers("FASTCLAP_BENCH_ROWS", "4096,16384,65536,262144", "1024,4096")
DIMS = numbers("FASTCLAP_BENCH_DIM", "512,768,1024", "512")
CPU = torch.device("cpu")  # names alone, without importing any package
INFO_NCE = [peer.name for peer in peers.info_nce_peers(CPU, SCALE)]
SIGMOID = [peer.name for peer in peers.sigmoid_peers(CPU)]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Of the forms, whose rows go into the benchmark's own report."""
    record = Record(tmp_path_factory.mktemp("record") / "record.json")
    record.begin("losses", str(DEVICE), "")
    run = Run(record, Settings(DEVICE.type), deadline=math.inf)
    run.device, run.dtype = DEVICE, DTYPE
    return run


@functools.lru_cache(maxsize=1)  # the tests of one size follow each other
def warm_forms(run: Run, loss: str, rows: int, dim: int) -> tuple[dict[str, Warm], dict[str, str]]:
    """The forms that run, and of the others why not."""
    entries = loss_entries(run, loss, rows, dim, seconds=60.0)
    warm, reasons = warm_up(run, entries), {}
    for entry in entries:
        row = run.known(entry.case) or {}
        if "reason" in row:
            reasons[entry.form] = entry.facts["notes"] if row["reason"] == ABSENT else row["reason"]
    return warm, reasons


@functools.lru_cache(maxsize=1)
def peak_tflops() -> float | None:
    return matmul_rate(8192, DEVICE, DTYPE, seconds=2.0)[0] if ON_GPU else None


def measure(benchmark: Any, run: Run, loss: str, form: str, rows: int, dim: int) -> None:
    warm, reasons = warm_forms(run, loss, rows, dim)
    if form in reasons:
        pytest.skip(f"{form}: {reasons[form]}")
    found = warm[form]
    benchmark.group = f"{loss}, N = {rows}, D = {dim}, {dtype_name(DTYPE)}"
    others = itertools.cycle([other.call for name, other in warm.items() if name != form] or [found.call])

    def another() -> None:
        next(others)()
        if ON_GPU:
            torch.cuda.synchronize()

    def call() -> Tensor:
        value = found.call()
        if ON_GPU:
            torch.cuda.synchronize()
        return value

    value = benchmark.pedantic(call, setup=another, rounds=ROUNDS)
    benchmark.extra_info.update(timing.machine(DEVICE), **found.entry.case, **found.facts)
    if benchmark.stats is not None:  # --benchmark-disable runs each form once, without a clock
        benchmark.extra_info.update(peers.loss_rates(rows, dim, 1e3 * benchmark.stats.stats.median, peak_tflops()))
    assert 0 < value.item() < 1e4
    if found.facts.get("errors"):  # the forms compute the same loss
        assert found.facts["errors"]["loss"] < 0.02


@pytest.mark.parametrize("form", INFO_NCE)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("rows", ROWS)
def test_info_nce(benchmark: Any, run: Run, form: str, rows: int, dim: int) -> None:
    measure(benchmark, run, "info_nce", form, rows, dim)


@pytest.mark.parametrize("form", SIGMOID)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("rows", ROWS)
def test_sigmoid_loss(benchmark: Any, run: Run, form: str, rows: int, dim: int) -> None:
    measure(benchmark, run, "sigmoid", form, rows, dim)


@pytest.mark.parametrize("form", ("fastclap", "whole matrix"))
def test_info_nce_with_shared_captions(benchmark: Any, form: str) -> None:
    """Four clips share each caption."""
    rows = min(max(ROWS), 16384)
    benchmark.group = f"info_nce with ids, N = {rows}"
    ids = torch.arange(rows) // 4
    backend = "auto" if form == "fastclap" else "reference"
    inputs = timing.larger_than_cache(rows, DIMS[0], SCALE, DEVICE, DTYPE)
    call = timing.forward_backward(
        lambda a, b, scale: info_nce(a, b, scale, a_ids=ids, b_ids=ids, backend=backend), inputs
    )
    value = benchmark.pedantic(lambda: timing.elapsed_ms(call, DEVICE), warmup_rounds=1, rounds=ROUNDS)
    assert value > 0
