"""Clocks and limits."""

from __future__ import annotations

import time

import pytest
import torch

from bench import timing
from bench.timing import Timing

CPU = torch.device("cpu")


def test_median_and_range() -> None:
    assert Timing.of([5.0, 1.0, 3.0]) == Timing(3.0, 1.0, 5.0, 3)
    assert Timing.of(range(1, 102)) == Timing(51.0, 11.0, 91.0, 101)


def test_calls_take_turns_and_the_clock_is_right() -> None:
    order: list[str] = []

    def sleeper(name: str, seconds: float):  # type: ignore[no-untyped-def]
        return lambda: (order.append(name), time.sleep(seconds))

    found = timing.interleaved({"a": sleeper("a", 0.002), "b": sleeper("b", 0.02)}, CPU, seconds=0.2, most=4)
    assert order == ["a", "b"] * 4 and found["a"].repeats == found["b"].repeats == 4
    assert found["a"].median_ms >= 2.0 and found["b"].p10_ms >= 20.0


def test_time_bounds_the_rounds() -> None:
    calls = {"slow": lambda: time.sleep(0.05)}
    assert timing.interleaved(calls, CPU, seconds=0.01, least=3)["slow"].repeats == 1  # far past its time
    assert timing.interleaved(calls, CPU, seconds=0.08, least=3)["slow"].repeats in (3, 4)
    assert timing.interleaved({}, CPU, seconds=1) == {}


def test_attempt_names_the_reason() -> None:
    def wait() -> None:
        time.sleep(5)

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken() -> None:
        raise KeyError("key")

    assert timing.attempt(lambda: 3, 1) == (3, None)
    start = time.perf_counter()
    assert timing.attempt(wait, 0.1) == (None, "stopped: longer than 0 s")
    assert time.perf_counter() - start < 2
    assert timing.attempt(out_of_memory, 1) == (None, "out of memory")
    assert timing.attempt(broken, 1) == (None, "KeyError: 'key'")


def test_inputs_rotate_and_gradients_start_anew() -> None:
    inputs = timing.larger_than_cache(6, 4, 2.0, CPU, torch.float32)
    assert len(inputs) == 2 and not torch.equal(inputs[0][0], inputs[1][0])
    call = timing.forward_backward(lambda a, b, scale: scale * (a * b).sum(), inputs)
    values = [call() for _ in range(4)]
    assert values[0] == values[2] != values[1] == values[3]
    assert torch.equal(inputs[0][0].grad, 2 * inputs[0][1].detach())  # once, not twice


def test_machine_is_described() -> None:
    found = timing.machine(CPU)
    assert found["device"] == "CPU" and found["cores"] >= 1 and found["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("samples", ([2.0], [2.0, 4.0]))
def test_few_samples(samples: list[float]) -> None:
    found = Timing.of(samples)
    assert found.repeats == len(samples) and found.p10_ms == 2.0 and found.p90_ms == samples[-1]


class SimulatedGPU:
    """A host and a device with clocks of their own, in ms: a device works on what the host has queued."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.device = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None: ...

            def record(self) -> None:
                self.at = max(gpu.device, gpu.host)

            def synchronize(self) -> None:
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: setattr(self, "host", max(self.host, self.device)))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.kernel(0.0, cycles / timing.CYCLES_PER_MS))
        monkeypatch.setattr(time, "perf_counter", lambda: self.host / 1e3)

    def kernel(self, host_ms: float, device_ms: float) -> None:
        self.host += host_ms
        self.device = max(self.device, self.host) + device_ms


def test_on_a_gpu_the_devices_time_is_apart_from_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cuda = SimulatedGPU(monkeypatch), torch.device("cuda")
    launches = lambda: [gpu.kernel(2.0, 0.5) for _ in range(4)]  # noqa: E731
    assert timing.elapsed_ms(launches, cuda) == pytest.approx(8.5)  # as a caller sees it: bound by the host
    found = timing.interleaved({"launches": launches, "one": lambda: gpu.kernel(0.1, 3.0)}, cuda, 1.0)
    assert (found["launches"].median_ms, found["launches"].host_ms) == (2.0, 8.0)
    assert (found["one"].median_ms, found["one"].host_ms) == (3.0, 0.1)
    assert found["one"].as_dict()["host_ms"] == 0.1 and "host_ms" not in Timing.of([1.0]).as_dict()
    assert timing.steady_ms(lambda: gpu.kernel(0.1, 3.0), cuda, 10) == pytest.approx(3.01)
