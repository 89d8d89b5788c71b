"""The engines of waveform_convolution against float64: on a GPU, or the Triton one in its interpreter.

Every dtype meets every shape. On a GPU the float64 reference is computed there as well; the interpreter
(`TRITON_INTERPRET=1`) knows float32 and float16 only.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclap.kernels import waveform_convolution as module
from fastclap.kernels.waveform_convolution import waveform_convolution, waveform_convolution_reference
from fastclap.models import wavlm
from fastclap.testing import assert_close_rel
from tests.kernels.waveform_convolution_cases import CASES, NAMES, Case, tensors

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1 (`make test` runs it)"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
# In the interpreter the programs of one multiprocessor share the rows: less than a tile, several tiles a program.
MORE = [Case(1, 700, 20, 3, 2)] if INTERPRETED else [Case(3, 160_000, 512, 10, 5, 32_000)]
ENGINES = ("triton",) if INTERPRETED else ("triton", "torch")
FAMILY = Case(2, 203, 80, 10, 5, 45)
# Of the 16-bit types: rounding of the result, and of samples, weights and gradients before they are multiplied. The
# Triton engine rounds the weights less their mean over the channels, the reference has the weights as they are given.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# torch rounds what lies between its functions as well, and its float32 GEMMs sum in their own order.
TORCH_TOLERANCE = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """As the tolerances of float32 have it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def named(inputs: list[Any]) -> list[str]:
    return ["y", *(f"gradient of {name}" for name, x in zip(NAMES[1:], inputs[1:], strict=True) if x is not None)]


def with_gradients(function: Any, inputs: list[Any], upstream: Tensor) -> list[Tensor]:
    """The result, and the gradient of every parameter that is there."""
    leaves = [None if x is None else x.detach().to(DEVICE).requires_grad_(i > 0) for i, x in enumerate(inputs)]
    y = function(*leaves)
    leaves = [x for x in leaves[1:] if x is not None]
    return [y, *torch.autograd.grad(y, leaves, upstream.to(DEVICE, y.dtype))]


def expected(case: Case, inputs: list[Any], upstream: Tensor, eps: float = 1e-5) -> list[Tensor]:
    """In float64."""
    exact = [None if x is None else x.to(DEVICE, torch.float64) for x in inputs]
    function = partial(waveform_convolution_reference, stride=case.stride, rows=case.rows, eps=eps)
    return with_gradients(function, exact, upstream)


def run(case: Case, inputs: list[Any], upstream: Tensor, eps: float = 1e-5, engine: str = "triton") -> list[Tensor]:
    function = partial(waveform_convolution, stride=case.stride, rows=case.rows, eps=eps, backend=engine)
    found = with_gradients(function, inputs, upstream)
    assert found[0].is_contiguous()
    return found


def compare(
    case: Case, inputs: list[Any], upstream: Tensor, tol: float, eps: float = 1e-5, engine: str = "triton"
) -> None:
    pairs = zip(expected(case, inputs, upstream, eps), run(case, inputs, upstream, eps, engine), strict=True)
    for name, (one, other) in zip(named(inputs), pairs, strict=True):
        assert_close_rel(f"{name}, {case}, {other.dtype}", one, other, tol)


def in_dtype(dtype: torch.dtype, inputs: list[Any]) -> list[Any]:
    """Waveform, weight and bias in it; the norm's parameters as they are."""
    return [*(None if x is None else x.to(dtype) for x in inputs[:3]), *inputs[3:]]


