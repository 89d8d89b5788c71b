"""A model of known embeddings gives known figures; a real one is not changed by being evaluated."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.data import Manifest, load_manifest
from fastclap.errors import ConfigError, DataError, ModelError
from fastclap.evaluation import ClassificationTask, evaluate, evaluate_classification, evaluate_retrieval
from fastclap.evaluation.projection import even_selection
from fastclap.models.clap import CLAP
from fastclap.models.tokenizer import train_tokenizer

HAPPY = {"classification_tag": "happy", "sex": "male"}
SAD = {"classification_tag": "sad", "sex": "female"}
CLIPS: list[dict[str, Any]] = [
    {"text_description": ["word0", "word9"], "fine_description": "long0", **HAPPY},
    {"text_description": ["word1"], "fine_description": ["long1", "long9"], **HAPPY},
    {"text_description": "same", "fine_description": "long2", **SAD},
    {"text_description": "same", **SAD, "intrinsic_tags": ["deep", "clear"]},
    {
        "text_description": "word4",
        "fine_description": "long4",
        "classification_tag": "calm",
        "intrinsic_tags": "shrill",
    },
    {"text_description": "word5", "fine_description": "long5", "intrinsic_tags": ["deep", "shrill"]},
]
# Which clips each text describes, as the model of known embeddings believes.
BELIEFS = {
    **{"word0": [0], "word9": [5], "word1": [1], "same": [2, 3], "word4": [5], "word5": [5]},
    **{"long0": [0], "long1": [2], "long9": [1], "long2": [2], "long4": [4], "long5": [5]},
    **{"happy": [0, 1], "sad": [2], "calm": [3, 4], "male": [0, 1], "female": [2, 3], "deep": [3], "shrill": [4]},
    **{"so happy": [2, 5], "so sad": [0], "so calm": [1, 2]},
}


class Known(nn.Module):
    """Reads a clip's number off its amplitude, and a text's clips from BELIEFS."""

    sampling_rate = 16000
    device = torch.device("cpu")

    def embed_batch(self, audio: Tensor, lengths: Sequence[int]) -> Tensor:
        number = audio.amax(dim=1).long() // 1000 - 1
        return nn.functional.one_hot(number, len(CLIPS)).float()

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        rows = torch.zeros(len(texts), len(CLIPS))
        for row, text in zip(rows, texts, strict=True):
            row[BELIEFS[text]] = 1
        return nn.functional.normalize(rows, dim=1)


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> Manifest:
    for number, _ in enumerate(rows):
        length = 1600 + 160 * ((7 * number) % 5)  # decoding order is not the manifest's
        wave = np.full(length, (number + 1) * 1000, dtype=np.int16)
        wave[::2] *= -1
        soundfile.write(folder / f"{number}.wav", wave, 16000)
    lines = [json.dumps({"audio": f"{number}.wav", **row}) for number, row in enumerate(rows)]
    (folder / "clips.jsonl").write_text("\n".join(lines))
    return load_manifest(str(folder / "clips.jsonl"))


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write(tmp_path, CLIPS)


@pytest.fixture
def known() -> Any:
    return Known()


def test_retrieval_with_the_first_caption(known: Any, manifest: Manifest) -> None:
    """Texts word0, word1, same, word4 (believed to be of clip 5), word5: clip 4 alone finds nothing, and text word4."""
    result = evaluate_retrieval(known, manifest, batch_size=4)
    figures = result["retrieval"]["global"]
    assert (result["clips"], figures["clips"], figures["texts"]) == (6, 6, 5)
    to_text, to_audio = figures["audio_to_text"], figures["text_to_audio"]
    assert (to_text["queries"], to_text["candidates"]) == (6, 5)
    # Clip 4 ties with every text at cosine 0 and so is last of 5; clip 5 ties its own text with word4's and is second.
    assert to_text["R@1"] == pytest.approx(4 / 6)
    assert to_text["mean_rank"] == pytest.approx((1 + 1 + 1 + 1 + 5 + 2) / 6)
    assert (to_audio["queries"], to_audio["candidates"]) == (5, 6)
    assert to_audio["mean_rank"] == pytest.approx((1 + 1 + 1 + 6 + 1) / 5)
    assert to_audio["chance"]["R@1"] == pytest.approx((4 * 1 / 6 + 2 / 6) / 5), "the text `same` has two clips"


def test_retrieval_with_all_captions(known: Any, manifest: Manifest) -> None:
    result = evaluate_retrieval(known, manifest, captions="fine", captions_per_clip="all")["retrieval"]["fine"]
    assert (result["clips"], result["texts"], result["clips_without_caption"]) == (5, 6, 1)
    # Clip 1 has long1 (believed of clip 2) and long9 (of clip 1): its best-ranked caption counts.
    # Clip 2 ties its long2 with clip 1's long1 and comes second.
    assert result["audio_to_text"]["R@1"] == pytest.approx(4 / 5)
    first = evaluate_retrieval(known, manifest, captions="fine")["retrieval"]["fine"]
    assert (first["texts"], first["audio_to_text"]["R@1"]) == (5, pytest.approx(3 / 5))
    last = evaluate_retrieval(known, manifest, captions="fine", captions_per_clip="last")["retrieval"]["fine"]
    assert (last["texts"], last["audio_to_text"]["R@1"]) == (5, 1), "long9, which is of clip 1, and no long1"


def test_everything_at_once_embeds_the_audio_once(known: Any, manifest: Manifest, monkeypatch: Any) -> None:
    embedded = []
    original = Known.embed_batch

    def counting(self: Known, audio: Tensor, lengths: Sequence[int]) -> Tensor:
        embedded.append(len(audio))
        return original(self, audio, lengths)

    monkeypatch.setattr(Known, "embed_batch", counting)
    tasks = [ClassificationTask(column, ["{}"]) for column in ("classification_tag", "sex")]
    result = evaluate(known, manifest, tasks=tasks, batch_size=4)
    assert embedded == [4, 2]
    assert set(result["retrieval"]) == {"global", "fine"}
    assert set(result["classification"]) == {"classification_tag", "sex"}
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    alone = evaluate_classification(known, manifest, column="sex", templates=["{}"])
    assert alone["classification"]["sex"] == result["classification"]["sex"]
    assert alone["retrieval"] == {}


def test_the_map_is_the_svd_of_the_clips_and_knows_their_classes(tiny_clap: CLAP, manifest: Manifest) -> None:
    tasks = [ClassificationTask(), ClassificationTask("intrinsic_tags", ["{}"], classes=["shrill", "deep"])]
    result = evaluate(tiny_clap, manifest, tasks=tasks, embedding_map=True)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    found = result["embeddings"]
    assert found["rows"] == list(range(6))
    assert found["columns"]["classification_tag"]["classes"] == ["calm", "happy", "sad"]
    assert found["columns"]["classification_tag"]["class_of"] == [1, 1, 2, 2, 0, None]
    assert found["columns"]["intrinsic_tags"]["class_of"] == [None, None, None, 1, 0, None], "the last clip has both"

    clips = tiny_clap.embed_audio([row.audio for row in manifest]).double().numpy()
    u, s, vt = np.linalg.svd(clips - clips.mean(axis=0), full_matrices=False)
    signs = np.sign([row[np.abs(row).argmax()] for row in vt[:2]])
    np.testing.assert_allclose(found["audio"], (u * s)[:, :2] * signs, atol=1e-4)
    np.testing.assert_allclose(found["variance"], (s**2 / (s**2).sum())[:2], atol=1e-4)
    prompts = tiny_clap.embed_text(["shrill", "deep"]).double().numpy()
    expected = (prompts - prompts.mean(axis=0)) @ vt[:2].T * signs
    np.testing.assert_allclose(found["columns"]["intrinsic_tags"]["prompts"], expected, atol=1e-4)

    assert "embeddings" not in evaluate(tiny_clap, manifest), "a validation's record stays small"
    assert evaluate(tiny_clap, manifest, tasks=[], embedding_map=True)["embeddings"]["columns"] == {}


def test_the_map_shows_an_even_selection_of_the_readable_clips(
    known: Any, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1.wav").unlink()
    monkeypatch.setitem(evaluate.__globals__, "even_selection", lambda count: even_selection(count, 3))
    result = evaluate(known, manifest, tasks=[ClassificationTask(templates=["{}"])], embedding_map=True)
    found = result["embeddings"]
    assert found["rows"] == [0, 2, 4], "the positions 0, 1 and 3 of the readable rows 0, 2, 3, 4 and 5"
    assert found["columns"]["classification_tag"]["class_of"] == [1, 2, 0]
    assert len(found["audio"]) == 3


def test_classification_of_a_single_valued_column(known: Any, manifest: Manifest) -> None:
    result = evaluate_classification(known, manifest, templates=["{}"])["classification"]["classification_tag"]
    assert result["classes"] == ["calm", "happy", "sad"]
    assert (result["clips"], result["clips_without_class"]) == (5, 1)
    assert result["confusion"] == [[1, 0, 0], [0, 2, 0], [1, 0, 1]]
    assert result["uar"] == pytest.approx((1 + 1 + 0.5) / 3)


def test_classification_of_a_tag_column_needs_exactly_one_of_the_classes(known: Any, manifest: Manifest) -> None:
    result = evaluate_classification(
        known, manifest, column="intrinsic_tags", templates=["{}"], classes=["shrill", "deep", "male"]
    )["classification"]["intrinsic_tags"]
    assert result["classes"] == ["shrill", "deep", "male"]
    assert (result["clips"], result["clips_without_class"], result["clips_with_several"]) == (2, 3, 1)
    assert result["accuracy"] == 1
    assert result["per_class"][2]["clips"] == 0


def test_prompts_of_a_class_are_averaged(known: Any, manifest: Manifest) -> None:
    prompts = {"sad": ["sad", "same"], "calm": ["calm", "word9"], "happy": ["happy"]}
    result = evaluate_classification(known, manifest, prompts=prompts)["classification"]["classification_tag"]
    means = torch.stack([known.embed_text(texts).mean(dim=0) for texts in prompts.values()])
    given = nn.functional.normalize(means, dim=1).argmax(dim=0).tolist()  # of each clip
    expected = [[0] * 3 for _ in range(3)]
    for clip, truth in enumerate([2, 2, 0, 0, 1]):
        expected[truth][given[clip]] += 1
    assert result["classes"] == ["sad", "calm", "happy"]
    assert result["confusion"] == expected
    assert result["templates"] is None


def test_words_stand_for_classes_and_merged_classes_count_as_one(known: Any, manifest: Manifest) -> None:
    """Clips 0 and 1 are happy, 2 and 3 sad, 4 is calm; of clip 3 the prompt of calm is the nearest."""
    task = ClassificationTask(templates=["{}"], words={"happy": "so happy"}, merged={"calm": "sad"})
    result = evaluate(known, manifest, captions=[], tasks=[task])["classification"]["classification_tag"]
    assert result["classes"] == ["happy", "sad"] and result["clips"] == 5
    # "so happy" is believed of 2 and 5, so that no prompt is near clips 0 and 1 and the first, calm, wins.
    assert result["confusion"] == [[0, 2], [0, 3]] and result["accuracy"] == 3 / 5
    alone = ClassificationTask(templates=["{}"], classes=["calm", "happy"], merged={"calm": "sad"})
    result = evaluate(known, manifest, captions=[], tasks=[alone])["classification"]["classification_tag"]
    assert result["classes"] == ["calm", "happy"], "there is no candidate to merge it with"


def test_unusable_clips_are_left_out_and_listed(known: Any, manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "1.wav").write_bytes(b"RIFF but no more")
    (tmp_path / "4.wav").unlink()
    result = evaluate(known, manifest, tasks=[ClassificationTask(templates=["{}"])], batch_size=2)
    assert result["clips"] == 4
    assert [clip["row"] for clip in result["skipped"]] == [1, 4]
    assert result["skipped"][1]["path"].endswith("4.wav")
    assert all(clip["reason"] for clip in result["skipped"])
    figures = result["classification"]["classification_tag"]
    assert (figures["clips"], figures["per_class"][0]["clips"]) == (3, 0), "calm has lost its only clip"
    for name in ("0.wav", "2.wav", "3.wav", "5.wav"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"none of the 6 clips can be used; the first: .*\.wav"):
        evaluate(known, manifest, tasks=[])


def test_what_the_manifest_lacks_is_named(known: Any, manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="manifest is empty"):
        evaluate(known, Manifest([]))
    with pytest.raises(DataError, match=r"no column 'emotion'.* it has: classification_tag, .*sex"):
        evaluate_classification(known, manifest, column="emotion")
    with pytest.raises(DataError, match="none of the classes angry, bored; it has: calm, happy, sad"):
        evaluate_classification(known, manifest, classes=["angry", "bored"])
    with pytest.raises(DataError, match="given twice"):
        evaluate_classification(known, manifest, classes=["sad", "sad"])
    with pytest.raises(DataError, match="no prompt for class 'sad'; there are prompts for: calm"):
        evaluate_classification(known, manifest, classes=["calm", "sad"], prompts={"calm": ["calm"]})
    with pytest.raises(DataError, match=r"must contain \{\}"):
        evaluate_classification(known, manifest, templates=["A voice."])
    (tmp_path / "plain").mkdir()
    plain = write(tmp_path / "plain", [{"text_description": "word0"}, {"text_description": "word1"}])
    with pytest.raises(DataError, match=r"no fine captions \(column fine_description\)"):
        evaluate_retrieval(known, plain, captions="fine")
    assert evaluate(known, plain)["classification"] == {}, "by default only what the manifest has"


@pytest.fixture(scope="module")
def tiny_clap() -> CLAP:
    torch.manual_seed(0)
    config = CLAPConfig(
        audio=AudioTowerConfig(width=16, layers=1, heads=2, feature_options={"n_mels": 16}),
        text=TextTowerConfig(width=16, layers=1, heads=2, vocab_size=300),
        head=HeadConfig(kind="paraspeechclap", dim=16),
    )
    return CLAP(config, train_tokenizer([*BELIEFS, "A person is speaking in a style."], 300))


def test_evaluation_does_not_change_training(tiny_clap: CLAP, manifest: Manifest) -> None:
    model = tiny_clap.train()
    model.text_projection.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def draw() -> tuple[Any, ...]:
        wave = torch.randn(2, 3200)
        return model.encode_audio(wave).sum().item(), random.random(), np.random.rand(), torch.rand(1).item()

    results = []
    for evaluate_between in (False, True):
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        if evaluate_between:
            evaluate(model, manifest)
        results.append(draw())
    assert results[0] == results[1], "dropout and every generator continue as if nothing had happened"
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_random_numbers_that_a_model_draws_are_given_back(manifest: Manifest) -> None:
    class Drawing(Known):
        def embed_text(self, texts: Sequence[str]) -> Tensor:
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
            return super().embed_text(texts)

    drawn: list[tuple[float, float, float]] = []
    model: Any = Drawing()
    evaluate(model, manifest, tasks=[])
    assert drawn[0] == pytest.approx((random.random(), np.random.rand(), torch.rand(1).item()), abs=0)


def test_figures_do_not_depend_on_mode_or_batch_size(tiny_clap: CLAP, manifest: Manifest) -> None:
    results = []
    for training, batch_size in ((True, 1), (False, 4), (False, 100)):
        tiny_clap.train(training)
        result = evaluate(tiny_clap, manifest, batch_size=batch_size)
        assert set(result.pop("time")) == {"seconds", "audio_seconds"}
        results.append(result)
    assert results[0] == results[1] == results[2]


def test_a_model_of_nans_is_an_error_and_training_mode_comes_back(tiny_clap: CLAP, manifest: Manifest) -> None:
    import copy

    model = copy.deepcopy(tiny_clap).train()
    with torch.no_grad():
        next(model.audio_projection.parameters()).fill_(torch.nan)
    with pytest.raises(ModelError, match=r"NaN or infinity for 6 of 6 clips, first for .*0\.wav"):
        evaluate(model, manifest)
    assert model.training


def test_progress_is_lines_where_there_is_no_terminal(known: Any, manifest: Manifest, capfd: Any) -> None:
    evaluate(known, manifest, tasks=[], progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "embedded 6 of 6 clips\n"


def test_untrained_model_on_real_speech(tiny_clap: CLAP, real_speech: Path) -> None:
    manifest = load_manifest(str(real_speech / "test.jsonl"))
    result = evaluate(tiny_clap, manifest, captions_per_clip="all")
    assert result["clips"] == len(manifest)
    assert result["skipped"] == []
    assert result["retrieval"]["global"]["texts"] == len({text for row in manifest for text in row.captions})
    figures = result["classification"]["classification_tag"]
    assert sum(map(sum, figures["confusion"])) == len(manifest)


def test_several_templates_are_the_prompts_they_fill(known: Any, manifest: Manifest) -> None:
    filled = {name: [name, f"so {name}"] for name in ("calm", "happy", "sad")}
    by_prompts = evaluate_classification(known, manifest, prompts=filled)["classification"]["classification_tag"]
    by_templates = evaluate_classification(known, manifest, templates=["{}", "so {}"])
    result = by_templates["classification"]["classification_tag"]
    assert result.pop("templates") == ["{}", "so {}"] and by_prompts.pop("templates") is None
    assert result == by_prompts


def test_the_first_columns_alone(tiny_clap: CLAP, manifest: Manifest) -> None:
    """The figures of a model whose embeddings are its first columns at unit length, in every part of an evaluation."""

    class Narrow:
        sampling_rate, device = tiny_clap.sampling_rate, tiny_clap.device

        def embed_batch(self, audio: Tensor, lengths: Sequence[int]) -> Tensor:
            return nn.functional.normalize(tiny_clap.embed_batch(audio, lengths)[:, :5], dim=1)

        def embed_text(self, texts: Sequence[str]) -> Tensor:
            return nn.functional.normalize(tiny_clap.embed_text(texts)[:, :5], dim=1)

        def modules(self) -> list[nn.Module]:
            return []

        def eval(self) -> None:
            tiny_clap.eval()

    tasks = [ClassificationTask("sex", ["{}"])]
    narrow: Any = Narrow()
    found = evaluate(tiny_clap, manifest, tasks=tasks, embedding_map=True, width=5)
    expected = evaluate(narrow, manifest, tasks=tasks, embedding_map=True)
    whole = evaluate(tiny_clap, manifest, tasks=tasks, embedding_map=True)
    assert found.pop("width") == 5 and "width" not in whole
    for result in (found, expected, whole):
        del result["time"]
    assert found == expected != whole
    for width in (0, 17):
        with pytest.raises(ConfigError, match=rf"the width is {width}; the model's embeddings have 1 to 16 columns"):
            evaluate(tiny_clap, manifest, tasks=tasks, width=width)
