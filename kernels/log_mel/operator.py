"""Log-mel spectrogram of a padded batch of waveforms: one definition, a torch engine and a float64 reference.

    waveform -> frames -> (DC removal, pre-emphasis) -> window -> |DFT|^p -> mel bank -> log -> (clamp) -> affine

Every front-end of the CLAP family (Whisper, LAION-CLAP, AST, BEATs, Kaldi, torchaudio) is one set of numbers in
`LogMelSpec`. What none of them has is lengths: here each clip is reflected at its own end, so a clip alone, in a
batch or zero-padded gives the same features.

The engine is quick on a CPU for three reasons. Frames are contiguous rows [clips, frames, n_fft], so the FFT and the
mel product read memory in order (torchaudio's and torch.stft's [n_fft/2, frames] layout makes the mel product a
strided one). The mel bank is banded: four products, each over the bins its mels touch, do a quarter of the work of the
dense one. The batch goes through in chunks of a few hundred frames, so that they stay in cache; this also bounds the
memory beyond input and output, whatever the batch.

Other engines compute the same: C++ on the CPU (`native`) and one Triton launch on a GPU
(`triton_engine`); `log_mel` picks. torch.compile sees one operator, `fastclap::log_mel`, whichever it
is; eager calls that need no gradient take a shorter way than an operator's.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.log_mel.spec import LogMelSpec
from fastclap.kernels.log_mel.torch_engine import (
    CPU_CHUNK,
    GPU_CHUNK,
    _extend,
    _full_precision_matmul,
    _mel_energies,
    _scaled,
    finished,
    masked,
)

BACKENDS = ("auto", "torch", "native", "triton")
# Masks of a batch: spans of frames [B, n, 2] and of mels [B, m, 2], begin and end, integers on the waveform's device.
Masks = tuple[Tensor | None, Tensor | None]


def log_mel(
    waveform: Tensor,  # [B, T] int16, or floating point in [-1, 1]
    lengths: Tensor | None,  # [B] integers, samples of each clip; None: all T, or all from its offset
    spec: LogMelSpec,
    *,
    offsets: Tensor | None = None,  # [B] integers, first sample of each clip; None: 0
    masks: Masks | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-mel features of a batch: (features [B, frames, n_mels] of spec.dtype, frame_lengths [B] int64).

    int16 is scaled by 1/32768. Features are always computed in float32, also under autocast, and are differentiable
    in a floating-point waveform (a gradient on the CPU keeps the frames of the whole batch in memory; without one,
    memory beyond input and output is that of a chunk or of one clip). `frames` is that of a clip of T samples, or
    spec.num_frames.

    A clip is waveform[b, offset : offset + length]: samples outside of it are never used, its ends are where the
    reflection is, and the features are those of the same samples alone. Frames past its last are set after the log to
    `spec.padding_value`, then clamped and normalised as the rest. Frames that contain a NaN or infinite sample are NaN,
    and with a `dynamic_range` all frames of that clip; other clips are not touched.

    `masks` (SpecAugment) are two tensors of spans, begin and end, or None: of frames and of mels. What lies in a span
    is set last of all to the normalised `spec.log_padding`, the value of digital silence unless the front-end has its
    own, and gets no gradient; an empty span (end <= begin) masks nothing.

    With `spec.dither`, noise is drawn from torch's generator of the waveform's device, once a sample.

    `backend`: "torch"; "native", C++ on the CPU without a gradient; "triton", a GPU of compute capability 8.0 or later
    (or any tensor in Triton's interpreter); "auto", the quickest of them that can.

    Raises ValueError for a waveform that is not [B, T] or is empty, for a dtype other than int16 or floating point, for
    lengths or offsets that are not B integers with 0 <= offset <= offset + length <= T, for masks of another shape, and
    for a backend that cannot. Lengths and offsets on a GPU are clamped instead: reading them would stall it.
    """
    if spec.dither:
        lengths, offsets = _check(waveform, lengths, offsets, masks)
        waveform, spec = _scaled(waveform, spec), spec.noiseless
    time_masks, mel_masks = (None, None) if masks is None else masks
    if torch.compiler.is_compiling():
        return torch.ops.fastclap.log_mel(waveform, lengths, offsets, time_masks, mel_masks, spec.key, backend)
    lengths, offsets = _check(waveform, lengths, offsets, masks)
    engine = _engine(waveform, spec, backend)
    if engine == "triton" and waveform.requires_grad and torch.is_grad_enabled():
        return torch.ops.fastclap.log_mel(waveform, lengths, offsets, time_masks, mel_masks, spec.key, backend)
    return _compute(waveform, lengths, offsets, time_masks, mel_masks, spec, engine)


