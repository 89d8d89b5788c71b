"""What the towers have in common: masks, pooling, waveforms, and the transformer of those trained from scratch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fastclap.errors import ConfigError
from fastclap.models.packing import Packing


def length_mask(
    lengths: Tensor,  # [B]
    size: int,
) -> Tensor:  # bool [B, size], True on valid positions
    """Valid positions of items of the given lengths in a padded axis of `size`."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def masked_mean(
    x: Tensor,  # [B, T, C]
    mask: Tensor | None,  # bool [B, T]
) -> Tensor:  # [B, C], of at least float32
    """Mean over the valid positions, accumulated in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        return x.mean(1)
    return x.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True)


def no_grad_if(frozen: bool) -> contextlib.AbstractContextManager[Any]:
    """No graph is built within, if what runs there is frozen."""
    return torch.no_grad() if frozen else contextlib.nullcontext()


_computed: ContextVar[dict[nn.Module, Tensor] | None] = ContextVar("_computed", default=None)


@contextlib.contextmanager
def weights_computed_once() -> Iterator[None]:
    """A weight that a parametrization computes is computed once within, for this thread, where `weight_of` asks for it.

    torch's own cache (`parametrize.cached`) is of the whole process: what one thread puts into it, with a graph or
    without, every other thread gets, and it is not emptied while any thread is within.
    """
    token = _computed.set({})
    try:
        yield
    finally:
        _computed.reset(token)


def weight_of(module: Any) -> Tensor:
    """The weight of a layer, which may be a parametrized one."""
    known = None if torch.compiler.is_compiling() else _computed.get()
    if known is None:
        return module.weight
    if module not in known:
        known[module] = module.weight
    return known[module]


class SharedContext:
    """A context of the whole process: the first of its users in any thread enters it, and the last one leaves it.

    Args:
        enter: makes the context.
    """

    def __init__(self, enter: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._enter, self._lock, self._users = enter, threading.Lock(), 0
        self._context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._context = self._enter()
                self._context.__enter__()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._context.__exit__(None, None, None)


def as_float(audio: Tensor) -> Tensor:
    """int16 or floating-point samples as float32 in ±1."""
    return audio.float() / 32768 if audio.dtype == torch.int16 else audio.float()


def prepare_waveform(
    audio: Tensor,  # int16 or float [B, T]
    lengths: Tensor | None,  # [B]
) -> tuple[Tensor, Tensor]:  # [B, T], [B]
    """Float32 waveform in ±1 with zeros past each end, and the lengths, at least 1, on its device."""
    waveform = as_float(audio)
    if lengths is None:
        return waveform, torch.full(waveform.shape[:1], waveform.shape[1], device=waveform.device)
    lengths = lengths.to(waveform.device)
    waveform = waveform.masked_fill(~length_mask(lengths, waveform.shape[1]), 0.0)
    return waveform, lengths.clamp(min=1)


LAYER_LISTS = ("layers", "layer", "blocks")  # what encoders call the list of their transformer layers


def layer_lists(tower: nn.Module, names: Sequence[str] = LAYER_LISTS) -> list[nn.ModuleList]:
    """The lists of transformer layers of a tower, an outer one before those in its layers."""
    found = (part for name, part in tower.named_modules() if name.rpartition(".")[2] in names)
    return [part for part in found if isinstance(part, nn.ModuleList)]


class Block(nn.Module):
    """Pre-norm transformer block with rotary positions and scaled dot-product attention."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ConfigError(f"width must be a multiple of twice the heads (rotary pairs); got {width} and {heads}")
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, feedforward * width)
        self.down = nn.Linear(feedforward * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,  # [B, T, C], or packed [total, C]
        rotary: tuple[Tensor, Tensor],  # cos, sin [T or total, C // heads]
        mask: Tensor | None,  # bool [B, 1, 1, T]
        packing: Packing | None = None,  # how x is packed; the mask has no meaning then
    ) -> Tensor:  # like x
        qkv = rearrange(self.qkv(self.attention_norm(x)), "... (h c) -> ... h c", h=3 * self.heads)
        qk, v = qkv[..., : 2 * self.heads, :], qkv[..., 2 * self.heads :, :]
        cos, sin = (table[:, None] for table in rotary)
        first, second = qk.chunk(2, -1)
        qk = (qk * cos + torch.cat([-second, first], -1) * sin).to(v.dtype)
        q, k = qk.split(self.heads, -2)
        if packing is not None:
            y = packing.attention(q, k, v)
        else:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        x = x + self.dropout(self.out(rearrange(y, "... h c -> ... (h c)")))
        return x + self.dropout(self.down(F.gelu(self.up(self.feedforward_norm(x)))))


class Transformer(nn.Module):
    """A stack of `Block` and a final LayerNorm."""

    def __init__(self, width: int, layers: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.head_width = width // heads
        self.blocks = nn.ModuleList(Block(width, heads, feedforward, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,  # [B, T, C], or packed [total, C]
        mask: Tensor | None,  # bool [B, T]
        packing: Packing | None = None,  # how x is packed; the mask has no meaning then
    ) -> Tensor:  # like x
        rate = 10000 ** (-torch.arange(0, self.head_width, 2, device=x.device) / self.head_width)
        positions = torch.arange(x.shape[1], device=x.device) if packing is None else packing.positions
        angle = positions[:, None] * rate
        angle = torch.cat([angle, angle], -1)
        rotary = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        keys = None if mask is None else mask[:, None, None]
        for block in self.blocks:
            x = block(x, rotary, keys, packing)
        return self.norm(x)
