"""The order of the data is a pure function of (seed, step), whatever the world size and wherever a run resumes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclap.data import BatchSampler, Manifest, Row
from fastclap.data.hashing import draw, hash64, permutation
from fastclap.data.rows import Mix, clip_durations
from fastclap.errors import DataError


def manifest_of(
    *sizes: int, mix: Mix = "concat", probabilities: Sequence[float] | None = None, seed: int = 0
) -> Manifest:
    seconds = np.random.default_rng(seed).uniform(1, 20, sum(sizes))
    rows = (
        Row(f"{source}-{index}.wav", ("x",), (), {}, None, float(seconds[index]), None, f"m:{index}", source)
        for source, size in enumerate(sizes)
        for index in range(size)
    )
    return Manifest(rows, source_names=[f"m{i}" for i in range(len(sizes))], mix=mix, probabilities=probabilities)


def epoch_of(sampler: BatchSampler, epoch: int) -> list[list[int]]:
    first = epoch * sampler.batches_per_epoch
    batches = [sampler.batch(first + index) for index in range(sampler.batches_per_epoch)]
    assert all(number == epoch for number, _ in batches)
    return [rows for _, rows in batches]


@given(
    rows=st.integers(1, 300),
    batch=st.integers(1, 40),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 1000),
    bucket=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_row_once_but_for_the_remainder(
    rows: int, batch: int, seed: int, epoch: int, bucket: bool
) -> None:
    if rows < batch:
        return
    sampler = BatchSampler(manifest_of(rows), batch, seed=seed, bucket_by_length=bucket)
    seen = Counter(itertools.chain(*epoch_of(sampler, epoch)))
    assert sampler.batches_per_epoch == rows // batch
    assert set(seen.values()) == {1}
    assert len(seen) == rows // batch * batch
    assert set(seen) <= set(range(rows))


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    local=st.integers(1, 6),
    world_size=st.integers(1, 4),
    mix=st.sampled_from(["concat", "interleave"]),
    step=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_ranks_share_one_global_batch(sizes: list[int], local: int, world_size: int, mix: Mix, step: int) -> None:
    manifest, batch = manifest_of(*sizes, mix=mix), local * world_size
    if sum(sizes) < batch:
        return
    whole = BatchSampler(manifest, batch, seed=1).batch(step)
    parts = [
        BatchSampler(manifest, batch, seed=1, rank=r, world_size=world_size).batch(step) for r in range(world_size)
    ]
    assert all(epoch == whole[0] and len(rows) == local for epoch, rows in parts)
    assert list(itertools.chain(*(rows for _, rows in parts))) == whole[1]


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 20])
def test_resuming_at_any_step_gives_the_same_batches(start: int) -> None:
    manifest = manifest_of(40, 25, mix="interleave")
    uninterrupted = list(BatchSampler(manifest, 11, seed=3, stop_step=21))
    assert [step for step, _, _ in uninterrupted] == list(range(21))
    assert list(BatchSampler(manifest, 11, seed=3, start_step=start, stop_step=21)) == uninterrupted[start:]


def test_iteration_has_no_end_of_its_own() -> None:
    sampler = BatchSampler(manifest_of(10), 4, seed=0, start_step=5)
    items = list(itertools.islice(sampler, 100))
    assert items[-1][:2] == (104, 52)


def test_seed_and_epoch_change_the_order() -> None:
    manifest = manifest_of(200)
    orders = {
        tuple(itertools.chain(*epoch_of(BatchSampler(manifest, 10, seed=seed), epoch)))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_other_rows_are_left_out_in_each_epoch() -> None:
    sampler = BatchSampler(manifest_of(100), 30, seed=0)
    seen = Counter(row for epoch in range(40) for batch in epoch_of(sampler, epoch) for row in batch)
    assert len(seen) == 100
    assert min(seen.values()) > 25  # 36 expected of 40


def test_buckets_reduce_padding_and_still_mix() -> None:
    manifest = manifest_of(2000)
    durations = manifest.durations.numpy()

    def padding(bucket: bool) -> float:
        batches = epoch_of(BatchSampler(manifest, 20, seed=0, bucket_by_length=bucket), 0)
        return 1 - durations.sum() / sum(20 * durations[batch].max() for batch in batches)

    assert padding(True) < 0.1 * padding(False)
    sampler = BatchSampler(manifest, 20, seed=0)
    companions = [next(set(batch) for batch in epoch_of(sampler, epoch) if 7 in batch) for epoch in range(5)]
    assert len(set.union(*companions)) > 48  # of at most 96, at least 20
    lengths = np.array([[durations[batch].mean() for batch in epoch_of(sampler, epoch)] for epoch in range(3)])
    correlation = np.corrcoef(
        [*lengths, np.arange(lengths.shape[1])]
    )  # lengths are in no order, and in a new one each time
    assert np.abs(correlation - np.eye(4)).max() < 0.35


def test_clips_beyond_the_crop_are_equally_long() -> None:
    manifest = manifest_of(400)
    cropped = BatchSampler(manifest, 20, seed=0, max_seconds=0.5)
    unsorted = BatchSampler(manifest, 20, seed=0, bucket_by_length=False)
    assert {frozenset(batch) for batch in epoch_of(cropped, 0)} == {frozenset(batch) for batch in epoch_of(unsorted, 0)}


def test_interleave_alternates_until_all_are_exhausted() -> None:
    manifest = manifest_of(30, 7, 12, mix="interleave")
    sampler = BatchSampler(manifest, 9, seed=0, bucket_by_length=False)
    assert sampler.batches_per_epoch == 10
    rows = list(itertools.chain(*epoch_of(sampler, 2)))
    sources = [manifest[row].source for row in rows]
    assert sources == [0, 1, 2] * 30
    counts = Counter(rows)
    assert [counts[row] for row in range(30)] == [1] * 30
    assert {counts[row] for row in range(30, 37)} == {4, 5}  # 30 draws from 7 rows
    assert {counts[row] for row in range(37, 49)} == {2, 3}
    second = rows[1::3]
    assert sorted(second[:7]) == sorted(second[7:14]) == list(range(30, 37))
    assert second[:7] != second[7:14]


def test_interleave_with_probabilities() -> None:
    manifest = manifest_of(300, 50, mix="interleave", probabilities=[0.75, 0.25])
    sampler = BatchSampler(manifest, 10, seed=0, bucket_by_length=False)
    assert sampler.batches_per_epoch == 40  # 300 / 0.75 draws
    rows = list(itertools.chain(*epoch_of(sampler, 0)))
    counts = Counter(rows)
    assert all(counts[row] == 1 for row in range(300))
    assert all(counts[row] == 2 for row in range(300, 350))
    sources = np.array([manifest[row].source for row in rows])
    assert 0.15 < sources[:200].mean() < 0.35
    assert len(set(map(tuple, sources.reshape(40, 10)))) > 10  # drawn, not in turns


def test_scarce_source_decides_the_length_of_an_epoch() -> None:
    manifest = manifest_of(10, 100, mix="interleave", probabilities=[0.9, 0.1])
    sampler = BatchSampler(manifest, 10, seed=0)
    counts = Counter(itertools.chain(*epoch_of(sampler, 0)))
    assert sampler.batches_per_epoch == 100
    assert all(counts[row] == 90 for row in range(10))
    assert all(counts[row] == 1 for row in range(10, 110))


def test_fewer_clips_than_a_batch() -> None:
    with pytest.raises(
        DataError, match="m0: 5 clips do not fill one batch of 8; set batch_size to at most 5 or add data"
    ):
        BatchSampler(manifest_of(5), 8, seed=0)


@pytest.mark.parametrize(("batch", "world_size"), [(10, 4), (0, 1), (-4, 2)])
def test_batch_that_the_ranks_cannot_share(batch: int, world_size: int) -> None:
    with pytest.raises(DataError, match=f"a batch of {batch} cannot be divided equally over {world_size} processes"):
        BatchSampler(manifest_of(100), batch, seed=0, world_size=world_size)


@given(
    sizes=st.lists(st.integers(1, 120), min_size=1, max_size=3),
    world_size=st.integers(1, 4),
    local=st.integers(1, 12),
    seconds=st.floats(20, 300),
    mix=st.sampled_from(["concat", "interleave"]),
    epoch=st.integers(0, 6),
)
@settings(max_examples=60, deadline=None)
def test_budgeted_batches(sizes: list[int], world_size: int, local: int, seconds: float, mix: Mix, epoch: int) -> None:
    manifest, most = manifest_of(*sizes, mix=mix), local * world_size
    durations = np.minimum(manifest.durations.numpy(), 18)
    budget = max(seconds, world_size * float(durations.max()))
    if sum(sizes) < world_size:
        return
    ranks = [
        BatchSampler(manifest, most, seed=4, max_seconds=18, batch_seconds=budget, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    draws = sum(sizes) if mix == "concat" else len(sizes) * max(sizes)
    first = next(step for step in itertools.count() if ranks[0].batch(step)[0] == epoch)
    seen: Counter[int] = Counter()
    for step in itertools.count(first):
        parts = [sampler.batch(step) for sampler in ranks]
        if parts[0][0] != epoch:
            assert {number for number, _ in parts} == {epoch + 1}
            break
        assert {(number, len(rows)) for number, rows in parts} == {(epoch, len(parts[0][1]))}
        batch = [row for _, rows in parts for row in rows]
        assert 0 < len(batch) <= most
        assert len(batch) * durations[batch].max() <= budget
        seen.update(batch)
    assert seen.total() == draws // world_size * world_size
    if mix == "concat":
        assert set(seen.values()) == {1}
    else:
        assert max(seen.values()) <= -(-draws // min(sizes))


def test_budgeted_batches_are_nearly_full_and_mix() -> None:
    manifest = manifest_of(3000)
    durations = manifest.durations.numpy()
    sampler = BatchSampler(manifest, 64, seed=0, batch_seconds=200)
    batches = [rows for _, _, rows in itertools.islice(sampler, sampler.batches_per_epoch)]
    padded = np.array([len(batch) * durations[batch].max() for batch in batches])
    assert np.median(padded) > 0.93 * 200
    assert durations.sum() / padded.sum() > 0.95
    assert len({len(batch) for batch in batches}) > 20
    companions = []
    for step, epoch, rows in sampler:
        if 7 in rows:
            companions.append(set(rows))
        if epoch == 4:
            break
        assert step < 4000
    assert len(set.union(*companions)) > 0.8 * sum(map(len, companions))


def test_budgeted_batches_resume_at_any_step() -> None:
    manifest = manifest_of(40, 25, mix="interleave")
    options = {"seed": 3, "batch_seconds": 90.0, "world_size": 2, "rank": 1}
    uninterrupted = list(BatchSampler(manifest, 12, stop_step=60, **options))  # type: ignore[arg-type]
    assert uninterrupted[-1][1] >= 3
    for start in (0, 1, 17, 18, 19, 20, 40, 59):
        resumed = BatchSampler(manifest, 12, start_step=start, stop_step=60, **options)  # type: ignore[arg-type]
        assert list(resumed) == uninterrupted[start:]
    backwards = BatchSampler(manifest, 12, **options)  # type: ignore[arg-type]
    assert [(step, *backwards.batch(step)) for step in reversed(range(60))] == uninterrupted[::-1]


def test_no_clips_are_always_left_out_of_budgeted_batches() -> None:
    sampler = BatchSampler(manifest_of(103), 16, seed=0, batch_seconds=120, world_size=4, rank=3)
    seen: Counter[int] = Counter()
    for rank in range(4):
        sampler = BatchSampler(manifest_of(103), 16, seed=0, batch_seconds=120, world_size=4, rank=rank)
        for _, epoch, rows in sampler:
            if epoch == 12:
                break
            seen.update(rows)
    assert seen.total() == 12 * 100
    assert len(seen) == 103
    assert min(seen.values()) >= 9


def test_budget_that_cannot_be_kept() -> None:
    manifest = manifest_of(20)
    row = int(manifest.durations.argmax())
    longest = float(manifest.durations[row])
    with pytest.raises(DataError, match=rf"m:{row}: a clip of {longest:.2f} s for each of 2 processes is more than "):
        BatchSampler(manifest, 4, seed=0, batch_seconds=30, world_size=2)
    assert BatchSampler(manifest, 4, seed=0, batch_seconds=30, world_size=2, max_seconds=15).batch(0)[0] == 0
    with pytest.raises(DataError, match="batch_seconds needs bucket_by_length"):
        BatchSampler(manifest, 4, seed=0, batch_seconds=30, bucket_by_length=False)
    with pytest.raises(DataError, match="1 clips do not fill one batch of 2"):
        BatchSampler(manifest_of(1), 4, seed=0, batch_seconds=99, world_size=2)


def test_unknown_durations_are_read_from_the_files(make_set: Callable[..., str], tmp_path: object) -> None:
    from fastclap.data import load_manifest

    given = load_manifest(make_set(12, name="given"))
    probed = load_manifest(make_set(12, name="probed", duration=False))
    assert np.isnan(probed.durations).all()
    np.testing.assert_allclose(clip_durations(probed), given.durations)
    assert [rows for _, _, rows in BatchSampler(probed, 4, seed=0, stop_step=9)] == [
        rows for _, _, rows in BatchSampler(given, 4, seed=0, stop_step=9)
    ]


def test_unreadable_file_has_no_duration_but_is_no_error() -> None:
    manifest = Manifest([Row("/nowhere.wav", ("x",), (), {}, None, None, None, "m:1", 0)])
    assert clip_durations(manifest).tolist() == [0.0]


def test_rows_out_of_source_order_are_refused() -> None:
    rows = [Row("a", ("x",), (), {}, None, None, None, f"m:{i}", source) for i, source in enumerate((0, 1, 0))]
    with pytest.raises(ValueError, match="m:2: rows must come in the order of their sources"):
        Manifest(rows, source_names=["m", "n"])


def test_scalar_and_vector_hash_agree() -> None:
    hashes = [hash64(3, -1, index) for index in range(500)]
    assert permutation(500, 3, -1).tolist() == sorted(range(500), key=hashes.__getitem__)


def test_hash_is_the_published_one() -> None:
    assert hash64(0) == 0xE220A8397B1DCDAF  # first output of SplitMix64 with seed 0
    assert hash64(1) != hash64(0, 1) != hash64(1, 0)


def test_draws_are_uniform() -> None:
    counts = np.bincount([draw(7, 5, index) for index in range(14_000)], minlength=7)
    assert len(counts) == 7
    assert np.abs(counts - 2000).max() < 200  # 4.8 standard deviations


def tagged(tags: Sequence[Sequence[str]], mix: Mix = "concat") -> Manifest:
    rows = (
        Row(f"{index}.wav", ("x",), (), {"style": tuple(own)} if own else {}, None, 1.0 + index % 7, None, "m:1", 0)
        for index, own in enumerate(tags)
    )
    return Manifest(rows, source_names=["m"], mix=mix)


# 400 clips: "calm" is common, "loud" less so, "husky" and "lisp" are rare (below 5 %), every tenth clip has no tag
TAGS = [
    ()
    if i % 10 == 9
    else ("Calm", *(["loud "] if i % 4 == 0 else []), *(["husky"] if i < 12 else []))
    if i not in (50, 150, 250)
    else ("lisp",)
    for i in range(400)
]


def simulated_weights(weighting: str) -> np.ndarray:
    """The published definition, written out."""
    clean = [sorted({tag.strip().lower() for tag in own}) for own in TAGS]
    frequency = Counter(itertools.chain(*clean))
    weight = {}
    for tag, n in frequency.items():
        weight[tag] = {"inverse": 1 / n, "sqrt": 1 / np.sqrt(n), "log": 1 / np.log(n + 1)}[weighting]
    total = sum(weight.values())
    weight = {tag: value / total * len(weight) for tag, value in weight.items()}
    least = min(weight.values())
    of_clips = np.array([np.mean([weight[tag] for tag in own]) if own else least for own in clean])
    return of_clips / of_clips.sum()


@pytest.mark.parametrize("weighting", ["inverse", "sqrt", "log"])
@pytest.mark.parametrize("bucket", [True, False])
def test_balanced_draws_follow_the_definition(weighting: Any, bucket: bool) -> None:
    """Observed counts of all clips against multinomial draws with the definition's weights: a chi-square test."""
    sampler = BatchSampler(
        tagged(TAGS), 20, seed=3, balance=weighting, tag_column="style", rare_clips=0, bucket_by_length=bucket
    )
    expected = simulated_weights(weighting)
    epochs = 400
    drawn = np.concatenate([np.ravel(epoch_of(sampler, epoch)) for epoch in range(epochs)])
    assert len(drawn) == 400 * epochs
    counts = np.bincount(drawn, minlength=400)
    simulated = np.random.default_rng(0).multinomial(len(drawn), expected)
    statistics = [
        float((((c - len(drawn) * expected) ** 2) / (len(drawn) * expected)).sum()) for c in (counts, simulated)
    ]
    assert all(abs(value - 399) < 5 * np.sqrt(2 * 399) for value in statistics), statistics


