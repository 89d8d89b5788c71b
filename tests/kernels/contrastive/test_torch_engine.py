"""The chunked contrastive engine against the float64 definitions: values and all gradients, for every option."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastclap.kernels.contrastive import torch_engine
from fastclap.losses import info_nce, sigmoid_loss
from fastclap.testing import assert_close_rel
from tests.kernels.contrastive.cases import (
    CONTRASTS,
    OPTIONS,
    SCALES,
    converted,
    embeddings,
    evaluate,
    ids,
    queue,
    teacher,
)

SHAPES = ((1, 1), (2, 3), (3, 1), (127, 127), (127, 300), (1000, 1023), (1023, 127), (2000, 1000))


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 rows, some of them kept and the others formed twice, at sizes that are quick to check."""
    monkeypatch.setattr(torch_engine, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(torch_engine, "KEEP_BYTES", 300_000)


def check(
    loss: Callable[..., Tensor],
    inputs: list[Tensor],
    options: dict[str, Any],
    label: object,
    tol: float = 1e-5,
    dtype: torch.dtype = torch.float32,
) -> None:
    expected = evaluate(loss, [x.to(dtype) for x in inputs], torch.float64, "reference", options)
    out = evaluate(loss, inputs, dtype, "torch", options)
    assert expected.keys() == out.keys()
    for name, reference in expected.items():
        # float64's own p - 1 keeps no digits below this: the loss has converged.
        if reference.norm() > 1e-10:
            assert_close_rel(f"{label}: {name}", reference, out[name], tol)
        else:
            assert out[name].abs().max() < 1e-5, f"{label}: {name}"


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_info_nce_matches_float64(shape: tuple[int, int], option: str) -> None:
    scales = (
        SCALES if shape[0] * shape[1] < 200_000 else SCALES[len(option) % 3 :][:1]
    )  # one scale at the largest sizes
    for scale, alignment in itertools.product(scales, (0.0, 0.9)):
        inputs = [*embeddings(*shape, alignment), torch.tensor(scale)]
        # A logit of 90 is itself rounded to 4e-6, and three rows average no error out.
        tol = 3e-5 if (scale > 50 and alignment) or max(shape) <= 3 else 1e-5
        check(info_nce, inputs, OPTIONS[option](*shape), (scale, alignment), tol)


@pytest.mark.parametrize("option", ("plain", "ids", "everything"))
def test_info_nce_without_normalisation_and_with_large_logits(option: str) -> None:
    shape = (150, 203)
    for scale, alignment in itertools.product(SCALES, (0.0, 0.9)):
        a, b = embeddings(*shape, alignment)
        # Norms of about 5: logits up to 2,500 at scale 100, whose rounding alone is 1e-4 of the probabilities.
        options = {**OPTIONS[option](*shape), "normalize": False}
        check(info_nce, [a, b, torch.tensor(scale)], options, (scale, alignment), tol=3e-4 if scale > 50 else 3e-5)


@pytest.mark.parametrize("option", CONTRASTS)
@pytest.mark.parametrize("shape", ((2, 3), (3, 1), (127, 300), (401, 130)), ids=str)
def test_other_contrasts_match_float64(shape: tuple[int, int], option: str) -> None:
    options = CONTRASTS[option](*shape)
    for scale, alignment in itertools.product(SCALES, (0.0, 0.9)):
        inputs = [*embeddings(*shape, alignment), torch.tensor(scale)]
        tol = 3e-5 if (scale > 50 and alignment) or max(shape) <= 3 or "matryoshka" in options else 1e-5
        check(info_nce, inputs, options, (scale, alignment), tol)
        check_in_float64(inputs, options, (scale, alignment))


def check_in_float64(inputs: list[Tensor], options: dict[str, Any], label: object) -> None:
    """As closely as float64 knows a loss that has converged: logits of 100 are rounded to 1e-14."""
    expected = evaluate(info_nce, inputs, torch.float64, "reference", options)
    for name, value in evaluate(info_nce, inputs, torch.float64, "torch", options).items():
        assert (value - expected[name]).norm() < 1e-10 * expected[name].norm() + 2e-13, f"{label}: {name}"


@pytest.mark.parametrize("option", [name for name in CONTRASTS if "debias" not in CONTRASTS[name](9, 9)])
def test_other_contrasts_without_normalisation_and_with_large_logits(option: str) -> None:
    shape = (150, 203)
    options = {**CONTRASTS[option](*shape), "normalize": False}
    for scale, alignment in itertools.product(SCALES, (0.0, 0.9)):
        inputs = [*embeddings(*shape, alignment), torch.tensor(scale)]
        check(info_nce, inputs, options, (scale, alignment), tol=3e-4 if scale > 50 else 3e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(2, 80),
    m=st.integers(2, 80),
    scale=st.sampled_from((*SCALES, -7.0)),
    direction=st.sampled_from(("both", "a_to_b", "b_to_a")),
    groups=st.sampled_from((0, 2, 30)),
    smoothing=st.sampled_from((0.0, 0.15)),
    with_teacher=st.booleans(),
    debias=st.sampled_from((0.0, 0.003, 0.2)),
    entries=st.sampled_from(((0, 0), (1, 70), (33, 0), (90, 5))),
    matryoshka=st.sampled_from(((), (1,), (24, 5), {9: 0.2, 10: 3.0})),
)
def test_contrasts_in_any_combination(
    n: int,
    m: int,
    scale: float,
    direction: str,
    groups: int,
    smoothing: float,
    with_teacher: bool,
    debias: float,
    entries: tuple[int, int],
    matryoshka: Any,
) -> None:
    options: dict[str, Any] = {
        "direction": direction,
        "label_smoothing": smoothing,
        "debias": debias,
        "matryoshka": matryoshka,
        **queue(*entries, groups),
        **(ids(n, m, groups) if groups else {}),
        **(teacher(n, m) if with_teacher else {}),
    }
    check_in_float64([*embeddings(n, m, 0.5), torch.tensor(scale)], options, "combination")


def test_debiased_gradient_keeps_its_digits_near_perfect_alignment() -> None:
    """So rare a positive among the negatives that their lower bound does not hold: 1 - p is about 1e-5."""
    a, b = embeddings(200, 200, 0.999, dim=64)
    for options in ({"debias": 1e-12}, {"debias": 1e-12, **queue(50, 40, dim=64)}):
        inputs = [a, b, torch.tensor(25.0)]
        check(info_nce, inputs, options, "aligned")
        naive = evaluate(info_nce, inputs, torch.float32, "reference", options)
        expected = evaluate(info_nce, inputs, torch.float64, "reference", options)
        error = (naive["gradient of a"] - expected["gradient of a"]).norm() / expected["gradient of a"].norm()
        assert error > 1e-4


def test_a_queue_that_outweighs_the_batch() -> None:
    """The largest logit of every row is that of an entry, 200 above its positive: maxima come from the queue."""
    a, b = embeddings(70, 70, 0.0)
    a, b = a.abs(), -b.abs()
    entries = queue(66, 130)["queue"]
    options = {"queue": entries._replace(a=-entries.a.abs(), b=entries.b.abs())}
    for scale in (25.0, 100.0):
        check(info_nce, [a, b, torch.tensor(scale)], options, scale, tol=3e-5)
        check_in_float64([a, b, torch.tensor(scale)], options, scale)


def test_a_queue_of_much_longer_rows() -> None:
    """Without normalisation an entry's logit of 200 overflows float32's exponential; the batch's are below 3."""
    a, b = (x / 10 for x in embeddings(70, 90, 0.5))
    entries = queue(30, 40)["queue"]
    options = {"queue": entries._replace(a=30 * entries.a, b=30 * entries.b), "normalize": False}
    check(info_nce, [a, b, torch.tensor(5.0)], options, "long rows", tol=3e-5)


def test_a_guide_that_leaves_the_best_logits_out() -> None:
    """What is left out is 200 above the rest, which would underflow beside it."""
    a, b = embeddings(70, 70, 0.0)
    a, b = a.abs(), -b.abs()
    b[1::2] = a[::2]  # row 2i is closest to column 2i + 1, for the guide too
    a_t = torch.eye(70)
    b_t = 0.5 * torch.eye(70) + torch.eye(70).roll(1, 0)  # to row i column i + 1 is closer than column i
    options = {"teacher": (a_t, b_t, torch.tensor(1.0)), "guide_margin": 0.01}
    for direction in ("both", "a_to_b"):
        inputs = [a, b, torch.tensor(100.0)]
        check(info_nce, inputs, {**options, "direction": direction}, direction, tol=3e-5)
        check_in_float64(inputs, {**options, "direction": direction}, direction)


def test_gradient_keeps_its_digits_near_perfect_alignment() -> None:
    """1 - p is about 1e-5 here, so p - 1 rounded in float32 would be off by a percent."""
    a, b = embeddings(200, 200, 0.999, dim=64)
    inputs = [a, b, torch.tensor(25.0)]
    check(info_nce, inputs, {}, "aligned")
    twice = [torch.cat([a, a]), b, torch.tensor(25.0)]
    check(info_nce, twice, {"a_ids": torch.arange(200).repeat(2), "b_ids": torch.arange(200)}, "two rows a column")
    expected = evaluate(info_nce, inputs, torch.float64, "reference", {})
    naive = evaluate(info_nce, inputs, torch.float32, "reference", {})
    error = (naive["gradient of a"] - expected["gradient of a"]).norm() / expected["gradient of a"].norm()
    assert error > 1e-4


def test_opposite_vectors_at_scale_100() -> None:
    """The best logit of a row is -100: sums relative to a fixed maximum of 100 would underflow."""
    a, b = embeddings(40, 40, 0.0)
    a, b = a.abs(), -b.abs()
    check(info_nce, [a, b, torch.tensor(100.0)], {}, "opposite")
    check(info_nce, [a[:1], -a[:1], torch.tensor(100.0)], {"label_smoothing": 0.1}, "single opposite pair")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 90),
    m=st.integers(1, 90),
    scale=st.sampled_from(SCALES),
    alignment=st.sampled_from((0.0, 0.5, 0.95)),
    direction=st.sampled_from(("both", "a_to_b", "b_to_a")),
    smoothing=st.sampled_from((0.0, 0.15)),
    groups=st.sampled_from((0, 1, 5, 60)),
    with_teacher=st.booleans(),
    normalize=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_info_nce_in_any_combination(
    n: int,
    m: int,
    scale: float,
    alignment: float,
    direction: str,
    smoothing: float,
    groups: int,
    with_teacher: bool,
    normalize: bool,
    dtype: torch.dtype,
) -> None:
    a, b = embeddings(n, m, alignment)
    options: dict[str, Any] = {"direction": direction, "label_smoothing": smoothing, "normalize": normalize}
    if not normalize:
        a, b = a / 5, b / 5
    if groups:
        options.update(ids(n, m, groups))
    if with_teacher:
        options.update(teacher(n, m))
    # Logits near 100 are rounded to 1e-5, and a small batch does not average it out.
    tol = 1e-8 if dtype == torch.float64 else 1e-5 if scale < 50 else 5e-5
    check(info_nce, [a, b, torch.tensor(scale)], options, "combination", tol, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sigmoid_loss_matches_float64(shape: tuple[int, int]) -> None:
    scales = SCALES if shape[0] * shape[1] < 200_000 else SCALES[1:2]
    for scale, alignment, options in itertools.product(scales, (0.0, 0.9), ({}, ids(*shape, 20), {"normalize": False})):
        inputs = [*embeddings(*shape, alignment), torch.tensor(scale), torch.tensor([-10.0])]
        if "normalize" in options:
            inputs[:2] = [x / 5 for x in inputs[:2]]
        check(sigmoid_loss, inputs, options, (scale, alignment), tol=3e-5)


def test_sigmoid_loss_without_any_positive() -> None:
    inputs = [*embeddings(30, 40, 0.0), torch.tensor(10.0), torch.tensor(-10.0)]
    check(sigmoid_loss, inputs, {"a_ids": torch.zeros(30).long(), "b_ids": torch.ones(40).long()}, "negatives only")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype, scale: float) -> None:
    """The only error beyond float32's is the rounding of the returned gradients, 2^-9 for bfloat16."""
    tol = 2e-3
    for alignment in (0.0, 0.7):
        a, b = embeddings(300, 411, alignment)
        expected_inputs = [a.to(dtype), b.to(dtype), torch.tensor(scale)]
        expected = evaluate(info_nce, expected_inputs, torch.float64, "reference", {})
        leaves = [x.detach().requires_grad_() for x in expected_inputs]
        value = info_nce(*leaves)
        (2.5 * value).backward()
        assert value.dtype == torch.float32
        assert_close_rel("loss", expected["loss"], value, 1e-5)
        for name, leaf in zip(("a", "b", "logit_scale"), leaves, strict=True):
            assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
            if leaf.dtype == dtype == torch.float16:
                continue  # 1/N² entries are float16 subnormals; see the loss-scaling test
            assert_close_rel(f"gradient of {name}", expected[f"gradient of {name}"], leaf.grad, tol)


