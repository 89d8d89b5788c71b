"""Arrays, models, losses and training from packed shards need no package that reads audio files or flags."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import yaml

from fastclap.data import load_manifest
from fastclap.data.pack import pack

ROOT = Path(__file__).resolve().parents[1]
LEAN = ROOT / "tests" / "lean_image"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(LEAN), str(ROOT))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_everything_but_files_works_without_audio_packages(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = []
    for index in range(8):
        wave = (1000 * random.standard_normal(16000)).astype(np.int16)
        soundfile.write(tmp_path / f"{index}.wav", wave, 16000, subtype="PCM_16")
        rows.append({"relative_audio_path": f"{index}.wav", "text_description": f"Voice {index}."})
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pack(load_manifest([str(manifest)]), tmp_path / "packed")
    config = {
        "run_dir": str(tmp_path / "run"),
        "steps": 2,
        "batch_size": 4,
        "device": "cpu",
        "data": {"train": [str(tmp_path / "packed")], "crop_seconds": 0.5, "workers": 0},
        "model": {"audio": {"width": 32, "layers": 1}, "text": {"width": 32, "layers": 1, "vocab_size": 300}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    found = python(str(LEAN / "steps.py"), str(tmp_path / "packed"), str(tmp_path / "config.yaml"))
    assert found.returncode == 0, found.stderr
    assert found.stdout.endswith("done\n")


def test_absent_packages_are_not_found() -> None:
    found = python(
        "-c",
        "import importlib.metadata, importlib.util\n"
        "assert importlib.util.find_spec('soundfile') is None and importlib.util.find_spec('torch') is not None\n"
        "names = {found.metadata['Name'] for found in importlib.metadata.distributions()}\n"
        "assert 'torch' in names and not names & {'soundfile', 'soxr', 'tyro', 'datasets'}\n"
        "try:\n"
        "    import soxr\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error.name)\n",
    )
    assert found.stdout == "soxr\n", found.stderr
