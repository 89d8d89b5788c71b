"""CLSP next to its own code in icefall, on random weights saved as it saves them, and next to its definition.

The front-end that its code is given is torchaudio's, or lhotse's where that is installed, which CLSP was trained with.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

from bench.icefall import Published
from fastclap import CLAP
from fastclap.commands.main import main
from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig, ZipformerConfig
from fastclap.errors import ConfigError, ModelError
from fastclap.models.clap import read_checkpoint
from fastclap.models.foreign import ForeignWeights
from fastclap.models.foreign.clsp import read_clsp
from fastclap.models.zipformer.tower import ZipformerTower
from fastclap.testing import assert_close_rel
from tests.fastclap.models.zipformer_peer import SMALL, WIDTHS

CAPTIONS = ["A man speaks in an angry tone.", "A woman sounds sad.", "Calm.", "A sad man, softly."]
ROBERTA = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
ROBERTA |= {"intermediate_size": 48, "max_position_embeddings": 34, "type_vocab_size": 1}
TEXT: dict[str, Any] = {"model_type": "roberta", "layer_norm_eps": 1e-5, "pad_token_id": 1, **ROBERTA}
DIM = 24
SIZES = {
    "small, 40 bands": (SMALL, 40),
    "several widths, 80 bands": (WIDTHS, 80),
    "other channels, 128 bands": (replace(SMALL, channels=[4, 12, 20]), 128),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*mel filters contain no DFT bin")


# -- what is published ------------------------------------------------------------------------------------------------


def shapes(config: ZipformerConfig, mels: int, text: dict[str, int], dim: int) -> dict[str, tuple[int, ...]]:
    """The tensors of CLSP by the names of its code."""
    found: dict[str, tuple[int, ...]] = {"logit_scale": ()}

    def linear(name: str, outer: int, *inner: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = (outer, *inner)
        if bias:
            found[f"{name}.bias"] = (outer,)

    def biased_norm(name: str, width: int) -> None:
        found.update({f"{name}.log_scale": (), f"{name}.bias": (width,)})

    lists = config.lists()
    first, second, last = config.channels
    for index, channels in ((0, (first, 1)), (4, (second, first)), (7, (last, second))):
        linear(f"encoder_embed.conv.{index}", *channels, 3, 3)
    linear("encoder_embed.convnext.depthwise_conv", last, 1, 7, 7)
    linear("encoder_embed.convnext.pointwise_conv1", 3 * last, last, 1, 1)
    linear("encoder_embed.convnext.pointwise_conv2", last, 3 * last, 1, 1)
    linear("encoder_embed.out", lists["width"][0], last * {40: 9, 80: 19, 128: 31}[mels])
    biased_norm("encoder_embed.out_norm", lists["width"][0])
    for index, factor in enumerate(lists["downsampling"]):
        width, hidden, heads, kernel = (lists[name][index] for name in ("width", "feedforward", "heads", "kernel"))
        stack = f"encoder.encoders.{index}"
        if factor > 1:
            found |= {f"{stack}.downsample.bias": (factor,), f"{stack}.out_combiner.bypass_scale": (width,)}
            stack = f"{stack}.encoder"
        for number in range(lists["layers"][index]):
            layer = f"{stack}.layers.{number}"
            attention = f"{layer}.self_attn_weights"
            linear(f"{attention}.in_proj", heads * (2 * config.query_width + config.position_width), width)
            linear(f"{attention}.linear_pos", heads * config.position_width, config.encoding_width, bias=False)
            for name in (f"{layer}.self_attn1", f"{layer}.self_attn2"):
                linear(f"{name}.in_proj", heads * config.value_width, width)
                linear(f"{name}.out_proj", width, heads * config.value_width)
            for name, inner in (("1", hidden * 3 // 4), ("2", hidden), ("3", hidden * 5 // 4)):
                linear(f"{layer}.feed_forward{name}.in_proj", inner, width)
                linear(f"{layer}.feed_forward{name}.out_proj", width, inner)
            linear(f"{layer}.nonlin_attention.in_proj", 9 * width // 4, width)
            linear(f"{layer}.nonlin_attention.out_proj", width, 3 * width // 4)
            for name in (f"{layer}.conv_module1", f"{layer}.conv_module2"):
                linear(f"{name}.in_proj", 2 * width, width)
                linear(f"{name}.depthwise_conv", width, 1, kernel)
                linear(f"{name}.out_proj", width, width)
            biased_norm(f"{layer}.norm", width)
            for name in ("bypass_scale", "bypass.bypass_scale", "bypass_mid.bypass_scale"):
                found[f"{layer}.{name}"] = (width,)
    if config.output_downsampling == 2:
        found["encoder.downsample_output.bias"] = (2,)
    hidden = text["hidden_size"]
    for name, size in (
        ("word", "vocab_size"),
        ("position", "max_position_embeddings"),
        ("token_type", "type_vocab_size"),
    ):
        found[f"text_encoder.embeddings.{name}_embeddings.weight"] = (text[size], hidden)
    linear("text_encoder.embeddings.LayerNorm", hidden)
    for number in range(text["num_hidden_layers"]):
        layer = f"text_encoder.encoder.layer.{number}"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            linear(f"{layer}.{name}", hidden, hidden)
        linear(f"{layer}.attention.output.LayerNorm", hidden)
        linear(f"{layer}.intermediate.dense", text["intermediate_size"], hidden)
        linear(f"{layer}.output.dense", hidden, text["intermediate_size"])
        linear(f"{layer}.output.LayerNorm", hidden)
    linear("text_encoder.pooler.dense", hidden, hidden)
    for side, width in (("audio", max(lists["width"])), ("text", hidden)):
        linear(f"{side}_projection.0", dim, width)
        for name in (f"{side}_projection.2", f"{side}_transform.sequential.0", f"{side}_transform.sequential.3"):
            linear(name, dim, dim)
    return found


def random_weights(config: ZipformerConfig = SMALL, mels: int = 40) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes(config, mels, ROBERTA, DIM).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("bypass_scale"):
            weights[name] = 0.5 + 0.1 * noise
        elif len(shape) > 1 and "embeddings" not in name:
            weights[name] = noise * math.prod(shape[1:]) ** -0.5
        else:
            weights[name] = 0.1 * noise + (1 if "LayerNorm.weight" in name else 0)
    return {**weights, "logit_scale": torch.tensor(2.5)}


def clips(*seconds: float) -> list[Tensor]:
    """Noise of different colours and levels."""
    generator = torch.Generator().manual_seed(0)
    waves = [torch.randn(round(16000 * length), generator=generator) for length in seconds]
    for index, wave in enumerate(waves):
        for _ in range(index):
            wave[1:] += 0.9 * wave[:-1].clone()
        wave *= 0.1 ** (1 + index) / wave.std()
    return waves


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words with RoBERTa's special ids."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = sorted({word for text in CAPTIONS for word in text.lower().replace(".", "").replace(",", "").split()})
    ids = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation("removed")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    backend.enable_padding(pad_id=1, pad_token="<pad>")
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    return folder


def save_folder(weights: dict[str, Tensor], tokenizer_folder: Path, folder: Path, file: str) -> None:
    """As on the hub: safetensors or torch's format, names with a prefix, and code that must not run."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    tensors = {f"model.{name}": tensor.clone() for name, tensor in weights.items()}
    if file == "model.safetensors":
        save_file(tensors, folder / file, metadata={"format": "pt"})
    else:
        torch.save(tensors, folder / file)
    code = {"AutoConfig": "configuration_clsp.CLSPConfig", "AutoModel": "modeling_clsp.CLSPModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "its own", "auto_map": code}))
    for name in ("configuration_clsp.py", "modeling_clsp.py"):
        (folder / name).write_text("raise SystemExit('this was run')")
    shutil.copy(tokenizer_folder / "tokenizer.json", folder)


def save_icefall(weights: dict[str, Tensor], path: Path, prefix: str = "") -> None:
    """As its training does, with what its options hold, such as paths."""
    average = {name: tensor.double() + 1 for name, tensor in weights.items()}
    others = {
        "optimizer": None,
        "sampler": None,
        "exp_dir": path.parent,
        "best_train_loss": float("inf"),
        "cur_epoch": 3,
    }
    model = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    torch.save({"model": model, "model_avg": average, **others}, path)


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks at the terminal whether a folder's code may run."""

    def ask(*_: Any) -> str:
        raise SystemExit("somebody was asked")

    monkeypatch.setattr("builtins.input", ask)


# -- its definition ---------------------------------------------------------------------------------------------------


def head(w: dict[str, Tensor], side: str, x: Tensor) -> Tensor:
    for name in (f"{side}_projection", f"{side}_transform.sequential"):
        second = 2 if name.endswith("projection") else 3
        x = F.relu(F.linear(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"]))
        x = F.linear(x, w[f"{name}.{second}.weight"], w[f"{name}.{second}.bias"])
    return F.normalize(x, dim=-1)


def audio_of(w: dict[str, Tensor], config: ZipformerConfig, mels: int, waves: list[Tensor]) -> Tensor:
    tower = ZipformerTower(
        AudioTowerConfig(kind="zipformer", features="clsp", feature_options={"n_mels": mels}, zipformer=config)
    ).eval()
    tower.load_state_dict({name: tensor for name, tensor in w.items() if name.startswith("encoder")})
    with torch.no_grad():
        return torch.cat([head(w, "audio", tower(wave[None])) for wave in waves])


def roberta() -> Any:
    from transformers import RobertaConfig, RobertaModel

    return RobertaModel(RobertaConfig(**{name: value for name, value in TEXT.items() if name != "model_type"}))


def tokens_of(folder: Path, captions: list[str]) -> dict[str, Tensor]:
    """As transformers tokenizes."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>")
    encoded = tokenizer(captions, padding=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def text_of(w: dict[str, Tensor], tokens: dict[str, Tensor]) -> Tensor:
    model = roberta().eval()
    model.load_state_dict({k.removeprefix("text_encoder."): v for k, v in w.items() if k.startswith("text_encoder.")})
    with torch.no_grad():
        return head(w, "text", model(**tokens).pooler_output)


def assert_embeds(model: CLAP, waves: list[Tensor], audio: Tensor, text: Tensor, tolerance: float) -> None:
    assert (audio - audio.mean(0)).norm() > 0.02 * audio.norm()  # different clips have different vectors
    assert (text - text.mean(0)).norm() > 0.02 * text.norm()
    assert_close_rel("audio", audio, model.embed_audio(waves), tolerance)
    assert_close_rel("alone", audio, torch.cat([model.embed_audio([wave]) for wave in waves]), tolerance)
    assert_close_rel("text", text, model.embed_text(CAPTIONS), tolerance)


@pytest.mark.parametrize("size", SIZES)
def test_every_form_is_its_definition(size: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    config, mels = SIZES[size]
    weights, waves = random_weights(config, mels), clips(0.7, 0.31, 1.2)
    save_icefall(weights, tmp_path / "epoch-3.pt", "module.")
    torch.save(weights, tmp_path / "bare.pt")
    save_folder(weights, tokenizer_folder, tmp_path / "hub", "model.safetensors")
    save_folder(weights, tokenizer_folder, tmp_path / "bin", "pytorch_model.bin")
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    (tmp_path / "bin/tokenizer_config.json").write_text(json.dumps(options))
    audio, text = audio_of(weights, config, mels, waves), text_of(weights, tokens_of(tokenizer_folder, CAPTIONS))
    for name in ("epoch-3.pt", "bare.pt", "hub/model.safetensors"):
        assert_embeds(CLAP.from_pretrained(tmp_path / name, tokenizer=tokenizer_folder), waves, audio, text, 1e-5)
    for name in ("hub", "bin"):
        model = CLAP.from_pretrained(tmp_path / name)
        assert_embeds(model, waves, audio, text, 1e-5)
    assert model.log_logit_scale.item() == 2.5 and model.sampling_rate == 16000 and not model.training
    read = model.config.audio.zipformer
    assert replace(read, unmasked_width=config.unmasked_width).lists() == config.lists()  # it matters in training alone
    for name in ("channels", "query_width", "position_width", "value_width", "encoding_width", "output_downsampling"):
        assert getattr(read, name) == getattr(config, name)
    assert model.config.text.max_tokens == 32
    model.save_pretrained(tmp_path / "ours")
    assert_embeds(CLAP.from_pretrained(tmp_path / "ours"), waves, audio, text, 1e-5)


def test_the_published_sizes_follow_from_the_shapes() -> None:
    text = {"vocab_size": 50265, "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
    text |= {"max_position_embeddings": 514, "type_vocab_size": 1}
    for size, count in (("spear-xlarge", 724_244_405), ("spear-base", None), ("spear-large", None)):
        config = ZipformerConfig(size=size)  # type: ignore[arg-type]
        table = shapes(config, 128, text, 512)
        if count is not None:
            assert len(table) == 815 and sum(math.prod(shape) for shape in table.values()) == count
        with torch.device("meta"):
            weights = {name: torch.empty(shape) for name, shape in table.items()}
            read = read_clsp(ForeignWeights(Path("x"), "CLSP", weights), {}, {})
            model = CLAP(read.config, load_pretrained=False)
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in read.weights.items()}
        assert read.config.audio.zipformer.lists() == config.lists()
        assert read.config.audio.feature_options == {} and read.config.head.dim == 512
        assert (read.config.text.max_tokens, read.config.text.pooling) == (512, "pooler")
        assert (read.config.text.hf_config or {})["num_attention_heads"] == 12
        assert CLAPConfig.from_dict(read.config.to_dict()) == read.config


def test_what_no_shape_tells_can_be_said(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Of 39 to 42 mel bands the convolutions make as many channels; unmasked channels matter in training alone."""
    torch.save({"model": random_weights()}, tmp_path / "clsp.pt")

    def read(**audio: Any) -> CLAP:
        return read_checkpoint(tmp_path / "clsp.pt", tokenizer=tokenizer_folder, audio_config=audio)

    wave = clips(0.5)
    as_it_is = read()
    assert as_it_is.config.audio.feature_options == {"n_mels": 40}
    assert as_it_is.config.audio.zipformer.unmasked_width == [38] * 4  # three fifths, as of SPEAR-XLarge
    more = read(n_mels=42, unmasked_width=[48])
    assert more.config.audio.feature_options == {"n_mels": 42}
    assert more.config.audio.zipformer.lists()["unmasked_width"] == [48] * 4
    assert (as_it_is.embed_audio(wave) - more.embed_audio(wave)).norm() > 1e-3
    with pytest.raises(ModelError, match=r"encoder_embed\.out\.weight has the shape"):
        read(n_mels=44)
    with pytest.raises(ConfigError, match=r"unknown configuration key audio_config\.unmasked"):
        read(unmasked=[48])
    with pytest.raises(ConfigError, match=r"audio_config\.position_width must be a whole number"):
        read(position_width="four")
    with pytest.raises(ModelError, match="log-mel features"):
        read(n_mels="many")


# -- its own code -----------------------------------------------------------------------------------------------------


def torchaudios(mels: int) -> Callable[[Tensor], Tensor]:
    return lambda wave: torchaudio.compliance.kaldi.fbank(
        wave[None], num_mel_bins=mels, snip_edges=False, high_freq=-400.0
    )


def lhotses(mels: int) -> Callable[[Tensor], Tensor]:
    lhotse = pytest.importorskip("lhotse", reason="the front-end that CLSP was trained with")
    extractor = lhotse.Fbank(lhotse.FbankConfig(num_mel_bins=mels))
    return lambda wave: torch.as_tensor(extractor.extract(wave.numpy(), 16000))


def run_theirs(model: Any, front_end: Callable[[Tensor], Tensor], waves: list[Tensor], tokens: Any) -> Any:
    """Clip by clip: in a batch, their convolutions see the padding."""
    with torch.no_grad():
        features = [front_end(wave) for wave in waves]
        audio = [model(audio=each[None], audio_lens=torch.tensor([len(each)]))[0] for each in features]
        return torch.cat(audio), model(text=tokens)[1]


def icefalls_save(icefall: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`save_checkpoint` of icefall, whose one import of lhotse is for a type."""
    file = Path(icefall.model.__file__).parents[4] / "icefall/checkpoint.py"
    spec = importlib.util.spec_from_file_location("icefall_checkpoint", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        for name in ("lhotse", "lhotse.dataset", "lhotse.dataset.sampling", "lhotse.dataset.sampling.base"):
            patch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["lhotse.dataset.sampling.base"].CutSampler = object  # type: ignore[attr-defined]
        spec.loader.exec_module(module)
    return module.save_checkpoint


@pytest.mark.parametrize("front_end", [torchaudios, lhotses])
@pytest.mark.parametrize("size", SIZES)
def test_its_own_code_and_files(
    size: str,
    front_end: Any,
    icefall: SimpleNamespace,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Saved by its code after a step of its optimizer, read by ours, and the way back."""
    config, mels = SIZES[size]
    features_of, roberta = front_end(mels), {k: v for k, v in TEXT.items() if k != "model_type"}
    tokens, waves = tokens_of(tokenizer_folder, CAPTIONS), clips(0.7, 0.31, 1.2)
    peer = Published(icefall, config, mels, roberta, DIM)
    peer.model.load_state_dict(random_weights(config, mels))
    peer.step(
        torch.stack([features_of(wave[:4960]) for wave in waves]),
        torch.tensor([31] * 3),
        tokens_of(tokenizer_folder, CAPTIONS[:3]),
    )
    theirs, average = peer.model.eval(), Published(icefall, config, mels, roberta, DIM).model.double()
    state = theirs.state_dict()
    params = {"exp_dir": tmp_path, "num_mel_bins": mels, "env_info": {"git": None}, "best_train_loss": float("inf")}
    save_checkpoint = icefalls_save(icefall, monkeypatch)
    save_checkpoint(tmp_path / "epoch-1.pt", theirs, average, params, peer.optimizer, peer.scheduler)
    save_folder(state, tokenizer_folder, tmp_path / "hub", "model.safetensors")
    audio, text = run_theirs(theirs, features_of, waves, tokens)
    for model in (
        CLAP.from_pretrained(tmp_path / "epoch-1.pt", tokenizer=tokenizer_folder),
        CLAP.from_pretrained(tmp_path / "hub"),
    ):
        assert_embeds(model, waves, audio, text, 1e-5)
        assert model.log_logit_scale.item() == theirs.logit_scale.item() != 2.5
    model.save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back.pt"), "--to", "clsp"]) == 0
    again = Published(icefall, config, mels, roberta, DIM).model.eval()
    again.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True)["model"], strict=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(run_theirs(again, features_of, waves, tokens)[0], audio)


# -- the way back -----------------------------------------------------------------------------------------------------


def test_both_forms_written_are_bit_for_bit_what_was_read(tokenizer_folder: Path, tmp_path: Path, capfd: Any) -> None:
    from safetensors.torch import load_file

    weights = random_weights(WIDTHS, 80)
    save_icefall(weights, tmp_path / "epoch-3.pt")
    flags = ["--tokenizer", str(tokenizer_folder)]
    assert main(["convert", str(tmp_path / "epoch-3.pt"), str(tmp_path / "ours"), *flags]) == 0
    assert f"{DIM} dimensions, 16000 Hz: {tmp_path / 'ours'}" in capfd.readouterr().out
    card = (tmp_path / "ours/README.md").read_text()
    assert "CLSP checkpoint `epoch-3.pt`" in card and "Zipformer on log-mel features, 4 layers, width 48" in card
    for name in ("new/back.pt", "new/hub"):
        assert main(["convert", str(tmp_path / "ours"), str(tmp_path / name), "--to", "clsp"]) == 0
    state = torch.load(tmp_path / "new/back.pt", weights_only=True)
    assert list(state) == ["model"]
    hub = load_file(tmp_path / "new/hub/model.safetensors")
    for found in (state["model"], {name.removeprefix("model."): tensor for name, tensor in hub.items()}):
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert all(name.startswith("model.") for name in hub)
    assert {item.name for item in (tmp_path / "new").iterdir()} == {"back.pt", "hub"}
    ours = CLAP.from_pretrained(tmp_path / "ours")
    for model in (
        CLAP.from_pretrained(tmp_path / "new/hub"),
        CLAP.from_pretrained(tmp_path / "new/back.pt", tokenizer=tokenizer_folder),
    ):
        assert torch.equal(model.embed_audio(clips(0.5)), ours.embed_audio(clips(0.5)))
        assert torch.equal(model.embed_text(CAPTIONS), ours.embed_text(CAPTIONS))
    # a checkpoint of the one form to the other, without a folder of ours in between
    assert main(["convert", str(tmp_path / "new/hub"), str(tmp_path / "second.pt"), "--to", "clsp"]) == 0
    assert torch.equal(torch.load(tmp_path / "second.pt", weights_only=True)["model"]["logit_scale"], torch.tensor(2.5))


def small_config(**audio: Any) -> CLAPConfig:
    return CLAPConfig(
        audio=AudioTowerConfig(
            **{"kind": "zipformer", "features": "clsp", "feature_options": {"n_mels": 40}, "zipformer": SMALL, **audio}
        ),
        text=TextTowerConfig(kind="hf", hf_config=TEXT, pooling="pooler"),
        head=HeadConfig("clsp", DIM),
    )


def _changed(part: str, **fields: Any) -> CLAPConfig:
    config = small_config()
    return replace(config, **{part: replace(getattr(config, part), **fields)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (small_config(kind="log-mel", width=16, heads=2), "audio.kind is log-mel instead of zipformer"),
        (small_config(pooling="statistics"), "audio.pooling is statistics instead of mean"),
        (small_config(features="kaldi"), "audio.features is kaldi instead of clsp"),
        (
            small_config(feature_options={"n_mels": 41}),
            "audio.feature_options is {'n_mels': 41} instead of {'n_mels': 40}",
        ),
        (
            small_config(zipformer=replace(SMALL, position_width=8)),
            r"audio.zipformer.heads is \[4, 4, 4, 4\] instead of \[8, 8, 8, 8\]",
        ),
        (_changed("text", pooling="mean"), "text.pooling is mean instead of pooler"),
        (_changed("text", hf_config={**TEXT, "layer_norm_eps": 1e-12}), "layer_norm_eps is 1e-12 instead of 1e-05"),
        (
            _changed("text", kind="small", pooling="mean", width=16, heads=2, hf_config=None),
            "text.kind is small instead of hf",
        ),
        (
            _changed("text", hf_config={**TEXT, "hidden_act": "relu"}),
            "text.hf_config.hidden_act is relu instead of gelu",
        ),
        (_changed("head", kind="linear"), "head.kind is linear instead of clsp"),
        (replace(small_config(), init_logit_bias=-10.0), "init_logit_bias is -10.0 instead of None"),
    ],
)
def test_other_architectures_are_not_written(config: CLAPConfig, message: str, tmp_path: Path, capfd: Any) -> None:
    CLAP(config).save_pretrained(tmp_path / "model")
    for target in ("out.pt", "out"):
        assert main(["convert", str(tmp_path / "model"), str(tmp_path / target), "--to", "clsp"]) == 2
        line = capfd.readouterr().err.splitlines()[-1]
        assert line.startswith("fastclap: this model is not of CLSP's architecture: ")
        assert re.search(message, line), line
        assert not (tmp_path / target).exists()


def test_a_folder_that_is_there_is_kept(tmp_path: Path, capfd: Any) -> None:
    CLAP(small_config()).save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()
    flags = [str(tmp_path / "model"), str(tmp_path / "out"), "--to", "clsp"]
    assert main(["convert", *flags]) == 2
    assert "out: is there already; name a folder that is not" in capfd.readouterr().err
    assert main(["convert", *flags, "--license", "mit"]) == 2
    assert "--license goes into a model card" in capfd.readouterr().err
    assert main(["convert", *flags, "--audio-config", "n_mels", "42"]) == 2
    assert "leave --audio-config and --text-config out" in capfd.readouterr().err
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "other")]) == 2
    assert "already a fastclap model" in capfd.readouterr().err


