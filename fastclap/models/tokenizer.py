"""Captions to token ids: one class around `tokenizers.Tokenizer`, whether trained here or taken from transformers.

The vocabulary trained here is byte-level BPE over lower-cased words and punctuation. All 256 bytes are in it, so any
string has tokens: an unseen word falls apart into known pieces and, at worst, into bytes. Everything a model needs,
padding included, is in one `tokenizer.json`: an exported model reads text without the hub and without transformers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastclap.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"


class Tokenizer:
    """Strings to padded `input_ids` and `attention_mask`. Picklable, so data-loading workers can hold one.

    Args:
        backend: a `tokenizers.Tokenizer` with padding enabled (it names the padding token).

    Attributes:
        vocab_size: number of ids, added tokens included.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        if backend.padding is None:
            raise ModelError("the tokenizer names no padding token; call enable_padding(pad_id=..., pad_token=...)")
        self.backend = backend
        self.vocab_size: int = backend.get_vocab_size()

    def __call__(self, texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
        """Tokenize, cut to `max_tokens` (special tokens included) and pad on the right to the longest of the batch.

        Returns:
            `input_ids` and `attention_mask`, int64 CPU tensors [len(texts), tokens].

        Raises:
            DataError: no texts, or one that is not a string.
        """
        if isinstance(texts, str) or len(texts) == 0:
            raise DataError(f"tokenize takes a non-empty list of strings, not {texts!r}")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {index} is {text!r}, not a string")
        truncation = self.backend.truncation
        if truncation is None or truncation["max_length"] != max_tokens:
            self.backend.enable_truncation(max_tokens)
        encodings = self.backend.encode_batch(list(texts))
        return {
            "input_ids": torch.tensor([encoding.ids for encoding in encodings]),
            "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
        }

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json` (truncation aside, which belongs to each call)."""
        truncation = self.backend.truncation
        self.backend.no_truncation()
        self.backend.save(str(path))
        if truncation is not None:
            self.backend.enable_truncation(**truncation)

    @classmethod
    def load(cls, path: str | Path, prepare: Callable[[tokenizers.Tokenizer], None] | None = None) -> Tokenizer:
        """Read a `tokenizer.json`, or the one in a folder; `prepare` changes it before it is looked at.

        Raises:
            ModelError: the file is missing or is not a tokenizer.
        """
        import tokenizers

        path = Path(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            raise ModelError(f"{file}: no such tokenizer file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception for any malformed file
            raise ModelError(f"{file}: not a readable tokenizer ({error}); copy or export the model again") from error
        if prepare is not None:
            prepare(backend)
        return cls(backend)

    @classmethod
    def from_pretrained(cls, name: str, prepare: Callable[[tokenizers.Tokenizer], None] | None = None) -> Tokenizer:
        """The tokenizer of a transformers model, from a folder or the hub; `prepare` as for `load`.

        Raises:
            ModelError: there is none, or it has no `tokenizers` backend or no padding token.
        """
        from transformers import AutoTokenizer

        try:
            source = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"{name}: no tokenizer could be loaded ({error})") from error
        backend = getattr(source, "backend_tokenizer", None)
        if backend is not None and prepare is not None:
            prepare(backend)
            return cls(backend)
        if backend is None or source.pad_token is None:
            lacks = "no `tokenizers` backend (a tokenizer.json)" if backend is None else "no padding token"
            raise ModelError(f"{name}: its tokenizer has {lacks}")
        backend.enable_padding(pad_id=source.pad_token_id, pad_token=source.pad_token)
        return cls(backend)


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
