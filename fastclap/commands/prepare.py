"""`fastclap prepare`: a public dataset to a manifest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from fastclap.console import note, progress, show, show_json, writing


@dataclass(kw_only=True)
class Flags:
    dataset: Annotated[
        Literal[
            "paraspeechcaps", "fcaps", "promptspeech", "textrolspeech", "speechcraft", "ravdess", "crema-d", "iemocap"
        ],
        tyro.conf.Positional,
    ]
    """Which dataset it is."""
    root: str
    """Folder of its audio."""
    out: str
    """Manifest to write, a .jsonl file; with {split} in its name, one file a split."""
    annotations: str | None = None
    """File or folder of its captions and labels, or hf:NAME of the hub (default: the root)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of its fields that differ in this copy, as pairs: PUBLISHED FOUND."""
    json: bool = False
    """Print the summary as JSON, and nothing else, on stdout."""


HELP = """\
Clips whose audio is missing or unreadable are left out and listed next to the manifest, in NAME-skipped.jsonl. Where
to get each dataset, under which licence, and how its folder looks: docs/data.md.

Examples:
  fastclap prepare ravdess --root data/ravdess --out manifests/ravdess.jsonl
  fastclap prepare iemocap --root data/IEMOCAP_full_release --out "manifests/iemocap-{split}.jsonl"
  fastclap prepare paraspeechcaps --root data/audio --annotations hf:ajd12342/paraspeechcaps --out "psc-{split}.jsonl"
  fastclap prepare promptspeech --root data/LibriTTS --annotations data/PromptSpeech --out promptspeech.jsonl --json
"""


def run(flags: Flags) -> int:
    from fastclap.prepare import prepare

    with progress("preparing", "prepared", "clips") as advance, writing(flags.out):
        summary = prepare(
            flags.dataset,
            flags.root,
            flags.out,
            annotations=flags.annotations,
            columns=flags.columns,
            advance=advance,
        )
    if summary["skipped_file"]:
        note(
            f"{summary['missing']} clips without audio and {summary['unreadable']} unreadable ones left out, "
            f"see {summary['skipped_file']}"
        )
    if flags.json:
        show_json(summary)
        return 0
    for reason, clips in summary["left_out"].items():
        show(f"left out {clips}: {reason}")
    if summary["repeated"]:
        show(f"left out {summary['repeated']}: repeats of a row")
    for split, figures in summary["splits"].items():
        speakers = f", {figures['speakers']} speakers" if figures["speakers"] else ""
        show(f"{split}: {figures['rows']} rows, {figures['hours']:.2f} h{speakers}")
    show(f"split {summary['split_rule']}")
    show(f"{summary['rows']} rows, {summary['hours']:.2f} h: {', '.join(summary['files'])}")
    return 0
