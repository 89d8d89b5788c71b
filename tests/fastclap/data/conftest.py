"""Small audio sets on disk for the data tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

RATE = 16000


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., str]:
    """Writes `count` clips of different lengths from 0.2 s on, and their manifest; returns the manifest's path."""

    def make(count: int, *, name: str = "set", duration: bool = True, **columns: Any) -> str:
        (tmp_path / name).mkdir()
        random = np.random.default_rng(count)
        rows = []
        for index in range(count):
            samples = RATE // 5 + 160 * (index * 7 % count)
            path = f"{name}/{index:03d}.wav"
            soundfile.write(tmp_path / path, random.normal(0, 0.1, samples), RATE, subtype="PCM_16")
            captions = [f"{name} clip {index}, take {take}" for take in range(3)]
            row = {"audio": path, "text_description": captions, "fine_description": f"fine {index}", **columns}
            rows.append({**row, "duration": samples / RATE} if duration else row)
        return write_rows(tmp_path / f"{name}.jsonl", rows)

    return make
