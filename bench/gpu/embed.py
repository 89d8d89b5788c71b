"""Embedding with a full-size model on the device: clips from arrays, and captions from strings.

The stage of the lot `embed`. Ours is `CLAP.embed_audio` and `embed_text`: int16 arrays and strings in, unit vectors
out, sorting, padding, normalisation and the copy to the device included. The peer is transformers' own WavLM with the
same weights, as ParaSpeechCLAP's evaluation calls it: clips sorted by length in padded batches with a mask, mask-aware
mean, projection, unit norm. What its loader does, normalising and padding, is done beforehand and not counted; so are
its captions' tokens. Both take batches of one size, in float32 with torch's own products or in bf16 by autocast.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import model_flops
from bench.compare import ceilings
from bench.parity import CAPTIONS
from bench.reference_step import build_ours
from bench.run import SIZES, Entry, Row, Run, Size, significant
from bench.steady import Steady
from fastclap import CLAP
from fastclap.models import wavlm
from fastclap.models.tokenizer import train_tokenizer

RATE = 16000
OURS, PEER = "fastclap", "transformers' WavLM"
PEER_TEXT = "transformers' XLM-R"


@dataclass(frozen=True)
class EmbedSizes:
    size: str = "large"
    clips: int = 128
    captions: int = 2048
    batch: int = 32
    text_batch: int = 256
    lengths: tuple[tuple[float, float], ...] = ((10.0, 10.0), (2.0, 10.0))
    seconds: float = 6.0  # of the blocks of a case, all forms together


TINY = EmbedSizes("tiny", 5, 7, 2, 3, ((0.4, 0.4), (0.2, 0.5)), 0.0)


def embed(run: Run) -> None:
    """Clips of equal length, clips of different lengths, captions."""
    sizes = TINY if run.tiny else EmbedSizes()
    models = Models(SIZES[sizes.size], run.device)
    peak_tflops = ceilings(run)[0]
    steady = Steady(run, 0.02 if run.tiny else 0.7)
    least = 1 if run.tiny else 3
    for shortest, longest in sizes.lengths:
        clips = made_clips(sizes.clips, shortest, longest)
        entries = [
            _audio_entry(run, models, clips, form, bf16, sizes.batch, peak_tflops)
            for form, bf16 in ((OURS, True), (OURS, False), (PEER, True), (PEER, False))
        ]
        steady.in_turn(entries, sizes.seconds, least)
    captions = [f"{CAPTIONS[index % len(CAPTIONS)]} Take {index}." for index in range(sizes.captions)]
    entries = [
        _text_entry(models, captions, form, bf16, sizes.text_batch)
        for form, bf16 in ((OURS, True), (OURS, False), (PEER_TEXT, True), (PEER_TEXT, False))
    ]
    steady.in_turn(entries, sizes.seconds, least)


class Models:
    """One set of random weights in our model and in one with transformers' own WavLM, built when needed."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        self.tokenizer = train_tokenizer(CAPTIONS, 1000)

    @functools.cached_property
    def ours(self) -> CLAP:
        torch.manual_seed(0)
        return build_ours(self.size, self.tokenizer, device=self.device).eval()

    @functools.cached_property
    def plain(self) -> CLAP:
        with mock.patch.object(wavlm, "accelerate", lambda *_, **__: None):
            model = build_ours(self.size, self.tokenizer, device=self.device).eval()
        model.load_state_dict(self.ours.state_dict())
        return model


def made_clips(count: int, shortest: float, longest: float) -> list[np.ndarray]:
    """Noise of evenly spaced lengths, int16 [samples], in random order."""
    generator = np.random.default_rng(0)
    lengths = generator.permutation(np.linspace(shortest, longest, count))
    return [
        (3000 * generator.standard_normal(round(RATE * seconds), dtype=np.float32)).astype(np.int16)
        for seconds in lengths
    ]


