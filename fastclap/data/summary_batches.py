"""Batches of a frozen audio tower's summaries: the clips, captions and order of `ClipDataset`, without any decoding.

A step then takes a few milliseconds, so nothing here is done row by row: what a row can get is laid out in arrays once,
and a batch is a few draws, a few look-ups and one copy out of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastclap.audio import AudioError
from fastclap.data.dataset import BadClip, Batch, ClipDataset, both_fine_probability, distinct_texts, text_id
from fastclap.data.hashing import CAPTION, CROP, draws, hash64
from fastclap.data.summaries import SummaryStore
from fastclap.errors import DataError


@dataclass(frozen=True)
class ClipTable:
    """Where the summaries of a manifest's clips are in their file."""

    store: SummaryStore
    places: np.ndarray  # int64 [rows, most crops of a clip]
    crops: np.ndarray  # int64 [rows], how many of them each clip has: none if it cannot be used
    bad: Mapping[int, BadClip]  # the clips that cannot be used, by row

    def gather(
        self,
        rows: np.ndarray,  # int64 [n], of clips that can be used
        crops: np.ndarray | int = 0,  # [n]
    ) -> Tensor:  # [n, ...]
        """The summaries of these crops of these rows."""
        return self.store.gather(torch.from_numpy(self.places[rows, crops]))


@dataclass
class TextTable:
    """Where the summaries of texts are in their file."""

    store: SummaryStore
    places: dict[str, int]

    def gather(self, texts: Sequence[str]) -> Tensor:  # [n, ...]
        """The summaries of these texts, all of which are known."""
        return self.store.gather(torch.tensor([self.places[text] for text in texts]))


class SummaryDataset(Dataset[Batch]):
    """Maps (step, epoch, rows) to the `Batch` that `clips` makes of it, with summaries instead of waveforms.

    Which of its crops a clip has is drawn for each epoch anew, from the data set's seed. A clip that cannot be used is
    replaced by the clip that would replace it there.

    Args:
        clips: what the summaries are of.
        table: the summaries of its clips.
        texts: the summaries of its captions and prompts; None: `clips.tokenize` makes of a batch's texts what there is.

    Raises:
        DataError: a row has no caption of the wanted kind.
    """

    def __init__(self, clips: ClipDataset, table: ClipTable, texts: TextTable | None) -> None:
        self._clips, self._table, self._texts = clips, table, texts
        # Perturbed captions are written anew for each batch.
        self._captions = None if clips.caption == "perturbed" else Captions(clips)
        known = [] if self._captions is None else self._captions.texts
        self._caption_ids = torch.tensor([text_id(text) for text in known], dtype=torch.int64)
        self._tags = clips.tags
        self._tag_targets = None if self._tags is None else self._tags.targets(clips.manifest[:])

    def __getitem__(self, item: tuple[int, int, list[int]]) -> Batch:
        step, epoch, wanted = item
        occasion = step if self._clips.repeats else epoch
        rows, bad = wanted, list[BadClip]()
        if not self._table.crops[wanted].all():
            used = set(wanted)
            rows = [self._clips.usable(occasion, row, used, bad, self._check)[0] for row in wanted]
        at = np.asarray(rows)
        crops = draws(self._table.crops[at], self._clips.seed, occasion, at, CROP)
        prompts = [] if self._tags is None else self._tags.draw(step)
        if self._captions is None:
            captions = self._clips.draw_captions(step, occasion, rows)
            caption_ids = torch.tensor([text_id(caption) for caption in captions], dtype=torch.int64)
            texts, text_rows, prompt_rows = distinct_texts(captions, prompts)
        else:
            numbers = self._captions.draw(step, occasion, at)
            captions, caption_ids = [self._captions.texts[n] for n in numbers.tolist()], self._caption_ids[numbers]
            texts, text_rows, prompt_rows = self._captions.distinct(numbers, prompts)
        text, tokens = self._text(texts)
        return Batch(
            step=step,
            epoch=epoch,
            audio=None,
            lengths=None,
            mean=None,
            std=None,
            captions=captions,
            caption_ids=caption_ids,
            text=text,
            text_rows=text_rows,
            tokens=tokens,
            prompts=prompts,
            prompt_rows=prompt_rows,
            tags=None if self._tag_targets is None else self._tag_targets[at],
            rows=rows,
            bad=bad,
            audio_summary=self._table.gather(at, crops),
        )

    def _check(self, epoch: int, row: int) -> None:
        bad = self._table.bad.get(row)
        if bad is not None:
            raise AudioError(bad.path, bad.reason)

    def _text(self, texts: list[str]) -> tuple[dict[str, Tensor] | None, list[int]]:
        if self._texts is not None:
            return {"summary": self._texts.gather(texts)}, []
        if self._clips.tokenize is None:
            return None, []
        tokenized = self._clips.tokenize(texts)
        return tokenized, tokenized["attention_mask"].sum(1).tolist()


