"""The loop itself: it learns, skips what is not finite, sets bad clips aside, and leaves the files it promises."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fastclap
from fastclap.config import AudioTowerConfig
from fastclap.data import Batch, load_manifest
from fastclap.errors import ConfigError, DataError, ModelError, TrainingError
from fastclap.evaluation import evaluate
from fastclap.testing import assert_close_rel
from fastclap.train.cli import main
from fastclap.train.config import OptimizerConfig, TrainConfig, load_config
from fastclap.train.distributed import World
from fastclap.train.journal import Totals
from fastclap.train.loop import seed_step, train
from fastclap.train.meter import Meter
from fastclap.train.run import build_model
from fastclap.train.step import Objective, build_optimizer, scheduled_learning_rate

Build = Callable[..., TrainConfig]
ALONE = World(0, 1, torch.device("cpu"), None)


def records(config: TrainConfig, kind: str) -> list[dict]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_a_run_leaves_what_it_promises(tiny: Build, pictures: None) -> None:
    config = tiny(steps=60, log_every=10, valid_every=30, save_every=20, tensorboard=True)
    config.optimizer.learning_rate = 5e-3
    model_dir = train(config)
    run = Path(config.run_dir)
    train_records, valid_records = records(config, "train"), records(config, "valid")
    assert [record["step"] for record in train_records] == [10, 20, 30, 40, 50, 60]
    assert [record["step"] for record in valid_records] == [30, 60]
    assert train_records[-1]["loss"] < train_records[0]["loss"] - 0.1
    assert train_records[-1]["time"]["clips_per_second"] > 0
    assert load_config(run / "config.yaml", TrainConfig()).to_dict() == config.to_dict()
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["world_size"] == 1
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-40", "step-60"]
    assert "<html" in (run / "report" / "report.html").read_text()[:200].lower()
    assert (run / "report" / "training.png").stat().st_size > 1000
    assert list((run / "tensorboard").glob("events.*"))

    # Export, last checkpoint and run folder are the same model, and it scores what the last validation says.
    model = fastclap.CLAP.from_pretrained(model_dir)
    figures = evaluate(model, load_manifest(config.data.valid))
    figures.pop("time")
    assert {key: valid_records[-1][key] for key in figures} == figures
    for other in (run, run / "checkpoints" / "step-60"):
        assert torch.equal(fastclap.CLAP.from_pretrained(other).embed_text(["a voice"]), model.embed_text(["a voice"]))


@pytest.mark.parametrize("change", [{"chunk_size": 3}, {"precision": "bf16"}, {"accumulate": 2}])
def test_variants_train(tiny: Build, change: dict) -> None:
    config = tiny(steps=4, **change)
    train(config)
    assert all(math.isfinite(record["loss"]) for record in records(config, "train"))


def test_sigmoid_loss_trains_its_bias(tiny: Build) -> None:
    config = tiny(steps=4)
    config.loss.kind, config.model.init_logit_bias = "sigmoid", -10.0
    bias = fastclap.CLAP.from_pretrained(train(config)).logit_bias
    assert bias is not None and bias.item() != -10.0


def test_sigmoid_loss_without_a_bias_says_what_to_set(tiny: Build) -> None:
    config = tiny()
    config.loss.kind = "sigmoid"
    with pytest.raises(ConfigError, match=r"--model\.init-logit-bias"):
        train(config)


def test_the_meter_leaves_out_pauses_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 1.5, 2.0, 7.0, 8.0, 8.0])  # made, wait for data from 1 to 1.5, pause from 2 to 7, lap at 8
    monkeypatch.setattr("fastclap.train.meter.time.perf_counter", lambda: next(now))
    meter = Meter(ALONE)
    meter.add(30)
    meter.loaded(30, seconds=1.0, workers=2)
    with meter.waiting():
        pass
    with meter.paused():
        pass
    assert meter.lap() == {
        "seconds": 3.0,
        "clips_per_second": 10.0,
        "waiting": 0.1667,
        "loader_clips_per_second": 60.0,
    }


def test_caching_changes_the_memory_and_not_the_gradient(tiny: Build) -> None:
    """Dropout, SpecAugment, equal captions: the cached gradient is that of one graph over the same chunks."""
    config = tiny()
    manifest = load_manifest(config.data.train)
    torch.manual_seed(0)
    model = build_model(config, manifest, None)
    from fastclap.data import BatchSampler, ClipDataset

    batch = ClipDataset(manifest, 16000, crop_seconds=0.5, seed=0)[(0, *BatchSampler(manifest, 8, seed=0).batch(0))]
    gradients = []
    for chunk in (0, 8):  # one chunk: the same random numbers with and without the cache
        model.zero_grad()
        seed_step(config, 1, ALONE)
        Objective(model, config.loss, chunk, None, ALONE)(batch)
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close_rel(name, gradient, gradients[1][name], 1e-5)


class Poison(Objective):
    """Steps listed in `at` have a NaN in one gradient."""

    at: frozenset[int] = frozenset()
    calls = 0

    def __call__(self, batch: Batch, weight: float = 1.0) -> torch.Tensor:
        loss = super().__call__(batch, weight)
        Poison.calls += 1
        if Poison.calls in self.at:
            next(self.model.parameters()).grad.view(-1)[0] = math.nan
        return loss


def test_non_finite_steps_are_skipped_and_counted(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastclap.train.step.Objective", Poison)
    monkeypatch.setattr(Poison, "at", frozenset({2, 3, 7}))
    monkeypatch.setattr(Poison, "calls", 0)
    config = tiny(max_bad_steps=3)
    model = fastclap.CLAP.from_pretrained(train(config))
    assert records(config, "train")[-1]["skipped_steps"] == 3
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_too_many_non_finite_steps_stop_the_run(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastclap.train.step.Objective", Poison)
    monkeypatch.setattr(Poison, "at", frozenset(range(5, 100)))
    monkeypatch.setattr(Poison, "calls", 0)
    config = tiny(max_bad_steps=3, steps=50, save_every=4)
    with pytest.raises(TrainingError, match="step 8: 3 steps in a row had a non-finite loss or gradient"):
        train(config)
    model = fastclap.CLAP.from_pretrained(config.run_dir)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_bad_clips_are_replaced_up_to_the_limit(tiny: Build, demo_manifests: tuple[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(Path(demo_manifests[0]).parent, folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    paths = [folder / (row.get("audio") or row["relative_audio_path"]) for row in rows]
    paths[3].write_bytes(paths[3].read_bytes()[:2000])
    paths[5].unlink()
    config = tiny(steps=12)
    config.data.train, config.data.max_bad_share = [str(folder / "train.jsonl")], 0.1
    train(config)
    listed = [json.loads(line) for line in (Path(config.run_dir) / "quarantine.jsonl").read_text().splitlines()]
    assert {Path(clip["path"]).name for clip in listed} == {paths[3].name, paths[5].name}
    strict = tiny("strict", steps=12)
    strict.data.train, strict.data.max_bad_share = [str(folder / "train.jsonl")], 0.0
    with pytest.raises(DataError, match=r"of 48 clips are unusable.*train.jsonl:\d+.*--data.max-bad-share"):
        train(strict)


def test_training_can_start_from_a_model(tiny: Build) -> None:
    first = train(tiny("first", steps=2))
    config = tiny("second", steps=2, init_from=str(first))
    config.optimizer = OptimizerConfig(learning_rate=0.0, ema_decay=0.0)
    config.model.audio.width = 48  # not asked: the architecture comes with the weights
    again = fastclap.CLAP.from_pretrained(train(config))
    before = fastclap.CLAP.from_pretrained(first)
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    with pytest.raises(ModelError, match="nowhere"):
        train(tiny("third", init_from="nowhere"))


def test_the_demo_recipe_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "demo"
    main(
        ["demo", "--run-dir", str(run), "--data.demo-clips", "48", "--batch-size", "8", "--steps", "2",
         "--data.workers", "0", "--device", "cpu"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "valid at step 2" in out and "chance" in out and str(run / "model") in out
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["train"] == [str(run / "data" / "train.jsonl")]


def test_epochs_count_the_steps(tiny: Build) -> None:
    config = tiny(epochs=2, steps=999)
    train(config)
    assert config.steps == records(config, "train")[-1]["step"] == 2 * (48 // 8)


def test_towers_can_learn_more_slowly_than_the_heads(tiny: Build) -> None:
    """The first step of Adam moves every weight by its learning rate, whatever the gradient."""
    config = tiny(steps=1, precision="fp32")
    config.optimizer = OptimizerConfig(learning_rate=1e-3, tower_lr_scale=0.25, weight_decay=0.0, warmup_steps=0,
                                       schedule="constant", clip_norm=0.0, eps=1e-16)  # fmt: skip
    torch.manual_seed(config.seed)
    before = build_model(config, load_manifest(config.data.train), None).state_dict()
    after = fastclap.CLAP.from_pretrained(train(config)).state_dict()
    for name, share in (("audio_branch", 0.25), ("text_branch", 0.25), ("audio_projection", 1.0)):
        moved = [
            (after[key] - before[key]).abs().max() for key in before if key.startswith(name) and "feature" not in key
        ]
        assert max(moved).item() == pytest.approx(share * 1e-3, rel=1e-2)


def test_schedule_follows_its_definition() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_share=0.1)
    assert [scheduled_learning_rate(config, step, 20) for step in (1, 2, 4)] == [0.5, 1.0, 2.0]
    assert scheduled_learning_rate(config, 12, 20) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert scheduled_learning_rate(config, 20, 20) == pytest.approx(0.2)
    config.schedule = "linear"
    assert scheduled_learning_rate(config, 8, 20) == pytest.approx(2.0 * (0.1 + 0.9 * 0.75))
    config.schedule = "constant"
    assert scheduled_learning_rate(config, 20, 20) == 2.0
    config.schedule = "cooldown"  # four steps of 20: 1 - √(1/4), 1 - √(2/4), ...
    assert [scheduled_learning_rate(config, step, 20) for step in (2, 4, 5, 16)] == [1.0, 2.0, 2.0, 2.0]
    assert scheduled_learning_rate(config, 17, 20) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert scheduled_learning_rate(config, 18, 20) == pytest.approx(2.0 * (0.1 + 0.9 * (1 - math.sqrt(0.5))))
    assert scheduled_learning_rate(config, 20, 20) == pytest.approx(0.2)
    config.cooldown_share, config.final_share = 1.0, 0.0  # it begins after the warm-up at the earliest
    assert scheduled_learning_rate(config, 4, 20) == 2.0
    assert scheduled_learning_rate(config, 8, 20) == pytest.approx(2.0 * 0.5)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.7])
def test_the_constant_part_of_a_longer_run_is_that_of_a_shorter_one(share: float) -> None:
    """To the last digit, for every length of a run; and no learning rate is negative."""
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=3, schedule="cooldown", cooldown_share=share)
    for steps in range(20, 200, 7):
        rates = [scheduled_learning_rate(config, step, steps) for step in range(1, steps + 1)]
        longer = [scheduled_learning_rate(config, step, 2 * steps) for step in range(1, steps + 1)]
        constant = steps - round(share * steps)
        assert rates[:constant] == longer[:constant] and set(rates[2:constant]) == {1e-3}
        assert rates[-1] == 0.0 and all(later < rate for rate, later in pairwise(rates[constant - 1 :]))


def test_totals_against_plain_sums() -> None:
    totals = Totals(torch.device("cpu"), None)
    steps = [(1.0, 2.0, False), (math.nan, 3.0, True), (4.0, math.inf, True), (3.0, 4.0, False)]
    for loss, norm, skip in steps:
        totals.add(torch.tensor(loss), torch.tensor(norm), torch.tensor(skip))
    again = Totals(torch.device("cpu"), totals.state())
    for sums in (totals, again):
        assert Totals.figures(sums.harvest(torch.tensor(7.0))) == {
            "loss": 2.0, "grad_norm": 3.0, "logit_scale": 7.0, "skipped_steps": 2, "worst_run": 2,
        }  # fmt: skip
    assert Totals.figures(totals.harvest(torch.tensor(7.0)))["loss"] is None


def test_weight_decay_spares_norms_biases_and_embeddings(tiny: Build) -> None:
    config = tiny()
    model = build_model(config, load_manifest(config.data.train), None)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, config.optimizer).param_groups
    decayed, spared = ([names[id(p)] for p in group["params"]] for group in groups)
    assert groups[0]["weight_decay"] > 0 and groups[1]["weight_decay"] == 0
    assert "log_logit_scale" in spared and "text_branch.embedding.weight" in spared
    assert all(name.endswith("weight") for name in decayed)
    assert len(decayed) + len(spared) == len(names)


def test_frozen_tower_keeps_its_weights(tiny: Build) -> None:
    config = tiny(steps=3, chunk_size=3)
    config.model.audio = AudioTowerConfig(width=16, layers=1, heads=2, feature_options={"n_mels": 16}, freeze=True)
    config.optimizer.ema_decay = 0.0
    torch.manual_seed(config.seed)
    before = build_model(config, load_manifest(config.data.train), None).audio_branch.state_dict()
    after = fastclap.CLAP.from_pretrained(train(config)).audio_branch.state_dict()
    for name, tensor in before.items():
        assert name.startswith("feature_") or torch.equal(tensor, after[name]), name


def test_frozen_parts_through_a_resumed_run(tiny: Build) -> None:
    config = tiny(steps=2, save_every=2, checkpoint_activations="on")
    config.model.audio.layers, config.model.audio.freeze_layers = 2, 1
    config.model.text.freeze_embeddings = True
    torch.manual_seed(config.seed)
    before = build_model(config, load_manifest(config.data.train), None).state_dict()
    train(config)
    checkpoint = Path(config.run_dir) / "checkpoints" / "step-2"
    assert fastclap.CLAP.from_pretrained(checkpoint).config.audio.freeze_layers == 1
    config.steps, config.resume = 4, True
    model = fastclap.CLAP.from_pretrained(train(config))
    assert model.config.text.freeze_embeddings
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert "text_branch.embedding.weight" in frozen and any(".transformer.blocks.0." in name for name in frozen)
    assert not any("blocks.1." in name or "projection" in name for name in frozen)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in frozen), name
    for step in (2, 4):
        state = load_file(Path(config.run_dir) / "checkpoints" / f"step-{step}" / "trainer.safetensors")
        held = {name.partition("/")[2] for name in state if name.startswith("exp_avg")}
        assert held == {name for name, _ in model.named_parameters()} - frozen
