"""LAION-CLAP's loss (package `laion_clap`).

Replaced: ClipLoss.forward. Left to the client: weight_loss_kappa and use_horovod.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastclap.drop_in.open_clip import ClipLoss
from fastclap.drop_in.shared import Client, Method


class LaionClapLoss(nn.Module):
    """LAION-CLAP's `ClipLoss`: open_clip's, or with `mlp_loss` the mean of two of them.

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
        audio_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale_a: float | Tensor,
        logit_scale_t: float | Tensor | None = None,
        audio_features_mlp: Tensor | None = None,  # [N, D]
        text_features_mlp: Tensor | None = None,  # [N, D]
    ) -> Tensor:
        """The loss of features that are already normalised; 0-d, float32 (float64 for float64 features)."""
        if not self.mlp_loss:
            return self.loss(audio_features, text_features, logit_scale_a)
        if logit_scale_t is None or audio_features_mlp is None or text_features_mlp is None:
            raise ValueError("mlp_loss=True needs logit_scale_t, audio_features_mlp and text_features_mlp")
        at_audio_scale = self.loss(audio_features, text_features_mlp, logit_scale_a)
        return (at_audio_scale + self.loss(audio_features_mlp, text_features, logit_scale_t)) / 2


def _clip_loss_forward(owner: type, original: Method) -> Method:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.use_horovod or self.weight_loss_kappa != 0:
            return original(self, *args, **kwargs)
        loss = LaionClapLoss(
            self.local_loss, self.gather_with_grad, rank=self.rank, world_size=self.world_size, mlp_loss=self.mlp_loss
        )
        return loss(*args, **kwargs)

    return forward


CLIENT = Client(
    "laion_clap",
    # LAION-CLAP puts its own folder on the path and then imports clap_module as a second copy.
    modules=("laion_clap.clap_module.loss", "clap_module.loss"),
    install="pip install laion-clap",
    methods={"ClipLoss.forward": _clip_loss_forward},
)
