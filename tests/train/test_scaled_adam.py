"""ScaledAdam, Eden and the mean of the weights: against their definitions, icefall's code, and in runs."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fastclap
from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import ConfigError
from fastclap.kernels import scaled_adam
from fastclap.testing import assert_close_rel, host_syncs
from fastclap.train import checkpoint, memory
from fastclap.train.cli import main
from fastclap.train.config import OptimizerConfig, TrainConfig
from fastclap.train.distributed import World
from fastclap.train.loop import train
from fastclap.train.scaled_adam import ScaledAdam
from fastclap.train.step import Step, WeightMean, build_optimizer, scheduled_learning_rate
from tests.train.test_distributed import exported, on_ranks, without_dropout
from tests.train.test_resume import assert_same_checkpoint, assert_same_run, metrics

Build = Callable[..., TrainConfig]

# equal and different shapes, vectors, single numbers of every shape, and zeros, whose rms is below the least
SHAPES = [(5, 7), (5, 7), (5, 7), (3,), (3,), (2, 3, 4), (), (1,), (1, 1), (8, 2), (40, 3)]
ALWAYS_ZERO, SOMETIMES_NONE, INITIALLY_ZERO, LARGE = 2, (1, 4, 6), 9, 10
RATES = (0.045, 0.001)  # of every second parameter


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 for shape in SHAPES]
    found[INITIALLY_ZERO].zero_()
    found[LARGE] *= 10.0  # just below the largest rms
    return [nn.Parameter(x.to(dtype)) for x in found]


def gradients(step: int) -> list[Tensor | None]:
    """float64; every seventeenth is so large that it is clipped."""
    generator = torch.Generator().manual_seed(step)
    found: list[Tensor | None] = []
    for index, shape in enumerate(SHAPES):
        g = torch.randn(shape, generator=generator, dtype=torch.float64) * (30.0 if step % 17 == 3 else 1.0)
        if index == LARGE:
            g -= 0.5 * parameters(torch.float64)[index].detach()  # it wants to grow
        at_rest = index in SOMETIMES_NONE and 50 < step < 90
        found.append(None if at_rest else 0 * g if index == ALWAYS_ZERO else g)
    return found


def give(to: list[nn.Parameter], step: int) -> None:
    for p, g in zip(to, gradients(step), strict=True):
        p.grad = None if g is None else g.to(p.dtype)


def grouped(found: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": found[k::2], "lr": rate} for k, rate in enumerate(RATES)]


class Definition:
    """ScaledAdam written out for one parameter and one number at a time, in float64."""

    beta1, beta2, eps, least, most, bound, share = 0.9, 0.98, 1e-8, 1e-5, 3.0, 10.0, 0.1

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.groups = [
            {
                "lr": group["lr"],
                "norms": [0.0] * 100,
                "threshold": math.inf,
                "held": [self.begin(p) for p in group["params"]],
            }
            for group in groups
        ]
        self.number = self.at_most = 0

    @staticmethod
    def rms(p: Tensor) -> float:
        return math.sqrt(float((p * p).mean()))

    def begin(self, p: Tensor) -> SimpleNamespace:
        p = p.detach().double().clone()
        zero = torch.zeros_like(p)
        return SimpleNamespace(
            p=p, delta=zero, v=zero, rms=self.rms(p) if p.numel() > 1 else 1.0, w=0.0, slopes=[0.0] * 4
        )

    def step(self, given: list[list[Tensor | None]], skipped: bool = False) -> None:
        for group, gs in zip(self.groups, given, strict=True):
            if not skipped:
                self.step_group(
                    group, [torch.zeros_like(h.p) if g is None else g for h, g in zip(group["held"], gs, strict=True)]
                )
        self.number += 1

    def step_group(self, group: dict[str, Any], gs: list[Tensor]) -> None:
        t, lr, scale = self.number, group["lr"], 1.0
        norm = math.sqrt(sum(h.rms**2 * float((g * g).sum()) for h, g in zip(group["held"], gs, strict=True)))
        if t and norm:
            group["norms"][t % 100] = norm
            if t % 100 == 0:
                ordered = sorted(group["norms"])
                group["threshold"] = 2.0 * (ordered[50] or ordered[99])
            scale = min(1.0, group["threshold"] / norm)
        self.scale = scale
        for h, g in zip(group["held"], gs, strict=True):
            g = g * scale
            h.delta = self.beta1 * h.delta
            h.v = self.beta2 * h.v + (1 - self.beta2) * g * g
            correction = 1 - self.beta2 ** (t + 1)
            if h.p.numel() == 1:
                h.delta = h.delta - 0.1 * lr * self.share * g / ((h.v / correction).sqrt() + self.eps)
                h.p = h.p.clamp(-self.bound, self.bound) + h.delta
                continue
            h.slopes[t % 4] = float((h.p * g).sum())
            if t % 4 == 3:
                h.rms, decay = self.rms(h.p), self.beta2**4
                h.w = decay * h.w + (1 - decay) * sum(x * x for x in h.slopes) / 4
                grow = -lr * self.share * math.sqrt(1 - decay ** ((t + 1) // 4))
                grow *= sum(h.slopes) / (math.sqrt(h.w) + self.eps)
                grow = 0.0 if h.rms < self.least else grow
                self.at_most += grow > (self.most - h.rms) / h.rms
                grow = min(grow, (self.most - h.rms) / h.rms)
                h.delta = h.delta + 0.1 * grow * h.p
            divisor = (h.v / correction if correction < 0.99 else h.v).sqrt() + self.eps
            h.delta = h.delta - 0.1 * lr * max(h.rms, self.least) * g / divisor
            h.p = h.p + h.delta


def of_groups(step: int) -> list[list[Tensor | None]]:
    found = gradients(step)
    return [found[k::2] for k in range(len(RATES))]


def assert_equals(found: list[nn.Parameter], definition: Definition, tolerance: float) -> None:
    for k, group in enumerate(definition.groups):
        for index, held in enumerate(group["held"]):
            assert_close_rel(f"{2 * index + k}", held.p, found[k::2][index].detach().double(), tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# the optimizer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("at_once", [1 << 26, 30], ids=["together", "in parts"])
def test_it_is_its_definition(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, at_once: int
) -> None:
    """Every kind of parameter, clipping, gradients that are zero or missing; float32 to the rounding of 320 steps."""
    monkeypatch.setattr(scaled_adam, "_AT_ONCE", at_once)
    found = parameters(dtype)
    definition, optimizer = Definition(grouped(found)), ScaledAdam(grouped(found))
    scales = []
    for step in range(320):
        give(found, step)
        optimizer.step()
        definition.step(of_groups(step))
        assert_equals(found, definition, tolerance)
        scales.append(definition.scale)
    assert set(scales[:100]) == {1.0} and sum(scale < 1 for scale in scales[100:]) >= 12
    assert definition.at_most > 3
    assert not torch.equal(found[ALWAYS_ZERO], found[0]) and found[INITIALLY_ZERO].abs().max() > 0


def test_it_is_icefalls(icefall: SimpleNamespace, default_float64: None) -> None:
    """At the learning rates of Eden, which each of them sets for itself before every step."""
    theirs, ours = parameters(torch.float64), parameters(torch.float64)
    groups = [
        {"named_params": [(str(i), p) for i, p in enumerate(theirs) if i % 2 == k], "lr": rate}
        for k, rate in enumerate(RATES)
    ]
    reference = icefall.optim.ScaledAdam(groups, lr=RATES[0], clipping_scale=2.0)
    reference.show_dominant_parameters = False  # it cannot print those of shape [1]
    eden = icefall.optim.Eden(reference, 50.0, 3.0, warmup_batches=20.0, warmup_start=0.5)
    config = OptimizerConfig(
        kind="scaled-adam", learning_rate=1.0, schedule="eden", warmup_steps=20, warmup_start=0.5,
        eden_batches=50, eden_epochs=3,
    )  # fmt: skip
    optimizer = ScaledAdam(grouped(ours))
    for step in range(320):
        eden.step_epoch(step // 60)
        eden.step_batch(step + 1)
        rate = scheduled_learning_rate(config, step + 1, 10**9, step // 60)
        for group, base, published in zip(optimizer.param_groups, RATES, eden.get_last_lr(), strict=True):
            group["lr"] = base * rate
            assert group["lr"] == pytest.approx(published, rel=1e-14)
        for each in (theirs, ours):
            give(each, step)
        reference.step()
        optimizer.step()
        for index, (expected, actual) in enumerate(zip(theirs, ours, strict=True)):
            assert_close_rel(f"{index} at step {step}", expected.detach(), actual.detach(), 1e-12)
    held = next(state for state in optimizer.state.values() if "threshold" in state)
    assert held["threshold"].isfinite()


@pytest.fixture
def default_float64() -> Iterator[None]:
    """icefall sums the norm of the gradients in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def snapshot(optimizer: ScaledAdam, found: list[nn.Parameter]) -> list[Any]:
    """Copies of the weights and of all state but the count."""
    state = [{n: x.clone() for n, x in optimizer.state[p].items() if n != "step"} for p in found]
    return [[p.detach().clone() for p in found], state]


