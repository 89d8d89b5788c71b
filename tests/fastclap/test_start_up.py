"""What a command waits for before it answers: no package that it has no use for is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fastclap.commands.main import main

# Each of them takes from a tenth of a second to a whole one.
HEAVY = (
    *("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.onnx", "sympy", "triton", "transformers"),
    *("datasets", "pandas", "sklearn", "scipy", "matplotlib", "torchaudio", "soxr"),
)


def test_a_search_imports_nothing_heavy(clap_folder: str, write_clip: Callable[..., str], tmp_path: Path) -> None:
    clip, index = write_clip("clip.wav", 1), str(tmp_path / "index.parquet")
    assert main(["embed", clap_folder, clip, "--out", index]) == 0
    code = (
        "import sys\n"
        "from fastclap.commands.main import main\n"
        f"assert main(['search', {clap_folder!r}, {index!r}, 'a calm voice']) == 0\n"
        f"assert main(['search', {clap_folder!r}, {index!r}, '--audio', {clip!r}, '--json']) == 0\n"
        f"print('needless:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("needless: []\n")