def _audio_entry(
    run: Run, models: Models, clips: Sequence[np.ndarray], form: str, bf16: bool, batch: int, peak_tflops: float | None
) -> Entry:
    seconds = [len(clip) / RATE for clip in clips]
    lengths = f"{min(seconds):g} s" if min(seconds) == max(seconds) else f"{min(seconds):g} to {max(seconds):g} s"
    size = models.size
    heads = model_flops.head_forward({"hidden_size": 768, **size.wavlm}["hidden_size"], size.dim)
    flops = sum(model_flops.wavlm_forward(size.wavlm, len(clip)) + heads for clip in clips)

    def work(ms: float) -> Row:
        found: Row = {
            "clips_per_s": significant(1e3 * len(clips) / ms),
            "audio_s_per_s": significant(1e3 * sum(seconds) / ms),
            "model_tflops": significant(1e-9 * flops / ms),
        }
        if peak_tflops and (bf16 or run.tiny):  # the ceiling is that of the run's dtype
            found["mfu"] = significant(1e-9 * flops / ms / peak_tflops)
        return found

    def make() -> Callable[[], Tensor]:
        if form == OURS:
            model = models.ours
            return lambda: _in_precision(bf16, models.device, lambda: model.embed_audio(clips, batch_size=batch))
        call = peer_audio(models.plain, clips, batch)
        return lambda: _in_precision(bf16, models.device, call)

    return Entry(
        {"form": f"{form}, {_precision(bf16)}", "clips": len(clips), "lengths": lengths},
        make,
        {"batch_size": batch},
        work,
        lambda vectors: {"vectors_differ": distance(vectors, models.ours.embed_audio(clips, batch_size=batch))},
    )


def _text_entry(models: Models, captions: Sequence[str], form: str, bf16: bool, batch: int) -> Entry:
    def make() -> Callable[[], Tensor]:
        if form == OURS:
            model = models.ours
            return lambda: _in_precision(bf16, models.device, lambda: model.embed_text(captions, batch_size=batch))
        call = peer_text(models.plain, captions, batch)
        return lambda: _in_precision(bf16, models.device, call)

    return Entry(
        {"form": f"{form}, {_precision(bf16)}", "captions": len(captions)},
        make,
        {"batch_size": batch},
        lambda ms: {"captions_per_s": significant(1e3 * len(captions) / ms)},
        lambda vectors: {"vectors_differ": distance(vectors, models.ours.embed_text(captions, batch_size=batch))},
    )


def _precision(bf16: bool) -> str:
    return "bf16" if bf16 else "float32"


def _in_precision(bf16: bool, device: torch.device, call: Callable[[], Tensor]) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
        return call()


def distance(a: Tensor, b: Tensor) -> float:
    """The largest ‖a − b‖ of unit vectors."""
    return significant(float((a - b).norm(dim=1).max()))


# ---------------------------------------------------------------------------------------------------------------------
# the peer


def peer_audio(model: CLAP, clips: Sequence[np.ndarray], batch: int) -> Callable[[], Tensor]:
    """A call that embeds prepared clips by transformers' modules and returns their unit vectors in the given order."""
    order = sorted(range(len(clips)), key=lambda index: len(clips[index]))
    back = torch.tensor(order).argsort()
    batches = list(_padded_batches([clips[index] for index in order], batch))
    base: Any = model.audio_branch.base
    device = model.device

    def call() -> Tensor:
        found = []
        with torch.inference_mode():
            for waves, samples in batches:
                waves, samples = waves.to(device), samples.to(device)
                hidden = base(waves, attention_mask=samples, return_dict=False)[0]
                mask = base._get_feature_vector_attention_mask(hidden.shape[1], samples)[..., None].to(hidden.dtype)
                pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
                found.append(F.normalize(model.audio_projection(pooled).float(), dim=-1))
            return torch.cat(found)[back.to(device)]

    return call


def _padded_batches(clips: Sequence[np.ndarray], batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised float32 waves [B, T] and their masks, on the host, as a loader yields them."""
    for first in range(0, len(clips), batch):
        waves = [torch.from_numpy(clip).float() / 32768 for clip in clips[first : first + batch]]
        waves = [(wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt() for wave in waves]
        masks = [torch.ones(len(wave), dtype=torch.long) for wave in waves]
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        yield pad(waves), pad(masks)


def peer_text(model: CLAP, captions: Sequence[str], batch: int) -> Callable[[], Tensor]:
    """The same for captions: transformers' XLM-R on padded batches, its first token, the projection."""
    base: Any = model.text_branch.base
    base.set_attn_implementation("sdpa")  # its own
    device = model.device
    batches = [model.tokenize(captions[first : first + batch]) for first in range(0, len(captions), batch)]

    def call() -> Tensor:
        found = []
        with torch.inference_mode():
            for tokens in batches:
                hidden = base(**{name: value.to(device) for name, value in tokens.items()}).last_hidden_state
                found.append(F.normalize(model.text_projection(hidden[:, 0]).float(), dim=-1))
            return torch.cat(found)

    return call
