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

from typing import Any

from fastclap.drop_in.grad_cache import GradCacheDistributedLoss, GradCacheLoss
from fastclap.drop_in.laion_clap import LaionClapLoss
from fastclap.drop_in.open_clip import OpenClipLoss, OpenClipSigLipLoss
from fastclap.drop_in.paraspeechclap import ParaSpeechClipLoss, ParaSpeechMultiTaskLoss
from fastclap.drop_in.patching import Patch, patch, ranking_class
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
    if name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        return ranking_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
