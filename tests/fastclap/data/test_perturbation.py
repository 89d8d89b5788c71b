"""Captions with one attribute contradicted: what changes, what stays, and the published code's decisions."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from fastclap.data import ClipDataset, load_manifest
from fastclap.data import perturbation as tables
from fastclap.data.hashing import draw
from fastclap.data.perturbation import ATTRIBUTES, perturbed
from fastclap.errors import DataError

Labels = dict[str, tuple[str, ...]]

WORDS = {
    **{(column, label): list(words) for column, by_label in tables._SWAPS.items() for label, words in by_label.items()},
    **{("accent", accent): [accent] for group in tables._ACCENTS for accent in group},
    **{(column, tag): [tag] for column, tags in tables._TAGS.items() for tag in tags},
}
FILLERS = ['She says "he is a fast, HIGH man".', "The voice,", "is", "hers;", "(whispered)", "It's", "Ünlike", "and"]


def choices(*key: int) -> Callable[[int], int]:
    count = itertools.count()
    return lambda below: draw(below, *key, next(count))


def example(number: int) -> tuple[str, Labels]:
    """A caption that says some of its labels' words, some of other labels, in all sorts of capitals."""
    generator = random.Random(number)
    labels: Labels = {}
    for column in ATTRIBUTES:
        own = [label for of, label in WORDS if of == column]
        if column.endswith("tags"):
            labels[column] = tuple(generator.sample(own, generator.choice([0, 1, 3])))
        elif column == "sex" or generator.random() < 0.7:
            labels[column] = (generator.choice([*own, "measured speed"] if column != "sex" else own),)
    said = [word for column, names in labels.items() for name in names for word in WORDS.get((column, name), ())]
    said = generator.sample(said, min(len(said), generator.choice([0, 1, 2, 6])))
    said += generator.sample([word for words in WORDS.values() for word in words], generator.choice([0, 3]))
    shapes: list[Callable[[str], str]] = [str.lower, str.lower, str.title, str.upper, str.capitalize]
    parts = [generator.choice(shapes)(word) for word in said] + generator.choices(FILLERS, k=4)
    parts += [f'"{word}"' for word in said[:1]]
    generator.shuffle(parts)
    return " ".join(parts), labels


