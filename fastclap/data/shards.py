"""Reading packed folders: every clip was decoded once, so an epoch is plain reads and a crop costs only its own bytes.

A packed folder is a complete manifest with its audio:

- `shard-00000.pcm`, `shard-00001.pcm`, ...: mono samples, int16 little-endian, one clip after the other.
- `index.parquet`: one line for each row. The columns `audio` (the path it was packed from), `text_description`,
  `fine_description`, `classification_tag`, `duration`, `text_style_prompt` and every tag column are the
  manifest's; rows of the same audio share its samples. The column `fastclap_clip` says where they are: `shard`,
  `offset` in bytes, `samples`, `mean` and `variance` (of the whole file, full scale = ±1), `crc32` (one
  little-endian uint32 for each block of 16384 samples, the last one shorter) and `origin` (manifest and line).
- `skipped.jsonl`: the rows that could not be packed, with their reasons; there only if there are any.
- `pack.json`: version of this format, sampling rate, shard size and id of the input; once the pack is finished, also
  the byte size of each shard and the BLAKE2b sum of the index.

A crop reads the blocks that it lies in and checks their sums: on average one block (a second at 16 kHz) more than was
asked for. `fastclap.data.pack` writes such folders.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fastclap.audio import RATES, AudioError, AudioFile
from fastclap.data.rows import PackedClip, Row
from fastclap.errors import DataError, FastclapError
from fastclap.reading import read_bytes, read_json

VERSION = 1
CLIP_COLUMN = "fastclap_clip"
HEADER_FILE = "pack.json"
INPUT_KEYS = ("version", "sampling_rate", "shard_mb", "input")  # what a pack is made of, in its header
BLOCK = 1 << 14  # samples under one checksum
ROWS_AT_ONCE = 4096  # of the index
SAMPLE = np.dtype("<i2")
_OPEN_SHARDS = 128
_MAX_INDEX = 1 << 36  # bytes
_REMEDY = "copy the folder again from where it came from, or remove it and run `fastclap pack` again"


class PackedFile:
    """A packed clip, read like an `AudioFile`. Shards are opened once in each process.

    Raises:
        DataError: the clip was packed at another sampling rate than the one asked for.
    """

    def __init__(self, clip: PackedClip, sampling_rate: int | None = None) -> None:
        self.path = clip.shard
        self.sampling_rate = clip.sampling_rate
        self.num_samples = clip.samples
        self.statistics: tuple[float, float] | None = (clip.mean, clip.variance)
        self._clip = clip
        if sampling_rate not in (None, clip.sampling_rate):
            raise DataError(
                f"{os.path.dirname(clip.shard)}: packed at {clip.sampling_rate} Hz, but {sampling_rate} Hz are wanted; "
                f"pack the files again with --sampling-rate {sampling_rate}"
            )

    def read(self, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """Samples [start, start + num_samples) or to the end; int16, read-only.

        Raises:
            AudioError: `start` lies outside the clip, the shard is missing or shorter than it was, cannot be read, or
                a block that was read does not have its checksum.
        """
        clip = self._clip
        if not 0 <= start < clip.samples:
            raise AudioError(self.path, f"start={start} lies outside the clip, which has {clip.samples} samples")
        stop = clip.samples if num_samples is None else min(start + num_samples, clip.samples)
        first, last = start // BLOCK, -(-stop // BLOCK)
        begin = first * BLOCK
        size = 2 * (min(last * BLOCK, clip.samples) - begin)
        try:
            data = _open_shard(self.path).read(clip.offset + 2 * begin, size)
        except OSError as error:
            raise AudioError(self.path, f"cannot be read: {error.strerror}; {self._remedy()}") from error
        if len(data) < size:
            raise AudioError(self.path, f"truncated: the shard ends within this clip; {self._remedy()}")
        expected = np.frombuffer(clip.checksums, "<u4", last - first, 4 * first).tolist()
        view = memoryview(data)
        for block, checksum in enumerate(expected):
            if zlib.crc32(view[2 * BLOCK * block : 2 * BLOCK * (block + 1)]) != checksum:
                at = clip.offset + 2 * (begin + BLOCK * block)
                raise AudioError(
                    self.path, f"damaged: the block at byte {at} does not have its checksum; {self._remedy()}"
                )
        wave = np.frombuffer(data, SAMPLE, stop - start, 2 * (start - begin))
        return wave.astype(np.int16, copy=False)

    def _remedy(self) -> str:
        return f"the clip was packed from {self._clip.origin}; {_REMEDY}"

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
        """`size` bytes from `offset`, fewer only at the end of the file; any number of threads at a time."""
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


_open_shard = lru_cache(_OPEN_SHARDS)(_Shard)


def is_pack(folder: str) -> bool:
    """Whether a folder is a packed folder, finished or not."""
    return os.path.isfile(os.path.join(folder, HEADER_FILE))


def read_pack(folder: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbered records of a packed folder, each with a `PackedClip` under `fastclap_clip`.

    Raises:
        DataError: the pack is unfinished, of another version or damaged, or a shard is missing or has changed its size.
    """
    header = read_header(Path(folder))
    index = open_index(Path(folder), header)
    for number, size in enumerate(header["shards"]):
        path = os.path.join(folder, shard_name(number))
        try:
            found = os.path.getsize(path)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}), but the folder lists clips of it; {_REMEDY}"
            ) from error
        if found != size:
            state = "truncated" if found < size else "too long"
            raise DataError(f"{path}: {state}: {found} bytes instead of {size}; {_REMEDY}")
    for number, record in parquet_records(index, index_name := os.path.join(folder, "index.parquet")):
        clip = record.get(CLIP_COLUMN)
        try:
            record[CLIP_COLUMN] = _packed_clip(clip, folder, header)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{index_name}:{number}: no place in a shard ({CLIP_COLUMN} is {str(clip)[:200]}); {_REMEDY}"
            ) from error
        yield number, record


