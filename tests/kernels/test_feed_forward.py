"""The feed-forward: the torch engine and the definition, on any machine; see also test_feed_forward_triton.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclap.kernels.feed_forward import feed_forward, feed_forward_reference
from fastclap.testing import assert_close_rel

NAMES = ("x", "weight_in", "bias_in", "weight_out")


def inputs(*shape: int, hidden: int = 48, out: int = 20) -> list[Tensor]:
    """x, weight_in, bias_in and weight_out, for values of u and y of about 1."""
    generator = torch.Generator().manual_seed(sum(shape))
    channels = shape[-1]
    sizes = (shape, (hidden, channels), (hidden,), (out, hidden))
    scales = (1.0, channels**-0.5, 1.0, hidden**-0.5)
    return [torch.randn(size, generator=generator) * scale for size, scale in zip(sizes, scales, strict=True)]


def modules(leaves: list[Tensor]) -> nn.Sequential:
    """The layers of torch that it stands for."""
    weight_in, bias_in, weight_out = leaves[1:]
    first, second = nn.Linear(*weight_in.shape[::-1]), nn.Linear(*weight_out.shape[::-1], bias=False)
    first.weight, first.bias, second.weight = (nn.Parameter(t.detach()) for t in (weight_in, bias_in, weight_out))
    return nn.Sequential(first, nn.GELU(), second)


def output_and_gradients(function: Any, leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


@pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 7), (2, 3, 24)], ids=str)
def test_the_definition_is_that_of_torch_in_float64(shape: tuple[int, ...]) -> None:
    leaves = [t.double().requires_grad_() for t in inputs(*shape)]
    upstream = torch.randn(*shape[:-1], 20, dtype=torch.float64)
    expected = output_and_gradients(lambda *t: F.linear(F.gelu(F.linear(*t[:3])), t[3]), leaves, upstream)
    found = output_and_gradients(feed_forward_reference, leaves, upstream)
    for name, one, other in zip(("y", *NAMES), expected, found, strict=True):
        assert_close_rel(name, one, other, 1e-13)


def test_without_a_gpu_it_is_the_three_layers_of_torch() -> None:
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in inputs(2, 5, 24)]
        layers, upstream = modules(leaves), torch.randn(2, 5, 20, dtype=dtype)
        y = layers(leaves[0])
        expected = [y, *torch.autograd.grad(y, [leaves[0], *layers.parameters()], upstream)]
        for backend in ("auto", "torch"):
            found = output_and_gradients(
                lambda *t, backend=backend: feed_forward(*t, backend=backend), leaves, upstream
            )
            assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    x, weight_in, _, weight_out = inputs(2, 5, 24)
    without = feed_forward(x, weight_in, None, weight_out)
    assert torch.equal(without, F.linear(F.gelu(F.linear(x, weight_in)), weight_out))


def test_the_reference_has_gradients_and_takes_no_bias() -> None:
    x, weight_in, _, weight_out = (t.double().requires_grad_() for t in inputs(3, 24))
    expected = F.linear(F.gelu(F.linear(x, weight_in)), weight_out)
    assert_close_rel("y", expected, feed_forward(x, weight_in, None, weight_out, backend="reference"), 1e-13)


def test_autocast_casts_as_the_layers_do() -> None:
    leaves = [t.requires_grad_() for t in inputs(2, 5, 24)]
    layers, upstream = modules(leaves), torch.randn(2, 5, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, found = layers(leaves[0]), feed_forward(*leaves)
        of_16_bits = feed_forward(leaves[0].bfloat16(), *leaves[1:])
        assert feed_forward(*leaves, backend="reference").dtype == torch.bfloat16
    assert found.dtype == torch.bfloat16 and torch.equal(found, y) and torch.equal(of_16_bits, y)
    gradients = torch.autograd.grad(found, leaves, upstream.bfloat16())
    expected = torch.autograd.grad(y, [leaves[0], *layers.parameters()], upstream.bfloat16())
    for one, other in zip(expected, gradients, strict=True):
        assert other.dtype == torch.float32 and torch.equal(one, other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert feed_forward(*(t.double() for t in leaves)).dtype == torch.float64, "as F.linear"


def test_the_torch_engine_can_be_differentiated_twice() -> None:
    leaves = [t.double().requires_grad_() for t in inputs(3, 4, hidden=5, out=2)]
    assert torch.autograd.gradgradcheck(feed_forward, leaves)


def test_nothing_in_nothing_out() -> None:
    _, *parameters = (t.requires_grad_() for t in inputs(3, 24))
    y = feed_forward(torch.empty(2, 0, 24), *parameters)
    y.sum().backward()
    assert y.shape == (2, 0, 20)
    assert all(p.grad is not None and not p.grad.any() for p in parameters)


def test_wrong_arguments_are_named() -> None:
    x, weight_in, bias_in, weight_out = inputs(3, 24)
    with pytest.raises(ValueError, match=r"weight_in must be \[H, 24\] beside x \[3, 24\], is \[24, 48\]"):
        feed_forward(x, weight_in.t(), bias_in, weight_out)
    with pytest.raises(ValueError, match=r"weight_in must be \[H, 24\]"):
        feed_forward(x, bias_in, bias_in, weight_out)
    with pytest.raises(ValueError, match=r"bias_in must be \[48\] beside weight_in, is \[47\]"):
        feed_forward(x, weight_in, bias_in[1:], weight_out)
    with pytest.raises(ValueError, match=r"weight_out must be \[D, 48\] beside weight_in, is \[48, 20\]"):
        feed_forward(x, weight_in, bias_in, weight_out.t())
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., C\], is a scalar"):
        feed_forward(x[0, 0], weight_in, bias_in, weight_out)
    with pytest.raises(TypeError, match=r"bias_in must be a floating tensor, is torch\.int64"):
        feed_forward(x, weight_in, bias_in.long(), weight_out)
    with pytest.raises(TypeError, match=r"must have one dtype without autocast, have .*'weight_out': torch\.bfloat16"):
        feed_forward(x, weight_in, bias_in, weight_out.bfloat16())
    with pytest.raises(ValueError, match="weight_out is on meta, x on cpu"):
        feed_forward(x, weight_in, bias_in, weight_out.to("meta"))
    with pytest.raises(ValueError, match=r"backend must be one of auto, triton, torch, reference, is 'cuda'"):
        feed_forward(x, weight_in, bias_in, weight_out, backend="cuda")
    with pytest.raises(ValueError, match=r"cannot be used: x is torch\.float64"):
        feed_forward(*(t.double() for t in (x, weight_in, bias_in, weight_out)), backend="triton")


def test_triton_on_a_cpu_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"on a CPU set TRITON_INTERPRET=1 before the first import"):
        feed_forward(*inputs(2, 3), backend="triton")
