"""How a batch is made to fit into a GPU: whole, with layers computed again, in chunks of a gradient cache, or both.

Before the first step a few clips of the longest length go through the towers once, with what the backward pass would
need counted as it is kept. From that follows what every form needs, and the cheapest that fits is taken. Where the
estimate errs, the gradient cache still halves its chunk when memory runs out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastclap.data import Row
from fastclap.models.audio_towers import AudioTower
from fastclap.models.clap import CLAP
from fastclap.models.layers import layer_lists
from fastclap.models.text_towers import TextTower
from fastclap.train import distributed
from fastclap.train.config import TrainConfig
from fastclap.train.distributed import World

_ROWS = 256
_SLACK = 1 << 30  # bytes for the libraries' workspaces, the loss and the batches on the way
_USABLE = 0.93  # of what is free: the allocator's blocks have gaps
# Work of a step in forward passes of the towers: forward 1, backward 2, and what is computed again: all but what lies
# outside of the layers. A gradient cache adds up to one more.
_PLAIN, _CHECKPOINTED = 3.0, 3.84


class Kept(NamedTuple):
    """Bytes of activations that a forward pass keeps for the backward pass: a share that is fixed, and one a clip."""

    fixed: int
    clip: int  # with the gradients of the layer that is differentiated at the time
    checkpointed: int  # likewise, if layers are computed again; equal to `clip` where towers cannot


class Plan(NamedTuple):
    """How the batch of one process goes through the towers."""

    chunk_size: int  # clips at once
    checkpoint: bool  # layers are computed again
    text: str  # for the log


def plan(model: CLAP, manifest: Sequence[Row], config: TrainConfig, world: World) -> Plan:
    """The cheapest form of a step that fits into what is free on the device; what the configuration fixes stays.

    Args:
        model: on its device, before the optimizer has its state.
        manifest: to train on; its first captions are taken for typical.
        config: `chunk_size` and `checkpoint_activations` are chosen where they are "auto".
        world: this process; all of them get the form that fits the one with the least memory.
    """
    rows = whole = config.batch_size // world.size
    if config.data.batch_seconds is not None:  # so many of the longest clips; of shorter ones there are more
        rows = max(1, min(rows, int(config.data.batch_seconds / (config.data.crop_seconds * world.size))))
    asked = None if config.chunk_size == "auto" else min(config.chunk_size or whole, whole)
    fixed = None if asked is None else min(asked, rows)
    again = {"auto": None, "on": True, "off": False}[config.checkpoint_activations]
    free = free_bytes(world.device)
    if free is None or (fixed is not None and again is not None):
        return Plan(asked or whole, bool(again), "")
    captions = [text for row in manifest[:_ROWS] for text in (*row.captions[:1], *row.fine_captions[:1])]
    kept = measure(model, captions, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # gradient and two moments in float32, and the average of the weights; sharded, each process has its part
    averaged = bool(config.optimizer.ema_decay or config.optimizer.average_every)
    state = trained * (12 + 4 * averaged) // (world.size if config.shard else 1)
    room = distributed.least(int(free * _USABLE) - state - kept.fixed - _SLACK, world)
    chunk, checkpoint = choose(rows, kept, room, fixed, again)
    if config.shard and (chunk < rows or config.accumulate > 1):
        # Several backward passes keep gradients whole, and weights, whose place is not among what is free now.
        chunk, checkpoint = choose(rows, kept, room - 4 * trained, fixed, again)
    need = kept.checkpointed if checkpoint else kept.clip
    how = [f"in {math.ceil(rows / chunk)} chunks of {chunk}" if chunk < rows else "at once"]
    how += ["layers computed again"] * checkpoint
    text = f"{room / 1e9:.1f} GB free for activations, {need / 1e9:.2f} GB a clip: {rows} clips {', '.join(how)}"
    # what fits at once as the longest clips does so as more of shorter ones
    return Plan(asked or (whole if chunk >= rows else chunk), checkpoint, f"memory: {text}")


def choose(
    rows: int, kept: Kept, room: int, chunk: int | None = None, checkpoint: bool | None = None
) -> tuple[int, bool]:
    """The chunk and whether layers are computed again, so that a step costs least; single clips where nothing fits.

    Args:
        rows: clips of a process's batch.
        kept: what a forward pass keeps.
        room: bytes for it.
        chunk, checkpoint: fixed beforehand.
    """
    forms = []
    for again in (False, True) if checkpoint is None else (checkpoint,):
        fits = max(0, room // max(1, kept.checkpointed if again else kept.clip))
        count = math.ceil(rows / (chunk or max(1, min(rows, fits))))
        size = chunk or math.ceil(rows / count)
        # the graph of the last chunk is kept from the first pass
        work = (_CHECKPOINTED if again else _PLAIN) + 1 - 1 / count
        forms.append((size > fits, work, size, again))
    nothing_fits = all(too_large for too_large, *_ in forms)
    _, _, size, again = forms[-1] if nothing_fits else min(forms)
    return size, again


def measure(model: CLAP, captions: Sequence[str], config: TrainConfig) -> Kept:
    """What a forward pass keeps, from one of two and one of three clips of the longest length."""
    two, three = (_kept_by(model, captions, config, clips) for clips in (2, 3))
    everything, layer, avoidable = (larger - smaller for smaller, larger in zip(two, three, strict=True))
    plain = everything + layer
    # computed again, a layer is kept while it is differentiated
    return Kept(max(0, two[0] - 2 * everything), plain, min(plain - avoidable + layer, plain))


def _kept_by(model: CLAP, captions: Sequence[str], config: TrainConfig, clips: int) -> tuple[int, int, int]:
    """Bytes kept in all, by the largest layer, and those that computing layers again would not keep."""
    device = model.device
    samples = round(config.data.crop_seconds * model.sampling_rate)
    lengths = [samples] * clips
    texts = sorted(captions, key=len)[-clips:]
    tokens = model.tokenize([texts[i % len(texts)] for i in range(clips)])
    parameters = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    layers: list[int] = []
    avoidable = 0

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def counted(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal avoidable
            before = sum(kept.values())
            out = forward(*args, **kwargs)
            own = sum(kept.values()) - before
            layers.append(own)
            entering = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            avoidable += max(0, own - (entering.nbytes if entering is not None else 0))
            return out

        return call

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    dropped = {
        module: module.layerdrop for module in model.modules() if isinstance(getattr(module, "layerdrop", None), float)
    }
    with ExitStack() as stack:
        for module, share in dropped.items():
            setattr(module, "layerdrop", 0.0)  # noqa: B010 - unknown to its class
            stack.callback(setattr, module, "layerdrop", share)
        for tower in (model.audio_branch, model.text_branch):
            overrides = type(tower).prepare_training not in (AudioTower.prepare_training, TextTower.prepare_training)
            for layer in itertools.chain.from_iterable(layer_lists(tower)) if overrides else ():
                layer.forward = counted(layer, layer.forward)
                stack.callback(delattr, layer, "forward")
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor))
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=config.uses_bf16(device.type)))
        audio = torch.zeros(clips, samples, dtype=torch.int16, device=device)
        out = [
            model.encode_audio(audio, torch.tensor(lengths, device=device), host_lengths=lengths),
            model.encode_text(tokens["input_ids"].to(device), tokens["attention_mask"].to(device)),
        ]
        total = sum(kept.values())
        del out
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # BatchNorm has counted silence
            buffer.copy_(buffers[name])
    return total, max(layers, default=0), avoidable


def free_bytes(device: torch.device) -> int | None:
    """Bytes that tensors can still have on a GPU; None on a CPU, whose memory is not the limit."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
