"""Freed memory is kept for the next batch."""

from __future__ import annotations

import ctypes
import os
import sys

# Of malloc.h. glibc moves both limits by itself, up to 32 and 64 MiB, as blocks happen to be freed.
_TRIM_THRESHOLD, _KEPT_BYTES = -1, 256 << 20
_MMAP_THRESHOLD, _LARGEST_BLOCK = -3, 32 << 20


def keep_freed_memory() -> None:
    """Have glibc keep up to 256 MiB of what this process frees, unless the environment says how much.

    By default a batch of 10 MB or a step's activations may go back to the system each time, and every page of the next
    one is then a page fault: a tenth of a training step on a CPU, a third of the reading of WAV files.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return
    mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
