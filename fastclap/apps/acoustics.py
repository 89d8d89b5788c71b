"""What a voice does, in numbers: pitch, loudness, pace, pauses, brightness and breathiness of a waveform.

Every function takes mono speech at 16 kHz, full scale ±1, and is deterministic. `measure` calls them all. The pitch
tracker is Boersma's autocorrelation method, the one that Praat made known, written from his paper: no library with a
free licence agreed with Praat closely enough. docs/captions.md has those figures, the formulas and their sources;
tests/fastclap/apps/test_acoustics.py compares each measure with another program.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import fft, signal

from fastclap.errors import DataError

SAMPLING_RATE = 16000  # Hz
STEP = 0.01  # seconds between frames of every track
PITCH_FLOOR, PITCH_CEILING = 75.0, 600.0  # Hz
CREAK_FLOOR = 45.0  # Hz, for telling a creak from a whisper
VERSION = 1  # of the measures: numbers of another version are measured again
SILENT = -70.0  # LUFS, the absolute gate of BS.1770

# Boersma (1993), with the values of Praat's command "To Pitch (ac)".
_CANDIDATES = 15
_SILENCE, _VOICING = 0.03, 0.45  # of the recording's peak, of the autocorrelation
_OCTAVE_COST, _JUMP_COST, _VOICING_COST = 0.01, 0.35, 0.14
_FINER = 4  # grid points a sample, of the autocorrelation
_FRAMES_AT_ONCE = 1000  # for the memory
_MOST_FRAMES = 3000  # of a clip
_VOICED_SHARE, _VOICED_HNR = 0.5, 1.8  # of the speech, dB: with less of both a clip is taken to be whispered
_HNR_PERIODS = 4.5  # of the pitch floor in a window, as Boersma has it for harmonicity; for pitch it is 3

# Speech and pauses: de Jong and Wempe (2009); the shortest pause is that of de Jong and Bosker (2013).
_PAUSE_DEPTH, _NUCLEUS_DIP = 25.0, 2.0  # dB below the level that 1 % of the frames exceed, dB between two syllables
_SHORTEST_PAUSE, _SHORTEST_SPEECH = 0.25, 0.1  # seconds

# Sex from the fourth formant and the pitch. Formants of 45 men and 48 women: Hillenbrand et al. (1995), whose means of
# the fourth over 12 vowels are 3,545 and 4,167 Hz, and whose standard deviations within a vowel are about 230 Hz.
_F4_MIDDLE, _F4_SLOPE, _F4_MOST = 3880.0, (4167 - 3545) / 230**2, 3.0  # Hz, nats a Hz, nats
_MALE_BELOW, _FEMALE_ABOVE = 140.0, 280.0  # Hz; between them both sexes speak when they are moved
_PITCH_SLOPE, _LOW_MOST, _HIGH_MOST = 0.75, 5.0, 2.0  # nats a semitone, nats, nats
_SURE = 0.5  # nats; with less no sex is named

_LPC_ORDERS = (10, 12)
_LPC_RATE = 11000  # Hz: up to 5.5 kHz
_WIDEST = 600.0  # Hz, bandwidth of a formant
_SHORTEST_COURSE = 0.6  # seconds of speech that may be said to rise or fall


@dataclass(frozen=True)
class Acoustics:
    """The measures of one clip; None where the clip has too little of what is measured."""

    duration: float  # seconds
    speech_s: float  # seconds of the clip that are not silence
    voiced_share: float  # of those, how much has a pitch; a whisper has none, and a creak too low to measure has some
    pitch_hz: float | None  # median of the fundamental frequency
    pitch_range_st: float | None  # semitones from its 20th to its 80th percentile
    loudness_lufs: float  # of ITU-R BS.1770-4, of the mono mix
    syllable_rate: float | None  # syllable nuclei a second of speech
    pause_share: float  # of the time from the first sound to the last
    longest_pause_s: float  # 0 without a pause
    pause_place: float | None  # middle of the longest pause, from 0 (first sound) to 1 (last)
    spectral_centroid_hz: float  # median over voiced frames, or over all speech of a clip without pitch
    hnr_db: float | None  # harmonics-to-noise ratio, median over voiced frames
    f4_hz: float | None  # fourth formant
    pitch_course: (
        tuple[float, float, float] | None
    )  # medians of the first, middle and last third, semitones re pitch_hz
    loudness_course: tuple[float, float, float] | None  # likewise of the level, dB re the whole


def measure(wave: np.ndarray) -> Acoustics:
    """All measures of a clip, rounded to what is worth printing.

    Args:
        wave: float [n], mono at 16 kHz, full scale ±1.

    Raises:
        DataError: nothing in the clip is louder than -70 LUFS.
    """
    wave = np.asarray(wave, np.float64)
    loudness = loudness_lufs(wave)
    if not loudness > SILENT:
        raise DataError("silent: nothing in it is louder than -70 LUFS; replace it or remove its row")
    pitch, times = pitch_track(wave)
    level = level_track(wave, times)
    stretches = speech_stretches(level)
    speech = np.zeros(len(level), bool)
    for first, last in stretches:
        speech[first:last] = True
    voiced = (pitch > 0) & speech
    if voiced.any() and not _has_voice(wave, times, pitch, voiced, speech):
        voiced[:] = False
    share = float(voiced.sum() / speech.sum())
    if not voiced.any():  # a voice that is too low to have a pitch here is no whisper
        lower, middles = pitch_track(wave, CREAK_FLOOR)
        share = float((lower[np.interp(middles, times, speech) > 0.5] > 0).mean())
        share = share if share >= _VOICED_SHARE else 0.0
    pauses = [(end, begin) for (_, end), (begin, _) in itertools.pairwise(stretches)]
    span = stretches[-1][1] - stretches[0][0]
    longest = max(pauses, key=lambda pause: pause[1] - pause[0], default=None)
    edges = speech[0] * times[0] + speech[-1] * (len(wave) / SAMPLING_RATE - times[-1])  # where no frame has its middle
    seconds = min(speech.sum() * STEP + max(0.0, edges - STEP), len(wave) / SAMPLING_RATE)
    nuclei = syllable_nuclei(level, pitch)
    median = float(np.median(pitch[voiced])) if voiced.any() else None
    semitones = 12 * np.log2(pitch[voiced] / median) if median else np.zeros(0)
    some = _spread(voiced if median else speech)
    long_enough = span * STEP >= _SHORTEST_COURSE
    return Acoustics(
        duration=round(len(wave) / SAMPLING_RATE, 4),
        speech_s=round(float(seconds), 2),
        voiced_share=round(share, 3),
        pitch_hz=None if median is None else round(median, 1),
        pitch_range_st=round(float(np.subtract(*np.percentile(semitones, (80, 20)))), 1) if median else None,
        loudness_lufs=round(loudness, 1),
        syllable_rate=round(len(nuclei) / float(seconds), 2) if len(nuclei) and seconds >= 0.5 else None,
        pause_share=round(sum(end - begin for begin, end in pauses) / span, 3),
        longest_pause_s=round((longest[1] - longest[0]) * STEP, 2) if longest else 0.0,
        pause_place=round((sum(longest) / 2 - stretches[0][0]) / span, 2) if longest else None,
        spectral_centroid_hz=round(spectral_centroid(wave, times[some])),
        hnr_db=round(harmonics_to_noise(wave, times[some], pitch[some]), 1) if median else None,
        f4_hz=_rounded(fourth_formant(wave, times[some])) if median else None,
        pitch_course=_thirds(semitones, np.flatnonzero(voiced)) if median and long_enough else None,
        loudness_course=_thirds(level[speech], np.flatnonzero(speech)) if long_enough else None,
    )


def _has_voice(wave: np.ndarray, times: np.ndarray, pitch: np.ndarray, voiced: np.ndarray, speech: np.ndarray) -> bool:
    """Whether the frames with a pitch are a voice, or the ringing of a vocal tract that is whispered through."""
    if voiced.sum() * STEP < 0.05:
        return False
    some = _spread(voiced)
    return bool(
        voiced.sum() >= _VOICED_SHARE * speech.sum()
        or harmonics_to_noise(wave, times[some], pitch[some]) >= _VOICED_HNR
    )


def _spread(wanted: np.ndarray) -> np.ndarray:
    """Indices of the frames that are wanted, or of so many of them, evenly spread, as the slower measures look at."""
    found = np.flatnonzero(wanted)
    return found[:: max(1, math.ceil(len(found) / _MOST_FRAMES))]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value)


def _thirds(values: np.ndarray, places: np.ndarray) -> tuple[float, float, float] | None:
    """Medians of the first, middle and last third of the stretch that `places` span, less the median of all."""
    third = np.minimum((places - places[0]) * 3 // max(1, places[-1] - places[0]), 2)
    if min(np.bincount(third, minlength=3)) < 5 or (places[-1] - places[0]) * STEP < _SHORTEST_COURSE:
        return None
    first, middle, last = (round(float(np.median(values[third == k]) - np.median(values)), 1) + 0.0 for k in range(3))
    return first, middle, last


def sex_of_voice(acoustics: Acoustics) -> Literal["female", "male"] | None:
    """The sex that a voice sounds like, or None where pitch and formants do not decide.

    The log-likelihood ratio of the fourth formant, which a longer vocal tract lowers, plus that of the pitch, where it
    is low enough or high enough to tell. A child's voice comes out as female.
    """
    if acoustics.pitch_hz is None:
        return None
    ratio = 0.0
    if acoustics.f4_hz is not None:
        ratio = float(np.clip(_F4_SLOPE * (acoustics.f4_hz - _F4_MIDDLE), -_F4_MOST, _F4_MOST))
    below = 12 * math.log2(min(1.0, acoustics.pitch_hz / _MALE_BELOW))
    above = 12 * math.log2(max(1.0, acoustics.pitch_hz / _FEMALE_ABOVE))
    ratio += max(_PITCH_SLOPE * below, -_LOW_MOST) + min(_PITCH_SLOPE * above, _HIGH_MOST)
    return None if abs(ratio) < _SURE else "female" if ratio > 0 else "male"


# ---------------------------------------------------------------------------------------------------------------------
# pitch and harmonicity


def _frames(wave: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Stretches of `length` samples every `STEP`, centred in the clip, [T, length], and their middles in seconds [T].

    A clip shorter than `length` is padded with zeros to one frame.
    """
    step = round(STEP * SAMPLING_RATE)
    padded = np.pad(wave, (0, max(0, length - len(wave))))
    count = (len(padded) - length) // step + 1
    first = (len(padded) - length - (count - 1) * step) // 2
    starts = first + step * np.arange(count)
    return np.lib.stride_tricks.sliding_window_view(padded, length)[starts], (starts + length / 2) / SAMPLING_RATE


