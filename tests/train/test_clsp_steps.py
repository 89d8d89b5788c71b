"""Ten training steps of CLSP beside those of its published code: the same weights, batches and draws."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.icefall import Published
from fastclap import CLAP
from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.data import Batch
from fastclap.data.dataset import distinct_texts
from fastclap.models.tokenizer import train_tokenizer
from fastclap.train.config import DataConfig, LossConfig, OptimizerConfig, TrainConfig
from fastclap.train.step import Step
from tests.fastclap.models.zipformer_peer import SMALL, same_draws

MELS, DIM, CLIPS, STEPS = 40, 24, 6, 10
ROBERTA: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 1,
}


def our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published code's weights under our names."""
    rules = [
        ("encoder_embed.", "audio_branch.encoder_embed."),
        ("encoder.", "audio_branch.encoder."),
        ("text_encoder.", "text_branch.base."),
        ("audio_projection.", "audio_projection.projection."),
        ("text_projection.", "text_projection.projection."),
        ("audio_transform.sequential.", "audio_projection.transform."),
        ("text_transform.sequential.", "text_projection.transform."),
        ("logit_scale", "log_logit_scale"),
    ]
    return {
        next(ours + name.removeprefix(prefix) for prefix, ours in rules if name.startswith(prefix)): tensor
        for name, tensor in theirs.items()
    }


@pytest.mark.parametrize("captions_each", [1, 2], ids=["first stage", "second stage"])
@pytest.mark.parametrize("start", [0.0, 100_000.0])
def test_ten_steps_are_those_of_the_published_code(
    icefall: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, captions_each: int, start: float
) -> None:
    texts = [f"a {voice} voice says number {n}" for n in range(4 * CLIPS) for voice in ("low", "high")]
    tokenizer = train_tokenizer(texts, ROBERTA["vocab_size"])
    torch.manual_seed(0)
    theirs = Published(icefall, SMALL, MELS, ROBERTA, DIM, learning_rate=0.045, encoder_scale=0.1)
    theirs.model.double()
    config = TrainConfig(
        data=DataConfig(batch_seconds=600.0),
        model=CLAPConfig(
            audio=AudioTowerConfig(
                kind="zipformer", features="clsp", feature_options={"n_mels": MELS}, zipformer=SMALL
            ),
            text=TextTowerConfig(kind="hf", hf_config={"model_type": "roberta", **ROBERTA}, pooling="pooler"),
            head=HeadConfig("clsp", DIM),
        ),
        loss=LossConfig(share_equal_captions=False),
        optimizer=OptimizerConfig(
            kind="scaled-adam", learning_rate=0.045, tower_lr_scale=0.1, schedule="eden", warmup_steps=500,
            warmup_start=0.5,
        ),
        batch_size=CLIPS,
        chunk_size=0,
    )  # fmt: skip
    ours = CLAP(config.model, tokenizer).double()
    missing, extra = ours.load_state_dict(our_names(theirs.model.state_dict()), strict=False)
    assert not extra and not missing
    ours.train()
    step = Step(ours, config)
    ours.audio_branch.config.zipformer.schedule_start = start  # type: ignore[union-attr]
    begin = same_draws(icefall, monkeypatch)
    generator = torch.Generator().manual_seed(1)
    for number in range(STEPS):
        audio = 0.1 * torch.randn(CLIPS, 16000, generator=generator)
        captions = [texts[(2 * number + n) % len(texts)] for n in range(captions_each * CLIPS)]
        distinct, rows, _ = distinct_texts(captions, [])
        assert len(distinct) == len(captions)
        lengths = torch.full((CLIPS,), 16000)
        batch = Batch(
            number, 0, audio, lengths, None, None, captions, torch.arange(len(captions)), list(range(CLIPS)), [],
            text=tokenizer(distinct, 40), text_rows=rows,
        )  # fmt: skip
        features, frames = ours.audio_branch.log_mel(audio, lengths)  # type: ignore[operator]
        theirs.set_batch_count(start + number)
        begin(number)
        expected = theirs.step(features.double(), frames, tokenizer(captions, 40))
        begin(number)
        found = step([batch])
        assert found.learning_rate == pytest.approx(theirs.optimizer.param_groups[0]["lr"] / 0.1, rel=1e-12) or (
            found.learning_rate == pytest.approx(max(g["lr"] for g in theirs.optimizer.param_groups), rel=1e-12)
        )
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    before = our_names(theirs.model.state_dict())
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
