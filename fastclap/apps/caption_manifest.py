"""A manifest, or a folder of audio files, with captions made from measures and labels: `fastclap caption`.

Clips are measured in processes, each result being written at once to a hidden folder next to the output, so that an
interrupted call goes on. Then the thresholds of the whole set are known and the rows are written in their order. The
output appears under its name only when it is complete.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastclap.apps.acoustics import SAMPLING_RATE, VERSION, Acoustics, measure, sex_of_voice
from fastclap.apps.captions import LABELS, Thresholds, describe, labels_of
from fastclap.apps.embed import AUDIO_SUFFIXES, audio_files, clip_key, clip_row, is_table_folder
from fastclap.audio import INT16_SCALE, AudioError, AudioFile, whole_clip
from fastclap.console import Advance, json_text
from fastclap.data import Row, load_manifest
from fastclap.data.manifest import read_records
from fastclap.data.shards import is_pack
from fastclap.data.workers import map_rows
from fastclap.errors import ConfigError, DataError
from fastclap.files import locked, replacing
from fastclap.prompts import parse_sex
from fastclap.reading import parse_json, read_bytes

_OWN = ("text_description", "fine_description", "intrinsic_tags", "situational_tags")
_SEXES = ("sex", "gender")
_MOST_MEASURED = 1 << 32  # bytes of what an earlier call measured


class _Clip(NamedTuple):
    """A clip to caption."""

    row: Row
    record: Mapping[str, Any]  # what the manifest says, all of it
    name: str  # its path as the manifest has it, which fixes the draws


def caption(
    source: str,
    out: str | os.PathLike[str],
    *,
    audio_root: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    phrases: Mapping[str, str] | None = None,
    thresholds: str = "published",
    replace: bool = False,
    captions: int = 4,
    fine: int = 2,
    seed: int = 0,
    workers: int = 1,
    advance: Advance = lambda done, total: None,
) -> dict[str, Any]:
    """Write a manifest of captions, or go on where an interrupted call stopped.

    A row keeps every column it had and gains `audio` (relative to the output's folder), `text_description` and
    `fine_description` (after the captions that were there), `intrinsic_tags`, `situational_tags`, and the measures, by
    the names of `Acoustics`. Without a label of the sex, `measured_sex` has what the voice sounds like. The thresholds
    that were used are written to NAME-thresholds.json, clips that cannot be used to NAME-skipped.jsonl.

    Args:
        source: a manifest as `load_manifest` reads it (but no packed folder), or a folder of audio files.
        out: the manifest to write, a .jsonl file.
        audio_root, columns: as `load_manifest` has them.
        labels: columns to use of those in `LABELS`; by default all that the manifest has.
        phrases: other columns to use: column → part of a sentence, with {} for the value ("over a {}").
        thresholds: "published" (where there are some, else terciles of the set), "set" (terciles), or the file of an
            earlier call, so that a second set is worded like the first.
        replace: leave out the captions and tags that the rows had.
        captions, fine: global and fine captions a clip.
        seed: fixes the wording, together with the clip's path in the manifest.
        workers: processes that measure; 0 measures in this one.
        advance: called with the clips done and the clips in all.

    Returns:
        JSON-able: `out`, `rows`, `hours`, `skipped`, `skipped_file` (None if nothing was skipped), `thresholds_file`,
        `reused` (clips that an earlier call had measured), `sex`: {"labelled": {...}, "measured": {...}} with the
        clips of each ("unknown" among them), and `example`, the first row's captions.

    Raises:
        ConfigError: an impossible option.
        DataError: nothing to caption, a column that no row has, or no clip that can be used.
    """
    out = Path(out)
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out {out}: name a .jsonl file")
    if os.path.realpath(out) == os.path.realpath(source):
        raise ConfigError(f"--out {out}: is the manifest itself; name another file")
    if captions < 1 or fine < 0 or workers < 0:
        raise ConfigError(
            f"--captions is {captions}, --fine-captions {fine}, --workers {workers}; the first must be at least 1, the "
            "others at least 0"
        )
    fixed = None if thresholds in ("published", "set") else Thresholds.read(thresholds)
    clips = _clips(source, audio_root, columns)
    used, phrases = _used_labels(source, clips, labels, phrases or {})
    parts = out.with_name(f".{out.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    with locked(parts, "captioning into"):
        measured, reused = _measure_all(clips, parts / "measured.jsonl", workers, advance)
        good = [(clip, found) for clip in clips if isinstance(found := measured[clip_key(clip.row)], Acoustics)]
        lost = [(clip, found) for clip in clips if isinstance(found := measured[clip_key(clip.row)], str)]
        skipped_file = out.with_name(f"{out.stem}-skipped.jsonl")
        _write_skipped(skipped_file, lost)
        if not good:
            raise DataError(
                f"{source}: none of the {len(clips)} clips can be used; {lost[0][0].row.audio}: {lost[0][1]} "
                f"(all: {skipped_file})"
            )
        labelled = [_labelled_sex(clip, used) for clip, _ in good]
        sexes = [sex or sex_of_voice(found) for sex, (_, found) in zip(labelled, good, strict=True)]
        bounds = fixed or Thresholds.of_set(
            ((found, sex) for sex, (_, found) in zip(sexes, good, strict=True)), published=thresholds == "published"
        )
        options = {"seed": seed, "captions": captions, "fine": fine}
        example: list[str] = []
        with replacing(out) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
            for (clip, found), known, sex in zip(good, labelled, sexes, strict=True):
                said = labels_of(_label_values(clip, used, phrases), sex, phrases)
                description = describe(found, said, bounds, name=clip.name, **options)
                example = example or [*description.captions, *description.fine]
                row = _captioned(clip, found, description, out, replace)
                if known is None:
                    row["measured_sex"] = sex or "unknown"
                file.write(json_text(row) + "\n")
        thresholds_file = out.with_name(f"{out.stem}-thresholds.json")
        with replacing(thresholds_file) as temporary:
            temporary.write_text(bounds.to_json(), encoding="utf-8")
    shutil.rmtree(parts)
    counts = {"labelled": Counter(sex for sex in labelled if sex), "measured": Counter[str]()}
    counts["measured"].update(sex or "unknown" for known, sex in zip(labelled, sexes, strict=True) if known is None)
    return {
        "out": os.fspath(out),
        "rows": len(good),
        "hours": round(sum(found.duration for _, found in good) / 3600, 4),
        "skipped": len(lost),
        "skipped_file": os.fspath(skipped_file) if lost else None,
        "thresholds_file": os.fspath(thresholds_file),
        "reused": reused,
        "sex": {kind: dict(sorted(count.items())) for kind, count in counts.items()},
        "example": example,
    }


# ---------------------------------------------------------------------------------------------------------------------
# what to caption


def _clips(source: str, audio_root: str | None, columns: Mapping[str, str] | None) -> list[_Clip]:
    if os.path.isdir(source) and not is_table_folder(source):
        found = [
            _Clip(clip_row(path, source), {}, os.path.relpath(path, source).replace(os.sep, "/"))
            for path in audio_files(source)
        ]
        if not found:
            raise DataError(f"{source}: no audio file in this folder ({', '.join(sorted(AUDIO_SUFFIXES))})")
        return found
    if is_pack(source):
        raise DataError(
            f"{source}: is a packed folder; caption the manifest that it was packed from, and pack the result"
        )
    manifest = load_manifest(source, audio_root=audio_root, columns=columns, require_captions=False)
    clips = []
    for row, (_, record) in zip(manifest, read_records(source), strict=True):
        written = next(
            (record[name] for name in _path_columns(columns) if isinstance(record.get(name), str)), row.audio
        )
        clips.append(_Clip(row, record, written))
    return clips


def _path_columns(columns: Mapping[str, str] | None) -> list[str]:
    return [(columns or {}).get(name, name) for name in ("audio", "relative_audio_path")]


def _used_labels(
    source: str, clips: Sequence[_Clip], labels: Sequence[str] | None, phrases: Mapping[str, str]
) -> tuple[list[str], Mapping[str, str]]:
    """The columns of `LABELS` to use, and the phrases, both checked.

    Raises:
        ConfigError: a label that has no words, or a phrase without {}.
        DataError: a column that no row fills.
    """
    found = dict.fromkeys(itertools.chain.from_iterable(_columns_of(clip.row) for clip in clips))
    for column in labels or ():
        if column not in LABELS:
            raise ConfigError(
                f"--labels {column}: captions have words for {', '.join(LABELS)}; say how another column is worded "
                f'with --phrases {column} "... {{}} ..."'
            )
    for column, text in phrases.items():
        if "{}" not in text:
            raise ConfigError(f"--phrases {column} {text!r}: must contain {{}} for the value of the column")
    for column in (*(labels or ()), *phrases):
        if column not in found:
            raise DataError(
                f"{source}: no clip has a label in column {column!r}; columns: {', '.join(found) or 'none'}"
            )
    return [column for column in LABELS if column in (found if labels is None else labels)], phrases


def _columns_of(row: Row) -> Iterator[str]:
    yield from row.tags
    if row.classification_tag:
        yield "classification_tag"


def _label_values(clip: _Clip, used: Iterable[str], phrases: Iterable[str]) -> dict[str, str]:
    """Column → its first value, stripped, of the columns that the row fills."""
    values = {column: next(iter(clip.row.tags_of(column)), "").strip() for column in (*used, *phrases)}
    return {column: value for column, value in values.items() if value}


def _labelled_sex(clip: _Clip, used: Iterable[str]) -> str | None:
    values = _label_values(clip, (column for column in _SEXES if column in used), ())
    return next((sex for value in values.values() if (sex := parse_sex(value))), None)


# ---------------------------------------------------------------------------------------------------------------------
# measuring


def _measure_row(row: Row) -> Acoustics | str:
    """The measures of a clip, or why it cannot be used."""
    if not row.audio.isprintable() and row.audio != row.audio.encode(errors="replace").decode():
        return "its name is not UTF-8, which no manifest can hold; rename it"
    try:
        with AudioFile(row.audio, SAMPLING_RATE) as file:
            return measure(whole_clip(file).wave / INT16_SCALE)
    except AudioError as error:
        return error.reason
    except DataError as error:
        return str(error)


def _measure_all(
    clips: Sequence[_Clip], store: Path, workers: int, advance: Advance
) -> tuple[dict[bytes, Acoustics | str], int]:
    """What is found of each clip, by its key, and how many were known from an earlier call."""
    done = _read_store(store)
    wanted = {clip_key(clip.row): clip.row for clip in clips}
    missing = {key: row for key, row in wanted.items() if key not in done}
    reused = len(wanted) - len(missing)
    advance(reused, len(wanted))
    with store.open("a", encoding="utf-8") as file:
        if not done:
            file.truncate(0)
            file.write(json.dumps({"version": VERSION}) + "\n")
        measured = map_rows(
            _measure_row, missing.values(), min(workers, len(missing)), ahead=4, doing="measuring", goes_on="from there"
        )
        for count, (key, found) in enumerate(zip(missing, measured, strict=True), 1):
            done[key] = found
            told = {"reason": found} if isinstance(found, str) else dataclasses.asdict(found)
            file.write(json.dumps({"key": key.hex(), **told}) + "\n")
            file.flush()
            advance(reused + count, len(wanted))
    return done, reused


def _read_store(store: Path) -> dict[bytes, Acoustics | str]:
    """What an earlier call found; nothing if its measures were of another version. A line cut short ends it."""
    found: dict[bytes, Acoustics | str] = {}
    try:
        lines = read_bytes(store, limit=_MOST_MEASURED).split(b"\n")
        if parse_json(lines[0], str(store)) != {"version": VERSION}:
            return {}
        for line in lines[1:-1]:  # the last one was cut short, or is empty
            told = parse_json(line, str(store))
            key = bytes.fromhex(told.pop("key"))
            found[key] = str(told["reason"]) if "reason" in told else _acoustics(told)
    except (ValueError, KeyError, TypeError, AttributeError):  # missing or damaged: what follows is measured again
        pass
    return found


def _acoustics(told: Mapping[str, Any]) -> Acoustics:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    for value in values.values():
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not (isinstance(number, (int, float)) and math.isfinite(number)):
                raise ValueError(f"{number!r} is no measure")
    return Acoustics(**values)


# ---------------------------------------------------------------------------------------------------------------------
# writing


def _captioned(clip: _Clip, found: Acoustics, description: Any, out: Path, replace: bool) -> dict[str, Any]:
    """The row to write."""
    row = clip.row
    folder = os.path.realpath(out.parent)
    audio = os.path.relpath(
        os.path.join(os.path.realpath(os.path.dirname(row.audio)), os.path.basename(row.audio)), folder
    )
    had: dict[str, Sequence[str]] = {
        "text_description": row.captions,
        "fine_description": row.fine_captions,
        **{column: row.tags_of(column) for column in _OWN[2:]},
    }
    new = dict(zip(_OWN, description, strict=True))
    kept = {name: value for name, value in clip.record.items() if value is not None and name not in _OWN}
    measures = {name: value for name, value in dataclasses.asdict(found).items() if value is not None}
    duration = {"duration": row.duration if row.duration is not None else found.duration}
    label = {"classification_tag": row.classification_tag} if row.classification_tag else {}
    merged = {name: list(dict.fromkeys((*(() if replace else had[name]), *new[name]))) for name in _OWN}
    return {
        "audio": audio.replace(os.sep, "/"),
        **{name: value for name, value in merged.items() if value},
        **{name: value for name, value in {**kept, **label}.items() if name != "audio"},
        **measures,
        **duration,
    }


def _write_skipped(path: Path, lost: Sequence[tuple[_Clip, Acoustics | str]]) -> None:
    """The list of clips that cannot be used, or no file where there are none."""
    if not lost:
        path.unlink(missing_ok=True)  # of an earlier call
        return
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for clip, reason in lost:
            note = {"path": clip.row.audio, "reason": reason, "origin": clip.row.origin}
            file.write(json_text(note) + "\n")
