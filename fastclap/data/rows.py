"""Rows of a manifest: a clip with its captions and tags, and the sequence of such rows that training reads."""

from __future__ import annotations

import difflib
import itertools
import math
import os
import pickle
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from fastclap.audio import AudioError, audio_info
from fastclap.errors import DataError
from fastclap.threads import in_threads

Mix = Literal["concat", "interleave"]

MAX_TEXT = 1 << 17
"""Characters of a caption, a tag or a path; a cell of a CSV file may have no more either."""


class PackedClip(NamedTuple):
    """Where the samples of a row lie in a packed folder, and what is known of them without reading."""

    shard: str  # path of the shard
    offset: int  # bytes
    samples: int
    sampling_rate: int  # Hz
    mean: float  # of the whole clip, full scale = ±1
    variance: float  # population variance, in the same unit
    checksums: bytes  # CRC-32 of each block, uint32 little-endian
    origin: str  # manifest and line that the clip was packed from


class Row(NamedTuple):
    """One clip of a manifest."""

    audio: str  # path of the audio file; of a packed row, the one it was packed from (see `open_clip`)
    captions: tuple[str, ...]  # global descriptions; empty only if captions were not required
    fine_captions: tuple[str, ...]  # fine-grained descriptions, often none
    tags: dict[str, tuple[str, ...]]  # every tag column that the row fills
    classification_tag: str | None
    duration: float | None  # seconds
    style_prompt: str | None
    origin: str  # where the row was read, "FILE:LINE"
    source: int  # index of the manifest among those loaded together
    packed: PackedClip | None = None  # where the samples are, if the row is of a packed folder

    def tags_of(self, column: str) -> tuple[str, ...]:
        """The tags in a tag column, or the one in classification_tag."""
        if column == "classification_tag":
            return (self.classification_tag,) if self.classification_tag else ()
        return self.tags.get(column, ())


def check_text(row: Row) -> None:
    """Refuse what is no text, and what no caption, tag or path can be.

    Raises:
        DataError: half a character (a lone surrogate), a zero byte in a path, or more than 131,072 characters.
    """
    tags = [tag for values in row.tags.values() for tag in values]
    texts = (row.audio, *row.captions, *row.fine_captions, *tags, row.classification_tag or "", row.style_prompt or "")
    whole = "".join(texts)
    try:
        whole.encode()
        if len(whole) <= MAX_TEXT and "\0" not in row.audio:
            return
    except UnicodeEncodeError:
        pass
    named = {"path": [row.audio], "caption": row.captions, "fine caption": row.fine_captions}
    named |= {f"tag of {column!r}": values for column, values in row.tags.items()}
    named |= {"classification_tag": row.tags_of("classification_tag"), "style prompt": [row.style_prompt or ""]}
    for kind, values in named.items():
        for text in values:
            if len(text) > MAX_TEXT:
                raise DataError(f"{row.origin}: a {kind} of {len(text)} characters; shorten it to at most {MAX_TEXT}")
            if kind == "path" and "\0" in text:
                raise DataError(f"{row.origin}: a zero byte in the path {text[:60]!a}; correct it")
            half = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
            if half:
                raise DataError(
                    f"{row.origin}: half of a character ({half!a}, a lone surrogate) in the {kind} {text[:60]!a}; "
                    "write the whole one"
                )


class Manifest(Sequence[Row]):
    """An immutable sequence of rows, in the order of their sources.

    Rows are kept pickled in one byte tensor: loader processes share that tensor instead of each holding millions of
    Python objects, and reading a row costs microseconds.

    Attributes:
        source_names: the sources as given to `load_manifest`.
        source_sizes: rows of each source; rows of one source are contiguous.
        columns: names of the tag columns.
        tag_columns: what tags can be asked for by: `columns`, and classification_tag where a row has one.
        durations: float64 [rows], seconds, NaN where the manifest has none.
        mix, probabilities: how `BatchSampler` draws from several sources.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        *,
        source_names: Sequence[str] = ("rows",),
        mix: Mix = "concat",
        probabilities: Sequence[float] | None = None,
    ) -> None:
        self.source_names = tuple(source_names)
        self.mix = mix
        self.probabilities = check_mix(self.source_names, mix, probabilities)
        encoded, ends = bytearray(), []
        durations: list[float] = []
        sizes = [0] * len(self.source_names)
        columns: dict[str, None] = {}
        classified = False
        for row in rows:
            if row.source != len(sizes) - 1 and any(sizes[row.source + 1 :]):
                raise ValueError(f"{row.origin}: rows must come in the order of their sources")
            encoded += pickle.dumps(tuple(row), protocol=5)
            ends.append(len(encoded))
            durations.append(math.nan if row.duration is None else row.duration)
            sizes[row.source] += 1
            columns.update(dict.fromkeys(row.tags))
            classified = classified or bool(row.classification_tag)
        self.source_sizes = tuple(sizes)
        self.columns = tuple(columns)
        self.tag_columns = (*self.columns, "classification_tag")[: None if classified else -1]
        self.durations = torch.tensor(durations, dtype=torch.float64)
        self._ends = torch.tensor(ends, dtype=torch.int64)
        self._bytes: Tensor = torch.frombuffer(encoded or bytearray(1), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.durations)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a manifest with {len(self)} rows")
        index %= len(self)
        # No view outlives this call: sharing a tensor with another process moves its memory.
        ends = self._ends.numpy()
        begin = ends[index - 1] if index else 0
        return Row(*pickle.loads(self._bytes.numpy()[begin : ends[index]].data))

    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with what a training step sees of the rows, about 8 s for a million.

        They cover the number and order of the rows, how sources are mixed, and of each row captions, tags, duration
        and the path of its audio below the folder that all paths of its source have in common: a data set may move as a
        whole, and so may its manifest. They do not cover the audio files themselves, nor in which format or under which
        name the manifest was written.
        """
        found = blake2b(ascii((self.source_sizes, self.mix, self.probabilities)).encode(), digest_size=16)
        rows, begin = self._bytes.numpy().data, 0
        ends = iter(self._ends.tolist())
        for size in self.source_sizes:
            paths = []
            for end in itertools.islice(ends, size):
                path, captions, fine, tags, classification, duration, *_ = pickle.loads(rows[begin:end])
                begin = end
                paths.append(path)
                # Not pickle, whose bytes tell which equal strings are one object; not repr, which changes with Unicode.
                found.update(ascii((captions, fine, sorted(tags.items()), classification, duration)).encode())
            outer = [min(paths), max(paths)] if paths else [""]
            folder = len(os.path.commonprefix(outer).rpartition("/")[0])  # noqa: RUF071 - cut at a folder
            for path in paths:
                found.update(ascii(path[folder:]).encode())
        return found.hexdigest()

    def __repr__(self) -> str:
        tags = ", ".join(self.columns) or "none"
        return f"Manifest({len(self)} rows from {', '.join(self.source_names)}; tags: {tags})"


