"""WavLM's convolution over positions (grouped, kernel 128) as batched matrix products.

A convolution of kernel k over blocks of r = 16 positions is a product with banded matrices. The outputs of a block see
r + k − 1 inputs, which lie in `taps` = 9 blocks, and each of these has one matrix a group, in which the kernel stands
once for every output, one position further each time:

    y[n] = b + Σ_i x[n + i] · M_i,    M_i[(p, in), (q, out)] = w[out, in, 16 i + p − q]

That is (r + k) / k = 1.125 times the operations of the convolution, as products of 1,024 × 1,024 matrices (16 groups of
64 channels). The matrices are r · (r + k) / k = 18 times the weight, are written from it by one copy to their diagonals
and are not kept; their gradient returns to the weight as the sum along the same diagonals. Blocks are the outermost
index and clips the next, so that all rows of a tap are one matrix, a view that moves by a block from tap to tap.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from fastclap.kernels import dispatch
from fastclap.models.layers import weight_of

BLOCK = 16
"""Positions a block: the matrices grow with it, and the number of passes over inputs and outputs falls."""


class PositionalConvolution(nn.Module):
    """The convolution, its activation and the cut that keeps the length, on [B, T, channels].

    Args:
        embedding: `WavLMPositionalConvEmbedding` of transformers, whose modules are adopted, so that their parameter
            names stay. Any kernel size and number of groups.
    """

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.conv = embedding.conv
        self.padding = embedding.padding
        self.activation = embedding.activation

    def forward(
        self,
        x: Tensor,  # [B, T, channels]
    ) -> Tensor:  # [B, T, channels]
        conv: Any = self.conv
        if _use_products(x):
            return self.activation(convolve_positions(x, weight_of(conv), conv.bias, conv.groups))
        x = x.transpose(1, 2)
        if parametrize.is_parametrized(conv, "weight"):
            y = F.conv1d(x, weight_of(conv), conv.bias, padding=conv.padding, groups=conv.groups)
        else:
            y = conv(x)
        return self.activation(self.padding(y)).transpose(1, 2)


def is_understood(embedding: Any) -> bool:
    """Whether `PositionalConvolution` can take the place of a module of transformers.

    Not with hooks on the convolution (the older `torch.nn.utils.weight_norm`), which would not be called.
    """
    conv = embedding.conv
    return (
        conv.padding == (conv.kernel_size[0] // 2,)
        and conv.stride == conv.dilation == (1,)
        and not conv._forward_pre_hooks
        and not conv._forward_hooks
    )


def _use_products(x: Tensor) -> bool:
    """Not on a CPU, where torch's convolution took 0.06 to 0.4 of the time (float32 and bfloat16, one x86 core)."""
    return x.device.type != "cpu"


def convolve_positions(
    x: Tensor,  # [B, T, channels]
    weight: Tensor,  # [channels, channels // groups, kernel]
    bias: Tensor | None,  # [channels]
    groups: int,
) -> Tensor:  # [B, T, channels]
    """Grouped convolution over positions, padded with kernel // 2 zeros and cut to T positions.

    Differentiable once in x, weight and bias. Under autocast it computes in autocast's type, as convolutions do. In
    16-bit types the sum is rounded after each tap; the weight's gradient is summed in float32 along the diagonals.

    Returns:
        In the type of the computation; for T not a multiple of 16 a view of a longer tensor.
    """
    return _Convolution.apply(x, weight, bias, groups, dispatch.autocast_dtype(x) or x.dtype)


