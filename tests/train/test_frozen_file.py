"""Checkpoints that hold what changes, and the one file of what does not; adapters from the first step to the export."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastclap
from fastclap.commands.main import main as fastclap_main
from fastclap.config import AudioTowerConfig, TextTowerConfig
from fastclap.errors import ConfigError, ModelError, TrainingError
from fastclap.models.folder import load_weights
from fastclap.testing import assert_close_rel
from fastclap.train import checkpoint
from fastclap.train.cli import main
from fastclap.train.config import TrainConfig
from fastclap.train.loop import train
from tests.train.test_distributed import exported, on_ranks, without_dropout
from tests.train.test_resume import assert_same_run
from tests.train.test_unfreezing import _train_and_die, held_names

Build = Callable[..., TrainConfig]
FORK = multiprocessing.get_context("fork")
SHARED = "frozen.safetensors"


def newest(config: TrainConfig) -> Path:
    return checkpoint.checkpoints(Path(config.run_dir))[-1]


def part_frozen(config: TrainConfig) -> TrainConfig:
    """Both towers frozen but for a layer each."""
    config.model.audio.layers = config.model.text.layers = 2
    config.model.audio.freeze_layers = config.model.text.freeze_layers = 1
    return config


def with_adapters(config: TrainConfig) -> TrainConfig:
    """A small Whisper, of which the adapters alone train, and a text tower of our own, frozen."""
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    whisper = {**sizes, "num_mel_bins": 80, "max_source_positions": 25, "dropout": 0.0, "attention_dropout": 0.0}
    options: dict[str, Any] = {"lora_rank": 2, "lora_alpha": 4.0, "freeze_modules": ["*"]}
    config.model.audio = AudioTowerConfig("whisper", hf_config={**whisper, "activation_dropout": 0.0}, **options)
    config.model.text.freeze = True
    config.optimizer.learning_rate = 1e-2
    return config


KINDS = {"layers": part_frozen, "adapters": with_adapters}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "adapters":
        pytest.importorskip("peft")
    return request.param


@pytest.mark.parametrize("average", [0.9, 0.0])
def test_a_checkpoint_holds_what_changes(tiny: Build, kind: str, average: float) -> None:
    config = KINDS[kind](tiny(steps=6, save_every=2, keep=9))
    config.optimizer.ema_decay = average
    train(config)
    run = Path(config.run_dir)
    names = held_names(config)
    shared = load_file(run / SHARED)
    assert shared.keys() == names and len(names) > 10
    model = fastclap.CLAP(config.model).state_dict()
    for path in checkpoint.checkpoints(run):
        weights, trainer = (load_file(path / f"{file}.safetensors") for file in ("model", "trainer"))
        assert weights.keys() == model.keys() - names
        under_training = {name for name in trainer if name.startswith("weights/")}
        assert under_training == ({f"weights/{name}" for name in weights} if average else set())
        moments = {name.partition("/")[2] for name in trainer if name.startswith("exp_avg/")}
        assert moments == {name for name, p in fastclap.CLAP(config.model).named_parameters() if p.requires_grad}
        whole = load_weights(path)
        assert whole.keys() == model.keys() and all(torch.equal(whole[name], shared[name]) for name in names)
        held = sum(tensor.nbytes for tensor in weights.values())
        assert held == sum(tensor.nbytes for name, tensor in model.items() if name not in names)
        assert held < 0.8 * sum(tensor.nbytes for tensor in model.values())
    assert not list(run.glob(".writing-*"))
    whole = exported(config)  # of the averaged weights, if there are any
    assert all(torch.equal(whole[name], shared[name]) for name in names if ".base_layer." not in name)


def test_a_run_of_which_all_changes_has_no_such_file(tiny: Build) -> None:
    config = tiny(steps=2)
    train(config)
    assert not (Path(config.run_dir) / SHARED).exists() and not (newest(config) / "frozen.json").exists()


def test_resumed_after_kills_it_is_the_same_run(tiny: Build, kind: str) -> None:
    whole, killed = (KINDS[kind](tiny(name, save_every=1, steps=9)) for name in ("whole", "killed"))
    train(whole)
    killed.resume = True
    for steps in (0, 3, 6):
        child = FORK.Process(target=_train_and_die, args=(killed, steps))
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
    written = (Path(killed.run_dir) / SHARED).stat().st_mtime_ns
    train(killed)
    assert_same_run(whole.run_dir, killed.run_dir)
    assert (Path(killed.run_dir) / SHARED).stat().st_mtime_ns == written, "it is written once"
    assert (Path(killed.run_dir) / SHARED).read_bytes() == (Path(whole.run_dir) / SHARED).read_bytes()


def test_two_processes_train_like_one(tiny: Build, kind: str) -> None:
    alone, replicated, sharded = (
        without_dropout(KINDS[kind](tiny(name, chunk_size=3, steps=8))) for name in ("alone", "replicated", "sharded")
    )
    sharded.shard = True
    for config in (alone, replicated, sharded):
        config.optimizer.eps, config.optimizer.schedule = 1e-3, "constant"
    train(alone)
    for config in (replicated, sharded):
        assert on_ranks(2, train, config) == [0, 0]
        assert (
            load_file(newest(config) / "model.safetensors").keys()
            == load_file(newest(alone) / "model.safetensors").keys()
        )
        assert (Path(config.run_dir) / SHARED).read_bytes() == (Path(alone.run_dir) / SHARED).read_bytes()
        config.resume, config.steps = True, 10
        assert on_ranks(2, train, config) == [0, 0]
    alone.resume, alone.steps = True, 10
    train(alone)
    for config in (replicated, sharded):
        for name, tensor in exported(alone).items():
            assert_close_rel(f"{name} ({config.run_dir})", tensor, exported(config)[name], 1e-4)


def test_all_that_reads_a_run_reads_such_a_run(tiny: Build, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The run, a checkpoint (also by a relative path), `eval`, `average`, --init-from; `best` and `model` are whole."""
    config = KINDS[kind](tiny(steps=9, save_every=3, keep=3, valid_every=3))
    config.valid.best = "classification/classification_tag/uar"
    train(config)
    run = Path(config.run_dir)
    captions = ["A voice.", "Another one, and louder."]
    plain = fastclap.CLAP.from_pretrained(run / "model")
    assert load_file(run / "model" / "model.safetensors").keys() == plain.state_dict().keys()
    assert plain.config.audio.lora_rank == fastclap.CLAP.from_pretrained(run / "best").config.audio.lora_rank == 0
    clip = [torch.randn(8000).clamp(-1, 1) * 0.1]
    for source in (run, newest(config)):
        model = fastclap.CLAP.from_pretrained(source)
        assert model.config.audio.lora_rank == config.model.audio.lora_rank
        assert_close_rel("captions", plain.embed_text(captions), model.embed_text(captions), 1e-6)
        assert_close_rel("clips", plain.embed_audio(clip), model.embed_audio(clip), 1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(newest(config).parent)
        assert torch.equal(fastclap.CLAP.from_pretrained("step-9").embed_text(captions), model.embed_text(captions))
    capsys.readouterr()
    for source in (run, run / "model"):
        fastclap_main(
            ["eval", "--model", str(source), "--data", config.data.valid[0], "--out", str(run / f"eval-{source.name}")]
        )
    main(["average", str(run), "--last", "2"])
    averaged = fastclap.CLAP.from_pretrained(run / "averaged")
    assert averaged.config.audio.lora_rank == 0 and averaged.state_dict().keys() == plain.state_dict().keys()
    merged = []
    for step in (6, 9):
        fastclap.CLAP.from_pretrained(run / "checkpoints" / f"step-{step}").save_pretrained(run / f"merged-{step}")
        merged.append(load_file(run / f"merged-{step}" / "model.safetensors"))
    for name, tensor in averaged.state_dict().items():
        assert_close_rel(name, (merged[0][name].double() + merged[1][name].double()) / 2, tensor.double(), 1e-6)
    assert any(not torch.equal(merged[0][name], merged[1][name]) for name in merged[0])
    for source in (run, run / "model"):
        second = KINDS[kind](tiny(f"from-{source.name}", steps=2, init_from=str(source)))
        train(second)
        adapters = any("lora_" in name for name in load_file(newest(second) / "model.safetensors"))
        assert adapters == (kind == "adapters" and source == run)
        assert (Path(second.run_dir) / SHARED).is_file()
        shutil.rmtree(Path(second.run_dir) / "model")
        second.resume, second.steps = True, 3
        train(second)
        assert fastclap.CLAP.from_pretrained(Path(second.run_dir)).embed_text(captions).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# damage


@pytest.mark.parametrize("damage", ["missing", "truncated", "one byte", "of another run", "a broken note"])
def test_a_file_that_is_not_the_one_that_was_written(tiny: Build, damage: str) -> None:
    config, other = part_frozen(tiny("run", steps=3)), part_frozen(tiny("other", steps=3, seed=1))
    train(config)
    run = Path(config.run_dir)
    path, note = run / SHARED, newest(config) / "frozen.json"
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-9])
    elif damage == "one byte":
        data[-5] ^= 1
        path.write_bytes(data)
    elif damage == "of another run":
        train(other)
        shutil.copy(Path(other.run_dir) / SHARED, path)
    else:
        note.write_text("{}".ljust(note.stat().st_size))
    said = {"missing": "missing", "a broken note": "not to be compared"}.get(damage, "damaged or exchanged")
    message = rf"{re.escape(str(path))}: {said}.*put it back from a copy of the run.*{re.escape(str(run / 'model'))}"
    config.resume, config.steps = True, 6
    for read in (lambda: fastclap.CLAP.from_pretrained(run), lambda: train(config)):
        with pytest.raises(ModelError, match=message):
            read()
    with pytest.raises(ModelError, match=message):
        checkpoint.average_checkpoints(run, 1, run / "averaged")
    assert fastclap.CLAP.from_pretrained(run / "model").embed_text(["a voice"]).shape == (1, 16)


