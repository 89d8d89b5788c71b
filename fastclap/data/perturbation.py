"""Captions with one attribute turned into its opposite, the hard negatives of CLSP's third stage.

A clip's labels say what its caption is about: its speaker's sex, its pace, pitch and accent, and its tags. One of them
is drawn whose word is in the caption, and the word is replaced by one that contradicts it. The tables and the order of
the decisions are those of the published training (yfyeung/icefall, branch clsp, attribute_perturbation.py), so that
equal decisions give equal captions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Choose = Callable[[int], int]
"""Makes a decision: an integer from 0 up to below its argument."""

_OTHER_SEX = {"female": "male", "male": "female"}


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(left, right) for left, right in (pair.split("/") for pair in text.split())]


def _opposites(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Each word of the pairs → the words that contradict it."""
    found: dict[str, list[str]] = {}
    for left, right in pairs:
        found.setdefault(left, []).append(right)
        found.setdefault(right, []).append(left)
    return found


def _swaps(pairs: list[tuple[str, str]]) -> tuple[dict[str, str], dict[str, str]]:
    """What left words turn into, and what right ones do. Of several opposites it is the first."""
    return dict(reversed(pairs)), {right: left for left, right in reversed(pairs)}


_SEX = _swaps(_pairs("female/male woman/man girl/boy feminine/masculine she/he her/his herself/himself"))
_PACE = _swaps(
    _pairs(
        "fast-paced/slow-paced fast/slow quick/slow rapid/slow rushed/deliberate hurried/unhurried quickly/slowly "
        "rapidly/slowly fast/measured"
    )
)
_PITCH = _swaps(
    _pairs(
        "high-pitched/low-pitched higher/lower high/low raising/lowering rises/falls rising/falling raised/lowered "
        "upward/downward"
    )
)
_SWAPS: dict[str, dict[str, dict[str, str]]] = {  # column → label → word → the word in its place
    "sex": {"female": _SEX[0], "male": _SEX[1]},
    "speaking_rate": {"fast speed": _PACE[0], "slow speed": _PACE[1]},
    "pitch": {"high-pitched": _PITCH[0], "low-pitched": _PITCH[1]},
}

_ACCENTS = [  # alike within a group: of English as a first and as a second language, of Romance languages and so on
    group.split(", ")
    for group in (
        "american, british, australian, canadian, new zealand, irish, scottish, welsh, southern american, "
        "brooklyn/new york, northern irish, british-american, english",
        "indian, nigerian, jamaican, filipino, british-guyanese, colombian-american",
        "spanish, mexican, colombian, argentine, chilean, paraguayan, portuguese, brazilian, italian, french, "
        "romanian, dominican",
        "german, dutch, swedish, norwegian, swiss, belgian, russian, ukrainian, polish, czech, croatian, serbian, "
        "slovenian, hungarian, finnish",
        "mandarin, cantonese, chinese, japanese",
        "turkish, dari, jordanian",
    )
]
_ONE_ACCENT_IN = 5  # is exchanged for one of its own group

_TAGS: dict[str, dict[str, list[str]]] = {  # column → tag → its opposites
    "intrinsic_tags": _opposites(
        _pairs(
            "raspy/smooth raspiness/smoothness raspily/smoothly raspy/silky raspiness/silkiness raspily/silkily "
            "guttural/silky gutturally/silkily vocal-fry/smoothness slurred/crisp slurring/crispness "
            "slurringly/crisply husky/crisp huskiness/crispness huskily/crisply nasal/deep nasality/depth "
            "nasally/deeply staccato/flowing "
            "punctuated/flowing punctuation/flow stammering/flowing stammer/flow stammeringly/flowingly "
            "hesitant/flowing hesitance/flow hesitantly/flowingly lisp/crispness lisping/crisp lispingly/crisply "
            "shrill/deep shrillness/depth shrilly/deeply pitchy/monotone pitchiness/monotony pitchily/monotonously "
            "booming/hushed boom/hush booming/hushedly booming/soft boom/softness booming/softly upbeat/monotonous "
            "upbeat/monotone authoritative/hesitant authority/hesitance authoritatively/hesitantly "
            "inviting/authoritative invitation/authority invitingly/authoritatively"
        )
    ),
    "situational_tags": _opposites(
        _pairs(
            "happy/sad happy/saddened happiness/sadness happiness/pain happiness/anger happy/pained happy/angry "
            "enthusiastic/bored enthusiasm/boredom laughing/saddened laugh/sadness laughter/sadness guilt/happiness "
            "guilty/happy angry/calm anger/calmness scared/calm fear/calmness anxious/calm anxiety/calmness "
            "animated/passive animated/sleepy loud/whispered confused/calm confusion/calmness admiring/disgusted "
            "admiration/disgust desirous/disgusted desire/disgust awed/bored awe/boredom sympathetic/sarcastic "
            "sympathy/sarcasm admiring/sarcastic admiration/sarcasm enunciated/slurred enunciation/slurring "
            "singsong/monotone singsongly/monotonously"
        )
    ),
}

