"""Collections take the same way as single clips: batches that are padded already give the vectors of `embed_audio`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclap import CLAP
from fastclap.apps.embed import clip_row
from fastclap.data import BadClip
from fastclap.evaluation.embedding import embed_clips
from fastclap.testing import assert_close_rel

Write = Callable[..., str]


@pytest.mark.parametrize(
    ("restriction", "sizes"), [(None, [3, 2]), ("single_on_cpu", [1, 1, 1, 1, 1]), ("equal_lengths_only", [1, 1, 1, 2])]
)
def test_padded_batches_give_the_vectors_of_single_clips(
    clap_folder: str, write_clip: Write, tmp_path: Path, restriction: str | None, sizes: list[int]
) -> None:
    model = CLAP.from_pretrained(clap_folder).train()
    paths = [write_clip(f"{number}.wav", number) for number in (0, 3, 2, 1, 5)]  # 0 and 5 are of equal length
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    expected = torch.cat([model.embed_audio([path]) for path in paths])
    if restriction is not None:
        setattr(model, restriction, True)
    encoded: list[int] = []
    model.audio_branch.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    clips = [clip_row(path, "here") for path in [*paths, str(tmp_path / "broken.wav")]]
    bad: list[BadClip] = []
    found: dict[int, Any] = {}
    for rows, vectors in embed_clips(model, clips, batch_size=3, bad=bad):
        assert not vectors.is_inference() and not vectors.requires_grad
        found.update(zip(rows, vectors, strict=True))
    assert_close_rel("vectors", expected, torch.stack([found[row] for row in range(5)]), 1e-5)
    assert [(clip.row, clip.origin) for clip in bad] == [(5, "here")]
    assert encoded == sizes
    assert all(module.training for module in model.modules())
