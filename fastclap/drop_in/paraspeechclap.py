"""ParaSpeechCLAP's losses (package `paraspeechclap`, from a checkout of its repository).

Replaced: ClipLoss.forward, and so the contrastive part of MultiTaskLoss. Nothing is left to the client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastclap.drop_in.shared import Client, Method
from fastclap.losses import info_nce, tag_loss


class ParaSpeechClipLoss(nn.Module):
    """ParaSpeechCLAP's `ClipLoss`: text first, normalises inside, each rank on its own batch."""

    def forward(
        self,
        text_features: Tensor,  # [N, D]
        audio_features: Tensor,  # [N, D]
        logit_scale: float | Tensor,
    ) -> Tensor:
        """0-d, float32 (float64 for float64 features)."""
        if text_features.shape[0] != audio_features.shape[0]:
            raise ValueError(f"{text_features.shape[0]} texts for {audio_features.shape[0]} clips; they must be equal")
        return info_nce(audio_features, text_features, logit_scale)


class ParaSpeechMultiTaskLoss(nn.Module):
    """ParaSpeechCLAP's `MultiTaskLoss`: `ParaSpeechClipLoss` plus a multi-label loss over tags.

    A clip's logit for a tag is the cosine of their embeddings; the binary cross-entropy is averaged over tags and
    over the clips that have any, then over the heads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.contrastive_loss = ParaSpeechClipLoss()

    def forward(
        self,
        text_features: Tensor,  # [N, D]
        audio_features: Tensor,  # [N, D]
        logit_scale: float | Tensor,
        tag_embeddings: Tensor | None = None,  # [T, D]
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


def _clip_loss_forward(owner: type, original: Method) -> Method:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ParaSpeechClipLoss()(*args, **kwargs)

    return forward


CLIENT = Client(
    "paraspeechclap",
    modules=("paraspeechclap.loss",),
    install="put a checkout of github.com/ajd12342/paraspeechclap on PYTHONPATH",
    methods={"ClipLoss.forward": _clip_loss_forward},
)


def _tag_loss(
    audio: Tensor,  # [N, D]
    tags: Tensor,  # [T, D]
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
