"""Inputs and the float64 oracle that the tests of both engines of gated-Toeplitz attention share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastclap.testing import assert_close_rel

NAMES = ("q", "k", "v", "table", "gate")


@dataclass
class Case:
    """q, k, v: views [B, H, T, d] of [B, T, H, d]; table and gate float32, as parameters and gates are."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    gate: Tensor
    upstream: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.table, self.gate


def case(
    batch: int,
    heads: int,
    length: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    side: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = (normal(batch, length, heads, width).to(device, dtype).transpose(1, 2) for _ in range(3))
    table, gate = normal(heads, 2 * length - 1).to(device, side), (1 + normal(batch, heads, length)).to(device, side)
    upstream = normal(batch, length, heads, width).to(device, dtype).transpose(1, 2)
    q, k, v, table, gate = (x.requires_grad_() for x in (q, k, v, table, gate))
    return Case(q, k, v, table, gate, upstream)


def oracle(
    x: Case, lengths: Tensor | None = None, dropout: float = 0.0, keep: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and the gradients of q, k, v, table and gate, in float64, from the definition one element at a time."""
    q, k, v, table, gate = (leaf.detach().double().requires_grad_() for leaf in x.leaves)
    batch, heads, length, width = q.shape
    outputs = []
    for b in range(batch):
        valid = length if lengths is None else int(lengths[b])
        for h in range(heads):
            rows = []
            for i in range(length):
                if not valid:
                    rows.append(0.0 * q[b, h, i])
                    continue
                bias = gate[b, h, i] * torch.stack([table[h, j - i + length - 1] for j in range(valid)])
                p = ((k[b, h, :valid] @ q[b, h, i]) * (width**-0.5 if scale is None else scale) + bias).softmax(0)
                if keep is not None:
                    p = p * keep[b, h, i, :valid] / (1 - dropout)
                rows.append(p @ v[b, h, :valid])
            outputs.append(torch.stack(rows))
    out = torch.stack(outputs).view(batch, heads, length, width)
    leaves = (q, k, v, table, gate)
    gradients = torch.autograd.grad(out, leaves, x.upstream.double(), allow_unused=True)
    filled = (torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True))
    return out.detach(), tuple(filled)


def check(label: str, x: Case, out: Tensor, expected: tuple[Tensor, tuple[Tensor, ...]], tol: float) -> None:
    """Output and all gradients within a relative error; where the true value is 0, within it of the upstream's size."""
    gradients = torch.autograd.grad(out, x.leaves, x.upstream)
    for name, reference, value in zip(("output", *NAMES), (expected[0], *expected[1]), (out, *gradients), strict=True):
        assert value.isfinite().all(), f"{label}: {name} is not finite"
        if reference.norm() > 1e-6 * x.upstream.norm().double():
            assert_close_rel(f"{label}: {name}", reference, value, tol)
        else:
            assert value.double().norm() < 10 * tol * x.upstream.double().norm(), f"{label}: {name}"
