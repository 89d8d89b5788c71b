"""The stage of the device's tests, on three small files of tests: one passes, one fails, and one hangs till the end."""

from __future__ import annotations

import importlib.util
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import device_tests
from bench.gpu.watch import run_stages
from bench.run import Record, Run, Settings, read_record

WORKERS = 2
FILES = {
    "test_well.py": "import pytest\ndef test_a(): pass\n@pytest.mark.skip('no GPU of two')\ndef test_b(): pass\n",
    "test_wrong.py": "def test_c(): assert 1 + 1 == 3, 'sums differ'\ndef test_d(): pass\n",
    "test_broken.py": "import a_package_that_nobody_has\n",
    "test_z_hanging.py": "import time\ndef test_e(): pass\ndef test_f(): time.sleep(600)\n",
}


def small(run: Run) -> None:
    """A stage, as `bench.gpu.lots` names them, whose time is up as soon as nothing but the hanging test is left."""

    def wait() -> None:
        while not hanging(read_record(run.record.path)):
            time.sleep(0.05)
        run._deadline = time.monotonic() + device_tests.RESERVE

    threading.Thread(target=wait, daemon=True).start()
    device_tests.run_tests(run, sorted(FILES), workers=WORKERS, root=run.record.path.parent / "project")


def hanging(content: dict[str, Any] | None) -> bool:
    rows = {row["case"]["file"]: row for row in (content or {"rows": []})["rows"]}
    running = {name: row.get("running", []) for name, row in rows.items() if row["unfinished_tests"]}
    return running == {"test_z_hanging.py": ["test_f"]}


@pytest.mark.skipif(not importlib.util.find_spec("xdist"), reason="needs pytest-xdist")
def test_rows_say_how_far_it_came(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    for name, text in FILES.items():
        (tmp_path / "project" / name).write_text(text)
    record = Record(tmp_path / "tests.json")
    record.begin("tests", "cpu", "0", date="2026-01-01T00:00:00+00:00")
    status = run_stages(record, (f"{__name__}:small",), Settings("cpu"), time.monotonic() + 100)

    content = read_record(record.path)
    assert content is not None and status == "done"
    rows: dict[str, dict[str, Any]] = {row["case"]["file"]: row for row in content["rows"]}
    assert set(rows) == {*FILES, "all"}

    def counts(row: dict[str, Any]) -> tuple[int, ...]:
        return tuple(row[f"{kind}_tests"] for kind in ("passed", "failed", "skipped", "unfinished"))

    assert counts(rows["test_well.py"]) == (1, 0, 1, 0) and rows["test_well.py"]["passed"] is True
    assert rows["test_well.py"]["skips"] == {"no GPU of two": 1}
    assert counts(rows["test_wrong.py"]) == (1, 1, 0, 0) and rows["test_wrong.py"]["passed"] is False
    (failure,) = rows["test_wrong.py"]["failures"]
    assert failure.startswith("test_c: test_wrong.py:1: AssertionError: sums differ")
    assert counts(rows["test_broken.py"]) == (0, 1, 0, 0)
    assert "a_package_that_nobody_has" in rows["test_broken.py"]["failures"][0]
    assert counts(rows["test_z_hanging.py"]) == (1, 0, 0, 1) and rows["test_z_hanging.py"]["passed"] is False
    assert rows["test_z_hanging.py"]["running"] == ["test_f"]
    everything = rows["all"]
    assert counts(everything) == (3, 2, 1, 1) and everything["passed"] is False
    assert everything["exit_code"] is None and everything["running"] == ["test_z_hanging.py::test_f"]
    assert len(everything["slowest"]) == 7
