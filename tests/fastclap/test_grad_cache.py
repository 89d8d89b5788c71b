"""GradCache against one graph over the same chunks: gradients, random states, statistics, memory errors."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastclap
from fastclap.grad_cache import GradCache, is_out_of_memory
from fastclap.losses import info_nce
from fastclap.testing import assert_close_rel


class Noisy(nn.Module):
    """Draws from every global generator, as dropout and wav2vec2's SpecAugment do, and writes into its input."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(dim, 32), nn.BatchNorm1d(32), nn.Linear(32, 8)
        self.dropout = nn.Dropout(0.3)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x.shape[0])
        x += 1
        x = self.dropout(self.norm(self.first(x)).tanh())
        x = x * float(np.random.rand() > 0.5) + x * random.random()
        return self.last(x)


class Pair(nn.Module):
    """Two towers and a scale in one module, reached through its methods."""

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.text = Noisy(6), Noisy(4)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def encode_audio(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.audio(x) if lengths is None else self.audio(x) * lengths[:, None]

    def encode_text(self, x: Tensor) -> Tensor:
        return self.text(x)

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        return info_nce(a, b, self.log_scale.exp(), a_ids=torch.arange(len(a)) % 9, b_ids=torch.arange(len(b)) % 9)


@pytest.fixture
def model() -> Pair:
    torch.manual_seed(0)
    return Pair()


def seed_all() -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)


def batches() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 6, generator=generator), torch.randn(14, 4, generator=generator)


def uncached(model: Pair, sizes: tuple[int, int]) -> Tensor:
    """The same chunks in one graph."""
    audio, text = batches()
    a = torch.cat([model.encode_audio(chunk.clone()) for chunk in audio.split(sizes[0])])
    b = torch.cat([model.encode_text(chunk.clone()) for chunk in text.split(sizes[1])])
    loss = model.loss(a, b)
    loss.backward()
    return loss.detach()


def state(model: nn.Module) -> dict[str, Tensor]:
    """Gradients and buffers, and what comes next from each generator."""
    values = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    values.update({name: buffer.clone().double() for name, buffer in model.named_buffers()})
    draws = [torch.rand(1).item(), float(np.random.rand()), random.random()]
    return {**values, "next draws": torch.tensor(draws)}


def compare(expected: dict[str, Tensor], out: dict[str, Tensor], tol: float = 2e-6) -> None:
    assert expected.keys() == out.keys()
    for name, value in expected.items():
        # A bias before BatchNorm has no gradient but rounding.
        if value.norm() < 1e-6:
            assert out[name].norm() < 1e-6, name
        else:
            assert_close_rel(name, value, out[name], tol)


@pytest.mark.parametrize("sizes", [(12, 14), (4, 4), (3, 5), (100, 2)], ids=str)
def test_cached_equals_uncached_with_dropout_and_batch_norm(model: Pair, sizes: tuple[int, int]) -> None:
    seed_all()
    expected_loss = uncached(model, sizes)
    expected = state(model)
    torch.manual_seed(0)
    other = Pair()
    inputs = batches()
    seed_all()
    cache = fastclap.GradCache([other.encode_audio, other.encode_text], sizes, other.loss)
    loss = cache(*inputs)
    assert not loss.requires_grad
    assert_close_rel("loss", expected_loss, loss, 1e-6)
    compare(expected, state(other))
    assert torch.equal(inputs[0], batches()[0]), "the tower wrote into the caller's input"
    assert all(layer.track_running_stats for layer in (other.audio.norm, other.text.norm))


