"""Cosines as scores: how well clips fit a description, and how well scores agree with human ratings.

The reward is what best-of-N reranking and a text-to-speech training loop maximise. Several models (one for what a
speaker sounds like, one for how an utterance is spoken) become one reward by the weighted mean of their cosines.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.errors import ConfigError, DataError
from fastclap.models.clap import CLAP
from fastclap.models.encoder import DualEncoder, evaluation_mode

ModelOrPath = DualEncoder | str | os.PathLike[str]


def reward(
    models: ModelOrPath | Sequence[ModelOrPath],
    *,
    weights: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
) -> Reward:
    """A callable `(audio, text) -> cosines` from one model or several; see `Reward`.

    Args:
        models: loaded models, or what `fastclap.CLAP.from_pretrained` reads.
        weights: of each model in the mean; equal by default. They are divided by their sum.
        device: where to put models that are read here.
    """
    listed = [models] if isinstance(models, (DualEncoder, str, os.PathLike)) else list(models)
    loaded = [CLAP.from_pretrained(m, device=device) if isinstance(m, (str, os.PathLike)) else m for m in listed]
    return Reward(loaded, weights)


class Reward:
    """How well clips fit descriptions: the weighted mean over models of the cosine of clip and text, from -1 to 1.

    Args:
        models: at least one.
        weights: of each model in the mean; equal by default. They are divided by their sum.

    Raises:
        ConfigError: there is no model, or not one positive weight for each.
    """

    def __init__(self, models: Sequence[DualEncoder], weights: Sequence[float] | None = None) -> None:
        self.models = list(models)
        self.weights = normalized_weights(len(self.models), weights)

    def __call__(
        self,
        audio: Sequence[Any] | np.ndarray | Tensor,
        text: str | Sequence[str | Sequence[str]],
        *,
        lengths: Sequence[int] | Tensor | None = None,
        sampling_rate: int = 16000,
        grad: bool = False,
    ) -> Tensor:  # [B]
        """Score each clip against its text.

        Args:
            audio: B clips as `fastclap.CLAP.embed_audio` takes them: a padded [B, T] tensor with `lengths`, or a list
                of 1-D tensors, arrays or paths.
            text: one text for all clips, or B texts; a list in the place of a text is several descriptions of that
                clip, whose cosines are averaged.
            lengths: valid samples of each row, for the padded form.
            sampling_rate: of tensors and arrays, in Hz.
            grad: let gradients flow into `audio`, which must then be a float [B, T] tensor. The models run in
                evaluation mode; their own parameters get gradients too unless they are frozen.

        Returns:
            float32 [B], on the device of the first model; without a gradient unless `grad`.

        Raises:
            DataError: there are more or fewer texts than clips, or a clip or text cannot be embedded.
        """
        count = len(audio)
        prompts = as_prompts(text, count)
        total: Tensor | None = None
        for model, weight in zip(self.models, self.weights, strict=True):
            if grad:
                vectors = _embed_with_grad(model, audio, lengths, sampling_rate)
            else:
                vectors = model.embed_audio(audio, lengths, sampling_rate=sampling_rate)
            scores = weight * prompt_cosines(model, vectors, prompts)
            total = scores if total is None else total + scores.to(total.device)
        assert total is not None
        return total


def normalized_weights(models: int, weights: Sequence[float] | None) -> list[float]:
    """Weights of the models in their mean, which sum to 1.

    Raises:
        ConfigError: there is no model, or not one positive finite number for each.
    """
    if not models:
        raise ConfigError("a reward needs at least one model")
    if weights is None:
        return [1 / models] * models
    if len(weights) != models:
        raise ConfigError(f"{len(weights)} weights for {models} models; give one for each")
    total = sum(weights)
    if not all(weight > 0 for weight in weights) or not math.isfinite(total):
        raise ConfigError(f"weights {list(weights)}: each must be a positive number, and their sum finite")
    return [weight / total for weight in weights]


def as_prompts(text: str | Sequence[str | Sequence[str]], count: int) -> list[tuple[str, ...]]:
    """The descriptions of each of `count` clips.

    Raises:
        DataError: there are more or fewer texts than clips, or a clip has none.
    """
    if isinstance(text, str):
        return [(text,)] * count
    if len(text) != count:
        raise DataError(f"{len(text)} texts for {count} clips; give one for each clip, or one string for all")
    prompts = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in text]
    for index, entry in enumerate(prompts):
        if not entry:
            raise DataError(f"clip {index} has no text")
    return prompts


def prompt_cosines(model: DualEncoder, vectors: Tensor, prompts: Sequence[Sequence[str]]) -> Tensor:
    """Mean cosine [n] of each clip's unit vector [n, D] with its descriptions; each distinct text is encoded once."""
    number: dict[str, int] = {}
    for texts in prompts:
        for text in texts:
            number.setdefault(text, len(number))
    embedded = model.embed_text(list(number)).to(vectors.device)
    rows = torch.tensor([clip for clip, texts in enumerate(prompts) for _ in texts], device=vectors.device)
    columns = torch.tensor([number[text] for texts in prompts for text in texts], device=vectors.device)
    shares = torch.tensor([1 / len(texts) for texts in prompts for _ in texts], device=vectors.device)
    cosines = (vectors[rows] * embedded[columns]).sum(1) * shares
    return torch.zeros(len(prompts), device=vectors.device).index_add(0, rows, cosines)


