"""Every letter is drawn by a font that has it, or spelled out."""

from __future__ import annotations

from typing import Any

import pytest

from fastclap.evaluation import lettering
from fastclap.evaluation.lettering import drawn, families


class Font:
    def __init__(self, letters: str) -> None:
        self.letters = set(letters)

    def get_char_index(self, code: int) -> int:
        return int(chr(code) in self.letters)


@pytest.fixture(autouse=True)
def fonts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three fonts; the names of those that were opened."""
    opened: list[str] = []
    latin = "".join(map(chr, range(32, 127))) + "…é"
    installed = {lettering._OWN: Font(latin), "CJK Sans": Font("開心a"), "Arabic Sans": Font("غاضب")}

    def found() -> Any:
        for name, font in installed.items():
            opened.append(name)
            yield name, font

    monkeypatch.setattr(lettering, "_fonts", found)
    monkeypatch.setattr(lettering, "_family_of", {})
    return opened


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("[laughing] $100_$", "[laughing] $100_$"),
        ("開心", "開心"),
        ("한", r"\ud55c"),
        ("😀", ":grinning face:"),
        ("e\u0301", r"e\u0301"),
        ("Ｆ\u00a0ﬁ", "F fi"),
        ("a\u200d\ufe0fb", "ab"),
        ("a\nb\x1b\udcff", r"a\nb\x1b\udcff"),
        ("\U0010ffff", r"\U0010ffff"),
        ("x" * 5000, "x" * 39 + "…"),
        ("開" * 5000, "開" * 19 + "…"),
        ("_hidden", " _hidden"),
        ("", ""),
    ],
)
def test_a_name_is_drawn_with_letters_that_there_are(name: str, expected: str) -> None:
    assert drawn(name) == expected


def test_the_families_have_all_letters_and_are_looked_for_once(fonts: list[str]) -> None:
    assert families(["plain"]) == [lettering._OWN] and fonts == [lettering._OWN]
    assert families(["開心", "غاضب"]) == [lettering._OWN, "Arabic Sans", "CJK Sans"]
    assert families(["한", "😀"]) == [lettering._OWN]
    count = len(fonts)
    drawn("開心غاضب한😀"), families(["開", "한"])
    assert len(fonts) == count
    assert families([]) == [lettering._OWN]


def test_the_fonts_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert drawn("$_^é") == "$_^é" and families(["$_^é"]) == [lettering._OWN]
    names = [entry.name for entry in lettering._upright()]
    assert names[0] == lettering._OWN and not any("Last Resort" in name for name in names)
