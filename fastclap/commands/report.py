"""`fastclap report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(kw_only=True)
class Report:
    run: Annotated[str, tyro.conf.Positional]
    """Run folder of fastclap-train."""
    out: str | None = None
    """Folder for report.html, its pictures and report.json (default: RUN/report)."""


DESCRIPTION = """Write the one-page report of a training run: curves, last validation, configuration.

Examples:
  fastclap report runs/demo
  fastclap report runs/demo --out /tmp/report
"""


def run(arguments: Report) -> int:
    from fastclap.evaluation import write_report

    print(write_report(arguments.out or Path(arguments.run) / "report", run=arguments.run))
    return 0
