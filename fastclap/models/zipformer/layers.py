"""A layer of a Zipformer (Yao et al. 2024, arXiv 2310.11230), with the parameter names of its code in icefall.

The frames of all clips of a batch lie one after the other, x [R, C], without padding, and `Rows` says which clip each
is of. Only attention and the depthwise convolutions look across frames. Attention weights are computed once a layer and
used three times; the kernels are those of `fastclap.kernels`.

Every part takes `training`, None where the model is evaluated: see `fastclap.models.zipformer.limits`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastclap.kernels import dispatch
from fastclap.kernels.bias_norm import bias_norm, bypass
from fastclap.kernels.gated_convolution import gated_convolution
from fastclap.kernels.shared_attention import Weights, shared_attention
from fastclap.kernels.swoosh import swoosh_linear
from fastclap.models.zipformer.limits import Balancer, Schedule, Scheduled, Training, Whitener, limited

DROPOUT = Schedule((0, 0.3), (20_000, 0.1))
DRAWS = 30  # that a layer makes on the host


class Rows(NamedTuple):
    """Which clip each frame is of, in a stack."""

    sequence: Tensor  # int64 [R]
    starts: Tensor  # int32 [B + 1], first frame of each clip, and R
    lengths: list[int]  # frames of each clip

    def of_clip(self, factor: Tensor) -> Tensor:
        """Factors of clips [B, ...] for their frames [R, ...]."""
        return factor.index_select(0, self.sequence)


class Sizes(NamedTuple):
    """Of the layers of a stack; see `fastclap.config.ZipformerConfig`."""

    width: int
    feedforward: int
    heads: int
    kernel: int
    query_width: int
    position_width: int
    value_width: int
    encoding_width: int


Scalable = TypeVar("Scalable", nn.Linear, nn.Conv2d)


@torch.no_grad()
def scaled(module: Scalable, scale: float) -> Scalable:
    """The module, which begins with `scale` of torch's weights, and with biases within a tenth of it."""
    module.weight.mul_(scale)
    if module.bias is not None:
        module.bias.uniform_(-0.1 * scale, 0.1 * scale)
    return module


def _rising(limit: float, ratio: float = 2.0) -> Schedule:
    return Schedule((0, limit), (20_000, ratio * limit))


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, low: Tensor) -> tuple[Tensor, None]:
        return g + low, None


def forked(x: Tensor) -> tuple[Tensor, Tensor]:
    """The stream, and what products take of it under autocast: their gradients meet in one operation without a cast."""
    dtype = dispatch.autocast_dtype(x)
    return (x, x) if dtype is None or x.dtype == dtype else _Fork.apply(x, dtype)


class BiasNorm(nn.Module):
    """x · exp(log_scale) / √mean((x - bias)²): a norm that keeps some of the length, by its bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.empty(width).normal_(0, 1e-4))

    def scale(self, training: Training | None) -> Tensor:
        """log_scale, which stays within ±1.5."""
        return limited(self.log_scale, -1.5, 1.5, training)


class Bypass(nn.Module):
    """original + (x - original) · bypass_scale, channel by channel.

    Args:
        width: number of channels.
        skip: rate at which a clip's scales are all set to 0, which skips what x has gone through.
    """

    def __init__(self, width: int, skip: Scheduled = 0.0) -> None:
        super().__init__()
        self.bypass_scale = nn.Parameter(torch.full((width,), 0.5))
        self.skip = skip
        self.least = Schedule((0, 0.9), (20_000, 0.2))

    def scale(self, clips: int, training: Training | None) -> Tensor:  # [C] or [B, C]
        scale = limited(self.bypass_scale, self.least, 1.0, training)
        kept = None if training is None else training.kept(self.skip, clips, 1, device=scale.device)
        return scale if kept is None else scale * kept


class ActivatedLinear(nn.Linear):
    """A linear layer of swoosh(x), with dropout shared by all frames of a clip in between; only x is kept.

    Args:
        inner, outer: widths.
        kind: of Swoosh.
        scale: of the initial weights.
        dropout: rate.
    """

    def __init__(self, inner: int, outer: int, kind: Literal["l", "r"], scale: float, dropout: Scheduled = 0.0) -> None:
        super().__init__(inner, outer)
        self.kind, self.dropout = kind, dropout
        scaled(self, scale)

    def activated(self, x: Tensor, rows: Rows, training: Training | None) -> Tensor:
        mask = None
        if training is not None:
            mask = training.dropout(self.dropout, len(rows.lengths), x.shape[1], device=x.device)
        return swoosh_linear(x, self.kind, self.weight, self.bias, mask, None if mask is None else rows.sequence)


class FeedForward(nn.Module):
    """Linear, SwooshL, dropout, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, hidden)
        self.out_proj = ActivatedLinear(hidden, width, "l", 0.1, DROPOUT)
        self.hidden_balancer = Balancer((0.3, 1.0), (0.75, 5.0))
        self.out_whiten = Whitener(_rising(7.5))

    def forward(self, x: Tensor, rows: Rows, training: Training | None) -> Tensor:
        hidden = self.hidden_balancer(self.in_proj(x), training)
        return self.out_whiten(self.out_proj.activated(hidden, rows, training), training)


