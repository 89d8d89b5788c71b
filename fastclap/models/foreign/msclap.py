"""MS-CLAP's checkpoints (package `msclap`): 2022 is Cnn14 with BERT, 2023 is HTSAT with GPT-2.

Both take one window of a clip, repeated until it is full. Of a longer clip their code draws a window at random; here it
is the first one, so that a clip has one embedding. The text tower of 2023 reads the "<|endoftext|>" that is put after
each caption; of a caption with more than 75 tokens that code cuts it off, and this one keeps it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import ModelError
from fastclap.models.foreign.htsat import htsat_config, htsat_weights, with_constants
from fastclap.models.foreign.shared import ForeignModel, ForeignWeights, bert_config, features_with_its_bank, renamed

if TYPE_CHECKING:
    import tokenizers

_AUDIO, _TEXT = "audio_encoder.base.", "caption_encoder.base."
_END = "<|endoftext|>"
_FEATURES: dict[str, Any] = {"sampling_rate": 44100, "hop_length": 320}
# the front-end's constants, AudioSet's classifier, and GPT-2's causal mask, which old releases saved
_UNUSED = re.compile(
    r"audio_encoder\.base\.(spectrogram_extractor|logmel_extractor|fc_audioset)\."
    r"|caption_encoder\.base\.h\.\d+\.attn\.(masked_)?bias$"
)
_NAMES = [
    (r"^audio_encoder\.base\.", "audio_branch.base."),
    (r"^caption_encoder\.base\.", "text_branch.base."),
    (r"^audio_encoder\.projection\.", "audio_projection."),
    (r"^caption_encoder\.projection\.", "text_projection."),
    (r"^logit_scale$", "log_logit_scale"),
]


def read_msclap(weights: ForeignWeights, audio: dict[str, Any], text: dict[str, Any]) -> ForeignModel:
    """MS-CLAP of 2022 or 2023; `audio` (2023) and `text` go over what the shapes and the published model say.

    Raises:
        ModelError: other towers than those, or other features than the published.
    """
    htsat = f"{_AUDIO}htsat."
    if any(name.startswith(htsat) for name in weights.tensors):
        # its HTSAT keeps the mel filter bank of 32 kHz on audio at 44.1 kHz; its configuration names others
        known = [{**_FEATURES, "mel_sampling_rate": 32000}, {**_FEATURES, "f_max": 8000.0}, _FEATURES]
        tower = AudioTowerConfig(
            kind="clap-htsat",
            hf_config={**htsat_config(weights, htsat), **audio},
            feature_options=features_with_its_bank(weights, f"{htsat}logmel_extractor.melW", "clap", known),
            clip_seconds=7.0,
            repeat="cut",
        )
        ours = htsat_weights(weights, htsat)
    elif f"{_AUDIO}conv_block1.conv1.weight" in weights:
        if audio:
            raise ModelError(f"{weights.path}: audio_config has no meaning for Cnn14, which is not of transformers")
        tower = AudioTowerConfig(
            kind="cnn14",
            feature_options=features_with_its_bank(weights, f"{_AUDIO}logmel_extractor.melW", "clap", [_FEATURES]),
            clip_seconds=5.0,
            repeat="cut",
            convolution_channels=weights.shape(f"{_AUDIO}conv_block1.conv1.weight", 4)[0],
            width=weights.shape(f"{_AUDIO}fc1.weight", 2)[0],
        )
        ours = {}
    else:
        raise ModelError(f"{weights.path}: its audio tower is neither HTSAT nor Cnn14 ({_AUDIO}*)")
    gpt2 = f"{_TEXT}wte.weight" in weights
    fields = {**(_gpt2_config(weights) if gpt2 else bert_config(weights, _TEXT.removesuffix("."))), **text}
    config = CLAPConfig(
        audio=tower,
        text=TextTowerConfig(
            kind="hf", hf_config=fields, pooling="msclap" if gpt2 else "cls", max_tokens=77 if gpt2 else 100
        ),
        head=HeadConfig("paraspeechclap", weights.shape("audio_encoder.projection.linear1.weight", 2)[0]),
    )
    for name, tensor in weights.tensors.items():
        if not name.startswith(htsat) and not _UNUSED.match(name):
            ours[renamed(name, _NAMES)] = tensor
    ours = with_constants(ours)
    if gpt2:
        return ForeignModel(weights.code, "openai-community/gpt2", config, ours, append_end)
    return ForeignModel(weights.code, "google-bert/bert-base-uncased", config, ours)


def append_end(tokenizer: tokenizers.Tokenizer) -> None:
    """Make GPT-2's tokenizer put " <|endoftext|>" after each text and pad with "!", in place.

    Raises:
        ModelError: another tokenizer.
    """
    from tokenizers import Regex, normalizers, processors

    end = tokenizer.token_to_id(_END)
    if end is None or tokenizer.id_to_token(0) != "!":
        raise ModelError(f"not the tokenizer of GPT-2, which has the tokens ! (id 0) and {_END}")
    tokenizer.normalizer = normalizers.Replace(Regex(r"\z"), " ")  # the space is a token, together with others there
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {_END}", special_tokens=[(_END, end)])
    tokenizer.enable_padding(pad_id=0, pad_token="!")


def _gpt2_config(weights: ForeignWeights) -> dict[str, Any]:
    vocabulary, width = weights.shape(f"{_TEXT}wte.weight", 2)
    return {
        "model_type": "gpt2",
        "vocab_size": vocabulary,
        "n_embd": width,
        "n_layer": weights.count(f"{_TEXT}h"),
        "n_head": max(1, width // 64),
        "n_inner": weights.shape(f"{_TEXT}h.0.mlp.c_fc.weight", 2)[1],
        "n_positions": weights.shape(f"{_TEXT}wpe.weight", 2)[0],
        "use_cache": False,
    }
