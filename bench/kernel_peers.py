"""What fastclap's log-mel front-ends and tower kernels are compared with, each through its own package.

All forms of one kernel take the same tensors. One that computes something else, or leaves something out, says so in its
notes; one that is not installed, or has nothing for this machine, is listed with the reason.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import Peer, UnavailableError, load, on_gpu
from fastclap.features import PRESETS
from fastclap.kernels.feed_forward import feed_forward
from fastclap.kernels.layer_norm_gelu import layer_norm_gelu
from fastclap.kernels.log_mel.operator import log_mel
from fastclap.kernels.log_mel.spec import LogMelSpec
from fastclap.kernels.residual_layer_norm import residual_layer_norm
from fastclap.kernels.toeplitz_attention import gated_toeplitz_attention
from fastclap.kernels.waveform import normalize_waveform
from fastclap.kernels.waveform_convolution import waveform_convolution

FRONT_ENDS = {
    "whisper-80": PRESETS["whisper"],
    "kaldi-80": PRESETS["kaldi"],
    "clsp-128": PRESETS["clsp"],
    "clap-64": PRESETS["clap"],
}
# A form of log-mel, and the front-end whose features it returns; None where they are not quite those of any of ours.
LogMelForm = tuple[Peer, LogMelSpec | None]


def without_epilogue(spec: LogMelSpec) -> LogMelSpec:
    """The logarithm is the last step: no dynamic range, no normalisation, all frames."""
    return dataclasses.replace(spec, dynamic_range=None, mean=0.0, std=1.0, drop_last_frame=False)


def in_dtype(spec: LogMelSpec, features: torch.dtype) -> LogMelSpec:
    """The front-end with features in that dtype."""
    options: dict[str, Any] = {"dtype": str(features).removeprefix("torch.")}
    return dataclasses.replace(spec, **options)


def logarithm_(mel: Tensor, spec: LogMelSpec) -> Tensor:
    """log(max(mel, floor)), in place."""
    mel.clamp_(min=spec.floor)
    if spec.log == "ln":
        return mel.log_()
    return mel.log10_() if spec.log == "log10" else mel.log10_().mul_(10)


def melspectrogram_options(spec: LogMelSpec) -> dict[str, Any]:
    """As torchaudio names them."""
    return {
        **{"sample_rate": spec.sampling_rate, "n_fft": spec.n_fft, "win_length": spec.win_length},
        **{"hop_length": spec.hop_length, "n_mels": spec.n_mels, "f_min": spec.f_min, "f_max": spec.mel_f_max},
        **{"norm": spec.mel_norm, "mel_scale": "slaney" if spec.mel_scale == "slaney" else "htk"},
    }


def librosa_options(spec: LogMelSpec) -> dict[str, Any]:
    """As librosa and its descendants name them, without the mel bank's definition."""
    return {
        **{"sr": spec.sampling_rate, "n_fft": spec.n_fft, "hop_length": spec.hop_length, "n_mels": spec.n_mels},
        **{"fmin": spec.f_min, "fmax": spec.mel_f_max},
    }


