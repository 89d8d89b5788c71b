"""Training on frozen towers: what computing them once costs, and clips a second of the steps after that.

    python -m bench.frozen [--weights FOLDER --data FOLDER] [--batches 32 256] [--threads 2] [--steps 100] [--plain 1]

With the weights (`whisper-tiny.en-encoder`, `all-MiniLM-L6-v2`) in the recipe whisper-small and the speech
(`train.jsonl`) that the two folders hold, by default those of FASTCLAP_TEST_WEIGHTS and FASTCLAP_TEST_DATA; without
them, log-mel and text towers of random weights on procedural voices. A step is everything between two steps of the
training loop: seeds, draw of clips and captions, their summaries, heads, loss, gradients, optimizer and the sums for
the log. `--plain` takes so many steps at the smallest batch without the file, for comparison.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fastclap
from bench import timing
from bench.timing import Timing
from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.data import Manifest, load_manifest
from fastclap.data.demo_voices import write_demo
from fastclap.data.summaries import SummaryStore
from fastclap.train import distributed, loop
from fastclap.train import frozen as frozen_towers
from fastclap.train import run as training_run
from fastclap.train.config import DataConfig, OptimizerConfig, TrainConfig
from fastclap.train.recipes import small_form, whisper_small
from fastclap.train.run import Run, prepare

Record = dict[str, Any]
WARM_UP = 5  # steps


def configuration(folder: Path, weights: str | None, data: str | None, clips: int) -> TrainConfig:
    """A run with two frozen towers and ParaSpeechCLAP's heads of 256 columns, in the folder."""
    if weights and data:
        manifest = str(Path(data) / "train.jsonl")
        whisper, minilm = (str(Path(weights) / name) for name in ("whisper-tiny.en-encoder", "all-MiniLM-L6-v2"))
        model = small_form(whisper_small()).model
        audio, text = replace(model.audio, pretrained=whisper), replace(model.text, pretrained=minilm)
    else:
        write_demo(str(folder / "voices"), clips, 16, seed=0)
        manifest = str(folder / "voices" / "train.jsonl")
        audio, text = AudioTowerConfig(freeze=True), TextTowerConfig(freeze=True)
    return TrainConfig(
        data=DataConfig(train=[manifest], crop_seconds=30.0, workers=0, frozen_cache=str(folder / "cache")),
        model=CLAPConfig(audio=audio, text=text, head=HeadConfig(dim=256)),
        optimizer=OptimizerConfig(warmup_steps=20),
        steps=1_000_000,
        device="cpu",
    )


