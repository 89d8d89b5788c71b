"""Writing packed folders, `fastclap pack`: clips decoded once into the shards that `fastclap.data.shards` reads.

Every file is written under a temporary name and renamed once it is on the disk, the finished `pack.json` last. Before
that, the folder is an unfinished pack, which the same command continues after its last finished shard. The bytes of a
pack follow from its input alone, however many processes decoded it and however often it was interrupted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastclap.audio import RATES, AudioError, AudioFile, whole_clip
from fastclap.data.rows import Manifest, Row, check_text
from fastclap.data.shards import (
    BLOCK,
    CLIP_COLUMN,
    HEADER_FILE,
    INPUT_KEYS,
    ROWS_AT_ONCE,
    SAMPLE,
    VERSION,
    index_checksum,
    is_pack,
    open_clip,
    open_index,
    read_header,
    shard_name,
)
from fastclap.data.workers import map_rows
from fastclap.errors import ConfigError, DataError, FastclapError
from fastclap.files import fsync, locked, write_atomic
from fastclap.reading import read_json

_MAX_RECORD = 1 << 32  # bytes of the record of a shard: some 100 a second of audio, and a little a clip


class _Decoded(NamedTuple):
    wave: np.ndarray  # little-endian int16
    mean: float
    variance: float
    checksums: bytes
    duration: float  # seconds, as the file's header has it


def pack(
    manifest: Manifest,
    folder: str | os.PathLike[str],
    *,
    sampling_rate: int = 16000,
    shard_mb: float = 512,
    workers: int = 0,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Decode every clip of a manifest into a packed folder, or go on where an interrupted call left off.

    Rows of several manifests become one, in their order; how they are mixed is decided when they are loaded. Clips
    that cannot be used are left out and listed in `skipped.jsonl`. Memory: two clips a process.

    Args:
        manifest: rows to pack.
        folder: new or empty, or an earlier call's with the same rows and options.
        sampling_rate: rate in Hz of the packed samples; a model reads only packs of its own rate.
        shard_mb: size of a shard in MB that is not exceeded; a longer clip has a shard of its own.
        workers: decoding processes; 0 decodes in this one.
        advance: called after each clip with the clips done and the clips in all.

    Returns:
        JSON-able: `folder`, `rows`, `clips`, `hours`, `bytes` (of samples), `shards`, `skipped` (rows).

    Raises:
        DataError: the folder holds something else, the disk is full, a process died, or no clip can be used.
        ConfigError: an impossible option.
    """
    if sampling_rate not in RATES or workers < 0 or not 0 < shard_mb < math.inf:
        raise ConfigError(
            f"sampling_rate={sampling_rate}, shard_mb={shard_mb}, workers={workers}: the first is {RATES[0]} to "
            f"{RATES[-1]}, the second positive, the third at least 0"
        )
    folder = Path(folder)
    with _explained_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    header = {
        "version": VERSION,
        "sampling_rate": sampling_rate,
        "shard_mb": float(shard_mb),
        "input": _input_id(manifest, sampling_rate, shard_mb),
    }
    with locked(folder, "packing into"):
        _start_or_resume(folder, header)
        if "index" not in read_header(folder):
            clip_of_row, rows = _distinct_clips(manifest)
            shards, lost = _write_shards(manifest, rows, folder, header, workers, advance)
            with _explained_write_errors(folder):
                index = _write_index(manifest, clip_of_row, shards, lost, folder)
                finished = {**header, "shards": [record["size"] for record in shards], "index": index}
                write_atomic(folder / HEADER_FILE, json.dumps(finished, indent=1).encode())
                fsync(folder)
        for left in (*folder.glob(".shard-*"), *folder.glob(".index.parquet*"), *folder.glob(".pack.json*")):
            left.unlink()
        return _summary(folder)


