"""Arguments at random, most of them odd: a loss or a feature is right, or refused by a message of this package."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclap.features import LogMel, SpecAugment
from fastclap.kernels.contrastive.shared import QueueRows
from fastclap.kernels.log_mel.torch_engine import log_mel_reference
from fastclap.losses import EmbeddingQueue, info_nce, local_loss, sigmoid_loss, tag_loss

ROWS, WIDTH = 5, 4
HUGE = 10**400

# Of each argument what it may be, and what it may not; `draw` takes mostly of the first.
SCALARS = ([1.0, 14.3, 0.0, -5.0, 3, torch.tensor(2.0), torch.tensor([[[2.0]]]), torch.tensor(2.0).double()],
           [math.nan, math.inf, 1e40, HUGE, True, None, "3", 1j, torch.tensor(3), torch.ones(2), torch.tensor(1j),
            torch.tensor(math.nan), torch.tensor(math.inf), torch.tensor(2.0, device="meta")])  # fmt: skip
SHARES = ([0.0, 0.1, 0.5], [1.0, 2, -0.1, math.nan, math.inf, True, None, "x", torch.tensor(0.1), 1j])
FLAGS = ([True, False], [])
WIDTHS = ([[1], [2, 4], {1: 0.5, 3: 2.0}], [[2, 2], [0], [5], "ab", [1.5], {1: -1}, {"a": 1, 2: 3}])


def matrix(r: random.Random, rows: int = ROWS, width: int = WIDTH) -> Any:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(r.randrange(1 << 30)))
    good = [x, x * 1e3, x.double(), x.bfloat16(), x.t().contiguous().t(), x.repeat(1, 2)[:, ::2], x.requires_grad_()]
    nought = x.detach().clone()
    nought[r.randrange(rows)] = r.choice([0.0, math.nan, math.inf])
    bad = [nought, None, 3, x.tolist(), x[0], x[None], x[:0], x[:, :0], x[:, :2], x[:2], x.to("meta"), x.to_sparse(),
           x.detach().long(), x.detach() > 0, x.to(torch.complex64)]  # fmt: skip
    return draw(r, (good, bad))


def ids(r: random.Random, rows: int = ROWS) -> Any:
    x = torch.tensor([r.randrange(3) for _ in range(rows)])
    good = [x, x.int(), x.to(torch.uint8), x - 3, x + (1 << 62), torch.arange(rows)]
    return draw(r, (good, [None, x.float(), x > 0, x[:, None], x[:1], x.tolist(), x.to("meta"), x + 99]))


def draw(r: random.Random, pool: tuple[list[Any], list[Any]]) -> Any:
    good, bad = pool
    return r.choice(bad) if bad and r.random() < 0.08 else r.choice(good)


def queue(r: random.Random) -> Any:
    rows = QueueRows(matrix(r, 3), matrix(r, 2), *r.choice([(), (ids(r, 3), ids(r, 2))]))
    return draw(r, ([rows, EmbeddingQueue(2, WIDTH)], [3, tuple(rows)]))


def contrast(r: random.Random) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    options = {
        "a_ids": lambda: ids(r),
        "teacher": lambda: draw(r, ([(matrix(r), matrix(r), draw(r, SCALARS))], [3, (1, 2)])),
        "teacher_weight": lambda: draw(r, SHARES),
        "label_smoothing": lambda: draw(r, SHARES),
        "debias": lambda: draw(r, SHARES),
        "guide_margin": lambda: draw(r, ([0.1, -0.2], SHARES[1])),
        "guide_relative": lambda: draw(r, ([True, False], [3])),
        "normalize": lambda: draw(r, FLAGS),
        "direction": lambda: draw(r, (["a_to_b", "b_to_a"], ["x", None])),
        "queue": lambda: queue(r),
        "matryoshka": lambda: draw(r, WIDTHS),
        "backend": lambda: draw(r, (["torch", "reference"], ["triton", "cuda", None])),
        "check_finite": lambda: True,
        "process_group": lambda: "world",
    }  # fmt: skip
    chosen = {name: options[name]() for name in r.sample(list(options), r.choice([0, 1, 1, 2])) if r.random() < 0.9}
    if "a_ids" in chosen:
        chosen["b_ids"] = ids(r)
    return info_nce, [matrix(r), matrix(r), draw(r, SCALARS)], chosen


def siglip(r: random.Random) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    chosen = r.choice([{}, {"a_ids": ids(r), "b_ids": ids(r)}, {"normalize": draw(r, FLAGS)}, {"backend": "auto"}])
    return sigmoid_loss, [matrix(r), matrix(r), draw(r, SCALARS), draw(r, SCALARS)], chosen


def tagged(r: random.Random) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    x = torch.arange(ROWS * 3).view(ROWS, 3) % r.choice([1, 2, 4]) > 0
    targets = draw(r, ([x, ~x], [None, x.float(), x.long(), x.t(), x[0], x.tolist()]))
    return tag_loss, [matrix(r), matrix(r, 3), targets], {"scale": draw(r, SCALARS)}


def local(r: random.Random) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    x = torch.arange(ROWS) % r.choice([1, 2]) > 0
    where = draw(r, ([None, x, ~x], [x.float(), x[:1], x[:, None], x.tolist(), 3]))
    return local_loss, [matrix(r), matrix(r), matrix(r), draw(r, SCALARS)], {"where": where}


def in_double(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().double() if x.is_floating_point() else x
    if isinstance(x, QueueRows):
        return QueueRows(*map(in_double, x))
    return tuple(map(in_double, x)) if isinstance(x, tuple) else x


def raised_here(error: Exception) -> bool:
    """Whether a line of this package says what is wrong, and not one of torch that stumbles over it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return any(f"/{part}/" in last.filename for part in ("fastclap", "kernels")) and str(last.line).startswith("raise")


