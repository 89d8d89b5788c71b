"""CPU log-mel engines side by side: ours in C++ and torch, torchaudio, asrfront, kaldi-native-fbank, per 10 s clip.

`python -m bench.logmel_speed` makes a record of these engines and of slower libraries, all rows in one run.

    OMP_NUM_THREADS=2 pytest bench/test_native.py --benchmark-only --benchmark-group-by=group

One row an engine, one group a front-end and number of threads. Before each timed round of a row every other engine of
its group runs once, so that all see the same machine, and then its own, so that each finds its own data in the cache.
Compare minima and medians, and `cpu_ms_per_clip` (processor time of all threads, least over the rounds) where something
else is running.

All engines take the same float32 batch of noise. torchaudio is MelSpectrogram and a logarithm, without Kaldi's DC
removal and pre-emphasis; its compliance.kaldi, which has them, takes one clip a call. kaldi-native-fbank gets Python
lists, made outside the clock, as it converts an array sample by sample; with two threads two clips run at a time.
asrfront gets float32 arrays; it has Whisper's front-end and Kaldi's with Hamming's window in place of Povey's, which is
as much work, but no others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor

from fastclap.features import PRESETS
from fastclap.kernels.log_mel import native
from fastclap.kernels.log_mel.operator import log_mel
from fastclap.kernels.log_mel.spec import LogMelSpec

CLIPS = int(os.environ.get("FASTCLAP_BENCH_CLIPS", "4"))
ROUNDS = int(os.environ.get("FASTCLAP_BENCH_ROUNDS", "15"))
SECONDS = 10

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    spec: LogMelSpec
    torchaudio: dict[str, object]  # arguments of MelSpectrogram
    kaldi: dict[str, dict[str, Any]]  # options of kaldi-native-fbank, by group

    def waveform(self, clips: int = CLIPS) -> Tensor:
        samples = SECONDS * self.spec.sampling_rate
        return 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(0))


KALDI_FRAMES = {"samp_freq": 16000, "dither": 0.0}
CASES = {
    "whisper-80": Case(
        PRESETS["whisper"],
        {"n_fft": 400, "hop_length": 160, "n_mels": 80, "norm": "slaney", "mel_scale": "slaney"},
        {
            "frame_opts": KALDI_FRAMES
            | {"window_type": "hann", "preemph_coeff": 0.0, "remove_dc_offset": False, "round_to_power_of_two": False},
            "mel_opts": {"num_bins": 80, "low_freq": 0, "is_librosa": True},
        },
    ),
    "kaldi-80": Case(
        PRESETS["kaldi"],
        {"n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 80, "f_min": 20.0},
        {"frame_opts": KALDI_FRAMES, "mel_opts": {"num_bins": 80}},
    ),
    "clsp-128": Case(
        PRESETS["clsp"],
        {"n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 128, "f_min": 20.0, "f_max": 7600.0},
        {"frame_opts": KALDI_FRAMES | {"snip_edges": False}, "mel_opts": {"num_bins": 128, "high_freq": 7600}},
    ),
    "clap-64": Case(
        PRESETS["clap"],
        {
            **{"sample_rate": 48000, "n_fft": 1024, "hop_length": 480, "n_mels": 64, "f_min": 50.0, "f_max": 14000.0},
            **{"norm": "slaney", "mel_scale": "slaney"},
        },
        {
            "frame_opts": {"samp_freq": 48000, "dither": 0.0, "frame_length_ms": 1024 / 48}
            | {"window_type": "hann", "preemph_coeff": 0.0, "remove_dc_offset": False},
            "mel_opts": {"num_bins": 64, "low_freq": 50, "high_freq": 14000, "is_librosa": True},
        },
    ),
}


def by_torchaudio(case: Case, waveform: Tensor) -> Run:
    transform = torchaudio.transforms.MelSpectrogram(**case.torchaudio)
    return lambda: transform(waveform).clamp_(min=case.spec.floor).log_()


def by_torchaudio_kaldi(case: Case, waveform: Tensor) -> Run:
    if case.spec.mel_scale != "kaldi":
        pytest.skip("torchaudio.compliance: not Kaldi's front-end")
    frames, mels = case.kaldi["frame_opts"], case.kaldi["mel_opts"]
    options = {"snip_edges": frames.get("snip_edges", True), "num_mel_bins": mels["num_bins"]}
    options["high_freq"] = mels.get("high_freq", 0.0)
    return lambda: [torchaudio.compliance.kaldi.fbank(clip[None], **options) for clip in waveform]


def by_kaldi_native_fbank(case: Case, waveform: Tensor, *, one_frame: bool = False) -> Run:
    knf = pytest.importorskip("kaldi_native_fbank")
    options = knf.FbankOptions()
    for group, values in case.kaldi.items():
        for name, value in values.items():
            setattr(getattr(options, group), name, value)
    if one_frame:  # the cost of handing over the samples
        options.frame_opts.frame_shift_ms = 1e3 * SECONDS
    clips = [clip.tolist() for clip in waveform]
    try:
        knf.OnlineFbank(options)
    except ValueError as error:  # from version 1.23 on it refuses filters without a bin
        pytest.skip(f"kaldi-native-fbank: {error}")

    def fbank(clip: list[float]) -> np.ndarray:
        extractor = knf.OnlineFbank(options)
        extractor.accept_waveform(case.spec.sampling_rate, clip)
        extractor.input_finished()
        frames = [extractor.get_frame(i) for i in range(extractor.num_frames_ready)]
        return np.stack(frames) if frames else np.empty(0)

    def run() -> object:
        if torch.get_num_threads() == 1:
            return [fbank(clip) for clip in clips]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return list(pool.map(fbank, clips))

    return run


def by_asrfront(case: Case, waveform: Tensor) -> Run:
    asrfront = pytest.importorskip("asrfront")
    count = torch.get_num_threads()
    clips = list(waveform.numpy())
    pool = ThreadPoolExecutor(count)  # kept, as asrfront makes its tables once for each thread

    def each(extract: Callable[[np.ndarray], np.ndarray], clips: list[np.ndarray]) -> list[np.ndarray]:
        return [extract(clip) for clip in clips] if count == 1 else list(pool.map(extract, clips))

    if case.spec == PRESETS["whisper"]:
        whisper = asrfront.whisper
        if count == 1:
            return lambda: whisper.log_mel_batch(clips, pad_or_trim=False, n_threads=1)
        # The batch call does not take a second thread for less than 64 s of audio.
        return lambda: each(lambda clip: whisper.log_mel(clip, pad_or_trim=False), clips)
    if case.spec == PRESETS["kaldi"]:
        # It multiplies samples by 32768, as int16 has them; ours is torchaudio's scale, a shift of the logarithm. The
        # batch call also stacks neighbouring frames and is slower than this one, even if it stacks single ones.
        small = [clip / np.float32(32768) for clip in clips]
        return lambda: each(asrfront.sensevoice.fbank_raw, small)
    pytest.skip("asrfront: it is for 16 kHz, its Kaldi mel banks end at 8 kHz and its frames lie inside the clip")


def by_librosa(case: Case, waveform: Tensor) -> Run:
    librosa = pytest.importorskip("librosa")
    options, clips = librosa_numbers(case), waveform.numpy()
    return lambda: np.log10(np.maximum(librosa.feature.melspectrogram(y=clips, **options), case.spec.floor))


def by_torchlibrosa(case: Case, waveform: Tensor) -> Run:
    stft, options = pytest.importorskip("torchlibrosa.stft"), librosa_numbers(case)
    stage = torch.nn.Sequential(
        stft.Spectrogram(options["n_fft"], options.pop("hop_length")), stft.LogmelFilterBank(**options, top_db=None)
    )
    return lambda: stage(waveform)


def by_nnaudio(case: Case, waveform: Tensor) -> Run:
    mel = pytest.importorskip("nnAudio.features.mel", exc_type=ImportError)
    transform = mel.MelSpectrogram(**librosa_numbers(case), verbose=False)
    return lambda: transform(waveform).clamp_(min=case.spec.floor).log_()


def librosa_numbers(case: Case) -> dict[str, Any]:
    spec = case.spec
    if spec.mel_norm != "slaney":
        pytest.skip("librosa and its descendants: they make Slaney's mel banks")
    numbers = {"sr": spec.sampling_rate, "n_fft": spec.n_fft, "hop_length": spec.hop_length, "n_mels": spec.n_mels}
    return numbers | {"fmin": spec.f_min, "fmax": spec.mel_f_max}


def by_torch(case: Case, waveform: Tensor) -> Run:
    # A gradient is what the C++ engine leaves to torch; the graph that it builds is a small part of the time.
    waveform = waveform.detach().requires_grad_()
    return lambda: log_mel(waveform, None, case.spec)[0].detach()


def by_native(case: Case, waveform: Tensor) -> Run:
    if not native.available():
        pytest.skip(f"fastclap C++: {native.description()}")
    return lambda: log_mel(waveform, None, case.spec, backend="native")[0]


def by_native_int16(case: Case, waveform: Tensor) -> Run:
    return by_native(case, (32768 * waveform).clamp(-32768, 32767).to(torch.int16))


ENGINES: dict[str, Callable[[Case, Tensor], Run]] = {
    "fastclap C++": by_native,
    "fastclap C++, int16": by_native_int16,
    "fastclap torch": by_torch,
    "torchaudio": by_torchaudio,
    "torchaudio kaldi": by_torchaudio_kaldi,
    "asrfront": by_asrfront,
    "kaldi-native-fbank": by_kaldi_native_fbank,
}
# In the record only.
SLOW_ENGINES: dict[str, Callable[[Case, Tensor], Run]] = {
    "librosa": by_librosa,
    "torchlibrosa": by_torchlibrosa,
    "nnAudio": by_nnaudio,
}


def made(engine: str, case: Case, waveform: Tensor) -> Run | None:
    """The engine's call, or None where it is absent or has no such front-end."""
    try:
        return ENGINES[engine](case, waveform)
    except pytest.skip.Exception:
        return None


