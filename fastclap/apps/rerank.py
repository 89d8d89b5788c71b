"""Best of N: of several synthesised clips for one description, keep those that fit it best.

Candidates come as a folder of iterations (`iter_K/audios/I.wav` for the K-th attempt at line I, counted from 0, of
`input_descriptions.txt`: ParaSpeechCLAP's layout) or as a table with one candidate a line. Everything that can be
checked without decoding is checked before the model runs, and each mistake is reported with its file and line; a blank
prompt line is one of them, since leaving it out would give every later item its neighbour's prompt. The selection is
written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastclap.apps.embed import check_finite, clip_row, read_lines
from fastclap.apps.scoring import normalized_weights, prompt_cosines
from fastclap.console import Advance, json_text
from fastclap.data import BadClip
from fastclap.data.manifest import read_records
from fastclap.errors import MAX_LISTED, ConfigError, DataError, raise_data_errors
from fastclap.evaluation.embedding import embed_clips
from fastclap.files import fsync
from fastclap.models.encoder import DualEncoder

PROMPTS_FILE = "input_descriptions.txt"
_COMMON_FILES = (PROMPTS_FILE, "input_genders.txt", "input_negative_descriptions.txt", "input_texts.txt")
_PER_CANDIDATE_FILES = ("wer_per_example.txt", "output_transcriptions.txt")


@dataclass
class Item:
    """One description with its candidates."""

    id: str  # file name in the selection, without the extension
    prompts: tuple[str, ...]  # several are averaged
    paths: list[str]  # audio file of each candidate
    labels: list[Any]  # iteration number or path of each candidate


@dataclass
class Candidates:
    """All items, and the companion files that go with a selection."""

    items: list[Item]
    common: list[Path] = field(default_factory=list)  # copied as they are
    lines: dict[str, list[list[str]]] = field(default_factory=dict)  # file name → for each item its candidates' lines
    table: bool = False  # whether they came as a table


def read_iterations(
    folder: str | os.PathLike[str], *, iterations: int | None = None, prompts: Sequence[str] = ()
) -> Candidates:
    """Candidates from `iter_1` to `iter_N`.

    Args:
        folder: holds the iterations.
        iterations: N; by default that of the last folder there is. None may be missing.
        prompts: files with one description a line, used instead of `iter_1/input_descriptions.txt`; several files give
            every item several descriptions.

    Raises:
        DataError: a folder or clip is missing, there are more clips than prompts, or prompts are blank, too few or too
            many, or not the same in all iterations; each with its file and line, up to ten.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found = {int(m[1]) for item in folder.iterdir() if (m := re.fullmatch(r"iter_([1-9][0-9]{0,17})", item.name))}
    count = iterations if iterations is not None else max(found, default=0)
    if count < 1:
        raise DataError(f"{folder}: no folders iter_1, iter_2, …; each holds audios/0.wav, 1.wav, … of one attempt")
    absent = (number for number in range(1, count + 1) if number not in found)
    missing = list(itertools.islice(absent, MAX_LISTED))  # there may be an iter_999999999
    if missing:
        raise DataError(
            f"{folder}: the iteration folder {', '.join(f'iter_{number}' for number in missing)} is "
            f"missing (of iter_1 to iter_{count}); synthesise it, or say how many there are with --iterations"
        )
    folders = [folder / f"iter_{number}" for number in range(1, count + 1)]
    errors: list[str] = []
    files = [Path(name) for name in prompts] or [folders[0] / PROMPTS_FILE]
    texts = [read_lines(file) for file in files]
    for file, lines in zip(files, texts, strict=True):
        errors += [
            f"{file}:{n}: blank line; " + (f"write the description of item {n - 1}" if any(lines[n:]) else "remove it")
            for n, text in enumerate(lines, 1)
            if not text
        ]
        if not lines:
            errors.append(f"{file}: empty; it needs one description a line")
        elif len(lines) != len(texts[0]):
            errors.append(f"{file}: {len(lines)} lines, but {files[0]} has {len(texts[0])}")
    if not prompts:
        errors += _differences(folders)
    items = len(texts[0])
    for iteration in folders:
        errors += _wrong_clips(iteration / "audios", items)
    lines_of_file = {}
    for name in _PER_CANDIDATE_FILES:
        holders = [iteration / name for iteration in folders]
        if not any(file.is_file() for file in holders):
            continue
        read = []
        for file in holders:
            if not file.is_file():
                errors.append(f"{file}: missing, but other iterations have it")
                continue
            read.append(read_lines(file))
            if len(read[-1]) != items:
                errors.append(f"{file}: {len(read[-1])} lines for {items} items")
        lines_of_file[name] = read
    raise_data_errors(errors)
    return Candidates(
        [
            Item(
                str(index),
                tuple(lines[index] for lines in texts),
                [str(iteration / "audios" / f"{index}.wav") for iteration in folders],
                list(range(1, count + 1)),
            )
            for index in range(items)
        ],
        [folders[0] / name for name in _COMMON_FILES if (folders[0] / name).is_file()],
        {name: [[lines[index] for lines in read] for index in range(items)] for name, read in lines_of_file.items()},
    )


