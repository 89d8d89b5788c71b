"""The engines of normalize_waveform: on a GPU, or the Triton one in its interpreter (`TRITON_INTERPRET=1`).

On a GPU every dtype meets every shape and combination of arguments; in the interpreter the floating dtypes take turns.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor

from fastclap.kernels.waveform import normalize_waveform, normalize_waveform_reference
from fastclap.testing import assert_close_rel
from tests.kernels.waveform_cases import SHAPES, clips, combinations

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1 (`make test` runs it)"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
FLOATS = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
# Several blocks a clip; on a GPU more of them than are put together at a time.
LONG: list[tuple[int, int, dict[str, int]]] = [(2, 9001, {"samples": 8193} if INTERPRETED else {})]
LONG += [] if INTERPRETED else [(3, 1_200_001, {}), (40, 160_000, {"samples": 80_000})]
ENGINES = ("triton",) if INTERPRETED else ("triton", "torch")


def run(
    audio: Tensor,
    given: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    engine: str = "triton",
    **width: int,
) -> Tensor:
    given = {name: t.to(DEVICE) for name, t in given.items()}
    return normalize_waveform(audio.to(DEVICE), **given, **width, dtype=dtype, backend=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", SHAPES + LONG, ids=str)
def test_every_combination_matches_float64(shape: tuple[int, int, dict[str, int]], engine: str) -> None:
    batch, samples, width = shape
    audio, options = clips(batch, samples)
    audio, options = audio.to(DEVICE), {name: t.to(DEVICE) for name, t in options.items()}
    for index, given in enumerate(combinations(options)):
        floats = FLOATS[index % 2 :][:1] if INTERPRETED else FLOATS
        for waveform in (audio, *((audio / 32768).to(dtype) for dtype in floats)):
            expected = normalize_waveform_reference(waveform, **given, **width)
            out = run(waveform, given, engine=engine, **width)
            assert out.dtype == torch.float32 and out.is_contiguous()
            # A sum of a million samples in float32 costs torch's mean a digit.
            assert_close_rel(f"{sorted(given)} {waveform.dtype}", expected, out, 1e-6 if engine == "triton" else 1e-5)
        for dtype in FLOATS:
            assert torch.equal(run(waveform, given, dtype, engine, **width), out.to(dtype))


def test_a_large_constant_does_not_cost_the_variance_its_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    audio = 1e3 + torch.randn(2, 9000, generator=generator)
    assert_close_rel("waveform", normalize_waveform_reference(audio), run(audio, {}), 5e-5)


def test_statistics_in_other_dtypes_and_strided_arguments() -> None:
    audio, options = clips(6, 500)
    mean, std = options["mean"].double(), options["std"].half()
    expected = normalize_waveform_reference(audio[::2, 3:], options["lengths"][::2], mean[::2], std[::2])
    strided = {"mean": mean.to(DEVICE)[::2], "std": std.to(DEVICE)[::2], "lengths": options["lengths"].to(DEVICE)[::2]}
    out = normalize_waveform(audio.to(DEVICE)[::2, 3:], **strided, backend="triton")
    assert_close_rel("every other clip", expected, out, 1e-6)
    turned = audio.t().contiguous().to(DEVICE).t()
    assert_close_rel(
        "transposed", normalize_waveform_reference(audio), normalize_waveform(turned, backend="triton"), 1e-6
    )
    small = options["lengths"].to(DEVICE, torch.int32)
    assert torch.equal(run(audio, {"lengths": small}), run(audio, {"lengths": options["lengths"]}))


def test_uninitialised_memory_is_never_read_and_a_clip_does_not_depend_on_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    audio, options = clips(3, 9000)
    for given in combinations(options):
        first, second = run(audio, given), run(audio, given)
        alone = run(audio[1:2], {name: t[1:2] for name, t in given.items()})
        assert first.isfinite().all() and torch.equal(first, second)
        assert torch.equal(first[1:2], alone)


def test_a_bad_sample_spoils_its_own_clip_only() -> None:
    audio, _ = clips(3, 9000)
    waveform = audio / 32768
    waveform[1, 8500] = float("nan")
    lengths = torch.tensor([9000, 8800, 8400])
    out = run(waveform, {"lengths": lengths})
    assert out[1, :8800].isnan().all() and not out[1, 8800:].any()
    assert torch.equal(out[::2], run(waveform[::2], {"lengths": lengths[::2]}))
    waveform[2, 8500] = float("inf")  # past its end
    assert torch.equal(run(waveform, {"lengths": lengths})[2], out[2])


def test_the_torch_engine_takes_what_needs_a_gradient_and_empty_batches() -> None:
    audio, _ = clips(3, 100)
    leaf = (audio / 32768).to(DEVICE).requires_grad_()
    normalize_waveform(leaf).square().sum().backward()
    assert leaf.grad is not None and leaf.grad.any()
    with torch.no_grad():
        assert torch.allclose(normalize_waveform(leaf, backend="triton"), run(audio, {}), atol=1e-5)
    assert normalize_waveform(audio[:0].to(DEVICE), backend="triton").shape == (0, 100)


def test_the_operator_is_registered_properly_and_a_compiled_graph_stays_whole() -> None:
    audio, options = clips(3, 100)
    audio, options = audio.to(DEVICE), {name: t.to(DEVICE) for name, t in options.items()}
    for measured, lengths in itertools.product((True, False), repeat=2):
        mean, std = (None, None) if measured else (options["mean"], options["std"])
        at = (options["lengths"], mean, std, options["offsets"]) if lengths else (None, mean, std, None)
        torch.library.opcheck(
            torch.ops.fastclap.normalize_waveform,
            (audio, *at, 80, 10, 1e-7, torch.float16),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )

    def function(audio: Tensor, lengths: Tensor) -> Tensor:
        return 2 * normalize_waveform(audio, lengths, min_samples=30, backend="triton")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(audio, options["lengths"]), function(audio, options["lengths"]))


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", (torch.int16, *FLOATS), ids=str)
def test_a_cuda_graph_replays_it_and_the_host_does_not_wait(dtype: torch.dtype) -> None:
    audio, options = clips(5, 9000)
    waveform = audio.cuda() if dtype == torch.int16 else (audio.cuda() / 32768).to(dtype)
    given = {name: options[name].cuda() for name in ("lengths", "offsets")}
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = normalize_waveform(waveform, **given, dtype=torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = normalize_waveform(waveform, **given, dtype=torch.bfloat16)
    graph.replay()
    assert torch.equal(eager, captured) and eager.any()
