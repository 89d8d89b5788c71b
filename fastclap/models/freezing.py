"""Frozen parts of a tower: its front, and its first layers together with all that comes before them.

A frozen part begins where the tower begins, so nothing before it trains: autograd builds no graph for it and keeps
none of its activations, and its parameters have no gradient, no optimizer state and no traffic between ranks. It stays
in training mode. Dropout and SpecAugment are noise that the layers after it are trained with, and without which they
would be trained on other inputs; so freezing changes no gradient of what still trains. A whole tower that is frozen
(`freeze`) has nothing after it but the head, and is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from fastclap.errors import ConfigError
from fastclap.models.layers import LAYER_LISTS, layer_lists


class Stages(NamedTuple):
    """A tower in the order in which it computes."""

    front: Sequence[nn.Module] = ()  # convolutions or embeddings; none: the tower has none that are known
    between: Iterable[nn.Parameter] = ()  # of what else comes before the layers
    layers: Sequence[nn.Module] = ()  # transformer layers; none: likewise


def freeze_parts(stages: Stages, front: bool, layers: int, front_flag: str, layers_flag: str, kind: str) -> None:
    """Freeze the front, and a number of layers with all that comes before them.

    Args:
        stages: of the tower.
        front: freeze the front.
        layers: freeze this many layers.
        front_flag, layers_flag, kind: names of the options and of the tower, for messages.

    Raises:
        ConfigError: the tower has no such part, or fewer layers.
    """
    if front and not stages.front:
        raise ConfigError(f"{front_flag}: this {kind} tower has no such part; leave it off")
    if layers and not stages.layers:
        raise ConfigError(f"{layers_flag}: a tower of this kind ({kind}) has no layers that are known; set it to 0")
    if not 0 <= layers <= len(stages.layers):
        raise ConfigError(
            f"{layers_flag} is {layers}, but the tower has {len(stages.layers)} layers; give 0 to {len(stages.layers)}"
        )
    if front or layers:
        module: Any
        for module in stages.front:
            module.requires_grad_(False)
            if hasattr(module, "_requires_grad"):  # transformers' convolutions, which ask for the waveform's gradient
                module._requires_grad = False
    if layers:
        for parameter in stages.between:
            parameter.requires_grad_(False)
        for layer in stages.layers[:layers]:
            layer.requires_grad_(False)


def transformer_layers(module: nn.Module) -> Sequence[nn.Module]:
    """The layers of an encoder of transformers; none where it calls them by another name."""
    # T5 has a list of blocks, and in each of these a list of layers
    lists = layer_lists(module, (*LAYER_LISTS, "block"))
    return list(lists[0]) if lists else ()
