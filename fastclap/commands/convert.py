"""`fastclap convert`: checkpoints of other codebases to model folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from fastclap.commands.shared import print_json, print_note


@dataclass(kw_only=True)
class Flags:
    checkpoint: Annotated[str, tyro.conf.Positional]
    """ParaSpeechCLAP .pth.tar, LAION-CLAP .pt, MS-CLAP .pth, folder of VoiceCLAP-Small, of PE-AV or of a transformers
    CLAP, or one of these on the hub: owner/name, or owner/name/file."""
    folder: Annotated[str, tyro.conf.Positional]
    """Model folder to write."""
    tokenizer: str | None = None
    """Folder or hub id of the text tower's tokenizer (default: the published one's, from the hub)."""
    audio_config: dict[str, str] = field(default_factory=dict)
    """Entries of the audio tower's transformers configuration that differ from the published, as pairs: NAME JSON."""
    text_config: dict[str, str] = field(default_factory=dict)
    """The same for the text tower."""
    license: str | None = None
    """Licence of the weights for the model card, by its name on the hub (for example cc-by-nc-sa-4.0)."""
    json: bool = False
    """Print the summary as JSON, and nothing else, on stdout."""


HELP = """\
Every command also takes such checkpoints as they are; a converted one loads without the hub and without unpickling.

Examples:
  fastclap convert paraspeechclap-intrinsic.pth.tar models/intrinsic
  fastclap convert paraspeechclap-combined.pth.tar models/combined --tokenizer tokenizers/granite-278m
  fastclap convert 630k-audioset-best.pt models/laion --license cc0-1.0
  fastclap convert lukewys/laion_clap/music_speech_audioset_epoch_15_esc_89.98.pt models/laion-base
  fastclap convert laion/clap-htsat-unfused models/htsat --json
  fastclap convert microsoft/msclap/CLAP_weights_2023.pth models/msclap --tokenizer openai-community/gpt2
  fastclap convert laion/voiceclap-small models/voiceclap --license cc-by-4.0
  fastclap convert facebook/pe-av-small models/pe-av --license apache-2.0
  fastclap convert own.pth.tar models/own --audio-config num_attention_heads 12 do_stable_layer_norm false
"""


def run(flags: Flags) -> int:
    from fastclap.models.clap import read_checkpoint
    from fastclap.models.foreign import find_checkpoint

    found = find_checkpoint(flags.checkpoint)
    print_note(f"reading {found}")
    model = read_checkpoint(
        found,
        tokenizer=flags.tokenizer,
        audio_config=_parse_values(flags.audio_config),
        text_config=_parse_values(flags.text_config),
    )
    print_note(f"writing {flags.folder}")
    model.save_pretrained(flags.folder, license=flags.license)
    summary: dict[str, Any] = {
        "model": flags.folder,
        "audio": model.config.audio.kind,
        "text": model.config.text.kind,
        "dim": model.config.head.dim,
        "sampling_rate": model.sampling_rate,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "logit_scale": model.logit_scale.item(),
    }
    if flags.json:
        print_json(summary)
    else:
        print(
            f"{summary['parameters'] / 1e6:.1f} million parameters, {summary['dim']} dimensions, "
            f"{summary['sampling_rate']} Hz: {flags.folder}"
        )
    return 0


def _parse_values(pairs: Mapping[str, str]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for name, value in pairs.items():
        try:
            parsed[name] = json.loads(value)
        except ValueError:  # a bare word, such as a model type
            parsed[name] = value
    return parsed
