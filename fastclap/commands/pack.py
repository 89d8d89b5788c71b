"""`fastclap pack`: the clips of manifests to a packed folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from fastclap.bounds import Range
from fastclap.commands.shared import Workers, cpu_cores
from fastclap.console import note, progress, show, show_json, writing
from fastclap.errors import ConfigError


@dataclass(kw_only=True)
class Flags:
    manifests: Annotated[list[str], tyro.conf.Positional]
    """Manifests: .jsonl, .json, .csv, .tsv or .parquet files, saved `datasets` folders, packed folders, or
    hf:NAME[:SPLIT]."""
    out: str
    """Folder that receives the pack: new, or that of an interrupted call, which is continued."""
    audio_root: str | None = None
    """Folder that relative audio paths start from (default: the folder of each manifest)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names of the manifests that differ, as pairs: OURS THEIRS (for example text_description caption)."""
    sampling_rate: Annotated[int, Range(1000, 768000)] = 16000
    """Rate of the packed samples, in Hz: that of the model to train."""
    shard_mb: Annotated[float, Range(0, 1e6, without=(0,))] = 512
    """Size of a shard, in MB."""
    workers: Workers | None = None
    """Decoding processes, 0 for none (default: one for each CPU core)."""
    json: bool = False
    """Print the summary as JSON, and nothing else, on stdout."""


HELP = """\
Training and evaluation read it like any manifest (--data.train FOLDER), without decoding. Clips that cannot be used are
left out and listed in FOLDER/skipped.jsonl. An interrupted pack is continued by the same command.

Examples:
  fastclap pack train.jsonl --out packed/train
  fastclap pack a.jsonl b.csv --out packed/all --audio-root /audio --workers 16
  fastclap pack train.jsonl --out packed/train-48k --sampling-rate 48000 --json
"""


def run(flags: Flags) -> int:
    from fastclap.data import load_manifest
    from fastclap.data.pack import pack

    if not flags.manifests:
        raise ConfigError("name at least one manifest to pack")
    manifest = load_manifest(
        flags.manifests, audio_root=flags.audio_root, columns=flags.columns, require_captions=False
    )
    with progress("packing", "packed", "clips") as advance, writing(flags.out):
        summary = pack(
            manifest,
            flags.out,
            sampling_rate=flags.sampling_rate,
            shard_mb=flags.shard_mb,
            workers=cpu_cores() if flags.workers is None else flags.workers,
            advance=advance,
        )
    if summary["skipped"]:
        note(f"{summary['skipped']} rows left out, see {flags.out}/skipped.jsonl")
    if flags.json:
        show_json(summary)
    else:
        show(
            f"{summary['rows']} rows, {summary['clips']} clips, {summary['hours']:.2f} h, "
            f"{summary['bytes'] / 1e6:.1f} MB in {summary['shards']} shards: {flags.out}"
        )
    return 0
