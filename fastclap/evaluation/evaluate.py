"""From a model and a manifest to figures. Audio is embedded once, whatever is then measured on it.

The command line and the validation of a training run call the same function, so a figure in a log and one in a report
mean the same. A validation must not change the training around it: modules get their training flags back and the random
generators of Python, NumPy and torch their states. Clips that cannot be read are left out and listed: a figure never
hides the number of clips on which it is based.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastclap import console
from fastclap.data import BadClip, Manifest, Row
from fastclap.errors import ConfigError, DataError, ModelError
from fastclap.evaluation.embedding import KnownVectors, embed_clips, embed_texts
from fastclap.evaluation.metrics import classification, prompt_ensemble, retrieval, unique_texts
from fastclap.evaluation.projection import coordinates, even_selection, principal_components
from fastclap.evaluation.ranks import Embedded, EvaluationRanks
from fastclap.models.encoder import DualEncoder, evaluation_mode
from fastclap.prompts import DEFAULT_TEMPLATE, fill_template

Captions = Literal["global", "fine"]
CaptionsPerClip = Literal["first", "last", "all"]


@dataclass(frozen=True)
class ClassificationTask:
    """A manifest column to classify zero-shot.

    `prompts` gives each class its sentences, whose unit vectors are averaged; without it every class fills each of the
    `templates` (see `fastclap.prompts.fill_template`) with its name, or its word in `words`. `classes` are the
    candidates, by default those of `prompts`, else all values of the column, sorted. A class in `merged` is a candidate
    of its own, and only after the decision counts as the class that it is merged with, if that is a candidate too; so
    do its clips.
    """

    column: str = "classification_tag"
    templates: Sequence[str] = (DEFAULT_TEMPLATE,)
    prompts: Mapping[str, Sequence[str]] | None = None
    classes: Sequence[str] | None = None
    words: Mapping[str, str] = field(default_factory=dict)
    merged: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Labels:
    """What a map shows of a classification."""

    classes: list[str]
    class_of_clip: list[str | None]  # for each readable clip; None: none of the classes, or several
    prompts: Tensor  # [classes, D]


def evaluate(
    model: DualEncoder,
    manifest: Manifest,
    *,
    captions: Sequence[Captions] | None = None,
    tasks: Sequence[ClassificationTask] | None = None,
    captions_per_clip: CaptionsPerClip = "first",
    embedding_map: bool = False,
    width: int | None = None,
    batch_size: int = 32,
    progress: bool = False,
    process_group: dist.ProcessGroup | None = None,
    known: KnownVectors | None = None,
) -> dict[str, Any]:
    """Retrieval and zero-shot classification on one manifest, whose audio is embedded once, on the model's device.

    Args:
        model: in any mode, which it keeps.
        manifest: the clips, with their captions and tags.
        captions: the sets to retrieve with: "global" (text_description), "fine" (fine_description); default: those
            that the manifest has.
        tasks: the columns to classify; default: classification_tag if the manifest has it.
        captions_per_clip: "first" and "last" pair each clip with that caption only; with "all" every caption of a clip
            is a text of its own, and a clip's rank is that of its best-ranked caption. Equal texts are one text.
        embedding_map: also return `embeddings`, two principal components of the clips, to draw them.
        width: use the first columns of the embeddings alone, so many of them, scaled to unit length again: what a model
            trained with `--loss.matryoshka` is made for. Default: all of them.
        batch_size: clips embedded at a time.
        progress: show a bar on a terminal, lines otherwise, on stderr.
        process_group: processes that share the embedding, batch by batch; every one of them calls this with the same
            arguments and the same model, replicated or sharded, and receives the figures, which rank 0 computes. They
            are those of one process.
        known: gives vectors of this manifest's clips, or of texts, that need no encoder.

    Returns:
        A JSON-able dict: `clips` (on which the figures are based), `skipped` (row, path and reason of the others),
        `width` if it is given, `retrieval` by caption set and `classification` by column, as
        `fastclap.evaluation.retrieval` and `fastclap.evaluation.classification` describe them, and `time` in seconds
        (nothing else differs between two evaluations of the same model). A clip without a caption of a set has no part
        in that retrieval (`clips_without_caption`). A clip has no part in a classification if its column names none of
        the classes (`clips_without_class`) or several (`clips_with_several`); `merged`, where classes are, says which
        counts as which.

        With `embedding_map` also `embeddings`, a map of at most 2,000 clips, evenly selected: `rows` (of the manifest),
        `audio` (an [x, y] for each), `variance` (the share of the shown clips' variance along x and y) and `columns`,
        by classified column: `classes`, `class_of` (of each shown clip the index of its class, null without one or with
        several) and `prompts` (an [x, y] for each class). Clips and prompts are centred each on their own mean; the
        components are those of the clips (see `fastclap.evaluation.projection`).

    Raises:
        ConfigError: `width` is not among the columns of the embeddings.
        DataError: the manifest is empty, lacks a column, captions or classes asked for, or has no readable clip.
        ModelError: an embedding is not finite.
        TrainingError: another process of the group failed.
    """
    if len(manifest) == 0:
        raise DataError("the manifest is empty: there is nothing to evaluate")
    if captions is None:
        captions = caption_sets(manifest)
    if tasks is None:
        tasks = [ClassificationTask()] if any(row.classification_tag for row in manifest) else []
    for name in captions:
        if not any(_captions(row, name) for row in manifest):
            column = "text_description" if name == "global" else "fine_description"
            raise DataError(f"the manifest has no {name} captions (column {column})")
    candidates = [candidate_classes(manifest, task) for task in tasks]

    start = time.perf_counter()
    ranks = EvaluationRanks(model, process_group)
    with _training_untouched(model):
        audio, rows, skipped = _embed_manifest(model, manifest, batch_size, progress and ranks.rank == 0, ranks, known)
        audio = _cut(audio, width)
        audio_seconds = time.perf_counter() - start
        retrievals = {
            name: _retrieval(
                model,
                audio,
                [_captions(manifest[row], name) for row in rows],
                name,
                captions_per_clip,
                width,
                ranks,
                known,
            )
            for name in captions
        }
        classifications: dict[str, Callable[[], dict[str, Any]]] = {}
        labels: dict[str, _Labels] = {}
        for task, names in zip(tasks, candidates, strict=True):
            tags = [manifest[row].tags_of(task.column) for row in rows]
            classifications[task.column], labels[task.column] = _classification(
                model, audio, tags, task, names, width, ranks, known
            )

        def figures() -> dict[str, Any]:
            result: dict[str, Any] = {
                "clips": len(rows),
                "skipped": [{"row": bad.row, "path": bad.path, "reason": bad.reason} for bad in skipped],
                **({} if width is None else {"width": width}),
                "retrieval": {name: compute() for name, compute in retrievals.items()},
                "classification": {column: compute() for column, compute in classifications.items()},
            }
            if embedding_map:
                result["embeddings"] = _map(audio, rows, labels)
            seconds = time.perf_counter() - start
            return {**result, "time": {"seconds": round(seconds, 3), "audio_seconds": round(audio_seconds, 3)}}

        return ranks.from_first(figures)


def caption_sets(manifest: Manifest) -> list[Captions]:
    """The sets of captions that the manifest has."""
    sets: tuple[Captions, ...] = ("global", "fine")
    return [name for name in sets if any(_captions(row, name) for row in manifest)]


def evaluate_retrieval(
    model: DualEncoder,
    manifest: Manifest,
    *,
    captions: Captions = "global",
    captions_per_clip: CaptionsPerClip = "first",
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, Any]:
    """`evaluate` with one caption set and no classification."""
    return evaluate(
        model,
        manifest,
        captions=[captions],
        tasks=[],
        captions_per_clip=captions_per_clip,
        batch_size=batch_size,
        progress=progress,
    )


def evaluate_classification(
    model: DualEncoder,
    manifest: Manifest,
    *,
    column: str = "classification_tag",
    templates: Sequence[str] = (DEFAULT_TEMPLATE,),
    prompts: Mapping[str, Sequence[str]] | None = None,
    classes: Sequence[str] | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, Any]:
    """`evaluate` with one classification and no retrieval."""
    task = ClassificationTask(column, templates, prompts, classes)
    return evaluate(model, manifest, captions=[], tasks=[task], batch_size=batch_size, progress=progress)


def _embed_manifest(
    model: DualEncoder,
    manifest: Manifest,
    batch_size: int,
    progress: bool,
    ranks: EvaluationRanks,
    known: KnownVectors | None,
) -> tuple[Tensor, list[int], list[BadClip]]:
    """Unit vectors [clips, D] of the readable clips in the manifest's order, their rows, and the other clips."""

    def embed() -> Embedded:
        given = None if known is None else known.clips(ranks.rank, ranks.size)
        if given is not None:
            return given
        rows: list[int] = []
        found: list[Tensor] = []
        bad: list[BadClip] = []
        with console.progress("embedding", "embedded", "clips", progress) as advance:
            for batch, vectors in embed_clips(model, manifest, batch_size=batch_size, bad=bad, ranks=ranks):
                rows += batch
                found.append(vectors)
                advance(len(rows) + len(bad), len(manifest))
        return rows, found, bad

    rows, found, skipped = ranks.gathered(embed)
    skipped.sort(key=lambda clip: clip.row)
    if not rows:
        raise DataError(
            f"none of the {len(manifest)} clips can be used; the first: {skipped[0].path}: {skipped[0].reason}"
        )
    order = sorted(range(len(rows)), key=rows.__getitem__)
    audio, rows = found[order], [rows[i] for i in order]
    finite = audio.isfinite().all(dim=1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise ModelError(
            f"the model gives NaN or infinity for {len(bad)} of {len(rows)} clips, first for "
            f"{manifest[rows[bad[0]]].audio}: its weights are damaged or overflow in this precision"
        )
    return audio, rows, skipped


def _cut(vectors: Tensor, width: int | None) -> Tensor:
    """Unit vectors [n, D] as unit vectors [n, width] of their first columns."""
    if width is None:
        return vectors
    if not 1 <= width <= vectors.shape[1]:
        raise ConfigError(f"the width is {width}; the model's embeddings have 1 to {vectors.shape[1]} columns to use")
    return F.normalize(vectors[:, :width], dim=1)


def _retrieval(
    model: DualEncoder,
    audio: Tensor,
    captions: Sequence[Sequence[str]],
    name: str,
    captions_per_clip: CaptionsPerClip,
    width: int | None,
    ranks: EvaluationRanks,
    known: KnownVectors | None,
) -> Callable[[], dict[str, Any]]:
    """What computes the figures of a retrieval, with its texts embedded."""
    kept = [i for i, texts in enumerate(captions) if texts]
    if not kept:
        raise DataError(f"no clip with a {name} caption can be read")
    part = {"first": slice(1), "last": slice(-1, None), "all": slice(None)}[captions_per_clip]
    texts, ids = unique_texts([captions[i][part] for i in kept])
    vectors = _cut(embed_texts(model, texts, ranks, known), width)

    def figures() -> dict[str, Any]:
        return {
            "captions_per_clip": captions_per_clip,
            "clips": len(kept),
            "texts": len(texts),
            "clips_without_caption": len(captions) - len(kept),
            **retrieval(audio[kept], vectors, ids, range(len(texts))),
        }

    return figures


def _classification(
    model: DualEncoder,
    audio: Tensor,
    tags: Sequence[Sequence[str]],
    task: ClassificationTask,
    classes: Sequence[str],
    width: int | None,
    ranks: EvaluationRanks,
    known: KnownVectors | None,
) -> tuple[Callable[[], dict[str, Any]], _Labels]:
    """What computes the figures of a classification, with its prompts embedded, and what a map shows of it."""
    candidates = [[tag for tag in dict.fromkeys(values) if tag in set(classes)] for values in tags]
    kept = [i for i, found in enumerate(candidates) if len(found) == 1]
    if not kept:
        raise DataError(f"column {task.column!r}: no readable clip has exactly one of the classes {_abridged(classes)}")
    merged = {name: other for name, other in task.merged.items() if {name, other} <= set(classes)}
    words = [task.words.get(name, name) for name in classes]
    filled = [[fill_template(template, word) for template in task.templates] for word in words]
    prompts = [task.prompts[name] for name in classes] if task.prompts else filled
    owner = [i for i, texts in enumerate(prompts) for _ in texts]
    vectors = _cut(embed_texts(model, [text for texts in prompts for text in texts], ranks, known), width)
    class_emb = prompt_ensemble(vectors, owner, len(classes))

    def figures() -> dict[str, Any]:
        return {
            "templates": None if task.prompts else list(task.templates),
            **({"merged": merged} if merged else {}),
            "clips_without_class": sum(not found for found in candidates),
            "clips_with_several": sum(len(found) > 1 for found in candidates),
            **classification(audio[kept], class_emb, [candidates[i][0] for i in kept], classes, merged),
        }

    class_of_clip = [found[0] if len(found) == 1 else None for found in candidates]
    return figures, _Labels(list(classes), class_of_clip, class_emb)


def _map(audio: Tensor, rows: Sequence[int], labels: Mapping[str, _Labels]) -> dict[str, Any]:
    shown = even_selection(len(rows))
    directions, variance = principal_components(audio[shown])
    return {
        "rows": [rows[i] for i in shown],
        "audio": coordinates(audio[shown], directions),
        "variance": [round(share, 4) for share in variance.tolist()],
        "columns": {
            column: {
                "classes": known.classes,
                "class_of": [
                    None if (name := known.class_of_clip[i]) is None else known.classes.index(name) for i in shown
                ],
                "prompts": coordinates(known.prompts, directions),
            }
            for column, known in labels.items()
        },
    }


def candidate_classes(manifest: Manifest, task: ClassificationTask) -> list[str]:
    """The candidate classes of a task, after the checks that need no model."""
    found = sorted({tag for row in manifest for tag in row.tags_of(task.column)})
    if not found:
        has_tag = any(row.classification_tag for row in manifest)
        available = [*(["classification_tag"] if has_tag else []), *manifest.columns]
        raise DataError(
            f"the manifest has no column {task.column!r} to classify; it has: {', '.join(available) or 'no tag column'}"
        )
    classes = list(task.classes or task.prompts or found)
    if len(set(classes)) < len(classes):
        raise DataError(f"column {task.column!r}: a class is given twice in {_abridged(classes)}")
    if not set(classes) & set(found):
        raise DataError(
            f"column {task.column!r} has none of the classes {_abridged(classes)}; it has: {_abridged(found)}"
        )
    if task.prompts:
        missing = [name for name in classes if not task.prompts.get(name)]
        if missing:
            raise DataError(
                f"no prompt for class {missing[0]!r}; there are prompts for: {_abridged(list(task.prompts))}"
            )
    else:
        for template in task.templates:
            fill_template(template, classes[0])
    return classes


def _captions(row: Row, name: Captions) -> tuple[str, ...]:
    return row.captions if name == "global" else row.fine_captions


def _abridged(names: Sequence[str]) -> str:
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")


@contextlib.contextmanager
def _training_untouched(model: DualEncoder) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module's flag and every generator is as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with evaluation_mode(model), torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
