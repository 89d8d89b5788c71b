"""Inputs and the float64 oracle that the tests of both engines of shared attention have in common."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclap.kernels.shared_attention import shared_attention
from fastclap.testing import assert_close_rel

NAMES = ("output 1", "output 2", "output 3", "q", "k", "p", "table", "v 1", "v 2", "v 3")


@dataclass
class Case:
    """q, k and p are slices of one projection's output, as the tower has them; three sets of values: head 0's and two
    of all heads."""

    q: Tensor  # [R, H, d]
    k: Tensor  # [R, H, d]
    p: Tensor  # [R, H, c]
    table: Tensor  # [H, c, 2L - 1]
    values: tuple[Tensor, ...]  # [R, 1, wide], [R, H, narrow], [R, H, narrow]
    upstreams: tuple[Tensor, ...]
    starts: Tensor  # [B + 1]
    lengths: tuple[int, ...]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.p, self.table, *self.values

    def results(self, backend: str, penalty: float = 0.0) -> tuple[Tensor, ...]:
        """The three outputs and the gradient of every leaf, in the order of `NAMES`."""
        weights = shared_attention(*self.leaves[:4], self.starts, self.lengths, penalty=penalty, backend=backend)
        outputs = [weights.attend(v) for v in self.values]
        return *outputs, *torch.autograd.grad(outputs, self.leaves, self.upstreams)


def case(
    lengths: Sequence[int],
    heads: int = 2,
    width: int = 16,
    channels: int = 4,
    *,
    wide: int = 80,
    narrow: int = 12,
    more: int = 3,
    dtype: torch.dtype = torch.float32,
    side: torch.dtype = torch.float32,
    scale: float = 1.0,
    device: str = "cpu",
) -> Case:
    """`more`: distances of the table beyond those of the longest clip, to either side; `side`: its dtype; `scale`: of
    the scores."""
    generator = torch.Generator().manual_seed(len(lengths) * 1000 + sum(lengths))
    rows, sizes = sum(lengths), (heads * width, heads * width, heads * channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    projected = normal(rows, sum(sizes))
    projected[:, : 2 * heads * width] *= width**-0.25 * scale**0.5
    projected[:, 2 * heads * width :] *= scale
    q, k, p = (x.unflatten(1, (heads, -1)) for x in projected.to(device, dtype).split(sizes, 1))
    table = normal(heads, channels, 2 * (max(lengths) + more) - 1).to(device, side)
    shapes = ((1, wide), (heads, narrow), (heads, narrow))
    values, upstreams = (tuple(normal(rows, *shape).to(device, dtype) for shape in shapes) for _ in range(2))
    q, k, p, table = (x.detach().requires_grad_() for x in (q, k, p, table))
    values = tuple(v.requires_grad_() for v in values)
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return Case(q, k, p, table, values, upstreams, starts, tuple(lengths))


def oracle(x: Case, penalty: float = 0.0) -> tuple[Tensor, ...]:
    """`Case.results` in float64, from the definition one row at a time; the penalty is a term of the loss."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in x.leaves]
    q, k, p, table, *values = leaves
    middle = table.shape[2] // 2
    outputs: list[list[list[Tensor]]] = [[], [], []]
    excess = torch.zeros((), dtype=torch.float64, device=q.device)
    first = 0
    for length in x.lengths:
        for i in range(length):
            rows = []
            for h in range(q.shape[1]):
                near = table[h, :, middle - i : middle - i + length]  # distances -i, …, length - 1 - i
                scores = k[first : first + length, h] @ q[first + i, h] + p[first + i, h] @ near
                excess = excess + (scores.abs() - 25).relu().sum()
                rows.append(scores.softmax(0))
            for output, v in zip(outputs, values, strict=True):
                output.append([rows[h] @ v[first : first + length, h] for h in range(v.shape[1])])
        first += length
    outs = [torch.stack([torch.stack(row) for row in output]) for output in outputs]
    loss = penalty * excess
    for out, upstream in zip(outs, x.upstreams, strict=True):
        loss = loss + (out * upstream.double()).sum()
    return *(out.detach() for out in outs), *torch.autograd.grad(loss, leaves)


def check(label: str, x: Case, results: Sequence[Tensor], expected: Sequence[Tensor], tol: float) -> None:
    """Outputs and all gradients within a relative error; where the true value is 0, within it of the upstreams'."""
    size = sum(upstream.double().square().sum() for upstream in x.upstreams) ** 0.5
    for name, exact, value in zip(NAMES, expected, results, strict=True):
        assert value.isfinite().all(), f"{label}: {name} is not finite"
        if exact.norm() > 1e-6 * size:
            assert_close_rel(f"{label}: {name}", exact, value, tol)
        else:
            assert value.double().norm() < 10 * tol * size, f"{label}: {name}"
