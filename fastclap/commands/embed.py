"""`fastclap embed`: clips and captions to a table of unit vectors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from fastclap.commands.shared import ModelFlags, load_models
from fastclap.console import note, progress, show, show_json, writing


@dataclass(kw_only=True)
class Flags(ModelFlags):
    model: Annotated[str, tyro.conf.Positional]
    """Exported model folder, run folder (its newest checkpoint) or Hugging Face hub id."""
    inputs: Annotated[list[str], tyro.conf.Positional]
    """Audio files, folders of them (searched through), manifests, packed or `datasets` folders, hf:NAME[:SPLIT], and
    .txt files with one caption a line."""
    out: str
    """The .parquet or .npy file to write: new, or that of an interrupted call, which is continued."""
    audio_root: str | None = None
    """Folder that relative audio paths of manifests start from (default: the folder of each manifest)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names of the manifests that differ, as pairs: OURS THEIRS."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the products: bfloat16 is faster where the processor has instructions for it; a cosine moves by up to 0.01."""


HELP = """\
Parquet has the columns path, text, origin and vector; NPY has its names in FILE.npy.jsonl. What cannot be used is
listed in FILE.skipped.jsonl and counted; the exit status is 0 all the same, and 2 if nothing can be used. An
interrupted call is continued by the same command. clips_per_second leaves out loading the model.

Examples:
  fastclap embed runs/demo recordings --out recordings.parquet
  fastclap embed runs/demo train.jsonl more.csv --audio-root /audio --out all.npy --json
  fastclap embed runs/demo captions.txt --out captions.parquet
"""


def run(flags: Flags) -> int:
    from fastclap.apps.embed import embed, gather

    items = gather(flags.inputs, audio_root=flags.audio_root, columns=flags.columns)
    (model,), loading = load_models(flags, [flags.model])
    with progress("embedding", "embedded", "inputs") as advance, writing(flags.out):
        summary = embed(
            model,
            items,
            flags.out,
            batch_size=flags.batch_size,
            threads=flags.threads,
            precision=flags.precision,
            advance=advance,
        )
    summary["time"]["loading_seconds"] = round(loading, 3)
    if summary["skipped"]:
        listing = f"{flags.out}.skipped.jsonl"
        note(f"{summary['skipped']} of {len(items)} inputs left out, see {listing}")
    if flags.json:
        show_json({"model": flags.model, "inputs": flags.inputs, **summary})
    else:
        show(
            f"{summary['clips']} clips, {summary['texts']} captions, {summary['dimension']} dimensions, "
            f"{summary['reused']} embedded before, {summary['time']['clips_per_second']:.1f} clips/s: {flags.out}"
        )
    return 0
