"""From the hidden states of an encoder to one vector a clip or caption: over time first, then over layers.

Over time there are the mean, mean and standard deviation (`statistics`), a mean with learned weights (`attention`),
the first position (`first`: of a class token, or of a global token that is learned, as in WavLink) and the last one.
Over layers there are the last one, the average with learned weights (ESS-CLAP, arXiv 2505.19437) and all of them next
to each other.

Time comes first, so that what a frozen encoder says of a clip, [states, size], is one tensor that does not change
while layer weights and head are learned. For the mean the order of the two makes no difference.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fastclap.models.layers import masked_mean

OverTime = Literal["mean", "statistics", "attention", "first", "last"]
OverLayers = Literal["last", "weighted", "concatenated"]


class Pooling(nn.Module):
    """Pools the states of an encoder one after the other, then all of them together.

    Args:
        over_time, over_layers: see this file's head.
        width: of a state.
        states: that the encoder has: the input of every layer, and the last one's result.

    Attributes:
        width: of the pooled vector.
        size: of a state that is pooled over time.
        layer_weights: [states], of which the softmax weighs the layers, equally at first; None: they are not weighed.
        attention: [states], or one, times [width]: a state's score at a position is the product of the two, so that all
            positions weigh the same at first; None: they are not weighed.
    """

    def __init__(self, over_time: OverTime, over_layers: OverLayers, width: int, states: int) -> None:
        super().__init__()
        self.over_time, self.over_layers = over_time, over_layers
        self.size = width * (2 if over_time == "statistics" else 1)
        self.width = self.size * (states if over_layers == "concatenated" else 1)
        weighted = over_layers == "weighted"
        self.layer_weights = nn.Parameter(torch.zeros(states)) if weighted else None
        scored = 1 if over_layers == "last" else states
        self.attention = nn.Parameter(torch.zeros(scored, width)) if over_time == "attention" else None

    @property
    def every_state(self) -> bool:
        """Whether it takes all states, or just the last one."""
        return self.over_layers != "last"

    def pool(
        self,
        x: Tensor,  # [B, T, width]
        valid: Tensor | None,  # bool [B, T]; None: all
        state: int = 0,  # its number
    ) -> Tensor:  # [B, size], of at least float32
        """One state over time, without its padding."""
        if self.over_time == "first":
            return x[:, 0].to(torch.promote_types(x.dtype, torch.float32))
        if self.over_time == "last":
            last = x[:, -1] if valid is None else x[torch.arange(len(x), device=x.device), valid.sum(1) - 1]
            return last.to(torch.promote_types(x.dtype, torch.float32))
        if valid is not None and self.over_time != "mean":  # what is past an end may be anything
            x = x.masked_fill(~valid[..., None], 0.0)
        if self.attention is not None:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            score = x @ self.attention[state].to(x.dtype)
            score = score if valid is None else score.masked_fill(~valid, -torch.inf)
            return torch.einsum("bt,btc->bc", score.softmax(1), x)
        mean = masked_mean(x, valid)
        if self.over_time == "statistics":
            variance = masked_mean((x.to(mean.dtype) - mean[:, None]).square(), valid)
            return torch.cat([mean, (variance + 1e-5).sqrt()], 1)
        return mean

    def combine(
        self,
        pooled: Tensor,  # [B, states, size], or one state
    ) -> Tensor:  # [B, width]
        """All states together."""
        if self.layer_weights is None:
            return pooled.flatten(1)
        return torch.einsum("l,blc->bc", self.layer_weights.to(pooled.dtype).softmax(0), pooled)