def _input_id(manifest: Manifest, sampling_rate: int, shard_mb: float) -> str:
    """An id of all that decides the bytes of a pack, but for the audio files themselves."""
    if CLIP_COLUMN in manifest.columns:
        raise DataError(
            f"{', '.join(manifest.source_names)}: packed folders need the column name {CLIP_COLUMN!r}; rename it"
        )
    digest = blake2b(f"{sampling_rate}/{float(shard_mb)!r}".encode(), digest_size=16)
    for row in manifest:
        check_text(row)
        digest.update(repr(tuple(row)).encode())
    return digest.hexdigest()


def _start_or_resume(folder: Path, header: Mapping[str, Any]) -> None:
    """Write the header of a new pack into the folder, or check that the folder holds this pack."""
    if is_pack(os.fspath(folder)):
        found = read_header(folder)
        if any(found[key] != header[key] for key in INPUT_KEYS):
            options = ("sampling_rate", "shard_mb")
            changed = [
                f"{name} was {found[name]}, now {header[name]}" for name in options if found[name] != header[name]
            ]
            raise DataError(
                f"{folder}: holds the pack of another input ({'; '.join(changed) or 'other rows'}); name another "
                "folder, or remove this one"
            )
        return
    if any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise DataError(f"{folder}: is not empty and holds no pack; name a new folder")
    with _explained_write_errors(folder):
        write_atomic(folder / HEADER_FILE, json.dumps(header, indent=1).encode())


def _distinct_clips(manifest: Manifest) -> tuple[list[int], list[int]]:
    """For each row the number of its clip, and for each clip its first row: rows of one file share their samples."""
    numbers: dict[tuple[str, int], int] = {}
    clip_of_row: list[int] = []
    first_rows: list[int] = []
    for index, row in enumerate(manifest):
        key = (row.audio, -1) if row.packed is None else (row.packed.shard, row.packed.offset)
        number = numbers.setdefault(key, len(first_rows))
        if number == len(first_rows):
            first_rows.append(index)
        clip_of_row.append(number)
    return clip_of_row, first_rows


