"""The best validation of a run by one figure: whose model is kept, and when there is no hope of a better one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from operator import getitem
from typing import Any

from fastclap.errors import ConfigError
from fastclap.train.config import ValidConfig

_RETRIEVAL = ("R@1", "R@5", "R@10", "mAP@10", "median_rank", "mean_rank")
_CLASSIFICATION = ("accuracy", "uar", "macro_f1")
_LESS_IS_BETTER = ("median_rank", "mean_rank")


def comparable_figures(captions: Iterable[str], columns: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Where each figure by which validations can be compared stands in them, by the name that trackers give it.

    Args:
        captions: sets of captions that are retrieved with.
        columns: that are classified.
    """
    ways = [("retrieval", name, way) for name in captions for way in ("audio_to_text", "text_to_audio")]
    paths: list[tuple[str, ...]] = [(*way, figure) for way in ways for figure in _RETRIEVAL]
    paths += [("classification", column, figure) for column in columns for figure in _CLASSIFICATION]
    return {"/".join(path): path for path in paths}


class Best:
    """Compares the validations of a run, alike on every rank.

    Args:
        config: names the figure, and how many validations without a better one are waited for.
        figures: that a validation has, as `comparable_figures` returns them.
        saved: `state` of the run to continue; it is taken over if it is of the same figure.

    Attributes:
        step, value: of the best validation so far; None before the first.
        waited: validations since then.

    Raises:
        ConfigError: a validation has no such figure.
    """

    def __init__(
        self, config: ValidConfig, figures: Mapping[str, tuple[str, ...]], saved: dict[str, Any] | None
    ) -> None:
        self.name, self._patience = config.best, config.patience
        if self.name is not None and self.name not in figures:
            raise ConfigError(
                f"--valid.best {self.name} is no figure of this validation; choose one of: {', '.join(figures)}"
            )
        self._path = figures[self.name] if self.name is not None else ()
        known = saved if saved is not None and saved["name"] == self.name else {}
        self.step: int | None = known.get("step")
        self.value: float | None = known.get("value")
        self.waited: int = known.get("waited", 0)

    def is_beaten(self, step: int, validation: Mapping[str, Any]) -> bool:
        """Whether the validation after this step is better than all before it (the first is), which is then known."""
        if self.name is None:
            return False
        value: Any = reduce(getitem, self._path, validation)
        sign = -1 if self._path[-1] in _LESS_IS_BETTER else 1
        if self.value is None or sign * value > sign * self.value:
            self.step, self.value, self.waited = step, value, 0
            return True
        self.waited += 1
        return False

    @property
    def out_of_patience(self) -> bool:
        """Whether the run stops, because no validation of the last `patience` was better."""
        return 0 < self._patience <= self.waited

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"name": self.name, "step": self.step, "value": self.value, "waited": self.waited}

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4f} at step {self.step}"
