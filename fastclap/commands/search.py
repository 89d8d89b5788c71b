"""`fastclap search`: the nearest rows of an embedded collection."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastclap.bounds import Count
from fastclap.commands.shared import ModelFlags, load_models
from fastclap.console import Column, Table, shortened, show, show_json
from fastclap.errors import ConfigError


@dataclass(kw_only=True)
class Flags(ModelFlags):
    model: Annotated[str, tyro.conf.Positional]
    """Exported model folder, run folder (its newest checkpoint) or Hugging Face hub id; the one that embedded INDEX."""
    index: Annotated[str, tyro.conf.Positional]
    """The .parquet or .npy file that `fastclap embed` wrote."""
    query: Annotated[str | None, tyro.conf.Positional] = None
    """Description of what to find; - reads one a line from standard input and answers each at once."""
    audio: str | None = None
    """Audio file to find similar ones of, instead of a description."""
    k: Annotated[Count, tyro.conf.arg(aliases=["-k"])] = 10
    """How many to find, at least 1."""
    engine: Literal["torch", "faiss"] = "torch"
    """What computes the cosines, exactly in both cases; faiss has to be installed (pip install faiss-cpu)."""


HELP = """\
Examples:
  fastclap search runs/demo recordings.parquet "a calm female voice"
  fastclap search runs/demo recordings.parquet --audio like-this.wav -k 5
  fastclap search runs/demo recordings.parquet "an angry man" -k 100 --json > found.json
  fastclap search runs/demo recordings.parquet - --json < descriptions.txt > found.jsonl
"""


def run(flags: Flags) -> int:
    if (flags.query is None) == (flags.audio is None):
        raise ConfigError("give either a description or --audio FILE to search with")
    if flags.query is not None and not flags.query.strip():
        raise ConfigError("the description is blank")
    from fastclap.apps.embed import check_finite, fingerprint, load_index
    from fastclap.apps.search import check_same_model, search

    (model,), loading = load_models(flags, [flags.model])
    start = time.perf_counter()
    index = load_index(flags.index)
    check_same_model(index, fingerprint(model), flags.index)
    reading = time.perf_counter() - start
    for asked in [str(flags.audio)] if flags.query is None else _queries(flags.query):
        start = time.perf_counter()
        query = model.embed_audio([asked]) if flags.query is None else model.embed_text([asked])
        check_finite(query, ["the query"])
        found = search(index, query, flags.k, engine=flags.engine)[0]
        answering = time.perf_counter() - start
        if not flags.json:
            heads: dict[str, Column] = {"rank": "left", "cosine": "right", "clip or caption": "whole"}
            table = Table(f"Nearest to {shortened(asked)!r}, of {len(index.names)}", heads)
            for row in found:
                table.rows.append((row["rank"], f"{row['score']:.3f}", row.get("path", row.get("text", ""))))
            show(table, f"{answering:.3f} s, model and index in memory")
            continue
        result = {
            "model": flags.model,
            "index": flags.index,
            "query": asked,
            "rows": len(index.names),
            "found": found,
            "time": {
                "loading_seconds": round(loading, 3),
                "reading_seconds": round(reading, 4),
                "query_seconds": round(answering, 4),
            },
        }
        show_json(result, lines=flags.query == "-")
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
