"""`fastclap doctor`: what this machine and this installation can do."""

from __future__ import annotations

from dataclasses import dataclass

from fastclap.console import show, show_json


@dataclass(kw_only=True)
class Flags:
    json: bool = False
    """Print JSON, and nothing else, on stdout."""


HELP = """\
Examples:
  fastclap doctor
  fastclap doctor --json
"""


def run(flags: Flags) -> int:
    from fastclap.apps.doctor import diagnose

    findings, problems = diagnose()
    if flags.json:
        show_json({**findings, "problems": problems})
        return 1 if problems else 0
    for group, facts in findings.items():
        show(group)
        for name, value in facts.items():
            text = (", ".join(value) or "none") if isinstance(value, list) else str(value)
            show(f"  {name:<16} {text}")
    for problem in problems:
        show(f"problem: {problem}")
    if not problems:
        show("everything needed is there")
    return 1 if problems else 0
