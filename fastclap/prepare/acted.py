"""Acted emotional speech, whose labels are its file names: RAVDESS, CREMA-D and IEMOCAP.

None of them has captions: `_labels` writes two sentences from sex, age and emotion, so that the manifests can
train as well as test. Emotions are adjectives, as prompts want them ("fearful", not "fear"). None defines splits
either; all three are split by speaker.

Verified against public descriptions: RAVDESS's file names (its Zenodo page, record 1188976), CREMA-D's folders and
tables (the README of its repository) and the columns of VideoDemographics.csv and IEMOCAP's lines (public code that
reads them). From memory: CREMA-D's sentence codes and its age range, IEMOCAP's rarer emotion codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastclap.errors import ConfigError
from fastclap.prepare.layout import Clips, Dataset, DescribedClip, Place
from fastclap.prompts import article, fill_template, parse_sex
from fastclap.reading import read_bytes

_RAVDESS_NAME = re.compile(r"(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)")
_RAVDESS_EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgusted", "surprised")
_RAVDESS_STATEMENTS = ("Kids are talking by the door.", "Dogs are sitting by the door.")

_CREMA_NAME = re.compile(r"(\d{4})_([A-Z]{3})_([A-Z]{3})_([A-Z]{2})")
_CREMA_EMOTIONS = {
    "ANG": "angry",
    "DIS": "disgusted",
    "FEA": "fearful",
    "HAP": "happy",
    "NEU": "neutral",
    "SAD": "sad",
}
_CREMA_INTENSITIES = {"LO": "low", "MD": "medium", "HI": "high"}  # XX is "not specified"

_IEMOCAP_LINE = re.compile(r"\[[\d.]+ - [\d.]+\]\t((Ses0\d)[FM]_\w+_([FM])\w+)\t(\w+)\t")
_IEMOCAP_EMOTIONS = {
    "ang": "angry",
    "hap": "happy",
    "exc": "excited",
    "sad": "sad",
    "neu": "neutral",
    "fru": "frustrated",
    "fea": "fearful",
    "sur": "surprised",
    "dis": "disgusted",
}
_IEMOCAP_FOUR = {"angry": "angry", "happy": "happy", "excited": "happy", "sad": "sad", "neutral": "neutral"}


def _labels(speaker: str, sex: str | None, emotion: str, age: int | None = None) -> dict[str, Any]:
    """The columns that all three have, captions among them."""
    years = "" if age is None else f"{age}-year-old "
    noun = {"male": "man", "female": "woman", None: "person"}[sex]
    captions = [
        fill_template(f"A {f'{sex} ' if sex else ''}speaker in {{a}} {{}} tone.", emotion),
        f"{article(years + noun).capitalize()} {years}{noun} sounds {emotion}.",
    ]
    return {
        "text_description": captions,
        "classification_tag": emotion,
        "emotion": emotion,
        "situational_tags": [emotion],
        "sex": sex,
        "age": age,
        "speaker": speaker,
    }


def _age_group(age: int) -> str:
    """The class of CLSP's age prompts, with the bounds of its published evaluation."""
    if age < 20:
        return "child or young teenager"
    return "adult" if age < 40 else "middle-aged" if age < 60 else "older or elder"


def _recordings(place: Place, pattern: re.Pattern[str]) -> list[tuple[Path, tuple[str, ...]]]:
    """WAV files whose names match, anywhere under the root; of several files of one name, the first."""
    found: dict[str, tuple[Path, tuple[str, ...]]] = {}
    for path in sorted(place.root.rglob("*.wav")):
        match = pattern.fullmatch(path.stem)
        if match and path.stem in found:
            place.left_out["another copy of a clip"] += 1
        elif match:
            found[path.stem] = (path, match.groups())
    return list(found.values())


def _read_ravdess(place: Place) -> Clips:
    if place.annotations != place.root:
        raise ConfigError("--annotations: RAVDESS has none but its file names; leave the flag away")
    clips = []
    files = _recordings(place, _RAVDESS_NAME)
    for path, codes in files:
        _, channel, emotion, intensity, statement, _, actor = map(int, codes)
        if not (emotion in range(1, 9) and intensity in (1, 2) and statement in (1, 2) and actor in range(1, 25)):
            place.left_out["the file name has a number that RAVDESS does not use"] += 1
        elif channel != 1:
            place.left_out["sung"] += 1
        else:
            columns = {
                **_labels(f"{actor:02d}", "male" if actor % 2 else "female", _RAVDESS_EMOTIONS[emotion - 1]),
                "intensity": ("normal", "strong")[intensity - 1],
                "sentence": _RAVDESS_STATEMENTS[statement - 1],
            }
            split = "test" if actor > 22 else "dev" if actor > 20 else "train"
            clips.append(DescribedClip((str(path),), split, columns, str(path)))
    if not clips:
        raise place.wrong(f"none of its {len(files)} recordings is spoken" if files else "no file has such a name")
    return len(clips), clips


