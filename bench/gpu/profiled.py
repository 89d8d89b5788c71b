"""Where the device's time in a training step goes: by kernel, and by part of the model.

A kernel belongs to the part whose forward pass launched it; in the backward pass, to the part of the forward operation
whose node of autograd is running, which has the same sequence number. What belongs to no part is sorted by operation.
On a CPU, operations take the place of kernels.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from bench.run import Row, significant

LABEL = "part: "
BACKWARD = "autograd::engine::evaluate_function: "
# Words in the names of a kernel and of the operations around it; the first that is found counts
OPERATIONS = {
    "attention": ("attention", "flash", "fmha"),
    "norms": ("layer_norm", "layernorm", "native_norm"),
    "dropout": ("dropout", "bernoulli"),
    "activations": ("gelu", "tanh", "sigmoid"),
    "copies": ("memcpy", "memset", "copy_"),
    "products": ("aten::mm", "addmm", "bmm", "matmul", "linear", "gemm", "nvjet", "cutlass"),
}
OTHER = "other"


@dataclass
class Profile:
    """The profile of one call.

    Attributes:
        kernels: milliseconds and launches by name, the longest first.
        events: of the profiler, which `parts` looks through.
        on_gpu: whether the events are a GPU's.
    """

    kernels: dict[str, tuple[float, int]]
    events: list[Any]
    on_gpu: bool

    @functools.cached_property
    def parts(self) -> dict[str, tuple[float, int]]:
        """Milliseconds and launches by part of the model, the longest first."""
        return _by_part(self.events, self.on_gpu, 1e3 * self.total_ms)

    @property
    def total_ms(self) -> float:
        return sum(ms for ms, _ in self.kernels.values())

    def rows(self, figures: Mapping[str, tuple[float, int]], most: int | None = None) -> Iterator[tuple[str, Row]]:
        """The name and the row of each of the `kernels` or `parts`."""
        for name, (ms, calls) in list(figures.items())[:most]:
            share = significant(ms / self.total_ms) if self.total_ms else 0.0
            yield name, {"calls": calls, "ms": significant(ms), "share": share}


@contextlib.contextmanager
def labelled(modules: Mapping[str, torch.nn.Module], methods: Mapping[str, tuple[Any, str]]) -> Iterator[None]:
    """Inside it, what these modules and methods (of an object or a class) do carries their label in a profile."""
    with contextlib.ExitStack() as stack:
        for label, module in modules.items():
            open_scopes: list[Any] = []

            def enter(*_: object, label: str = label, scopes: list[Any] = open_scopes) -> None:
                scopes.append(record_function(LABEL + label))
                scopes[-1].__enter__()

            def leave(*_: object, scopes: list[Any] = open_scopes) -> None:
                scopes.pop().__exit__(None, None, None)

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        for label, (owner, name) in methods.items():
            stack.enter_context(mock.patch.object(owner, name, _labelled(label, getattr(owner, name))))
        yield


def _labelled(label: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(LABEL + label):
            return method(*args, **kwargs)

    return call


def profiled(call: Callable[[], Any], device: torch.device) -> Profile:
    """The profile of a call, best made inside `labelled`.

    Raises:
        RuntimeError: the profiler saw nothing.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = list(profiler.events())
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in events:
        # a label has an event on the device too, as long as all that happens under it
        if event.device_type != wanted or event.is_user_annotation or event.name.startswith((LABEL, BACKWARD)):
            continue
        us = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        if us > 0:
            kernels[event.name] += us
            launches[event.name] += 1
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    by_kernel = {name: (us / 1e3, launches[name]) for name, us in kernels.most_common()}
    return Profile(by_kernel, events, on_gpu)


def _by_part(events: list[Any], on_gpu: bool, total: float) -> dict[str, tuple[float, int]]:
    host = [event for event in events if event.device_type == DeviceType.CPU and not event.is_async]
    part_of_number: dict[int, str] = {}  # of forward operations that autograd will go back through
    for event in host:
        label = _label(event)
        if label is not None and event.sequence_nr >= 0 and not event.name.startswith(BACKWARD):
            part_of_number.setdefault(event.sequence_nr, label)
    spent: dict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    for event in host:
        if on_gpu:
            # a label's own event on the device is no kernel
            found = [(kernel.name, kernel.duration) for kernel in event.kernels if kernel.name != event.name]
        else:
            own = event.name.startswith((LABEL, BACKWARD)) or event.is_user_annotation
            found = [] if own else [(event.name, event.self_cpu_time_total)]
        for name, us in found:
            part = _part(event, name, part_of_number)
            spent[part] += us
            launches[part] += us > 0
    missing = total - sum(spent.values())
    if missing > 1e-3 * total:
        spent["not attributed"] += missing
    longest = sorted(spent.items(), key=lambda entry: -entry[1])
    return {part: (us / 1e3, launches[part]) for part, us in longest}


def _ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _label(event: Any) -> str | None:
    names = (above.name for above in _ancestors(event))
    return next((name.removeprefix(LABEL) for name in names if name.startswith(LABEL)), None)


def _part(event: Any, kernel: str, part_of_number: Mapping[int, str]) -> str:
    above = list(_ancestors(event))
    label = _label(event)
    for node in above:
        if label is None and node.name.startswith(BACKWARD):
            label = part_of_number.get(node.sequence_nr)
    if label is not None:
        return label
    # the innermost operation first: a copy within a product is a copy
    for name in (kernel, *(node.name for node in above)):
        lowered = name.lower()
        for part, words in OPERATIONS.items():
            if any(word in lowered for word in words):
                return part
    return OTHER