def _engine(waveform: Tensor, spec: LogMelSpec, backend: str) -> str:
    """The engine for checked arguments: "torch", "native" or "triton"."""
    from fastclap.kernels.log_mel import native  # which builds on this module

    if backend == "auto":
        if dispatch.on_gpu(waveform):
            return "triton" if native.plain(waveform) and _triton_runs(waveform, spec) else "torch"
        return "native" if waveform.device.type == "cpu" and native.usable(waveform, spec) else "torch"
    if backend == "native":
        if not native.usable(waveform, spec):
            raise ValueError(f"backend='native' cannot compute this: {native.description()}; see native.usable")
    elif backend == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if not (dispatch.on_gpu(waveform) or interpreted):
            raise ValueError(f"backend='triton' needs a waveform on a GPU, got {waveform.device}")
        if not (native.plain(waveform) and _triton_runs(waveform, spec)):
            raise ValueError(
                "backend='triton' needs triton, compute capability 8.0 or later, n_fft of at most 4096 and a plain "
                "tensor; backend='torch' computes anything"
            )
    elif backend != "torch":
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(map(repr, BACKENDS))}")
    return backend


def _triton_runs(waveform: Tensor, spec: LogMelSpec) -> bool:
    return spec.n_fft <= 4096 and _gpu_has_triton(waveform.get_device())


@lru_cache(maxsize=16)
def _gpu_has_triton(index: int) -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return index < 0 or (torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= (8, 0))


