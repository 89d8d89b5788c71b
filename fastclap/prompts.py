"""Class names as sentences: a zero-shot classifier compares a clip with texts, so every class needs a prompt.

A template serves all classes alike; a prompts file gives each class sentences of its own; published sets of either are
known by name. Nothing here imports torch, because the help of the commands shows the default template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastclap.console import shortened
from fastclap.errors import DataError
from fastclap.reading import read_json

DEFAULT_TEMPLATE = "A person is speaking in a {} style."
"""ParaSpeechCLAP's."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a published evaluation: one template for all classes, or sentences for each class."""

    classes: Sequence[str] | None  # candidates; None: all values of the column
    template: str | None = None
    prompts: Mapping[str, Sequence[str]] | None = None
    words: Mapping[str, str] = field(default_factory=dict)  # a class → what the template calls it, where that differs
    merged: Mapping[str, str] = field(default_factory=dict)  # a class → the one that it counts as after the decision


_CLSP_EMOTION = "A speaker in a {} tone."
_CLSP_WORDS = {"fearful": "fear", "disgusted": "disgust"}

PROMPT_SETS: dict[str, PromptSet] = {
    **{
        f"paraspeechclap-{name}": PromptSet(classes.split(), DEFAULT_TEMPLATE)
        for name, classes in {
            "pitch": "shrill nasal deep",
            "texture": "silky husky raspy guttural vocal-fry",
            "volume": "booming authoritative loud hushed soft",
            "clarity": "crisp slurred lisp stammering",
            "rhythm": "flowing punctuated hesitant singsong monotonous",
            "situational": (
                "angry guilt scared happy loud sarcastic sympathetic desirous enthusiastic saddened anxious sleepy "
                "admiring disgusted awed pained fast calm whispered enunciated confused"
            ),
        }.items()
    },
    "clsp-emotion": PromptSet(None, _CLSP_EMOTION, words=_CLSP_WORDS),
    "clsp-emotion-iemocap": PromptSet(
        ["happy", "excited", "angry", "sad", "neutral"], _CLSP_EMOTION, merged={"excited": "happy"}
    ),
    "clsp-gender": PromptSet(None, prompts={"male": ["A male speaker."], "female": ["A female speaker."]}),
    "clsp-age": PromptSet(
        None,
        prompts={
            "child or young teenager": ["A child or young teenager speaker."],
            "adult": ["An adult speaker."],
            "middle-aged": ["A middle-aged speaker."],
            "older or elder": ["An older or elder speaker."],
        },
    ),
}
"""Published prompt sets by name: those of ParaSpeechCLAP (arXiv 2603.28737) and CLSP (arXiv 2601.03065, from
clsp/eval_zero_shot_classification.py of yfyeung/icefall, branch clsp). CLSP publishes no names of its age classes; here
they are the words of their prompts. Of IEMOCAP it compares five emotions and counts happy and excited as one."""


_SEX = {"m": "male", "male": "male", "男": "male", "f": "female", "female": "female", "女": "female"}


def parse_sex(value: Any) -> str | None:
    """ "male" or "female" from the spellings that datasets use, otherwise None."""
    return _SEX.get(str(value).strip().lower())


def article(phrase: str) -> str:
    """ "an" before a vowel letter and the numbers that begin with a vowel (8, 11, 18, 80 ...), else "a"."""
    return "an" if phrase[:1].lower() in tuple("aeiou8") or re.match(r"1[18](?!\d)", phrase) else "a"


def fill_template(template: str, name: str) -> str:
    """`template` with `{}` replaced by the class name, and `{a}` or `{A}` by its article.

    The article is "an" before a vowel letter; where the letter misleads ("hour"), write the prompts of a prompts file.

    Raises:
        DataError: `{}` is missing, or there is another placeholder.
    """
    placeholders = set(re.findall(r"\{[^{}]*\}", template))
    if "{}" not in placeholders or not placeholders <= {"{}", "{a}", "{A}"}:
        raise DataError(
            f"template {shortened(template, 200)!r}: it must contain {{}} for the class name, and may contain {{a}} "
            "or {A} for its article; nothing else in braces"
        )
    found = article(name)
    return template.replace("{a}", found).replace("{A}", found.capitalize()).replace("{}", name)


def load_prompts(path: str | Path, column: str) -> dict[str, list[str]]:
    """Prompts of each class from a JSON file: `{class: [prompt, ...]}`, or `{column: {class: [prompt, ...]}}`.

    A single prompt needs no list around it. Returns {} when the file is by column and lacks `column`.

    Raises:
        DataError: the file cannot be read, holds something else, or a class has no prompt.
    """
    content = read_json(path)
    if isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        content = content.get(column, {})
        if not content:
            return {}
    if not isinstance(content, dict) or not content:
        raise DataError(f'{path}: expected {{"class": ["prompt", ...], ...}}, found {type(content).__name__}')
    prompts = {}
    for name, value in content.items():
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            found = shortened(repr(value))
            raise DataError(f"{path}: class {shortened(name)!r} needs a prompt or a list of prompts, not {found}")
        prompts[name] = texts
    return prompts
