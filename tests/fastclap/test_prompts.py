"""Templates and prompts files: what they give, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.icefall import parts
from fastclap.errors import DataError
from fastclap.prepare.acted import _CREMA_EMOTIONS, _IEMOCAP_EMOTIONS, _RAVDESS_EMOTIONS, _age_group
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
        ('{"sad": ["x", %s]}' % ("1, " * 9999 + "2"), r"class 'sad' needs a prompt .{,90}$"),
        ('{"%s": 3}' % ("s" * 9999), r"class 's{,60}…' needs a prompt"),
        ('{"sad": "\\ud800"}', "holds '.ud800' in 'sad', half of a character"),
        ("[" * 100_000, "JSON nested too deeply"),
        ('{"sad": 1%s}' % ("0" * 5000), "JSON with an integer of more than"),
        ('{"emotion": {"sad": null}}', "class 'sad' needs a prompt"),
    ],
)
def test_bad_prompts_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(content)
    with pytest.raises(DataError, match=f"prompts.json: {message}"):
        load_prompts(path, "emotion")
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
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
        "clsp-emotion-iemocap": 5,
        "clsp-gender": 2,
        "clsp-age": 4,
    }
    for name, found in PROMPT_SETS.items():
        classes = list(found.classes or found.prompts or ["happy"])
        assert len(set(classes)) == len(classes)
        assert (found.template is None) != (found.prompts is None), name
        assert all(fill_template(found.template, c) for c in classes if found.template is not None)
        assert not {*found.words, *found.merged} - set(classes) or found.classes is None


# The lists of yfyeung/icefall, branch clsp, clsp/eval_zero_shot_classification.py, in the order of its labels.
PUBLISHED = {
    "ravdess_emotion": [
        "A speaker in a angry tone.",
        "A speaker in a calm tone.",
        "A speaker in a disgust tone.",
        "A speaker in a fear tone.",
        "A speaker in a happy tone.",
        "A speaker in a sad tone.",
        "A speaker in a surprised tone.",
        "A speaker in a neutral tone.",
    ],
    "cremad_emotion": [
        "A speaker in a happy tone.",
        "A speaker in a sad tone.",
        "A speaker in a angry tone.",
        "A speaker in a fear tone.",
        "A speaker in a disgust tone.",
        "A speaker in a neutral tone.",
    ],
    "iemocap_emotion": [
        "A speaker in a happy tone.",
        "A speaker in a excited tone.",
        "A speaker in a angry tone.",
        "A speaker in a sad tone.",
        "A speaker in a neutral tone.",
    ],
    "ravdess_gender": ["A male speaker.", "A female speaker."],
    "cremad_age": [
        "A child or young teenager speaker.",
        "An adult speaker.",
        "A middle-aged speaker.",
        "An older or elder speaker.",
    ],
}


def prompts_of(name: str, labels: dict[str, str]) -> dict[str, str]:
    """The published labels of the classes of our manifests → the prompts that a set gives these."""
    found, prompts = PROMPT_SETS[name], {}
    for label, of_ours in labels.items():
        if found.prompts is None:
            assert found.template is not None
            prompts[label] = fill_template(found.template, found.words.get(of_ours, of_ours))
        else:
            (prompts[label],) = found.prompts[of_ours]
    return prompts


# published label → class of our manifests, in the order of the published prompts
LABELS: dict[str, tuple[str, dict[str, str]]] = {
    "ravdess_emotion": (
        "clsp-emotion",
        {
            label: {"disgust": "disgusted"}.get(label, label)
            for label in ("angry", "calm", "disgust", "fearful", "happy", "sad", "surprised", "neutral")
        },
    ),
    "cremad_emotion": (
        "clsp-emotion",
        {code[0]: _CREMA_EMOTIONS[code] for code in ("HAP", "SAD", "ANG", "FEA", "DIS", "NEU")},
    ),
    "iemocap_emotion": (
        "clsp-emotion-iemocap",
        {code: _IEMOCAP_EMOTIONS[code] for code in ("hap", "exc", "ang", "sad", "neu")},
    ),
    "ravdess_gender": ("clsp-gender", {"male": "male", "female": "female"}),
}


@pytest.mark.parametrize("dataset", LABELS)
def test_prompts_are_the_published_ones(dataset: str) -> None:
    name, labels = LABELS[dataset]
    assert list(prompts_of(name, labels).values()) == PUBLISHED[dataset]
    classes = {"ravdess_emotion": _RAVDESS_EMOTIONS, "cremad_emotion": tuple(_CREMA_EMOTIONS.values())}
    assert sorted(labels.values()) == sorted(classes.get(dataset) or PROMPT_SETS[name].classes or ("female", "male"))


def test_ages_and_their_prompts_are_the_published_ones() -> None:
    prompts = PROMPT_SETS["clsp-age"].prompts
    assert prompts is not None
    assert [text for texts in prompts.values() for text in texts] == PUBLISHED["cremad_age"]
    bounds = [list(prompts).index(_age_group(age)) for age in (0, 19, 20, 39, 40, 59, 60, 100)]
    assert bounds == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_published_code_says_the_same(icefall: SimpleNamespace) -> None:
    published = parts(
        icefall, "clsp/eval_zero_shot_classification.py", lambda name: name.startswith(("map_", "generate_"))
    )
    for dataset, expected in PUBLISHED.items():
        assert published[f"generate_{dataset}_prompts"]() == expected
    for dataset, (_, labels) in LABELS.items():
        assert [published[f"map_{dataset}_label_to_index"](label) for label in labels] == list(range(len(labels)))
    classes = list(PROMPT_SETS["clsp-age"].prompts or ())
    for age in range(101):
        assert published["map_cremad_age_label_to_index"](age) == classes.index(_age_group(age))