def _read_crema_d(place: Place) -> Clips:
    from fastclap.data.manifest import read_records

    table = next(iter(place.files("VideoDemographics.csv")), None)
    if table is None or not table.is_file():
        raise place.wrong(f"{place.annotations / 'VideoDemographics.csv'} is missing")
    rows = [record for _, record in read_records(str(table))]
    if not {"ActorID", "Age", "Sex"} <= set(rows[0]):
        raise place.wrong(f"{table} has the columns {', '.join(rows[0])}, not ActorID, Age and Sex")
    actors = {str(row["ActorID"]).strip(): row for row in rows}
    clips = []
    for path, (actor, sentence, emotion, intensity) in _recordings(place, _CREMA_NAME):
        if emotion not in _CREMA_EMOTIONS or actor not in actors:
            place.left_out["the file name has an unknown emotion, or an actor without a row in VideoDemographics"] += 1
            continue
        person = actors[actor]
        years = str(person["Age"]).strip()
        age = int(years) if re.fullmatch("[0-9]{1,3}", years) else None
        columns = {
            **_labels(actor, parse_sex(person["Sex"]), _CREMA_EMOTIONS[emotion], age),
            "age_group": None if age is None else _age_group(age),
            "intensity": _CREMA_INTENSITIES.get(intensity),
            "sentence": sentence,
        }
        split = {"0": "test", "9": "dev"}.get(actor[-1], "train")
        clips.append(DescribedClip((str(path),), split, columns, str(path)))
    if not clips:
        raise place.wrong("no file has such a name")
    return len(clips), clips


def _read_iemocap(place: Place) -> Clips:
    # The archive's root holds a folder of its own; macOS leaves files named "._Ses…" next to the tables.
    tables = place.files(
        "Session?/dialog/EmoEvaluation/Ses*.txt", "IEMOCAP_full_release/Session?/dialog/EmoEvaluation/Ses*.txt"
    )
    clips = list(_iemocap_clips(place, tables))
    if not clips:
        raise place.wrong(
            f"no labelled turn in its {len(tables)} tables" if tables else "no Session1/dialog/EmoEvaluation/Ses*.txt"
        )
    return len(clips), clips


def _iemocap_clips(place: Place, tables: list[Path]) -> Iterator[DescribedClip]:
    for table in tables:
        session_folder = place.root / table.parents[2].relative_to(place.annotations)
        folder = session_folder / "sentences" / "wav" / table.stem
        for line, text in enumerate(read_bytes(table).decode(errors="replace").split("\n"), 1):
            match = _IEMOCAP_LINE.match(text)
            if match is None:
                continue
            turn, session, letter, code = match.groups()
            if code not in _IEMOCAP_EMOTIONS:
                place.left_out["the raters agreed on no emotion, or on another one"] += 1
                continue
            emotion = _IEMOCAP_EMOTIONS[code]
            # The letter before the turn's number is who speaks; the one after the session is who wore the markers.
            columns = {
                **_labels(session + letter, parse_sex(letter), emotion),
                "emotion4": _IEMOCAP_FOUR.get(emotion),
                "session": session[-1],
                "scene": "improvised" if "_impro" in turn else "scripted",
            }
            split = {"5": "test", "4": "dev"}.get(session[-1], "train")
            yield DescribedClip((str(folder / f"{turn}.wav"),), split, columns, f"{table}:{line}")


RAVDESS = Dataset(
    "RAVDESS",
    "files such as Actor_01/03-01-06-01-02-01-01.wav, as Audio_Speech_Actors_01-24.zip holds them",
    "get it from https://zenodo.org/record/1188976",
    "by speaker: actors 21 and 22 are dev, 23 and 24 test (of each pair the first is male, the second female)",
    (),
    _read_ravdess,
)
CREMA_D = Dataset(
    "CREMA-D",
    "VideoDemographics.csv and files such as AudioWAV/1001_DFA_ANG_XX.wav",
    "get it with git and git-lfs from https://github.com/CheyneyComputerScience/CREMA-D",
    "by speaker: actors whose number ends in 9 are dev, in 0 test",
    (),
    _read_crema_d,
)
IEMOCAP = Dataset(
    "IEMOCAP",
    "Session1 to Session5, each with dialog/EmoEvaluation/Ses*.txt and sentences/wav/*/*.wav",
    "request it from https://sail.usc.edu/iemocap/",
    "by session, and so by speaker: Session4 is dev, Session5 test",
    (),
    _read_iemocap,
)
