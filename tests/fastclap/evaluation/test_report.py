"""The page is complete in itself, shows what it was given, and is never seen half-written."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclap.errors import DataError
from fastclap.evaluation import classification, retrieval, write_report
from fastclap.evaluation.report import (
    MAX_LABELLED,
    MAX_MAPPED,
    _run_details,
    confusion_matrix,
    embedding_map,
    read_metrics,
    training_curves,
)
from fastclap.files import write_atomic

PNG = b"\x89PNG\r\n\x1a\n"


def results(columns: tuple[str, ...] = ("sex",), classes: int = 2, clips: int = 30) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    audio, text = (torch.randn(clips, 8, generator=generator) for _ in range(2))
    names = [f"class {i}" for i in range(classes)]
    labels = [names[i % max(1, classes - 1)] for i in range(clips)]  # the last class has no clip
    return {
        "clips": clips,
        "skipped": [],
        "retrieval": {"global": retrieval(audio, text, range(clips), range(clips))},
        "classification": {column: classification(audio, text[:classes], labels, names) for column in columns},
    }


def write_run(folder: Path, steps: int, validations: int) -> None:
    folder.mkdir()
    records = [
        {"kind": "train", "step": step, "loss": math.log(step), "logit_scale": 14.3, "learning_rate": 1e-3 / step}
        for step in range(1, steps + 1)
    ]
    records[-1]["time"] = {"clips_per_second": 123.4}
    records += [{"kind": "valid", "step": step * 2, **results()} for step in range(1, validations + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text("seed: 7 # <b>\n")
    (folder / "environment.json").write_text(
        json.dumps({"torch": "2.x", "gpus": ["one", "two"], "git": {"dirty": True}})
    )


def pictures(page: str) -> list[bytes]:
    return [base64.b64decode(text) for text in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


@pytest.mark.parametrize(("steps", "validations"), [(60, 3), (1, 1), (3, 0)])
def test_report_of_a_run(tmp_path: Path, steps: int, validations: int) -> None:
    write_run(tmp_path / "run", steps, validations)
    path = write_report(tmp_path / "out", run=tmp_path / "run")
    page = path.read_text()
    expected = ["confusion-sex", "recall", "training"] if validations else ["training"]
    assert sorted(item.stem for item in path.parent.glob("*.png")) == expected
    inlined = pictures(page)
    assert all(picture.startswith(PNG) for picture in inlined)
    assert sorted(inlined) == sorted(item.read_bytes() for item in path.parent.glob("*.png"))
    assert "seed: 7 # &lt;b&gt;" in page
    assert "git · dirty" in page and "one, two" in page
    assert "123.4" in page
    data = json.loads((path.parent / "report.json").read_text())
    assert data["run"]["steps"] == steps
    assert data.get("step") == (validations * 2 or None), "the figures are those of the last validation"
    assert sorted(os.listdir(path.parent)) == sorted(
        [*(f"{name}.png" for name in expected), "report.html", "report.json"]
    )


def test_page_refers_to_nothing_outside_and_escapes_what_it_shows(tmp_path: Path) -> None:
    shown = results(columns=("a/b <i>",), classes=4)
    shown["skipped"] = [{"row": 3, "path": "<script>x</script>.wav", "reason": "broken"}] * 25
    shown["model"] = "model & <co>"
    page = write_report(tmp_path, results=shown).read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page
    assert "<script" not in page and "<i>" not in page
    assert "&lt;script&gt;x&lt;/script&gt;.wav" in page and "model &amp; &lt;co&gt;" in page
    assert "and 5 more" in page
    assert (tmp_path / "confusion-a_b_i_.png").exists()


def test_figures_are_shown_with_their_chance_level(tmp_path: Path) -> None:
    shown = results(classes=5)
    page = write_report(tmp_path, results=shown).read_text()
    sex, to_text = shown["classification"]["sex"], shown["retrieval"]["global"]["audio_to_text"]
    assert f"{100 * sex['uar']:.1f} <small>chance 20.0</small>" in page
    assert f"{100 * sex['accuracy']:.1f} <small>majority {100 * sex['majority_accuracy']:.1f}</small>" in page
    assert f"{100 * to_text['R@10']:.1f} <small>33.3</small>" in page


def test_many_classes_and_one_class_can_be_drawn(tmp_path: Path) -> None:
    for classes in (1, 45):
        folder = tmp_path / str(classes)
        write_report(folder, results=results(classes=classes, clips=46))
        assert (folder / "confusion-sex.png").read_bytes().startswith(PNG)


def embeddings(clips: int, **columns: int) -> dict[str, Any]:
    """A map as `evaluate` returns it, with so many classes in each column."""
    points = torch.randn(clips, 2).tolist()
    return {
        "rows": list(range(clips)),
        "audio": points,
        "variance": [0.4, 0.25],
        "columns": {
            column: {
                "classes": [f"class {i}" for i in range(classes)],
                "class_of": [None if i % 5 == 0 else i % classes for i in range(clips)],
                "prompts": torch.randn(classes, 2).tolist(),
            }
            for column, classes in columns.items()
        },
    }


def test_the_map_of_the_embeddings_is_drawn_for_every_classified_column(tmp_path: Path) -> None:
    shown = {**results(("sex", "style"), classes=3), "embeddings": embeddings(30, sex=2, style=45)}
    page = write_report(tmp_path, results=shown).read_text()
    names = ["confusion-sex", "confusion-style", "embeddings-sex", "embeddings-style", "recall"]
    assert sorted(item.stem for item in tmp_path.glob("*.png")) == names
    assert sorted(pictures(page)) == sorted(item.read_bytes() for item in tmp_path.glob("*.png"))
    assert "<h2>Embeddings</h2>" in page and 'alt="embeddings-sex"' in page and "each on their own mean" in page
    assert json.loads((tmp_path / "report.json").read_text())["embeddings"] == shown["embeddings"]


def test_without_classes_the_map_has_one_colour(tmp_path: Path) -> None:
    page = write_report(tmp_path, results={**results(()), "embeddings": embeddings(600)}).read_text()
    assert sorted(item.stem for item in tmp_path.glob("*.png")) == ["embeddings", "recall"]
    assert 'alt="embeddings"' in page
    figure = embedding_map(embeddings(600))
    (axes,) = figure.axes
    assert len(axes.collections) == 1 and axes.get_legend() is None
    assert axes.get_xlabel() == "first principal component (40 % of the variance)"


def test_a_prompt_has_the_colour_and_a_place_of_its_own(tmp_path: Path) -> None:
    given = embeddings(40, sex=2)
    (axes,) = embedding_map(given, "sex").axes
    unknown, *clips = axes.collections[:3]
    stars = axes.collections[3:]
    assert [len(points.get_offsets()) for points in (unknown, *clips)] == [8, 16, 16]
    for star, of_class, place in zip(stars, clips, given["columns"]["sex"]["prompts"], strict=True):
        assert star.get_facecolor()[0, :3].tolist() == of_class.get_facecolor()[0, :3].tolist()
        assert star.get_offsets()[0].tolist() == pytest.approx(place)
    assert [text.get_text() for text in axes.texts] == ["class 0", "class 1"]


def test_a_torn_last_line_is_left_out_and_another_is_an_error(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 4, 0)
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text()
    metrics.write_text(lines + '{"kind": "train", "st')
    assert "training steps</td><td>4<" in write_report(tmp_path / "out", run=tmp_path / "run").read_text()
    metrics.write_text("7\n" + lines)
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: not a record"):
        write_report(tmp_path / "out", run=tmp_path / "run")
    with pytest.raises(DataError, match=r"nowhere/metrics\.jsonl: cannot be read"):
        write_report(tmp_path / "out", run=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="needs results, a run folder, or both"):
        write_report(tmp_path / "out")


ODD = (
    "[laughing]",
    "[/laugh]",
    "$100_$",
    "開心",
    "غاضب",
    "😀",
    "\udcff",
    "a\nb",
    "\x1b[31m",
    "_hidden",
    "{body}",
    "x" * 500,
)


def test_names_of_any_kind_are_drawn_and_escaped(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    audio, text = torch.randn(24, 8, generator=generator), torch.randn(len(ODD), 8, generator=generator)
    figures = classification(audio, text, [ODD[i % len(ODD)] for i in range(24)], list(ODD))
    shown = {"model": "{body}", "data": ["\udcff"], "classification": {"情绪": figures, "年龄": figures}}
    shown["skipped"] = [{"row": 0, "path": "\udcff\x1b.wav", "reason": "<b>"}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = write_report(tmp_path, results=shown).read_text(encoding="utf-8")
    assert sorted(item.name for item in tmp_path.glob("*.png")) == ["confusion-_-2.png", "confusion-_.png"]
    assert "class=problem" not in page and page.count("<h1>") == 1 and "<b>" not in page and "\x1b" not in page
    assert r"\udcff\x1b.wav" in page and "<td>情绪</td>" in page
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert data["classification"]["情绪"]["classes"][:6] == list(ODD[:6]) and data["data"] == [r"\udcff"]


def test_many_and_long_classes_fit_on_a_map() -> None:
    given = embeddings(40, sex=500)
    given["columns"]["sex"]["classes"][:2] = ["_hidden", "x" * 500]
    figure = embedding_map(given, "sex")
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend[:2] == ["no, several or other classes", " _hidden"] and len(legend) == MAX_MAPPED + 1
    assert len(legend[2]) == 40 and figure.get_figwidth() < 40


def test_a_large_confusion_matrix_names_some_of_its_classes() -> None:
    names = [f"class {i}" for i in range(200)]
    audio = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    figure = confusion_matrix("speaker", classification(audio, audio, names, names))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:2] == ["class 0 (1)", "class 3 (1)"] and len(labels) <= MAX_LABELLED


DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    ("name", "content", "noted"),
    [
        ("environment.json", b"{", "environment.json cannot be shown"),
        ("environment.json", b"\xff", "not UTF-8"),
        ("environment.json", f'{{"a": {DEEP}}}'.encode(), "environment.json cannot be shown"),
        ("environment.json", b'{"a": 1' + b"0" * 5000 + b"}", "an integer of more than"),
        ("environment.json", b'{"a": "\\ud800"}', "half of a character"),
        ("config.yaml", b"seed: \xff", "config.yaml:1: not UTF-8"),
        ("metrics.jsonl", b'{"kind": "valid", "step": 1, "retrieval": 5}', "retrieval cannot be shown"),
        ("metrics.jsonl", b'{"kind": "valid", "step": 1, "classification": {"sex": []}}', "confusion-sex cannot be"),
        ("metrics.jsonl", b'{"kind": "valid", "step": 1, "embeddings": "x"}', "the picture embeddings cannot be"),
        ("metrics.jsonl", b'{"kind": "valid", "step": 1, "skipped": 7}', "the skipped clips cannot be shown"),
        ("metrics.jsonl", b'{"kind": "valid", "step": 1, "data": 7}', "the summary cannot be shown"),
    ],
)
def test_what_is_damaged_is_a_note_on_the_page(name: str, content: bytes, noted: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / name).write_bytes(content)
    page = write_report(tmp_path / "out", run=tmp_path).read_text(encoding="utf-8")
    assert noted in " ".join(re.findall("<p class=problem>(.*?)</p>", page))
    json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        *('{"kind": 3, "step": 1}', '{"kind": "train", "step": "1"}', '{"kind": "train", "step": 1e9}', "[]", "null"),
        *('{"kind": "valid", "step": -1}', f'{{"kind": "train", "step": 1{"0" * 30}}}', '{"step": 1}', "\x00", "{"),
        *('{"kind": "train", "step": 1, "x": "\\ud800"}', DEEP + "]"),
    ],
)
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + '\n{"kind": "train", "step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: .*; remove the line"):
        write_report(tmp_path / "out", run=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"text"', "null", "[1]", "{}", "1" + "0" * 400, "true"])
def test_training_values_of_any_kind_can_be_read(value: str, tmp_path: Path) -> None:
    line = f'{{"kind": "train", "step": 1, "loss": {value}, "logit_scale": {value}, "time": {value}}}\n'
    (tmp_path / "metrics.jsonl").write_text(line)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    notes: list[str] = []
    details = _run_details(tmp_path, [record], notes)
    assert details["loss"] == (1.0 if value == "true" else None) and notes == []
    assert training_curves([record], []).axes[0].get_title(loc="left") == "training loss"


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 2, 0)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 3, "loss": NaN}\n')
    write_report(tmp_path / "out", run=tmp_path / "run")
    assert "NaN" not in (tmp_path / "out" / "report.json").read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["run"]["loss"] is None


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_atomic(path, b"old")

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, no_space)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report.json"]
