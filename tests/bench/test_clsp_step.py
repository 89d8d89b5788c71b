"""CLSP's step in the benchmarks: its FLOPs, its batches, both of its forms, the lot on a GPU and the tables."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import clsp_step, model_flops, steady, timing
from bench.clsp_step import OURS, PUBLISHED, SIZES, Forms, entry, host_batch
from bench.gpu import clsp, report
from bench.run import ABSENT, Record, Run, Settings
from bench.step_trace import Trace
from fastclap.config import AudioTowerConfig, ZipformerConfig
from fastclap.errors import ConfigError
from fastclap.models.packing import Packing
from fastclap.models.tokenizer import train_tokenizer
from fastclap.models.zipformer.encoder import frames_of
from fastclap.models.zipformer.tower import ZipformerTower
from fastclap.train.config import TrainConfig

CPU = torch.device("cpu")
TINY = SIZES["tiny"]
# Two stacks of different sizes, wide enough for what is left out to be small.
WIDE = ZipformerConfig(
    downsampling=[1, 2], layers=[1, 2], width=[192, 256], unmasked_width=[96], feedforward=[384, 512], heads=[2, 4],
    kernel=[31, 15], channels=[4, 8, 16], output_downsampling=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkout(icefall: SimpleNamespace) -> Path:
    """Of the published code; skips where there is none."""
    return Path(os.environ["FASTCLAP_ICEFALL"])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A dry run, in which forms take at most two turns."""
    monkeypatch.setattr(steady, "MOST_ROUNDS", 2)
    record = Record(tmp_path / "record.json")
    record.begin("lot", "CPU", "", date="")
    return Run(record, Settings("cpu"), time.monotonic() + 200)


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs


@pytest.mark.parametrize("frames", [57, 200])
def test_zipformer_flops_are_what_torch_counts(frames: int) -> None:
    tower = ZipformerTower(
        AudioTowerConfig(kind="zipformer", features="clsp", feature_options={"n_mels": 40}, zipformer=WIDE)
    ).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower.encode(torch.randn(2, frames, 40), Packing([frames_of(frames)] * 2, CPU))
    # More are positions at distances that a row does not have, their table and the averages between stacks.
    formula = 2 * model_flops.zipformer_forward(WIDE, 40, frames)
    assert formula < counter.get_total_flops() < 1.005 * formula


