"""Exponential moving average of the weights, kept beside the model and swapped in for evaluation and export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastclap.train.distributed import local, placed_like


class WeightAverage:
    """ema ← decay·ema + (1 − decay)·weight for floating tensors after every step; others are copied.

    The model's tensors are looked up once, so they must stay where they are (no ``model.to(...)`` afterwards).
    The decay warms up as min(decay, (1 + n) / (10 + n)) over the updates n, so that early averages are not dominated by
    the random initial weights (the schedule TensorFlow's ExponentialMovingAverage documents as ``num_updates``).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._current: dict[str, Tensor] = model.state_dict()  # the tensors that training writes to
        self.tensors: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in self._current.items()}
        pairs = [(local(self.tensors[name]), local(tensor.detach())) for name, tensor in self._current.items()]
        self._floating = [pair for pair in pairs if pair[0].is_floating_point()]
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Fold in the weights after optimizer step number ``step`` (from 1)."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([held for held, _ in self._floating], [new for _, new in self._floating], weight)
        for held, new in self._others:
            held.copy_(new)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and the average; a second call restores both exactly."""
        for held, current in self._floating + self._others:
            before = current.clone()
            current.copy_(held)
            held.copy_(before)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over an average saved earlier (names must be those of the model)."""
        for name, tensor in self.tensors.items():
            tensor.copy_(placed_like(tensor, tensors[name]))


@contextmanager
def applied(average: WeightAverage | None) -> Iterator[None]:
    """Its model carries the averaged weights inside the block (if there is an average)."""
    if average is None:
        yield
        return
    average.swap()
    try:
        yield
    finally:
        average.swap()