class _ShardWriter:
    """One shard with the index entries of its clips; it gets its final name when it is complete."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.path = folder / shard_name(number)
        self.temporary = folder / f".{self.path.name}.partial"
        self.size = 0
        self.clips: list[list[Any]] = []  # [clip, offset, samples, mean, variance, checksums, duration]
        self.skipped: list[list[Any]] = []  # [clip, path, reason]
        self._file = open(self.temporary, "wb")  # noqa: SIM115 - closed by finish or discard

    def add(self, clip: int, decoded: _Decoded) -> None:
        _, mean, variance, checksums, duration = decoded
        self._file.write(decoded.wave.data)
        self.clips.append([clip, self.size, len(decoded.wave), mean, variance, checksums.hex(), duration])
        self.size += decoded.wave.nbytes

    def finish(self, next_clip: int) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        record = {"size": self.size, "next_clip": next_clip, "clips": self.clips, "skipped": self.skipped}
        if self.size:
            os.replace(self.temporary, self.path)
            fsync(self.folder)
            write_atomic(_record_path(self.folder, self.number), json.dumps(record).encode())
        return record

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # closing writes what is still buffered, for which there may be no room
            self._file.close()
        self.temporary.unlink(missing_ok=True)


def _new_shard(folder: Path, number: int) -> _ShardWriter:
    with _explained_write_errors(folder / shard_name(number)):
        return _ShardWriter(folder, number)


def _write_shards(
    manifest: Manifest,
    rows: Sequence[int],
    folder: Path,
    header: Mapping[str, Any],
    workers: int,
    advance: Callable[[int, int], None],
) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """The records of all shards, those of earlier calls included, and the skipped clips [clip, path, reason]."""
    limit = header["shard_mb"] * 1e6
    records = _finished_shards(folder)
    begin = records[-1]["next_clip"] if records else 0
    advance(begin, len(rows))
    with contextlib.ExitStack() as stack:
        writer = _new_shard(folder, len(records))
        stack.callback(lambda: writer.discard())
        decoded = stack.enter_context(
            contextlib.closing(_decode_all(manifest, rows[begin:], header["sampling_rate"], workers))
        )
        for clip, found in enumerate(decoded, begin):
            if isinstance(found, AudioError):
                writer.skipped.append([clip, found.path, found.reason])
            else:
                if writer.size and writer.size + found.wave.nbytes > limit:
                    with _explained_write_errors(writer.path):
                        records.append(writer.finish(clip))
                    writer = _new_shard(folder, len(records))
                with _explained_write_errors(writer.path):
                    writer.add(clip, found)
            advance(clip + 1, len(rows))
        with _explained_write_errors(writer.path):
            records.append(writer.finish(len(rows)))
    skipped = [clip for record in records for clip in record["skipped"]]
    records = [record for record in records if record["size"]]
    if not records:
        first = f"; the first: {skipped[0][1]}: {skipped[0][2]}" if skipped else ""
        raise DataError(f"none of the {len(rows)} clips can be used{first}")
    return records, skipped


def _finished_shards(folder: Path) -> list[dict[str, Any]]:
    """The records of the shards that earlier calls finished; anything else that they left is removed."""
    records: list[dict[str, Any]] = []
    while True:
        number = len(records)
        path, record_path = folder / shard_name(number), _record_path(folder, number)
        try:
            record = read_json(record_path, limit=_MAX_RECORD)
            if not _is_record(record, records) or path.stat().st_size != record["size"]:
                break
        except (OSError, DataError):
            break
        records.append(record)
    keep = {name(number) for number in range(len(records)) for name in (shard_name, _record_name)}
    for pattern in ("shard-*", ".shard-*"):
        for left in folder.glob(pattern):
            if left.name not in keep:
                left.unlink()
    return records


def _is_record(record: Any, earlier: Sequence[Mapping[str, Any]]) -> bool:
    """Whether this is the record of a finished shard that follows on those of earlier ones."""
    first = earlier[-1]["next_clip"] if earlier else 0
    try:
        numbers = sorted([*(clip[0] for clip in record["clips"]), *(clip[0] for clip in record["skipped"])])
        return (
            numbers == list(range(first, record["next_clip"]))
            and record["size"] == sum(2 * clip[2] for clip in record["clips"])
            and all(len(clip) == 7 and isinstance(bytes.fromhex(clip[5]), bytes) for clip in record["clips"])
            and all(len(clip) == 3 and all(isinstance(text, str) for text in clip[1:]) for clip in record["skipped"])
        )
    except (KeyError, IndexError, TypeError, ValueError):
        return False


def _decode_all(
    manifest: Manifest, rows: Sequence[int], sampling_rate: int, workers: int
) -> Generator[_Decoded | AudioError, None, None]:
    """The clips of `rows`, in order; decoded in processes a little ahead of the caller."""
    decode = partial(_decode, sampling_rate=sampling_rate)
    clips = (manifest[row] for row in rows)
    return map_rows(decode, clips, workers, ahead=2, doing="decoding", goes_on="after the last finished shard")


def _decode(row: Row, sampling_rate: int) -> _Decoded | AudioError:
    try:
        with open_clip(row, sampling_rate) as file:
            clip = whole_clip(file)
            seconds = file.info.duration if isinstance(file, AudioFile) else file.num_samples / file.sampling_rate
    except AudioError as error:
        return error
    except FastclapError:
        raise
    except Exception as error:
        raise RuntimeError(f"{row.origin}: {row.audio}: {type(error).__name__}: {error}") from error
    wave = np.ascontiguousarray(clip.wave, SAMPLE)
    blocks = (wave[begin : begin + BLOCK] for begin in range(0, len(wave), BLOCK))
    checksums = np.array([zlib.crc32(block.data) for block in blocks], "<u4").tobytes()
    return _Decoded(wave, clip.mean, clip.variance, checksums, seconds)


def _write_index(
    manifest: Manifest,
    clip_of_row: Sequence[int],
    shards: Sequence[Mapping[str, Any]],
    lost: Sequence[Sequence[Any]],
    folder: Path,
) -> str:
    """Write `skipped.jsonl` and `index.parquet`; returns the checksum of the latter."""
    import pyarrow
    import pyarrow.parquet

    where = {clip: (number, *values) for number, record in enumerate(shards) for clip, *values in record["clips"]}
    reasons = {clip: (path, reason) for clip, path, reason in lost}
    text, texts = pyarrow.string(), pyarrow.list_(pyarrow.string())
    position = {
        "shard": pyarrow.int32(),
        "offset": pyarrow.int64(),
        "samples": pyarrow.int64(),
        "mean": pyarrow.float64(),
        "variance": pyarrow.float64(),
        "crc32": pyarrow.binary(),
        "origin": text,
    }
    columns = {
        "audio": text,
        "text_description": texts,
        "fine_description": texts,
        "classification_tag": text,
        "duration": pyarrow.float64(),
        "text_style_prompt": text,
        **dict.fromkeys(manifest.columns, texts),
        CLIP_COLUMN: pyarrow.struct(position),
    }
    schema = pyarrow.schema(columns)

    def record_of(row: Row, clip: int) -> dict[str, Any]:
        shard, offset, samples, mean, variance, checksums, duration = where[clip]
        values = (shard, offset, samples, mean, variance, bytes.fromhex(checksums), row.origin)
        return {
            "audio": row.audio,
            "text_description": row.captions or None,
            "fine_description": row.fine_captions or None,
            "classification_tag": row.classification_tag,
            "duration": duration if row.duration is None else row.duration,
            "text_style_prompt": row.style_prompt,
            **row.tags,
            CLIP_COLUMN: dict(zip(position, values, strict=True)),
        }

    skipped, batch = [], []
    temporary = folder / ".index.parquet.partial"
    # an open file, as its name may be no UTF-8
    with open(temporary, "wb") as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for index, (row, clip) in enumerate(zip(manifest, clip_of_row, strict=True)):
            if clip in reasons:
                path, reason = reasons[clip]
                skipped.append({"row": index, "path": path, "reason": reason, "origin": row.origin})
                continue
            batch.append(record_of(row, clip))
            if len(batch) == ROWS_AT_ONCE:
                writer.write_table(pyarrow.Table.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))
    if skipped:
        lines = "".join(json.dumps(line) + "\n" for line in skipped)
        write_atomic(folder / "skipped.jsonl", lines.encode())
    fsync(temporary)
    os.replace(temporary, folder / "index.parquet")
    return index_checksum((folder / "index.parquet").read_bytes())


def _summary(folder: Path) -> dict[str, Any]:
    header = read_header(folder)
    index = open_index(folder, header)
    skipped = folder / "skipped.jsonl"
    size = sum(header["shards"])
    clips = {
        (clip["shard"], clip["offset"])
        for batch in index.iter_batches(columns=[CLIP_COLUMN])
        for clip in batch.column(0).to_pylist()
    }
    return {
        "folder": os.fspath(folder),
        "rows": index.metadata.num_rows,
        "clips": len(clips),
        "hours": size / SAMPLE.itemsize / header["sampling_rate"] / 3600,
        "bytes": size,
        "shards": len(header["shards"]),
        "skipped": skipped.read_bytes().count(b"\n") if skipped.exists() else 0,
    }


def _record_name(number: int) -> str:
    return f".shard-{number:05d}.json"


def _record_path(folder: Path, number: int) -> Path:
    """Where the record of a finished shard is kept until the index is written."""
    return folder / _record_name(number)


@contextlib.contextmanager
def _explained_write_errors(path: Path) -> Iterator[None]:
    """Turns an error of the operating system into one that names what was being written and says how to go on."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror or error}; make room or choose another folder; the same "
            "command goes on after the last finished shard"
        ) from error
