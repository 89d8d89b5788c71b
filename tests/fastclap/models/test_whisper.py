"""The Whisper tower: transformers' encoder on the whole window and on the clip's own positions, packed and padded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import ConfigError
from fastclap.kernels.log_mel.operator import log_mel
from fastclap.models.audio_towers import build_audio_tower
from fastclap.models.clap import CLAP
from fastclap.models.whisper import WhisperTower
from fastclap.testing import assert_close_rel

SIZES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 80,
    "max_source_positions": 50,  # a window of 1 s
}
LENGTHS = [14000, 3333, 9000, 16000]
POOLINGS = ["mean", "statistics", "attention", "token"]


def tower_of(seed: int = 0, **options: Any) -> WhisperTower:
    torch.manual_seed(seed)
    changes = options.pop("hf_config", {})
    tower = build_audio_tower(AudioTowerConfig("whisper", hf_config={**SIZES, **changes}, **options))
    assert isinstance(tower, WhisperTower)
    if tower.pooling.attention is not None:
        tower.pooling.attention.data.normal_()
    return tower


def batch(lengths: list[int] = LENGTHS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Noise whose padding is NaN: nothing may read it."""
    torch.manual_seed(1)
    audio = torch.full((len(lengths), max(lengths)), math.nan)
    for row, length in enumerate(lengths):
        audio[row, :length] = 0.1 * torch.randn(length)
    return audio.to(dtype), torch.tensor(lengths)


def plain_encoder(tower: WhisperTower) -> Any:
    """transformers' own, with the tower's weights."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    plain = WhisperEncoder(WhisperConfig(**SIZES))
    plain.load_state_dict(tower.base.state_dict())
    return plain.eval()


def features_of(wave: Tensor, seconds: int = 1) -> Tensor:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(chunk_length=seconds)
    return extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt")["input_features"]


def states_of(plain: Any, x: Tensor) -> list[Tensor]:
    """States by the definition, from the first layer's input on: the input of every layer, and the normed result."""
    states = []
    for layer in plain.layers:
        states.append(x)
        x = layer(x, None)
    return [*states, plain.layer_norm(x)]


def pooled(states: list[Tensor], tower: WhisperTower, pooling: str) -> list[Tensor]:
    """Each state [1, T, C] over time, by the definition."""
    if pooling == "token":
        return [state[0, 0] for state in states]
    if pooling == "mean":
        return [state[0].mean(0) for state in states]
    if pooling == "statistics":
        return [torch.cat([s[0].mean(0), (s[0].var(0, correction=0) + 1e-5).sqrt()]) for s in states]
    vectors = tower.pooling.attention
    assert vectors is not None
    return [(s[0] @ vectors[n % len(vectors)]).softmax(0) @ s[0] for n, s in enumerate(states)]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_full_window_is_transformers_whisper(pooling: str) -> None:
    tower = tower_of(pooling=pooling).eval()
    plain, (audio, lengths) = plain_encoder(tower), batch()
    with torch.no_grad():
        found = tower(audio, lengths)
        for row, length in enumerate(LENGTHS):
            x = F.gelu(plain.conv1(features_of(audio[row, :length])))
            x = F.gelu(plain.conv2(x)).transpose(1, 2) + plain.embed_positions.weight
            if tower.token is not None:
                x = torch.cat([tower.token.expand(1, 1, -1), x], 1)
            state = states_of(plain, x)[-1]
            valid = state if pooling == "token" else state[:, : math.ceil(length / 320)]
            # the extractor's float64 spectrogram differs from ours by its rounding
            assert_close_rel(f"clip {row}", pooled([valid], tower, pooling)[0], found[row], 1e-3)
        last = plain(features_of(audio[3])).last_hidden_state
        if pooling == "mean":
            assert_close_rel("its own forward pass", last[0].mean(0), found[3], 1e-3)


