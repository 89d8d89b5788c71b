"""Swoosh, alone and before a linear layer: the torch engine, the definition and the checks, on any machine.

See also test_swoosh_triton.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclap.kernels.swoosh import swoosh, swoosh_linear, swoosh_linear_reference, swoosh_reference
from fastclap.testing import assert_close_rel

KINDS = ("l", "r")
SEQUENCE = torch.tensor([0, 0, 1, 1, 1, 3, 3])


def inputs(rows: int = 7, hidden: int = 24, out: int = 5, clips: int = 4) -> list[Tensor]:
    """x, weight, bias and mask."""
    generator = torch.Generator().manual_seed(rows + hidden)
    x = 3 * torch.randn(rows, hidden, generator=generator)
    weight, bias = torch.randn(out, hidden, generator=generator), torch.randn(out, generator=generator)
    mask = (torch.rand(clips, hidden, generator=generator) > 0.25) / 0.75
    return [x, weight, bias, mask]


def test_the_definition_is_the_formula_and_its_derivative() -> None:
    points = [-50.0, -3.0, -0.1, 0.0, 0.7, 4.0, 30.0]
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    for kind, offset, constant in (("l", 4.0, 0.035), ("r", 1.0, 0.313261687)):
        y = swoosh_reference(x, kind)
        wanted = [math.log(1 + math.exp(p - offset)) - 0.08 * p - constant for p in points]
        assert_close_rel("y", torch.tensor(wanted, dtype=torch.float64), y, 1e-14)
        (slope,) = torch.autograd.grad(y.sum(), x)
        wanted = [1 / (1 + math.exp(offset - p)) - 0.08 for p in points]
        assert_close_rel("slope", torch.tensor(wanted, dtype=torch.float64), slope, 1e-14)
    assert abs(swoosh_reference(x, "r")[3]) < 6e-10, "0 at 0"


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_code_computes_the_same(icefall: Any, kind: str) -> None:
    module = {"l": icefall.scaling.SwooshL, "r": icefall.scaling.SwooshR}[kind]()
    x = torch.linspace(-30, 30, 999)
    assert_close_rel("y", module.eval()(x), swoosh(x, kind), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_engine_is_the_definition_also_far_out(kind: str) -> None:
    for dtype, tol in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)):
        x = torch.cat((torch.linspace(-60, 60, 999), torch.tensor([-1e6, 1e6]))).to(dtype).requires_grad_()
        exact = x.detach().double().requires_grad_()
        for part in (slice(0, 999), slice(999, None)):
            y, wanted = swoosh(x[part], kind), swoosh_reference(exact[part], kind)
            assert y.dtype == dtype
            assert_close_rel(f"y, {dtype}", wanted, y, tol)
            (slope,), (of_it,) = (torch.autograd.grad(v.sum(), t) for v, t in ((wanted, exact), (y, x)))
            assert_close_rel(f"slope, {dtype}", slope, of_it, 4 * tol)


def test_gradients_of_the_definition_and_of_the_torch_engine() -> None:
    x, weight, bias, mask = (t.double() for t in inputs(7, 6))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    for kind in KINDS:
        for function in (swoosh_linear_reference, swoosh_linear):

            def call(*t: Tensor, function: Any = function, kind: str = kind) -> Tensor:
                return function(t[0], kind, *t[1:], mask, SEQUENCE)

            assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)
        assert torch.autograd.gradcheck(lambda x, kind=kind: swoosh(x, kind), leaves[:1])


def test_without_a_gpu_it_is_activation_mask_and_layer() -> None:
    x, weight, bias, mask = inputs()
    for kind in KINDS:
        a = swoosh_reference(x.double(), kind)
        for backend in ("auto", "torch", "reference"):
            y = swoosh_linear(x, kind, weight, bias, mask, SEQUENCE, backend=backend)
            wanted = a * mask.double()[SEQUENCE] @ weight.double().t() + bias
            assert_close_rel("y", wanted, y, 1e-6)
            y = swoosh_linear(x.view(1, 7, 24), kind, weight, backend=backend)
            assert_close_rel("without mask and bias", (a @ weight.double().t())[None], y, 1e-6)
        assert_close_rel("alone", a, swoosh(x, kind, backend="reference"), 1e-6)


def test_autocast_casts_as_a_linear_layer_does() -> None:
    x, weight, bias, mask = (t.requires_grad_() for t in inputs())
    mask = mask.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = swoosh_linear(x, "l", weight, bias, mask, SEQUENCE)
        low = swoosh_linear(x.bfloat16(), "l", weight, bias, mask, SEQUENCE)
        assert swoosh(x, "l").dtype == torch.float32
        assert swoosh_linear(x.double(), "l", weight.double()).dtype == torch.float64
        assert swoosh_linear(x, "l", weight, bias, backend="reference").dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16 and torch.equal(y, low)
    gradients = torch.autograd.grad(y.float().sum(), (x, weight, bias))
    assert all(g.dtype == torch.float32 for g in gradients)
    assert_close_rel("y", swoosh_linear_reference(x, "l", weight, bias, mask, SEQUENCE), y, 2.0**-7)


def test_nothing_in_nothing_out() -> None:
    _, weight, bias, mask = inputs()
    x = torch.empty(0, 24, requires_grad=True)
    y = swoosh_linear(x, "l", weight, bias, mask, SEQUENCE[:0])
    y.sum().backward()
    assert y.shape == (0, 5) and x.grad is not None and swoosh(x, "r").shape == (0, 24)


def test_wrong_arguments_are_named() -> None:
    x, weight, bias, mask = inputs()

    def refused(error: type[Exception], match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            swoosh_linear(*arguments, **options)

    refused(ValueError, "kind must be one of l, r, is 'm'", x, "m", weight)
    refused(ValueError, r"weight must be \[5, 24\] beside x \[7, 24\], is \[5, 23\]", x, "l", weight[:, 1:])
    refused(ValueError, r"weight must be \[D, 24\]", x, "l", bias)
    refused(ValueError, r"bias must be \[5\] beside x", x, "l", weight, bias[1:])
    refused(ValueError, r"mask must be \[B, 24\]", x, "l", weight, bias, mask[0], SEQUENCE)
    refused(ValueError, r"mask must be \[4, 24\] beside x \[7, 24\], is \[4, 3\]", x, "l", weight, bias, mask[:, :3])
    refused(ValueError, "mask and sequence go together", x, "l", weight, bias, mask)
    refused(ValueError, "mask and sequence go together", x, "l", weight, bias, None, SEQUENCE)
    refused(ValueError, r"sequence must be \[7\] beside x", x, "l", weight, bias, mask, SEQUENCE[1:])
    refused(TypeError, "sequence must be int32 or int64, is torch.float32", x, "l", weight, bias, mask, SEQUENCE + 0.0)
    refused(ValueError, "sequence is on meta, x on cpu", x, "l", weight, bias, mask, SEQUENCE.to("meta"))
    refused(ValueError, "mask needs a gradient", x, "l", weight, bias, mask.requires_grad_(), SEQUENCE)
    refused(TypeError, "x must be a floating tensor, is torch.int64", x.long(), "l", weight)
    refused(TypeError, "weight must be a floating tensor, is torch.int64", x, "l", weight.long())
    refused(
        TypeError, "must have one dtype without autocast, have .*'weight': torch.bfloat16", x, "l", weight.bfloat16()
    )
    refused(ValueError, "weight is on meta, x on cpu; move it there first", x, "l", weight.to("meta"))
    refused(ValueError, "x must be .*is a scalar", x[0, 0], "l", weight)
    refused(ValueError, "backend must be one of", x, "l", weight, backend="cuda")
    refused(ValueError, "cannot be used: x is torch.float64", x.double(), "l", weight.double(), backend="triton")
    with pytest.raises(ValueError, match="kind must be one of l, r, is 'gelu'"):
        swoosh(x, "gelu")
    with pytest.raises(TypeError, match="x must be a floating tensor"):
        swoosh(x.long(), "l")


def test_triton_on_a_cpu_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for call in (lambda: swoosh(torch.ones(2, 3), "l", backend="triton"),):
        with pytest.raises(ValueError, match=r"on a CPU set TRITON_INTERPRET=1 before the first import"):
            call()
