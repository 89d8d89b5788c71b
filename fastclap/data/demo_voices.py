"""Demo voices: a small set of synthetic, captioned, speech-like clips, to see a model learn without a download.

Source-filter synthesis (Fant 1960): a train of Rosenberg glottal pulses that follows a pitch contour, with jitter,
breath noise and vocal effort, passes through four formant resonators whose frequencies depend on the vowel and the
speaker's vocal tract; fricative noise separates some of the syllables. Each clip has a speaking style, which does not
fix its pitch, loudness, tempo and phonation but makes some of them likelier, so that styles can be learned but not read
off a single number. The validation speakers do not occur in training. These voices stand in for real data in no claim.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastclap.errors import required

SAMPLING_RATE = 16000
_VERSION = 1  # of the recipe below: a folder made by another one is written anew
_TRAIN_SPEAKERS, _VALID_SPEAKERS = 48, 16

_PITCH = {"low": -4.0, "medium": 0.0, "high": 4.0}  # semitones from the middle of the speaker's sex
_LOUDNESS = {"soft": -34.0, "normal": -25.0, "loud": -16.0}  # dB re full scale, root mean square
_TEMPO = {"slow": 2.6, "normal": 4.0, "fast": 6.0}  # syllables a second
_PHONATION = ("breathy", "clear", "creaky")
_CONTOUR = {"falls": -3.0, "stays level": 0.0, "rises": 3.0}  # semitones from the first syllable to the last

# Formants 1-3 of an adult male in Hz, after Peterson and Barney (1952); the fourth is common to all.
_VOWELS = (
    (270, 2290, 3010),
    (530, 1840, 2480),
    (730, 1090, 2440),
    (570, 840, 2410),
    (300, 870, 2240),
    (490, 1350, 1690),
)
_FRICATIVES = ((4000, 7400), (2200, 5200), (1200, 7000))  # Hz, pass bands of s, sh and f


@dataclass(frozen=True)
class _Style:
    """How a style is spoken; the triples are weights over the entries of the tables above."""

    adverb: str
    pitch: tuple[float, float, float]
    loudness: tuple[float, float, float]
    tempo: tuple[float, float, float]
    phonation: tuple[float, float, float]
    contour: tuple[float, float, float]
    movement: float  # semitones that accents span
    effort: float  # dB per octave that the glottal spectrum is flatter than at ease


STYLES = {
    "angry": _Style("angrily", (0.3, 0.5, 0.2), (0, 0.1, 0.9), (0.05, 0.35, 0.6), (0, 0.7, 0.3), (0.6, 0.3, 0.1), 3, 5),
    "calm": _Style("calmly", (0.4, 0.5, 0.1), (0.2, 0.8, 0), (0.4, 0.6, 0), (0.2, 0.8, 0), (0.5, 0.5, 0), 1, 0),
    "excited": _Style("excitedly", (0, 0.1, 0.9), (0, 0.3, 0.7), (0, 0.2, 0.8), (0.1, 0.9, 0), (0.1, 0.2, 0.7), 6, 3),
    "happy": _Style("happily", (0, 0.5, 0.5), (0.1, 0.7, 0.2), (0.1, 0.7, 0.2), (0.2, 0.8, 0), (0.2, 0.2, 0.6), 5, 1),
    "sad": _Style("sadly", (0.7, 0.3, 0), (0.6, 0.4, 0), (0.8, 0.2, 0), (0.5, 0.2, 0.3), (0.9, 0.1, 0), 1.5, -2),
    "whispered": _Style("in a whisper", (1, 0, 0), (0.8, 0.2, 0), (0.3, 0.5, 0.2), (1, 0, 0), (0, 1, 0), 0, -2),
}


@dataclass(frozen=True)
class _Speaker:
    name: str
    sex: str
    pitch: float  # Hz, the middle of the range
    tract: float  # formant frequencies relative to an adult male
    breath: float
    jitter: float


class _Manner(NamedTuple):
    """How a clip is spoken: a style, and entries of the tables above."""

    style: str
    pitch: str
    loudness: str
    tempo: str
    phonation: str
    contour: str

    @property
    def voiced(self) -> bool:
        return self.style != "whispered"


def write_demo(
    folder: str | os.PathLike[str], num_train: int = 1000, num_valid: int = 200, seed: int = 0
) -> tuple[str, str]:
    """Write the demo clips (16 kHz 16-bit WAV, about 2 s each) and their manifests, unless they are there already.

    The same arguments give the same bytes on the same machine. Styles are balanced; a clip has four global captions and
    a fine one, `classification_tag` (its style), and tags for sex, pitch, loudness, tempo and phonation.

    Args:
        folder: where to write; created if missing.
        num_train, num_valid: number of clips; the validation clips have speakers of their own.
        seed: fixes speakers, clips and captions.

    Returns:
        Paths of the training and the validation manifest.
    """
    manifests = os.path.join(folder, "train.jsonl"), os.path.join(folder, "valid.jsonl")
    marker = os.path.join(folder, "complete.json")
    recipe = {"version": _VERSION, "num_train": num_train, "num_valid": num_valid, "seed": seed}
    if _read_marker(marker) == recipe:
        return manifests
    if os.path.exists(marker):
        os.remove(marker)
    for split, (manifest, count) in enumerate(zip(manifests, (num_train, num_valid), strict=True)):
        _write_split(manifest, split, count, seed)
    with open(marker, "w", encoding="utf-8") as file:
        json.dump(recipe, file)
    return manifests


def _read_marker(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _write_split(manifest: str, split: int, count: int, seed: int) -> None:
    soundfile = required("soundfile", "writing the demo's audio files")
    name = os.path.splitext(os.path.basename(manifest))[0]
    os.makedirs(os.path.join(os.path.dirname(manifest), name), exist_ok=True)
    random = np.random.default_rng((seed, split))
    speakers = [_draw_speaker(random, split, index) for index in range((_TRAIN_SPEAKERS, _VALID_SPEAKERS)[split])]
    with open(manifest, "w", encoding="utf-8") as file:
        for index in range(count):
            random = np.random.default_rng((seed, split, index))
            speaker = speakers[random.integers(len(speakers))]
            wave, row = _clip(random, speaker, list(STYLES)[index % len(STYLES)])
            path = f"{name}/{index:05d}.wav"
            soundfile.write(os.path.join(os.path.dirname(manifest), path), wave, SAMPLING_RATE, subtype="PCM_16")
            file.write(json.dumps({"source": "demo", "relative_audio_path": path, **row}) + "\n")


def _draw_speaker(random: np.random.Generator, split: int, index: int) -> _Speaker:
    sex = ("female", "male")[index % 2]
    middle, tract = (205.0, 1.17) if sex == "female" else (118.0, 1.0)
    return _Speaker(
        f"{'tv'[split]}{index:02d}",
        sex,
        middle * 2 ** (random.normal(0, 0.9) / 12),
        tract * random.normal(1, 0.03),
        random.uniform(0.01, 0.05),
        random.uniform(0.003, 0.012),
    )


def _clip(random: np.random.Generator, speaker: _Speaker, style_name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """One clip, int16 [n], and its manifest row but for the path."""
    style = STYLES[style_name]
    manner = _Manner(
        style_name,
        pitch=str(random.choice(list(_PITCH), p=style.pitch)),
        loudness=str(random.choice(list(_LOUDNESS), p=style.loudness)),
        tempo=str(random.choice(list(_TEMPO), p=style.tempo)),
        phonation=str(random.choice(_PHONATION, p=style.phonation)),
        contour=str(random.choice(list(_CONTOUR), p=style.contour)),
    )
    wave = _speak(random, speaker, manner)
    row: dict[str, Any] = {
        "duration": len(wave) / SAMPLING_RATE,
        **_captions(random, speaker.sex, manner),
        "intrinsic_tags": [speaker.sex, *([f"{manner.pitch}-pitched"] if manner.voiced else []), manner.phonation],
        "situational_tags": [style_name, manner.loudness, manner.tempo],
        "classification_tag": style_name,
        "speaker": speaker.name,
        "sex": speaker.sex,
        **({"pitch": manner.pitch} if manner.voiced else {}),
        "loudness": manner.loudness,
        "tempo": manner.tempo,
        "phonation": manner.phonation,
    }
    return wave, row


def _captions(random: np.random.Generator, sex: str, manner: _Manner) -> dict[str, Any]:
    style, pitch, loudness, tempo, phonation, contour = manner
    noun = str(random.choice({"female": ["woman", "lady", "female"], "male": ["man", "gentleman", "male"]}[sex]))
    voice = f"{pitch}-pitched, {phonation}" if manner.voiced else phonation
    how = {"soft": "softly", "normal": "at normal volume", "loud": "loudly"}[loudness]
    pace = {"slow": "slowly", "normal": "at a normal pace", "fast": "fast"}[tempo]
    styled = f"{'an' if style[0] in 'aeiou' else 'a'} {style}"
    movement = f"across the phrase the pitch {contour}" if manner.voiced else "there is no voicing at all"
    return {
        "text_description": [
            f"A {sex} speaker with a {voice} voice talks {STYLES[style].adverb}, {how} and {pace}.",
            f"A {noun} speaks {pace} and {how} in {styled} style; the voice is {voice}.",
            f"{how[0].upper()}{how[1:]} and {pace}, a {noun} talks in {styled} manner.",
            f"A {sex} speaker is speaking in {styled} style.",
        ],
        "fine_description": (
            f"The {noun} delivers the words {pace} and {how} in {styled} tone with a {voice} voice; {movement}."
        ),
    }


def _speak(random: np.random.Generator, speaker: _Speaker, manner: _Manner) -> np.ndarray:
    """A phrase of syllables, int16 [n]."""
    from scipy.signal import butter, lfilter, sosfilt

    style, pitch, loudness, tempo, phonation, contour = manner
    movement, effort = STYLES[style].movement, STYLES[style].effort
    rate = _TEMPO[tempo] * random.uniform(0.88, 1.12)
    syllables = max(3, round(random.uniform(1.7, 2.2) * rate))
    lengths = (random.uniform(0.75, 1.25, syllables) / rate * SAMPLING_RATE).astype(int)
    ends = np.cumsum(lengths)
    n = int(ends[-1])
    centres = ends - lengths / 2
    time = np.arange(n)

    # Pitch in semitones: the contour over the phrase, an accent on each syllable, slow drift.
    accents = random.normal(0, movement / 2, syllables)
    semitones = _PITCH[pitch] + random.normal(0, 0.7) + np.linspace(-0.5, 0.5, syllables) * _CONTOUR[contour] + accents
    jitter = speaker.jitter * (6 if phonation == "creaky" else 1)
    drift = lfilter([0.02], [1, -0.98], random.normal(0, 1, n)) * 7 * jitter
    frequency = speaker.pitch * 2 ** (np.interp(time, centres, semitones) / 12) * (1 + drift)
    if phonation == "creaky":
        frequency *= 0.72
    cycles = np.cumsum(frequency / SAMPLING_RATE)

    # Rosenberg's pulse as a function of the phase in the cycle; a tense voice closes faster.
    phase = cycles % 1
    opening, closing = (0.45, 0.12) if effort > 2 else (0.5, 0.35) if phonation == "breathy" else (0.42, 0.2)
    pulse = np.where(
        phase < opening,
        0.5 - 0.5 * np.cos(np.pi * phase / opening),
        np.cos(0.5 * np.pi * np.clip((phase - opening) / closing, 0, 1)),
    )
    if phonation == "creaky":  # every other pulse is weak
        pulse *= np.where(np.floor(cycles) % 2, 0.35, 1)
    noise = random.normal(0, 1, n)
    breath = speaker.breath * {"breathy": 8, "clear": 1, "creaky": 1}[phonation]
    source = np.diff(pulse, prepend=0.0) * 4 + breath * 0.25 * noise * (0.4 + pulse)
    if not manner.voiced:
        source = 0.25 * noise
    elif effort:  # tilt the spectrum above about 500 Hz
        mix = 1 - 10 ** (-abs(effort) * 2 / 20)
        smooth = lfilter([0.18], [1, -0.82], source)
        source = source - mix * smooth if effort > 0 else (1 - mix) * source + mix * smooth

    # One vowel a syllable, each filtered by itself and faded into the next; some begin with a fricative.
    wave = np.zeros(n + 1600)
    fade = int(0.03 * SAMPLING_RATE)
    for syllable, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        begin = end - length
        onset = int(length * random.uniform(0.2, 0.35)) if random.random() < 0.5 else 0
        if onset:
            low, high = _FRICATIVES[random.integers(len(_FRICATIVES))]
            band = butter(2, (low, high), "bandpass", fs=SAMPLING_RATE, output="sos")
            wave[begin : begin + onset] += 0.12 * sosfilt(band, random.normal(0, 1, onset)) * np.hanning(onset)
        start, stop = max(0, begin + onset - fade // 2), min(n, end + fade // 2)
        stress = 10 ** ((accents[syllable] + random.normal(0, 1.5)) / 20) * (1 - 0.35 * syllable / syllables)
        envelope = np.minimum(1, np.minimum(np.arange(stop - start), np.arange(stop - start)[::-1]) / fade)
        excitation = np.concatenate((source[start:stop] * envelope * stress, np.zeros(800)))
        formants = np.array((*_VOWELS[random.integers(len(_VOWELS))], 3500)) * speaker.tract * random.normal(1, 0.02, 4)
        wave[start : stop + 800] += sosfilt(_resonators(formants), excitation)
    wave = wave[:n]

    level = 10 ** ((_LOUDNESS[loudness] + random.normal(0, 1.5)) / 20)
    wave *= level / np.sqrt(np.mean(wave**2))
    wave += random.normal(0, 10 ** (random.uniform(-66, -56) / 20), n)  # the room
    peak = np.abs(wave).max()
    return np.rint(wave * (32767 * min(1, 0.98 / peak))).astype(np.int16)


def _resonators(formants: np.ndarray) -> np.ndarray:
    """Second-order sections of formants in Hz: unit gain at 0 Hz (Klatt 1980), bandwidth growing with frequency."""
    bandwidths = 60 + 0.035 * formants
    radius = np.exp(-np.pi * bandwidths / SAMPLING_RATE)
    b = -2 * radius * np.cos(2 * np.pi * np.minimum(formants, 7600) / SAMPLING_RATE)
    c = radius**2
    zero, one = np.zeros_like(b), np.ones_like(b)
    return np.stack((1 + b + c, zero, zero, one, b, c), axis=1)
