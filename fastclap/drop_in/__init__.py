"""The fused losses and front-ends inside other people's code: one line switches a client over, and back.

`patch("open_clip")` replaces the method that computes the loss on the client's class itself. So every name by which the
class is known, in the client's modules or in the caller's, every subclass that builds on it and every instance, built
before or after, gets the fused loss; `isinstance` checks, constructors and attributes stay the client's. (A bound
method that was stored before the patch stays what it was; MatryoshkaLoss stores that of a cached loss, so patch first.)
What the fused loss cannot express goes to the client's own method, so a patch never changes what a configuration means,
only what it costs.

Values and gradients are the client's on every rank, its distributed conventions included; SigLipLoss in a distributed
run is the one exception (`fastclap.drop_in.open_clip`). Losses are float32 even where the client would return half
precision.

Front-ends are patched in the same way, one name for all classes of a package. Padding, truncation, random crops, masks,
normalisation and return types stay the client's own code.

Each client has a file, named after it, which says what is replaced, what is left to the client, and how close the
numbers are: `open_clip`, `laion_clap`, `paraspeechclap`, `transformers_clap`, `sentence_transformers`, `grad_cache` for
losses, `transformers_features` and `torchlibrosa` for front-ends. The adapter classes in them have the client's
signatures and stand on their own, without the client; they raise NotImplementedError for what they cannot express.
Importing this package imports no client.
"""

from __future__ import annotations

from typing import Any

from fastclap.drop_in.grad_cache import GradCacheDistributedLoss, GradCacheLoss
from fastclap.drop_in.laion_clap import LaionClapLoss
from fastclap.drop_in.open_clip import OpenClipLoss, OpenClipSigLipLoss
from fastclap.drop_in.paraspeechclap import ParaSpeechClipLoss, ParaSpeechMultiTaskLoss
from fastclap.drop_in.patching import Patch, patch
from fastclap.drop_in.sentence_transformers import RANKING_LOSSES, ranking_loss_class
from fastclap.drop_in.transformers_clap import ClapModelLoss

__all__ = [
    "ClapModelLoss",
    "GradCacheDistributedLoss",
    "GradCacheLoss",
    "LaionClapLoss",
    "OpenClipLoss",
    "OpenClipSigLipLoss",
    "ParaSpeechClipLoss",
    "ParaSpeechMultiTaskLoss",
    "Patch",
    "patch",
]


def __getattr__(name: str) -> Any:
    if name in RANKING_LOSSES:  # subclasses of the client's own, which is imported here at the earliest
        return ranking_loss_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
