"""The engines of scaled_adam against float64: on a GPU, or the Triton one in its interpreter (`TRITON_INTERPRET=1`)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclap.kernels import scaled_adam
from fastclap.kernels.scaled_adam import Change
from fastclap.testing import assert_close_rel
from fastclap.train.scaled_adam import ScaledAdam

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1 (`make test` runs it)"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
ENGINES = ("triton",) if INTERPRETED else ("triton", "torch")
# less than a block, a whole one, one value more, a whole part, and several with a remainder
SHAPES = [(2,), (3, 5), (1024,), (1025,), (16384,), (16385,), (7, 6000), (1,), (4, 4096)]
WITHOUT = 5  # a gradient


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def of_one_buffer(offset: int) -> list[Tensor]:
    """Tensors of `SHAPES` that lie next to each other, as the views of a bucket do, with NaN around each."""
    sizes = [math.prod(shape) for shape in SHAPES]
    buffer = torch.full((sum(sizes) + 64 * (len(sizes) + 1),), math.nan, device=DEVICE)
    found, begin = [], offset
    for shape, size in zip(SHAPES, sizes, strict=True):
        found.append(buffer[begin : begin + size].view(shape))
        begin += -(-(size + 8) // 16) * 16
    return found


def tensors(offset: int = 0) -> list[list[Tensor]]:
    """Parameters, gradients, Δ and v; aligned to 16 bytes where the offset is 0."""
    generator = torch.Generator().manual_seed(offset)
    found = [of_one_buffer(offset) for _ in range(4)]
    for column, kind in enumerate(found):
        for x in kind:
            values = torch.randn(x.shape, generator=generator)
            x.copy_(values.square() if column == 3 else values)
    return found


def change(skip: bool, grows: bool, **changes: Any) -> Change:
    generator = torch.Generator().manual_seed(7)
    rates, growth = (0.1 * torch.randn(2, len(SHAPES), generator=generator)).to(DEVICE).unbind()
    scale, skipped = torch.tensor(0.3, device=DEVICE), torch.tensor(skip, device=DEVICE)
    return Change(rates, growth if grows else None, scale, skipped, 0.9, 0.98, 0.4, 1e-8)._replace(**changes)


def optional(gradients: list[Tensor]) -> list[Tensor | None]:
    return [None if index == WITHOUT else g for index, g in enumerate(gradients)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("offset", [0, 1])
def test_sums(engine: str, offset: int) -> None:
    ps, gs, *_ = tensors(offset)
    found = scaled_adam.sums(ps, optional(gs), engine)
    again = scaled_adam.sums(ps, optional(gs), engine)
    for index, (p, g) in enumerate(zip(ps, gs, strict=True)):
        here = 0.0 if index == WITHOUT else 1.0
        p, g = p.double(), g.double() * here
        assert_close_rel(f"square {index}", (g * g).sum(), found[0][index].double(), 1e-6)
        # each product and each addition is rounded, relative to the sum of magnitudes
        assert abs(found[1][index].item() - (p * g).sum().item()) <= 2e-6 * (p * g).abs().sum().item()
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("grows", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_step(engine: str, offset: int, grows: bool) -> None:
    how, results = change(False, grows), []
    for _ in range(2):
        ps, gs, ds, vs = tensors(offset)
        given = [[x.double() for x in kind] for kind in (ps, gs, ds, vs)]
        scaled_adam.update_(ps, optional(gs), ds, vs, how, engine)
        results.append([x.clone() for kind in (ps, ds, vs) for x in kind])
        for index, (p, g, d, v) in enumerate(zip(*given, strict=True)):
            g = 0 * g if index == WITHOUT else g * how.scale.double()
            v = 0.98 * v + 0.02 * g * g
            d = 0.9 * d + (how.growth[index].double() * p if how.growth is not None else 0.0)
            d = d + how.rates[index].double() * g / ((v / 0.4).sqrt() + 1e-8)
            for name, expected, actual in (("v", v, vs), ("Δ", d, ds), ("p", p + d, ps)):
                assert_close_rel(f"{name} {index}", expected, actual[index].double(), 1e-6)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_skipped_step_changes_nothing(engine: str) -> None:
    ps, gs, ds, vs = tensors()
    for g in gs:
        g.view(-1)[0] = math.nan
    before = [x.clone() for kind in (ps, ds, vs) for x in kind]
    rates = torch.full((len(SHAPES),), math.nan, device=DEVICE)
    how = change(True, True, rates=rates, growth=rates, scale=torch.tensor(math.inf, device=DEVICE))
    if engine == "torch":  # the optimizer's own numbers are finite
        how = change(True, True)
    scaled_adam.update_(ps, optional(gs), ds, vs, how, engine)
    assert all(torch.equal(one, other) for one, other in zip(before, [*ps, *ds, *vs], strict=True))


def test_the_optimizer_is_the_same_on_both_engines() -> None:
    """Past a threshold, with gradients that are clipped, missing, and skipped."""

    def run(backend: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        ps = [
            torch.nn.Parameter((0.3 * torch.randn(s, generator=generator)).to(DEVICE)) for s in ((5, 7), (1,), (3000,))
        ]
        optimizer = ScaledAdam(
            [{"params": ps[:2], "lr": 0.01}, {"params": ps[2:], "lr": 0.03}], clipping_period=8, backend=backend
        )
        for step in range(22):
            for p in ps:
                g = torch.randn(p.shape, generator=generator) * (30.0 if step % 7 == 3 else 1.0)
                p.grad = None if step in (9, 10) and p is ps[2] else g.to(DEVICE)
            optimizer.found_inf = torch.tensor(float(step == 13), device=DEVICE)
            optimizer.step()
        return [p.detach().double() for p in ps]

    for index, (expected, actual) in enumerate(zip(run("torch"), run("triton"), strict=True)):
        assert_close_rel(f"{index}", expected, actual, 2e-5)


def test_what_the_triton_engine_cannot_take() -> None:
    x = torch.ones(3, 2, device=DEVICE)
    for tensor, reason in ((x.double(), "not float32"), (x.t(), "not contiguous")):
        with pytest.raises(ValueError, match=reason):
            scaled_adam.sums([tensor], [torch.ones_like(tensor)], "triton")
        expected = float(tensor.sum())
        assert float(scaled_adam.sums([tensor], [torch.ones_like(tensor)])[1]) == expected
