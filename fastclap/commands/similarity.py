"""`fastclap similarity`: the style similarity of pairs of clips."""

from __future__ import annotations

import csv
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastclap.commands.shared import ModelFlags, load_models, print_skipped
from fastclap.console import Table, progress, show, show_json, writing
from fastclap.errors import ConfigError, DataError

_LISTED = 20  # pairs up to which each cosine is printed


@dataclass(kw_only=True)
class Flags(ModelFlags):
    model: Annotated[str, tyro.conf.Positional]
    """Exported model folder, run folder (its newest checkpoint) or Hugging Face hub id."""
    pairs: Annotated[str, tyro.conf.Positional]
    """Table (.csv, .tsv, .jsonl, .json or .parquet) with the columns `audio` and either `other_audio` or `text`."""
    rating_column: str | None = None
    """Column of human ratings to correlate the cosines with (default: `rating`, if there is one)."""
    ratings: str | None = None
    """Another table that holds the rating column, line by line as PAIRS."""
    out: str | None = None
    """CSV file for the pairs with their cosines."""
    audio_root: str | None = None
    """Folder that relative audio paths start from (default: the table's)."""


HELP = """\
Pearson's r and Spearman's rho have 95 % confidence intervals (Fisher). Pairs whose audio cannot be used are listed and
left out.

Examples:
  fastclap similarity runs/demo pairs.csv
  fastclap similarity runs/demo pairs.csv --rating-column mos --out scored.csv
  fastclap similarity runs/demo pairs.csv --ratings ratings.csv --json
"""


def run(flags: Flags) -> int:
    from fastclap.apps.scoring import agreement
    from fastclap.apps.similarity import read_pairs, score_pairs

    if flags.out is not None and not flags.out.endswith(".csv"):
        raise ConfigError(f"--out {flags.out}: name a .csv file")
    pairs = read_pairs(
        flags.pairs,
        audio_root=flags.audio_root,
        rating_column=flags.rating_column,
        ratings=flags.ratings,
    )
    (model,), loading = load_models(flags, [flags.model])
    start = time.perf_counter()
    with progress("embedding", "embedded", "clips") as advance:
        scores, skipped = score_pairs(model, pairs, batch_size=flags.batch_size, threads=flags.threads, advance=advance)
    seconds = time.perf_counter() - start
    print_skipped(skipped)
    kept = [(score, pair.rating) for score, pair in zip(scores, pairs, strict=True) if score is not None]
    rated = [(score, rating) for score, rating in kept if rating is not None]
    found: dict[str, Any] | None = None
    missing = "no pair has a rating"
    try:
        found = agreement([score for score, _ in rated], [rating for _, rating in rated]) if rated else None
    except DataError as error:  # too few, or all alike: the cosines are worth having all the same
        missing = str(error)
    result = {
        "model": flags.model,
        "pairs": len(pairs),
        "scored": len(kept),
        "skipped": skipped,
        "mean_cosine": sum(score for score, _ in kept) / len(kept),
        "agreement": found,
        "no_agreement": None if found else missing,
        "scores": scores,
        "time": {"loading_seconds": round(loading, 3), "seconds": round(seconds, 3)},
    }
    if flags.out is not None:
        from fastclap.files import write_atomic

        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow(("audio", "other_audio", "text", "rating", "cosine"))
        for pair, score in zip(pairs, scores, strict=True):
            writer.writerow(["" if value is None else value for value in (*pair.named, pair.rating, score)])
        with writing(flags.out):
            write_atomic(Path(flags.out), buffer.getvalue().encode(errors="backslashreplace"))
    if flags.json:
        show_json(result)
        return 0
    if len(pairs) <= _LISTED:
        cosines = Table("Pairs", {"cosine": "right", "rating": "right", "clip": "whole", "other": "whole"})
        for pair, score in zip(pairs, scores, strict=True):
            audio, *others = pair.named
            other = next(name for name in others if name is not None)
            rating = "–" if pair.rating is None else f"{pair.rating:g}"
            cosines.rows.append(("–" if score is None else f"{score:.3f}", rating, audio, other))
        show(cosines)
    table = Table(
        f"Style similarity of {len(kept)} pairs", {"figure": "left", "value": "right", "95 % interval": "left"}
    )
    table.rows.append(("mean cosine", f"{result['mean_cosine']:.3f}", ""))
    for name, title in (("pearson", "Pearson's r"), ("spearman", "Spearman's rho")) if found else ():
        figures = found[name] if found else {}
        table.rows.append((title, f"{figures['value']:.3f}", f"{figures['low']:.3f} to {figures['high']:.3f}"))
    show(table)
    if found is None and rated:
        show(f"no correlation with the ratings: {missing}")
    show(
        f"{len(pairs)} pairs, {len(pairs) - len(kept)} skipped, {seconds:.1f} s"
        + (f": {flags.out}" if flags.out else "")
    )
    return 0
