"""What compute-sanitizer says becomes a row; a stand-in says it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import cuda_on_cpu
from bench.gpu import sanitized


def stand_in(folder: Path, status: int) -> str:
    program = folder / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$@"\necho "========= ERROR SUMMARY"\nexit {status}\n')
    program.chmod(0o755)
    return str(program)


def test_what_it_finds_is_a_row_and_a_crash_is_none(tmp_path: Path) -> None:
    assert sanitized._watched(stand_in(tmp_path, 0), "memcheck") == {"passed": True, "failures": []}
    row = sanitized._watched(stand_in(tmp_path, sanitized.FOUND), "racecheck")
    assert not row["passed"] and row["failures"][-1] == "========= ERROR SUMMARY"
    assert "--tool racecheck" in row["failures"][0] and "kernel_substring=log_mel" in row["failures"][0]
    with pytest.raises(RuntimeError, match=r"it ended with 139: .*ERROR SUMMARY"):
        sanitized._watched(stand_in(tmp_path, 139), "memcheck")


@pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="there is no g++")
def test_the_program_that_is_watched_computes_front_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(sanitized, "FRONT_ENDS", {"kaldi-80": sanitized.FRONT_ENDS["kaldi-80"]})
    with cuda_on_cpu.installed():
        monkeypatch.setattr(torch, "device", lambda *_: cpu)
        sanitized.main()
