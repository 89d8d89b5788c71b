"""Public datasets become manifests: made-up folders of each layout, through the real command line."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from fastclap.commands.main import main
from fastclap.commands.prepare import Flags
from fastclap.data import load_manifest
from fastclap.prepare import DATASETS

Rows = list[dict[str, Any]]


def audio(path: Path, seconds: float = 0.5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.1, int(16000 * seconds))
    soundfile.write(path, noise, 16000, subtype="PCM_16")


def table(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def lines(path: str | Path) -> Rows:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prepare(tmp_path: Path, capfd: Any) -> Callable[..., tuple[Rows, dict[str, Any]]]:
    """Runs the command on tmp_path/data and returns the rows and the summary; the rows must make a manifest."""

    def run(dataset: str, *flags: str) -> tuple[Rows, dict[str, Any]]:
        out = tmp_path / "manifests" / "all.jsonl"
        capfd.readouterr()
        arguments = ["prepare", dataset, "--root", str(tmp_path / "data"), "--out", str(out), *flags, "--json"]
        assert main(arguments) == 0, capfd.readouterr().err
        summary = json.loads(capfd.readouterr().out)
        assert summary["files"] == [str(out)]
        manifest = load_manifest(str(out), check_files=True)
        assert len(manifest) == summary["rows"]
        assert summary["rows"] == sum(split["rows"] for split in summary["splits"].values())
        assert summary["hours"] * 3600 == pytest.approx(float(manifest.durations.sum()), abs=0.5)
        first = out.read_bytes()
        assert main(arguments) == 0
        capfd.readouterr()
        assert out.read_bytes() == first  # the same dataset gives the same manifest
        return lines(out), summary

    return run


@pytest.fixture
def mistake(tmp_path: Path, capfd: Any) -> Callable[..., str]:
    """Runs a command that must fail as the user's mistake, leaving no file, and returns its one line."""

    def run(dataset: str, *flags: str, root: Path | None = None) -> str:
        out = tmp_path / "failed.jsonl"
        capfd.readouterr()
        arguments = ["prepare", dataset, "--root", str(root or tmp_path / "data"), "--out", str(out), *flags]
        assert main(arguments) == 2
        stdout, stderr = capfd.readouterr()
        message = [line for line in stderr.splitlines() if not line.startswith("prepared ")]
        assert stdout == "" and len(message) == 1 and message[0].startswith("fastclap: "), stderr
        assert not list(tmp_path.glob("*failed*"))
        return message[0]

    return run


def by_audio(rows: Rows) -> dict[str, dict[str, Any]]:
    return {row["audio"].split("/")[-1]: row for row in rows}


def speakers_are_disjoint(rows: Rows) -> bool:
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["speaker"], set()).add(row["split"])
    return all(len(names) == 1 for names in splits.values())


RAVDESS_NAMES = ("03-01-05-02-01-01-01", "03-01-06-01-02-02-12", "03-01-08-01-01-01-21", "03-01-01-01-01-01-24")


def make_ravdess(root: Path, names: Sequence[str] = RAVDESS_NAMES) -> None:
    for name in names:
        audio(root / f"Actor_{name[-2:]}" / f"{name}.wav", 0.25)


def make_crema_d(root: Path) -> None:
    for name in ("1001_DFA_ANG_XX", "1009_IEO_FEA_HI", "1010_ITH_NEU_LO", "1001_TAI_DIS_MD"):
        audio(root / "AudioWAV" / f"{name}.wav")
    person = {"Race": "x", "Ethnicity": "y"}
    ages = {"1001": (51, "Male"), "1009": (24, "Female"), "1010": (74, "Female")}
    table(root / "VideoDemographics.csv", *({"ActorID": a, "Age": y, "Sex": s, **person} for a, (y, s) in ages.items()))


