"""A Zipformer (Yao et al. 2024, arXiv 2310.11230): convolutions to 50 frames a second, and stacks at lower rates.

Parameter names are those of its code in icefall (`encoder_embed`, `encoder`), whose checkpoints fit unchanged. A stack
takes some frames together, by an average with learned weights, and repeats what its layers make of them; a bypass
joins that with its input. Published code averages the frames past a clip's end into its last ones, and convolves over
them; here a clip has the same result alone, padded and in any batch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastclap.config import ZipformerConfig
from fastclap.errors import ConfigError
from fastclap.kernels.bias_norm import bias_norm
from fastclap.kernels.resampling import downsample, upsample_bypass
from fastclap.kernels.swoosh import swoosh
from fastclap.models.layers import length_mask
from fastclap.models.packing import Packing, to_device
from fastclap.models.zipformer.layers import DRAWS, DROPOUT, BiasNorm, Bypass, Layer, Rows, Sizes, scaled
from fastclap.models.zipformer.limits import Balancer, Schedule, Training, Whitener, fraction_of_gradient

FRONT_DRAWS = 8  # that the convolutions make on the host
POSITION_DROPOUT = 0.15
WARMUP = 4000.0  # batches within which the stacks stop skipping their layers, one stack after the other
_MASKED_CLIPS = 0.125  # share of the clips whose upper channels are dropped; twice that of their upper half


def frames_of(frames: int) -> int:
    """Frames that `Front` makes of this many feature frames; it needs 9 for one."""
    return max((frames - 7) // 2, 0)


class ConvNeXt(nn.Module):
    """x + W₂ · swooshL(W₁ · depthwise(x)) over time and frequency (Liu et al. 2022, without a norm)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 3 * channels
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.pointwise_conv1 = nn.Conv2d(channels, hidden, 1)
        self.pointwise_conv2 = scaled(nn.Conv2d(hidden, channels, 1), 0.01)
        self.skip = Schedule((0, 0.2), (20_000, 0.015))
        self.hidden_balancer = Balancer((0.3, 1.0), (0.75, 5.0))

    def forward(
        self,
        x: Tensor,  # [B, C, T, bands], zeros past each end
        valid: Tensor | None,  # bool [B, 1, T, 1]
        training: Training | None,
    ) -> Tensor:
        kept = None if training is None else training.kept(self.skip, len(x), 1, 1, 1, device=x.device)
        hidden = self.pointwise_conv1(self.depthwise_conv(x))
        hidden = self.hidden_balancer(hidden, training, 1, valid)
        branch = self.pointwise_conv2(swoosh(hidden, "l"))
        return x + (branch if kept is None else branch * kept)


