"""The fused losses inside other people's code: one line switches a client's own loss over, and back.

``patch("open_clip")`` replaces the method that computes the loss on the client's class itself. So every name under
which the class is known, in the client's modules or in the caller's, every subclass that builds on it and every
instance, built before or after, gets the fused loss; ``isinstance`` checks, constructors and attributes stay the
client's. (A bound method that was stored before the patch stays what it was; MatryoshkaLoss stores that of a cached
loss, so patch first.) What the fused loss cannot express goes to the client's own method, so a patch never changes
what a configuration means, only what it costs.

The adapter classes have the same signatures and stand on their own, without the client. They raise
NotImplementedError for what they cannot express.

=======================  ==========================================  ================================================
client                   replaced                                    left to the client
=======================  ==========================================  ================================================
open_clip                ClipLoss.forward, SigLipLoss.forward        subclasses with their own logits or labels
                         (so CoCaLoss too)                           (DistillClipLoss), Horovod
laion_clap               ClipLoss.forward                            weight_loss_kappa, use_horovod
paraspeechclap           ClipLoss.forward (so MultiTaskLoss too)
transformers             ClapModel.forward with return_loss=True
sentence_transformers    MultipleNegativesRankingLoss and            other similarities than cos_sim and dot_score,
                         CachedMultipleNegativesRankingLoss, the     joint softmaxes over several directions,
                         step from embeddings to loss                hardness weights, sparse embeddings
grad_cache               SimpleContrastiveLoss.__call__,             reduction="none", targets that are probabilities
                         DistributedContrastiveLoss.__call__
=======================  ==========================================  ================================================

Values and gradients are the client's on every rank, its distributed conventions included, with one exception: for
SigLipLoss in a distributed run each rank gets the loss, and the gradient of scale and bias, of the whole batch, where
open_clip gives each rank its own part. Their averages over the ranks, all that training sees, are equal. Losses
are float32 even where the client would return half precision.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastclap.losses import ClipLoss, SigLipLoss, info_nce

IGNORED_TARGET = -100  # as torch.nn.functional.cross_entropy's ignore_index
FUSED_SIMILARITIES = {"cos_sim": True, "pytorch_cos_sim": True, "dot_score": False}  # whether it normalises

Method = Callable[..., Any]


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


class OpenClipLoss(ClipLoss):
    """`fastclap.ClipLoss` with what open_clip's subclasses build on: ``get_logits`` and ``get_ground_truth``.

    A subclass that calls them gets the whole matrix of logits, and one that overrides them decides the loss.
    """

    def get_logits(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (M, D)
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits per image and per text, of all ranks or, with local_loss, of this rank's rows."""
        images, texts = self._of_all_ranks(image_features), self._of_all_ranks(text_features)
        if not (self.local_loss and self.world_size > 1):
            image_features, text_features = images, texts
        bias = 0.0 if logit_bias is None else logit_bias
        return logit_scale * image_features @ texts.T + bias, logit_scale * text_features @ images.T + bias

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The column of each row's positive."""
        first = num_logits * self.rank if self.local_loss and self.world_size > 1 else 0
        return torch.arange(first, first + num_logits, device=device)

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (M, D)
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        **options: Any,
    ) -> Tensor | dict[str, Tensor]:
        """As `fastclap.ClipLoss.forward`."""
        if not _overrides(self, OpenClipLoss, "get_logits", "get_ground_truth"):
            return super().forward(
                image_features, text_features, logit_scale, logit_bias=logit_bias, output_dict=output_dict, **options
            )
        per_image, per_text = self.get_logits(image_features, text_features, logit_scale, logit_bias=logit_bias)
        labels = self.get_ground_truth(image_features.device, per_image.shape[0])
        loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        return {"contrastive_loss": loss} if output_dict else loss

    def _of_all_ranks(self, features: Tensor) -> Tensor:
        if self.world_size == 1:
            return features
        if self.gather_with_grad:
            return _gather(features)
        parts = [torch.empty_like(features) for _ in range(self.world_size)]
        dist.all_gather(parts, features.detach().contiguous())
        if not self.local_loss:
            parts[self.rank] = features
        return torch.cat(parts)


OpenClipSigLipLoss = SigLipLoss


