"""Rehearsed launches: the kernels that the lots of `bench.gpu` launch are the ones that are compiled before them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels have no keys", allow_module_level=True)

from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench import clsp_step, peers
from bench.gpu import compiling, forms, kernels, loss, smoke
from bench.gpu.compiling import compile_forms, rehearsed
from bench.gpu.forms import FORMS, KernelForm, chosen
from bench.gpu.lots import LOTS
from bench.gpu.rehearsal import CudaForm, NoGpu, as_on_gpu, launched
from bench.kernel_peers import log_mel_forms
from bench.kernel_report import MODULES
from bench.parity import CAPTIONS, synthetic_batch
from bench.reference_step import build_ours, parity_optimizer
from bench.run import SIZES, Record, Run, Settings, Size
from bench.train_step import log_mel_config, tokenized
from fastclap import CLAP
from fastclap.kernels import dispatch
from fastclap.kernels.contrastive import triton_engine
from fastclap.kernels.layer_norm_gelu import layer_norm_gelu
from fastclap.kernels.log_mel import cuda_engine
from fastclap.kernels.offline import ARCHITECTURES, Compilation, cache_key, is_cached
from fastclap.kernels.waveform import normalize_waveform
from fastclap.models.tokenizer import Tokenizer, train_tokenizer
from fastclap.train.config import TrainConfig
from fastclap.train.step import Step

CPU = torch.device("cpu")
TOWER_KERNELS = {"toeplitz_attention", "layer_norm_gelu", "residual_layer_norm", "waveform", "waveform_convolution"}
ONE = "waveform step int16 to float32, given"  # one small kernel
# The towers at full width, where it decides which kernels run, and of few layers.
WIDE = Size(
    {**SIZES["large"].wavlm, "num_hidden_layers": 1, "intermediate_size": 128},
    {**SIZES["tiny"].xlm_roberta, "num_hidden_layers": 1},
    768,
)


@functools.cache
def keys_of(prefixes: tuple[str, ...]) -> set[str]:
    """Of all kernels that are compiled for a lot that names these forms."""
    failed: dict[str, str] = {}
    found = set(rehearsed(prefixes, 90, failed))
    assert failed == {}
    return found


def names(found: dict[str, Compilation | CudaForm], known: set[str]) -> list[str]:
    """Of the launched kernels that are not known."""
    return [str(c) for key, c in found.items() if key not in known]


def kinds(found: dict[str, Compilation | CudaForm]) -> set[str]:
    return {c.name.split(" ")[0] for c in found.values()}


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """A dry run."""
    record = Record(tmp_path / "lot.json")
    record.begin("lot", "CPU", "0", date="2026-01-01")
    return Run(record, Settings("cpu"), time.monotonic() + 200)


@pytest.fixture
def measured(run: Run) -> Run:
    """A run at tiny sizes on a CPU, in the dtype of a GPU and with its engine: for rehearsals."""
    run.dtype, run.engine = torch.bfloat16, "triton"
    return run


# ---------------------------------------------------------------------------------------------------------------------
# keys


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_everything_that_is_launched_is_among_the_modules_compilations(arch: int) -> None:
    known = {cache_key(c, arch) for module in MODULES for c in importlib.import_module(module).compilations(arch)}
    failed: dict[str, str] = {}
    found = rehearsed(("",), arch, failed)
    triton = {key: c for key, c in found.items() if not isinstance(c, CudaForm)}
    assert failed == {} and names(triton, known) == []
    assert 100 < len(found) < 250  # few enough to be compiled by a cold lot


def test_sizes_do_not_change_the_kernels_of_a_call() -> None:
    def call(clips: int, samples: int) -> None:
        normalize_waveform(torch.zeros(clips, samples, dtype=torch.int16), backend="triton")

    few = launched(lambda: call(3, 5003), 90)
    assert len(few) == 3 and few.keys() == launched(lambda: call(32, 160000), 90).keys()
    assert not few.keys() & launched(lambda: call(3, 5003), 80).keys()


def test_forms_are_chosen_by_how_their_names_begin() -> None:
    assert chosen(("",)) == list(FORMS) and len({form.name for form in FORMS}) == len(FORMS)
    assert {form.name for form in chosen(("attention step",))} < {form.name for form in chosen(("attention",))}
    for lot in LOTS.values():
        assert not lot.forms or chosen(lot.forms)
    with pytest.raises(ValueError, match="no kernel form begins with 'loss fancy'"):
        chosen(("loss plain", "loss fancy"))


def test_a_rehearsal_leaves_no_trace() -> None:
    before = (dispatch.on_gpu, dispatch.architecture, torch.empty, torch.empty_like, torch.Tensor.new_empty)
    before_driver, compile_method = driver._active, JITFunction._do_compile
    x = torch.zeros(4, 512, requires_grad=True)
    found = launched(lambda: layer_norm_gelu(x).sum().backward(), 90)
    (function, _) = dict.fromkeys(c.function for c in found.values())
    assert not any(isinstance(device, NoGpu) for device in function.device_caches)
    with pytest.raises(ZeroDivisionError):
        launched(lambda: 1 / 0, 90)
    after = (dispatch.on_gpu, dispatch.architecture, torch.empty, torch.empty_like, torch.Tensor.new_empty)
    assert before == after and driver._active is before_driver and JITFunction._do_compile is compile_method
    assert torch.equal(layer_norm_gelu(x), torch.zeros(4, 512))  # the torch engine again
    with pytest.raises(ValueError, match="on a CPU set TRITON_INTERPRET"):
        layer_norm_gelu(x, backend="triton")


# ---------------------------------------------------------------------------------------------------------------------
# the lots launch what is compiled for them


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CAPTIONS, 1000)


@pytest.fixture(scope="module")
def wide_model(tokenizer: Tokenizer) -> CLAP:
    torch.manual_seed(0)
    return build_ours(WIDE, tokenizer)


@pytest.fixture
def tf32() -> Iterator[None]:
    """As the training step has it."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("chunk", (0, 2))
