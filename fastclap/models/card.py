"""The model card: `README.md` of an exported model, in the form that the Hugging Face hub shows.

It describes the model (towers, sizes, how to use it) and, given a run folder, says what it was trained on and how it
scored at the last validation, compared with chance. Manifests and models on a disk appear by their name alone, without
the path: a card is meant for others. Whoever publishes a model names the licence of its weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastclap.config import AudioTowerConfig, CLAPConfig, TextTowerConfig
from fastclap.errors import DataError
from fastclap.reading import parse_json, parse_yaml, read_json, read_text

_FROM_HERE = 'CLAP.from_pretrained(".")'


@dataclass(frozen=True)
class ModelFacts:
    """What a card says about the model itself."""

    config: CLAPConfig
    sampling_rate: int
    parameters: int
    has_tokenizer: bool


def model_card(facts: ModelFacts, *, run: str | os.PathLike[str] | None = None, origin: str | None = None) -> str:
    """A new card, in Markdown with the hub's YAML header; the licence is entered as unknown.

    Args:
        facts: of the model to describe.
        run: run folder to report on; its `config.yaml`, `environment.json` and `metrics.jsonl` are read where they are
            there and readable.
        origin: sentence on where the weights come from.
    """
    config = facts.config
    rows = {
        "audio tower": _audio_tower(config.audio),
        "text tower": _text_tower(config.text),
        "projection heads": f"{config.head.kind}, to {config.head.dim} dimensions",
        "audio": f"mono, {facts.sampling_rate} Hz (other rates are resampled)",
        "captions": f"up to {config.text.max_tokens} tokens",
        "parameters": f"{facts.parameters / 1e6:.1f} million",
    }
    sections = [
        "---\nlicense: unknown\nlibrary_name: fastclap\npipeline_tag: zero-shot-audio-classification\n"
        "tags:\n- clap\n- speech\n- audio-text-retrieval\n---",
        "# A dual encoder of speech and text",
        "Clips and descriptions of how they sound, as unit vectors in one space: their cosine says how well they go "
        "together. For retrieval in both directions, zero-shot classification, style similarity, and choosing the best "
        "of several synthesised clips.",
        *([origin] if origin else []),
        _table(("", "what it is"), rows.items()),
        "## Usage",
        _usage(facts),
        "The `fastclap` command takes the folder, or its name on the hub, wherever it asks for a model: "
        "`fastclap classify`, `eval`, `embed`, `search`, `similarity` and `rerank`.",
        *(_training(Path(run)) if run is not None else ()),
        "## Limits",
        "It knows the voices, languages and descriptions of its training data. Judgements about speakers (age, sex, "
        "accent, emotion) are those of the captions it learned from and are wrong for many people; do not use them to "
        "decide about anyone.",
        "## Licence",
        "That of the weights is `license` in the header of this card; `unknown` says that nobody has named it. The "
        "recordings and captions they were trained on, and the towers they started from, have licences of their own.",
    ]
    return "\n\n".join(sections) + "\n"


def with_license(card: str, license: str) -> str:
    """The card with another licence in its header, by its name on the hub."""
    return re.sub(r"\A(---\n(?:(?!---\n).*\n)*?)license:.*\n", rf"\g<1>license: {license}\n", card)


def published_at(card: str, repo_id: str) -> str:
    """The card with its example reading the model from the hub."""
    return card.replace(f"{_FROM_HERE}  # this folder", f'CLAP.from_pretrained("{repo_id}")')


def _usage(facts: ModelFacts) -> str:
    rate = facts.sampling_rate
    lines = ["```python", "import torch", "from fastclap import CLAP", ""]
    lines += [f"model = {_FROM_HERE}  # this folder", f"clips = [torch.randn({rate})]  # or audio files"]
    if not facts.has_tokenizer:
        lines += [f"print(model.embed_audio(clips, sampling_rate={rate}).shape)"]
    else:
        lines += [
            'captions = ["A person is speaking in a calm style.", "A person is speaking in an angry style."]',
            f"cosines = model.similarity(clips, captions, sampling_rate={rate})",
            "print(cosines)  # [clips, captions]",
        ]
    return "\n".join([*lines, "```"])


def _audio_tower(config: AudioTowerConfig) -> str:
    if config.kind == "log-mel":
        return f"transformer on log-mel features ({config.features}), {config.layers} layers of width {config.width}"
    if config.kind == "cnn14":
        return f"Cnn14, from {config.convolution_channels} channels to width {config.width}"
    if config.kind == "zipformer":
        lists = config.zipformer.lists()
        return f"Zipformer on log-mel features, {sum(lists['layers'])} layers, width {max(lists['width'])}"
    return _transformers_tower(config.kind, config)


def _text_tower(config: TextTowerConfig) -> str:
    if config.kind == "small" and not config.layers:
        return f"token embeddings of width {config.width}, {config.pooling} pooling"
    if config.kind == "small":
        return f"transformer, {config.layers} layers of width {config.width}, {config.pooling} pooling"
    return f"{_transformers_tower('transformers', config)}, {config.pooling} pooling"


def _transformers_tower(kind: str, config: AudioTowerConfig | TextTowerConfig) -> str:
    fields = config.hf_config or {}
    name = str(fields.get("model_type", kind)).replace("clap_audio_model", "CLAP-HTSAT")
    layers = (
        fields.get("depths") or fields.get("num_hidden_layers") or fields.get("encoder_layers") or fields.get("n_layer")
    )
    width = (
        fields.get("patch_embeds_hidden_size")
        or fields.get("hidden_size")
        or fields.get("d_model")
        or fields.get("n_embd")
    )
    source = config.pretrained
    # a folder on somebody's disk means nothing to anyone else
    start = f", started from {source}" if source is not None and not os.path.exists(source) else ""
    return f"{name}, layers {layers}, width {width}{start}"


def _training(run: Path) -> Iterator[str]:
    config = _read_yaml(run / "config.yaml")
    facts = list(_training_facts(config))
    if facts:
        environment = _read_json(run / "environment.json")
        packages = ("fastclap", "torch", "transformers")
        versions = ", ".join(f"{name} {environment[name]}" for name in packages if environment.get(name))
        yield "## Training"
        yield _table(("", "value"), [*facts, *([("made with", versions)] if versions else [])])
    record = _last_validation(run / "metrics.jsonl")
    rows = list(_figures(record))
    if rows:
        clips = f" on {record['clips']} clips" if "clips" in record else ""
        valid = _sources(_part(config, "data").get("valid"))
        yield "## Figures"
        yield f"Validation at step {record['step']}{clips}{f' ({valid})' if valid else ''}, in per cent:"
        yield _table(("figure", "%", "chance"), rows)
        yield from _prompts(record)


def _training_facts(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What others need to know of a run's configuration, as far as it is there."""
    data, loss, optimizer = (_part(config, name) for name in ("data", "loss", "optimizer"))
    if not data.get("train"):
        return
    mixed = f" ({data['mix']})" if data.get("mix") and len(data["train"]) > 1 else ""
    balanced = f"{data.get('balance')} frequency of {data.get('tag_column')}"
    teacher = loss.get("teacher")
    facts = {
        "training data": _sources(data["train"]) + mixed,
        "captions": data.get("captions"),
        "clips": f"cropped to {data['crop_seconds']:g} s at most" if data.get("crop_seconds") else None,
        "drawn by": balanced if data.get("balance", "none") != "none" else None,
        "started from": _model_name(str(config["init_from"])) if config.get("init_from") else None,
        "loss": loss.get("kind"),
        "tag loss": f"{loss['tag_weight']:g} · {data.get('tag_column')}" if loss.get("tag_weight") else None,
        "teacher": f"{_model_name(str(teacher))}, weight {loss.get('teacher_weight')}" if teacher else None,
        "global batch": config.get("batch_size"),
        "steps": config.get("steps"),
        "learning rate": optimizer.get("learning_rate"),
        "averaged weights": f"decay {optimizer['ema_decay']:g}" if optimizer.get("ema_decay") else None,
        "seed": config.get("seed"),
    }
    yield from ((name, value) for name, value in facts.items() if value is not None)


