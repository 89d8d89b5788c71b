"""MS-CLAP's checkpoints next to MS-CLAP's own wrapper (where the package msclap is installed) and to their formulas."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap import CLAP
from fastclap.commands.main import main
from fastclap.config import AudioTowerConfig, TextTowerConfig
from fastclap.errors import ConfigError, ModelError
from fastclap.features import LogMel
from fastclap.models.audio_towers import build_audio_tower
from fastclap.models.clap import read_checkpoint
from fastclap.models.cnn14 import Cnn14
from fastclap.models.foreign.msclap import append_end
from fastclap.models.text_towers import build_text_tower
from fastclap.models.tokenizer import Tokenizer, as_tokenizer
from fastclap.testing import assert_close_rel

CAPTIONS = ["A man speaks in an angry tone.", "Stop! Now!", "Calm.", "a sad man, softly ", "!"]


def clips(*seconds: float) -> list[Tensor]:
    """Noise and tones, each clip of its own pitch."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, length in enumerate(seconds):
        time = torch.arange(round(44100 * length)) / 44100
        tone = torch.sin(2 * torch.pi * 200 * 3**number * time) * (1 + torch.sin(2 * torch.pi * 3 * time))
        found.append(0.1 * tone + 0.01 * torch.randn(time.shape, generator=generator))
    return found


def perturb(model: torch.nn.Module) -> None:
    """Norms, biases and running statistics start at constants; and a signal must not vanish on its way."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
            elif tensor.ndim == 4 and tensor.shape[2:] == (3, 3):
                torch.nn.init.kaiming_normal_(tensor, nonlinearity="relu", generator=generator)


def assert_varies(vectors: Tensor) -> None:
    """Different inputs have different embeddings, so that being close to these means something."""
    assert (vectors - vectors.mean(0)).norm() > 0.02 * vectors.norm()


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vocabulary of the form of GPT-2's: byte-level, "!" has the id 0, no padding token."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CAPTIONS * 3, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens(["<|endoftext|>"])
    folder = tmp_path_factory.mktemp("gpt2")
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizerFast

    words = sorted({word for text in CAPTIONS for word in text.lower().replace(".", "").replace(",", "").split()})
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "!", ".", *words])}
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)))
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    return folder


def gpt2(**changes: Any) -> Any:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(
        GPT2Config(**{"n_layer": 2, "initializer_range": 0.1, "vocab_size": 320, "n_positions": 90, **changes})
    ).eval()


def bert(**changes: Any) -> Any:
    from transformers import BertConfig, BertModel

    fields = {
        "num_hidden_layers": 2,
        "initializer_range": 0.1,
        "vocab_size": 60,
        "max_position_embeddings": 110,
        **changes,
    }
    return BertModel(BertConfig(**fields)).eval()


# -- the published sizes, next to MS-CLAP's own code ------------------------------------------------------------------


class OldTokenizer:
    """What MS-CLAP calls was removed from transformers 5: `encode_plus`, which cut texts at `max_length` by itself."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode_plus(self, text: str, **options: Any) -> Any:
        return self.tokenizer(text, truncation=True, **options)


