"""CLSP's published training, driven from a checkout that the user names: yfyeung/icefall, branch clsp.

Its own code runs (egs/emilia/CLAP/spear_roberta): the Zipformer with its limits, the model, the loss, ScaledAdam and
Eden. Its scripts read their data through lhotse and k2, so a step is put together here from their parts, in their
order. Stood in for are:

- k2's Swoosh functions, by torch's operations. k2 is a package of CUDA code that is built for few releases of torch; it
  keeps the derivative of an activation in a byte, rounded at random, and what stands here keeps the exact one;
- `RobertaModel.from_pretrained`, by a model of a given configuration with random weights;
- a seed of lhotse's and three helpers of icefall's.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastclap.config import ZipformerConfig
from fastclap.errors import ConfigError
from fastclap.kernels.swoosh import swoosh

FOLDER = Path("egs") / "emilia" / "CLAP" / "spear_roberta"
MODULES = ("scaling", "subsampling", "zipformer2", "optim", "clap_module", "attribute_perturbation", "model")


def load(checkout: str | Path, *, fused: bool = False) -> SimpleNamespace:
    """Its modules by name, as attributes.

    Args:
        checkout: folder of the repository.
        fused: torch's compiler makes kernels of the Swoosh functions, such as k2 has, so that they are not slower.

    Raises:
        ConfigError: the folder is no such checkout.
    """
    folder = Path(checkout) / FOLDER
    if not (folder / "zipformer2.py").exists():
        raise ConfigError(f"{checkout}: no checkout of yfyeung/icefall at its branch clsp ({FOLDER} is missing)")
    stand_ins = {"k2": _k2(fused), "encoder_interface": _module("encoder_interface", EncoderInterface=nn.Module)}
    stand_ins |= {"lhotse": _module("lhotse"), "icefall": _module("icefall")}
    stand_ins["lhotse.utils"] = _module("lhotse.utils", fix_random_seed=torch.manual_seed)
    stand_ins["icefall.utils"] = _module("icefall.utils", torch_autocast=_autocast, make_pad_mask=_pad_mask)
    names = [*stand_ins, *MODULES]
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(folder))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def parts(icefall: SimpleNamespace, file: str, names: Callable[[str], bool]) -> dict[str, Any]:
    """Those functions and constants of a file of egs/emilia/CLAP, which need nothing of what it imports but `re`."""
    path = Path(icefall.model.__file__).parents[1] / file
    tree = ast.parse(path.read_text())
    found = {
        ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", ""): node
        for node in tree.body
    }
    tree.body = [node for name, node in found.items() if names(name)]
    defined: dict[str, Any] = {"re": re}
    exec(compile(tree, str(path), "exec"), defined)
    return defined


def encoder(icefall: SimpleNamespace, config: ZipformerConfig, mels: int) -> nn.Module:
    """`encoder_embed` and `encoder` of these sizes, as its training builds them."""
    lists: Any = {name: tuple(values) for name, values in config.lists().items()}
    scheduled = icefall.scaling.ScheduledFloat
    first, second, third = config.channels
    module: Any = nn.Module()
    module.encoder_embed = icefall.subsampling.Conv2dSubsampling(
        mels, lists["width"][0], first, second, third, dropout=scheduled((0.0, 0.3), (20000.0, 0.1))
    )
    module.encoder = icefall.zipformer2.Zipformer2(
        output_downsampling_factor=config.output_downsampling,
        downsampling_factor=lists["downsampling"],
        encoder_dim=lists["width"],
        num_encoder_layers=lists["layers"],
        encoder_unmasked_dim=lists["unmasked_width"],
        query_head_dim=config.query_width,
        pos_head_dim=config.position_width,
        value_head_dim=config.value_width,
        num_heads=lists["heads"],
        feedforward_dim=lists["feedforward"],
        cnn_module_kernel=lists["kernel"],
        pos_dim=config.encoding_width,
        dropout=scheduled((0.0, 0.3), (20000.0, 0.1)),
        warmup_batches=4000.0,
    )
    return module


def encode(module: Any, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Result [B, T, C] and lengths [B] of `encoder_embed` and `encoder`."""
    x, lengths = module.encoder_embed(features, frames)
    x, lengths = module.encoder(x.transpose(0, 1), lengths, _pad_mask(lengths))
    return x.transpose(0, 1), lengths


