"""The Whisper tower's speed, on the clip's own positions and on the window of 30 s, beside transformers' encoder.

    python -m bench.whisper [--threads 2] [--out bench/records/whisper]

Towers of the size of tiny.en with random weights, from int16 samples to pooled vectors; `embed` runs without gradients,
`train` adds the backward pass to every parameter. transformers is its `WhisperModel`'s encoder on our features of the
padded window, its states averaged over the clip's own positions, as every code does that takes it from the shelf. All
forms in turn after a warm-up; medians with the range of the middle 80 %.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import interleaved, machine
from fastclap import LogMel
from fastclap.config import AudioTowerConfig
from fastclap.files import write_atomic
from fastclap.models.audio_towers import build_audio_tower
from fastclap.models.layers import length_mask, masked_mean, prepare_waveform
from fastclap.models.products import fast_products

TINY = {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}
BATCHES = {"4 clips of 2 s": [2.0] * 4, "4 clips of 2 to 10 s": [2.0, 4.5, 7.0, 10.0]}
FORMS = {
    "transformers, window of 30 s": None,
    "fastclap, window of 30 s": {"window": "full"},
    "fastclap, the clip's own positions": {"window": "clip"},
    "the same, all layers": {"window": "clip", "hidden_states": "concatenated"},
}
Encode = Callable[[Tensor, Tensor, list[int]], Tensor]


class OffTheShelf(torch.nn.Module):
    """transformers' encoder on the padded window, and the mean over the clip's own positions."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        self.base = WhisperEncoder(WhisperConfig(**TINY))
        self.log_mel = LogMel("whisper")

    def forward(self, audio: Tensor, lengths: Tensor, host_lengths: list[int]) -> Tensor:
        waveform, lengths = prepare_waveform(audio, lengths)
        features, _ = self.log_mel(F.pad(waveform, (0, 480_000 - waveform.shape[1])))
        hidden = self.base(features.transpose(1, 2)).last_hidden_state
        return masked_mean(hidden, length_mask((lengths + 319) // 320, 1500))


def tower_of(form: dict[str, Any] | None) -> torch.nn.Module:
    torch.manual_seed(0)
    return OffTheShelf() if form is None else build_audio_tower(AudioTowerConfig("whisper", hf_config=TINY, **form))


def calls_of(seconds: list[float], train: bool) -> dict[str, Callable[[], Any]]:
    """What is timed, by form."""
    lengths = [round(16000 * each) for each in seconds]
    torch.manual_seed(0)
    audio = torch.randint(-3000, 3000, (len(lengths), max(lengths)), dtype=torch.int16)
    sizes = torch.tensor(lengths)

    def call(tower: torch.nn.Module) -> None:
        if train:
            tower.zero_grad()
            tower(audio, sizes, host_lengths=lengths).sum().backward()
            return
        with torch.inference_mode(), fast_products(torch.device("cpu")):
            tower(audio, sizes, host_lengths=lengths)

    towers = {name: tower_of(form).train(train) for name, form in FORMS.items()}
    calls = {name: (lambda tower=tower: call(tower)) for name, tower in towers.items()}
    for each in calls.values():
        each()
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the four tables")
    parser.add_argument("--out", default="bench/records/whisper", help="folder of record.json and README.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cpu")
    found: dict[str, dict[str, Any]] = {}
    for name, seconds in BATCHES.items():
        for kind in ("embed", "train"):
            times = interleaved(calls_of(seconds, kind == "train"), device, arguments.seconds)
            found[f"{kind}, {name}"] = {form: timing.as_dict() for form, timing in times.items()}
    record = {"machine": machine(device), "threads": arguments.threads, "clips": 4, "tables": found}
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "record.json", (json.dumps(record, indent=1) + "\n").encode())
    text = page(record)
    write_atomic(out / "README.md", text.encode())
    print(text)


def page(record: dict[str, Any]) -> str:
    """The record as tables."""
    lines = ["# The Whisper tower on a CPU", "", (__doc__ or "").split("\n\n")[2].replace("\n", " "), ""]
    lines += [f"{record['threads']} threads; {json.dumps(record['machine'])}"]
    for name, forms in record["tables"].items():
        first = next(iter(forms.values()))["median_ms"]
        lines += ["", f"## {name}", "", "| form | clips/s | ms (middle 80 %) | × |", "| --- | --- | --- | --- |"]
        for form, timing in forms.items():
            rate = 1e3 * record["clips"] / timing["median_ms"]
            span = f"{timing['median_ms']:.0f} ({timing['p10_ms']:.0f} to {timing['p90_ms']:.0f})"
            lines.append(f"| {form} | {rate:.1f} | {span} | {first / timing['median_ms']:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