def make_iemocap(root: Path) -> None:
    turns = {
        "Ses01F_impro01": (("F000", "neu"), ("M003", "exc"), ("M004", "xxx")),
        "Ses04M_script02_1": (("F001", "ang"),),
        "Ses05F_impro03": (("M012", "fea"),),
    }
    for dialog, labels in turns.items():
        session = root / f"Session{dialog[4]}"
        text = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
        for turn, code in labels:
            audio(session / "sentences" / "wav" / dialog / f"{dialog}_{turn}.wav")
            text += f"[6.2901 - 8.2357]\t{dialog}_{turn}\t{code}\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n\n"
        (folder := session / "dialog" / "EmoEvaluation").mkdir(parents=True, exist_ok=True)
        (folder / f"{dialog}.txt").write_text(text)
        (folder / f"._{dialog}.txt").write_bytes(b"\x00\x05\x16\x07")


def paraspeechcaps_rows() -> Rows:
    shared = {"transcription": "hm", "basic_tags": ["male"], "accent": None, "phonemes": "h m", "snr": 40.0}
    return [
        {
            **shared,
            "source": "expresso",
            "relative_audio_path": "audio_48khz/read/ex01_happy_1.wav",
            "text_description": ["A man speaks happily.", "A deep male voice, happy."],
            "intrinsic_tags": ["deep"],
            "situational_tags": ["happy"],
            "speakerid": "ex01",
            "duration": 0.5,
            "gender": "male",
        },
        {
            **shared,
            "source": "ears",
            "relative_audio_path": "p001/sad.wav",
            "text_description": ["A shrill voice."],
            "intrinsic_tags": ["shrill"],
            "situational_tags": None,
            "speakerid": "p001",
            "duration": 0.5,
            "gender": "female",
        },
    ]


def make_paraspeechcaps(root: Path, parquet: Path) -> None:
    parquet.mkdir(parents=True)
    for split, row in zip(("train_base", "holdout"), paraspeechcaps_rows(), strict=True):
        audio(root / row["source"] / row["relative_audio_path"])
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), parquet / f"{split}-00000-of-00001.parquet")


