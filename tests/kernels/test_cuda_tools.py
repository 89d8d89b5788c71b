"""CUDA C++ at run time: the compiler and its cache on disk, every fault of theirs, and a launch down to the driver."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from bench import cuda_on_cpu
from fastclap.features import PRESETS
from fastclap.files import cache_folder
from fastclap.kernels import cuda_tools, dispatch
from fastclap.kernels.cuda_tools import CudaError, Kernel, compile_cubin
from fastclap.kernels.log_mel import cuda_engine
from fastclap.kernels.log_mel.operator import log_mel

SOURCE = 'extern "C" __global__ void fill(float *x) { x[threadIdx.x] = VALUE; }'
needs_compiler = pytest.mark.skipif(cuda_tools.why_no_compiler() is not None, reason=str(cuda_tools.why_no_compiler()))


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache, and a process that has warned of nothing."""
    monkeypatch.setenv("FASTCLAP_CACHE", str(tmp_path / "cache"))
    cuda_tools.warn_once.cache_clear()
    yield
    cuda_tools.warn_once.cache_clear()
    cuda_tools._nvrtc.cache_clear()
    cuda_engine._plan.cache_clear()
    cuda_engine.cubin.cache_clear()


def compiled(value: int = 1, arch: int = 90) -> bytes:
    return compile_cubin(SOURCE, "fill.cu", (f"-DVALUE={value}",), arch)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What is compiled inside, and not found in the cache."""
    compiler, found = cuda_tools._nvrtc(), []
    original = compiler.compile

    def compile(source: str, name: str, options: Any) -> bytes:
        found.append(name)
        return original(source, name, options)

    with mock.patch.object(compiler, "compile", compile):
        yield found


@needs_compiler
def test_is_compiled_once_for_each_source_option_and_architecture() -> None:
    with compilations() as found, warnings.catch_warnings():
        warnings.simplefilter("error")
        first = compiled()
        assert first[:4] == b"\x7fELF" and compiled() == first
        assert len(found) == 1
        compiled(2)
        compiled(arch=80)
        compile_cubin(SOURCE + " ", "fill.cu", ("-DVALUE=1",), 90)
        assert len(found) == 4 and len(list(cache_folder("cuda").iterdir())) == 4
        with mock.patch.object(cuda_tools._nvrtc(), "version", "99.0"):  # of another torch
            compiled()
        assert len(found) == 5


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"x", b"\0" * 4000])
def test_a_damaged_file_is_said_and_written_again(damage: bytes) -> None:
    right = compiled()
    (file,) = cache_folder("cuda").iterdir()
    content = file.read_bytes()
    for broken in (damage, content[:-1], content[:-1] + b"\x01"):
        file.write_bytes(broken)
        cuda_tools.warn_once.cache_clear()
        with pytest.warns(RuntimeWarning, match=f"{file.name} is damaged; it is compiled again"):
            assert compiled() == right
        assert file.read_bytes() == content


@needs_compiler
def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("FASTCLAP_CACHE", str(blocked))
    with pytest.warns(RuntimeWarning, match="cannot be kept .*set FASTCLAP_CACHE to a folder") as said:
        assert compiled(1) and compiled(2)
    assert len(said) == 1
    monkeypatch.delenv("FASTCLAP_CACHE")
    homeless = mock.patch.object(Path, "home", side_effect=RuntimeError("Could not determine home directory."))
    with homeless, pytest.warns(RuntimeWarning, match="Could not determine home"):
        assert compiled(3)


def _compile_in_a_process(barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(compiled())


@needs_compiler
def test_processes_that_compile_the_same_at_once() -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_compile_in_a_process, args=(barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found[0] == found[1] == found[2] == compiled()
    assert [file.suffix for file in cache_folder("cuda").iterdir()] == [".cubin"]  # and nothing half-written


@needs_compiler
def test_an_unknown_architecture_and_a_source_with_an_error() -> None:
    with pytest.raises(
        CudaError, match=r"NVRTC [\d.]+ compiles for sm_\d+ to sm_\d+, not for sm_999; a later torch may"
    ):
        compiled(arch=999)
    with pytest.raises(CudaError, match=r'fill.cu does not compile: .*identifier "VALUE" is undefined'):
        compile_cubin(SOURCE, "fill.cu", (), 90)
    assert not cache_folder("cuda").exists()


@contextlib.contextmanager
def on_a_gpu(arch: int = 90) -> Iterator[None]:
    """CPU tensors pass for a GPU's; there is no driver for them."""
    with (
        mock.patch.object(dispatch, "on_gpu", lambda x: True),
        mock.patch.object(dispatch, "architecture", lambda index: arch),
        mock.patch.object(dispatch, "index_of", lambda device: 0),
    ):
        yield


