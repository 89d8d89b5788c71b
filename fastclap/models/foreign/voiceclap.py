"""VoiceCLAP-Small (VoiceNet/voiceclap-small, laion/voiceclap-small): Whisper's encoder and MiniLM.

Read are its hub folder (config.json with model_type voiceclap-small) and the weights alone. Its own code, which the
folder holds, is not run: the towers are open_clip's Whisper encoder and transformers' BERT under other names. A clip is
padded with zeros to parts of 30 s; every part's vector is the mean over all of its positions, averaged by twos before
the final norm, and a clip of several parts has the mean of their unit vectors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import ModelError
from fastclap.models.folder import load_state_dict_file
from fastclap.models.foreign.shared import (
    ForeignModel,
    ForeignWeights,
    bert_config,
    features_with_its_bank,
    modern_names,
    renamed,
)
from fastclap.reading import read_json

_AUDIO, _TEXT = "audio_encoder", "text_encoder"
_NAMES = [
    (r"^audio_encoder\.proj\.", "audio_projection.proj."),
    (r"^audio_encoder\.positional_embedding$", "audio_branch.base.embed_positions.weight"),
    (r"^audio_encoder\.ln_post\.", "audio_branch.base.layer_norm."),
    (r"^audio_encoder\.blocks\.", "audio_branch.base.layers."),
    (r"^audio_encoder\.", "audio_branch.base."),
    (r"\.attn\.query\.", ".self_attn.q_proj."),
    (r"\.attn\.key\.", ".self_attn.k_proj."),
    (r"\.attn\.value\.", ".self_attn.v_proj."),
    (r"\.attn\.out\.", ".self_attn.out_proj."),
    (r"\.attn_ln\.", ".self_attn_layer_norm."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.2\.", ".fc2."),
    (r"\.mlp_ln\.", ".final_layer_norm."),
    (r"^text_encoder\.", "text_branch.base."),
    (r"^(audio|text)_proj\.0\.", r"\1_projection.linear1."),
    (r"^(audio|text)_proj\.2\.", r"\1_projection.linear2."),
    (r"^logit_scale$", "log_logit_scale"),
]


def read_voiceclap_folder(folder: Path, audio: dict[str, Any], text: dict[str, Any]) -> ForeignModel:
    """The hub's folder, with its tokenizer; heads and epsilon, which no shape tells, are those of its config.json.

    Raises:
        ModelError: as for `read_voiceclap`.
    """
    data = read_json(folder / "config.json", ModelError)
    ours = {"n_head": ("encoder_attention_heads", audio), "text_num_heads": ("num_attention_heads", text)}
    ours |= {"text_layer_norm_eps": ("layer_norm_eps", text), "text_pad_token_id": ("pad_token_id", text)}
    for theirs, (name, fields) in ours.items():
        if theirs in data:
            fields.setdefault(name, data[theirs])
    file = folder / "model.safetensors"
    model = read_voiceclap(ForeignWeights(file, "VoiceCLAP", modern_names(load_state_dict_file(file))), audio, text)
    model.tokenizer = os.fspath(folder)
    return model


def read_voiceclap(weights: ForeignWeights, audio: dict[str, Any], text: dict[str, Any]) -> ForeignModel:
    """The weights alone; `audio` and `text` go over what the shapes and the published model say.

    Raises:
        ModelError: a tensor that is missing, or an unknown mel filter bank.
    """
    width, mels, _ = weights.shape(f"{_AUDIO}.conv1.weight", 3)
    whisper = {
        "num_mel_bins": mels,
        "d_model": width,
        "max_source_positions": weights.shape(f"{_AUDIO}.positional_embedding", 2)[0],
        "encoder_layers": weights.count(f"{_AUDIO}.blocks"),
        "encoder_attention_heads": max(1, width // 64),
        "encoder_ffn_dim": weights.shape(f"{_AUDIO}.blocks.0.mlp.0.weight", 2)[0],
    }
    bert = {**bert_config(weights, _TEXT, head_width=32), "add_pooling_layer": False}
    bank = next((name for name in weights.tensors if name.endswith("mel_filters")), "mel_filters")
    # OpenAI's bank is on Slaney's scale; that of open_clip, from which VoiceCLAP comes, is on HTK's
    features = features_with_its_bank(
        weights, bank, "whisper", [{"n_mels": mels}, {"n_mels": mels, "mel_scale": "htk"}]
    )
    ours = {renamed(name, _NAMES): tensor for name, tensor in weights.tensors.items() if name != bank}
    config = CLAPConfig(
        audio=AudioTowerConfig(
            kind="whisper",
            hf_config={**whisper, **audio},
            feature_options=features,
            chunks=True,
            pool_padding=True,
            frame_pooling=2,
        ),
        text=TextTowerConfig(kind="hf", hf_config={**bert, **text}, pooling="mean", max_tokens=128),
        head=HeadConfig("voiceclap", weights.shape("audio_proj.2.weight", 2)[0]),
        init_logit_bias=-10.0,
    )
    return ForeignModel(weights.code, "sentence-transformers/all-MiniLM-L6-v2", config, ours)
