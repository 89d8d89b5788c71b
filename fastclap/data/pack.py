"""Packed folders: every clip decoded once, so that an epoch is plain reads and a crop costs only its own bytes.

A packed folder is a complete manifest with its audio:

- ``shard-00000.pcm``, ``shard-00001.pcm``, ...: mono samples, int16 little-endian, one clip after the other.
- ``index.parquet``: one line for each row. The columns ``audio`` (the path it was packed from), ``text_description``,
  ``fine_description``, ``classification_tag``, ``duration``, ``text_style_prompt`` and every tag column are the
  manifest's; rows of the same audio share its samples. The column ``fastclap_clip`` says where they are: ``shard``,
  ``offset`` in bytes, ``samples``, ``mean`` and ``variance`` (of the whole file, full scale = ±1), ``crc32`` (one
  little-endian uint32 for each block of 16384 samples, the last one shorter) and ``origin`` (manifest and line).
- ``skipped.jsonl``: the rows that could not be packed, with their reasons; there only if there are any.
- ``pack.json``: version of this format, sampling rate, shard size and id of the input; once the pack is finished, also
  the byte size of each shard and the BLAKE2b sum of the index.

A crop reads the blocks that it lies in and checks their sums: on average one block (a second at 16 kHz) more than was
asked for.

Packing writes every file aside and renames it once it is on the disk, the finished ``pack.json`` last. Before that, the
folder is an unfinished pack, which the same command continues behind its last finished shard. The bytes of a pack
follow from its input alone, however many processes decoded it and however often it was interrupted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastclap.audio import AudioError, AudioFile, whole_clip
from fastclap.data.workers import fork_server, start_worker
from fastclap.errors import ConfigError, DataError, FastclapError
from fastclap.files import fsync, locked, write_atomic

if TYPE_CHECKING:
    from fastclap.data.manifest import Manifest, Row

VERSION = 1
CLIP_COLUMN = "fastclap_clip"
_INPUT = ("version", "sampling_rate", "shard_mb", "input")  # what a pack is made of, in pack.json
_BLOCK = 1 << 14  # samples under one checksum
_OPEN_SHARDS = 128
_ROWS_AT_ONCE = 4096
_SAMPLE = np.dtype("<i2")
_AGAIN = "copy the folder again from where it came from, or remove it and run `fastclap pack` again"


class PackedClip(NamedTuple):
    """Where the samples of a row are, and what is known of them without reading."""

    shard: str  # path of the shard
    offset: int  # bytes
    samples: int
    sampling_rate: int  # Hz
    mean: float  # of the whole clip, full scale = ±1
    variance: float  # population variance, likewise
    checksums: bytes  # CRC-32 of each block, uint32 little-endian
    origin: str  # manifest and line that the clip was packed from


class PackedFile:
    """A packed clip, read like an :class:`~fastclap.audio.AudioFile`. Shards are opened once in each process.

    Raises:
        DataError: the clip was packed at another sampling rate than the wanted one.
    """

    def __init__(self, clip: PackedClip, sampling_rate: int | None = None) -> None:
        self.path = clip.shard
        self.sampling_rate = clip.sampling_rate
        self.statistics: tuple[float, float] | None = (clip.mean, clip.variance)
        self._clip = clip
        if sampling_rate not in (None, clip.sampling_rate):
            raise DataError(
                f"{os.path.dirname(clip.shard)}: packed at {clip.sampling_rate} Hz, but {sampling_rate} Hz are wanted; "
                f"pack the files again with --sampling-rate {sampling_rate}"
            )

    @property
    def num_samples(self) -> int:
        return self._clip.samples

    def read(self, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """Samples [start, start + num_samples) or to the end; int16, read-only.

        Raises:
            AudioError: ``start`` lies outside the clip, the shard is missing or shorter than it was, cannot be read, or
                a block that was read does not have its checksum.
        """
        clip = self._clip
        if not 0 <= start < clip.samples:
            raise AudioError(self.path, f"start={start} lies outside the clip, which has {clip.samples} samples")
        stop = clip.samples if num_samples is None else min(start + num_samples, clip.samples)
        first, last = start // _BLOCK, -(-stop // _BLOCK)
        begin = first * _BLOCK
        size = 2 * (min(last * _BLOCK, clip.samples) - begin)
        try:
            data = _shard(self.path).read(clip.offset + 2 * begin, size)
        except OSError as error:
            raise AudioError(self.path, f"cannot be read: {error.strerror}; {self._remedy()}") from error
        if len(data) < size:
            raise AudioError(self.path, f"truncated: the shard ends within this clip; {self._remedy()}")
        expected = np.frombuffer(clip.checksums, "<u4", last - first, 4 * first).tolist()
        view = memoryview(data)
        for block, checksum in enumerate(expected):
            if zlib.crc32(view[2 * _BLOCK * block : 2 * _BLOCK * (block + 1)]) != checksum:
                at = clip.offset + 2 * (begin + _BLOCK * block)
                raise AudioError(
                    self.path, f"damaged: the block at byte {at} does not have its checksum; {self._remedy()}"
                )
        wave = np.frombuffer(data, _SAMPLE, stop - start, 2 * (start - begin))
        return wave.astype(np.int16, copy=False)

    def _remedy(self) -> str:
        return f"the clip was packed from {self._clip.origin}; {_AGAIN}"

    def __enter__(self) -> PackedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to close: the shard stays open for the next clip."""


