"""The speed record: its rows, targets and tables, on one clip. Times themselves are not asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio

from bench import logmel_speed, test_native
from bench.logmel_speed import FLOAT, HANDOVER, tables, verdicts
from bench.test_native import CASES, by_asrfront
from fastclap.kernels.log_mel import native
from fastclap.kernels.log_mel.operator import log_mel


def test_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (logmel_speed, test_native):
        monkeypatch.setattr(module, "SECONDS", 1)
    monkeypatch.setattr(logmel_speed, "CASES", {name: CASES[name] for name in ("whisper-80", "clsp-128")})
    arguments = ["--out", str(tmp_path), "--clips", "1", "--seconds", "0.01", "--fast", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["logmel_speed", *arguments])
    before = torch.get_num_threads()
    try:
        logmel_speed.main()
    finally:
        torch.set_num_threads(before)
    record = json.loads((tmp_path / "speed.json").read_text())
    assert (tmp_path / "speed.md").read_text() == tables(record)
    whisper, clsp = record["cases"]
    assert "torchaudio kaldi" in clsp["rows"] and "torchaudio kaldi" in whisper["absent"]
    assert (FLOAT in clsp["rows"]) == native.available()
    for entry in (*record["cases"], *record["stages"]):
        assert all(row["median"] > 0 and row["repeats"] >= 1 for row in entry["rows"].values())


@pytest.mark.parametrize("count", [1, 2])
def test_asrfront_computes_the_same_features(count: int) -> None:
    pytest.importorskip("asrfront")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        whisper, kaldi = (
            torch.from_numpy(np.stack(by_asrfront(CASES[name], CASES[name].waveform(2))()))
            for name in ("whisper-80", "kaldi-80")
        )
    finally:
        torch.set_num_threads(before)
    ours, _ = log_mel(CASES["whisper-80"].waveform(2), None, CASES["whisper-80"].spec)
    torch.testing.assert_close(whisper.mT, ours, atol=1e-2, rtol=0)
    # Ours has no Hamming window; torchaudio, which Kaldi's front-end is held to elsewhere, has.
    fbank = torchaudio.compliance.kaldi.fbank
    hamming = [fbank(x[None], num_mel_bins=80, window_type="hamming") for x in CASES["kaldi-80"].waveform(2)]
    torch.testing.assert_close(kaldi, torch.stack(hamming), atol=1e-2, rtol=0)


def test_targets() -> None:
    medians = {FLOAT: 0.2, "torchaudio": 2.1, "kaldi-native-fbank": 1.2, HANDOVER: 0.25}
    entry = {"case": "clap-64", "threads": 1, "rows": {name: {"median": ms} for name, ms in medians.items()}}
    assert verdicts({"cases": [entry]}) == [
        (f"clap-64, 1 thread: {FLOAT} is 10.5 times torchaudio", True),
        (f"clap-64, 1 thread: {FLOAT} is 6.0 times kaldi-native-fbank (4.7 without handing over the samples)", False),
        (f"clap-64, 1 thread: {FLOAT} takes 0.200 ms", True),
    ]
