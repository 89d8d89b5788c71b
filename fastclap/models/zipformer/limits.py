"""What acts on a Zipformer in training alone: schedules, and limits on activations that change nothing but gradients.

From scratch a Zipformer is held in a healthy range by its gradients. A balancer watches the mean and the size of each
channel, a whitener the spread of the channels' covariance, and both add a push to the gradient that comes by where a
limit is exceeded; parameters with a range are pushed back into it. Each does so at random, for a share of the batches.
Definitions: Yao et al. 2024, arXiv 2310.11230, section 3.5 and appendix A, and its code in icefall.

Whether a limit is active in a batch is drawn from torch's generator on the host, so that no kernel is launched where it
is not. All draws of a layer are made at once, before it runs, and whether or not gradients are wanted: a pass that is
repeated with the same state of the generator, as a gradient cache and a checkpoint do, finds the same ones.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Schedule:
    """Piecewise linear function of the number of batches, constant before the first point and after the last.

    Args:
        points: (batches, value), in ascending order of batches.
    """

    def __init__(self, *points: tuple[float, float]) -> None:
        self.at, self.values = zip(*points, strict=True)

    def __call__(self, batches: float) -> float:
        index = bisect.bisect_right(self.at, batches)
        if index in (0, len(self.at)):
            return float(self.values[min(index, len(self.at) - 1)])
        (x0, x1), (y0, y1) = self.at[index - 1 : index + 1], self.values[index - 1 : index + 1]
        return float(y0 + (y1 - y0) * (batches - x0) / (x1 - x0))


Scheduled = float | Schedule


class Training:
    """A part of a forward pass in training: how far its schedules are, and what was drawn for it on the host.

    Args:
        batches: that the schedules are past.
        draws: how many uniform numbers the part may ask for; they are drawn from torch's generator of the CPU.
    """

    def __init__(self, batches: float, draws: int) -> None:
        self.batches = batches
        self._drawn = torch.rand(draws, dtype=torch.float64).tolist()
        self._next: Iterator[float] = iter(())

    def begin(self) -> Training:
        """The part runs, for the first time or again: it is given its draws from the first one on."""
        self._next = iter(self._drawn)
        return self

    def draw(self) -> float:
        """A number in [0, 1)."""
        return next(self._next)

    def at(self, value: Scheduled) -> float:
        """What a scheduled value is now."""
        return value(self.batches) if isinstance(value, Schedule) else value

    def kept(self, rate: Scheduled, *shape: int, device: torch.device) -> Tensor | None:
        """Bool, True where nothing is dropped: a draw on the device for each entry; None at a rate of 0."""
        probability = self.at(rate)
        return None if probability == 0.0 else torch.rand(*shape, device=device) > probability

    def dropout(self, rate: Scheduled, *shape: int, device: torch.device) -> Tensor | None:
        """Factors of dropout, float32: 0, or 1 / (1 - rate) where `kept` is True; None at a rate of 0."""
        kept = self.kept(rate, *shape, device=device)
        return None if kept is None else kept * (1 / (1 - self.at(rate)))


# ---------------------------------------------------------------------------------------------------------------------
# Balancer
# ---------------------------------------------------------------------------------------------------------------------

_GRADIENT_SHARE = 0.04  # root mean square of a balancer's push, as a share of the gradient's absolute value


class Balancer:
    """Pushes channels whose share of positive values, or whose mean absolute value, is out of range back into it.

    Values are taken to be normally distributed: a share of positive values is a ratio of mean to standard deviation,
    and a mean absolute value a root mean square.

    Args:
        positive: lowest and highest share of positive values.
        absolute: smallest and largest mean absolute value.
        probability: with which it is active in a batch.
    """

    def __init__(
        self,
        positive: tuple[Scheduled, Scheduled] = (0.05, 0.95),
        absolute: tuple[Scheduled, Scheduled] = (0.2, 100.0),
        probability: Scheduled = Schedule((0, 0.5), (8000, 0.125)),  # noqa: B008 - immutable
    ) -> None:
        self.positive, self.absolute, self.probability = positive, absolute, probability

    def __call__(
        self,
        x: Tensor,
        training: Training | None,
        channels: int = -1,  # dimension
        valid: Tensor | None = None,  # bool, broadcast to x; None: all
    ) -> Tensor:
        """x, whose gradient is pushed where the balancer is active."""
        if training is None or training.draw() >= training.at(self.probability) or not x.requires_grad:
            return x
        means = [_mean_of_share(training.at(share)) for share in self.positive]
        sizes = [math.sqrt(math.pi / 2) * training.at(value) for value in self.absolute]
        return _Balance.apply(x, valid, channels, *means, *sizes)


def _mean_of_share(positive: float) -> float:
    """Ratio of mean to standard deviation at which this share of a normal variable is positive, roughly.

    2·Φ(m) - 1 = y is solved by m = atanh(y)/(√π·ln 2), which is good in the middle; the code that models were trained
    with has it so.
    """
    y, tiny = 2 * positive - 1, 1e-10
    return 0.8139535143 * 0.5 * (math.log(1 + y + tiny) - math.log(1 - y + tiny))


class _Balance(torch.autograd.Function):
    """x → x. The gradient g becomes g + |g|·push, push being the derivative of the limits' excess, scaled per channel.

    The excess is a function of a channel's mean and mean square, so its derivative at x is a + b·x, and its root mean
    square follows from the same two numbers.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, valid: Tensor | None, channels: int, low: float, high: float, small: float, large: float
    ) -> Tensor:
        ctx.save_for_backward(x, valid)
        ctx.channels, ctx.limits = channels % x.ndim, (low, high, small, large)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, valid = ctx.saved_tensors
        low, high, small, large = ctx.limits
        wide = torch.promote_types(x.dtype, torch.float32)
        over = [dim for dim in range(x.ndim) if dim != ctx.channels]
        if valid is None:
            count: float | Tensor = x.numel() / x.shape[ctx.channels]
            counted = x
        else:
            counted = x.masked_fill(~valid, 0.0)
            count = valid.expand_as(x).sum(over, keepdim=True, dtype=wide).clamp(min=1)
        mean = counted.sum(over, keepdim=True, dtype=wide) / count
        square = torch.linalg.vector_norm(counted, dim=over, keepdim=True, dtype=wide).square() / count
        variance = square - mean.square()
        deviation, size = variance.clamp(min=1e-20).sqrt(), square.clamp(min=1e-20).sqrt()
        ratio = mean / deviation
        off_ratio = (ratio - ratio.clamp(low, high)).sign()
        off_size = (size - size.clamp(small, large)).sign()
        # of |ratio - clamped| + |ln size - ln clamped|, times the count
        by_mean = off_ratio * (1 / deviation + mean.square() / deviation**3 * (variance > 1e-20))
        by_square = -off_ratio * mean / (2 * deviation**3) * (variance > 1e-20) + off_size / (2 * size.square())
        a, b = by_mean / count, 2 * by_square / count
        scale = _GRADIENT_SHARE / (b.square() * variance + (a + b * mean).square()).clamp(min=1e-40).sqrt()
        # operations of two dtypes, so that neither x nor g is cast by itself
        pushed = torch.addcmul(g, g.abs(), torch.addcmul(a * scale, b * scale, x))
        return pushed.to(g.dtype), None, None, None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Whitener
