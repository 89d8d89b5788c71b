"""What this machine and this installation can do, found out without assuming that anything is installed.

Every check is allowed to fail: a broken package is reported with the reason, not as a traceback, because broken
installations are what this is for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from typing import Any

NEEDED = (
    *("torch", "transformers", "tokenizers", "safetensors", "einops", "numpy", "scipy", "soundfile", "soxr"),
    *("datasets", "pyarrow", "scikit-learn", "rich", "tyro", "PyYAML", "matplotlib", "huggingface_hub"),
)
OPTIONAL = ("triton", "torchaudio", "nvidia-ml-py", "tensorboard", "wandb")
NATIVE = ("torch", "triton", "torchaudio", "tokenizers", "soundfile", "soxr")  # installed is not yet loadable
FORMATS = ("WAV", "FLAC", "OGG", "MP3")
MINIMUM_TORCH = (2, 9)


def diagnose() -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Findings by group (system, packages, gpu, engines, audio), all JSON-able, and the problems to be solved."""
    problems: list[str] = []
    packages: dict[str, str] = {}
    modules: dict[str, Any] = {}
    for name in (*NEEDED, *OPTIONAL):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "missing" if name in NEEDED else "not installed (optional)"
            if name in NEEDED:
                problems.append(f"{name} is missing: pip install {name}")
            continue
        if name in NATIVE:
            try:
                modules[name] = importlib.import_module(name)
            except Exception as error:  # a broken binary fails in many ways
                first_line = next(iter(str(error).strip().splitlines()), "")
                reason = f"{type(error).__name__}: {first_line}"
                packages[name] += f", does not load ({reason})"
                if name in NEEDED:
                    problems.append(f"{name} does not load ({reason}): install it again")
    torch = modules.get("torch")
    if torch is not None and tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        problems.append(f"torch {torch.__version__} is too old: fastclap needs {'.'.join(map(str, MINIMUM_TORCH))}")

    gpu = _gpu(torch)
    audio = _audio(modules.get("soundfile"))
    missing = [name for name in FORMATS if "soundfile" in modules and name not in audio["formats"]]
    if missing:
        problems.append(f"libsndfile {audio['libsndfile']} reads no {', '.join(missing)}: pip install -U soundfile")
    return {
        "system": _system(torch),
        "packages": packages,
        "gpu": gpu,
        "engines": _engines(torch),
        "audio": audio,
    }, problems


def _system(torch: Any) -> dict[str, Any]:
    import fastclap

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "fastclap": fastclap.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "CPU cores": cores,
        "torch threads": torch.get_num_threads() if torch is not None else None,
    }


def _gpu(torch: Any) -> dict[str, Any]:
    if torch is None:
        return {"devices": [], "CUDA of torch": None}
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            capability = f"compute capability {device.major}.{device.minor}"
            devices.append(f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {capability}")
    return {"devices": devices, "CUDA of torch": torch.version.cuda or torch.version.hip}


def _engines(torch: Any) -> dict[str, str]:
    if torch is None:
        return dict.fromkeys(("torch", "native log-mel", "CUDA log-mel"), "no: torch does not load")
    from fastclap.kernels.log_mel import native

    return {
        "torch": "yes",
        "native log-mel": f"{'yes' if native.available() else 'no'}: {native.description()}",
        "CUDA log-mel": _cuda_log_mel(torch),
    }


def _cuda_log_mel(torch: Any) -> str:
    from fastclap.files import cache_folder
    from fastclap.kernels import cuda_tools

    if not torch.cuda.is_available():
        return "no: there is no GPU"
    try:
        return f"yes: compiled by NVRTC {cuda_tools.compiler_version()}, kept in {cache_folder(cuda_tools.KIND)}"
    except RuntimeError as error:  # no compiler, or no home
        return f"no: {error}"


def _audio(soundfile: Any) -> dict[str, Any]:
    if soundfile is None:
        return {"libsndfile": None, "formats": []}
    return {"libsndfile": soundfile.__libsndfile_version__, "formats": sorted(soundfile.available_formats())}