def _autocorrelation(frames: np.ndarray, longest: int) -> np.ndarray:
    """Boersma's estimate of the normalised autocorrelation, [T, longest * _FINER], at lags in steps of 1/_FINER sample.

    The windowed frame's autocorrelation over the window's own (his equation 9), both interpolated between samples by
    zero-padding their spectra.
    """
    length = frames.shape[1]
    window = signal.windows.hann(length, sym=False)
    size = fft.next_fast_len(length + longest, real=True)

    def correlate(values: np.ndarray) -> np.ndarray:
        power = np.abs(fft.rfft(values, size)) ** 2
        power[..., -1] *= 0.5 if size % 2 == 0 else 1.0  # the highest frequency is shared by both signs
        found = fft.irfft(power, size * _FINER)[..., : longest * _FINER]
        return found / np.maximum(found[..., :1], 1e-300)

    return correlate((frames - frames.mean(1, keepdims=True)) * window) / correlate(window)


def pitch_track(wave: np.ndarray, floor: float = PITCH_FLOOR) -> tuple[np.ndarray, np.ndarray]:
    """Fundamental frequency by Boersma (1993): candidates of the autocorrelation, and the cheapest path through them.

    Args:
        wave: float [n].
        floor: lowest frequency in Hz that is looked for.

    Returns:
        Hz [T], 0 where the frame is unvoiced, and the middle of each frame in seconds [T].
    """
    frames, times = _frames(wave, round(3 / floor * SAMPLING_RATE))
    peak = np.abs(wave - wave.mean()).max(initial=0.0)
    if peak == 0:
        return np.zeros(len(frames)), times
    frequencies = np.zeros((len(frames), _CANDIDATES))  # the first is "unvoiced"
    strengths = np.full((len(frames), _CANDIDATES), -np.inf)
    for begin in range(0, len(frames), _FRAMES_AT_ONCE):
        part = slice(begin, begin + _FRAMES_AT_ONCE)
        _pitch_candidates(frames[part], peak, floor, frequencies[part], strengths[part])
    return _cheapest_path(frequencies, strengths), times