def test_a_checkpoint_that_is_taken_away_from_its_run(tiny: Build, tmp_path: Path) -> None:
    config = part_frozen(tiny(steps=3))
    train(config)
    shutil.copytree(newest(config), tmp_path / "elsewhere" / "step-3")
    with pytest.raises(ModelError, match=rf"{SHARED}: missing"):
        fastclap.CLAP.from_pretrained(tmp_path / "elsewhere" / "step-3")
    shutil.copytree(config.run_dir, tmp_path / "copied")
    assert fastclap.CLAP.from_pretrained(tmp_path / "copied").embed_text(["a voice"]).shape == (1, 16)


def test_a_disk_that_is_full_from_the_beginning(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    config = part_frozen(tiny())
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        TrainingError, match=rf"{SHARED}: the tensors that do not change could not be written .*No space"
    ):
        train(config)
    assert not list(Path(config.run_dir).glob(f"*{SHARED}*")) + list(Path(config.run_dir).glob(".writing*"))


def test_a_kill_while_it_is_written(tiny: Build) -> None:
    config = part_frozen(tiny(steps=3))
    child = FORK.Process(target=_die_before_the_name, args=(config,))
    child.start()
    child.join(60)
    run = Path(config.run_dir)
    assert child.exitcode == -signal.SIGKILL and [path.name for path in run.iterdir()] == [f".writing-{SHARED}"]
    train(config)
    assert (run / SHARED).is_file() and not (run / f".writing-{SHARED}").exists()
    assert fastclap.CLAP.from_pretrained(newest(config)).embed_text(["a voice"]).shape == (1, 16)


