"""VoiceCLAP-Small next to its definition, and to open_clip's Whisper encoder where that package has one.

Its own code is part of its hub repository and is not run; the definition is that of OpenAI's Whisper, of BERT, and of
what its card says about pooling and projections.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap import CLAP
from fastclap.commands.main import main
from fastclap.config import CLAPConfig
from fastclap.errors import ModelError
from fastclap.models.clap import read_checkpoint
from fastclap.models.foreign import ForeignWeights
from fastclap.models.foreign.voiceclap import read_voiceclap
from fastclap.models.tokenizer import Tokenizer
from fastclap.testing import assert_close_rel

CAPTIONS = ["A man speaks in an angry tone.", "A woman sounds sad.", "Calm.", "A sad man, softly."]
PUBLISHED_PARAMETERS = 113_170_898
PUBLISHED_CONFIG = {
    "architectures": ["VoiceCLAPSmall"],
    "embed_dim": 768,
    "model_type": "voiceclap-small",
    "n_ctx": 1500,
    "n_head": 12,
    "n_layer": 12,
    "n_mels": 80,
    "n_state": 768,
    "text_hidden_dim": 384,
    "text_intermediate_size": 1536,
    "text_layer_norm_eps": 1e-12,
    "text_max_position_embeddings": 512,
    "text_num_heads": 12,
    "text_num_layers": 6,
    "text_pad_token_id": 0,
    "text_proj_hidden": 576,
    "text_vocab_size": 30522,
    "auto_map": {"AutoModel": "modeling_voiceclap.VoiceCLAPSmall"},
}


def shapes(
    width: int, layers: int, dim: int, hidden: int, text_layers: int, vocabulary: int, inner: int
) -> dict[str, Any]:
    """Parameters by their published names, without the buffers."""
    found: dict[str, Any] = {"audio_encoder.conv1.weight": (width, 80, 3), "audio_encoder.conv1.bias": (width,)}
    found |= {"audio_encoder.conv2.weight": (width, width, 3), "audio_encoder.conv2.bias": (width,)}

    def linear(name: str, outer: int, inner: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = (outer, inner)
        if bias:
            found[f"{name}.bias"] = (outer,)

    def norm(name: str, size: int) -> None:
        found.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    for index in range(layers):
        block = f"audio_encoder.blocks.{index}"
        for part in ("query", "key", "value", "out"):
            linear(f"{block}.attn.{part}", width, width, part != "key")
        norm(f"{block}.attn_ln", width)
        linear(f"{block}.mlp.0", 4 * width, width)
        linear(f"{block}.mlp.2", width, 4 * width)
        norm(f"{block}.mlp_ln", width)
    norm("audio_encoder.ln_post", width)
    linear("audio_encoder.proj", dim, width)
    linear("audio_proj.0", dim, dim)
    linear("audio_proj.2", dim, dim)
    text = "text_encoder.embeddings"
    found |= {
        f"{text}.word_embeddings.weight": (vocabulary, hidden),
        f"{text}.position_embeddings.weight": (512, hidden),
    }
    found |= {f"{text}.token_type_embeddings.weight": (2, hidden)}
    norm(f"{text}.LayerNorm", hidden)
    for index in range(text_layers):
        layer = f"text_encoder.encoder.layer.{index}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{layer}.attention.{part}", hidden, hidden)
        norm(f"{layer}.attention.output.LayerNorm", hidden)
        linear(f"{layer}.intermediate.dense", inner, hidden)
        linear(f"{layer}.output.dense", hidden, inner)
        norm(f"{layer}.output.LayerNorm", hidden)
    linear("text_proj.0", (hidden + dim) // 2, hidden, bias=False)
    linear("text_proj.2", dim, (hidden + dim) // 2, bias=False)
    return found | {"logit_scale": (), "logit_bias": ()}


SMALL = {"width": 128, "layers": 2, "dim": 24, "hidden": 64, "text_layers": 2, "vocabulary": 60, "inner": 48}


def small_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes(**SMALL).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name.lower() or "_ln." in name or "ln_post" in name:
            weights[name] = 0.1 * noise + (1 if name.endswith("weight") else 0)
        else:
            weights[name] = noise * (math.prod(shape[1:]) or 1) ** -0.5 if len(shape) > 1 else 0.1 * noise
    weights |= {"logit_scale": torch.tensor(2.5), "logit_bias": torch.tensor(-9.0)}
    weights["audio_encoder.positional_embedding"] = sinusoids(1500, SMALL["width"])
    weights["mel_filters"] = bank("slaney")
    return weights


def bank(scale: str) -> Tensor:
    """80 filters on OpenAI's scale, which is Slaney's, or on HTK's, as in open_clip."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(201, 80, 0.0, 8000.0, 16000, norm="slaney", mel_scale=scale)
    return torch.from_numpy(filters).float().T.contiguous()


