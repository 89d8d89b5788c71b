"""How many clips a second one CPU core loads: from WAV, FLAC and MP3 files and from packed shards.

    python -m bench.loader [--train MANIFEST] [--reference CHECKOUT] [--out FOLDER]

The same clips, made here or taken from a manifest, are written in every form. Three kinds of batches are timed: crops
of longer files, crops with the statistics of the whole file (what a WavLM tower asks for), and whole files with
statistics. In the training process, clips per second of its CPU time are "per core"; with loader processes, clips per
second of wall clock are counted while their queues are full. Files are in the page cache: this is the cost of reading
and decoding, not of a disk. With --reference, the data set and collate function of a checkout of ParaSpeechCLAP load
the same files, as they are but for what the record says.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import fastclap
from bench import timing
from fastclap.audio import read_audio
from fastclap.data import BatchSampler, ClipDataset, Manifest, load_manifest, make_loader
from fastclap.data.pack import pack
from fastclap.memory import keep_freed_memory

RATE = 16000
FILES = {"WAV": ("wav", "PCM_16"), "FLAC": ("flac", "PCM_16"), "MP3": ("mp3", "MPEG_LAYER_III")}
KINDS = {  # crop in seconds, whole-file statistics
    "crop": (10.0, False),
    "crop with statistics": (10.0, True),
    "whole with statistics": (math.inf, True),
}
PREFETCH = 2

Record = dict[str, Any]


def made_clips(count: int, least: float, most: float, seed: int = 0) -> Iterator[np.ndarray]:
    """Noise with the spectrum and the rhythm of speech, roughly: codecs take their time over it. int16 [samples]."""
    from scipy.signal import lfilter

    random = np.random.default_rng(seed)
    for _ in range(count):
        size = round(random.uniform(least, most) * RATE)
        wave = lfilter([1.0], [1.0, -1.6, 0.75], random.normal(size=size))
        syllables = np.interp(
            np.arange(size), 4000 * np.arange(size // 4000 + 2), random.uniform(0, 1, size // 4000 + 2)
        )
        yield (3000 * wave / wave.std() * syllables).clip(-32768, 32767).astype(np.int16)


def write_forms(waves: Iterable[np.ndarray], folder: Path) -> dict[str, str]:
    """Every form of the clips: its name → its manifest. Files lie as ParaSpeechCaps has them, under a `source`."""
    import soundfile

    rows: dict[str, list[Record]] = {name: [] for name in FILES}
    (folder / "audio" / "bench").mkdir(parents=True)
    for index, wave in enumerate(waves):
        for name, (extension, subtype) in FILES.items():
            clip = f"{index:05d}.{extension}"
            soundfile.write(folder / "audio" / "bench" / clip, wave, RATE, subtype=subtype)
            caption = f"Clip {index} is spoken."
            row = {"source": "bench", "relative_audio_path": clip, "text_description": [caption]}
            rows[name].append({**row, "duration": len(wave) / RATE})
    manifests = {}
    for name, lines in rows.items():
        (folder / name).mkdir()
        path = folder / name / "train.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        manifests[name] = str(path)
    pack(load_manifest(manifests["WAV"], audio_root=str(folder / "audio")), folder / "packed")
    return {**manifests, "packed": str(folder / "packed")}


def rate_in_process(batch: Callable[[], object], batch_size: int, seconds: float) -> tuple[float, float]:
    """Clips per second of CPU time: the median batch of about `seconds`, and the share of time spent waiting."""
    batch()
    costs: list[float] = []
    start, begun = time.perf_counter(), time.process_time()
    while len(costs) < 3 or time.perf_counter() - start < seconds:
        before = time.process_time()
        batch()
        costs.append(time.process_time() - before)
    waited = 1 - (time.process_time() - begun) / (time.perf_counter() - start)
    return batch_size / statistics.median(costs), max(waited, 0.0)


def rate_of_loader(batches: Iterator[object], batch_size: int, workers: int, seconds: float) -> float:
    """Clips per second of wall clock, once the loader processes are as far ahead as they may be."""
    for _ in range(workers * (PREFETCH + 1)):
        next(batches)
    start, count = time.perf_counter(), 0
    while count < 2 * workers * PREFETCH or time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return batch_size * count / (time.perf_counter() - start)


def measure(manifest: Manifest, kind: str, workers: Sequence[int], batch_size: int, seconds: float) -> Record:
    """Our loader on one form of the clips."""
    crop, with_statistics = KINDS[kind]
    dataset = ClipDataset(manifest, RATE, crop_seconds=crop, seed=0, file_statistics=with_statistics)
    found: Record = {"workers": {}}
    for number in workers:
        sampler = BatchSampler(manifest, batch_size, seed=0, bucket_by_length=False)
        if number:
            batches = iter(make_loader(dataset, sampler, num_workers=number, prefetch=PREFETCH))
            found["workers"][str(number)] = significant(rate_of_loader(batches, batch_size, number, seconds))
            batches.close()  # type: ignore[attr-defined]
        else:
            items = iter(sampler)
            per_core, waited = rate_in_process(lambda: dataset[next(items)], batch_size, seconds)  # noqa: B023
            found |= {"per_core": significant(per_core), "waiting": round(waited, 2)}
    return found


class Reference:
    """The data set and collate function of a ParaSpeechCLAP checkout, and what had to be put in their place here."""

    def __init__(self, checkout: str) -> None:
        import torchaudio

        sys.path.insert(0, checkout)
        from paraspeechclap import dataset, utils  # type: ignore[import-not-found]

        self.module, self.collate = dataset, utils.collate_fn
        self.notes = [
            "its random crop, a class of audtorch, is replaced by a slice",
            "its whole-file statistics are those of a Wav2Vec2FeatureExtractor with default settings, built here",
        ]
        try:
            import torchcodec  # type: ignore[import-not-found] # noqa: F401
        except (ImportError, RuntimeError):
            torchaudio.load = _read_by_soundfile
            self.notes.append("torchaudio.load needs torchcodec, which is not there: soundfile reads the files instead")

    def measure(
        self, folder: str, audio_root: str, kind: str, workers: Sequence[int], batch_size: int, seconds: float
    ) -> Record:
        from transformers import Wav2Vec2FeatureExtractor

        crop, with_statistics = KINDS[kind]
        data = self.module.ParaSpeechCapsDataset(
            dataset_name=folder,
            split="train",
            audio_root=audio_root,
            is_train=True,
            transform=None if math.isinf(crop) else _RandomCrop(round(crop * RATE)),
        )
        if with_statistics:
            data.feature_extractor = Wav2Vec2FeatureExtractor()
        found: Record = {"workers": {}}
        for number in workers:
            loader = DataLoader(
                data,
                batch_size=batch_size,
                shuffle=True,
                drop_last=True,
                num_workers=number,
                prefetch_factor=PREFETCH if number else None,
                persistent_workers=bool(number),
                collate_fn=self.collate,
            )
            batches = itertools.chain.from_iterable(itertools.repeat(loader))
            if number:
                found["workers"][str(number)] = significant(rate_of_loader(batches, batch_size, number, seconds))
            else:
                per_core, waited = rate_in_process(lambda: next(batches), batch_size, seconds)  # noqa: B023
                found |= {"per_core": significant(per_core), "waiting": round(waited, 2)}
        return found


class _RandomCrop:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, wave: torch.Tensor) -> torch.Tensor:
        start = int(torch.randint(max(1, len(wave) - self.size + 1), ()))
        return wave[start : start + self.size]


def _read_by_soundfile(path: str) -> tuple[torch.Tensor, int]:
    import soundfile

    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(wave.T), rate


def significant(x: float) -> float:
    return float(f"{x:.3g}")


def table(record: Record) -> str:
    """The record in Markdown."""
    workers = [str(number) for number in record["workers"] if number]
    head = ("batches", "from", "loader", "clips/s per core", *(f"clips/s, {n} processes" for n in workers))
    lines = [
        f"{record['clips']} clips of {record['seconds'][0]:.1f} to {record['seconds'][1]:.1f} s ({record['source']}), "
        f"16 kHz mono, batches of {record['batch_size']}, page cache warm. {record['machine']['cpu']}, "
        f"{record['machine']['cores']} cores, load {record['load']} at the start; fastclap {record['fastclap']}, torch "
        f"{record['torch']}, libsndfile {record['libsndfile']}, {record['date']}.",
        "",
        f"| {' | '.join(head)} |",
        "|" + " --- |" * len(head),
    ]
    for row in record["rows"]:
        cells = [row["kind"], row["form"], row["loader"], f"{row['per_core']:g}"]
        cells += [f"{row['workers'].get(n, float('nan')):g}" for n in workers]
        lines.append(f"| {' | '.join(cells)} |")
    if record["reference_notes"]:
        lines += ["", "The reference runs as it is, except: " + "; ".join(record["reference_notes"]) + "."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="manifest of the clips to load (default: made here)")
    parser.add_argument("--audio-root", help="folder that its relative paths start from")
    parser.add_argument("--reference", help="checkout of ParaSpeechCLAP")
    parser.add_argument("--clips", type=int, default=96, help="how many clips")
    parser.add_argument("--lengths", type=float, nargs=2, default=(12.0, 25.0), help="of the clips made here, seconds")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of loader processes")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--out", type=Path, help="folder that receives record.json and README.md")
    args = parser.parse_args()
    if args.clips < args.batch_size or 0 not in args.workers:
        parser.error("--clips must fill a batch, and --workers must contain 0")
    torch.set_num_threads(1)
    keep_freed_memory()  # as every command does
    load = round(os.getloadavg()[0], 1)
    if args.train:
        rows = load_manifest(args.train, audio_root=args.audio_root, require_captions=False)[: args.clips]
        waves = [read_audio(row.audio) for row in rows]
    else:
        waves = list(made_clips(args.clips, *args.lengths))
    found: list[Record] = []
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_DATASETS_CACHE"] = os.path.join(name, "cache")
        folder = Path(name)
        forms = write_forms(waves, folder)
        root = str(folder / "audio")
        manifests = {form: load_manifest(path, audio_root=root) for form, path in forms.items()}
        reference = Reference(args.reference) if args.reference else None
        notes = reference.notes if reference else []
        for kind, form in itertools.product(KINDS, forms):
            figures = measure(manifests[form], kind, args.workers, args.batch_size, args.seconds)
            found.append({"kind": kind, "form": form, "loader": "fastclap", **figures})
            if reference and form in FILES:
                figures = reference.measure(str(folder / form), root, kind, args.workers, args.batch_size, args.seconds)
                found.append({"kind": kind, "form": form, "loader": "ParaSpeechCLAP", **figures})
    import soundfile

    lengths = [len(wave) / RATE for wave in waves]
    record = {
        "date": datetime.date.today().isoformat(),
        "fastclap": fastclap.__version__,
        "torch": torch.__version__,
        "libsndfile": soundfile.__libsndfile_version__,
        "machine": timing.machine(torch.device("cpu")),
        "load": load,
        "source": "a manifest" if args.train else "noise shaped like speech",
        "clips": len(waves),
        "seconds": [min(lengths), max(lengths)],
        "batch_size": args.batch_size,
        "workers": args.workers,
        "reference_notes": notes,
        "rows": found,
    }
    text = table(record)
    print(text, end="")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (args.out / "README.md").write_text("# Clips per second of the loader\n\n" + text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
