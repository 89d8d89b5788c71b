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

A layer of a Zipformer, with H heads of queries, positions and values of width q, p and v, feed-forward modules of 3/4,
1 and 5/4 of width f, and depthwise kernels of k frames, is

    feed-forward   12·F·h·f
    weights        2·F·h·H·(2q + p) + 2·F²·H·(q + p)
    their users    2·(4·F·h·H·v + 2·F²·H·v)           (twice)
                   6·F·h² + 1.5·F²·h                  (with the first head's weights, 3/4 of h wide)
    convolutions   2·(6·F·h² + 2·F·h·k)               (twice)

with the F of its stack. The table of relative positions, which all clips share, and the averages between stacks are
left out: less than a thousandth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastclap.config import ZipformerConfig

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


def zipformer_forward(config: ZipformerConfig, mels: int, frames: int) -> int:
    """FLOPs of one clip of so many feature frames through a Zipformer and the convolutions before it."""
    (length, bands), total = _convolved(frames, mels), _first_convolution(config, mels, frames)
    first, second, third = config.channels
    total += 2 * 9 * first * second * ((frames - 3) // 2) * ((mels - 1) // 2)
    total += (2 * 9 * second + 2 * 49 + 2 * 6 * third) * third * length * bands
    lists = config.lists()
    total += 2 * length * third * bands * lists["width"][0]
    heads_of = config.query_width + config.position_width
    for index, factor in enumerate(lists["downsampling"]):
        width, feedforward, heads, kernel, layers = (
            lists[name][index] for name in ("width", "feedforward", "heads", "kernel", "layers")
        )
        count = -(-length // factor)
        layer = 12 * count * width * feedforward + 18 * count * width**2 + 4 * count * width * kernel
        layer += 2 * count * width * heads * (config.query_width + heads_of) + 2 * count**2 * heads * heads_of
        layer += heads * config.value_width * (8 * count * width + 4 * count**2) + 6 * count**2 * width // 4
        total += layers * layer
    return total


def clsp_training_step(
    config: ZipformerConfig,
    mels: int,
    text: Mapping[str, Any],
    dim: int,
    frames: Sequence[int],  # of the features of each clip
    tokens: Sequence[int],  # of each caption
) -> int:
    """FLOPs of forward and backward pass of CLSP, each caption counted: a head is two times two matrices."""
    heads = 2 * max(config.lists()["width"]) * dim * len(frames)
    heads += 2 * text["hidden_size"] * (dim + text["hidden_size"]) * len(tokens)  # the latter is the pooler's
    heads += 6 * dim**2 * (len(frames) + len(tokens))
    forward = sum(zipformer_forward(config, mels, n) for n in frames) + sum(text_forward(text, n) for n in tokens)
    return 3 * (forward + heads) - sum(_first_convolution(config, mels, n) for n in frames)


def _convolved(frames: int, mels: int) -> tuple[int, int]:
    """Frames and bands that a Zipformer's convolutions make of these."""
    return (frames - 7) // 2, ((mels - 1) // 2 - 1) // 2


def _first_convolution(config: ZipformerConfig, mels: int, frames: int) -> int:
    return 2 * 9 * config.channels[0] * (frames - 2) * mels


def _layer(length: int, width: int, feedforward: int) -> int:
    return 8 * length * width**2 + 4 * length**2 * width + 4 * length * width * feedforward
