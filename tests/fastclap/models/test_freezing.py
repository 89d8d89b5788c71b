"""Frozen parts of towers: nothing is kept for them, and the rest trains as it did."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import ConfigError
from fastclap.models import positional, wavlm, whisper
from fastclap.models.clap import CLAP
from fastclap.testing import assert_close_rel
from fastclap.train.config import OptimizerConfig
from fastclap.train.step import build_optimizer

LAYERS = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
SPEECH: dict[str, Any] = {
    **LAYERS,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.4,
    "mask_time_length": 3,
    "layerdrop": 0.3,
}
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
AUDIO: dict[str, AudioTowerConfig] = {
    name: AudioTowerConfig("wav2vec2", hf_config={"model_type": kind, **SPEECH, **options})
    for name, kind, options in (
        ("wavlm", "wavlm", STABLE),
        ("wavlm, norms after", "wavlm", {"feat_extract_norm": "group"}),
        ("wav2vec2", "wav2vec2", {**STABLE, "layerdrop": 0.0}),
        ("hubert, norms after", "hubert", {"feat_extract_norm": "group", "layerdrop": 0.0}),
        ("hubert, own convolutions", "hubert", {**STABLE, "feat_extract_activation": "relu", "layerdrop": 0.0}),
        ("data2vec", "data2vec-audio", {"layerdrop": 0.0, "mask_time_prob": 0.0}),
    )
}
AUDIO["wavlm, all layers"] = AudioTowerConfig(
    "wav2vec2", hf_config={"model_type": "wavlm", **SPEECH, **STABLE}, hidden_states="weighted"
)
AUDIO["log-mel"] = AudioTowerConfig(width=16, layers=3, heads=2, feature_options={"n_mels": 16})
AUDIO["whisper"] = AudioTowerConfig(
    "whisper",
    hf_config={
        "d_model": 16,
        "encoder_layers": 3,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "num_mel_bins": 80,
        "max_source_positions": 60,
        "dropout": 0.1,
    },
)
AUDIO["ast"] = AudioTowerConfig("ast", hf_config={**LAYERS, "max_length": 64, "num_mel_bins": 32})
TEXT: dict[str, TextTowerConfig] = {
    "small": TextTowerConfig(width=16, layers=3, heads=2, vocab_size=50),
    **{
        kind: TextTowerConfig("hf", hf_config={"model_type": kind, "vocab_size": 50, **options})
        for kind, options in (
            ("bert", LAYERS),
            ("xlm-roberta", LAYERS),
            ("distilbert", {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 16}),
            ("t5", {"d_model": 16, "num_layers": 3, "num_heads": 2, "d_kv": 8, "d_ff": 16}),
        )
    },
}
# by how the names of what trains begin, with one layer frozen, and what a frozen front takes away
TRAINS = {
    "wavlm": ("base.encoder.layers.1.", "base.encoder.layers.2.", "base.encoder.layer_norm."),
    "wavlm, norms after": ("base.encoder.layers.1.", "base.encoder.layers.2."),
    "log-mel": ("transformer.blocks.1.", "transformer.blocks.2.", "transformer.norm."),
    "whisper": ("base.layers.1.", "base.layers.2.", "base.layer_norm."),
    "small": ("transformer.blocks.1.", "transformer.blocks.2.", "transformer.norm."),
    "xlm-roberta": ("base.encoder.layer.1.", "base.encoder.layer.2."),
    "t5": ("base.block.1.", "base.block.2.", "base.final_layer_norm."),
}
TRAINS |= {
    "wavlm, all layers": ("pooling.layer_weights", *TRAINS["wavlm"]),
    "hubert, norms after": TRAINS["wavlm, norms after"],
}
TRAINS |= {"wav2vec2": TRAINS["wavlm"], "hubert, own convolutions": TRAINS["wavlm"], "bert": TRAINS["xlm-roberta"]}
TRAINS |= {
    "data2vec": TRAINS["wavlm, norms after"],
    "distilbert": tuple(f"base.transformer.layer.{i}." for i in (1, 2)),
}
TRAINS["ast"] = (*(f"base.{x}.{i}." for x in ("layers", "encoder.layer") for i in (1, 2)), "base.layernorm.")
FRONTS = {"log-mel": ("convolutions.",), "whisper": ("base.conv1.", "base.conv2."), "small": ("embedding.",)}
FRONTS |= {"t5": ("base.embed_tokens.",)}


@pytest.fixture(autouse=True)
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of a GPU."""
    monkeypatch.setattr(wavlm, "_use_gemms", lambda waveform, layers: True)
    monkeypatch.setattr(positional, "_use_products", lambda x: True)