ATTRIBUTES = ("sex", "speaking_rate", "pitch", "accent", "intrinsic_tags", "situational_tags")
"""The columns of a manifest that hold what can be turned."""


def perturbed(caption: str, labels: Mapping[str, Sequence[str]], choose: Choose) -> str | None:
    """The caption with one attribute of its clip contradicted; None: it names none that can be.

    What stands between double quotes is speech, not description, and stays; capitals stay where they were. Every
    occurrence of the attribute's words is replaced, those of the other sex likewise where all else fails: a caption may
    disagree with its label.

    Args:
        caption: a description of a clip.
        labels: the clip's, in lower case, by the columns `ATTRIBUTES`; those that the tables lack change nothing.
        choose: makes the decisions, in the order of the published code: that of the columns, then within each column
            that is tried the order of its tags and the word in place of one.
    """
    for column in _shuffled(ATTRIBUTES, choose):
        own: Sequence[str] = labels.get(column, ())
        for label in _shuffled(own, choose) if column in _TAGS else own:
            found = _replaced(caption, _replacements(column, label, choose))
            if found is not None:
                return found
    for sex in labels.get("sex", ()):
        found = _replaced(caption, _SWAPS["sex"].get(_OTHER_SEX.get(sex, ""), {}))
        if found is not None:
            return found
    return None


def _replacements(column: str, label: str, choose: Choose) -> Mapping[str, str]:
    """The words that say a label, and the words to put in their places."""
    if column in _SWAPS:
        return _SWAPS[column].get(label, {})
    if column in _TAGS:
        opposites = _TAGS[column].get(label, [])
        return {label: opposites[choose(len(opposites))]} if opposites else {}
    group = next((accents for accents in _ACCENTS if label in accents), None)
    if group is None:
        return {}
    if choose(_ONE_ACCENT_IN) == 0:
        others = [accent for accent in group if accent != label]
    else:
        groups = [accents for accents in _ACCENTS if accents is not group]
        others = groups[choose(len(groups))]
    return {label: others[choose(len(others))]}


def _replaced(caption: str, words: Mapping[str, str]) -> str | None:
    """The caption with these words replaced wherever they stand outside quotes; None: they do not."""
    count = 0

    def replacement(match: re.Match[str]) -> str:
        nonlocal count
        word = match[1] or ""
        found = words.get(word.lower())
        if found is None:  # a quotation, or a word with a letter such as the long s, which matches an s
            return match[0]
        count += 1
        if word.isupper():
            return found.upper()
        return found.title() if word[0].isupper() else found

    changed = _pattern(tuple(words)).sub(replacement, caption) if words else caption
    return changed if count else None


@lru_cache(maxsize=512)
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    """Matches a quotation, or one of the words as group 1, of which a longer one goes before a part of it."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(rf'"[^"]*"|\b({"|".join(map(re.escape, longest_first))})\b', re.IGNORECASE)


def _shuffled(items: Sequence[T], choose: Choose) -> list[T]:
    left = list(items)
    return [left.pop(choose(len(left))) for _ in items]
