"""Clips embedded in a second on a CPU, by `fastclap embed` and by ParaSpeechCLAP's own scripts, and time to search.

    python -m bench.embedding [--reference CHECKOUT] [--size large|base|tiny] [--threads N] [--out FOLDER]

Both sides have one set of random weights, the same WAV files and captions (noise shaped like speech, made here), and
run in turn after a warm-up: clips of different lengths, then clips of one length. A call goes from files to unit
vectors. Ours is what `fastclap embed` calls; theirs is `evaluate_retrieval` of `scripts/evaluate_retrieval.py` with
the settings of its configuration (batches of 8, sorted by length), and `load_audio` with `get_audio_embedding` of
`scripts/inference.py`, which takes one clip at a time and no caption. All vectors are compared.

What bounds a side is the rate of products: the table has the model's FLOPs (`bench.model_flops`; padding does not
count) over the time within the audio tower, and its share of the rate of a large product on as many threads.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclap
from bench import model_flops, timing
from bench.loader import RATE, made_clips
from bench.parity import CAPTIONS
from bench.reference_step import build_ours, commit_of, from_configuration, load
from bench.run import SIZES, Size, significant
from bench.tables import markdown
from fastclap import CLAP
from fastclap.apps.embed import Index, embed, gather, load_index
from fastclap.apps.search import search
from fastclap.files import write_atomic
from fastclap.models.products import fast_products
from fastclap.models.sizes import free_memory
from fastclap.models.tokenizer import Tokenizer, train_tokenizer

CPU = torch.device("cpu")
QUERY = "A young woman speaks in a calm voice, slowly."
Row = dict[str, Any]


@dataclass
class Clips:
    """A folder of WAV files, with a caption for each."""

    folder: Path  # holds audio/bench/*.wav, captions.txt and, for the reference, test.jsonl
    samples: list[int]
    captions: list[str]

    @property
    def seconds(self) -> float:
        return sum(self.samples) / RATE


@dataclass
class Run:
    """The result of one call: unit vectors by clip and by caption, and where the time went."""

    clips: list[Tensor | None]
    captions: list[Tensor | None]
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the process, all threads together
    within: dict[str, float] = field(default_factory=dict)  # seconds in the "audio" and "text" towers


def make_clips(folder: Path, count: int, least: float, most: float, seed: int) -> Clips:
    """Write `count` clips of `least` to `most` seconds, evenly spaced, and their captions."""
    import soundfile

    (folder / "audio" / "bench").mkdir(parents=True)
    captions = [f"{CAPTIONS[index % len(CAPTIONS)]} Take {index}." for index in range(count)]
    lines, samples = [], []
    for index, length in enumerate(np.linspace(most, least, count)):
        wave = next(made_clips(1, length, length, seed=seed + index))
        samples.append(len(wave))
        soundfile.write(folder / "audio" / "bench" / f"{index:05d}.wav", wave, RATE, subtype="PCM_16")
        line = {"source": "bench", "relative_audio_path": f"{index:05d}.wav", "text_description": captions[index]}
        lines.append(json.dumps({**line, "duration": len(wave) / RATE}) + "\n")
    (folder / "table").mkdir()
    (folder / "table" / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    return Clips(folder, samples, captions)


@contextlib.contextmanager
def clocks(run: Run) -> Iterator[None]:
    """Measure the time of what happens within."""
    start, begun = time.perf_counter(), time.process_time()
    yield
    run.seconds, run.cpu_seconds = time.perf_counter() - start, time.process_time() - begun


@contextlib.contextmanager
def timed_methods(model: Any, methods: Mapping[str, str], within: dict[str, float]) -> Iterator[None]:
    """Add the seconds spent in some methods of an object to `within`, under the names given."""

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = method(*args, **kwargs)
            within[name] = within.get(name, 0.0) + time.perf_counter() - start
            return result

        return call

    with contextlib.ExitStack() as stack:
        for method, name in methods.items():
            stack.enter_context(mock.patch.object(model, method, timed(name, getattr(model, method))))
        yield


# ---------------------------------------------------------------------------------------------------------------------
# the two sides


class Ours:
    """`fastclap embed` on a model in memory."""

    def __init__(self, model: CLAP, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size

    def __call__(self, clips: Clips, *, precision: Any = "float32", products: bool = True) -> Run:
        """One call; without `products` torch multiplies as it does by default."""
        run = Run([], [])
        methods = {"encode_audio": "audio", "encode_text": "text"}
        plain = mock.patch("fastclap.models.encoder.fast_products", lambda device: contextlib.nullcontext())
        with (
            tempfile.TemporaryDirectory() as folder,
            timed_methods(self.model, methods, run.within),
            contextlib.nullcontext() if products else plain,
        ):
            out = Path(folder) / "index.npy"
            with clocks(run):
                items = gather([str(clips.folder / "audio"), str(clips.folder / "captions.txt")])
                embed(self.model, items, out, batch_size=self.batch_size, precision=precision)
            vectors = load_index(out).vectors
        run.clips, run.captions = list(vectors[: len(clips.samples)]), list(vectors[len(clips.samples) :])
        return run


class Reference:
    """The scripts of a ParaSpeechCLAP checkout, and notes on what had to be replaced in them."""

    def __init__(self, checkout: Path, size: Size, tokenizer: Tokenizer) -> None:
        import logging

        import torchaudio

        self.notes = [
            "weights are random, from the configuration, and the tokenizer is one trained on the captions",
            "its feature extractor is a Wav2Vec2FeatureExtractor with default settings, built here",
            "its data set loads in the process itself, not in 8 others, which would take longer to start",
        ]
        self.retrieval, self.inference = load(checkout, "evaluate_retrieval"), load(checkout, "inference")
        logging.getLogger("paraspeechclap").setLevel(logging.ERROR)  # it warns that there is no checkpoint
        models = {"speech": "wavlm", "text": "xlm-roberta", "embedding_dim": size.dim}
        self.config = _Config(models=_Config(models), checkpoint_path=None)
        with from_configuration(size):
            self.model = self.retrieval.get_model(self.config, CPU)
        self.tokenizer = _TheirTokenizer(tokenizer)
        try:
            import torchcodec  # type: ignore[import-not-found] # noqa: F401
        except (ImportError, RuntimeError):
            torchaudio.load = _read_by_soundfile
            self.notes.append("torchaudio.load needs torchcodec, which is not there: soundfile reads the files instead")

    def evaluate(self, clips: Clips) -> Run:
        """Its retrieval evaluation, up to the metrics."""
        run = Run([], [])
        self.config.update(
            meta=_Config(tqdm_disable=True),
            num_workers=0,
            data=_Config(
                dataset_name=str(clips.folder / "table"),
                audio_root=str(clips.folder / "audio"),
                split="test",
                eval_batch_size=8,
                sort_by_duration=True,
            ),
        )
        self.tokenizer.seen.clear()
        _fill_cache(self.config.data.dataset_name)
        kept: dict[str, list[Tensor]] = {"get_audio_embedding": [], "get_text_embedding": []}
        with contextlib.ExitStack() as stack:
            stack.enter_context(_default_feature_extractor())
            for method, found in kept.items():
                keep = functools.partial(_call_and_keep, getattr(self.model, method), found)
                stack.enter_context(mock.patch.object(self.model, method, keep))
            methods = {"get_audio_embedding": "audio", "get_text_embedding": "text"}
            stack.enter_context(timed_methods(self.model, methods, run.within))
            stack.enter_context(clocks(run))
            self.retrieval.evaluate_retrieval(self.config, self.model, self.tokenizer, CPU)
        audio, text = (torch.cat(found) for found in kept.values())
        order = [clips.captions.index(caption) for caption in self.tokenizer.seen]  # its own, by length
        run.clips, run.captions = [None] * len(order), [None] * len(order)
        for index, clip, caption in zip(order, audio, text, strict=True):
            run.clips[index], run.captions[index] = clip, caption
        return run

    def one_by_one(self, clips: Clips) -> Run:
        """What its inference script does with a clip, for each."""
        from transformers import Wav2Vec2FeatureExtractor

        run, extractor = Run([], [None] * len(clips.samples)), Wav2Vec2FeatureExtractor()
        with clocks(run), timed_methods(self.model, {"get_audio_embedding": "audio"}, run.within), torch.no_grad():
            for path in sorted((clips.folder / "audio" / "bench").iterdir()):
                wave = self.inference.load_audio(str(path), extractor)
                run.clips.append(self.model.get_audio_embedding(wave.unsqueeze(0), normalize=True)[0])
        return run


class _Config(dict[str, Any]):
    """The configuration as a script sees it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class _TheirTokenizer:
    """Our tokenizer behind the call that their scripts make; it remembers the texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.seen: list[str] = []

    def batch_encode_plus(self, texts: list[str], **_: Any) -> dict[str, Tensor]:
        self.seen += texts
        return self.tokenizer(texts, 64)


@functools.cache
def _fill_cache(folder: str) -> None:
    """Have `datasets` read a table for the first time, which writes a copy to its cache."""
    from datasets import load_dataset

    load_dataset(folder, split="test")


def _call_and_keep(method: Callable[..., Tensor], found: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
    found.append(method(*args, **kwargs))
    return found[-1]


@contextlib.contextmanager
def _default_feature_extractor() -> Iterator[None]:
    from transformers import Wav2Vec2FeatureExtractor

    with mock.patch.object(Wav2Vec2FeatureExtractor, "from_pretrained", lambda *_: Wav2Vec2FeatureExtractor()):
        yield


def _read_by_soundfile(path: str) -> tuple[Tensor, int]:
    import soundfile

    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(wave.T.copy()), rate


# ---------------------------------------------------------------------------------------------------------------------
# measurement


def product_rates(n: int = 1024, seconds: float = 1.0) -> dict[str, float]:
    """GFLOP/s of one n×n×n product: by torch, by the library that fastclap chooses, and in bfloat16."""
    a, b = torch.randn(2, n, n)
    low = a.bfloat16(), b.bfloat16()

    def ours() -> Tensor:
        with torch.inference_mode(), fast_products(CPU):
            return F.linear(a, b)

    calls = {"torch": lambda: F.linear(a, b), "fastclap": ours, "bfloat16": lambda: F.linear(*low)}
    for call in calls.values():
        timing.warmed_up(call)
    timings = timing.interleaved(calls, CPU, seconds)
    return {name: significant(2e-6 * n**3 / found.median_ms) for name, found in timings.items()}


def measure(
    forms: Mapping[str, Callable[[Clips], Run]], clips: Clips, size: Size, repeats: int, seconds: float
) -> list[Row]:
    """A row for each form: all in turn, `repeats` times or as often as `seconds` allow, but at least once."""
    runs: dict[str, list[Run]] = {name: [] for name in forms}
    start = time.perf_counter()
    for index in range(repeats):
        if index and (time.perf_counter() - start) * (index + 1) / index > seconds:
            break
        for name, form in forms.items():
            runs[name].append(form(clips))
    heads = model_flops.head_forward({"hidden_size": 768, **size.wavlm}["hidden_size"], size.dim)
    gflop = 1e-9 * sum(model_flops.wavlm_forward(size.wavlm, samples) + heads for samples in clips.samples)
    base = next(iter(runs.values()))[0]
    rows = []
    for name, found in runs.items():
        total = timing.Timing.of([1e3 * run.seconds for run in found])
        audio = statistics.median(run.within["audio"] for run in found)
        rows.append(
            {
                "form": name,
                **total.as_dict(),
                "cpu_s": significant(statistics.median(run.cpu_seconds for run in found)),
                "clips_per_s": significant(1e3 * len(clips.samples) / total.median_ms),
                "audio_s_per_s": significant(1e3 * clips.seconds / total.median_ms),
                "audio_tower_s": significant(audio),
                "text_tower_s": significant(statistics.median(run.within.get("text", 0.0) for run in found)),
                "audio_tower_gflops": significant(gflop / audio),
                "clips_differ": _largest_difference(base.clips, found[0].clips),
                "captions_differ": _largest_difference(base.captions, found[0].captions),
            }
        )
    return rows


def _largest_difference(expected: list[Tensor | None], found: list[Tensor | None]) -> float | None:
    """Of two lists of unit vectors, the largest ‖a − b‖; None where there are no captions."""
    norms = [float((a - b).norm()) for a, b in zip(expected, found, strict=True) if a is not None and b is not None]
    return significant(max(norms)) if norms else None


def padding(samples: list[int], batch_size: int) -> float:
    """Share of padding in batches of clips that are sorted by length."""
    longest = sorted(samples, reverse=True)
    batches = [longest[first : first + batch_size] for first in range(0, len(longest), batch_size)]
    return 1 - sum(samples) / sum(len(batch) * batch[0] for batch in batches)


def nearest_clips(run: Run) -> float:
    """The smallest distance between the vectors of two clips, for the scale of a difference."""
    distances = torch.pdist(torch.stack([clip for clip in run.clips if clip is not None]))
    return significant(float(distances.min()))


def measure_search(model: CLAP, sizes: list[int], repeats: int) -> list[Row]:
    """Text queries, from the string to the ten best, with model and index in memory."""
    rows = []
    for count in sizes:
        dim = model.config.head.dim
        if 8 * count * dim > (free_memory() or 0):
            rows.append({"rows": count, "reason": "not enough memory"})
            continue
        vectors = torch.empty(count, dim)
        for block in vectors.split(65536):
            block.normal_()
            block /= block.norm(dim=1, keepdim=True)
        index = Index(vectors, [{"path": f"{row}.wav", "origin": "made up"} for row in range(count)], None)
        encoding, searching = [], []
        for _ in range(repeats + 2):
            start = time.perf_counter()
            query = model.embed_text([QUERY])
            encoded = time.perf_counter()
            search(index, query, 10)
            encoding.append(1e3 * (encoded - start))
            searching.append(1e3 * (time.perf_counter() - encoded))
        parts = {"encode": encoding[2:], "search": searching[2:]}
        both = [a + b for a, b in zip(*parts.values(), strict=True)]
        medians = {f"{name}_ms": timing.Timing.of(values).median_ms for name, values in parts.items()}
        rows.append({"rows": count, "dim": dim, **timing.Timing.of(both).as_dict(), **medians})
    return rows


def measure_command(model: CLAP, count: int, repeats: int, threads: int) -> Row:
    """`fastclap search` as a command on an index of `count` clips, start-up and reading of the model included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "model")
        vectors = F.normalize(torch.randn(count, model.config.head.dim))
        np.save(folder / "index.npy", vectors.numpy())
        names = "".join(json.dumps({"path": f"{row}.wav"}) + "\n" for row in range(count))
        (folder / "index.npy.jsonl").write_text(names, encoding="utf-8")
        command = [sys.executable, "-m", "fastclap", "search", str(folder / "model"), str(folder / "index.npy"), QUERY]
        samples = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            done = subprocess.run(
                [*command, "--json", "--device", "cpu"],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
            samples.append(1e3 * (time.perf_counter() - start))
        return {"rows": count, **timing.Timing.of(samples[1:]).as_dict(), "inside": json.loads(done.stdout)["time"]}


# ---------------------------------------------------------------------------------------------------------------------
# record


def tables(record: Row) -> str:
    """The record in Markdown."""
    rates, machine, settings = record["products_gflops"], record["machine"], record["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in record["software"].items() if version)
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, load {record['load']} at the start "
        f"and {record['load_at_end']} at the end (before the start, all of it is other processes'); {versions}, "
        f"{record['date']}.",
        f"Towers of size {settings['size']} with random weights, WAV files at 16 kHz, a caption for each clip; ours in "
        f"batches of {settings['batch_size']}. A call goes from files to vectors: its median and the range of the "
        "repeats, after a warm-up, all forms in turn. GFLOP/s: the model's own FLOPs over the time in the audio tower; "
        f"the share is that of a 1024³ product on the same threads, {rates['fastclap']:.3g} GFLOP/s in float32 and "
        f"{rates['bfloat16']:.3g} in bfloat16 (torch's own float32 product: {rates['torch']:.3g}). ×: speed over "
        "the faster form of the reference; where other work was going on, CPU time says more. Differences are the "
        "largest ‖a − b‖ of unit vectors from the first row's.",
    ]
    header = ["form", "s a call", "repeats", "clips/s", "s of audio a s", "×", "CPU s", "× in CPU s"]
    header += ["in audio / text tower, s", "GFLOP/s", "share", "clips differ by", "captions by"]
    for case in record["cases"]:
        base = _fastest_reference(case)
        cells = []
        for row in case["rows"]:
            peak = rates["bfloat16" if row["form"].endswith("bfloat16") else "fastclap"]
            differ = ["" if row[key] is None else f"{row[key]:.2g}" for key in ("clips_differ", "captions_differ")]
            low, high = row["p10_ms"] / 1e3, row["p90_ms"] / 1e3
            cells.append(
                [
                    row["form"],
                    f"{row['median_ms'] / 1e3:.3g} ({low:.3g} to {high:.3g})",
                    str(row["repeats"]),
                    f"{row['clips_per_s']:.3g}",
                    f"{row['audio_s_per_s']:.3g}",
                    f"{base['median_ms'] / row['median_ms']:.2f}",
                    f"{row['cpu_s']:.3g}",
                    f"{base['cpu_s'] / row['cpu_s']:.2f}",
                    f"{row['audio_tower_s']:.3g} / {row['text_tower_s']:.2g}",
                    f"{row['audio_tower_gflops']:.3g}",
                    f"{row['audio_tower_gflops'] / peak:.0%}",
                    *differ,
                ]
            )
        parts.append(
            f"{case['clips']} clips {case['lengths']}, {case['seconds']:.0f} s in all, {case['gflop'] / 1e3:.3g} "
            f"TFLOP; the two clips nearest to each other are {case['nearest_clips']:.2g} apart. Batches of 8, sorted "
            f"by length, hold {case['padding']:.0%} of padding (less in a collection of many more clips):"
        )
        parts.append(markdown(header, cells))
    parts.append(explanation(record))
    if record["reference_notes"]:
        parts.append("The reference runs as it is, except: " + "; ".join(record["reference_notes"]) + ".")
    cells = []
    for row in record["search"]:
        if "reason" in row:
            cells.append([f"{row['rows']:,}", row["reason"], "", "", ""])
            continue
        spread = f"{row['median_ms']:.4g} ({row['p10_ms']:.4g} to {row['p90_ms']:.4g})"
        split = [f"{row['encode_ms']:.3g}", f"{row['search_ms']:.3g}"]
        cells.append([f"{row['rows']:,}", spread, *split, str(row["repeats"])])
    parts.append("The ten nearest of a text query, exact, model and index in memory (random unit vectors):")
    parts.append(markdown(["rows", "ms from text to answer", "encoding", "search", "repeats"], cells))
    if record["command"] is not None:
        row = record["command"]
        inside = ", ".join(f"{name.removesuffix('_seconds')} {value:.3g} s" for name, value in row["inside"].items())
        parts.append(
            f"`fastclap search` as a command on {row['rows']} clips, start-up included: {row['median_ms'] / 1e3:.3g} s "
            f"({row['p10_ms'] / 1e3:.3g} to {row['p90_ms'] / 1e3:.3g}, {row['repeats']} calls); within "
            f"the last: {inside}."
        )
    return "\n\n".join(parts) + "\n"


def _fastest_reference(case: Row) -> Row:
    """The faster form of the reference; without a reference, the first."""
    theirs = [row for row in case["rows"] if row["form"].startswith("ParaSpeechCLAP")]
    return max(theirs or case["rows"][:1], key=lambda row: row["clips_per_s"])


def explanation(record: Row) -> str:
    """How the speed of our forms compares with the reference's, and what the rates of products allow."""
    rates, parts = record["products_gflops"], []
    for case in record["cases"]:
        theirs = _fastest_reference(case)
        gains = ", ".join(
            f"“{row['form']}” {theirs['median_ms'] / row['median_ms']:.2f} ({theirs['cpu_s'] / row['cpu_s']:.2f} in "
            f"CPU time)"
            for row in case["rows"]
            if row["form"].startswith("fastclap")
        )
        exact, low = (rates[name] / theirs["audio_tower_gflops"] for name in ("fastclap", "bfloat16"))
        parts.append(
            f"Clips {case['lengths']}, times as fast as “{theirs['form']}”: {gains}. Its audio tower runs at "
            f"{theirs['audio_tower_gflops']:.3g} GFLOP/s, {theirs['audio_tower_gflops'] / rates['torch']:.0%} of what "
            f"torch's own float32 product reaches; one of nothing but products, at their full rate, would be "
            f"{exact:.1f} times as fast in float32 and {low:.1f} times in bfloat16."
        )
    return "What bounds it. " + " ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="checkout of ParaSpeechCLAP; without it, ours alone")
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--clips", type=int, default=8, help="how many, in each case")
    parser.add_argument("--lengths", type=float, nargs=2, default=(2.0, 10.0), help="of different clips, in seconds")
    parser.add_argument("--batch-size", type=int, default=32, help="of ours (the command's default)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="for the embeddings; search takes less than one more"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--search-rows", type=int, nargs="*", default=[400, 1_000_000], help="sizes of the indexes")
    parser.add_argument(
        "--no-command", action="store_true", help="leave out the search command, which needs disk space"
    )
    parser.add_argument("--out", type=Path, help="folder that receives record.json and README.md")
    arguments = parser.parse_args()
    if arguments.clips < 2 or arguments.repeats < 1:
        parser.error("--clips must be at least 2 and --repeats at least 1")
    text = tables(record_of(arguments))
    print(text, end="")
    return 0


def record_of(arguments: argparse.Namespace) -> Row:
    """Take all measurements and write them to `arguments.out`."""
    import transformers

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    load_before = round(os.getloadavg()[0], 1)
    size = SIZES[arguments.size]
    tokenizer = train_tokenizer(CAPTIONS, 1000)
    record: Row = {
        "date": datetime.date.today().isoformat(),
        "software": {
            "fastclap": fastclap.__version__,
            "commit": commit_of(Path(__file__).parent),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "reference": arguments.reference and (commit_of(arguments.reference) or "a checkout without git"),
        },
        "machine": timing.machine(CPU),
        "load": load_before,
        "settings": {"size": arguments.size, "batch_size": arguments.batch_size},
        "products_gflops": product_rates(),
        "reference_notes": [],
        "cases": [],
    }
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_DATASETS_CACHE"] = os.path.join(name, "cache")
        forms: dict[str, Callable[[Clips], Run]] = {}
        model = build_ours(size, tokenizer).eval()
        if arguments.reference is not None:
            reference = Reference(arguments.reference, size, tokenizer)
            model.load_state_dict(reference.model.state_dict(), assign=True)  # one set of weights in memory
            record["reference_notes"] = reference.notes
            forms["ParaSpeechCLAP, evaluate_retrieval"] = reference.evaluate
            forms["ParaSpeechCLAP, inference, clip by clip"] = reference.one_by_one
        ours = Ours(model, arguments.batch_size)
        forms["fastclap embed, torch's products"] = functools.partial(ours, products=False)
        forms["fastclap embed"] = ours
        forms["fastclap embed --precision bfloat16"] = functools.partial(ours, precision="bfloat16")
        least, most = arguments.lengths
        warm_up = make_clips(Path(name) / "warm-up", 2, least, least, seed=1)
        for form in forms.values():
            form(warm_up)
        for index, shortest in enumerate((least, most)):
            clips = make_clips(Path(name) / str(index), arguments.clips, shortest, most, seed=100 * index)
            rows = measure(forms, clips, size, arguments.repeats, 30 * arguments.minutes)
            record["cases"].append(
                {
                    "clips": len(clips.samples),
                    "lengths": f"of {most:g} s" if shortest == most else f"of {shortest:g} to {most:g} s",
                    "seconds": clips.seconds,
                    "gflop": 1e-9 * sum(model_flops.wavlm_forward(size.wavlm, n) for n in clips.samples),
                    "nearest_clips": nearest_clips(ours(clips)),
                    "padding": significant(padding(clips.samples, 8)),
                    "rows": rows,
                }
            )
        record["search"] = measure_search(model, arguments.search_rows, 9)
        command = None if arguments.no_command else measure_command(model, 400, 3, arguments.threads)
        record |= {"command": command, "load_at_end": round(os.getloadavg()[0], 1)}
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_atomic(arguments.out / "record.json", (json.dumps(record, indent=1) + "\n").encode())
        write_atomic(arguments.out / "README.md", f"# Embedding and search on a CPU\n\n{tables(record)}".encode())
    return record


if __name__ == "__main__":
    raise SystemExit(main())