def begun(config: TrainConfig, folder: Path, batch: int, rows: int) -> tuple[Run, dict[str, float]]:
    """A run before its first step, the seconds that filling the files took, and the clips and captions put there."""
    config.batch_size, config.run_dir = batch, tempfile.mkdtemp(dir=folder)
    keep, read, append = frozen_towers.keep, training_run.load_manifest, SummaryStore.append
    passed: dict[str, float] = {"audio": 0, "text": 0}

    def counted(store: SummaryStore, keys: Any, *rest: Any) -> None:
        passed[store.folder.name] += len(keys)
        append(store, keys, *rest)

    def timed(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        kept = keep(*args, **options)
        passed["seconds"] = time.perf_counter() - begin
        return kept

    def repeated(*args: Any, **options: Any) -> Manifest:
        manifest = read(*args, **options)
        return Manifest(manifest[index % len(manifest)] for index in range(max(rows, len(manifest))))

    frozen_towers.keep, training_run.load_manifest, SummaryStore.append = timed, repeated, counted
    try:
        return prepare(config, distributed.join("cpu")), passed
    finally:
        frozen_towers.keep, training_run.load_manifest, SummaryStore.append = keep, read, append


def steps_of(run: Run) -> Callable[[], None]:
    """A call takes the next step, as the training loop does."""
    batches, number = run.meter.received(loop.batches_on_device(run), 0), 0
    run.model.train()

    def step() -> None:
        nonlocal number
        number += 1
        loop.seed_step(run.config, number, run.world)
        run.journal.count(number, run.step(batches))

    return step


def measured(run: Run, batch: int, steps: int, warm_up: int = WARM_UP) -> Record:
    """Milliseconds a step, and clips a second by the median."""
    step, samples = steps_of(run), []
    for _ in range(warm_up):
        step()
    processor = []
    for _ in range(steps):
        before = time.process_time()
        samples.append(timing.elapsed_ms(step, torch.device("cpu")))
        processor.append(1e3 * (time.process_time() - before))
    taken = Timing.of(samples)
    return {
        "batch": batch,
        "step": taken.as_dict(),
        "best_ms": round(min(samples), 3),
        "processor_ms": Timing.of(processor).median_ms,  # of all threads; says more than the clock on a busy machine
        "best_processor_ms": round(min(processor), 3),
        "clips_per_second": round(1e3 * batch / taken.median_ms, 1),
    }


def closed(run: Run) -> None:
    run.saver.close()
    run.journal.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default=os.environ.get("FASTCLAP_TEST_WEIGHTS"), help="folder of both encoders")
    parser.add_argument("--data", default=os.environ.get("FASTCLAP_TEST_DATA"), help="folder with train.jsonl")
    parser.add_argument("--clips", type=int, default=330, help="procedural voices, without weights or data")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="that are timed, at each batch")
    parser.add_argument("--plain", type=int, default=1, help="steps without the file (0: none)")
    parser.add_argument("--cache", type=Path, help="folder of the files, which stay there (default: made and removed)")
    parser.add_argument("--out", type=Path, help="folder that receives record.json and README.md")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    load = round(os.getloadavg()[0], 1)
    rows: list[Record] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configuration(folder, args.weights, args.data, args.clips)
        if args.cache:
            config.data.frozen_cache = str(args.cache)
        clips = len(load_manifest(config.data.train))
        run, cold = begun(config, folder, args.batches[0], max(args.batches))
        captions = len(run.kept.texts.places) if run.kept.texts is not None else 0
        closed(run)
        for batch in args.batches:
            run, warm = begun(config, folder, batch, max(args.batches))
            rows.append(measured(run, batch, args.steps))
            closed(run)
        plain = None
        if args.plain:
            config.data.frozen_cache = "off"
            run, _ = begun(config, folder, min(args.batches), max(args.batches))
            plain = measured(run, min(args.batches), args.plain, warm_up=0)
            closed(run)
    record = {
        "date": datetime.date.today().isoformat(),
        "fastclap": fastclap.__version__,
        "torch": torch.__version__,
        "machine": timing.machine(torch.device("cpu")),
        "load": load,
        "threads": args.threads,
        "towers": [config.model.audio.kind, config.model.text.kind],
        "clips": clips,
        "captions": captions,
        "cold_seconds": round(cold["seconds"], 2),
        "cold_clips": cold["audio"],
        "cold_captions": cold["text"],
        "warm_start_seconds": round(warm["seconds"], 3),
        "rows": rows,
        "plain": plain,
    }
    print(table(record), end="")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (args.out / "README.md").write_text(f"# Training on frozen towers\n\n{table(record)}", encoding="utf-8")
    return 0


def table(record: Record) -> str:
    """The record in Markdown."""
    lines = [
        f"{record['clips']} clips and {record['captions']} captions, {record['towers'][0]} and {record['towers'][1]} "
        f"towers, {record['threads']} threads, {record['machine']['cpu']}, load {record['load']} at the start; "
        f"fastclap {record['fastclap']}, torch {record['torch']}, {record['date']}.",
        "",
        f"Computing {record['cold_clips']} clips and {record['cold_captions']} captions once: "
        f"{record['cold_seconds']:g} s. Opening the files: {record['warm_start_seconds']:g} s.",
        "",
        "| batch | clips/s | ms a step (middle 80 %) | best ms | ms of processor time | best ms of it |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    plain = [("without the file", record["plain"])] if record["plain"] else []
    for form, row in [*((f"{row['batch']}", row) for row in record["rows"]), *plain]:
        name = form if form.isdigit() else f"{row['batch']}, {form}"
        step = row["step"]
        spread = f"{step['median_ms']:g} ({step['p10_ms']:g} to {step['p90_ms']:g})"
        lines.append(
            f"| {name} | {row['clips_per_second']:g} | {spread} | {row['best_ms']:g} | {row['processor_ms']:g} | "
            f"{row['best_processor_ms']:g} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
