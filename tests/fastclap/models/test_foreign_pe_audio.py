"""PE-AV's audio and text towers next to transformers' `PeAudioModel`, on the same waveforms and tokens.

Meta's own code takes part where FASTCLAP_PERCEPTION_MODELS names a checkout of facebookresearch/perception_models.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclap import CLAP
from fastclap.commands.main import main
from fastclap.config import AudioTowerConfig, CLAPConfig, TextTowerConfig
from fastclap.errors import ConfigError, ModelError
from fastclap.models.audio_towers import build_audio_tower
from fastclap.models.clap import read_checkpoint
from fastclap.models.folder import FOREIGN_TYPES
from fastclap.models.foreign import _FOLDERS
from fastclap.models.pe_audio import reflect_to_frames
from fastclap.models.tokenizer import train_tokenizer
from fastclap.testing import assert_close_rel

CAPTIONS = ["A man speaks in an angry tone.", "A woman sounds sad.", "Calm.", "A sad man, softly."]
DAC = {"encoder_hidden_size": 4, "downsampling_ratios": [2, 8, 10, 12], "codebook_dim": 6, "hidden_size": 8}
AUDIO: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
}
AUDIO |= {"dac_config": DAC}
TEXT: dict[str, Any] = {"model_type": "modernbert", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 2, "vocab_size": 400, "max_position_embeddings": 64, "pad_token_id": 0}
TEXT |= {"initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}


def pe_audio() -> Any:
    from transformers import PeAudioConfig, PeAudioModel

    torch.manual_seed(0)
    model = PeAudioModel(PeAudioConfig(text_config=dict(TEXT), audio_config={**AUDIO, "dac_config": dict(DAC)})).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1 or name.endswith("alpha"):  # norms, biases and Snake's start at constants
                tensor.add_(0.2 * torch.rand_like(tensor))
            elif "dac_encoder" in name or "bottleneck" in name:
                nn.init.normal_(tensor, std=tensor[0].numel() ** -0.5)
        model.text_audio_logit_scale.fill_(3.0)
        model.text_audio_logit_bias.fill_(-2.0)
    return model


def clips(*seconds: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(round(48000 * length), generator=generator) for length in seconds]


def expected(model: Any, waves: list[Tensor], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Of transformers' own feature extractor and model, clip by clip; text before the final norm, as in Meta's code."""
    from transformers import PeAudioFeatureExtractor

    extractor = PeAudioFeatureExtractor()
    audio = []
    with torch.no_grad():
        for wave in waves:
            inputs = extractor(wave.numpy(), sampling_rate=48000, return_tensors="pt")
            audio.append(model.get_audio_embeds(inputs["input_values"], inputs["padding_mask"]))
        norm, model.text_model.final_norm = model.text_model.final_norm, nn.Identity()
        tokens = tokenizer(CAPTIONS, 64)
        text = model.text_audio_head(model.text_model(**tokens).last_hidden_state[:, 0])
        model.text_model.final_norm = norm
    return torch.cat(audio), text


def save(model: Any, folder: Path, **config: Any) -> None:
    model.save_pretrained(folder)
    train_tokenizer(CAPTIONS, 400).save(folder / "tokenizer.json")
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **config}))