def test_balanced_batches_have_rare_tags() -> None:
    sampler = BatchSampler(tagged(TAGS), 8, seed=1, balance="log", tag_column="style", rare_clips=2)
    without = BatchSampler(tagged(TAGS), 8, seed=1, balance="log", tag_column="style", rare_clips=0)
    rare = {i for i, own in enumerate(TAGS) if {"husky", "lisp"} & set(own)}
    filled = 0
    for batch, plain in zip(epoch_of(sampler, 0), epoch_of(without, 0), strict=True):
        had = [row in rare for row in plain]
        assert sum(row in rare for row in batch) == max(2, sum(had))
        replaced = [i for i, (new, old) in enumerate(zip(batch, plain, strict=True)) if new != old]
        first = [i for i, is_rare in enumerate(had) if not is_rare][: max(0, 2 - sum(had))]
        assert replaced == first and len({batch[i] for i in replaced}) == len(replaced)
        filled += bool(replaced)
    assert filled > 10


@pytest.mark.parametrize("bucket", [True, False])
def test_balanced_batches_do_not_depend_on_ranks_or_order(bucket: bool) -> None:
    def sampler(rank: int = 0, size: int = 1) -> BatchSampler:
        return BatchSampler(
            tagged(TAGS), 12, seed=5, balance="inverse", tag_column="style", rank=rank, world_size=size,
            bucket_by_length=bucket,
        )  # fmt: skip

    alone = sampler()
    steps = [70, 3, 40, 0]
    whole = {step: alone.batch(step) for step in steps}
    for size in (2, 3, 4):
        ranks = [sampler(rank, size) for rank in range(size)]
        for step in reversed(steps):
            assert [row for one in ranks for row in one.batch(step)[1]] == whole[step][1]
    assert whole[0][1] != whole[3][1]
    assert BatchSampler(tagged(TAGS), 12, seed=6, balance="inverse", tag_column="style").batch(0) != whole[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": "inverse"}, "tag_column"),
        ({"balance": "cubic", "tag_column": "style"}, "cubic"),
        (
            {"balance": "log", "tag_column": "mood"},
            r"mood: no row of m has a tag in it; the columns of tags are: style$",
        ),
        ({"balance": "log", "tag_column": "style", "batch_seconds": 60.0}, "batch_seconds"),
    ],
)
def test_balancing_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        BatchSampler(tagged(TAGS), 4, seed=0, **options)
    if "mood" not in options.values():
        return
    with pytest.raises(DataError, match="interleave"):
        BatchSampler(tagged(TAGS, "interleave"), 4, seed=0, balance="log", tag_column="style")
