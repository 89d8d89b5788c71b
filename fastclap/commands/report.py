"""`fastclap report`: the report of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastclap.console import show, writing


@dataclass(kw_only=True)
class Flags:
    run: Annotated[str, tyro.conf.Positional]
    """Run folder of fastclap-train."""
    out: str | None = None
    """Folder for report.html, its pictures and report.json (default: RUN/report)."""


HELP = """\
Examples:
  fastclap report runs/demo
  fastclap report runs/demo --out /tmp/report
"""


def run(flags: Flags) -> int:
    from fastclap.evaluation import write_report

    out = flags.out or str(Path(flags.run) / "report")
    with writing(out):
        page = write_report(out, run=flags.run)
    show(str(page))
    return 0
