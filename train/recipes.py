"""Named starting points of `fastclap-train`: each is a function that returns a complete configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig, ZipformerConfig
from fastclap.errors import ConfigError
from fastclap.train.config import DataConfig, LossConfig, OptimizerConfig, TrainConfig


def small() -> TrainConfig:
    """Log-mel and text towers from scratch (0.6 M parameters), for some hundred to some ten thousand clips."""
    return TrainConfig(
        run_dir="runs/small",
        data=DataConfig(crop_seconds=1.5, cache_mb=256),
        model=CLAPConfig(
            audio=AudioTowerConfig(
                features="torchaudio",
                # A long window resolves the harmonics of a voice, hence its pitch.
                feature_options={
                    "n_fft": 2048,
                    "win_length": 2048,
                    "hop_length": 320,
                    "n_mels": 128,
                    "f_min": 20.0,
                    "f_max": 8000.0,
                    "floor": 1e-5,
                },
                feature_normalization="clip",
                random_gain=6.0,
                frequency_warp=0.04,
                time_mask_width=10,
                frequency_mask_width=20,
            ),
            text=TextTowerConfig(width=128, layers=0, vocab_size=512),
            head=HeadConfig(kind="linear", dim=128),
        ),
        optimizer=OptimizerConfig(warmup_steps=50, ema_decay=0.99),
        steps=1000,
        save_every=250,
    )


def demo() -> TrainConfig:
    """The small recipe on procedural demo voices that are made on the spot: see a model learn in a few minutes."""
    config = small()
    config.run_dir = "runs/demo"
    config.data.demo_clips = 960
    config.steps = 400
    config.valid_every = 100
    return config


def paraspeechclap_intrinsic() -> TrainConfig:
    """ParaSpeechCLAP Intrinsic: WavLM-Large and XLM-R, contrastive and tag loss on class-balanced clips."""
    config = _paraspeechclap("paraspeechclap-intrinsic")
    # As published 2 clips with rare tags in each 32, which is the batch of one of four GPUs.
    config.data.balance, config.data.tag_column, config.data.rare_clips = "inverse", "intrinsic_tags", 8
    config.loss.tag_weight = 1.0
    config.steps = 4500
    return config


def paraspeechclap_situational() -> TrainConfig:
    """ParaSpeechCLAP Situational: WavLM-Large and XLM-R, contrastive loss, 25 epochs."""
    config = _paraspeechclap("paraspeechclap-situational")
    config.epochs = 25
    return config


def paraspeechclap_combined() -> TrainConfig:
    """ParaSpeechCLAP Combined: intrinsic and situational manifests in strict alternation, 5 epochs."""
    config = _paraspeechclap("paraspeechclap-combined")
    config.data.mix = "interleave"
    config.epochs = 5
    return config


def _paraspeechclap(name: str) -> TrainConfig:
    """What the three models share: sizes and hyper-parameters of arXiv 2603.28737 and its published configuration."""
    return TrainConfig(
        run_dir=f"runs/{name}",
        data=DataConfig(crop_seconds=10.0),
        model=CLAPConfig(
            audio=_pretrained_wavlm(),
            text=TextTowerConfig(
                kind="hf", pretrained="ibm-granite/granite-embedding-278m-multilingual", pooling="cls", max_tokens=512
            ),
            head=HeadConfig(kind="paraspeechclap", dim=768),
        ),
        optimizer=_adam(1e-5),
        batch_size=128,
        seed=3407,
        save_every=1500,
    )


def whisper_small() -> TrainConfig:
    """Whisper small's encoder and MiniLM, both frozen: heads for some hundred to some ten thousand clips, in minutes.

    Chosen on 330 clips by cross-validation over their six speakers, with Whisper tiny.en (docs/results.md): the mean of
    each layer over the clip's own positions, all layers next to each other.
    """
    return TrainConfig(
        run_dir="runs/whisper-small",
        data=DataConfig(crop_seconds=10.0),
        model=CLAPConfig(
            audio=AudioTowerConfig(
                kind="whisper",
                pretrained="openai/whisper-small",
                window="clip",
                hidden_states="concatenated",
                pooling="mean",
                freeze=True,
            ),
            text=_minilm(freeze=True),
            head=HeadConfig(kind="paraspeechclap", dim=256),
        ),
        optimizer=OptimizerConfig(warmup_steps=20),
        batch_size=64,
        steps=300,
    )


def voiceclap_small() -> TrainConfig:
    """VoiceCLAP-Small: a Whisper small that knows emotions and MiniLM, sigmoid loss, one epoch.

    Parts, sizes and optimizer are those of arXiv 2609.32016 and its model card; the initial scale and bias of the loss
    are not published and are SigLIP's. Of the text encoder the whole is trained, as of Whisper.
    """
    return TrainConfig(
        run_dir="runs/voiceclap-small",
        data=DataConfig(crop_seconds=30.0),
        model=CLAPConfig(
            audio=AudioTowerConfig(
                kind="whisper",
                pretrained="laion/BUD-E-Whisper_V1.1",
                chunks=True,
                pool_padding=True,
                frame_pooling=2,
            ),
            text=_minilm(),
            head=HeadConfig(kind="voiceclap", dim=768),
            init_logit_scale=10.0,
            init_logit_bias=-10.0,
        ),
        loss=LossConfig(kind="sigmoid"),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=200),
        batch_size=512,
        epochs=1,
    )


def _minilm(freeze: bool = False) -> TextTowerConfig:
    return TextTowerConfig(
        kind="hf",
        pretrained="sentence-transformers/all-MiniLM-L6-v2",
        pooling="mean",
        max_tokens=128,
        freeze=freeze,
    )


def ess_clap() -> TrainConfig:
    """ESS-CLAP: WavLM-Large with learned layer weights and RoBERTa, contrastive loss.

    The parts are those of arXiv 2505.19437; batch, steps and learning rates are not published and are ours.
    """
    return TrainConfig(
        run_dir="runs/ess-clap",
        data=DataConfig(crop_seconds=10.0),
        model=CLAPConfig(
            audio=_pretrained_wavlm("weighted"),
            text=TextTowerConfig(kind="hf", pretrained="roberta-base", pooling="cls", max_tokens=512),
            head=HeadConfig(kind="laion", dim=512),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, tower_lr_scale=0.01, weight_decay=0.01, warmup_steps=500),
        batch_size=128,
        steps=20_000,
    )


def ra_clap() -> TrainConfig:
    """RA-CLAP: ESS-CLAP's second stage, taught by the model it starts from (--init-from RUN_OR_MODEL).

    The form of the distillation, its weight and its temperature are ours; the paper's are not published in this detail.
    """
    config = ess_clap()
    config.run_dir = "runs/ra-clap"
    config.loss.teacher, config.loss.teacher_weight = "init", 0.5
    config.optimizer.learning_rate, config.steps = 5e-4, 10_000
    return config


def clsp_stage1() -> TrainConfig:
    """CLSP stage 1: SPEAR's Zipformer and RoBERTa, one caption a clip, encoders slower than heads.

    Parts, batch (8 x 800 s), lengths, optimizer, schedule and number of epochs are those of arXiv 2601.03065 and its
    code. The released model starts the further stages from the mean of the weights over epochs 18 to 45.
    """
    return TrainConfig(
        run_dir="runs/clsp-stage1",
        data=DataConfig(crop_seconds=30.0, min_seconds=4.0, max_seconds=30.0, batch_seconds=6400.0),
        model=CLAPConfig(
            audio=AudioTowerConfig(kind="zipformer", pretrained="marcoyang/spear-xlarge-speech-audio", features="clsp"),
            text=TextTowerConfig(kind="hf", pretrained="roberta-base", pooling="pooler", max_tokens=512),
            head=HeadConfig(kind="clsp", dim=512),
        ),
        optimizer=OptimizerConfig(
            kind="scaled-adam",
            learning_rate=0.045,
            tower_lr_scale=0.02222,
            schedule="eden",
            warmup_steps=500,
            warmup_start=0.5,
            average_every=200,
        ),
        batch_size=2048,
        epochs=100,
        seed=42,
        save_every=4000,
        keep=30,
    )


def clsp_stage2() -> TrainConfig:
    """CLSP stage 2: two captions a clip, fine ones on schedule (--init-from the first stage)."""
    config = clsp_stage1()
    config.run_dir = "runs/clsp-stage2"
    config.data.captions, config.data.fine_characters = "pair", [128, 768]
    config.data.min_seconds = 2.0
    config.optimizer.learning_rate, config.optimizer.tower_lr_scale = 0.001, 1.0
    config.epochs = 400
    return config


def clsp_stage3() -> TrainConfig:
    """CLSP stage 3: a global and a fine caption, and one that contradicts the clip (--init-from the first stage)."""
    config = clsp_stage2()
    config.run_dir = "runs/clsp-stage3"
    config.data.captions, config.loss.local_weight = "perturbed", 0.2
    config.data.batch_seconds = 6000.0
    return config


def with_wavlm(config: TrainConfig) -> TrainConfig:
    """A recipe of CLSP with WavLM-Large and AdamW for its Zipformer and ScaledAdam; learning rates are ours."""
    audio, optimizer = config.model.audio, config.optimizer
    if audio.kind != "zipformer":
        raise ConfigError("--wavlm puts WavLM in the place of a Zipformer, and this recipe has none")
    first = optimizer.tower_lr_scale != 1.0
    config.model.audio = _pretrained_wavlm()
    config.optimizer = OptimizerConfig(
        learning_rate=1e-3 if first else 2e-5,
        tower_lr_scale=optimizer.tower_lr_scale,
        weight_decay=0.0,
        warmup_steps=500,
        ema_decay=0.999,
    )
    config.steps, config.epochs, config.keep = 20_000, 0, 5
    return config


def _pretrained_wavlm(hidden_states: Literal["last", "weighted"] = "last") -> AudioTowerConfig:
    return AudioTowerConfig(
        kind="wav2vec2",
        pretrained="microsoft/wavlm-large",
        hf_config={"layerdrop": 0.0},
        hidden_states=hidden_states,
    )


def _adam(learning_rate: float) -> OptimizerConfig:
    """Adam at a constant learning rate."""
    return OptimizerConfig(
        learning_rate=learning_rate,
        weight_decay=0.0,
        beta2=0.999,
        warmup_steps=0,
        schedule="constant",
        clip_norm=0.0,
    )


def small_form(config: TrainConfig) -> TrainConfig:
    """The recipe with the model, optimizer, crops, steps and batch of `small`: from scratch on a CPU in minutes.

    The loss, the draw of clips and captions and what else makes the system remain. Of a recipe on Whisper the encoder
    becomes that of Whisper tiny.en, on the clip's own positions, and all but its size and the batch's remains.
    """
    audio = config.model.audio
    if audio.kind == "whisper":
        audio.pretrained, audio.window = "openai/whisper-tiny.en", "clip"
        audio.pool_padding, audio.frame_pooling = False, 1
        config.batch_size, config.epochs, config.steps = min(config.batch_size, 64), 0, 300
        config.run_dir += "-small"
        return config
    base = small()
    if audio.kind == "zipformer":
        base.model.audio = _small_zipformer(base.model.audio)
        base.optimizer = _small_scaled_adam()
    config.model, config.optimizer = base.model, base.optimizer
    config.steps, config.epochs, config.batch_size, config.save_every = base.steps, 0, base.batch_size, base.save_every
    config.keep, config.data.min_seconds, config.data.max_seconds = base.keep, 0.0, None
    config.data.crop_seconds, config.data.cache_mb = base.data.crop_seconds, base.data.cache_mb
    config.data.rare_clips, config.data.fine_characters = min(config.data.rare_clips, 2), None
    config.data.batch_seconds = None
    config.run_dir += "-small"
    return config


def _small_zipformer(log_mel: AudioTowerConfig) -> AudioTowerConfig:
    """A Zipformer with as many parameters as the small log-mel tower (0.5 M), from scratch.

    Its schedules settle within a thousand steps.
    """
    return replace(
        log_mel,
        kind="zipformer",
        feature_options={**log_mel.feature_options, "n_mels": 64},
        pooling="statistics",
        zipformer=ZipformerConfig(
            channels=[4, 8, 16],
            downsampling=[1, 2],
            layers=[1, 1],
            width=[104],
            unmasked_width=[64],
            feedforward=[192],
            heads=[4],
            kernel=[15, 7],
            query_width=16,
            schedule_start=0.0,
            schedule_seconds=2.4,
        ),
    )


def _small_scaled_adam() -> OptimizerConfig:
    return OptimizerConfig(
        kind="scaled-adam",
        learning_rate=0.045,
        schedule="eden",
        eden_batches=500,
        eden_epochs=50,
        warmup_steps=50,
        warmup_start=0.5,
        ema_decay=0.99,
    )


def parity(config: TrainConfig) -> TrainConfig:
    """The recipe with what is known to differ from the published training where that affects learning.

    Clips with the same caption are false negatives; in ParaSpeechCLAP short clips are also padded to the crop with
    zeros that are pooled as speech, and clips of all lengths share a batch. Not repeated: gradients that shrink with
    the number of GPUs, and a logit scale that is clamped once an epoch.
    """
    config.loss.share_equal_captions = False
    if config.model.head.kind == "paraspeechclap":
        config.data.pad_to_crop, config.data.bucket_by_length = True, False
    return config


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "small": small,
    "paraspeechclap-intrinsic": paraspeechclap_intrinsic,
    "paraspeechclap-situational": paraspeechclap_situational,
    "paraspeechclap-combined": paraspeechclap_combined,
    "whisper-small": whisper_small,
    "voiceclap-small": voiceclap_small,
    "ess-clap": ess_clap,
    "ra-clap": ra_clap,
    "clsp-stage1": clsp_stage1,
    "clsp-stage2": clsp_stage2,
    "clsp-stage3": clsp_stage3,
}

FORMS: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "--wavlm": with_wavlm,
    "--parity": parity,
    "--small": small_form,
}
"""Flags that change a recipe as a whole, before its configuration file and its other flags."""
