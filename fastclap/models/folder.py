"""The model folder: finding one by path, run or hub id, reading it without running code, writing it whole.

A folder holds `config.json`, `model.safetensors`, `tokenizer.json` if the model reads text, and the model card
`README.md`. Checkpoints of other codes are found here too and read in `fastclap.models.foreign`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastclap.config import FORMAT_VERSION, CLAPConfig
from fastclap.console import printable
from fastclap.errors import ConfigError, ModelError
from fastclap.files import fsync
from fastclap.models.tokenizer import TOKENIZER_FILE, Tokenizer, as_tokenizer
from fastclap.reading import read_json, read_text

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
FROZEN_FILE = "frozen.safetensors"  # in a run folder: the tensors that all of its checkpoints share
FROZEN_NOTE = "frozen.json"  # in a checkpoint: the size and fingerprint of that file
_MODEL_FILES = {CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, CARD_FILE}
FOREIGN_TYPES = frozenset({"clap", "clsp", "pe_audio", "pe_audio_video", "voiceclap-small"})
"""`model_type` in the config.json of folders that `fastclap.models.foreign` reads."""
_WEIGHTS = ["*.safetensors", "*.bin", "*.pt"]
# of transformers' CLAP (its tokenizer) and of ParaSpeechCLAP
_FOREIGN_FILES = {"tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "*.pth.tar"}


@dataclass
class SavedModel:
    """What a model folder or a checkpoint of another code holds: all that a model is built from.

    Attributes:
        config: the architecture.
        weights: the state dict.
        tokenizer: of the text tower, if there is one.
        config_file, weights_file: what to name where the configuration or the weights do not fit.
        card: text of the model card, if there is one.
        origin: of a checkpoint of another code, the sentence about it for a new model card.
    """

    config: CLAPConfig
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer | None
    config_file: Path
    weights_file: Path
    card: str | None = None
    origin: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# finding


def find_model(path: str | os.PathLike[str]) -> Path:
    """What holds the weights: the folder of an export or of a run's checkpoint, or a checkpoint of another code.

    Raises:
        ModelError: there is none, or there are several.
    """
    folder = _existing(path) or _download(os.fspath(path))
    if is_foreign(folder):
        return folder
    archives = sorted(folder.glob("*.pth.tar"))
    if archives and not isinstance(format_of(folder), int):
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


def _existing(path: str | os.PathLike[str]) -> Path | None:
    """The file or folder of this name, None if there is none.

    Raises:
        ModelError: it is no name.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ModelError(f"{path!r} names no model; give a folder, a file, or a hub id")
    found = Path(path)
    try:
        return found if found.exists() else None
    except (OSError, ValueError) as error:  # a zero byte, or too long
        raise ModelError(f"{printable(str(path))}: no such model folder ({error})") from error


def find_weights_file(path: str | os.PathLike[str]) -> Path:
    """A file of weights: the path itself, that of a folder, or either on the hub (owner/name, owner/name/file).

    Raises:
        ModelError: there is none, or there are several.
    """
    found = _existing(path)
    if found is None:
        found = _download(os.fspath(path), [WEIGHTS_FILE])
        if not found.is_file() and not (found / WEIGHTS_FILE).exists():
            found = _download(os.fspath(path), _WEIGHTS)
    if found.is_file():
        return found
    for name in (WEIGHTS_FILE, "pytorch_model.bin"):
        if (found / name).is_file():
            return found / name
    files = sorted(file for pattern in _WEIGHTS for file in found.glob(pattern))
    if len(files) != 1:
        what = (
            f"name one of {', '.join(file.name for file in files)}" if files else f"no weights ({', '.join(_WEIGHTS)})"
        )
        raise ModelError(f"{path}: {what}")
    return files[0]


def is_foreign(path: Path) -> bool:
    """Whether this is a checkpoint that `fastclap.models.foreign` reads: a weights file, or a transformers folder."""
    return path.is_file() or format_of(path) in FOREIGN_TYPES


