"""One process or many: the same loop, with gradients averaged while the backward pass still runs.

The loop does not wrap the model in DistributedDataParallel. With gradient caching most backward passes must not
communicate at all, and the step needs more numbers agreed across ranks (whether every loss is finite, whether a rank
wants to stop, the norm of sharded gradients); `Gradients` does all of it. Buckets and their order follow from the model
alone and not from a first backward pass, so the order of summation is fixed, which keeps resumed runs bit-identical.

Towers that do not fit into one device can be sharded (FSDP2): each rank then holds one part of their weights, gradients
and optimizer state. Everything else is replicated as before. A step of one backward pass gathers the weights of a layer
at a time, for its forward and again for its backward pass. One of several backward passes (chunks of the gradient
cache, accumulation) has to keep whole gradients until the last of them, and so keeps the weights whole as well: they
are gathered once, whatever the number of chunks.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastclap.errors import ConfigError
from fastclap.models.layers import layer_lists

T = TypeVar("T")

_POLL_SECONDS = 2.0  # between two looks at whether another rank has stopped
_GRACE_SECONDS = 20.0  # for a rank to stop by itself when another has

# As in DistributedDataParallel: large enough for full bandwidth, small enough to overlap; and what leaves last, when
# nothing is left to overlap with, is small.
_BUCKET_BYTES, _LAST_BUCKET_BYTES = 25 << 20, 1 << 20


@dataclass(frozen=True)
class World:
    """Who this process is among the training processes."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None  # None in a single process
    alarm: Alarm | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class Alarm:
    """Lets every rank know why one of them stops, and stops those that cannot do so themselves.

    A collective of gloo fails as soon as a process is gone, and the rank then finds the reason here. One of NCCL goes
    on waiting on the device, and the main thread with it: a thread of its own prints the reason and ends the process.

    Args:
        store: that all ranks share.
        rank, size: of this process, and how many there are.

    Attributes:
        saving: held while this rank saves what it has reached; the process is not ended then.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._reason: str | None = None
        self._closed, self.saving = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="alarm", daemon=True)
        self._thread.start()

    def sound(self, reason: str) -> None:
        """Tell all ranks that this one stops; the first reason stands."""
        with contextlib.suppress(RuntimeError):  # nobody is left to be told
            self._store.compare_set("reason", "", reason)
            self.reason()

    def reason(self) -> str | None:
        """Why a rank has stopped; None: none has, or the store is gone with its process."""
        with contextlib.suppress(RuntimeError):
            if self._reason is None and self._store.check(["reason"]):
                self._reason = self._store.get("reason").decode()
                self._store.add("heard", 1)
        return self._reason

    def close(self) -> None:
        """The process is about to end. Where the store is in it, others get a while to read the reason."""
        self._closed.set()
        # Python ends daemon threads by force, and one that is just asking the store would take the process with it.
        self._thread.join(_GRACE_SECONDS)
        if self._rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or self.reason() is None:
            return
        end = time.monotonic() + _GRACE_SECONDS
        with contextlib.suppress(RuntimeError):
            while self._store.add("heard", 0) < self._size and time.monotonic() < end:
                time.sleep(0.05)

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            reason = self.reason()
            if reason is not None:
                while not self._closed.wait(_GRACE_SECONDS):
                    if self.saving.acquire(blocking=False):
                        print(f"rank {self._rank} stops with another: {reason}", file=sys.stderr, flush=True)
                        os._exit(2)
                return


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
    # Processes that torchrun starts again must not find the addresses of those before them.
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=30)))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore(f"attempt-{attempt}", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=30),
        device_id=chosen if on_gpu else None,
    )
    alarm = Alarm(dist.PrefixStore(f"alarm-{attempt}", store), rank, size)
    return World(rank, size, chosen, dist.group.WORLD, alarm)


def leave(world: World) -> None:
    if world.group is not None and dist.is_initialized():
        dist.destroy_process_group()
    if world.alarm is not None:
        world.alarm.close()


def end_process(status: int) -> NoReturn:
    """End the process of a rank as Python would, except that the interpreter is not taken apart.

    A thread of gloo that lets go of the tensor of a finished collective needs Python for it. If Python is ending then,
    it ends that thread instead, in the middle of a destructor, and C++ answers with "terminate called without an active
    exception". The last barrier of a run is the usual place. Destroying the process group joins the threads only once
    nothing refers to it, and caches, FSDP and what autograd holds do so to the end.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a reader that has gone, a closed stream
            stream.flush()
    os._exit(status)


