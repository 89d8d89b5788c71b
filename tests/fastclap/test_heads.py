"""Projection heads against their formulas written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastclap.config import HeadConfig
from fastclap.errors import ConfigError
from fastclap.heads import CLSPHead, ParaSpeechCLAPHead, build_head


def test_paraspeechclap_head_is_its_formula() -> None:
    torch.manual_seed(0)
    head = build_head(HeadConfig("paraspeechclap", dim=6), 4).double().eval()
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


def test_linear_head_is_a_matrix() -> None:
    head = build_head(HeadConfig("linear", dim=3), 4)
    x = torch.randn(5, 4)
    torch.testing.assert_close(head(x), x @ head.state_dict()["weight"].T)


def test_dropout_is_the_published_one_unless_given() -> None:
    assert ParaSpeechCLAPHead(4, 6).dropout.p == 0.5
    assert CLSPHead(4, 6).transform[2].p == 0.1
    assert build_head(HeadConfig("paraspeechclap", dropout=0.0), 4).dropout.p == 0.0
    assert build_head(HeadConfig("clsp", dropout=0.3), 4).transform[2].p == 0.3


def test_unknown_head() -> None:
    with pytest.raises(ConfigError, match="unknown projection head 'mlp'"):
        build_head(HeadConfig("mlp"), 4)  # type: ignore[arg-type]