def as_audio_video(folder: Path, *, text_under: str = "text_model.", audio_under: str = "audio_model.") -> None:
    """The folder of a `PeAudioModel` as that of a `PeAudioVideoModel`, with some of what else that holds."""
    from safetensors.torch import load_file, save_file

    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.startswith("text_model."):
            weights[text_under + name.removeprefix("text_model.")] = tensor
        else:
            name = f"audio_model.{name}"
            weights[name.replace("audio_model.audio_encoder.", f"{audio_under}audio_encoder.")] = tensor
    weights |= {"video_model.video_encoder.norm.weight": torch.zeros(3), "audio_plus_text_logit_scale": torch.zeros(1)}
    weights["audio_video_encoder.embedder.video_norm.weight"] = torch.zeros(3)
    weights["audio_plus_text_head.proj.weight"] = torch.zeros(2, 2)
    names = sorted(weights)
    for part, chosen in enumerate((names[::2], names[1::2])):  # in shards, as larger models are
        some = {name: weights[name].contiguous() for name in chosen}
        save_file(some, folder / f"model-0000{part + 1}-of-00002.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    data = json.loads((folder / "config.json").read_text())
    new = {"model_type": "pe_audio_video", "architectures": ["PeAudioVideoModel"], "text_config": data["text_config"]}
    new["audio_video_config"] = {"audio_config": data["audio_config"], "video_config": {"hidden_size": 3}}
    (folder / "config.json").write_text(json.dumps(new))


@pytest.mark.parametrize("form", ["pe_audio", "pe_audio_video", "tied elsewhere"])
def test_a_folder_gives_their_embeddings(form: str, tmp_path: Path) -> None:
    model, tokenizer = pe_audio(), train_tokenizer(CAPTIONS, 400)
    folder = tmp_path / "pe"
    save(model, folder)
    if form == "pe_audio_video":
        as_audio_video(folder)
    elif form == "tied elsewhere":
        as_audio_video(folder, text_under="audio_model.text_model.", audio_under="audio_video_encoder.embedder.")
    ours = CLAP.from_pretrained(folder)
    waves = clips(0.5, 0.53, 0.24)  # whole frames or not
    audio, text = expected(model, waves, tokenizer)
    for vectors in (audio, text):  # different inputs have different ones
        assert (vectors - vectors.mean(0)).norm() > 0.02 * vectors.norm()
    tokens = ours.tokenize(CAPTIONS)
    with torch.no_grad():
        for wave, vector in zip(waves, audio, strict=True):
            assert_close_rel("audio", vector[None], ours.encode_audio(wave[None]), 1e-5)
        assert_close_rel("text", text, ours.encode_text(tokens["input_ids"], tokens["attention_mask"]), 1e-5)
    assert_close_rel("unit", F.normalize(audio, dim=1), ours.embed_audio(waves, sampling_rate=48000), 1e-5)
    assert_close_rel("unit", F.normalize(text, dim=1), ours.embed_text(CAPTIONS), 1e-5)
    assert ours.config.text.max_tokens == 64 and ours.config.head.dim == 16
    assert ours.logit_scale.item() == pytest.approx(3.0)
    assert ours.logit_bias is not None and ours.logit_bias.item() == -2.0
    ours.save_pretrained(tmp_path / "ours")
    again = CLAP.from_pretrained(tmp_path / "ours")
    assert torch.equal(
        again.embed_audio(waves[:1], sampling_rate=48000), ours.embed_audio(waves[:1], sampling_rate=48000)
    )


def test_metas_own_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names are those before the conversion to transformers; what it imports for images is not needed here."""
    checkout = os.environ.get("FASTCLAP_PERCEPTION_MODELS")
    if not checkout:
        pytest.skip("FASTCLAP_PERCEPTION_MODELS names no checkout of perception_models")
    monkeypatch.syspath_prepend(checkout)
    absent = ["xformers", "xformers.ops", "core.vision_encoder", "core.vision_encoder.pe"]
    absent += ["core.audio_visual_encoder.transforms"]
    for name in absent:
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    pe = importlib.import_module("core.audio_visual_encoder.pe")
    config = importlib.import_module("core.audio_visual_encoder.config")
    model = pe_audio()
    save(model, tmp_path / "pe")
    audio = {name: AUDIO[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    sizes = config.AudioEncoderConfig(
        {**DAC, "codebook_size": DAC["hidden_size"]}, {**audio, "num_attention_heads": AUDIO["num_attention_heads"]}
    )
    theirs, head = pe.AudioEncoder(sizes).eval(), pe.ContrastiveHead(AUDIO["hidden_size"], TEXT["hidden_size"])
    weights = {}
    for name, tensor in model.audio_encoder.state_dict().items():
        for new, old in (
            ("embedder.dac_encoder.", "dac_vae_encoder.encoder."),
            ("embedder.bottleneck.", "dac_vae_encoder.bottleneck.in_proj."),
            ("embedder.data_proj.", "data_proj."),
            ("patch_embedder.class_embedding", "audio_transformer.embeddings.cls_token"),
            ("patch_embedder.", "audio_transformer.embeddings."),
        ):
            if name.startswith(new):
                name = name.replace(new, old)
                break
        else:
            name = f"audio_transformer.{name}"
        if "bottleneck" in name:  # the mean, and a variance that is not used
            tensor = torch.cat([tensor, torch.randn_like(tensor)])
        weights[name] = tensor
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and all("out_proj" in name or "rope" in name for name in missing)
    head.load_state_dict(model.audio_head.state_dict())
    ours = CLAP.from_pretrained(tmp_path / "pe")
    for wave in clips(0.5, 0.53, 0.24):
        with torch.no_grad():
            expected = head(theirs(wave[None, None]).pooler_output)
            assert_close_rel("audio", expected, ours.encode_audio(wave[None]), 1e-5)


def test_padding_is_masked_as_in_transformers(tmp_path: Path) -> None:
    """A padded batch is that of transformers: the same mask, the same frames past the end."""
    from transformers import PeAudioFeatureExtractor

    model = pe_audio()
    save(model, tmp_path / "pe")
    ours = CLAP.from_pretrained(tmp_path / "pe")
    waves = clips(0.5, 0.24)
    inputs = PeAudioFeatureExtractor()([wave.numpy() for wave in waves], sampling_rate=48000, return_tensors="pt")
    lengths = torch.tensor([len(wave) for wave in waves])
    batch = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True, padding_value=torch.nan)
    with torch.no_grad():
        theirs = model.get_audio_embeds(inputs["input_values"], inputs["padding_mask"])
        assert_close_rel("audio", theirs, ours.encode_audio(batch, lengths), 1e-5)


def test_the_end_is_reflected_as_numpy_does() -> None:
    waves = [torch.randn(length) for length in (1, 2, 7, 10, 20, 13)]
    batch = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    padded, filled = reflect_to_frames(batch, torch.tensor([len(wave) for wave in waves]), 10)
    for row, size, wave in zip(padded, filled.tolist(), waves, strict=True):
        missing = -len(wave) % 10
        assert size == len(wave) + missing and row[size:].abs().sum() == 0
        np.testing.assert_array_equal(row[:size].numpy(), np.pad(wave.numpy(), (0, missing), "reflect"))


def test_what_trains_and_what_is_frozen() -> None:
    tower = build_audio_tower(AudioTowerConfig("pe-audio", hf_config=AUDIO)).train()
    tower.prepare_training(checkpoint=True)
    tower(torch.randn(2, 4000), torch.tensor([4000, 2500])).square().sum().backward()
    for name, parameter in tower.named_parameters():
        codec = name.startswith(("base.embedder.dac_encoder", "base.embedder.bottleneck"))
        assert parameter.requires_grad != codec and (parameter.grad is None) == codec, name
    model = CLAP(CLAPConfig(AudioTowerConfig("pe-audio", hf_config=AUDIO, freeze_layers=1)))
    trained = {name for name, parameter in model.audio_branch.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[1] for name in trained} == {"layers", "norm", "output"}
    assert not any(name.startswith("base.layers.0.") for name in trained)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AudioTowerConfig("pe-audio", pretrained="facebook/pe-av-small"), "starts from a whole PE-AV: convert"),
        (AudioTowerConfig("pe-audio", hf_config=AUDIO, pooling="mean"), "pools by its class token"),
    ],
)
def test_impossible_towers(config: AudioTowerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CLAP(CLAPConfig(config, TextTowerConfig()))


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    folder, model = tmp_path / "pe", pe_audio()
    save(model, folder, architectures=["PeAudioFrameLevelModel"])
    with pytest.raises(ModelError, match="a PE-A-Frame model, which embeds every 40 ms and has no vector of a clip"):
        CLAP.from_pretrained(folder)
    save(model, folder, audio_config={**AUDIO, "hidden_size": "wide"})
    with pytest.raises(ModelError, match=r"config\.json does not describe a PE-AV .*hidden_size"):
        CLAP.from_pretrained(folder)
    save(model, folder, audio_config={**AUDIO, "num_hidden_layers": 3})
    with pytest.raises(ModelError, match=r"layers\.2\.\S+ is missing"):
        CLAP.from_pretrained(folder)
    save(model, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated or damaged"):
        CLAP.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no model\*\.safetensors; download the whole model"):
        CLAP.from_pretrained(folder)
    save(model, folder, model_type="pe_video")
    with pytest.raises(ModelError, match="model_type clap, clsp, pe_audio, pe_audio_video"):
        read_checkpoint(folder)
    assert set(_FOLDERS) == FOREIGN_TYPES


def test_renamed_keys_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(pe_audio(), tmp_path / "pe")
    weights = load_file(tmp_path / "pe/model.safetensors")
    weights["audio_head.projection.weight"] = weights.pop("audio_head.proj.weight")
    save_file(weights, tmp_path / "pe/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"audio_projection\.proj\.weight is missing.*projection\.weight is not part"):
        CLAP.from_pretrained(tmp_path / "pe")
    del weights["text_audio_logit_bias"]
    save_file(weights, tmp_path / "pe/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not a checkpoint of PE-AV: logit_bias is missing"):
        CLAP.from_pretrained(tmp_path / "pe")


def test_a_scale_that_was_never_trained(tmp_path: Path) -> None:
    model = pe_audio()
    with torch.no_grad():
        model.text_audio_logit_scale.zero_()
    save(model, tmp_path / "pe")
    assert CLAP.from_pretrained(tmp_path / "pe").logit_scale.item() == 1.0


def test_convert(tmp_path: Path, capfd: Any) -> None:
    save(pe_audio(), tmp_path / "pe")
    assert main(["convert", str(tmp_path / "pe"), str(tmp_path / "out"), "--license", "apache-2.0"]) == 0
    assert f"16 dimensions, 48000 Hz: {tmp_path / 'out'}" in capfd.readouterr().out
    assert "PE-AV checkpoint `pe`" in (tmp_path / "out/README.md").read_text()
