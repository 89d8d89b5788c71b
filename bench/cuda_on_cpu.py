"""The CUDA log-mel kernel on a CPU: its own source, compiled by g++ with as many threads as a block has.

    with cuda_on_cpu.installed():
        log_mel(waveform, None, spec, backend="cuda")  # of tensors on the CPU

csrc/emulate_cuda.cpp says what that shows. A sanitizer of g++ may watch it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from fastclap.kernels import dispatch
from fastclap.kernels.log_mel import cuda_engine
from fastclap.kernels.log_mel.spec import LogMelSpec

EMULATOR = cuda_engine.SOURCE.parent / "emulate_cuda.cpp"
ARCHITECTURE = 90


def compiler() -> str | None:
    """g++, which has the 16-bit floats that clang gives to fewer processors."""
    return shutil.which("g++")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fastclap-emulator-")


def broken_source(kernel: str) -> Path:
    """The emulator around another kernel, to see whether a fault is found."""
    folder = Path(tempfile.mkdtemp(dir=_folder().name))
    (folder / cuda_engine.SOURCE.name).write_text(kernel)
    return Path(shutil.copy(EMULATOR, folder))


@functools.cache
def _program(emulator: Path, options: tuple[str, ...], sanitizer: str) -> str:
    """The emulator of one form."""
    checks = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g1") if sanitizer else ()
    name = hashlib.sha256(repr((emulator, options, sanitizer)).encode()).hexdigest()[:16]
    path = os.path.join(_folder().name, name)
    found = compiler()
    assert found is not None, "there is no g++"
    flags = ("-std=c++17", "-O1", "-march=native", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread")
    subprocess.run([found, *flags, *checks, *options, str(emulator), "-o", path], check=True)
    return path


class _Emulator:
    """In the place of `cuda_tools.Kernel`, for tensors on the CPU."""

    def __init__(self, spec: LogMelSpec, dtype: torch.dtype, masks: bool, sanitizer: str) -> None:
        self.spec, self.dtype = spec, dtype
        self.program = _program(EMULATOR, cuda_engine.options(spec, dtype, masks), sanitizer)

    def _sizes(self, a: cuda_engine._Arguments) -> dict[str, int]:
        """Bytes of every array, in the order in which the emulator reads them."""
        found = cuda_engine.layout(self.spec)
        assert isinstance(found, cuda_engine.Layout)
        tables = cuda_engine._tables(self.spec, found, self.dtype)
        names = ("columns", "weights", "runs", "first_bins", "logarithms", "affine")
        return {
            "waveform": ((a.clips - 1) * a.row_stride + a.samples) * self.dtype.itemsize,
            **dict.fromkeys(("offsets", "lengths"), 8 * a.clips),
            **{name: tables[name].nbytes for name in names},
            "time_masks": 16 * a.clips * a.time_spans,
            "mel_masks": 16 * a.clips * a.mel_spans,
            "features": a.clips * a.frames * self.spec.n_mels * getattr(torch, self.spec.dtype).itemsize,
            "frame_lengths": 8 * a.clips,
            "states": 8 * a.clips,
        }

    def launch(self, grid: tuple[int, int, int], threads: int, arguments: cuda_engine._Arguments) -> None:
        sizes = self._sizes(arguments)
        with tempfile.TemporaryDirectory() as folder:
            given, results = Path(folder, "input"), Path(folder, "output")
            with given.open("wb") as file:
                file.write(struct.pack("=3Iq", *grid, ctypes.sizeof(arguments)) + bytes(arguments))
                for name, size in sizes.items():
                    pointer = getattr(arguments, name)
                    file.write(struct.pack("=2q", (pointer or 0) % 16, -1 if pointer is None else size))
                    if pointer is not None:
                        file.write(ctypes.string_at(pointer, size))
            subprocess.run([self.program, str(given), str(results)], check=True)
            content, at = results.read_bytes(), 0
            for name in ("features", "frame_lengths", "states"):
                if getattr(arguments, name) is not None:
                    ctypes.memmove(getattr(arguments, name), content[at : at + sizes[name]], sizes[name])
                    at += sizes[name]
            assert at == len(content)


@contextlib.contextmanager
def installed(sanitizer: str = "") -> Iterator[None]:
    """Inside it backend="cuda" takes tensors on the CPU.

    Args:
        sanitizer: of g++, such as "address,undefined" or "thread"; what it finds is a subprocess.CalledProcessError.
    """

    def load(spec: LogMelSpec, dtype: torch.dtype, masks: bool, device: torch.device) -> _Emulator:
        return _Emulator(spec, dtype, masks, sanitizer)

    cuda_engine._plan.cache_clear()
    with (
        mock.patch.object(cuda_engine, "_load", load),
        mock.patch.object(dispatch, "on_gpu", lambda x: True),
        mock.patch.object(dispatch, "architecture", lambda index: ARCHITECTURE),
    ):
        try:
            yield
        finally:
            cuda_engine._plan.cache_clear()
