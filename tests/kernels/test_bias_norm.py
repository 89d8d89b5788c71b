"""BiasNorm and bypass: the torch engine, the definition and the checks, on any machine.

See also test_bias_norm_triton.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastclap.kernels.bias_norm import bias_norm, bias_norm_reference, bypass, bypass_reference
from fastclap.kernels.rows import WIDEST_BIAS_NORM
from fastclap.testing import assert_close_rel

SEQUENCE = torch.tensor([0, 0, 1, 1, 1, 3, 3])


def inputs(rows: int = 7, columns: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    x, original, branch = torch.randn(3, rows, columns, generator=generator)
    bias, scale = torch.randn(2, columns, generator=generator)
    log_scale, by_clip = torch.randn((), generator=generator), torch.rand(4, columns, generator=generator)
    found = {"x": 2 * x, "original": original, "branch": branch, "bias": bias}
    return {**found, "scale": scale, "log_scale": log_scale, "by_clip": by_clip}


def test_the_published_code_computes_the_same(icefall: Any) -> None:
    t = inputs(7, 24)
    norm = icefall.scaling.BiasNorm(24).eval()
    norm.bias.data, norm.log_scale.data = t["bias"].clone(), t["log_scale"].clone()
    skip = icefall.zipformer2.BypassModule(24).eval()
    skip.bypass_scale.data = t["scale"].clone()
    x, original = (t[name].clone().requires_grad_() for name in ("x", "original"))
    wanted = skip(original[:, None], norm(x[:, None]))[:, 0]
    leaves = [x, original, *(p for name, p in (*norm.named_parameters(), *skip.named_parameters()))]
    upstream = torch.randn(7, 24)
    gradients = torch.autograd.grad(wanted, leaves, upstream)
    parameters = dict(norm.named_parameters())
    y = bias_norm(x, parameters["bias"], parameters["log_scale"], original, skip.bypass_scale)
    assert_close_rel("y", wanted, y, 1e-6)
    for leaf, one, other in zip(leaves, gradients, torch.autograd.grad(y, leaves, upstream), strict=True):
        assert_close_rel(f"gradient of {list(leaf.shape)}", one, other, 3e-6)


def test_gradients_of_the_definition_and_of_the_torch_engine() -> None:
    t = {name: tensor.double().requires_grad_() for name, tensor in inputs(7, 3).items()}
    x, bias, log_scale, original, branch = (t[n] for n in ("x", "bias", "log_scale", "original", "branch"))
    for norm, skip in ((bias_norm_reference, bypass_reference), (bias_norm, bypass)):
        for scale, sequence in ((t["scale"], None), (t["by_clip"], SEQUENCE)):

            def of_both(*t: Tensor, norm: Any = norm, sequence: Tensor | None = sequence) -> Tensor:
                return norm(*t[:5], sequence, t[5])

            def of_bypass(*t: Tensor, skip: Any = skip, sequence: Tensor | None = sequence) -> Tensor:
                return skip(*t[:3], sequence, t[3])

            assert torch.autograd.gradcheck(of_both, (x, bias, log_scale, original, scale, branch))
            assert torch.autograd.gradcheck(of_bypass, (original, x, scale, branch))
        assert torch.autograd.gradgradcheck(norm, (x, bias, log_scale))


def test_it_is_the_formula_of_each_row() -> None:
    t = {name: tensor.double() for name, tensor in inputs().items()}
    for backend in ("auto", "torch", "reference"):
        options = {"backend": backend}
        y = bias_norm(t["x"], t["bias"], t["log_scale"], **options)
        z = bias_norm(t["x"], t["bias"], t["log_scale"], branch=t["branch"], **options)
        skipped = bias_norm(
            t["x"], t["bias"], t["log_scale"], t["original"], t["by_clip"], SEQUENCE, t["branch"], **options
        )
        for row in range(7):
            for found, total in ((y, t["x"][row]), (z, t["x"][row] + t["branch"][row])):
                rms = ((total - t["bias"]) ** 2).mean() ** 0.5
                assert_close_rel("norm", total / rms * t["log_scale"].exp(), found[row], 1e-14)
            before, share = t["original"][row], t["by_clip"][SEQUENCE[row]]
            assert_close_rel("with bypass", before * (1 - share) + z[row] * share, skipped[row], 1e-14)
        plain = bypass(t["original"], t["x"], t["scale"], None, t["branch"], **options)
        wanted = t["original"] * (1 - t["scale"]) + (t["x"] + t["branch"]) * t["scale"]
        assert_close_rel("bypass", wanted, plain, 1e-14)
        with_sequence = bypass(t["original"], t["x"], t["scale"], SEQUENCE, t["branch"], **options)
        assert torch.equal(plain, with_sequence), "one scale for all"


def test_dtypes_of_results_and_arithmetic() -> None:
    t = inputs()
    low = t["branch"].bfloat16()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = bias_norm(t["x"], t["bias"], t["log_scale"], t["original"], t["scale"], None, low)
            of_16_bits = bias_norm(low, t["bias"], t["log_scale"])
            assert y.dtype == torch.float32 and of_16_bits.dtype == torch.bfloat16
            assert bypass(t["original"].double(), t["x"], t["scale"]).dtype == torch.float64
            assert bypass(low, t["x"], t["scale"]).dtype == torch.bfloat16, "that of original"
        wide = bias_norm(t["x"] + low, t["bias"], t["log_scale"], t["original"], t["scale"])
        assert torch.equal(y, wide)
        assert torch.equal(of_16_bits, bias_norm(low.float(), t["bias"], t["log_scale"]).bfloat16())


def test_nothing_in_nothing_out() -> None:
    t = {name: tensor.requires_grad_() for name, tensor in inputs().items()}
    none = torch.empty(0, 6)
    y = bias_norm(none, t["bias"], t["log_scale"], none, t["by_clip"], SEQUENCE[:0])
    y.sum().backward()
    assert y.shape == (0, 6) and not any(t[name].grad.any() for name in ("bias", "log_scale", "by_clip"))


def test_wrong_arguments_are_named() -> None:
    t = inputs()
    x, bias, log_scale, original, scale = (t[n] for n in ("x", "bias", "log_scale", "original", "scale"))

    def refused(error: type[Exception], match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            bias_norm(*arguments, **options)

    refused(ValueError, r"x must be \[R, C\], is \[6\]", x[0], bias, log_scale)
    refused(ValueError, r"log_scale must be a scalar, is \[6\]", x, bias, bias)
    refused(ValueError, r"bias must be \[6\] beside x \[7, 6\], is \[5\]", x, bias[1:], log_scale)
    refused(ValueError, "original and scale go together", x, bias, log_scale, original)
    refused(ValueError, "original and scale go together", x, bias, log_scale, None, scale)
    refused(ValueError, r"original must be \[7, 6\] beside x", x, bias, log_scale, original[1:], scale)
    refused(ValueError, r"branch must be \[7, 6\] beside x", x, bias, log_scale, branch=x[1:])
    refused(ValueError, r"scale must be \[6\] beside x", x, bias, log_scale, original, scale[:2])
    refused(ValueError, r"scale must be \[4, 6\] beside x", x, bias, log_scale, original, t["by_clip"][:, 1:], SEQUENCE)
    refused(ValueError, "is one for each clip: give sequence", x, bias, log_scale, original, t["by_clip"])
    refused(ValueError, r"sequence must be \[7\]", x, bias, log_scale, original, t["by_clip"], SEQUENCE[1:])
    refused(TypeError, "sequence must be int32 or int64", x, bias, log_scale, original, t["by_clip"], SEQUENCE.bool())
    refused(TypeError, r"x must be a floating tensor, is torch\.int64", x.long(), bias, log_scale)
    refused(TypeError, "bias must be a floating tensor", x, bias.long(), log_scale)
    refused(ValueError, "bias is on meta, x on cpu; move it there first", x, bias.to("meta"), log_scale)
    refused(ValueError, "backend must be one of", x, bias, log_scale, backend="cuda")
    refused(ValueError, r"cannot be used: x is torch\.float64", x.double(), bias, log_scale, backend="triton")
    wide = torch.zeros(1, WIDEST_BIAS_NORM + 1)
    refused(ValueError, f"more than {WIDEST_BIAS_NORM}", wide, wide[0], log_scale, backend="triton")
    with pytest.raises(ValueError, match=r"original must be \[7, 6\] beside x \[7, 6\], is \[6, 6\]"):
        bypass(original[1:], x, scale)


def test_triton_on_a_cpu_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"on a CPU set TRITON_INTERPRET=1 before the first import"):
        bypass(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3), backend="triton")
