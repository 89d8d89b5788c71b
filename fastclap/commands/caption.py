"""`fastclap caption`: captions from measured acoustics and labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from fastclap.bounds import CountOrNone, Range
from fastclap.commands.shared import Workers, cpu_cores
from fastclap.console import note, progress, show, show_json, writing


@dataclass(kw_only=True)
class Flags:
    source: Annotated[str, tyro.conf.Positional]
    """Manifest (a .jsonl, .json, .csv, .tsv or .parquet file, a saved `datasets` folder, or hf:NAME[:SPLIT]), with or
    without captions, or a folder of audio files."""
    out: str
    """Manifest to write, a .jsonl file."""
    audio_root: str | None = None
    """Folder that relative audio paths start from (default: the folder of the manifest)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names of the manifest that differ, as pairs: OURS THEIRS (for example classification_tag emotion)."""
    labels: list[str] | None = None
    """Columns to mix into the captions, of classification_tag, emotion, sex, gender, age and accent (default: all that
    are there; without a sex, it is taken from the voice)."""
    phrases: dict[str, str] = field(default_factory=dict)
    """Other columns to mix in, as pairs: COLUMN PHRASE, where the phrase has {} for the value ("over a {} line")."""
    thresholds: str = "published"
    """What is low and what is high: "published" values where there are some, else terciles of the set; "set", terciles
    throughout; or the NAME-thresholds.json of another call, for a set to be worded like that one."""
    replace: bool = False
    """Leave out the captions and tags that the manifest has; otherwise they come first."""
    captions: Annotated[int, Range(1, 100)] = 4
    """Global captions a clip."""
    fine_captions: Annotated[int, Range(0, 100)] = 2
    """Fine captions a clip, with the course over time."""
    seed: CountOrNone = 0
    """Fixes the wording, together with each clip's path."""
    workers: Workers | None = None
    """Processes that measure, 0 for none (default: one for each CPU core)."""
    json: bool = False
    """Print the summary as JSON, and nothing else, on stdout."""


HELP = """\
Measures pitch, loudness, pace, pauses, brightness and breathiness, and says them in plain English together with the
labels that are there. Clips that cannot be used are listed next to the output, in NAME-skipped.jsonl. An interrupted
call is continued by the same command. What is measured, in which units, and what it is worth: docs/captions.md.

Examples:
  fastclap caption recordings --out captioned.jsonl
  fastclap caption train.jsonl --out train-captioned.jsonl --phrases channel "over a {} line"
  fastclap caption valid.jsonl --out valid-captioned.jsonl --thresholds train-captioned-thresholds.json
  fastclap caption labels.csv --out captioned.jsonl --columns classification_tag emotion --labels classification_tag age
"""


def run(flags: Flags) -> int:
    from fastclap.apps.caption_manifest import caption

    with progress("measuring", "measured", "clips") as advance, writing(flags.out):
        summary = caption(
            flags.source,
            flags.out,
            audio_root=flags.audio_root,
            columns=flags.columns,
            labels=flags.labels,
            phrases=flags.phrases,
            thresholds=flags.thresholds,
            replace=flags.replace,
            captions=flags.captions,
            fine=flags.fine_captions,
            seed=flags.seed,
            workers=cpu_cores() if flags.workers is None else flags.workers,
            advance=advance,
        )
    if summary["skipped"]:
        note(f"{summary['skipped']} clips left out, see {summary['skipped_file']}")
    if flags.json:
        show_json(summary)
        return 0
    for text in summary["example"]:
        show(f"  {text}")
    for kind, counts in summary["sex"].items():
        if counts:
            show(f"sex {kind}: {', '.join(f'{sex} {count}' for sex, count in counts.items())}")
    show(
        f"{summary['rows']} rows, {summary['hours']:.2f} h: {summary['out']} (thresholds: {summary['thresholds_file']})"
    )
    return 0
