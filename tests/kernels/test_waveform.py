"""Normalised waveforms: the torch engine against the definition, and that against what the towers have always done."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fastclap.kernels.waveform import normalize_waveform, normalize_waveform_reference
from fastclap.testing import assert_close_rel
from tests.kernels.waveform_cases import SHAPES, clips, combinations


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_combination_matches_float64(shape: tuple[int, int, dict[str, int]]) -> None:
    batch, samples, width = shape
    audio, options = clips(batch, samples)
    scaled = audio / 32768
    for given, waveform in itertools.product(combinations(options), (audio, scaled, scaled.half(), scaled.double())):
        expected = normalize_waveform_reference(waveform, **given, **width)
        out = normalize_waveform(waveform, **given, **width)
        assert out.dtype == torch.float32
        assert_close_rel(f"{sorted(given)} {waveform.dtype}", expected, out, 1e-6)
        assert torch.equal(normalize_waveform(waveform, **given, **width, dtype=torch.bfloat16), out.bfloat16())


def test_meaning_of_each_argument() -> None:
    audio = torch.tensor([[8, 2, 4, 6, 100], [1, 3, -100, -100, -100]], dtype=torch.int16) * 256
    lengths, offsets = torch.tensor([3, 2]), torch.tensor([1, 0])
    own = normalize_waveform(audio, lengths, offsets=offsets, samples=4, epsilon=0)
    root = 1.5**0.5
    assert torch.allclose(own, torch.tensor([[-root, 0, root, 0], [-1, 1, 0, 0]]))
    given = normalize_waveform(audio, lengths, torch.tensor([0.5, 0.0]), torch.tensor([0.25, 0.5]), epsilon=0)
    assert torch.allclose(given * 128, torch.tensor([[-224.0, -248, -240, 0, 0], [2, 6, 0, 0, 0]]))
    converted = normalize_waveform(audio, lengths, torch.zeros(2), torch.ones(2), epsilon=0)
    assert torch.equal(converted * 128, torch.tensor([[8.0, 2, 4, 0, 0], [1, 3, 0, 0, 0]]))
    # zeros up to min_samples count: the second clip is 1, 3, 0, 0 with mean 1
    longer = normalize_waveform(audio, lengths, min_samples=4, epsilon=0)
    assert torch.allclose(longer[1], torch.tensor([0.0, 2, -1, -1, 0]) / root)
    silent = normalize_waveform(torch.zeros(2, 5), torch.tensor([0, 5]))
    assert torch.equal(silent, torch.zeros(2, 5))


def test_it_is_the_formula_of_transformers_feature_extractor() -> None:
    from transformers import Wav2Vec2FeatureExtractor

    audio, _ = clips(1, 700)
    expected = Wav2Vec2FeatureExtractor()((audio[0] / 32768).numpy(), sampling_rate=16000, return_tensors="pt")
    assert_close_rel("waveform", expected.input_values, normalize_waveform(audio), 1e-6)


def test_a_clip_is_the_same_alone_and_padded() -> None:
    audio, _ = clips(4, 300)
    lengths = torch.tensor([300, 1, 17, 250])
    together = normalize_waveform(audio, lengths)
    for clip, length in enumerate(lengths.tolist()):
        alone = normalize_waveform(audio[clip : clip + 1, :length])
        assert torch.allclose(together[clip, :length], alone[0], atol=1e-6)
        assert not together[clip, length:].any()


def test_gradients_go_through_the_statistics() -> None:
    audio, options = clips(4, 60)
    for given, width in itertools.product(combinations(options), ({}, {"min_samples": 30, "samples": 50})):
        leaves = {n: (t.double().abs() + 0.1).requires_grad_() for n, t in given.items() if n in ("mean", "std")}
        leaves["audio"] = (audio.double() / 32768).requires_grad_()
        rest: dict[str, Any] = {n: t for n, t in given.items() if n not in leaves}
        upstream = torch.randn(normalize_waveform(audio, **given, **width).shape, dtype=torch.float64)
        reference = normalize_waveform_reference(**leaves, **rest, **width)
        wanted = torch.autograd.grad((reference * upstream).sum(), list(leaves.values()))
        single = {n: t.detach().float().requires_grad_() for n, t in leaves.items()}
        out = normalize_waveform(**single, **rest, **width)
        found = torch.autograd.grad((out * upstream).sum(), list(single.values()))
        for name, one, other in zip(leaves, wanted, found, strict=True):
            assert_close_rel(f"gradient of {name}, {sorted(given)}", one, other, 1e-5)
    silent = torch.zeros(1, 10, requires_grad=True)
    normalize_waveform(silent).square().sum().backward()
    assert silent.grad is not None and silent.grad.isfinite().all()


def test_wrong_arguments_are_named() -> None:
    audio, options = clips(3, 20)
    one = torch.ones(3)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"audio must be \[batch, samples\].*is \[20\]", {"audio": audio[0]}),
        (ValueError, r"at least one sample, is \[3, 0\]", {"audio": audio[:, :0]}),
        (TypeError, "audio must be int16 or floating point, is torch.int32", {"audio": audio.int()}),
        (TypeError, "lengths must be integers, are torch.float32", {"lengths": one}),
        (ValueError, r"offsets must be \[3\], one a clip, are \[2\]", {"offsets": options["offsets"][:2]}),
        (ValueError, "mean and std go together: std is missing", {"mean": one}),
        (TypeError, "std must be floating point, is torch.int64", {"mean": one, "std": one.long()}),
        (ValueError, r"mean must be \[3\], one value a clip, is \[1\]", {"mean": one[:1], "std": one}),
        (TypeError, "dtype must be float32, bfloat16 or float16, is torch.int16", {"dtype": torch.int16}),
        (ValueError, "min_samples must be at least 1, is 0", {"min_samples": 0}),
        (ValueError, "samples must be at least min_samples, 9, is 5", {"samples": 5, "min_samples": 9}),
        (ValueError, "epsilon must not be negative, is -1", {"epsilon": -1}),
        (ValueError, "backend must be one of auto, triton, torch, reference, is 'gpu'", {"backend": "gpu"}),
        (ValueError, "cannot be used: audio is torch.float64", {"audio": audio.double(), "backend": "triton"}),
        (
            ValueError,
            "audio, mean or std requires a gradient, which the torch engine gives",
            {"audio": audio.float().requires_grad_(), "backend": "triton"},
        ),
    ]
    for error, message, arguments in wrong:
        with pytest.raises(error, match=message):
            normalize_waveform(**{"audio": audio, **arguments})
