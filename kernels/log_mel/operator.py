"""Log-mel spectrogram of a padded batch of waveforms.

    waveform -> frames -> (DC removal, pre-emphasis) -> window -> |DFT|^p -> mel bank -> log -> (clamp) -> affine

Every front-end of the CLAP family (Whisper, LAION-CLAP, AST, BEATs, Kaldi, torchaudio) is one set of numbers in
`LogMelSpec`. What none of them has is lengths: here each clip is reflected at its own end, so a clip alone, in a
batch or zero-padded gives the same features.

Four engines compute it: C++ on the CPU (`native`), one launch of CUDA C++ on a GPU (`cuda_engine`), Triton around
torch's FFT where that cannot be (`triton_engine`), and torch operations, which alone have a gradient: the others' is
theirs, from the waveform on. torch.compile sees one operator, `fastclap::log_mel`, whichever it is; eager calls that
need no gradient take a shorter way than an operator's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastclap.kernels import dispatch
from fastclap.kernels.log_mel import cuda_engine, native
from fastclap.kernels.log_mel.spec import Batch, LogMelSpec
from fastclap.kernels.log_mel.torch_engine import log_mel_torch, log_mel_torch_gradient, masked, scaled

LARGEST_TRANSFORM = 4096  # of the Triton engine: a program has a whole frame in registers
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
    """Log-mel features of a batch, and how many frames of them each clip has.

    int16 is scaled by 1/32768. Features are always computed in float32, also under autocast, and are differentiable
    in a floating-point waveform (a gradient on the CPU keeps the frames of the whole batch in memory; without one,
    memory beyond input and output is that of a chunk or of one clip).

    A clip is waveform[b, offset : offset + length]: samples outside of it are never used, its ends are where the
    reflection is, and the features are those of the same samples alone. Frames past its last are set after the log to
    `spec.padding_value`, then clamped and normalised as the rest. Frames that contain a NaN or infinite sample are NaN,
    and with a `dynamic_range` all frames of that clip; other clips are not touched.

    With `spec.dither`, noise is drawn from torch's generator of the waveform's device, once for each sample.

    Args:
        waveform: the clips, padded to one size.
        lengths, offsets: on a GPU and under torch.func they are clamped to what the clips hold, where on the CPU they
            are checked: reading them would stall the GPU.
        spec: the front-end.
        masks: for SpecAugment, two tensors of spans, begin and end, or None: of frames and of mels. What lies in a span
            is set last of all to the normalised `spec.log_padding`, the value of digital silence unless the front-end
            has its own, and gets no gradient; an empty span (end <= begin) masks nothing.
        backend: "torch"; "native", C++ on the CPU without a gradient; "cuda", an NVIDIA GPU of compute capability 8.0
            or later, n_fft up to 2,560 with small factors; "triton", the same GPUs (or any tensor in Triton's
            interpreter), n_fft up to 4,096; "auto", the quickest of them that can.

    Returns:
        Features [B, frames, n_mels] of `spec.dtype`, where `frames` is that of a clip of T samples, or
        `spec.num_frames`; and frame lengths [B], int64.

    Raises:
        TypeError: the waveform is no tensor.
        ValueError: the waveform is not [B, T] or is empty, its dtype is neither int16 nor floating point, lengths or
            offsets are not B integers with 0 <= offset <= offset + length <= T, masks have another shape, or the
            backend cannot compute this.
    """
    batch = Batch(waveform, lengths, offsets, *(masks or (None, None)))
    if spec.dither:
        batch = checked(batch)
        batch, spec = batch._replace(waveform=scaled(waveform, spec)), spec.noiseless
    if torch.compiler.is_compiling():
        if not dispatch.is_transformed(waveform):
            return torch.ops.fastclap.log_mel(*batch, spec.key, backend)
        raise RuntimeError("log-mel features in a graph cannot be transformed: leave them out of torch.compile")
    batch = checked(batch)
    engine = chosen_engine(batch, spec, backend)
    if engine in dispatch.LOG_MEL_ON_GPU and waveform.requires_grad and torch.is_grad_enabled():
        return torch.ops.fastclap.log_mel(*batch, spec.key, backend)
    return _features(batch, spec, engine)


def checked(batch: Batch) -> Batch:
    """The batch, its lengths and offsets as int64 on the waveform's device.

    Raises:
        TypeError, ValueError: as `log_mel`.
    """
    waveform, lengths, offsets, time_masks, mel_masks = batch
    if not isinstance(waveform, Tensor):
        raise TypeError(f"waveform must be a tensor [batch, samples], got {type(waveform).__name__}")
    if waveform.layout != torch.strided or waveform.is_meta:
        kind = "on the meta device" if waveform.is_meta else waveform.layout
        raise ValueError(f"waveform must be a dense tensor with values, and is {kind}")
    if waveform.ndim != 2 or 0 in waveform.shape:
        hint = "; add a batch dimension: waveform[None]" if waveform.ndim == 1 else ""
        raise ValueError(f"waveform must be [batch, samples], neither of them 0, got {list(waveform.shape)}{hint}")
    if waveform.dtype != torch.int16 and not waveform.is_floating_point():
        raise ValueError(f"waveform must be int16 or floating point in [-1, 1], got {waveform.dtype}")
    clips = len(waveform)
    for name, spans in (("frames", time_masks), ("mels", mel_masks)):
        if spans is None:
            continue
        if spans.ndim != 3 or spans.shape[0] != clips or spans.shape[2] != 2 or spans.dtype != torch.int64:
            got = f"{spans.dtype} {list(spans.shape)}"
            raise ValueError(f"masks of {name} must be int64 [{clips}, spans, 2], got {got}")
    offsets = _integers("offsets", offsets, waveform)
    return Batch(waveform, _integers("lengths", lengths, waveform, offsets), offsets, time_masks, mel_masks)


def _integers(name: str, values: Tensor | None, waveform: Tensor, offsets: Tensor | None = None) -> Tensor | None:
    """Lengths or offsets, checked against what the clips hold; on the device they are clamped."""
    if values is None:
        return None
    try:
        values = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be {waveform.shape[0]} integers, got {str(values)[:80]} ({error})") from error
    whole = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
    if values.shape != waveform.shape[:1] or not whole or values.is_meta:
        on = " on the meta device" if values.is_meta else ""
        raise ValueError(
            f"{name} must be {waveform.shape[0]} integers, got {values.dtype} of shape {list(values.shape)}{on}"
        )
    values = values.to(torch.int64)
    samples = waveform.shape[1]
    if not torch.compiler.is_compiling() and values.device.type == "cpu" and not dispatch.is_transformed():
        room = samples if offsets is None or offsets.device.type != "cpu" else samples - offsets
        wrong = ((values < 0) | (values > room)).nonzero()
        if wrong.numel():
            clip = int(wrong[0])
            after = "" if offsets is None else f", from offsets[{clip}]={int(offsets[clip])} on"
            raise ValueError(f"{name}[{clip}]={int(values[clip])}: the waveform holds {samples} samples a clip{after}")
    return values.to(waveform.device).clamp(0, samples)


def chosen_engine(batch: Batch, spec: LogMelSpec, backend: str) -> str:
    """The engine for a checked batch: "torch", "native", "cuda" or "triton"."""

    def why_not_triton() -> str | None:
        if spec.n_fft > LARGEST_TRANSFORM:
            return f"n_fft is {spec.n_fft}, and the kernels take an n_fft of at most {LARGEST_TRANSFORM}"
        return None

    reasons: dict[str, Callable[[], str | None]] = {
        "native": partial(native.why_not, batch.waveform, spec),
        "cuda": partial(cuda_engine.why_not, batch, spec),
        "triton": why_not_triton,
    }
    return dispatch.log_mel_engine(batch.waveform, backend, reasons)


def _features(batch: Batch, spec: LogMelSpec, engine: str) -> tuple[Tensor, Tensor]:
    """`log_mel` of a checked batch, without dither, by one engine; of them only torch's is differentiable."""
    if engine == "cuda":
        return cuda_engine.log_mel_cuda(batch, spec)
    if engine == "triton":
        from fastclap.kernels.log_mel.triton_engine import log_mel_triton

        return log_mel_triton(batch, spec)
    compute = native.log_mel_native if engine == "native" else log_mel_torch
    features, frame_lengths = compute(batch, spec)
    if batch.time_masks is not None or batch.mel_masks is not None:
        features = masked(features, batch.time_masks, batch.mel_masks, spec)
    return features, frame_lengths


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
    """What torch.compile sees of `log_mel`, whose dither comes before. `spec` is the key of one."""
    batch = checked(Batch(waveform.detach(), lengths, offsets, time_masks, mel_masks))
    numbers = _spec_of(spec)
    with torch.no_grad():
        features, frame_lengths = _features(batch, numbers, chosen_engine(batch, numbers, backend))
    return features.contiguous(), frame_lengths


