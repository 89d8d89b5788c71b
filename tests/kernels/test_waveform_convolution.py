"""The waveform's convolution: the torch engine and the definition; see also test_waveform_convolution_triton.py."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.kernels.layer_norm_gelu import layer_norm_gelu
from fastclap.kernels.waveform_convolution import (
    LONGEST_KERNEL,
    WIDEST,
    waveform_convolution,
    waveform_convolution_reference,
)
from fastclap.testing import assert_close_rel
from tests.kernels.waveform_convolution_cases import CASES, NAMES, Case, tensors


def with_gradients(function: Any, inputs: list[Any], upstream: Tensor) -> list[Tensor]:
    """The result, and the gradient of every input that is there."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, [x for x in leaves if x is not None], upstream.to(y.dtype))]


def compare(expected: list[Tensor], found: list[Tensor], inputs: list[Any], tol: float) -> None:
    names = ["y", *(f"gradient of {name}" for name, x in zip(NAMES, inputs, strict=True) if x is not None)]
    for name, one, other in zip(names, expected, found, strict=True):
        assert one.shape == other.shape, name
        assert_close_rel(name, one, other, tol)


@pytest.mark.parametrize("bias", (True, False))
def test_the_definition_is_the_layer_of_transformers_in_float64(bias: bool) -> None:
    from transformers import WavLMConfig
    from transformers.models.wavlm.modeling_wavlm import WavLMLayerNormConvLayer

    config = WavLMConfig(feat_extract_norm="layer", conv_bias=bias)
    layer = WavLMLayerNormConvLayer(config, layer_id=0).double()
    assert layer.conv.weight.shape == (512, 1, 10) and layer.conv.stride == (5,)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    waveform = torch.randn(3, 507, dtype=torch.float64, requires_grad=True)
    leaves = [waveform, layer.conv.weight, layer.conv.bias, layer.layer_norm.weight, layer.layer_norm.bias]
    expected = layer(waveform[:, None]).transpose(1, 2)
    found = waveform_convolution_reference(*leaves, 5, eps=layer.layer_norm.eps)
    upstream, there = torch.randn_like(found), [x for x in leaves if x is not None]
    wanted = [expected, *torch.autograd.grad(expected, there, upstream)]
    compare(wanted, [found, *torch.autograd.grad(found, there, upstream)], leaves, 1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_torch_engine_matches_float64(case: Case) -> None:
    inputs, upstream = tensors(case)
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        given = [None if x is None else x.to(dtype) for x in inputs]
        reference = functools.partial(waveform_convolution, stride=case.stride, rows=case.rows, backend="reference")
        exact = [None if x is None else x.double() for x in given]
        expected = with_gradients(reference, exact, upstream)
        for backend in ("auto", "torch"):
            function = functools.partial(waveform_convolution, stride=case.stride, rows=case.rows, backend=backend)
            compare(expected, with_gradients(function, given, upstream), inputs, tol)


def test_clips_count_as_extended_with_zeros() -> None:
    inputs, _ = tensors(Case(2, 103, 24, 10, 5))
    waveform, *parameters = inputs
    longer = torch.cat([waveform, torch.zeros(2, 200)], 1)
    y = waveform_convolution(longer, *parameters, 5)
    assert y.shape == (2, 59, 24)
    for rows in (1, 19, 20, 40):
        assert_close_rel(str(rows), y[:, :rows], waveform_convolution(waveform, *parameters, 5, rows), 1e-6)
    assert_close_rel("by default", y[:, :19], waveform_convolution(waveform, *parameters, 5), 1e-6)


def test_the_result_has_the_dtype_of_autocast_or_of_the_waveform() -> None:
    inputs, _ = tensors(Case(2, 103, 24, 10, 5))
    waveform, weight, bias, *norm = inputs
    low = waveform_convolution(waveform.bfloat16(), weight.bfloat16(), bias.bfloat16(), *norm, 5)
    assert low.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = waveform_convolution(*inputs, 5)
        assert waveform_convolution(*(x.double() for x in inputs), 5).dtype == torch.float64
        products = F.linear(waveform.unfold(1, 10, 5), weight[:, 0], bias)
        assert_close_rel("the functions that torch has", layer_norm_gelu(products, *norm), cast, 5e-3)
    assert cast.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="must have one dtype without autocast"):
        waveform_convolution(waveform.bfloat16(), weight, bias, *norm, 5)


