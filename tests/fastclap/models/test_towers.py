"""Audio and text towers: padding never shows, masks stay inside the clip, transformers' models are themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import ConfigError, ModelError
from fastclap.features import LogMel
from fastclap.models.audio_towers import (
    LogMelTower,
    Wav2Vec2Tower,
    build_audio_tower,
    proportional_spans,
)
from fastclap.models.augmentation import uniform_spans, warp_bands
from fastclap.models.clap import CLAP
from fastclap.models.cnn14 import Cnn14Tower
from fastclap.models.fixed_window import FixedWindowTower
from fastclap.models.layers import length_mask
from fastclap.models.text_towers import build_text_tower
from fastclap.testing import assert_close_rel

WAV2VEC2 = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_length": 2,
    "mask_time_prob": 0.3,
}
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, **WAV2VEC2}
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50,
}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "max_source_positions": 50,
}
AST = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_length": 128,
    "num_mel_bins": 32,
}
HTSAT = {
    "patch_embeds_hidden_size": 4,
    "hidden_size": 8,
    "depths": [1, 1],
    "num_attention_heads": [1, 2],
    "spec_size": 256,
}
PE_AUDIO = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "dac_config": {"encoder_hidden_size": 2, "downsampling_ratios": [2, 8, 10, 12], "hidden_size": 8},
}
TOWERS: dict[str, dict[str, Any]] = {
    "log-mel": {"width": 16, "layers": 2, "heads": 2},
    "log-mel time": {"width": 16, "layers": 1, "heads": 2, "convolution": "time", "pooling": "mean", "subsampling": 2},
    "log-mel attention": {"width": 16, "layers": 1, "heads": 2, "pooling": "attention", "features": "whisper"},
    "log-mel clip": {"width": 16, "layers": 0, "feature_normalization": "clip", "pooling": "statistics"},
    "wavlm": {"kind": "wav2vec2", "hf_config": {"model_type": "wavlm", **LAYER_NORM}},
    "wav2vec2": {"kind": "wav2vec2", "hf_config": {"model_type": "wav2vec2", "feat_extract_norm": "group", **WAV2VEC2}},
    "hubert": {"kind": "wav2vec2", "hf_config": {"model_type": "hubert", **LAYER_NORM}},
    "whisper": {"kind": "whisper", "hf_config": WHISPER},
    "ast": {"kind": "ast", "hf_config": AST},
    "clap-htsat": {"kind": "clap-htsat", "hf_config": HTSAT},
    "clap-htsat cut": {"kind": "clap-htsat", "hf_config": HTSAT, "clip_seconds": 0.7, "repeat": "cut"},
    "cnn14": {"kind": "cnn14", "clip_seconds": 0.7, "repeat": "cut", "convolution_channels": 8, "width": 16},
    "pe-audio": {"kind": "pe-audio", "hf_config": PE_AUDIO},
}


def tower_of(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return build_audio_tower(AudioTowerConfig(**{**TOWERS[name], **changes}))


def clips(sampling_rate: int, *seconds: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.1 * torch.randn(int(part * sampling_rate) + 5, generator=generator) for part in seconds]


def padded(waves: list[Tensor], more: int = 0) -> tuple[Tensor, Tensor]:
    batch = F.pad(torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), (0, more))
    return batch, torch.tensor([len(wave) for wave in waves])


# -- lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
def test_embedding_is_the_same_alone_in_a_batch_and_padded(name: str) -> None:
    torch.manual_seed(0)
    text = TextTowerConfig(width=16, layers=1, heads=2)
    model = CLAP(CLAPConfig(audio=AudioTowerConfig(**TOWERS[name]), text=text, head=HeadConfig(dim=8)))
    rate = model.sampling_rate
    waves = clips(rate, 0.9, 0.31, 0.55, 0.31, 0.01)
    alone = torch.cat([model.embed_audio([wave], sampling_rate=rate) for wave in waves])
    together = model.embed_audio(waves, sampling_rate=rate)
    batch, lengths = padded(waves, more=1234)
    batch = batch.masked_fill(~length_mask(lengths, batch.shape[1]), torch.nan)
    in_padding = model.embed_audio(batch, lengths, sampling_rate=rate)
    assert (alone - together).abs().max() < 1e-5
    assert (alone - in_padding).abs().max() < 1e-5
    assert (together[0] - together[1]).abs().max() > 1e-3  # and it does depend on the clip
    torch.testing.assert_close(together.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("name", TOWERS)
def test_a_model_that_is_read_is_the_one_that_was_written(name: str, tmp_path: Path) -> None:
    """Reading draws no random numbers, and everything that is not in the file is made as ever."""
    text = TextTowerConfig(width=16, layers=1, heads=2)
    model = CLAP(CLAPConfig(audio=AudioTowerConfig(**TOWERS[name]), text=text, head=HeadConfig(dim=8)))
    model.save_pretrained(tmp_path / "model")
    state = torch.get_rng_state()
    again = CLAP.from_pretrained(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    for kind in ("named_parameters", "named_buffers"):
        wanted, found = dict(getattr(model, kind)()), dict(getattr(again, kind)())
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            assert torch.equal(value, found[key]) and value.requires_grad == found[key].requires_grad, key


@pytest.mark.parametrize("name", [name for name in TOWERS if name not in ("wav2vec2", "pe-audio")])
def test_padding_has_no_influence_and_no_gradient(name: str) -> None:
    tower = tower_of(name).eval()
    assert not tower.equal_lengths_only
    batch, lengths = padded(clips(tower.sampling_rate, 0.5, 0.3))
    with torch.no_grad():
        expected = tower(batch, lengths)
        garbage = batch.masked_fill(~length_mask(lengths, batch.shape[1]), 1e4)
        torch.testing.assert_close(tower(F.pad(garbage, (0, 999), value=torch.nan), lengths), expected)
    garbage.requires_grad_()
    tower(garbage, lengths).square().sum().backward()
    assert garbage.grad is not None and torch.isfinite(garbage.grad).all()
    assert garbage.grad[1, lengths[1] :].abs().max() == 0
    assert garbage.grad[1, : lengths[1]].abs().max() > 0


def test_what_sees_padding_is_declared() -> None:
    assert tower_of("wav2vec2").equal_lengths_only  # a group norm over time
    assert tower_of("pe-audio").equal_lengths_only  # convolutions beyond the end
    assert tower_of("wavlm").min_samples == 400


@pytest.mark.parametrize("name", TOWERS)
def test_int16_is_the_waveform_times_32768(name: str) -> None:
    tower = tower_of(name).eval()
    integers, lengths = padded([(wave * 32768).short() for wave in clips(tower.sampling_rate, 0.3, 0.2)])
    kept = integers.clone()
    with torch.no_grad():
        assert_close_rel(name, tower(integers.float() / 32768, lengths), tower(integers, lengths), 1e-6)
        out = tower(integers, lengths)
    assert out.shape == (2, tower.width) and out.dtype == torch.float32
    assert torch.equal(integers, kept)


@pytest.mark.parametrize("name", ["log-mel", "wavlm", "whisper", "clap-htsat"])
def test_lengths_none_means_all_samples(name: str) -> None:
    tower = tower_of(name).eval()
    batch = torch.stack(clips(tower.sampling_rate, 0.3, 0.3))
    with torch.no_grad():
        assert_close_rel(name, tower(batch, torch.full((2,), batch.shape[1])), tower(batch), 1e-6)


@pytest.mark.parametrize("name", ["log-mel", "wavlm", "ast"])
def test_trains_under_bfloat16_autocast(name: str) -> None:
    tower = tower_of(name).train()
    batch, lengths = padded(clips(tower.sampling_rate, 0.3, 0.2))
    with torch.autocast("cpu", torch.bfloat16):
        out = tower(batch, lengths)
    out.float().square().sum().backward()
    for key, parameter in tower.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), key
    reference = tower.eval()(batch, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close_rel(name, reference, tower(batch, lengths), 0.05)


# -- the log-mel tower ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["global", "per-mel", "clip"])
def test_feature_statistics_are_those_of_the_valid_frames(normalization: str) -> None:
    tower = tower_of("log-mel", feature_normalization=normalization, feature_options={"n_mels": 8})
    waves = clips(16000, 0.5, 0.2, 0.4)
    log_mel = LogMel("kaldi", n_mels=8)
    frames = [log_mel(wave[None])[0][0].double() for wave in waves]
    if normalization == "clip":
        frames = [frame - frame.mean() for frame in frames]
    stacked = torch.cat(frames)
    mean, std = stacked.mean(0), stacked.std(0, correction=0)
    if normalization != "per-mel":
        mean, std = stacked.mean().expand(8), stacked.std(correction=0).expand(8)
    tower.fit_feature_statistics([padded(waves[:2]), (waves[2][None], None)])
    torch.testing.assert_close(tower.feature_mean.double(), mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tower.feature_std.double(), std, atol=1e-5, rtol=1e-5)
    assert set(dict(tower.named_buffers())) == {"feature_mean", "feature_std"}
    with pytest.raises(ModelError, match="no audio"):
        tower.fit_feature_statistics([])


def test_clip_normalization_ignores_the_recording_level() -> None:
    wave = clips(16000, 0.3)[0][None]
    for normalization, same in (("clip", True), ("global", False)):
        tower = tower_of("log-mel", feature_normalization=normalization).eval()
        with torch.no_grad():
            assert torch.allclose(tower(wave), tower(0.5 * wave), atol=1e-4) == same


def test_pooling_by_hand() -> None:
    torch.manual_seed(0)
    x, valid = torch.randn(2, 5, 16), length_mask(torch.tensor([5, 3]), 5)
    pooled = {name: tower_of("log-mel", pooling=name) for name in ("mean", "statistics", "attention")}
    pooled["attention"].pooling.attention.data.normal_()
    for index, size in enumerate((5, 3)):
        part = x[index, :size]
        torch.testing.assert_close(pooled["mean"]._pool(x, valid)[index], part.mean(0))
        deviation = (part.var(0, correction=0) + 1e-5).sqrt()
        expected = torch.cat([part.mean(0), deviation])
        torch.testing.assert_close(pooled["statistics"]._pool(x, valid)[index], expected)
        weights = (part @ pooled["attention"].pooling.attention[0]).softmax(0)
        torch.testing.assert_close(pooled["attention"]._pool(x, valid)[index], weights @ part)
    assert pooled["statistics"].width == 32


def test_frequency_warp_stretches_the_mel_axis() -> None:
    """On features that are linear over the bands the interpolation is exact, so each clip shows its own factor."""
    torch.manual_seed(0)
    bands = torch.arange(40.0)
    warped = warp_bands(bands.expand(64, 3, 40), 0.1)
    factors = warped[:, 0, 20] / 20
    assert factors.min() > 0.9 and factors.max() < 1.1 and factors.std() > 0.03
    torch.testing.assert_close(warped, (bands * factors[:, None]).clamp(max=39)[:, None].expand(-1, 3, -1))


def test_random_draws_are_of_training_only_and_follow_the_torch_seed() -> None:
    tower = tower_of("log-mel", dropout=0.0, random_gain=6.0, frequency_warp=0.05)
    batch, lengths = padded(clips(16000, 0.5, 0.4))
    with torch.no_grad():
        tower.train()
        torch.manual_seed(3)
        first = tower(batch, lengths)
        second = tower(batch, lengths)
        torch.manual_seed(3)
        assert torch.equal(tower(batch, lengths), first)
        assert not torch.equal(first, second)
        tower.eval()
        assert torch.equal(tower(batch, lengths), tower(batch, lengths))
    plain = tower_of("log-mel", dropout=0.0, time_masks=0, frequency_masks=0).train()
    with torch.no_grad():
        assert torch.equal(plain(batch, lengths), plain.eval()(batch, lengths))


def test_rotary_positions_see_the_order_but_not_the_offset() -> None:
    tower = tower_of("log-mel", layers=1, dropout=0.0)
    block, width = tower.transformer.blocks[0], 16
    torch.manual_seed(0)
    x = torch.randn(1, 6, width)

    def at(offset: int) -> Tensor:
        rate = 10000 ** (-torch.arange(0, 8, 2) / 8)
        angle = (torch.arange(6) + offset)[:, None] * rate
        angle = torch.cat([angle, angle], -1)
        return block(x, (angle.cos(), angle.sin()), None)

    torch.testing.assert_close(at(0), at(11), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        pooled = tower.transformer(x, None).mean(1)
        assert not torch.allclose(pooled, tower.transformer(x.flip(1), None).mean(1), atol=1e-4)


def test_attention_by_hand() -> None:
    torch.manual_seed(0)
    block = tower_of("log-mel", dropout=0.0).transformer.blocks[0]
    x, mask = torch.randn(1, 4, 16), torch.tensor([[[[True, True, True, False]]]])
    still = torch.ones(4, 8), torch.zeros(4, 8)  # no rotation
    q, k, v = block.qkv(block.attention_norm(x)).view(4, 3, 2, 8).permute(1, 2, 0, 3)
    weights = (q @ k.transpose(1, 2) / math.sqrt(8)).masked_fill(~mask[0], -math.inf).softmax(-1)
    y = x + block.out((weights @ v).transpose(0, 1).reshape(1, 4, 16))
    y = y + block.down(F.gelu(block.up(block.feedforward_norm(y))))
    torch.testing.assert_close(block(x, still, mask), y)


# -- SpecAugment ------------------------------------------------------------------------------------------------------


def test_uniform_spans_are_short_and_inside_the_clip() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([50, 20, 3, 1]).repeat(500)
    spans = uniform_spans(lengths, 60, count=1, max_width=8)
    assert not (spans & ~length_mask(lengths, 60)).any()
    widths = spans.sum(1).view(500, 4)
    assert widths.amax(0).tolist() == [8, 8, 1, 0] and widths.amin(0).tolist() == [0, 0, 0, 0]
    assert (spans[0::4].int().diff(dim=1).abs().sum(1) <= 2).all()  # contiguous
    counts = torch.bincount(widths[:, 0], minlength=9)
    assert counts.min() > 25  # uniform over 0..8: 56 expected
    covered = spans[0::4].float().mean(0)[:50]
    assert covered.min() > 0  # every frame can be masked


def test_proportional_spans_have_the_asked_share() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([400, 100, 30]).repeat(300)
    spans = proportional_spans(lengths, 400, share=0.2, width=10, min_spans=0)
    assert not (spans & ~length_mask(lengths, 400)).any()
    share = (spans.sum(1) / lengths).view(300, 3).mean(0)
    # transformers draws the same number of spans; they may overlap, so the masked share is a little lower
    assert ((share > 0.13) & (share < 0.2)).all()
    assert proportional_spans(torch.tensor([100]), 100, 0.0, 10, min_spans=2).sum() > 10


def test_proportional_spans_agree_with_transformers() -> None:
    from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

    torch.manual_seed(0)
    np.random.seed(0)
    theirs = _compute_mask_indices((400, 100), mask_prob=0.3, mask_length=5).mean()
    ours = proportional_spans(torch.full((400,), 100), 100, 0.3, 5, 0).float().mean().item()
    assert abs(ours - theirs) < 0.01


def test_wavlm_masks_on_the_device_without_numpy() -> None:
    config = {**TOWERS["wavlm"]["hf_config"], "mask_feature_prob": 0.3, "mask_feature_length": 2, "mask_time_prob": 0.5}
    config |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "activation_dropout": 0.0}
    config |= {"layerdrop": 0.0}
    tower = tower_of("wavlm", hf_config=config).train()
    batch, lengths = padded(clips(16000, 1.0, 0.6))
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    torch.manual_seed(5)
    first = tower(batch, lengths)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]
    first.sum().backward()
    assert tower.base.masked_spec_embed.grad.abs().sum() > 0
    assert not torch.allclose(first, tower(batch, lengths))
    torch.manual_seed(5)
    torch.testing.assert_close(tower(batch, lengths), first)
    assert tower.hf_config["apply_spec_augment"] is True  # what an export says


# -- towers of transformers -------------------------------------------------------------------------------------------


def test_wavlm_is_transformers_wavlm() -> None:
    from transformers import Wav2Vec2FeatureExtractor

    tower = tower_of("wavlm").eval()
    waves = [wave + 0.05 for wave in clips(16000, 0.5, 0.3)]
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    inputs = extractor([wave.numpy() for wave in waves], sampling_rate=16000, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = tower.base(**inputs).last_hidden_state
        frames = tower.base._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1))
        expected = torch.stack([row[:size].mean(0) for row, size in zip(hidden, frames, strict=True)])
        assert_close_rel("wavlm", expected, tower(*padded(waves)), 1e-4)


def test_statistics_of_the_whole_file_are_used_for_a_crop() -> None:
    tower = tower_of("wavlm").eval()
    whole = clips(16000, 0.6)[0] + 0.02
    crop = whole[1000:6000][None]
    with torch.no_grad():
        expected = tower.base((crop - whole.mean()) / (whole.var(correction=0) + 1e-7).sqrt()).last_hidden_state.mean(1)
        given = tower(crop, torch.tensor([5000]), whole.mean()[None], whole.std(correction=0)[None])
        assert_close_rel("crop", expected, given, 1e-4)
        assert not torch.allclose(tower(crop), given, atol=1e-4)
        raw = tower_of("wavlm", normalize_waveform=False).eval()
        assert_close_rel("raw", raw.base(crop).last_hidden_state.mean(1), raw(crop), 1e-5)


def test_ast_is_transformers_ast() -> None:
    from transformers import ASTFeatureExtractor

    tower = tower_of("ast").eval()
    waves = clips(16000, 0.9, 0.5, 1.6)
    extractor = ASTFeatureExtractor(num_mel_bins=32, max_length=128)
    inputs = extractor([wave.numpy() for wave in waves], sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        expected = tower.base(inputs["input_values"]).pooler_output
        assert_close_rel("ast", expected, tower(*padded(waves)), 1e-3)


def test_clap_htsat_is_transformers_clap() -> None:
    from transformers import ClapFeatureExtractor

    tower = tower_of("clap-htsat").eval()
    waves = clips(48000, 0.7, 3.0)
    extractor = ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad", frequency_min=50)
    inputs = extractor([wave.numpy() for wave in waves], sampling_rate=48000, return_tensors="pt")
    with torch.no_grad():
        expected = tower.base(inputs["input_features"]).pooler_output
        assert_close_rel("clap", expected, tower(*padded(waves)), 1e-3)
    assert tower.sampling_rate == 48000


def test_the_zeros_after_whole_repeats_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    tower, ends = tower_of("clap-htsat"), []
    assert isinstance(tower, FixedWindowTower) and tower.whole_repeats
    log_mel = tower.log_mel.forward
    monkeypatch.setattr(
        tower.log_mel, "forward", lambda x, lengths=None: (ends.append(lengths), log_mel(x, lengths))[1]
    )
    rate, window = tower.sampling_rate, tower.window
    waves = clips(rate, 0.9 * window / rate / 2, 0.55 * window / rate)
    features = tower.features(*padded(waves))
    for row, wave in enumerate(waves):
        repeats = window // len(wave)
        whole = torch.zeros(window)
        whole[: repeats * len(wave)] = wave.repeat(repeats)
        assert torch.equal(features[row], log_mel(whole[None])[0][0])
        assert ends[0][row] == min(repeats * len(wave) + 1024, window)


def test_a_longer_clip_is_cut_at_the_window() -> None:
    tower = tower_of("whisper").eval()
    wave = clips(16000, 1.5)[0][None]
    with torch.no_grad():
        torch.testing.assert_close(tower(wave), tower(wave[:, :16000]))


@pytest.mark.parametrize("name", ["wavlm", "whisper", "ast", "clap-htsat"])
def test_weights_come_from_a_pretrained_folder(name: str, tmp_path: Path) -> None:
    """From the model class that hubs hold: the whole Whisper or CLAP, AST with its classifier, the bare WavLM."""
    import transformers

    random_tower = tower_of(name).eval()
    if name == "clap-htsat":
        text = {**BERT, "model_type": "clap_text_model"}
        whole: Any = transformers.ClapModel(transformers.ClapConfig(audio_config=HTSAT, text_config=text))
        whole.audio_model.load_state_dict(random_tower.base.state_dict())
        whole.config.audio_config.save_pretrained(tmp_path)
        whole.save_pretrained(tmp_path)
    elif name == "whisper":
        decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 60}
        ids = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
        config = transformers.WhisperConfig(**WHISPER, **decoder, **ids)
        whole = transformers.WhisperForConditionalGeneration(config)
        whole.model.encoder.load_state_dict(random_tower.base.state_dict())
        whole.save_pretrained(tmp_path)
    elif name == "ast":
        whole = transformers.ASTForAudioClassification(random_tower.base.config)
        whole.audio_spectrogram_transformer.load_state_dict(random_tower.base.state_dict())
        whole.half().save_pretrained(tmp_path)  # half precision on disk, float32 in the tower
        random_tower.base.half().float()
    else:
        random_tower.base.save_pretrained(tmp_path)
    torch.manual_seed(9)
    tower = build_audio_tower(AudioTowerConfig(TOWERS[name]["kind"], pretrained=str(tmp_path))).eval()
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
    batch, lengths = padded(clips(tower.sampling_rate, 0.5, 0.3))
    with torch.no_grad():
        torch.testing.assert_close(tower(batch, lengths), random_tower(batch, lengths))
    rebuilt = build_audio_tower(AudioTowerConfig(TOWERS[name]["kind"], hf_config=tower.hf_config))
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in tower.state_dict().items()}


def test_pretrained_with_changes_to_its_configuration(tmp_path: Path) -> None:
    tower_of("wavlm").base.save_pretrained(tmp_path)
    changed = AudioTowerConfig(
        "wav2vec2", pretrained=str(tmp_path), hf_config={"layerdrop": 0.0, "mask_time_prob": 0.0}
    )
    tower = build_audio_tower(changed)
    assert isinstance(tower, Wav2Vec2Tower) and tower.hf_config is not None
    assert tower.hf_config["layerdrop"] == 0.0 and tower.hf_config["hidden_size"] == 16


def test_pretrained_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tower_of("wavlm").base.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1.attention.q_proj" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not a checkpoint of WavLMModel; it lacks .*layers\.1\.attention\.q_proj"):
        build_audio_tower(AudioTowerConfig("wav2vec2", pretrained=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="could not be loaded"):
        build_audio_tower(AudioTowerConfig("wav2vec2", pretrained=str(tmp_path)))
    with pytest.raises(ModelError, match="no transformers configuration"):
        build_audio_tower(AudioTowerConfig("whisper", pretrained=str(tmp_path / "absent")))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AudioTowerConfig("vggish"), "unknown audio tower 'vggish'"),  # type: ignore[arg-type]
        (AudioTowerConfig(width=30, heads=4), "width must be a multiple of twice the heads"),
        (AudioTowerConfig(subsampling=3), "subsampling must be a power of two, not 3"),
        (AudioTowerConfig(feature_options={"n_melts": 3}), "no option 'n_melts'"),
        (AudioTowerConfig("wav2vec2"), "needs `pretrained`"),
        (AudioTowerConfig("wav2vec2", hf_config={"hidden_size": 8}), "needs a model_type"),
        (AudioTowerConfig("wav2vec2", hf_config=BERT), "bert is not a wav2vec2-family model"),
        (AudioTowerConfig("wav2vec2", hf_config={"model_type": "wavlm", "add_adapter": True}), "add_adapter"),
        (AudioTowerConfig("ast", hf_config={"attn_implementation": "someone/kernel"}), "would run code from the hub"),
        (AudioTowerConfig("clap-htsat", hf_config={**HTSAT, "enable_fusion": True}), "unfused"),
    ],
)
def test_impossible_audio_towers(config: AudioTowerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_audio_tower(config)


# -- text -------------------------------------------------------------------------------------------------------------


TEXT_TOWERS: dict[str, TextTowerConfig] = {
    "small mean": TextTowerConfig(width=16, layers=2, heads=2, vocab_size=50),
    "small cls": TextTowerConfig(width=16, layers=1, heads=2, vocab_size=50, pooling="cls"),
    "bag of words": TextTowerConfig(width=16, layers=0, vocab_size=50),
    "bert cls": TextTowerConfig("hf", hf_config=BERT, pooling="cls"),
    "bert mean": TextTowerConfig("hf", hf_config=BERT, pooling="mean"),
    "bert pooler": TextTowerConfig("hf", hf_config=BERT, pooling="pooler"),
    "roberta": TextTowerConfig("hf", hf_config={**BERT, "model_type": "xlm-roberta", "pad_token_id": 1}),
    "t5": TextTowerConfig(
        "hf",
        hf_config={"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1}
        | {"vocab_size": 50},
    ),
}


@pytest.mark.parametrize("name", TEXT_TOWERS)
def test_caption_padding_does_not_show(name: str) -> None:
    torch.manual_seed(0)
    tower = build_text_tower(TEXT_TOWERS[name]).eval()
    long, short = torch.randint(3, 50, (9,)), torch.randint(3, 50, (4,))
    pad = 1 if name == "roberta" else 0
    ids = torch.stack([long, F.pad(short, (0, 5), value=pad)])
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    with torch.no_grad():
        together = tower(ids, mask)
        alone = torch.cat([tower(part[None], torch.ones(1, len(part), dtype=torch.long)) for part in (long, short)])
    assert together.shape == (2, tower.width)
    assert (together - alone).abs().max() < 1e-5
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_text_pooling_by_hand() -> None:
    torch.manual_seed(0)
    ids, mask = torch.randint(3, 50, (2, 5)), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    expected = {}
    for pooling in ("cls", "mean", "pooler"):
        tower: Any = build_text_tower(TEXT_TOWERS[f"bert {pooling}"]).eval()
        with torch.no_grad():
            output = tower.base(input_ids=ids, attention_mask=mask)
            hidden = output.last_hidden_state
            expected["cls"] = hidden[:, 0]
            expected["mean"] = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
            expected["pooler"] = output.pooler_output
            torch.testing.assert_close(tower(ids, mask), expected[pooling])


def test_a_pooler_that_is_not_used_is_frozen() -> None:
    for pooling in ("cls", "mean", "pooler"):
        tower: Any = build_text_tower(TEXT_TOWERS[f"bert {pooling}"]).train()
        tower(torch.randint(3, 50, (2, 5)), torch.ones(2, 5, dtype=torch.long)).sum().backward()
        without = [name for name, p in tower.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []  # DDP would wait for their gradients
        assert all(p.requires_grad == (pooling == "pooler") for p in tower.base.pooler.parameters())


def test_a_bag_of_words_ignores_order() -> None:
    tower = build_text_tower(TEXT_TOWERS["bag of words"]).eval()
    ids, mask = torch.arange(3, 9)[None], torch.ones(1, 6, dtype=torch.long)
    torch.testing.assert_close(tower(ids, mask), tower(ids.flip(1), mask))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TextTowerConfig("lstm"), "unknown text tower 'lstm'"),  # type: ignore[arg-type]
        (TextTowerConfig(pooling="pooler"), "pooling 'pooler' needs"),
        (TextTowerConfig(pooling="cls", layers=0), "pooling 'cls' needs"),
        (TextTowerConfig("hf"), "needs `pretrained`"),
        (TextTowerConfig("hf", hf_config={"model_type": "no-such-model"}), "no-such-model"),
        (TextTowerConfig("hf", hf_config={**BERT, "model_type": "distilbert"}, pooling="pooler"), "has no pooler"),
    ],
)
def test_impossible_text_towers(config: TextTowerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_text_tower(config)


def test_every_trainable_parameter_of_the_audio_towers_gets_a_gradient() -> None:
    for name in TOWERS:
        config = TOWERS[name]
        if config.get("hf_config", {}).get("model_type"):
            config = {**config, "hf_config": {**config["hf_config"], "layerdrop": 0.0}}
        tower = build_audio_tower(AudioTowerConfig(**config)).train()
        tower(*padded(clips(tower.sampling_rate, 0.4, 0.3))).square().sum().backward()
        without = [key for key, p in tower.named_parameters() if p.requires_grad and p.grad is None]
        assert without == [], name
        assert isinstance(tower, (LogMelTower, Cnn14Tower)) or tower.hf_config is not None
