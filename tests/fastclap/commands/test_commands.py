"""The command line: figures on stdout, one line on stderr for a mistake, nothing heavy before the flags are read."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from fastclap.commands.main import main
from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.data.demo_voices import write_demo
from fastclap.models.clap import CLAP
from fastclap.models.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_demo(str(tmp_path_factory.mktemp("voices")), 12, 12, seed=3)[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = CLAPConfig(
        audio=AudioTowerConfig(width=16, layers=1, heads=2, feature_options={"n_mels": 16}),
        text=TextTowerConfig(width=16, layers=1, heads=2, vocab_size=300),
        head=HeadConfig(kind="linear", dim=16),
    )
    folder = tmp_path_factory.mktemp("export") / "model"
    CLAP(config, train_tokenizer(["A person is speaking in a calm style."], 300)).save_pretrained(folder)
    return str(folder)


def error_line(capfd: Any, *arguments: str) -> str:
    """Run a command line that must fail as a mistake, and return its one line on stderr."""
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("fastclap: ") and err.count("\n") == 1, err
    return err


def test_eval_prints_json_and_nothing_else(model: str, voices: str, capfd: Any) -> None:
    assert main(["eval", "--model", model, "--data", voices, "--json", "--captions-per-clip", "all"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["model"], result["data"], result["clips"], result["skipped"]) == (model, [voices], 12, [])
    figures = result["retrieval"]["global"]
    assert figures["captions_per_clip"] == "all"
    assert figures["audio_to_text"]["candidates"] == figures["texts"] > 12
    assert set(figures["audio_to_text"]) > {"R@1", "R@5", "R@10", "mAP@10", "median_rank", "mean_rank", "chance"}
    assert result["classification"] == {}


def test_eval_and_classify_read_a_packed_folder(model: str, voices: str, tmp_path: Path, capfd: Any) -> None:
    packed = str(tmp_path / "packed")
    assert main(["pack", voices, "--out", packed, "--workers", "0"]) == 0
    for command, figures in (("eval", "retrieval"), ("classify", "classification")):
        found = []
        for data in (voices, packed):
            capfd.readouterr()
            assert main([command, "--model", model, "--data", data, "--json"]) == 0
            found.append(json.loads(capfd.readouterr().out))
        assert (found[0]["clips"], found[0][figures]) == (found[1]["clips"], found[1][figures])


def test_eval_and_classify_use_the_first_columns(model: str, voices: str, capfd: Any) -> None:
    for command, figures in (("eval", "retrieval"), ("classify", "classification")):
        found = []
        for flags in ([], ["--width", "3"]):
            assert main([command, "--model", model, "--data", voices, "--json", *flags]) == 0
            found.append(json.loads(capfd.readouterr().out))
        assert found[1]["width"] == 3 and found[0][figures] != found[1][figures]
        error = error_line(capfd, command, "--model", model, "--data", voices, "--width", "17")
        assert "--width is 17; the model's embeddings have 1 to 16 columns to use" in error


def test_eval_prints_a_table_and_writes_a_report(model: str, voices: str, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "report"
    assert main(["eval", "--model", model, "--data", voices, "--captions", "both", "--out", str(out)]) == 0
    table = capfd.readouterr().out
    assert all(word in table for word in ("global", "fine", "R@10 %", "median rank", "12 clips, 0 skipped", str(out)))
    result = json.loads((out / "report.json").read_text())
    assert set(result["retrieval"]) == {"global", "fine"}
    assert sorted(path.name for path in out.glob("*.png")) == ["embeddings.png", "recall.png"]
    assert len(result["embeddings"]["audio"]) == 12
    for both in result["retrieval"].values():
        assert (
            f"{100 * both['text_to_audio']['R@10']:.1f} ({100 * both['text_to_audio']['chance']['R@10']:.1f})" in table
        )


def test_classify_by_tag_by_column_and_by_prompts(model: str, voices: str, tmp_path: Path, capfd: Any) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"sex": {"female": ["A woman.", "She speaks."], "male": "A man."}}))
    common = ["classify", "--model", model, "--data", voices]
    assert main(common) == 0
    table = capfd.readouterr().out
    assert all(word in table for word in ("accuracy (WA)", "UAR (UA)", "macro-F1", "chance: ", "recall %"))
    expected = json.loads(Path(voices).read_text().splitlines()[0])["classification_tag"]
    assert expected in table
    assert main([*common, "--column", "sex", "--prompts", str(prompts), "--json"]) == 0
    by_prompts = json.loads(capfd.readouterr().out)["classification"]["sex"]
    assert (by_prompts["classes"], by_prompts["chance"], by_prompts["templates"]) == (["female", "male"], 0.5, None)
    assert main([*common, "--column", "sex", "--prompts", "clsp-gender", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["classification"]["sex"]["classes"] == ["male", "female"]
    assert main([*common, "--prompts", "clsp-emotion", "--json"]) == 0
    by_set = json.loads(capfd.readouterr().out)["classification"]["classification_tag"]
    assert (by_set["templates"], expected in by_set["classes"]) == (["A speaker in a {} tone."], True)
    assert main([*common, "--prompts", "clsp-emotion-iemocap", "--json"]) == 0
    out, err = capfd.readouterr()
    by_set = json.loads(out)["classification"]["classification_tag"]
    assert (by_set["classes"], by_set["merged"]) == (["happy", "angry", "sad", "neutral"], {"excited": "happy"})
    assert [row["clips"] for row in by_set["per_class"]] == [4, 2, 2, 0] and "excited counts as happy" in err
    assert main([*common, "--column", "sex", "--classes", "male", "mal", "--template", "{A} {} voice.", "--json"]) == 0
    out, err = capfd.readouterr()
    figures = json.loads(out)["classification"]["sex"]
    assert (figures["classes"], figures["templates"]) == (["male", "mal"], ["{A} {} voice."])
    assert "no clip has the class mal;" in err
    assert f"{12 - figures['clips']} clips have none of the classes and were left out" in err


def test_classify_draws_a_map_of_the_embeddings(model: str, voices: str, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "report"
    flags = ["--data", voices, "--column", "sex", "--prompts", "clsp-gender", "--out", str(out), "--json"]
    assert main(["classify", "--model", model, *flags]) == 0
    found = json.loads(capfd.readouterr().out)["embeddings"]
    assert found == json.loads((out / "report.json").read_text())["embeddings"]
    assert sorted(path.name for path in out.glob("*.png")) == ["confusion-sex.png", "embeddings-sex.png"]
    sexes = [json.loads(line)["sex"] for line in Path(voices).read_text().splitlines()]
    assert found["columns"]["sex"]["class_of"] == [["male", "female"].index(sex) for sex in sexes]
    assert "embeddings-sex" in (out / "report.html").read_text()


def test_unreadable_clips_are_named_on_stderr(model: str, voices: str, tmp_path: Path, capfd: Any) -> None:
    rows = [json.loads(line) for line in Path(voices).read_text().splitlines()]
    key = "audio" if "audio" in rows[0] else "relative_audio_path"
    for row in rows[:2]:
        row[key] = f"gone-{row[key]}"
    manifest = tmp_path / "some.jsonl"
    manifest.write_text("\n".join(json.dumps(row) for row in rows))
    common = ["eval", "--model", model, "--data", str(manifest), "--audio-root", str(Path(voices).parent)]
    assert main(common) == 0
    out, err = capfd.readouterr()
    assert "10 clips, 2 skipped" in out
    assert err.count("fastclap: skipped ") == 2 and "gone-" in err


def test_mistakes_in_data_and_model_are_one_line(model: str, voices: str, tmp_path: Path, capfd: Any) -> None:
    evaluate, classify = ["eval", "--data", voices, "--model"], ["classify", "--model", model, "--data", voices]
    assert "no such model folder" in error_line(capfd, *evaluate, str(tmp_path / "nothing"))
    assert "neither an exported model" in error_line(capfd, *evaluate, str(tmp_path))
    assert "no such manifest" in error_line(capfd, "eval", "--model", model, "--data", "nothing.jsonl")
    assert "--data is empty" in error_line(capfd, "eval", "--model", model, "--data")
    assert "--batch-size is 0" in error_line(capfd, *evaluate, model, "--batch-size", "0")
    assert "--device gpu" in error_line(capfd, *evaluate, model, "--device", "gpu")
    assert "no column 'emotion'" in error_line(capfd, *classify, "--column", "emotion")
    assert "none of the classes shrill, nasal, deep; it has" in error_line(
        capfd, *classify, "--column", "sex", "--prompts", "paraspeechclap-pitch"
    )
    assert "none of the classes glad; it has" in error_line(capfd, *classify, "--classes", "glad")
    assert "must contain {}" in error_line(capfd, *classify, "--template", "no name")
    (tmp_path / "p.json").write_text('{"age": {"old": "An old voice."}}')
    assert "no prompts for the column 'sex'" in error_line(
        capfd, *classify, "--column", "sex", "--prompts", str(tmp_path / "p.json")
    )
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in error_line(capfd, "eval", "--model", model, "--data", str(tmp_path / "empty.jsonl"))
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in error_line(capfd, *evaluate, model, "--out", str(tmp_path / "file"))
    assert "metrics.jsonl: cannot be read" in error_line(capfd, "report", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evil"], "there is no command 'evil'; choose one of: eval, classify, report, pack, embed"),
        ([], "usage: fastclap COMMAND"),
    ],
)
def test_unknown_commands(arguments: list[str], message: str, capfd: Any) -> None:
    assert main(arguments) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--model", "m", "--data", "d", "--jsn"], "--json"),
        (["eval", "--model", "m", "--data", "d", "--captions", "coarse"], "fine"),
        (["classify", "--model", "m"], "--data"),
        (["report"], "Run folder"),
    ],
)
def test_mistyped_flags_exit_with_a_hint(arguments: list[str], message: str, capfd: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capfd.readouterr().err


def test_report_of_a_run_folder(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    assert main(["report", str(tmp_path)]) == 0
    assert capfd.readouterr().out.strip() == str(tmp_path / "report" / "report.html")
    assert (tmp_path / "report" / "training.png").stat().st_size > 0


def test_doctor_finds_what_is_missing(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    assert main(["doctor", "--json"]) == 0
    healthy = json.loads(capfd.readouterr().out)
    assert healthy["problems"] == []
    assert healthy["packages"]["torch"] == importlib.metadata.version("torch")
    assert healthy["engines"]["torch"] == "yes"
    assert {"WAV", "FLAC", "OGG", "MP3"} <= set(healthy["audio"]["formats"])

    def version(name: str, original: Any = importlib.metadata.version) -> str:
        if name in ("torch", "soxr", "triton", "wandb"):
            raise importlib.metadata.PackageNotFoundError(name)
        return original(name)

    with monkeypatch.context() as patch:
        patch.setattr(soundfile, "available_formats", lambda: {"WAV": "", "FLAC": ""})
        assert main(["doctor", "--json"]) == 1
    assert "reads no OGG, MP3" in json.loads(capfd.readouterr().out)["problems"][0]
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["doctor", "--json"]) == 1
    broken = json.loads(capfd.readouterr().out)
    assert broken["problems"] == ["torch is missing: pip install torch", "soxr is missing: pip install soxr"]
    assert broken["packages"]["triton"] == "not installed (optional)"
    assert main(["doctor"]) == 1
    assert "problem: soxr is missing" in capfd.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    """In a process of its own: help of every command comes from the arguments alone."""
    script = """
import sys
from fastclap.commands.main import main
for command in ("eval", "classify", "report", "pack", "embed", "search", "rerank", "similarity", "convert", "doctor"):
    try:
        main([command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
assert main(["--help"]) == 0
print("heavy:", sorted({"torch", "numpy", "transformers", "matplotlib", "sklearn"} & set(sys.modules)))
"""
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"
    assert (
        'fastclap classify --model runs/demo --data test.jsonl --column sex --template "{A} {} speaker."' in done.stdout
    )
    assert "A person is speaking in a {} style." in done.stdout
    assert done.stdout.count("Examples:") == 10
    assert 'fastclap search runs/demo recordings.parquet "a calm female voice"' in done.stdout


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "fastclap", "classify", "--model", "m", "--data", "d", "--prompts", "none.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "fastclap: none.json: cannot be read (No such file or directory)\n"
