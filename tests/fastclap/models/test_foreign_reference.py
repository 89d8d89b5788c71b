"""ParaSpeechCLAP's own code next to ours: it saves a random model, and both embed, retrieve and choose the best of N.

These tests run where FASTCLAP_REFERENCE names a checkout of it. Its `scripts/best_of_n.py` and its retrieval metrics
run as released, on files read by soundfile (torchaudio wants another package for that).
"""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from bench import reference_step
from bench.reference_step import Reference
from bench.run import SIZES
from fastclap import CLAP
from fastclap.evaluation import retrieval
from fastclap.models.tokenizer import Tokenizer, train_tokenizer
from fastclap.testing import assert_close_rel

PROMPTS = ["A man speaks in an angry tone.", "A woman whispers sadly, at a slow pace.", "Calm."]
CANDIDATES = 3


class Settings(SimpleNamespace):
    """What its scripts read from their configuration files."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def write_candidates(folder: Path) -> list[list[Path]]:
    """Voices of different pitch, brightness and length, [prompt][candidate]."""
    generator = np.random.default_rng(0)
    paths: list[list[Path]] = [[] for _ in PROMPTS]
    for index in range(CANDIDATES):
        audios = folder / f"iter_{index + 1}" / "audios"
        audios.mkdir(parents=True)
        for prompt in range(len(PROMPTS)):
            time = np.arange(round(16000 * (0.3 + 0.1 * index + 0.07 * prompt))) / 16000
            pitch = 90 * 1.7 ** (index + prompt)
            wave = sum(np.sin(2 * np.pi * pitch * k * time) / k ** (0.5 + 0.3 * index) for k in range(1, 8))
            wave = 0.1 * wave * (1 + 0.5 * np.sin(2 * np.pi * 4 * time)) + 0.01 * generator.standard_normal(len(time))
            paths[prompt].append(audios / f"{prompt}.wav")
            soundfile.write(paths[prompt][-1], wave, 16000, subtype="PCM_16")
        for name in ("input_descriptions", "wer_per_example", "output_transcriptions"):
            (audios.parent / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return paths


@pytest.mark.parametrize(("size", "sharpness"), [("tiny", 8), pytest.param("large", 4, marks=pytest.mark.slow)])
def test_their_checkpoint_gives_their_results(
    reference: Path, size: str, sharpness: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchaudio
    from transformers import PreTrainedTokenizerFast, Wav2Vec2FeatureExtractor

    torch.manual_seed(0)
    towers = SIZES[size]
    # a head for every 64 channels, as in the published text tower: no shape depends on it
    heads = {"num_attention_heads": towers.xlm_roberta["hidden_size"] // 64}
    towers = replace(towers, xlm_roberta={**towers.xlm_roberta, **heads})
    theirs: Any = Reference(reference, towers, torch.device("cpu")).model.eval()
    # A random model attends almost uniformly and takes all captions for the same. The sharper it attends, the more its
    # depth magnifies rounding: at 8, 24 layers in float32 are 9e-5 from float64, in their code and in ours.
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            sharper = any(part in name for part in ("query", "key", "q_proj", "k_proj", "word_embeddings"))
            weight.mul_(sharpness if sharper else 1)
    torch.save(theirs.state_dict(), tmp_path / "last.pth.tar")

    tokenizer = train_tokenizer(PROMPTS, 400)
    copy = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
    their_tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy, pad_token="[PAD]")
    paths = write_candidates(tmp_path / "candidates")

    def read(path: str) -> tuple[Tensor, int]:
        wave, rate = soundfile.read(path, dtype="float32")
        return torch.from_numpy(wave)[None], rate

    monkeypatch.setattr(torchaudio, "load", read)
    settings = Settings(
        input_base_dir=str(tmp_path / "candidates"),
        num_iterations=CANDIDATES,
        output_dir_name="best",
        audio_processing=SimpleNamespace(target_sr=16000),
        meta=Settings(batch_size=2, num_workers=0, tqdm_disable=True, selection_summary_file="summary.json"),
    )
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)  # as of WavLM-Large
    best_of_n = reference_step.load(reference, "best_of_n")
    best_of_n.select_best_of_n(settings, theirs, their_tokenizer, extractor, torch.device("cpu"))
    summary = json.loads((tmp_path / "candidates/best/summary.json").read_text())

    # one clip at a time, without any padding
    with torch.no_grad():
        audio = [
            theirs.get_audio_embedding(
                extractor(read(str(path))[0][0], sampling_rate=16000, return_tensors="pt").input_values
            )
            for clips in paths
            for path in clips
        ]
        tokens = best_of_n.tokenize_texts_batch(PROMPTS, their_tokenizer)
        text = theirs.get_text_embedding(dict(tokens))
    their_audio = torch.cat(audio)
    owners = [prompt for prompt in range(len(PROMPTS)) for _ in range(CANDIDATES)]
    metrics = importlib.import_module("paraspeechclap.evaluation_utils").calculate_audio_to_text_retrieval_metrics(
        their_audio @ text.T, owners
    )
    del theirs

    ours = CLAP.from_pretrained(tmp_path / "last.pth.tar", tokenizer=as_saved(tokenizer, tmp_path))
    our_audio = ours.embed_audio([path for clips in paths for path in clips])
    our_text = ours.embed_text(PROMPTS)
    assert_close_rel("audio", their_audio, our_audio, 1e-5)
    assert_close_rel("text", text, our_text, 1e-5)

    cosines = (our_audio @ our_text.T).unflatten(0, (len(PROMPTS), CANDIDATES))
    for prompt, row in enumerate(sorted(summary, key=lambda row: row["prompt_idx"])):
        scores = cosines[prompt, :, prompt]
        expected = torch.tensor([row["all_scores"][str(index + 1)] for index in range(CANDIDATES)])
        assert (scores - expected).abs().max() < 1e-5
        assert scores.argmax() + 1 == row["best_iteration_idx"]
        copied = (tmp_path / f"candidates/best/audios/{prompt}.wav").read_bytes()
        assert copied == paths[prompt][int(scores.argmax())].read_bytes()
    figures = retrieval(our_audio, our_text, owners, range(len(PROMPTS)))["audio_to_text"]
    for k in (1, 5, 10):
        assert 100 * figures[f"R@{k}"] == pytest.approx(metrics[f"R@{k}_A2T"])
    assert figures["median_rank"] == metrics["MedR_A2T"]
    assert figures["mean_rank"] == pytest.approx(metrics["MeanR_A2T"])


def as_saved(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.save(folder / "tokenizer.json")
    return folder / "tokenizer.json"
