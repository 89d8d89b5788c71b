"""What the commands share: their common flags, loading, tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastclap.console import pick_device, print_json
from fastclap.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from fastclap.data import Manifest
    from fastclap.models.clap import CLAP


@dataclass(kw_only=True)
class OnData:
    model: str
    """Exported model folder, run folder (its newest checkpoint) or Hugging Face hub id."""
    data: list[str]
    """Manifests: .jsonl, .json, .csv, .tsv or .parquet files, saved `datasets` folders, or hf:NAME[:SPLIT]."""
    audio_root: str | None = None
    """Folder that relative audio paths start from (default: the folder of each manifest)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names of the manifests that differ, as pairs: OURS THEIRS (for example text_description caption)."""
    out: str | None = None
    """Folder that receives report.html, its pictures (recall curves, confusion matrix, map of the embeddings) and
    report.json."""
    json: bool = False
    """Print the whole result as JSON, and nothing else, on stdout."""
    device: str = "auto"
    """cuda, cuda:N, cpu, or auto (a GPU if there is one)."""
    batch_size: int = 32
    """Clips embedded at a time."""


def load_model_and_data(arguments: OnData, *, require_captions: bool) -> tuple[CLAP, Manifest]:
    from fastclap.data import load_manifest
    from fastclap.models.clap import CLAP

    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size is {arguments.batch_size}; it must be at least 1")
    if not arguments.data:
        raise ConfigError("--data is empty: name at least one manifest")
    if arguments.out is not None:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)  # an unusable folder is better found now than at the end
    device = pick_device(arguments.device)
    manifest = load_manifest(
        arguments.data,
        audio_root=arguments.audio_root,
        columns=arguments.columns,
        require_captions=require_captions,
    )
    return CLAP.from_pretrained(arguments.model, device=device), manifest


def present(arguments: OnData, result: Mapping[str, Any], tables: Sequence[Table]) -> int:
    result = {"model": arguments.model, "data": arguments.data, **result}
    skipped = result["skipped"]
    for clip in skipped[:5]:
        print(f"fastclap: skipped {clip['path']}: {clip['reason']}", file=sys.stderr)
    if len(skipped) > 5:
        print(f"fastclap: skipped {len(skipped) - 5} more clips (--json and --out list them)", file=sys.stderr)
    page = None
    if arguments.out is not None:
        from fastclap.evaluation import write_report

        page = write_report(arguments.out, results=result)
    if arguments.json:
        print_json(result)
        return 0
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(table)
    seconds = result["time"]["seconds"]
    console.print(f"{result['clips']} clips, {len(skipped)} skipped, {seconds:.1f} s", highlight=False)
    if page is not None:
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 0


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


@dataclass(kw_only=True)
class OnModel:
    json: bool = False
    """Print the whole result as JSON, and nothing else, on stdout."""
    device: str = "auto"
    """cuda, cuda:N, cpu, or auto (a GPU if there is one)."""
    batch_size: int = 32
    """Clips embedded at a time."""
    threads: int = 4
    """Decoding threads."""


def load_models(arguments: OnModel, paths: Sequence[str]) -> tuple[list[CLAP], float]:
    """The models, and the seconds that reading them took."""
    if arguments.batch_size < 1 or arguments.threads < 1:
        raise ConfigError(
            f"--batch-size is {arguments.batch_size} and --threads {arguments.threads}; both must be at least 1"
        )
    device = pick_device(arguments.device)

    from fastclap.models.clap import CLAP

    start = time.perf_counter()
    return [CLAP.from_pretrained(path, device=device) for path in paths], time.perf_counter() - start


def print_table(table: Any, note: str) -> None:
    from rich.console import Console

    console = Console()
    console.print(table)
    console.print(plain(note), highlight=False, soft_wrap=True)


def plain(text: str) -> str:
    """Text that rich takes literally."""
    from rich.markup import escape

    return escape(text)
