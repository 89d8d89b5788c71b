"""The gated convolution: the torch engine, the definition and the checks, on any machine.

See also test_gated_convolution_triton.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.kernels.gated_convolution import gated_convolution, gated_convolution_reference
from fastclap.testing import assert_close_rel

CASES = [((1,), 1), ((5, 1, 0, 9), 5), ((0, 3, 40), 31), ((7, 2), 15)]  # lengths of clips; K, also longer than a clip


def inputs(lengths: tuple[int, ...], taps: int, columns: int = 6) -> tuple[list[Tensor], Tensor]:
    """[u, weight, bias] and starts."""
    generator = torch.Generator().manual_seed(sum(lengths) + taps)
    sizes = ((sum(lengths), 2 * columns), (columns, 1, taps), (columns,))
    ends = torch.tensor(lengths).cumsum(0)
    starts = torch.cat((torch.zeros(1, dtype=torch.long), ends)).int()
    return [torch.randn(size, generator=generator) for size in sizes], starts


def clip_by_clip(u: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor) -> Tensor:
    """torch's convolution of each clip alone."""
    parts = []
    for first, end in itertools.pairwise(starts.tolist()):
        value, gate = u[first:end].t()[None].chunk(2, 1)
        if end > first:
            y = F.conv1d(value * gate.sigmoid(), weight, bias, padding=weight.shape[2] // 2, groups=len(weight))
            parts.append(y[0].t())
    return torch.cat(parts)


@pytest.mark.parametrize(("lengths", "taps"), CASES, ids=str)
def test_both_engines_are_the_convolution_of_each_clip_alone(lengths: tuple[int, ...], taps: int) -> None:
    tensors, starts = inputs(lengths, taps)
    leaves = [t.double().requires_grad_() for t in tensors]
    wanted = clip_by_clip(*leaves, starts)
    upstream = torch.randn_like(wanted)
    for backend, index in itertools.product(("auto", "torch", "reference"), (starts, starts.long())):
        y = gated_convolution(*leaves, index, backend=backend)
        assert_close_rel("y", wanted, y, 1e-13)
        pairs = zip(
            ("u", "weight", "bias"),
            torch.autograd.grad(wanted, leaves, upstream, retain_graph=True),
            torch.autograd.grad(y, leaves, upstream),
            strict=True,
        )
        for name, one, other in pairs:
            assert_close_rel(name, one, other, 1e-12)
        without = gated_convolution(*leaves[:2], None, index, backend=backend)
        assert_close_rel("without bias", wanted - leaves[2], without, 1e-13)


def test_the_published_module_computes_the_same(icefall: Any) -> None:
    """Its padded batch with a mask: what is padded counts as zeros there too."""
    tensors, starts = inputs((9, 4), 5, 8)
    module = icefall.zipformer2.ConvolutionModule(8, 5, causal=False).eval()
    u, weight, bias = tensors
    module.depthwise_conv.weight.data, module.depthwise_conv.bias.data = weight, bias
    module.in_proj.weight.data, module.in_proj.bias.data = torch.eye(16)[:, :8], torch.zeros(16)
    module.in_proj = torch.nn.Identity()
    found: list[Tensor] = []
    module.out_proj = torch.nn.Identity()
    module.depthwise_conv.register_forward_hook(lambda _, __, y: found.append(y))
    padded = torch.nn.utils.rnn.pad_sequence([u[:9], u[9:]])  # [T, B, 2 C]
    mask = torch.arange(9)[None] >= torch.tensor([[9], [4]])
    module(padded, src_key_padding_mask=mask)
    y = found[0].permute(0, 2, 1)  # [B, T, C]
    wanted = torch.cat((y[0, :9], y[1, :4]))
    assert_close_rel("y", wanted, gated_convolution(u, weight, bias, starts), 1e-6)


def test_gradients_of_the_definition_and_of_the_torch_engine() -> None:
    tensors, starts = inputs((3, 1), 3, 2)
    leaves = [t.double().requires_grad_() for t in tensors]
    for function in (gated_convolution_reference, gated_convolution):
        assert torch.autograd.gradcheck(lambda *t, function=function: function(*t, starts), leaves)
        assert torch.autograd.gradgradcheck(lambda *t, function=function: function(*t, starts), leaves)


def test_dtypes_autocast_and_nothing() -> None:
    (u, weight, bias), starts = inputs((5, 9), 5)
    wanted = gated_convolution(u.bfloat16().float(), weight, bias, starts)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert torch.equal(gated_convolution(u.bfloat16(), weight, bias, starts), wanted.bfloat16())
            assert gated_convolution(u, weight.bfloat16(), bias, starts).dtype == torch.float32
    leaves = [u[:0].requires_grad_(), weight.requires_grad_(), bias]
    y = gated_convolution(*leaves, torch.zeros(3, dtype=torch.int32))
    y.sum().backward()
    assert y.shape == (0, 6) and weight.grad is not None and not weight.grad.any()


def test_wrong_arguments_are_named() -> None:
    (u, weight, bias), starts = inputs((5, 9), 5)

    def refused(error: type[Exception], match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            gated_convolution(*arguments, **options)

    refused(ValueError, r"u must be \[R, 2 C\], is \[14, 11\]", u[:, 1:], weight, bias, starts)
    refused(ValueError, r"weight must be \[6, 1, K\] with an odd K .*is \[6, 1, 4\]", u, weight[..., 1:], bias, starts)
    refused(ValueError, r"weight must be \[6, 1, K\] .*is \[6, 5\]", u, weight[:, 0], bias, starts)
    refused(ValueError, r"bias must be \[6\] beside u \[14, 12\], is \[5\]", u, weight, bias[1:], starts)
    refused(TypeError, "starts must be int32 or int64, is torch.float32", u, weight, bias, starts.float())
    refused(ValueError, "starts must be of one dimension beside u", u, weight, bias, starts[None])
    refused(ValueError, r"starts must be \[B \+ 1\].*then 14, is 1 long", u, weight, bias, starts[:1])
    refused(ValueError, "starts is on meta, u on cpu", u, weight, bias, starts.to("meta"))
    refused(TypeError, "u must be a floating tensor", u.long(), weight, bias, starts)
    refused(ValueError, "backend must be one of", u, weight, bias, starts, backend="cuda")
    refused(ValueError, r"cannot be used: u is torch\.float64", u.double(), weight, bias, starts, backend="triton")
    wide = torch.zeros(6, 1, 33)
    refused(ValueError, "a kernel has 33 values, more than 31", u, wide, bias, starts, backend="triton")
    assert gated_convolution(u, wide, bias, starts).shape == (14, 6)


def test_triton_on_a_cpu_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (u, weight, bias), starts = inputs((5, 9), 5)
    with pytest.raises(ValueError, match=r"on a CPU set TRITON_INTERPRET=1 before the first import"):
        gated_convolution(u, weight, bias, starts, backend="triton")
