"""The summary of the benchmarks: ours beside the best peer, and never more than a screen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bench import conftest
from bench.summary import LONGEST, WIDEST, Timed, summary


def test_a_case_is_a_line() -> None:
    timed = [
        Timed("loss, N = 8", "slow", 3.0, 1 << 30),
        Timed("loss, N = 8", "fastclap", 0.5, 1 << 20),
        Timed("loss, N = 8", "quick", 1.0, 3 << 20),
        Timed("loss, N = 8", "fastclap torch", 0.1),
        Timed("features", "fastclap C++", 2e-6),
        Timed("features", "torchaudio", 0.9996),
        Timed("alone", "fastclap", 1.0),
    ]
    skipped = ["inf-cl: not installed", "liger: not installed", "liger: not installed", "no GPU"]
    title, loss, features, alone, *reasons = summary(timed, skipped)
    assert title.split() == ["case", "ours", "best", "peer", "ratio", "peer", "memory"]
    assert loss.split() == [*["loss,", "N", "=", "8"], "500", "ms", "1", "s", "2.00x", "quick", "1/3", "MiB"]
    assert features.split() == ["features", "2", "µs", "1000", "ms", "499800.00x", "torchaudio"]
    assert "1 more case" in alone
    assert reasons == ["skipped:", "3x inf-cl, liger: not installed", "1x : no GPU"]


def test_many_cases_and_reasons_fit_a_screen() -> None:
    timed = [
        Timed(f"{'a long name ' * 9}{case}", form, 1.0)
        for case in range(99)
        for form in ("fastclap", "a peer of a very long name")
    ]
    lines = summary(timed, [f"peer: {'reason ' * 30}{number}" for number in range(50)])
    assert len(lines) <= LONGEST and max(map(len, lines)) <= WIDEST
    assert any("more cases" in line for line in lines) and "more reasons" in lines[-1]


def reporter(benchmarks: list[Any]) -> Any:
    """What the hook sees of pytest, with what it writes in `lines`."""
    lines: list[str] = []
    skipped = [SimpleNamespace(longrepr=("bench/test_x.py", 3, "Skipped: peer: not installed"))]
    session = SimpleNamespace(benchmarks=benchmarks)
    return SimpleNamespace(
        config=SimpleNamespace(_benchmarksession=session), stats={"skipped": skipped}, lines=lines,
        section=lines.append, write_line=lines.append,
    )  # fmt: skip


class Benchmark(SimpleNamespace):
    group, has_error, extra_info = "case", False, {}

    def __bool__(self) -> bool:
        return self.stats is not None


def test_the_hook_reads_what_ran() -> None:
    ran = [
        Benchmark(name="a", params={"form": "fastclap"}, stats=SimpleNamespace(median=1.0)),
        Benchmark(name="b", params={"engine": "peer"}, stats=SimpleNamespace(median=2.5)),
        Benchmark(name="c", params=None, stats=SimpleNamespace(median=0.1), has_error=True),
        Benchmark(name="d", params=None, stats=None),
    ]
    terminal = reporter(ran)
    conftest.pytest_terminal_summary(terminal)
    title, _, case, *reasons = terminal.lines
    assert "best peer" in title and case.split()[-2:] == ["2.50x", "peer"]
    assert reasons == ["skipped:", "1x peer: not installed"]


@pytest.mark.parametrize("benchmarks", [[], [Benchmark(name="d", params=None, stats=None)]])
def test_without_benchmarks_there_is_none(benchmarks: list[Any]) -> None:
    terminal = reporter(benchmarks)
    conftest.pytest_terminal_summary(terminal)
    assert terminal.lines == []