def open_clip(row: Row, sampling_rate: int) -> AudioFile | PackedFile:
    """The audio of a row, from its file or from the packed folder that the row is of.

    Raises:
        AudioError: the file cannot be used.
        DataError: the row was packed at another sampling rate.
    """
    return AudioFile(row.audio, sampling_rate) if row.packed is None else PackedFile(row.packed, sampling_rate)


class _Shard:
    """An open shard; closed when nobody reads from it any more."""

    def __init__(self, path: str) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, fewer only at the end of the file; any number of threads at a time."""
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


_shard = lru_cache(_OPEN_SHARDS)(_Shard)


# Reading the index


def is_pack(folder: str) -> bool:
    """Whether a folder is a packed folder, finished or not."""
    return os.path.isfile(os.path.join(folder, "pack.json"))


def read_pack(folder: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbered records of a packed folder, each with a :class:`PackedClip` under ``fastclap_clip``.

    Raises:
        DataError: the pack is unfinished, of another version or damaged, or a shard is missing or has changed its size.
    """
    header = _read_header(Path(folder))
    index = _open_index(Path(folder), header)
    for number, size in enumerate(header["shards"]):
        path = os.path.join(folder, _shard_name(number))
        try:
            found = os.path.getsize(path)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}), but the folder lists clips of it; {_AGAIN}"
            ) from error
        if found != size:
            state = "truncated" if found < size else "too long"
            raise DataError(f"{path}: {state}: {found} bytes instead of {size}; {_AGAIN}")
    number = 0
    for batch in index.iter_batches(batch_size=_ROWS_AT_ONCE):
        for record in batch.to_pylist():
            number += 1
            clip = record[CLIP_COLUMN]
            record[CLIP_COLUMN] = PackedClip(
                os.path.join(folder, _shard_name(clip["shard"])),
                clip["offset"],
                clip["samples"],
                header["sampling_rate"],
                clip["mean"],
                clip["variance"],
                clip["crc32"],
                clip["origin"],
            )
            yield number, record


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / "pack.json"
    try:
        header: dict[str, Any] = json.loads(path.read_bytes())
        version = header["version"]
        if version == VERSION:
            return {**{key: header[key] for key in _INPUT}, **header}
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not the header of a packed folder ({type(error).__name__}: {error}); {_AGAIN}"
        ) from error
    raise DataError(
        f"{path}: the folder was packed in version {version!r} of the format, this fastclap reads version {VERSION}; "
        "use the fastclap that packed it, or pack it again"
    )


def _open_index(folder: Path, header: Mapping[str, Any]) -> Any:
    import pyarrow.parquet

    path = folder / "index.parquet"
    if "index" not in header:
        raise DataError(f"{folder}: an unfinished pack; run the same `fastclap pack` command again, it goes on")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; {_AGAIN}") from error
    if _sum(data) != header["index"]:
        raise DataError(f"{path}: damaged, or of another pack than {folder}/pack.json: its sum is another; {_AGAIN}")
    return pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))


