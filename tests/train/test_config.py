"""Configuration: flags, files, recipes, and the errors when they are wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fastclap.errors import ConfigError, FastclapError
from fastclap.train.cli import main, parse
from fastclap.train.config import TrainConfig, load_config
from fastclap.train.recipes import RECIPES
from fastclap.train.step import scheduled_learning_rate


def parsed(*arguments: str) -> TrainConfig:
    config = parse(arguments)
    assert isinstance(config, TrainConfig)
    return config


def test_flags_reach_every_level() -> None:
    config = parsed(
        "small", "--data.train", "a.jsonl", "b.csv", "--data.audio-root", "clips", "--batch-size", "64", "--resume",
        "--model.audio.width", "96", "--data.columns", "text_description", "caption",
        "--model.audio.feature-options", '{"n_mels": 64}', "--model.text.hf-config", '{"model_type": "bert"}',
    )  # fmt: skip
    assert config.data.train == ["a.jsonl", "b.csv"] and config.data.audio_root == "clips"
    assert config.batch_size == 64 and config.resume and config.model.audio.width == 96
    assert config.model.audio.feature_options == {"n_mels": 64} and config.model.text.hf_config == {
        "model_type": "bert"
    }
    assert config.data.columns == {"text_description": "caption"}


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (
            ".yaml",
            "steps: 7\noptimizer: {learning_rate: 1e-4}\ndata:\n  train: [a.jsonl]\nmodel: {audio: {layers: 3}}\n",
        ),
        (
            ".toml",
            'steps = 7\n[optimizer]\nlearning_rate = 1e-4\n[data]\ntrain = ["a.jsonl"]\n[model.audio]\nlayers = 3\n',
        ),
    ],
)
def test_file_is_laid_over_the_recipe_and_flags_over_the_file(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"run{suffix}"
    path.write_text(text)
    config = parsed("small", "--config", str(path), "--steps", "9")
    assert (config.steps, config.optimizer.learning_rate, config.data.train) == (9, 1e-4, ["a.jsonl"])
    assert config.model.audio.layers == 3
    assert config.batch_size == RECIPES["small"]().batch_size  # untouched by file and flags


def test_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    for build in RECIPES.values():
        config = build()
        config.data.train = ["a.jsonl"]
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config.to_dict()))
        for other in (TrainConfig, *RECIPES.values()):
            assert load_config(path, other()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "stepz"),
        ("data: {trane: [a]}", "data.trane"),
        ("steps: many", "steps must be a whole number at least 1, not 'many'"),
        ("data: {mix: shuffle}", "data.mix"),
        ("- 1", "mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_files_name_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml") as caught:
        load_config(path, TrainConfig())
    assert message in str(caught.value)


def test_missing_configuration_file() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_config("nowhere.yaml", TrainConfig())


def test_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(FastclapError, match=r"no recipe 'smal'.*demo, small"):
        parse(["smal"])


def test_published_hyper_parameters() -> None:
    for name, steps, epochs in (("intrinsic", 4500, 0), ("situational", None, 25), ("combined", None, 5)):
        config = parsed(f"paraspeechclap-{name}", "--data.train", "a.jsonl")
        config.check()
        assert (config.batch_size, config.seed, config.data.crop_seconds, config.epochs) == (128, 3407, 10.0, epochs)
        assert steps is None or config.steps == steps
        optimizer = config.optimizer
        assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.clip_norm) == (1e-5, 0.0, 0.0)
        assert {scheduled_learning_rate(optimizer, step, 4500) for step in (1, 2000, 4500)} == {1e-5}
        assert config.model.audio.pretrained == "microsoft/wavlm-large" and config.model.head.dim == 768
        assert (config.loss.tag_weight, config.data.balance) == (
            (1.0, "inverse") if name == "intrinsic" else (0, "none")
        )
        assert config.data.mix == ("interleave" if name == "combined" else "concat")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("form", [[], ["--small"], ["--parity"], ["--small", "--parity"]])
def test_every_form_of_every_recipe_is_possible(name: str, form: list[str]) -> None:
    start = ["--init-from", "stage1"] if name in ("ra-clap", "clsp-stage2", "clsp-stage3") else []
    config = parsed(name, *form, "--data.train", "a.jsonl", *start)
    config.check()
    assert config.loss.share_equal_captions == ("--parity" not in form)
    if "--small" in form and RECIPES[name]().model.audio.kind == "whisper":
        assert config.model.audio.pretrained == "openai/whisper-tiny.en" and config.model.audio.window == "clip"
        assert config.model.head == RECIPES[name]().model.head and config.model.text == RECIPES[name]().model.text
    elif "--small" in form:
        small = RECIPES["small"]().model
        if RECIPES[name]().model.audio.kind == "zipformer":
            assert config.model.audio.kind == "zipformer" and config.optimizer.kind == "scaled-adam"
            small.audio = config.model.audio
        assert config.model == small and (config.steps, config.batch_size) == (1000, 32)


def test_wavlm_takes_the_place_of_a_zipformer() -> None:
    for name in ("clsp-stage1", "clsp-stage2", "clsp-stage3"):
        config = parsed(name, "--wavlm", "--data.train", "a.jsonl")
        config.check()
        assert config.model.audio.pretrained == "microsoft/wavlm-large" and config.optimizer.kind == "adamw"
        assert config.data == parsed(name, "--data.train", "a.jsonl").data
        assert parsed(name, "--wavlm", "--small", "--data.train", "a.jsonl").model == RECIPES["small"]().model
    with pytest.raises(ConfigError, match="this recipe has none"):
        parsed("small", "--wavlm", "--data.train", "a.jsonl")


def test_second_stages_and_layer_weights() -> None:
    assert parsed("ess-clap").model.audio.hidden_states == "weighted"
    with pytest.raises(ConfigError, match="--init-from"):
        parsed("ra-clap", "--data.train", "a.jsonl").check()
    first, second = (parsed(f"clsp-stage{stage}", "--data.train", "a.jsonl") for stage in (1, 2))
    assert (first.data.captions, second.data.captions) == ("global", "pair")
    assert second.data.fine_characters == [128, 768] and second.model == first.model
    assert first.optimizer.tower_lr_scale < second.optimizer.tower_lr_scale == 1.0
    assert first.model.head.kind == "clsp" and first.model.text.pooling == "pooler"


def test_small_and_parity_change_a_recipe_before_other_flags() -> None:
    full = parsed("paraspeechclap-intrinsic", "--data.train", "a.jsonl")
    little = parsed("paraspeechclap-intrinsic", "--steps", "7", "--small", "--data.train", "a.jsonl")
    base = RECIPES["small"]()
    assert little.model == base.model and little.optimizer == base.optimizer and little.batch_size == base.batch_size
    assert little.steps == 7 and little.run_dir != full.run_dir
    assert (little.loss, little.data.balance, little.seed) == (full.loss, full.data.balance, full.seed)
    published = parsed("paraspeechclap-intrinsic", "--parity", "--data.train", "a.jsonl")
    assert full.loss.share_equal_captions and not published.loss.share_equal_captions
    assert published.data.pad_to_crop and not published.data.bucket_by_length
    assert published.model == full.model and published.optimizer == full.optimizer


def test_unknown_flag_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["small", "--data.trian", "a.jsonl"])
    assert stop.value.code == 2
    assert "--data.train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data.train is empty"),
        (["--data.train", "a", "--batch-size", "1"], "--batch-size is 1"),
        (["--data.train", "a", "--data.max-bad-share", "3"], "--data.max-bad-share is 3"),
        (["--data.train", "a", "--loss.kind", "sigmoid", "--loss.label-smoothing", "0.1"], "--loss.label-smoothing"),
        (["--data.train", "a", "--device", "tpu"], "--device is 'tpu'"),
        (["--data.train", "a", "--optimizer.cooldown-share", "0"], "--optimizer.cooldown-share is 0"),
        (["--data.train", "a", "--valid.best", "R@1"], "--valid.best compares validations: name a manifest"),
    ],
)
def test_impossible_settings_exit_with_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["small", *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "Traceback" not in error


def test_help_through_the_real_command_line_shows_every_field() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fastclap.train.cli", "small", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0

    def flags(value: object, prefix: str) -> Iterator[str]:
        for field in dataclasses.fields(value):  # type: ignore[arg-type]
            inner, name = getattr(value, field.name), f"{prefix}{field.name.replace('_', '-')}"
            yield from flags(inner, f"{name}.") if dataclasses.is_dataclass(inner) else [f"--{name}"]

    missing = [flag for flag in flags(RECIPES["small"](), "") if flag not in result.stdout]
    assert not missing
