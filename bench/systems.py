"""Every system's recipe in its small form, compared with its own ablation: does what the paper adds help, on this data?

    python -m bench.systems --train train.jsonl --test test.jsonl --out bench/records/systems [--seeds 0 1 2]

Each run is one `fastclap-train RECIPE --small` through the real command line. The comparisons (`--only NAME`):

* tags: `paraspeechclap-intrinsic` with its tag loss and balanced draw, on `classification_tag` and on
  `intrinsic_tags`, against the same without either: zero-shot UAR.
* combined: `paraspeechclap-combined` on captions of one kind each, from the columns `intrinsic_tags` and
  `situational_tags`, against `-intrinsic` (without tag loss) and `-situational` on their own kind: retrieval with
  compositional captions, which name both kinds of tags and which none of them was trained on.
* distillation: `ra-clap` from an `ess-clap` model, against the same further training without a teacher.
* fine: `clsp-stage2` (global and fine captions) from a `clsp-stage1` model, against the same further training with
  global captions only: retrieval with fine captions. Both with the log-mel tower.
* towers: the small Zipformer of these two recipes, with ScaledAdam, against that log-mel tower, which has as many
  parameters, in the same time: 480 steps for 1000.

The test manifest is seen by nothing but the scores. Runs that the record has already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastclap
from bench.small_recipe import of_both_directions, processor, spread
from fastclap import CLAP
from fastclap.data import load_manifest
from fastclap.evaluation import ClassificationTask, evaluate
from fastclap.files import write_atomic

TAG_PROMPT = "A person is speaking in a {} style."
SEX = ("male", "female")
KINDS = {
    "intrinsic_tags": ("A voice that is {}.", "The speaker's voice is {}.", "Voice: {}."),
    "situational_tags": ("The delivery is {}.", "Someone speaks like this: {}.", "Speaking style: {}."),
}


@dataclass(frozen=True)
class Run:
    """One training: a recipe, its flags, and the run of the same seed whose model it starts from."""

    recipe: str
    flags: tuple[str, ...] = ()
    data: tuple[str, ...] = ("given",)  # training manifests by name
    start: str | None = None


NO_TAG_LOSS = ("--loss.tag-weight", "0", "--data.balance", "none")
ON_CLASSES = ("--data.tag-column", "classification_tag")
LOG_MEL = ("--wavlm",)  # of which the small form is the log-mel tower with AdamW
EQUAL_TIME = ("--steps", "480")
ADAMW = (
    *("--optimizer.kind", "adamw", "--optimizer.learning-rate", "3e-3", "--optimizer.schedule", "cosine"),
    *("--optimizer.warmup-start", "0"),
)
RUNS = {
    "tags of classes": Run("paraspeechclap-intrinsic", ON_CLASSES),
    "tags of classes, loss alone": Run("paraspeechclap-intrinsic", (*ON_CLASSES, "--data.balance", "none")),
    "tags of classes, balance alone": Run("paraspeechclap-intrinsic", (*ON_CLASSES, "--loss.tag-weight", "0")),
    "intrinsic tags": Run("paraspeechclap-intrinsic"),
    "neither": Run("paraspeechclap-intrinsic", NO_TAG_LOSS),
    "intrinsic captions": Run("paraspeechclap-intrinsic", NO_TAG_LOSS, ("intrinsic_tags",)),
    "situational captions": Run("paraspeechclap-situational", (), ("situational_tags",)),
    "combined captions": Run("paraspeechclap-combined", (), ("intrinsic_tags", "situational_tags")),
    "first stage, ESS-CLAP": Run("ess-clap"),
    "with teacher": Run("ra-clap", start="first stage, ESS-CLAP"),
    "without teacher": Run("ra-clap", ("--loss.teacher", "None"), start="first stage, ESS-CLAP"),
    "first stage, CLSP": Run("clsp-stage1", LOG_MEL),
    "global and fine": Run("clsp-stage2", LOG_MEL, start="first stage, CLSP"),
    "global only": Run("clsp-stage2", (*LOG_MEL, "--data.captions", "global"), start="first stage, CLSP"),
    "Zipformer, first stage": Run("clsp-stage1", EQUAL_TIME),
    "Zipformer, second stage": Run("clsp-stage2", EQUAL_TIME, start="Zipformer, first stage"),
    "Zipformer with AdamW, first stage": Run("clsp-stage1", (*EQUAL_TIME, *ADAMW)),
}


@dataclass(frozen=True)
class Comparison:
    title: str
    runs: tuple[str, ...]
    figures: tuple[str, ...]


COMPARISONS = {
    "tags": Comparison(
        "ParaSpeechCLAP Intrinsic: tag loss and balanced draw",
        (
            "tags of classes",
            "tags of classes, loss alone",
            "tags of classes, balance alone",
            "intrinsic tags",
            "neither",
        ),
        ("class UAR, caption prompts", "class UAR, tag prompts", "sex UAR", "global mAP@10"),
    ),
    "combined": Comparison(
        "ParaSpeechCLAP Combined against the specialised models",
        ("combined captions", "intrinsic captions", "situational captions"),
        ("compositional R@1", "compositional R@10", "compositional mAP@10", "class UAR, tag prompts", "sex UAR"),
    ),
    "distillation": Comparison(
        "RA-CLAP: self-distillation",
        ("with teacher", "without teacher", "first stage, ESS-CLAP"),
        ("global R@1", "global R@10", "global mAP@10", "class UAR, caption prompts", "sex UAR"),
    ),
    "fine": Comparison(
        "CLSP: global and fine captions",
        ("global and fine", "global only", "first stage, CLSP"),
        ("fine R@1", "fine R@10", "fine mAP@10", "global mAP@10", "class UAR, caption prompts"),
    ),
    "towers": Comparison(
        "CLSP: a Zipformer and a log-mel transformer of as many parameters",
        (
            "first stage, CLSP",
            "global and fine",
            "Zipformer, first stage",
            "Zipformer, second stage",
            "Zipformer with AdamW, first stage",
        ),
        ("class UAR, caption prompts", "sex UAR", "global mAP@10", "fine mAP@10"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="training manifest")
    parser.add_argument("--test", required=True, help="held-out manifest")
    parser.add_argument("--out", required=True, help="folder that receives record.json and README.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time; the threads are shared among them")
    parser.add_argument("--name", default="the given data", help="what the data is called in the tables")
    parser.add_argument("flags", nargs="*", help="after --: further flags of every fastclap-train")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    record = _read(out / "record.json")
    record |= {
        "data": arguments.name,
        "hardware": f"{processor()}, {os.cpu_count()} cores",
        "versions": {"fastclap": fastclap.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "parallel": arguments.parallel,
        "commands": {name: " ".join(train_flags(run, "SEED", "FOLDER", arguments.flags)) for name, run in RUNS.items()},
    }
    figures: dict[str, dict[str, dict[str, float]]] = record.setdefault("figures", {})
    wanted = {name for comparison in arguments.only for name in COMPARISONS[comparison].runs}
    wanted |= {start for name in wanted if (start := RUNS[name].start)}

    with tempfile.TemporaryDirectory() as folder:
        data = write_manifests(Path(arguments.train), Path(arguments.test), Path(folder))

        writing = threading.Lock()

        def chain(seed: int, name: str) -> None:
            """A run and those that start from its model."""
            followers = [other for other in RUNS if RUNS[other].start == name and other in wanted]
            missing = [one for one in (name, *followers) if str(seed) not in figures.get(one, {})]
            for one in (name, *followers) if missing else ():
                found = _trained(RUNS[one], seed, data, Path(folder), arguments.flags, one, arguments.parallel)
                if one in missing:
                    with writing:
                        figures.setdefault(one, {})[str(seed)] = found
                        print(one, seed, json.dumps(found), flush=True)
                        write_atomic(out / "record.json", (json.dumps(record, indent=1) + "\n").encode())

        heads = [name for name in RUNS if name in wanted and RUNS[name].start is None]
        with ThreadPoolExecutor(arguments.parallel) as pool:
            for done in [pool.submit(chain, seed, name) for seed in arguments.seeds for name in heads]:
                done.result()
    write_atomic(out / "record.json", (json.dumps(record, indent=1) + "\n").encode())
    write_atomic(out / "README.md", page(record).encode())
    print(f"record: {out / 'README.md'}")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write_manifests(train: Path, test: Path, folder: Path) -> dict[str, list[str]]:
    """Where the training manifests lie, by name, and the test manifest as `test` and `compositional`."""

    def written(source: Path, name: str, captions: Callable[[dict[str, Any], int], list[str]]) -> list[str]:
        rows = []
        for number, row in enumerate(_rows(source)):
            audio = str((source.parent / row["relative_audio_path"]).resolve())
            rows.append({**row, "relative_audio_path": audio, "text_description": captions(row, number)})
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [str(path)]

    def of_kind(column: str) -> Callable[[dict[str, Any], int], list[str]]:
        return lambda row, _: [template.format(" and ".join(row[column])) for template in KINDS[column]]

    def compositional(row: dict[str, Any], number: int) -> list[str]:
        choice = number % 3
        return [" ".join(KINDS[column][choice].format(" and ".join(row[column])) for column in KINDS)]

    return {
        "given": [str(train)],
        "test": [str(test)],
        **{column: written(train, column, of_kind(column)) for column in KINDS},
        "compositional": written(test, "compositional", compositional),
    }


def _rows(manifest: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for number, row in enumerate(rows, start=1):
        for column in ("relative_audio_path", "classification_tag", "fine_description", *KINDS):
            if not row.get(column):
                raise SystemExit(f"{manifest}:{number}: no {column}; the comparisons need it in every row")
    return rows


def train_flags(run: Run, seed: int | str, folder: str, flags: Sequence[str]) -> list[str]:
    start = ("--init-from", f"{folder}/{run.start}/model") if run.start else ()
    return [run.recipe, "--small", "--seed", str(seed), *run.flags, *start, *flags]


def _trained(
    run: Run, seed: int, data: dict[str, list[str]], folder: Path, flags: Sequence[str], name: str, parallel: int
) -> dict[str, float]:
    """Train as a user would, and score."""
    runs = folder / str(seed)
    manifests = [path for which in run.data for path in data[which]]
    command = [*train_flags(run, seed, str(runs), flags), "--data.train", *manifests, "--run-dir", str(runs / name)]
    threads = max(1, (os.cpu_count() or 1) // parallel)
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "fastclap.train.cli", *command],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stderr=subprocess.DEVNULL if parallel > 1 else None,
        check=True,
    )
    seconds = time.perf_counter() - start
    return {**scores(CLAP.from_pretrained(runs / name / "model"), data), "train seconds": round(seconds, 1)}


def scores(model: CLAP, data: dict[str, list[str]]) -> dict[str, float]:
    """What the comparisons are about, on the test manifest. Retrieval: the mean of both directions."""
    test, compositional = load_manifest(data["test"]), load_manifest(data["compositional"])
    captions = [f"A {sex} speaker sounds {{}}." for sex in SEX]
    tasks = {
        "class UAR, caption prompts": ClassificationTask("classification_tag", captions),
        "class UAR, tag prompts": ClassificationTask("classification_tag", [TAG_PROMPT]),
        "sex UAR": ClassificationTask("intrinsic_tags", ["A {} speaker."], classes=SEX),
    }
    found: dict[str, float] = {}
    for name, task in tasks.items():
        result = evaluate(model, test, captions=[], tasks=[task])["classification"]
        found[name] = result[task.column]["uar"]
    retrieval = evaluate(model, test, captions=["global", "fine"], tasks=[])["retrieval"]
    retrieval["compositional"] = evaluate(model, compositional, captions=["global"], tasks=[])["retrieval"]["global"]
    found |= of_both_directions(retrieval)
    return {name: round(value, 4) for name, value in found.items()}


def page(record: dict[str, Any]) -> str:
    """The record as tables: mean ± standard deviation over the seeds, best mean of a column in bold."""
    figures = record["figures"]
    seeds = sorted({seed for runs in figures.values() for seed in runs}, key=int)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# Systems in their small form, compared with their ablations",
        "",
        f"Written by `python -m bench.systems` on {record['data']}; {record['hardware']}, {record['parallel']} "
        f"trainings at a time; {versions}. Seeds "
        f"{', '.join(seeds)}: mean ± standard deviation, in per cent. Retrieval is the mean of both directions. The "
        "small form trains 0.6 million parameters from scratch; it shows whether the parts of a system work together, "
        "not what the published sizes reach.",
    ]
    for comparison in COMPARISONS.values():
        runs = [name for name in comparison.runs if figures.get(name)]
        if not runs:
            continue
        means = {
            (name, figure): statistics.mean(one[figure] for one in figures[name].values())
            for name in runs
            for figure in (*comparison.figures, "train seconds")
        }
        lines += ["", f"## {comparison.title}", "", f"| run | {' | '.join(comparison.figures)} | seconds |"]
        lines += ["| --- " * (len(comparison.figures) + 2) + "|"]
        for name in runs:
            cells = []
            for figure in comparison.figures:
                cell = spread([100 * one[figure] for one in figures[name].values()])
                best = means[name, figure] == max(means[other, figure] for other in runs)
                cells.append(f"**{cell}**" if best else cell)
            lines.append(f"| {name} | {' | '.join(cells)} | {means[name, 'train seconds']:.0f} |")
        lines += ["", *(f"- {name}: `fastclap-train {record['commands'][name]}`" for name in runs)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
