"""Guide, debiased negatives, queue and Matryoshka as options of a run: the loss, the queue's whereabouts, messages."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fastclap
from fastclap.data import Batch, BatchSampler, ClipDataset, load_manifest
from fastclap.errors import ConfigError
from fastclap.losses import EmbeddingQueue, info_nce
from fastclap.testing import assert_close_rel
from fastclap.train import checkpoint, distributed
from fastclap.train.cli import parse
from fastclap.train.config import LossConfig, TrainConfig
from fastclap.train.distributed import World
from fastclap.train.loop import train
from fastclap.train.run import build_model
from fastclap.train.step import Objective, Step, frozen, in_order_of_arrival
from tests.train.test_distributed import _train_short_of_memory, on_ranks, short_run, without_dropout
from tests.train.test_resume import FORK, assert_same_run
from tests.train.test_speed import syncs

Build = Callable[..., TrainConfig]
ALONE = World(0, 1, torch.device("cpu"), None)
OPTIONS: dict[str, dict[str, Any]] = {
    "guide": {"teacher": "model", "teacher_weight": 0.0, "guide_margin": 0.01},
    "relative guide": {"teacher": "model", "teacher_weight": 0.0, "guide_margin": -0.01, "guide_relative": True},
    "debias": {"debias": 0.2},
    "queue": {"queue_size": 12},
    "queue without ids": {"queue_size": 12, "share_equal_captions": False},
    "matryoshka": {"matryoshka": [4, 16]},
    "weighted matryoshka": {"matryoshka": [16, 4], "matryoshka_weights": [0.5, 2.0]},
    "most": {"debias": 0.1, "queue_size": 20, "matryoshka": [8, 16], "label_smoothing": 0.1},
}


def of_float64(config: TrainConfig) -> fastclap.CLAP:
    """Without dropout; log-mel features and masked means stay float32."""
    torch.manual_seed(0)
    model = build_model(without_dropout(config), load_manifest(config.data.train), None).double()
    model.audio_branch.feature_std.fill_(4.0)
    return model


def batches(config: TrainConfig, count: int, world: World = ALONE) -> list[Batch]:
    manifest = load_manifest(config.data.train)
    sampler = BatchSampler(manifest, config.batch_size, seed=0, rank=world.rank, world_size=world.size)
    dataset = ClipDataset(manifest, 16000, crop_seconds=0.5, seed=0, caption=config.data.captions)
    return [dataset[(step, *sampler.batch(step))] for step in range(count)]


def queue_for(config: TrainConfig, loss: LossConfig) -> EmbeddingQueue | None:
    ids = loss.share_equal_captions or config.data.captions == "pair"
    return EmbeddingQueue(loss.queue_size, 16, torch.float64, ids) if loss.queue_size else None


def records(config: TrainConfig) -> list[dict[str, Any]]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


# ---------------------------------------------------------------------------------------------------------------------
# the loss


def of_the_last_rows(seen: list[Tensor], size: int) -> Tensor:
    return torch.cat([seen[0][:0], *seen])[-size:]


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("captions", ["global", "pair"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_is_info_nce_of_its_embeddings(tiny: Build, name: str, captions: Any, chunk: int) -> None:
    """The third batch's loss and every gradient; the queue holds the last rows of the two batches before."""
    config = tiny()
    config.data.captions = captions
    model, loss = of_float64(config), LossConfig(**OPTIONS[name])
    teacher = None
    if loss.teacher:
        config.model.head.dim = 24
        teacher = frozen(of_float64(config))
    objective = Objective(model, loss, chunk, None, ALONE, teacher=teacher, queue=queue_for(config, loss))
    seen: list[list[Tensor]] = [[], [], [], []]
    for number, batch in enumerate(batches(config, 3)):
        model.zero_grad()
        found = objective(batch)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        a, b = (x.double() for x in embedded(model, batch))
        a_ids = b_ids = batch.caption_ids
        if captions == "pair":
            a_ids = torch.tensor(batch.rows)
            b_ids = a_ids.repeat(2)
        given = {"a_ids": a_ids, "b_ids": b_ids} if captions == "pair" or loss.share_equal_captions else {}
        taught = None
        if teacher is not None:
            with torch.no_grad():
                taught = (*embedded(teacher, batch), 1.0)
        options: dict[str, Any] = {}
        if loss.queue_size and number:
            rows = [of_the_last_rows(x, loss.queue_size) for x in seen]
            entries = EmbeddingQueue(loss.queue_size, 16, torch.float64, bool(given))
            entries.push(*rows[:2], *(rows[2:] if given else ()))
            options["queue"] = entries
        if loss.matryoshka:
            options["matryoshka"] = dict(zip(loss.matryoshka, loss.matryoshka_weights or [1, 1], strict=True))
        expected = info_nce(
            a, b, model.logit_scale, **given, teacher=taught, label_smoothing=loss.label_smoothing,
            guide_margin=loss.guide_margin, guide_relative=loss.guide_relative, debias=loss.debias,
            backend="reference", **options,
        )  # fmt: skip
        expected.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        for parameter_name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert_close_rel(parameter_name, parameter.grad, gradients[parameter_name], 3e-6)
        for kept, x in zip(seen, (a.detach(), b.detach(), a_ids, b_ids), strict=True):
            kept.append(x)
    if name != "queue without ids" or captions == "pair":
        plain = Objective(model, LossConfig(), 0, None, ALONE)(batch)
        assert abs(plain - found) > 1e-4, "the option changes the loss"