@pytest.mark.parametrize("options", [{}, {"padding_value": -3.0}], ids=str)
def test_the_zeros_of_a_window_are_not_computed(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the features are those of the whole window all the same."""
    tower, given = tower_of(feature_options=options).eval(), []
    spec = tower.log_mel.spec

    def recorded(waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        found = log_mel(waveform, lengths, spec)
        given.append(found)
        return found

    audio, lengths = batch()
    monkeypatch.setattr(tower.log_mel, "forward", recorded)
    tower(audio, lengths)
    ((features, frames),) = given
    window = torch.zeros(len(audio), tower.window)
    for row, length in enumerate(LENGTHS):
        window[row, :length] = audio[row, :length]
    assert torch.equal(features, log_mel(window, None, spec)[0])
    computed = [min(length + 400, tower.window) // 160 for length in LENGTHS]
    assert frames.tolist() == ([tower.window // 160] * len(LENGTHS) if options else computed)


@pytest.mark.parametrize("hidden_states", ["last", "weighted", "concatenated"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_clip_alone_has_its_own_positions(pooling: str, hidden_states: str) -> None:
    """By the definition in float64, for clips alone, padded and packed; what is past a clip's end is never read."""
    tower = tower_of(window="clip", pooling=pooling, hidden_states=hidden_states).double().eval()
    if tower.pooling.layer_weights is not None:
        tower.pooling.layer_weights.data.copy_(torch.tensor([0.3, -1.0, 0.7, 0.1]))
    plain, (audio, lengths) = plain_encoder(tower).double(), batch()
    expected = []
    for row, length in enumerate(LENGTHS):
        features = tower.log_mel(audio[row : row + 1, :length])[0].double().transpose(1, 2)
        x = F.gelu(plain.conv1(features))
        x = F.gelu(plain.conv2(x)).transpose(1, 2)
        assert x.shape[1] == math.ceil(length // 160 / 2)
        x = x + plain.embed_positions.weight[: x.shape[1]]
        if tower.token is not None:
            x = torch.cat([tower.token.expand(1, 1, -1), x], 1)
        states = states_of(plain, x)
        each = pooled(states if hidden_states != "last" else states[-1:], tower, pooling)
        if tower.pooling.layer_weights is not None:
            expected.append(tower.pooling.layer_weights.softmax(0) @ torch.stack(each))
        else:
            expected.append(torch.cat(each))
    forms = {
        "padded": tower(audio, lengths),
        "packed": tower(audio, lengths, host_lengths=LENGTHS),
        "alone": torch.cat([tower(audio[row : row + 1, :length]) for row, length in enumerate(LENGTHS)]),
    }
    for name, found in forms.items():
        # features are in float32, their sums in another order
        assert found.shape == (4, tower.width)
        assert_close_rel(name, torch.stack(expected), found, 2e-5)
    assert_close_rel("packed like padded", forms["padded"], forms["packed"], 1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_are_those_of_transformers(pooling: str, checkpoint: bool) -> None:
    """Every parameter's, through packed rows, against the plain layers clip by clip in float64."""
    tower = tower_of(window="clip", pooling=pooling, hidden_states="weighted").double().train()
    tower.prepare_training(checkpoint=checkpoint)
    plain, (audio, lengths) = plain_encoder(tower).double(), batch()
    direction = torch.randn(4, tower.width, dtype=torch.float64)
    (tower(audio, lengths, host_lengths=LENGTHS) * direction).sum().backward()
    vectors = [
        vector.detach().clone().requires_grad_()
        for vector in (tower.token, tower.pooling.attention, tower.pooling.layer_weights)
        if vector is not None
    ]
    alpha = vectors[-1]
    for row, length in enumerate(LENGTHS):
        features = tower.log_mel(audio[row : row + 1, :length])[0].double().transpose(1, 2)
        x = F.gelu(plain.conv2(F.gelu(plain.conv1(features)))).transpose(1, 2)
        x = x + plain.embed_positions.weight[: x.shape[1]]
        if pooling == "token":
            x = torch.cat([vectors[0].expand(1, 1, -1), x], 1)
        states = states_of(plain, x)
        if pooling == "attention":
            each = [(s[0] @ vectors[0][n]).softmax(0) @ s[0] for n, s in enumerate(states)]
        else:
            each = pooled(states, tower, pooling)
        ((alpha.softmax(0) @ torch.stack(each)) * direction[row]).sum().backward()
    compared = 0
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad and parameter.grad is not None and parameter.grad.norm() > 1e-9:
            found = tower.base.get_parameter(name).grad
            assert found is not None
            assert_close_rel(name, parameter.grad, found, 1e-4)
            compared += 1
    assert compared > 40
    assert_close_rel("layer weights", alpha.grad, tower.pooling.layer_weights.grad, 1e-4)  # type: ignore[union-attr]
    if pooling == "token":
        assert_close_rel("token", vectors[0].grad, tower.token.grad, 1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize("window", ["clip", "full"])
def test_short_and_long_clips(window: str) -> None:
    """A clip shorter than a frame is extended with zeros, a longer one than the window cut."""
    tower = tower_of(window=window, pooling="statistics").eval()
    audio, _ = batch([1, 399, 30000])
    lengths = [1, 399, 30000]
    with torch.no_grad():
        found = tower(audio, torch.tensor(lengths), host_lengths=lengths)
        assert found.isfinite().all()
        for row, length in enumerate(lengths):
            wave = F.pad(audio[row, :length], (0, max(0, 400 - length)))[None, :16000]
            assert_close_rel(f"clip {row}", tower(wave), found[row : row + 1], 1e-5)


def model_of(**options: Any) -> CLAP:
    torch.manual_seed(0)
    config = CLAPConfig(
        audio=AudioTowerConfig("whisper", hf_config=SIZES, **options),
        text=TextTowerConfig(width=16, layers=0, vocab_size=300),
        head=HeadConfig(kind="linear", dim=8),
    )
    return CLAP(config).eval()


@pytest.mark.parametrize("window", ["clip", "full"])
def test_chunks_are_the_mean_of_unit_vectors(window: str) -> None:
    model = model_of(window=window, chunks=True)
    lengths = [40000, 16000, 33000, 5000]
    audio, sizes = batch(lengths)
    with torch.no_grad():
        found = F.normalize(model.encode_audio(audio, sizes, host_lengths=lengths), dim=-1)
        assert_close_rel("without host lengths", found, F.normalize(model.encode_audio(audio, sizes), dim=-1), 1e-5)
        for row, length in enumerate(lengths):
            parts = [model.encode_audio(part[None]) for part in audio[row, :length].split(16000)]
            mean = torch.cat([F.normalize(part, dim=-1) for part in parts]).mean(0)
            assert_close_rel(f"clip {row}", F.normalize(mean, dim=-1), found[row], 1e-5)
    cut = model_of(window=window)
    with torch.no_grad():
        assert_close_rel("cut", cut.encode_audio(audio[:1, :16000]), cut.encode_audio(audio[:1], sizes[:1]), 1e-5)


def test_padding_and_frames_are_pooled_where_asked_for() -> None:
    tower = tower_of(pool_padding=True, frame_pooling=2).eval()
    plain, (audio, lengths) = plain_encoder(tower), batch()
    with torch.no_grad():
        found = tower(audio, lengths)
        for row, length in enumerate(LENGTHS):
            x = F.gelu(plain.conv1(features_of(audio[row, :length])))
            x = F.gelu(plain.conv2(x)).transpose(1, 2) + plain.embed_positions.weight
            for layer in plain.layers:
                x = layer(x, None)
            expected = plain.layer_norm(F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2)).mean(1)[0]
            assert_close_rel(f"clip {row}", expected, found[row], 1e-3)


def test_compiled_layers_are_whole_graphs(graphs: list[torch.fx.GraphModule]) -> None:
    tower = tower_of(window="clip", hidden_states="weighted", pooling="statistics").train()
    audio, lengths = batch()
    expected = tower(audio, lengths)
    packed = tower(audio, lengths, host_lengths=LENGTHS)
    tower.prepare_training(compile=True)
    assert_close_rel("padded", expected, tower(audio, lengths), 1e-5)
    assert_close_rel("packed", packed, tower(audio, lengths, host_lengths=LENGTHS), 1e-5)
    for sizes in ([5000, 16000, 7000], [9000, 9500], [12000, 3000, 4000, 5000, 6000]):
        audio, lengths = batch(sizes)
        tower(audio, lengths, host_lengths=sizes)
    assert 2 <= len(graphs) <= 8


def test_layers_are_dropped_as_torch_draws() -> None:
    tower = tower_of(window="clip", hf_config={"encoder_layerdrop": 0.5}).train()
    audio, lengths = batch()
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        draws = torch.rand(3).tolist()
        torch.manual_seed(seed)
        found = tower(audio, lengths)
        kept = tower_of(window="clip")
        kept.load_state_dict(tower.state_dict())
        kept.base.layers = torch.nn.ModuleList(
            layer for layer, draw in zip(kept.base.layers, draws, strict=True) if draw >= 0.5
        )
        assert_close_rel("dropped", kept(audio, lengths), found, 1e-5)
        seen.add(tuple(draw >= 0.5 for draw in draws))
    assert len(seen) > 3
    with pytest.raises(ConfigError, match="encoder_layerdrop"):
        tower_of(window="clip", hidden_states="weighted", hf_config={"encoder_layerdrop": 0.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "clip", "pool_padding": True}, "window full"),
        ({"window": "clip", "frame_pooling": 2}, "window full"),
        ({"frame_pooling": 3}, "does not divide"),
        ({"frame_pooling": 0}, "does not divide"),
        ({"frame_pooling": 2, "hidden_states": "weighted"}, "hidden_states last"),
        ({"frame_pooling": 2, "pooling": "token"}, "no token"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tower_of(**options)


def test_a_frozen_encoder_learns_the_weights_of_its_layers() -> None:
    model = model_of(window="clip", hidden_states="weighted", pooling="statistics", freeze=True).train()
    audio, lengths = batch()
    model.encode_audio(audio, lengths, host_lengths=LENGTHS).square().sum().backward()
    trains = [name for name, p in model.audio_branch.named_parameters() if p.requires_grad]
    assert trains == ["pooling.layer_weights"]
    gradient = model.audio_branch.pooling.layer_weights.grad
    assert gradient is not None and gradient.any()
    assert not model.audio_branch.training
    summary = model.audio_branch.summarize(audio, lengths)
    assert_close_rel("in two parts", model.encode_audio(audio, lengths), model.encode_audio(summary=summary), 1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_under_autocast_it_is_the_same_to_bfloat16(pooling: str) -> None:
    """Packed and padded, value and gradients; what is pooled is float32, as torch's own LayerNorm would give it."""
    tower = tower_of(window="clip", pooling=pooling, hidden_states="weighted").train()
    audio, lengths = batch()
    direction = torch.randn(4, tower.width)
    found = {}
    for precise in (True, False):
        tower.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            packed = tower(audio, lengths, host_lengths=LENGTHS)
            padded = tower(audio, lengths)
        assert packed.dtype == torch.float32
        (packed * direction).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in tower.parameters() if p.grad is not None])
        found[precise] = packed.detach(), padded.detach(), gradient
    for name, exact, low in zip(("packed", "padded", "gradient"), found[True], found[False], strict=True):
        assert_close_rel(name, exact, low, 3e-2)
