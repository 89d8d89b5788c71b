"""The C++ log-mel engine (csrc/) for CPU tensors that need no gradient: the function of `logmel.log_mel` in one pass.

The library has a plain C interface and is loaded by ctypes, which releases the interpreter lock for the call; so one
build serves every torch and every Python. It is optional: an installation made without a compiler has none, `available`
says so and `logmel.log_mel` computes with torch. It keeps no state but immutable plans and runs on torch's threads, or
on threads of each call in a process that may have been forked (data workers) and so has lost torch's: it may be used
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
from torch.autograd import forward_ad

from fastclap.kernels.log_mel.operator import _check
from fastclap.kernels.log_mel.spec import LogMelSpec, mel_bank, window
from fastclap.kernels.log_mel.torch_engine import _scaled, normalised

LIBRARY_VARIABLE = "FASTCLAP_NATIVE_LIBRARY"
_LIBRARY_NAME = "libfastclap_native.dylib" if sys.platform == "darwin" else "libfastclap_native.so"

# Values of fastclap_native.h.
_INTERFACE = 2
_SIMD = {"auto": 0, "portable": 1, "avx2": 2, "avx512": 3}
_INVALID, _UNSUPPORTED = 1, 2
_EDGE = {"snip_edges": 0, "center": 1, "no_snip_edges": 2}
_LOG_SCALE = {"ln": 1.0, "log10": 1.0 / math.log(10.0), "db": 10.0 / math.log(10.0)}
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


class _Plan:
    """A fastclap_log_mel_plan: the tables of one front-end for one SIMD path."""

    def __init__(self, library: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self.handle = handle
        weakref.finalize(self, library.fastclap_log_mel_destroy, handle)


@lru_cache(maxsize=64)
def _plan(spec: LogMelSpec, simd: str) -> _Plan | str:
    """The plan, or why the library does not cover this front-end."""
    library, text = _load()
    if library is None:
        return text
    if max(spec.n_fft, spec.hop_length, spec.n_mels) > 2**31:  # ctypes would cut off the higher bits
        return "n_fft, hop_length or n_mels is above 2^31"
    taps = np.ascontiguousarray(window(spec), dtype=np.float64)
    bank = np.ascontiguousarray(mel_bank(spec), dtype=np.float64)
    config = _Config(
        n_fft=spec.n_fft,
        win_length=spec.win_length,
        hop_length=spec.hop_length,
        n_mels=spec.n_mels,
        offset=spec.offset,
        edge=_EDGE[spec.framing],
        remove_dc=spec.remove_dc,
        power=int(spec.power),
        preemphasis=spec.preemphasis,
        input_scale=spec.input_scale,
        log_scale=_LOG_SCALE[spec.log],
        floor=spec.floor,
        log_padding=spec.log_padding,
        dynamic_range=-1.0 if spec.dynamic_range is None else spec.dynamic_range,
        mean=spec.mean if _one_affine(spec) else 0.0,
        std=spec.std if _one_affine(spec) else 1.0,
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
    return _Plan(library, handle)


def _raise(code: int, message: ctypes.Array[ctypes.c_char]) -> None:
    if code:
        kind = ValueError if code == _INVALID else MemoryError
        raise kind(f"native log-mel engine: {message.value.decode()}")


def _one_affine(spec: LogMelSpec) -> bool:
    """Whether the library normalises; for a mean or deviation of each mel, torch does after it."""
    return isinstance(spec.mean, float) and isinstance(spec.std, float)


@lru_cache(maxsize=1)
def _say_once() -> None:
    warnings.warn(
        f"log-mel features are computed with torch, several times slower than by the native engine: {description()}",
        RuntimeWarning,
        stacklevel=5,
    )


def plain(waveform: Tensor) -> bool:
    """Whether engines other than torch can follow this tensor: no forward-mode or functorch transform, no trace."""
    return not (
        type(waveform) is not Tensor
        or torch.jit.is_tracing()
        or torch._C._functorch.is_functorch_wrapped_tensor(waveform)
        or forward_ad.unpack_dual(waveform).tangent is not None
    )


def usable(waveform: Tensor, spec: LogMelSpec) -> bool:
    """Whether `log_mel_native` stands for `log_mel` in this call.

    That takes a plain CPU tensor outside of what only torch operations can follow (a gradient, forward-mode or
    functorch transforms, compiling, tracing) and a front-end that the library covers. Warns once a process if all that
    is missing is the library.
    """
    if (
        torch.compiler.is_compiling()
        or waveform.device.type != "cpu"
        or (waveform.requires_grad and torch.is_grad_enabled())
        or not plain(waveform)
    ):
        return False
    if not available():
        _say_once()
        return False
    return isinstance(_plan(spec, "auto"), _Plan)


def log_mel_native(
    waveform: Tensor,  # [B, T] int16, or floating point in [-1, 1]; on the CPU
    lengths: Tensor | None,  # [B] integers, samples of each clip; None: all T
    spec: LogMelSpec,
    *,
    simd: str = "auto",
    threads: int | None = None,  # None: torch.get_num_threads()
) -> tuple[Tensor, Tensor]:
    """`fastclap.kernels.log_mel.operator.log_mel` without gradients: (features [B, frames, n_mels], frame_lengths [B]).

    The result does not depend on `threads`. `simd` names one of `simd_paths()`; they differ by float32 rounding. Float
    samples far above full scale (1e17) may overflow to infinite features.

    Raises RuntimeError without the library, NotImplementedError for a front-end that it does not cover (n_fft above
    2048 or with a prime factor above 5, more than 4096 mels, a floor below 1e-37), and ValueError for what `log_mel`
    refuses.
    """
    if simd not in _SIMD:
        raise ValueError(f"simd={simd!r}: choose one of {', '.join(_SIMD)}")
    library, text = _load()
    if library is None:
        raise RuntimeError(f"no native log-mel engine: {text}")
    lengths, _ = _check(waveform, lengths)
    if waveform.device.type != "cpu":
        raise ValueError(f"waveform must be on the CPU, got {waveform.device}")
    if spec.dither:
        waveform, spec = _scaled(waveform, spec), spec.noiseless
    plan = _plan(spec, simd)
    if isinstance(plan, str):
        raise NotImplementedError(f"native log-mel engine: {plan}")
    if waveform.dtype != torch.int16:
        waveform = waveform.to(torch.float32)
    waveform = waveform.resolve_neg()
    if waveform.stride(1) != 1:
        waveform = waveform.contiguous()
    batch, samples = waveform.shape
    frames = spec.frames(samples)
    if lengths is None:
        lengths, frame_lengths = torch.full((batch,), samples), torch.full((batch,), frames)
    else:
        lengths, frame_lengths = lengths.contiguous(), spec.frame_lengths(lengths)
    features = _memory(batch, spec.num_frames or frames, spec.n_mels)
    message = ctypes.create_string_buffer(_MESSAGE_SIZE)
    code = library.fastclap_log_mel_run(
        plan.handle,
        waveform.data_ptr(),
        int(waveform.dtype == torch.int16),
        batch,
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
    if not _one_affine(spec):
        features = normalised(features, spec)
    return features.to(getattr(torch, spec.dtype)), frame_lengths
