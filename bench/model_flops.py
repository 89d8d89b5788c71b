"""FLOPs of the models that a training step is measured on, from formulas.

A multiply-add counts two, and only products do. With T samples, F frames, width h, heads of width d, feed-forward width
f and n tokens, the forward pass of a clip and of a caption is

    convolutions   Σ 2·kernel·C_in·C_out·frames_out
    projection     2·F·C·h
    positions      2·F⁺·kernel·h·h / groups          (F⁺ = F + 1 for an even kernel: one frame is computed and cut)
    a layer        8·F·h² + 4·F²·h + 4·F·h·f          (q, k, v and output; scores and their sum; feed-forward)
                   + 16·F·h                           (WavLM's gates: each head's slice of width d to 8 numbers)
    a text layer   8·n·h² + 4·n²·h + 4·n·h·f
    a head         2·h·D + 2·D²

and the backward pass twice that, less the gradient of the first convolution's input, which is not needed. Recomputation
(activation checkpointing, gradient caching) and the loss do not count: this is the work of the model, whatever a
program spends on it, so its share of the hardware's peak is the model FLOPs utilisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_DEFAULTS = {  # of transformers' WavLMConfig
    "conv_dim": (512,) * 7,
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
}


def wavlm_frames(config: Mapping[str, Any], samples: int) -> list[int]:
    """Frames after each convolution."""
    config, frames = {**_DEFAULTS, **config}, [samples]
    for kernel, stride in zip(config["conv_kernel"], config["conv_stride"], strict=True):
        frames.append((frames[-1] - kernel) // stride + 1)
    return frames[1:]


def wavlm_forward(config: Mapping[str, Any], samples: int) -> int:
    """FLOPs of one clip of so many samples through WavLM."""
    config, frames = {**_DEFAULTS, **config}, wavlm_frames(config, samples)
    channels = (1, *config["conv_dim"])
    total = sum(
        2 * kernel * inner * outer * count
        for kernel, inner, outer, count in zip(config["conv_kernel"], channels, channels[1:], frames, strict=False)
    )
    length, width = frames[-1], config["hidden_size"]
    kernel = config["num_conv_pos_embeddings"]
    total += 2 * length * channels[-1] * width
    total += 2 * (length + 1 - kernel % 2) * kernel * width * width // config["num_conv_pos_embedding_groups"]
    layer = _layer(length, width, config["intermediate_size"]) + 16 * length * width
    return total + config["num_hidden_layers"] * layer


def text_forward(config: Mapping[str, Any], tokens: int) -> int:
    """FLOPs of one caption of so many tokens through an encoder such as XLM-RoBERTa."""
    return config["num_hidden_layers"] * _layer(tokens, config["hidden_size"], config["intermediate_size"])


def head_forward(width: int, dim: int) -> int:
    """FLOPs of one vector through ParaSpeechCLAP's projection head."""
    return 2 * width * dim + 2 * dim * dim


def training_step(
    wavlm: Mapping[str, Any], text: Mapping[str, Any], dim: int, samples: Sequence[int], tokens: Sequence[int]
) -> int:
    """FLOPs of forward and backward pass on clips and captions of these lengths, each caption counted."""
    wavlm = {**_DEFAULTS, **wavlm}
    heads = head_forward(wavlm["hidden_size"], dim) * len(samples)
    heads += head_forward(text["hidden_size"], dim) * len(tokens)
    first = [2 * wavlm["conv_kernel"][0] * wavlm["conv_dim"][0] * wavlm_frames(wavlm, n)[0] for n in samples]
    forward = sum(wavlm_forward(wavlm, n) for n in samples) + sum(text_forward(text, n) for n in tokens) + heads
    return 3 * forward - sum(first)


def _layer(length: int, width: int, feedforward: int) -> int:
    return 8 * length * width**2 + 4 * length**2 * width + 4 * length * width * feedforward