@pytest.mark.parametrize("version", ["2022", "2023"])
def test_their_checkpoint_gives_their_embeddings(
    version: str, gpt2_folder: Path, bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = pytest.importorskip("msclap.CLAPWrapper", reason="msclap is not installed")
    import msclap.models.clap as theirs
    from transformers import AutoTokenizer

    folder = gpt2_folder if version == "2023" else bert_folder
    monkeypatch.setattr(theirs.AutoModel, "from_pretrained", lambda name: gpt2() if name == "gpt2" else bert())
    tokenizer = OldTokenizer(AutoTokenizer.from_pretrained(folder))
    monkeypatch.setattr(wrapper, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda name: tokenizer))

    torch.manual_seed(0)
    configuration = (Path(wrapper.__file__).parent / f"configs/config_{version}.yml").read_text()
    args = wrapper.CLAPWrapper.read_config_as_args(None, configuration, is_config_str=True)
    names = ("window_size", "hop_size", "mel_bins", "fmin", "fmax", "out_emb", "text_model")
    sizes = {name: getattr(args, name) for name in (*names, "audioenc_name", "transformer_embed_dim", "d_proj")}
    random_model = theirs.CLAP(sample_rate=args.sampling_rate, classes_num=args.num_classes, **sizes)
    perturb(random_model)
    torch.save({"model": random_model.state_dict()}, tmp_path / f"CLAP_weights_{version}.pth")
    original = wrapper.CLAPWrapper(tmp_path / f"CLAP_weights_{version}.pth", version)

    waves = clips(0.7, 2.0, args.duration, args.duration + 1.5)
    monkeypatch.setattr(wrapper.torchaudio, "load", lambda index: (waves[index][None], 44100))
    monkeypatch.setattr(random, "randrange", lambda stop: 0)  # it draws a window; ours is the first
    audio = original.get_audio_embeddings(list(range(len(waves))))
    text = original.get_text_embeddings(CAPTIONS)

    assert_varies(audio)
    assert_varies(text)

    ours = read_checkpoint(tmp_path / f"CLAP_weights_{version}.pth", tokenizer=folder)
    assert ours.sampling_rate == args.sampling_rate == 44100 and ours.config.audio.clip_seconds == args.duration
    assert ours.config.text.max_tokens == args.text_len and ours.config.head.dim == args.d_proj
    tokens = ours.tokenize(CAPTIONS)
    with torch.no_grad():
        padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
        lengths = torch.tensor([len(wave) for wave in waves])
        assert_close_rel("audio", audio, ours.encode_audio(padded, lengths), 1e-5)
        assert_close_rel("text", text, ours.encode_text(tokens["input_ids"], tokens["attention_mask"]), 1e-5)
    assert_close_rel("unit", F.normalize(audio, dim=-1), ours.embed_audio(waves, sampling_rate=44100), 1e-5)
    assert_close_rel("unit", F.normalize(text, dim=-1), ours.embed_text(CAPTIONS), 1e-5)
    torch.testing.assert_close(ours.logit_scale, original.clap.logit_scale.exp())
    ours.save_pretrained(tmp_path / "ours")
    again = CLAP.from_pretrained(tmp_path / "ours")
    assert torch.equal(again.embed_text(CAPTIONS), ours.embed_text(CAPTIONS))


# -- small ones, next to their formulas -------------------------------------------------------------------------------