@contextlib.contextmanager
def autocast_to(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast(DEVICE, dtype=dtype, enabled=dtype != torch.float32):
        yield


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", [*CASES, *MORE], ids=str)
def test_values_and_gradients_match_float64(case: Case, engine: str) -> None:
    inputs, upstream = tensors(case)
    for dtype in DTYPES:
        tol = (TOLERANCE if engine == "triton" else TORCH_TOLERANCE)[dtype]
        compare(case, in_dtype(dtype, inputs), upstream.to(dtype), tol, engine=engine)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_in_the_dtype_of_the_waveform_and_another_eps(dtype: torch.dtype) -> None:
    inputs, upstream = tensors(FAMILY)
    compare(FAMILY, [x.to(dtype) for x in inputs], upstream.to(dtype), TOLERANCE[dtype], eps=0.1)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast_rounds_samples_and_weights_but_no_parameters_gradient(dtype: torch.dtype) -> None:
    inputs, upstream = tensors(FAMILY)
    upstream = upstream.to(dtype)
    for audio in (torch.float32, dtype):
        with autocast_to(dtype):
            found = run(FAMILY, [inputs[0].to(audio), *inputs[1:]], upstream)
        assert found[0].dtype == dtype and all(x.dtype == torch.float32 for x in found[1:])
        assert any((x != x.to(dtype)).any() for x in found[1:])
        rounded = [*(x.to(dtype).float() for x in inputs[:3]), *inputs[3:]]
        for name, one, other in zip(named(inputs), expected(FAMILY, rounded, upstream), found, strict=True):
            assert_close_rel(name, one, other, TOLERANCE[dtype])


def test_what_all_channels_have_in_common_costs_no_digits() -> None:
    inputs, upstream = tensors(FAMILY)
    waveform, weight, bias, *norm = inputs
    # Adding to all weights rounds them: to 2⁻²⁴ of 1,000 beside weights of 0.3.
    compare(FAMILY, [waveform, weight + 1000.0, bias - 500.0, *norm], upstream, 3e-4)
    (y, *_), (shifted, *_) = (
        run(FAMILY, [waveform.half(), weight.half() + more, bias.half(), *norm], upstream) for more in (0.0, 2.0)
    )
    assert_close_rel("float16", y, shifted, 4e-3)  # of which the rounding of weights near 2 is 1e-3 beside 0.3
    saturated = [waveform, weight, bias, 1e4 * norm[0], norm[1]]
    compare(FAMILY, saturated, upstream, 1e-6)


def test_silence_is_finite() -> None:
    case = FAMILY._replace(bias=False)
    inputs, upstream = tensors(case)
    compare(case, [torch.zeros_like(inputs[0]), *inputs[1:]], upstream, 1e-6)
    quiet = 1e-6 * inputs[0]
    compare(case, [quiet, *inputs[1:]], upstream, 1e-6)


def test_a_gradient_beyond_float16_beside_a_small_deviation_is_summed() -> None:
    inputs, upstream = tensors(FAMILY._replace(bias=False))
    inputs = in_dtype(torch.float16, [1e-3 * inputs[0], *inputs[1:]])
    # dy / std is above 65,504, and so is its sum with the samples not
    compare(FAMILY._replace(bias=False), inputs, (1000 * upstream).half(), 2e-3)


def test_strided_clips_and_gradients_are_read_where_they_are() -> None:
    inputs, upstream = tensors(FAMILY)
    wanted = expected(FAMILY, inputs, upstream)
    wide = torch.full((4, 2 * 203), float("nan"))
    wide[::2, 100:303] = inputs[0]
    strided = wide.to(DEVICE)[::2, 100:303]
    assert strided.data_ptr() % 16 == 0 or not INTERPRETED
    alternate = torch.stack([inputs[0], inputs[0]], 2).to(DEVICE)[..., 0]
    for waveform in (strided, alternate, strided[:, :].t().contiguous().t()):
        leaves = [x.to(DEVICE).requires_grad_() for x in inputs[1:]]
        y = waveform_convolution(waveform, *leaves, 5, FAMILY.rows, backend="triton")
        turned = upstream.to(DEVICE).transpose(0, 2).contiguous().transpose(0, 2)
        found = [y, *torch.autograd.grad(y, leaves, turned)]
        for name, one, other in zip(named(inputs), wanted, found, strict=True):
            assert_close_rel(name, one, other, 1e-6)
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs[1:]]
    waveform_convolution(strided, *leaves, 5, backend="triton").sum().backward()  # its gradient is one number, expanded
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


def test_partial_gradients_equal_the_full_ones() -> None:
    case = Case(2, 63, 20, 10, 5)
    inputs, upstream = tensors(case)
    full = run(case, inputs, upstream)[1:]
    waveform, *parameters = (x.to(DEVICE) for x in inputs)
    call = partial(waveform_convolution, stride=5, backend="triton")
    for need in itertools.product((True, False), repeat=4):
        if any(need):
            leaves = [x.clone().requires_grad_(wanted) for x, wanted in zip(parameters, need, strict=True)]
            call(waveform, *leaves).backward(upstream.to(DEVICE))
            for leaf, wanted, gradient in zip(leaves, need, full, strict=True):
                assert (leaf.grad is not None) == wanted
                assert leaf.grad is None or torch.equal(leaf.grad, gradient)
    assert not call(waveform, *parameters).requires_grad
    with torch.no_grad():  # a waveform's gradient is then nobody's
        assert torch.equal(call(waveform.clone().requires_grad_(), *parameters), call(waveform, *parameters))


