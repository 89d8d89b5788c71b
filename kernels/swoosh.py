from typing import Literal

import torch
import torch.nn.functional as F

Kind = Literal["l", "r"]


def swoosh(x, kind):
    o, c = (4.0, 0.035) if kind == "l" else (1.0, 0.313261687)
    return torch.logaddexp(x.new_zeros(()), x - o) - 0.08 * x - c


def swoosh_linear(x, kind, weight, bias=None, mask=None, sequence=None, *, backend="auto"):
    a = swoosh(x, kind)
    if mask is not None:
        a = a * mask.index_select(0, sequence)
    return F.linear(a, weight, bias)
