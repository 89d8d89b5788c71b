"""LoRA: adapters that no fast path passes by, and plain models that come of them."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import ConfigError, MissingPackageError
from fastclap.models import positional, wavlm
from fastclap.models.clap import CLAP
from fastclap.models.lora import is_adapter, merged
from fastclap.testing import assert_close_rel
from tests.fastclap.models.test_freezing import AUDIO, LAYERS, SPEECH, STABLE, TEXT, build, encode

pytest.importorskip("peft")
ADAPTED = [*(name for name in AUDIO if name != "log-mel"), *(name for name in TEXT if name != "small")]


@pytest.fixture(autouse=True)
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of a GPU."""
    monkeypatch.setattr(wavlm, "_use_gemms", lambda waveform, layers: True)
    monkeypatch.setattr(positional, "_use_products", lambda x: True)


def adapted(name: str, **options: Any) -> tuple[CLAP, Any]:
    """A model with adapters that do something, and the tower; layers are not dropped."""
    model, tower = build(name, **{"lora_rank": 3, "lora_alpha": 7.0, **options})
    for module in tower.modules():
        if isinstance(getattr(module, "layerdrop", None), float):
            module.layerdrop = 0.0
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in tower.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.2)
    return model, tower


def by_itself(key: str) -> str:
    """A parameter's name without adapters."""
    return key.replace(".base_layer.", ".")


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_is_a_change_of_the_weight(name: str) -> None:
    """Outputs, and the gradients of everything that trains, are those of a plain model with W + (alpha/rank)·B·A.

    The plain model computes the sums in its graph, so its gradients reach A and B; WavLM's is the accelerated one, of
    which other tests know that it is transformers'. In float64, as the gradients of such small towers cancel.
    """
    model, plain = adapted(name)[0].double(), build(name)[0].double()
    for module in plain.modules():
        if isinstance(getattr(module, "layerdrop", None), float):
            module.layerdrop = 0.0
    weights = {
        key: value.detach().clone().requires_grad_()
        for key, value in model.state_dict().items()
        if value.is_floating_point()
    }
    others = {key: value for key, value in model.state_dict().items() if not value.is_floating_point()}
    sums: dict[str, Tensor] = dict(others)
    for key, value in weights.items():
        if is_adapter(key):
            continue
        layer = key.removesuffix(".base_layer.weight")
        if layer != key:
            value = (
                value + 7.0 / 3 * weights[f"{layer}.lora_B.default.weight"] @ weights[f"{layer}.lora_A.default.weight"]
            )
        sums[by_itself(key)] = value
    assert sums.keys() == plain.state_dict().keys()
    changed = {key for key in model.state_dict() if "lora_B" in key}
    assert len(changed) >= 18
    for train in (False, True):
        model.zero_grad()
        for value in weights.values():
            value.grad = None
        model.train(train)
        plain.train(train)
        out = encode(model, name)
        with CallWith(plain, sums):
            expected = encode(plain, name)
        assert_close_rel("embeddings", expected.detach(), out.detach(), 1e-5)
        out.square().sum().backward()
        expected.square().sum().backward(retain_graph=True)
        scale = max(float(value.grad.norm()) for value in weights.values() if value.grad is not None)
        seen = set()
        for key, parameter in model.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None, key
            elif parameter.grad is not None:
                error = (parameter.grad - weights[key].grad).norm()
                assert error <= 1e-4 * weights[key].grad.norm() + 1e-6 * scale, key
                seen.add(key)
        assert changed <= seen and {key.replace("lora_B", "lora_A") for key in changed} <= seen
        assert all(float(dict(model.named_parameters())[key].grad.norm()) > 0 for key in changed)


class CallWith:
    """Within, a module computes with these tensors instead of its own parameters and buffers."""

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        self._context = torch.nn.utils.stateless._reparametrize_module(module, tensors)

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def test_transformers_with_the_same_adapters() -> None:
    """HuBERT of transformers, called plainly with our adapters in it; those of WavLM's attention it would ignore."""
    _, tower = adapted("hubert, norms after")
    tower.eval()
    audio = torch.randn(2, 8000)
    expected = copy.deepcopy(tower.base)(audio).last_hidden_state.mean(1)
    tower.normalize = False
    assert_close_rel("means", expected, tower(audio), 1e-5)


