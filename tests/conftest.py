"""Fixtures shared by the whole suite."""

from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import quick_interpreter

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which is ignored under nohup, by what tests start too
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
quick_interpreter.install()


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """What is imported is left out of garbage collections, which would take half a second each and find nothing."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers in every run, in whatever order and selection it runs."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runs keep of frozen towers goes where the tests' files go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTCLAP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def real_weights() -> Path:
    """Folder with whisper-tiny.en-encoder and all-MiniLM-L6-v2, named by FASTCLAP_TEST_WEIGHTS; skips if not set."""
    folder = os.environ.get("FASTCLAP_TEST_WEIGHTS")
    if not folder:
        pytest.skip("FASTCLAP_TEST_WEIGHTS names no folder of pretrained weights")
    return Path(folder)


@pytest.fixture
def real_speech() -> Path:
    """Folder with train.jsonl and test.jsonl of real speech, named by FASTCLAP_TEST_DATA; skips where it is not set."""
    folder = os.environ.get("FASTCLAP_TEST_DATA")
    if not folder:
        pytest.skip("FASTCLAP_TEST_DATA names no folder of real speech")
    return Path(folder)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Checkout of ParaSpeechCLAP, named by FASTCLAP_REFERENCE; skips where it is not set."""
    folder = os.environ.get("FASTCLAP_REFERENCE")
    if not folder:
        pytest.skip("FASTCLAP_REFERENCE names no checkout of ParaSpeechCLAP")
    return Path(folder)


@pytest.fixture(scope="session")
def icefall() -> SimpleNamespace:
    """Modules of CLSP's published training, in a checkout named by FASTCLAP_ICEFALL; skips where it is not set."""
    folder = os.environ.get("FASTCLAP_ICEFALL")
    if not folder:
        pytest.skip("FASTCLAP_ICEFALL names no checkout of yfyeung/icefall, branch clsp")
    from bench.icefall import load

    return load(folder)
