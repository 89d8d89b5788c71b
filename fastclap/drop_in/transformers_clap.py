"""The loss of transformers' CLAP (`patch("transformers")`).

Replaced: ClapModel.forward with return_loss=True. Without it the client's own method runs unchanged.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from fastclap.drop_in.shared import Client, Method
from fastclap.losses import info_nce


class ClapModelLoss(nn.Module):
    """The loss of transformers' `ClapModel(return_loss=True)` from its embeddings and its two scales.

    Both of transformers' terms are text→audio, one at each scale: no audio ever chooses among texts.

    Args:
        corrected: make the audio scale's term audio→text, as in CLIP and LAION-CLAP.
    """

    def __init__(self, corrected: bool = False) -> None:
        super().__init__()
        self.corrected = corrected

    def forward(
        self,
        audio_embeds: Tensor,  # [N, D]
        text_embeds: Tensor,  # [N, D]
        logit_scale_a: float | Tensor,
        logit_scale_t: float | Tensor,
    ) -> Tensor:
        """0-d, from embeddings that are already normalised and scales that are already exponentiated."""
        pair = (audio_embeds, text_embeds) if self.corrected else (text_embeds, audio_embeds)
        at_text_scale = info_nce(text_embeds, audio_embeds, logit_scale_t, normalize=False, direction="a_to_b")
        return (at_text_scale + info_nce(*pair, logit_scale_a, normalize=False, direction="a_to_b")) / 2


def _clap_model_forward(owner: type, original: Method, corrected: bool) -> Method:
    signature, clap_loss = inspect.signature(original), ClapModelLoss(corrected)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        if not call.arguments.pop("return_loss", False):
            return original(self, *args, **kwargs)
        as_object = call.kwargs.get("return_dict")
        out = original(*call.args, **{**call.kwargs, "return_dict": True})
        loss = clap_loss(out.audio_embeds, out.text_embeds, self.logit_scale_a.exp(), self.logit_scale_t.exp())
        out = type(out)(loss=loss, **out)
        return out if (self.config.return_dict if as_object is None else as_object) else out.to_tuple()

    return forward


CLIENT = Client(
    "transformers",
    modules=("transformers.models.clap.modeling_clap",),
    install="pip install transformers",
    methods={"ClapModel.forward": _clap_model_forward},
    takes_corrected=True,
)
