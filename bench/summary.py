"""The end of `make bench`: every case on a line, ours beside the best of its peers, and why peers were skipped.

Times are medians of the rounds; what else a round had is in the JSON. A form is a peer unless its name starts with
"fastclap"; of several of ours the one that comes first stands for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

WIDEST, LONGEST = 120, 40  # columns and lines of a screen
MOST_REASONS = 8
OURS = "fastclap"


class Timed(NamedTuple):
    """One form of a case.

    Attributes:
        case: the benchmark's group.
        form: what was timed.
        seconds: the median.
        peak_bytes: memory beyond what the inputs hold, where it was recorded.
    """

    case: str
    form: str
    seconds: float
    peak_bytes: int | None = None


def summary(timed: Iterable[Timed], skipped: Sequence[str]) -> list[str]:
    """At most `LONGEST` lines of at most `WIDEST` columns.

    Args:
        timed: forms of cases, in the order in which they ran.
        skipped: "form: reason" of every form that did not run.
    """
    cases: dict[str, list[Timed]] = {}
    for row in timed:
        cases.setdefault(row.case, []).append(row)
    reasons = _reasons(skipped)
    compared = [line for rows in cases.values() if (line := _line(rows))]
    room = LONGEST - 4 - len(reasons)
    title = f"{'case':<54} {'ours':>9} {'best peer':>9} {'ratio':>6}  {'peer':<21} {'memory':>15}"
    lines = [title, *compared[:room]]
    hidden = len(cases) - len(compared[:room])
    if hidden:
        lines.append(f"... and {hidden} more cases without a peer or a line to spare: in the JSON")
    if reasons:
        lines += ["skipped:", *reasons]
    return [_cut(line, WIDEST) for line in lines]


def _line(rows: Sequence[Timed]) -> str | None:
    """A case's line; None without ours or without a peer."""
    ours = next((row for row in rows if row.form.startswith(OURS)), None)
    peers = [row for row in rows if not row.form.startswith(OURS)]
    if ours is None or not peers:
        return None
    best = min(peers, key=lambda row: row.seconds)
    memory = ""
    if ours.peak_bytes is not None and best.peak_bytes is not None:
        memory = f"{ours.peak_bytes / 2**20:.0f}/{best.peak_bytes / 2**20:.0f} MiB"
    return (
        f"{_cut(ours.case, 54):<54} {_time(ours.seconds):>9} {_time(best.seconds):>9} "
        f"{best.seconds / ours.seconds:>5.2f}x  {_cut(best.form, 21):<21} {memory:>15}"
    ).rstrip()


def _time(seconds: float) -> str:
    for unit, least in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= least:
            return f"{seconds / least:.3g} {unit}" if seconds / least < 999.5 else f"{seconds / least:.0f} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _reasons(skipped: Sequence[str]) -> list[str]:
    """Each reason once, with the forms that it holds for, the most frequent first."""
    found: dict[str, list[str]] = {}
    for text in skipped:
        form, colon, reason = text.partition(": ")
        form, reason = (form, reason) if colon else ("", text)
        found.setdefault(reason, []).append(form)
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    lines = [
        " ".join(f"{len(forms)}x {', '.join(dict.fromkeys(forms))}: {reason}".split()) for reason, forms in ordered
    ]
    more = len(lines) - MOST_REASONS
    return lines if more <= 0 else [*lines[: MOST_REASONS - 1], f"... and {more + 1} more reasons (pytest -rs)"]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