def _sum(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


# Packing


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

    Rows of several manifests become one, in their order; how they are mixed is for whoever loads them to say. Clips
    that cannot be used are left out and listed in ``skipped.jsonl``. Memory: two clips a process.

    Args:
        manifest: rows to pack.
        folder: new or empty, or an earlier call's with the same rows and options.
        sampling_rate: rate in Hz of the packed samples; a model reads only packs of its own rate.
        shard_mb: a shard is full before it exceeds so many MB; a longer clip has one of its own.
        workers: decoding processes; 0 decodes in this one.
        advance: told the clips done and the clips in all, after each clip.

    Returns:
        JSON-able: ``folder``, ``rows``, ``clips``, ``hours``, ``bytes`` (of samples), ``shards``, ``skipped`` (rows).

    Raises:
        DataError: the folder holds something else, the disk is full, a process died, or no clip can be used.
        ConfigError: an impossible option.
    """
    if sampling_rate < 1 or workers < 0 or not shard_mb > 0:
        raise ConfigError(
            f"sampling_rate={sampling_rate}, shard_mb={shard_mb}, workers={workers}: the first two must be positive, "
            "the third at least 0"
        )
    folder = Path(folder)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    header = {
        "version": VERSION,
        "sampling_rate": sampling_rate,
        "shard_mb": float(shard_mb),
        "input": _fingerprint(manifest, sampling_rate, shard_mb),
    }
    with locked(folder, "packing into"):
        _claim(folder, header)
        if "index" not in _read_header(folder):
            clip_of_row, rows = _distinct(manifest)
            shards, lost = _write_shards(manifest, rows, folder, header, workers, advance)
            with _writing(folder):
                index = _write_index(manifest, clip_of_row, shards, lost, folder)
                finished = {**header, "shards": [record["size"] for record in shards], "index": index}
                write_atomic(folder / "pack.json", json.dumps(finished, indent=1).encode())
                fsync(folder)
        for left in (*folder.glob(".shard-*"), *folder.glob(".index.parquet*"), *folder.glob(".pack.json*")):
            left.unlink()
        return _summary(folder)


def _fingerprint(manifest: Manifest, sampling_rate: int, shard_mb: float) -> str:
    """An id of all that decides the bytes of a pack, but for the audio files themselves."""
    if CLIP_COLUMN in manifest.columns:
        raise DataError(
            f"{', '.join(manifest.source_names)}: packed folders need the column name {CLIP_COLUMN!r}; rename it"
        )
    digest = blake2b(f"{sampling_rate}/{float(shard_mb)!r}".encode(), digest_size=16)
    for row in manifest:
        try:
            "".join(
                (row.audio, *row.captions, *row.fine_captions, *(tag for tags in row.tags.values() for tag in tags))
            ).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{row.origin}: half a surrogate pair ({error.object[error.start]!a}) is no text; correct it"
            ) from error
        digest.update(repr(tuple(row)).encode())
    return digest.hexdigest()


def _claim(folder: Path, header: Mapping[str, Any]) -> None:
    """Make the folder this pack's, or find that it is."""
    if is_pack(os.fspath(folder)):
        found = _read_header(folder)
        if any(found[key] != header[key] for key in _INPUT):
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
    with _writing(folder):
        write_atomic(folder / "pack.json", json.dumps(header, indent=1).encode())


def _distinct(manifest: Manifest) -> tuple[list[int], list[int]]:
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
    """One shard and what the index has to say about its clips; under its final name only once it is complete."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.path = folder / _shard_name(number)
        self.aside = folder / f".{self.path.name}.partial"
        self.size = 0
        self.clips: list[list[Any]] = []  # [clip, offset, samples, mean, variance, checksums, duration]
        self.skipped: list[list[Any]] = []  # [clip, path, reason]
        self._file = open(self.aside, "wb")  # noqa: SIM115 - closed by finish or discard

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
            os.replace(self.aside, self.path)
            fsync(self.folder)
            write_atomic(_note(self.folder, self.number), json.dumps(record).encode())
        return record

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # closing writes what is still buffered, for which there may be no room
            self._file.close()
        self.aside.unlink(missing_ok=True)


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
    records = _finished(folder)
    begin = records[-1]["next_clip"] if records else 0
    advance(begin, len(rows))
    with contextlib.ExitStack() as stack:
        with _writing(folder):
            writer = _ShardWriter(folder, len(records))
        stack.callback(lambda: writer.discard())
        decoded = stack.enter_context(
            contextlib.closing(_decode_all(manifest, rows[begin:], header["sampling_rate"], workers))
        )
        for clip, found in enumerate(decoded, begin):
            if isinstance(found, AudioError):
                writer.skipped.append([clip, found.path, found.reason])
            else:
                with _writing(folder):
                    if writer.size and writer.size + found.wave.nbytes > limit:
                        records.append(writer.finish(clip))
                        writer = _ShardWriter(folder, len(records))
                    writer.add(clip, found)
            advance(clip + 1, len(rows))
        with _writing(folder):
            records.append(writer.finish(len(rows)))
    skipped = [clip for record in records for clip in record["skipped"]]
    records = [record for record in records if record["size"]]
    if not records:
        first = f"; the first: {skipped[0][1]}: {skipped[0][2]}" if skipped else ""
        raise DataError(f"none of the {len(rows)} clips can be used{first}")
    return records, skipped


def _finished(folder: Path) -> list[dict[str, Any]]:
    """The records of the shards that earlier calls finished; whatever else they left is removed."""
    records: list[dict[str, Any]] = []
    while True:
        number = len(records)
        path, note = folder / _shard_name(number), _note(folder, number)
        try:
            record = json.loads(note.read_bytes())
            if path.stat().st_size != record["size"]:
                break
        except (OSError, ValueError):
            break
        records.append(record)
    keep = {name(number) for number in range(len(records)) for name in (_shard_name, _note_name)}
    for pattern in ("shard-*", ".shard-*"):
        for left in folder.glob(pattern):
            if left.name not in keep:
                left.unlink()
    return records


def _decode_all(
    manifest: Manifest, rows: Sequence[int], sampling_rate: int, workers: int
) -> Generator[_Decoded | AudioError, None, None]:
    """The clips of ``rows``, in order; decoded in processes a little ahead of the caller."""
    if not workers or not rows:
        for row in rows:
            yield _decode(manifest[row], sampling_rate)
        return
    pool = ProcessPoolExecutor(workers, fork_server(), initializer=start_worker)
    ahead: deque[tuple[int, Future[_Decoded | AudioError]]] = deque()
    try:
        for row in rows:
            ahead.append((row, pool.submit(_decode, manifest[row], sampling_rate)))
            if len(ahead) == 2 * workers:
                yield ahead[0][1].result()
                ahead.popleft()
        while ahead:
            yield ahead[0][1].result()
            ahead.popleft()
    except BrokenProcessPool as error:
        suspects = ", ".join(manifest[row].audio for row, _ in itertools.islice(ahead, workers))
        raise DataError(
            f"a decoding process died, most likely because memory ran out or a decoder crashed, at about {suspects}; "
            "run the same command again, which goes on behind the last finished shard, with fewer --workers, or with "
            "--workers 0 to see which clip it is"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


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
    wave = np.ascontiguousarray(clip.wave, _SAMPLE)
    blocks = (wave[begin : begin + _BLOCK] for begin in range(0, len(wave), _BLOCK))
    checksums = np.array([zlib.crc32(block.data) for block in blocks], "<u4").tobytes()
    return _Decoded(wave, clip.mean, clip.variance, checksums, seconds)


def _write_index(
    manifest: Manifest,
    clip_of_row: Sequence[int],
    shards: Sequence[Mapping[str, Any]],
    lost: Sequence[Sequence[Any]],
    folder: Path,
) -> str:
    """Write ``skipped.jsonl`` and ``index.parquet``; returns the sum of the latter."""
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
    aside = folder / ".index.parquet.partial"
    with pyarrow.parquet.ParquetWriter(aside, schema) as writer:
        for index, (row, clip) in enumerate(zip(manifest, clip_of_row, strict=True)):
            if clip in reasons:
                path, reason = reasons[clip]
                skipped.append({"row": index, "path": path, "reason": reason, "origin": row.origin})
                continue
            batch.append(record_of(row, clip))
            if len(batch) == _ROWS_AT_ONCE:
                writer.write_table(pyarrow.Table.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))
    if skipped:
        lines = "".join(json.dumps(line) + "\n" for line in skipped)
        write_atomic(folder / "skipped.jsonl", lines.encode())
    fsync(aside)
    os.replace(aside, folder / "index.parquet")
    return _sum((folder / "index.parquet").read_bytes())


def _summary(folder: Path) -> dict[str, Any]:
    header = _read_header(folder)
    index = _open_index(folder, header)
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
        "hours": size / _SAMPLE.itemsize / header["sampling_rate"] / 3600,
        "bytes": size,
        "shards": len(header["shards"]),
        "skipped": len(skipped.read_bytes().splitlines()) if skipped.exists() else 0,
    }


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.pcm"


def _note_name(number: int) -> str:
    return f".shard-{number:05d}.json"


def _note(folder: Path, number: int) -> Path:
    """What is known of a finished shard, until the index is written."""
    return folder / _note_name(number)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot be written: {error.strerror or error}; make room or choose another "
            "folder; the same command goes on behind the last finished shard"
        ) from error
