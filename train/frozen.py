"""Frozen towers are computed once: what a file does not hold yet of their summaries is computed before the first step.

The clips and captions of a run are cut into groups of like length, and a group of which anything is missing is computed
as a whole. The groups follow from the data alone, so a summary has the same bits whichever run, rank or start computes
it, and a run that is killed meanwhile and started again is the run that was not. Ranks take groups in turn. Each goes
through its groups in an order of its own and leaves out what others have computed by then, so that two runs at once
share the work instead of doing it twice.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastclap import console
from fastclap.audio import AudioError, Clip
from fastclap.data import BadClip, ClipDataset, Manifest, Quarantine
from fastclap.data.dataset import Loader, pad
from fastclap.data.rows import clip_durations
from fastclap.data.summaries import (
    SummaryStore,
    cache_folder,
    caption_key,
    clip_identities,
    clip_key,
    crop_start,
    fingerprint,
    settle,
)
from fastclap.data.summary_batches import Captions, ClipTable, SummaryDataset, TextTable, WithTextSummaries
from fastclap.errors import DataError
from fastclap.evaluation.ranks import Embedded
from fastclap.models.clap import CLAP
from fastclap.models.encoder import LONG_SECONDS, evaluation_mode
from fastclap.models.layers import weights_computed_once
from fastclap.models.products import fast_products
from fastclap.threads import in_threads
from fastclap.train import distributed
from fastclap.train.config import TrainConfig
from fastclap.train.distributed import World

Item = TypeVar("Item")

_TEXTS = 256  # captions of a group
_THREADS = 4  # that decode


@dataclass
class Kept:
    """What a run keeps of its frozen towers; without any, everything here leaves things as they are.

    Attributes:
        clips: of the training manifest.
        texts: all captions and prompts that a training batch can hold.
        known: what a validation need not encode.
        text: for the log.
    """

    clips: ClipTable | None = None
    texts: TextTable | None = None
    known: KnownSummaries | None = None
    text: list[str] = field(default_factory=list)

    def dataset(self, clips: ClipDataset) -> ClipDataset | SummaryDataset:
        """The data set to train on, in place of `clips`."""
        if self.texts is not None:
            clips.tokenize = None
        return clips if self.clips is None else SummaryDataset(clips, self.clips, self.texts)

    def loader(self, loader: Loader) -> Loader | WithTextSummaries:
        """The loader of that data set's batches, in place of `loader`."""
        return loader if self.texts is None or self.clips is not None else WithTextSummaries(loader, self.texts)


def keep(
    model: CLAP,
    config: TrainConfig,
    world: World,
    clips: ClipDataset,
    valid: Manifest | None,
    quarantine: Quarantine,
    *,
    other_teacher: bool = False,
) -> Kept:
    """Open the files of the frozen towers and compute what they lack; every rank calls this.

    Args:
        model: on its device, with the weights that training starts from.
        config: says which towers are frozen and where the files are.
        world: this process.
        clips: what is trained on.
        valid: what is validated on.
        quarantine: receives the clips that cannot be used.
        other_teacher: a teacher with towers of its own hears the clips.

    Raises:
        DataError: more unusable clips than tolerated, a file cannot be read or written, or a clip changes meanwhile.
    """
    kept = Kept()
    if config.data.frozen_cache == "off":
        return kept
    fixed = {side: _is_fixed(model, config, side) for side in ("audio", "text")}
    folder, bf16 = cache_folder(config.data.frozen_cache), config.uses_bf16(world.device.type)
    if fixed["audio"] and model.audio_branch.chunk is not None:  # how many parts a clip has is not kept
        fixed["audio"] = False
        kept.text.append(
            "frozen audio tower: computed at every step, because it sees long clips in parts (audio.chunks)"
        )
    if fixed["text"] and clips.caption == "perturbed":
        fixed["text"] = False
        kept.text.append("frozen text tower: computed at every step, because captions are perturbed (data.captions)")
    if not any(fixed.values()):
        return kept
    if config.data.frozen_cache == "auto" and not distributed.agree(lambda: _is_writable(folder), world):
        kept.text.append(
            f"frozen towers: computed at every step, because {folder} cannot be written to; name another folder with "
            "--data.frozen-cache"
        )
        return kept
    filling = _Filling(model, world, config.valid.batch_size)

    def store(side: str, bf16: bool) -> SummaryStore:
        tower, tower_config = getattr(model, f"{side}_branch"), getattr(model.config, side)
        on_gpu = {"matmul": config.matmul_precision} if world.device.type == "cuda" else {}
        name = distributed.agree(
            lambda: fingerprint(tower, tower_config, device=world.device.type, bf16=bf16, **on_gpu), world
        )
        return SummaryStore(folder / side, name)

    valid_clips = valid_texts = None
    if fixed["audio"]:
        if other_teacher:
            kept.text.append(
                f"frozen audio tower: computed at every step, because the teacher {config.loss.teacher} hears the clips"
            )
        else:
            kept.clips = filling.clips(clips, store("audio", bf16), config.data.frozen_crops, bf16)
            if world.is_main:
                Path(quarantine.path).parent.mkdir(parents=True, exist_ok=True)
                quarantine.add(kept.clips.bad.values())
            kept.text.append(_described("audio", kept.clips.store))
        in_shards = config.shard and kept.clips is None  # what combines
        if valid is not None and not in_shards and not _in_windows(model, valid):
            whole = ClipDataset(valid, model.sampling_rate, seed=0)
            valid_clips = filling.clips(whole, store("audio", False), 1, False)
    if fixed["text"] and model.tokenizer is not None:
        prompts = [] if clips.tags is None else [text for texts in clips.tags.sentences for text in texts]
        kept.texts = TextTable(store("text", bf16), {})
        filling.texts(kept.texts, [*Captions(clips).texts, *prompts], bf16)
        kept.text.append(_described("text", kept.texts.store))
        valid_texts = kept.texts if not bf16 else TextTable(store("text", False), {})
    kept.known = KnownSummaries(filling, valid_clips, valid_texts)
    return kept


