"""The torch engine of the log-mel against its float64 definition, and what any engine behind `log_mel` must keep."""

from __future__ import annotations

import dataclasses
import math

import librosa
import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchaudio.compliance import kaldi

from fastclap.features import PRESETS
from fastclap.kernels.log_mel import operator, torch_engine
from fastclap.kernels.log_mel import spec as spec_module
from fastclap.kernels.log_mel.operator import log_mel
from fastclap.kernels.log_mel.spec import LogMelSpec
from fastclap.kernels.log_mel.torch_engine import log_mel_reference
from fastclap.testing import assert_close_rel

pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filterbank has all zero values")
every_preset = pytest.mark.parametrize("preset", PRESETS)


def noise(batch: int, samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed))


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max())


# --- values -----------------------------------------------------------------------------------------------------------


@every_preset
@pytest.mark.parametrize("samples", [1, 2, 127, 401, 1023, 7919])
def test_equals_the_float64_definition(preset: str, samples: int) -> None:
    spec = PRESETS[preset]
    waveform = noise(4, samples)
    lengths = torch.tensor([samples, samples // 2, min(samples, 130), 0])
    features, frame_lengths = log_mel(waveform, lengths, spec)
    expected, expected_lengths = log_mel_reference(waveform, lengths, spec)
    assert features.dtype == torch.float32 and frame_lengths.dtype == torch.int64
    assert torch.equal(frame_lengths, expected_lengths)
    # A float32 FFT errs by 1e-7 of a frame's loudest bin. A reflected clip of a few samples is a pure tone, whose other
    # bins are no louder than that.
    assert_close_rel("features", expected, features, 2e-5 if samples > 2 else 1e-3)


@st.composite
def specs(draw: st.DrawFn) -> LogMelSpec:
    n_fft = 2 * draw(st.integers(2, 40))
    return LogMelSpec(
        sampling_rate=16000,
        n_fft=n_fft,
        win_length=draw(st.integers(2, n_fft)),
        hop_length=draw(st.integers(1, 2 * n_fft)),
        n_mels=draw(st.integers(1, 12)),
        window=draw(st.sampled_from(["hann", "hann_symmetric", "povey"])),
        framing=draw(st.sampled_from(["center", "snip_edges", "no_snip_edges"])),
        input_scale=draw(st.sampled_from([1.0, 32768.0])),
        remove_dc=draw(st.booleans()),
        preemphasis=draw(st.sampled_from([0.0, 0.97, 1.0])),
        power=draw(st.sampled_from([1.0, 2.0])),
        mel_scale=draw(st.sampled_from(["htk", "slaney", "kaldi"])),
        mel_norm=draw(st.sampled_from([None, "slaney"])),
        f_min=draw(st.sampled_from([0.0, 20.0, 1000.0])),
        f_max=draw(st.sampled_from([None, 7600.0])),
        mel_sampling_rate=draw(st.sampled_from([None, 22050])),
        log=draw(st.sampled_from(["ln", "log10", "db"])),
        floor=1e-6,
        dynamic_range=draw(st.sampled_from([None, 1.0])),
        mean=draw(st.sampled_from([0.0, -4.0])),
        std=draw(st.sampled_from([1.0, 4.0])),
        drop_last_frame=draw(st.booleans()),
        num_frames=draw(st.sampled_from([None, 1, 7])),
        padding_value=draw(st.sampled_from([None, 0.0])),
    )


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(spec=specs(), samples=st.integers(1, 200), fractions=st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_any_combination_of_parameters_equals_the_definition(
    spec: LogMelSpec, samples: int, fractions: list[float]
) -> None:
    waveform = noise(len(fractions), samples)
    lengths = torch.tensor([round(fraction * samples) for fraction in fractions])
    features, frame_lengths = log_mel(waveform, lengths, spec)
    expected, expected_lengths = log_mel_reference(waveform, lengths, spec)
    assert torch.equal(frame_lengths, expected_lengths)
    # Single bins of tiny transforms may cancel to 1e-7 of the frame: the floor bounds what that can do to a log.
    assert largest_difference(features, expected) < 2e-2
    assert_close_rel("features", expected, features, 1e-3)


@pytest.mark.parametrize("scale", ["htk", "slaney"])
@pytest.mark.parametrize("norm", [None, "slaney"])
def test_mel_bank_equals_librosa(scale: str, norm: str | None) -> None:
    for rate, n_fft, n_mels, f_min, f_max in [(16000, 400, 80, 0, 8000), (48000, 1024, 64, 50, 14000)]:
        spec = LogMelSpec(rate, n_fft, n_fft, 160, n_mels, mel_scale=scale, mel_norm=norm, f_min=f_min, f_max=f_max)  # type: ignore[arg-type]
        bank = librosa.filters.mel(
            sr=rate, n_fft=n_fft, n_mels=n_mels, fmin=f_min, fmax=f_max, htk=scale == "htk", norm=norm, dtype=np.float64
        )
        np.testing.assert_allclose(spec_module.mel_bank(spec), bank.T, rtol=0, atol=1e-12)


def test_mel_bank_equals_kaldi() -> None:
    bank, _ = kaldi.get_mel_banks(80, 512, 16000.0, 20.0, 0.0, 100.0, -500.0, 1.0)
    ours = spec_module.mel_bank(PRESETS["kaldi"])
    np.testing.assert_allclose(ours[:256], bank.T.numpy(), rtol=0, atol=1e-4)  # theirs is made in float32
    assert not ours[256].any()


@pytest.mark.parametrize("kind", ["hann", "hann_symmetric", "povey"])
@pytest.mark.parametrize("size", [2, 25, 400])
def test_windows(kind: str, size: int) -> None:
    expected = torch.hann_window(size, periodic=kind == "hann", dtype=torch.float64)
    expected = expected**0.85 if kind == "povey" else expected
    spec = LogMelSpec(16000, 512, size, 160, 80, window=kind)  # type: ignore[arg-type]
    np.testing.assert_allclose(spec_module.window(spec), expected.numpy(), rtol=0, atol=1e-12)


@every_preset
def test_int16_equals_float_over_32768(preset: str) -> None:
    waveform = torch.randint(-32768, 32768, (2, 5000), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    a, _ = log_mel(waveform, None, PRESETS[preset])
    b, _ = log_mel(waveform.float() / 32768, None, PRESETS[preset])
    assert torch.equal(a, b)  # a power of two: no rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    waveform = noise(2, 3000).to(dtype)
    a, _ = log_mel(waveform, None, PRESETS["whisper"])
    b, _ = log_mel(waveform.float(), None, PRESETS["whisper"])
    assert a.dtype == torch.float32 and torch.equal(a, b)


def test_non_contiguous_waveform() -> None:
    wide = noise(6, 8000)
    for view in (wide[::2, ::2], wide.t().contiguous().t()[:3, 17:4017], wide[:1].expand(3, -1)):
        assert not view.is_contiguous()
        lengths = torch.tensor([view.shape[1], 3000, 100])
        a, _ = log_mel(view, lengths, PRESETS["clsp"])
        b, _ = log_mel(view.contiguous(), lengths, PRESETS["clsp"])
        assert torch.equal(a, b)


# --- lengths ----------------------------------------------------------------------------------------------------------


@every_preset
def test_a_clip_has_the_same_features_alone_padded_and_in_a_batch(preset: str) -> None:
    spec = PRESETS[preset]
    sizes = [9001, 4800, 4801, 479, 200, 80, 3, 1]
    clips = [noise(1, size, seed=size) for size in sizes]
    batch = torch.full((len(sizes), 12000), float("nan"))  # what lies past a clip must not matter
    for row, clip in zip(batch, clips, strict=True):
        row[: clip.shape[1]] = clip[0]
    together, frame_lengths = log_mel(batch, torch.tensor(sizes), spec)
    assert together.isfinite().all()
    for i, clip in enumerate(clips):
        alone, alone_length = log_mel(clip, None, spec)
        padded, padded_length = log_mel(batch[i : i + 1, :10000], torch.tensor(sizes[i : i + 1]), spec)
        frames = int(frame_lengths[i])
        assert frames == int(alone_length) == int(padded_length) == spec.frames(sizes[i])
        assert alone.shape[1] == (spec.num_frames or frames)
        assert largest_difference(together[i, :frames], alone[0, :frames]) < 1e-5
        assert largest_difference(padded[0, :frames], alone[0, :frames]) < 1e-5
        silence = (spec.log_padding - spec.mean) / spec.std
        if spec.dynamic_range is not None:
            silence = max(silence, float(together[i].max()) - spec.dynamic_range / spec.std)
        assert (together[i, frames:] - silence).abs().max() < 1e-6


@every_preset
def test_no_lengths_means_whole_clips(preset: str) -> None:
    waveform = noise(3, 5003)
    a, a_lengths = log_mel(waveform, None, PRESETS[preset])
    b, b_lengths = log_mel(waveform, torch.full((3,), 5003, dtype=torch.int32), PRESETS[preset])
    assert torch.equal(a, b) and torch.equal(a_lengths, b_lengths)


@every_preset
def test_digital_silence_has_the_value_of_padding(preset: str) -> None:
    spec = dataclasses.replace(PRESETS[preset], padding_value=None)  # ast pads with another value
    features, frame_lengths = log_mel(torch.zeros(2, 9000), torch.tensor([9000, 4000]), spec)
    assert frame_lengths[1] < features.shape[1]
    torch.testing.assert_close(features, torch.full_like(features, (spec.log_padding - spec.mean) / spec.std))


def test_frame_counts_are_the_origins() -> None:
    for samples in range(400, 1300):
        tensor = torch.tensor([samples])
        for preset, count in {
            "whisper": samples // 160,
            "torchaudio": samples // 200 + 1,
            "kaldi": (samples - 400) // 160 + 1,
            "clsp": (samples + 80) // 160,
        }.items():
            assert PRESETS[preset].frames(samples) == count == int(PRESETS[preset].frame_lengths(tensor))


def test_the_ends_of_a_short_clip_are_reflected_back_and_forth() -> None:
    clip = torch.tensor([[0.1, -0.4, 0.3]])
    for framing, mode in (("center", "reflect"), ("no_snip_edges", "symmetric")):
        spec = dataclasses.replace(PRESETS["torchaudio"], framing=framing)  # type: ignore[arg-type]
        padded = torch.from_numpy(np.pad(clip.numpy(), [(0, 0), (spec.offset, 400)], mode=mode))  # type: ignore[call-overload]
        features, frame_lengths = log_mel(clip, None, spec)
        expected, _ = log_mel(padded[:, :400], None, dataclasses.replace(spec, framing="snip_edges"))
        assert frame_lengths.tolist() == [1]
        torch.testing.assert_close(features, expected)


# --- gradients --------------------------------------------------------------------------------------------------------


@every_preset
def test_gradient_equals_autograd_through_the_float64_definition(preset: str) -> None:
    spec = PRESETS[preset]
    waveform = noise(3, 3001)
    lengths = torch.tensor([3001, 1207, 90])
    x32 = waveform.clone().requires_grad_()
    features, _ = log_mel(x32, lengths, spec)
    cotangent = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((features * cotangent).sum(), x32)
    x64 = waveform.double().requires_grad_()
    expected, _ = log_mel_reference(x64, lengths, spec)
    (expected_gradient,) = torch.autograd.grad((expected * cotangent).sum(), x64)
    # d log(mel) = d mel / mel: the weakest bands weigh most and carry the largest relative error.
    assert_close_rel("gradient", expected_gradient, gradient, 2e-3)
    for row, length in zip(gradient, lengths, strict=True):
        assert (row[length:] == 0).all()


def test_gradient_equals_autograd_through_torchaudio() -> None:
    waveform = noise(2, 8000)
    x = waveform.clone().requires_grad_()
    features, _ = log_mel(x, None, PRESETS["torchaudio"])
    features.sum().backward()
    y = waveform.clone().requires_grad_()
    torchaudio.transforms.MelSpectrogram()(y).clamp(min=1e-10).log().sum().backward()
    assert x.grad is not None and y.grad is not None
    assert_close_rel("gradient", y.grad, x.grad, 1e-3)


@pytest.mark.parametrize("preset", ["torchaudio", "kaldi"])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_gradient_is_finite_in_silence_and_beside_unused_nan(preset: str, power: float) -> None:
    spec = dataclasses.replace(PRESETS[preset], power=power)
    waveform = torch.zeros(2, 2000)
    waveform[1] = noise(1, 2000)
    waveform[1, 900:] = float("nan")
    waveform.requires_grad_()
    features, _ = log_mel(waveform, torch.tensor([2000, 900]), spec)
    (gradient,) = torch.autograd.grad(features.sum(), waveform)
    assert gradient.isfinite().all()
    assert (gradient[0] == 0).all() and gradient[1, :900].any() and not gradient[1, 900:].any()


# --- awkward input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_preset
def test_a_bad_sample_spoils_its_own_frames_only(preset: str, bad: float) -> None:
    spec = PRESETS[preset]
    clean = noise(2, 12000)
    spoilt = clean.clone()
    spoilt[1, 6000] = bad
    a, _ = log_mel(clean, None, spec)
    b, _ = log_mel(spoilt, None, spec)
    assert torch.equal(a[0], b[0])
    starts = torch.arange(spec.frames(12000)) * spec.hop_length - spec.offset
    touched = (starts <= 6000) & (starts + spec.win_length > 6000)
    usable = torch.from_numpy(spec_module.mel_bank(spec).any(axis=0)) if not math.isnan(bad) else slice(None)
    finite = b[1, : len(starts)].isfinite()
    if spec.dynamic_range is not None:
        assert not finite.any()
    else:
        assert not finite[touched][:, usable].any()
        assert torch.equal(a[1, : len(starts)][~touched], b[1, : len(starts)][~touched])


@pytest.mark.parametrize(
    ("waveform", "lengths", "message"),
    [
        (torch.zeros(100), None, r"waveform\[None\]"),
        (torch.zeros(1, 2, 100), None, r"\[batch, samples\]"),
        (torch.zeros(2, 0), None, "neither of them 0"),
        (torch.zeros(0, 2), None, "neither of them 0"),
        (torch.zeros(2, 100, dtype=torch.int32), None, "int16 or floating point"),
        (torch.zeros(2, 100, dtype=torch.complex64), None, "int16 or floating point"),
        (torch.zeros(2, 100), torch.tensor([100]), "lengths must be 2 integers"),
        (torch.zeros(2, 100), torch.tensor([1.0, 0.5]), "lengths must be 2 integers"),
        (torch.zeros(2, 100), torch.tensor([100, 101]), r"lengths\[1\]=101.*100 samples"),
        (torch.zeros(2, 100), torch.tensor([-1, 100]), r"lengths\[0\]=-1"),
    ],
)
def test_wrong_arguments_are_named(waveform: Tensor, lengths: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_mel(waveform, lengths, PRESETS["kaldi"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_fft": 511}, "n_fft=511: must be even"),
        ({"win_length": 600}, "win_length=600.*n_fft=512"),
        ({"n_mels": 0}, "n_mels=0: must be at least 1"),
        ({"n_mels": 80.5}, "n_mels=80.5: expected int, got float"),
        ({"n_mels": True}, "n_mels=True: expected int, got bool"),
        ({"hop_length": None}, "hop_length=None: expected int"),
        ({"num_frames": "x"}, "num_frames='x': expected int or None"),
        ({"remove_dc": 1}, "remove_dc=1: expected bool"),
        ({"window": "hamming"}, "window='hamming': choose one of 'hann'"),
        ({"window": None}, "window=None: choose one of"),
        ({"mel_norm": "area"}, "mel_norm='area': choose one of 'slaney'"),
        ({"f_max": 9000.0}, "f_max=9000.0 Hz: above half the sampling rate of 16000 Hz"),
        ({"sampling_rate": 8000, "f_max": 7600}, "f_max=7600.0 Hz: above half the sampling rate of 8000 Hz"),
        ({"f_min": 8000.0}, "f_min=8000.0 Hz"),
        ({"floor": 0.0}, "floor=0.0: must be above 0"),
        ({"hop_length": 2**40}, "hop_length=1099511627776: must be at most 16777216"),
        ({"n_mels": 10**400}, r"n_mels=\(1329 bits\): must be at most"),
        ({"n_fft": 1 << 22, "n_mels": 80}, "n_mels=80 filters over n_fft=4194304 bins"),
        ({"input_scale": 1e300}, r"input_scale=1e\+300: must be finite, and so in float32"),
        ({"floor": float("nan")}, "floor=nan: must be finite"),
        ({"std": 0.0}, "std=0.0"),
        ({"power": 3.0}, "power=3.0: choose 1"),
        ({"preemphasis": 1.5}, "preemphasis=1.5"),
        ({"dither": -1.0}, "dither=-1.0"),
        ({"dynamic_range": -1.0}, "dynamic_range=-1.0"),
    ],
)
def test_wrong_parameters_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["kaldi"], **change)  # type: ignore[arg-type]


def test_integers_are_taken_for_floats() -> None:
    spec = dataclasses.replace(PRESETS["kaldi"], f_min=20, f_max=None)
    assert type(spec.f_min) is float and spec == PRESETS["kaldi"]


# --- surroundings -----------------------------------------------------------------------------------------------------


def test_precision_does_not_depend_on_autocast_or_matmul_settings() -> None:
    waveform = noise(2, 8000)
    expected, _ = log_mel(waveform, None, PRESETS["kaldi"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(log_mel(waveform, None, PRESETS["kaldi"])[0], expected)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(log_mel(waveform, None, PRESETS["kaldi"])[0], expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_first_call_in_inference_mode_does_not_spoil_training() -> None:
    torch_engine._constants.cache_clear()
    waveform = noise(1, 3000).requires_grad_()
    with torch.inference_mode():
        log_mel(waveform, None, PRESETS["kaldi"])
    features, _ = log_mel(waveform, None, PRESETS["kaldi"])
    (gradient,) = torch.autograd.grad(features.sum(), waveform)
    assert gradient.isfinite().all()


class LargestAllocation(TorchDispatchMode):
    """Bytes of the largest tensor that any operation inside the context returned, views of `given` apart."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given.untyped_storage().data_ptr()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        storages = [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *(s.nbytes() for s in storages if s.data_ptr() != self.given), 0)
        return result


@pytest.mark.parametrize("shape", [(40, 16000), (1, 640000)])
def test_memory_is_bounded_by_features_a_clip_and_a_chunk(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = PRESETS["clsp"]
    waveform = noise(*shape)
    lengths = torch.full(shape[:1], shape[1])
    expected, _ = log_mel(waveform, lengths, spec)
    monkeypatch.setattr(torch_engine, "CPU_CHUNK", (1 << 16) // torch.get_num_threads())
    with LargestAllocation(waveform) as allocation:
        features, _ = log_mel(waveform, lengths, spec)
    clip = 4 * (shape[1] + 2 * spec.n_fft)
    assert features.nbytes <= allocation.largest <= max(features.nbytes, clip, 4 << 16)
    assert features.shape[1] * shape[0] * spec.n_fft * 4 > 3 * allocation.largest  # what all frames would take
    assert largest_difference(features, expected) < 1e-5


def test_nothing_waits_for_a_gpu() -> None:
    # A fake CUDA tensor has no values: whatever needed one on the host (.item(), a data-dependent shape) would raise.
    for preset, spec in PRESETS.items():
        with FakeTensorMode():
            waveform = torch.empty(3, 16000, dtype=torch.int16, device="cuda")
            lengths = torch.empty(3, dtype=torch.int64, device="cuda")
            try:
                features, frame_lengths = log_mel(waveform, lengths, spec)
            finally:
                torch_engine._constants.cache_clear()  # fake constants
        assert features.device.type == frame_lengths.device.type == "cuda", preset
        assert features.shape == (3, spec.num_frames or spec.frames(16000), spec.n_mels)


def test_dither_is_kaldis_in_distribution() -> None:
    spec = dataclasses.replace(PRESETS["kaldi"], dither=1.0, n_mels=23)
    torch.manual_seed(0)
    ours, _ = log_mel(torch.zeros(1, 160000), None, spec)
    again, _ = log_mel(torch.zeros(1, 160000), None, spec)
    theirs = kaldi.fbank(torch.zeros(1, 160000), dither=1.0)
    assert not torch.equal(ours, again)
    # Standard error of a mean over about 400 independent frames: below 0.06 in the narrowest filter.
    torch.testing.assert_close(ours[0].mean(0), theirs.mean(0), atol=0.25, rtol=0)
    torch.testing.assert_close(ours[0].std(0), theirs.std(0), atol=0.25, rtol=0)


# --- crops, masks, statistics of each mel, output types, the operator ------------------------------------------------


@every_preset
def test_a_crop_has_the_features_of_its_samples_alone(preset: str) -> None:
    spec, waveform = PRESETS[preset], noise(3, 6000)
    offsets, lengths = torch.tensor([0, 1234, 5990]), torch.tensor([6000, 2000, 10])
    features, frame_lengths = log_mel(waveform, lengths, spec, offsets=offsets)
    without, _ = log_mel(waveform, None, spec, offsets=offsets)
    for row, (first, length) in enumerate(zip(offsets, lengths, strict=True)):
        for found, clip in ((features, waveform[row, first : first + length]), (without, waveform[row, first:])):
            alone, count = log_mel(clip[None], None, spec)
            assert largest_difference(found[row, :count], alone[0, :count]) < 1e-5
    assert torch.equal(frame_lengths, spec.frame_lengths(lengths))


def test_wrong_crops_masks_and_statistics_are_named() -> None:
    spec, waveform = PRESETS["kaldi"], noise(2, 1000)
    with pytest.raises(ValueError, match=r"lengths\[1\]=900: .*1000 samples a clip, from offsets\[1\]=200 on"):
        log_mel(waveform, torch.tensor([900, 900]), spec, offsets=torch.tensor([100, 200]))
    with pytest.raises(ValueError, match=r"offsets\[0\]=-1"):
        log_mel(waveform, None, spec, offsets=torch.tensor([-1, 0]))
    with pytest.raises(ValueError, match=r"masks of mels must be int64 \[2, spans, 2\], got torch.int32"):
        log_mel(waveform, None, spec, masks=(None, torch.zeros(2, 1, 2, dtype=torch.int32)))
    for change, message in (
        ({"mean": (1.0,)}, "mean has 1 numbers for n_mels=80"),
        ({"std": [1.0] * 79 + [0.0]}, "must be above 0"),
        ({"mean": "0"}, "expected float or 80 floats, got str"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(spec, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend='triton' needs a waveform on a GPU"):
        log_mel(waveform, None, spec, backend="triton")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_masks_and_statistics_of_each_mel(dtype: str) -> None:
    plain = dataclasses.replace(PRESETS["kaldi"], floor=1e-10)
    mean, std = torch.linspace(-3, 3, 80), torch.linspace(1, 2, 80)
    spec = dataclasses.replace(plain, mean=tuple(mean.tolist()), std=tuple(std.tolist()), dtype=dtype)  # type: ignore[arg-type]
    waveform = noise(2, 5000)
    time, mel = torch.tensor([[[1, 4], [9, 9]], [[0, 1], [20, 99]]]), torch.tensor([[[70, 80]], [[0, 5]]])
    features, _ = log_mel(waveform, None, spec, masks=(time, mel))
    expected = (log_mel(waveform, None, plain)[0] - mean) / std
    silence = (spec.log_padding - mean) / std
    for row in range(2):
        for begin, end in time[row]:
            expected[row, begin:end] = silence
        for begin, end in mel[row]:
            expected[row, :, begin:end] = silence[begin:end]
    assert features.dtype == getattr(torch, dtype)
    torch.testing.assert_close(features.float(), expected, rtol=1e-2 if dtype != "float32" else 1e-5, atol=1e-3)
    leaf = waveform.clone().requires_grad_()
    everything = torch.tensor([[[0, 99]]] * 2)
    (gradient,) = torch.autograd.grad(log_mel(leaf, None, spec, masks=(everything, None))[0].float().sum(), leaf)
    assert not gradient.any()


def test_the_operator_is_registered_properly() -> None:
    lengths, offsets = torch.tensor([1500, 700]), torch.tensor([0, 800])
    spans = torch.tensor([[[1, 3]], [[0, 2]]])
    assert operator._spec_of(PRESETS["ast"].key) == PRESETS["ast"]
    for waveform in (noise(2, 1500).requires_grad_(), noise(2, 1500), (noise(2, 1500) * 3e4).short()):
        for options in ((lengths, offsets, spans, spans), (None, None, None, None)):
            torch.library.opcheck(torch.ops.fastclap.log_mel, (waveform, *options, PRESETS["whisper"].key, "auto"))
