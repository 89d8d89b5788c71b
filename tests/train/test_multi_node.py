"""The commands of docs/multi-node.md: two machines are two torchruns on this one."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from fastclap.train.config import TrainConfig
from fastclap.train.loop import train
from tests.test_docs import ROOT, blocks, commands
from tests.train.test_distributed import exported, finish, on_ranks

Build = Callable[..., TrainConfig]


def torchruns(page: str) -> list[list[str]]:
    """The words of each torchrun of a page."""
    shell = [text for language, _, text in blocks(ROOT / "docs" / page) if language == "bash"]
    return [words for text in shell for words in commands(text) if words[0] == "torchrun"]


def with_values(words: list[str], values: dict[str, str]) -> list[str]:
    """The command with other values of flags, each of which it has."""
    for flag, value in values.items():
        words = [*words[: words.index(flag) + 1], value, *words[words.index(flag) + 2 :]]
    return words


def processes_of(agent: int) -> list[int]:
    """The training processes that a torchrun has started."""
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/stat")
        if int(path.read_text().rsplit(")", 1)[1].split()[1]) == agent
    ]


def start_node(rank: int, config: TrainConfig, port: int) -> subprocess.Popen[str]:
    """The page's command for this machine, with one process and a tiny run."""
    by_hand, _ = torchruns("multi-node.md")
    file = Path(config.run_dir).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config.to_dict()))
    own = {"--node-rank": str(rank), "--master-addr": "localhost", "--master-port": str(port), "--nproc-per-node": "1"}
    own |= {"--data.train": config.data.train[0], "--data.valid": config.data.valid[0]}
    own |= {"--batch-size": str(config.batch_size), "--run-dir": config.run_dir}
    _, *words = with_values(by_hand, own)
    command = [sys.executable, "-m", "torch.distributed.run", *words, "--config", str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_machines_train_and_start_again_after_a_kill(tiny: Build) -> None:
    """SIGKILL to the process of the second machine: both start again, and the run ends as if nothing had been."""
    whole, struck = (tiny(name, steps=40, save_every=5, log_every=1, valid_every=20) for name in ("whole", "struck"))
    assert on_ranks(2, train, whole) == [0, 0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [start_node(rank, struck, port) for rank in (0, 1)]
    metrics = Path(struck.run_dir) / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 12:
        assert all(node.poll() is None for node in nodes), [node.communicate() for node in nodes]
        time.sleep(0.01)
    (victim,) = processes_of(nodes[1].pid)
    os.kill(victim, signal.SIGKILL)
    (first, error), (second, _) = (finish(node) for node in nodes)
    assert "rank 0 lost the connection to another process" in error and "resumed at step" in first
    assert not second.strip(), "only rank 0 writes lines"
    assert all(torch.equal(tensor, exported(struck)[name]) for name, tensor in exported(whole).items())
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 41))
    assert [record["step"] for record in records if record["kind"] == "valid"] == [20, 40]


def test_the_slurm_script_starts_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variables that SLURM sets on the second of two machines."""
    by_hand, of_slurm = torchruns("multi-node.md")
    for name, value in {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "MASTER_ADDR": "node0"}.items():
        monkeypatch.setenv(name, value)
    assert [os.path.expandvars(word) for word in of_slurm] == with_values(by_hand, {"--node-rank": "1"})


def test_the_slurm_job_is_a_shell_script() -> None:
    (job,) = (text for language, _, text in blocks(ROOT / "docs/multi-node.md") if "#SBATCH" in text)
    assert job.startswith("#!/bin/bash\n#SBATCH ")
    assert subprocess.run(["bash", "-n", "-c", job], check=False).returncode == 0
    assert shlex.split(job.splitlines()[-1])[-2:] == ["bash", "node.sh"]