def _in_windows(model: CLAP, manifest: Manifest) -> bool:
    """Whether some clip is so long that its vector is of several windows, and not of one summary."""
    return model.beginning is None and bool((clip_durations(manifest) > LONG_SECONDS).any())


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _is_fixed(model: CLAP, config: TrainConfig, side: str) -> bool:
    """Whether a tower's summaries are the same throughout the run."""
    if not getattr(model.config, side).freeze or config.optimizer.unfreeze_step:
        return False
    tower: nn.Module = getattr(model, f"{side}_branch")
    return not any(p.requires_grad for p in tower.parameters()) or not _trains(model, tower, side)


def _trains(model: CLAP, tower: Any, side: str) -> bool:
    """Whether a parameter that trains has a part in the tower's summaries, as adapters do: tried on a short input."""
    with torch.enable_grad(), evaluation_mode(tower):
        if side == "text":
            ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
            return tower.summarize(ids, torch.ones_like(ids), [2]).requires_grad
        samples = max(model.sampling_rate // 2, tower.min_samples)
        silence = torch.zeros(1, samples, dtype=torch.int16, device=model.device)
        return tower.summarize(silence, torch.tensor([samples], device=model.device)).requires_grad


def _described(side: str, store: SummaryStore) -> str:
    damaged = f", {store.damaged} damaged records left out" if store.damaged else ""
    megabytes = 0.0 if store.path is None else store.path.stat().st_size / 1e6
    return f"frozen {side} tower: computed beforehand, kept in {store.path} ({megabytes:.1f} MB{damaged})"


class KnownSummaries:
    """Unit vectors of a validation, of the summaries of frozen towers (`fastclap.evaluation.embedding.KnownVectors`).

    Args:
        filling: computes the summaries of texts that are new.
        clips: of the validation manifest; None: the audio tower is not frozen.
        texts: None: the text tower is not frozen.
    """

    def __init__(self, filling: _Filling, clips: ClipTable | None, texts: TextTable | None) -> None:
        self._filling, self._clips, self._texts = filling, clips, texts

    def clips(self, rank: int, size: int) -> Embedded | None:
        table, model, batch = self._clips, self._filling.model, self._filling.batch
        if table is None:
            return None
        usable = np.flatnonzero(table.crops)
        # whole batches, and those of one process: see fastclap.evaluation.ranks
        shares = [usable[first : first + batch] for first in range(0, len(usable), batch)][rank::size]
        vectors = [model.embed_summaries(audio=table.gather(rows).to(model.device)) for rows in shares]
        return [row for rows in shares for row in rows.tolist()], vectors, [] if rank else list(table.bad.values())

    def texts(self, texts: Sequence[str]) -> Tensor | None:
        table, model = self._texts, self._filling.model
        if table is None:
            return None
        self._filling.texts(table, texts, bf16=False)
        parts = [texts[first : first + _TEXTS] for first in range(0, len(texts), _TEXTS)]
        return torch.cat([model.embed_summaries(text=table.gather(part).to(model.device)) for part in parts])


@dataclass(frozen=True)
class _Work(Generic[Item]):
    """What is to be in a file."""

    store: SummaryStore
    items: Sequence[Item]
    keys: Sequence[bytes]  # of the items
    load: Callable[[Item], Any]  # what `summarize` needs of an item; an AudioError: it cannot be used
    summarize: Callable[[list[Any]], tuple[list[int], Tensor]]  # extents and summaries of loaded items
    bf16: bool
    unit: str  # clips or captions


class _Filling:
    """Computes what files lack.

    Args:
        model: on its device.
        world: of the ranks, which share the work.
        batch: clips that are computed together.
    """

    def __init__(self, model: CLAP, world: World, batch: int) -> None:
        self.model, self.world, self.batch = model, world, batch

    # -- clips ---------------------------------------------------------------------------------------------------------

    def clips(self, clips: ClipDataset, store: SummaryStore, most: int, bf16: bool) -> ClipTable:
        """Where the summaries of a data set's clips are, with at most so many crops a clip."""
        manifest, rate, crop = clips.manifest, self.model.sampling_rate, clips.crop
        identities = clip_identities(manifest)

        def key(row: int, number: int) -> bytes:
            return clip_key(identities[row], rate, crop, number, clips.pad_to_crop)

        def load(item: tuple[int, int]) -> tuple[int, Clip]:
            row, number = item
            extent = 0

            def start(length: int) -> int:
                nonlocal extent
                extent = length
                assert clip_crop is not None
                return crop_start(identities[row], number, length - clip_crop + 1)

            clip_crop = crop
            settle(manifest[row])
            clip = clips.load(row, start)
            if clip_identities([manifest[row]]) != [identities[row]]:
                raise DataError(
                    f"{manifest[row].audio}: has changed while it was read; start again when nothing writes to it"
                )
            extent = max(extent, len(clip.wave))
            if clips.pad_to_crop and crop is not None:
                clip = clip._replace(wave=np.pad(clip.wave, (0, crop - len(clip.wave))))
            return extent, clip

        def summarize(loaded: list[tuple[int, Clip]]) -> tuple[list[int], Tensor]:
            found = [clip for _, clip in loaded]
            return [extent for extent, _ in loaded], self._of_clips(found, clips.file_statistics)

        def fill(items: list[tuple[int, int]]) -> dict[bytes, AudioError]:
            keys = [key(*item) for item in items]
            unusable = self._fill(_Work(store, items, keys, load, summarize, bf16, "clips"), self.batch)
            return {identities[items[item][0]]: error for item, error in unusable.items()}

        first: dict[bytes, int] = {}  # rows of the same audio share its summaries
        for row, identity in enumerate(identities):
            first.setdefault(identity, row)
        rows = list(first.values())
        if not all(key(row, 0) in store for row in rows):
            seconds = clip_durations([manifest[row] for row in rows])
            rows = [rows[place] for place in np.argsort(-seconds, kind="stable").tolist()]
        bad = fill([(row, 0) for row in rows])
        longer = [
            row for row in rows if identities[row] not in bad and crop and store.extent(key(row, 0)) > crop and most > 1
        ]
        for number in range(1, most):  # each in groups of its own, which are the same for every `most`
            bad |= fill([(row, number) for row in longer if identities[row] not in bad])
        crops = dict.fromkeys(identities, 1) | {identities[row]: most for row in longer} | dict.fromkeys(bad, 0)
        counts = np.array([crops[identity] for identity in identities])
        places = np.zeros((len(manifest), max(1, int(counts.max(initial=1)))), np.int64)
        for row, count in enumerate(counts.tolist()):
            places[row, :count] = [store.place(key(row, number)) for number in range(count)]
        lost = {
            row: BadClip(row, bad[identity].path, bad[identity].reason, manifest[row].origin)
            for row, identity in enumerate(identities)
            if identity in bad
        }
        return ClipTable(store, places, counts, lost)

    def _of_clips(self, clips: list[Clip], statistics: bool) -> Tensor:
        """Summaries of clips, computed as the model embeds them."""
        model, device = self.model, self.model.device
        audio, lengths = pad([clip.wave for clip in clips])
        mean, std = torch.tensor([(clip.mean, clip.std) for clip in clips]).unbind(1)
        groups = model.encoding_groups(lengths.tolist())
        found = []
        for rows in groups:
            sizes = lengths[rows].tolist()
            wave, length = audio[rows, : max(sizes)].to(device), lengths[rows].to(device)
            known = [x[rows].to(device) if statistics else None for x in (mean, std)]
            found.append(model.audio_branch.summarize(wave, length, known[0], known[1], sizes))
        order = torch.tensor([row for rows in groups for row in rows]).argsort()
        return torch.cat(found).cpu()[order]

    # -- captions ------------------------------------------------------------------------------------------------------

    def texts(self, table: TextTable, texts: Sequence[str], bf16: bool) -> None:
        """Let a table know these texts; every rank calls this with the same ones."""
        new = [text for text in dict.fromkeys(texts) if text not in table.places]
        if not new:
            return
        ids: list[list[int]] = []
        for first in range(0, len(new), _TEXTS):
            tokens = self.model.tokenize(new[first : first + _TEXTS])
            counts = tokens["attention_mask"].sum(1).tolist()
            ids += [row[:count] for row, count in zip(tokens["input_ids"].tolist(), counts, strict=True)]
        keys = [caption_key(row, self.model.config.text.max_tokens) for row in ids]
        order = sorted(range(len(new)), key=lambda index: len(ids[index]))
        work = _Work(
            table.store, [ids[i] for i in order], [keys[i] for i in order], list, self._of_captions, bf16, "captions"
        )
        self._fill(work, _TEXTS)
        table.places.update((text, table.store.place(key)) for text, key in zip(new, keys, strict=True))

    def _of_captions(self, ids: list[list[int]]) -> tuple[list[int], Tensor]:
        counts = [len(row) for row in ids]
        padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
        mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        device = self.model.device
        return counts, self.model.text_branch.summarize(padded.to(device), mask.long().to(device), counts)

    # -- both ----------------------------------------------------------------------------------------------------------

    def _fill(self, work: _Work[Any], size: int) -> dict[int, AudioError]:
        """Compute what the file lacks; the ranks share it.

        Returns:
            Why items cannot be used, by their place among the items.
        """
        groups = [range(first, min(first + size, len(work.items))) for first in range(0, len(work.items), size)]
        bad = self._together(self._fill_share(work, groups[self.world.rank :: self.world.size], {}))
        if self.world.size > 1:  # of a file that not all ranks share, each computes what others have put elsewhere
            bad = self._together(self._fill_share(work, groups, bad))
        return bad

    def _together(self, bad: dict[int, AudioError]) -> dict[int, AudioError]:
        if self.world.group is None:
            return bad
        shares: list[Any] = [None] * self.world.size
        dist.all_gather_object(shares, bad, group=self.world.group)
        return {item: error for share in shares for item, error in share.items()}

    def _fill_share(self, work: _Work[Any], groups: list[range], bad: dict[int, AudioError]) -> dict[int, AudioError]:
        store, bad = work.store, dict(bad)
        store.refresh()

        def missing(group: range) -> list[int]:
            return [item for item in group if work.keys[item] not in store and item not in bad]

        groups = [group for group in groups if missing(group)]
        if not groups:
            return bad
        random.Random().shuffle(groups)  # by the system's entropy: another order in every process
        total, done = sum(map(len, groups)), 0

        def load(wanted: tuple[range, int]) -> tuple[range, int, Any]:
            group, item = wanted
            try:
                return group, item, work.load(work.items[item])
            except AudioError as error:
                return group, item, error

        def lacking() -> Iterator[tuple[range, int]]:
            for group in groups:
                store.refresh()
                yield from ((group, item) for item in missing(group))

        def loaded_in_threads(wanted: Iterable[tuple[range, int]]) -> Generator[tuple[range, int, Any], None, None]:
            return in_threads(
                load, wanted, _THREADS, ahead=2 * len(groups[0]), describe=lambda at: str(work.items[at[1]])
            )

        show = self.world.is_main and len(groups) > 1
        with (
            closing(loaded_in_threads(lacking())) as results,
            console.progress("computing the frozen tower's", "computed", work.unit, show) as advance,
            _inference(self.model, work.bf16),
        ):
            for group, found in itertools.groupby(results, key=lambda result: result[0]):
                loading = {item: result for _, item, result in found}
                loaded = dict(loading)
                unusable = {item: result for item, result in loaded.items() if isinstance(result, AudioError)}
                bad |= unusable
                if len(unusable) < len(loaded):
                    others = [(group, item) for item in group if item not in loaded]
                    if others:
                        loaded |= {item: result for _, item, result in loaded_in_threads(others)}
                    items = [item for item in group if not isinstance(loaded[item], AudioError)]
                    extents, summaries = work.summarize([loaded[item] for item in items])
                    fresh = [at for at, item in enumerate(items) if item in loading]
                    store.append(
                        [work.keys[items[at]] for at in fresh], [extents[at] for at in fresh], summaries[fresh]
                    )
                done += len(group)
                advance(done, total)
            if done < total:  # another run has computed the rest
                advance(total, total)
        return bad


@contextmanager
def _inference(model: CLAP, bf16: bool) -> Iterator[None]:
    device = model.device.type
    with (
        evaluation_mode(model),
        torch.inference_mode(),
        fast_products(model.device),
        weights_computed_once(),
        torch.autocast(device, torch.bfloat16, enabled=bf16),
    ):
        yield
