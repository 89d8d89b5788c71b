"""The front-end drop-ins: transformers' extractors, torchlibrosa's modules and LAION-CLAP's towers, patched and not.

A value may be off by the rounding of a float32 FFT. Each comparison also looks at whether fastclap's log-mel was
called: what is left to the client must be equal to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import ASTFeatureExtractor, ClapFeatureExtractor, WhisperFeatureExtractor

from fastclap.drop_in import patch, torchlibrosa, transformers_features

Sound = np.ndarray


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The specs that fastclap's log-mel, or its float64 form for ClapFeatureExtractor, was called with."""
    specs: list[Any] = []
    own, in_float64 = torchlibrosa.log_mel, transformers_features.decibels_in_float64

    def counted(waveform: Tensor, lengths: Tensor | None, spec: Any) -> tuple[Tensor, Tensor]:
        specs.append(spec)
        return own(waveform, lengths, spec)

    def counted_in_float64(waveform: Sound, spec: Any) -> Sound:
        specs.append(spec)
        return in_float64(waveform, spec)

    for module in (torchlibrosa, transformers_features):
        monkeypatch.setattr(module, "log_mel", counted)
    monkeypatch.setattr(transformers_features, "decibels_in_float64", counted_in_float64)
    yield specs


def sound(samples: int, seed: int = 0, scale: float = 0.1) -> Sound:
    """A few harmonics over noise."""
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(seed)).numpy()
    t = np.arange(samples) / 16000
    return (scale * (noise + sum(np.sin(2 * np.pi * 150 * k * t) / k for k in range(1, 9)))).astype(np.float32)


def outcome(call: Callable[[], Any]) -> Any:
    np.random.seed(0)
    torch.manual_seed(0)
    return call()


def arrays(value: Any) -> list[np.ndarray]:
    return [np.asarray(item) for item in value]


def same(theirs: Any, ours: Any, tol: float) -> None:
    """Equal keys, types, dtypes and shapes, values to `tol`; masks and flags equal."""
    assert list(theirs) == list(ours)
    for key in theirs:
        assert type(theirs[key]) is type(ours[key]), key
        for a, b in zip(arrays(theirs[key]), arrays(ours[key]), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape, key
            if "input" not in key:
                assert np.array_equal(a, b), key
            else:
                assert np.abs(a.astype(np.float64) - b).max() <= tol, key
        if isinstance(theirs[key], Tensor):
            assert theirs[key].is_contiguous() == ours[key].is_contiguous(), key


def compare(calls: list[Any], call: Callable[[], Any], tol: float, ours: bool = True) -> Any:
    theirs = outcome(call)
    assert not calls
    with patch("transformers_features"):
        result = outcome(call)
    assert bool(calls) == ours
    same(theirs, result, tol if ours else 0.0)
    assert list(outcome(call)) == list(theirs)
    calls.clear()
    return result


# ---------------------------------------------------------------------------------------------------------------------
# transformers
# ---------------------------------------------------------------------------------------------------------------------

CLIPS = [sound(16000), sound(9001, 1), sound(48123, 2)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "longest", "return_attention_mask": True},
        {"padding": "longest", "return_attention_mask": True, "do_normalize": True},
        {"padding": "longest", "pad_to_multiple_of": 1000, "return_attention_mask": True},
        {"max_length": 20000, "truncation": True, "return_attention_mask": True},
        {"max_length": 20001, "padding": "max_length"},
    ],
)
@pytest.mark.parametrize("tensors", ["pt", "np", None])
def test_whisper(options: dict[str, Any], tensors: str | None, calls: list[Any]) -> None:
    extractor = WhisperFeatureExtractor(chunk_length=4)
    compare(calls, lambda: extractor(CLIPS, sampling_rate=16000, return_tensors=tensors, **options), 5e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"feature_size": 128},
        {"hop_length": 200, "n_fft": 512},
        {"sampling_rate": 24000, "chunk_length": 3},
        {"dither": 1e-3},  # the same noise, from torch's generator
        {"padding_value": 0.1},
    ],
)
def test_whisper_with_other_numbers(arguments: dict[str, Any], calls: list[Any]) -> None:
    extractor = WhisperFeatureExtractor(**{"chunk_length": 4, **arguments})
    compare(calls, lambda: extractor(CLIPS, sampling_rate=extractor.sampling_rate, return_tensors="pt"), 5e-5)


