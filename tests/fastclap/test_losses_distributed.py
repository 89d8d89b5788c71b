"""Two and four gloo ranks against one float64 process: losses, all gradients, models with parameters, disagreements."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastclap.losses import info_nce, sigmoid_loss
from fastclap.testing import assert_close_rel

SCRIPT = Path(__file__).with_name("contrastive_ranks.py")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contrastive_ranks", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_losses(ranks: ModuleType, results: list[dict[str, Any]], atleast: float = 0.0) -> None:
    for name, case in ranks.loss_cases().items():
        if name not in results[0]:
            # The Triton engine runs every case in float32, and not those of the torch engine.
            assert atleast and ("dtype" in case or "slow" in case), name
            continue
        leaves = [x.requires_grad_() for x in ranks.case_inputs(case)]
        loss = sigmoid_loss if case.get("loss") == "sigmoid_loss" else info_nce
        expected = loss(*leaves, backend="reference", **case["options"])
        expected.backward()
        world, tol = case["world"], max(case.get("tol", 1e-9), atleast)
        got = [results[rank][name] for rank in range(world)]
        for rank in range(world):
            assert_close_rel(f"{name}: loss on rank {rank}", expected, got[rank][0], tol)
            for index in range(2, len(leaves)):
                assert_close_rel(
                    f"{name}: scalar {index} on rank {rank}", leaves[index].grad, got[rank][1 + index], tol
                )
        for index, side in ((0, "a"), (1, "b")):
            gathered = torch.cat([blocks[1 + index] for blocks in got])
            assert_close_rel(f"{name}: gradient of {side}", world * leaves[index].grad, gathered, tol)


def check_models(ranks: ModuleType, results: list[dict[str, Any]]) -> None:
    model = ranks.make_towers(torch.float64)
    audio, text, a_ids, b_ids = ranks.model_batch(torch.float64)
    info_nce(
        model(audio=audio), model(text=text), model.log_scale.exp(), a_ids=a_ids, b_ids=b_ids, backend="reference"
    ).backward()
    for world in (2, 4):
        for how in ranks.MODEL_WAYS:
            for rank in range(world):
                got = results[rank][f"model {world} {how}"]
                for name, parameter in model.named_parameters():
                    assert_close_rel(f"{world} ranks, {how}, rank {rank}: {name}", parameter.grad, got[name], 1e-5)


def check_open_clip_modes(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        modes = result["open_clip"]
        for name in [name for name in modes if name.startswith("ours")]:
            for index, (ours, theirs) in enumerate(
                zip(modes[name], modes[name.replace("ours", "theirs")], strict=True)
            ):
                assert_close_rel(f"ClipLoss {name}, rank {rank}, tensor {index}", theirs, ours, 1e-9)
        assert torch.equal(modes["SigLipLoss"][0], results[0]["open_clip"]["SigLipLoss"][0])


def check_disagreements(results: list[dict[str, Any]]) -> None:
    told = [result["told"] for result in results]
    for name in told[0]:
        messages = [t[name] for t in told]
        assert all(message.startswith(("ValueError", "TypeError")) for message in messages), f"{name}: {messages}"
        if name in ("integers", "empty", "rows", "width", "push"):
            assert "rank(s) [1] rejected" in messages[0], name
            assert "rejected" not in messages[1], name
        elif name != "no positive":
            assert "ranks disagree on" in messages[0] and "[1]" in messages[0], f"{name}: {messages[0]}"
    assert "a must be" in told[1]["integers"] and "matryoshka has width 5" in told[1]["width"]
    for name, what in (
        ("debias", "debias"),
        ("guide", "guide_margin or guide_relative"),
        ("matryoshka", "matryoshka"),
        ("queue", "the queue's sizes or dtypes"),
        ("no queue", "the queue's sizes or dtypes"),
        ("push of another size", "embedding size"),
        ("push and loss", "loss or agree_once"),
    ):
        for rank in range(4):
            assert f"ranks disagree on {what}: rank {rank} has" in told[rank][name], name


def check_queues(ranks: ModuleType, results: list[dict[str, Any]]) -> None:
    """Every rank's queue is that of one process with all rows."""
    expected = ranks.queue_after_pushes(0, None)
    assert expected[-1].tolist() == [46, 46]
    for rank, result in enumerate(results):
        assert all(map(torch.equal, expected, result["queue"])), rank


def check_exchanges(results: list[dict[str, Any]]) -> None:
    """With `agree_once` ranks exchange row counts and options once for each kind of call; nothing else changes."""
    for rank in (0, 1):
        found = results[rank]["exchanges"]
        for loss in ("info_nce", "sigmoid_loss"):
            counts = {name.removeprefix(f"{loss}, "): n for name, (n, _) in found.items() if name.startswith(loss)}
            assert (
                counts
                | {
                    "not promised": 1,
                    "not promised again": 1,
                    "first": 1,
                    "second": 0,
                    "other rows": 1,
                    "other rows again": 0,
                    "the rows of before": 0,
                    "without normalize": 1,
                    "in another group": 1,
                    "compiled": 1,
                    "compiled, promised": 0,
                    "compiled, other rows, not promised": 1,
                    "compiled, other rows": 1,
                    "compiled, other rows again": 0,
                }
                == counts
            ), loss
            for name, same in (
                ("first", "not promised"),
                ("second", "not promised"),
                ("the rows of before", "not promised"),
                ("in another group", "not promised"),
                ("other rows again", "other rows"),
                ("compiled, promised", "compiled"),
                ("compiled, other rows again", "compiled, other rows, not promised"),
            ):
                got, expected = (found[f"{loss}, {call}"][1] for call in (name, same))
                assert len(got) == len(expected) == (4 if loss == "info_nce" else 5), f"{loss}, {name}"
                assert all(map(torch.equal, got, expected)), f"{loss}, {name}"
        count, got = found["info_nce, one rank's rows"]
        assert count == 1 and len(got) == 4, got
        assert "ranks disagree on loss or agree_once" in found["info_nce, promise of one rank"][1]
    told = [results[rank]["exchanges"]["info_nce, rejected at first"] for rank in (0, 1)]
    assert told[0] == (1, "ValueError: rank(s) [1] rejected their arguments; their own message says why")
    assert told[1][0] == 1 and "label_smoothing must be in [0, 1)" in told[1][1]
    count, message = results[1]["exchanges"]["info_nce, rejected later"]
    assert count == 0 and "label_smoothing must be in [0, 1)" in message


def run_ranks(folder: Path, *arguments: str, **environment: str) -> list[dict[str, Any]]:
    """One start of four processes runs every case; each check names the case that fails."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(SCRIPT), str(folder), *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=480)
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(4)]


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_ranks_match_one_process(tmp_path: Path) -> None:
    results, ranks = run_ranks(tmp_path), load_script()
    check_losses(ranks, results)
    check_models(ranks, results)
    check_open_clip_modes(results)
    check_disagreements(results)
    check_queues(ranks, results)
    check_exchanges(results)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_ranks_of_the_triton_engine_match_one_process(tmp_path: Path) -> None:
    """The same collectives around the Triton kernels, in Triton's interpreter and float32."""
    results = run_ranks(tmp_path, "triton", TRITON_INTERPRET="1")
    check_losses(load_script(), results, atleast=1e-4)