@pytest.mark.parametrize("skipped", [3, 100, 107])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
def test_a_step_that_is_skipped_changes_nothing(skipped: int, bad: float) -> None:
    """Also where sizes and the threshold are due; the steps after it are those of the definition."""
    found = parameters(torch.float64)
    definition, optimizer = Definition(grouped(found)), ScaledAdam(grouped(found))
    for step in range(skipped + 6):
        give(found, step)
        optimizer.found_inf = torch.tensor(float(step == skipped))
        if step != skipped:
            optimizer.step()
        else:
            for p in found:
                if p.grad is not None:
                    p.grad *= bad
            before = snapshot(optimizer, found)
            optimizer.step()
            torch.testing.assert_close(snapshot(optimizer, found), before, rtol=0, atol=0)
        definition.step(of_groups(step), skipped=step == skipped)
        assert_equals(found, definition, 1e-12)


def test_a_group_with_a_gradient_that_is_not_finite_is_left_out_by_itself() -> None:
    found = parameters(torch.float64)
    optimizer = ScaledAdam(grouped(found))
    for step in range(3):
        give(found, step)
        optimizer.step()
    found[0].grad[0, 0] = math.inf  # type: ignore[index]
    before = snapshot(optimizer, found)
    optimizer.step()
    after = snapshot(optimizer, found)
    torch.testing.assert_close(after[1][0::2], before[1][0::2], rtol=0, atol=0)
    torch.testing.assert_close(after[0][0::2], before[0][0::2], rtol=0, atol=0)
    assert all(not torch.equal(a, b) for a, b in zip(after[0][1::2], before[0][1::2], strict=True))


