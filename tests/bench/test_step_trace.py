"""The traced step: backward passes in Python, counts by hand, memory of a real step, our operators, gradients sent."""

from __future__ import annotations

import json
import os
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import clsp_step, step_trace, train_step
from bench.fake_compiler import fake_compiler
from bench.fake_gpu import Engine, fake_gpu, without_data
from bench.parity import CAPTIONS
from bench.run import SIZES
from bench.step_trace import GRANULE, Subject, Trace, Traced, host_batch, recipe, sending, traced
from fastclap.models.tokenizer import train_tokenizer
from fastclap.train import distributed, step
from fastclap.train.config import TrainConfig
from fastclap.train.distributed import Gradients

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TINY = SIZES["tiny"]
ROWS = 6
LAYERS, CONVOLUTIONS = TINY.wavlm["num_hidden_layers"], 7


@pytest.fixture(scope="module")
def batch() -> Any:
    return host_batch(ROWS, 0.5, 3, train_tokenizer(CAPTIONS, 1000), 64)


def subject(device: torch.device, config: TrainConfig) -> Subject:
    torch.manual_seed(0)
    return Subject.on(device, TINY, config, train_tokenizer(CAPTIONS, 1000))


def on_fake_gpu(batch: Any, **options: Any) -> Traced:
    with fake_gpu():
        made = subject(GPU, recipe(**options))
        return traced(made.take(batch), made.model, made.step.optimizer, ROWS)


def counted(call: Any, *standing: Tensor) -> Trace:
    trace = Trace("cpu", standing)
    with trace:
        trace.result = call()  # type: ignore[attr-defined]  # kept, so that it stays alive
    return trace


# ---------------------------------------------------------------------------------------------------------------------
# backward passes in Python


@pytest.mark.parametrize("options", [{}, {"chunk": 4}, {"checkpoint_activations": True}], ids=str)
def test_the_engine_does_as_torchs(batch: Any, options: dict[str, Any]) -> None:
    """Bit for bit the same gradients, which arrive in the same order, but for those that one node passes on."""

    def gradients(engine: AbstractContextManager[None]) -> tuple[dict[str, Tensor], list[str]]:
        config = recipe(**options)
        config.precision = "fp32"
        made, order = subject(CPU, config), []
        names = {p: name for name, p in made.model.named_parameters()}
        for parameter in names:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: order.append(names[p]))
        found: dict[str, Tensor] = {}
        made.step.optimizer.register_step_pre_hook(
            lambda *_: found.update({name: p.grad.clone() for p, name in names.items() if p.grad is not None})
        )
        with engine:
            made.take(batch)()
        return found, order

    theirs, their_order = gradients(nullcontext())
    ours, our_order = gradients(Engine().installed())
    assert len(theirs) > 100 and theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    of_one_node = re.compile(r"\.[qkv]_proj\.")
    assert [of_one_node.sub(".", name) for name in our_order] == [of_one_node.sub(".", name) for name in their_order]


def test_the_engine_keeps_a_graph_only_where_asked() -> None:
    x = torch.randn(3, requires_grad=True)
    with Engine().installed():
        y = x.exp().sum()
        first = torch.autograd.grad(y, x, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(y, x)[0]) and torch.equal(first, x.detach().exp())
        with pytest.raises(RuntimeError, match="retain_graph=True"):
            y.backward()
        with pytest.raises(NotImplementedError, match="create_graph"):
            torch.autograd.grad(x.exp().sum(), x, create_graph=True)


def test_gradients_are_fitted_to_what_was_broadcast_or_cast() -> None:
    bias, x = torch.randn(4, requires_grad=True), torch.randn(3, 4)
    with Engine().installed():
        (x.double() * bias).sum().backward()
        assert bias.grad is not None and bias.grad.dtype == torch.float32
        assert torch.allclose(bias.grad, x.sum(0))


# ---------------------------------------------------------------------------------------------------------------------
# counts