def build(name: str, **freeze: Any) -> tuple[CLAP, Any]:
    """A model with the tower of this name, and the tower."""
    audio, text = AUDIO.get(name, AudioTowerConfig(width=16, layers=1, heads=2)), TEXT.get(name, TEXT["small"])
    frozen = audio if name in AUDIO else text
    torch.manual_seed(0)
    config = CLAPConfig(
        audio=AudioTowerConfig(**{**vars(audio), **(freeze if frozen is audio else {})}),
        text=TextTowerConfig(**{**vars(text), **(freeze if frozen is text else {})}),
        head=HeadConfig(dim=8),
    )
    model = CLAP(config).train()
    return model, model.audio_branch if name in AUDIO else model.text_branch


def encode(model: CLAP, name: str, seed: int = 5) -> Tensor:
    """Embeddings of the tower's side in training, with the same draws each time."""
    torch.manual_seed(seed)
    if name in AUDIO:
        generator = np.random.default_rng(0)
        audio = torch.from_numpy(generator.standard_normal((3, 8000)).astype(np.float32)) * 0.1
        return model.encode_audio(audio, torch.tensor([8000, 5000, 6500]))
    ids = torch.randint(5, 50, (4, 9), generator=torch.Generator().manual_seed(2))
    sizes = torch.tensor([9, 3, 5, 5])
    return model.encode_text(ids, (torch.arange(9) < sizes[:, None]).long(), sizes.tolist())


def front_flag(name: str) -> str:
    return "freeze_convolutions" if name in AUDIO else "freeze_embeddings"


def front_names(name: str) -> tuple[str, ...]:
    return FRONTS.get(name, ("base.feature_extractor.",) if name in AUDIO else ("base.embeddings.",))


CASES = [(name, layers) for name in (*AUDIO, *TEXT) for layers in (0, 1) if name != "ast" or layers]


@pytest.mark.parametrize(("name", "layers"), CASES)
def test_the_rest_trains_as_it_did(name: str, layers: int) -> None:
    """Same embeddings, and the gradients of all that trains, with dropout, SpecAugment and dropped layers."""
    free, whole = build(name)
    model, tower = build(name, **({"freeze_layers": layers} if layers else {front_flag(name): True}))
    trains = [n for n, p in tower.named_parameters() if p.requires_grad]
    could = [n for n, p in whole.named_parameters() if p.requires_grad]
    if layers:
        assert trains == [n for n in could if n.startswith(TRAINS[name])]
    else:
        assert trains == [n for n in could if not n.startswith(front_names(name))]
    assert 0 < len(trains) < len(could)
    expected, out = encode(free, name), encode(model, name)
    assert_close_rel("embeddings", expected.detach(), out.detach(), 1e-5)
    expected.square().sum().backward()
    out.square().sum().backward()
    everything = dict(free.named_parameters())
    seen = 0
    scale = max(float(p.grad.norm()) for p in everything.values() if p.grad is not None)
    for full, parameter in model.named_parameters():
        gradient = everything[full].grad
        if not parameter.requires_grad or gradient is None:
            assert parameter.grad is None, full
        else:
            assert parameter.grad is not None
            assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * scale, full
            seen += 1
    assert seen > 4


@pytest.mark.parametrize(("name", "layers"), CASES)
def test_nothing_is_kept_of_a_frozen_part(name: str, layers: int) -> None:
    assert kept_at_first(name, layers, {"freeze_layers": 1} if layers else {front_flag(name): True}) == 0
    assert kept_at_first(name, layers, {}) > 0


def kept_at_first(name: str, layers: int, flags: dict[str, Any]) -> int:
    """How many tensors autograd saves before the first layers are done, or, of no layers, the front."""
    model, tower = build(name, **flags)
    if layers or name == "whisper" or name in TEXT:
        first = tower.stages().layers[layers]
    else:
        first = tower.input if name == "log-mel" else tower.base.feature_projection
    begun, saved = False, 0

    def begin(*_: Any) -> None:
        nonlocal begun
        begun = True

    def keep(x: Tensor) -> Tensor:
        nonlocal saved
        saved += not begun
        return x

    def residual_layer_norm(x: Tensor, branch: Any, bias: Any, weight: Tensor, *others: Any, **options: Any) -> Any:
        if weight is norm.weight:  # the first of the layer to be computed
            begin()
        return plain(x, branch, bias, weight, *others, **options)

    norm = first.self_attn_layer_norm if name == "whisper" else getattr(first, "layer_norm", None)
    plain = wavlm.residual_layer_norm
    first.register_forward_pre_hook(begin)
    for seed in range(20):  # LayerDrop may drop it
        saved = 0
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        patches = [mock.patch.object(module, "residual_layer_norm", residual_layer_norm) for module in (wavlm, whisper)]
        with hooks, patches[0], patches[1]:
            assert encode(model, name, seed).requires_grad
        if begun:
            return saved
    raise AssertionError("the layer never ran")


