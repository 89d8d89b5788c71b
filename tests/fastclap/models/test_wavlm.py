"""The accelerated WavLM is transformers' WavLM, parameter by parameter, and never waits for the device."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastclap.config import AudioTowerConfig, TextTowerConfig
from fastclap.errors import ConfigError
from fastclap.grad_cache import GradCache
from fastclap.kernels import toeplitz_attention
from fastclap.models import positional, wavlm
from fastclap.models.audio_towers import Wav2Vec2Tower, build_audio_tower
from fastclap.models.layers import length_mask
from fastclap.models.text_towers import build_text_tower
from fastclap.testing import assert_close_rel, host_syncs, relative_error

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "num_buckets": 12,
    "max_bucket_distance": 20,
}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "layerdrop": 0.0}
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0}
PLAIN = {**NO_DROPOUT, "layerdrop": 0.0, "apply_spec_augment": False}
SHAPES = {
    "large": LARGE,
    "base": {"feat_extract_norm": "group", "do_stable_layer_norm": False},
    "layer norms after": {"feat_extract_norm": "layer", "do_stable_layer_norm": False, "conv_bias": True},
    "group norm, layer norms before": {"feat_extract_norm": "group", "do_stable_layer_norm": True, "conv_bias": True},
}
# samples of each clip: one frame alone; 61, 60, 1 and 29 frames; odd batch with nothing padded
CLIPS = {"one frame": [400], "padded": [19999, 19400, 400, 9555], "equal": [5003, 5003, 5003]}


@pytest.fixture(autouse=True)
def gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic under test, also where a CPU would take its library's convolutions."""
    monkeypatch.setattr(wavlm, "_use_gemms", lambda waveform, layers: True)
    monkeypatch.setattr(positional, "_use_products", lambda x: True)


def test_library_convolutions_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = pair(**SHAPES["base"], **PLAIN)
    waveform = torch.randn(2, 4000)
    gemms = fast.feature_extractor(waveform)
    monkeypatch.undo()
    assert not wavlm._use_gemms(waveform, fast.feature_extractor.conv_layers)
    assert_close_rel("features", fast.feature_extractor(waveform), gemms, 1e-5)


