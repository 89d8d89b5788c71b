"""Killed, stopped, out of disk, damaged: what a run promises, tried by doing it to a run.

Training runs in forked children here, so that a kill costs no fresh import of torch.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fastclap
from fastclap.config import AudioTowerConfig
from fastclap.errors import ConfigError, ModelError, TrainingError, TrainingStopped
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
    assert_same_checkpoint(*(checkpoint.checkpoints(Path(run))[-1] for run in (expected, actual)))
    exported, resumed = (load_file(Path(run) / "model" / "model.safetensors") for run in (expected, actual))
    assert all(exported[name].equal(resumed[name]) for name in exported)


def assert_same_checkpoint(expected: Path, actual: Path) -> None:
    for file in ("model.safetensors", "trainer.safetensors"):
        before, after = (load_file(path / file) for path in (expected, actual))
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert tensor.equal(after[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# kills

STAGES = ("start", "step", "copy", "write", "rename", "removal")


@pytest.mark.parametrize("kills", [len(STAGES), pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_leave_no_trace(tiny: Build, kills: int) -> None:
    """SIGKILL anywhere, in every stage of a save too (there is one a step), then --resume: bit-identical in the end."""
    whole, killed = (tiny(name, save_every=1, steps=10 * kills, valid_every=20) for name in ("whole", "killed"))
    train(whole)
    killed.resume = True
    root, moments = Path(killed.run_dir) / "checkpoints", random.Random(0)
    for kill in range(kills):
        stage, before = STAGES[kill % len(STAGES)], _newest(root)
        child = FORK.Process(target=_train_and_die, args=(killed, stage, random.Random(kill)))
        child.start()
        if stage in ("start", "step"):
            while stage == "step" and child.is_alive() and _newest(root) == before:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.02))
            assert child.is_alive(), f"the run ended before kill {kill + 1}"
            os.kill(child.pid, signal.SIGKILL)
        child.join(120)
        assert child.exitcode == -signal.SIGKILL, f"kill {kill + 1}, while in {stage}"
        left, partial = checkpoint.checkpoints(Path(killed.run_dir)), list(root.glob(".writing-*"))
        complete = [path for path in left if _is_complete(path)]
        if stage == "write":
            assert partial
        if stage == "rename":
            assert not partial and len(complete) == killed.keep + 1
        if stage == "removal":
            assert left[0] not in complete and left[1:] == complete
        if stage not in ("start", "step"):
            assert complete[-1] == left[-1] and _newest(root) > before
    train(killed)
    assert_same_run(whole.run_dir, killed.run_dir)
    assert not list(root.glob(".writing-*"))
    assert all(map(_is_complete, checkpoint.checkpoints(Path(killed.run_dir))))


def _train_and_die(config: TrainConfig, stage: str, moments: random.Random) -> None:
    """Train, up to a random moment in a stage of the second, third or fourth save from now."""
    step = _newest(Path(config.run_dir) / "checkpoints") + moments.randint(2, 4)
    moment, current, calls = moments.random(), 0, 0
    real = SimpleNamespace(
        copied=checkpoint.Saver._copied,
        whole=checkpoint.whole,
        save_file=checkpoint.save_file,
        fsync=checkpoint.fsync,
        rename=os.rename,
        rmtree=shutil.rmtree,
    )

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def copied(self: checkpoint.Saver, saved: Step) -> Any:
        nonlocal current, calls
        current, calls = saved.number, int(moment * sum(map(len, checkpoint._contents(saved).values())))
        return real.copied(self, saved)

    def whole(tensors: Any) -> Any:  # called for each tensor of a copy
        nonlocal calls
        calls -= 1
        if stage == "copy" and current == step and calls < 0:
            die()
        return real.whole(tensors)

    def save_file(tensors: Any, path: Path) -> None:
        real.save_file(tensors, path)
        if stage == "write" and path.parent.name == f".writing-step-{step}" and moment < 0.5:
            os.truncate(path, int(2 * moment * path.stat().st_size))
            die()

    def fsync(path: Path) -> None:  # of each file, once all are written
        if stage == "write" and path.parent.name == f".writing-step-{step}" and path.name[0] in "Rc" and moment < 0.9:
            die()
        real.fsync(path)

    def rename(source: Path, target: Path) -> None:
        if stage == "write" and target.name == f"step-{step}":
            die()
        real.rename(source, target)
        if stage == "rename" and target.name == f"step-{step}":
            die()

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if stage == "removal" and path.name.startswith("step-") and _newest(path.parent) >= step:
            next(path.iterdir()).unlink()
            die()
        real.rmtree(path, ignore_errors)

    checkpoint.Saver._copied = copied  # type: ignore[method-assign]
    for name, function in (("whole", whole), ("save_file", save_file), ("fsync", fsync)):
        setattr(checkpoint, name, function)
    os.rename, shutil.rmtree = rename, rmtree  # type: ignore[assignment]
    train(config)


def _newest(root: Path) -> int:
    return max((int(path.name[5:]) for path in root.glob("step-*")), default=0)


def _is_complete(path: Path) -> bool:
    try:
        return bool(checkpoint.read_state(path))
    except ModelError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# writing while training goes on


def test_training_goes_on_while_a_checkpoint_is_written(
    tiny: Build, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every write but the last is held until two more steps are taken: the checkpoints are those of their own step."""
    plain, held = (tiny(name, keep=4) for name in ("plain", "held"))
    train(plain)
    capfd.readouterr()
    taken, change, nice, update, write = [0], threading.Condition(), set(), Step.update, checkpoint.write_checkpoint

    def updating(self: Step, *rest: Any) -> Any:
        result = update(self, *rest)
        with change:
            taken[0] = self.number
            change.notify_all()
        return result

    def writing(snapshot: checkpoint.Snapshot) -> checkpoint.Written:
        step = snapshot.state["step"]
        with change:
            assert change.wait_for(lambda: taken[0] >= min(step + 2, 12), timeout=120), "training waits for the write"
            assert taken[0] <= step + 3, "the next save has not waited for this one"
        nice.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return write(snapshot)

    monkeypatch.setattr(Step, "update", updating)
    monkeypatch.setattr(checkpoint, "write_checkpoint", writing)
    train(held)
    assert_same_run(plain.run_dir, held.run_dir)
    pairs = list(zip(*(checkpoint.checkpoints(Path(c.run_dir)) for c in (plain, held)), strict=True))
    assert [expected.name for expected, _ in pairs] == ["step-3", "step-6", "step-9", "step-12"]
    for expected, actual in pairs:
        assert_same_checkpoint(expected, actual)
    line = r"checkpoint at step (\d+): paused \d+\.\d s, written in \d+\.\d s \(0\.3 MB\)\n"
    assert re.findall(line, capfd.readouterr().out) == ["3", "6", "9", "12"]
    if sys.platform == "linux":
        assert nice == {min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)}


