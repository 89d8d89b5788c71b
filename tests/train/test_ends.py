"""How a run ends when something goes wrong: what it has reached is saved, and --resume comes to the same end."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from fastclap.data import workers
from fastclap.errors import ConfigError, DataError, FastclapError, TrainingError, TrainingStopped
from fastclap.files import locked
from fastclap.train import checkpoint, run
from fastclap.train.config import TrainConfig
from fastclap.train.loop import Interrupt, train
from fastclap.train.step import Step
from tests.train.test_resume import assert_same_run, metrics

Build = Callable[..., TrainConfig]
FORK = multiprocessing.get_context("fork")


def checkpoints(config: TrainConfig) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(Path(config.run_dir))]


# ---------------------------------------------------------------------------------------------------------------------
# nothing that has been reached is lost


def test_a_last_validation_that_fails_loses_no_step(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, failed = (tiny(name, save_every=500, valid_every=0) for name in ("whole", "failed"))
    train(whole)
    evaluate = run.evaluate

    def fails(*arguments: Any, **options: Any) -> Any:
        raise DataError("the clips have gone")

    monkeypatch.setattr(run, "evaluate", fails)
    with pytest.raises(DataError, match="the clips have gone"):
        train(failed)
    assert checkpoints(failed) == ["step-12"] and not (Path(failed.run_dir) / "model").exists()
    monkeypatch.setattr(run, "evaluate", evaluate)
    failed.resume = True
    train(failed)
    assert_same_run(whole.run_dir, failed.run_dir)


def test_a_validation_that_a_kill_kept_from_its_end_is_made_up_for(
    tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of its step comes first, so that the validation is still to be done when the run goes on."""
    whole, killed = (tiny(name, save_every=6) for name in ("whole", "killed"))
    train(whole)
    monkeypatch.setattr(run.Run, "rescue", lambda self, error: None)
    for moment in ("write_validation", "state"):  # before and after the record is written
        with monkeypatch.context() as patch:
            original = getattr(run.Journal, moment)
            calls: list[int] = []

            def dying(
                self: Any, *arguments: Any, original: Any = original, calls: list[int] = calls, moment: str = moment
            ) -> Any:
                calls.append(1)
                if moment == "write_validation" or (moment == "state" and self.validated == 6):
                    raise KeyboardInterrupt
                return original(self, *arguments)

            patch.setattr(run.Journal, moment, dying)
            with pytest.raises(KeyboardInterrupt):
                train(killed)
            assert calls and checkpoints(killed) == ["step-6"]
        killed.resume = True
    train(killed)
    assert_same_run(whole.run_dir, killed.run_dir)


