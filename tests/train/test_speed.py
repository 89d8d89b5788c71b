"""What a step must not do, and what a run reports of its speed: host syncs, memory, traces, figures."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fastclap
from fastclap.config import AudioTowerConfig, TextTowerConfig
from fastclap.errors import TrainingError
from fastclap.testing import assert_close_rel, host_syncs
from fastclap.train import meter as meter_module
from fastclap.train.config import TrainConfig
from fastclap.train.distributed import World
from fastclap.train.loop import train
from fastclap.train.meter import FlopCount, Meter, build_meter
from fastclap.train.recipes import RECIPES

Build = Callable[..., TrainConfig]

WAVLM = {
    "model_type": "wavlm",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8, 8],
    "conv_kernel": [10, 8],
    "conv_stride": [5, 64],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_length": 2,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
}
XLM_R = {
    "model_type": "xlm-roberta",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 300,
}


def of_transformers(config: TrainConfig) -> TrainConfig:
    """The towers of ParaSpeechCLAP, as small as they get."""
    config.model.audio = AudioTowerConfig(kind="wav2vec2", hf_config=WAVLM)
    config.model.text = TextTowerConfig(kind="hf", hf_config=XLM_R, pooling="cls")
    return config


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives models of transformers' towers, which normally come with one, a tokenizer of words."""
    from fastclap.train import run

    class Words:
        vocab_size = 300

        def __call__(self, texts: list[str], max_tokens: int) -> dict[str, Tensor]:
            rows = [[3 + sum(map(ord, word)) % 290 for word in text.split()][:max_tokens] for text in texts]
            width = max(map(len, rows))
            ids = torch.tensor([row + [1] * (width - len(row)) for row in rows])
            return {"input_ids": ids, "attention_mask": (ids != 1).long()}

        def save(self, path: Path) -> None:
            path.write_text("{}")

    build = run.build_model

    def with_tokenizer(*arguments: Any) -> fastclap.CLAP:
        model = build(*arguments)
        model.tokenizer = model.tokenizer or Words()  # type: ignore[assignment]
        return model

    monkeypatch.setattr("fastclap.train.run.build_model", with_tokenizer)


def syncs(config: TrainConfig) -> list[str]:
    """Operations of a run that would make the host wait for a GPU.

    Left out is what only ever reads tensors of a CPU: loading, validation, the check of lengths in `log_mel` and the
    torch engine of the losses, which a GPU that Triton supports does not take.
    """
    with host_syncs() as found:
        train(config)
    package = Path(fastclap.__file__).parent
    cpu = tuple(str(package / part) for part in ("data", "evaluation", "kernels/log_mel", "kernels/contrastive"))
    return [entry for entry in found if not entry.rpartition(" at ")[2].startswith(cpu)]


@pytest.mark.parametrize(
    "change",
    [{}, {"chunk_size": 3}, {"precision": "bf16"}, {"accumulate": 2, "checkpoint_activations": "on"}],
    ids=["plain", "cached", "bf16", "accumulated"],
)
@pytest.mark.parametrize("towers", ["log-mel", "transformers"])
def test_no_step_waits_for_the_device(tiny: Build, tokenizer: None, change: dict, towers: str) -> None:
    """What does not grow with the number of steps is not in the step."""
    counts = []
    for steps in (2, 5):
        config = tiny(f"{steps} steps", steps=steps, log_every=1000, save_every=1000, valid_every=0, **change)
        config.data.valid = []
        counts.append(syncs(config if towers == "log-mel" else of_transformers(config)))
    assert len(counts[0]) == len(counts[1]), sorted(set(counts[1]))


