"""What a machine with a GPU and no package index needs for `bench.gpu`: wheels, checkouts and a script, in one folder.

    make gpu-kit [REFERENCE=CHECKOUT] [OPEN_CLIP=CHECKOUT] [ICEFALL=CHECKOUT] [WITHOUT="NAME ..."] [LIMIT=MIB]
    .gpu-kit/run.sh --plan                          # there, in a copy of this tree: python -m bench.gpu --plan

The image is assumed to have Python 3.12 and the packages of `IMAGE`, above all torch and Triton, which every record
names and nothing may replace. The kit has the packages of `KIT` as wheels. `run.sh` has pip install them into a
folder of their own, which comes last on the import path: PYTHONPATH would put it before the image's packages, so a
`sitecustomize.py` on PYTHONPATH appends it, in every process that the benchmarks start. The image stays as it was.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_MIB = 55.0

IMAGE = {
    *("torch", "torchaudio", "torchvision", "triton", "transformers", "numpy", "scipy", "pyarrow", "pandas"),
    *("scikit-learn", "matplotlib", "rich", "einops", "safetensors", "tokenizers", "huggingface-hub"),
    *("hypothesis", "pytest", "pytest-benchmark", "pytest-xdist", "pytest-timeout", "pyyaml", "nvidia-ml-py"),
    *("tqdm", "requests", "aiohttp", "fsspec", "regex", "filelock", "packaging", "psutil", "joblib", "numba"),
    *("llvmlite", "lazy-loader", "msgpack", "pillow", "timm", "sentencepiece", "typing-extensions", "jinja2"),
    *("sympy", "networkx", "click", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime"),
}
"""The assumed image: torch 2.11.0, torchaudio 2.11.0, triton 3.6.0, transformers 5.17.0, numpy 2.5.2 and theirs."""

KIT: dict[str, tuple[str, ...]] = {
    "soundfile": ("cffi", "pycparser"),
    "soxr": (),
    "tyro": ("docstring-parser", "typeguard"),
    "datasets": ("dill<0.4.2", "multiprocess<0.70.20", "xxhash"),
    "open-clip-torch": ("ftfy", "wcwidth"),
    "inf-cl": (),
    "memeff": (),
    "siglip-kernel": (),
    "cut-cross-entropy": (),
    "liger-kernel": (),
    "nvidia-cuda-sanitizer-api==13.0.*": (),
    "flashmel": ("nvidia-mathdx", "nvidia-cuda-cccl==13.0.*"),  # the headers of torch's CUDA
    "lhotse": ("audioread", "cytoolz", "toolz", "intervaltree", "sortedcontainers", "tabulate"),
    "nnAudio": (),
    "torchlibrosa": ("librosa", "decorator", "pooch", "platformdirs"),
}
"""What is wanted, each with those of its dependencies that neither the image nor another line has."""

LEFT_OUT = {
    "quack-kernels": "needs nvidia-cutlass-dsl, whose libraries have 90 MB",
    "kaldifeat": "has to be compiled against the image's torch; its only wheel is for torch 1.8.1",
    "laion-clap": "is what a converted checkpoint is compared with, in tests and not in benchmarks",
    "msclap": "is what a converted checkpoint is compared with, in tests and not in benchmarks",
    "cuda-python": "is empty itself: what flashmel imports of it, cuda-bindings, comes with torch",
}
"""What is missing on purpose, and why."""

# A checkout is copied for its code: neither what tests and explains it nor what is large.
NOT_COPIED = (".git*", "tests", "docs", "tutorials", "__pycache__", "*.png", "*.jpg", "*.pdf", "*.ipynb", "*.csv")
LARGEST_FILE = 2 << 20
CHECKOUTS = {  # what each must have
    "reference": "scripts/train.py",
    "open_clip": "src/open_clip/clap_model.py",
    "icefall": "egs/emilia/CLAP/spear_roberta/zipformer2.py",
}
FOLDERS = {"icefall": "egs/emilia/CLAP/spear_roberta"}  # that are taken along, where it is not all of the checkout

WHEELS_FOR = ("--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:")
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")

RUN = r"""#!/bin/sh
# Runs `python -m bench.gpu` with the packages of this kit behind those of the image. PYTHON names another interpreter.
set -eu
kit=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$kit")
python=${PYTHON:-python3}
installed=${TMPDIR:-/tmp}/fastclap-gpu-kit-@DIGEST@

