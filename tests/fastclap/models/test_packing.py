"""Packed batches: the values and gradients of padded ones, without computing on the padding."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.grad_cache import GradCache
from fastclap.losses import info_nce
from fastclap.models import packing as packing_module
from fastclap.models.audio_towers import build_audio_tower
from fastclap.models.clap import CLAP
from fastclap.models.packing import Packing, length_groups
from fastclap.models.text_towers import build_text_tower
from fastclap.testing import assert_close_rel, host_syncs

CPU = torch.device("cpu")
COUNTS = [5, 1, 9, 9, 3, 2]
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 24,  # fewer than the packed tokens
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
ROBERTA = {**BERT, "model_type": "xlm-roberta", "pad_token_id": 1}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 50}
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "vocab_size": 50, "dropout": 0.0, "embedding_dropout": 0.0}
MEL: dict[str, Any] = {"width": 16, "heads": 2, "dropout": 0.0, "time_masks": 0, "frequency_masks": 0}
TEXT = {
    "small mean": TextTowerConfig(layers=2, **SMALL),
    "small cls": TextTowerConfig(layers=1, pooling="cls", **SMALL),
    "bag of words": TextTowerConfig(layers=0, **SMALL),
    "bert cls": TextTowerConfig("hf", hf_config=BERT, pooling="cls"),
    "bert pooler": TextTowerConfig("hf", hf_config=BERT, pooling="pooler"),
    "roberta": TextTowerConfig("hf", hf_config=ROBERTA, pooling="mean"),
    "eager": TextTowerConfig("hf", hf_config={**ROBERTA, "attn_implementation": "eager"}, pooling="mean"),
    "t5": TextTowerConfig("hf", hf_config={**T5, "dropout_rate": 0.0}, pooling="mean"),
}
AUDIO = {
    "log-mel": AudioTowerConfig(layers=2, **MEL),
    "attention": AudioTowerConfig(layers=1, pooling="attention", features="whisper", **MEL),
    "time": AudioTowerConfig(layers=1, convolution="time", subsampling=8, pooling="mean", **MEL),
    "clip": AudioTowerConfig(layers=1, feature_normalization="clip", pooling="statistics", **MEL),
}


def captions(counts: list[int], pad: int = 0, more: int = 2) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded to more than the longest."""
    mask = (torch.arange(max(counts) + more) < torch.tensor(counts)[:, None]).long()
    ids = torch.randint(3, 50, mask.shape, generator=torch.Generator().manual_seed(0))
    return ids.masked_fill(mask == 0, pad), mask


def clips(lengths: list[int], more: int = 700) -> tuple[Tensor, Tensor]:
    wave = 0.1 * torch.randn(len(lengths), max(lengths) + more, generator=torch.Generator().manual_seed(1))
    return wave, torch.tensor(lengths)


def gradients_of(tower: torch.nn.Module, out: Tensor) -> dict[str, Tensor]:
    tower.zero_grad()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    return {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}


def assert_same(tower: torch.nn.Module, expected: Callable[[], Tensor], run: Callable[[], Tensor]) -> None:
    """Values and every parameter's gradient agree, and a repetition is bit-equal."""
    reference = expected()
    reference_gradients = gradients_of(tower, reference)
    out = run()
    gradients = gradients_of(tower, out)
    assert_close_rel("embeddings", reference, out, 1e-5)
    assert gradients.keys() == reference_gradients.keys()
    scale = max(float(gradient.norm()) for gradient in reference_gradients.values())
    for name, gradient in gradients.items():
        error = float((gradient - reference_gradients[name]).norm())
        # keys have no gradient through their bias but for rounding: such are measured against the largest
        assert error <= 1e-5 * max(float(reference_gradients[name].norm()), 1e-2 * scale), f"{name}: {error}"
    again = run()
    assert torch.equal(again, out)
    assert all(torch.equal(gradient, gradients[name]) for name, gradient in gradients_of(tower, again).items())


# -- rows and attention -----------------------------------------------------------------------------------------------