class LaionClapLoss(nn.Module):
    """LAION-CLAP's ``ClipLoss``: open_clip's, or with ``mlp_loss`` the mean of two of them.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size: as in `fastclap.ClipLoss`.
        mlp_loss: compare audio with the text's MLP features at logit_scale_a, and text with the audio's at
            logit_scale_t.
        use_horovod, weight_loss_kappa: only their defaults are supported.

    Raises:
        NotImplementedError: use_horovod or weight_loss_kappa is set.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        mlp_loss: bool = False,
        weight_loss_kappa: float = 0,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise NotImplementedError("use_horovod is not supported; run under torch.distributed (torchrun)")
        if weight_loss_kappa != 0:
            raise NotImplementedError(
                f"weight_loss_kappa={weight_loss_kappa} weights each row of the loss, which the fused loss does not; "
                "set it to 0, or keep LAION-CLAP's own class (drop_in.patch('laion_clap') leaves this case to it)"
            )
        self.mlp_loss = mlp_loss
        self.loss = ClipLoss(local_loss, gather_with_grad, cache_labels, rank, world_size)

    def forward(
        self,
        audio_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        logit_scale_a: float | Tensor,
        logit_scale_t: float | Tensor | None = None,
        audio_features_mlp: Tensor | None = None,  # (N, D)
        text_features_mlp: Tensor | None = None,  # (N, D)
    ) -> Tensor:
        """The loss of features that are already normalised; 0-d, float32 (float64 for float64 features)."""
        if not self.mlp_loss:
            return self.loss(audio_features, text_features, logit_scale_a)
        if logit_scale_t is None or audio_features_mlp is None or text_features_mlp is None:
            raise ValueError("mlp_loss=True needs logit_scale_t, audio_features_mlp and text_features_mlp")
        of_audio = self.loss(audio_features, text_features_mlp, logit_scale_a)
        return (of_audio + self.loss(audio_features_mlp, text_features, logit_scale_t)) / 2


class ParaSpeechClipLoss(nn.Module):
    """ParaSpeechCLAP's ``ClipLoss``: text first, normalises inside, each rank on its own batch."""

    def forward(
        self,
        text_features: Tensor,  # (N, D)
        audio_features: Tensor,  # (N, D)
        logit_scale: float | Tensor,
    ) -> Tensor:
        """0-d, float32 (float64 for float64 features)."""
        if text_features.shape[0] != audio_features.shape[0]:
            raise ValueError(f"{text_features.shape[0]} texts for {audio_features.shape[0]} clips; they must be equal")
        return info_nce(audio_features, text_features, logit_scale)


