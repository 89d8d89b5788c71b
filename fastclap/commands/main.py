"""The `fastclap` command: what can be done with a trained model, and packing of the data to train on.

Each command is a module of this folder, named like it: `Flags`, a dataclass of its flags, `HELP`, and `run`. Only the
module of the command that is asked for is imported, and torch not before its flags have been understood, so that
`--help` and mistyped flags answer at once. Figures go to stdout, as a table or with `--json` as JSON and nothing else;
progress, notes and errors go to stderr. The exit statuses are `fastclap.console.STATUSES`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fastclap.console import STATUSES, run_command, version_line
from fastclap.errors import ConfigError
from fastclap.flags import parse_flags

COMMANDS = {
    "eval": "Retrieval in both directions: R@1, R@5, R@10, mAP@10, median and mean rank, each with its chance level.",
    "classify": "Zero-shot classification: accuracy (WA), UAR (UA), macro-F1 and each class's recall.",
    "report": "Write the one-page report of a training run: curves, last validation, configuration.",
    "pack": "Decode clips once into shards of int16 samples: a packed folder is a manifest with its audio.",
    "embed": "Embed clips and captions into one table of unit vectors.",
    "search": "Find the clips (or captions) that a description, or another clip, is nearest to: exact, best first.",
    "rerank": "Best of N: of several clips synthesised for one description, select those that fit it best.",
    "similarity": "Speech style similarity: the cosine of each pair, and how well it agrees with human ratings.",
    "prepare": "Write the manifest of a public dataset: audio, captions, tags, emotion, sex, age, durations, splits.",
    "caption": "Caption a folder of audio or a manifest from measured pitch, loudness, pace and labels.",
    "convert": "Turn a checkpoint of another code into a model folder: safetensors, configuration, tokenizer, card.",
    "doctor": "Say what this machine and this installation can do; exit status 1 if something needed is missing.",
}
_USAGE = """usage: fastclap COMMAND [--flag value ...]

Measure and use contrastive language-audio models, and pack data (fastclap-train trains them). Commands:
{commands}

  fastclap COMMAND --help   every flag of a command, with its default and examples
  fastclap --version        the versions of fastclap, Python and torch

Exit status:
{statuses}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return the exit status; help and mistyped flags exit at once."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<12}{summary}" for name, summary in COMMANDS.items())
        print(_USAGE.format(commands=commands, statuses=STATUSES), end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *words = arguments
    if name == "--version":
        print(version_line("fastclap"))
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"there is no command {name!r}; choose one of: {', '.join(COMMANDS)} (fastclap --help)")
    command = importlib.import_module(f"fastclap.commands.{name}")
    description = f"{COMMANDS[name]}\n\n{command.HELP}"
    flags = parse_flags(command.Flags, words, program=f"fastclap {name}", description=description)
    status: int = command.run(flags)
    return status
