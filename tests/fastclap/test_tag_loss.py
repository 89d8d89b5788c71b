"""The tag loss against its definition and, where a checkout is at hand, against the published class."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastclap.losses import tag_loss
from fastclap.testing import assert_close_rel


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    audio, prompts = (torch.randn(n, 12, dtype=dtype).requires_grad_() for n in (9, 5))
    targets = torch.rand(9, 5) < 0.3
    targets[2] = targets[7] = False
    assert targets.any(1).sum() < 8
    return audio, prompts, targets


def written_out(audio: Tensor, prompts: Tensor, targets: Tensor, scale: float) -> float:
    """The definition in Python's floats."""
    terms = []
    for clip, own in zip(audio.tolist(), targets.tolist(), strict=True):
        if not any(own):
            continue
        for prompt, has in zip(prompts.tolist(), own, strict=True):
            dot = sum(x * y for x, y in zip(clip, prompt, strict=True))
            logit = scale * dot / math.sqrt(sum(x * x for x in clip)) / math.sqrt(sum(y * y for y in prompt))
            probability = 1 / (1 + math.exp(-logit))
            terms.append(-math.log(probability if has else 1 - probability))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_definition(scale: float) -> None:
    audio, prompts, targets = example()
    assert tag_loss(audio, prompts, targets, scale=scale).item() == pytest.approx(
        written_out(audio, prompts, targets, scale), rel=1e-12
    )
    assert torch.autograd.gradcheck(lambda a, p: tag_loss(a, p, targets, scale=scale), (audio, prompts))
    low = tag_loss(audio.float(), prompts.float(), targets, scale=scale)
    assert low.dtype == torch.float32
    assert_close_rel("float32", tag_loss(audio, prompts, targets, scale=scale).detach(), low.detach(), 1e-6)


def test_clips_without_tags_take_no_part() -> None:
    audio, prompts, targets = example()
    audio.data[2] = math.inf  # has no tag
    loss = tag_loss(audio, prompts, targets)
    tagged = targets.any(1)
    assert loss.item() == tag_loss(audio[tagged], prompts, targets[tagged]).item()
    nothing = tag_loss(audio[tagged], prompts, torch.zeros(int(tagged.sum()), 5, dtype=torch.bool))
    assert nothing.item() == 0.0
    (gradient,) = torch.autograd.grad(nothing, [prompts])
    assert not gradient.any()


def test_wrong_shapes() -> None:
    audio, prompts, targets = example()
    with pytest.raises(ValueError, match="targets must have shape"):
        tag_loss(audio, prompts, targets.T)


def test_the_published_class(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(reference))
    published = importlib.import_module("paraspeechclap.loss").MultiTaskLoss()
    audio, prompts, targets = example(torch.float32)
    names = ["crisp", "deep", "husky", "loud", "soft"]
    own = [[name for name, has in zip(names, row, strict=True) if has] for row in targets.tolist()]
    text, scale = torch.randn(9, 12), torch.tensor(14.3)
    result = published(text, audio, scale, prompts, own, {name: index for index, name in enumerate(names)})
    reference = torch.autograd.grad(result["classification_loss"], [audio, prompts])
    ours = tag_loss(audio, prompts, targets)
    assert_close_rel("value", result["classification_loss"].detach(), ours.detach(), 1e-6)
    for name, expected, found in zip(
        ("audio", "prompts"), reference, torch.autograd.grad(ours, [audio, prompts]), strict=True
    ):
        assert_close_rel(name, expected, found, 1e-6)
    for module in [name for name in sys.modules if name.split(".")[0] == "paraspeechclap"]:
        monkeypatch.delitem(sys.modules, module)