def head_weights(side: str, width: int, dim: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(width)
    shapes: dict[str, tuple[int, ...]] = {"linear1.weight": (dim, width), "linear2.weight": (dim, dim)}
    shapes |= {"layer_norm.weight": (dim,), "layer_norm.bias": (dim,)}
    return {f"{side}.projection.{k}": 0.3 * torch.randn(shape, generator=generator) for k, shape in shapes.items()}


def project(weights: dict[str, Tensor], side: str, x: Tensor) -> Tensor:
    w = {k.removeprefix(f"{side}.projection."): v for k, v in weights.items() if k.startswith(f"{side}.projection.")}
    first = x @ w["linear1.weight"].T
    both = first + F.gelu(first) @ w["linear2.weight"].T
    return F.layer_norm(both, both.shape[-1:], w["layer_norm.weight"], w["layer_norm.bias"])


def panns(w: dict[str, Tensor], features: Tensor) -> Tensor:
    """Cnn14 of the paper on [B, frames, bands], from its parameters, in their own precision."""

    def norm(name: str, x: Tensor) -> Tensor:
        mean, variance, scale, shift = (
            w[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    x = norm("bn0", features.transpose(1, 2)[..., None]).permute(0, 3, 2, 1)
    for block in range(1, 7):
        for part in (1, 2):
            name = f"conv_block{block}"
            x = norm(f"{name}.bn{part}", F.conv2d(x, w[f"{name}.conv{part}.weight"], padding=1)).clamp(min=0)
        if block < 6:
            x = x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
            x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    x = x.mean(3)
    x = x.max(2).values + x.mean(2)
    return (x @ w["fc1.weight"].T + w["fc1.bias"]).clamp(min=0)


def windows(waves: list[Tensor], seconds: int) -> Tensor:
    """Each clip repeated and cut to the window."""
    return torch.stack([wave.repeat(-(-44100 * seconds // len(wave)))[: 44100 * seconds] for wave in waves])


def msclap_2022(folder: Path) -> tuple[Path, dict[str, Tensor], Any]:
    torch.manual_seed(0)
    tower, text = Cnn14(64, 2, 24), bert(hidden_size=64, num_attention_heads=1, intermediate_size=48)
    perturb(tower)
    perturb(text)
    weights = {f"audio_encoder.base.{name}": tensor for name, tensor in tower.state_dict().items()}
    weights |= {f"caption_encoder.base.{name}": tensor for name, tensor in text.state_dict().items()}
    weights |= head_weights("audio_encoder", 24, 16) | head_weights("caption_encoder", 64, 16)
    weights |= {"logit_scale": torch.tensor(3.0), "audio_encoder.base.fc_audioset.bias": torch.zeros(5)}
    weights["audio_encoder.base.spectrogram_extractor.stft.conv_real.weight"] = torch.zeros(5)
    torch.save({"model": weights}, folder / "CLAP_weights_2022.pth")
    return folder / "CLAP_weights_2022.pth", weights, text


def msclap_2023(folder: Path) -> tuple[Path, dict[str, Tensor], Any, Any]:
    """With the HTSAT of transformers, under the original names."""
    from transformers import ClapAudioConfig, ClapAudioModel

    torch.manual_seed(0)
    fields = {"patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 2], "num_attention_heads": [1, 2]}
    tower, text = ClapAudioModel(ClapAudioConfig(**fields)).eval(), gpt2(n_embd=64, n_head=1)
    perturb(tower)
    perturb(text)
    state = {k.removeprefix("audio_encoder."): v for k, v in tower.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".self.key." in name or ".self.value." in name:
            continue
        if ".self.query." in name:
            tensor = torch.cat([state[name.replace("query", part)] for part in ("query", "key", "value")])
        for new, old in (
            ("batch_norm.", "bn0."),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("attention.self.query", "attn.qkv"),
            ("attention.self.relative", "attn.relative"),
            ("attention.output.dense", "attn.proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ):
            name = name.replace(new, old)
        weights[f"audio_encoder.base.htsat.{name}"] = tensor
    weights |= {f"caption_encoder.base.{name}": tensor for name, tensor in text.state_dict().items()}
    weights["caption_encoder.base.h.0.attn.bias"] = torch.ones(1, 1, 90, 90)  # as old releases of transformers
    weights["caption_encoder.base.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    weights |= head_weights("audio_encoder", 16, 12) | head_weights("caption_encoder", 64, 12)
    weights |= {"logit_scale": torch.tensor(3.0), "audio_encoder.base.htsat.tscam_conv.bias": torch.zeros(5)}
    torch.save({"model": weights}, folder / "CLAP_weights_2023.pth")
    return folder / "CLAP_weights_2023.pth", weights, tower, text


def test_2022_is_its_formula(bert_folder: Path, tmp_path: Path) -> None:
    path, weights, text = msclap_2022(tmp_path)
    ours = CLAP.from_pretrained(path, tokenizer=bert_folder)
    waves = clips(0.3, 4.0, 6.0)
    features, _ = LogMel("clap", sampling_rate=44100, hop_length=320)(windows(waves, 5))
    tower = {k.removeprefix("audio_encoder.base."): v.double() for k, v in weights.items()}
    double = {name: tensor.double() for name, tensor in weights.items()}
    expected = project(double, "audio_encoder", panns(tower, features.double()))
    with torch.no_grad():
        tokens = ours.tokenize(CAPTIONS)
        first = text(**tokens).last_hidden_state[:, 0]
        texts = project(weights, "caption_encoder", first)
    assert_varies(expected)
    assert_varies(texts)
    assert_close_rel("audio", F.normalize(expected, dim=1), ours.embed_audio(waves, sampling_rate=44100), 1e-5)
    assert_close_rel("text", F.normalize(texts, dim=1), ours.embed_text(CAPTIONS), 1e-5)
    assert ours.config.audio.kind == "cnn14" and ours.config.text.max_tokens == 100
    assert ours.log_logit_scale.item() == 3.0


@pytest.mark.parametrize("integers", ["kept", "floats", "absent"])
def test_2023_is_its_formula(integers: str, gpt2_folder: Path, tmp_path: Path) -> None:
    """The released file holds floating-point numbers alone."""
    path, weights, tower, text = msclap_2023(tmp_path)
    if integers != "kept":
        count = len(weights)
        weights = {k: v.float() for k, v in weights.items() if integers == "floats" or v.is_floating_point()}
        assert len(weights) == count - (4 if integers == "absent" else 0)
        torch.save({"model": weights}, path)
    ours = CLAP.from_pretrained(path, tokenizer=gpt2_folder)
    waves = clips(0.3, 4.0, 8.0)
    log_mel = LogMel("clap", sampling_rate=44100, hop_length=320, mel_sampling_rate=32000)
    with torch.no_grad():
        features, _ = log_mel(windows(waves, 7))
        audio = project(weights, "audio_encoder", tower(features[:, None]).pooler_output)
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(gpt2_folder)([f"{caption} <|endoftext|>" for caption in CAPTIONS]).input_ids
        last = [text(torch.tensor([row])).last_hidden_state[0, sum(token != 0 for token in row) - 1] for row in ids]
        texts = project(weights, "caption_encoder", torch.stack(last))
    assert_varies(audio)
    assert_varies(texts)
    assert_close_rel("audio", F.normalize(audio, dim=1), ours.embed_audio(waves, sampling_rate=44100), 1e-5)
    assert_close_rel("text", F.normalize(texts, dim=1), ours.embed_text(CAPTIONS), 1e-5)
    ours.save_pretrained(tmp_path / "ours")  # with the tokenizer that puts the end after each caption
    assert_close_rel(
        "text", F.normalize(texts, dim=1), CLAP.from_pretrained(tmp_path / "ours").embed_text(CAPTIONS), 1e-5
    )


def test_the_end_is_kept_where_a_caption_is_cut(gpt2_folder: Path) -> None:
    tokenizer = as_tokenizer(str(gpt2_folder), append_end)
    end = tokenizer.backend.token_to_id("<|endoftext|>")
    row = tokenizer(["a b c d e f g h i j k"], 6)["input_ids"][0]
    assert len(row) == 6 and row[-1] == end
    twice = as_tokenizer(tokenizer, append_end)
    assert twice is not tokenizer
    assert torch.equal(twice(CAPTIONS, 77)["input_ids"], tokenizer(CAPTIONS, 77)["input_ids"])


def test_a_tokenizer_that_is_not_gpt2s(bert_folder: Path, tmp_path: Path) -> None:
    path, *_ = msclap_2023(tmp_path)
    with pytest.raises(ModelError, match=r"not the tokenizer of GPT-2.*CLAP_weights_2023\.pth"):
        CLAP.from_pretrained(path, tokenizer=bert_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_encoder.base.conv_block3.bn2.weight": None}, r"conv_block3\.bn2\.weight is missing"),
        ({"audio_encoder.base.conv_block1.conv1.weight": None}, "its audio tower is neither HTSAT nor Cnn14"),
        ({"caption_encoder.base.encoder.layer.0.extra": (2,)}, r"layer\.0\.extra is not part of the model"),
        ({"caption_encoder.base.embeddings.word_embeddings.weight": None}, r"word_embeddings\.weight is missing"),
        ({"caption_encoder.projection.linear1.weight": (16, 63)}, r"has the shape \(16, 63\) instead of \(16, 64\)"),
        ({"audio_encoder.base.logmel_extractor.melW": (513, 64)}, r"melW is no mel filter bank that MS-CLAP is known"),
    ],
)
def test_what_does_not_fit_is_named(bert_folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path, weights, _ = msclap_2022(tmp_path)
    for name, shape in change.items():
        weights.pop(name, None)
        if shape is not None:
            weights[name] = torch.zeros(shape)
    torch.save({"model": weights}, path)
    with pytest.raises(ModelError, match=rf"CLAP_weights_2022\.pth.*{message}"):
        CLAP.from_pretrained(path, tokenizer=bert_folder)


def test_the_filter_bank_is_the_one_that_the_file_holds(gpt2_folder: Path, tmp_path: Path) -> None:
    import librosa

    path, weights, *_ = msclap_2023(tmp_path)
    name = "audio_encoder.base.htsat.logmel_extractor.melW"
    for rate, f_max, options in ((32000, 14000, {"mel_sampling_rate": 32000}), (44100, 8000, {"f_max": 8000.0})):
        weights[name] = torch.from_numpy(librosa.filters.mel(sr=rate, n_fft=1024, n_mels=64, fmin=50, fmax=f_max).T)
        torch.save({"model": weights}, path)
        read = CLAP.from_pretrained(path, tokenizer=gpt2_folder).config.audio.feature_options
        assert read == {"sampling_rate": 44100, "hop_length": 320, **options}


class Runs:
    """A pickle that runs code."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


def test_damaged_malicious_and_other_files(bert_folder: Path, tmp_path: Path) -> None:
    path, weights, _ = msclap_2022(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"CLAP_weights_2022\.pth: not a readable torch file"):
        CLAP.from_pretrained(path, tokenizer=bert_folder)
    torch.save({"model": weights, "hook": Runs(tmp_path / "ran")}, path)
    with pytest.raises(ModelError, match="its pickle asks to run code"):
        CLAP.from_pretrained(path, tokenizer=bert_folder)
    assert not (tmp_path / "ran").exists()
    torch.save({"model": {"clap.base.htsat.bn0.weight": torch.zeros(2), "clap_project.x": torch.zeros(2)}}, path)
    with pytest.raises(ModelError, match="MS-CLAP's captioner, which embeds no text; use CLAP_weights_2023"):
        CLAP.from_pretrained(path)
    torch.save({"model": weights}, path)
    with pytest.raises(ModelError, match="audio_config has no meaning for Cnn14"):
        read_checkpoint(path, tokenizer=bert_folder, audio_config={"depths": [1]})


def test_convert(bert_folder: Path, tmp_path: Path, capfd: Any) -> None:
    path, *_ = msclap_2022(tmp_path)
    target = tmp_path / "out"
    assert main(["convert", str(path), str(target), "--tokenizer", str(bert_folder), "--license", "mit"]) == 0
    assert f"16 dimensions, 44100 Hz: {target}" in capfd.readouterr().out
    card = (target / "README.md").read_text()
    assert "MS-CLAP checkpoint `CLAP_weights_2022.pth`" in card and "Cnn14" in card


def test_one_file_of_a_hub_repository(bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    path, *_ = msclap_2022(tmp_path)
    wanted: list[tuple[str, str]] = []

    def download(repository: str, file: str) -> str:
        wanted.append((repository, file))
        if "absent" in repository:
            raise OSError("404")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = CLAP.from_pretrained("microsoft/msclap/CLAP_weights_2022.pth", tokenizer=bert_folder)
    assert model.config.audio.kind == "cnn14"
    with pytest.raises(ModelError, match=r"absent/clap/a\.pt: no such folder or file, and it cannot be fetched .*404"):
        CLAP.from_pretrained("absent/clap/a.pt")
    assert wanted == [("microsoft/msclap", "CLAP_weights_2022.pth"), ("absent/clap", "a.pt")]


# -- the parts --------------------------------------------------------------------------------------------------------


def test_cnn14_trains_every_parameter() -> None:
    torch.manual_seed(0)
    config = AudioTowerConfig("cnn14", clip_seconds=1.0, convolution_channels=2, width=8, repeat="cut")
    tower = build_audio_tower(config).train()
    tower(torch.randn(3, 30000), torch.tensor([30000, 100, 29999])).square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AudioTowerConfig("cnn14", clip_seconds=0.1), "cnn14 needs 32 frames and bands at least, not 11 and 64"),
        (AudioTowerConfig("cnn14", feature_options={"n_melts": 3}), "no option 'n_melts'"),
        (AudioTowerConfig("cnn14", freeze_layers=1), "no layers that are known"),
        (AudioTowerConfig("clap-htsat", hf_config={}, clip_seconds=20.0), "2001 frames of 20.0 s, but .* takes 1024"),
    ],
)
def test_impossible_windows(config: AudioTowerConfig, message: str) -> None:
    from fastclap.config import CLAPConfig

    with pytest.raises(ConfigError, match=message):
        CLAP(CLAPConfig(audio=config))


def test_pooling_of_the_last_token() -> None:
    torch.manual_seed(0)
    fields = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 10, "use_cache": False}
    ids = torch.tensor([[3, 0, 4, 5, 0], [6, 7, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    for pooling, places in (("last", (3, 1)), ("msclap", (2, 1))):
        tower: Any = build_text_tower(TextTowerConfig("hf", hf_config=fields, pooling=pooling)).eval()  # type: ignore[arg-type]
        with torch.no_grad():
            states = tower.base(ids).last_hidden_state
            expected = torch.stack([states[0, places[0]], states[1, places[1]]])
            torch.testing.assert_close(tower(ids, mask), expected)
            torch.testing.assert_close(tower(ids, mask, [4, 2]), expected)
    with pytest.raises(ConfigError, match="pooling 'last' needs an encoder of transformers"):
        build_text_tower(TextTowerConfig(pooling="last"))


def test_a_tokenizer_needs_no_padding_token_where_one_is_given(gpt2_folder: Path) -> None:
    with pytest.raises(ModelError, match="no padding token"):
        Tokenizer.from_pretrained(str(gpt2_folder))
    assert isinstance(as_tokenizer(gpt2_folder / "tokenizer.json", append_end), Tokenizer)
