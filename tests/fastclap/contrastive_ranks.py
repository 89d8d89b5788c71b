"""Runs the distributed losses on four gloo ranks and writes what each rank got; `test_losses_distributed.py` judges it.

    python contrastive_ranks.py FOLDER [triton]

With "triton" (and TRITON_INTERPRET=1 where there is no GPU) the loss cases run on the Triton engine, in float32.

The parent imports torch once and forks, so four ranks cost one start. Groups of two ranks are subgroups of the four.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # DistributedDataParallel would import it four times after the fork
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench import quick_interpreter
from fastclap.drop_in.open_clip import ClipLoss, SigLipLoss
from fastclap.grad_cache import GradCache
from fastclap.kernels.contrastive import shared, torch_engine
from fastclap.kernels.contrastive.shared import QueueRows
from fastclap.losses import EmbeddingQueue, info_nce, sigmoid_loss

WORLD = 4
DIM = 12
UNEVEN_A, UNEVEN_B = (3, 70, 1, 5), (6, 2, 80, 4)
EVEN = (4, 4, 4, 4)


class Towers(nn.Module):
    """Two small towers and a logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.audio = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, DIM))
        self.text = nn.Sequential(nn.Linear(9, 16), nn.GELU(), nn.Linear(16, DIM))
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, audio: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        if audio is not None:
            return self.audio(audio)
        return self.text(text)


def make_towers(dtype: torch.dtype) -> Towers:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return Towers().to(dtype)


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def crossing_ids(n: int, m: int, groups: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(groups, (rows,), generator=generator) for rows in (n, m))
    b[-1] = a[0]
    return a, b


def loss_cases() -> dict[str, dict[str, Any]]:
    """Name -> ranks, rows per rank and options. Tensors among the options are global; each rank takes its rows.

    slow: the interpreter leaves it out, as others have its parts.
    """
    uneven = {"world": 4, "a_rows": UNEVEN_A, "b_rows": UNEVEN_B}
    total_a, total_b = sum(UNEVEN_A), sum(UNEVEN_B)
    ids = dict(zip(("a_ids", "b_ids"), crossing_ids(total_a, total_b, 50), strict=True))
    teacher = (*tensors((total_a, 5), (total_b, 5), seed=7), 9.0)
    everything = {**ids, "label_smoothing": 0.1, "teacher": teacher, "teacher_weight": 0.4}
    entries = tensors((9, DIM), (130, DIM), seed=4)
    queue = {"queue": QueueRows(*entries)}
    queue_with_ids = {"queue": QueueRows(*entries, *crossing_ids(9, 130, 50))}
    guide = {"teacher": teacher, "guide_margin": 0.05}
    together = {**everything, **queue_with_ids, "debias": 0.02}
    large = {"normalize": False}
    pair_ids = dict(zip(("a_ids", "b_ids"), crossing_ids(73, 8, 6), strict=True))
    return {
        "four ranks, ids": {**uneven, "options": ids},
        "four ranks, ids, float32": {**uneven, "options": ids, "dtype": torch.float32, "tol": 1e-5},
        "four ranks, everything": {**uneven, "options": everything},
        "four ranks, everything, one way": {**uneven, "options": {**everything, "direction": "b_to_a"}},
        "four ranks, online maxima": {**uneven, "options": {**everything, "normalize": False}, "scale": 200.0},
        "four ranks, diagonal": {"world": 4, "a_rows": EVEN, "b_rows": EVEN, "options": {}},
        "two ranks, uneven diagonal": {"world": 2, "a_rows": (2, 70), "b_rows": (2, 70), "options": {}},
        "two ranks, a to b": {"world": 2, "a_rows": (2, 5), "b_rows": (2, 5), "options": {"direction": "a_to_b"}},
        "two ranks, ids": {"world": 2, "a_rows": (3, 70), "b_rows": (6, 2), "options": pair_ids},
        "four ranks, guide, ids": {**uneven, "options": {**guide, **ids}},
        "four ranks, guide, online maxima": {
            "slow": True,
            **uneven, "options": {**guide, **ids, **large, "guide_relative": True}, "scale": 200.0,
        },
        "four ranks, debias, ids": {"slow": True, **uneven, "options": {**ids, "debias": 0.1}},
        "four ranks, queue, ids": {"slow": True, **uneven, "options": {**ids, **queue_with_ids}},
        "four ranks, queue, online maxima": {
            "slow": True,
            **uneven, "options": {**ids, **queue_with_ids, **large}, "scale": 200.0,
        },
        "four ranks, debias and queue, float32": {
            **uneven, "options": together, "dtype": torch.float32, "tol": 2e-5,
        },
        "four ranks, debias and queue": {**uneven, "options": together},
        "four ranks, debias and queue, one way": {
            **uneven, "options": {**together, "direction": "b_to_a"},
        },
        "four ranks, matryoshka": {**uneven, "options": {**ids, "matryoshka": {4: 0.5, DIM: 2.0}}},
        "four ranks, debias and queue, prefixes": {
            "slow": True,
            **uneven, "options": {**together, "matryoshka": (3, 9)},
        },
        "four ranks, diagonal, debias and queue": {
            "world": 4, "a_rows": EVEN, "b_rows": EVEN, "options": {**queue, "debias": 0.05},
        },
        "two ranks, uneven diagonal, guide": {
            "world": 2, "a_rows": (2, 70), "b_rows": (2, 70),
            "options": {"teacher": (*tensors((72, 5), (72, 5), seed=7), 1.0), "guide_margin": 0.1},
        },
        "two ranks, a to b, queue": {
            "slow": True,
            "world": 2, "a_rows": (2, 5), "b_rows": (2, 5), "options": {**queue, "direction": "a_to_b"},
        },
        "four ranks, sigmoid": {**uneven, "options": ids, "loss": "sigmoid_loss"},
        "two ranks, sigmoid, diagonal": {
            "world": 2, "a_rows": (3, 4), "b_rows": (3, 4), "options": {}, "loss": "sigmoid_loss",
        },
    }  # fmt: skip


