"""Reading small text files, JSON, YAML and TOML: one door, whose errors name the file and the place in it.

Python's parsers answer some texts with errors that are none of theirs: a RecursionError for deep nesting, a plain
ValueError for an integer of thousands of digits, a UnicodeDecodeError without the file's name. And JSON may hold half
of a character (`"\\ud800"`), which fails much later, when it is shown or tokenized. Here each of these is an error of
the caller's kind.
"""

from __future__ import annotations

import json
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastclap.console import printable
from fastclap.errors import DataError, FastclapError

MAX_BYTES = 64 << 20
"""Largest file that is read as a whole: descriptions, prompts and configurations are far smaller."""

_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def read_bytes(path: str | Path, error: type[FastclapError] = DataError, *, limit: int = MAX_BYTES) -> bytes:
    """A whole file.

    Args:
        path: of a regular file.
        error: what to raise.
        limit: bytes that it may have.

    Raises:
        FastclapError: of the type `error`: it cannot be read, is no regular file, or is larger than `limit`.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path}: is {kind_of_file(status.st_mode)}, not a file; name a file")
        if status.st_size > limit:
            raise error(f"{path}: has {status.st_size} bytes; a file of this kind has at most {limit}")
        return Path(path).read_bytes()
    except (OSError, ValueError) as cause:  # ValueError: a path with a zero byte
        if isinstance(cause, FastclapError):
            raise
        reason = getattr(cause, "strerror", None) or cause
        raise error(f"{printable(str(path))}: cannot be read ({reason})") from cause


def read_text(path: str | Path, error: type[FastclapError] = DataError, *, limit: int = MAX_BYTES) -> str:
    """A whole UTF-8 file, without a byte order mark.

    Raises:
        FastclapError: as `read_bytes`, or it is not UTF-8.
    """
    data = read_bytes(path, error, limit=limit)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = data.count(b"\n", 0, cause.start) + 1
        raise error(f"{path}:{line}: not UTF-8 text (byte {data[cause.start]:#04x}); save it as UTF-8") from cause


def read_json(path: str | Path, error: type[FastclapError] = DataError, *, limit: int = MAX_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        FastclapError: as `read_text`, or it is not valid JSON; names file and line.
    """
    return parse_json(read_text(path, error, limit=limit), str(path), error)


def parse_json(text: str | bytes, where: str, error: type[FastclapError] = DataError) -> Any:
    """What a JSON text holds.

    Args:
        text: of one value.
        where: it was read: the subject of the message, such as "FILE:LINE" of a text of one line.
        error: what to raise.

    Raises:
        FastclapError: not valid JSON, nested too deeply, with an integer of thousands of digits or half a character.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as cause:
        hint = "; one object a line is named .jsonl" if cause.msg == "Extra data" and cause.lineno > 1 else ""
        place = f"column {cause.colno}" if cause.lineno == 1 else f"line {cause.lineno}, column {cause.colno}"
        raise error(f"{where}: not valid JSON ({cause.msg} at {place}){hint}") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{where}: not UTF-8 text ({cause.reason} at byte {cause.start}); save it as UTF-8") from cause
    except RecursionError as cause:
        raise error(f"{where}: JSON nested too deeply to be read") from cause
    except ValueError as cause:
        raise error(f"{where}: JSON with an integer of more than {sys.get_int_max_str_digits()} digits") from cause
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if _HALF_CHARACTER.search(text):
        _refuse_half_characters(value, where, error)
    return value


def parse_toml(text: str, where: str, error: type[FastclapError] = DataError) -> dict[str, Any]:
    """What a TOML text holds.

    Raises:
        FastclapError: not valid TOML, nested too deeply, or with an integer of thousands of digits.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return _parsed("TOML", tomllib.loads, text, where, error)


def parse_yaml(text: str, where: str, error: type[FastclapError] = DataError) -> Any:
    """What a YAML text of one document holds, by PyYAML's safe loader with the floats of YAML 1.2 (`1e-4`).

    Raises:
        FastclapError: not valid YAML, nested too deeply, with an alias, or with an integer of thousands of digits.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: int) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines of them describe terabytes
                raise yaml.composer.ComposerError(None, None, "aliases are not read", self.peek_event().start_mark)
            return super().compose_node(parent, index)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+0123456789."),
    )
    return _parsed("YAML", lambda text: yaml.load(text, Loader), text, where, error)


def _parsed(language: str, parse: Callable[[str], Any], text: str, where: str, error: type[FastclapError]) -> Any:
    try:
        value = parse(text)
    except RecursionError as cause:
        raise error(f"{where}: {language} nested too deeply to be read") from cause
    except Exception as cause:  # yaml.YAMLError and TOMLDecodeError, and what their constructors raise of their own
        raise error(f"{where}: not valid {language} ({' '.join(str(cause).split())})") from cause
    _refuse_half_characters(value, where, error)
    return value


def _refuse_half_characters(value: Any, where: str, error: type[FastclapError]) -> None:
    """Refuse a value of JSON in which a string has a lone surrogate, with the place of the first one in it."""
    left = [("", value)]
    while left:
        place, value = left.pop()
        if isinstance(value, str):
            if _LONE_SURROGATE.search(value):
                half = f"{value[:40]!a}" + (f" in {place}" if place else "")
                raise error(f"{where}: holds {half}, half of a character (a lone surrogate); write the whole one")
            continue
        begin = f"{place}, " if place else ""
        if isinstance(value, dict):
            left += [(f"{begin}{key!r}", each) for key, each in value.items()]
            left += [(place, key) for key in value]  # looked at first, so that every place can be shown
        elif isinstance(value, list):
            left += [(f"{begin}item {number}", each) for number, each in enumerate(value, 1)][::-1]


def kind_of_file(mode: int) -> str:
    """What a file is that is no regular one, from its mode."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
