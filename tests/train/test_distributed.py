"""Several gloo processes against one: same gradients in float64, same weights after training, agreement on trouble."""

from __future__ import annotations

import atexit
import contextlib
import copy
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fastclap
from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.data import Batch, BatchSampler, ClipDataset, Manifest, load_manifest
from fastclap.data.tags import TagPrompts
from fastclap.errors import ConfigError
from fastclap.kernels.contrastive import shared
from fastclap.losses import info_nce
from fastclap.testing import assert_close_rel
from fastclap.train import cli, distributed, loop
from fastclap.train import step as train_step
from fastclap.train.config import LossConfig, OptimizerConfig, TrainConfig
from fastclap.train.loop import train
from fastclap.train.run import build_model
from fastclap.train.step import Objective, build_optimizer, frozen, in_order_of_arrival
from tests.train.test_speed import WAVLM, XLM_R

FORK = multiprocessing.get_context("fork")
NO_DROPOUT = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def on_ranks(size: int, function: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Run `function(*arguments)` in forked processes with torchrun's environment; returns their exit codes."""
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
    """One step's averaged gradients, left in `.grad`."""
    manifest = load_manifest(config.data.train)
    sampler = BatchSampler(manifest, config.batch_size, seed=0, rank=world.rank, world_size=world.size)
    # ranks have different numbers of clips with tags
    manifest = Manifest(row._replace(tags={}) if index % 3 else row for index, row in enumerate(manifest))
    tags = TagPrompts(manifest, "intrinsic_tags") if loss.tag_weight else None
    captions: Any = "pair" if loss is PAIRS else "perturbed" if loss.local_weight else "global"
    dataset = ClipDataset(manifest, 16000, crop_seconds=0.5, seed=0, caption=captions, tags=tags)
    model.zero_grad()
    averaged = distributed.Gradients(in_order_of_arrival(model), world)
    teacher = frozen(copy.deepcopy(model)) if loss.teacher else None  # of another temperature
    Objective(model, loss, chunk, None, world, averaged.held, teacher=teacher)(dataset[(0, *sampler.batch(0))])
    averaged.finish(torch.zeros(1))


LOSSES = [LossConfig(), LossConfig(label_smoothing=0.1), LossConfig(share_equal_captions=False)]
LOSSES += [LossConfig(tag_weight=1.0), LossConfig(tag_weight=0.5, tag_scale=10.0)]
PAIRS = LossConfig(label_smoothing=0.05)  # with two captions a clip
LOSSES += [PAIRS, LossConfig(teacher="model", teacher_weight=0.4, teacher_temperature=0.5)]
LOSSES += [LossConfig(local_weight=0.2), LossConfig(local_weight=3.0, teacher="model", teacher_weight=0.4)]


def _gradients_on_a_rank(model: fastclap.CLAP, config: TrainConfig, expected: dict[tuple[int, int], Any]) -> None:
    world = distributed.join("cpu")
    for (index, chunk), reference in expected.items():
        gradients(model, config, LOSSES[index], chunk, world)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert_close_rel(f"{name} (loss {index}, chunk {chunk})", reference[name], parameter.grad, 3e-7)
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


def _train_and_count_exchanges(config: TrainConfig, expected: int) -> None:
    with mock.patch.object(shared, "_gather_headers", wraps=shared._gather_headers) as exchange:
        train(config)
    assert exchange.call_count == expected


def test_ranks_exchange_row_counts_once_for_each_size_of_a_batch(tiny: Callable[..., TrainConfig]) -> None:
    cached, sigmoid, budget = (
        tiny(name, save_every=100, valid_every=0, accumulate=accumulate, chunk_size=chunk)
        for name, accumulate, chunk in (("cached", 2, 3), ("sigmoid", 1, 0), ("budget", 1, 0))
    )
    sigmoid.loss.kind, sigmoid.model.init_logit_bias = "sigmoid", -10.0
    budget.batch_size, budget.data.batch_seconds = 16, 5.0
    options: dict[str, Any] = {"seed": budget.seed, "max_seconds": budget.data.crop_seconds, "batch_seconds": 5.0}
    sampler = BatchSampler(load_manifest(budget.data.train), 16, world_size=2, **options)
    sizes = {len(sampler.batch(step)[1]) for step in range(budget.steps)}
    assert len(sizes) > 1
    for config, expected in ((cached, 1), (sigmoid, 1), (budget, len(sizes))):
        assert on_ranks(2, _train_and_count_exchanges, config, expected) == [0, 0], config.run_dir


def _train_with_a_bad_option(config: TrainConfig, rank: int) -> None:
    """Training in which the loss of `rank` rejects its arguments at the third step."""
    calls = itertools.count(1)

    def loss(*arguments: Any, **options: Any) -> torch.Tensor:
        bad = os.environ["RANK"] == str(rank) and next(calls) == 3
        return info_nce(*arguments, **{**options, **({"label_smoothing": 2.0} if bad else {})})

    with mock.patch.object(train_step, "info_nce", loss):
        train(config)


def test_a_loss_that_rejects_its_arguments_after_the_first_step_ends_all(
    tiny: Callable[..., TrainConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    """The others no longer ask whether it has, and are told all the same."""
    assert on_ranks(2, _train_with_a_bad_option, short_run(tiny, "struck"), 1) == [1, 1]
    message = capfd.readouterr().err
    assert "ValueError: label_smoothing must be in [0, 1), got 2.0" in message
    assert "rank 0 lost the connection to another process (rank 1: label_smoothing must be in [0, 1)" in message


def torchrun(config: TrainConfig, *options: str) -> subprocess.Popen[str]:
    """The real thing: two processes through the command line."""
    file = Path(config.run_dir).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    command += ["-m", "fastclap.train.cli", "small", "--config", str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(run: subprocess.Popen[str]) -> tuple[str, str]:
    out, error = run.communicate(timeout=180)
    assert run.returncode == 0, error
    return out, error


def exported(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run_dir) / "model" / "model.safetensors")


def test_two_processes_train_like_one(tiny: Callable[..., TrainConfig]) -> None:
    """Twenty steps at one global batch: length buckets, gradient caching, averaging, validation, and a resume.

    Replicated in each process, and sharded over both of them.
    """
    alone, replicated, sharded = (
        without_dropout(tiny(name, chunk_size=3, steps=20)) for name in ("alone", "replicated", "sharded")
    )
    for config in (alone, replicated, sharded):
        config.data.crop_seconds = 2.0
        config.optimizer.schedule = "constant"  # so that the first half does not depend on the total
        config.optimizer.eps = 1e-3  # Adam divides rounding noise by itself where a gradient is about zero
    assert alone.data.bucket_by_length
    sharded.shard = True
    train(alone)
    for config in (replicated, sharded):
        config.steps = 10
        assert on_ranks(2, train, config) == [0, 0]
        config.steps, config.resume = 20, True
    assert on_ranks(2, train, replicated) == [0, 0]
    finish(torchrun(sharded))  # as a user starts it
    for config in (replicated, sharded):
        for name, tensor in exported(alone).items():
            assert_close_rel(f"{name} ({config.run_dir})", tensor, exported(config)[name], 1e-4)
        assert last_record(config, "valid")["classification"] == last_record(alone, "valid")["classification"]


def last_record(config: TrainConfig, kind: str) -> dict[str, Any]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind][-1]


def of_transformers(**options: Any) -> fastclap.CLAP:
    """ParaSpeechCLAP's towers, tiny, with these options for both."""
    torch.manual_seed(0)
    return fastclap.CLAP(
        CLAPConfig(
            audio=AudioTowerConfig(kind="wav2vec2", hf_config={**WAVLM, **options}),
            text=TextTowerConfig(kind="hf", hf_config={**XLM_R, **options}, pooling="cls"),
            head=HeadConfig(kind="linear", dim=16),
        )
    )


def random_batch(rank: int) -> Batch:
    """Four clips and captions of token ids, other ones on each rank."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 300, (4, 5), generator=generator)
    return Batch(
        step=0,
        epoch=0,
        audio=torch.randint(-3000, 3000, (4, 8000), dtype=torch.int16, generator=generator),
        lengths=torch.tensor([8000, 5000, 6000, 7000]),
        mean=None,
        std=None,
        captions=[],
        caption_ids=torch.tensor([0, 1, 2, 3]),
        rows=[],
        bad=[],
        text={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        text_rows=torch.arange(4),
        tokens=[5] * 4,
    )


BUCKET, LAST_BUCKET = 8 << 10, 1 << 10  # bytes; the towers of 16 features have 6 KiB a layer


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_leave_while_the_backward_pass_runs(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(distributed, "_BUCKET_BYTES", BUCKET)
    monkeypatch.setattr(distributed, "_LAST_BUCKET_BYTES", LAST_BUCKET)
    assert on_ranks(size, _watch_the_sending, of_transformers(num_hidden_layers=4, mask_time_prob=0.5)) == [0] * size


def _watch_the_sending(model: fastclap.CLAP) -> None:
    """Counted at the last gradient: what had not been sent; and how much of what was complete ever waited."""
    world = distributed.join("cpu")
    groups = build_optimizer(model, OptimizerConfig()).param_groups
    by_weight_decay = [p for group in groups for p in group["params"]][::-1]
    for order, chunk in ((in_order_of_arrival(model), 0), (in_order_of_arrival(model), 2), (by_weight_decay, 0)):
        found: list[
            tuple[int, int]
        ] = []  # bytes of the last pass's gradients so far, and buckets that are on their way

        def note(parameter: torch.nn.Parameter) -> None:
            if not averaged._held:  # noqa: B023
                found.append((parameter.nbytes + (found[-1][0] if found else 0), averaged._next))  # noqa: B023

        averaged = distributed.Gradients(order, world)
        hooks = [p.register_post_accumulate_grad_hook(note) for p in order]  # after that of `averaged`
        Objective(model, LossConfig(), chunk, None, world, averaged.held)(random_batch(world.rank))
        buckets = averaged._buckets
        sizes = [bucket.flat.nbytes for bucket in buckets]
        late = sum(sizes[found[-2][1] :])  # before the last gradient
        backlog = max(arrived - sum(sizes[:sent]) for arrived, sent in found)
        assert len(buckets) > 6
        if order is by_weight_decay:  # which is how gradients do not arrive
            assert backlog > 4 * BUCKET
        else:
            assert found[-1][1] == len(buckets), "all are on their way before `finish`"
            assert late == sizes[-1] <= LAST_BUCKET
            assert backlog <= 2 * BUCKET
        averaged.finish(torch.zeros(1))
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    distributed.leave(world)


def test_buckets_keep_the_order_of_arrival() -> None:
    """A bucket of another dtype or a remainder does not go before what arrives earlier, and the last one is small."""
    sizes = [100, 300, 6000, 4000, 100, 200, 20000, 10, 500, 200, 50]  # of float32
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    parameters[9] = torch.nn.Parameter(torch.zeros(200, dtype=torch.float64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_BUCKET_BYTES", 25000)
        patch.setattr(distributed, "_LAST_BUCKET_BYTES", 1000)
        buckets = distributed._in_buckets(parameters)
    place = {parameter: index for index, parameter in enumerate(parameters)}
    assert [[place[p] for p in bucket] for bucket in buckets] == [[0, 1], [2], [3, 4, 5], [6], [7, 8], [9], [10]]


@pytest.mark.parametrize("rank", [0, 2])
def test_sharded_towers_of_transformers_have_the_gradients_of_replicated_ones(rank: int) -> None:
    """Also with adapters of that rank and most of the rest frozen."""
    if rank:
        pytest.importorskip("peft")
    assert on_ranks(2, _compare_sharded_with_replicated, rank) == [0, 0]


def _compare_sharded_with_replicated(rank: int) -> None:
    world = distributed.join("cpu")
    replicated = of_transformers(**NO_DROPOUT)
    if rank:
        for tower in (replicated.config.audio, replicated.config.text):
            tower.lora_rank, tower.freeze_modules = rank, ["base.encoder"]
        torch.manual_seed(0)
        replicated = fastclap.CLAP(replicated.config)
        for name, parameter in replicated.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    sharded = copy.deepcopy(replicated)
    parts = distributed.shard([sharded.audio_branch, sharded.text_branch], world)
    whole, held = (sum(distributed.local(p).numel() for p in m.parameters()) for m in (replicated, sharded))
    assert 0.5 * whole <= held < 0.6 * whole
    batch = random_batch(world.rank)
    norms = []
    for model, modules in ((replicated, []), (sharded, parts)):
        averaged = distributed.Gradients(in_order_of_arrival(model), world, modules)
        Objective(model, LossConfig(), 2, None, world, averaged.held, every_caption=True)(batch)
        norms.append(averaged.finish(torch.zeros(1))[1])
    assert_close_rel("norm of all gradients", norms[0], norms[1], 1e-5)
    other = dict(sharded.named_parameters())
    for name, parameter in replicated.named_parameters():
        if parameter.grad is not None:
            gradient = other[name].grad
            gradient = torch.zeros_like(parameter) if gradient is None else distributed.whole({"": gradient})[""]
            assert_close_rel(name, parameter.grad, gradient, 1e-4)
    distributed.leave(world)


def test_sharded_weights_are_gathered_once_however_many_chunks_a_step_has() -> None:
    assert on_ranks(2, _watch_the_gathering) == [0, 0]


def _watch_the_gathering() -> None:
    """Bytes of weights that a step gathers; before the optimizer's turn no tower is left whole."""
    world = distributed.join("cpu")
    gather, loss_of = torch.distributed.all_gather_into_tensor, Objective.loss
    watched: list[int] = []

    def counted(output: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        watched.append(output.nbytes)
        return gather(output, *arguments, **options)

    def loss(self: Objective, *embeddings: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(torch.distributed, "all_gather_into_tensor", gather):  # embeddings are no weights
            return loss_of(self, *embeddings)

    for text_trains in (True, False):
        model = of_transformers(**NO_DROPOUT)
        for part in (model.text_branch, model.text_projection):
            part.requires_grad_(text_trains)
        parts = distributed.shard([model.audio_branch, model.text_branch], world)
        sharded = {name: p for name, p in model.named_parameters() if distributed.is_sharded(p)}
        whole = sum(4 * 2 * -(-p.shape[0] // 2) * p[:1].numel() for p in sharded.values())
        averaged = distributed.Gradients(in_order_of_arrival(model), world, parts)
        found: dict[tuple[int, int], torch.Tensor] = {}
        for chunk, accumulate in ((0, 1), (4, 1), (2, 1), (1, 1), (0, 3), (1, 3)):
            watched.clear()
            with (
                mock.patch.object(torch.distributed, "all_gather_into_tensor", counted),
                mock.patch.object(Objective, "loss", loss),
            ):
                step = Objective(model, LossConfig(), chunk, None, world, averaged.held, every_caption=True)
                for remaining in reversed(range(accumulate)):
                    with averaged.held() if remaining else contextlib.nullcontext():
                        step(random_batch(world.rank), weight=1 / accumulate)
                held = sum(not distributed.is_sharded(model.get_parameter(name)) for name in sharded)
                averaged.finish(torch.zeros(1))
            assert all(model.get_parameter(name) is p for name, p in sharded.items())
            one_pass = chunk in (0, 4) and accumulate == 1
            assert (held > 0) == (not one_pass and not text_trains), "the last pass frees what trains"
            if text_trains:
                assert sum(watched) == (2 if one_pass else 1) * whole, (chunk, accumulate)
            else:
                assert (sum(watched) > whole) if one_pass else (sum(watched) == whole), (chunk, accumulate)
            gradients = [distributed.local(p.grad) for p in sharded.values() if p.grad is not None]
            found[chunk, accumulate] = torch.cat([gradient.flatten() for gradient in gradients])
            averaged.clear()
        for case, gradient in found.items():
            assert_close_rel(f"gradients of {case}", found[0, 1], gradient, 1e-5)
    distributed.leave(world)


def _train_by_the_command_line(config: TrainConfig) -> None:
    """Through the command line to the end of the process, with a note at each of the places that it could pass."""
    atexit.register(print, f"rank {os.environ['RANK']}: exit functions")
    with mock.patch.object(cli, "parse", lambda words: config):
        cli.main(["small"])
    print("the interpreter is taken apart")


@pytest.mark.parametrize(("steps", "status"), [(1, 0), (-1, 2)])
def test_a_rank_ends_its_process_before_the_interpreter_is_taken_apart(
    tiny: Callable[..., TrainConfig], capfd: pytest.CaptureFixture[str], steps: int, status: int
) -> None:
    """Else a thread of gloo that needs Python for a tensor at that moment ends in std::terminate."""
    assert on_ranks(2, _train_by_the_command_line, short_run(tiny, "run", steps=steps)) == [status, status]
    out = capfd.readouterr().out
    assert sorted(line for line in out.splitlines() if "exit" in line) == [f"rank {r}: exit functions" for r in (0, 1)]
    assert "taken apart" not in out


def test_sharding_needs_several_processes(tiny: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match=r"--shard.*torchrun"):
        train(tiny(shard=True))


def test_a_killed_rank_ends_the_others_and_torchrun_resumes(tiny: Callable[..., TrainConfig]) -> None:
    """SIGKILL to rank 1: rank 0 says what happened, torchrun starts both again, the run ends as if nothing had been."""
    whole, struck = (
        tiny(name, steps=40, save_every=5, log_every=1, valid_every=0, resume=True) for name in ("whole", "struck")
    )
    for config in (whole, struck):
        config.data.valid = []
    assert on_ranks(2, train, whole) == [0, 0]
    run = torchrun(struck, "--max-restarts", "1")
    metrics = Path(struck.run_dir) / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 12:
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    for status in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            environment = status.read_bytes().split(b"\0")
            if b"RANK=1" in environment and int((status.parent / "stat").read_text().split()[3]) == run.pid:
                os.kill(int(status.parent.name), signal.SIGKILL)
    out, error = finish(run)
    assert "rank 0 lost the connection to another process" in error and "resumed at step" in out
    assert all(torch.equal(tensor, exported(struck)[name]) for name, tensor in exported(whole).items())
    steps = [
        record["step"] for record in map(json.loads, metrics.read_text().splitlines()) if record["kind"] == "train"
    ]
    assert steps == list(range(1, 41))


def test_batch_that_ranks_cannot_share(tiny: Callable[..., TrainConfig], capfd: pytest.CaptureFixture[str]) -> None:
    config = tiny(batch_size=9)
    assert 0 not in on_ranks(2, train, config)
    assert "--batch-size 9 cannot be shared equally by 2 processes" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# out of memory on one rank


def _train_short_of_memory(config: TrainConfig, rank: int, place: str, grace: float = 60.0) -> None:
    """Training in which memory runs out on `rank`, in the first or second pass of the third step or in its loss.

    In the passes chunks of more than two rows do not fit.
    """
    distributed._POLL_SECONDS, distributed._GRACE_SECONDS = 0.1, grace
    calls = {"text": 0, "loss": 0, "seeds": 0}
    encode, loss, seed = fastclap.CLAP.encode_text, Objective.loss, loop.seed_step

    def counting_steps(*arguments: Any) -> None:
        calls.update(seeds=calls["seeds"] + 1, text=0)
        seed(*arguments)

    def short(where: str, rows: int) -> None:
        if os.environ["RANK"] == str(rank) and calls["seeds"] == 3 and place == where and rows > 2:
            raise RuntimeError("CUDA error: out of memory")

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            short("second pass", len(gradient))
            return gradient

    def encode_text(self: fastclap.CLAP, input_ids: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        if self.training:
            short("first pass", len(input_ids))
        return Late.apply(encode(self, input_ids, *rest, **named))

    def loss_of(self: Objective, *embeddings: torch.Tensor) -> torch.Tensor:
        short("loss", 99)
        if place == "loss" and grace < 20 and calls["seeds"] == 3:
            time.sleep(600)  # like a rank whose device waits for the one that is gone
        return loss(self, *embeddings)

    fastclap.CLAP.encode_text, Objective.loss, loop.seed_step = encode_text, loss_of, counting_steps  # type: ignore[method-assign]
    train(config)


def short_run(tiny: Callable[..., TrainConfig], name: str, **changes: Any) -> TrainConfig:
    config = without_dropout(tiny(name, batch_size=16, **{"steps": 5, "log_every": 1, "valid_every": 0, **changes}))
    config.data.valid = []
    return config


def test_out_of_memory_in_the_first_pass_is_a_matter_of_one_rank(tiny: Callable[..., TrainConfig]) -> None:
    """The others wait in the loss while that one repeats its part with smaller chunks."""
    whole, struck = (short_run(tiny, name, chunk_size=4) for name in ("whole", "struck"))
    assert on_ranks(2, train, whole) == [0, 0]
    assert on_ranks(2, _train_short_of_memory, struck, 1, "first pass") == [0, 0]
    for name, tensor in exported(whole).items():
        assert_close_rel(name, tensor, exported(struck)[name], 1e-4)
    assert last_record(struck, "train")["skipped_steps"] == 0


@pytest.mark.parametrize(("size", "chunk"), [(2, 4), (4, 4)], ids=["chunked", "unchunked"])
def test_out_of_memory_after_the_loss_makes_all_ranks_skip_the_step(
    tiny: Callable[..., TrainConfig], capfd: pytest.CaptureFixture[str], size: int, chunk: int
) -> None:
    config = short_run(tiny, "struck", chunk_size=chunk)
    assert on_ranks(size, _train_short_of_memory, config, 1, "second pass") == [0] * size
    message = capfd.readouterr().err
    assert "rank 1 ran out of memory after the loss of step 3, which all ranks skip; it goes on with chunks" in message
    assert last_record(config, "train")["skipped_steps"] == 1 and last_record(config, "train")["step"] == 5
    assert all(tensor.isfinite().all() for tensor in exported(config).values())


@pytest.mark.parametrize(("size", "rank"), [(2, 0), (4, 1)])
@pytest.mark.parametrize("place", ["loss", "first pass", "second pass"])
def test_out_of_memory_that_one_rank_cannot_help_ends_all(
    tiny: Callable[..., TrainConfig], capfd: pytest.CaptureFixture[str], size: int, place: str, rank: int
) -> None:
    """In the loss; and anywhere in sharded towers, which communicate layer by layer."""
    config = short_run(tiny, "struck", chunk_size=4, shard=place != "loss")
    assert on_ranks(size, _train_short_of_memory, config, rank, place) == [1] * size
    message = capfd.readouterr().err
    assert f"TrainingError: out of memory on cpu (rank {rank}): CUDA error: out of memory. Continue with" in message
    for other in set(range(size)) - {rank}:
        assert f"rank {other} lost the connection to another process (rank {rank}: out of memory on cpu" in message
    assert message.count("a smaller --chunk-size") >= size


def test_a_rank_that_waits_for_its_device_is_stopped(
    tiny: Callable[..., TrainConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    config = short_run(tiny, "struck", chunk_size=4)
    assert on_ranks(2, _train_short_of_memory, config, 0, "loss", 2.0) == [1, 2]
    assert "rank 1 stops with another: rank 0: out of memory on cpu (rank 0)" in capfd.readouterr().err
