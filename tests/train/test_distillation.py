"""RA-CLAP stage 2: the loss is the formula, the teacher is fixed or follows the average, and sees clean clips."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastclap
from fastclap.data import Batch, BatchSampler, ClipDataset, load_manifest
from fastclap.errors import ConfigError
from fastclap.testing import assert_close_rel
from fastclap.train.config import LossConfig, TrainConfig
from fastclap.train.distributed import World
from fastclap.train.loop import train
from fastclap.train.run import build_model, loader_tokenizer
from fastclap.train.step import Objective, WeightAverage, applied, averaged_teacher, frozen

Build = Callable[..., TrainConfig]
ALONE = World(0, 1, torch.device("cpu"), None)


def cosines(model: fastclap.CLAP, batch: Batch) -> Tensor:
    """float64 [clips, captions]"""
    audio = model.encode_audio(batch.audio, batch.lengths).double()
    text = model.encode_text(**model.tokenize(batch.captions)).double()
    return (audio / audio.norm(dim=1, keepdim=True)) @ (text / text.norm(dim=1, keepdim=True)).T


def formula(student: Tensor, scale: float, teacher: Tensor, teacher_scale: float, captions: list[str], share: float):
    """(1−λ)·InfoNCE + λ·½[KL(P_T^{a→t}‖P_S) + KL(P_T^{t→a}‖P_S)], sum by sum in Python's floats."""
    total = 0.0
    for flip in (False, True):
        s, t = (((x.T if flip else x) * k).tolist() for x, k in ((student, scale), (teacher, teacher_scale)))
        entropy = divergence = 0.0
        for i, (own, taught) in enumerate(zip(s, t, strict=True)):
            log_p = [x - math.log(sum(map(math.exp, own))) for x in own]
            log_t = [x - math.log(sum(map(math.exp, taught))) for x in taught]
            positives = [j for j in range(len(own)) if captions[j] == captions[i]]
            entropy -= sum(log_p[j] for j in positives) / len(positives) / len(s)
            divergence += sum(math.exp(q) * (q - p) for q, p in zip(log_t, log_p, strict=True)) / len(s)
        total += 0.5 * ((1 - share) * entropy + share * divergence)
    return total


@pytest.fixture
def models(tiny: Build) -> tuple[fastclap.CLAP, fastclap.CLAP, ClipDataset, list[int]]:
    """Student and teacher of different widths, in float64 (log-mel features stay float32)."""
    config = tiny()
    manifest = load_manifest(config.data.train)
    torch.manual_seed(0)
    student = build_model(config, manifest, None).double()
    config.model.head.dim = 24
    teacher = frozen(build_model(config, manifest, None).double())
    dataset = ClipDataset(manifest, 16000, crop_seconds=0.5, seed=0)
    return student, teacher, dataset, BatchSampler(manifest, 8, seed=0).batch(0)[1]


@pytest.mark.parametrize("temperature", [None, 0.2])
@pytest.mark.parametrize("chunk", [0, 3])
def test_the_loss_is_the_formula(models, temperature: float | None, chunk: int) -> None:
    student, teacher, dataset, rows = models
    batch = dataset[0, 0, rows]
    student.eval()
    loss = LossConfig(teacher="stage-1", teacher_weight=0.3, teacher_temperature=temperature)
    found = Objective(student, loss, chunk, None, ALONE, teacher=teacher)(batch)
    scale = teacher.logit_scale.item() if temperature is None else 1 / temperature
    of_student, of_teacher = (cosines(model, batch).detach() for model in (student, teacher))
    expected = formula(of_student, student.logit_scale.item(), of_teacher, scale, batch.captions, 0.3)
    assert found.item() == pytest.approx(expected, rel=1e-7)
    assert any(parameter.grad.any() for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_sees_clips_without_dropout(models, monkeypatch: pytest.MonkeyPatch) -> None:
    """With λ = 1 the student's dropout is all that differs between two steps: the teacher's part repeats exactly."""
    student, teacher, dataset, rows = models
    batch = dataset[0, 0, rows]
    seen: list[Tensor] = []
    encode = teacher.encode_audio

    def note(**inputs: object) -> Tensor:
        seen.append(encode(**inputs))
        return seen[-1]

    monkeypatch.setattr(teacher, "encode_audio", note)
    student.train()
    loss = LossConfig(teacher="stage-1", teacher_weight=1.0)
    objective = Objective(student, loss, 0, None, ALONE, teacher=teacher)
    values = [objective(batch).item() for _ in range(2)]
    assert values[0] != values[1]
    clean = teacher.eval().encode_audio(audio=batch.audio, lengths=batch.lengths)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], clean) and not seen[0].requires_grad


def test_the_averaged_teacher_follows_the_average(tiny: Build) -> None:
    config = tiny()
    manifest = load_manifest(config.data.train)
    model = build_model(config, manifest, None)
    average = WeightAverage(model, 0.9)
    teacher = averaged_teacher(model, average)
    model.eval()
    before = teacher.embed_text(["a voice"])
    assert torch.equal(before, model.embed_text(["a voice"]))
    for step in range(1, 4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        average.update(step)
    after = teacher.embed_text(["a voice"])
    assert not torch.equal(after, before) and not torch.equal(after, model.embed_text(["a voice"]))
    with applied(average):
        assert torch.equal(after, model.embed_text(["a voice"]))
    loss = LossConfig(teacher="ema")
    batch = ClipDataset(manifest, 16000, crop_seconds=0.5, seed=0, tokenize=loader_tokenizer(model))[0, 0, [1, 2, 3, 4]]
    found = Objective(model, loss, 0, None, ALONE, teacher=teacher)(batch)
    own, taught = (cosines(each, batch).detach() for each in (model, teacher))
    scales = (each.logit_scale.item() for each in (model, teacher))
    expected = formula(own, next(scales), taught, next(scales), batch.captions, 0.5)
    assert_close_rel("loss", torch.tensor(expected), found.double(), 1e-5)


@pytest.mark.parametrize("teacher", ["init", "ema"])
def test_distillation_trains_and_resumes(tiny: Build, teacher: str) -> None:
    first = train(tiny("first", steps=3))

    def run(name: str, steps: int, resume: bool = False) -> Path:
        config = tiny(name, steps=steps, init_from=str(first), resume=resume, valid_every=0)
        config.optimizer.schedule = "constant"
        config.loss = LossConfig(teacher=teacher, teacher_temperature=0.1)
        return train(config)

    whole = fastclap.CLAP.from_pretrained(run("whole", 6)).state_dict()
    run("parted", 3)
    parted = fastclap.CLAP.from_pretrained(run("parted", 6, resume=True)).state_dict()
    assert all(torch.equal(tensor, parted[name]) for name, tensor in whole.items())
    lines = (first.parent.parent / "whole" / "metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)


def test_impossible_teachers(tiny: Build) -> None:
    for loss, change, message in (
        (LossConfig(teacher="ema"), {"ema_decay": 0.0}, r"--loss\.teacher ema.*--optimizer\.ema-decay"),
        (LossConfig(teacher="init"), {}, r"--loss\.teacher init.*--init-from"),
        (LossConfig(teacher="x", kind="sigmoid"), {}, r"--loss\.teacher belongs to info_nce"),
        (LossConfig(teacher="x", teacher_weight=2.0), {}, r"--loss\.teacher-weight is 2"),
        (LossConfig(teacher="x", teacher_temperature=0.0), {}, r"--loss\.teacher-temperature is 0"),
    ):
        config = tiny(loss=loss)
        for name, value in change.items():
            setattr(config.optimizer, name, value)
        with pytest.raises(ConfigError, match=message):
            train(config)
