"""The ``fastclap`` command: what can be done with a trained model, and packing of the data to train on.

Each command is a file of this folder: a dataclass of its flags, its help, and `run`. torch is imported after the
arguments have been understood, so that ``--help`` and mistyped flags answer at once. Figures go to stdout, as a table
or with ``--json`` as JSON and nothing else; progress, notes and errors go to stderr. Exit status: 0 done, 1 ``doctor``
found a problem, 2 a mistake in the arguments, the data or the model, told in one line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from fastclap.commands import (
    classify,
    convert,
    doctor,
    embed,
    eval,
    pack,
    prepare,
    report,
    rerank,
    search,
    similarity,
)
from fastclap.errors import ConfigError, FastclapError

# Of each command its flags, its help and what it does.
COMMANDS: dict[str, tuple[Any, str, Callable[[Any], int]]] = {
    "eval": (eval.Eval, eval.DESCRIPTION, eval.run),
    "classify": (classify.Classify, classify.DESCRIPTION, classify.run),
    "report": (report.Report, report.DESCRIPTION, report.run),
    "pack": (pack.Pack, pack.DESCRIPTION, pack.run),
    "embed": (embed.Embed, embed.DESCRIPTION, embed.run),
    "search": (search.Search, search.DESCRIPTION, search.run),
    "rerank": (rerank.Rerank, rerank.DESCRIPTION, rerank.run),
    "similarity": (similarity.Similarity, similarity.DESCRIPTION, similarity.run),
    "prepare": (prepare.Prepare, prepare.DESCRIPTION, prepare.run),
    "convert": (convert.Convert, convert.DESCRIPTION, convert.run),
    "doctor": (doctor.Doctor, doctor.DESCRIPTION, doctor.run),
}
_FLAGS = (tyro.conf.FlagCreatePairsOff,)  # no --no-json
_USAGE = """usage: fastclap COMMAND [--flag value ...]

Measure and use contrastive language-audio models, and pack data (fastclap-train trains them). Commands:
{commands}

  fastclap COMMAND --help   every flag of a command, with its default and examples
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return the exit status; help and mistyped flags exit at once."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    usage = _USAGE.format(
        commands="\n".join(f"  {name:<12}{text.splitlines()[0]}" for name, (_, text, _) in COMMANDS.items())
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *flags = arguments
    try:
        if name not in COMMANDS:
            raise ConfigError(f"there is no command {name!r}; choose one of: {', '.join(COMMANDS)} (fastclap --help)")
        kind, text, run = COMMANDS[name]
        return run(tyro.cli(kind, prog=f"fastclap {name}", description=text, args=flags, config=_FLAGS))
    except FastclapError as error:
        message = str(error)
    except OSError as error:  # a full disk, a folder that may not be written
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except KeyboardInterrupt:
        return 130
    print(f"fastclap: {message}", file=sys.stderr)
    return 2
