"""How far a float32 InfoNCE whose logits come from tensor cores is from float64, by emulation: no GPU is needed.

    python -m bench.float32_errors [--chip h100] [--rows 64] [--seeds 5] [--depths 64 512 768 1024] [--out FILE]

Triton writes a float32 product as several products of parts that the matrix unit takes (`FORMS`): for "tf32x3" the
value rounded to TF32 and the rest, for "bf16x3" and "bf16x6" two or three bfloat16 numbers. Its `tl.dot` chains them,
the small ones first, through an accumulator that starts at zero, and adds that to the total in float32, so each step
of `BK` columns has an accumulator of its own (tests/bench/test_float32_errors.py reads this in the compiled kernels).

The matrix unit is emulated as Khattak and Mikaitis found that of each chip to work (arXiv:2512.07004): a few exact
products and the accumulator are cut off a bit or two below the last place of the largest of them (`Chip`), summed
exactly, and the sum is cut off to float32; "cut off" is toward zero. What follows is as in the kernels: the factors of
rows and columns and the exponents of 2 in float32, G in float32. Sums, and the products of G with the embeddings, are
in float64: on a GPU these are float64 and torch's own float32 product, which are not the subject.

Printed are the relative errors, norm of the difference over the norm, of G = dL/dS and of the gradients of a, b and the
scale, and the mean error of the positives' cosines, which cutting off makes too small: medians over the seeds. At scale
100 and alignment 0.9 the norm of G is that of a few rows, so that one seed says little.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.tables import markdown

Array = NDArray[np.float32]
Wide = NDArray[np.float64]

GOAL = 1e-5  # relative error of every gradient
SCALES = (14.3, 100.0)
ALIGNMENTS = (0.9, 0.0)
COLUMNS = ("D", "alignment", "scale", "product", "G", "da", "db", "dscale", "positives")


def rounded_tf32(x: Array) -> Array:
    """To 10 bits after the point, ties away from zero: cvt.rna.tf32.f32."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def cut_tf32(x: Array) -> Array:
    """What a matrix unit reads of a float32: its low 13 bits are ignored."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def rounded_bf16(x: Array) -> Array:
    """To the nearest bfloat16, ties to even."""
    return torch.from_numpy(x).bfloat16().float().numpy()


def tf32_parts(x: Array) -> list[Array]:
    big = rounded_tf32(x)
    return [big, cut_tf32(x - big)]


def bf16_parts(x: Array, count: int) -> list[Array]:
    parts: list[Array] = []
    for _ in range(count):
        parts.append(rounded_bf16(x))
        x = x - parts[-1]
    return parts


@dataclass(frozen=True)
class Form:
    """A float32 product on tensor cores.

    Attributes:
        parts: of an operand, the largest first.
        terms: which part of the left operand meets which of the right, in the order in which they are accumulated.
        bits: of a part's significand, the leading one included.
    """

    parts: Callable[[Array], list[Array]]
    terms: tuple[tuple[int, int], ...]
    bits: int


FORMS = {
    "tf32x3": Form(tf32_parts, ((1, 0), (0, 1), (0, 0)), 11),
    "bf16x3": Form(lambda x: bf16_parts(x, 2), ((1, 0), (0, 1), (0, 0)), 8),
    "bf16x6": Form(lambda x: bf16_parts(x, 3), ((1, 1), (2, 0), (0, 2), (1, 0), (0, 1), (0, 0)), 8),
}


@dataclass(frozen=True)
class Chip:
    """A matrix unit: bits that it keeps below float32's last place, and products that it sums at once, by `bits`."""

    extra_bits: int
    depth: dict[int, int]


CHIPS = {"a100": Chip(1, {11: 4, 8: 8}), "h100": Chip(2, {11: 8, 8: 16}), "b200": Chip(2, {11: 8, 8: 16})}


