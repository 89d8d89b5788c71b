"""Unit vectors of whole collections of clips: the way that evaluation and every command with many clips share.

Clips are decoded, sorted and padded once, in threads one batch ahead of the model (`eval_batches`). Recordings of more
than `LONG_SECONDS` come first, one after the other, a few windows at a time, so that a collection of them needs no more
memory than one of clips. Where processes share towers that are sharded, all of them run each tower equally often, and a
long recording is read as a whole, like any clip.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from fastclap.audio import AudioError
from fastclap.data import BadClip, Row, eval_batches, open_clip
from fastclap.data.rows import clip_durations
from fastclap.evaluation.ranks import Embedded, EvaluationRanks
from fastclap.models import encoder
from fastclap.models.encoder import DualEncoder


class KnownVectors(Protocol):
    """Unit vectors of an evaluation that need no encoder, because a frozen tower's part in them is kept."""

    def clips(self, rank: int, size: int) -> Embedded | None:
        """This rank's share of a manifest's clips, its unusable ones included; None: they have to be encoded."""

    def texts(self, texts: Sequence[str]) -> Tensor | None:
        """All of these texts, in the order given, on every rank, all of which call this; None: to be encoded."""


def embed_clips(
    model: DualEncoder,
    manifest: Sequence[Row],
    *,
    batch_size: int = 32,
    threads: int = 4,
    bad: list[BadClip],
    ranks: EvaluationRanks | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Some rows of the manifest and their unit vectors [k, D], batch by batch, until all readable clips are done.

    Args:
        model: in any mode, which it keeps.
        manifest: the clips; any sequence of rows.
        batch_size: clips encoded at a time.
        threads: decoding threads.
        bad: receives the clips that cannot be used.
        ranks: processes that share the batches; this one yields its own.
    """
    ranks = ranks or EvaluationRanks(model, None)
    share = (ranks.rank, ranks.size)
    seconds = clip_durations(manifest)
    long = np.flatnonzero(seconds > (float("inf") if ranks.in_step else encoder.LONG_SECONDS)).tolist()
    for row in sorted(long, key=lambda row: -seconds[row])[ranks.rank :: ranks.size]:
        try:
            with open_clip(manifest[row], model.sampling_rate) as file:
                vector = model.embed_recording(file)
        except AudioError as error:
            bad.append(BadClip(row, error.path, error.reason, manifest[row].origin))
            continue
        yield [row], vector[None]
    others = np.setdiff1d(np.arange(len(seconds)), long)
    known = _Known(manifest, others, seconds[others])
    unusable: list[BadClip] = []
    batches = eval_batches(known, model.sampling_rate, batch_size, bad=unusable, threads=threads, share=share)
    for batch in itertools.chain(batches, itertools.repeat(None) if ranks.in_step else ()):
        bad += [clip._replace(row=int(others[clip.row])) for clip in unusable]
        unusable.clear()
        lengths = [] if batch is None else batch.lengths.tolist()
        if ranks.in_step:
            own = model.audio_runs(lengths) if lengths else 0
            runs = ranks.most(own)
            if not runs:
                return
            model.run_on_silence(runs - own)
        if batch is not None:
            yield others[batch.rows].tolist(), model.embed_batch(batch.audio, lengths)
    bad += [clip._replace(row=int(others[clip.row])) for clip in unusable]


class _Known(Sequence[Row]):
    """Some rows of a manifest, whose lengths have been read."""

    def __init__(self, manifest: Sequence[Row], rows: np.ndarray, seconds: np.ndarray) -> None:
        self._manifest, self._rows, self._seconds = manifest, rows, seconds

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        return self._manifest[int(self._rows[place])]._replace(duration=float(self._seconds[place]))


def embed_texts(
    model: DualEncoder, texts: Sequence[str], ranks: EvaluationRanks, known: KnownVectors | None = None
) -> Tensor:
    """Unit vectors of texts, in the order given: float32 [n, D] on the model's device, on every rank."""
    vectors = None if known is None else known.texts(texts)
    if vectors is not None:
        return vectors
    if ranks.size == 1:
        return model.embed_text(texts)
    batches = model.text_batches(texts)
    own = batches[ranks.rank :: ranks.size]

    def embed() -> tuple[list[int], list[Tensor], list[BadClip]]:
        parts = [model.embed_text([texts[index] for index in batch]) for batch in own]
        if ranks.in_step and len(own) * ranks.size < len(batches):  # other ranks have one more
            model.embed_text(texts[:1])
        return [index for batch in own for index in batch], parts, []

    order, vectors, _ = ranks.gathered(embed)
    back = sorted(range(len(order)), key=order.__getitem__)
    return vectors[back]
