"""Several processes share a validation: the vectors and figures of one, and trouble on one rank is told on all."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclap import CLAP
from fastclap.data import Manifest, load_manifest
from fastclap.errors import TrainingError
from fastclap.evaluation import ClassificationTask, evaluate
from fastclap.train import distributed
from fastclap.train.config import TrainConfig
from fastclap.train.loop import train
from fastclap.train.run import build_model
from tests.train.test_distributed import on_ranks
from tests.train.test_loop import records

Build = Callable[..., TrainConfig]
EVALUATE = importlib.import_module("fastclap.evaluation.evaluate")  # the package has a function of the same name
TASKS = [ClassificationTask(), ClassificationTask("sex", ["A {} voice.", "{}."])]


@pytest.fixture
def manifest(demo_manifests: tuple[str, str], tmp_path: Path) -> Manifest:
    """Sixteen clips of which three cannot be read: a truncated one, a missing one and the longest."""
    folder = tmp_path / "data"
    shutil.copytree(Path(demo_manifests[1]).parent, folder)
    clips = load_manifest(str(folder / "valid.jsonl"))
    longest = max(range(len(clips)), key=lambda row: clips.durations[row])
    for row in {3, longest}:
        path = Path(clips[row].audio)
        path.write_bytes(path.read_bytes()[:2000])
    Path(clips[9].audio).unlink()
    return clips


@pytest.fixture
def model(tiny: Build) -> CLAP:
    config = tiny()
    torch.manual_seed(0)
    return build_model(config, load_manifest(config.data.train), None)


@pytest.fixture
def small_text_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts at a time, so that there are enough batches to share."""
    for method in (CLAP.embed_text, CLAP.text_batches):
        monkeypatch.setitem(method.__kwdefaults__, "batch_size", 2)


@pytest.fixture
def vectors_as_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A retrieval whose figures are the vectors that it is given, to the last digit."""
    vectors = lambda audio, text, *ids: {"vectors": (audio.tolist(), text.tolist())}  # noqa: E731
    monkeypatch.setattr(EVALUATE, "retrieval", vectors)


def figures(model: CLAP, manifest: Manifest, batch_size: int, group: Any = None) -> dict[str, Any]:
    result = evaluate(model, manifest, tasks=TASKS, embedding_map=True, batch_size=batch_size, process_group=group)
    assert set(result.pop("time")) == {"seconds", "audio_seconds"}
    return result


def _evaluate_on_a_rank(model: CLAP, manifest: Manifest, expected: dict[int, Any], sharded: bool) -> None:
    world = distributed.join("cpu")
    if sharded:
        distributed.shard([model.audio_branch, model.text_branch], world)
    clips: list[int] = []
    model.audio_branch.register_forward_pre_hook(lambda _, inputs: clips.append(len(inputs[0])))
    for batch_size, reference in expected.items():
        clips.clear()
        state = torch.get_rng_state()
        assert figures(model, manifest, batch_size, world.group) == reference
        assert torch.get_rng_state().equal(state) and model.training
        everything = torch.tensor([sum(clips), len(clips)])
        if sharded:  # as often on this rank as on any other
            most = everything.clone()
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
            assert most[1] == len(clips)
        else:
            torch.distributed.all_reduce(everything)
            assert everything[0] == 13 and len(clips) < 13
    distributed.leave(world)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_vectors_and_figures_of_one_process(
    model: CLAP,
    manifest: Manifest,
    small_text_batches: None,
    vectors_as_figures: None,
    size: int,
    sharded: bool,
) -> None:
    """To the last digit: whole batches are dealt. With batches of 5 the ranks have unequal numbers of them, with
    batches of 32 all but the first have none."""
    expected = {batch_size: figures(model, manifest, batch_size) for batch_size in (2, 5, 32)}
    assert expected[2]["clips"] == 13 and len(expected[2]["skipped"]) == 3
    texts = expected[2]["retrieval"]["global"]["vectors"][1]
    assert len(texts) > 2 * size, "too few texts to share"
    assert on_ranks(size, _evaluate_on_a_rank, model, manifest, expected, sharded) == [0] * size


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_validates_alike_on_any_number_of_processes(tiny: Build, size: int) -> None:
    """A learning rate of zero: the weights are the same, and so is every figure of the log and the report."""
    alone, shared = tiny("alone", steps=2, valid_every=1), tiny("shared", steps=2, valid_every=1)
    for config in (alone, shared):
        config.optimizer.learning_rate, config.optimizer.ema_decay, config.valid.batch_size = 0.0, 0.0, 3
    train(alone)
    assert on_ranks(size, train, shared) == [0] * size
    expected, found = ([{**record, "time": None} for record in records(config, "valid")] for config in (alone, shared))
    assert [record["step"] for record in expected] == [1, 2] and found == expected
    report = json.loads((Path(shared.run_dir) / "report" / "report.json").read_text())
    assert report["retrieval"] == expected[-1]["retrieval"]


def in_trouble(trouble: str) -> None:
    """From the second batch of clips on, or where figures are computed, this process fails or is killed."""
    embed_batch, calls = CLAP.embed_batch, []

    def fail(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) < 2 and trouble != "figures":
            return embed_batch(*arguments)
        if trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise MemoryError(f"no memory for {trouble}")

    if trouble == "figures":
        EVALUATE.retrieval = fail  # type: ignore[attr-defined]
    else:
        CLAP.embed_batch = fail  # type: ignore[method-assign]


def _train_with_trouble(config: TrainConfig, rank: int, trouble: str) -> None:
    if int(os.environ["RANK"]) == rank:
        in_trouble(trouble)
    train(config)


@pytest.mark.parametrize(
    ("rank", "trouble", "message"),
    [
        (1, "clips", "rank 1 could not take its part in the evaluation: MemoryError: no memory for clips"),
        (0, "figures", "rank 0 could not take its part in the evaluation: MemoryError: no memory for figures"),
        (1, "killed", "lost the connection to another process"),
        (0, "killed", "lost the connection to another process"),
    ],
)
def test_trouble_on_one_rank_ends_all(
    tiny: Build, rank: int, trouble: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny(steps=4, valid_every=2, batch_size=12)
    config.valid.batch_size = 2
    codes = on_ranks(3, _train_with_trouble, config, rank, trouble)
    assert codes[rank] == (-signal.SIGKILL if trouble == "killed" else 1)
    assert [code for other, code in enumerate(codes) if other != rank] == [1, 1]
    error = capfd.readouterr().err
    assert error.count(f"{TrainingError.__name__}: ") == 2 and error.count(message) == 2
    assert error.count("MemoryError: no memory for") == (0 if trouble == "killed" else 3)


def _evaluate_sharded_with_trouble(model: CLAP, manifest: Manifest) -> None:
    world = distributed.join("cpu")
    distributed.shard([model.audio_branch, model.text_branch], world)
    if not world.is_main:
        in_trouble("clips")
    try:
        figures(model, manifest, 2, world.group)
    except RuntimeError as error:
        assert distributed.is_lost_connection(error, world)
        os._exit(7)


def test_a_rank_of_sharded_towers_that_fails_ends_the_others(
    model: CLAP, manifest: Manifest, capfd: pytest.CaptureFixture[str]
) -> None:
    """The others wait for its part of the weights, so nothing can be told; that its connection is gone, they notice."""
    assert on_ranks(2, _evaluate_sharded_with_trouble, model, manifest) == [7, 1]
    assert "MemoryError: no memory for clips" in capfd.readouterr().err