def cut_float32(x: Wide) -> Wide:
    """Toward zero to 24 significant bits, the precision of float32."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.trunc(np.ldexp(fraction, 24)), exponent - 24)


def _exponents(x: NDArray[Any]) -> NDArray[np.int32]:
    """e where |x| is in [2^e, 2^(e+1)); far below all others for 0."""
    return np.where(x == 0, -400, np.frexp(x)[1] - 1)


def multiply_add(left: Array, right: Array, total: Wide, extra_bits: int) -> Wide:
    """One step of the matrix unit: total [N, M] + left [N, depth] · right [M, depth]ᵀ."""
    products = left.astype(np.float64)[:, None] * right.astype(np.float64)[None]  # exact
    # A product counts by the sum of its factors' exponents, whether or not it reaches the next power of 2.
    largest = (_exponents(left)[:, None] + _exponents(right)[None]).max(2)
    places = 23 + extra_bits - np.maximum(largest, _exponents(total))
    terms = np.trunc(np.ldexp(products, places[..., None])).sum(2) + np.trunc(np.ldexp(total, places))
    return cut_float32(np.ldexp(terms, -places))


def product(a: Array, b: Array, form: Form, step: int | None, chip: Chip) -> Array:
    """A·Bᵀ as Triton and the matrix unit compute it.

    Args:
        a: [N, D].
        b: [M, D].
        form: one of `FORMS`.
        step: columns that share an accumulator; None: all, which Triton does not do.
        chip: one of `CHIPS`.
    """
    depth, at_once = a.shape[1], chip.depth[form.bits]
    total = np.zeros((a.shape[0], b.shape[0]), np.float32)
    for start in range(0, depth, step or depth):
        end = min(start + (step or depth), depth)
        left, right = form.parts(a[:, start:end]), form.parts(b[:, start:end])
        part = np.zeros(total.shape)
        for i, j in form.terms:
            for k in range(0, end - start, at_once):
                columns = slice(k, k + at_once)
                part = multiply_add(left[i][:, columns], right[j][:, columns], part, chip.extra_bits)
        total += part.astype(np.float32)
    return total


@dataclass(frozen=True)
class Gradients:
    """Of the symmetric loss with the diagonal as positives, in float64."""

    g: Wide  # [N, N]
    a: Wide  # [N, D], of the raw rows
    b: Wide
    scale: Wide  # []


def backward(g: Wide, a: Wide, b: Wide, scale: float) -> Gradients:
    """From G and the raw embeddings; everything in float64."""
    a_norm, b_norm = (np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    unit_a, unit_b = a / a_norm, b / b_norm
    of_a, of_b = g @ unit_b, g.T @ unit_a
    along = (of_a * unit_a).sum(1, keepdims=True)
    da = scale * (of_a - along * unit_a) / a_norm
    db = scale * (of_b - (of_b * unit_b).sum(1, keepdims=True) * unit_b) / b_norm
    return Gradients(g, da, db, along.sum())


def exact(a: Wide, b: Wide, scale: float) -> Gradients:
    unit_a, unit_b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    s = scale * (unit_a @ unit_b.T)
    rows, columns = (np.exp(s - s.max(axis, keepdims=True)) for axis in (1, 0))
    # p - 1 of a positive is the sum of the others, without the difference.
    g = np.zeros_like(s)
    for e, axis in ((rows, 1), (columns, 0)):
        p = e / e.sum(axis, keepdims=True)
        others = p - np.diag(np.diag(p))
        g += (others - np.diag(others.sum(axis))) / (2 * len(s))
    return backward(g, a, b, scale)


def of_product(dots: Array, a: Array, b: Array, scale: float) -> Gradients:
    """What the kernels make of A·Bᵀ: logits in units of ln 2, with the fixed maximum, and G in float32."""
    a_norm, b_norm = (np.sqrt((x.astype(np.float64) ** 2).sum(1)).astype(np.float32) for x in (a, b))
    factor = (1 / a_norm) * np.float32(scale * math.log2(math.e))
    x = dots * factor[:, None]
    x = x * (1 / b_norm)[None]
    bias = 126 - math.ceil(math.log2(len(a)))
    e = np.exp2((x - np.float32(scale * math.log2(math.e) - bias)).astype(np.float64)).astype(np.float32)
    others = e.astype(np.float64)
    positive = np.diag(others).copy()
    np.fill_diagonal(others, 0)
    g = np.zeros_like(others)
    for axis in (1, 0):
        left_out = others.sum(axis)
        share = 1 / (left_out + positive)
        g += others * np.expand_dims(share, axis) - np.diag(left_out * share)
    g = (g / (2 * len(a))).astype(np.float32)
    return backward(g.astype(np.float64), a.astype(np.float64), b.astype(np.float64), scale)


def embeddings(rows: int, depth: int, alignment: float, seed: int = 0) -> tuple[Array, Array]:
    """Random a, b [rows, depth] whose pairs have about that cosine."""
    generator = np.random.default_rng(seed)
    b, noise = (generator.standard_normal((rows, depth)) for _ in range(2))
    a = alignment * b + math.sqrt(1 - alignment**2) * noise
    return a.astype(np.float32), b.astype(np.float32)


def relative(found: Wide, expected: Wide) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def products(chip: Chip) -> dict[str, Callable[[Array, Array], Array]]:
    """By name, the ways to A·Bᵀ that are compared."""
    found: dict[str, Callable[[Array, Array], Array]] = {
        "exact, rounded to float32": lambda a, b: (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32),
        "torch float32 on the CPU": lambda a, b: (torch.from_numpy(a) @ torch.from_numpy(b).t()).numpy(),
    }
    for (name, form), step in itertools.product(FORMS.items(), (None, 64, 32, 16, 8)):
        if step is None or step >= chip.depth[form.bits]:
            label = f"{name}, one accumulator" if step is None else f"{name}, {step} columns"
            found[label] = functools.partial(product, form=form, step=step, chip=chip)
    return found


@dataclass(frozen=True)
class Errors:
    """Of one way to the product: relative, and the mean difference of the positives' cosines."""

    g: float
    a: float
    b: float
    scale: float
    positives: float

    @property
    def largest(self) -> float:
        """Of the gradients of the loss's inputs."""
        return max(self.a, self.b, self.scale)


