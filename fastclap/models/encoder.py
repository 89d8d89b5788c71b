"""`DualEncoder`: unit vectors of clips and captions, on top of an encoder of padded batches.

There are two doors for audio. `embed_audio` takes what a user has: files, arrays or tensors of any rate and order. It
sorts and pads them, and ends in `embed_batch`, which takes a batch that is padded already, as `eval_batches` decodes
them for whole collections.

Attention costs the square of a clip's length. A recording of more than `LONG_SECONDS` is therefore embedded in windows,
as few as there can be of at most `WINDOW_SECONDS` and equally long to within a sample: its vector is the mean of their
unit vectors, scaled to unit length. Recordings up to that length are seen whole. A tower that sees the beginning of a
clip alone sees that of a long one.

Any number of threads may embed with one model at a time, in either mode of it. Meanwhile its modules are in evaluation
mode, so it must not train in another thread.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
import operator
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclap.audio import window_edges
from fastclap.errors import ConfigError, DataError, required
from fastclap.models.layers import as_float, length_mask, weights_computed_once
from fastclap.models.products import fast_products

if TYPE_CHECKING:
    from fastclap.audio import AudioSource

LONG_SECONDS = 300.0
"""A longer recording is embedded in windows."""
WINDOW_SECONDS = 30.0
"""Longest of such windows."""
WINDOWS_AT_ONCE = 8
"""Windows that are decoded and encoded together."""

_lock = threading.Lock()
_in_use: dict[nn.Module, list[Any]] = {}  # users of each module in evaluation mode, and its own mode


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module is in evaluation mode within, and in its own again once the last user in any thread has left."""
    modules = list(model.modules())
    with _lock:
        for module in modules:
            _in_use.setdefault(module, [0, module.training])[0] += 1
            if module.training:
                module.training = False
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                users = _in_use[module]
                users[0] -= 1
                if not users[0]:
                    del _in_use[module]
                    if users[1]:
                        module.training = True


class _Piece(NamedTuple):
    """A clip of a batch, or a window of it."""

    row: int
    begin: int
    size: int
    whole: bool


