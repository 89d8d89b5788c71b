"""The released CLSP model, which is Python code of its authors, with the interface of `fastclap.CLAP`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclap.errors import ConfigError, DataError, ModelError
from fastclap.models.encoder import DualEncoder
from fastclap.models.layers import as_float


class CLSP(DualEncoder):
    """The released CLSP model with the interface of `fastclap.CLAP` for embeddings; it trains in its own code.

    Args:
        base: module called as `base(audio=[B, T] float in ±1, audio_lens=[B])` or `base(text=list of strings)`; it
            returns audio embeddings, text embeddings (None for what was not given) and the logit scale.
    """

    sampling_rate = 16000

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def encode_audio(
        self,
        audio: Tensor,  # int16 or float [B, T]
        lengths: Tensor | None = None,  # [B]
        mean: Tensor | None = None,  # [B], not used: CLSP does not normalise the waveform
        std: Tensor | None = None,  # [B], likewise
        host_lengths: Sequence[int] | None = None,  # likewise
    ) -> Tensor:  # [B, D]
        """Embeddings of a padded batch, in full scale ±32768 (int16) or ±1 (float)."""
        if lengths is None:
            lengths = torch.full((len(audio),), audio.shape[1], device=audio.device)
        return self.base(audio=as_float(audio).to(self.device), audio_lens=lengths.to(self.device))[0]

    def embed_text(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Unit vectors of captions, in the order given: float32 [n, D] on the model's device.

        Raises:
            DataError: no texts, or one that is not a string or is blank; it is named.
        """
        if isinstance(texts, str) or len(texts) == 0:
            raise DataError(f"embed_text takes a non-empty list of strings, not {texts!r}")
        for index, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"text {index} is {'blank' if isinstance(text, str) else f'{text!r}, not a string'}")
        batches = self.text_batches(texts, batch_size=batch_size)
        with self._inference():
            parts = [self.base(text=[texts[index] for index in batch])[1] for batch in batches]
            back = torch.tensor([index for batch in batches for index in batch], device=parts[0].device).argsort()
            embeddings = F.normalize(torch.cat(parts)[back].float(), dim=-1)
        return embeddings.clone()

    def text_batches(self, texts: Sequence[str], *, batch_size: int = 256) -> list[list[int]]:
        """Which texts `embed_text` encodes together: those with like numbers of characters, for less padding."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def load_clsp(
    path: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> CLSP:
    """The released CLSP model, in evaluation mode.

    Args:
        path: folder or hub id (`yfyeung/CLSP`) of a model with the interface that `CLSP` describes.
        trust_remote_code: the model is Python code of its authors that comes with the weights and runs with your
            rights. Read it, then agree with True.
        device: where to put it.
        dtype: of the parameters; float32 by default.

    Raises:
        ConfigError: no agreement.
        ModelError: it cannot be loaded.
    """
    if not trust_remote_code:
        raise ConfigError(
            f"{path}: CLSP is released as Python code that comes with the weights and would run with your rights; read "
            "it, then agree with trust_remote_code=True"
        )
    from transformers import AutoModel

    try:
        base = AutoModel.from_pretrained(
            os.fspath(path), trust_remote_code=True, dtype=torch.float32 if dtype is None else dtype
        )
    except Exception as error:  # its own code may raise anything
        raise ModelError(f"{path}: the model could not be loaded ({error})") from error
    return CLSP(base).to(device).eval()