def _packed_clip(clip: Any, folder: str, header: Mapping[str, Any]) -> PackedClip:
    """Where a record's samples are; ValueError, KeyError or TypeError: nowhere."""
    shard, offset, samples, checksums = (clip[name] for name in ("shard", "offset", "samples", "crc32"))
    mean, variance = float(clip["mean"]), float(clip["variance"])
    blocks = -(-samples // BLOCK)
    if not (
        0 <= shard < len(header["shards"])
        and 0 <= offset <= header["shards"][shard] - 2 * samples
        and samples > 0
        and len(checksums) == 4 * blocks
        and -1 <= mean <= 1
        and 0 <= variance <= 1
        and isinstance(clip["origin"], str)
    ):
        raise ValueError
    path = os.path.join(folder, shard_name(shard))
    return PackedClip(path, offset, samples, header["sampling_rate"], mean, variance, checksums, clip["origin"])


def read_header(folder: Path) -> dict[str, Any]:
    """What `pack.json` says, of this version of the format, every entry of its type.

    Raises:
        DataError: it cannot be read, is of another version, or is damaged.
    """
    path = folder / HEADER_FILE
    header = read_json(path)
    version = header.get("version") if isinstance(header, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise DataError(
            f"{path}: the folder was packed in version {version!r} of the format, this fastclap reads version "
            f"{VERSION}; use the fastclap that packed it, or pack it again"
        )

    def size(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 62

    valid: dict[str, Callable[[Any], bool]] = {
        "version": size,
        "sampling_rate": lambda value: type(value) is int and value in RATES,
        "shard_mb": lambda value: type(value) in (int, float) and 0 < value < math.inf,
        "input": lambda value: isinstance(value, str),
    }
    if isinstance(header, dict) and "index" in header:
        valid |= {"index": valid["input"], "shards": lambda value: isinstance(value, list) and all(map(size, value))}
    for key, is_valid in valid.items():
        if not isinstance(header, dict) or key not in header or not is_valid(header[key]):
            found = f"{key} is {str(header[key])[:60]}" if isinstance(header, dict) and key in header else f"no {key}"
            raise DataError(f"{path}: not the header of a packed folder ({found}); {_REMEDY}")
    return header


def parquet_records(source: Any, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbered records of a Parquet file.

    Args:
        source: path, or an open `pyarrow.parquet.ParquetFile`.
        name: of the file, for messages.

    Raises:
        DataError: it cannot be read, two columns have the same name, or a value is none of Python's.
    """
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(open(source, "rb")) if isinstance(source, str) else source  # noqa: SIM115
        columns = file.schema_arrow.names
        if twice := sorted({column for column in columns if columns.count(column) > 1}):
            raise DataError(f"{name}: several columns have the name {twice[0]!r}; rename one")
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
            try:
                records = batch.to_pylist()
            except Exception as error:
                raise _value_error(batch, number, name) from error
            for record in records:
                number += 1
                yield number, record
    except FastclapError:
        raise
    except Exception as error:  # pyarrow raises errors of Arrow, of Python's, and plain OSErrors
        raise DataError(f"{name}: not a readable Parquet file ({' '.join(str(error).split())})") from error


def _value_error(batch: Any, before: int, name: str) -> DataError:
    """What to say of the value of a batch that Python cannot have, such as text that is not UTF-8."""
    for column in batch.schema.names:
        for index, value in enumerate(batch.column(column)):
            try:
                value.as_py()
            except Exception as error:
                reason = "text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
                return DataError(
                    f"{name}:{before + index + 1}: column {column!r} cannot be read ({reason}); correct or remove it"
                )
    return DataError(f"{name}: rows {before + 1} to {before + len(batch)} cannot be read")


def open_index(folder: Path, header: Mapping[str, Any]) -> Any:
    import pyarrow.parquet

    path = folder / "index.parquet"
    if "index" not in header:
        raise DataError(f"{folder}: an unfinished pack; run the same `fastclap pack` command again, it goes on")
    try:
        data = read_bytes(path, limit=_MAX_INDEX)
    except DataError as error:
        raise DataError(f"{error}; {_REMEDY}") from error
    if index_checksum(data) != header["index"]:
        raise DataError(f"{path}: damaged, or of another pack than {folder}/pack.json: its sum is another; {_REMEDY}")
    try:
        return pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
    except Exception as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); {_REMEDY}") from error


def index_checksum(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.pcm"
