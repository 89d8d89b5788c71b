"""Inputs shared by the tests of waveform_convolution."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """A convolution and its batch; `rows` of a clip, None for those within the samples."""

    batch: int
    samples: int
    channels: int
    kernel: int
    stride: int
    rows: int | None = None
    bias: bool = True


NAMES = ("waveform", "weight", "bias", "norm_weight", "norm_bias")
CASES = (
    Case(1, 400, 64, 10, 5),  # the family's convolution
    Case(2, 405, 512, 10, 5, 128, bias=False),  # rows beyond the samples
    Case(3, 61, 80, 3, 2),  # a number of channels that is no power of two
    Case(2, 100, 500, 7, 3, 40),
    Case(3, 10, 8, 10, 5),  # one row a clip
    Case(2, 4, 33, 10, 5, 3),  # clips shorter than the kernel
    Case(1, 90, 16, 2, 7, bias=False),  # samples between the windows that no row reads
    Case(2, 300, 24, 29, 4, 60),  # the longest kernel
)


def tensors(case: Case) -> tuple[list[Any], Tensor]:
    """Waveform, weight, bias or None, norm_weight and norm_bias in float32, and the gradient of y."""
    generator = torch.Generator().manual_seed(sum(case[:5]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    channels, kernel = case.channels, case.kernel
    inputs = [
        normal(case.batch, case.samples),
        normal(channels, 1, kernel) * kernel**-0.5 + 0.2,  # their mean over the channels is not zero
        0.3 * normal(channels) + 0.5 if case.bias else None,
        1 + 0.3 * normal(channels),
        0.5 * normal(channels),
    ]
    rows = (case.samples - kernel) // case.stride + 1 if case.rows is None else case.rows
    return inputs, normal(case.batch, rows, channels)
