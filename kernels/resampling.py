import torch


def downsample(x, weights, first, *, backend="auto"):
    begin, end = first[:-1, None].long(), first[1:, None].long()
    idx = torch.minimum(begin + torch.arange(len(weights)), end - 1)
    return torch.einsum("rkc,k->rc", x[idx], weights.to(x.dtype))


def upsample_bypass(original, x, scale, first, sequence=None, *, backend="auto"):
    up = x.repeat_interleave(first.diff().long(), 0)
    return original + (up - original) * (scale if scale.ndim == 1 else scale.index_select(0, sequence))
