"""CLSP's third stage: captions that contradict a clip, and the loss that tells them from its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclap
from fastclap.data import Batch, BatchSampler, ClipDataset, Manifest, load_manifest
from fastclap.errors import ConfigError
from fastclap.losses import info_nce, local_loss
from fastclap.testing import assert_close_rel
from fastclap.train.config import LossConfig, TrainConfig
from fastclap.train.distributed import World
from fastclap.train.loop import train
from fastclap.train.run import build_model, loader_tokenizer
from fastclap.train.step import Objective, Step
from tests.train.test_distributed import exported, on_ranks, without_dropout
from tests.train.test_speed import syncs

Build = Callable[..., TrainConfig]
ALONE = World(0, 1, torch.device("cpu"), None)


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    audio, text, other = (torch.randn(9, 12, dtype=dtype).requires_grad_() for _ in range(3))
    return audio, text, other, torch.tensor(14.3, dtype=dtype, requires_grad=True)


def written_out(audio: Tensor, text: Tensor, other: Tensor, scale: float, where: list[bool]) -> float:
    """The definition in Python's floats."""
    terms = []
    for clip, *both in zip(audio.tolist(), text.tolist(), other.tolist(), strict=True):
        own, contradicting = (
            scale * sum(x * y for x, y in zip(clip, caption, strict=True)) / math.hypot(*clip) / math.hypot(*caption)
            for caption in both
        )
        terms.append(math.log(math.exp(own) + math.exp(contradicting)) - own)
    kept = [term for term, counts in zip(terms, where, strict=True) if counts]
    return sum(kept) / len(kept)


def test_the_local_loss_is_its_definition() -> None:
    audio, text, other, scale = example()
    assert local_loss(audio, text, other, scale).item() == pytest.approx(
        written_out(audio, text, other, 14.3, [True] * 9), rel=1e-12
    )
    assert torch.autograd.gradcheck(local_loss, (audio, text, other, scale))
    low = local_loss(audio.float(), text.float(), other.float(), 14.3)
    assert low.dtype == torch.float32
    assert_close_rel("float32", local_loss(audio, text, other, 14.3).detach(), low.detach(), 1e-6)


def test_clips_without_a_contradiction_take_no_part() -> None:
    audio, text, other, scale = example()
    where = torch.rand(9) < 0.5
    assert 0 < where.sum() < 9
    other.data[~where] = math.inf
    loss = local_loss(audio, text, other, scale, where=where)
    chosen = [x.detach()[where] for x in (audio, text, other)]
    assert loss.item() == pytest.approx(written_out(*chosen, 14.3, [True] * len(chosen[0])), rel=1e-12)
    assert local_loss(audio, text, other, scale, where=where & False).item() == 0.0
    with pytest.raises(ValueError, match=r"one shape \[clips, dim\], got \[\[9, 12\], \[9, 12\], \[8, 12\]\]"):
        local_loss(audio, text, other[:8], scale)
    with pytest.raises(ValueError, match=r"where must have shape \[9\]"):
        local_loss(audio, text, other, scale, where=where[:8])


def test_the_published_losses(icefall: SimpleNamespace) -> None:
    """Global and local loss of the third stage, and the gradient of every input."""
    torch.manual_seed(1)
    audio, text = (torch.randn(n, 16, dtype=torch.float64).requires_grad_() for n in (7, 21))
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    inputs, clips = (audio, text, scale), len(audio)
    unit_audio, unit_text = F.normalize(audio, dim=1), F.normalize(text, dim=1)
    published = icefall.clap_module
    both = torch.stack([unit_text[:clips], unit_text[2 * clips :]], dim=1)
    expected = published.ClipLoss()(unit_audio, unit_text[: 2 * clips], scale, multi_positive=True)
    expected = expected + 0.2 * published.local_clip_loss(unit_audio, both, scale)
    ids = torch.arange(clips)
    found = info_nce(audio, text[: 2 * clips], scale, a_ids=ids, b_ids=ids.repeat(2))
    found = found + 0.2 * local_loss(audio, text[:clips], text[2 * clips :], scale)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = (torch.autograd.grad(loss, inputs) for loss in (expected, found))
    for name, theirs, ours in zip(("audio", "text", "scale"), *gradients, strict=True):
        assert_close_rel(name, theirs, ours, 1e-10)


