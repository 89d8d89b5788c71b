"""Retrieval and classification figures against brute force in numpy and against scikit-learn."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from torch import Tensor

from fastclap.evaluation import metrics
from fastclap.evaluation.metrics import classification, prompt_ensemble, retrieval, unique_texts


def brute_force_ranks(score: np.ndarray, match: np.ndarray) -> list[int]:
    """Rank of the best match of each row that has one, a tie with a non-match counting as a loss."""
    ranks = []
    for row, is_match in zip(score, match, strict=True):
        if is_match.any():
            best = row[is_match].max()
            ranks.append(1 + sum(1 for s, m in zip(row, is_match, strict=True) if not m and s >= best - metrics.TIE))
    return ranks


def brute_force_figures(ranks: list[int]) -> dict[str, float]:
    r = np.array(ranks)
    return {
        "R@1": float(np.mean(r <= 1)),
        "R@5": float(np.mean(r <= 5)),
        "R@10": float(np.mean(r <= 10)),
        "mAP@10": float(np.mean([1 / x if x <= 10 else 0 for x in ranks])),
        "median_rank": float(np.median(r)),
        "mean_rank": float(np.mean(r)),
    }


def cosines(a: Tensor, b: Tensor) -> np.ndarray:
    x, y = a.double().numpy(), b.double().numpy()
    return (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (y / np.linalg.norm(y, axis=1, keepdims=True)).T


def figures(direction: dict) -> dict[str, float]:
    return {key: direction[key] for key in ("R@1", "R@5", "R@10", "mAP@10", "median_rank", "mean_rank")}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    k=st.integers(1, 3),
    ids=st.integers(1, 50),
    coarse=st.booleans(),
    block=st.sampled_from([1, 64, 10**6]),
)
def test_retrieval_equals_brute_force(seed: int, n: int, m: int, k: int, ids: int, coarse: bool, block: int) -> None:
    """Shared ids, several ids a clip, padding, exact ties (few distinct vectors) and any block size."""
    generator = torch.Generator().manual_seed(seed)
    if coarse:
        audio = torch.randint(-1, 2, (n, 3), generator=generator) + torch.tensor([0.0, 0.0, 0.5])
        text = torch.randint(-1, 2, (m, 3), generator=generator) + torch.tensor([0.0, 0.0, 0.5])
    else:
        audio, text = torch.randn(n, 16, generator=generator), torch.randn(m, 16, generator=generator)
    audio_ids = torch.randint(-2, ids, (n, k), generator=generator)
    text_ids = torch.randint(-2, ids, (m,), generator=generator)
    audio_ids[0, 0] = text_ids[0] = 7  # at least one match
    match = np.array([[t >= 0 and t in row for t in text_ids.tolist()] for row in audio_ids.tolist()])
    score = cosines(audio, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "BLOCK", block)
        result = retrieval(audio, text, audio_ids, text_ids)

    for name, s, is_match in (("audio_to_text", score, match), ("text_to_audio", score.T, match.T)):
        ranks = brute_force_ranks(s, is_match)
        assert result[name]["queries"] == len(ranks)
        assert result[name]["candidates"] == s.shape[1]
        assert figures(result[name]) == pytest.approx(brute_force_figures(ranks)), name
        assert result[name]["curve"]["recall"] == pytest.approx(
            [np.mean(np.array(ranks) <= at) for at in result[name]["curve"]["k"]]
        )
    json.dumps(result, allow_nan=False)


def test_mean_average_precision_of_known_ranks() -> None:
    text = torch.eye(12)
    audio = torch.zeros(3, 12)
    for row, rank in enumerate((1, 4, 11)):  # the match (text 0) has rank - 1 texts above it
        audio[row] = torch.linspace(0.5, 0.1, 12)
        audio[row, 0], audio[row, 1:rank] = 0.8, 1.0
    result = retrieval(audio, text, [0, 0, 0], list(range(12)))["audio_to_text"]
    assert (result["R@1"], result["R@5"], result["R@10"]) == pytest.approx((1 / 3, 2 / 3, 2 / 3))
    assert result["mAP@10"] == pytest.approx((1 + 1 / 4) / 3)
    assert (result["median_rank"], result["mean_rank"]) == pytest.approx((4, 16 / 3))


@pytest.mark.parametrize("kind", ["constant", "zero", "nearly constant"])
def test_a_collapsed_model_comes_last(kind: str) -> None:
    audio = torch.ones(37, 24) * torch.linspace(0.1, 3, 24)
    text = torch.ones(53, 24) * torch.linspace(-0.2, 1, 24)
    if kind == "zero":
        audio, text = audio * 0, text * 0
    if kind == "nearly constant":
        audio, text = audio + 1e-8 * torch.randn(37, 24), text + 1e-8 * torch.randn(53, 24)
    result = retrieval(audio, text, list(range(37)), list(range(53)))
    for direction, others in (("audio_to_text", 53), ("text_to_audio", 37)):
        assert result[direction]["R@10"] == 0
        assert result[direction]["mean_rank"] == others


@pytest.mark.parametrize("matches_per_query", [1, 3])
def test_retrieval_chance_is_what_random_embeddings_reach(matches_per_query: int) -> None:
    generator = torch.Generator().manual_seed(3)
    clips, texts = 60, 20
    ids = torch.arange(clips) % (clips // matches_per_query)
    totals: dict[str, list[float]] = {}
    for _ in range(60):
        audio, text = (torch.randn(n, 8, generator=generator) for n in (clips, texts))
        result = retrieval(audio, text, ids, list(range(texts)))["text_to_audio"]
        for key, value in figures(result).items():
            totals.setdefault(key, []).append(value)
    for key, expected in result["chance"].items():
        spread = np.std(totals[key]) / np.sqrt(len(totals[key]))
        slack = 1 if key == "median_rank" else 0  # the median of 20 whole ranks is coarse
        assert abs(np.mean(totals[key]) - expected) < 4.5 * spread + slack, key


def test_retrieval_chance_by_hand() -> None:
    result = retrieval(torch.randn(4, 3), torch.randn(4, 3), [0, 1, 2, 3], [0, 1, 2, 3])["audio_to_text"]["chance"]
    assert result == pytest.approx(
        {
            "R@1": 0.25,
            "R@5": 1,
            "R@10": 1,
            "mAP@10": (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4,
            "median_rank": 2,
            "mean_rank": 2.5,
        }
    )


def test_one_clip_one_text() -> None:
    result = retrieval(torch.ones(1, 2), torch.ones(1, 2), [5], [5])
    assert figures(result["audio_to_text"]) == figures(result["text_to_audio"])
    assert result["audio_to_text"]["R@1"] == result["audio_to_text"]["chance"]["R@1"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_length_do_not_matter(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    audio, text = (torch.randn(30, 16, generator=generator).to(dtype) for _ in range(2))
    lengths = 2.0 ** torch.randint(-3, 4, (30, 1), generator=generator)
    ids = list(range(30))
    assert retrieval(audio, text, ids, ids) == retrieval(audio.float() * lengths, text.float(), ids, ids)


def test_unique_texts_keeps_first_appearance_and_pads() -> None:
    texts, ids = unique_texts([["b"], ["a", "b", "a"], [], ["c"]])
    assert texts == ["b", "a", "c"]
    assert ids.tolist() == [[0, -1, -1], [1, 0, 1], [-1, -1, -1], [2, -1, -1]]


def test_bad_retrieval_input_is_refused() -> None:
    a, b = torch.randn(4, 3), torch.randn(5, 3)
    nan = a.clone()
    nan[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 4 audio embeddings are not finite \(first: row 2\)"):
        retrieval(nan, b, range(4), range(5))
    with pytest.raises(ValueError, match="text embeddings are not finite"):
        retrieval(a, b / 0, range(4), range(5))
    with pytest.raises(ValueError, match="3 dimensions, text embeddings 2"):
        retrieval(a, b[:, :2], range(4), range(5))
    with pytest.raises(ValueError, match="audio_ids has shape"):
        retrieval(a, b, range(3), range(5))
    with pytest.raises(ValueError, match="share no id"):
        retrieval(a, b, range(4), range(10, 15))
    with pytest.raises(ValueError, match="not empty"):
        retrieval(a[:0], b, [], range(5))
    with pytest.raises(TypeError, match="must be integers"):
        retrieval(a, b, torch.rand(4), range(5))


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 60), c=st.integers(1, 7), used=st.integers(1, 7))
def test_classification_equals_sklearn(seed: int, n: int, c: int, used: int) -> None:
    """Also with candidate classes that no clip has (used < c)."""
    generator = torch.Generator().manual_seed(seed)
    classes = [f"class {i}" for i in range(c)]
    audio, text = torch.randn(n, 6, generator=generator), torch.randn(c, 6, generator=generator)
    truth = torch.randint(0, min(used, c), (n,), generator=generator).numpy()
    given_class = cosines(audio, text).argmax(axis=1)

    result = classification(audio, text, [classes[i] for i in truth], classes)

    assert result["accuracy"] == pytest.approx(accuracy_score(truth, given_class))
    with pytest.warns(UserWarning) if set(given_class) - set(truth) else nullcontext():
        assert result["uar"] == pytest.approx(balanced_accuracy_score(truth, given_class))
    assert result["macro_f1"] == pytest.approx(
        f1_score(truth, given_class, labels=range(c), average="macro", zero_division=0)
    )
    assert np.array(result["confusion"]).sum(axis=1).tolist() == np.bincount(truth, minlength=c).tolist()
    assert result["majority_accuracy"] == pytest.approx(np.bincount(truth).max() / n)
    assert result["chance"] == pytest.approx(1 / c)
    for i, row in enumerate(result["per_class"]):
        mine = given_class[truth == i]
        assert row["recall"] == (pytest.approx(np.mean(mine == i)) if len(mine) else None)
        assert row["given"] == np.sum(given_class == i)
    json.dumps(result, allow_nan=False)


def test_classes_are_merged_after_the_decision() -> None:
    """By hand: five clips on the axes of four classes, of which happy and excited count as one."""
    classes, axes = ["excited", "angry", "happy", "sad"], torch.eye(4)
    nearest, truth = [2, 0, 2, 1, 3], ["happy", "happy", "excited", "excited", "sad"]
    result = classification(axes[nearest], axes, truth, classes, {"excited": "happy"})
    assert result["classes"] == ["angry", "happy", "sad"]
    assert result["confusion"] == [[0, 0, 0], [1, 3, 0], [0, 0, 1]]
    assert (result["accuracy"], result["uar"], result["chance"]) == (4 / 5, pytest.approx(7 / 8), 1 / 3)
    assert [row["clips"] for row in result["per_class"]] == [0, 4, 1]
    # a mean of their prompts before the decision would be another classifier
    before = torch.stack([axes[1], (axes[0] + axes[2]) / 2**0.5, axes[3]])
    clip = torch.tensor([[0.0, 0.8, 1.0, 0.0]])
    assert classification(clip, before, ["happy"], ["angry", "happy", "sad"])["accuracy"] == 0
    assert classification(clip, axes, ["happy"], classes, {"excited": "happy"})["accuracy"] == 1
    for wrong in ({"excited": "glad"}, {"excited": "happy", "happy": "sad"}):
        with pytest.raises(ValueError, match="a class can be merged only with one of"):
            classification(axes, axes, classes, classes, wrong)


def test_prompt_ensemble_is_the_mean_of_unit_vectors() -> None:
    prompts = torch.tensor([[3.0, 0.0], [0.0, 0.1], [-2.0, 0.0]])
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [-1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(prompt_ensemble(prompts, [0, 0, 1], 2), expected)
    with pytest.raises(ValueError, match="class 1 of 3 has no prompt"):
        prompt_ensemble(prompts, [0, 0, 2], 3)


def test_bad_classification_input_is_refused() -> None:
    audio, text = torch.randn(3, 4), torch.randn(2, 4)
    with pytest.raises(ValueError, match="label 'sad' is not one of the classes: happy, calm"):
        classification(audio, text, ["happy", "sad", "calm"], ["happy", "calm"])
    with pytest.raises(ValueError, match="2 labels for 3"):
        classification(audio, text, ["happy", "calm"], ["happy", "calm"])
    with pytest.raises(ValueError, match="distinct"):
        classification(audio, text, ["happy"] * 3, ["happy", "happy"])
    with pytest.raises(ValueError, match="class text embeddings are not finite"):
        classification(audio, text * torch.nan, ["happy"] * 3, ["happy", "calm"])
