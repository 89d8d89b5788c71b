"""`fastclap-train` at full size, as a user starts it: from a configuration, on packed shards, in its own process.

The stage of the lot `train`. It makes what a run needs, without the hub and without a decoder of audio files: a model
folder with random weights and a trained vocabulary (`init_from`), and a packed folder of noise. Then the command runs
for some steps, and every line of its `metrics.jsonl` is a row as soon as it is written; after the last one it saves
and exports as any run does. A second, short run writes its own profile (`--profile`), which becomes rows too.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
import yaml

from bench import timing
from bench.gpu.lots import ROOT
from bench.gpu.watch import die_with_parent
from bench.parity import CAPTIONS
from bench.reference_step import build_ours
from bench.run import SIZES, Row, Run, significant
from fastclap.data.rows import Manifest
from fastclap.data.rows import Row as Clip
from fastclap.models.tokenizer import train_tokenizer

RATE = 16000
RECIPE = "paraspeechclap-situational"
PLAIN, PROFILED = "fastclap-train", "fastclap-train, profiled"
COPIED = ("loss", "grad_norm", "logit_scale", "skipped_steps")  # of a line of metrics.jsonl
TIMED = ("waiting", "loader_clips_per_second", "mfu", "watts", "joules_per_clip", "seconds")


@dataclass(frozen=True)
class TrainSizes:
    """Sizes of the runs.

    Attributes:
        size: of the towers.
        clips: in the packed folder, `lengths` seconds long, of which a step uses `crop`.
        batch, workers: clips a step, and loader processes.
        steps, log_every, profiled_steps: of the runs.
        start_seconds, save_seconds: the most that a run may take to its first line, and after its last.
    """

    size: str = "large"
    clips: int = 768
    lengths: tuple[float, float] = (10.0, 14.0)
    crop: float = 10.0
    batch: int = 64
    workers: int = 8
    steps: int = 80
    log_every: int = 10
    profiled_steps: int = 10
    start_seconds: float = 75.0
    save_seconds: float = 40.0


TINY = TrainSizes("tiny", 24, (0.6, 0.9), 0.5, 4, 0, 6, 2, 9)


def train(run: Run) -> None:
    """A run of many steps, then one that is profiled."""
    sizes = TINY if run.tiny else TrainSizes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = run.attempt({"run": PLAIN, "phase": "inputs"}, lambda: make_inputs(folder, sizes, run.device), 60.0)
        if made is None:
            return
        run.add({"run": PLAIN, "phase": "inputs"}, **made)
        run.attempt({"run": PLAIN, "phase": "all"}, lambda: _plain(run, folder, sizes), 170.0)
        run.attempt({"run": PROFILED, "phase": "all"}, lambda: _profiled(run, folder, sizes), 100.0)


# ---------------------------------------------------------------------------------------------------------------------
# what a run needs


def make_inputs(folder: Path, sizes: TrainSizes, device: torch.device) -> Row:
    """Write `folder/model` and `folder/clips`. Returns the seconds that each took."""
    start = time.perf_counter()
    torch.manual_seed(0)
    model = build_ours(SIZES[sizes.size], train_tokenizer(CAPTIONS, 1000), device=device)
    model.save_pretrained(folder / "model")
    del model
    timing.release()
    saved = time.perf_counter()
    packed = pack_noise(folder / "clips", sizes)
    return {
        "model_s": round(saved - start, 1),
        "pack_s": round(time.perf_counter() - saved, 1),
        "packed_bytes": packed["bytes"],
    }


def pack_noise(folder: Path, sizes: TrainSizes) -> dict[str, Any]:
    """Write a packed folder of noise, with no audio file. Returns what `fastclap.data.pack.pack` returns."""
    generator = np.random.default_rng(0)
    least, most = (round(RATE * seconds) for seconds in sizes.lengths)
    tape = (3000 * generator.standard_normal(4 * most, dtype=np.float32)).astype(np.int16)
    samples = generator.integers(least, most, sizes.clips, endpoint=True).tolist()
    begins = generator.integers(0, 3 * most, sizes.clips).tolist()
    rows = [
        Clip(str(i), (CAPTIONS[i % len(CAPTIONS)],), (), {}, None, samples[i] / RATE, None, f"made:{i}", 0)
        for i in range(sizes.clips)
    ]

    def clip_of(row: Clip, sampling_rate: int) -> _Array:
        index = int(row.audio)
        return _Array(row.audio, tape[begins[index] : begins[index] + samples[index]])

    module: Any = importlib.import_module("fastclap.data.pack")  # fastclap.data has a function of that name
    with mock.patch.object(module, "open_clip", clip_of):
        return module.pack(Manifest(rows, source_names=("made",)), folder, sampling_rate=RATE)


class _Array:
    """Samples in the place of an open audio file."""

    statistics: tuple[float, float] | None = None
    sampling_rate = RATE

    def __init__(self, path: str, wave: np.ndarray) -> None:
        self.path, self.wave = path, wave

    @property
    def num_samples(self) -> int:
        return len(self.wave)

    def read(self, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        stop = len(self.wave) if num_samples is None else start + num_samples
        return self.wave[start:stop]

    def __enter__(self) -> _Array:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


def configuration(
    folder: Path, run_dir: Path, sizes: TrainSizes, device: torch.device, **changes: Any
) -> dict[str, Any]:
    """What is laid over the recipe."""
    return {
        "run_dir": str(run_dir),
        "init_from": str(folder / "model"),
        "data": {"train": [str(folder / "clips")], "crop_seconds": sizes.crop, "workers": sizes.workers},
        "batch_size": sizes.batch,
        "epochs": 0,
        "steps": sizes.steps,
        "log_every": sizes.log_every,
        "device": device.type,
        **changes,
    }


# ---------------------------------------------------------------------------------------------------------------------
# runs


class Process:
    """The command on a configuration, and what it has written so far; killed at the end of the block.

    Args:
        folder: that receives the configuration and the output.
        name: of both.
        config: see `configuration`.
    """

    def __init__(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        self.run_dir = Path(config["run_dir"])
        self.log = folder / f"{name}.log"
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, "-m", "fastclap.train.cli", RECIPE, "--config", str(folder / f"{name}.yaml")]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        self.start = time.perf_counter()
        with open(self.log, "wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=die_with_parent,
            )
        self._read = 0

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.start

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def lines(self) -> Iterator[dict[str, Any]]:
        """The complete lines of `metrics.jsonl` that are new."""
        path = self.run_dir / "metrics.jsonl"
        if path.exists():
            text = path.read_bytes()[self._read :]
            text = text[: text.rfind(b"\n") + 1]
            self._read += len(text)
            yield from map(json.loads, text.splitlines())

    def has_printed(self, words: str) -> bool:
        """Whether the output has these words."""
        return words in self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, what: Callable[[], bool], seconds: float) -> bool:
        """Whether something has come about within so many seconds and before the process ended.

        Raises:
            RuntimeError: the process failed; with its last words.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            ended = self.ended
            if what():
                return True
            if ended:
                if self._process.returncode:
                    last = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
                    raise RuntimeError(f"ended with {self._process.returncode}: {' '.join(last)}")
                return False
            time.sleep(0.1)
        return False


