"""The benchmark wrapper: mteb's encoder protocol, its batches, and a task of mteb itself where that is installed."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastclap import CLAP
from fastclap.apps.mteb_model import MTEBEncoder
from fastclap.errors import ConfigError, DataError
from fastclap.testing import assert_close_rel

TEXTS = ["A calm voice.", "An angry deep voice.", "A person is speaking."]


def clips(rate: int = 16000) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [{"array": random.normal(0, 0.1, 4000 + 800 * i), "sampling_rate": rate} for i in range(3)]


def loader(rows: list[dict[str, Any]]) -> Any:
    return DataLoader(
        rows, batch_size=2, collate_fn=lambda batch: {key: [row[key] for row in batch] for key in batch[0]}
    )


def test_texts_and_clips_in_the_order_of_the_loader(clap_folder: str) -> None:
    encoder, model = MTEBEncoder(clap_folder, device="cpu"), CLAP.from_pretrained(clap_folder)
    options: dict[str, Any] = {"task_metadata": None, "hf_split": "test", "hf_subset": "default", "prompt_type": None}
    text = encoder.encode(loader([{"text": text} for text in TEXTS]), show_progress_bar=False, **options)
    assert_close_rel("text", model.embed_text(TEXTS), torch.from_numpy(text), 1e-5)
    audio = encoder.encode(loader([{"audio": clip} for clip in clips()]), batch_size=2, **options)
    expected = model.embed_audio([clip["array"] for clip in clips()])
    assert_close_rel("audio", expected, torch.from_numpy(audio), 1e-5)
    both = encoder.encode(loader([{"text": t, "audio": c} for t, c in zip(TEXTS, clips(), strict=True)]), **options)
    fused = torch.nn.functional.normalize(model.embed_text(TEXTS) + expected, dim=1)
    assert_close_rel("both", fused, torch.from_numpy(both), 1e-5)


def test_rates_and_channels(clap_folder: str) -> None:
    encoder = MTEBEncoder(CLAP.from_pretrained(clap_folder))
    mixed = [clips()[0], clips(48000)[1], {"array": np.stack([clips()[2]["array"]] * 2), "sampling_rate": 16000}]
    found = torch.from_numpy(encoder.encode(loader([{"audio": clip} for clip in mixed])))
    for index, (clip, rate) in enumerate(((clips()[0], 16000), (clips()[1], 48000), (clips()[2], 16000))):
        expected = encoder.model.embed_audio([clip["array"]], sampling_rate=rate)
        assert_close_rel(f"clip {index}", expected[0], found[index], 1e-5)


def test_similarities_and_what_is_refused(clap_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = MTEBEncoder(clap_folder, device="cpu")
    first, second = np.random.default_rng(0).normal(size=(2, 4, 8))
    unit = [matrix / np.linalg.norm(matrix, axis=1, keepdims=True) for matrix in (first, second)]
    assert np.allclose(encoder.similarity(first, second), unit[0] @ unit[1].T, atol=1e-6)
    assert np.allclose(encoder.similarity_pairwise(first, second), (unit[0] * unit[1]).sum(1), atol=1e-6)
    with pytest.raises(DataError, match="neither 'text' nor 'audio', but image"):
        encoder.encode([{"image": [1]}])
    with pytest.raises(DataError, match="nothing to encode"):
        encoder.encode([])
    assert np.isfinite(encoder.encode([{"text": ["", "A voice."]}])).all(), "benchmarks hold blank texts"
    monkeypatch.setitem(sys.modules, "mteb.models", None)
    with pytest.raises(ConfigError, match="pip install mteb"):
        _ = encoder.mteb_model_meta


def test_a_task_of_mteb_runs(clap_folder: str) -> None:
    mteb = pytest.importorskip("mteb")
    pytest.importorskip("sentence_transformers", reason="mteb.evaluate imports it")
    import datasets
    from mteb.mocks import MockAudioZeroshotClassificationTask
    from mteb.models import EncoderProtocol

    class Task(MockAudioZeroshotClassificationTask):
        def load_data(self, **_: Any) -> None:  # mteb's own clips need torchcodec, to be written and read
            rows = [{"array": clip["array"].tolist(), "sampling_rate": 16000} for clip in clips()]
            self.dataset = {"test": datasets.Dataset.from_dict({"audio": rows, "label": [0, 1, 0]})}
            self.data_loaded = True

    encoder = MTEBEncoder(clap_folder, "first", device="cpu", name="fastclap/tiny")
    assert isinstance(encoder, EncoderProtocol)
    meta = encoder.mteb_model_meta
    assert (meta.name, meta.revision, meta.modalities) == ("fastclap/tiny", "first", ["audio", "text"])
    task = Task()
    result = mteb.evaluate(encoder, task, cache=None)
    (scores,) = result.task_results[0].scores["test"]
    cosines = encoder.model.similarity([clip["array"] for clip in clips()], task.get_candidate_labels())
    correct = cosines.argmax(1) == torch.tensor([0, 1, 0])
    assert scores["accuracy"] == pytest.approx(correct.float().mean().item())
