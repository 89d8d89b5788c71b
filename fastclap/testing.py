"""Assertions shared by the test suite and by anyone who ports a loss or a front-end onto fastclap."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def relative_error(reference: Tensor, out: Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in float64; the absolute norm when the reference is all zero."""
    reference64, out64 = reference.detach().double().cpu(), out.detach().double().cpu()
    scale = reference64.norm().item()
    return (out64 - reference64).norm().item() / (scale if scale > 0 else 1.0)


def assert_close_rel(name: str, reference: Tensor, out: Tensor, tol: float) -> None:
    """Assert that `out` is within the relative error `tol` of `reference`, naming the tensor on failure.

    Args:
        name: what the tensor is, for the message.
        reference: the trusted value, any floating dtype.
        out: the value under test, same shape.
        tol: largest admissible ‖out − reference‖ / ‖reference‖.
    """
    assert tuple(out.shape) == tuple(reference.shape), (
        f"{name}: shape {tuple(out.shape)}, expected {tuple(reference.shape)}"
    )
    error = relative_error(reference, out)
    assert error <= tol, f"{name}: relative error {error:.3e} exceeds {tol:.1e}"  # NaN fails the comparison too


@contextmanager
def host_syncs() -> Iterator[list[str]]:
    """Collect the operations that would make the host wait for a GPU, while the code runs on a CPU.

    These are the ones whose result the host needs before it can go on: reading a scalar (`.item()`, `bool(x)`),
    shapes that depend on values (`nonzero`, `masked_select`, `unique`), and a boolean mask as an index. Backward
    passes are covered as well. Reading a tensor as a whole (`.tolist()`, `.cpu()`, `.numpy()`) runs no operation
    on a CPU and is not seen; on a GPU `torch.cuda.set_sync_debug_mode("error")` finds those too.

    Yields:
        A list that grows by one `"operation at file:line"` each time.
    """
    found: list[str] = []
    with _SyncRecorder(found):
        yield found


class _SyncRecorder(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if _needs_the_host(func, args):
            library = str(Path(torch.__file__).parent)
            own = [frame for frame in traceback.extract_stack()[:-1] if not frame.filename.startswith(library)]
            self.found.append(f"{func} at {own[-1].filename}:{own[-1].lineno}")
        return func(*args, **(kwargs or {}))


def _needs_the_host(func: Any, args: Sequence[Any]) -> bool:
    aten = torch.ops.aten
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        # writing one value under a mask is a masked_fill
        return masks and (func.overloadpacket is aten.index or args[2].numel() != 1)
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
