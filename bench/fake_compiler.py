"""torch.compile on tensors without data, without a GPU: what its kernels would read and write.

A graph goes through all of torch's compiler as for an H100, up to the kernels that it would generate: which operations
become one, what is computed again in the backward pass rather than kept. No code is generated; the graph then runs
operation by operation, on tensors without data, and says which kernels would have run.

The bytes of a kernel are torch's own count (`get_read_write_buffers_sizes`): each tensor that it reads or writes once,
as far as it uses it, for the sizes with which the graph was first called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, graph, scheduler
from torch._inductor import config as inductor
from torch._ops import OpOverload

from bench.fake_gpu import ARCHITECTURE, MULTIPROCESSORS

PROPERTIES = SimpleNamespace(  # of an H100, as far as torch's compiler asks
    name="NVIDIA H100 80GB HBM3",
    major=ARCHITECTURE // 10,
    minor=ARCHITECTURE % 10,
    total_memory=80 << 30,
    multi_processor_count=MULTIPROCESSORS,
    regs_per_multiprocessor=1 << 16,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=227 << 10,
    warp_size=32,
    L2_cache_size=50 << 20,
)


class Kernel(NamedTuple):
    """One of a compiled graph.

    Attributes:
        name: the operation, or of a generated kernel those that it fuses.
        bytes: that it reads and writes.
        node: of the graph, where the kernel is an operation of its own.
    """

    name: str
    bytes: int
    node: torch.fx.Node | None


class Graph:
    """A compiled graph: calls run its operations without data.

    Args:
        lowered: after all of torch's passes.
        observe: is given the graph and its inputs, and runs it.
    """

    __file__, key = "", ""  # what torch asks of a generated module

    def __init__(self, lowered: graph.GraphLowering, observe: Callable[[Graph, list[Any]], Any]) -> None:
        lowered._update_scheduler()
        self.kernels = [kernel for node in lowered.scheduler.nodes if (kernel := _kernel(node)).bytes]
        self.module: torch.fx.GraphModule = lowered.module
        self._observe = observe
        self._sizes: list[Any] = []

    def call(self, inputs: list[Any]) -> Any:
        """What torch calls, with a list that is emptied so that its tensors can be freed."""
        given = list(inputs)
        inputs.clear()
        sizes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in given]
        if self._sizes not in ([], sizes):
            raise NotImplementedError(
                f"a graph compiled for {self._sizes} is called with {sizes}; bytes are of the first"
            )
        self._sizes = sizes
        return self._observe(self, given)


def _kernel(node: Any) -> Kernel:
    origins = {origin for part in node.get_nodes() for origin in part.node.origins}
    calls = {
        origin: origin.target.overloadpacket.__name__ for origin in origins if isinstance(origin.target, OpOverload)
    }
    num_bytes = node.get_read_write_buffers_sizes()
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        own = node.node.get_origin_node() or next(
            (call for call in calls if call.target is node.node.op_overload), None
        )
        if own in calls:
            return Kernel(calls[own], num_bytes, own)
    return Kernel(f"compiled: {', '.join(sorted(set(calls.values())))}", num_bytes, None)


def _device_questions() -> Iterator[tuple[Any, str, Any]]:
    """Where torch's compiler would ask the device or look for its tools."""
    yield scheduler, "has_triton", lambda: True
    yield torch.cuda, "get_device_properties", lambda *_: PROPERTIES
    yield CudaInterface, "get_device_properties", staticmethod(lambda *_: PROPERTIES)
    yield CudaInterface, "get_compute_capability", staticmethod(lambda *_: ARCHITECTURE)
    yield CudaInterface, "is_bf16_supported", staticmethod(lambda *_, **__: True)
    yield compile_fx, "get_input_idxs_to_check", lambda *_: []  # tensors without data have no address to be aligned


@contextlib.contextmanager
def fake_compiler(observe: Callable[[Graph, list[Any]], Any]) -> Iterator[None]:
    """Within `bench.fake_gpu.fake_gpu`: torch.compile makes a `Graph` of each, which `observe` runs."""
    with contextlib.ExitStack() as stack:
        # Folding constants asks for their values.
        stack.enter_context(inductor.patch(force_disable_caches=True, joint_graph_constant_folding=False))
        instead = mock.patch.object(graph.GraphLowering, "compile_to_module", lambda lowered: Graph(lowered, observe))
        for patch in (instead, *(mock.patch.object(*question) for question in _device_questions())):
            stack.enter_context(patch)
        stack.callback(torch._dynamo.reset)
        torch._dynamo.reset()
        yield
