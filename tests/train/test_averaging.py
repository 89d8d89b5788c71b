"""The moving average against its definition, and the mean of the last checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastclap
from fastclap.testing import assert_close_rel
from fastclap.train.cli import main
from fastclap.train.config import TrainConfig
from fastclap.train.loop import train
from fastclap.train.step import WeightAverage


def test_average_follows_its_definition_and_swap_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = WeightAverage(model, decay=0.9)
    expected = {name: tensor.clone().double() for name, tensor in model.state_dict().items()}
    for step in range(1, 30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(8, 3))  # moves the BatchNorm statistics and its integer counter
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            moved = decay * expected[name] + (1 - decay) * tensor.double()
            expected[name] = moved if tensor.is_floating_point() else tensor.double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average.swap()
    for name, tensor in model.state_dict().items():
        assert_close_rel(name, expected[name], tensor, 1e-5)
    average.swap()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_last_checkpoints_are_averaged(
    tiny: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(steps=9, save_every=3, keep=3, valid_every=0)
    train(config)
    run = Path(config.run_dir)
    capsys.readouterr()
    main(["average", str(run), "--last", "2"])
    assert json.loads(capsys.readouterr().out) == {"model": str(run / "averaged"), "steps": [6, 9]}
    found = fastclap.CLAP.from_pretrained(run / "averaged")
    parts = [load_file(run / "checkpoints" / f"step-{step}" / "model.safetensors") for step in (6, 9)]
    for name, tensor in found.state_dict().items():
        assert_close_rel(name, (parts[0][name].double() + parts[1][name].double()) / 2, tensor.double(), 1e-6)
    assert any(not torch.equal(parts[0][name], parts[1][name]) for name in parts[0])
    assert found.embed_text(["a voice"]).shape == (1, 16)
    for words, message in (
        ([str(run), "--last", "4"], "found step-3, step-6, step-9"),
        ([str(tmp_path)], "found none"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["average", *words])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["average", "--help"])
    assert stop.value.code == 0 and "example: fastclap-train average" in capsys.readouterr().out