def test_a_training_step_launches_what_its_lots_compile(
    wide_model: CLAP, tokenizer: Tokenizer, tf32: None, chunk: int
) -> None:
    wide_model.train()
    step = Step(wide_model, TrainConfig(optimizer=parity_optimizer(), chunk_size=chunk, precision="bf16"))
    batch = tokenized(synthetic_batch(4, 0.1, 0, distinct=0.5), tokenizer, 64)
    found = launched(lambda: step([batch]), 90)
    assert kinds(found) == {"contrastive", "feed_forward", *TOWER_KERNELS}
    for lot in ("step", "train", "step_more"):
        assert names(found, keys_of(LOTS[lot].forms)) == []


@pytest.mark.parametrize("bf16", (True, False))
def test_embedding_launches_what_its_lot_compiles(wide_model: CLAP, bf16: bool) -> None:
    clips = [torch.randint(-3000, 3000, (size,), dtype=torch.int16) for size in (1600, 1000, 1600)]

    def embed() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            wide_model.embed_audio([clip.numpy() for clip in clips])
            wide_model.embed_audio([clip.float().numpy() / 32768 for clip in clips])

    found = launched(embed, 90)
    assert kinds(found) == TOWER_KERNELS
    assert names(found, keys_of(LOTS["embed"].forms)) == []


def test_a_step_of_clsp_is_rehearsed_for_its_lot() -> None:
    """Steps of other lengths than those that are rehearsed, with other draws, launch nothing else."""
    lot, failed = LOTS["clsp"], {}  # type: ignore[var-annotated]
    known = rehearsed(lot.forms, 90, failed, lot.calls)
    assert failed == {}
    wanted = {"contrastive", "log_mel", "shared_attention", "bias_norm", "gated_convolution", "resampling"}
    assert kinds(known) == wanted | {"feed_forward", "scaled_adam"}  # Swoosh is compiled from GELU's file
    size = dataclasses.replace(
        clsp_step.SIZES["tiny"],
        zipformer=dataclasses.replace(
            clsp_step.SIZES["spear-xlarge"].zipformer,
            downsampling=[1, 4], layers=[1], kernel=[31, 15], feedforward=[192], channels=[2, 4, 8],
        ),
    )  # fmt: skip
    forms = clsp_step.Forms(size, CPU, None)
    step, batch = forms.our_step(precision="bf16"), clsp_step.host_batch(size, forms.tokenizer, 3, 0.47).batch
    torch.set_float32_matmul_precision("high")
    try:
        found = launched(lambda: step([batch]), 90)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert {"shared_attention", "resampling"} < kinds(found) and names(found, set(known)) == []


