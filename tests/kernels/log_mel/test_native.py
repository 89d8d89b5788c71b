"""The C++ log-mel engine against the float64 definition and the torch engine, on every SIMD path of this processor."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import mmap
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from fastclap.features import PRESETS
from fastclap.kernels.log_mel import native
from fastclap.kernels.log_mel.operator import chosen_engine, log_mel
from fastclap.kernels.log_mel.spec import Batch, LogMelSpec
from fastclap.kernels.log_mel.torch_engine import log_mel_reference

needs_library = pytest.mark.skipif(not native.available(), reason=f"no native log-mel engine: {native.description()}")
every_preset = pytest.mark.parametrize("preset", PRESETS)
every_path = pytest.mark.parametrize("simd", native.simd_paths() or ["auto"])
ROOT = Path(__file__).resolve().parents[3]


def noise(batch: int, samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed))


def clips(sampling_rate: int) -> tuple[Tensor, Tensor]:
    """A ragged batch of awkward signals, and NaN wherever no clip is: nothing of that may be read."""
    samples = int(0.17 * sampling_rate)
    t = torch.arange(samples) / sampling_rate
    batch = noise(8, samples)
    batch[1] = torch.sin(2 * math.pi * 1003.7 * t)  # a full-scale tone
    batch[2] = 0.5 * torch.sin(2 * math.pi * 50 * t) + 1e-3 * batch[2]  # hum and weak noise
    batch[3] = 0.5 + 0.01 * batch[3]  # a constant offset
    batch[4] = 0.0
    batch[4, ::401] = 1.0  # clicks
    lengths = torch.tensor([samples, samples - 1, 4 * samples // 5, samples, samples // 2, 199, 1, 0])
    for clip, length in zip(batch, lengths, strict=True):
        clip[length:] = float("nan")
    return batch, lengths


@lru_cache(maxsize=len(PRESETS))
def expected(preset: str) -> tuple[Tensor, Tensor, Tensor]:
    """(float64 definition, torch engine, frame lengths) of `clips`."""
    spec = PRESETS[preset]
    batch, lengths = clips(spec.sampling_rate)
    reference, frame_lengths = log_mel_reference(batch, lengths, spec)
    return reference, torch_engine(batch, lengths, spec)[0], frame_lengths


def torch_engine(waveform: Tensor, lengths: Tensor | None, spec: LogMelSpec) -> tuple[Tensor, Tensor]:
    """`log_mel` computed by torch whatever is installed: a waveform with a gradient has no other engine."""
    features, frame_lengths = log_mel(waveform.float().requires_grad_(), lengths, int16_as_float(waveform, spec))
    return features.detach(), frame_lengths


def log_mel_native(
    waveform: Tensor, lengths: Tensor | None, spec: LogMelSpec, *, simd: str = "auto", threads: int | None = None
) -> tuple[Tensor, Tensor]:
    if simd == "auto" and threads is None:
        return log_mel(waveform, lengths, spec, backend="native")
    return native.log_mel_native(Batch(waveform, lengths), spec, simd=simd, threads=threads)


def usable(waveform: Tensor, spec: LogMelSpec) -> bool:
    """Whether "auto" takes the native engine."""
    return chosen_engine(Batch(waveform), spec, "auto") == "native"


def int16_as_float(waveform: Tensor, spec: LogMelSpec) -> LogMelSpec:
    if waveform.dtype != torch.int16:
        return spec
    return dataclasses.replace(spec, input_scale=spec.input_scale / 32768)


# --- values -----------------------------------------------------------------------------------------------------------


@needs_library
@every_preset
@every_path
def test_is_as_close_to_the_float64_definition_as_torch(preset: str, simd: str) -> None:
    spec = PRESETS[preset]
    batch, lengths = clips(spec.sampling_rate)
    reference, by_torch, expected_lengths = expected(preset)
    features, frame_lengths = log_mel_native(batch, lengths, spec, simd=simd)
    assert features.dtype == torch.float32 and frame_lengths.dtype == torch.int64
    assert features.shape == reference.shape and torch.equal(frame_lengths, expected_lengths)
    for clip, (truth, ours, theirs) in enumerate(zip(reference, features, by_torch, strict=True)):
        error, torch_error = ours - truth, theirs - truth
        # Both are float32 FFTs and round differently. What is quiet next to a loud tone has few bits left in either,
        # and a reflected clip of a few samples is such a tone; the rest of the margin is luck on some thousand values.
        assert error.square().mean().sqrt() <= 2 * torch_error.square().mean().sqrt() + 2e-6, clip
        assert error.abs().max() <= 3 * torch_error.abs().max() + 2e-5, clip


@needs_library
@every_preset
def test_is_as_close_as_torch_on_real_speech(preset: str, real_speech: Path) -> None:
    from fastclap.audio import read_audio

    spec = PRESETS[preset]
    files = sorted(real_speech.rglob("*.*"))
    files = [file for file in files if file.suffix in (".wav", ".flac", ".mp3", ".ogg")][:4]
    waveform = [torch.from_numpy(read_audio(file, spec.sampling_rate, dtype="float32"))[:8000] for file in files]
    lengths = torch.tensor([len(clip) for clip in waveform])
    batch = torch.nn.utils.rnn.pad_sequence(waveform, batch_first=True)
    reference, _ = log_mel_reference(batch, lengths, spec)
    ours, theirs = log_mel_native(batch, lengths, spec)[0], torch_engine(batch, lengths, spec)[0]
    assert (ours - reference).square().mean() <= 1.3**2 * (theirs - reference).square().mean()


@needs_library
@every_path
@pytest.mark.parametrize("log", ["ln", "log10", "db"])
def test_logarithm_is_accurate_over_the_range_of_energies(simd: str, log: str) -> None:
    # A click in the middle of a frame has a flat spectrum: no cancellation, the log's own error remains.
    spec = LogMelSpec(16000, 64, 64, 64, 20, framing="snip_edges", log=log, floor=1e-37)  # type: ignore[arg-type]
    waveform = torch.zeros(1, 64 * 4096)
    waveform[0, 32::64] = torch.logspace(-15, 9, 4096)
    features, _ = log_mel_native(waveform, None, spec, simd=simd)
    reference, _ = log_mel_reference(waveform, None, spec)
    error, unit = (features - reference).abs(), {"ln": 1.0, "log10": 0.4343, "db": 4.343}[log]
    assert (error <= 4e-7 * unit + 1.5e-7 * reference.abs()).all(), error.max()


small_sizes = sorted(2 * 2**a * 3**b * 5**c for a in range(8) for b in range(4) for c in range(3))


@st.composite
def specs(draw: st.DrawFn) -> LogMelSpec:
    n_fft = draw(st.sampled_from([size for size in small_sizes if 2 <= size <= 320]))
    return LogMelSpec(
        sampling_rate=16000,
        n_fft=n_fft,
        win_length=draw(st.integers(2, n_fft)),
        hop_length=draw(st.integers(1, 2 * n_fft)),
        n_mels=draw(st.integers(1, 40)),
        window=draw(st.sampled_from(["hann", "hann_symmetric", "povey"])),
        framing=draw(st.sampled_from(["center", "snip_edges", "no_snip_edges"])),
        input_scale=draw(st.sampled_from([1.0, 32768.0])),
        remove_dc=draw(st.booleans()),
        preemphasis=draw(st.sampled_from([0.0, 0.3, 0.97, 1.0])),
        power=draw(st.sampled_from([1.0, 2.0])),
        mel_scale=draw(st.sampled_from(["htk", "slaney", "kaldi"])),
        mel_norm=draw(st.sampled_from([None, "slaney"])),
        f_min=draw(st.sampled_from([0.0, 20.0, 1000.0])),
        f_max=draw(st.sampled_from([None, 7600.0])),
        log=draw(st.sampled_from(["ln", "log10", "db"])),
        floor=1e-6,
        dynamic_range=draw(st.sampled_from([None, 1.0])),
        mean=draw(st.sampled_from([0.0, -4.0])),
        std=draw(st.sampled_from([1.0, 4.0])),
        drop_last_frame=draw(st.booleans()),
        num_frames=draw(st.sampled_from([None, 1, 7])),
        padding_value=draw(st.sampled_from([None, 0.0])),
    )


@needs_library
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    spec=specs(),
    samples=st.integers(1, 1200),
    fractions=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    int16=st.booleans(),
    path=st.integers(0, 2),
)
def test_any_combination_of_parameters_equals_the_definition(
    spec: LogMelSpec, samples: int, fractions: list[float], int16: bool, path: int
) -> None:
    waveform = noise(len(fractions), samples)
    if int16:
        waveform = (32768 * waveform).clamp(-32768, 32767).to(torch.int16)
    lengths = torch.tensor([round(fraction * samples) for fraction in fractions])
    paths = native.simd_paths()
    features, frame_lengths = log_mel_native(waveform, lengths, spec, simd=paths[path % len(paths)])
    reference, expected_lengths = log_mel_reference(waveform, lengths, spec)
    assert torch.equal(frame_lengths, expected_lengths)
    # In terms of energies, where a float32 FFT errs by about 1e-7 of a frame's loudest bin.
    base = {"ln": 1.0, "log10": math.log(10), "db": math.log(10) / 10}[spec.log]
    ours, truth = (
        (spec.std * x.double() + spec.mean).mul(base).exp() ** (1 / spec.power) for x in (features, reference)
    )
    loudest = truth.amax(dim=2, keepdim=True)
    assert ((ours - truth).abs() <= 1e-5 * loudest).all()


# --- what log_mel promises --------------------------------------------------------------------------------------------


@needs_library
@every_preset
@every_path
def test_int16_equals_float_over_32768(preset: str, simd: str) -> None:
    waveform = torch.randint(-32768, 32768, (2, 5000), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([5000, 1234])
    a, _ = log_mel_native(waveform, lengths, PRESETS[preset], simd=simd)
    b, _ = log_mel_native(waveform.float() / 32768, lengths, PRESETS[preset], simd=simd)
    assert torch.equal(a, b)  # a power of two: no rounding


@needs_library
@every_preset
def test_a_clip_has_the_same_features_alone_padded_and_in_a_batch(preset: str) -> None:
    spec = PRESETS[preset]
    batch, lengths = clips(spec.sampling_rate)
    together, frame_lengths = log_mel_native(batch, lengths, spec)
    assert together.isfinite().all()
    for clip, length, frames, features in zip(batch, lengths, frame_lengths, together, strict=True):
        if length:
            alone, _ = log_mel_native(clip[None, :length], None, spec)
            assert torch.equal(alone[0, :frames], features[:frames])


@needs_library
@every_path
@pytest.mark.parametrize("int16", [False, True])
@pytest.mark.parametrize(
    ("win_length", "hop_length"),
    [(400, 160), (1024, 480), (64, 16), (48, 32), (400, 400), (400, 416), (400, 150), (380, 160)],
)
def test_a_frame_is_the_same_among_overlapping_ones_and_alone(
    win_length: int, hop_length: int, int16: bool, simd: str
) -> None:
    n_fft = 512 if win_length == 380 else win_length
    spec = LogMelSpec(16000, n_fft, win_length, hop_length, 20, framing="snip_edges", floor=1e-20)
    waveform = noise(1, 36 * hop_length + win_length + 15)
    waveform = (32768 * waveform).clamp(-32768, 32767).to(torch.int16) if int16 else waveform
    together, _ = log_mel_native(waveform, None, spec, simd=simd)
    alone, _ = log_mel_native(waveform[0].unfold(0, win_length, hop_length), None, spec, simd=simd)
    assert alone.shape == (37, 1, 20) and torch.equal(together[0], alone[:, 0])
    truth, _ = log_mel_reference(waveform, None, spec)
    assert (together - truth).abs().max() < 1e-3


@needs_library
@every_preset
@every_path
def test_silence_is_the_log_of_the_floor(preset: str, simd: str) -> None:
    spec = dataclasses.replace(PRESETS[preset], padding_value=None)
    features, _ = log_mel_native(torch.zeros(2, 5000), torch.tensor([5000, 2000]), spec, simd=simd)
    torch.testing.assert_close(features, torch.full_like(features, (spec.log_padding - spec.mean) / spec.std))


@needs_library
@every_preset
@every_path
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_sample_spoils_its_own_frames_only(preset: str, simd: str, bad: float) -> None:
    spec = PRESETS[preset]
    clean = noise(2, 12000)
    spoilt = clean.clone()
    spoilt[1, 6000] = bad
    a, _ = log_mel_native(clean, None, spec, simd=simd)
    b, _ = log_mel_native(spoilt, None, spec, simd=simd)
    starts = torch.arange(spec.frames(12000)) * spec.hop_length - spec.offset
    touched = torch.zeros(a.shape[1], dtype=torch.bool)
    touched[: len(starts)] = (starts <= 6000) & (starts + spec.win_length > 6000)
    if spec.dynamic_range is not None:
        touched[:] = True
    assert torch.equal(a[0], b[0])
    assert b[1, touched].isnan().all()
    assert torch.equal(a[1, ~touched], b[1, ~touched])


@needs_library
@pytest.mark.parametrize("preset", ["whisper", "clsp"])
def test_any_layout_and_float_type(preset: str) -> None:
    spec = PRESETS[preset]
    wide = noise(6, 8000)
    for view in (wide[::2, ::2], wide.t().contiguous().t()[:3, 17:4017], wide[:1].expand(3, -1), wide[:3].double()):
        lengths = torch.tensor([view.shape[1], 3000, 100, 7], dtype=torch.int32)[::1][:3]
        a, _ = log_mel_native(view, lengths, spec)
        b, _ = log_mel_native(view.float().contiguous(), lengths.long(), spec)
        assert torch.equal(a, b)
    half = wide.half()
    assert torch.equal(log_mel_native(half, None, spec)[0], log_mel_native(half.float(), None, spec)[0])


@needs_library
def test_dither_is_that_of_the_torch_engine() -> None:
    spec = dataclasses.replace(PRESETS["kaldi"], dither=1.0, input_scale=32768.0)
    waveform = noise(2, 4000)
    torch.manual_seed(0)
    ours, _ = log_mel_native(waveform, None, spec)
    torch.manual_seed(0)
    theirs, _ = torch_engine(waveform, None, spec)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


@needs_library
@pytest.mark.parametrize(
    ("waveform", "lengths", "message"),
    [
        (torch.zeros(100), None, r"waveform\[None\]"),
        (torch.zeros(2, 0), None, "neither of them 0"),
        (torch.zeros(0, 2), None, "neither of them 0"),
        (torch.zeros(2, 100, dtype=torch.int32), None, "int16 or floating point"),
        (torch.zeros(2, 100), torch.tensor([100]), "lengths must be 2 integers"),
        (torch.zeros(2, 100), torch.tensor([100, 101]), r"lengths\[1\]=101"),
        (torch.zeros(2, 100, device="meta"), None, "meta device"),
    ],
)
def test_wrong_arguments_are_named(waveform: Tensor, lengths: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_mel_native(waveform, lengths, PRESETS["kaldi"])


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_fft": 2 * 7 * 32, "win_length": 448}, "prime factor above 5"),
        ({"n_fft": 4096, "win_length": 400}, "n_fft is above 2048"),
        ({"floor": 1e-40}, "floor 1e-40"),
    ],
)
def test_what_is_not_covered_is_left_to_torch(change: dict[str, int], message: str) -> None:
    spec = dataclasses.replace(PRESETS["whisper"], **change)  # type: ignore[arg-type]
    assert not usable(torch.zeros(1, 1000), spec)
    with pytest.raises(NotImplementedError, match=message):
        native.log_mel_native(Batch(torch.zeros(1, 1000)), spec)


# --- threads, processes, transformations ------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("preset", ["whisper", "kaldi"])
def test_threads_do_not_change_the_result(preset: str) -> None:
    waveform, lengths = noise(4, 160000), torch.tensor([160000, 0, 31111, 160000])  # enough for four threads
    one, _ = log_mel_native(waveform, lengths, PRESETS[preset], threads=1)
    for threads in (-1, 2, 5, 10**6):
        assert torch.equal(log_mel_native(waveform, lengths, PRESETS[preset], threads=threads)[0], one)


@needs_library
@every_path
@pytest.mark.parametrize("preset", ["whisper", "kaldi"])
def test_a_batch_larger_than_the_caches_is_its_clips(preset: str, simd: str) -> None:
    waveform = noise(16, 160000)  # 5 MB of features
    lengths = torch.randint(0, 160001, (16,), generator=torch.Generator().manual_seed(0))
    for threads in (1, 3):
        features, _ = log_mel_native(waveform, lengths, PRESETS[preset], simd=simd, threads=threads)
        for clip, length, row in zip(waveform, lengths, features, strict=True):
            alone, _ = log_mel_native(clip[None], length[None], PRESETS[preset], simd=simd)
            assert torch.equal(row, alone[0])


@needs_library
def test_memory_of_large_features_is_used_again_but_never_while_it_is_in_use(tmp_path: Path) -> None:
    waveform = noise(16, 160000)
    first, _ = log_mel_native(waveform, None, PRESETS["kaldi"])
    before = first.clone()
    second, _ = log_mel_native(2 * waveform, None, PRESETS["kaldi"])
    assert torch.equal(first, before) and not torch.equal(first, second)
    part, address = second[3, :5], second.data_ptr()
    values = part.clone()
    del second
    third, _ = log_mel_native(3 * waveform, None, PRESETS["kaldi"])
    assert third.data_ptr() != address and torch.equal(part, values)  # a view keeps the memory
    del part
    fourth, _ = log_mel_native(waveform, None, PRESETS["kaldi"])
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert fourth.data_ptr() == address
    torch.save(fourth, tmp_path / "features.pt")
    assert (tmp_path / "features.pt").stat().st_size < 4 * fourth.numel() + 10_000
    assert torch.equal(torch.load(tmp_path / "features.pt"), first)
    fourth += 1  # memory like any other
    assert torch.equal(fourth, first + 1)
    del first, third, fourth
    kept = [log_mel_native(waveform, None, PRESETS["kaldi"])[0] for _ in range(2 * native._KEPT_BLOCKS)]
    assert len({x.data_ptr() for x in kept}) == len(kept)
    del kept
    assert len(native._kept) <= native._KEPT_BLOCKS and sum(map(len, native._kept)) <= native._KEPT_BYTES


@needs_library
def test_calls_from_several_python_threads_do_not_meet() -> None:
    waveform = noise(8, 320000)
    alone = [log_mel_native(clip[None], None, PRESETS["whisper"])[0] for clip in waveform]
    equal = [False] * len(waveform)

    def work(i: int) -> None:
        equal[i] = all(
            torch.equal(log_mel_native(waveform[i : i + 1], None, PRESETS["whisper"], threads=2)[0], alone[i])
            for _ in range(5)
        )

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(waveform))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(equal)


def _exit_with_equality(waveform: Tensor, features: Tensor) -> None:
    again, _ = log_mel_native(waveform, None, PRESETS["whisper"], threads=3)
    raise SystemExit(0 if torch.equal(again, features) else 1)


@needs_library
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_threads_work_in_a_process_forked_after_use() -> None:
    waveform = noise(3, 160000)  # enough for three threads
    features, _ = log_mel_native(waveform, None, PRESETS["whisper"], threads=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forking with threads
        child = multiprocessing.get_context("fork").Process(target=_exit_with_equality, args=(waveform, features))
        child.start()
    child.join(60)
    assert child.exitcode == 0


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_threads_work_in_a_child_that_multiprocessing_does_not_know_of() -> None:
    waveform = noise(3, 160000)
    features, _ = log_mel_native(waveform, None, PRESETS["whisper"], threads=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that hangs
        again, _ = log_mel_native(waveform, None, PRESETS["whisper"], threads=3)
        os._exit(0 if torch.equal(again, features) else 1)
    assert os.waitpid(child, 0)[1] == 0


@needs_library
def test_threads_are_those_of_the_openmp_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    if list((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        assert native._team() is not None
    asked = []
    work_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, work_type, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def team(work, data, threads, flags):  # type: ignore[no-untyped-def]
        asked.append(threads)
        work(data)  # a runtime may give fewer threads than asked

    monkeypatch.setattr(native, "_team", lambda: ctypes.cast(team, ctypes.c_void_p).value)
    waveform = noise(3, 160000)
    features, _ = log_mel_native(waveform, None, PRESETS["whisper"], threads=3)
    assert asked == [3]
    assert torch.equal(features, log_mel_native(waveform, None, PRESETS["whisper"], threads=1)[0])
    assert asked == [3]


@needs_library
def test_usable_only_where_torch_need_not_follow() -> None:
    spec, waveform = PRESETS["whisper"], noise(1, 1000)
    assert usable(waveform, spec)
    assert usable(waveform.to(torch.int16), spec)
    assert not usable(waveform.to("meta"), spec)
    leaf = waveform.clone().requires_grad_()
    assert not usable(leaf, spec)
    with torch.no_grad():
        assert usable(leaf, spec)
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(usable(x, spec))
        return x.sum()

    torch.func.vmap(look)(waveform[None])
    with forward_ad.dual_level():
        look(forward_ad.make_dual(waveform, waveform))
    torch.jit.trace(look, (waveform,), check_trace=False)
    assert seen == [False] * 3


# --- the library ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_loader() -> Iterator[None]:
    caches = (native._load, native._plan, native._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("fresh_loader")
@pytest.mark.parametrize("content", [None, b"not a library"])
def test_without_the_library_it_says_so_once(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lib.so"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv(native.LIBRARY_VARIABLE, str(file))
    assert not native.available() and native.simd_paths() == ()
    assert str(file) in native.description()
    with pytest.warns(RuntimeWarning, match="computed with torch") as caught:
        for _ in range(2):
            assert not usable(torch.zeros(1, 1000), PRESETS["whisper"])
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match="no native log-mel engine"):
        native.log_mel_native(Batch(torch.zeros(1, 1000)), PRESETS["whisper"])


@needs_library
@pytest.mark.usefixtures("fresh_loader")
def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_INTERFACE", native._INTERFACE + 1)
    assert not native.available()
    assert "was built from other sources than these; install fastclap again" in native.description()


@needs_library
def test_more_front_ends_than_plans_are_kept() -> None:
    waveform = noise(1, 2000)
    first, _ = log_mel_native(waveform, None, PRESETS["whisper"])
    for n_mels in range(1, 81):
        features, _ = log_mel_native(waveform, None, dataclasses.replace(PRESETS["whisper"], n_mels=n_mels))
    assert torch.equal(features, first)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_random_calls_under_sanitizers(tmp_path: Path) -> None:
    commands = [
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DFASTCLAP_SANITIZE=address;undefined"],
        ["cmake", "--build", str(tmp_path)],
        [str(tmp_path / "check_native"), "3000"],
    ]
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "kept every promise" in result.stdout
