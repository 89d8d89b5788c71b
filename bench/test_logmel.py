"""Log-mel front-ends side by side: fastclap, torchaudio, transformers.

    OMP_NUM_THREADS=1 pytest bench/test_logmel.py --benchmark-only --benchmark-group-by=group

Every engine gets the same float32 batch of noise and makes the same features: 8 clips of 10 s by default, on the CPU.
FASTCLAP_BENCH_CLIPS, FASTCLAP_BENCH_SECONDS and FASTCLAP_BENCH_DEVICE change that. The figure to read is the minimum or
the median; `ms_per_clip` is the median over the number of clips.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torchaudio
from torch import Tensor
from torchaudio.compliance import kaldi

from fastclap.features import LogMel

CLIPS = int(os.environ.get("FASTCLAP_BENCH_CLIPS", "8"))
SECONDS = float(os.environ.get("FASTCLAP_BENCH_SECONDS", "10"))
DEVICE = torch.device(os.environ.get("FASTCLAP_BENCH_DEVICE", "cpu"))


def waveform(sampling_rate: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(CLIPS, int(SECONDS * sampling_rate), generator=generator).to(DEVICE)


def measure(benchmark, function: Callable[[], Tensor], agreement: Tensor | None = None) -> None:  # type: ignore[no-untyped-def]
    def run() -> Tensor:
        result = function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    result = benchmark.pedantic(run, rounds=15, warmup_rounds=3)
    if benchmark.stats is not None:  # --benchmark-disable runs each engine once, without a clock
        benchmark.extra_info["ms_per_clip"] = 1e3 * benchmark.stats.stats.median / CLIPS
    benchmark.extra_info["device"] = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    if agreement is not None:  # the peer does the same work
        assert (result.to(agreement.device) - agreement).abs().max() < 1e-2


def ours(preset: str, **overrides: object) -> Callable[[], Tensor]:
    front_end = LogMel(preset, **overrides)
    clips = waveform(front_end.sampling_rate)
    return lambda: front_end(clips)[0]


class TestWhisper:
    """16 kHz, n_fft 400, 80 mels."""

    group = pytest.mark.benchmark(group="whisper, 16 kHz, 80 mels")

    @group
    def test_fastclap(self, benchmark) -> None:  # type: ignore[no-untyped-def]
        measure(benchmark, ours("whisper"))

    @group
    def test_fastclap_int16_with_lengths(self, benchmark) -> None:  # type: ignore[no-untyped-def]
        clips = (waveform(16000) * 32768).clamp(-32768, 32767).to(torch.int16)
        lengths = torch.linspace(clips.shape[1] / 2, clips.shape[1], CLIPS).long().to(DEVICE)
        front_end = LogMel("whisper")
        measure(benchmark, lambda: front_end(clips, lengths)[0])

    @group
    def test_transformers(self, benchmark) -> None:  # type: ignore[no-untyped-def]
        from transformers import WhisperFeatureExtractor

        extractor = WhisperFeatureExtractor()
        clips = list(waveform(16000).cpu().numpy())

        def extract() -> Tensor:
            features = extractor(
                clips, sampling_rate=16000, padding="longest", return_tensors="pt", device=DEVICE.type
            ).input_features
            return features.to(DEVICE)

        measure(benchmark, extract, ours("whisper")().mT)


class TestTorchaudio:
    """16 kHz, n_fft 400, hop 160, 80 HTK mels, natural log."""

    group = pytest.mark.benchmark(group="torchaudio, 16 kHz, 80 mels")
    overrides = {"hop_length": 160, "n_mels": 80}  # noqa: RUF012

    @group
    def test_fastclap(self, benchmark) -> None:  # type: ignore[no-untyped-def]
        measure(benchmark, ours("torchaudio", **self.overrides))

    @group
    def test_torchaudio(self, benchmark) -> None:  # type: ignore[no-untyped-def]
        transform = torchaudio.transforms.MelSpectrogram(**self.overrides).to(DEVICE)
        clips = waveform(16000)
        measure(benchmark, lambda: transform(clips).clamp(min=1e-10).log(), ours("torchaudio", **self.overrides)().mT)


class TestKaldi:
    """16 kHz, 400 of 512 samples, DC removal, pre-emphasis, 80 mels."""

    group = pytest.mark.benchmark(group="kaldi, 16 kHz, 80 mels")

    @group
    def test_fastclap(self, benchmark) -> None:  # type: ignore[no-untyped-def]
        measure(benchmark, ours("kaldi"))

    @group
    def test_torchaudio(self, benchmark) -> None:  # type: ignore[no-untyped-def]
        clips = waveform(16000)
        measure(
            benchmark,
            lambda: torch.stack([kaldi.fbank(clip[None], num_mel_bins=80) for clip in clips]),
            ours("kaldi")(),
        )


class TestClap:
    """48 kHz, n_fft 1024, 64 mels up to 14 kHz, decibels."""

    group = pytest.mark.benchmark(group="clap-fusion, 48 kHz, 64 mels")

    @group
    def test_fastclap(self, benchmark) -> None:  # type: ignore[no-untyped-def]
        measure(benchmark, ours("clap-fusion"))

    @group
    def test_torchaudio(self, benchmark) -> None:  # type: ignore[no-untyped-def]
        mel = torchaudio.transforms.MelSpectrogram(48000, 1024, hop_length=480, n_mels=64, f_min=50, f_max=14000)
        transform = torch.nn.Sequential(mel, torchaudio.transforms.AmplitudeToDB("power")).to(DEVICE)
        clips = waveform(48000)
        measure(benchmark, lambda: transform(clips), ours("clap-fusion")().mT)
