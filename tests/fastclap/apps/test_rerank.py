"""Best of N: choices against cosines computed apart, both inputs, and every way an input can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from fastclap import CLAP
from fastclap.commands.main import main

PROMPTS = ["A calm voice.", "An angry deep voice.", "A person is speaking."]


@pytest.fixture
def outputs(tmp_path: Path, write_clip: Callable[..., str]) -> Path:
    """Three attempts at three prompts, in the published layout."""
    for iteration in (1, 2, 3):
        for item in range(3):
            write_clip(f"tts/iter_{iteration}/audios/{item}.wav", 3 * iteration + item)
        folder = tmp_path / "tts" / f"iter_{iteration}"
        (folder / "input_descriptions.txt").write_text("\n".join(PROMPTS) + "\n")
        (folder / "wer_per_example.txt").write_text("".join(f"wer {iteration} {item}\n" for item in range(3)))
    (tmp_path / "tts/iter_1/input_texts.txt").write_text("Hello.\n" * 3)
    return tmp_path / "tts"


def cosines(folder: str, outputs: Path, prompts: list[str]) -> torch.Tensor:
    """[items, iterations], each clip embedded alone."""
    model = CLAP.from_pretrained(folder)
    rows = [[outputs / f"iter_{k}/audios/{item}.wav" for k in (1, 2, 3)] for item in range(3)]
    return torch.stack([model.similarity(row, [prompts[i]])[:, 0] for i, row in enumerate(rows)])


def refused(capfd: Any, *arguments: str) -> str:
    assert main(["rerank", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "\nfastclap: " in f"\n{err}"
    return str(err)


def test_the_published_layout(clap_folder: str, outputs: Path, tmp_path: Path, capfd: Any) -> None:
    out = outputs / "best"
    assert main(["rerank", clap_folder, "--data", str(outputs), "--out", str(out), "--top-k", "2", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    expected = cosines(clap_folder, outputs, PROMPTS)
    summary = json.loads((out / "selection_summary.json").read_text())
    assert summary == result["selection"] and (result["items"], result["candidates"]) == (3, 9)
    for item, entry in enumerate(summary):
        order = expected[item].argsort(descending=True).tolist()
        assert entry["prompt_idx"] == item and entry["text_prompt"] == PROMPTS[item]
        assert entry["best_iteration_idx"] == order[0] + 1
        assert entry["best_score"] == pytest.approx(expected[item].max().item(), abs=1e-5)
        assert np.allclose([entry["all_scores"][k] for k in "123"], expected[item], atol=1e-5)
        for rank, folder in enumerate(("audios", "rank_2/audios")):
            source = outputs / f"iter_{order[rank] + 1}/audios/{item}.wav"
            assert (out / folder / f"{item}.wav").read_bytes() == source.read_bytes()
        assert (out / "wer_per_example.txt").read_text().splitlines()[item] == f"wer {order[0] + 1} {item}"
    assert (out / "input_texts.txt").read_text() == "Hello.\n" * 3
    assert (out / "input_descriptions.txt").read_text().splitlines() == PROMPTS
    assert "exists already" in refused(capfd, clap_folder, "--data", str(outputs), "--out", str(out))


def test_two_models_weights_and_several_prompts(
    clap_folder: str, other_clap_folder: str, outputs: Path, tmp_path: Path, capfd: Any
) -> None:
    second = ["A soft voice.", "A loud voice.", "A fast voice."]
    (tmp_path / "second.txt").write_text("\n".join(second))
    first = str(outputs / "iter_1/input_descriptions.txt")
    command = ["rerank", clap_folder, other_clap_folder, "--weights", "3", "1", "--data", str(outputs)]
    assert main([*command, "--prompts", first, str(tmp_path / "second.txt"), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    of_model = [
        (cosines(folder, outputs, PROMPTS) + cosines(folder, outputs, second)) / 2
        for folder in (clap_folder, other_clap_folder)
    ]
    expected = 0.75 * of_model[0] + 0.25 * of_model[1]
    scores = [[entry["all_scores"][k] for k in "123"] for entry in result["selection"]]
    assert np.allclose(scores, expected, atol=1e-5)
    assert [entry["best_iteration_idx"] - 1 for entry in result["selection"]] == expected.argmax(1).tolist()
    assert result["selection"][1]["text_prompts"] == [PROMPTS[1], second[1]]
    assert result["weights"] == [0.75, 0.25] and result["out"] is None
    assert main(command) == 0
    assert "Best of 3" in capfd.readouterr().out
    assert "3 weights for 2 models" in refused(capfd, *command[1:3], "--weights", "1", "1", "1", "--data", str(outputs))
    assert "--weights is -1.0; it must be" in refused(
        capfd, *command[1:3], "--weights", "1", "-1", "--data", str(outputs)
    )


def test_an_unusable_candidate_is_listed_and_never_selected(
    clap_folder: str, outputs: Path, tmp_path: Path, capfd: Any
) -> None:
    best = int(cosines(clap_folder, outputs, PROMPTS)[1].argmax()) + 1
    soundfile.write(outputs / f"iter_{best}/audios/1.wav", np.zeros(8000), 16000)
    command = ["rerank", clap_folder, "--data", str(outputs), "--json"]
    assert main([*command, "--out", str(tmp_path / "best")]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert [Path(clip["path"]).parts[-3] for clip in result["skipped"]] == [f"iter_{best}"]
    assert "silent" in err and result["selection"][1]["all_scores"][str(best)] is None
    assert result["selection"][1]["best_iteration_idx"] != best
    for iteration in (1, 2, 3):
        (outputs / f"iter_{iteration}/audios/1.wav").write_bytes(b"broken")
    message = refused(capfd, *command[1:], "--out", str(tmp_path / "none"))
    assert "item 1: only 0 of 3 candidates can be used" in message
    assert not (tmp_path / "none").exists(), "nothing that looks like a selection"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tts: shutil.rmtree(tts / "iter_2"), "the iteration folder iter_2 is missing (of iter_1 to iter_3)"),
        (lambda tts: shutil.rmtree(tts / "iter_2/audios"), "iter_2/audios: no such folder"),
        (lambda tts: (tts / "iter_3/audios/1.wav").unlink(), "iter_3/audios: 1 of 3 clips are missing, first 1.wav"),
        (
            lambda tts: shutil.copy(tts / "iter_1/audios/1.wav", tts / "iter_1/audios/3.wav"),
            "iter_1/audios: 1 clips too many for 3 prompts, first 3.wav",
        ),
        (
            lambda tts: (tts / "iter_1/input_descriptions.txt").write_text(f"{PROMPTS[0]}\n \n{PROMPTS[2]}\n"),
            "iter_1/input_descriptions.txt:2: blank line; write the description of item 1",
        ),
        (
            lambda tts: (tts / "iter_1/input_descriptions.txt").write_text("\n".join([*PROMPTS, "", ""])),
            "iter_1/input_descriptions.txt:4: blank line; remove it",
        ),
        (
            lambda tts: (tts / "iter_2/input_descriptions.txt").write_text("\n".join([*PROMPTS[:2], "Other."])),
            "iter_2/input_descriptions.txt:3: not the line that",
        ),
        (lambda tts: (tts / "iter_1/input_descriptions.txt").unlink(), "input_descriptions.txt: cannot be read"),
        (lambda tts: (tts / "iter_3/wer_per_example.txt").write_text("1\n"), "wer_per_example.txt: 1 lines for 3"),
        (lambda tts: (tts / "iter_3/wer_per_example.txt").unlink(), "iter_3/wer_per_example.txt: missing"),
    ],
)
def test_a_wrong_layout_is_named_before_the_model_is_read(
    spoil: Callable[[Path], Any], message: str, outputs: Path, tmp_path: Path, capfd: Any
) -> None:
    spoil(outputs)
    found = refused(capfd, str(tmp_path / "no-model"), "--data", str(outputs), "--out", str(tmp_path / "best"))
    assert message in found
    assert not (tmp_path / "best").exists()


def test_other_mistakes_with_a_layout(clap_folder: str, outputs: Path, tmp_path: Path, capfd: Any) -> None:
    common = [clap_folder, "--data", str(outputs)]
    assert "iter_4, iter_5 is missing" in refused(capfd, *common, "--iterations", "5")
    assert "--top-k is 4, but item 0 has 3" in refused(capfd, *common, "--top-k", "4")
    assert "--unequal has no meaning for a folder" in refused(capfd, *common, "--unequal")
    (tmp_path / "short.txt").write_text("One.\n")
    first = str(outputs / "iter_1/input_descriptions.txt")
    assert "short.txt: 1 lines, but" in refused(capfd, *common, "--prompts", first, str(tmp_path / "short.txt"))
    (tmp_path / "nothing").mkdir()
    assert "no folders iter_1" in refused(capfd, clap_folder, "--data", str(tmp_path / "nothing"))


def test_a_failed_copy_leaves_no_selection(
    clap_folder: str, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    copied: list[Any] = []

    def full(source: Any, target: Any) -> None:
        copied.append(target)
        if len(copied) == 2:
            raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copy2", full)
    assert "No space left" in refused(capfd, clap_folder, "--data", str(outputs), "--out", str(tmp_path / "best"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tts"]


def table(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "candidates.csv"
    path.write_text("\n".join(["id,text,audio", *lines]) + "\n")
    return str(path)


def test_a_table_of_candidates(clap_folder: str, outputs: Path, tmp_path: Path, capfd: Any) -> None:
    lines = [f"u{item},{PROMPTS[item]},tts/iter_{k}/audios/{item}.wav" for k in (1, 2, 3) for item in (1, 0)]
    out = tmp_path / "best"
    assert main(["rerank", clap_folder, "--data", table(tmp_path, *lines), "--out", str(out), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    expected = cosines(clap_folder, outputs, PROMPTS)
    assert [entry["id"] for entry in result["selection"]] == ["u1", "u0"]
    for entry, item in zip(result["selection"], (1, 0), strict=True):
        best = f"tts/iter_{int(expected[item].argmax()) + 1}/audios/{item}.wav"
        assert entry["best_audio"] == best and len(entry["all_scores"]) == 3
        assert (out / f"audios/u{item}.wav").read_bytes() == (tmp_path / best).read_bytes()
    uneven = table(tmp_path, *lines[:3], '"x","[""A voice."", ""A calm one.""]",tts/iter_1/audios/2.wav')
    assert main(["rerank", clap_folder, "--data", uneven, "--unequal", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["selection"][2]["text_prompts"] == ["A voice.", "A calm one."]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the table is empty"),
        (
            ["a,One.,tts/iter_1/audios/0.wav", "a,,tts/iter_2/audios/0.wav"],
            "candidates.csv:3: the column 'text' is empty",
        ),
        (
            ["a,One.,tts/iter_1/audios/0.wav", "a,Two.,tts/iter_2/audios/0.wav"],
            "csv:3: id 'a' has another text than on",
        ),
        (["a,One.,tts/iter_1/audios/0.wav", "a,One.,tts/iter_1/audios/0.wav"], "csv:3: the candidate tts/iter_1"),
        (["a,One.,tts/none.wav"], "csv:2: no such audio file"),
        (["../a,One.,tts/iter_1/audios/0.wav"], "csv:2: the id '../a' cannot be a file name"),
        (['a,"["" ""]",tts/iter_1/audios/0.wav'], "csv:2: the column 'text' holds a blank description"),
        (
            ["a,One.,tts/iter_1/audios/0.wav", "a,One.,tts/iter_2/audios/0.wav", "b,One.,tts/iter_1/audios/1.wav"],
            "csv:4: id 'b' has 1 candidates, id 'a' has 2",
        ),
    ],
)
def test_a_wrong_table_is_named(lines: list[str], message: str, outputs: Path, tmp_path: Path, capfd: Any) -> None:
    assert message in refused(capfd, "no-model", "--data", table(tmp_path, *lines))


def test_other_mistakes_with_a_table(outputs: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "c.csv").write_text("id,caption,audio\na,b,c\n")
    assert "no column 'text'" in refused(capfd, "no-model", "--data", str(tmp_path / "c.csv"))
    assert "no such manifest" in refused(capfd, "no-model", "--data", str(tmp_path / "none.csv"))
    assert "--iterations has no meaning for a table" in refused(capfd, "m", "--data", "c.csv", "--iterations", "2")
    assert "name at least one model" in refused(capfd, "--data", "c.csv")
