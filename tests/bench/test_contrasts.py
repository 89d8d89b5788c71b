"""The ablation of the contrasts: its commands are ones that the command line takes, and its tables are right."""

from __future__ import annotations

from typing import Any

import pytest

from bench.contrasts import FIGURES, MATRYOSHKA, PLAIN, RUNS, WIDTHS, command, page
from fastclap.train.cli import parse
from fastclap.train.config import LossConfig, TrainConfig
from fastclap.train.recipes import small


@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_a_valid_training(name: str) -> None:
    config = parse([*command(name, 5, "runs", ["--steps", "9"]), "--data.train", "a.jsonl"])
    assert isinstance(config, TrainConfig)
    config.check()
    loss, plain = config.loss, small()
    options = (loss.guide_margin is not None, loss.debias > 0, loss.queue_size > 0, bool(loss.matryoshka))
    assert sum(options) == (name != PLAIN) and (loss == LossConfig()) == (name == PLAIN)
    if "first run" in name:
        assert loss.teacher == f"runs/{PLAIN}/model"
    config.loss, plain.seed, plain.steps, plain.data.train = plain.loss, 5, 9, ["a.jsonl"]
    assert config == plain, "nothing else differs"
    assert max(WIDTHS) == config.model.head.dim and all(width in WIDTHS for width in loss.matryoshka)


def test_the_page_has_means_spreads_and_differences_from_the_plain_run() -> None:
    def run(value: float) -> dict[str, Any]:
        return {**{str(width): dict.fromkeys(FIGURES, value) for width in WIDTHS}, "training": {"seconds": 60.0}}

    figures = {name: {"0": run(0.5), "1": run(0.7)} for name in RUNS}
    figures["debias 0.1"] = {"0": run(0.6), "1": run(0.69)}
    record = {"data": "x", "hardware": "y", "versions": {"torch": "2"}, "commands": {PLAIN: "z"}, "figures": figures}
    lines = page(record).splitlines()
    assert any(line.startswith(f"| {PLAIN} | 60.0 ± 14.1 | 60.0") and line.endswith(" | 60 |") for line in lines)
    assert any(line.startswith("| debias 0.1 | 64.5 ± 6.4 (+4.5, 1 of 2) |") for line in lines)
    assert any(line.startswith(f"| 16 | {MATRYOSHKA} | 60.0 ± 14.1 (+0.0, 0 of 2) |") for line in lines)
