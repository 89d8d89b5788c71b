"""`fastclap classify`: zero-shot classification of the clips of a manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastclap.commands.shared import DataFlags, load_model_and_data, percent, print_evaluation
from fastclap.console import Table, note
from fastclap.errors import DataError
from fastclap.prompts import DEFAULT_TEMPLATE, PROMPT_SETS, PromptSet, load_prompts


@dataclass(kw_only=True)
class Flags(DataFlags):
    column: str = "classification_tag"
    """Manifest column that holds the true class."""
    template: list[str] = field(default_factory=lambda: [DEFAULT_TEMPLATE])
    """Prompts of every class, averaged: {} is the class name, {a} or {A} its article (a or an)."""
    prompts: str | None = None
    """Prompts instead of the template: a JSON file with {"class": ["prompt", ...]}, or one such mapping for each
    column; or a published set by name: paraspeechclap-pitch, -texture, -volume, -clarity, -rhythm or -situational,
    clsp-emotion, -emotion-iemocap, -gender or -age."""
    classes: list[str] | None = None
    """Candidate classes (default: those of the prompts file, else all values of the column)."""


HELP = """\
A clip gets the class whose prompt is nearest to it.

Examples:
  fastclap classify --model runs/demo --data test.jsonl
  fastclap classify --model runs/demo --data test.jsonl --column sex --template "{A} {} speaker."
  fastclap classify --model runs/demo --data test.jsonl --template "A man sounds {}." "A woman sounds {}."
  fastclap classify --model runs/demo --data test.jsonl --prompts emotions.json --out report
  fastclap classify --model runs/demo --data test.jsonl --prompts paraspeechclap-situational
  fastclap classify --model runs/demo --data test.jsonl --column sex --prompts clsp-gender
  fastclap classify --model runs/demo --data iemocap.jsonl --column emotion --prompts clsp-emotion-iemocap
  fastclap classify --model runs/demo --data test.jsonl --column intrinsic_tags --classes shrill nasal deep
"""


def run(flags: Flags) -> int:
    templates, prompts, classes, published = flags.template, None, flags.classes, PromptSet(None)
    if flags.prompts in PROMPT_SETS:
        published = PROMPT_SETS[flags.prompts]
        templates, prompts = [published.template or DEFAULT_TEMPLATE], published.prompts
        classes = classes or (None if published.classes is None else list(published.classes))
    elif flags.prompts:
        prompts = load_prompts(flags.prompts, flags.column)
        if not prompts:
            raise DataError(f"{flags.prompts}: no prompts for the column {flags.column!r}")

    from fastclap.evaluation import ClassificationTask, evaluate

    task = ClassificationTask(flags.column, templates, prompts, classes, published.words, published.merged)
    model, manifest = load_model_and_data(flags, require_captions=False)
    result = evaluate(
        model,
        manifest,
        captions=[],
        tasks=[task],
        embedding_map=flags.out is not None,
        width=flags.width,
        batch_size=flags.batch_size,
        progress=True,
    )
    figures = result["classification"][flags.column]
    notes = {
        "clips_without_class": "clips have none of the classes and were left out",
        "clips_with_several": "clips have several of the classes and were left out",
    }
    for key, text in notes.items():
        if figures[key]:
            note(f"{figures[key]} {text}")
    for name, other in figures.get("merged", {}).items():
        note(f"{name} counts as {other} once the nearest prompt is found")
    unused = [row["class"] for row in figures["per_class"] if not row["clips"]]
    if unused:
        note(f"no clip has the class {', '.join(unused)}; it counts in macro-F1, not in UAR")
    print_evaluation(flags, result, _classification_tables(flags.column, figures))
    return 0


def _classification_tables(column: str, figures: Mapping[str, Any]) -> list[Table]:
    heads = ("clips", "given", "recall %", "precision %", "F1 %")
    per_class = Table(f"{column}, class by class", {"class": "left", **dict.fromkeys(heads, "right")})
    for row in figures["per_class"]:
        recall = "–" if row["recall"] is None else percent(row["recall"])
        cells = (row["clips"], row["given"], recall, percent(row["precision"]), percent(row["f1"]))
        per_class.rows.append((row["class"], *cells))
    title = f"Zero-shot {column}: {figures['clips']} clips, {len(figures['classes'])} classes"
    majority = f"always the most frequent class: {percent(figures['majority_accuracy'])}"
    rows: list[Sequence[str]] = [
        ("accuracy (WA)", percent(figures["accuracy"]), majority),
        ("UAR (UA)", percent(figures["uar"]), f"chance: {percent(figures['chance'])}"),
        ("macro-F1", percent(figures["macro_f1"]), ""),
    ]
    return [per_class, Table(title, {"figure": "left", "%": "right", "to compare": "left"}, rows)]
