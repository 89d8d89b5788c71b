"""What several commands share: flags, loading of models and data, and what they print."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastclap.bounds import Range, Size
from fastclap.console import Table, note, show, show_json, writing
from fastclap.errors import ConfigError

if TYPE_CHECKING:
    from fastclap.data import Manifest
    from fastclap.models.clap import CLAP


Threads = Annotated[int, Range(1, 256)]
Workers = Annotated[int, Range(0, 256)]


@dataclass(kw_only=True)
class DataFlags:
    """Flags of commands that evaluate a model on manifests."""

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
    batch_size: Size = 32
    """Clips embedded at a time."""
    width: Size | None = None
    """Columns of the embeddings to use, from the first, for a model trained with --loss.matryoshka (default: all)."""


@dataclass(kw_only=True)
class ModelFlags:
    """Flags of commands that embed clips with one model or several."""

    json: bool = False
    """Print the whole result as JSON, and nothing else, on stdout."""
    device: str = "auto"
    """cuda, cuda:N, cpu, or auto (a GPU if there is one)."""
    batch_size: Size = 32
    """Clips embedded at a time."""
    threads: Threads = 4
    """Decoding threads."""


def load_model_and_data(flags: DataFlags, *, require_captions: bool) -> tuple[CLAP, Manifest]:
    from fastclap.data import load_manifest
    from fastclap.models.clap import CLAP

    if not flags.data:
        raise ConfigError("--data is empty: name at least one manifest")
    if flags.out is not None:
        Path(flags.out).mkdir(parents=True, exist_ok=True)  # an unusable folder is better found now than at the end
    device = _usable_device(flags.device)
    manifest = load_manifest(
        flags.data, audio_root=flags.audio_root, columns=flags.columns, require_captions=require_captions
    )
    model = CLAP.from_pretrained(flags.model, device=device)
    columns = model.config.head.dim
    if flags.width is not None and not 1 <= flags.width <= columns:
        raise ConfigError(f"--width is {flags.width}; the model's embeddings have 1 to {columns} columns to use")
    return model, manifest


def load_models(flags: ModelFlags, paths: Sequence[str]) -> tuple[list[CLAP], float]:
    """The models, and the seconds that reading them took."""
    device = _usable_device(flags.device)

    from fastclap.models.clap import CLAP

    start = time.perf_counter()
    return [CLAP.from_pretrained(path, device=device) for path in paths], time.perf_counter() - start


def _usable_device(name: str) -> str:
    """`name`, or for "auto" a GPU if there is one.

    Raises:
        ConfigError: torch cannot use the device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name


def print_evaluation(flags: DataFlags, result: Mapping[str, Any], tables: Sequence[Table]) -> None:
    """Print the result of `evaluate` as tables or JSON, with what was skipped, and write the report if asked for."""
    result = {"model": flags.model, "data": flags.data, **result}
    print_skipped(result["skipped"], "--json and --out list them")
    page = None
    if flags.out is not None:
        from fastclap.evaluation import write_report

        with writing(flags.out):
            page = write_report(flags.out, results=result)
    if flags.json:
        show_json(result)
        return
    seconds = result["time"]["seconds"]
    show(*tables, f"{result['clips']} clips, {len(result['skipped'])} skipped, {seconds:.1f} s")
    if page is not None:
        show(f"report: {page}")


def print_skipped(skipped: Sequence[Mapping[str, str]], where: str = "--json lists them") -> None:
    """The first skipped clips with their reasons, and how many more there are, on stderr."""
    for clip in skipped[:5]:
        note(f"skipped {clip['path']}: {clip['reason']}")
    if len(skipped) > 5:
        note(f"skipped {len(skipped) - 5} more clips ({where})")


def cpu_cores() -> int:
    """The CPU cores that this process may use, at most as many as `Workers` allows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 256)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"
