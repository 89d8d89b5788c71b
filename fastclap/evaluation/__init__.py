"""How good a model is: retrieval in both directions, zero-shot classification, and a page that shows it."""

from __future__ import annotations

from fastclap.evaluation.evaluate import (
    ClassificationTask,
    caption_sets,
    evaluate,
    evaluate_classification,
    evaluate_retrieval,
)
from fastclap.evaluation.metrics import classification, prompt_ensemble, retrieval, unique_texts
from fastclap.evaluation.report import write_report

__all__ = [
    "ClassificationTask",
    "caption_sets",
    "classification",
    "evaluate",
    "evaluate_classification",
    "evaluate_retrieval",
    "prompt_ensemble",
    "retrieval",
    "unique_texts",
    "write_report",
]
