"""Reading manifests: tables of clips and captions, checked and turned into a `Manifest` of rows.

Every format is turned into the same stream of records, one checker turns records into rows, and all errors of a
manifest are reported together, each with file, row, column, value and remedy.
"""

from __future__ import annotations

import ast
import csv
import math
import os
import re
import reprlib
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fastclap.data.rows import Manifest, Mix, PackedClip, Row, check_mix, check_text
from fastclap.data.shards import CLIP_COLUMN, is_pack, parquet_records, read_pack
from fastclap.errors import MAX_LISTED, DataError, FastclapError, required
from fastclap.reading import kind_of_file, parse_json, read_text

Record = Mapping[str, Any]
Records = Iterator[tuple[int, Record]]  # each with its line or number

_FILES_TO_TRY = 8
_MAX_LINE = 64 << 20  # characters
_MAX_JSON = 1 << 32  # bytes of a .json manifest, which is read as a whole
_MAX_SECONDS = 1e7  # of a clip
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how Python reads a byte that is not UTF-8, if it is told to
_PATH_COLUMNS = ("audio", "relative_audio_path")
_CAPTION_COLUMNS = ("text_description", "fine_description")
_FIELD_COLUMNS = ("source", "classification_tag", "duration", "text_style_prompt")
_TAG_COLUMNS = ("intrinsic_tags", "situational_tags")
_KNOWN_COLUMNS = (*_PATH_COLUMNS, *_CAPTION_COLUMNS, *_FIELD_COLUMNS, *_TAG_COLUMNS)
_NOT_TAGS = frozenset((*_PATH_COLUMNS, *_CAPTION_COLUMNS, "classification_tag", "duration", "text_style_prompt"))


def load_manifest(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    audio_root: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    mix: Mix = "concat",
    probabilities: Sequence[float] | None = None,
    require_captions: bool = True,
    check_files: bool = False,
) -> Manifest:
    """Read, join and check manifests.

    A row has `audio` or `relative_audio_path` (`audio` wins if both are there), `text_description` (a string or
    a list of strings), and optionally `fine_description` (likewise), `classification_tag`, `duration` in seconds
    and `text_style_prompt`. Every other column that holds strings, numbers or lists of them is a tag column,
    `source`, `intrinsic_tags` and `situational_tags` among them; nested values are left out. In CSV and TSV a
    cell may hold a list as JSON or Python writes it. The same audio may occur with different captions; a row that
    repeats another in audio, captions and tags is an error.

    A relative path is looked up under `audio_root`, by default the manifest's own folder, as ROOT/PATH or as
    ROOT/SOURCE/PATH (ParaSpeechCaps' layout) with the row's `source`. Which of the two holds is settled once for each
    value of `source` by looking for a few of its files.

    Args:
        sources: one or more of: a .jsonl, .json (an array of objects), .csv, .tsv or .parquet file; a folder written by
            `fastclap pack` or `datasets.save_to_disk`; "hf:NAME" or "hf:NAME:SPLIT" for `datasets.load_dataset`,
            split "train" if not given.
        audio_root: folder that relative paths are relative to.
        columns: our column name → the name the files use for it. A file without their name may still use ours.
        mix: "concat" shuffles all rows together; "interleave" alternates between sources, see
            `BatchSampler`.
        probabilities: for "interleave", the share of each source in the batches; they sum to 1.
        require_captions: whether a row without `text_description` is an error.
        check_files: look for every audio file now, instead of a few for each source; takes long over a network.

    Raises:
        DataError: nothing to read, or rows that break the rules above; up to ten errors are listed, the rest counted.
    """
    names = [os.fspath(name) for name in ([sources] if isinstance(sources, (str, os.PathLike)) else sources)]
    if not names:
        raise DataError("no manifest given; name at least one file, packed or datasets folder, or hf:NAME")
    check_mix(names, mix, probabilities)
    remap = columns or {}
    for ours in remap:
        if ours not in _KNOWN_COLUMNS:
            raise DataError(f"cannot remap {ours!r}: the columns with a meaning are {', '.join(_KNOWN_COLUMNS)}")
    errors = _Errors()
    root = None if audio_root is None else os.fspath(audio_root)
    rules = _Rules(root, remap, ("audio", "text_description") if require_captions else ("audio",), check_files)
    seen: dict[int, str] = {}
    checkers = [_Checker(name, index, rules, seen, errors) for index, name in enumerate(names)]
    rows = (row for checker in checkers for row in checker.rows())
    manifest = Manifest(rows, source_names=names, mix=mix, probabilities=probabilities)
    found = {column: None for checker in checkers for column in checker.columns}
    for column, theirs in remap.items():
        if found and theirs not in found:
            errors.add(
                f"{', '.join(names)}: no column {theirs!r} to use as {column!r}; the columns are {', '.join(found)}; "
                "correct the remapping (--data.columns)"
            )
    errors.raise_if_any()
    return manifest


