"""The model card: ``README.md`` of an exported model, in the form that the Hugging Face hub shows.

It tells what the model itself knows (towers, sizes, how to use it) and, given a run folder, what it was trained on and
how it scored at the last validation. Of manifests on a disk the file name alone is told: a card is meant for others.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastclap.config import AudioTowerConfig, TextTowerConfig
    from fastclap.model import CLAP

_HERE = 'CLAP.from_pretrained(".")'


def card_of(model: CLAP, run: str | os.PathLike[str] | None = None, license: str | None = None) -> str:
    """Card to save beside a model: the one it came with, or a new one where there is none or ``run`` has news.

    Args:
        model: whose ``card`` is kept without ``run``.
        run: run folder, of which ``config.yaml`` and ``metrics.jsonl`` are read where they are there and readable.
        license: name of a licence on the hub; entered into a kept card too.
    """
    card = model.card
    if card is None or run is not None:
        card = model_card(model, run=run)
    if license is not None:
        card = re.sub(r"\A(---\n(?:(?!---\n).*\n)*?)license:.*\n", rf"\g<1>license: {license}\n", card)
    return card


def model_card(model: CLAP, *, run: str | os.PathLike[str] | None = None, origin: str | None = None) -> str:
    """A new card, in Markdown with the hub's YAML header; the licence is entered as unknown.

    Args:
        model: to describe.
        run: run folder to report on, see :func:`card_of`.
        origin: sentence that tells where the weights come from.
    """
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {
        "audio tower": _audio_tower(config.audio),
        "text tower": _text_tower(config.text),
        "projection heads": f"{config.head.kind}, to {config.head.dim} dimensions",
        "audio": f"mono, {model.sampling_rate} Hz (other rates are resampled)",
        "captions": f"up to {config.text.max_tokens} tokens",
        "parameters": f"{parameters / 1e6:.1f} million",
    }
    sections = [
        "---\nlicense: unknown\nlibrary_name: fastclap\npipeline_tag: zero-shot-audio-classification\n"
        "tags:\n- clap\n- speech\n- audio-text-retrieval\n---",
        "# A dual encoder of speech and text",
        "Clips and descriptions of how they sound, as unit vectors in one space: their cosine says how well they go "
        "together. For retrieval in both directions, zero-shot classification, style similarity, and choosing the best "
        "of several synthesised clips.",
        *([origin] if origin else []),
        _table(("", "what it is"), facts.items()),
        "## Usage",
        _usage(model),
        *(_training(Path(run)) if run is not None else ()),
        "## Limits",
        "It knows the voices, languages and descriptions of its training data. Judgements about speakers (age, sex, "
        "accent, emotion) are those of the captions it learned from and are wrong for many people; do not use them to "
        "decide about anyone.",
    ]
    return "\n\n".join(sections) + "\n"


def published_at(card: str, repo_id: str) -> str:
    """The card with its example reading the model from the hub."""
    return card.replace(f"{_HERE}  # this folder", f'CLAP.from_pretrained("{repo_id}")')


def _usage(model: CLAP) -> str:
    lines = ["```python", "import torch", "from fastclap import CLAP", ""]
    lines += [f"model = {_HERE}  # this folder", f"clips = [torch.randn({model.sampling_rate})]  # or audio files"]
    if model.tokenizer is None:
        lines += [f"print(model.embed_audio(clips, sampling_rate={model.sampling_rate}).shape)"]
    else:
        lines += [
            'captions = ["A person is speaking in a calm style.", "A person is speaking in an angry style."]',
            f"cosines = model.similarity(clips, captions, sampling_rate={model.sampling_rate})",
            "print(cosines)  # [clips, captions]",
        ]
    return "\n".join([*lines, "```"])


def _audio_tower(config: AudioTowerConfig) -> str:
    if config.kind == "log-mel":
        return f"transformer on log-mel features ({config.features}), {config.layers} layers of width {config.width}"
    return _transformers_tower(config.kind, config)


def _text_tower(config: TextTowerConfig) -> str:
    if config.kind == "small":
        return f"transformer, {config.layers} layers of width {config.width}, {config.pooling} pooling"
    return f"{_transformers_tower('transformers', config)}, {config.pooling} pooling"


def _transformers_tower(kind: str, config: AudioTowerConfig | TextTowerConfig) -> str:
    fields = config.hf_config or {}
    name = str(fields.get("model_type", kind)).replace("clap_audio_model", "CLAP-HTSAT")
    layers = fields.get("depths") or fields.get("num_hidden_layers") or fields.get("encoder_layers")
    width = fields.get("patch_embeds_hidden_size") or fields.get("hidden_size") or fields.get("d_model")
    source = config.pretrained
    # a folder on somebody's disk tells nobody anything
    start = f", started from {source}" if source is not None and not os.path.exists(source) else ""
    return f"{name}, layers {layers}, width {width}{start}"


def _training(run: Path) -> Iterator[str]:
    config = _read_yaml(run / "config.yaml")
    data = config.get("data", {})
    if isinstance(data, dict) and data.get("train"):
        sources = ", ".join(_public_name(str(source)) for source in data["train"])
        optimizer = config.get("optimizer", {})
        facts = {
            "training data": sources,
            "loss": config.get("loss", {}).get("kind"),
            "global batch": config.get("batch_size"),
            "steps": config.get("steps"),
            "learning rate": optimizer.get("learning_rate"),
            "seed": config.get("seed"),
        }
        yield "## Training"
        yield _table(("", "value"), ((name, value) for name, value in facts.items() if value is not None))
    record = _last_validation(run / "metrics.jsonl")
    rows = list(_figures(record))
    if rows:
        yield "## Figures"
        yield f"Validation at step {record['step']}, in per cent:"
        yield _table(("figure", "%"), rows)


def _figures(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    names = {"audio_to_text": "audio → text", "text_to_audio": "text → audio"}
    for captions, directions in record.get("retrieval", {}).items():
        for direction, title in names.items():
            for figure in ("R@1", "R@5", "R@10", "mAP@10"):
                if figure in directions.get(direction, {}):
                    yield f"{captions} captions, {title}, {figure}", f"{100 * directions[direction][figure]:.1f}"
    for column, figures in record.get("classification", {}).items():
        for figure, title in (("accuracy", "accuracy"), ("uar", "UAR"), ("macro_f1", "macro-F1")):
            if figure in figures:
                yield f"{column}, {title}", f"{100 * figures[figure]:.1f}"


def _last_validation(path: Path) -> dict[str, Any]:
    last: dict[str, Any] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record.get("kind") == "valid":
                last = record
    except (OSError, ValueError, AttributeError):  # no figures are better than no model
        return {}
    return last


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def _public_name(source: str) -> str:
    return source if source.startswith("hf:") else Path(source).name


def _table(head: tuple[str, str], rows: Any) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {str(value).replace('|', ' ')} |" for name, value in rows])