@pytest.mark.parametrize("moment", ["gradients", "batch", "log"])
def test_an_error_amid_the_run_saves_what_it_has_reached(
    tiny: Build, moment: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, broken = (tiny(name, save_every=500, valid_every=0) for name in ("whole", "broken"))
    train(whole)
    names = {
        "gradients": "fastclap.train.distributed.Gradients.finish",
        "batch": "fastclap.train.step.Objective.__call__",
        "log": "fastclap.train.journal.Journal.end_interval",
    }
    module, _, attribute = names[moment].rpartition(".")
    owner: Any = getattr(sys.modules[module.rpartition(".")[0]], module.rpartition(".")[2])
    original, calls = getattr(owner, attribute), []

    def breaks(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == (4 if moment == "log" else 8):
            raise ZeroDivisionError("out of nowhere")
        return original(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(owner, attribute, breaks)
        train(broken)
    assert checkpoints(broken) == ["step-8" if moment == "log" else "step-7"]
    assert "saving what was reached, after step" in capfd.readouterr().out
    broken.resume = True
    train(broken)
    if moment == "log":  # the line of the interval that ended there is missing, and the next one is of both
        assert [record["step"] for record in metrics(broken.run_dir)] == [2, 4, 6, 10, 12, 12]
    else:
        assert_same_run(whole.run_dir, broken.run_dir)


def test_weights_amid_an_update_are_not_saved(
    tiny: Build, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny(save_every=3, valid_every=0)
    calls: list[int] = []

    def breaks(self: Any) -> None:
        calls.append(1)
        if len(calls) == 8:
            raise ZeroDivisionError("amid an update")

    monkeypatch.setattr("fastclap.models.clap.CLAP.clamp_logit_scale_", breaks)
    with pytest.raises(ZeroDivisionError):
        train(config)
    assert checkpoints(config) == ["step-3", "step-6"]
    assert "the steps since the last checkpoint could not be saved" in capfd.readouterr().out


def test_too_many_steps_that_are_not_finite(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(save_every=500, valid_every=0, max_bad_steps=3, log_every=1)
    _not_finite_from(8, monkeypatch)
    with pytest.raises(TrainingError, match="step 10: 3 steps in a row had a non-finite loss"):
        train(config)
    assert checkpoints(config) == ["step-10"]
    assert [record["loss"] is None for record in metrics(config.run_dir)] == [False] * 7 + [True] * 3


def test_a_last_interval_of_skipped_steps_alone(tiny: Build, monkeypatch: pytest.MonkeyPatch, pictures: None) -> None:
    config = tiny(valid_every=0)
    _not_finite_from(11, monkeypatch)
    train(config)
    assert metrics(config.run_dir)[-2]["loss"] is None and (Path(config.run_dir) / "report" / "report.html").exists()


def _not_finite_from(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Step.update

    def update(self: Step, loss: torch.Tensor, stop: bool, epoch: int) -> Any:
        return real(self, loss * float("nan") if self.number + 1 >= step else loss, stop, epoch)

    monkeypatch.setattr(Step, "update", update)


# ---------------------------------------------------------------------------------------------------------------------
# a log that cannot be written


class _Broken:
    """A stdout whose reader has gone, or whose disk is full, after some lines; or one that knows no arrows."""

    def __init__(self, kind: str) -> None:
        self.kind, self.lines, self.encoding = kind, 0, "ascii"

    def write(self, text: str) -> int:
        self.lines += text.count("\n")
        if self.kind == "ascii":
            text.encode("ascii")
        elif self.lines > 2:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe") if self.kind == "pipe" else OSError(errno.ENOSPC, "full")
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise ValueError("no descriptor")


@pytest.mark.parametrize("kind", ["pipe", "disk", "ascii"])
def test_a_stdout_that_fails_never_ends_a_run(tiny: Build, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, stdout = tiny(), _Broken(kind)
    monkeypatch.setattr(sys, "stdout", stdout)
    train(config)
    assert stdout.lines > 2 and checkpoints(config)[-1] == "step-12"


def test_lines_of_the_metrics_wait_for_a_full_disk(
    tiny: Build, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, full = tiny("whole"), tiny("full")
    train(whole)
    capfd.readouterr()
    begin = run.Journal.__init__

    class Full:
        name = "metrics.jsonl"

        def __init__(self, file: Any) -> None:
            self.file, self.writes = file, 0

        def write(self, data: bytes) -> int:
            self.writes += 1
            if self.writes == 2:  # as much as there is room for, which is no error yet
                return int(self.file.write(data[: len(data) // 2]))
            if 2 < self.writes < 5:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def started(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        self._file = Full(self._file)

    monkeypatch.setattr(run.Journal, "__init__", started)
    train(full)
    assert_same_run(whole.run_dir, full.run_dir)
    assert capfd.readouterr().out.count("No space left on device; its lines are kept") == 1


# ---------------------------------------------------------------------------------------------------------------------
# signals


@pytest.mark.parametrize("during", ["validation", "preparation"])
def test_a_signal_does_not_wait_for_a_validation(
    tiny: Build, during: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, begun = tiny(save_every=500), tmp_path / "begun"
    name = "evaluate" if during == "validation" else "fit_feature_statistics"

    def forever(*arguments: Any, **options: Any) -> None:
        begun.touch()
        while True:
            with contextlib.suppress(Exception):  # a signal is none
                time.sleep(0.05)

    monkeypatch.setattr(run, name, forever)
    child = FORK.Process(target=_stopped, args=(config,))
    child.start()
    while child.is_alive() and not begun.exists():
        time.sleep(0.01)
    os.kill(child.pid or 0, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 128 + signal.SIGTERM
    assert checkpoints(config) == (["step-6"] if during == "validation" else [])


def _stopped(config: TrainConfig) -> None:
    try:
        train(config)
    except TrainingStopped as error:
        os._exit(128 + error.number)


def test_a_signal_is_heeded_while_a_loader_process_is_stuck(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastclap.train.loop._OVERDUE_SECONDS", 0.3)
    start, noted = workers._Worker.start, tmp_path / "loader"

    def noting(self: workers._Worker) -> None:
        noted.write_text(str(self.process.pid))
        start(self)

    monkeypatch.setattr(workers._Worker, "start", noting)
    config = tiny(steps=100_000, log_every=1, save_every=100_000, valid_every=0)
    config.data.workers, config.data.prefetch = 1, 1
    child = FORK.Process(target=_stopped, args=(config,))
    child.start()
    metrics_file = Path(config.run_dir) / "metrics.jsonl"
    while child.is_alive() and not (metrics_file.exists() and metrics_file.stat().st_size):
        time.sleep(0.01)
    loader = int(noted.read_text())
    os.kill(loader, signal.SIGSTOP)
    os.kill(child.pid or 0, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 128 + signal.SIGTERM and len(checkpoints(config)) == 1
    assert not Path(f"/proc/{loader}").exists(), "the process that was stuck has been ended"


def test_signals_that_are_ignored_stay_ignored_and_others_are_given_back() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        interrupt = Interrupt()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and signal.getsignal(signal.SIGTERM) != before[1]
        interrupt.restore()
        assert signal.getsignal(signal.SIGTERM) == before[1]
    finally:
        signal.signal(signal.SIGHUP, before[0])


def test_training_in_a_thread(tiny: Build) -> None:
    config, errors = tiny(steps=2), []

    def work() -> None:
        try:
            train(config)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors and checkpoints(config) == ["step-2"]


# ---------------------------------------------------------------------------------------------------------------------
# before the first step


def test_one_training_to_a_folder(tiny: Build) -> None:
    config = tiny()
    Path(config.run_dir).mkdir()
    with locked(Path(config.run_dir), "training into"), pytest.raises(DataError, match="another process is training"):
        train(config)
    assert not checkpoints(config)


def test_rows_that_have_changed_are_not_trained_on(tiny: Build, tmp_path: Path) -> None:
    config = tiny(steps=3)
    lines = Path(config.data.train[0]).read_text().splitlines()
    moved = tmp_path / "train.jsonl"
    moved.write_text("\n".join(lines))
    config.data.train, config.data.audio_root = [str(moved)], str(Path(config.data.train[0]).parent)
    train(config)
    moved.write_text("\n".join(lines[:-1]))
    again = tiny(steps=6, resume=True)
    again.data = config.data
    with pytest.raises(ConfigError, match=r"train\.jsonl: the rows, their captions or tags are not those of the"):
        train(again)
    moved.write_text("\n".join(lines))
    train(again)
    assert checkpoints(again)[-1] == "step-6"


def silent(tmp_path: Path) -> str:
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", np.zeros(8000, np.int16), 16000)
    rows = [{"audio": f"{number}.wav", "text_description": f"a voice {number}"} for number in range(3)]
    (tmp_path / "silent.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "silent.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid.template": ["a voice"]}, r"template 'a voice': it must contain \{\}"),
        ({"valid.prompts": "nowhere.json"}, r"nowhere\.json: cannot be read"),
        (
            {"valid.classify": ["mood"]},
            r"--valid\.classify mood: no row of .*valid\.jsonl has a tag in it; the columns",
        ),
        (
            {"data.tag_column": "mood"},
            r"--data\.tag-column mood: no row of .*train\.jsonl has a tag in it; the columns",
        ),
        (
            {"data.valid": [silent]},
            r"--data\.valid: none of 3 clips that were tried can be used; .*0\.wav: all samples",
        ),
        ({"run_dir": "/proc/nowhere"}, r"--run-dir /proc/nowhere: cannot be written"),
        ({"valid.batch_size": 0}, r"--valid\.batch-size is 0; it must be a whole number"),
        ({"model.audio.pretrained": "folder"}, r"--model\.audio\.pretrained is given, but .* log-mel always starts"),
    ],
)
def test_what_can_be_known_is_said_before_the_first_step(
    tiny: Build, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = tiny()
    for name, value in change.items():
        *path, last = name.split(".")
        part: Any = config
        for attribute in path:
            part = getattr(part, attribute)
        value = [each(tmp_path) if callable(each) else each for each in value] if isinstance(value, list) else value
        setattr(part, last, value)
    with pytest.raises(FastclapError, match=message):
        train(config)
    assert not (Path(tiny().run_dir) / "metrics.jsonl").exists() and not checkpoints(config)


def test_a_file_where_the_run_writes_a_folder(tiny: Build) -> None:
    config = tiny()
    Path(config.run_dir).mkdir()
    (Path(config.run_dir) / "model").write_text("")
    with pytest.raises(ConfigError, match="model: is a file, where the run writes a folder"):
        train(config)
