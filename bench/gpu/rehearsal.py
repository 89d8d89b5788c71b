"""Which kernels a call would compile on a GPU that is not there, in Triton and in CUDA C++.

The call is an ordinary one of the public functions, on CPU tensors. While it runs, `fastclap.kernels.dispatch` finds a
GPU and Triton a driver, which happens here and nowhere else. Launchers then take their usual way down to Triton's own
treatment of the arguments, with its key for the cache; instead of compiling, the key is recorded, and the kernel does
nothing. Uninitialised tensors, which kernels would have filled, are zeros in the meantime.

A key depends on dtypes, on constants, on whether addresses and some strides are multiples of 16, and on whether an
integer is 1 or beyond 32 bits; so small tensors lead to the same keys as large ones whose strides are as divisible.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastclap.kernels import dispatch
from fastclap.kernels.contrastive import triton_engine
from fastclap.kernels.log_mel import cuda_engine
from fastclap.kernels.log_mel.spec import LogMelSpec
from fastclap.kernels.offline import Compilation, cache_key, operator_name

MULTIPROCESSORS = 132  # of an H100 or H200


class CudaForm(NamedTuple):
    """A form of the log-mel kernel in CUDA C++."""

    name: str
    spec: LogMelSpec
    dtype: torch.dtype
    masks: bool

    @property
    def key(self) -> str:
        """Of all forms whose numbers alone differ."""
        return " ".join(cuda_engine.options(self.spec, self.dtype, self.masks))


def launched(call: Callable[[], Any], arch: int) -> dict[str, Compilation | CudaForm]:
    """What the launches of a call would compile on a GPU of compute capability `arch` (80, 90, 100), by cache key.

    The call's own result means nothing. Caches of this process are left as they were.

    Raises:
        RuntimeError: a launch has options for which `Compilation` has no field, or kernels are interpreted.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("under TRITON_INTERPRET=1 kernels are interpreted: nothing would be compiled")
    found: dict[str, Compilation | CudaForm] = {}
    touched: set[JITFunction[Any]] = set()

    def compile_nothing(
        self: JITFunction[Any],
        key: str,
        signature: Any,
        device: Any,
        constexprs: Any,
        options: Any,
        attrs: Any,
        _: bool,
    ) -> _NoKernel:
        kernels, _, _, backend, _ = self.device_caches[device]
        touched.add(self)
        found.update([_recorded(self, signature, constexprs, options, attrs, backend, arch)])
        kernels[key] = _NoKernel()
        return kernels[key]

    def load_nothing(spec: LogMelSpec, dtype: torch.dtype, masks: bool, device: torch.device) -> _NoKernel:
        form = CudaForm("log_mel log_mel", spec, dtype, masks)
        found[form.key] = form
        return _NoKernel()

    gpu = NoGpu(arch)
    try:
        with (
            as_on_gpu(gpu),
            mock.patch.object(JITFunction, "_do_compile", compile_nothing),
            mock.patch.object(cuda_engine, "_load", load_nothing),
        ):
            call()
    finally:
        for function in touched:
            del function.device_caches[gpu]
    return found


class NoGpu:
    """A driver for Triton of a GPU that is not there. It is its own device, so that its kernels stay apart."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> NoGpu:
        return self

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _NoKernel:
    """In place of a triton.compiler.CompiledKernel or a `cuda_tools.Kernel`."""

    function = packed_metadata = None

    def launch_metadata(self, *_: object) -> None:
        return None

    def run(self, *_: object) -> None:
        return None

    launch = run

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.run


@contextlib.contextmanager
def as_on_gpu(gpu: NoGpu) -> Iterator[None]:
    """Inside it operators with Triton kernels take all tensors to be on that GPU, which is Triton's driver too."""
    from triton.runtime.driver import driver

    def zeroed(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def call(*args: Any, **options: Any) -> torch.Tensor:
            return make(*args, **options).zero_()

        return call

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", gpu))
        for name, answer in (
            ("on_gpu", True),
            ("architecture", gpu.target.arch),
            ("multiprocessors", MULTIPROCESSORS),
        ):
            stack.enter_context(mock.patch.object(dispatch, name, lambda _, answer=answer: answer))
        stack.enter_context(mock.patch.object(cuda_engine, "_load", lambda *_: _NoKernel()))
        cuda_engine._plan.cache_clear()
        stack.callback(cuda_engine._plan.cache_clear)
        # What it compiles is launched right after it, and so found there.
        stack.enter_context(mock.patch.object(triton_engine, "_compile_ahead", lambda *_: None))
        for where, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch.Tensor, "new_empty"),
        ):
            stack.enter_context(mock.patch.object(where, name, zeroed(getattr(where, name))))
        yield


def _recorded(
    function: JITFunction[Any],
    signature: dict[str, Any],
    constexprs: dict[tuple[int, ...], Any],
    options: Any,
    attrs: dict[tuple[int, ...], Any],
    backend: Any,
    arch: int,
) -> tuple[str, Compilation]:
    """The key of a launch, and the compilation that has it."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import ASTSource
    from triton.runtime.cache import get_cache_key

    source = ASTSource(function, signature, constexprs, attrs)
    name = function.__name__.strip("_").removesuffix("_kernel")
    compilation = Compilation(
        name=f"{operator_name(function.__module__)} {name}",
        function=function,
        signature=signature,
        constexprs={function.arg_names[index]: value for (index,), value in constexprs.items()},
        attrs=attrs,
        num_warps=options.num_warps,
        num_stages=options.num_stages,
        matrix_instruction=False,
        maxnreg=options.maxnreg,
    )
    key = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
    key = hashlib.sha256(key.encode()).hexdigest()
    if key != cache_key(compilation, arch):
        raise RuntimeError(f"{name}: a launch has another key than its compilation, of the options {options}")
    return key, compilation
