"""The record of a lot: a JSON file that holds every row from the moment it exists.

    {"lot": ..., "device": ..., "code": hash of the files it measures,
     "runs": [{"date", "commit", "software", "machine", ..., "status", "seconds"}],
     "rows": [{"case": {what tells the row from all others}, "run": index, figures ...}]}

The file is rewritten whole, aside and then renamed, at every row: whatever kills a run leaves all rows before. Rows of
the same code stay until their case is measured again; rows of other code go when a run of the present code begins. One
process writes at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastclap.files import write_atomic

Case = dict[str, Any]
Row = dict[str, Any]

NOT_REACHED = "not reached"  # begins the reason of a row for which no time was left
ABSENT = "not available"  # of a form whose package is not installed, or that has nothing for this machine


def key(case: Case) -> str:
    return json.dumps(case, sort_keys=True)


def folder_of(device: str) -> str:
    """The name of a device's folder: "NVIDIA H100 80GB HBM3" has its records in "h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")).strip("-") or "unknown"


def read(path: Path) -> dict[str, Any] | None:
    """The content of a record, None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of a device's folder by lot."""
    found = (read(path) for path in sorted(folder.glob("*.json")))
    return {record["lot"]: record for record in found if record is not None}


def complete(record: dict[str, Any] | None, code: str) -> bool:
    """Whether a record is of this code and its last run came to its end."""
    return record is not None and record["code"] == code and record["runs"][-1]["status"] == "done"


class Record:
    """The record of one lot on one device, open for a run.

    Args:
        path: of the file; what it holds is kept as far as it belongs to the same code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reload()

    def reload(self) -> None:
        """Takes what another process has written."""
        self.content: dict[str, Any] = read(self.path) or {"runs": [], "rows": []}
        self._places = {key(row["case"]): place for place, row in enumerate(self.content["rows"])}

    def begin(self, lot: str, device: str, code: str, **run: Any) -> None:
        """Adds a run; rows and runs of other code go."""
        if self.content.get("code") != code:
            self.content = {"lot": lot, "device": device, "code": code, "runs": [], "rows": []}
            self._places = {}
        self.content["runs"].append({**run, "status": "running"})
        self.write()

    def update_run(self, **fields: Any) -> None:
        self.content["runs"][-1] |= fields
        self.write()

    @property
    def run(self) -> int:
        return len(self.content["runs"]) - 1

    def add(self, case: Case, **figures: Any) -> Row:
        """Puts a row on the disk, in the place of the case's earlier one.

        A reason that says nothing about the form (there was no time, it is not installed) does not replace figures of
        an earlier run.
        """
        row = {"case": case, "run": self.run, **figures}
        at = self._places.get(key(case))
        if at is None:
            self._places[key(case)] = len(self.content["rows"])
            self.content["rows"].append(row)
        elif str(row.get("reason", "")).startswith((NOT_REACHED, ABSENT)) and "reason" not in self.content["rows"][at]:
            return self.content["rows"][at]
        else:
            self.content["rows"][at] = row
        self.write()
        return row

    def row(self, case: Case) -> Row | None:
        """This run's row of a case."""
        at = self._places.get(key(case))
        row = None if at is None else self.content["rows"][at]
        return row if row is not None and row["run"] == self.run else None

    def rows(self) -> Iterator[Row]:
        """This run's rows."""
        return (row for row in self.content["rows"] if row["run"] == self.run)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, (json.dumps(self.content, indent=1, sort_keys=False) + "\n").encode())


def merge(source: Path, target: Path, commit: str | None = None) -> str:
    """Takes the rows of one record over into another: newer rows of the same code, or all of newer code.

    Args:
        source, target: files of records.
        commit: of the code that the source measured, for runs that could not say.

    Returns:
        What was done, in words.
    """
    new, old = read(source), read(target)
    if new is None:
        raise FileNotFoundError(source)
    for run in new["runs"]:
        run["commit"] = run.get("commit") or commit
    if old is not None and old["runs"][-1]["date"] > new["runs"][-1]["date"]:
        return f"{target}: newer than {source}, left as it is"
    if old is None or old["code"] != new["code"]:
        content, done = new, "taken over" if old is None else "replaced, as its code is another"
    else:
        known = {key(row["case"]): row for row in old["rows"]}
        earlier = len(old["runs"])
        for row in new["rows"]:
            known[key(row["case"])] = {**row, "run": row["run"] + earlier}
        content = {**new, "runs": old["runs"] + new["runs"], "rows": list(known.values())}
        done = f"{len(new['rows'])} rows merged"
    record = Record(target)
    record.content = content
    record.write()
    return f"{target}: {done}"
