"""No code of a model folder runs, whatever its configuration asks for and whatever a user would answer."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import WavLMConfig

from fastclap.config import AudioTowerConfig, TextTowerConfig
from fastclap.errors import ConfigError, ModelError
from fastclap.models.audio_towers import build_audio_tower
from fastclap.models.text_towers import build_text_tower

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose code leaves a file, of a user who says yes to everything."""
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import WavLMConfig, WavLMModel\n"
        "class Config(WavLMConfig): model_type = 'evil'\n"
        "class Model(WavLMModel): pass\n"
    )
    mapped = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": mapped, **SMALL}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    return tmp_path


@pytest.mark.parametrize("side", ["audio", "text"])
def test_a_folders_code_is_not_run(folder: Path, side: str, capfd: Any) -> None:
    with pytest.raises(ModelError, match="custom code"):
        if side == "audio":
            build_audio_tower(AudioTowerConfig(kind="wav2vec2", pretrained=str(folder)))
        else:
            build_text_tower(TextTowerConfig(kind="hf", pretrained=str(folder)))
    assert not (folder / "ran").exists() and "[y/N]" not in capfd.readouterr().out  # nor is the user asked


@pytest.mark.parametrize("options", [{"trust_remote_code": True}, {"attn_implementation": "org/kernel"}])
def test_a_configuration_cannot_allow_it(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="would run code from the hub"):
        build_audio_tower(AudioTowerConfig(kind="wav2vec2", pretrained=str(folder), hf_config=options))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_from_the_hub_is_refused(folder: Path, key: str) -> None:
    (folder / "config.json").write_text(json.dumps({**WavLMConfig(**SMALL).to_dict(), key: "org/kernel"}))
    with pytest.raises(ModelError, match=r"org/kernel.*code from the hub"):
        build_audio_tower(AudioTowerConfig(kind="wav2vec2", pretrained=str(folder)))
