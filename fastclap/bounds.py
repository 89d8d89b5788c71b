"""What a number may be: ranges that stand beside the fields of the configurations and serve flags, files and Python.

`Annotated[float, Range(0, 1)]` is a number from 0 to 1; `bounds_error` says what is wrong with a value, and the help of
the command lines shows the range. Numbers are finite unless their range says otherwise. Nothing here imports torch.
"""

from __future__ import annotations

import math
import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both among them unless they are left out."""

    low: float = -math.inf
    high: float = math.inf
    without: tuple[float, ...] = ()  # ends, or other numbers, that are not in it

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and value not in self.without

    def __str__(self) -> str:
        """In words, such as "at least 1", "above 0", "from 0 to below 1"."""
        low = f"above {self.low:,g}" if self.low in self.without else f"at least {self.low:,g}"
        high = f"below {self.high:,g}" if self.high in self.without else f"at most {self.high:,g}"
        if math.isinf(self.high):
            return "any finite number" if math.isinf(self.low) else low
        if math.isinf(self.low):
            return high
        if self.low in self.without:
            return f"{low}, {high}"
        return f"from {self.low:,g} to {'below ' if self.high in self.without else ''}{self.high:,g}"


SIZE = 1 << 20
"""More layers, columns or heads than any model has; what fits, `fastclap.models` says by the memory it would take."""

Size = Annotated[int, Range(1, SIZE)]
SizeOrNone = Annotated[int, Range(0, SIZE)]
Count = Annotated[int, Range(1, 1 << 40)]
CountOrNone = Annotated[int, Range(0, 1 << 40)]
Share = Annotated[float, Range(0, 1)]
Dropout = Annotated[float, Range(0, 1, without=(1,))]
Positive = Annotated[float, Range(0, without=(0,))]
NotNegative = Annotated[float, Range(0)]


def range_of(hint: Any) -> Range | None:
    """The range of a type hint with its annotations; of lists and unions, that of the numbers in it; None: it has none."""
    if typing.get_origin(hint) is Annotated:
        return next((extra for extra in hint.__metadata__ if isinstance(extra, Range)), None)
    return next((found for part in typing.get_args(hint) if (found := range_of(part)) is not None), None)
