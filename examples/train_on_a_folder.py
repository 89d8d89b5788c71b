"""Train on a folder that has a subfolder of recordings for each class, then ask the model about one clip of each.

    python examples/train_on_a_folder.py RECORDINGS [flags of fastclap-train]

RECORDINGS/happy/0001.wav becomes a row of RECORDINGS/train.jsonl with the caption "A person sounds happy."; captions
that say more about a clip teach more. The run is in RECORDINGS/run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastclap import CLAP
from fastclap.train.cli import main as fastclap_train

SUFFIXES = {".wav", ".flac", ".ogg", ".mp3"}


def main(folder: str, *flags: str) -> dict[str, str]:
    """Returns the caption that the model finds nearest to the first clip of each class."""
    root = Path(folder)
    clips = sorted(path for path in root.glob("*/*") if path.suffix.lower() in SUFFIXES)
    rows = [
        {
            "relative_audio_path": str(clip.relative_to(root)),
            "text_description": f"A person sounds {clip.parent.name}.",
            "classification_tag": clip.parent.name,
        }
        for clip in clips
    ]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fastclap_train(["small", "--data.train", str(root / "train.jsonl"), "--run-dir", str(root / "run"), *flags])

    model = CLAP.from_pretrained(root / "run" / "model")
    first = {clip.parent.name: clip for clip in reversed(clips)}
    captions = [f"A person sounds {name}." for name in first]
    nearest = model.similarity(list(first.values()), captions).argmax(dim=1)
    return {str(clip): captions[index] for clip, index in zip(first.values(), nearest.tolist(), strict=True)}


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    for clip, caption in main(*sys.argv[1:]).items():
        print(f"{clip}: {caption}")