class DualEncoder(nn.Module):
    """Unit vectors of clips and captions, on top of an encoder of padded batches.

    Attributes:
        sampling_rate: rate in Hz of the waveforms that `encode_audio` and `embed_batch` take.
        equal_lengths_only: padding would change a clip's vector, so only clips of equal length are encoded together.
        single_on_cpu: on a CPU clips are encoded one at a time, because that is faster.
        beginning: the encoder sees so many samples of a clip and no more; None: all of it.
    """

    sampling_rate: int
    equal_lengths_only: bool = False
    single_on_cpu: bool = False
    beginning: int | None = None

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
                Recordings of more than `LONG_SECONDS` are embedded in windows; of files no more than a few windows are
                in memory.
            lengths: valid samples of each row, for the padded form.
            sampling_rate: of arrays and tensors, in Hz; resampled to the model's rate. Files know their own.
            batch_size: clips encoded at a time; some towers take one at a time on a CPU, which is faster there.

        Returns:
            float32 [n, D] on the model's device.

        Raises:
            ConfigError: `sampling_rate` or `batch_size` is not a positive number.
            DataError: nothing to embed, or a clip that is empty, not 1-D, not finite or not readable; it is named.
        """
        check_batch_size(batch_size)
        if isinstance(sampling_rate, bool) or not isinstance(sampling_rate, numbers.Real) or not sampling_rate > 0:
            raise ConfigError(f"sampling_rate is {sampling_rate!r}; give a positive number of Hz")
        if not sampling_rate < math.inf:
            raise ConfigError(f"sampling_rate is {sampling_rate!r}; give a finite number of Hz")
        clips = _checked_clips(audio, lengths)
        sizes = [_num_samples(index, clip, self.sampling_rate, sampling_rate) for index, clip in enumerate(clips)]
        order = sorted(range(len(clips)), key=sizes.__getitem__)  # similar lengths together: less padding
        streamed = [
            index
            for index in order
            if sizes[index] > LONG_SECONDS * self.sampling_rate and isinstance(clips[index], (str, os.PathLike))
        ]
        batched = [index for index in order if index not in set(streamed)]
        vectors = []
        for first in range(0, len(batched), batch_size):
            chunk = batched[first : first + batch_size]
            waves = [_waveform(index, clips[index], self.sampling_rate, sampling_rate) for index in chunk]
            if any(wave.dtype != torch.int16 for wave in waves):
                waves = [as_float(wave) for wave in waves]
            padded = nn.utils.rnn.pad_sequence([wave.to(self.device) for wave in waves], batch_first=True)
            vectors.append(self.embed_batch(padded, [len(wave) for wave in waves]))
        for index in streamed:
            from fastclap.audio import AudioFile

            with _errors_with_number(index), AudioFile(clips[index], self.sampling_rate) as file:
                vectors.append(self.embed_recording(file)[None])
        return torch.cat(vectors)[torch.tensor(batched + streamed).argsort().to(self.device)]

    def embed_recording(self, file: AudioSource) -> Tensor:  # float32 [D]
        """Unit vector of a recording as `embed_batch` would give it, with no more than a few windows of it in memory.

        Args:
            file: an open one, at the model's own rate.

        Raises:
            AudioError: it cannot be decoded, or all of its samples are zero.
        """
        from fastclap.audio import AudioError, windows

        samples = file.num_samples if self.beginning is None else min(file.num_samples, self.beginning)
        long = self._in_windows(samples)
        parts = windows(file, WINDOW_SECONDS) if long else iter([file.read(0, samples)])
        silent, vectors = True, []
        while waves := [torch.from_numpy(wave.astype(np.int16)) for wave in itertools.islice(parts, WINDOWS_AT_ONCE)]:
            silent = silent and not any(wave.any() for wave in waves)
            padded = nn.utils.rnn.pad_sequence(waves, batch_first=True)
            vectors.append(self.embed_batch(padded, [len(wave) for wave in waves]))
        if silent:
            raise AudioError(file.path, "all samples are zero: the recording is silent; replace it or remove its row")
        return F.normalize(torch.cat(vectors).sum(0), dim=-1) if long else vectors[0][0]

    def embed_batch(
        self,
        audio: Tensor,  # int16 or float [B, T], padding arbitrary
        lengths: Sequence[int],
    ) -> Tensor:  # float32 [B, D]
        """Unit vectors of a padded batch of waveforms at the model's own rate, long ones in windows.

        Args:
            audio: on any device.
            lengths: valid samples of each clip, on the host.

        Raises:
            DataError: `audio` is no such batch, the lengths are not its rows', or a sample is not finite; the row is
                named.
        """
        lengths = _checked_batch(audio, lengths)
        runs = self._runs(lengths)
        sums: Tensor | None = None
        with self._inference():
            for run in runs:
                sizes = [piece.size for piece in run]
                rows = torch.tensor([piece.row for piece in run], device=audio.device)
                if run[0].whole:
                    batch = audio[:, : max(sizes)].index_select(0, rows)
                else:
                    windows = [audio[piece.row, piece.begin : piece.begin + piece.size] for piece in run]
                    batch = nn.utils.rnn.pad_sequence(windows, batch_first=True)
                batch = batch.to(self.device)
                encoded = self.encode_audio(batch, torch.tensor(sizes, device=self.device), host_lengths=sizes).float()
                if sums is None:
                    sums = encoded.new_zeros(len(lengths), encoded.shape[1])
                if run[0].whole:
                    sums[rows.to(sums.device)] = encoded
                else:  # all of one clip
                    sums[run[0].row] += F.normalize(encoded, dim=-1).sum(0)
            assert sums is not None
            vectors = F.normalize(sums, dim=-1)
        return vectors.clone()  # outside of inference mode, so that the result can enter a graph

    def _in_windows(self, samples: int) -> bool:
        return self.beginning is None and samples > LONG_SECONDS * self.sampling_rate

    def _runs(self, lengths: Sequence[int]) -> list[list[_Piece]]:
        """What is encoded together: clips of a batch, or windows of one of them."""
        short = [row for row, size in enumerate(lengths) if not self._in_windows(size)]
        parts = [[_Piece(row, 0, lengths[row], True) for row in short]] if short else []
        for row in (row for row, size in enumerate(lengths) if self._in_windows(size)):
            edges = window_edges(lengths[row], int(WINDOW_SECONDS * self.sampling_rate))
            pieces = [_Piece(row, begin, end - begin, False) for begin, end in itertools.pairwise(edges)]
            parts += [pieces[first : first + WINDOWS_AT_ONCE] for first in range(0, len(pieces), WINDOWS_AT_ONCE)]
        return [[part[i] for i in group] for part in parts for group in self.encoding_groups([p.size for p in part])]

    def audio_runs(self, lengths: Sequence[int]) -> int:
        """How often `embed_batch` runs the audio encoder for a batch of these lengths."""
        return len(self._runs(lengths))

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
        with evaluation_mode(self), torch.inference_mode(), fast_products(self.device), weights_computed_once():
            yield


def check_batch_size(batch_size: int) -> None:
    """Raise a ConfigError unless this is a positive integer."""
    if not isinstance(batch_size, numbers.Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size!r}; give an integer of at least 1")


def checked_texts(texts: Sequence[str]) -> list[str]:
    """The captions of a list, each of them text with something in it.

    Raises:
        DataError: no list, an empty one, or a caption that is no string, blank, or holds half of a character.
    """
    if isinstance(texts, (str, bytes)):
        raise DataError(f"embed_text takes a list of captions, not {texts!r}; for one caption write [{texts!r}]")
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise DataError(f"embed_text takes a list of captions, not {type(texts).__name__}")
    found = list(texts)
    if not found:
        raise DataError("embed_text takes a list of captions, and this one is empty")
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise DataError(f"text {index} is {text!r}, not a string")
        if not text.strip():
            raise DataError(f"text {index} is blank")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"text {index} is {text!a}, which holds half of a character (a lone surrogate)")
    return found


def _checked_clips(audio: Sequence[Any] | np.ndarray | Tensor, lengths: Sequence[int] | Tensor | None) -> list[Any]:
    """The clips of a list, or of a padded batch without their padding."""
    if isinstance(audio, (str, os.PathLike)):
        raise DataError(f"embed_audio takes a list of clips; for one file write [{str(audio)!r}]")
    if isinstance(audio, (Tensor, np.ndarray)):
        if audio.ndim != 2:
            raise DataError(f"a padded batch has the shape [clips, samples], not {tuple(audio.shape)}")
        sizes = [audio.shape[1]] * len(audio) if lengths is None else _integers("length", lengths)
        if len(sizes) != len(audio):
            raise DataError(f"{len(sizes)} lengths for {len(audio)} clips")
        for index, size in enumerate(sizes):
            if not 0 <= size <= audio.shape[1]:
                raise DataError(f"length {index} is {size}, but the batch is {audio.shape[1]} samples long")
        clips = [row[:size] for row, size in zip(audio, sizes, strict=True)]
    elif lengths is not None:
        raise DataError("lengths go with a padded [clips, samples] batch; the clips of a list know their own")
    elif isinstance(audio, (bytes, Mapping)) or not isinstance(audio, Iterable):
        raise DataError(f"embed_audio takes a list of clips, or a padded batch of them, not {type(audio).__name__}")
    else:
        clips = list(audio)
    if not clips:
        raise DataError("there is no clip to embed")
    return clips


def _integers(name: str, values: Any) -> list[int]:
    """Integers of a list, an array or a tensor."""
    if not isinstance(values, Iterable):
        raise DataError(f"{name}s are {values!r}; give one for each clip")
    found = []
    for index, value in enumerate(values.tolist() if isinstance(values, (Tensor, np.ndarray)) else values):
        try:
            found.append(operator.index(value))
        except TypeError as error:
            raise DataError(f"{name} {index} is {value!r}, not an integer") from error
    return found


def _checked_batch(audio: Tensor, lengths: Sequence[int]) -> list[int]:
    """The lengths of a padded batch, after looking at both."""
    if not isinstance(audio, Tensor) or audio.ndim != 2:
        shape = tuple(audio.shape) if isinstance(audio, (Tensor, np.ndarray)) else type(audio).__name__
        raise DataError(f"embed_batch takes a tensor [clips, samples], not {shape}; embed_audio takes lists and arrays")
    sizes = _integers("length", lengths)
    if len(sizes) != len(audio) or not sizes:
        raise DataError(f"{len(sizes)} lengths for {len(audio)} clips; give one for each, of at least one clip")
    for row, size in enumerate(sizes):
        if not 1 <= size <= audio.shape[1]:
            raise DataError(f"length {row} is {size}; a row has from 1 to {audio.shape[1]} samples")
    if audio.dtype != torch.int16:
        if not audio.is_floating_point():
            raise DataError(f"a batch of type {audio.dtype}; give int16, or float in ±1")
        beyond = ~length_mask(torch.tensor(sizes, device=audio.device), audio.shape[1])
        finite = (audio.isfinite() | beyond).all(1).tolist()
        if not all(finite):
            raise DataError(f"row {finite.index(False)} has NaN or infinite samples")
    return sizes


def _num_samples(index: int, clip: Any, target_rate: int, sampling_rate: float) -> float:
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
    if isinstance(clip, Tensor):
        known = clip.dtype == torch.int16 or clip.is_floating_point()
        known = known and clip.layout == torch.strided and not clip.is_meta
    else:
        known = clip.dtype.kind == "f" or (clip.dtype.kind == "i" and clip.dtype.itemsize == 2)
    if not known:
        kind = clip.dtype if isinstance(clip, Tensor) else f"torch.{clip.dtype}"
        raise DataError(f"clip {index} is of type {kind}; give int16, or float in ±1")
    return len(clip) * target_rate / sampling_rate


def _waveform(index: int, clip: Any, target_rate: int, sampling_rate: float) -> Tensor:
    """One clip as an int16 or float32 1-D tensor at the model's rate."""
    if isinstance(clip, (str, os.PathLike)):
        from fastclap.audio import read_audio

        with _errors_with_number(index):
            return torch.from_numpy(read_audio(clip, target_rate))
    if isinstance(clip, np.ndarray):
        kind = np.int16 if clip.dtype.kind == "i" else np.float32
        with np.errstate(over="ignore"):  # what float32 does not hold becomes infinite, and is an error
            clip = torch.from_numpy(np.array(clip, kind))
    wave = clip.detach()
    if wave.dtype != torch.int16:
        wave = wave.float()
        if not wave.isfinite().all():
            raise DataError(f"clip {index} has NaN or infinite samples")
    if sampling_rate != target_rate:
        soxr = required("soxr", "changing the sampling rate")
        try:
            wave = torch.from_numpy(soxr.resample(as_float(wave).cpu().numpy(), sampling_rate, target_rate))
        except (MemoryError, RuntimeError, ValueError) as error:
            raise DataError(
                f"clip {index} cannot be resampled from {sampling_rate} to {target_rate} Hz: {error}"
            ) from error
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
