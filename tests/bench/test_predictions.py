"""The page of predictions: reproducible, and its counts are those of the formulas that it states."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest

from bench import predictions
from bench.kernel_peers import FRONT_ENDS

pytest.importorskip("triton")  # whose tables the counts are of

RECORD = Path(__file__).resolve().parents[2] / "bench" / "records" / "PREDICTED.md"
ASSUMED = argparse.Namespace(name="H200", tflops=790.0, tbytes=4.3, gbytes=141.0)


def test_the_page_in_the_records_is_what_the_script_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["predictions"])
    predictions.main()
    printed = capsys.readouterr().out
    assert printed == RECORD.read_text(encoding="utf-8"), f"python -m bench.predictions > {RECORD}"
    assert printed.startswith("# Predictions, not measurements")


def test_log_mel_bytes_are_samples_and_features() -> None:
    assert predictions.log_mel_gbytes(FRONT_ENDS["whisper-80"], 4, 4) == pytest.approx(
        1e-9 * 1024 * 4 * (160000 + 1000 * 80)
    )
    assert predictions.log_mel_gbytes(FRONT_ENDS["clap-64"], 2, 2) == pytest.approx(
        1e-9 * 1024 * 2 * (480000 + 1001 * 64)
    )


@pytest.mark.parametrize(("name", "n1"), [("whisper-80", 16), ("kaldi-80", 16), ("clsp-128", 16), ("clap-64", 32)])
def test_log_mel_instructions_are_no_fewer_than_the_arithmetic_needs(name: str, n1: int) -> None:
    issue, tensor = predictions.log_mel_cycles(name, FRONT_ENDS[name])
    # Of 16 pairs of samples n2 and of 16 columns k2: window, two real FFTs, twiddles, powers, two running sums.
    least = 3 * n1 + 2 * n1 * math.log2(n1) + 8 * (n1 / 2 - 1) + 4 * n1 + 4 * n1
    assert 16 * least / 128 < issue < 5 * 16 * least / 128  # 128 lanes a cycle
    # Products of 16 x 32 matrices for cosine and sine, each with what was cut off; 1024 multiply-adds a cycle.
    assert tensor == pytest.approx((n1 + 1) * 2 * 2 * 16 * 32 / 1024)


def test_every_prediction_is_above_its_floor() -> None:
    for *_, floor, _, _, busy, predicted in predictions.log_mel_rows(ASSUMED):
        assert float(predicted.split()[0]) > max(float(floor), float(busy))
    for *floors, predicted in (row[2:] for row in predictions.attention_rows(ASSUMED)):
        assert float(predicted.split()[0]) >= max(map(float, floors))
    for *_, floor, predicted in predictions.tower_rows(ASSUMED):
        assert float(predicted) > float(floor)


def test_the_training_step_is_its_flops_over_a_share_of_the_peak() -> None:
    assert predictions.pair_tflop() == pytest.approx(1.168, abs=1e-3)
    assert predictions.checkpointed_tflop() == pytest.approx(24 * 13.594e-3, rel=1e-3)  # 24 layers' forward pass
    rows = {row[0]: row[1:] for row in predictions.training_rows(ASSUMED)}
    plain, cached, released, tuned, held = rows["32"]
    low, high = (float(x) for x in plain.removesuffix(" clips/s").split(", ")[1].split(" to "))
    assert low < 0.45 * 790 / predictions.pair_tflop() < high * 0.45 / 0.55 * 1.1  # optimizer and loss take little
    assert cached == "" and float(held) < 60
    rates = [float(cells.split(", ")[1].split()[0]) for cells in (plain, tuned, released)]
    assert rates == sorted(rates, reverse=True), "ours before the tuned reference before the released one"
    assert rows["8,192"][0] == rows["512"][2] == rows["512"][3] == "does not fit"
    assert "clips/s" in rows["8,192"][1] and float(rows["8,192"][4]) < 141
