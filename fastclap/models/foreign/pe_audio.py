"""The audio and text towers of PE-AV (Meta, arXiv 2512.19687) in the folders of transformers.

Released are facebook/pe-av-small, -base and -large (`PeAudioVideoModel`, Apache-2.0, of which the video towers are left
out) and facebook/pe-a-frame-*, which embed frames of 40 ms and no clips, and are refused.

Two things to know. Their vectors are compared by dot product: `CLAP.encode_audio` and `encode_text` give them as they
are, while everything that returns unit vectors compares by cosine. And Meta's code reads the text tower's state before
its final norm, which transformers 4 gave as the last of the hidden states and transformers 5 no longer does; this
reader follows Meta's code.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import ModelError
from fastclap.models.folder import check_index
from fastclap.models.foreign.shared import ForeignModel, ForeignWeights, renamed
from fastclap.models.sizes import check_counts
from fastclap.reading import read_json

_NAMES = [
    (r"^audio_video_encoder\.embedder\.audio_encoder\.", "audio_encoder."),  # one of the two names of tied parameters
    (r"^audio_model\.", ""),
    (r"^audio_encoder\.", "audio_branch.base."),
    (r"^text_model\.", "text_branch.base."),
    (r"^audio_head\.", "audio_projection."),
    (r"^text_audio_head\.", "text_projection."),
    (r"^text_audio_logit_scale$", "log_logit_scale"),
    (r"^text_audio_logit_bias$", "logit_bias"),
]


def read_pe_audio(folder: Path, audio: dict[str, Any], text: dict[str, Any]) -> ForeignModel:
    """A folder of transformers' `PeAudioVideoModel` or `PeAudioModel`; `audio` and `text` change its configuration.

    Raises:
        ModelError: a model of frames, a configuration that is incomplete, or weights that are damaged.
    """
    from transformers import PeAudioConfig

    data = read_json(folder / "config.json", ModelError)
    check_counts(data, str(folder / "config.json"))
    check_index(folder)
    if "PeAudioFrameLevelModel" in (data.get("architectures") or []):
        raise ModelError(
            f"{folder}: a PE-A-Frame model, which embeds every 40 ms and has no vector of a clip; use facebook/pe-av-*"
        )
    towers = data.get("audio_video_config") if data["model_type"] == "pe_audio_video" else data
    try:
        whole = PeAudioConfig(text_config=data["text_config"], audio_config=(towers or {})["audio_config"])
    except Exception as error:  # of any kind, for numbers and names that are impossible
        raise ModelError(f"{folder}: config.json does not describe a PE-AV ({error!r})") from error
    ours: dict[str, Tensor] = {}
    for name, tensor in _tensors(folder).items():
        new = renamed(name, _NAMES)
        if new != name:
            ours[new] = tensor.float()
    for name in ("log_logit_scale", "logit_bias"):
        ForeignWeights(folder, "PE-AV", ours).shape(name, 1)
        ours[name] = ours[name].reshape(())
    scale = ours["log_logit_scale"]  # a factor, which stays zero where it was never trained
    ours["log_logit_scale"] = scale.log() if scale > 0 else torch.zeros(())
    # The head's own norm makes a final norm with weights of one as good as none.
    if "text_branch.base.final_norm.weight" in ours:
        ours["text_branch.base.final_norm.weight"].fill_(1.0)
    if "text_branch.base.final_norm.bias" in ours:
        ours["text_branch.base.final_norm.bias"].zero_()
    fields = whole.text_config.to_dict()
    config = CLAPConfig(
        audio=AudioTowerConfig(kind="pe-audio", hf_config={**whole.audio_config.to_dict(), **audio}),
        text=TextTowerConfig(
            kind="hf",
            hf_config={**fields, **text},
            pooling="cls",
            max_tokens=min(512, fields["max_position_embeddings"]),
        ),
        head=HeadConfig("pe-audio", whole.text_config.hidden_size),
        init_logit_bias=0.0,
    )
    return ForeignModel("PE-AV", os.fspath(folder), config, ours)


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Of the safetensors in a folder, what belongs to neither video nor the two together."""
    from safetensors import safe_open

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: holds no model*.safetensors; download the whole model")
    own = ("audio_encoder.", "audio_head.", "text_model.", "text_audio_head.", "text_audio_logit_", "audio_model.")
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                    if name.startswith((*own, "audio_video_encoder.embedder.audio_encoder.")):
                        found[name] = tensors.get_tensor(name)
        except Exception as error:  # of safetensors' own kinds, and torch's
            raise ModelError(f"{file}: truncated or damaged ({error}); copy or download it again") from error
    return found
