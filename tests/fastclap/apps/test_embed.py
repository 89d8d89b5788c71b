"""Embedding collections: every kind of input, both outputs, interruption at any point, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

from fastclap import CLAP
from fastclap.apps.embed import embed, fingerprint, gather, load_index
from fastclap.commands.main import main
from fastclap.errors import ConfigError, DataError, ModelError
from fastclap.files import locked
from fastclap.testing import assert_close_rel

Write = Callable[..., str]


def run_json(capfd: Any, *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capfd.readouterr().out)
    return result


def error_of(capfd: Any, *arguments: str) -> str:
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("fastclap: "), err
    return str(err)


@pytest.fixture
def collection(tmp_path: Path, write_clip: Write) -> Path:
    """A folder of clips with a broken and a silent one in the middle, and other files."""
    for number in range(6):
        write_clip(f"clips/{'sub/' * (number % 2)}{number}.wav", number)
    (tmp_path / "clips/2b.wav").write_bytes(b"RIFF, or what is left of it")
    (tmp_path / "clips/sub/notes.md").write_text("no audio")
    (tmp_path / "clips/.hidden.wav").write_bytes(b"")
    return tmp_path / "clips"


def test_a_folder_to_parquet_with_a_broken_clip_in_the_middle(
    clap_folder: str, collection: Path, tmp_path: Path, capfd: Any
) -> None:
    out = tmp_path / "x.parquet"
    arguments = ["embed", clap_folder, str(collection), "--out", str(out), "--batch-size", "2"]
    summary = run_json(capfd, *arguments)
    counts = {key: summary[key] for key in ("clips", "texts", "skipped", "dimension", "reused")}
    assert counts == {"clips": 6, "texts": 0, "skipped": 1, "dimension": 16, "reused": 0}
    assert summary["time"]["clips_per_second"] > 0
    table = pyarrow.parquet.read_table(out)
    assert table.column_names == ["path", "text", "origin", "vector"]
    names = [os.path.relpath(path, collection) for path in table["path"].to_pylist()]
    assert names == ["0.wav", "2.wav", "4.wav", "sub/1.wav", "sub/3.wav", "sub/5.wav"]
    expected = CLAP.from_pretrained(clap_folder).embed_audio(table["path"].to_pylist())
    assert_close_rel("vectors", expected, torch.tensor(table["vector"].to_pylist()), 1e-5)
    (skipped,) = [json.loads(line) for line in (tmp_path / "x.parquet.skipped.jsonl").read_text().splitlines()]
    assert skipped["path"].endswith("2b.wav") and "not readable as audio" in skipped["reason"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "x.parquet", "x.parquet.skipped.jsonl"]
    before = out.read_bytes()
    assert run_json(capfd, *arguments)["reused"] == 7, "the same command again computes nothing"
    assert out.read_bytes() == before


def test_manifests_packs_files_and_captions_to_npy(
    clap_folder: str, tmp_path: Path, write_clip: Write, capfd: Any
) -> None:
    paths = [write_clip(f"{number}.wav", number) for number in range(4)]
    rows = [
        {"audio": "1.wav", "text_description": "a"},
        {"audio": "1.wav", "text_description": "b"},
        {"audio": "0.wav"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "p.jsonl").write_text(json.dumps({"audio": "3.wav", "text_description": "c"}))
    (tmp_path / "texts.txt").write_text("A calm voice.\n\nAn angry voice.\nA calm voice.\n")
    assert main(["pack", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "pack"), "--workers", "0"]) == 0
    capfd.readouterr()
    out = tmp_path / "m.npy"
    inputs = [str(tmp_path / name) for name in ("m.jsonl", "pack", "texts.txt")]
    summary = run_json(capfd, "embed", clap_folder, *inputs, paths[0], paths[2], "--out", str(out))
    assert (summary["clips"], summary["texts"], summary["skipped"]) == (4, 3, 1)
    matrix = np.load(out)
    names = [json.loads(line) for line in (tmp_path / "m.npy.jsonl").read_text().splitlines()]
    assert [name.get("path") or name["text"] for name in names] == [
        paths[1],
        paths[0],
        paths[3],
        "A calm voice.",
        "An angry voice.",
        "A calm voice.",
        paths[2],
    ]
    assert [name["origin"] for name in names[:1] + names[4:5]] == [f"{inputs[0]}:1", f"{inputs[2]}:3"]
    model = CLAP.from_pretrained(clap_folder)
    audio = model.embed_audio([paths[1], paths[0], paths[3], paths[2]])
    text = model.embed_text(["A calm voice.", "An angry voice.", "A calm voice."])
    assert_close_rel("vectors", torch.cat([audio[:3], text, audio[3:]]), torch.from_numpy(matrix), 1e-5)
    skipped = json.loads((tmp_path / "m.npy.skipped.jsonl").read_text())
    assert skipped == {"text": "", "origin": f"{inputs[2]}:2", "reason": "blank line"}
    assert (tmp_path / "m.jsonl").read_text().startswith('{"audio"'), "names never overwrite a manifest"
    index = load_index(out)
    assert index.names == names and index.model == fingerprint(model)


def test_killed_in_the_middle_it_goes_on_where_it_was(
    clap_folder: str, collection: Path, tmp_path: Path, capfd: Any
) -> None:
    out = tmp_path / "x.npy"
    script = f"""
