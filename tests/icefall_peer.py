"""The published code of CLSP's training, to compare with: yfyeung/icefall, branch clsp, egs/emilia/CLAP/spear_roberta.

FASTCLAP_ICEFALL names a checkout of it; it is no package. What it imports and needs only in part, or not on a CPU, is
stood in for here: k2's Swoosh functions (exact, where k2 rounds the derivative to a byte at random), lhotse's seed, and
three helpers of icefall.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

MODULES = ("scaling", "subsampling", "zipformer2", "optim", "clap_module", "attribute_perturbation", "model")


def load(checkout: str | Path) -> SimpleNamespace:
    """Its modules by name, as attributes."""
    folder = Path(checkout) / "egs" / "emilia" / "CLAP" / "spear_roberta"
    if not (folder / "zipformer2.py").exists():
        raise FileNotFoundError(f"{folder}: not a checkout of yfyeung/icefall at branch clsp")
    stand_ins = {"k2": _k2(), "lhotse": _module("lhotse"), "lhotse.utils": _module("lhotse.utils")}
    stand_ins["lhotse.utils"].fix_random_seed = torch.manual_seed
    stand_ins["icefall"] = _module("icefall")
    stand_ins["icefall.utils"] = _module("icefall.utils")
    stand_ins["icefall.utils"].torch_autocast = _autocast
    stand_ins["icefall.utils"].make_pad_mask = _pad_mask
    stand_ins["encoder_interface"] = _module("encoder_interface")
    stand_ins["encoder_interface"].EncoderInterface = torch.nn.Module
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


def parts(modules: SimpleNamespace, file: str, names: Callable[[str], bool]) -> dict[str, Any]:
    """Those functions and constants of a file of egs/emilia/CLAP, which need nothing of what it imports but `re`."""
    path = Path(modules.model.__file__).parents[1] / file
    tree = ast.parse(path.read_text())
    found = {
        ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", ""): node
        for node in tree.body
    }
    tree.body = [node for name, node in found.items() if names(name)]
    defined: dict[str, Any] = {"re": re}
    exec(compile(tree, str(path), "exec"), defined)
    return defined


def _module(name: str) -> Any:
    return ModuleType(name)


@contextlib.contextmanager
def _autocast(device_type: str = "cpu", **options: Any) -> Iterator[None]:
    with torch.autocast("cpu", **options):
        yield


def _pad_mask(lengths: Tensor, max_len: int = 0) -> Tensor:  # bool [B, T], True past each end
    return torch.arange(max(max_len, int(lengths.max()))) >= lengths[:, None]


def _k2() -> Any:
    """Swoosh (Yao et al. 2024, "Zipformer", eq. 7 and 8) as k2 names it."""
    module = _module("k2")
    for name, offset, constant in (("l", 4.0, 0.035), ("r", 1.0, 0.313261687)):

        def forward(x: Tensor, offset: float = offset, constant: float = constant) -> Tensor:
            return torch.logaddexp(x.new_zeros(()), x - offset) - 0.08 * x - constant

        def with_slope(x: Tensor, offset: float = offset, forward: Any = forward) -> tuple[Tensor, Tensor]:
            return forward(x), torch.sigmoid(x - offset) - 0.08

        setattr(module, f"swoosh_{name}", forward)
        setattr(module, f"swoosh_{name}_forward", forward)
        setattr(module, f"swoosh_{name}_forward_and_deriv", with_slope)
    return module