def _plain(run: Run, folder: Path, sizes: TrainSizes) -> Literal[True]:
    config = configuration(folder, folder / "run", sizes, run.device)
    memory = _Memory(run.device)
    with Process(folder, "plain", config) as process:
        facts = {"clips": sizes.batch, "seconds": sizes.crop}

        def add_lines() -> bool:
            """Add new lines as rows. Returns whether the last one is among them."""
            last = False
            memory.look()
            for line in process.lines():
                if line["kind"] == "train":
                    row = {**facts, **figures(line), "used_bytes": memory.highest}
                    run.add({"run": PLAIN, "step": line["step"]}, **row)
                    last |= line["step"] == sizes.steps
            return last

        if not process.wait_for(lambda: process.has_printed("to train on"), sizes.start_seconds):
            raise RuntimeError(f"it printed nothing about its model within {sizes.start_seconds:.0f} s")
        ready = {"seconds": significant(process.seconds)}
        run.add({"run": PLAIN, "phase": "start"}, **ready, notes="from the command to the line before the first step")
        if not process.wait_for(add_lines, 2 * sizes.start_seconds):
            raise RuntimeError("its last step did not come")
        begin = process.seconds
        done = process.wait_for(lambda: process.ended and process.has_printed("model: "), sizes.save_seconds)
        saved = significant(process.seconds - begin)
        notes = "from its last line to its end: a checkpoint, the exported model and the report"
        run.add(
            {"run": PLAIN, "phase": "end"},
            **({"seconds": saved} if done else {"reason": f"longer than {saved:.0f} s"}),
            notes=notes,
        )
    run.add({"run": PLAIN, "phase": "all"}, seconds=significant(process.seconds))
    return True


