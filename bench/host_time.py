"""What a loss asks of the host, without a GPU: launches, operations, microseconds, and the time of a first call.

    python -m bench.host_time [--rows 256 1024 4096] [--dim 768] [--repeats 300] [--no-first] [--out FILE]

With small batches the host decides how long a loss takes, so it is measured here: Triton's real way to a launch, with
kernels compiled for sm_90, ends in a CUDA driver that does nothing and counts (`fake_driver.c`, which a C compiler
turns into a library when this runs). Tensors are the CPU's and pass for a GPU's. For another checkout of the project:
PYTHONPATH=CHECKOUT python bench/host_time.py.

Counted for every number of rows, in a forward and backward pass: launches of Triton kernels; TMA descriptors that the
driver encodes; products; other operations of torch that launch a kernel (a sort several); and those that do not (views,
empty tensors).
The forms of torch and of others do the same for every number of rows, so theirs are counted at `TIMED_ROWS`.

Timed are `TIMED_ROWS` rows, on which a CPU's arithmetic takes next to nothing: what is left is what torch and Python do
before a kernel would start. The time holds for every number of rows with the same counts. It is that of this CPU, so
it compares forms and versions; one launch and one operation are timed beside them as a measure. Not in it: the device,
and what a GPU's driver and libraries do to launch an operation of torch, or a kernel, which every form pays for each. A
product of ours multiplies one number by one and leaves its result empty; peers' products are of `TIMED_ROWS` rows. The
scale is on the CPU; for that ours has one operation more, and reads it once, than with a scale on the GPU.

A first call is the first of a process, with an empty cache of Triton's: the seconds are those of compiling its kernels
and their launchers, one after the other unless the engine does it otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import peers, timing
from bench.fake_gpu import ARCHITECTURE, MULTIPROCESSORS
from bench.tables import markdown
from fastclap.kernels import dispatch
from fastclap.losses import info_nce, sigmoid_loss

SOURCE = Path(__file__).with_name("fake_driver.c")
LIBRARY = "libcuda.so.1"
TIMED_ROWS = TIMED_DIM = 16
WARM_UP = 30  # calls
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
WITHOUT_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
WITHOUT_KERNEL |= {"detach", "detach_", "_local_scalar_dense", "promote_types", "resize_", "set_"}
CPU = torch.device("cpu")

Call = Callable[[], object]


@dataclass(frozen=True)
class Counts:
    """Of one call.

    Attributes:
        launches: of Triton kernels.
        descriptors: that the driver encoded.
        products: matrix products of torch.
        operations: others of torch that launch a kernel.
        views: those that launch none.
    """

    launches: int
    descriptors: int
    products: int
    operations: int
    views: int


class _Operations(TorchDispatchMode):
    """Counts operations below autograd by what they do on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.operations = self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        if name in PRODUCTS:
            self.products += 1
        elif func.is_view or name in WITHOUT_KERNEL:
            self.views += 1
        else:
            self.operations += 1
        return func(*args, **(kwargs or {}))


