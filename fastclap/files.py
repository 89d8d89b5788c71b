"""Writing files so that a crash, a kill or a full disk never leaves half of one under its name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fastclap.errors import DataError


def fsync(path: Path) -> None:
    """Force a file, or the entries of a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file to; it is then flushed to the disk and renamed to ``path``, or after an error removed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        fsync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is never seen half-written: aside, flushed to the disk, then renamed."""
    with replacing(path) as aside:
        aside.write_bytes(data)


@contextlib.contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Keeps a second process out of the folder, where the file system knows locks.

    Raises:
        DataError: another process is ``doing`` something there.
    """
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{folder}: another process is {doing} it; wait for it, or end it") from error
        except OSError:  # some network file systems have no locks on folders
            pass
        yield
    finally:
        os.close(descriptor)
