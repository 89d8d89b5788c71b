"""Captions to token ids: one class around `tokenizers.Tokenizer`, whether trained here or taken from transformers.

The vocabulary trained here is byte-level BPE over lower-cased words and punctuation. All 256 bytes are in it, so any
string has tokens: an unseen word falls apart into known pieces and, at worst, into bytes. Everything a model needs,
padding included, is in one `tokenizer.json`: an exported model reads text without the hub and without transformers.

A tokenizer that tells no two words apart is refused wherever it comes from: transformers makes one of a handful of
special tokens, without an error, of a folder that lacks the tokenizer's files.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastclap.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
_FILES = (  # any of these makes a tokenizer of transformers
    *((name,) for name in (TOKENIZER_FILE, "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")),
    *((name,) for name in ("spm.model", "tekken.json", "source.spm", "bpe.codes")),
    ("vocab.json", "merges.txt"),
)
# single words in several scripts: a vocabulary that knows none of them may know words of its own
_WORDS = (
    "calm",
    "angry",
    "man",
    "voice",
    "7",
    "平静",
    "声音",
    "спокойный",
    "голос",
    "هادئ",
    "صوت",
    "शांत",
    "आवाज़",
    "차분한",
)

_lock = threading.Lock()  # the length at which `tokenizers` cuts is a state of its tokenizer


def _new_lock() -> None:
    """A process that is forked while another thread tokenizes would wait for that thread for ever."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