class ParaSpeechMultiTaskLoss(nn.Module):
    """ParaSpeechCLAP's ``MultiTaskLoss``: `ParaSpeechClipLoss` plus a multi-label loss over tags.

    A clip's logit for a tag is the cosine of their embeddings; the binary cross-entropy is averaged over tags and
    over the clips that have any, then over the heads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.contrastive_loss = ParaSpeechClipLoss()

    def forward(
        self,
        text_features: Tensor,  # (N, D)
        audio_features: Tensor,  # (N, D)
        logit_scale: float | Tensor,
        tag_embeddings: Tensor | None = None,  # (T, D)
        rich_tags_batch: Sequence[Sequence[str] | None] | None = None,
        tag_to_idx: Mapping[str, int] | None = None,
        classification_heads: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, Tensor]:
        """total_loss, contrastive_loss and classification_loss.

        Args:
            tag_embeddings, rich_tags_batch, tag_to_idx: one head: its tags' embeddings, each clip's tags, and the
                row of each tag.
            classification_heads: several heads, each a mapping with those three keys; takes precedence.
        """
        contrastive = self.contrastive_loss(text_features, audio_features, logit_scale)
        heads = list(classification_heads or [])
        if not heads and tag_embeddings is not None and rich_tags_batch is not None and tag_to_idx is not None:
            heads = [{"tag_embeddings": tag_embeddings, "rich_tags_batch": rich_tags_batch, "tag_to_idx": tag_to_idx}]
        classification = audio_features.new_zeros(())
        if heads:
            losses = [
                _tag_loss(audio_features, head["tag_embeddings"], head["rich_tags_batch"], head["tag_to_idx"])
                for head in heads
            ]
            classification = torch.stack(losses).mean()
        return {
            "total_loss": contrastive + classification,
            "contrastive_loss": contrastive,
            "classification_loss": classification,
        }


def _tag_loss(
    audio: Tensor,  # (N, D)
    tags: Tensor,  # (T, D)
    tags_of_clips: Sequence[Sequence[str] | None],
    row_of_tag: Mapping[str, int],
) -> Tensor:
    tagged = [clip for clip, own in enumerate(tags_of_clips) if own]
    if not tagged:
        return audio.new_zeros(())
    targets = torch.zeros(len(tagged), tags.shape[0], dtype=audio.dtype)
    for row, clip in enumerate(tagged):
        for tag in tags_of_clips[clip] or ():
            if tag not in row_of_tag:
                raise ValueError(f"tag {tag!r} of clip {clip} is not in tag_to_idx")
            targets[row, row_of_tag[tag]] = 1
    cosines = F.normalize(audio[tagged], dim=1) @ F.normalize(tags, dim=1).T
    return F.binary_cross_entropy_with_logits(cosines, targets.to(cosines))


class ClapModelLoss(nn.Module):
    """The loss of transformers' ``ClapModel(return_loss=True)`` from its embeddings and its two scales.

    Both of transformers' terms are text→audio, one at each scale: no audio ever chooses among texts.

    Args:
        corrected: make the audio scale's term audio→text, as in CLIP and LAION-CLAP.
    """

    def __init__(self, corrected: bool = False) -> None:
        super().__init__()
        self.corrected = corrected

    def forward(
        self,
        audio_embeds: Tensor,  # (N, D)
        text_embeds: Tensor,  # (N, D)
        logit_scale_a: float | Tensor,
        logit_scale_t: float | Tensor,
    ) -> Tensor:
        """0-d, from embeddings that are already normalised and scales that are already exponentiated."""
        pair = (audio_embeds, text_embeds) if self.corrected else (text_embeds, audio_embeds)
        of_text = info_nce(text_embeds, audio_embeds, logit_scale_t, normalize=False, direction="a_to_b")
        return (of_text + info_nce(*pair, logit_scale_a, normalize=False, direction="a_to_b")) / 2


class GradCacheLoss:
    """GradCache's ``SimpleContrastiveLoss``, for ``GradCache(models, chunk_sizes, loss_fn=GradCacheLoss())``.

    The logits are plain dot products, and the loss is one-sided, from x to y.

    Args:
        n_hard_negatives: y holds for each row of x its positive followed by so many negatives.
    """

    def __init__(self, n_hard_negatives: int = 0) -> None:
        self.target_per_qry = n_hard_negatives + 1

    def __call__(
        self,
        x: Tensor,  # (N, D)
        y: Tensor,  # (M, D)
        target: Tensor | None = None,  # (N,)
        reduction: str = "mean",
    ) -> Tensor:
        """0-d. ``target`` is the row of y that belongs to each row of x, -100 to leave a row out.

        Raises:
            ValueError: sizes or targets do not fit.
            NotImplementedError: the reduction is neither "mean" nor "sum", or the targets are no integers.
        """
        return _target_loss(x, y, self.target_per_qry, target, reduction)


class GradCacheDistributedLoss(GradCacheLoss):
    """GradCache's ``DistributedContrastiveLoss``: the loss over all ranks of the default process group.

    As there, x and y are this rank's rows, as many on every rank, and ``target`` covers all ranks; the gradients of
    x and y are those of the whole batch, so averaging over W ranks leaves 1/W of them.
    """

    def __init__(self, n_hard_negatives: int = 0) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("GradCacheDistributedLoss needs torch.distributed.init_process_group first")
        super().__init__(n_hard_negatives)

    def __call__(self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """As `GradCacheLoss`."""
        return _target_loss(x, y, self.target_per_qry, target, reduction, dist.get_rank(), dist.get_world_size())


def _target_loss(
    x: Tensor,
    y: Tensor,
    step: int,
    target: Tensor | None,
    reduction: str,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    if not _fused_target(target, reduction):
        raise NotImplementedError(
            f"reduction={reduction!r} with this target is not supported: use 'mean' or 'sum' and integer targets, or "
            "GradCache's own class (drop_in.patch('grad_cache') leaves this case to it)"
        )
    rows, columns = x.shape[0], y.shape[0]
    if target is None:
        if rows * step != columns:
            raise ValueError(f"{rows} rows of x with {step} rows of y each need {rows * step} rows of y, got {columns}")
        target = torch.arange(0, columns * world_size, step)
    target = target.cpu()
    used = target != IGNORED_TARGET
    if target.shape != (rows * world_size,):
        raise ValueError(f"target must have shape [{rows * world_size}], got {list(target.shape)}")
    if bool((used & ((target < 0) | (target >= columns * world_size))).any()):
        raise ValueError(f"a target is outside the {columns * world_size} rows of y")
    where = x.device if world_size > 1 else target.device  # a process group gathers the ids on its own device
    a_ids = target[rank * rows : (rank + 1) * rows].to(where)
    b_ids = torch.arange(rank * columns, (rank + 1) * columns, device=where)
    loss = ClipLoss(rank=rank, world_size=world_size, direction="a_to_b")(x, y, 1.0, a_ids=a_ids, b_ids=b_ids)
    return loss if reduction == "mean" else loss * int(used.sum())


def _fused_target(target: Tensor | None, reduction: str) -> bool:
    return reduction in ("mean", "sum") and (target is None or not target.is_floating_point())


# ---------------------------------------------------------------------------------------------------------------------
# What takes the place of a client's method: made from the class that owns it and the original
# ---------------------------------------------------------------------------------------------------------------------


def _open_clip_forward(owner: type, original: Method) -> Method:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _overrides(self, owner, "get_logits", "get_ground_truth") or getattr(self, "use_horovod", False):
            return original(self, *args, **kwargs)
        loss = ClipLoss(self.local_loss, self.gather_with_grad, rank=self.rank, world_size=self.world_size)
        return loss(*args, **kwargs)

    return forward


def _open_clip_sigmoid_forward(owner: type, original: Method) -> Method:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _overrides(self, owner, "get_logits", "get_ground_truth", "_loss"):
            return original(self, *args, **kwargs)
        return SigLipLoss(rank=self.rank, world_size=self.world_size)(*args, **kwargs)

    return forward


def _laion_forward(owner: type, original: Method) -> Method:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.use_horovod or self.weight_loss_kappa != 0:
            return original(self, *args, **kwargs)
        loss = LaionClapLoss(
            self.local_loss, self.gather_with_grad, rank=self.rank, world_size=self.world_size, mlp_loss=self.mlp_loss
        )
        return loss(*args, **kwargs)

    return forward


def _paraspeech_forward(owner: type, original: Method) -> Method:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ParaSpeechClipLoss()(*args, **kwargs)

    return forward


def _clap_model_forward(owner: type, original: Method, corrected: bool) -> Method:
    signature, criterion = inspect.signature(original), ClapModelLoss(corrected)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        if not call.arguments.pop("return_loss", False):
            return original(self, *args, **kwargs)
        as_object = call.kwargs.get("return_dict")
        out = original(*call.args, **{**call.kwargs, "return_dict": True})
        loss = criterion(out.audio_embeds, out.text_embeds, self.logit_scale_a.exp(), self.logit_scale_t.exp())
        out = type(out)(loss=loss, **out)
        return out if (self.config.return_dict if as_object is None else as_object) else out.to_tuple()

    return forward


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


def _grad_cache_call(owner: type, original: Method) -> Method:
    def __call__(self: Any, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        if not _fused_target(target, reduction):
            return original(self, x, y, target=target, reduction=reduction)
        return _target_loss(x, y, self.target_per_qry, target, reduction)

    return __call__


def _grad_cache_distributed_call(owner: type, original: Method) -> Method:
    def __call__(self: Any, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        if not _fused_target(target, reduction) or _overrides(self, owner, "gather_tensor"):
            return original(self, x, y, target=target, reduction=reduction)
        return _target_loss(x, y, self.target_per_qry, target, reduction, self.rank, self.word_size)

    return __call__


def _overrides(instance: Any, owner: type, *names: str) -> bool:
    """Whether the instance's class, or the instance, has one of owner's methods of its own."""
    return any(
        name in vars(instance) or getattr(type(instance), name) is not getattr(owner, name, None) for name in names
    )


def _gather(x: Tensor) -> Tensor:
    """The rows of all ranks, with gradients."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


