"""The contrastive losses that fastclap is compared with, each through its own package.

Every form takes raw embeddings a, b [N, D] and the scale, normalises them (unless it does so itself) and returns the
symmetric InfoNCE loss; packages with a loss over one direction only are called twice. A package that is not installed,
or has nothing for this machine, is listed with the reason and the name under which pip finds it.

`passes` counts products of N×N×D multiply-adds (T = 2·N²·D flops each) in a forward and backward pass, read from each
package's code; the least with the whole matrix in memory is 3, without it 4.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastclap
from bench.run import significant
from fastclap.losses import info_nce, sigmoid_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
SCALE = 1 / 0.07
SIGMOID_BIAS = -10.0


class UnavailableError(Exception):
    """A form cannot run here, for the reason given."""


@dataclass(frozen=True)
class Peer:
    """One form of the loss, or of another kernel (`bench.kernel_peers`).

    Attributes:
        name: of the form in cases and tables.
        package: what pip calls it.
        version: None where it is not installed.
        run: (a, b, scale) -> loss, or what else the kernel takes and returns; None where it cannot run here.
        notes: how it is called and what it leaves out, or why it cannot run.
        passes: matmul passes of a forward and backward pass of the loss; 0 for another kernel.
        scale_gradient: whether the scale gets a gradient.
    """

    name: str
    package: str
    version: str | None
    run: Callable[..., Any] | None
    notes: str
    passes: int
    scale_gradient: bool = True

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of it."""
        return {"package": self.package, "version": self.version, "notes": self.notes}