def make_fcaps(root: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    cuts = {
        "emilia": ("download/Emilia/EN/EN_B00000/a.wav", [], ["Someone speaks slowly and softly."], 0.0),
        "pscbase-train_base": ("download/ears/p001/b.wav", ["A sad man."], ["It begins low.", "It ends low."], 0.0),
        "test": ("download/voxceleb1/c.wav", ["A woman."], ["She laughs."], 1.5),
    }
    for name, (source, short, long, start) in cuts.items():
        audio(root / source.removeprefix("download/"))
        cut = {
            "id": name,
            "start": start,
            "duration": 0.5,
            "recording": {"sources": [{"type": "file", "channels": [0], "source": source}], "sampling_rate": 16000},
            "supervisions": [
                {
                    "gender": "male",
                    "custom": {"short_captions": short, "long_captions": long, "situational_tags": ["x"]},
                }
            ],
            "type": "MonoCut",
        }
        with gzip.open(folder / f"fcaps-{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write(json.dumps(cut) + "\n")


def promptspeech_row(item: str, caption: str) -> dict[str, Any]:
    labels = {"pitch": "high", "speaking_speed": "slow", "energy": "low", "style_prompt": caption}
    return {"item_name": item, "spk_id": item.split("_")[0], "gender": "F", **labels}


def make_promptspeech(root: Path, folder: Path) -> None:
    for item in ("1089_134686_000003_000000", "121_121726_000004_000003"):
        speaker, chapter = item.split("_")[:2]
        audio(root / "test-clean" / speaker / chapter / f"{item}.wav")
    table(
        folder / "Real_training.csv",
        promptspeech_row("1089_134686_000003_000000", "A high, slow voice, she says."),
        promptspeech_row("1089_134686_000003_000000", "A high, slow voice, she says."),
    )
    table(folder / "Real_test.csv", promptspeech_row("121_121726_000004_000003", "Slowly, a lady speaks."))


def make_textrolspeech(root: Path) -> None:
    labels = {"gender": "M", "pitch": "low", "tempo": "normal", "energy": "high", "emotion": "Sad"}
    for name in ("train", "test"):
        path = f"emotion_dataset/ESD/{name}.wav"
        audio(root / path)
        table(
            root / "caption" / f"random_{name}.csv",
            {
                "num": 1,
                "wav_fp": path,
                "item_name": name,
                **labels,
                "style_prompt": f"A {name}.",
                "content_prompt": "Hm",
            },
        )


def make_speechcraft(root: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    captions, labels = {}, {}
    for number in range(40):
        name = f"{100 + number}_9_000003_000000"
        audio(root / "train-clean-100" / str(100 + number) / "9" / f"{name}.wav", 0.2)
        captions[name] = {"llama-description": f"Voice {number}."}
        labels[name] = {"labels": "age:Young Adult\tgender:Female\tvolume:low\temotion:Happy\ttranscription:gender: no"}
    audio(root / "aishell3" / "SSB00050001.wav", 0.2)
    captions["SSB00050001"] = {"llama-description": "中年男性。"}
    labels["SSB00050001"] = {"labels": "年龄:中年\t性别:男\t音高:低"}
    (folder / "libritts_description.json").write_text(json.dumps(captions), encoding="utf-8")
    (folder / "libritts_labels.json").write_text(json.dumps(labels), encoding="utf-8")


def test_ravdess(prepare: Any, tmp_path: Path) -> None:
    make_ravdess(tmp_path / "data")
    make_ravdess(tmp_path / "data" / "copy", [RAVDESS_NAMES[0]])
    make_ravdess(tmp_path / "data", ["03-02-05-02-01-01-01", "03-01-09-01-01-01-01"])
    rows, summary = prepare("ravdess")
    found = by_audio(rows)
    angry = found["03-01-05-02-01-01-01.wav"]
    assert angry["audio"] == "../data/Actor_01/03-01-05-02-01-01-01.wav"
    assert (angry["sex"], angry["emotion"], angry["classification_tag"]) == ("male", "angry", "angry")
    assert (angry["intensity"], angry["sentence"]) == ("strong", "Kids are talking by the door.")
    assert (angry["duration"], angry["split"], angry["speaker"]) == (0.25, "train", "01")
    assert angry["text_description"] == ["A male speaker in an angry tone.", "A man sounds angry."]
    woman = found["03-01-06-01-02-02-12.wav"]
    assert (woman["sex"], woman["emotion"], woman["sentence"]) == (
        "female",
        "fearful",
        "Dogs are sitting by the door.",
    )
    assert {name: split["rows"] for name, split in summary["splits"].items()} == {"train": 2, "dev": 1, "test": 1}
    assert sorted(summary["left_out"].values()) == [1, 1, 1]  # a copy, a song, an emotion that RAVDESS does not have
    assert speakers_are_disjoint(rows)


def test_crema_d(prepare: Any, tmp_path: Path) -> None:
    make_crema_d(tmp_path / "data")
    audio(tmp_path / "data" / "AudioWAV" / "1077_DFA_ANG_XX.wav")  # an actor without a row
    rows, summary = prepare("crema-d")
    found = by_audio(rows)
    assert [found[f"{name}.wav"]["split"] for name in ("1001_DFA_ANG_XX", "1009_IEO_FEA_HI", "1010_ITH_NEU_LO")] == [
        "train",
        "dev",
        "test",
    ]
    row = found["1010_ITH_NEU_LO.wav"]
    assert (row["sex"], row["age"], row["age_group"], row["emotion"]) == ("female", 74, "older or elder", "neutral")
    assert row["text_description"][1] == "A 74-year-old woman sounds neutral."
    assert row["intensity"] == "low" and "intensity" not in found["1001_DFA_ANG_XX.wav"]
    assert found["1001_TAI_DIS_MD.wav"]["emotion"] == "disgusted"
    assert list(summary["left_out"].values()) == [1]


@pytest.mark.parametrize("inner", ["", "IEMOCAP_full_release"])
def test_iemocap(prepare: Any, tmp_path: Path, inner: str) -> None:
    make_iemocap(tmp_path / "data" / inner)
    rows, summary = prepare("iemocap")
    found = by_audio(rows)
    excited = found["Ses01F_impro01_M003.wav"]
    assert (excited["speaker"], excited["sex"]) == ("Ses01M", "male")  # who speaks, not whose dialog it is
    assert (excited["emotion"], excited["emotion4"], excited["scene"]) == ("excited", "happy", "improvised")
    assert "emotion4" not in found["Ses05F_impro03_M012.wav"]
    assert found["Ses04M_script02_1_F001.wav"]["scene"] == "scripted"
    assert {row["session"]: row["split"] for row in rows} == {"1": "train", "4": "dev", "5": "test"}
    assert list(summary["left_out"].values()) == [1] and "Ses01F_impro01_M004.wav" not in found


@pytest.mark.parametrize("saved", [False, True])
def test_paraspeechcaps_from_parquet_or_a_saved_dataset(prepare: Any, tmp_path: Path, saved: bool) -> None:
    make_paraspeechcaps(tmp_path / "data", tmp_path / "psc" / "data")
    folder = tmp_path / "psc"
    if saved:
        import datasets

        rows = paraspeechcaps_rows()
        parts = {"train_base": datasets.Dataset.from_list(rows[:1]), "holdout": datasets.Dataset.from_list(rows[1:])}
        datasets.DatasetDict(parts).save_to_disk(folder := tmp_path / "saved")
    found = by_audio(prepare("paraspeechcaps", "--annotations", str(folder))[0])
    row = found["ex01_happy_1.wav"]
    assert row["text_description"] == ["A man speaks happily.", "A deep male voice, happy."]
    assert (row["split"], row["speaker"], row["sex"], row["source"]) == ("train_base", "ex01", "male", "expresso")
    assert (row["intrinsic_tags"], row["situational_tags"]) == (["deep"], ["happy"])
    assert not {"transcription", "phonemes", "snr", "accent"} & set(row)
    assert found["sad.wav"]["split"] == "holdout" and "situational_tags" not in found["sad.wav"]


def test_the_hub_is_read_through_its_own_client(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "datasets--ajd12342--paraspeechcaps" / "snapshots" / "0123"
    make_paraspeechcaps(tmp_path / "data", snapshot / "data")
    (refs := tmp_path / "hub" / "datasets--ajd12342--paraspeechcaps" / "refs").mkdir()
    (refs / "main").write_text("0123")
    command = [sys.executable, "-m", "fastclap", "prepare", "paraspeechcaps", "--root", str(tmp_path / "data")]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def run(name: str) -> subprocess.CompletedProcess[str]:
        flags = ["--annotations", name, "--out", str(tmp_path / "psc-{split}.jsonl")]
        return subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=300)

    done = run("hf:ajd12342/paraspeechcaps")
    assert done.returncode == 0, done.stderr
    assert "train_base: 1 rows" in done.stdout and "2 rows" in done.stdout
    assert [len(lines(tmp_path / f"psc-{split}.jsonl")) for split in ("train_base", "holdout")] == [1, 1]
    assert "prepared 2 of 2 clips" in done.stderr  # progress
    unknown = run("hf:nobody/nothing")
    assert unknown.returncode == 2 and unknown.stderr.startswith("fastclap: hf:nobody/nothing: the hub did not give it")


def test_fcaps(prepare: Any, tmp_path: Path) -> None:
    make_fcaps(tmp_path / "data", tmp_path / "fcaps" / "data")
    rows, summary = prepare("fcaps", "--annotations", str(tmp_path / "fcaps"))
    found = by_audio(rows)
    assert [found["a.wav"]["split"], found["b.wav"]["split"]] == ["emilia", "pscbase"]
    assert found["b.wav"]["text_description"] == ["A sad man."]
    assert found["b.wav"]["fine_description"] == ["It begins low.", "It ends low."]
    assert found["a.wav"]["text_description"] == found["a.wav"]["fine_description"]  # Emilia has no global captions
    assert (found["a.wav"]["sex"], found["a.wav"]["situational_tags"]) == ("male", ["x"])
    assert summary["left_out"] == {"a cut that does not start at the beginning of its file": 1}


def test_promptspeech(prepare: Any, tmp_path: Path) -> None:
    make_promptspeech(tmp_path / "data", tmp_path / "prompts")
    rows, summary = prepare("promptspeech", "--annotations", str(tmp_path / "prompts"))
    assert [row["split"] for row in rows] == ["test", "train"] and summary["repeated"] == 1
    row = rows[1]
    assert row["audio"] == "../data/test-clean/1089/134686/1089_134686_000003_000000.wav"
    assert row["text_description"] == ["A high, slow voice, she says."]
    assert (row["sex"], row["speaker"], row["pitch"], row["speaking_speed"]) == ("female", "1089", "high", "slow")
    assert row["energy"] == "low"


def test_textrolspeech_and_renamed_columns(prepare: Any, mistake: Any, tmp_path: Path) -> None:
    make_textrolspeech(tmp_path / "data")
    rows, _ = prepare("textrolspeech")
    assert [(row["split"], row["text_description"]) for row in rows] == [("test", ["A test."]), ("train", ["A train."])]
    assert (rows[0]["sex"], rows[0]["classification_tag"], rows[0]["tempo"]) == ("male", "sad", "normal")
    caption = tmp_path / "data" / "caption"
    for path in caption.iterdir():
        path.write_text(path.read_text().replace("wav_fp", "path").replace("style_prompt", "text"))
    message = mistake("textrolspeech")
    assert "columns num, path, item_name" in message and "--columns" in message
    assert prepare("textrolspeech", "--columns", "wav_fp", "path", "style_prompt", "text")[0] == rows
    assert "has no such field to rename; its fields are wav_fp" in mistake("textrolspeech", "--columns", "wav", "path")


def test_speechcraft(prepare: Any, mistake: Any, tmp_path: Path) -> None:
    make_speechcraft(tmp_path / "data", tmp_path / "speechcraft")
    flags = ["--annotations", str(tmp_path / "speechcraft")]
    rows, summary = prepare("speechcraft", *flags)
    row = rows[0]
    assert (row["text_description"], row["speaker"], row["age"]) == (["Voice 0."], "100", "young adult")
    assert (row["sex"], row["emotion"], row["classification_tag"], row["volume"]) == ("female", "happy", "happy", "low")
    chinese = by_audio(rows)["SSB00050001.wav"]
    assert (chinese["sex"], chinese["speaker"], chinese["pitch"]) == ("male", "SSB0005", "低")
    assert speakers_are_disjoint(rows) and set(summary["splits"]) == {"train", "dev", "test"}
    assert summary["splits"]["train"]["rows"] > 30
    path = tmp_path / "speechcraft" / "libritts_description.json"
    path.write_text(path.read_text().replace("llama-description", "words"))
    message = mistake("speechcraft", *flags)
    assert "have the fields words, labels" in message and "--columns description FIELD" in message
    assert prepare("speechcraft", *flags, "--columns", "description", "words")[0] == rows


def test_missing_and_unreadable_audio_is_listed(prepare: Any, tmp_path: Path, capfd: Any) -> None:
    root = tmp_path / "data"
    make_iemocap(root)
    wav = root / "Session1" / "sentences" / "wav" / "Ses01F_impro01"
    (wav / "Ses01F_impro01_F000.wav").unlink()
    (wav / "Ses01F_impro01_M003.wav").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    rows, summary = prepare("iemocap")
    assert (len(rows), summary["missing"], summary["unreadable"]) == (2, 1, 1)
    skipped = lines(summary["skipped_file"])
    assert Path(summary["skipped_file"]).name == "all-skipped.jsonl"
    assert [note["path"].split("_")[-1] for note in skipped] == ["F000.wav", "M003.wav"]
    assert skipped[0]["reason"] == "no such file" and "git lfs pull" in skipped[1]["reason"]
    assert skipped[0]["origin"].endswith("Ses01F_impro01.txt:3")
    for name in ("F000", "M003"):
        audio(wav / f"Ses01F_impro01_{name}.wav")
    assert prepare("iemocap")[1]["skipped_file"] is None
    assert not Path(summary["skipped_file"]).exists()  # the list of the earlier call would be wrong now


def test_one_file_a_split_and_the_text_summary(tmp_path: Path, capfd: Any) -> None:
    root = tmp_path / "data"
    make_ravdess(root)
    (root / "Actor_12" / f"{RAVDESS_NAMES[1]}.wav").write_bytes(b"not audio")
    assert main(["prepare", "ravdess", "--root", str(root), "--out", str(tmp_path / "r-{split}.jsonl")]) == 0
    out, err = capfd.readouterr()
    names = ["r-dev.jsonl", "r-skipped.jsonl", "r-test.jsonl", "r-train.jsonl"]
    assert sorted(path.name for path in tmp_path.glob("r-*")) == names
    assert all(row["split"] == "dev" for row in lines(tmp_path / "r-dev.jsonl"))
    assert "train: 1 rows, 0.00 h, 1 speakers" in out and "split by speaker" in out
    assert "0 clips without audio and 1 unreadable ones left out, see" in err


def test_a_folder_that_is_not_the_dataset(mistake: Any, tmp_path: Path) -> None:
    root = tmp_path / "data"
    assert "no such folder; get it from https://zenodo.org" in mistake("ravdess")
    audio(root / "some.wav")
    (root / "notes.csv").write_text("a,b\n1,2\n")
    (root / "list.json").write_text("[1]")
    for name, dataset in DATASETS.items():
        message = mistake(name)
        assert f"{root}: this is not {dataset.title}: " in message
        assert f"expected {dataset.expects}" in message and dataset.source in message
    assert "no such file or folder; correct --annotations" in mistake("fcaps", "--annotations", str(root / "none"))
    assert "leave the flag away" in mistake("ravdess", "--annotations", str(root / "notes.csv"))


def test_audio_that_is_elsewhere_or_ambiguous(mistake: Any, tmp_path: Path) -> None:
    root = tmp_path / "data"
    make_paraspeechcaps(tmp_path / "elsewhere", tmp_path / "psc")
    root.mkdir()
    message = mistake("paraspeechcaps", "--annotations", str(tmp_path / "psc"))
    assert f"none of the 2 audio files is there; looked for {root}/ears/p001/sad.wav or {root}/p001/sad.wav" in message
    make_promptspeech(root, tmp_path / "prompts")
    audio(root / "LibriTTS_R" / "1089_134686_000003_000000.wav")
    message = mistake("promptspeech", "--annotations", str(tmp_path / "prompts"))
    assert "two files are named 1089_134686_000003_000000" in message
    make_fcaps(root, tmp_path / "fcaps")
    with gzip.open(tmp_path / "fcaps" / "fcaps-dev.jsonl.gz", "wt") as file:
        file.write('{"id": "no recording"}\n')
    assert "fcaps-dev.jsonl.gz:1 is not a cut" in mistake("fcaps", "--annotations", str(tmp_path / "fcaps"))


def test_the_output_must_be_a_jsonl_file(tmp_path: Path, capfd: Any) -> None:
    make_ravdess(tmp_path / "data")
    for out in ("all.csv", "{split}/all.jsonl"):
        assert main(["prepare", "ravdess", "--root", str(tmp_path / "data"), "--out", str(tmp_path / out)]) == 2
        assert "must be a .jsonl file" in capfd.readouterr().err


def test_paths_hold_in_linked_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_ravdess(tmp_path / "deep" / "disk" / "data")
    (tmp_path / "deep" / "manifests").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "deep" / "disk" / "data")
    (tmp_path / "manifests").symlink_to(tmp_path / "deep" / "manifests")
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "ravdess", "--root", "data", "--out", "manifests/r.jsonl"]) == 0
    assert len(load_manifest("manifests/r.jsonl", check_files=True)) == 4
    assert lines("manifests/r.jsonl")[0]["audio"].startswith("../disk/data/Actor_01/")


