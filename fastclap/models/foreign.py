"""Reading checkpoints of other codes: ParaSpeechCLAP, LAION-CLAP and transformers' CLAP.

A foreign state dict holds weights and no configuration. Widths, depths, kernel and window sizes are read from the
shapes, the rest is as published, and both can be overridden. Keys are renamed, and later everything must fit: a key
that is missing, left over or of another shape is an error that names it, since a model with a few random layers would
still give plausible numbers. Only tensors and plain numbers are unpickled.

The released CLSP, which is code and weights together, is wrapped in `fastclap.models.clsp` instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import ModelError
from fastclap.models.folder import SavedModel, find_model, is_foreign, load_state_dict_file
from fastclap.models.tokenizer import Tokenizer, as_tokenizer

_PARASPEECHCLAP_TOKENIZER = "ibm-granite/granite-embedding-278m-multilingual"
_LAION_TOKENIZER = "roberta-base"

# microsoft/wavlm-large, with the layerdrop of 0 that ParaSpeechCLAP trains with
_WAVLM_LARGE = {
    "model_type": "wavlm",
    "layerdrop": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.1,
    "feat_proj_dropout": 0.1,
    "hidden_dropout": 0.1,
    "mask_time_length": 10,
    "mask_time_min_masks": 2,
    "mask_feature_prob": 0.0,
    "max_bucket_distance": 800,
}
_FAMILY_STRIDES = [5, 2, 2, 2, 2, 2, 2]
_SPECIAL_TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
# what LAION-CLAP saves and no embedding needs: its own front-end's constants, AudioSet's classifier, the extra layers
# of its optional loss, and the scale of that loss
_LAION_UNUSED = re.compile(
    r"audio_branch\.(spectrogram_extractor|logmel_extractor|tscam_conv|head)\.|(audio|text)_transform\.|logit_scale_t$"
    r"|audio_branch\..*\.attn_mask$"
)
_LAION_NAMES = [
    (r"^audio_branch\.bn0\.", "audio_branch.batch_norm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.relative_position", ".attention.self.relative_position"),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^audio_branch\.", "audio_branch.base.audio_encoder."),
    (r"^text_branch\.", "text_branch.base."),
    (r"^(audio|text)_projection\.0\.", r"\1_projection.linear1."),
    (r"^(audio|text)_projection\.2\.", r"\1_projection.linear2."),
    (r"^logit_scale_a$", "log_logit_scale"),
]


@dataclass
class ForeignModel:
    """A checkpoint of another code in our terms: whose code, the hub id or folder of its tokenizer, and the model."""

    code: str
    tokenizer: str
    config: CLAPConfig
    weights: dict[str, Tensor]


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The foreign checkpoint that a file, a folder or a hub id (which is downloaded) stands for.

    Raises:
        ModelError: there is none, or the folder is a model of our own.
    """
    found = find_model(path)
    if not is_foreign(found):
        raise ModelError(f"{path}: already a fastclap model; there is nothing to convert")
    return found


def read_foreign(
    path: Path,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    *,
    audio_config: Mapping[str, Any] | None = None,
    text_config: Mapping[str, Any] | None = None,
) -> SavedModel:
    """The contents of a checkpoint of another code; `fastclap.models.clap.read_checkpoint` describes the arguments.

    Raises:
        ModelError: not such a checkpoint, damaged, or without a tokenizer.
    """
    audio, text = dict(audio_config or {}), dict(text_config or {})
    if path.is_dir():
        if not is_foreign(path):
            raise ModelError(f"{path}: no configuration of a transformers CLAP (config.json with model_type clap)")
        found = read_transformers(path, audio, text)
    else:
        weights = _modern_names(load_state_dict_file(path))
        if any(name.startswith("audio_branch.base.") for name in weights):
            found = read_paraspeechclap(ForeignWeights(path, "ParaSpeechCLAP", weights), audio, text)
        elif "logit_scale_a" in weights:
            found = read_laion(ForeignWeights(path, "LAION-CLAP", weights), audio, text)
        else:
            names = ", ".join(list(weights)[:3]) or "nothing"
            raise ModelError(
                f"{path}: the state dict of neither ParaSpeechCLAP (audio_branch.base.*, text_branch.base.*, "
                f"audio_projection.linear1.weight, log_logit_scale, …) nor LAION-CLAP (logit_scale_a, …); "
                f"it holds {names}"
            )
    try:
        tokenizer = as_tokenizer(found.tokenizer if tokenizer is None else tokenizer)
    except ModelError as error:
        raise ModelError(
            f"{error}. The checkpoint {path} holds no tokenizer; give the folder or hub id of one with tokenizer="
        ) from error
    origin = f"Weights converted from the {found.code} checkpoint `{path.name}`."
    return SavedModel(found.config, found.weights, tokenizer, path, path, origin=origin)