def figures(line: dict[str, Any]) -> Row:
    """The figures of a line of metrics.jsonl, as a row has them."""
    time_of = line["time"]
    row: Row = {"clips_per_s": time_of["clips_per_second"]}
    row |= {name.replace("_second", "_s"): time_of[name] for name in TIMED if name in time_of}
    row |= {name: line[name] for name in COPIED if name in line}
    if "mfu" in row:
        row["notes"] = "mfu: of the dense bf16 rate in the vendor's data sheet"
    if line["loss"] is None or line["skipped_steps"]:
        row["passed"] = False
    return row


class _Memory:
    """The most memory of a GPU that all processes together were seen to use; None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.highest: int | None = None

    def look(self) -> None:
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            self.highest = max(self.highest or 0, total - free)


def _profiled(run: Run, folder: Path, sizes: TrainSizes) -> Literal[True]:
    config = configuration(folder, folder / "profiled", sizes, run.device, steps=sizes.profiled_steps, profile=True)
    with Process(folder, "profiled", config) as process:
        table = process.run_dir / "profile" / "longest.txt"  # written after the trace
        if not process.wait_for(table.exists, 2 * sizes.start_seconds):
            raise RuntimeError("it wrote no profile")
    summary = Trace(process.run_dir / "profile" / "trace.json", run.device)
    run.add({"run": PROFILED, "phase": "three steps"}, clips=sizes.batch, **summary.whole)
    for name, row in summary.longest(20):
        run.add({"run": PROFILED, "kernel": name}, clips=sizes.batch, **row)
    run.add({"run": PROFILED, "phase": "all"}, seconds=significant(process.seconds))
    return True


class Trace:
    """The three steps in a Chrome trace of `fastclap-train --profile`.

    Args:
        path: of the trace.
        device: whose work it shows; on a CPU, operations take the place of kernels, with what they call.

    Attributes:
        whole: ms from the first kernel to the end of the last, the share of it in which one ran, and launches.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        kinds = ("kernel", "gpu_memcpy", "gpu_memset") if device.type == "cuda" else ("cpu_op",)
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        work = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") in kinds and "dur" in e)
        if not work:
            raise RuntimeError(f"{path.name}: no {kinds[0]} in it")
        self._ms: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        busy, reached = 0.0, work[0][0]
        for begin, end, name in work:
            busy += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
            self._ms[name] += (end - begin) / 1e3
            self._calls[name] += 1
        span = reached - work[0][0]
        self.whole: Row = {
            "span_ms": significant(span / 1e3),
            "busy": significant(busy / span),
            "launches": len(work),
        }

    def longest(self, most: int) -> Iterator[tuple[str, Row]]:
        """The kernels with the most time, and their share of that of all."""
        total = sum(self._ms.values())
        for name, ms in self._ms.most_common(most):
            yield name[:160], {"calls": self._calls[name], "ms": significant(ms), "share": significant(ms / total)}