def test_rows_are_packed_and_unpacked() -> None:
    packing = Packing([2, 3, 1], CPU)
    x = torch.arange(12.0).view(3, 4, 1)
    assert packing.pack(x).flatten().tolist() == [0, 1, 4, 5, 6, 8]
    assert packing.unpack(packing.pack(x)).squeeze(2).tolist() == [[0, 1, 0], [4, 5, 6], [8, 0, 0]]
    assert packing.positions.tolist() == [0, 1, 0, 1, 2, 0]
    assert packing.starts.tolist() == [0, 2, 5, 6] and packing.starts.dtype == torch.int32
    assert (packing.longest, packing.total) == (3, 6)


@pytest.mark.parametrize("min_call", [0, 10**9], ids=["one by one", "padded"])
@pytest.mark.parametrize("lengths", [COUNTS, [1], [1, 1], [4, 4]])
def test_attention_stays_within_a_sequence(lengths: list[int], min_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "_MIN_CALL", min_call)
    packing = Packing(lengths, CPU)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, packing.total, 2, 4, dtype=torch.float64).requires_grad_().unbind()
    expected = []
    for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        scores = torch.einsum("ihc,jhc->hij", part[0], part[1]) / 2
        expected.append(torch.einsum("hij,jhc->ihc", scores.softmax(2), part[2]))
    out = packing.attention(q, k, v)
    torch.testing.assert_close(out, torch.cat(expected))
    wanted = torch.autograd.grad(torch.cat(expected).square().sum(), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), (q, k, v)), wanted)


@pytest.mark.parametrize("min_call", [0, 10**9], ids=["one by one", "padded"])
def test_attention_dropout_zeroes_weights_and_keeps_their_mean(min_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "_MIN_CALL", min_call)
    torch.manual_seed(0)
    packing = Packing([6] * 200 + [3] * 200, CPU)
    ones = torch.ones(packing.total, 1, 1)
    out = packing.attention(torch.zeros_like(ones), torch.zeros_like(ones), ones, dropout=0.25)
    kept = (out[:1200].flatten() * 6 * 0.75).round().int()  # of the 6 keys, how many are left
    assert set(kept.tolist()) > {3, 4, 5, 6}
    assert abs(out.mean().item() - 1) < 0.02