def _pitch_candidates(
    frames: np.ndarray, peak: float, floor: float, frequencies: np.ndarray, strengths: np.ndarray
) -> None:
    """Fill in the candidates of each frame, Hz and strength [T, candidates]: none, then the best local maxima."""
    found = _autocorrelation(frames, math.ceil(SAMPLING_RATE / floor) + 2)
    period = frames[:, frames.shape[1] // 3 : -(frames.shape[1] // 3)]  # the longest one, in the middle of the frame
    loudest = np.abs(period - frames.mean(1, keepdims=True)).max(1) / peak
    strengths[:, 0] = _VOICING + np.maximum(0, 2 - loudest / (_SILENCE / (1 + _VOICING)))
    low, high = math.ceil(SAMPLING_RATE / PITCH_CEILING * _FINER), math.floor(SAMPLING_RATE / floor * _FINER)
    for index, row in enumerate(found):
        inner = row[low:high]
        tops = low + np.flatnonzero((row[low - 1 : high - 1] < inner) & (inner >= row[low + 1 : high + 1]))
        tops = tops[row[tops] > 0.5 * _VOICING]
        lags, values = _parabola(found, tops, index)
        pitch = SAMPLING_RATE * _FINER / lags
        score = values - _OCTAVE_COST * np.log2(PITCH_CEILING / pitch)
        best = np.argsort(-score, kind="stable")[: _CANDIDATES - 1]
        frequencies[index, 1 : len(best) + 1] = pitch[best]
        strengths[index, 1 : len(best) + 1] = score[best]


def _parabola(tables: np.ndarray, tops: np.ndarray, rows: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Place and height of the parabola through each maximum and its neighbours; a height over 1 is mirrored."""
    before, at, after = (tables[rows, np.clip(tops + shift, 0, tables.shape[1] - 1)] for shift in (-1, 0, 1))
    bend = np.minimum(before - 2 * at + after, -1e-12)
    shift = 0.5 * (before - after) / bend
    height = at - 0.25 * (before - after) * shift
    return tops + shift, np.where(height > 1, 1 / height, height)


def _cheapest_path(frequencies: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """The candidate of every frame [T] that makes strengths less costs largest in sum (Viterbi)."""
    octaves = np.log2(np.where(frequencies > 0, frequencies, 1))
    voiced = frequencies > 0
    total = strengths[0]
    origins = np.zeros(frequencies.shape, int)
    for index in range(1, len(frequencies)):
        both = voiced[index - 1][:, None] & voiced[index][None]
        one = voiced[index - 1][:, None] != voiced[index][None]
        jump = np.abs(octaves[index - 1][:, None] - octaves[index][None])
        ways = total[:, None] - (_JUMP_COST * jump * both + _VOICING_COST * one) * (0.01 / STEP)
        origins[index] = ways.argmax(0)
        total = ways.max(0) + strengths[index]
    path = np.zeros(len(frequencies))
    state = int(total.argmax())
    for index in range(len(frequencies) - 1, -1, -1):
        path[index] = frequencies[index, state]
        state = origins[index, state]
    return path


def harmonics_to_noise(wave: np.ndarray, times: np.ndarray, pitch: np.ndarray) -> float:
    """Harmonics-to-noise ratio in dB (Boersma 1993): 10 log10 r / (1 - r), r the autocorrelation at a period.

    Args:
        wave: float [n].
        times: middles of voiced frames in seconds [V].
        pitch: their fundamental frequency in Hz [V].

    Returns:
        The median over the frames.
    """
    longest = math.ceil(SAMPLING_RATE / PITCH_FLOOR * 1.1) + 2
    found = _autocorrelation(_frames_at(wave, times, round(_HNR_PERIODS / PITCH_FLOOR * SAMPLING_RATE)), longest)
    lags = np.arange(found.shape[1])
    period = (SAMPLING_RATE * _FINER / pitch)[:, None]
    near = np.where(np.abs(lags - period) <= np.maximum(0.05 * period, 1), found, -np.inf)
    _, height = _parabola(found, near.argmax(1), np.arange(len(found)))
    height = np.clip(height, 1e-6, 1 - 1e-6)
    return float(np.median(10 * np.log10(height / (1 - height))))


# ---------------------------------------------------------------------------------------------------------------------
# loudness, speech and pauses


def k_weighting(sampling_rate: float) -> np.ndarray:
    """The two filters of BS.1770-4 as second-order sections [2, 6]: what the head does to sound, and no deep rumble.

    The standard has them as numbers for 48 kHz alone. For other rates they are the bilinear transform of the analogue
    filters behind those numbers (De Man, "Evaluation of implementations of the EBU R128 loudness measurement", 2018).
    """
    shelf = math.tan(math.pi * 1681.974450955533 / sampling_rate)
    high, band = 10 ** (3.999843853973347 / 20), 10 ** (3.999843853973347 * 0.4996667741545416 / 20)
    over = shelf / 0.7071752369554196
    norm = 1 + over + shelf**2
    numerator = np.array([high + band * over + shelf**2, 2 * (shelf**2 - high), high - band * over + shelf**2]) / norm
    rumble = math.tan(math.pi * 38.13547087602444 / sampling_rate)
    below = rumble / 0.5003270373238773
    return np.array(
        [
            [*numerator, 1, 2 * (shelf**2 - 1) / norm, (1 - over + shelf**2) / norm],
            [
                1,
                -2,
                1,
                1,
                2 * (rumble**2 - 1) / (1 + below + rumble**2),
                (1 - below + rumble**2) / (1 + below + rumble**2),
            ],
        ]
    )


def loudness_lufs(wave: np.ndarray) -> float:
    """Integrated loudness of ITU-R BS.1770-4 in LUFS; -inf where no block of 0.4 s passes the gate of -70 LUFS.

    A clip shorter than a block is one block.
    """
    weighted = signal.sosfilt(k_weighting(SAMPLING_RATE), wave)
    block, step = min(len(wave), round(0.4 * SAMPLING_RATE)), round(0.1 * SAMPLING_RATE)
    energy = np.concatenate(([0.0], np.cumsum(weighted**2)))
    starts = np.arange(0, len(wave) - block + 1, step)
    power = (energy[starts + block] - energy[starts]) / block
    for gate in (lambda passed: SILENT, lambda passed: _lufs(passed.mean()) - 10):
        power = power[_lufs(power) > gate(power)]
        if not len(power):
            return -math.inf
    return float(_lufs(power.mean()))


def _lufs(power: np.ndarray | float) -> np.ndarray:
    """The loudness of a weighted mean square."""
    return -0.691 + 10 * np.log10(np.maximum(power, 1e-30))


def level_track(wave: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Level in dB re full scale around each time [T]: the power under a Kaiser window, as Praat measures intensity.

    The window's effective length is 64 ms, long enough to hide single glottal pulses from 50 Hz on.
    """
    window = signal.windows.kaiser(round(6.4 / 50 * SAMPLING_RATE) | 1, 20.24)
    power = signal.oaconvolve((wave - wave.mean()) ** 2, window, "same") / np.maximum(
        signal.oaconvolve(np.ones(len(wave)), window, "same"), 1e-9
    )
    index = np.minimum((times * SAMPLING_RATE).astype(int), len(wave) - 1)
    return 10 * np.log10(np.maximum(power[index], 1e-12))


def speech_stretches(level: np.ndarray) -> list[tuple[int, int]]:
    """Runs of frames, as (first, behind the last), that are not silence: at least one.

    Silence is 25 dB below the level that 1 % of the frames exceed, for 0.25 s or longer; sound of less than 0.1 s in it
    is silence too, unless there is no other.
    """
    loud = level > _speech_threshold(level)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], loud.astype(int), [0])))).reshape(-1, 2)
    joined: list[tuple[int, int]] = []
    for first, last in edges.tolist():
        if joined and (first - joined[-1][1]) * STEP < _SHORTEST_PAUSE:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return [run for run in joined if (run[1] - run[0]) * STEP >= _SHORTEST_SPEECH] or joined or [(0, len(level))]


