"""The commands that put a model to use: embed, search, rerank and similarity (``fastclap.cli`` says what all share)."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastclap.console import make_table, pick_device, print_json, progress
from fastclap.errors import ConfigError

if TYPE_CHECKING:
    from fastclap.model import CLAP


@dataclass(kw_only=True)
class _OnModel:
    json: bool = False
    """Print the whole result as JSON, and nothing else, on stdout."""
    device: str = "auto"
    """cuda, cuda:N, cpu, or auto (a GPU if there is one)."""
    batch_size: int = 32
    """Clips embedded at a time."""
    threads: int = 4
    """Decoding threads."""


@dataclass(kw_only=True)
class Embed(_OnModel):
    model: Annotated[str, tyro.conf.Positional]
    """Exported model folder, run folder (its newest checkpoint) or Hugging Face hub id."""
    inputs: Annotated[list[str], tyro.conf.Positional]
    """Audio files, folders of them (searched through), manifests, packed or `datasets` folders, hf:NAME[:SPLIT], and
    .txt files with one caption a line."""
    out: str
    """The .parquet or .npy file to write: new, or that of an interrupted call, which is continued."""
    audio_root: str | None = None
    """Folder that relative audio paths of manifests start from (default: the folder of each manifest)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names of the manifests that differ, as pairs: OURS THEIRS."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the products: bfloat16 is faster where the processor has instructions for it; a cosine moves by up to 0.01."""