def test_flash_attention_gets_cumulative_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator runs on a GPU only: here its arguments, against its signature where this torch has it."""
    calls: list[tuple[Any, ...]] = []
    scales: list[float | None] = []

    def operator(*arguments: Any, scale: float | None) -> Tensor:
        calls.append(arguments)
        scales.append(scale)
        return arguments[2]

    real = packing_module._varlen_attention()
    monkeypatch.setattr(packing_module, "_flash_takes", lambda query: True)
    monkeypatch.setattr(packing_module, "_varlen_attention", lambda: operator)
    q, k, v = torch.randn(3, sum(COUNTS), 2, 8).unbind()
    assert Packing(COUNTS, CPU).attention(q, k, v) is v
    assert calls[0][:3] == (q, k, v) and calls[0][5:] == (9, 9)
    assert all(starts.tolist() == [0, 5, 6, 15, 24, 27, 29] for starts in calls[0][3:5])
    if real is not None:
        inspect.signature(real).bind(*calls[0], scale=None)
    Packing(COUNTS, CPU).attention(q, k, v, scale=0.7)
    Packing(COUNTS, CPU).attention(q, k, v, dropout=0.5)  # which the operator lacks
    assert scales == [None, 0.7]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_on_a_gpu(dtype: torch.dtype) -> None:
    lengths = [70, 1, 200, 33]
    packing = Packing(lengths, torch.device("cuda"))
    torch.manual_seed(0)
    reference = torch.randn(3, packing.total, 4, 32, dtype=dtype)
    results = []
    for x, where in ((reference.float().clone(), Packing(lengths, CPU)), (reference.cuda(), packing)):
        q, k, v = x.requires_grad_().unbind()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = where.attention(q, k, v)
            out.float().square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert x.grad is not None
        results.append((out, x.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for expected, found in zip(*results, strict=True):
        assert_close_rel("attention", expected, found, tolerance)


def test_groups_are_those_of_least_padding() -> None:
    lengths = [7, 2, 2, 9, 2, 8]
    assert length_groups(lengths, cost=0, most=2) == [[1, 2, 4], [0, 5, 3]]
    assert length_groups(lengths, cost=100) == [[1, 2, 4, 0, 5, 3]]
    assert length_groups([4, 4, 4], cost=0) == [[0, 1, 2]] and length_groups([3], cost=0) == [[0]]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        lengths = torch.randint(1, 20, (8,), generator=generator).tolist()
        ordered = sorted(lengths)
        best = min(at * ordered[at - 1] + (8 - at) * ordered[-1] for at in range(1, 8))
        groups = length_groups(lengths, cost=0, most=2)
        assert sum(len(group) * max(lengths[row] for row in group) for group in groups) == best
        assert sorted(itertools.chain(*length_groups(lengths, cost=0))) == list(range(8))


# -- audio ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_call", [0, 10**9], ids=["one by one", "padded"])
@pytest.mark.parametrize("name", AUDIO)
def test_packed_clips_equal_padded_ones(name: str, min_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "_MIN_CALL", min_call)
    torch.manual_seed(0)
    tower = build_audio_tower(AUDIO[name]).double()
    lengths = [9000, 5000, 12000, 300, 12000]  # 300 samples leave one frame
    wave, device_lengths = clips(lengths)
    wave = wave.masked_fill(torch.arange(wave.shape[1]) >= device_lengths[:, None], torch.nan)
    assert_same(tower, lambda: tower(wave, device_lengths), lambda: tower(wave, device_lengths, host_lengths=lengths))
    out = tower(wave, device_lengths, host_lengths=lengths)
    for row, length in enumerate(lengths):
        assert_close_rel("alone", tower(wave[row, None, :length]), out[row, None], 1e-5)


def test_clips_of_equal_length_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tower = build_audio_tower(AUDIO["log-mel"])
    lengths = [4000, 4001]  # of as many frames
    wave, device_lengths = clips(lengths)
    expected = tower(wave, device_lengths)
    monkeypatch.delattr(Packing, "__init__")
    assert_close_rel("equal", expected, tower(wave, device_lengths, host_lengths=lengths), 1e-5)


def test_packing_clips_leaves_the_padding_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tower: Any = build_audio_tower(AUDIO["log-mel"])
    seen: list[torch.Size] = []
    tower.transformer.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    lengths = [8000, 1600]
    wave, device_lengths = clips(lengths)
    tower(wave, device_lengths, host_lengths=lengths)
    tower(wave, device_lengths)
    frames = tower.log_mel.frame_lengths(device_lengths)
    for _ in tower.convolutions:
        frames = (frames + 1) // 2
    assert seen[0] == (frames.sum(), 16)
    assert seen[1][:2].numel() > 2 * frames.max()


def test_augmentation_draws_the_same_numbers_packed() -> None:
    config = dataclasses.replace(
        AUDIO["log-mel"], time_masks=2, time_mask_width=9, frequency_masks=1, random_gain=6.0, frequency_warp=0.1
    )
    tower = build_audio_tower(config).train()
    lengths = [9000, 5000, 12000]
    wave, device_lengths = clips(lengths)
    torch.manual_seed(3)
    expected = tower(wave, device_lengths)
    torch.manual_seed(3)
    assert_close_rel("augmented", expected, tower(wave, device_lengths, host_lengths=lengths), 1e-5)


@pytest.mark.parametrize(
    ("lengths", "message"), [([4000], "1 entries for a batch of 2"), ([9000, 10], r"host_lengths\[0\] is 9000")]
)
def test_host_lengths_that_are_not_those_of_the_batch(lengths: list[int], message: str) -> None:
    wave, device_lengths = clips([4000, 2000])
    with pytest.raises(ValueError, match=message):
        build_audio_tower(AUDIO["log-mel"])(wave, device_lengths, host_lengths=lengths)


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT)
def test_packed_captions_equal_padded_ones(name: str) -> None:
    torch.manual_seed(0)
    tower: Any = build_text_tower(TEXT[name]).double()
    pad = (TEXT[name].hf_config or {}).get("pad_token_id", 0)
    ids, mask = captions(COUNTS, pad)
    assert_same(tower, lambda: tower(ids, mask), lambda: tower(ids, mask, token_counts=COUNTS))
    out = tower(ids, mask, token_counts=COUNTS)
    for row, count in enumerate(COUNTS):
        alone = tower(ids[row, None, :count], mask[row, None, :count])
        assert_close_rel("alone", alone, out[row, None], 1e-5)
    equal_ids, equal_mask = captions([6, 6], pad)
    expected = tower(equal_ids, equal_mask)
    assert_close_rel("equal", expected, tower(equal_ids, equal_mask, token_counts=[6, 6]), 1e-5)


@pytest.mark.parametrize("name", ["small mean", "bert cls", "roberta", "eager", "t5"])
def test_captions_leave_padding_out(name: str) -> None:
    tower: Any = build_text_tower(TEXT[name])
    seen: list[int] = []
    embedding = tower.embedding if name == "small mean" else tower.base.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    counts = [3] * 20 + [15] * 20
    ids, mask = captions(counts)
    tower(ids, mask, token_counts=counts)
    assert sum(seen) == sum(counts)
    assert len(seen) == (2 if name in ("eager", "t5") else 1)


@pytest.mark.parametrize("name", ["bert cls", "roberta"])
def test_dropout_and_activation_checkpoints_of_packed_captions(name: str) -> None:
    config = {**(TEXT[name].hf_config or {}), "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    torch.manual_seed(0)
    tower = build_text_tower(dataclasses.replace(TEXT[name], hf_config=config)).train()
    ids, mask = captions(COUNTS)

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(4)
        out = tower(ids, mask, token_counts=COUNTS)
        return out, gradients_of(tower, out)

    out, gradients = run()
    assert (out - tower(ids, mask, token_counts=COUNTS)).abs().max() > 1e-2  # other draws, other values
    tower.prepare_training(checkpoint=True)
    checkpointed, of_checkpointed = run()
    assert torch.equal(out, checkpointed)
    assert all(torch.equal(gradient, of_checkpointed[key]) for key, gradient in gradients.items())


def test_compiled_layers_are_whole_graphs_of_any_captions(
    graphs: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three layers share one graph for packed captions and one for padded ones, however many and long these are."""
    monkeypatch.setattr(packing_module, "_MIN_CALL", 1 << 40)  # as on a GPU: no call for each caption
    config = dataclasses.replace(
        TEXT["roberta"], hf_config={**(TEXT["roberta"].hf_config or {}), "num_hidden_layers": 3}
    )
    torch.manual_seed(0)
    tower: Any = build_text_tower(config)
    batches = [COUNTS, COUNTS[1:], [4, 9, 2], [6, 6, 6, 6], [3, 3]]
    expected = [tower.eval()(*captions(counts, pad=1), token_counts=counts) for counts in batches]
    tower.prepare_training(compile=True)
    for module in tower.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tower.train()
    for counts, plain in zip(batches, expected, strict=True):
        assert_close_rel("compiled", plain, tower(*captions(counts, pad=1), token_counts=counts), 1e-5)
    assert len(graphs) == 2
    tower.eval()(*captions([2, 5], pad=1), token_counts=[2, 5])
    assert len(graphs) == 2  # evaluation runs the layers as they are