def _speech_threshold(level: np.ndarray) -> float:
    return float(np.quantile(level, 0.99)) - _PAUSE_DEPTH


def syllable_nuclei(level: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """Frames of syllable nuclei (de Jong and Wempe 2009): voiced peaks of the level with dips of 2 dB between them."""
    peaks, _ = signal.find_peaks(level, height=_speech_threshold(level), prominence=_NUCLEUS_DIP)
    return peaks[pitch[peaks] > 0]


# ---------------------------------------------------------------------------------------------------------------------
# spectrum


def _frames_at(wave: np.ndarray, times: np.ndarray, length: int) -> np.ndarray:
    """Stretches of `length` samples around `times` [T, length]; beyond the ends of the clip there are zeros."""
    starts = np.round(times * SAMPLING_RATE).astype(int) - length // 2
    padded = np.pad(wave, length)
    return np.lib.stride_tricks.sliding_window_view(padded, length)[np.clip(starts + length, 0, len(wave) + length)]


def spectral_centroid(wave: np.ndarray, times: np.ndarray) -> float:
    """Centroid of the magnitude spectrum in Hz, median over frames of 32 ms around `times`."""
    length = 512
    spectrum = np.abs(np.fft.rfft(_frames_at(wave, times, length) * signal.windows.hann(length, sym=False)))
    frequencies = np.fft.rfftfreq(length, 1 / SAMPLING_RATE)
    return float(np.median(spectrum @ frequencies / np.maximum(spectrum.sum(1), 1e-12)))


def fourth_formant(wave: np.ndarray, times: np.ndarray) -> float | None:
    """The fourth formant in Hz, None where no frame has four.

    The median, over the louder half of the frames and over linear prediction of order 10 and of order 12 (Markel and
    Gray 1976), of the fourth lowest pole that is narrower than 600 Hz. The vowel moves this formant little, so that it
    tells the length of the vocal tract.
    """
    low = signal.resample_poly(wave, _LPC_RATE, SAMPLING_RATE)
    low = np.append(
        low[:1], low[1:] - math.exp(-2 * math.pi * 50 / _LPC_RATE) * low[:-1]
    )  # 6 dB an octave from 50 Hz on
    length = round(0.05 * _LPC_RATE)
    starts = np.round(times * _LPC_RATE).astype(int) - length // 2
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(low, length), length)
    frames = frames[np.clip(starts + length, 0, len(frames) - 1)] * signal.windows.gaussian(length, length / 6)
    size = fft.next_fast_len(2 * length, real=True)
    correlation = fft.irfft(np.abs(fft.rfft(frames, size)) ** 2, size)
    correlation = correlation[correlation[:, 0] >= np.median(correlation[:, 0])]
    correlation = correlation[correlation[:, 0] > 0]
    fourth: list[float] = []
    for order in _LPC_ORDERS:
        matrix = correlation[:, np.abs(np.arange(order)[:, None] - np.arange(order))]
        matrix = matrix + 1e-9 * correlation[:, :1, None] * np.eye(order)
        predictor = np.linalg.solve(matrix, correlation[:, 1 : order + 1, None])[..., 0]
        companion = np.zeros_like(matrix)
        companion[:, 0] = predictor
        companion[:, np.arange(1, order), np.arange(order - 1)] = 1
        poles = np.linalg.eigvals(companion)
        frequency = np.angle(poles) * _LPC_RATE / (2 * np.pi)
        bandwidth = -np.log(np.maximum(np.abs(poles), 1e-12)) * _LPC_RATE / np.pi
        for row in np.where((frequency > 150) & (frequency < 5300) & (bandwidth < _WIDEST), frequency, np.inf):
            found = np.partition(row, 3)[3]
            fourth += [float(found)] if np.isfinite(found) else []
    return float(np.median(fourth)) if fourth else None
