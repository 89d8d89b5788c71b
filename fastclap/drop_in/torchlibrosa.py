"""torchlibrosa's log-mel front-end, which LAION-CLAP, MS-CLAP and PANNs use (package `torchlibrosa`).

Replaced: Spectrogram.forward and LogmelFilterBank.forward, where the one feeds the other. Left to the client: the
spectrogram where anything but a log-mel module uses it; trained weights, windows other than periodic Hann,
center=False, zero padding, a top_db, float64 and half precision.

The client multiplies by the DFT matrix in float32, which rounds less than the float32 FFT that replaces it: against
float64, the rms error over speech, noise and clicks is 4e-5 dB with the client and 9e-5 dB with fastclap, the largest
0.01 and 0.02 dB; within 60 dB of a frame's loudest band both are at 5e-6 dB (rms). Under autocast features are float32,
where the client's convolutions would be in half precision.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastclap.drop_in.shared import Client, Method, has_mel_bank, overrides, preset_spec
from fastclap.kernels.log_mel.operator import log_mel


class _DeferredSpectrogram(Tensor):
    """What a patched Spectrogram returns: a tensor that is not computed before it is used.

    A patched LogmelFilterBank takes the waveform out of it; for any other use the client's own code computes it.
    """

    waveform: Tensor  # [B, samples]
    version: int
    stft: nn.Module
    power: float
    compute: Callable[[Tensor], Tensor]
    computed: Tensor | None  # [B, 1, frames, n_fft/2 + 1]

    @staticmethod
    def made_by(module: Any, waveform: Tensor, compute: Callable[[Tensor], Tensor]) -> _DeferredSpectrogram:
        frames = 1 + waveform.shape[1] // module.stft.hop_length
        deferred: Any = Tensor._make_wrapper_subclass(
            _DeferredSpectrogram,
            (waveform.shape[0], 1, frames, module.stft.n_fft // 2 + 1),
            dtype=waveform.dtype,
            device=waveform.device,
        )
        deferred.waveform = waveform if torch.is_grad_enabled() else waveform.detach()
        deferred.version = _version(waveform)
        deferred.stft, deferred.power, deferred.compute, deferred.computed = module.stft, module.power, compute, None
        return deferred

    def unchanged_waveform(self) -> Tensor:
        if _version(self.waveform) != self.version:
            raise RuntimeError(
                "the waveform was written to before its spectrogram was used; write to a copy, or undo "
                "drop_in.patch('torchlibrosa')"
            )
        return self.waveform

    def materialised(self) -> Tensor:
        if self.computed is None:
            self.computed = self.compute(self.unchanged_waveform())
        return self.computed

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(
            _DeferredSpectrogram, _DeferredSpectrogram.materialised, (args, dict(kwargs or {}))
        )
        return function(*args, **kwargs)

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]  # where an operation skips the one above


def _spectrogram_forward(owner: type, original: Method) -> Method:
    def forward(self: Any, input: Tensor) -> Tensor:
        stft = self.stft
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or type(input) not in (Tensor, nn.Parameter)
            or torch._C._functorch.is_functorch_wrapped_tensor(input)
            or input.dtype != torch.float32
            or input.ndim != 2
            or input.shape[0] == 0
            or input.shape[1] <= stft.n_fft // 2
            or not stft.center
            or stft.pad_mode != "reflect"
            or self.power not in (1, 2)
            or not _kept_for_weights(stft, (stft.conv_real.weight, stft.conv_imag.weight), _is_hann_dft)
        ):
            return original(self, input)
        return _DeferredSpectrogram.made_by(self, input, functools.partial(original, self))

    return forward


def _log_mel_forward(owner: type, original: Method) -> Method:
    def forward(self: Any, input: Tensor) -> Tensor:
        if not isinstance(input, _DeferredSpectrogram) or input.computed is not None:  # it may have been changed
            return original(self, input)
        if not self.is_log or self.top_db is not None or overrides(self, owner, "power_to_db"):
            return original(self, input)
        stft: Any = input.stft
        numbers = _kept_for_weights(self, (self.melW,), _slaney_numbers)
        spec = numbers and preset_spec(
            "clap",
            **numbers,
            win_length=stft.win_length,
            hop_length=stft.hop_length,
            power=float(input.power),
            floor=float(self.amin),
            mean=10.0 * math.log10(max(self.amin, self.ref)),
        )
        if not spec or numbers["n_fft"] != stft.n_fft:
            return original(self, input)
        return log_mel(input.unchanged_waveform(), None, spec)[0][:, None]

    return forward


CLIENT = Client(
    "torchlibrosa",
    modules=("torchlibrosa.stft",),
    install="pip install torchlibrosa",
    methods={"Spectrogram.forward": _spectrogram_forward, "LogmelFilterBank.forward": _log_mel_forward},
)


_KEPT: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def _kept_for_weights(module: nn.Module, weights: Sequence[Tensor], examine: Callable[[Any], Any]) -> Any:
    """examine(module), kept until one of its weights is written to; None while one of them requires a gradient."""
    if any(weight.requires_grad for weight in weights):
        return None
    state = [(weight.data_ptr(), _version(weight)) for weight in weights]
    if module not in _KEPT or _KEPT[module][0] != state:
        _KEPT[module] = state, examine(module)
    return _KEPT[module][1]


def _version(tensor: Tensor) -> int:
    """Changes with every write to the tensor, which inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _is_hann_dft(stft: Any) -> bool:
    """Whether the convolutions of a torchlibrosa STFT hold the DFT under a periodic Hann window, as it builds them."""
    n_fft, win = stft.n_fft, stft.win_length
    bins = n_fft // 2 + 1
    if n_fft % 2 or not 2 <= win <= n_fft:
        return False
    taps = np.zeros(n_fft)
    first = (n_fft - win) // 2
    taps[first : first + win] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(win) / win)
    phase = 2 * np.pi / n_fft * (np.outer(np.arange(bins), np.arange(n_fft)) % n_fft)
    for weight, expected in ((stft.conv_real.weight, np.cos(phase)), (stft.conv_imag.weight, -np.sin(phase))):
        found = weight.detach().cpu().double().numpy()
        if found.shape != (bins, 1, n_fft) or not np.abs(found[:, 0] - expected * taps).max() <= 1e-5:
            return False
    return True