class Driver:
    """The driver that does nothing, in the place of CUDA's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._launches, self._descriptors = library.count_of_launches, library.count_of_descriptors
        self._launches.restype = self._descriptors.restype = ctypes.c_long

    def counts(self, call: Call) -> Counts:
        """Of a call, which should have been made before."""
        launches, descriptors = self._launches(), self._descriptors()
        with _Operations() as seen:
            call()
        made = self._launches() - launches, self._descriptors() - descriptors
        return Counts(*made, seen.products, seen.operations, seen.views)


@contextlib.contextmanager
def driver() -> Iterator[Driver]:
    """Triton launches into the void from here on: for a process of its own.

    Raises:
        RuntimeError: Triton has a driver already, or there is no C compiler.
    """
    if triton.runtime.driver._active is not None:
        raise RuntimeError("Triton has a driver already: take a process that has not launched a kernel")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder, LIBRARY)
        # The name by which Triton's own libraries, which are linked to it, find it loaded.
        command = ["cc", "-O2", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", "-o", str(path), str(SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError("no C compiler: install one as `cc`") from None
        stack.enter_context(mock.patch.dict(os.environ, {"TRITON_LIBCUDA_PATH": folder}))
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaDriver

        active = CudaDriver()
        active.get_current_device = lambda: 0
        active.get_current_stream = lambda _: 0
        active.get_current_target = lambda: GPUTarget("cuda", ARCHITECTURE, 32)
        stack.enter_context(mock.patch.multiple(triton.runtime.driver, _active=active, _default=active))
        yield Driver(library)


@contextlib.contextmanager
def on_gpu() -> Iterator[None]:
    """Tensors of the CPU pass for an H100's, and products of the losses' Triton engine are left out."""
    from fastclap.kernels.contrastive import triton_engine

    with (
        mock.patch.object(dispatch, "on_gpu", lambda _: True),
        mock.patch.object(dispatch, "architecture", lambda _: ARCHITECTURE),
        mock.patch.object(dispatch, "multiprocessors", lambda _: MULTIPROCESSORS),
        mock.patch.object(triton_engine, "_multiply", _multiply),
    ):
        yield


_ONE = torch.ones(1, 1)


def _multiply(left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor:
    """An operation as torch's product is one, on a single number."""
    if total is not None:
        torch.addmm(_ONE, _ONE, _ONE)
        return total
    torch.mm(_ONE, _ONE)
    return torch.empty(left.shape[0], right.shape[1], device=left.device)


