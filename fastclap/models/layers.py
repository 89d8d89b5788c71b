"""Audio and text towers: padded batches in, one vector a clip or caption out.

Every tower takes the raw batch (int16 or float waveform with lengths; token ids with a mask) and does its own front-end
on the device, so a training step copies nothing but samples and ids. Padding is invisible: samples, frames and tokens
past an item's end are zeroed or masked wherever a layer could carry them into valid positions, hence the same clip
gives the same vector alone, in a batch, or padded. Where a pretrained architecture makes that impossible (a GroupNorm
over time), ``equal_lengths_only`` says so and ``CLAP.embed_audio`` batches equal lengths.

SpecAugment masks are drawn by torch on the device: no host sync, and a gradient cache that restores torch's generators
replays the same masks. The towers of transformers keep their module as ``.base``, the name in published checkpoints.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fastclap import wavlm
from fastclap.config import AudioTowerConfig, TextTowerConfig
from fastclap.errors import ConfigError, ModelError
from fastclap.features import LogMel
from fastclap.kernels.waveform import normalize_waveform
from fastclap.packing import Packing, is_sharded, length_groups, longest_of, to_device, use_packed_attention

# ---------------------------------------------------------------------------------------------------------------------
# shared pieces


def length_mask(
    lengths: Tensor,  # [B]
    size: int,
) -> Tensor:  # bool [B, size], True on valid positions
    """Valid positions of items of the given lengths in a padded axis of ``size``."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def masked_mean(
    x: Tensor,  # [B, T, C]
    mask: Tensor | None,  # bool [B, T]
) -> Tensor:  # float32 [B, C]
    """Mean over the valid positions, accumulated in float32."""
    if mask is None:
        return x.float().mean(1)
    return x.float().masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True)


def as_float(audio: Tensor) -> Tensor:
    """int16 or floating-point samples as float32 in ±1."""
    return audio.float() / 32768 if audio.dtype == torch.int16 else audio.float()


def prepare_waveform(
    audio: Tensor,  # int16 or float [B, T]
    lengths: Tensor | None,  # [B]
) -> tuple[Tensor, Tensor | None]:
    """Float32 waveform in ±1 with zeros past each end, and the lengths, at least 1, on its device."""
    waveform = as_float(audio)
    if lengths is not None:
        lengths = lengths.to(waveform.device)
        waveform = waveform.masked_fill(~length_mask(lengths, waveform.shape[1]), 0.0)
        lengths = lengths.clamp(min=1)
    return waveform, lengths


