"""The released CLSP, wrapped: the interface of `fastclap.CLAP` for embeddings, and no code that was not agreed to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclap.errors import ConfigError, DataError, ModelError
from fastclap.models.clsp import CLSP, load_clsp
from fastclap.testing import assert_close_rel

CAPTIONS = ["A man speaks in an angry tone.", "A woman sounds sad.", "Calm.", "A sad man, softly."]


def clips(*seconds: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(round(16000 * length), generator=generator) for length in seconds]


CLSP_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel


class MadeUpConfig(PretrainedConfig):
    model_type = "made-up-clsp"


class MadeUpModel(PreTrainedModel):
    config_class = MadeUpConfig

    def __init__(self, config):
        super().__init__(config)
        self.audio = torch.nn.Linear(2, 4)
        self.letters = torch.nn.Embedding(128, 4)
        self.post_init()

    def forward(self, audio=None, audio_lens=None, text=None):
        a = b = None
        if audio is not None:
            assert audio.dtype == torch.float32 and audio.abs().max() <= 1
            rows = [wave[:size] for wave, size in zip(audio, audio_lens.tolist())]
            a = self.audio(torch.stack([torch.stack([row.mean(), row.std()]) for row in rows]))
            a = torch.nn.functional.normalize(a, dim=-1)
        if text is not None:
            b = torch.stack([self.letters(torch.tensor([ord(c) % 128 for c in t])).mean(0) for t in text])
            b = torch.nn.functional.normalize(b, dim=-1)
        return a, b, torch.tensor(20.0)
"""


@pytest.fixture
def clsp_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Code and weights with the interface of the released model."""
    from safetensors.torch import save_file
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "made_up_clsp"
    folder.mkdir()
    (folder / "modeling.py").write_text(CLSP_CODE)
    names = {"AutoConfig": "modeling.MadeUpConfig", "AutoModel": "modeling.MadeUpModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "made-up-clsp", "auto_map": names}))
    generator = torch.Generator().manual_seed(0)
    shapes = {"audio.weight": (4, 2), "audio.bias": (4,), "letters.weight": (128, 4)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_clsp_has_the_interface_of_clap(clsp_folder: Path) -> None:
    model = load_clsp(clsp_folder, trust_remote_code=True)
    waves = clips(0.5, 0.1, 0.3)
    audio, text = model.embed_audio(waves, batch_size=2), model.embed_text(CAPTIONS, batch_size=3)
    base: Any = model.base
    with torch.no_grad():
        for index, wave in enumerate(waves):
            expected = base(audio=wave[None], audio_lens=torch.tensor([len(wave)]))[0]
            assert_close_rel(f"clip {index}", expected, audio[index : index + 1], 1e-5)
        for index, caption in enumerate(CAPTIONS):
            assert_close_rel(caption, base(text=[caption])[1], text[index : index + 1], 1e-5)
    torch.testing.assert_close(model.similarity(waves, CAPTIONS), audio @ text.T)
    int16 = [(wave * 32768).short() for wave in waves]
    assert_close_rel("int16", audio, model.embed_audio(int16), 1e-3)
    assert not model.training and model.sampling_rate == 16000 and not audio.requires_grad


def test_clsp_is_evaluated_like_any_model(clsp_folder: Path, tmp_path: Path) -> None:
    import soundfile

    from fastclap.data import load_manifest
    from fastclap.evaluation import evaluate

    lines = []
    for index, wave in enumerate(clips(0.5, 0.3, 0.4)):
        soundfile.write(tmp_path / f"{index}.wav", wave.numpy() / (1 + index), 16000)
        lines.append({"audio": f"{index}.wav", "text_description": CAPTIONS[index]})
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = load_clsp(clsp_folder, trust_remote_code=True)
    result = evaluate(model, load_manifest(str(tmp_path / "clips.jsonl")), tasks=[])
    cosines = model.similarity([tmp_path / f"{index}.wav" for index in range(3)], CAPTIONS[:3])
    first = (cosines.argmax(1) == torch.arange(3)).float().mean().item()
    assert result["retrieval"]["global"]["audio_to_text"]["R@1"] == pytest.approx(first)


def test_clsp_needs_consent_and_names_what_is_wrong(clsp_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="would run with your rights; read it, then agree with trust_remote_code=True"
    ):
        load_clsp(clsp_folder)
    with pytest.raises(ModelError, match="absent: the model could not be loaded"):
        load_clsp(tmp_path / "absent", trust_remote_code=True)
    model = CLSP(torch.nn.Linear(1, 1))
    for texts, message in ((["sad", " "], "text 1 is blank"), ([3], "text 0 is 3, not a string"), ("sad", "not 'sad'")):
        with pytest.raises(DataError, match=message):
            model.embed_text(texts)  # type: ignore[arg-type]
