"""The public losses: argument checks, the open_clip-compatible modules, small cases by hand, torch.compile."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclap
from fastclap.drop_in.open_clip import ClipLoss, SigLipLoss
from fastclap.kernels.contrastive.shared import Contrast
from fastclap.losses import info_nce, sigmoid_loss
from fastclap.testing import assert_close_rel

BACKENDS = ("torch", "reference")


def pair(n: int = 6, m: int = 6, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, dim, generator=generator) for rows in (n, m))
    return a, b


def test_public_names_are_these_functions() -> None:
    assert fastclap.info_nce is info_nce and fastclap.sigmoid_loss is sigmoid_loss
    assert fastclap.ClipLoss is ClipLoss and fastclap.SigLipLoss is SigLipLoss


@pytest.mark.parametrize("backend", BACKENDS)
def test_info_nce_by_hand(backend: str) -> None:
    """Orthonormal rows: S is the scale times the identity, so each row's loss is log(1 + (n-1)·e^-scale)."""
    eye = torch.eye(3)
    assert info_nce(eye, 7 * eye, 2.0, backend=backend).item() == pytest.approx(math.log(1 + 2 * math.exp(-2)))
    assert info_nce(eye, 7 * eye, 2.0, normalize=False, backend=backend).item() == pytest.approx(
        math.log(1 + 2 * math.exp(-14)), abs=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_captions_per_clip_share_the_target(backend: str) -> None:
    """One clip, two equally good captions and one other: half of the mass on each, and each caption has one clip."""
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ids = {"a_ids": torch.tensor([4]), "b_ids": torch.tensor([4, 4, 9])}
    to_b = math.log(2 * math.e + 1) - 1
    assert info_nce(a, b, 1.0, direction="a_to_b", backend=backend, **ids).item() == pytest.approx(to_b)
    # Columns 0 and 1 have the only row as their positive; column 2 has none and is not averaged.
    assert info_nce(a, b, 1.0, direction="b_to_a", backend=backend, **ids).item() == pytest.approx(0.0, abs=1e-6)
    assert info_nce(a, b, 1.0, backend=backend, **ids).item() == pytest.approx(to_b / 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_equal_to_the_student_has_no_divergence(backend: str) -> None:
    a, b = pair()
    plain = info_nce(a, b, 10.0, backend=backend)
    own = info_nce(a, b, 10.0, teacher=(a, b, 10.0), teacher_weight=0.25, backend=backend)
    assert_close_rel("loss", 0.75 * plain, own, 1e-6)
    ignored = info_nce(a, b, 10.0, teacher=(b, a, 3.0), teacher_weight=0.0, backend=backend)
    assert torch.equal(ignored, plain)


def test_sigmoid_loss_by_hand() -> None:
    a = torch.eye(2)
    expected = (2 * math.log1p(math.exp(-2)) + 2 * math.log1p(math.exp(-1))) / 2  # logits 2 and -1
    assert sigmoid_loss(a, a, 3.0, -1.0).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": [[1.0]]}, TypeError, "a must be a tensor"),
        ({"a": torch.ones(6, 5).long()}, TypeError, "a must be float16, bfloat16, float32 or float64, got torch.int64"),
        ({"b": torch.ones(6, 5, dtype=torch.complex64)}, TypeError, "b must be float16"),
        ({"a": torch.ones(5)}, ValueError, "a must be 2-D"),
        ({"a": torch.ones(0, 5)}, ValueError, "a is empty: shape \\[0, 5\\]"),
        ({"b": torch.ones(6, 0)}, ValueError, "b is empty"),
        ({"b": torch.ones(6, 4)}, ValueError, "a has 5 features and b has 4"),
        ({"b": torch.ones(6, 5, device="meta")}, ValueError, "a is on cpu and b on meta"),
        ({"logit_scale": "1"}, TypeError, "logit_scale must be a number"),
        ({"logit_scale": True}, TypeError, "logit_scale must be a number"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale must be finite"),
        ({"logit_scale": torch.tensor(3)}, TypeError, "logit_scale must be a floating-point tensor"),
        ({"logit_scale": torch.ones(2)}, ValueError, "logit_scale must have one element"),
        ({"a_ids": torch.arange(6)}, ValueError, "both a_ids and b_ids"),
        ({"a_ids": torch.arange(5), "b_ids": torch.arange(6)}, ValueError, "a_ids must have shape \\[6\\]"),
        ({"a_ids": torch.arange(6), "b_ids": torch.arange(6)[:, None]}, ValueError, "b_ids must have shape \\[6\\]"),
        ({"a_ids": torch.ones(6), "b_ids": torch.arange(6)}, TypeError, "a_ids must hold integers, got torch.float32"),
        ({"a_ids": torch.ones(6) > 0, "b_ids": torch.arange(6)}, TypeError, "a_ids must hold integers, got torch.bool"),
        ({"a_ids": [1] * 6, "b_ids": [1] * 6}, TypeError, "a_ids must be a tensor of integers"),
        ({"a_ids": torch.arange(6), "b_ids": torch.arange(6) + 6}, ValueError, "no row of a has a positive in b"),
        ({"direction": "a_b"}, ValueError, "direction must be one of both, a_to_b, b_to_a, got 'a_b'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, reference"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be in \\[0, 1\\), got 1.0"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be in"),
        ({"label_smoothing": "a"}, TypeError, "label_smoothing must be a number"),
        ({"teacher_weight": 0.5}, ValueError, "needs teacher="),
        (
            {"teacher_weight": 1.5, "teacher": (*pair(), 1.0)},
            ValueError,
            "teacher_weight must be in \\[0, 1\\], got 1.5",
        ),
        ({"teacher": pair()}, TypeError, "teacher must be a tuple"),
        ({"teacher": (*pair(5, 6), 1.0)}, ValueError, "teacher a_t has 5 rows and a has 6"),
        ({"teacher": (*pair(6, 7), 1.0)}, ValueError, "teacher b_t has 7 rows and b has 6"),
        ({"teacher": (torch.ones(6, 2), torch.ones(6, 3), 1.0)}, ValueError, "teacher a_t has 2 features"),
        ({"teacher": (*pair(), torch.ones(2))}, ValueError, "scale_t must have one element"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    a, b = pair()
    arguments: dict[str, Any] = {"a": a, "b": b, "logit_scale": 10.0, **change}
    with pytest.raises(error, match=message):
        info_nce(**arguments)


def test_wrong_arguments_of_the_sigmoid_loss() -> None:
    a, b = pair()
    with pytest.raises(ValueError, match="logit_bias must have one element"):
        sigmoid_loss(a, b, 1.0, torch.zeros(3))
    with pytest.raises(TypeError, match="logit_bias must be a number"):
        sigmoid_loss(a, b, 1.0, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a has 5 features and b has 3"):
        sigmoid_loss(a, b[:, :3], 1.0, 0.0)


def test_clip_loss_is_open_clips() -> None:
    a, b = (F.normalize(x, dim=1) for x in pair())
    scale = torch.tensor([14.3], requires_grad=True)  # open_clip passes the exponentiated parameter, maybe of shape [1]
    logits = scale * a @ b.t()
    labels = torch.arange(6)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    out = ClipLoss()(image_features=a, text_features=b, logit_scale=scale, output_dict=True)
    assert isinstance(out, dict) and list(out) == ["contrastive_loss"]
    assert_close_rel("loss", expected, out["contrastive_loss"], 1e-6)
    (expected_gradient,) = torch.autograd.grad(expected, scale)
    (gradient,) = torch.autograd.grad(out["contrastive_loss"], scale)
    assert gradient.shape == (1,)
    assert_close_rel("gradient of logit_scale", expected_gradient, gradient, 1e-5)


def test_clip_loss_does_not_normalise_unless_asked() -> None:
    a, b = pair()
    assert torch.equal(ClipLoss()(a, b, 3.0), info_nce(a, b, 3.0, normalize=False))
    assert torch.equal(ClipLoss(normalize=True)(a, b, 3.0), info_nce(a, b, 3.0))


def test_clip_loss_takes_every_option_of_info_nce() -> None:
    a, b = pair(6, 8)
    t = (*pair(6, 8, seed=1), 5.0)
    ids = {"a_ids": torch.arange(6) // 2, "b_ids": torch.arange(8) // 2}
    module = ClipLoss(normalize=True, label_smoothing=0.1, direction="a_to_b", teacher_weight=0.3)
    expected = info_nce(
        a, b, 3.0, label_smoothing=0.1, direction="a_to_b", teacher=t, teacher_weight=0.3, backend="reference", **ids
    )
    assert_close_rel("loss", expected, module(a, b, 3.0, teacher=t, **ids), 1e-6)
    with pytest.raises(ValueError, match="local_loss"):
        ClipLoss(local_loss=True, world_size=2, direction="a_to_b")


def test_clip_loss_gives_an_unused_bias_a_zero_gradient() -> None:
    a, b = pair()
    bias = torch.zeros((), requires_grad=True)
    value = ClipLoss()(a, b, 3.0, logit_bias=bias)
    value.backward()
    assert bias.grad == 0
    assert torch.equal(value.detach(), ClipLoss()(a, b, 3.0))


def test_siglip_loss_is_open_clips() -> None:
    a, b = (F.normalize(x, dim=1) for x in pair())
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    logits = scale * a @ b.t() + bias
    labels = 2 * torch.eye(6) - 1
    expected = -F.logsigmoid(labels * logits).sum() / 6
    expected.backward()
    expected_gradients = scale.grad, bias.grad
    scale.grad = bias.grad = None
    out = SigLipLoss(cache_labels=True, rank=0, world_size=1, dist_impl="bidir", chunk_size=2)(
        image_features=a, text_features=b, logit_scale=scale, logit_bias=bias, output_dict=True
    )
    out["contrastive_loss"].backward()
    assert_close_rel("loss", expected, out["contrastive_loss"], 1e-6)
    assert_close_rel("gradient of logit_scale", expected_gradients[0], scale.grad, 1e-5)
    assert_close_rel("gradient of logit_bias", expected_gradients[1], bias.grad, 1e-5)
    without_bias = SigLipLoss(normalize=True)(a, b, 10.0)
    assert_close_rel("no bias", sigmoid_loss(a, b, 10.0, 0.0, backend="reference"), without_bias, 1e-6)


def test_loss_is_part_of_a_compiled_graph() -> None:
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    teacher = (*pair(9, 9, seed=3), 5.0)

    def step(a: Tensor, b: Tensor, w: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
        x, y = (a @ w).tanh(), b @ w
        loss, top1 = info_nce(x, y, 14.3, return_top1=True)
        loss = 2 * loss + 0 * top1.sum() + sigmoid_loss(x, y, 10.0, bias)
        return loss + info_nce(x, y, bias.exp(), a_ids=ids, b_ids=ids, label_smoothing=0.1, direction="a_to_b")

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for n in (6, 9):
        results = []
        for function in (step, compiled):
            w, bias = weight.clone().requires_grad_(), torch.tensor(-0.5, requires_grad=True)
            value = function(*pair(n, n), w, bias, torch.arange(n) // 2)
            value.backward()
            assert w.grad is not None and bias.grad is not None
            results.append((value.detach(), w.grad, bias.grad))
        for eager, graph in zip(*results, strict=True):
            assert_close_rel("compiled", eager, graph, 1e-6)
    with_teacher = torch.compile(info_nce, backend="aot_eager", fullgraph=True)
    a, b = pair(9, 9)
    expected = info_nce(a, b, 14.3, teacher=teacher, teacher_weight=0.4)
    assert_close_rel("teacher", expected, with_teacher(a, b, 14.3, teacher=teacher, teacher_weight=0.4), 1e-6)


def test_modules_are_part_of_a_compiled_graph() -> None:
    a, b = (F.normalize(x, dim=1) for x in pair())
    for module, extra in ((ClipLoss(), ()), (SigLipLoss(), (torch.tensor(-3.0),))):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        x = a.clone().requires_grad_()
        value = compiled(x, b, torch.tensor(9.0), *extra)
        (gradient,) = torch.autograd.grad(value, x)
        (expected,) = torch.autograd.grad(module(x, b, torch.tensor(9.0), *extra), x)
        assert_close_rel("gradient", expected, gradient, 1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_operators_are_registered_properly(dtype: torch.dtype) -> None:
    """torch.library.opcheck: schema, fake tensors, autograd registration, ahead-of-time dispatch.

    Every dtype with all gradients; which of them are wanted matters in all dtypes alike.
    """
    a, b = (x.to(dtype) for x in pair(5, 7))
    scale, bias = torch.tensor(5.0), torch.tensor(-1.0)
    ids = torch.arange(5) // 2, torch.arange(7) // 2
    contrast = Contrast(label_smoothing=0.1).key
    needs = [[True, True, True], [True, False, False], [False, False, True], [False, False, False]]
    for need in needs if dtype == torch.float32 else needs[:1]:
        tensors = [x.detach().requires_grad_(wanted) for x, wanted in zip((a, b, scale), need, strict=True)]
        for given in ((None, None), ids):
            arguments = (*tensors, *given, None, None, None, contrast, "", False, "torch", need, True)
            torch.library.opcheck(torch.ops.fastclap.info_nce, arguments)
        torch.library.opcheck(
            torch.ops.fastclap.sigmoid_loss, (*tensors, bias.detach(), *ids, True, "", False, "torch", [*need, False])
        )


def test_top1_counts_the_positives_that_win() -> None:
    a, b = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]  # rows 2 and 3 prefer each other's columns
    loss, top1 = info_nce(a, b, 5.0, return_top1=True)
    assert torch.equal(loss, info_nce(a, b, 5.0))
    assert top1.tolist() == [0.5, 0.5] and not top1.requires_grad
    ids = {"a_ids": torch.tensor([0, 1, 2, 2]), "b_ids": torch.tensor([0, 1, 2, 2])}
    assert info_nce(a, b, 5.0, return_top1=True, **ids)[1].tolist() == [1.0, 1.0]
    alone = {"a_ids": torch.tensor([0, 1, 8, 9]), "b_ids": torch.tensor([0, 7, 1, 2])}
    assert info_nce(a, b, 5.0, return_top1=True, **alone)[1].tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="no in-batch top-1"):
        info_nce(a, b, 5.0, return_top1=True, backend="reference")


def test_non_finite_rows_are_named_when_asked_for() -> None:
    a, b = pair()
    a[2, 1], a[4, 0] = float("nan"), float("inf")
    assert info_nce(a, b, 5.0).isnan()
    with pytest.raises(ValueError, match=r"a has NaN or infinite values in 2 of 6 rows: 2, 4"):
        info_nce(a, b, 5.0, check_finite=True)
    with pytest.raises(ValueError, match=r"b has NaN or infinite values in 2 of 6 rows: 2, 4"):
        sigmoid_loss(b, a, 5.0, 0.0, check_finite=True)
    assert torch.equal(info_nce(b, b, 5.0, check_finite=True), info_nce(b, b, 5.0))


def test_triton_backend_says_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' needs embeddings on a GPU, got cpu"):
        info_nce(a, b, 5.0, backend="triton")
    with pytest.raises(ValueError, match="float64 needs backend='torch'"):
        sigmoid_loss(a.double(), b, 5.0, 0.0, backend="triton")