def format_of(folder: Path) -> str | int | None:
    """Format version of an export, model type of a transformers folder, None without a readable configuration."""
    if not (folder / CONFIG_FILE).is_file():
        return None
    try:
        data = read_json(folder / CONFIG_FILE, ModelError)
    except ModelError:
        return None
    if not isinstance(data, dict):
        return None
    if "modeling_clsp." in str(data.get("auto_map")):  # whatever CLSP's code calls its type
        return "clsp"
    found = data.get("format_version", data.get("model_type"))
    return found if type(found) in (int, str) else None


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_model(folder: Path, tokenizer: Tokenizer | str | os.PathLike[str] | None = None) -> SavedModel:
    """The contents of a model folder.

    Args:
        folder: as found by `find_model`.
        tokenizer: to take instead of the folder's own: a loaded one, or the folder or hub id of one.

    Raises:
        ModelError: a file is missing, damaged, or of another format.
    """
    config = _read_config(folder / CONFIG_FILE)
    if tokenizer is not None:
        tokenizer = as_tokenizer(tokenizer)
    elif (folder / TOKENIZER_FILE).exists():
        tokenizer = Tokenizer.load(folder)
    weights = _names_of_today(load_weights(folder))
    text = None
    if (folder / CARD_FILE).is_file():
        with contextlib.suppress(ModelError):  # a card that is no text is none: a new one is written
            text = read_text(folder / CARD_FILE, ModelError)
    return SavedModel(config, weights, tokenizer, folder / CONFIG_FILE, folder / WEIGHTS_FILE, text)


def _read_config(path: Path) -> CLAPConfig:
    if not path.exists():
        raise ModelError(f"{path}: missing; this is not an exported model")
    data = read_json(path, ModelError)
    version = data.pop("format_version", None) if isinstance(data, dict) else None
    if type(version) is not int or version not in (1, FORMAT_VERSION):
        raise ModelError(
            f"{path}: format version {version!r:.40}, this fastclap reads 1 to {FORMAT_VERSION}; "
            "the file is not a fastclap model or needs another release"
        )
    for part, kind in (("audio", "log-mel"), ("text", "small")):  # an earlier release wrote what had no meaning
        if isinstance(data.get(part), dict) and data[part].get("kind", kind) == kind:
            data[part].pop("pretrained", None)
    try:
        return CLAPConfig.from_dict(_from_version_1(data) if version == 1 else data)
    except ConfigError as error:
        raise ModelError(f"{path}: {error}") from error


def _from_version_1(data: Any) -> Any:
    """A configuration of format version 1 in today's fields."""
    if not isinstance(data.get("audio"), dict):
        return data
    audio = dict(data["audio"])
    if audio.pop("layer_weights", False):
        audio["hidden_states"] = "weighted"
    if audio.get("kind", "log-mel") != "log-mel":
        audio.pop("pooling", None)  # it had no meaning
    return {**data, "audio": audio}


_RENAMED = {"audio_branch.layer_weights": "audio_branch.pooling.layer_weights"}
_RENAMED["audio_branch.attention.weight"] = "audio_branch.pooling.attention"