@pytest.mark.parametrize("fault", ["no compiler", "no driver", "architecture", "source"])
def test_the_next_engine_takes_over_and_the_reason_is_said_once(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arch, reason = 90, "cannot be loaded"
    if fault == "no compiler":
        monkeypatch.setattr(cuda_tools, "_nvrtc_libraries", lambda: iter(["libnvrtc-not-there.so"]))
        cuda_tools._nvrtc.cache_clear()
        reason = "NVRTC, CUDA's compiler at run time, cannot be loaded: libnvrtc-not-there.so"
    elif cuda_tools.why_no_compiler() is not None:
        pytest.skip("needs NVRTC")
    elif fault == "no driver":
        if torch.cuda.is_available():
            pytest.skip("has a driver")
        reason = "NVIDIA's driver cannot be loaded"
    elif fault == "architecture":
        arch, reason = 999, "not for sm_999"
    else:
        monkeypatch.setattr(cuda_engine, "options", lambda *_: ())
        reason = "log_mel_cuda.cuh does not compile"
    waveform = torch.randn(1, 4000)
    spec = PRESETS["whisper"]
    # What the Triton engine would do has its own tests; here torch's has to do.
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with on_a_gpu(arch):
        with pytest.warns(RuntimeWarning, match="computed without the CUDA engine.*" + reason) as said:
            features = [log_mel(waveform, None, spec)[0] for _ in range(3)]
        assert len(said) == 1
        with pytest.raises(ValueError, match=f'backend="cuda" cannot be used: .*{reason}'):
            log_mel(waveform, None, spec, backend="cuda")
    assert torch.equal(features[0], log_mel(waveform, None, spec, backend="torch")[0])


def test_old_gpus_and_other_makers() -> None:
    waveform, spec = torch.randn(1, 4000), PRESETS["whisper"]
    with on_a_gpu(arch=75), pytest.raises(ValueError, match=r"compute capability 7\.5, and the kernel needs 8\.0"):
        log_mel(waveform, None, spec, backend="cuda")
    with (
        on_a_gpu(),
        mock.patch.object(torch.version, "cuda", None),
        pytest.raises(ValueError, match="not built for CUDA"),
    ):
        log_mel(waveform, None, spec, backend="cuda")


DRIVER = r"""
#include <string.h>
static char handle, kept[4096];
static unsigned launch[8];
static int attributes[2][2], attribute_count, module_loads, current_set, refuse;
void refuse_launches(int code) { refuse = code; }
const unsigned *last_launch(void) { return launch; }
const char *last_arguments(void) { return kept; }
int loads(void) { return module_loads; }
int was_set(void) { return current_set; }
const int *attribute(int i) { return attributes[i]; }
int cuGetErrorString(int error, const char **text) { *text = "out of memory"; return 0; }
int cuCtxGetCurrent(void **context) { *context = current_set ? &handle : 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &handle; return 0; }
int cuCtxSetCurrent(void *context) { current_set = context == &handle; return 0; }
int cuModuleLoadData(void **module, const void *image) {
  module_loads += !memcmp(image, "\177ELF", 4);
  *module = &handle;
  return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = &handle;
  return strcmp(name, "log_mel") ? 500 : 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  attributes[attribute_count % 2][0] = attribute;
  attributes[attribute_count++ % 2][1] = value;
  return 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
  unsigned all[8] = {gx, gy, gz, bx, by, bz, shared, function == &handle && stream == (void *)77 && !extra};
  memcpy(launch, all, sizeof all);
  memcpy(kept, parameters[0], SIZE);
  return refuse;
}
"""


@needs_compiler
@pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="there is no g++")
def test_a_launch_reaches_the_driver_as_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is a stand-in that keeps what it is given."""
    library = tmp_path / "libcuda.so.1"
    size = ctypes.sizeof(cuda_engine._Arguments)
    (tmp_path / "driver.c").write_text(DRIVER)
    command = ["gcc", "-shared", "-fPIC", f"-DSIZE={size}", str(tmp_path / "driver.c"), "-o", str(library)]
    subprocess.run(command, check=True)
    driver = ctypes.CDLL(str(library))
    for name, kind in (("last_launch", ctypes.c_uint), ("last_arguments", ctypes.c_char), ("attribute", ctypes.c_int)):
        getattr(driver, name).restype = ctypes.POINTER(kind)
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name, **k: load(str(library) if name == "libcuda.so.1" else name, **k))
    cuda_tools._driver.cache_clear()
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: mock.Mock(cuda_stream=77))
    waveform = torch.randn(3, 16000)
    spec = PRESETS["whisper"]
    try:
        with on_a_gpu():
            features, frame_lengths = log_mel(waveform, torch.tensor([16000, 8000, 1]), spec, backend="cuda")
            found = cuda_engine.layout(spec)
            assert isinstance(found, cuda_engine.Layout)
            assert driver.was_set() == 1 and driver.loads() == 1
            assert [driver.attribute(i)[:2] for i in range(2)] == [[8, found.shared_bytes], [9, 100]]
            assert driver.last_launch()[:8] == [
                -(-100 // found.frames),
                3,
                1,
                found.threads,
                1,
                1,
                found.shared_bytes,
                1,
            ]
            kept = cuda_engine._Arguments.from_buffer_copy(bytes(driver.last_arguments()[:size]))
            assert (kept.waveform, kept.features) == (waveform.data_ptr(), features.data_ptr())
            assert (kept.frame_lengths, kept.offsets) == (frame_lengths.data_ptr(), None)
            assert (kept.samples, kept.row_stride, kept.clips, kept.frames) == (16000, 16000, 3, 100)
            driver.refuse_launches(2)
            with pytest.raises(CudaError, match=r"cuLaunchKernel: out of memory \(CUDA error 2\)"):
                log_mel(waveform, None, spec, backend="cuda")
            with pytest.raises(CudaError, match="cuModuleGetFunction"):
                Kernel(b"\x7fELF", "another", 0, 0)
    finally:
        cuda_tools._driver.cache_clear()
