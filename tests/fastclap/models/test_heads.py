"""Projection heads against their formulas written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastclap.config import HeadConfig
from fastclap.errors import ConfigError
from fastclap.models.heads import build_head


def test_paraspeechclap_head_is_its_formula() -> None:
    torch.manual_seed(0)
    head: Any = build_head(HeadConfig("paraspeechclap", dim=6), 4).double().eval()
    weights = head.state_dict()
    assert set(weights) == {"linear1.weight", "linear2.weight", "layer_norm.weight", "layer_norm.bias"}
    torch.nn.init.normal_(head.layer_norm.weight)
    torch.nn.init.normal_(head.layer_norm.bias)
    x = torch.randn(5, 4, dtype=torch.float64)
    e1 = x @ weights["linear1.weight"].T
    gelu = 0.5 * e1 * (1 + torch.erf(e1 / 2**0.5))
    y = e1 + gelu @ weights["linear2.weight"].T
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(head(x), y * weights["layer_norm.weight"] + weights["layer_norm.bias"])


def test_clsp_head_is_its_formula() -> None:
    torch.manual_seed(0)
    head = build_head(HeadConfig("clsp", dim=6), 4).double().eval()
    weights = head.state_dict()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    assert set(weights) == {
        f"{part}.{kind}"
        for part in ("projection.0", "projection.2", "transform.0", "transform.3")
        for kind in ("weight", "bias")
    }
    x = torch.randn(5, 4, dtype=torch.float64)
    y = linear(linear(x, "projection.0").clamp(min=0), "projection.2")
    torch.testing.assert_close(head(x), linear(linear(y, "transform.0").clamp(min=0), "transform.3"))


def test_laion_head_is_its_formula() -> None:
    torch.manual_seed(0)
    head = build_head(HeadConfig("laion", dim=6), 4).double()
    w = head.state_dict()
    x = torch.randn(5, 4, dtype=torch.float64)
    hidden = (x @ w["linear1.weight"].T + w["linear1.bias"]).clamp(min=0)
    torch.testing.assert_close(head(x), hidden @ w["linear2.weight"].T + w["linear2.bias"])


def test_linear_head_is_a_matrix() -> None:
    head = build_head(HeadConfig("linear", dim=3), 4)
    x = torch.randn(5, 4)
    torch.testing.assert_close(head(x), x @ head.state_dict()["weight"].T)


def test_dropout_is_the_published_one_unless_given() -> None:
    def probability(kind: Any, dropout: float | None) -> float:
        modules = build_head(HeadConfig(kind, dropout=dropout), 4).modules()
        return next(module.p for module in modules if isinstance(module, nn.Dropout))

    assert probability("paraspeechclap", None) == 0.5 and probability("clsp", None) == 0.1
    assert probability("paraspeechclap", 0.0) == 0.0 and probability("clsp", 0.3) == 0.3


def test_unknown_head() -> None:
    with pytest.raises(ConfigError, match="unknown projection head 'mlp'"):
        build_head(HeadConfig("mlp"), 4)  # type: ignore[arg-type]
