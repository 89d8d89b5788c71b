"""The fused losses and front-ends inside other people's code: one line switches a client over, and back.

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

Front-ends are patched in the same way, one name for all classes of a package:

=====================  ============================================  ================================================
name                   replaced                                      left to the client
=====================  ============================================  ================================================
transformers_features  the step from samples to log-mel of           a mel bank that was exchanged, clips too short for
                       WhisperFeatureExtractor (on its ``device=``)  a frame, odd n_fft, AST's input other than float32
                       ClapFeatureExtractor and ASTFeatureExtractor
torchlibrosa           Spectrogram.forward and                       the spectrogram where anything but a log-mel module
                       LogmelFilterBank.forward, one after the       uses it; trained weights, other windows than
                       other as in LAION-CLAP, MS-CLAP and PANNs     periodic Hann, center=False, zero padding, top_db
                                                                     that is not None, float64 and half precision
=====================  ============================================  ================================================

Padding, truncation, random crops, masks, normalisation and return types stay the client's own code. Features are the
client's within the rounding of a float32 FFT: 1e-4 for most sounds, more in bands 100 dB below a clip's peak, which are
rounding in the client's own too. Under autocast torchlibrosa's are float32, where its convolutions would be in half
precision.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastclap.features import PRESETS
from fastclap.kernels.logmel import LogMelSpec, log_mel, mel_bank
from fastclap.losses import ClipLoss, SigLipLoss, info_nce, tag_loss

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
    targets = torch.zeros(len(tagged), tags.shape[0], dtype=torch.bool)
    for row, clip in enumerate(tagged):
        for tag in tags_of_clips[clip] or ():
            if tag not in row_of_tag:
                raise ValueError(f"tag {tag!r} of clip {clip} is not in tag_to_idx")
            targets[row, row_of_tag[tag]] = True
    return tag_loss(audio[tagged], tags, targets.to(audio.device))


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
# Front-ends
# ---------------------------------------------------------------------------------------------------------------------


def _whisper_features(owner: type, original: Method) -> Method:
    def _torch_extract_fbank_features(self: Any, waveform: np.ndarray, device: str = "cpu") -> np.ndarray:
        bank = self.mel_filters
        spec = _preset(
            "whisper",
            sampling_rate=self.sampling_rate,
            n_fft=self.n_fft,
            win_length=self.n_fft,
            hop_length=self.hop_length,
            n_mels=bank.shape[1],
            dither=getattr(self, "dither", 0.0),
        )
        samples = waveform.shape[-1]
        if spec is None or samples <= spec.n_fft // 2 or samples < spec.hop_length or not _same_bank(bank, spec):
            return original(self, waveform, device)
        clips = torch.from_numpy(waveform).to(device, torch.float32)  # integers are not scaled there
        features, _ = log_mel(clips.reshape(-1, samples), None, spec)
        return features.mT.reshape(*waveform.shape[:-1], spec.n_mels, -1).contiguous().cpu().numpy()

    return _torch_extract_fbank_features


def _clap_features(owner: type, original: Method) -> Method:
    def _np_extract_fbank_features(
        self: Any, waveform: np.ndarray, mel_filters: np.ndarray | None = None
    ) -> np.ndarray:
        usable = mel_filters is not None and waveform.ndim == 1 and waveform.size > 0 and np.isrealobj(waveform)
        for preset in ("clap", "clap-fusion") if usable else ():
            spec = _preset(
                preset,
                sampling_rate=self.sampling_rate,
                n_fft=self.fft_window_size,
                win_length=self.fft_window_size,
                hop_length=self.hop_length,
                n_mels=mel_filters.shape[1],  # type: ignore[union-attr]
                f_min=self.frequency_min,
                f_max=self.frequency_max,
            )
            if spec is not None and _same_bank(mel_filters, spec):
                return log_mel(torch.from_numpy(waveform.astype(np.float32))[None], None, spec)[0][0].numpy()
        return original(self, waveform, mel_filters)

    return _np_extract_fbank_features


def _ast_features(owner: type, original: Method) -> Method:
    def _extract_fbank_features(self: Any, waveform: np.ndarray, max_length: int) -> np.ndarray:
        rate = self.sampling_rate
        window = int(rate * 25.0 * 0.001)  # torchaudio.compliance.kaldi's rounding
        spec = _preset(
            "ast",
            sampling_rate=rate,
            n_fft=1 << max(window - 1, 0).bit_length(),
            win_length=window,
            hop_length=int(rate * 10.0 * 0.001),
            n_mels=self.num_mel_bins,
            num_frames=max_length,
            mean=0.0,  # the client normalises
            std=1.0,
        )
        # Without torchaudio the extractor has a mel bank and a window of its own, laid out for 16 kHz.
        same = spec is not None and (rate == 16000 or not hasattr(self, "mel_filters"))
        if not same or waveform.ndim != 1 or waveform.dtype != np.float32 or len(waveform) < window:
            return original(self, waveform, max_length)
        return log_mel(torch.from_numpy(waveform)[None], None, spec)[0][0].numpy()  # type: ignore[arg-type]

    return _extract_fbank_features


@functools.lru_cache(maxsize=64)
def _preset(name: str, **numbers: Any) -> LogMelSpec | None:
    """A preset with a client's numbers; None where they make no front-end of ours."""
    try:
        return dataclasses.replace(PRESETS[name], **numbers)
    except ValueError:
        return None


