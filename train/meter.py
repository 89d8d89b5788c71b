"""How fast a run is: clips per second, model FLOPs utilisation, power and energy a clip, time spent waiting for data.

Nothing here waits for the device: clocks run on the host, another process counts FLOPs while training begins, and the
energy counter is read from the driver, at log lines only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastclap.config import CLAPConfig
from fastclap.data import Batch
from fastclap.models.clap import CLAP, uninitialized_parameters
from fastclap.train.config import TrainConfig
from fastclap.train.distributed import World

# Dense bf16 matrix throughput in FLOP/s, from the vendors' data sheets, by a part of the device's name.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}


class Meter:
    """Figures of the time between two log lines, for the `time` key of a record.

    Args:
        world: this process; figures are those of all processes together, on the assumption that they are alike.
        flops: gives the FLOPs of the model, or None while they are being counted. Without it, or without a known peak
            of the device, the utilisation is left out.
    """

    def __init__(self, world: World, flops: Callable[[], FlopCount | None] | None = None) -> None:
        self._world = world
        self._flops = flops
        self._energy = EnergyCounter(world.device) if world.device.type == "cuda" else None
        self._peak = peak_flops(world.device)
        self._reset()

    def _reset(self) -> None:
        self._start, self._clips, self._waited, self._work = time.perf_counter(), 0, 0.0, np.zeros((2, 3))
        self._loaded, self._loading = 0, 0.0
        self._joules = self._energy.joules() if self._energy is not None else None
        self._marked: tuple[int, np.ndarray] | None = None

    def loaded(self, clips: int, seconds: float, workers: int) -> None:
        """Count clips that this process received, and the seconds that one of its loader processes took for them."""
        self._loaded += clips
        self._loading += seconds / max(workers, 1)

    def mark(self) -> None:
        """The next lap counts what has been added up to here; what is added later belongs to the one after it."""
        self._marked = self._clips, self._work

    def add(self, clips: int, samples: Sequence[int] = (), tokens: Sequence[int] = ()) -> None:
        """Count clips of the global batch, and what this process computed: samples a clip, tokens a caption."""
        self._clips += clips
        if self._flops is not None:
            self._work = self._work + np.stack([_power_sums(samples), _power_sums(tokens)])

    def received(self, batches: Iterable[Batch], workers: int) -> Generator[Batch, None, None]:
        """The batches as they are asked for, each counted together with the wait for it."""
        iterator = iter(batches)
        while True:
            with self.waiting():
                batch = next(iterator, None)
            if batch is None:
                return
            self.add(len(batch.rows) * self._world.size, batch.samples, batch.tokens)
            self.loaded(len(batch.rows), batch.seconds, workers)
            yield batch

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside the block (a validation, a save) does not count as training time."""
        begin, joules = time.perf_counter(), self._energy.joules() if self._energy is not None else None
        yield
        self._start += time.perf_counter() - begin
        if self._energy is not None and joules is not None and self._joules is not None:
            self._joules += (self._energy.joules() or joules) - joules

    def lap(self) -> dict[str, float]:
        """Figures since the last lap; starts the next one.

        seconds, clips_per_second, waiting (share of the time), loader_clips_per_second (what the loader processes could
        deliver if they never had to wait); on a GPU that is known, mfu (share of its bf16 peak that the model's own
        FLOPs reach; recomputation does not count) and, where the driver counts energy, watts (of one GPU) and
        joules_per_clip.
        """
        seconds = max(time.perf_counter() - self._start, 1e-9)
        clips, work = self._marked or (self._clips, self._work)
        later = self._clips - clips, self._work - work
        figures = {
            "seconds": round(seconds, 4),
            "clips_per_second": round(clips / seconds, 2),
            "waiting": round(self._waited / seconds, 4),
        }
        if self._loading:
            figures["loader_clips_per_second"] = round(self._loaded / self._loading * self._world.size, 2)
        flops = self._flops() if self._flops is not None else None
        if flops is not None and self._peak is not None and work.any():  # nothing was counted of towers kept in a file
            figures["mfu"] = round(3 * flops.forward(work) / seconds / self._peak, 4)  # backward is twice forward
        now = self._energy.joules() if self._energy is not None else None
        if now is not None and self._joules is not None:
            joules = now - self._joules
            figures["watts"] = round(joules / seconds, 1)
            figures["joules_per_clip"] = round(joules * self._world.size / max(clips, 1), 4)
        self._reset()
        self._clips, self._work = later
        return figures


