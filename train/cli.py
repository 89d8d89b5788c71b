"""`fastclap-train RECIPE --flag value ...`: the only file of the training package that reads arguments.

torch is imported after the arguments have been understood, so that `--help` and mistyped flags are answered at once.
tyro reads the flags; a recipe with nothing but configuration files does without it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastclap.console import STATUSES, note, run_command, version_line
from fastclap.errors import FastclapError, TrainingStopped
from fastclap.flags import parse_flags

_USAGE = """usage: fastclap-train RECIPE [--small] [--parity] [--wavlm] [--config FILE] [--data.train MANIFEST ...]

Train a dual encoder. Recipes:
{recipes}

  fastclap-train RECIPE --help      every flag of a recipe, with its default
  --small                           the recipe with small towers from scratch, for a CPU
  --parity                          the recipe as published where the default does better
  --wavlm                           a recipe of CLSP with WavLM and AdamW for its Zipformer and ScaledAdam
  fastclap-train average RUN        a model with the mean weights of the last checkpoints (average --help)
  --config FILE                     YAML or TOML file laid over the recipe; flags override it
  --version                         versions of fastclap-train, Python and torch

A signal (Ctrl-C, SIGTERM, SIGHUP) ends training once it is saved. Exit statuses:
{statuses}
Examples:
  fastclap-train demo
  fastclap-train small --data.train train.jsonl --data.valid valid.jsonl --run-dir runs/first
  fastclap-train small --data.train train.jsonl --run-dir runs/first --resume
  fastclap-train paraspeechclap-intrinsic --small --data.train train.jsonl --data.valid valid.jsonl
  torchrun --nproc-per-node 4 -m fastclap.train.cli small --data.train train.jsonl --batch-size 512
"""


def parse(arguments: Sequence[str]) -> object:
    """The configuration that the arguments ask for; exits with status 0 (help) or 2 (mistakes) like argparse."""
    from fastclap.train.recipes import FORMS, RECIPES

    usage = _USAGE.format(
        statuses=STATUSES,
        recipes="\n".join(f"  {name:<28}{(build.__doc__ or '').splitlines()[0]}" for name, build in RECIPES.items()),
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage, end="", file=sys.stdout if arguments else sys.stderr)
        raise SystemExit(0 if arguments else 2)
    recipe, *rest = arguments
    if recipe not in RECIPES:
        raise FastclapError(
            f"there is no recipe {recipe!r}; choose one of: {', '.join(RECIPES)} (fastclap-train --help)"
        )

    from fastclap.train.config import TrainConfig, load_config

    defaults = RECIPES[recipe]()
    for flag, change in FORMS.items():
        if flag in rest:
            defaults = change(defaults)
            rest = [word for word in rest if word != flag]
    rest = [part for word in rest for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    while "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            raise FastclapError("--config needs the path of a YAML or TOML file")
        defaults = load_config(rest[at + 1], defaults)
        del rest[at : at + 2]
    if not rest:
        return defaults

    return parse_flags(
        TrainConfig,
        rest,
        program=f"fastclap-train {recipe}",
        description=RECIPES[recipe].__doc__ or "",
        default=defaults,
    )


def average(arguments: Sequence[str]) -> None:
    """`fastclap-train average RUN --last N`: prints the model's folder and the steps that went into it, as JSON."""
    parser = argparse.ArgumentParser(
        prog="fastclap-train average",
        description="Write a model whose weights are the mean of those of a run's last checkpoints; with "
        "--optimizer.average-every in the training, the mean of all steps between the oldest and the newest of them, "
        "or with --last 1 since the start, as CLSP's are.",
        epilog="example: fastclap-train average runs/clsp-stage2 --last 5 --out runs/clsp-stage2/averaged",
    )
    parser.add_argument("run", help="run folder; it has as many checkpoints as --keep of the training says")
    parser.add_argument("--last", type=int, default=2, help="number of newest checkpoints (default: %(default)s)")
    parser.add_argument("--out", help="folder of the model (default: averaged in the run folder)")
    options = parser.parse_args(arguments)
    run = Path(options.run)
    target = run / "averaged" if options.out is None else Path(options.out)
    from fastclap.train.checkpoint import average_checkpoints

    print(json.dumps({"model": str(target), "steps": average_checkpoints(run, options.last, target)}))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line (default: this process's); an exit status other than 0 is raised as SystemExit.

    A rank of several ends its process here.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    status = run_command(lambda: run(words), "fastclap-train")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from fastclap.train.distributed import end_process

        end_process(status)
    if status:
        raise SystemExit(status)


def run(words: list[str]) -> int:
    """Do what the arguments ask for, and return the exit status."""
    if words[:1] == ["--version"]:
        print(version_line("fastclap-train"))
        return 0
    if words[:1] == ["average"]:
        average(words[1:])
        return 0
    config = parse(words)
    from fastclap.train.loop import train

    try:
        train(config)  # type: ignore[arg-type]
    except TrainingStopped as error:
        note(str(error), "fastclap-train")
        return 128 + error.number
    return 0


if __name__ == "__main__":
    main()
