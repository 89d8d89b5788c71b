"""Acoustic measures: signals whose answer is known, and other programs on real speech."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import signal

from fastclap.apps import acoustics
from fastclap.apps.acoustics import SAMPLING_RATE, STEP, Acoustics, measure, sex_of_voice
from fastclap.audio import read_audio
from fastclap.errors import DataError

# ---------------------------------------------------------------------------------------------------------------------
# known answers


def tone(pitch: float | np.ndarray, seconds: float = 2.0, level: float = 0.1) -> np.ndarray:
    """Eleven harmonics of a pitch in Hz, which may change from sample to sample, falling by 6 dB an octave."""
    frequency = np.broadcast_to(pitch, (round(seconds * SAMPLING_RATE),))
    phase = 2 * np.pi * np.cumsum(frequency) / SAMPLING_RATE
    return level * sum((np.sin(k * phase) / k for k in range(1, 12)), np.zeros(len(phase)))


def vowel(pitch: float, formants: tuple[float, ...]) -> np.ndarray:
    """2 s of pulses through resonators of 80 Hz bandwidth."""
    wave = np.zeros(2 * SAMPLING_RATE)
    wave[np.arange(0, len(wave), SAMPLING_RATE / pitch).astype(int)] = 1
    for formant in formants:
        pole = np.exp(-np.pi * 80 / SAMPLING_RATE + 2j * np.pi * formant / SAMPLING_RATE)
        wave = signal.lfilter([1], [1, -2 * pole.real, abs(pole) ** 2], wave)
    return 0.3 * wave / np.abs(wave).max()


def noise(seconds: float, level: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, level, round(seconds * SAMPLING_RATE))


@pytest.mark.parametrize("pitch", [80.0, 123.4, 221.0, 440.0, 570.0])
def test_the_pitch_of_a_tone(pitch: float) -> None:
    track, times = acoustics.pitch_track(tone(pitch))
    assert (track > 0).all() and np.abs(track / pitch - 1).max() < 2e-3
    assert np.allclose(np.diff(times), STEP) and 0 < times[0] < 0.035 and 1.965 < times[-1] < 2
    found = measure(tone(pitch))
    assert found.pitch_hz == pytest.approx(pitch, rel=1e-3)
    assert (found.pitch_range_st, found.voiced_share, found.pitch_course) == (0.0, 1.0, (0.0, 0.0, 0.0))


def test_the_pitch_of_a_glide() -> None:
    """An octave up in 2 s: three fifths of it between the percentiles, four semitones between neighbouring thirds."""
    found = measure(tone(110 * 2 ** np.linspace(0, 1, 2 * SAMPLING_RATE)))
    assert found.pitch_hz == pytest.approx(110 * 2**0.5, rel=0.01)
    assert found.pitch_range_st == pytest.approx(7.2, abs=0.2)
    assert found.pitch_course == pytest.approx((-4, 0, 4), abs=0.2)


@pytest.mark.parametrize("ratio", [5.0, 10.0, 20.0])
def test_the_harmonics_to_noise_ratio_of_a_noisy_tone(ratio: float) -> None:
    wave = tone(150.0)
    wave = wave + noise(2, np.sqrt(np.mean(wave**2)) * 10 ** (-ratio / 20))
    found = measure(wave)
    assert found.hnr_db == pytest.approx(ratio, abs=0.7)


def test_loudness() -> None:
    """A sine of 997 Hz at full scale in one channel is -3.01 LKFS (BS.1770-4); pauses are gated out."""
    time = np.arange(2 * SAMPLING_RATE) / SAMPLING_RATE
    sine = np.sin(2 * np.pi * 997 * time)
    assert acoustics.loudness_lufs(sine) == pytest.approx(-3.01, abs=0.05)
    assert acoustics.loudness_lufs(sine / 10) == pytest.approx(-23.01, abs=0.05)
    assert acoustics.loudness_lufs(sine[:3200] / 10) == pytest.approx(-23.01, abs=0.1), "0.2 s"
    with_pause = np.concatenate((sine, np.zeros(2 * SAMPLING_RATE), sine)) / 10
    assert acoustics.loudness_lufs(with_pause) == pytest.approx(-23.01, abs=0.6)


def test_the_loudness_filters_are_the_standards() -> None:
    """Tables 1 and 2 of BS.1770-4, for 48 kHz."""
    expected = [
        [1.53512485958697, -2.69169618940638, 1.19839281085285, 1, -1.69065929318241, 0.73248077421585],
        [1, -2, 1, 1, -1.99004745483398, 0.99007225036621],
    ]
    assert np.allclose(acoustics.k_weighting(48000), expected, rtol=0, atol=1e-8)


def test_the_course_of_the_level() -> None:
    fading = tone(150.0) * 10 ** (-12 * np.linspace(0, 1, 2 * SAMPLING_RATE) / 20)
    assert measure(fading).loudness_course == pytest.approx((4, 0, -4), abs=0.3)
    assert measure(tone(150.0)).loudness_course == (0.0, 0.0, 0.0)


def test_pauses() -> None:
    wave = np.concatenate((np.zeros(8000), tone(150.0, 1.0), np.zeros(12800), tone(150.0, 2.0), np.zeros(8000)))
    found = measure(wave + noise(len(wave) / SAMPLING_RATE, 1e-5))
    assert found.longest_pause_s == pytest.approx(0.8, abs=0.1)
    assert found.pause_share == pytest.approx(0.8 / 3.8, abs=0.03)
    assert found.pause_place == pytest.approx(1.4 / 3.8, abs=0.02)
    assert found.speech_s == pytest.approx(3.0, abs=0.15)
    unbroken = measure(tone(150.0))
    assert (unbroken.longest_pause_s, unbroken.pause_share, unbroken.pause_place) == (0.0, 0.0, None)
    short = np.concatenate((tone(150.0, 1.0), np.zeros(3200), tone(150.0, 1.0)))
    assert measure(short).longest_pause_s == 0.0, "0.2 s are no pause"


def test_syllables() -> None:
    time = np.arange(3 * SAMPLING_RATE) / SAMPLING_RATE
    swelling = 0.02 + 0.5 - 0.5 * np.cos(2 * np.pi * 4 * time)
    found = measure(tone(150.0, 3.0) * swelling)
    assert found.syllable_rate == pytest.approx(4, rel=0.06)
    assert measure(noise(3, 0.1) * swelling).syllable_rate is None, "no voice"


def test_the_centroid_of_a_sine() -> None:
    time = np.arange(SAMPLING_RATE) / SAMPLING_RATE
    frames = np.arange(0.1, 0.9, 0.01)
    assert acoustics.spectral_centroid(np.sin(2 * np.pi * 1000 * time), frames) == pytest.approx(1000, abs=5)
    assert acoustics.spectral_centroid(noise(1, 0.1), frames) == pytest.approx(4000, rel=0.05)


@pytest.mark.parametrize(("pitch", "longer", "sex"), [(110.0, 1.0, "male"), (210.0, 1.17, "female")])
def test_the_fourth_formant_tells_the_sex(pitch: float, longer: float, sex: str) -> None:
    """A uniform tube of 17 cm, and one that is shorter by the ratio of women to men of Hillenbrand et al. (1995)."""
    found = measure(vowel(pitch, tuple(longer * formant for formant in (520.0, 1560.0, 2600.0, 3640.0, 4680.0))))
    assert found.f4_hz == pytest.approx(3640 * longer, rel=0.03)
    assert sex_of_voice(found) == sex


def test_no_sex_is_named_where_pitch_and_formant_do_not_decide() -> None:
    base = measure(tone(200.0))

    def of(pitch: float | None, f4: float | None) -> str | None:
        return sex_of_voice(Acoustics(**{**vars(base), "pitch_hz": pitch, "f4_hz": f4}))

    assert [of(200, 3880), of(200, None), of(None, 3500)] == [None, None, None]
    assert [of(200, 3700), of(200, 4100), of(100, 3950), of(350, 3850)] == ["male", "female", "male", "female"]
    assert of(100, None) == "male"


def test_clips_without_voice_short_clips_and_silence() -> None:
    whisper = measure(noise(2, 0.05))
    assert (whisper.pitch_hz, whisper.hnr_db, whisper.f4_hz, whisper.pitch_range_st) == (None, None, None, None)
    assert (whisper.voiced_share, whisper.pitch_course, whisper.syllable_rate) == (0.0, None, None)
    assert whisper.spectral_centroid_hz == pytest.approx(4000, rel=0.05) and whisper.loudness_course is not None
    creak = measure(tone(60.0))
    assert creak.pitch_hz is None and creak.voiced_share > 0.9, "too low to have a pitch, but no whisper"
    short = measure(tone(200.0, 0.2))
    assert short.pitch_hz == pytest.approx(200, rel=1e-3)
    assert (short.pitch_course, short.loudness_course, short.syllable_rate) == (None, None, None)
    assert measure(tone(200.0, 0.02)).duration == 0.02
    for silence in (np.zeros(16000), noise(1, 1e-5)):
        with pytest.raises(DataError, match="silent: nothing in it is louder than -70 LUFS"):
            measure(silence)


def test_a_clip_is_measured_alike_every_time_and_in_parts() -> None:
    wave = vowel(140.0, (500.0, 1500.0, 2500.0, 3500.0)) + noise(2, 0.01)
    assert measure(wave) == measure(wave.astype(np.float32).astype(np.float64)) == measure(wave.copy())
    whole = acoustics.pitch_track(wave)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acoustics, "_FRAMES_AT_ONCE", 7)
        assert np.array_equal(acoustics.pitch_track(wave)[0], whole)


# ---------------------------------------------------------------------------------------------------------------------
# other programs, on 50 clips of real speech

Clips = list[tuple[np.ndarray, Acoustics]]


@pytest.fixture(scope="module")
def measured() -> dict[Path, Clips]:
    return {}


@pytest.fixture
def clips(real_speech: Path, measured: dict[Path, Clips]) -> Clips:
    if real_speech not in measured:
        rows = [json.loads(line) for name in ("train", "test") for line in (real_speech / f"{name}.jsonl").open("r")]
        paths = [str(real_speech / row["relative_audio_path"]) for row in rows[:: len(rows) // 50][:50]]
        waves = [read_audio(path, dtype="float32").astype(np.float64) for path in paths]
        measured[real_speech] = [(wave, measure(wave)) for wave in waves]
    return measured[real_speech]


def differences(clips: Clips, ours: Callable[[Acoustics], float | None], theirs: Callable[[np.ndarray], float]) -> Any:
    """Ours less theirs, float64 [clips]."""
    pairs = [(ours(found), theirs(wave)) for wave, found in clips]
    assert all(value is not None for value, _ in pairs)
    return np.array([value - other for value, other in pairs if value is not None])


def praat_pitch(wave: np.ndarray) -> np.ndarray:
    """Hz [T], 0 where unvoiced."""
    praat = pytest.importorskip("parselmouth", reason="needs praat-parselmouth")
    track = praat.Sound(wave, SAMPLING_RATE).to_pitch_ac(
        STEP, acoustics.PITCH_FLOOR, pitch_ceiling=acoustics.PITCH_CEILING
    )
    return np.asarray(track.selected_array["frequency"])


def test_pitch_is_praats(clips: Clips) -> None:
    def median(wave: np.ndarray) -> float:
        track = praat_pitch(wave)
        return float(np.median(track[track > 0]))

    relative = np.abs(differences(clips, lambda found: found.pitch_hz, median)) / [found.pitch_hz for _, found in clips]
    assert relative.max() < 0.05 and np.median(relative) < 0.005


def test_the_pitch_range_is_praats(clips: Clips) -> None:
    def spread(wave: np.ndarray) -> float:
        track = praat_pitch(wave)
        low, high = np.percentile(track[track > 0], (20, 80))
        return float(12 * np.log2(high / low))

    off = np.abs(differences(clips, lambda found: found.pitch_range_st, spread))
    assert off.max() < 2 and np.quantile(off, 0.9) < 0.5


def test_the_voiced_share_is_praats(clips: Clips) -> None:
    off = np.abs(
        differences(
            clips,
            lambda found: found.voiced_share * found.speech_s / found.duration,
            lambda wave: float((praat_pitch(wave) > 0).mean()),
        )
    )
    assert off.max() < 0.08 and np.median(off) < 0.01


def test_loudness_is_pyloudnorms(clips: Clips) -> None:
    meter = pytest.importorskip("pyloudnorm", reason="needs pyloudnorm").Meter(SAMPLING_RATE, filter_class="DeMan")
    off = np.abs(differences(clips, lambda found: found.loudness_lufs, meter.integrated_loudness))
    assert off.max() < 0.1


def test_the_harmonics_to_noise_ratio_is_praats(clips: Clips) -> None:
    """Over the frames that have a pitch here; Praat chooses the period of each anew."""
    praat = pytest.importorskip("parselmouth", reason="needs praat-parselmouth")

    def median(wave: np.ndarray) -> float:
        track, times = acoustics.pitch_track(wave)
        ratio = praat.Sound(wave, SAMPLING_RATE).to_harmonicity_ac(STEP, acoustics.PITCH_FLOOR, 0.03, 4.5)
        values = np.array([ratio.get_value(time) for time in times[track > 0]])
        return float(np.median(values[values > -100]))

    off = differences(clips, lambda found: found.hnr_db, median)
    assert np.abs(off).max() < 2.5 and abs(np.median(off)) < 1


def test_speech_and_syllables_are_praats(clips: Clips) -> None:
    """De Jong and Wempe's script through Praat's commands; for the seconds silence is added, so that the ends count."""
    praat = pytest.importorskip("parselmouth", reason="needs praat-parselmouth")
    call = pytest.importorskip("parselmouth.praat").call

    def speech_and_nuclei(wave: np.ndarray) -> tuple[float, int]:
        sound = praat.Sound(wave, SAMPLING_RATE)
        intensity = sound.to_intensity(50, STEP)
        threshold = call(intensity, "Get quantile", 0, 0, 0.99) - 25
        padded = praat.Sound(np.pad(wave, 8000), SAMPLING_RATE).to_intensity(50, STEP)
        depth = threshold - call(padded, "Get maximum", 0, 0, "Parabolic")
        grid = call(padded, "To TextGrid (silences)", depth, 0.25, 0.1, "silent", "sounding")
        seconds = sum(
            call(grid, "Get end time of interval", 1, run) - call(grid, "Get start time of interval", 1, run)
            for run in range(1, call(grid, "Get number of intervals", 1) + 1)
            if call(grid, "Get label of interval", 1, run) == "sounding"
        )
        levels, times = intensity.values[0], intensity.xs()
        pitch = sound.to_pitch_ac(STEP, acoustics.PITCH_FLOOR, pitch_ceiling=acoustics.PITCH_CEILING)
        inner = levels[1:-1]
        peaks = 1 + np.flatnonzero((inner > levels[:-2]) & (inner >= levels[2:]) & (inner > threshold))
        nuclei = [
            peak
            for peak, following in itertools.pairwise(peaks)
            if levels[peak] - levels[peak:following].min() > 2 and pitch.get_value_at_time(times[peak]) > 0
        ]
        return seconds, len(nuclei)

    theirs = [speech_and_nuclei(wave) for wave, _ in clips]
    speech = np.array([found.speech_s - seconds for (_, found), (seconds, _) in zip(clips, theirs, strict=True)])
    assert np.quantile(np.abs(speech), 0.9) < 0.15 and np.abs(speech).max() < 0.5 and abs(speech.mean()) < 0.05
    counts = [(found.syllable_rate or 0) * found.speech_s for _, found in clips]
    off = np.array([ours - nuclei for ours, (_, nuclei) in zip(counts, theirs, strict=True)])
    assert np.abs(off).mean() < 1 and np.abs(off).max() < 3.1 and abs(off.mean()) < 0.5, "of about nine a clip"


def test_the_centroid_is_librosas(clips: Clips) -> None:
    """Over the same voiced frames."""
    librosa = pytest.importorskip("librosa")

    def median(wave: np.ndarray) -> float:
        track, times = acoustics.pitch_track(wave)
        level = acoustics.level_track(wave, times)
        speech = np.zeros(len(level), bool)
        for first, last in acoustics.speech_stretches(level):
            speech[first:last] = True
        starts = np.round(times[(track > 0) & speech] * SAMPLING_RATE).astype(int) - 256
        frames = np.stack([np.pad(wave, 512)[start + 512 : start + 1024] for start in starts])
        spectra = [librosa.stft(frame, n_fft=512, hop_length=512, center=False) for frame in frames]
        magnitudes = np.abs(np.concatenate(spectra, axis=1))
        return float(np.median(librosa.feature.spectral_centroid(S=magnitudes, sr=SAMPLING_RATE, n_fft=512)))

    off = differences(clips, lambda found: found.spectral_centroid_hz, median)
    assert np.abs(off).max() < 1


def test_the_fourth_formant_is_near_praats(clips: Clips) -> None:
    """Praat counts formants otherwise (Burg's method, five up to 5.5 kHz), so the two agree only on the whole."""
    praat = pytest.importorskip("parselmouth", reason="needs praat-parselmouth")

    def median(wave: np.ndarray) -> float:
        track, times = acoustics.pitch_track(wave)
        formants = praat.Sound(wave, SAMPLING_RATE).to_formant_burg(STEP, 5, 5500, 0.025, 50)
        return float(np.nanmedian([formants.get_value_at_time(4, time) for time in times[track > 0]]))

    off = np.abs(differences(clips, lambda found: found.f4_hz, median))
    assert np.median(off) < 100 and np.quantile(off, 0.9) < 250


def test_the_sex_of_real_voices(real_speech: Path) -> None:
    """Of two speakers that the limits were not set on: nearly all clips get a sex, nearly always the right one."""
    rows = [json.loads(line) for line in (real_speech / "test.jsonl").open("r")]
    found = [
        sex_of_voice(measure(read_audio(real_speech / row["relative_audio_path"], dtype="float32"))) for row in rows
    ]
    named = [(sex, row["sex"]) for sex, row in zip(found, rows, strict=True) if sex]
    assert len(named) > 0.9 * len(rows)
    assert sum(sex == known for sex, known in named) > 0.95 * len(named)
