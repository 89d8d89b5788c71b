"""Compiles the kernels that a lot launches, in parallel, into Triton's cache and our own, before anything is timed.

A process that ends with the work rehearses the forms (`bench.gpu.rehearsal`), which gives the very keys that the
launches will look up in Triton's cache, and forks one process for each kernel that is missing there, as many at once as
there are processors. The caller's process keeps no trace of it. Where there is a driver for the GPU, the small C module
with which Triton starts the kernels of a signature is built too.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from bench import timing
from bench.gpu.forms import chosen
from bench.gpu.rehearsal import CudaForm, launched
from bench.gpu.watch import GRACE, die_with_parent
from fastclap.kernels.log_mel import cuda_engine
from fastclap.kernels.offline import Compilation, compiled_kernel, is_cached

PROGRESS_SECONDS = 5.0
# That a processor takes to compile a kernel for sm_90, by how its name begins; the others take less than one second.
SECONDS = {"log_mel log_mel": 1.5, "contrastive": 2.0, "toeplitz_attention": 1.5}

_fork = multiprocessing.get_context("fork")


def compile_forms(prefixes: Sequence[str], arch: int, seconds: float, calls: Sequence[str] = ()) -> dict[str, Any]:
    """Compiles the kernels of the forms whose names begin with any of these, as far as Triton's cache lacks them.

    Args:
        prefixes: of names of `bench.gpu.forms`.
        arch: compute capability of the GPU, such as 90.
        seconds: until it stops, with what it has.
        calls: "module:function" that makes a call, which is rehearsed too.

    Returns:
        `kernels`, of which `hits` were in the cache and `misses` not, `done` of the latter, and `seconds`.
        `failed`: what did not compile or could not be rehearsed, and why. `unfinished`: what there was no time for.

    Raises:
        ValueError: no form has a name that begins with one of the prefixes.
    """
    chosen(prefixes)
    start = time.monotonic()
    here, there = _fork.Pipe(duplex=False)
    process = _fork.Process(target=_compile, args=(there, tuple(prefixes), tuple(calls), arch, start, seconds))
    process.start()
    assert process.pid is not None
    there.close()
    found: dict[str, Any] = {}
    try:
        while here.poll(max(0.0, start + seconds + GRACE - time.monotonic())):
            found = here.recv()  # the latest progress
    except EOFError:  # it has ended
        process.join(GRACE)
        if process.exitcode != 0:
            reason = f"the process that starts them ended with {process.exitcode}"
            found["failed"] = {**found.get("failed", {}), "all others": reason}
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it started lives in its process group
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    return {**Progress().report(0.0), **found}


@dataclass
class Progress:
    """How many kernels are compiled, and which are not."""

    hits: int = 0
    misses: int = 0
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)

    def report(self, seconds: float) -> dict[str, Any]:
        return {"kernels": self.hits + self.misses, **vars(self), "seconds": round(seconds, 1)}

    def line(self, seconds: float) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return (
            f"[compile] {self.hits + self.misses} kernels: {self.hits} hits, {self.misses} misses, {self.done} done"
            f"{failed}, {seconds:.0f} s"
        )


def _compile(
    out: Connection, prefixes: tuple[str, ...], calls: tuple[str, ...], arch: int, start: float, seconds: float
) -> None:
    """Rehearses, compiles, and sends its progress whenever that changes."""
    import torch

    die_with_parent()
    os.setsid()
    torch.set_num_threads(1)  # threads would not survive the forks
    progress = Progress()
    missing: list[Compilation | CudaForm] = []
    for compilation in rehearsed(prefixes, arch, progress.failed, calls).values():
        if _is_cached(compilation, arch):
            progress.hits += 1
        else:
            progress.misses += 1
            missing.append(compilation)
    missing.sort(key=_expected_seconds)  # the last comes first
    with_launchers = _has_driver()
    running: dict[Connection, tuple[Any, str]] = {}
    said = 0.0
    while True:
        now = time.monotonic() - start
        while missing and len(running) < (os.cpu_count() or 1) and now < seconds:
            compilation = missing.pop()
            here, there = _fork.Pipe(duplex=False)
            process = _fork.Process(target=_compile_one, args=(there, compilation, arch, with_launchers))
            process.start()
            there.close()
            running[here] = (process, compilation.name)
        progress.unfinished = [name for _, name in running.values()] + [c.name for c in missing]
        out.send(progress.report(now))
        if not running or now >= seconds or now - said >= PROGRESS_SECONDS:
            print(progress.line(now), flush=True)
            said = now
        if not running or now >= seconds:
            break
        for ended in wait(list(running), timeout=min(1.0, seconds - now)):
            assert isinstance(ended, Connection)
            process, name = running.pop(ended)
            reason = _reason(ended, process)
            if reason is None:
                progress.done += 1
            else:
                progress.failed[name] = reason
                print(f"[compile] {name}: {reason}", flush=True)
    os._exit(0)


def rehearsed(
    prefixes: Sequence[str], arch: int, failed: dict[str, str], calls: Sequence[str] = ()
) -> dict[str, Compilation | CudaForm]:
    """What the forms and calls launch, by cache key; one that raises is added to `failed`."""
    import torch

    cpu = torch.device("cpu")
    named: dict[str, Callable[[], Any]] = {
        form.name: lambda form=form: form.ours(form.inputs(cpu))  # type: ignore[misc]
        for form in chosen(prefixes)
    }
    found: dict[str, Compilation | CudaForm] = {}
    for name in (*named, *calls):
        try:
            new = launched(named.get(name) or _made(name), arch)
        except Exception as error:
            failed[name] = timing.in_words(error)
        else:
            found = {key: _renamed(c, f"{c.name} of {name}") for key, c in new.items()} | found
    return found


def _renamed(c: Compilation | CudaForm, name: str) -> Compilation | CudaForm:
    return c._replace(name=name) if isinstance(c, CudaForm) else replace(c, name=name)


def _is_cached(c: Compilation | CudaForm, arch: int) -> bool:
    return cuda_engine.is_compiled(*c[1:], arch) if isinstance(c, CudaForm) else is_cached(c, arch)


def _made(name: str) -> Callable[[], Any]:
    """The call that a "module:function" makes."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)()


def _expected_seconds(c: Compilation | CudaForm) -> float:
    return next((seconds for name, seconds in SECONDS.items() if c.name.startswith(name)), 0.5)


def _has_driver() -> bool:
    from triton.backends.nvidia.driver import library_dirs

    try:
        library_dirs()
    except Exception:  # it asks the system's linker in several ways, each of which may fail
        return False
    return True


def _compile_one(out: Connection, c: Compilation | CudaForm, arch: int, with_launcher: bool) -> None:
    die_with_parent()
    reason = None
    try:
        if isinstance(c, CudaForm):
            cuda_engine.cubin(*c[1:], arch)
            kernel = None
        else:
            kernel = compiled_kernel(c, arch)
        if with_launcher and kernel is not None:
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(kernel.src, kernel.metadata)
    except Exception as error:
        reason = timing.in_words(error)
    out.send(reason)
    os._exit(0)


def _reason(ended: Connection, process: Any) -> str | None:
    """Why a compilation did not succeed; None if it did."""
    try:
        return ended.recv()
    except EOFError:
        process.join()
        return f"the process that compiles it ended with {process.exitcode}"
