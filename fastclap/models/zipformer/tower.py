"""The audio tower of CLSP: SPEAR's Zipformer on log-mel features, pooled over each clip's own frames."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclap.config import AudioTowerConfig
from fastclap.errors import ConfigError
from fastclap.models.audio_tower import AudioTower, features_of
from fastclap.models.augmentation import augmented, louder_or_softer
from fastclap.models.foreign.clsp import load_spear
from fastclap.models.freezing import Stages
from fastclap.models.layers import length_mask, masked_mean
from fastclap.models.packing import HostCopy, Packing, longest_of
from fastclap.models.pooling import Pooling
from fastclap.models.zipformer.encoder import FRONT_DRAWS, Front, Grids, Zipformer, frames_of
from fastclap.models.zipformer.limits import Training, Whitener, settle

SETTLED = 100_000.0  # batches that the published stages after the first begin at
FRAMES = 9  # of features, that the convolutions need for one of their own


class ZipformerTower(AudioTower):
    """A Zipformer on log-mel features.

    Args:
        config: of the tower.
        load_pretrained: start from the encoder that `config.pretrained` names.

    Attributes:
        encoder_embed, encoder: the convolutions and the stacks, under the names of icefall's checkpoints.
        batches: that the schedules are past; `begin_step` sets it in training.
    """

    def __init__(self, config: AudioTowerConfig, load_pretrained: bool = True) -> None:
        super().__init__()
        if config.pooling == "token" or config.hidden_states != "last":
            raise ConfigError("a zipformer tower pools its result, by mean, statistics or attention")
        self.by_clip = config.feature_normalization == "clip"
        if config.feature_normalization is not None and not self.by_clip:
            raise ConfigError(
                f"feature_normalization {config.feature_normalization}: a zipformer takes its features as they are, or "
                "with clip less each clip's level; leave it out"
            )
        self.config = config
        self.log_mel = features_of(config.features, config.feature_options)
        spec = self.log_mel.spec
        self.sampling_rate = spec.sampling_rate
        self.encoder = Zipformer(config.zipformer)
        self.encoder_embed = Front(spec.n_mels, self.encoder.first_width, config.zipformer.channels)
        self.pooling = Pooling(config.pooling or "mean", "last", self.encoder.width, 1)
        self.width = self.pooling.width
        limit = FRAMES * spec.hop_length + spec.n_fft
        self.min_samples = bisect.bisect_left(range(limit), FRAMES, key=spec.frames)
        self.batches = config.zipformer.schedule_start
        self._told: HostCopy | None = None  # probabilities of the whiteners after the last step
        if config.pretrained is not None and load_pretrained:
            load_spear(config, nn.ModuleDict({"encoder_embed": self.encoder_embed, "encoder": self.encoder}))

    def begin_step(self, number: int, seconds: float) -> None:
        sizes = self.config.zipformer
        self.batches = sizes.schedule_start + number * seconds / sizes.schedule_seconds

    def go_on_training(self) -> None:
        sizes = self.config.zipformer
        sizes.schedule_start = max(sizes.schedule_start, SETTLED)

    def summarize(
        self,
        audio: Tensor,
        lengths: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        host_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        sizes = [audio.shape[1]] * len(audio)
        if lengths is not None:
            sizes = lengths.tolist() if host_lengths is None else list(host_lengths)
            audio = audio[:, : longest_of("host_lengths", sizes, audio)]
        if min(sizes) < self.min_samples:
            audio = F.pad(audio, (0, max(0, self.min_samples - audio.shape[1])))
            ends = torch.tensor(sizes, device=audio.device)
            audio = audio.masked_fill(~length_mask(ends, audio.shape[1]), 0)
            sizes = [max(size, self.min_samples) for size in sizes]
            lengths = torch.tensor(sizes, device=audio.device)
        augment = self.by_clip and self.training
        with torch.autocast(audio.device.type, enabled=False):
            features, frames = self.log_mel(louder_or_softer(audio, self.config) if augment else audio, lengths)
            if self.by_clip:
                level = masked_mean(features, length_mask(frames, features.shape[1])).mean(1)
                features = features - level[:, None, None]
            if augment:
                features = augmented(features, frames, self.config)
        features = features.to(self.encoder_embed.out.weight.dtype)
        packing = Packing([frames_of(self.log_mel.spec.frames(size)) for size in sizes], audio.device)
        x, packing = self.encode(features, packing)
        return self.pooling.pool(packing.unpack(x), length_mask(packing.starts.diff(), packing.longest))

    def encode(
        self,
        features: Tensor,  # [B, T, mels], padding arbitrary
        packing: Packing,  # of the frames that the convolutions make of them
    ) -> tuple[Tensor, Packing]:  # [R, C]
        """The encoder's result, and where its frames lie."""
        training, batches = None, None
        if self.training:
            training, batches = Training(self.batches, FRONT_DRAWS).begin(), self.batches
        grids = Grids(packing)
        return self.encoder(self.encoder_embed(features, grids, training), grids, batches)

    def prepare_training(self, *, compile: bool = False, checkpoint: bool = False) -> None:
        # Which limits are active is drawn anew for every batch, which a compiled graph could not follow.
        for stack in self.encoder.stacks:
            stack.checkpoint = checkpoint

    def stages(self) -> Stages:
        return Stages([self.encoder_embed], [], self.encoder.layers)

    @functools.cached_property
    def whiteners(self) -> list[Whitener]:
        """All of the tower, in the order of registration."""
        return [module for module in self.modules() if isinstance(module, Whitener)]

    def findings(self) -> Tensor | None:
        return torch.cat([each.found for each in self.whiteners]) if self.training else None

    def end_step(self, findings: Tensor) -> None:
        copy: HostCopy | None = HostCopy(settle(self.whiteners, findings))
        # on a GPU the host goes by what it was told a step ago, which is there by now
        if findings.device.type == "cuda":
            copy, self._told = self._told, copy
        if copy is not None:
            self._launch(copy.read())

    def _launch(self, probabilities: Tensor) -> None:
        for each, probability in zip(self.whiteners, probabilities.tolist(), strict=True):
            each.launched = probability

    def training_state(self) -> dict[str, Tensor]:
        launched = torch.tensor([each.launched for each in self.whiteners])
        return {"whitening": torch.stack([each.probability for each in self.whiteners]), "launched": launched}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        for each, probability in zip(self.whiteners, state["whitening"], strict=True):
            each.probability.copy_(probability)
        self._launch(state["launched"])
        self._told = HostCopy(torch.stack([each.probability for each in self.whiteners]))
