"""GELU of a LayerNorm: the torch engine and the definition, on any machine; see also test_layer_norm_gelu_triton.py."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastclap.kernels import layer_norm_gelu as module
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
    with pytest.raises(ValueError, match=f"rows have {module.WIDEST + 1} values, more than {module.WIDEST}"):
        layer_norm_gelu(torch.zeros(1, module.WIDEST + 1), backend="triton")


def test_triton_on_a_cpu_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"on a CPU set TRITON_INTERPRET=1 before the first import"):
        layer_norm_gelu(torch.zeros(2, 3), backend="triton")
