"""Flags of both programs: dataclasses read by tyro, with the ranges of `fastclap.bounds` in their help and checked."""

from __future__ import annotations

import json
import typing
from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

from fastclap.bounds import first_wrong, range_of
from fastclap.errors import ConfigError, required
from fastclap.reading import parse_json

T = TypeVar("T")


def parse_flags(
    cls: type[T], arguments: Sequence[str], *, program: str, description: str, default: T | None = None
) -> T:
    """A dataclass from the words of a command line; exits with status 0 (help) or 2 (mistyped flags) like argparse.

    Free-form mappings are given as JSON.

    Args:
        cls: its fields are the flags, their docstrings the help.
        arguments: words after the program's name.
        program: that name.
        description: above the flags, in the help.
        default: the values of flags that are not given; None: those of the class.

    Raises:
        ConfigError: a number is out of its range.
        MissingPackageError: tyro is not installed.
    """
    tyro = required("tyro", "reading flags")
    show_ranges(cls)
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def json_mapping(info: Any) -> Any:
        if info.type not in (dict[str, Any], dict[str, Any] | None):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda words: mapping(words[0]),
            is_instance=lambda value: value is None or isinstance(value, dict),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    def mapping(word: str) -> dict[str, Any]:
        value = parse_json(word, "the value")  # a ValueError becomes tyro's message
        if not isinstance(value, dict):
            raise ValueError(f"{word} is no mapping")
        return value

    given = {} if default is None else {"default": default}
    flags: T = tyro.cli(
        cls,
        args=arguments,
        prog=program,
        description=description,
        registry=registry,
        config=(tyro.conf.FlagCreatePairsOff,) if default is None else (),  # a recipe's switches can be turned off
        **given,
    )
    if (wrong := first_wrong(flags)) is not None:
        raise ConfigError(wrong.as_flag)
    return flags


def show_ranges(cls: type) -> None:
    """Let tyro's help of a dataclass, and of those within it, say the range of each number behind its default."""
    import tyro

    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        extras = getattr(hint, "__metadata__", ())
        if is_dataclass(hint):
            show_ranges(typing.cast(type, hint))
        elif (allowed := range_of(hint)) and not any(getattr(each, "help_behavior_hint", None) for each in extras):
            told = partial("(default: {1}; {0})".format, allowed.short)
            cls.__annotations__[name] = Annotated[hint, tyro.conf.arg(help_behavior_hint=told)]
