"""Stages of the lot `smoke`: the ceilings, every kernel form once, and the positional convolution of WavLM.

Failures are rows like all others; none of them ends the lot, and a table at the end of a stage lists them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench import compare, timing
from bench.gpu.forms import FORMS, KernelForm
from bench.reference_step import deterministic_cudnn
from bench.run import Row, Run, dtype_name
from bench.tables import markdown
from fastclap.testing import relative_error

WORSE = 4.0  # times the error of plain torch that a kernel may have where that is above the rounding
FORM_SECONDS = 30.0
# Relative error of the positional convolution; in float32 cuDNN multiplies in TF32.
CONVOLUTION_ROUNDING = {torch.float32: 2e-3, torch.bfloat16: 1e-2}


def ceilings(run: Run) -> None:
    """The rates of one large product and one large copy."""
    compare.ceilings(run)


def kernels(run: Run) -> None:
    """Every form against float64, and two runs of it bit for bit."""
    for form in FORMS:
        case = {"form": form.name, "dtype": dtype_name(form.dtype)}
        run.measure(case, functools.partial(_checked, form, run.device, run.engine), FORM_SECONDS)
    _print_failures(run, "form")


def _checked(form: KernelForm, device: torch.device, engine: str) -> Row:
    """Figures of one form."""
    inputs = form.inputs(device)
    expected, plain = form.reference(inputs), form.plain(inputs)
    found, again = form.ours(inputs, engine), form.ours(inputs, engine)
    if found.keys() != expected.keys():
        raise ValueError(f"the kernel gives {sorted(found)}, the reference {sorted(expected)}")
    errors, errors_of_torch = _errors(expected, found), _errors(expected, plain)
    close = all(error <= max(form.rounding, WORSE * errors_of_torch[name]) for name, error in errors.items())
    repeats = all(torch.equal(x, again[name]) for name, x in found.items())  # a NaN differs from itself
    return {
        "passed": close and repeats,
        "errors": errors,
        "errors_of_torch": errors_of_torch,
        "rounding": form.rounding,
        "repeats": repeats,
    }


def _errors(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(f"{relative_error(x, found[name]):.3g}") for name, x in expected.items()}


def _print_failures(run: Run, kind: str) -> None:
    """Prints how many of this run's cases of a kind passed, and a table of those that did not."""
    rows = [row for row in run.record.rows() if kind in row["case"]]
    failed = [row for row in rows if "reason" in row or row.get("passed") is False]
    print(f"{len(rows) - len(failed)} of {len(rows)} well", flush=True)
    if failed:
        print(markdown([kind, "what is wrong"], [[str(row["case"][kind]), _wrong(row)] for row in failed]), flush=True)


def _wrong(row: Row) -> str:
    if "reason" in row:
        return row["reason"]
    limits = {name: max(row["rounding"], WORSE * error) for name, error in row.get("errors_of_torch", {}).items()}
    beyond = [
        f"{name} {error:.3g} above {limits.get(name, row['rounding']):.3g}"
        for name, error in row["errors"].items()
        if not error <= limits.get(name, row["rounding"])
    ]
    return ", ".join([*beyond, *["two runs differ"] * (row.get("repeats") is False)])


# ---------------------------------------------------------------------------------------------------------------------
# the positional convolution


@dataclass(frozen=True)
class ConvolutionSizes:
    channels: int
    kernel: int
    groups: int
    batch: int
    frames: int
    seconds: float  # of the timed loop of one case


GPU = ConvolutionSizes(channels=1024, kernel=128, groups=16, batch=32, frames=499, seconds=0.5)
CPU = ConvolutionSizes(channels=32, kernel=16, groups=4, batch=2, frames=29, seconds=0.02)
CHECKED_BATCH = 2


def positions(run: Run) -> None:
    """WavLM's grouped convolution over 128 frames, by cuDNN: its errors, and its times in bf16.

    None of it is ours, but cuDNN may be slow enough at it to matter more than any kernel that is.
    """
    sizes = CPU if run.tiny else GPU
    for dtype in (torch.float32, torch.bfloat16):
        case = {"positions": "errors", "dtype": dtype_name(dtype), "batch": CHECKED_BATCH, "frames": sizes.frames}
        run.measure(case, functools.partial(_convolution_errors, run, sizes, dtype), FORM_SECONDS)
    for deterministic in (False, True):
        for passes in ("forward", "backward"):
            case = {"positions": "times", "dtype": "bfloat16", "batch": sizes.batch, "frames": sizes.frames}
            case |= {"cudnn_deterministic": deterministic, "passes": passes}
            times = functools.partial(_convolution_times, run, sizes, passes, deterministic)
            run.measure(case, times, FORM_SECONDS)
    _print_failures(run, "positions")


def _convolution(run: Run, sizes: ConvolutionSizes) -> nn.Module:
    from transformers import WavLMConfig
    from transformers.models.wavlm.modeling_wavlm import WavLMPositionalConvEmbedding

    config = WavLMConfig(
        hidden_size=sizes.channels,
        num_conv_pos_embeddings=sizes.kernel,
        num_conv_pos_embedding_groups=sizes.groups,
    )
    torch.manual_seed(0)
    return WavLMPositionalConvEmbedding(config).to(run.device)


def _forward_of(
    module: nn.Module, run: Run, sizes: ConvolutionSizes, batch: int, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], dict[str, Tensor], Tensor]:
    """The forward pass in a dtype (bfloat16 by autocast, as in training), its leaves, and an upstream gradient."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, sizes.frames, sizes.channels)
    x, upstream = (torch.randn(shape, generator=generator).to(run.device) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = x.to(wide).requires_grad_()

    def forward() -> Tensor:
        with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return module(x)

    return forward, {"x": x, **dict(module.named_parameters())}, upstream


def _convolution_errors(run: Run, sizes: ConvolutionSizes, dtype: torch.dtype) -> Row:
    def both(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        forward, leaves, upstream = _forward_of(module, run, sizes, CHECKED_BATCH, dtype)
        names = ("output", *(f"d{name.split('.')[-1]}" for name in leaves))
        found = timing.output_and_gradients(lambda *_: forward(), list(leaves.values()), upstream)
        return dict(zip(names, found, strict=True))

    module = _convolution(run, sizes)
    errors = _errors(both(copy.deepcopy(module).double(), torch.float64), both(module, dtype))
    rounding = CONVOLUTION_ROUNDING[dtype]
    return {"passed": all(error <= rounding for error in errors.values()), "errors": errors, "rounding": rounding}


def _convolution_times(run: Run, sizes: ConvolutionSizes, passes: str, deterministic: bool) -> Row:
    forward, leaves, upstream = _forward_of(_convolution(run, sizes), run, sizes, sizes.batch, torch.bfloat16)
    with deterministic_cudnn(deterministic):
        out = forward()
        upstream = upstream.to(out.dtype)

        def backward() -> Any:
            return torch.autograd.grad(out, list(leaves.values()), upstream, retain_graph=True)

        call: Callable[[], Any] = forward if passes == "forward" else backward
        call()
        return timing.interleaved({passes: call}, run.device, sizes.seconds)[passes].as_dict()
