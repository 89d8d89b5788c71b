"""The drop-in for sentence_transformers; see `fastclap.drop_in`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastclap.drop_in.shared import (
    FUSED_SIMILARITIES,
    Method,
    _gather,
)
from fastclap.losses import info_nce


def _ranking_loss_from_embeddings(owner: type, original: Method) -> Method:
    def compute_loss_from_embeddings(self: Any, embeddings: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        loss = _ranking_loss(self, embeddings)
        return original(self, embeddings, *args, **kwargs) if loss is None else loss

    return compute_loss_from_embeddings


def _cached_ranking_loss(owner: type, original: Method) -> Method:
    def calculate_loss(
        self: Any, reps: list[list[Tensor]], *args: Any, with_backward: bool = False, **kwargs: Any
    ) -> Tensor:
        loss = _ranking_loss(self, [torch.cat(chunks) for chunks in reps])
        if loss is None:
            return original(self, reps, *args, with_backward=with_backward, **kwargs)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    return calculate_loss


def _ranking_loss(options: Any, embeddings: Sequence[Tensor]) -> Tensor | None:
    """sentence-transformers' loss of (queries, positives, negatives, ...), or None where the fused one cannot say it.

    As there, with gather_across_devices the loss is that of this rank's rows against those of all ranks.
    """
    similarity = options.similarity_fct
    normalize = FUSED_SIMILARITIES.get(getattr(similarity, "__name__", ""))
    if normalize is None or getattr(similarity, "__module__", "").split(".")[0] != "sentence_transformers":
        return None
    directions = set(getattr(options, "directions", ("query_to_doc",)))
    two_sided = directions == {"query_to_doc", "doc_to_query"} and options.partition_mode == "per_direction"
    if not two_sided and directions != {"query_to_doc"}:
        return None
    if getattr(options, "hardness_mode", None) is not None and options.hardness_strength > 0:
        return None
    dense = all(x.layout == torch.strided and x.dim() == 2 and x.is_floating_point() for x in embeddings)
    if len(embeddings) < 2 or not dense or len({x.shape[0] for x in embeddings}) > 1:
        return None
    queries, positives, *negatives = embeddings
    distributed = options.gather_across_devices and dist.is_available() and dist.is_initialized()
    if not distributed:
        direction = "both" if two_sided else "a_to_b"
        return info_nce(
            queries, torch.cat([positives, *negatives]), options.scale, normalize=normalize, direction=direction
        )
    rows = queries.shape[0]
    own = torch.arange(rows) + dist.get_rank() * rows

    def one_sided(local: Tensor, columns: Tensor) -> Tensor:
        return info_nce(
            local, columns, options.scale, a_ids=own, b_ids=torch.arange(columns.shape[0]),
            normalize=normalize, direction="a_to_b",
        )  # fmt: skip

    loss = one_sided(queries, torch.cat([_gather(x) for x in (positives, *negatives)]))
    return (loss + one_sided(positives, _gather(queries))) / 2 if two_sided else loss
