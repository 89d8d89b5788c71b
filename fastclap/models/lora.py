"""LoRA (Hu et al. 2021, arXiv:2106.09685): low-rank adapters on the linear layers of a pretrained tower, through peft.

A linear layer W·x + b becomes W·x + b + (lora_alpha / lora_rank) · B·A·dropout(x). W and b stay as they are; A and B
train. What is not adapted trains or not as the freeze options say. An export holds W + (lora_alpha / lora_rank) · B·A
and is a plain model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastclap.config import AudioTowerConfig, CLAPConfig, TextTowerConfig
from fastclap.errors import ConfigError, required
from fastclap.models import wavlm
from fastclap.models.freezing import matching

_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"  # peft's names
_BASE = ".base_layer."


def add_adapters(tower: Any, config: AudioTowerConfig | TextTowerConfig, side: str) -> list[nn.Parameter]:
    """Put adapters on the linear layers of a tower, if its configuration asks for any.

    Args:
        tower: as built, with nothing of it frozen yet.
        config: its configuration.
        side: "audio" or "text", for messages.

    Returns:
        The parameters of the adapted layers, which are fixed for good.

    Raises:
        ConfigError: the tower is one of our own, is frozen as a whole, or has no such layers; or the options are
            impossible.
        MissingPackageError: peft is not installed.
    """
    if config.lora_rank == 0:
        if config.lora_targets:
            raise ConfigError(f"{side}.lora_targets needs {side}.lora_rank, such as 8")
        return []
    rules = [
        (config.lora_rank > 0, f"lora_rank is {config.lora_rank}; it must not be negative"),
        (config.lora_alpha > 0, f"lora_alpha is {config.lora_alpha}; it must be positive"),
        (0 <= config.lora_dropout < 1, f"lora_dropout is {config.lora_dropout}; it must lie in [0, 1)"),
        (
            tower.hf_config is not None,
            f"lora_rank: LoRA adapts the pretrained towers of transformers, and a {config.kind} tower is trained from "
            "scratch; set it to 0",
        ),
        (
            not config.freeze,
            "lora_rank: freeze keeps the whole tower fixed. To train adapters alone, leave freeze off and set "
            "freeze_modules to *",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(f"{side}.{message}")
    linears = _linears(tower, config, side)
    peft = required("peft", "LoRA")
    # peft takes names below the module that it changes, or a regular expression for them
    names = "|".join(re.escape(name) for name in linears)
    options = peft.LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=names
    )
    fixed = [parameter for linear in linears.values() for parameter in linear.parameters()]
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    peft.inject_adapter_in_model(options, tower)
    for parameter in trained:  # peft has frozen all but the adapters
        parameter.requires_grad_(True)
    for parameter in fixed:
        parameter.requires_grad_(False)
    for module in tower.modules():
        if hasattr(module, "cast_input_dtype_enabled"):  # to float32 under autocast, which would cast it back
            module.cast_input_dtype_enabled = False
    return fixed


def _linears(tower: Any, config: AudioTowerConfig | TextTowerConfig, side: str) -> dict[str, nn.Module]:
    """The linear layers to adapt, by name: those of `lora_targets`, or all of the transformer layers.

    All of them, because adapters on the attention alone fall behind full fine-tuning (Dettmers et al. 2023,
    arXiv:2305.14314, section 4). Those so small that an adapter would have no fewer parameters are left out. First
    layers that `freeze_layers` keeps fixed get none.
    """
    layers = tower.stages().layers
    kept = {part for layer in layers[: config.freeze_layers] for part in layer.modules()}
    known = {
        name: part
        for name, part in tower.named_modules()
        if isinstance(part, nn.Linear) and part.weight.requires_grad and part not in kept
    }
    option = f"{side}.lora_targets"
    found = matching(known, config.lora_targets, option, endings=True)
    if not config.lora_targets:
        inside = {part for layer in layers for part in layer.modules()}
        found = {n: part for n, part in known.items() if part in inside and _is_larger(part, config.lora_rank)}
    if not found:
        raise ConfigError(
            f"{option}: in this {config.kind} tower there are no layers that are known and not frozen, with linear "
            f"layers larger than adapters of rank {config.lora_rank}; name linear layers, lower the rank, or set "
            "lora_rank to 0"
        )
    encoder = getattr(tower.base, "encoder", None)
    if tower.hf_config["model_type"] == "wavlm" and not isinstance(encoder, wavlm.Encoder):
        ignored = [name for name in found if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "out_proj")]
        if ignored:
            raise ConfigError(
                f"{option}: transformers' own WavLM, which hf_config asks for, reads the weights of its attention past "
                f"any adapter ({ignored[0]}); leave attn_implementation, output_attentions and output_hidden_states "
                "out of hf_config"
            )
    return found


def _is_larger(linear: Any, rank: int) -> bool:
    return linear.in_features * linear.out_features > rank * (linear.in_features + linear.out_features)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith((_DOWN, _UP))


def merged(weights: Mapping[str, Tensor], config: CLAPConfig) -> dict[str, Tensor]:
    """The weights of a model without the adapters, which are added to those of their layers, rounded once.

    Args:
        weights: of a model with adapters, whole; of a model without, they are returned as they are.
        config: of that model.
    """
    found = {}
    for name, tensor in weights.items():
        layer, _, own = name.rpartition(_BASE)
        if f"{layer}{_DOWN}" not in weights:
            if not is_adapter(name):
                found[name] = tensor
            continue
        if own == "weight":
            tower = config.audio if name.startswith("audio_branch.") else config.text
            product = weights[f"{layer}{_UP}"].double() @ weights[f"{layer}{_DOWN}"].double()
            tensor = (tensor.double() + tower.lora_alpha / tower.lora_rank * product).to(tensor.dtype)
        found[f"{layer}.{own}"] = tensor
    return found


def without_adapters(config: CLAPConfig) -> CLAPConfig:
    """The configuration of the model with the weights that `merged` gives."""
    plain: dict[str, Any] = {
        field.name: getattr(AudioTowerConfig(), field.name)
        for field in dataclasses.fields(AudioTowerConfig)
        if field.name.startswith("lora_")
    }
    return dataclasses.replace(
        config, audio=dataclasses.replace(config.audio, **plain), text=dataclasses.replace(config.text, **plain)
    )