def read_records(name: str) -> list[tuple[int, Record]]:
    """The records of any table that a manifest may be, each with its line (or number), whatever its columns.

    In CSV and TSV an empty cell is None and a cell that holds a list becomes that list; other cells stay text.

    Raises:
        DataError: the file is missing, of an unknown type or damaged, or has no record.
    """
    errors = _Errors()
    records = list(_open_source(name, errors)[0])
    errors.raise_if_any()
    if not records:
        raise DataError(f"{name}: the table is empty; it needs at least one row")
    return records


class _Errors:
    """Collects the errors of all sources, keeping the first few."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.count = 0

    def add(self, message: str) -> None:
        self.count += 1
        if len(self.messages) < MAX_LISTED:
            self.messages.append(message)

    def raise_if_any(self) -> None:
        if self.count:
            more = f"\n... and {self.count - len(self.messages)} more" if self.count > len(self.messages) else ""
            raise DataError("\n".join(self.messages) + more)


class _RowError(Exception):
    """What is wrong with a row; becomes a message that also names the file and the row."""


class _Rules(NamedTuple):
    """What the rows of every source must satisfy."""

    audio_root: str | None  # None: the folder of each source
    remap: Mapping[str, str]  # our column name → theirs
    required: Sequence[str]  # columns
    check_files: bool  # whether every audio file has to be there


class _Columns(NamedTuple):
    """What the columns of a record mean; records with the same columns share one."""

    theirs: dict[str, str]  # our name → the record's, of the columns with a meaning
    tags: list[tuple[str, str]]  # (the record's name, the tag column's name)
    absent: list[str]  # required columns that the record lacks


class _Checker:
    """Turns the records of one source into rows."""

    def __init__(self, name: str, index: int, rules: _Rules, seen: dict[int, str], errors: _Errors) -> None:
        self.name = name
        self.index = index
        self.rules = rules
        self.seen = seen  # hash of a row's content → where it was read
        self.errors = errors
        self.records, folder = _open_source(name, errors)
        self.root = folder if rules.audio_root is None else rules.audio_root
        self.numbers_are_text = name.lower().endswith((".csv", ".tsv"))
        self.columns: dict[str, None] = {}
        self.layouts: dict[str, bool] = {}  # value of `source` → whether files lie under ROOT/SOURCE
        self.tried: dict[str, list[tuple[str, ...]]] = {}  # value of `source` → missing paths

    def rows(self) -> Iterator[Row]:
        total, errors_before = 0, self.errors.count
        lacking: dict[str, list[str]] = {column: [] for column in self.rules.required}
        meanings: dict[tuple[str, ...], _Columns] = {}
        for line, record in self.records:
            total += 1
            origin = f"{self.name}:{line}"
            columns = meanings.get(keys := tuple(record))
            if columns is None:
                self.columns.update(dict.fromkeys(keys))
                columns = meanings[keys] = self._column_meanings(keys)
            for column in columns.absent:
                lacking[column].append(origin)
            if columns.absent:
                continue
            try:
                row = self._row(record, columns, origin)
            except _RowError as error:
                self.errors.add(f"{origin}: {error}")
                continue
            try:
                check_text(row)
            except DataError as error:
                self.errors.add(str(error))
                continue
            key = hash((row.audio, *row[1:3], tuple(row.tags.items()), *row[4:7]))
            first = self.seen.setdefault(key, origin)
            if first is not origin:
                self.errors.add(f"{origin}: duplicate of {first} (same audio, captions and tags); remove one of them")
                continue
            yield row
        if not total and self.errors.count == errors_before:
            self.errors.add(f"{self.name}: the manifest is empty; it needs at least one row")
        if total:
            self._report_columns(lacking, total)
        for value, tried in self.tried.items():
            # A few missing files are for the training run to replace; a source without any is a wrong root.
            if value not in self.layouts and (len(tried) == _FILES_TO_TRY or not self.layouts):
                self._report_root(value, tried)

    def _column_meanings(self, keys: Sequence[str]) -> _Columns:
        theirs = {column: column for column in _KNOWN_COLUMNS}
        theirs.update((column, name) for column, name in self.rules.remap.items() if name in keys)
        ours = {name: column for column, name in theirs.items()}
        tags = [(name, ours.get(name, name)) for name in keys if name in ours or name not in theirs]
        alternatives = {column: _PATH_COLUMNS if column == "audio" else (column,) for column in self.rules.required}
        return _Columns(
            theirs,
            [(name, column) for name, column in tags if column not in _NOT_TAGS],
            [column for column, names in alternatives.items() if not any(theirs[name] in keys for name in names)],
        )

    def _report_columns(self, lacking: Mapping[str, Sequence[str]], total: int) -> None:
        found = f"the columns are {', '.join(map(str, self.columns))}"
        for column, origins in lacking.items():
            wanted = " or ".join(map(repr, _PATH_COLUMNS)) if column == "audio" else repr(column)
            remedy = f"{found}; add it, or name the one you have with columns={{{column!r}: ...}} (--data.columns)"
            if len(origins) == total:
                self.errors.add(f"{self.name}: missing column {wanted}; {remedy}")
            else:
                for origin in origins:
                    self.errors.add(f"{origin}: missing column {wanted}; {remedy}")

    def _report_root(self, value: str, tried: Sequence[tuple[str, ...]]) -> None:
        source = f" of source {value!r}" if value else ""
        self.errors.add(
            f"{self.name}: none of the first {len(tried)} audio files{source} exists; looked for "
            f"{' or '.join(tried[0])}; say which folder the paths are relative to with audio_root (--data.audio-root)"
        )

    def _row(self, record: Record, columns: _Columns, origin: str) -> Row:
        def get(column: str) -> tuple[str, Any]:
            theirs = columns.theirs[column]
            return theirs, record.get(theirs)

        tags: dict[str, tuple[str, ...]] = {}
        for theirs, column in columns.tags:
            tag = _as_tags(record[theirs])
            if tag:
                tags[column] = tag
            elif tag is None and column in _TAG_COLUMNS:
                raise _wrong_type(theirs, record[theirs], "a string or a list of strings")
        captions = _as_captions(*get("text_description"))
        if not captions and "text_description" in self.rules.required:
            raise _RowError(f"column {get('text_description')[0]!r} has an empty caption; write one or remove the row")
        path = _as_path(*next((pair for pair in map(get, _PATH_COLUMNS) if pair[1] is not None), get("audio")))
        packed = record.get(CLIP_COLUMN)
        if not isinstance(packed, PackedClip):
            packed = None
            path = self._resolve(path, tags.get("source", ("",))[0])
        return Row(
            path,
            captions,
            _as_captions(*get("fine_description")),
            tags,
            _as_string(*get("classification_tag")),
            _as_duration(*get("duration"), self.numbers_are_text),
            _as_string(*get("text_style_prompt")),
            origin,
            self.index,
            packed,
        )

    def _resolve(self, path: str, source: str) -> str:
        """Join a path to the root, with or without `source`; the first rows of each source settle which."""
        if os.path.isabs(path):
            candidates: tuple[str, ...] = (path,)
        elif self.root is None:
            raise _RowError(f"the path {path!r} is relative; give its folder with audio_root (--data.audio-root)")
        else:
            candidates = (os.path.join(self.root, path), os.path.join(self.root, source, path))[: 2 if source else 1]
        layout = self.layouts.get(source)
        if layout is None and len(tried := self.tried.setdefault(source, [])) < _FILES_TO_TRY:
            found = [os.path.isfile(candidate) for candidate in candidates]
            if any(found):
                layout = self.layouts[source] = not found[0]
            else:
                tried.append(candidates)
        chosen = candidates[-1 if layout else 0]
        if self.rules.check_files and not os.path.isfile(chosen):
            raise _RowError(f"no such audio file: {chosen}; correct the path, set audio_root, or remove the row")
        return chosen


def _shown(value: Any) -> str:
    """A value of a table in at most 60 characters; `repr` fails of what is nested deeply and of very large integers."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 4, 60, 60, 60
    try:
        shown = short.repr(value)
    except ValueError:
        shown = f"{type(value).__name__}(...)"
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _wrong_type(column: str, value: Any, expected: str) -> _RowError:
    return _RowError(f"column {column!r} is {_shown(value)} ({type(value).__name__}); it must be {expected}")