# in the middle of each tower: one part of its second layer, and all parts of this name
MIDDLE = {
    "wavlm": ("base.encoder.layers.1.attention", "base.encoder.layers.*.feed_forward.intermediate_dense"),
    "wav2vec2": ("base.encoder.layers.1", "base.encoder.layers.*.final_layer_norm"),
    "hubert, own convolutions": ("base.encoder.layers.1.feed_forward", "base.feature_extractor.conv_layers.[1-3]"),
    "data2vec": ("base.encoder.layers.1", "base.feature_projection"),
    "log-mel": ("transformer.blocks.1", "convolutions.1"),
    "whisper": ("base.layers.1.self_attn", "base.layers.[0-1].fc?"),
    "ast": ("base.layers.1", "*.layernorm_before"),
    "small": ("transformer.blocks.1", "transformer.blocks.*.qkv"),
    "bert": ("base.encoder.layer.1.attention", "base.encoder.layer.[01].output"),
    "distilbert": ("base.transformer.layer.1", "*.ffn"),
    "t5": ("base.block.1", "*.SelfAttention"),
}
MIDDLE |= {"wavlm, norms after": MIDDLE["wavlm"], "wavlm, all layers": MIDDLE["wavlm"]}
MIDDLE |= {"hubert, norms after": MIDDLE["wav2vec2"], "xlm-roberta": MIDDLE["bert"]}


@pytest.mark.parametrize("name", [*AUDIO, *TEXT])
@pytest.mark.parametrize("which", [0, 1])
def test_through_a_frozen_module_in_the_middle_gradients_flow(name: str, which: int) -> None:
    """With dropout, SpecAugment and dropped layers as they were, what trains has the gradients that it had."""
    free, whole = build(name)
    pattern = MIDDLE[name][which]
    model, tower = build(name, freeze_modules=[pattern])
    # the pattern of a shell as a regular expression
    expression = re.compile(pattern.replace(".", r"\.").replace("*", ".*").replace("?", ".") + r"\..*")
    could = {n for n, p in whole.named_parameters() if p.requires_grad}
    frozen = {n for n, p in tower.named_parameters() if not p.requires_grad} & could
    assert frozen == {n for n in could if expression.fullmatch(n)} and 0 < len(frozen) < len(could)
    assert all(module.training for module in tower.modules())
    expected, out = encode(free, name), encode(model, name)
    assert_close_rel("embeddings", expected.detach(), out.detach(), 1e-6)
    expected.square().sum().backward()
    out.square().sum().backward()
    gradients = {n: p.grad for n, p in whole.named_parameters()}
    scale = max(float(gradient.norm()) for gradient in gradients.values() if gradient is not None)
    earlier = 0
    for key, parameter in tower.named_parameters():
        if key in frozen or gradients[key] is None:
            assert parameter.grad is None, key
        else:
            assert (parameter.grad - gradients[key]).norm() <= 1e-5 * gradients[key].norm() + 1e-6 * scale, key
            earlier += bool(parameter.grad.any())
    assert earlier > 4


def test_modules_that_there_are_none_of() -> None:
    for name, pattern, near in (
        ("wavlm", "base.encoder.layer.0", r"base\.encoder\.layers\.0"),
        ("bert", "base.embedings", r"base\.embeddings"),
        ("small", "transformer.blocks.[7-9]", r"transformer\.blocks"),
        ("small", "embedding_dropout", "embedding"),  # has no parameters
        ("small", "", "embedding"),
    ):
        side = "audio" if name in AUDIO else "text"
        with pytest.raises(ConfigError, match=rf"{side}\.freeze_modules: '.*' matches no module .*near: .*{near}"):
            build(name, freeze_modules=["*", pattern])


