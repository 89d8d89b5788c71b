"""Log-mel front-ends side by side: fastclap and every library that has one, on this machine.

    pytest bench/test_logmel.py --benchmark-only --benchmark-group-by=group -rs

Four front-ends (Whisper's 80 mels, Kaldi's 80, CLSP's 128, LAION-CLAP's 64 at 48 kHz), with float32 samples and
features and with int16 samples and bf16 features; ours also in the two mixtures. The forms, and what each leaves out,
are those of `bench.kernel_peers`; one that is not there is skipped with the reason (`-rs`). On a GPU 1024 clips of
10 s, on a CPU 8; FASTCLAP_BENCH_CLIPS, FASTCLAP_BENCH_SECONDS, FASTCLAP_BENCH_DEVICE and FASTCLAP_BENCH_ROUNDS change
that. Before every timed round another form of the group runs, in turn, so that all see the same machine; a call on a
GPU ends with a synchronisation. The `extra_info` of `--benchmark-json` has `ms_per_clip`, the median over the
number of clips; `least_bytes`, samples in and features out; `bytes_per_second`, that over the median; and the relative
error against float64 of the forms that compute the same features.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import timing
from bench.kernel_peers import FRONT_ENDS, log_mel_forms
from bench.peers import Peer
from fastclap.kernels.log_mel.spec import LogMelSpec
from fastclap.kernels.log_mel.torch_engine import log_mel_reference
from fastclap.testing import relative_error

DEVICE = torch.device(os.environ.get("FASTCLAP_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "cpu"))
ON_GPU = DEVICE.type == "cuda"
CLIPS = int(os.environ.get("FASTCLAP_BENCH_CLIPS", "1024" if ON_GPU else "8"))
SECONDS = float(os.environ.get("FASTCLAP_BENCH_SECONDS", "10"))
ROUNDS = int(os.environ.get("FASTCLAP_BENCH_ROUNDS", "15" if ON_GPU else "5"))
WARM_UP_SECONDS = 60.0
CPU = torch.device("cpu")
# Ours by the rounding of the features; of the others only that they do the same work, some of it in TF32.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
SAME_WORK = 2e-2
DTYPES = [(torch.float32, torch.float32), (torch.int16, torch.bfloat16)]
MIXED = [(torch.float32, torch.bfloat16), (torch.int16, torch.float32)]

Case = tuple[str, torch.dtype, torch.dtype]
CASES: list[tuple[Case, str]] = [
    ((name, audio, features), peer.name)
    for audio, features in (*DTYPES, *MIXED)
    for name, spec in FRONT_ENDS.items()
    for peer, _ in log_mel_forms(spec, CPU, audio, features, ours_only=(audio, features) in MIXED)
]


def samples(spec: LogMelSpec, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(0)
    wave = 0.1 * torch.randn(CLIPS, int(SECONDS * spec.sampling_rate), generator=generator, device=DEVICE)
    return (wave * 32768).clamp_(-32768, 32767).to(torch.int16) if dtype == torch.int16 else wave


Ready = tuple[Peer, LogMelSpec | None, Callable[[], Tensor] | None, str | None]


@functools.lru_cache(maxsize=1)  # the tests of one case follow each other
def prepared(case: Case) -> tuple[Tensor, dict[str, Ready]]:
    """The batch, and by form what it computes and its call, warmed up; or in words why there is none."""
    name, audio, features = case
    spec = FRONT_ENDS[name]
    clips = samples(spec, audio)
    found: dict[str, Ready] = {}
    for peer, computed in log_mel_forms(spec, DEVICE, audio, features, ours_only=(audio, features) in MIXED):
        call, reason = None, peer.notes
        if peer.run is not None:
            call = functools.partial(peer.run, clips)
            _, failed = timing.attempt(call, WARM_UP_SECONDS)
            call, reason = (None, failed) if failed else (call, "")
        found[peer.name] = (peer, computed, call, reason)
    return clips, found


@pytest.mark.parametrize(
    ("case", "form"), CASES, ids=[f"{n}-{a}-to-{f}-{form}".replace("torch.", "") for (n, a, f), form in CASES]
)
def test_log_mel(benchmark: Any, case: Case, form: str) -> None:
    name, audio, features = case
    clips, forms = prepared(case)
    peer, computed, call, reason = forms[form]
    if call is None or peer.run is None:
        pytest.skip(f"{form}: {reason}")
    benchmark.group = f"{name}, {CLIPS} clips of {SECONDS:g} s, {audio} to {features}".replace("torch.", "")
    others = itertools.cycle([other for key, (*_, other, _) in forms.items() if key != form and other] or [call])

    def finished(run: Callable[[], Tensor]) -> Tensor:
        value = run()
        if ON_GPU:
            torch.cuda.synchronize()
        return value

    def another() -> None:
        finished(next(others))

    result = benchmark.pedantic(finished, (call,), setup=another, rounds=ROUNDS)
    least = clips.numel() * audio.itemsize + result.numel() * features.itemsize
    benchmark.extra_info.update(timing.machine(DEVICE), form=form, notes=peer.notes, least_bytes=least)
    if benchmark.stats is not None:  # --benchmark-disable runs each form once, without a clock
        benchmark.extra_info["ms_per_clip"] = 1e3 * benchmark.stats.stats.median / CLIPS
        benchmark.extra_info["bytes_per_second"] = least / benchmark.stats.stats.median
    assert result.dtype == features and result.shape[::2] == (CLIPS, FRONT_ENDS[name].n_mels)
    if computed is not None:
        expected = log_mel_reference(clips[:1].cpu(), None, computed)[0]
        frames = min(expected.shape[1], result.shape[1])  # some have one more
        error = relative_error(expected[:, :frames], result[:1, :frames])
        benchmark.extra_info["error"] = error
        assert error < (TOLERANCE[features] if form.startswith("fastclap") else SAME_WORK)