class Captions:
    """The captions of all rows as numbers of distinct texts, and draws of them as `ClipDataset` makes them.

    Attributes:
        texts: the distinct captions.
    """

    def __init__(self, clips: ClipDataset) -> None:
        self._kind, self._seed = clips.caption, clips.seed
        numbers: dict[str, int] = {}
        flat: list[int] = []
        counts: list[tuple[int, int]] = []
        for row in clips.manifest:
            wide = row.captions if self._kind != "fine" else ()
            fine = row.fine_captions if self._kind != "global" else ()
            if not (wide if self._kind == "pair" else wide or fine):
                raise DataError(f"{row.origin}: no caption to draw from; load the manifest with captions required")
            flat += [numbers.setdefault(text, len(numbers)) for text in (*wide, *fine)]
            counts.append((len(wide), len(fine)))
        self.texts = list(numbers)
        self._flat = np.array(flat)
        self._wide, self._fine = np.array(counts).T.copy()
        self._first = np.cumsum(self._wide + self._fine) - (self._wide + self._fine)

    def draw(
        self,
        step: int,
        occasion: int,
        rows: np.ndarray,  # int64 [n]
    ) -> np.ndarray:  # int64 [n], or of pairs [2n], first those of all clips, then the second ones
        """The number of a caption, or of two, for each row."""
        wide, fine = self._wide[rows], self._fine[rows]
        own: tuple[Any, ...] = (self._seed, occasion, rows, CAPTION)
        if self._kind == "pair":
            second = draws(fine, *own, 1)
            other = draws(np.maximum(fine - 1, 1), *own, 2)
            first = draws(np.maximum(wide, 1), *own, 3)
            if hash64(self._seed, step, CAPTION) < both_fine_probability(step) * 2**64:
                several = fine > 1  # two fine ones, of which the one drawn first comes first
                first, second = (
                    np.where(several, wide + second, first),
                    np.where(several, other + (other >= second), second),
                )
            picked, rows = np.concatenate([first, wide + second]), np.concatenate([rows, rows])
        else:
            choices = (wide > 0).astype(np.int64) + (fine > 0)
            of_fine = np.where(choices > 1, draws(choices, *own), wide == 0).astype(bool)
            picked = np.where(of_fine, wide, 0) + draws(np.where(of_fine, fine, wide), *own, 1)
        return self._flat[self._first[rows] + picked]

    def distinct(self, captions: np.ndarray, prompts: list[str]) -> tuple[list[str], Tensor, Tensor | None]:
        """`distinct_texts` of captions that are given as numbers."""
        order: dict[int, int] = {}
        rows = torch.tensor([order.setdefault(number, len(order)) for number in captions.tolist()])
        texts = [self.texts[number] for number in order]
        if not prompts:
            return texts, rows, None
        position = {text: index for index, text in enumerate(texts)}
        prompt_rows = torch.tensor([position.setdefault(text, len(position)) for text in prompts])
        return list(position), rows, prompt_rows


class WithTextSummaries:
    """A loader's batches, with the summaries of their captions and prompts.

    Args:
        loader: of batches that are not tokenized.
        texts: the summaries.
    """

    def __init__(self, loader: Iterable[Batch], texts: TextTable) -> None:
        self._loader, self._texts = loader, texts

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            texts, rows, prompt_rows = distinct_texts(batch.captions, batch.prompts)
            text = {"summary": self._texts.gather(texts)}
            yield replace(batch, text=text, text_rows=rows, prompt_rows=prompt_rows)
