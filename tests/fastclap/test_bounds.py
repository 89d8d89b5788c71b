"""Ranges beside fields: what is in them, how they read, and that every number of the configurations has one."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Annotated, Any

import pytest

from fastclap.bounds import FINITE, Range, first_wrong, range_of
from fastclap.config import CLAPConfig
from fastclap.train.config import TrainConfig


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "words"),
    [
        (FINITE, [-1e308, 0, 5], [math.inf, -math.inf, math.nan, 10**400], "finite"),
        (Range(1), [1, 10**30], [0, -1, math.nan, math.inf, 10**400], "at least 1"),
        (Range(0, without=(0,)), [1e-300], [0, -0.0, -1], "above 0"),
        (Range(high=3), [3, -(10**30)], [3.001], "at most 3"),
        (Range(high=3, without=(3,)), [2.999], [3], "below 3"),
        (Range(0, 1), [0, 1, 0.5], [-1e-9, 1 + 1e-9], "from 0 to 1"),
        (Range(0, 1, without=(1,)), [0], [1], "from 0 to below 1"),
        (Range(0, 1, without=(0,)), [1], [0], "above 0 to 1"),
        (Range(0, 1 << 24), [1 << 24], [(1 << 24) + 1], "from 0 to 16,777,216"),
    ],
)
def test_ranges(allowed: Range, inside: list[float], outside: list[float], words: str) -> None:
    assert all(value in allowed for value in inside) and not any(value in allowed for value in outside)
    assert str(allowed) == words


def test_an_upper_end_that_is_out_of_reach_is_not_in_the_help() -> None:
    assert Range(0, 1 << 24).short == "at least 0" and Range(0, 256).short == "from 0 to 256"


def test_ranges_stand_within_lists_and_unions() -> None:
    assert range_of(list[Annotated[int, Range(1)]] | None) == Range(1) and range_of(int | None) is None


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"optimizer.clip_norm": -1.0}, "--optimizer.clip-norm is -1.0; it must be a number at least 0"),
        ({"optimizer.weight_decay": -1.0}, "--optimizer.weight-decay is -1.0; it must be a number at least 0"),
        ({"optimizer.final_share": -3.0}, "--optimizer.final-share is -3.0; it must be a number from 0 to 1"),
        ({"model.audio.layers": -1}, "--model.audio.layers is -1; it must be a whole number from 0 to 16,777,216"),
        ({"model.text.max_tokens": 0}, "--model.text.max-tokens is 0; it must be a whole number from 3 to 1,048,576"),
        ({"data.probabilities": [0.5, math.nan]}, "--data.probabilities is nan; it must be a number above 0 to 1"),
        ({"chunk_size": -1}, "--chunk-size is -1; it must be a whole number from 0 to 16,777,216"),
        ({"threads": 100_000}, "--threads is 100000; it must be a whole number from 0 to 1,024"),
        ({"loss.guide_margin": math.inf}, "--loss.guide-margin is inf; it must be a finite number"),
        ({"run_dir": "a\0b"}, "--run-dir is a\0b; it must be without zero bytes"),
    ],
)
def test_what_is_wrong_is_said_of_the_flag(change: dict[str, Any], flag: str) -> None:
    config = TrainConfig()
    assert first_wrong(config) is None
    for name, value in change.items():
        *path, last = name.split(".")
        part: Any = config
        for step in path:
            part = getattr(part, step)
        setattr(part, last, value)
    wrong = first_wrong(config)
    assert wrong is not None and wrong.as_flag == flag


def parts(hint: Any) -> typing.Iterator[Any]:
    """A type hint and all that it is made of, but for the values of free-form mappings."""
    yield hint
    for part in typing.get_args(hint):
        yield from parts(part)


def numbers(cls: type, path: str = "") -> typing.Iterator[tuple[str, Any]]:
    """Every field with a number in it, and its type hint."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from numbers(typing.cast(type, hint), f"{path}{name}.")
        elif {int, float} & set(parts(hint)):
            yield f"{path}{name}", hint


def test_every_number_of_a_configuration_has_a_range() -> None:
    without = {name for name, hint in numbers(TrainConfig) if range_of(hint) is None}
    assert without == {"loss.guide_margin", "model.init_logit_bias"}  # any finite number
    assert len(list(numbers(CLAPConfig))) > 40
