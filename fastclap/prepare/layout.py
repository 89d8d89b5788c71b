"""What the readers of the datasets share: where a dataset lies, one of its clips, and how its files are found.

A reader is a function from a `Place` to the number of clips and an iterator over them, in an order that depends on the
dataset alone. It opens no audio: `fastclap.prepare` finds out whether a clip is there and how long it is.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastclap.errors import DataError

AUDIO_EXTENSIONS = (".wav", ".flac", ".mp3", ".ogg", ".opus")

_SPLIT = re.compile(r"train|dev|val|test", re.IGNORECASE)


class DescribedClip(NamedTuple):
    """One clip as its owners describe it."""

    paths: tuple[str, ...]  # where its audio may lie; the first that exists is taken
    split: str
    columns: Mapping[str, Any]  # of the manifest; None, "" and [] are left out of its row
    origin: str  # where it is described, for messages
    duration: float | None = None  # seconds, if the owners say


Clips = tuple[int, Iterable[DescribedClip]]


class Dataset(NamedTuple):
    """A dataset that can be prepared."""

    title: str
    expects: str  # the layout of its folder, for messages
    source: str  # where to get it, for messages
    split: str  # how it is split
    fields: tuple[str, ...]  # names that may differ between copies
    read: Callable[[Place], Clips]


@dataclass
class Place:
    """Where a dataset lies on this machine."""

    dataset: Dataset
    root: Path  # of the audio
    annotations: Path  # file or folder of the captions and labels, often the root
    names: Mapping[str, str]  # a field's name in the published dataset → its name in this copy
    left_out: Counter[str] = field(default_factory=Counter)  # reason → clips that the reader left out on purpose

    def name(self, column: str) -> str:
        return self.names.get(column, column)

    def wrong(self, found: str) -> DataError:
        """The error for a folder that is not the dataset."""
        return DataError(
            f"{self.root}: this is not {self.dataset.title}: {found}; expected {self.dataset.expects}; "
            f"{self.dataset.source} (docs/data.md)"
        )

    def files(self, *patterns: str) -> list[Path]:
        """The annotation file, or the files of the annotation folder that match, sorted by their paths."""
        if self.annotations.is_file():
            return [self.annotations]
        found = {path for pattern in patterns for path in self.annotations.glob(pattern)}
        return sorted(path for path in found if not path.name.startswith(".") and path.is_file())


class Tables(NamedTuple):
    """The CSV tables of a dataset that have the needed columns."""

    total: int
    tables: Sequence[tuple[Path, Sequence[tuple[int, Mapping[str, Any]]]]]

    def rows(self) -> Iterator[tuple[Path, str, Mapping[str, Any]]]:
        """(file, "FILE:LINE", record) of every row."""
        for path, records in self.tables:
            for line, record in records:
                yield path, f"{path}:{line}", record


def read_tables(place: Place, needed: Sequence[str]) -> Tables:
    """All CSV files of the annotation folder and of the folders in it that have the `needed` columns.

    Raises:
        DataError: there is none.
    """
    from fastclap.data.manifest import read_records

    wanted = {place.name(column) for column in needed}
    tables, others = [], []
    for path in place.files("*.csv", "*/*.csv"):
        records = read_records(str(path))
        if wanted <= set(records[0][1]):
            tables.append((path, records))
        else:
            others.append(f"{path} has the columns {', '.join(map(str, records[0][1]))}")
    if not tables:
        found = "; ".join(others[:3]) or f"no .csv file in {place.annotations} or a folder in it"
        raise place.wrong(
            f"{found}, where the columns {', '.join(sorted(wanted))} are needed (other names: --columns EXPECTED FOUND)"
        )
    return Tables(sum(len(records) for _, records in tables), tables)


class AudioIndex:
    """Finds the audio of a folder by file name without extension, whatever folders it lies in.

    Raises:
        DataError: on `find`, if two files have the name that is looked for.
    """

    def __init__(self, place: Place) -> None:
        self.root = place.root
        self.paths: dict[str, list[str]] = {}
        for folder, folders, names in os.walk(place.root, followlinks=True):
            folders.sort()
            for name in sorted(names):
                stem, extension = os.path.splitext(name)
                if extension.lower() in AUDIO_EXTENSIONS and not name.startswith("."):
                    self.paths.setdefault(stem, []).append(os.path.join(folder, name))
        if not self.paths:
            raise place.wrong(f"no audio file ({', '.join(AUDIO_EXTENSIONS)}) under it")

    def find(self, stem: str) -> tuple[str, ...]:
        paths = self.paths.get(stem)
        if paths is None:
            return (f"{self.root}/**/{stem}.wav",)
        if len(paths) > 1:
            raise DataError(
                f"two files are named {stem}: {paths[0]} and {paths[1]}; make --root the folder of one copy"
            )
        return (paths[0],)


def split_in_name(path: Path) -> str:
    """The split that a file's name contains, such as train in "random_train.csv"; without one, the name itself."""
    words = _SPLIT.findall(path.stem)
    if not words:
        return path.stem.lower()
    return {"val": "dev"}.get(words[-1].lower(), words[-1].lower())


def split_by_speaker(speaker: str) -> str:
    """A split for a speaker of a dataset without splits: 5 % test, 5 % dev, 90 % train, by a hash of the name."""
    share = int.from_bytes(hashlib.blake2b(speaker.encode(), digest_size=8).digest(), "big") % 20
    return {0: "test", 1: "dev"}.get(share, "train")


def texts(value: Any) -> list[str]:
    """A caption, or a list of them, as a list without blanks and repeats."""
    values = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    return list(dict.fromkeys(text.strip() for text in values if isinstance(text, str) and text.strip()))