def errors(dots: Array, a: Array, b: Array, scale: float) -> Errors:
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    expected, found = exact(wide_a, wide_b, scale), of_product(dots, a, b, scale)
    pairs = (wide_a * wide_b).sum(1)
    bias = float(((np.diag(dots) - pairs) / (np.linalg.norm(wide_a, axis=1) * np.linalg.norm(wide_b, axis=1))).mean())
    names = ("g", "a", "b", "scale")
    g, da, db, dscale = (relative(getattr(found, name), getattr(expected, name)) for name in names)
    return Errors(g, da, db, dscale, bias)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--depths", type=int, nargs="+", default=[64, 512, 768, 1024])
    parser.add_argument("--chip", choices=CHIPS, default="h100")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    args = parser.parse_args(arguments)
    rows: list[tuple[str, ...]] = []
    medians: dict[str, list[float]] = {name: [] for name in products(CHIPS[args.chip])}
    largest: dict[str, list[float]] = {name: [] for name in medians}
    for depth, alignment in itertools.product(args.depths, ALIGNMENTS):
        inputs = [embeddings(args.rows, depth, alignment, seed) for seed in range(args.seeds)]
        for name, multiply in products(CHIPS[args.chip]).items():
            dots = [multiply(a, b) for a, b in inputs]
            for scale in SCALES:
                found = [errors(x, a, b, scale) for x, (a, b) in zip(dots, inputs, strict=True)]
                medians[name].append(statistics.median(x.largest for x in found))
                largest[name].append(max(x.largest for x in found))
                values = (statistics.median(getattr(x, field.name) for x in found) for field in fields(Errors))
                rows.append((str(depth), str(alignment), str(scale), name, *(f"{value:.1e}" for value in values)))
                print(*rows[-1], sep="  ", flush=True)
    held = [
        (name, f"{max(medians[name]):.1e}", "yes" if max(medians[name]) <= GOAL else "no", f"{max(largest[name]):.1e}")
        for name in medians
    ]
    header = ("product", "largest error of a gradient, median of seeds", f"at most {GOAL:g}", "largest of seeds")
    summary = markdown(header, held)
    print(summary)
    if args.out is not None:
        command = f"python -m bench.float32_errors --chip {args.chip} --rows {args.rows} --seeds {args.seeds}"
        command += f" --depths {' '.join(map(str, args.depths))}"
        page = [f"`{command}`, torch {torch.__version__}. Emulated: no GPU has measured this.", "", summary, ""]
        args.out.write_text("\n".join([*page, markdown(COLUMNS, rows), ""]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
