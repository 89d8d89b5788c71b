"""What the CUDA log-mel engine has besides its features (`test_gpu_engines`): machine code, banks, memory, tables."""

from __future__ import annotations

import dataclasses
import subprocess
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import cuda_on_cpu
from fastclap.features import PRESETS
from fastclap.kernels import cuda_tools, offline
from fastclap.kernels.log_mel import cuda_engine
from fastclap.kernels.log_mel.cuda_engine import Layout, mel_runs
from fastclap.kernels.log_mel.operator import log_mel
from fastclap.kernels.log_mel.spec import LogMelSpec, mel_bank
from fastclap.kernels.log_mel.torch_engine import log_mel_reference
from fastclap.testing import assert_close_rel

MUSIC = LogMelSpec(44100, 2048, 2048, 512, 128)
SPECS = {**PRESETS, "2048": MUSIC}
every_spec = pytest.mark.parametrize("name", SPECS)
needs_compiler = pytest.mark.skipif(cuda_tools.why_no_compiler() is not None, reason=str(cuda_tools.why_no_compiler()))
needs_gcc = pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="there is no g++")


def layout(spec: LogMelSpec) -> Layout:
    found = cuda_engine.layout(spec)
    assert isinstance(found, Layout)
    return found


@needs_compiler
@pytest.mark.parametrize("arch", offline.ARCHITECTURES)
@every_spec
def test_compiles_without_spills_for_the_blocks_that_it_plans(name: str, arch: int) -> None:
    spec = SPECS[name]
    for dtype, masks in ((torch.float32, False), (torch.int16, True)):
        code = cuda_engine.cubin(spec, dtype, masks, arch)
        usage = offline._resource_usage(code, "log_mel")
        found = layout(spec)
        assert usage["STACK"] + usage["LOCAL"] == 0, usage
        registers = -(-usage["REG"] * 32 // 256) * 256 * found.threads // 32
        assert found.blocks * registers <= offline.REGISTERS_OF_SM
        assert found.shared_bytes + offline.SHARED_RESERVED <= offline.SHARED_OF_SM[arch]


def lines(addresses: Iterable[int], bits: int) -> int:
    """Wavefronts of one access of a warp: 32, 16 or 8 lanes at a time, as many as have most words in one bank."""
    at, width = list(addresses), bits // 32
    together = 32 // width
    total = 0
    for first in range(0, len(at), together):
        words = {x + i for x in at[first : first + together] for i in range(width)}
        total += max(Counter(word % 32 for word in words).values())
    return total


@every_spec
def test_lanes_keep_out_of_each_others_banks(name: str) -> None:
    spec = SPECS[name]
    found = layout(spec)
    frames, group, warp = found.frames, found.group, range(32)
    hop = spec.hop_length + found.pad
    groups = frames // group
    for first in range(0, found.r2 * groups, 32):
        lanes = [(task % groups, task // groups) for task in range(first, min(first + 32, found.r2 * groups))]
        # A slice of samples; in and out of the exchange; the even and odd halves of row 0.
        assert lines([g * group * hop + n2 for g, n2 in lanes], 32) == 1
        assert lines([2 * (g * group * found.frame_stride + n2) for g, n2 in lanes], 64) == -(-len(lanes) // 16)
        assert lines([2 * g * group * found.frame_stride + n2 for g, n2 in lanes], 32) == 1
    lanes = [(lane % frames, lane // frames) for lane in warp]
    assert lines([2 * (f * found.frame_stride + row * found.row_stride) for f, row in lanes], 64) == 2
    assert lines([row * frames + f for f, row in lanes], 32) == 1  # powers of neighbouring bins
    mels, quarters = mel_runs(spec, frames), frames // 4
    firsts = mels.firsts - mels.low
    met = [
        lines(
            [firsts[warp_ * (32 // quarters) + lane // quarters] * frames + lane % quarters * 4 for lane in warp], 128
        )
        for warp_ in range(len(mels.runs))
    ]
    # Only where a run would begin below bin 0 do lanes meet.
    assert min(met) == 4 and sum(met) <= 4 * len(met) + 4


@every_spec
def test_runs_of_mels_are_the_bank(name: str) -> None:
    spec = SPECS[name]
    bank = mel_bank(spec)
    mels = mel_runs(spec, layout(spec).frames)
    together = 128 // layout(spec).frames
    found = np.zeros((mels.high, len(mels.firsts)))
    weights = mels.weights.reshape(-1, 4)
    for mel, first in enumerate(mels.firsts):
        start, count = mels.runs[mel // together]
        for four in range(count // 4):
            found[first + 4 * four : first + 4 * four + 4, mel] += weights[start + four * together + mel % together]
    assert np.array_equal(found[: len(bank), : spec.n_mels], bank[: mels.high])
    assert not found[len(bank) :].any() and not found[:, spec.n_mels :].any()
    assert mels.low == mels.firsts.min() and mels.high >= np.flatnonzero(bank.any(1)).max() + 1


@needs_compiler
def test_forms_that_differ_in_numbers_alone_are_one_kernel() -> None:
    spec = PRESETS["kaldi"]
    other = dataclasses.replace(spec, mean=3.0, std=2.0, floor=1e-5, input_scale=2.0, num_frames=17)
    assert cuda_engine.options(spec, torch.float32, False) == cuda_engine.options(other, torch.float32, False)


def test_what_it_does_not_cover() -> None:
    for change, reason in (
        ({"n_fft": 512 * 7, "win_length": 400}, "whose prime factors are 2, 3 and 5"),
        ({"n_fft": 4096}, "is no product of an even number up to 64 and one up to 40"),
        ({"floor": 1e-40}, "no normal float32"),
        ({"hop_length": 100_000}, "do not fit shared memory"),
    ):
        found = cuda_engine.layout(dataclasses.replace(PRESETS["kaldi"], **change))  # type: ignore[arg-type]
        assert isinstance(found, str) and reason in found
    smooth = [n for n in range(256, 2049, 2) if not set(_primes(n)) - {2, 3, 5}]
    covered = [n for n in smooth if isinstance(cuda_engine.layout(LogMelSpec(16000, n, n, 160, 80)), Layout)]
    assert covered == smooth


def _primes(n: int) -> list[int]:
    return [p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, p))]


def random_case(seed: int) -> tuple[LogMelSpec, Tensor, dict[str, Any]]:
    """Any front-end, clips, lengths, offsets and masks; the waveform is a view that begins and ends anywhere."""
    rng = np.random.default_rng(seed)
    n_fft = int(rng.choice([48, 64, 100, 128, 160, 240, 256]))
    win = int(rng.integers(2, n_fft + 1))
    options: dict[str, Any] = {
        "framing": str(rng.choice(["center", "snip_edges", "no_snip_edges"])),
        "remove_dc": bool(rng.integers(2)),
        "preemphasis": float(rng.choice([0.0, 0.97])),
        "power": float(rng.choice([1.0, 2.0])),
        "dynamic_range": None if rng.integers(2) else 3.0,
        "num_frames": None if rng.integers(2) else int(rng.integers(1, 40)),
        "dtype": str(rng.choice(["float32", "float16", "bfloat16"])),
        "floor": 1e-6,
    }
    hop = int(rng.choice([rng.integers(1, 2 * n_fft), 4 * rng.integers(1, n_fft // 4 + 1)]))
    spec = LogMelSpec(16000, n_fft, win, hop, int(rng.integers(1, 40)), **options)
    clips, samples = int(rng.integers(1, 5)), int(rng.integers(1, 20 * hop + 2 * n_fft))
    lead, stride = int(rng.integers(0, 9)), samples + int(rng.integers(0, 5))
    generator = torch.Generator().manual_seed(seed)
    if rng.integers(2):
        memory = torch.randint(-20000, 20000, (lead + clips * stride,), generator=generator, dtype=torch.int16)
    else:
        memory = torch.randn(lead + clips * stride, generator=generator)
    waveform = memory[lead:].view(clips, stride)[:, :samples]
    given: dict[str, Any] = {"lengths": None}
    if rng.integers(2):
        given["offsets"] = torch.from_numpy(rng.integers(0, samples + 1, clips))
    if rng.integers(2):
        room = samples - given.get("offsets", torch.zeros(clips, dtype=torch.int64))
        given["lengths"] = (torch.from_numpy(rng.random(clips)) * (room + 1)).long()
    if rng.integers(2):
        spans = torch.from_numpy(rng.integers(0, 20, (2, clips, 2, 2)))
        given["masks"] = (spans[0], spans[1] if rng.integers(2) else None)
    return spec, waveform, given


@needs_gcc
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.parametrize("seed", range(6))
def test_memory_and_barriers_at_random_shapes(seed: int, sanitizer: str) -> None:
    spec, waveform, given = random_case(seed)
    with cuda_on_cpu.installed(sanitizer):
        features, frames = log_mel(waveform, spec=spec, backend="cuda", **given)
    expected, expected_frames = log_mel(waveform, spec=spec, backend="torch", **given)
    assert torch.equal(frames, expected_frames)
    tolerance = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 2e-2}[spec.dtype]
    assert_close_rel("features", expected.double(), features.double(), tolerance)


@needs_gcc
def test_sanitizers_see_a_fault(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A kernel that reads one sample too many, and one without a barrier."""
    source = cuda_engine.SOURCE.read_text()
    faults = {
        "address,undefined": ("begin + SAMPLES <= clip.length", "begin + SAMPLES <= clip.length + 4"),
        "thread": (
            "        second_step(exchange, powers);\n        __syncthreads();",
            "        second_step(exchange, powers);",
        ),
    }
    spec = LogMelSpec(16000, 64, 64, 32, 10)
    samples = 31 * 32 + 28  # the last frame of the second tile ends 4 samples after the clip
    for sanitizer, (right, wrong) in faults.items():
        assert source.count(right) == 1
        broken = cuda_on_cpu.broken_source(source.replace(right, wrong))
        monkeypatch.setattr(cuda_on_cpu, "EMULATOR", broken)
        with cuda_on_cpu.installed(sanitizer), pytest.raises(subprocess.CalledProcessError):
            log_mel(torch.randn(1, samples), None, spec, backend="cuda")
        assert "Sanitizer" in capfd.readouterr().err


@needs_gcc
def test_a_long_clip_and_many_clips() -> None:
    spec = dataclasses.replace(PRESETS["whisper"], n_mels=20)
    waveform = 0.1 * torch.randn(1, 400_000, generator=torch.Generator().manual_seed(0))
    with cuda_on_cpu.installed():
        features, _ = log_mel(waveform, None, spec, backend="cuda")
        expected, _ = log_mel(waveform, None, spec, backend="torch")
        assert_close_rel("features", expected, features, 1e-5)
        clips = waveform[:, :390_000].view(300, 1300)
        features, _ = log_mel(clips, None, spec, backend="cuda")
    assert_close_rel("features", log_mel_reference(clips, None, spec)[0], features, 1e-5)
