"""Models of transformers for the towers: their configurations, pretrained or random weights, checkpointed layers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastclap.config import AudioTowerConfig, TextTowerConfig
from fastclap.errors import ConfigError, FastclapError, ModelError
from fastclap.models.folder import CONFIG_FILE, check_index
from fastclap.models.layers import SharedContext
from fastclap.models.sizes import check_counts
from fastclap.reading import read_json


def transformers_config(
    config: AudioTowerConfig | TextTowerConfig, config_class: Any, load_pretrained: bool
) -> tuple[Any, str | None]:
    """The transformers configuration that a tower asks for, and the name of the weights to start from, if any.

    Raises:
        ConfigError: the configuration is incomplete or unknown to transformers, or would run code from the hub.
        ModelError: the pretrained model's configuration cannot be read.
    """
    changes = dict(config.hf_config or {})
    for key in ("attn_implementation", "_attn_implementation", "trust_remote_code"):
        if "/" in str(value := changes.get(key)) or (key == "trust_remote_code" and value is not None):
            raise ConfigError(f"hf_config: {key}={value!r} would run code from the hub, which is not supported")
    if config.pretrained is not None and load_pretrained:
        folder = Path(config.pretrained)
        if folder.is_dir():
            check_index(folder)
            whole = read_json(folder / CONFIG_FILE, ModelError)
            if not isinstance(whole, dict):
                raise ModelError(f"{folder / CONFIG_FILE}: holds {type(whole).__name__} instead of an object")
            check_counts(whole, str(folder / CONFIG_FILE))
        try:
            found = config_class.from_pretrained(config.pretrained, trust_remote_code=False, **changes)
        except Exception as error:  # of any kind, for a file that another program has written
            raise ModelError(f"{config.pretrained}: no transformers configuration could be read ({error})") from error
        if "/" in str(found._attn_implementation):
            raise ModelError(
                f"{config.pretrained}: {CONFIG_FILE} asks for attention {found._attn_implementation!r}, which "
                "would run code from the hub; this is not supported"
            )
        return found, config.pretrained
    if config.hf_config is None:
        raise ConfigError(f"a {config.kind} tower needs `pretrained` (folder or hub id) or `hf_config`")
    if hasattr(config_class, "for_model"):
        model_type = changes.pop("model_type", None)
        if model_type is None:
            raise ConfigError(f"hf_config of a {config.kind} tower needs a model_type, such as wavlm or xlm-roberta")
        from transformers import CONFIG_MAPPING

        if model_type not in CONFIG_MAPPING:
            raise ConfigError(f"this transformers release knows no model_type {model_type!r}")
        return config_class.for_model(model_type, **changes), None
    return config_class(**changes), None


def complete_config(model_config: Any) -> dict[str, Any]:
    """Everything that rebuilds the same architecture, JSON-able, whatever later releases choose as defaults."""
    whole = json.loads(model_config.to_json_string(use_diff=False))
    return {key: value for key, value in whole.items() if key not in ("id2label", "label2id", "_name_or_path")}


def transformers_model(
    loader: Any,
    build: Any,
    model_config: Any,
    pretrained: str | None,
    optional: tuple[str, ...] = (),
) -> nn.Module:
    """Pretrained float32 weights when a name is given, else a random initialisation.

    transformers merely warns when a checkpoint leaves parameters at random values; here that is an error, except for
    parameters whose name contains one of `optional`.

    Raises:
        ModelError: the weights cannot be read, or are those of another architecture.
    """
    if pretrained is None:
        return build(model_config)
    try:
        module, info = loader.from_pretrained(
            pretrained, config=model_config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except FastclapError:
        raise
    except Exception as error:  # likewise
        raise ModelError(f"{pretrained}: the weights could not be loaded ({error})") from error
    absent = [key for key in sorted(info["missing_keys"]) if not any(part in key for part in optional)]
    if absent or info["mismatched_keys"]:
        wrong = absent + [str(key) for key in info["mismatched_keys"]]
        raise ModelError(f"{pretrained}: not a checkpoint of {type(module).__name__}; it lacks {', '.join(wrong[:5])}")
    return module


def checkpoint_layers(module: Any) -> None:
    """Let a model of transformers compute its layers again in the backward pass.

    Raises:
        ConfigError: its architecture cannot.
    """
    try:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"activation checkpointing: {error}") from error
    if hasattr(module, "_require_grads_hook"):  # a gradient of token embeddings for reentrant checkpoints' sake
        module.disable_input_require_grads()


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile layers of one class for training. They share their graphs, which serve batches of every size.

    Sizes are unknowns from the first graph on. A graph for each size would soon be one more than torch keeps of a piece
    of code (eight), after which it silently runs as it is; of unknown sizes there are four: with a gradient or without
    (the first pass of a gradient cache), of several rows or of one.
    """
    for layer in layers:
        layer.compile(dynamic=True)


_as_written = SharedContext(lambda: torch.compiler.set_stance("force_eager"))


def graphs_of(module: Any) -> AbstractContextManager[Any]:
    """A module's layers, if they are `compiled`, run as they were written unless in training: evaluation has batches of
    many more kinds."""
    return _as_written() if module.compiled and not module.training else nullcontext()
