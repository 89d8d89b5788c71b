"""LayerNorm of a residual stream: the torch engine, the definition, the mask and the checks, on any machine.

See also test_residual_layer_norm_triton.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastclap.kernels.dispatch import WIDEST_NORM
from fastclap.kernels.residual_layer_norm import dropout_mask, residual_layer_norm, residual_layer_norm_reference
from fastclap.testing import assert_close_rel

NAMES = ("x", "branch", "branch_bias", "weight", "bias")


def inputs(*shape: int) -> list[torch.Tensor]:
    """In the order of `NAMES`."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, branch = torch.randn(2, *shape, generator=generator)
    return [2 * x + 1, branch, *torch.randn(3, shape[-1], generator=generator)]


def test_the_definition_is_that_of_torch_in_float64() -> None:
    for shape in ((1, 3), (3, 7), (2, 5, 100)):
        leaves = [t.double().requires_grad_() for t in inputs(*shape)]
        x, branch, branch_bias, weight, bias = leaves
        keep = torch.rand(shape) >= 0.25
        total = x + (branch + branch_bias) * keep / 0.75
        expected = (total, F.layer_norm(total, shape[-1:], weight, bias, 1e-3))
        found = residual_layer_norm_reference(*leaves, 1e-3, dropout=0.25, keep=keep)
        upstream = torch.randn(2, *shape, dtype=torch.float64).unbind()
        for name, one, other in zip(("total", "norm"), expected, found, strict=True):
            assert_close_rel(f"{name}, {shape}", one, other, 1e-14)
        gradients = (torch.autograd.grad(pair, leaves, upstream) for pair in (expected, found))
        for name, one, other in zip(NAMES, *gradients, strict=True):
            assert_close_rel(f"gradient of {name}, {shape}", one, other, 1e-12)


def test_without_a_gpu_it_is_what_torch_makes_of_it() -> None:
    x, branch, branch_bias, weight, bias = inputs(2, 5, 24)
    for backend, dropout in itertools.product(("auto", "torch"), (0.0, 0.25)):
        torch.manual_seed(1)
        expected = x + F.dropout(branch + branch_bias, dropout)
        torch.manual_seed(1)
        total, y = residual_layer_norm(x, branch, branch_bias, weight, bias, 0.1, dropout=dropout, backend=backend)
        assert torch.equal(total, expected) and torch.equal(y, F.layer_norm(expected, (24,), weight, bias, 0.1))
    total, y = residual_layer_norm(x, branch, None, weight, bias)
    assert torch.equal(total, x + branch) and torch.equal(y, F.layer_norm(x + branch, (24,), weight, bias))


@pytest.mark.parametrize("backend", ("auto", "torch", "reference"))
def test_without_a_branch_total_is_x_itself_and_nothing_is_dropped(backend: str) -> None:
    x, _, _, weight, bias = inputs(3, 24)
    total, y = residual_layer_norm(x, None, None, weight, bias, dropout=0.5, backend=backend)
    assert total is x
    assert_close_rel("norm", F.layer_norm(x, (24,), weight, bias), y, 1e-6)


def test_the_reference_draws_its_dropout_from_the_generator() -> None:
    tensors = inputs(50, 24)
    torch.manual_seed(1)
    total, _ = residual_layer_norm(*tensors, dropout=0.25, backend="reference")
    torch.manual_seed(1)
    again, _ = residual_layer_norm(*tensors, dropout=0.25, backend="torch")
    assert torch.equal(total, again) and (total == tensors[0]).any()


def test_dtypes_of_the_results() -> None:
    x, branch, branch_bias, weight, bias = inputs(3, 24)
    bf16, fp16, fp64 = torch.bfloat16, torch.float16, torch.float64
    for backend in ("auto", "reference"):

        def dtypes(x: torch.Tensor, backend: str = backend, **options: Any) -> tuple[torch.dtype, torch.dtype]:
            total, y = residual_layer_norm(x, branch.bfloat16(), branch_bias, weight, bias, backend=backend, **options)
            return total.dtype, y.dtype

        assert dtypes(x) == (torch.float32, torch.float32)
        assert dtypes(x, dtype=fp16) == (torch.float32, fp16)
        assert dtypes(x.bfloat16()) == (bf16, bf16)
        assert dtypes(x.bfloat16(), dtype=torch.float32) == (bf16, torch.float32)
        assert dtypes(x.double()) == (fp64, fp64)
        with torch.autocast("cpu", dtype=bf16):
            assert dtypes(x) == (torch.float32, bf16)
            assert dtypes(x, dtype=torch.float32) == (torch.float32, torch.float32)
            assert dtypes(x.double()) == (fp64, fp64)


