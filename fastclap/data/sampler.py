"""The order of the data: which rows make up the batch of each step, as a pure function of (seed, step).

Nothing is drawn from a generator with a state. Permutations come from sorting 64-bit hashes of (seed, epoch, row), so a
resumed run, another world size or another number of loader processes sees the same global batches, and a checkpoint
needs to store no more than the step.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import Literal

import numpy as np

from fastclap.audio import MIN_SECONDS
from fastclap.data.hashing import draw, permutation, uniform
from fastclap.data.rows import Manifest, clip_durations
from fastclap.data.tags import balanced_weights, clip_tags
from fastclap.errors import DataError

Balance = Literal["none", "inverse", "sqrt", "log"]
_RARE_SHARE = 0.05  # of the clips; a tag that fewer have is rare (ParaSpeechCLAP)
_MAX_BUCKET_WINDOW = 32  # batches that are sorted by length together


class BatchSampler:
    """Yields (step, epoch, rows) for each step from `start_step` on, without end unless `stop_step` is given.

    One epoch:

    - mix "concat": every row once, shuffled.
    - mix "interleave": the sources take strict turns (source 0, 1, 0, 1, ...), each shuffled. The epoch ends when all
      are exhausted: the rows of the largest source occur once, a smaller source begins again with a new shuffle (the
      "all_exhausted" strategy of datasets.interleave_datasets).
    - mix "interleave" with probabilities p: the epoch has T = max(rows_i / p_i) draws, rounded up, and source i fills
      max(rows_i, round(p_i T)) of them, in random order; so each row occurs at least once, and those of the source that
      is scarcest for its share once.

    The remainder that does not fill a batch is left out; it is the end of a shuffled order, so other rows are left out
    in each epoch. With length buckets, windows of up to 32 batches (at most a quarter of the epoch, so that small sets
    still mix) are sorted by duration before they are cut into batches, and the batches of the epoch are shuffled; this
    trades the turns of "interleave" within a window, not its shares, for less padding.

    The global batch is cut into `world_size` equal contiguous parts, of which this sampler yields part `rank`; the
    global batches do not depend on the world size.

    With `batch_seconds`, batches hold as many clips as fit into a budget of padded audio instead: rows of a sorted
    window are added, shortest first, while clips × longest clip stays within the budget and there are at most
    `batch_size` of them; then the batch is cut to a multiple of `world_size`. What was cut off begins the next batch,
    and rows that do not fill the last batch of a window go to the next window; only the last batch of an epoch can be
    far from full. Fewer than `world_size` rows are left out of an epoch. Epochs differ a little in their number of
    batches, and other world sizes make other batches. (CLSP's training has one size for each of 30 ranges of length, by
    the longest clip of the range, and leaves out what does not fill the last batch of each.)

    With `balance`, as many rows as fill the batches of an epoch are drawn with replacement instead, by the weights of
    their tags (see `balanced_weights`). Where fewer than `rare_clips` rows of a batch carry a rare tag (one that less
    than 5 % of all clips have), its first rows without one are replaced by rows with one, drawn uniformly.

    Args:
        manifest: rows to draw from; also says how sources are mixed.
        batch_size: rows of a global batch; with `batch_seconds`, the most that it may have.
        seed: fixes the order, together with the step.
        bucket_by_length: make batches of clips of similar duration. Durations that the manifest lacks are read from the
            files' headers, once, in threads.
        max_seconds: clips are cropped to this length later, so longer ones count as equally long.
        batch_seconds: padded audio of a global batch, at most; by the clips' durations, which a replacement of an
            unusable clip may exceed. Needs `bucket_by_length`.
        balance: weights of tags that n clips have: "inverse" 1/n, "sqrt" 1/√n, "log" 1/ln(n + 1); "none" draws every
            row once. It cannot be combined with mix "interleave" or with `batch_seconds`.
        tag_column: the column whose tags are balanced.
        rare_clips: clips with a rare tag in a global batch, at least, where the manifest has so many.
        rank, world_size: which part of each global batch to yield.
        start_step: first step of the iteration, for instance the step of a checkpoint.
        stop_step: the step before which iteration ends.

    Attributes:
        batches_per_epoch: number of batches in every epoch; with `batch_seconds`, in the first one.

    Raises:
        DataError: the manifest fills no batch, the batch cannot be divided over the ranks, `batch_seconds` is less
            than the longest clip on every rank takes, or `balance` does not fit the mix or the columns.
    """

    def __init__(
        self,
        manifest: Manifest,
        batch_size: int,
        *,
        seed: int,
        bucket_by_length: bool = True,
        max_seconds: float | None = None,
        batch_seconds: float | None = None,
        balance: Balance = "none",
        tag_column: str | None = None,
        rare_clips: int = 2,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        stop_step: int | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise DataError(
                f"a batch of {batch_size} cannot be divided equally over {world_size} processes; "
                f"make batch_size a positive multiple of {world_size}"
            )
        self.manifest = manifest
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step
        self.stop_step = stop_step
        self.batch_seconds = batch_seconds
        self._counts = _draws_per_source(manifest)
        least = batch_size if batch_seconds is None else world_size
        if sum(self._counts) < least:
            raise DataError(
                f"{', '.join(manifest.source_names)}: {sum(self._counts)} clips do not fill one batch of {least}; "
                f"set batch_size to at most {sum(self._counts)} or add data"
            )
        self._weights = self._cumulative_weights(balance, tag_column, rare_clips) if balance != "none" else None
        self._durations: np.ndarray | None = None
        if bucket_by_length:
            self._durations = clip_durations(manifest)
            if max_seconds is not None:
                np.minimum(self._durations, max_seconds, out=self._durations)
        if batch_seconds is not None:
            self._check_budget(batch_seconds)
        self._cached_epoch = -1
        self._cached_plan = np.empty(0, np.int64), np.empty(0, np.int64)
        self._first_steps = [0]  # of the epochs from 0 on, as far as they were needed; with batch_seconds only
        self.batches_per_epoch = sum(self._counts) // batch_size if batch_seconds is None else len(self._plan(0)[1]) - 1

    def batch(self, step: int) -> tuple[int, list[int]]:
        """(epoch, rows of this rank) of a step; any step, in any order, but fastest within one epoch."""
        epoch, index = self._position(step)
        order, bounds = self._plan(epoch)
        begin, end = bounds[index : index + 2].tolist()
        local = (end - begin) // self.world_size
        begin += self.rank * local
        return epoch, order[begin : begin + local].tolist()

    def __iter__(self) -> Iterator[tuple[int, int, list[int]]]:
        step = self.start_step
        while self.stop_step is None or step < self.stop_step:
            yield step, *self.batch(step)
            step += 1

    def _position(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and which of its batches the step is."""
        if self.batch_seconds is None:
            return divmod(step, self.batches_per_epoch)
        first_steps = self._first_steps
        while first_steps[-1] <= step:
            first_steps.append(first_steps[-1] + len(self._plan(len(first_steps) - 1)[1]) - 1)
        epoch = bisect_right(first_steps, step) - 1
        return epoch, step - first_steps[epoch]

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """All rows of an epoch, batch after batch, int64 [rows], and where batches begin and end, int64 [batches+1]."""
        if epoch != self._cached_epoch:
            order = self._shuffled(epoch)
            if self.batch_seconds is not None:
                plan = self._budgeted(order, self.batch_seconds, epoch)
            else:
                bounds = np.arange(self.batches_per_epoch + 1) * self.batch_size
                order = order[: bounds[-1]]
                if self._durations is not None:
                    order = self._bucketed(order, self._durations, epoch)
                plan = order if self._weights is None else self._with_rare_rows(order, epoch), bounds
            self._cached_epoch, self._cached_plan = epoch, plan
        return self._cached_plan

    def _shuffled(self, epoch: int) -> np.ndarray:
        manifest, seed = self.manifest, self.seed
        if self._weights is not None:
            return np.searchsorted(self._weights, uniform(len(manifest), seed, epoch), side="right")
        if manifest.mix == "concat":
            return permutation(len(manifest), seed, epoch)
        first_rows = np.cumsum((0, *manifest.source_sizes))
        streams = []
        for source, (size, count) in enumerate(zip(manifest.source_sizes, self._counts, strict=True)):
            passes = [permutation(size, seed, epoch, source, n) for n in range(-(-count // size))]
            streams.append(np.concatenate(passes)[:count] + first_rows[source])
        if manifest.probabilities is None:
            return np.stack(streams, axis=1).reshape(-1)
        turns = np.repeat(np.arange(len(streams)), self._counts)[permutation(sum(self._counts), seed, epoch, -1)]
        order = np.empty(len(turns), np.int64)
        for source, stream in enumerate(streams):
            order[turns == source] = stream
        return order

    def _bucketed(self, order: np.ndarray, durations: np.ndarray, epoch: int) -> np.ndarray:
        window = self.batch_size * max(1, min(_MAX_BUCKET_WINDOW, self.batches_per_epoch // 4))
        parts = [order[begin : begin + window] for begin in range(0, len(order), window)]
        # The sort is stable, so clips of equal length keep their shuffled order.
        batches = np.concatenate([part[np.argsort(durations[part], kind="stable")] for part in parts])
        shuffled = permutation(self.batches_per_epoch, self.seed, epoch, -2)
        return batches.reshape(-1, self.batch_size)[shuffled].reshape(-1)

    def _cumulative_weights(self, balance: Balance, column: str | None, rare_clips: int) -> np.ndarray:
        """Cumulative weights of the rows, float64 [rows], up to 1; also notes the rows with rare tags."""
        if balance not in ("inverse", "sqrt", "log"):
            raise DataError(f"balance={balance!r}: it is 'none', 'inverse', 'sqrt' or 'log'")
        if column is None:
            raise DataError("balance needs a tag_column, such as intrinsic_tags (--data.tag-column)")
        if self.manifest.mix != "concat" or self.batch_seconds is not None:
            other = "batch_seconds" if self.batch_seconds is not None else f"mix={self.manifest.mix!r}"
            raise DataError(f"balance={balance!r} draws single rows by weight and cannot follow {other}; leave one out")
        weights, rare = balanced_weights(clip_tags(self.manifest, column), balance, _RARE_SHARE)
        self._is_rare, self._rare_rows = rare, np.flatnonzero(rare)
        self._rare_clips = min(rare_clips, len(self._rare_rows), self.batch_size)
        cumulative = np.cumsum(weights)
        cumulative /= cumulative[-1]
        return cumulative

    def _with_rare_rows(self, order: np.ndarray, epoch: int) -> np.ndarray:
        """Every batch has at least `rare_clips` rows with a rare tag."""
        batches = order.reshape(-1, self.batch_size).copy()
        rare = self._is_rare[batches]
        for index in np.flatnonzero(rare.sum(1) < self._rare_clips):
            lacking = self._rare_clips - int(rare[index].sum())
            places = np.flatnonzero(~rare[index])[:lacking]
            drawn: dict[int, None] = {}  # distinct rows; few of many, so that hardly any is drawn twice
            for attempt in itertools.count():
                if len(drawn) == lacking:
                    break
                drawn[draw(len(self._rare_rows), self.seed, epoch, -3, int(index), attempt)] = None
            batches[index, places] = self._rare_rows[list(drawn)]
        return batches.reshape(-1)

    def _check_budget(self, batch_seconds: float) -> None:
        if self._durations is None:
            raise DataError("batch_seconds needs bucket_by_length: unsorted batches would mostly be padding")
        row = int(self._durations.argmax())
        longest = float(self._durations[row])
        if not self.world_size * longest <= batch_seconds:
            raise DataError(
                f"{self.manifest[row].origin}: a clip of {longest:.2f} s for each of {self.world_size} processes is "
                f"more than batch_seconds={batch_seconds:g}; set it to at least "
                f"{math.ceil(self.world_size * longest)}, or crop clips shorter"
            )

    def _budgeted(self, order: np.ndarray, batch_seconds: float, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Batches within the budget, shuffled: their rows, and where they begin and end."""
        assert self._durations is not None
        multiple = self.world_size
        order = order[: len(order) // multiple * multiple]
        mean = max(float(self._durations[order].mean()), MIN_SECONDS)
        usual = max(multiple, min(self.batch_size, int(batch_seconds / mean)) // multiple * multiple)
        window = usual * max(1, min(_MAX_BUCKET_WINDOW, len(order) // usual // 4))
        batches: list[np.ndarray] = []
        left = order[:0]
        for begin in range(0, len(order), window):
            part = np.concatenate([left, order[begin : begin + window]])
            part = part[np.argsort(self._durations[part], kind="stable")]
            seconds = self._durations[part]
            first = 0
            while first < len(part):
                longest = seconds[first : first + self.batch_size]
                padded = np.arange(1, len(longest) + 1) * longest  # ascending, as both factors are
                count = int(np.searchsorted(padded, batch_seconds, side="right")) // multiple * multiple
                if first + count == len(part) and begin + window < len(order):
                    break
                batches.append(part[first : first + count])
                first += count
            left = part[first:]
        batches = [batches[index] for index in permutation(len(batches), self.seed, epoch, -2)]
        return np.concatenate(batches), np.cumsum([0, *map(len, batches)])


def _draws_per_source(manifest: Manifest) -> list[int]:
    """How many rows of each source make up an epoch."""
    sizes = manifest.source_sizes
    if manifest.mix == "concat":
        return list(sizes)
    if manifest.probabilities is None:
        return [max(sizes)] * len(sizes)
    total = np.ceil(max(size / share for size, share in zip(sizes, manifest.probabilities, strict=True)))
    return [max(size, round(share * total)) for size, share in zip(sizes, manifest.probabilities, strict=True)]
