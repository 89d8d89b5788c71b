"""Decode audio files to mono int16 at one sampling rate, reading no more of the file than asked for.

libsndfile (through soundfile) decodes WAV, FLAC, OGG, Opus, MP3 and AIFF; soxr resamples. A mono 16-bit file at the
wanted rate is read straight into int16; every other file is decoded to float32, averaged over its channels, resampled,
and rounded to int16 with clipping. int16 is the form in which clips travel to the device: half the bytes of float32 and
exact for 16-bit recordings. libsndfile shortens a truncated WAV or OGG without an error; here such a file is an error,
because a clip that has lost its second half no longer matches its caption.

Only regular files are read: a pipe would be waited for, and a device never ends. Nothing is believed of a header that
would take memory: rates are those of audio, and one read decodes at most 2³⁰ values (18 hours of 16 kHz mono);
`windows` reads longer recordings in parts.

Both packages are imported when a file is opened or resampled, so that arrays need neither.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import stat
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from fastclap.console import printable
from fastclap.errors import DataError, required
from fastclap.reading import kind_of_file

INT16_SCALE = 32768.0
RATES = range(1000, 1_000_001)  # Hz; what says 1 Hz would become thousands of times as long when it is resampled
MIN_SECONDS = 0.1  # a shorter clip is of no use for training

_STATISTICS_BLOCK = 1 << 16
_MAX_VALUES = 1 << 30  # that one read decodes: 4 GiB of float32

# Writers to a pipe (ffmpeg, sox) cannot revisit the header and leave a size of 2 GiB or more in it.
_STREAMED_SIZE = 0x7FFF0000
_CHUNK_CUT_SHORT = re.compile(r"(?:data|SSND)\s*: (\d+) \(should be (\d+)\)")
_OGG_DAMAGE = ("End-Of-Stream flag", "end-of-stream bit", "Junk after the last", "Corrupted bitstream", "a hole at")
_RESAMPLER_MARGIN_SECONDS = 0.1


class AudioError(DataError):
    """An audio file cannot be used. `path` names it, `reason` says what is wrong and what to do."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


class AudioInfo(NamedTuple):
    """What the header of an audio file says."""

    num_samples: int  # of one channel, at the file's own rate
    sampling_rate: int  # Hz
    channels: int
    duration: float  # seconds


class Clip(NamedTuple):
    """A decoded clip with the statistics of the whole file it is from."""

    wave: np.ndarray  # int16 [n]
    mean: float  # full scale = ±1
    variance: float  # population variance, in the same unit

    @property
    def std(self) -> float:
        return math.sqrt(self.variance)


class AudioSource(Protocol):
    """What a clip is read from: an open `AudioFile`, or a clip of a packed folder."""

    path: str
    sampling_rate: int  # Hz
    num_samples: int  # at that rate
    statistics: tuple[float, float] | None  # (mean, variance) of the whole clip, where known without reading it

    def read(self, start: int = 0, num_samples: int | None = None) -> np.ndarray: ...