class AttentionWeights(nn.Module):
    """Weights of each head: softmax(q·kᵀ + p·table), the table being a linear map of encoded distances."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        joint = (2 * sizes.query_width + sizes.position_width) * sizes.heads
        self.in_proj = scaled(nn.Linear(sizes.width, joint), sizes.query_width**-0.25)
        positions = nn.Linear(sizes.encoding_width, sizes.heads * sizes.position_width, bias=False)
        self.linear_pos = scaled(positions, 0.05)
        self.position_skip = Schedule((0, 0.5), (4000, 0))
        self.balance_keys = Balancer((0.4, 0.6), (0.0, 100.0), 0.025)
        self.whiten_keys = Whitener(_rising(3.0), 0.025, sizes.heads)

    def forward(
        self,
        x: Tensor,  # [R, C]
        encoding: Tensor,  # [2T - 1, encoding width], of distances from -(T - 1) to T - 1
        rows: Rows,
        training: Training | None,
    ) -> Weights:
        heads, width = self.sizes.heads, self.sizes.query_width
        q, k, p = self.in_proj(x).split([heads * width, heads * width, heads * self.sizes.position_width], 1)
        k = self.whiten_keys(self.balance_keys(k, training), training)
        table = self.linear_pos(encoding).unflatten(1, (heads, -1)).permute(1, 2, 0)  # [H, width, 2T - 1]
        penalty = 0.0
        if training is not None:
            if training.draw() < training.at(self.position_skip):
                table = torch.zeros_like(table)
            penalty = 1e-4 if training.draw() < 0.1 else 0.0
        q, k, p = (each.unflatten(1, (heads, -1)) for each in (q, k, p))
        return shared_attention(q, k, p, table, rows.starts, rows.lengths, penalty=penalty)


class SelfAttention(nn.Module):
    """Values, attention weights that are there, and a linear layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, values = sizes.heads, sizes.heads * sizes.value_width
        self.in_proj = nn.Linear(sizes.width, values)
        self.out_proj = scaled(nn.Linear(values, sizes.width), 0.05)
        self.whiten = Whitener(_rising(7.5, 3.0))

    def forward(self, x: Tensor, weights: Weights, training: Training | None) -> Tensor:
        attended = weights.attend(self.in_proj(x).unflatten(1, (self.heads, -1))).flatten(1)
        return self.whiten(self.out_proj(attended), training)


class NonlinearAttention(nn.Module):
    """y · (A₀ · (x · tanh s)), with the first head's weights A₀ and three linear maps s, x, y, and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 3 * width // 4
        self.in_proj = nn.Linear(width, 3 * hidden)
        self.out_proj = scaled(nn.Linear(hidden, width), 0.05)
        self.balancer = Balancer((Schedule((0, 0.25), (20_000, 0.05)), Schedule((0, 0.75), (20_000, 0.95))), (0.5, 5.0))
        self.whiten1 = Whitener(_rising(5.0))
        self.whiten2 = Whitener(_rising(5.0, 3.0))

    def forward(self, x: Tensor, weights: Weights, training: Training | None) -> Tensor:
        s, x, y = self.in_proj(x).chunk(3, 1)
        s = self.balancer(s, training).tanh()
        values = self.whiten1(x, training) * s
        attended = weights.attend(values[:, None]).flatten(1)
        return self.whiten2(self.out_proj(attended * y), training)


class Convolution(nn.Module):
    """Linear, gate, depthwise convolution over the clip's frames, SwooshR, linear."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 2 * width)
        self.depthwise_conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.out_proj = ActivatedLinear(width, width, "r", 0.05)
        self.balancer1 = Balancer((Schedule((0, 0.05), (8000, 0.025)), 1.0), (1.5, Schedule((0, 5.0), (8000, 10.0))))
        self.balancer2 = Balancer((Schedule((0, 0.1), (8000, 0.05)), 1.0), (Schedule((0, 0.2), (20_000, 0.5)), 10.0))
        self.whiten = Whitener(_rising(7.5))

    def forward(self, x: Tensor, rows: Rows, training: Training | None) -> Tensor:
        x = self.in_proj(x)
        if training is not None:
            x = self.balance_gate(x, training)
        conv = self.depthwise_conv
        x = gated_convolution(x, conv.weight, conv.bias, rows.starts)
        x = self.whiten(self.balancer2(x, training), training)
        return self.out_proj.activated(x, rows, training)

    def balance_gate(self, x: Tensor, training: Training) -> Tensor:
        """x, whose second half's gradient is pushed where the balancer is active."""
        value, gate = x.chunk(2, 1)
        balanced = self.balancer1(gate, training)
        return x if balanced is gate else torch.cat([value, balanced], 1)