def _slaney_numbers(log_mel_module: Any) -> dict[str, Any] | None:
    """The numbers from which librosa made the mel bank (Slaney scale and norm); None if it is another one.

    torchlibrosa keeps only the bank, so they are read off its last filter. That one spans many bins, so that both of
    its lines can be extended to its lower and upper corner, in bins. Its centre is their geometric mean, as the scale
    is logarithmic there, and its height then gives the width of a bin in Hz. What comes out is accepted only if it
    gives back the whole bank.
    """
    weights = log_mel_module.melW.detach().cpu().double().numpy()  # [n_fft/2 + 1, n_mels]
    n_fft, n_mels = 2 * (weights.shape[0] - 1), weights.shape[1]
    last = weights[:, -1]
    (bins,) = np.nonzero(last)
    peak = int(last.argmax())
    if not (bins.size and bins[0] + 1 < peak < bins[-1] - 1):
        return None

    def zero(a: int, b: int) -> float:
        return a - last[a] * (b - a) / (last[b] - last[a])

    low, high = zero(bins[0], peak - 1), zero(bins[-1], peak + 1)
    centre = math.sqrt(low * high)
    bin_hz = 2.0 / ((high - low) * (centre - low)) * (peak - 1 - low) / last[peak - 1]
    step = 27.0 * math.log(high / low, 6.4) / 2.0  # in mel
    if low * bin_hz < 1000.0:
        return None
    f_max = high * bin_hz
    first = 15.0 + 27.0 * math.log(f_max / 1000.0, 6.4) - (n_mels + 1) * step
    f_min = first * 200.0 / 3.0 if first < 15.0 else 1000.0 * 6.4 ** ((first - 15.0) / 27.0)
    numbers = {
        "sampling_rate": round(bin_hz * n_fft),
        "n_fft": n_fft,
        "n_mels": n_mels,
        "f_min": round(f_min * 2) / 2,
        "f_max": round(f_max * 2) / 2,
    }
    spec = preset_spec("clap", **numbers, win_length=n_fft)
    return numbers if spec is not None and has_mel_bank(spec, weights) else None
