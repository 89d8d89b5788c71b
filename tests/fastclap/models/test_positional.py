"""The convolution over positions as matrix products is transformers' module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from fastclap.models import positional, wavlm
from fastclap.testing import assert_close_rel, relative_error


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic under test, also on a CPU."""
    monkeypatch.setattr(positional, "_use_products", lambda x: True)


def pair(
    channels: int = 32, groups: int = 4, kernel: int = 128, dtype: torch.dtype = torch.float64
) -> tuple[Any, positional.PositionalConvolution]:
    """transformers' module, and ours with a copy of its parameters."""
    from transformers import WavLMConfig
    from transformers.models.wavlm.modeling_wavlm import WavLMPositionalConvEmbedding

    torch.manual_seed(0)
    shape = {"num_conv_pos_embeddings": kernel, "num_conv_pos_embedding_groups": groups}
    reference = WavLMPositionalConvEmbedding(WavLMConfig(hidden_size=channels, **shape)).double()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.shape[:2] == (1, 1) else parameter.normal_()
    reference.to(dtype)
    assert positional.is_understood(reference)
    return reference, positional.PositionalConvolution(copy.deepcopy(reference))


def values(module: Any, x: Tensor) -> dict[str, Tensor]:
    """Result, and the gradient of the input and of every parameter."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = module(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (y * weight.to(y.dtype)).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def batch(clips: int, frames: int, channels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(clips, frames, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


@pytest.mark.parametrize("frames", [1, 15, 16, 37, 64, 150])
@pytest.mark.parametrize(
    ("channels", "groups", "kernel"),
    [(32, 4, 128), (24, 2, 16), (12, 12, 7), (8, 1, 1), (10, 5, 2), (12, 3, 31), (8, 2, 33), (6, 2, 95)],
)
def test_value_and_every_gradient_are_those_of_transformers(
    channels: int, groups: int, kernel: int, frames: int
) -> None:
    reference, own = pair(channels, groups, kernel)
    x = batch(3, frames, channels)
    expected, found = values(reference, x), values(own, x)
    assert found.keys() == expected.keys() and len(found) == 5
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert_close_rel(name, tensor, found[name], 1e-12)


def test_convolution_without_bias_and_gradcheck() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 19, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for inputs in ((x, weight, bias), (x, weight, None)):
        assert torch.autograd.gradcheck(lambda *given: positional.convolve_positions(*given, 2), inputs)
        expected = torch.nn.functional.conv1d(x.transpose(1, 2), weight, inputs[2], padding=4, groups=2)
        torch.testing.assert_close(positional.convolve_positions(*inputs, 2), expected[..., :-1].transpose(1, 2))


def test_float32_is_as_exact_as_the_convolution() -> None:
    exact = values(pair()[0], batch(2, 99, 32))
    reference, own = pair(dtype=torch.float32)
    x = batch(2, 99, 32, torch.float32)
    expected, found = values(reference, x), values(own, x)
    for name, tensor in exact.items():
        rounding = relative_error(tensor, expected[name])
        assert rounding < 1e-5
        assert_close_rel(name, tensor, found[name], max(1e-6, 2 * rounding))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """A convolution rounds inputs, weight and sum, √3 roundings; ours rounds nine growing sums, √(2 + Σ (i/9)) = 2.6.

    One rounding is at most eps / 2; activation and weight norm hardly change the relative error.
    """
    x = batch(2, 99, 32)
    exact = values(pair()[0], x)
    _, own = pair(dtype=torch.float32)

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return own(x)

    autocast.zero_grad, autocast.named_parameters = own.zero_grad, own.named_parameters  # type: ignore[attr-defined]
    found = values(autocast, x.float())
    assert found["y"].dtype == dtype
    assert all(tensor.dtype == torch.float32 for name, tensor in found.items() if name != "y")
    for name, tensor in exact.items():
        assert_close_rel(name, tensor, found[name].double(), 2.6 * torch.finfo(dtype).eps)
    with torch.autocast("cpu", dtype):  # autocast leaves float64 alone
        assert torch.equal(pair()[1](x), pair()[1](x)) and pair()[1](x).dtype == torch.float64


def test_sixteen_bit_model() -> None:
    x = batch(2, 40, 32)
    exact = values(pair()[0], x)
    _, own = pair(dtype=torch.bfloat16)
    found = values(own, x.bfloat16())
    for name, tensor in exact.items():
        assert found[name].dtype == torch.bfloat16
        assert_close_rel(name, tensor, found[name].double(), 5 * torch.finfo(torch.bfloat16).eps)


def test_clips_do_not_touch() -> None:
    _, own = pair()
    x = batch(3, 37, 32)
    alone = torch.cat([own(clip[None]) for clip in x])
    assert_close_rel("alone", alone, own(x), 1e-12)
    x[1] = torch.nan
    again = own(x)
    assert again[1].isnan().all() and torch.equal(again[::2], own(batch(3, 37, 32))[::2])


def test_strided_input_and_gradient() -> None:
    reference, own = pair()
    x = batch(32, 37, 3).transpose(0, 2)
    assert not x.is_contiguous()
    for name, tensor in values(reference, x).items():
        assert_close_rel(name, tensor, values(own, x)[name], 1e-12)
    x = batch(2, 37, 32).requires_grad_()
    own(x).sum().backward()  # an expanded gradient
    reference(again := x.detach().clone().requires_grad_()).sum().backward()
    assert_close_rel("x", again.grad, x.grad, 1e-12)


@pytest.mark.parametrize("trains", ["x", "weight", "bias"])
def test_gradients_that_are_not_wanted(trains: str) -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 20, 6), "weight": torch.randn(6, 3, 8), "bias": torch.randn(6)}
    for tensor in inputs.values():
        tensor.requires_grad_()
    positional.convolve_positions(*inputs.values(), 2).square().sum().backward()
    expected = inputs[trains].grad
    for name, tensor in inputs.items():
        tensor.requires_grad_(name == trains).grad = None
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        y = positional.convolve_positions(*inputs.values(), 2)
    y.square().sum().backward()
    assert [name for name, tensor in inputs.items() if tensor.grad is not None] == [trains]
    assert torch.equal(inputs[trains].grad, expected)
    assert len(saved) == (2 if trains == "weight" else 1)  # the input is kept for the weight's gradient alone


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    _, own = pair(dtype=torch.float32)
    x = batch(2, 40, 32, torch.float32)
    expected = values(own, x)
    own.compile(backend="aot_eager", fullgraph=True)
    for name, tensor in values(own, x).items():
        assert_close_rel(name, expected[name], tensor, 1e-5)
    torch._dynamo.reset()


def test_cached_parametrizations_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, own = pair()
    calls = []
    compute = type(own.conv.parametrizations.weight[0]).forward
    monkeypatch.setattr(
        type(own.conv.parametrizations.weight[0]), "forward", lambda *args: calls.append(1) or compute(*args)
    )
    x = batch(2, 20, 32)
    with torch.inference_mode(), parametrize.cached():
        first, second = own(x), own(x)
    assert len(calls) == 1 and torch.equal(first, second)
    assert torch.equal(own(x), first) and len(calls) == 2


def test_nothing_is_unfolded() -> None:
    """No tensor is larger than the matrices, or than the input with its zeros."""
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes() // out.element_size())
            return out

    weight = torch.randn(8, 2, 128, requires_grad=True)
    for clips, bound in ((1, 4 * 9 * 32 * 32), (64, 64 * 8 * (160 + 128))):
        x = torch.randn(clips, 160, 8, requires_grad=True)
        with Largest():
            positional.convolve_positions(x, weight, None, 4).sum().backward()
        assert 0 < largest <= bound


def test_a_cpu_takes_its_own_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    reference, own = pair()
    monkeypatch.setattr(positional, "convolve_positions", None)
    x = batch(2, 20, 32)
    assert torch.equal(own(x), reference(x))
    assert positional._use_products(torch.empty(1, device="meta"))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weight_norm_by_hooks_is_left_to_transformers() -> None:
    """The form before torch 2.1 computes the weight in a hook on the convolution."""
    from transformers import WavLMConfig, WavLMModel

    model = WavLMModel(
        WavLMConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=24,
            conv_dim=[8] * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
        )
    ).eval()
    audio = torch.randn(1, 2000)
    embedding = model.encoder.pos_conv_embed
    parametrize.remove_parametrizations(embedding.conv, "weight")
    plain, hooked = copy.deepcopy(model), model
    torch.nn.utils.weight_norm(embedding.conv, name="weight", dim=2)
    wavlm.accelerate(hooked)
    assert hooked.encoder.pos_conv_embed is embedding
    names = dict(hooked.encoder.pos_conv_embed.named_parameters())
    assert set(names) == {"conv.bias", "conv.weight_g", "conv.weight_v"}
    wavlm.accelerate(plain)
    assert isinstance(plain.encoder.pos_conv_embed, positional.PositionalConvolution)
    assert_close_rel("output", hooked(audio).last_hidden_state, plain(audio).last_hidden_state, 1e-5)
