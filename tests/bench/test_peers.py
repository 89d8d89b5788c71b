"""The peers' adapters: all compute the same loss, and one that cannot run says why."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from bench import kernel_peers, peers, timing
from bench.compare import Warm, warm_up
from bench.gpu.loss import loss_entries
from bench.run import Record, Row, Run, Settings
from fastclap.kernels.log_mel.torch_engine import log_mel_reference
from fastclap.testing import assert_close_rel

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SCALE = 14.3


@pytest.mark.parametrize(
    ("loss", "forms"), [("info_nce", peers.info_nce_peers(CPU, SCALE)), ("sigmoid", peers.sigmoid_peers(CPU))]
)
def test_forms_that_run_here_match_float64(loss: str, forms: list[peers.Peer]) -> None:
    inputs = timing.embeddings(50, 24, SCALE, CPU, torch.float32)
    expected = peers.reference(loss, *inputs)
    runnable = [form for form in forms if form.run is not None]
    assert {"fastclap torch", "materialised"} <= {form.name for form in runnable}
    for form in runnable:
        assert form.run is not None
        found = peers.errors(form.run, expected, *inputs)
        assert all(error is not None and error < 1e-5 for error in found.values()), (form.name, found)
    assert all(tensor.grad is None for tensor in inputs)  # measured on copies


def test_linear_cross_entropies_become_the_symmetric_loss() -> None:
    run = peers.two_calls(lambda hidden, weight, labels: F.cross_entropy(hidden @ weight.t(), labels))
    inputs = timing.embeddings(40, 16, SCALE, CPU, torch.float32)
    found = peers.errors(run, peers.reference("info_nce", *inputs), *inputs)
    assert all(error is not None and error < 1e-5 for error in found.values())


def _same(stand_in: mock.Mock) -> mock.Mock:
    return stand_in


@pytest.mark.parametrize(
    ("module", "name", "make", "taking_tensors", "forward"),
    [
        ("inf_cl", "cal_flash_loss", lambda: peers._inf_cl(GPU), _same, None),
        (
            *("memeff", "MemoryEfficientCLIPLoss", lambda: peers._memeff(GPU, SCALE)),
            *(lambda stand_in: stand_in.return_value, "self image_features text_features"),
        ),
        ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", lambda: peers._quack(GPU), _same, None),
        ("cut_cross_entropy", "linear_cross_entropy", lambda: peers._cut_cross_entropy(GPU, exact=True), _same, None),
        ("cut_cross_entropy", "linear_cross_entropy", lambda: peers._cut_cross_entropy(GPU, exact=False), _same, None),
        (
            *("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"),
            *(lambda: peers._liger(GPU), lambda stand_in: stand_in.apply, "ctx _input weight target"),
        ),
        ("siglip_kernel", "fused_siglip_loss", lambda: peers._siglip_kernel(GPU), _same, None),
    ],
)
def test_calls_fit_the_installed_package(
    module: str,
    name: str,
    make: Callable[[], peers.Loss],
    taking_tensors: Callable[[mock.Mock], mock.Mock],
    forward: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a package that is there, by its signatures: what it computes needs a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))  # asked for at an import
    try:
        package = importlib.import_module(module)
    except Exception as error:  # absent, or in want of a GPU
        pytest.skip(f"{module} cannot be imported: {error}")
    real = getattr(package, name)
    stand_in = mock.create_autospec(real)
    called = taking_tensors(stand_in)
    called.return_value = (torch.tensor(2.0),) if name.startswith("Liger") else torch.tensor(2.0)
    monkeypatch.setattr(package, name, stand_in)
    assert make()(*timing.embeddings(8, 32, SCALE, CPU, torch.bfloat16)).item() == 2
    assert called.call_count == (1 if module in ("memeff", "siglip_kernel") else 2)
    for call in called.call_args_list:
        if forward is not None:  # the signature of a class says nothing of what its forward takes
            names = forward.split()
            assert list(inspect.signature(real.forward).parameters)[: len(names)] == names
            assert len(call.args) == len(names) - 1 and not call.kwargs


def test_absent_packages_are_named_as_pip_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    forms = {form.name: form for form in [*peers.info_nce_peers(CPU, SCALE), *peers.sigmoid_peers(CPU)]}
    packages = {"inf_cl": "inf-cl", "memeff": "memeff", "open_clip": "open-clip-torch", "quack": "quack-kernels"}
    packages |= {"cut-cross-entropy": "cut-cross-entropy", "liger-kernel": "liger-kernel"}
    packages |= {"siglip-kernel": "siglip-kernel"}
    for name, package in packages.items():
        form = forms[name]
        assert form.run is None and form.version is None and form.package == package
        assert form.notes.startswith(f"not installed (pip install {package})")


def test_our_forms_keep_exponentials_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "info_nce", lambda *_, **options: options)
    forms = {form.name: form for form in peers.info_nce_peers(torch.device("cuda"), SCALE)}
    for name, passes, keep in (("fastclap Triton", 4, None), ("fastclap Triton, 3 passes", 3, True)):
        form = forms[name]
        assert form.run is not None and form.passes == passes
        options = form.run(*timing.embeddings(4, 4, 1.0, CPU, torch.float32))
        assert options["backend"] == "triton" and options.get("keep_exponentials") is keep


def test_warm_up_leaves_a_row_a_form_and_stops_for_lack_of_time(tmp_path: Path) -> None:
    def warm_forms(loss: str, seconds: float) -> tuple[dict[str, Warm], dict[str, Row]]:
        record = Record(tmp_path / f"{loss}.json")
        record.begin("lot", "CPU", "", date="")
        run = Run(record, Settings("cpu"), time.monotonic() + seconds)
        warm = warm_up(run, loss_entries(run, loss, 32, 16, 60.0))
        return warm, {row["case"]["form"]: row for row in record.rows()}

    warm, rows = warm_forms("info_nce", 60.0)
    assert set(warm) == {form for form, row in rows.items() if "reason" not in row}
    assert all(found.alone_ms > 0 for found in warm.values())
    assert rows["materialised"]["errors"]["da"] < 1e-5
    late, rows = warm_forms("sigmoid", 0.0)
    assert not late and rows["materialised"]["reason"] == "not reached: no time left"


@pytest.mark.parametrize("name", kernel_peers.FRONT_ENDS)
def test_log_mel_forms_match_float64_of_what_they_compute(name: str) -> None:
    spec = kernel_peers.FRONT_ENDS[name]
    clips = 0.1 * torch.randn(2, spec.sampling_rate // 10, generator=torch.Generator().manual_seed(0))
    for audio, features, bound in ((torch.float32, torch.float32, 1e-5), (torch.int16, torch.bfloat16, 5e-3)):
        given = (clips * 32768).to(torch.int16) if audio == torch.int16 else clips
        forms = kernel_peers.log_mel_forms(spec, CPU, audio, features)
        runnable = [(form, computed) for form, computed in forms if form.run is not None]
        assert {"fastclap", "fastclap, lengths", "fastclap torch", "torchaudio"} <= {form.name for form, _ in runnable}
        for form, computed in runnable:
            assert form.run is not None
            out = form.run(given)
            assert out.dtype == features and out.shape[::2] == (2, spec.n_mels), form.name
            if computed is not None:
                expected = log_mel_reference(given, None, computed)[0]
                assert_close_rel(form.name, expected[:, : out.shape[1]], out, bound)


def test_absent_front_ends_are_named_as_pip_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, *_: object) -> object:
        raise ModuleNotFoundError(name)

    def no_version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.setattr(importlib.metadata, "version", no_version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    found: dict[str, peers.Peer] = {}
    for spec in kernel_peers.FRONT_ENDS.values():
        for form, _ in kernel_peers.log_mel_forms(spec, CPU, torch.float32, torch.float32):
            found[form.name] = form
    for name in ("torchaudio", "torchaudio kaldi", "nnAudio", "flashmel", "torchlibrosa", "lhotse", "kaldifeat"):
        package = name.partition(" ")[0]
        assert found[name].run is None and found[name].package == package
        assert found[name].notes.startswith(f"not installed (pip install {package})")
    assert found["fastclap"].run is not None


def test_kernel_forms_that_need_a_gpu_say_so() -> None:
    forms = {form.name: form for form in [*kernel_peers.attention_forms(CPU), *kernel_peers.layer_norm_gelu_forms(CPU)]}
    for name in ("FlexAttention", "torch.compile"):
        assert forms[name].run is None and "GPU" in forms[name].notes
    ours = [forms["fastclap"], *kernel_peers.waveform_forms(CPU, torch.float32)[:2]]
    ours += kernel_peers.waveform_convolution_forms(CPU)[:3]
    assert all(form.run is not None for form in ours)
