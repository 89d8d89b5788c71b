"""Unit vectors of whole collections of clips: the way that evaluation and every command with many clips share.

Clips are decoded, sorted and padded once, in threads one batch ahead of the model (`eval_batches`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from fastclap.data import BadClip, Row, eval_batches
from fastclap.models.encoder import DualEncoder


def embed_clips(
    model: DualEncoder, manifest: Sequence[Row], *, batch_size: int = 32, threads: int = 4, bad: list[BadClip]
) -> Iterator[tuple[list[int], Tensor]]:
    """Some rows of the manifest and their unit vectors [k, D], batch by batch, until all readable clips are done.

    Args:
        model: in any mode, which it keeps.
        manifest: the clips; any sequence of rows.
        batch_size: clips encoded at a time.
        threads: decoding threads.
        bad: receives the clips that cannot be used.
    """
    for batch in eval_batches(manifest, model.sampling_rate, batch_size, bad=bad, threads=threads):
        yield batch.rows, model.embed_batch(batch.audio, batch.lengths.tolist())
