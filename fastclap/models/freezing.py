"""Frozen parts of a tower: its front, its first layers together with all that comes before them, modules by name.

A frozen part has no gradient, no optimizer state and no traffic between ranks. It stays in training mode: dropout and
SpecAugment are noise that the layers after it are trained with, and without which they would be trained on other
inputs; so freezing changes no gradient of what still trains. Front and first layers begin where the tower begins, so
nothing before them trains, and autograd builds no graph for them and keeps none of their activations. Through a module
in the middle gradients flow to what comes before it. A whole tower that is frozen (`freeze`) has nothing after it but
the head, and is evaluated.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from fastclap.config import AudioTowerConfig, TextTowerConfig
from fastclap.errors import ConfigError
from fastclap.models.layers import LAYER_LISTS, layer_lists


class Stages(NamedTuple):
    """A tower in the order in which it computes."""

    front: Sequence[nn.Module] = ()  # convolutions or embeddings; none: the tower has none that are known
    between: Iterable[nn.Parameter] = ()  # of what else comes before the layers
    layers: Sequence[nn.Module] = ()  # transformer layers; none: likewise


def parameters_to_freeze(tower: Any, config: AudioTowerConfig | TextTowerConfig, side: str) -> list[nn.Parameter]:
    """The parameters that the freeze options of a tower keep fixed, of those that would train without them.

    Args:
        tower: as built, before adapters are added to it.
        config: its configuration.
        side: "audio" or "text", for messages.

    Raises:
        ConfigError: the tower has no such part, fewer layers, or no module of such a name.
    """
    stages, layers = tower.stages(), config.freeze_layers
    front_option = "freeze_convolutions" if isinstance(config, AudioTowerConfig) else "freeze_embeddings"
    front = getattr(config, front_option)
    if front and not stages.front:
        raise ConfigError(f"{side}.{front_option}: this {config.kind} tower has no such part; leave it off")
    if layers and not stages.layers:
        raise ConfigError(
            f"{side}.freeze_layers: a tower of this kind ({config.kind}) has no layers that are known; set it to 0"
        )
    if not 0 <= layers <= len(stages.layers):
        raise ConfigError(
            f"{side}.freeze_layers is {layers}, but the tower has {len(stages.layers)} layers; give 0 to "
            f"{len(stages.layers)}"
        )
    modules = list(stages.front) if front or layers else []
    modules += stages.layers[:layers]
    named = {name: part for name, part in tower.named_modules(remove_duplicate=False) if name and _has_parameters(part)}
    modules += matching(named, config.freeze_modules, f"{side}.freeze_modules").values()
    # of a frozen tower, too, the layers' weights are learned
    whole = [p for name, p in tower.named_parameters() if config.freeze and name != "pooling.layer_weights"]
    parts = [stages.between if layers else (), whole, *(module.parameters() for module in modules)]
    return list(dict.fromkeys(p for p in itertools.chain(*parts) if p.requires_grad))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def matching(
    named: Mapping[str, nn.Module], patterns: Iterable[str], option: str, *, endings: bool = False
) -> dict[str, nn.Module]:
    """The modules whose names are, or match, one of the patterns of a shell.

    Args:
        named: modules by name.
        patterns: such as `base.encoder.layer.[0-3]`.
        option: where they come from, for messages.
        endings: a pattern may also match the last parts of a name, such as `q_proj`.

    Raises:
        ConfigError: a pattern matches no name; the message lists near ones.
    """
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        forms = [pattern, f"*.{pattern}"] if endings else [pattern]
        chosen = {name: named[name] for name in named if any(fnmatch.fnmatchcase(name, form) for form in forms)}
        if not chosen:
            near = difflib.get_close_matches(pattern, named, 5, 0.5) or list(named)[:5]
            raise ConfigError(f"{option}: {pattern!r} matches no module with parameters; near: {', '.join(near)}")
        found |= chosen
    return found


def depths(stages: Stages) -> dict[nn.Parameter, int]:
    """How far below the top of its tower a parameter lies: 1 in the last layer, one more in each layer before it.

    What comes before the layers counts as a layer below the first. What comes after them, such as a final norm, is left
    out.
    """
    lowest = len(stages.layers) + 1
    before = itertools.chain(stages.between, *(module.parameters() for module in stages.front))
    found = dict.fromkeys(before, lowest)
    for index, layer in enumerate(stages.layers):
        found |= dict.fromkeys(layer.parameters(), lowest - 1 - index)
    return found


def ask_for_gradients(model: nn.Module) -> None:
    """Tell transformers' own convolutions whether to ask for the waveform's gradient, which they need not if frozen."""
    module: Any
    for module in model.modules():
        if hasattr(module, "_requires_grad"):
            module._requires_grad = any(parameter.requires_grad for parameter in module.parameters())


def transformer_layers(module: nn.Module) -> Sequence[nn.Module]:
    """The layers of an encoder of transformers; none where it calls them by another name."""
    # T5 has a list of blocks, and in each of these a list of layers
    lists = layer_lists(module, (*LAYER_LISTS, "block"))
    return list(lists[0]) if lists else ()
