"""LAION-CLAP's checkpoints: HTSAT, of any of its three sizes, and RoBERTa."""

from __future__ import annotations

import re
from typing import Any

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import ModelError
from fastclap.models.foreign.htsat import htsat_config, htsat_weights
from fastclap.models.foreign.shared import ForeignModel, ForeignWeights, renamed, roberta_config

_TOKENIZER = "roberta-base"
# what no embedding needs: the extra layers of an optional loss, and the scale of that loss
_UNUSED = re.compile(r"(audio|text)_transform\.|logit_scale_t$")
_NAMES = [
    (r"^text_branch\.", "text_branch.base."),
    (r"^(audio|text)_projection\.0\.", r"\1_projection.linear1."),
    (r"^(audio|text)_projection\.2\.", r"\1_projection.linear2."),
    (r"^logit_scale_a$", "log_logit_scale"),
]


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
        audio=AudioTowerConfig(kind="clap-htsat", hf_config={**htsat_config(weights, "audio_branch."), **audio}),
        text=TextTowerConfig(
            kind="hf",
            hf_config={**roberta_config(weights, "text_branch"), **text},
            pooling="pooler",
            max_tokens=77,
        ),
        head=HeadConfig("laion", weights.shape("audio_projection.2.weight", 2)[0]),
    )
    ours = htsat_weights(weights, "audio_branch.")
    for name, tensor in names.items():
        if not name.startswith("audio_branch.") and not _UNUSED.match(name):
            ours[renamed(name, _NAMES)] = tensor
    return ForeignModel(weights.code, _TOKENIZER, config, ours)
