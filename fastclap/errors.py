"""The errors a user can cause, told apart from the ones only a maintainer can.

Command lines print these in one line and exit with status 2; anything else keeps its traceback.
"""

from __future__ import annotations


class FastclapError(Exception):
    """Base of every error whose message is written for the user."""


class DataError(FastclapError, ValueError):
    """A manifest, an audio file or a caption is unusable. The message names the file, the row and the remedy."""


class ConfigError(FastclapError, ValueError):
    """A recipe, a flag or a configuration file asks for something impossible."""


class ModelError(FastclapError, ValueError):
    """A model folder or checkpoint is missing, damaged or of another architecture."""


class TrainingError(FastclapError, RuntimeError):
    """Training stopped by itself: too many non-finite steps, a failed save, a rank that disagrees."""
