"""The training step and the loop on a GPU: the same numbers as on a CPU, no wait for the device, a resume bit by bit.

What means something on a CPU runs there too, by the same code: each test takes the device as a parameter.
"""

from __future__ import annotations

import copy
import gc
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastclap
from bench.parity import synthetic_batch
from bench.reference_step import build_ours, parity_loss, parity_optimizer, without_dropout
from bench.run import SIZES
from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.data import Batch
from fastclap.data.dataset import distinct_texts
from fastclap.kernels.waveform import normalize_waveform_reference
from fastclap.models import audio_towers
from fastclap.models.audio_towers import build_audio_tower
from fastclap.models.tokenizer import train_tokenizer
from fastclap.testing import assert_close_rel, host_syncs, relative_error
from fastclap.train.config import DataConfig, OptimizerConfig, TrainConfig
from fastclap.train.distributed import World
from fastclap.train.loop import train
from fastclap.train.step import Objective, Step

ROWS, SECONDS = 8, 0.5
VOICES = ["A calm voice.", "An angry, deep voice.", "A person whispers.", "She speaks fast and bright.", "A tired man."]
TOKENIZER = train_tokenizer([f"{voice} Take {number}." for voice in VOICES for number in range(9)], 300)

every_device = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 is float32 in cuDNN's convolutions too."""
    assert torch.get_float32_matmul_precision() == "highest"
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def a_batch(device: str, rows: int = ROWS, seconds: float = SECONDS, seed: int = 0) -> Batch:
    """Noise, with captions of which two occur twice, tokenized as a loader does it."""
    batch = synthetic_batch(rows, seconds, seed, distinct=0.75)
    distinct, text_rows, _ = distinct_texts(batch.captions, [])
    text = TOKENIZER(distinct, max_tokens=32)
    tokens = text["attention_mask"].sum(1).tolist()
    return replace(batch, text=text, text_rows=text_rows, tokens=tokens).to(device)


def a_model(device: str, dropout: bool) -> fastclap.CLAP:
    """WavLM and XLM-R as small as they get, in training mode; gates and position bias as if they were trained."""
    torch.manual_seed(0)
    size = SIZES["tiny"] if dropout else without_dropout(SIZES["tiny"])
    model = build_ours(size, TOKENIZER, head_dropout=0.1 if dropout else 0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_attn_embed" in name or "gru_rel_pos" in name:
                parameter.normal_()
    return model.to(device).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def step_of(
    model: fastclap.CLAP, batch: Batch, *, bf16: bool = False, chunk: int | list[int] = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a step from one seed, without the optimizer's part."""
    model.zero_grad()
    torch.manual_seed(7)
    autocast, world = torch.bfloat16 if bf16 else None, World(0, 1, model.device, None)
    return Objective(model, parity_loss(), chunk, autocast, world)(batch), gradients(model)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten().cpu() for name in sorted(tensors)])


# ---------------------------------------------------------------------------------------------------------------------
# the step


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The step in float64 on the CPU, with what the towers do in float32 always taken in float64 too."""

    def waveform(*tensors: Tensor, dtype: torch.dtype, **options: Any) -> Tensor:
        return normalize_waveform_reference(*tensors, **options)

    with monkeypatch.context() as patch:
        patch.setattr(audio_towers, "normalize_waveform", waveform)
        return step_of(a_model("cpu", dropout=False).double(), a_batch("cpu"))


# Of all gradients together; on a CPU 9e-7 and 1.7e-2. A GPU's products of float32 in the loss and in attention are
# sums of TF32 parts, which costs the loss's gradient 1e-5. bfloat16 rounds every product of the towers to 2^-9, a few
# tens of them in a row.
WHOLE_GRADIENT = {"float32": 5e-5, "bfloat16": 4e-2}


@every_device
@pytest.mark.parametrize("precision", WHOLE_GRADIENT)
def test_gradients_of_a_step_are_those_of_float64(
    exact: tuple[Tensor, dict[str, Tensor]], precision: str, device: str
) -> None:
    """Each parameter's own error is measured by that of the same step on the CPU, which rounds as often."""
    expected_loss, expected = exact
    bf16 = precision == "bfloat16"
    loss, found = step_of(a_model(device, dropout=False), a_batch(device), bf16=bf16)
    assert loss.device.type == device and loss.dtype == torch.float32
    assert_close_rel("loss", expected_loss, loss, 5e-3 if bf16 else 1e-5)
    assert found.keys() == expected.keys() and len(found) > 80
    assert_close_rel("all gradients", flat(expected), flat(found), WHOLE_GRADIENT[precision])
    _, plain = step_of(a_model("cpu", dropout=False), a_batch("cpu"), bf16=bf16)
    largest = max(gradient.norm().item() for gradient in expected.values())
    for name, gradient in expected.items():
        if gradient.norm() > 1e-4 * largest:  # not zero but for rounding, as that of the keys' bias
            rounding = relative_error(gradient, plain[name])
            assert_close_rel(name, gradient, found[name], max(4 * rounding, 5e-2 if bf16 else 2e-4))


