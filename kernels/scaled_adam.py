"""What ScaledAdam does with every value: sums over each parameter, and the change.

The rest of the optimizer (`fastclap.train.scaled_adam`) works on a few numbers for each parameter. In float32, bytes a
value: the sums read p and g (8); the step reads p, g, Δ and v and writes all but g (28). The Triton engine
(`fastclap.kernels.scaled_adam_triton`) does just that, in three launches for any number of parameters. The torch engine
takes about three times the traffic, and launches a few operations for each parameter.

These are plain functions that write in place, as `torch._foreach_*` are, and no operators: nothing differentiates or
compiles an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastclap.kernels import dispatch

# Values whose step takes place at once in the torch engine: temporary memory is one float for each of them.
_AT_ONCE = 1 << 26


class Change(NamedTuple):
    """What a step depends on besides its values."""

    rates: Tensor  # [n], negative: of each parameter
    growth: Tensor | None  # [n]: likewise; None: sizes stay
    scale: Tensor  # []: of the gradients
    skip: Tensor  # bool []: nothing changes
    beta1: float
    beta2: float
    correction: float  # of v
    eps: float


def sums(
    parameters: list[Tensor],
    gradients: list[Tensor | None],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Σg² and Σp·g of each of n parameters, [n] both; a gradient that is None is zero.

    Args:
        parameters: of one float dtype, on one device.
        gradients: like them.
        backend: "auto", "triton" or "torch". Triton takes contiguous float32 tensors.

    Raises:
        ValueError: the backend is unknown, or cannot take these.
    """
    if _engine(parameters, gradients, backend) == "triton":
        from fastclap.kernels import scaled_adam_triton

        return scaled_adam_triton.sums(parameters, gradients)
    zero = parameters[0].new_zeros(())
    present = [g for g in gradients if g is not None]
    norms = iter(torch._foreach_norm(present) if present else [])
    squares = [zero if g is None else next(norms) for g in gradients]
    products = [
        zero if g is None else torch.dot(p.reshape(-1), g.reshape(-1))
        for p, g in zip(parameters, gradients, strict=True)
    ]
    return torch.stack(squares).square(), torch.stack(products)


def update_(
    parameters: list[Tensor],
    gradients: list[Tensor | None],
    deltas: list[Tensor],
    squares: list[Tensor],
    change: Change,
    backend: str = "auto",
) -> None:
    """Take a step in place: of p, Δ and v of each of n parameters; what is in the gradients afterwards is undefined.

    With g the gradient times `scale`: v ← β2·v + (1 − β2)·g², Δ ← β1·Δ + growth·p + rate·g / (√(v / correction) + ε),
    p ← p + Δ. Where `skip` is true, nothing of the three changes, whatever the gradients hold.

    Args:
        parameters, gradients, backend: as `sums` takes them.
        deltas, squares: Δ and v, like the parameters.
        change: the rest.

    Raises:
        ValueError: as `sums`.
    """
    if _engine([*parameters, *deltas, *squares], gradients, backend) == "triton":
        from fastclap.kernels import scaled_adam_triton

        scaled_adam_triton.update_(parameters, gradients, deltas, squares, *change)
        return
    beta1, beta2 = (
        change.scale.new_full((), beta).masked_fill_(change.skip, 1.0) for beta in (change.beta1, change.beta2)
    )
    taken = torch.ones_like(change.scale).masked_fill_(change.skip, 0.0)
    rates = change.rates.unbind()
    growth = [None] * len(parameters) if change.growth is None else change.growth.masked_fill(change.skip, 0.0).unbind()
    for part in _parts(parameters):
        ps, ds, vs = parameters[part], deltas[part], squares[part]
        gs = [torch.zeros_like(p) if g is None else g for p, g in zip(ps, gradients[part], strict=True)]
        torch._foreach_mul_(gs, change.scale)
        for g in gs:
            g.masked_fill_(change.skip, 0.0)  # which may not be finite
        torch._foreach_mul_(vs, beta2)
        torch._foreach_addcmul_(vs, gs, gs, value=1 - change.beta2)
        denominators = torch._foreach_sqrt(vs)
        if change.correction != 1.0:
            torch._foreach_mul_(denominators, change.correction**-0.5)
        torch._foreach_add_(denominators, change.eps)
        torch._foreach_div_(gs, denominators)
        torch._foreach_mul_(ds, beta1)
        for p, g, d, rate, grown in zip(ps, gs, ds, rates[part], growth[part], strict=True):
            if grown is not None:
                d.addcmul_(p, grown)
            d.addcmul_(g, rate)
            p.addcmul_(d, taken)


def _engine(tensors: list[Tensor], gradients: list[Tensor | None], backend: str) -> str:
    every = [*tensors, *(g for g in gradients if g is not None)]
    why_not = None
    if any(x.dtype != torch.float32 for x in every):
        why_not = "a tensor is not float32"
    elif not all(x.is_contiguous() for x in every):
        why_not = "a tensor is not contiguous"
    return dispatch.engine(tensors[0], backend, why_not)


def _parts(tensors: list[Tensor]) -> Iterator[slice]:
    """Neighbours of at most `_AT_ONCE` values together, or a single tensor that has more."""
    begin = values = 0
    for at, tensor in enumerate(tensors):
        if at > begin and values + tensor.numel() > _AT_ONCE:
            yield slice(begin, at)
            begin, values = at, 0
        values += tensor.numel()
    yield slice(begin, len(tensors))
