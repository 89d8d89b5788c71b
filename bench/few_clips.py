"""What pretrained towers make of a few hundred clips: the recipe whisper-small and its parts, over several seeds.

    python -m bench.few_clips --train train.jsonl --test test.jsonl --out bench/records/few-clips \\
        --audio openai/whisper-tiny.en --text sentence-transformers/all-MiniLM-L6-v2 [--seeds 0 1 2] [--only NAME ...]

Each run is one `fastclap-train` with the flags of `RUNS`; the runs of a seed differ in those alone. The test manifest
is seen by nothing but the scores. Runs that the record has already are not repeated. The frozen towers' outputs are
kept for all runs in one file (`--cache`, by default a folder of this call), so the first run pays for them; a run says
how many seconds it took in all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.contrasts import FIGURES, scores
from bench.small_recipe import begun_record, spread
from fastclap import CLAP
from fastclap.apps.caption_manifest import caption
from fastclap.data import load_manifest
from fastclap.files import write_atomic
from fastclap.train.cli import main as fastclap_train

RECIPE = "whisper-small, as it is"


class Training(NamedTuple):
    """A run: its recipe and flags, the share of the clips that it is given, and whether it is told their labels."""

    flags: str = ""
    recipe: str = "whisper-small --small"
    share: float = 1.0
    labels: bool = True


RUNS = {
    "small, from scratch": Training(recipe="small"),
    RECIPE: Training(),
    "the window of 30 s": Training("--model.audio.window full"),
    "the last layer": Training("--model.audio.hidden-states last"),
    "layers with learned weights": Training("--model.audio.hidden-states weighted"),
    "mean and deviation": Training("--model.audio.pooling statistics"),
    "last layer, mean and deviation": Training("--model.audio.hidden-states last --model.audio.pooling statistics"),
    "LoRA of rank 8 in Whisper": Training(
        "--model.audio.no-freeze --model.audio.freeze-modules * --model.audio.lora-rank 8 "
        "--optimizer.tower-lr-scale 0.3 --steps 60 --batch-size 32 --data.cache-mb 256"
    ),
    "all of Whisper trained": Training(
        "--model.audio.no-freeze --optimizer.tower-lr-scale 0.03 --optimizer.layer-decay 0.8 "
        "--steps 60 --batch-size 32 --data.cache-mb 256"
    ),
    "half of the clips": Training(share=0.5),
    "a quarter of the clips": Training(share=0.25),
    "a tenth of the clips": Training("--batch-size 32", share=0.1),
    "captions measured on the audio alone": Training(labels=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="training manifest")
    parser.add_argument("--test", required=True, help="held-out manifest")
    parser.add_argument("--out", required=True, help="folder that receives record.json and README.md")
    parser.add_argument("--audio", default="openai/whisper-tiny.en", help="Whisper: folder or hub id")
    parser.add_argument("--text", default="sentence-transformers/all-MiniLM-L6-v2", help="text encoder, likewise")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), help="these runs alone")
    parser.add_argument("--cache", help="folder for the frozen towers' outputs")
    parser.add_argument("--name", default="the given data", help="what the data is called in the tables")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "record.json"
    record = begun_record(path, arguments.name)
    record["commands"] = {name: in_words(run) for name, run in RUNS.items()}
    figures: dict[str, dict[str, Any]] = record.setdefault("figures", {})
    test = load_manifest(arguments.test)
    with tempfile.TemporaryDirectory() as scratch:
        for seed in arguments.seeds:
            for name in arguments.only:
                if str(seed) in figures.setdefault(name, {}):
                    continue
                folder = Path(scratch) / "run"
                start = time.perf_counter()
                fastclap_train([*command(RUNS[name], seed, Path(scratch), arguments), "--run-dir", str(folder)])
                seconds = time.perf_counter() - start
                model = CLAP.from_pretrained(folder / "model")
                found = scores(model, test, model.config.head.dim)
                figures[name][str(seed)] = {**found, "seconds": round(seconds, 1)}
                print(name, seed, json.dumps(figures[name][str(seed)]), flush=True)
                write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
                folder.rename(Path(scratch) / f"{len(os.listdir(scratch))}")
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
    write_atomic(out / "README.md", page(record).encode())
    print(f"record: {out / 'README.md'}")


def command(run: Training, seed: int, scratch: Path, arguments: argparse.Namespace) -> list[str]:
    """The words after `fastclap-train`, but for the run folder."""
    root = Path(arguments.train).resolve().parent if run.labels else scratch
    manifest = drawn(run.share, seed, scratch, arguments.train) if run.labels else measured(scratch, arguments.train)
    words = [*run.recipe.split(), "--seed", str(seed), "--data.train", manifest, "--data.audio-root", str(root)]
    if "whisper" in run.recipe:
        words += ["--model.audio.pretrained", arguments.audio, "--model.text.pretrained", arguments.text]
        words += ["--data.frozen-cache", arguments.cache or str(scratch / "cache")]
    return [*words, *run.flags.split()]


def in_words(run: Training) -> str:
    """The command of a run, for the page."""
    given = "" if run.share == 1 else f" (on {run.share:.0%} of the lines, drawn by the seed)"
    given += "" if run.labels else " (on what `fastclap caption` makes of the audio without labels)"
    return f"`fastclap-train {f'{run.recipe} {run.flags}'.strip()}`{given}"


def drawn(share: float, seed: int, scratch: Path, manifest: str) -> str:
    """A manifest with this share of the lines of a .jsonl one, drawn by the seed."""
    if share == 1:
        return manifest
    lines = Path(manifest).read_text(encoding="utf-8").splitlines(keepends=True)
    path = scratch / f"{share:g}-{seed}.jsonl"
    path.write_text("".join(random.Random(seed).sample(lines, round(share * len(lines)))), encoding="utf-8")
    return str(path)


def measured(scratch: Path, manifest: str) -> str:
    """What `fastclap caption` makes of the clips of a manifest when it is told nothing else of them."""
    path, paths = scratch / "measured.jsonl", scratch / "paths.jsonl"
    if not path.exists():
        rows = [{"audio": os.path.abspath(row.audio)} for row in load_manifest(manifest)]
        paths.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        caption(str(paths), str(path))
    return str(path)


def page(record: dict[str, Any]) -> str:
    """The record as a table."""
    figures = record["figures"]
    seeds = sorted({seed for runs in figures.values() for seed in runs}, key=int)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# Pretrained towers on a few hundred clips",
        "",
        f"Written by `python -m bench.few_clips` on {record['data']}; {record['hardware']}; {versions}. Whisper is "
        f"tiny.en. Seeds {', '.join(seeds)}: mean ± standard deviation, in per cent. Retrieval is the mean of both "
        "directions. The seconds are those of a whole `fastclap-train`, on a machine that may have done other things "
        "besides; of runs with frozen towers those of the first seed include computing what they say of the clips.",
        "",
        f"| run | {' | '.join(FIGURES)} | seconds, seed by seed |",
        "| --- " * (len(FIGURES) + 2) + "|",
    ]
    for name, runs in figures.items():
        cells = [spread([100 * run[figure] for run in runs.values()]) for figure in FIGURES]
        seconds = ", ".join(f"{run['seconds']:.0f}" for run in runs.values())
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds} |")
    lines += ["", *(f"- {name}: {command}" for name, command in record["commands"].items() if name in figures)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
