"""The caption tokenizer: deterministic training, no unknown words, one file, safe to send to workers."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastclap.errors import ConfigError, DataError, ModelError
from fastclap.models.tokenizer import Tokenizer, train_tokenizer

CAPTIONS = [
    f"A {pitch} {who} speaks in {article} {emotion} tone, {loudness}."
    for pitch in ("low-pitched", "high-pitched", "medium-pitched")
    for who in ("male", "female", "man", "woman")
    for article, emotion in (("an", "angry"), ("a", "happy"), ("a", "sad"))
    for loudness in ("softly", "loudly")
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CAPTIONS, 400)


def test_same_texts_same_vocabulary_in_any_order_and_process(tokenizer: Tokenizer) -> None:
    shuffled = CAPTIONS.copy()
    random.Random(0).shuffle(shuffled)
    assert train_tokenizer(shuffled, 400).backend.to_str() == tokenizer.backend.to_str()
    code = (
        "import sys, pickle; from fastclap.models.tokenizer import train_tokenizer\n"
        "sys.stdout.write(train_tokenizer(pickle.load(sys.stdin.buffer), 400).backend.to_str())"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(CAPTIONS), capture_output=True, check=True)
    assert done.stdout.decode() == tokenizer.backend.to_str()


def test_known_words_are_single_tokens_and_case_is_ignored(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(["a male speaks", "A MALE SPEAKS"], 64)
    assert tokens["input_ids"].dtype == torch.int64
    assert tokens["input_ids"].shape == (2, 4)  # [CLS] and three words
    assert torch.equal(tokens["input_ids"][0], tokens["input_ids"][1])
    assert tokens["attention_mask"].tolist() == [[1] * 4] * 2


@pytest.mark.parametrize("text", ["zeppelin", "sad zürich 你好 🙂", "x", "angrily, un-happy; 42%"])
def test_unseen_words_keep_their_letters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer([text], 64)["input_ids"][0].tolist()
    spelled = tokenizer.backend.decode(ids)
    assert spelled.replace(" ", "") == text.replace(" ", "")


def test_different_unseen_words_differ(tokenizer: Tokenizer) -> None:
    first, second = (tokenizer([word], 64)["input_ids"].tolist() for word in ("whispered", "shouted"))
    assert first != second


def test_padding_and_truncation(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(["sad", "a low-pitched angry man"], 4)
    assert tokens["input_ids"].shape == (2, 4)
    assert tokens["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert tokens["input_ids"][0, 2:].tolist() == [0, 0]
    assert tokenizer(["a low-pitched angry man"], 64)["input_ids"].shape[1] > 4  # the cut was of that call only


def test_save_load_and_pickle_give_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    expected = tokenizer(CAPTIONS[:5], 8)["input_ids"]
    tokenizer.save(tmp_path / "tokenizer.json")
    train_tokenizer(CAPTIONS, 400).save(tmp_path / "unused.json")
    assert (tmp_path / "unused.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()  # no call's cut in it
    for other in (
        Tokenizer.load(tmp_path),
        Tokenizer.load(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert torch.equal(other(CAPTIONS[:5], 8)["input_ids"], expected)
        assert other.vocab_size == tokenizer.vocab_size


def test_a_transformers_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<pad>", "<unk>", "a", "sad", "man", "speaks"]
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    original = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    original.save_pretrained(tmp_path / "hf")
    texts = ["a sad man speaks", "sad"]
    expected = original(texts, padding=True, truncation=True, max_length=5, return_tensors="pt")
    wrapped = Tokenizer.from_pretrained(str(tmp_path / "hf"))
    wrapped.save(tmp_path / "tokenizer.json")
    for tokenizer in (wrapped, Tokenizer.load(tmp_path)):
        tokens = tokenizer(texts, 5)
        assert torch.equal(tokens["input_ids"], expected["input_ids"])
        assert torch.equal(tokens["attention_mask"], expected["attention_mask"])


def test_errors(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="text 1 is 3, not a string"):
        tokenizer(["sad", 3], 8)  # type: ignore[list-item]
    with pytest.raises(DataError, match="non-empty list of strings, not 'sad'"):
        tokenizer("sad", 8)
    with pytest.raises(DataError, match="non-empty list"):
        tokenizer([], 8)
    with pytest.raises(ConfigError, match="at least 258, not 100"):
        train_tokenizer(CAPTIONS, 100)
    with pytest.raises(DataError, match="no caption text"):
        train_tokenizer(["", " "], 400)
    with pytest.raises(ModelError, match=r"tokenizer\.json: no such tokenizer file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a readable tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        Tokenizer.from_pretrained(str(tmp_path / "empty"))