class Published:
    """Its model, loss, optimizer and schedule, and the training step of its second stage, or of the first.

    Args:
        icefall: its modules, as `load` gives them.
        config: sizes of the Zipformer.
        mels: bands of the features.
        roberta: configuration of the text encoder.
        dim: of the shared space.
        device: where everything is.
        learning_rate: base of Eden's.
        encoder_scale: learning rate of both encoders as a multiple of that.
    """

    def __init__(
        self,
        icefall: SimpleNamespace,
        config: ZipformerConfig,
        mels: int,
        roberta: Mapping[str, Any],
        dim: int = 512,
        device: str | torch.device = "cpu",
        learning_rate: float = 0.001,
        encoder_scale: float = 1.0,
    ) -> None:
        from transformers import RobertaConfig, RobertaModel

        parts: Any = encoder(icefall, config, mels)
        text = RobertaModel(RobertaConfig(**roberta))
        with mock.patch.object(icefall.model.RobertaModel, "from_pretrained", lambda *_, **__: text):
            self.model = icefall.model.CLAP(
                parts.encoder_embed,
                parts.encoder,
                encoder_dim=max(config.lists()["width"]),
                text_encoder_dim=text.config.hidden_size,
                joint_dim=dim,
            )
        self.model.to(device).train()
        in_encoders = ("encoder.", "encoder_embed.", "text_encoder.")
        groups: dict[float, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.model.named_parameters():
            scale = encoder_scale if name.startswith(in_encoders) else 1.0
            groups.setdefault(learning_rate * scale, []).append((name, parameter))
        self.optimizer = icefall.optim.ScaledAdam(
            [{"named_params": pairs, "lr": rate} for rate, pairs in groups.items()],
            lr=learning_rate,
            clipping_scale=2.0,
        )
        self.scheduler = icefall.optim.Eden(self.optimizer, 100_000, 100, warmup_batches=500, warmup_start=0.5)
        self.scheduler.step_epoch(0)
        self.loss = icefall.clap_module.ClipLoss()
        self.batches = 0

    def set_batch_count(self, count: float) -> None:
        """How far the schedules in the model are."""
        for module in self.model.modules():
            if hasattr(module, "batch_count"):
                module.batch_count = count

    def step(
        self,
        features: Tensor,  # [B, T, mels]
        frames: Tensor,  # int64 [B]
        text: Mapping[str, Tensor],  # input_ids and attention_mask, of one or two captions a clip
        autocast: torch.dtype | None = None,
    ) -> Tensor:
        """Take a step; the loss, on the device."""
        self.batches += 1
        device = features.device.type
        with torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            audio, captions, scale = self.model(audio=features, audio_lens=frames, text=dict(text))
            loss = self.loss(audio, captions, scale, multi_positive=len(captions) > len(audio))
        loss.backward()
        self.scheduler.step_batch(self.batches)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        self.optimizer.zero_grad()
        return loss.detach()


class _AsExpected(int):
    """A number of frames that the code compares with what it is told elsewhere."""

    def __eq__(self, _: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@contextlib.contextmanager
def without_numbers(modules: SimpleNamespace, frames: int) -> Iterator[list[str]]:
    """Inside it CLSP's published code goes on without the numbers that it reads off the device; gives their places.

    Checks hold, whiteners find their limit held (and save themselves the push), gradients are not clipped, and masks of
    padding are those of clips that all have so many frames. A Swoosh is an operation, and so is its derivative.
    """
    reads: list[str] = []

    def read(value: Any) -> Callable[[Tensor], Any]:
        def look(x: Tensor) -> Any:
            caller = sys._getframe(1)
            reads.append(f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}")
            return value(x)

        return look

    def mask(lengths: Tensor, _: int = 0) -> Tensor:
        reads.append("make_pad_mask")
        longest = (frames, (frames + 1) // 2)[reads.count("make_pad_mask") % 2 == 0]
        return torch.zeros(len(lengths), longest, dtype=torch.bool, device=lengths.device)

    def autocast(device_type: str = "cuda", **options: Any) -> Any:
        return torch.autocast(device_type, **options)

    number = read(lambda x: 1.0 if x.is_floating_point() else _AsExpected(frames))
    operator = torch.ops.fastclap.swoosh
    with contextlib.ExitStack() as stack:
        for name, value in (("item", number), ("__bool__", read(lambda _: True))):
            stack.enter_context(mock.patch.object(FakeTensor, name, value, create=True))
        stack.enter_context(mock.patch.object(modules.model, "make_pad_mask", mask))
        for module in vars(modules).values():
            if hasattr(module, "torch_autocast"):
                stack.enter_context(mock.patch.object(module, "torch_autocast", autocast))
        for kind in "lr":
            functions: dict[str, Callable[[Tensor], Any]] = {
                f"swoosh_{kind}": functools.partial(swoosh, kind=kind),
                f"swoosh_{kind}_forward": lambda x, kind=kind: operator(x, None, None, kind),  # type: ignore[misc]
                f"swoosh_{kind}_forward_and_deriv": lambda x, kind=kind: tuple(  # type: ignore[misc]
                    operator(x, None, None, kind) for _ in range(2)
                ),
            }
            for name, function in functions.items():
                stack.enter_context(mock.patch.object(modules.scaling.k2, name, function))
        yield reads


def _module(name: str, **content: Any) -> Any:
    module = ModuleType(name)
    vars(module).update(content)
    return module


@contextlib.contextmanager
def _autocast(device_type: str = "cuda", **options: Any) -> Iterator[None]:
    with torch.autocast(device_type if torch.cuda.is_available() else "cpu", **options):
        yield


def _pad_mask(lengths: Tensor, max_len: int = 0) -> Tensor:  # bool [B, T], True past each end
    longest = max(max_len, int(lengths.max()))
    return torch.arange(longest, device=lengths.device) >= lengths[:, None]


def _k2(fused: bool) -> Any:
    """Swoosh (Yao et al. 2024, arXiv 2310.11230) as k2 names it."""
    module = _module("k2")
    made: Callable[[Any], Any] = functools.partial(torch.compile, dynamic=True) if fused else lambda function: function
    for name, offset, constant in (("l", 4.0, 0.035), ("r", 1.0, 0.313261687)):

        def forward(x: Tensor, offset: float = offset, constant: float = constant) -> Tensor:
            return torch.logaddexp(x.new_zeros(()), x - offset) - 0.08 * x - constant

        def with_slope(x: Tensor, offset: float = offset, forward: Any = forward) -> tuple[Tensor, Tensor]:
            return forward(x), torch.sigmoid(x - offset) - 0.08

        setattr(module, f"swoosh_{name}", made(forward))
        setattr(module, f"swoosh_{name}_forward", made(forward))
        setattr(module, f"swoosh_{name}_forward_and_deriv", made(with_slope))
    return module
