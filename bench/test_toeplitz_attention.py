r"""Gated-Toeplitz attention, forward and backward: ours compared with what else computes it, on this machine.

    pytest --benchmark-only --benchmark-group-by=group -rs bench/test_toeplitz_attention.py
    FASTCLAP_BENCH_BATCH=256 FASTCLAP_BENCH_FRAMES=499 pytest --benchmark-only -rs bench/test_toeplitz_attention.py

The forms: fastclap (the engine that "auto" takes); scaled_dot_product_attention with the bias written out as its mask;
FlexAttention with the bias as its score_mod, compiled (GPU only); and what transformers' WavLM calls,
F.multi_head_attention_forward with the bias repeated over the batch and need_weights=True, between identity projections
whose cost is therefore included. On a GPU WavLM-Large's 16 heads of 64 with 499 frames (10 s), bf16, with and without
dropout; on a CPU tiny float32 sizes. FASTCLAP_BENCH_BATCH, _FRAMES, _HEADS, _DEVICE, _DTYPE and _ROUNDS change that.
Before every timed round another form runs, in turn, so that all see the same machine; inputs rotate over two sets; a
call on a GPU ends with a synchronisation. Memory and the error of each form against float64 at a small size are in the
`extra_info` of `--benchmark-json`. A form that runs out of memory or is not available is skipped with that reason.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import timing
from fastclap.kernels.toeplitz_attention import (
    gated_toeplitz_attention,
    gated_toeplitz_attention_reference,
    toeplitz,
)
from fastclap.testing import relative_error

DEVICE = torch.device(os.environ.get("FASTCLAP_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "cpu"))
ON_GPU = DEVICE.type == "cuda"
DTYPE = getattr(torch, os.environ.get("FASTCLAP_BENCH_DTYPE", "bfloat16" if ON_GPU else "float32"))
ROUNDS = int(os.environ.get("FASTCLAP_BENCH_ROUNDS", "7" if ON_GPU else "5"))
BATCHES = [int(n) for n in os.environ.get("FASTCLAP_BENCH_BATCH", "32,128" if ON_GPU else "2").split(",")]
FRAMES = [int(n) for n in os.environ.get("FASTCLAP_BENCH_FRAMES", "499" if ON_GPU else "49").split(",")]
HEADS = int(os.environ.get("FASTCLAP_BENCH_HEADS", "16" if ON_GPU else "4"))
WIDTH = 64
NAMES = ("q", "k", "v", "table", "gate")

Inputs = tuple[Tensor, ...]  # q, k, v, table, gate
Form = Callable[[Inputs, float], Tensor]


def fastclap(x: Inputs, dropout: float) -> Tensor:
    return gated_toeplitz_attention(*x, dropout=dropout)


def written_out_mask(x: Inputs, dropout: float) -> Tensor:
    return gated_toeplitz_attention(*x, dropout=dropout, backend="torch")


@functools.cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attention(x: Inputs, dropout: float) -> Tensor:
    if dropout:
        pytest.skip("FlexAttention: it has no dropout")
    if not ON_GPU:
        pytest.skip("FlexAttention: its backward pass needs a GPU")
    q, k, v, table, gate = x
    last = q.shape[2] - 1

    def bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + gate[b, h, i] * table[h, j - i + last]

    return compiled_flex_attention()(q, k, v, score_mod=bias)


def multi_head_attention(x: Inputs, dropout: float) -> Tensor:
    """As transformers' WavLM calls it: the bias repeated over the batch, averaged weights returned."""
    q, k, v, table, gate = x
    batch, heads, frames, width = q.shape
    bias = toeplitz(table)[None].repeat(batch, 1, 1, 1).view(batch * heads, frames, frames)
    bias = gate.reshape(batch * heads, frames, 1) * bias
    identity = torch.eye(heads * width, dtype=q.dtype, device=q.device)
    query, key, value = (y.permute(2, 0, 1, 3).reshape(frames, batch, heads * width) for y in (q, k, v))
    out, _ = F.multi_head_attention_forward(
        query, key, value, heads * width, heads, None, torch.zeros(3 * heads * width, dtype=q.dtype, device=q.device),
        None, None, False, dropout, identity, None, training=True, need_weights=True, attn_mask=bias.to(q.dtype),
        use_separate_proj_weight=True, q_proj_weight=identity, k_proj_weight=identity, v_proj_weight=identity,
    )  # fmt: skip
    return out.view(frames, batch, heads, width).permute(1, 2, 0, 3)