def _die_before_the_name(config: TrainConfig) -> None:
    def replace(source: Path, target: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace  # type: ignore[assignment]
    train(config)


def test_older_whole_checkpoints_go_on(tiny: Build) -> None:
    """A checkpoint of a release that left nothing out: the next ones share the file."""
    config = part_frozen(tiny(steps=6, save_every=3, keep=9))
    train(config)
    run = Path(config.run_dir)
    whole = tiny("as it was", steps=6, save_every=3, keep=9, resume=True)
    part_frozen(whole)
    shutil.copytree(run / "checkpoints" / "step-3", Path(whole.run_dir) / "checkpoints" / "step-3")
    shutil.copy(run / "metrics.jsonl", whole.run_dir)
    old = Path(whole.run_dir) / "checkpoints" / "step-3"
    (old / "frozen.json").unlink()
    shared = load_file(run / SHARED)
    state = json.loads((old / "state.json").read_text())
    for file, prefix in (("model", ""), ("trainer", "weights/")):
        tensors = load_file(old / f"{file}.safetensors") | {f"{prefix}{name}": x for name, x in shared.items()}
        checkpoint.save_file(tensors, old / f"{file}.safetensors")
        state["files"][f"{file}.safetensors"] = (old / f"{file}.safetensors").stat().st_size
    del state["files"]["frozen.json"]
    (old / "state.json").write_text(json.dumps(state))
    train(whole)
    assert_same_run(str(run), whole.run_dir)
    assert fastclap.CLAP.from_pretrained(old).embed_text(["a voice"]).shape == (1, 16)


def test_a_resumed_run_has_the_same_adapters(tiny: Build) -> None:
    pytest.importorskip("peft")
    config = with_adapters(tiny(steps=3))
    train(config)
    again = with_adapters(tiny(steps=6, resume=True))
    again.model.audio.lora_rank = 4
    with pytest.raises(ConfigError, match=r"model\.audio\.lora_rank was 2, now 4"):
        train(again)
    for steps in (6, 9):  # twice: the saved configuration of the towers is complete by now
        train(with_adapters(tiny(steps=steps, resume=True)))
    assert newest(config).name == "step-9"


@pytest.mark.slow
def test_sizes_with_real_towers(tiny: Build, real_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whisper tiny and MiniLM, whole, frozen and with adapters: what a checkpoint takes on the disk, in megabytes."""
    pytest.importorskip("peft")
    sizes = {}
    for name, options in (
        ("adapters", {"lora_rank": 8, "freeze_modules": ["*"]}),
        ("frozen", {"freeze": True}),
        ("whole", {}),
    ):
        config = tiny(name, steps=1, valid_every=0, batch_size=2)
        config.data.valid = []
        config.model.audio = AudioTowerConfig(
            "whisper", pretrained=str(real_weights / "whisper-tiny.en-encoder"), **options
        )
        config.model.text = TextTowerConfig("hf", pretrained=str(real_weights / "all-MiniLM-L6-v2"), **options)
        train(config)
        sizes[name] = sum(file.stat().st_size for file in newest(config).iterdir()) / 1e6
        shared = Path(config.run_dir) / SHARED
        with capsys.disabled():
            print(f"\n{name}: {sizes[name]:.1f} MB a checkpoint, {shared.stat().st_size / 1e6:.1f} MB once", end="")
        plain, model = (
            fastclap.CLAP.from_pretrained(Path(config.run_dir) / "model"),
            fastclap.CLAP.from_pretrained(config.run_dir),
        )
        assert plain.config.text.lora_rank == 0
        assert_close_rel("captions", plain.embed_text(["A voice."]), model.embed_text(["A voice."]), 1e-5)
    assert sizes["frozen"] < sizes["adapters"] < 0.06 * sizes["whole"]
