"""What trains how fast, and from which step on: unfreezing, and learning rates that fall from layer to layer."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastclap
from fastclap.config import AudioTowerConfig
from fastclap.errors import ConfigError
from fastclap.models import wavlm
from fastclap.testing import assert_close_rel
from fastclap.train import checkpoint, memory
from fastclap.train.config import OptimizerConfig, TrainConfig
from fastclap.train.loop import train
from fastclap.train.memory import Plan
from fastclap.train.step import Step, build_optimizer
from tests.train.test_distributed import exported, of_transformers, on_ranks, random_batch, without_dropout
from tests.train.test_resume import assert_same_run
from tests.train.test_speed import WAVLM

Build = Callable[..., TrainConfig]
FORK = multiprocessing.get_context("fork")
UNFREEZE = 5
FROZEN: dict[str, dict[str, Any]] = {
    "towers": {"audio": {"freeze": True}, "text": {"freeze": True}},
    "parts": {"audio": {"freeze_convolutions": True, "freeze_layers": 1}, "text": {"freeze_embeddings": True}},
    "modules": {"audio": {"freeze_modules": ["transformer.blocks.*.qkv", "input"]}, "text": {}},
}


def frozen(config: TrainConfig, which: str, unfreeze: int = UNFREEZE) -> TrainConfig:
    for side, options in FROZEN[which].items():
        for name, value in options.items():
            setattr(getattr(config.model, side), name, value)
    config.optimizer.unfreeze_step = unfreeze
    config.data.frozen_cache = "off"  # as a run that will unfreeze has it
    return config


def held_names(config: TrainConfig) -> set[str]:
    model = fastclap.CLAP(config.model)
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def at(config: TrainConfig, step: int, file: str = "model") -> dict[str, torch.Tensor]:
    return load_file(Path(config.run_dir) / "checkpoints" / f"step-{step}" / f"{file}.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# unfreezing


@pytest.mark.parametrize("which", FROZEN)
def test_a_run_goes_on_exactly_from_before_at_and_after_the_step(tiny: Build, which: str) -> None:
    """With chunks, accumulation, an average of the weights and a validation. Nothing frozen changes before its time."""
    config = frozen(tiny("whole", save_every=1, keep=20, chunk_size=3, accumulate=2, steps=8), which)
    train(config)
    names = held_names(config)
    start, last, after, end = (at(config, step) for step in (1, UNFREEZE, UNFREEZE + 1, 8))
    assert names and all(torch.equal(start[name], last[name]) for name in names)
    assert all(not torch.equal(last[name], after[name]) for name in names)
    assert all(not torch.equal(start[name], end[name]) for name in start.keys() - names if "feature_" not in name)
    before, trainer = at(config, UNFREEZE, "trainer"), at(config, UNFREEZE + 1, "trainer")
    assert not any(f"step/{name}" in before for name in names)
    assert all(trainer[f"step/{name}"] == 1 for name in names)  # AdamW begins with them
    assert all(trainer[name] == UNFREEZE + 1 for name in before if name.startswith("step/"))
    for stop in (UNFREEZE - 1, UNFREEZE, UNFREEZE + 1):
        again = copy.deepcopy(config)
        again.run_dir, again.resume = f"{config.run_dir}-{stop}", True
        shutil.copytree(config.run_dir, again.run_dir)
        shutil.rmtree(Path(again.run_dir) / "model")
        for step in range(stop + 1, 9):
            shutil.rmtree(Path(again.run_dir) / "checkpoints" / f"step-{step}")
        train(again)
        assert_same_run(config.run_dir, again.run_dir)


def _train_and_die(config: TrainConfig, steps: int) -> None:
    update = Step.update

    def updating(self: Step, *rest: Any) -> Any:
        if self.number == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, *rest)

    Step.update = updating  # type: ignore[method-assign]
    train(config)


def test_kills_on_both_sides_leave_no_trace(tiny: Build, capfd: pytest.CaptureFixture[str]) -> None:
    whole, killed = (frozen(tiny(name, save_every=1, steps=10), "towers") for name in ("whole", "killed"))
    train(whole)
    assert capfd.readouterr().out.count("from step 6 on what was frozen trains") == 1
    killed.resume = True
    for steps in (UNFREEZE - 1, UNFREEZE, UNFREEZE + 2):
        child = FORK.Process(target=_train_and_die, args=(killed, steps))
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
    train(killed)
    assert_same_run(whole.run_dir, killed.run_dir)


def test_with_and_without_chunks_it_is_the_same(tiny: Build) -> None:
    runs = [frozen(without_dropout(tiny(f"chunks of {chunk}", chunk_size=chunk)), "towers") for chunk in (0, 3)]
    for config in runs:
        config.optimizer.eps = 1e-3
        train(config)
    for name, tensor in exported(runs[0]).items():
        assert_close_rel(name, tensor, exported(runs[1])[name], 1e-4)


@pytest.mark.parametrize("which", ["towers", "parts"])
def test_two_processes_train_like_one(tiny: Build, which: str) -> None:
    alone, both = (
        frozen(without_dropout(tiny(n, chunk_size=3, accumulate=2, keep=9)), which) for n in ("alone", "both")
    )
    for config in (alone, both):
        config.optimizer.eps = 1e-3  # Adam divides rounding noise by itself where a gradient is about zero
    train(alone)
    assert on_ranks(2, train, both) == [0, 0]
    for name, tensor in exported(alone).items():
        assert_close_rel(name, tensor, exported(both)[name], 1e-4)
    assert all(not torch.equal(exported(alone)[name], at(alone, 3)[name]) for name in held_names(alone))


def test_until_the_step_it_is_the_frozen_run(tiny: Build) -> None:
    never, later, beyond = (
        frozen(tiny(name, steps=8, keep=9), "towers", step)
        for name, step in (("never", 0), ("later", 5), ("beyond", 99))
    )
    for config in (never, later, beyond):
        train(config)
    early, late = at(later, 3), at(later, 6)
    assert all(torch.equal(tensor, early[name]) for name, tensor in at(never, 3).items())
    assert any(not torch.equal(tensor, late[name]) for name, tensor in at(never, 6).items())
    assert all(torch.equal(tensor, exported(beyond)[name]) for name, tensor in exported(never).items())
    names = held_names(never)
    assert all(not torch.equal(exported(later)[name], exported(never)[name]) for name in names)


def test_the_compiled_layers_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen tower is evaluated, and not compiled; from the step on its layers are, and train as others do."""
    compile_module = wavlm.EncoderLayer.compile
    graphs: list[bool] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(
        wavlm.EncoderLayer, "compile", lambda x, **_: compile_module(x, backend=backend, fullgraph=True)
    )
    results = []
    torch.compiler.reset()
    for compiled in ("off", "on"):
        config = TrainConfig(compile=compiled, chunk_size=2, steps=6, batch_size=4, device="cpu")
        config.optimizer = OptimizerConfig(warmup_steps=0, unfreeze_step=2, eps=1e-3)
        model = of_transformers(hidden_dropout=0.0, layerdrop=0.0, apply_spec_augment=False)
        model.config.audio.freeze = True
        model = fastclap.CLAP(model.config).train()
        model.audio_branch.prepare_training(compile=compiled == "on")
        step = Step(model, config)
        for number in range(1, 5):
            torch.manual_seed(number)
            step([random_batch(number)])
            assert (len(graphs) > 0) == (compiled == "on" and number > 2)
        results.append(model.state_dict())
    for name, tensor in results[0].items():
        assert_close_rel(name, tensor, results[1][name], 1e-5)


