"""Batches without padding: the valid rows of all sequences as one tensor [total, C].

Norms, linear layers and dropout look at one row at a time, so they run on packed rows as they are. Attention alone
must know where a sequence ends. On a GPU in half precision torch's variable-length flash attention reads that from
cumulative lengths. Elsewhere (CPU, float32, attention dropout, which the flash operator lacks) the rows are laid out
padded for the attention only, under a key mask; on a CPU, sequences that are large enough to pay for a call are
attended to one by one.

Shapes come from lengths that the host knows and index tensors are copied from pinned memory: nothing waits for the
device. A text encoder of transformers packs through its attention interface (`use_packed_attention`); one that
cannot is run on groups of captions of similar length (`length_groups`).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION = "fastclap_packed"  # name in transformers' attention interface
# encoders whose layers know positions from position_ids alone and hand unknown arguments on to the attention function
_PACKABLE_MODELS = frozenset({"bert", "roberta", "xlm-roberta", "camembert"})
# values of a query from which a call of its own beats padding (measured on one x86 core, forward and backward)
_MIN_CALL = 4096


class Packing:
    """Where the rows of sequences lie when packed one after the other, and in their padded batch.

    Args:
        lengths: rows of each sequence, at least one sequence.
        device: of the tensors to be packed.

    Attributes:
        lengths: as given.
        count: sequences.
        longest: rows of the padded form.
        total: rows of the packed form.
        positions: int64 [total], of each row within its sequence.
        starts: int32 [B + 1], first row of each sequence in the packed form, and `total`.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.count = len(self.lengths)
        self.longest = max(self.lengths)
        self.total = sum(self.lengths)
        starts = np.cumsum([0, *self.lengths])
        sequence = np.repeat(np.arange(self.count), self.lengths)
        positions = np.arange(self.total) - starts[sequence]
        rows = np.stack([sequence * self.longest + positions, positions])
        self._rows, self.positions = to_device(torch.from_numpy(rows), device)
        self.starts = to_device(torch.from_numpy(starts.astype(np.int32)), device)
        columns = torch.arange(self.longest, device=device)
        self._keys = (columns < self.starts.diff()[:, None])[:, None, None]  # bool [B, 1, 1, longest]

    def pack(
        self,
        x: Tensor,  # [B, T >= longest, ...]
    ) -> Tensor:  # [total, ...]
        """The valid rows of a padded batch."""
        return x[:, : self.longest].flatten(0, 1).index_select(0, self._rows)

    def unpack(
        self,
        x: Tensor,  # [total, ...]
    ) -> Tensor:  # [B, longest, ...]
        """The padded form of packed rows, zero past each end."""
        padded = x.new_zeros(self.count * self.longest, *x.shape[1:])
        return padded.index_copy(0, self._rows, x).unflatten(0, (self.count, self.longest))

    def attention(
        self,
        query: Tensor,  # [total, H, d]
        key: Tensor,  # [total, H, d]
        value: Tensor,  # [total, H, d]
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:  # [total, H, d]
        """softmax(scale · q kᵀ) v of each sequence by itself.

        Args:
            query, key, value: packed rows.
            dropout: rate on the attention weights.
            scale: 1/√d when None.
        """
        if dropout == 0 and _flash_takes(query):
            return _varlen_attention()(
                query, key, value, self.starts, self.starts, self.longest, self.longest, scale=scale
            )
        if query.device.type == "cpu" and query.numel() >= _MIN_CALL * self.count:
            parts = zip(*(x.transpose(0, 1)[None].split(self.lengths, 2) for x in (query, key, value)), strict=True)
            attended = [F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale) for q, k, v in parts]
            return torch.cat(attended, 2)[0].transpose(0, 1)
        q, k, v = (self.unpack(x).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, self._keys, dropout, scale=scale)
        return self.pack(out.transpose(1, 2))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy of a CPU tensor on the device, for which the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class HostCopy:
    """A tensor on its way from the device to the host; reading it waits for no later work."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor.detach()
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensor:
        """The tensor on the host, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


def longest_of(name: str, lengths: Sequence[int], batch: Tensor) -> int:
    """The largest of the host's lengths of the rows of `batch` [B, T, ...].

    Raises:
        ValueError: there is not one for each row, or one lies outside of 0..T.
    """
    if len(lengths) != len(batch):
        raise ValueError(f"{name} has {len(lengths)} entries for a batch of {len(batch)}; give one for each row")
    for row, length in enumerate(lengths):
        if not 0 <= length <= batch.shape[1]:
            raise ValueError(f"{name}[{row}] is {length}, but the batch is padded to {batch.shape[1]}")
    return max(lengths)


def length_groups(lengths: Sequence[int], cost: int, most: int = 4) -> list[list[int]]:
    """Indices of the sequences, sorted by length and cut into groups to be padded to their own longest.

    The group whose best cut saves the most padding is cut in two, again and again.

    Args:
        lengths: of each sequence.
        cost: what a further group must save, in padded rows: those computed in the time that its kernel launches take.
        most: largest number of groups.
    """
    groups = [sorted(range(len(lengths)), key=lengths.__getitem__)]

    def best_cut(group: list[int]) -> tuple[int, int]:
        longest = lengths[group[-1]]
        return max(((longest - lengths[group[at - 1]]) * at, at) for at in range(1, len(group) + 1))

    while len(groups) < most:
        (saving, at), index = max((best_cut(group), index) for index, group in enumerate(groups))
        if saving <= cost:
            break
        groups[index : index + 1] = [groups[index][:at], groups[index][at:]]
    return groups


def has_sharded_parts(module: nn.Module) -> bool:
    """Whether FSDP2 gathers parts of the module over the ranks whenever they run."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


# ---------------------------------------------------------------------------------------------------------------------
# flash attention


@functools.cache
def _varlen_attention() -> Any:
    """torch's operator, None where this build or release (before 2.11) has none that takes a scale."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes_scale = "scale" in inspect.signature(varlen_attn).parameters
    return varlen_attn if takes_scale and torch.backends.cuda.is_flash_attention_available() else None


@functools.cache
def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0) and _varlen_attention() is not None


def _flash_takes(query: Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.backends.cuda.flash_sdp_enabled()
        and _has_flash(query.device)
    )


# ---------------------------------------------------------------------------------------------------------------------
# transformers


def use_packed_attention(model: Any) -> bool:
    """Make an encoder of transformers take packed captions; False, and nothing is done, where it cannot.

    Such a model takes `packing=Packing(...)` together with `input_ids` and `position_ids` [1, total]. Without it
    its attention is that of `attn_implementation="sdpa"`.
    """
    config = model.config
    # releases that build the mask by this function hand None and 4-d masks through, without looking at the values
    if (
        config.model_type not in _PACKABLE_MODELS
        or config.is_decoder
        or config._attn_implementation != "sdpa"
        or not hasattr(sys.modules[type(model).__module__], "create_bidirectional_mask")
    ):
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    return True


def _attend(
    module: nn.Module,
    query: Tensor,  # [1, H, total, d], or [B, H, T, d] without packing
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # [1, total, H, d] or [B, T, H, d]
    """Attention function of `ATTENTION`."""
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return packing.attention(query, key, value, dropout, scaling)[None], None
