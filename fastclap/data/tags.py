"""Tags of clips: their vocabulary, the prompts that stand for them in a tag loss, and weights for balanced sampling.

Tags are compared stripped and in lower case, so "Deep" and "deep " are one tag. Everything that is drawn is a hash of
(seed, step): ranks and resumed runs draw alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastclap.data.hashing import PROMPT, draw
from fastclap.data.rows import Manifest, Row, check_column
from fastclap.errors import DataError
from fastclap.prompts import DEFAULT_TEMPLATE, fill_template, load_prompts


def row_tags(row: Row, column: str) -> tuple[str, ...]:
    """The tags of a clip in a tag column, normalised, each once, in the order of the manifest."""
    return tuple(dict.fromkeys(tag for value in row.tags_of(column) if (tag := value.strip().lower())))


def clip_tags(manifest: Manifest, column: str) -> list[tuple[str, ...]]:
    """The tags of every row.

    Raises:
        DataError: no row has a tag in this column.
    """
    check_column(manifest, column, "--data.tag-column")
    tags = [row_tags(row, column) for row in manifest]
    if not any(tags):
        raise DataError(f"{', '.join(manifest.source_names)}: all tags in column {column!r} are blank")
    return tags


class TagPrompts:
    """The tag vocabulary of a training manifest, and one sentence for each tag at each step.

    Args:
        manifest: where the vocabulary comes from: the sorted distinct tags of the column.
        column: tag column.
        path: JSON file of sentences, {tag: [sentence, ...]}; a tag that it lacks gets ParaSpeechCLAP's template, "A
            person is speaking in a {} style." Without a file all tags do.
        seed: fixes the draws, together with the step.

    Attributes:
        vocabulary: the tags, in the order of the loss's columns.
        sentences: those of each tag, from which `draw` draws one.

    Raises:
        DataError: no row has a tag, or the file is unusable.
    """

    def __init__(self, manifest: Manifest, column: str, path: str | Path | None = None, *, seed: int = 0) -> None:
        self.column = column
        self.seed = seed
        self.vocabulary = sorted({tag for tags in clip_tags(manifest, column) for tag in tags})
        written: Mapping[str, list[str]] = load_prompts(path, column) if path is not None else {}
        sentences = {tag.strip().lower(): texts for tag, texts in written.items()}
        self.sentences = [sentences.get(tag) or [fill_template(DEFAULT_TEMPLATE, tag)] for tag in self.vocabulary]
        self._index = {tag: index for index, tag in enumerate(self.vocabulary)}

    def draw(self, step: int) -> list[str]:
        """One sentence for each tag, uniformly from its list, fixed by (seed, step)."""
        return [texts[draw(len(texts), self.seed, step, PROMPT, index)] for index, texts in enumerate(self.sentences)]

    def targets(self, rows: Sequence[Row]) -> Tensor:
        """bool [rows, tags]: which clip has which tag. Tags outside the vocabulary are ignored."""
        targets = torch.zeros(len(rows), len(self.vocabulary), dtype=torch.bool)
        for position, row in enumerate(rows):
            for tag in row_tags(row, self.column):
                if tag in self._index:
                    targets[position, self._index[tag]] = True
        return targets


def balanced_weights(
    tags: Sequence[Sequence[str]], weighting: Literal["inverse", "sqrt", "log"], rare_share: float
) -> tuple[np.ndarray, np.ndarray]:
    """ParaSpeechCLAP's class-balanced weights (arXiv 2603.28737).

    A tag that n clips have weighs 1/n, 1/√n or 1/ln(n + 1), scaled so that all tags sum to their number. A clip weighs
    the mean of its tags, or the least tag weight if it has none.

    Args:
        tags: the tags of each clip.
        rare_share: a tag that less than this share of all clips have is rare.

    Returns:
        float64 [clips], the weights, and bool [clips], whether the clip has a rare tag.
    """
    counts = Counter(tag for clip in tags for tag in clip)
    shapes = {"inverse": lambda n: 1 / n, "sqrt": lambda n: n**-0.5, "log": lambda n: 1 / np.log(n + 1)}
    raw = {tag: float(shapes[weighting](count)) for tag, count in counts.items()}
    scale = len(raw) / sum(raw.values())
    weights = {tag: scale * value for tag, value in raw.items()}
    least = min(weights.values())
    clip_weights = [sum(weights[tag] for tag in clip) / len(clip) if clip else least for clip in tags]
    rare = {tag for tag, count in counts.items() if count / len(tags) < rare_share}
    return np.array(clip_weights), np.array([any(tag in rare for tag in clip) for clip in tags])