def _differences(folders: Sequence[Path]) -> list[str]:
    """Where the prompts of a later iteration differ from the first: its clips were made for something else."""
    first = read_lines(folders[0] / PROMPTS_FILE)
    errors = []
    for folder in folders[1:]:
        file = folder / PROMPTS_FILE
        if file.is_file():
            lines = read_lines(file)
            unequal = [n for n, (a, b) in enumerate(zip(first, lines, strict=False), 1) if a != b]
            if unequal:
                errors.append(f"{file}:{unequal[0]}: not the line that {folders[0] / PROMPTS_FILE} has there")
            elif len(lines) != len(first):
                errors.append(f"{file}: {len(lines)} lines, but {folders[0] / PROMPTS_FILE} has {len(first)}")
    return errors


def _wrong_clips(folder: Path, items: int) -> list[str]:
    if not folder.is_dir():
        return [f"{folder}: no such folder; it holds the clips 0.wav to {items - 1}.wav"]
    found = {item.name for item in folder.iterdir() if item.suffix == ".wav"}
    wanted = [f"{index}.wav" for index in range(items)]
    missing = [name for name in wanted if name not in found]
    surplus = sorted(found.difference(wanted))
    errors = []
    if missing:
        errors.append(f"{folder}: {len(missing)} of {items} clips are missing, first {missing[0]}")
    if surplus:
        errors.append(f"{folder}: {len(surplus)} clips too many for {items} prompts, first {surplus[0]}")
    return errors


