"""LAION-CLAP's own class next to ours, in its two published sizes, where the package laion_clap is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from fastclap.models.clap import read_checkpoint
from fastclap.models.tokenizer import Tokenizer, train_tokenizer
from fastclap.testing import assert_close_rel

CAPTIONS = ["A man speaks in an angry tone.", "A woman sounds sad.", "Calm."]
AUDIO: dict[str, Any] = {
    "audio_length": 1024,
    "clip_samples": 480000,
    "mel_bins": 64,
    "sample_rate": 48000,
    "window_size": 1024,
}
AUDIO |= {"hop_size": 480, "fmin": 50, "fmax": 14000, "class_num": 527, "model_type": "HTSAT"}
TEXT = {"context_length": 77, "vocab_size": 400, "width": 512, "heads": 8, "layers": 12, "model_type": "roberta"}


@pytest.fixture(scope="module")
def laion_clap() -> ModuleType:
    """Its models. What it imports for images and data sets, and never runs here, need not be installed."""
    if importlib.util.find_spec("laion_clap") is None:
        pytest.skip("laion_clap is not installed")
    pytest.importorskip("torchlibrosa", reason="torchlibrosa is not installed")
    # loaded before there is a torchvision that it would take for a real one
    from transformers import BartModel, BartTokenizer, BertModel, BertTokenizer, RobertaModel, RobertaTokenizer

    assert all((BartModel, BartTokenizer, BertModel, BertTokenizer, RobertaModel, RobertaTokenizer))
    names = ["torchvision", "torchvision.ops", "torchvision.ops.misc", "torchvision.transforms", "torchvision.datasets"]
    names += ["webdataset", "wget", "h5py", "braceexpand", "ftfy", "pandas", "progressbar"]
    absent = [name for name in names if importlib.util.find_spec(name.split(".")[0]) is None]
    sys.modules.update({name: mock.MagicMock() for name in absent})
    try:
        import laion_clap.clap_module.model
        import laion_clap.training.data
    finally:
        for name in absent:
            del sys.modules[name]
    return laion_clap


def spread(model: torch.nn.Module) -> None:
    """Norms, biases and running statistics start at constants."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.1 * torch.rand_like(tensor))


@pytest.mark.parametrize(("size", "width", "depths"), [("tiny", 96, [2, 2, 6, 2]), ("base", 128, [2, 2, 12, 2])])
def test_their_checkpoint_gives_their_embeddings(
    laion_clap: Any, size: str, width: int, depths: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """630k-audioset-best.pt is tiny; music_audioset_epoch_15_esc_90.14.pt and music_speech_… are base."""
    from transformers import RobertaConfig, RobertaModel

    theirs = laion_clap.clap_module.model
    roberta = RobertaConfig(
        vocab_size=400, num_hidden_layers=2, max_position_embeddings=100, layer_norm_eps=1e-5, type_vocab_size=1
    )
    monkeypatch.setattr(theirs.RobertaModel, "from_pretrained", lambda name: RobertaModel(roberta))
    torch.manual_seed(0)
    audio = {**AUDIO, "model_name": size}
    model = theirs.CLAP(8 * width, audio, dict(TEXT)).eval()
    spread(model)
    weights = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 15, "name": "music", "state_dict": weights}, tmp_path / "music_audioset.pt")
    tokenizer = roberta_tokenizer()
    ours = read_checkpoint(tmp_path / "music_audioset.pt", tokenizer=tokenizer)
    fields = ours.config.audio.hf_config or {}
    assert fields["patch_embeds_hidden_size"] == width and fields["depths"] == depths
    assert fields["hidden_size"] == 8 * width == ours.audio_branch.width and ours.config.head.dim == 512

    generator = torch.Generator().manual_seed(0)
    waves = [0.1 * torch.randn(round(48000 * seconds), generator=generator) for seconds in (0.5, 3.0, 10.0)]
    features = laion_clap.training.data.get_audio_features
    samples = [features({}, wave, 480000, "rand_trunc", "repeatpad", audio) for wave in waves]
    with torch.no_grad():
        expected = model.get_audio_embedding(samples), model.get_text_embedding(tokenizer(CAPTIONS, 77))
    for vectors in expected:  # different inputs have different ones
        assert (vectors - vectors.mean(0)).norm() > 0.02 * vectors.norm()
    assert_close_rel("audio", expected[0], ours.embed_audio(waves, sampling_rate=48000), 1e-5)
    assert_close_rel("text", expected[1], ours.embed_text(CAPTIONS), 1e-5)
    assert ours.log_logit_scale.item() == model.logit_scale_a.item()


def roberta_tokenizer() -> Tokenizer:
    """A small vocabulary with RoBERTa's padding id."""
    tokenizer = train_tokenizer(CAPTIONS, 400)
    tokenizer.backend.enable_padding(pad_id=1, pad_token="[CLS]")
    return tokenizer