def refused(call: Callable[[], Any], what: str) -> bool:
    try:
        call()
    except (TypeError, ValueError) as error:
        assert raised_here(error), f"{what}: {error!r}"
        return True
    except Exception as error:
        pytest.fail(f"{what}: {error!r}")
    return False


@pytest.mark.parametrize("make", [contrast, siglip, tagged, local])
def test_losses_of_odd_arguments(make: Callable[[random.Random], Any]) -> None:
    outcomes: collections.Counter[bool] = collections.Counter()
    for seed in range(100):
        loss, arguments, options = make(random.Random(seed))
        what = f"seed {seed}: {loss.__name__}({arguments}, {options})"
        outcome = refused(lambda: loss(*arguments, **options), what)  # noqa: B023 (called at once)
        outcomes[outcome] += 1
        if outcome:
            continue
        if loss in (info_nce, sigmoid_loss):
            found, options = loss(*arguments, **options), {**options, "backend": "reference", "check_finite": False}
        else:
            found = loss(*arguments, **options)
        expected = loss(*map(in_double, arguments), **{name: in_double(value) for name, value in options.items()})
        if expected.isfinite():
            assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4), what
        else:
            assert not found.isfinite(), what
    assert min(outcomes.values()) > 15 and len(outcomes) == 2, outcomes


INTEGERS = [0, -1, 1.5, True, None, "400", HUGE, 1 << 31, 10**9, math.nan, torch.tensor(3)]
FLOATS = [math.nan, math.inf, 1e308, HUGE, True, None, "x", 1j, -1e-320]
FIELDS: dict[str, tuple[list[Any], list[Any]]] = {
    "n_fft": ([512, 1024], INTEGERS),
    "win_length": ([400, 64], INTEGERS),
    "hop_length": ([160, 50], INTEGERS),
    "n_mels": ([10, 40], INTEGERS),
    "sampling_rate": ([16000, 22050], [-1, *INTEGERS]),
    "framing": (["center", "snip_edges", "no_snip_edges"], ["x", None, 3]),
    "window": (["hann", "povey"], ["x", None]),
    "input_scale": ([1.0, 32768], [0, 1e-320, *FLOATS]),
    "floor": ([1e-10], [0, 1e-60, *FLOATS]),
    "f_min": ([0, 20.0], [1e9, *FLOATS]),
    "preemphasis": ([0.97], FLOATS),
    "dynamic_range": ([None, 8.0], [-1.0, math.nan, HUGE]),
    "mean": ([0.0, -4], [[1.0, 2.0], (math.nan,), *FLOATS]),
    "std": ([1.0, 4], [0, [1.0], *FLOATS]),
    "dtype": (["float32"], ["float64", torch.float32, None]),
    "num_frames": ([None, 30], [0, 1.5, HUGE, 10**9]),
}