def _as_path(column: str, value: Any) -> str:
    if isinstance(value, Mapping):  # an undecoded datasets.Audio
        value = value.get("path")
        if not value or not os.path.isfile(value):
            raise _RowError(f"column {column!r} holds audio bytes; write the clips to files and give their paths")
    if value is None or value == "":
        raise _RowError(f"column {column!r} is empty; name the audio file or remove the row")
    if not isinstance(value, str):
        raise _wrong_type(column, value, "the path of an audio file")
    return value


def _as_captions(column: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    captions = (value,) if isinstance(value, str) else value
    if not isinstance(captions, (list, tuple)) or not all(isinstance(item, str) for item in captions):
        raise _wrong_type(column, value, "a string or a list of strings")
    if not all(map(str.strip, captions)):
        raise _RowError(f"column {column!r} has an empty caption, {_shown(value)}; write one or remove it")
    return tuple(captions)


def _as_tags(value: Any) -> tuple[str, ...] | None:
    """A tag column's value as strings, empty if it holds nothing; None if it is not tag-like."""
    if isinstance(value, str):
        return (value,) if value else ()
    if value is None:
        return ()
    if isinstance(value, (bool, int, float)):
        value = () if value != value else (value,)
    if isinstance(value, (list, tuple)) and all(isinstance(item, (str, bool, int, float)) for item in value):
        try:
            return tuple(map(str, value))
        except ValueError:  # an integer of thousands of digits
            return None
    return None


def _as_string(column: str, value: Any) -> str | None:
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if value is None or value == "":
        return None
    tag = _as_tags(value) if isinstance(value, (str, int, float)) else None
    if tag is None:
        raise _wrong_type(column, value, "one string")
    return tag[0] if tag else None


def _as_duration(column: str, value: Any, numbers_are_text: bool) -> float | None:
    if value is None or value != value:
        return None
    try:
        if isinstance(value, bool) or (isinstance(value, str) and not numbers_are_text):
            raise TypeError
        seconds = float(value)
    except (TypeError, ValueError):
        raise _wrong_type(column, value, "a number of seconds") from None
    except OverflowError:
        seconds = math.inf
    if not 0 < seconds <= _MAX_SECONDS:
        raise _RowError(
            f"column {column!r} is {_shown(value)}; a duration is a positive number of seconds, at most "
            f"{_MAX_SECONDS:g}"
        )
    return seconds


def _open_source(name: str, errors: _Errors) -> tuple[Records, str | None]:
    """The numbered records of a source, and the folder that its paths are relative to."""
    if name.startswith("hf:"):
        return _read_hub(name), None
    if not os.path.exists(name):
        raise DataError(f"{name}: no such manifest; check the path (a Hugging Face name is written hf:NAME)")
    mode = os.stat(name).st_mode
    if stat.S_ISDIR(mode):
        return read_pack(name) if is_pack(name) else _read_datasets_folder(name), name
    readers: dict[str, Callable[[str, _Errors], Records]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
    }
    extension = os.path.splitext(name)[1].lower()
    if extension not in readers:
        known = ", ".join(readers)
        raise DataError(
            f"{name}: unknown manifest type {extension!r}; use one of {known}, or a packed or datasets folder"
        )
    if not stat.S_ISREG(mode):
        raise DataError(f"{name}: is {kind_of_file(mode)}, not a file; write the table to a file and name that")
    return readers[extension](name, errors), os.path.dirname(name)


def _read_jsonl(name: str, errors: _Errors) -> Records:
    for line, text in enumerate(_utf8_lines(name), 1):
        if not text.strip():
            continue
        try:
            record = parse_json(text, f"{name}:{line}")
        except DataError as error:
            errors.add(f"{error}; correct the line")
            continue
        if isinstance(record, dict):
            yield line, record
        else:
            errors.add(f"{name}:{line}: holds {text.strip()[:40]!r}, not a JSON object; write one object a line")


def _read_json(name: str, errors: _Errors) -> Records:
    text = read_text(name, limit=_MAX_JSON)
    records = parse_json(text, name) if text.strip() else []
    if not isinstance(records, list):
        raise DataError(f"{name}: holds a {type(records).__name__}; a .json manifest is an array of objects")
    for number, record in enumerate(records, 1):
        if isinstance(record, dict):
            yield number, record
        else:
            errors.add(f"{name}:{number}: holds {_shown(record)}, not an object")


def _read_csv(name: str, errors: _Errors) -> Records:
    table = csv.reader(_utf8_lines(name, newline=""), delimiter="\t" if name.lower().endswith(".tsv") else ",")
    try:
        header = next(table, [])
        if len(set(header)) < len(header):
            raise DataError(f"{name}:1: a column name occurs twice in the header {header}; rename one")
        for cells in table:
            if len(cells) == len(header):
                yield (
                    table.line_num,
                    {column: _parsed_cell(cell) for column, cell in zip(header, cells, strict=True)},
                )
            elif cells:
                errors.add(
                    f"{name}:{table.line_num}: {len(cells)} cells under a header of {len(header)}; "
                    "quote cells that contain the separator"
                )
    except csv.Error as error:
        hint = f"; a quote that is not closed, or a cell of more than {csv.field_size_limit()} characters"
        raise DataError(
            f"{name}:{table.line_num}: not valid CSV ({error}){hint if 'limit' in str(error) else ''}"
        ) from error


def _parsed_cell(cell: str) -> str | list[Any] | None:
    """A CSV cell; one that holds a list, as JSON or as Python prints it, becomes that list."""
    if not cell.startswith("[") or not cell.endswith("]"):
        return cell or None
    for parse in (lambda cell: parse_json(cell, "cell"), ast.literal_eval):
        try:
            value = parse(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # DataError is a ValueError
            continue
        if isinstance(value, list):
            return value
    return cell


def _read_parquet(name: str, errors: _Errors) -> Records:
    return parquet_records(name, name)


def _read_datasets_folder(name: str) -> Records:
    datasets = required("datasets", "reading a saved `datasets` folder")
    try:
        data = datasets.load_from_disk(name)
    except FileNotFoundError as error:
        raise DataError(
            f"{name}: not a folder of `fastclap pack` or datasets.save_to_disk; name a manifest file instead"
        ) from error
    except Exception as error:  # damage of any of its files
        raise DataError(f"{name}: datasets could not load it: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        raise DataError(f"{name}: holds several splits; name one, such as {os.path.join(name, next(iter(data)))}")
    return _read_dataset(name, data)


def _read_hub(name: str) -> Records:
    datasets = required("datasets", "reading a data set of the hub")
    path, _, split = name.removeprefix("hf:").partition(":")
    try:
        data = datasets.load_dataset(path, split=split or "train")
    except Exception as error:  # network, permission, unknown name or split: all are the user's to solve
        raise DataError(f"{name}: datasets could not load it: {error}") from error
    return _read_dataset(name, data)


def _read_dataset(name: str, data: Any) -> Records:
    import datasets

    number = 0
    try:
        for column, feature in data.features.items():
            if isinstance(feature, datasets.Audio):
                data = data.cast_column(column, datasets.Audio(decode=False))
        for number, record in enumerate(data, 1):
            yield number, record
    except FastclapError:
        raise
    except Exception as error:  # text that is not UTF-8, a damaged file, a feature without its package
        raise DataError(f"{name}:{number + 1}: datasets could not read the row: {error}") from error


def _utf8_lines(name: str, newline: str | None = None) -> Iterator[str]:
    """The lines of a text file, of which there may be millions."""
    try:
        with open(name, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
            number = 0
            while text := file.readline(_MAX_LINE):
                number += 1
                if found := _NOT_UTF8.search(text):
                    byte = ord(found[0]) & 0xFF
                    raise DataError(
                        f"{name}:{number}: not UTF-8 text (byte {byte:#04x} in column {found.start() + 1}); save it as "
                        "UTF-8"
                    )
                if len(text) == _MAX_LINE:
                    raise DataError(f"{name}:{number}: a line of more than {_MAX_LINE} characters; write a row a line")
                yield text
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error