# -- what does not fit ------------------------------------------------------------------------------------------------

_LAYER = "encoder.encoders.1.encoder.layers.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{_LAYER}.norm.log_scale": None}, rf"audio_branch\.{_LAYER}\.norm\.log_scale is missing"),
        ({f"{_LAYER}.norm.bias": None}, rf"not a checkpoint of CLSP: {_LAYER}\.norm\.bias is missing"),
        ({f"{_LAYER}.extra": (3,)}, rf"audio_branch\.{_LAYER}\.extra is not part of the model"),
        ({"text_encoder.pooler.dense.weight": None}, r"text_branch\.base\.pooler\.dense\.weight is missing"),
        ({"text_transform.sequential.3.weight": (24, 23)}, r"has the shape \(24, 23\) instead of \(24, 24\)"),
        ({f"{_LAYER}.feed_forward3.in_proj.weight": (96, 64)}, r"has the shape \(96, 64\) instead of \(120, 64\)"),
        (
            {f"{_LAYER}.self_attn_weights.in_proj.weight": (88, 64)},
            r"query_width is \[8, 9, 8, 8\]; it must be the same in all stacks",
        ),
        ({f"{_LAYER}.self_attn_weights.linear_pos.weight": (48,)}, "2 dimensions were expected"),
        ({"encoder.encoders.0.layers.0.feed_forward2.in_proj.weight": (98, 64)}, r"zipformer\.feedforward has 98"),
        ({"logit_scale": None}, "log_logit_scale is missing"),
        ({"elsewhere": (1,)}, "elsewhere is not part of the model"),
    ],
)
@pytest.mark.parametrize("form", ["hub", "icefall"])
def test_what_does_not_fit_is_named(
    form: str, change: dict[str, Any], message: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    weights = random_weights()
    for name, shape in change.items():
        weights.pop(name, None)
        if shape is not None:
            weights[name] = torch.zeros(shape)
    file = tmp_path / "hub/model.safetensors"
    if form == "hub":
        save_folder(weights, tokenizer_folder, file.parent, file.name)
    else:
        file = tmp_path / "epoch-3.pt"
        save_icefall(weights, file)
    with pytest.raises(ModelError, match=rf"{file.name}|{form}") as error:
        CLAP.from_pretrained(file.parent if form == "hub" else file, tokenizer=tokenizer_folder)
    assert re.search(message, str(error.value)), error.value


def test_damaged_malicious_and_wrong_files(tokenizer_folder: Path, tmp_path: Path) -> None:
    weights = random_weights()
    save_folder(weights, tokenizer_folder, tmp_path / "hub", "model.safetensors")
    file = tmp_path / "hub/model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated or damaged"):
        CLAP.from_pretrained(tmp_path / "hub")
    file.unlink()
    with pytest.raises(ModelError, match=r"hub: no weights \(\*\.safetensors, \*\.bin, \*\.pt\)"):
        CLAP.from_pretrained(tmp_path / "hub")
    save_icefall(weights, tmp_path / "epoch-3.pt")
    file = tmp_path / "epoch-3.pt"
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ModelError, match=r"epoch-3\.pt: not a readable torch file"):
        CLAP.from_pretrained(file, tokenizer=tokenizer_folder)

    class Runs:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"model": weights, "sampler": Runs()}, file)
    with pytest.raises(ModelError, match=r"epoch-3\.pt: refused, .*its pickle asks to run code"):
        CLAP.from_pretrained(file, tokenizer=tokenizer_folder)
    assert not (tmp_path / "ran").exists()
    torch.save({"model": {"encoder.weight": torch.zeros(2)}}, file)
    with pytest.raises(ModelError, match=r"epoch-3\.pt: .*nor CLSP \(encoder_embed.*it holds encoder\.weight"):
        CLAP.from_pretrained(file, tokenizer=tokenizer_folder)
    torch.save({"model": {name: tensor for name, tensor in weights.items() if name.startswith("encoder")}}, file)
    with pytest.raises(ModelError, match=r"epoch-3\.pt: an encoder of speech without one of text .*audio\.pretrained"):
        CLAP.from_pretrained(file, tokenizer=tokenizer_folder)
    CLAP(small_config()).save_pretrained(tmp_path / "ours")
    with pytest.raises(ModelError, match=r"model\.safetensors: the weights of a fastclap model .*; name its folder"):
        CLAP.from_pretrained(tmp_path / "ours/model.safetensors", tokenizer=tokenizer_folder)


