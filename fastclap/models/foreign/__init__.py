"""Reading checkpoints of other codes: ParaSpeechCLAP, CLSP, LAION-CLAP, MS-CLAP, VoiceCLAP, PE-AV, and transformers'.

A foreign state dict holds weights and no configuration. Widths, depths, kernel and window sizes are read from the
shapes, the rest is as published, and both can be overridden. Keys are renamed, and later everything must fit: a key
that is missing, left over or of another shape is an error that names it, since a model with a few random layers would
still give plausible numbers. Only tensors, plain numbers and paths are unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastclap.errors import FastclapError, ModelError
from fastclap.models.folder import FOREIGN_TYPES, SavedModel, find_model, format_of, is_foreign, load_state_dict_file
from fastclap.models.foreign.clsp import icefall_names, read_clsp, read_clsp_folder
from fastclap.models.foreign.laion import read_laion
from fastclap.models.foreign.msclap import read_msclap
from fastclap.models.foreign.paraspeechclap import read_paraspeechclap
from fastclap.models.foreign.pe_audio import read_pe_audio
from fastclap.models.foreign.shared import ForeignModel, ForeignWeights, modern_names
from fastclap.models.foreign.transformers_clap import read_transformers
from fastclap.models.foreign.voiceclap import read_voiceclap, read_voiceclap_folder
from fastclap.models.tokenizer import Tokenizer, as_tokenizer, check_vocabulary

# by what the first key that is theirs alone begins with
_FILES = {
    "audio_branch.base.": ("ParaSpeechCLAP", read_paraspeechclap),
    "logit_scale_a": ("LAION-CLAP", read_laion),
    "caption_encoder.": ("MS-CLAP", read_msclap),
    "encoder_embed.": ("CLSP", read_clsp),
    "text_encoder.": ("VoiceCLAP", read_voiceclap),
}
# by the model_type in config.json
_FOLDERS = {
    "clap": read_transformers,
    "clsp": read_clsp_folder,
    "pe_audio": read_pe_audio,
    "pe_audio_video": read_pe_audio,
    "voiceclap-small": read_voiceclap_folder,
}


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
    try:
        found = _read_folder(path, audio, text) if path.is_dir() else _read_file(path, audio, text)
    except FastclapError:
        raise
    except Exception as error:  # shapes and entries that no such model has
        told = f"{type(error).__name__}: {error}"
        raise ModelError(f"{path}: not such a checkpoint as it seems, or damaged ({told})") from error
    try:
        tokenizer = as_tokenizer(found.tokenizer if tokenizer is None else tokenizer, found.prepare_tokenizer)
        check_vocabulary(tokenizer, (found.config.text.hf_config or {})["vocab_size"], str(path))
    except ModelError as error:
        raise ModelError(
            f"{error}. The checkpoint {path} holds no tokenizer; give the folder or hub id of one with tokenizer="
        ) from error
    origin = f"Weights converted from the {found.code} checkpoint `{path.name}`."
    return SavedModel(found.config, found.weights, tokenizer, path, path, origin=origin)


def _read_folder(path: Path, audio: dict[str, Any], text: dict[str, Any]) -> ForeignModel:
    if not is_foreign(path):
        raise ModelError(
            f"{path}: no configuration of a model that is read (config.json with model_type "
            f"{', '.join(sorted(FOREIGN_TYPES))})"
        )
    return _FOLDERS[str(format_of(path))](path, audio, text)


def _read_file(path: Path, audio: dict[str, Any], text: dict[str, Any]) -> ForeignModel:
    weights = modern_names(load_state_dict_file(path))
    if any(name.startswith("audio_branch.encoder_embed.") for name in weights):
        raise ModelError(f"{path}: the weights of a fastclap model without its configuration; name its folder")
    weights = icefall_names(weights)
    for sign, (code, read) in _FILES.items():
        if any(name.startswith(sign) for name in weights):
            return read(ForeignWeights(path, code, weights), audio, text)
    if any(name.startswith("clap_project.") for name in weights):
        raise ModelError(f"{path}: MS-CLAP's captioner, which embeds no text; use CLAP_weights_2023.pth")
    names = ", ".join(list(weights)[:3]) or "nothing"
    raise ModelError(
        f"{path}: the state dict of neither ParaSpeechCLAP (audio_branch.base.*, text_branch.base.*, "
        f"audio_projection.linear1.weight, log_logit_scale, …) nor LAION-CLAP (logit_scale_a, …) nor MS-CLAP "
        f"(audio_encoder.base.*, caption_encoder.base.*, …) nor VoiceCLAP (audio_encoder.blocks.*, "
        f"text_encoder.*, …) nor CLSP (encoder_embed.*, encoder.*, text_encoder.*, …); it holds {names}"
    )