class ForeignWeights:
    """A foreign state dict, to be asked for shapes and counts by name; what is missing is an error.

    Args:
        path: to name in errors.
        code: whose checkpoint it should be, likewise.
        tensors: the state dict.
    """

    def __init__(self, path: Path, code: str, tensors: dict[str, Tensor]) -> None:
        self.path, self.code, self.tensors = path, code, tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Shape of a tensor that must have this many dimensions, none of them empty."""
        if name not in self.tensors:
            raise ModelError(f"{self.path}: not a checkpoint of {self.code}: {name} is missing")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != dimensions or not all(shape):
            raise ModelError(f"{self.path}: {name} has the shape {shape}; {dimensions} dimensions were expected")
        return shape

    def count(self, prefix: str) -> int:
        """How many numbered modules there are under a name."""
        found = {match[1] for name in self.tensors if (match := re.match(re.escape(prefix) + r"\.(\d+)\.", name))}
        if not found:
            raise ModelError(f"{self.path}: not a checkpoint of {self.code}: {prefix}.0.* is missing")
        return len(found)


def _modern_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that today's releases give the parameters, without the wrappers' prefixes and the constant buffers."""
    for prefix in ("module.", "_orig_mod.", "module."):  # of DistributedDataParallel around or inside torch.compile
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    renamed = {}
    for name, tensor in weights.items():
        if name.endswith(("embeddings.position_ids", "embeddings.token_type_ids")):
            continue
        name = re.sub(r"\.conv\.weight_g$", ".conv.parametrizations.weight.original0", name)
        name = re.sub(r"\.conv\.weight_v$", ".conv.parametrizations.weight.original1", name)
        renamed[name] = tensor
    for name in ("log_logit_scale", "logit_scale_a"):
        if name in renamed and renamed[name].numel() == 1:  # some codes keep it as one element
            renamed[name] = renamed[name].reshape(())
    return renamed


def read_paraspeechclap(weights: ForeignWeights, audio: dict[str, Any], text: dict[str, Any]) -> ForeignModel:
    """ParaSpeechCLAP, whose names are ours; `audio` and `text` go over what the shapes and the published model say."""
    config = CLAPConfig(
        audio=AudioTowerConfig(kind="wav2vec2", hf_config=_wav2vec2_config(weights, "audio_branch.base", audio)),
        text=TextTowerConfig(
            kind="hf",
            hf_config={**_roberta_config(weights, "text_branch.base"), "model_type": "xlm-roberta", **text},
            pooling="cls",
            max_tokens=512,
        ),
        head=HeadConfig("paraspeechclap", weights.shape("audio_projection.linear1.weight", 2)[0]),
    )
    return ForeignModel(weights.code, _PARASPEECHCLAP_TOKENIZER, config, weights.tensors)


