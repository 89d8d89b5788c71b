"""The engines of layer_norm_gelu against float64: on a GPU, or the Triton one in its interpreter.

Every dtype meets every shape. On a GPU the float64 reference is computed there as well; the interpreter
(`TRITON_INTERPRET=1`) knows float32 and float16 only.
"""

from __future__ import annotations

import itertools
import math
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.kernels.layer_norm_gelu import layer_norm_gelu, layer_norm_gelu_reference
from fastclap.testing import assert_close_rel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1 (`make test` runs it)"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
# In the interpreter four programs share the rows: one row, less than a tile, several tiles a program.
SHAPES = [(1, 1), (2, 1), (5, 3), (127, 7), (1000, 24), (2, 3, 100), (23, 512), (3, 1023), (2, 4096), (6, 8192)]
SHAPES += [] if INTERPRETED else [(20_001, 512), (1_500, 8192)]
ENGINES = ("triton",) if INTERPRETED else ("triton", "torch")
# Of the 16-bit types: rounding of the results.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
# torch rounds what lies between its two functions as well, and sums the gradients of the parameters in its own order.
TORCH_TOLERANCE = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
NAMES = ("x", "weight", "bias")


def tensors(*shape: int) -> tuple[list[Tensor], Tensor]:
    """x, weight and bias, and the gradient of y."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, upstream = torch.randn(2, *shape, generator=generator)
    return [2 * x + 1, *torch.randn(2, shape[-1], generator=generator)], upstream


def expected(inputs: list[Tensor | None], upstream: Tensor, eps: float = 1e-5) -> list[Tensor]:
    """y and the gradients of what is there, in float64."""
    leaves = [None if t is None else t.detach().to(DEVICE, torch.float64).requires_grad_() for t in inputs]
    y = layer_norm_gelu_reference(leaves[0], leaves[1], leaves[2], eps)  # type: ignore[arg-type]
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], upstream.to(DEVICE, torch.float64))]


def run(inputs: list[Tensor | None], upstream: Tensor, eps: float = 1e-5, engine: str = "triton") -> list[Tensor]:
    leaves = [None if t is None else t.detach().to(DEVICE).requires_grad_() for t in inputs]
    y = layer_norm_gelu(leaves[0], leaves[1], leaves[2], eps, backend=engine)  # type: ignore[arg-type]
    assert y.dtype == leaves[0].dtype and y.is_contiguous()  # type: ignore[union-attr]
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], upstream.to(DEVICE, y.dtype))]


def compare(
    inputs: list[Tensor | None],
    upstream: Tensor,
    tol: float,
    label: object,
    eps: float = 1e-5,
    engine: str = "triton",
) -> None:
    names = ["y"] + [f"gradient of {name}" for name, t in zip(NAMES, inputs, strict=True) if t is not None]
    found = run(inputs, upstream, eps, engine)
    for name, one, other in zip(names, expected(inputs, upstream, eps), found, strict=True):
        assert_close_rel(f"{name}, {label}", one, other, tol)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_match_float64(shape: tuple[int, ...], engine: str) -> None:
    inputs, upstream = tensors(*shape)
    for dtype in DTYPES:
        tol = (TOLERANCE if engine == "triton" else TORCH_TOLERANCE)[dtype]
        compare([t.to(dtype) for t in inputs], upstream.to(dtype), tol, (shape, dtype), engine=engine)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absent_and_float32_parameters(dtype: torch.dtype) -> None:
    (x, weight, bias), upstream = tensors(50, 24)
    for w, b in itertools.product((weight, None, weight.to(dtype)), (bias, None)):
        compare([x.to(dtype), w, b], upstream.to(dtype), TOLERANCE[dtype], (w is None, b is None), eps=0.1)


def test_large_means_and_extreme_values_keep_their_digits() -> None:
    (x, weight, bias), upstream = tensors(40, 100)
    # The variance is taken about the mean: a mean of 1,000 deviations costs what rounding x itself costs.
    compare([x + 2000.0, weight, bias], upstream, 2e-4, "far from zero")
    compare([x, 1e4 * weight, bias], upstream, 2e-6, "saturated")
    constant = torch.full((3, 24), 5.0)
    compare([constant, weight[:24], bias[:24]], upstream[:3, :24], 1e-6, "constant rows")


def test_tails_and_small_values_keep_their_digits() -> None:
    """Where 1 + erf(z / √2) has none left: torch is off by 100% at z = -10. Errors of the polynomials at such z."""
    (x, weight, bias), upstream = tensors(40, 100)
    for level, tol in ((-3.0, 2e-6), (-6.0, 5e-6), (-10.0, 7e-4)):
        compare([x, 0.3 * weight, 0.1 * bias + level], upstream, tol, level)
    compare([x, 1e-4 * weight, 0 * bias], upstream, 1e-6, "small values")
    half = torch.float16
    compare([x.to(half), (0.3 * weight).to(half), (0.1 * bias - 3).to(half)], upstream.to(half), 6e-4, "float16")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_comes_out_as_with_torch(dtype: torch.dtype) -> None:
    (x, weight, bias), upstream = tensors(12, 24)
    weight[:3] = torch.tensor([math.inf, -math.inf, math.nan])
    bias[3:6] = torch.tensor([math.inf, -math.inf, math.nan])
    x[2, 9], x[5, 9] = math.inf, math.nan
    # Double: on some processors torch's gelu of a float32 infinity is NaN.
    leaves = [t.to(DEVICE, dtype).double().requires_grad_() for t in (x, weight, bias)]
    y = F.gelu(F.layer_norm(leaves[0], (24,), leaves[1], leaves[2]))
    wanted = [y, *torch.autograd.grad(y, leaves, upstream.to(DEVICE, dtype).double())]
    for name, one, other in zip(
        ("y", *NAMES), wanted, run([t.to(dtype) for t in (x, weight, bias)], upstream), strict=True
    ):
        assert torch.equal(one.isnan(), other.isnan()), name
        assert torch.equal(one.isposinf(), other.isposinf()) and torch.equal(one.isneginf(), other.isneginf()), name
    assert y.isposinf().any() and y.isnan().any() and y.isfinite().any()


def test_strided_inputs_and_gradients_are_read_where_they_are() -> None:
    (x, weight, bias), upstream = tensors(60, 48)
    wanted = expected([x[:, :24], weight[:24], bias[::2]], upstream[:, ::2])
    leaf = x.to(DEVICE).clone().requires_grad_()
    parameters = [weight.to(DEVICE), bias.to(DEVICE)]
    y = layer_norm_gelu(leaf[:, :24], parameters[0][:24], parameters[1][::2], backend="triton")
    y.backward(upstream.to(DEVICE)[:, ::2])
    assert leaf.grad is not None
    assert_close_rel("rows at a distance", wanted[0], y, 1e-6)
    assert_close_rel("gradient", wanted[1], leaf.grad[:, :24], 1e-6)
    assert not leaf.grad[:, 24:].any()
    wanted = expected([x.t(), None, None], torch.ones(48, 60))
    leaf = x.to(DEVICE).clone().requires_grad_()
    y = layer_norm_gelu(leaf.t(), backend="triton")
    y.sum().backward()  # the gradient of y is one number, expanded
    assert leaf.grad is not None
    assert_close_rel("transposed", wanted[0], y, 1e-6)
    assert (leaf.grad.t() - wanted[1]).abs().max() < 1e-5


def test_partial_gradients_equal_the_full_ones() -> None:
    inputs, upstream = tensors(50, 24)
    full = run([*inputs], upstream)[1:]
    for need in itertools.product((True, False), repeat=3):
        if any(need):
            leaves = [t.to(DEVICE).clone().requires_grad_(wanted) for t, wanted in zip(inputs, need, strict=True)]
            y = layer_norm_gelu(*leaves, backend="triton")
            y.backward(upstream.to(DEVICE))
            for leaf, wanted, gradient in zip(leaves, need, full, strict=True):
                assert (leaf.grad is not None) == wanted
                assert leaf.grad is None or torch.equal(leaf.grad, gradient)
    assert not layer_norm_gelu(*(t.to(DEVICE) for t in inputs), backend="triton").requires_grad


def test_uninitialised_memory_is_never_read_and_runs_are_bit_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    pairs = zip if INTERPRETED else itertools.product  # each shape and each dtype, or each with each
    for shape, dtype in pairs(((1000, 24), (3, 1023)), DTYPES):
        inputs, upstream = tensors(*shape)
        first, second = (run([t.to(dtype) for t in inputs], upstream) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert one.isfinite().all() and torch.equal(one, other), (shape, dtype)


def test_a_row_that_is_not_finite_stays_alone() -> None:
    (x, weight, bias), upstream = tensors(50, 24)
    clean = run([x, weight, bias], upstream)
    x = x.clone()
    x[7, 3] = float("inf")
    y, dx, *_ = run([x, weight, bias], upstream)
    others = torch.arange(50, device=DEVICE) != 7
    assert y[7].isnan().all() and dx[7].isnan().all()
    assert torch.equal(y[others], clean[0][others]) and torch.equal(dx[others], clean[1][others])


def test_nothing_in_nothing_out() -> None:
    weight = torch.ones(24, device=DEVICE, requires_grad=True)
    y = layer_norm_gelu(torch.empty(0, 24, device=DEVICE), weight, backend="triton")
    y.sum().backward()
    assert y.shape == (0, 24) and weight.grad is not None and not weight.grad.any()


def test_a_second_differentiation_is_refused() -> None:
    x = torch.randn(3, 24, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(layer_norm_gelu(x, backend="triton").sum(), x, create_graph=True)


def test_operators_are_registered_properly_and_a_compiled_graph_stays_whole() -> None:
    inputs, upstream = tensors(2, 5, 24)
    leaves = [t.to(DEVICE).clone().requires_grad_() for t in inputs]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastclap.layer_norm_gelu, (*leaves, 1e-5), test_utils=checks)
    torch.library.opcheck(torch.ops.fastclap.layer_norm_gelu, (leaves[0], None, None, 1e-5), test_utils=checks)
    plain = [t.detach() for t in leaves]
    _, mean, inverse_std = torch.ops.fastclap.layer_norm_gelu(*plain, 1e-5)
    for need in ([True, True, True], [True, False, True], [False, True, False]):
        arguments = (upstream.to(DEVICE), *plain, mean, inverse_std, need)
        torch.library.opcheck(torch.ops.fastclap.layer_norm_gelu_backward, arguments, test_utils=checks)

    for backend in ("triton", "auto"):
        compiled = torch.compile(partial(layer_norm_gelu, backend=backend), backend="aot_eager", fullgraph=True)
        y = compiled(*leaves)
        results = [y, *torch.autograd.grad(y, leaves, upstream.to(DEVICE))]
        for one, other in zip(run([*inputs], upstream), results, strict=True):
            assert torch.equal(one, other) if backend == "triton" else torch.allclose(one, other, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="autocast of the fused engine is for GPUs")
def test_autocast_changes_nothing() -> None:
    (x, weight, bias), _ = tensors(50, 24)
    x, weight, bias = x.cuda(), weight.cuda(), bias.cuda()
    for dtype in (torch.bfloat16, torch.float32):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            cast = layer_norm_gelu(x.to(dtype), weight, bias)
            plain = layer_norm_gelu(x.to(dtype), weight, bias, backend="torch")
        assert cast.dtype == plain.dtype == dtype
        assert torch.equal(cast, layer_norm_gelu(x.to(dtype), weight, bias))
        assert_close_rel("torch engine", plain, cast, TOLERANCE[dtype])


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_graph_replays_forward_and_backward(dtype: torch.dtype) -> None:
    inputs, upstream = tensors(1000, 512)
    leaves = [t.to("cuda", dtype).requires_grad_() for t in inputs]
    upstream = upstream.to("cuda", dtype)

    def step() -> list[Tensor]:
        y = layer_norm_gelu(*leaves)
        return [y, *torch.autograd.grad(y, leaves, upstream)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = [t.clone() for t in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(eager, captured, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="is for GPUs")
def test_the_host_does_not_wait() -> None:
    inputs, upstream = tensors(100, 512)
    leaves, upstream = [t.cuda().requires_grad_() for t in inputs], upstream.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer_norm_gelu(*leaves).backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
