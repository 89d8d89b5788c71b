"""Inputs and options that the tests of both engines of the contrastive losses share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SCALES = (1.0, 14.3, 100.0)


def embeddings(n: int, m: int, alignment: float, dim: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of which the first min(n, m) pairs have a cosine of about ``alignment``."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, dim, generator=generator) for rows in (n, m))
    pairs = min(n, m)
    a[:pairs] = alignment * b[:pairs] + (1 - alignment**2) ** 0.5 * a[:pairs]
    return a, b


def ids(n: int, m: int, groups: int, seed: int = 0) -> dict[str, Tensor]:
    """Ids of which some have no partner, some have several, and at least one pair matches."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-groups, groups, (rows,), generator=generator) * 2**40 for rows in (n, m))
    b[0] = a[0]
    return {"a_ids": a, "b_ids": b}


def teacher(n: int, m: int, scale: float = 20.0) -> dict[str, Any]:
    return {"teacher": (*embeddings(n, m, 0.5, dim=7, seed=5), torch.tensor(scale)), "teacher_weight": 0.3}


OPTIONS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "plain": lambda n, m: {},
    "ids": lambda n, m: ids(n, m, max(1, n // 3)),
    "class ids": lambda n, m: ids(n, m, 3),
    "label smoothing": lambda n, m: {"label_smoothing": 0.1},
    "a_to_b": lambda n, m: {"direction": "a_to_b"},
    "b_to_a": lambda n, m: {"direction": "b_to_a", **ids(n, m, max(1, n // 3))},
    "teacher": teacher,
    "everything": lambda n, m: {**teacher(n, m), **ids(n, m, max(1, n // 3)), "label_smoothing": 0.2},
    "everything, one way": lambda n, m: {**teacher(n, m), "label_smoothing": 0.2, "direction": "b_to_a"},
}


def evaluate(
    loss: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype, backend: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    """The value and the gradient of every input in ``dtype``, under an upstream gradient of 2.5."""
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in inputs]
    options = dict(options)
    if "teacher" in options:
        options["teacher"] = tuple(x.to(dtype) for x in options["teacher"])
    value = loss(*leaves, backend=backend, **options)
    (2.5 * value).backward()
    names = ("gradient of a", "gradient of b", "gradient of logit_scale", "gradient of logit_bias")
    gradients = {name: leaf.grad for name, leaf in zip(names, leaves, strict=False) if leaf.grad is not None}
    return {"loss": value.detach(), **gradients}
