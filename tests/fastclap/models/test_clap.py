"""CLAP: embeddings of files, arrays and strings; a folder that comes back exactly or says what is wrong with it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import ConfigError, DataError, ModelError
from fastclap.models.clap import CLAP
from fastclap.models.tokenizer import Tokenizer, train_tokenizer
from fastclap.testing import assert_close_rel

CAPTIONS = ["A man speaks in an angry tone.", "A woman sounds sad.", "A sad man, softly.", "happy"] * 2
BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 16, "vocab_size": 300}
WAVLM = {"model_type": "wavlm", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WAVLM |= {"intermediate_size": 16, "conv_dim": [8] * 7, "num_conv_pos_embeddings": 16, "feat_extract_norm": "layer"}
WAVLM |= {"num_conv_pos_embedding_groups": 2}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CAPTIONS, 300)


def small_config(**audio: Any) -> CLAPConfig:
    return CLAPConfig(
        audio=AudioTowerConfig(**{"width": 16, "layers": 1, "heads": 2, **audio}),
        text=TextTowerConfig(width=16, layers=1, heads=2, vocab_size=300),
        head=HeadConfig(dim=8),
    )


@pytest.fixture
def model(tokenizer: Tokenizer) -> CLAP:
    torch.manual_seed(0)
    return CLAP(small_config(), tokenizer)


def waves(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [(0.1 * generator.standard_normal(length)).astype(np.float32) for length in lengths]


@contextlib.contextmanager
def unchanged(model: CLAP) -> Iterator[None]:
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    yield
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)


# -- embeddings -------------------------------------------------------------------------------------------------------


def test_files_arrays_tensors_and_padded_batches_agree(model: CLAP, tmp_path: Path) -> None:
    arrays = [np.round(wave * 32767) / 32768 for wave in waves(9000, 4000, 16000)]
    arrays = [array.astype(np.float32) for array in arrays]
    for index, array in enumerate(arrays):
        soundfile.write(tmp_path / f"{index}.wav", array, 16000, subtype="PCM_16")
    paths = [tmp_path / f"{index}.wav" for index in range(3)]
    with unchanged(model):
        expected = model.embed_audio(arrays)
    assert expected.shape == (3, 8) and expected.dtype == torch.float32 and not expected.requires_grad
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(3))
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(array) for array in arrays], batch_first=True)
    lengths = torch.tensor([9000, 4000, 16000])
    mixed = [str(paths[0]), torch.from_numpy(arrays[1]).double(), (arrays[2] * 32768).astype(np.int16)]
    for same in (
        model.embed_audio(paths),
        model.embed_audio(paths, batch_size=1),
        model.embed_audio(mixed),
        model.embed_audio(padded, lengths),
        model.embed_audio(padded.numpy(), lengths.tolist()),
        model.embed_audio((padded * 32768).short(), lengths),
    ):
        torch.testing.assert_close(same, expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        encoded = F.normalize(model.eval().encode_audio(padded, lengths), dim=1)
    torch.testing.assert_close(encoded, expected, atol=1e-5, rtol=0)


def test_order_is_kept_whatever_the_lengths_and_batch_size(model: CLAP) -> None:
    clips = waves(*range(8000, 1000, -1000), 3000, 5000)
    one_by_one = torch.cat([model.embed_audio([clip]) for clip in clips])
    for batch_size in (1, 4, 100):
        torch.testing.assert_close(model.embed_audio(clips, batch_size=batch_size), one_by_one, atol=1e-5, rtol=0)


def test_on_a_cpu_a_tower_of_transformers_takes_one_clip_at_a_time(tokenizer: Tokenizer) -> None:
    model = CLAP(small_config(kind="wav2vec2", hf_config=WAVLM), tokenizer)
    sizes: list[int] = []
    model.audio_branch.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    vectors = model.embed_audio(waves(9000, 4000, 9000))
    assert sizes == [1, 1, 1]
    with torch.inference_mode():
        model.eval()
        batch = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(wave) for wave in waves(9000, 4000, 9000)], True)
        together = model.encode_audio(batch, torch.tensor([9000, 4000, 9000]))
    assert_close_rel("one by one", torch.nn.functional.normalize(together, dim=-1), vectors, 1e-5)


def test_other_sampling_rates_are_resampled(model: CLAP, tmp_path: Path) -> None:
    wave = waves(24000)[0]
    at_16k = soxr.resample(wave, 24000, 16000)
    expected = model.embed_audio([at_16k])
    torch.testing.assert_close(model.embed_audio([wave], sampling_rate=24000), expected)
    torch.testing.assert_close(
        model.embed_audio([(wave * 32768).astype(np.int16)], sampling_rate=24000), expected, atol=1e-3, rtol=0
    )
    soundfile.write(tmp_path / "clip.wav", np.stack([wave, wave], 1), 24000, subtype="FLOAT")
    torch.testing.assert_close(model.embed_audio([tmp_path / "clip.wav"]), expected, atol=1e-3, rtol=0)


def test_embed_text_does_not_depend_on_the_batch(model: CLAP) -> None:
    with unchanged(model):
        together = model.embed_text(CAPTIONS[:4])
    alone = torch.cat([model.embed_text([caption]) for caption in CAPTIONS[:4]])
    assert (together - alone).abs().max() < 1e-5
    torch.testing.assert_close(model.embed_text(CAPTIONS[:4], batch_size=1), together, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    with torch.no_grad():
        encoded = F.normalize(model.eval().encode_text(**model.tokenize(CAPTIONS[:4])), dim=1)
    torch.testing.assert_close(encoded, together, atol=1e-5, rtol=0)


def test_similarity_is_the_cosine(model: CLAP) -> None:
    clips = waves(3000, 4000)
    cosine = model.similarity(clips, CAPTIONS[:3])
    expected = torch.stack(
        [
            F.cosine_similarity(model.embed_audio(clips)[i], model.embed_text(CAPTIONS[:3]), dim=-1)
            for i in range(len(clips))
        ]
    )
    torch.testing.assert_close(cosine, expected)


def test_embeddings_can_enter_a_graph(model: CLAP) -> None:
    weight = torch.ones(8, requires_grad=True)
    (model.embed_audio(waves(3000)) * weight).sum().backward()
    assert weight.grad is not None


def test_mixed_modes_are_restored(model: CLAP) -> None:
    model.train()
    model.text_branch.eval()
    with unchanged(model):
        model.embed_audio(waves(3000))
        with pytest.raises(DataError):
            model.embed_audio([])


def test_a_tower_at_another_rate_gets_its_rate(tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CLAP(small_config(features="clap"), tokenizer)
    assert model.sampling_rate == 48000
    wave = waves(16000)[0]
    expected = model.embed_audio([soxr.resample(wave, 16000, 48000)], sampling_rate=48000)
    torch.testing.assert_close(model.embed_audio([wave]), expected)
    soundfile.write(tmp_path / "clip.wav", wave, 48000, subtype="PCM_16")
    at_48k = model.embed_audio([soundfile.read(tmp_path / "clip.wav")[0]], sampling_rate=48000)
    torch.testing.assert_close(model.embed_audio([tmp_path / "clip.wav"]), at_48k, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ([], "no clip to embed"),
        ("clip.wav", r"write \['clip\.wav'\]"),
        ([np.zeros(3000, np.float32), np.zeros(0, np.float32)], "clip 1 is empty"),
        ([np.zeros((2, 3000), np.float32)], r"clip 0 has the shape \(2, 3000\); give mono"),
        ([np.zeros(3000, np.int32)], r"clip 0 is of type torch\.int32"),
        ([np.zeros(9, np.float32), np.array([0, np.nan, 0], np.float32)], "clip 1 has NaN or infinite samples"),
        ([torch.tensor([0.0, math.inf])], "clip 0 has NaN or infinite samples"),
        ([None], "clip 0 is NoneType"),
        (torch.zeros(2, 3, 4), r"not \(2, 3, 4\)"),
        (torch.zeros(0, 100), "no clip to embed"),
    ],
)
def test_bad_clips_are_named(model: CLAP, audio: Any, message: str) -> None:
    with unchanged(model), pytest.raises(DataError, match=message):
        model.embed_audio(audio)


def test_bad_files_are_named(model: CLAP, tmp_path: Path) -> None:
    good = tmp_path / "good.wav"
    soundfile.write(good, waves(3000)[0], 16000)
    with pytest.raises(DataError, match=r"clip 1: .*absent\.wav: no such file"):
        model.embed_audio([good, tmp_path / "absent.wav"])
    (tmp_path / "bad.flac").write_bytes(b"fLaC" + bytes(50))
    with pytest.raises(DataError, match=r"clip 0: .*bad\.flac"):
        model.embed_audio([tmp_path / "bad.flac", good])


def test_bad_lengths_are_named(model: CLAP) -> None:
    with pytest.raises(DataError, match="length 1 is 200, but the batch is 100 samples long"):
        model.embed_audio(torch.zeros(2, 100), [50, 200])
    with pytest.raises(DataError, match="1 lengths for 2 clips"):
        model.embed_audio(torch.zeros(2, 100), [50])
    with pytest.raises(DataError, match="clip 1 is empty"):
        model.embed_audio(torch.zeros(2, 100), [50, 0])
    with pytest.raises(DataError, match="lengths go with a padded"):
        model.embed_audio([torch.zeros(100)], [50])


def test_bad_texts_are_named(model: CLAP) -> None:
    with pytest.raises(DataError, match="text 1 is blank"):
        model.embed_text(["sad", "  "])
    with pytest.raises(DataError, match="not 'sad'"):
        model.embed_text("sad")
    with pytest.raises(ModelError, match="no tokenizer"):
        CLAP(small_config()).embed_text(["sad"])


def test_real_speech_embeds_the_same_alone_batched_and_padded(model: CLAP, real_speech: Path) -> None:
    files = sorted(real_speech.rglob("*.flac"))[:12]
    together = model.embed_audio(files)
    assert (together - torch.cat([model.embed_audio([file]) for file in files])).abs().max() < 1e-5
    cuts = [soundfile.read(file, dtype="int16")[0][: 3000 + 2001 * index] for index, file in enumerate(files)]
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(cut) for cut in cuts], batch_first=True)
    alone = torch.cat([model.embed_audio([cut]) for cut in cuts])
    assert (model.embed_audio(padded, [len(cut) for cut in cuts]) - alone).abs().max() < 1e-5
    assert (alone - together).abs().max() > 1e-3


# -- training ---------------------------------------------------------------------------------------------------------


def test_logit_scale_starts_and_stays_where_it_should(model: CLAP) -> None:
    torch.testing.assert_close(model.logit_scale, torch.tensor(1 / 0.07))
    assert model.logit_scale.requires_grad and model.logit_scale.ndim == 0
    for value, expected in ((9.0, 100.0), (-1.0, 1.0), (2.0, math.exp(2.0))):
        with torch.no_grad():
            model.log_logit_scale.fill_(value)
        model.clamp_logit_scale_()
        torch.testing.assert_close(model.logit_scale.detach(), torch.tensor(expected))
    with pytest.raises(ConfigError, match="init_logit_scale"):
        CLAP(CLAPConfig(init_logit_scale=200.0))


def test_a_logit_bias_is_there_when_asked_for(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert CLAP(small_config()).logit_bias is None and "logit_bias" not in CLAP(small_config()).state_dict()
    config = small_config()
    config.init_logit_bias = -10.0
    model = CLAP(config, tokenizer)
    assert isinstance(model.logit_bias, torch.nn.Parameter) and model.logit_bias.item() == -10
    model.save_pretrained(tmp_path / "model")
    loaded = CLAP.from_pretrained(tmp_path / "model").logit_bias
    assert loaded is not None and loaded.item() == -10


def test_parameter_names_are_those_of_paraspeechclap() -> None:
    config = CLAPConfig(
        audio=AudioTowerConfig("wav2vec2", hf_config=WAVLM),
        text=TextTowerConfig("hf", hf_config=BERT, pooling="cls"),
    )
    names = set(CLAP(config).state_dict())
    prefixes = {"audio_branch.base", "text_branch.base", "log_logit_scale"}
    prefixes |= {
        f"{kind}_projection.{part}" for kind in ("audio", "text") for part in ("linear1", "linear2", "layer_norm")
    }
    assert {name for name in names if not name.startswith(tuple(prefixes))} == set()
    assert "audio_branch.base.encoder.layers.0.attention.k_proj.weight" in names
    assert "text_branch.base.encoder.layer.0.attention.self.key.weight" in names


@pytest.mark.parametrize("side", ["audio", "text"])
def test_a_frozen_tower_neither_learns_nor_drops(side: str, tokenizer: Tokenizer) -> None:
    config = small_config()
    setattr(
        config,
        side,
        type(config.audio if side == "audio" else config.text)(
            **{
                **vars(getattr(config, side)),
                "freeze": True,
            }
        ),
    )
    model = CLAP(config, tokenizer).train()
    frozen, other = (model.audio_branch, model.text_branch)[:: 1 if side == "audio" else -1]
    assert not any(module.training for module in frozen.modules()) and other.training
    audio = torch.from_numpy(np.stack(waves(4000, 4000)))
    loss = model.encode_audio(audio).sum() + model.encode_text(**model.tokenize(CAPTIONS[:2])).square().sum()
    (loss * model.logit_scale).backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen.parameters())
    assert any(parameter.grad is not None for parameter in other.parameters())
    head = getattr(model, f"{side}_projection")
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_it_learns_a_batch_by_heart(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    config = small_config(time_masks=0, frequency_masks=0)
    config.head = HeadConfig("linear", dim=16)
    model = CLAP(config, tokenizer)
    time = torch.arange(4000) / 16000
    audio = torch.stack([0.3 * torch.sin(2 * math.pi * pitch * time) for pitch in (150, 400, 1000, 2500)])
    model.audio_branch.fit_feature_statistics([(audio, None)])  # type: ignore[operator]
    tokens = model.tokenize(CAPTIONS[:4])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        a, b, scale = model(audio, **tokens)
        loss = F.cross_entropy(scale * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.clamp_logit_scale_()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert model.similarity(list(audio), CAPTIONS[:4]).argmax(1).tolist() == [0, 1, 2, 3]


def test_a_tokenizer_with_too_many_ids_is_refused(tokenizer: Tokenizer) -> None:
    config = small_config()
    config.text.vocab_size = tokenizer.vocab_size - 1
    with pytest.raises(ConfigError, match="the tokenizer has"):
        CLAP(config, tokenizer)


# -- files ------------------------------------------------------------------------------------------------------------


def embeddings(model: CLAP) -> tuple[Tensor, Tensor]:
    return model.embed_audio(waves(4000, 7000)), model.embed_text(CAPTIONS[:3])


def test_round_trip_is_exact(model: CLAP, tmp_path: Path) -> None:
    model.audio_branch.fit_feature_statistics([(torch.from_numpy(waves(9000)[0])[None], None)])  # type: ignore[operator]
    folder = tmp_path / "deep" / "model"
    model.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert os.listdir(folder.parent) == ["model"]  # nothing temporary is left
    with unchanged(model):
        loaded = CLAP.from_pretrained(folder)
    assert not loaded.training and loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for first, second in zip(embeddings(model), embeddings(loaded), strict=True):
        assert torch.equal(first, second)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    for name in os.listdir(folder):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    assert CLAP.from_pretrained(str(folder), dtype=torch.bfloat16).log_logit_scale.dtype == torch.bfloat16


def test_bfloat16_model_embeds(model: CLAP, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    half = CLAP.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    for first, second in zip(embeddings(model), embeddings(half), strict=True):
        assert second.dtype == torch.float32
        assert F.cosine_similarity(first, second).min() > 0.99


def test_an_export_of_transformers_towers_needs_no_hub(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    source = tmp_path / "bert"
    fields = {key: value for key, value in BERT.items() if key != "model_type"}
    AutoModel.from_config(BertConfig(**fields)).save_pretrained(source)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, pad_token="[PAD]").save_pretrained(source)
    config = CLAPConfig(
        audio=AudioTowerConfig("wav2vec2", hf_config=WAVLM),
        text=TextTowerConfig("hf", pretrained=str(source), pooling="pooler", max_tokens=16),
        head=HeadConfig("clsp", dim=8),
    )
    model = CLAP(config)
    assert model.tokenizer is not None and config.text.hf_config is None  # the caller's configuration stays as it was
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(source)
    loaded = CLAP.from_pretrained(tmp_path / "model")
    for first, second in zip(embeddings(model), embeddings(loaded), strict=True):
        assert torch.equal(first, second)
    assert json.loads((tmp_path / "model/config.json").read_text())["text"]["hf_config"]["hidden_size"] == 16


def test_saving_again_replaces_the_model(model: CLAP, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.log_logit_scale.fill_(1.5)
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp/model.safetensors").write_text("left by a killed save")
    model.save_pretrained(tmp_path / "model")
    assert CLAP.from_pretrained(tmp_path / "model").log_logit_scale.item() == 1.5
    assert os.listdir(tmp_path) == ["model"]
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert CLAP.from_pretrained(tmp_path / "empty").log_logit_scale.item() == 1.5


def test_a_failed_save_leaves_the_old_model(model: CLAP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_pretrained(tmp_path / "model")
    before = {item.name: item.read_bytes() for item in (tmp_path / "model").iterdir()}

    def full(self: Tokenizer, path: Path) -> None:
        path.write_text("half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save", full)
    with torch.no_grad():
        model.log_logit_scale.fill_(1.5)
    for name in ("model", "new"):
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(tmp_path / name)
    assert os.listdir(tmp_path) == ["model"]
    assert {item.name: item.read_bytes() for item in (tmp_path / "model").iterdir()} == before


def test_saving_never_touches_other_files(model: CLAP, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ModelError, match=r"holds other files \(thesis\.tex\)"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a file"):
        model.save_pretrained(tmp_path / "thesis.tex")
    assert os.listdir(tmp_path) == ["thesis.tex"]
    (tmp_path / "project").mkdir()
    (tmp_path / "project/README.md").write_text("mine")
    with pytest.raises(ModelError, match=r"holds other files \(README\.md\)"):
        model.save_pretrained(tmp_path / "project")
    assert (tmp_path / "project/README.md").read_text() == "mine"


def test_a_run_folder_gives_its_newest_complete_checkpoint(model: CLAP, tmp_path: Path) -> None:
    for step in (5, 40, 100):
        with torch.no_grad():
            model.log_logit_scale.fill_(math.log(step))
        model.save_pretrained(tmp_path / "checkpoints" / f"step-{step}")
    (tmp_path / "checkpoints/step-100/model.safetensors").unlink()
    (tmp_path / "checkpoints/step-900.tmp").mkdir()
    assert CLAP.from_pretrained(tmp_path).logit_scale.item() == pytest.approx(40)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ModelError, match="neither an exported model"):
        CLAP.from_pretrained(tmp_path)


def test_a_hub_id_is_fetched(model: CLAP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    model.save_pretrained(tmp_path / "snapshot")

    def fetch(name: str, allow_patterns: list[str]) -> str:
        if name != "someone/model":
            raise OSError("offline")
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert torch.equal(CLAP.from_pretrained("someone/model").log_logit_scale, model.log_logit_scale)
    with pytest.raises(ModelError, match="someone/else: no such folder or file, and it cannot be fetched"):
        CLAP.from_pretrained("someone/else")
    with pytest.raises(ModelError, match="no such model folder"):
        CLAP.from_pretrained(tmp_path / "absent")


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        inner = data
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, r"config\.json: format version 99, this fastclap reads 1"),
        ({"audio__colour": 1}, r"config\.json: unknown configuration key audio\.colour"),
        ({"audio__width": "wide"}, r"config\.json: audio\.width must be a whole number"),
        ({"audio__heads": 3}, r"config\.json: width must be a multiple"),
        ({"audio__layers": 2}, r"model\.safetensors: .*audio_branch\.transformer\.blocks\.1.* is missing; .* more$"),
        (
            {"audio__layers": 0},
            r"model\.safetensors: .*audio_branch\.transformer\.blocks\.0.* is not part of the model",
        ),
        ({"head__dim": 9}, r"audio_projection\.linear1\.weight has the shape \(8, \d+\) instead of \(9, \d+\)"),
    ],
)
def test_a_folder_that_does_not_fit_says_what_differs(
    model: CLAP, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model.save_pretrained(tmp_path / "model")
    edit(tmp_path / "model/config.json", **changes)
    with pytest.raises(ModelError, match=message):
        CLAP.from_pretrained(tmp_path / "model")


def test_damaged_files_are_named(model: CLAP, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    whole = weights.read_bytes()
    for part in (whole[:-100], whole[:20], b""):
        weights.write_bytes(part)
        with pytest.raises(ModelError, match=r"model\.safetensors: truncated or damaged"):
            CLAP.from_pretrained(tmp_path / "model")
    weights.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: no such weights file"):
        CLAP.from_pretrained(tmp_path / "model")
    weights.write_bytes(whole)
    config = tmp_path / "model/config.json"
    text = config.read_text()
    for broken in (text[:100], "[]", ""):
        config.write_text(broken)
        with pytest.raises(ModelError, match=r"config\.json"):
            CLAP.from_pretrained(tmp_path / "model")
