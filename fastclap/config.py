"""What a dual encoder is made of, as plain dataclasses.

This file imports no torch: the command lines read it to build their flags and answer `--help` at once, and
`config.json` of every exported model is exactly `CLAPConfig.to_dict()` plus a format version. Reading is strict: a
key that is not a field is an error that names it, because a silently ignored option gives a model nobody asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastclap.bounds import NotNegative, Positive, Range, ShareBelowOne, Size, SizeOrNone, first_wrong
from fastclap.errors import ConfigError

FORMAT_VERSION = 2
"""Version of `config.json`; a higher one in a file means that a newer fastclap wrote it. Version 1 had `layer_weights`
for `hidden_states` "weighted", and `pooling` was of log-mel towers alone."""


@dataclass
class ZipformerConfig:
    """Sizes of a Zipformer (Yao et al. 2024, arXiv 2310.11230). Lists have an entry for each stack, or one for all."""

    size: Literal["spear-base", "spear-large", "spear-xlarge"] = "spear-xlarge"
    """The sizes of SPEAR (arXiv 2510.25955; 93, 327 and 597 M parameters), where none are given here."""
    downsampling: list[Size] | None = None
    """Frames that a stack takes together, of 50 a second."""
    layers: list[Size] | None = None
    """Layers of each stack."""
    width: list[Size] | None = None
    """Width of each stack."""
    unmasked_width: list[Size] | None = None
    """Channels that are never dropped; those above are set to zero in training, for an eighth of the clips and more."""
    feedforward: list[Size] | None = None
    """Width of the second of a layer's three feed-forward modules; the first and third have 3/4 and 5/4 of it."""
    heads: list[Size] | None = None
    """Attention heads."""
    kernel: list[Size] | None = None
    """Frames that a depthwise convolution sees, an odd number."""
    channels: list[Size] = field(default_factory=lambda: [8, 32, 128])
    """Channels of the three convolutions over time and frequency at the input."""
    query_width: Size = 32
    """Width of a head's queries and keys."""
    position_width: Size = 4
    """Width of a head's queries for positions."""
    value_width: Size = 12
    """Width of a head's values."""
    encoding_width: Size = 48
    """Width of the encoding of relative positions, an even number."""
    output_downsampling: Annotated[int, Range(1, 2)] = 2
    """Frames, of 50 a second, that become one of the result: 1 or 2."""
    schedule_start: NotNegative = 100_000.0
    """Batches that the schedules are taken to be past. Dropout, skips and limits are strong at first and settle within
    20,000 batches; as CLSP was trained, they begin long after that. 0: trained from scratch, until training goes on
    from that model (--init-from)."""
    schedule_seconds: Positive = 600.0
    """Audio that counts as a batch of the schedules. Less of it lets them settle within a shorter training."""

    def lists(self) -> dict[str, list[int]]:
        """The lists, with an entry for each stack.

        Raises:
            ConfigError: a list of another length.
        """
        if len(self.channels) != 3:
            raise ConfigError(f"zipformer.channels is {self.channels}; give a number for each of 3 convolutions")
        layers, width, unmasked = _SPEAR[self.size]
        published = {
            "downsampling": [1, 2, 4, 8, 4, 2, 1],
            "layers": layers,
            "width": [width],
            "unmasked_width": [unmasked],
            "feedforward": [3 * width],
            "heads": [8],
            "kernel": [31, 31, 15, 15, 15, 31, 31],
        }
        lists: dict[str, list[int]] = {name: getattr(self, name) or value for name, value in published.items()}
        stacks = len(lists["downsampling"])
        for name, values in lists.items():
            if len(values) not in (1, stacks):
                raise ConfigError(
                    f"zipformer.{name} is {values}; give a number for each of the {stacks} stacks "
                    "(zipformer.downsampling), or one for all"
                )
        return {name: values * stacks if len(values) == 1 else values for name, values in lists.items()}


_SPEAR = {
    "spear-base": ([1, 2, 3, 3, 1, 1, 1], 512, 256),
    "spear-large": ([1, 2, 2, 3, 1, 1, 1], 1024, 512),
    "spear-xlarge": ([1, 2, 3, 4, 1, 1, 1], 1280, 768),
}
"""Layers, width and unmasked width; the rest is the same, or follows from the width."""