# ---------------------------------------------------------------------------------------------------------------------

RARELY, OFTEN = 0.025, 0.25  # probability with which a whitener looks, after its limit held, and after it did not


class Whitener(nn.Module):
    """Pushes a group's channels towards a covariance that is a multiple of the identity, where it is too far from it.

    The distance is the mean squared eigenvalue over the squared mean eigenvalue, 1 if all are equal.

    It looks at a quarter of the batches while it finds the limit exceeded, and at a fortieth after it found it held.
    What it finds stays on the device, and the host, which launches it, learns of it a step later.

    Args:
        limit: of the distance.
        share: norm of the push, as a share of the gradient's.
        groups: of channels.

    Attributes:
        probability: float32 [], with which it looks. Only `settle` changes it, between two steps.
        launched: the most that it may be, as far as the host knows.
        found: float32 [2], how often since then the limit held, and how often it was exceeded.
    """

    probability: Tensor
    found: Tensor

    def __init__(self, limit: Scheduled, share: float = 0.01, groups: int = 1) -> None:
        super().__init__()
        self.limit, self.share, self.groups, self.launched = limit, share, groups, OFTEN
        # no part of a model, so of no state dict; a run's checkpoints keep the probabilities
        self.register_buffer("probability", torch.tensor(OFTEN), persistent=False)
        self.register_buffer("found", torch.zeros(2), persistent=False)

    def forward(
        self,
        x: Tensor,  # [..., C]
        training: Training | None,
    ) -> Tensor:
        if training is None:
            return x
        draw = training.draw()
        if draw > self.launched or not x.requires_grad:
            return x
        return _Whiten.apply(x, self, draw, training.at(self.limit))


