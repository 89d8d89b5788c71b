"""The records of the lots in a device's folder: reading all of them, and merging some that were made elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bench.run import Record, key, read_record


def folder_of(device: str) -> str:
    """The name of a device's folder: "NVIDIA H100 80GB HBM3" has its records in "h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")).strip("-") or "unknown"


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of a device's folder by lot."""
    found = (read_record(path) for path in sorted(folder.glob("*.json")))
    return {record["lot"]: record for record in found if record is not None}


def complete(record: dict[str, Any] | None, code: str) -> bool:
    """Whether a record is of this code and its last run came to its end."""
    return record is not None and record["code"] == code and record["runs"][-1]["status"] == "done"


def merge(source: Path, target: Path, commit: str | None = None) -> str:
    """Takes the rows of one record over into another: newer rows of the same code, or all of newer code.

    Args:
        source: the record to read.
        target: the record to change.
        commit: of the code that the source measured, for runs that could not say.

    Returns:
        What was done, in words.
    """
    new, old = read_record(source), read_record(target)
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