# -- SPEAR ------------------------------------------------------------------------------------------------------------


def spear(prefix: str = "", **others: Tensor) -> dict[str, Tensor]:
    encoder = {name: tensor for name, tensor in random_weights().items() if name.startswith("encoder")}
    return {**{f"{prefix}{name}": tensor for name, tensor in encoder.items()}, **others}


def save_spear(form: str, folder: Path) -> Path:
    from safetensors.torch import save_file

    more = {"mask_emb": torch.zeros(3), "codebook.weight": torch.zeros(2, 2), "codebook.bias": torch.zeros(2)}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "its own"}')
    if form == "icefall's file":
        torch.save({"model": spear(**more)}, folder / "iter-448000-avg-2.pt")
        return folder / "iter-448000-avg-2.pt"
    if form == "folder with such a file":
        torch.save({"model": spear(**more)}, folder / "iter-448000-avg-2.pt")
    elif form == "folder":
        save_file(spear("encoder_model.", **more), folder / "model.safetensors")
        torch.save({}, folder / "another.pt")
    elif form == "folder with pytorch_model.bin":
        torch.save(spear("model.speech.", **more), folder / "pytorch_model.bin")
    else:
        save_icefall(random_weights(), folder / "epoch-3.pt")  # CLSP's own encoder is one too
        return folder / "epoch-3.pt"
    return folder


