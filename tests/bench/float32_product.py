"""A float32 product in Triton, as the kernels of the losses write it."""

from __future__ import annotations

import triton
import triton.language as tl

from fastclap.kernels.offline import Compilation, signature_and_attrs


@triton.jit
def product_kernel(a, b, c, depth, SIZE: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.program_id(0) * SIZE, tl.program_id(1) * SIZE
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in tl.range(0, depth, BK):
        total = tl.dot(a.load([row, k]), b.load([column, k]).T, total, input_precision=PRECISION)
    c.store([row, column], total)


def compilation(precision: str) -> Compilation:
    types = {"a": "tensordesc<fp32[64, 32]>", "b": "tensordesc<fp32[64, 32]>", "c": "tensordesc<fp32[64, 64]>"}
    constexprs = {"SIZE": 64, "BK": 32, "PRECISION": precision}
    signature, attrs = signature_and_attrs(product_kernel, {**types, "depth": "i32"}, constexprs)
    return Compilation(f"product {precision}", product_kernel, signature, constexprs, attrs, 4, 2, True)