@dataclass(kw_only=True)
class Search(_OnModel):
    model: Annotated[str, tyro.conf.Positional]
    """Exported model folder, run folder (its newest checkpoint) or Hugging Face hub id; the one that embedded INDEX."""
    index: Annotated[str, tyro.conf.Positional]
    """The .parquet or .npy file that `fastclap embed` wrote."""
    query: Annotated[str | None, tyro.conf.Positional] = None
    """Description of what to find; - reads one a line from standard input and answers each at once."""
    audio: str | None = None
    """Audio file to find similar ones of, instead of a description."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """How many to find."""
    engine: Literal["torch", "faiss"] = "torch"
    """What computes the cosines, exactly in both cases; faiss has to be installed (pip install faiss-cpu)."""


@dataclass(kw_only=True)
class Rerank(_OnModel):
    models: Annotated[list[str], tyro.conf.Positional]
    """One model or several, whose cosines are averaged: exported or run folders, or Hugging Face hub ids."""
    data: str
    """Folder with iter_1, iter_2, ..., each with audios/0.wav, 1.wav, ...; or a table with the columns id, text and
    audio."""
    out: str | None = None
    """New folder for the selected clips and selection_summary.json (default: only the figures are printed)."""
    weights: list[float] | None = None
    """Weight of each model in the mean (default: equal)."""
    top_k: int = 1
    """How many candidates of each item to select; the second best go to OUT/rank_2/audios, and so on."""
    iterations: int | None = None
    """Folders iter_1 to iter_N that must be there (default: up to the last one found)."""
    prompts: list[str] = field(default_factory=list)
    """Files with one description a line, instead of iter_1/input_descriptions.txt; of several files the cosines are
    averaged. In a table a cell of `text` may hold a JSON list instead."""
    audio_root: str | None = None
    """Folder that relative paths of a table start from (default: the table's)."""
    unequal: bool = False
    """Accept a table whose items have different numbers of candidates."""


@dataclass(kw_only=True)
class Similarity(_OnModel):
    model: Annotated[str, tyro.conf.Positional]
    """Exported model folder, run folder (its newest checkpoint) or Hugging Face hub id."""
    pairs: Annotated[str, tyro.conf.Positional]
    """Table (.csv, .tsv, .jsonl, .json or .parquet) with the columns `audio` and either `other_audio` or `text`."""
    rating_column: str | None = None
    """Column of human ratings to correlate the cosines with (default: `rating`, if there is one)."""
    ratings: str | None = None
    """Another table that holds the rating column, line by line as PAIRS."""
    out: str | None = None
    """CSV file for the pairs with their cosines."""
    audio_root: str | None = None
    """Folder that relative audio paths start from (default: the table's)."""


_EMBED = """Embed clips and captions into one table of unit vectors.

Parquet has the columns path, text, origin and vector; NPY has its names beside it in FILE.npy.jsonl. What cannot be
used is listed in FILE.skipped.jsonl and counted; the exit status is 0 all the same, and 2 if nothing can be used. An
interrupted call is continued by the same command. clips_per_second leaves out loading the model.

Examples:
  fastclap embed runs/demo recordings --out recordings.parquet
  fastclap embed runs/demo train.jsonl more.csv --audio-root /audio --out all.npy --json
  fastclap embed runs/demo captions.txt --out captions.parquet
"""
_SEARCH = """Find the clips (or captions) that a description, or another clip, is nearest to: exact, best first.

Examples:
  fastclap search runs/demo recordings.parquet "a calm female voice"
  fastclap search runs/demo recordings.parquet --audio like-this.wav -k 5
  fastclap search runs/demo recordings.parquet "an angry man" -k 100 --json > found.json
  fastclap search runs/demo recordings.parquet - --json < descriptions.txt > found.jsonl
"""
_RERANK = """Best of N: of several clips synthesised for one description, select those that fit it best.

A candidate that cannot be decoded or is silent is listed and never selected. OUT appears only when it is complete.

Examples:
  fastclap rerank runs/demo --data tts_outputs --out tts_outputs/best
  fastclap rerank intrinsic situational --weights 2 1 --data tts_outputs --out best --top-k 3
  fastclap rerank runs/demo --data tts_outputs --prompts speaker.txt style.txt --out best
  fastclap rerank runs/demo --data candidates.csv --json > selection.json
"""
_SIMILARITY = """Speech style similarity: the cosine of each pair, and how well it agrees with human ratings.

Pearson's r and Spearman's rho have 95 % confidence intervals (Fisher). Pairs whose audio cannot be used are listed and
left out.

Examples:
  fastclap similarity runs/demo pairs.csv
  fastclap similarity runs/demo pairs.csv --rating-column mos --out scored.csv
  fastclap similarity runs/demo pairs.csv --ratings ratings.csv --json
"""


def _load(arguments: _OnModel, paths: Sequence[str]) -> tuple[list[CLAP], float]:
    """The models, and the seconds that reading them took."""
    if arguments.batch_size < 1 or arguments.threads < 1:
        raise ConfigError(
            f"--batch-size is {arguments.batch_size} and --threads {arguments.threads}; both must be at least 1"
        )
    device = pick_device(arguments.device)

    from fastclap.model import CLAP

    start = time.perf_counter()
    return [CLAP.from_pretrained(path, device=device) for path in paths], time.perf_counter() - start


def _embed(arguments: Embed) -> int:
    from fastclap.embed import embed, gather

    items = gather(arguments.inputs, audio_root=arguments.audio_root, columns=arguments.columns)
    (model,), loading = _load(arguments, [arguments.model])
    with progress("embedding", "embedded", "inputs") as advance:
        summary = embed(
            model,
            items,
            arguments.out,
            batch_size=arguments.batch_size,
            threads=arguments.threads,
            precision=arguments.precision,
            advance=advance,
        )
    summary["time"]["loading_seconds"] = round(loading, 3)
    if summary["skipped"]:
        listing = f"{arguments.out}.skipped.jsonl"
        print(f"fastclap: {summary['skipped']} of {len(items)} inputs left out, see {listing}", file=sys.stderr)
    if arguments.json:
        print_json({"model": arguments.model, "inputs": arguments.inputs, **summary})
    else:
        print(
            f"{summary['clips']} clips, {summary['texts']} captions, {summary['dimension']} dimensions, "
            f"{summary['reused']} embedded before, {summary['time']['clips_per_second']:.1f} clips/s: {arguments.out}"
        )
    return 0


def _search(arguments: Search) -> int:
    if (arguments.query is None) == (arguments.audio is None):
        raise ConfigError("give either a description or --audio FILE to search with")
    if arguments.query is not None and not arguments.query.strip():
        raise ConfigError("the description is blank")
    from fastclap.embed import check_finite, fingerprint, load_index
    from fastclap.search import check_same_model, search

    (model,), loading = _load(arguments, [arguments.model])
    start = time.perf_counter()
    index = load_index(arguments.index)
    check_same_model(index, fingerprint(model), arguments.index)
    reading = time.perf_counter() - start
    for asked in [str(arguments.audio)] if arguments.query is None else _queries(arguments.query):
        start = time.perf_counter()
        query = model.embed_audio([asked]) if arguments.query is None else model.embed_text([asked])
        check_finite(query, ["the query"])
        found = search(index, query, arguments.k, engine=arguments.engine)[0]
        answering = time.perf_counter() - start
        if not arguments.json:
            table = make_table(f"Nearest to {asked!r}, of {len(index.names)}", "rank")
            table.add_column("cosine", justify="right")
            table.add_column("clip or caption", overflow="fold")
            for row in found:
                table.add_row(str(row["rank"]), f"{row['score']:.3f}", _plain(row.get("path", row.get("text", ""))))
            _print_table(table, f"{answering:.3f} s, model and index in memory")
            continue
        result = {
            "model": arguments.model,
            "index": arguments.index,
            "query": asked,
            "rows": len(index.names),
            "found": found,
            "time": {
                "loading_seconds": round(loading, 3),
                "reading_seconds": round(reading, 4),
                "query_seconds": round(answering, 4),
            },
        }
        print_json(result, lines=arguments.query == "-")
    return 0


def _queries(query: str) -> Iterator[str]:
    """The description, or for "-" those of standard input, asked for on a terminal; blank lines are passed over."""
    if query != "-":
        yield query
    elif sys.stdin.isatty():
        with contextlib.suppress(EOFError):
            while True:
                if line := input("description (ctrl-D ends): ").strip():
                    yield line
    else:
        yield from filter(None, map(str.strip, sys.stdin))


def _rerank(arguments: Rerank) -> int:
    if not arguments.models:
        raise ConfigError("name at least one model")
    is_folder = Path(arguments.data).is_dir()
    for_folders = {"--iterations": arguments.iterations is not None, "--prompts": bool(arguments.prompts)}
    for_tables = {"--audio-root": arguments.audio_root is not None, "--unequal": arguments.unequal}
    for flag, given in (for_tables if is_folder else for_folders).items():
        if given:
            raise ConfigError(f"{flag} has no meaning for {'a folder of iterations' if is_folder else 'a table'}")
    from fastclap.rerank import check_free, read_iterations, read_table, rerank, write_selection
    from fastclap.scoring import normalized_weights

    normalized_weights(len(arguments.models), arguments.weights)  # before anything slow
    if arguments.out is not None:
        check_free(arguments.out)
    candidates = (
        read_iterations(arguments.data, iterations=arguments.iterations, prompts=arguments.prompts)
        if is_folder
        else read_table(arguments.data, audio_root=arguments.audio_root, unequal=arguments.unequal)
    )
    models, loading = _load(arguments, arguments.models)
    start = time.perf_counter()
    with progress("scoring", "scored", "clips") as advance:
        result = rerank(
            models,
            candidates,
            weights=arguments.weights,
            top_k=arguments.top_k,
            batch_size=arguments.batch_size,
            threads=arguments.threads,
            advance=advance,
        )
    seconds = time.perf_counter() - start
    _list_skipped(result["skipped"])
    if arguments.out is not None:
        write_selection(candidates, result, arguments.out)
    result = {"models": arguments.models, "data": arguments.data, "out": arguments.out, **result}
    result["time"] = {
        "loading_seconds": round(loading, 3),
        "seconds": round(seconds, 3),
        "clips_per_second": round(result["candidates"] * len(models) / seconds, 2),
    }
    if arguments.json:
        print_json(result)
        return 0
    table = make_table(f"Best of {len(candidates.items[0].paths)}", "item")
    for head in ("best", "cosine", "mean of all", "description"):
        table.add_column(head, overflow="fold")
    for item, entry in zip(candidates.items, result["selection"], strict=True):
        scores = [score for score in entry["all_scores"].values() if score is not None]
        label = entry.get("best_audio", f"iter_{entry.get('best_iteration_idx')}")
        mean = sum(scores) / len(scores)
        cells = (item.id, str(label), f"{entry['best_score']:.3f}", f"{mean:.3f}", " | ".join(item.prompts))
        table.add_row(*map(_plain, cells))
    _print_table(
        table, f"{result['candidates']} clips in {seconds:.1f} s" + (f": {arguments.out}" if arguments.out else "")
    )
    return 0


def _similarity(arguments: Similarity) -> int:
    from fastclap.scoring import agreement
    from fastclap.similarity import read_pairs, score_pairs

    if arguments.out is not None and not arguments.out.endswith(".csv"):
        raise ConfigError(f"--out {arguments.out}: name a .csv file")
    pairs = read_pairs(
        arguments.pairs,
        audio_root=arguments.audio_root,
        rating_column=arguments.rating_column,
        ratings=arguments.ratings,
    )
    (model,), loading = _load(arguments, [arguments.model])
    start = time.perf_counter()
    with progress("embedding", "embedded", "clips") as advance:
        scores, skipped = score_pairs(
            model, pairs, batch_size=arguments.batch_size, threads=arguments.threads, advance=advance
        )
    seconds = time.perf_counter() - start
    _list_skipped(skipped)
    kept = [(score, pair.rating) for score, pair in zip(scores, pairs, strict=True) if score is not None]
    rated = [(score, rating) for score, rating in kept if rating is not None]
    found = agreement([score for score, _ in rated], [rating for _, rating in rated]) if rated else None
    result = {
        "model": arguments.model,
        "pairs": len(pairs),
        "scored": len(kept),
        "skipped": skipped,
        "mean_cosine": sum(score for score, _ in kept) / len(kept),
        "agreement": found,
        "scores": scores,
        "time": {"loading_seconds": round(loading, 3), "seconds": round(seconds, 3)},
    }
    if arguments.out is not None:
        from fastclap.files import write_atomic

        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow(("audio", "other_audio", "text", "rating", "cosine"))
        for pair, score in zip(pairs, scores, strict=True):
            writer.writerow(["" if value is None else value for value in (*pair.named, pair.rating, score)])
        write_atomic(Path(arguments.out), buffer.getvalue().encode(errors="replace"))
    if arguments.json:
        print_json(result)
        return 0
    table = make_table(f"Style similarity of {len(kept)} pairs", "figure")
    table.add_column("value", justify="right")
    table.add_column("95 % interval")
    table.add_row("mean cosine", f"{result['mean_cosine']:.3f}", "")
    for name, title in (("pearson", "Pearson's r"), ("spearman", "Spearman's rho")) if found else ():
        figures = found[name] if found else {}
        table.add_row(title, f"{figures['value']:.3f}", f"{figures['low']:.3f} to {figures['high']:.3f}")
    note = f"{len(pairs)} pairs, {len(pairs) - len(kept)} skipped, {seconds:.1f} s"
    _print_table(table, note + (f": {arguments.out}" if arguments.out else ""))
    return 0


def _list_skipped(skipped: Sequence[dict[str, str]]) -> None:
    for clip in skipped[:5]:
        print(f"fastclap: skipped {clip['path']}: {clip['reason']}", file=sys.stderr)
    if len(skipped) > 5:
        print(f"fastclap: skipped {len(skipped) - 5} more clips (--json lists them)", file=sys.stderr)


def _print_table(table: Any, note: str) -> None:
    from rich.console import Console

    console = Console()
    console.print(table)
    console.print(_plain(note), highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    """Text that rich takes literally."""
    from rich.markup import escape

    return escape(text)


COMMANDS: dict[str, tuple[Any, str, Callable[[Any], int]]] = {
    "embed": (Embed, _EMBED, _embed),
    "search": (Search, _SEARCH, _search),
    "rerank": (Rerank, _RERANK, _rerank),
    "similarity": (Similarity, _SIMILARITY, _similarity),
}