def test_float16_gradients_survive_loss_scaling() -> None:
    """The upstream gradient is applied before the cast to float16."""
    a, b = (x.half().requires_grad_() for x in embeddings(300, 300, 0.5))
    expected = evaluate(info_nce, [a, b, torch.tensor(14.3)], torch.float64, "reference", {})
    (2.5 * 4096 * info_nce(a, b, 14.3)).backward()
    assert a.grad is not None
    assert_close_rel("scaled gradient of a", expected["gradient of a"] * 4096, a.grad, 5e-4)


def test_mixed_dtypes_and_strided_inputs() -> None:
    leaves = [torch.randn(100, 64, requires_grad=True), torch.randn(32, 120, requires_grad=True)]
    a, b = leaves[0][:, ::2], leaves[1].t()
    expected = evaluate(info_nce, [a, b, torch.tensor(14.3)], torch.float64, "reference", {})
    (2.5 * info_nce(a, b, 14.3)).backward()
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert_close_rel("strided a", expected["gradient of a"], leaves[0].grad[:, ::2], 1e-5)
    assert_close_rel("transposed b", expected["gradient of b"], leaves[1].grad.t(), 1e-5)
    mixed = info_nce(a.detach().bfloat16().float(), b.detach().bfloat16(), 14.3)
    assert_close_rel("mixed", info_nce(a.bfloat16().double(), b.bfloat16().double(), 14.3), mixed, 1e-5)