class Tokenizer:
    """Strings to padded `input_ids` and `attention_mask`. Picklable, so data-loading workers can hold one.

    Args:
        backend: a `tokenizers.Tokenizer` with padding enabled (it names the padding token).
        where: it comes from: the subject of the messages.

    Attributes:
        vocab_size: one more than the largest id that it gives, added tokens and padding included.

    Raises:
        ModelError: it names no padding token, cannot tokenize, or gives all words the same ids.
    """

    def __init__(self, backend: tokenizers.Tokenizer, where: str = "the tokenizer") -> None:
        if backend.padding is None:
            raise ModelError(f"{where} names no padding token; call enable_padding(pad_id=..., pad_token=...)")
        self.backend = backend
        size = backend.get_vocab_size()
        some = range(size - 1, -1, -1 - size // 1000)
        if None in map(backend.id_to_token, some):  # ids with gaps; of 250,000 tokens the list takes a second
            size = 1 + max(backend.get_vocab().values(), default=0)
        self.vocab_size: int = max(size, 1 + backend.padding["pad_id"], 1 + max(_ids_of_words(backend, size, where)))

    def __call__(self, texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
        """Tokenize, cut to `max_tokens` (special tokens included) and pad on the right to the longest of the batch.

        Returns:
            `input_ids` and `attention_mask`, int64 CPU tensors [len(texts), tokens].

        Raises:
            DataError: no texts, or one that is not a string.
        """
        if isinstance(texts, str) or not isinstance(texts, Iterable) or not (texts := list(texts)):
            raise DataError(f"tokenize takes a non-empty list of strings, not {texts!r}")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {index} is {text!r}, not a string")
        with _lock:
            truncation = self.backend.truncation
            if truncation is None or truncation["max_length"] != max_tokens:
                self.backend.enable_truncation(max_tokens)
            encodings = self.backend.encode_batch(texts)
        ids = [encoding.ids for encoding in encodings]
        if (largest := max(max(row, default=0) for row in ids)) >= self.vocab_size:
            raise ModelError(f"the tokenizer gives the id {largest}, but has {self.vocab_size} ids; copy it again")
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
        }

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json` (truncation aside, which belongs to each call)."""
        with _lock:
            truncation = self.backend.truncation
            self.backend.no_truncation()
            text = self.backend.to_str(pretty=True)
            if truncation is not None:
                self.backend.enable_truncation(**truncation)
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, prepare: Callable[[tokenizers.Tokenizer], None] | None = None) -> Tokenizer:
        """Read a `tokenizer.json`, or the one in a folder; `prepare` changes it before it is looked at.

        Raises:
            ModelError: the file is missing or is not a usable tokenizer.
        """
        import tokenizers

        path = Path(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            raise ModelError(f"{file}: no such tokenizer file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except BaseException as error:  # tokenizers raises bare Exception for most malformed files
            _raise_unless_of_tokenizers(error)
            raise ModelError(f"{file}: not a readable tokenizer ({error}); copy or export the model again") from error
        if prepare is not None:
            prepare(backend)
        return cls(backend, str(file))

    @classmethod
    def from_pretrained(cls, name: str, prepare: Callable[[tokenizers.Tokenizer], None] | None = None) -> Tokenizer:
        """The tokenizer of a transformers model, from a folder or the hub; `prepare` as for `load`.

        Raises:
            ModelError: there is none, or it has no `tokenizers` backend or no padding token, or is not usable.
        """
        if os.path.isdir(name):
            _check_tokenizer_files(Path(name))
        from transformers import AutoTokenizer

        try:
            source = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except BaseException as error:  # of malformed files transformers and tokenizers raise errors of any kind
            _raise_unless_of_tokenizers(error)
            raise ModelError(f"{name}: no tokenizer could be loaded ({error})") from error
        backend = getattr(source, "backend_tokenizer", None)
        if backend is not None and prepare is not None:
            prepare(backend)
            return cls(backend, name)
        if backend is None or source.pad_token is None:
            lacks = "no `tokenizers` backend (a tokenizer.json)" if backend is None else "no padding token"
            raise ModelError(f"{name}: its tokenizer has {lacks}")
        backend.enable_padding(pad_id=source.pad_token_id, pad_token=source.pad_token)
        return cls(backend, name)


def _check_tokenizer_files(folder: Path) -> None:
    """Check that a folder holds a tokenizer, of which transformers would otherwise make one without any words.

    Raises:
        ModelError: it does not.
    """
    held = {item.name for item in folder.iterdir()}
    if not any(held.issuperset(files) for files in _FILES):
        half = [name for files in _FILES[-1:] if held & set(files) for name in files if name not in held]
        lacks = f"vocab.json without {half[0]}" if half == ["merges.txt"] else "none of its files"
        known = ", ".join(" with ".join(files) for files in _FILES)
        raise ModelError(
            f"{folder}: no tokenizer could be loaded: the folder holds {lacks} ({known}); copy them there along with "
            "the weights, or name a folder that has them"
        )


def _ids_of_words(backend: tokenizers.Tokenizer, size: int, where: str) -> list[int]:
    """Ids that a tokenizer gives to some words: of several languages, and of its own vocabulary.

    Raises:
        ModelError: it fails, or tells no two of them apart.
    """
    try:
        special = {index for index, token in backend.get_added_tokens_decoder().items() if token.special}
        own = (backend.id_to_token(index) for index in range(0, size, 1 + size // 100) if index not in special)
        found = [backend.encode(word).ids for word in (*_WORDS, *filter(None, own))]
    except BaseException as error:
        _raise_unless_of_tokenizers(error)
        raise ModelError(f"{where} cannot tokenize ({error}); copy its files again") from error
    padding = backend.padding
    without = special if padding is None else special | {padding["pad_id"]}
    if len({frozenset(ids) - without for ids in found} - {frozenset()}) < 2:
        raise ModelError(
            f"{where}: a vocabulary of {backend.get_vocab_size()} tokens that gives all words the same ids: files "
            "of the tokenizer are missing or damaged; copy them there along with the weights"
        )
    return [index for ids in found for index in ids]


def _raise_unless_of_tokenizers(error: BaseException) -> None:
    """Raise an interrupt or an exit; when its Rust code panics, `tokenizers` raises a BaseException too."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def check_vocabulary(tokenizer: Tokenizer, rows: int, where: str) -> None:
    """Check that a tokenizer is the one that an encoder was trained with, as far as their sizes tell.

    Args:
        tokenizer: of the encoder.
        rows: of the encoder's embedding: some hundreds more than there are tokens, for the sake of a round number.
        where: both come from.

    Raises:
        ModelError: a tenth of the rows, and more than a thousand, have no token.
    """
    if rows - tokenizer.vocab_size > max(1024, rows // 10):
        raise ModelError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, but the text tower an embedding of {rows}: "
            "files of the tokenizer are missing, or it is another model's; copy them there along with the weights"
        )


def as_tokenizer(
    source: Tokenizer | str | os.PathLike[str], prepare: Callable[[tokenizers.Tokenizer], None] | None = None
) -> Tokenizer:
    """A tokenizer as it is, or that of a folder, a `tokenizer.json` or a hub id.

    Args:
        source: where to find it.
        prepare: a change to be made before anything else, such as naming a padding token; of a loaded tokenizer, on a
            copy.

    Raises:
        ModelError: there is none.
    """
    if isinstance(source, Tokenizer):
        if prepare is None:
            return source
        backend = type(source.backend).from_str(source.backend.to_str())
        prepare(backend)
        return Tokenizer(backend)
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        raise ModelError(f"the tokenizer is {source!r}; give a Tokenizer, or the folder or hub id of one")
    path = Path(source)
    # of a transformers folder, tokenizer.json alone does not always name the padding token
    bare = (path / TOKENIZER_FILE).is_file() and not (path / "tokenizer_config.json").is_file()
    if path.is_file() or bare:
        return Tokenizer.load(path, prepare)
    return Tokenizer.from_pretrained(os.fspath(source), **({} if prepare is None else {"prepare": prepare}))


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2000) -> Tokenizer:
    """Train a byte-level BPE vocabulary on captions; the same texts, in any order, give the same vocabulary.

    Args:
        texts: captions; repeated ones count as often as they occur.
        vocab_size: largest vocabulary, at least 258 (the bytes, `[PAD]` and `[CLS]`).

    Raises:
        ConfigError: `vocab_size` is too small.
        DataError: there is no text to learn from.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["[PAD]", "[CLS]"]
    if vocab_size < len(alphabet) + len(special):
        raise ConfigError(f"vocab_size must be at least {len(alphabet) + len(special)}, not {vocab_size}")
    captions = list(texts)
    if not any(caption.strip() for caption in captions):
        raise DataError("there is no caption text to train a vocabulary on")
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", backend.token_to_id("[CLS]"))]
    )
    backend.enable_padding(pad_id=backend.token_to_id("[PAD]"), pad_token="[PAD]")
    return Tokenizer(backend)
