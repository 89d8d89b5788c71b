"""What the readers of foreign checkpoints have in common: the weights to be asked, and what they hand back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastclap.config import CLAPConfig
from fastclap.errors import ModelError
from fastclap.features import PRESETS
from fastclap.kernels.log_mel.spec import mel_bank

if TYPE_CHECKING:
    import tokenizers

SPECIAL_TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
"""Of RoBERTa."""


@dataclass
class ForeignModel:
    """A checkpoint of another code in our terms.

    Attributes:
        code: whose code.
        tokenizer: hub id or folder of its tokenizer.
        config: the architecture.
        weights: the state dict.
        prepare_tokenizer: what the code does to that tokenizer, in place; doing it twice is doing it once.
    """

    code: str
    tokenizer: str
    config: CLAPConfig
    weights: dict[str, Tensor]
    prepare_tokenizer: Callable[[tokenizers.Tokenizer], None] | None = None


class ForeignWeights:
    """A foreign state dict, to be asked for shapes and counts by name; what is missing is an error.

    Args:
        path: to name in errors.
        code: whose checkpoint it should be, likewise.
        tensors: the state dict.
    """

    def __init__(self, path: Path, code: str, tensors: dict[str, Tensor]) -> None:
        self.path, self.code, self.tensors = path, code, tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Shape of a tensor that must have this many dimensions, none of them empty."""
        if name not in self.tensors:
            raise ModelError(f"{self.path}: not a checkpoint of {self.code}: {name} is missing")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != dimensions or not all(shape):
            raise ModelError(f"{self.path}: {name} has the shape {shape}; {dimensions} dimensions were expected")
        return shape

    def count(self, prefix: str) -> int:
        """How many numbered modules there are under a name."""
        found = {match[1] for name in self.tensors if (match := re.match(re.escape(prefix) + r"\.(\d+)\.", name))}
        if not found:
            raise ModelError(f"{self.path}: not a checkpoint of {self.code}: {prefix}.0.* is missing")
        return len(found)


def modern_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that today's releases give the parameters, without the wrappers' prefixes and the constant buffers."""
    for prefix in ("module.", "_orig_mod.", "module."):  # of DistributedDataParallel around or inside torch.compile
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    renamed = {}
    for name, tensor in weights.items():
        if name.endswith(("embeddings.position_ids", "embeddings.token_type_ids")):
            continue
        name = re.sub(r"\.conv\.weight_g$", ".conv.parametrizations.weight.original0", name)
        name = re.sub(r"\.conv\.weight_v$", ".conv.parametrizations.weight.original1", name)
        renamed[name] = tensor
    for name in ("log_logit_scale", "logit_scale_a", "logit_scale", "logit_bias"):
        if name in renamed and renamed[name].numel() == 1:  # some codes keep it as one element
            renamed[name] = renamed[name].reshape(())
    return renamed


def features_with_its_bank(
    weights: ForeignWeights, name: str, preset: str, known: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Of some known changes to a preset of `LogMel`, those that make the mel filter bank which a checkpoint holds.

    Its own code uses that bank, whatever its configuration says. Without one they are the first, as published.

    Raises:
        ModelError: an unknown bank.
    """
    if name not in weights:
        return known[0]
    theirs = weights.tensors[name].float()
    for changes in known:
        ours = torch.from_numpy(mel_bank(replace(PRESETS[preset], **changes))).float()  # [bins, mels]
        for bank in (ours, ours.T):
            if bank.shape == theirs.shape and (bank - theirs).abs().max() <= 1e-5 * bank.max():
                return changes
    raise ModelError(f"{weights.path}: {name} is no mel filter bank that {weights.code} is known to use")


def renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """The name after every rule (pattern, replacement), in their order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def bert_config(weights: ForeignWeights, base: str, head_width: int = 64) -> dict[str, Any]:
    """A BERT under this name: its sizes, from the shapes; one head for every `head_width` channels, as published."""
    vocabulary, hidden = weights.shape(f"{base}.embeddings.word_embeddings.weight", 2)
    return {
        "model_type": "bert",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": weights.count(f"{base}.encoder.layer"),
        "num_attention_heads": max(1, hidden // head_width),
        "intermediate_size": weights.shape(f"{base}.encoder.layer.0.intermediate.dense.weight", 2)[0],
        "max_position_embeddings": weights.shape(f"{base}.embeddings.position_embeddings.weight", 2)[0],
        "type_vocab_size": weights.shape(f"{base}.embeddings.token_type_embeddings.weight", 2)[0],
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }


def roberta_config(weights: ForeignWeights, base: str, model_type: str = "roberta") -> dict[str, Any]:
    """A RoBERTa under this name, which has BERT's shapes."""
    return {**bert_config(weights, base), "model_type": model_type, "layer_norm_eps": 1e-5, **SPECIAL_TOKENS}
