"""The Triton engine of down- and upsampling against float64: on a GPU, or in Triton's interpreter.

On a GPU the float64 reference is computed there as well; the interpreter (`TRITON_INTERPRET=1`) knows float32 and
float16 only.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclap.kernels.resampling import (
    downsample,
    downsample_reference,
    upsample_bypass,
    upsample_bypass_reference,
)
from fastclap.testing import assert_close_rel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1 (`make test` runs it)"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
LOW = torch.float16 if INTERPRETED else torch.bfloat16
# Lengths of the groups, columns, and the most rows of a group: one row; short groups between; more groups than
# programs.
CASES = [((1,), 1, 2), ((3, 3, 1, 2, 3, 1), 40, 3), ((8, 8, 5), 130, 8), ((2, 1) * 10, 1280, 2)]
CASES += [] if INTERPRETED else [((4,) * 5_000 + (1,), 1280, 4)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def tensors(groups: Sequence[int], columns: int, size: int) -> dict[str, Tensor]:
    """Leaves of both operators, the gradients of their results, and `first`."""
    rows, generator = sum(groups), torch.Generator().manual_seed(sum(groups) + columns)
    sizes = {"high": (rows, columns), "weights": (size,), "low": (len(groups), columns), "scale": (columns,)}
    sizes |= {"of low": sizes["low"], "of high": sizes["high"]}
    found = {name: torch.randn(shape, generator=generator).to(DEVICE) for name, shape in sizes.items()}
    first = torch.cat((torch.zeros(1, dtype=torch.long), torch.tensor(groups).cumsum(0))).int()
    return {**found, "first": first.to(DEVICE)}


WAYS = {
    "down": (("high", "weights"), "of low", downsample, downsample_reference),
    "up": (("high", "low", "scale"), "of high", upsample_bypass, upsample_bypass_reference),
}


def run(function: Any, leaves: Sequence[Tensor], first: Tensor, upstream: Tensor, dtype: Any = None) -> list[Tensor]:
    """The result and every gradient."""
    leaves = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in leaves]
    y = function(*leaves, first)
    return [y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def triton(function: Any) -> Any:
    return lambda *arguments: function(*arguments, backend="triton")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("groups", "columns", "size"), CASES, ids=str)
def test_values_and_gradients_match_float64(groups: tuple[int, ...], columns: int, size: int, way: str) -> None:
    t = tensors(groups, columns, size)
    names, of_result, function, reference = WAYS[way]
    for dtypes in ((torch.float32,) * 3, (LOW,) * 3, (torch.float32, LOW, torch.float32)):
        leaves = [t[name].to(dtype) for name, dtype in zip(names, dtypes, strict=False)]
        upstream = t[of_result].to(leaves[0].dtype)
        for first in (t["first"], t["first"].long()):
            wanted = run(reference, leaves, first, upstream, torch.float64)
            found = run(triton(function), leaves, first, upstream)
            for name, of, one, other in zip(("y", *names), (leaves[0], *leaves), wanted, found, strict=True):
                assert other.dtype == of.dtype
                assert_close_rel(f"{name}, {dtypes}", one, other, TOLERANCE[of.dtype])


@pytest.mark.parametrize("way", WAYS)
def test_strides_repeats_and_partial_gradients(way: str) -> None:
    t = tensors((3, 1, 2), 24, 3)
    names, of_result, function, reference = WAYS[way]
    leaves, first = [t[name] for name in names], t["first"]
    full = run(triton(function), leaves, first, t[of_result])
    spread = [torch.stack((leaf, torch.full_like(leaf, torch.nan)), -1)[..., 0] for leaf in leaves]
    again = run(triton(function), spread, first, t[of_result])
    assert all(one.isfinite().all() and torch.equal(one, other) for one, other in zip(full, again, strict=True))
    ones = torch.ones((), device=DEVICE).expand(t[of_result].shape)
    for one, other in zip(
        run(reference, leaves, first, ones, torch.float64), run(triton(function), leaves, first, ones), strict=True
    ):
        assert_close_rel(way, one, other, 2e-6)
    for need in itertools.product((True, False), repeat=len(names)):
        used = [leaf.clone().requires_grad_(wanted) for leaf, wanted in zip(leaves, need, strict=True)]
        y = triton(function)(*used, first)
        wanted = [leaf for leaf in used if leaf.requires_grad]
        found = torch.autograd.grad(y, wanted, t[of_result]) if wanted else ()
        for one, other in zip(itertools.compress(full[1:], need), found, strict=True):
            assert torch.equal(one, other), need


@pytest.mark.parametrize("way", WAYS)
def test_a_second_differentiation_is_refused_and_autocast_changes_nothing(way: str) -> None:
    t = tensors((3, 1), 24, 3)
    names, of_result, function, _ = WAYS[way]
    leaves = [t[name].clone().requires_grad_() for name in names]
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(triton(function)(*leaves, t["first"]).sum(), leaves, create_graph=True)
    plain = run(triton(function), leaves, t["first"], t[of_result])
    with torch.autocast(DEVICE, dtype=LOW):
        assert all(map(torch.equal, plain, run(triton(function), leaves, t["first"], t[of_result])))


def test_operators_are_registered_properly() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    t, operators = tensors((3, 1), 24, 3), torch.ops.fastclap
    for (names, of_result, _, _), name in zip(WAYS.values(), ("downsample", "upsample_bypass"), strict=True):
        leaves = [t[leaf].clone().requires_grad_() for leaf in names]
        torch.library.opcheck(getattr(operators, name), (*leaves, t["first"]), test_utils=checks)
        for needed in (True, False):
            arguments = (t[of_result], *(leaf.detach() for leaf in leaves), t["first"], needed)
            torch.library.opcheck(getattr(operators, f"{name}_backward"), arguments, test_utils=checks)


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_graph_stays_whole(way: str) -> None:
    torch._dynamo.reset()
    t = tensors((3, 1), 24, 3)
    names, of_result, function, _ = WAYS[way]
    leaves = [t[name] for name in names]
    eager = run(triton(function), leaves, t["first"], t[of_result])
    for backend in ("triton", "auto"):

        def call(*arguments: Any, backend: str = backend) -> Tensor:
            return function(*arguments, backend=backend)

        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        for one, other in zip(eager, run(compiled, leaves, t["first"], t[of_result]), strict=True):
            assert torch.equal(one, other) if backend == "triton" else torch.allclose(one, other, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="is for GPUs")
@pytest.mark.parametrize("way", WAYS)
def test_the_host_does_not_wait(way: str) -> None:
    t = tensors((4, 4, 1) * 50, 1280, 4)
    names, of_result, function, _ = WAYS[way]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(function, [t[name] for name in names], t["first"], t[of_result])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.isfinite().all() for x in found)