def test_uninitialised_memory_is_never_read_and_runs_are_bit_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    pairs = zip if INTERPRETED else itertools.product  # each shape and each dtype, or each with each
    for case, dtype in pairs((FAMILY, CASES[3]), DTYPES):
        inputs, upstream = tensors(case)
        first, second = (run(case, in_dtype(dtype, inputs), upstream) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert one.isfinite().all() and torch.equal(one, other), (case, dtype)


def test_a_row_that_is_not_finite_stays_alone() -> None:
    inputs, _ = tensors(FAMILY)
    waveform, *parameters = (x.to(DEVICE) for x in inputs)
    clean = waveform_convolution(waveform, *parameters, 5, backend="triton")
    waveform = waveform.clone()
    waveform[1, 52] = float("inf")  # of rows 9 and 10
    y = waveform_convolution(waveform, *parameters, 5, backend="triton")
    assert y[1, 9:11].isnan().all()
    y[1, 9:11] = clean[1, 9:11]
    assert torch.equal(y, clean)


def test_nothing_in_nothing_out() -> None:
    (waveform, *parameters), _ = tensors(FAMILY)
    leaves = [x.to(DEVICE).requires_grad_() for x in parameters]
    y = waveform_convolution(waveform[:0].to(DEVICE), *leaves, 5, 7, backend="triton")
    y.sum().backward()
    assert y.shape == (0, 7, 80) and all(x.grad is not None and not x.grad.any() for x in leaves)


def test_a_second_differentiation_is_refused() -> None:
    (waveform, *parameters), _ = tensors(FAMILY)
    leaves = [x.to(DEVICE).requires_grad_() for x in parameters]
    y = waveform_convolution(waveform.to(DEVICE), *leaves, 5, backend="triton")
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(y.sum(), leaves, create_graph=True)


def test_operators_are_registered_properly_and_a_compiled_graph_stays_whole() -> None:
    torch._dynamo.reset()  # other tests of this process compile the same function at other shapes
    inputs, upstream = tensors(FAMILY)
    waveform, weight, bias, *norm = (x.to(DEVICE) for x in inputs)
    filters, upstream = module._centred(weight, bias), upstream.to(DEVICE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    options = (5, 45, 1e-5, torch.float32)
    leaves = [x.clone().requires_grad_() for x in (filters, *norm)]
    torch.library.opcheck(torch.ops.fastclap.waveform_convolution, (waveform, *leaves, *options), test_utils=checks)
    _, inverse_std = torch.ops.fastclap.waveform_convolution(waveform, filters, *norm, *options)
    arguments = (upstream, waveform, filters, *norm, inverse_std, 5)
    torch.library.opcheck(torch.ops.fastclap.waveform_convolution_backward, arguments, test_utils=checks)

    for backend in ("triton", "auto"):
        call = partial(waveform_convolution, stride=5, rows=45, backend=backend)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        for one, other in zip(run(FAMILY, inputs, upstream), with_gradients(compiled, inputs, upstream), strict=True):
            assert torch.equal(one, other) if backend == "triton" else torch.allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("bias", (True, False))
def test_the_convolution_stack_of_wavlm_goes_through_it(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import WavLMConfig
    from transformers.models.wavlm.modeling_wavlm import WavLMFeatureEncoder

    shapes = {"conv_dim": [24] * 3, "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2]}
    encoder = WavLMFeatureEncoder(WavLMConfig(feat_extract_norm="layer", conv_bias=bias, **shapes)).to(DEVICE)
    stack = wavlm.ConvolutionStack(encoder)
    calls: list[int] = []

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments[6])
        return waveform_convolution(*arguments, backend="triton")

    monkeypatch.setattr(wavlm, "waveform_convolution", counted)
    waveform = torch.randn(2, 434, device=DEVICE)
    expected = encoder(waveform)
    wanted = torch.autograd.grad(expected.square().sum(), list(encoder.parameters()))
    y = stack(waveform)
    assert calls == [88]  # 85 frames, and up to a multiple of the strides that follow
    assert_close_rel("features", expected, y, 1e-5)
    found = torch.autograd.grad(y.square().sum(), list(stack.parameters()))
    for (name, _), one, other in zip(stack.named_parameters(), wanted, found, strict=True):
        assert_close_rel(name, one, other, 1e-4)


@pytest.mark.skipif(INTERPRETED, reason="in the interpreter products are exact")
def test_float32_follows_the_precision_of_torch() -> None:
    inputs, upstream = tensors(CASES[1])
    wanted = expected(CASES[1], inputs, upstream)
    torch.set_float32_matmul_precision("high")
    found = run(CASES[1], inputs, upstream)
    for name, one, other in zip(named(inputs), wanted, found, strict=True):
        assert_close_rel(name, one, other, 4e-3)
    assert not torch.allclose(wanted[0].float(), found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="on a CPU the waveform's gradient is the torch engine's anyway")
def test_a_gradient_of_the_waveform_is_the_torch_engines() -> None:
    inputs, upstream = tensors(FAMILY)
    leaves = [x.cuda().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    y, reference = (
        function(*given, 5, FAMILY.rows)
        for function, given in ((waveform_convolution, leaves), (waveform_convolution_reference, exact))
    )
    grads = (torch.autograd.grad(out, given, upstream.to(out)) for out, given in ((reference, exact), (y, leaves)))
    for name, one, other in zip(NAMES, *grads, strict=True):
        assert_close_rel(name, one, other, 1e-5)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_graph_replays_forward_and_backward(dtype: torch.dtype) -> None:
    inputs, upstream = tensors(CASES[1]._replace(bias=True))
    waveform, *leaves = (x.to("cuda", dtype) for x in inputs)
    leaves, upstream = [x.requires_grad_() for x in leaves], upstream.to("cuda", dtype)

    def step() -> list[Tensor]:
        y = waveform_convolution(waveform, *leaves, 5, 128)
        return [y, *torch.autograd.grad(y, leaves, upstream)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = [x.clone() for x in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(eager, captured, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="is for GPUs")
def test_the_host_does_not_wait() -> None:
    inputs, upstream = tensors(CASES[0])
    waveform, *leaves = (x.cuda() for x in inputs)
    leaves, upstream = [x.requires_grad_() for x in leaves], upstream.cuda()
    call = functools.partial(waveform_convolution, waveform, *leaves, 5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call().backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
