"""Public datasets as manifests: `fastclap prepare` reads what their owners distribute and writes our columns.

A reader for each dataset lists its clips (`fastclap.prepare.described`, `fastclap.prepare.acted`); everything else is
the same for all and stands here: finding the audio, measuring durations, splits, files. Rows are written in the
reader's order and depend on neither the machine nor the time, so the same dataset gives the same manifest, byte for
byte.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from fastclap.console import json_text
from fastclap.errors import ConfigError, DataError
from fastclap.files import replacing
from fastclap.prepare import acted, described
from fastclap.prepare.layout import Dataset, DescribedClip, Place
from fastclap.threads import in_threads

DATASETS: dict[str, Dataset] = {
    "paraspeechcaps": described.PARASPEECHCAPS,
    "fcaps": described.FCAPS,
    "promptspeech": described.PROMPTSPEECH,
    "textrolspeech": described.TEXTROLSPEECH,
    "speechcraft": described.SPEECHCRAFT,
    "ravdess": acted.RAVDESS,
    "crema-d": acted.CREMA_D,
    "iemocap": acted.IEMOCAP,
}

_CLIPS_AHEAD = 1024  # clips whose files are looked for at a time
_THREADS = 16  # they wait for the disk, or the network behind it
_LONGEST = 1e7  # seconds that a clip may last by its owners' word; of longer ones the file's header is asked
_SPLIT_MARK = "{split}"


def prepare(
    dataset: str,
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    annotations: str | None = None,
    columns: Mapping[str, str] | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the manifest of a dataset.

    A row has `audio` (relative to the manifest's folder), `split`, `duration` in seconds (the owners', else that
    of the audio file's header) and what the dataset has of our columns (see `docs/data.md`). Clips whose audio is
    missing or unreadable are left out and listed in a file next to the manifest, `manifest-skipped.jsonl` for
    `manifest.jsonl`. A row that repeats another in everything is written once.

    Args:
        dataset: a name in `DATASETS`.
        root: folder of the audio.
        out: the manifest, a .jsonl file; with "{split}" in its name, one file a split.
        annotations: file or folder of the captions and labels, or "hf:NAME" of the hub; by default the root.
        columns: a field's name in the published dataset → its name in this copy, where they differ.
        advance: called with the clips done and the clips in all.

    Returns:
        JSON-able: `dataset`, `rows`, `hours`, `splits` (of each: `rows`, `hours`, `speakers`),
        `split_rule`, `missing`, `unreadable`, `repeated`, `left_out` (reason → clips), `files`,
        `skipped_file` (None if nothing was skipped).

    Raises:
        DataError: the folder is not that dataset, or none of its audio is there; the message says what was expected
            and where to get it.
        ConfigError: no such dataset, or an output that is not a .jsonl file.
    """
    if dataset not in DATASETS:
        raise ConfigError(f"there is no dataset {dataset!r}; choose one of: {', '.join(DATASETS)}")
    out = Path(out)
    if out.suffix != ".jsonl" or _SPLIT_MARK in str(out.parent):
        raise ConfigError(f"--out {out}: must be a .jsonl file; only its name, not its folder, may hold {_SPLIT_MARK}")
    place = _find_place(DATASETS[dataset], Path(root), annotations, columns or {})
    total, clips = place.dataset.read(place)
    out.parent.mkdir(parents=True, exist_ok=True)
    lost = {"missing": 0, "unreadable": 0}
    example: _Found | None = None
    first: DescribedClip | None = None
    advance(0, total)
    with contextlib.ExitStack() as stack:
        writer = _Writer(out, place.root, stack)
        for done, (clip, found) in enumerate(_with_audio(clips), 1):
            first = first or clip
            if found.reason:
                lost["unreadable" if found.path else "missing"] += 1
                example = example or (found if found.path else None)
                writer.skip({"path": found.path or clip.paths[0], "reason": found.reason, "origin": clip.origin})
            else:
                writer.write(clip, found)
            if done % _CLIPS_AHEAD == 0:
                advance(done, total)
        if not writer.rows:
            raise _nothing_usable(place, first, example, lost)
    advance(total, total)
    skipped_file = writer.files.pop(writer.skipped_path, None)
    if skipped_file is None:
        writer.skipped_path.unlink(missing_ok=True)  # of an earlier call
    return {
        "dataset": dataset,
        "rows": writer.rows,
        "hours": round(sum(writer.seconds.values()) / 3600, 4),
        "splits": writer.splits(),
        "split_rule": place.dataset.split,
        **lost,
        "repeated": writer.repeated,
        "left_out": dict(sorted(place.left_out.items())),
        "files": [str(path) for path in sorted(writer.files)],
        "skipped_file": None if skipped_file is None else str(writer.skipped_path),
    }


def _find_place(dataset: Dataset, root: Path, annotations: str | None, names: Mapping[str, str]) -> Place:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {dataset.source}, and name its folder with --root")
    for field in names:
        if field not in dataset.fields:
            renamed = f"its fields are {', '.join(dataset.fields)}" if dataset.fields else "its fields have fixed names"
            raise ConfigError(f"--columns {field}: {dataset.title} has no such field to rename; {renamed}")
    folder = root
    if annotations is not None:
        folder = _from_hub(annotations) if annotations.startswith("hf:") else Path(annotations)
        if not folder.exists():
            raise DataError(f"{folder}: no such file or folder; correct --annotations (a hub name is written hf:NAME)")
    return Place(dataset, root, folder, names)


