"""Batches: decode the clips of one step, crop them, draw a caption for each, and replace what cannot be used.

One item of the data set is one whole batch, so a loader process hands over one padded int16 tensor and nothing is
collated twice. Every choice (crop, caption, replacement) is a hash of (seed, epoch, row), so a batch depends on its
step alone: not on the number of loader processes, nor on where a run was resumed. A clip that cannot be used is
replaced, so that the batch size holds, and reported with the batch; the training process keeps the list and stops the
run when it grows too long.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastclap import console
from fastclap.audio import MIN_SECONDS, AudioError, Clip, whole_clip
from fastclap.data.hashing import CAPTION, CROP, PERTURBATION, REPLACEMENT, draw, hash64
from fastclap.data.perturbation import ATTRIBUTES, perturbed
from fastclap.data.rows import Manifest, Row, clip_durations
from fastclap.data.sampler import BatchSampler
from fastclap.data.shards import open_clip
from fastclap.data.tags import TagPrompts, row_tags
from fastclap.data.workers import ROW_TIMEOUT, WorkerGone, WorkerStuck, in_processes, now_at, zeros
from fastclap.errors import DataError, FastclapError, TrainingError
from fastclap.reading import parse_json
from fastclap.threads import ELSEWHERE, TIMEOUT, in_threads, never

T = TypeVar("T")
CaptionKind = Literal["global", "fine", "both", "pair", "perturbed"]

_MAX_REPLACEMENTS = 64


class BadClip(NamedTuple):
    """A clip that could not be used."""

    row: int  # index in the manifest
    path: str
    reason: str
    origin: str  # file and line of the manifest


@dataclass
class Batch:
    """The clips and captions of one step, on one rank."""

    step: int
    epoch: int
    audio: Tensor | None  # int16 [B, T], zero-padded; None: there is `audio_summary` instead
    lengths: Tensor | None  # int64 [B], samples; None likewise
    mean: Tensor | None  # float32 [B], of the whole file before the crop, full scale = ±1; None unless asked for
    std: Tensor | None  # float32 [B], population standard deviation, in the same unit
    captions: list[str]  # of each clip; of pairs first those of all clips, then the second, then perturbed first ones
    caption_ids: Tensor  # int64 [captions], equal for equal captions on every rank
    rows: list[int]  # the rows that were used, replacements included
    bad: list[BadClip]  # the rows that could not be used
    text: dict[str, Tensor] | None = None  # the distinct captions and then prompts, as arguments of `encode_text`
    text_rows: Tensor | None = None  # int64 [captions], which of those each is; None unless the data set tokenizes
    tokens: list[int] = field(default_factory=list)  # how many each distinct text has, if they are tokenized
    prompts: list[str] = field(default_factory=list)  # one for each tag, the same on every rank
    prompt_rows: Tensor | None = None  # int64 [tags], which of the distinct texts each prompt is
    tags: Tensor | None = None  # bool [B, tags], which clip has which tag
    samples: list[int] = field(default_factory=list)  # `lengths`, to be read without waiting for a device
    audio_summary: Tensor | None = None  # [B, ...], what a frozen tower says of the clips
    seconds: float = 0.0  # that a loader process took to make it

    def __post_init__(self) -> None:
        if not self.samples and self.lengths is not None:
            self.samples = self.lengths.tolist()

    @property
    def clips(self) -> int:
        """How many there are."""
        audio = self.audio if self.audio_summary is None else self.audio_summary
        return 0 if audio is None else len(audio)

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on `device`; asynchronous from pinned memory with `non_blocking`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that work queued on `stream` reads the tensors."""

        def note(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        self._map(note)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        mapped: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.text is not None:
            mapped["text"] = {name: function(tensor) for name, tensor in self.text.items()}
        return replace(self, **mapped)


class ClipDataset(Dataset[Batch]):
    """Maps (step, epoch, rows), as `BatchSampler` yields them, to a `Batch`.

    A clip is unusable, and replaced by another row of its source, if its file is missing, damaged, truncated or of an
    unsupported type, is shorter than 0.1 s, has a NaN or infinite sample, or is all zeros.

    Args:
        manifest: the rows; its tensors are shared, not copied, with loader processes.
        sampling_rate: rate in Hz to resample to.
        crop_seconds: longer clips are cropped to this length at a random place. Only the crop is read, unless
            `cache_mb`, or `file_statistics` of a file that is not packed, ask for the whole clip.
        seed: fixes crops, captions and replacements, together with epoch and row.
        caption: which descriptions one is drawn from: "global", "fine", or "both", which first draws the kind (half and
            half) and then the description. A row without one kind uses the other under "both". "pair" draws two a
            clip (CLSP stage 2, arXiv 2601.03065): in the t-th step both fine with probability
            min(0.05 + 0.45 t/10⁴, 0.5), one decision for the whole batch, else a global and a fine one. A clip with one
            fine caption always gets a global one as the other. "perturbed" draws three (CLSP stage 3): a global one, a
            fine one, and the global one with an attribute of the clip contradicted (`fastclap.data.perturbation`), or
            once more as it is where it names no attribute that can be.
        file_statistics: fill `Batch.mean` and `Batch.std`, for towers that normalise a file before it is cropped.
        cache_mb: each process keeps up to this many MB of decoded clips, so that a small set is decoded only once.
        tokenize: fill `Batch.text` and `Batch.text_rows` with what this makes of the distinct captions of a batch,
            so that loader processes tokenize. It must be picklable, as `functools.partial(tokenizer, max_tokens=77)`
            of a `Tokenizer` is.
        tags: fill `Batch.tags` and `Batch.prompts`; the prompts are tokenized together with the captions.
        pad_to_crop: every clip is padded to the crop length with zeros, and `lengths` count them as sound.
        repeats: rows recur within an epoch, as a balanced sampler draws them: crops and captions are then drawn for
            each step anew instead of for each epoch.

    Raises:
        DataError: a row has no caption of the wanted kind, or none has an attribute to perturb; on indexing: no usable
            replacement was found.
    """

    def __init__(
        self,
        manifest: Manifest,
        sampling_rate: int = 16000,
        *,
        crop_seconds: float = math.inf,
        seed: int,
        caption: CaptionKind = "global",
        file_statistics: bool = False,
        cache_mb: float = 0,
        tokenize: Callable[[list[str]], dict[str, Tensor]] | None = None,
        tags: TagPrompts | None = None,
        repeats: bool = False,
        pad_to_crop: bool = False,
    ) -> None:
        self.manifest = manifest
        self.sampling_rate = sampling_rate
        self.crop = None if math.isinf(crop_seconds) else round(crop_seconds * sampling_rate)
        self.seed = seed
        self.caption = caption
        self.file_statistics = file_statistics
        self.tokenize = tokenize
        self.tags = tags
        self.repeats = repeats
        self.pad_to_crop = pad_to_crop
        self._cache = _ClipCache(round(cache_mb * 1e6))
        if pad_to_crop and self.crop is None:
            raise DataError("pad_to_crop needs crop_seconds, the length to pad to")
        if crop_seconds < MIN_SECONDS:
            raise DataError(f"crop_seconds={crop_seconds}: a clip needs at least {MIN_SECONDS} s")
        kinds = get_args(CaptionKind)
        if caption not in kinds:
            raise DataError(f"caption={caption!r}: it is one of {', '.join(map(repr, kinds))}")
        for row in manifest if caption in ("fine", "pair", "perturbed") else ():
            if not row.fine_captions:
                raise DataError(f"{row.origin}: no fine_description; add one, or train with caption='global' or 'both'")
        if caption == "perturbed" and not set(ATTRIBUTES) & set(manifest.columns):
            raise DataError(
                f"{', '.join(manifest.source_names)}: captions are perturbed by the labels of their clips, and none of "
                f"the columns {', '.join(ATTRIBUTES)} is there; `fastclap prepare` writes them for ParaSpeechCaps and "
                "FCaps"
            )

    def __getitem__(self, item: tuple[int, int, list[int]]) -> Batch:
        step, epoch, wanted = item
        used = set(wanted)
        rows: list[int] = []
        clips: list[Clip] = []
        bad: list[BadClip] = []
        occasion = step if self.repeats else epoch
        for row in wanted:
            used_row, clip = self.usable(occasion, row, used, bad, self._load)
            rows.append(used_row)
            clips.append(clip)
        now_at(ELSEWHERE)
        captions = self.draw_captions(step, occasion, rows)
        prompts, tags = [], None
        if self.tags is not None:
            prompts, tags = self.tags.draw(step), self.tags.targets([self.manifest[row] for row in rows])
        text, text_rows, prompt_rows, tokens = None, None, None, []
        if self.tokenize is not None:
            distinct, text_rows, prompt_rows = distinct_texts(captions, prompts)
            text = self.tokenize(distinct)
            tokens = text["attention_mask"].sum(1).tolist()
        waves = [clip.wave for clip in clips]
        if self.pad_to_crop and self.crop is not None:
            waves = [np.pad(wave, (0, self.crop - len(wave))) for wave in waves]
        audio, lengths = pad(waves)
        return Batch(
            step=step,
            epoch=epoch,
            audio=audio,
            lengths=lengths,
            mean=torch.tensor([clip.mean for clip in clips]) if self.file_statistics else None,
            std=torch.tensor([clip.std for clip in clips]) if self.file_statistics else None,
            captions=captions,
            caption_ids=torch.tensor([text_id(caption) for caption in captions], dtype=torch.int64),
            text=text,
            text_rows=text_rows,
            tokens=tokens,
            prompts=prompts,
            prompt_rows=prompt_rows,
            tags=tags,
            rows=rows,
            bad=bad,
        )

    def usable(
        self, epoch: int, row: int, used: set[int], bad: list[BadClip], load: Callable[[int, int], T]
    ) -> tuple[int, T]:
        """What `load(epoch, row)` gives of `row`, or of the first row drawn in its place that can be used, and which.

        Args:
            epoch: of the draw.
            row: that is wanted.
            used: rows of the batch, which are not to be drawn again; the row is added.
            bad: receives the rows that cannot be used: those of which `load` raises AudioError.
        """
        first, last = self._source_range(self.manifest[row].source)
        candidate, reason = row, None
        for attempt in range(_MAX_REPLACEMENTS):
            if attempt:
                candidate = first + draw(last - first, self.seed, epoch, row, REPLACEMENT, attempt)
                # A row must not be its own replacement; near the end, better twice in the batch than none.
                if candidate == row or (candidate in used and attempt < _MAX_REPLACEMENTS // 2):
                    continue
            try:
                if stuck := now_at(candidate):
                    raise AudioError(self.manifest[candidate].audio, stuck)
                clip = load(epoch, candidate)
            except AudioError as error:
                reason = str(error)
                bad.append(BadClip(candidate, error.path, error.reason, self.manifest[candidate].origin))
                continue
            except FastclapError:
                raise
            except Exception as error:
                clip_row = self.manifest[candidate]
                raise RuntimeError(f"{clip_row.origin}: {clip_row.audio}: {type(error).__name__}: {error}") from error
            used.add(candidate)
            return candidate, clip
        raise DataError(
            f"{self.manifest[row].origin}: neither this clip nor any of {_MAX_REPLACEMENTS} replacements can be used; "
            f"the last one tried: {reason}; correct the manifest or the audio root"
        )

    def _source_range(self, source: int) -> tuple[int, int]:
        first = sum(self.manifest.source_sizes[:source])
        return first, first + self.manifest.source_sizes[source]

    def _load(self, epoch: int, row: int) -> Clip:
        def start(length: int) -> int:
            assert self.crop is not None
            return draw(length - self.crop + 1, self.seed, epoch, row, CROP)

        return self.load(row, start)

    def load(self, row: int, crop_start: Callable[[int], int]) -> Clip:
        """A clip, cropped if it is longer than the crop.

        Args:
            row: of the manifest.
            crop_start: first sample of the crop in a clip of so many; asked of longer clips alone. A crop that is all
                zeros is moved to where there is sound.

        Raises:
            AudioError: the clip is unusable.
        """
        clip_row = self.manifest[row]
        key = (clip_row.audio, -1) if clip_row.packed is None else (clip_row.packed.shard, clip_row.packed.offset)
        clip = self._cache.get(key)
        if clip is None:
            with open_clip(clip_row, self.sampling_rate) as file:
                length = file.num_samples
                known = file.statistics or (None if self.file_statistics else (math.nan, math.nan))
                if self.crop and length > self.crop and known and not self._cache.budget:
                    wave = file.read(crop_start(length), self.crop)
                    if wave.any():
                        return Clip(wave, *known)
                clip = whole_clip(file)
            self._cache.put(key, clip)
        wave = clip.wave
        if self.crop and len(wave) > self.crop:
            start = crop_start(len(wave))
            if not wave[start : start + self.crop].any():  # digital silence: move the crop to where there is sound
                start = min(int(np.flatnonzero(wave)[0]), len(wave) - self.crop)
            wave = wave[start : start + self.crop]
        return clip._replace(wave=wave)

    def draw_captions(self, step: int, occasion: int, rows: Sequence[int]) -> list[str]:
        """The captions of a batch of these rows, in the order of `Batch.captions`."""
        if self.caption not in ("pair", "perturbed"):
            return [self._draw_caption(occasion, row) for row in rows]
        pairs = [self._draw_pair(step, occasion, row) for row in rows]
        captions = [pair[which] for which in (0, 1) for pair in pairs]
        if self.caption == "perturbed":
            captions += [self._perturbed(occasion, row, pair[0]) for row, pair in zip(rows, pairs, strict=True)]
        return captions

    def _perturbed(self, occasion: int, row: int, caption: str) -> str:
        clip, count = self.manifest[row], itertools.count()

        def choose(below: int) -> int:
            return draw(below, self.seed, occasion, row, PERTURBATION, next(count))

        labels = {column: row_tags(clip, column) for column in ATTRIBUTES}
        return perturbed(caption, labels, choose) or caption

    def _draw_caption(self, epoch: int, row: int) -> str:
        clip: Row = self.manifest[row]
        kinds = {"global": (clip.captions,), "fine": (clip.fine_captions,), "both": (clip.captions, clip.fine_captions)}
        choices = [captions for captions in kinds[self.caption] if captions]
        if not choices:
            raise DataError(f"{clip.origin}: no caption to draw from; load the manifest with captions required")
        captions = choices[draw(len(choices), self.seed, epoch, row, CAPTION)]
        return captions[draw(len(captions), self.seed, epoch, row, CAPTION, 1)]

    def _draw_pair(self, step: int, occasion: int, row: int) -> tuple[str, str]:
        clip = self.manifest[row]
        fine, own = clip.fine_captions, (self.seed, occasion, row, CAPTION)
        first = draw(len(fine), *own, 1)
        both_fine = hash64(self.seed, step, CAPTION) < both_fine_probability(step) * 2**64
        if self.caption == "pair" and both_fine and len(fine) > 1:
            other = draw(len(fine) - 1, *own, 2)
            return fine[first], fine[other + (other >= first)]
        return clip.captions[draw(len(clip.captions), *own, 3)], fine[first]


def both_fine_probability(step: int) -> float:
    """That a step contrasts two fine captions a clip, not a global and a fine one (CLSP, which counts from 1)."""
    return min(0.05 + 0.45 * (step + 1) / 10_000, 0.5)


class _ClipCache:
    """Whole clips by path and offset, up to a budget in bytes; what came first stays. A loader process starts empty."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._left = budget
        self._clips: dict[tuple[str, int], Clip] = {}

    def get(self, key: tuple[str, int]) -> Clip | None:
        return self._clips.get(key)

    def put(self, key: tuple[str, int], clip: Clip) -> None:
        if clip.wave.nbytes <= self._left:
            self._left -= clip.wave.nbytes
            self._clips[key] = clip

    def __reduce__(self) -> tuple[type[_ClipCache], tuple[int]]:
        return _ClipCache, (self.budget,)


def pad(waves: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """int16 waves of any length → (int16 [B, T] zero-padded, lengths int64 [B])."""
    lengths = torch.tensor([len(wave) for wave in waves], dtype=torch.int64)
    audio = zeros((len(waves), int(lengths.max())), torch.int16)
    view = audio.numpy()
    for index, wave in enumerate(waves):
        view[index, : len(wave)] = wave
    return audio, lengths


def distinct_texts(captions: list[str], prompts: list[str]) -> tuple[list[str], Tensor, Tensor | None]:
    """The distinct texts of a batch, and which of them each caption and each prompt is (None without prompts)."""
    position = {text: index for index, text in enumerate(dict.fromkeys([*captions, *prompts]))}
    rows, prompt_rows = (torch.tensor([position[text] for text in texts]) for texts in (captions, prompts))
    return list(position), rows, prompt_rows if prompts else None


def text_id(text: str) -> int:
    """A 63-bit BLAKE2b hash of the exact text, so that equal texts have equal ids in every process."""
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little") >> 1


class Quarantine:
    """The list of unusable clips of a run, kept in a JSON-lines file, and the limit on its length.

    The file is read before it is added to, so several ranks may share it and a resumed run goes on counting. Where it
    cannot be written (a full disk), the clips are counted all the same.

    Args:
        path: the file, created with the first bad clip.
        total_rows: rows of the training manifest.
        max_bad_share: largest tolerable share of bad rows, 0 … 1. Unless it is 0, one bad clip is tolerated in any set.
    """

    def __init__(self, path: str | os.PathLike[str], total_rows: int, max_bad_share: float) -> None:
        self.path = os.fspath(path)
        self.total_rows = total_rows
        self.max_bad_share = max_bad_share
        self._known: set[tuple[int, str]] = set()
        self._position = 0
        self._failed = False

    def __len__(self) -> int:
        return len(self._known)

    def add(self, clips: Iterable[BadClip]) -> list[BadClip]:
        """Record clips; returns those that are new.

        Raises:
            DataError: more rows are bad than `max_bad_share` tolerates; the file lists them.
        """
        clips = list(clips)
        if not clips:
            return []
        with self._file_errors():
            self._read()
        new = list({(clip.row, clip.path): clip for clip in clips if (clip.row, clip.path) not in self._known}.values())
        self._known.update((clip.row, clip.path) for clip in new)
        if new:
            with self._file_errors():
                self._check_kind()
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(clip._asdict()) + "\n" for clip in new))
        if len(self._known) > self.max_bad_share * self.total_rows and len(self._known) > (self.max_bad_share > 0):
            last = clips[-1]
            listed = "The first are" if self._failed else "All are"
            raise DataError(
                f"{len(self._known)} of {self.total_rows} clips are unusable, more than the tolerated share "
                f"{self.max_bad_share:g}; the last one is {last.origin}: {last.path}: {last.reason}. {listed} listed "
                f"in {self.path}; repair or remove them, or raise the share (--data.max-bad-share)"
            )
        return new

    @contextlib.contextmanager
    def _file_errors(self) -> Iterator[None]:
        """The list is of use to people, and no reason to stop a run."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                console.note(f"{self.path}: unusable clips cannot be listed here ({console.os_error_text(error)})")
            self._failed = True

    def _check_kind(self) -> None:
        if os.path.exists(self.path) and not os.path.isfile(self.path):  # a pipe would be waited for
            raise FileExistsError(errno.EEXIST, "it is not a file")

    def _read(self) -> None:
        """Read the lines that were written since the last call, by this process or another; others are skipped."""
        self._check_kind()
        if not os.path.exists(self.path):
            return
        with open(self.path, "rb+") as file:
            file.seek(self._position)
            lines = file.read()
            if lines and not lines.endswith(b"\n"):  # a killed run, or a full disk, left half a line
                lines = lines[: lines.rfind(b"\n") + 1]
                file.truncate(self._position + len(lines))
        self._position += len(lines)
        for line in lines.split(b"\n"):
            with contextlib.suppress(DataError):
                clip = parse_json(line, self.path)
                if isinstance(clip, dict) and isinstance(clip.get("row"), int) and isinstance(clip.get("path"), str):
                    self._known.add((clip["row"], clip["path"]))


class _Timed:
    """Makes batches, and notes how long that took."""

    def __init__(self, dataset: Dataset[Batch]) -> None:
        self._dataset = dataset

    def __call__(self, item: tuple[int, int, list[int]]) -> Batch:
        begin = time.perf_counter()
        batch = self._dataset[item]
        batch.seconds = time.perf_counter() - begin
        return batch


@dataclass
class Loader:
    """Iterates over batches, decoded ahead in loader processes; see `make_loader`."""

    dataset: Dataset[Batch]
    sampler: BatchSampler
    num_workers: int
    prefetch: int
    pin_memory: bool
    timeout: float
    stopping: Callable[[], bool]

    def __iter__(self) -> Iterator[Batch]:
        pin = pinned_on(torch.cuda.current_device()) if self.pin_memory and torch.cuda.is_available() else _identity
        make = _Timed(self.dataset)
        if not self.num_workers:
            yield from map(pin, map(make, self.sampler))
            return
        try:
            yield from in_processes(
                make,
                self.sampler,
                self.num_workers,
                ahead=self.prefetch,
                timeout=self.timeout,
                stopping=self.stopping,
                receive=pin,
            )
        except WorkerGone as error:
            raise TrainingError(
                f"a data loading process is gone: {error}. Continue the run (--resume) with less "
                "memory in loader processes: fewer of them (--data.workers), fewer batches ahead (--data.prefetch) "
                "or a smaller cache (--data.cache-mb); with --data.workers 0 a clip that crashes a decoder shows up"
            ) from error
        except WorkerStuck as error:
            row = None if error.place == ELSEWHERE else self.sampler.manifest[error.place]
            where = f"step {error.item[0]}" if row is None else f"{row.origin}: {row.audio}"
            raise DataError(
                f"{where}: data loading process {error.pid} made no progress for {self.timeout:g} s, and neither did "
                "the one before it: a drive does not answer, or the machine is overloaded. Continue the run (--resume) "
                "when that is mended, without the clip, or with a longer --data.worker-timeout"
            ) from error
        except (OSError, RuntimeError) as error:
            if getattr(error, "errno", None) == errno.EMFILE or "ancdata" in str(error):
                raise TrainingError(
                    "too many open files: each large tensor of a batch that is ready takes one. Continue (--resume) "
                    "with fewer batches ahead (--data.prefetch, --data.workers), or raise the limit (ulimit -n)"
                ) from error
            raise


def make_loader(
    dataset: Dataset[Batch],
    sampler: BatchSampler,
    *,
    num_workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    timeout: float = TIMEOUT,
    stopping: Callable[[], bool] = never,
) -> Loader:
    """The batches of `sampler` in order, from its `start_step` to its `stop_step`.

    Args:
        dataset: maps an item of the sampler to a batch.
        num_workers: loader processes; 0 decodes in the calling process, where nothing can end a read that hangs. They
            come from a fork server, which has imported torch once and holds no CUDA state, and end with the calling
            process even if that is killed.
        prefetch: batches that each loader process may be ahead.
        pin_memory: copy batches to pinned memory in a thread, for asynchronous transfer to a GPU.
        timeout: seconds of waiting without progress after which a loader process is replaced, by one that makes the
            same batch. A clip at which the second one stops too is left out like one that cannot be read.
        stopping: asked about twice a second while waiting for a loader process.

    Raises:
        DataError: while iterating, an error in a loader process, with the same message as without processes; or two of
            them stood still.
        LoaderStopped: while iterating, `stopping` said so.
        TrainingError: while iterating, a loader process was killed or crashed, or there were too many open files.
    """
    return Loader(dataset, sampler, num_workers, prefetch, pin_memory, timeout, stopping)


def pinned_on(device: int) -> Callable[[Batch], Batch]:
    """A function that copies a batch to memory pinned for a GPU, from any thread."""

    def pin(batch: Batch) -> Batch:
        torch.cuda.set_device(device)  # each thread has its own current device, at first the first one
        return batch.pin_memory()

    return pin


def _identity(batch: Batch) -> Batch:
    return batch


class EvalBatch(NamedTuple):
    """Whole clips, decoded and padded."""

    rows: list[int]  # in the manifest
    audio: Tensor  # int16 [B, T], zero-padded
    lengths: Tensor  # int64 [B], samples
    mean: Tensor  # float32 [B], of the whole file, full scale = ±1
    std: Tensor  # float32 [B], population standard deviation, likewise


def eval_batches(
    manifest: Sequence[Row],
    sampling_rate: int,
    batch_size: int,
    *,
    max_seconds: float | None = None,
    bad: list[BadClip] | None = None,
    threads: int = 4,
    share: tuple[int, int] = (0, 1),
    timeout: float = ROW_TIMEOUT,
    stopping: Callable[[], bool] = never,
) -> Iterator[EvalBatch]:
    """Every clip once, whole, longest first in batches of similar length, for evaluation and embedding.

    Clips are decoded in threads one batch ahead of the caller.

    Args:
        manifest: the clips; any sequence of rows.
        sampling_rate: rate in Hz to resample to.
        batch_size: clips of a batch; unusable ones make it smaller.
        max_seconds: use no more than the beginning of longer clips.
        bad: unusable clips are appended to this list and left out; without a list they are an error.
        threads: decoding threads.
        share: rank and number of processes that share the batches: this one makes each `share[1]`-th, and they are as
            long as those of the others to within one batch.
        timeout: seconds to wait for one clip.
        stopping: asked about twice a second while waiting for a clip.

    Raises:
        DataError: a clip is unusable and `bad` is None, or could not be read in time.
        LoaderStopped: `stopping` said so.
    """

    def load(row: int) -> tuple[int, Clip | BadClip]:
        clip_row = manifest[row]
        try:
            with open_clip(clip_row, sampling_rate) as file:
                return row, whole_clip(file)
        except AudioError as error:
            return row, BadClip(row, error.path, error.reason, clip_row.origin)

    order = np.argsort(-clip_durations(manifest), kind="stable").tolist()
    groups = [order[first : first + batch_size] for first in range(0, len(order), batch_size)][share[0] :: share[1]]
    limit = None if max_seconds is None else round(max_seconds * sampling_rate)
    with contextlib.closing(
        in_threads(
            load,
            itertools.chain.from_iterable(groups),
            threads,
            ahead=max(batch_size, threads),
            timeout=timeout,
            stopping=stopping,
            describe=lambda row: f"{manifest[row].origin}: {manifest[row].audio}",
        )
    ) as decoded:
        for group in groups:
            rows, clips = [], []
            for row, clip in itertools.islice(decoded, len(group)):
                if isinstance(clip, Clip):
                    rows.append(row)
                    clips.append(clip)
                elif bad is None:
                    raise DataError(f"{clip.origin}: {clip.path}: {clip.reason}")
                else:
                    bad.append(clip)
            if rows:
                audio, lengths = pad([clip.wave[:limit] for clip in clips])
                mean, std = torch.tensor([(clip.mean, clip.std) for clip in clips]).unbind(1)
                yield EvalBatch(rows, audio, lengths, mean, std)
