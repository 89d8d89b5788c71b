"""`DualEncoder`: unit vectors of clips and captions, on top of an encoder of padded batches.

There are two doors for audio. `embed_audio` takes what a user has: files, arrays or tensors of any rate and order. It
sorts and pads them, and ends in `embed_batch`, which takes a batch that is padded already, as `eval_batches` decodes
them for whole collections.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastclap.errors import DataError, required
from fastclap.models.layers import as_float
from fastclap.models.products import fast_products


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module is in evaluation mode within, and in its own again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class DualEncoder(nn.Module):
    """Unit vectors of clips and captions, on top of an encoder of padded batches.

    Attributes:
        sampling_rate: rate in Hz of the waveforms that `encode_audio` and `embed_batch` take.
        equal_lengths_only: padding would change a clip's vector, so only clips of equal length are encoded together.
        single_on_cpu: on a CPU clips are encoded one at a time, because that is faster.
    """

    sampling_rate: int
    equal_lengths_only: bool = False
    single_on_cpu: bool = False

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def encode_audio(
        self,
        audio: Tensor,  # int16 or float [B, T]
        lengths: Tensor | None = None,  # [B]
        mean: Tensor | None = None,  # [B]
        std: Tensor | None = None,  # [B]
        host_lengths: Sequence[int] | None = None,
    ) -> Tensor:  # [B, D]
        """Embeddings of a padded batch, not normalised."""
        raise NotImplementedError

    def embed_audio(
        self,
        audio: Sequence[Any] | np.ndarray | Tensor,
        lengths: Sequence[int] | Tensor | None = None,
        *,
        sampling_rate: int = 16000,
        batch_size: int = 32,
    ) -> Tensor:  # [n, D]
        """Unit vectors of clips, in the order given.

        Args:
            audio: a list of paths and of 1-D arrays or tensors (int16, or float in ±1), or one padded [n, T] tensor.
            lengths: valid samples of each row, for the padded form.
            sampling_rate: of arrays and tensors, in Hz; resampled to the model's rate. Files know their own.
            batch_size: clips encoded at a time; some towers take one at a time on a CPU, which is faster there.

        Returns:
            float32 [n, D] on the model's device.

        Raises:
            DataError: nothing to embed, or a clip that is empty, not 1-D, not finite or not readable; it is named.
        """
        clips = _checked_clips(audio, lengths)
        sizes = [_num_samples(index, clip, self.sampling_rate, sampling_rate) for index, clip in enumerate(clips)]
        order = sorted(range(len(clips)), key=sizes.__getitem__)  # similar lengths together: less padding
        vectors = []
        for first in range(0, len(order), batch_size):
            chunk = order[first : first + batch_size]
            waves = [_waveform(index, clips[index], self.sampling_rate, sampling_rate) for index in chunk]
            if any(wave.dtype != torch.int16 for wave in waves):
                waves = [as_float(wave) for wave in waves]
            padded = nn.utils.rnn.pad_sequence([wave.to(self.device) for wave in waves], batch_first=True)
            vectors.append(self.embed_batch(padded, [len(wave) for wave in waves]))
        return torch.cat(vectors)[torch.tensor(order).argsort().to(self.device)]

    def embed_batch(
        self,
        audio: Tensor,  # int16 or float [B, T], padding arbitrary
        lengths: Sequence[int],
    ) -> Tensor:  # float32 [B, D]
        """Unit vectors of a padded batch of waveforms at the model's own rate.

        Args:
            audio: on any device.
            lengths: valid samples of each clip, on the host.
        """
        groups = self.encoding_groups(lengths)
        encoded = []
        with self._inference():
            for rows in groups:
                sizes = [lengths[row] for row in rows]
                batch = audio[:, : max(sizes)].index_select(0, torch.tensor(rows, device=audio.device)).to(self.device)
                encoded.append(self.encode_audio(batch, torch.tensor(sizes, device=self.device), host_lengths=sizes))
            order = torch.tensor([row for rows in groups for row in rows], device=self.device).argsort()
            vectors = F.normalize(torch.cat(encoded)[order].float(), dim=-1)
        return vectors.clone()  # outside of inference mode, so that the result can enter a graph

    def audio_runs(self, lengths: Sequence[int]) -> int:
        """How often `embed_batch` runs the audio encoder for a batch of these lengths."""
        return len(self.encoding_groups(lengths))

    def run_on_silence(self, times: int) -> None:
        """Run the audio encoder for nothing, as often as other ranks of sharded towers run it for their clips."""
        second = self.sampling_rate
        silence = torch.zeros(1, second, dtype=torch.int16, device=self.device)
        with self._inference():
            for _ in range(times):
                self.encode_audio(silence, torch.tensor([second], device=self.device), host_lengths=[second])

    def encoding_groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows of a batch that are encoded together."""
        if self.single_on_cpu and self.device.type == "cpu":
            return [[row] for row in range(len(lengths))]
        if self.equal_lengths_only:
            return [[row for row, size in enumerate(lengths) if size == length] for length in dict.fromkeys(lengths)]
        return [list(range(len(lengths)))]

    def embed_text(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Unit vectors of captions, in the order given: float32 [n, D] on the model's device."""
        raise NotImplementedError

    def text_batches(self, texts: Sequence[str], *, batch_size: int = 256) -> list[list[int]]:
        """Which texts `embed_text` encodes together, in its order; each batch alone has the same vectors."""
        raise NotImplementedError

    def similarity(
        self, audio: Sequence[Any] | np.ndarray | Tensor, texts: Sequence[str], *, sampling_rate: int = 16000
    ) -> Tensor:
        """Cosines [n, m] between clips and captions; arguments and errors as for the two embedding methods."""
        return self.embed_audio(audio, sampling_rate=sampling_rate) @ self.embed_text(texts).T

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        # weights that a parametrization computes, such as WavLM's positional convolution, are computed once
        with evaluation_mode(self), torch.inference_mode(), fast_products(self.device), parametrize.cached():
            yield


def _checked_clips(audio: Sequence[Any] | np.ndarray | Tensor, lengths: Sequence[int] | Tensor | None) -> list[Any]:
    """The clips of a list, or of a padded batch without their padding."""
    if isinstance(audio, (str, os.PathLike)):
        raise DataError(f"embed_audio takes a list of clips; for one file write [{str(audio)!r}]")
    if isinstance(audio, (Tensor, np.ndarray)):
        if audio.ndim != 2:
            raise DataError(f"a padded batch has the shape [clips, samples], not {tuple(audio.shape)}")
        sizes = [audio.shape[1]] * len(audio) if lengths is None else [int(length) for length in lengths]
        if len(sizes) != len(audio):
            raise DataError(f"{len(sizes)} lengths for {len(audio)} clips")
        for index, size in enumerate(sizes):
            if not 0 <= size <= audio.shape[1]:
                raise DataError(f"length {index} is {size}, but the batch is {audio.shape[1]} samples long")
        clips = [row[:size] for row, size in zip(audio, sizes, strict=True)]
    elif lengths is not None:
        raise DataError("lengths go with a padded [clips, samples] batch; the clips of a list know their own")
    else:
        clips = list(audio)
    if not clips:
        raise DataError("there is no clip to embed")
    return clips


def _num_samples(index: int, clip: Any, target_rate: int, sampling_rate: int) -> float:
    """Length at the model's rate (of a file, by its header), after the checks that need no decoding."""
    if isinstance(clip, (str, os.PathLike)):
        from fastclap.audio import audio_info

        with _errors_with_number(index):
            return audio_info(clip).duration * target_rate
    if not isinstance(clip, (Tensor, np.ndarray)):
        raise DataError(f"clip {index} is {type(clip).__name__}; give a path, an array or a tensor")
    if clip.ndim != 1:
        raise DataError(f"clip {index} has the shape {tuple(clip.shape)}; give mono 1-D audio (average the channels)")
    if len(clip) == 0:
        raise DataError(f"clip {index} is empty")
    return len(clip) * target_rate / sampling_rate


def _waveform(index: int, clip: Any, target_rate: int, sampling_rate: int) -> Tensor:
    """One clip as an int16 or float32 1-D tensor at the model's rate."""
    if isinstance(clip, (str, os.PathLike)):
        from fastclap.audio import read_audio

        with _errors_with_number(index):
            return torch.from_numpy(read_audio(clip, target_rate))
    wave = clip.detach() if isinstance(clip, Tensor) else torch.from_numpy(np.ascontiguousarray(clip))
    if wave.dtype != torch.int16:
        if not wave.is_floating_point():
            raise DataError(f"clip {index} is of type {wave.dtype}; give int16, or float in ±1")
        wave = wave.float()
        if not wave.isfinite().all():
            raise DataError(f"clip {index} has NaN or infinite samples")
    if sampling_rate != target_rate:
        soxr = required("soxr", "changing the sampling rate")
        wave = torch.from_numpy(soxr.resample(as_float(wave).cpu().numpy(), sampling_rate, target_rate))
        if len(wave) == 0:
            raise DataError(f"clip {index} is too short to resample from {sampling_rate} to {target_rate} Hz")
    return wave


@contextlib.contextmanager
def _errors_with_number(index: int) -> Iterator[None]:
    """Errors of a file also say which clip of the list it is."""
    try:
        yield
    except DataError as error:
        raise DataError(f"clip {index}: {error}") from error
