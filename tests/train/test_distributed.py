"""Several gloo processes against one: same gradients in float64, same weights after training, agreement on trouble."""

from __future__ import annotations

import copy
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastclap
from fastclap.data import BatchSampler, ClipDataset, load_manifest
from fastclap.testing import assert_close_rel
from fastclap.train import distributed
from fastclap.train.config import LossConfig, TrainConfig
from fastclap.train.loop import train
from fastclap.train.objective import Objective
from fastclap.train.setup import build_model

FORK = multiprocessing.get_context("fork")


def on_ranks(size: int, function: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Run ``function(*arguments)`` in forked processes with torchrun's environment; returns their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def child(rank: int) -> None:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        function(*arguments)

    children = [FORK.Process(target=child, args=(rank,)) for rank in range(size)]
    for process in children:
        process.start()
    for process in children:
        process.join(120)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in children]


def without_dropout(config: TrainConfig) -> TrainConfig:
    config.model.audio.dropout = config.model.text.dropout = config.model.text.embedding_dropout = 0.0
    config.model.head.dropout = 0.0
    config.model.audio.time_masks = config.model.audio.frequency_masks = 0
    return config


def gradients(
    model: fastclap.CLAP, config: TrainConfig, loss: LossConfig, chunk: int, world: distributed.World
) -> None:
    """One step's averaged gradients, left in ``.grad``."""
    manifest = load_manifest(config.data.train)
    sampler = BatchSampler(manifest, config.batch_size, seed=0, rank=world.rank, world_size=world.size)
    dataset = ClipDataset(manifest, 16000, crop_seconds=0.5, seed=0, caption="global")
    model.zero_grad()
    Objective(model, loss, chunk, None, world)(dataset[(0, *sampler.batch(0))])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    distributed.average_gradients(parameters, torch.zeros(1), world)


LOSSES = [LossConfig(), LossConfig(label_smoothing=0.1), LossConfig(share_equal_captions=False)]


def _gradients_on_a_rank(model: fastclap.CLAP, config: TrainConfig, expected: dict[tuple[int, int], Any]) -> None:
    world = distributed.join("cpu")
    for (index, chunk), reference in expected.items():
        gradients(model, config, LOSSES[index], chunk, world)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert_close_rel(f"{name} (loss {index}, chunk {chunk})", reference[name], parameter.grad, 1e-7)
    distributed.leave(world)


@pytest.mark.parametrize("size", [2, 4])
def test_averaged_gradients_are_those_of_one_process(tiny: Callable[..., TrainConfig], size: int) -> None:
    """The model in float64 (log-mel and masked means stay float32), cached and not; captions recur across ranks."""
    config = without_dropout(tiny(batch_size=16))
    manifest = load_manifest(config.data.train)
    torch.manual_seed(0)
    model = build_model(config, manifest, None).double()
    model.audio_branch.feature_std.fill_(4.0)
    alone = distributed.World(0, 1, torch.device("cpu"), None)
    batch = ClipDataset(manifest, 16000, crop_seconds=0.5, seed=0, caption="global")[
        (0, *BatchSampler(manifest, 16, seed=0).batch(0))
    ]
    halves = batch.caption_ids.view(size, -1)
    assert any(set(a.tolist()) & set(b.tolist()) for a in halves for b in halves if a is not b), (
        "no caption crosses ranks"
    )
    expected = {}
    for index, loss in enumerate(LOSSES):
        gradients(model, config, loss, 0, alone)
        reference = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        for chunk in (0, 3):
            expected[(index, chunk)] = reference
    assert on_ranks(size, _gradients_on_a_rank, copy.deepcopy(model), config, expected) == [0] * size


def test_two_processes_train_like_one(tiny: Callable[..., TrainConfig]) -> None:
    """Twelve steps at one global batch, with gradient caching, weight averaging, validation and a resume in between."""
    alone, shared = (without_dropout(tiny(name, chunk_size=3)) for name in ("alone", "shared"))
    for config in (alone, shared):
        config.optimizer.schedule = "constant"  # so that the first half does not depend on the total
        config.optimizer.eps = 1e-3  # Adam divides rounding noise by itself where a gradient is about zero
    train(alone)
    shared.steps = 6
    assert on_ranks(2, train, shared) == [0, 0]
    shared.steps, shared.resume = 12, True
    assert on_ranks(2, train, shared) == [0, 0]
    expected, actual = (load_file(Path(config.run_dir) / "model" / "model.safetensors") for config in (alone, shared))
    for name, tensor in expected.items():
        assert_close_rel(name, tensor, actual[name], 1e-4)


def test_batch_that_ranks_cannot_share(tiny: Callable[..., TrainConfig], capfd: pytest.CaptureFixture[str]) -> None:
    config = tiny(batch_size=9)
    assert 0 not in on_ranks(2, train, config)
    assert "--batch-size 9 cannot be shared equally by 2 processes" in capfd.readouterr().err
