"""Exponential moving average of the weights, kept beside the model and swapped in for evaluation and export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """ema ← decay·ema + (1 − decay)·weight for floating tensors after every step; others are copied.

    The decay warms up as min(decay, (1 + n) / (10 + n)) over the updates n, so that early averages are not dominated by
    the random initial weights (the schedule TensorFlow's ExponentialMovingAverage documents as ``num_updates``).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Fold in the weights after optimizer step number ``step`` (from 1)."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        current = model.state_dict()
        floating = [name for name, tensor in self.tensors.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.tensors[name] for name in floating], [current[name] for name in floating], weight)
        for name, tensor in self.tensors.items():
            if not tensor.is_floating_point():
                tensor.copy_(current[name])

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights and the average; a second call restores both exactly."""
        for name, tensor in model.state_dict().items():
            held = tensor.clone()
            tensor.copy_(self.tensors[name])
            self.tensors[name].copy_(held)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over an average saved earlier (names must be those of the model)."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


@contextmanager
def applied(average: WeightAverage | None, model: nn.Module) -> Iterator[None]:
    """The model carries the averaged weights inside the block (if there is an average)."""
    if average is None:
        yield
        return
    average.swap(model)
    try:
        yield
    finally:
        average.swap(model)
