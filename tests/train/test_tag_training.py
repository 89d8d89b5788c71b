"""Training with tags: the prompts go through the text tower with the captions, and the run resumes bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastclap.data import BatchSampler, ClipDataset, load_manifest
from fastclap.data.tags import TagPrompts
from fastclap.errors import ConfigError
from fastclap.losses import info_nce, tag_loss
from fastclap.testing import assert_close_rel
from fastclap.train.config import LossConfig, TrainConfig
from fastclap.train.distributed import World
from fastclap.train.loop import train
from fastclap.train.run import build_model, loader_tokenizer
from fastclap.train.step import Objective

Build = Callable[..., TrainConfig]
ALONE = World(0, 1, torch.device("cpu"), None)


def test_one_pass_of_the_text_tower_gives_both_losses(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient against separate passes, with the loader's tokens and without, in step with shards or not."""
    config = tiny()
    manifest = load_manifest(config.data.train)
    torch.manual_seed(0)
    model = build_model(config, manifest, None).eval()
    tags = TagPrompts(manifest, "intrinsic_tags")
    item = (3, *BatchSampler(manifest, 8, seed=0).batch(3))
    plain, tokenized = (
        ClipDataset(manifest, 16000, crop_seconds=0.5, seed=0, tags=tags, tokenize=tokenize)[item]
        for tokenize in (None, loader_tokenizer(model))
    )
    audio = model.encode_audio(plain.audio, plain.lengths)
    captions, prompts = (model.encode_text(**model.tokenize(texts)) for texts in (plain.captions, plain.prompts))
    ids = plain.caption_ids
    expected = info_nce(audio, captions, model.logit_scale, a_ids=ids, b_ids=ids)
    assert plain.tags is not None
    expected = expected + 0.5 * tag_loss(audio, prompts, plain.tags, scale=2.0)
    expected.backward()
    reference = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    passes: list[int] = []
    encode_text = model.encode_text
    monkeypatch.setattr(
        model, "encode_text", lambda **text: passes.append(len(text["input_ids"])) or encode_text(**text)
    )
    loss = LossConfig(tag_weight=0.5, tag_scale=2.0)
    for batch in (plain, tokenized):
        for every_caption in (False, True):
            for chunk in (0, 64):
                model.zero_grad()
                passes.clear()
                value = Objective(model, loss, chunk, None, ALONE, every_caption=every_caption)(batch)
                texts = [*batch.captions, *batch.prompts]
                assert passes == [len(texts) if every_caption else len(set(texts))]
                assert_close_rel("loss", expected.detach(), value, 1e-6)
                for name, parameter in model.named_parameters():
                    assert_close_rel(name, reference[name], parameter.grad, 2e-5)


def with_tags(config: TrainConfig, prompts: Path) -> TrainConfig:
    prompts.write_text(json.dumps({"female": ["A woman speaks.", "A lady is talking."]}))
    config.loss = LossConfig(tag_weight=1.0, tag_prompts=str(prompts))
    config.data.tag_column, config.data.balance = "intrinsic_tags", "sqrt"
    return config


def test_a_run_with_tags_and_balance_resumes_bit_for_bit(tiny: Build, tmp_path: Path) -> None:
    whole = with_tags(tiny("whole", chunk_size=3), tmp_path / "synonyms.json")
    parted = with_tags(tiny("parted", chunk_size=3, steps=6), tmp_path / "synonyms.json")
    parted.optimizer.schedule = whole.optimizer.schedule = "constant"
    train(whole)
    train(parted)
    parted.steps, parted.resume = 12, True
    model = train(parted)
    expected = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    found = load_file(model / "model.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    state = json.loads((Path(parted.run_dir) / "checkpoints" / "step-12" / "state.json").read_text())
    assert "female" in state["tags"] and state["tags"] == sorted(state["tags"])


def test_other_tags_on_resume_are_an_error(tiny: Build, tmp_path: Path) -> None:
    config = with_tags(tiny("run", steps=3), tmp_path / "synonyms.json")
    rows = [json.loads(line) for line in Path(config.data.train[0]).read_text().splitlines()]
    config.data.audio_root = str(Path(config.data.train[0]).parent)
    copy = tmp_path / "train.jsonl"
    copy.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.train = [str(copy)]
    train(config)
    rows[0]["intrinsic_tags"] = ["robotic"]
    copy.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.steps, config.resume = 6, True
    with pytest.raises(ConfigError, match="the rows, their captions or tags are not those of the checkpoint"):
        train(config)
    path = Path(config.run_dir) / "checkpoints" / "step-3" / "state.json"
    state = json.loads(path.read_text())
    del state["data"]  # as older checkpoints, which do not know the rows
    path.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=r"tags in intrinsic_tags have changed.*robotic"):
        train(config)


def test_tags_need_a_column(tiny: Build) -> None:
    for change in ("loss", "data"):
        config = tiny()
        if change == "loss":
            config.loss.tag_weight = 1.0
        else:
            config.data.balance = "log"
        with pytest.raises(ConfigError, match=r"--data\.tag-column"):
            train(config)
