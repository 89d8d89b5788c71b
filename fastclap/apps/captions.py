"""Captions of a voice in plain English, from its measures and its labels.

`Thresholds` turn a number into low, middle or high; `describe` turns those words, what the labels say and the course of
pitch and loudness into sentences. Nothing is said that was neither measured nor labelled. Every choice is a hash of the
seed and the clip's name, so that a caption depends on neither the order of the rows nor the number of processes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fastclap.apps.acoustics import Acoustics
from fastclap.data.hashing import draw
from fastclap.errors import DataError
from fastclap.prompts import article
from fastclap.reading import read_json

T = TypeVar("T")

FEWEST = 12  # clips that have terciles; with fewer a measure without published thresholds is left unsaid
LABELS = ("classification_tag", "emotion", "sex", "gender", "age", "accent")  # columns that captions know how to say
_ALL = "all"  # the group of thresholds that do not depend on the sex
_GROUPS = ("male", "female", _ALL)
_LONG_PAUSE = 1.0  # seconds
_COURSE_SEMITONES, _COURSE_DECIBELS = 2.0, 3.0  # from one third of a clip to another, to be called a change


class _Scale(NamedTuple):
    """How a measure is split into low, middle and high."""

    by_sex: bool
    noticeable: float  # low and high lie at least this far from the median, so that no word is given for nothing
    published: Mapping[str, tuple[float, float]]


SCALES = {
    # ParaSpeechCaps's bins: dataset/automatic_annotation/basic_tags/bin_edges.json of its repository.
    "pitch_hz": _Scale(True, 10.0, {"male": (115.7, 149.7), "female": (141.6, 184.5)}),
    "pitch_range_st": _Scale(False, 1.0, {}),
    "loudness_lufs": _Scale(False, 1.0, {}),
    "syllable_rate": _Scale(False, 0.3, {}),
    "spectral_centroid_hz": _Scale(True, 100.0, {}),
    "hnr_db": _Scale(True, 1.0, {}),
}


@dataclass(frozen=True)
class Thresholds:
    """For each measure and group ("male", "female" or "all"), the values below which it is low and above which high."""

    bounds: Mapping[str, Mapping[str, tuple[float, float]]]

    def word(self, acoustics: Acoustics, measure: str, sex: str | None) -> int | None:
        """-1 for low, 0, 1 for high; None where the measure or its thresholds are missing."""
        value, groups = getattr(acoustics, measure), self.bounds.get(measure, {})
        bounds = groups.get(sex or "", groups.get(_ALL))
        if value is None or bounds is None:
            return None
        return -1 if value < bounds[0] else int(value > bounds[1])

    @classmethod
    def of_set(cls, clips: Iterable[tuple[Acoustics, str | None]], *, published: bool) -> Thresholds:
        """Terciles of a set of clips with their sexes, or published values where `published` and there are some.

        Terciles need `FEWEST` clips of the group. The lower one is lowered, and the upper one raised, to a noticeable
        distance from the median.
        """
        values: dict[tuple[str, str], list[float]] = {}
        for acoustics, sex in clips:
            for measure, scale in SCALES.items():
                value = getattr(acoustics, measure)
                if value is not None:
                    values.setdefault((measure, _ALL), []).append(value)
                    if scale.by_sex and sex:
                        values.setdefault((measure, sex), []).append(value)
        bounds: dict[str, dict[str, tuple[float, float]]] = {}
        for measure, scale in SCALES.items():
            groups = _GROUPS if scale.by_sex else (_ALL,)
            for group in groups:
                found = scale.published.get(group) if published else None
                if found is None and len(values.get((measure, group), ())) >= FEWEST:
                    low, middle, high = np.quantile(values[measure, group], (1 / 3, 1 / 2, 2 / 3)).tolist()
                    away = scale.noticeable
                    found = (round(min(low, middle - away), 2), round(max(high, middle + away), 2))
                if found is not None:
                    bounds.setdefault(measure, {})[group] = found
        return cls(bounds)

    @classmethod
    def read(cls, path: str) -> Thresholds:
        """Read what `to_json` wrote.

        Raises:
            DataError: the file cannot be read or holds something else.
        """
        found = read_json(path)
        try:
            bounds = {
                measure: {group: (float(low), float(high)) for group, (low, high) in groups.items()}
                for measure, groups in found.items()
            }
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(
                f'{path}: holds no thresholds ({error}); they look like {{"pitch_hz": {{"male": [115.7, 149.7]}}}}'
            ) from error
        for measure, groups in bounds.items():
            if measure not in SCALES:
                raise DataError(f"{path}: no measure is named {measure!r}; the measures are {', '.join(SCALES)}")
            for group, (low, high) in groups.items():
                if group not in _GROUPS:
                    raise DataError(
                        f"{path}: {measure}: no group is named {group!r}; the groups are {', '.join(_GROUPS)}"
                    )
                if not -math.inf < low <= high < math.inf:
                    raise DataError(
                        f"{path}: {measure}: {group}: [{low:g}, {high:g}] is no pair of a low and a high value"
                    )
        return cls(bounds)

    def to_json(self) -> str:
        lines = [f"  {json.dumps(measure)}: {json.dumps(groups)}" for measure, groups in self.bounds.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"


class Labels(NamedTuple):
    """What the manifest says of a clip."""

    sex: str | None = None  # "female" or "male", labelled or measured
    emotion: str | None = None  # or speaking style, as an adjective
    age: str | None = None
    accent: str | None = None
    phrases: tuple[str, ...] = ()  # sentence parts made of other columns, such as "over the telephone"


class Description(NamedTuple):
    """Sentences and tags of a clip."""

    captions: list[str]  # global ones
    fine: list[str]  # with the course over time
    intrinsic_tags: list[str]  # of the voice
    situational_tags: list[str]  # of the moment


# ---------------------------------------------------------------------------------------------------------------------
# choices


class _Choice:
    """Draws that are fixed by the seed and the clip's name."""

    def __init__(self, seed: int, name: str) -> None:
        self.key = (seed, int.from_bytes(blake2b(name.encode(errors="surrogatepass"), digest_size=7).digest(), "big"))
        self.count = 0

    def below(self, number: int) -> int:
        self.count += 1
        return draw(number, *self.key, self.count)

    def of(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def shuffled(self, options: Iterable[T]) -> list[T]:
        left, order = list(options), []
        while left:
            order.append(left.pop(self.below(len(left))))
        return order


# ---------------------------------------------------------------------------------------------------------------------
# words

_PITCH = {-1: ("low-pitched", "low"), 0: ("medium-pitched",), 1: ("high-pitched", "high")}
_BRIGHTNESS = {-1: "dark", 1: "bright"}
_LOUDNESS = {
    -1: ("softly", "quietly"),
    0: ("at a normal volume", "at a moderate volume"),
    1: ("loudly", "at a high volume"),
}
_PACE = {
    -1: ("slowly", "at a slow pace", "unhurriedly"),
    0: ("at a normal pace", "at a moderate pace"),
    1: ("fast", "quickly", "at a fast pace"),
}
_MELODY = {
    -1: ("with little change of pitch", "with a flat intonation"),
    1: ("with a lively intonation", "with wide swings of pitch"),
}
_ADJECTIVES = {
    "pitch_hz": ("low-pitched", "medium-pitched", "high-pitched"),
    "loudness_lufs": ("soft", None, "loud"),
    "syllable_rate": ("slow", None, "fast"),
    "pitch_range_st": ("monotone", None, "lively"),
}
_NOUNS = {
    "female": ("woman", "woman", "female speaker", "lady"),
    "male": ("man", "man", "male speaker", "guy"),
    None: ("speaker", "person"),
}
_CHILDREN = {"female": "girl", "male": "boy", None: "child"}
_POSSESSIVE = {"female": "her", "male": "his", None: "the"}
_AS_ADJECTIVE = {  # emotions that some datasets name by a noun
    "anger": "angry",
    "boredom": "bored",
    "disgust": "disgusted",
    "fear": "fearful",
    "happiness": "happy",
    "joy": "joyful",
    "sadness": "sad",
    "surprise": "surprised",
}


class _Facts:
    """What can be said of one clip, as sentence parts."""

    def __init__(self, acoustics: Acoustics, labels: Labels, thresholds: Thresholds, choice: _Choice) -> None:
        self.acoustics, self.labels, self.choice = acoustics, labels, choice
        self.levels = {measure: thresholds.word(acoustics, measure, labels.sex) for measure in SCALES}
        self.whispered = acoustics.voiced_share == 0
        self.emotion = _AS_ADJECTIVE.get((labels.emotion or "").lower(), labels.emotion)
        self.possessive = _POSSESSIVE[labels.sex]

    # -- who

    def who(self) -> str:
        """The speaker with an article: "a 35-year-old woman with a Scottish accent"."""
        noun, age = self.choice.of(_NOUNS[self.labels.sex]), (self.labels.age or "").strip().removesuffix(".0")
        before, after = "", ""
        if re.fullmatch(r"\d{1,3}", age):
            if int(age) < 18:
                noun = _CHILDREN[self.labels.sex]
            decade = {2: "twenties", 3: "thirties", 4: "forties", 5: "fifties", 6: "sixties", 7: "seventies"}.get(
                int(age) // 10
            )
            if decade and self.choice.below(2):
                after = f" in {'their' if self.possessive == 'the' else self.possessive} {decade}"
            else:
                before = f"{age}-year-old "
        elif match := re.fullmatch(r"(\d+) ?[-–] ?(\d+)", age):
            after = f" aged {match[1]} to {match[2]}"
        elif re.fullmatch(r".*(ties|teens)", age):
            after = f" in {'their' if self.possessive == 'the' else self.possessive} {age.lower()}"
        elif age:
            before = f"{age.lower()} "
        accent = (self.labels.accent or "").strip()
        if accent:
            named = accent if accent.lower().endswith("accent") else f"{accent} accent"
            after += f" with {article(named)} {named}"
        return f"{article(before + noun)} {before}{noun}{after}"

    def with_verb(self, who: str, between: str = "") -> str:
        """A speaker with "speaks" or "talks"; a speaker does not speak twice."""
        verb = "talks" if "speaker" in who else self.choice.of(("speaks", "talks"))
        return f"{who}{between} {verb}"

    # -- voice

    def pitch_word(self) -> str | None:
        level = self.levels["pitch_hz"]
        words = () if level is None else _PITCH[level]
        if level == -1 and self.labels.sex == "male":
            words = (*words, "deep")
        return self.choice.of(words) if words else None

    def phonation(self) -> str | None:
        """Noise in a voice is breath, or roughness where high frequencies are strong all the same."""
        level, bright = self.levels["hnr_db"], self.levels["spectral_centroid_hz"]
        if level is None or level == 0:
            return None
        if level > 0:
            return "smooth" if bright == -1 else "clear"
        return "rough" if bright == 1 else "breathy"

    def brightness(self) -> str | None:
        level = self.levels["spectral_centroid_hz"]
        return None if self.whispered or self.phonation() == "rough" else _BRIGHTNESS.get(level or 0)

    def adjectives(self, most: int) -> str:
        """Up to `most` adjectives of the voice, such as "high-pitched, breathy"; "" if there is none."""
        if self.whispered:
            return "whispered"
        pitch = self.pitch_word()
        others = [word for word in (self.phonation(), self.brightness()) if word]
        if pitch == "medium-pitched" and others and most < 3 and self.choice.below(2):
            pitch = None
        return ", ".join([word for word in (pitch, *self.choice.shuffled(others)) if word][:most])

    # -- manner

    def manner(self, everything: bool = False) -> str:
        """Volume and pace as adverbs, such as "softly and at a slow pace"; what is ordinary only now and then."""
        found: list[tuple[bool, str]] = []
        for measure, words in (("loudness_lufs", _LOUDNESS), ("syllable_rate", _PACE)):
            level = self.levels[measure]
            if level is not None:
                found.append((level != 0, self.choice.of(words[level])))
        if not found:
            return ""
        if not everything and any(notable for notable, _ in found) and self.choice.below(2):
            found = [part for part in found if part[0]]
        said = sorted((text for _, text in self.choice.shuffled(found)), key=lambda text: " " in text)
        return " and ".join(said).replace(" and at a ", " and a " if said[0].startswith("at a ") else " and at a ")

    def melody(self) -> str:
        level, course = self.levels["pitch_range_st"], self.acoustics.pitch_course
        if level == -1 and course is not None and _shape(course, _COURSE_SEMITONES) != "level":
            return ""  # a small range, but a change that the course speaks of
        return self.choice.of(_MELODY[level]) if level else ""

    def tone(self) -> str:
        if not self.emotion:
            return ""
        a = f"{article(self.emotion)} {self.emotion}"
        return self.choice.of((f"sounding {self.emotion}", f"in {a} tone", f"in {a} manner", f"in {a} style"))

    def tails(self) -> list[str]:
        """What can follow a sentence after a comma, in any order."""
        parts = [self.tone(), *self.labels.phrases]
        if self.choice.below(2):
            parts.append(self.melody())
        return [part for part in self.choice.shuffled(parts) if part]

    # -- course

    def pitch_course(self) -> str:
        course = self.acoustics.pitch_course
        if course is None:
            return ""
        ends_level = "ends about where it began" if self.levels["pitch_range_st"] == 1 else "stays level"
        return f"{self.possessive} pitch " + self.choice.of(
            {
                "up": ("rises", "climbs towards the end"),
                "down": ("falls", "drops towards the end"),
                "peak": ("rises and then falls",),
                "dip": ("dips and comes back up",),
                "level": (ends_level,),
            }[_shape(course, _COURSE_SEMITONES)]
        )

    def loudness_course(self) -> str:
        course = self.acoustics.loudness_course
        if course is None:
            return ""
        return f"{self.possessive} voice " + self.choice.of(
            {
                "up": ("grows louder", "gets louder towards the end"),
                "down": ("dies away", "gets softer towards the end"),
                "peak": ("swells and then fades",),
                "dip": ("gets softer and recovers",),
                "level": ("keeps a steady volume",),
            }[_shape(course, _COURSE_DECIBELS)]
        )

    def pause(self) -> str:
        place = self.acoustics.pause_place
        if place is None:
            return ""
        length = "a long pause" if self.acoustics.longest_pause_s >= _LONG_PAUSE else "a short pause"
        return f"{length} {'early on' if place < 1 / 3 else 'near the end' if place > 2 / 3 else 'in the middle'}"

    def course(self) -> str:
        """The course of pitch and loudness and the longest pause, as a clause; "" of a clip too short to have one."""
        parts = [part for part in (self.pitch_course(), self.loudness_course()) if part]
        text = self.choice.of((" and ", " while ")).join(self.choice.shuffled(parts))
        pause = self.pause()
        if pause:
            text = f"{text}, with {pause}" if text else f"there is {pause}"
        return text


def _shape(course: Sequence[float], noticeable: float) -> str:
    """ "up", "down", "peak", "dip" or "level" of the medians of three thirds."""
    first, middle, last = course
    if middle - max(first, last) >= noticeable:
        return "peak"
    if min(first, last) - middle >= noticeable:
        return "dip"
    if abs(last - first) >= noticeable:
        return "up" if last > first else "down"
    return "level"


# ---------------------------------------------------------------------------------------------------------------------
# sentences


def _sentence(*parts: str) -> str:
    """Parts joined by commas, with a capital and a full stop."""
    text = ", ".join(part for part in parts if part)
    return f"{text[0].upper()}{text[1:]}."


def _a_voice(adjectives: str) -> str:
    return f"{article(adjectives)} {adjectives} voice"


def _fragment(facts: _Facts) -> str:
    """A low-pitched male voice, speaking softly and slowly."""
    words = f"{facts.adjectives(2)} {facts.labels.sex or ''}".strip()
    manner = facts.manner()
    return _sentence(_a_voice(words) if words else "a voice", f"speaking {manner}" if manner else "", *facts.tails())


def _plain(facts: _Facts) -> str:
    """A woman speaks fast and loudly in a bright voice."""
    adjectives = facts.adjectives(2)
    voice = f" in {_a_voice(adjectives)}" if adjectives else ""
    manner = facts.manner()
    return _sentence(f"{facts.with_verb(facts.who())}{f' {manner}' if manner else ''}{voice}", *facts.tails())


def _with_voice(facts: _Facts) -> str:
    """A man with a deep voice talks slowly."""
    adjectives = facts.adjectives(2)
    joint = " and" if facts.labels.accent else " with"
    voice = f"{joint} {_a_voice(adjectives)}" if adjectives else ""
    manner = facts.manner()
    return _sentence(f"{facts.with_verb(facts.who(), voice)}{f' {manner}' if manner else ''}", *facts.tails())


def _manner_first(facts: _Facts) -> str:
    """Softly and slowly, a woman speaks in a dark voice."""
    adjectives = facts.adjectives(2)
    voice = f" in {_a_voice(adjectives)}" if adjectives else ""
    return _sentence(facts.manner(), f"{facts.with_verb(facts.who())}{voice}", *facts.tails())


def _sounds(facts: _Facts) -> str:
    """A woman sounds happy; her voice is high-pitched and clear."""
    adjectives, manner = facts.adjectives(2).replace(", ", " and "), facts.manner()
    who = facts.who()
    if facts.emotion:
        start = f"{who} sounds {facts.emotion}" + (f" and talks {manner}" if manner else "")
    else:
        start = f"{facts.with_verb(who)} {manner}" if manner else f"{who} is talking"
    voice = f"; {facts.possessive} voice is {adjectives}" if adjectives else ""
    return _sentence(start + voice, facts.melody(), *facts.labels.phrases)


def _noun_phrase(facts: _Facts) -> str:
    """The low, breathy voice of a man speaking quietly."""
    adjectives, manner = facts.adjectives(2), facts.manner()
    voice = f"the {adjectives} voice of {facts.who()}" if adjectives else facts.who()
    return _sentence(f"{voice} talking{f' {manner}' if manner else ''}", *facts.tails())


_FORMS = (_fragment, _plain, _with_voice, _manner_first, _sounds, _noun_phrase)


def _fine(facts: _Facts, first: bool) -> str:
    """Everything about the voice, and its course; the course leads in every other caption."""
    adjectives, manner, course = facts.adjectives(3), facts.manner(everything=True), facts.course()
    voice = f" in {_a_voice(adjectives)}" if adjectives else ""
    tails = [part for part in (facts.melody(), facts.tone(), *facts.labels.phrases) if part]
    whole = f"{facts.with_verb(facts.who())}{f' {manner}' if manner else ''}{voice}"
    if not course:
        return _sentence(whole, *tails)
    if first:
        return _sentence(", ".join((whole, *tails)) + f"; {course}")
    return f"{_sentence(whole, *tails)} {_sentence(f'{_OVER_TIME[facts.choice.below(len(_OVER_TIME))]} {course}')}"


_OVER_TIME = ("over the course of the clip", "as the clip goes on")


def describe(
    acoustics: Acoustics,
    labels: Labels,
    thresholds: Thresholds,
    *,
    name: str,
    seed: int = 0,
    captions: int = 4,
    fine: int = 2,
) -> Description:
    """Captions and tags of one clip.

    Args:
        name: of the clip; with the seed it fixes every choice.
        captions: global captions wanted, each of another form while the forms last; equal ones are left out.
        fine: fine captions wanted.
    """
    facts = _Facts(acoustics, labels, thresholds, _Choice(seed, name))
    texts: list[str] = []
    while len(texts) < captions:
        texts += [form(facts) for form in facts.choice.shuffled(_FORMS)]
    fine_texts = [_fine(facts, first=number % 2 == 0) for number in range(fine)]
    levels = {
        measure: words[level + 1]
        for measure, words in _ADJECTIVES.items()
        if (level := facts.levels[measure]) is not None
    }
    voice = (labels.sex, levels.get("pitch_hz"), facts.phonation(), facts.brightness())
    moment = (
        facts.emotion,
        "whispered" if facts.whispered else None,
        *(levels.get(measure) for measure in ("loudness_lufs", "syllable_rate", "pitch_range_st")),
    )
    return Description(
        list(dict.fromkeys(texts[:captions])),
        list(dict.fromkeys(fine_texts)),
        [tag for tag in voice if tag],
        [tag for tag in moment if tag],
    )


def labels_of(values: Mapping[str, Any], sex: str | None, phrases: Mapping[str, str]) -> Labels:
    """Labels from the columns of a row.

    Args:
        values: column → text, of those of `LABELS` and of `phrases` that the row fills.
        sex: "female", "male" or None.
        phrases: column → sentence part with {} for the column's value.
    """
    return Labels(
        sex,
        values.get("classification_tag") or values.get("emotion"),
        values.get("age"),
        values.get("accent"),
        tuple(text.replace("{}", str(values[column])) for column, text in phrases.items() if values.get(column)),
    )