def test_a_sync_in_the_step_would_be_noticed(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastclap.train.step import Objective

    def curious(self: Objective, audio: Tensor, text: Tensor) -> Tensor:
        loss = loss_of(self, audio, text)
        assert loss.item() > 0
        return loss

    loss_of = Objective.loss
    monkeypatch.setattr(Objective, "loss", curious)
    counts = []
    for steps in (2, 5):
        config = tiny(f"{steps} steps", steps=steps, log_every=1000, save_every=1000, valid_every=0)
        config.data.valid = []  # what a processor is good at is found out once, in the first evaluation
        counts.append(syncs(config))
    few, many = counts
    assert len(many) == len(few) + 3 and any("test_speed.py" in entry for entry in many)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("chunk", [0, 3])
def test_no_step_waits_for_a_gpu(tiny: Build, tokenizer: None, chunk: int, recwarn: pytest.WarningsRecorder) -> None:
    counts = []
    for steps in (4, 8):
        config = of_transformers(tiny(f"{steps} steps", steps=steps, log_every=1000, save_every=1000, valid_every=0))
        config.data.valid, config.device, config.chunk_size = [], "cuda", chunk
        warnings.simplefilter("always")  # else the same place is counted once
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(config)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in recwarn.list))
        recwarn.clear()
    assert counts[0] == counts[1]