def test_totals_of_a_small_module_are_those_of_a_hand_count() -> None:
    weight, x = torch.randn(16, 8, requires_grad=True), torch.randn(4, 8)
    trace = Trace("cpu", [weight])
    with trace:
        hidden = F.linear(x, weight)  # t() is a view
        y = F.gelu(hidden).sum()
        with trace.during("backward"):
            y.backward()
    forward = {name: cost for (phase, name), cost in trace.costs.items() if phase == "forward"}
    assert {name: cost.operations for name, cost in forward.items()} == {"mm": 1, "gelu": 1, "sum": 1}
    assert forward["mm"].flops == 2 * 4 * 8 * 16
    assert forward["mm"].bytes == forward["mm"].product_bytes == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert forward["gelu"].bytes == 4 * 2 * 64 and forward["gelu"].product_bytes == forward["gelu"].flops == 0
    assert forward["sum"].bytes == 4 * (64 + 1)
    backward = {name: cost for (phase, name), cost in trace.costs.items() if phase == "backward"}
    # the gradient of the sum is one number, repeated with stride 0; the other operand of gelu_backward is not
    assert backward["gelu_backward"].bytes == 4 * (1 + 64 + 64)
    assert backward["mm"].flops == 2 * 16 * 4 * 8 and backward["mm"].operations == 1
    ms = 1e3 * max(2 * 4 * 8 * 16 / 650e12, forward["mm"].bytes / 2.7e12)
    assert forward["mm"].predicted_ms == pytest.approx(ms)


@pytest.mark.parametrize(
    ("call", "name", "num_bytes"),
    [
        (lambda x, rows: x.zero_(), "zero_", 400),
        (lambda x, rows: x.copy_(x.new_empty(10)), "copy_", 400 + 40),
        (lambda x, rows: x.add_(1.0), "add_", 2 * 400),
        (lambda x, rows: F.embedding(rows, x), "embedding", 3 * 8 + 2 * 3 * 40),
        (lambda x, rows: x[rows], "index", 3 * 8 + 2 * 3 * 40),
        (lambda x, rows: x.bfloat16(), "float32 to bfloat16", 400 + 200),
        (lambda x, rows: torch._foreach_mul_([x, rows.float()], 2.0), "_foreach_mul_", 2 * (400 + 12)),
    ],
)
def test_bytes_of_an_operation(call: Any, name: str, num_bytes: int) -> None:
    costs = counted(lambda: call(torch.empty(10, 10), torch.tensor([1, 2, 3]))).costs
    assert costs["forward", name].bytes == num_bytes


def test_nothing_moves_for_views_and_empty_tensors() -> None:
    x = torch.randn(4, 6)
    costs = counted(lambda: (x.t().unflatten(0, (2, 3))[1].expand(2, 3, 4), torch.empty(5), x.detach())).costs
    assert not costs


@pytest.mark.parametrize("mask", [[True, True, False], [False, True, False], [True, False, False]])
def test_products_of_a_grouped_convolution(mask: list[bool]) -> None:
    x, weight, up = torch.randn(2, 8, 20), torch.randn(8, 2, 5), torch.randn(2, 8, 16)
    options: Any = ([1], [0], [1], False, [0], 4, mask)
    trace = counted(lambda: torch.ops.aten.convolution_backward(up, x, weight, None, *options))
    forward = counted(lambda: F.conv1d(x, weight, groups=4))
    once = 2 * up.numel() * 2 * 5
    assert forward.costs["forward", "convolution"].flops == once
    assert trace.costs["forward", "convolution_backward"].flops == sum(mask) * once


def test_alive_bytes_follow_the_tensors() -> None:
    weight = torch.randn(1000)
    trace = Trace("cpu", [weight])
    with trace:
        low = weight.bfloat16()
        x = torch.empty(300)  # 1,200 bytes
        view = x[3:]
        assert (trace.alive, trace.casts) == (2048 + 3 * GRANULE, 2048)
        del x
        assert trace.alive == 2048 + 3 * GRANULE  # the view holds them
        del view, low
        assert (trace.alive, trace.casts) == (0, 0) and trace.peak == 2048 + 3 * GRANULE