def test_cached_equals_uncached_through_wavlms_own_spec_augment(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers draws WavLM's SpecAugment masks and its layer drop from NumPy and torch, besides dropout."""
    from transformers import WavLMConfig, WavLMModel
    from transformers.models.wavlm import modeling_wavlm

    masks = []
    draw = modeling_wavlm._compute_mask_indices
    monkeypatch.setattr(
        modeling_wavlm, "_compute_mask_indices", lambda *a, **k: masks.append(draw(*a, **k)) or masks[-1]
    )
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(16, 16),
        conv_kernel=(10, 4), conv_stride=(8, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, mask_time_prob=0.4, mask_time_length=3, hidden_dropout=0.2,
        layerdrop=0.3, num_buckets=8, max_bucket_distance=16,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    waveform, text = torch.randn(7, 1600, generator=generator), torch.randn(7, 16, generator=generator)
    results = []
    for cached in (False, True):
        torch.manual_seed(0)
        tower, head = WavLMModel(config).train(), nn.Linear(16, 16)

        def encode(x: Tensor, tower: nn.Module = tower) -> Tensor:
            return tower(x).last_hidden_state.mean(1)

        seed_all()
        if cached:
            loss = GradCache([encode, head], 3, lambda a, b: info_nce(a, b, 9.0), modules=[tower, head])(waveform, text)
        else:
            a = torch.cat([encode(chunk) for chunk in waveform.split(3)])
            b = torch.cat([head(chunk) for chunk in text.split(3)])
            loss = info_nce(a, b, 9.0)
            loss.backward()
        results.append((loss.detach(), {**state(tower), **{f"head {k}": v for k, v in state(head).items()}}))
    assert_close_rel("loss", results[0][0], results[1][0], 1e-6)
    compare(results[0][1], results[1][1], tol=2e-5)
    plain, replayed = masks[:3], masks[3:]
    assert any(mask.any() for mask in plain)
    for first, again in zip([*plain, plain[0], plain[2]], replayed, strict=True):  # the second kept its graph
        assert (first == again).all()


def test_gradients_accumulate_over_calls(model: Pair) -> None:
    seed_all()
    for _ in range(2):
        uncached(model, (4, 4))
    expected = state(model)
    torch.manual_seed(0)
    other = Pair()
    seed_all()
    cache = GradCache([other.encode_audio, other.encode_text], 4, other.loss)
    cache(*batches())
    first = {p: p.grad for p in other.parameters()}
    cache(*batches())
    compare(expected, state(other))
    assert all(p.grad is first[p] for p in other.parameters()), "a gradient tensor was exchanged for another"


def test_dict_inputs_and_their_other_values(model: Pair) -> None:
    model.eval()
    audio, text = batches()
    lengths = torch.linspace(0.5, 1.5, 12)
    cache = GradCache([model.encode_audio, model.encode_text], 4, model.loss)
    seed_all()
    loss = cache({"x": audio, "lengths": lengths}, {"x": text})
    seed_all()
    a = torch.cat([model.encode_audio(x.clone(), n) for x, n in zip(audio.split(4), lengths.split(4), strict=True)])
    b = torch.cat([model.encode_text(x.clone()) for x in text.split(4)])
    assert_close_rel("loss", model.loss(a, b), loss, 1e-6)
    assert cache({"x": audio, "lengths": None}, {"x": text}).isfinite()


def test_autocast_around_the_call(model: Pair) -> None:
    """Cast weights are cached while autocast lasts, also those that were cast without a graph."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seed_all()
        uncached(model, (4, 4))
        expected = state(model)
        torch.manual_seed(0)
        other = Pair()
        with torch.no_grad():
            other.eval().encode_audio(torch.ones(2, 6))
            other.train()
        seed_all()
        GradCache([other.encode_audio, other.encode_text], 4, other.loss)(*batches())
    # Weight gradients are rounded to bfloat16 per chunk here and once over all chunks there.
    compare(expected, state(other), tol=2e-2)


def test_frozen_tower_is_run_once_and_costs_no_gradient(model: Pair) -> None:
    model.text.requires_grad_(False)
    needed: list[bool] = []

    def loss(a: Tensor, b: Tensor) -> Tensor:
        needed.append(b.requires_grad)
        return model.loss(a, b)

    seed_all()
    uncached(model, (5, 5))
    expected = state(model)["next draws"]
    model.zero_grad()
    model.audio.calls, model.text.calls = [], []
    seed_all()
    GradCache([model.encode_audio, model.encode_text], 5, loss)(*batches())
    assert torch.equal(state(model)["next draws"], expected), "the second pass must not advance the generators"
    assert needed == [False]
    assert model.text.calls == [5, 5, 4]
    assert model.audio.calls == [5, 5, 2, 5, 2]
    assert all(p.grad is None for p in model.text.parameters())
    assert model.log_scale.grad is not None


def test_towers_without_parameters_leave_the_scale(model: Pair) -> None:
    scale = torch.tensor(3.0, requires_grad=True)
    a, b = torch.randn(6, 3), torch.randn(6, 3)
    GradCache([lambda x: x * 2, lambda x: x], 4, lambda x, y: info_nce(x, y, scale))(a, b)
    (expected,) = torch.autograd.grad(info_nce(a, b, scale), scale)
    assert scale.grad is not None
    assert_close_rel("gradient of the scale", expected, scale.grad, 1e-6)
    with pytest.raises(ValueError, match="depends on nothing that requires gradients"):
        GradCache([lambda x: x, lambda x: x], 4, lambda x, y: info_nce(x, y, 3.0))(a, b)


def test_inputs_that_require_gradients_get_them() -> None:
    head = nn.Linear(3, 4)
    a, b = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    cache = GradCache([head, head], 4, lambda x, y: info_nce(x, y, 5.0))
    cache(a, b)
    (expected,) = torch.autograd.grad(info_nce(head(a), head(b), 5.0), a)
    assert a.grad is not None
    assert_close_rel("gradient of the input", expected, a.grad, 1e-5)
    with pytest.raises(ValueError, match="detach it"):
        cache(a * 2, b)


def test_tower_that_the_loss_ignores() -> None:
    used, unused = nn.Linear(3, 4), nn.Linear(3, 4)
    GradCache([used, unused], 2, lambda a, b: a.square().mean())(torch.randn(4, 3), torch.randn(4, 3))
    assert used.weight.grad is not None and unused.weight.grad is None


@pytest.mark.parametrize(
    ("sizes", "audio", "text"),
    [
        ((4, 7), [4, 4, 4, 4, 4], [7, 7, 7]),
        ((5, 12), [5, 5, 2, 5, 2], [12, 2, 2]),
        ((6, 14), [6, 6, 6], [14]),
        ((12, 4), [12], [4, 4, 4, 2, 4, 4, 2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("synchronised", [False, True])
def test_one_full_chunk_of_each_tower_is_embedded_once(
    model: Pair, sizes: tuple[int, int], audio: list[int], text: list[int], synchronised: bool
) -> None:
    """Its graph lasts from the first pass, unless it is the only one and gradients are synchronised."""
    seed_all()
    cache = GradCache([model.encode_audio, model.encode_text], sizes, model.loss)
    cache(*batches(), no_sync=nullcontext if synchronised else None)
    for calls, expected in ((model.audio.calls, audio), (model.text.calls, text)):
        assert calls == (expected * 2 if synchronised and len(expected) == 1 else expected)
    kept = state(model)
    torch.manual_seed(0)
    again = Pair()
    cache = GradCache([again.encode_audio, again.encode_text], sizes, again.loss)
    cache.keeps_graphs = False
    seed_all()
    cache(*batches(), no_sync=nullcontext if synchronised else None)
    assert len(again.audio.calls) + len(again.text.calls) > len(model.audio.calls) + len(model.text.calls)
    for name, value in state(again).items():
        assert torch.equal(value, kept[name]), name


def test_kept_graph_with_checkpointed_batch_norm(model: Pair) -> None:
    """Its backward pass runs the layers again, and running statistics take the batch once all the same."""

    def encode(tower: Noisy, x: Tensor) -> Tensor:
        return tower.last(tower.dropout(tower.norm(tower.first(x)).tanh()))

    other = copy.deepcopy(model)
    model.encode_audio, model.encode_text = partial(encode, model.audio), partial(encode, model.text)  # type: ignore[method-assign]
    seed_all()
    uncached(model, (4, 5))
    expected = state(model)
    towers = [partial(checkpoint, partial(encode, t), use_reentrant=False) for t in (other.audio, other.text)]
    seed_all()
    GradCache(towers, (4, 5), other.loss, modules=[other])(*batches())
    compare(expected, state(other))


def test_graphs_that_do_not_fit_together_are_not_kept(model: Pair) -> None:
    """The chunk sizes stay; whether memory ran out beside them in the other tower or in the loss."""
    seed_all()
    uncached(model, (6, 7))
    expected = state(model)
    for place in ("text", "loss"):
        torch.manual_seed(0)
        other = Pair()
        cache = GradCache([other.encode_audio, other.encode_text], (6, 7), other.loss)

        def refuse(*arguments: Any, cache: GradCache = cache) -> None:
            if cache.keeps_graphs:
                raise RuntimeError("CUDA error: out of memory")

        if place == "text":
            other.text.register_forward_pre_hook(refuse)
        else:
            loss = cache.loss
            cache.loss = lambda a, b, loss=loss, refuse=refuse: (refuse(), loss(a, b))[1]  # type: ignore[misc]
        seed_all()
        cache(*batches())
        assert cache.chunk_sizes == [6, 7] and not cache.keeps_graphs
        compare(expected, state(other))


def test_whole_batch_is_cut_into_chunks_when_the_loss_finds_no_memory(model: Pair) -> None:
    def loss(a: Tensor, b: Tensor) -> Tensor:
        if len(model.audio.calls) == 1:
            raise torch.OutOfMemoryError("in the loss")
        return model.loss(a, b)

    cache = GradCache([model.encode_audio, model.encode_text], 100, loss)
    seed_all()
    cache(*batches())
    assert cache.chunk_sizes == [6, 7]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
]
OTHERS = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"),
    RuntimeError(
        "out of resource: shared memory, Required: 262144, Hardware limit: 101376."
    ),  # Triton's OutOfResources
    ValueError("out of memory"),
    MemoryError("out of memory"),
]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, *OTHERS], ids=str)
def test_errors_of_memory_are_told_from_others(model: Pair, error: Exception) -> None:
    """By the function, and by what the cache does about one."""
    short = any(error is each for each in OUT_OF_MEMORY)
    assert is_out_of_memory(error) == short

    def refuse(module: nn.Module, arguments: Any) -> None:
        if arguments[0].shape[0] > 4:
            raise error

    model.text.register_forward_pre_hook(refuse)
    cache = GradCache([model.encode_audio, model.encode_text], (12, 7), model.loss)
    with nullcontext() if short else pytest.raises(type(error)):
        cache(*batches())
    assert cache.chunk_sizes == ([12, 4] if short else [12, 7])


@contextmanager
def out_of_memory(tower: Noisy, fits: int, after: int = 0) -> Iterator[None]:
    """Makes `tower` run out of memory on more than `fits` rows, from call number `after` on."""

    def refuse(module: nn.Module, arguments: Any) -> None:
        if arguments[0].shape[0] > fits and len(tower.calls) >= after:
            raise torch.OutOfMemoryError("out of memory")

    handle = tower.register_forward_pre_hook(refuse)
    yield
    handle.remove()


@pytest.mark.parametrize("after", (0, 2), ids=("in the first pass", "in the second pass"))
def test_out_of_memory_halves_the_chunk_and_changes_nothing_else(model: Pair, after: int) -> None:
    """In the second pass the audio tower has its gradients already when the text tower fails."""

    def with_earlier_gradients(pair: Pair) -> Pair:
        pair.log_scale.grad, pair.audio.last.bias.grad = torch.tensor(5.0), torch.ones(8)
        return pair

    seed_all()
    uncached(with_earlier_gradients(model), (6, 4))
    expected = state(model)
    torch.manual_seed(0)
    other = with_earlier_gradients(Pair())
    cache = GradCache([other.encode_audio, other.encode_text], (6, 7), other.loss)
    seed_all()
    with out_of_memory(other.text, 4, after=after):
        cache(*batches())
    assert cache.chunk_sizes == [6, 4]
    compare(expected, state(other))
    assert cache.keeps_graphs
    assert len(other.audio.calls) == (7 if after == 0 else 6)


def test_out_of_memory_that_cannot_be_helped(model: Pair) -> None:
    cache = GradCache([model.encode_audio, model.encode_text], 4, model.loss)
    with out_of_memory(model.audio, 0), pytest.raises(torch.OutOfMemoryError):
        cache(*batches())
    assert cache.chunk_sizes[0] == 1

    def loss(a: Tensor, b: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("in the loss")

    cache = GradCache([model.encode_audio, model.encode_text], 4, loss)
    with pytest.raises(torch.OutOfMemoryError, match="in the loss"):
        cache(*batches())
    assert cache.chunk_sizes == [4, 4]
    # Functions hide their parameters, so what was added cannot be taken back; the new size waits for the next call.
    hidden = GradCache([lambda x: model.audio(x), lambda x: model.text(x)], 4, model.loss)
    with out_of_memory(model.text, 2, after=len(model.text.calls) + 4), pytest.raises(torch.OutOfMemoryError):
        hidden(*batches())
    assert hidden.chunk_sizes == [4, 2]


def test_synchronisation_is_left_to_one_backward_pass(model: Pair) -> None:
    """All backward passes but that of each tower's last chunk run inside no_sync; those chunks share one."""
    seed_all()
    uncached(model, (4, 5))
    expected = state(model)
    torch.manual_seed(0)
    other = Pair()
    events: list[str] = []
    inside: list[bool] = [False]

    @contextmanager
    def no_sync() -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    for name, parameter in other.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: events.append(f"{name}{' quietly' if inside[0] else ''}")  # type: ignore[misc]
        )
    seed_all()
    cache = GradCache([other.encode_audio, other.encode_text], (4, 5), other.loss)
    cache(*batches(), no_sync=no_sync)
    compare(expected, state(other))
    names = [name for name, _ in other.named_parameters()]
    loud = [event for event in events if not event.endswith("quietly")]
    assert sorted(loud) == sorted(names), "each parameter is synchronised exactly once"
    assert set(events[-len(names) :]) == set(names), "and last"
    assert events.count("audio.last.bias quietly") == 2 and events.count("text.last.bias quietly") == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c(torch.ones(4, 3)), ValueError, "2 towers need as many inputs, got 1"),
        (lambda c: c(torch.ones(4, 3), [1, 2]), TypeError, "input 1 must be a tensor or a dict of tensors, got list"),
        (lambda c: c(torch.ones(0, 3), torch.ones(4, 3)), ValueError, "input 0 is empty"),
        (lambda c: c(torch.tensor(1.0), torch.ones(4, 3)), ValueError, "0-d tensor"),
        (lambda c: c({"x": None}, torch.ones(4, 3)), ValueError, "input 0 holds no tensor"),
        (lambda c: c({"x": torch.ones(4, 3), "y": torch.ones(5)}, torch.ones(4, 3)), ValueError, "number of rows"),
    ],
)
def test_wrong_inputs_are_named(call: Callable[[GradCache], Tensor], error: type[Exception], message: str) -> None:
    tower = nn.Linear(3, 2)
    with pytest.raises(error, match=message):
        call(GradCache([tower, tower], 2, lambda a, b: (a + b).sum()))