def read_table(name: str, *, audio_root: str | None = None, unequal: bool = False) -> Candidates:
    """Candidates from a CSV (or TSV, JSON, Parquet) with the columns `id`, `text` and `audio`, one a line.

    Lines with the same `id` are the candidates of one item and have the same `text`, which may be a list of
    descriptions.

    Args:
        name: the table.
        audio_root: folder from which relative paths start, by default the table's.
        unequal: accept items with different numbers of candidates.

    Raises:
        DataError: a column, file or value is missing, a candidate is there twice, texts of one id differ, or items have
            different numbers of candidates; each with file and line, up to ten.
    """
    records = read_records(name)
    root = os.path.dirname(name) if audio_root is None else audio_root
    items: dict[str, Item] = {}
    first_line: dict[str, int] = {}
    errors: list[str] = []
    absent = [column for column in ("id", "text", "audio") if column not in records[0][1]]
    if absent:
        raise DataError(f"{name}: no column {absent[0]!r}; a table of candidates has the columns id, text and audio")
    for line, record in records:
        values = {column: record.get(column) for column in ("id", "text", "audio")}
        empty = [column for column, value in values.items() if value is None or not str(value).strip()]
        if empty:
            errors.append(f"{name}:{line}: the column {empty[0]!r} is empty")
            continue
        identity, text, audio = str(values["id"]).strip(), values["text"], str(values["audio"])
        prompts = tuple(text) if isinstance(text, (list, tuple)) else (str(text),)
        if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            errors.append(f"{name}:{line}: the column 'text' holds a blank description: {text!r}")
            continue
        if (
            not re.fullmatch(r"[^/\\\0]{1,200}", identity)
            or identity in (".", "..")
            or len(os.fsencode(identity)) > 200
        ):
            errors.append(f"{name}:{line}: the id {identity!r} cannot be a file name")
            continue
        path = os.path.join(root, audio)
        item = items.setdefault(identity, Item(identity, prompts, [], []))
        begin = first_line.setdefault(identity, line)
        if item.prompts != prompts:
            errors.append(f"{name}:{line}: id {identity!r} has another text than on line {begin}")
        elif path in item.paths:
            errors.append(f"{name}:{line}: the candidate {audio} of id {identity!r} is there twice")
        elif not os.path.isfile(path):
            errors.append(f"{name}:{line}: no such audio file: {path}; correct it, or set --audio-root")
        else:
            item.paths.append(path)
            item.labels.append(audio)
    raise_data_errors(errors)
    most = max(items.values(), key=lambda item: len(item.paths))
    for item in items.values() if not unequal else ():
        if len(item.paths) != len(most.paths):
            errors.append(
                f"{name}:{first_line[item.id]}: id {item.id!r} has {len(item.paths)} candidates, id {most.id!r} has "
                f"{len(most.paths)}; add the missing ones, or accept this with --unequal"
            )
    raise_data_errors(errors)
    return Candidates(list(items.values()), table=True)


def rerank(
    models: Sequence[DualEncoder],
    candidates: Candidates,
    *,
    weights: Sequence[float] | None = None,
    top_k: int = 1,
    batch_size: int = 32,
    threads: int = 4,
    advance: Advance = lambda done, total: None,
) -> dict[str, Any]:
    """Score every candidate and rank those of each item.

    The score is the weighted mean over the models of the mean cosine with the item's descriptions. A candidate that
    cannot be decoded, or is silent, has no score and is never selected.

    Args:
        models: in any mode, which they keep.
        candidates: of all items.
        weights: of the models; equal by default.
        top_k: how many candidates of each item to select.
        batch_size: clips embedded at a time.
        threads: decoding threads.
        advance: called with the numbers of clips done and of all clips, over all models.

    Returns:
        JSON-able: `weights`, `items`, `candidates`, `skipped` (path, reason) and `selection`: for each item
        `prompt_idx` (for tables `id`), `text_prompt` (or `text_prompts`), `best_iteration_idx` (for tables
        `best_audio`), `best_score`, `all_scores` (by iteration or path, null where there is none) and `selected`, the
        `top_k` best, each with `rank`, `audio` and `score`. Of equal scores the first wins.

    Raises:
        ConfigError: there are fewer than `top_k` candidates, or the weights do not fit the models.
        DataError: an item has fewer than `top_k` candidates that can be used.
        ModelError: a vector is not finite.
    """
    shares = normalized_weights(len(models), weights)
    fewest = min(candidates.items, key=lambda item: len(item.paths))
    if not 1 <= top_k <= len(fewest.paths):
        raise ConfigError(f"--top-k is {top_k}, but item {fewest.id} has {len(fewest.paths)} candidates")
    clips = [clip_row(path, f"item {item.id}") for item in candidates.items for path in item.paths]
    prompts = [item.prompts for item in candidates.items for _ in item.paths]
    scores: list[float | None] = [0.0] * len(clips)
    skipped: dict[str, str] = {}
    total = len(clips) * len(models)
    for number, (model, share) in enumerate(zip(models, shares, strict=True)):
        bad: list[BadClip] = []
        done = number * len(clips)
        for rows, vectors in embed_clips(model, clips, batch_size=batch_size, threads=threads, bad=bad):
            check_finite(vectors, [clips[row].audio for row in rows])
            cosines = prompt_cosines(model, vectors, [prompts[row] for row in rows]).tolist()
            for row, cosine in zip(rows, cosines, strict=True):
                before = scores[row]
                scores[row] = None if before is None else before + share * cosine
            done += len(rows)
            advance(done + len(bad), total)
        for clip in bad:
            scores[clip.row] = None
            skipped[clip.path] = clip.reason
    selection, errors = [], []
    position = 0
    for item in candidates.items:
        own = scores[position : position + len(item.paths)]
        position += len(item.paths)
        ranked = sorted((i for i, score in enumerate(own) if score is not None), key=lambda i: -(own[i] or 0.0))
        if len(ranked) < top_k:
            reasons = "; ".join(f"{path}: {skipped[path]}" for path in item.paths if path in skipped)
            errors.append(f"item {item.id}: only {len(ranked)} of {len(item.paths)} candidates can be used ({reasons})")
            continue
        selection.append(_entry(item, own, ranked[:top_k], candidates.table))
    raise_data_errors(errors)
    return {
        "weights": shares,
        "items": len(candidates.items),
        "candidates": len(clips),
        "skipped": [{"path": path, "reason": reason} for path, reason in skipped.items()],
        "selection": selection,
    }


