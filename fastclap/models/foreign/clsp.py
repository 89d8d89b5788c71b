"""CLSP (yfyeung/CLSP, arXiv 2601.03065), and the encoder of SPEAR that it starts from (arXiv 2510.25955).

Read and written are the checkpoints of CLSP's training in icefall, {"model": state dict, ...}, and the hub's folder,
whose own code is not run: its names are icefall's with a prefix. Sizes are those of the shapes, but for three that no
shape tells: positions have four channels a head; of the numbers of mel bands that the convolutions make equally many
channels of, it is the multiple of four (128, as published); and the channels that training never drops.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig, ZipformerConfig, read_dataclass
from fastclap.errors import ConfigError, ModelError
from fastclap.features import PRESETS
from fastclap.files import replacing
from fastclap.models.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_weights,
    find_weights_file,
    load_state_dict_file,
    replacing_folder,
)
from fastclap.models.foreign.shared import ForeignModel, ForeignWeights, modern_names, roberta_config
from fastclap.models.tokenizer import TOKENIZER_FILE, Tokenizer

_TOKENIZER = "roberta-base"
_HUB_PREFIX = "model."
_FRONT, _ENCODER = "encoder_embed.", "encoder."
_FIRST = f"{_FRONT}conv.0.weight"
# how the names begin there, and here
_NAMES = {
    _FRONT: f"audio_branch.{_FRONT}",
    _ENCODER: f"audio_branch.{_ENCODER}",
    "audio_projection.": "audio_projection.projection.",
    "audio_transform.sequential.": "audio_projection.transform.",
    "text_encoder.": "text_branch.base.",
    "text_projection.": "text_projection.projection.",
    "text_transform.sequential.": "text_projection.transform.",
    "logit_scale": "log_logit_scale",
}


def icefall_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what stands before icefall's names; those of other models as they are."""
    prefixes = [name.removesuffix(_FIRST) for name in weights if name == _FIRST or name.endswith(f".{_FIRST}")]
    prefix = min(prefixes, key=len, default="")
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def _load(file: Path) -> dict[str, Tensor]:
    return icefall_names(modern_names(load_state_dict_file(file)))


def _renamed(name: str, beginnings: Mapping[str, str]) -> str:
    return next((new + name[len(old) :] for old, new in beginnings.items() if name.startswith(old)), name)


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_clsp_folder(folder: Path, audio: dict[str, Any], text: dict[str, Any]) -> ForeignModel:
    """The hub's folder, with its tokenizer if it has one; arguments and errors as for `read_clsp`."""
    file = find_weights_file(folder)
    model = read_clsp(ForeignWeights(file, "CLSP", _load(file)), audio, text)
    if any((folder / name).is_file() for name in (TOKENIZER_FILE, "tokenizer_config.json")):
        model.tokenizer = os.fspath(folder)
    return model


def read_clsp(weights: ForeignWeights, audio: dict[str, Any], text: dict[str, Any]) -> ForeignModel:
    """The weights alone, under icefall's names.

    Args:
        weights: of CLSP.
        audio: fields of `ZipformerConfig`, and `n_mels`, that go over what the shapes and the published model say.
        text: the same of RoBERTa's configuration.

    Raises:
        ModelError: a tensor that is missing, or shapes that no Zipformer has.
        ConfigError: an unknown entry of `audio`.
    """
    if not any(name.startswith("text_encoder.") for name in weights.tensors):
        raise ModelError(
            f"{weights.path}: an encoder of speech without one of text (text_encoder.*), such as SPEAR's; a training "
            "starts from it with --model.audio.pretrained"
        )
    roberta = {**roberta_config(weights, "text_encoder"), **text}
    positions = roberta["max_position_embeddings"] - roberta["pad_token_id"] - 1
    config = CLAPConfig(
        audio=_audio_config(weights, audio),
        text=TextTowerConfig(kind="hf", hf_config=roberta, pooling="pooler", max_tokens=min(512, positions)),
        head=HeadConfig("clsp", weights.shape("audio_transform.sequential.3.weight", 2)[0]),
    )
    ours = {_renamed(name, _NAMES): tensor for name, tensor in weights.tensors.items()}
    return ForeignModel(weights.code, _TOKENIZER, config, ours)