def settle(
    whiteners: Sequence[Whitener],
    found: Tensor,  # float32 [whiteners · 2]: of all processes
) -> Tensor:  # float32 [whiteners]
    """What the whiteners have found since the last step decides how often they look from now on: the result."""
    probabilities = [each.probability for each in whiteners]
    held, exceeded = found.view(-1, 2).unbind(1)
    settled = torch.where(exceeded > 0, OFTEN, torch.where(held > 0, RARELY, torch.stack(probabilities)))
    torch._foreach_copy_(probabilities, list(settled.unbind()))
    torch._foreach_zero_([each.found for each in whiteners])
    return settled


class _Whiten(torch.autograd.Function):
    """x → x. The gradient receives a push of a given share of its norm along the distance's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whitener: Whitener, draw: float, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.options = whitener, draw, limit
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        whitener, draw, limit = ctx.options
        groups, channels = whitener.groups, x.shape[-1]
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, groups, channels // groups).transpose(0, 1).to(wide)
            rows = rows - rows.mean(1, keepdim=True)
            covariance = rows.transpose(1, 2) @ rows
            squared = covariance.square().sum() / channels
            mean = covariance.diagonal(dim1=1, dim2=2).sum() / channels
            least = mean.square() + 1e-20
            distance = squared / least
            slope = covariance / least
            slope.diagonal(dim1=1, dim2=2).sub_(squared * mean / least.square())
            push = (rows @ slope).transpose(0, 1).reshape(x.shape)
        looks, exceeded = draw <= whitener.probability, ~(distance < limit)
        whitener.found += (torch.stack([~exceeded, exceeded]) & looks).to(whitener.found.dtype)
        scale = whitener.share * torch.linalg.vector_norm(g, dtype=wide) / (torch.linalg.vector_norm(push) + 1e-20)
        # not multiplied by 0: a push that is not finite must not get in where it is not wanted
        push = (push * scale).to(g.dtype).where(looks & exceeded, 0.0)
        return g + push, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Parameters with a range, smaller gradients
# ---------------------------------------------------------------------------------------------------------------------


def limited(parameter: Tensor, low: Scheduled, high: Scheduled, training: Training | None) -> Tensor:
    """The parameter. In six of ten batches the gradient of a value out of its range drives it back, whatever its sign.

    ScaledAdam takes no notice of a gradient's size, so its sign is enough.
    """
    if training is None or training.draw() >= 0.6 or not parameter.requires_grad:
        return parameter
    return _Limit.apply(parameter, training.at(low), training.at(high))


class _Limit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = low, high
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.limits
        wrong = ((g > 0) & (x < low)) | ((g < 0) & (x > high))
        return torch.where(wrong, -g, g), None, None


class _Fraction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.factor, None


def fraction_of_gradient(x: Tensor, factor: float, training: Training | None) -> Tensor:
    """x, with this multiple of its gradient."""
    return x if training is None else _Fraction.apply(x, factor)
