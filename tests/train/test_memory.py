"""What a step needs of the memory, and the form that follows from it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.models.clap import CLAP
from fastclap.models.tokenizer import train_tokenizer
from fastclap.train import memory
from fastclap.train.config import TrainConfig
from fastclap.train.distributed import World
from fastclap.train.loop import train
from fastclap.train.memory import Kept, choose

WAVLM = {
    "model_type": "wavlm",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "layerdrop": 0.9,
}
CAPTIONS = ["A calm voice.", "An angry voice that goes on for a while.", "A whisper."]
GIB = 1 << 30


def a_model() -> CLAP:
    torch.manual_seed(0)
    text = TextTowerConfig(width=16, vocab_size=300)
    config = CLAPConfig(AudioTowerConfig("wav2vec2", hf_config=WAVLM), text, HeadConfig("linear", 8))
    return CLAP(config, train_tokenizer(CAPTIONS, 300))


def of_seconds(seconds: float, **changes: Any) -> TrainConfig:
    config = TrainConfig(**changes)
    config.data.crop_seconds = seconds
    return config


def saved(model: CLAP, clips: int, samples: int) -> int:
    """Bytes that a forward pass of the audio tower keeps beside its parameters, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        audio = torch.zeros(clips, samples, dtype=torch.int16)
        out = model.encode_audio(audio, torch.full((clips,), samples), host_lengths=[samples] * clips)
        total = sum(found.values())
    assert out.requires_grad
    return total


def test_what_a_clip_keeps_is_measured_from_few() -> None:
    model, config = a_model(), of_seconds(1.0)
    kept = memory.measure(model, CAPTIONS, config)
    longer = memory.measure(model, CAPTIONS, of_seconds(3.0))
    assert longer.clip > 2.8 * kept.clip
    model.audio_branch.base.encoder.layerdrop = 0.0  # type: ignore[union-attr]
    eight = saved(model, 8, 16000)
    # beside the audio tower `kept` holds a small text tower and the gradients of one layer of six
    assert eight < kept.fixed + 8 * kept.clip < 2 * eight
    model.audio_branch.prepare_training(checkpoint=True)
    # beside what these hooks see, each layer keeps its input, and one at a time is computed again and differentiated
    outside = (saved(model, 8, 16000) - saved(model, 2, 16000)) // 6
    frames, inputs = 49, 6
    assert outside + inputs * frames * 64 * 4 < kept.checkpointed < 0.7 * kept.clip


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = a_model()
    before = {name: x.clone() for name, x in (*model.named_parameters(), *model.named_buffers())}
    memory.measure(model, CAPTIONS, of_seconds(0.5))
    assert model.audio_branch.base.encoder.layerdrop == 0.9  # type: ignore[union-attr]
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(x, before[name]), name


def test_the_form_that_costs_least_is_chosen() -> None:
    kept = Kept(0, clip=1000, checkpointed=100)
    assert choose(32, kept, 32_000) == (32, False)  # all at once
    assert choose(32, kept, 31_999) == (16, False)  # half a forward pass more, against 0.84
    assert choose(32, kept, 4_000) == (32, True)  # 0.84 more, against 7/8
    assert choose(32, kept, 3_000) == (3, False)  # 10/11 more, against 0.84 and a half


@pytest.mark.parametrize("rows", [1, 7, 32, 8192])
def test_whatever_is_chosen_fits(rows: int) -> None:
    kept = Kept(0, clip=900, checkpointed=200)
    for room in (200, 899, 900, 5_000, 60_000, 10**7):
        for chunk in (None, 3):
            for again in (None, False, True):
                size, checkpoint = choose(rows, kept, room, chunk, again)
                assert 1 <= size <= max(rows, chunk or 1)
                assert again is None or checkpoint is again
                assert chunk is None or size == chunk
                could = room >= (chunk or 1) * (kept.clip if again is False else kept.checkpointed)
                if could:
                    assert size * (kept.checkpointed if checkpoint else kept.clip) <= room
                if chunk is None:  # no chunk is much smaller than another
                    assert math.ceil(rows / size) * size < rows + math.ceil(rows / size)