@pytest.mark.parametrize("name", ["wavlm", "wavlm, norms after", "wav2vec2", "whisper", "bert"])
def test_dropout_of_the_adapters(name: str) -> None:
    """It is on in training alone, and falls on what enters the adapter and on nothing else."""
    model, tower = adapted(name, lora_dropout=0.5)
    without, _ = adapted(name)
    seen = []
    for module in tower.modules():
        if "lora_dropout" in dict(module.named_children()):
            module.lora_dropout["default"].register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    model.eval(), without.eval()
    assert torch.equal(encode(model, name), encode(without, name))
    assert all(torch.equal(before, after) for before, after in seen)
    seen.clear()
    model.train()
    encode(model, name)
    adapters = sum("lora_A" in key for key, _ in model.named_parameters())
    assert len(seen) == adapters
    for before, after in seen:
        kept = after != 0
        assert 0.3 < kept.float().mean() < 0.7 and torch.equal(after[kept], 2 * before[kept])


@pytest.mark.parametrize("name", ADAPTED)
def test_what_trains(name: str) -> None:
    """The adapters in place of the layers that they adapt; the rest as the freeze options say."""
    _, whole = build(name)
    could = {key for key, p in whole.named_parameters() if p.requires_grad}
    _, tower = adapted(name)
    trains = {key for key, p in tower.named_parameters() if p.requires_grad}
    fixed = {by_itself(key) for key, p in tower.named_parameters() if ".base_layer." in key}
    assert {key for key in trains if not is_adapter(key)} == could - fixed and fixed < could
    layers = len(whole.stages().layers)
    adapters = {key for key in trains if is_adapter(key)}
    assert (
        len(adapters)
        == sum(is_adapter(key) for key, _ in tower.named_parameters())
        == 2 * len([k for k in fixed if k.endswith("weight")])
    )
    for index in range(layers):  # six of each layer, of WavLM the gates too
        own = {id(p) for p in tower.stages().layers[index].parameters()}
        assert sum(id(p) in own for key, p in tower.named_parameters() if is_adapter(key)) >= 12
    _, alone = adapted(name, freeze_modules=["*"])
    assert {key for key, p in alone.named_parameters() if p.requires_grad} == adapters
    model, part = adapted(name, freeze_layers=1)
    first = [key for key, p in part.stages().layers[0].named_parameters() if p.requires_grad or is_adapter(key)]
    assert not first
    model.set_frozen(False)  # what LoRA adapts stays fixed
    assert not any(p.requires_grad for key, p in part.named_parameters() if ".base_layer." in key)
    assert all(p.requires_grad for p in part.stages().layers[0].parameters())


def test_targets_by_name() -> None:
    for name, targets, number in (
        ("wavlm", ["q_proj", "v_proj"], 6),
        ("wavlm", ["base.encoder.layers.[12].attention.*_proj", "projection"], 9),
        ("bert", ["query", "layer.0.*.value"], 4),
        ("bert", ["intermediate.dense"], 3),
        ("whisper", ["fc?"], 6),
        ("wavlm", ["gru_rel_pos_linear"], 3),
    ):
        model, tower = adapted(name, lora_targets=targets)
        assert sum("lora_A" in key for key, _ in tower.named_parameters()) == number, targets
        encode(model, name).square().sum().backward()
        assert all(p.grad.any() for key, p in tower.named_parameters() if is_adapter(key)), targets


def test_adapters_begin_at_nothing_and_merged_output_is_the_adapted_one(tmp_path: Path) -> None:
    for name in ADAPTED:
        free, _ = build(name)
        fresh, _ = build(name, lora_rank=3)
        assert torch.equal(encode(fresh.eval(), name), encode(free.eval(), name))
        model, _ = adapted(name, freeze_layers=1, freeze_modules=["base"])
        model.eval().save_pretrained(tmp_path / name)
        plain = CLAP.from_pretrained(tmp_path / name)
        side = "audio" if name in AUDIO else "text"
        saved = json.loads((tmp_path / name / "config.json").read_text())[side]
        assert (saved["lora_rank"], saved["lora_targets"], saved["freeze_layers"]) == (0, [], 1)
        assert not any("lora" in key or "base_layer" in key for key in plain.state_dict())
        assert type(plain.config.audio) is AudioTowerConfig and plain.state_dict().keys() == free.state_dict().keys()
        with torch.no_grad():
            expected, out = encode(model, name), encode(plain, name)
        assert_close_rel(name, expected, out, 1e-5)
        assert not torch.allclose(encode(free, name), expected, rtol=1e-3)
        assert sum(p.numel() for p in plain.parameters()) == model.facts.parameters == plain.facts.parameters


