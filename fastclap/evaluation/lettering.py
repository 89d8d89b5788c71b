"""Names on pictures: in every script that this machine has a font for, and readable where it has none.

matplotlib draws a letter with the first font of a list that has it. `families` makes that list, of matplotlib's own
font and of whatever else is installed; `drawn` spells out what none of them has. With `PLAIN` and the families as
rcParams, a dollar sign in a name is a dollar sign.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any
from unicodedata import category, name, normalize

from fastclap.console import printable, shortened

PLAIN = {"text.parse_math": False, "text.usetex": False}

_OWN = "DejaVu Sans"  # comes with matplotlib
_LONGEST = 40  # columns of a name
_NO_LETTERS = ("Last Resort", "cm", "STIXNon", "STIXSize")  # a box for every letter, or letters in places of their own

_family_of: dict[str, str | None] = {}  # letter → the first family that has it; None: no font of this machine has it


def drawn(text: str) -> str:
    """A name as it is drawn: in one line, short, of letters that some font has."""
    text = printable(text)[: 2 * _LONGEST]
    _look_up(text)
    text = shortened("".join(map(_drawable, text)), _LONGEST)
    return f" {text}" if text.startswith("_") else text  # matplotlib leaves such names out of legends


def families(texts: Iterable[str]) -> list[str]:
    """Font families that together have the letters of the texts, in the order in which they are to be tried."""
    letters = "".join(sorted(set().union(*map(printable, texts))))
    _look_up(letters)
    found = (_family_of[part] for letter in letters for part in _drawable(letter))
    return list(dict.fromkeys([_OWN, *(family for family in found if family is not None)]))


def _drawable(letter: str) -> str:
    """A letter that has been looked up, or what stands for it."""
    if _family_of[letter] is not None:
        return letter
    if category(letter) == "Cf" or "\ufe00" <= letter <= "\ufe0f":  # joiners and variants have no shape of their own
        return ""
    if category(letter) == "Zs":
        return " "
    parts = normalize("NFKD", letter)
    if parts != letter and all(_family_of[part] for part in parts):
        return parts
    title = name(letter, "") if category(letter) == "So" else ""
    return f":{title.lower()}:" if title else ascii(letter)[1:-1]


def _look_up(text: str) -> None:
    """Find the families of all letters of a text, and of what may stand for them, in one pass over the fonts."""
    printed = map(chr, range(32, 127))  # of names and codes that stand for a letter
    wanted = {*text, *normalize("NFKD", text), *printed}.difference(_family_of)
    for family, font in _fonts() if wanted else ():
        found = {letter for letter in wanted if font.get_char_index(ord(letter))}
        _family_of.update(dict.fromkeys(found, family))
        wanted -= found
        if not wanted:
            break
    _family_of.update(dict.fromkeys(wanted))


def _fonts() -> Iterator[tuple[str, Any]]:
    """An open upright font of each family, matplotlib's own first."""
    from matplotlib.ft2font import FT2Font

    for entry in _upright():
        face = getattr(entry, "index", 0)  # of a collection, where matplotlib reads more than the first
        try:
            yield entry.name, FT2Font(entry.fname, face_index=face) if face else FT2Font(entry.fname)
        except (OSError, RuntimeError):  # removed since matplotlib listed it, or damaged
            continue


@lru_cache(maxsize=1)
def _upright() -> list[Any]:
    """matplotlib's entry of each family, those without serifs first, as they fit the rest of the picture best."""
    from matplotlib.font_manager import fontManager

    entries: dict[str, Any] = {}
    for entry in fontManager.ttflist:
        regular = entry.style == "normal" and entry.weight == 400
        if not entry.name.startswith(_NO_LETTERS) and (regular or entry.name not in entries):
            entries[entry.name] = entry
    return sorted(entries.values(), key=lambda e: (e.name != _OWN, "Sans" not in e.name, "Mono" in e.name, e.name))