@triton.jit
def empty_kernel(x, size, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """As little as a kernel can be."""


@triton.jit
def described_kernel(x, y):  # type: ignore[no-untyped-def]
    """The same of two descriptors, of one matrix."""
    y.store([0, 0], y.load([0, 0]))
    x.store([0, 0], x.load([0, 0]))


# ---------------------------------------------------------------------------------------------------------------------
# forms


@dataclass(frozen=True)
class Form:
    """What is measured: `call` of (a, b, scale); `ours` counts at every number of rows."""

    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    ours: bool = True
    backward: bool = True

    def ready(self, rows: int, dim: int) -> Call:
        """A call on fixed inputs: a step's forward and backward pass."""
        a, b, scale = timing.embeddings(rows, dim, peers.SCALE, CPU, torch.bfloat16)
        if not self.backward:
            return torch.no_grad()(lambda: self.call(a, b, scale))

        def step() -> None:
            a.grad = b.grad = scale.grad = None
            self.call(a, b, scale).backward()

        return step


def _with_ids(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    ids = _ids(a.shape[0])
    return info_nce(a, b, scale, a_ids=ids, b_ids=ids, backend="triton")


@functools.cache
def _ids(rows: int) -> Tensor:
    """Two rows of each."""
    return torch.arange(rows) // 2


def _with_guide(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    rows = _more_rows(a.shape[0], a.shape[1])
    return info_nce(a, b, scale, teacher=(rows, rows, 1.0), guide_margin=0.05, backend="triton")


def _with_queue(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    from fastclap.kernels.contrastive.shared import QueueRows  # of checkouts that have queues

    rows = _more_rows(a.shape[0], a.shape[1])
    return info_nce(a, b, scale, queue=QueueRows(rows, rows), backend="triton")


@functools.cache
def _more_rows(rows: int, dim: int) -> Tensor:
    """Of a guide, or of a queue."""
    return timing.embeddings(rows, dim, 1.0, CPU, torch.bfloat16, seed=1)[0].detach()


def _plain(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return info_nce(a, b, scale, backend="triton")


def forms() -> dict[str, Form]:
    """By name; open_clip's is absent where the package is."""
    found = {
        "fastclap": Form(_plain),
        "fastclap, ids": Form(_with_ids),
        "fastclap, forward only": Form(_plain, backward=False),
        "fastclap, sigmoid": Form(lambda a, b, scale: sigmoid_loss(a, b, scale, peers.SIGMOID_BIAS, backend="triton")),
        "materialised sigmoid": Form(peers.materialised_sigmoid, ours=False),
    }
    options = inspect.signature(info_nce).parameters  # another checkout may lack some
    for option, call in (("guide_margin", _with_guide), ("queue", _with_queue)):
        if option in options:
            found[f"fastclap, {option.partition('_')[0]}"] = Form(call)
    for peer in peers.info_nce_peers(CPU, peers.SCALE):
        if peer.name in ("materialised", "open_clip") and peer.run is not None:
            found[peer.name] = Form(peer.run, ours=False)
    return found


def interleaved(calls: dict[str, Call], repeats: int) -> dict[str, timing.Timing]:
    """Milliseconds a call, one of each in turn, after a warm-up."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    gc.collect()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: timing.Timing.of(values) for name, values in samples.items()}


# ---------------------------------------------------------------------------------------------------------------------
# first calls


@dataclass(frozen=True)
class First:
    """The first call of a process: seconds, and how many kernels were compiled in it."""

    seconds: float
    kernels: int


def first_call(name: str, rows: int, dim: int) -> First:
    """In a process of its own, with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--first", name, "--rows", str(rows), "--dim", str(dim)]
        # As a script, this file's folder comes first on the path; the packages are those that this process has.
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the first call of {name} failed:\n{done.stderr}")
        return First(float(done.stdout.split()[-1]), len(list(Path(cache).glob("*/*.cubin"))))


def _time_first_call(name: str, rows: int, dim: int) -> None:
    with driver(), on_gpu():
        call = forms()[name].ready(rows, dim)
        start = time.perf_counter()
        call()
        print(time.perf_counter() - start)


# ---------------------------------------------------------------------------------------------------------------------
# the page


def measure(rows: Sequence[int], dim: int, repeats: int, first: bool) -> dict[str, Any]:
    """What is to be printed, as JSON has it."""
    record: dict[str, Any] = {"machine": timing.machine(CPU), "torch": torch.__version__, "triton": triton.__version__}
    with driver() as counter, on_gpu():
        found = forms()
        calls = {name: form.ready(TIMED_ROWS, TIMED_DIM) for name, form in found.items()}
        x = torch.zeros(TIMED_ROWS)
        calls["one empty Triton kernel"] = lambda: empty_kernel[(1,)](x, TIMED_ROWS, WIDTH=16)
        calls["one operation of torch"] = lambda: x.add(1.0)
        times = interleaved(calls, repeats)
        record["microseconds"] = {
            name: [round(1e3 * value, 1) for value in (taken.median_ms, taken.p10_ms, taken.p90_ms)]
            for name, taken in times.items()
        }
        record["counts"] = {}
        for name, form in found.items():
            sizes = [(n, dim) for n in rows] if form.ours else [(TIMED_ROWS, TIMED_DIM)]
            for n, depth in [(TIMED_ROWS, TIMED_DIM), *sizes] if form.ours else sizes:
                call = form.ready(n, depth)
                call()
                record["counts"].setdefault(name, {})[n] = asdict(counter.counts(call))
    if first:
        ours = [name for name, form in found.items() if form.ours]
        record["first"] = {name: asdict(first_call(name, min(rows), dim)) for name in ours}
    return record


def page(record: dict[str, Any]) -> str:
    """Markdown."""
    machine = record["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} thread(s), torch {record['torch']}, triton {record['triton']}",
        "",
    ]
    names = [field.name for field in fields(Counts)]
    counted = []
    for name, by_rows in record["counts"].items():
        groups: dict[tuple[int, ...], list[str]] = {}
        for n, counts in by_rows.items():
            groups.setdefault(tuple(counts[field] for field in names), []).append(str(n))
        counted += [(name, ", ".join(sizes), *map(str, counts)) for counts, sizes in groups.items()]
    lines += [markdown(("form", "rows", *names), counted), ""]
    timed = [(name, *map(str, values)) for name, values in record["microseconds"].items()]
    lines += [markdown((f"host time of {TIMED_ROWS} rows, µs", "median", "10 %", "90 %"), timed), ""]
    if "first" in record:
        firsts = [(name, f"{x['seconds']:.1f}", str(x["kernels"])) for name, x in record["first"].items()]
        lines += [markdown(("first call", "seconds", "kernels compiled"), firsts), ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--no-first", action="store_true", help="leave out the first calls, which compile everything")
    parser.add_argument("--out", type=Path, help="file for the record, as JSON")
    parser.add_argument("--first", choices=list(forms()), help=argparse.SUPPRESS)  # how this starts itself
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.first:
        _time_first_call(args.first, args.rows[0], args.dim)
        return 0
    record = measure(args.rows, args.dim, args.repeats, not args.no_first)
    print(page(record))
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
