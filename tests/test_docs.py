"""What the documentation tells people to type is understood, and the tutorial runs as it stands."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.gpu.report import UNMEASURED
from fastclap import CLAP
from fastclap.commands.main import COMMANDS
from fastclap.commands.main import main as fastclap_main
from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig, ZipformerConfig
from fastclap.data.demo_voices import write_demo
from fastclap.models.tokenizer import train_tokenizer
from fastclap.prompts import PROMPT_SETS
from fastclap.train import cli as train_cli
from fastclap.train.config import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WITHOUT_COMMANDS = {
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks.md",
    "drop-in.md",
    "guarantees.md",
    "results.md",
    "scaling.md",
}
OTHER_PROGRAMS = {".ci/run", "cd", "export", "git", "hf", "huggingface-cli", "make", "mkdir", "pip", "python", "srun"}
RUN_ELSEWHERE = {"tutorial.md", "clsp.md"}  # their Python blocks, by tests of their own


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """(language, what it needs, text) of each fenced block of code."""
    return re.findall(r"^```(bash|python)(?: needs=(\w+))?\n(.*?)^```", page.read_text("utf-8"), flags=re.M | re.S)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run: every command line of ours gets as far as the function that would do the work."""
    understood: list[Any] = []

    def note(arguments: Any) -> int:
        understood.append(arguments)
        return 0

    for name in COMMANDS:
        monkeypatch.setattr(f"fastclap.commands.{name}.run", note)
    monkeypatch.setattr("fastclap.train.checkpoint.average_checkpoints", lambda *arguments: note(arguments))
    monkeypatch.setattr("fastclap.train.loop.train", lambda config: (config.check(), note(config)))

    found = [words for language, _, text in blocks(page) if language == "bash" for words in commands(text)]
    ours = 0
    for words in found:
        if words[0] == "torchrun":
            words = ["fastclap-train", *words[words.index("fastclap.train.cli") + 1 :]]
        if words[0] not in ("fastclap", "fastclap-train"):
            assert words[0] in OTHER_PROGRAMS, words
            continue
        ours += 1
        try:
            status = fastclap_main(words[1:]) if words[0] == "fastclap" else train_cli.main(words[1:])
        except SystemExit as stop:
            status = stop.code
        assert not status and len(understood) == ours, shlex.join(words)
        prompts = getattr(understood[-1], "prompts", None)
        if words[:2] == ["fastclap", "classify"] and prompts is not None:
            assert prompts in PROMPT_SETS or prompts.endswith(".json"), shlex.join(words)
    assert ours or page.name in WITHOUT_COMMANDS


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in RUN_ELSEWHERE], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, one after the other; other tests run those that need a client (needs=NAME), where it is there."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for language, needs, text in blocks(page):
        if language == "python" and not needs:
            exec(compile(text, page.name, "exec"), namespace)


def test_the_readme_prints_what_it_says() -> None:
    """Its first block, typed into an empty file."""
    text = (ROOT / "README.md").read_text("utf-8")
    ((code, printed),) = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, flags=re.S)
    assert len([line for line in code.splitlines() if line]) == 6
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.stdout == printed, run.stderr


