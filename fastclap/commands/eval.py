"""`fastclap eval`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastclap.console import make_table

if TYPE_CHECKING:
    from rich.table import Table

from fastclap.commands.shared import OnData, load_model_and_data, percent, present


@dataclass(kw_only=True)
class Eval(OnData):
    captions: Literal["global", "fine", "both"] = "global"
    """Captions to retrieve with: text_description, fine_description, or each in turn."""
    captions_per_clip: Literal["first", "all"] = "first"
    """Of a clip with several captions, use the first, or all (its rank is then that of its best-ranked one)."""


DESCRIPTION = """Retrieval in both directions: R@1, R@5, R@10, mAP@10, median and mean rank, each with its chance level.

Equal texts are one candidate; ties count against the model.

Examples:
  fastclap eval --model runs/demo --data valid.jsonl
  fastclap eval --model runs/demo --data valid.jsonl --captions both --out report
  fastclap eval --model runs/demo --data a.jsonl b.csv --audio-root /audio --json > figures.json
"""


def run(arguments: Eval) -> int:
    from fastclap.evaluation import evaluate

    names: Any = ["global", "fine"] if arguments.captions == "both" else [arguments.captions]
    model, manifest = load_model_and_data(arguments, require_captions=arguments.captions == "global")
    result = evaluate(
        model,
        manifest,
        captions=names,
        tasks=[],
        captions_per_clip=arguments.captions_per_clip,
        embedding_map=arguments.out is not None,
        batch_size=arguments.batch_size,
        progress=True,
    )
    return present(arguments, result, [_retrieval_table(result["retrieval"])])


def _retrieval_table(retrieval: Mapping[str, Any]) -> Table:
    table = make_table("Retrieval (chance in brackets)", "figure")
    columns = []
    for captions, both in retrieval.items():
        for direction, title in (("audio_to_text", "audio → text"), ("text_to_audio", "text → audio")):
            table.add_column(f"{captions}\n{title}", justify="right")
            columns.append(both[direction])
    for key in ("R@1", "R@5", "R@10", "mAP@10", "median_rank", "mean_rank"):
        show = "{:.1f}".format if key.endswith("rank") else percent
        name = key.replace("_", " ") if key.endswith("rank") else f"{key} %"
        table.add_row(name, *(f"{show(figures[key])} ({show(figures['chance'][key])})" for figures in columns))
    for key in ("queries", "candidates"):
        table.add_row(key, *(str(figures[key]) for figures in columns))
    return table