def clips(r: random.Random) -> Any:
    x = 0.1 * torch.randn(2, 3000, generator=torch.Generator().manual_seed(r.randrange(1 << 30)))
    good = [x, x.double(), (x * 8192).short(), x.requires_grad_(), x * 0, x.detach().t().contiguous().t()]
    broken = x.detach().clone()
    broken[1, 2900] = math.nan
    bad = [broken, None, 3, x.tolist(), x[0], x[None], x[:0], x[:, :0], x.detach().long(), x.to(torch.complex64)]
    return draw(r, (good, [*bad, x.detach() > 0, x.to("meta"), x.to_sparse(), x.detach().numpy()]))


def lengths(r: random.Random) -> Any:
    good = [None, torch.tensor([3000, 2000]), torch.tensor([900, 1500], dtype=torch.int16), [3000, 700]]
    bad = [3000, torch.tensor(3000), torch.tensor([3001, 5]), torch.tensor([-1, 5]), torch.tensor([2.0, 5.0]), "x",
           ["a", "b"], [None, 3], [1 << 70, 1], torch.tensor([[5], [5]]), torch.tensor([1, 2, 3]), [True, False],
           torch.tensor([5, 5], device="meta"), torch.tensor([1j, 1]), torch.tensor([math.nan, 1])]  # fmt: skip
    return draw(r, (good, bad))


def test_features_of_odd_arguments() -> None:
    outcomes: collections.Counter[bool] = collections.Counter()
    for seed in range(150):
        r = random.Random(seed)
        options = {name: draw(r, FIELDS[name]) for name in r.sample(list(FIELDS), 3)}
        preset = draw(r, (["kaldi", "whisper", "clap", "torchaudio"], ["x", None]))
        waveform, length = clips(r), lengths(r)
        offset = r.choice([None, None, None, lengths(r)])
        augment = r.choice([None, None, {"time_masks": 2}])
        what = f"seed {seed}: {preset} {options} {waveform} {length} {offset} {augment}"

        def features() -> tuple[LogMel, Tensor, Tensor]:
            spec_augment = None if augment is None else SpecAugment(**augment)  # noqa: B023
            log_mel = LogMel(preset, spec_augment=spec_augment, **options)  # noqa: B023
            return log_mel, *log_mel(waveform, length, offset)  # noqa: B023

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of filters without a bin
            outcome = refused(features, what)
            outcomes[outcome] += 1
            if outcome:
                continue
            log_mel, found, counts = features()
        if augment is not None:
            continue
        spec = dataclasses.replace(log_mel.spec, dither=0.0)
        for clip in range(2):
            first = 0 if offset is None else int(offset[clip])
            last = 3000 if length is None else first + int(length[clip])
            whole = waveform[clip : clip + 1, first:last]
            if last == first:
                assert counts[clip] == 0, what
                continue
            expected, count = log_mel_reference(whole.double() if whole.is_floating_point() else whole, None, spec)
            assert counts[clip] == count[0], what
            # In the units of energy: the logarithm of a difference of large numbers has no more digits than they have.
            energy, right = (
                torch.exp((x.double().detach() * spec.std + spec.mean) / spec.log_scale)
                for x in (found[clip, : int(count)], expected[0, : int(count)])
            )
            if right.isfinite().all():
                assert (energy - right).abs().max() <= 1e-3 * max(float(right.max()), spec.floor), what
            else:
                assert torch.equal(energy.isfinite(), right.isfinite()), what
    assert min(outcomes.values()) > 30 and len(outcomes) == 2, outcomes


@pytest.mark.parametrize(
    "options",
    [{"time_masks": 1.5}, {"mel_masks": -1}, {"time_masks": 10**9}, {"time_width": None}, {"time_width": math.nan},
     {"time_width": True}, {"mel_width": HUGE}],
)  # fmt: skip
def test_odd_masks_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SpecAugment(**options)


@pytest.mark.parametrize("lengths", [3, [3], torch.tensor([2.5]), torch.tensor([1j])])
def test_frames_of_odd_lengths_are_refused(lengths: Any) -> None:
    with pytest.raises(TypeError, match="lengths must be a tensor of integers"):
        LogMel("kaldi").frame_lengths(lengths)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 4), "size=0"), ((4, 2.0), r"dim=2\.0"), ((True, 4), "size=True"), ((10**15, 4), "fit into memory"),
     ((HUGE, 4), "fit into memory"), ((4, 4, torch.int64), "torch.int64"), ((4, 4, "float32"), "dtype='float32'")],
)  # fmt: skip
def test_odd_queues_are_refused(arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        EmbeddingQueue(*arguments)
