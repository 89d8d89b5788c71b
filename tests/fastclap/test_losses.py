"""The public losses: argument checks, the open_clip-compatible modules, small cases by hand, torch.compile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclap
from fastclap.drop_in.open_clip import ClipLoss, SigLipLoss
from fastclap.kernels.contrastive import torch_engine
from fastclap.kernels.contrastive.shared import Contrast, QueueRows
from fastclap.losses import EmbeddingQueue, info_nce, sigmoid_loss
from fastclap.testing import assert_close_rel
from tests.kernels.contrastive.cases import CONTRASTS, converted, embeddings, evaluate, guide, queue

BACKENDS = ("torch", "reference")
TOGETHER = ("everything", "everything, prefixes, one way")


def pair(n: int = 6, m: int = 6, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, dim, generator=generator) for rows in (n, m))
    return a, b


GUIDE = {"teacher": (*pair(6, 6, 3), 1.0)}


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


def cosine(x: list[float], y: list[float]) -> float:
    return sum(p * q for p, q in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)


def by_definition(a: Tensor, b: Tensor, scale: float, options: dict[str, Any]) -> float:
    """InfoNCE of the rows of a and then of those of b, pair by pair in plain Python, as the papers write it."""
    queue = options.get("queue", QueueRows(a[:0], b[:0]))
    if "matryoshka" in options:
        widths = options["matryoshka"]
        weights = widths if isinstance(widths, Mapping) else dict.fromkeys(widths, 1.0)
        whole = {name: value for name, value in options.items() if name != "matryoshka"}
        return sum(
            weight * by_definition(a[:, :d], b[:, :d], scale, {**whole, "queue": queue.cut(d)})
            for d, weight in weights.items()
        )
    a_keys, b_keys = (
        options[name].tolist() if name in options else range(len(x)) for name, x in (("a_ids", a), ("b_ids", b))
    )
    a_t, b_t, _ = options.get("teacher", (a, b, 1.0))
    losses = []
    if options.get("direction") != "b_to_a":
        losses.append(one_way(a, b, a_keys, b_keys, queue.b, queue.b_ids, a_t, b_t, scale, options))
    if options.get("direction") != "a_to_b":
        losses.append(one_way(b, a, b_keys, a_keys, queue.a, queue.a_ids, b_t, a_t, scale, options))
    return sum(losses) / len(losses)


def one_way(
    rows: Tensor, columns: Tensor, row_keys: Sequence[int], column_keys: Sequence[int],
    entries: Tensor, entry_ids: Tensor | None, teacher_rows: Tensor, teacher_columns: Tensor,
    scale: float, options: dict[str, Any],
) -> float:  # fmt: skip
    x, y, z, x_t, y_t = (part.tolist() for part in (rows, columns, entries, teacher_rows, teacher_columns))
    entry_keys = [None] * len(z) if entry_ids is None else entry_ids.tolist()
    prior, smoothing, weight = (options.get(name, 0.0) for name in ("debias", "label_smoothing", "teacher_weight"))
    losses = []
    for i, row in enumerate(x):
        positives = [j for j in range(len(y)) if row_keys[i] == column_keys[j]]
        if not positives:
            continue
        logits = [scale * cosine(row, column) for column in y]
        negatives = [j for j in range(len(y)) if j not in positives]
        cosines = [cosine(x_t[i], other) for other in y_t]
        if "guide_margin" in options:
            best, margin = max(cosines[j] for j in positives), options["guide_margin"]
            allowed = best * (1 - margin) if options.get("guide_relative") else best - margin
            negatives = [j for j in negatives if cosines[j] <= allowed]
        against = [math.exp(logits[j]) for j in negatives]
        against += [math.exp(scale * cosine(row, z[q])) for q in range(len(z)) if entry_keys[q] != row_keys[i]]
        of_positives = [math.exp(logits[j]) for j in positives]
        negative = sum(against)
        if prior:
            mean = sum(of_positives) / len(positives)
            negative = max((negative - prior * len(against) * mean) / (1 - prior), len(against) * math.exp(-abs(scale)))
        log_total = math.log(sum(of_positives) + negative)
        target = [smoothing / len(y) + (1 - smoothing) * (j in positives) / len(positives) for j in range(len(y))]
        loss = sum(t * (log_total - s) for t, s in zip(target, logits, strict=True))
        if weight:
            t_logits = [float(options["teacher"][2]) * t for t in cosines]
            t_total = math.log(sum(math.exp(t) for t in t_logits))
            divergence = sum(
                math.exp(t - t_total) * (t - t_total - s + log_total) for t, s in zip(t_logits, logits, strict=True)
            )
            loss = (1 - weight) * loss + weight * divergence
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("option", CONTRASTS)
def test_contrasts_follow_their_definitions(option: str) -> None:
    for n, m, scale in ((9, 13, 4.0), (12, 8, -3.0)):
        options = converted(CONTRASTS[option](n, m), torch.float64)
        a, b = (x.double() for x in embeddings(n, m, 0.5))
        expected = by_definition(a, b, scale, options)
        for backend in BACKENDS:
            assert info_nce(a, b, scale, backend=backend, **options).item() == pytest.approx(expected, rel=1e-12)


def test_the_definitions_cases_reach_what_they_are_for() -> None:
    """Guides leave columns out, both branches of the debiased negatives occur, ids leave entries out."""
    a, b = (x.double() for x in embeddings(40, 40, 0.5))
    plain = info_nce(a, b, 4.0)
    for margin in (0.1, 0.0, -0.1):
        guided = info_nce(a, b, 4.0, **converted(guide(40, 40, margin), torch.float64))
        assert guided < plain - 0.01, margin
    a, b = (x.double() for x in embeddings(40, 40, 0.95))
    held, free = info_nce(a, b, 4.0, debias=0.9), info_nce(a, b, 4.0, debias=1e-4)
    every_row_held = torch.log1p(39 * math.exp(-4.0) / (4.0 * F.cosine_similarity(a, b)).exp()).mean()
    assert held.item() == pytest.approx(every_row_held.item(), rel=1e-12)
    assert held < free < info_nce(a, b, 4.0)
    own = {"a_ids": torch.arange(40), "b_ids": torch.arange(40)}
    same, other = (
        info_nce(a, b, 4.0, queue=QueueRows(a, b, torch.arange(40) + shift, torch.arange(40) + shift), **own)
        for shift in (0, 40)
    )
    assert info_nce(a, b, 4.0) < same < other


@pytest.mark.parametrize("option", ("guide, ids", "relative guide, b_to_a", "debias, ids", "queue, ids", *TOGETHER))
def test_reference_has_the_derivatives_of_its_definition(option: str) -> None:
    options = converted(CONTRASTS[option](6, 5), torch.float64)
    leaves = [x.double().requires_grad_() for x in (*embeddings(6, 5, 0.5), torch.tensor(5.0))]

    def loss(*inputs: Tensor) -> Tensor:
        return info_nce(*inputs, backend="reference", **options)

    assert torch.autograd.gradcheck(loss, leaves)


def test_equally_close_columns_stay_with_a_guide() -> None:
    """Strictly closer ones are left out: a caption that occurs twice is still a negative without a margin."""
    a, b = pair()
    a_t = b_t = torch.eye(6)[[0, 0, 2, 3, 4, 5]]
    for backend in BACKENDS:
        plain = info_nce(a, b, 5.0, backend=backend)
        same = info_nce(a, b, 5.0, teacher=(a_t, b_t, 1.0), guide_margin=0.0, backend=backend)
        assert_close_rel("no margin", plain, same, 1e-6)
        left_out = info_nce(a, b, 5.0, teacher=(a_t, b_t, 1.0), guide_margin=0.1, backend=backend)
        assert left_out < plain - 1e-3
        share = info_nce(a, b, 5.0, teacher=(a_t, b_t, 1.0), guide_margin=0.1, guide_relative=True, backend=backend)
        assert torch.equal(share, left_out)  # cosines of 1


def test_prefixes_are_losses_of_their_own() -> None:
    a, b = pair(6, 8)
    with_ids = {"a_ids": torch.arange(6) // 2, "b_ids": torch.arange(8) // 2}
    parts = {d: info_nce(a[:, :d], b[:, :d], 5.0, return_top1=True, **with_ids) for d in (2, 5)}
    loss, top1 = info_nce(a, b, 5.0, matryoshka=(5, 2), return_top1=True, **with_ids)
    assert_close_rel("sum", parts[2][0] + parts[5][0], loss, 1e-6)
    assert torch.equal(top1, parts[5][1])
    weighted = info_nce(a, b, 5.0, matryoshka={2: 0.25, 5: 3}, **with_ids)
    assert_close_rel("weighted sum", 0.25 * parts[2][0] + 3 * parts[5][0], weighted, 1e-6)
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(info_nce(a, b, 5.0, matryoshka=[2], **with_ids), a)
    assert not gradient[:, 2:].any() and gradient[:, :2].any()


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
        ({"b": torch.ones(6, 0)}, ValueError, "a has 5 features and b has 0"),
        ({"b": torch.ones(6, 4)}, ValueError, "a has 5 features and b has 4"),
        ({"b": torch.ones(6, 5, device="meta")}, TypeError, "b must be a dense tensor with values, and is on the meta"),
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
        ({"guide_margin": 0.1}, ValueError, "guide_margin=0.1 needs teacher="),
        ({"guide_margin": "a", **GUIDE}, TypeError, "guide_margin must be a number or None, got str"),
        ({"guide_margin": math.inf, **GUIDE}, ValueError, "guide_margin must be finite"),
        ({"guide_margin": 1.0, "guide_relative": True, **GUIDE}, ValueError, "guide_margin must be below 1"),
        ({"guide_margin": 0.1, "guide_relative": "yes", **GUIDE}, TypeError, "guide_relative must be True or False"),
        ({"guide_relative": True}, ValueError, "guide_relative says how guide_margin is meant"),
        (
            {"guide_margin": 0.1, "teacher_weight": 0.5, **GUIDE},
            ValueError,
            "cannot be combined with teacher_weight=0.5",
        ),
        ({"guide_margin": 0.1, "label_smoothing": 0.1, **GUIDE}, ValueError, "combined with label_smoothing=0.1"),
        ({"guide_margin": 0.1, "debias": 0.1, **GUIDE}, ValueError, "cannot be combined with debias=0.1"),
        ({"guide_margin": 0.1, "queue": QueueRows(*pair()), **GUIDE}, ValueError, "cannot be combined with a queue"),
        ({"debias": 1.0}, ValueError, "debias must be in \\[0, 1\\), got 1.0"),
        ({"debias": "a"}, TypeError, "debias must be a number"),
        ({"debias": 0.1, "normalize": False}, ValueError, "debias needs normalize=True"),
        ({"queue": pair()}, TypeError, "queue must be an EmbeddingQueue or its rows\\(\\), got tuple"),
        ({"queue": EmbeddingQueue(9, 4)}, ValueError, "the queue's a must be floating-point rows of 5 features"),
        ({"queue": QueueRows(*pair(6, 6, 5))._replace(b=torch.ones(5))}, ValueError, "the queue's b must be"),
        ({"queue": EmbeddingQueue(9, 5, ids=True)}, ValueError, "the queue has ids and the call has none"),
        (
            {"queue": EmbeddingQueue(9, 5), "a_ids": torch.arange(6), "b_ids": torch.arange(6)},
            ValueError,
            "the call has ids and the queue has none",
        ),
        (
            {"queue": QueueRows(*pair(), *[torch.arange(5)] * 2), "a_ids": torch.arange(6), "b_ids": torch.arange(6)},
            ValueError,
            "the queue's a_ids must have shape \\[6\\], got \\[5\\]",
        ),
        ({"queue": EmbeddingQueue(9, 5).to("meta")}, ValueError, "the queue is on meta and a on cpu"),
        ({"matryoshka": 3}, TypeError, "matryoshka must be a sequence of widths"),
        ({"matryoshka": (2.0,)}, TypeError, "matryoshka must have whole numbers as widths, got 2.0"),
        ({"matryoshka": {2: "a"}}, TypeError, "matryoshka must have numbers as weights, got 'a' for width 2"),
        ({"matryoshka": (2, 2)}, ValueError, "widths from 1 up, each of them once, got 2"),
        ({"matryoshka": (0, 2)}, ValueError, "widths from 1 up, each of them once, got 0"),
        ({"matryoshka": {2: 0.0}}, ValueError, "weights that are positive and finite, got 0.0 for 2"),
        ({"matryoshka": (2, 6)}, ValueError, "matryoshka has width 6 and the embeddings have 5 features"),
        ({"keep_exponentials": 2}, TypeError, "keep_exponentials must be True, False or None, got 2"),
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


@pytest.mark.parametrize("option", ("guide, ids", "debias", "queue of one side", "matryoshka, weights", *TOGETHER))
def test_other_contrasts_are_part_of_a_compiled_graph(option: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x, **options: info_nce(*x, **options), backend="aot_eager", fullgraph=True)
    for n, m in ((6, 9), (10, 8)):
        inputs, options = [*embeddings(n, m, 0.5), torch.tensor(9.0)], CONTRASTS[option](n, m)
        expected = evaluate(info_nce, inputs, torch.float32, "torch", options)
        for name, value in evaluate(compiled, inputs, torch.float32, "torch", options).items():
            assert_close_rel(name, expected[name], value, 1e-6)


def test_a_queue_in_a_compiled_graph() -> None:
    """A full one, as a module; one that fills up, as rows whose number varies."""
    a, b = pair(6, 6)
    module = EmbeddingQueue(8, 5)
    compiled = torch.compile(info_nce, backend="aot_eager", fullgraph=True)
    for step in range(4):
        batch = pair(3, 3, seed=step)
        expected = info_nce(a, b, 5.0, queue=module)
        assert_close_rel(f"rows, step {step}", expected, compiled(a, b, 5.0, queue=module.rows()), 1e-6)
        if step == 3:
            assert_close_rel("full", expected, compiled(a, b, 5.0, queue=module), 1e-6)
        module.push(*batch)


@pytest.mark.parametrize("keep", (None, True, False))
def test_engines_are_told_whether_to_keep_exponentials(monkeypatch: pytest.MonkeyPatch, keep: bool | None) -> None:
    told, engine = [], torch_engine.info_nce

    def listening(*arguments: Any) -> Any:
        told.extend(x.keep_exponentials for x in arguments if isinstance(x, Contrast))
        return engine(*arguments)

    monkeypatch.setattr(torch_engine, "info_nce", listening)
    a, b = pair()
    value = info_nce(a, b, 5.0, keep_exponentials=keep)
    assert told == [keep] and torch.equal(value, info_nce(a, b, 5.0))


def test_a_contrast_comes_back_from_its_key() -> None:
    for contrast in (
        Contrast(),
        Contrast(0.25, 0.1, False, "b_to_a"),
        Contrast(guide_margin=-0.1, guide_relative=True, keep_exponentials=True),
        Contrast(debias=1e-7, matryoshka=((3, 0.1), (17, 2.0)), keep_exponentials=False),
        Contrast(guide_margin=0.0),
    ):
        assert Contrast.from_key(contrast.key) == contrast


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
    other, guided = Contrast(debias=0.1, matryoshka=((2, 1.0), (5, 0.5))), Contrast(guide_margin=0.1)
    needs = [[True, True, True], [True, False, False], [False, False, True], [False, False, False]]
    for need in needs if dtype == torch.float32 else needs[:1]:
        tensors = [x.detach().requires_grad_(wanted) for x, wanted in zip((a, b, scale), need, strict=True)]
        for given in ((None, None), ids):
            arguments = (*tensors, *given, None, None, None, contrast, "", False, "torch", need, True)
            torch.library.opcheck(torch.ops.fastclap.info_nce, arguments)
        torch.library.opcheck(
            torch.ops.fastclap.sigmoid_loss, (*tensors, bias.detach(), *ids, True, "", False, "torch", [*need, False])
        )
    tensors = [x.detach().requires_grad_() for x in (a, b, scale)]
    others = converted({**guide(5, 7), **queue(3, 4, 2, dim=5)}, dtype)
    arguments = (*tensors, *ids, None, None, None, other.key, "", False, "torch", needs[0], True, *others["queue"])
    torch.library.opcheck(torch.ops.fastclap.info_nce, arguments)
    arguments = (*tensors, None, None, *others["teacher"], guided.key, "", False, "torch", needs[0], True)
    torch.library.opcheck(torch.ops.fastclap.info_nce, arguments)


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


def test_top1_looks_at_all_columns_of_the_batch_and_at_no_others() -> None:
    a, b = pair()
    loss, plain = info_nce(a, b, 5.0, return_top1=True)
    for options in ({"guide_margin": 5.0, **GUIDE}, {"debias": 0.1}, {"queue": QueueRows(a, b)}):
        other, top1 = info_nce(a, b, 5.0, return_top1=True, **options)
        assert torch.equal(top1, plain) and not torch.isclose(other, loss), options


def numbered(first: int, count: int, dim: int = 3) -> Tensor:
    return torch.arange(first, first + count).float()[:, None].expand(count, dim)


def contents(module: EmbeddingQueue) -> list[list[int]]:
    """The numbers in the queue's a and b, and the ids that came with them if any, in order."""
    rows = module.rows()
    found = [sorted(int(x) for x in side[:, 0]) for side in rows[:2]]
    for side, own in zip(rows[:2], rows[2:], strict=True):
        assert own is None or (len(own) == len(side) and torch.equal(own, 10 * side[:, 0].long()))
    return found