# ---------------------------------------------------------------------------------------------------------------------
# memory


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_the_chunk_is_halved_and_never_the_batch(tiny: Build, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """A run that learns its chunk size by running out of memory is the run that was given it, and remembers it."""
    known, found = tiny("known", chunk_size=2), tiny("found", chunk_size="auto")
    train(known)
    failures = []

    def check(rows: int) -> None:
        if rows > 2:
            failures.append(rows)
            raise torch.OutOfMemoryError("injected")

    class Limited(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            check(len(gradient))
            return gradient

    def limited(encode: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(self: fastclap.CLAP, x: Tensor, *rest: Any, **named: Any) -> Tensor:
            if stage == "forward" and self.training:
                check(len(x))
            out = encode(self, x, *rest, **named)
            return Limited.apply(out) if stage == "backward" else out

        return run

    def named(encode: Callable[..., Tensor], first: str) -> Callable[..., Tensor]:
        return lambda self, *rest, **others: encode(self, *(rest or (others.pop(first),)), **others)

    monkeypatch.setattr(fastclap.CLAP, "encode_audio", named(limited(fastclap.CLAP.encode_audio), "audio"))
    monkeypatch.setattr(fastclap.CLAP, "encode_text", named(limited(fastclap.CLAP.encode_text), "input_ids"))
    train(found)
    assert failures
    expected, actual = (load_file(Path(c.run_dir) / "model" / "model.safetensors") for c in (known, found))
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
    failures.clear()
    found.steps, found.resume = 14, True
    train(found)
    assert not failures


@pytest.mark.parametrize("stage", ["copy", "loss", "optimizer", "tower"])
def test_out_of_memory_elsewhere_ends_the_run_and_loses_nothing(
    tiny: Build, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    from fastclap.data import Batch
    from fastclap.train.step import Objective

    whole, struck = tiny("whole"), tiny("struck", chunk_size=0)  # with a chunk it would be halved
    train(whole)
    owner, name = {
        "copy": (Batch, "to"),
        "loss": (Objective, "loss"),
        "optimizer": (torch.optim.AdamW, "step"),
        "tower": (fastclap.CLAP, "encode_text"),
    }[stage]
    original, calls = getattr(owner, name), []

    def failing(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("injected")
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(TrainingError, match=r"out of memory on cpu.*--resume.*--chunk-size"):
        train(struck)
    struck.resume = True
    train(struck)
    expected, actual = (load_file(Path(c.run_dir) / "model" / "model.safetensors") for c in (whole, struck))
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())


# ---------------------------------------------------------------------------------------------------------------------
# execution options and figures


def test_execution_options_change_no_result(tiny: Build, tokenizer: None) -> None:
    plain, other = of_transformers(tiny("plain", steps=3)), of_transformers(tiny("other", steps=3))
    other.checkpoint_activations = "on"
    for config in (plain, other):
        config.data.valid = []
        train(config)
    expected, actual = (load_file(Path(c.run_dir) / "model" / "model.safetensors") for c in (plain, other))
    for name, tensor in expected.items():
        assert_close_rel(name, tensor, actual[name], 1e-6)


def test_profile_writes_a_trace(tiny: Build) -> None:
    config = tiny(profile=True)
    train(config)
    folder = Path(config.run_dir) / "profile"
    names = {event.get("name") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert "aten::mm" in names or "aten::addmm" in names
    assert "Self CPU" in (folder / "longest.txt").read_text()


def test_flops_are_those_of_the_formula() -> None:
    """Layers of width C on n positions: 8 C² + 4 C·F for the products a position and 4 n C for its attention."""
    config = RECIPES["small"]().model
    config.text.layers, config.text.width, config.text.feedforward = 2, 64, 3
    model = fastclap.CLAP(config).eval()
    count = FlopCount.of(model, 24000, 64)
    for n in (5, 33, 64):
        expected = 2 * n * (8 * 64**2 + 4 * 64 * 192 + 4 * n * 64) + 2 * 64 * config.head.dim
        assert count.text([n]) == pytest.approx(expected, rel=1e-6)
    assert count.text([5, 33]) == pytest.approx(count.text([5]) + count.text([33]))
    assert count.audio([24000]) > 1.8 * count.audio([12000]) > 0


def test_flops_are_counted_while_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one process, for the main rank; what was computed before they are known counts all the same."""
    monkeypatch.setattr(meter_module, "EnergyCounter", lambda device: SimpleNamespace(joules=lambda: None))
    monkeypatch.setattr(meter_module, "peak_flops", lambda device: 1e9)
    config = RECIPES["small"]()
    config.data.crop_seconds = 0.5
    model = fastclap.CLAP(config.model)
    assert build_meter(config, model, World(1, 2, torch.device("cuda", 0), None))._flops is None
    meter = build_meter(config, model, World(0, 2, torch.device("cuda", 0), None))
    meter.add(4, samples=[8000, 4000], tokens=[5, 7])
    counting: Any = meter._flops
    assert counting() is None
    assert "mfu" not in meter.lap()
    meter.add(4, samples=[8000, 4000], tokens=[5, 7])
    assert counting._process.wait(300) == 0
    in_place = FlopCount.of(model.eval(), 8000, config.model.text.max_tokens)
    assert counting().polynomials.tolist() == in_place.polynomials.tolist()
    now = meter._start + 2.0
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now)
    forward = in_place.audio([8000, 4000]) + in_place.text([5, 7])
    assert meter.lap()["mfu"] == pytest.approx(3 * forward / 2.0 / 1e9, abs=1e-4)


def test_figures_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Utilisation from FLOPs and peak, watts and joules a clip from the driver's counter, pauses left out."""
    now = iter([0.0, 2.0, 7.0, 9.0, 9.0])
    joules = iter([100.0, 300.0, 900.0, 1100.0, 1100.0])
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(meter_module, "EnergyCounter", lambda device: SimpleNamespace(joules=lambda: next(joules)))
    monkeypatch.setattr(meter_module, "peak_flops", lambda device: 1e12)
    flops = FlopCount(np.array([[0.0, 0.0, 1e9], [0.0, 0.0, 0.0]]))  # 1 GFLOP a clip
    meter = Meter(World(0, 2, torch.device("cuda", 0), None), lambda: flops)
    meter.add(40, samples=[1] * 20)
    meter.mark()
    meter.add(40, samples=[1] * 20)  # belongs to the next lap
    with meter.paused():
        pass
    figures = meter.lap()
    assert figures["clips_per_second"] == 10.0 and figures["mfu"] == pytest.approx(60e9 / 4 / 1e12, abs=1e-4)
    assert figures["watts"] == 100.0 and figures["joules_per_clip"] == 20.0
    assert math.isclose(flops.forward(meter._work), 20e9)