def sinusoids(length: int, width: int) -> Tensor:
    """Whisper's positions: sines in the first half of the channels, cosines in the second."""
    rates = torch.exp(-math.log(10000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def whisper(w: dict[str, Tensor], features: Tensor, heads: int) -> Tensor:
    """OpenAI's encoder on [B, mels, 3000] with open_clip's average of two positions; [B, 750, dim]."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"audio_encoder.{name}.weight"], w.get(f"audio_encoder.{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"audio_encoder.{name}.weight"], w[f"audio_encoder.{name}.bias"])

    def convolve(name: str, x: Tensor, stride: int) -> Tensor:
        weight, bias = w[f"audio_encoder.{name}.weight"], w[f"audio_encoder.{name}.bias"]
        return F.gelu(F.conv1d(x, weight, bias, stride, padding=1))

    x = convolve("conv2", convolve("conv1", features, 1), 2).transpose(1, 2) + w["audio_encoder.positional_embedding"]
    for index in range(SMALL["layers"]):
        y = norm(f"blocks.{index}.attn_ln", x)
        q, k, v = (
            linear(f"blocks.{index}.attn.{part}", y).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(f"blocks.{index}.attn.out", attention.transpose(1, 2).flatten(2))
        y = F.gelu(linear(f"blocks.{index}.mlp.0", norm(f"blocks.{index}.mlp_ln", x)))
        x = x + linear(f"blocks.{index}.mlp.2", y)
    return linear("proj", norm("ln_post", (x[:, ::2] + x[:, 1::2]) / 2))


def project(w: dict[str, Tensor], x: Tensor) -> Tensor:
    x = F.gelu(F.linear(x, w["audio_proj.0.weight"], w["audio_proj.0.bias"]))
    return F.linear(x, w["audio_proj.2.weight"], w["audio_proj.2.bias"])


def audio_of(w: dict[str, Tensor], wave: Tensor, encode: Any) -> Tensor:
    """Unit vector of a clip: windows of 30 s, their vectors made unit vectors, the mean of these made one."""
    from transformers import WhisperFeatureExtractor

    extractor, vectors = WhisperFeatureExtractor(), []
    extractor.mel_filters = w["mel_filters"].double().numpy().T
    for begin in range(0, len(wave), 480000):
        window = wave[begin : begin + 480000].numpy()
        features = extractor(window, sampling_rate=16000, return_tensors="pt").input_features
        vectors.append(F.normalize(project(w, encode(features, window).mean(1)), dim=1))
    return F.normalize(torch.cat(vectors).mean(0), dim=0)


def text_of(w: dict[str, Tensor], tokens: dict[str, Tensor]) -> Tensor:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    model = BertModel(config, add_pooling_layer=False).eval()
    model.load_state_dict({k.removeprefix("text_encoder."): v for k, v in w.items() if k.startswith("text_encoder.")})
    mask = tokens["attention_mask"][..., None]
    mean = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
    return F.normalize(F.gelu(mean @ w["text_proj.0.weight"].T) @ w["text_proj.2.weight"].T, dim=1)


def clips(*seconds: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(round(16000 * length), generator=generator) for length in seconds]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizerFast

    words = sorted({word for text in CAPTIONS for word in text.lower().replace(".", "").replace(",", "").split()})
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", ",", *words])}
    folder = tmp_path_factory.mktemp("bert")
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    return folder


def save_folder(weights: dict[str, Tensor], bert_folder: Path, folder: Path, **config: Any) -> None:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    for item in bert_folder.iterdir():
        (folder / item.name).write_bytes(item.read_bytes())
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    data = {**PUBLISHED_CONFIG, "n_head": 2, "text_num_heads": 2, **config}
    (folder / "config.json").write_text(json.dumps(data))
    (folder / "modeling_voiceclap.py").write_text("raise SystemExit('this was run')")


# -- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*mel filters contain no DFT bin")
@pytest.mark.parametrize("scale", ["slaney", "htk"])
def test_both_forms_are_their_definition(scale: str, bert_folder: Path, tmp_path: Path) -> None:
    weights = {**small_weights(), "mel_filters": bank(scale)}
    save_folder(weights, bert_folder, tmp_path / "hub")
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "voiceclap.pth")
    waves = clips(1.3, 31.0)
    with torch.no_grad():
        audio = torch.stack([audio_of(weights, wave, lambda x, _: whisper(weights, x, 2)) for wave in waves])
    assert (audio - audio.mean(0)).norm() > 0.02 * audio.norm()  # different clips have different vectors
    for ours in (
        CLAP.from_pretrained(tmp_path / "hub"),
        CLAP.from_pretrained(tmp_path / "hub/model.safetensors", tokenizer=bert_folder),
        CLAP.from_pretrained(tmp_path / "voiceclap.pth", tokenizer=bert_folder),
    ):
        assert_close_rel("audio", audio, ours.embed_audio(waves), 1e-5)
        with torch.no_grad():
            text = text_of(weights, ours.tokenize(CAPTIONS))
        assert_close_rel("text", text, ours.embed_text(CAPTIONS), 1e-5)
        assert ours.log_logit_scale.item() == 2.5
        assert ours.logit_bias is not None and ours.logit_bias.item() == -9.0
        assert ours.sampling_rate == 16000 and ours.config.text.max_tokens == 128
    ours.save_pretrained(tmp_path / "ours")
    assert_close_rel("text", text, CLAP.from_pretrained(tmp_path / "ours").embed_text(CAPTIONS), 1e-5)


@pytest.mark.filterwarnings("ignore:.*mel filters contain no DFT bin")
def test_open_clips_encoder(bert_folder: Path, tmp_path: Path) -> None:
    """The encoder that VoiceCLAP was trained with, which makes its own log-mels."""
    spec = importlib.util.find_spec("open_clip")  # which is not imported: it needs torchvision
    file = Path(spec.origin).parent / "audio/whisper.py" if spec is not None and spec.origin else Path("absent")
    if not file.is_file():
        pytest.skip("no open_clip with a Whisper encoder is installed")
    module = importlib.util.spec_from_file_location("open_clip_whisper", file)
    assert module is not None and module.loader is not None
    theirs: Any = importlib.util.module_from_spec(module)
    module.loader.exec_module(theirs)
    weights = {**small_weights(), "mel_filters": theirs.mel_filters("cpu").float()}
    save_folder(weights, bert_folder, tmp_path / "hub")
    encoder = theirs.WhisperEncoder(80, 1500, 128, 2, 2, output_dim=24, add_audio_bos_eos_token=False).eval()
    names = {name.removeprefix("audio_encoder."): name for name in weights if name.startswith("audio_encoder.")}
    encoder.load_state_dict({short: weights[name] for short, name in names.items()})

    def encode(_: Tensor, window: Any) -> Tensor:
        padded = F.pad(torch.from_numpy(window), (0, 480000 - len(window)))
        return encoder({"waveform": padded[None]})["embedding"]

    waves = clips(1.3, 31.0)
    with torch.no_grad():
        audio = torch.stack([audio_of(weights, wave, encode) for wave in waves])
    assert_close_rel("audio", audio, CLAP.from_pretrained(tmp_path / "hub").embed_audio(waves), 1e-5)


def test_the_published_size_has_the_published_count() -> None:
    """The hub counts what model.safetensors holds: parameters, and as buffers the positions and the filter bank."""
    published = shapes(768, 12, 768, 384, 6, 30522, 1536)
    published |= {"audio_encoder.positional_embedding": (1500, 768), "mel_filters": (80, 201)}
    assert sum(math.prod(shape) for shape in published.values()) == PUBLISHED_PARAMETERS
    filters = bank("slaney")
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in published.items()}
        read = read_voiceclap(ForeignWeights(Path("x"), "VoiceCLAP", {**weights, "mel_filters": filters}), {}, {})
        model = CLAP(read.config, load_pretrained=False)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in read.weights.items()}
    assert sum(tensor.numel() for tensor in read.weights.values()) + filters.numel() == PUBLISHED_PARAMETERS
    audio, text = read.config.audio.hf_config or {}, read.config.text.hf_config or {}
    assert audio["encoder_attention_heads"] == 12 and text["num_attention_heads"] == 12
    assert CLAPConfig.from_dict(read.config.to_dict()) == read.config


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"audio_encoder.blocks.1.attn.key.bias": (128,)},
            r"layers\.1\.self_attn\.k_proj\.bias is not part of the model",
        ),
        ({"audio_encoder.blocks.1.mlp_ln.bias": None}, r"layers\.1\.final_layer_norm\.bias is missing"),
        ({"audio_proj.2.weight": None}, r"not a checkpoint of VoiceCLAP: audio_proj\.2\.weight is missing"),
        ({"text_proj.0.weight": (45, 64)}, r"text_projection\.linear1\.weight has the shape \(45, 64\) instead of"),
        ({"text_encoder.pooler.dense.weight": (64, 64)}, r"pooler\.dense\.weight is not part of the model"),
        ({"mel_filters": (80, 201)}, "mel_filters is no mel filter bank that VoiceCLAP is known"),
        ({"logit_bias": None}, "logit_bias is missing"),
    ],
)
def test_what_does_not_fit_is_named(bert_folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    weights = small_weights()
    for name, shape in change.items():
        weights.pop(name, None)
        if shape is not None:
            weights[name] = torch.zeros(shape)
    save_folder(weights, bert_folder, tmp_path / "hub")
    with pytest.raises(ModelError, match=rf"model\.safetensors.*{message}|{message}"):
        CLAP.from_pretrained(tmp_path / "hub")


def test_damaged_and_malicious_files(bert_folder: Path, tmp_path: Path) -> None:
    weights = small_weights()
    save_folder(weights, bert_folder, tmp_path / "hub")
    file = tmp_path / "hub/model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated or damaged"):
        CLAP.from_pretrained(tmp_path / "hub")
    file.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: no such weights file"):
        CLAP.from_pretrained(tmp_path / "hub")

    class Runs:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "ran"), "w")

    torch.save({**weights, "x": Runs()}, tmp_path / "voiceclap.pth")
    with pytest.raises(ModelError, match="its pickle asks to run code"):
        read_checkpoint(tmp_path / "voiceclap.pth", tokenizer=Tokenizer.from_pretrained(str(bert_folder)))
    assert not (tmp_path / "ran").exists()


def test_convert(bert_folder: Path, tmp_path: Path, capfd: Any) -> None:
    save_folder(small_weights(), bert_folder, tmp_path / "hub")
    assert main(["convert", str(tmp_path / "hub"), str(tmp_path / "out"), "--license", "cc-by-4.0"]) == 0
    assert f"24 dimensions, 16000 Hz: {tmp_path / 'out'}" in capfd.readouterr().out
    assert "VoiceCLAP checkpoint `hub`" in (tmp_path / "out/README.md").read_text()
