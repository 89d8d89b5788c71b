"""`fastclap rerank`: the best of several synthesised clips."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from fastclap.bounds import Count, Positive, Size
from fastclap.commands.shared import ModelFlags, load_models, print_skipped
from fastclap.console import Table, progress, show, show_json, writing
from fastclap.errors import ConfigError


@dataclass(kw_only=True)
class Flags(ModelFlags):
    models: Annotated[list[str], tyro.conf.Positional]
    """One model or several, whose cosines are averaged: exported or run folders, or Hugging Face hub ids."""
    data: str
    """Folder with iter_1, iter_2, ..., each with audios/0.wav, 1.wav, ...; or a table with the columns id, text and
    audio."""
    out: str | None = None
    """New folder for the selected clips and selection_summary.json (default: only the figures are printed)."""
    weights: list[Positive] | None = None
    """Weight of each model in the mean (default: equal)."""
    top_k: Size = 1
    """How many candidates of each item to select; the second best go to OUT/rank_2/audios, and so on."""
    iterations: Count | None = None
    """Folders iter_1 to iter_N that must be there (default: up to the last one found)."""
    prompts: list[str] = field(default_factory=list)
    """Files with one description a line, instead of iter_1/input_descriptions.txt; of several files the cosines are
    averaged. In a table a cell of `text` may hold a JSON list instead."""
    audio_root: str | None = None
    """Folder that relative paths of a table start from (default: the table's)."""
    unequal: bool = False
    """Accept a table whose items have different numbers of candidates."""


HELP = """\
A candidate that cannot be decoded or is silent is listed and never selected. OUT appears only when it is complete.

Examples:
  fastclap rerank runs/demo --data tts_outputs --out tts_outputs/best
  fastclap rerank intrinsic situational --weights 2 1 --data tts_outputs --out best --top-k 3
  fastclap rerank runs/demo --data tts_outputs --prompts speaker.txt style.txt --out best
  fastclap rerank runs/demo --data candidates.csv --json > selection.json
"""


def run(flags: Flags) -> int:
    if not flags.models:
        raise ConfigError("name at least one model")
    is_folder = Path(flags.data).is_dir()
    for_folders = {"--iterations": flags.iterations is not None, "--prompts": bool(flags.prompts)}
    for_tables = {"--audio-root": flags.audio_root is not None, "--unequal": flags.unequal}
    for flag, given in (for_tables if is_folder else for_folders).items():
        if given:
            raise ConfigError(f"{flag} has no meaning for {'a folder of iterations' if is_folder else 'a table'}")
    from fastclap.apps.rerank import check_free, read_iterations, read_table, rerank, write_selection
    from fastclap.apps.scoring import normalized_weights

    normalized_weights(len(flags.models), flags.weights)  # before anything slow
    if flags.out is not None:
        check_free(flags.out)
    candidates = (
        read_iterations(flags.data, iterations=flags.iterations, prompts=flags.prompts)
        if is_folder
        else read_table(flags.data, audio_root=flags.audio_root, unequal=flags.unequal)
    )
    models, loading = load_models(flags, flags.models)
    start = time.perf_counter()
    with progress("scoring", "scored", "clips") as advance:
        result = rerank(
            models,
            candidates,
            weights=flags.weights,
            top_k=flags.top_k,
            batch_size=flags.batch_size,
            threads=flags.threads,
            advance=advance,
        )
    seconds = time.perf_counter() - start
    print_skipped(result["skipped"])
    if flags.out is not None:
        with writing(flags.out):
            write_selection(candidates, result, flags.out)
    result = {"models": flags.models, "data": flags.data, "out": flags.out, **result}
    result["time"] = {
        "loading_seconds": round(loading, 3),
        "seconds": round(seconds, 3),
        "clips_per_second": round(result["candidates"] * len(models) / seconds, 2),
    }
    if flags.json:
        show_json(result)
        return 0
    table = Table(
        f"Best of {len(candidates.items[0].paths)}",
        {"item": "left", "best": "whole", "cosine": "right", "mean of all": "right", "description": "whole"},
    )
    for item, entry in zip(candidates.items, result["selection"], strict=True):
        scores = [score for score in entry["all_scores"].values() if score is not None]
        label = entry.get("best_audio", f"iter_{entry.get('best_iteration_idx')}")
        mean = sum(scores) / len(scores)
        prompts = " | ".join(item.prompts)
        table.rows.append((item.id, label, f"{entry['best_score']:.3f}", f"{mean:.3f}", prompts))
    show(table, f"{result['candidates']} clips in {seconds:.1f} s" + (f": {flags.out}" if flags.out else ""))
    return 0