class Front(nn.Module):
    """Conv2dSubsampling: three convolutions and a ConvNeXt layer, [B, T, bands] to [R, width] with (T - 7) // 2 frames.

    Args:
        bands: mel bands, at least 7.
        width: of the result.
        channels: of the convolutions.
    """

    def __init__(self, bands: int, width: int, channels: Sequence[int]) -> None:
        super().__init__()
        if bands < 7:
            raise ConfigError(f"a Zipformer needs at least 7 mel bands, not {bands}")
        first, second, third = channels
        # at the places that the names in checkpoints tell
        self.conv = nn.ModuleDict(
            {
                "0": nn.Conv2d(1, first, 3, padding=(0, 1)),
                "4": nn.Conv2d(first, second, 3, stride=2),
                "7": nn.Conv2d(second, third, 3, stride=(1, 2)),
            }
        )
        self.convnext = ConvNeXt(third)
        self.out = nn.Linear(third * (((bands - 1) // 2 - 1) // 2), width)
        self.out_norm = BiasNorm(width)
        self.balancers = [Balancer(absolute=(0.2, largest)) for largest in (1.0, 4.0, 4.0)]
        self.out_balancer = Balancer((0.4, 0.6), (1.0, 6.0))
        self.convnext_whiten = Whitener(5.0)
        self.out_whiten = Whitener(Schedule((0, 4.0), (20_000, 8.0)), 0.02)

    def forward(
        self,
        features: Tensor,  # [B, T, bands]
        grids: Grids,  # of the result's frames
        training: Training | None,
    ) -> Tensor:  # [R, width]
        packing = grids.packing
        x, lengths = features[:, None], packing.starts.diff()
        equal = min(packing.lengths) == frames_of(features.shape[1])
        own = (2 * lengths + 5, lengths + 2, lengths)  # frames that a convolution makes of the clip's own
        for index, convolution in enumerate(self.conv.values()):
            x = convolution(x)
            if index == 0:
                x = fraction_of_gradient(x, 0.2, training)
            valid = None if equal else length_mask(own[index], x.shape[2])[:, None, :, None]
            x = swoosh(self.balancers[index](x, training, 1, valid), "r")
        if valid is not None:
            x = x.masked_fill(~valid, 0.0)
        x = self.convnext(x, valid, training)
        x = packing.pack(x.transpose(1, 2))  # [R, C, bands]
        x = self.out_balancer(x, training, 1)
        x = self.convnext_whiten(x.transpose(1, 2), training).transpose(1, 2)
        x = self.out_whiten(self.out(x.flatten(1)), training)
        x = bias_norm(x, self.out_norm.bias, self.out_norm.scale(training))
        factor = None if training is None else training.dropout(DROPOUT, packing.count, x.shape[1], device=x.device)
        return x if factor is None else x * grids.at(1)[0].of_clip(factor)


def encoded_distances(longest: int, width: int, device: torch.device) -> Tensor:  # float32 [2 · longest - 1, width]
    """Distances from -(longest - 1) on, squeezed into a circle's half by a logarithm and atan, as sines and cosines.

    c = √width; d' = c·sgn(d)·(ln(|d| + c) - ln c); θ = atan(2π·d'/width); cos θ, sin θ, cos 2θ, …, and 1 at last.
    """
    known = 1 << max(longest - 1, 255).bit_length()
    encoding = _encoded_distances(known, width, device)
    return encoding[known - longest : known + longest - 1]


@functools.lru_cache(8)
def _encoded_distances(longest: int, width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives this call, and may enter a graph
        distance = torch.arange(-(longest - 1), longest, dtype=torch.float32, device=device)[:, None]
        c = width**0.5
        squeezed = c * distance.sign() * ((distance.abs() + c).log() - math.log(c))
        angle = (squeezed / (width / (2.0 * math.pi))).atan() * (1 + torch.arange(width // 2, device=device))
        encoding = torch.stack([angle.cos(), angle.sin()], 2).flatten(1)
        encoding[:, -1] = 1.0
        return encoding


class Downsampling(nn.Module):
    """Weights of the frames that are averaged: softmax(bias)."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(factor))

    def forward(
        self,
        x: Tensor,  # [R, C]
        first: Tensor,  # int32 [groups + 1], first frame of each group, and R
    ) -> Tensor:  # [groups, C]
        return downsample(x, self.bias.softmax(0), first)


class Stack(nn.Module):
    """Layers at one rate, which share the encoding of distances.

    Args:
        sizes, layers: of them.
        downsampling: frames that are taken together.
        begin, end: batches between which, layer after layer, they stop skipping at half of the clips.
    """

    def __init__(self, sizes: Sizes, layers: int, downsampling: int, begin: float, end: float) -> None:
        super().__init__()
        self.encoding_width = sizes.encoding_width
        step = (end - begin) / layers
        final = 0.035 * downsampling**0.5
        self.layers = nn.ModuleList(
            Layer(sizes, Schedule((begin + step * index, 0.5), (begin + step * (index + 1), final)))
            for index in range(layers)
        )
        self.checkpoint = False

    def forward(
        self,
        x: Tensor,  # [R, C]
        rows: Rows,
        mask: Tensor | None,  # bool [B, C], False for channels of clips that are dropped after every layer
        batches: float | None,  # that the schedules are past; None: evaluation
    ) -> Tensor:  # [R, C]
        encoding = encoded_distances(max(rows.lengths), self.encoding_width, x.device).to(x.dtype)
        encoding = F.dropout(encoding, POSITION_DROPOUT, batches is not None)
        dropped = None if mask is None else rows.of_clip(mask)
        x = x if dropped is None else x * dropped
        for layer in self.layers:
            training = None if batches is None else Training(batches, DRAWS)
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, x, encoding, rows, training, use_reentrant=False)
            else:
                x = layer(x, encoding, rows, training)
            x = x if dropped is None else x * dropped
        return x


class DownsampledStack(nn.Module):
    """A stack at a lower rate, and a bypass from its input to its result."""

    def __init__(self, stack: Stack, downsampling: int, width: int) -> None:
        super().__init__()
        self.downsample = Downsampling(downsampling)
        self.encoder = stack
        self.out_combiner = Bypass(width)


class Zipformer(nn.Module):
    """The stacks, from 50 frames a second to 50 / `output_downsampling`.

    Args:
        config: its sizes.

    Attributes:
        width: of the result: of the widest stack.
        first_width: of the input.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    def __init__(self, config: ZipformerConfig) -> None:
        super().__init__()
        lists = config.lists()
        for name, must, divisor, remainder in (("kernel", "odd", 2, 1), ("feedforward", "a multiple of 4", 4, 0)):
            for value in lists[name]:
                if value % divisor != remainder:
                    raise ConfigError(f"zipformer.{name} has {value}; it must be {must} in every stack")
        for width, unmasked in zip(lists["width"], lists["unmasked_width"], strict=True):
            if unmasked > width or width % 4:
                raise ConfigError(
                    f"zipformer.width {width} with unmasked_width {unmasked}: a stack's width is a multiple of 4 and "
                    "at least its unmasked width"
                )
        if config.encoding_width % 2 or config.output_downsampling not in (1, 2):
            raise ConfigError(
                f"zipformer: encoding_width is {config.encoding_width} (an even number), output_downsampling "
                f"{config.output_downsampling} (1 or 2)"
            )
        self.factors, self.widths = lists["downsampling"], lists["width"]
        self.unmasked = lists["unmasked_width"]
        self.first_width, self.width = self.widths[0], max(self.widths)
        share = WARMUP / (len(self.factors) + 1)
        self.encoders = nn.ModuleList()
        for index, factor in enumerate(self.factors):
            width, feedforward, heads, kernel, layers = (
                lists[name][index] for name in ("width", "feedforward", "heads", "kernel", "layers")
            )
            sizes = Sizes(
                width, feedforward, heads, kernel,
                config.query_width, config.position_width, config.value_width, config.encoding_width,
            )  # fmt: skip
            stack = Stack(sizes, layers, factor, share * (index + 1), share * (index + 2))
            self.encoders.append(stack if factor == 1 else DownsampledStack(stack, factor, width))
        self.output_downsampling = config.output_downsampling
        if config.output_downsampling == 2:
            self.downsample_output = Downsampling(2)

    @property
    def layers(self) -> list[Layer]:
        """All layers, in the order in which they run."""
        return [layer for stack in self.stacks for layer in stack.layers]  # type: ignore[misc]

    @property
    def stacks(self) -> list[Stack]:
        """The stacks, without what resamples."""
        return [part if isinstance(part, Stack) else part.encoder for part in self.encoders]  # type: ignore[misc]

    def forward(
        self,
        x: Tensor,  # [R, first_width]
        grids: Grids,
        batches: float | None,  # that the schedules are past; None: evaluation
    ) -> tuple[Tensor, Packing]:  # [R', width]
        """The result, and where its frames lie."""
        packing = grids.packing
        masks = self._masks(packing.count, batches, x)
        outputs: list[Tensor] = []
        for part, factor, width, mask in zip(self.encoders, self.factors, self.widths, masks, strict=True):
            x = x[:, :width] if width <= x.shape[1] else F.pad(x, (0, width - x.shape[1]))
            rows, first = grids.at(factor)
            if isinstance(part, Stack):
                x = part(x, rows, mask, batches)
            else:
                assert isinstance(part, DownsampledStack)
                inner = part.encoder(part.downsample(x, first), rows, mask, batches)
                training = None if batches is None else Training(batches, 1).begin()
                scale = part.out_combiner.scale(packing.count, training)
                x = upsample_bypass(x, inner, scale, first)
            outputs.append(x)
        x = self._widest(outputs)
        if self.output_downsampling == 1:
            return x, packing
        rows, first = grids.at(2)
        return self.downsample_output(x, first), Packing(rows.lengths, x.device)

    def _masks(self, clips: int, batches: float | None, x: Tensor) -> Sequence[Tensor | None]:
        """Channels that each stack keeps, bool [B, C]; the same clips are chosen for all stacks."""
        if batches is None:
            return [None] * len(self.widths)
        some = torch.rand(clips, 1, device=x.device) > _MASKED_CLIPS
        fewer = some & (torch.rand(clips, 1, device=x.device) > _MASKED_CLIPS)
        masks = []
        for width, unmasked in zip(self.widths, self.unmasked, strict=True):
            half = unmasked + (width - unmasked) // 2
            channel = torch.arange(width, device=x.device)
            masks.append((channel < unmasked) | (some & (channel < half)) | fewer)
        return masks

    @staticmethod
    def _widest(outputs: list[Tensor]) -> Tensor:
        """Every channel from the last stack that has it."""
        pieces, width = [outputs[-1]], outputs[-1].shape[1]
        for output in reversed(outputs[:-1]):
            if output.shape[1] > width:
                pieces.append(output[:, width:])
                width = output.shape[1]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


class Grids:
    """Where the frames of the clips lie at each rate."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self._known: dict[int, tuple[Rows, Tensor]] = {}

    def at(self, factor: int) -> tuple[Rows, Tensor]:
        """The rows where `factor` frames are taken together, and the first frame of each group, int32 [R' + 1]."""
        if factor not in self._known:
            lengths = [-(-length // factor) for length in self.packing.lengths]
            begins = itertools.accumulate(self.packing.lengths, initial=0)
            first = [
                np.arange(begin, begin + length, factor)
                for begin, length in zip(begins, self.packing.lengths, strict=False)
            ]
            ends = np.concatenate([*first, [self.packing.total]]).astype(np.int32)
            device = self.packing.starts.device
            sequence = np.repeat(np.arange(len(lengths)), lengths)
            starts = np.cumsum([0, *lengths]).astype(np.int32)
            sent = to_device(torch.from_numpy(np.concatenate([ends, sequence, starts]).astype(np.int32)), device)
            ends_there, sequence_there, starts_there = sent.split([len(ends), len(sequence), len(starts)])
            self._known[factor] = Rows(sequence_there.long(), starts_there, lengths), ends_there
        return self._known[factor]