def test_a_queue_keeps_the_last_rows() -> None:
    module = EmbeddingQueue(5, 3, ids=True)
    assert contents(module) == [[], []] and not list(module.parameters())
    first_a = first_b = 0
    for n, m in ((2, 1), (2, 3), (3, 2), (1, 9), (12, 5), (5, 1), (4, 4)):
        a, b = numbered(first_a, n).requires_grad_(), numbered(first_b, m)
        module.push(a, b, 10 * a[:, 0].detach().long(), 10 * b[:, 0].long())
        first_a, first_b = first_a + n, first_b + m
        assert contents(module) == [list(range(max(0, x - 5), x)) for x in (first_a, first_b)]
        assert not module.a.requires_grad


def test_a_queue_is_in_its_state() -> None:
    module, other = EmbeddingQueue(4, 3, torch.bfloat16, ids=True), EmbeddingQueue(4, 3, torch.bfloat16, ids=True)
    for first in (0, 3):
        module.push(*[numbered(first, 3)] * 2, *[10 * torch.arange(first, first + 3)] * 2)
    other.load_state_dict(module.state_dict())
    assert contents(other) == contents(module) == [[2, 3, 4, 5]] * 2 and other.rows().a.dtype == torch.bfloat16
    for one in (module, other):
        one.push(*[numbered(6, 2)] * 2, *[torch.tensor([60, 70])] * 2)
    assert contents(other) == contents(module) == [[4, 5, 6, 7]] * 2
    assert all(map(torch.equal, module.state_dict().values(), other.state_dict().values()))


