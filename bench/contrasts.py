"""What each option of the contrast does to the small recipe, on real speech, over several seeds.

    python -m bench.contrasts --train train.jsonl --test test.jsonl --out bench/records/contrasts [--seeds 0 1 2]

Each run is one `fastclap-train small` with the flags of `RUNS`; the runs of a seed differ in those alone. The guide
`first run` has the model of the same seed's run `plain` as its teacher, which costs a training more. Models of `plain`
and of Matryoshka are also scored by the first columns of their embeddings, each width by itself. The test manifest is
seen by nothing but the scores. Runs that the record has already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.small_recipe import begun_record, of_both_directions, spread
from fastclap import CLAP
from fastclap.data import Manifest, load_manifest
from fastclap.evaluation import ClassificationTask, evaluate
from fastclap.files import write_atomic
from fastclap.train.cli import main as fastclap_train

PLAIN, MATRYOSHKA = "plain", "Matryoshka 128, 64, 32, 16"
GUIDE = "--loss.teacher-weight 0 --loss.guide-margin 0 --loss.teacher"
RUNS = {
    PLAIN: "",
    "guide, moving average": f"{GUIDE} ema",
    "guide, first run": f"{GUIDE} FOLDER/{PLAIN}/model",
    "debias 0.05": "--loss.debias 0.05",
    "debias 0.1": "--loss.debias 0.1",
    "queue of 128": "--loss.queue-size 128 --loss.queue-after 100",
    "queue of 320": "--loss.queue-size 320 --loss.queue-after 100",
    MATRYOSHKA: "--loss.matryoshka 128 64 32 16",
}
WIDTHS = (128, 64, 32, 16)  # the first is the whole
TASKS = [
    ClassificationTask("classification_tag", ["A male speaker sounds {}.", "A female speaker sounds {}."]),
    ClassificationTask("sex", ["A {} speaker."]),
]
FIGURES = ("emotion UAR", "sex UAR", "global R@1", "global R@10", "global mAP@10", "fine mAP@10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="training manifest")
    parser.add_argument("--test", required=True, help="held-out manifest")
    parser.add_argument("--out", required=True, help="folder that receives record.json and README.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default="the given data", help="what the data is called in the tables")
    parser.add_argument("flags", nargs="*", help="after --: further flags of every fastclap-train")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "record.json"
    record = begun_record(path, arguments.name)
    record["commands"] = {name: " ".join(command(name, "SEED", "FOLDER", arguments.flags)) for name in RUNS}
    figures: dict[str, dict[str, Any]] = record.setdefault("figures", {name: {} for name in RUNS})
    test = load_manifest(arguments.test)
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            missing = [name for name in RUNS if str(seed) not in figures[name]]
            if "guide, first run" in missing and PLAIN not in missing:
                missing.insert(0, PLAIN)  # the guide is its model
            for name in missing:
                found = trained(name, seed, Path(folder) / str(seed), arguments, test)
                figures[name][str(seed)] = found
                print(name, seed, json.dumps(found), flush=True)
                write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
    write_atomic(out / "README.md", page(record).encode())
    print(f"record: {out / 'README.md'}")


def command(name: str, seed: int | str, folder: Path | str, flags: list[str]) -> list[str]:
    """The flags of a run; the models of its seed lie in `folder`."""
    own = [str(folder) + word.removeprefix("FOLDER") if "FOLDER" in word else word for word in RUNS[name].split()]
    return ["small", "--seed", str(seed), *own, *flags]


def trained(
    name: str, seed: int, folder: Path, arguments: argparse.Namespace, test: Manifest
) -> dict[str, dict[str, float]]:
    """Train as a user would, and score: the figures by width, and the seconds that the training took."""
    start = time.perf_counter()
    run = ["--data.train", arguments.train, "--run-dir", str(folder / name)]
    fastclap_train([*command(name, seed, folder, arguments.flags), *run])
    seconds = time.perf_counter() - start
    model = CLAP.from_pretrained(folder / name / "model")
    widths = WIDTHS if name in (PLAIN, MATRYOSHKA) else WIDTHS[:1]
    return {**{str(width): scores(model, test, width) for width in widths}, "training": {"seconds": round(seconds, 1)}}


def scores(model: CLAP, test: Manifest, width: int) -> dict[str, float]:
    """Zero-shot classification and retrieval, the latter as the mean of both directions."""
    result = evaluate(model, test, captions=["global", "fine"], tasks=TASKS, width=width)
    found = {
        "emotion UAR": result["classification"]["classification_tag"]["uar"],
        "sex UAR": result["classification"]["sex"]["uar"],
    }
    found |= of_both_directions(result["retrieval"])
    return {figure: round(value, 4) for figure, value in found.items()}


def page(record: dict[str, Any]) -> str:
    """The record as tables."""
    figures = record["figures"]
    seeds = sorted({seed for runs in figures.values() for seed in runs}, key=int)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# Kinds of contrast in the small recipe",
        "",
        f"Written by `python -m bench.contrasts` on {record['data']}; {record['hardware']}; {versions}. Seeds "
        f"{', '.join(seeds)}: mean ± standard deviation, in per cent. Retrieval is the mean of both directions. In "
        "brackets the mean difference from the plain run of the same seed, and in how many of the seeds it is above 0. "
        "The seconds of a training are those of a machine that may have done other things besides.",
        "",
        f"| run | {' | '.join(FIGURES)} | seconds |",
        "| --- " * (len(FIGURES) + 2) + "|",
    ]
    for name, runs in figures.items():
        cells = [cell(runs, figures[PLAIN], "128", figure, compare=name != PLAIN) for figure in FIGURES]
        seconds = statistics.mean(run["training"]["seconds"] for run in runs.values())
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |")
    lines += ["", *(f"- {name}: `fastclap-train {command}`" for name, command in record["commands"].items())]
    lines += ["", "## The first columns of an embedding", ""]
    lines += [f"| columns | run | {' | '.join(FIGURES)} |", "| --- " * (len(FIGURES) + 2) + "|"]
    for width in map(str, WIDTHS):
        for name in (PLAIN, MATRYOSHKA):
            cells = [cell(figures[name], figures[PLAIN], width, figure, compare=name != PLAIN) for figure in FIGURES]
            lines.append(f"| {width} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(runs: dict[str, Any], plain: dict[str, Any], width: str, figure: str, *, compare: bool) -> str:
    """Mean and spread of a figure over the seeds, and how it compares with the plain runs."""
    values = [100 * run[width][figure] for run in runs.values()]
    text = spread(values)
    if not compare:
        return text
    gains = [100 * (run[width][figure] - plain[seed][width][figure]) for seed, run in runs.items()]
    return f"{text} ({statistics.mean(gains):+.1f}, {sum(gain > 0 for gain in gains)} of {len(gains)})"


if __name__ == "__main__":
    main()