def case_inputs(case: dict[str, Any]) -> list[Tensor]:
    """The global a, b, the scale and, for the sigmoid loss, the bias, in float64."""
    a, b = tensors((sum(case["a_rows"]), DIM), (sum(case["b_rows"]), DIM))
    scalars = [torch.tensor(case.get("scale", 14.3), dtype=torch.float64)]
    if case.get("loss") == "sigmoid_loss":
        scalars.append(torch.tensor(-5.0, dtype=torch.float64))
    return [a, b, *scalars]


def run_case(case: dict[str, Any], rank: int, group: dist.ProcessGroup, backend: str = "auto") -> list[Tensor | None]:
    own = {
        "a": slice(sum(case["a_rows"][:rank]), sum(case["a_rows"][: rank + 1])),
        "b": slice(sum(case["b_rows"][:rank]), sum(case["b_rows"][: rank + 1])),
    }
    dtype = case.get("dtype", torch.float64)
    a, b, *scalars = (x.to(dtype) for x in case_inputs(case))
    leaves = [x.clone().requires_grad_() for x in (a[own["a"]], b[own["b"]], *scalars)]
    options = dict(case["options"])
    if "a_ids" in options:
        options["a_ids"], options["b_ids"] = options["a_ids"][own["a"]], options["b_ids"][own["b"]]
    if "teacher" in options:
        t_a, t_b, t_scale = options["teacher"]
        options["teacher"] = (t_a[own["a"]], t_b[own["b"]], t_scale)
    loss = sigmoid_loss if case.get("loss") == "sigmoid_loss" else info_nce
    value = loss(*leaves, process_group=group, backend=backend, **options)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def queue_after_pushes(rank: int, group: dist.ProcessGroup | None) -> list[Tensor | None]:
    """The buffers of a queue of 20 after uneven batches of four ranks (with a group), or of all of them in one."""
    queue = EmbeddingQueue(20, DIM, torch.float64, ids=True)
    for step, rows in enumerate(((1, 2, 3, 1), (4, 1, 1, 5), (1, 9, 9, 9))):
        total = sum(rows)
        own = slice(0, total) if group is None else slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        batch = [x[own] for x in (*tensors((total, DIM), (total, DIM), seed=step), *crossing_ids(total, total, 9))]
        queue.push(*batch, process_group=group)
    return [queue.a, queue.b, queue.a_ids, queue.b_ids, queue.get_extra_state()]


