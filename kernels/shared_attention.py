import torch


class SharedAttention:
    def __init__(self, parts, lengths):
        self.parts, self.lengths = parts, lengths

    def attend(self, v):
        return torch.cat(
            [(a[: v.shape[1]] @ p.transpose(0, 1)).transpose(0, 1) for a, p in zip(self.parts, v.split(self.lengths))]
        )


class _P(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, p):
        ctx.save_for_backward(s)
        ctx.p = p
        return s.view_as(s)

    @staticmethod
    def backward(ctx, g):
        (s,) = ctx.saved_tensors
        return g + ctx.p * s.sign() * (s.abs() > 25), None


def shared_attention(q, k, p, table, starts, lengths, penalty=0.0, *, backend="auto"):
    parts = []
    L = (table.shape[2] + 1) // 2
    for qq, kk, pp in zip(q.split(lengths), k.split(lengths), p.split(lengths)):
        T = len(qq)
        s = torch.einsum("ihd,jhd->hij", qq, kk)
        ps = torch.einsum("ihc,hcn->hin", pp, table[:, :, L - T : L + T - 1])
        i = torch.arange(T)
        s = s + ps.gather(2, (i[None] - i[:, None] + T - 1).expand(len(s), T, T))
        if penalty:
            s = _P.apply(s, penalty)
        parts.append(s.softmax(-1))
    return SharedAttention(parts, lengths)
