"""CUDA C++ kernels without a CUDA toolkit: compiled by the NVRTC that comes with torch, loaded by NVIDIA's driver.

Both libraries are called through ctypes. What is compiled is kept on disk, in $FASTCLAP_CACHE/cuda, by its source,
options, architecture and compiler, so that it is compiled once on a machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fastclap.files import cache_folder, write_atomic

KIND = "cuda"  # of what is kept
_MAX_DYNAMIC_SHARED_SIZE, _SHARED_CARVEOUT = 8, 9  # of CUfunction_attribute
_compiling = threading.Lock()


class CudaError(RuntimeError):
    """Kernels cannot be compiled or loaded here; the message says why."""


@functools.cache
def warn_once(message: str) -> None:
    """A RuntimeWarning, each message once in a process."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)


# ---------------------------------------------------------------------------------------------------------------------
# the compiler


class _Nvrtc:
    """The compiler: its library, and the version and architectures that it says it has."""

    def __init__(self, path: str) -> None:
        with contextlib.suppress(OSError):  # found by the compiler itself, where it lies beside that
            for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so*")):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        architectures = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", architectures)
        self.architectures = tuple(architectures)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise CudaError(f"{name}: {self._library.nvrtcGetErrorString(code).decode()}")

    def _text(self, kind: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{kind}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{kind}", program, text)
        return text.raw

    def compile(self, source: str, name: str, options: Sequence[str]) -> bytes:
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        try:
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            try:
                self._call("nvrtcCompileProgram", program, len(options), given)
            except CudaError as error:
                log = " ".join(self._text("ProgramLog", program).rstrip(b"\0").decode(errors="replace").split())
                raise CudaError(f"{name} does not compile: {log[:500] or error}") from None
            return self._text("CUBIN", program)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))


def _nvrtc_libraries() -> Iterator[str]:
    """Paths and names under which NVRTC may be found: of torch's own CUDA first."""
    version = (torch.version.cuda or "").split(".")[0]
    root = Path(torch.__file__).parent
    for folder in (root.parent / "nvidia", root / "lib"):
        found = [str(path) for path in folder.glob("**/libnvrtc*.so*") if not {"builtins", "alt"} & set(_words(path))]
        yield from sorted(found, key=lambda path: not path.endswith(f".so.{version}"))
    yield from (f"libnvrtc.so.{version}", "libnvrtc.so")


def _words(path: Path) -> list[str]:
    return path.name.replace("-", ".").split(".")


@functools.cache
def _nvrtc() -> _Nvrtc:
    reasons = []
    for path in _nvrtc_libraries():
        try:
            return _Nvrtc(path)
        except (OSError, AttributeError, CudaError) as error:
            reasons.append(str(error))
    raise CudaError(f"NVRTC, CUDA's compiler at run time, cannot be loaded: {reasons[0]}")


def compiler_version() -> str:
    """Of NVRTC.

    Raises:
        CudaError: it cannot be loaded.
    """
    return _nvrtc().version


def why_no_compiler() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    try:
        compiler_version()
    except CudaError as error:
        return str(error)
    return None


def compile_cubin(source: str, name: str, options: Sequence[str], arch: int) -> bytes:
    """Machine code for compute capability `arch` (80, 90, ...), from the cache or compiled and put there.

    Args:
        source: CUDA C++17.
        name: of the source in messages.
        options: of NVRTC, such as "-DN=3".
        arch: an architecture of the compiler's.

    Raises:
        CudaError: there is no compiler, it does not know the architecture, or the source has an error.
    """
    with _compiling:
        file, every = _named(source, options, arch)
        code = _kept(file)
        if code is None:
            code = _nvrtc().compile(source, name, every)
            _keep(file, code)
        return code


def is_compiled(source: str, options: Sequence[str], arch: int) -> bool:
    """Whether the cache has what `compile_cubin` would be asked for.

    Raises:
        CudaError: there is no compiler, or it does not know the architecture.
    """
    return _kept(_named(source, options, arch)[0]) is not None