def some_without(manifest: Manifest) -> Manifest:
    """Every fourth clip has no label, and so no contradiction."""
    return Manifest(row._replace(tags={}) if index % 4 == 0 else row for index, row in enumerate(manifest))


def with_perturbed(config: TrainConfig) -> TrainConfig:
    config.data.captions, config.loss.local_weight = "perturbed", 0.2
    return config


def prepared(config: TrainConfig) -> tuple[fastclap.CLAP, Batch, Batch]:
    """A model in float64 (but for features and masked means), and a batch, without and with the loader's tokens."""
    manifest = some_without(load_manifest(config.data.train))
    torch.manual_seed(0)
    model = build_model(without_dropout(config), manifest, None).double()
    item = (3, *BatchSampler(manifest, 8, seed=0).batch(3))
    plain, tokenized = (
        ClipDataset(manifest, 16000, crop_seconds=0.5, seed=0, caption="perturbed", tokenize=tokenize)[item]
        for tokenize in (None, loader_tokenizer(model))
    )
    return model, plain, tokenized


def test_a_step_is_both_losses_of_its_embeddings(tiny: Build) -> None:
    """Value and every gradient, cached or not, tokenized by the loader or not, in step with shards or not."""
    model, *batches = prepared(tiny())
    captions, clips = batches[0].captions, 8
    audio = model.encode_audio(batches[0].audio, batches[0].lengths)
    text = model.encode_text(**model.tokenize(captions))
    ids = torch.arange(clips)
    expected = info_nce(
        audio, text[: 2 * clips], model.logit_scale, a_ids=ids, b_ids=ids.repeat(2), backend="reference"
    )
    own, contradicting = text[:clips], text[2 * clips :]
    logits = torch.stack([F.cosine_similarity(audio, each) for each in (own, contradicting)], 1) * model.logit_scale
    of_clips = F.cross_entropy(logits, torch.zeros(clips, dtype=torch.int64), reduction="none")
    turned = torch.tensor([captions[i] != captions[2 * clips + i] for i in range(clips)])
    assert 0 < turned.sum() < clips
    expected = expected + 0.2 * of_clips[turned].mean()
    expected.backward()
    reference = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for batch in batches:
        for every_caption in (False, True):
            for chunk in (0, 3):
                for weight in (1.0, 0.25):
                    model.zero_grad()
                    loss = LossConfig(local_weight=0.2)
                    objective = Objective(model, loss, chunk, None, ALONE, every_caption=every_caption)
                    assert objective(batch, weight).item() == pytest.approx(expected.item(), rel=1e-6)
                    for name, parameter in model.named_parameters():
                        assert_close_rel(name, weight * reference[name], parameter.grad, 3e-6)


def test_a_batch_without_contradictions_has_the_loss_of_its_pairs(tiny: Build) -> None:
    model, batch, _ = prepared(tiny())
    batch.captions[16:], batch.caption_ids[16:] = batch.captions[:8], batch.caption_ids[:8].clone()
    both, local = (Objective(model, LossConfig(local_weight=w), 0, None, ALONE)(batch).item() for w in (0.0, 5.0))
    assert both == local > 0


def test_it_learns_to_tell_them_apart(tiny: Build) -> None:
    """Twenty-five times over the same four batches: the share of clips that are nearer to their own caption grows."""
    config = with_perturbed(tiny(steps=100))
    config.optimizer.schedule = "constant"
    manifest = load_manifest(config.data.train)
    torch.manual_seed(0)
    model = build_model(without_dropout(config), manifest, None)
    sampler = BatchSampler(manifest, 8, seed=0)
    dataset = ClipDataset(manifest, 16000, crop_seconds=0.5, seed=0, caption="perturbed")
    batches = [dataset[(step, *sampler.batch(step))] for step in range(4)]
    step = Step(model, config)

    def told_apart() -> float:
        right = []
        for batch in batches:
            with torch.no_grad():
                audio = model.encode_audio(batch.audio, batch.lengths)
                own, _, other = model.encode_text(**model.tokenize(batch.captions)).view(3, 8, -1)
            changed = torch.tensor([a != b for a, b in zip(batch.captions[:8], batch.captions[16:], strict=True)])
            right.append((F.cosine_similarity(audio, own) > F.cosine_similarity(audio, other))[changed])
        assert len(torch.cat(right)) > 24
        return torch.cat(right).double().mean().item()

    before = told_apart()
    losses = [sum(step([batch]).loss.item() for batch in batches) for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0] and told_apart() > max(0.8, before), (losses, before, told_apart())


