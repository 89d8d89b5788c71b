"""Audio towers: padded waveforms in, one vector a clip out; Whisper's is in `fastclap.models.whisper`.

Every tower takes the raw batch (int16 or float waveform with lengths) and does its own front-end on the device, so a
training step copies nothing but samples. Padding is invisible: samples and frames past a clip's end are zeroed or
masked wherever a layer could carry them into valid positions, hence the same clip gives the same vector alone, in a
batch, or padded. Where a pretrained architecture makes that impossible (a GroupNorm over time), `equal_lengths_only`
says so and `CLAP.embed_audio` batches equal lengths.

SpecAugment masks are drawn by torch on the device: no host sync, and a gradient cache that restores torch's generators
replays the same masks. The towers of transformers keep their module as `.base`, the name in published checkpoints.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclap.config import AudioTowerConfig
from fastclap.errors import ConfigError, ModelError
from fastclap.features import LogMel
from fastclap.kernels.waveform import normalize_waveform
from fastclap.models import wavlm
from fastclap.models.audio_tower import AudioTower, features_of
from fastclap.models.augmentation import augmented, louder_or_softer
from fastclap.models.cnn14 import Cnn14Tower
from fastclap.models.fixed_window import FixedWindowTower
from fastclap.models.freezing import Stages, transformer_layers
from fastclap.models.layers import Transformer, length_mask, masked_mean, prepare_waveform
from fastclap.models.packing import Packing, longest_of
from fastclap.models.pe_audio import PEAudioTower
from fastclap.models.pooling import Pooling
from fastclap.models.pretrained import (
    checkpoint_layers,
    compile_layers,
    complete_config,
    graphs_of,
    transformers_config,
    transformers_model,
)
from fastclap.models.sizes import check_counts, one_error
from fastclap.models.whisper import WhisperTower


class LogMelTower(AudioTower):
    """Log-mel features, strided convolutions and a compact transformer, to be trained from scratch.

    Attributes:
        feature_mean, feature_std: float32 [n_mels] buffers, 0 and 1 until `fit_feature_statistics` sets them.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: AudioTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.log_mel = features_of(config.features, config.feature_options)
        self.sampling_rate, bands = self.log_mel.spec.sampling_rate, self.log_mel.spec.n_mels
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
        if config.pooling == "token" or config.hidden_states != "last":
            raise ConfigError("a log-mel tower pools its last layer, by mean, statistics or attention")
        self.pooling = Pooling(config.pooling or "statistics", "last", config.width, 1)
        self.width = self.pooling.width

    @torch.no_grad()
    def fit_feature_statistics(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Measure the fixed feature normalisation on `(audio, lengths)` batches of training clips.

        Raises:
            ModelError: there was no batch.
        """
        device = self.feature_mean.device
        count = torch.zeros((), dtype=torch.float64, device=device)
        sums = torch.zeros(2, len(self.feature_mean), dtype=torch.float64, device=device)
        for audio, lengths in batches:
            features, frames, valid = self._features(audio.to(device), lengths)
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

    def _features(
        self,
        audio: Tensor,  # int16 or float [B, T]
        lengths: Tensor | None,  # [B]
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, bands], [B], bool [B, T]
        """Log-mel features (with `feature_normalization` clip, less each clip's level), frames, and valid positions."""
        with torch.autocast(audio.device.type, enabled=False):
            features, frames = self.log_mel(audio, lengths)
        valid = length_mask(frames, features.shape[1])
        if self.config.feature_normalization == "clip":
            features = features - masked_mean(features, valid).mean(1)[:, None, None]
        return features, frames, valid

    def summarize(
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
            sizes = self.log_mel.spec.frame_lengths(torch.tensor(host_lengths)).tolist()
        if self.training:
            audio = louder_or_softer(audio, config)
        features, frames, valid = self._features(audio, lengths)
        x = (features - self.feature_mean.float()) / self.feature_std.float()
        if self.training:
            x = augmented(x, frames, config)
        x = x.masked_fill(~valid[..., None], 0.0)
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

    def stages(self) -> Stages:
        return Stages(list(self.convolutions), self.input.parameters(), list(self.transformer.blocks))

    def _pool(self, x: Tensor, valid: Tensor) -> Tensor:
        return self.pooling.pool(x, valid).to(x.dtype)


class Wav2Vec2Tower(AudioTower):
    """Any wav2vec2-family encoder of transformers on the normalised waveform, pooled as `Pooling` describes."""

    base: Any
    single_on_cpu = True

    # convolutions without padding, then positions zeroed past the end before anything looks across time
    _PADDING_SAFE = frozenset({"wavlm", "wav2vec2", "hubert", "unispeech", "unispeech-sat"})

    def __init__(self, config: AudioTowerConfig, load_pretrained: bool) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        model_config, pretrained = transformers_config(config, AutoConfig, load_pretrained)
        if not hasattr(model_config, "conv_kernel"):
            raise ConfigError(f"{model_config.model_type} is not a wav2vec2-family model")
        if getattr(model_config, "add_adapter", False):
            raise ConfigError("add_adapter changes the number of frames and is not supported; set it to false")
        self.hf_config = complete_config(model_config)
        self.base = transformers_model(
            AutoModel, AutoModel.from_config, model_config, pretrained, optional=("masked_spec_embed",)
        )
        if config.pooling == "token":
            raise ConfigError(
                f"pooling token: {model_config.model_type} knows positions from distances, and a token has none; use "
                "mean, statistics or attention"
            )
        width, states = model_config.hidden_size, model_config.num_hidden_layers + 1
        self.pooling = Pooling(config.pooling or "mean", config.hidden_states, width, states)
        self.width = self.pooling.width
        self.convolutions = list(zip(model_config.conv_kernel, model_config.conv_stride, strict=True))
        for kernel, stride in reversed(self.convolutions):
            self.min_samples = (self.min_samples - 1) * stride + kernel
        self.normalize = config.normalize_waveform
        self.equal_lengths_only = (
            model_config.model_type not in self._PADDING_SAFE or model_config.feat_extract_norm == "group"
        )
        # attention of an implementation that the configuration names is left to transformers
        named = {"attn_implementation", "_attn_implementation"} & set(config.hf_config or {})
        wavlm.accelerate(self.base, encoder=not named)
        every = self.pooling.every_state
        if every and model_config.layerdrop and not isinstance(self.base.encoder, wavlm.Encoder):
            raise ConfigError(
                f"hidden_states {config.hidden_states} needs the states of all layers, but {model_config.model_type} "
                'drops some in training; set hf_config to {"layerdrop": 0.0}'
            )
        self._masked: Tensor | None = None  # in training: valid frames of the batch that is to be masked
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
        frames = torch.full((batch,), size, device=hidden.device) if self._masked is None else self._masked
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
            checkpoint_layers(self.base)

    def stages(self) -> Stages:
        front, encoder, config = [self.base.feature_extractor], self.base.encoder, self.base.config
        if config.model_type not in self._PADDING_SAFE | {"data2vec-audio"}:
            return Stages(front)  # others compute in another order
        after = set(encoder.layers.parameters())
        if getattr(config, "do_stable_layer_norm", False):
            after |= set(encoder.layer_norm.parameters())
        return Stages(front, [p for p in self.base.parameters() if p not in after], list(encoder.layers))

    def summarize(
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
        frames = padded = None if lengths is None else lengths.to(waveform.device).clamp(min=self.min_samples)
        if frames is not None:
            for kernel, stride in self.convolutions:
                frames = (frames - kernel) // stride + 1
        if self.training:
            self._masked = frames
        found: list[Tensor] = []

        def pool(hidden: Tensor) -> None:
            valid = None if frames is None else length_mask(frames, hidden.shape[1])
            found.append(self.pooling.pool(hidden, valid, len(found)))

        every = self.pooling.every_state
        if isinstance(self.base.encoder, wavlm.Encoder):
            hidden = wavlm.encode(self.base, waveform, frames, pool if every else None)
            states = [] if every else [hidden]
        else:
            attention_mask = None if padded is None else length_mask(padded, waveform.shape[1]).long()
            all_layers = {"output_hidden_states": True} if every else {}
            out = self.base(waveform, attention_mask=attention_mask, **all_layers)
            hidden = out.last_hidden_state
            # the last one with the encoder's final norm or without, as the version of transformers has it
            states = [*out.hidden_states[:-1], hidden] if every else [hidden]
        for state in states:
            pool(state)
        if self.training:
            self._masked = None
        return torch.stack(found, 1)

    def combine(self, summary: Tensor) -> Tensor:
        return self.pooling.combine(summary).to(self.base.dtype)


def proportional_spans(
    lengths: Tensor,  # [B] valid size of the axis
    size: int,
    share: float,
    width: int,
    min_spans: int,
) -> Tensor:  # bool [B, size], True where masked
    """wav2vec 2.0's masking on the device: share·length/width spans (rounded at random) at distinct starts.

    The definition is that of transformers' `_compute_mask_indices`, which draws from NumPy on the host instead.
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


class ASTTower(AudioTower):
    """Audio Spectrogram Transformer on its window of 1,024 frames, or on the clip's own patches alone.

    Its own pooling is the mean of its two class tokens; of other kinds, the patches are pooled.
    """

    base: Any

    def __init__(self, config: AudioTowerConfig, load_pretrained: bool) -> None:
        super().__init__()
        from transformers import ASTConfig, ASTModel

        model_config, pretrained = transformers_config(config, ASTConfig, load_pretrained)
        self.hf_config = complete_config(model_config)
        self.base = transformers_model(ASTModel, ASTModel, model_config, pretrained)
        if config.pooling == "token":
            raise ConfigError("pooling token: AST has class tokens of its own; leave pooling unset to use them")
        self.whole_window = config.window == "full"
        frames = model_config.max_length if self.whole_window else None
        self.log_mel = LogMel("ast", n_mels=model_config.num_mel_bins, num_frames=frames)
        self.patch, self.stride = model_config.patch_size, model_config.time_stride
        self.window = (model_config.max_length - 1) * self.log_mel.hop_length + self.log_mel.spec.win_length
        self.class_tokens = config.pooling is None
        width, states = model_config.hidden_size, model_config.num_hidden_layers + 1
        self.pooling = Pooling(config.pooling or "mean", config.hidden_states, width, states)
        self.width = self.pooling.width
        self.compiled = False

    def stages(self) -> Stages:
        return Stages((), self.base.embeddings.parameters(), transformer_layers(self.base))

    def prepare_training(self, *, compile: bool = False, checkpoint: bool = False) -> None:
        if checkpoint:
            checkpoint_layers(self.base)
        if compile:
            compile_layers(self.base.layers)
            self.compiled = True

    def summarize(
        self,
        audio: Tensor,
        lengths: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        host_lengths: Sequence[int] | None = None,
    ) -> Tensor:  # [B, states, size]
        valid = None
        if not self.whole_window:
            if host_lengths is not None:
                audio = audio[:, : longest_of("host_lengths", host_lengths, audio)]
            least = (self.patch - 1) * self.log_mel.hop_length + self.log_mel.spec.win_length  # samples of one patch
            everything = lengths is None or (host_lengths is not None and min(host_lengths) == max(host_lengths))
            audio, lengths = prepare_waveform(audio[:, : self.window], lengths)
            audio = F.pad(audio, (0, max(0, least - audio.shape[1])))
            lengths = lengths.clamp(least, self.window)
        with torch.autocast(audio.device.type, enabled=False):
            features, frames = self.log_mel(audio, lengths)
        patches = self.base.embeddings.patch_embeddings(features.to(self.base.dtype))  # [B, bands · T, width]
        bands = (features.shape[2] - self.patch) // self.base.config.frequency_stride + 1
        columns = patches.shape[1] // bands
        if not self.whole_window and not everything:
            valid = length_mask((frames - self.patch) // self.stride + 1, columns).repeat(1, bands)
        with graphs_of(self):
            states = self._states(patches, bands, columns, valid)
        pooled = [
            state[:, :2].mean(1, dtype=torch.promote_types(state.dtype, torch.float32))
            if self.class_tokens
            else self.pooling.pool(state[:, 2:], valid, number)
            for number, state in enumerate(states)
        ]
        return torch.stack(pooled, 1)

    def _states(self, patches: Tensor, bands: int, columns: int, valid: Tensor | None) -> list[Tensor]:
        """States of the layers that are pooled, with the two class tokens first."""
        embeddings = self.base.embeddings
        tokens = torch.cat([embeddings.cls_token, embeddings.distillation_token], 1).expand(len(patches), -1, -1)
        table = embeddings.position_embeddings  # of the tokens, then of a grid, band by band
        grid = table[:, 2:].unflatten(1, (bands, -1))[:, :, :columns].flatten(1, 2)
        x = torch.cat([tokens + table[:, :2], patches + grid], 1)
        x = embeddings.dropout(x)
        mask = None if valid is None else F.pad(valid, (2, 0), value=True)[:, None, None]
        states = []
        for layer in self.base.layers:
            states.append(x)
            x = layer(x, mask)
        states.append(self.base.layernorm(x))
        return states if self.pooling.every_state else states[-1:]

    def combine(self, summary: Tensor) -> Tensor:
        return self.pooling.combine(summary).to(self.base.dtype)


class CLAPHTSATTower(FixedWindowTower):
    """HTSAT of transformers' CLAP; by default on 10 s at 48 kHz, as LAION-CLAP's.

    It folds the spectrogram into a square image, so there are no positions that a clip could have alone.
    """

    base: Any

    def __init__(self, config: AudioTowerConfig, load_pretrained: bool) -> None:
        from transformers import ClapAudioConfig, ClapAudioModel, ClapAudioModelWithProjection

        model_config, pretrained = transformers_config(config, ClapAudioConfig, load_pretrained)
        if model_config.enable_fusion:
            raise ConfigError("fusion checkpoints take four spectrograms a clip; use an unfused CLAP-HTSAT")
        super().__init__(config, model_config.num_mel_bins)
        most = model_config.spec_size * (model_config.spec_size // model_config.num_mel_bins)
        if self.frames > most:
            raise ConfigError(f"{self.frames} frames of {config.clip_seconds} s, but this HTSAT takes {most} at most")
        self.hf_config = complete_config(model_config)
        # the checkpoints hold the whole CLAP model, whose keys the projection class knows how to map
        module: Any = transformers_model(ClapAudioModelWithProjection, ClapAudioModel, model_config, pretrained)
        self.base = module.audio_model if pretrained is not None else module
        if config.window != "full" or config.pooling == "token" or config.hidden_states != "last":
            raise ConfigError(
                "a clap-htsat tower folds its whole window into a square image, whose layers have different widths: it "
                "needs window full, hidden_states last, and pooling mean, statistics or attention"
            )
        self.pooling = Pooling(config.pooling or "mean", "last", self.base.audio_encoder.num_features, 1)
        self.width = self.pooling.width

    def summarize(
        self,
        audio: Tensor,
        lengths: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        host_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        features = self.features(audio, lengths)
        hidden = self.base(features[:, None].to(self.base.dtype)).last_hidden_state  # [B, width, bands, frames]
        return self.pooling.pool(hidden.flatten(2).transpose(1, 2), None).to(hidden.dtype)


def build_audio_tower(config: AudioTowerConfig, load_pretrained: bool = True) -> AudioTower:
    """Audio tower of `config.kind`.

    Args:
        config: the tower's configuration.
        load_pretrained: start from `config.pretrained`; False builds the architecture from `config.hf_config` with
            random weights, for a checkpoint that is about to be read.

    Raises:
        ConfigError: the configuration is impossible.
        ModelError: the pretrained weights cannot be read or belong to another architecture.
    """
    with one_error("audio"):
        check_counts(dataclasses.asdict(config), "audio")
        if load_pretrained:
            _refuse_what_is_not_read(config)
        return _audio_tower(config, load_pretrained)


def _refuse_what_is_not_read(config: AudioTowerConfig) -> None:
    """Raise a ConfigError for options of other kinds of towers, which would be ignored."""
    kinds = {
        "pretrained": ("wav2vec2", "whisper", "ast", "clap-htsat", "zipformer", "pe-audio"),
        "hf_config": ("wav2vec2", "whisper", "ast", "clap-htsat", "pe-audio"),
        "chunks": ("whisper",),
        "pool_padding": ("whisper",),
    }
    for name, own in kinds.items():
        if getattr(config, name) and config.kind not in own:
            raise ConfigError(
                f"audio.{name} has no meaning for a tower of kind {config.kind}; leave it out, or choose audio.kind "
                f"{', '.join(own)}"
            )


def _audio_tower(config: AudioTowerConfig, load_pretrained: bool) -> AudioTower:
    if config.kind == "log-mel":
        return LogMelTower(config)
    if config.kind == "cnn14":
        return Cnn14Tower(config)
    if config.kind == "pe-audio":
        return PEAudioTower(config)
    if config.kind == "zipformer":
        from fastclap.models.zipformer.tower import ZipformerTower  # the operators of which take a while to register

        return ZipformerTower(config, load_pretrained)
    towers = {"wav2vec2": Wav2Vec2Tower, "whisper": WhisperTower, "ast": ASTTower, "clap-htsat": CLAPHTSATTower}
    if config.kind not in towers:
        raise ConfigError(
            f"unknown audio tower {config.kind!r}; known: log-mel, cnn14, pe-audio, zipformer, {', '.join(towers)}"
        )
    return towers[config.kind](config, load_pretrained)
