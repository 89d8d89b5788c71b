"""The emulated matrix unit on sums done by hand, and what Triton makes of a float32 product."""

from __future__ import annotations

import os
import re
import statistics

import numpy as np
import pytest
import torch

from bench import float32_errors
from bench.float32_errors import CHIPS, FORMS, GOAL, multiply_add

H100 = CHIPS["h100"]
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


def of(*values: float) -> float32_errors.Array:
    return np.array([values], np.float32)


def test_parts_add_up() -> None:
    x = np.random.default_rng(0).standard_normal((50, 50)).astype(np.float32)
    big, small = float32_errors.tf32_parts(x)
    for part in (big, small):
        assert not (part.view(np.uint32) & 0x1FFF).any()
    assert np.abs(x - big).max() <= 2**-11 * np.abs(x).max()
    assert (np.abs(x.astype(np.float64) - big - small) <= 2.0**-21 * np.abs(x)).all()
    parts = float32_errors.bf16_parts(x, 3)
    assert np.array_equal(sum(part.astype(np.float64) for part in parts), x)
    assert all(np.array_equal(part, torch.from_numpy(part).bfloat16().float().numpy()) for part in parts)


@pytest.mark.parametrize(
    ("left", "right", "total", "expected"),
    [
        ((1.0, 2.0), (3.0, 0.5), 0.25, 4.25),
        ((0.75, 0.0), (2.0**-23, 0.0), 1.0, 1.0),  # the sum is cut off, not rounded
        ((-0.75, 0.0), (2.0**-23, 0.0), -1.0, -1.0),  # toward zero
        ((1.0,) * 8, (2.0**-25,) * 8, 1.0, 1.0 + 2.0**-22),  # two more bits are kept of each term …
        ((1.0,) * 8, (2.0**-26,) * 8, 1.0, 1.0),  # … and no third
        ((1.5, 1.0), (1.5, 2.0**-25), 0.0, 2.25),  # a product that reaches 2 counts by its factors' exponents: …
        ((1.5, 1.0, 1.0), (1.5, 2.0**-24, 2.0**-24), 0.0, 2.25),  # … all bits reach the sum, and 2^-23 is cut off it
        ((1.5, 1.0, 1.0), (1.5, 2.0**-23, 2.0**-23), 0.0, 2.25 + 2.0**-22),
    ],
)
def test_one_step_of_the_matrix_unit(
    left: tuple[float, ...], right: tuple[float, ...], total: float, expected: float
) -> None:
    found = multiply_add(of(*left), of(*right), np.array([[total]]), H100.extra_bits)
    assert found.item() == expected


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("step", [None, 32])
def test_products_of_small_integers_are_exact(name: str, step: int | None) -> None:
    a, b = np.random.default_rng(0).integers(-30, 30, (2, 20, 72)).astype(np.float32)
    found = float32_errors.product(a, b, FORMS[name], step, H100)
    assert np.array_equal(found, a.astype(np.float64) @ b.astype(np.float64).T)


def test_gradients_of_the_exact_loss_are_those_of_autograd() -> None:
    a, b = (torch.from_numpy(x).double() for x in float32_errors.embeddings(20, 12, 0.5))
    leaves = [a.requires_grad_(), b.requires_grad_(), torch.tensor(14.3, dtype=torch.float64, requires_grad=True)]
    unit_a, unit_b = (x / x.norm(dim=1, keepdim=True) for x in leaves[:2])
    logits = leaves[2] * (unit_a @ unit_b.t())
    labels = torch.arange(20)
    loss = (
        torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.t(), labels)
    ) / 2
    expected = torch.autograd.grad(loss, leaves)
    found = float32_errors.exact(a.detach().numpy(), b.detach().numpy(), 14.3)
    for one, other in zip((found.a, found.b, found.scale), expected, strict=True):
        assert float32_errors.relative(one, other.numpy()) < 1e-12


@compiles
def test_the_kernels_step_comes_near_a_float32_product_and_one_accumulator_does_not() -> None:
    engine = pytest.importorskip("fastclap.kernels.contrastive.triton_engine")
    forms = {
        (c.constexprs["PRECISION"], c.constexprs["BK"])
        for c in engine.compilations(90)
        if c.constexprs.get("PRECISION") in FORMS
    }
    assert forms
    inputs = [float32_errors.embeddings(40, 1024, 0.9, seed) for seed in range(3)]

    def median(name: str, step: int | None) -> float:
        found = (float32_errors.product(a, b, FORMS[name], step, H100) for a, b in inputs)
        return statistics.median(
            float32_errors.errors(dots, a, b, 100.0).largest for dots, (a, b) in zip(found, inputs, strict=True)
        )

    for name, step in forms:
        assert median(name, step) <= 2 * GOAL, (name, step)  # as a plain float32 product on some seeds
    assert median("tf32x3", None) > 20 * GOAL


@compiles
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("precision", ["tf32x3", "bf16x6"])
def test_triton_adds_each_step_to_the_total_outside_the_matrix_unit(arch: int, precision: str) -> None:
    pytest.importorskip("triton")
    from fastclap.kernels import offline
    from tests.bench import float32_product

    ttgir = offline.compiled_kernel(float32_product.compilation(precision), arch).asm["ttgir"]
    dots = len(re.findall(r"= tt\.dot |warp_group_dot |tc_gen5_mma ", ttgir))
    additions = len(re.findall(r"arith\.addf [^:]*: tensor<64x64xf32", ttgir))
    terms = len(FORMS[precision].terms)
    assert additions > 0 and dots == terms * additions
