"""What a model would take, said before it is made: a configuration is a few lines, and may ask for a petabyte.

Building a tower makes its tensors through torch's factory functions. `Allowance` adds up their sizes before each is
made, so that neither memory nor minutes are spent on what cannot be.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastclap.errors import ConfigError, FastclapError

MAX_LAYERS = 1000
"""Layers of one kind; each takes time to build, however small it is."""
MAX_TENSORS = 100_000
"""Tensors of a model, likewise."""
MAX_POSITIONS = 1 << 24
"""Numbers of a range, such as of positions or distances: tables are computed from it, in several steps."""

_SHAPED = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full}
_RANGES = {torch.arange, torch.linspace}
_NEW = {Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full}
_LIKE = {torch.empty_like, torch.zeros_like, torch.ones_like, torch.rand_like, torch.randn_like, torch.full_like}


def free_memory() -> int | None:
    """Bytes that this process may still take; None where the system does not say."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):  # of a container; "max" where it has no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)


class Allowance(TorchFunctionMode):
    """Tensors made within may take so many bytes together.

    Args:
        config: as a dictionary, to name its largest sizes.
        most: bytes; None: any number.
        source: of that limit, for the message, such as "of memory are free".

    Raises:
        ConfigError: of a tensor that is more, before it is made.
    """

    def __init__(self, config: Mapping[str, Any], most: int | None, source: str) -> None:
        super().__init__()
        self._config, self._most, self._source = config, math.inf if most is None else most, source
        self._counts = torch.get_default_device().type != "meta"  # nothing takes memory there
        self._bytes = self._tensors = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        size = _elements(func, args, kwargs) if self._counts else 0
        if size:
            self._bytes += size * (kwargs.get("dtype") or torch.get_default_dtype()).itemsize
            self._tensors += 1
            if self._bytes > self._most:
                self._refuse(f"{self._bytes:,} bytes or more, but {self._most:,} {self._source}")
            if self._tensors > MAX_TENSORS:
                self._refuse(f"more than {MAX_TENSORS:,} tensors")
            if func in _RANGES and size > MAX_POSITIONS:
                self._refuse(f"a table of {size:,} positions")
        return func(*args, **kwargs)

    def _refuse(self, what: str) -> None:
        largest = ", ".join(f"{name} {value:,}" for name, value in _largest(self._config))
        raise ConfigError(f"a model of these sizes takes {what}; the largest are {largest}")


def _elements(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Numbers in the tensor that a call of torch makes; 0 of one that makes none, or that torch will refuse."""
    device = kwargs.get("device")
    try:
        if func in _LIKE:
            return 0 if str(device or args[0].device) == "meta" else args[0].numel()
        if device is not None and str(device) == "meta":
            return 0
        if func in _SHAPED or func in _NEW:
            sizes = args[1:] if func in _NEW else args
            shape = kwargs.get("size", sizes)
            if shape and isinstance(shape[0], Sequence):
                shape = shape[0]
            return math.prod(size for size in shape if isinstance(size, int))
        if func is torch.arange:
            begin, end, step = (*((0,) if len(args) == 1 else ()), *args, 1)[:3]
            return max(0, math.ceil((end - begin) / step))
        if func is torch.linspace:
            return int(args[2])
        if func is torch.eye:
            return args[0] * (args[1] if len(args) > 1 else args[0])
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError):
        pass
    return 0


def _largest(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The three largest integers of a configuration, with their paths."""
    numbers = [(name, value) for name, value in _integers(config) if not name.endswith("token_id")]
    return sorted(numbers, key=lambda pair: -abs(pair[1]))[:3]


def _integers(value: Any, path: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _integers(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _integers(item, path)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path, value


def check_counts(config: Mapping[str, Any], where: str) -> None:
    """Check how many layers a configuration describes.

    Raises:
        ConfigError: more than `MAX_LAYERS`, or a list that is longer.
    """
    for key, value in config.items():
        path = f"{where}.{key}"
        if isinstance(value, Mapping):
            check_counts(value, path)
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > MAX_LAYERS:
            raise ConfigError(f"{path} is a list of {len(numbers):,}; give at most {MAX_LAYERS:,}")
        if re.search(r"(^|_)(layers?|depths?)$", str(key)):
            total = sum(number for number in numbers if isinstance(number, int))
            if total > MAX_LAYERS:
                raise ConfigError(f"{path} is {total:,}; no more than {MAX_LAYERS:,} layers can be built")


@contextlib.contextmanager
def one_error(what: str) -> Iterator[None]:
    """Errors that torch and transformers raise for sizes that do not go together are errors of the configuration.

    Raises:
        ConfigError: of `what`.
    """
    try:
        yield
    except FastclapError:
        raise
    except Exception as error:  # any kind: a number is zero, or no number, or nothing has this name
        told = " ".join(str(error).split())
        raise ConfigError(f"{what}: no tower has this configuration ({type(error).__name__}: {told})") from error
