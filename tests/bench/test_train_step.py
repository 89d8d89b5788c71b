"""The step benchmark: its FLOPs, its forms, its record; and our step against the reference's own.

The comparison with the reference runs where FASTCLAP_REFERENCE names a checkout of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import model_flops, parity, reference_step, steady, timing, train_step
from bench.parity import CAPTIONS, synthetic_batch
from bench.reference_step import without_dropout
from bench.run import SIZES
from fastclap.errors import ConfigError, DataError
from fastclap.models.audio_towers import build_audio_tower
from fastclap.models.tokenizer import train_tokenizer
from fastclap.testing import assert_close_rel

CPU = torch.device("cpu")
TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def forms() -> train_step.Forms:
    torch.manual_seed(0)
    made = train_step.Forms(without_dropout(TINY), CPU, None, train_tokenizer(CAPTIONS, 1000), chunk=3)
    for module in made.plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the heads' too
    return made


def batch_of(forms: train_step.Forms, rows: int = 6, distinct: float = 0.5) -> train_step.HostBatch:
    return train_step.host_batch(
        synthetic_batch(rows, 0.4, 0, distinct=distinct), forms.tokenizer, forms.size, pin=False
    )


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs


@pytest.mark.parametrize("samples", [4000, 20000])
def test_wavlm_flops_are_what_torch_counts(samples: int) -> None:
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.for_model("wavlm", **TINY.wavlm)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        frames = model(torch.randn(2, samples)).last_hidden_state.shape[1]
    assert counter.get_total_flops() == 2 * model_flops.wavlm_forward(TINY.wavlm, samples)
    assert frames == model_flops.wavlm_frames(TINY.wavlm, samples)[-1]


def test_training_flops_are_what_torch_counts() -> None:
    model = reference_step.build_ours(without_dropout(TINY), None, head_dropout=0.0)
    ids = torch.randint(5, 900, (2, 12))
    model.text_branch.base.set_attn_implementation("eager")  # SDPA on a CPU is not counted
    with FlopCounterMode(display=False) as counter:
        audio = model.encode_audio(torch.randn(2, 8000))
        text = model.encode_text(ids, torch.ones_like(ids))
        (audio.sum() + text.sum()).backward()
    counted, formula = (
        counter.get_total_flops(),
        model_flops.training_step(TINY.wavlm, TINY.xlm_roberta, TINY.dim, [8000] * 2, [12] * 2),
    )
    # the pooler, the folded gates and our own convolutions' arithmetic differ a little; fused attention is not counted
    assert counted == pytest.approx(formula, rel=0.1)


def test_the_large_model_costs_what_is_published() -> None:
    large = SIZES["large"]
    assert model_flops.wavlm_forward(large.wavlm, 160000) / 1e9 == pytest.approx(384, abs=0.5)
    assert model_flops.wavlm_frames(large.wavlm, 160000)[-1] == 499


# ---------------------------------------------------------------------------------------------------------------------
# forms


def test_every_stage_takes_the_same_step(forms: train_step.Forms) -> None:
    """Without dropout all optimisations that keep float32 and distinct captions give one loss and one gradient."""
    batch = batch_of(forms, distinct=1.0)
    options = dict.fromkeys(("bf16", "convolutions", "encoder", "packed", "distinct_captions", "fused"), False)
    results = []
    start = {name: p.detach().clone() for name, p in forms.plain.named_parameters()}
    for change in (
        {"host_syncs": True},
        {},
        {"convolutions": True},
        {"encoder": True},
        {"packed": True},
        {"distinct_captions": True},
        {"fused": True},
    ):
        host_syncs = change.pop("host_syncs", False)
        options |= change
        results.append(_loss_and_update(forms, batch, start, host_syncs=host_syncs, **options))
    results.append(_loss_and_update(forms, batch, start, **options, chunk=3))
    assert all(gradient.norm() > 0 for _, gradient in results)
    for index, (loss, gradient) in enumerate(results[1:], start=1):
        assert loss == pytest.approx(results[0][0], rel=1e-5), index
        assert_close_rel(f"gradient of stage {index}", results[0][1], gradient, 1e-3)


def _loss_and_update(forms, batch, start, **options):  # type: ignore[no-untyped-def]
    """Loss and gradient of a stage; the weights are put back."""
    gradients: list[torch.Tensor] = []

    def keep(*_: object) -> None:
        grads = [p.grad for p in forms.plain.parameters() if p.grad is not None]
        gradients.append(torch.cat([gradient.detach().flatten().clone() for gradient in grads]))

    hook = forms.optimizer.register_step_pre_hook(keep)
    try:
        loss = float(forms.ours(**options)(batch))
    finally:
        hook.remove()
    with torch.no_grad():
        for name, parameter in forms.plain.named_parameters():
            parameter.copy_(start[name])
    return loss, gradients[-1]


def test_equal_captions_are_encoded_once_or_not(forms: train_step.Forms) -> None:
    batch = batch_of(forms, rows=6, distinct=0.5)
    assert batch.batch.text is not None and batch.every_caption.text is not None
    assert len(batch.batch.text["input_ids"]) == 3 and len(batch.every_caption.text["input_ids"]) == 6
    assert torch.equal(batch.every_caption.text["input_ids"], batch.batch.text["input_ids"][batch.batch.text_rows])
    assert torch.equal(batch.reference["text_tokens"]["input_ids"], batch.every_caption.text["input_ids"])
    lengths = batch.reference["audio_attention_mask"].sum(1)
    assert torch.equal(lengths, batch.batch.lengths)


def test_the_reference_gets_normalised_clips() -> None:
    batch = synthetic_batch(3, 0.2, 1)
    whole = replace(
        batch,
        mean=torch.stack([c[:n].float().mean() / 32768 for c, n in zip(batch.audio, batch.lengths, strict=True)]),
        std=torch.stack(
            [c[:n].float().std(correction=0) / 32768 for c, n in zip(batch.audio, batch.lengths, strict=True)]
        ),
    )
    from transformers import Wav2Vec2FeatureExtractor

    extractor, made = Wav2Vec2FeatureExtractor(), reference_step.collated(whole, {})
    for row, (clip, size) in enumerate(zip(batch.audio, batch.lengths.tolist(), strict=True)):
        expected = extractor(clip[:size].numpy() / np.float32(32768), sampling_rate=16000).input_values[0]
        assert_close_rel("waveform", torch.as_tensor(expected), made["audio"][row, :size], 1e-5)
        assert made["audio"][row, size:].eq(0).all() and made["audio_attention_mask"][row].sum() == size


# ---------------------------------------------------------------------------------------------------------------------
# measurement


def test_record_tables_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "matmul_rate", lambda *_: (0.05, timing.Timing.of([1.0])))
    monkeypatch.setattr(steady, "MOST_ROUNDS", 2)
    audio = tmp_path / "audio"
    audio.mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        soundfile.write(audio / f"{index}.wav", 0.1 * rng.standard_normal(6000 + 500 * index), 16000)
    arguments = argparse.Namespace(
        reference=None, size="tiny", batches=[3, 4], seconds=0.4, audio=audio, distinct_captions=0.5,
        chunk=3, minutes=5.0, only=["fused loss", "gradient cache"], out=tmp_path / "out",
    )  # fmt: skip
    train_step.measure(arguments)
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    rows = {(row["case"]["form"], row["case"]["rows"]): row for row in record["rows"]}
    assert set(rows) == {(form, n) for form in ("+ fused loss", "+ gradient cache") for n in (3, 4)}
    assert rows.pop(("+ gradient cache", 3))["reason"] == "for batches from 4 clips"
    for (_, n), row in rows.items():
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["repeats"] >= 1 and row["loss"] > 0
        assert row["clips_per_s"] == pytest.approx(1e3 * n / row["median_ms"], rel=1e-3)
        assert row["mfu"] == pytest.approx(row["model_tflops"] / 0.05, rel=1e-2)
    assert rows["+ gradient cache", 4]["chunk_sizes"] == [3, 3]
    text = (tmp_path / "out" / "record.md").read_text()
    assert "Batch of 4 clips" in text and "+ gradient cache" in text and "real speech" in text
    assert str(tmp_path) not in text + json.dumps(record)
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 5000


def test_real_clips_repeat_until_there_are_enough(tmp_path: Path) -> None:
    for index, size in enumerate((5000, 9000)):
        soundfile.write(tmp_path / f"{index}.flac", np.full(size, 0.25), 16000)
    batch = train_step.real_batch(tmp_path, 3, 0.5, 1.0)
    assert batch.lengths.tolist() == batch.samples == [5000, 8000, 5000]
    assert batch.audio.shape == (3, 8000) and torch.equal(batch.audio[0], batch.audio[2])
    assert batch.mean is not None and torch.allclose(batch.mean, torch.tensor(0.25), atol=1e-4)
    with pytest.raises(DataError, match="no audio files"):
        train_step.real_batch(tmp_path / "none", 3, 0.5, 1.0)


def test_log_mel_tower_of_a_given_size() -> None:
    text = {"width": 64, "layers": 1, "heads": 4, "vocab_size": 500, "context_length": 32}
    for wanted in (5_000_000, 30_000_000):
        tower = build_audio_tower(train_step.log_mel_config(wanted, text, 64).audio)
        assert sum(p.numel() for p in tower.parameters()) == pytest.approx(wanted, rel=0.06)


# ---------------------------------------------------------------------------------------------------------------------
# the reference


def test_a_folder_that_is_no_checkout_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkout of ParaSpeechCLAP"):
        reference_step.load(tmp_path)
    # and an installed open_clip does not stand in for the checkout that was asked for
    with pytest.raises(ConfigError, match="no open_clip with CLAP"):
        train_step.OpenClip(tmp_path, "CLAP-HTSAT-tiny", CPU, tiny_text=True)


def test_three_steps_equal_the_references_in_float64(reference: Path) -> None:
    rows = parity.step_parity(reference, TINY, dtype=torch.float64, steps=3)
    assert len(rows) == 3 and rows[0]["loss"] != rows[2]["loss"]
    for row in rows:
        assert row["loss_error"] < 1e-12 and row["gradient_error"] < 1e-9 and row["weight_error"] < 1e-8


def test_three_steps_equal_the_references_in_float32(reference: Path) -> None:
    for row in parity.step_parity(reference, TINY, dtype=torch.float32, steps=3):
        assert row["loss_error"] < 1e-6
        # Adam's division by the gradient's own size magnifies the rounding of the smallest gradients
        assert row["gradient_error"] < 1e-3 and row["weight_error"] < 1e-2


def test_the_reference_runs_as_released_and_tuned(reference: Path) -> None:
    torch.manual_seed(0)
    theirs = reference_step.Reference(reference, TINY, CPU)
    assert theirs.model.audio_branch.base.is_gradient_checkpointing
    forms = train_step.Forms(TINY, CPU, reference, train_tokenizer(CAPTIONS, 1000), chunk=3)
    batch = batch_of(forms).reference
    shown: list[str] = []
    module = sys.modules["paraspeechclap.model"]
    original, module.debug_tensor = module.debug_tensor, lambda name, *_: shown.append(name)  # type: ignore[attr-defined]
    try:
        before = [p.detach().clone() for p in theirs.model.parameters()]
        assert np.isfinite(theirs.step(batch))
        assert len(shown) > 10
        assert any(not torch.equal(p, q) for p, q in zip(before, theirs.model.parameters(), strict=True))
        shown.clear()
        assert np.isfinite(theirs.step(batch, statistics=False, autocast=torch.bfloat16))
        assert shown == []
    finally:
        module.debug_tensor = original  # type: ignore[attr-defined]


def test_curves_and_what_they_say(tmp_path: Path) -> None:
    curves = {"reference": [[3.0, 2.0, 1.0], [3.2, 2.2, 1.4]], "fastclap": [[3.0, 2.1, 1.1], [3.1, 2.0, 1.3]]}
    result = parity.compare(curves, last=2)
    assert result["end"]["reference"]["mean"] == pytest.approx(1.65)
    assert result["difference"] == pytest.approx(-0.025) and abs(result["of_spread"]) < 1
    assert result["paired"]["mean"] == pytest.approx(result["difference"])
    parity.plot(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    record = {
        "settings": {"seeds": [0, 1], "steps": 3, "batch_size": 4, "crop_seconds": 1, "learning_rate": 1e-3,
                     "head_dropout": 0.0, "last": 2},
        "result": result, "clips": "8 clips", "torch": "x", "machine": {"cpu": "y"},
    }  # fmt: skip
    assert "within the spread" in parity.describe(record)
    far = {**curves, "fastclap": [[3.0, 3.0, 3.0], [3.0, 3.1, 3.2]]}
    assert "OUTSIDE the spread" in parity.describe({**record, "result": parity.compare(far, last=2)})


@pytest.mark.parametrize("module", [train_step, parity])
def test_the_command_line_prints_its_help(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--help"])
    with pytest.raises(SystemExit) as done:
        module.main()
    assert done.value.code == 0 and "--reference" in capsys.readouterr().out
