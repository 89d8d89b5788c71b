"""A Zipformer in training runs: resumed, in chunks, and with what its whiteners have found on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastclap.config import AudioTowerConfig, ZipformerConfig
from fastclap.data import BatchSampler, ClipDataset, load_manifest
from fastclap.grad_cache import GradCache
from fastclap.models.clap import CLAP
from fastclap.models.zipformer.tower import ZipformerTower
from fastclap.testing import host_syncs
from fastclap.train import checkpoint
from fastclap.train.config import OptimizerConfig, TrainConfig
from fastclap.train.loop import train
from fastclap.train.run import build_model
from fastclap.train.step import Step

Build = Callable[..., TrainConfig]
SIZES = ZipformerConfig(
    channels=[2, 4, 4],
    downsampling=[1, 2],
    layers=[1, 1],
    width=[16],
    unmasked_width=[12],
    feedforward=[16],
    heads=[2],
    kernel=[5],
    query_width=4,
    encoding_width=8,
    schedule_start=0.0,
    schedule_seconds=0.01,  # schedules move within the dozen steps of a run
)


def configured(tiny: Build, name: str = "run", **changes: Any) -> TrainConfig:
    config = tiny(name, **changes)
    config.model.audio = AudioTowerConfig(
        kind="zipformer", features="clsp", feature_options={"n_mels": 16}, zipformer=SIZES
    )
    config.optimizer = OptimizerConfig(kind="scaled-adam", learning_rate=0.03, schedule="eden", average_every=2)
    return config


def model_and_batch(config: TrainConfig) -> tuple[CLAP, Any]:
    torch.manual_seed(0)
    manifest = load_manifest(config.data.train)
    model = build_model(config, manifest, None).train()
    rows = BatchSampler(manifest, 8, seed=0).batch(0)[1]
    return model, ClipDataset(manifest, 16000, crop_seconds=0.5, seed=0)[0, 0, rows]


def test_a_resumed_run_is_the_uninterrupted_one(tiny: Build) -> None:
    whole, stopped = configured(tiny, "whole"), configured(tiny, "stopped")
    train(whole)
    stopped.steps = 6
    train(stopped)
    stopped.steps, stopped.resume = 12, True
    train(stopped)
    expected, found = (checkpoint.checkpoints(Path(config.run_dir))[-1] for config in (whole, stopped))
    for file in ("model.safetensors", "trainer.safetensors"):
        before, after = load_file(expected / file), load_file(found / file)
        assert before.keys() == after.keys()
        assert all(tensor.equal(after[name]) for name, tensor in before.items())
    whitening = load_file(found / "trainer.safetensors")["audio_tower/whitening"]
    assert len(set(whitening.tolist())) == 2  # of some whiteners the limit held at their last look


def test_chunks_repeat_what_is_drawn(tiny: Build) -> None:
    """The gradient of a cached batch is that of one pass through all chunks, with every limit and dropout."""
    model, batch = model_and_batch(configured(tiny))
    tower: Any = model.audio_branch
    tower.batches = 1000.0
    inputs = {"audio": batch.audio, "lengths": batch.lengths, "host_lengths": batch.samples}

    def loss(embeddings: Tensor) -> Tensor:
        return (embeddings @ embeddings.T).logsumexp(1).sum()

    torch.manual_seed(3)
    GradCache([tower], 3, loss)(inputs)
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(3)
    parts = [slice(0, 3), slice(3, 6), slice(6, 8)]
    whole = [tower(batch.audio[at], batch.lengths[at], host_lengths=batch.samples[at]) for at in parts]
    loss(torch.cat(whole)).backward()
    for mine, parameter in zip(found, model.parameters(), strict=True):
        assert (mine is None) == (parameter.grad is None)
        if mine is not None and parameter.grad is not None:
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)


def test_whiteners_go_by_what_all_ranks_found(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(tiny)
    model, batch = model_and_batch(config)
    step = Step(model, config)
    tower = model.audio_branch
    assert isinstance(tower, ZipformerTower)
    finish = step.gradients.finish

    def with_another_rank(flags: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
        flags, norm = finish(flags, clip_norm)
        other = torch.zeros(len(tower.whiteners), 2)
        other[0, 0], other[1, 1] = 1, 1  # its first whitener's limit held, its second's was exceeded
        flags[2:] += other.flatten()
        return flags, norm

    monkeypatch.setattr(step.gradients, "finish", with_another_rank)
    tower.whiteners[0].probability.fill_(0.25)
    tower.whiteners[1].probability.fill_(0.025)
    mine = torch.zeros(len(tower.whiteners), 2)
    monkeypatch.setattr(step, "_loss_of", lambda batch: mine.sum())  # no gradients of our own
    step([batch])
    assert tower.whiteners[0].probability.item() == pytest.approx(0.025)
    assert tower.whiteners[1].probability.item() == pytest.approx(0.25)
    assert tower.findings() is not None and not tower.findings().any()  # type: ignore[union-attr]


def test_steps_move_the_schedules(tiny: Build) -> None:
    config = configured(tiny)
    model, batch = model_and_batch(config)
    step = Step(model, config)
    for _ in range(3):
        step([batch])
    assert model.audio_branch.batches == pytest.approx(2 * 8 * 0.5 / 0.01)  # type: ignore[union-attr]


def test_no_pass_waits_for_the_device(tiny: Build) -> None:
    """With lengths that the host knows, forward and backward pass read no number, with every limit."""
    model, batch = model_and_batch(configured(tiny))
    tower: Any = model.audio_branch
    tower.batches = 1000.0
    torch.manual_seed(4)
    with host_syncs() as found:
        out = tower(batch.audio, batch.lengths, host_lengths=batch.samples)
        out.backward(torch.ones_like(out))
        tower.end_step(tower.findings())
    # the front-end checks lengths that are on the host anyway
    assert [sync for sync in found if "log_mel" not in sync] == []


def test_on_a_gpu_the_host_goes_by_what_it_was_told_a_step_ago(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = model_and_batch(configured(tiny))
    tower = model.audio_branch
    assert isinstance(tower, ZipformerTower)
    first = tower.whiteners[0]
    held = torch.zeros(len(tower.whiteners), 2)
    held[0, 0] = 1

    class OnGPU(torch.Tensor):
        """Findings whose device is said to be a GPU."""

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

    findings = held.flatten().as_subclass(OnGPU)
    tower.end_step(findings)
    assert first.probability.item() == pytest.approx(0.025) and first.launched == 0.25
    state = tower.training_state()
    tower.end_step(torch.zeros_like(held).flatten().as_subclass(OnGPU))
    assert first.launched == pytest.approx(0.025)
    resumed = model_and_batch(configured(tiny, "other"))[0].audio_branch
    assert isinstance(resumed, ZipformerTower)
    resumed.load_training_state(state)
    assert resumed.whiteners[0].launched == 0.25  # as the uninterrupted run then
    resumed.end_step(torch.zeros_like(held).flatten().as_subclass(OnGPU))
    assert resumed.whiteners[0].launched == pytest.approx(0.025)


def test_a_further_stage_begins_after_the_schedules(tiny: Build) -> None:
    first, second = configured(tiny, "first", steps=2), configured(tiny, "second", steps=4)
    train(first)
    second.init_from = str(Path(first.run_dir) / "model")
    second.steps = 2
    train(second)
    for config, start in ((first, 0.0), (second, 100_000.0)):
        saved = CLAP.from_pretrained(Path(config.run_dir) / "model").config.audio.zipformer
        assert saved.schedule_start == start
    second.steps, second.resume = 4, True
    train(second)
    assert CLAP.from_pretrained(Path(second.run_dir) / "model").config.audio.zipformer.schedule_start == 100_000.0