@pytest.fixture(params=[1, 2])
def threads(request):  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_log_mel(benchmark, name: str, engine: str, threads: int) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"{name}, {CLIPS} clips of {SECONDS} s, {threads} thread{'s' * (threads > 1)}"
    case = CASES[name]
    waveform = case.waveform()
    run = ENGINES[engine](case, waveform)
    others = [other for name in ENGINES if name != engine and (other := made(name, case, waveform))]
    processor_time = []

    def round_of_others() -> None:
        for other in others:
            other()
        run()

    def timed() -> object:
        start = time.process_time()
        result = run()
        processor_time.append(time.process_time() - start)
        return result

    result = benchmark.pedantic(timed, setup=round_of_others, rounds=ROUNDS)
    benchmark.extra_info["threads"] = threads
    benchmark.extra_info["simd"] = native.description()
    benchmark.extra_info["cpu_ms_per_clip"] = 1e3 * min(processor_time) / CLIPS
    if benchmark.stats is not None:  # --benchmark-disable runs each engine once, without a clock
        benchmark.extra_info["ms_per_clip"] = 1e3 * benchmark.stats.stats.median / CLIPS
        benchmark.extra_info["min_ms_per_clip"] = 1e3 * benchmark.stats.stats.min / CLIPS
    if engine.startswith("fastclap"):  # the engines do the same work
        reference, _ = log_mel(waveform.requires_grad_(), None, case.spec)
        assert isinstance(result, Tensor)
        assert (result - reference.detach()).abs().max() < 0.05