if [ ! -d "$installed" ]; then
    new=$installed.$$
    mkdir -p "$new"
    "$python" -m pip install -q --disable-pip-version-check --root-user-action=ignore --no-index --no-deps \
        --no-compile --no-cache-dir --upgrade --target "$new/packages" "$kit"/wheels/*.whl
    cp "$kit/sitecustomize.py" "$new"
    # flashmel takes CUDA's headers from the folder that holds its own, so those of the image are linked to from there.
    cuda=$("$python" -c 'import nvidia; print(list(nvidia.__path__)[0])' 2>/dev/null || true)/cu13/include
    here=$new/packages/nvidia/cu13/include
    if [ -d "$here" ] && [ -d "$cuda" ]; then
        for header in "$cuda"/*; do
            [ -e "$here/$(basename "$header")" ] || ln -s "$header" "$here"
        done
    fi
    mv -T "$new" "$installed"
fi

if [ -d "$kit/icefall" ]; then set -- --icefall "$kit/icefall" "$@"; fi
if [ -d "$kit/open_clip" ]; then set -- --open-clip "$kit/open_clip" "$@"; fi
if [ -d "$kit/reference" ]; then set -- --reference "$kit/reference" "$@"; fi
export PYTHONPATH="$root:$installed${PYTHONPATH:+:$PYTHONPATH}"
cd "$root"
exec "$python" -m bench.gpu "$@"
"""

SITECUSTOMIZE = '''"""Appends the kit's packages to the import path, where they shadow nothing."""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

here = os.path.dirname(os.path.abspath(__file__))
spec = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if os.path.abspath(entry) != here])
if spec is not None and spec.loader is not None:  # the image's own, which this one hides
    spec.loader.exec_module(module_from_spec(spec))
sys.path.append(os.path.join(here, "packages"))
'''


def normalized(requirement: str) -> str:
    """The name in a requirement or of a wheel, spelt as the index does."""
    name = re.match(r"[\w.-]*\w", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def requirements(without: Iterable[str] = ()) -> list[str]:
    """What the kit holds, but for some lines of `KIT`, by name."""
    dropped = {normalized(name) for name in without}
    lines = [(name, *needs) for name, needs in KIT.items() if normalized(name) not in dropped]
    return [requirement for line in lines for requirement in line]


def download(wanted: Sequence[str], folder: Path) -> None:
    """Has pip fetch one wheel for each, for the image's Python and not for this one."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", f"{platform}_x86_64")]
    options = ("-qq", "--disable-pip-version-check", "--no-deps", *WHEELS_FOR, *platforms, "--dest", str(folder))
    subprocess.run([sys.executable, "-m", "pip", "download", *options, *wanted], check=True)


def unmet(wheels: Iterable[Path]) -> list[str]:
    """Unconditional dependencies of the wheels that are nowhere, each as a line that says whose it is."""
    wheels = list(wheels)
    there = IMAGE | LEFT_OUT.keys() | {normalized(wheel.name.split("-")[0]) for wheel in wheels}
    lines = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            needs = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
        missing = [need for need in needs if ";" not in need and normalized(need) not in there]
        lines += [f"{wheel.name.split('-')[0]} needs {need}" for need in missing]
    return lines


def copy_checkout(checkout: Path, target: Path) -> None:
    """Copies the code of a checkout as plain files, and its commit into a file COMMIT."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        paths = {name: Path(folder, name) for name in names}
        large = {name for name, path in paths.items() if path.is_file() and path.stat().st_size > LARGEST_FILE}
        dangling = {name for name, path in paths.items() if not path.exists()}  # links to what is not there
        return large | dangling | shutil.ignore_patterns(*NOT_COPIED)(folder, names)

    if not (checkout / CHECKOUTS[target.name]).is_file():
        raise SystemExit(f"bench.gpu_kit: {checkout} is not the checkout wanted: it has no {CHECKOUTS[target.name]}")
    folder = FOLDERS.get(target.name, "")
    shutil.copytree(checkout / folder, target / folder, ignore=ignored)
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode == 0:
        (target / "COMMIT").write_text(found.stdout)


def make_kit(kit: Path, without: Iterable[str] = (), **checkouts: Path | None) -> None:
    """Makes a new kit next to the old one and then replaces that; checkouts are by the names of `CHECKOUTS`."""
    new = kit.with_name(f"{kit.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    (new / "wheels").mkdir(parents=True)
    for name, checkout in checkouts.items():
        if checkout is not None:
            copy_checkout(checkout, new / name)
    download(requirements(without), new / "wheels")
    # Wheels' names hold their versions, so a folder of this digest holds these packages.
    names = "".join(wheel.name for wheel in sorted((new / "wheels").iterdir()))
    script = RUN.replace("@DIGEST@", hashlib.sha256((names + RUN + SITECUSTOMIZE).encode()).hexdigest()[:12])
    (new / "run.sh").write_text(script)
    (new / "run.sh").chmod(0o755)
    (new / "sitecustomize.py").write_text(SITECUSTOMIZE)
    shutil.rmtree(kit, ignore_errors=True)
    new.rename(kit)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def report(kit: Path) -> str:
    """Every wheel with its version and size, the checkouts, what is missing and why, and the sum."""
    wheels = sorted((kit / "wheels").glob("*.whl"))
    lines = [f"{' '.join(w.name.split('-')[:2]):<40}{w.stat().st_size / 1000:8.0f} kB" for w in wheels]
    folders = [kit / name for name in CHECKOUTS if (kit / name).is_dir()]
    lines += [f"{f'checkout {folder.name}':<40}{size_of(folder) / 1000:8.0f} kB" for folder in folders]
    lines += [f"left out: {name} {reason}" for name, reason in LEFT_OUT.items()]
    lines += [f"missing: {line}; add it to KIT or LEFT_OUT" for line in unmet(wheels)]
    return "\n".join([*lines, f"{kit}: {size_of(kit) / 2**20:.1f} MiB"])


def too_large(kit: Path, limit: float) -> str | None:
    """What could be dropped if the kit has more than `limit` MiB, the largest first; None if it has not."""
    size = size_of(kit) / 2**20
    if size <= limit:
        return None
    wheels = {normalized(w.name.split("-")[0]): w.stat().st_size for w in (kit / "wheels").glob("*.whl")}
    sums = {name: sum(wheels.get(normalized(r), 0) for r in (name, *needs)) for name, needs in KIT.items()}
    largest = sorted((name for name in sums if sums[name]), key=lambda name: -sums[name])
    drop = ", ".join(f"{name} ({sums[name] / 2**20:.1f})" for name in largest)
    return (
        f"{size:.1f} MiB are more than {limit:g}. Leave out what matters least (WITHOUT), largest first, each in MiB "
        f"with what only it needs: {drop}; or allow more (LIMIT)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="checkout of ParaSpeechCLAP to take along")
    parser.add_argument("--open-clip", type=Path, help="checkout of open_clip to take along")
    parser.add_argument("--icefall", type=Path, help="checkout of yfyeung/icefall, branch clsp, to take along")
    parser.add_argument("--without", nargs="+", choices=KIT, default=[], metavar="NAME", help="packages to leave out")
    parser.add_argument("--limit", type=float, default=LIMIT_MIB, help="largest size in MiB (default: %(default)s)")
    args = parser.parse_args(arguments)
    kit = ROOT / ".gpu-kit"
    make_kit(kit, args.without, **{name: getattr(args, name) for name in CHECKOUTS})
    print(report(kit))
    problem = too_large(kit, args.limit)
    if problem is not None:
        print(f"bench.gpu_kit: {problem}", file=sys.stderr)
    return 0 if problem is None else 1


if __name__ == "__main__":
    sys.exit(main())
