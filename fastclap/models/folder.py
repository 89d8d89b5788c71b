"""Model folders, run folders and hub ids: finding them, and reading weights without running anything."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastclap.config import FORMAT_VERSION, CLAPConfig
from fastclap.errors import ConfigError, ModelError
from fastclap.models.tokenizer import TOKENIZER_FILE

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
_MODEL_FILES = {CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, CARD_FILE}


@contextlib.contextmanager
def without_initialisation() -> Iterator[None]:
    """Parameters made within keep what the memory holds, until weights are read into all of them.

    Drawing 600 million random numbers to overwrite them takes ten times as long as reading the weights. What is left of
    the drawing does not advance torch's generator.
    """
    with torch.random.fork_rng(devices=[]), _WithoutInitialisation():
        yield


class _WithoutInitialisation(TorchFunctionMode):
    # by name: tensors' methods, the functions of torch.nn.init, and those that transformers puts in their place
    _DRAWS = frozenset(
        f"{name}_"
        for name in ("normal", "uniform", "trunc_normal", "kaiming_normal", "kaiming_uniform", "xavier_uniform")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(target, nn.Parameter) and getattr(func, "__name__", None) in self._DRAWS:
            return target
        return func(*args, **kwargs)


def load_state_dict_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file or of a file that ``torch.save`` wrote, on the CPU.

    A torch file is read with ``weights_only=True``: a pickle that would run code is refused, and none of it is run; of
    NumPy, plain numbers are let through, because training codes keep a loss or an epoch beside the weights. A state
    dict under the key ``state_dict``, ``model`` or ``model_state_dict`` is taken out of its wrapping.

    Raises:
        ModelError: the file is missing, damaged, not a state dict, or a pickle that does more than hold tensors.
    """
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            raise ModelError(f"{path}: truncated or damaged ({error}; {size} bytes); copy or save it again") from error
    try:
        with torch.serialization.safe_globals(_numpy_numbers()):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: refused, because it is damaged or its pickle asks to run code instead of holding tensors only; "
            "nothing of it was run. Ask its author for a safetensors file"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: not a readable torch file ({error}); copy or save it again") from error
    for wrapping in ("state_dict", "model", "model_state_dict"):
        if isinstance(data, Mapping) and isinstance(data.get(wrapping), Mapping):
            data = data[wrapping]
    if not isinstance(data, Mapping) or not all(isinstance(value, Tensor) for value in data.values()):
        raise ModelError(f"{path}: holds no state dict (a mapping from names to tensors)")
    return dict(data)


def _numpy_numbers() -> list[Any]:
    """What the unpickling of a NumPy number calls: it makes a number of bytes and nothing else."""
    scalar = np.float64(0).__reduce__()[0]  # NumPy 1 and 2 pickle it under different names
    kinds = [type(np.dtype(kind)) for kind in ("?", "i4", "i8", "f4", "f8")]
    return [np.dtype, *kinds, *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]


def find_model(path: str | os.PathLike[str]) -> Path:
    """What holds the weights: the folder of an export or of a run's checkpoint, or a foreign checkpoint."""
    folder = Path(path)
    if not folder.exists():
        folder = _download(os.fspath(path))
    if folder.is_file() or is_foreign(folder):
        return folder
    archives = sorted(folder.glob("*.pth.tar"))
    if archives and not isinstance(_format_of(folder), int):
        if len(archives) > 1:
            raise ModelError(f"{folder}: name one of {', '.join(item.name for item in archives)}")
        return archives[0]
    if (folder / CONFIG_FILE).is_file():
        return folder
    steps = {
        int(match[1]): item
        for item in folder.glob("checkpoints/step-*")
        if (match := re.fullmatch(r"step-(\d+)", item.name)) and (item / WEIGHTS_FILE).is_file()
    }
    if not steps:
        raise ModelError(f"{folder}: neither an exported model ({CONFIG_FILE}) nor a run with a complete checkpoint")
    return steps[max(steps)]


def is_foreign(path: Path) -> bool:
    """Whether this is a checkpoint that `models.foreign` reads: a weights file, or a transformers CLAP."""
    return path.is_file() or _format_of(path) == "clap"


def _format_of(folder: Path) -> str | int | None:
    """Format version of an export, model type of a transformers folder, None without a readable configuration."""
    try:
        data = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data.get("format_version", data.get("model_type")) if isinstance(data, dict) else None


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


# of transformers' CLAP (its tokenizer) and of ParaSpeechCLAP
_FOREIGN_FILES = {"tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "*.pth.tar"}


def _download(name: str) -> Path:
    if not _is_hub_id(name):
        raise ModelError(f"{name}: no such model folder")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=sorted(_MODEL_FILES | _FOREIGN_FILES)))
        if _format_of(folder) == "clap" and not (folder / WEIGHTS_FILE).exists():
            snapshot_download(name, allow_patterns=["pytorch_model*", "model*.safetensors*"])
        return folder
    except Exception as error:  # every failure of the network, the hub or the name ends here
        raise ModelError(f"{name}: no such folder, and it cannot be fetched from the hub ({error})") from error


def _read_config(path: Path) -> CLAPConfig:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: missing; this is not an exported model") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); export the model again") from error
    version = data.pop("format_version", None) if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{path}: format version {version}, this fastclap reads {FORMAT_VERSION}; "
            "the file is not a fastclap model or needs another release"
        )
    try:
        return CLAPConfig.from_dict(data)
    except ConfigError as error:
        raise ModelError(f"{path}: {error}") from error


def check_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Compare names and shapes, so that a checkpoint of another model says what differs."""
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not part of the model" for name in weights if name not in expected]
    problems += [
        f"{name} has the shape {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(f"{path}: not the weights of this configuration: {'; '.join(problems[:5])}{more}")
