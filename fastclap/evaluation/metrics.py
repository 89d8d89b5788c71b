"""Figures of merit from embeddings alone: retrieval in both directions and zero-shot classification.

Nothing here knows a model, a file or a caption: a figure depends on vectors and ids only, so that the training loop,
the command line and anybody's embeddings are measured by the same lines. Scores are cosines in float64, computed a
block of queries at a time: the n x m matrix never exists, TF32 or bf16 matmul settings cannot move a rank, and 100,000
x 100,000 fits in a few gigabytes. Ties are broken against the model, because a collapsed model ties everything; every
figure comes with the value that guessing would reach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
CURVE_AT = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
TIE = 1e-6  # cosines closer than this are equal: it is the rounding of a float32 unit vector's dot product
BLOCK = 1 << 22  # scores held at once (32 MiB of float64)


def unique_texts(captions: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """The distinct texts of `captions` (one sequence a clip) in order of appearance, and each clip's text ids.

    Equal texts are then one candidate and one query (the ParaSpeechCLAP convention: de-duplicated by exact text).

    Returns:
        The texts, and int64 ids [clips, most captions of a clip], padded with -1.
    """
    index: dict[str, int] = {}
    ids = torch.full((len(captions), max((len(c) for c in captions), default=0)), -1)
    for row, texts in enumerate(captions):
        for column, text in enumerate(texts):
            ids[row, column] = index.setdefault(text, len(index))
    return list(index), ids


def retrieval(
    audio_emb: Tensor,  # [n, D]
    text_emb: Tensor,  # [m, D]
    audio_ids: Tensor | Sequence[int],  # [n] or [n, k]
    text_ids: Tensor | Sequence[int],  # [m] or [m, k]
) -> dict[str, Any]:
    """Retrieval both ways: `{"audio_to_text": {...}, "text_to_audio": {...}}`, every value JSON-able.

    Embeddings are floating point of any length (the score is the cosine). A clip and a text match when they share an
    id; several ids of a clip or text are in a column each, negative ids are padding and match nothing. Texts are not
    merged here: pass distinct ones (`unique_texts`), or a caption that occurs often fills many ranks.

    Each direction holds `R@1`, `R@5`, `R@10` (the share of queries whose best match is among the first k), `mAP@10`
    (mean of 1/rank, 0 beyond rank 10), `median_rank` and `mean_rank`, where the rank of a query is that of its best
    match: 1 + the non-matches that score at least as high (to within 1e-6). So ties count against the model, and
    constant embeddings come last instead of first. `chance` holds the same figures for a uniformly random order,
    `curve` recall over k with its chance. Queries without a match are only candidates; `queries` counts the others.

    Raises:
        ValueError: shapes disagree, an embedding is not finite, or no query of a direction has a match.
    """
    audio, text = _unit(audio_emb, "audio"), _unit(text_emb, "text")
    if audio.shape[1] != text.shape[1]:
        raise ValueError(f"audio embeddings have {audio.shape[1]} dimensions, text embeddings {text.shape[1]}")
    audio_keys = _match_ids(audio_ids, audio, "audio_ids")
    text_keys = _match_ids(text_ids, text, "text_ids")
    return {
        "audio_to_text": _direction(*match_ranks(audio, text, audio_keys, text_keys), len(text), "clip"),
        "text_to_audio": _direction(*match_ranks(text, audio, text_keys, audio_keys), len(audio), "text"),
    }


@torch.no_grad()
def match_ranks(
    queries: Tensor,  # [q, D] unit
    candidates: Tensor,  # [c, D] unit
    query_ids: Tensor,  # [q, k]
    candidate_ids: Tensor,  # [c, k']
) -> tuple[Tensor, Tensor]:
    """Rank of each query's best match (from 1; meaningless without a match) and its number of matches, int64 [q]."""
    ranks = torch.empty(len(queries), dtype=torch.int64)
    matches = torch.empty_like(ranks)
    query_ids = query_ids.where(query_ids >= 0, -1)  # two kinds of padding, which never equal one another
    candidate_ids = candidate_ids.where(candidate_ids >= 0, -2)
    rows = max(1, BLOCK // len(candidates))
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        score = queries[block] @ candidates.T
        match = torch.zeros_like(score, dtype=torch.bool)
        for query_column in query_ids[block].T:
            for candidate_column in candidate_ids.T:
                match |= query_column[:, None] == candidate_column
        best = score.masked_fill(~match, -torch.inf).amax(dim=1, keepdim=True)
        ranks[block] = (1 + ((score >= best - TIE) & ~match).sum(dim=1)).cpu()
        matches[block] = match.sum(dim=1).cpu()
    return ranks, matches


def prompt_ensemble(prompt_emb: Tensor, class_of_prompt: Tensor | Sequence[int], num_classes: int) -> Tensor:
    """Class embeddings [num_classes, D]: the mean of the unit vectors of each class's prompts [P, D], re-normalised.

    Raises:
        ValueError: a class has no prompt, or there is not one class for each prompt.
    """
    unit = _unit(prompt_emb, "prompt")
    index = torch.as_tensor(class_of_prompt, device=unit.device)
    if index.shape != unit.shape[:1]:
        raise ValueError(f"class_of_prompt has shape {list(index.shape)} for {len(unit)} prompts")
    missing = sorted(set(range(num_classes)) - set(index.tolist()))
    if missing:
        raise ValueError(f"class {missing[0]} of {num_classes} has no prompt")
    total = unit.new_zeros(num_classes, unit.shape[1]).index_add_(0, index, unit)
    return torch.nn.functional.normalize(total, dim=1)


def classification(
    audio_emb: Tensor,  # [n, D]
    class_text_emb: Tensor,  # [C, D]
    labels: Sequence[str],  # [n], each one of classes
    classes: Sequence[str],  # [C]
    merged: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Zero-shot classification: the class whose text is nearest by cosine (the first of equals), as a JSON-able dict.

    `accuracy` is what the speech literature calls weighted accuracy (WA), `uar` the unweighted average recall (UA,
    balanced accuracy): the mean recall of the classes that have clips. `macro_f1` is over all candidate classes, as in
    ParaSpeechCLAP: a candidate that no clip has and none is given counts 0. `confusion[i][j]` counts clips of class i
    given class j. `chance` = 1/C is the expected accuracy and UAR of a uniform guess, `majority_accuracy` the accuracy
    of always naming the most frequent class (its UAR is 1 / classes with clips).

    With `merged`, a class → another one, clips and decisions of the former count as the latter's once the nearest of
    all texts is known, and everything above is about the classes that are left.

    Raises:
        ValueError: shapes disagree, an embedding is not finite, a label is not a class, there is no clip, or a class is
            merged with what is no class or is merged itself.
    """
    from sklearn.metrics import precision_recall_fscore_support

    audio, text = _unit(audio_emb, "audio"), _unit(class_text_emb, "class text")
    if len(text) != len(classes) or len(set(classes)) != len(classes):
        raise ValueError(f"{len(classes)} class names ({len(set(classes))} distinct) for {len(text)} class embeddings")
    if len(audio) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(audio)} audio embeddings")
    index = {name: i for i, name in enumerate(classes)}
    unknown = next((label for label in labels if label not in index), None)
    if unknown is not None:
        raise ValueError(f"label {unknown!r} is not one of the classes: {', '.join(classes)}")

    merged = merged or {}
    counted_as = [merged.get(name, name) for name in classes]
    classes = [name for name in classes if name not in merged]
    if not set(counted_as) <= set(classes):
        raise ValueError(f"merged={dict(merged)}: a class can be merged only with one of {', '.join(classes)}")
    final = torch.tensor([classes.index(name) for name in counted_as])
    truth = final[[index[label] for label in labels]]
    given = torch.cat([(part @ text.T).argmax(dim=1) for part in audio.split(max(1, BLOCK // len(text)))]).cpu()
    given = final[given]
    every = range(len(classes))
    confusion = torch.bincount(truth * len(classes) + given, minlength=len(classes) ** 2).view(len(classes), -1)
    precision, recall, f1, clips = precision_recall_fscore_support(truth, given, labels=every, zero_division=0)
    present = clips > 0
    return {
        "classes": list(classes),
        "clips": len(labels),
        "accuracy": int(confusion.trace()) / len(labels),
        "uar": float(recall[present].mean()),
        "macro_f1": float(f1.mean()),
        "chance": 1 / len(classes),
        "majority_accuracy": float(clips.max() / len(labels)),
        "per_class": [
            {
                "class": name,
                "clips": int(clips[i]),
                "given": int(confusion[:, i].sum()),
                "recall": float(recall[i]) if present[i] else None,
                "precision": float(precision[i]),
                "f1": float(f1[i]),
            }
            for i, name in enumerate(classes)
        ],
        "confusion": confusion.tolist(),
    }


def _direction(ranks: Tensor, matches: Tensor, candidates: int, query: str) -> dict[str, Any]:
    has_match = matches > 0
    if not has_match.any():
        raise ValueError(f"no {query} has a match: audio_ids and text_ids share no id")
    ranks, matches = ranks[has_match].double(), matches[has_match]
    at = [k for k in CURVE_AT if k <= candidates]
    chance = _Chance(matches, candidates)
    return {
        "queries": len(ranks),
        "candidates": candidates,
        **{f"R@{k}": (ranks <= k).double().mean().item() for k in RECALL_AT},
        "mAP@10": (1 / ranks).where(ranks <= 10, 0.0).mean().item(),
        "median_rank": ranks.quantile(0.5).item(),
        "mean_rank": ranks.mean().item(),
        "chance": {
            **{f"R@{k}": chance.recall(k) for k in RECALL_AT},
            "mAP@10": sum((chance.recall(r) - chance.recall(r - 1)) / r for r in range(1, 11)),
            "median_rank": chance.median_rank(),
            "mean_rank": chance.mean_rank(),
        },
        "curve": {
            "k": at,
            "recall": [(ranks <= k).double().mean().item() for k in at],
            "chance": [chance.recall(k) for k in at],
        },
    }


class _Chance:
    """Retrieval in a uniformly random order of the candidates, p of which match: P(rank > k) = C(c-p, k) / C(c, k)."""

    def __init__(self, matches: Tensor, candidates: int) -> None:
        self.candidates = candidates
        values, counts = matches.unique(return_counts=True)
        self.matches = values.double()
        self.weight = counts.double() / counts.sum()

    def recall(self, k: int) -> float:
        c, p = torch.tensor(float(self.candidates), dtype=torch.float64), self.matches
        k = min(k, self.candidates)
        log_miss = torch.lgamma(c - p + 1) - torch.lgamma(c - p - k + 1) - torch.lgamma(c + 1) + torch.lgamma(c - k + 1)
        return float((self.weight * (1 - log_miss.exp())).sum())

    def mean_rank(self) -> float:
        return float((self.weight * (self.candidates + 1) / (self.matches + 1)).sum())

    def median_rank(self) -> float:
        low, high = 1, self.candidates
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.recall(middle) >= 0.5 - 1e-9 else (middle + 1, high)
        return float(low)


def _unit(embeddings: Tensor, name: str) -> Tensor:
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise ValueError(
            f"{name} embeddings have shape {list(embeddings.shape)}; needed: [count, dimensions], not empty"
        )
    finite = embeddings.isfinite().all(dim=1)
    if not finite.all():
        rows = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"{len(rows)} of {len(finite)} {name} embeddings are not finite (first: row {rows[0]})")
    embeddings = embeddings.detach()
    if not embeddings.is_cuda:
        embeddings = embeddings.cpu()  # other accelerators have no float64
    return torch.nn.functional.normalize(embeddings.double(), dim=1)


def _match_ids(ids: Tensor | Sequence[int], embeddings: Tensor, name: str) -> Tensor:
    keys = torch.as_tensor(ids, device=embeddings.device)
    if keys.is_floating_point() or keys.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, not {keys.dtype}")
    if keys.ndim == 1:
        keys = keys[:, None]
    if keys.ndim != 2 or len(keys) != len(embeddings):
        raise ValueError(f"{name} has shape {list(keys.shape)} for {len(embeddings)} embeddings")
    return keys.long()