def test_wrong_towers_losses_and_sizes_are_named() -> None:
    tower, x = nn.Linear(3, 2), torch.ones(4, 3)
    for size in (0, -1, [2], 2.5, True, [2, 0]):
        with pytest.raises((ValueError, TypeError)):
            GradCache([tower, tower], size, lambda a, b: a)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="towers is empty"):
        GradCache([], 2, lambda: x)
    with pytest.raises(TypeError, match="loss must return a scalar tensor, got shape \\[4, 2\\]"):
        GradCache([tower], 2, lambda a: a)(x)
    with pytest.raises(TypeError, match="loss must return a scalar tensor, got float"):
        GradCache([tower], 2, lambda a: 1.0)(x)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="tower 0 must return a tensor of embeddings, got tuple"):
        GradCache([lambda y: (y, y)], 2, lambda a: a.sum())(x)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="tower 0 returned shape \\[3\\] for 2 rows"):
        GradCache([lambda y: y.sum(0)], 2, lambda a: a.sum())(x)


def test_activations_of_one_chunk_only() -> None:
    """What the graphs hold at any one time is a chunk's, not the batch's."""
    tower = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
    held, most = [0], [0]

    def pack(x: Tensor) -> Tensor:
        if x.dim() == 2 and x.shape[1] == 64 and x.shape[0] != 4:  # activations, not weights
            held[0] += x.shape[0]
            most[0] = max(most[0], held[0])
        return x

    def unpack(x: Tensor) -> Tensor:
        return x

    a, b = torch.randn(64, 8), torch.randn(64, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        info_nce(tower(a), tower(b), 5.0).backward()
    whole = held[0]
    held[0], chunks = 0, []

    def loss(x: Tensor, y: Tensor) -> Tensor:
        chunks.append(held[0])
        return info_nce(x, y, 5.0)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        GradCache([tower, tower], 8, loss)(a, b)
    assert chunks[0] * 8 == whole, "before the loss only one chunk of each tower had a graph"


def test_transforms_are_refused_and_change_nothing() -> None:
    tower = nn.Linear(3, 2)
    cached = GradCache([tower], 2, lambda x: x.square().sum())
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="outside of them"):
        torch.func.jvp(cached, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="outside of them"):
        cached(forward_ad.make_dual(x, x))
    assert tower.weight.grad is None
    assert cached(x) > 0 and tower.weight.grad is not None