class _Shape(NamedTuple):
    """Where blocks and diagonals lie."""

    batch: int
    frames: int
    groups: int
    width: int  # channels of a group
    kernel: int

    @property
    def outputs(self) -> int:
        """Blocks of the output; the last may be partial."""
        return -(-self.frames // BLOCK)

    @property
    def before(self) -> int:
        """Blocks of zeros before the input."""
        return -(-(self.kernel // 2) // BLOCK)

    @property
    def offset(self) -> int:
        """Where the first output's first input lies in the first block."""
        return self.before * BLOCK - self.kernel // 2

    @property
    def taps(self) -> int:
        """Blocks that the outputs of a block see."""
        return (self.offset + BLOCK + self.kernel - 2) // BLOCK + 1

    def blocks(self, x: Tensor, dtype: torch.dtype, padded: bool = False) -> Tensor:
        """[groups, blocks, B, BLOCK · width] from [B, T, channels]; `padded` with the zeros that the taps see."""
        before, after = (self.before, self.taps - 1 - self.before) if padded else (0, 0)
        full, rest = divmod(self.frames, BLOCK)
        out = x.new_zeros(self.groups, before + self.outputs + after, self.batch, BLOCK, self.width, dtype=dtype)
        x = x.unflatten(-1, (self.groups, self.width))
        whole = x[:, : full * BLOCK].unflatten(1, (full, BLOCK))
        out[:, before : before + full].copy_(whole.permute(3, 1, 0, 2, 4))
        if rest:
            out[:, before + full, :, :rest].copy_(x[:, full * BLOCK :].permute(2, 0, 1, 3))
        return out.flatten(3)

    def rows(self, blocks: Tensor, tap: int = 0) -> Tensor:
        """View [groups, outputs · B, BLOCK · width] of those blocks of all clips that a tap multiplies."""
        return blocks[:, tap : tap + self.outputs].view(self.groups, self.outputs * self.batch, -1)

    def positions(self, blocks: Tensor) -> Tensor:
        """[B, T, channels] from [groups, outputs, B, BLOCK · width] of any shape with this order."""
        blocks = blocks.view(self.groups, self.outputs, self.batch, BLOCK, self.width)
        return blocks.permute(2, 1, 3, 0, 4).reshape(self.batch, self.outputs * BLOCK, -1)[:, : self.frames]

    def matrices(self, kernel: Tensor) -> Tensor:
        """[groups, taps, BLOCK · width, BLOCK · width] from [groups, kernel, in, out]."""
        matrices = kernel.new_zeros(self.groups, self.taps, BLOCK * self.width, BLOCK * self.width)
        self.diagonals(matrices).copy_(kernel[:, :, None])
        return matrices

    def diagonals(self, matrices: Tensor) -> Tensor:
        """View [groups, kernel, BLOCK, in, out] of what is the kernel's in the matrices, once for each output."""
        column = self.width  # entries from an output to the next, over its channels
        row = BLOCK * column * self.width  # likewise of the inputs
        return matrices.as_strided(
            (self.groups, self.kernel, BLOCK, self.width, self.width),
            (self.taps * BLOCK * row, row, row + column, BLOCK * column, 1),
            self.offset * row,
        )


class _Convolution(torch.autograd.Function):
    """Autograd of the same products would keep the matrices, and add a gradient of all of them for every tap."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, dtype: torch.dtype
    ) -> Tensor:  # [B, T, channels]
        shape = _Shape(x.shape[0], x.shape[1], groups, weight.shape[1], weight.shape[2])
        kernel = weight.to(dtype).unflatten(0, (groups, -1)).permute(0, 3, 2, 1).contiguous()
        blocks, matrices = shape.blocks(x, dtype, padded=True), shape.matrices(kernel)
        start = kernel.new_zeros(weight.shape[0]) if bias is None else bias.to(dtype)
        y = start.view(groups, 1, -1).repeat(1, shape.outputs * shape.batch, BLOCK)
        for tap in range(shape.taps):
            y.baddbmm_(shape.rows(blocks, tap), matrices[:, tap])
        ctx.save_for_backward(blocks if ctx.needs_input_grad[1] else None, kernel)
        ctx.shape, ctx.x_type, ctx.weight_type = shape, x.dtype, weight.dtype
        ctx.bias_type = None if bias is None else bias.dtype
        return shape.positions(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        blocks, kernel = ctx.saved_tensors
        shape: _Shape = ctx.shape
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        upstream = shape.rows(shape.blocks(dy, kernel.dtype))
        matrices = shape.matrices(kernel)
        dx = upstream.new_zeros(shape.groups, shape.outputs + shape.taps - 1, shape.batch, upstream.shape[-1])
        for tap in range(shape.taps):
            matrix = matrices[:, tap]
            if need_x:
                shape.rows(dx, tap).baddbmm_(upstream, matrix.transpose(1, 2))
            if need_weight:  # the gradient takes the matrix's place
                matrix.baddbmm_(shape.rows(blocks, tap).transpose(1, 2), upstream, beta=0)
        dweight = None
        if need_weight:
            sums = shape.diagonals(matrices).sum(2, dtype=torch.promote_types(kernel.dtype, torch.float32))
            dweight = sums.permute(0, 3, 2, 1).flatten(0, 1).to(ctx.weight_type)
        return (
            shape.positions(dx[:, shape.before : shape.before + shape.outputs]).to(ctx.x_type) if need_x else None,
            dweight,
            dy.sum((0, 1), dtype=ctx.bias_type) if need_bias else None,
            None,
            None,
        )
