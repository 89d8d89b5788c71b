"""Random numbers that are a function of their arguments: hashes, uniform draws and permutations."""

from __future__ import annotations

import numpy as np

# What a hash is drawn for, so that the crop of a row says nothing about its caption.
CROP, CAPTION, REPLACEMENT, PROMPT, PERTURBATION = 1, 2, 3, 4, 5

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def hash64(*values: int) -> int:
    """A 64-bit hash of integers, one SplitMix64 step (Steele et al. 2014) for each; about 1 µs, the same everywhere."""
    state = 0
    for value in values:
        state = (state + GOLDEN ^ value) & MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
        state ^= state >> 31
    return state


def draw(below: int, *values: int) -> int:
    """An integer in [0, below), fixed by `values`."""
    return hash64(*values) * below >> 64


def draws(below: np.ndarray, *values: int | np.ndarray) -> np.ndarray:
    """`draw` for many at once: integers in [0, below), fixed by `values`, which broadcast. int64, below < 2³²."""
    state = np.zeros(1, np.uint64)
    for value in values:
        unsigned = np.uint64(value & MASK) if isinstance(value, int) else value.astype(np.uint64)
        state = _mixed(state + np.uint64(GOLDEN) ^ unsigned)
    below = below.astype(np.uint64)
    low = (state & np.uint64(0xFFFFFFFF)) * below >> np.uint64(32)
    return ((state >> np.uint64(32)) * below + low >> np.uint64(32)).astype(np.int64)


def permutation(size: int, *values: int) -> np.ndarray:
    """A shuffle of 0 … size-1, fixed by `values`: the argsort of hash64(*values, i). int64 [size]."""
    return np.argsort(_hashes(size, *values), kind="stable")


def uniform(size: int, *values: int) -> np.ndarray:
    """Numbers from [0, 1), fixed by `values`. float64 [size]."""
    return (_hashes(size, *values) >> np.uint64(11)) * 2.0**-53


def _hashes(size: int, *values: int) -> np.ndarray:
    """hash64(*values, i) for i in 0 … size-1. uint64 [size]."""
    return _mixed(np.uint64((hash64(*values) + GOLDEN) & MASK) ^ np.arange(size, dtype=np.uint64))


def _mixed(state: np.ndarray) -> np.ndarray:
    """What SplitMix64 does to its state after adding."""
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return state ^ state >> np.uint64(31)