def pair(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """transformers' model, and its accelerated copy."""
    from transformers import WavLMConfig, WavLMModel

    torch.manual_seed(0)
    reference = WavLMModel(WavLMConfig(**{**SMALL, **options})).to(dtype)
    with torch.no_grad():  # as initialised, the gates and the position bias hardly matter
        for name, parameter in reference.named_parameters():
            if "rel_attn_embed" in name or "gru_rel_pos" in name:
                parameter.normal_()
    fast = copy.deepcopy(reference)
    wavlm.accelerate(fast)
    return reference, fast


def waves(samples: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    audio = torch.randn(len(samples), max(samples), generator=generator, dtype=torch.float64)
    lengths = torch.tensor(samples)
    return (audio * length_mask(lengths, max(samples))).to(dtype), lengths


def valid_output(model: Any, audio: Tensor, lengths: Tensor, masked: bool) -> Tensor:
    mask = length_mask(lengths, audio.shape[1]).long() if masked else None
    hidden = model(audio, attention_mask=mask).last_hidden_state
    return hidden * length_mask(model._get_feat_extract_output_lengths(lengths), hidden.shape[1])[..., None]


def tower_of(**options: Any) -> Any:
    torch.manual_seed(0)
    return build_audio_tower(AudioTowerConfig("wav2vec2", hf_config={"model_type": "wavlm", **SMALL, **options}))


def seed_all(seed: int = 7) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


# -- the same model ---------------------------------------------------------------------------------------------------


def output_and_gradients(model: Any, clips: str, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    audio, lengths = waves(CLIPS[clips], model.dtype)
    out = valid_output(model.train(training), audio, lengths, clips == "padded")
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (out * weight).sum().backward()
    found = gradients(model)
    assert len(found) > 50
    # softmax takes no notice of a bias of the keys, GroupNorm of one before it, one key of whatever makes its weight
    largest = max(gradient.norm() for gradient in found.values())
    return out.detach(), {name: g if g.norm() > 1e-5 * largest else torch.zeros_like(g) for name, g in found.items()}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_every_gradient_are_those_of_transformers(shape: str, clips: str) -> None:
    reference, fast = pair(torch.float64, **{**SHAPES[shape], "layerdrop": 0.0})
    expected, expected_gradients = output_and_gradients(reference, clips, training=False)
    out, own = output_and_gradients(fast, clips, training=False)
    assert_close_rel("last_hidden_state", expected, out, 1e-10)
    assert own.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert_close_rel(name, gradient, own[name], 1e-10)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_training_mode_is_that_of_transformers(shape: str) -> None:
    """In float32 transformers' own rounding is the yardstick where it is above 1e-5."""
    options = {**SHAPES[shape], **PLAIN}
    _, exact_gradients = output_and_gradients(pair(torch.float64, **options)[0], "padded", training=True)
    reference, fast = pair(**options)
    expected, expected_gradients = output_and_gradients(reference, "padded", training=True)
    out, own = output_and_gradients(fast, "padded", training=True)
    assert_close_rel("last_hidden_state", expected, out, 1e-5)
    assert own.keys() == expected_gradients.keys() == exact_gradients.keys()
    for name, gradient in exact_gradients.items():
        rounding = relative_error(gradient, expected_gradients[name])
        assert_close_rel(name, gradient, own[name], max(1e-5, 2 * rounding))


def test_parameters_are_those_of_transformers() -> None:
    from transformers import AutoModel, WavLMConfig

    for shape in SHAPES.values():
        torch.manual_seed(0)
        reference = AutoModel.from_config(WavLMConfig(**{**SMALL, **shape}))
        fast = tower_of(**shape).base
        assert isinstance(fast.encoder, wavlm.Encoder)
        assert isinstance(fast.feature_extractor, wavlm.ConvolutionStack)
        expected, own = reference.state_dict(), fast.state_dict()
        assert list(own) == list(expected)  # an optimizer's state goes by this order
        assert all(torch.equal(own[name], tensor) for name, tensor in expected.items())
        assert [name for name, _ in fast.named_parameters()] == [name for name, _ in reference.named_parameters()]
        torch.nn.init.normal_(reference.encoder.layers[1].attention.q_proj.weight)
        fast.load_state_dict(reference.state_dict(), strict=True)
        reference.load_state_dict(fast.state_dict(), strict=True)


def test_published_names_of_the_weight_norm_are_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tower = tower_of(**LARGE).eval()
    tower.base.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in weights.items()
    }
    assert any(name.endswith("conv.weight_g") for name in renamed)
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = build_audio_tower(AudioTowerConfig("wav2vec2", pretrained=str(tmp_path))).eval()
    audio, lengths = waves(CLIPS["padded"])
    with torch.no_grad():
        assert torch.equal(loaded(audio, lengths), tower(audio, lengths))


def test_position_table_beyond_the_furthest_bucket() -> None:
    reference, fast = pair(**LARGE)
    for frames in (1, 2, 57):
        expected = reference.encoder.layers[0].attention.compute_bias(frames, frames)
        table = fast.encoder.position_table(frames)
        assert table.shape == (4, 2 * frames - 1)
        rows = torch.arange(frames)
        assert torch.equal(table[:, rows - rows[:, None] + frames - 1], expected)


# -- convolutions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (1, 1), (4, 3), (5, 3), (10, 5), (2, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_row_convolution(kernel: int, stride: int, bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4 * stride, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, kernel * 3, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(5, dtype=torch.float64, requires_grad=True) if bias else None
    y = wavlm._RowConvolution.apply(x, weight, offset, stride)
    expected = F.conv1d(x.t()[None], weight.unflatten(1, (kernel, 3)).transpose(1, 2), offset, stride)[0].t()
    torch.testing.assert_close(y[: len(expected)], expected)
    assert torch.autograd.gradcheck(lambda *inputs: wavlm._RowConvolution.apply(*inputs, stride), (x, weight, offset))


def families() -> Iterator[tuple[str, dict[str, Any]]]:
    shape = {key: value for key, value in SMALL.items() if key not in ("num_buckets", "max_bucket_distance")}
    for name in ("wav2vec2", "hubert", "unispeech", "unispeech-sat"):
        yield name, {**shape, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
        yield name, {**shape, "feat_extract_norm": "group"}
    yield "data2vec-audio", shape
    yield "sew", {**shape, "conv_dim": [8] * 3, "conv_kernel": [10, 3, 1], "conv_stride": [5, 2, 1]}


@pytest.mark.parametrize(("name", "options"), families())
def test_convolutions_of_the_family(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(name, **options)).double().eval()
    before = copy.deepcopy(model.feature_extractor)
    names = list(model.state_dict())
    wavlm.accelerate(model)
    assert isinstance(model.feature_extractor, wavlm.ConvolutionStack)
    assert list(model.state_dict()) == names
    assert not isinstance(model.encoder, wavlm.Encoder)
    for samples in (400, 719, 5120, 5503):
        audio = torch.randn(3, samples, dtype=torch.float64, requires_grad=True)
        again = audio.detach().clone().requires_grad_()
        expected, out = before(audio), model.feature_extractor(again)
        assert_close_rel("features", expected, out, 1e-10)
        weight = torch.randn_like(expected)
        (expected * weight).sum().backward()
        (out * weight).sum().backward()
        assert audio.grad is not None and again.grad is not None
        assert_close_rel("waveform gradient", audio.grad, again.grad, 1e-10)
        for at_once in (1, 12, 1000):  # without gradients some frames are taken at a time
            monkeypatch.setattr(wavlm, "FRAMES_AT_ONCE", at_once)
            with torch.no_grad():
                assert_close_rel(f"{at_once} at once", expected.detach(), model.feature_extractor(audio), 1e-10)
    model.feature_extractor._freeze_parameters()
    assert not any(parameter.requires_grad for parameter in model.feature_extractor.parameters())


def test_too_few_samples_for_a_frame() -> None:
    with pytest.raises(ValueError, match="399 samples are too few"):
        pair(**LARGE)[1](torch.randn(1, 399))


# -- what stays transformers' own -------------------------------------------------------------------------------------


def test_what_the_fast_path_does_not_know_is_left_to_transformers() -> None:
    from transformers.models.wavlm import modeling_wavlm as theirs

    asked = tower_of(**LARGE, attn_implementation="eager").base
    assert isinstance(asked.encoder, theirs.WavLMEncoderStableLayerNorm)
    assert isinstance(asked.feature_extractor, wavlm.ConvolutionStack)
    with pytest.raises(ValueError, match="does not support"):
        tower_of(**LARGE, attn_implementation="sdpa")
    for option in ("output_attentions", "output_hidden_states"):
        assert isinstance(tower_of(**LARGE, **{option: True}).base.encoder, theirs.WavLMEncoderStableLayerNorm)
    assert isinstance(tower_of(**LARGE, max_bucket_distance=3).base.encoder, theirs.WavLMEncoderStableLayerNorm)
    for options in ({"feat_extract_activation": "relu"}, {"conv_kernel": [10, 5, 3, 3, 3, 2, 2]}):
        base = tower_of(**LARGE, **options).base
        assert isinstance(base.feature_extractor, theirs.WavLMFeatureEncoder)
        assert isinstance(base.encoder, wavlm.Encoder)
        assert base(torch.randn(1, 2000)).last_hidden_state.shape[-1] == 32


def test_the_tower_is_the_same_with_transformers_encoder() -> None:
    fast, plain = tower_of(**LARGE).eval(), tower_of(**LARGE, attn_implementation="eager").eval()
    assert "attn_implementation" not in fast.hf_config
    plain.load_state_dict(fast.state_dict(), strict=True)
    audio, lengths = waves(CLIPS["padded"])
    with torch.no_grad():
        assert_close_rel("embedding", plain(audio, lengths), fast(audio, lengths), 1e-5)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["large", "layer norms after"])
def test_embedding_is_the_same_alone_in_a_batch_and_padded(shape: str) -> None:
    tower = tower_of(**SHAPES[shape]).eval()
    audio, lengths = waves(CLIPS["padded"])
    with torch.no_grad():
        together = tower(audio, lengths)
        padded = tower(F.pad(audio, (0, 3001), value=torch.nan), lengths)
        alone = torch.cat([tower(clip[None, :size]) for clip, size in zip(audio, lengths.tolist(), strict=True)])
    assert (together - alone).abs().max() < 1e-5
    assert (padded - alone).abs().max() < 1e-5


NOISY = {**LARGE, "layerdrop": 0.4, "mask_time_prob": 0.4, "mask_time_length": 3, "mask_feature_prob": 0.2}
NOISY |= {"attention_dropout": 0.2, "hidden_dropout": 0.2, "activation_dropout": 0.2, "feat_proj_dropout": 0.2}


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradient_cache_repeats_masks_dropout_and_dropped_layers(checkpoint: bool) -> None:
    audio, lengths = waves([3999, 5555, 4800, 5001, 3001])
    target = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(x @ target.t(), torch.arange(5))

    found = []
    for cached in (True, False):
        tower = tower_of(**NOISY).train()
        tower.prepare_training(checkpoint=checkpoint)
        seed_all()
        if cached:
            value = GradCache([tower], 2, loss)({"audio": audio, "lengths": lengths})
        else:
            out = [tower(*chunk) for chunk in zip(audio.split(2), lengths.split(2), strict=True)]
            value = loss(torch.cat(out))
            value.backward()
        found.append((value.detach(), {n: g for n, g in gradients(tower).items() if g.abs().max() > 0}))
    (value, own), (expected_value, expected) = found
    assert_close_rel("loss", expected_value, value, 1e-6)
    assert own.keys() == expected.keys() and len(own) > 40
    for name, gradient in expected.items():
        if not name.endswith("k_proj.bias"):  # zero but for rounding
            assert_close_rel(name, gradient, own[name], 1e-4)


def test_checkpointing_changes_no_bit() -> None:
    audio, lengths = waves([3999, 5555, 4800])
    found = []
    for checkpoint in (False, True):
        tower = tower_of(**{**NOISY, "layerdrop": 0.0}).train()
        tower.prepare_training(checkpoint=checkpoint)
        calls = []
        for layer in tower.base.encoder.layers:
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        seed_all()
        out = tower(audio, lengths)
        out.square().sum().backward()
        assert len(calls) == (6 if checkpoint else 3)  # each layer once more in the backward pass
        found.append((out.detach(), gradients(tower)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


def test_dropped_layers_follow_torch_and_spare_the_first() -> None:
    tower = tower_of(**{**LARGE, **PLAIN, "layerdrop": 0.5, "num_hidden_layers": 6}).train()
    ran: list[int] = []
    for index, layer in enumerate(tower.base.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    audio, lengths = waves([800, 900])
    runs = []
    for seed in [*range(20), 0]:
        ran.clear()
        torch.manual_seed(seed)
        tower(audio, lengths)
        runs.append(tuple(ran))
    assert runs[0] == runs[-1] and len(set(runs)) > 5
    assert all(run[0] == 0 and list(run) == sorted(set(run)) for run in runs)
    assert 40 < sum(len(run) - 1 for run in runs[:20]) < 60 + 15  # of 100, half expected
    ran.clear()
    tower.eval()(audio, lengths)
    assert ran == list(range(6))


def test_compiled_layers_are_whole_graphs_and_share_them(
    graphs: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        out = toeplitz_attention.gated_toeplitz_attention_reference(*inputs[:6], dropout=0.0, scale=inputs[8])
        return out.transpose(1, 2).contiguous().transpose(1, 2), torch.zeros_like(inputs[4], dtype=torch.float32)

    # the operator, as on a GPU, where the torch engine would be part of the graph
    answers = {**vars(toeplitz_attention.dispatch), "engine": lambda *_: "triton"}
    monkeypatch.setattr(toeplitz_attention, "dispatch", SimpleNamespace(**answers))
    monkeypatch.setattr(toeplitz_attention, "_forward", forward)
    tower = tower_of(**{**LARGE, **PLAIN, "num_hidden_layers": 5})
    audio, lengths = waves([3999, 5555, 4800])
    expected = tower.eval()(audio, lengths)
    tower.prepare_training(compile=True)
    assert_close_rel("compiled", expected, tower.train()(audio, lengths), 1e-6)
    assert len(graphs) == 1  # five layers, one code
    for size in (5000, 4000, 3000):
        tower(audio[:, :size], lengths.clamp(max=size))
    tower(audio[[0, 1, 2, 0, 1, 2, 0]], lengths[[0, 1, 2, 0, 1, 2, 0]])
    assert len(graphs) == 1  # for any number of clips and of frames
    assert_close_rel("evaluation", expected, tower.eval()(audio, lengths), 1e-6)
    tower(audio[:1], lengths[:1])
    assert len(graphs) == 1


def test_compiled_layers_train_as_others() -> None:
    torch._dynamo.reset()
    audio, lengths = waves([3999, 5555])
    found = []
    for compiled, checkpoint in ((False, False), (True, False), (True, True)):
        tower = tower_of(**{**LARGE, **PLAIN, "num_hidden_layers": 2}).train()
        tower.prepare_training(checkpoint=checkpoint)
        if compiled:
            for layer in tower.base.encoder.layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        tower(audio, lengths).square().sum().backward()
        found.append(gradients(tower))
    for own in found[1:]:
        assert own.keys() == found[0].keys()
        for name, gradient in found[0].items():
            if not name.endswith("k_proj.bias"):
                assert_close_rel(name, gradient, own[name], 1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("shape", ["large", "base"])
def test_a_training_step_never_waits_for_the_device(shape: str, checkpoint: bool) -> None:
    tower = tower_of(**{**NOISY, **SHAPES[shape], "layerdrop": 0.4}).train()
    tower.prepare_training(checkpoint=checkpoint)
    audio, lengths = waves([3999, 5555, 4800])
    integers = (audio * 3000).short()
    seed_all()
    with host_syncs() as found:
        tower(integers, lengths).square().sum().backward()
    assert found == []
    assert gradients(tower)["base.encoder.layers.0.attention.rel_attn_embed.weight"].abs().max() > 0


def test_host_syncs_sees_what_waits() -> None:
    x = torch.arange(4.0, requires_grad=True)
    mask = x > 1
    waiting: list[Any] = [
        lambda: x[0].item(),
        lambda: bool(mask.all()),
        lambda: x.nonzero(),
        lambda: x[mask],
        lambda: x.detach().unique(),
        lambda: x.detach().clone().masked_scatter(mask, x)[mask].sum().item(),
    ]
    for function in waiting:
        with host_syncs() as found:
            function()
        assert found and all(Path(__file__).name in place for place in found)
    with host_syncs() as found:
        y = x.masked_fill(mask, 0.0)[torch.tensor([0, 1])].detach()
        y[y > 1] = 0.0
        (x * 2).sum().backward()
    assert found == []


# -- autocast ---------------------------------------------------------------------------------------------------------


def layer_under_autocast(shape: str, dtype: torch.dtype | None, **options: Any) -> tuple[dict[str, Tensor], list[Any]]:
    """Result and gradients of a layer, and the operations of its forward pass with the shapes that they return."""
    operations: list[Any] = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                operations.append((func, out.dtype, tuple(out.shape)))
            return out

    _, fast = pair(**{**SHAPES[shape], **PLAIN})
    layer = fast.encoder.layers[0].train()
    if options.get("compiled"):
        layer.compile(backend="aot_eager", fullgraph=True)
    norm = layer.layer_norm if layer.stable else torch.nn.Identity()
    x = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(4), requires_grad=True)
    table = fast.encoder.position_table(11).detach().requires_grad_()
    autocast = nullcontext() if dtype is None else torch.autocast("cpu", dtype)
    with nullcontext() if options else Operations(), autocast:
        inputs = 1 * x  # of a leaf autocast would keep the cast itself
        y = layer(inputs, norm(inputs), table, torch.tensor([11, 4, 1]))
    y = torch.cat([part.float() for part in y])
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)))
    assert x.grad is not None and table.grad is not None
    found = {"y": y.detach(), "x": x.grad, "table": table.grad}
    return found | gradients(layer), operations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["large", "layer norms after"])
def test_queries_keys_values_and_gates_are_one_product(shape: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    found, operations = layer_under_autocast(shape, dtype)
    heads = SMALL["num_attention_heads"]
    assert operations.count((torch.ops.aten.addmm.default, dtype, (33, 3 * 32 + 2 * heads))) == 1
    before = operations[: [name for name, *_ in operations].index(torch.ops.aten.addmm.default)]
    assert before.count((torch.ops.aten._to_copy.default, dtype, (3, 11, 32))) == 1
    compiled, _ = layer_under_autocast(shape, dtype, compiled=True)
    exact, _ = layer_under_autocast(shape, None)
    assert found.keys() == compiled.keys() == exact.keys() and len(found) > 15
    for name, tensor in found.items():
        if not name.endswith("k_proj.bias"):  # zero but for rounding
            assert_close_rel(name, tensor, compiled[name], 4 * torch.finfo(dtype).eps)
            assert_close_rel(name, tensor, exact[name], 16 * torch.finfo(dtype).eps)
    torch._dynamo.reset()


# -- execution options ------------------------------------------------------------------------------------------------


def test_prepare_training_of_every_tower() -> None:
    shape = {key: value for key, value in SMALL.items() if key not in ("num_buckets", "max_bucket_distance")}
    hubert = build_audio_tower(AudioTowerConfig("wav2vec2", hf_config={"model_type": "hubert", **shape}))
    hubert.prepare_training(compile=True, checkpoint=True)
    assert isinstance(hubert, Wav2Vec2Tower) and hubert.base.is_gradient_checkpointing
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for model_type in ("bert", "xlm-roberta"):
        text: Any = build_text_tower(
            TextTowerConfig("hf", hf_config={"model_type": model_type, "vocab_size": 20, **small})
        )
        text.prepare_training()
        assert not text.base.is_gradient_checkpointing
        ids, mask = torch.randint(3, 20, (2, 5)), torch.ones(2, 5, dtype=torch.long)
        expected = text.eval()(ids, mask)
        text.prepare_training(checkpoint=True)
        assert text.base.is_gradient_checkpointing
        torch.testing.assert_close(text(ids, mask), expected)
        text.train()(ids, mask).sum().backward()
    for tower in (
        build_audio_tower(AudioTowerConfig(width=16, layers=1, heads=2)),
        build_text_tower(TextTowerConfig(width=16, layers=1, heads=2)),
    ):
        tower.prepare_training(compile=True, checkpoint=True)
    text.base.__class__ = type("Bare", (type(text.base),), {"supports_gradient_checkpointing": False})
    with pytest.raises(ConfigError, match="activation checkpointing"):
        text.prepare_training(checkpoint=True)


def test_prepare_training_compiles_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    tower, compiled = tower_of(**LARGE), []
    monkeypatch.setattr(wavlm.EncoderLayer, "compile", lambda layer, **options: compiled.append((layer, options)))
    tower.prepare_training()
    assert compiled == [] and not tower.base.encoder.checkpoint
    tower.prepare_training(compile=True, checkpoint=True)
    assert [layer for layer, _ in compiled] == list(tower.base.encoder.layers)
    assert tower.base.encoder.checkpoint


def test_inference_mode_leaves_nothing_that_training_trips_over() -> None:
    tower = tower_of(**LARGE).eval()
    audio, lengths = waves([3999, 5555])
    with torch.inference_mode():
        expected = tower(audio, lengths)
    out = tower(audio, lengths)
    out.sum().backward()
    assert_close_rel("embedding", expected, out, 1e-6)
    copied = copy.deepcopy(tower)
    assert all(a is not b for a, b in itertools.zip_longest(tower.parameters(), copied.parameters()))
    assert torch.equal(copied(audio, lengths), out)
    assert copied.base.encoder.layers[0] is not tower.base.encoder.layers[0]