def test_the_log_mel_tower_launches_what_its_lot_compiles(tokenizer: Tokenizer, tf32: None) -> None:
    text = {"width": 64, "layers": 1, "heads": 1, "vocab_size": 1000, "context_length": 32}
    model = CLAP(log_mel_config(200_000, text, 64), tokenizer)
    step = Step(model, TrainConfig(optimizer=parity_optimizer(), precision="bf16"))
    batch = tokenized(synthetic_batch(3, 0.3, 0, least=1.0, rate=48000), tokenizer, 32)
    found = launched(lambda: step([batch]), 90)
    assert kinds(found) == {"contrastive", "log_mel"}
    assert names(found, keys_of(LOTS["step_more"].forms)) == []


@pytest.mark.parametrize("stage", (kernels.log_mel, kernels.towers))
def test_stages_of_the_kernels_launch_what_their_lots_compile(
    stage: Callable[[Run], None], measured: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ours(make: Callable[..., list[peers.Peer]]) -> Callable[..., list[peers.Peer]]:
        return lambda *arguments: [form for form in make(*arguments) if form.package == "fastclap"]

    for name in (
        "attention",
        "feed_forward",
        "layer_norm_gelu",
        "residual_layer_norm",
        "waveform",
        "waveform_convolution",
    ):
        monkeypatch.setattr(kernels, f"{name}_forms", ours(getattr(kernels, f"{name}_forms")))
    monkeypatch.setattr(kernels, "log_mel_forms", lambda *arguments, **_: log_mel_forms(*arguments, ours_only=True))
    monkeypatch.setattr(
        kernels, "CPU", dataclasses.replace(kernels.CPU, channels=512, heads=16)
    )  # a kernel is of one width
    found = launched(lambda: stage(measured), 90)
    assert names(found, keys_of(LOTS[stage.__name__].forms)) == []
    assert not any("reason" in row for row in measured.record.rows())


def test_the_losses_launch_what_their_lots_compile(measured: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def unchecked(loss: Callable[..., Any], backend: str, device: torch.device, **options: Any) -> peers.Loss:
        return functools.partial(loss, backend=backend, **options)

    monkeypatch.setattr(peers, "_fastclap", unchecked)  # it would refuse Triton on a CPU
    monkeypatch.setattr(loss, "ceilings", lambda run: (None, None))
    monkeypatch.setattr(loss, "MAIN_FORMS", ("fastclap Triton", loss.THREE_PASSES))

    found = launched(lambda: loss.main(measured), 90)
    assert {"contrastive sums", "contrastive gradient"} < {c.name for c in found.values()}
    assert names(found, keys_of(LOTS["loss"].forms)) == []

    def more() -> None:
        loss.contrasts(measured)
        loss.sigmoid(measured)
        loss.largest(measured)

    found |= launched(more, 90)
    assert {"contrastive sigmoid", "contrastive best"} < {c.name for c in found.values()}
    assert names(found, keys_of(LOTS["loss_more"].forms)) == []
    rows = [row for row in measured.record.rows() if "contrast" in row["case"]]
    assert len(rows) == 5
    ours = [row for row in measured.record.rows() if str(row["case"].get("form", "")).startswith("fastclap Triton")]
    assert ours and not any("reason" in row for row in [*ours, *rows])


@pytest.mark.parametrize(
    ("form", "precision", "options"),  # whether there are columns, a teacher, a guide and gradients
    [
        ("loss plain bfloat16, kept", "tf32", (True, False, False, True)),
        ("loss plain bfloat16, forward", "tf32", (True, False, False, False)),
        ("loss plain float32, formed", "tf32x3", (True, False, False, True)),
        ("loss one direction", "tf32", (False, False, False, True)),
        ("loss teacher float32, TF32", "tf32", (True, True, False, True)),
    ],
)
def test_a_new_kind_of_loss_compiles_together_what_it_launches(
    form: str, precision: str, options: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    together: dict[str, str] = {}

    def keep(compilations: Collection[Compilation], arch: int) -> None:
        together.update({cache_key(c, arch): c.name for c in compilations})

    monkeypatch.setattr(triton_engine, "compile_together", keep)
    (found,) = chosen((form,))
    triton_engine._compile_ahead.__wrapped__(90, found.dtype, precision, *options)
    assert set(together) == keys_of((form,)), list(together.values())


# ---------------------------------------------------------------------------------------------------------------------
# what is compiled before is found at a launch


class Launcher:
    """Triton's own launcher, down to where it would load a kernel onto the GPU."""

    launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: None)
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *arguments: (None, None, 0, 0, 1024),
    )


class CountedGpu(Launcher, NoGpu):
    pass


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of every look into a cache of its own: whether the kernel was there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    hits: list[bool] = []
    before = knobs.compilation.listener
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    yield hits
    knobs.compilation.listener = before


def test_a_launch_compiles_nothing_that_was_compiled_before(
    compilations: list[bool], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    report = compile_forms((ONE,), 90, 100)
    assert report["seconds"] < 100
    expected = {"kernels": 1, "hits": 0, "misses": 1, "done": 1, "failed": {}, "unfinished": []}
    assert {name: report[name] for name in expected} == expected
    assert "[compile] 1 kernels: 0 hits, 1 misses, 1 done" in capfd.readouterr().out
    kept = sorted((tmp_path / "triton").rglob("*"))
    assert any(path.suffix == ".cubin" for path in kept)
    again = compile_forms((ONE,), 90, 100)
    assert (again["kernels"], again["hits"], again["misses"]) == (1, 1, 0)

    (form,) = chosen((ONE,))
    inputs = form.inputs(CPU)
    with as_on_gpu(CountedGpu(90)):
        form.ours(inputs)
        form.ours(inputs)  # found in the launcher's own memory
    assert compilations == [True]
    assert sorted((tmp_path / "triton").rglob("*")) == kept
    with as_on_gpu(CountedGpu(90)):  # another kernel is compiled, and this test would see it
        form.ours({**inputs, "audio": inputs["audio"].float()})
    assert compilations == [True, False]


@pytest.mark.slow
def test_a_launch_of_any_form_compiles_nothing_that_was_compiled_before(compilations: list[bool]) -> None:
    report = compile_forms(("",), 90, 1200)
    assert report["failed"] == {} and report["done"] == report["kernels"]
    gpu = CountedGpu(90)
    with as_on_gpu(gpu):
        for form in FORMS:
            form.ours(form.inputs(CPU))
    cuda = [c for c in rehearsed(("",), 90, {}).values() if isinstance(c, CudaForm)]
    assert cuda and all(cuda_engine.is_compiled(*c[1:], 90) for c in cuda)
    assert len(compilations) == report["kernels"] - len(cuda) and all(compilations)


def test_a_kernel_that_fails_or_hangs_does_not_stop_the_rest(
    compilations: list[bool], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = compiling.compiled_kernel

    def broken(c: Compilation, arch: int) -> Any:
        if "float32 to float32" in c.name:
            raise RuntimeError("no such\ninstruction")
        if "bfloat16" in c.name:
            os.kill(os.getpid(), signal.SIGKILL)
        if "measured" in c.name and "blocks" in c.name:
            time.sleep(100)
        return real(c, arch)

    monkeypatch.setattr(compiling, "compiled_kernel", broken)
    wanted = ("waveform step", "waveform int16 to bfloat16, given statistics, lengths")
    start = time.monotonic()
    report = compile_forms(wanted, 90, 8)
    assert time.monotonic() - start < 25
    assert report["done"] and set(report["failed"].values()) == {
        "RuntimeError: no such instruction",
        "the process that compiles it ended with -9",
    }
    (hung,) = report["unfinished"]
    assert hung.startswith("waveform blocks of waveform step int16")
    assert "RuntimeError: no such instruction" in capfd.readouterr().out


def test_a_form_that_cannot_be_rehearsed_is_named(
    compilations: list[bool], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (good,) = chosen((ONE,))
    bad = dataclasses.replace(
        good, name="waveform that raises", call=lambda inputs, engine: {"output": inputs["nothing"]}
    )
    monkeypatch.setattr(forms, "FORMS", (bad, good))
    monkeypatch.setattr(compiling, "compiled_kernel", lambda c, arch: pytest.fail("it was not to be compiled"))
    monkeypatch.setattr(compiling, "is_cached", lambda c, arch: True)
    report = compile_forms(("waveform",), 90, 60)
    assert report["failed"] == {"waveform that raises": "KeyError: 'nothing'"} and report["hits"] == 1


def test_a_rehearsal_that_dies_is_said_to_have(
    compilations: list[bool], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiling, "launched", lambda call, arch: os._exit(3))
    report = compile_forms((ONE,), 90, 60)
    assert report["failed"] == {"all others": "the process that starts them ended with 3"} and report["kernels"] == 0
    with pytest.raises(ValueError, match="no kernel form begins with 'one'"):
        compile_forms(("one",), 90, 60)


def test_is_cached_asks_for_the_kernel_itself(compilations: list[bool]) -> None:
    assert not any(is_cached(c, 90) for c in rehearsed((ONE,), 90, {}).values())


# ---------------------------------------------------------------------------------------------------------------------
# the lot `smoke`


def of_each_kernel() -> tuple[KernelForm, ...]:
    wanted = (
        "loss plain bf",
        "sigmoid",
        "attention bf",
        "layer norm gelu bf",
        "waveform int16",
        "waveform convolution bf",
    )
    wanted += ("log-mel int16",)
    return tuple(chosen((prefix,))[0] for prefix in wanted)


def test_forms_agree_with_float64_in_a_dry_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "FORMS", of_each_kernel())
    smoke.kernels(run)
    smoke.kernels(run)  # what has a row is not done again
    rows = list(run.record.rows())
    assert [row["case"]["form"] for row in rows] == [form.name for form in of_each_kernel()]
    for row in rows:
        assert row["passed"] and row["repeats"] and row["errors"].keys() == row["errors_of_torch"].keys()
    by_form = {row["case"]["form"]: set(row["errors"]) for row in rows}
    assert by_form["loss plain bfloat16, kept"] == {"output", "da", "db", "dscale"}
    assert by_form["attention bfloat16, 37 frames"] == {"output", "dq", "dk", "dv", "dtable", "dgate"}


def test_wrong_and_raising_kernels_are_rows_and_the_rest_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = chosen(("layer norm gelu float32, 65",))[0]
    calls = itertools.count()

    def changed(change: Callable[[Tensor], Tensor]) -> Callable[[forms.Tensors, str], forms.Tensors]:
        def call(inputs: forms.Tensors, engine: str) -> forms.Tensors:
            found = good.call(inputs, "torch")
            return found if engine == "torch" else {**found, "dx": change(found["dx"])}

        return call

    def raising(inputs: forms.Tensors, engine: str) -> forms.Tensors:
        raise RuntimeError("no kernel image")

    wrong = {
        "off": changed(lambda x: x * 1.001),
        "nan": changed(lambda x: x.masked_fill(x == x.max(), torch.nan)),
        "drifting": changed(lambda x: x + 1e-9 * next(calls)),
        "raising": raising,
        "lacking": lambda inputs, engine: {"output": good.call(inputs, "torch")["output"]},
    }
    broken = [dataclasses.replace(good, name=name, call=call) for name, call in wrong.items()]
    monkeypatch.setattr(smoke, "FORMS", (*broken, good))
    smoke.kernels(run)
    rows = {row["case"]["form"]: row for row in run.record.rows()}
    assert [rows[name].get("passed") for name in ("off", "nan", "drifting", good.name)] == [False, False, False, True]
    assert rows["off"]["repeats"] and not rows["drifting"]["repeats"]
    assert rows["raising"]["reason"] == "RuntimeError: no kernel image"
    assert rows["lacking"]["reason"].startswith("ValueError: the kernel gives ['output'], the reference ['dbias'")
    table = capsys.readouterr().out.split("1 of 6 well\n")[1]
    assert "| off | dx 0.001 above 1e-05 |" in table and "| drifting | two runs differ |" in table
    assert "| raising | RuntimeError: no kernel image |" in table and "| nan | dx nan above 1e-05" in table


def test_the_positional_convolution_is_checked_and_timed(run: Run) -> None:
    smoke.positions(run)
    smoke.positions(run)
    errors = [row for row in run.record.rows() if row["case"]["positions"] == "errors"]
    assert [(row["case"]["dtype"], row["passed"]) for row in errors] == [("float32", True), ("bfloat16", True)]
    assert {"output", "dx", "dbias"} < errors[0]["errors"].keys()
    times = [row for row in run.record.rows() if row["case"]["positions"] == "times"]
    assert [(row["case"]["cudnn_deterministic"], row["case"]["passes"]) for row in times] == [
        (deterministic, passes) for deterministic in (False, True) for passes in ("forward", "backward")
    ]
    assert all(row["median_ms"] > 0 for row in times) and not torch.backends.cudnn.deterministic