def _audio_config(weights: ForeignWeights, changes: Mapping[str, Any]) -> AudioTowerConfig:
    changes = dict(changes)
    mels = changes.pop("n_mels", None)
    sizes = _sizes(weights, read_dataclass(ZipformerConfig, changes, "audio_config").position_width)
    if mels is None:
        mels = _multiple_of_four(weights.shape(f"{_FRONT}out.weight", 2)[1] // sizes["channels"][-1])
    return AudioTowerConfig(
        kind="zipformer",
        features="clsp",
        feature_options={} if mels == 128 else {"n_mels": mels},
        pooling="mean",
        zipformer=ZipformerConfig(**{**sizes, **changes}),
    )


def _bands(mels: int) -> int:
    """Bands that two strides of two leave."""
    return ((mels - 1) // 2 - 1) // 2


def _multiple_of_four(bands: int) -> int:
    """Mels of which two strides of two leave this many; so they do of the number before it and of the next two."""
    return 4 * bands + 4


def _sizes(weights: ForeignWeights, position_width: int) -> dict[str, Any]:
    """Fields of `ZipformerConfig`."""
    unmasked = {}
    for size in ("spear-base", "spear-large", "spear-xlarge"):
        lists = ZipformerConfig(size=size).lists()
        unmasked[lists["width"][0]] = lists["unmasked_width"][0]
    sizes: dict[str, list[int]] = {}
    for index in range(weights.count(f"{_ENCODER}encoders")):
        stack, factor = f"{_ENCODER}encoders.{index}", 1
        if f"{stack}.downsample.bias" in weights:
            stack, factor = f"{stack}.encoder", weights.shape(f"{stack}.downsample.bias", 1)[0]
        layer = f"{stack}.layers.0"
        width = weights.shape(f"{layer}.norm.bias", 1)[0]
        positions, encoding_width = weights.shape(f"{layer}.self_attn_weights.linear_pos.weight", 2)
        heads = max(1, positions // position_width)
        joint = weights.shape(f"{layer}.self_attn_weights.in_proj.weight", 2)[0] // heads
        found = {
            "downsampling": factor,
            "layers": weights.count(f"{stack}.layers"),
            "width": width,
            "unmasked_width": unmasked.get(width, width * 3 // 5),
            "feedforward": weights.shape(f"{layer}.feed_forward2.in_proj.weight", 2)[0],
            "heads": heads,
            "kernel": weights.shape(f"{layer}.conv_module1.depthwise_conv.weight", 3)[2],
            "query_width": (joint - position_width) // 2,
            "value_width": weights.shape(f"{layer}.self_attn1.in_proj.weight", 2)[0] // heads,
            "encoding_width": encoding_width,
        }
        for name, value in found.items():
            sizes.setdefault(name, []).append(value)
    numbers = {"position_width": position_width, "output_downsampling": 1}
    for name in ("query_width", "value_width", "encoding_width"):
        values = sizes.pop(name)
        numbers[name] = values[0]
        if len(set(values)) > 1:
            raise ModelError(f"{weights.path}: {name} is {values}; it must be the same in all stacks")
    if f"{_ENCODER}downsample_output.bias" in weights:
        numbers["output_downsampling"] = weights.shape(f"{_ENCODER}downsample_output.bias", 1)[0]
    return {
        **sizes,
        **numbers,
        "channels": [weights.shape(f"{_FRONT}conv.{index}.weight", 4)[0] for index in (0, 4, 7)],
    }


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write_clsp(path: Path, config: CLAPConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer | None) -> None:
    """Write a model of CLSP's architecture as CLSP is saved.

    Args:
        path: a file that ends in .pt, as icefall writes it, or a new folder in the hub's form: model.safetensors, the
            model type in config.json, and the tokenizer.
        config, weights, tokenizer: of the model.

    Raises:
        ConfigError: a model of another architecture; what differs is named.
        ModelError: there is such a folder already.
        OSError: the disk is full or the place is not writable; nothing is left behind.
    """
    back = {ours: theirs for theirs, ours in _NAMES.items()}
    theirs = {_renamed(name, back): tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    differences = _differences(config, ForeignWeights(path, "CLSP", theirs))
    if differences:
        raise ConfigError(f"this model is not of CLSP's architecture: {'; '.join(differences)}")
    if path.suffix == ".pt":
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            torch.save({"model": theirs}, temporary)
        return
    if path.exists():
        raise ModelError(f"{path}: is there already; name a folder that is not, or a file that ends in .pt")
    from safetensors.torch import save_file

    with replacing_folder(path) as folder:
        tensors = {f"{_HUB_PREFIX}{name}": tensor for name, tensor in theirs.items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps({"model_type": "clsp"}) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER_FILE)


def _differences(config: CLAPConfig, theirs: ForeignWeights) -> list[str]:
    """What would be read as another model than it is."""
    for name, kind, wanted in (
        ("audio.kind", config.audio.kind, "zipformer"),
        ("text.kind", config.text.kind, "hf"),
        ("text.hf_config.model_type", (config.text.hf_config or {}).get("model_type"), "roberta"),
        ("head.kind", config.head.kind, "clsp"),
    ):
        if kind != wanted:
            return [f"{name} is {kind} instead of {wanted}"]
    ours, read = _facts(config), _facts(read_clsp(theirs, {}, {}).config)
    return [f"{name} is {ours[name]} instead of {read[name]}" for name in ours if ours[name] != read[name]]


def _facts(config: CLAPConfig) -> dict[str, Any]:
    """All that decides the embedding, and is no weight."""
    audio, text = config.audio, config.text
    roberta = {"hidden_act": "gelu", **(text.hf_config or {})}
    names = ("num_attention_heads", "layer_norm_eps", "pad_token_id", "hidden_act")
    return {
        "audio.features": audio.features,
        "audio.feature_options": {"n_mels": 128, **audio.feature_options},
        "audio.pooling": audio.pooling or "mean",
        **{f"audio.zipformer.{name}": value for name, value in _encoder_facts(audio).items()},
        "text.pooling": text.pooling,
        **{f"text.hf_config.{name}": roberta.get(name) for name in names},
        "init_logit_bias": config.init_logit_bias,
    }


def _encoder_facts(config: AudioTowerConfig) -> dict[str, Any]:
    sizes = config.zipformer
    lists = {name: values for name, values in sizes.lists().items() if name != "unmasked_width"}
    names = ("channels", "query_width", "position_width", "value_width", "encoding_width", "output_downsampling")
    return {**lists, **{name: getattr(sizes, name) for name in names}}


# ---------------------------------------------------------------------------------------------------------------------
# SPEAR


def load_spear(config: AudioTowerConfig, parts: nn.ModuleDict) -> None:
    """Start an encoder from the weights of SPEAR, or of CLSP; what else their file holds is named in a warning.

    Args:
        config: of the tower; `pretrained` is a file, a folder with one, or the hub's name of either.
        parts: `encoder_embed` and `encoder`, all of whose tensors the file must have, and no others.

    Raises:
        ModelError: there is no such file, or its encoder is another one; sizes that differ are named.
    """
    assert config.pretrained is not None
    file = find_weights_file(config.pretrained)
    weights = _load(file)
    encoder = {name: tensor for name, tensor in weights.items() if name.startswith((_FRONT, _ENCODER))}
    changes = {"position_width": config.zipformer.position_width}
    theirs = _audio_config(ForeignWeights(file, "SPEAR", encoder), changes)
    ours, found = ({**_encoder_facts(each), "n_mels": _mels(each)} for each in (config, theirs))
    wrong = [f"{name} {found[name]} (configured: {ours[name]})" for name in ours if ours[name] != found[name]]
    if wrong:
        raise ModelError(
            f"{file}: an encoder of other sizes than model.audio.zipformer and feature_options say: {'; '.join(wrong)}"
        )
    check_weights(parts, encoder, file)
    parts.load_state_dict(encoder)
    others = sorted({name.partition(".")[0] for name in weights if name not in encoder})
    if others:
        warnings.warn(f"{file}: only its encoder is used, not {', '.join(others)}", stacklevel=2)


def _mels(config: AudioTowerConfig) -> int:
    """Mel bands, as far as the shapes tell them."""
    return _multiple_of_four(_bands(config.feature_options.get("n_mels", PRESETS[config.features].n_mels)))
