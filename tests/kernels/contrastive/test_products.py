"""That torch has the products with a float32 result that the engines ask for: of 16-bit factors, added to a matrix."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch

from fastclap.testing import assert_close_rel

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has these products on a GPU only")
# What addmm says of a third dtype; up to torch 2.9 it wanted the matrix in the dtype of the factors.
ACCEPTS_FLOAT32 = b"self dtype must match either out_dtype or mat1 dtype"


def test_the_declared_minimum_is_the_first_that_adds_to_float32() -> None:
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'"torch>=([\d.]+)"', project) == ["2.10"]
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def test_the_library_has_the_overloads() -> None:
    assert "dtype_out" in torch.ops.aten.addmm.overloads() and "dtype" in torch.ops.aten.mm.overloads()
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not library.exists():
        pytest.skip("torch without CUDA")
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert content.find(ACCEPTS_FLOAT32) >= 0


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_added_in_float32(dtype: torch.dtype, transposed: bool) -> None:
    from fastclap.kernels.contrastive.triton_engine import _multiply

    generator = torch.Generator("cuda").manual_seed(0)
    left = torch.randn(96, 200, device="cuda", generator=generator).to(dtype)
    right = torch.randn(200, 64, device="cuda", generator=generator).to(dtype)
    if transposed:
        left = left.t().contiguous().t()
    exact = left.double() @ right.double()
    assert_close_rel("product", exact, _multiply(left, right), 1e-6)
    start = torch.randn(96, 64, device="cuda", generator=generator)
    total = start.clone()
    found = _multiply(left, right, total)
    assert found.data_ptr() == total.data_ptr() and found.dtype == torch.float32
    assert_close_rel("sum", start.double() + exact, total, 1e-6)
