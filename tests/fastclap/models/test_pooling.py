"""Pooling over time and layers: by the definition, and in every tower of transformers, alone, padded and packed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import ConfigError
from fastclap.models.audio_towers import build_audio_tower
from fastclap.models.clap import CLAP
from fastclap.models.layers import length_mask
from fastclap.models.pooling import Pooling
from fastclap.models.text_towers import build_text_tower
from fastclap.testing import assert_close_rel

AST: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
AST |= {"max_length": 128, "num_mel_bins": 32}
HTSAT: dict[str, Any] = {"patch_embeds_hidden_size": 4, "hidden_size": 8, "depths": [1, 1]}
HTSAT |= {"num_attention_heads": [1, 2], "spec_size": 256}
WAV: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
WAV |= {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0}
WAV |= {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "apply_spec_augment": False}
BERT: dict[str, Any] = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 16, "vocab_size": 50}
KINDS = ["mean", "statistics", "attention"]


def over_time(x: Tensor, kind: str, scores: Tensor | None) -> Tensor:
    """One state [T, C] of one clip, by the definition."""
    if kind == "mean":
        return x.mean(0)
    if kind == "statistics":
        return torch.cat([x.mean(0), (x.var(0, correction=0) + 1e-5).sqrt()])
    assert scores is not None
    return (x @ scores).softmax(0) @ x


@pytest.mark.parametrize("over_layers", ["last", "weighted", "concatenated"])
@pytest.mark.parametrize("kind", [*KINDS, "first"])
def test_by_hand(kind: Any, over_layers: Any) -> None:
    """Values, and gradients of states and parameters, in float64; padding holds NaN where it is masked."""
    states = [torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    pooling = Pooling(kind, over_layers, 5, 4).double()
    for parameter in pooling.parameters():
        parameter.data.normal_()
    sizes = [7, 3, 5]
    valid = length_mask(torch.tensor(sizes), 7)
    used = states if pooling.every_state else states[-1:]
    poisoned = [torch.where(valid[..., None], state, math.nan) for state in used]
    found = pooling.combine(torch.stack([pooling.pool(x, valid, n) for n, x in enumerate(poisoned)], 1))
    assert found.shape == (3, pooling.width) and found.dtype == torch.float64
    rows = []
    for row, size in enumerate(sizes):
        scores = pooling.attention
        each = [
            x[row, 0] if kind == "first" else over_time(x[row, :size], kind, None if scores is None else scores[n])
            for n, x in enumerate(used)
        ]
        weights = pooling.layer_weights
        rows.append(torch.cat(each) if weights is None else weights.softmax(0) @ torch.stack(each))
    expected = torch.stack(rows)
    assert_close_rel("value", expected, found, 1e-12)
    inputs = [*used, *pooling.parameters()]
    direction = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((y * direction).sum(), inputs) for y in (found, expected))
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert_close_rel(f"gradient {number}", other, mine, 1e-10)


def test_all_positions_and_half_precision() -> None:
    x = torch.randn(2, 6, 5)
    for kind in (*KINDS, "first"):
        pooling = Pooling(kind, "last", 5, 1)  # type: ignore[arg-type]
        every = torch.ones(2, 6, dtype=torch.bool)
        assert_close_rel(kind, pooling.pool(x, every), pooling.pool(x, None), 1e-6)
        assert pooling.pool(x.bfloat16(), None).dtype == torch.float32


# -- towers -----------------------------------------------------------------------------------------------------------

AUDIO: dict[str, dict[str, Any]] = {
    "wavlm": {"kind": "wav2vec2", "hf_config": {"model_type": "wavlm", **WAV}},
    "hubert": {"kind": "wav2vec2", "hf_config": {"model_type": "hubert", **WAV}},
    "ast": {"kind": "ast", "hf_config": AST},
    "ast, clip": {"kind": "ast", "hf_config": AST, "window": "clip"},
}
LENGTHS = [9000, 4321, 7000]


def audio_tower(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    tower: Any = build_audio_tower(AudioTowerConfig(**{**AUDIO[name], **options}))
    for parameter in tower.pooling.parameters():
        parameter.data.normal_()
    return tower.eval()


def clips(lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    audio = torch.full((len(lengths), max(lengths)), math.nan)
    for row, length in enumerate(lengths):
        audio[row, :length] = 0.1 * torch.randn(length)
    return audio, torch.tensor(lengths)


@pytest.mark.parametrize("hidden_states", ["last", "weighted", "concatenated"])
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("name", AUDIO)
def test_a_clip_is_the_same_alone_padded_and_packed(name: str, kind: Any, hidden_states: Any) -> None:
    tower = audio_tower(name, pooling=kind, hidden_states=hidden_states)
    audio, lengths = clips()
    with torch.no_grad():
        alone = torch.cat([tower(audio[row : row + 1, :length]) for row, length in enumerate(LENGTHS)])
        assert alone.shape == (3, tower.width)
        assert_close_rel("padded", alone, tower(audio, lengths), 2e-5)
        assert_close_rel("with host lengths", alone, tower(audio, lengths, host_lengths=LENGTHS), 2e-5)


@pytest.mark.parametrize("hidden_states", ["last", "concatenated"])
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("window", ["full", "clip"])
def test_ast_pools_its_patches(window: str, kind: Any, hidden_states: Any) -> None:
    """Of the whole window transformers' own states; of a clip alone those of a model whose window is as long."""
    from transformers import ASTConfig, ASTModel

    tower = audio_tower("ast", pooling=kind, hidden_states=hidden_states, window=window)
    audio, _ = clips()
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            features, _ = tower.log_mel(audio[row : row + 1, :length])
            plain = ASTModel(ASTConfig(**{**AST, "max_length": features.shape[1]})).eval()
            weights = dict(tower.base.state_dict())
            table, name = weights["embeddings.position_embeddings"], "embeddings.position_embeddings"
            bands, columns = 2, (features.shape[1] - 16) // 10 + 1
            grid = table[:, 2:].reshape(1, bands, -1, 16)[:, :, :columns].reshape(1, -1, 16)
            weights[name] = torch.cat([table[:, :2], grid], 1)
            plain.load_state_dict(weights)
            states = [plain.embeddings(features)]
            for layer in plain.layers:
                states.append(layer(states[-1]))
            states[-1] = plain.layernorm(states[-1])
            used = states if hidden_states == "concatenated" else states[-1:]
            scores = tower.pooling.attention
            expected = torch.cat(
                [
                    x[0, :2].mean(0)
                    if kind is None
                    else over_time(x[0, 2:], kind, None if scores is None else scores[n % len(scores)])
                    for n, x in enumerate(used)
                ]
            )
            assert_close_rel(f"clip {row}", expected, tower(audio[row : row + 1, :length])[0], 1e-5)


