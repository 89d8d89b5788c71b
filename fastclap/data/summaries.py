"""Files that keep what frozen towers say of clips and captions, for all epochs, runs and processes.

There is one file for each fingerprint of a tower (`fingerprint`): its weights, its configuration, the code and the
precision. It is a sequence of records of one size, each complete in itself:

    key (16 bytes) | extent (int64: samples of the whole clip, or tokens) | summary as computed | seal (16 bytes)

The seal is a BLAKE2b sum of the rest under the fingerprint, so that a record that is damaged, half written, or of
another file does not pass for one of this file; it is then as if it were not there. Records are only ever appended,
under a lock of the file (`flock`). What a killed writer left of a record is cut off by the next writer. Of two records
with the same key the first one counts, for everybody. The shape and the type of a summary are in the file's name; a
file may be deleted at any time, and what it held is computed again.

A clip is known by what tells that its file has changed without reading it: path, size, and the times of the last
modification and of the last change of status. The last (ctime) is set by the kernel alone, so a file that was replaced
by one of the same size, and given its old modification time, is another clip all the same. A clip of a packed folder is
known by its shard in this way, its place in there and the checksums in the index.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import mmap
import os
import re
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastclap
from fastclap import files
from fastclap.data.hashing import CROP, GOLDEN, MASK, hash64
from fastclap.data.rows import Row
from fastclap.errors import DataError

VERSION = 1
"""To be raised with every change of the code that changes a summary by more than rounding, or of the format."""

_KEY, _SEAL = 16, 16
_HEAD = _KEY + 8  # and the extent
_FILE_NAME = re.compile(r"[0-9a-f]{32}\.(float64|float32|float16|bfloat16)\.[1-9][0-9]{0,8}(x[1-9][0-9]{0,8}){0,3}")
_SETTLED = 50_000_000  # ns; kernels stamp files by a clock that stands still for up to 10 ms


class SummaryStore:
    """The file of one fingerprint, read at the speed of memory and shared with any number of processes.

    Args:
        folder: where the file is; made with the first record.
        fingerprint: 32 hexadecimal digits, of the tower.

    Attributes:
        damaged: records that were not used because their seal is not theirs.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str) -> None:
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self.path: Path | None = None
        self.damaged = 0
        self._descriptor = -1
        self._places: dict[bytes, int] = {}
        self._read = 0  # records
        self._table: Tensor | None = None
        self._extents = np.empty(0, np.int64)
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def place(self, key: bytes) -> int:
        """Where the summary of this key is, for `gather`; KeyError: it is not known."""
        return self._places[key]

    def extent(self, key: bytes) -> int:
        """What was appended with it: samples of the whole clip, or tokens."""
        return int(self._extents[self._places[key]])

    def gather(
        self,
        places: Tensor,  # int64 [n]
    ) -> Tensor:  # [n, ...]
        """Summaries of places; a copy, on the CPU, in the type in which they were computed."""
        if self._table is None:
            raise KeyError("the file has no record yet")
        return self._table.index_select(0, places)

    def refresh(self) -> None:
        """Take in what has been appended since, by whichever process.

        Raises:
            DataError: the file cannot be read.
        """
        if self._descriptor < 0:
            found = sorted(
                path for path in self.folder.glob(f"{self.fingerprint}.*") if _FILE_NAME.fullmatch(path.name)
            )
            found = [path for path in found if path.is_file()]  # no pipe, nor anything of somebody else
            if not found:
                return
            with self._errors("read", found[0]):
                self._open(found[0])
        assert self.path is not None
        with self._errors("read", self.path), self._locked(exclusive=False):
            records = os.fstat(self._descriptor).st_size // self._stride
        if records < self._read:
            raise DataError(f"{self.path}: was cut short while in use; start again, the rest will be computed again")
        if records == self._read:
            return
        with self._errors("read", self.path):
            # A private mapping: the pages are those of the page cache, whichever process reads them.
            view = mmap.mmap(self._descriptor, records * self._stride, access=mmap.ACCESS_COPY)
        end = self._stride - _SEAL
        with memoryview(view) as data:
            for number in range(self._read, records):
                record = data[number * self._stride : (number + 1) * self._stride]
                if self._sealed(record[:end]) == record[end:]:
                    self._places.setdefault(bytes(record[:_KEY]), number)
                else:
                    self.damaged += 1
        self._read = records
        table = torch.frombuffer(view, dtype=torch.uint8).view(records, self._stride)[:, _HEAD:end]
        self._table = table.view(self._dtype).unflatten(1, self._shape)
        self._extents = np.ndarray(records, "<i8", view, _KEY, (self._stride,))

    def append(
        self,
        keys: Sequence[bytes],
        extents: Sequence[int],
        summaries: Tensor,  # [n, ...], of the shape and type that all others have
    ) -> None:
        """Add records, which `place` and `gather` know from here on.

        Raises:
            DataError: the file cannot be written, its file system has no locks, or the summaries are of another shape
                than those in the file.
        """
        summaries = summaries.detach().cpu().contiguous()
        if self._descriptor < 0:
            shape = "x".join(map(str, summaries.shape[1:]))
            path = self.folder / f"{self.fingerprint}.{str(summaries.dtype).removeprefix('torch.')}.{shape}"
            with self._errors("written", path):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._open(path, create=True)
        assert self.path is not None
        if (summaries.dtype, summaries.shape[1:]) != (self._dtype, self._shape):
            raise DataError(
                f"{self.path}: a summary of shape {tuple(summaries.shape[1:])} and {summaries.dtype} does not fit; "
                "remove the file, or train with --data.frozen-cache off"
            )
        values = summaries.view(len(keys), -1).view(torch.uint8).numpy()
        data = bytearray()
        for key, extent, value in zip(keys, extents, values, strict=True):
            record = key + struct.pack("<q", extent) + value.tobytes()
            data += record + self._sealed(record)
        with self._errors("written", self.path), self._locked(exclusive=True):
            torn = os.fstat(self._descriptor).st_size % self._stride
            if torn:  # a writer was killed, or the disk was full
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - torn)
            left = memoryview(data)
            while left:
                left = left[os.write(self._descriptor, left) :]
        self.refresh()

    def _open(self, path: Path, create: bool = False) -> None:
        _, dtype, shape = path.name.split(".")
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._shape = torch.Size(map(int, shape.split("x")))
        self._stride = _HEAD + math.prod(self._shape) * self._dtype.itemsize + _SEAL  # numel() would overflow
        writable = create or os.access(path, os.W_OK)  # one that others own can still be read
        flags = os.O_RDWR | os.O_APPEND if writable else os.O_RDONLY
        self._descriptor = os.open(path, flags | (os.O_CREAT if create else 0) | getattr(os, "O_CLOEXEC", 0), 0o666)
        self.path = path

    def _sealed(self, record: bytes | memoryview) -> bytes:
        return blake2b(record, digest_size=_SEAL, key=self.fingerprint.encode()).digest()

    @contextlib.contextmanager
    def _locked(self, exclusive: bool) -> Iterator[None]:
        import fcntl

        fcntl.flock(self._descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def _errors(self, what: str, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{path}: cannot be {what} ({error.strerror}); name another folder with --data.frozen-cache or "
                "FASTCLAP_CACHE, or compute frozen towers at every step with --data.frozen-cache off"
            ) from error

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def cache_folder(setting: str) -> Path:
    """The folder of a `--data.frozen-cache` that is not off; auto: $FASTCLAP_CACHE, else ~/.cache/fastclap."""
    return files.cache_folder("summaries") if setting == "auto" else Path(setting)


def fingerprint(tower: nn.Module, config: Any, **computation: Any) -> str:
    """32 hexadecimal digits that change with everything that a frozen tower's summaries depend on but the input.

    Args:
        tower: parameters that train are left out: they have no part in a summary.
        config: the tower's configuration, complete, as a model has it.
        computation: what else the numbers depend on, such as the precision.
    """
    skipped = ("pretrained", "freeze")  # where weights come from, and what of them would train
    described = {name: value for name, value in dataclasses.asdict(config).items() if not name.startswith(skipped)}
    parts = [VERSION, fastclap.__version__, type(tower).__qualname__, described, computation]
    found = blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16)
    fixed = {name: tensor for name, tensor in tower.named_parameters() if not tensor.requires_grad}
    for name, tensor in sorted({**fixed, **dict(tower.named_buffers())}.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def clip_identities(rows: Iterable[Row]) -> list[bytes]:
    """16 bytes for each row that are others once its clip has changed; also of a file that is not there."""
    shards: dict[str, bytes] = {}
    found = []
    for row in rows:
        clip = row.packed
        if clip is None:
            found.append(_identity(_stamp(row.audio)))
            continue
        if clip.shard not in shards:
            shards[clip.shard] = _stamp(clip.shard)
        place = struct.pack("<3q2d", clip.offset, clip.samples, clip.sampling_rate, clip.mean, clip.variance)
        found.append(_identity(shards[clip.shard] + place + clip.checksums))
    return found


def _identity(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _stamp(path: str) -> bytes:
    try:
        status = os.stat(path)
        times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except OSError:
        times = (-1, 0, 0)
    name = os.fsencode(os.path.abspath(path))
    return struct.pack("<4q", *times, len(name)) + name


def settle(row: Row) -> None:
    """Wait until a change of the clip's file from here on has another time than the last one: milliseconds, if at all.

    A file that is written twice within a tick of the kernel's clock, to the same size, has the same times.
    """
    with contextlib.suppress(OSError):
        path = row.audio if row.packed is None else row.packed.shard
        age = time.time_ns() - os.stat(path).st_ctime_ns
        if 0 <= age < _SETTLED:
            time.sleep((_SETTLED - age) / 1e9)


def clip_key(
    identity: bytes,
    sampling_rate: int,  # Hz
    crop: int | None,  # samples; None: whole clips
    number: int = 0,  # of the crop
    padded: bool = False,  # to the length of a crop
) -> bytes:
    """16 bytes that stand for a crop of a clip."""
    return blake2b(
        identity + struct.pack("<3q?", sampling_rate, crop or 0, number, padded), digest_size=_KEY, person=b"clip"
    ).digest()


def crop_start(identity: bytes, number: int, below: int) -> int:
    """The first sample of a crop of a clip, in [0, below): a function of clip and number, the same in every run.

    Number k lies at the fraction (u + k·0.618…) mod 1, where u is the clip's own; so any number of crops is spread
    evenly (a Weyl sequence of the golden ratio), and asking for more of them leaves those before where they were.
    """
    return ((hash64(int.from_bytes(identity, "little"), CROP) + number * GOLDEN) & MASK) * below >> 64


def caption_key(ids: Sequence[int], max_tokens: int) -> bytes:
    """16 bytes that stand for a caption of these token ids, cut at `max_tokens`."""
    data = np.asarray([max_tokens, *ids], "<i8").tobytes()
    return blake2b(data, digest_size=_KEY, person=b"caption").digest()