@functools.lru_cache(maxsize=64)
def _bank(spec: LogMelSpec) -> np.ndarray:
    return mel_bank(spec)


def _same_bank(
    theirs: Any,  # [n_fft/2 + 1, n_mels]
    spec: LogMelSpec,
) -> bool:
    ours = _bank(spec)
    return theirs.shape == ours.shape and bool(np.abs(theirs - ours).max() <= 1e-6 * ours.max())


class _DeferredSpectrogram(Tensor):
    """What a patched torchlibrosa Spectrogram returns: a tensor that is computed when something other than a patched
    LogmelFilterBank looks at it, by the client's own code."""

    waveform: Tensor  # [B, samples]
    version: int
    stft: nn.Module
    power: float
    compute: Callable[[Tensor], Tensor]
    computed: Tensor | None  # [B, 1, frames, n_fft/2 + 1]

    @staticmethod
    def of(module: Any, waveform: Tensor, compute: Callable[[Tensor], Tensor]) -> _DeferredSpectrogram:
        frames = 1 + waveform.shape[1] // module.stft.hop_length
        deferred: Any = Tensor._make_wrapper_subclass(
            _DeferredSpectrogram,
            (waveform.shape[0], 1, frames, module.stft.n_fft // 2 + 1),
            dtype=waveform.dtype,
            device=waveform.device,
        )
        deferred.waveform = waveform if torch.is_grad_enabled() else waveform.detach()
        deferred.version = _version(waveform)
        deferred.stft, deferred.power, deferred.compute, deferred.computed = module.stft, module.power, compute, None
        return deferred

    def source(self) -> Tensor:
        if _version(self.waveform) != self.version:
            raise RuntimeError(
                "the waveform was written to before its spectrogram was used; write to a copy, or undo "
                "drop_in.patch('torchlibrosa')"
            )
        return self.waveform

    def now(self) -> Tensor:
        if self.computed is None:
            self.computed = self.compute(self.source())
        return self.computed

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(_DeferredSpectrogram, _DeferredSpectrogram.now, (args, dict(kwargs or {})))
        return function(*args, **kwargs)

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]  # where an operation skips the one above


def _torchlibrosa_spectrogram(owner: type, original: Method) -> Method:
    def forward(self: Any, input: Tensor) -> Tensor:
        stft = self.stft
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or type(input) not in (Tensor, nn.Parameter)
            or torch._C._functorch.is_functorch_wrapped_tensor(input)
            or input.dtype != torch.float32
            or input.ndim != 2
            or input.shape[0] == 0
            or input.shape[1] <= stft.n_fft // 2
            or not stft.center
            or stft.pad_mode != "reflect"
            or self.power not in (1, 2)
            or not _once(stft, (stft.conv_real.weight, stft.conv_imag.weight), _is_hann_dft)
        ):
            return original(self, input)
        return _DeferredSpectrogram.of(self, input, functools.partial(original, self))

    return forward


def _torchlibrosa_log_mel(owner: type, original: Method) -> Method:
    def forward(self: Any, input: Tensor) -> Tensor:
        if not isinstance(input, _DeferredSpectrogram) or input.computed is not None:  # it may have been changed
            return original(self, input)
        if not self.is_log or self.top_db is not None or _overrides(self, owner, "power_to_db"):
            return original(self, input)
        stft: Any = input.stft
        bank = _once(self, (self.melW,), lambda module: _slaney_bank(module.melW.detach().cpu().double().numpy()))
        spec = bank and _preset(
            "clap",
            **bank,
            win_length=stft.win_length,
            hop_length=stft.hop_length,
            power=float(input.power),
            floor=float(self.amin),
            mean=10.0 * math.log10(max(self.amin, self.ref)),
        )
        if not spec or bank["n_fft"] != stft.n_fft:
            return original(self, input)
        return log_mel(input.source(), None, spec)[0][:, None]

    return forward