def _wav2vec2_config(weights: ForeignWeights, base: str, changes: dict[str, Any]) -> dict[str, Any]:
    layers = weights.count(f"{base}.feature_extractor.conv_layers")
    convolutions = [
        weights.shape(f"{base}.feature_extractor.conv_layers.{layer}.conv.weight", 3) for layer in range(layers)
    ]
    if layers != len(_FAMILY_STRIDES) and "conv_stride" not in changes:
        raise ModelError(
            f"{weights.path}: {layers} convolutions instead of {len(_FAMILY_STRIDES)}, whose strides do not follow "
            'from the weights; give audio_config={"conv_stride": [...]}'
        )
    layer = f"{base}.encoder.layers.0"
    hidden, _ = weights.shape(f"{base}.feature_projection.projection.weight", 2)
    _, per_group, taps = weights.shape(f"{base}.encoder.pos_conv_embed.conv.parametrizations.weight.original1", 3)
    every_norm = f"{base}.feature_extractor.conv_layers.1.layer_norm.weight" in weights
    read: dict[str, Any] = {
        "conv_dim": [shape[0] for shape in convolutions],
        "conv_kernel": [shape[2] for shape in convolutions],
        "conv_stride": _FAMILY_STRIDES,
        "conv_bias": f"{base}.feature_extractor.conv_layers.0.conv.bias" in weights,
        "feat_extract_norm": "layer" if every_norm else "group",
        "hidden_size": hidden,
        "num_hidden_layers": weights.count(f"{base}.encoder.layers"),
        "intermediate_size": weights.shape(f"{layer}.feed_forward.intermediate_dense.weight", 2)[0],
        "num_conv_pos_embeddings": taps,
        "num_conv_pos_embedding_groups": hidden // per_group,
        # no shape depends on it; the two go together in every published size of the family
        "do_stable_layer_norm": every_norm,
        "mask_time_prob": 0.075 if f"{base}.masked_spec_embed" in weights else 0.0,
    }
    if f"{layer}.attention.gru_rel_pos_const" in weights:
        read["num_attention_heads"] = weights.shape(f"{layer}.attention.gru_rel_pos_const", 4)[1]
        read["num_buckets"] = weights.shape(f"{layer}.attention.rel_attn_embed.weight", 2)[0]
    elif "model_type" in changes:
        read["num_attention_heads"] = max(1, hidden // 64)
    else:
        raise ModelError(
            f"{weights.path}: its audio tower is not WavLM ({layer}.attention.gru_rel_pos_const is missing); say "
            'what it is with audio_config={"model_type": "wav2vec2"} or "hubert"'
        )
    return {**_WAVLM_LARGE, **read, **changes}


def _roberta_config(weights: ForeignWeights, base: str) -> dict[str, Any]:
    vocabulary, hidden = weights.shape(f"{base}.embeddings.word_embeddings.weight", 2)
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": weights.count(f"{base}.encoder.layer"),
        "num_attention_heads": max(1, hidden // 64),
        "intermediate_size": weights.shape(f"{base}.encoder.layer.0.intermediate.dense.weight", 2)[0],
        "max_position_embeddings": weights.shape(f"{base}.embeddings.position_embeddings.weight", 2)[0],
        "type_vocab_size": weights.shape(f"{base}.embeddings.token_type_embeddings.weight", 2)[0],
        "layer_norm_eps": 1e-5,
        **_SPECIAL_TOKENS,
    }


def read_laion(weights: ForeignWeights, audio: dict[str, Any], text: dict[str, Any]) -> ForeignModel:
    """LAION-CLAP with HTSAT and RoBERTa, renamed to transformers' names; `audio` and `text` as for ParaSpeechCLAP."""
    names = weights.tensors
    if any("fusion_model" in name or ".mel_conv" in name for name in names):
        raise ModelError(
            f"{weights.path}: a fusion checkpoint, which takes four spectrograms a clip; use one without fusion"
        )
    if "audio_branch.patch_embed.proj.weight" not in names:
        raise ModelError(
            f"{weights.path}: its audio tower is not HTSAT (audio_branch.patch_embed.proj.weight is missing)"
        )
    config = CLAPConfig(
        audio=AudioTowerConfig(kind="clap-htsat", hf_config={**_htsat_config(weights), **audio}),
        text=TextTowerConfig(
            kind="hf",
            hf_config={**_roberta_config(weights, "text_branch"), "model_type": "roberta", **text},
            pooling="pooler",
            max_tokens=77,
        ),
        head=HeadConfig("laion", weights.shape("audio_projection.2.weight", 2)[0]),
    )
    ours: dict[str, Tensor] = {}
    for name, tensor in names.items():
        if _LAION_UNUSED.match(name):
            continue
        new = name
        for pattern, replacement in _LAION_NAMES:
            new = re.sub(pattern, replacement, new)
        if ".attn.qkv." in new:
            if len(tensor) % 3:
                raise ModelError(f"{weights.path}: {name} has the shape {tuple(tensor.shape)}, no three parts")
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                ours[new.replace(".attn.qkv.", f".attention.self.{part}.")] = chunk
        else:
            ours[new] = tensor
    return ForeignModel(weights.code, _LAION_TOKENIZER, config, ours)


def _htsat_config(weights: ForeignWeights) -> dict[str, Any]:
    stages = weights.count("audio_branch.layers")
    depths, heads = [], []
    for stage in range(stages):
        depths.append(weights.count(f"audio_branch.layers.{stage}.blocks"))
        heads.append(weights.shape(f"audio_branch.layers.{stage}.blocks.0.attn.relative_position_bias_table", 2)[1])
    width, _, patch, _ = weights.shape("audio_branch.patch_embed.proj.weight", 4)
    window = weights.shape("audio_branch.layers.0.blocks.0.attn.relative_position_bias_table", 2)[0]
    feedforward = weights.shape("audio_branch.layers.0.blocks.0.mlp.fc1.weight", 2)[0]
    return {
        "num_mel_bins": weights.shape("audio_branch.bn0.weight", 1)[0],
        "patch_embeds_hidden_size": width,
        "patch_size": patch,
        "patch_stride": [patch, patch],
        "depths": depths,
        "num_attention_heads": heads,
        "window_size": (round(window**0.5) + 1) // 2,
        "mlp_ratio": feedforward / width,
        "hidden_size": width << (stages - 1),
        "spec_size": 256,
    }


def read_transformers(folder: Path, audio: dict[str, Any], text: dict[str, Any]) -> ForeignModel:
    """The folder of a transformers `ClapModel`, whose configuration says everything; `audio` and `text` change it."""
    from safetensors import SafetensorError
    from transformers import ClapConfig, ClapModel

    try:
        whole = ClapConfig.from_pretrained(folder)
        if whole.audio_config.enable_fusion:
            raise ModelError(f"{folder}: a fusion model, which takes four spectrograms a clip; use one without fusion")
        if whole.projection_hidden_act != "relu":
            raise ModelError(f"{folder}: projection_hidden_act is {whole.projection_hidden_act}; only relu is known")
        model, info = ClapModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except ModelError:
        raise
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ModelError(f"{folder}: the CLAP model of transformers could not be loaded ({error})") from error
    wrong = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    wrong += [f"{name} has another shape" for name in map(str, sorted(info["mismatched_keys"]))]
    if wrong:
        raise ModelError(f"{folder}: not the weights of its configuration: {'; '.join(wrong[:5])}")
    renamed = {}
    for name, tensor in _modern_names(model.state_dict()).items():
        if name == "logit_scale_t":
            continue
        name = re.sub(r"^(audio|text)_model\.", r"\1_branch.base.", name)
        renamed["log_logit_scale" if name == "logit_scale_a" else name] = tensor
    fields = whole.text_config.to_dict()
    roberta = {
        name: fields[name]
        for name in (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
            *("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings"),
            *("type_vocab_size", "layer_norm_eps", *_SPECIAL_TOKENS),
        )
    }
    config = CLAPConfig(
        audio=AudioTowerConfig(kind="clap-htsat", hf_config={**whole.audio_config.to_dict(), **audio}),
        # its text tower is RoBERTa under another name
        text=TextTowerConfig(
            kind="hf",
            hf_config={**roberta, "model_type": "roberta", **text},
            pooling="pooler",
            max_tokens=whole.text_config.max_position_embeddings - whole.text_config.pad_token_id - 1,
        ),
        head=HeadConfig("laion", whole.projection_dim),
    )
    return ForeignModel("transformers CLAP", os.fspath(folder), config, renamed)
