"""The kit for a machine without a package index: what is in it, how large it may be, and what its script runs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import gpu_kit, icefall
from bench.reference_step import commit_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What stands for bench.gpu: says what it was told and where its modules are from, also in a process that it starts.
STUB = """
import subprocess, sys
import only_in_kit, yaml
print(sys.argv[1:], only_in_kit.__file__, yaml.__file__, sep="\\n", flush=True)
subprocess.run([sys.executable, "-c", "import only_in_kit, yaml; print(yaml.__file__)"], cwd="/", check=True)
sys.exit(7)
"""


def write_wheel(folder: Path, name: str, version: str, modules: Sequence[str] = (), needs: Sequence[str] = ()) -> None:
    info = f"{name}-{version}.dist-info"
    metadata = "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for module in modules:
            wheel.writestr(f"{module}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit in a project of its own: one wheel, with a module that only it has and one that the image has too."""

    def download(wanted: Sequence[str], folder: Path) -> None:
        write_wheel(folder, "soundfile", "1.0", ("only_in_kit", "yaml"), ("numpy", "cffi", 'tomli; extra == "test"'))
        assert "soundfile" in wanted

    monkeypatch.setattr(gpu_kit, "download", download)
    monkeypatch.setattr(gpu_kit, "ROOT", tmp_path / "project")
    (tmp_path / "project" / "bench").mkdir(parents=True)
    (tmp_path / "project" / "bench" / "gpu.py").write_text(STUB)
    return tmp_path / "project" / ".gpu-kit"


def run(kit: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (kit.parents[1] / "tmp").mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(kit.parents[1] / "tmp"), "PYTHONPATH": ""}
    command = [str(kit / "run.sh"), *arguments]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_script_runs_bench_gpu_with_the_kit_behind_the_image(kit: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for file in ("scripts/train.py", "tests/test_train.py", "picture.png", ".git/HEAD"):
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        (checkout / file).write_text("")
    (checkout / "weights.bin").write_bytes(bytes(gpu_kit.LARGEST_FILE + 1))
    gpu_kit.make_kit(kit, reference=checkout)
    assert [path.name for path in (kit / "reference").rglob("*") if path.is_file()] == ["train.py"]

    found = run(kit, "--lots", "a b", "--plan")
    assert found.returncode == 7, found.stderr  # bench.gpu's own
    told, only_in_kit, yaml, yaml_of_child = found.stdout.splitlines()
    assert told == str(["--reference", str(kit / "reference"), "--lots", "a b", "--plan"])
    assert only_in_kit.startswith(str(tmp_path / "tmp"))
    assert yaml == yaml_of_child and not yaml.startswith(str(tmp_path))

    (kit / "wheels" / "soundfile-1.0-py3-none-any.whl").unlink()  # installed once, not again
    assert run(kit).returncode == 7


def test_a_copied_checkout_names_its_commit(kit: Path, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path / "checkout"), "-c", "user.name=a", "-c", "user.email=b", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "checkout" / "scripts").mkdir(parents=True)
    (tmp_path / "checkout" / "scripts" / "train.py").write_text("")
    git("init")
    git("add", ".")
    git("commit", "--message", "all")
    gpu_kit.make_kit(kit, reference=tmp_path / "checkout")
    assert not (kit / "reference" / ".git").exists()
    assert commit_of(kit / "reference") == git("rev-parse", "HEAD")


def test_of_icefall_only_the_training_of_clsp_is_taken_and_links_are_files(kit: Path, tmp_path: Path) -> None:
    checkout, folder = tmp_path / "checkout", Path(gpu_kit.FOLDERS["icefall"])
    (checkout / folder).mkdir(parents=True)
    (checkout / folder / "zipformer2.py").symlink_to("../elsewhere.py")
    (checkout / folder / "encoder_interface.py").symlink_to("../missing.py")
    (checkout / folder.parent / "elsewhere.py").write_text("layers")
    gpu_kit.make_kit(kit, icefall=checkout)
    copied = kit / "icefall" / folder / "zipformer2.py"
    assert [path for path in (kit / "icefall").rglob("*") if path.is_file()] == [copied]
    assert copied.read_text() == "layers" and not copied.is_symlink()
    found = run(kit, "--plan")
    assert found.stdout.splitlines()[0] == str(["--icefall", str(kit / "icefall"), "--plan"])
    assert folder == icefall.FOLDER
    with pytest.raises(SystemExit, match=r"has no egs/emilia/CLAP/spear_roberta/zipformer2\.py"):
        gpu_kit.make_kit(kit, icefall=tmp_path)


def test_a_new_kit_takes_the_place_of_the_old_one(kit: Path) -> None:
    gpu_kit.make_kit(kit)
    script = (kit / "run.sh").read_text()
    gpu_kit.make_kit(kit)
    assert (kit / "run.sh").read_text() == script
    write_wheel(kit / "wheels", "soundfile", "0.9")
    gpu_kit.make_kit(kit)
    assert [path.name for path in (kit / "wheels").iterdir()] == ["soundfile-1.0-py3-none-any.whl"]
    assert not kit.with_name(".gpu-kit.new").exists()


def test_a_folder_that_is_not_the_checkout_is_refused(kit: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no src/open_clip/clap_model\.py"):
        gpu_kit.make_kit(kit, open_clip=tmp_path)


def test_size_is_limited(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_kit.main(["--limit", "1"]) == 0
    out, err = capsys.readouterr()
    assert "soundfile 1.0" in out and "MiB" in out and not err
    assert gpu_kit.main(["--limit", "0.001"]) == 1
    assert "more than 0.001" in capsys.readouterr().err

    for name, kilobytes in (("nvidia_mathdx", 300), ("flashmel", 100), ("lhotse", 350)):
        (kit / "wheels" / f"{name}-1-py3-none-any.whl").write_bytes(bytes(kilobytes << 10))
    message = gpu_kit.too_large(kit, 0.5)
    assert message is not None and "flashmel (0.4), lhotse (0.3), soundfile (0.0)" in message
    assert gpu_kit.too_large(kit, 1.0) is None


def test_what_is_missing_is_named_with_its_reason(kit: Path) -> None:
    gpu_kit.make_kit(kit)
    told = gpu_kit.report(kit)
    assert "missing: soundfile needs cffi" in told
    assert "numpy" not in told and "tomli" not in told  # on the image; wanted by nobody
    assert all(f"left out: {name} {reason}" in told for name, reason in gpu_kit.LEFT_OUT.items())


def test_every_peer_is_in_the_kit_or_has_a_reason_and_the_image_is_left_alone() -> None:
    names = [gpu_kit.normalized(requirement) for requirement in gpu_kit.requirements()]
    assert len(names) == len(set(names))
    assert not set(names) & gpu_kit.IMAGE and not gpu_kit.LEFT_OUT.keys() & {*names, *gpu_kit.IMAGE}
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    peers = {gpu_kit.normalized(name) for name in project["optional-dependencies"]["peers"]}
    needed = {gpu_kit.normalized(name) for name in project["dependencies"] if "python_version" not in name}
    assert peers | needed <= {*names, *gpu_kit.IMAGE, *gpu_kit.LEFT_OUT}
    without = gpu_kit.requirements(without=["nnAudio", "flashmel"])
    assert {"nnAudio", "flashmel", "nvidia-mathdx"}.isdisjoint(without) and "soundfile" in without