def test_where_nothing_fits_it_is_tried_with_the_least() -> None:
    assert choose(32, Kept(0, 1000, 250), 10) == (1, True)
    assert choose(32, Kept(0, 1000, 250), -5, checkpoint=False) == (1, False)


def test_a_cpu_takes_the_batch_whole() -> None:
    from fastclap.train.distributed import World

    world = World(0, 1, torch.device("cpu"), None)
    assert memory.plan(a_model(), [], of_seconds(1.0, batch_size=12), world) == (12, False, "")
    fixed = of_seconds(1.0, batch_size=12, chunk_size=5, checkpoint_activations="on")
    assert memory.plan(a_model(), [], fixed, world) == (5, True, "")


def test_of_a_batch_by_seconds_the_longest_clips_have_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, world = a_model(), World(0, 2, torch.device("cpu"), None)
    manifest = [SimpleNamespace(captions=(text,), fine_captions=()) for text in CAPTIONS]
    config = of_seconds(10.0, batch_size=256)
    config.data.batch_seconds = 400.0  # 20 clips of 10 s for each of two processes
    monkeypatch.setattr(memory, "measure", lambda *_: Kept(0, GIB, GIB))
    state = 16 * sum(p.numel() for p in model.parameters()) + memory._SLACK
    for room, chunk in ((21, 128), (19, 10)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, room=room: (room * GIB + state) / memory._USABLE)
        assert memory.plan(model, manifest, config, world).chunk_size == chunk  # type: ignore[arg-type]
    config.chunk_size = 64
    assert memory.plan(model, manifest, config, world).chunk_size == 64  # type: ignore[arg-type]
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert memory.plan(model, manifest, config, world).chunk_size == 64  # type: ignore[arg-type]


def test_sharded_towers_have_whole_gradients_where_a_step_has_several_backward_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They take the room of two clips here."""
    from fastclap.train.distributed import World

    model, world = a_model(), World(0, 2, torch.device("cpu"), None)
    trained = sum(p.numel() for p in model.parameters())
    clip = 2 * trained
    monkeypatch.setattr(memory, "measure", lambda *_: Kept(0, clip, clip))

    def chunk(clips: float, **changes: Any) -> int:
        config = of_seconds(1.0, batch_size=8, checkpoint_activations="off", **changes)
        state = trained * (12 + 4 * bool(config.optimizer.ema_decay)) // (2 if config.shard else 1)
        monkeypatch.setattr(memory, "free_bytes", lambda _: round((GIB + state + clips * clip) / 0.93))
        return memory.plan(model, [], config, world).chunk_size

    assert chunk(4.5) == chunk(4.5, shard=True) == 4
    assert chunk(3.5) == 2 and chunk(3.5, shard=True) == 1
    assert chunk(4.5, accumulate=2) == 4 and chunk(4.5, accumulate=2, shard=True) == 2


def test_a_run_says_how_its_batch_fits(tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """With memory for three clips, a batch of eight is three chunks of three, as if that had been asked for."""
    given, little = tiny("given", steps=2, chunk_size=3), tiny("little", steps=2)
    train(given)
    assert "memory:" not in capsys.readouterr().out

    def measured(*_: Any) -> Kept:
        return Kept(0, 1 << 28, 1 << 28)

    monkeypatch.setattr(memory, "measure", measured)
    monkeypatch.setattr(memory, "free_bytes", lambda _: round((GIB + 3.5 * (1 << 28) + 40e6) / 0.93))
    train(little)
    rows = little.batch_size
    said = capsys.readouterr().out
    assert f"{rows} clips in {math.ceil(rows / 3)} chunks of 3" in said
    expected, actual = (load_file(Path(c.run_dir) / "model" / "model.safetensors") for c in (given, little))
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