# ---------------------------------------------------------------------------------------------------------------------
# Patching
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Client:
    modules: tuple[str, ...]  # where the classes may be; some are the same under two names, some are two copies
    install: str
    methods: Mapping[str, Callable[..., Method]]  # "Class.method" -> maker of the replacement


_CLIENTS = {
    "open_clip": _Client(
        ("open_clip.loss",),
        "pip install open_clip_torch",
        {"ClipLoss.forward": _open_clip_forward, "SigLipLoss.forward": _open_clip_sigmoid_forward},
    ),
    # LAION-CLAP puts its own folder on the path and then imports clap_module as a second copy.
    "laion_clap": _Client(
        ("laion_clap.clap_module.loss", "clap_module.loss"),
        "pip install laion-clap",
        {"ClipLoss.forward": _laion_forward},
    ),
    "paraspeechclap": _Client(
        ("paraspeechclap.loss",),
        "put a checkout of github.com/ajd12342/paraspeechclap on PYTHONPATH",
        {"ClipLoss.forward": _paraspeech_forward},
    ),
    "transformers": _Client(
        ("transformers.models.clap.modeling_clap",),
        "pip install transformers",
        {"ClapModel.forward": _clap_model_forward},
    ),
    "sentence_transformers": _Client(
        ("sentence_transformers.sentence_transformer.losses", "sentence_transformers.losses"),
        "pip install sentence-transformers",
        {
            "MultipleNegativesRankingLoss.compute_loss_from_embeddings": _ranking_loss_from_embeddings,
            "CachedMultipleNegativesRankingLoss.calculate_loss": _cached_ranking_loss,
        },
    ),
    # The name of the repository's package, and of the one on the package index.
    "grad_cache": _Client(
        ("grad_cache.loss", "gradcache.loss"),
        "pip install git+https://github.com/luyug/GradCache",
        {
            "SimpleContrastiveLoss.__call__": _grad_cache_call,
            "DistributedContrastiveLoss.__call__": _grad_cache_distributed_call,
        },
    ),
}