def _names_of_today(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that they have since format version 2; a bias that no softmax sees is left out."""
    weights.pop("audio_branch.attention.bias", None)
    return {_RENAMED.get(name, name): tensor for name, tensor in weights.items()}


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The state dict of a model folder; of a checkpoint, with what its run keeps once for all checkpoints.

    Raises:
        ModelError: a file is missing or damaged, or the shared one is not that of this checkpoint.
    """
    weights = load_state_dict_file(folder / WEIGHTS_FILE)
    shared = find_frozen(folder, verify=True)
    return weights if shared is None else {**load_state_dict_file(shared), **weights}


def find_frozen(folder: Path, *, verify: bool) -> Path | None:
    """The file of the tensors that a checkpoint shares with the others of its run; None: it holds all by itself.

    Args:
        folder: of the checkpoint, in `checkpoints` of a run folder.
        verify: read the file to compare its fingerprint, and not its size alone.

    Raises:
        ModelError: the file is missing, or another one.
    """
    note = folder / FROZEN_NOTE
    if not note.is_file():
        return None
    path = folder.resolve().parent.parent / FROZEN_FILE
    try:
        wanted = read_json(note, ModelError)
        found = fingerprint(path) if verify else {"bytes": path.stat().st_size}
        if found == {name: wanted[name] for name in found}:
            return path
        what = f"damaged or exchanged ({found}, but {wanted} were written)"
    except FileNotFoundError:
        what = "missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"not to be compared with {note} ({error})"
    raise ModelError(
        f"{path}: {what}. It holds the tensors that training does not change, and {folder} the others: put it back "
        f"from a copy of the run. A model that the run has exported ({path.parent / 'model'} or best) does not need it"
    )


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and BLAKE2b digest of a file."""
    digest = hashlib.blake2b(digest_size=32)
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}


def load_state_dict_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file or of a file that `torch.save` wrote, on the CPU.

    A torch file is read with `weights_only=True`: a pickle that would run code is refused, and none of it is run. Plain
    numbers of NumPy and paths are let through, because training codes keep a loss or a folder with the weights. A state
    dict under the key `state_dict`, `model` or `model_state_dict` is unwrapped.

    Raises:
        ModelError: the file is missing, damaged, not a state dict, or a pickle that does more than hold tensors.
    """
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such weights file")
    try:
        with open(path, "rb") as file:
            head = file.read(24)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: a pointer of Git LFS, not the weights; fetch them with `git lfs pull`")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # safetensors raises errors of its own, torch others for types that it lacks
            size = path.stat().st_size
            raise ModelError(f"{path}: truncated or damaged ({error}; {size} bytes); copy or save it again") from error
    if head and not head.startswith((b"PK", b"\x80")):  # a zip file, a pickle
        raise ModelError(f"{path}: no torch file: it begins with {head[:8]!r}; give a checkpoint, or its folder")
    try:
        with torch.serialization.safe_globals([*_numpy_numbers(), *_paths()]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: refused, because it is damaged or its pickle asks to run code instead of holding tensors only; "
            "nothing of it was run. Ask its author for a safetensors file"
        ) from error
    except Exception as error:  # unpickling what is damaged ends in errors of any kind
        raise ModelError(f"{path}: not a readable torch file ({error}); copy or save it again") from error
    for wrapping in ("state_dict", "model", "model_state_dict"):
        if isinstance(data, Mapping) and isinstance(data.get(wrapping), Mapping):
            data = data[wrapping]
    named = isinstance(data, Mapping) and all(isinstance(name, str) for name in data)
    if not named or not all(isinstance(value, Tensor) for value in data.values()):
        raise ModelError(f"{path}: holds no state dict (a mapping from names to tensors)")
    return dict(data)


def check_index(folder: Path) -> None:
    """Check that the index of weights in several files names files of its own folder, before transformers reads them.

    Raises:
        ModelError: it names another one, or one that is missing, or is damaged.
    """
    for path in sorted(folder.glob("*.index.json")):
        data = read_json(path, ModelError)
        files = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise ModelError(f"{path}: no index of weights (weight_map, from names to files); copy it again")
        for name in sorted(set(files.values())):
            if name != os.path.basename(name) or name in ("", ".", ".."):
                raise ModelError(f"{path}: names {name!r}, which is not a file of its folder; do not use this model")
            if not (folder / name).is_file():
                raise ModelError(f"{folder / name}: missing; {path.name} names it: copy it along")


def _numpy_numbers() -> list[Any]:
    """What the unpickling of a NumPy number calls: it makes a number from bytes and does nothing else."""
    scalar = np.float64(0).__reduce__()[0]  # NumPy 1 and 2 pickle it under different names
    kinds = [type(np.dtype(kind)) for kind in ("?", "i4", "i8", "f4", "f8")]
    return [np.dtype, *kinds, *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]


def _paths() -> list[Any]:
    """What the unpickling of a path calls, which touches no file: Python 3.13 pickles it under another name."""
    names = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    return [(PurePosixPath, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name in names]


def check_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Compare names and shapes with the model's, so that the error for a checkpoint of another model says what differs.

    Raises:
        ModelError: a tensor is missing, left over or of another shape or kind of number.
    """
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not part of the model" for name in weights if name not in expected]
    problems += [
        f"{name} has the shape {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    problems += [
        f"{name} is of type {weights[name].dtype} instead of {tensor.dtype}"
        for name, tensor in expected.items()
        if name in weights and tensor.is_floating_point() and not weights[name].is_floating_point()
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(f"{path}: not the weights of this configuration: {'; '.join(problems[:5])}{more}")


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write_model(
    folder: Path, config: CLAPConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer | None, card: str
) -> None:
    """Write a model folder. An earlier export of the same name is replaced; a crash leaves no half of either.

    Raises:
        ModelError: `folder` holds files that are not a model's.
        OSError: the disk is full or the place is not writable; nothing is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    names = {item.name for item in folder.iterdir()} if folder.is_dir() else set()
    # without a model next to it, a README is somebody's own
    others = names - (_MODEL_FILES if CONFIG_FILE in names else _MODEL_FILES - {CARD_FILE})
    if others or (folder.exists() and not folder.is_dir()):
        what = f"holds other files ({', '.join(sorted(others)[:3])})" if others else "is a file"
        raise ModelError(f"{folder} {what}; save the model to a folder of its own")
    with replacing_folder(folder) as temporary:
        fields = {"format_version": FORMAT_VERSION, **config.to_dict()}
        (temporary / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        try:
            save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(errno.EIO, f"cannot be written ({error})", os.fspath(folder / WEIGHTS_FILE)) from error
        if tokenizer is not None:
            tokenizer.save(temporary / TOKENIZER_FILE)
        (temporary / CARD_FILE).write_text(card, encoding="utf-8")


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to; it is then flushed to the disk and renamed to `folder`, or removed after an error.

    Raises:
        OSError: it cannot be written; names `folder` where Python names no file.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # fixed names, so that the next save clears what a killed one has left behind
    temporary, old = (folder.parent / f".{folder.name.lstrip('.')}.{end}" for end in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for item in (*temporary.iterdir(), temporary):
            fsync(item)
        if folder.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            folder.replace(old)
        temporary.replace(folder)
        fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # a full disk has no name
            error.filename = os.fspath(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# the hub


def is_hub_id(name: str) -> bool:
    """Whether this has the form `owner/name`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _download(name: str, patterns: list[str] | None = None) -> Path:
    """A file, or a folder with the files of a model or those of the patterns."""
    file = re.fullmatch(r"([\w.-]+/[\w.-]+)/([\w./-]+\.(?:pth|pt|bin|safetensors|tar))", name)
    if not is_hub_id(name) and file is None:
        raise ModelError(f"{name}: no such model folder")
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file is not None:
            return Path(hf_hub_download(file[1], file[2]))
        folder = Path(snapshot_download(name, allow_patterns=patterns or sorted(_MODEL_FILES | _FOREIGN_FILES)))
        if patterns is None and format_of(folder) in FOREIGN_TYPES and not (folder / WEIGHTS_FILE).exists():
            snapshot_download(name, allow_patterns=["pytorch_model*", "model*.safetensors*"])
        return folder
    except Exception as error:  # every failure of the network, the hub or the name ends here
        raise ModelError(f"{name}: no such folder or file, and it cannot be fetched from the hub ({error})") from error


def upload(folder: Path, repo_id: str, *, private: bool | None, token: str | None, commit_message: str) -> str:
    """Upload a folder to the Hugging Face hub, to a repository that is made if it does not exist.

    Returns:
        Address of the commit.

    Raises:
        ModelError: the hub refused.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    except Exception as error:  # every failure of the network, the hub or the account ends here
        raise ModelError(
            f"{repo_id}: could not be uploaded ({error}); log in with `hf auth login` or pass a token that may "
            "write there"
        ) from error
    return str(commit.commit_url)