def normalized(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return F.normalize(a, dim=1), F.normalize(b, dim=1)


def materialised(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """One S for both directions, softmaxes in float32: 3 passes, and 4·N² bytes or more."""
    a, b = normalized(a, b)
    logits = scale * (a @ b.t()).float()
    labels = torch.arange(a.shape[0], device=a.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def materialised_sigmoid(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    a, b = normalized(a, b)
    logits = scale * (a @ b.t()).float() + SIGMOID_BIAS
    positive = torch.eye(a.shape[0], device=a.device, dtype=torch.bool)
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum() / a.shape[0]


MATERIALISED: dict[str, Loss] = {"info_nce": materialised, "sigmoid": materialised_sigmoid}


def two_calls(one_direction: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """The mean over both directions of a linear cross-entropy (hidden, weight, labels) -> loss.

    The scale enters through the hidden states, in their own precision, as these packages have no other place for it.
    """

    def run(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        a, b = normalized(a, b)
        labels = torch.arange(a.shape[0], device=a.device)
        factor = scale.to(a.dtype)
        return (one_direction(factor * a, b, labels) + one_direction(factor * b, a, labels)) / 2

    return run


def _fastclap(loss: Callable[..., Any], backend: str, device: torch.device, **options: Any) -> Loss:
    if backend == "triton" and device.type != "cuda":
        raise UnavailableError("needs a GPU")
    return functools.partial(loss, backend=backend, **options)


def _compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    if device.type != "cuda":
        raise UnavailableError("compiled forms are measured on a GPU only")
    return torch.compile(function, dynamic=False, fullgraph=True)


def _open_clip(device: torch.device, compiled: bool) -> Loss:
    # The loss module alone: the package's __init__ imports torchvision and timm, which the loss does not use.
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("open_clip")
    spec = importlib.util.spec_from_file_location("open_clip_loss", f"{package.submodule_search_locations[0]}/loss.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    criterion = module.ClipLoss()

    def run(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        a, b = normalized(a, b)
        return criterion(a, b, scale.to(a.dtype))

    return _compiled(run, device) if compiled else run


def _inf_cl(device: torch.device) -> Loss:
    cal_flash_loss = on_gpu("inf_cl", device).cal_flash_loss

    def run(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        a, b = normalized(a, b)
        head_dim = math.gcd(a.shape[1], 256)  # it must divide D
        one, other = (cal_flash_loss(x, y, scale=scale, head_dim=head_dim).mean() for x, y in ((a, b), (b, a)))
        return (one + other) / 2

    return run


def _memeff(device: torch.device, scale: float) -> Loss:
    # stable=True, its default, multiplies the gradients by another factor: a different training step.
    criterion = on_gpu("memeff", device).MemoryEfficientCLIPLoss(temperature=1 / scale, stable=False)
    return lambda a, b, _: criterion(a, b)


def _quack(device: torch.device) -> Loss:
    function = on_gpu("quack.linear_cross_entropy", device).chunked_linear_cross_entropy
    return two_calls(lambda hidden, weight, labels: function(hidden, weight, labels, chunk_size=4096))


def _cut_cross_entropy(device: torch.device, exact: bool) -> Loss:
    function = on_gpu("cut_cross_entropy", device).linear_cross_entropy
    options: dict[str, Any] = {"filter_eps": None} if exact else {}
    return two_calls(lambda hidden, weight, labels: function(hidden, weight, labels, **options))


def _liger(device: torch.device) -> Loss:
    function = on_gpu("liger_kernel.ops.fused_linear_cross_entropy", device).LigerFusedLinearCrossEntropyFunction
    return two_calls(lambda hidden, weight, labels: function.apply(hidden, weight, labels)[0])


def _siglip_kernel(device: torch.device) -> Loss:
    function = on_gpu("siglip_kernel", device).fused_siglip_loss

    def run(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        a, b = normalized(a, b)
        return function(a, b, scale.log(), scale.new_tensor(SIGMOID_BIAS))

    return run


def on_gpu(module: str, device: torch.device) -> Any:
    if device.type != "cuda":
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            raise ModuleNotFoundError(module)
        raise UnavailableError("needs a GPU")
    return importlib.import_module(module)


def load(
    name: str, package: str, passes: int, notes: str, make: Callable[[], Any], scale_gradient: bool = True
) -> Peer:
    """The form that `make` returns, or the reason why there is none."""
    known, run = {"fastclap": fastclap.__version__, "torch": torch.__version__}, None
    version = known.get(package)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = version or importlib.metadata.version(package)
    try:
        run = make()
    except ModuleNotFoundError as error:
        missing = f"not installed (pip install {package})" if version is None else f"lacks a dependency: {error}"
        notes = f"{missing}; {notes}"
    except Exception as error:  # a peer's own import may fail in any way; the others go on
        notes = f"{' '.join(str(error).split())[:200] or type(error).__name__}; {notes}"
    return Peer(name, package, version, run, notes, passes, scale_gradient)


def info_nce_peers(device: torch.device, scale: float) -> list[Peer]:
    """All forms of the symmetric InfoNCE loss; `scale` is for those that take no tensor.

    Compiled forms are compiled afresh in each list: drop the list, and call `torch.compiler.reset`, when shapes change.
    """
    both = "one direction, called twice"
    return [
        load(
            *("fastclap Triton", "fastclap", 4, "3 passes where the exponentials take up to 256 MiB"),
            lambda: _fastclap(info_nce, "triton", device),
        ),
        load(
            *("fastclap Triton, 3 passes", "fastclap", 3, "keep_exponentials=True"),
            lambda: _fastclap(info_nce, "triton", device, keep_exponentials=True),
        ),
        load(
            "fastclap torch",
            "fastclap",
            4,
            "the same algorithm in plain torch",
            lambda: _fastclap(info_nce, "torch", device),
        ),
        load(
            "materialised, compiled", "torch", 3, "one S for both directions", lambda: _compiled(materialised, device)
        ),
        load("materialised", "torch", 3, "one S for both directions, eager", lambda: materialised),
        load("open_clip", "open-clip-torch", 6, "ClipLoss, eager", lambda: _open_clip(device, False)),
        load("open_clip, compiled", "open-clip-torch", 6, "ClipLoss, compiled", lambda: _open_clip(device, True)),
        load("inf_cl", "inf-cl", 10, f"cal_flash_loss, {both}", lambda: _inf_cl(device)),
        load(
            *(
                "memeff",
                "memeff",
                5,
                "MemoryEfficientCLIPLoss(stable=False); the temperature is a constant; sm_100 beyond D = 512: 4 passes",
            ),
            lambda: _memeff(device, scale),
            scale_gradient=False,
        ),
        load(
            *("quack", "quack-kernels", 6, f"chunked_linear_cross_entropy, {both}; needs N a multiple of 8"),
            lambda: _quack(device),
        ),
        load(
            *("cut-cross-entropy", "cut-cross-entropy", 8, f"{both}; skips gradients below its default threshold"),
            lambda: _cut_cross_entropy(device, exact=False),
        ),
        load(
            *("cut-cross-entropy, exact", "cut-cross-entropy", 8, f"{both}; filter_eps=None"),
            lambda: _cut_cross_entropy(device, exact=True),
        ),
        load(
            *("liger-kernel", "liger-kernel", 6, f"fused linear cross-entropy, {both}; adds chunks in their own dtype"),
            lambda: _liger(device),
        ),
    ]


def sigmoid_peers(device: torch.device) -> list[Peer]:
    """All forms of SigLIP's loss, with a constant bias."""

    def ours(backend: str) -> Loss:
        run: Callable[..., Tensor] = _fastclap(sigmoid_loss, backend, device)
        return lambda a, b, scale: run(a, b, scale, SIGMOID_BIAS)

    return [
        load("fastclap Triton", "fastclap", 3, "fused kernels", lambda: ours("triton")),
        load("fastclap torch", "fastclap", 3, "in plain torch", lambda: ours("torch")),
        load("materialised, compiled", "torch", 3, "one matrix", lambda: _compiled(materialised_sigmoid, device)),
        load("materialised", "torch", 3, "eager", lambda: materialised_sigmoid),
        load(
            *("siglip-kernel", "siglip-kernel", 3, "fused_siglip_loss, which takes chunks for 16-bit embeddings"),
            lambda: _siglip_kernel(device),
        ),
    ]


def reference(loss: str, a: Tensor, b: Tensor, scale: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """(loss, da, db, dscale) in float64 on the very numbers that the forms get.

    By the definition up to 16,384 rows; above, where its matrix does not fit, and with `options` of InfoNCE, by the
    chunked engine in float64, which the tests hold to the definition.
    """
    a, b, scale = (x.detach().double().requires_grad_() for x in (a, b, scale))
    backend = "reference" if a.shape[0] <= 16384 and not options else "torch"
    value: Any
    if loss == "sigmoid":
        value = sigmoid_loss(a, b, scale, SIGMOID_BIAS, backend=backend)
    else:
        value = info_nce(a, b, scale, backend=backend, **options)
    return (value.detach(), *torch.autograd.grad(value, (a, b, scale)))


def errors(run: Loss, expected: tuple[Tensor, ...], a: Tensor, b: Tensor, scale: Tensor) -> dict[str, float | None]:
    """Relative error (norm of the difference over the norm) of the loss and of each gradient; None where there is none.

    The norms are taken on the tensors' own device, in float64.
    """
    a, b, scale = (x.detach().clone().requires_grad_() for x in (a, b, scale))
    value = run(a, b, scale)
    value.backward()
    found: dict[str, float | None] = {}
    for name, reference, out in zip(
        ("loss", "da", "db", "dscale"), expected, (value.detach(), a.grad, b.grad, scale.grad), strict=True
    ):
        found[name] = None
        if out is not None:
            found[name] = float(f"{((out.double() - reference).norm() / reference.norm()).item():.3g}")
    return found


def loss_rates(rows: int, dim: int, median_ms: float, peak_tflops: float | None) -> dict[str, float]:
    """Work over time. T = 2·N²·D flops is one matmul pass; see `bench.gpu.loss` for what 3 and 4 of them are."""
    one_pass = 2e-9 * rows**2 * dim / median_ms  # TFLOP/s
    found = {"useful_tflops": significant(3 * one_pass), "tflops_4t": significant(4 * one_pass)}
    if peak_tflops:
        found["share_of_peak"] = significant(3 * one_pass / peak_tflops)
    return found