def embedded(model: fastclap.CLAP, batch: Batch) -> tuple[Tensor, Tensor]:
    return model.encode_audio(batch.audio, batch.lengths), model.encode_text(**model.tokenize(batch.captions))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_lowers_its_loss(tiny: Build, name: str) -> None:
    """Twenty times over the same four batches, of which the first six are without the queue."""
    config = tiny(steps=80)
    config.loss, config.optimizer.schedule = LossConfig(**OPTIONS[name]), "constant"
    config.loss.queue_after = 24 if config.loss.queue_size else 0
    model = of_float64(config).float()
    step = Step(model, config, teacher=frozen(copy.deepcopy(model)) if config.loss.teacher else None)
    given = batches(config, 4)
    losses = [sum(step([batch]).loss.item() for batch in given) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[6], losses


# ---------------------------------------------------------------------------------------------------------------------
# the queue


def test_until_it_is_used_a_queue_changes_nothing_and_then_it_is_full(tiny: Build) -> None:
    plain, queued = (tiny(name, steps=8, log_every=1, valid_every=0) for name in ("plain", "queued"))
    queued.loss.queue_size, queued.loss.queue_after = 32, 5
    for config in (plain, queued):
        train(config)
    before, after = ([record["loss"] for record in records(config)] for config in (plain, queued))
    assert after[:5] == before[:5]
    assert after[5] > 1.2 * before[5], "with five times the negatives at once"


def test_what_is_not_finite_goes_in_as_zeros(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    model, loss = of_float64(config), LossConfig(queue_size=16)
    queue = queue_for(config, loss)
    assert queue is not None
    objective = Objective(model, loss, 0, None, ALONE, queue=queue)
    first, second = batches(config, 2)
    encode = model.encode_audio

    def broken(**inputs: Any) -> Tensor:
        out = encode(**inputs)
        return torch.cat([out[:2], out[2:3] * math.nan, out[3:]])

    monkeypatch.setattr(model, "encode_audio", broken)
    assert objective(first).isnan()
    assert [row.any().item() for row in queue.a[:8]] == [True, True, False, *5 * [True]]
    monkeypatch.undo()
    assert objective(second).isfinite() and queue.rows().a.isfinite().all() and len(queue.rows().a) == 16


def test_a_step_that_runs_out_of_memory_enters_the_queue_once(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process repeats the loss with smaller chunks; the rows of the batch must not meet themselves."""
    config = tiny()
    model, loss = of_float64(config), LossConfig(queue_size=64)
    queues = [queue_for(config, loss), queue_for(config, loss)]
    plain, struck = (Objective(model, loss, 4, None, ALONE, queue=queue) for queue in queues)
    calls = 0
    of_losses = struck.loss
    encode = model.encode_audio

    def counted(*embeddings: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return of_losses(*embeddings)

    def short(**inputs: Any) -> Tensor:
        if calls == 2 and len(inputs["audio"]) > 2:  # after the loss of the second batch
            raise RuntimeError("CUDA error: out of memory")
        return encode(**inputs)

    assert struck._cache is not None
    given = batches(config, 3)
    expected = [plain(batch).item() for batch in given]
    struck._cache.loss = counted
    monkeypatch.setattr(model, "encode_audio", short)
    found = [struck(batch).item() for batch in given]
    assert calls > 3 and struck.chunk_sizes != [4, 4], "memory ran out, and the loss was repeated"
    assert found == pytest.approx(expected, rel=1e-6)
    for queue in queues:
        assert queue is not None and len(queue.rows().a) == len(queue.rows().b) == 24


@pytest.mark.parametrize("after", [0, 5])
def test_killed_and_resumed_a_queue_leaves_no_trace(tiny: Build, after: int) -> None:
    """SIGKILL between two saves; the queue wraps round in the middle of a batch, and batches are accumulated."""
    whole, killed = (tiny(name, chunk_size=3, accumulate=2) for name in ("whole", "killed"))
    for config in (whole, killed):
        config.loss = LossConfig(queue_size=20, queue_after=after, debias=0.1)
    train(whole)
    child = FORK.Process(target=_train_and_die, args=(killed, 8))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in checkpoint.checkpoints(Path(killed.run_dir))] == ["step-3", "step-6"]
    killed.resume = True
    train(killed)
    assert_same_run(whole.run_dir, killed.run_dir)
    saved = load_file(Path(whole.run_dir) / "checkpoints" / "step-12" / "trainer.safetensors")
    assert saved["queue/a"].shape == (20, 16) and saved["queue/a"].any(1).all() and "queue/b_ids" in saved


def _train_and_die(config: TrainConfig, step: int) -> None:
    update, saved = Step.update, checkpoint.Saver.save

    def updating(self: Step, *rest: Any) -> Any:
        if self.number + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, *rest)

    def saving(self: checkpoint.Saver, *rest: Any, required: bool) -> None:
        saved(self, *rest, required=True)

    Step.update, checkpoint.Saver.save = updating, saving  # type: ignore[method-assign]
    train(config)


def test_out_of_memory_on_one_rank_after_the_loss_leaves_the_queues_equal(
    tiny: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rank that is struck pushes along with the others: all batches are in, and the ranks go on together."""
    config = short_run(tiny, "struck", chunk_size=4)
    config.loss = LossConfig(queue_size=128)
    assert on_ranks(2, _train_short_of_memory, config, 1, "second pass") == [0, 0]
    assert "rank 1 ran out of memory after the loss of step 3, which all ranks skip" in capfd.readouterr().err
    assert records(config)[-1]["skipped_steps"] == 1
    saved = load_file(Path(config.run_dir) / "checkpoints" / "step-5" / "trainer.safetensors")
    assert saved["queue/_extra_state"].tolist() == [80, 80] and saved["queue/a"][:80].any(1).all()


def test_no_step_with_these_options_waits_for_the_device(tiny: Build) -> None:
    """What does not grow with the number of steps is not in the step."""
    for name in ("guide", "most"):
        counts = []
        for steps in (2, 5):
            config = tiny(f"{name} {steps}", steps=steps, log_every=1000, save_every=1000, valid_every=0)
            config.data.valid, config.loss = [], LossConfig(**OPTIONS[name])
            config.loss.teacher = "ema" if config.loss.teacher else None
            counts.append(syncs(config))
        assert len(counts[0]) == len(counts[1]), sorted(set(counts[1]))


RANKED = ["guide", "queue", "queue without ids", "most"]


def _losses_and_gradients(config: TrainConfig, world: World) -> list[tuple[Tensor, dict[str, Tensor], list[Tensor]]]:
    """Of three batches in a row, for each of `RANKED`, cached and not; the queue's content last."""
    found = []
    for name in RANKED:
        loss = LossConfig(**OPTIONS[name])
        for chunk in (0, 3):
            model, queue = of_float64(config), queue_for(config, loss)
            teacher = frozen(copy.deepcopy(model)) if loss.teacher else None
            averaged = distributed.Gradients(in_order_of_arrival(model), world)
            objective = Objective(model, loss, chunk, None, world, averaged.held, teacher=teacher, queue=queue)
            for batch in batches(config, 3, world):
                averaged.clear()
                value = objective(batch)
                averaged.finish(torch.zeros(1))
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found.append((value, gradients, [] if queue is None else [queue.a, queue.b]))
    return found


def _compare_on_a_rank(config: TrainConfig, expected: list[tuple[Tensor, dict[str, Tensor], list[Tensor]]]) -> None:
    world = distributed.join("cpu")
    for before, found in zip(expected, _losses_and_gradients(config, world), strict=True):
        assert found[0].item() == pytest.approx(before[0].item(), rel=1e-6)
        for name, gradient in before[1].items():
            assert_close_rel(name, gradient, found[1][name], 3e-6)
        for rows, own in zip(before[2], found[2], strict=True):
            assert_close_rel("queue", rows, own, 1e-6)
    distributed.leave(world)


def test_two_processes_have_the_loss_gradients_and_queue_of_one(tiny: Build) -> None:
    config = tiny(batch_size=16)
    assert on_ranks(2, _compare_on_a_rank, config, _losses_and_gradients(config, ALONE)) == [0, 0]


@pytest.mark.parametrize("shard", [False, True])
def test_a_queue_goes_on_with_another_number_of_processes(tiny: Build, shard: bool) -> None:
    """Two processes, then one, end with the weights and queue of one all along."""
    alone, changing = (without_dropout(tiny(name, steps=20, chunk_size=3)) for name in ("alone", "changing"))
    for config in (alone, changing):
        config.loss.queue_size, config.loss.matryoshka = 20, [8, 16]
        config.optimizer.schedule, config.optimizer.eps = "constant", 1e-3  # as in test_two_processes_train_like_one
    train(alone)
    changing.steps, changing.shard = 10, shard
    assert on_ranks(2, train, changing) == [0, 0]
    changing.steps, changing.shard, changing.resume = 20, False, True
    train(changing)
    for file in ("model", "trainer"):
        expected, found = (
            load_file(Path(config.run_dir) / "checkpoints" / "step-20" / f"{file}.safetensors")
            for config in (alone, changing)
        )
        for name, tensor in expected.items():
            if file == "model" or name.startswith("queue/"):
                assert_close_rel(name, tensor.double(), found[name].double(), 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# flags


def parsed(*flags: str) -> LossConfig:
    config = parse(["small", "--data.train", "a.jsonl", *flags])
    assert isinstance(config, TrainConfig)
    config.check()
    return config.loss


def test_flags() -> None:
    queue = ["--loss.queue-size", "640", "--loss.queue-after", "100", "--loss.debias", "0.1"]
    widths = ["--loss.matryoshka", "128", "64", "32", "--loss.matryoshka-weights", "1", "0.5", "0.25"]
    loss = parsed(*queue, *widths)
    assert (loss.debias, loss.queue_size, loss.queue_after) == (0.1, 640, 100)
    assert (loss.matryoshka, loss.matryoshka_weights) == ([128, 64, 32], [1.0, 0.5, 0.25])
    guide = ["--loss.guide-margin", "-0.1", "--loss.guide-relative"]
    loss = parsed("--loss.teacher", "ema", "--loss.teacher-weight", "0", *guide)
    assert (loss.guide_margin, loss.guide_relative) == (-0.1, True)


GUIDE = OPTIONS["guide"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guide_margin": 0.1}, r"--loss\.guide-margin goes by .* give --loss\.teacher and --loss\.teacher-weight 0"),
        ({**GUIDE, "teacher_weight": 0.5}, r"--loss\.guide-margin goes by .* --loss\.teacher-weight 0"),
        ({**GUIDE, "debias": 0.1}, r"--loss\.guide-margin leaves columns out, .* leave out one of them"),
        ({**GUIDE, "label_smoothing": 0.1}, r"--loss\.guide-margin leaves columns out"),
        ({**GUIDE, "queue_size": 8}, r"--loss\.guide-margin leaves columns out"),
        ({**GUIDE, "guide_margin": math.inf}, r"--loss\.guide-margin is inf; it must be a finite number"),
        ({**GUIDE, "guide_margin": 1.0, "guide_relative": True}, r"--loss\.guide-margin is 1\.0; .* below 1"),
        ({"guide_relative": True}, r"--loss\.guide-relative says how --loss\.guide-margin is meant"),
        ({"debias": 1.0}, r"--loss\.debias is 1\.0; it must be a number from 0 to below 1"),
        ({"debias": -0.1}, r"--loss\.debias is -0\.1"),
        ({"queue_size": -1}, r"--loss\.queue-size is -1; it must be a whole number from 0"),
        ({"queue_after": 5}, r"--loss\.queue-after is 5; it needs --loss\.queue-size"),
        ({"queue_after": -5, "queue_size": 8}, r"--loss\.queue-after is -5"),
        ({"matryoshka": [8, 0]}, r"--loss\.matryoshka is 0; it must be a whole number from 1"),
        ({"matryoshka": [8, 8]}, r"--loss\.matryoshka is \[8, 8\]"),
        ({"matryoshka": [8, 32]}, r"--loss\.matryoshka has width 32 and the embeddings have 16 columns"),
        ({"matryoshka": [8], "matryoshka_weights": [1.0, 2.0]}, r"--loss\.matryoshka-weights is \[1\.0, 2\.0\]; give"),
        (
            {"matryoshka": [8], "matryoshka_weights": [0.0]},
            r"--loss\.matryoshka-weights is 0\.0; it must be a",
        ),
        ({"matryoshka_weights": [1.0]}, r"--loss\.matryoshka-weights is \[1\.0\]; give a number for each of"),
        *(
            ({"kind": "sigmoid", **OPTIONS[name]}, rf"--loss\.{flag} belong to info_nce; the sigmoid loss")
            for name, flag in (("debias", "debias"), ("queue", "queue-size"), ("matryoshka", "matryoshka"))
        ),
        ({"kind": "sigmoid", "guide_margin": 0.1}, r"--loss\.guide-margin belong to info_nce"),
    ],
)
def test_impossible_contrasts(tiny: Build, options: dict[str, Any], message: str) -> None:
    config = tiny(loss=LossConfig(**options))
    config.model.init_logit_bias = -10.0
    with pytest.raises(ConfigError, match=message):
        train(config)