def test_autocast_does_not_lower_the_precision() -> None:
    inputs = [*embeddings(100, 100, 0.5), torch.tensor(14.3)]
    plain = evaluate(info_nce, inputs, torch.float32, "torch", {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = evaluate(info_nce, inputs, torch.float32, "torch", {})
    for name, value in plain.items():
        assert torch.equal(value, cast[name]), name


def test_zero_rows_give_finite_values() -> None:
    a, b = embeddings(70, 70, 0.5)
    a[3] = 0
    inputs = [a, b, torch.tensor(14.3)]
    expected = evaluate(info_nce, inputs, torch.float64, "reference", {})
    out = evaluate(info_nce, inputs, torch.float32, "torch", {})
    assert_close_rel("loss", expected["loss"], out["loss"], 1e-5)
    assert_close_rel("gradient of a zero row", expected["gradient of a"][3], out["gradient of a"][3], 1e-5)
    others = torch.arange(70) != 3
    assert_close_rel("gradient of the others", expected["gradient of a"][others], out["gradient of a"][others], 1e-5)


def test_nothing_uninitialised_is_read_and_runs_are_bit_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *shape: self.new_full(shape, float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, float("nan")))
    for scale, options in itertools.product(
        (14.3, 100.0),
        (OPTIONS["everything"](150, 203), *(CONTRASTS[x](150, 203) for x in ("guide, ids", "everything"))),
    ):
        inputs = [*embeddings(150, 203, 0.5), torch.tensor(scale)]
        first, second = (evaluate(info_nce, inputs, torch.float32, "torch", options) for _ in range(2))
        for name, value in first.items():
            assert value.isfinite().all(), name
            assert torch.equal(value, second[name]), name


class LargestTensor(TorchDispatchMode):
    """Records the largest result of any operation."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("option", ("plain", "ids", "everything", "guide, ids", "debias", "long queue", "matryoshka"))
def test_no_tensor_is_larger_than_a_chunk(option: str) -> None:
    n, m, dim = 1000, 900, 24
    inputs = [x.requires_grad_() for x in (*embeddings(n, m, 0.0, dim), torch.tensor(14.3))]
    cases = {**CONTRASTS, **OPTIONS, "long queue": lambda n, m: {**queue(1100, 1300, 300), **ids(n, m, 300)}}
    options = cases[option](n, m)
    with LargestTensor() as largest:
        info_nce(*inputs, **options).backward()
    assert largest.numel == torch_engine.MIN_CHUNK_ROWS * (1300 if option == "long queue" else m)


class Multiplications(TorchDispatchMode):
    """Counts the multiplications of all matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.count += left.numel() * right.shape[1]
        return func(*args, **(kwargs or {}))


def products(call: Callable[[], Tensor], backward: bool = True) -> float:
    """Matrix products of a call, in units of one N×M×D product."""
    with Multiplications() as counter:
        value = call()
        if backward:
            value.backward()
    return counter.count / (200 * 300 * 24)


def test_work_done_is_that_which_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = embeddings(200, 300, 0.0)
    ag, bg, scale = a.clone().requires_grad_(), b.clone().requires_grad_(), torch.tensor(14.3, requires_grad=True)
    monkeypatch.setattr(torch_engine, "KEEP_BYTES", 0)
    assert products(lambda: info_nce(ag, bg, scale)) == 4
    monkeypatch.setattr(torch_engine, "KEEP_BYTES", 1 << 30)
    assert products(lambda: info_nce(ag, bg, scale)) == 3
    assert products(lambda: info_nce(ag, b, scale)) == 2  # locked tower: one side only
    assert products(lambda: info_nce(a, bg, scale)) == 2
    assert products(lambda: info_nce(a, b, scale)) == 2
    assert products(lambda: info_nce(ag, bg, scale, direction="a_to_b")) == 3
    assert products(lambda: sigmoid_loss(ag, bg, scale, -10.0)) == 3
    # An entry's logits are formed twice and multiplied once: it wants no gradient.
    assert products(lambda: info_nce(ag, bg, scale, **queue(100, 30))) == pytest.approx(3 + 3 * (0.5 + 0.1))
    assert products(lambda: info_nce(ag, b, scale, direction="a_to_b", **queue(100, 30))) == pytest.approx(2 + 3 * 0.1)
    assert products(lambda: info_nce(a, b, 14.3, **queue(100, 30)), backward=False) == pytest.approx(1.6)
    assert products(lambda: info_nce(ag, bg, scale, matryoshka=(6, 12))) == pytest.approx(3 * (0.25 + 0.5))
    assert products(lambda: info_nce(a, b, 14.3), backward=False) == 1
    with torch.no_grad():
        assert products(lambda: info_nce(ag, bg, scale), backward=False) == 1
        assert products(lambda: sigmoid_loss(ag, bg, scale, -10.0), backward=False) == 1


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_partial_gradients_equal_the_full_ones(wanted: tuple[bool, ...]) -> None:
    inputs = [*embeddings(100, 130, 0.5), torch.tensor(14.3)]
    everything = [CONTRASTS[x](100, 130) for x in ("everything", "everything, prefixes, one way", "matryoshka, guide")]
    for options in ({"label_smoothing": 0.1}, {"direction": "b_to_a"}, *everything):
        expected = evaluate(info_nce, inputs, torch.float64, "reference", options)
        leaves = [x.clone().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        (2.5 * info_nce(*leaves, **options)).backward()
        for name, leaf, want in zip(("a", "b", "logit_scale"), leaves, wanted, strict=True):
            assert (leaf.grad is not None) == want
            if leaf.grad is not None:
                assert_close_rel(name, expected[f"gradient of {name}"], leaf.grad, 1e-5)


def test_backward_twice_and_double_backward() -> None:
    a, b = embeddings(10, 10, 0.0)
    a.requires_grad_()
    value = info_nce(a, b, 14.3)
    (first,) = torch.autograd.grad(value, a, retain_graph=True)
    (second,) = torch.autograd.grad(value, a, retain_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(value, a, create_graph=True)
    (third,) = torch.autograd.grad(info_nce(a, b, 14.3, backend="reference"), a, create_graph=True)
    assert third.requires_grad


def test_non_finite_embeddings_give_a_non_finite_loss() -> None:
    a, b = embeddings(10, 10, 0.0)
    a[2, 3] = float("nan")
    assert info_nce(a, b, 14.3).isnan()
    assert info_nce(a, b, 14.3, normalize=False).isnan()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("option", ("queue, ids", "matryoshka", "everything"))
def test_other_contrasts_of_half_precision_inputs(option: str, dtype: torch.dtype) -> None:
    """Prefixes' gradients are added up in float32 and rounded once: 2^-9 for bfloat16."""
    options = converted(CONTRASTS[option](120, 90), dtype)
    inputs = [*(x.to(dtype) for x in embeddings(120, 90, 0.5)), torch.tensor(14.3)]
    expected = evaluate(info_nce, inputs, torch.float64, "reference", options)
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = info_nce(*leaves, **options)
    (2.5 * 256 * value).backward()
    assert value.dtype == torch.float32
    assert_close_rel("loss", expected["loss"], value, 1e-5)
    for name, leaf in zip(("a", "b", "logit_scale"), leaves, strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        assert_close_rel(f"gradient of {name}", expected[f"gradient of {name}"] * 256, leaf.grad, 2e-3)
