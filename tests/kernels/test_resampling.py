"""Down- and upsampling: the torch engine, the definition and the checks, on any machine.

See also test_resampling_triton.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastclap.kernels.resampling import (
    downsample,
    downsample_reference,
    upsample_bypass,
    upsample_bypass_reference,
)
from fastclap.testing import assert_close_rel

# Two clips of 7 and 6 rows, in groups of up to 3, and the clip of every row.
FIRST, CLIPS = torch.tensor([0, 3, 6, 7, 10, 13], dtype=torch.int32), torch.tensor([0] * 7 + [1] * 6)


def inputs(columns: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(columns)
    sizes = {"x": (13, columns), "weights": (3,), "low": (5, columns), "scale": (columns,), "by_clip": (2, columns)}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def test_the_published_modules_compute_the_same_of_each_clip(icefall: Any) -> None:
    t = inputs(8)
    down, up = icefall.zipformer2.SimpleDownsample(8, 3, 0.0).eval(), icefall.zipformer2.SimpleUpsample(8, 3)
    skip = icefall.zipformer2.BypassModule(8).eval()
    down.bias.data, skip.bypass_scale.data = t["weights"].clone(), t["scale"].clone()
    weights = t["weights"].softmax(0)
    low, high = downsample(t["x"], weights, FIRST), upsample_bypass(t["x"], t["low"], t["scale"], FIRST)
    for rows, groups in ((slice(0, 7), slice(0, 3)), (slice(7, 13), slice(3, 5))):
        assert_close_rel("down", down(t["x"][rows][:, None])[:, 0], low[groups], 1e-6)
        before = t["x"][rows][:, None]
        wanted = skip(before, up(t["low"][groups][:, None])[: len(before)])
        assert_close_rel("up", wanted[:, 0], high[rows], 1e-6)


def test_it_is_the_formula_of_each_group() -> None:
    t = {name: tensor.double() for name, tensor in inputs().items()}
    for backend, first in (("auto", FIRST), ("torch", FIRST.long()), ("reference", FIRST)):
        low = downsample(t["x"], t["weights"], first, backend=backend)
        high = upsample_bypass(t["x"], t["low"], t["scale"], first, backend=backend)
        by_clip = upsample_bypass(t["x"], t["low"], t["by_clip"], first, CLIPS, backend=backend)
        for group in range(5):
            begin, end = FIRST[group], FIRST[group + 1]
            wanted = sum(t["weights"][k] * t["x"][min(begin + k, end - 1)] for k in range(3))
            assert_close_rel("down", torch.as_tensor(wanted), low[group], 1e-14)
            for row in range(begin, end):
                before, scale = t["x"][row], t["by_clip"][CLIPS[row]]
                assert_close_rel("up", before * (1 - t["scale"]) + t["low"][group] * t["scale"], high[row], 1e-14)
                assert_close_rel("of clips", before * (1 - scale) + t["low"][group] * scale, by_clip[row], 1e-14)


def test_gradients_of_the_definition_and_of_the_torch_engine() -> None:
    t = {name: tensor.double().requires_grad_() for name, tensor in inputs(2).items()}
    for down, up in ((downsample_reference, upsample_bypass_reference), (downsample, upsample_bypass)):
        assert torch.autograd.gradcheck(lambda *s, down=down: down(*s, FIRST), (t["x"], t["weights"]))
        assert torch.autograd.gradcheck(lambda *s, up=up: up(*s, FIRST), (t["x"], t["low"], t["scale"]))
        assert torch.autograd.gradcheck(lambda *s, up=up: up(*s, FIRST, CLIPS), (t["x"], t["low"], t["by_clip"]))


def test_dtypes_autocast_and_nothing() -> None:
    t = inputs()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            low = downsample(t["x"].bfloat16(), t["weights"], FIRST)
            high = upsample_bypass(t["x"], t["low"].bfloat16(), t["scale"], FIRST)
        assert torch.equal(low, downsample(t["x"].bfloat16().float(), t["weights"], FIRST).bfloat16())
        assert torch.equal(high, upsample_bypass(t["x"], t["low"].bfloat16().float(), t["scale"], FIRST))
    none = torch.zeros(1, dtype=torch.int32)
    assert downsample(t["x"][:0], t["weights"], none).shape == (0, 4)
    assert upsample_bypass(t["x"][:0], t["low"][:0], t["scale"], none).shape == (0, 4)


def test_wrong_arguments_are_named() -> None:
    t = inputs()
    x, weights, low, scale = t["x"], t["weights"], t["low"], t["scale"]

    def refused(error: type[Exception], match: str, function: Any, *arguments: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            function(*arguments, **options)

    refused(ValueError, r"x must be \[R, C\] and weights \[S\], are \[4\] and \[3\]", downsample, x[0], weights, FIRST)
    refused(ValueError, r"x must be .*and weights \[S\], are", downsample, x, x, FIRST)
    refused(TypeError, "first must be int32 or int64", downsample, x, weights, FIRST.float())
    refused(ValueError, "first must be of one dimension", downsample, x, weights, FIRST[None])
    refused(ValueError, r"first must be \[D \+ 1\].*then 13, is 1 long", downsample, x, weights, FIRST[:1])
    refused(ValueError, "weights is on meta, x on cpu", downsample, x, weights.to("meta"), FIRST)
    refused(
        ValueError, r"cannot be used: x is torch\.float64", downsample, x.double(), weights, FIRST, backend="triton"
    )
    refused(ValueError, r"x must be \[5, 4\] beside original \[13, 4\]", upsample_bypass, x, low[1:], scale, FIRST)
    refused(ValueError, r"scale must be \[4\]", upsample_bypass, x, low, scale[1:], FIRST)
    refused(ValueError, "is one for each clip: give sequence", upsample_bypass, x, low, t["by_clip"], FIRST)
    refused(ValueError, r"sequence must be \[13\] beside original", upsample_bypass, x, low, scale, FIRST, CLIPS[1:])
    refused(ValueError, r"original must be \[R, C\]", upsample_bypass, x[0], low, scale, FIRST)
    refused(
        ValueError,
        "cannot be used: scale is one for each clip",
        *(upsample_bypass, x, low, t["by_clip"], FIRST, CLIPS),
        backend="triton",
    )


def test_triton_on_a_cpu_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    t = inputs()
    with pytest.raises(ValueError, match=r"on a CPU set TRITON_INTERPRET=1 before the first import"):
        downsample(t["x"], t["weights"], FIRST, backend="triton")
