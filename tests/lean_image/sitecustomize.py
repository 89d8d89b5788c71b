"""Makes an interpreter that has everything see what an image with torch and without audio packages sees.

Python imports a module of this name as it starts, so the folder only has to come first on PYTHONPATH, and processes
that the command starts inherit it. From the root of the project:

    PYTHONPATH=tests/lean_image:. .venv/bin/python -m bench.gpu --dry-run

The packages of `ABSENT` are then not found: importing one raises ModuleNotFoundError, ``importlib.util.find_spec``
returns None and ``importlib.metadata`` knows no version, as it is where pip has never installed them. (A finder that
raises an error would do only the first, and break everyone who asks with find_spec.)
"""

from __future__ import annotations

import importlib.metadata
from importlib.machinery import ModuleSpec, PathFinder
from types import MethodType
from typing import Any

# Modules, and where it differs the name of the distribution: what reads audio files, parses flags or tracks runs, and
# every peer that the benchmarks know.
ABSENT = {
    *("soundfile", "_soundfile", "soxr", "cffi", "_cffi_backend", "pycparser", "librosa", "audioread", "pooch"),
    *(
        "decorator",
        "tyro",
        "docstring_parser",
        "typeguard",
        "datasets",
        "dill",
        "multiprocess",
        "xxhash",
        "tensorboard",
    ),
    *("wandb", "peft", "faiss", "mteb", "open_clip", "open_clip_torch", "ftfy", "inf_cl", "memeff", "siglip_kernel"),
    *("quack", "quack_kernels", "cut_cross_entropy", "liger_kernel", "flashmel", "lhotse", "nnaudio", "torchlibrosa"),
    *("kaldifeat", "kaldi_native_fbank", "laion_clap", "sentence_transformers", "grad_cache", "torchcodec"),
}

_find_spec = PathFinder.find_spec
_find_distributions = importlib.metadata.MetadataPathFinder.find_distributions


def _is_absent(name: str) -> bool:
    return name.partition(".")[0].lower().replace("-", "_") in ABSENT


def find_spec(_: type, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
    return None if _is_absent(fullname) else _find_spec(fullname, path, target)


def find_distributions(*context: importlib.metadata.DistributionFinder.Context) -> Any:
    found = _find_distributions(*context)
    return (distribution for distribution in found if not _is_absent(distribution.metadata["Name"]))


# Bound, as it was: pytest keeps it as an attribute of a class of its own.
PathFinder.find_spec = MethodType(find_spec, PathFinder)  # type: ignore[method-assign,assignment]
importlib.metadata.MetadataPathFinder.find_distributions = staticmethod(find_distributions)  # type: ignore[method-assign,assignment]