def test_the_memory_is_that_of_what_will_train(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def plan(model: fastclap.CLAP, *rest: Any) -> Plan:
        trained.append(sum(p.requires_grad for p in model.parameters()))
        return Plan(8, False, "")

    monkeypatch.setattr(memory, "plan", plan)
    for name, step in (("never", 0), ("later", 2)):
        train(frozen(tiny(name, steps=1, valid_every=0), "towers", step))
    assert trained[0] < 6 < 20 < trained[1]


def test_unfreezing_that_cannot_be(tiny: Build) -> None:
    free = tiny("free")
    free.optimizer.unfreeze_step = 2
    with pytest.raises(ConfigError, match=r"--optimizer.unfreeze-step: nothing is frozen"):
        train(free)
    with pytest.raises(ConfigError, match=r"--optimizer.unfreeze-step changes what trains.*leave --shard out"):
        train(frozen(tiny("sharded", shard=True), "towers"))
    with pytest.raises(ConfigError, match=r"--optimizer.unfreeze-step is -1"):
        train(frozen(tiny("negative"), "towers", -1))
    config = frozen(tiny("moved", steps=3), "towers")
    train(config)
    config.optimizer.unfreeze_step, config.resume = 2, True
    with pytest.raises(ConfigError, match=r"optimizer\.unfreeze_step was 5, now 2"):
        train(config)


# ---------------------------------------------------------------------------------------------------------------------
# layer-wise decay


def scales(model: fastclap.CLAP, config: OptimizerConfig) -> dict[str, float]:
    """The multiple of the learning rate of every parameter that trains."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, config).param_groups
    return {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}


AUDIO_DEPTHS = {
    "encoder.layers.1.": 1,
    "encoder.layers.0.": 2,
    "encoder.layer_norm.": 0,
    "encoder.pos_conv_embed.": 3,
    "feature_extractor.": 3,
    "feature_projection.": 3,
    "masked_spec_embed": 3,
}
TEXT_DEPTHS = {"encoder.layer.1.": 1, "encoder.layer.0.": 2, "embeddings.": 3}


def depth(name: str) -> int:
    """Of a parameter of `of_transformers`, read from its name."""
    for tower, known in (("audio_branch.base.", AUDIO_DEPTHS), ("text_branch.base.", TEXT_DEPTHS)):
        if name.startswith(tower):
            return next(value for key, value in known.items() if name.removeprefix(tower).startswith(key))
    return 0


def test_learning_rates_fall_from_layer_to_layer() -> None:
    model = of_transformers()
    for lr_scale, decay in ((1.0, 1.0), (0.3, 1.0), (1.0, 0.5), (0.3, 0.7)):
        found = scales(model, OptimizerConfig(tower_lr_scale=lr_scale, layer_decay=decay))
        assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        for name, scale in found.items():
            tower = lr_scale if "_branch." in name else 1.0
            assert math.isclose(scale, tower * decay ** depth(name)), name
    assert {depth(name) for name in found if "_branch" in name} == {0, 1, 2, 3}


def test_a_step_is_as_long_as_its_layer_says(tiny: Build) -> None:
    """AdamW's first step is the learning rate, whatever the gradient."""
    config = tiny(steps=1, valid_every=0, save_every=9)
    config.model.audio.layers, config.model.text.layers = 2, 3
    config.optimizer = OptimizerConfig(
        learning_rate=1e-2, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_norm=0.0, layer_decay=0.25
    )
    torch.manual_seed(0)
    train(config)
    after = exported(config)
    again = copy.deepcopy(config)
    again.run_dir += "-again"
    again.optimizer.learning_rate = 0.0
    train(again)
    for name, exponent in (
        ("audio_projection.weight", 0),
        ("audio_branch.transformer.norm.bias", 0),
        ("audio_branch.transformer.blocks.1.up.weight", 1),
        ("audio_branch.transformer.blocks.0.qkv.weight", 2),
        ("audio_branch.convolutions.0.weight", 3),
        ("audio_branch.input.weight", 3),
        ("text_branch.transformer.blocks.2.down.weight", 1),
        ("text_branch.transformer.blocks.0.down.weight", 3),
        ("text_branch.embedding.weight", 4),
    ):
        longest = float((after[name] - exported(again)[name]).abs().max())
        assert math.isclose(longest, 1e-2 * 0.25**exponent, rel_tol=0.02), name


def test_groups_stay_few_and_layers_of_both_towers_share_them() -> None:
    """Of two towers of 24 and 12 layers: matrices and others of 26 depths, and no more."""
    model = of_transformers(num_hidden_layers=24)
    model.config.text.hf_config["num_hidden_layers"] = 12
    model = fastclap.CLAP(model.config)
    optimizer = build_optimizer(model, OptimizerConfig(layer_decay=0.9))
    assert len(optimizer.param_groups) <= 2 * 26
    kinds = [(group["weight_decay"], group["lr_scale"]) for group in optimizer.param_groups]
    assert len(set(kinds)) == len(kinds)
    assert len(build_optimizer(model, OptimizerConfig()).param_groups) == 2
    assert optimizer.defaults["fused"]


def test_adapters_have_the_rate_of_their_layer() -> None:
    pytest.importorskip("peft")
    config = of_transformers().config
    config.audio.lora_rank, config.audio.freeze_modules = 2, ["*"]
    found = scales(fastclap.CLAP(config), OptimizerConfig(layer_decay=0.5))
    adapters = {name: scale for name, scale in found.items() if "lora_" in name}
    assert len(adapters) > 20 and all(scale == 0.5 ** depth(name) for name, scale in adapters.items())


def test_a_tower_without_known_layers_has_to_be_frozen() -> None:
    config = of_transformers().config
    sew = {**WAVLM, "model_type": "sew", "squeeze_factor": 2, "conv_dim": [8, 8]}
    config.audio = AudioTowerConfig("wav2vec2", hf_config=sew)
    model = fastclap.CLAP(config)
    with pytest.raises(ConfigError, match=r"--optimizer.layer-decay: the audio tower is of a kind \(wav2vec2\) whose"):
        build_optimizer(model, OptimizerConfig(layer_decay=0.9))
    model.audio_branch.requires_grad_(False)
    assert scales(model, OptimizerConfig(layer_decay=0.9))["text_branch.base.encoder.layer.0.output.dense.bias"] == 0.81


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5, math.nan])
def test_impossible_decays(tiny: Build, decay: float) -> None:
    config = tiny()
    config.optimizer.layer_decay = decay
    with pytest.raises(ConfigError, match=r"--optimizer.layer-decay is .*; it must be a number above 0 to 1"):
        train(config)


def test_checkpoints_of_the_whole_run_know_what_trains(tiny: Build) -> None:
    """With an unfreezing step every parameter changes in the end, so checkpoints are whole from the first on."""
    config = frozen(tiny(steps=3), "towers")
    train(config)
    assert not (Path(config.run_dir) / "frozen.safetensors").exists()
    assert at(config, 3).keys() == fastclap.CLAP(config.model).state_dict().keys()
    assert checkpoint.newest_checkpoint(Path(config.run_dir)) is not None
