"""Manifests: every format gives the same rows, and every kind of bad row is named with file, row and remedy."""

from __future__ import annotations

import csv
import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclap.data import Manifest, Row, check_column, load_manifest
from fastclap.data.rows import MAX_TEXT
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
    assert "m.json: not valid JSON (Extra data at line 2, column 1); one object a line is named .jsonl" in message


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


@pytest.mark.parametrize("name", ["m.jsonl", "m.json", "m.csv", "m.tsv"])
def test_text_that_is_not_utf8(folder: Path, name: str) -> None:
    (folder / name).write_bytes("\n\n[sch\u00f6n, \u20ac]\n".encode("utf-8")[:9] + b"\xf6n\n")
    assert f"{name}:3: not UTF-8 text (byte 0x" in error_of(str(folder / name))


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


# Malice and accidents


def table(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    """The rows as a file of the type that the name says; Parquet only of text."""
    if name.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    elif name.endswith("csv"):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith("jsonl"):
        jsonl(folder, *rows, name=name)
    else:
        (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("name", ["m.jsonl", "m.json", "m.csv", "m.parquet"])
@pytest.mark.parametrize(
    "caption", ["a\u2028b\u0085c\x0b\x0c\x1c\u2029d", "👩‍👩‍👧 اَلْعَرَبِيَّةُ", "[laughing] [/laugh] $100_$", "a\r\nb\nc"]
)
def test_captions_of_every_script_and_separator(folder: Path, name: str, caption: str) -> None:
    rows = [{"audio": f"{wave}.wav", "text_description": text} for wave, text in zip("ab", ("x", caption), strict=True)]
    manifest = load_manifest(table(folder, name, rows))
    assert [row.captions for row in manifest] == [("x",), (caption,)]


def test_an_array_names_the_row_of_half_a_character(folder: Path) -> None:
    path = folder / "m.json"
    path.write_text('[{"audio": "a.wav"}, {"audio": "b.wav", "tags": ["half \\ud83d"]}]')
    with pytest.raises(DataError, match=r"m\.json: holds 'half \\ud83d' in item 2, 'tags', item 1, half of"):
        load_manifest(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "JSON nested too deeply to be read; correct the line"),
        ('{"audio": ' + "[" * 5000 + "]" * 5000 + "}", "JSON nested too deeply"),
        ('{"text_description": "x", "audio": ' + "[" * 500 + "]" * 500 + "}", "column 'audio' is [[[[[..."),
        ('{"duration": ' + "7" * 5000 + "}", "JSON with an integer of more than 4300 digits"),
        ('{"audio": "b.wav", "text_description": "x", "duration": ' + "7" * 4000 + "}", "column 'duration' is 7777"),
        ('{"audio": "b.wav", "text_description": "x", "duration": 1e300}', "'duration' is 1e+300; a duration is a pos"),
        ('{"audio": "b.wav", "text_description": "half \\ud83d"}', "'half \\ud83d' in 'text_description', half of"),
        ('{"audio": "\\udcff.wav", "text_description": "x"}', "'\\udcff.wav' in 'audio', half of a character"),
        ('{"audio": "b.wav", "text_description": "x", "tag\\ud83d": "y"}', "'tag\\ud83d', half of a character"),
        ('{"audio": "b\\u0000.wav", "text_description": "x"}', "a zero byte in the path '"),
        ('{"audio": "b.wav", "text_description": "' + "x" * 131_073 + '"}', "a caption of 131073 characters; sh"),
        ('{"audio": "b.wav", "text_description": "x", "t": "' + "x" * 131_073 + '"}', "a tag of 't' of 131073 chara"),
        ('{"audio": "' + "x" * 131_073 + '", "text_description": "x"}', "a path of 131"),
        ("\x00\x00", "not valid JSON ("),
    ],
)  # fmt: skip
def test_lines_that_nobody_wrote_in_good_faith(folder: Path, line: str, message: str) -> None:
    path = jsonl(folder, ROWS[0], line)
    found = error_of(path)
    assert found.startswith(f"{path}:2: ")
    assert message in found
    assert len(found) < 400 and found.isprintable()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("x" * 131_073, "m.csv:3: not valid CSV (field larger than field limit (131072)); a quote that is not closed"),
        ('"' + "x" * 200_000, "m.csv:3: not valid CSV (field larger than field limit (131072)); a quote that is not"),
        ('["half \\ud83d"]', r"m.csv:3: half of a character ('\ud83d', a lone surrogate) in the caption"),
    ],
)
def test_cells_that_nobody_wrote_in_good_faith(folder: Path, cell: str, message: str) -> None:
    (folder / "m.csv").write_text(f"audio,text_description\na.wav,x\nb.wav,{cell}\n")
    assert message in error_of(str(folder / "m.csv"))


