"""The summary at the end of a run of the benchmarks, after pytest-benchmark's own tables if they were asked for."""

from __future__ import annotations

from typing import Any

import pytest

from bench.summary import Timed, summary


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    timed = [
        Timed(x.group or x.name, form_of(x), x.stats.median, x.extra_info.get("peak_bytes"))
        for x in getattr(session, "benchmarks", [])
        if x and not x.has_error
    ]
    if not timed:
        return
    skipped = [reason_of(report) for report in terminalreporter.stats.get("skipped", [])]
    terminalreporter.section("ours beside the best peer: medians, and how many times as long the peer takes")
    for line in summary(timed, skipped):
        terminalreporter.write_line(line)


def form_of(benchmark: Any) -> str:
    parameters = {**(benchmark.params or {}), **benchmark.extra_info}
    return str(parameters.get("form", parameters.get("engine", benchmark.name)))


def reason_of(report: Any) -> str:
    """Of a skipped test."""
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix("Skipped: ")
