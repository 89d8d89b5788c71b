"""From manifests to batches: rows, their order, decoding, packed folders, and the embedded demo voices."""

from __future__ import annotations

from fastclap.data.dataset import BadClip, Batch, ClipDataset, Quarantine, eval_batches, make_loader
from fastclap.data.manifest import load_manifest
from fastclap.data.rows import Manifest, Row, check_column
from fastclap.data.sampler import BatchSampler
from fastclap.data.shards import open_clip
from fastclap.threads import LoaderStopped

__all__ = [
    "BadClip",
    "Batch",
    "BatchSampler",
    "ClipDataset",
    "LoaderStopped",
    "Manifest",
    "Quarantine",
    "Row",
    "check_column",
    "eval_batches",
    "load_manifest",
    "make_loader",
    "open_clip",
]
