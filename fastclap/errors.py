"""The errors that a user can cause.

Command lines print these in one line and exit with status 2; any other error keeps its traceback.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

MAX_LISTED = 10  # mistakes in tables that one message lists


class FastclapError(Exception):
    """Base of every error whose message is written for the user."""


class DataError(FastclapError, ValueError):
    """A manifest, an audio file or a caption is unusable. The message names the file, the row and the remedy."""


class ConfigError(FastclapError, ValueError):
    """A recipe, a flag or a configuration file asks for something impossible."""


class ModelError(FastclapError, ValueError):
    """A model folder or checkpoint is missing, damaged or of another architecture."""


class MissingPackageError(FastclapError, ImportError):
    """A package that only some of fastclap needs is not installed. The message says what needs it."""


class TrainingError(FastclapError, RuntimeError):
    """Training stopped by itself: too many non-finite steps, a failed save, a rank that disagrees."""


class TrainingStopped(TrainingError):
    """A signal asked training to stop, and what it had reached was saved. `number` is the signal's."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.number)


def raise_data_errors(messages: Sequence[str]) -> None:
    """One error of several mistakes, of which the first ten are listed; none if there are no messages.

    Raises:
        DataError: there is a message.
    """
    if messages:
        more = f"\n... and {len(messages) - MAX_LISTED} more" if len(messages) > MAX_LISTED else ""
        raise DataError("\n".join(messages[:MAX_LISTED]) + more)


def required(package: str, purpose: str) -> Any:
    """Import a package that only `purpose` needs, and return its module.

    Args:
        package: name of the module, under which pip finds it too.
        purpose: what needs it: the subject of the message.

    Raises:
        MissingPackageError: it cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(f"{purpose} needs {package} ({error}): pip install {package}") from error