def _named(source: str, options: Sequence[str], arch: int) -> tuple[str, list[str]]:
    """The file in the cache, and all options."""
    compiler = _nvrtc()
    if arch not in compiler.architectures:
        known = f"sm_{min(compiler.architectures)} to sm_{max(compiler.architectures)}"
        raise CudaError(f"NVRTC {compiler.version} compiles for {known}, not for sm_{arch}; a later torch may")
    every = [f"--gpu-architecture=sm_{arch}", "-std=c++17", "--device-as-default-execution-space", *options]
    key = hashlib.sha256("\0".join((compiler.version, source, *every)).encode()).hexdigest()
    return f"{key}.cubin", every


def _kept(name: str) -> bytes | None:
    """What a file of the cache holds; None where there is none or it is damaged."""
    try:
        file = cache_folder(KIND) / name
        content = file.read_bytes()
    except (OSError, RuntimeError):
        return None
    if hashlib.sha256(content[32:]).digest() == content[:32]:
        return content[32:]
    warn_once(f"{file} is damaged; it is compiled again")
    return None


def _keep(name: str, code: bytes) -> None:
    try:
        folder = cache_folder(KIND)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, hashlib.sha256(code).digest() + code)  # others may be compiling the same
    except (OSError, RuntimeError) as error:
        warn_once(
            f"compiled CUDA kernels cannot be kept ({error}): every process compiles them again, some seconds each; "
            "set FASTCLAP_CACHE to a folder that can be written"
        )


# ---------------------------------------------------------------------------------------------------------------------
# the driver


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"NVIDIA's driver cannot be loaded: {error}") from None
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    driver.cuLaunchKernel.argtypes = (pointer, *(number,) * 7, pointer, pointer, pointer)
    driver.cuModuleGetFunction.argtypes = (pointer, pointer, ctypes.c_char_p)
    driver.cuModuleLoadData.argtypes = (pointer, ctypes.c_char_p)
    driver.cuFuncSetAttribute.argtypes = (pointer, ctypes.c_int, ctypes.c_int)
    driver.cuCtxSetCurrent.argtypes = (pointer,)
    return driver


def _check(name: str, code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} (CUDA error {code})")


def _use_context(index: int) -> None:
    """Makes torch's context of a device the current one of a thread that has none, as one that has but begun."""
    driver, context = _driver(), ctypes.c_void_p()
    _check("cuCtxGetCurrent", driver.cuCtxGetCurrent(ctypes.byref(context)))
    if not context.value:
        _check("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), index))
        _check("cuCtxSetCurrent", driver.cuCtxSetCurrent(context))


class Kernel:
    """A kernel on a CUDA device, to be launched by `launch`.

    Args:
        cubin: machine code for the device.
        name: of the kernel in it.
        shared_bytes: dynamic shared memory of a block.
        index: the device's number.

    Raises:
        CudaError: the driver cannot load it.
    """

    def __init__(self, cubin: bytes, name: str, shared_bytes: int, index: int) -> None:
        driver = _driver()
        self.shared_bytes, self.index = shared_bytes, index
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(index):
            torch.cuda.current_stream()  # torch's own initialisation
            _use_context(index)
            _check("cuModuleLoadData", driver.cuModuleLoadData(ctypes.byref(module), cubin))
            _check(
                "cuModuleGetFunction", driver.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode())
            )
            for attribute, value in ((_MAX_DYNAMIC_SHARED_SIZE, shared_bytes), (_SHARED_CARVEOUT, 100)):
                _check("cuFuncSetAttribute", driver.cuFuncSetAttribute(self._function, attribute, value))

    def launch(self, grid: tuple[int, int, int], threads: int, arguments: ctypes.Structure) -> None:
        """Launches it on torch's current stream with one argument, a structure that is passed by value.

        Raises:
            CudaError: the driver refuses.
        """
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        with torch.cuda.device(self.index):
            stream = torch.cuda.current_stream().cuda_stream
            _use_context(self.index)
            code = _driver().cuLaunchKernel(
                self._function, *grid, threads, 1, 1, self.shared_bytes, stream, pointers, None
            )
        _check("cuLaunchKernel", code)