def test_ast_trains_compiled_and_with_checkpoints() -> None:
    gradients = []
    for options in ({}, {"checkpoint": True}):
        tower = audio_tower("ast, clip", pooling="statistics", hidden_states="weighted").train()
        tower.prepare_training(**options)
        audio, lengths = clips()
        tower(audio, lengths, host_lengths=LENGTHS).square().sum().backward()
        gradients.append({name: p.grad for name, p in tower.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name


def test_compiled_ast_layers_are_whole_graphs(graphs: list[torch.fx.GraphModule]) -> None:
    tower = audio_tower("ast, clip", pooling="mean").train()
    audio, lengths = clips()
    torch.manual_seed(0)
    expected = tower.eval()(audio, lengths)
    tower.train().prepare_training(compile=True)
    for module in tower.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert_close_rel("compiled", expected, tower(audio, lengths), 1e-5)
    assert graphs


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_htsat_pools_its_last_grid(kind: Any) -> None:
    torch.manual_seed(0)
    tower: Any = build_audio_tower(AudioTowerConfig("clap-htsat", hf_config=HTSAT, pooling=kind)).eval()
    for parameter in tower.pooling.parameters():
        parameter.data.normal_()
    wave = 0.1 * torch.randn(1, 480_000)
    with torch.no_grad():
        out = tower.base(tower.log_mel(wave)[0][:, None])
        states = out.last_hidden_state[0].flatten(1).T
        scores = tower.pooling.attention
        expected = over_time(states, kind or "mean", None if scores is None else scores[0])
        assert_close_rel("pooled", expected, tower(wave)[0], 1e-5)
        if kind in (None, "mean"):
            assert_close_rel("its own", out.pooler_output[0], tower(wave)[0], 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**AUDIO["wavlm"], "pooling": "token"}, "knows positions from distances"),
        ({**AUDIO["ast"], "pooling": "token"}, "class tokens of its own"),
        ({"kind": "clap-htsat", "hf_config": HTSAT, "pooling": "token"}, "square image"),
        ({"kind": "clap-htsat", "hf_config": HTSAT, "window": "clip"}, "square image"),
        ({"kind": "clap-htsat", "hf_config": HTSAT, "hidden_states": "weighted"}, "square image"),
        ({"kind": "log-mel", "pooling": "token"}, "log-mel tower pools its last layer"),
        ({"kind": "log-mel", "hidden_states": "weighted"}, "log-mel tower pools its last layer"),
    ],
)
def test_impossible_audio_pooling(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_audio_tower(AudioTowerConfig(**options))


@pytest.mark.parametrize("hidden_states", ["last", "weighted", "concatenated"])
@pytest.mark.parametrize("pooling", ["cls", *KINDS])
@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta", "distilbert"])
def test_text_by_hand(model_type: str, pooling: Any, hidden_states: Any) -> None:
    torch.manual_seed(0)
    hf_config = {**BERT, "model_type": model_type, "pad_token_id": 0}
    if model_type == "distilbert":
        hf_config |= {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}
    config = TextTowerConfig("hf", hf_config=hf_config, pooling=pooling, hidden_states=hidden_states)
    tower: Any = build_text_tower(config).eval()
    for parameter in tower.pooling.parameters():
        parameter.data.normal_()
    counts = [6, 2, 5, 1]
    ids, mask = torch.randint(3, 50, (4, 6)), length_mask(torch.tensor(counts), 6).long()
    ids = ids * mask
    rows = []
    with torch.no_grad():
        for row, count in enumerate(counts):
            out = tower.base(input_ids=ids[row : row + 1, :count], output_hidden_states=True)
            states = [*out.hidden_states[:-1], out.last_hidden_state]
            used = states[-1:] if hidden_states == "last" else states
            scores = tower.pooling.attention
            each = [
                x[0, 0] if pooling == "cls" else over_time(x[0], pooling, None if scores is None else scores[n])
                for n, x in enumerate(used)
            ]
            weights = tower.pooling.layer_weights
            rows.append(torch.cat(each) if weights is None else weights.softmax(0) @ torch.stack(each))
        expected = torch.stack(rows)
        assert_close_rel("padded", expected, tower(ids, mask), 1e-5)
        assert_close_rel("packed or grouped", expected, tower(ids, mask, counts), 1e-5)


# -- freezing and files -----------------------------------------------------------------------------------------------


def clap_of(text: TextTowerConfig | None = None, **audio: Any) -> CLAP:
    torch.manual_seed(0)
    text = text or TextTowerConfig(width=16, layers=0, vocab_size=300)
    return CLAP(CLAPConfig(audio=AudioTowerConfig(**audio), text=text, head=HeadConfig("linear", dim=8)))


def test_what_is_learned_before_the_summary_is_not_learned_by_a_frozen_tower(tmp_path: Path) -> None:
    from transformers import ASTConfig, ASTModel

    folder = tmp_path / "ast"
    ASTModel(ASTConfig(**AST)).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"audio\.pooling attention.*frozen"):
        clap_of(kind="ast", pretrained=str(folder), pooling="attention", freeze=True)
    model = clap_of(kind="ast", hf_config=AST, pooling="attention", freeze=True)  # it may have been learned before
    assert not any(p.requires_grad for p in model.audio_branch.parameters())
    text = TextTowerConfig("hf", hf_config=BERT, hidden_states="weighted", freeze=True)
    model = clap_of(text, kind="ast", hf_config=AST, hidden_states="weighted", freeze=True)
    trains = [name for name, p in model.named_parameters() if p.requires_grad and "branch" in name]
    assert trains == ["audio_branch.pooling.layer_weights", "text_branch.pooling.layer_weights"]