def test_a_failure_leaves_the_earlier_manifest(tmp_path: Path, mistake: Any) -> None:
    make_ravdess(tmp_path / "data")
    arguments = ["prepare", "ravdess", "--root", str(tmp_path / "data"), "--out", str(tmp_path / "r.jsonl")]
    assert main(arguments) == 0
    before = (tmp_path / "r.jsonl").read_bytes()
    for path in (tmp_path / "data").rglob("*.wav"):
        path.write_bytes(b"")
    assert main(arguments) == 2
    assert (tmp_path / "r.jsonl").read_bytes() == before
    assert "none of the 4 clips can be used" in mistake("ravdess")


def test_the_command_names_every_dataset() -> None:
    kinds = get_args(get_type_hints(Flags, include_extras=False)["dataset"])
    assert kinds == tuple(DATASETS)


def test_help_has_examples(capfd: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", "--help"])
    assert stopped.value.code == 0
    text = capfd.readouterr().out
    assert "Examples:" in text and "fastclap prepare ravdess --root" in text and "hf:ajd12342/paraspeechcaps" in text


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "not UTF-8": lambda data: b"\xff\xfe" + data,
    "a bit": lambda data: data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 8]) + data[len(data) // 3 + 1 :],
    "zeros": lambda data: bytes(len(data)),
    "deep": lambda data: b"[" * 100_000,
    "digits": lambda data: b"1" * 5000,
    "surrogate": lambda data: b'{"a": "\\ud800"}',
    "null": lambda data: b"null",
}
LAYOUTS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "fcaps": (make_fcaps, "*.jsonl.gz"),
    "paraspeechcaps": (make_paraspeechcaps, "*.parquet"),
    "promptspeech": (make_promptspeech, "*.csv"),
    "speechcraft": (make_speechcraft, "*.json"),
    "crema-d": (lambda root, folder: make_crema_d(root), "VideoDemographics.csv"),
    "iemocap": (lambda root, folder: make_iemocap(root), "Session?/dialog/EmoEvaluation/Ses*.txt"),
}


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_damaged_annotations_are_one_message(dataset: str, tmp_path: Path, capfd: Any) -> None:
    make, pattern = LAYOUTS[dataset]
    root, folder = tmp_path / "data", tmp_path / "annotations"
    make(root, folder)
    folder = folder if folder.exists() else root
    whole = {path: path.read_bytes() for path in folder.glob(pattern)}
    assert whole
    for name, damage in DAMAGE.items():
        for path, data in whole.items():
            path.write_bytes(damage(data))
        flags = ["--root", str(root), "--annotations", str(folder), "--out", str(tmp_path / "o.jsonl")]
        status = main(["prepare", dataset, *flags])
        err = capfd.readouterr().err
        lines = [line for line in err.splitlines() if not line.startswith("prepared ")]
        assert (status, len(lines)) in ((2, 1), (0, 0), (0, 1)), (name, err)
        assert status == 0 or lines[0].startswith("fastclap: "), (name, err)