def test_flops_of_a_training_step_are_what_torch_counts() -> None:
    roberta = {**TINY.roberta, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    forms = Forms(replace(TINY, zipformer=WIDE, roberta=roberta), CPU, None)
    model = forms.our_step().model.eval()  # without what acts in training alone
    model.text_branch.base.set_attn_implementation("eager")  # type: ignore[union-attr]  # SDPA on a CPU is not counted
    ids, audio = torch.randint(5, 900, (4, 12)), torch.randn(2, 8000)
    trace = Trace("cpu")  # torch's own counter forgets the groups of a convolution's backward pass
    with trace:
        (model.encode_audio(audio).sum() + model.encode_text(ids, torch.ones_like(ids)).sum()).backward()
    formula = model_flops.clsp_training_step(WIDE, 128, roberta, TINY.dim, [50] * 2, [12] * 4)
    assert sum(cost.flops for cost in trace.costs.values()) == pytest.approx(formula, rel=0.01)


def test_a_longer_clip_and_a_larger_model_cost_more_than_in_proportion() -> None:
    base, xlarge = (SIZES[name].zipformer for name in ("spear-base", "spear-xlarge"))
    short, long = (model_flops.zipformer_forward(xlarge, 128, frames) for frames in (500, 3000))
    assert 6 < long / short < 6.5  # by attention alone
    assert short > 4 * model_flops.zipformer_forward(base, 128, 500)


# ---------------------------------------------------------------------------------------------------------------------
# batches and forms


def test_every_clip_has_a_short_and_a_long_caption_of_its_own() -> None:
    captions = clsp_step.captions(300)
    assert len(captions) == len(set(captions)) == 600
    assert all(captions[i].endswith(f"Take {i}.") and captions[300 + i].endswith(f"Take {i}.") for i in range(300))
    assert max(map(len, captions[:300])) < 128 <= min(map(len, captions[300:]))
    assert max(map(len, captions[300:])) <= 768  # the bounds of fine captions in the recipe


def test_a_batch_is_what_both_loaders_hand_over() -> None:
    batch = host_batch(TINY, train_tokenizer(clsp_step.CAPTIONS, 1000), 3, 0.5)
    assert batch.clips == 3 and batch.batch.samples == [8000] * 3 and batch.batch.audio.dtype == torch.int16
    assert batch.batch.text is not None and len(batch.batch.text["input_ids"]) == len(batch.batch.tokens) == 6
    features, frames = batch.features
    assert features.shape == (3, 50, 128) and frames.tolist() == [50] * 3 and batch.features[0] is features
    assert batch.flops == model_flops.clsp_training_step(
        TINY.zipformer, 128, TINY.roberta, TINY.dim, [50] * 3, batch.batch.tokens
    )


def test_the_step_is_that_of_the_recipe() -> None:
    config: TrainConfig = clsp_step.train_config(SIZES["spear-xlarge"])
    optimizer = config.optimizer
    assert (optimizer.kind, optimizer.schedule, optimizer.learning_rate) == ("scaled-adam", "eden", 0.001)
    assert config.data.captions == "pair" and config.model.text.pooling == "pooler" and config.chunk_size == 0
    assert config.model.audio.zipformer.schedule_start == clsp_step.BATCHES == 100_000
    assert config.model.audio.pretrained is config.model.text.pretrained is None


def test_figures_of_a_form(run: Run) -> None:
    forms = Forms(TINY, CPU, None)
    made = entry(forms.ours(), host_batch(TINY, forms.tokenizer, 3, 0.4), 0.05, 60.0)
    steady.Steady(run, block_seconds=0.0).in_turn([made], 0.0, least=1)
    (row,) = run.record.rows()
    assert row["case"] == {"form": OURS, "clips": 3, "seconds": 0.4} and math.isfinite(row["loss"])
    assert row["audio_s_per_s"] == pytest.approx(0.4 * row["clips_per_s"], rel=2e-3)
    assert row["mfu"] == pytest.approx(row["model_tflops"] / 0.05, rel=2e-3)
    assert "chunk_sizes" not in row


def test_both_forms_take_a_step_on_the_same_batch(checkout: Path) -> None:
    forms = Forms(TINY, CPU, checkout)
    batch = host_batch(TINY, forms.tokenizer, 3, 0.4)
    ours: Any = forms.ours().build()
    theirs: Any = forms.published().build()
    sizes = []
    for model, call in ((ours.objective.model, ours), (theirs.args[0].model, theirs)):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        assert math.isfinite(float(call(batch)))
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert sum(moved) > 0.9 * len(moved)
        sizes.append(sum(x.numel() for x in before))
    lists = TINY.zipformer.lists()
    unread = sum(layers * width for layers, width in zip(lists["layers"], lists["width"], strict=True))
    assert sizes[1] - sizes[0] == unread  # a buffer of ours


def test_a_folder_that_is_no_checkout_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkout of yfyeung/icefall"):
        Forms(TINY, CPU, tmp_path).published_step()


# ---------------------------------------------------------------------------------------------------------------------
# records and tables


def test_record_and_tables(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clsp_step, "matmul_rate", lambda *_: (0.05, timing.Timing.of([1.0])))
    monkeypatch.setattr(steady, "MOST_ROUNDS", 2)
    options = ["--size", "tiny", "--seconds", "0.5", "0.3", "--seconds-a-batch", "1", "--minutes", "3"]
    clsp_step.main(["--icefall", str(checkout), "--out", str(tmp_path), *options])
    record = json.loads((tmp_path / "record.json").read_text())
    cases = [tuple(row["case"].values()) for row in record["rows"]]
    assert cases == [(form, n, s) for n, s in ((2, 0.5), (3, 0.3)) for form in (PUBLISHED, OURS)]
    for row in record["rows"]:
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["loss"] > 0 and len(row["in_turn_with"]) == 1
    text = (tmp_path / "record.md").read_text()
    assert "2 clips of 0.5 s" in text and f"| {PUBLISHED} |" in text and "load" in text
    assert str(tmp_path) not in text + json.dumps(record) and str(checkout) not in text + json.dumps(record)


@pytest.mark.parametrize("option", [("--seconds", "0.05"), ("--minutes", "0"), ("--seconds-a-batch", "0.1")])
def test_impossible_arguments_are_named(option: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=option[0]):
        clsp_step.main(["--icefall", "x", "--out", str(tmp_path), *option])


def test_the_lot_says_what_it_lacks(run: Run) -> None:
    clsp.long(run)
    clsp.short(run)
    rows = {(row["case"]["form"], row["case"]["seconds"]): row for row in run.record.rows() if "form" in row["case"]}
    assert set(rows) == {(form, seconds) for form in (OURS, PUBLISHED) for seconds in (0.6, 0.1)}
    for (form, _), row in rows.items():
        if form == PUBLISHED:
            assert (row["reason"], row["notes"]) == (ABSENT, "no checkout given")
        else:
            assert row["repeats"] >= 1 and not row.get("preliminary") and row["loss"] > 0 and row["mfu"] > 0


def test_the_lot_times_both_forms_in_turn(run: Run, checkout: Path) -> None:
    clsp.long(Run(run.record, Settings("cpu", icefall=checkout), time.monotonic() + 200))
    rows = {row["case"]["form"]: row for row in run.record.rows() if "form" in row["case"]}
    assert list(rows) == [OURS, PUBLISHED] and rows[PUBLISHED]["in_turn_with"] == [OURS]


def test_the_page_of_a_device_has_the_lot() -> None:
    record: dict[str, Any] = {"device": "NVIDIA H200", "runs": [{}], "rows": []}
    for form, ms in ((OURS, 250.0), (PUBLISHED, 1000.0)):
        figures = {"median_ms": ms, "p10_ms": ms, "p90_ms": ms, "repeats": 5, "clips_per_s": 26e3 / ms}
        figures |= {"audio_s_per_s": 780e3 / ms, "mfu": 0.25, "peak_bytes": 3e10}
        record["rows"].append({"case": {"form": form, "clips": 26, "seconds": 30.0}, "run": 0, **figures})
    made = report.tables_of({Path("h200"): {"clsp": record}})
    assert "SPEAR-XLarge, 26 clips of 30 s" in made
    assert "| fastclap | 250 (250-250) | 104 | 25% | 30.00 GB | 3.12e+03 | 4.0 |" in made
    assert report.PUBLISHED == PUBLISHED
