"""Tags and their prompts: one vocabulary, one draw a step, the same batch of texts as the captions."""

from __future__ import annotations

import functools
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastclap.data import ClipDataset, Manifest, Row, load_manifest
from fastclap.data.tags import TagPrompts
from fastclap.errors import DataError
from fastclap.models.tokenizer import train_tokenizer


def manifest_of(*tags: tuple[str, ...], label: str | None = None) -> Manifest:
    return Manifest(
        Row(f"{i}.wav", ("x",), (), {"style": own} if own else {}, label, 1.0, None, f"m:{i}", 0)
        for i, own in enumerate(tags)
    )


def test_vocabulary_and_targets() -> None:
    manifest = manifest_of(("Husky", "deep "), (), ("crisp", "deep", "Deep"))
    tags = TagPrompts(manifest, "style")
    assert tags.vocabulary == ["crisp", "deep", "husky"]
    rows = [*manifest, Row("n.wav", ("x",), (), {"style": ("deep", "unheard")}, None, 1.0, None, "n:1", 0)]
    assert tags.targets(rows).tolist() == [
        [False, True, True],
        [False, False, False],
        [True, True, False],
        [False, True, False],
    ]
    assert TagPrompts(manifest_of((), label="Happy"), "classification_tag").vocabulary == ["happy"]


def test_prompts_are_drawn_uniformly_and_by_step_alone(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.json"
    path.write_text(json.dumps({"Deep": ["low", "sonorous", "bass"], "unused": ["?"]}))
    manifest = manifest_of(("deep",), ("crisp",))
    tags = TagPrompts(manifest, "style", path, seed=7)
    draws = [tags.draw(step) for step in range(3000)]
    assert {crisp for crisp, _ in draws} == {"A person is speaking in a crisp style."}
    counts = Counter(deep for _, deep in draws)
    assert set(counts) == {"low", "sonorous", "bass"} and all(abs(n - 1000) < 130 for n in counts.values())
    again = pickle.loads(pickle.dumps(tags))
    assert [again.draw(step) for step in (2999, 5, 0)] == [draws[2999], draws[5], draws[0]]
    assert [TagPrompts(manifest, "style", path, seed=8).draw(step) for step in range(50)] != draws[:50]


def test_prompts_ride_with_the_captions(make_set: Callable[..., str]) -> None:
    """A prompt that is also a caption is encoded once; every clip and every tag finds its text."""
    own = [("deep", "husky"), (), ("crisp",), ("husky",), (), ("deep",)]
    caption = "A person is speaking in a husky style."
    manifest = Manifest(
        row._replace(tags={"style": tags}, captions=(caption,) if index == 3 else row.captions)
        for index, (row, tags) in enumerate(zip(load_manifest(make_set(6)), own, strict=True))
    )
    tokenizer = train_tokenizer([caption for row in manifest for caption in row.captions], 300)
    tags = TagPrompts(manifest, "style")
    batch = ClipDataset(manifest, 16000, seed=0, tokenize=functools.partial(tokenizer, max_tokens=40), tags=tags)[
        4, 0, [0, 3, 5]
    ]
    assert batch.text is not None and batch.text_rows is not None and batch.prompt_rows is not None
    assert batch.prompts == tags.draw(4) and batch.tags is not None
    assert torch.equal(batch.tags, tags.targets([manifest[row] for row in batch.rows])) and batch.tags.any()
    texts = list(dict.fromkeys([*batch.captions, *batch.prompts]))
    assert caption in batch.captions and len(texts) < len({*batch.captions}) + len(batch.prompts)
    assert len(batch.text["input_ids"]) == len(texts) == len(batch.tokens)
    assert [texts[row] for row in batch.text_rows.tolist()] == batch.captions
    assert [texts[row] for row in batch.prompt_rows.tolist()] == batch.prompts


def test_recurring_rows_get_new_crops_and_captions(make_set: Callable[..., str]) -> None:
    manifest = load_manifest(make_set(4))
    for repeats in (False, True):
        dataset = ClipDataset(manifest, 16000, seed=0, crop_seconds=0.1, repeats=repeats)
        crops = {tuple(dataset[step, 0, [2]].audio[0].tolist()) for step in range(10)}
        assert (len(crops) > 5) if repeats else (len(crops) == 1)


def test_unusable_tags(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^--data\.tag-column pitch: no row of rows has a tag in it; the columns of tags are: style$"
    ):
        TagPrompts(manifest_of(("deep",)), "pitch")
    with pytest.raises(DataError, match=r"nowhere\.json"):
        TagPrompts(manifest_of(("deep",)), "style", tmp_path / "nowhere.json")