@pytest.mark.parametrize("name", ["wavlm", "hubert, own convolutions", "bert"])
@pytest.mark.parametrize("flags", [{"freeze": True}, {"freeze_layers": 2}, {"freeze_modules": ["base.encoder"]}])
def test_what_was_frozen_can_train(name: str, flags: dict[str, Any]) -> None:
    """Set free, a model is one that was never frozen: same gradients, same mode; and it can be frozen again."""
    free, whole = build(name)
    model, tower = build(name, **flags)
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    assert model.has_frozen_parts and not free.has_frozen_parts and model.config != free.config
    twin = copy.deepcopy(model)
    model.eval()
    model.set_frozen(False)
    assert {n for n, p in twin.named_parameters() if p.requires_grad} == before
    twin.set_frozen(False)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in free.parameters()]
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.train().modules())
    expected, out = encode(free, name), encode(model, name)
    assert torch.equal(expected, out)
    expected.square().sum().backward()
    out.square().sum().backward()
    everything = dict(whole.named_parameters())
    for key, parameter in tower.named_parameters():
        assert parameter.requires_grad == everything[key].requires_grad
        assert (parameter.grad is None) == (everything[key].grad is None), key
        assert parameter.grad is None or torch.equal(parameter.grad, everything[key].grad), key
    model.set_frozen(True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before
    assert tower.training == (not flags.get("freeze", False)) and model.training
    if name.startswith("hubert"):  # transformers' own convolutions ask for the waveform's gradient
        assert tower.base.feature_extractor._requires_grad == (flags == {"freeze_modules": ["base.encoder"]})


def test_the_mask_of_specaugment_trains_if_it_can() -> None:
    for flags, trains in (({}, True), ({"freeze_convolutions": True}, True), ({"freeze_layers": 1}, False)):
        model, tower = build("wavlm", **flags)
        encode(model, "wavlm").square().sum().backward()
        assert tower.base.masked_spec_embed.requires_grad == trains
        assert (tower.base.masked_spec_embed.grad is not None) == trains


def test_a_frozen_part_stays_in_training_mode_and_a_frozen_tower_does_not() -> None:
    _, tower = build("wavlm", freeze_layers=2, freeze_convolutions=True)
    assert all(module.training for module in tower.modules())
    model, tower = build("wavlm", freeze_layers=2, freeze=True)
    assert not any(module.training for module in model.train().audio_branch.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())


@pytest.mark.parametrize("name", ["wavlm", "wav2vec2", "bert"])
def test_checkpointing_leaves_frozen_layers_alone(name: str) -> None:
    model, tower = build(name, freeze_layers=1)
    if name in AUDIO:
        tower.base.config.layerdrop = tower.base.encoder.layerdrop = 0.0
    encode(model, name).square().sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    tower.prepare_training(checkpoint=True)
    calls = [0] * 3
    for index, layer in enumerate(tower.stages().layers):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    encode(model, name).square().sum().backward()
    assert calls[0] == 1 and (name != "wavlm" or calls == [1, 2, 2])
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient)


def test_frozen_convolutions_of_a_cpu_take_some_frames_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tower = build("wavlm", freeze_convolutions=True)
    expected = encode(model, "wavlm").detach()
    monkeypatch.setattr(wavlm, "FRAMES_AT_ONCE", 12)
    calls = []
    compute = tower.base.feature_extractor._features_by_gemms
    monkeypatch.setattr(tower.base.feature_extractor, "_features_by_gemms", lambda x: calls.append(1) or compute(x))
    out = encode(model, "wavlm")
    assert len(calls) == 6 and out.requires_grad  # 24 frames, four of each of three clips at a time
    assert_close_rel("embeddings", expected, out.detach(), 1e-5)


def test_the_optimizer_has_no_frozen_parameter() -> None:
    model, _ = build("wavlm", freeze_layers=1)
    optimizer = build_optimizer(model, OptimizerConfig())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert id(model.audio_branch.base.encoder.layers[0].attention.q_proj.weight) not in held


def test_an_export_keeps_the_flags(tmp_path: Path) -> None:
    model, _ = build("bert", freeze_layers=2, freeze_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    read = CLAP.from_pretrained(tmp_path / "model")
    assert read.config == model.config and read.config.text.freeze_layers == 2
    trains = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (read, model)]
    assert trains[0] == trains[1] and not any(".layer.1." in n for n in trains[0])
    with torch.no_grad():
        assert torch.equal(encode(read.eval(), "bert"), encode(model.eval(), "bert"))


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("wavlm", {"freeze_layers": 4}, r"audio\.freeze_layers is 4, but the tower has 3 layers; give 0 to 3"),
        ("log-mel", {"freeze_layers": -1}, r"audio\.freeze_layers is -1"),
        ("bert", {"freeze_layers": 9}, r"text\.freeze_layers is 9, but the tower has 3"),
        ("small", {"freeze_layers": 4}, r"text\.freeze_layers is 4"),
        ("ast", {"freeze_convolutions": True}, r"audio\.freeze_convolutions: this ast tower has no such part"),
        (
            "log-mel",
            {"freeze_convolutions": True, "subsampling": 1},
            r"audio\.freeze_convolutions: this log-mel tower",
        ),
        (
            "wavlm",
            {"freeze_layers": 1, "hf_config": {"model_type": "sew", **LAYERS, "conv_dim": [8] * 13}},
            r"audio\.freeze_layers: a tower of this kind \(wav2vec2\) has no layers that are known; set it to 0",
        ),
        (
            "bert",
            {"freeze_layers": 1, "hf_config": {"model_type": "albert", "vocab_size": 50, **LAYERS}},
            r"text\.freeze_layers: .*no layers that are known",
        ),
    ],
)
def test_parts_that_a_tower_lacks(name: str, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, **flags)
