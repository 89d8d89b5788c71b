"""`fastclap convert`: checkpoints of other codebases to model folders, and models to the form of CLSP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastclap.console import note, show, show_json, writing
from fastclap.errors import ConfigError
from fastclap.reading import parse_json


@dataclass(kw_only=True)
class Flags:
    checkpoint: Annotated[str, tyro.conf.Positional]
    """ParaSpeechCLAP .pth.tar, LAION-CLAP .pt, MS-CLAP .pth, CLSP's .pt or folder, folder of VoiceCLAP-Small, of PE-AV
    or of a transformers CLAP, or one of these on the hub: owner/name, or owner/name/file. With --to clsp also a model
    folder or a run folder."""
    folder: Annotated[str, tyro.conf.Positional]
    """Model folder to write; with --to clsp, a file that ends in .pt, or a folder."""
    to: Literal["fastclap", "clsp"] = "fastclap"
    """clsp: write a model of CLSP's architecture as CLSP is saved: icefall's .pt, or a folder as on the hub."""
    tokenizer: str | None = None
    """Folder or hub id of the text tower's tokenizer (default: the published one's, from the hub)."""
    audio_config: dict[str, str] = field(default_factory=dict)
    """Entries of the audio tower's transformers configuration that differ from the published, as pairs: NAME JSON. For
    CLSP, fields of model.audio.zipformer, and n_mels."""
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
  fastclap convert yfyeung/CLSP models/clsp --license apache-2.0
  fastclap convert epoch-45.pt models/stage1 --tokenizer roberta-base
  fastclap convert runs/clsp-stage2/model stage2.pt --to clsp
  fastclap convert own.pth.tar models/own --audio-config num_attention_heads 12 do_stable_layer_norm false
"""


def run(flags: Flags) -> int:
    from fastclap.models.clap import CLAP, read_checkpoint
    from fastclap.models.folder import find_model, is_foreign
    from fastclap.models.foreign import find_checkpoint
    from fastclap.models.foreign.clsp import write_clsp
    from fastclap.models.lora import merged

    back = flags.to == "clsp"
    if back and flags.license is not None:
        raise ConfigError("--license goes into a model card, and CLSP's form has none")
    found = find_model(flags.checkpoint) if back else find_checkpoint(flags.checkpoint)
    note(f"reading {found}")
    if is_foreign(found):
        model = read_checkpoint(
            found,
            tokenizer=flags.tokenizer,
            audio_config=_parse_values(flags.audio_config),
            text_config=_parse_values(flags.text_config),
        )
    elif flags.audio_config or flags.text_config:
        raise ConfigError(
            f"{found}: a fastclap model has its configuration; leave --audio-config and --text-config out"
        )
    else:
        model = CLAP.from_pretrained(found, tokenizer=flags.tokenizer)
    note(f"writing {flags.folder}")
    with writing(flags.folder):
        if back:
            write_clsp(Path(flags.folder), model.config, merged(model.state_dict(), model.config), model.tokenizer)
        else:
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
        show_json(summary)
    else:
        show(
            f"{summary['parameters'] / 1e6:.1f} million parameters, {summary['dim']} dimensions, "
            f"{summary['sampling_rate']} Hz: {flags.folder}"
        )
    return 0


def _parse_values(pairs: Mapping[str, str]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for name, value in pairs.items():
        try:
            parsed[name] = parse_json(value, f"the value of {name}", ConfigError)
        except ConfigError:
            if value[:1] in ("[", "{", '"'):
                raise
            parsed[name] = value  # a bare word, such as a model type
    return parsed