def test_arithmetic_is_in_float32_whatever_the_dtypes() -> None:
    """Only what is given is rounded, under autocast too."""
    x, branch, branch_bias, weight, bias = inputs(40, 24)
    low = branch.bfloat16()
    total = x + (low.float() + branch_bias)
    norm = F.layer_norm(total, (24,), weight, bias)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = residual_layer_norm(x, low, branch_bias, weight, bias, dtype=torch.bfloat16)
        assert torch.equal(found[0], total) and torch.equal(found[1], norm.bfloat16())
    rounded = total.bfloat16()
    wide = residual_layer_norm(total.bfloat16(), None, None, weight, bias, dtype=torch.float32)[1]
    assert torch.equal(wide, F.layer_norm(rounded.float(), (24,), weight, bias))


def test_no_values_give_no_values() -> None:
    leaves = [t.requires_grad_() for t in (torch.empty(0, 24), torch.empty(0, 24), *torch.ones(3, 24))]
    total, y = residual_layer_norm(*leaves, dropout=0.1)
    (total.sum() + y.sum()).backward()
    assert total.shape == y.shape == (0, 24)
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("dropout", (0.1, 0.5))
def test_the_mask_is_as_independent_draws(dropout: float) -> None:
    """Rate, and correlations between neighbours at several distances, as normal scores."""
    rows, columns, seed = 1000, 500, torch.tensor([0x1234_5678_9ABC_DEF])
    keep = dropout_mask(seed, rows, columns, dropout)
    x = (keep.double() - (1 - dropout)) / (dropout * (1 - dropout)) ** 0.5
    products = {"rate": x}
    for down, right in itertools.product((0, 1, 2, 7, 8, 64), (0, 1, 2, 3, 4, 8, 64, 128)):
        if down or right:
            products[f"{down} rows, {right} columns"] = x[down:, right:] * x[: rows - down, : columns - right]
    for name, values in products.items():
        score = values.sum() / values.numel() ** 0.5
        # A rate of k / 2^16 differs from the one asked for by up to 2^-17.
        assert abs(score) < 5, f"{name}: {score:.1f}"
    for axis, size in ((1, columns), (0, rows)):
        assert abs(x.sum(axis).var() / size - 1) < 0.2
    assert torch.equal(dropout_mask(seed, rows // 2, columns // 2, dropout), keep[: rows // 2, : columns // 2])
    other = dropout_mask(seed + 1, rows, columns, dropout)
    score = (x * (other.double() - (1 - dropout)) / (dropout * (1 - dropout)) ** 0.5).sum() / x.numel() ** 0.5
    assert abs(score) < 5, "between seeds"


def test_wrong_arguments_are_named() -> None:
    x, branch, branch_bias, weight, bias = inputs(3, 24)

    def refused(error: type[Exception], match: str, *tensors: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            residual_layer_norm(*tensors, **options)

    refused(ValueError, r"weight must be \[24\] beside x \[3, 24\], is \[23\]", x, None, None, weight[1:], bias)
    refused(ValueError, r"bias must be \[24\]", x, None, None, weight, bias[:1])
    refused(ValueError, r"branch must be \[3, 24\] beside x \[3, 24\], is \[2, 24\]", x, branch[1:], None, weight, bias)
    refused(ValueError, r"branch_bias must be \[24\] beside", x, branch, branch_bias[:3], weight, bias)
    refused(ValueError, "branch_bias is given without a branch", x, None, branch_bias, weight, bias)
    refused(TypeError, r"bias must be a floating tensor, is torch\.int64", x, None, None, weight, bias.long())
    refused(TypeError, r"branch must be a floating tensor, is torch\.int64", x, branch.long(), None, weight, bias)
    refused(ValueError, "x must be a floating tensor", x.long(), None, None, weight, bias)
    refused(ValueError, "x must be a floating tensor", x[0, 0], None, None, weight, bias)
    refused(ValueError, "weight is on meta, x on cpu", x, None, None, weight.to("meta"), bias)
    refused(TypeError, r"dtype must be a floating dtype, is torch\.int32", x, None, None, weight, bias, dtype=torch.int)
    for dropout in (1.0, -0.1):
        refused(ValueError, r"dropout must be in \[0, 1\), is", x, branch, None, weight, bias, dropout=dropout)
    refused(ValueError, r"backend must be one of .*, is 'cuda'", x, None, None, weight, bias, backend="cuda")
    triton = {"backend": "triton"}
    refused(ValueError, r"cannot be used: x is torch\.float64", x.double(), None, None, weight, bias, **triton)
    refused(ValueError, r"branch is torch\.float64", x, branch.double(), None, weight, bias, **triton)
    refused(ValueError, r"the norm would be torch\.float64", x, None, None, weight, bias, dtype=torch.double, **triton)
    wide = torch.zeros(1, WIDEST_NORM + 1)
    refused(ValueError, f"more than {WIDEST_NORM}", wide, None, None, wide[0], wide[0], **triton)


def test_triton_on_a_cpu_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"on a CPU set TRITON_INTERPRET=1 before the first import"):
        residual_layer_norm(torch.zeros(2, 3), None, None, torch.ones(3), torch.ones(3), backend="triton")