class OfChoices:
    """Python's random, as far as the published code uses it, on our decisions."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        self._choose = choose

    def shuffle(self, items: list[Any]) -> None:
        left = items[:]
        items[:] = [left.pop(self._choose(len(left))) for _ in items]

    def choice(self, items: Sequence[Any]) -> Any:
        return items[self._choose(len(items))]

    def random(self) -> float:
        return 0.0 if self._choose(5) == 0 else 0.5  # which is compared with 0.2


def test_equal_decisions_give_the_published_captions(icefall: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    published = icefall.attribute_perturbation
    differing = failed = 0
    for number in range(3000):
        caption, labels = example(number)
        monkeypatch.setattr(published, "random", OfChoices(choices(number)))
        single = {column: (labels.get(column) or ("",))[0] for column in ATTRIBUTES[:4]}
        try:
            expected = published.perturb_one_attribution_in_text(
                caption,
                gender=single["sex"],
                **{column: single[column] for column in ATTRIBUTES[1:4]},
                **{column: list(labels[column]) for column in ATTRIBUTES[4:]},
            )
        except ValueError as error:
            assert "No attribution" in str(error)
            expected = None
        assert perturbed(caption, labels, choices(number)) == expected, caption
        failed += expected is None
        differing += expected is not None and expected != caption
    assert differing > 2000 and failed > 50


def test_the_published_tables_are_whole(icefall: SimpleNamespace) -> None:
    published = icefall.attribute_perturbation
    assert list(published.ACCENT_GROUPS.values()) == tables._ACCENTS
    assert tables._TAGS == {
        "intrinsic_tags": published.INTRINSIC_TAG_MAP,
        "situational_tags": published.SITUATIONAL_TAG_MAP,
    }


def turned(caption: str, column: str, label: str) -> re.Pattern[str]:
    """What a caption can become when this label is contradicted: its words outside quotations, and they alone, go."""
    words = sorted(WORDS.get((column, label), ["\0"]), key=len, reverse=True)
    if column == "accent":
        others = {accent for group in tables._ACCENTS for accent in group} - {label}
    elif column in tables._TAGS:
        others = set(tables._TAGS[column].get(label, ()))
    else:
        others = set(tables._SWAPS[column].get(label, {}).values())
    pattern, end = "", 0
    for match in re.finditer(rf'(?i)"[^"]*"|\b({"|".join(map(re.escape, words))})\b', caption):
        if match[1]:
            pattern += re.escape(caption[end : match.start()]) + f"(?i:{'|'.join(map(re.escape, sorted(others)))})"
            end = match.end()
    return re.compile(pattern + re.escape(caption[end:]))


def test_one_attribute_changes_and_nothing_else() -> None:
    kinds, found = set(), 0
    for number in range(1500):
        caption, labels = example(number)
        changed = perturbed(caption, labels, choices(number))
        assert changed == perturbed(caption, labels, choices(number))
        if changed is None:
            continue
        assert changed != caption
        every = [
            *((column, label) for column in labels for label in labels[column]),
            ("sex", "male"),
            ("sex", "female"),
        ]
        columns = {column for column, label in every if turned(caption, column, label).fullmatch(changed)}
        assert columns, (caption, changed)
        kinds |= columns
        found += 1
    assert found > 900 and kinds == set(ATTRIBUTES)


@pytest.mark.parametrize(
    ("caption", "labels", "expected"),
    [
        ('A WOMAN says "she" and Her voice is hers.', {"sex": ("female",)}, 'A MAN says "she" and His voice is hers.'),
        ("Fast-paced, fast; unhurried.", {"speaking_rate": ("fast speed",)}, "Slow-Paced, slow; unhurried."),
        ("Unhurried and slow.", {"speaking_rate": ("slow speed",)}, "Hurried and fast."),
        ("A low-pitched voice falls lower.", {"pitch": ("low-pitched",)}, "A high-pitched voice rises higher."),
        ("Her measured pace.", {"speaking_rate": ("measured speed",)}, None),
        ("Her voice.", {"sex": ("male",)}, "His voice."),  # it disagrees with its label
        ("An ſhe voice.", {"sex": ("female",)}, None),  # the long s matches an s when case does not count
        ("A nasal voice.", {"intrinsic_tags": ("nasal",)}, "A deep voice."),
        ("A voice.", {"intrinsic_tags": ("no such tag",), "accent": ("martian",), "sex": ("robot",)}, None),
        ("", {"sex": ("female",)}, None),
    ],
)
def test_examples(caption: str, labels: Labels, expected: str | None) -> None:
    assert perturbed(caption, labels, choices(0)) == expected


def test_an_accent_stays_in_its_group_in_a_fifth() -> None:
    near = 0
    for number in range(2000):
        found = perturbed("a dari accent", {"accent": ("dari",)}, choices(number))
        assert found is not None
        accent = found.removeprefix("a ").removesuffix(" accent")
        assert accent != "dari" and sum(accent in group for group in tables._ACCENTS) == 1
        near += accent in ("turkish", "jordanian")
    assert abs(near - 400) < 4 * (2000 * 0.2 * 0.8) ** 0.5


def test_words_are_turned_once() -> None:
    """No word that is put in is one that the same label replaces: one pass is as good as one for each pair."""
    for by_label in tables._SWAPS.values():
        for words in by_label.values():
            assert not set(words) & set(words.values())
    for tags in tables._TAGS.values():
        for tag, opposites in tags.items():
            assert tag not in opposites and all(tag in tags[opposite] for opposite in opposites)
    accents = [accent for group in tables._ACCENTS for accent in group]
    assert len(set(accents)) == len(accents) == 53


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    rows = ["audio,text_description,fine_description,sex,Pitch,situational_tags"]
    for number in range(12):
        soundfile.write(tmp_path / f"{number}.wav", np.full(4000, 0.1 + number / 100), 16000)
        sex = "Female " if number % 2 else "male"
        caption = "Nothing to turn." if number == 5 else "A woman is loud." if number % 2 else "A man is loud."
        rows.append(f"{number}.wav,{caption},Fine {number}.,{sex},,\"['Loud']\"")
    path = tmp_path / "clips.csv"
    path.write_text("\n".join(rows))
    return str(path)


def test_a_batch_holds_each_clips_captions_three_times(manifest: str) -> None:
    clips = load_manifest(manifest)
    dataset = ClipDataset(clips, 16000, seed=3, caption="perturbed")
    seen = set()
    for step in range(40):
        batch = dataset[step, step, [1, 2, 5]]
        wide, fine, turned = batch.captions[:3], batch.captions[3:6], batch.captions[6:]
        assert fine == ["Fine 1.", "Fine 2.", "Fine 5."], "never two fine ones"
        assert [text in clips[row].captions for text, row in zip(wide, batch.rows, strict=True)] == [True] * 3
        assert turned[2] == wide[2] == "Nothing to turn." and batch.caption_ids[8] == batch.caption_ids[2]
        assert turned[0] in ("A man is loud.", "A woman is whispered.")
        assert turned[1] in ("A woman is loud.", "A man is whispered.")
        seen.update(turned)
        assert dataset[step, step, [2, 1]].captions[4:] == [turned[1], turned[0]], "a row's own, wherever it stands"
    assert len(seen) == 5
    of_seeds = [ClipDataset(clips, 16000, seed=seed, caption="perturbed")[0, 0, [1]].captions[2] for seed in range(9)]
    assert len(set(of_seeds)) == 2


def test_labels_and_fine_captions_are_needed(manifest: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare.csv"
    bare.write_text("audio,text_description,fine_description\n1.wav,A man.,Fine.\n")
    with pytest.raises(DataError, match=r"bare\.csv: .*none of the columns sex, speaking_rate.*fastclap prepare"):
        ClipDataset(load_manifest(str(bare)), 16000, seed=0, caption="perturbed")
    bare.write_text("audio,text_description,sex\n1.wav,A man.,male\n")
    with pytest.raises(DataError, match=r"bare\.csv:2: no fine_description"):
        ClipDataset(load_manifest(str(bare)), 16000, seed=0, caption="perturbed")