def _embed_with_grad(
    model: DualEncoder, audio: Any, lengths: Sequence[int] | Tensor | None, sampling_rate: int
) -> Tensor:
    if not isinstance(audio, Tensor) or audio.ndim != 2 or not audio.is_floating_point():
        raise DataError("with grad=True the clips are one float tensor [clips, samples]")
    if sampling_rate != model.sampling_rate:
        from torchaudio.functional import resample

        audio = resample(audio, sampling_rate, model.sampling_rate)
        if lengths is not None:
            scaled = torch.as_tensor(lengths) * (model.sampling_rate / sampling_rate)
            lengths = scaled.round().long().clamp(max=audio.shape[1])
    sizes = None if lengths is None else torch.as_tensor(lengths, device=model.device)
    with evaluation_mode(model):
        return F.normalize(model.encode_audio(audio.to(model.device), sizes).float(), dim=1)


def agreement(scores: Sequence[float], ratings: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """Pearson's r and Spearman's ρ of scores with human ratings, each with its confidence interval.

    The intervals are Fisher's: the inverse hyperbolic tangent of the coefficient is taken as normal, with variance
    1/(n - 3) for r and (1 + ρ²/2)/(n - 3) for ρ (Bonett and Wright, Psychometrika 65, 2000). Three pairs say nothing,
    and their interval is [-1, 1].

    Returns:
        JSON-able: `pairs`, `confidence`, and for `pearson` and `spearman` each `value`, `low`, `high` and `p`
        (two-sided, against no correlation).

    Raises:
        DataError: there are more or fewer ratings than scores or fewer than three, or all scores or ratings are equal.
    """
    from scipy import stats

    if len(scores) != len(ratings):
        raise DataError(f"{len(ratings)} ratings for {len(scores)} scores; there must be one for each")
    if len(scores) < 3:
        raise DataError(f"a correlation needs at least 3 rated pairs, there are {len(scores)}")
    for values, what in ((scores, "cosines"), (ratings, "ratings")):
        if len(set(values)) == 1:
            raise DataError(f"all {len(values)} {what} are {values[0]:g}: no correlation is defined")
    found: dict[str, Any] = {"pairs": len(scores), "confidence": confidence}
    scaled = [
        np.asarray(values, np.float64) / max(map(abs, values)) for values in (scores, ratings)
    ]  # squares overflow
    for name, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers so alike that nothing is left of their differences
            value, p = map(float, function(*scaled))
        if not math.isfinite(value):
            raise DataError(f"the {len(scores)} cosines or ratings are too alike to be correlated")
        variance = 1 + value**2 / 2 if name == "spearman" else 1.0
        low, high = -1.0, 1.0
        if abs(value) >= 1:
            low = high = value
        elif len(scores) > 3:
            half = float(stats.norm.ppf((1 + confidence) / 2)) * math.sqrt(variance / (len(scores) - 3))
            low, high = math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half)
        found[name] = {"value": value, "low": low, "high": high, "p": p}
    return found