_ONCE: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def _once(module: nn.Module, weights: Sequence[Tensor], judge: Callable[[Any], Any]) -> Any:
    """judge(module), kept until its weights are written to; None while a gradient of them is asked for."""
    if any(weight.requires_grad for weight in weights):
        return None
    state = [(weight.data_ptr(), _version(weight)) for weight in weights]
    if module not in _ONCE or _ONCE[module][0] != state:
        _ONCE[module] = state, judge(module)
    return _ONCE[module][1]


def _version(tensor: Tensor) -> int:
    """Changes with every write to the tensor, which inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _is_hann_dft(stft: Any) -> bool:
    """Whether the convolutions of a torchlibrosa STFT hold the DFT under a periodic Hann window, as it builds them."""
    n_fft, win = stft.n_fft, stft.win_length
    bins = n_fft // 2 + 1
    if n_fft % 2 or not 2 <= win <= n_fft:
        return False
    taps = np.zeros(n_fft)
    first = (n_fft - win) // 2
    taps[first : first + win] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(win) / win)
    phase = 2 * np.pi / n_fft * (np.outer(np.arange(bins), np.arange(n_fft)) % n_fft)
    for weight, expected in ((stft.conv_real.weight, np.cos(phase)), (stft.conv_imag.weight, -np.sin(phase))):
        found = weight.detach().cpu().double().numpy()
        if found.shape != (bins, 1, n_fft) or not np.abs(found[:, 0] - expected * taps).max() <= 1e-5:
            return False
    return True


def _slaney_bank(
    weights: np.ndarray,  # [n_fft/2 + 1, n_mels] float64
) -> dict[str, Any] | None:
    """The numbers behind a mel bank of librosa (Slaney scale and norm), which torchlibrosa does not keep; None if the
    bank is another one.

    The last filter spans many bins, so that both of its lines can be extended to its lower and upper corner, in bins.
    Its centre is their geometric mean, as the scale is logarithmic there, and its height then gives the width of a bin
    in Hz. What comes out is accepted only if it gives back the whole bank.
    """
    n_fft, n_mels = 2 * (weights.shape[0] - 1), weights.shape[1]
    last = weights[:, -1]
    (bins,) = np.nonzero(last)
    peak = int(last.argmax())
    if not (bins.size and bins[0] + 1 < peak < bins[-1] - 1):
        return None

    def zero(a: int, b: int) -> float:
        return a - last[a] * (b - a) / (last[b] - last[a])

    low, high = zero(bins[0], peak - 1), zero(bins[-1], peak + 1)
    centre = math.sqrt(low * high)
    bin_hz = 2.0 / ((high - low) * (centre - low)) * (peak - 1 - low) / last[peak - 1]
    step = 27.0 * math.log(high / low, 6.4) / 2.0  # in mel
    if low * bin_hz < 1000.0:
        return None
    f_max = high * bin_hz
    first = 15.0 + 27.0 * math.log(f_max / 1000.0, 6.4) - (n_mels + 1) * step
    f_min = first * 200.0 / 3.0 if first < 15.0 else 1000.0 * 6.4 ** ((first - 15.0) / 27.0)
    numbers = {
        "sampling_rate": round(bin_hz * n_fft),
        "n_fft": n_fft,
        "n_mels": n_mels,
        "f_min": round(f_min * 2) / 2,
        "f_max": round(f_max * 2) / 2,
    }
    spec = _preset("clap", **numbers, win_length=n_fft)
    return numbers if spec is not None and _same_bank(weights, spec) else None


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
    "transformers_features": _Client(
        ("transformers",),
        "pip install transformers",
        {
            "WhisperFeatureExtractor._torch_extract_fbank_features": _whisper_features,
            "ClapFeatureExtractor._np_extract_fbank_features": _clap_features,
            "ASTFeatureExtractor._extract_fbank_features": _ast_features,
        },
    ),
    "torchlibrosa": _Client(
        ("torchlibrosa.stft",),
        "pip install torchlibrosa",
        {
            "Spectrogram.forward": _torchlibrosa_spectrogram,
            "LogmelFilterBank.forward": _torchlibrosa_log_mel,
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
    """Makes a client package compute its contrastive loss, or its log-mel features, with fastclap, wherever it is used.

    Imports the client. A second call while the first is in effect changes nothing, and neither does its undo.

    Args:
        name: "open_clip", "laion_clap", "paraspeechclap", "transformers", "sentence_transformers" or "grad_cache" for
            the loss, "transformers_features" or "torchlibrosa" for the features.
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
