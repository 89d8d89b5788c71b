"""A pytest plugin that reports what happens in a run of tests, as it happens: one JSON line an event, down a pipe.

    pytest -p bench.gpu.pytest_rows ...              with the pipe's file descriptor in FASTCLAP_PYTEST_EVENTS

    {"event": "collected", "tests": [ids]}
    {"event": "started", "test": id}
    {"event": "report", "test": id, "outcome": "passed" | "failed" | "skipped", "seconds": of a phase, "message": why}

Under pytest-xdist the controlling process writes the events of all workers. The plugin also sees to it that a worker
ends with its controller, and right after a test that has lost the GPU's context, which would fail all later tests:
pytest-xdist then goes on with a fresh worker.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

PIPE = "FASTCLAP_PYTEST_EVENTS"
MESSAGE = 400  # characters of one that are kept

_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_failed: set[str] = set()  # ids of tests, in a worker

if _WORKER:
    from bench.gpu.watch import die_with_parent  # here, as it imports torch, which the controller can do without

    die_with_parent()


def write(**event: Any) -> None:
    """Writes one event, a line at a time, so that two processes cannot mix theirs."""
    if not _WORKER and PIPE in os.environ:
        data = (json.dumps(event) + "\n").encode()
        while data:
            data = data[os.write(int(os.environ[PIPE]), data) :]


def message(report: pytest.TestReport | pytest.CollectReport) -> str | None:
    """Why a test failed or was skipped, in few words."""
    reason = report.longrepr
    if reason is None:
        return None
    if isinstance(reason, tuple):  # of a skip: file, line, reason
        return str(reason[2]).removeprefix("Skipped: ")[:MESSAGE]
    crash = getattr(reason, "reprcrash", None)
    if crash is not None:
        return f"{os.path.basename(crash.path)}:{crash.lineno}: {crash.message}"[:MESSAGE]
    lines = [line for line in str(reason).splitlines() if line.strip()]
    return lines[-1].removeprefix("E ").strip()[:MESSAGE] if lines else None


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.items:
        write(event="collected", tests=[item.nodeid for item in session.items])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    write(event="collected", tests=list(ids))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome != "passed":
        outcome = "failed" if report.outcome == "failed" else "skipped"
        write(event="report", test=report.nodeid, outcome=outcome, seconds=0.0, message=message(report))


def pytest_runtest_logstart(nodeid: str) -> None:
    write(event="started", test=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed.add(report.nodeid)
    if report.when != "teardown" or report.failed:
        why = None if report.passed else message(report)
        write(event="report", test=report.nodeid, outcome=report.outcome, seconds=report.duration, message=why)
    if report.when == "teardown" or report.when not in ("setup", "call"):  # neither: the test's process crashed
        write(event="ended", test=report.nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    if _WORKER and nodeid in _failed and not _context_lives():
        os._exit(1)


def _context_lives() -> bool:
    import torch

    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception:  # of any kind: nothing works on this GPU in this process any more
            return False
    return True
