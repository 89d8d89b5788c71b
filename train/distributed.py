"""One process or many: the same loop, with gradients averaged once a step.

The loop does not wrap the model in DistributedDataParallel. With gradient caching most backward passes must not
communicate at all, and the step needs three more numbers agreed across ranks (is every loss finite, does someone want
to stop); so gradients are flattened per dtype and averaged in one all-reduce at the end of the step, the flags riding
along. The order of summation is fixed, which keeps resumed runs bit-identical.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastclap.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Who this process is among the training processes."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None  # None in a single process

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join(device: str = "auto") -> World:
    """Enter the process group that torchrun describes in the environment, or stay alone.

    nccl serves GPUs and gloo CPUs. Each process takes the GPU of its LOCAL_RANK.
    """
    if device not in ("auto", "cpu") and not device.startswith("cuda"):
        raise ConfigError(f"--device is {device!r}; use auto, cpu, cuda or cuda:N")
    on_gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError(f"--device is {device!r}, but torch sees no CUDA GPU; use --device cpu")
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if not on_gpu:
        chosen = torch.device("cpu")
    elif size > 1 or device in ("auto", "cuda"):
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    else:
        chosen = torch.device(device)
    if on_gpu:
        torch.cuda.set_device(chosen)
    if size == 1:
        return World(0, 1, chosen, None)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=timedelta(minutes=30), device_id=chosen if on_gpu else None
    )
    return World(rank, size, chosen, dist.group.WORLD)


def leave(world: World) -> None:
    if world.group is not None and dist.is_initialized():
        dist.destroy_process_group()


def broadcast_weights(model: nn.Module, world: World) -> None:
    """Give every rank the weights and buffers of rank 0."""
    if world.group is not None:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0, group=world.group)


def average_gradients(parameters: Iterable[nn.Parameter], flags: Tensor, world: World) -> Tensor:
    """Average ``.grad`` over the ranks in place and return the flags summed over the ranks.

    Args:
        parameters: every parameter under training, in the same order on each rank. A parameter that took no part on
            this rank counts as a zero gradient, and receives the average all the same.
        flags: float32 vector on the training device, summed across ranks.
    """
    if world.group is None:
        return flags
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    pending = []
    for group in by_dtype.values():
        gradients = [parameter.grad for parameter in group if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        pending.append((gradients, flat, dist.all_reduce(flat, group=world.group, async_op=True)))
    flags = flags.clone()
    dist.all_reduce(flags, group=world.group)
    for gradients, flat, work in pending:
        work.wait()
        flat.div_(world.size)
        pieces = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients, [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]
        )
    return flags


def agree(value: T, world: World) -> T:
    """Rank 0's value on every rank (a small picklable object)."""
    if world.group is None:
        return value
    box = [value]
    dist.broadcast_object_list(
        box, src=0, group=world.group, device=world.device if world.device.type == "cuda" else None
    )
    return box[0]


def barrier(world: World) -> None:
    if world.group is not None:
        dist.barrier(group=world.group)