SOUND = {"sources": [{"source": "Emilia/a.wav"}]}


@pytest.mark.parametrize(
    "cut",
    [
        *([], 3, "x", None, {}, {"recording": SOUND}, {"recording": [], "supervisions": [{}]}),
        {"recording": {"sources": [{"source": 3}]}, "supervisions": [{}]},
        {"recording": SOUND, "supervisions": ["x"]},
        {"recording": SOUND, "supervisions": [{"custom": [1]}]},
        {"recording": SOUND, "supervisions": [{"custom": "x"}]},
    ],
)
def test_a_cut_that_is_none_is_named(cut: Any, mistake: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "fcaps-dev.jsonl").write_text(json.dumps(cut) + "\n")
    assert "fcaps-dev.jsonl:1 is not a cut with" in mistake("fcaps", "--annotations", str(tmp_path))


@pytest.mark.parametrize("duration", ["long", [], {}, -1, 0, True, 1e300, float("nan"), 10**400])
def test_a_duration_that_is_none_is_that_of_the_file(duration: Any, prepare: Any, tmp_path: Path) -> None:
    audio(tmp_path / "data" / "Emilia" / "a.wav", 0.25)
    custom = {"custom": {"short_captions": "A voice.", "accent": {"odd": ["\x1b"]}}}
    cut = {"recording": SOUND, "supervisions": [custom], "duration": duration}
    (tmp_path / "fcaps-dev.jsonl").write_text(json.dumps(cut) + "\n")
    rows, _ = prepare("fcaps", "--annotations", str(tmp_path))
    assert rows[0]["duration"] == 0.25 and rows[0]["accent"] == {"odd": ["\x1b"]}
