"""Whisper's encoder as a tower: on the clip's own positions, or on the window of 30 s as it was published.

The window costs the same for every clip: 1,500 positions, of which a clip of 2 s fills 100. With `window` clip the
features end where the clip ends and the transformer sees the clip's own positions, at their places in the table: other
inputs than Whisper was trained on, and for descriptions of voices better ones. Positions past the end are zeroed before
each convolution and masked or left out in attention, so a clip has the same vector alone, padded and packed.

The model stays transformers' own: its configuration, initialisation, loading and parameter names. `Encoder` adopts its
parameters and computes the same: rows packed one after the other where the host knows the lengths, addition, bias,
dropout and the next norm as one kernel, the feed-forward layer keeping one activation, layers that can be compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastclap.config import AudioTowerConfig
from fastclap.errors import ConfigError
from fastclap.kernels import dispatch
from fastclap.kernels.feed_forward import feed_forward
from fastclap.kernels.residual_layer_norm import residual_layer_norm
from fastclap.models.audio_tower import AudioTower, features_of, zeros_that_count
from fastclap.models.freezing import Stages
from fastclap.models.layers import length_mask, prepare_waveform
from fastclap.models.packing import Packing, longest_of
from fastclap.models.pooling import Pooling
from fastclap.models.pretrained import (
    compile_layers,
    complete_config,
    graphs_of,
    transformers_config,
    transformers_model,
)


class WhisperTower(AudioTower):
    """The encoder of a Whisper of any size on raw audio at 16 kHz, pooled as `Pooling` describes.

    A clip that is longer than the window is cut, or with `chunks` seen in parts by `CLAP.encode_audio`.
    """

    base: Encoder
    window: int

    def __init__(self, config: AudioTowerConfig, load_pretrained: bool) -> None:
        super().__init__()
        from transformers import WhisperConfig, WhisperModel
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        model_config, pretrained = transformers_config(config, WhisperConfig, load_pretrained)
        self.hf_config = complete_config(model_config)
        module: Any = transformers_model(WhisperModel, WhisperEncoder, model_config, pretrained)
        self.base = Encoder(module.encoder if pretrained is not None else module, model_config)
        options = {"n_mels": model_config.num_mel_bins, **config.feature_options}
        if config.window == "full":
            options = {"num_frames": 2 * model_config.max_source_positions, **options}
        self.log_mel = features_of("whisper", options)
        self.hop = 2 * self.log_mel.hop_length  # samples a position
        self.window = model_config.max_source_positions * self.hop
        self.chunk = self.window if config.chunks else None
        self.whole_window, self.pool_padding = config.window == "full", config.pool_padding
        width, states = model_config.d_model, model_config.encoder_layers + 1
        if (config.pool_padding or config.frame_pooling > 1) and not self.whole_window:
            raise ConfigError("pool_padding and frame_pooling are of the whole window: they need window full")
        if config.frame_pooling > 1 and (config.hidden_states != "last" or config.pooling == "token"):
            raise ConfigError("frame_pooling is of the last state alone: it needs hidden_states last and no token")
        if config.frame_pooling < 1 or model_config.max_source_positions % config.frame_pooling:
            raise ConfigError(f"frame_pooling {config.frame_pooling} does not divide the window's positions")
        if config.hidden_states != "last" and self.base.layerdrop:
            raise ConfigError(
                f"hidden_states {config.hidden_states} needs the states of all layers, but encoder_layerdrop drops "
                'some in training; set hf_config to {"encoder_layerdrop": 0.0}'
            )
        self.base.frame_pooling = config.frame_pooling
        over_time = "first" if config.pooling == "token" else config.pooling or "mean"
        self.pooling = Pooling(over_time, config.hidden_states, width, states)
        self.width = self.pooling.width
        # WavLink's global token goes before the first position, and has none itself
        self.has_token = config.pooling == "token"
        self.token = nn.Parameter(0.02 * torch.randn(width)) if self.has_token else None

    def stages(self) -> Stages:
        base = self.base
        return Stages([base.conv1, base.conv2], base.embed_positions.parameters(), list(base.layers))

    def prepare_training(self, *, compile: bool = False, checkpoint: bool = False) -> None:
        self.base.checkpoint, self.base.compiled = checkpoint, compile
        if compile:
            compile_layers(self.base.layers)

    def summarize(
        self,
        audio: Tensor,
        lengths: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        host_lengths: Sequence[int] | None = None,
    ) -> Tensor:  # [B, states, size]
        spec, everything = self.log_mel.spec, lengths is None
        least = spec.win_length  # samples of one frame
        if host_lengths is not None:
            audio = audio[:, : max(1, longest_of("host_lengths", host_lengths, audio))]
        waveform, lengths = prepare_waveform(audio[:, : self.window], lengths)
        lengths = lengths.clamp(least, self.window)
        size, ends = max(least, waveform.shape[1]), lengths
        if self.whole_window:  # of the padded window, as Whisper was trained, and not of each clip alone
            zeros = zeros_that_count(self.log_mel, self.window)
            ends, size = (lengths + zeros).clamp(max=self.window), min(size + zeros, self.window)
        waveform = F.pad(waveform, (0, size - waveform.shape[1]))
        with torch.autocast(waveform.device.type, enabled=False):
            features, frames = self.log_mel(waveform, ends)
        x = features.transpose(1, 2).to(self.base.conv1.weight.dtype)
        if self.whole_window:
            positions = (lengths + self.hop - 1) // self.hop
            return self._pooled(self.base.embed(x, None), None, None, None if self.pool_padding else positions)
        x, positions = self.base.embed(x, frames), (frames + 1) // 2
        if everything:
            return self._pooled(x, None, None, None)
        if host_lengths is None:
            return self._pooled(x, None, length_mask(positions, x.shape[1]), positions)
        rows = (spec.frame_lengths(torch.tensor(host_lengths).clamp(least, self.window)) + 1) // 2 + self.has_token
        counts = rows.tolist()
        if min(counts) == max(counts):
            return self._pooled(x, None, None, None)
        return self._pooled(x, Packing(counts, audio.device), None, positions)

    def _pooled(
        self,
        x: Tensor,  # [B, T, width]
        packing: Packing | None,
        mask: Tensor | None,  # bool [B, T], keys of attention; None: all, or as packed
        positions: Tensor | None,  # [B], of what is pooled; None: all
    ) -> Tensor:
        if self.token is not None:
            x = torch.cat([self.token.to(x.dtype).expand(len(x), 1, -1), x], 1)
            mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        positions = None if positions is None else -(-positions // self.base.frame_pooling)
        found: list[Tensor] = []

        def pool(x: Tensor) -> None:
            if packing is not None:
                x = packing.unpack(x)
            valid = None if positions is None or self.token is not None else length_mask(positions, x.shape[1])
            found.append(self.pooling.pool(x, valid, len(found)))

        hidden = self.base.encode(
            x if packing is None else packing.pack(x), packing, mask, pool if self.pooling.every_state else None
        )
        if not found:
            pool(hidden)
        return torch.stack(found, 1)

    def combine(self, summary: Tensor) -> Tensor:
        return self.pooling.combine(summary).to(self.base.conv1.weight.dtype)


def _apart(linear: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a linear layer makes of x without its bias, and the bias; a layer of another kind has its own way."""
    if type(linear) is nn.Linear:
        return F.linear(x, linear.weight), linear.bias
    return linear(x), None