def _compute(
    waveform: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    time_masks: Tensor | None,
    mel_masks: Tensor | None,
    spec: LogMelSpec,
    engine: str,
) -> tuple[Tensor, Tensor]:
    """`log_mel` of checked arguments, without dither, by one engine; of them only torch's is differentiable."""
    if engine == "triton":
        from fastclap.kernels.log_mel.triton_engine import log_mel_triton

        return log_mel_triton(waveform, lengths, spec, offsets, time_masks, mel_masks)
    if offsets is not None:
        waveform, lengths = _cropped(waveform, lengths, offsets)
    if engine == "native":
        from fastclap.kernels.log_mel import native

        features, frame_lengths = native.log_mel_native(waveform, lengths, spec)
        return masked(features, time_masks, mel_masks, spec), frame_lengths
    batch, samples = waveform.shape
    frames = spec.frames(samples)
    if lengths is None:
        frame_lengths = torch.full((batch,), frames, device=waveform.device)
    else:
        frame_lengths = spec.frame_lengths(lengths)
    chunk = GPU_CHUNK if waveform.is_cuda else CPU_CHUNK * torch.get_num_threads()
    frames_a_chunk = max(1, chunk // spec.n_fft)
    clips_a_chunk = max(1, frames_a_chunk // frames)
    parts = []
    with torch.autocast(waveform.device.type, enabled=False), _full_precision_matmul():
        for first in range(0, batch, clips_a_chunk):
            clips = slice(first, first + clips_a_chunk)
            signal = _extend(_scaled(waveform[clips], spec), None if lengths is None else lengths[clips], spec)
            energies = _mel_energies(signal, frames, frames_a_chunk, spec)
            parts.append(finished(energies, None if lengths is None else frame_lengths[clips], spec))
    features = torch.cat(parts) if len(parts) > 1 else parts[0]
    return masked(features, time_masks, mel_masks, spec).to(getattr(torch, spec.dtype)), frame_lengths


def _cropped(waveform: Tensor, lengths: Tensor | None, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Each clip moved to the front, and its length."""
    samples = waveform.shape[1]
    left = samples - offsets
    at = offsets[:, None] + torch.arange(samples, device=waveform.device)
    return waveform.gather(1, at.clamp(max=samples - 1)), left if lengths is None else torch.minimum(lengths, left)


@lru_cache(maxsize=256)
def _spec_of(key: str) -> LogMelSpec:
    return LogMelSpec(**json.loads(key))


@torch.library.custom_op("fastclap::log_mel", mutates_args=())
def log_mel_op(
    waveform: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    time_masks: Tensor | None,
    mel_masks: Tensor | None,
    spec: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """What torch.compile sees of `log_mel`, whose dither comes before. ``spec`` is the key of one."""
    numbers, waveform = _spec_of(spec), waveform.detach()
    masks = (time_masks, mel_masks)
    lengths, offsets = _check(waveform, lengths, offsets, masks)
    with torch.no_grad():
        features, frame_lengths = _compute(
            waveform, lengths, offsets, *masks, numbers, _engine(waveform, numbers, backend)
        )
    return features.contiguous(), frame_lengths


@log_mel_op.register_fake
def _(
    waveform: Tensor, lengths: Tensor | None, offsets: Tensor | None, time_masks: Tensor | None,
    mel_masks: Tensor | None, spec: str, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    numbers = _spec_of(spec)
    batch, samples = waveform.shape
    shape = (batch, numbers.num_frames or numbers.frames(samples), numbers.n_mels)
    features = waveform.new_empty(shape, dtype=getattr(torch, numbers.dtype))
    return features, waveform.new_empty(batch, dtype=torch.int64)


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Autograd inside of an operator, where the dispatcher may have left it behind."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


@torch.library.custom_op("fastclap::log_mel_backward", mutates_args=())
def log_mel_backward_op(
    gradient: Tensor,  # [B, frames, n_mels], of the features
    waveform: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    time_masks: Tensor | None,
    mel_masks: Tensor | None,
    spec: str,
    backend: str,
) -> Tensor:
    """Gradient of the waveform [B, T], in its dtype, from what the forward pass was given: nothing else is kept."""
    numbers, waveform = _spec_of(spec), waveform.detach()
    masks = (time_masks, mel_masks)
    lengths, offsets = _check(waveform, lengths, offsets, masks)
    if _engine(waveform, numbers, backend) == "triton":
        from fastclap.kernels.log_mel.triton_engine import log_mel_gradient

        return log_mel_gradient(gradient, waveform, lengths, numbers, offsets, *masks)
    # A few clips at a time: autograd keeps their frames.
    chunk = GPU_CHUNK if waveform.is_cuda else CPU_CHUNK
    clips_a_chunk = max(1, chunk // (numbers.n_fft * gradient.shape[1]))
    parts = []
    for first in range(0, len(waveform), clips_a_chunk):
        clips = slice(first, first + clips_a_chunk)
        some = tuple(None if x is None else x[clips] for x in (lengths, offsets, *masks))
        with recorded():
            leaf = waveform[clips].detach().requires_grad_()
            features, _ = _compute(leaf, some[0], some[1], some[2], some[3], numbers, "torch")
            parts.append(torch.autograd.grad(features, leaf, gradient[clips])[0])
    return torch.cat(parts)


@log_mel_backward_op.register_fake
def _(
    gradient: Tensor, waveform: Tensor, lengths: Tensor | None, offsets: Tensor | None, time_masks: Tensor | None,
    mel_masks: Tensor | None, spec: str, backend: str,
) -> Tensor:  # fmt: skip
    return waveform.new_empty(waveform.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.spec, ctx.backend = inputs[5:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None or not ctx.needs_input_grad[0]:
        return (None,) * 7
    return torch.ops.fastclap.log_mel_backward(gradient, *ctx.saved_tensors, ctx.spec, ctx.backend), *(None,) * 6


log_mel_op.register_autograd(_backward, setup_context=_save)


def _check(
    waveform: Tensor, lengths: Tensor | None, offsets: Tensor | None = None, masks: Masks | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Validate the arguments of `log_mel`; lengths and offsets come back as int64 on the waveform's device."""
    if waveform.ndim != 2 or 0 in waveform.shape:
        hint = "; add a batch dimension: waveform[None]" if waveform.ndim == 1 else ""
        raise ValueError(f"waveform must be [batch, samples], neither of them 0, got {list(waveform.shape)}{hint}")
    if waveform.dtype != torch.int16 and not waveform.is_floating_point():
        raise ValueError(f"waveform must be int16 or floating point in [-1, 1], got {waveform.dtype}")
    if masks is not None:
        for name, spans in zip(("frames", "mels"), masks, strict=True):
            if spans is not None and (
                spans.ndim != 3 or spans.shape[0] != len(waveform) or spans.shape[2] != 2 or spans.dtype != torch.int64
            ):
                raise ValueError(
                    f"masks of {name} must be int64 [{len(waveform)}, spans, 2], got {spans.dtype} {list(spans.shape)}"
                )
    given = _integers("offsets", offsets, waveform)
    return _integers("lengths", lengths, waveform, given), given


def _integers(name: str, values: Tensor | None, waveform: Tensor, offsets: Tensor | None = None) -> Tensor | None:
    """Lengths or offsets, checked against what the clips hold; on the device they are clamped."""
    if values is None:
        return None
    values = torch.as_tensor(values)
    if values.shape != waveform.shape[:1] or values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(
            f"{name} must be {waveform.shape[0]} integers, got {values.dtype} of shape {list(values.shape)}"
        )
    samples = waveform.shape[1]
    if not torch.compiler.is_compiling() and values.device.type == "cpu":
        room = samples if offsets is None or offsets.device.type != "cpu" else samples - offsets
        wrong = ((values < 0) | (values > room)).nonzero()
        if wrong.numel():
            clip = int(wrong[0])
            after = "" if offsets is None else f", from offsets[{clip}]={int(offsets[clip])} on"
            raise ValueError(f"{name}[{clip}]={int(values[clip])}: the waveform holds {samples} samples a clip{after}")
    return values.to(waveform.device, torch.int64).clamp(0, samples)