class Layer(nn.Module):
    """Feed-forward three times, attention three times, convolution twice; a bypass in the middle and one around.

    Args:
        sizes: see there.
        skip: rate at which a clip skips the layer in training.
    """

    bypass_scale: Tensor

    def __init__(self, sizes: Sizes, skip: Scheduled) -> None:
        super().__init__()
        width, hidden = sizes.width, sizes.feedforward
        self.self_attn_weights = AttentionWeights(sizes)
        self.self_attn1, self.self_attn2 = SelfAttention(sizes), SelfAttention(sizes)
        self.feed_forward1 = FeedForward(width, hidden * 3 // 4)
        self.feed_forward2 = FeedForward(width, hidden)
        self.feed_forward3 = FeedForward(width, hidden * 5 // 4)
        self.nonlin_attention = NonlinearAttention(width)
        self.conv_module1, self.conv_module2 = Convolution(width, sizes.kernel), Convolution(width, sizes.kernel)
        self.norm = BiasNorm(width)
        self.bypass, self.bypass_mid = Bypass(width, skip), Bypass(width)
        # a parameter of published checkpoints that nothing reads
        self.register_buffer("bypass_scale", torch.full((width,), 0.5))
        self.attention_skip = self.convolution_skip = Schedule((0, 0.2), (4000, 0.05), (16_000, 0))
        self.feed_forward_skip = Schedule((0, 0.1), (4000, 0.01), (50_000, 0))
        small = Schedule((0, 0.004), (4000, 0.02))
        self.balancer1 = Balancer((0.45, 0.55), (0.2, 4.0))
        self.balancer_na = Balancer((0.3, 0.7), (small, 100.0), 0.05)
        self.balancer_ff2 = Balancer((0.3, 0.7), (Schedule((0, 0), (4000, 0.1)), 2.0), 0.05)
        self.balancer_ff3 = Balancer((0.3, 0.7), (Schedule((0, 0), (4000, 0.2)), 4.0), 0.05)
        self.balancer2 = Balancer((0.45, 0.55), (0.1, 4.0))
        self.whiten = Whitener(_rising(4.0, 3.0))

    def forward(
        self,
        x: Tensor,  # [R, C]
        encoding: Tensor,  # [2T - 1, encoding width]
        rows: Rows,
        training: Training | None,
    ) -> Tensor:  # [R, C]
        training = None if training is None else training.begin()
        x, low = forked(x)
        original = x
        weights = self.self_attn_weights(low, encoding, rows, training)
        x, low = forked(x + self.feed_forward1(low, rows, training))
        attended = self._clips(self.attention_skip, rows, training, x)
        branch = self.balancer_na(self.nonlin_attention(low, weights, training), training)
        x, low = forked(x + self._of_kept(branch, attended))
        x, low = forked(x + self._of_kept(self.self_attn1(low, weights, training), attended))
        branch = self.conv_module1(low, rows, training)
        x, low = forked(x + self._of_kept(branch, self._clips(self.convolution_skip, rows, training, x)))
        branch = self.balancer_ff2(self.feed_forward2(low, rows, training), training)
        branch = self._of_kept(branch, self._clips(self.feed_forward_skip, rows, training, x))
        scale = self.bypass_mid.scale(len(rows.lengths), training)
        x, low = forked(bypass(original, x, scale, rows.sequence, branch))
        x, low = forked(x + self._of_kept(self.self_attn2(low, weights, training), attended))
        branch = self.conv_module2(low, rows, training)
        x, low = forked(x + self._of_kept(branch, self._clips(self.convolution_skip, rows, training, x)))
        branch = self.balancer_ff3(self.feed_forward3(low, rows, training), training)
        branch = self._of_kept(branch, self._clips(self.feed_forward_skip, rows, training, x))
        x = self.balancer1(x + branch, training)
        log_scale, scale = self.norm.scale(training), self.bypass.scale(len(rows.lengths), training)
        x = bias_norm(x, self.norm.bias, log_scale, original, scale, rows.sequence)
        return self.whiten(self.balancer2(x, training), training)

    def _clips(self, rate: Scheduled, rows: Rows, training: Training | None, x: Tensor) -> Tensor | None:
        """1 for the frames of clips that go through a branch and 0 for those that skip it, [R, 1]; None: all do."""
        kept = None if training is None else training.kept(rate, len(rows.lengths), 1, device=x.device)
        return None if kept is None else rows.of_clip(kept)

    @staticmethod
    def _of_kept(branch: Tensor, kept: Tensor | None) -> Tensor:
        return branch if kept is None else branch * kept