class AudioFile:
    """An open audio file seen as mono int16 at `sampling_rate`; opened once for its length and any number of reads.

    Args:
        path: file to open.
        sampling_rate: rate in Hz of the samples that `read` returns; the file's own rate if None.

    Attributes:
        num_samples: length of the whole file in samples at `sampling_rate`.
        info: what the file's header says.

    Raises:
        AudioError: the file is missing, empty, truncated, damaged, no regular file or of an unsupported type, or holds
            no samples.
        DataError: `sampling_rate` is none of audio.
        MissingPackageError: soundfile is not installed.
    """

    statistics: tuple[float, float] | None = None

    def __init__(self, path: str | os.PathLike[str], sampling_rate: int | None = None) -> None:
        if sampling_rate is not None and sampling_rate not in RATES:
            raise DataError(f"sampling_rate={sampling_rate}: it is {RATES[0]} to {RATES[-1]} Hz")
        self.path = os.fspath(path)
        self._file = _open(self.path)
        self.info = AudioInfo(
            self._file.frames, self._file.samplerate, self._file.channels, self._file.frames / self._file.samplerate
        )
        source, target = self.info.sampling_rate, sampling_rate or self.info.sampling_rate
        self.sampling_rate = target
        self.num_samples = (2 * self.info.num_samples * target + source) // (2 * source)  # rounded to nearest
        try:
            self._check_header()
        except AudioError:
            self._file.close()
            raise

    @property
    def has_length(self) -> bool:
        """Whether the file states its length; an MP3 file without a tag that does has an estimated one."""
        return self._file.format != "MP3" or _has_mp3_length(self.path)

    def read(self, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """Decode `num_samples` samples from `start`, both at `sampling_rate`; to the end of the file if None.

        Returns:
            int16 [min(num_samples, self.num_samples - start)].

        Raises:
            AudioError: `start` lies outside the file, the data is damaged or ends early, a sample is NaN or infinite,
                or there is more to decode than one read does.
            MissingPackageError: the rate has to change and soxr is not installed.
        """
        if not 0 <= start < self.num_samples:
            raise AudioError(self.path, f"start={start} lies outside the file, which has {self.num_samples} samples")
        if num_samples is not None and num_samples < 1:
            raise AudioError(self.path, f"num_samples={num_samples}: there is nothing to read")
        stop = self.num_samples if num_samples is None else min(start + num_samples, self.num_samples)
        if self.sampling_rate != self.info.sampling_rate:
            return _to_int16(self._resample(start, stop))
        if self._file.subtype == "PCM_16" and self.info.channels == 1:
            return self._decode(start, stop, "int16")
        return _to_int16(self._decode_mono(start, stop))

    def _resample(self, start: int, stop: int) -> np.ndarray:
        """Samples [start, stop) at the wanted rate, from the stretch of the file that they depend on."""
        source, target = self.info.sampling_rate, self.sampling_rate
        # A stretch must begin where a source and a target sample coincide, or all its samples would be shifted in time.
        divisor = math.gcd(source, target)
        margin = math.ceil(_RESAMPLER_MARGIN_SECONDS * target)
        block = max(0, start - margin) // (target // divisor)
        first = block * (source // divisor)
        last = min(self.info.num_samples, math.ceil((stop + margin) * source / target))
        soxr = required("soxr", "changing the sampling rate")
        wave = soxr.resample(self._decode_mono(first, last), source, target)
        skip = start - block * (target // divisor)
        wave = wave[skip : skip + stop - start]
        return np.pad(wave, (0, stop - start - len(wave)))  # soxr may round the last half sample away

    def _decode_mono(self, first: int, last: int) -> np.ndarray:
        wave = self._decode(first, last, "float32")
        finite = np.isfinite(wave)
        if not finite.all():
            position = int(np.flatnonzero(~finite)[0]) // self.info.channels + first
            raise AudioError(self.path, f"sample {position} is NaN or infinite; export the clip again")
        with np.errstate(over="ignore"):  # what is beyond full scale will be clipped
            return wave if wave.ndim == 1 else wave.mean(axis=1, dtype=np.float32)

    def _decode(self, first: int, last: int, dtype: Literal["int16", "float32"]) -> np.ndarray:
        """Frames [first, last) at the file's own rate: [n] if mono, [n, channels] otherwise."""
        import soundfile

        if (last - first) * self.info.channels > _MAX_VALUES:
            raise AudioError(
                self.path,
                f"the header promises {self.info.num_samples} samples in {self.info.channels} channels "
                f"({self.info.duration / 3600:.1f} h), of which one read decodes at most {_MAX_VALUES} values: it is "
                "damaged, or read it in parts (`fastclap.audio.windows`, --data.crop-seconds)",
            )
        try:
            if self._file.tell() != first:
                self._file.seek(first)
            wave = self._file.read(last - first, dtype=dtype)
        except soundfile.SoundFileError as error:
            reason = f"the audio data is damaged or truncated ({_message(error)}); replace the file"
            raise AudioError(self.path, reason) from error
        except MemoryError as error:
            reason = f"the header promises {self.info.num_samples} samples, more than fit into memory; it is damaged"
            raise AudioError(self.path, reason) from error
        if len(wave) < last - first and self.has_length:
            raise AudioError(
                self.path,
                f"the header promises {self.info.num_samples} samples but decoding ended at {first + len(wave)}: "
                "the file is truncated or damaged; replace it",
            )
        if not len(wave):
            raise AudioError(self.path, f"no samples could be decoded from sample {first} on; replace the file")
        return wave

    def _check_header(self) -> None:
        if self.info.sampling_rate not in RATES:
            raise AudioError(
                self.path,
                f"the header says {self.info.sampling_rate} Hz, and audio has {RATES[0]} to {RATES[-1]}: it is "
                "damaged; replace the file",
            )
        log = self._file.extra_info
        cut = _CHUNK_CUT_SHORT.search(log) if "(should be" in log else None
        if cut and int(cut[1]) > int(cut[2]) and int(cut[1]) < _STREAMED_SIZE:
            raise AudioError(
                self.path, f"truncated: the header promises {cut[1]} bytes of audio, the file has {cut[2]}; replace it"
            )
        if self._file.format == "OGG" and any(mark in log for mark in _OGG_DAMAGE):
            raise AudioError(self.path, "truncated or damaged: the OGG stream has a gap or no end; replace it")
        if self.info.num_samples == 0:
            raise AudioError(self.path, "zero length: the file holds no samples; replace it or remove its row")

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def read_audio(
    path: str | os.PathLike[str],
    sampling_rate: int = 16000,
    *,
    start: int = 0,
    num_samples: int | None = None,
    dtype: Literal["int16", "float32"] = "int16",
) -> np.ndarray:
    """Decode a file, or a part of it, to mono at `sampling_rate`.

    Args:
        path: WAV, FLAC, OGG, Opus, MP3 or AIFF file of any rate, width and channel count.
        sampling_rate: wanted rate in Hz; a file of another rate is resampled by soxr (HQ).
        start: first sample, counted at `sampling_rate`.
        num_samples: how many samples, counted at `sampling_rate`; to the end of the file if None or if fewer remain.
        dtype: "int16", or "float32" for the same values divided by 32768.

    Returns:
        [n] array. Only the wanted part is decoded (of a resampled file: 0.1 s more at each side), so damage elsewhere
        in a FLAC or MP3 file can go unnoticed; a truncated WAV or OGG file is always noticed.

    Raises:
        AudioError: missing file, unsupported type, truncated or damaged data, no samples, NaN or infinite samples.
    """
    with AudioFile(path, sampling_rate) as file:
        wave = file.read(start, num_samples)
    return wave if dtype == "int16" else wave.astype(np.float32) / np.float32(INT16_SCALE)


def audio_info(path: str | os.PathLike[str]) -> AudioInfo:
    """Length, rate and channels of a file from its header alone.

    Raises:
        AudioError: the file cannot be opened, is truncated, or holds no samples.
    """
    with AudioFile(path) as file:
        return file.info


def window_edges(num_samples: int, most: int) -> list[int]:
    """Where windows begin and end: as few as there can be of at most `most` samples, equally long to within one."""
    count = -(-num_samples // most)
    return [num_samples * edge // count for edge in range(count + 1)]


def windows(
    file: AudioSource,
    seconds: float,  # at most, of a window
) -> Iterator[np.ndarray]:  # int16 [n]
    """A recording in parts that follow each other, as few as there can be and equally long to within a sample.

    Each is decoded when it is asked for, so a recording of hours takes the memory of one of them.

    Raises:
        AudioError: as `AudioFile.read`, when the part is asked for.
        DataError: `seconds` is less than one sample.
    """
    most = int(min(seconds * file.sampling_rate, file.num_samples)) if seconds > 0 else 0
    if not most:
        raise DataError(f"windows of {seconds} s hold no sample")
    for begin, end in itertools.pairwise(window_edges(file.num_samples, most)):
        try:
            yield file.read(begin, end - begin)
        except AudioError:
            if begin and not getattr(file, "has_length", True):  # it ended before its estimated length
                return
            raise


def whole_clip(file: AudioSource) -> Clip:
    """A whole clip with its mean and population variance.

    Raises:
        AudioError: as `AudioFile.read`; the clip is shorter than 0.1 s, or all its samples are zero.
    """
    wave = file.read()
    if file.statistics is not None:
        return Clip(wave, *file.statistics)
    if len(wave) < MIN_SECONDS * file.sampling_rate:
        seconds = len(wave) / file.sampling_rate
        raise AudioError(file.path, f"too short: {seconds:.3f} s, at least {MIN_SECONDS} s are needed; remove its row")
    # Sums of integers are exact, so the statistics do not depend on the order of summation.
    total = squares = 0
    for begin in range(0, len(wave), _STATISTICS_BLOCK):
        block = wave[begin : begin + _STATISTICS_BLOCK].astype(np.int64)
        total += int(block.sum())
        squares += int(block @ block)
    if not squares:
        raise AudioError(file.path, "all samples are zero: the recording is silent; replace it or remove its row")
    mean = total / len(wave)
    variance = max((squares - total * mean) / len(wave), 0.0)
    return Clip(wave, mean / INT16_SCALE, variance / INT16_SCALE**2)


def _open(path: str) -> Any:
    soundfile = required("soundfile", "reading audio files")
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        reason = "no such file; check the path in the manifest and the audio root (--data.audio-root)"
        raise AudioError(path, reason) from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte or half a character in the path
        raise AudioError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise AudioError(path, f"is {kind_of_file(status.st_mode)}, not an audio file; correct the path")
    if not status.st_size:
        raise AudioError(path, "zero length: the file is empty; replace it or remove its row")
    try:
        return soundfile.SoundFile(os.fsencode(path))  # soundfile would refuse a name that is not UTF-8
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        try:
            with open(path, "rb") as file:
                file.read(1)
        except OSError as cause:
            raise AudioError(path, f"cannot be read: {cause.strerror}") from cause
        raise AudioError(
            path,
            f"not readable as audio ({_message(error)}): it is truncated, damaged or of an unsupported type; "
            "WAV, FLAC, OGG, Opus, MP3 and AIFF are supported",
        ) from error


def _message(error: Exception) -> str:
    return str(getattr(error, "error_string", "") or error).strip().rstrip(".")


def _has_mp3_length(path: str) -> bool:
    """Whether an MP3 file states its length, by a Xing, Info or VBRI tag in the first frame, or it was estimated."""
    with open(path, "rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3" and len(head) == 10:  # skip the tag, whose size is four 7-bit bytes
            file.seek(10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]))
        else:
            file.seek(0)
        frame = file.read(2048)
    return any(tag in frame for tag in (b"Xing", b"Info", b"VBRI"))


def _to_int16(wave: np.ndarray) -> np.ndarray:
    """float32 in ±1 to int16, rounded to nearest and clipped; exact for what was 16-bit before."""
    with np.errstate(over="ignore"):
        scaled = wave * np.float32(INT16_SCALE)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -INT16_SCALE, INT16_SCALE - 1, out=scaled)
    return scaled.astype(np.int16)