def build_meter(config: TrainConfig, model: CLAP, world: World) -> Meter:
    """A meter that learns the model's FLOPs, on the rank that writes them and where the device's peak is known."""
    if not world.is_main or peak_flops(world.device) is None:
        return Meter(world)
    longest = round(config.data.crop_seconds * model.sampling_rate)
    return Meter(world, FlopCounting(model.config, longest, config.model.text.max_tokens))


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device, None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class EnergyCounter:
    """Energy that a GPU has used, from the driver (nvidia-ml-py), where the driver counts it."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._library = pynvml
        except (ImportError, AttributeError):
            return
        except pynvml.NVMLError:
            return

    def joules(self) -> float | None:
        """Since the driver was loaded; None where it does not count."""
        if self._handle is None:
            return None
        try:
            return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000.0
        except self._library.NVMLError:
            self._handle = None
            return None


class FlopCount:
    """Forward FLOPs of the towers by length.

    A transformer costs a·n² + b·n + c in its length n, so three lengths determine every other, and the sums of n², n
    and 1 determine the work of any number of clips.

    Args:
        polynomials: float64 [2, 3], the coefficients of n², n and 1, of clips in samples and of captions in tokens.
    """

    def __init__(self, polynomials: np.ndarray) -> None:
        self.polynomials = polynomials

    @classmethod
    def of(cls, model: CLAP, longest_samples: int, longest_tokens: int) -> FlopCount:
        """Counted by torch in a few forward passes of one clip and one caption.

        Operators that torch has no formula for, such as an FFT, do not count.

        Args:
            model: in evaluation mode, not compiled, and on a CPU: torch sees nothing of Triton kernels.
            longest_samples, longest_tokens: of a clip and of a caption.
        """

        def audio(samples: int) -> float:
            waveform, length = torch.zeros(1, samples), torch.full((1,), samples)
            return _count(lambda: model.encode_audio(waveform, length))

        def text(tokens: int) -> float:
            ids = torch.zeros(1, tokens, dtype=torch.int64)
            return _count(lambda: model.encode_text(ids, torch.ones_like(ids)))

        least = max(model.audio_branch.min_samples, longest_samples // 8)
        clips = _quadratic(audio, least, max(longest_samples, least + 2))
        return cls(np.stack([clips, _quadratic(text, 2, max(longest_tokens, 4))]))

    def audio(self, samples: Sequence[int]) -> float:
        """FLOPs of clips of these lengths."""
        return float(self.polynomials[0] @ _power_sums(samples))

    def text(self, tokens: Sequence[int]) -> float:
        """FLOPs of captions of these lengths."""
        return float(self.polynomials[1] @ _power_sums(tokens))

    def forward(
        self,
        sums: np.ndarray,  # float64 [2, 3]
    ) -> float:
        """FLOPs of clips and captions, of which these are the sums of n², n and 1."""
        return float((self.polynomials * sums).sum())


class FlopCounting:
    """Callable: the FLOPs of a model, or None until a process of its own has counted them.

    The forward passes of a large model take a CPU many seconds. A thread would not do: the choice of an attention
    kernel and the random generator belong to the whole process, and a training step uses both. If counting fails, its
    message is on stderr and there are no figures.

    Args:
        config: complete, as a model has it.
        longest_samples, longest_tokens: of a clip and of a caption.
    """

    def __init__(self, config: CLAPConfig, longest_samples: int, longest_tokens: int) -> None:
        request = json.dumps([config.to_dict(), longest_samples, longest_tokens])
        command = [sys.executable, "-m", "fastclap.train.meter", request]
        # a session of its own: what stops the run (Ctrl-C) makes no noise here
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        weakref.finalize(self, self._process.kill)  # with the run at the latest
        self._found: FlopCount | None = None

    def __call__(self) -> FlopCount | None:
        if self._found is None and self._process.poll() == 0 and self._process.stdout is not None:
            with self._process.stdout as answer:
                self._found = FlopCount(np.array(json.loads(answer.read())))
        return self._found


def _answer(request: str) -> str:
    """What the process of `FlopCounting` does."""
    config, longest_samples, longest_tokens = json.loads(request)
    os.nice(10)  # the loader goes first
    with uninitialized_parameters():
        model = CLAP(CLAPConfig.from_dict(config), load_pretrained=False).eval()
    return json.dumps(FlopCount.of(model, longest_samples, longest_tokens).polynomials.tolist())


def _count(call: Any) -> float:
    # The formulas of the fused attention kernels do not cover all devices.
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}  # not in torch's table
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call()
    return float(counter.get_total_flops())


def _quadratic(count: Any, least: int, most: int) -> np.ndarray:
    points = np.array([least, (least + most) // 2, most])
    return np.polyfit(points / most, [count(int(n)) for n in points], 2) / most ** np.array([2.0, 1.0, 0.0])


def _power_sums(lengths: Sequence[int]) -> np.ndarray:  # [3]: Σn², Σn, Σ1
    n = np.asarray(lengths, dtype=np.float64)
    return np.array([n @ n, n.sum(), len(n)])


if __name__ == "__main__":
    print(_answer(sys.argv[1]))
