"""The fused engines of the contrastive losses against the float64 definitions, on a GPU or in Triton's interpreter.

On a GPU every engine, dtype, option, shape and width meet each other, the exponentials stored and formed twice. In the
interpreter (`TRITON_INTERPRET=1`), a thousand times slower, choices are laid out so that every two of them meet
(`choices`). It knows float32 and float16 only, and its products are exact float32 whatever the precision asked for.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastclap.kernels.contrastive import torch_engine
from fastclap.kernels.contrastive.shared import Contrast
from fastclap.losses import info_nce, sigmoid_loss
from fastclap.testing import assert_close_rel
from tests.kernels.contrastive.cases import CONTRASTS, OPTIONS, SCALES, converted, embeddings, evaluate, ids, teacher

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1 (`make test` runs it)"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
ENGINES = ("triton",) if INTERPRETED else ("triton", "torch")  # the latter's tests on a CPU have a file of their own
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
# Tiles are 32×32 with halves of 16 and chunks of 64 rows in the interpreter: one row, one tile, several of both, odd.
# On a GPU tiles are 64 or 128 by 128 and chunks of 8448 rows, at D = 768 of 5632.
SHAPES = (
    ((1, 1), (2, 1), (16, 32), (33, 90), (127, 65))
    if INTERPRETED
    else ((1, 1), (2, 1), (16, 32), (127, 300), (1000, 1023), (9000, 700))
)
WIDTHS = (24, 7) if INTERPRETED else (64, 7, 768)
# Rounding of what is returned or stored: G and the gradients in the 16-bit types.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}


def tolerance(dtype: torch.dtype, engine: str = "triton", exact: float = TOLERANCE[torch.float32]) -> float:
    """The largest relative error of a gradient.

    In float32 ``exact`` is that of products in float32, such as the interpreter's and torch's. A GPU's matrix
    instructions form the three products of TF32 parts (tf32x3) and add them with fewer bits, which Triton begins anew
    every 32 columns of depth: emulated (`bench.float32_errors`), at most 1.3 times that error. It is admitted twice.
    """
    if dtype != torch.float32:
        return TOLERANCE[dtype]
    if INTERPRETED or engine == "torch":
        return exact
    return 2 * exact


class Choice(NamedTuple):
    """What one evaluation is made with, next to shape and option."""

    dtype: torch.dtype
    stored: bool
    scale: float
    alignment: float
    width: int


def storable(engine: str, dtype: torch.dtype, option: str) -> bool:
    """Whether the engine can keep the exponentials (torch: the logits) from the first pass to the second."""
    if engine == "torch":
        return option not in ("a_to_b", "b_to_a", "everything, one way")  # those have one pass
    return dtype != torch.float16 and not any(x in option for x in ("teacher", "everything", "guide"))


def is_small(shape: tuple[int, int]) -> bool:
    """Of one tile: quick in the interpreter."""
    return max(shape) <= 32


def choices(shape: tuple[int, int], option: str) -> list[Choice]:
    """In the interpreter: all scales and alignments at small shapes, one scale at others, the rest spread over them.

    Over the file every two of dtype, width, storing, scale, alignment, shape and option meet, and at small shapes the
    first five do within each shape and option; `test_every_two_choices_meet_in_the_interpreter` counts them.
    """
    scales = SCALES if is_small(shape) else SCALES[(len(option) + SHAPES.index(shape)) % 3 :][:1]
    turn = SHAPES.index(shape) + list(OPTIONS).index(option)
    found = []
    for scale, (a, alignment) in itertools.product(scales, enumerate((0.0, 0.9))):
        s = SCALES.index(scale)
        dtype, width = DTYPES[(a + s + turn) % 2], WIDTHS[(a + s // 2 + turn) % 2]
        stored = storable("triton", dtype, option) and (s + turn // 2) % 2 == 1
        found.append(Choice(dtype, stored, scale, alignment, width))
    return found


def cases() -> Iterator[Any]:
    """(engine, option, shape, choices) of the tests; those that launch the same kernels follow each other."""
    if INTERPRETED:
        for shape, option in itertools.product(SHAPES, OPTIONS):
            yield pytest.param("triton", option, shape, choices(shape, option), id=f"{shape[0]}x{shape[1]}-{option}")
        return
    for engine, dtype, option, stored in itertools.product(ENGINES, DTYPES, OPTIONS, (False, True)):
        if stored and not storable(engine, dtype, option):
            continue
        every = [Choice(dtype, stored, *rest) for rest in itertools.product(SCALES, (0.0, 0.9), WIDTHS)]
        for shape in SHAPES:
            kept = "-stored" if stored else ""
            yield pytest.param(
                engine, option, shape, every, id=f"{engine}-{str(dtype)[6:]}-{option}{kept}-{shape[0]}x{shape[1]}"
            )


def keep(monkeypatch: pytest.MonkeyPatch, stored: bool) -> dict[str, Any]:
    """The option under which both engines keep what they can from the first pass to the second, or nothing."""
    monkeypatch.setattr(torch_engine, "KEEP_BYTES", (1 << 30) * stored)
    monkeypatch.setattr(torch_engine, "GPU_CHUNK_BYTES", 1 << 20)  # several chunks
    return {"keep_exponentials": stored}


@pytest.fixture(autouse=True)
def highest_precision() -> None:
    assert torch.get_float32_matmul_precision() == "highest"


def on_device(options: dict[str, Any]) -> dict[str, Any]:
    return converted(options, None, DEVICE)


def run(
    loss: Callable[..., Tensor],
    inputs: list[Tensor],
    dtype: torch.dtype,
    options: dict[str, Any],
    engine: str = "triton",
    gain: float = 1.0,
) -> dict[str, Tensor]:
    """Value and all gradients of an engine, under an upstream gradient of 2.5, which comes to it as ``gain``.

    Scale and bias stay float32, as parameters do.
    """
    leaves = [(x.to(dtype) if x.dim() == 2 else x).to(DEVICE).clone().requires_grad_() for x in inputs]
    value = loss(*leaves, backend=engine, **on_device(options))
    (gain * value).backward()
    names = ("gradient of a", "gradient of b", "gradient of logit_scale", "gradient of logit_bias")
    gradients = {
        n: x.grad.double().cpu() * 2.5 / gain for n, x in zip(names, leaves, strict=False) if x.grad is not None
    }
    return {"loss": value.detach().double().cpu(), **gradients}


def check(
    loss: Callable[..., Tensor],
    inputs: list[Tensor],
    options: dict[str, Any],
    label: object,
    dtype: torch.dtype = torch.float32,
    tol: float | None = None,
    engine: str = "triton",
) -> dict[str, Tensor]:
    """Value and gradients against float64 ones, which a GPU computes as well where there is one."""
    rounded = [(x.to(dtype) if x.dim() == 2 else x).to(DEVICE) for x in inputs]
    options = converted(options, dtype)
    expected = evaluate(loss, rounded, torch.float64, "reference", on_device(options))
    # A power of two, which no dtype rounds, that takes float16 gradients out of their subnormals.
    largest = max(expected[f"gradient of {name}"].abs().max().item() for name in "ab") / 2.5
    gain = 2.0 ** min(math.floor(math.log2(64 / largest)), 60) if largest > 0 else 1.0
    out = run(loss, inputs, dtype, options, engine, gain)
    assert expected.keys() == out.keys()
    scale, rows = inputs[2].item(), max(len(x) for x in inputs[:2])
    limit = tol or tolerance(dtype, engine)
    if dtype == torch.bfloat16 and rows <= 90:  # roundings of an exponential, of G and of the gradient do not average
        limit = max(limit, 3 * 2.0**-9)
    for name, value in expected.items():
        reference = value.cpu()
        # Below this float64's own p - 1 has no digits left, or a loss near zero is a difference of float32 logits.
        if reference.norm() > (1e-4 if name == "loss" else 1e-9):
            if (out[name] - reference).norm() <= admitted(name, inputs, dtype, limit):
                continue
            # One number in which the errors of all pairs meet and their sizes cancel.
            exact = dtype == torch.float32 and INTERPRETED
            loose = 3 if name == "gradient of logit_scale" and not exact else 1
            assert_close_rel(f"{label}, {dtype}: {name}", reference, out[name], loose * limit)
        else:
            absolute = TOLERANCE[dtype] * max(1.0, scale / 14.3)  # gradients are proportional to the scale
            assert (out[name] - reference).abs().max() < absolute, f"{label}: {name}"
    return out


def admitted(name: str, inputs: list[Tensor], dtype: torch.dtype, limit: float) -> float:
    """An error that is no fault where a value is small because large terms cancel in it; else 0.

    A loss near zero is a difference of logits, each rounded to 2^-24 of it. Of two rows and a column, p less a smoothed
    target may be a twentieth of p, which was rounded. A scale's gradient is a sum of cosines, of random rows 1 / √D
    each, that cancel like random numbers.
    """
    a, b, scale = inputs[0], inputs[1], inputs[2].item()
    of_scale, few = name == "gradient of logit_scale", max(len(a), len(b)) <= 3
    if name == "loss":
        return 2.0**-22 * scale if few or not INTERPRETED else 0.0
    if few and dtype != torch.float32:
        norm = 1.0 if of_scale else min(x.norm(dim=1).min().item() for x in (a, b)) / scale
        return limit * 2.5 / norm
    if of_scale:
        return limit * 2.5 / (min(len(a), len(b)) * a.shape[1]) ** 0.5
    return 0.0


@pytest.mark.parametrize(("engine", "option", "shape", "chosen"), cases())
def test_info_nce_matches_float64(
    monkeypatch: pytest.MonkeyPatch, engine: str, option: str, shape: tuple[int, int], chosen: list[Choice]
) -> None:
    for dtype, stored, scale, alignment, width in chosen:
        kept = keep(monkeypatch, stored)
        inputs = [*embeddings(*shape, alignment, dim=width), torch.tensor(scale)]
        # A logit of 90 is itself rounded to 4e-6, and few rows average no error out.
        exact = 6e-5 if scale > 50 or max(shape) <= 3 else 2e-5
        tol = tolerance(dtype, engine, exact)
        options = {**OPTIONS[option](*shape), **kept}
        check(info_nce, inputs, options, (scale, alignment, width, stored), dtype, tol, engine)


@pytest.mark.parametrize("option", CONTRASTS)
def test_other_contrasts_match_float64(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    """On a GPU every dtype, shape and scale, exponentials kept and not; in the interpreter some of each."""
    turn = list(CONTRASTS).index(option)
    every = list(itertools.product(DTYPES, SHAPES, SCALES, (False, True)))
    chosen = [
        (dtype, shape, scale, kept)
        for dtype, shape, scale, kept in every
        if not kept or storable("triton", dtype, option)
    ]
    if INTERPRETED:
        kept = storable("triton", torch.float32, option)
        chosen = [
            (torch.float32, SHAPES[3], SCALES[turn % 3], kept and turn % 2 == 0),
            (DTYPES[turn % 2], SHAPES[turn % 3], SCALES[(turn + 1) % 3], kept and turn % 2 == 0),
        ]
    for dtype, shape, scale, kept in chosen:
        inputs = [*embeddings(*shape, 0.5), torch.tensor(scale)]
        tol = tolerance(dtype, exact=6e-5 if scale > 50 or max(shape) <= 3 else 3e-5)
        options = {**CONTRASTS[option](*shape), **keep(monkeypatch, kept)}
        check(info_nce, inputs, options, (shape, scale, kept), dtype, tol)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU all choices meet")
def test_every_two_choices_meet_in_the_interpreter() -> None:
    values = {"shape": SHAPES, "option": tuple(OPTIONS), "dtype": DTYPES, "stored": (False, True), "scale": SCALES}
    values |= {"alignment": (0.0, 0.9), "width": WIDTHS}
    made = [
        {"shape": shape, "option": option, **choice._asdict()}
        for shape, option in itertools.product(SHAPES, OPTIONS)
        for choice in choices(shape, option)
    ]
    for m, n in itertools.combinations(values, 2):
        met = {(case[m], case[n]) for case in made}
        for pair in itertools.product(values[m], values[n]):
            named = {"dtype": torch.float32, "option": "plain", "stored": False, m: pair[0], n: pair[1]}
            if not named["stored"] or storable("triton", named["dtype"], named["option"]):
                assert pair in met, named
    for shape, option in itertools.product(SHAPES, OPTIONS):
        if is_small(shape):
            own = [case for case in made if (case["shape"], case["option"]) == (shape, option)]
            for name in ("scale", "alignment", "width"):
                assert {(case["dtype"], case[name]) for case in own} == set(itertools.product(DTYPES, values[name]))


@pytest.mark.parametrize("stored", (False, True), ids=("exponentials formed twice", "exponentials stored"))
@pytest.mark.parametrize("option", ("plain", "ids", "label smoothing", "a_to_b"))
def test_both_forms_give_the_same(monkeypatch: pytest.MonkeyPatch, stored: bool, option: str) -> None:
    kept = keep(monkeypatch, stored)
    for dtype in DTYPES:
        inputs = [*embeddings(70, 53, 0.5), torch.tensor(14.3)]
        check(info_nce, inputs, {**OPTIONS[option](70, 53), **kept}, option, dtype)


@pytest.mark.parametrize("width", (512, 1024))
def test_float32_keeps_its_digits_in_wide_embeddings(width: int) -> None:
    """As far as a float32 product itself does: at scale 100 a logit of 90 is rounded to 4e-6."""
    for scale, exact in ((14.3, 5e-6), (100.0, 2e-5)):
        inputs = [*embeddings(60, 47, 0.9, dim=width), torch.tensor(scale)]
        tol = tolerance(torch.float32, exact=exact)
        check(info_nce, inputs, {}, (width, scale), tol=tol)


def test_without_normalisation_and_with_large_logits() -> None:
    for option, (scale, alignment) in itertools.product(("plain", "ids", "everything"), ((14.3, 0.9), (100.0, 0.0))):
        a, b = embeddings(40, 50, alignment)
        # Norms of about 5: logits up to 2,500 at scale 100, whose rounding alone is 1e-4 of the probabilities.
        options = {**OPTIONS[option](40, 50), "normalize": False}
        tol = tolerance(torch.float32, exact=3e-4)
        check(info_nce, [a, b, torch.tensor(scale)], options, (option, scale), tol=tol)


def test_fixed_maximum_is_dropped_where_it_would_lose_a_row() -> None:
    """Opposite cones at scale 100: relative to a maximum of 100 every exponential would vanish."""
    a, b = embeddings(40, 40, 0.0)
    a, b = a.abs(), -b.abs()
    for options in ({}, ids(40, 40, 13), teacher(40, 40)):
        check(
            info_nce,
            [a, b, torch.tensor(100.0)],
            options,
            "opposite",
            tol=tolerance(torch.float32, exact=6e-5),
        )
    check(info_nce, [a[:1], -a[:1], torch.tensor(100.0)], {"label_smoothing": 0.1}, "single opposite pair")


def test_gradient_keeps_its_digits_near_perfect_alignment() -> None:
    """1 - p is about 1e-5 here, so p - 1 rounded in float32 would be off by a percent."""
    a, b = embeddings(100, 100, 0.999, dim=64)
    tol = tolerance(torch.float32, exact=3e-5)
    check(info_nce, [a, b, torch.tensor(25.0)], {}, "aligned", tol=tol)
    # Equal rows may get logits that differ in their last bit, which at larger scales is all that is left of p - 1/2.
    twice = [torch.cat([a, a]), b, torch.tensor(10.0)]
    check(
        info_nce,
        twice,
        {"a_ids": torch.arange(100).repeat(2), "b_ids": torch.arange(100)},
        "two rows a column",
        tol=tol,
    )


SIGMOID_OPTIONS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "plain": lambda n, m: {},
    "ids": lambda n, m: ids(n, m, 20),
    "not normalised": lambda n, m: {"normalize": False},
}


def sigmoid_cases() -> Iterator[Any]:
    """(engine, shape, [(dtype, option, scale, width)])."""
    if INTERPRETED:
        for shape in SHAPES:
            scales = SCALES[:: 2 if max(shape) > 32 else 1]
            every = enumerate(itertools.product(scales, SIGMOID_OPTIONS))
            chosen = [(DTYPES[index % 2], option, scale, 24) for index, (scale, option) in every]
            yield pytest.param("triton", shape, chosen, id=f"{shape[0]}x{shape[1]}")
        return
    for engine, dtype, shape in itertools.product(ENGINES, DTYPES, SHAPES):
        every = itertools.product((dtype,), SIGMOID_OPTIONS, SCALES, WIDTHS)
        yield pytest.param(engine, shape, list(every), id=f"{engine}-{str(dtype)[6:]}-{shape[0]}x{shape[1]}")


@pytest.mark.parametrize(("engine", "shape", "chosen"), sigmoid_cases())
def test_sigmoid_loss_matches_float64(
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    shape: tuple[int, int],
    chosen: list[tuple[torch.dtype, str, float, int]],
) -> None:
    keep(monkeypatch, False)
    for dtype, option, scale, width in chosen:
        inputs = [*embeddings(*shape, 0.5, dim=width), torch.tensor(scale), torch.tensor([-10.0])]
        if option == "not normalised":
            inputs[:2] = [x / width**0.5 for x in inputs[:2]]
        tol = tolerance(dtype, engine, exact=6e-5)
        label = (option, scale, width)
        check(sigmoid_loss, inputs, SIGMOID_OPTIONS[option](*shape), label, dtype, tol, engine)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_partial_gradients_equal_the_full_ones(wanted: tuple[bool, ...]) -> None:
    inputs = [*embeddings(50, 70, 0.5), torch.tensor(14.3)]
    losses: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
        (info_nce, {"label_smoothing": 0.1}),
        (info_nce, {"direction": "b_to_a"}),
        (lambda a, b, s, **options: sigmoid_loss(a, b, s, -3.0, **options), {}),
    ]
    for loss, options in losses:
        expected = evaluate(loss, inputs, torch.float64, "reference", options)
        leaves = [x.to(DEVICE).clone().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        (2.5 * loss(*leaves, backend="triton", **options)).backward()
        for name, leaf, want in zip(("a", "b", "logit_scale"), leaves, wanted, strict=True):
            assert (leaf.grad is not None) == want
            if leaf.grad is not None:
                tol = tolerance(torch.float32)
                assert_close_rel(name, expected[f"gradient of {name}"], leaf.grad.double().cpu(), tol)


def test_no_gradient_no_teacher_and_teacher_without_gradient() -> None:
    a, b = (x.to(DEVICE) for x in embeddings(50, 70, 0.5))
    for options in ({}, teacher(50, 70), {"direction": "a_to_b"}):
        expected = info_nce(
            a.double(), b.double(), 9.0, backend="reference", **converted(options, torch.float64, DEVICE)
        )
        value = info_nce(a, b, 9.0, backend="triton", **on_device(options))
        assert not value.requires_grad
        assert_close_rel("loss", expected, value, 1e-5)


def poisoned_cases() -> Iterator[Any]:
    for dtype, option in itertools.product(DTYPES, ("plain", "ids", "everything", "guide", "queue, ids")):
        for stored in (False, True) if storable("triton", dtype, option) else (False,):
            yield pytest.param(dtype, option, stored, id=f"{str(dtype)[6:]}-{option}{'-stored' * stored}")


@pytest.mark.parametrize(("dtype", "option", "stored"), poisoned_cases())
def test_uninitialised_memory_is_never_read_and_runs_are_bit_identical(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, option: str, stored: bool
) -> None:
    options = {**{**CONTRASTS, **OPTIONS}[option](70, 53), **keep(monkeypatch, stored)}
    empty, new_empty = torch.empty, Tensor.new_empty

    def poisoned(x: Tensor) -> Tensor:
        return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).min)

    monkeypatch.setattr(torch, "empty", lambda *shape, **options: poisoned(empty(*shape, **options)))
    monkeypatch.setattr(
        torch, "empty_like", lambda x, **options: poisoned(empty(x.shape, dtype=x.dtype, device=x.device))
    )
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *shape, **options: poisoned(new_empty(self, *shape, **options))
    )
    inputs = [*embeddings(70, 53, 0.5), torch.tensor(14.3)]
    first, second = (run(info_nce, inputs, dtype, options) for _ in range(2))
    for name, value in first.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("absent", (None, 0, 1, 2, (0, 1)), ids=str)
@pytest.mark.parametrize("dtypes", ((torch.float32, torch.float32), (torch.float32, torch.float16)), ids=str)
def test_the_upstream_gradient_is_not_rounded(dtypes: tuple[torch.dtype, torch.dtype], absent: Any) -> None:
    from fastclap.kernels.contrastive.triton_engine import times_upstream

    given, wanted = dtypes
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator, dtype=given).to(DEVICE) for shape in ((70, 41), (53, 41))]
    gradients.append(torch.tensor(0.7, dtype=torch.float64, device=DEVICE))
    upstream = torch.tensor(1.0 / 3.0, device=DEVICE)
    missing = absent if isinstance(absent, tuple) else (absent,)
    passed = [None if index in missing else gradient for index, gradient in enumerate(gradients)]
    found = times_upstream(passed, upstream, (wanted, wanted, torch.float32))
    for index, (gradient, out) in enumerate(zip(gradients, found, strict=True)):
        if index in missing:
            assert out is None
        else:
            exact = gradient.double() * upstream.double()
            assert out is not None and out.dtype == (torch.float32 if index == 2 else wanted)
            assert torch.equal(out, (gradient.to(upstream.dtype) * upstream).to(out.dtype)), index
            assert (out.double() - exact).abs().max() <= 2.0**-11 * exact.abs().max()


def test_strided_and_mixed_inputs() -> None:
    leaves = [torch.randn(50, 48, device=DEVICE).requires_grad_(), torch.randn(24, 60, device=DEVICE).requires_grad_()]
    a, b = leaves[0][:, ::2], leaves[1].t()
    expected = evaluate(info_nce, [a.cpu(), b.cpu(), torch.tensor(14.3)], torch.float64, "reference", {})
    (2.5 * info_nce(a, b, 14.3, backend="triton")).backward()
    assert leaves[0].grad is not None and leaves[1].grad is not None
    tol = tolerance(torch.float32)
    assert_close_rel("strided a", expected["gradient of a"], leaves[0].grad[:, ::2].double().cpu(), tol)
    assert_close_rel("transposed b", expected["gradient of b"], leaves[1].grad.t().double().cpu(), tol)
    half = a.detach().half()
    mixed = info_nce(half, b.detach(), 14.3, backend="triton")
    assert_close_rel("mixed", info_nce(half.double(), b.detach().double(), 14.3), mixed, 2e-5)


def test_rows_of_zeros() -> None:
    a, b = embeddings(70, 70, 0.5)
    a[3] = 0
    inputs = [a, b, torch.tensor(14.3)]
    expected = evaluate(info_nce, inputs, torch.float64, "reference", {})
    out = run(info_nce, inputs, torch.float32, {})
    others = torch.arange(70) != 3
    assert_close_rel("loss", expected["loss"], out["loss"], 1e-5)
    tol = tolerance(torch.float32)
    assert_close_rel("zero row", expected["gradient of a"][3], out["gradient of a"][3], tol)
    assert_close_rel("the others", expected["gradient of a"][others], out["gradient of a"][others], tol)
    assert_close_rel("b", expected["gradient of b"], out["gradient of b"], tol)


def test_top1_equals_that_of_the_torch_engine() -> None:
    a, b = embeddings(50, 70, 0.4, dim=8)
    for options in ({}, ids(50, 70, 20), {"direction": "a_to_b"}, {"direction": "b_to_a"}):
        loss, top1 = info_nce(
            a.to(DEVICE), b.to(DEVICE), 14.3, backend="triton", return_top1=True, **on_device(options)
        )
        expected_loss, expected = info_nce(a, b, 14.3, backend="torch", return_top1=True, **options)
        assert_close_rel("loss", expected_loss, loss.cpu(), 1e-5)
        assert torch.allclose(expected, top1.cpu(), equal_nan=True)
        assert 0 < expected[0 if options.get("direction") != "b_to_a" else 1] < 1


def test_non_finite_embeddings_and_absent_positives_give_nan() -> None:
    a, b = (x.to(DEVICE) for x in embeddings(40, 40, 0.0))
    apart = {"a_ids": torch.arange(40), "b_ids": torch.arange(40) + 40}
    assert info_nce(a, b, 14.3, backend="triton", **apart).isnan()
    a[2, 3] = float("nan")
    assert info_nce(a, b, 14.3, backend="triton").isnan()
    assert info_nce(a, b, 14.3, backend="triton", normalize=False).isnan()
    assert sigmoid_loss(a, b, 14.3, -10.0, backend="triton").isnan()


@pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRETED else DTYPES, ids=str)
def test_operators_are_registered_properly(dtype: torch.dtype) -> None:
    a, b = (x.to(DEVICE, dtype) for x in embeddings(20, 30, 0.5))
    scale = torch.tensor(5.0, device=DEVICE)
    contrast = Contrast(label_smoothing=0.1).key
    for need in ([True, True, True], [False, True, False]):
        tensors = [x.detach().requires_grad_(wanted) for x, wanted in zip((a, b, scale), need, strict=True)]
        arguments = (*tensors, None, None, None, None, None, contrast, "", False, "triton", need, True)
        torch.library.opcheck(torch.ops.fastclap.info_nce, arguments)
        bias = torch.tensor(-1.0, device=DEVICE)
        torch.library.opcheck(
            torch.ops.fastclap.sigmoid_loss, (*tensors, bias, None, None, True, "", False, "triton", [*need, False])
        )


@pytest.mark.skipif(INTERPRETED, reason="is for GPUs")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_may_be_a_number_or_on_the_host(dtype: torch.dtype, engine: str) -> None:
    a, b = (x.to("cuda", dtype).requires_grad_() for x in embeddings(127, 300, 0.5, dim=64))
    found = []
    for scale in (torch.tensor(14.3, device="cuda", requires_grad=True), torch.tensor(14.3, requires_grad=True), 14.3):
        leaves = [a, b, *([scale] if isinstance(scale, Tensor) else [])]
        loss = info_nce(a, b, scale, label_smoothing=0.1, backend=engine)
        gradients = torch.autograd.grad(loss, leaves)
        assert [x.device for x in gradients] == [x.device for x in leaves]
        found.append([loss, *gradients])
    for other in found[1:]:
        for one, value in zip(found[0], other, strict=False):
            assert_close_rel("value or gradient", one, value, TOLERANCE[dtype])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has one precision")
@pytest.mark.parametrize("option", ("plain", "ids", "everything"))
@pytest.mark.parametrize("stored", (False, True), ids=("exponentials formed twice", "exponentials stored"))
def test_tf32_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch, stored: bool, option: str) -> None:
    """TF32 rounds embeddings, and in the products of the gradients G, to 2^-12 on average."""
    kept = keep(monkeypatch, stored)
    torch.set_float32_matmul_precision("high")
    try:
        inputs = [*embeddings(1000, 1023, 0.5, dim=768), torch.tensor(14.3)]
        check(info_nce, inputs, {**OPTIONS[option](1000, 1023), **kept}, option, tol=2e-3)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ("plain", "ids", "everything"))
@pytest.mark.parametrize("stored", (False, True), ids=("exponentials formed twice", "exponentials stored"))
def test_a_cuda_graph_replays_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch, stored: bool, option: str, dtype: torch.dtype
) -> None:
    if stored and not storable("triton", dtype, option):
        pytest.skip("this option stores no exponentials")
    kept = keep(monkeypatch, stored)
    a, b = (x.to("cuda", dtype).requires_grad_() for x in embeddings(1000, 1000, 0.5, dim=64))
    scale = torch.tensor(14.3, device="cuda", requires_grad=True)
    leaves, options = (a, b, scale), {**on_device(OPTIONS[option](1000, 1000)), **kept}

    def step() -> tuple[Tensor, ...]:
        loss = info_nce(*leaves, **options)
        return (loss, *torch.autograd.grad(loss, leaves))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [x.clone() for x in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        for eager, replayed in zip(expected, captured, strict=True):
            assert torch.equal(eager, replayed)


@pytest.mark.skipif(INTERPRETED, reason="is for GPUs")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("option", ("plain", "everything"))
def test_it_is_part_of_a_compiled_graph(option: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    options = on_device(OPTIONS[option](100, 130))

    def loss(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return 2 * info_nce(2 * a, b, scale.exp(), **options)

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [x.to("cuda", dtype).requires_grad_() for x in embeddings(100, 130, 0.5)]
        leaves.append(torch.tensor(2.66, device="cuda", requires_grad=True))
        value = function(*leaves)
        found.append((value, *torch.autograd.grad(value, leaves)))
    for one, other in zip(*found, strict=True):
        assert_close_rel("value or gradient", one, other, tolerance(dtype))


@pytest.mark.skipif(INTERPRETED, reason="is for GPUs")
def test_the_host_does_not_wait() -> None:
    a, b = (x.to("cuda").requires_grad_() for x in embeddings(300, 300, 0.5))
    scale, options = torch.tensor(14.3, device="cuda"), on_device(OPTIONS["everything"](300, 300))
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = info_nce(a, b, scale, return_top1=True, **options)
        loss.backward()
        sigmoid_loss(a, b, scale, torch.full((), -10.0, device="cuda")).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert a.grad is not None and a.grad.isfinite().all()


@pytest.mark.skipif(INTERPRETED, reason="autocast of the fused engine is for GPUs")
@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_rounds_embeddings_as_matmul_does(engine: str) -> None:
    a, b = (x.to("cuda") for x in embeddings(300, 300, 0.5, dim=64))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype=dtype):
            cast = info_nce(a, b, 14.3, backend=engine)
        assert torch.equal(cast, info_nce(a.to(dtype), b.to(dtype), 14.3, backend=engine))


@pytest.mark.skipif(INTERPRETED, reason="needs more memory than the interpreter has patience for")
@pytest.mark.parametrize("stored", (False, True), ids=("exponentials formed twice", "exponentials stored"))
def test_more_than_two_billion_logits(monkeypatch: pytest.MonkeyPatch, stored: bool) -> None:
    """Rows 0 and -1 of a batch whose exponentials number 2^31 and more, against a softmax of those rows."""
    kept = keep(monkeypatch, stored)
    n = 47_000
    generator = torch.Generator(device="cuda").manual_seed(0)
    a, b = (torch.randn(n, 64, device="cuda", generator=generator).bfloat16() for _ in range(2))
    x = a.clone().requires_grad_()
    info_nce(x, b, 14.3, direction="a_to_b", **kept).backward()
    assert x.grad is not None
    for rows in (slice(0, 2), slice(n - 2, n)):
        part = a[rows].double().requires_grad_()
        pairs = torch.arange(n, device="cuda")
        reference = info_nce(
            part, b.double(), 14.3, a_ids=pairs[rows], b_ids=pairs, direction="a_to_b", backend="reference"
        )
        (reference * 2 / n).backward()
        assert part.grad is not None
        assert_close_rel(f"rows {rows}", part.grad, x.grad[rows].double(), 4e-3)