def test_no_clips_give_no_rows() -> None:
    (waveform, *parameters), _ = tensors(Case(2, 103, 24, 10, 5))
    leaves = [x.requires_grad_() for x in parameters]
    y = waveform_convolution(waveform[:0], *parameters, 5)
    y.sum().backward()
    assert y.shape == (0, 19, 24) and all(x.grad is not None and not x.grad.any() for x in leaves)


def test_wrong_arguments_are_named() -> None:
    inputs, _ = tensors(Case(2, 103, 24, 10, 5))
    given: dict[str, Any] = {**dict(zip(NAMES, inputs, strict=True)), "stride": 5}
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"waveform must be \[batch, samples\], is \[103\]", {"waveform": torch.zeros(103)}),
        (ValueError, r"weight must be \[channels, 1, kernel\], is \[24, 10\]", {"weight": torch.zeros(24, 10)}),
        (ValueError, r"weight must be \[channels, 1, kernel\], is \[24, 2, 10\]", {"weight": torch.zeros(24, 2, 10)}),
        (ValueError, r"bias must be \[24\] beside weight \[24, 1, 10\], is \[23\]", {"bias": torch.zeros(23)}),
        (ValueError, r"norm_weight must be \[24\]", {"norm_weight": torch.zeros(24, 1)}),
        (ValueError, "norm_bias is on meta, waveform on cpu", {"norm_bias": torch.zeros(24, device="meta")}),
        (TypeError, r"waveform must be a floating tensor, is torch\.int16", {"waveform": torch.zeros(2, 103).short()}),
        (TypeError, r"norm_bias must be a floating tensor, is torch\.int64", {"norm_bias": torch.zeros(24).long()}),
        (ValueError, "stride must be at least 1, is 0", {"stride": 0}),
        (ValueError, "103 samples give 0 rows of 10 samples each", {"rows": 0}),
        (ValueError, "9 samples give 0 rows of 10 samples each; pad", {"waveform": torch.zeros(2, 9)}),
        (ValueError, "backend must be one of auto, triton, torch, reference, is 'cuda'", {"backend": "cuda"}),
    ]
    for kind, message, changed in wrong:
        with pytest.raises(kind, match=message):
            waveform_convolution(**{**given, **changed})


def test_what_the_triton_engine_cannot_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, case: Case, change: Any = lambda x: x, grad: bool = False) -> None:
        inputs = [None if x is None else change(x) for x in tensors(case)[0]]
        inputs[0].requires_grad_(grad)
        with pytest.raises(ValueError, match=message):
            waveform_convolution(*inputs, case.stride, backend="triton")

    case = Case(1, 103, 24, 10, 5)
    refused(r"cannot be used: waveform is torch\.float64", case, lambda x: x.double())
    refused(f"there are {WIDEST + 1} channels, more than {WIDEST}", case._replace(channels=WIDEST + 1))
    refused(f"the kernel is {LONGEST_KERNEL + 1} samples long", case._replace(kernel=LONGEST_KERNEL + 1))
    refused("waveform requires a gradient, which the torch engine gives", case, grad=True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused("on a CPU set TRITON_INTERPRET=1 before the first import", case)


def test_modules_and_copies_keep_their_gradients_apart() -> None:
    """The parameters of an nn.Conv1d and an nn.LayerNorm as they are."""
    convolution, norm = torch.nn.Conv1d(1, 24, 10, 5), torch.nn.LayerNorm(24)
    modules = torch.nn.ModuleList([convolution, norm])
    other = copy.deepcopy(modules)
    waveform = torch.randn(2, 103)
    waveform_convolution(waveform, convolution.weight, convolution.bias, norm.weight, norm.bias, 5).sum().backward()
    F.gelu(other[1](other[0](waveform[:, None]).transpose(1, 2))).sum().backward()
    for one, two in zip(modules.parameters(), other.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        assert (one.grad - two.grad).abs().max() < 1e-4
