"""The memory-bound kernels of the waveform towers compared with their peers, on this machine.

    pytest --benchmark-only --benchmark-group-by=group -rs bench/test_towers_kernels.py

GELU of a LayerNorm, forward and backward, on the rows that the convolutions of WavLM make of a batch, the same together
with the first of these convolutions, and the normalised waveform of int16 clips. On a GPU bf16 and 16 clips of 10 s:
0.5 GB a tensor in the first layer, which no cache holds, and 8 MB in the last, which one may. On a CPU tiny float32
sizes, and "fastclap" is torch's own functions: where the two differ there, it is the machine. FASTCLAP_BENCH_DEVICE,
_CLIPS, _SECONDS and _ROUNDS change all that.

Before every timed round of a form another form of the group runs, in turn; a call on a GPU ends with a synchronisation.
`least_bytes` in the `extra_info` is what the fused form has to move at least, `bytes_per_second` that over the
median. A peer that is not there is skipped with the reason (`-rs`).
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import timing
from fastclap.kernels.layer_norm_gelu import layer_norm_gelu, layer_norm_gelu_reference
from fastclap.kernels.waveform import normalize_waveform, normalize_waveform_reference
from fastclap.kernels.waveform_convolution import (
    waveform_convolution,
    waveform_convolution_reference,
    window_products,
)
from fastclap.models.layers import length_mask, masked_mean, prepare_waveform
from fastclap.testing import assert_close_rel

DEVICE = torch.device(os.environ.get("FASTCLAP_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "cpu"))
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
CLIPS = int(os.environ.get("FASTCLAP_BENCH_CLIPS", "16" if ON_GPU else "1"))
SECONDS = float(os.environ.get("FASTCLAP_BENCH_SECONDS", "10" if ON_GPU else "0.5"))
ROUNDS = int(os.environ.get("FASTCLAP_BENCH_ROUNDS", "15"))
SAMPLES = int(16000 * SECONDS)
CHANNELS = 512
# Rows a clip of the first, second and last layer of WavLM's convolutions.
ROWS = tuple(CLIPS * (SAMPLES // stride) for stride in (5, 10, 320))
NO_GPU = None if ON_GPU else "needs a GPU"
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}

Form = Callable[..., Tensor]


def measure(benchmark: Any, forms: dict[str, Callable[[], Tensor]], form: str, least_bytes: int) -> Tensor:
    """The form's result; before every timed round another form of the group runs, in turn."""
    others = itertools.cycle([call for name, call in forms.items() if name != form] or [forms[form]])

    def finished(call: Callable[[], Tensor]) -> Tensor:
        value = call()
        if ON_GPU:
            torch.cuda.synchronize()
        return value

    def setup() -> None:
        finished(next(others))

    for call in forms.values():  # compilation
        finished(call)
    value = benchmark.pedantic(lambda: finished(forms[form]), setup=setup, rounds=ROUNDS)
    benchmark.extra_info.update(timing.machine(DEVICE), least_bytes=least_bytes)
    if benchmark.stats is not None:  # --benchmark-disable runs each form once, without a clock
        benchmark.extra_info["bytes_per_second"] = least_bytes / benchmark.stats.stats.median
    return value


# ---------------------------------------------------------------------------------------------------------------------
# GELU of a LayerNorm
# ---------------------------------------------------------------------------------------------------------------------


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias))


def liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return F.gelu(LigerLayerNormFunction.apply(x, weight, bias, 1e-5))


