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

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fastclap.audio import AudioError, AudioFile
from fastclap.data.rows import PackedClip, Row
from fastclap.errors import DataError

VERSION = 1
CLIP_COLUMN = "fastclap_clip"
HEADER_FILE = "pack.json"
INPUT_KEYS = ("version", "sampling_rate", "shard_mb", "input")  # what a pack is made of, in its header
BLOCK = 1 << 14  # samples under one checksum
ROWS_AT_ONCE = 4096  # of the index
SAMPLE = np.dtype("<i2")
_OPEN_SHARDS = 128
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
    number = 0
    for batch in index.iter_batches(batch_size=ROWS_AT_ONCE):
        for record in batch.to_pylist():
            number += 1
            clip = record[CLIP_COLUMN]
            record[CLIP_COLUMN] = PackedClip(
                os.path.join(folder, shard_name(clip["shard"])),
                clip["offset"],
                clip["samples"],
                header["sampling_rate"],
                clip["mean"],
                clip["variance"],
                clip["crc32"],
                clip["origin"],
            )
            yield number, record


def read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER_FILE
    try:
        header: dict[str, Any] = json.loads(path.read_bytes())
        version = header["version"]
        if version == VERSION:
            return {**{key: header[key] for key in INPUT_KEYS}, **header}
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not the header of a packed folder ({type(error).__name__}: {error}); {_REMEDY}"
        ) from error
    raise DataError(
        f"{path}: the folder was packed in version {version!r} of the format, this fastclap reads version {VERSION}; "
        "use the fastclap that packed it, or pack it again"
    )


def open_index(folder: Path, header: Mapping[str, Any]) -> Any:
    import pyarrow.parquet

    path = folder / "index.parquet"
    if "index" not in header:
        raise DataError(f"{folder}: an unfinished pack; run the same `fastclap pack` command again, it goes on")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; {_REMEDY}") from error
    if index_checksum(data) != header["index"]:
        raise DataError(f"{path}: damaged, or of another pack than {folder}/pack.json: its sum is another; {_REMEDY}")
    return pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))


def index_checksum(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.pcm"
