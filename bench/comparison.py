"""All forms of one loss at one size, on the same inputs: what each needs, how far it is off, and a call to time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import peers, timing

SCALE = 1 / 0.07
Row = dict[str, Any]


class Comparison:
    """Warms every form up alone, which gives its memory and its error, or the reason why it cannot run.

    Args:
        loss: "info_nce" or "sigmoid".
        warm_up_seconds: the most that compiling, tuning and the first call of one form may take.
        left: seconds left to the caller; forms that it is too late for are not started.

    Attributes:
        results: by form, a row of figures for a record.
        calls: by form that runs, one forward and backward pass on the next set of inputs.
        first_ms: by form that runs, the time of its second call.
    """

    def __init__(
        self,
        loss: str,
        rows: int,
        dim: int,
        device: torch.device,
        dtype: torch.dtype,
        warm_up_seconds: float = 60.0,
        left: Callable[[], float] = lambda: math.inf,
    ) -> None:
        if device.type == "cuda":  # where forms are compiled
            torch.compiler.reset()  # or the ninth shape silently runs eagerly
        timing.release()
        self.device = device
        self.results: dict[str, Row] = {}
        self.calls: dict[str, Callable[[], Tensor]] = {}
        self.first_ms: dict[str, float] = {}
        forms = peers.info_nce_peers(device, SCALE) if loss == "info_nce" else peers.sigmoid_peers(device)
        inputs = timing.larger_than_cache(rows, dim, SCALE, device, dtype)
        expected = None
        if rows <= 65536:
            expected, _ = timing.attempt(lambda: peers.reference(loss, *inputs[0]), min(30.0, left()))
        case = {"loss": loss, "rows": rows, "dim": dim, "dtype": dtype_name(dtype), "scale": round(SCALE, 2)}
        for form in forms:
            row = {**case, "peer": form.name, "package": form.package, "version": form.version, "notes": form.notes}
            self.results[form.name] = row
            if form.run is None:
                row["reason"] = "not available"
                continue
            row |= {"passes": form.passes, "scale_gradient": form.scale_gradient}
            if left() < 2:
                row["reason"] = "not reached: no time left"
                continue
            call = timing.forward_backward(form.run, inputs)
            figures, reason = timing.attempt(lambda: self._warm_up(call), min(warm_up_seconds, left()))  # noqa: B023
            if figures is None:
                row["reason"] = reason
                continue
            row["peak_bytes"], self.first_ms[form.name] = figures
            self.calls[form.name] = call
            if expected is not None:
                run, exact = form.run, expected
                row["errors"], reason = timing.attempt(
                    lambda: peers.errors(run, exact, *inputs[0]),  # noqa: B023
                    min(warm_up_seconds, max(1.0, left())),
                )
                if reason:
                    row["errors_reason"] = reason
        del expected
        timing.release()

    def _warm_up(self, call: Callable[[], Tensor]) -> tuple[int | None, float]:
        """Compiles and tunes in one call; the peak and the time of a second."""
        call()
        milliseconds: list[float] = []
        timed = lambda: milliseconds.append(timing.elapsed_ms(call, self.device))  # noqa: E731
        return timing.peak_bytes(timed, self.device), milliseconds[0]


def matmul_rate(n: int, device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[float, timing.Timing]:
    """TFLOP/s of one n×n×n product of random matrices."""
    sets = [[torch.randn(n, n, device=device).to(dtype) for _ in range(2)] for _ in range(2)]
    turn = 0

    def product() -> None:
        nonlocal turn
        turn += 1
        torch.mm(*sets[turn % 2])

    for _ in range(3):
        product()
    figures = timing.interleaved({"matmul": product}, device, seconds, most=100)["matmul"]
    return 2 * n**3 / figures.median_ms / 1e9, figures


def copy_rate(nbytes: int, device: torch.device, seconds: float) -> tuple[float, timing.Timing]:
    """GB/s of one copy of random float32 numbers, read and written."""
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    figures = timing.interleaved({"copy": lambda: target.copy_(source)}, device, seconds, most=50)["copy"]
    return 2 * source.nbytes / figures.median_ms / 1e6, figures


def rates(rows: int, dim: int, median_ms: float, peak_tflops: float | None) -> dict[str, float]:
    """Work over time. T = 2·N²·D flops is one matmul pass; see `bench.gpu.loss` for what 3 and 4 of them are."""
    one_pass = 2e-9 * rows**2 * dim / median_ms  # TFLOP/s
    found = {"useful_tflops": significant(3 * one_pass), "tflops_4t": significant(4 * one_pass)}
    if peak_tflops:
        found["share_of_peak"] = significant(3 * one_pass / peak_tflops)
    return found


def significant(x: float) -> float:
    return float(f"{x:.4g}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
