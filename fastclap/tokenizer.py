"""The public name of `fastclap.models.tokenizer`."""

from fastclap.models.tokenizer import Tokenizer, train_tokenizer

__all__ = ["Tokenizer", "train_tokenizer"]
