"""Speech style similarity of listed pairs: of two clips, or of a clip and a description, next to human ratings.

Each distinct clip and text is embedded once, however many pairs it is in. Ratings are checked before the model runs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastclap.apps.embed import check_finite, clip_row
from fastclap.console import Advance
from fastclap.data import BadClip
from fastclap.data.manifest import read_records
from fastclap.errors import DataError, raise_data_errors
from fastclap.evaluation.embedding import embed_clips
from fastclap.models.encoder import DualEncoder


class Pair(NamedTuple):
    """A clip, and the clip or the text with which it is compared."""

    named: tuple[str, str | None, str | None]  # columns audio, other_audio and text, as the table has them
    audio: str  # path
    other: str  # path, or text
    other_is_text: bool
    rating: float | None
    origin: str  # "FILE:LINE"


def read_pairs(
    name: str, *, audio_root: str | None = None, rating_column: str | None = None, ratings: str | None = None
) -> list[Pair]:
    """Pairs from a table with the columns `audio` and either `other_audio` or `text`.

    Args:
        name: the table.
        audio_root: folder from which relative paths start, by default the table's.
        rating_column: column of the ratings; by default `rating`, which then may be missing.
        ratings: another table that holds that column, with a line for each line of `name`.

    Raises:
        DataError: a column or value is missing, a rating is not a finite number, or there are more or fewer ratings
            than pairs; with file and line, up to ten.
    """
    records = read_records(name)
    root = os.path.dirname(name) if audio_root is None else audio_root
    columns = records[0][1]
    kinds = [column for column in ("other_audio", "text") if column in columns]
    if "audio" not in columns or len(kinds) != 1:
        raise DataError(
            f"{name}: a table of pairs has the column audio and one of other_audio and text; the columns are "
            f"{', '.join(map(str, columns))}"
        )
    kind = kinds[0]
    wanted = rating_column or "rating"
    rated_in, rated = (name, records) if ratings is None else (ratings, read_records(ratings))
    has_ratings = wanted in rated[0][1]
    if not has_ratings and (rating_column is not None or ratings is not None):
        raise DataError(f"{rated_in}: no column {wanted!r}; the columns are {', '.join(map(str, rated[0][1]))}")
    if has_ratings and len(rated) != len(records):
        raise DataError(f"{rated_in}: {len(rated)} ratings for the {len(records)} pairs of {name}; give one for each")
    errors: list[str] = []
    pairs = []
    for (line, record), (rating_line, rating_record) in zip(records, rated if has_ratings else records, strict=True):
        origin = f"{name}:{line}"
        audio, other = record.get("audio"), record.get(kind)
        empty = [c for c, v in (("audio", audio), (kind, other)) if not isinstance(v, str) or not v.strip()]
        rating = _number(rating_record.get(wanted)) if has_ratings else None
        if empty:
            errors.append(f"{origin}: the column {empty[0]!r} is {record.get(empty[0])!r}; it must be one text")
        elif has_ratings and rating is None:
            value = rating_record.get(wanted)
            what = "is missing" if value is None else f"{value!r} is not a number"
            errors.append(f"{rated_in}:{rating_line}: the rating (column {wanted!r}) {what}")
        else:
            assert isinstance(audio, str) and isinstance(other, str)
            is_text = kind == "text"
            named = (audio, None if is_text else other, other if is_text else None)
            joined = other if is_text else os.path.join(root, other)
            pairs.append(Pair(named, os.path.join(root, audio), joined, is_text, rating, origin))
    raise_data_errors(errors)
    return pairs


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def score_pairs(
    model: DualEncoder,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 32,
    threads: int = 4,
    advance: Advance = lambda done, total: None,
) -> tuple[list[float | None], list[dict[str, str]]]:
    """The cosine of each pair, None where a clip cannot be used, and those clips with their reasons.

    Args:
        model: in any mode, which it keeps.
        pairs: each distinct clip or text in them is embedded once.
        batch_size: clips embedded at a time.
        threads: decoding threads.
        advance: called with the numbers of clips done and of all clips, after each batch.

    Raises:
        DataError: no pair can be scored.
        ModelError: a vector is not finite.
    """
    origins: dict[str, str] = {}
    texts: dict[str, None] = {}
    for pair in pairs:
        origins.setdefault(pair.audio, pair.origin)
        if pair.other_is_text:
            texts[pair.other] = None
        else:
            origins.setdefault(pair.other, pair.origin)
    paths = list(origins)
    clip_rows = [clip_row(path, origin) for path, origin in origins.items()]
    bad: list[BadClip] = []
    clips: dict[str, Tensor] = {}
    for rows, vectors in embed_clips(model, clip_rows, batch_size=batch_size, threads=threads, bad=bad):
        check_finite(vectors, [paths[row] for row in rows])
        clips.update((paths[row], vector) for row, vector in zip(rows, vectors, strict=True))
        advance(len(clips) + len(bad), len(paths))
    others: Mapping[str, Tensor] = clips
    if texts:
        vectors = model.embed_text(list(texts))
        check_finite(vectors, list(texts))
        others = dict(zip(texts, vectors, strict=True))
    scores = [
        float(clips[pair.audio] @ others[pair.other]) if pair.audio in clips and pair.other in others else None
        for pair in pairs
    ]
    skipped = [{"path": clip.path, "reason": clip.reason} for clip in sorted(bad, key=lambda clip: clip.row)]
    if all(score is None for score in scores):
        raise DataError(
            f"none of the {len(pairs)} pairs can be scored; the first: {skipped[0]['path']}: {skipped[0]['reason']}"
        )
    return scores, skipped
