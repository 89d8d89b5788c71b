"""Learned layer weights: the weighted sum of transformers' hidden states, by the fast encoder and by transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclap import CLAP
from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import ConfigError
from fastclap.models import wavlm
from fastclap.models.audio_towers import Wav2Vec2Tower, build_audio_tower, normalize_waveform
from fastclap.models.layers import length_mask
from fastclap.models.tokenizer import train_tokenizer
from fastclap.testing import assert_close_rel

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
BASE = {"feat_extract_norm": "layer", "do_stable_layer_norm": False}


def config_of(model_type: str, layer_weights: bool = True, **options: Any) -> AudioTowerConfig:
    hf_config = {**SMALL, "model_type": model_type, **options}
    return AudioTowerConfig("wav2vec2", hf_config=hf_config, hidden_states="weighted" if layer_weights else "last")


def clips() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    lengths = torch.tensor([9000, 4321, 7000])
    return torch.randn(3, 9000) * length_mask(lengths, 9000), lengths


def all_states(model: Any, waveform: Tensor, mask: Tensor) -> list[Tensor]:
    """The input of every layer, and the last hidden state, as hooks see them."""
    inputs: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in model.encoder.layers
    ]
    last = model(waveform, attention_mask=mask).last_hidden_state
    for handle in handles:
        handle.remove()
    assert len(inputs) == 3
    return [*inputs, last]


@pytest.mark.parametrize("shape", [LARGE, BASE])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_fast_encoder_sums_the_hidden_states_of_transformers(shape: dict[str, Any], checkpoint: bool) -> None:
    """Output and all gradients, against the definition on an untouched model of transformers."""
    from transformers import WavLMConfig, WavLMModel

    torch.manual_seed(0)
    tower = build_audio_tower(config_of("wavlm", **shape))
    assert isinstance(tower, Wav2Vec2Tower) and isinstance(tower.base.encoder, wavlm.Encoder)
    tower.prepare_training(checkpoint=checkpoint)
    assert tower.pooling.layer_weights is not None and tower.pooling.layer_weights.shape == (4,)
    tower.pooling.layer_weights.data.copy_(torch.tensor([0.3, -1.0, 0.7, 0.1]))
    plain = WavLMModel(WavLMConfig(**{**SMALL, **shape}))
    plain.load_state_dict(tower.base.state_dict())
    audio, lengths = clips()
    direction = torch.randn(3, 32)

    tower.train()
    found = tower(audio, lengths)
    (found * direction).sum().backward()

    plain.train()
    waveform = normalize_waveform(audio, lengths, None, None, min_samples=tower.min_samples, epsilon=1e-7)
    mask = length_mask(lengths, 9000).long()
    states = all_states(plain, waveform, mask)
    valid = length_mask(plain._get_feat_extract_output_lengths(lengths), states[0].shape[1])[..., None]
    alpha = tower.pooling.layer_weights.detach().clone().requires_grad_()
    share = alpha.exp() / alpha.exp().sum()
    expected = sum(share[layer] * (h * valid).sum(1) / valid.sum(1) for layer, h in enumerate(states))
    (expected * direction).sum().backward()
    assert_close_rel("embedding", expected.detach(), found.detach(), 1e-5)
    assert_close_rel("layer weights", alpha.grad, tower.pooling.layer_weights.grad, 1e-4)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None and parameter.grad.norm() > 1e-4:
            assert_close_rel(name, parameter.grad, tower.base.get_parameter(name).grad, 2e-4)


@pytest.mark.parametrize("model_type", ["wav2vec2", "hubert"])
def test_other_encoders_give_their_hidden_states(model_type: str) -> None:
    torch.manual_seed(0)
    tower = build_audio_tower(config_of(model_type, **LARGE)).eval()
    assert isinstance(tower, Wav2Vec2Tower) and tower.pooling.layer_weights is not None
    audio, lengths = clips()
    waveform = normalize_waveform(audio, lengths, None, None, min_samples=tower.min_samples, epsilon=1e-7)
    mask = length_mask(lengths, 9000).long()
    states = all_states(tower.base, waveform, mask)
    valid = length_mask(tower.base._get_feat_extract_output_lengths(lengths), states[0].shape[1])[..., None]
    means = torch.stack([(state * valid).sum(1) / valid.sum(1) for state in states])
    assert_close_rel("equal weights", means.mean(0), tower(audio, lengths), 1e-5)
    tower.pooling.layer_weights.data[2] = 50.0
    assert_close_rel("one layer", means[2], tower(audio, lengths), 1e-5)
    tower.pooling.layer_weights.data.zero_()
    gradients = []
    for checkpoint in (False, True):
        tower.zero_grad()
        tower.train().prepare_training(checkpoint=checkpoint)
        tower(audio, lengths).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and "pooling.layer_weights" in gradients[0]
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name
    with pytest.raises(ConfigError, match=r"hidden_states weighted needs.*layerdrop"):
        build_audio_tower(config_of(model_type, **LARGE, layerdrop=0.1))


def test_weights_train_and_are_saved(tmp_path: Path) -> None:
    config = CLAPConfig(
        audio=config_of("wavlm", **LARGE),
        text=TextTowerConfig(width=16, layers=0, vocab_size=300),
        head=HeadConfig(kind="linear", dim=8),
    )
    model = CLAP(config, train_tokenizer(["a voice", "another voice"], 300))
    audio, lengths = clips()
    model.encode_audio(audio, lengths).square().sum().backward()
    weights = model.audio_branch.pooling.layer_weights
    assert isinstance(weights, torch.nn.Parameter) and weights.grad is not None and weights.grad.any()
    weights.data.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    model.save_pretrained(tmp_path / "model")
    again = CLAP.from_pretrained(tmp_path / "model")
    assert again.config.audio.hidden_states == "weighted" and torch.equal(
        again.audio_branch.pooling.layer_weights, weights.data
    )
    clip = audio[0].numpy()
    assert torch.equal(again.embed_audio([clip]), model.embed_audio([clip]))
    assert "pooling.layer_weights" not in build_audio_tower(config_of("wavlm", False, **LARGE)).state_dict()