@pytest.mark.parametrize(
    "form", ["icefall's file", "folder with such a file", "folder", "folder with pytorch_model.bin", "CLSP's"]
)
def test_a_zipformer_starts_from_spear(form: str, tmp_path: Path) -> None:
    source = save_spear(form, tmp_path / "spear")
    others = "audio_projection, audio_transform, logit_scale" if form == "CLSP's" else "codebook, mask_emb"
    with pytest.warns(UserWarning, match=f"only its encoder is used, not {others}"):
        model = CLAP(small_config(pretrained=str(source))).eval()
    state = model.audio_branch.state_dict()
    for name, tensor in spear().items():
        assert torch.equal(state.pop(name), tensor), name
    assert not state
    model.save_pretrained(tmp_path / "exported")
    shutil.rmtree(tmp_path / "spear")  # which the export does not need
    again = CLAP.from_pretrained(tmp_path / "exported")
    assert torch.equal(again.embed_audio(clips(0.5)), model.embed_audio(clips(0.5)))


def test_spear_with_nothing_else_and_any_head(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    torch.save(spear(), tmp_path / "spear.pt")
    tower = ZipformerTower(small_config(pretrained=str(tmp_path / "spear.pt"), pooling="attention").audio)
    assert torch.equal(tower.state_dict()["encoder.downsample_output.bias"], spear()["encoder.downsample_output.bias"])
    assert "pooling.attention" in tower.state_dict()
    assert not [warning for warning in recwarn if "only its encoder" in str(warning.message)]


def test_spear_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []
    torch.save({"model": spear()}, tmp_path / "iter-448000-avg-2.pt")

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(tmp_path / file))
    for name in ("owner/spear", "owner/spear/iter-448000-avg-2.pt"):
        tower = ZipformerTower(small_config(pretrained=name).audio)
        assert torch.equal(tower.encoder_embed.out.bias, spear()["encoder_embed.out.bias"])
    # the safetensors file first: a repository may hold the same weights several times
    assert asked == [("owner/spear", ["model.safetensors"]), ("owner/spear", ["*.safetensors", "*.bin", "*.pt"])]


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({}, {"zipformer": WIDTHS}, r"downsampling \[1, 2, 4, 2\] \(configured: \[1, 2, 3\]\); layers \[1, 1, 2, 1\]"),
        ({}, {"zipformer": replace(SMALL, value_width=8)}, r"zipformer.* say: value_width 12 \(configured: 8\)$"),
        ({}, {"feature_options": {"n_mels": 80}}, r"feature_options say: n_mels 40 \(configured: 80\)$"),
        ({f"{_LAYER}.norm.log_scale": None}, {}, rf"{_LAYER}\.norm\.log_scale is missing"),
        ({"encoder.mask_emb": (3,)}, {}, r"encoder\.mask_emb is not part of the model"),
        ({f"{_LAYER}.conv_module2.out_proj.weight": (64, 60)}, {}, r"has the shape \(64, 60\) instead of \(64, 64\)"),
        ({"encoder_embed.conv.7.weight": None}, {}, r"not a checkpoint of SPEAR: encoder_embed\.conv\.7\.weight"),
    ],
)
def test_another_encoder_is_named(change: dict[str, Any], config: dict[str, Any], message: str, tmp_path: Path) -> None:
    weights = spear()
    for name, shape in change.items():
        weights.pop(name, None)
        if shape is not None:
            weights[name] = torch.zeros(shape)
    torch.save(weights, tmp_path / "spear.pt")
    with pytest.raises(ModelError, match=rf"spear\.pt: .*{message}"):
        ZipformerTower(small_config(pretrained=str(tmp_path / "spear.pt"), **config).audio)


