"""Manifests: every format gives the same rows, and every kind of bad row is named with file, row and remedy."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastclap.data import Manifest, Row, load_manifest
from fastclap.errors import DataError

ROWS: list[dict[str, Any]] = [
    {
        "audio": "a.wav",
        "text_description": ["A man shouts, loudly.", 'He says "no".'],
        "fine_description": "A man shouts; the pitch falls.",
        "intrinsic_tags": ["male", "low-pitched"],
        "situational_tags": ["angry"],
        "classification_tag": "angry",
        "duration": 1.5,
        "text_style_prompt": "angry man",
        "speaker": "s1",
    },
    {
        "audio": "b.wav",
        "text_description": ["A woman whispers."],
        "fine_description": None,
        "intrinsic_tags": ["female"],
        "situational_tags": [],
        "classification_tag": "whispered",
        "duration": None,
        "text_style_prompt": None,
        "speaker": "s2",
    },
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).touch()
    return tmp_path


def jsonl(folder: Path, *rows: Any, name: str = "m.jsonl") -> str:
    path = folder / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def error_of(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_manifest(*args, **kwargs)
    return str(caught.value)


def write_json(folder: Path) -> str:
    (folder / "m.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return str(folder / "m.json")


def write_csv(folder: Path, listed: Callable[[Any], str], name: str = "m.csv") -> str:
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if name.endswith("tsv") else ",")
        writer.writeheader()
        for row in ROWS:
            writer.writerow({key: listed(value) if isinstance(value, list) else value for key, value in row.items()})
    return str(folder / name)


def write_parquet(folder: Path) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "m.parquet")
    return str(folder / "m.parquet")


def write_datasets_folder(folder: Path) -> str:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
    for name in ("a.wav", "b.wav"):
        (folder / "saved" / name).touch()
    return str(folder / "saved")


def write_hub(folder: Path) -> str:
    (folder / "hub").mkdir()
    jsonl(folder / "hub", *ROWS, name="test.jsonl")
    return f"hf:{folder / 'hub'}:test"


FORMATS: dict[str, Callable[[Path], str]] = {
    "jsonl": lambda folder: jsonl(folder, *ROWS),
    "json": write_json,
    "csv with JSON lists": lambda folder: write_csv(folder, json.dumps),
    "csv with Python lists": lambda folder: write_csv(folder, str),
    "tsv": lambda folder: write_csv(folder, json.dumps, "m.tsv"),
    "parquet": write_parquet,
    "datasets folder": write_datasets_folder,
    "hub": write_hub,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
    source = FORMATS[name](folder)
    root = source if name == "datasets folder" else str(folder)
    manifest = load_manifest(source, audio_root=str(folder) if name == "hub" else None)
    first = 2 if "sv" in name else 1
    assert len(manifest) == 2
    assert manifest[0] == Row(
        audio=f"{root}/a.wav",
        captions=("A man shouts, loudly.", 'He says "no".'),
        fine_captions=("A man shouts; the pitch falls.",),
        tags={"intrinsic_tags": ("male", "low-pitched"), "situational_tags": ("angry",), "speaker": ("s1",)},
        classification_tag="angry",
        duration=1.5,
        style_prompt="angry man",
        origin=f"{source}:{first}",
        source=0,
    )
    assert manifest[1].captions == ("A woman whispers.",)
    assert manifest[1].fine_captions == ()
    assert manifest[1].tags == {"intrinsic_tags": ("female",), "speaker": ("s2",)}
    assert manifest[1].duration is None
    assert manifest[1].style_prompt is None
    assert manifest.columns == ("intrinsic_tags", "situational_tags", "speaker")


def test_a_manifest_is_a_sequence_and_survives_pickling(folder: Path) -> None:
    manifest = load_manifest(jsonl(folder, *ROWS))
    assert manifest[-1] == manifest[1]
    assert manifest[:] == list(manifest)
    with pytest.raises(IndexError, match="row 2 of a manifest with 2 rows"):
        manifest[2]
    copy: Manifest = pickle.loads(pickle.dumps(manifest))
    assert list(copy) == list(manifest)
    assert copy.durations.tolist()[0] == 1.5
    assert repr(copy) == repr(manifest)


def test_tags_of_every_type(folder: Path) -> None:
    row = {"audio": "a.wav", "text_description": "x", "age": 31, "pitch": 1.5, "native": True, "many": [1, "b"]}
    row |= {"empty": "", "none": None, "alignment": [{"word": "a", "start": 0.1}], "missing": float("nan")}
    manifest = load_manifest(jsonl(folder, row))
    assert manifest[0].tags == {"age": ("31",), "pitch": ("1.5",), "native": ("True",), "many": ("1", "b")}


def test_a_bracketed_cell_may_be_plain_text(folder: Path) -> None:
    (folder / "m.csv").write_text("audio,text_description\na.wav,[laughs]\n", encoding="utf-8")
    assert load_manifest(str(folder / "m.csv"))[0].captions == ("[laughs]",)


# Where the audio lies


def test_source_and_relative_path_in_both_layouts(tmp_path: Path) -> None:
    for path in ("flat/one.wav", "nested/corpus/two.wav"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    flat = {"source": "corpus", "relative_audio_path": "one.wav", "text_description": "x"}
    nested = {"source": "corpus", "relative_audio_path": "two.wav", "text_description": "x"}
    path = jsonl(tmp_path, flat)
    assert load_manifest(path, audio_root=str(tmp_path / "flat"))[0].audio == str(tmp_path / "flat/one.wav")
    path = jsonl(tmp_path, nested)
    assert load_manifest(path, audio_root=str(tmp_path / "nested"))[0].audio == str(tmp_path / "nested/corpus/two.wav")
    assert load_manifest(path, audio_root=str(tmp_path / "nested"))[0].tags["source"] == ("corpus",)


def test_one_missing_file_does_not_decide_the_layout(folder: Path) -> None:
    rows = [{"audio": f"{name}.wav", "text_description": "x"} for name in ("gone", "a", "b")]
    manifest = load_manifest(jsonl(folder, *rows))
    assert [row.audio for row in manifest] == [f"{folder}/{name}.wav" for name in ("gone", "a", "b")]


def test_a_rare_source_may_miss_its_file(folder: Path) -> None:
    rows = [{"audio": "a.wav", "source": "x", "text_description": "x"}]
    rows += [{"audio": "gone.wav", "source": "y", "text_description": "x"}]
    assert len(load_manifest(jsonl(folder, *rows))) == 2


def test_absolute_paths_need_no_root(folder: Path, tmp_path: Path) -> None:
    row = {"audio": str(folder / "a.wav"), "text_description": "x"}
    assert load_manifest(jsonl(tmp_path, row), audio_root="/nowhere")[0].audio == str(folder / "a.wav")


def test_wrong_audio_root(folder: Path) -> None:
    rows = [{"source": "ears", "audio": f"{i}.wav", "text_description": "x"} for i in range(20)]
    message = error_of(jsonl(folder, *rows), audio_root="/nowhere")
    assert "m.jsonl: none of the first 8 audio files of source 'ears' exists" in message
    assert "looked for /nowhere/0.wav or /nowhere/ears/0.wav; say which folder" in message
    assert "--data.audio-root" in message


def test_relative_hub_paths_need_a_root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
    assert "the path 'a.wav' is relative; give its folder with audio_root" in error_of(write_hub(folder))


def test_check_files_looks_for_every_file(folder: Path) -> None:
    rows = [{"audio": f"{name}.wav", "text_description": "x"} for name in ("a", "gone", "b")]
    load_manifest(jsonl(folder, *rows))
    message = error_of(jsonl(folder, *rows), check_files=True)
    assert message.startswith(f"{folder}/m.jsonl:2: no such audio file: {folder}/gone.wav; correct the path")


# Remapping and joining


def test_columns_are_remapped(folder: Path) -> None:
    row = {"wav": "a.wav", "label": "sad", "caption": "x", "seconds": 2, "text_description": "not this", "emotion": "y"}
    columns = {"audio": "wav", "text_description": "caption", "classification_tag": "label", "duration": "seconds"}
    manifest = load_manifest(jsonl(folder, row), columns=columns)
    assert manifest[0][1:6] == (("x",), (), {"emotion": ("y",)}, "sad", 2.0)


def test_remapping_leaves_manifests_with_our_names_alone(folder: Path) -> None:
    other = jsonl(folder, {"audio": "a.wav", "caption": "theirs"}, name="theirs.jsonl")
    ours = jsonl(folder, {"audio": "b.wav", "text_description": "ours"})
    manifest = load_manifest([other, ours], columns={"text_description": "caption"})
    assert [row.captions for row in manifest] == [("theirs",), ("ours",)]


def test_remapping_to_a_missing_column(folder: Path) -> None:
    row = {"audio": "a.wav", "text_description": "x", "emotion": "sad"}
    message = error_of(jsonl(folder, row), columns={"classification_tag": "emotoin"})
    assert "m.jsonl: no column 'emotoin' to use as 'classification_tag'" in message
    assert "the columns are audio, text_description, emotion; correct the remapping" in message
    assert "no column 'emotoin'" in error_of(jsonl(folder, *ROWS), columns={"classification_tag": "emotoin"})


def test_remapping_an_unknown_name(folder: Path) -> None:
    message = error_of(jsonl(folder, *ROWS), columns={"captions": "caption"})
    assert (
        "cannot remap 'captions': the columns with a meaning are audio, relative_audio_path, text_description"
        in message
    )


def test_sources_are_joined_in_order(folder: Path) -> None:
    second = jsonl(folder, {"audio": "b.wav", "text_description": "other"}, name="n.jsonl")
    manifest = load_manifest([jsonl(folder, *ROWS), second])
    assert [row.source for row in manifest] == [0, 0, 1]
    assert manifest.source_sizes == (2, 1)
    assert manifest[2].origin == f"{second}:1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mix": "shuffle"}, "it is either 'concat' or 'interleave'"),
        ({"probabilities": [0.5, 0.5]}, "only mean something with mix='interleave'"),
        ({"mix": "interleave", "probabilities": [1.0]}, "1 probabilities for 2 manifests"),
        ({"mix": "interleave", "probabilities": [0.5, 0.6]}, "must be positive and sum to 1"),
    ],
)
def test_wrong_mixtures(folder: Path, arguments: dict[str, Any], message: str) -> None:
    assert message in error_of([jsonl(folder, ROWS[0]), jsonl(folder, ROWS[1], name="n.jsonl")], **arguments)


# Bad rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_description": ""}, "column 'text_description' has an empty caption, ''; write one"),
        ({"text_description": ["fine", "  "]}, "column 'text_description' has an empty caption, ['fine', '  ']"),
        ({"text_description": []}, "column 'text_description' has an empty caption; write one or remove the row"),
        ({"text_description": None}, "column 'text_description' has an empty caption; write one or remove the row"),
        ({"text_description": 3}, "column 'text_description' is 3 (int); it must be a string or a list of strings"),
        ({"text_description": ["x", 3]}, "column 'text_description' is ['x', 3] (list); it must be a string or a list"),
        ({"fine_description": " "}, "column 'fine_description' has an empty caption"),
        ({"intrinsic_tags": {"a": 1}}, "column 'intrinsic_tags' is {'a': 1} (dict); it must be a string or a list of"),
        ({"classification_tag": ["a", "b"]}, "column 'classification_tag' is ['a', 'b'] (list); it must be one string"),
        ({"duration": "2.0"}, "column 'duration' is '2.0' (str); it must be a number of seconds"),
        ({"duration": True}, "column 'duration' is True (bool); it must be a number of seconds"),
        ({"duration": -1}, "column 'duration' is -1; a duration is a positive number of seconds"),
        ({"audio": ""}, "column 'audio' is empty; name the audio file or remove the row"),
        ({"audio": None}, "column 'audio' is empty; name the audio file or remove the row"),
        ({"audio": 7}, "column 'audio' is 7 (int); it must be the path of an audio file"),
        ({"audio": {"bytes": "x", "path": None}}, "column 'audio' holds audio bytes; write the clips to files"),
    ],
)
def test_bad_value(folder: Path, change: dict[str, Any], message: str) -> None:
    path = jsonl(folder, ROWS[0], {**ROWS[1], **change})
    assert f"{path}:2: {message}" in error_of(path)


def test_bad_number_in_csv(folder: Path) -> None:
    (folder / "m.csv").write_text("audio,text_description,duration\na.wav,x,1.5\nb.wav,y,long\n", encoding="utf-8")
    message = error_of(str(folder / "m.csv"))
    assert "m.csv:3: column 'duration' is 'long' (str); it must be a number of seconds" in message


@pytest.mark.parametrize("column", ["audio", "text_description"])
def test_missing_column(folder: Path, column: str) -> None:
    rows = [{key: value for key, value in row.items() if key != column} for row in ROWS]
    message = error_of(jsonl(folder, *rows))
    wanted = "'audio' or 'relative_audio_path'" if column == "audio" else "'text_description'"
    assert f"m.jsonl: missing column {wanted}; the columns are " in message
    assert "fine_description, intrinsic_tags" in message
    assert "name the one you have with columns={" in message
    assert message.count("missing column") == 1


def test_column_missing_in_one_row(folder: Path) -> None:
    message = error_of(jsonl(folder, ROWS[0], {"audio": "b.wav"}))
    assert "m.jsonl:2: missing column 'text_description'; the columns are audio, " in message


def test_captions_may_be_absent_when_not_required(folder: Path) -> None:
    manifest = load_manifest(jsonl(folder, {"audio": "a.wav", "classification_tag": "sad"}), require_captions=False)
    assert manifest[0].captions == ()
    assert manifest[0].classification_tag == "sad"


def test_duplicate_rows(folder: Path) -> None:
    other_caption = {**ROWS[0], "text_description": "another"}
    assert len(load_manifest(jsonl(folder, ROWS[0], other_caption))) == 2
    path = jsonl(folder, ROWS[0], ROWS[1], ROWS[0])
    assert f"{path}:3: duplicate of {path}:1 (same audio, captions and tags); remove one of them" in error_of(path)


def test_duplicates_across_manifests(folder: Path) -> None:
    first, second = jsonl(folder, ROWS[0]), jsonl(folder, ROWS[0], name="n.jsonl")
    assert f"{second}:1: duplicate of {first}:1" in error_of([first, second])


def test_many_errors_are_listed_together_and_counted(folder: Path) -> None:
    rows = [{"audio": "a.wav", "text_description": index} for index in range(25)]
    lines = error_of(jsonl(folder, *rows)).splitlines()
    assert len(lines) == 11
    assert "m.jsonl:1: column 'text_description' is 0 (int)" in lines[0]
    assert "m.jsonl:10: column 'text_description' is 9 (int)" in lines[9]
    assert lines[10] == "... and 15 more"


def test_malformed_json_lines(folder: Path) -> None:
    path = jsonl(folder, ROWS[0], '{"audio": "b.wav", ', "", "[1, 2]")
    message = error_of(path)
    assert f"{path}:2: not valid JSON (" in message
    assert "correct the line" in message
    assert f"{path}:4: holds '[1, 2]', not a JSON object; write one object a line" in message


def test_json_file_that_is_json_lines(folder: Path) -> None:
    message = error_of(jsonl(folder, *ROWS, name="m.json"))
    assert "m.json:2: not valid JSON (Extra data at column 1); one object a line is named .jsonl" in message


def test_json_file_that_is_an_object(folder: Path) -> None:
    assert "m.json: holds a dict; a .json manifest is an array of objects" in error_of(jsonl(folder, {}, name="m.json"))


def test_csv_row_of_another_width(folder: Path) -> None:
    (folder / "m.csv").write_text("audio,text_description\na.wav,low, and slow\n", encoding="utf-8")
    assert "m.csv:2: 3 cells under a header of 2; quote cells that contain the separator" in error_of(
        str(folder / "m.csv")
    )


def test_csv_with_a_repeated_column(folder: Path) -> None:
    (folder / "m.csv").write_text("audio,audio\na.wav,b.wav\n", encoding="utf-8")
    assert "m.csv:1: a column name occurs twice in the header" in error_of(str(folder / "m.csv"))


@pytest.mark.parametrize("name", ["m.jsonl", "m.json", "m.csv"])
def test_empty_manifest(folder: Path, name: str) -> None:
    (folder / name).write_text("[]" if name == "m.json" else "")
    assert f"{name}: the manifest is empty; it needs at least one row" in error_of(str(folder / name))


def test_manifest_that_is_not_there(folder: Path) -> None:
    assert "gone.jsonl: no such manifest; check the path" in error_of(str(folder / "gone.jsonl"))
    assert "no manifest given" in error_of([])


def test_manifest_of_unknown_type(folder: Path) -> None:
    (folder / "m.xlsx").touch()
    assert "m.xlsx: unknown manifest type '.xlsx'; use one of .jsonl, .json, .csv" in error_of(str(folder / "m.xlsx"))


def test_broken_parquet(folder: Path) -> None:
    (folder / "m.parquet").write_bytes(b"PAR1 this is none")
    assert "m.parquet: not a readable Parquet file" in error_of(str(folder / "m.parquet"))


def test_text_that_is_not_utf8(folder: Path) -> None:
    (folder / "m.jsonl").write_bytes('{"audio": "a.wav", "text_description": "schön"}\n'.encode("latin-1"))
    assert "m.jsonl: not UTF-8 text" in error_of(str(folder / "m.jsonl"))


def test_byte_order_mark_is_ignored(folder: Path) -> None:
    (folder / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\r\n")
    assert load_manifest(str(folder / "m.jsonl"))[0].duration == 1.5


def test_folder_that_is_no_data_set(folder: Path) -> None:
    assert "not a folder of `fastclap pack` or datasets.save_to_disk; name a manifest file" in error_of(str(folder))


def test_data_set_with_several_splits(folder: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(folder / "saved"))
    assert f"holds several splits; name one, such as {folder}/saved/train" in error_of(str(folder / "saved"))


def test_hub_name_that_does_not_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
    name = write_hub(folder).removesuffix(":test")
    assert f"{name}: datasets could not load it: " in error_of(name)
