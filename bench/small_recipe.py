"""The small recipe on real speech, several seeds: train, score the held-out manifest, write one record.

    python -m bench.small_recipe --train train.jsonl --test test.jsonl --out bench/records/NAME [--seeds 0 1 2]

Each seed is one `fastclap-train small` through the real command line, timed from start to exit, followed by zero-shot
classification of every `--task COLUMN TEMPLATE...` and retrieval with global and fine captions. The test manifest is
seen by nothing before that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fastclap
from fastclap import CLAP
from fastclap.data import load_manifest
from fastclap.evaluation import ClassificationTask, evaluate, write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="training manifest")
    parser.add_argument("--test", required=True, help="held-out manifest")
    parser.add_argument(
        "--out", required=True, help="folder that receives record.json and the report of the first seed"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--task", action="append", nargs="+", metavar=("COLUMN", "TEMPLATE"), default=[])
    parser.add_argument("flags", nargs="*", help="after --: further flags of fastclap-train small")
    arguments = parser.parse_args()
    tasks = [ClassificationTask(column, templates) for column, *templates in arguments.task] or [ClassificationTask()]
    manifest = load_manifest(arguments.test)
    out = Path(arguments.out)
    runs: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = ["small", "--data.train", arguments.train, "--seed", str(seed), *arguments.flags]
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "fastclap.train.cli", *command, "--run-dir", f"{folder}/run"], check=True
            )
            seconds = time.perf_counter() - start
            figures = evaluate(CLAP.from_pretrained(f"{folder}/run/model"), manifest, tasks=tasks)
            if not runs:
                write_report(out / "report", results=figures, run=f"{folder}/run")
        runs.append({"seed": seed, "train_seconds": round(seconds, 1), **summary(figures)})
        print(json.dumps(runs[-1]), flush=True)
    record = {
        "command": f"fastclap-train {' '.join(['small', '--data.train', 'TRAIN', '--seed', 'SEED', *arguments.flags])}",
        "tasks": {task.column: list(task.templates) for task in tasks},
        "hardware": f"{processor()}, {os.cpu_count()} cores, no GPU" if not torch.cuda.is_available() else "GPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "mean": {key: round(statistics.mean(run[key] for run in runs), 4) for key in runs[0] if key != "seed"},
        "runs": runs,
    }
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    for picture in (out / "report").glob("confusion-*.png"):
        shutil.copy(picture, out / picture.name)
    shutil.rmtree(out / "report")
    print(f"record: {out / 'record.json'}")


def summary(figures: dict[str, Any]) -> dict[str, float]:
    """The headline figures of an evaluation by flat names."""
    flat: dict[str, float] = {}
    for column, scores in figures["classification"].items():
        flat |= {f"{column}/{name}": scores[name] for name in ("uar", "accuracy", "macro_f1")}
    for captions, both in figures["retrieval"].items():
        for way in ("audio_to_text", "text_to_audio"):
            flat |= {f"{captions}/{way}/{name}": both[way][name] for name in ("R@1", "R@5", "R@10", "mAP@10")}
    return {name: round(value, 4) for name, value in flat.items()}


def of_both_directions(retrieval: dict[str, Any]) -> dict[str, float]:
    """Figures of an evaluation's retrievals, as the mean of both directions, by flat names."""
    return {
        f"{kind} {figure}": statistics.mean(both[way][figure] for way in ("audio_to_text", "text_to_audio"))
        for kind, both in retrieval.items()
        for figure in ("R@1", "R@10", "mAP@10")
    }


def begun_record(path: Path, data: str) -> dict[str, Any]:
    """The record of several runs at `path`, if there is one, with what this call runs on and what its data are."""
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record | {
        "data": data,
        "hardware": f"{processor()}, {os.cpu_count()} cores, threads used: {torch.get_num_threads()}",
        "versions": {"fastclap": fastclap.__version__, "python": platform.python_version(), "torch": torch.__version__},
    }


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.1f}"


def processor() -> str:
    """The processor's marketing name, where the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
