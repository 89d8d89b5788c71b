"""Tables of vectors that are damaged, foreign or odd, and outputs that cannot be written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastclap import CLAP
from fastclap.apps.embed import embed, gather, load_index
from fastclap.apps.search import search
from fastclap.commands.main import main
from fastclap.errors import ConfigError, DataError, FastclapError

Write = Callable[..., str]
ODD = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei\rj"


@pytest.fixture(scope="module")
def model(clap_folder: str) -> CLAP:
    return CLAP.from_pretrained(clap_folder)


def refused(path: Path) -> str:
    with pytest.raises(DataError) as error:
        load_index(path)
    message = str(error.value)
    assert path.name in message and "\n" not in message
    return message


def parquet(file: Path, vectors: Any, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"vector": vectors, **columns}), file)
    return file


def npy(path: Path, matrix: Any, names: str | bytes = b'{"path": "a"}\n{"path": "b"}\n', header: Any = None) -> Path:
    np.save(path, matrix)
    names = names if isinstance(names, bytes) else names.encode()
    path.with_name(f"{path.name}.jsonl").write_bytes(names)
    if header is not None:
        path.with_name(f"{path.name}.json").write_text(header)
    return path


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_line_breaks_of_unicode_in_captions_and_paths(
    model: CLAP, tmp_path: Path, write_clip: Write, suffix: str
) -> None:
    (tmp_path / "captions.txt").write_text(f"calm\n{ODD}z\nangry\n", encoding="utf-8", newline="")
    clip = write_clip(f"clips/{ODD}.wav", 1)
    out = tmp_path / f"x{suffix}"
    embed(model, gather([str(tmp_path / "captions.txt"), str(tmp_path / "clips")]), out)
    index = load_index(out)
    assert [name.get("text") or name["path"] for name in index.names] == ["calm", f"{ODD}z", "angry", clip]
    assert search(index, model.embed_text([f"{ODD}z"]), k=1)[0][0]["text"] == f"{ODD}z"


def test_lines_of_names_may_end_as_in_windows(tmp_path: Path) -> None:
    index = load_index(npy(tmp_path / "x.npy", np.eye(2), b'{"path": "a"}\r\n{"path": "b"}\r\n'))
    assert index.names == [{"path": "a"}, {"path": "b"}] and index.model is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ('"a"\n"b"\n', r"the name of row 0 is 'a'"),
        ('{"path": "a"}\n[1]\n', r"the name of row 1 is '\[1\]'"),
        ('{"path": 3}\n{"path": "b"}\n', "the name of row 0 is"),
        ('{"path": "a"}\n', "1 names for 2 vectors"),
        ('{"path": "a"}\n{"path": "b"}\n{"path": "c"}\n', "3 names for 2 vectors"),
        ('{"path": "a"}\n\n', r"x\.npy\.jsonl:2: not valid JSON"),
        ('{"path": "a"}\n{"path": "\\ud800"}\n', r"x\.npy\.jsonl:2: holds .* half of a character"),
        ('{"path": "a"}\n' + "[" * 100_000 + "\n", r"x\.npy\.jsonl:2: JSON nested too deeply"),
        ('{"path": "a"}\n' + "9" * 5000 + "\n", r"x\.npy\.jsonl:2: JSON with an integer"),
        (b'{"path": "\xff"}\n{"path": "b"}\n', r"x\.npy\.jsonl:1: not UTF-8"),
        ("", r"x\.npy\.jsonl:1: not valid JSON"),
    ],
)
def test_names_that_are_none(tmp_path: Path, names: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_index(npy(tmp_path / "x.npy", np.eye(2, 3), names))


def test_names_of_parquet_that_are_no_text(tmp_path: Path) -> None:
    vectors = [[1.0, 0.0], [0.0, 1.0]]
    assert "the column 'path' holds int64" in refused(parquet(tmp_path / "a.parquet", vectors, path=[1, 2]))
    assert "the column 'text' holds binary" in refused(parquet(tmp_path / "b.parquet", vectors, text=[b"a", b"\xff"]))
    coded = pyarrow.array(["a", "b"]).dictionary_encode()
    assert load_index(parquet(tmp_path / "c.parquet", vectors, path=coded)).names == [{"path": "a"}, {"path": "b"}]
    assert load_index(parquet(tmp_path / "d.parquet", vectors)).names == [{"path": "row 0"}, {"path": "row 1"}]


# -- vectors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1.0, 2.0], [3.0], [4.0, 5.0, 6.0]], "the vector of row 1 has 1 numbers, that of row 0 has 2"),
        ([[1.0, 2.0], None], "the vector of row 1 is missing"),
        ([[1.0, 2.0], [None, 1.0]], "the vector of row 1 is not finite"),
        ([[1.0, 2.0], [0.0, 0.0]], "the vector of row 1 is zero"),
        ([[1, 2], [3, 4]], "lists of int64 instead of floats"),
        ([["a"], ["b"]], "lists of string instead of floats"),
        ([[[1.0]], [[2.0]]], "instead of floats"),
        ([1.0, 2.0], "holds double instead of lists"),
        ([[], []], "instead of"),
    ],
)
def test_foreign_parquet(tmp_path: Path, vectors: Any, message: str) -> None:
    assert message in refused(parquet(tmp_path / "x.parquet", vectors))


def test_parquet_of_no_rows_and_of_two_columns_of_a_name(tmp_path: Path) -> None:
    empty = pyarrow.array([], pyarrow.list_(pyarrow.float32()))
    assert "holds no vectors" in refused(parquet(tmp_path / "x.parquet", empty))
    twice = pyarrow.Table.from_arrays([pyarrow.array([[1.0]])] * 2, ["vector", "vector"])
    pyarrow.parquet.write_table(twice, tmp_path / "y.parquet")
    assert "damaged" in refused(tmp_path / "y.parquet")


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.array([[1, 2], [3, 4]]), "holds int64 of shape"),
        (np.ones((2, 2), complex), "holds complex128"),
        (np.ones((2, 2), bool), "holds bool"),
        (np.ones(2), r"of shape (2,)"),
        (np.ones((2, 2, 2)), "of shape (2, 2, 2)"),
        (np.ones((2, 0)), "of shape (2, 0)"),
        (np.array([["a"], ["b"]]), "holds <U1"),
        (np.array([[1.0, 2.0], [np.nan, 1.0]]), "the vector of row 1 is not finite"),
        (np.array([[1.0, 2.0], [1e300, 1.0]]), "the vector of row 1 is not finite"),
        (np.array([[0.0, 0.0], [1.0, 1.0]]), "the vector of row 0 is zero"),
        (np.array([[{}], [1]], object), "damaged"),
    ],
)
def test_matrices_that_are_none(tmp_path: Path, matrix: Any, message: str) -> None:
    np.save(tmp_path / "x.npy", matrix, allow_pickle=True)
    (tmp_path / "x.npy.jsonl").write_text('{"path": "a"}\n{"path": "b"}\n')
    assert message in refused(tmp_path / "x.npy")


def test_an_array_that_is_pickled_runs_nothing(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    np.save(tmp_path / "x.npy", np.array([[Payload()]], object), allow_pickle=True)
    (tmp_path / "x.npy.jsonl").write_text('{"path": "a"}\n')
    assert "damaged" in refused(tmp_path / "x.npy") and not (tmp_path / "ran").exists()


def test_truncated_and_lying_files(tmp_path: Path) -> None:
    whole = npy(tmp_path / "x.npy", np.eye(2, 64)).read_bytes()
    for part in (whole[:-1], whole[:100], whole[:7], b"", b"PK\x03\x04", whole.replace(b"(2, 64)", b"(2,\xff64)")):
        (tmp_path / "x.npy").write_bytes(part)
        assert "truncated or damaged" in refused(tmp_path / "x.npy")
    (tmp_path / "x.npy").write_bytes(whole.replace(b"(2, 64), }", b"(10**9,64)"))
    refused(tmp_path / "x.npy")
    np.savez(tmp_path / "y.npz", a=np.eye(2))
    os.replace(tmp_path / "y.npz", tmp_path / "x.npy")
    assert "several arrays" in refused(tmp_path / "x.npy")


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 3.0, 1e18, 1e30])
def test_vectors_of_any_length_are_scaled(tmp_path: Path, scale: float) -> None:
    rows = scale * np.array([[3.0, 4.0], [4.0, -3.0]])
    for path in (npy(tmp_path / "x.npy", rows), npy(tmp_path / "y.npy", np.asfortranarray(rows).astype(">f8"))):
        expected = torch.tensor([[0.6, 0.8], [0.8, -0.6]])
        torch.testing.assert_close(load_index(path).vectors, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "header", ["{", "[]", '{"summary": {}}', '{"model": 3, "items": "", "summary": {}}', "[" * 99999]
)
def test_a_damaged_header_is_not_that_of_a_foreign_table(model: CLAP, tmp_path: Path, header: str) -> None:
    path = npy(tmp_path / "x.npy", np.eye(2, 16), header=header)
    assert "x.npy.json" in refused(path)
    (tmp_path / "captions.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match="exists already and was not made of this model"):
        embed(model, gather([str(tmp_path / "captions.txt")]), path)
    table = pyarrow.table({"vector": [[1.0]]}, metadata={b"fastclap": header})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert "header" in refused(tmp_path / "x.parquet")


def test_queries(model: CLAP, tmp_path: Path) -> None:
    index = load_index(npy(tmp_path / "x.npy", np.eye(2, 3)))
    with pytest.raises(DataError, match="index holds vectors of dimension 3, the model makes 16"):
        search(index, model.embed_text(["a"]))
    for query, message in (
        (torch.ones(3), r"\[q, D\], not \(3,\)"),
        (None, "not NoneType"),
        (torch.ones(1, 3).long(), ""),
    ):
        with pytest.raises(DataError, match=f"search takes queries .*{message}"):
            search(index, query)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="not finite"):
        search(index, torch.tensor([[1.0, float("nan"), 0.0]]))
    for k in (0, -1, 1.5, True, None):
        with pytest.raises(ConfigError, match="-k is"):
            search(index, torch.eye(1, 3), k=k)  # type: ignore[arg-type]


# -- writing ----------------------------------------------------------------------------------------------------------


def test_damaged_parts_are_embedded_again(model: CLAP, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("a\nb\nc\n")
    items, out, parts = gather([str(tmp_path / "captions.txt")]), tmp_path / "x.npy", tmp_path / ".x.npy.parts"

    def interrupted(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(model, items, out, advance=interrupted)
    part = next(parts.glob("part-*.npz"))
    whole = bytearray(part.read_bytes())
    for position in range(40, len(whole) - 200, 97):
        part.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        np.savez(parts / "part-000007.npz", keys=np.zeros((1, 16)), vectors=np.eye(1), skipped=np.zeros(1, np.uint8))
        (parts / "part-x.npz").write_bytes(whole)
        summary = embed(model, items, out)
        assert summary["reused"] in (0, 3) and summary["texts"] == 3
        found = load_index(out).vectors
        torch.testing.assert_close(found, model.embed_text(["a", "b", "c"]), atol=1e-6, rtol=0)
        out.unlink()
        parts.mkdir()
        (parts / "model.json").write_text(json.dumps({"version": 1, "model": "x"}))
        with pytest.raises(DataError, match="another model or precision"):
            embed(model, items, out)
        (parts / "model.json").unlink()
    (parts / "model.json").write_text("{")
    with pytest.raises(DataError, match=r"model\.json: not valid JSON.*remove the folder"):
        embed(model, items, out)


def test_a_full_disk_names_what_was_written(
    model: CLAP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clap_folder: str, capfd: Any
) -> None:
    (tmp_path / "captions.txt").write_text("a\n")
    arguments = ["embed", clap_folder, str(tmp_path / "captions.txt"), "--out", str(tmp_path / "x.npy")]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fastclap.files.fsync", full)
        assert main(arguments) != 0
    assert f"{tmp_path / '.x.npy.parts/model.json'}: No space left on device" in capfd.readouterr().err
    assert main(arguments) == 0


def test_occupied_outputs_are_named(clap_folder: str, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "captions.txt").write_text("a\n\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / ".busy.npy.parts").write_text("")
    (tmp_path / "names.npy.jsonl").mkdir()
    (tmp_path / "skips.npy.skipped.jsonl").mkdir()
    for out in ("file/x.npy", "folder.npy", "busy.npy", "names.npy", "skips.npy"):
        status = main(["embed", clap_folder, str(tmp_path / "captions.txt"), "--out", str(tmp_path / out)])
        message = capfd.readouterr().err.strip().splitlines()[-1]
        assert status != 0 and message.startswith("fastclap: ") and Path(out).stem in message, message


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": None}])
def test_arguments_of_embed(model: CLAP, tmp_path: Path, options: Any) -> None:
    (tmp_path / "captions.txt").write_text("a\n")
    with pytest.raises(ConfigError, match="batch_size is"):
        embed(model, gather([str(tmp_path / "captions.txt")]), tmp_path / "x.npy", **options)
    with pytest.raises(DataError, match="nothing to embed"):
        embed(model, [], tmp_path / "x.npy")


@settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_random_bytes_are_an_index_or_an_error(model: CLAP, tmp_path: Path, data: st.DataObject) -> None:
    out = tmp_path / data.draw(st.sampled_from(["x.npy", "x.parquet"]))
    if not out.exists():
        (tmp_path / "captions.txt").write_text("a\nb\n")
        embed(model, gather([str(tmp_path / "captions.txt")]), out)
    names = [path for path in sorted(tmp_path.glob("x.*")) if path.name.startswith(out.name)]
    victim = data.draw(st.sampled_from(names))
    whole = victim.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.just(b"")))
    try:
        victim.write_bytes(whole[:position] + change + (whole[position + len(change) :] if change else b""))
        index = load_index(out)
        assert len(index.names) == len(index.vectors) and index.vectors.isfinite().all()
    except FastclapError as error:
        assert out.name in str(error)
    finally:
        victim.write_bytes(whole)