WHISPER = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96}
WHISPER |= {"max_source_positions": 100}
AST = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "max_length": 256}
AST |= {"num_mel_bins": 64}
SPECTROGRAMS = {"whisper": ("clip", WHISPER), "whisper, full window": ("full", WHISPER), "ast": ("clip", AST)}


@every_device
@pytest.mark.parametrize("precision", WHOLE_GRADIENT)
@pytest.mark.parametrize("name", SPECTROGRAMS)
def test_towers_on_spectrograms_are_those_of_float64(name: str, precision: str, device: str) -> None:
    """Clips of several lengths, packed where a tower packs: value, every gradient, and no wait for the device."""
    window, sizes = SPECTROGRAMS[name]
    options: dict[str, Any] = {"hf_config": sizes, "window": window, "pooling": "statistics"}
    torch.manual_seed(0)
    tower = build_audio_tower(AudioTowerConfig(name.split(",")[0], hidden_states="weighted", **options)).train()
    for module in tower.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    lengths = [16000, 9000, 4000, 12345]
    audio = torch.randint(-3000, 3000, (4, 16000), dtype=torch.int16)
    direction = torch.randn(4, tower.width, dtype=torch.float64)

    def run(tower: Any, bf16: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        on = next(tower.parameters()).device
        tower.zero_grad()
        with torch.autocast(on.type, torch.bfloat16, enabled=bf16):
            vectors = tower(audio.to(on), torch.tensor(lengths, device=on), host_lengths=lengths)
        (vectors.double() * direction.to(on)).sum().backward()
        return vectors.detach(), gradients(tower)

    expected, exact = run(copy.deepcopy(tower).double())
    on_device, bf16 = tower.to(device), precision == "bfloat16"
    found, grads = run(on_device, bf16)
    assert_close_rel("vectors", expected, found.cpu(), 2e-2 if bf16 else 1e-4)
    assert grads.keys() == exact.keys() and len(grads) > 30
    assert_close_rel("all gradients", flat(exact), flat(grads), 6e-2 if bf16 else 5e-4)
    inputs = audio.to(device), torch.tensor(lengths, device=device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            on_device(*inputs, host_lengths=lengths)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with host_syncs() as waits:
            on_device(*inputs, host_lengths=lengths)
        assert [place for place in waits if "kernels/log_mel/" not in place] == []


@every_device
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_cached_gradients_are_the_uncached_ones_with_dropout(bf16: bool, device: str) -> None:
    """The second pass of a chunk draws the first one's random numbers again, from the generator of the device too."""
    model, batch = a_model(device, dropout=True), a_batch(device)
    _, without_cache = step_of(model, batch, bf16=bf16)
    _, at_once = step_of(model, batch, bf16=bf16, chunk=ROWS)
    loss, cached = step_of(model, batch, bf16=bf16, chunk=3)

    model.zero_grad()
    torch.manual_seed(7)
    assert batch.text is not None and batch.text_rows is not None
    parts = []
    with torch.autocast(device, torch.bfloat16, enabled=bf16, cache_enabled=False):
        for encode, count, inputs in (
            (model.encode_audio, ROWS, (batch.audio, batch.lengths, batch.mean, batch.std, batch.samples)),
            (model.encode_text, len(batch.tokens), (*batch.text.values(), batch.tokens)),
        ):
            chunks = [[x[at : at + 3] for x in inputs] for at in range(0, count, 3)]  # type: ignore[index]
            parts.append(torch.cat([encode(*chunk) for chunk in chunks]))  # type: ignore[operator]
    expected_loss = fastclap.info_nce(parts[0], parts[1][batch.text_rows], model.logit_scale)
    expected_loss.backward()
    assert_close_rel("loss", expected_loss, loss, 1e-3 if bf16 else 1e-6)
    tol = 2e-2 if bf16 else 1e-5  # bfloat16 embeddings have bfloat16 gradients, one chunk's sums are in another order
    assert_close_rel("in chunks", flat(gradients(model)), flat(cached), tol)
    assert_close_rel("at once", flat(without_cache), flat(at_once), tol)


@every_device
@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_no_step_waits_for_the_device(bf16: bool, chunk: int, device: str) -> None:
    model, batch = a_model(device, dropout=True), a_batch(device)
    config = TrainConfig(
        loss=parity_loss(),
        optimizer=replace(parity_optimizer(), clip_norm=1.0),
        chunk_size=chunk,
        precision="bf16" if bf16 else "fp32",
    )
    step = Step(model, config)
    before = flat(dict(model.named_parameters()))
    step([batch])  # compiles, and makes the optimizer's state
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            step([batch])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with host_syncs() as found:
            step([batch])
        # the losses' torch engine works on what is on a CPU anyway
        assert [place for place in found if "kernels/contrastive/" not in place] == []
    assert (flat(dict(model.named_parameters())) - before).abs().max() > 1e-5


@every_device
def test_a_compiled_step_is_the_eager_one(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    from fastclap.models import wavlm

    torch._dynamo.reset()
    model, batch = a_model(device, dropout=False), a_batch(device)
    compiled = copy.deepcopy(model)
    if device == "cpu":  # the graphs are what is tested; a C++ compiler takes a minute
        compile_module = wavlm.EncoderLayer.compile
        monkeypatch.setattr(
            wavlm.EncoderLayer, "compile", lambda x, **_: compile_module(x, backend="aot_eager", fullgraph=True)
        )
    compiled.audio_branch.prepare_training(compile=True)  # type: ignore[operator]
    expected_loss, expected = step_of(model, batch)
    loss, found = step_of(compiled, batch)
    torch._dynamo.reset()
    assert_close_rel("loss", expected_loss, loss, 1e-5)
    assert found.keys() == expected.keys()
    assert_close_rel("gradients", flat(expected), flat(found), 1e-5 if device == "cpu" else 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose memory can be limited")
def test_the_chunk_is_halved_where_memory_runs_out() -> None:
    """With too little for the whole batch and enough for a quarter, the gradient is that of smaller chunks."""
    rows = 96
    model, batch = a_model("cuda", dropout=True), a_batch("cuda", rows, seconds=1.0)

    def peak(chunk: int) -> tuple[int, dict[str, Tensor]]:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found = step_of(model, batch, chunk=chunk)[1]
        return torch.cuda.max_memory_reserved(), {name: x.cpu() for name, x in found.items()}

    whole, (quarter, _) = peak(rows)[0], peak(rows // 4)
    assert quarter < 0.6 * whole
    total = torch.cuda.get_device_properties(0).total_memory
    model.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((quarter + 0.25 * (whole - quarter)) / total)
    try:
        config = TrainConfig(loss=parity_loss(), optimizer=parity_optimizer(), chunk_size=rows, precision="fp32")
        step = Step(model, config)
        torch.manual_seed(7)
        step.objective(batch)
        sizes = step.objective.chunk_sizes
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sizes is not None and rows // 8 <= sizes[0] < rows
    found = {name: x.cpu() for name, x in gradients(model).items()}
    assert_close_rel("gradients", flat(step_of(model, batch, chunk=sizes)[1]), flat(found), 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# the loop


class Noise:
    """A clip in place of an audio file: the device's machine can read none."""

    statistics = None

    def __init__(self, row: Any, sampling_rate: int) -> None:
        self.path, self.sampling_rate = row.audio, sampling_rate
        random = np.random.default_rng(int(Path(row.audio).stem))
        self._wave = random.normal(0, 3000, 8000 + 400 * (int(Path(row.audio).stem) % 5)).astype(np.int16)
        self.num_samples = len(self._wave)

    def read(self, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        return self._wave[start:][:num_samples]

    def __enter__(self) -> Noise:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def run_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TrainConfig]]:
    """run_of(name, towers, device, **changes): the configuration of a small run on noise."""
    from fastclap.train import run

    monkeypatch.setattr("fastclap.data.dataset.open_clip", Noise)
    monkeypatch.setattr("fastclap.train.run.write_report", lambda *_, **__: None)  # needs packages of its own
    build = run.build_model

    def with_tokenizer(*arguments: Any) -> fastclap.CLAP:
        model = build(*arguments)
        model.tokenizer = model.tokenizer or TOKENIZER  # models of transformers' towers come with one otherwise
        return model

    monkeypatch.setattr("fastclap.train.run.build_model", with_tokenizer)
    rows = [
        {"audio": f"{number}.wav", "text_description": f"{VOICES[number % 5]} Take {number % 9}.", "duration": 0.5}
        for number in range(32)
    ]
    for row in rows:
        (tmp_path / str(row["audio"])).touch()
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = SIZES["tiny"]
    models = {
        "log-mel": lambda: CLAPConfig(
            audio=AudioTowerConfig(width=16, layers=1, heads=2, feature_options={"n_mels": 16}),
            text=TextTowerConfig(width=16, layers=1, heads=2, vocab_size=300),
            head=HeadConfig(kind="linear", dim=16),
        ),
        "transformers": lambda: CLAPConfig(
            audio=AudioTowerConfig(kind="wav2vec2", hf_config={"model_type": "wavlm", **size.wavlm}),
            text=TextTowerConfig(
                kind="hf", hf_config={"model_type": "xlm-roberta", **size.xlm_roberta}, pooling="cls", max_tokens=32
            ),
            head=HeadConfig(kind="paraspeechclap", dim=size.dim, dropout=0.5),
        ),
    }

    def build_config(name: str, towers: str, device: str, **changes: Any) -> TrainConfig:
        return TrainConfig(
            run_dir=str(tmp_path / name),
            data=DataConfig(train=[str(tmp_path / "train.jsonl")], workers=0, crop_seconds=0.5),
            model=models[towers](),
            optimizer=OptimizerConfig(warmup_steps=0, schedule="constant", ema_decay=0.9),
            batch_size=8,
            log_every=1,
            save_every=100,
            device=device,
            **changes,
        )

    before = torch.get_float32_matmul_precision()
    yield build_config
    torch.set_float32_matmul_precision(before)  # a run on a GPU sets it


@every_device
@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("towers", ["log-mel", "transformers"])
def test_a_resumed_run_is_the_uninterrupted_one(
    run_of: Callable[..., TrainConfig], towers: str, chunk: int, device: str
) -> None:
    """Four steps, and two and two more: the same losses and weights, bit by bit."""
    from tests.train.test_resume import assert_same_run

    whole = run_of("whole", towers, device, steps=4, chunk_size=chunk)
    train(whole)
    train(run_of("halves", towers, device, steps=2, chunk_size=chunk))
    halves = run_of("halves", towers, device, steps=4, chunk_size=chunk, resume=True)
    train(halves)
    assert_same_run(whole.run_dir, halves.run_dir)
    records = [json.loads(line) for line in (Path(halves.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(0 < record["loss"] < 10 and record["skipped_steps"] == 0 for record in records)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("towers", ["log-mel", "transformers"])
def test_the_loop_waits_no_more_often_for_more_steps(
    run_of: Callable[..., TrainConfig], towers: str, chunk: int
) -> None:
    counts = []
    for steps in (3, 3, 6):  # the first run compiles the kernels
        config = run_of(f"{len(counts)}", towers, "cuda", steps=steps, chunk_size=chunk)
        config.log_every = 100
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")  # else the same place is counted once
                train(config)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in found))
    assert counts[1] == counts[2] > 0
