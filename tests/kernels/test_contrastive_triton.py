"""The Triton engine against the float64 definitions: on a GPU, or in Triton's interpreter (`TRITON_INTERPRET=1`).

The interpreter knows float32 and float16 only, and its products are exact float32 whatever the precision asked for.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclap.losses import info_nce, sigmoid_loss
from fastclap.testing import assert_close_rel
from tests.kernels.contrastive_cases import OPTIONS, SCALES, embeddings, evaluate, ids, teacher

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1 (`make test` runs it)"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
# Tiles are 32×32 with halves of 16 and chunks of 64 rows in the interpreter: one row, one tile, several of both, odd.
SHAPES = (
    ((1, 1), (2, 1), (16, 32), (33, 90), (127, 65)) if INTERPRETED else ((1, 1), (127, 300), (1000, 1023), (9000, 700))
)
WIDTHS = (24, 7) if INTERPRETED else (64, 7, 768)
# Rounding of what is returned or stored: G and the gradients in the 16-bit types.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def highest_precision() -> None:
    assert torch.get_float32_matmul_precision() == "highest"


def on_device(options: dict[str, Any]) -> dict[str, Any]:
    moved = {}
    for name, value in options.items():
        if isinstance(value, tuple):
            moved[name] = tuple(x.to(DEVICE) for x in value)
        else:
            moved[name] = value.to(DEVICE) if isinstance(value, Tensor) else value
    return moved


def run(
    loss: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Value and all gradients of the Triton engine; scale and bias stay float32, as parameters do."""
    leaves = [(x.to(dtype) if x.dim() == 2 else x).to(DEVICE).clone().requires_grad_() for x in inputs]
    value = loss(*leaves, backend="triton", **on_device(options))
    gain = 2.5 * inputs[0].shape[0]  # keeps float16 gradients out of their subnormals
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
) -> dict[str, Tensor]:
    rounded = [x.to(dtype) if x.dim() == 2 else x for x in inputs]
    if "teacher" in options:
        options = {**options, "teacher": tuple(x.to(dtype) for x in options["teacher"])}
    expected = evaluate(loss, rounded, torch.float64, "reference", options)
    out = run(loss, inputs, dtype, options)
    assert expected.keys() == out.keys()
    for name, reference in expected.items():
        # Below this float64's own p - 1 has no digits left, or a loss near zero is a difference of float32 logits.
        if reference.norm() > (1e-4 if name == "loss" else 1e-9):
            # One number in which the errors of all pairs meet and their sizes cancel.
            loose = 3 if name == "gradient of logit_scale" and dtype != torch.float32 else 1
            assert_close_rel(f"{label}, {dtype}: {name}", reference, out[name], loose * (tol or TOLERANCE[dtype]))
        else:
            absolute = TOLERANCE[dtype] * max(1.0, inputs[2].item() / 14.3)  # gradients are proportional to the scale
            assert (out[name] - reference).abs().max() < absolute, f"{label}: {name}"
    return out


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_info_nce_matches_float64(shape: tuple[int, int], option: str) -> None:
    scales = SCALES if max(shape) <= 90 else SCALES[len(option) % 3 :][:1]
    for index, (scale, alignment) in enumerate(itertools.product(scales, (0.0, 0.9))):
        inputs = [*embeddings(*shape, alignment, dim=WIDTHS[index % len(WIDTHS)]), torch.tensor(scale)]
        dtype = DTYPES[index % len(DTYPES)]
        # A logit of 90 is itself rounded to 4e-6, and few rows average no error out.
        tol = 6e-5 if dtype == torch.float32 and (scale > 50 or max(shape) <= 3) else None
        check(info_nce, inputs, OPTIONS[option](*shape), (scale, alignment), dtype, tol)