def is_lost_connection(error: Exception, world: World) -> bool:
    """Whether a collective failed because another process is gone."""
    if world.group is None or not isinstance(error, RuntimeError):
        return False
    signs = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def broadcast_weights(model: nn.Module, world: World) -> None:
    """Give every rank the weights and buffers of rank 0."""
    if world.group is not None:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0, group=world.group)


class _Bucket:
    """Gradients that are averaged together: views of one flat buffer."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        first = parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        self.views = [
            piece.view_as(p)
            for p, piece in zip(parameters, self.flat.split([p.numel() for p in parameters]), strict=True)
        ]
        self.waiting = len(parameters)
        self.work: Any = None


def _in_buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """What is sent together, in the order of sending, of parameters in the order in which their gradients arrive.

    A bucket has one dtype and device, and exceeds its size only where one parameter does. They are filled from the end,
    so that the last is the small one, and a remainder goes early.
    """
    buckets: list[list[nn.Parameter]] = []  # in the order of their last members, backwards
    filling: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in reversed(parameters):
        kind = (parameter.dtype, parameter.device)
        members = filling.get(kind)
        limit = _LAST_BUCKET_BYTES if buckets and members is buckets[0] else _BUCKET_BYTES
        if members is None or sum(p.numel() * p.element_size() for p in [*members, parameter]) > limit:
            filling[kind] = members = []
            buckets.append(members)
        members.append(parameter)
    return [members[::-1] for members in buckets[::-1]]


class Gradients:
    """The gradients of a step: averaged over the ranks, measured, clipped and cleared.

    In several processes the gradients live in a few flat buffers, and each buffer's all-reduce starts as soon as the
    backward pass has filled it. Inside `held()` nothing is sent: gradients of several backward passes add up, and the
    last pass, outside of it, sends their sum. Sharded parameters are averaged by FSDP itself; from the first `held()`
    to that last pass they stay gathered.

    Args:
        parameters: every parameter under training, in the order in which a backward pass gives them their gradients,
            the same on each rank. Another order costs time and nothing else. A parameter that took no part on this rank
            counts as a zero gradient, and receives the average all the same.
        world: this process.
        sharded: what `shard` returns: modules that communicate by themselves unless gradients are held.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World, sharded: Iterable[Any] = ()) -> None:
        self._world = world
        self._sharded = list(sharded)
        self._held = 0
        self._hooks: list[Any] = []
        self.take(parameters)

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Begin with these parameters, between two steps: more or fewer of them train from now on."""
        for hook in self._hooks:
            hook.remove()
        self._parameters = list(parameters)
        self._next = 0  # first bucket that has not been sent; the order is the same on every rank
        sent = [] if self._world.group is None else [p for p in self._parameters if not is_sharded(p)]
        self._buckets = [_Bucket(members) for members in _in_buckets(sent)]
        self._hooks = []
        for bucket in self._buckets:
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                parameter.grad = view
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._accumulation_hook(bucket)))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Backward passes inside the block add to the gradients without sending them."""
        self._held += 1
        self._hold_sharded(True)
        try:
            yield
        finally:
            self._held -= 1
            self._hold_sharded(self._held > 0)

    def finish(
        self,
        flags: Tensor,  # float32 [flags]
        clip_norm: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Complete the averages, then scale all gradients so that their norm is at most `clip_norm` (0: as it is).

        Returns:
            The flags summed over the ranks, and the norm of all gradients before clipping, both on the device.
        """
        while self._next < len(self._buckets):
            self._send_next()
        for module in self._sharded:  # also what took no part in the last pass, such as a frozen tower
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()
        for bucket in self._buckets:
            bucket.work.wait()
            bucket.flat.div_(self._world.size)
        shards = [local(p.grad) for p in self._parameters if p.grad is not None and is_sharded(p)]
        whole = [bucket.flat for bucket in self._buckets] or [
            p.grad for p in self._parameters if p.grad is not None and not is_sharded(p)
        ]
        if self._world.group is not None:
            sums = torch.cat([flags, _square_sum(shards, flags.device).reshape(1)])
            dist.all_reduce(sums, group=self._world.group)
            flags, shard_sum = sums[:-1], sums[-1]
        else:
            shard_sum = torch.zeros((), device=flags.device)
        norm = (_square_sum(whole, flags.device) + shard_sum).sqrt()
        gradients = [local(p.grad) for p in self._parameters if p.grad is not None]
        if clip_norm and gradients:
            torch._foreach_mul_(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return flags, norm

    def clear(self) -> None:
        """Forget the gradients of the step."""
        for bucket in self._buckets:
            bucket.flat.zero_()
            bucket.waiting, bucket.work = len(bucket.parameters), None
        self._next = 0
        for parameter in self._parameters:
            if not self._buckets or is_sharded(parameter):
                parameter.grad = None

    def _accumulation_hook(self, bucket: _Bucket) -> Callable[[nn.Parameter], None]:
        def note_gradient(parameter: nn.Parameter) -> None:
            if self._held:
                return
            bucket.waiting -= 1
            while self._next < len(self._buckets) and not self._buckets[self._next].waiting:
                self._send_next()

        return note_gradient

    def _send_next(self) -> None:
        bucket = self._buckets[self._next]
        # Whoever set a gradient aside and put another tensor in its place (a retry after running out of memory) has
        # left the buffer.
        for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
            if parameter.grad is not view:
                view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
                parameter.grad = view
        bucket.work = dist.all_reduce(bucket.flat, group=self._world.group, async_op=True)
        self._next += 1

    def _hold_sharded(self, hold: bool) -> None:
        for module in self._sharded:
            module.set_requires_gradient_sync(not hold, recurse=False)
            module.set_reshard_after_backward(not hold, recurse=False)
            if hold:  # until `finish`: the last pass finds the weights gathered
                module.set_reshard_after_forward(False, recurse=False)


def _square_sum(tensors: list[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]).square().sum()


def shard(towers: Iterable[nn.Module], world: World) -> list[Any]:
    """Split the parameters of each tower over the ranks (FSDP2): layer by layer, then what is left.

    Returns:
        The layers and the towers as FSDP modules.

    Raises:
        ConfigError: there is only one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if world.group is None:
        raise ConfigError("--shard splits the towers over several processes; start them with torchrun")
    mesh = init_device_mesh(world.device.type, (world.size,))
    sharded: list[Any] = []
    for tower in towers:
        replicated = {p for module in tower.modules() for p in getattr(module, "used_from_outside", ())}
        for layer in itertools.chain.from_iterable(layer_lists(tower)):
            sharded.append(fully_shard(layer, mesh=mesh, ignored_params=replicated))
        # Without resharding, an evaluation with averaged weights would leave copies of them behind.
        sharded.append(fully_shard(tower, mesh=mesh, reshard_after_forward=True, ignored_params=replicated))
    return sharded


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with sharded ones put together. Where some are, every rank has to call this."""
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def placed_like(model: Tensor, value: Tensor) -> Tensor:
    """`value`, whole and the same on every rank, as a tensor that is placed and sharded as `model` is."""
    value = value.to(model.device)
    if isinstance(model, DTensor) and value.shape == model.shape:
        return distribute_tensor(value, model.device_mesh, model.placements, src_data_rank=None)
    return value


def agree(choose: Callable[[], T], world: World) -> T:
    """What rank 0 chooses, on every rank (a small picklable object)."""
    box: list[Any] = [choose() if world.is_main else None]
    if world.group is None:
        return box[0]
    dist.broadcast_object_list(
        box, src=0, group=world.group, device=world.device if world.device.type == "cuda" else None
    )
    return box[0]


def least(number: int, world: World) -> int:
    """The smallest of the ranks' numbers."""
    if world.group is None:
        return number
    box = torch.tensor(number, device=world.device)
    dist.all_reduce(box, dist.ReduceOp.MIN, group=world.group)
    return int(box)


def barrier(world: World) -> None:
    if world.group is not None:
        dist.barrier(group=world.group)