def log_mel_forms(
    spec: LogMelSpec, device: torch.device, audio: torch.dtype, features: torch.dtype, *, ours_only: bool = False
) -> list[LogMelForm]:
    """Forms of run(clips [B, T] in `audio`) -> [B, frames, mels] in `features` on the device.

    Packages without int16 input or 16-bit features get and give float32, with a conversion in the call; all stop at the
    logarithm, which favours them where the front-end goes on.
    """
    plain = without_epilogue(spec)
    kaldi = spec.mel_scale == "kaldi"
    ours = in_dtype(spec, features)
    engine = "cuda" if device.type == "cuda" else "auto"

    def converted(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(clips: Tensor) -> Tensor:
            return run(clips / 32768.0 if clips.dtype == torch.int16 else clips).to(features)

        return call

    def with_lengths() -> Callable[[Tensor], Tensor]:
        return lambda clips: log_mel(clips, ragged(clips), ours, backend=engine)[0]

    def by_torchaudio() -> Callable[[Tensor], Tensor]:
        return converted(_torchaudio_log_mel(spec, device))

    def by_torchaudio_kaldi() -> Callable[[Tensor], Tensor]:
        fbank: Any = importlib.import_module("torchaudio.compliance.kaldi").fbank
        options = {
            **{"num_mel_bins": spec.n_mels, "high_freq": spec.f_max or 0.0},
            **{"snip_edges": spec.framing == "snip_edges", "window_type": spec.window},
        }
        return converted(lambda clips: torch.stack([fbank(clip[None], **options) for clip in clips]))

    def by_nnaudio() -> Callable[[Tensor], Tensor]:
        mel: Any = importlib.import_module("nnAudio.features.mel")
        transform = mel.MelSpectrogram(
            **librosa_options(spec),
            win_length=spec.win_length,
            htk=spec.mel_scale != "slaney",
            norm=1 if spec.mel_norm else None,
            verbose=False,
        ).to(device)
        return converted(lambda clips: logarithm_(transform(clips), spec).mT)

    def by_torchlibrosa() -> Callable[[Tensor], Tensor]:
        stft: Any = importlib.import_module("torchlibrosa.stft")
        options = librosa_options(spec)
        stage = torch.nn.Sequential(
            stft.Spectrogram(spec.n_fft, options.pop("hop_length"), spec.win_length),
            stft.LogmelFilterBank(**options, amin=spec.floor, top_db=None),
        ).to(device)
        return converted(lambda clips: stage(clips).squeeze(1))

    def by_flashmel() -> Callable[[Tensor], Tensor]:
        transform = on_gpu("flashmel", device).MelSpectrogram(**melspectrogram_options(spec))
        return lambda clips: logarithm_(transform(clips), spec).mT.to(features)

    def by_whisper() -> Callable[[Tensor], Tensor]:
        extractor = _extractor("WhisperFeatureExtractor")(feature_size=spec.n_mels)
        options = {"sampling_rate": 16000, "padding": "longest", "return_tensors": "pt", "device": device.type}
        arrays = _on_host()

        def run(clips: Tensor) -> Tensor:
            return extractor(arrays(clips), **options).input_features.mT.to(device, features)

        return run

    def by_clap() -> Callable[[Tensor], Tensor]:
        if device.type != "cpu":
            raise UnavailableError("computes clip by clip on the CPU only")
        extractor = _extractor("ClapFeatureExtractor")(frequency_min=spec.f_min)
        options = {"truncation": "rand_trunc", "padding": "pad", "sampling_rate": 48000, "return_tensors": "pt"}
        arrays = _on_host()

        def run(clips: Tensor) -> Tensor:
            return extractor(arrays(clips), max_length=clips.shape[1], **options).input_features[:, 0].to(features)

        return run

    def by_lhotse() -> Callable[[Tensor], Tensor]:
        layers: Any = importlib.import_module("lhotse.features.kaldi.layers")
        transform = layers.Wav2LogFilterBank(
            sampling_rate=spec.sampling_rate,
            snip_edges=spec.framing == "snip_edges",
            num_filters=spec.n_mels,
            low_freq=spec.f_min,
            high_freq=spec.f_max or 0.0,
        ).to(device)
        return converted(lambda clips: transform(clips))

    def by_kaldifeat() -> Callable[[Tensor], Tensor]:
        package: Any = importlib.import_module("kaldifeat")
        options = package.FbankOptions()
        options.device = device
        options.frame_opts.dither = 0.0
        options.frame_opts.samp_freq = float(spec.sampling_rate)
        options.frame_opts.snip_edges = spec.framing == "snip_edges"
        options.mel_opts.num_bins = spec.n_mels
        options.mel_opts.high_freq = spec.f_max or 0.0
        fbank = package.Fbank(options)
        return converted(lambda clips: torch.stack(fbank(list(clips))))

    def whole() -> Callable[[Tensor], Tensor]:
        return lambda clips: log_mel(clips, None, ours, backend=engine)[0]

    notes = "with lengths from half of the samples to all"
    forms: list[LogMelForm] = [
        (load("fastclap", "fastclap", 0, f"engine {engine}", whole), spec),
        (load("fastclap, lengths", "fastclap", 0, notes, with_lengths), None),
    ]
    if ours_only:
        return forms
    if device.type == "cuda":
        triton = lambda: lambda clips: log_mel(clips, None, ours, backend="triton")[0]  # noqa: E731
        forms.append((load("fastclap Triton", "fastclap", 0, "engine triton", triton), spec))
    other = "without DC removal and pre-emphasis, Hann window; " if kaldi else ""
    computed = None if kaldi else plain
    forms += [
        (load("fastclap torch", "fastclap", 0, "plain torch, STFT", lambda: _torch_engine(ours)), spec),
        (load("torchaudio", "torchaudio", 0, f"{other}MelSpectrogram, clamp, log", by_torchaudio), computed),
        (load("nnAudio", "nnAudio", 0, f"{other}MelSpectrogram, clamp, log", by_nnaudio), computed),
        (load("flashmel", "flashmel", 0, f"{other}MelSpectrogram, clamp, log", by_flashmel), computed),
    ]
    if kaldi:
        computed = dataclasses.replace(plain, floor=2.0**-23)  # Kaldi's, and these packages'
        forms += [
            (
                load("torchaudio kaldi", "torchaudio", 0, "one clip a call: it cannot batch", by_torchaudio_kaldi),
                computed,
            ),
            (load("lhotse", "lhotse", 0, "Wav2LogFilterBank, batched", by_lhotse), computed),
            (load("kaldifeat", "kaldifeat", 0, "Fbank of a list of clips", by_kaldifeat), computed),
        ]
    if spec.mel_norm == "slaney":
        decibels = dataclasses.replace(plain, log="db")
        notes = "Spectrogram, LogmelFilterBank: decibels"
        forms.append((load("torchlibrosa", "torchlibrosa", 0, notes, by_torchlibrosa), decibels))
    if features != torch.float32:  # transformers' are float32 in any case
        return forms
    if spec == PRESETS["whisper"]:
        notes = "takes and returns arrays in host memory; the copies back are in the time"
        forms.append((load("transformers", "transformers", 0, notes, by_whisper), spec))
    if spec == PRESETS["clap"]:
        forms.append((load("transformers", "transformers", 0, "ClapFeatureExtractor, rand_trunc", by_clap), spec))
    return forms


def log_mel_gradient_forms(spec: LogMelSpec, device: torch.device) -> list[Peer]:
    """Those of them that are differentiable, float32."""
    engine = "cuda" if device.type == "cuda" else "auto"
    notes = f"engine {engine}, gradient of torch's" if device.type == "cuda" else "plain torch"
    ours = lambda: lambda clips: log_mel(clips, None, spec, backend=engine)[0]  # noqa: E731
    return [
        load("fastclap", "fastclap", 0, notes, ours),
        load("fastclap torch", "fastclap", 0, "plain torch, STFT", lambda: _torch_engine(spec)),
        load("torchaudio", "torchaudio", 0, "MelSpectrogram, clamp, log", lambda: _torchaudio_log_mel(spec, device)),
    ]


def _torchaudio_log_mel(spec: LogMelSpec, device: torch.device) -> Callable[[Tensor], Tensor]:
    transforms: Any = importlib.import_module("torchaudio.transforms")
    transform = transforms.MelSpectrogram(**melspectrogram_options(spec)).to(device)
    return lambda clips: logarithm_(transform(clips), spec).mT


def ragged(clips: Tensor) -> Tensor:
    """Lengths from half of the samples to all of them."""
    batch, samples = clips.shape
    return torch.linspace(samples / 2, samples, batch, device=clips.device).long()


def _torch_engine(spec: LogMelSpec) -> Callable[[Tensor], Tensor]:
    return lambda clips: log_mel(clips, None, spec, backend="torch")[0]


def _extractor(name: str) -> Any:
    return getattr(importlib.import_module("transformers"), name)


def _on_host() -> Callable[[Tensor], list[Any]]:
    """Arrays in host memory, copied once for each tensor."""
    kept: dict[tuple[int, torch.Size], list[Any]] = {}

    def arrays(clips: Tensor) -> list[Any]:
        key = (clips.data_ptr(), clips.shape)
        if key not in kept:
            wave = clips / 32768.0 if clips.dtype == torch.int16 else clips
            kept[key] = list(wave.float().cpu().numpy())
        return kept[key]

    return arrays


# ---------------------------------------------------------------------------------------------------------------------
# Towers
# ---------------------------------------------------------------------------------------------------------------------


def attention_forms(device: torch.device) -> list[Peer]:
    """Forms of run(q, k, v, table, gate) -> [B, H, T, d]."""
    forms: Any = importlib.import_module("bench.test_toeplitz_attention")
    engine = "triton" if device.type == "cuda" else "auto"

    def flex_attention() -> Callable[..., Tensor]:
        if device.type != "cuda":
            raise UnavailableError("its backward pass needs a GPU")
        return lambda *x: forms.flex_attention(x, 0.0)

    return [
        load(
            *("fastclap", "fastclap", 0, f"engine {engine}"),
            lambda: lambda *x: gated_toeplitz_attention(*x, backend=engine),
        ),
        load(
            *("SDPA, bias written out", "torch", 0, "scaled_dot_product_attention with the bias as its mask"),
            lambda: lambda *x: forms.written_out_mask(x, 0.0),
        ),
        load("FlexAttention", "torch", 0, "compiled, the bias as its score_mod", flex_attention),
        load(
            *("multi_head_attention_forward", "torch", 0, "transformers' WavLM, between identity projections"),
            lambda: lambda *x: forms.multi_head_attention(x, 0.0),
        ),
    ]


def layer_norm_gelu_forms(device: torch.device) -> list[Peer]:
    """Forms of run(x, weight, bias) -> gelu(layer_norm(x))."""
    forms: Any = importlib.import_module("bench.test_towers_kernels")
    engine = "triton" if device.type == "cuda" else "auto"

    def liger() -> Callable[..., Tensor]:
        on_gpu("liger_kernel.ops.layer_norm", device)
        return forms.liger

    return [
        load(*("fastclap", "fastclap", 0, f"engine {engine}"), lambda: lambda *x: layer_norm_gelu(*x, backend=engine)),
        load("torch eager", "torch", 0, "layer_norm, then gelu", lambda: forms.eager),
        load("torch.compile", "torch", 0, "both, compiled", lambda: _compiled(forms.eager, device)),
        load("liger-kernel, then gelu", "liger-kernel", 0, "its LayerNorm, then torch's gelu", liger),
    ]


def residual_layer_norm_forms(device: torch.device) -> list[Peer]:
    """Forms of run(x, branch, branch_bias, weight, bias) -> layer_norm(x + branch + branch_bias)."""
    engine = "triton" if device.type == "cuda" else "auto"

    def ours(*leaves: Tensor) -> Tensor:
        return residual_layer_norm(*leaves, backend=engine)[1]

    def eager(x: Tensor, branch: Tensor, branch_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x + (branch + branch_bias), x.shape[-1:], weight, bias)

    return [
        load("fastclap", "fastclap", 0, f"engine {engine}", lambda: ours),
        load("torch eager", "torch", 0, "bias, addition, layer_norm", lambda: eager),
        load("torch.compile", "torch", 0, "the same, compiled", lambda: _compiled(eager, device)),
    ]


def feed_forward_forms(device: torch.device) -> list[Peer]:
    """Forms of run(x, weight_in, bias_in, weight_out) -> gelu(x · weight_inᵀ + bias_in) · weight_outᵀ."""
    engine = "triton" if device.type == "cuda" else "auto"

    def eager(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, weight_in, bias_in)), weight_out)

    return [
        load("fastclap", "fastclap", 0, f"engine {engine}", lambda: functools.partial(feed_forward, backend=engine)),
        load("torch eager", "torch", 0, "linear, gelu, linear", lambda: eager),
        load("torch.compile", "torch", 0, "the same, compiled", lambda: _compiled(eager, device)),
    ]


