"""The drop-in for torchlibrosa; see `fastclap.drop_in`."""

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

from fastclap.drop_in.shared import (
    Method,
    _overrides,
    _preset,
    _same_bank,
)
from fastclap.kernels.log_mel.operator import log_mel


class _DeferredSpectrogram(Tensor):
    """What a patched torchlibrosa Spectrogram returns: a tensor that is computed when something other than a patched
    LogmelFilterBank looks at it, by the client's own code."""

    waveform: Tensor  # [B, samples]
    version: int
    stft: nn.Module
    power: float
    compute: Callable[[Tensor], Tensor]
    computed: Tensor | None  # [B, 1, frames, n_fft/2 + 1]

    @staticmethod
    def of(module: Any, waveform: Tensor, compute: Callable[[Tensor], Tensor]) -> _DeferredSpectrogram:
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

    def source(self) -> Tensor:
        if _version(self.waveform) != self.version:
            raise RuntimeError(
                "the waveform was written to before its spectrogram was used; write to a copy, or undo "
                "drop_in.patch('torchlibrosa')"
            )
        return self.waveform

    def now(self) -> Tensor:
        if self.computed is None:
            self.computed = self.compute(self.source())
        return self.computed

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(_DeferredSpectrogram, _DeferredSpectrogram.now, (args, dict(kwargs or {})))
        return function(*args, **kwargs)

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]  # where an operation skips the one above


def _torchlibrosa_spectrogram(owner: type, original: Method) -> Method:
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
            or not _once(stft, (stft.conv_real.weight, stft.conv_imag.weight), _is_hann_dft)
        ):
            return original(self, input)
        return _DeferredSpectrogram.of(self, input, functools.partial(original, self))

    return forward


def _torchlibrosa_log_mel(owner: type, original: Method) -> Method:
    def forward(self: Any, input: Tensor) -> Tensor:
        if not isinstance(input, _DeferredSpectrogram) or input.computed is not None:  # it may have been changed
            return original(self, input)
        if not self.is_log or self.top_db is not None or _overrides(self, owner, "power_to_db"):
            return original(self, input)
        stft: Any = input.stft
        bank = _once(self, (self.melW,), lambda module: _slaney_bank(module.melW.detach().cpu().double().numpy()))
        spec = bank and _preset(
            "clap",
            **bank,
            win_length=stft.win_length,
            hop_length=stft.hop_length,
            power=float(input.power),
            floor=float(self.amin),
            mean=10.0 * math.log10(max(self.amin, self.ref)),
        )
        if not spec or bank["n_fft"] != stft.n_fft:
            return original(self, input)
        return log_mel(input.source(), None, spec)[0][:, None]

    return forward


_ONCE: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def _once(module: nn.Module, weights: Sequence[Tensor], judge: Callable[[Any], Any]) -> Any:
    """judge(module), kept until its weights are written to; None while a gradient of them is asked for."""
    if any(weight.requires_grad for weight in weights):
        return None
    state = [(weight.data_ptr(), _version(weight)) for weight in weights]
    if module not in _ONCE or _ONCE[module][0] != state:
        _ONCE[module] = state, judge(module)
    return _ONCE[module][1]


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


def _slaney_bank(
    weights: np.ndarray,  # [n_fft/2 + 1, n_mels] float64
) -> dict[str, Any] | None:
    """The numbers behind a mel bank of librosa (Slaney scale and norm), which torchlibrosa does not keep; None if the
    bank is another one.

    The last filter spans many bins, so that both of its lines can be extended to its lower and upper corner, in bins.
    Its centre is their geometric mean, as the scale is logarithmic there, and its height then gives the width of a bin
    in Hz. What comes out is accepted only if it gives back the whole bank.
    """
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
    spec = _preset("clap", **numbers, win_length=n_fft)
    return numbers if spec is not None and _same_bank(weights, spec) else None