@pytest.mark.parametrize(
    "raw",
    [
        CLIPS[0],
        CLIPS[0].astype(np.float64),
        CLIPS[0].tolist(),
        (CLIPS[0] * 32768).astype(np.int16),  # not scaled there, so not here
        np.stack([CLIPS[0], CLIPS[0][::-1]]),
        [CLIPS[1].tolist(), CLIPS[0].tolist()],
    ],
    ids=["float32", "float64", "list", "int16", "matrix", "lists"],
)
def test_kinds_of_input(raw: Any, calls: list[Any]) -> None:
    whisper = WhisperFeatureExtractor(chunk_length=2)
    compare(calls, lambda: whisper(raw, sampling_rate=16000, return_tensors="np"), 5e-5)
    clap = ClapFeatureExtractor(max_length_s=1)
    for truncation in ("fusion", "rand_trunc"):
        compare(calls, lambda: clap(raw, sampling_rate=48000, truncation=truncation), 5e-3)  # noqa: B023
    if not (isinstance(raw, np.ndarray) and raw.dtype == np.int16):  # which AST's extractor cannot take
        compare(calls, lambda: ASTFeatureExtractor()(raw, sampling_rate=16000, return_tensors="np"), 5e-5)


def test_whisper_device_is_where_it_is_computed(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device] = []
    counted = transformers_features.log_mel
    noting = lambda x, *rest: (devices.append(x.device), counted(x, *rest))[1]  # noqa: E731
    monkeypatch.setattr(transformers_features, "log_mel", noting)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = WhisperFeatureExtractor(chunk_length=2)
    compare(calls, lambda: extractor(CLIPS[0], sampling_rate=16000, return_tensors="pt", device=device), 1e-4)
    assert [found.type for found in devices] == [device]


def test_whisper_leaves_to_the_client_what_is_not_its_front_end(calls: list[Any]) -> None:
    extractor = WhisperFeatureExtractor(chunk_length=2)
    extractor.mel_filters = extractor.mel_filters * 2
    compare(calls, lambda: extractor(CLIPS[0], sampling_rate=16000, return_tensors="pt"), 0, ours=False)
    odd = WhisperFeatureExtractor(chunk_length=2, n_fft=401)
    compare(calls, lambda: odd(CLIPS[0], sampling_rate=16000, return_tensors="pt"), 0, ours=False)
    plain = WhisperFeatureExtractor()
    with patch("transformers_features"), pytest.raises(RuntimeError, match=r"[Pp]adding size"):  # torch.stft's own
        plain(CLIPS[0][:150], sampling_rate=16000, padding="do_not_pad")
    assert not calls


def test_whisper_with_a_nan(calls: list[Any]) -> None:
    bad = [CLIPS[0].copy(), CLIPS[1]]
    bad[0][8000] = np.nan
    extractor = WhisperFeatureExtractor(chunk_length=2)
    theirs = extractor(bad, sampling_rate=16000, return_tensors="pt").input_features
    with patch("transformers_features"):
        ours = extractor(bad, sampling_rate=16000, return_tensors="pt").input_features
    assert torch.equal(theirs.isnan(), ours.isnan()) and ours[0].isnan().all() and not ours[1].isnan().any()


@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
def test_clap(truncation: str, padding: str, calls: list[Any]) -> None:
    """Longer than, as long as, just longer than and shorter than max_length; the crops come from NumPy's generator."""
    extractor = ClapFeatureExtractor(max_length_s=1, frequency_min=50)
    clips = [sound(samples, samples) for samples in (100000, 48000, 48100, 20001, 300)]
    options = {"truncation": truncation, "padding": padding, "sampling_rate": 48000}
    result = compare(calls, lambda: extractor(clips, return_tensors="pt", **options), 5e-3)
    assert result.input_features.shape == (5, 4 if truncation == "fusion" else 1, 101, 64)
    compare(calls, lambda: extractor(clips[:1], max_length=24000, **options), 5e-3)


@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
def test_clap_computes_in_float64_as_the_client(truncation: str, calls: list[Any]) -> None:
    """A pure tone: around it, a float32 transform is off by whole decibels."""
    tone = np.sin(2 * np.pi * 997.0 * np.arange(48000) / 48000)
    extractor = ClapFeatureExtractor(max_length_s=1, frequency_min=50)
    compare(calls, lambda: extractor(tone, sampling_rate=48000, truncation=truncation, return_tensors="pt"), 1e-5)


