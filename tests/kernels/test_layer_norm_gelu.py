"""GELU of a LayerNorm: the torch engine and the definition, on any machine; see also test_layer_norm_gelu_triton.py."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from fastclap.kernels.dispatch import WIDEST_NORM
from fastclap.kernels.layer_norm_gelu import layer_norm_gelu, layer_norm_gelu_reference
from fastclap.testing import assert_close_rel


def inputs(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = 2 * torch.randn(shape, generator=generator) + 1
    return [x, *torch.randn(2, shape[-1], generator=generator)]


def test_the_definition_is_that_of_torch_in_float64() -> None:
    for shape in ((1, 3), (3, 7), (2, 5, 100)):
        leaves = [t.double().requires_grad_() for t in inputs(*shape)]
        x, weight, bias = leaves
        expected = F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias, 1e-3))
        y = layer_norm_gelu_reference(x, weight, bias, 1e-3)
        assert_close_rel("y", expected, y, 1e-14)
        upstream = torch.randn_like(y)
        for name, one, other in zip(
            ("x", "weight", "bias"),
            torch.autograd.grad(expected, leaves, upstream),
            torch.autograd.grad(y, leaves, upstream),
            strict=True,
        ):
            assert_close_rel(f"gradient of {name}, {shape}", one, other, 1e-12)


def test_without_a_gpu_it_is_the_pair_of_torch_functions() -> None:
    x, weight, bias = inputs(2, 5, 24)
    for w, b in itertools.product((weight, None), (bias, None)):
        assert torch.equal(layer_norm_gelu(x, w, b), F.gelu(F.layer_norm(x, (24,), w, b)))
        assert torch.equal(layer_norm_gelu(x, w, b, 0.1, backend="torch"), F.gelu(F.layer_norm(x, (24,), w, b, 0.1)))


def test_float32_parameters_beside_16_bits_and_autocast_keep_the_dtype_of_x() -> None:
    x, weight, bias = inputs(3, 24)
    for dtype in (torch.bfloat16, torch.float16):
        expected = layer_norm_gelu(x.to(dtype).float(), weight, bias).to(dtype)
        assert torch.equal(layer_norm_gelu(x.to(dtype), weight, bias), expected)
        assert layer_norm_gelu(x.to(dtype)).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer_norm_gelu(x, weight, bias), F.gelu(F.layer_norm(x, (24,), weight, bias)))
        assert layer_norm_gelu(x.bfloat16(), weight, bias).dtype == torch.bfloat16


def test_wrong_arguments_are_named() -> None:
    x, weight, bias = inputs(3, 24)
    with pytest.raises(ValueError, match=r"weight must be \[24\] beside x \[3, 24\], is \[23\]"):
        layer_norm_gelu(x, weight[1:], bias, backend="torch")
    with pytest.raises(ValueError, match=r"bias must be \[24\]"):
        layer_norm_gelu(x, weight, bias[:1], backend="torch")
    with pytest.raises(TypeError, match=r"bias must be a floating tensor, is torch\.int64"):
        layer_norm_gelu(x, weight, bias.long(), backend="torch")
    with pytest.raises(ValueError, match="x must be a floating tensor"):
        layer_norm_gelu(x.long(), backend="torch")
    with pytest.raises(ValueError, match="weight is on meta, x on cpu"):
        layer_norm_gelu(x, weight.to("meta"), bias, backend="torch")
    with pytest.raises(ValueError, match=r"backend must be one of auto, triton, torch, reference, is 'cuda'"):
        layer_norm_gelu(x, backend="cuda")
    with pytest.raises(ValueError, match=r"cannot be used: x is torch\.float64"):
        layer_norm_gelu(x.double(), backend="triton")
    with pytest.raises(ValueError, match=f"rows have {WIDEST_NORM + 1} values, more than {WIDEST_NORM}"):
        layer_norm_gelu(torch.zeros(1, WIDEST_NORM + 1), backend="triton")


def test_triton_on_a_cpu_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"on a CPU set TRITON_INTERPRET=1 before the first import"):
        layer_norm_gelu(torch.zeros(2, 3), backend="triton")


# Up to |z| = 2, 4, 6.5, 9 and 13, relative, as the engine's docstring has them; then of all, absolute.
POLYNOMIAL_ERRORS = {
    "LOG_TAIL": (1.3e-5, 4.2e-5, 7.0e-4, 5.4e-3, 0.22, 2.0e-6),
    "LOG_SLOPE": (5.5e-5, 2.8e-4, 3.5e-3, 3.2e-2, 0.69, 2.8e-5),
    "FINE_LOG_TAIL": (5.0e-7, 2.6e-6, 3.3e-5, 6.7e-4, 4.5e-2, 7.3e-8),
    "FINE_LOG_SLOPE": (3.0e-7, 2.0e-6, 2.5e-5, 2.3e-4, 5.2e-2, 6.9e-8),
}


@pytest.mark.parametrize("name", POLYNOMIAL_ERRORS)
def test_polynomials_of_the_triton_engine_have_the_errors_that_it_states(name: str) -> None:
    engine = pytest.importorskip("fastclap.kernels.layer_norm_gelu_triton")
    a = torch.linspace(0, 13, 4001, dtype=torch.float64).float().double()
    tail = torch.erfc(a * math.sqrt(0.5)) / 2
    slope = tail - a * torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    factor = a if name.endswith("TAIL") else engine.A0 - a
    expected = tail if name.endswith("TAIL") else slope / factor
    exponent = torch.zeros_like(a, dtype=torch.float32)
    for coefficient in getattr(engine, name):  # a multiply-add in float64 is as good as a fused one in float32
        exponent = (exponent.double() * a + torch.tensor(coefficient, dtype=torch.float32).double()).float()
    found = torch.exp2(exponent.double())
    relative, absolute = (found / expected - 1).abs(), ((found - expected) * factor).abs().max()
    *bounds, bound = POLYNOMIAL_ERRORS[name]
    for end, allowed in zip((2, 4, 6.5, 9, 13), bounds, strict=True):
        assert 0.8 * allowed < relative[a <= end].max() < 1.05 * allowed, end
    assert 0.8 * bound < absolute < 1.05 * bound


@pytest.mark.parametrize("name", POLYNOMIAL_ERRORS)
def test_powers_of_two_of_the_triton_engine_fall_and_underflow(name: str) -> None:
    engine = pytest.importorskip("fastclap.kernels.layer_norm_gelu_triton")
    # The slope's fall for ever, as nothing cuts its argument off.
    end = 14.5 if name.endswith("TAIL") else 1e5
    a = torch.cat([torch.linspace(0, 14.5, 4001), torch.linspace(14.5, end, 4001)]).double().unique()
    exponent = torch.zeros_like(a)
    for coefficient in getattr(engine, name):
        exponent = exponent * a + coefficient
    assert (exponent.diff() < 0).all() and (exponent[a >= 14.5] < -150).all(), "float32 is 0 from 2^-150 on"