def model_batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Global audio [16, 6], text [16, 9] and ids that make positives across ranks."""
    audio, text = (x.to(dtype) for x in tensors((16, 6), (16, 9), seed=2))
    return audio, text, torch.arange(16) % 7, torch.arange(16) % 7


def model_gradients(how: str, rank: int, world: int, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Parameter gradients after averaging over the ranks, by hand or by DistributedDataParallel."""
    audio, text, a_ids, b_ids = (x[rank * 16 // world : (rank + 1) * 16 // world] for x in model_batch(torch.float32))
    model = make_towers(torch.float32)
    wrapped = DistributedDataParallel(model, process_group=group) if "DDP" in how else None
    module: nn.Module = wrapped if wrapped is not None else model

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return info_nce(a, b, model.log_scale.exp(), a_ids=a_ids, b_ids=b_ids, process_group=group)

    if "cached" in how:
        cache = GradCache(
            [lambda x: module(audio=x), lambda x: module(text=x)],
            3 if world == 2 else (1 + rank),
            loss,
            modules=[module],
        )
        cache(audio, text)
    else:
        loss(module(audio=audio), module(text=text)).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if wrapped is None:
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= world
        gradients[name] = parameter.grad
    return gradients


MODEL_WAYS = ("plain", "cached", "DDP plain", "DDP cached")


def open_clip_loss(a: Tensor, b: Tensor, scale: Tensor, rank: int, local_loss: bool, gather_with_grad: bool) -> Tensor:
    """The arithmetic of open_clip's ClipLoss in its four distributed modes, written out."""
    from torch.distributed.nn.functional import all_gather

    def gather(x: Tensor) -> Tensor:
        if gather_with_grad:
            return torch.cat(all_gather(x))
        parts = [torch.empty_like(x) for _ in range(WORLD)]
        dist.all_gather(parts, x.detach())
        if not local_loss:
            parts[rank] = x
        return torch.cat(parts)

    all_a, all_b = gather(a), gather(b)
    if local_loss:
        labels = torch.arange(a.shape[0]) + rank * a.shape[0]
        logits = scale * a @ all_b.t(), scale * b @ all_a.t()
    else:
        labels = torch.arange(all_a.shape[0])
        logits = scale * all_a @ all_b.t(), scale * all_b @ all_a.t()
    return (F.cross_entropy(logits[0], labels) + F.cross_entropy(logits[1], labels)) / 2


def open_clip_modes(rank: int) -> dict[str, list[Tensor | None]]:
    results: dict[str, list[Tensor | None]] = {}
    a, b = (F.normalize(x, dim=1)[rank * 4 : rank * 4 + 4] for x in tensors((16, DIM), (16, DIM)))
    for local_loss in (False, True):
        for gather_with_grad in (False, True):
            module = ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=WORLD)
            for name in ("ours", "theirs"):
                leaves = [x.clone().requires_grad_() for x in (a, b, torch.tensor(9.0, dtype=torch.float64))]
                if name == "ours":
                    value = module(*leaves)
                else:
                    value = open_clip_loss(*leaves, rank, local_loss, gather_with_grad)
                value.backward()
                results[f"{name} {local_loss} {gather_with_grad}"] = [value.detach(), *(leaf.grad for leaf in leaves)]
    value = SigLipLoss(rank=rank, world_size=WORLD)(image_features=a, text_features=b, logit_scale=9.0, logit_bias=-5.0)
    results["SigLipLoss"] = [value]
    return results


def disagreements(rank: int) -> dict[str, str]:
    """What each rank is told when rank 1 passes something else than the others."""
    odd = rank == 1
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    group = dist.group.WORLD
    ids = {"a_ids": torch.arange(3), "b_ids": torch.arange(3)}
    teacher = {"teacher": (a, b, 1.0), "teacher_weight": 0.5}
    calls: dict[str, Callable[[], Any]] = {
        "embedding size": lambda: info_nce(a[:, : 4 - odd], b[:, : 4 - odd], 5.0, process_group=group),
        "dtype of a": lambda: info_nce(a.bfloat16() if odd else a.half(), b, 5.0, process_group=group),
        "direction": lambda: info_nce(a, b, 5.0, direction="a_to_b" if odd else "both", process_group=group),
        "use of ids": lambda: info_nce(a, b, 5.0, process_group=group, **(ids if odd else {})),
        "teacher": lambda: info_nce(a, b, 5.0, process_group=group, **(teacher if odd else {})),
        "label_smoothing": lambda: info_nce(a, b, 5.0, label_smoothing=0.1 * odd, process_group=group),
        "debias": lambda: info_nce(a, b, 5.0, debias=0.1 * odd, process_group=group),
        "guide": lambda: info_nce(
            a, b, 5.0, teacher=(a, b, 1.0), guide_margin=0.1, guide_relative=odd, process_group=group
        ),
        "matryoshka": lambda: info_nce(a, b, 5.0, matryoshka=(2, 3 + odd), process_group=group),
        "queue": lambda: info_nce(a, b, 5.0, queue=QueueRows(a, b[odd:]), process_group=group),
        "no queue": lambda: info_nce(a, b, 5.0, queue=None if odd else QueueRows(a, b), process_group=group),
        "width": lambda: info_nce(a, b, 5.0, matryoshka=(4 + odd,), process_group=group),
        "push": lambda: EmbeddingQueue(5, 4 + odd).push(a, b, process_group=group),
        "push of another size": lambda: EmbeddingQueue(5, 4 - odd).push(a[:, odd:], b[:, odd:], process_group=group),
        "push and loss": lambda: (
            EmbeddingQueue(5, 4).push(a, b, process_group=group) if odd else info_nce(a, b, 5.0, process_group=group)
        ),
        "loss": lambda: (
            sigmoid_loss(a, b, 5.0, 0.0, process_group=group) if odd else info_nce(a, b, 5.0, process_group=group)
        ),
        "gradients": lambda: info_nce(a.clone().requires_grad_(odd), b, 5.0, process_group=group),
        "integers": lambda: info_nce(a.long() if odd else a, b, 5.0, process_group=group),
        "empty": lambda: info_nce(a[: 0 if odd else 3], b, 5.0, process_group=group),
        "rows": lambda: info_nce(a, b[: 2 if odd else 3], 5.0, process_group=group),
        "no positive": lambda: info_nce(
            a, b, 5.0, a_ids=torch.zeros(3).long(), b_ids=torch.ones(3).long(), process_group=group
        ),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
            told[name] = "no error"
        except (TypeError, ValueError) as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def exchanges(rank: int, group: dist.ProcessGroup, fresh: dist.ProcessGroup) -> dict[str, Any]:
    """Of calls one after the other in a group of two: how many exchanged row counts and options, and what they gave.

    `fresh` is another group of the same ranks, in which there has been no call.
    """
    results: dict[str, Any] = {}

    def call(name: str, loss: Callable[..., Tensor], rows: tuple[int, int], **options: Any) -> None:
        own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        leaves = [x[own].requires_grad_() for x in tensors((sum(rows), DIM), (sum(rows), DIM))]
        leaves += [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (9.0, -5.0)[: 1 + sigmoid(loss)]]
        ids = torch.arange(sum(rows))[own] % 4
        with mock.patch.object(shared, "_gather_headers", wraps=shared._gather_headers) as counted:
            try:
                value = loss(*leaves, a_ids=ids, b_ids=ids, **{"process_group": group, **options})
                value.backward()
                found: Any = [value.detach(), *(leaf.grad for leaf in leaves)]
            except (TypeError, ValueError) as error:
                found = f"{type(error).__name__}: {error}"
        results[name] = counted.call_count, found

    def sigmoid(loss: Callable[..., Tensor]) -> bool:
        return loss is sigmoid_loss or loss is compiled_sigmoid

    compiled, compiled_sigmoid = (
        torch.compile(lambda *x, loss=loss, **o: loss(*x, **o), backend="aot_eager", fullgraph=True)
        for loss in (info_nce, sigmoid_loss)
    )
    for loss in (info_nce, sigmoid_loss):
        name = loss.__name__
        call(f"{name}, not promised", loss, (3, 5))
        call(f"{name}, not promised again", loss, (3, 5))
        call(f"{name}, first", loss, (3, 5), agree_once=True)
        call(f"{name}, second", loss, (3, 5), agree_once=True)
        call(f"{name}, other rows", loss, (6, 2), agree_once=True)
        call(f"{name}, other rows again", loss, (6, 2), agree_once=True)
        call(f"{name}, the rows of before", loss, (3, 5), agree_once=True)
        call(f"{name}, without normalize", loss, (3, 5), agree_once=True, normalize=False)
        call(f"{name}, in another group", loss, (3, 5), agree_once=True, process_group=fresh)
    for name, loss in (("info_nce", compiled), ("sigmoid_loss", compiled_sigmoid)):
        call(f"{name}, compiled", loss, (3, 5))
        call(f"{name}, compiled, promised", loss, (3, 5), agree_once=True)
        call(f"{name}, compiled, other rows, not promised", loss, (4, 4))
        call(f"{name}, compiled, other rows", loss, (4, 4), agree_once=True)
        call(f"{name}, compiled, other rows again", loss, (4, 4), agree_once=True)
    # Row counts of one rank alone change: nothing that could be promised.
    call("info_nce, one rank's rows", info_nce, (3, 6))
    call("info_nce, promise of one rank", info_nce, (7, 7), agree_once=rank == 0)
    third = dist.new_group([0, 1], use_local_synchronization=True)
    call(
        "info_nce, rejected at first",
        info_nce,
        (3, 5),
        label_smoothing=2.0 * rank,
        agree_once=True,
        process_group=third,
    )
    if rank:  # rank 0 would wait for it, so nobody else is told
        call("info_nce, rejected later", info_nce, (3, 5), label_smoothing=2.0, agree_once=True)
    return results


def worker(rank: int, folder: Path, triton: bool) -> None:
    torch.set_num_threads(1)
    torch_engine.CPU_CHUNK_BYTES = 1  # several chunks on the larger ranks
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    groups, fresh = {2: dist.new_group([0, 1]), 4: dist.group.WORLD}, dist.new_group([0, 1])
    results: dict[str, Any] = {}
    for name, case in loss_cases().items():
        if rank < case["world"] and not (triton and ("dtype" in case or "slow" in case)):
            how = {**case, "dtype": torch.float32} if triton else case  # all cases are float32 then
            results[name] = run_case(how, rank, groups[case["world"]], "triton" if triton else "auto")
    if not triton:
        results |= {"told": disagreements(rank), "open_clip": open_clip_modes(rank)}
        results["queue"] = queue_after_pushes(rank, dist.group.WORLD)
        if rank < 2:
            results["exchanges"] = exchanges(rank, groups[2], fresh)
        for world, group in groups.items():
            if rank < world:
                for way in MODEL_WAYS:
                    results[f"model {world} {way}"] = model_gradients(way, rank, world, group)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    folder, triton = Path(sys.argv[1]), "triton" in sys.argv[2:]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=worker, args=(rank, folder, triton)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    quick_interpreter.install()
    main()