def test_without_memory_for_a_copy_training_waits_for_the_write(
    tiny: Build, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain, short = tiny("plain"), tiny("short")
    train(plain)
    capfd.readouterr()
    monkeypatch.setattr(checkpoint, "free_memory", lambda: 1_000)
    train(short)
    assert_same_run(plain.run_dir, short.run_dir)
    reason = r"; training waited, because a copy takes 0\.3 MB of host memory, of which 0\.0 MB are left\n"
    assert len(re.findall(reason, capfd.readouterr().out)) == 4


def test_memory_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "free_memory", lambda: None)
    with pytest.raises(MemoryError, match="of host memory, which it refused"):
        checkpoint.HostMemory().like({"x": torch.empty(1 << 58, device="meta")}, pinned=False)


def test_copies_share_blocks_and_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd shapes and dtypes, one tensor larger than a block: none overlaps, and a second save takes the same memory."""
    monkeypatch.setattr(checkpoint, "_BLOCK_BYTES", 1024)
    shapes = [(), (0,), (3, 5, 7), (1,), (257,), (2, 2), (1000,), (63,)]
    kinds = [torch.float32, torch.int64, torch.bfloat16, torch.bool, torch.float32, torch.float64, torch.float32]
    torch.manual_seed(0)
    tensors = {
        n: (100 * torch.randn(shape)).to(kind) for n, (shape, kind) in enumerate(itertools.product(shapes, kinds))
    }
    memory = checkpoint.HostMemory()
    copies = {name: place.fill_(1).copy_(tensors[name]) for name, place in memory.like(tensors, pinned=False).items()}
    for name, tensor in tensors.items():
        assert copies[name].dtype == tensor.dtype and copies[name].equal(tensor), name
    spans = sorted((copy.data_ptr(), copy.nbytes) for copy in copies.values() if copy.nbytes)
    assert all(begin + size <= after for (begin, size), (after, _) in itertools.pairwise(spans))
    taken = sum(-(-size // 64) * 64 for _, size in spans)
    assert sum(map(len, memory._blocks)) == taken and len(memory._blocks) < len(spans)
    again = memory.like(tensors, pinned=False)
    assert all(again[name].data_ptr() == copy.data_ptr() for name, copy in copies.items())
    more = {**tensors, "new": torch.ones(5000)}
    assert memory.like(more, pinned=False)["new"].copy_(more["new"]).equal(more["new"])


def test_an_error_nobody_expected_in_the_thread_ends_the_run(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(snapshot: checkpoint.Snapshot) -> checkpoint.Written:
        raise ZeroDivisionError("in the thread")

    monkeypatch.setattr(checkpoint, "write_checkpoint", broken)
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        train(tiny())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_from_a_gpu(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into page-locked memory; what is written is what the last step left."""
    copies, write = [], checkpoint.write_checkpoint

    def writing(snapshot: checkpoint.Snapshot) -> checkpoint.Written:
        copies.append([tensor.is_pinned() for tensor in snapshot.tensors.values() if tensor.numel()])
        return write(snapshot)

    monkeypatch.setattr(checkpoint, "write_checkpoint", writing)
    config = tiny(device="cuda", valid_every=0)
    train(config)
    assert len(copies) == 4 and all(map(all, copies))
    exported = load_file(Path(config.run_dir) / "model" / "model.safetensors")
    saved = load_file(checkpoint.checkpoints(Path(config.run_dir))[-1] / "model.safetensors")
    assert all(tensor.equal(saved[name]) for name, tensor in exported.items())