def test_a_scale_of_attention_other_than_the_usual() -> None:
    torch.manual_seed(0)
    tower: Any = build_text_tower(TEXT["roberta"]).double()
    for layer in tower.base.encoder.layer:
        layer.attention.self.scaling = 0.7
    ids, mask = captions(COUNTS, pad=1)
    assert_close_rel("scaled", tower(ids, mask), tower(ids, mask, token_counts=COUNTS), 1e-5)


def test_a_model_with_packed_attention_is_otherwise_itself() -> None:
    """What transformers computes from ids and a 2-d mask, as without fastclap."""
    from transformers import AutoModel

    torch.manual_seed(0)
    tower: Any = build_text_tower(TEXT["roberta"]).eval()
    ids, mask = captions(COUNTS, pad=1)
    theirs = AutoModel.from_config(type(tower.base.config)(**ROBERTA)).eval()
    theirs.load_state_dict(tower.base.state_dict())
    expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(tower.base(input_ids=ids, attention_mask=mask).last_hidden_state, expected)
    assert "fastclap" not in str(tower.hf_config)


@pytest.mark.parametrize("name", ["roberta", "t5"])
def test_sharded_towers_run_each_layer_once(name: str) -> None:
    """FSDP gathers a layer's weights on all ranks together, so the number of groups must not depend on the captions."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    tower: Any = build_text_tower(TEXT[name]).eval()
    counts = [3] * 9 + [15] * 9
    ids, mask = captions(counts, pad=1)
    expected = tower(ids, mask)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layers = tower.base.encoder.layer if name == "roberta" else tower.base.block
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(tower, mesh=mesh)
        runs: list[int] = []
        layers[0].register_forward_hook(lambda *ignored: runs.append(1))
        out = tower(ids, mask, token_counts=counts)
        assert_close_rel("sharded", expected, out, 1e-5)
        out.sum().backward()
        assert len(runs) == 1
    finally:
        torch.distributed.destroy_process_group()


def test_token_counts_that_are_not_those_of_the_batch() -> None:
    ids, mask = captions(COUNTS)
    for config in (TEXT["small mean"], TEXT["roberta"]):
        with pytest.raises(ValueError, match=r"token_counts\[2\] is 19"):
            build_text_tower(config)(ids, mask, token_counts=[5, 1, 19, 9, 3, 2])


# -- the whole model --------------------------------------------------------------------------------------------------


def model_of(text: str, dropout: float = 0.0) -> CLAP:
    torch.manual_seed(0)
    config = CLAPConfig(
        audio=dataclasses.replace(AUDIO["log-mel"], dropout=dropout),
        text=dataclasses.replace(TEXT[text], dropout=dropout),
        head=HeadConfig(kind="linear", dim=8),
    )
    return CLAP(config)


@pytest.mark.parametrize("text", ["small mean", "roberta"])
def test_nothing_waits_for_the_device(text: str) -> None:
    model = model_of(text)
    lengths = [4000, 2000, 3000]
    wave, device_lengths = clips(lengths)
    ids, mask = captions([4, 2, 3], pad=1)
    with host_syncs() as found:
        audio = model.encode_audio(wave, device_lengths, host_lengths=lengths)
        words = model.encode_text(ids, mask, token_counts=[4, 2, 3])
        (model.encode_text(ids, mask) * words * audio).sum().backward()
    # the front-end checks lengths that are on the host anyway
    assert [sync for sync in found if "log_mel" not in sync] == []


def test_gradient_cache_cuts_the_lengths_of_the_host() -> None:
    lengths = [4000, 2000, 3000, 3500, 2500]
    counts = [4, 2, 3, 7, 5]
    wave, device_lengths = clips(lengths)
    ids, mask = captions(counts, pad=1)
    audio = {"audio": wave, "lengths": device_lengths, "host_lengths": lengths}
    text = {"input_ids": ids, "attention_mask": mask, "token_counts": counts}
    model = model_of("roberta").double()
    loss = info_nce(model.encode_audio(**audio), model.encode_text(**text), 10.0)  # type: ignore[arg-type]
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cached = GradCache([model.encode_audio, model.encode_text], 2, lambda a, b: info_nce(a, b, 10.0))(audio, text)
    assert_close_rel("loss", loss, cached, 1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-8)


def test_gradient_cache_repeats_the_dropout_of_packed_batches() -> None:
    lengths, counts = [4000, 2000, 3000, 3500], [4, 2, 3, 7]
    wave, device_lengths = clips(lengths)
    ids, mask = captions(counts)
    model = model_of("small mean", dropout=0.3).train()

    def run(chunk: int, cut: bool) -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        audio = {"audio": wave, "lengths": device_lengths, "host_lengths": lengths}
        text = {"input_ids": ids, "attention_mask": mask, "token_counts": counts}
        if cut:
            GradCache([model.encode_audio, model.encode_text], chunk, lambda a, b: info_nce(a, b, 10.0))(audio, text)
        else:
            towers: list[tuple[Any, dict[str, Any]]] = [(model.encode_audio, audio), (model.encode_text, text)]
            parts = [
                torch.cat([tower(**{k: x[at : at + chunk] for k, x in batch.items()}) for at in range(0, 4, chunk)])
                for tower, batch in towers
            ]
            info_nce(parts[0], parts[1], 10.0).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, cached = run(2, cut=False), run(2, cut=True)
    for name, gradient in expected.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-4, atol=1e-6)


def test_embeddings_for_users_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("small mean").eval()
    packed: list[int] = []
    original = Packing.pack
    monkeypatch.setattr(Packing, "pack", lambda self, x: packed.append(self.total) or original(self, x))
    waves = [torch.randn(4000), torch.randn(1600)]
    together = model.embed_audio(waves)
    assert len(packed) > 0
    alone = torch.cat([model.embed_audio([wave]) for wave in waves])
    assert_close_rel("alone", alone, together, 1e-5)