class EncoderLayer(nn.Module):
    """One transformer layer of Whisper, with the parameters of transformers' layer, up to its last addition.

    That addition belongs to the encoder, as one kernel does it together with the norm that follows.

    Args:
        layer: the layer whose modules are adopted, so their parameter names stay.
    """

    def __init__(self, layer: Any, plain_gelu: bool) -> None:
        super().__init__()
        self.self_attn: Any = layer.self_attn
        self.self_attn_layer_norm = layer.self_attn_layer_norm
        self.fc1: Any = layer.fc1
        self.fc2: Any = layer.fc2
        self.final_layer_norm = layer.final_layer_norm
        self.activation = layer.activation_fn
        self.dropout, self.activation_dropout = float(layer.dropout), float(layer.activation_dropout)
        self.plain_gelu = plain_gelu

    @property
    def used_from_outside(self) -> list[nn.Parameter]:
        """Parameters that the encoder reads: those of its addition and norm between two layers."""
        norm = self.self_attn_layer_norm
        return [norm.weight, norm.bias, *([self.fc2.bias] if type(self.fc2) is nn.Linear else [])]

    def forward(
        self,
        x: Tensor,  # [B, T, C] or packed [total, C], the residual stream
        normalized: Tensor,  # likewise, its norm
        packing: Packing | None,
        mask: Tensor | None,  # bool [B, 1, 1, T]
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # the stream, what is to be added to it, and the bias of that
        attended, bias = _apart(self.self_attn.out_proj, self._attend(normalized, packing, mask))
        norm = self.final_layer_norm
        dropout = self.dropout if self.training else 0.0
        x, normalized = residual_layer_norm(x, attended, bias, norm.weight, norm.bias, norm.eps, dropout=dropout)
        return x, *self._feed_forward(normalized)

    def _attend(self, x: Tensor, packing: Packing | None, mask: Tensor | None) -> Tensor:
        attention = self.self_attn
        q, k, v = (
            project(x).unflatten(-1, (attention.num_heads, -1))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        dropout = float(attention.dropout) if self.training else 0.0
        if packing is not None:
            return packing.attention(q, k, v, dropout).flatten(-2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(-2)

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        dropout = self.activation_dropout if self.training else 0.0
        if self.plain_gelu and not dropout and type(self.fc1) is type(self.fc2) is nn.Linear:
            return feed_forward(x, self.fc1.weight, self.fc1.bias, self.fc2.weight), self.fc2.bias
        return _apart(self.fc2, F.dropout(self.activation(self.fc1(x)), dropout, self.training))


class Encoder(nn.Module):
    """Whisper's encoder, with the parameters of transformers' `WhisperEncoder`.

    Args:
        encoder: the module whose parameters are adopted.
        config: its `WhisperConfig`.

    Attributes:
        frame_pooling: positions that are averaged before the final norm.
        checkpoint: in training, keep each layer's input only and compute the layer again in the backward pass.
        compiled: the layers are compiled, for training alone.
    """

    def __init__(self, encoder: Any, config: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = encoder.conv1, encoder.conv2
        self.embed_positions = encoder.embed_positions
        plain_gelu = config.activation_function == "gelu"
        self.layers = nn.ModuleList(EncoderLayer(layer, plain_gelu) for layer in encoder.layers)
        self.layer_norm = encoder.layer_norm
        self.dropout, self.layerdrop = float(config.dropout), float(config.encoder_layerdrop)
        self.frame_pooling = 1
        self.checkpoint = self.compiled = False

    def embed(
        self,
        features: Tensor,  # [B, mels, frames]
        frames: Tensor | None,  # [B] valid frames; None: all
    ) -> Tensor:  # [B, T, width]
        """The input of the first layer; what lies past a clip's end means nothing."""
        if frames is not None:
            features = features.masked_fill(~length_mask(frames, features.shape[2])[:, None], 0.0)
        x = F.gelu(self.conv1(features))
        if frames is not None:
            x = x.masked_fill(~length_mask(frames, x.shape[2])[:, None], 0.0)
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        return F.dropout(x + self.embed_positions.weight[: x.shape[1]], self.dropout, self.training)

    def encode(
        self,
        x: Tensor,  # [B, T, width], or packed [total, width]
        packing: Packing | None,
        mask: Tensor | None,  # bool [B, T]; None: all positions are valid, or as packed
        visit: Callable[[Tensor], None] | None = None,  # is shown the input of every layer, and the result
    ) -> Tensor:  # like x
        """Output of the last layer."""
        keys = None if mask is None else mask[:, None, None]
        # LayerDrop: drawn on the host, whose generator a gradient cache replays, and read without asking a device
        drops = self.training and self.layerdrop > 0
        draws = torch.rand(len(self.layers), device="cpu").tolist() if drops else [1.0] * len(self.layers)
        layers: Any = self.layers
        norms = [*(layer.self_attn_layer_norm for layer in layers), self.layer_norm]
        dropout = self.dropout if self.training else 0.0

        def add(x: Tensor, branch: Tensor | None, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
            # the encoder's result is in float32 under autocast, as torch's would be
            wide = norm is self.layer_norm and dispatch.autocast_dtype(x) is not None
            dtype = torch.float32 if wide else None
            return residual_layer_norm(x, branch, bias, norm.weight, norm.bias, norm.eps, dropout=dropout, dtype=dtype)

        x, normalized = add(x, None, None, norms[0])
        with graphs_of(self):
            for layer, draw, norm in zip(layers, draws, norms[1:], strict=True):
                if visit is not None:
                    visit(x)
                branch = bias = None
                if draw >= self.layerdrop:
                    inputs = (x, normalized, packing, keys)
                    if self.checkpoint and self.training and torch.is_grad_enabled():
                        x, branch, bias = checkpoint(layer, *inputs, use_reentrant=False)
                    else:
                        x, branch, bias = layer(*inputs)
                if norm is self.layer_norm and self.frame_pooling > 1:
                    x, _ = add(x, branch, bias, norm)
                    x = x.unflatten(1, (-1, self.frame_pooling)).mean(2)
                    branch = bias = None
                x, normalized = add(x, branch, bias, norm)
        if visit is not None:
            visit(normalized)
        return normalized
