"""The model of the best validation is kept, a run without a better one ends, and both survive a resume."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastclap
from fastclap.data import load_manifest
from fastclap.errors import ConfigError, TrainingError
from fastclap.evaluation import evaluate
from fastclap.train import checkpoint
from fastclap.train.best import Best, comparable_figures
from fastclap.train.config import TrainConfig, ValidConfig
from fastclap.train.loop import train
from fastclap.train.run import Run
from tests.train.test_distributed import on_ranks
from tests.train.test_loop import records
from tests.train.test_resume import assert_same_run

Build = Callable[..., TrainConfig]
RECALL = "retrieval/global/audio_to_text/R@5"
RANK = "retrieval/global/text_to_audio/mean_rank"


def watched(config: TrainConfig, figure: str = RANK, patience: int = 0) -> TrainConfig:
    config.valid.best, config.valid.patience, config.valid_every = figure, patience, 2
    return config


def series(config: TrainConfig, figure: str) -> list[float]:
    """The figure in each validation."""
    found = []
    for value in records(config, "valid"):
        for part in figure.split("/"):
            value = value[part]
        found.append(value)
    return found


def test_compared_by_hand() -> None:
    figures = comparable_figures(["global"], ["sex"])
    assert RECALL in figures and RANK in figures and "classification/sex/uar" in figures and len(figures) == 15
    for name, values, best, waited in (
        ("classification/sex/uar", [0.5, 0.7, 0.7, 0.6], (2, 0.7), 2),  # an equal one is not better
        (RANK, [9.0, 4.0, 5.0, 3.5], (4, 3.5), 0),  # ranks are better when they are small
    ):
        best_so_far = Best(ValidConfig(best=name, patience=2), figures, None)
        kind, group, *rest = name.split("/")
        for step, value in enumerate(values, 1):
            inner: Any = {rest[-1]: value}
            inner = {rest[0]: inner} if len(rest) == 2 else inner
            assert best_so_far.is_beaten(step, {kind: {group: inner}}) == (best_so_far.step == step)
        assert (best_so_far.step, best_so_far.value) == best
        assert best_so_far.waited == waited and best_so_far.out_of_patience == (waited == 2)
        again = Best(ValidConfig(best=name, patience=3), figures, best_so_far.state())
        assert again.state() == best_so_far.state() and not again.out_of_patience
        other = Best(ValidConfig(best="classification/sex/accuracy"), figures, best_so_far.state())
        assert other.step is None and other.value is None and other.waited == 0


def test_the_model_of_the_best_validation_is_kept(tiny: Build, capfd: pytest.CaptureFixture[str]) -> None:
    config = watched(tiny(steps=12))
    config.optimizer.learning_rate = 0.05  # up and down
    train(config)
    figures = series(config, RANK)
    at = figures.index(min(figures))
    assert len(figures) == 6 and at < 5, f"the last is the best of {figures}"
    folder = Path(config.run_dir) / "best"
    best = fastclap.CLAP.from_pretrained(folder)
    measured = evaluate(best, load_manifest(config.data.valid))
    expected = records(config, "valid")[at]
    assert {key: expected[key] for key in ("retrieval", "classification")} == {
        key: measured[key] for key in ("retrieval", "classification")
    }
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("the best so far")]
    better = [i for i, value in enumerate(figures) if value < min(figures[:i], default=float("inf"))]
    assert lines == [f"the best so far: {RANK} {figures[i]:.4f} at step {2 * i + 2}   model: {folder}" for i in better]
    newest = checkpoint.newest_checkpoint(Path(config.run_dir))
    assert newest is not None and newest[1]["totals"]["best"] == {
        "name": RANK,
        "step": 2 * at + 2,
        "value": figures[at],
        "waited": 5 - at,
    }


def test_nothing_is_kept_unless_asked(tiny: Build) -> None:
    config = tiny(steps=4, valid_every=2)
    train(config)
    assert not (Path(config.run_dir) / "best").exists()


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_gets_no_better_ends(tiny: Build, size: int, capfd: pytest.CaptureFixture[str]) -> None:
    """A learning rate of zero: the first validation is the best, and two more end the run, with everything it owes."""
    config = watched(tiny(steps=100, log_every=5, save_every=50), RECALL, patience=2)
    config.optimizer.learning_rate = 0.0
    assert on_ranks(size, train, config) == [0] * size if size > 1 else train(config)
    run = Path(config.run_dir)
    assert [record["step"] for record in records(config, "valid")] == [2, 4, 6]
    assert [record["step"] for record in records(config, "train")] == [5, 6]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-6"]
    assert (run / "report" / "report.html").exists() and (run / "best" / "model.safetensors").exists()
    assert fastclap.CLAP.from_pretrained(run / "model").embed_text(["a voice"]).shape == (1, 16)
    assert f"ended at step 6 of 100: the patience of 2 is used up, the best is {RECALL}" in capfd.readouterr().out

    config.resume = True  # as a scheduler does that starts it again
    exported = (run / "model" / "model.safetensors").stat().st_mtime_ns
    train(config)
    assert "ended at step 6 of 100" in capfd.readouterr().out
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == exported
    assert [record["step"] for record in records(config, "valid")] == [2, 4, 6]

    config.valid.patience = 3
    train(config)
    assert [record["step"] for record in records(config, "valid")] == [2, 4, 6, 8]


def _die_at(config: TrainConfig, step: int) -> None:
    """Killed after the validation of this step, of which no checkpoint knows."""
    validate = Run.validate

    def fatal(run: Run) -> None:
        validate(run)
        if run.step.number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Run.validate = fatal  # type: ignore[method-assign]
    train(config)


def test_a_killed_run_keeps_and_waits_for_the_same(tiny: Build) -> None:
    whole, killed = (watched(tiny(name, steps=40, log_every=1), RECALL, patience=3) for name in ("whole", "killed"))
    train(whole)
    last = records(whole, "valid")[-1]["step"]
    assert 8 <= last < 40, "the run did not end early"
    killed.resume = True
    for step in (4, 6, last):
        assert on_ranks(1, _die_at, killed, step) == [-signal.SIGKILL]
    train(killed)
    assert_same_run(whole.run_dir, killed.run_dir)
    states = [checkpoint.newest_checkpoint(Path(config.run_dir)) for config in (whole, killed)]
    assert states[0] is not None and states[1] is not None
    assert states[0][1]["totals"] == states[1][1]["totals"]
    best = [(Path(config.run_dir) / "best" / "model.safetensors").read_bytes() for config in (whole, killed)]
    assert best[0] == best[1]


def test_a_run_that_ended_early_and_could_not_export_does_so_later(tiny: Build) -> None:
    config = watched(tiny(steps=40), RECALL, patience=1)
    config.optimizer.learning_rate = 0.0
    train(config)
    shutil.rmtree(Path(config.run_dir) / "model")
    config.resume = True
    train(config)
    assert [record["step"] for record in records(config, "valid")] == [2, 4]
    assert (Path(config.run_dir) / "model" / "model.safetensors").exists()


def test_a_best_model_that_cannot_be_written_is_no_end(
    tiny: Build, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = watched(tiny(steps=4))
    export = Run.export

    def refuse(run: Run, folder: Path) -> None:
        if folder.name == "best":
            raise TrainingError(f"{folder}: the model could not be written (No space left on device)")
        export(run, folder)

    monkeypatch.setattr(Run, "export", refuse)
    train(config)
    assert "warning:" in (out := capfd.readouterr().out) and "training goes on" in out and "the best so far" not in out
    assert (Path(config.run_dir) / "model" / "model.safetensors").exists()


def test_unknown_figures_and_impossible_flags(tiny: Build) -> None:
    with pytest.raises(ConfigError, match=r"--valid.best R@1 is no figure.*retrieval/global/audio_to_text/R@1, .*uar"):
        train(watched(tiny(), "R@1"))
    with pytest.raises(ConfigError, match=r"--valid.best classification/mood/uar is no figure"):
        train(watched(tiny(), "classification/mood/uar", patience=1))
    without = watched(tiny())
    without.data.valid = []
    with pytest.raises(ConfigError, match=r"--data.valid"):
        train(without)
    for change in ({"best": None}, {"valid_every": 0}, {"patience": -1}):
        config = watched(tiny(), patience=2)
        for name, value in change.items():
            setattr(config if hasattr(config, name) else config.valid, name, value)
        with pytest.raises(ConfigError, match=r"--valid.patience"):
            config.check()
