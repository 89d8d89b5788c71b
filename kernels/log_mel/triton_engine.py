"""Triton engine of the log-mel front-ends, for GPUs and installations where the CUDA engine cannot be (see `operator`).

It is portable and plain: one kernel makes windowed frames, torch's FFT their spectra, a second kernel features. Frames
and spectra of some tiles at a time go through memory, few enough for a large L2 cache. A dynamic range, which needs the
maximum of the whole clip, takes a third kernel.

Every value is computed by one program in a fixed order: results are bit-identical from run to run, and a clip's do not
depend on what else is in the batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.log_mel.spec import EDGES, Batch, LogMelSpec, exponent_step, mel_bank, window
from fastclap.kernels.log_mel.triton_kernels import _features_kernel, _frames_kernel, _range_kernel
from fastclap.kernels.offline import Compilation, signature_and_attrs
from fastclap.kernels.triton_tools import TYPE_NAMES

BM, BK, BN = 32, 16, 16  # frames, bins and mels of a program of `_features_kernel`
FEW_FRAMES = 4  # of a program of `_frames_kernel`
CHUNK = 16 << 20  # bytes of frames that are made at a time
RANGE_WIDTH, RANGE_TOPS = 1024, 64  # values of a program of `_range_kernel`, maxima of tiles read at a time


@dataclass(frozen=True)
class _Plan:
    """What the kernels need to know of a front-end; numbers and constants by argument."""

    taps: Tensor  # [win_length] window
    bank: Tensor  # weights of groups of BN mels over the bins of each, one group after the other
    runs: Tensor  # [groups, 3] int32: first bin, how many, where the weights are
    affine: Tensor  # [2, mels]: mean, 1/std
    frames: dict[str, Any]  # of `_frames_kernel`
    features: dict[str, Any]  # of `_features_kernel`


@lru_cache(maxsize=64)
def _plan(spec: LogMelSpec, device: torch.device) -> _Plan:
    bank = mel_bank(spec)
    groups = -(-spec.n_mels // BN)
    bank = np.pad(bank, ((0, 0), (0, groups * BN - spec.n_mels)))
    runs, weights, start = [], [], 0
    for group in range(groups):
        columns = bank[:, group * BN : (group + 1) * BN]
        used = np.flatnonzero(columns.any(1))
        # A group without a bin has one of no weight: NaN of a bad frame is then NaN in all mels.
        first, end = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 1)
        runs.append((first, end - first, start))
        weights.append(columns[first:end].ravel())
        start += weights[-1].size
    affine = np.stack(np.broadcast_arrays(spec.mean, 1.0 / np.asarray(spec.std), np.zeros(spec.n_mels))[:2])

    def table(values: Any, dtype: Any = np.float32) -> Tensor:
        # inference_mode(False): a constant made inside a user's inference_mode could not be used for training later.
        with torch.inference_mode(False):
            return torch.from_numpy(np.ascontiguousarray(values, dtype)).to(device)

    add, plus = spec.count_terms
    log_high, log_low = exponent_step(spec.log_scale)
    return _Plan(
        table(window(spec)),
        table(np.concatenate(weights)),
        table(runs, np.int32),
        table(affine),
        {
            **{"hop": spec.hop_length, "shift": spec.offset, "rest": 1.0 - spec.preemphasis},
            **{"count_add": add, "count_plus": plus, "most_frames": spec.num_frames or 2**31 - 1},
            **_frame_flags(spec),
        },
        {
            **{"mels": spec.n_mels, "groups": groups, "floor": spec.floor, "padding": spec.log_padding},
            **{"log_high": log_high, "log_low": log_low},
            **_feature_flags(spec),
        },
    )


def _frame_flags(spec: LogMelSpec) -> dict[str, Any]:
    """Constants of `_frames_kernel` for a front-end, by name."""
    return {
        "EDGES": EDGES[spec.framing],
        "DC": spec.remove_dc,
        "PREEMPHASIS": spec.preemphasis > 0,
        "WIN": spec.win_length,
        "N_FFT": spec.n_fft,
        "BM": FEW_FRAMES,
        "WIDTH": triton.next_power_of_2(spec.n_fft),
    }


def _feature_flags(spec: LogMelSpec) -> dict[str, Any]:
    """Constants of `_features_kernel`, likewise."""
    return {
        "BINS": spec.n_fft // 2 + 1,
        "POWER": spec.power == 2,
        "RANGE": spec.dynamic_range is not None,
        **{"BM": BM, "BK": BK, "BN": BN},
    }


def _device_context(index: int | None) -> contextlib.AbstractContextManager[object]:
    """Of a CUDA device, unless it is the current one: it costs a few microseconds."""
    if index is None or index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(index)


def log_mel_triton(batch: Batch, spec: LogMelSpec) -> tuple[Tensor, Tensor]:
    """`operator.log_mel` of a batch, without gradient: (features [B, frames, n_mels], frame lengths [B]).

    `spec` is without dither.
    """
    batch = batch.readable(TYPE_NAMES)
    waveform, device = batch.waveform, batch.waveform.device
    plan = _plan(spec, device)
    clips, samples = waveform.shape
    frames = spec.padded_frames(samples)
    tiles = triton.cdiv(frames, BM)
    work = clips * tiles
    ranged = spec.dynamic_range is not None
    empty = partial(torch.empty, device=device)
    features = empty(clips, frames, spec.n_mels, dtype=getattr(torch, spec.dtype))
    log_mels = torch.empty_like(features, dtype=torch.float32) if ranged else features
    tops = empty((clips, tiles) if ranged else (1,))
    frame_lengths = empty(clips, dtype=torch.int64)
    masks: dict[str, Any] = {}
    for name, spans in (("time", batch.time_masks), ("mel", batch.mel_masks)):
        masks[f"{name}_masks"] = frame_lengths if spans is None else spans  # no span is read where none is
        masks[f"{name}_spans"] = 0 if spans is None else spans.shape[1]
    hidden = bool(masks["time_spans"] or masks["mel_spans"])
    chunk = max(1, min(work, CHUNK // (4 * BM * spec.n_fft)))  # tiles
    windowed = empty(chunk * BM, spec.n_fft)
    with _device_context(dispatch.index_of(device)):
        for first in range(0, work, chunk):
            count, parts = min(chunk, work - first), BM // FEW_FRAMES
            _frames_kernel[(count * parts,)](
                waveform,
                frame_lengths if batch.offsets is None else batch.offsets,
                frame_lengths if batch.lengths is None else batch.lengths,
                plan.taps,
                windowed,
                frame_lengths,
                first=first * parts,
                tiles=tiles * parts,
                samples=samples,
                row_stride=waveform.stride(0),
                **plan.frames,
                OFFSETS=batch.offsets is not None,
                LENGTHS=batch.lengths is not None,
            )
            spectra = torch.view_as_real(torch.fft.rfft(windowed[: count * BM]))
            _features_kernel[(count,)](
                spectra,
                plan.bank,
                plan.runs,
                plan.affine,
                **masks,
                frame_lengths=frame_lengths,
                out=log_mels,
                tops=tops,
                first=first,
                tiles=tiles,
                frames=frames,
                factor=spec.sample_scale(waveform.dtype) ** spec.power,
                **plan.features,
                MASKS=hidden and not ranged,
            )
        if ranged:
            size = frames * spec.n_mels
            _range_kernel[(clips * triton.cdiv(size, RANGE_WIDTH),)](
                log_mels,
                tops,
                plan.affine,
                **masks,
                out=features,
                size=size,
                mels=spec.n_mels,
                tops_size=tiles,
                dynamic_range=spec.dynamic_range,
                padding=spec.log_padding,
                MASKS=hidden,
                WIDTH=RANGE_WIDTH,
                TOPS=RANGE_TOPS,
            )
    return features, frame_lengths


# ---------------------------------------------------------------------------------------------------------------------
# What the launcher may ask Triton to compile
# ---------------------------------------------------------------------------------------------------------------------

_WHISPER = LogMelSpec(16000, 400, 400, 160, 80, dynamic_range=8.0)
_KALDI = LogMelSpec(16000, 512, 400, 160, 80, window="povey", framing="snip_edges", remove_dc=True, preemphasis=0.97)
# The front-ends of the CLAP family, so far as the kernels tell them apart; overrides may lead to more.
COMPILED_SPECS = {
    "whisper": _WHISPER,
    "kaldi": _KALDI,
    "kaldi unsnipped": dataclasses.replace(_KALDI, framing="no_snip_edges"),
    "clap": LogMelSpec(48000, 1024, 1024, 480, 64),
    "torchaudio": LogMelSpec(16000, 400, 400, 200, 128),
    "torchaudio 2048": LogMelSpec(44100, 2048, 2048, 512, 128),
}


def compilations(arch: int) -> Iterator[Compilation]:
    """The forms of every preset with each dtype of a waveform and of features, and with lengths, offsets and masks."""
    both = (False, True)
    outputs = ("fp32", "fp16", "bf16")
    for name, spec in COMPILED_SPECS.items():
        for kind, lengths, offsets in product(("i16", "fp32", "fp16", "bf16"), both, both):
            label = f"log-mel frames {name} {kind}{' lengths' * lengths}{' offsets' * offsets}"
            constants = {**_frame_flags(spec), "OFFSETS": offsets, "LENGTHS": lengths}
            yield _compilation(label, _frames_kernel, {"waveform": f"*{kind}"}, constants)
        ranged = spec.dynamic_range is not None
        for out, masks in product(("fp32",) if ranged else outputs, (False,) if ranged else both):
            label = f"log-mel features {name} {out}{' masks' * masks}"
            yield _compilation(label, _features_kernel, {"out": f"*{out}"}, {**_feature_flags(spec), "MASKS": masks})
    for out, masks in product(outputs, both):
        constants = {"MASKS": masks, "WIDTH": RANGE_WIDTH, "TOPS": RANGE_TOPS}
        yield _compilation(f"log-mel range {out}{' masks' * masks}", _range_kernel, {"out": f"*{out}"}, constants)


def _compilation(name: str, function: Any, types: dict[str, str], constants: dict[str, Any]) -> Compilation:
    numbers = ("rest", "factor", "floor", "log_high", "log_low", "padding", "dynamic_range")
    integers = ("offsets", "lengths", "frame_lengths", "time_masks", "mel_masks")
    types = {**dict.fromkeys(numbers, "fp32"), **dict.fromkeys(integers, "*i64"), "runs": "*i32", **types}
    signature, attrs = signature_and_attrs(function, types, constants)
    return Compilation(name, function, signature, constants, attrs, 4, 3, False)
