"""Killed, stopped, out of disk, damaged: what a run promises, tried by doing it to a run.

Training runs in forked children here, so that a kill costs no fresh import of torch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import fastclap
from fastclap.errors import ConfigError, ModelError, TrainingError
from fastclap.train import checkpoint
from fastclap.train.config import TrainConfig
from fastclap.train.loop import train
from fastclap.train.step import Step

Build = Callable[..., TrainConfig]
FORK = multiprocessing.get_context("fork")


def metrics(run_dir: str) -> list[dict]:
    """All records without their wall-clock figures."""
    records = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("time", None)
    return records


def assert_same_run(expected: str, actual: str) -> None:
    assert metrics(actual) == metrics(expected)
    for file in ("model.safetensors", "trainer.safetensors"):
        before, after = (load_file(checkpoint.checkpoints(Path(run))[-1] / file) for run in (expected, actual))
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert tensor.equal(after[name]), name
    exported, resumed = (load_file(Path(run) / "model" / "model.safetensors") for run in (expected, actual))
    assert all(exported[name].equal(resumed[name]) for name in exported)


def test_twenty_kills_at_random_moments_leave_no_trace(tiny: Build) -> None:
    """SIGKILL anywhere, also inside a save (there is one after every step), then --resume: bit-identical in the end."""
    whole, killed = (tiny(name, save_every=1, steps=200, valid_every=50) for name in ("whole", "killed"))
    train(whole)
    killed.resume = True
    root, moments, struck_a_save = Path(killed.run_dir) / "checkpoints", random.Random(0), 0
    for kill in range(20):
        before = _newest(root)
        child = FORK.Process(target=train, args=(killed,))
        child.start()
        # Every fifth is struck while it starts up; the others get a step further, and half of them into a save.
        while child.is_alive() and kill % 5 and _newest(root) == before:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.015))
        while child.is_alive() and kill % 5 > 2 and not any(root.glob(".writing-*")):
            time.sleep(0.0005)
        assert child.is_alive(), f"the run ended before kill {kill + 1}"
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        struck_a_save += any(root.glob(".writing-*"))
    train(killed)
    assert_same_run(whole.run_dir, killed.run_dir)
    assert struck_a_save, "no kill fell into a save"
    assert not list(root.glob(".writing-*"))


def _newest(root: Path) -> int:
    return max((int(path.name[5:]) for path in root.glob("step-*")), default=0)


def test_sigterm_saves_and_exits_cleanly(tiny: Build) -> None:
    whole, stopped = tiny("whole", steps=40), tiny("stopped", steps=40)
    train(whole)
    child = FORK.Process(target=train, args=(stopped,))
    child.start()
    while child.is_alive() and not (Path(stopped.run_dir) / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(child.pid, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 0
    newest = checkpoint.newest_checkpoint(Path(stopped.run_dir))
    assert newest is not None and 0 < newest[1]["step"] < 40
    assert not (Path(stopped.run_dir) / "model").exists()
    stopped.resume = True
    train(stopped)
    assert_same_run(whole.run_dir, stopped.run_dir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_process_group_saves_too(tiny: Build, tmp_path: Path, number: signal.Signals) -> None:
    """What Ctrl-C and schedulers do: the loader process is hit as well, through the real command line."""
    config = tiny(steps=100000, log_every=1)
    config.data.workers = 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-m", "fastclap.train.cli", "small", "--config", str(tmp_path / "run.yaml")]
    child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    while not child.stdout.readline().startswith("step 5/"):
        assert child.poll() is None
    os.killpg(child.pid, number)
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0 and f"stopped by {number.name} at step" in out
    newest = checkpoint.newest_checkpoint(Path(config.run_dir))
    assert newest is not None and newest[1]["step"] >= 5


def test_a_full_disk_loses_nothing_older(tiny: Build, capfd: pytest.CaptureFixture[str]) -> None:
    """From step 6 on no file may grow past 4 KiB, as on a full disk: the periodic save warns, the last one fails."""
    config = tiny("full", steps=9)
    child = FORK.Process(target=_train_on_a_full_disk, args=(config,))
    child.start()
    child.join(120)
    assert child.exitcode == 3
    assert "step-6: the checkpoint could not be written" in capfd.readouterr().out
    assert [path.name for path in sorted((Path(config.run_dir) / "checkpoints").iterdir())] == ["step-3"]
    path, state, complaints = checkpoint.newest_checkpoint(Path(config.run_dir)) or pytest.fail("no checkpoint")
    assert state["step"] == 3 and not complaints
    assert fastclap.CLAP.from_pretrained(path).embed_text(["a voice"]).shape == (1, 16)


def _train_on_a_full_disk(config: TrainConfig) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    real = checkpoint.save_checkpoint

    def save(step: Step, *rest: Any) -> None:
        if step.number >= 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            real(step, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    checkpoint.save_checkpoint = save  # type: ignore[assignment]
    try:
        train(config)
    except TrainingError:
        os._exit(3)


def test_a_run_folder_is_not_overwritten(tiny: Build) -> None:
    config = tiny()
    train(config)
    with pytest.raises(ConfigError, match=r"already holds a run \(newest checkpoint step-12\).*--resume"):
        train(tiny())


def test_resuming_another_configuration_is_refused(tiny: Build) -> None:
    train(tiny(steps=3))
    with pytest.raises(ConfigError, match="batch_size was 8, now 16"):
        train(tiny(steps=3, batch_size=16, resume=True))


def test_a_finished_run_can_be_extended(tiny: Build) -> None:
    train(tiny(steps=4))
    train(tiny(steps=8, resume=True))
    assert [record["step"] for record in metrics(tiny().run_dir) if record["kind"] == "train"] == [2, 4, 6, 8]


def test_a_run_with_a_cooldown_is_extended_from_its_constant_part(tiny: Build) -> None:
    """Ten steps end with a cooldown of two; from the checkpoint before it, twenty steps are those of a longer run."""
    whole, extended = (tiny(name, steps=20, save_every=4, keep=9) for name in ("whole", "extended"))
    for config in (whole, extended):
        config.optimizer.schedule = "cooldown"
    train(whole)
    extended.steps = 10
    train(extended)
    shutil.rmtree(Path(extended.run_dir) / "checkpoints" / "step-10")
    extended.steps, extended.resume = 20, True
    train(extended)
    assert_same_run(whole.run_dir, extended.run_dir)
    rates = {record["step"]: record["learning_rate"] for record in metrics(whole.run_dir) if record["kind"] == "train"}
    assert rates[8] == rates[16] == 1e-3 > rates[18] > rates[20] == 0.0


def test_damaged_checkpoints(tiny: Build, capfd: pytest.CaptureFixture[str]) -> None:
    """The newest truncated: the one before is used and the damage reported. All damaged: an error, no fresh start."""
    config = tiny(steps=6)
    train(config)
    older, newer = checkpoint.checkpoints(Path(config.run_dir))
    weights = newer / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    train(tiny(steps=6, resume=True))
    error = capfd.readouterr().err
    assert "skipped a damaged checkpoint" in error and str(weights) in error and "bytes were written" in error
    for path in checkpoint.checkpoints(Path(config.run_dir)):
        (path / "trainer.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no checkpoint of this run is complete.*trainer.safetensors: missing"):
        train(tiny(steps=6, resume=True))
    assert older.name == "step-3"


def test_checkpoint_of_another_model(tiny: Build) -> None:
    """Weights exchanged under the same names: the tensor that differs is named."""
    first, other = tiny("first", steps=3), tiny("other", steps=3)
    other.model.audio.width = 32
    train(first)
    train(other)
    model = fastclap.CLAP.from_pretrained(first.run_dir)
    foreign = checkpoint.checkpoints(Path(other.run_dir))[-1]
    with pytest.raises(ModelError, match=r"not the weights of this configuration: .* has the shape"):
        checkpoint.restore_weights(foreign, model, averaged=True)
    with pytest.raises(ModelError, match="saved with weight averaging"):
        checkpoint.restore_weights(foreign, model, averaged=False)