def test_without_clipping_and_at_rest() -> None:
    """A group without gradients has no threshold; the first one after that is not scaled, whatever its norm."""
    found = [nn.Parameter(torch.ones(4, dtype=torch.float64))]
    for scale in (2.0, 0.0):
        optimizer = ScaledAdam(found, clipping_scale=scale)
        for step in range(102):
            found[0].grad = torch.ones_like(found[0]) if step > 100 else None
            before = found[0].detach().clone()
            optimizer.step()
        assert optimizer.state[found[0]]["exp_avg_sq"].unique().item() == pytest.approx(0.02)
        assert not torch.equal(before, found[0])
        if scale:
            assert optimizer.state[found[0]]["threshold"] == math.inf
        else:
            assert "norms" not in optimizer.state[found[0]]


def test_a_state_dict_goes_on_exactly() -> None:
    found = parameters(torch.float32)
    optimizer = ScaledAdam(grouped(found))
    for step in range(150):
        give(found, step)
        optimizer.step()
    others = [nn.Parameter(p.detach().clone()) for p in found]
    again = ScaledAdam(grouped(others))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(150, 260):
        for each, of in ((found, optimizer), (others, again)):
            give(each, step)
            of.step()
    torch.testing.assert_close(snapshot(again, others), snapshot(optimizer, found), rtol=0, atol=0)
    held = {name for state in optimizer.state.values() for name in state}
    assert held == set(ScaledAdam.STATE)