def test_the_readme_says_what_no_gpu_has_measured() -> None:
    """As long as the page of the benchmarks, whose tables are generated, says so."""
    readme, page = ((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/benchmarks.md"))
    assert (UNMEASURED in readme) == (UNMEASURED in page)


def test_the_readme_is_a_door() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
    index = (ROOT / "docs/README.md").read_text("utf-8")
    for page in PAGES:
        assert page.parent != ROOT / "docs" or page.name == "README.md" or f"]({page.name})" in index


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Links to files of the repository, and to headings of pages, which the hub names after their words."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        written_by_a_run = "records" in file.parts
        assert (file.parent if written_by_a_run else file).exists(), f"{page.name}: {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)", file.read_text("utf-8"), flags=re.M)
            names = [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings]
            assert heading in names, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:tests|bench|fastclap|kernels|train|docs|examples)/[\w./*-]+)`", page.read_text("utf-8")
    ):
        pattern = re.sub(r"[A-Z]{4,}", "*", name).rstrip("/")  # kernels/NAME.py
        assert name.startswith("bench/records") or list(ROOT.glob(pattern)), f"{page.name}: {name}"


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Every block in order, with fewer voices and steps than the page says; what needs the hub meets a stand-in."""
    import huggingface_hub

    def upload_folder(self: Any, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        pushed[repo_id] = (Path(folder_path) / "README.md").read_text()
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    pushed: dict[str, str] = {}
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **options: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "runs/voices/model"
    done = []
    for language, needs, text in blocks(ROOT / "docs/tutorial.md"):
        if language == "python":
            smaller = text.replace("num_train=480, num_valid=120", "num_train=72, num_valid=24")
            assert "write_demo(" not in text or smaller != text
            exec(compile(smaller, "docs/tutorial.md", "exec"), {})
            continue
        for words in commands(text) if needs != "checkpoint" else ():
            done.append(words[1])
            if needs == "hub":  # its encoders are not here
                config = train_cli.parse([*words[1:], "--data.workers", "0"])
                assert isinstance(config, TrainConfig)
                config.check()
                assert config.model.audio.pretrained and config.model.audio.pretrained.startswith("openai/whisper-")
                continue
            if words[0] == "fastclap":
                assert fastclap_main([*words[1:], *(["--workers", "0"] if words[1] == "pack" else [])]) == 0, words
                continue
            assert (words[words.index("--steps") + 1], words[-1] == "--resume") == ("300", model.exists())
            words[words.index("--steps") + 1] = "6"
            before = (model / "model.safetensors").read_bytes() if model.exists() else None
            train_cli.main([*words[1:], "--data.workers", "0", "--data.crop-seconds", "0.5", "--threads", "1"])
            assert before in (None, (model / "model.safetensors").read_bytes())
    assert {"pack", "small", "whisper-small", "eval", "classify", "embed", "search", "similarity", "rerank"} <= set(
        done
    )

    lines = {name: Path(f"{name}.jsonl").read_text().splitlines() for name in ("train", "valid", "test")}
    rows = {name: [json.loads(line) for line in those] for name, those in lines.items()}
    speakers = {name: {row["speaker"] for row in those} for name, those in rows.items()}
    assert sum(map(len, rows.values())) == 96 and all(len(row["text_description"]) > 1 for row in rows["train"])
    assert not speakers["train"] & speakers["test"] and not speakers["train"] & speakers["valid"]
    assert {row["sex"] for row in rows["test"]} == {"female", "male"}
    for report, pictures in (
        ("retrieval", {"recall.png", "embeddings.png"}),
        ("style", {"confusion-classification_tag.png", "embeddings-classification_tag.png"}),
        ("sex", {"confusion-sex.png", "embeddings-sex.png"}),
    ):
        assert {path.name for path in Path("reports", report).glob("*.png")} == pictures
    scored = list(csv.DictReader(Path("scored.csv").read_text().splitlines()))
    assert len(scored) == 2 * (len(rows["test"]) - 1) and all(-1 <= float(row["cosine"]) <= 1 for row in scored)
    selection = json.loads(Path("best/selection_summary.json").read_text())
    assert selection and all(len(entry["selected"]) == 2 for entry in selection)
    assert len(list(Path("best/rank_2/audios").iterdir())) == len(selection)
    card = pushed["you/voices"]
    for told in ("license: cc-by-4.0", 'from_pretrained("you/voices")', "| training data | packed |", "## Figures"):
        assert told in card
    assert "tensor([" in capfd.readouterr().out, "the reward"


def test_the_released_clsp_is_used_as_its_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """A random model of its architecture, saved in its form, stands for the released one."""
    captions = ["A female speaker in a happy tone."]
    text = {"model_type": "roberta", "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "intermediate_size": 16, "max_position_embeddings": 66, "pad_token_id": 1}
    sizes = ZipformerConfig(
        channels=[2, 2, 4], downsampling=[1, 2], layers=[1], width=[16], unmasked_width=[8], feedforward=[16],
        heads=[2], kernel=[5], query_width=4, encoding_width=8,
    )  # fmt: skip
    config = CLAPConfig(
        audio=AudioTowerConfig(kind="zipformer", features="clsp", zipformer=sizes),
        text=TextTowerConfig(kind="hf", hf_config=text | {"layer_norm_eps": 1e-5}, pooling="pooler", max_tokens=64),
        head=HeadConfig(kind="clsp", dim=16),
    )
    tokenizer = train_tokenizer(captions, 300)
    CLAP(config, tokenizer).save_pretrained(tmp_path / "ours")
    fastclap_main(["convert", str(tmp_path / "ours"), str(tmp_path / "hub"), "--to", "clsp"])
    tokenizer.save(tmp_path / "hub" / "tokenizer.json")
    monkeypatch.setattr("fastclap.models.folder._download", lambda name: tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    Path(write_demo(".", 2, 6)[1]).rename("fcaps-test.jsonl")
    (code,) = (text for language, _, text in blocks(ROOT / "docs/clsp.md") if language == "python")
    exec(compile(code, "docs/clsp.md", "exec"), {})
    assert "tensor([" in capfd.readouterr().out
