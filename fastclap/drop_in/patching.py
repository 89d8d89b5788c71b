"""`patch`: one line switches a client over to the fused loss or front-end, and back."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

from fastclap.drop_in.grad_cache import (
    _grad_cache_call,
    _grad_cache_distributed_call,
)
from fastclap.drop_in.laion_clap import _laion_forward
from fastclap.drop_in.open_clip import (
    _open_clip_forward,
    _open_clip_sigmoid_forward,
)
from fastclap.drop_in.paraspeechclap import _paraspeech_forward
from fastclap.drop_in.sentence_transformers import (
    _cached_ranking_loss,
    _ranking_loss_from_embeddings,
)
from fastclap.drop_in.shared import (
    Method,
)
from fastclap.drop_in.torchlibrosa import (
    _torchlibrosa_log_mel,
    _torchlibrosa_spectrogram,
)
from fastclap.drop_in.transformers_clap import _clap_model_forward
from fastclap.drop_in.transformers_features import _ast_features, _clap_features, _whisper_features


@dataclass(frozen=True)
class _Client:
    modules: tuple[str, ...]  # where the classes may be; some are the same under two names, some are two copies
    install: str
    methods: Mapping[str, Callable[..., Method]]  # "Class.method" -> maker of the replacement


_CLIENTS = {
    "open_clip": _Client(
        ("open_clip.loss",),
        "pip install open_clip_torch",
        {"ClipLoss.forward": _open_clip_forward, "SigLipLoss.forward": _open_clip_sigmoid_forward},
    ),
    # LAION-CLAP puts its own folder on the path and then imports clap_module as a second copy.
    "laion_clap": _Client(
        ("laion_clap.clap_module.loss", "clap_module.loss"),
        "pip install laion-clap",
        {"ClipLoss.forward": _laion_forward},
    ),
    "paraspeechclap": _Client(
        ("paraspeechclap.loss",),
        "put a checkout of github.com/ajd12342/paraspeechclap on PYTHONPATH",
        {"ClipLoss.forward": _paraspeech_forward},
    ),
    "transformers": _Client(
        ("transformers.models.clap.modeling_clap",),
        "pip install transformers",
        {"ClapModel.forward": _clap_model_forward},
    ),
    "sentence_transformers": _Client(
        ("sentence_transformers.sentence_transformer.losses", "sentence_transformers.losses"),
        "pip install sentence-transformers",
        {
            "MultipleNegativesRankingLoss.compute_loss_from_embeddings": _ranking_loss_from_embeddings,
            "CachedMultipleNegativesRankingLoss.calculate_loss": _cached_ranking_loss,
        },
    ),
    # The name of the repository's package, and of the one on the package index.
    "grad_cache": _Client(
        ("grad_cache.loss", "gradcache.loss"),
        "pip install git+https://github.com/luyug/GradCache",
        {
            "SimpleContrastiveLoss.__call__": _grad_cache_call,
            "DistributedContrastiveLoss.__call__": _grad_cache_distributed_call,
        },
    ),
    "transformers_features": _Client(
        ("transformers",),
        "pip install transformers",
        {
            "WhisperFeatureExtractor._torch_extract_fbank_features": _whisper_features,
            "ClapFeatureExtractor._np_extract_fbank_features": _clap_features,
            "ASTFeatureExtractor._extract_fbank_features": _ast_features,
        },
    ),
    "torchlibrosa": _Client(
        ("torchlibrosa.stft",),
        "pip install torchlibrosa",
        {
            "Spectrogram.forward": _torchlibrosa_spectrogram,
            "LogmelFilterBank.forward": _torchlibrosa_log_mel,
        },
    ),
}


class Patch:
    """What a call of `patch` replaced. A context manager; leaving it undoes the patch.

    Attributes:
        replaced: the methods, "module.Class.method"; empty if an earlier patch of the same client is in place.
    """

    def __init__(self, changes: Sequence[tuple[type, str, Method]]) -> None:
        self._changes = list(changes)

    @property
    def replaced(self) -> tuple[str, ...]:
        return tuple(f"{owner.__module__}.{owner.__name__}.{method}" for owner, method, _ in self._changes)

    def undo(self) -> None:
        """Puts the client's own methods back. A second call does nothing."""
        while self._changes:
            owner, method, original = self._changes.pop()
            setattr(owner, method, original)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Patch({', '.join(self.replaced)})"


def patch(name: str, *, corrected: bool = False) -> Patch:
    """Makes a client package compute its contrastive loss, or its log-mel features, with fastclap, wherever it is used.

    Imports the client. A second call while the first is in effect changes nothing, and neither does its undo.

    Args:
        name: "open_clip", "laion_clap", "paraspeechclap", "transformers", "sentence_transformers" or "grad_cache" for
            the loss, "transformers_features" or "torchlibrosa" for the features.
        corrected: for "transformers", whether to make one of its two text→audio terms audio→text (`ClapModelLoss`).
            All other patches, and this one without it, leave the client's numbers as they are.

    Returns:
        A `Patch`, for ``patch(...).undo()`` or ``with patch(...):``; may be ignored.

    Raises:
        ValueError: there is no such client, or it is patched already with another ``corrected``.
        ModuleNotFoundError: the client is not installed.
        ImportError: the client is of a version without the methods in question.
    """
    if name not in _CLIENTS:
        raise ValueError(f"unknown client {name!r}; there are {', '.join(_CLIENTS)}")
    if corrected and name != "transformers":
        raise ValueError(f"corrected=True is for 'transformers'; {name} needs no correction")
    client, options = _CLIENTS[name], {"corrected": corrected} if name == "transformers" else {}
    modules = [module for module in map(_module, client.modules) if module is not None]
    if not modules:
        raise ModuleNotFoundError(f"{name} is not installed ({client.install})", name=name)
    found: dict[tuple[type, str], Callable[..., Method]] = {}
    for module in modules:
        for target, make in client.methods.items():
            class_name, method = target.split(".")
            owner = getattr(module, class_name, None)
            if owner is None or method not in vars(owner):
                raise ImportError(f"{module.__name__} has no {target}: this version of {name} cannot be patched")
            found[owner, method] = make
    changes = []
    for owner, method in found:
        original = vars(owner)[method]
        earlier = getattr(original, "_fastclap_options", None)
        if earlier is None:
            changes.append((owner, method, original))
        elif earlier != options:
            raise ValueError(f"{name} is patched already with {earlier}; undo that first")
    for owner, method, original in changes:
        replacement: Any = functools.wraps(original)(found[owner, method](owner, original, **options))
        replacement._fastclap_options = options
        setattr(owner, method, replacement)
    return Patch(changes)


def _module(name: str) -> ModuleType | None:
    """The module, or None if it or its package does not exist. Whatever else an import may raise is raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # for old names of modules
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return None
        raise


@functools.cache
def ranking_class(name: str) -> type:
    """sentence-transformers' class, in which only the step from embeddings to loss is replaced."""
    client = _CLIENTS["sentence_transformers"]
    modules = [module for module in map(_module, client.modules) if module is not None]
    if not modules:
        raise ModuleNotFoundError(f"{name} needs sentence-transformers ({client.install})")
    owner = getattr(modules[0], name)
    ((target, make),) = [item for item in client.methods.items() if item[0].startswith(f"{name}.")]
    method = target.split(".")[1]
    original = getattr(owner, method)
    replacement = functools.wraps(original)(make(owner, original))
    return type(name, (owner,), {method: replacement, "__module__": "fastclap.drop_in", "__doc__": owner.__doc__})