def test_two_processes_train_like_one(tiny: Build) -> None:
    """Length buckets, gradient caching, accumulation, validation: whole runs."""
    alone, both = (
        with_perturbed(without_dropout(tiny(name, chunk_size=3, steps=8, accumulate=2))) for name in ("alone", "both")
    )
    for config in (alone, both):
        config.optimizer.eps = 1e-3  # Adam divides rounding noise by itself where a gradient is about zero
    train(alone)
    assert on_ranks(2, train, both) == [0, 0]
    for name, tensor in exported(alone).items():
        assert_close_rel(name, tensor, exported(both)[name], 1e-4)


def test_no_step_waits_for_the_device(tiny: Build) -> None:
    counts = []
    for steps in (2, 5):
        name = f"{steps} steps"
        config = with_perturbed(tiny(name, steps=steps, chunk_size=3, log_every=1000, save_every=1000, valid_every=0))
        config.data.valid = []
        counts.append(len(syncs(config)))
    assert counts[0] == counts[1]


def test_a_resumed_run_is_the_run_that_was_not(tiny: Build) -> None:
    """Bit for bit, also where captions are perturbed in a process of their own."""
    whole, parted = (with_perturbed(tiny(name, chunk_size=3)) for name in ("whole", "parted"))
    parted.optimizer.schedule = whole.optimizer.schedule = "constant"
    train(whole)
    parted.steps, parted.data.workers = 6, 1
    train(parted)
    parted.steps, parted.resume = 12, True
    train(parted)
    for name, tensor in exported(whole).items():
        assert torch.equal(tensor, exported(parted)[name]), name


def losses_of(config: TrainConfig) -> list[float]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]


def test_a_frozen_audio_tower_is_kept_and_a_frozen_text_tower_is_not(
    tiny: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastclap.train.run.fit_feature_statistics", lambda *_: None)
    runs = [with_perturbed(tiny(name, steps=6, log_every=1)) for name in ("plain", "kept")]
    for config, cache in zip(runs, ("off", str(tmp_path / "cache")), strict=True):
        config.model.audio.freeze = config.model.text.freeze = True
        config.data.frozen_cache, config.data.crop_seconds = cache, 10.0
        train(config)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"audio"}
    assert "frozen text tower: computed at every step, because captions are perturbed" in capfd.readouterr().out
    plain, kept = map(losses_of, runs)
    assert len(plain) == 6 and kept == pytest.approx(plain, rel=1e-5)


def test_a_queue_holds_the_pairs_alone(tiny: Build) -> None:
    config = with_perturbed(tiny(steps=2))
    config.loss.queue_size = 64
    manifest = load_manifest(config.data.train)
    model = build_model(config, manifest, None)
    step, sampler = Step(model, config), BatchSampler(manifest, 8, seed=0)
    dataset = ClipDataset(manifest, 16000, crop_seconds=0.5, seed=0, caption="perturbed")
    step([dataset[(0, *sampler.batch(0))]])
    assert step.queue is not None and [len(x) for x in step.queue.rows()[:2]] == [8, 16]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": "perturbed"}, r"--data\.captions perturbed and --loss\.local-weight .*belong together"),
        ({"local_weight": 0.2}, r"--data\.captions perturbed and --loss\.local-weight .*belong together"),
        (
            {"captions": "perturbed", "local_weight": -1.0},
            r"--loss\.local-weight is -1\.0; it must be a number at least 0",
        ),
    ],
)
def test_captions_and_loss_belong_together(tiny: Build, change: dict[str, Any], message: str) -> None:
    config = tiny()
    for name, value in change.items():
        setattr(config.data if name == "captions" else config.loss, name, value)
    with pytest.raises(ConfigError, match=message):
        config.check()
