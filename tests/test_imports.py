"""The import rule: who may build on whom, no circles, and no file that is too long to be read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 900  # lines of a file

# A module imports from its own folder, or from what stands to the right of it.
ORDER = (
    {"tokenizer", "mteb_model"},  # public names of what stands deeper
    {"commands"},
    {"apps", "prepare", "train"},
    {"evaluation"},
    {"models", "data", "drop_in"},
    {"losses", "features", "grad_cache"},
    {"kernels"},
    {"audio", "prompts", "testing"},
    {"flags"},
    {"reading"},
    {"config", "files", "console", "threads", "fork_server"},
    {"bounds", "memory"},
    {"errors"},
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# Within an operator's folder: an engine may build on the plain torch engine, and nothing on the operator.
PARTS = (
    {"operator"},
    {"triton_engine", "cuda_engine", "native"},
    {"torch_engine"},
    {"triton_operands"},
    {"triton_kernels"},
    {"shared", "spec"},
)
PART_RANK = {name: rank for rank, names in enumerate(PARTS) for name in names}


def sources() -> Iterator[tuple[str, Path]]:
    """Modules of the package with their files; the folders that are linked into it stand at the root."""
    for folder in ("fastclap", "kernels", "train"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            if parts[:2] in (("fastclap", "kernels"), ("fastclap", "train")):
                continue  # reached through a link
            yield ".".join(parts if folder == "fastclap" else ("fastclap", *parts)).removesuffix(".__init__"), file


MODULES = dict(sources())


def imported(name: str) -> set[str]:
    """Modules of the package that a module imports, also within functions and for its types."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {module for module in found if module in MODULES and module != name}


GRAPH = {name: imported(name) for name in MODULES if name not in ("fastclap", "fastclap.__main__")}


def place(module: str) -> str:
    return module.split(".")[1] if "." in module else "package"


def test_imports_run_one_way() -> None:
    places = {place(name) for name in GRAPH}
    assert places == set(RANK), "a folder or module without a place in the order"
    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in sorted(others - {"fastclap"})
        if place(name) != place(other) and RANK[place(name)] >= RANK[place(other)]
    ]
    assert not wrong


def test_there_is_no_circle() -> None:
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1][::-1]))


def test_an_operator_imports_its_engines_and_never_the_other_way_round() -> None:
    within = [
        (name, other)
        for name, others in GRAPH.items()
        for other in others
        if place(name) == "kernels" and name.rpartition(".")[0] == other.rpartition(".")[0] != "fastclap.kernels"
    ]
    assert len(within) > 10
    for name, other in within:
        assert PART_RANK[name.rpartition(".")[2]] < PART_RANK[other.rpartition(".")[2]], f"{name} imports {other}"
    assert not [
        f"{name} imports {other}" for name, others in GRAPH.items() for other in others if name == f"{other}_triton"
    ]


def test_no_file_is_too_long() -> None:
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for folder in ("fastclap", "kernels", "train", "bench", "tests")
        for file in (ROOT / folder).rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}