@dataclass
class AudioTowerConfig:
    """Audio tower. Options marked with a kind have no meaning for the other kinds."""

    kind: Literal["log-mel", "wav2vec2", "whisper", "ast", "clap-htsat", "cnn14", "pe-audio", "zipformer"] = "log-mel"
    """log-mel: compact transformer trained from scratch. wav2vec2: WavLM, wav2vec 2.0 or HuBERT of transformers on the
    waveform. whisper, ast, clap-htsat: the encoders of transformers on log-mel features. cnn14: PANNs' convolutions on
    log-mel features. pe-audio: the audio encoder of PE-AV on the waveform. zipformer: SPEAR's encoder, CLSP's tower, on
    log-mel features."""
    pretrained: str | None = None
    """Folder or hub id of the transformers weights to start from (every kind but log-mel). zipformer: SPEAR's or CLSP's
    weights, also as a file: marcoyang/spear-xlarge-speech-audio, or icefall's .pt."""
    hf_config: dict[str, Any] | None = None
    """transformers configuration: with `pretrained` the entries to change (such as {"layerdrop": 0.0}), without it the
    whole description of a randomly initialised model. An exported model holds the complete configuration here."""
    freeze: bool = False
    """Keep the tower fixed: no gradient, evaluation mode (LiT). The weights of its layers are learned all the same."""
    freeze_convolutions: bool = False
    """wav2vec2, log-mel, whisper: keep the convolutions at the input fixed; dropout and SpecAugment go on."""
    freeze_layers: SizeOrNone = 0
    """Every kind but clap-htsat and cnn14: keep the first layers of the transformer fixed, this many, and all that
    comes before them."""
    freeze_modules: list[str] = field(default_factory=list)
    """Modules of the tower to keep fixed, by their names or patterns of a shell: base.layer_norm,
    base.layers.[0-3], *.attention. Dropout in them goes on."""
    lora_rank: SizeOrNone = 0
    """Every kind but log-mel: rank of LoRA's adapters, which train in place of the linear layers that they are added to
    (0: none; needs peft). An exported model holds the sum."""
    lora_alpha: Positive = 16.0
    """Adapters are multiplied by lora_alpha / lora_rank."""
    lora_dropout: ShareBelowOne = 0.0
    """Dropout of the adapters' input."""
    lora_targets: list[str] = field(default_factory=list)
    """Linear layers with adapters, by the end of their names or patterns of a shell, such as q_proj v_proj. Empty: all
    of the transformer layers that freeze_layers does not keep fixed."""
    normalize_waveform: bool = True
    """wav2vec2: subtract the mean and divide by the standard deviation of the whole file."""
    window: Literal["full", "clip"] = "full"
    """whisper, ast: what the encoder sees. full: the window that it was published with (30 s; 10.24 s), which every
    clip is padded to. clip: the clip's own positions alone, for a fraction of the work."""
    chunks: bool = False
    """whisper: embed a clip that is longer than the window in parts, whose unit vectors are averaged, instead of
    cutting it."""
    hidden_states: Literal["last", "weighted", "concatenated"] = "last"
    """wav2vec2, whisper, ast: the layers that are pooled: the last one, the average of all with learned weights
    (softmax), or all of them next to each other."""
    pool_padding: bool = False
    """whisper: pool the padding of the full window as well."""
    frame_pooling: Size = 1
    """whisper: positions that are averaged before the final norm."""

    pooling: Literal["mean", "statistics", "attention", "token"] | None = None
    """From positions to one vector: their mean; statistics, which adds their standard deviation; attention, a mean with
    learned weights; or (whisper) a learned global token before the first position (WavLink). Unset: the kind's own,
    which is statistics for log-mel, the class tokens for ast, and the mean for the others."""

    features: Literal["whisper", "kaldi", "clap", "clap-fusion", "ast", "beats", "clsp", "torchaudio"] = "kaldi"
    """log-mel, zipformer: preset of fastclap.LogMel; CLSP's is clsp."""
    feature_options: dict[str, Any] = field(default_factory=dict)
    """log-mel, zipformer: changes to the preset, such as {"n_mels": 64}. clap-htsat, cnn14, whisper: changes to the
    preset clap or whisper."""
    clip_seconds: Annotated[float, Range(0.1, 3600)] = 10.0
    """clap-htsat, cnn14: the tower sees this much of a clip. What a longer one has after it is left out."""
    repeat: Literal["whole", "cut"] = "whole"
    """clap-htsat, cnn14: a shorter clip is repeated as often as it fits, with silence after (whole, as in LAION-CLAP),
    or until the window is full (cut, as in MS-CLAP)."""
    feature_normalization: Literal["global", "per-mel", "clip"] | None = None
    """log-mel: statistics that `fit_feature_statistics` measures once and the model keeps: one mean and standard
    deviation (global, the default), or one pair a band; clip subtracts each clip's own mean level instead of the global
    mean, which makes the embedding independent of the recording level. zipformer: none, as published,
    or clip, with which it is also augmented as the log-mel tower is."""
    width: Size = 128
    """log-mel: width of the transformer. cnn14: of the output (published: 2048)."""
    layers: SizeOrNone = 3
    """log-mel: number of transformer blocks; 0 leaves the convolutions only."""
    heads: Size = 4
    """log-mel: attention heads a block."""
    feedforward: Size = 2
    """log-mel: width of the feed-forward layer as a multiple of `width`."""
    subsampling: Annotated[int, Range(1, 1024)] = 4
    """log-mel: frames per transformer position, a power of two; each halving is one convolution of stride 2."""
    convolution: Literal["time", "time-frequency"] = "time-frequency"
    """log-mel: time convolves over frames with the bands as channels; time-frequency convolves over both and halves
    both."""
    convolution_channels: Size = 16
    """log-mel, cnn14: channels of the first convolution over time and frequency, or of the first block (published: 64);
    each further one has twice as many."""
    dropout: ShareBelowOne = 0.1
    """log-mel: dropout of every residual branch and of the convolutions' output."""
    random_gain: Annotated[float, Range(0, 100)] = 0.0
    """log-mel, zipformer: in training each clip is made louder or softer by up to this many dB."""
    frequency_warp: ShareBelowOne = 0.0
    """log-mel, zipformer: in training the mel axis of each clip is stretched or squeezed by up to this share, as by a
    shorter or longer vocal tract."""
    time_masks: SizeOrNone = 2
    """log-mel, zipformer: SpecAugment time masks a clip in training."""
    time_mask_width: SizeOrNone = 20
    """log-mel, zipformer: largest width of a time mask, in frames (drawn uniformly from 0 to this)."""
    frequency_masks: SizeOrNone = 2
    """log-mel, zipformer: SpecAugment frequency masks a clip in training."""
    frequency_mask_width: SizeOrNone = 16
    """log-mel, zipformer: largest width of a frequency mask, in mel bands (drawn uniformly from 0 to this)."""
    zipformer: ZipformerConfig = field(default_factory=ZipformerConfig)
    """zipformer: its sizes."""


