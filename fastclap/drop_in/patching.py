"""`patch`: one line switches a client over to the fused loss or front-end, and back.

A client is a file of this folder that ends in a `Client`, and a name in `CLIENTS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from fastclap.drop_in import (
    grad_cache,
    laion_clap,
    open_clip,
    paraspeechclap,
    sentence_transformers,
    torchlibrosa,
    transformers_clap,
    transformers_features,
)
from fastclap.drop_in.shared import Method

CLIENTS = {
    module.CLIENT.name: module.CLIENT
    for module in (
        open_clip,
        laion_clap,
        paraspeechclap,
        transformers_clap,
        sentence_transformers,
        grad_cache,
        transformers_features,
        torchlibrosa,
    )
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
        A `Patch`, for `patch(...).undo()` or `with patch(...):`; may be ignored.

    Raises:
        ValueError: there is no such client, or it is patched already with another `corrected`.
        ModuleNotFoundError: the client is not installed.
        ImportError: the installed version of the client lacks a method that would be replaced.
    """
    if name not in CLIENTS:
        raise ValueError(f"unknown client {name!r}; there are {', '.join(CLIENTS)}")
    client = CLIENTS[name]
    if corrected and not client.takes_corrected:
        raise ValueError(f"corrected=True is for 'transformers'; {name} needs no correction")
    options = {"corrected": corrected} if client.takes_corrected else {}
    makers: dict[tuple[type, str], Callable[..., Method]] = {}
    for module in client.installed_modules():
        for target, maker in client.methods.items():
            class_name, method = target.split(".")
            owner = getattr(module, class_name, None)
            if owner is None or method not in vars(owner):
                raise ImportError(f"{module.__name__} has no {target}: this version of {name} cannot be patched")
            makers[owner, method] = maker
    changes = []
    for owner, method in makers:
        original = vars(owner)[method]
        earlier = getattr(original, "_fastclap_options", None)
        if earlier is None:
            changes.append((owner, method, original))
        elif earlier != options:
            raise ValueError(f"{name} is patched already with {earlier}; undo that first")
    for owner, method, original in changes:
        replacement: Any = functools.wraps(original)(makers[owner, method](owner, original, **options))
        replacement._fastclap_options = options
        setattr(owner, method, replacement)
    return Patch(changes)