@pytest.mark.parametrize("stored", (False, True), ids=("exponentials formed twice", "exponentials stored"))
@pytest.mark.parametrize("option", ("plain", "ids", "label smoothing", "a_to_b"))
def test_both_forms_give_the_same(monkeypatch: pytest.MonkeyPatch, stored: bool, option: str) -> None:
    from fastclap.kernels import contrastive_triton

    monkeypatch.setattr(contrastive_triton, "stores_exponentials", lambda *_: stored)
    for dtype in DTYPES:
        inputs = [*embeddings(70, 53, 0.5), torch.tensor(14.3)]
        check(info_nce, inputs, OPTIONS[option](70, 53), option, dtype)


def test_without_normalisation_and_with_large_logits() -> None:
    for option, (scale, alignment) in itertools.product(("plain", "ids", "everything"), ((14.3, 0.9), (100.0, 0.0))):
        a, b = embeddings(50, 70, alignment)
        # Norms of about 5: logits up to 2,500 at scale 100, whose rounding alone is 1e-4 of the probabilities.
        options = {**OPTIONS[option](50, 70), "normalize": False}
        check(info_nce, [a, b, torch.tensor(scale)], options, (option, scale), tol=3e-4)


def test_fixed_maximum_is_dropped_where_it_would_lose_a_row() -> None:
    """Opposite cones at scale 100: relative to a maximum of 100 every exponential would vanish."""
    a, b = embeddings(40, 40, 0.0)
    a, b = a.abs(), -b.abs()
    for options in ({}, ids(40, 40, 13), teacher(40, 40)):
        check(info_nce, [a, b, torch.tensor(100.0)], options, "opposite", tol=6e-5)
    check(info_nce, [a[:1], -a[:1], torch.tensor(100.0)], {"label_smoothing": 0.1}, "single opposite pair")


def test_gradient_keeps_its_digits_near_perfect_alignment() -> None:
    """1 - p is about 1e-5 here, so p - 1 rounded in float32 would be off by a percent."""
    a, b = embeddings(100, 100, 0.999, dim=64)
    check(info_nce, [a, b, torch.tensor(25.0)], {}, "aligned", tol=3e-5)
    # Equal rows may get logits that differ in their last bit, which at larger scales is all that is left of p - 1/2.
    twice = [torch.cat([a, a]), b, torch.tensor(10.0)]
    check(
        info_nce,
        twice,
        {"a_ids": torch.arange(100).repeat(2), "b_ids": torch.arange(100)},
        "two rows a column",
        tol=3e-5,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sigmoid_loss_matches_float64(shape: tuple[int, int]) -> None:
    cases = itertools.product(SCALES[:: 2 if max(shape) > 90 else 1], ({}, ids(*shape, 20), {"normalize": False}))
    for index, (scale, options) in enumerate(cases):
        inputs = [*embeddings(*shape, 0.5), torch.tensor(scale), torch.tensor([-10.0])]
        if "normalize" in options:
            inputs[:2] = [x / 5 for x in inputs[:2]]
        dtype = DTYPES[index % len(DTYPES)]
        check(sigmoid_loss, inputs, options, scale, dtype, 6e-5 if dtype == torch.float32 else None)


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
                assert_close_rel(name, expected[f"gradient of {name}"], leaf.grad.double().cpu(), 2e-5)


def test_no_gradient_no_teacher_and_teacher_without_gradient() -> None:
    a, b = (x.to(DEVICE) for x in embeddings(50, 70, 0.5))
    for options in ({}, teacher(50, 70), {"direction": "a_to_b"}):
        expected = info_nce(a.double(), b.double(), 9.0, backend="reference", **_double(on_device(options)))
        value = info_nce(a, b, 9.0, backend="triton", **on_device(options))
        assert not value.requires_grad
        assert_close_rel("loss", expected, value, 1e-5)


def _double(options: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(x.double() for x in v) if isinstance(v, tuple) else v for k, v in options.items()}


def test_uninitialised_memory_is_never_read_and_runs_are_bit_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, new_empty = torch.empty, Tensor.new_empty

    def poisoned(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-(2**30))

    monkeypatch.setattr(torch, "empty", lambda *shape, **options: poisoned(empty(*shape, **options)))
    monkeypatch.setattr(
        torch, "empty_like", lambda x, **options: poisoned(empty(x.shape, dtype=x.dtype, device=x.device))
    )
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *shape, **options: poisoned(new_empty(self, *shape, **options))
    )
    for dtype, option in itertools.product(DTYPES, ("plain", "ids", "everything")):
        inputs = [*embeddings(70, 53, 0.5), torch.tensor(14.3)]
        first, second = (run(info_nce, inputs, dtype, OPTIONS[option](70, 53)) for _ in range(2))
        for name, value in first.items():
            assert value.isfinite().all(), (dtype, option, name)
            assert torch.equal(value, second[name]), (dtype, option, name)