def test_clap_with_other_numbers_and_other_banks(calls: list[Any]) -> None:
    clip = sound(40000)
    other = ClapFeatureExtractor(
        sampling_rate=44100, hop_length=320, feature_size=64, frequency_min=20, frequency_max=20000, max_length_s=1
    )
    compare(calls, lambda: other(clip, sampling_rate=44100), 5e-3)
    extractor = ClapFeatureExtractor(max_length_s=1)
    extractor.mel_filters = extractor.mel_filters**2
    compare(calls, lambda: extractor(clip, sampling_rate=48000, truncation="fusion"), 0, ours=False)
    compare(calls, lambda: extractor(clip, sampling_rate=48000, truncation="rand_trunc"), 5e-3)
    silence = np.zeros(40000, np.float32)
    compare(calls, lambda: ClapFeatureExtractor()(silence, sampling_rate=48000), 0.0)


@pytest.mark.parametrize(
    "arguments", [{}, {"do_normalize": False}, {"max_length": 64, "num_mel_bins": 64, "mean": 1.0}]
)
@pytest.mark.parametrize("tensors", ["pt", "np", None])
def test_ast(arguments: dict[str, Any], tensors: str | None, calls: list[Any]) -> None:
    extractor = ASTFeatureExtractor(**arguments)
    compare(calls, lambda: extractor(CLIPS, sampling_rate=16000, return_tensors=tensors), 5e-4)


def test_ast_at_another_rate_and_left_to_the_client(calls: list[Any]) -> None:
    extractor = ASTFeatureExtractor(sampling_rate=22050, max_length=200)
    compare(calls, lambda: extractor(CLIPS[0], sampling_rate=22050, return_tensors="pt"), 1e-4)
    extractor = ASTFeatureExtractor()
    with (
        patch("transformers_features"),
        pytest.raises(AssertionError, match="choose a window size"),
    ):  # torchaudio's own
        extractor(CLIPS[0][:399], sampling_rate=16000)
    assert not calls
    extractor.mel_filters = np.zeros((257, 128))  # as where torchaudio is absent: laid out for 16 kHz
    compare(calls, lambda: extractor(CLIPS[0], sampling_rate=16000, return_tensors="pt"), 1e-4)
    extractor.sampling_rate = 8000
    compare(calls, lambda: extractor(CLIPS[0], sampling_rate=8000, return_tensors="pt"), 0, ours=False)


