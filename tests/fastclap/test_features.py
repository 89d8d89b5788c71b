"""`LogMel`: every preset against the library it comes from, on synthetic and on real speech, and the module's manners.

"No worse than the origin" is measured against float64: on each signal our root mean square error may be 1.5 times that
of the origin's own float32 FFT path. The transform is the same, so the two errors have one distribution and the factor
leaves room for the luck of rounding on a single signal. Where a signal has bands 100 dB and more below its peak (a pure
tone, a ramp), the value of those bands is rounding in every float32 transform; there only this rule can hold.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import librosa
import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor
from torchaudio.compliance import kaldi
from transformers import ASTFeatureExtractor, ClapFeatureExtractor, WhisperFeatureExtractor

from fastclap.features import PRESETS, LogMel, SpecAugment
from fastclap.kernels.log_mel.torch_engine import log_mel_reference

pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter")

Origin = Callable[[Tensor], Tensor]  # [samples] -> [frames, mels]


def whisper(n_mels: int) -> Origin:
    extractor = WhisperFeatureExtractor(feature_size=n_mels)
    return lambda x: (
        extractor(x.numpy(), sampling_rate=16000, padding="do_not_pad", return_tensors="pt").input_features[0].T
    )


def fbank(**options: object) -> Origin:
    return lambda x: kaldi.fbank(x[None], **options)


def stft_decibels(sampling_rate: int, hop_length: int, htk: bool, bank_rate: int) -> Origin:
    """LAION-CLAP and MS-CLAP as published: a float32 STFT, librosa's or torchaudio's bank, decibels without top_db."""
    bank = librosa.filters.mel(
        sr=bank_rate, n_fft=1024, n_mels=64, fmin=50, fmax=14000, htk=htk, norm=None if htk else "slaney"
    )
    spectrogram = torchaudio.transforms.Spectrogram(1024, hop_length=hop_length)
    return lambda x: torchaudio.transforms.AmplitudeToDB("power")(torch.from_numpy(bank) @ spectrogram(x)).T


def clap(truncation: str) -> Origin:
    extractor = ClapFeatureExtractor(frequency_min=50)
    return lambda x: extractor(
        x.numpy(), truncation=truncation, padding="pad", max_length=len(x), sampling_rate=48000, return_tensors="pt"
    ).input_features[0, 0]


def ast() -> Origin:
    extractor = ASTFeatureExtractor()
    return lambda x: extractor(x.numpy(), sampling_rate=16000, return_tensors="pt").input_values[0]


def beats(x: Tensor) -> Tensor:
    return (kaldi.fbank(x[None] * 2**15, num_mel_bins=128) - 15.41663) / (2 * 6.55582)


def clsp(x: Tensor) -> Tensor:
    return kaldi.fbank(x[None], num_mel_bins=128, snip_edges=False, high_freq=-400.0)


def melspectrogram(**options: object) -> Origin:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its defaults leave mel filters without a bin
        transform = torchaudio.transforms.MelSpectrogram(**options)
    return lambda x: transform(x).clamp(min=1e-10).log().T


# name: (front-end, its origin computed with a float32 FFT)
FRONT_ENDS: dict[str, tuple[LogMel, Origin]] = {
    "whisper": (LogMel("whisper"), whisper(80)),
    "whisper-128": (LogMel("whisper", n_mels=128), whisper(128)),
    "kaldi": (LogMel("kaldi"), fbank(num_mel_bins=80)),
    "kaldi-no-snip": (LogMel("kaldi", framing="no_snip_edges"), fbank(num_mel_bins=80, snip_edges=False)),
    "kaldi-8k": (
        LogMel(
            "kaldi", window="hann_symmetric", sampling_rate=8000, n_fft=256, win_length=200, hop_length=80, n_mels=23
        ),
        fbank(window_type="hanning", sample_frequency=8000.0),
    ),
    "kaldi-no-dc-no-preemphasis": (
        LogMel("kaldi", remove_dc=False, preemphasis=0.0, power=1.0),
        fbank(num_mel_bins=80, remove_dc_offset=False, preemphasis_coefficient=0.0, use_power=False),
    ),
    "clap": (LogMel("clap"), stft_decibels(48000, 480, htk=False, bank_rate=48000)),
    "clap-fusion": (LogMel("clap-fusion"), stft_decibels(48000, 480, htk=True, bank_rate=48000)),
    "ms-clap": (
        LogMel("clap", sampling_rate=44100, hop_length=320, mel_sampling_rate=32000),
        stft_decibels(44100, 320, htk=False, bank_rate=32000),
    ),
    "ast": (LogMel("ast"), ast()),
    "beats": (LogMel("beats"), beats),
    "clsp": (LogMel("clsp"), clsp),
    "torchaudio": (LogMel("torchaudio"), melspectrogram()),
    "torchaudio-slaney": (
        LogMel("torchaudio", n_fft=2048, win_length=800, mel_scale="slaney", mel_norm="slaney", n_mels=80, f_min=80.0),
        melspectrogram(
            n_fft=2048, win_length=800, hop_length=200, mel_scale="slaney", norm="slaney", n_mels=80, f_min=80.0
        ),
    ),
}
every_front_end = pytest.mark.parametrize("name", FRONT_ENDS)


def signals(sampling_rate: int) -> dict[str, Tensor]:
    """About a second of each kind; the voice is a vibrato harmonic series over weak noise."""
    samples = sampling_rate + 37
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(samples, generator=generator)
    t = torch.arange(samples, dtype=torch.float64) / sampling_rate
    phase = 2 * torch.pi * 120 * t + 20 / 3 * torch.sin(2 * torch.pi * 3 * t)
    voice = sum(torch.sin(k * phase) / k for k in range(1, 30)) * 0.05 * (1 + torch.sin(2 * torch.pi * 4 * t))
    clicks = torch.zeros(samples)
    clicks[samples // 3], clicks[samples // 2] = 1.0, -1.0
    return {
        "voice": voice.float() + 1e-3 * white,
        "noise": 0.1 * white,
        "faint noise": 1e-4 * white,
        "noise on an offset": 0.5 + 0.01 * white,
        "clicks": clicks,
        "silence": torch.zeros(samples),
        "full-scale tone": torch.sin(
            2 * torch.pi * 997 * t
        ).float(),  # at 1000 Hz all frames would have one luck of rounding
        "ramp": (t / t[-1]).float(),
    }


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def check_against_origin(name: str, kind: str, clip: Tensor, agreement: float) -> None:
    front_end, origin = FRONT_ENDS[name]
    features, frame_lengths = front_end(clip[None])
    expected = origin(clip)
    assert features[0].shape == expected.shape
    truth, _ = log_mel_reference(clip[None], None, front_end.spec)
    frames = int(frame_lengths)
    ours, theirs = features[0, :frames] - truth[0, :frames], expected[:frames] - truth[0, :frames]
    assert rms(ours) <= 1.5 * rms(theirs) + 1e-6, f"{kind}: rms error {rms(ours):.1e}, the origin's {rms(theirs):.1e}"
    difference = features[0] - expected
    assert rms(difference) < agreement and difference.abs().max() < 200 * agreement, kind


@every_front_end
def test_equals_its_origin_and_is_no_less_accurate(name: str) -> None:
    for kind, clip in signals(FRONT_ENDS[name][0].sampling_rate).items():
        ill_conditioned = kind in ("full-scale tone", "ramp")
        check_against_origin(name, kind, clip, agreement=float("inf") if ill_conditioned else 5e-5)


@pytest.mark.parametrize(("preset", "truncation"), [("clap", "rand_trunc"), ("clap-fusion", "fusion")])
def test_clap_equals_the_extractor_of_transformers(preset: str, truncation: str) -> None:
    front_end, origin = LogMel(preset), clap(truncation)  # its FFT is in float64, so it has no float32 error to match
    for kind, clip in signals(48000).items():
        if kind not in ("full-scale tone", "ramp"):
            difference = front_end(clip[None])[0][0] - origin(clip)
            assert rms(difference) < 1e-4 and difference.abs().max() < 5e-3, kind  # decibels


def test_whisper_equals_the_extractor_of_transformers_on_its_thirty_seconds() -> None:
    voice = signals(16000)["voice"]
    expected = WhisperFeatureExtractor()(voice.numpy(), sampling_rate=16000, return_tensors="pt").input_features
    features, _ = LogMel("whisper")(torch.nn.functional.pad(voice, (0, 480000 - len(voice)))[None])
    assert features.shape == (1, 3000, 80)
    assert (features.mT - expected).abs().max() < 1e-4


def test_ast_cuts_long_clips_and_fills_short_ones() -> None:
    extractor, front_end = ASTFeatureExtractor(), LogMel("ast")
    noise = 0.1 * torch.randn(200000, generator=torch.Generator().manual_seed(0))
    for samples, frames in [(200000, 1024), (163840 + 240, 1024), (163840 + 239, 1023), (16000, 98)]:
        expected = extractor(noise[:samples].numpy(), sampling_rate=16000, return_tensors="pt").input_values
        features, frame_lengths = front_end(noise[None, :samples])
        assert features.shape == (1, 1024, 128) and frame_lengths.tolist() == [frames]
        assert (features - expected).abs().max() < 1e-4
        assert (features[:, frames:] - front_end.silence).abs().sum() == 0


def speech_clips() -> list[Path]:
    folder = os.environ.get("FASTCLAP_TEST_DATA")
    if not folder:
        pytest.skip("FASTCLAP_TEST_DATA is not set: no real speech")
    clips = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".flac", ".wav"))
    return clips[:: max(1, len(clips) // 4)][:4]


@every_front_end
def test_equals_its_origin_on_real_speech(name: str) -> None:
    import soundfile
    import soxr

    for path in speech_clips():
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
        target = FRONT_ENDS[name][0].sampling_rate
        clip = soxr.resample(audio[: rate * 2].mean(axis=1), rate, target)
        # What was recorded at a lower rate has nothing but rounding in its upper bands.
        agreement = 5e-4 if rate >= target else float("inf")
        check_against_origin(name, path.name, torch.from_numpy(clip), agreement)


# --- the module -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_attributes(preset: str) -> None:
    front_end = LogMel(preset, n_mels=40)
    assert front_end.preset == preset and front_end.overrides == {"n_mels": 40}
    assert front_end.n_mels == 40
    assert front_end.sampling_rate == PRESETS[preset].sampling_rate
    assert front_end.hop_length == PRESETS[preset].hop_length
    assert repr(front_end) == f"LogMel('{preset}', n_mels=40)"
    assert not front_end.state_dict() and not list(front_end.parameters())
    lengths = torch.tensor([0, 1, 5000, 16000])
    _, frame_lengths = front_end(torch.zeros(4, 16000), lengths)
    assert torch.equal(front_end.frame_lengths(lengths), frame_lengths)


def test_a_front_end_survives_json_pickle_and_deepcopy() -> None:
    front_end = LogMel("clsp", n_mels=64, f_max=None, framing="snip_edges", remove_dc=False)
    waveform = 0.1 * torch.randn(2, 4000)
    expected, _ = front_end(waveform)
    restored = LogMel(front_end.preset, **json.loads(json.dumps(front_end.overrides)))
    for copied in (restored, pickle.loads(pickle.dumps(front_end)), copy.deepcopy(front_end), front_end.to("cpu")):
        assert copied.spec == front_end.spec
        assert torch.equal(copied(waveform)[0], expected)


def test_half_precision_models_still_get_float32_features() -> None:
    stack = torch.nn.Sequential(LogMel("kaldi")).half()
    assert stack[0](torch.zeros(1, 1000))[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("wisper", {}, "unknown preset 'wisper': choose one of whisper, kaldi"),
        ("whisper", {"n_mel": 80}, "no option 'n_mel'; did you mean 'n_mels'"),
        ("kaldi", {"vtln": 1.0}, "no option 'vtln': choose among sampling_rate"),
        ("kaldi", {"n_mels": "80"}, "n_mels='80': expected int"),
        ("clap", {"sampling_rate": 16000}, "f_max=14000.0 Hz: above half the sampling rate of 16000 Hz"),
    ],
)
def test_wrong_overrides_are_named(preset: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogMel(preset, **overrides)


def test_warns_of_mel_filters_without_a_bin() -> None:
    with pytest.warns(UserWarning, match=r"mel filters contain no DFT bin: use fewer n_mels or a longer n_fft"):
        LogMel("whisper", n_mels=256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LogMel("ast")  # has such filters in the original
        LogMel("whisper", n_mels=128)


def test_dither_is_left_out_in_eval_mode() -> None:
    front_end = LogMel("kaldi", dither=1e-3)
    waveform = torch.zeros(1, 4000)
    assert not torch.equal(front_end(waveform)[0], front_end(waveform)[0])
    front_end.eval()
    assert torch.equal(front_end(waveform)[0], LogMel("kaldi")(waveform)[0])


def test_numpy_style_lengths_are_taken() -> None:
    waveform = 0.1 * torch.randn(2, 3000)
    a, _ = LogMel("kaldi")(waveform, torch.tensor([3000, 1000]))
    b, _ = LogMel("kaldi")(waveform, np.array([3000, 1000]))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "front_end",
    [LogMel("whisper"), LogMel("kaldi", dtype="bfloat16", mean=[0.5] * 80), LogMel("clsp", dither=1e-3)],
    ids=repr,
)
def test_compiles_to_one_graph_with_the_operator(front_end: LogMel) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(front_end, fullgraph=True, backend=keep)
    lengths = torch.tensor([3000, 1000])
    for samples in (3000, 4000):
        waveform = (0.1 * torch.randn(2, samples)).requires_grad_()
        torch.manual_seed(0)
        features, frame_lengths = compiled(waveform, lengths)
        (gradient,) = torch.autograd.grad(features.float().square().sum(), waveform)
        torch.manual_seed(0)
        expected, expected_lengths = front_end(waveform, lengths)
        (expected_gradient,) = torch.autograd.grad(expected.float().square().sum(), waveform)
        # The eager gradient is torch's, and the operator may compute with another engine.
        rounding = 1e-2 if features.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(features, expected, rtol=rounding, atol=1e-3)
        torch.testing.assert_close(
            gradient, expected_gradient, rtol=1e-2, atol=1e-2 * float(expected_gradient.abs().max())
        )
        assert torch.equal(frame_lengths, expected_lengths)
    assert all("fastclap.log_mel" in graph.code for graph in graphs)


def test_spec_augment_masks_each_clip_within_its_own_frames() -> None:
    augment = SpecAugment(time_masks=3, time_width=0.3, mel_masks=2, mel_width=9)
    front_end = LogMel("kaldi", spec_augment=augment)
    waveform, lengths = 0.1 * torch.randn(64, 16000), torch.tensor([16000, 4000] * 32)
    plain, frame_lengths = LogMel("kaldi")(waveform, lengths)
    torch.manual_seed(0)
    features, _ = front_end(waveform, lengths)
    torch.manual_seed(0)
    assert torch.equal(front_end(waveform, lengths)[0], features)
    time, mel = augment.masks(frame_lengths, 80)
    assert time is not None and mel is not None and time.shape == (64, 3, 2) and mel.shape == (64, 2, 2)
    widths = time[..., 1] - time[..., 0]
    assert (widths >= 0).all() and (time[..., 0] >= 0).all() and (time[..., 1] <= frame_lengths[:, None]).all()
    assert (widths[0::2] <= 0.3 * frame_lengths[0]).all() and (widths[1::2] <= 0.3 * frame_lengths[1]).all()
    assert widths[0::2].float().mean() > 2 * widths[1::2].float().mean()
    assert (mel[..., 1] - mel[..., 0]).max() <= 9 and mel[..., 1].max() <= 80
    hidden = features != plain
    assert 0.05 < hidden.float().mean() < 0.6
    assert (features[hidden] == front_end.silence).all()
    front_end.eval()
    assert torch.equal(front_end(waveform, lengths)[0], plain)
    with pytest.raises(ValueError, match="time_width=2"):
        SpecAugment(time_width=2)


def test_silence_of_each_mel() -> None:
    front_end = LogMel("kaldi", n_mels=3, mean=[1.0, 2.0, 3.0], std=2.0)
    log_floor = front_end.spec.log_padding
    assert front_end.silence == pytest.approx(((log_floor - 1) / 2, (log_floor - 2) / 2, (log_floor - 3) / 2))
    features, frame_lengths = front_end(torch.zeros(1, 4000), torch.tensor([1000]))
    torch.testing.assert_close(features[0, frame_lengths:], torch.tensor(front_end.silence).expand(19, 3))