def test_strided_and_mixed_inputs() -> None:
    leaves = [torch.randn(50, 48, device=DEVICE).requires_grad_(), torch.randn(24, 60, device=DEVICE).requires_grad_()]
    a, b = leaves[0][:, ::2], leaves[1].t()
    expected = evaluate(info_nce, [a.cpu(), b.cpu(), torch.tensor(14.3)], torch.float64, "reference", {})
    (2.5 * info_nce(a, b, 14.3, backend="triton")).backward()
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert_close_rel("strided a", expected["gradient of a"], leaves[0].grad[:, ::2].double().cpu(), 2e-5)
    assert_close_rel("transposed b", expected["gradient of b"], leaves[1].grad.t().double().cpu(), 2e-5)
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
    assert_close_rel("zero row", expected["gradient of a"][3], out["gradient of a"][3], 2e-5)
    assert_close_rel("the others", expected["gradient of a"][others], out["gradient of a"][others], 2e-5)
    assert_close_rel("b", expected["gradient of b"], out["gradient of b"], 2e-5)


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


def test_operators_are_registered_properly() -> None:
    a, b = (x.to(DEVICE) for x in embeddings(20, 30, 0.5))
    scale = torch.tensor(5.0, device=DEVICE)
    for need in ([True, True, True], [False, True, False]):
        tensors = [x.detach().requires_grad_(wanted) for x, wanted in zip((a, b, scale), need, strict=True)]
        arguments = (*tensors, None, None, None, None, None, 0.0, 0.1, True, "both", "", "triton", need, True)
        torch.library.opcheck(torch.ops.fastclap.info_nce, arguments)
        bias = torch.tensor(-1.0, device=DEVICE)
        torch.library.opcheck(
            torch.ops.fastclap.sigmoid_loss, (*tensors, bias, None, None, True, "", "triton", [*need, False])
        )


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_a_cuda_graph_replays_forward_and_backward(dtype: torch.dtype) -> None:
    a, b = (x.to("cuda", dtype).requires_grad_() for x in embeddings(1000, 1000, 0.5, dim=64))
    scale = torch.tensor(14.3, device="cuda", requires_grad=True)
    leaves = (a, b, scale)

    def step() -> tuple[Tensor, ...]:
        loss = info_nce(*leaves)
        return (loss, *torch.autograd.grad(loss, leaves))

    side = torch.cuda.Stream()
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


@pytest.mark.skipif(INTERPRETED, reason="autocast of the fused engine is for GPUs")
def test_autocast_rounds_embeddings_as_matmul_does() -> None:
    a, b = (x.to("cuda") for x in embeddings(300, 300, 0.5, dim=64))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        cast = info_nce(a, b, 14.3)
    assert torch.equal(cast, info_nce(a.bfloat16(), b.bfloat16(), 14.3))


@pytest.mark.skipif(INTERPRETED, reason="needs more memory than the interpreter has patience for")
def test_more_than_two_billion_logits() -> None:
    """Rows 0 and -1 of a batch whose exponentials number 2^31 and more, against a softmax of those rows."""
    n = 47_000
    generator = torch.Generator(device="cuda").manual_seed(0)
    a, b = (torch.randn(n, 64, device="cuda", generator=generator).bfloat16() for _ in range(2))
    x = a.clone().requires_grad_()
    info_nce(x, b, 14.3, direction="a_to_b").backward()
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