def _from_hub(name: str) -> Path:
    """The annotation files of a dataset of the hub, as they are: they take gigabytes, so they are not converted."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            name.removeprefix("hf:"), repo_type="dataset", allow_patterns=["*.parquet", "*.jsonl.gz"]
        )
    except Exception as error:  # network, permission, unknown name: all are the user's to solve
        reason = str(error).splitlines()[0]
        raise DataError(f"{name}: the hub did not give it ({type(error).__name__}: {reason})") from error
    return Path(folder)


class _Found(NamedTuple):
    """What was found of the audio of a clip."""

    path: str | None  # of the audio file, if there is one
    duration: float  # seconds
    reason: str  # why the clip cannot be used, or ""


def _with_audio(clips: Iterable[DescribedClip]) -> Iterator[tuple[DescribedClip, _Found]]:
    """The clips with their audio files, in their order; the files of many clips are looked up at a time."""
    pairs = in_threads(lambda clip: (clip, _locate(clip)), clips, _THREADS, ahead=_CLIPS_AHEAD)
    with contextlib.closing(pairs):
        yield from pairs


def _locate(clip: DescribedClip) -> _Found:
    from fastclap.audio import AudioError, audio_info

    path = next((path for path in clip.paths if os.path.isfile(path)), None)
    if path is None:
        return _Found(None, 0.0, "no such file")
    if path != path.encode(errors="replace").decode():
        return _Found(path, 0.0, "its name is not UTF-8, which no manifest can hold; rename it")
    if isinstance(clip.duration, (int, float)) and clip.duration is not True and 0 < clip.duration < _LONGEST:
        return _Found(path, float(clip.duration), "")
    try:
        return _Found(path, audio_info(path).duration, "")
    except AudioError as error:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(20) == b"version https://git-":
                return _Found(path, 0.0, "a placeholder of git-lfs, not audio; run `git lfs pull` in its repository")
        return _Found(path, 0.0, error.reason)


class _Writer:
    """Writes rows to the manifest, or to that of their split; files get their final names when the stack closes."""

    def __init__(self, out: Path, root: Path, stack: contextlib.ExitStack) -> None:
        self.out = out
        self.root = str(root)
        by_split = _SPLIT_MARK in out.name
        name = out.name.replace(_SPLIT_MARK, "skipped") if by_split else f"{out.stem}-skipped.jsonl"
        self.skipped_path = out.with_name(name)
        self.stack = stack
        # Paths in a manifest start from its folder. Links are resolved, because ".." leaves a link by its target.
        self.prefix = os.path.relpath(os.path.realpath(root), os.path.realpath(out.parent))
        self.files: dict[Path, TextIO] = {}
        self.rows = self.repeated = 0
        self.seen: set[bytes] = set()
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.speakers: defaultdict[str, set[str]] = defaultdict(set)

    def write(self, clip: DescribedClip, found: _Found) -> None:
        path = os.path.normpath(os.path.join(self.prefix, os.path.relpath(str(found.path), self.root)))
        columns = {name: value for name, value in clip.columns.items() if value is not None and value not in ("", [])}
        duration = round(found.duration, 4)
        row = {"audio": path.replace(os.sep, "/"), "split": clip.split, **columns, "duration": duration}
        line = json_text(row) + "\n"
        digest = blake2b(line.encode(), digest_size=12).digest()
        if digest in self.seen:
            self.repeated += 1
            return
        self.seen.add(digest)
        self._open(self.out.with_name(self.out.name.replace(_SPLIT_MARK, clip.split))).write(line)
        self.rows += 1
        self.counts[clip.split] += 1
        self.seconds[clip.split] += duration
        if "speaker" in columns:
            self.speakers[clip.split].add(str(columns["speaker"]))

    def skip(self, note: Mapping[str, Any]) -> None:
        self._open(self.skipped_path).write(json_text(note) + "\n")

    def _open(self, path: Path) -> TextIO:
        file = self.files.get(path)
        if file is None:
            temporary = self.stack.enter_context(replacing(path))
            file = self.stack.enter_context(temporary.open("w", encoding="utf-8", newline="\n"))
            self.files[path] = file
        return file

    def splits(self) -> dict[str, dict[str, Any]]:
        return {
            split: {
                "rows": count,
                "hours": round(self.seconds[split] / 3600, 4),
                "speakers": len(self.speakers[split]) or None,
            }
            for split, count in sorted(self.counts.items())
        }


def _nothing_usable(
    place: Place, first: DescribedClip | None, example: _Found | None, lost: Mapping[str, int]
) -> DataError:
    if first is None:
        return place.wrong(f"no clip of it can be used: {dict(place.left_out) or 'the annotations are empty'}")
    if example is not None:
        return DataError(
            f"{place.root}: none of the {sum(lost.values())} clips can be used; {example.path}: {example.reason}"
        )
    return place.wrong(
        f"none of the {lost['missing']} audio files is there; looked for {' or '.join(dict.fromkeys(first.paths))}"
    )