def test_merging_rounds_once() -> None:
    """Against float64, and against peft's own merging."""
    model, tower = adapted("wavlm")
    expected = {}
    for key, value in model.state_dict().items():
        layer = key.removesuffix(".base_layer.weight")
        if layer != key:
            a, b = (model.state_dict()[f"{layer}.lora_{x}.default.weight"].double() for x in "AB")
            expected[f"{layer}.weight"] = (value.double() + (b @ a) * (7 / 3)).float()
    found = merged(model.state_dict(), model.config)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    untouched = {by_itself(key): value for key, value in model.state_dict().items() if not is_adapter(key)}
    assert found.keys() == untouched.keys()
    assert all(found[key].data_ptr() == untouched[key].data_ptr() for key in found.keys() - expected.keys())
    for module in tower.modules():
        if hasattr(module, "merge"):
            module.merge()
    for key, value in model.state_dict().items():
        if key.endswith(".base_layer.weight"):
            assert_close_rel(key, expected[by_itself(key)], value, 1e-6)
    free = build("wavlm")[0]
    assert merged(free.state_dict(), free.config).keys() == free.state_dict().keys()


def test_a_checkpoint_of_an_adapted_model_is_read_without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastclap.models.clap import uninitialized_parameters

    drawn = []
    draw = nn.init.kaiming_uniform_
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, *a, **k: drawn.append(1) or draw(tensor, *a, **k))
    state = torch.get_rng_state()
    with uninitialized_parameters():
        model, _ = build("bert", lora_rank=3)
    assert drawn and any(is_adapter(key) for key in model.state_dict())
    torch.set_rng_state(state)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("log-mel", {"lora_rank": 4}, r"audio\.lora_rank: .* a log-mel tower is trained from scratch; set it to 0"),
        ("small", {"lora_rank": 4}, r"text\.lora_rank: .* a small tower is trained from scratch"),
        ("bert", {"lora_rank": -1}, r"text\.lora_rank is -1"),
        ("bert", {"lora_rank": 2, "lora_alpha": 0.0}, r"text\.lora_alpha is 0"),
        ("bert", {"lora_rank": 2, "lora_dropout": 1.0}, r"text\.lora_dropout is 1"),
        ("bert", {"lora_targets": ["query"]}, r"text\.lora_targets needs text\.lora_rank"),
        ("bert", {"lora_rank": 2, "freeze": True}, r"text\.lora_rank: freeze keeps .*freeze_modules to \*"),
        (
            "bert",
            {"lora_rank": 2, "freeze_layers": 3},
            r"text\.lora_targets: .*no layers that are known and not frozen",
        ),
        ("bert", {"lora_rank": 99}, r"text\.lora_targets: .*larger than adapters of rank 99"),
        (
            "bert",
            {"lora_rank": 2, "lora_targets": ["q_proj"]},
            r"text\.lora_targets: 'q_proj' matches no module .*near:",
        ),
        ("bert", {"lora_rank": 2, "lora_targets": ["pooler.dense"]}, r"'pooler\.dense' matches no module"),  # unused
        (
            "wavlm",
            {"lora_rank": 2, "hf_config": {"model_type": "wavlm", **SPEECH, **STABLE, "attn_implementation": "eager"}},
            r"audio\.lora_targets: transformers' own WavLM.*leave attn_implementation",
        ),
        (
            "bert",
            {"lora_rank": 2, "hf_config": {"model_type": "albert", "vocab_size": 50, **LAYERS}},
            r"text\.lora_targets: .*no layers that are known",
        ),
    ],
)
def test_impossible_adapters(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, **options)


def test_transformers_own_wavlm_takes_the_adapters_that_it_does_not_pass_by() -> None:
    own = {"model_type": "wavlm", **SPEECH, **STABLE, "attn_implementation": "eager", "layerdrop": 0.0}
    model, tower = adapted("wavlm", hf_config=own, lora_targets=["*_dense"])
    assert not isinstance(tower.base.encoder, wavlm.Encoder)
    encode(model, "wavlm").square().sum().backward()
    assert all(p.grad.any() for key, p in tower.named_parameters() if is_adapter(key))


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"LoRA needs peft .*pip install peft"):
        build("bert", lora_rank=2)
    build("bert")


