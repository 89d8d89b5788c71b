"""The reward compared with cosines computed separately, its gradient, and style similarity next to ratings."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import fastclap
from fastclap import CLAP
from fastclap.apps.scoring import agreement
from fastclap.commands.main import main
from fastclap.errors import ConfigError, DataError
from fastclap.testing import assert_close_rel

TEXTS = ["A calm voice.", "An angry deep voice.", "A person is speaking."]


def waves(count: int = 3) -> torch.Tensor:
    return 0.1 * torch.randn(count, 8000, generator=torch.Generator().manual_seed(0))


# the reward


def test_reward_is_the_cosine_of_each_clip_with_its_text(clap_folder: str) -> None:
    model = CLAP.from_pretrained(clap_folder)
    score = fastclap.reward(model)(waves(), TEXTS)
    assert score.shape == (3,) and not score.requires_grad
    assert_close_rel("reward", model.similarity(waves(), TEXTS).diagonal(), score, 1e-5)
    same = fastclap.reward(clap_folder)(list(waves()), TEXTS[0])
    assert_close_rel("one text", model.similarity(waves(), TEXTS[:1])[:, 0], same, 1e-5)
    short = fastclap.reward(model)(waves(), TEXTS, lengths=[8000, 4000, 6000])
    cut = [wave[:size] for wave, size in zip(waves(), (8000, 4000, 6000), strict=True)]
    assert_close_rel("lengths", fastclap.reward(model)(cut, TEXTS), short, 1e-5)


def test_several_models_and_several_texts_are_averaged(clap_folder: str, other_clap_folder: str) -> None:
    models = [CLAP.from_pretrained(clap_folder), CLAP.from_pretrained(other_clap_folder)]
    texts = [TEXTS[:2], TEXTS[0], TEXTS]
    found = fastclap.reward(models, weights=[1, 3])(waves(), texts)
    each = [model.similarity(waves(), TEXTS) for model in models]
    mean = [torch.stack([s[0, :2].mean(), s[1, 0], s[2].mean()]) for s in each]
    assert_close_rel("weighted mean", 0.25 * mean[0] + 0.75 * mean[1], found, 1e-5)
    equal = fastclap.reward([clap_folder, other_clap_folder])(waves(), TEXTS)
    assert_close_rel("mean", (each[0] + each[1]).diagonal() / 2, equal, 1e-5)


@pytest.mark.parametrize("rate", [16000, 24000])
def test_the_gradient_reaches_the_audio(clap_folder: str, rate: int) -> None:
    model = CLAP.from_pretrained(clap_folder)
    score = fastclap.reward(model)
    audio = waves().requires_grad_()
    value = score(audio, TEXTS, sampling_rate=rate, lengths=[8000, 7000, 6000], grad=True)
    value.sum().backward()
    assert audio.grad is not None and audio.grad[0].norm() > 0
    assert audio.grad[2, 6100:].norm() == 0, "padding has no part in it"
    direction = audio.grad / audio.grad.norm()
    step = 1e-2
    with torch.no_grad():
        ends = [
            score(
                audio.detach() + sign * step * direction,
                TEXTS,
                sampling_rate=rate,
                lengths=[8000, 7000, 6000],
                grad=True,
            )
            for sign in (1, -1)
        ]
    slope = (ends[0] - ends[1]).sum().item() / (2 * step)
    assert slope == pytest.approx(audio.grad.norm().item(), rel=0.02)
    assert not model.training


def test_what_a_reward_refuses(clap_folder: str) -> None:
    model = CLAP.from_pretrained(clap_folder)
    with pytest.raises(DataError, match="2 texts for 3 clips"):
        fastclap.reward(model)(waves(), TEXTS[:2])
    with pytest.raises(DataError, match="clip 1 has no text"):
        fastclap.reward(model)(waves(), [TEXTS[0], [], TEXTS[1]])
    with pytest.raises(DataError, match="one float tensor"):
        fastclap.reward(model)(list(waves()), TEXTS, grad=True)
    with pytest.raises(ConfigError, match="at least one model"):
        fastclap.reward([])
    with pytest.raises(ConfigError, match="1 weights for 2 models"):
        fastclap.reward([model, model], weights=[1])


# style similarity


def test_agreement_against_scipy_and_its_formula() -> None:
    random = np.random.default_rng(0)
    ratings = random.normal(size=40)
    scores = ratings + random.normal(size=40)
    found = agreement(scores.tolist(), ratings.tolist())
    reference = stats.pearsonr(scores, ratings)
    low, high = reference.confidence_interval(0.95)
    assert (found["pearson"]["value"], found["pearson"]["p"]) == pytest.approx((reference.statistic, reference.pvalue))
    assert (found["pearson"]["low"], found["pearson"]["high"]) == pytest.approx((low, high))
    rho = stats.spearmanr(scores, ratings).statistic
    half = 1.959964 * np.sqrt((1 + rho**2 / 2) / 37)
    interval = (np.tanh(np.arctanh(rho) - half), np.tanh(np.arctanh(rho) + half))
    assert (found["spearman"]["low"], found["spearman"]["high"]) == pytest.approx(interval, rel=1e-6)
    assert found["pairs"] == 40
    assert agreement([1, 2, 4], [2, 1, 5])["pearson"]["low"] == -1
    assert agreement([1, 2, 3, 4], [10, 20, 30, 40])["pearson"]["value"] == pytest.approx(1)


@pytest.fixture
def clips(tmp_path: Path, write_clip: Callable[..., str]) -> list[str]:
    return [write_clip(f"{number}.wav", number) for number in range(5)]


def write_pairs(tmp_path: Path, name: str, *lines: str) -> str:
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    return str(tmp_path / name)


def test_pairs_of_clips_with_ratings(clap_folder: str, clips: list[str], tmp_path: Path, capfd: Any) -> None:
    lines = [f"{i}.wav,{(i * 2 + 1) % 5}.wav,{i * 1.5 - i * i}" for i in range(5)]
    pairs = write_pairs(tmp_path, "pairs.csv", "audio,other_audio,rating", *lines)
    out = tmp_path / "scored.csv"
    assert main(["similarity", clap_folder, pairs, "--out", str(out), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    vectors = CLAP.from_pretrained(clap_folder).embed_audio(clips)
    cosines = [float(vectors[i] @ vectors[(i * 2 + 1) % 5]) for i in range(5)]
    assert result["scores"] == pytest.approx(cosines, abs=1e-5)
    r = stats.pearsonr(cosines, [i * 1.5 - i * i for i in range(5)]).statistic
    assert result["agreement"]["pearson"]["value"] == pytest.approx(r, abs=1e-4)
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["other_audio"] for row in rows] == [f"{(i * 2 + 1) % 5}.wav" for i in range(5)]
    assert [float(row["cosine"]) for row in rows] == result["scores"]
    assert main(["similarity", clap_folder, pairs]) == 0
    table = capfd.readouterr().out
    assert "Pearson's r" in table and "5 pairs, 0 skipped" in table


def test_clips_with_texts_and_ratings_of_their_own(
    clap_folder: str, clips: list[str], tmp_path: Path, capfd: Any
) -> None:
    pairs = write_pairs(tmp_path, "p.csv", "audio,text", *(f"{i}.wav,{TEXTS[i % 3]}" for i in range(5)))
    ratings = write_pairs(tmp_path, "r.csv", "mos", "1", "3", "2", "5", "4")
    (tmp_path / "1.wav").write_bytes(b"broken")
    command = ["similarity", clap_folder, pairs, "--ratings", ratings, "--rating-column", "mos", "--json"]
    assert main(command) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert (result["pairs"], result["scored"], result["agreement"]["pairs"]) == (5, 4, 4)
    assert result["scores"][1] is None and [Path(clip["path"]).name for clip in result["skipped"]] == ["1.wav"]
    assert "1.wav: not readable as audio" in err
    kept = [i for i in range(5) if i != 1]
    cosines = CLAP.from_pretrained(clap_folder).similarity([clips[i] for i in kept], TEXTS)
    assert [result["scores"][i] for i in kept] == pytest.approx(
        [float(cosines[row, i % 3]) for row, i in enumerate(kept)], abs=1e-5
    )
    expected = stats.spearmanr([result["scores"][i] for i in kept], [1, 2, 5, 4]).statistic
    assert result["agreement"]["spearman"]["value"] == pytest.approx(expected)
    assert main(["similarity", clap_folder, pairs, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["agreement"] is None, "no ratings, no correlation"


@pytest.mark.parametrize(
    ("ratings", "reason"),
    [
        (["1", "2"], "a correlation needs at least 3 rated pairs, there are 2"),
        (["1", "1", "1"], "all 3 ratings are 1"),
    ],
)
def test_without_a_correlation_the_cosines_are_printed_and_the_reason(
    ratings: list[str], reason: str, clap_folder: str, clips: list[str], tmp_path: Path, capfd: Any
) -> None:
    lines = [f"{i}.wav,text {i},{rating}" for i, rating in enumerate(ratings)]
    pairs = write_pairs(tmp_path, "p.csv", "audio,text,rating", *lines)
    assert main(["similarity", clap_folder, pairs, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["agreement"] is None and reason in result["no_agreement"]
    assert main(["similarity", clap_folder, pairs]) == 0
    out, err = capfd.readouterr()
    assert all(f"{score:.3f}" in out for score in result["scores"])
    assert f"no correlation with the ratings: {reason}" in out and "Warning" not in err


def test_ratings_of_any_size_correlate_as_their_shares_do() -> None:
    scores = [0.1, 0.5, -0.2, 0.3]
    expected = agreement(scores, [1, -1, 1.7, 0.5])["pearson"]["value"]
    for size in (1e308, 5e-324 * 2**40):
        found = agreement(scores, [size, -size, 1.7 * size, 0.5 * size])
        assert found["pearson"]["value"] == pytest.approx(expected, abs=1e-6)


def test_bad_pairs_and_ratings_are_named(clap_folder: str, clips: list[str], tmp_path: Path, capfd: Any) -> None:
    def refused(lines: list[str], *flags: str) -> str:
        assert main(["similarity", clap_folder, write_pairs(tmp_path, "p.csv", *lines), *flags]) == 2
        out, err = capfd.readouterr()
        assert out == "" and "\nfastclap: " in f"\n{err}"
        return str(err)

    head = "audio,text,rating"
    good = ["0.wav,a,1", "1.wav,b,2", "2.wav,c,3"]
    assert "one of other_audio and text; the columns are audio, caption" in refused(["audio,caption", "0.wav,a"])
    assert "p.csv:3: the column 'text' is None" in refused([head, *good[:1], "1.wav,,2"])
    assert "p.csv:3: the rating (column 'rating') is missing" in refused([head, *good[:1], "1.wav,b,"])
    assert "p.csv:2: the rating (column 'rating') 'high' is not a number" in refused([head, "0.wav,a,high"])
    assert "'nan' is not a number" in refused([head, "0.wav,a,nan"])
    assert "no column 'mos'; the columns are audio, text, rating" in refused([head, *good], "--rating-column", "mos")
    short = write_pairs(tmp_path, "r.csv", "rating", "1", "2")
    assert "r.csv: 2 ratings for the 3 pairs of" in refused([head, *good], "--ratings", short)
    assert "none of the 1 pairs can be scored" in refused(["audio,text", "none.wav,a"])
    assert "name a .csv file" in refused([head, *good], "--out", "x.json")
    assert "no such manifest" in refused([head, *good], "--ratings", str(tmp_path / "none.csv"))