def test_no_step_waits_for_the_device() -> None:
    found = parameters(torch.float32)
    optimizer = ScaledAdam(grouped(found))
    optimizer.found_inf = torch.tensor(0.0)
    with host_syncs() as syncs:
        for _ in range(105):  # past a threshold
            for p in found:
                p.grad = torch.ones_like(p)
            optimizer.step()
    assert syncs == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (0.99, 0.9)}, "betas are"),
        ({"size_period": 0}, "size_period is 0"),
        ({"clipping_scale": -2.0}, "clipping_scale is -2.0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaledAdam(parameters(torch.float32), **options)


def test_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bfloat16.*keep them in float32"):
        ScaledAdam(parameters(torch.bfloat16))


# ---------------------------------------------------------------------------------------------------------------------
# the schedule


def test_eden_and_the_start_of_the_warm_up() -> None:
    config = OptimizerConfig(learning_rate=0.045, schedule="eden", warmup_steps=500, warmup_start=0.5)
    for step, epoch in ((1, 0), (250, 0), (499, 1), (500, 1), (501, 1), (100_000, 45), (10**6, 400)):
        expected = 0.045 * (1 + (step / 1e5) ** 2) ** -0.25 * (1 + (epoch / 100) ** 2) ** -0.25
        expected *= 1.0 if step >= 500 else 0.5 + 0.5 * step / 500
        assert scheduled_learning_rate(config, step, 7, epoch) == pytest.approx(expected, rel=1e-14)
    constant = OptimizerConfig(learning_rate=0.3, schedule="constant", warmup_steps=7)
    assert [scheduled_learning_rate(constant, step, 9) for step in range(1, 10)] == [
        0.3 * min(step, 7) / 7 if step <= 7 else 0.3 for step in range(1, 10)
    ]
    constant.warmup_start = 0.25
    assert scheduled_learning_rate(constant, 1, 9) == pytest.approx(0.3 * (0.25 + 0.75 / 7))
    assert scheduled_learning_rate(constant, 7, 9, 100) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clipping_scale": -1.0}, r"--optimizer\.clipping-scale is -1\.0"),
        ({"warmup_start": 1.5}, r"--optimizer\.warmup-start is 1\.5"),
        ({"eden_epochs": 0.0}, r"--optimizer\.eden-epochs is 0\.0; it must be a number above 0"),
        ({"schedule": "eden", "final_share": 0.1}, r"--optimizer\.final-share .*eden"),
        ({"average_every": -1, "ema_decay": 0.0}, r"--optimizer\.average-every is -1"),
        ({"average_every": 200}, r"--optimizer\.average-every and --optimizer\.ema-decay.*leave out one"),
    ],
)
def test_impossible_settings(tiny: Build, changes: dict[str, Any], message: str) -> None:
    config = tiny()
    for name, value in changes.items():
        setattr(config.optimizer, name, value)
    with pytest.raises(ConfigError, match=message):
        config.check()


def test_sharded_parameters_are_refused(tiny: Build) -> None:
    config = tiny(shard=True)
    config.optimizer.kind = "scaled-adam"
    with pytest.raises(ConfigError, match=r"scaled-adam goes by the size of whole parameters: leave --shard out"):
        config.check()


# ---------------------------------------------------------------------------------------------------------------------
# runs


