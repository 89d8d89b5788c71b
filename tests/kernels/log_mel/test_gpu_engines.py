"""The log-mel engines of GPUs against their float64 definition: on a GPU, or where none is needed.

The CUDA engine's own source runs on the CPU as `bench.cuda_on_cpu` has it, the Triton engine in Triton's interpreter
(`TRITON_INTERPRET=1`), which a process has or has not.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bench import cuda_on_cpu
from fastclap.features import PRESETS, LogMel, SpecAugment
from fastclap.kernels.log_mel import cuda_engine
from fastclap.kernels.log_mel.operator import log_mel
from fastclap.kernels.log_mel.spec import LogMelSpec
from fastclap.kernels.log_mel.torch_engine import log_mel_reference
from fastclap.testing import assert_close_rel

INTERPRETED, GPU = os.environ.get("TRITON_INTERPRET") == "1", torch.cuda.is_available()
DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"
no_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(params=["cuda", "triton"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.param
    if name == "triton" and not (INTERPRETED or GPU):
        pytest.skip("needs a GPU or TRITON_INTERPRET=1 (`make test` runs it)")
    if name == "cuda" and (INTERPRETED or not (GPU or cuda_on_cpu.compiler())):
        pytest.skip("needs a GPU or g++, and no interpreter")
    if name == "cuda" and not GPU:
        with cuda_on_cpu.installed():
            yield name
    else:
        yield name


SHORT = {name: dataclasses.replace(spec, num_frames=spec.num_frames and 14) for name, spec in PRESETS.items()}
every_preset = pytest.mark.parametrize("preset", SHORT)
TINY = LogMelSpec(16000, 64, 50, 20, 12, floor=1e-6)  # quick in the interpreter


def noise(batch: int, samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed))


def run(
    engine: str, waveform: Tensor, lengths: Tensor | None, spec: LogMelSpec, **options: object
) -> tuple[Tensor, Tensor]:
    """One engine; results on the CPU."""
    moved = {
        name: tuple(None if x is None else x.to(DEVICE) for x in value)
        if isinstance(value, tuple)
        else value.to(DEVICE)
        if isinstance(value, Tensor)
        else value
        for name, value in options.items()
    }
    lengths = None if lengths is None else lengths.to(DEVICE)
    features, frame_lengths = log_mel(waveform.to(DEVICE), lengths, spec, backend=engine, **moved)  # type: ignore[arg-type]
    return features.cpu(), frame_lengths.cpu()


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def signals(sampling_rate: int) -> dict[str, Tensor]:
    samples = int(0.31 * sampling_rate)  # frames enough that the luck of single values evens out
    t = torch.arange(samples, dtype=torch.float64) / sampling_rate
    white = noise(1, samples)[0] * 10
    hum = 0.9 * torch.sin(2 * torch.pi * 50 * t).float()
    clicks = torch.zeros(samples)
    clicks[samples // 3], clicks[samples // 2] = 1.0, -1.0
    return {
        "silence": torch.zeros(samples),
        "full-scale tone": torch.sin(
            2 * torch.pi * 997 * t
        ).float(),  # at 1000 Hz all frames would have one luck of rounding
        "hum and noise 60 dB down": hum + 1e-3 * white,
        "hum and noise 80 dB down": hum + 1e-4 * white,
        "clicks": clicks,
        "noise on an offset": 0.5 + 0.01 * white,
        "faint noise": 1e-5 * white,
        "loud then faint": torch.cat((white[: samples // 2], 1e-4 * white[samples // 2 :])),
    }


@pytest.mark.parametrize("preset", ["whisper", "kaldi", "clap"])
def test_error_is_of_the_size_of_a_float32_ffts(preset: str, engine: str) -> None:
    spec = SHORT[preset]
    clips = signals(spec.sampling_rate)
    waveform = torch.stack(list(clips.values()))
    features, _ = run(engine, waveform, None, spec)
    with_fft, _ = log_mel(waveform, None, spec, backend="torch")
    truth, _ = log_mel_reference(waveform, None, spec)
    for index, kind in enumerate(clips):
        ours, theirs = rms(features[index] - truth[index]), rms(with_fft[index] - truth[index])
        assert ours <= 1.6 * theirs + 1e-6, f"{kind}: rms error {ours:.1e}, the FFT's {theirs:.1e}"


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "floats"])
@every_preset
def test_lengths_offsets_and_integer_samples(preset: str, integers: bool, engine: str) -> None:
    spec = SHORT[preset]
    samples = 3 * spec.win_length // 2
    waveform = (noise(4, samples) * 32767).short()
    lengths = torch.tensor([samples - 40, samples // 2, samples // 3, 0])
    offsets = torch.tensor([40, 11, samples - samples // 3, 5])
    spoilt = torch.full((4, samples), float("nan"))  # what lies outside of a clip must not matter
    moved = torch.zeros(4, samples)
    for row, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        clip = waveform[row, offset : offset + length].float() / 32768
        spoilt[row, offset : offset + length] = moved[row, :length] = clip
    features, frame_lengths = run(engine, waveform if integers else spoilt, lengths, spec, offsets=offsets)
    expected, expected_lengths = log_mel_reference(moved, lengths, spec)
    assert torch.equal(frame_lengths, expected_lengths)
    assert features.isfinite().all()
    assert_close_rel("features", expected, features, 1e-5)


@no_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.float16, torch.bfloat16], ids=str)
@every_preset
def test_every_preset_engine_and_dtype(preset: str, dtype: torch.dtype, backend: str) -> None:
    spec = SHORT[preset]
    samples = 3 * spec.win_length
    waveform = noise(4, samples)
    waveform = (waveform * 32767).short() if dtype == torch.int16 else waveform.to(dtype)
    lengths = torch.tensor([samples, samples // 2, 1, 0])
    offsets = torch.tensor([0, 11, 7, 5])
    moved = torch.zeros(4, samples)
    for row, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        clip = waveform[row, offset : offset + length].float()
        moved[row, :length] = clip / 32768 if dtype == torch.int16 else clip
    features, frame_lengths = run(backend, waveform, lengths, spec, offsets=offsets)
    expected, expected_lengths = log_mel_reference(moved, lengths, spec)
    assert torch.equal(frame_lengths, expected_lengths)
    assert_close_rel("features", expected, features, 2e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"framing": "snip_edges", "remove_dc": True, "preemphasis": 0.97},
        {"framing": "no_snip_edges", "remove_dc": True, "window": "povey"},
        {"framing": "no_snip_edges", "preemphasis": 1.0, "win_length": 51, "window": "hann_symmetric"},
        {"win_length": 20, "hop_length": 30},  # frames that do not overlap
        {"power": 1.0, "dynamic_range": 2.0, "log": "log10", "mean": -1.0, "std": 2.0},
        {"n_mels": 1, "log": "db", "drop_last_frame": True},
        {"n_mels": 70, "mel_scale": "slaney", "mel_norm": "slaney", "num_frames": 40, "padding_value": 0.5},
        {"n_fft": 450, "win_length": 90, "hop_length": 70, "n_mels": 2},
    ],
    ids=str,
)
def test_any_parameters_and_their_gradient(change: dict[str, object], engine: str) -> None:
    spec = dataclasses.replace(TINY, **change)  # type: ignore[arg-type]
    waveform, lengths = noise(4, 200), torch.tensor([200, 117, 17, 0])
    leaf = waveform.to(DEVICE).requires_grad_()
    features, frame_lengths = log_mel(leaf, lengths.to(DEVICE), spec, backend=engine)
    upstream = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(features, leaf, upstream.to(DEVICE))
    double = waveform.double().requires_grad_()
    expected, expected_lengths = log_mel_reference(double, lengths, spec)
    (expected_gradient,) = torch.autograd.grad(expected, double, upstream.double())
    assert torch.equal(frame_lengths.cpu(), expected_lengths)
    assert (features.detach().cpu() - expected.detach()).abs().max() < 2e-2
    assert_close_rel("features", expected.detach(), features.detach().cpu(), 1e-4)
    # d log(mel) = d mel / mel: in clips of a few samples the weakest bands are rounding.
    assert_close_rel("gradient", expected_gradient[:2], gradient.cpu()[:2], 2e-3)
    assert gradient.isfinite().all() and not gradient[3].any()
    for row, length in zip(gradient, lengths, strict=True):
        assert not row[length:].any()


@pytest.mark.parametrize(
    "change",
    [
        {"n_fft": 38, "win_length": 38, "n_mels": 5},
        {"n_fft": 100, "win_length": 99, "preemphasis": 0.9},
        {"n_fft": 240, "win_length": 200, "n_mels": 40, "remove_dc": True},
        {"n_fft": 1024, "win_length": 500, "remove_dc": True, "preemphasis": 0.9, "power": 1.0},
        {"n_fft": 960, "win_length": 960, "n_mels": 140},  # many mels without a bin
        {"n_fft": 720, "win_length": 719, "hop_length": 77, "n_mels": 30},  # an odd hop, the last slice not whole
        {"n_fft": 540, "win_length": 300, "hop_length": 54, "n_mels": 20, "dynamic_range": 3.0},
        {"n_fft": 272, "win_length": 272, "n_mels": 3},
        {"n_fft": 130, "win_length": 100, "hop_length": 50, "remove_dc": True},
        {"n_fft": 2048, "win_length": 2048, "hop_length": 512, "n_mels": 60},
        {"n_fft": 2500, "win_length": 2000, "hop_length": 900, "n_mels": 60},
    ],
    ids=str,
)
def test_transforms_of_other_lengths(change: dict[str, object], engine: str) -> None:
    spec = dataclasses.replace(TINY, **{"hop_length": 100, **change})  # type: ignore[arg-type]
    waveform, lengths = noise(2, 1500), torch.tensor([1500, 700])
    if engine == "cuda" and isinstance(cuda_engine.layout(spec), str):
        with pytest.raises(ValueError, match="whose prime factors are 2, 3 and 5"):
            run(engine, waveform, lengths, spec)
        return
    features, _ = run(engine, waveform, lengths, spec)
    assert_close_rel("features", log_mel_reference(waveform, lengths, spec)[0], features, 1e-5)


def test_a_clip_of_one_sample(engine: str) -> None:
    for framing in ("center", "snip_edges", "no_snip_edges"):
        spec = dataclasses.replace(TINY, framing=framing, n_fft=16, win_length=16)  # type: ignore[arg-type]
        leaf, double = (
            x.requires_grad_() for x in (torch.tensor([[0.3]], device=DEVICE), torch.tensor([[0.3]]).double())
        )
        features, expected = log_mel(leaf, None, spec, backend=engine)[0], log_mel_reference(double, None, spec)[0]
        assert (features.detach().cpu() - expected.detach()).abs().max() < 1e-3
        gradients = [
            torch.autograd.grad(x[..., :2].sum(), y)[0].cpu() for x, y in ((features, leaf), (expected, double))
        ]
        assert_close_rel(framing, gradients[1], gradients[0], 1e-3)


def test_masks_statistics_of_each_mel_and_output_types(engine: str) -> None:
    mean = tuple(float(x) for x in torch.linspace(-1, 1, 12))
    std = tuple(float(x) for x in torch.linspace(1, 2, 12))
    time = torch.tensor([[[1, 4], [7, 7]], [[0, 2], [3, 300]]])
    mel = torch.tensor([[[0, 1]], [[5, 9]]])
    for change in ({}, {"dynamic_range": 1.5}, {"dtype": "float16"}, {"dtype": "bfloat16", "dynamic_range": 1.5}):
        spec = dataclasses.replace(TINY, mean=mean, std=std, **change)  # type: ignore[arg-type]
        for masks in ((time, mel), (None, mel), None):
            waveform, lengths = noise(2, 300), torch.tensor([300, 200])
            features, _ = run(engine, waveform, lengths, spec, masks=masks)
            expected, _ = log_mel(waveform, lengths, spec, masks=masks, backend="torch")
            assert features.dtype == expected.dtype == getattr(torch, spec.dtype)
            tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[spec.dtype]
            assert_close_rel("features", expected.double(), features.double(), tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_waveforms_of_other_types_and_layouts(dtype: torch.dtype, engine: str) -> None:
    waveform = noise(4, 600).to(dtype)
    transposed = waveform.t().contiguous().t()
    layouts = (waveform, waveform[::2, ::2], waveform[:, 3:], transposed, waveform[:1].expand(3, -1))
    for view in (*layouts, torch._neg_view(waveform)):
        features, _ = run(engine, view, None, TINY)
        assert torch.equal(features, run(engine, view.float().contiguous(), None, TINY)[0])
    leaf = waveform.to(DEVICE).requires_grad_()
    log_mel(leaf, None, TINY, backend=engine)[0].sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == dtype


def test_a_clip_does_not_depend_on_the_batch_nor_on_the_run(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    waveform, lengths = noise(3, 900), torch.tensor([900, 500, 333])
    together, _ = run(engine, waveform, lengths, TINY)
    assert torch.equal(together, run(engine, waveform, lengths, TINY)[0])
    for row in range(3):
        alone, count = run(engine, waveform[row : row + 1], lengths[row : row + 1], TINY)
        assert torch.equal(alone[0, :count], together[row, :count])

    if engine == "triton":
        monkeypatch.setattr("fastclap.kernels.log_mel.triton_engine.CHUNK", 1)  # one tile at a time
    else:
        monkeypatch.setattr(cuda_engine, "MOST_GRID", 2)  # three clips in two layers of the grid
    assert torch.equal(together, run(engine, waveform, lengths, TINY)[0])


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    empty = torch.empty

    def poisoned(*args: object, **options: object) -> Tensor:
        tensor = empty(*args, **options)  # type: ignore[call-overload]
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)
    for change in ({}, {"dynamic_range": 1.0}, {"num_frames": 50}):
        spec = dataclasses.replace(TINY, **change)  # type: ignore[arg-type]
        leaf = noise(2, 300).to(DEVICE).requires_grad_()
        features, frame_lengths = log_mel(leaf, torch.tensor([300, 0], device=DEVICE), spec, backend=engine)
        features.sum().backward()
        assert leaf.grad is not None and leaf.grad.isfinite().all()
        assert features.isfinite().all() and (frame_lengths >= 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_sample_spoils_its_own_frames_only(bad: float, engine: str) -> None:
    clean = noise(2, 900)
    spoilt = clean.clone()
    spoilt[1, 450] = bad
    for dynamic_range in (None, 2.0):
        spec = dataclasses.replace(TINY, dynamic_range=dynamic_range)
        a, b = run(engine, clean, None, spec)[0], run(engine, spoilt, None, spec)[0]
        starts = torch.arange(a.shape[1]) * spec.hop_length - spec.offset
        touched = (starts < 450) & (starts + spec.win_length > 450)
        assert torch.equal(a[0], b[0])
        if dynamic_range is None:
            assert b[1, touched].isnan().all() and torch.equal(a[1, ~touched], b[1, ~touched])
        else:
            assert b[1].isnan().all()


def test_loud_and_faint_samples_of_any_scale(engine: str) -> None:
    for scale in (1e-12, 1e6):
        spec = dataclasses.replace(TINY, floor=1e-30)
        waveform = noise(1, 400) * scale
        assert_close_rel(
            str(scale), log_mel_reference(waveform, None, spec)[0], run(engine, waveform, None, spec)[0], 1e-5
        )


def test_operator_is_registered_properly(engine: str) -> None:
    lengths, offsets = torch.tensor([300, 100], device=DEVICE), torch.tensor([0, 100], device=DEVICE)
    spans = torch.tensor([[[1, 3]], [[0, 2]]], device=DEVICE)
    leaf = noise(2, 300).to(DEVICE).requires_grad_()
    for given in ((lengths, offsets, spans, spans), (None, None, None, None)):
        torch.library.opcheck(torch.ops.fastclap.log_mel, (leaf, *given, TINY.key, engine))


@no_gpu
def test_module_in_training() -> None:
    front_end = LogMel("kaldi", n_mels=20, spec_augment=SpecAugment(time_width=0.5), dtype="bfloat16")
    features, _ = front_end(noise(3, 4000).cuda(), torch.tensor([4000, 2000, 1000]).cuda())
    assert features.dtype == torch.bfloat16 and features.isfinite().all()


@no_gpu
@pytest.mark.parametrize("preset", ["whisper", "kaldi"])
def test_a_cuda_graph_replays_it_and_the_host_does_not_wait(preset: str, engine: str) -> None:
    leaf = noise(4, 16000).cuda().requires_grad_()
    lengths = torch.tensor([16000, 9000, 500, 0]).cuda()

    def step() -> list[Tensor]:
        features, _ = log_mel(leaf, lengths, PRESETS[preset], backend=engine)
        return [features, *torch.autograd.grad(features.square().sum(), leaf)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # makes the constants
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = [x.clone() for x in step()]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(expected, captured, strict=True))


@no_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
def test_autocast_and_allowed_tf32_change_nothing(backend: str) -> None:
    waveform = noise(2, 8000).cuda()
    expected, _ = log_mel(waveform, None, PRESETS["kaldi"], backend=backend)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(log_mel(waveform, None, PRESETS["kaldi"], backend=backend)[0], expected)
    torch.set_float32_matmul_precision("high")
    try:
        assert torch.equal(log_mel(waveform, None, PRESETS["kaldi"], backend=backend)[0], expected)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_says_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clips, cpu = noise(1, 300), torch.device("cpu")
    with pytest.raises(ValueError, match="n_fft of at most 4096"):
        run("triton", clips, None, dataclasses.replace(TINY, n_fft=8192))
    with pytest.raises(ValueError, match="backend='hip': choose one of"):
        log_mel(clips, None, TINY, backend="hip")
    with pytest.raises(ValueError, match="the waveform is on cpu"):
        log_mel(clips.to(cpu), None, TINY, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a waveform on a GPU, got cpu"):
        log_mel(clips.to(cpu), None, TINY, backend="triton")
