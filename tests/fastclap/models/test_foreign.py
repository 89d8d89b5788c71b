"""Foreign checkpoints: the same embeddings as in their own code, or an error that says what does not fit.

MS-CLAP, PE-AV, VoiceCLAP and LAION-CLAP's own class have files of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.reference_step import clap_config
from bench.run import SIZES
from fastclap import CLAP
from fastclap.commands.main import main
from fastclap.errors import ModelError
from fastclap.features import LogMel
from fastclap.models.card import model_card
from fastclap.models.clap import read_checkpoint
from fastclap.models.foreign import ForeignWeights, read_laion, read_paraspeechclap
from fastclap.models.tokenizer import Tokenizer
from fastclap.testing import assert_close_rel

CAPTIONS = ["A man speaks in an angry tone.", "A woman sounds sad.", "Calm.", "A sad man, softly."]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Words with RoBERTa's special ids."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, processors

    words = sorted({word for caption in CAPTIONS for word in caption.lower().replace(".", "").replace(",", "").split()})
    ids = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    backend = Backend(models.WordLevel(ids, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation("removed")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    backend.enable_padding(pad_id=1, pad_token="<pad>")
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder / "tokenizer.json")
    return folder


def clips(rate: int, *seconds: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(round(rate * length), generator=generator) for length in seconds]


# -- ParaSpeechCLAP ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paraspeechclap(tokenizer: Tokenizer) -> CLAP:
    """Our model of a tiny one; the parameter names are those of the published code."""
    torch.manual_seed(0)
    size = SIZES["tiny"]
    heads = {"num_attention_heads": 1}  # one a 64 channels, as in the published text tower
    model = CLAP(clap_config(type(size)(size.wavlm, {**size.xlm_roberta, **heads}, size.dim)), tokenizer).eval()
    with torch.no_grad():
        model.log_logit_scale.fill_(2.5)
    return model


def embeddings(model: Any, captions: list[str] = CAPTIONS) -> tuple[Tensor, Tensor]:
    return model.embed_audio(clips(16000, 0.4, 0.9, 0.6)), model.embed_text(captions)


def assert_same(first: Any, second: Any) -> None:
    for a, b in zip(embeddings(first), embeddings(second), strict=True):
        assert_close_rel("embeddings", a, b, 1e-6)


def test_paraspeechclap_is_read(paraspeechclap: CLAP, tokenizer_folder: Path, tmp_path: Path) -> None:
    torch.save(paraspeechclap.state_dict(), tmp_path / "paraspeechclap-tiny.pth.tar")
    generator = torch.get_rng_state()
    model = CLAP.from_pretrained(tmp_path / "paraspeechclap-tiny.pth.tar", tokenizer=tokenizer_folder)
    assert torch.equal(torch.get_rng_state(), generator) and not model.training
    assert model.log_logit_scale.item() == 2.5
    assert_same(paraspeechclap, model)
    # the folder of a hub repository, with one such file
    assert_same(paraspeechclap, CLAP.from_pretrained(tmp_path, tokenizer=tokenizer_folder))
    half = CLAP.from_pretrained(tmp_path, tokenizer=tokenizer_folder, dtype=torch.bfloat16)
    assert half.log_logit_scale.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "ours")
    assert_same(paraspeechclap, CLAP.from_pretrained(tmp_path / "ours"))
    torch.save({}, tmp_path / "second.pth.tar")
    with pytest.raises(ModelError, match=r"name one of paraspeechclap-tiny\.pth\.tar, second\.pth\.tar"):
        CLAP.from_pretrained(tmp_path)


def test_old_variants_of_the_keys(paraspeechclap: CLAP, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    new = paraspeechclap.state_dict()
    old = {}
    for name, tensor in new.items():
        name = name.replace("conv.parametrizations.weight.original0", "conv.weight_g")
        name = name.replace("conv.parametrizations.weight.original1", "conv.weight_v")
        old[f"module.{name}"] = tensor
    assert sum(name.endswith(("weight_g", "weight_v")) for name in old) == 2
    positions = torch.arange(66)[None]
    old["module.text_branch.base.embeddings.position_ids"] = positions
    old["module.text_branch.base.embeddings.token_type_ids"] = torch.zeros_like(positions)
    old["module.log_logit_scale"] = old["module.log_logit_scale"].reshape(1)
    torch.save({"epoch": 3, "state_dict": old}, tmp_path / "old.pth.tar")
    torch.save({"model": {f"_orig_mod.{name}": tensor.half() for name, tensor in new.items()}}, tmp_path / "half.pt")
    save_file({name: tensor.contiguous() for name, tensor in new.items()}, tmp_path / "new.safetensors")
    assert_same(paraspeechclap, read_checkpoint(tmp_path / "old.pth.tar", tokenizer=tokenizer))
    assert_same(paraspeechclap, read_checkpoint(tmp_path / "new.safetensors", tokenizer=tokenizer))
    half = read_checkpoint(tmp_path / "half.pt", tokenizer=tokenizer)
    assert half.log_logit_scale.dtype == torch.float32
    assert_close_rel("audio", embeddings(paraspeechclap)[0], embeddings(half)[0], 1e-2)


@pytest.mark.parametrize("size", ["large", "base"])
def test_published_configurations_follow_from_the_shapes(size: str) -> None:
    config = clap_config(SIZES[size])
    with torch.device("meta"):
        weights = CLAP(config, load_pretrained=False).state_dict()
    read = read_paraspeechclap(ForeignWeights(Path("x"), "ParaSpeechCLAP", weights), {}, {}).config
    for side in ("audio", "text"):
        mine, published = getattr(read, side).hf_config, getattr(config, side).hf_config
        assert {name: mine.get(name) for name in published} == published
    assert read.text.pooling == "cls" and read.head.dim == 768 and read.head.kind == "paraspeechclap"


def test_configurations_can_be_overridden(tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = clap_config(SIZES["tiny"])  # four heads of 16 channels in the text tower
    assert config.audio.hf_config is not None
    config.audio.hf_config["do_stable_layer_norm"] = False
    model = CLAP(config, tokenizer).eval()
    with torch.no_grad():  # attention that is not nearly uniform
        for name, weight in model.named_parameters():
            weight.mul_(20 if "query" in name or "key" in name else 1)
    torch.save(model.state_dict(), tmp_path / "own.pth.tar")
    own = {"audio_config": {"do_stable_layer_norm": False}, "text_config": {"num_attention_heads": 4}}
    assert_same(model, read_checkpoint(tmp_path / "own.pth.tar", tokenizer=tokenizer, **own))  # type: ignore[arg-type]
    published = read_checkpoint(tmp_path / "own.pth.tar", tokenizer=tokenizer)
    for ours, theirs in zip(embeddings(model), embeddings(published), strict=True):
        assert (ours - theirs).norm() > 1e-4 * ours.norm()


def test_another_waveform_tower(tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = clap_config(SIZES["tiny"])
    fields = {"model_type": "hubert", "num_attention_heads": 1}
    config.audio.hf_config = {**(config.audio.hf_config or {}), **fields}
    model = CLAP(config, tokenizer).eval()
    torch.save(model.state_dict(), tmp_path / "hubert.pth.tar")
    options: Any = {"tokenizer": tokenizer, "text_config": {"num_attention_heads": 4}}
    with pytest.raises(
        ModelError, match=r"its audio tower is not WavLM .*audio_config=\{\"model_type\": \"wav2vec2\"\}"
    ):
        read_checkpoint(tmp_path / "hubert.pth.tar", **options)
    read = read_checkpoint(tmp_path / "hubert.pth.tar", audio_config={"model_type": "hubert"}, **options)
    assert_same(model, read)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_branch.base.encoder.layers.0.layer_norm.bias": None}, r"layers\.0\.layer_norm\.bias is missing"),
        ({"audio_projection.linear1.weight": None}, r"audio_projection\.linear1\.weight is missing"),
        ({"audio_projection.linear3.weight": (2, 2)}, r"audio_projection\.linear3\.weight is not part of the model"),
        (
            {"text_projection.linear1.weight": (64, 65)},
            r"text_projection\.linear1\.weight has the shape \(64, 65\) instead of \(64, 64\)",
        ),
        ({"audio_projection.linear1.weight": (64,)}, r"has the shape \(64,\); 2 dimensions were expected"),
        ({"text_branch.base.embeddings.word_embeddings.weight": (5, 64)}, "has 5 tokens, the tokenizer has 1"),
        ({"audio_branch.base.encoder.layers.0.attention.gru_rel_pos_const": (1, 5, 1, 1)}, "no tower has this config"),
    ],
)
def test_what_does_not_fit_is_named(
    paraspeechclap: CLAP, tokenizer: Tokenizer, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    weights: dict[str, Any] = dict(paraspeechclap.state_dict())
    for name, shape in change.items():
        weights.pop(name, None)
        if shape is not None:
            weights[name] = torch.zeros(shape)
    torch.save(weights, tmp_path / "bad.pth.tar")
    with pytest.raises(ModelError, match=rf"bad\.pth\.tar.*{message}"):
        read_checkpoint(tmp_path / "bad.pth.tar", tokenizer=tokenizer)


def test_other_state_dicts_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "vgg.pt")
    with pytest.raises(ModelError, match=r"vgg\.pt: the state dict of neither .* it holds features\.0\.weight"):
        CLAP.from_pretrained(tmp_path / "vgg.pt", tokenizer=tokenizer)
    torch.save({"epoch": 3, "state_dict": "elsewhere"}, tmp_path / "words.pt")
    with pytest.raises(ModelError, match=r"words\.pt: holds no state dict"):
        read_checkpoint(tmp_path / "words.pt", tokenizer=tokenizer)
    with pytest.raises(ModelError, match="no configuration of a model that is read"):
        read_checkpoint(tmp_path)


def test_without_its_tokenizer(paraspeechclap: CLAP, tmp_path: Path) -> None:
    torch.save(paraspeechclap.state_dict(), tmp_path / "model.pth.tar")
    with pytest.raises(
        ModelError, match=r"absent: no tokenizer could be loaded .* holds no tokenizer; give the folder"
    ):
        read_checkpoint(tmp_path / "model.pth.tar", tokenizer=tmp_path / "absent")
    load = mock.patch.object(Tokenizer, "from_pretrained", side_effect=ModelError("offline"))
    with load as called, pytest.raises(ModelError, match=r"offline\. The checkpoint .* holds no tokenizer"):
        CLAP.from_pretrained(tmp_path / "model.pth.tar")
    assert called.call_args.args == ("ibm-granite/granite-embedding-278m-multilingual",)


# -- LAION-CLAP and transformers --------------------------------------------------------------------------------------

HTSAT = {"patch_embeds_hidden_size": 8, "hidden_size": 32, "depths": [1, 2, 1], "num_attention_heads": [1, 2, 4]}
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
TEXT |= {"max_position_embeddings": 20, "layer_norm_eps": 1e-3}


def clap_model(tokenizer: Tokenizer, **text: Any) -> Any:
    from transformers import ClapConfig, ClapModel

    torch.manual_seed(0)
    config = ClapConfig(audio_config=HTSAT, text_config={**TEXT, **text}, projection_dim=12)
    model = ClapModel(config).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():  # norms, biases and position biases start at constants
                tensor.add_(0.1 * torch.rand_like(tensor))
        model.logit_scale_a.fill_(3.0)
    return model


def transformers_embeddings(model: Any, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    waves = torch.stack([wave.repeat(480000 // len(wave)) for wave in clips(48000, 0.5, 1.0)])
    features, _ = LogMel("clap")(waves)
    with torch.no_grad():
        audio = model.get_audio_features(input_features=features[:, None]).pooler_output
        text = model.get_text_features(**tokenizer(CAPTIONS, 18)).pooler_output
    return F.normalize(audio, dim=-1), F.normalize(text, dim=-1)


def assert_equals_transformers(ours: CLAP, theirs: Any, tokenizer: Tokenizer) -> None:
    audio, text = transformers_embeddings(theirs, tokenizer)
    assert_close_rel("audio", audio, ours.embed_audio(clips(48000, 0.5, 1.0), sampling_rate=48000), 1e-5)
    assert_close_rel("text", text, ours.embed_text(CAPTIONS), 1e-5)
    assert ours.log_logit_scale.item() == 3.0


def test_a_transformers_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    model = clap_model(tokenizer)
    model.save_pretrained(tmp_path / "clap")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, pad_token="<pad>").save_pretrained(tmp_path / "clap")
    ours = CLAP.from_pretrained(tmp_path / "clap")
    assert_equals_transformers(ours, model, tokenizer)
    assert ours.config.text.max_tokens == 18 and ours.sampling_rate == 48000
    ours.save_pretrained(tmp_path / "ours")
    assert_equals_transformers(CLAP.from_pretrained(tmp_path / "ours"), model, tokenizer)


def test_transformers_folders_that_cannot_be_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = clap_model(tokenizer)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def edited(**changes: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))

    edited(audio_config={**config["audio_config"], "enable_fusion": True})
    with pytest.raises(ModelError, match="a fusion model, which takes four spectrograms"):
        CLAP.from_pretrained(tmp_path, tokenizer=tokenizer)
    edited(projection_hidden_act="gelu")
    with pytest.raises(ModelError, match="projection_hidden_act is gelu"):
        CLAP.from_pretrained(tmp_path, tokenizer=tokenizer)
    edited(text_config={**config["text_config"], "num_hidden_layers": 3})
    with pytest.raises(ModelError, match=r"text_model\.encoder\.layer\.2\.\S+ is missing"):
        CLAP.from_pretrained(tmp_path, tokenizer=tokenizer)
    edited()
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="could not be loaded"):
        CLAP.from_pretrained(tmp_path, tokenizer=tokenizer)


def test_a_transformers_folder_without_its_tokenizer(tokenizer: Tokenizer, tmp_path: Path, capfd: Any) -> None:
    """transformers makes a tokenizer of five tokens of it, and every caption would be the same."""
    clap_model(tokenizer).save_pretrained(tmp_path / "clap")
    assert main(["convert", str(tmp_path / "clap"), str(tmp_path / "out")]) == 2
    message = capfd.readouterr().err
    assert f"{tmp_path / 'clap'}: no tokenizer could be loaded: the folder holds none of its files" in message
    assert "tokenizer.json" in message and "vocab.json with merges.txt" in message and not (tmp_path / "out").exists()


def laion_state(model: Any) -> dict[str, Tensor]:
    """The weights of transformers' model under LAION-CLAP's names."""
    state = model.state_dict()
    laion = {}
    renames = [
        ("audio_model.audio_encoder.batch_norm.", "audio_branch.bn0."),
        ("audio_model.audio_encoder.", "audio_branch."),
        ("text_model.", "text_branch."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.self.relative", "attn.relative"),
        ("projection.linear1", "projection.0"),
        ("projection.linear2", "projection.2"),
    ]
    for name, tensor in state.items():
        if ".attention.self.query" in name and name.startswith("audio"):
            parts = [state[name.replace("query", part)] for part in ("query", "key", "value")]
            name, tensor = name.replace("attention.self.query", "attn.qkv"), torch.cat(parts)
        elif name.startswith("audio") and (".self.key" in name or ".self.value" in name):
            continue
        if name.startswith("audio"):
            name = name.replace("attention.output.dense", "attn.proj").replace("intermediate.dense", "mlp.fc1")
            name = name.replace("output.dense", "mlp.fc2")
        for new, old in renames:
            name = name.replace(new, old)
        laion[name] = tensor
    unused = ("logmel_extractor.melW", "tscam_conv.weight", "head.bias", "layers.1.blocks.1.attn_mask")
    laion |= {f"audio_branch.{name}": torch.zeros(3) for name in unused}
    laion["audio_transform.sequential.0.weight"] = laion["text_transform.sequential.3.bias"] = torch.zeros(2)
    return laion


def laion_model(tokenizer: Tokenizer) -> Any:
    return clap_model(tokenizer, num_attention_heads=1, layer_norm_eps=1e-5, hidden_size=64)


def test_a_laion_checkpoint(tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path) -> None:
    import numpy as np

    model = laion_model(tokenizer)
    state = {f"module.{name}": tensor for name, tensor in laion_state(model).items()}
    torch.save({"epoch": 45, "loss": np.float64(1.5), "name": "x", "state_dict": state}, tmp_path / "630k.pt")
    ours = CLAP.from_pretrained(tmp_path / "630k.pt", tokenizer=tokenizer_folder)
    assert_equals_transformers(ours, model, tokenizer)
    load = mock.patch.object(Tokenizer, "from_pretrained", side_effect=ModelError("offline"))
    with load as called, pytest.raises(ModelError, match="holds no tokenizer"):
        CLAP.from_pretrained(tmp_path / "630k.pt")
    assert called.call_args.args == ("roberta-base",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_branch.patch_embed.mel_conv2d.weight": (1,)}, "a fusion checkpoint, which takes four spectrograms"),
        ({"audio_branch.patch_embed.proj.weight": None}, "its audio tower is not HTSAT"),
        ({"audio_branch.layers.1.blocks.1.attn.qkv.bias": (47,)}, r"qkv\.bias has the shape \(47,\), no three parts"),
        ({"audio_branch.norm.weight": None}, r"audio_branch\.base\.audio_encoder\.norm\.weight is missing"),
        ({"text_branch.extra": (1,)}, r"text_branch\.base\.extra is not part of the model"),
    ],
)
def test_a_laion_checkpoint_that_does_not_fit(
    tokenizer: Tokenizer, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    state = laion_state(laion_model(tokenizer))
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ModelError, match=rf"bad\.pt.*{message}"):
        read_checkpoint(tmp_path / "bad.pt", tokenizer=tokenizer)


def test_the_published_laion_configuration_follows_from_the_shapes() -> None:
    from transformers import ClapConfig, ClapModel

    with torch.device("meta"):
        state = laion_state(ClapModel(ClapConfig()))  # HTSAT-tiny and RoBERTa-base, but for its epsilon
    read = read_laion(ForeignWeights(Path("x"), "LAION-CLAP", state), {}, {}).config
    published = ClapConfig()
    for side, theirs in ((read.audio, published.audio_config), (read.text, published.text_config)):
        for name, value in (side.hf_config or {}).items():
            expected = {"model_type": "roberta", "layer_norm_eps": 1e-5}.get(name, getattr(theirs, name))
            assert value == (list(expected) if isinstance(expected, tuple) else expected), name
    assert read.head.kind == "laion" and read.head.dim == 512 and read.text.pooling == "pooler"


# -- model card and hub -----------------------------------------------------------------------------------------------


def write_run(folder: Path) -> None:
    folder.mkdir()
    config = {"data": {"train": ["/home/someone/train.jsonl", "hf:owner/data:train"]}, "steps": 500, "batch_size": 64}
    (folder / "config.yaml").write_text(json.dumps({**config, "optimizer": {"learning_rate": 1e-3}}))
    figures = {"audio_to_text": {"R@1": 0.25, "R@10": 0.5}, "text_to_audio": {"R@1": 0.125}}
    lines = [
        {"kind": "valid", "step": 100, "retrieval": {}},
        {"kind": "valid", "step": 500, "retrieval": {"global": figures}, "classification": {"sex": {"uar": 0.75}}},
        {"kind": "train", "step": 500, "loss": 1.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def front_matter(card: str) -> dict[str, Any]:
    import yaml

    _, header, _ = card.split("---\n", 2)
    return yaml.safe_load(header)


def test_the_card_has_training_and_figures(paraspeechclap: CLAP, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    paraspeechclap.save_pretrained(tmp_path / "model", run=tmp_path / "run", license="cc-by-4.0")
    card = (tmp_path / "model/README.md").read_text()
    assert front_matter(card)["license"] == "cc-by-4.0" and front_matter(card)["library_name"] == "fastclap"
    for line in (
        "| audio tower | wavlm, layers 2, width 64 |",
        "| training data | train.jsonl, hf:owner/data:train |",
        "| steps | 500 |",
        "Validation at step 500, in per cent:",
        "| global captions, audio → text, R@1 | 25.0 | – |",
        "| sex, UAR | 75.0 | – |",
        "## Licence",
    ):
        assert line in card.splitlines()
    assert "someone" not in card
    loaded = CLAP.from_pretrained(tmp_path / "model")
    loaded.save_pretrained(tmp_path / "again")  # a card is not lost on the way
    assert (tmp_path / "again/README.md").read_text() == card
    loaded.save_pretrained(tmp_path / "again", license="mit")
    assert (tmp_path / "again/README.md").read_text() == card.replace("cc-by-4.0", "mit")
    (tmp_path / "run/metrics.jsonl").write_text("cut")
    (tmp_path / "run/config.yaml").write_text("- no\n- mapping")
    assert "## Figures" not in model_card(paraspeechclap.facts, run=tmp_path / "run")
    assert front_matter(model_card(paraspeechclap.facts))["license"] == "unknown"


def test_the_card_of_a_whole_run_says_what_made_the_model_and_what_chance_scores(
    paraspeechclap: CLAP, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    config = {
        "data": {
            "train": ["/home/someone/a.jsonl", "/home/someone/b"],
            "valid": ["/home/someone/valid.jsonl"],
            "mix": "interleave",
            "captions": "pair",
            "crop_seconds": 10.0,
            "balance": "inverse",
            "tag_column": "intrinsic_tags",
        },
        "loss": {"kind": "info_nce", "tag_weight": 1.0, "teacher": "init", "teacher_weight": 0.5},
        "init_from": "/home/someone/runs/ess-clap/model",
        "optimizer": {"ema_decay": 0.99},
    }
    (tmp_path / "run/config.yaml").write_text(json.dumps(config))
    (tmp_path / "run/environment.json").write_text(
        '{"fastclap": "0.1.0", "torch": "2.11", "command": ["/home/someone"]}'
    )
    uar = {"uar": 0.5, "accuracy": 0.75, "majority_accuracy": 0.6, "chance": 0.25, "templates": ["A {} | voice.", "{}"]}
    figures = {"audio_to_text": {"R@1": 0.25, "chance": {"R@1": 0.0125}}}
    record = {"kind": "valid", "step": 9, "clips": 78, "retrieval": {"fine": figures}, "classification": {"tag": uar}}
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps(record) + "\n")
    card = model_card(paraspeechclap.facts, run=tmp_path / "run")
    for line in (
        "| training data | a.jsonl, b (interleave) |",
        "| captions | pair |",
        "| clips | cropped to 10 s at most |",
        "| drawn by | inverse frequency of intrinsic_tags |",
        "| started from | ess-clap |",
        "| tag loss | 1 · intrinsic_tags |",
        "| teacher | init, weight 0.5 |",
        "| averaged weights | decay 0.99 |",
        "| made with | fastclap 0.1.0, torch 2.11 |",
        "Validation at step 9 on 78 clips (valid.jsonl), in per cent:",
        "| figure | % | chance |",
        "| fine captions, audio → text, R@1 | 25.0 | 1.2 |",
        "| tag, accuracy | 75.0 | 60.0 |",
        "| tag, UAR | 50.0 | 25.0 |",
        "Zero-shot: tag with “A {} | voice.” · “{}”. Beside an accuracy stands that of the most frequent class.",
    ):
        assert line in card.splitlines(), line
    assert "someone" not in card


def test_push_and_load(
    paraspeechclap: CLAP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    calls: dict[str, Any] = {}

    def create_repo(self: Any, repo_id: str, **options: Any) -> None:
        calls["create"] = (self.token, repo_id, options)

    def upload_folder(self: Any, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        (tmp_path / "hub").mkdir()
        for item in Path(folder_path).iterdir():
            (tmp_path / "hub" / item.name).write_bytes(item.read_bytes())
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    url = paraspeechclap.push_to_hub("me/voices", license="apache-2.0", private=True, token="secret")
    assert url == "https://hub/me/voices/commit/1"
    assert calls["create"] == ("secret", "me/voices", {"private": True, "exist_ok": True})
    card = (tmp_path / "hub/README.md").read_text()
    assert 'CLAP.from_pretrained("me/voices")' in card and front_matter(card)["license"] == "apache-2.0"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / "hub"))
    assert_same(paraspeechclap, CLAP.from_pretrained("me/voices"))
    for text in (
        card,
        model_card(paraspeechclap.facts),
        model_card(CLAP(paraspeechclap.config).facts),
    ):  # as they stand
        monkeypatch.chdir(tmp_path / "hub")
        exec(text.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.count("tensor([[") == 2


def test_a_push_that_fails_says_so(paraspeechclap: CLAP, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(self: Any, *arguments: Any, **options: Any) -> None:
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ModelError, match=r"me/voices: could not be uploaded \(401 Unauthorized\); log in with"):
        paraspeechclap.push_to_hub("me/voices")
    with pytest.raises(ModelError, match="'voices' is not a hub id; give owner/name"):
        paraspeechclap.push_to_hub("voices")


def test_hub_repositories_of_other_codes(
    paraspeechclap: CLAP, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    torch.save(paraspeechclap.state_dict(), tmp_path / "paraspeechclap-intrinsic.pth.tar")
    (tmp_path / "config.json").write_text('{"license": "x"}')
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path))
    assert_same(paraspeechclap, CLAP.from_pretrained("ajd12342/paraspeechclap-intrinsic", tokenizer=tokenizer))
    clap = tmp_path / "clap"
    model = clap_model(tokenizer)
    wanted: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        wanted.append(allow_patterns)
        model.save_pretrained(clap)
        if len(wanted) == 1:  # the old format, which the first call does not ask for
            (clap / "model.safetensors").unlink()
        return str(clap)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_equals_transformers(CLAP.from_pretrained("laion/clap", tokenizer=tokenizer), model, tokenizer)
    assert "pytorch_model*" in wanted[1] and "pytorch_model*" not in wanted[0]


# -- command line -----------------------------------------------------------------------------------------------------


def test_convert(paraspeechclap: CLAP, tokenizer_folder: Path, tmp_path: Path, capfd: Any) -> None:
    source, target = tmp_path / "x.pth.tar", tmp_path / "out"
    torch.save(paraspeechclap.state_dict(), source)
    flags = ["--tokenizer", str(tokenizer_folder), "--license", "cc-by-nc-sa-4.0"]
    command = [sys.executable, "-m", "fastclap", "convert", str(source), str(target), *flags, "--json"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["dim"] == 64 and summary["model"] == str(target) and f"reading {source}" in done.stderr
    assert_same(paraspeechclap, CLAP.from_pretrained(target))
    card = (target / "README.md").read_text()
    assert front_matter(card)["license"] == "cc-by-nc-sa-4.0" and "ParaSpeechCLAP checkpoint `x.pth.tar`" in card
    assert main(["convert", str(source), str(target), *flags]) == 0  # again, with the output that is meant to be read
    assert f"64 dimensions, 16000 Hz: {target}" in capfd.readouterr().out

    wrong = ["--text-config", "num_hidden_layers", "3"]
    for arguments, message in (
        ([str(target), str(tmp_path / "bad"), *flags], "already a fastclap model; there is nothing to convert"),
        (
            [str(source), str(tmp_path / "bad"), *flags, *wrong],
            "encoder.layer.2.attention.self.query.weight is missing",
        ),
        ([str(source), str(tmp_path / "bad"), "--tokenizer", str(tmp_path / "absent")], "no tokenizer could be loaded"),
        ([str(tmp_path / "absent.pt"), str(tmp_path / "bad"), *flags], "absent.pt: no such model"),
        ([str(source), str(tmp_path), *flags], "holds other files (out, x.pth.tar)"),
    ):
        assert main(["convert", *arguments]) == 2
        assert message in capfd.readouterr().err and not (tmp_path / "bad").exists()