def as_clsp(config: TrainConfig) -> TrainConfig:
    config.optimizer = OptimizerConfig(
        kind="scaled-adam", learning_rate=0.045, tower_lr_scale=0.1, schedule="eden", warmup_steps=4, warmup_start=0.5,
        eden_batches=20, eden_epochs=2, average_every=2,
    )  # fmt: skip
    return config


def a_model() -> fastclap.CLAP:
    torch.manual_seed(0)
    return fastclap.CLAP(
        CLAPConfig(
            audio=AudioTowerConfig(width=16, layers=2, heads=2, feature_options={"n_mels": 16}),
            text=TextTowerConfig(width=16, layers=2, heads=2, vocab_size=300),
            head=HeadConfig(kind="linear", dim=16),
        )
    )


def test_there_is_one_group_for_each_learning_rate() -> None:
    model = a_model()
    optimizer = build_optimizer(model, OptimizerConfig(kind="scaled-adam", tower_lr_scale=0.02222))
    assert isinstance(optimizer, ScaledAdam)
    scales = {p: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(optimizer.param_groups) == 2 and scales.keys() == set(model.parameters())
    for name, p in model.named_parameters():
        assert scales[p] == (0.02222 if "_branch." in name else 1.0), name
    one = build_optimizer(model, OptimizerConfig(kind="scaled-adam", clipping_scale=3.0, eps=1e-7))
    assert len(one.param_groups) == 1
    assert (one.defaults["clipping_scale"], one.defaults["eps"], one.defaults["betas"]) == (3.0, 1e-7, (0.9, 0.98))
    falling = build_optimizer(model, OptimizerConfig(kind="scaled-adam", layer_decay=0.5))
    assert sorted(group["lr_scale"] for group in falling.param_groups) == [0.125, 0.25, 0.5, 1.0]


def test_a_run_steps_as_the_definition_says(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Eden's learning rate at the batch's epoch, no other clipping, and the clamp of the scale after the step."""
    config = as_clsp(tiny(steps=9, log_every=1, valid_every=0))
    seen: list[Any] = []
    original = ScaledAdam.step

    def step(self: ScaledAdam, closure: Any = None) -> Any:
        before = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]
        given = [[p.grad.double() for p in group["params"]] for group in self.param_groups]
        rates = [group["lr"] for group in self.param_groups]
        original(self)
        after = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]
        seen.append((before, given, rates, after))

    monkeypatch.setattr(ScaledAdam, "step", step)
    train(config)
    lines = [record for record in metrics(config.run_dir) if record["kind"] == "train"]
    epochs = [record["epoch"] for record in lines]
    assert len(seen) == len(lines) == 9 and epochs[0] == 0 and epochs[-1] == 1
    definition = Definition([{"params": ps, "lr": 0.0} for ps in seen[0][0]])
    norms = []
    for number, (before, given, rates, after) in enumerate(seen, start=1):
        rate = 0.045 * ((1 + (number / 20) ** 2) * (1 + (epochs[number - 1] / 2) ** 2)) ** -0.25
        rate *= min(1.0, 0.5 + 0.5 * number / 4)
        assert sorted(rates) == pytest.approx([0.1 * rate, rate]) and lines[number - 1]["learning_rate"] == max(rates)
        norms.append(math.sqrt(sum(float(g.square().sum()) for gs in given for g in gs)))
        assert norms[-1] == pytest.approx(lines[number - 1]["grad_norm"], rel=1e-5)
        for group, ps, group_rate in zip(definition.groups, before, rates, strict=True):
            group["lr"] = group_rate
            for held, p in zip(group["held"], ps, strict=True):
                held.p = p.double()
        definition.step(given)
        for group, ps in zip(definition.groups, after, strict=True):
            for held, p in zip(group["held"], ps, strict=True):
                # Weights before a norm have Σ p·g = 0 but for rounding, which Adam makes a step of their size.
                assert_close_rel(f"step {number}", held.p, p.double(), 5e-4)
    assert max(norms) > 1.5  # which AdamW's clipping would have cut off


def test_a_resumed_run_is_the_whole_run(tiny: Build) -> None:
    """Before and after the first threshold, with a mean of the weights."""
    whole, parted = (
        as_clsp(tiny(name, steps=115, save_every=23, log_every=1, valid_every=0)) for name in ("whole", "parted")
    )
    train(whole)
    for steps in (23, 69, 104, 115):
        parted.steps, parted.resume = steps, True
        train(parted)
    saved = load_file(checkpoint.checkpoints(Path(parted.run_dir))[-1] / "trainer.safetensors")
    assert {name.partition("/")[0] for name in saved} == {*ScaledAdam.STATE, "mean"}
    assert sum(name.startswith("threshold/") for name in saved) == 2
    assert all(value == 115 for name, value in saved.items() if name.startswith("step/"))
    of_steps = [[r for r in metrics(c.run_dir) if r["kind"] == "train"] for c in (whole, parted)]
    assert of_steps[0] == of_steps[1]
    assert_same_checkpoint(*(checkpoint.checkpoints(Path(c.run_dir))[-1] for c in (whole, parted)))


def test_what_is_set_free_begins_at_its_first_step(tiny: Build) -> None:
    """And a run goes on bit for bit from before, at and after that."""
    config = as_clsp(tiny(steps=8, save_every=1, keep=20, valid_every=0))
    config.model.text.freeze, config.optimizer.unfreeze_step, config.data.frozen_cache = True, 5, "off"
    train(config)
    saved = load_file(checkpoint.checkpoints(Path(config.run_dir))[-1] / "trainer.safetensors")
    counts = {name[5:]: int(value) for name, value in saved.items() if name.startswith("step/")}
    assert {counts[name] for name in counts if name.startswith("text_branch.")} == {3}
    assert {counts[name] for name in counts if not name.startswith("text_branch.")} == {8}
    assert sum(name.startswith("norms/") for name in saved) == 2
    for stop in (4, 5, 6):
        again = copy.deepcopy(config)
        again.run_dir, again.resume = f"{config.run_dir}-{stop}", True
        shutil.copytree(config.run_dir, again.run_dir)
        shutil.rmtree(Path(again.run_dir) / "model")
        for step in range(stop + 1, 9):
            shutil.rmtree(Path(again.run_dir) / "checkpoints" / f"step-{step}")
        train(again)
        assert_same_run(config.run_dir, again.run_dir)


def test_no_step_of_a_run_waits_for_the_device(tiny: Build) -> None:
    counts = []
    for steps in (2, 7):
        config = as_clsp(tiny(f"{steps} steps", steps=steps, log_every=1000, save_every=1000, valid_every=0))
        config.data.valid = []
        with host_syncs() as found:
            train(config)
        package = Path(fastclap.__file__).parent
        cpu = tuple(str(package / part) for part in ("data", "evaluation", "kernels/log_mel", "kernels/contrastive"))
        counts.append(len([entry for entry in found if not entry.rpartition(" at ")[2].startswith(cpu)]))
    assert counts[0] == counts[1]


def test_two_processes_train_like_one(tiny: Build) -> None:
    alone, both = (as_clsp(without_dropout(tiny(name, chunk_size=3))) for name in ("alone", "both"))
    for config in (alone, both):
        config.optimizer.eps = 1e-3  # Adam divides rounding noise by itself where a gradient is about zero
    train(alone)
    assert on_ranks(2, train, both) == [0, 0]
    for name, tensor in exported(alone).items():
        assert_close_rel(name, tensor, exported(both)[name], 1e-4)


def test_the_mean_of_the_weights_is_part_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model()
    trained = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(memory, "measure", lambda *_: memory.Kept(0, trained, trained))
    monkeypatch.setattr(memory, "free_bytes", lambda _: round(((1 << 30) + 12 * trained + 4.5 * trained) / 0.93))

    def chunk(every: int) -> int:
        config = TrainConfig(batch_size=8, checkpoint_activations="off")
        config.optimizer.average_every = every
        return memory.plan(model, [], config, World(0, 1, torch.device("cpu"), None)).chunk_size  # type: ignore[arg-type]

    assert (chunk(0), chunk(200)) == (4, 1)


def test_skipped_steps_change_no_weight(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    config = as_clsp(tiny(steps=8, valid_every=0, log_every=1))
    weights: list[list[Tensor]] = []
    update = Step.update

    def spoiled(self: Step, loss: Tensor, *rest: Any) -> Any:
        if self.number == 5:
            loss = loss * math.nan
        result = update(self, loss, *rest)
        weights.append([p.detach().clone() for p in self.model.parameters()])
        return result

    monkeypatch.setattr(Step, "update", spoiled)
    train(config)
    changed = [any(not torch.equal(a, b) for a, b in zip(weights[n - 1], weights[n], strict=True)) for n in range(1, 8)]
    assert changed == [True] * 4 + [False] + [True] * 2


# ---------------------------------------------------------------------------------------------------------------------
# the mean of the weights


def icefall_checkpoint(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Any:
    """icefall/checkpoint.py, without lhotse."""
    names = ["lhotse", "lhotse.dataset", "lhotse.dataset.sampling", "lhotse.dataset.sampling.base"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].CutSampler = object  # type: ignore[attr-defined]
    module = ModuleType("icefall_checkpoint")
    source = (folder / "icefall" / "checkpoint.py").read_text()
    exec(compile(source, str(folder / "icefall" / "checkpoint.py"), "exec"), module.__dict__)
    return module


def wander(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def test_the_mean_is_that_of_all_those_weights() -> None:
    """In float32: each of 400 updates is rounded, and what is rounded at the n-th weighs n/400 in the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    mean = WeightMean(model, every=5)
    first = {name: x.clone() for name, x in mean.tensors.items()}
    sums = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in model.state_dict().items()}
    for step in range(1, 2001):
        wander(model, step)
        model(torch.randn(8, 3))
        mean.update(step)
        if step < 5:
            assert all(torch.equal(mean.tensors[name], x) for name, x in first.items())
        if step % 5 == 0:
            for name, x in model.state_dict().items():
                sums[name] += x.double()
    for name, total in sums.items():
        if model.state_dict()[name].is_floating_point():
            assert_close_rel(name, total / 400, mean.tensors[name].double(), 3 * math.sqrt(400 / 3) * 2**-25)
        else:
            assert torch.equal(mean.tensors[name], model.state_dict()[name])


def test_the_mean_is_icefalls(icefall: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Updates and the weights between two checkpoints."""
    folder = Path(icefall.optim.__file__).parents[4]
    theirs = icefall_checkpoint(monkeypatch, folder)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    mean, reference = WeightMean(model, every=4), copy.deepcopy(model).double()
    ours: dict[int, dict[str, Tensor]] = {}

    class Params(dict):
        __getattr__ = dict.__getitem__

    for step in range(1, 61):
        wander(model, step)
        mean.update(step)
        if step % 4 == 0:
            theirs.update_averaged_model(Params(average_period=4, batch_idx_train=step), model, reference)
        for name, x in reference.state_dict().items():
            assert_close_rel(name, x, mean.tensors[name].double(), 1e-6)
        if step in (22, 60):
            content = {"average_period": 4, "batch_idx_train": step, "model_avg": reference.state_dict()}
            torch.save(content, tmp_path / f"{step}.pt")
            ours[step] = {name: x.double().clone() for name, x in mean.tensors.items()}
    expected = theirs.average_checkpoints_with_averaged_model(tmp_path / "22.pt", tmp_path / "60.pt")
    for name, x in expected.items():
        assert_close_rel(name, x, (60 * ours[60][name] - 20 * ours[22][name]) / 40, 2e-6)


def averaged(run: Path, last: int) -> tuple[fastclap.CLAP, list[int]]:
    out = run / f"averaged-{last}"
    steps = checkpoint.average_checkpoints(run, last, out)
    return fastclap.CLAP.from_pretrained(out), steps


def test_a_run_is_averaged_between_two_of_its_checkpoints(
    tiny: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the mean of the run; evaluated and exported are the weights themselves, as without it."""
    config = as_clsp(tiny(steps=11, save_every=5, keep=3, log_every=1))
    weights: dict[int, dict[str, Tensor]] = {}
    update = Step.update

    def noted(self: Step, *rest: Any) -> Any:
        result = update(self, *rest)
        weights[self.number] = {name: x.double().clone() for name, x in self.model.state_dict().items()}
        return result

    monkeypatch.setattr(Step, "update", noted)
    train(config)
    run = Path(config.run_dir)
    for last, steps, among in ((2, [10, 11], None), (3, [5, 10, 11], [6, 8, 10]), (1, [11], [2, 4, 6, 8, 10])):
        if among is None:
            with pytest.raises(SystemExit):
                main(["average", str(run), "--last", "2"])
            assert "averaged every 2 steps, and not after step 10; ask for more checkpoints" in capsys.readouterr().err
            continue
        model, found = averaged(run, last)
        assert found == steps
        for name, x in model.state_dict().items():
            expected = sum(weights[step][name] for step in among) / len(among)
            assert_close_rel(name, expected, x.double(), 1e-6)
    plain = as_clsp(tiny("plain", steps=11, save_every=5, log_every=1))
    plain.optimizer.average_every = 0
    train(plain)
    assert metrics(plain.run_dir) == metrics(config.run_dir)
    one, other = (load_file(Path(c.run_dir) / "model" / "model.safetensors") for c in (config, plain))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("part", ["frozen", "adapters"])
def test_the_mean_of_a_run_with_a_part_that_stays(tiny: Build, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """A frozen tower is in the average as it is, and in no checkpoint."""
    config = as_clsp(tiny(steps=6, save_every=3, valid_every=0))
    if part == "frozen":
        config.model.text.freeze = True
    else:
        pytest.importorskip("peft")
        from tests.train.test_speed import WAVLM

        config.model.audio = AudioTowerConfig(kind="wav2vec2", hf_config=WAVLM, lora_rank=2)
    weights: dict[int, dict[str, Tensor]] = {}
    update, merge = Step.update, checkpoint.merged

    def noted(self: Step, *rest: Any) -> Any:
        result = update(self, *rest)
        weights[self.number] = {name: x.clone() for name, x in self.model.state_dict().items()}
        return result

    monkeypatch.setattr(Step, "update", noted)
    train(config)
    saved = load_file(checkpoint.checkpoints(Path(config.run_dir))[-1] / "trainer.safetensors")
    still = {name for name, x in weights[1].items() if torch.equal(x, weights[6][name]) and "feature_" not in name}
    assert still and not any(f"mean/{name}" in saved for name in still if name.startswith("text_branch."))
    model, steps = averaged(Path(config.run_dir), 2)
    assert steps == [3, 6]
    raw = {n: ((weights[4][n].double() + weights[6][n].double()) / 2).to(x.dtype) for n, x in weights[6].items()}
    source = fastclap.CLAP.from_pretrained(checkpoint.checkpoints(Path(config.run_dir))[-1])
    for name, expected in merge(raw, source.config).items():
        assert_close_rel(name, expected.double(), model.state_dict()[name].double(), 1e-5)


def test_the_average_names_its_steps_on_the_command_line(tiny: Build, capsys: pytest.CaptureFixture[str]) -> None:
    config = as_clsp(tiny(steps=6, save_every=3, valid_every=0))
    train(config)
    capsys.readouterr()
    main(["average", config.run_dir])
    assert json.loads(capsys.readouterr().out) == {"model": str(Path(config.run_dir) / "averaged"), "steps": [3, 6]}
