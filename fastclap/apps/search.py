"""Exact nearest neighbours of a caption or a clip in an embedded collection.

One matrix product and a selection: a million vectors of dimension 768 take a fraction of a second on a CPU, and equal
cosines come in the order of the collection. faiss, where it is installed, computes the same product (`IndexFlatIP`),
with an order of its own for equal cosines.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastclap.apps.embed import Index
from fastclap.errors import ConfigError, DataError, ModelError


def search(index: Index, query: Tensor, k: int = 10, *, engine: Literal["torch", "faiss"] = "torch") -> list[Any]:
    """The `k` rows of highest cosine for each query, best first; all rows if there are fewer.

    Args:
        index: the collection, as `fastclap.apps.embed.load_index` reads it.
        query: unit vectors [q, D].
        k: how many rows to find.
        engine: what computes the product.

    Returns:
        For each query a list of {"rank": from 1, "score": cosine, "path" or "text", "origin"}.

    Raises:
        ConfigError: `k` is not a positive integer, or faiss is not installed.
        DataError: the dimensions of index and query differ, or a query is not finite.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ConfigError(f"-k is {k!r}; it must be at least 1")
    if not isinstance(query, Tensor) or query.ndim != 2 or not query.is_floating_point():
        shape = tuple(query.shape) if isinstance(query, Tensor) else type(query).__name__
        raise DataError(f"search takes queries as a tensor of unit vectors [q, D], not {shape}")
    if not query.isfinite().all():
        raise DataError("a query is not finite")
    if query.shape[1] != index.vectors.shape[1]:
        raise DataError(
            f"the index holds vectors of dimension {index.vectors.shape[1]}, the model makes {query.shape[1]}; embed "
            "the collection with this model"
        )
    k = min(k, len(index.names))
    query = query.detach().float().cpu()
    if engine == "faiss":
        try:
            import faiss
        except ImportError as error:
            raise ConfigError("--engine faiss: faiss is not installed (pip install faiss-cpu)") from error
        flat = faiss.IndexFlatIP(index.vectors.shape[1])
        flat.add(index.vectors.numpy())
        scores, rows = map(torch.from_numpy, flat.search(query.numpy(), k))
    else:
        scores, rows = _top_k(query @ index.vectors.T, k)
    return [
        [
            {"rank": rank, "score": score, **index.names[row]}
            for rank, (score, row) in enumerate(zip(best_scores, best_rows, strict=True), 1)
        ]
        for best_scores, best_rows in zip(scores.tolist(), rows.tolist(), strict=True)
    ]


def _top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, [q, k]; of equal ones the first columns, in order."""
    columns = []
    for row, least in zip(scores, scores.topk(k, dim=1).values[:, -1], strict=True):
        candidates = (row >= least).nonzero().flatten()  # topk itself takes any of the equal ones
        order = row[candidates].sort(descending=True, stable=True).indices[:k]
        columns.append(candidates[order])
    chosen = torch.stack(columns)
    return scores.gather(1, chosen), chosen


def check_same_model(index: Index, model: str, name: str) -> None:
    """Check the origin of an index, as far as it is known.

    Args:
        index: the collection.
        model: fingerprint of the model that embeds the queries.
        name: of the index, for the message.

    Raises:
        ModelError: fastclap wrote the index with another model.
    """
    if index.model is not None and index.model != model:
        raise ModelError(f"{name}: was embedded by another model; embed the collection again with this one")