@pytest.mark.parametrize(
    ("audio", "names"),
    [
        ({**AUDIO["wavlm"], "hidden_states": "weighted"}, {"pooling.layer_weights": "layer_weights"}),
        ({"width": 16, "layers": 1, "heads": 2, "pooling": "attention"}, {"pooling.attention": "attention.weight"}),
        ({"width": 16, "layers": 1, "heads": 2}, {}),
        (AUDIO["ast"], {}),
    ],
)
def test_models_of_format_version_1_are_read(audio: dict[str, Any], names: dict[str, str], tmp_path: Path) -> None:
    model = clap_of(**audio).eval()
    for name in names:
        model.audio_branch.get_parameter(name).data.normal_()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["format_version"] == 2
    config["format_version"] = 1
    for name in ("window", "chunks", "pool_padding", "frame_pooling"):
        del config["audio"][name]
    config["audio"]["layer_weights"] = config["audio"].pop("hidden_states") == "weighted"
    config["audio"]["pooling"] = config["audio"]["pooling"] or "statistics"
    del config["text"]["hidden_states"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for new, old in names.items():
        weights[f"audio_branch.{old}"] = weights.pop(f"audio_branch.{new}")
        if old == "attention.weight":
            weights["audio_branch.attention.bias"] = torch.ones(1)
    save_file(weights, folder / "model.safetensors")
    again = CLAP.from_pretrained(folder)
    waves = [0.1 * torch.randn(9000), 0.1 * torch.randn(7000)]
    assert torch.equal(again.embed_audio(waves), model.embed_audio(waves))
    assert F.cosine_similarity(*again.embed_audio(waves), dim=0) < 1