def clip_durations(rows: Sequence[Row], threads: int = 8) -> np.ndarray:
    """Seconds of every clip, float64 [rows]: the row's, else from the file's header; 0 where that cannot be read.

    An unreadable file is no error here: it is reported when its clip is drawn.

    Raises:
        DataError: a file could not be read in time: its drive does not answer.
    """
    known = rows.durations if isinstance(rows, Manifest) else [row.duration for row in rows]  # None becomes NaN
    durations = np.array(known, np.float64)
    unknown = np.flatnonzero(np.isnan(durations))
    if len(unknown):
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        paths = (rows[int(row)].audio for row in unknown)
        seconds = track(
            in_threads(_seconds_of_file, paths, threads, ahead=64 * threads),
            "Reading clip lengths",
            total=len(unknown),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        durations[unknown] = list(seconds)
    return durations


def _seconds_of_file(path: str) -> float:
    try:
        return audio_info(path).duration
    except AudioError:
        return 0.0


def with_fine_captions(manifest: Manifest, shortest: int, longest: int) -> Manifest:
    """The manifest with only those fine captions that have `shortest` to `longest` characters.

    Rows that lose all of theirs are left out; rows that never had any stay, so that whoever needs one can name the row.

    Raises:
        DataError: no row of a source is left.
    """
    rows = []
    for row in manifest:
        fine = tuple(text for text in row.fine_captions if shortest <= len(text) <= longest)
        if fine or not row.fine_captions:
            rows.append(row._replace(fine_captions=fine))
    left = {row.source for row in rows}
    for source, name in enumerate(manifest.source_names):
        if source not in left:
            raise DataError(
                f"{name}: no fine_description has {shortest} to {longest} characters; change the bounds "
                "(--data.fine-characters)"
            )
    return Manifest(rows, source_names=manifest.source_names, mix=manifest.mix, probabilities=manifest.probabilities)


def within_seconds(manifest: Manifest, shortest: float, longest: float) -> Manifest:
    """The manifest with only those clips that last `shortest` to `longest` seconds, and with their durations.

    Clips whose length cannot be read stay, so that they are reported when they are drawn.

    Raises:
        DataError: no row of a source is left.
    """
    seconds = clip_durations(manifest).tolist()
    rows = [
        row._replace(duration=duration or None)
        for row, duration in zip(manifest, seconds, strict=True)
        if not duration or shortest <= duration <= longest
    ]
    left = {row.source for row in rows}
    for source, name in enumerate(manifest.source_names):
        if source not in left:
            raise DataError(
                f"{name}: no clip lasts {shortest:g} to {longest:g} s; change the bounds (--data.min-seconds, "
                "--data.max-seconds)"
            )
    return Manifest(rows, source_names=manifest.source_names, mix=manifest.mix, probabilities=manifest.probabilities)


def check_column(manifest: Manifest, column: str | None, flag: str) -> None:
    """Refuse a tag column that no row of a manifest fills.

    Args:
        column: None is no question.
        flag: that names the column, for the message, such as "--data.tag-column".

    Raises:
        DataError: no row has a tag in it; names the columns that there are.
    """
    if column is None or column in manifest.tag_columns:
        return
    likely = difflib.get_close_matches(column, manifest.tag_columns, 1)
    raise DataError(
        f"{flag} {column}: no row of {', '.join(manifest.source_names)} has a tag in it; the columns of tags are: "
        f"{', '.join(manifest.tag_columns) or 'none'}" + (f"; do you mean {likely[0]}?" if likely else "")
    )


def check_mix(names: Sequence[str], mix: str, probabilities: Sequence[float] | None) -> tuple[float, ...] | None:
    if mix not in ("concat", "interleave"):
        raise DataError(f"mix={mix!r}: it is either 'concat' or 'interleave'")
    if probabilities is None:
        return None
    if mix != "interleave":
        raise DataError("probabilities only mean something with mix='interleave'")
    if len(probabilities) != len(names):
        raise DataError(f"{len(probabilities)} probabilities for {len(names)} manifests; give one for each")
    if min(probabilities) <= 0 or abs(sum(probabilities) - 1) > 1e-6:
        raise DataError(f"probabilities {list(probabilities)} must be positive and sum to 1")
    return tuple(probabilities)
