"""Inputs and options that the tests of both engines of the contrastive losses share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastclap.kernels.contrastive.shared import QueueRows

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
    if n and m:
        b[0] = a[0]
    return {"a_ids": a, "b_ids": b}


def teacher(n: int, m: int, scale: float = 20.0) -> dict[str, Any]:
    return {"teacher": (*embeddings(n, m, 0.5, dim=7, seed=5), torch.tensor(scale)), "teacher_weight": 0.3}


def guide(n: int, m: int, margin: float = 0.0) -> dict[str, Any]:
    """A teacher that finds about a quarter of the columns closer than the positives."""
    return {"teacher": teacher(n, m)["teacher"], "guide_margin": margin}


def queue(a_entries: int, b_entries: int, groups: int = 0, dim: int = 24) -> dict[str, Any]:
    """Entries of earlier batches, with ids that are also those of some rows if there are groups."""
    rows = embeddings(a_entries, b_entries, 0.3, dim, seed=9)
    return {"queue": QueueRows(*rows, *(ids(a_entries, b_entries, groups, seed=8).values() if groups else ()))}


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

# Other kinds of contrast: each alone, with ids, one way and the other, and in what combinations there are.
CONTRASTS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "guide": guide,
    "guide, ids": lambda n, m: {**guide(n, m, 0.1), **ids(n, m, max(1, n // 3))},
    "guide, a_to_b": lambda n, m: {**guide(n, m, -0.1), "direction": "a_to_b"},
    "relative guide, b_to_a": lambda n, m: {
        **guide(n, m, 0.2), **ids(n, m, max(1, n // 3)), "guide_relative": True, "direction": "b_to_a",
    },
    "debias": lambda n, m: {"debias": 0.01},
    "debias, ids": lambda n, m: {"debias": 0.1, **ids(n, m, max(1, n // 3))},
    "debias, a_to_b": lambda n, m: {"debias": 0.002, "direction": "a_to_b"},
    "debias, b_to_a": lambda n, m: {"debias": 0.3, "direction": "b_to_a", **ids(n, m, 3)},
    "queue": lambda n, m: queue(37, 150),
    "queue, ids": lambda n, m: {**queue(150, 37, max(1, n // 3)), **ids(n, m, max(1, n // 3))},
    "queue, a_to_b": lambda n, m: {**queue(3, 70), "direction": "a_to_b"},
    "queue, b_to_a": lambda n, m: {**queue(70, 3, 3), **ids(n, m, 3), "direction": "b_to_a"},
    "queue of one side": lambda n, m: queue(0, 65),
    "matryoshka": lambda n, m: {"matryoshka": (24, 3, 8)},
    "matryoshka, weights": lambda n, m: {"matryoshka": {5: 0.5, 16: 2.0}, "direction": "a_to_b"},
    "matryoshka, guide": lambda n, m: {"matryoshka": (8, 16), **guide(n, m), **ids(n, m, max(1, n // 3))},
    "everything": lambda n, m: {
        **teacher(n, m), **ids(n, m, max(1, n // 3)), **queue(41, 29, max(1, n // 3)), "label_smoothing": 0.2,
        "debias": 0.02,
    },
    "everything, prefixes, one way": lambda n, m: {
        **teacher(n, m), **queue(41, 29), "label_smoothing": 0.2, "debias": 0.02, "direction": "b_to_a",
        "matryoshka": {11: 1.0, 24: 0.3},
    },
}  # fmt: skip


def converted(options: dict[str, Any], dtype: torch.dtype | None, device: str = "cpu") -> dict[str, Any]:
    """The options with their embeddings in a dtype (None: their own), and all tensors on a device."""
    found = dict(options)
    for name, value in options.items():
        if name in ("teacher", "queue"):
            parts = [
                x.to(device, dtype if dtype and x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x
                for x in value
            ]
            found[name] = QueueRows(*parts) if name == "queue" else tuple(parts)
        elif isinstance(value, Tensor):
            found[name] = value.to(device)
    return found


def evaluate(
    loss: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype, backend: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    """The value and the gradient of every input in ``dtype``, under an upstream gradient of 2.5."""
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in inputs]
    value = loss(*leaves, backend=backend, **converted(options, dtype, leaves[0].device.type))
    (2.5 * value).backward()
    names = ("gradient of a", "gradient of b", "gradient of logit_scale", "gradient of logit_bias")
    gradients = {name: leaf.grad for name, leaf in zip(names, leaves, strict=False) if leaf.grad is not None}
    return {"loss": value.detach(), **gradients}
