"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture
def real_speech() -> Path:
    """Folder with train.jsonl and test.jsonl of real speech, named by FASTCLAP_TEST_DATA; skips where it is not set."""
    folder = os.environ.get("FASTCLAP_TEST_DATA")
    if not folder:
        pytest.skip("FASTCLAP_TEST_DATA names no folder of real speech")
    return Path(folder)
