"""The folder of a transformers `ClapModel`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import ModelError
from fastclap.models.folder import check_index
from fastclap.models.foreign.shared import SPECIAL_TOKENS, ForeignModel, modern_names
from fastclap.models.sizes import Allowance, check_counts, free_memory
from fastclap.reading import read_json


def read_transformers(folder: Path, audio: dict[str, Any], text: dict[str, Any]) -> ForeignModel:
    """The folder of a transformers `ClapModel`, whose configuration says everything; `audio` and `text` change it."""
    from transformers import ClapConfig, ClapModel

    check_index(folder)
    data = read_json(folder / "config.json", ModelError)
    check_counts(data, str(folder / "config.json"))
    try:
        whole = ClapConfig.from_pretrained(folder)
        if whole.audio_config.enable_fusion:
            raise ModelError(f"{folder}: a fusion model, which takes four spectrograms a clip; use one without fusion")
        if whole.projection_hidden_act != "relu":
            raise ModelError(f"{folder}: projection_hidden_act is {whole.projection_hidden_act}; only relu is known")
        with Allowance(data, free_memory(), "of memory are free"):
            model, info = ClapModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except ModelError:
        raise
    except Exception as error:  # of any kind, for a file that another program has written
        raise ModelError(f"{folder}: the CLAP model of transformers could not be loaded ({error})") from error
    wrong = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    wrong += [f"{name} has another shape" for name in map(str, sorted(info["mismatched_keys"]))]
    if wrong:
        raise ModelError(f"{folder}: not the weights of its configuration: {'; '.join(wrong[:5])}")
    renamed = {}
    for name, tensor in modern_names(model.state_dict()).items():
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
            *("type_vocab_size", "layer_norm_eps", *SPECIAL_TOKENS),
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
