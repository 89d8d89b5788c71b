"""Writing files so that a crash, a kill or a full disk never leaves half of one under its name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fastclap.errors import DataError


def cache_folder(kind: str) -> Path:
    """The folder of one kind of what can be made again: in $FASTCLAP_CACHE, else in ~/.cache/fastclap.

    Raises:
        RuntimeError: there is neither the variable nor a home.
    """
    return Path(os.environ.get("FASTCLAP_CACHE") or Path.home() / ".cache" / "fastclap") / kind


def fsync(path: Path) -> None:
    """Force a file, or the entries of a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, then flushed to the disk and renamed to `path`; after an error, removed.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, os.fspath(temporary)):  # a full disk has no name
            error.filename = os.fspath(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is never seen half-written."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Keep a second process out of the folder, where the file system supports locks.

    Raises:
        DataError: another process is `doing` it (such as "packing into").
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