def waveform_convolution_forms(device: torch.device) -> list[Peer]:
    """Forms of run(waveform, weight, norm_weight, norm_bias) -> gelu(layer_norm(conv1d(waveform))), channels last."""
    forms: Any = importlib.import_module("bench.test_towers_kernels")
    engine = "triton" if device.type == "cuda" else "auto"

    def ours(waveform: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        return waveform_convolution(waveform, weight, None, norm_weight, norm_bias, forms.STRIDE, backend=engine)

    gemm = "a GEMM on the windows written out, then fastclap's layer_norm_gelu"
    return [
        load("fastclap", "fastclap", 0, f"engine {engine}", lambda: ours),
        load("GEMM, then layer_norm_gelu", "fastclap", 0, gemm, lambda: forms.gemm_of_windows),
        load("torch eager", "torch", 0, "conv1d, layer_norm and gelu, as transformers has them", lambda: forms.conv1d),
        load("torch.compile", "torch", 0, "the same, compiled", lambda: _compiled(forms.conv1d, device)),
    ]


def _compiled(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    if device.type != "cuda":
        raise UnavailableError("compiled forms are measured on a GPU only")
    return torch.compile(function, dynamic=False)


def waveform_forms(device: torch.device, dtype: torch.dtype) -> list[Peer]:
    """Forms of run(audio int16, lengths, mean | None, std | None) -> normalised waveform in `dtype`."""
    forms: Any = importlib.import_module("bench.test_towers_kernels")
    engine = "triton" if device.type == "cuda" else "auto"

    def step_by_step(*x: Tensor) -> Tensor:
        return forms.step_by_step(*x).to(dtype)

    return [
        load(
            *("fastclap", "fastclap", 0, f"engine {engine}"),
            lambda: lambda *x: normalize_waveform(*x, dtype=dtype, backend=engine),
        ),
        load("torch eager", "torch", 0, "one function after another", lambda: step_by_step),
        load("torch.compile", "torch", 0, "the same, compiled", lambda: _compiled(step_by_step, device)),
    ]