# ---------------------------------------------------------------------------------------------------------------------
# the step


def test_our_operators_are_seen_as_operators(batch: Any) -> None:
    result = on_fake_gpu(batch)
    found = {key: cost.operations for key, cost in result.costs.items()}
    counts = {"gated_toeplitz_attention": LAYERS, "layer_norm_gelu": CONVOLUTIONS - 1, "waveform_convolution": 1}
    for name, operations in counts.items():
        assert found["forward", name] == operations
        assert found["backward", f"{name}_backward"] == operations
    assert found["forward", "normalize_waveform"] == found["loss", "info_nce"] == 1
    assert found["optimizer", "_fused_adamw_"] == 2
    assert found["loss", "binary_cross_entropy_with_logits"] == 1  # the tag loss
    frames = 24  # of 8,000 samples
    attention = result.costs["forward", "gated_toeplitz_attention"]
    assert attention.flops == LAYERS * 4 * ROWS * frames**2 * TINY.wavlm["hidden_size"]
    assert result.costs["backward", "gated_toeplitz_attention_backward"].flops == 2.5 * attention.flops
    parameters = sum(p.numel() for p in result.arrivals)
    fused = result.costs["optimizer", "_fused_adamw_"].bytes
    assert fused == pytest.approx(28 * parameters, rel=0.01)  # reads four numbers a parameter, writes three
    assert result.total.bytes == sum(result.phase(phase).bytes for phase in step_trace.PHASES)


def test_two_traces_are_the_same_but_for_the_time(batch: Any) -> None:
    first, second = on_fake_gpu(batch), on_fake_gpu(batch)
    assert first.costs == second.costs
    for name in ("held", "casts", "peak", "standing"):
        assert getattr(first, name) == getattr(second, name) > 0
    assert [p.shape for p in first.arrivals] == [p.shape for p in second.arrivals]


def test_what_is_held_and_how_often_it_is_computed(batch: Any) -> None:
    plain, cached, checkpointed = (
        on_fake_gpu(batch, **options) for options in ({}, {"chunk": 2}, {"checkpoint_activations": True})
    )
    assert cached.held < plain.held / 2 and cached.peak < plain.peak  # one chunk of three, until the loss
    assert checkpointed.held < plain.held
    attention = "gated_toeplitz_attention"
    assert (
        cached.costs["forward", attention].operations == (3 + 2) * LAYERS
    )  # three chunks, and again those without a graph
    assert checkpointed.costs["backward", attention].operations == LAYERS  # once more
    assert cached.phase("loss").operations == plain.phase("loss").operations


