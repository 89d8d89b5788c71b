"""Clocks, memory, time limits and inputs that every benchmark shares.

On a GPU a call is timed by device events around it, behind a wait that the device is given first: by the time the wait
ends the host has queued the whole call, so what is measured is the device's time, and the host's separately. On a CPU
it is the wall clock. Forms to compare run in turn within one loop, so that all of them see the same machine, and each
call of a form takes the next of several sets of inputs that together are larger than the L2 cache.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]

CYCLES_PER_MS = 1_900_000  # of a GPU at about 1.9 GHz; at a lower clock a wait is longer
LONGEST_WAIT_MS = 50.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median, and the range that holds the middle 80 % of the calls.

    `host_ms` is the median until the host had queued a call, where the device's time is measured apart from it.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int
    host_ms: float | None = None

    @classmethod
    def of(cls, samples: Sequence[float], host: Sequence[float] = ()) -> Timing:
        ordered = sorted(samples)
        last = len(ordered) - 1
        low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
        median, low, high = (float(f"{x:.5g}") for x in (statistics.median(ordered), low, high))
        return cls(median, low, high, len(ordered), float(f"{statistics.median(host):.4g}") if host else None)

    def as_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def queued_ms(call: Call, device: torch.device, wait_ms: float) -> tuple[float, float]:
    """(ms on the device, ms until the host had queued it) of one call, which the device begins after a wait.

    A wait that is longer than the host needs keeps the host's time out of the device's. Where a call itself waits for
    the device, both times include that.
    """
    torch.cuda.synchronize(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(round(min(wait_ms, LONGEST_WAIT_MS) * CYCLES_PER_MS))
    begin.record()
    start = time.perf_counter()
    call()
    host_ms = 1e3 * (time.perf_counter() - start)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), host_ms


def host_ms(call: Call, device: torch.device) -> float:
    """Until the host had queued one call on an idle device."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    passed = 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return passed


def steady_ms(call: Call, device: torch.device, calls: int) -> float:
    """A call of several in a row by the wall clock, as a loop takes them: while the device works the host goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start) / calls


def elapsed_ms(call: Call, device: torch.device) -> float:
    """One call, from an idle device to its last kernel's end, the host's time included."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    seconds: float,
    *,
    least: int = 3,
    most: int = 50,
    announce: Callable[[str], None] = lambda _: None,
) -> dict[str, Timing]:
    """Times calls that have been warmed up, one of each in turn, for about `seconds` in all.

    Past three times the seconds it stops wherever it is, with what it has.

    Args:
        calls: by name.
        device: on which they work; on a GPU the times are those of `queued_ms`.
        seconds: of the loop.
        least: rounds.
        most: rounds.
        announce: called with the name of every call before it.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for name, call in itertools.chain.from_iterable(itertools.repeat(calls.items(), most)):
        passed = time.perf_counter() - start
        rounds = min(map(len, samples.values()))
        enough = len(samples[name]) == rounds >= least and passed * (rounds + 1) / rounds > seconds
        if enough or (rounds and passed > 3 * seconds):
            break
        announce(name)
        if device.type == "cuda":
            asked = host[name][-1] if host[name] else host_ms(call, device)
            on_device, on_host = queued_ms(call, device, 1.5 * asked + 0.2)
            samples[name].append(on_device)
            host[name].append(on_host)
        else:
            samples[name].append(elapsed_ms(call, device))
    return {name: Timing.of(values, host[name]) for name, values in samples.items()}


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Device memory at the highest point of a call, above what was allocated before; None on a CPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class TimeUpError(Exception):
    """A call ran past its limit."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeUpError in the main thread after `seconds`, at the next bytecode: for a peer that tunes forever."""

    def stop(*_: object) -> None:
        raise TimeUpError(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(call: Callable[[], Any], seconds: float) -> tuple[Any, str | None]:
    """The result of a call, or None and in words why there is none: out of memory, time, or the error itself."""
    try:
        with time_limit(seconds):
            return call(), None
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except TimeUpError as error:
        reason = f"stopped: {error}"
    except Exception as error:
        reason = in_words(error)
    release()  # after the exception, which holds the frames and so the tensors
    return None, reason


def in_words(error: BaseException) -> str:
    """An exception in one line of a record."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def release() -> None:
    """Gives the memory of dropped tensors back to the device."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def embeddings(
    rows: int, dim: int, scale: float, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random a, partly aligned b, and the scale (float32); all require gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    a = torch.randn(rows, dim, generator=generator, device=device)
    b = 0.5 * a + torch.randn(rows, dim, generator=generator, device=device)
    return (
        a.to(dtype).requires_grad_(),
        b.to(dtype).requires_grad_(),
        torch.tensor(scale, device=device, requires_grad=True),
    )


def noise(clips: int, samples: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """White noise [clips, samples] at a tenth of full scale, which is 1, or 32768 in int16."""
    generator = torch.Generator(device).manual_seed(seed)
    wave = torch.randn(clips, samples, generator=generator, device=device).mul_(0.1)
    return wave.mul_(32768).clamp_(-32768, 32767).to(torch.int16) if dtype == torch.int16 else wave.to(dtype)


def larger_than_cache(
    rows: int, dim: int, scale: float, device: torch.device, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """As many sets of `embeddings` as fill twice the L2 cache, at least two; two on a CPU."""
    sets = 2
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        sets = max(2, -(-2 * cache // (2 * rows * dim * dtype.itemsize)))
    return [embeddings(rows, dim, scale, device, dtype, seed) for seed in range(sets)]


def forward_backward(run: Callable[..., Any], inputs: Sequence[tuple[Tensor, ...]]) -> Callable[[], Tensor]:
    """A call that does one loss and its backward pass on the next set of inputs and returns the loss."""
    turn = itertools.cycle(inputs)

    def call() -> Tensor:
        tensors = next(turn)
        for tensor in tensors:
            tensor.grad = None
        loss = run(*tensors)
        loss.backward()
        return loss.detach()

    return call


def output_and_gradients(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], upstream: Tensor | None = None
) -> list[Tensor]:
    """What a function of the leaves gives, and the gradient of every leaf."""
    output = function(*leaves)
    upstream = None if upstream is None else upstream.to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def warmed_up(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, after it was made three times."""
    for _ in range(3):
        call()
    return call


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call as a CUDA graph, whose replay returns the one result, overwritten.

    Its inputs stay where they are, in the cache if they fit.
    """
    if device.type != "cuda":
        raise RuntimeError("a CPU has no CUDA graphs")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        warmed_up(call)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay(needed: tuple[Any, Any] = (call, kept)) -> Any:  # the graph reads and writes their tensors
        graph.replay()
        return needed[1]

    return replay


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"device": "CPU", "cpu": cpu, "cores": cores, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return found


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # no library, no driver or no permission: the figures stand without it
        return None
    return version if isinstance(version, str) else version.decode()
