"""What a value may be: ranges that stand beside the fields of a dataclass, and serve flags, files and Python alike.

`Annotated[float, Range(0, 1)]` is a number from 0 to 1. A number without a range is finite. `first_wrong` finds a field
that breaks this, and `range_of` is what the help of the command lines shows. Nothing here imports torch.
"""

from __future__ import annotations

import math
import sys
import typing
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, NamedTuple


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both among them unless they are left out."""

    low: float = -math.inf
    high: float = math.inf
    without: tuple[float, ...] = ()  # ends that are not in it

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and value not in self.without and abs(value) <= sys.float_info.max

    def __str__(self) -> str:
        """In words, such as "at least 1", "above 0", "from 0 to below 1"."""
        low, high = f"{self.low:,.15g}", f"{self.high:,.15g}"
        above, below = self.low in self.without, self.high in self.without
        if math.isinf(self.high):
            return "finite" if math.isinf(self.low) else f"{'above' if above else 'at least'} {low}"
        if math.isinf(self.low):
            return f"{'below' if below else 'at most'} {high}"
        return f"{'above' if above else 'from'} {low} to {'below ' if below else ''}{high}"

    @property
    def short(self) -> str:
        """In words, without an upper end that only keeps out what no machine could do."""
        return str(Range(self.low, without=self.without) if self.high >= 1 << 20 else self)


FINITE = Range()
Size = Annotated[int, Range(1, 1 << 24)]  # of something in memory; more than any model or batch has
SizeOrNone = Annotated[int, Range(0, 1 << 24)]
Count = Annotated[int, Range(1, 1 << 40)]  # of steps, clips, characters
CountOrNone = Annotated[int, Range(0, 1 << 40)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, without=(1,))]
Positive = Annotated[float, Range(0, without=(0,))]
NotNegative = Annotated[float, Range(0)]


class Wrong(NamedTuple):
    """A field whose value is not what it may be."""

    name: str  # with dots, as in "optimizer.clip_norm"
    value: Any
    wanted: str  # in words

    def __str__(self) -> str:
        return f"{self.name} is {self.value!r}; it must be {self.wanted}"

    @property
    def as_flag(self) -> str:
        """The same of the flag."""
        return f"--{self.name.replace('_', '-')} is {self.value}; it must be {self.wanted}"


def range_of(hint: Any) -> Range | None:
    """The range of a type hint with its annotations; of lists and unions, that of their numbers; None: it has none."""
    ranges = (extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range))
    within = (range_of(part) for part in typing.get_args(hint))
    return next((found for found in (*ranges, *within) if found is not None), None)


def first_wrong(instance: Any, path: str = "") -> Wrong | None:
    """The first field of a dataclass, or of one within it, with a number out of its range or a zero byte in a text."""
    for name, hint in typing.get_type_hints(type(instance), include_extras=True).items():
        value, where = getattr(instance, name), f"{path}{name}"
        if is_dataclass(value):
            wrong = first_wrong(value, f"{where}.")
        else:
            wrong = _wrong_part(value, range_of(hint) or FINITE, where)
        if wrong is not None:
            return wrong
    return None


def _wrong_part(value: Any, allowed: Range, where: str) -> Wrong | None:
    """What is wrong in a value or its items."""
    if isinstance(value, str) and "\0" in value:
        return Wrong(where, value, "without zero bytes")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value not in allowed:
            kind = "a whole number" if isinstance(value, int) and allowed is not FINITE else "a number"
            return Wrong(where, value, f"{kind} {allowed}" if allowed is not FINITE else "a finite number")
        return None
    items = value if isinstance(value, (list, tuple)) else ()  # mappings are free-form
    found = (_wrong_part(item, allowed, where) for item in items)
    return next((wrong for wrong in found if wrong is not None), None)