LIGER = NO_GPU or (None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed")
PAIRS: dict[str, tuple[str | None, Callable[[], Form]]] = {
    "fastclap": (None, lambda: layer_norm_gelu),
    "torch eager": (None, lambda: eager),
    "torch.compile": (NO_GPU, lambda: torch.compile(eager, dynamic=False)),
    "liger-kernel, then gelu": (LIGER, lambda: liger),
}


def both_ways(function: Form, leaves: list[Tensor], upstream: Tensor) -> Callable[[], Tensor]:
    """A call of forward and backward that returns all results, flat."""

    def call() -> Tensor:
        y = function(*leaves)
        return torch.cat([t.flatten()[:4096] for t in (y, *torch.autograd.grad(y, leaves, upstream))])

    return call


@pytest.mark.parametrize("form", PAIRS)
@pytest.mark.parametrize("rows", ROWS)
def test_layer_norm_gelu_forward_and_backward(benchmark: Any, form: str, rows: int) -> None:
    if PAIRS[form][0]:
        pytest.skip(f"{form}: {PAIRS[form][0]}")
    benchmark.group = f"gelu(layer_norm), {rows} × {CHANNELS}, {DTYPE}"
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, upstream = (torch.randn(rows, CHANNELS, device=DEVICE, generator=generator).to(DTYPE) for _ in range(2))
    parameters = torch.randn(2, CHANNELS, device=DEVICE, generator=generator).to(DTYPE)
    leaves = [x.requires_grad_(), *(p.clone().requires_grad_() for p in parameters)]
    forms = {name: both_ways(make(), leaves, upstream) for name, (reason, make) in PAIRS.items() if not reason}
    # forward reads x and writes y; backward reads both and writes dx
    found = measure(benchmark, forms, form, 5 * x.numel() * DTYPE.itemsize)
    head = [x.detach()[:8].double(), *(p.double() for p in parameters)]
    expected = layer_norm_gelu_reference(head[0], head[1], head[2])
    assert_close_rel(form, expected.flatten(), found[:4096], TOLERANCE[DTYPE])


# ---------------------------------------------------------------------------------------------------------------------
# The waveform's convolution, LayerNorm and GELU
# ---------------------------------------------------------------------------------------------------------------------

KERNEL, STRIDE = 10, 5


def conv1d(waveform: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    return eager(F.conv1d(waveform[:, None], weight, stride=STRIDE).transpose(1, 2), norm_weight, norm_bias)


def gemm_of_windows(waveform: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    rows = (waveform.shape[1] - KERNEL) // STRIDE + 1
    x = window_products(waveform, weight, None, STRIDE, rows)
    return layer_norm_gelu(x, norm_weight, norm_bias).unflatten(0, (len(waveform), rows))


def convolution(waveform: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    return waveform_convolution(waveform, weight, None, norm_weight, norm_bias, STRIDE)


CONVOLUTIONS: dict[str, tuple[str | None, Callable[[], Form]]] = {
    "fastclap": (None, lambda: convolution),
    "GEMM, then layer_norm_gelu": (None, lambda: gemm_of_windows),
    "torch eager": (None, lambda: conv1d),
    "torch.compile": (NO_GPU, lambda: torch.compile(conv1d, dynamic=False)),
}


@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_waveform_convolution_forward_and_backward(benchmark: Any, form: str) -> None:
    if CONVOLUTIONS[form][0]:
        pytest.skip(f"{form}: {CONVOLUTIONS[form][0]}")
    benchmark.group = f"gelu(layer_norm(conv1d)), {CLIPS} × {SAMPLES} to {CHANNELS} channels, {DTYPE}"
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator).to(DTYPE)

    waveform, upstream = normal(CLIPS, SAMPLES), normal(CLIPS, (SAMPLES - KERNEL) // STRIDE + 1, CHANNELS)
    leaves = [x.requires_grad_() for x in (normal(CHANNELS, 1, KERNEL), normal(CHANNELS), normal(CHANNELS))]
    forms = {
        name: both_ways(functools.partial(make(), waveform), leaves, upstream)
        for name, (reason, make) in CONVOLUTIONS.items()
        if not reason
    }
    # forward writes y, backward reads its gradient; both read the samples
    least = 2 * (upstream.numel() + waveform.numel()) * DTYPE.itemsize
    found = measure(benchmark, forms, form, least)
    exact = [x.detach().double() for x in (waveform[:1, : 8 * STRIDE + KERNEL], *leaves)]
    expected = waveform_convolution_reference(exact[0], exact[1], None, exact[2], exact[3], STRIDE, 8)
    assert_close_rel(form, expected.flatten(), found[:4096], TOLERANCE[DTYPE])


# ---------------------------------------------------------------------------------------------------------------------
# Waveforms
# ---------------------------------------------------------------------------------------------------------------------


def step_by_step(audio: Tensor, lengths: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    """One torch function after another, the result in the first layer's dtype."""
    waveform, padded = prepare_waveform(audio, lengths)
    assert padded is not None
    mask = length_mask(padded, waveform.shape[1])
    if mean is None or std is None:
        mean = masked_mean(waveform[..., None], mask).squeeze(1)
        std = masked_mean((waveform - mean[:, None]).square()[..., None], mask).squeeze(1).sqrt()
    waveform = (waveform - mean[:, None]) / (std[:, None].square() + 1e-7).sqrt()
    return waveform.masked_fill(~mask, 0.0).to(DTYPE)


WAVEFORMS: dict[str, tuple[str | None, Callable[[], Form]]] = {
    "fastclap": (None, lambda: lambda *t: normalize_waveform(*t, dtype=DTYPE)),
    "torch eager": (None, lambda: step_by_step),
    "torch.compile": (NO_GPU, lambda: torch.compile(step_by_step, dynamic=False)),
}


@pytest.mark.parametrize("form", WAVEFORMS)
@pytest.mark.parametrize("statistics", ("given", "measured"))
def test_normalize_waveform(benchmark: Any, form: str, statistics: str) -> None:
    if WAVEFORMS[form][0]:
        pytest.skip(f"{form}: {WAVEFORMS[form][0]}")
    clips = 32 * CLIPS if ON_GPU else CLIPS  # samples are few compared with what the convolutions make of them
    benchmark.group = f"normalised waveform, {clips} × {SAMPLES} int16 to {DTYPE}, statistics {statistics}"
    generator = torch.Generator(DEVICE).manual_seed(0)
    audio = (3000 * torch.randn(clips, SAMPLES, device=DEVICE, generator=generator)).to(torch.int16)
    lengths = torch.linspace(SAMPLES // 2, SAMPLES, clips, device=DEVICE).long()
    given = torch.full((clips,), 0.1, device=DEVICE) if statistics == "given" else None
    inputs = (audio, lengths, given, given)
    forms: dict[str, Callable[[], Tensor]] = {}
    for name, (reason, make) in WAVEFORMS.items():
        if not reason:
            function = make()
            forms[name] = lambda function=function: function(*inputs)  # type: ignore[misc]
    least = audio.numel() * (2 * (1 if given is not None else 2) + DTYPE.itemsize)
    found = measure(benchmark, forms, form, least)
    first = [None if t is None else t[:1].cpu() for t in inputs]
    expected = normalize_waveform_reference(*first)  # type: ignore[arg-type]
    assert_close_rel(form, expected, found[:1], TOLERANCE[DTYPE])
