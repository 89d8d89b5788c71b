"""A model in the form that MTEB's benchmarks (and MAEB, its audio part) take.

    import mteb
    from fastclap.apps.mteb_model import MTEBEncoder

    mteb.evaluate(MTEBEncoder("runs/first/model"), mteb.get_tasks(tasks=["RavdessZeroshot"]))

The class follows mteb's encoder protocol (version 2: batches come from a loader as dictionaries with the keys `text`
and `audio`) without inheriting from it; mteb itself is needed only for the model's description. Audio is resampled to
the model's own rate here, so no collator has to be set.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.errors import ConfigError, DataError
from fastclap.models.clap import CLAP
from fastclap.models.encoder import DualEncoder

if TYPE_CHECKING:
    from mteb.models import ModelMeta


class MTEBEncoder:
    """An encoder of texts and clips for `mteb.evaluate`.

    Args:
        model: a loaded model, or what `fastclap.CLAP.from_pretrained` reads.
        revision: of the model, for the records of results.
        device: where to put a model that is read here; by default a GPU if there is one.
        name: in the records, "owner/model"; by default "fastclap/" and the name of the folder.
    """

    def __init__(
        self,
        model: DualEncoder | str | os.PathLike[str],
        revision: str | None = None,
        *,
        device: str | None = None,
        name: str | None = None,
        **_: Any,
    ) -> None:
        path = os.fspath(model) if isinstance(model, (str, os.PathLike)) else "model"
        if not isinstance(model, DualEncoder):
            model = CLAP.from_pretrained(model, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model: DualEncoder = model
        self.revision = revision
        is_hub_id = path.count("/") == 1 and not os.path.exists(path)
        self.name = name or (path if is_hub_id else f"fastclap/{_folder_name(path)}")

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        batch_size: int = 32,
        **_: Any,
    ) -> np.ndarray:
        """Unit vectors [n, D] of all inputs, in their order.

        Args:
            inputs: batches with `text` (strings), `audio` (each {"array": [n] or [channels, n], "sampling_rate"}, or
                a decoder of `datasets`), or both, whose unit vectors are then added and normalised.
            task_metadata, hf_split, hf_subset, prompt_type: of mteb's protocol; the embedding does not depend on them.
            batch_size: clips encoded at a time.

        Raises:
            DataError: a batch has neither, or a clip or text cannot be embedded.
        """
        found = [self._encode(batch, batch_size).cpu().numpy() for batch in inputs]
        if not found:
            raise DataError("there is nothing to encode")
        return np.concatenate(found)

    def _encode(self, batch: Mapping[str, Any], batch_size: int) -> Tensor:
        vectors = []
        if "text" in batch:
            # mteb's own encoders give blank texts a vector too; a space between quotes is the least text there is
            vectors.append(self.model.embed_text([text if text.strip() else '""' for text in batch["text"]]))
        if "audio" in batch:
            vectors.append(self._encode_audio(batch["audio"], batch_size))
        if not vectors:
            raise DataError(f"a batch has neither 'text' nor 'audio', but {', '.join(batch)}")
        return vectors[0] if len(vectors) == 1 else F.normalize(vectors[0] + vectors[1], dim=1)

    def _encode_audio(self, clips: Iterable[Any], batch_size: int) -> Tensor:
        waves, rates = [], []
        for clip in clips:
            wave = torch.as_tensor(np.asarray(clip["array"]))
            if not wave.is_floating_point() and wave.dtype != torch.int16:
                raise DataError(f"a clip of type {wave.dtype}; mteb gives float in ±1")
            waves.append(wave if wave.ndim == 1 else wave.float().mean(dim=int(wave.shape[0] > wave.shape[-1])))
            rates.append(int(clip["sampling_rate"]))
        rows: dict[int, Tensor] = {}
        for rate in sorted(set(rates)):
            indices = [index for index, clip_rate in enumerate(rates) if clip_rate == rate]
            group = [waves[index] for index in indices]
            vectors = self.model.embed_audio(group, sampling_rate=rate, batch_size=batch_size)
            rows.update(zip(indices, vectors, strict=True))
        return torch.stack([rows[index] for index in range(len(waves))])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines [n, m] between the rows of two matrices."""
        first, second = _as_matrix(embeddings1), _as_matrix(embeddings2)
        return F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines [n] between corresponding rows."""
        return F.cosine_similarity(_as_matrix(embeddings1), _as_matrix(embeddings2), dim=-1)

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """The model's description for mteb's records.

        Raises:
            ConfigError: mteb is not installed.
        """
        try:
            from mteb.models import ModelMeta
        except ImportError as error:
            raise ConfigError(f"mteb is not installed ({error}): pip install mteb") from error
        return ModelMeta.create_empty(
            {
                "name": self.name,
                "revision": self.revision or "no_revision_available",
                "modalities": ["audio", "text"],
                "similarity_fn_name": "cosine",
                "use_instructions": False,
                "framework": ["PyTorch"],
                "n_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            }
        )


def _as_matrix(embeddings: Any) -> Tensor:
    return torch.atleast_2d(torch.as_tensor(embeddings)).float()


def _folder_name(path: str) -> str:
    """The part of a path that names the model: RUN of RUN/model, else the folder itself."""
    parent, folder = os.path.split(os.path.abspath(path))
    return os.path.basename(parent) if folder == "model" and "/" in path else folder
