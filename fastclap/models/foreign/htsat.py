"""HTSAT as LAION-CLAP and MS-CLAP save it, in the names of transformers' `ClapAudioModel`."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from fastclap.errors import ModelError
from fastclap.models.foreign.shared import ForeignWeights, renamed

# the front-end's constants, AudioSet's classifier, and masks that follow from the sizes
_UNUSED = re.compile(r"(spectrogram_extractor|logmel_extractor|tscam_conv|head)\.|.*\.attn_mask$")
_NAMES = [
    (r"^bn0\.", "batch_norm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.relative_position", ".attention.self.relative_position"),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]


def htsat_weights(weights: ForeignWeights, prefix: str) -> dict[str, Tensor]:
    """The HTSAT under a prefix as the parameters of our tower.

    Raises:
        ModelError: an attention's weights do not fall into queries, keys and values.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        if not name.startswith(prefix) or _UNUSED.match(name.removeprefix(prefix)):
            continue
        new = "audio_branch.base.audio_encoder." + renamed(name.removeprefix(prefix), _NAMES)
        if ".attn.qkv." not in new:
            ours[new] = tensor
            continue
        if len(tensor) % 3:
            raise ModelError(f"{weights.path}: {name} has the shape {tuple(tensor.shape)}, no three parts")
        for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            ours[new.replace(".attn.qkv.", f".attention.self.{part}.")] = chunk
    return ours


def with_constants(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds the integers that some files lack: where relative positions stand in their table, and counts of batches."""
    for name, tensor in list(ours.items()):
        if name.endswith(".relative_position_bias_table"):
            size = (round(len(tensor) ** 0.5) + 1) // 2  # of the window
            places = torch.cartesian_prod(torch.arange(size), torch.arange(size))
            offsets = places[:, None] - places + size - 1
            index = offsets[..., 0] * (2 * size - 1) + offsets[..., 1]
            ours.setdefault(name.replace("bias_table", "index"), index)
        elif name.endswith(".running_mean"):
            ours.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.zeros((), dtype=torch.long))
    return ours


def htsat_config(weights: ForeignWeights, prefix: str) -> dict[str, Any]:
    """Sizes of the HTSAT under a prefix, for a `ClapAudioConfig`."""
    stages = weights.count(f"{prefix}layers")
    depths, heads = [], []
    for stage in range(stages):
        depths.append(weights.count(f"{prefix}layers.{stage}.blocks"))
        heads.append(weights.shape(f"{prefix}layers.{stage}.blocks.0.attn.relative_position_bias_table", 2)[1])
    width, _, patch, _ = weights.shape(f"{prefix}patch_embed.proj.weight", 4)
    window = weights.shape(f"{prefix}layers.0.blocks.0.attn.relative_position_bias_table", 2)[0]
    feedforward = weights.shape(f"{prefix}layers.0.blocks.0.mlp.fc1.weight", 2)[0]
    return {
        "num_mel_bins": weights.shape(f"{prefix}bn0.weight", 1)[0],
        "patch_embeds_hidden_size": width,
        "patch_size": patch,
        "patch_stride": [patch, patch],
        "depths": depths,
        "num_attention_heads": heads,
        "window_size": (round(window**0.5) + 1) // 2,
        "mlp_ratio": feedforward / width,
        "hidden_size": width << (stages - 1),
        "spec_size": 256,
    }
