"""The C++ log-mel engine (csrc/) for CPU tensors that need no gradient: waveform to features in one pass.

The library has a plain C interface and is loaded by ctypes, which releases the interpreter lock for the call; so one
build serves every torch and every Python. It is optional: an installation made without a compiler has none, `available`
says so and `operator.log_mel` computes with torch. It keeps no state but immutable plans and runs on torch's threads,
or on threads of each call in a process that may have been forked (data workers) and so has lost torch's: it may be used
before and after a fork and from several threads at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import multiprocessing
import os
import sys
import warnings
import weakref
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastclap.kernels.log_mel.spec import EDGES, Batch, LogMelSpec, mel_bank, window
from fastclap.kernels.log_mel.torch_engine import normalised

LIBRARY_VARIABLE = "FASTCLAP_NATIVE_LIBRARY"
_LIBRARY_NAME = "libfastclap_native.dylib" if sys.platform == "darwin" else "libfastclap_native.so"

# Values of fastclap_native.h.
_INTERFACE = 2
_SIMD = {"auto": 0, "portable": 1, "avx2": 2, "avx512": 3}
_INVALID, _UNSUPPORTED = 1, 2
_MESSAGE_SIZE = 256

_INTEGERS = ("n_fft", "win_length", "hop_length", "n_mels", "offset", "edge", "remove_dc", "power")
_DOUBLES = ("preemphasis", "input_scale", "log_scale", "floor", "log_padding", "dynamic_range", "mean", "std")


class _Config(ctypes.Structure):
    """fastclap_log_mel_config."""

    _fields_ = [(name, ctypes.c_int64) for name in _INTEGERS] + [(name, ctypes.c_double) for name in _DOUBLES]


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    """(library, its path), or (None, why there is none)."""
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        path = Path(named)
        if not path.is_file():
            return None, f"{LIBRARY_VARIABLE}={named}: no such file"
    else:
        # An editable install leaves the modules in the source tree and puts what was built into site-packages: both are
        # portions of the namespace package.
        folders = [Path(folder) for folder in sys.modules[__name__.rpartition(".")[0]].__path__]
        found = [folder / _LIBRARY_NAME for folder in folders if (folder / _LIBRARY_NAME).is_file()]
        if not found:
            return None, "not built: fastclap was installed without a C++ compiler or with FASTCLAP_PURE, or not at all"
        path = found[0]
    try:
        library = ctypes.CDLL(str(path.resolve()))
        if library.fastclap_interface() != _INTERFACE:
            return None, f"{path} was built from other sources than these; install fastclap again"
        pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        message = (ctypes.c_char_p, int64)
        library.fastclap_simd_supported.argtypes = (int32,)
        library.fastclap_log_mel_create.argtypes = (pointer, pointer, pointer, int32, pointer, *message)
        library.fastclap_log_mel_destroy.argtypes = (pointer,)
        library.fastclap_log_mel_destroy.restype = None
        library.fastclap_log_mel_run.argtypes = (
            *(pointer, pointer, int32, int64, int64, int64),
            *(pointer, pointer, int64, pointer, int32, pointer, *message),
        )
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}"
    return library, str(path)


def available() -> bool:
    """Whether the library is there and loads."""
    return _load()[0] is not None


def description() -> str:
    """One line for a person: where the library is and which SIMD path it takes, or why there is none."""
    library, text = _load()
    return text if library is None else f"{text} ({simd_paths()[0]})"


def simd_paths() -> tuple[str, ...]:
    """The SIMD paths that this processor runs, the one chosen by "auto" first; empty without the library."""
    library, _ = _load()
    if library is None:
        return ()
    return tuple(name for name in ("avx512", "avx2", "portable") if library.fastclap_simd_supported(_SIMD[name]))


_PAGE = 2 << 20
_KEPT_BLOCKS, _KEPT_BYTES = 4, 128 << 20
_kept: list[mmap.mmap] = []  # memory of features that were dropped, for the next ones


def _memory(*shape: int) -> Tensor:
    """An uninitialised float32 tensor.

    The system takes longer to hand out a new page of 4 KB than the engine to fill it, and torch asks for new ones
    wherever a loop drops its last features after it has the next. So features of more than 2 MB lie in pages of that
    size, and some that are dropped leave their memory to the next ones.
    """
    count = math.prod(shape)
    size = -(-4 * count // _PAGE) * _PAGE
    if size < 2 * _PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=torch.float32)
    block = None
    for kept in list(_kept):
        if size + _PAGE <= len(kept) <= 2 * size + _PAGE:
            with contextlib.suppress(ValueError):  # another thread was faster
                _kept.remove(kept)
                block = kept
                break
    if block is None:
        block = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without large pages
            block.madvise(mmap.MADV_HUGEPAGE)
    owner = (ctypes.c_char * len(block)).from_buffer(block)  # lives as long as the tensor's memory is in use
    weakref.finalize(owner, _keep, block).atexit = False
    offset = -ctypes.addressof(owner) % _PAGE
    return torch.frombuffer(owner, dtype=torch.float32, count=count, offset=offset).view(shape)


def _keep(block: mmap.mmap) -> None:
    _kept.append(block)
    with contextlib.suppress(IndexError):  # another thread was faster
        while len(_kept) > _KEPT_BLOCKS or sum(map(len, _kept)) > _KEPT_BYTES:
            del _kept[0]


_IMPORTED_BY = os.getpid()


@lru_cache(maxsize=1)
def _team() -> int | None:
    """GOMP_parallel of the OpenMP runtime that torch runs on; None where torch has another, or in a child process."""
    if multiprocessing.parent_process() is not None:
        return None
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        try:
            runtime = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


class _LibraryPlan:
    """A fastclap_log_mel_plan: the tables of one front-end for one SIMD path."""

    def __init__(self, library: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self.handle = handle
        weakref.finalize(self, library.fastclap_log_mel_destroy, handle)


@lru_cache(maxsize=64)
def _plan(spec: LogMelSpec, simd: str) -> _LibraryPlan | str:
    """The plan, or why the library does not cover this front-end."""
    library, text = _load()
    if library is None:
        return text
    taps = np.ascontiguousarray(window(spec), dtype=np.float64)
    bank = np.ascontiguousarray(mel_bank(spec), dtype=np.float64)
    config = _Config(
        n_fft=spec.n_fft,
        win_length=spec.win_length,
        hop_length=spec.hop_length,
        n_mels=spec.n_mels,
        offset=spec.offset,
        edge=EDGES[spec.framing],
        remove_dc=spec.remove_dc,
        power=int(spec.power),
        preemphasis=spec.preemphasis,
        input_scale=spec.input_scale,
        log_scale=spec.log_scale,
        floor=spec.floor,
        log_padding=spec.log_padding,
        dynamic_range=-1.0 if spec.dynamic_range is None else spec.dynamic_range,
        mean=spec.mean if spec.one_affine else 0.0,
        std=spec.std if spec.one_affine else 1.0,
    )
    handle = ctypes.c_void_p()
    message = ctypes.create_string_buffer(_MESSAGE_SIZE)
    code = library.fastclap_log_mel_create(
        ctypes.byref(config),
        taps.ctypes.data,
        bank.ctypes.data,
        _SIMD[simd],
        ctypes.byref(handle),
        message,
        _MESSAGE_SIZE,
    )
    if code == _UNSUPPORTED:
        return message.value.decode()
    _raise(code, message)
    return _LibraryPlan(library, handle)


def _raise(code: int, message: ctypes.Array[ctypes.c_char]) -> None:
    if code:
        kind = ValueError if code == _INVALID else MemoryError
        raise kind(f"native log-mel engine: {message.value.decode()}")


@lru_cache(maxsize=1)
def _warn_once() -> None:
    warnings.warn(
        f"log-mel features are computed with torch, several times slower than by the native engine: {description()}",
        RuntimeWarning,
        stacklevel=6,  # the caller of `operator.log_mel`
    )


def why_not(waveform: Tensor, spec: LogMelSpec) -> str | None:
    """Why `log_mel_native` cannot compute these features; None if it can.

    It takes a CPU tensor without a gradient and a front-end that the library covers. Warns once in a process if all
    that is missing is the library.
    """
    if waveform.device.type != "cpu":
        return f"the waveform must be on the CPU, is on {waveform.device}"
    if waveform.requires_grad and torch.is_grad_enabled():
        return "the waveform requires a gradient"
    if not available():
        _warn_once()
        return description()
    plan = _plan(spec, "auto")
    return plan if isinstance(plan, str) else None


def log_mel_native(
    batch: Batch,
    spec: LogMelSpec,
    *,
    simd: str = "auto",
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`operator.log_mel` of a batch, before masks: (features [B, frames, n_mels], frame lengths [B]).

    Float samples far above full scale (1e17) may overflow to infinite features.

    Args:
        batch: on the CPU; no gradient reaches it.
        spec: without dither.
        simd: one of `simd_paths()`; they differ by float32 rounding.
        threads: None for torch.get_num_threads(); the result does not depend on it.

    Raises:
        RuntimeError: there is no library.
        NotImplementedError: it does not cover the front-end: n_fft above 2048 or with a prime factor above 5, more than
            4096 mels, a floor below 1e-37.
    """
    if simd not in _SIMD:
        raise ValueError(f"simd={simd!r}: choose one of {', '.join(_SIMD)}")
    library, text = _load()
    if library is None:
        raise RuntimeError(f"no native log-mel engine: {text}")
    plan = _plan(spec, simd)
    if isinstance(plan, str):
        raise NotImplementedError(f"native log-mel engine: {plan}")
    waveform, lengths, _, frame_lengths = batch.readable((torch.int16, torch.float32)).cropped(spec)
    clips, samples = waveform.shape
    lengths = torch.full((clips,), samples) if lengths is None else lengths.contiguous()
    features = _memory(clips, spec.padded_frames(samples), spec.n_mels)
    message = ctypes.create_string_buffer(_MESSAGE_SIZE)
    code = library.fastclap_log_mel_run(
        plan.handle,
        waveform.data_ptr(),
        int(waveform.dtype == torch.int16),
        clips,
        samples,
        waveform.stride(0),
        lengths.data_ptr(),
        frame_lengths.data_ptr(),
        features.shape[1],
        features.data_ptr(),
        min(torch.get_num_threads() if threads is None else threads, 256),
        _team() if os.getpid() == _IMPORTED_BY else None,
        message,
        _MESSAGE_SIZE,
    )
    _raise(code, message)
    if not spec.one_affine:
        features = normalised(features, spec)
    return features.to(getattr(torch, spec.dtype)), frame_lengths
