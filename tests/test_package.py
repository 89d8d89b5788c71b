"""The package as a user installs it: what can be imported, from where, how fast, and what must not be importable."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastclap

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, *, cwd: Path = ROOT, path: str = ".") -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_bare_source_tree_imports_and_leaves_transformers_alone() -> None:
    out = python(
        "import fastclap, fastclap.kernels.contrastive.operator, fastclap.train.config, importlib.util\n"
        "print(callable(fastclap.info_nce), fastclap.LogMel.__name__)\n"
        "for name in ('kernels', 'train'):\n"
        "    spec = importlib.util.find_spec(name)\n"
        "    assert spec is None or spec.origin is None, spec\n"  # a folder on the path at most, never our code
        "from transformers import WavLMModel\n"
        "print(WavLMModel.__name__)"
    )
    assert out.split() == ["True", "LogMel", "WavLMModel"]


def test_no_top_level_kernels_or_train_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "train" / "__init__.py").exists()


def test_the_newest_changes_are_of_this_version() -> None:
    newest = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)[0]
    assert newest == fastclap.__version__


def test_import_is_lazy() -> None:
    out = python(
        "import torch, sys\n"
        "before = set(sys.modules)\n"
        "import fastclap\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'transformers', 'torchaudio', 'triton', 'sklearn', 'datasets', 'matplotlib', 'scipy'}))"
    )
    assert out.strip() == "[]"


def test_configuration_and_help_need_no_torch() -> None:
    out = python(
        "import sys\n"
        "import fastclap.train.cli as cli\n"
        "try:\n    cli.parse(['small', '--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    assert "--data.train" in out and "--run-dir" in out


def test_wheel_holds_every_module_once(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {
        *(f"fastclap/{path.relative_to(ROOT / 'fastclap')}" for path in (ROOT / "fastclap").glob("**/*.py")),
        *(f"fastclap/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").glob("**/*.py")),
        *(f"fastclap/train/{path.relative_to(ROOT / 'train')}" for path in (ROOT / "train").glob("**/*.py")),
    }
    assert modules <= set(names), sorted(modules - set(names))
    assert [name for name in names if "/csrc/" in name] == ["fastclap/kernels/csrc/log_mel_cuda.cuh"]
    assert not [name for name in names if re.match(r"(kernels|train|tests|bench)/", name)]
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    out = python(
        "import sys\n"  # an editable install of the tree under test must not answer instead
        "sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
        "import fastclap, fastclap.kernels.contrastive.operator, fastclap.train.config; print(fastclap.__file__)",
        cwd=tmp_path,
        path=str(site),
    )
    assert str(site) in out
