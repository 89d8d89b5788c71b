"""The C++ log-mel engine (csrc/), for CPU tensors that need no gradient: the same function as `logmel.log_mel`, one pass.

The library has a plain C interface and is loaded by ctypes (which releases the interpreter lock for the call), so a build
serves every torch and every Python. It is optional: an installation without a compiler has none, `available()` says so
and `logmel.log_mel` computes with torch. It keeps no state but immutable plans and starts its threads per call, so it may
be used before and after a fork (data workers), and from several threads.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
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

from fastclap.kernels.logmel import LogMelSpec, _check, mel_bank, window

LIBRARY_VARIABLE = "FASTCLAP_NATIVE_LIBRARY"
_LIBRARY_NAME = {"darwin": "libfastclap_native.dylib"}.get(sys.platform, "libfastclap_native.so")

# Values of fastclap_native.h.
_SIMD = {"auto": 0, "portable": 1, "avx2": 2, "avx512": 3}
_UNSUPPORTED = 2
_EDGE = {"snip_edges": 0, "center": 1, "no_snip_edges": 2}
_LOG_SCALE = {"ln": 1.0, "log10": 1.0 / math.log(10.0), "db": 10.0 / math.log(10.0)}
_INT64_MAX = 2**63 - 1


class _Config(ctypes.Structure):
    """fastclap_log_mel_config."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("n_fft", "win_length", "hop_length", "n_mels", "offset", "edge", "remove_dc", "power")
        ),
        *(
            (name, ctypes.c_double)
            for name in (
                "preemphasis",
                "input_scale",
                "log_scale",
                "floor",
                "log_padding",
                "dynamic_range",
                "mean",
                "std",
            )
        ),
    ]


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    """(library, its path), or (None, why there is none)."""
    named = os.environ.get(LIBRARY_VARIABLE)
    # In an editable install the modules lie in the source tree and what was built in site-packages: both are portions of
    # the namespace package.
    folders = [Path(folder) for folder in sys.modules[__package__ or ""].__path__]
    candidates = [Path(named)] if named else [folder / _LIBRARY_NAME for folder in folders]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        if named:
            return None, f"{LIBRARY_VARIABLE}={named}: no such file"
        return None, "built without it (no C++ compiler, FASTCLAP_PURE=1, or run from a source tree that was not installed)"
    try:
        library = ctypes.CDLL(str(path))
        library.fastclap_log_mel_create.argtypes = [
            ctypes.POINTER(_Config),
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_char_p,
            ctypes.c_int64,
        ]
        library.fastclap_log_mel_destroy.argtypes = [ctypes.c_void_p]
        library.fastclap_log_mel_destroy.restype = None
        library.fastclap_log_mel_run.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_int64,
        ]
        library.fastclap_simd_supported.argtypes = [ctypes.c_int]
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


class _Plan:
    """A fastclap_log_mel_plan: the tables of one front-end for one SIMD path."""

    def __init__(self, library: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self.handle = handle
        self._finalizer = weakref.finalize(self, library.fastclap_log_mel_destroy, handle)


@lru_cache(maxsize=64)
def _plan(spec: LogMelSpec, simd: str) -> _Plan | str:
    """The plan, or why the library does not cover this front-end."""
    library, text = _load()
    if library is None:
        return text
    if max(spec.n_fft, spec.hop_length, spec.n_mels) > _INT64_MAX:
        return "a length above 2^63"
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
        mean=spec.mean,
        std=spec.std,
    )
    handle = ctypes.c_void_p()
    message = ctypes.create_string_buffer(256)
    code = library.fastclap_log_mel_create(
        ctypes.byref(config), taps.ctypes.data, bank.ctypes.data, _SIMD[simd], ctypes.byref(handle), message, 256
    )
    if code == _UNSUPPORTED:
        return message.value.decode()
    if code:
        raise ValueError(f"native log-mel engine: {message.value.decode()}")
    return _Plan(library, handle)


@lru_cache(maxsize=64)
def _without_dither(spec: LogMelSpec) -> LogMelSpec:
    return dataclasses.replace(spec, dither=0.0, input_scale=1.0)


@lru_cache(maxsize=1024)
def _frames(spec: LogMelSpec, samples: int) -> int:
    return int(spec.frame_lengths(torch.tensor(samples)))


@lru_cache(maxsize=1)
def _say_once() -> None:
    warnings.warn(
        f"log-mel features on the CPU are computed with torch, several times slower: the native engine is not there. "
        f"{description()}",
        RuntimeWarning,
        stacklevel=4,
    )


def usable(waveform: Tensor, spec: LogMelSpec) -> bool:
    """Whether `log_mel_native` takes this call: a plain CPU tensor outside of any transformation (gradients, compiling,
    tracing, vmap) and a front-end that the library covers. Warns once a process if the library itself is missing."""
    if (
        torch.compiler.is_compiling()
        or waveform.device.type != "cpu"
        or type(waveform) is not Tensor
        or (waveform.requires_grad and torch.is_grad_enabled())
        or torch.jit.is_tracing()
        or torch._C._functorch.is_functorch_wrapped_tensor(waveform)
        or forward_ad.unpack_dual(waveform).tangent is not None
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
    """`fastclap.kernels.logmel.log_mel` without gradients: (features [B, frames, n_mels] float32, frame_lengths [B]).

    The result does not depend on `threads`. `simd` names one of `simd_paths()`; they differ by float32 rounding.

    Raises RuntimeError without the library, NotImplementedError for a front-end that it does not cover (n_fft above 2048
    or with a prime factor above 5), and ValueError for what `log_mel` refuses.
    """
    if simd not in _SIMD:
        raise ValueError(f"simd={simd!r}: choose one of {', '.join(_SIMD)}")
    library, text = _load()
    if library is None:
        raise RuntimeError(f"the native log-mel engine is not there: {text}")
    if waveform.device.type != "cpu":
        raise ValueError(f"waveform must be on the CPU, got {waveform.device}")
    lengths = _check(waveform, lengths)
    batch, samples = waveform.shape
    if spec.dither:
        scale = spec.input_scale / 32768.0 if waveform.dtype == torch.int16 else spec.input_scale
        waveform = waveform.to(torch.float32) * scale
        waveform = waveform + spec.dither * torch.randn_like(waveform)
        spec = _without_dither(spec)
    plan = _plan(spec, simd)
    if isinstance(plan, str):
        raise NotImplementedError(f"native log-mel engine: {plan}")
    if waveform.dtype != torch.int16:
        waveform = waveform.to(torch.float32)
    waveform = waveform.resolve_neg()
    if waveform.stride(1) != 1:
        waveform = waveform.contiguous()
    frames = _frames(spec, samples)
    if lengths is None:
        lengths, frame_lengths = torch.full((batch,), samples), torch.full((batch,), frames)
    else:
        lengths, frame_lengths = lengths.contiguous(), spec.frame_lengths(lengths)
    features = torch.empty(batch, spec.num_frames or frames, spec.n_mels, dtype=torch.float32)
    message = ctypes.create_string_buffer(256)
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
        message,
        256,
    )
    if code:
        raise RuntimeError(f"native log-mel engine: {message.value.decode()}")
    return features, frame_lengths