@dataclass
class TextTowerConfig:
    """Text tower. Options marked with a kind have no meaning for the other kind."""

    kind: Literal["small", "hf"] = "small"
    """small: from scratch, with a vocabulary trained on the captions. hf: any encoder of transformers."""
    pretrained: str | None = None
    """hf: folder or hub id of the transformers weights and tokenizer to start from."""
    hf_config: dict[str, Any] | None = None
    """hf: as for the audio tower."""
    freeze: bool = False
    """Keep the tower fixed: no gradient, evaluation mode."""
    freeze_embeddings: bool = False
    """Keep the embeddings of the tokens, with those of positions and their norm, fixed; dropout goes on."""
    freeze_layers: SizeOrNone = 0
    """Keep the first layers of the transformer fixed, this many, and the embeddings."""
    freeze_modules: list[str] = field(default_factory=list)
    """Modules of the tower to keep fixed, by their names or patterns of a shell: base.pooler,
    base.encoder.layer.[0-3], *.attention. Dropout in them goes on."""
    lora_rank: SizeOrNone = 0
    """hf: rank of LoRA's adapters, which train in place of the linear layers that they are added to (0: none; needs
    peft). An exported model holds the sum."""
    lora_alpha: Positive = 16.0
    """Adapters are multiplied by lora_alpha / lora_rank."""
    lora_dropout: ShareBelowOne = 0.0
    """Dropout of the adapters' input."""
    lora_targets: list[str] = field(default_factory=list)
    """Linear layers with adapters, by the end of their names or patterns of a shell, such as q_proj v_proj. Empty: all
    of the transformer layers that freeze_layers does not keep fixed."""
    pooling: Literal["cls", "mean", "pooler", "statistics", "attention", "last", "msclap"] = "mean"
    """First token, mean over the tokens, or (hf) the encoder's own pooler output, the mean with the standard deviation,
    a mean with learned weights, or the last token. msclap (hf): the token that MS-CLAP 2023 reads, which is the last
    one but for a place less with every token of id 0 ("!") in the caption."""
    hidden_states: Literal["last", "weighted", "concatenated"] = "last"
    """hf: as for the audio tower."""
    max_tokens: Annotated[int, Range(3, 1 << 20)] = 64
    """Longer captions are cut to this many tokens, those of begin and end among them."""
    vocab_size: Size = 2000
    """small: largest size of the trained vocabulary, and number of rows of the embedding."""
    width: Size = 128
    """small: width of the transformer."""
    layers: SizeOrNone = 1
    """small: number of transformer blocks; 0 with mean pooling is a bag of words."""
    heads: Size = 4
    """small: attention heads a block."""
    feedforward: Size = 2
    """small: width of the feed-forward layer as a multiple of `width`."""
    dropout: ShareBelowOne = 0.1
    """small: dropout of every residual branch."""
    embedding_dropout: ShareBelowOne = 0.1
    """small: dropout of the token embeddings."""