@log_mel_op.register_fake
def _(waveform: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, key, _ = others
    spec = _spec_of(key)
    batch, samples = waveform.shape
    shape = (batch, spec.padded_frames(samples), spec.n_mels)
    features = waveform.new_empty(shape, dtype=getattr(torch, spec.dtype))
    return features, waveform.new_empty(batch, dtype=torch.int64)


@torch.library.custom_op("fastclap::log_mel_backward", mutates_args=())
def log_mel_backward_op(
    gradient: Tensor,  # [B, frames, n_mels], of the features
    waveform: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    time_masks: Tensor | None,
    mel_masks: Tensor | None,
    spec: str,
) -> Tensor:
    """Gradient of the waveform [B, T], in its dtype, from what the forward pass was given: nothing else is kept."""
    batch = checked(Batch(waveform.detach(), lengths, offsets, time_masks, mel_masks))
    return log_mel_torch_gradient(gradient, batch, _spec_of(spec))


@log_mel_backward_op.register_fake
def _(gradient: Tensor, waveform: Tensor, *_: Any) -> Tensor:
    return waveform.new_empty(waveform.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.spec = inputs[5]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None or not ctx.needs_input_grad[0]:
        return (None,) * 7
    return torch.ops.fastclap.log_mel_backward(gradient, *ctx.saved_tensors, ctx.spec), *(None,) * 6


log_mel_op.register_autograd(_backward, setup_context=_save)


def _second_backward(*_: Any) -> None:
    raise RuntimeError(
        "the gradient of log-mel features in a graph cannot be differentiated again: leave them out of it"
    )


log_mel_backward_op.register_autograd(_second_backward)