FORMS: dict[str, Form] = {
    "fastclap": fastclap,
    "SDPA, bias written out": written_out_mask,
    "FlexAttention": flex_attention,
    "multi_head_attention_forward": multi_head_attention,
}


def inputs(batch: int, frames: int, seed: int) -> Inputs:
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE)

    q, k, v = (normal(batch, frames, HEADS, WIDTH).to(DTYPE).transpose(1, 2) for _ in range(3))
    leaves = (q, k, v, normal(HEADS, 2 * frames - 1), 1 + normal(batch, HEADS, frames))
    return tuple(leaf.requires_grad_() for leaf in leaves)


def errors(form: Form) -> dict[str, float]:
    """Of the output and every gradient, against float64 on the same rounded inputs."""
    x = inputs(2, 37, 7)
    upstream = torch.randn(2, HEADS, 37, WIDTH, device=DEVICE).to(DTYPE)
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in x)
    expected = gated_toeplitz_attention_reference(*exact)
    out = form(x, 0.0)
    pairs = zip(
        ("output", *NAMES),
        (expected, *torch.autograd.grad(expected, exact, upstream.double())),
        (out, *torch.autograd.grad(out, x, upstream)),
        strict=True,
    )
    return {name: float(f"{relative_error(reference, value):.2g}") for name, reference, value in pairs}


@functools.lru_cache(maxsize=1)  # the tests of one size follow each other
def calls(batch: int, frames: int, dropout: float) -> dict[str, Callable[[], Tensor] | str]:
    """Every form's forward and backward pass, warmed up; or in words why there is none."""
    sets = [inputs(batch, frames, seed) for seed in range(2)]
    found: dict[str, Callable[[], Tensor] | str] = {}
    for name, form in FORMS.items():

        def loss(*x: Tensor, form: Form = form) -> Tensor:
            return form(x, dropout).float().square().mean()

        call = timing.forward_backward(loss, sets)
        try:
            _, reason = timing.attempt(call, 180.0)
        except pytest.skip.Exception as skipped:
            reason = skipped.msg
        found[name] = reason or call
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dropout", (0.0, 0.1), ids=("no dropout", "dropout"))
@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("batch", BATCHES)
def test_gated_toeplitz_attention(benchmark: Any, batch: int, frames: int, dropout: float, form: str) -> None:
    every = calls(batch, frames, dropout)
    measured = every[form]
    if isinstance(measured, str):
        pytest.skip(f"{form}: {measured}")
    benchmark.group = f"gated-Toeplitz attention, B = {batch}, T = {frames}, dropout {dropout}"
    others = itertools.cycle([c for name, c in every.items() if name != form and not isinstance(c, str)] or [measured])

    def another() -> None:
        next(others)()
        if ON_GPU:
            torch.cuda.synchronize()

    def call() -> Tensor:
        value = measured()
        if ON_GPU:
            torch.cuda.synchronize()
        return value

    value = benchmark.pedantic(call, setup=another, rounds=ROUNDS)
    found = errors(FORMS[form])
    benchmark.extra_info.update(timing.machine(DEVICE), form=form, errors=found)
    benchmark.extra_info["peak_bytes"] = timing.peak_bytes(measured, DEVICE)
    if benchmark.stats is not None:  # --benchmark-disable runs each form once, without a clock
        flops = 3.5 * 4 * batch * HEADS * frames**2 * WIDTH  # two products forward, five backward
        benchmark.extra_info["useful_tflops"] = flops / benchmark.stats.stats.median / 1e12
    assert value.isfinite()
    # Written-out biases are rounded to the dtype; all compute the same function.
    assert max(found.values()) < (5e-2 if DTYPE.itemsize == 2 else 1e-4)