@dataclass
class HeadConfig:
    """Projection of a tower's output into the shared space; both towers have one of this kind."""

    kind: Literal["paraspeechclap", "clsp", "laion", "pe-audio", "voiceclap", "linear"] = "paraspeechclap"
    """paraspeechclap: LN(W1·x + dropout(W2·gelu(W1·x))). clsp: Linear-ReLU-Linear-Linear-ReLU-Dropout-Linear.
    laion: Linear-ReLU-Linear. pe-audio: layer norm and one matrix. voiceclap: Linear-Linear-GELU-Linear for
    audio, Linear-GELU-Linear for text. linear: one matrix."""
    dim: Size = 256
    """Dimension of the shared embedding space."""
    dropout: ShareBelowOne | None = None
    """Dropout of the head; unset means the published value (paraspeechclap 0.5, clsp 0.1; the others have none)."""


@dataclass
class CLAPConfig:
    """A dual encoder: two towers, two projection heads and the logit scale."""

    audio: AudioTowerConfig = field(default_factory=AudioTowerConfig)
    """Audio tower."""
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    """Text tower."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """Projection heads."""
    init_logit_scale: Positive = 1 / 0.07
    """Initial multiplier of the cosines."""
    max_logit_scale: Annotated[float, Range(1, 1e6)] = 100.0
    """The multiplier is clamped to between 1 and this."""
    init_logit_bias: float | None = None
    """Initial bias of the logits, for the sigmoid loss (SigLIP starts at -10); unset: the model has no bias."""

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionary, JSON-able when `hf_config` and `feature_options` are."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CLAPConfig:
        """Inverse of `to_dict`; fields that are left out keep their defaults.

        Raises:
            ConfigError: as `read_dataclass` and `check`.
        """
        config = read_dataclass(cls, data)
        config.check()
        return config

    def check(self, path: str = "") -> None:
        """Raise ConfigError on the first impossible value or combination, naming it with `path` before its own."""
        if (wrong := first_wrong(self, path)) is not None:
            raise ConfigError(str(wrong))
        towers = (("audio", self.audio, "log-mel"), ("text", self.text, "small"))
        for name, tower, from_scratch in towers:
            for key in ("pretrained", "hf_config"):
                if tower.kind == from_scratch and getattr(tower, key) is not None:
                    raise ConfigError(
                        f"{path}{name}.{key} is given, but a tower of {path}{name}.kind {from_scratch} always starts "
                        "from scratch; change the kind, or leave it out"
                    )


_T = typing.TypeVar("_T")


def read_dataclass(cls: type[_T], data: Any, path: str = "") -> _T:
    """A configuration dataclass from nested plain data, strictly.

    Args:
        cls: with an annotation for every field, and ranges as in `fastclap.bounds`.
        data: its fields by name.
        path: where it stands in a larger one, for the messages.

    Raises:
        ConfigError: a key that is not a field, or a value of the wrong type or out of its range; the message names its
            path.
    """
    read = _read(cls, data, path)
    if (wrong := first_wrong(read, f"{path}." if path else "")) is not None:
        raise ConfigError(str(wrong))
    return read


def _read(cls: type[_T], data: Any, path: str) -> _T:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path or 'the configuration'} must be a mapping, not {data!r}")
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in data:
        if key not in hints:
            near = difflib.get_close_matches(str(key).replace("-", "_"), hints, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; {cls.__name__} has {', '.join(hints)}"
            raise ConfigError(f"unknown configuration key {path}{'.' if path else ''}{key}{hint}")
    return cls(**{key: _value(hints[key], value, f"{path}.{key}" if path else key) for key, value in data.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _read(typing.cast(type, hint), value, path)
    if not _fits(hint, value):
        raise ConfigError(f"{path} must be {_in_words(hint)}, not {value!r}")
    return value


def _in_words(hint: Any) -> str:
    """A type hint, with the ranges of its numbers."""
    arguments = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Annotated:
            ranges = (each.short for each in arguments[1:] if isinstance(each, Range))
            return " ".join((_in_words(arguments[0]), *ranges))
        case typing.Union | types.UnionType:
            return " or ".join(map(_in_words, arguments))
        case typing.Literal:
            return " or ".join(map(repr, arguments))
        case origin if origin is list:
            return f"a list of {_in_words(arguments[0])}"
        case origin if origin is dict:
            return "a mapping"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[hint]


def _fits(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _fits(typing.get_args(hint)[0], value)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(member, value) for member in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Any:
        return True
    if origin is list:
        return isinstance(value, list) and all(_fits(typing.get_args(hint)[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(typing.get_args(hint)[1], item) for item in value.values())
    return isinstance(value, hint)
