r"""Contrastive losses, forward and backward: ours beside the materialised forms, at sizes given by the environment.

    pytest --benchmark-only bench/test_contrastive.py
    FASTCLAP_BENCH_ROWS=1024,16384 FASTCLAP_BENCH_DIM=768 FASTCLAP_BENCH_DEVICE=cuda FASTCLAP_BENCH_DTYPE=bfloat16 \
        pytest --benchmark-only bench/test_contrastive.py

One warm-up round, then FASTCLAP_BENCH_ROUNDS (default 5) rounds of one call each; on a GPU a call ends with a
synchronisation. All forms get the same raw embeddings and normalise them. Peak memory is `python -m
bench.contrastive_memory`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contrastive_memory import FORMS, inputs
from fastclap.losses import info_nce, sigmoid_loss

ROWS = [int(rows) for rows in os.environ.get("FASTCLAP_BENCH_ROWS", "1024,4096").split(",")]
DIM = int(os.environ.get("FASTCLAP_BENCH_DIM", "512"))
DEVICE = os.environ.get("FASTCLAP_BENCH_DEVICE", "cpu")
DTYPE = getattr(torch, os.environ.get("FASTCLAP_BENCH_DTYPE", "float32"))
ROUNDS = int(os.environ.get("FASTCLAP_BENCH_ROUNDS", "5"))

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(benchmark: Any, loss: Loss, rows: int, scale: float = 14.3) -> Tensor:
    """Benchmarks forward and backward; returns the loss."""
    tensors = inputs(rows, DIM, scale, DEVICE, DTYPE)

    def call() -> Tensor:
        for tensor in tensors:
            tensor.grad = None
        value = loss(*tensors)
        value.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return value.detach()

    benchmark.extra_info.update(rows=rows, dim=DIM, device=DEVICE, dtype=str(DTYPE), threads=torch.get_num_threads())
    return benchmark.pedantic(call, warmup_rounds=1, rounds=ROUNDS, iterations=1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scale", (14.3, 100.0))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.benchmark(group="InfoNCE")
def test_info_nce(benchmark: Any, form: str, scale: float, rows: int) -> None:
    benchmark.group = f"InfoNCE, {rows} rows, scale {scale}"
    value = run(benchmark, FORMS[form], rows, scale)
    assert 0 <= value.item() < 20


def materialised_sigmoid(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = scale * (F.normalize(a, dim=1) @ F.normalize(b, dim=1).t()) - 10.0
    labels = 2 * torch.eye(a.shape[0], device=a.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / a.shape[0]


SIGMOID_FORMS: dict[str, Loss] = {
    "fastclap": lambda a, b, scale: sigmoid_loss(a, b, scale, -10.0),
    "materialised": materialised_sigmoid,
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", SIGMOID_FORMS)
def test_sigmoid_loss(benchmark: Any, form: str, rows: int) -> None:
    benchmark.group = f"sigmoid loss, {rows} rows"
    value = run(benchmark, SIGMOID_FORMS[form], rows)
    assert value.item() > 0


@pytest.mark.parametrize("form", ("fastclap", "whole matrix"))
def test_info_nce_with_shared_captions(benchmark: Any, form: str) -> None:
    """Four clips share each caption."""
    rows = ROWS[-1]
    benchmark.group = f"InfoNCE with ids, {rows} rows"
    ids = torch.arange(rows) // 4
    backend = "torch" if form == "fastclap" else "reference"
    value = run(benchmark, lambda a, b, s: info_nce(a, b, s, a_ids=ids, b_ids=ids, backend=backend), rows)
    assert 0 <= value.item() < 20