# ---------------------------------------------------------------------------------------------------------------------
# signals, full disks, damage


def test_sigterm_saves_and_exits_cleanly(tiny: Build) -> None:
    whole, stopped = tiny("whole", steps=40), tiny("stopped", steps=40)
    train(whole)
    child = FORK.Process(target=_train_until_stopped, args=(stopped,))
    child.start()
    while child.is_alive() and not (Path(stopped.run_dir) / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(child.pid, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 128 + signal.SIGTERM
    newest = checkpoint.newest_checkpoint(Path(stopped.run_dir))
    assert newest is not None and 0 < newest[1]["step"] < 40
    assert not (Path(stopped.run_dir) / "model").exists()
    stopped.resume = True
    train(stopped)
    assert_same_run(whole.run_dir, stopped.run_dir)


def _train_until_stopped(config: TrainConfig) -> None:
    try:
        train(config)
    except TrainingStopped as error:
        os._exit(128 + error.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_process_group_saves_too(tiny: Build, tmp_path: Path, number: signal.Signals) -> None:
    """What Ctrl-C and schedulers do: the loader process is hit as well, through the real command line."""
    config = tiny(steps=100000, log_every=1)
    config.data.workers = 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-m", "fastclap.train.cli", "small", "--config", str(tmp_path / "run.yaml")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen(command, start_new_session=True, text=True, **pipes)
    assert child.stdout is not None
    while not child.stdout.readline().startswith("step 5/"):
        assert child.poll() is None
    os.killpg(child.pid, number)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 128 + number and err == f"fastclap-train: stopped by {number.name}; --resume continues\n"
    newest = checkpoint.newest_checkpoint(Path(config.run_dir))
    assert newest is not None and newest[1]["step"] >= 5


def test_a_full_disk_loses_nothing_older(tiny: Build, capfd: pytest.CaptureFixture[str]) -> None:
    """From step 6 on no file may grow past 32 KiB, as on a full disk: the periodic save warns, the last one fails."""
    config = tiny("full", steps=9)
    child = FORK.Process(target=_train_on_a_full_disk, args=(config,))
    child.start()
    child.join(120)
    assert child.exitcode == 3
    out = capfd.readouterr().out
    assert re.search(r"warning: .*step-6: the checkpoint could not be written .*; training goes on", out)
    assert "checkpoint at step 3: paused" in out and "step 8/9" in out and "checkpoint at step 6" not in out
    assert [path.name for path in sorted((Path(config.run_dir) / "checkpoints").iterdir())] == ["step-3"]
    path, state, complaints = checkpoint.newest_checkpoint(Path(config.run_dir)) or pytest.fail("no checkpoint")
    assert state["step"] == 3 and not complaints
    assert fastclap.CLAP.from_pretrained(path).embed_text(["a voice"]).shape == (1, 16)


def _train_on_a_full_disk(config: TrainConfig) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    real = checkpoint.write_checkpoint

    def write(snapshot: checkpoint.Snapshot) -> checkpoint.Written:
        if snapshot.state["step"] >= 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, resource.RLIM_INFINITY))
        try:
            return real(snapshot)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    checkpoint.write_checkpoint = write  # type: ignore[assignment]
    try:
        train(config)
    except TrainingError as error:
        os._exit(3 if "step-9: the checkpoint could not be written" in str(error) else 4)


def test_a_run_folder_is_not_overwritten(tiny: Build) -> None:
    config = tiny()
    train(config)
    with pytest.raises(ConfigError, match=r"already holds a run \(newest checkpoint step-12\).*--resume"):
        train(tiny())


def test_resuming_another_configuration_is_refused(tiny: Build) -> None:
    train(tiny(steps=3))
    with pytest.raises(ConfigError, match="batch_size was 8, now 16"):
        train(tiny(steps=3, batch_size=16, resume=True))


def test_a_field_that_is_younger_than_the_checkpoint_had_its_default(tiny: Build) -> None:
    train(tiny(steps=3))
    state = checkpoint.checkpoints(Path(tiny().run_dir))[-1] / "state.json"
    saved = json.loads(state.read_text())
    del saved["config"]["loss"]["queue_size"], saved["config"]["loss"]["debias"]
    state.write_text(json.dumps(saved))
    changed = tiny(steps=3, resume=True)
    changed.loss.debias = 0.1
    with pytest.raises(ConfigError, match=r"loss\.debias was 0\.0, now 0\.1"):
        train(changed)
    train(tiny(steps=4, resume=True))
    assert checkpoint.checkpoints(Path(tiny().run_dir))[-1].name == "step-4"


def test_a_finished_run_can_be_extended(tiny: Build) -> None:
    train(tiny(steps=4))
    train(tiny(steps=8, resume=True))
    assert [record["step"] for record in metrics(tiny().run_dir) if record["kind"] == "train"] == [2, 4, 6, 8]


def test_a_run_of_transformers_towers_resumes_twice(tiny: Build) -> None:
    """What is saved is the configuration that was asked for, and not what transformers has made of it."""
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    for steps in (3, 6, 9):
        config = tiny(steps=steps, resume=True, valid_every=0)
        config.model.audio = AudioTowerConfig("whisper", hf_config={**sizes, "max_source_positions": 25})
        train(config)
    assert checkpoint.checkpoints(Path(config.run_dir))[-1].name == "step-9"


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
