def bypass(original, x, scale, sequence=None, branch=None, *, backend="auto"):
    z = x if branch is None else x + branch
    if scale.ndim == 2:
        scale = scale.index_select(0, sequence)
    return original + (z - original) * scale


def bias_norm(x, bias, log_scale, original=None, scale=None, sequence=None, branch=None, *, backend="auto"):
    z = x if branch is None else x + branch
    y = z * ((z - bias).square().mean(-1, keepdim=True) ** -0.5 * log_scale.exp())
    return y if original is None else bypass(original, y, scale, sequence)