def test_saved_activations_are_those_of_a_real_step(batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: bytes that autograd saves in a real step, the trace of a real step, and of one without data."""

    def loss(a: Tensor, b: Tensor, scale: Tensor, **_: Any) -> Tensor:
        """In place of the CPU's engine, which reads how many rows have a positive."""
        return F.cross_entropy(scale * F.normalize(a) @ F.normalize(b).t(), torch.arange(len(a)))

    monkeypatch.setattr(step, "info_nce", loss)
    config = recipe()
    config.precision = "fp32"
    with without_data():
        made = subject(CPU, config)
        shapes = traced(made.take(batch), made.model, made.step.optimizer, ROWS)
    made = subject(CPU, config)
    real = traced(made.take(batch), made.model, made.step.optimizer, ROWS)
    with Engine().installed():
        walked = traced(made.take(batch), made.model, made.step.optimizer, ROWS)
    own = {x.untyped_storage().data_ptr() for x in (*made.model.parameters(), *made.model.buffers())}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made.take(batch)()
    num_bytes = sum(-(-x.untyped_storage().nbytes() // GRANULE) * GRANULE for x in saved.values())
    assert shapes.held == pytest.approx(num_bytes, rel=2e-3)
    samples = batch.audio.numel() * 2  # the batch, which is there without being saved
    assert num_bytes <= real.held <= num_bytes + samples + 8 * GRANULE
    assert walked.held == pytest.approx(real.held, rel=1e-3) and walked.peak == pytest.approx(real.peak, rel=5e-3)
    assert shapes.total.flops == real.total.flops == walked.total.flops


# ---------------------------------------------------------------------------------------------------------------------
# compiled layers


def test_kernels_of_a_compiled_graph_are_those_of_a_hand_count() -> None:
    """A product, and a GELU with all around it as one kernel, whose input the backward pass has kept."""
    rows, width = 1000, 64
    held = {}
    with fake_gpu():
        weight, x = nn.Parameter(torch.empty(width, width, device=GPU)), torch.empty(rows, width, device=GPU)
        trace = Trace("cuda", [weight, x])
        with fake_compiler(trace.run_graph):
            call = torch.compile(lambda x: F.gelu((x @ weight).float() + 1).square() * 2, dynamic=True)
            for paused in (True, False):
                with trace, trace.paused() if paused else nullcontext():
                    y = call(x)
                    held[paused] = trace.alive
                    with trace.during("backward"):
                        y.backward(torch.empty_like(y))
                weight.grad = None
            with pytest.raises(NotImplementedError, match="is called with"):
                call(x[:-1])
    matrix, square = 4 * rows * width, 4 * width**2
    costs = {f"{phase}, {name.partition(':')[0]}": cost for (phase, name), cost in trace.costs.items()}
    assert {key: (cost.operations, cost.bytes) for key, cost in costs.items()} == {
        "forward, mm": (1, 2 * matrix + square),
        "forward, compiled": (1, 2 * matrix),
        "backward, compiled": (1, 3 * matrix),
        "backward, mm": (1, 2 * matrix + square),
    }
    assert costs["forward, mm"].flops == costs["backward, mm"].flops == 2 * rows * width**2
    assert held[True] == 0 and held[False] == 2 * matrix  # the result, and the product


def test_a_compiled_step_has_the_products_of_an_eager_one(batch: Any) -> None:
    def on(compiled: bool) -> tuple[Traced, list[str]]:
        with fake_gpu():
            made = Subject.on(GPU, TINY, recipe(), train_tokenizer(CAPTIONS, 1000), compiled)
            names = {parameter: name for name, parameter in made.model.named_parameters()}
            result = traced(made.take(batch), made.model, made.step.optimizer, ROWS, compiled=compiled)
            return result, sorted(names[parameter] for parameter in result.arrivals)

    (eager, eager_names), (compiled, names) = on(False), on(True)
    assert names == eager_names and len(names) > 100
    assert compiled.total.flops == eager.total.flops
    for phase in ("forward", "backward"):
        assert compiled.phase(phase).bytes < eager.phase(phase).bytes
        assert compiled.phase(phase).operations < eager.phase(phase).operations
    assert compiled.phase("loss") == eager.phase("loss") and compiled.phase("optimizer") == eager.phase("optimizer")
    assert compiled.held < eager.held
    assert compiled.costs["backward", "gated_toeplitz_attention_backward"].operations == LAYERS


# ---------------------------------------------------------------------------------------------------------------------
# gradients


def sent(times: list[float | None], monkeypatch: pytest.MonkeyPatch) -> step_trace.Sending:
    """Of four parameters, a bucket each, which leave from the last to the first; `times` are those of the gradients."""
    for name in ("_BUCKET_BYTES", "_LAST_BUCKET_BYTES"):
        monkeypatch.setattr(distributed, name, 400)
    parameters = [nn.Parameter(torch.zeros(100)) for _ in range(4)]
    known = [(time, p) for time, p in zip(times, parameters, strict=True) if time is not None]
    arrivals = {p: time for time, p in sorted(known, key=lambda pair: pair[0])}
    return sending(lambda world: Gradients(parameters[::-1], world), arrivals, CPU, 4)


def test_gradients_in_order_leave_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sent([8.0, 6.0, 4.0, 2.0], monkeypatch)
    assert (found.buckets, found.total, found.first_after) == (4, 1600, 0.25)
    assert (found.waited, found.missing, found.at_the_end, found.left) == (0, 0, 400, 400)


def test_gradients_wait_behind_a_bucket_that_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sent([1.0, 10.0, 3.0, 9.7], monkeypatch)
    assert found.first_after == 0.97
    assert (found.waited, found.missing, found.at_the_end) == (800, 0, 1600)  # the first and the third
    assert found.left == 800  # the last, and the one behind it; the others were through by then


def test_a_parameter_without_a_gradient_holds_up_what_is_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sent([1.0, None, 3.0, 2.0], monkeypatch)
    assert (found.missing, found.waited, found.left) == (400, 400, 3 * 400)


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_the_record_and_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step_trace.main(
        ["--size", "tiny", "--batch", "4", "--seconds", "0.3", "--tags", "2", "--top", "5", "--out", str(tmp_path)]
    )
    record = json.loads((tmp_path / "record.json").read_text())
    rows = record["rows"]
    total = next(row for row in rows if row["case"] == {"phase": "all"})
    operations = [row for row in rows if "operation" in row["case"]]
    for name in ("operations", "bytes", "flops", "product_bytes", "other_bytes"):
        assert sum(row[name] for row in operations) == total[name] > 0
    assert total["flops"] == pytest.approx(total["model_flops"], rel=0.3)  # equal captions once, prompts, attention
    gradients = next(row for row in rows if "gradients" in row["case"])
    assert gradients["case"]["ranks"] == 8 and gradients["missing"] == 0 < gradients["total"]
    assert record["runs"][-1]["status"] == "done" and record["runs"][-1]["settings"]["assumed_tflops"] == 650
    text = (tmp_path / "record.md").read_text()
    assert text in capsys.readouterr().out and "Predicted ms are no measurement" in text
    assert text.count("\n| forward |") + text.count("\n| backward |") >= 4
    assert str(tmp_path) not in text + json.dumps(record)


def test_forms_of_the_ablation(monkeypatch: pytest.MonkeyPatch) -> None:
    every = train_step.Forms.ablation

    def some(forms: train_step.Forms) -> list[train_step.Form]:
        return [f for f in every(forms) if f.name in ("transformers' WavLM, float32", "+ bf16", "+ fused loss")]

    monkeypatch.setattr(train_step.Forms, "all", some)
    parts = step_trace.measure(
        step_trace.parser().parse_args(["--ablation", "--size", "tiny", "--batch", "4", "--seconds", "0.3"])
    )
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in parts.splitlines() if line.startswith("|")}
    assert "reads numbers off the device" in rows["transformers' WavLM, float32"][1]
    assert float(rows["+ bf16"][7].strip("| ")) > float(rows["+ fused loss"][7].strip("| ")) > 0
    assert float(rows["+ bf16"][6]) > float(rows["+ fused loss"][6])  # GB at the peak


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "1"], "--batch must be at least 2, is 1"),
        (["--ranks", "1"], "--ranks must be at least 2"),
        (["--seconds", "0"], "--seconds must be between"),
        (["--ablation", "--checkpoint-activations"], "leave one of them out"),
    ],
)
def test_what_cannot_be_traced_is_named(flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        step_trace.main(flags)


def test_nothing_of_the_fake_gpu_stays() -> None:
    plain = F.scaled_dot_product_attention, nn.Module.to, torch.autograd._engine_run_backward
    with fake_gpu():
        assert torch.empty(2, device="cuda").is_cuda
    assert plain == (F.scaled_dot_product_attention, nn.Module.to, torch.autograd._engine_run_backward)
    assert torch.ones(2).sum().item() == 2


# ---------------------------------------------------------------------------------------------------------------------
# CLSP


def clsp_record(tmp_path: Path, *options: str) -> tuple[list[dict[str, Any]], str]:
    arguments = ["--system", "clsp", "--size", "tiny", "--batch", "3", "--seconds", "0.5", "--out", str(tmp_path)]
    step_trace.main([*arguments, *options])
    return json.loads((tmp_path / "record.json").read_text())["rows"], (tmp_path / "record.md").read_text()


def operations(rows: list[dict[str, Any]]) -> dict[tuple[str, str], int]:
    found = [row for row in rows if "operation" in row["case"]]
    return {(row["case"]["phase"], row["case"]["operation"]): row["operations"] for row in found}


def test_a_step_of_clsp_runs_on_its_kernels(tmp_path: Path) -> None:
    rows, page = clsp_record(tmp_path)
    found, sizes = operations(rows), clsp_step.SIZES["tiny"].zipformer
    layers = sum(sizes.lists()["layers"])
    assert found["forward", "log_mel"] == 1 and found["loss", "info_nce"] == 1
    assert found["forward", "shared_attention_sums"] == layers
    assert found["forward", "shared_attention"] == found["backward", "shared_attention_backward"] == 3 * layers
    assert found["forward", "gated_convolution"] == found["backward", "gated_convolution_backward"] == 2 * layers
    assert found["forward", "swoosh"] == 4 + 5 * layers  # the front's four, three feed-forwards and two convolutions
    resampled = sum(factor > 1 for factor in sizes.lists()["downsampling"])
    assert found["forward", "upsample_bypass"] == resampled and found["forward", "downsample"] == resampled + 1
    (total,) = (row for row in rows if row["case"] == {"phase": "all"})
    assert total["flops"] == pytest.approx(total["model_flops"], rel=0.3)  # whiteners, attention, padded captions
    assert "A step of clsp-stage2, towers of size tiny, 3 clips of 0.5 s" in page


def test_layers_of_clsp_that_are_computed_again_hold_less(tmp_path: Path) -> None:
    plain, _ = clsp_record(tmp_path / "plain")
    again, page = clsp_record(tmp_path / "again", "--checkpoint-activations")
    layers = sum(clsp_step.SIZES["tiny"].zipformer.lists()["layers"])
    assert operations(again)["backward", "shared_attention"] == 3 * layers
    held = [next(row["held_bytes"] for row in rows if "memory" in row["case"]) for rows in (plain, again)]
    assert held[1] < 0.8 * held[0] and "activations checkpointed" in page


def test_the_published_step_has_the_products_of_ours(tmp_path: Path, icefall: Any) -> None:
    rows, page = clsp_record(tmp_path, "--icefall", os.environ["FASTCLAP_ICEFALL"])
    (total,) = (row for row in rows if row["case"] == {"phase": "all"})
    assert total["flops"] == pytest.approx(total["model_flops"], rel=0.4)
    assert all(
        next(row for row in rows if row["case"] == {"phase": phase})["operations"] for phase in step_trace.PHASES
    )
    (reads,) = (row for row in rows if "host" in row["case"])
    assert reads["count"] >= len(reads["places"]) > 2 and "make_pad_mask" in reads["places"]
    assert f"It reads {reads['count']} numbers off the device." in page
    assert os.environ["FASTCLAP_ICEFALL"] not in page + (tmp_path / "record.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--system", "clsp", "--size", "large"), "--size large is none of --system clsp"),
        (("--size", "spear-xlarge"), "none of --system paraspeechclap"),
        (("--system", "clsp", "--compile"), "knows no --compile"),
        (("--icefall", "checkout"), "--system paraspeechclap knows no --icefall"),
    ],
)
def test_what_does_not_go_together_is_named(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        step_trace.main(arguments)
