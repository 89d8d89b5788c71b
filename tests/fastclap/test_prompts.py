"""Templates and prompts files: what they give, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastclap.errors import DataError
from fastclap.prompts import DEFAULT_TEMPLATE, PROMPT_SETS, fill_template, load_prompts


def test_template_puts_in_the_class_and_its_article() -> None:
    assert fill_template(DEFAULT_TEMPLATE, "angry") == "A person is speaking in a angry style."
    assert fill_template("{A} {} speaker, {a} {} one.", "adult") == "An adult speaker, an adult one."
    assert fill_template("{a} {}", "Male") == "a Male"
    assert fill_template("{}", "{a}") == "{a}", "a class name is text, not a template"


@pytest.mark.parametrize("template", ["A person.", "A {style} voice.", "{} and {0}", "{a} voice"])
def test_other_templates_are_refused(template: str) -> None:
    with pytest.raises(DataError, match=r"must contain \{\}"):
        fill_template(template, "sad")


def test_prompts_by_class_and_by_column(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"sad": ["A sad voice.", "She weeps."], "calm": "Calm."}))
    assert load_prompts(path, "any") == {"sad": ["A sad voice.", "She weeps."], "calm": ["Calm."]}
    path.write_text(json.dumps({"emotion": {"sad": "Sad."}, "sex": {"male": ["He."]}}))
    assert load_prompts(path, "sex") == {"male": ["He."]}
    assert load_prompts(path, "age") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected"),
        ("{}", "expected"),
        ('{"sad": []}', "class 'sad' needs a prompt"),
        ('{"sad": ["ok", " "]}', "class 'sad' needs a prompt"),
        ('{"sad": 3}', "class 'sad' needs a prompt"),
        ('{"emotion": {"sad": null}}', "class 'sad' needs a prompt"),
    ],
)
def test_bad_prompts_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(content)
    with pytest.raises(DataError, match=f"prompts.json: {message}"):
        load_prompts(path, "emotion")
    with pytest.raises(DataError, match="cannot read the prompts file"):
        load_prompts(tmp_path / "none.json", "emotion")


def test_published_sets_are_whole() -> None:
    counts = {name: len(found.classes or found.prompts or ()) for name, found in PROMPT_SETS.items()}
    assert counts == {
        "paraspeechclap-pitch": 3,
        "paraspeechclap-texture": 5,
        "paraspeechclap-volume": 5,
        "paraspeechclap-clarity": 4,
        "paraspeechclap-rhythm": 5,
        "paraspeechclap-situational": 21,
        "clsp-emotion": 0,
        "clsp-gender": 2,
        "clsp-age": 4,
    }
    for name, found in PROMPT_SETS.items():
        classes = list(found.classes or found.prompts or ["happy"])
        assert len(set(classes)) == len(classes)
        assert (found.template is None) != (found.prompts is None), name
        assert all(fill_template(found.template, c) for c in classes if found.template is not None)