@pytest.mark.parametrize(
    "cell",
    ["[" * 50_000 + "]", "[" + "-" * 50_000 + "1]", "[" + "7" * 5000 + "]", "[[[[[]]]]]", "[nan]", "[1,]", "[\x00]"],
)
def test_cells_in_brackets_that_are_no_lists_stay_text(folder: Path, cell: str) -> None:
    (folder / "m.csv").write_text(f'audio,text_description,other\na.wav,x,"{cell}"\n')
    assert load_manifest(str(folder / "m.csv"))[0].tags_of("other") in ((cell,), ("1",), ())


def test_a_cell_with_an_integer_that_python_does_not_write(folder: Path) -> None:
    (folder / "m.csv").write_text(f"audio,text_description\na.wav,[0x{'f' * 6000}]\n")
    assert "column 'text_description' is list(...) (list); it must be a string or" in error_of(str(folder / "m.csv"))


def test_parquet_that_is_not_text(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    bad = pyarrow.array([b"x", b"y\xff"]).view(pyarrow.string())
    both = pyarrow.table({"audio": ["a.wav", "b.wav"], "text_description": bad})
    pyarrow.parquet.write_table(both, folder / "m.parquet")
    message = "m.parquet:2: column 'text_description' cannot be read (text that is not UTF-8); correct or remove it"
    assert message in error_of(str(folder / "m.parquet"))
    times = pyarrow.array([1, 1 << 60], pyarrow.timestamp("ms"))
    odd = pyarrow.table({"audio": ["a.wav", "b.wav"], "text_description": ["x", "y"], "when": times})
    pyarrow.parquet.write_table(odd, folder / "m.parquet")
    assert "m.parquet:2: column 'when' cannot be read (" in error_of(str(folder / "m.parquet"))
    twice = pyarrow.table([pyarrow.array(["a.wav"])] * 2, names=["audio", "audio"])
    pyarrow.parquet.write_table(twice, folder / "m.parquet")
    assert "m.parquet: several columns have the name 'audio'; rename one" in error_of(str(folder / "m.parquet"))


def test_parquet_with_columns_of_every_type(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {
        "audio": pyarrow.array(["a.wav"]).dictionary_encode(),
        "text_description": pyarrow.array([["x", "y"]], pyarrow.large_list(pyarrow.large_string())),
        "day": pyarrow.array([3], pyarrow.date32()),
        "map": pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int8())),
        "blob": pyarrow.array([b"\xff"]),
        "deep": pyarrow.array([{"a": [1]}]),
        "speaker": pyarrow.array([7], pyarrow.uint64()),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "m.parquet")
    (row,) = load_manifest(str(folder / "m.parquet"))
    assert (row.captions, row.tags) == (("x", "y"), {"speaker": ("7",)})


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.97])
def test_parquet_that_is_damaged(folder: Path, share: float) -> None:
    path = Path(table(folder, "m.parquet", [{"audio": "a.wav", "text_description": f"x {n}"} for n in range(500)]))
    data = bytearray(path.read_bytes())
    at = int(len(data) * share)
    data[at : at + 40] = bytes(range(200, 240))
    path.write_bytes(data)
    assert error_of(str(path)).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["m.jsonl", "m.json", "m.csv", "m.parquet"])
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a socket"])
def test_only_files_are_tables(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "a pipe":
            os.mkfifo(path)
        elif kind == "a device":
            path.symlink_to("/dev/zero")
        else:
            server.bind(str(path))
        assert error_of(str(path)) == f"{path}: is {kind}, not a file; write the table to a file and name that"


def test_a_line_without_an_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastclap.data.manifest._MAX_LINE", 1000)
    path = jsonl(folder, ROWS[0], "x" * 2000)
    assert f"{path}:2: a line of more than 1000 characters; write a row a line" in error_of(path)


def test_a_folder_of_datasets_that_is_damaged(folder: Path) -> None:
    path = Path(write_datasets_folder(folder))
    (arrow,) = path.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert f"{path}: datasets could not load it" in error_of(str(path))


def test_sources_may_be_paths(folder: Path) -> None:
    path = Path(jsonl(folder, *ROWS))
    assert list(load_manifest(path, audio_root=folder)) == list(load_manifest([path])) == list(load_manifest(str(path)))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
COLUMNS = st.sampled_from([*ROWS[0], "relative_audio_path", "source", "other"])


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.dictionaries(COLUMNS, VALUES, max_size=6), max_size=3))
def test_any_table_is_rows_or_an_error_that_names_it(tmp_path_factory: Any, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = jsonl(folder, {"audio": "/dev/null", "text_description": "x"}, *rows, name="any.jsonl")
    try:
        manifest = load_manifest(path)
    except DataError as error:
        assert all(line.startswith((path, "... and")) for line in str(error).split("\n"))
        assert len(str(error)) < 4000
    else:
        assert all(row.captions and "".join(row.captions).encode() for row in manifest)
        assert manifest.fingerprint()


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet"]))
def test_any_bytes_are_rows_or_an_error_that_names_them(tmp_path_factory: Any, data: bytes, kind: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{kind}"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_manifest(str(path))
    assert str(caught.value).startswith(str(path))


# What training sees, in a few digits


def test_the_fingerprint_moves_with_the_data(tmp_path: Path) -> None:
    found = set()
    for root, name in (("here", "m.jsonl"), ("there", "n.jsonl"), ("elsewhere", "m.csv")):
        (tmp_path / root / "speaker").mkdir(parents=True)
        for wave in ("a.wav", "b.wav"):
            (tmp_path / root / "speaker" / wave).touch()
        rows = [{"audio": f"speaker/{wave}.wav", "text_description": "x", "speaker": "s"} for wave in "ab"]
        found.add(load_manifest(table(tmp_path / root, name, rows)).fingerprint())
    assert len(found) == 1


def test_the_fingerprint_tells_changes_apart(folder: Path) -> None:
    rows = list(load_manifest(jsonl(folder, *ROWS)))
    first = rows[0]
    others = [
        rows,
        rows[::-1],
        rows[:1],
        [first._replace(captions=first.captions[::-1]), rows[1]],
        [first._replace(captions=(), fine_captions=first.captions), rows[1]],
        [first._replace(fine_captions=()), rows[1]],
        [first._replace(tags={}), rows[1]],
        [first._replace(tags={**first.tags, "speaker": ("s3",)}), rows[1]],
        [first._replace(classification_tag=None), rows[1]],
        [first._replace(duration=1.6), rows[1]],
        [first._replace(audio=str(folder / "c.wav")), rows[1]],
        [first._replace(audio=str(folder / "deeper" / "a.wav")), rows[1]],
    ]
    prints = [Manifest(each).fingerprint() for each in others]
    two = [rows[0], rows[1]._replace(source=1)]
    prints += [Manifest(two, source_names=("a", "b"), mix=mix).fingerprint() for mix in ("concat", "interleave")]
    assert len(set(prints)) == len(prints)
    assert all(len(each) == 32 and int(each, 16) >= 0 for each in prints)
    same = [row._replace(origin="other:1", style_prompt="not seen by training") for row in rows]
    assert Manifest(same).fingerprint() == prints[0]
    assert Manifest([]).fingerprint() == Manifest([]).fingerprint()


def test_unknown_tag_columns_are_named(folder: Path) -> None:
    manifest = load_manifest(jsonl(folder, *ROWS))
    for column in (None, "speaker", "classification_tag", "intrinsic_tags"):
        check_column(manifest, column, "--data.tag-column")
    with pytest.raises(DataError) as caught:
        check_column(manifest, "intrinsic_tag", "--data.tag-column")
    assert str(caught.value) == (
        f"--data.tag-column intrinsic_tag: no row of {folder}/m.jsonl has a tag in it; the columns of tags are: "
        "intrinsic_tags, situational_tags, speaker, classification_tag; do you mean intrinsic_tags?"
    )
    bare = load_manifest(jsonl(folder, {"audio": "a.wav", "text_description": "x"}))
    with pytest.raises(DataError, match=r"^--valid\.classify classification_tag: .* of tags are: none$"):
        check_column(bare, "classification_tag", "--valid.classify")


def test_the_longest_text_is_that_of_csv() -> None:
    assert csv.field_size_limit() == MAX_TEXT
