"""`fastclap eval`: retrieval between the clips and the captions of a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastclap.commands.shared import DataFlags, load_model_and_data, percent, print_evaluation
from fastclap.console import Table


@dataclass(kw_only=True)
class Flags(DataFlags):
    captions: Literal["global", "fine", "both"] = "global"
    """Captions to retrieve with: text_description, fine_description, or each in turn."""
    captions_per_clip: Literal["first", "last", "all"] = "first"
    """Which captions of a clip to use: the first or the last, or all (its rank is then that of its best-ranked one)."""


HELP = """\
Equal texts are one candidate; ties count against the model.

Examples:
  fastclap eval --model runs/demo --data valid.jsonl
  fastclap eval --model runs/demo --data valid.jsonl --captions both --out report
  fastclap eval --model runs/demo --data fcaps-test.jsonl --captions fine --captions-per-clip last
  fastclap eval --model runs/demo --data a.jsonl b.csv --audio-root /audio --json > figures.json
"""


def run(flags: Flags) -> int:
    from fastclap.evaluation import evaluate

    names: Any = ["global", "fine"] if flags.captions == "both" else [flags.captions]
    model, manifest = load_model_and_data(flags, require_captions=flags.captions == "global")
    result = evaluate(
        model,
        manifest,
        captions=names,
        tasks=[],
        captions_per_clip=flags.captions_per_clip,
        embedding_map=flags.out is not None,
        width=flags.width,
        batch_size=flags.batch_size,
        progress=True,
    )
    print_evaluation(flags, result, [_retrieval_table(result["retrieval"])])
    return 0


def _retrieval_table(retrieval: Mapping[str, Any]) -> Table:
    directions = {"audio_to_text": "audio → text", "text_to_audio": "text → audio"}
    columns = {
        f"{captions}\n{title}": both[direction]
        for captions, both in retrieval.items()
        for direction, title in directions.items()
    }
    table = Table("Retrieval (chance in brackets)", {"figure": "left", **dict.fromkeys(columns, "right")})
    for key in ("R@1", "R@5", "R@10", "mAP@10", "median_rank", "mean_rank"):
        show = "{:.1f}".format if key.endswith("rank") else percent
        name = key.replace("_", " ") if key.endswith("rank") else f"{key} %"
        cells = (f"{show(figures[key])} ({show(figures['chance'][key])})" for figures in columns.values())
        table.rows.append((name, *cells))
    for key in ("queries", "candidates"):
        table.rows.append((key, *(figures[key] for figures in columns.values())))
    return table
