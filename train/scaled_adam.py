"""ScaledAdam, the optimizer of icefall's Zipformers, without waiting for the device.

Adam whose step is a share of the parameter's root mean square (rms), that learns the size of every parameter as well,
and that clips by the median of the gradients' norms. The definition is icefall's (egs/emilia/CLAP/spear_roberta/
optim.py of yfyeung/icefall, described in Yao et al. 2024, "Zipformer", arXiv:2310.11230, section 3.5). For a
parameter p of more than one value, with gradient g after clipping:

    v ← β2·v + (1 − β2)·g²
    Δ ← β1·Δ − (1 − β1)·lr·max(rms(p), min_rms)·g / (√v̂ + ε)         v̂ = v / (1 − β2^t), or v once 1 − β2^t ≥ 0.99
    p ← p + Δ

Every `size_period` steps rms(p) is measured anew, and Δ also receives (1 − β1)·s·p, where s is Adam's step for the
logarithm of p's size, at the learning rate lr·scalar_lr_scale; its gradient is Σ p·g, summed over those steps. s does
not shrink a parameter below `min_rms` nor let it grow above `max_rms`. Single numbers take Adam's own step at that
learning rate, from where they are cut off at ±`scalar_max`.

Gradients of a parameter group are scaled so that their norm, with each parameter's gradient times its rms, is at most
`clipping_scale` times the median of the last `clipping_period` steps, looked up once in so many steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastclap.kernels.scaled_adam import Change, sums, update_


class ScaledAdam(Optimizer):
    """ScaledAdam over parameters or parameter groups; each group is clipped by itself.

    No step waits for the device: norms, median and threshold stay there. How many steps there were is known on the
    host, so a step that is left out on the device (see `found_inf`) counts there too. A gradient that is None is zero:
    its parameter goes on by momentum. What is in the gradients after a step is undefined.

    icefall's differs in three details: its count leaves out steps that its gradient scaler has left out; it writes
    zeros for gradients that are not finite, where this leaves out the group's step; and where all gradients are zero
    just when the first threshold is due, it multiplies those until the next by 20.

    Args:
        params: float32 or float64, as for any optimizer of torch.
        lr: learning rate, relative to a parameter's rms; icefall's are around 0.03.
        betas: decay of the running change, and of the squared gradient's running mean.
        eps: offset of the denominators.
        clipping_scale: largest norm of a group's gradients, in medians (0: no clipping).
        clipping_period: steps that the median is taken of.
        scalar_lr_scale: learning rate of sizes and single numbers, as a multiple of `lr`.
        size_period: steps from one change of the sizes to the next.
        min_rms, max_rms: bounds of the sizes.
        scalar_max: bound of single numbers.
        backend: engine of what is done with every value, "auto", "triton" or "torch".

    Attributes:
        found_inf: float tensor [] on the parameters' device that the caller sets: other than 0, the next step changes
            neither weights nor state. None: all steps are taken.
        STATE: names of the state that a parameter may have: `step` (int) counts its steps; `delta` and `exp_avg_sq`
            are Δ and v; `size` [2 + size_period] is its rms, the running mean of the squared gradient of its logarithm,
            and that gradient in the last steps; `norms` [clipping_period] and `threshold` [] belong to the group and
            lie with one of its parameters.

    Raises:
        ValueError: a parameter has another dtype, or an option is out of its range.
    """

    STATE = ("step", "delta", "exp_avg_sq", "size", "norms", "threshold")

    def __init__(
        self,
        params: Any,
        lr: float = 0.045,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        clipping_scale: float = 2.0,
        clipping_period: int = 100,
        scalar_lr_scale: float = 0.1,
        size_period: int = 4,
        min_rms: float = 1e-5,
        max_rms: float = 3.0,
        scalar_max: float = 10.0,
        backend: str = "auto",
    ) -> None:
        given = locals()
        options = {name: given[name] for name in given if name not in ("self", "params", "backend", "__class__")}
        if not 0 < betas[0] <= betas[1] < 1:
            raise ValueError(
                f"ScaledAdam: betas are {betas}; they must lie between 0 and 1, the first not above the other"
            )
        for name in ("lr", "clipping_scale", "scalar_lr_scale"):
            if options[name] < 0:
                raise ValueError(f"ScaledAdam: {name} is {options[name]}; it must not be negative")
        for name in ("eps", "clipping_period", "size_period", "min_rms", "max_rms", "scalar_max"):
            if options[name] <= 0:
                raise ValueError(f"ScaledAdam: {name} is {options[name]}; it must be positive")
        self.found_inf: Tensor | None = None
        self.backend = backend
        super().__init__(params, options)
        dtypes = {p.dtype for group in self.param_groups for p in group["params"]}
        if not dtypes <= {torch.float32, torch.float64}:
            raise ValueError(
                f"ScaledAdam: parameters are {dtypes}; keep them in float32, and use autocast for products"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with the gradients as they are; returns what `closure` returns, which may make them first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["params"]:
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters = group["params"]
        for p in parameters:
            if p not in self.state:
                self.state[p] = self._initial(p, group["size_period"])
        wide = [p for p in parameters if p.numel() > 1]
        single = [p for p in parameters if p.numel() == 1]
        first = parameters[0]
        skip = first.new_zeros((), dtype=torch.bool) if self.found_inf is None else self.found_inf != 0

        total, products = first.new_zeros(()), {}
        if wide:
            squares, each = sums(wide, [p.grad for p in wide], self.backend)
            total = total + (torch.stack([self.state[p]["size"][0] for p in wide]).square() * squares).sum()
            products = dict(zip(wide, each.unbind(), strict=True))
        if single:
            total = total + torch.cat([_or_zeros(p).reshape(1) for p in single]).square().sum()
        skip = skip | ~total.isfinite()
        scale = self._clipping(group, total, skip)

        # Parameters that came later, because they were frozen, have a count of their own.
        for step in sorted({self.state[p]["step"] for p in parameters}):
            members = [p for p in wide if self.state[p]["step"] == step]
            if members:
                self._step_wide(group, step, members, scale, skip, torch.stack([products[p] for p in members]))
            members = [p for p in single if self.state[p]["step"] == step]
            if members:
                self._step_single(group, step, members, scale, skip)
        for p in parameters:
            self.state[p]["step"] += 1

    @staticmethod
    def _initial(p: Tensor, size_period: int) -> dict[str, Any]:
        state: dict[str, Any] = {"step": 0, "delta": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        if p.numel() > 1:
            state["size"] = p.new_zeros(2 + size_period)
            state["size"][0] = p.square().mean().sqrt()
        return state

    def _clipping(
        self,
        group: dict[str, Any],
        total: Tensor,  # []: sum of the squares of gradient times rms
        skip: Tensor,  # bool []
    ) -> Tensor:
        """What the gradients are multiplied by, []. Notes the norm, and at times finds the threshold anew."""
        parameters, period = group["params"], group["clipping_period"]
        held = self.state[next((p for p in parameters if "norms" in self.state[p]), parameters[0])]
        if not group["clipping_scale"] or not held["step"]:
            return torch.ones_like(total)
        if "norms" not in held:
            held["norms"], held["threshold"] = total.new_zeros(period), total.new_full((), math.inf)
        norms, threshold = held["norms"], held["threshold"]
        norm = total.sqrt()
        counts = ~skip & (norm > 0)  # a group that is at rest has no norm
        slot = norms[held["step"] % period]
        slot.copy_(torch.where(counts, norm, slot))
        if held["step"] % period == 0:
            ordered = norms.sort().values
            middle = ordered[period // 4 * 2]
            middle = torch.where(middle > 0, middle, ordered[-1])  # it has been at rest for most of the time
            threshold.copy_(torch.where(counts, group["clipping_scale"] * middle, threshold))
        return torch.where(counts, (threshold / (norm + 1e-20)).clamp(max=1.0), 1.0)

    def _step_wide(
        self,
        group: dict[str, Any],
        step: int,
        parameters: list[Tensor],
        scale: Tensor,  # []
        skip: Tensor,  # bool []
        products: Tensor,  # [n]: Σ p·g before clipping
    ) -> None:
        """The step of parameters that have taken `step` before, all of more than one value."""
        (beta1, beta2), period, eps = group["betas"], group["size_period"], group["eps"]
        states = [self.state[p] for p in parameters]
        before = torch.stack([state["size"] for state in states])  # [n, 2 + period]
        size = before.clone()
        size[:, 2 + step % period] = scale * products
        growth = None
        if step % period == period - 1:
            size[:, 0] = rms = _root_mean_squares(parameters)
            if step > 0:
                decay, gradients = beta2**period, size[:, 2:]
                size[:, 1] = decay * size[:, 1] + (1 - decay) * gradients.square().mean(1)
                correction = math.sqrt(1 - decay ** ((step + 1) // period))
                rate = -group["lr"] * group["scalar_lr_scale"] * correction
                growth = rate * gradients.sum(1) / (size[:, 1].sqrt() + eps)
                growth = growth.masked_fill(rms < group["min_rms"], 0.0).minimum((group["max_rms"] - rms) / rms)
                growth = (1 - beta1) * growth
        torch._foreach_copy_([state["size"] for state in states], torch.where(skip, before, size).unbind())
        rates = -group["lr"] * (1 - beta1) * size[:, 0].clamp(min=group["min_rms"])
        correction = 1 - beta2 ** (step + 1)
        deltas, squares = ([state[name] for state in states] for name in ("delta", "exp_avg_sq"))
        change = Change(rates, growth, scale, skip, beta1, beta2, correction if correction < 0.99 else 1.0, eps)
        update_(parameters, [p.grad for p in parameters], deltas, squares, change, self.backend)

    def _step_single(
        self,
        group: dict[str, Any],
        step: int,
        parameters: list[Tensor],
        scale: Tensor,  # []
        skip: Tensor,  # bool []
    ) -> None:
        """The step of single numbers that have taken `step` before."""
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in parameters]
        places = [[s["delta"] for s in states], [s["exp_avg_sq"] for s in states], list(parameters)]
        before = torch.stack([torch.cat([x.reshape(1) for x in each]) for each in places])  # [3, n]
        delta, square, p = before
        g = torch.cat([_or_zeros(p).reshape(1) for p in parameters]) * scale
        square = beta2 * square + (1 - beta2) * g.square()
        denominator = (square / (1 - beta2 ** (step + 1))).sqrt() + group["eps"]
        delta = beta1 * delta - group["lr"] * group["scalar_lr_scale"] * (1 - beta1) * g / denominator
        p = p.clamp(-group["scalar_max"], group["scalar_max"]) + delta
        after = torch.where(skip, before, torch.stack([delta, square, p]))
        flat = [x.reshape(()) for each in places for x in each]
        torch._foreach_copy_(flat, after.reshape(-1).unbind())


def _or_zeros(p: Tensor) -> Tensor:
    """The gradient of a parameter; one that is None is zero."""
    if p.grad is None:
        return torch.zeros_like(p)
    return p.grad


def _root_mean_squares(parameters: list[Tensor]) -> Tensor:
    """Of each parameter, [n]."""
    roots = [math.sqrt(p.numel()) for p in parameters]
    return torch.stack(torch._foreach_div(torch._foreach_norm(parameters), roots))