def _entry(item: Item, scores: Sequence[float | None], best: Sequence[int], table: bool) -> dict[str, Any]:
    one = len(item.prompts) == 1
    return {
        "id" if table else "prompt_idx": item.id if table else int(item.id),
        "text_prompt" if one else "text_prompts": item.prompts[0] if one else list(item.prompts),
        "best_audio" if table else "best_iteration_idx": item.labels[best[0]],
        "best_score": scores[best[0]],
        "all_scores": {str(label): score for label, score in zip(item.labels, scores, strict=True)},
        "selected": [
            {"rank": rank, "audio": item.paths[index], "score": scores[index]} for rank, index in enumerate(best, 1)
        ],
    }


def check_free(out: str | os.PathLike[str]) -> None:
    """Check that a selection can be written to `out`.

    Raises:
        DataError: something is there.
    """
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise DataError(f"{out}: exists already; remove it or name another folder")


def write_selection(candidates: Candidates, result: dict[str, Any], out: str | os.PathLike[str]) -> None:
    """Copy the selected clips to `out/audios` (second and later ranks to `out/rank_2/audios`, …) with the summary.

    `selection_summary.json` is the list `selection` of `rerank`, with the published keys first. The common text files
    of an iteration layout are copied; of files with one line a clip, the lines of the best clips are written.

    Raises:
        DataError: `out` exists and is not an empty folder.
        OSError: a file cannot be read or written; then nothing is left under the name `out`.
    """
    check_free(out)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for item, entry in zip(candidates.items, result["selection"], strict=True):
            for selected in entry["selected"]:
                rank = selected["rank"]
                folder = aside / "audios" if rank == 1 else aside / f"rank_{rank}" / "audios"
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy2(selected["audio"], folder / f"{item.id}{Path(selected['audio']).suffix}")
        for file in candidates.common:
            shutil.copy2(file, aside / file.name)
        for name, lines in candidates.lines.items():
            best = [
                lines[index][candidates.items[index].labels.index(entry["best_iteration_idx"])]
                for index, entry in enumerate(result["selection"])
            ]
            (aside / name).write_text("".join(f"{line}\n" for line in best), encoding="utf-8")
        summary = json_text(result["selection"], indent=2)
        (aside / "selection_summary.json").write_text(summary + "\n", encoding="utf-8")
        for file in sorted(aside.rglob("*")):
            fsync(file)
        os.replace(aside, out)
        fsync(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
