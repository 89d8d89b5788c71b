"""sentence-transformers' ranking losses (package `sentence_transformers`).

Replaced: in MultipleNegativesRankingLoss and CachedMultipleNegativesRankingLoss the step from embeddings to loss.
Left to the client: other similarities than cos_sim and dot_score, joint softmaxes over several directions, hardness
weights, and sparse embeddings.

The adapters, `fastclap.drop_in.MultipleNegativesRankingLoss` and the cached one, are subclasses of the client's classes
and need it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastclap.drop_in.shared import Client, Method, local_rows_loss, rows_of_all_ranks
from fastclap.losses import info_nce

RANKING_LOSSES = ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss")
_NORMALIZES = {"cos_sim": True, "pytorch_cos_sim": True, "dot_score": False}  # the similarities that can be fused


@functools.cache
def ranking_loss_class(name: str) -> type:
    """A subclass of the client's class of that name in which only the step from embeddings to loss is replaced."""
    owner = getattr(CLIENT.installed_modules()[0], name)
    ((target, maker),) = [item for item in CLIENT.methods.items() if item[0].startswith(f"{name}.")]
    method = target.split(".")[1]
    original = getattr(owner, method)
    replacement = functools.wraps(original)(maker(owner, original))
    return type(name, (owner,), {method: replacement, "__module__": "fastclap.drop_in", "__doc__": owner.__doc__})


def _compute_loss_from_embeddings(owner: type, original: Method) -> Method:
    def compute_loss_from_embeddings(self: Any, embeddings: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        loss = ranking_loss(self, embeddings)
        return original(self, embeddings, *args, **kwargs) if loss is None else loss

    return compute_loss_from_embeddings


def _calculate_loss(owner: type, original: Method) -> Method:
    def calculate_loss(
        self: Any, reps: list[list[Tensor]], *args: Any, with_backward: bool = False, **kwargs: Any
    ) -> Tensor:
        loss = ranking_loss(self, [torch.cat(chunks) for chunks in reps])
        if loss is None:
            return original(self, reps, *args, with_backward=with_backward, **kwargs)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    return calculate_loss


CLIENT = Client(
    "sentence_transformers",
    modules=("sentence_transformers.sentence_transformer.losses", "sentence_transformers.losses"),
    install="pip install sentence-transformers",
    methods={
        "MultipleNegativesRankingLoss.compute_loss_from_embeddings": _compute_loss_from_embeddings,
        "CachedMultipleNegativesRankingLoss.calculate_loss": _calculate_loss,
    },
)


def ranking_loss(options: Any, embeddings: Sequence[Tensor]) -> Tensor | None:
    """The client's loss of (queries, positives, negatives, ...), or None where the fused one cannot express it.

    As in the client, with gather_across_devices the loss is that of this rank's rows against those of all ranks.

    Args:
        options: the client's loss object, or anything with its attributes.
        embeddings: for each column of the data, a tensor [N, D].
    """
    similarity = options.similarity_fct
    normalize = _NORMALIZES.get(getattr(similarity, "__name__", ""))
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
    rank, columns = dist.get_rank(), torch.cat([rows_of_all_ranks(x) for x in (positives, *negatives)])
    loss = local_rows_loss(queries, columns, options.scale, rank, normalize=normalize)
    if not two_sided:
        return loss
    return (loss + local_rows_loss(positives, rows_of_all_ranks(queries), options.scale, rank, normalize=normalize)) / 2
