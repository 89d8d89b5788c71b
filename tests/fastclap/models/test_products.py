"""Products by oneDNN: as accurate as torch's own, in whatever form they are written, and only where they are meant."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastclap.models import products
from fastclap.testing import assert_close_rel

CPU = torch.device("cpu")

try:
    products._linear(torch.ones(2, 3), torch.ones(4, 3))
except (AttributeError, RuntimeError):
    pytest.skip("this torch has no oneDNN product", allow_module_level=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24)])
def test_linear_layers(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = torch.nn.Linear(24, 10, bias=bias), torch.randn(*shape)
    exact = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    with torch.inference_mode(), products._OneDNN():
        assert_close_rel("layer", exact, layer(x), 1e-6)
        assert_close_rel("of a view", exact[..., :1, :], layer(x[..., :1, :]), 1e-6)


def test_products_of_matrices_and_of_views_with_gaps() -> None:
    x, w = torch.randn(12, 32), torch.randn(9, 40)
    own, rest, bias, start = w[:, :32], w[:, 32:], torch.randn(9), torch.randn(12, 9)
    exact = x.double() @ own.double().t()
    with torch.inference_mode(), products._OneDNN():
        assert_close_rel("@", exact, x @ own.t(), 1e-6)
        assert_close_rel("mm", exact, torch.mm(x, own.t()), 1e-6)
        assert_close_rel("addmm", exact + bias.double(), torch.addmm(bias, x, own.t()), 1e-6)
        assert_close_rel("addmm of a matrix", exact + start.double(), torch.addmm(start, x, own.t()), 1e-6)
        y = start.clone()
        y[1:].addmm_(x[:-1, :8], rest.t())
        assert_close_rel("addmm_", start[1:].double() + x[:-1, :8].double() @ rest.double().t(), y[1:], 1e-6)
        assert torch.equal(y[0], start[0])


def test_what_is_no_float32_product_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("should have been left alone")

    monkeypatch.setattr(products, "_PRODUCTS", dict.fromkeys(products._PRODUCTS, refuse))
    x, w = torch.randn(4, 6), torch.randn(5, 6)
    with torch.inference_mode(), products._OneDNN():
        assert F.linear(x.double(), w.double()).dtype == torch.float64
        assert F.linear(x.bfloat16(), w.bfloat16()).dtype == torch.bfloat16
        assert F.linear(x[0], w).shape == (5,) and F.linear(x[:0], w).shape == (0, 5)
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(x, w).dtype == torch.bfloat16
        with pytest.raises(AssertionError, match="left alone"):
            F.linear(x, w)


@pytest.mark.parametrize(("vendor", "taken"), [("AuthenticAMD", True), ("GenuineIntel", False), ("", False)])
def test_the_processor_decides(vendor: str, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    products._onednn_is_faster.cache_clear()
    try:
        assert isinstance(products.fast_products(CPU), products._OneDNN) == taken
        assert not isinstance(products.fast_products(torch.device("meta")), products._OneDNN)
    finally:
        products._onednn_is_faster.cache_clear()


def test_a_torch_without_the_operator_multiplies_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(products, "_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(products, "_linear", missing)
    products._onednn_is_faster.cache_clear()
    try:
        assert not isinstance(products.fast_products(CPU), products._OneDNN)
    finally:
        products._onednn_is_faster.cache_clear()