def test_ast_without_torchaudio_gives_the_same(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.audio_spectrogram_transformer import (
        feature_extraction_audio_spectrogram_transformer as own,
    )

    monkeypatch.setattr(own, "is_speech_available", lambda: False)
    extractor = ASTFeatureExtractor()
    assert hasattr(extractor, "mel_filters")
    compare(calls, lambda: extractor(CLIPS[:1], sampling_rate=16000, return_tensors="pt"), 1e-3)


def test_extractors_patch_names_undo_and_serialise(calls: list[Any]) -> None:
    before = [cls().to_dict() for cls in (WhisperFeatureExtractor, ClapFeatureExtractor, ASTFeatureExtractor)]
    patched = patch("transformers_features")
    try:
        assert sorted(name.split(".")[-2] for name in patched.replaced) == [
            "ASTFeatureExtractor", "ClapFeatureExtractor", "WhisperFeatureExtractor",
        ]  # fmt: skip
        assert patch("transformers_features").replaced == ()
        for cls, theirs in zip(
            (WhisperFeatureExtractor, ClapFeatureExtractor, ASTFeatureExtractor), before, strict=True
        ):
            assert set(copy.deepcopy(cls()).to_dict()) == set(theirs)
    finally:
        patched.undo()
    assert WhisperFeatureExtractor._torch_extract_fbank_features.__module__.startswith("transformers")


# ---------------------------------------------------------------------------------------------------------------------
# torchlibrosa, and LAION-CLAP on it
# ---------------------------------------------------------------------------------------------------------------------

# (n_fft, hop, rate of the bank, fmin, fmax, mels): LAION-CLAP's configurations, MS-CLAP's, and plain ones
STAGES = {
    "laion": (1024, 480, 48000, 50, 14000, 64),
    "laion win 1536": (1536, 360, 48000, 50, 18000, 64),
    "laion 8k": (1024, 480, 48000, 50, 8000, 64),
    "ms-clap": (1024, 320, 32000, 50, 14000, 64),
    "cnn14 16k": (512, 160, 16000, 50, 8000, 64),
    "librosa": (2048, 512, 22050, 0, None, 128),
}


def stage(name: str = "laion", spectrogram: dict[str, Any] | None = None, **options: Any) -> nn.Sequential:
    stft = pytest.importorskip("torchlibrosa.stft", reason="torchlibrosa: not installed")
    n_fft, hop, rate, f_min, f_max, mels = STAGES[name]
    return nn.Sequential(
        stft.Spectrogram(n_fft, **{"hop_length": hop, **(spectrogram or {})}),
        stft.LogmelFilterBank(
            **{"sr": rate, "n_fft": n_fft, "n_mels": mels, "fmin": f_min, "fmax": f_max, "top_db": None, **options}
        ),
    )


def waveform(samples: int = 12000) -> Tensor:
    return torch.from_numpy(np.stack([sound(samples), sound(samples, 1)]))


def run(front_end: nn.Module, x: Tensor, calls: list[Any], ours: bool = True) -> tuple[Tensor, Tensor]:
    theirs = front_end(x)
    assert not calls
    with patch("torchlibrosa"):
        result = front_end(x)
    assert bool(calls) == ours
    calls.clear()
    assert type(result) is Tensor and result.shape == theirs.shape and result.dtype == theirs.dtype
    if not ours:
        assert torch.equal(theirs, result)
    return theirs, result


@pytest.mark.parametrize("name", STAGES)
def test_torchlibrosa(name: str, calls: list[Any]) -> None:
    for samples in (12000, STAGES[name][0] // 2 + 1):
        theirs, ours = run(stage(name), waveform(samples), calls)
        assert (theirs - ours).abs().max() < 5e-3, name  # decibels


@pytest.mark.parametrize(
    "spectrogram, options",
    [
        ({"power": 1.0}, {}),
        ({"win_length": 800}, {}),
        ({"hop_length": None}, {}),
        ({}, {"ref": 2.0}),
        ({}, {"amin": 1e-5}),
        ({}, {"ref": 1e-12, "amin": 1e-7}),
    ],
)
def test_torchlibrosa_with_other_numbers(spectrogram: Any, options: Any, calls: list[Any]) -> None:
    theirs, ours = run(stage("laion", spectrogram, **options), waveform(), calls)
    assert (theirs - ours).abs().max() < 5e-3


@pytest.mark.parametrize(
    "spectrogram, options",
    [
        ({"window": "hamming"}, {}),
        ({"center": False}, {}),
        ({"pad_mode": "constant"}, {}),
        ({"power": 3.0}, {}),
        ({}, {"top_db": 80.0}),
        ({}, {"is_log": False}),
        ({}, {"freeze_parameters": False}),
        ({}, {"fmin": 50.3}),  # not on half a Hz
        ({}, {"fmax": 900}),  # no logarithmic part
    ],
)
def test_torchlibrosa_leaves_to_the_client(spectrogram: Any, options: Any, calls: list[Any]) -> None:
    run(stage("laion", spectrogram, **options), waveform(), calls, ours=False)


def test_torchlibrosa_leaves_weights_that_were_changed(calls: list[Any]) -> None:
    front_end = stage()
    run(front_end, waveform(), calls)
    state = {name: tensor.clone() for name, tensor in front_end.state_dict().items()}
    for name in state:
        front_end.load_state_dict({**state, name: state[name] * 1.01})
        run(front_end, waveform(), calls, ours=False)
        front_end.load_state_dict(state)
        run(front_end, waveform(), calls)
    front_end[1].power_to_db = lambda x: x + 1
    run(front_end, waveform(), calls, ours=False)
    run(stage().double(), waveform().double(), calls, ours=False)


def test_torchlibrosa_bank_and_transform_of_different_lengths(calls: list[Any]) -> None:
    front_end = nn.Sequential(stage("cnn14 16k")[0], stage("laion")[1])
    with patch("torchlibrosa"), pytest.raises(RuntimeError, match=r"257.* 513|multiplied"):
        front_end(waveform())


def test_torchlibrosa_gradients(calls: list[Any]) -> None:
    front_end, x = stage(), waveform().requires_grad_()
    weight = torch.randn(2, 1, 26, 64, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad((front_end(x) * weight).sum(), x)
    with patch("torchlibrosa"):
        (found,) = torch.autograd.grad((front_end(x) * weight).sum(), x)
        assert calls
        with torch.no_grad():
            spectrogram = front_end[0](x)
        assert not front_end[1](spectrogram).requires_grad and not front_end(x.detach()).requires_grad
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_the_spectrogram_itself_is_still_a_tensor(calls: list[Any]) -> None:
    front_end, x = stage(), waveform().requires_grad_()
    theirs = front_end[0](x)
    (gradient,) = torch.autograd.grad(theirs.sum(), x)
    with patch("torchlibrosa"):
        assert isinstance(front_end[0](x), Tensor) and front_end[0](x).shape == theirs.shape
        assert torch.equal(front_end[0](x), theirs) and torch.equal(front_end[0](x) + 1, theirs + 1)
        assert torch.equal(front_end[0](x)[:, 0], theirs[:, 0]) and front_end[0](x).requires_grad
        assert torch.equal(torch.cat([front_end[0](x), theirs])[:2], theirs)
        assert front_end[0](x).dtype == theirs.dtype and "tensor" in repr(front_end[0](x))
        (found,) = torch.autograd.grad(front_end[0](x).sum(), x)
        assert torch.equal(found, gradient)
        changed = front_end[0](x.detach())
        changed.mul_(4)
        assert torch.equal(front_end[1](changed), front_end[1](4 * theirs.detach())) and not calls
        kept: list[Tensor] = []
        handle = front_end[0].register_forward_hook(lambda module, args, output: kept.append(output))
        assert (front_end(x) - front_end[1](theirs)).abs().max() < 5e-3 and calls
        assert torch.equal(kept[0], theirs)
        handle.remove()


def test_a_waveform_that_changed_before_its_spectrogram_was_used_is_an_error(calls: list[Any]) -> None:
    front_end, x = stage(), waveform()
    with patch("torchlibrosa"):
        spectrogram = front_end[0](x)
        x.mul_(2)
        for use in (front_end[1], torch.sum):
            with pytest.raises(RuntimeError, match="written to before"):
                use(spectrogram)
    assert not calls


def test_torchlibrosa_inside_other_transforms(calls: list[Any]) -> None:
    front_end, x = stage(), waveform()
    expected = front_end(x)
    with patch("torchlibrosa"):
        with torch.inference_mode():
            assert (front_end(x) - expected).abs().max() < 5e-3 and calls
        with torch.autocast("cpu", torch.bfloat16):
            assert front_end(x).dtype == torch.float32 and (front_end(x) - expected).abs().max() < 5e-3
        calls.clear()
        mapped = torch.func.vmap(lambda clip: front_end(clip[None])[0])(x)
        assert (mapped - expected).abs().max() < 5e-3 and not calls
        traced = torch.jit.trace(front_end, x, check_trace=False)
        assert torch.equal(traced(x), expected) and not calls


def laion_model(kind: str) -> nn.Module:
    pytest.importorskip("laion_clap", reason="laion_clap: not installed")
    pytest.importorskip("torchlibrosa", reason="torchlibrosa: not installed")
    if kind == "pann":
        from laion_clap.clap_module.pann_model import Cnn6

        return Cnn6(48000, 1024, 480, 64, 50, 14000, 10, False, "None").eval()
    from laion_clap.clap_module.htsat import HTSAT_Swin_Transformer

    class Config:
        sample_rate, window_size, hop_size, mel_bins, fmin, fmax = 48000, 1024, 480, 64, 50, 14000
        clip_samples, class_num, enable_fusion, fusion_type = 480000, 10, False, "None"

    return HTSAT_Swin_Transformer(
        spec_size=256, patch_size=4, patch_stride=(4, 4), num_classes=10, embed_dim=16, depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4], window_size=8, config=Config(),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("kind", ["htsat", "pann"])
def test_laion_clap_towers(kind: str, calls: list[Any]) -> None:
    model = laion_model(kind)
    x = torch.from_numpy(np.stack([sound(480000), sound(480000, 1)]))

    def embed() -> Tensor:
        found = model(x) if kind == "pann" else model({"waveform": x}, device=torch.device("cpu"))
        return found["embedding"].detach()

    theirs = embed()
    assert not calls
    with patch("torchlibrosa"):
        ours = embed()
    assert len(calls) == 1
    assert (theirs - ours).norm() < 1e-4 * theirs.norm()