def test_a_saved_queue_is_loaded_from_a_file(tmp_path: Path) -> None:
    module, other = EmbeddingQueue(4, 3), EmbeddingQueue(4, 3)
    module.push(numbered(0, 3), numbered(5, 2))
    torch.save(module.state_dict(), tmp_path / "queue.pt")
    other.load_state_dict(torch.load(tmp_path / "queue.pt"))
    assert contents(other) == [[0, 1, 2], [5, 6]]


def test_an_empty_queue_changes_nothing_and_a_queue_is_its_rows() -> None:
    a, b = pair()
    module = EmbeddingQueue(9, 5)
    assert torch.equal(info_nce(a, b, 5.0, queue=module), info_nce(a, b, 5.0))
    entries = pair(4, 7, seed=3)
    module.push(*entries)
    value = info_nce(a, b, 5.0, queue=module)
    assert_close_rel("queue", info_nce(a, b, 5.0, queue=QueueRows(*entries), backend="reference"), value, 1e-6)
    assert torch.equal(value, info_nce(a, b, 5.0, queue=module.rows())) and value > info_nce(a, b, 5.0)


def test_wrong_arguments_of_a_queue() -> None:
    with pytest.raises(ValueError, match="a queue needs whole numbers from 1 up, got size=0 and dim=3"):
        EmbeddingQueue(0, 3)
    module, x, own = EmbeddingQueue(4, 3), numbered(0, 2), torch.arange(2)
    with pytest.raises(ValueError, match="this queue has no ids: make it with ids=True"):
        module.push(x, x, own, own)
    with pytest.raises(ValueError, match="this queue has ids: make it with ids=False"):
        EmbeddingQueue(4, 3, ids=True).push(x, x)
    with pytest.raises(ValueError, match="the queue has 3 features and the batch has 2"):
        module.push(x[:, :2], x[:, :2])
    with pytest.raises(ValueError, match="both a_ids and b_ids"):
        module.push(x, x, own)


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