import os, signal
from fastclap import CLAP
from fastclap.apps.embed import embed, gather
def advance(done, total):
    if done >= 4:
        os.kill(os.getpid(), signal.SIGKILL)
embed(CLAP.from_pretrained({clap_folder!r}), gather([{str(collection)!r}]), {str(out)!r},
      batch_size=2, save_seconds=0, advance=advance)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert not out.exists()
    (tmp_path / ".x.npy.parts" / "part-000099.npz").write_bytes(b"half a")
    resumed = run_json(capfd, "embed", clap_folder, str(collection), "--out", str(out))
    assert 4 <= resumed["reused"] < 7 and resumed["clips"] == 6
    assert main(["embed", clap_folder, str(collection), "--out", str(tmp_path / "y.npy")]) == 0
    assert np.allclose(np.load(out), np.load(tmp_path / "y.npy"), atol=1e-6)
    assert not (tmp_path / ".x.npy.parts").exists()


def test_ctrl_c_and_a_full_disk_keep_what_was_computed(
    clap_folder: str, collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CLAP.from_pretrained(clap_folder)
    items = gather([str(collection)])
    calls = 0
    original = model.embed_batch

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(model, "embed_batch", interrupted)
    out = tmp_path / "x.parquet"
    with pytest.raises(KeyboardInterrupt):
        embed(model, items, out, batch_size=2, save_seconds=3600)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", "x")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("fastclap.apps.embed._write_parquet", full)
        embed(model, items, out, batch_size=2)
    assert not out.exists()
    assert calls == 4, "two batches before the interruption, of which nothing is computed again, and the last"
    finished = embed(model, items, out, batch_size=2)
    assert (finished["reused"], finished["clips"]) == (7, 6)


def test_files_added_since_join_and_changed_ones_are_embedded_again(
    clap_folder: str, tmp_path: Path, write_clip: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CLAP.from_pretrained(clap_folder)
    for number in range(3):
        write_clip(f"clips/{number}.wav", number)
    (tmp_path / "clips/1.wav").write_bytes(b"broken")
    out = tmp_path / "x.npy"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("fastclap.apps.embed._finish", lambda *_: (_ for _ in ()).throw(RuntimeError("stopped")))
        embed(model, gather([str(tmp_path / "clips")]), out)
    for name, number in (("0", 7), ("1", 1), ("3", 3)):  # another recording, a repaired one, a new one
        write_clip(f"clips/{name}.wav", number)
    items = gather([str(tmp_path / "clips")])
    summary = embed(model, items, out)
    assert (summary["clips"], summary["skipped"], summary["reused"]) == (4, 0, 1)
    expected = model.embed_audio([item.name for item in items])
    assert_close_rel("vectors", expected, torch.from_numpy(np.load(out)), 1e-5)
    assert not Path(f"{out}.skipped.jsonl").exists()


def test_what_is_refused(
    clap_folder: str, other_clap_folder: str, collection: Path, tmp_path: Path, write_clip: Write, capfd: Any
) -> None:
    clip, out = write_clip("one.wav", 1), str(tmp_path / "x.parquet")

    def refused(*inputs: str, out: str = out, model: str = clap_folder) -> str:
        return error_of(capfd, "embed", model, *inputs, "--out", out)

    assert "no such file or folder" in refused(str(tmp_path / "none"))
    (tmp_path / "x.doc").write_text("")
    assert "cannot tell what this is" in refused(str(tmp_path / "x.doc"))
    (tmp_path / "empty").mkdir()
    assert "no audio file in this folder" in refused(str(tmp_path / "empty"))
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt: the file is empty" in refused(str(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes("schön".encode("latin-1"))
    assert "latin.txt:1: not UTF-8" in refused(str(tmp_path / "latin.txt"))
    assert "nothing to embed" in refused()
    assert "name a .parquet or a .npy file" in refused(clip, out=str(tmp_path / "x.csv"))
    assert "--batch-size is 0" in error_of(capfd, "embed", clap_folder, clip, "--out", out, "--batch-size", "0")
    assert "no such model" in refused(clip, model=str(tmp_path / "none"))
    broken = str(collection / "2b.wav")
    assert "none of the 1 inputs can be used" in refused(broken)
    assert "2b.wav" in Path(f"{out}.skipped.jsonl").read_text()
    assert "with another model" in refused(broken, model=other_clap_folder), "the unfinished parts are of another model"
    assert main(["embed", clap_folder, clip, "--out", out]) == 0
    capfd.readouterr()
    assert "was not made of this model and these inputs" in refused(broken)
    assert "was not made of this model and these inputs" in refused(clip, model=other_clap_folder)


def test_bfloat16_is_near_and_is_not_mixed_with_float32(
    clap_folder: str, tmp_path: Path, write_clip: Write, capfd: Any
) -> None:
    clip, out, low = write_clip("one.wav", 1), tmp_path / "x.npy", tmp_path / "low.npy"
    (tmp_path / "captions.txt").write_text("a calm voice\n")
    inputs = (clip, str(tmp_path / "captions.txt"))
    run_json(capfd, "embed", clap_folder, *inputs, "--out", str(out))
    run_json(capfd, "embed", clap_folder, *inputs, "--out", str(low), "--precision", "bfloat16")
    exact, found = load_index(out), load_index(low)
    distance = (exact.vectors - found.vectors).norm(dim=1)
    assert 0 < float(distance.max()) < 0.05
    assert exact.model == found.model, "a query in float32 may be looked up in either"
    assert "these inputs in float32" in error_of(capfd, "embed", clap_folder, *inputs, "--out", str(low))
    again = run_json(capfd, "embed", clap_folder, *inputs, "--out", str(low), "--precision", "bfloat16")
    assert again["reused"] == 2


def test_parts_of_one_precision_are_not_continued_in_the_other(
    clap_folder: str, tmp_path: Path, write_clip: Write
) -> None:
    clap = CLAP.from_pretrained(clap_folder)
    items = gather([write_clip("one.wav", 1), write_clip("two.wav", 1)])

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(clap, items, tmp_path / "x.npy", batch_size=1, advance=interrupt, precision="bfloat16")
    with pytest.raises(DataError, match="another model or precision"):
        embed(clap, items, tmp_path / "x.npy")
    assert embed(clap, items, tmp_path / "x.npy", precision="bfloat16")["reused"] == 1
    with pytest.raises(ConfigError, match="precision is 'float16'"):
        embed(clap, items, tmp_path / "y.npy", precision="float16")  # type: ignore[arg-type]


def test_a_second_process_is_kept_out(clap_folder: str, tmp_path: Path, write_clip: Write, capfd: Any) -> None:
    clip, out = write_clip("one.wav", 1), tmp_path / "x.npy"
    parts = tmp_path / ".x.npy.parts"
    parts.mkdir()
    with locked(parts, "embedding into"):
        message = error_of(capfd, "embed", clap_folder, clip, "--out", str(out))
    assert ".x.npy.parts: another process is embedding into it" in message
    assert main(["embed", clap_folder, clip, "--out", str(out)]) == 0


def test_a_model_that_gives_nan_is_an_error(clap_folder: str, tmp_path: Path, write_clip: Write) -> None:
    model = CLAP.from_pretrained(clap_folder)
    with torch.no_grad():
        next(model.audio_projection.parameters()).fill_(float("nan"))
    with pytest.raises(ModelError, match=r"NaN or infinity for '.*one\.wav'"):
        embed(model, gather([write_clip("one.wav", 1)]), tmp_path / "x.npy")
    assert not (tmp_path / "x.npy").exists()


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    def refused(name: str) -> str:
        with pytest.raises(DataError) as error:
            load_index(tmp_path / name)
        return str(error.value)

    assert "no such file" in refused("none.npy")
    assert "is a folder; embed it first" in refused(".")
    assert "not a table of vectors" in refused("x.csv")
    (tmp_path / "half.parquet").write_bytes(b"PAR1")
    assert "truncated or damaged" in refused("half.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a"]}), tmp_path / "no.parquet")
    assert "no column 'vector'; the columns are path" in refused("no.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"vector": [[1.0], [1.0, 2.0]]}), tmp_path / "ragged.parquet")
    assert "of different lengths" in refused("ragged.parquet")
    np.save(tmp_path / "a.npy", np.ones((2, 3), np.float32))
    assert "a.npy.jsonl: missing" in refused("a.npy")
    (tmp_path / "a.npy.jsonl").write_text('{"path": "a"}\n')
    assert "1 names for 2 vectors" in refused("a.npy")
    np.save(tmp_path / "b.npy", np.array([[np.nan, 1.0]]))
    (tmp_path / "b.npy.jsonl").write_text('{"path": "a"}\n')
    assert "the vector of row 0 is not finite" in refused("b.npy")