def test_a_folder_without_one_file_of_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no weights \(\*\.safetensors"):
        ZipformerTower(small_config(pretrained=str(tmp_path)).audio)
    for name in ("a.pt", "b.pt"):
        torch.save(spear(), tmp_path / name)
    with pytest.raises(ModelError, match=r"name one of a\.pt, b\.pt"):
        ZipformerTower(small_config(pretrained=str(tmp_path)).audio)
    with pytest.raises(ModelError, match="absent: no such model folder"):
        ZipformerTower(small_config(pretrained="absent").audio)


# -- the command line -------------------------------------------------------------------------------------------------


def test_every_command_takes_it(tokenizer_folder: Path, tmp_path: Path, capfd: Any) -> None:
    from fastclap.data.demo_voices import write_demo

    voices = write_demo(str(tmp_path / "voices"), 2, 4, seed=3)[1]
    save_folder(random_weights(), tokenizer_folder, tmp_path / "hub", "model.safetensors")
    hub, ours = str(tmp_path / "hub"), str(tmp_path / "ours")
    assert main(["convert", hub, ours, "--license", "apache-2.0"]) == 0
    capfd.readouterr()
    rows = [json.loads(line) for line in Path(voices).read_text().splitlines()]
    files = [str(Path(voices).parent / row["relative_audio_path"]) for row in rows]
    (tmp_path / "candidates.csv").write_text(
        "id,text,audio\n" + "".join(f"{index % 2},a sad man,{file}\n" for index, file in enumerate(files))
    )
    (tmp_path / "pairs.csv").write_text(f"audio,other_audio\n{files[0]},{files[1]}\n")
    commands: dict[str, list[str]] = {
        "eval": ["--model", "MODEL", "--data", voices],
        "classify": ["--model", "MODEL", "--data", voices, "--column", "sex"],
        "rerank": ["MODEL", "--data", str(tmp_path / "candidates.csv")],
        "similarity": ["MODEL", str(tmp_path / "pairs.csv")],
    }

    def run(model: str, command: str, *flags: str) -> Any:
        words = [word.replace("MODEL", model) for word in (*commands.get(command, []), *flags)]
        assert main([command, *words, "--json"]) == 0, capfd.readouterr().err
        return json.loads(capfd.readouterr().out)

    def figures(result: Any) -> Any:
        """Without the model's name and the time that it took."""
        if isinstance(result, dict):
            return {
                k: figures(v) for k, v in result.items() if k not in ("model", "models", "index", "time", "seconds")
            }
        return [figures(item) for item in result] if isinstance(result, list) else result

    for command in commands:
        first, second = figures(run(hub, command)), figures(run(ours, command))
        assert first == second and first, command
    hits = []
    for model, name in ((hub, "hub.parquet"), (ours, "ours.parquet")):
        run("", "embed", model, voices, "--out", str(tmp_path / name))
        hits.append(figures(run("", "search", model, str(tmp_path / name), "a sad man")))
    assert hits[0] == hits[1] and hits[0]
