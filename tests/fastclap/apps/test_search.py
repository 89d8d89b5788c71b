"""Search: the exact nearest rows in order, by text and by clip, and what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastclap import CLAP
from fastclap.apps.embed import Index, load_index
from fastclap.apps.search import search
from fastclap.commands.main import main
from fastclap.errors import ConfigError


@pytest.fixture
def index(clap_folder: str, tmp_path: Path, write_clip: Callable[..., str], capfd: Any) -> str:
    for number in range(5):
        write_clip(f"clips/{number}.wav", number)
    out = str(tmp_path / "index.parquet")
    assert main(["embed", clap_folder, str(tmp_path / "clips"), "--out", out]) == 0
    capfd.readouterr()
    return out


def test_a_description_and_a_clip_find_the_nearest(clap_folder: str, index: str, tmp_path: Path, capfd: Any) -> None:
    assert main(["search", clap_folder, index, "An angry voice.", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    paths = load_index(index).names
    model = CLAP.from_pretrained(clap_folder)
    cosines = model.similarity([name["path"] for name in paths], ["An angry voice."])[:, 0]
    expected = cosines.argsort(descending=True).tolist()
    assert [row["path"] for row in result["found"]] == [paths[i]["path"] for i in expected]
    assert [row["rank"] for row in result["found"]] == [1, 2, 3, 4, 5]
    assert np.allclose([row["score"] for row in result["found"]], cosines[expected], atol=1e-5)
    assert (result["rows"], result["query"]) == (5, "An angry voice.")
    assert set(result["time"]) == {"loading_seconds", "reading_seconds", "query_seconds"}
    clip = str(tmp_path / "clips/3.wav")
    assert main(["search", clap_folder, index, "--audio", clip, "-k", "2"]) == 0
    table = capfd.readouterr().out.splitlines()
    first = next(line for line in table if line.strip().startswith("1 "))
    assert "1.000" in first and "model and index in memory" in table[-1]


def test_descriptions_from_standard_input(
    clap_folder: str, index: str, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["search", clap_folder, index, "Anger.", "--json"]) == 0
    alone = json.loads(capfd.readouterr().out)
    monkeypatch.setattr("sys.stdin", io.StringIO("Anger.\n\n  Joy. \n"))
    assert main(["search", clap_folder, index, "-", "--json"]) == 0
    first, second = map(json.loads, capfd.readouterr().out.splitlines())
    assert (first["query"], second["query"]) == ("Anger.", "Joy.")
    assert first["found"] == alone["found"] != second["found"]
    asked = iter(["Anger.", ""])

    def answer(prompt: str) -> str:
        try:
            return next(asked)
        except StopIteration:
            raise EOFError from None

    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("builtins.input", answer)
    assert main(["search", clap_folder, index, "-", "-k", "1"]) == 0
    assert capfd.readouterr().out.count("Nearest to 'Anger.'") == 1


@pytest.mark.parametrize("engine", ["torch", "faiss"])
def test_both_engines_are_exact(engine: Any) -> None:
    if engine == "faiss":
        pytest.importorskip("faiss")
    vectors = torch.nn.functional.normalize(torch.randn(200, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    queries = vectors[[3, 77]]
    found = search(Index(vectors, [{"path": str(i)} for i in range(200)], None), queries, 7, engine=engine)
    cosines = queries.double() @ vectors.double().T
    for rows, of_query in zip(found, cosines, strict=True):
        assert [int(row["path"]) for row in rows] == of_query.argsort(descending=True)[:7].tolist()
        assert np.allclose([row["score"] for row in rows], of_query.sort(descending=True).values[:7], atol=1e-6)


def test_equal_cosines_come_in_the_order_of_the_collection() -> None:
    vectors = torch.ones(50, 4) / 2
    (found,) = search(Index(vectors, [{"path": str(i)} for i in range(50)], None), vectors[:1], 9)
    assert [row["path"] for row in found] == [str(i) for i in range(9)]


def test_what_is_refused(
    clap_folder: str,
    other_clap_folder: str,
    index: str,
    tmp_path: Path,
    capfd: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*arguments: str) -> str:
        assert main(["search", *arguments]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1
        return str(err)

    assert "give either a description or --audio" in refused(clap_folder, index)
    assert "give either a description or --audio" in refused(clap_folder, index, "a", "--audio", "b.wav")
    assert "the description is blank" in refused(clap_folder, index, " ")
    assert "-k is 0" in refused(clap_folder, index, "a", "-k", "0")
    assert "no such file" in refused(clap_folder, index, "--audio", str(tmp_path / "none.wav"))
    assert "embed it first: fastclap embed" in refused(clap_folder, str(tmp_path / "clips"), "a")
    assert "was embedded by another model" in refused(other_clap_folder, index, "a")
    np.save(tmp_path / "other.npy", np.ones((1, 3), np.float32))
    (tmp_path / "other.npy.jsonl").write_text('{"path": "x"}\n')
    assert "dimension 3, the model makes 16" in refused(clap_folder, str(tmp_path / "other.npy"), "a")
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ConfigError, match="pip install faiss-cpu"):
        search(load_index(index), load_index(index).vectors[:1], engine="faiss")
