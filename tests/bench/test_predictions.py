"""The page of predictions: reproducible, and its figures are those of the formulas that it states."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench import clsp_step, predictions
from bench.kernel_peers import FRONT_ENDS
from bench.machines import H100, H200, MACHINES, Machine
from bench.predictions import FORMS, FOUR, MATERIALISED, THREE
from fastclap.kernels.log_mel import cuda_engine
from fastclap.models.tokenizer import train_tokenizer

RECORD = Path(__file__).resolve().parents[2] / "bench" / "records" / "PREDICTED.md"
each_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)


def test_the_page_in_the_records_is_what_the_script_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["predictions"])
    predictions.main()
    printed = capsys.readouterr().out
    assert printed == RECORD.read_text(encoding="utf-8"), f"python -m bench.predictions > {RECORD}"
    assert printed.startswith("# Predictions, not measurements")


def test_figures_are_one_where_they_are_alike() -> None:
    assert predictions.pair(f"{m.tbytes:.1f}" for m in MACHINES) == "3.0 / 4.3"
    assert predictions.pair("1.2" for _ in MACHINES) == "1.2"
    assert predictions.span((1.21, 1.22)) == "1.2" and predictions.span((1.2, 1.4)) == "1.2 to 1.4"


def test_p1_and_p2_are_bound_by_the_l2_cache_and_siglip_by_its_instructions() -> None:
    one, two = FORMS[FOUR].issued
    # 8 warps over 4 schedulers issue 2 · (1028 + 73·D/64), the tensor cores take 8·D.
    shares = [predictions.issue_to_tensor(one, dim) for dim in (512, 768, 1024)]
    assert shares == pytest.approx([0.787, 0.620, 0.536], abs=1e-3)
    by_l2 = 128 * 128 * 2 / (2 * 128 * 2) * 8.1  # flops of a step of one in depth, over its bytes of A and B
    for issued in (one, two, *FORMS[THREE].issued):
        rates = [predictions.pass_tflops(issued, dim, H100) for dim in (512, 768, 1024)]
        assert rates == pytest.approx([by_l2] * 3)
    (sigmoid,) = predictions.SIGMOID.issued
    by_issue = 0.6 * 4096 * 132 * 1.755e9 * 1e-12 / predictions.issue_to_tensor(sigmoid, 768)
    assert predictions.pass_tflops(sigmoid, 768, H100) == pytest.approx(by_issue) and by_issue < by_l2


def test_the_emulated_error_is_that_of_the_record() -> None:
    text = (RECORD.parent / "float32-errors" / "h100.md").read_text(encoding="utf-8")
    median, largest = predictions.emulated_error(predictions.FLOAT32)
    assert f"| tf32x3, 32 columns | {median} | " in text and 0 < float(median) <= float(largest)


@each_machine
def test_time_of_the_loss(machine: Machine) -> None:
    """Two passes at the rate of the L2 cache and two plain products; three plain products and 25 bytes a pair."""
    one, products = 2e-9 * 16384**2 * 1024, 0.81 * machine.tflops
    ours = 2 * one / (64 * 8.1) + 2 * one / products + 11 * 2e-3
    assert predictions.device_ms(FORMS[FOUR], 16384, 1024, machine) == pytest.approx(ours)
    theirs = 3 * one / products + 25e-9 * 16384**2 / (0.9 * machine.tbytes) + 15 * 2e-3
    assert predictions.device_ms(FORMS[MATERIALISED], 16384, 1024, machine) == pytest.approx(theirs)
    for dim in (512, 768, 1024):
        times = [predictions.device_ms(form, 65536, dim, machine) for form in FORMS.values()]
        assert times[1] < times[0] < times[2] < times[3]


@each_machine
def test_small_batches_of_the_loss_are_bound_by_the_host(machine: Machine) -> None:
    assert predictions.loss_cell(FORMS[FOUR], 256, 768, machine) == "0.37 (0.023)"
    assert predictions.loss_cell(FORMS[MATERIALISED], 256, 768, machine).startswith("0.29 (0.03")
    # as the page says, where they meet
    assert predictions.device_ms(FORMS[MATERIALISED], 4400, 768, machine) < FORMS[FOUR].host_ms
    assert predictions.device_ms(FORMS[MATERIALISED], 5200, 768, machine) > FORMS[FOUR].host_ms
    assert predictions.device_ms(FORMS[FOUR], 8192, 768, machine) > FORMS[FOUR].host_ms


def test_a_matrix_that_does_not_fit_is_no_time() -> None:
    assert predictions.fits(FORMS[THREE], 131072, H100) and not predictions.fits(FORMS[THREE], 262144, H100)
    assert not predictions.fits(FORMS[THREE], 262144, H200), "137 GB of 141"
    assert predictions.loss_cell(FORMS[MATERIALISED], 262144, 768, H200) == "–"
    assert predictions.fits(FORMS[FOUR], 1 << 20, H100)


def test_log_mel_bytes_are_samples_and_features() -> None:
    assert predictions.log_mel_gbytes(FRONT_ENDS["whisper-80"], 4, 4) == pytest.approx(
        1e-9 * 1024 * 4 * (160000 + 1000 * 80)
    )
    assert predictions.log_mel_gbytes(FRONT_ENDS["clap-64"], 2, 2) == pytest.approx(
        1e-9 * 1024 * 2 * (480000 + 1001 * 64)
    )


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_log_mel_counts_are_no_fewer_than_the_arithmetic_needs(name: str) -> None:
    issue, wavefronts = predictions.log_mel_cycles(name)
    spec = FRONT_ENDS[name]
    found = cuda_engine.layout(spec)
    assert isinstance(found, cuda_engine.Layout)
    # Window; a real FFT in fused multiply-adds; turns; half the bins' powers; two mels a bin.
    bins = found.r1 * found.r2 / 2
    least = spec.win_length + 1.5 * spec.n_fft * math.log2(spec.n_fft) + 4 * bins + 2 * bins
    assert least / 128 < issue < 4 * least / 128  # 128 lanes a cycle
    # Samples, and the exchange in and out: 32 numbers a wavefront.
    assert (spec.hop_length * 2 + 2 * spec.n_fft) / 32 < wavefronts < 1.1 * issue


@each_machine
def test_log_mel_time_is_that_of_the_busiest_pipe(machine: Machine) -> None:
    whisper = 1e3 * 1024 * 1000 * (400 / 4) / (132 * 1.755e9) / 0.6
    assert predictions.log_mel_ms("whisper-80", 0.6, machine) == pytest.approx(whisper), "instructions"


@each_machine
def test_layer_norm_gelu_takes_the_longer_of_instructions_and_bytes(machine: Machine) -> None:
    for name, issued, moved in (("forward", 332, 2), ("backward", 473, 3)):
        issue = 1e3 * 512_000 * issued / (4 * 132 * 1.755e9)  # a row is a warp's turn
        copies = 2e-9 * moved * 512_000 * 512 / (0.9 * machine.tbytes)
        assert predictions.norm_ms((name,), 0.8, machine) == pytest.approx(copies), "bytes"
        assert predictions.norm_ms((name,), 0.6, machine) == pytest.approx(max(issue / 0.6, copies))
        assert (issue / 0.6 > copies) == (machine is H200), "as the page says"
    both = predictions.norm_ms(("forward", "backward"), 0.8, machine)
    assert both == pytest.approx(sum(predictions.norm_ms((name,), 0.8, machine) for name in ("forward", "backward")))


def test_attention_is_bound_by_its_instructions() -> None:
    """Of a (clip, head) 4 x 8 tiles of 8 warps forward, 8 x 8 of 4 warps in each backward kernel."""
    forward, backward = 4 * 8 * 410 * 8 / 4, 8 * 8 * (409 + 493) * 4 / 4
    ms = 1e3 * 32 * 16 / (132 * 1.755e9)
    assert predictions.attention_issue_ms(32, ("forward",)) == pytest.approx(ms * forward)
    assert predictions.attention_issue_ms(32, ("forward", "keys", "queries")) == pytest.approx(
        ms * (forward + backward)
    )


def test_every_prediction_is_above_its_floor() -> None:
    def numbers(cell: str) -> list[float]:
        """The least figure of each machine."""
        found = [float(part.split()[0]) for part in cell.split(" / ")]
        return found * (2 // len(found))

    def above(predicted: str, *floors: str) -> bool:
        return all(x >= y for floor in floors for x, y in zip(numbers(predicted), numbers(floor), strict=True))

    for *_, floor, _, predicted in predictions.log_mel_rows():
        assert above(predicted, floor)
    for _, _, *floors, predicted in predictions.attention_rows():
        assert above(predicted, *floors)
    for *_, floor, predicted in predictions.tower_rows():
        assert above(predicted, floor)


def test_work_of_the_training_step() -> None:
    assert predictions.pair_tflop() == pytest.approx(1.168, abs=1e-3)
    assert 32 * predictions.pair_tflop() == pytest.approx(37.4, abs=0.05), "as the step that was traced"
    assert predictions.checkpointed_tflop() == pytest.approx(24 * 13.594e-3, rel=1e-3)  # 24 layers' forward pass


@each_machine
def test_time_of_the_training_step_is_its_products_bytes_gaps_loss_and_optimizer(machine: Machine) -> None:
    products = 1e3 * 32 * predictions.pair_tflop() / (0.81 * machine.tflops)
    copies = (59.9 + 28e-9 * 594e6) / (0.9 * machine.tbytes)
    eager = predictions.step_ms(32, compiled=False, cached=False, machine=machine)
    loss = predictions.device_ms(FORMS[FOUR], 32, 768, machine)
    assert eager == pytest.approx(products + copies + 2e-3 * (1563 + 1769) + loss)
    compiled = predictions.step_ms(32, compiled=True, cached=False, machine=machine)
    saved = (59.9 - 58.5) / (0.9 * machine.tbytes) + 2e-3 * (1563 + 1769 - 1047 - 1505)
    assert eager - compiled == pytest.approx(saved)
    # With the cache a quarter more products in four chunks, and as much of the forward pass's share of the bytes.
    plain = predictions.step_ms(256, compiled=True, cached=False, machine=machine)
    cached = predictions.step_ms(256, compiled=True, cached=True, machine=machine)
    assert 1.25 < cached / plain < 1.33


def test_batches_of_the_training_step_that_fit() -> None:
    assert predictions.held_gb(128, False, H200) == pytest.approx(62.4, abs=1)
    assert predictions.clip_gb() == pytest.approx((62.4 - 16e-9 * 594e6) / 128)
    cells = [cell for row in predictions.step_rows() for cell in row[2:4]]
    assert all("clips/s" in cell for cell in cells)
    assert [predictions.step_cell(256, True, False, machine) == "does not fit" for machine in MACHINES] == [True, False]
    assert predictions.step_cell(512, True, False, H200) == "does not fit"


@each_machine
def test_the_reference_is_slower_than_ours(machine: Machine) -> None:
    def rate(cell: str) -> float:
        return float(cell.split(", ")[1].split()[0])

    index = 2 + MACHINES.index(machine)
    rows = [row for row in predictions.step_rows() if row[0] == "32"]
    eager, compiled, released, tuned = (rate(row[index]) for row in rows)
    assert released < tuned < eager < compiled


# ---------------------------------------------------------------------------------------------------------------------
# CLSP's step


@each_machine
def test_time_of_a_clsp_step_is_its_products_other_bytes_and_gaps(machine: Machine) -> None:
    step = predictions.ClspStep(26, 30, 1000, 50.0, (300.0, 200.0), 30.0)
    ms = 50e3 / (0.81 * machine.tflops) + 200 / (0.9 * machine.tbytes) + 2.0
    assert predictions.clsp_ms(step, machine) == pytest.approx(ms)
    share = 1e3 * predictions.CLSP_TFLOP[30] / ms / machine.tflops
    assert predictions.clsp_cell(step, machine) == f"{ms:.0f} ms, {1e3 * 780 / ms:,.0f} s/s, {share:.0%}"


@pytest.mark.parametrize("seconds", (30, 5))
def test_the_traced_clsp_steps_are_of_one_batch(seconds: int) -> None:
    (ours, step), (published, other) = (row for row in predictions.CLSP if row[1].seconds == seconds)
    assert (ours, published) == (predictions.CLSP_OURS, predictions.CLSP_PUBLISHED)
    clips = int(clsp_step.SECONDS_A_BATCH / seconds)
    assert step.clips == other.clips == clips
    size = clsp_step.SIZES["spear-xlarge"]
    batch = clsp_step.host_batch(size, train_tokenizer(clsp_step.CAPTIONS, 1000), clips, float(seconds))
    assert 1e-12 * batch.flops == pytest.approx(predictions.CLSP_TFLOP[seconds], rel=1e-3)
    for traced in (step, other):  # limits and padding on top, and nothing is left out
        assert predictions.CLSP_TFLOP[seconds] < traced.tflop < 1.15 * predictions.CLSP_TFLOP[seconds]
        assert 0 < traced.gbytes[1] < traced.gbytes[0]
    for machine in MACHINES:
        assert predictions.clsp_ms(step, machine) < predictions.clsp_ms(other, machine)
