"""`fastclap doctor`: what this machine and this installation can do."""

from __future__ import annotations

from dataclasses import dataclass

from fastclap.commands.shared import print_json


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
        print_json({**findings, "problems": problems})
        return 1 if problems else 0
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    for group, facts in findings.items():
        console.print(f"[bold]{group}[/bold]")
        for name, value in facts.items():
            text = (", ".join(value) or "none") if isinstance(value, list) else str(value)
            console.print(f"  {name:<16} {escape(text)}")
    for problem in problems:
        console.print(f"[red]problem:[/red] {escape(problem)}")
    if not problems:
        console.print("[green]everything needed is there[/green]")
    return 1 if problems else 0