def _figures(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    names = {"audio_to_text": "audio → text", "text_to_audio": "text → audio"}
    for captions, directions in record.get("retrieval", {}).items():
        for direction, title in names.items():
            figures = directions.get(direction, {})
            for figure in ("R@1", "R@5", "R@10", "mAP@10"):
                if figure in figures:
                    chance = figures.get("chance", {}).get(figure)
                    yield f"{captions} captions, {title}, {figure}", _percent(figures[figure]), _percent(chance)
    for column, figures in record.get("classification", {}).items():
        for figure, chance, title in (
            ("accuracy", "majority_accuracy", "accuracy"),
            ("uar", "chance", "UAR"),
            ("macro_f1", "", "macro-F1"),
        ):
            if figure in figures:
                yield f"{column}, {title}", _percent(figures[figure]), _percent(figures.get(chance))


def _prompts(record: Mapping[str, Any]) -> Iterator[str]:
    """The sentences that the zero-shot figures were made with, and what they are compared with."""
    used = {
        column: " · ".join(f"“{template}”" for template in figures["templates"])
        for column, figures in record.get("classification", {}).items()
        if figures.get("templates")
    }
    if used:
        listed = "; ".join(f"{column} with {templates}" for column, templates in used.items())
        yield f"Zero-shot: {listed}. Beside an accuracy stands that of the most frequent class."


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _part(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def _sources(names: Any) -> str:
    return ", ".join(_public_name(str(name)) for name in names or ())


def _last_validation(path: Path) -> dict[str, Any]:
    last: dict[str, Any] = {}
    try:
        for number, line in enumerate(read_text(path, limit=1 << 30).split("\n"), 1):
            record = parse_json(line, f"{path}:{number}") if line.strip() else None
            if isinstance(record, dict) and record.get("kind") == "valid":
                last = record
    except DataError:  # no figures are better than no model
        return {}
    return last


def _read_yaml(path: Path) -> dict[str, Any]:
    return _mapping(lambda: parse_yaml(read_text(path), str(path)))


def _read_json(path: Path) -> dict[str, Any]:
    return _mapping(lambda: read_json(path))


def _mapping(read: Callable[[], Any]) -> dict[str, Any]:
    try:
        data = read()
    except DataError:
        return {}
    return data if isinstance(data, dict) else {}


def _public_name(source: str) -> str:
    return source if source.startswith("hf:") else Path(source).name


def _model_name(source: str) -> str:
    """A hub id as it is; a folder's name, and for the folder `model` of a run the run's."""
    path = Path(source)
    if len(path.parts) == 2 and not path.is_absolute() and not path.exists():
        return source
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(str(cell).replace('|', ' ') for cell in row)} |" for row in rows])
