"""ParaSpeechCLAP's checkpoints: WavLM and XLM-RoBERTa under names that are ours."""

from __future__ import annotations

from typing import Any

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import ModelError
from fastclap.models.foreign.shared import ForeignModel, ForeignWeights, roberta_config

_TOKENIZER = "ibm-granite/granite-embedding-278m-multilingual"

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


def read_paraspeechclap(weights: ForeignWeights, audio: dict[str, Any], text: dict[str, Any]) -> ForeignModel:
    """ParaSpeechCLAP, whose names are ours; `audio` and `text` go over what the shapes and the published model say."""
    config = CLAPConfig(
        audio=AudioTowerConfig(kind="wav2vec2", hf_config=_wav2vec2_config(weights, "audio_branch.base", audio)),
        text=TextTowerConfig(
            kind="hf",
            hf_config={**roberta_config(weights, "text_branch.base", "xlm-roberta"), **text},
            pooling="cls",
            max_tokens=512,
        ),
        head=HeadConfig("paraspeechclap", weights.shape("audio_projection.linear1.weight", 2)[0]),
    )
    return ForeignModel(weights.code, _TOKENIZER, config, weights.tensors)


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