@pytest.mark.parametrize("name", ["wavlm", "bert"])
def test_computed_again_and_under_autocast(name: str) -> None:
    model, tower = adapted(name, freeze_modules=["*"])
    reference = copy.deepcopy(model)
    tower.prepare_training(checkpoint=True)
    encode(reference, name).square().sum().backward()
    encode(model, name).square().sum().backward()
    for (key, expected), parameter in zip(reference.named_parameters(), model.parameters(), strict=True):
        assert (expected.grad is None) == (parameter.grad is None), key
        if expected.grad is not None:
            assert_close_rel(key, expected.grad, parameter.grad, 1e-6)
    seen = []
    for module in tower.modules():
        if "lora_A" in dict(module.named_children()):
            module.lora_A["default"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = encode(model, name)
    assert_close_rel("embeddings", encode(reference, name).detach(), out.detach().float(), 0.03)
    out.float().square().sum().backward()
    assert torch.bfloat16 in seen  # not cast to float32 and back


@pytest.mark.parametrize("name", ["wavlm", "bert"])
def test_compiled_layers_with_adapters_are_whole_graphs_and_share_them(name: str) -> None:
    model, tower = adapted(name, freeze_modules=["*"])
    expected = encode(model, name).detach()
    counter = CompileCounter()
    torch.compiler.reset()
    for layer in tower.stages().layers:
        layer.compile(backend=counter, fullgraph=True, dynamic=True)
    tower.compiled = True
    for _ in range(2):
        assert_close_rel("embeddings", expected, encode(model, name).detach(), 1e-6)
        assert counter.frame_count == 2  # of the first layer, whose input needs no gradient, and of the others


# ---------------------------------------------------------------------------------------------------------------------
# real weights


def real_model(folder: Path, **options: Any) -> CLAP:
    torch.manual_seed(0)
    return CLAP(
        CLAPConfig(
            audio=AudioTowerConfig("whisper", pretrained=str(folder / "whisper-tiny.en-encoder"), **options),
            text=TextTowerConfig("hf", pretrained=str(folder / "all-MiniLM-L6-v2"), **options),
            head=HeadConfig("linear", dim=32),
        )
    )


def test_real_towers_learn_with_adapters_alone_and_merge(real_weights: Path, tmp_path: Path) -> None:
    """Whisper tiny and MiniLM: a few steps lower the loss, the export has the adapted model's embeddings."""
    options: dict[str, Any] = {"lora_rank": 4, "freeze_modules": ["*"]}
    model, free = real_model(real_weights, **options), real_model(real_weights)
    generator = np.random.default_rng(0)
    audio = (
        torch.from_numpy(generator.standard_normal((4, 16000)).astype(np.float32))
        * torch.tensor([0.3, 0.1, 0.03, 0.01])[:, None]
    )
    captions = ["A loud noise.", "Noise.", "A soft noise, far away.", "Almost silence, with a little hiss in it."]
    expected = free.eval().embed_text(captions)
    assert_close_rel("untrained", expected, model.eval().embed_text(captions), 1e-6)
    trains = {key for key, p in model.named_parameters() if p.requires_grad}
    towers = {key for key in trains if key.startswith(("audio_branch", "text_branch"))}
    assert towers == {key for key, _ in model.named_parameters() if is_adapter(key)}
    share = sum(p.numel() for key, p in model.named_parameters() if key in towers) / sum(
        p.numel() for p in model.parameters()
    )
    assert 0 < share < 0.03
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    model.train()
    tokens = model.tokenize(captions)
    counts = tokens["attention_mask"].sum(1).tolist()
    for _ in range(10):
        optimizer.zero_grad()
        a = F.normalize(model.encode_audio(audio, torch.tensor([16000, 12000, 16000, 9000])), dim=-1)
        b = F.normalize(model.encode_text(**tokens, token_counts=counts), dim=-1)
        loss = F.cross_entropy(10 * a @ b.t(), torch.arange(4))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0] and math.isfinite(losses[-1])
    model.eval().save_pretrained(tmp_path / "model")
    plain = CLAP.from_pretrained(tmp_path / "model")
    assert plain.config.audio.lora_rank == plain.config.text.lora_rank == 0
    waves = list(audio)
    assert_close_rel("clips", model.embed_audio(waves), plain.embed_audio(waves), 2e-5)
    assert_close_rel("captions", model.embed_text(captions), plain.embed_text(captions), 2e-5)
    assert (free.embed_text(captions) - plain.embed_text(captions)).abs().max() > 1e-3