def uniform_spans(
    lengths: Tensor,  # [B] valid size of the axis
    size: int,
    count: int,
    max_width: int,
) -> Tensor:  # bool [B, size], True where masked
    """SpecAugment: union of ``count`` spans an item, width uniform in 0..max_width, at most half of the item each."""
    draws = torch.rand(2, lengths.shape[0], count, 1, device=lengths.device)
    lengths = lengths[:, None, None]
    width = torch.minimum((draws[0] * (max_width + 1)).long(), lengths // 2)
    start = (draws[1] * (lengths - width + 1)).long()
    position = torch.arange(size, device=lengths.device)
    return ((position >= start) & (position < start + width)).any(1)


def warp_bands(
    features: Tensor,  # [B, T, bands]
    share: float,
) -> Tensor:  # [B, T, bands]
    """Vocal tract length perturbation (Jaitly & Hinton 2013) on the mel axis: band i takes the value at i·(1 ± share).

    The factor is drawn for each clip, uniformly; values between bands are interpolated and the last band is repeated.
    """
    batch, frames, bands = features.shape
    factor = 1 + share * (2 * torch.rand(batch, 1, device=features.device) - 1)
    position = (torch.arange(bands, device=features.device) * factor).clamp(max=bands - 1)
    low = position.long().clamp(max=bands - 2)
    left, right = (features.gather(2, at[:, None].expand(-1, frames, -1)) for at in (low, low + 1))
    return torch.lerp(left, right, (position - low)[:, None].to(features.dtype))


def proportional_spans(
    lengths: Tensor,  # [B] valid size of the axis
    size: int,
    share: float,
    width: int,
    min_spans: int,
) -> Tensor:  # bool [B, size], True where masked
    """wav2vec 2.0's masking on the device: share·length/width spans (rounded at random) at distinct starts.

    The definition is that of transformers' ``_compute_mask_indices``, which draws from NumPy on the host instead.
    """
    width = min(width, size)
    spans = (share * lengths / width + torch.rand(lengths.shape[0], device=lengths.device)).long().clamp(min=min_spans)
    spans = torch.minimum(spans, lengths // width)
    most = min(size, max(int(share * size / width) + 1, min_spans))
    order = torch.rand(lengths.shape[0], size, device=lengths.device)
    order = order.masked_fill(~length_mask(lengths - width + 1, size), -1.0)
    starts = order.topk(most, dim=1).indices
    chosen = length_mask(spans, most).int()
    marks = torch.zeros(lengths.shape[0], size, dtype=torch.int, device=lengths.device).scatter_(1, starts, chosen)
    running = marks.cumsum(1)
    return (running - F.pad(running, (width, 0))[:, :size]) > 0


class Block(nn.Module):
    """Pre-norm transformer block with rotary positions and scaled dot-product attention."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ConfigError(f"width must be a multiple of twice the heads (rotary pairs); got {width} and {heads}")
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, feedforward * width)
        self.down = nn.Linear(feedforward * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,  # [B, T, C], or packed [total, C]
        rotary: tuple[Tensor, Tensor],  # cos, sin [T or total, C // heads]
        mask: Tensor | None,  # bool [B, 1, 1, T]
        packing: Packing | None = None,  # how x is packed; the mask has no meaning then
    ) -> Tensor:  # like x
        qkv = rearrange(self.qkv(self.attention_norm(x)), "... (h c) -> ... h c", h=3 * self.heads)
        qk, v = qkv[..., : 2 * self.heads, :], qkv[..., 2 * self.heads :, :]
        cos, sin = (table[:, None] for table in rotary)
        first, second = qk.chunk(2, -1)
        qk = (qk * cos + torch.cat([-second, first], -1) * sin).to(v.dtype)
        q, k = qk.split(self.heads, -2)
        if packing is not None:
            y = packing.attention(q, k, v)
        else:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        x = x + self.dropout(self.out(rearrange(y, "... h c -> ... (h c)")))
        return x + self.dropout(self.down(F.gelu(self.up(self.feedforward_norm(x)))))


class Transformer(nn.Module):
    """A stack of :class:`Block` and a final LayerNorm."""

    def __init__(self, width: int, layers: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.head_width = width // heads
        self.blocks = nn.ModuleList(Block(width, heads, feedforward, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,  # [B, T, C], or packed [total, C]
        mask: Tensor | None,  # bool [B, T]
        packing: Packing | None = None,  # how x is packed; the mask has no meaning then
    ) -> Tensor:  # like x
        rate = 10000 ** (-torch.arange(0, self.head_width, 2, device=x.device) / self.head_width)
        positions = torch.arange(x.shape[1], device=x.device) if packing is None else packing.positions
        angle = positions[:, None] * rate
        angle = torch.cat([angle, angle], -1)
        rotary = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        keys = None if mask is None else mask[:, None, None]
        for block in self.blocks:
            x = block(x, rotary, keys, packing)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------------------------------
# towers of transformers


def _load_transformers(
    loader: Any,
    build: Any,
    model_config: Any,
    pretrained: str | None,
    optional: tuple[str, ...] = (),
) -> nn.Module:
    """Pretrained float32 weights when a name is given, else a random initialisation.

    transformers merely warns when a checkpoint leaves parameters at random values; here that is an error, except for
    parameters whose name contains one of ``optional``.
    """
    if pretrained is None:
        return build(model_config)
    from safetensors import SafetensorError

    try:
        module, info = loader.from_pretrained(
            pretrained, config=model_config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ModelError(f"{pretrained}: the weights could not be loaded ({error})") from error
    absent = [key for key in sorted(info["missing_keys"]) if not any(part in key for part in optional)]
    if absent or info["mismatched_keys"]:
        wrong = absent + [str(key) for key in info["mismatched_keys"]]
        raise ModelError(f"{pretrained}: not a checkpoint of {type(module).__name__}; it lacks {', '.join(wrong[:5])}")
    return module


def _transformers_config(
    config: AudioTowerConfig | TextTowerConfig, config_class: Any, load_pretrained: bool
) -> tuple[Any, str | None]:
    """The transformers configuration that a tower asks for, and the weights to start from."""
    changes = dict(config.hf_config or {})
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(changes.get(key)):
            raise ConfigError(f"hf_config: {key}={changes[key]!r} would run code from the hub, which is not supported")
    if config.pretrained is not None and load_pretrained:
        try:
            return config_class.from_pretrained(config.pretrained, **changes), config.pretrained
        except (OSError, ValueError) as error:
            raise ModelError(f"{config.pretrained}: no transformers configuration could be read ({error})") from error
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


def _checkpoint_layers(module: Any) -> None:
    """Let a model of transformers compute its layers again in the backward pass."""
    try:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"activation checkpointing: {error}") from error


def _complete(model_config: Any) -> dict[str, Any]:
    """Everything that rebuilds the same architecture, JSON-able, whatever later releases choose as defaults."""
    whole = json.loads(model_config.to_json_string(use_diff=False))
    return {key: value for key, value in whole.items() if key not in ("id2label", "label2id", "_name_or_path")}


# ---------------------------------------------------------------------------------------------------------------------
# audio towers


class AudioTower(nn.Module):
    """What every audio tower has.

    Attributes:
        width: size of the output vector.
        sampling_rate: of the waveform that ``forward`` takes, in Hz.
        min_samples: shorter clips are extended with zeros to this, so that every layer has at least one frame.
        equal_lengths_only: padding would change the result, so embed clips of equal length together.
        single_on_cpu: on a CPU a clip by itself is faster than in a batch; it fills the products, and fits the cache.
        hf_config: complete transformers configuration, None for a tower of our own.
    """

    width: int
    sampling_rate: int = 16000
    min_samples: int = 1
    equal_lengths_only: bool = False
    single_on_cpu: bool = False
    hf_config: dict[str, Any] | None = None

    def forward(
        self,
        audio: Tensor,  # int16 or float [B, T], padding arbitrary
        lengths: Tensor | None = None,  # [B] valid samples; None: all
        mean: Tensor | None = None,  # [B] whole-file mean, full scale 1 (waveform towers)
        std: Tensor | None = None,  # [B] whole-file standard deviation, full scale 1 (waveform towers)
        host_lengths: Sequence[int] | None = None,  # lengths, for the host: a tower may leave out padding with them
    ) -> Tensor:  # [B, width]
        raise NotImplementedError

    def prepare_training(self, *, compile: bool = False, checkpoint: bool = False) -> None:
        """Execution options, to be set once before training; they have no effect on results.

        Args:
            compile: compile each transformer layer with ``torch.compile``, where the tower can.
            checkpoint: keep each transformer layer's input only and compute the layer again in the backward pass. Small
                towers of our own have too little to gain and take no notice.

        Raises:
            ConfigError: ``checkpoint`` with an architecture that transformers cannot checkpoint.
        """


class LogMelTower(AudioTower):
    """Log-mel features, strided convolutions and a compact transformer, to be trained from scratch.

    Attributes:
        feature_mean, feature_std: float32 [n_mels] buffers, 0 and 1 until :meth:`fit_feature_statistics` sets them.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: AudioTowerConfig) -> None:
        super().__init__()
        self.config = config
        try:
            self.log_mel = LogMel(config.features, **config.feature_options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"log-mel features: {error}") from error
        self.sampling_rate = self.log_mel.sampling_rate
        bands = self.log_mel.n_mels
        self.register_buffer("feature_mean", torch.zeros(bands))
        self.register_buffer("feature_std", torch.ones(bands))
        halvings = config.subsampling.bit_length() - 1
        if config.subsampling < 1 or 1 << halvings != config.subsampling:
            raise ConfigError(f"subsampling must be a power of two, not {config.subsampling}")
        if config.convolution == "time":
            channels = [bands] + [config.width] * halvings
            bands = 1
        else:
            channels = [1] + [config.convolution_channels << index for index in range(halvings)]
        for _ in range(halvings):
            bands = (bands + 1) // 2
        # over (frames, bands): one band is left when the bands are channels
        kernel, padding = ((3, 1), (1, 0)) if config.convolution == "time" else ((3, 3), (1, 1))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inner, outer, kernel, stride=2, padding=padding) for inner, outer in itertools.pairwise(channels)
        )
        self.input = nn.Linear(channels[-1] * bands, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = Transformer(config.width, config.layers, config.heads, config.feedforward, config.dropout)
        if config.pooling == "attention":
            self.attention = nn.Linear(config.width, 1)
        self.width = config.width * (2 if config.pooling == "statistics" else 1)

    @torch.no_grad()
    def fit_feature_statistics(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Measure the fixed feature normalisation on ``(audio, lengths)`` batches of training clips.

        Raises:
            ModelError: there was no batch.
        """
        device = self.feature_mean.device
        count = torch.zeros((), dtype=torch.float64, device=device)
        sums = torch.zeros(2, len(self.feature_mean), dtype=torch.float64, device=device)
        for audio, lengths in batches:
            features, frames = self._features(audio.to(device), lengths)
            valid = length_mask(frames, features.shape[1])
            if self.config.feature_normalization == "clip":
                features = features - _clip_level(features, valid)
            features = features.double().masked_fill(~valid[..., None], 0.0)
            count += frames.sum()
            sums += torch.stack([features.sum((0, 1)), features.square().sum((0, 1))])
        if count == 0:
            raise ModelError("there is no audio to measure the feature statistics on")
        if self.config.feature_normalization != "per-mel":
            sums = sums.mean(1, keepdim=True)
        mean, square = sums / count
        self.feature_mean.copy_(mean)
        self.feature_std.copy_((square - mean.square()).clamp(min=1e-10).sqrt())

    def _features(self, audio: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.autocast(audio.device.type, enabled=False):
            return self.log_mel(audio, lengths)

    def forward(
        self,
        audio: Tensor,
        lengths: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        host_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        config = self.config
        sizes: list[int] | None = None  # frames that the transformer sees, where the host knows them
        if lengths is not None and host_lengths is not None:
            audio = audio[:, : longest_of("host_lengths", host_lengths, audio)]
            sizes = self.log_mel.frame_lengths(torch.tensor(host_lengths)).tolist()
        if self.training and config.random_gain:
            decibels = config.random_gain * (2 * torch.rand(len(audio), 1, device=audio.device) - 1)
            audio = as_float(audio) * 10 ** (decibels / 20)
        features, frames = self._features(audio, lengths)
        valid = length_mask(frames, features.shape[1])
        if config.feature_normalization == "clip":
            features = features - _clip_level(features, valid)
        x = (features - self.feature_mean.float()) / self.feature_std.float()
        if self.training and config.frequency_warp:
            x = warp_bands(x, config.frequency_warp)
        hidden = ~valid
        if self.training and config.time_masks:
            hidden = hidden | uniform_spans(frames, x.shape[1], config.time_masks, config.time_mask_width)
        x = x.masked_fill(hidden[..., None], 0.0)
        if self.training and config.frequency_masks:
            bands = torch.full_like(frames, x.shape[2])
            spans = uniform_spans(bands, x.shape[2], config.frequency_masks, config.frequency_mask_width)
            x = x.masked_fill(spans[:, None], 0.0)
        x = x.to(self.input.weight.dtype)
        x = x.transpose(1, 2)[..., None] if config.convolution == "time" else x[:, None]
        for convolution in self.convolutions:  # [B, channels, frames, bands]
            frames = (frames + 1) // 2
            x = F.gelu(convolution(x))
            valid = length_mask(frames, x.shape[2])
            x = x.masked_fill(~valid[:, None, :, None], 0.0)
        x = x.transpose(1, 2).flatten(2)
        mask = None if lengths is None else valid
        if sizes is None:
            return self._pool(self.transformer(self.dropout(self.input(x)), mask), valid)
        for _ in self.convolutions:
            sizes = [(size + 1) // 2 for size in sizes]
        longest = max(sizes)
        x, valid = x[:, :longest], valid[:, :longest]
        if min(sizes) == longest:
            return self._pool(self.transformer(self.dropout(self.input(x)), None), valid)
        packing = Packing(sizes, x.device)
        x = self.transformer(self.dropout(self.input(packing.pack(x))), None, packing)
        return self._pool(packing.unpack(x), valid)

    def _pool(self, x: Tensor, valid: Tensor) -> Tensor:
        if self.config.pooling == "attention":
            score = self.attention(x).float().squeeze(-1).masked_fill(~valid, -torch.inf)
            return torch.einsum("bt,btc->bc", score.softmax(1), x.float()).to(x.dtype)
        mean = masked_mean(x, valid)
        if self.config.pooling == "statistics":
            variance = masked_mean((x.float() - mean[:, None]).square(), valid)
            mean = torch.cat([mean, (variance + 1e-5).sqrt()], 1)
        return mean.to(x.dtype)


def _clip_level(
    features: Tensor,  # [B, T, bands]
    valid: Tensor,  # bool [B, T]
) -> Tensor:  # [B, 1, 1]
    return masked_mean(features, valid).mean(1)[:, None, None]


class Wav2Vec2Tower(AudioTower):
    """Any wav2vec2-family encoder of transformers on the normalised waveform; masked mean of the last layer.

    With ``layer_weights`` the embedding is Σ_l α_l · mean_t h_t^l (ESS-CLAP, arXiv 2505.19437) over the input of every
    layer and the last hidden state, with α = softmax(layer_weights) learned from equal weights on.
    """

    base: Any
    single_on_cpu = True

    # convolutions without padding, then positions zeroed past the end before anything looks across time
    _PADDING_SAFE = frozenset({"wavlm", "wav2vec2", "hubert", "unispeech", "unispeech-sat"})

    def __init__(self, config: AudioTowerConfig, load_pretrained: bool) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        model_config, pretrained = _transformers_config(config, AutoConfig, load_pretrained)
        if not hasattr(model_config, "conv_kernel"):
            raise ConfigError(f"{model_config.model_type} is not a wav2vec2-family model")
        if getattr(model_config, "add_adapter", False):
            raise ConfigError("add_adapter changes the number of frames and is not supported; set it to false")
        self.hf_config = _complete(model_config)
        self.base = _load_transformers(
            AutoModel, AutoModel.from_config, model_config, pretrained, optional=("masked_spec_embed",)
        )
        self.width = model_config.hidden_size
        self.convolutions = list(zip(model_config.conv_kernel, model_config.conv_stride, strict=True))
        for kernel, stride in reversed(self.convolutions):
            self.min_samples = (self.min_samples - 1) * stride + kernel
        states = model_config.num_hidden_layers + 1
        self.layer_weights = nn.Parameter(torch.zeros(states)) if config.layer_weights else None
        self.normalize = config.normalize_waveform
        self.equal_lengths_only = (
            model_config.model_type not in self._PADDING_SAFE or model_config.feat_extract_norm == "group"
        )
        # an implementation that was asked for is transformers' business
        asked = {"attn_implementation", "_attn_implementation"} & set(config.hf_config or {})
        wavlm.accelerate(self.base, encoder=not asked)
        if config.layer_weights and model_config.layerdrop and not isinstance(self.base.encoder, wavlm.Encoder):
            raise ConfigError(
                f"layer_weights needs the states of all layers, but {model_config.model_type} drops some in training; "
                'set hf_config to {"layerdrop": 0.0}'
            )
        self._frames: Tensor | None = None
        augment = getattr(model_config, "apply_spec_augment", True)
        if augment and (model_config.mask_time_prob > 0 or model_config.mask_feature_prob > 0):
            model_config.apply_spec_augment = False  # drawn by NumPy, with host syncs; ours replaces it
            self.base.feature_projection.register_forward_hook(self._mask_spans)

    def _mask_spans(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Forward hook of the feature projection: SpecAugment as the model's configuration asks for."""
        if not self.training:
            return output
        config = self.base.config
        hidden = output[0] if isinstance(output, tuple) else output
        batch, size, width = hidden.shape
        frames = torch.full((batch,), size, device=hidden.device) if self._frames is None else self._frames
        if config.mask_time_prob > 0:
            spans = proportional_spans(
                frames, size, config.mask_time_prob, config.mask_time_length, config.mask_time_min_masks
            )
            hidden = torch.where(spans[..., None], self.base.masked_spec_embed.to(hidden.dtype), hidden)
        if config.mask_feature_prob > 0:
            whole = torch.full((batch,), width, device=hidden.device)
            spans = proportional_spans(whole, width, config.mask_feature_prob, config.mask_feature_length, min_spans=0)
            hidden = hidden.masked_fill(spans[:, None], 0.0)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def prepare_training(self, *, compile: bool = False, checkpoint: bool = False) -> None:
        if isinstance(self.base.encoder, wavlm.Encoder):
            self.base.encoder.prepare_training(compile=compile, checkpoint=checkpoint)
        elif checkpoint:
            _checkpoint_layers(self.base)

    def forward(
        self,
        audio: Tensor,
        lengths: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        host_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        if not self.normalize:
            mean, std = (torch.full(audio.shape[:1], value, device=audio.device) for value in (0.0, 1.0))
        dtype = self.base.dtype
        waveform = normalize_waveform(
            audio,
            lengths,
            mean,
            std,
            min_samples=self.min_samples,
            epsilon=1e-7 if self.normalize else 0.0,  # the feature extractors'
            dtype=torch.float32 if dtype == torch.float64 else dtype,
        ).to(dtype)
        # a clip that was extended to min_samples has this length from here on
        self._frames = padded = None if lengths is None else lengths.to(waveform.device).clamp(min=self.min_samples)
        if self._frames is not None:
            for kernel, stride in self.convolutions:
                self._frames = (self._frames - kernel) // stride + 1
        means: list[Tensor] = []

        def pool(hidden: Tensor) -> None:
            valid = None if self._frames is None else length_mask(self._frames, hidden.shape[1])
            means.append(masked_mean(hidden, valid))

        if isinstance(self.base.encoder, wavlm.Encoder):
            hidden = wavlm.encode(self.base, waveform, self._frames, None if self.layer_weights is None else pool)
            states = [] if self.layer_weights is not None else [hidden]
        else:
            attention_mask = None if padded is None else length_mask(padded, waveform.shape[1]).long()
            all_layers = {} if self.layer_weights is None else {"output_hidden_states": True}
            out = self.base(waveform, attention_mask=attention_mask, **all_layers)
            hidden = out.last_hidden_state
            # the last one with the encoder's final norm or without, as the version of transformers has it
            states = [hidden] if self.layer_weights is None else [*out.hidden_states[:-1], hidden]
        for state in states:
            pool(state)
        self._frames = None
        if self.layer_weights is None:
            return means[0].to(hidden.dtype)
        weights = self.layer_weights.to(means[0].dtype).softmax(0)
        return torch.einsum("l,lbh->bh", weights, torch.stack(means)).to(hidden.dtype)


class WhisperTower(AudioTower):
    """Whisper's encoder; its window is fixed (30 s), so a longer clip is cut, and valid frames alone are averaged."""

    base: Any

    def __init__(self, config: AudioTowerConfig, load_pretrained: bool) -> None:
        super().__init__()
        from transformers import WhisperConfig, WhisperModel
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        model_config, pretrained = _transformers_config(config, WhisperConfig, load_pretrained)
        self.hf_config = _complete(model_config)
        module: Any = _load_transformers(WhisperModel, WhisperEncoder, model_config, pretrained)
        self.base = module.encoder if pretrained is not None else module
        self.width = model_config.d_model
        self.log_mel = LogMel("whisper", n_mels=model_config.num_mel_bins)
        self.window = 2 * model_config.max_source_positions * self.log_mel.hop_length

    def forward(
        self,
        audio: Tensor,
        lengths: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        host_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        waveform, lengths = prepare_waveform(audio[:, : self.window], lengths)
        if lengths is None:
            lengths = torch.full((waveform.shape[0],), waveform.shape[1], device=waveform.device)
        waveform = F.pad(waveform, (0, self.window - waveform.shape[1]))
        with torch.autocast(waveform.device.type, enabled=False):
            features, _ = self.log_mel(waveform)  # of the padded window, as Whisper was trained
        hidden = self.base(features.transpose(1, 2).to(self.base.dtype)).last_hidden_state
        hop = 2 * self.log_mel.hop_length
        frames = ((lengths.clamp(max=self.window) + hop - 1) // hop).clamp(min=1)
        return masked_mean(hidden, length_mask(frames, hidden.shape[1])).to(hidden.dtype)


class ASTTower(AudioTower):
    """Audio Spectrogram Transformer on its fixed window (1,024 frames); its own pooling of the two class tokens."""

    base: Any

    def __init__(self, config: AudioTowerConfig, load_pretrained: bool) -> None:
        super().__init__()
        from transformers import ASTConfig, ASTModel

        model_config, pretrained = _transformers_config(config, ASTConfig, load_pretrained)
        self.hf_config = _complete(model_config)
        self.base = _load_transformers(ASTModel, ASTModel, model_config, pretrained)
        self.width = model_config.hidden_size
        self.log_mel = LogMel("ast", n_mels=model_config.num_mel_bins, num_frames=model_config.max_length)

    def forward(
        self,
        audio: Tensor,
        lengths: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        host_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        with torch.autocast(audio.device.type, enabled=False):
            features, _ = self.log_mel(audio, lengths)
        return self.base(features.to(self.base.dtype)).pooler_output


class CLAPHTSATTower(AudioTower):
    """LAION-CLAP's HTSAT on a fixed window of 10 s at 48 kHz: shorter clips are repeated, longer ones cut."""

    base: Any

    def __init__(self, config: AudioTowerConfig, load_pretrained: bool) -> None:
        super().__init__()
        from transformers import ClapAudioConfig, ClapAudioModel, ClapAudioModelWithProjection

        model_config, pretrained = _transformers_config(config, ClapAudioConfig, load_pretrained)
        if model_config.enable_fusion:
            raise ConfigError("fusion checkpoints take four spectrograms a clip; use an unfused CLAP-HTSAT")
        self.hf_config = _complete(model_config)
        # the checkpoints hold the whole CLAP model, whose keys the projection class knows how to map
        module: Any = _load_transformers(ClapAudioModelWithProjection, ClapAudioModel, model_config, pretrained)
        self.base = module.audio_model if pretrained is not None else module
        self.width = self.base.audio_encoder.num_features
        self.log_mel = LogMel("clap", n_mels=model_config.num_mel_bins)
        self.sampling_rate = self.log_mel.sampling_rate
        self.window = 10 * self.sampling_rate

    def forward(
        self,
        audio: Tensor,
        lengths: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        host_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        waveform, lengths = prepare_waveform(audio[:, : self.window], lengths)
        if lengths is None:
            lengths = torch.full((waveform.shape[0],), waveform.shape[1], device=waveform.device)
        lengths = lengths.clamp(max=self.window)[:, None]
        position = torch.arange(self.window, device=waveform.device)
        repeated = waveform.gather(1, position % lengths)
        repeated = repeated.masked_fill(position >= self.window // lengths * lengths, 0.0)  # whole repeats only
        with torch.autocast(waveform.device.type, enabled=False):
            features, _ = self.log_mel(repeated)
        return self.base(features[:, None].to(self.base.dtype)).pooler_output


def build_audio_tower(config: AudioTowerConfig, load_pretrained: bool = True) -> AudioTower:
    """Audio tower of ``config.kind``.

    Args:
        config: the tower's configuration.
        load_pretrained: start from ``config.pretrained``; False builds the architecture from ``config.hf_config`` with
            random weights, for a checkpoint that is about to be read.

    Raises:
        ConfigError: the configuration is impossible.
        ModelError: the pretrained weights cannot be read or belong to another architecture.
    """
    if config.kind == "log-mel":
        return LogMelTower(config)
    towers = {"wav2vec2": Wav2Vec2Tower, "whisper": WhisperTower, "ast": ASTTower, "clap-htsat": CLAPHTSATTower}
    if config.kind not in towers:
        raise ConfigError(f"unknown audio tower {config.kind!r}; known: log-mel, {', '.join(towers)}")
    return towers[config.kind](config, load_pretrained)


# ---------------------------------------------------------------------------------------------------------------------
# text towers


class TextTower(nn.Module):
    """What every text tower has: ``width`` of the output, ``vocab_size`` and the transformers configuration, if any."""

    width: int
    vocab_size: int
    hf_config: dict[str, Any] | None = None

    def forward(
        self,
        input_ids: Tensor,  # int64 [B, tokens]
        attention_mask: Tensor,  # [B, tokens], 1 on tokens
        token_counts: Sequence[int] | None = None,  # tokens of each row, padded on the right; leaves padding out
    ) -> Tensor:  # [B, width]
        raise NotImplementedError

    def prepare_training(self, *, compile: bool = False, checkpoint: bool = False) -> None:
        """Execution options without effect on results, as for :meth:`AudioTower.prepare_training`."""


class SmallTextTower(TextTower):
    """Token embeddings and a pre-norm transformer, trained from scratch; without blocks, a bag of words."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        if config.pooling == "pooler" or (config.pooling == "cls" and config.layers == 0):
            raise ConfigError(f"pooling {config.pooling!r} needs a pooler or a transformer block; use mean")
        self.config = config
        self.width = config.width
        self.vocab_size = config.vocab_size
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.transformer = Transformer(config.width, config.layers, config.heads, config.feedforward, config.dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_counts: Sequence[int] | None = None) -> Tensor:
        packing = None
        if token_counts is not None:
            longest = longest_of("token_counts", token_counts, input_ids)
            input_ids, attention_mask = input_ids[:, :longest], attention_mask[:, :longest]
            if min(token_counts) < longest:
                packing = Packing(token_counts, input_ids.device)
        valid = attention_mask.bool()
        ids = input_ids if packing is None else packing.pack(input_ids)
        x = self.transformer(self.embedding_dropout(self.embedding(ids)), valid, packing)
        if packing is not None:
            x = packing.unpack(x)
        return x[:, 0] if self.config.pooling == "cls" else masked_mean(x, valid).to(x.dtype)


class TransformersTextTower(TextTower):
    """Any encoder of transformers (of an encoder-decoder, the encoder), with first-token, mean or pooler output."""

    base: Any

    def __init__(self, config: TextTowerConfig, load_pretrained: bool) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        model_config, pretrained = _transformers_config(config, AutoConfig, load_pretrained)
        self.hf_config = _complete(model_config)
        optional = () if config.pooling == "pooler" else ("pooler",)
        module: Any = _load_transformers(AutoModel, AutoModel.from_config, model_config, pretrained, optional)
        self.base = module.get_encoder() if getattr(model_config, "is_encoder_decoder", False) else module
        self.width = model_config.hidden_size
        self.vocab_size = model_config.vocab_size
        self.pooling = config.pooling
        self.packs = use_packed_attention(self.base)
        pooler = getattr(self.base, "pooler", None)
        if config.pooling == "pooler" and pooler is None:
            raise ConfigError(f"{model_config.model_type} has no pooler; use cls or mean pooling")
        if config.pooling != "pooler" and pooler is not None:
            pooler.requires_grad_(False)  # it takes no part, and DDP waits for the gradient of whatever could have one

    def prepare_training(self, *, compile: bool = False, checkpoint: bool = False) -> None:
        if checkpoint:
            _checkpoint_layers(self.base)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_counts: Sequence[int] | None = None) -> Tensor:
        if token_counts is None:
            return self._padded(input_ids, attention_mask)
        longest = longest_of("token_counts", token_counts, input_ids)
        input_ids, attention_mask = input_ids[:, :longest], attention_mask[:, :longest]
        if min(token_counts) == longest:
            return self._padded(input_ids, attention_mask)
        if self.packs:
            return self._packed(input_ids, attention_mask, Packing(token_counts, input_ids.device))
        if is_sharded(self):  # every rank must run each layer equally often, whatever its captions
            return self._padded(input_ids, attention_mask)
        return self._grouped(input_ids, attention_mask, token_counts)

    def _padded(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # transformers takes a 4-d mask as it is; of a 2-d one it asks the device whether all tokens are valid
        mask = attention_mask.bool()[:, None, None] if self.packs else attention_mask
        output = self.base(input_ids=input_ids, attention_mask=mask)
        return (
            output.pooler_output if self.pooling == "pooler" else self._pool(output.last_hidden_state, attention_mask)
        )

    def _packed(self, input_ids: Tensor, attention_mask: Tensor, packing: Packing) -> Tensor:
        ids = packing.pack(input_ids)[None]
        positions = packing.positions
        embeddings = self.base.embeddings
        if hasattr(embeddings, "create_position_ids_from_input_ids"):  # RoBERTa's follow the padding token's id
            positions = packing.pack(embeddings.create_position_ids_from_input_ids(input_ids, embeddings.padding_idx))
        # without explicit types a sequence could be no longer than the positions of one caption
        output = self.base(
            input_ids=ids, position_ids=positions[None], token_type_ids=torch.zeros_like(ids), packing=packing
        )
        x = packing.unpack(output.last_hidden_state[0])
        return self.base.pooler(x) if self.pooling == "pooler" else self._pool(x, attention_mask)

    def _grouped(self, input_ids: Tensor, attention_mask: Tensor, token_counts: Sequence[int]) -> Tensor:
        groups = length_groups(token_counts, 1024 if input_ids.is_cuda else 16)
        order = torch.tensor(list(itertools.chain(*groups)))
        back, order = to_device(torch.stack([order.argsort(), order]), input_ids.device)
        parts = []
        for group, rows in zip(groups, order.split([len(group) for group in groups]), strict=True):
            longest = token_counts[group[-1]]
            parts.append(self._padded(input_ids[rows, :longest], attention_mask[rows, :longest]))
        return torch.cat(parts)[back]

    def _pool(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return x[:, 0] if self.pooling == "cls" else masked_mean(x, attention_mask.bool()).to(x.dtype)


def build_text_tower(config: TextTowerConfig, load_pretrained: bool = True) -> TextTower:
    """Text tower of ``config.kind``; arguments and errors as for :func:`build_audio_tower`."""
    if config.kind == "small":
        return SmallTextTower(config)
    if config.kind == "hf":
        return TransformersTextTower(config, load_pretrained)
    raise ConfigError(f"unknown text tower {config.kind!r}; known: small, hf")