class Patch:
    """What a call of `patch` replaced. A context manager; leaving it undoes the patch.

    Attributes:
        replaced: the methods, "module.Class.method"; empty if an earlier patch of the same client is in place.
    """

    def __init__(self, changes: Sequence[tuple[type, str, Method]]) -> None:
        self._changes = list(changes)

    @property
    def replaced(self) -> tuple[str, ...]:
        return tuple(f"{owner.__module__}.{owner.__name__}.{method}" for owner, method, _ in self._changes)

    def undo(self) -> None:
        """Puts the client's own methods back. A second call does nothing."""
        while self._changes:
            owner, method, original = self._changes.pop()
            setattr(owner, method, original)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Patch({', '.join(self.replaced)})"


def patch(name: str, *, corrected: bool = False) -> Patch:
    """Makes a client package compute its contrastive loss with fastclap, wherever it is used.

    Imports the client. A second call while the first is in effect changes nothing, and neither does its undo.

    Args:
        name: "open_clip", "laion_clap", "paraspeechclap", "transformers", "sentence_transformers" or "grad_cache".
        corrected: for "transformers", whether to make one of its two text→audio terms audio→text (`ClapModelLoss`).
            All other patches, and this one without it, leave the client's numbers as they are.

    Returns:
        A `Patch`, for ``patch(...).undo()`` or ``with patch(...):``; may be ignored.

    Raises:
        ValueError: there is no such client, or it is patched already with another ``corrected``.
        ModuleNotFoundError: the client is not installed.
        ImportError: the client is of a version without the methods in question.
    """
    if name not in _CLIENTS:
        raise ValueError(f"unknown client {name!r}; there are {', '.join(_CLIENTS)}")
    if corrected and name != "transformers":
        raise ValueError(f"corrected=True is for 'transformers'; {name} needs no correction")
    client, options = _CLIENTS[name], {"corrected": corrected} if name == "transformers" else {}
    modules = [module for module in map(_module, client.modules) if module is not None]
    if not modules:
        raise ModuleNotFoundError(f"{name} is not installed ({client.install})", name=name)
    found: dict[tuple[type, str], Callable[..., Method]] = {}
    for module in modules:
        for target, make in client.methods.items():
            class_name, method = target.split(".")
            owner = getattr(module, class_name, None)
            if owner is None or method not in vars(owner):
                raise ImportError(f"{module.__name__} has no {target}: this version of {name} cannot be patched")
            found[owner, method] = make
    changes = []
    for owner, method in found:
        original = vars(owner)[method]
        earlier = getattr(original, "_fastclap_options", None)
        if earlier is None:
            changes.append((owner, method, original))
        elif earlier != options:
            raise ValueError(f"{name} is patched already with {earlier}; undo that first")
    for owner, method, original in changes:
        replacement: Any = functools.wraps(original)(found[owner, method](owner, original, **options))
        replacement._fastclap_options = options
        setattr(owner, method, replacement)
    return Patch(changes)


def _module(name: str) -> ModuleType | None:
    """The module, or None if it or its package does not exist. Whatever else an import may raise is raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # for old names of modules
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return None
        raise


@functools.cache
def _ranking_class(name: str) -> type:
    """sentence-transformers' class, in which only the step from embeddings to loss is replaced."""
    client = _CLIENTS["sentence_transformers"]
    modules = [module for module in map(_module, client.modules) if module is not None]
    if not modules:
        raise ModuleNotFoundError(f"{name} needs sentence-transformers ({client.install})")
    owner = getattr(modules[0], name)
    ((target, make),) = [item for item in client.methods.items() if item[0].startswith(f"{name}.")]
    method = target.split(".")[1]
    original = getattr(owner, method)
    replacement = functools.wraps(original)(make(owner, original))
    return type(name, (owner,), {method: replacement, "__module__": __name__, "__doc__": owner.__doc__})


def __getattr__(name: str) -> Any:
    if name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        return _ranking_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
