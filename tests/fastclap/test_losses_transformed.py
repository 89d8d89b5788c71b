"""The public losses under torch.func and forward-mode differentiation: right, against float64, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from fastclap.drop_in.open_clip import ClipLoss, SigLipLoss
from fastclap.kernels.contrastive.shared import Contrast, QueueRows, info_nce_reference, sigmoid_loss_reference
from fastclap.losses import EmbeddingQueue, info_nce, local_loss, sigmoid_loss, tag_loss

GENERATOR = torch.Generator().manual_seed(7)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


IDS = (torch.tensor([0, 1, 1, 2, 5]), torch.tensor([1, 0, 2, 3, 1]))
TEACHER = (rows(5, 3), rows(5, 3), 2.0)
QUEUE = QueueRows(rows(3, 4), rows(2, 4))
WHERE = torch.tensor([True, False, True, True, False])
TAGS = torch.tensor([[1, 0, 0, 1, 0], [0] * 5, [0, 1, 0, 0, 0], [0, 0, 1, 0, 1], [1] * 5], dtype=torch.bool)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of a [5, 4], b [5, 4] and a scale


def in_double(loss: Loss) -> Loss:
    return lambda a, b, scale: loss(a.double(), b.double(), scale.double())


def contrast(**options: Any) -> tuple[Loss, Loss]:
    """The loss with options, and its definition in float64."""
    ids = IDS if "a_ids" in options else None
    teacher, queue = options.get("teacher"), options.get("queue")
    kept = Contrast(**{name: x for name, x in options.items() if name not in ("a_ids", "b_ids", "teacher", "queue")})
    return (
        lambda a, b, scale: info_nce(a, b, scale, **options),
        in_double(lambda a, b, scale: info_nce_reference(a, b, scale, ids, teacher, queue, kept)),
    )


def siglip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return sigmoid_loss_reference(a.double(), b.double(), scale.double(), -2 * scale.double(), None, True)


def tagged(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return tag_loss(a, b, TAGS) * scale


def local(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return local_loss(a, b, b.flip(0), scale, where=WHERE)


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "info_nce": contrast(),
    "info_nce of ids": contrast(a_ids=IDS[0], b_ids=IDS[1], label_smoothing=0.1),
    "info_nce of a teacher, one way": contrast(teacher=TEACHER, teacher_weight=0.3, direction="a_to_b"),
    "info_nce with a guide": contrast(teacher=TEACHER, guide_margin=0.1),
    "info_nce with a queue": contrast(queue=QUEUE, debias=0.05),
    "ClipLoss": (lambda a, b, scale: ClipLoss()(a, b, scale), contrast(normalize=False)[1]),
    "sigmoid_loss": (lambda a, b, scale: sigmoid_loss(a, b, scale, -2 * scale), siglip),
    "SigLipLoss": (
        lambda a, b, scale: SigLipLoss()(a, b, scale, -2 * scale),
        in_double(lambda a, b, scale: sigmoid_loss_reference(a, b, scale, -2 * scale, None, False)),
    ),
    "tag_loss": (tagged, in_double(tagged)),
    "local_loss": (local, in_double(local)),
}
INPUTS = (rows(5, 4), rows(5, 4), torch.tensor(3.0))
TANGENTS = (rows(5, 4), rows(5, 4), torch.tensor(0.7))


def dual(loss: Loss) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(*map(forward_ad.make_dual, INPUTS, TANGENTS))).tangent


def in_batches(loss: Loss) -> tuple[Tensor, ...]:
    """Several problems at once, some of what they take shared by all of them."""
    a, b, scale = (torch.stack([x, y, x + y]) for x, y in zip(INPUTS, TANGENTS, strict=True))
    shared = vmap(loss, in_dims=(0, None, None))(a, *INPUTS[1:])
    return vmap(loss)(a, b, scale), shared, vmap(grad(loss))(a, b, scale)


WAYS: dict[str, Callable[[Loss], Any]] = {
    "jvp": lambda loss: jvp(loss, INPUTS, TANGENTS),
    "vjp": lambda loss: vjp(loss, *INPUTS)[1](torch.tensor(0.5, dtype=loss(*INPUTS).dtype)),
    "grad": lambda loss: grad(loss, argnums=(0, 1, 2))(*INPUTS),
    "jacrev": lambda loss: jacrev(loss)(*INPUTS),
    "jacfwd": lambda loss: jacfwd(loss, argnums=2)(*INPUTS),
    "vmap": in_batches,
    "hessian": lambda loss: hessian(loss)(*INPUTS),
    "hessian-vector": lambda loss: jvp(lambda *x: grad(loss, argnums=(0, 1, 2))(*x), INPUTS, TANGENTS),
    "dual numbers": dual,
    "forward-mode jacobian": lambda loss: torch.autograd.functional.jacobian(
        loss, INPUTS, vectorize=True, strategy="forward-mode"
    ),
    "vectorised jacobian": lambda loss: torch.autograd.functional.jacobian(loss, INPUTS, vectorize=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_transforms_are_those_of_the_definition(name: str, way: str) -> None:
    loss, reference = LOSSES[name]
    found, expected = (torch.utils._pytree.tree_leaves(WAYS[way](f)) for f in (loss, reference))
    assert expected and sum(float(x.abs().sum()) for x in expected) > 0
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_in_forward_mode(name: str) -> None:
    inputs = [x.double().requires_grad_() for x in INPUTS]
    assert torch.autograd.gradcheck(LOSSES[name][0], inputs, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("name", ["info_nce", "sigmoid_loss"])
def test_a_second_backward_pass_is_refused_with_its_remedy(name: str) -> None:
    inputs = [x.clone().requires_grad_() for x in INPUTS]
    with pytest.raises(RuntimeError, match=r"differentiated once only.*backend='reference'"):
        torch.autograd.grad(LOSSES[name][0](*inputs), inputs, create_graph=True)
    double = [x.double().requires_grad_() for x in INPUTS]
    assert torch.autograd.gradgradcheck(lambda a, b, scale: info_nce(a, b, scale, backend="reference"), double)


@pytest.mark.parametrize("name", ["info_nce", "sigmoid_loss"])
def test_graphs_are_transformed_like_the_loss(name: str) -> None:
    loss, reference = LOSSES[name]
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    plain = compiled(*INPUTS)
    torch.testing.assert_close(dual(compiled).double(), dual(reference), rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(compiled(*INPUTS), plain)  # and back again
    inside = torch.compile(lambda *x: jvp(loss, x, TANGENTS)[1], backend="eager", fullgraph=True)(*INPUTS)
    torch.testing.assert_close(inside.double(), jvp(reference, INPUTS, TANGENTS)[1], rtol=1e-4, atol=2e-6)
    torch._dynamo.reset()


def test_ids_may_be_of_a_batch_as_well() -> None:
    ids = torch.stack([IDS[0], IDS[1]])
    found = vmap(lambda x, y: info_nce(*INPUTS, a_ids=x, b_ids=y))(ids, ids.flip(0))
    one_by_one = [info_nce(*INPUTS, a_ids=x, b_ids=y) for x, y in zip(ids, ids.flip(0), strict=True)]
    torch.testing.assert_close(found, torch.stack(one_by_one))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"backend": "triton"}, "backend='triton'"),
        ({"return_top1": True}, "return_top1"),
        ({"check_finite": True}, "check_finite"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_what_a_transform_cannot_follow_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        vmap(lambda a: info_nce(a, INPUTS[1], 2.0, **options))(torch.stack(INPUTS[:2]))


def test_a_queue_is_not_filled_within_a_transform() -> None:
    queue = EmbeddingQueue(3, 4)

    def push(a: Tensor) -> Tensor:
        queue.push(a, a)
        return a

    with pytest.raises(ValueError, match=r"outside of them"):
        vmap(push)(rows(2, 5, 4))
    assert len(queue.rows().a) == 0
