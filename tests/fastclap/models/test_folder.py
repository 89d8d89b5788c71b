"""State dicts are read from every format without running code; what cannot be read is named."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastclap.errors import ModelError
from fastclap.models.folder import load_state_dict_file


class Payload:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # the payload works
    mark.unlink()
    state = {"weight": torch.zeros(2), "extra": Payload(mark)}
    torch.save(state, tmp_path / "zip.pth.tar")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(state, protocol=2))
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Payload(mark), protocol=2))
    for name in ("zip.pth.tar", "legacy.pt", "plain.bin", "bare.pkl"):
        with pytest.raises(ModelError, match=rf"{name}: refused, .* run code"):
            load_state_dict_file(tmp_path / name)
        assert not mark.exists()


def test_state_dicts_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {"a": torch.arange(3.0), "b.c": torch.ones(2, 2, dtype=torch.bfloat16)}
    torch.save(state, tmp_path / "bare.pth.tar")
    loss = {"epoch": np.int64(3), "loss": np.float64(0.5)}  # as training codes keep them
    torch.save({**loss, "state_dict": state}, tmp_path / "wrapped.pt")
    torch.save({**loss, "model": state}, tmp_path / "model.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "weights.safetensors")
    for name in ("bare.pth.tar", "wrapped.pt", "model.pt", "legacy.pt", "weights.safetensors"):
        loaded = load_state_dict_file(tmp_path / name)
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state), name


def test_unreadable_state_dicts_are_named(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-800])
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name, message in (
        ("cut.pt", "not a readable torch file"),
        ("list.pt", "holds no state dict"),
        ("numbers.pt", "holds no state dict"),
        ("empty.pt", "not a readable torch file"),
        ("absent.pt", "no such weights file"),
    ):
        with pytest.raises(ModelError, match=f"{name}: {message}"):
            load_state_dict_file(tmp_path / name)
