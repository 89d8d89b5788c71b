"""The public doors of embedding: what they take, from several threads, and recordings of any length."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

from fastclap.audio import AudioError, AudioFile
from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.data import BadClip, Manifest
from fastclap.errors import ConfigError, DataError
from fastclap.evaluation.embedding import embed_clips
from fastclap.models import encoder
from fastclap.models.clap import CLAP
from fastclap.models.encoder import evaluation_mode
from fastclap.models.layers import SharedContext, weight_of, weights_computed_once
from fastclap.models.tokenizer import Tokenizer, train_tokenizer

RATE = 16000
CAPTIONS = [
    "A calm voice.",
    "An angry deep voice, which speaks for long.",
    "x",
    "A person is speaking in a calm style.",
]
WAVLM = {
    "model_type": "wavlm",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8, 8],
    "conv_kernel": [10, 8],
    "conv_stride": [5, 4],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "num_buckets": 32,
    "max_bucket_distance": 80,
    "feat_extract_norm": "layer",
    "mask_time_prob": 0.5,
    "layerdrop": 0.5,
}
XLM = {"model_type": "xlm-roberta", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2}
XLM |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 80}
MPNET = {**XLM, "model_type": "mpnet"}
WHISPER = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
WHISPER |= {"num_mel_bins": 80, "max_source_positions": 50}  # a window of one second

AUDIO = {
    "log-mel": AudioTowerConfig(width=16, layers=1, heads=2, feature_options={"n_mels": 16}),
    "wavlm": AudioTowerConfig(kind="wav2vec2", hf_config=WAVLM),
    "whisper": AudioTowerConfig(kind="whisper", window="clip", hf_config=WHISPER),
}
TEXT = {
    "small": TextTowerConfig(width=16, layers=1, heads=2, vocab_size=300),
    "packed": TextTowerConfig(kind="hf", hf_config=XLM),
    "states": TextTowerConfig(kind="hf", hf_config=MPNET, hidden_states="weighted"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CAPTIONS, 300)


@pytest.fixture(scope="module")
def make(tokenizer: Tokenizer) -> Callable[..., CLAP]:
    def make(audio: str = "log-mel", text: str = "small") -> CLAP:
        torch.manual_seed(0)
        return CLAP(CLAPConfig(audio=AUDIO[audio], text=TEXT[text], head=HeadConfig("paraspeechclap", 8)), tokenizer)

    return make


@pytest.fixture(scope="module")
def model(make: Callable[..., CLAP]) -> CLAP:
    return make().eval()


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("audio", "text"), [("log-mel", "small"), ("wavlm", "packed"), ("whisper", "states")])
def test_eight_threads_find_what_one_finds(make: Callable[..., CLAP], audio: str, text: str, training: bool) -> None:
    model = make(audio, text).train(training)
    model.text_branch.eval()  # modes may be mixed
    modes = [module.training for module in model.modules()]
    clips = [noise(4000), noise(6000, 1)]

    def results(number: int) -> list[torch.Tensor]:
        return [
            model.embed_audio(clips),
            model.embed_audio(clips[number % 2 :][:1]),
            model.embed_text(CAPTIONS),
            model.embed_text(CAPTIONS[number % 4 :][:1]),
        ]

    expected = [results(number) for number in range(4)]
    with evaluation_mode(model):
        assert torch.equal(expected[0][0], results(0)[0]), "both modes give the same embeddings"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(results, [*range(4)] * 5))
    for number, vectors in enumerate(found):
        assert all(map(torch.equal, vectors, expected[number % 4]))
    assert [module.training for module in model.modules()] == modes


def test_the_last_user_restores_the_modes(make: Callable[..., CLAP]) -> None:
    model = make().train()
    first, second = evaluation_mode(model), evaluation_mode(model.audio_branch)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.training and not any(module.training for module in model.audio_branch.modules())
    second.__exit__(None, None, None)
    assert all(module.training for module in model.modules())
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert all(module.training for module in model.modules()) and not encoder._in_use


def test_captions_are_cut_for_each_call_alone(tokenizer: Tokenizer) -> None:
    expected = {most: tokenizer(CAPTIONS, most)["input_ids"] for most in (2, 3, 5, 9)}
    with ThreadPoolExecutor(8) as pool:
        for most, ids in pool.map(lambda most: (most, tokenizer(CAPTIONS, most)["input_ids"]), [2, 3, 5, 9] * 50):
            assert torch.equal(ids, expected[most])


def test_a_parametrized_weight_is_computed_once_for_a_thread() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    assert weight_of(layer) is not weight_of(layer)
    with weights_computed_once():
        own = weight_of(layer)
        assert weight_of(layer) is own
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(weight_of, layer).result() is not own
    assert weight_of(layer) is not own


def test_a_shared_context_is_entered_once_and_left_last() -> None:
    events: list[str] = []

    class Context:
        def __enter__(self) -> None:
            events.append("entered")

        def __exit__(self, *_: object) -> None:
            events.append("left")

    shared = SharedContext(Context)
    first, second = shared(), shared()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert events == ["entered"]
    second.__exit__(None, None, None)
    assert events == ["entered", "left"]


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a", r"embed_text takes a list of captions, not 'a'; for one caption write \['a'\]"),
        (b"a", "embed_text takes a list of captions, not b'a'"),
        (None, "embed_text takes a list of captions, not NoneType"),
        (3, "embed_text takes a list of captions, not int"),
        ({"a": 1}, "embed_text takes a list of captions, not dict"),
        ([], "embed_text takes a list of captions, and this one is empty"),
        (["a", None], "text 1 is None, not a string"),
        (["a", "\t\n"], "text 1 is blank"),
        (["a", "b\ud800"], r"text 1 is 'b\\ud800', which holds half of a character"),
    ],
)
def test_bad_texts(model: CLAP, texts: Any, message: str) -> None:
    for call in (model.embed_text, lambda texts: model.similarity([noise(4000)], texts)):
        with pytest.raises(DataError, match=message):
            call(texts)


@pytest.mark.parametrize(
    ("audio", "lengths", "message"),
    [
        (None, None, "embed_audio takes a list of clips, or a padded batch of them, not NoneType"),
        (7, None, "embed_audio takes a list of clips, or a padded batch of them, not int"),
        (b"RIFF", None, "not bytes"),
        ({"array": noise(9)}, None, "not dict"),
        ([0.5, 0.25], None, "clip 0 is float; give a path, an array or a tensor"),
        (noise(900), None, r"a padded batch has the shape \[clips, samples\], not \(900,\)"),
        ([noise(900).astype(complex)], None, r"clip 0 is of type torch\.complex128; give int16"),
        ([torch.zeros(9, dtype=torch.complex64)], None, r"clip 0 is of type torch\.complex64"),
        ([noise(900) > 0], None, r"clip 0 is of type torch\.bool"),
        ([np.array(["a"])], None, r"clip 0 is of type torch\.<U1"),
        ([np.array([None])], None, r"clip 0 is of type torch\.object"),
        ([np.array(["2020"], "M8[D]")], None, "clip 0 is of type"),
        ([torch.zeros(9, device="meta")], None, "clip 0 is of type"),
        ([torch.zeros(9).to_sparse()], None, "clip 0 is of type"),
        ([noise(900), np.full(900, 1e300)], None, "clip 1 has NaN or infinite samples"),
        ([np.zeros((), np.float32)], None, r"clip 0 has the shape \(\)"),
        (torch.zeros(2, 100), [50, 1.5], "length 1 is 1.5, not an integer"),
        (torch.zeros(2, 100), [50, None], "length 1 is None, not an integer"),
        (torch.zeros(2, 100), torch.tensor([50.0, math.nan]), "length 0 is 50.0, not an integer"),
        (torch.zeros(2, 100), 50, "lengths are 50; give one for each clip"),
        (torch.zeros(2, 100), [-1, 3], "length 0 is -1"),
    ],
)
def test_bad_audio(model: CLAP, audio: Any, lengths: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        model.embed_audio(audio, lengths)


@pytest.mark.parametrize("rate", [0, -16000, True, "16000", None, math.nan, math.inf])
def test_bad_sampling_rates(model: CLAP, rate: Any) -> None:
    with pytest.raises(ConfigError, match="sampling_rate is"):
        model.embed_audio([noise(4000)], sampling_rate=rate)


@pytest.mark.parametrize("size", [0, -1, 1.5, None, True, "3"])
def test_bad_batch_sizes(model: CLAP, size: Any) -> None:
    for call in (
        lambda: model.embed_audio([noise(4000)], batch_size=size),
        lambda: model.embed_text(["a"], batch_size=size),
    ):
        with pytest.raises(ConfigError, match="batch_size is"):
            call()


@pytest.mark.parametrize(
    ("audio", "lengths", "message"),
    [
        (noise(90), [90], r"embed_batch takes a tensor \[clips, samples\], not \(90,\)"),
        ([noise(90)], [90], "embed_batch takes a tensor .*, not list"),
        (torch.zeros(2, 90), [90], "1 lengths for 2 clips"),
        (torch.zeros(0, 90), [], "0 lengths for 0 clips"),
        (torch.zeros(2, 90), [90, 91], "length 1 is 91; a row has from 1 to 90 samples"),
        (torch.zeros(2, 90), [90, 0], "length 1 is 0"),
        (torch.zeros(2, 90, dtype=torch.int32), [90, 90], r"a batch of type torch\.int32"),
        (torch.tensor([[0.0, 1.0], [math.inf, 1.0]]), [2, 2], "row 1 has NaN or infinite samples"),
    ],
)
def test_bad_batches(model: CLAP, audio: Any, lengths: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        model.embed_batch(audio, lengths)


def test_padding_may_hold_anything_and_arrays_may_lie_anyhow(model: CLAP) -> None:
    clip = noise(6000)
    expected = model.embed_audio([clip])
    padded = torch.cat([torch.from_numpy(clip), torch.full((50,), math.nan)])[None]
    for same in (
        model.embed_batch(padded, [6000]),
        model.embed_audio([clip[::-1].copy()[::-1]]),
        model.embed_audio([clip.astype(">f4")]),
        model.embed_audio([clip.astype(np.float64)], sampling_rate=np.int64(16000)),  # type: ignore[arg-type]
    ):
        torch.testing.assert_close(same, expected, atol=1e-6, rtol=0)


def test_summaries_are_of_one_side(model: CLAP) -> None:
    for arguments in ({}, {"audio": torch.zeros(1, 32), "text": torch.zeros(1, 16)}):
        with pytest.raises(TypeError, match="summaries of audio or of text"):
            model.embed_summaries(**arguments)


# -- long recordings --------------------------------------------------------------------------------------------------


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "LONG_SECONDS", 1.0)
    monkeypatch.setattr(encoder, "WINDOW_SECONDS", 0.25)
    monkeypatch.setattr(encoder, "WINDOWS_AT_ONCE", 3)


@pytest.mark.usefixtures("short_limit")
@pytest.mark.parametrize("audio", ["log-mel", "wavlm"])
def test_a_long_recording_is_the_mean_of_its_windows(make: Callable[..., CLAP], tmp_path: Path, audio: str) -> None:
    model = make(audio).train()
    wave = np.round(noise(RATE * 17 // 10) * 32768).astype(np.int16)
    edges = [len(wave) * number // 7 for number in range(8)]
    windows = [wave[begin:end] for begin, end in itertools.pairwise(edges)]
    expected = F.normalize(model.embed_audio(windows).mean(0), dim=0)
    short = [noise(4000), noise(RATE)]
    path = str(tmp_path / "long.wav")
    soundfile.write(path, wave, RATE)
    seen: list[tuple[int, ...]] = []
    hook = model.audio_branch.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    together = model.embed_audio([short[0], wave, short[1], path])
    hook.remove()
    assert max(shape[1] for shape in seen) == RATE, "nothing longer than the limit"
    assert max(shape[0] for shape in seen) <= 3
    torch.testing.assert_close(together[1], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[3], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[[0, 2]], model.embed_audio(short), atol=1e-5, rtol=0)
    assert model.audio_runs([4000, len(wave)]) == len(model._runs([4000, len(wave)])) > 2


def test_up_to_the_limit_it_is_seen_whole(model: CLAP, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.embed_audio([noise(RATE)])
    monkeypatch.setattr(encoder, "LONG_SECONDS", 1.0)
    monkeypatch.setattr(encoder, "WINDOW_SECONDS", 0.25)
    assert torch.equal(model.embed_audio([noise(RATE)]), expected)
    assert not torch.allclose(model.embed_audio([noise(RATE + 1)]), expected, atol=1e-3)


@pytest.mark.usefixtures("short_limit")
def test_a_tower_that_sees_the_beginning_sees_that_of_a_long_recording(
    make: Callable[..., CLAP], tmp_path: Path
) -> None:
    model = make("whisper")
    wave = np.round(noise(2 * RATE) * 32768).astype(np.int16)
    soundfile.write(tmp_path / "long.wav", wave, RATE)
    expected = model.embed_audio([wave[:RATE]])
    for same in (model.embed_audio([wave]), model.embed_audio([tmp_path / "long.wav"])):
        torch.testing.assert_close(same, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("short_limit")
def test_collections_of_long_recordings_are_read_window_by_window(
    make: Callable[..., CLAP], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastclap.apps.embed import clip_row

    model = make().train()
    waves = [noise(samples, samples) for samples in (4000, 2 * RATE, RATE, 3 * RATE)]
    waves[1][:] = 0
    paths = [str(tmp_path / f"{number}.wav") for number in range(6)]
    for path, wave in zip(paths, waves, strict=False):
        soundfile.write(path, wave, RATE, subtype="PCM_16")
    Path(paths[4]).write_bytes(b"RIFF, or what is left of it")
    soundfile.write(paths[5], np.concatenate([waves[3], waves[3]]), RATE, format="FLAC")
    Path(paths[5]).write_bytes(Path(paths[5]).read_bytes()[:100_000])  # the second half is missing
    reads: list[int] = []
    read = AudioFile.read

    def counting(self: AudioFile, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        wave = read(self, start, num_samples)
        reads.append(len(wave))
        return wave

    monkeypatch.setattr(AudioFile, "read", counting)
    for manifest in ([clip_row(path, "x") for path in paths], Manifest([clip_row(path, "x") for path in paths])):
        bad: list[BadClip] = []
        found = dict(
            pair
            for rows, vectors in embed_clips(model, manifest, batch_size=2, threads=1, bad=bad)
            for pair in zip(rows, vectors, strict=True)
        )
        assert sorted(found) == [0, 2, 3]
        assert {clip.row: clip.path for clip in bad} == {1: paths[1], 4: paths[4], 5: paths[5]}
        assert "silent" in next(clip.reason for clip in bad if clip.row == 1)
        assert max(reads) <= RATE
        for row, vector in found.items():
            torch.testing.assert_close(vector, model.embed_audio([paths[row]])[0], atol=1e-6, rtol=0)
        reads.clear()
    with pytest.raises((AudioError, DataError), match=r"clip 0: .*1\.wav: all samples are zero"):
        model.embed_audio([paths[1]])
