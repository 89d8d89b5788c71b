"""One training step of ParaSpeechCLAP's model: the reference implementation, and ours with one optimisation at a time.

    python -m bench.train_step --reference CHECKOUT --out bench/records/NAME [--open-clip CHECKOUT]
        [--size large|base|tiny] [--batches 32 128 512 2048 8192] [--seconds 10] [--minutes 9] [--audio FOLDER]

A step is forward pass, loss, backward pass and optimizer, from a batch on the host to the end of the last kernel.
Every form gets the same clips, captions and crop, dropout and SpecAugment as configured, and random weights; all
instances of our model share one set of weights and one optimizer. Forms run in turn within one loop after a warm-up.
A form that runs out of memory at one batch size is not tried at a larger one; one that would take longer than the time
left says so. Nothing here asserts a time.

The reference runs from its own checkout (see `bench.reference_step`), first as released, then with its statistics off,
TF32 and bf16 autocast on. What it normalises, pads and tokenizes in loader processes is prepared outside of the step,
and so are our captions' tokens; each side then copies to the device what its own loader would hand over.

With --open-clip, its CLAP training step (HTSAT, and the NaFlex tower of variable duration) runs beside our log-mel
tower with as many parameters, on clips of 48 kHz. The architectures differ: that table compares what a parameter costs,
not two implementations of one model. NaFlex takes log-mel patches that its loader computes outside of the step.

Memory is the highest point of a step above what lies there before it (weights, optimizer state, other forms' weights).
Model FLOPs: see `bench.model_flops`. Utilisation is their rate over that of a large product in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import importlib.util
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastclap
from bench import model_flops, peers, timing
from bench.comparison import matmul_rate, significant
from bench.parity import CAPTIONS, OurStep, parity_loss, parity_optimizer, synthetic_batch
from bench.reference_step import SIZES, Reference, Size, build_ours, collated, commit_of
from bench.tables import markdown
from fastclap import CLAP, towers, wavlm
from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.data import Batch, load_manifest
from fastclap.errors import ConfigError, DataError
from fastclap.files import write_atomic
from fastclap.tokenizer import Tokenizer, train_tokenizer
from fastclap.train.config import LossConfig
from fastclap.train.objective import Objective

AUDIO_FILES = (".wav", ".flac", ".ogg", ".mp3")
Row = dict[str, Any]


@dataclass
class HostBatch:
    """One batch on the host, as each side's loader would hand it over."""

    batch: Batch  # distinct captions tokenized once
    flops: int  # of the model in a training step

    @property
    def rows(self) -> int:
        return len(self.batch.captions)

    @functools.cached_property
    def every_caption(self) -> Batch:
        """The batch with each clip's caption tokenized for itself."""
        assert self.batch.text is not None
        assert self.batch.text_rows is not None
        text = {name: tensor[self.batch.text_rows] for name, tensor in self.batch.text.items()}
        tokens = [self.batch.tokens[row] for row in self.batch.text_rows.tolist()]
        return replace(self.batch, text=text, text_rows=torch.arange(self.rows), tokens=tokens)

    @functools.cached_property
    def reference(self) -> dict[str, Any]:
        """What the reference's loader makes of it; made once, in a form's first call."""
        assert self.every_caption.text is not None
        return collated(self.batch, self.every_caption.text)


@dataclass
class Form:
    """One way to take a step.

    Attributes:
        name, notes: of the row in a table.
        step: takes a step on a batch and returns the loss, on the device or as a number.
        build: makes ``step`` once the form is wanted.
        float32_matmul: torch's float32 matmul precision while it runs.
        least: smaller batches are not tried.
    """

    name: str
    notes: str
    build: Callable[[], Callable[[HostBatch], Any]]
    float32_matmul: str = "highest"
    least: int = 0
    step: Callable[[HostBatch], Any] | None = field(default=None, repr=False)

    def __call__(self, batch: HostBatch) -> Any:
        if self.step is None:
            self.step = self.build()
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.float32_matmul)
        try:
            return self.step(batch)
        finally:
            torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------------------------------------------------------------
# forms of the reference's model


class Forms:
    """All forms on one device, which share weights where they can.

    Args:
        size: the towers.
        device: where everything runs.
        checkout: of the reference, None to leave it out.
        tokenizer: whose ids fit the text tower.
        chunk: clips a chunk of the gradient cache.
    """

    def __init__(
        self, size: Size, device: torch.device, checkout: Path | None, tokenizer: Tokenizer, chunk: int
    ) -> None:
        self.size, self.device, self.checkout = size, device, checkout
        self.tokenizer, self.chunk = tokenizer, chunk

    @functools.cached_property
    def reference(self) -> Reference:
        assert self.checkout is not None
        return Reference(self.checkout, self.size, self.device)

    @functools.cached_property
    def plain(self) -> CLAP:
        """Our model with transformers' own WavLM in it."""
        with mock.patch.object(wavlm, "accelerate", lambda *_, **__: None):
            return build_ours(self.size, self.tokenizer).to(self.device)

    @functools.cached_property
    def optimizer(self) -> torch.optim.AdamW:
        return OurStep(self.plain, parity_loss(), parity_optimizer()).optimizer

    def ours(
        self,
        *,
        host_syncs: bool = False,
        convolutions: bool = True,
        encoder: bool = True,
        compiled: bool = False,
        bf16: bool = True,
        triton: bool = True,
        packed: bool = True,
        once: bool = True,
        fused: bool = True,
        chunk: int = 0,
    ) -> Callable[[HostBatch], Any]:
        """A step of our model with these optimisations.

        Args:
            host_syncs: transformers' SpecAugment, drawn by NumPy on the host, and the loss read in every step.
            convolutions, encoder: our WavLM's two parts instead of transformers'.
            compiled: its layers compiled.
            bf16: autocast.
            triton: the towers' Triton kernels, where there are any for the device.
            packed: captions without padding.
            once: equal captions are encoded once.
            fused: the loss without the matrix of logits; equal captions are positives then, and else negatives.
            chunk: of the gradient cache.
        """
        model = copy.deepcopy(self.plain, {id(p): p for p in self.plain.parameters()})
        if host_syncs:
            plain: Any = model.audio_branch.base
            plain.feature_projection._forward_hooks.clear()
            plain.config.apply_spec_augment = True
        if convolutions:
            wavlm.accelerate(model.audio_branch.base, encoder=encoder)
        if compiled:
            for tower in (model.audio_branch, model.text_branch):
                tower.prepare_training(compile=True)
        step = OurStep(model, LossConfig() if fused else parity_loss(), parity_optimizer(), chunk_size=chunk, bf16=bf16)
        step.optimizer = self.optimizer
        if not packed:
            step.objective._encode_text = functools.partial(_padded, step.objective._encode_text)  # type: ignore[method-assign]
        if not fused:
            step.objective._loss = functools.partial(_materialised, step.objective)  # type: ignore[method-assign]

        def call(batch: HostBatch) -> Any:
            chosen = batch.batch if once else batch.every_caption
            with contextlib.nullcontext() if triton else _without_triton():
                loss = step(chosen.to(self.device, non_blocking=True))
            return loss.item() if host_syncs else loss

        call.objective = step.objective  # type: ignore[attr-defined]  # for the chunk sizes that memory allowed
        return call

    def all(self) -> list[Form]:
        """In the order of the ablation."""
        on_gpu = self.device.type == "cuda"
        found = []
        if self.checkout is not None:
            found += [
                Form("reference, as released", "float32, gradient checkpointing, statistics", self._released),
                Form("reference, bf16", "statistics off, TF32, bf16 autocast", self._tuned, "high"),
            ]
        stages: list[tuple[str, str, dict[str, Any]]] = [
            ("transformers' WavLM, float32", "our loop, SpecAugment on the host, loss read each step", {}),
            ("+ no host syncs", "SpecAugment drawn on the device", {"host_syncs": False}),
            ("+ bf16", "autocast, TF32 for what stays float32", {"bf16": True}),
            ("+ convolutions as GEMMs", "channels-last stack", {"convolutions": True}),
            ("+ fused attention", "SDPA with an additive bias", {"encoder": True}),
        ]
        if on_gpu and importlib.util.find_spec("fastclap.kernels.toeplitz_attention_triton"):
            stages.append(
                ("+ Triton kernels", "attention that makes its bias in the tile, LayerNorm with GELU", {"triton": True})
            )
        if on_gpu:
            stages.append(("+ compiled layers", "torch.compile of each layer", {"compiled": True}))
        stages += [
            ("+ packed captions", "without padding", {"packed": True}),
            ("+ equal captions once", "each distinct caption of the batch", {"once": True}),
            ("+ fused loss", "no matrix of logits, equal captions are positives", {"fused": True}),
        ]
        options: dict[str, Any] = dict.fromkeys(
            ("convolutions", "encoder", "compiled", "bf16", "triton", "packed", "once", "fused"), False
        )
        options["host_syncs"] = True
        for name, notes, change in stages:
            options |= change
            precision = "high" if options["bf16"] else "highest"
            found.append(Form(name, notes, functools.partial(self.ours, **options), precision))
        cached = functools.partial(self.ours, **options, chunk=self.chunk)
        found.append(Form("+ gradient cache", f"chunks of {self.chunk}", cached, "high", least=self.chunk + 1))
        return found

    def _released(self) -> Callable[[HostBatch], Any]:
        return lambda batch: self.reference.step(batch.reference)

    def _tuned(self) -> Callable[[HostBatch], Any]:
        return lambda batch: self.reference.step(batch.reference, statistics=False, autocast=torch.bfloat16)


def _materialised(objective: Objective, audio: Tensor, unique_text: Tensor) -> Tensor:
    """In place of the objective's loss: the same with the matrix of logits, row i's positive being column i."""
    batch = objective._batch
    return batch.weight * peers.materialised(audio, unique_text[batch.rows], objective.model.logit_scale)


def _padded(encode: Callable[..., Tensor], token_counts: object = None, **inputs: Tensor) -> Tensor:
    """Without the counts the text tower sees a padded batch and a mask."""
    return encode(**inputs)


@contextlib.contextmanager
def _without_triton() -> Iterator[None]:
    """The torch engines of the towers' operators."""
    with contextlib.ExitStack() as stack:
        for module in (wavlm, towers):
            for name in ("gated_toeplitz_attention", "layer_norm_gelu", "normalize_waveform"):
                if hasattr(module, name):
                    plain = functools.partial(getattr(module, name), backend="torch")
                    stack.enter_context(mock.patch.object(module, name, plain))
        yield


# ---------------------------------------------------------------------------------------------------------------------
# open_clip's CLAP, and our log-mel tower of the same size


class OpenClip:
    """open_clip's CLAP from a checkout, and its training step as its loop takes it without accumulation.

    Raises:
        ConfigError: the checkout has no CLAP, or a package that it needs is missing.
    """

    def __init__(self, checkout: Path, name: str, device: torch.device, tiny_text: bool) -> None:
        if not (checkout / "src" / "open_clip" / "clap_model.py").is_file():
            raise ConfigError(f"{checkout}: no open_clip with CLAP (src/open_clip/clap_model.py is missing)")
        source = str(checkout / "src")
        if source not in sys.path:
            sys.path.insert(0, source)
        try:
            factory: Any = importlib.import_module("open_clip.factory")
            task: Any = importlib.import_module("open_clip.task")
            clap: Any = importlib.import_module("open_clip.clap_model")
            audio: Any = importlib.import_module("open_clip.audio")
            models: Any = importlib.import_module("open_clip.model")
        except ImportError as error:
            raise ConfigError(f"{checkout}: its open_clip cannot be imported ({error})") from error
        config = factory.get_model_config(name)
        if config is None:
            raise ConfigError(f"{checkout}: its open_clip knows no model {name!r}")
        text = {**config["text_cfg"], **({"width": 64, "heads": 4, "layers": 2} if tiny_text else {})}
        self.text_config = text
        self.audio_config = audio.CLIPAudioCfg(**config["audio_cfg"])
        model = clap.CLAP(config["embed_dim"], self.audio_config, models.CLIPTextCfg(**text), output_dict=True)
        self.dim = config["embed_dim"]
        self.device = device
        self.model = model.to(device).train()
        self.task = task.CLAPTask(self.model).train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    @property
    def audio_parameters(self) -> int:
        return sum(p.numel() for p in self.model.audio.parameters())

    def batch(self, waveform: Tensor) -> dict[str, Any]:
        """Inputs on the host for float clips [B, T] at 48 kHz; captions are random ids of full length."""
        text = torch.randint(1, self.model.vocab_size, (len(waveform), self.model.context_length))
        if self.audio_config.model_type != "naflexvit":
            return {
                "audio": {"waveform": waveform, "longer": torch.zeros(len(waveform), dtype=torch.bool)},
                "text": text,
            }
        naflex: Any = importlib.import_module("open_clip.audio.naflex_audio")
        patchify = naflex.AudioNaFlexPatchify(naflex.AudioNaFlexCfg.from_clip_audio_cfg(self.audio_config))
        clips = [patchify((clip[None], 48000)) for clip in waveform]
        return {"audio": {key: torch.stack([clip[key] for clip in clips]) for key in clips[0]}, "text": text}

    def step(self, batch: dict[str, Any], autocast: torch.dtype | None) -> Tensor:
        inputs = {"text": batch["text"].to(self.device, non_blocking=True)}
        audio = {key: value.to(self.device, non_blocking=True) for key, value in batch["audio"].items()}
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            losses, _ = self.task({"audio": audio, **inputs})
        losses["loss"].backward()
        self.optimizer.step()
        self.task.clamp_logit_scale()
        return losses["loss"].detach()


def log_mel_config(audio_parameters: int, text: dict[str, Any], dim: int) -> CLAPConfig:
    """Our log-mel tower with about as many parameters (12·width² a block, 4 before them), and a text tower like theirs.

    Of the sizes within 3 % it is the one nearest to one block for every 64 of width, the usual proportion.
    """

    def rank(size: tuple[int, int]) -> tuple[float, float]:
        width, layers = size
        off = abs((12 * layers + 4) * width**2 / audio_parameters - 1)
        return max(off, 0.03), abs(width / 64 - layers)

    width, layers = min(((64 * i, layers) for i in range(1, 33) for layers in range(2, 25)), key=rank)
    audio = AudioTowerConfig(
        features="clap",
        width=width,
        layers=layers,
        heads=width // 64,
        feedforward=4,
        convolution="time",
        pooling="mean",
    )
    return CLAPConfig(
        audio=audio,
        text=TextTowerConfig(
            width=text["width"],
            layers=text["layers"],
            heads=text["heads"],
            feedforward=4,
            vocab_size=text["vocab_size"],
            max_tokens=text["context_length"],
        ),
        head=HeadConfig(kind="linear", dim=dim),
    )


def open_clip_forms(
    checkout: Path, size: str, device: torch.device, tokenizer: Tokenizer
) -> list[tuple[Form, Callable[[int, float], Any]]]:
    """Forms with what makes a batch of so many clips of so many seconds for each."""
    htsat = {"large": "CLAP-HTSAT-large", "base": "CLAP-HTSAT-base", "tiny": "CLAP-HTSAT-tiny"}[size]
    naflex = "naflexclap_test" if size == "tiny" else "naflexclap_mediumd"
    autocast = torch.bfloat16 if device.type == "cuda" else None
    found: list[tuple[Form, Callable[[int, float], Any]]] = []
    for name in (htsat, naflex):
        theirs = OpenClip(checkout, name, device, tiny_text=size == "tiny")
        model = CLAP(log_mel_config(theirs.audio_parameters, theirs.text_config, theirs.dim), tokenizer).to(device)
        ours = OurStep(model, LossConfig(), parity_optimizer(), bf16=autocast is not None)
        own = sum(p.numel() for p in model.audio_branch.parameters())

        def their_batch(rows: int, seconds: float, theirs: OpenClip = theirs) -> Any:
            return theirs.batch(synthetic_batch(rows, seconds, 0, least=1.0, rate=48000).audio / 32768)

        def our_batch(rows: int, seconds: float, tokens: int = model.config.text.max_tokens) -> Any:
            return tokenized(synthetic_batch(rows, seconds, 0, least=1.0, rate=48000), tokenizer, tokens)

        def our_step(batch: Batch, step: OurStep = ours) -> Tensor:
            return step(batch.to(device, non_blocking=True))

        their_step = functools.partial(theirs.step, autocast=autocast)
        notes = f"{theirs.audio_parameters / 1e6:.1f} M parameters in the audio tower"
        found.append((Form(f"open_clip {name}", notes, lambda step=their_step: step, "high"), their_batch))  # type: ignore[misc]
        notes = f"{own / 1e6:.1f} M parameters in the audio tower, log-mel included in the step"
        found.append((Form(f"fastclap log-mel, as {name}", notes, lambda step=our_step: step, "high"), our_batch))  # type: ignore[misc]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# batches


def tokenized(batch: Batch, tokenizer: Tokenizer, max_tokens: int) -> Batch:
    """The batch with its distinct captions as token ids, as a loader makes it."""
    position = {caption: index for index, caption in enumerate(dict.fromkeys(batch.captions))}
    rows = torch.tensor([position[caption] for caption in batch.captions])
    text = tokenizer(list(position), max_tokens)
    return replace(batch, text=text, text_rows=rows, tokens=text["attention_mask"].sum(1).tolist())


def host_batch(batch: Batch, tokenizer: Tokenizer, size: Size, pin: bool) -> HostBatch:
    """A batch for every form of the reference's model, and its FLOPs."""
    batch = tokenized(batch, tokenizer, 64)
    assert batch.text_rows is not None
    tokens = [batch.tokens[row] for row in batch.text_rows.tolist()]
    flops = model_flops.training_step(size.wavlm, size.xlm_roberta, size.dim, batch.samples, tokens)
    return HostBatch(batch.pin_memory() if pin else batch, flops)


def real_batch(folder: Path, rows: int, seconds: float, distinct: float) -> Batch:
    """Clips of a folder (or of a manifest), cut to ``seconds``, repeated until there are enough; made-up captions.

    Raises:
        DataError: there is no audio in it.
    """
    from fastclap.audio import read_audio

    files = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in AUDIO_FILES)[:rows]
    if folder.is_file():
        files = [row.audio for row in load_manifest([str(folder)])][:rows]
    if not files:
        raise DataError(f"{folder}: no audio files ({', '.join(AUDIO_FILES)}) in it")
    waves = [torch.from_numpy(read_audio(path)) for path in files]
    chosen = [waves[i % len(waves)] for i in range(rows)]
    size = round(seconds * 16000)
    cut = [wave[:size] for wave in chosen]
    made_up = synthetic_batch(rows, 0.01, 0, distinct=distinct)
    return replace(
        made_up,
        audio=torch.nn.utils.rnn.pad_sequence(cut, batch_first=True),
        lengths=torch.tensor([len(wave) for wave in cut]),
        samples=[len(wave) for wave in cut],
        mean=torch.stack([wave.float().mean() / 32768 for wave in chosen]),
        std=torch.stack([wave.float().std(correction=0) / 32768 for wave in chosen]),
    )


# ---------------------------------------------------------------------------------------------------------------------
# measurement


class Measurement:
    """Measures forms at one batch size after the other and keeps what became of each.

    Args:
        device: that the forms run on.
        left: seconds left.
    """

    def __init__(self, device: torch.device, left: Callable[[], float]) -> None:
        self.device, self.left = device, left
        self.stopped: dict[str, str] = {}
        self.per_clip_ms: dict[str, float] = {}

    def at(self, forms: Sequence[tuple[Form, Any]], rows: int, seconds: float, flops: int | None) -> list[Row]:
        """One row for each form; ``seconds`` is the time for the timed loop."""
        found: list[Row] = []
        calls: dict[str, Callable[[], Any]] = {}
        for form, batch in forms:
            row: Row = {"form": form.name, "rows": rows, "notes": form.notes}
            found.append(row)
            reason = self._why_not(form, rows)
            if reason is None:
                figures, reason = timing.attempt(functools.partial(self._warm_up, form, batch), max(1.0, self.left()))
            if reason is not None:
                row["reason"] = reason
                if reason == "out of memory":
                    self.stopped[form.name] = f"out of memory at {rows} clips"
                continue
            row |= figures
            calls[form.name] = functools.partial(form, batch)
        if calls:
            seconds = min(seconds, max(0.0, self.left()) / 3)  # the loop may take three times as long
            timings = timing.interleaved(calls, self.device, seconds, most=20)
            for row in found:
                if row["form"] not in timings:
                    continue
                figures = timings[row["form"]]
                row |= figures.as_dict()
                row["clips_per_s"] = significant(1e3 * rows / figures.median_ms)
                self.per_clip_ms[row["form"]] = figures.median_ms / rows
                if flops is not None:
                    row["model_tflops"] = significant(1e-9 * flops / figures.median_ms)
        return found

    def _why_not(self, form: Form, rows: int) -> str | None:
        if rows < form.least:
            return f"for batches from {form.least} clips"
        if form.name in self.stopped:
            return self.stopped[form.name]
        expected = 1e-3 * self.per_clip_ms.get(form.name, 0.0) * rows
        if 3 * expected > self.left():
            return f"not reached: a step takes about {expected:.0f} s, {max(0.0, self.left()):.0f} s are left"
        return None

    def _warm_up(self, form: Form, batch: Any) -> Row:
        """Builds, compiles and runs the form; a second run, unless the first was long, gives the peak."""
        milliseconds: list[float] = []

        def timed() -> None:
            milliseconds.append(timing.elapsed_ms(lambda: form(batch), self.device))

        peak = timing.peak_bytes(timed, self.device)
        if milliseconds[0] < 15e3:
            peak = timing.peak_bytes(timed, self.device)
        objective = getattr(form.step, "objective", None)
        chunks = {} if objective is None or objective.chunk_sizes is None else {"chunk_sizes": objective.chunk_sizes}
        return {"first_ms": significant(milliseconds[0]), "peak_bytes": peak, **chunks}


def top_ten(form: Form, batch: HostBatch, device: torch.device) -> list[Row]:
    """The ten kernels (on a CPU: operations) with the most time in one step, by torch.profiler."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        form(batch)
        if on_gpu:
            torch.cuda.synchronize(device)
    events: list[Any] = [e for e in profiler.key_averages() if not on_gpu or e.device_type.name == "CUDA"]
    spent = {id(e): float(e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in events}
    total = sum(spent.values()) or 1.0
    events.sort(key=lambda e: -spent[id(e)])
    return [
        {
            "name": event.key[:120],
            "calls": event.count,
            "ms": significant(spent[id(event)] / 1e3),
            "share": significant(spent[id(event)] / total),
        }
        for event in events[:10]
    ]


def software(reference: Path | None, open_clip: Path | None) -> dict[str, Any]:
    import transformers

    return {
        "fastclap": fastclap.__version__,
        "commit": commit_of(Path(__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "reference": None if reference is None else commit_of(reference) or "a checkout without git",
        "open_clip": None if open_clip is None else commit_of(open_clip) or "a checkout without git",
    }


# ---------------------------------------------------------------------------------------------------------------------
# report


def tables(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    machine, settings = record["machine"], record["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in record["software"].items() if version)
    parts = [
        f"{machine['device']} ({machine['cpu']}, {machine['threads']} threads), {versions}, {record['date']}.",
        f"Towers of size {settings['size']}, clips of {settings['clips']}, {settings['distinct_captions']:.0%} of the "
        "captions of a batch distinct. Milliseconds a step: median (10th to 90th percentile of the repeats). Memory is "
        f"above what lies there before the step. Utilisation is model FLOPs over {record['peak_tflops']:.3g} TFLOP/s, "
        f"a product of {record['peak_product']} in the same run.",
    ]
    for rows in dict.fromkeys(row["rows"] for row in record["rows"]):
        chosen = [row for row in record["rows"] if row["rows"] == rows]
        base = {name: row.get("median_ms") for row in chosen for name in [row["form"]]}
        released, tuned = base.get("reference, as released"), base.get("reference, bf16")
        parts.append(f"Batch of {rows:,} clips:")
        header = ["form", "ms", "repeats", "clips/s", "utilisation", "memory", "× released", "× reference, bf16"]
        parts.append(markdown(header, [_cells(row, record["peak_tflops"], released, tuned) for row in chosen]))
    if record["towers"]:
        parts.append("Log-mel towers, 48 kHz, beside open_clip's (other architectures, as many parameters):")
        parts.append(
            markdown(
                ["form", "batch", "ms", "clips/s", "memory", "notes"],
                [
                    [
                        row["form"],
                        f"{row['rows']:,}",
                        _time(row),
                        _number(row, "clips_per_s"),
                        _memory(row),
                        row["notes"],
                    ]
                    for row in record["towers"]
                ],
            )
        )
    for name, rows in record["profile"].items():
        parts.append(f"Longest in one step of “{name}” at a batch of {record['profile_rows']}:")
        cells = [[row["name"], str(row["calls"]), f"{row['ms']:.3g}", f"{row['share']:.1%}"] for row in rows]
        parts.append(markdown(["kernel or operation", "calls", "ms", "share"], cells))
    return "\n\n".join(parts) + "\n"


def _cells(row: Row, peak: float, released: float | None, tuned: float | None) -> list[str]:
    if "median_ms" not in row:
        return [row["form"], row.get("reason", "not reached"), *[""] * 6]
    share = f"{row['model_tflops'] / peak:.1%}"
    gains = [f"{base / row['median_ms']:.2f}" if base else "" for base in (released, tuned)]
    return [row["form"], _time(row), str(row["repeats"]), _number(row, "clips_per_s"), share, _memory(row), *gains]


def _time(row: Row) -> str:
    if "median_ms" not in row:
        return str(row.get("reason", "not reached"))
    return f"{row['median_ms']:.4g} ({row['p10_ms']:.4g} to {row['p90_ms']:.4g})"


def _number(row: Row, name: str) -> str:
    return f"{row[name]:.4g}" if name in row else ""


def _memory(row: Row) -> str:
    return f"{row['peak_bytes'] / 1e9:.2f} GB" if row.get("peak_bytes") is not None else ""


def plot(record: dict[str, Any], path: Path) -> None:
    """Clips a second of each form, one panel a batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(dict.fromkeys(row["rows"] for row in record["rows"] if "median_ms" in row))
    if not sizes:
        return
    figure, axes = pyplot.subplots(
        1, len(sizes), figsize=(5 * len(sizes) + 2, 4.5), squeeze=False, layout="constrained"
    )
    for axis, rows in zip(axes[0], sizes, strict=True):
        chosen = [row for row in record["rows"] if row["rows"] == rows and "median_ms" in row][::-1]
        bars = axis.barh([row["form"] for row in chosen], [row["clips_per_s"] for row in chosen])
        for bar, row in zip(bars, chosen, strict=True):
            bar.set_color("tab:gray" if row["form"].startswith("reference") else "tab:blue")
        axis.bar_label(bars, fmt="%.3g", padding=2)
        axis.margins(x=0.15)
        axis.set(xlabel="clips a second", title=f"batch of {rows:,}")
    figure.suptitle(record["machine"]["device"])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole record; rewritten to ``arguments.out`` after each batch size."""
    deadline = time.monotonic() + 60 * arguments.minutes

    def left() -> float:
        return deadline - time.monotonic()

    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    size = SIZES[arguments.size]
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, 1000)
    n = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peak, _ = matmul_rate(n, device, dtype, 1.0)
    record: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": timing.machine(device),
        "software": software(arguments.reference, arguments.open_clip),
        "settings": {
            "size": arguments.size,
            "clips": "real speech" if arguments.audio else f"{arguments.seconds:g} s of noise",
            "seconds": arguments.seconds,
            "distinct_captions": arguments.distinct_captions,
            "chunk": arguments.chunk,
        },
        "peak_tflops": significant(peak),
        "peak_product": f"{n}³ in {str(dtype).removeprefix('torch.')}",
        "rows": [],
        "towers": [],
        "profile": {},
        "profile_rows": arguments.batches[0],
    }
    forms = Forms(size, device, arguments.reference, tokenizer, arguments.chunk).all()
    if arguments.only:
        forms = [form for form in forms if any(word in form.name for word in arguments.only)]
    reserve = 0.2 * 60 * arguments.minutes if arguments.open_clip is not None else 0.0
    measurement = Measurement(device, lambda: left() - reserve)
    shares = [math.sqrt(rows) for rows in arguments.batches]
    for index, rows in enumerate(arguments.batches):
        if arguments.audio:
            batch = real_batch(arguments.audio, rows, arguments.seconds, arguments.distinct_captions)
        else:
            batch = synthetic_batch(rows, arguments.seconds, 0, distinct=arguments.distinct_captions, least=1.0)
        prepared = host_batch(batch, tokenizer, size, pin=device.type == "cuda")
        # half is for what comes before the timed loops: making models, compiling, the warm-up
        seconds = 0.5 * (left() - reserve) * shares[index] / sum(shares[index:])
        record["rows"] += measurement.at([(form, prepared) for form in forms], rows, seconds, prepared.flops)
        if index == 0:
            ran = [form for form in forms if form.name in measurement.per_clip_ms]
            for form in ran[:1] + ran[1:][-1:]:
                record["profile"][form.name], reason = timing.attempt(
                    functools.partial(top_ten, form, prepared, device), max(1.0, left())
                )
                if reason is not None:
                    record["profile"][form.name] = [{"name": reason, "calls": 0, "ms": 0.0, "share": 0.0}]
        del prepared
        timing.release()
        _write(record, arguments.out)
    if arguments.open_clip is not None:
        del forms  # and their weights
        timing.release()
        rows = arguments.batches[0]
        pairs, reason = timing.attempt(
            lambda: open_clip_forms(arguments.open_clip, arguments.size, device, tokenizer), max(1.0, left())
        )
        if pairs is None:
            record["towers"] = [{"form": "open_clip", "rows": rows, "notes": "", "reason": reason}]
        else:
            made = [(form, make(rows, arguments.seconds)) for form, make in pairs]
            record["towers"] = Measurement(device, left).at(made, rows, 0.5 * max(0.0, left()), None)
        _write(record, arguments.out)
    return record


def _write(record: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "record.json", (json.dumps(record, indent=1) + "\n").encode())
    write_atomic(out / "record.md", tables(record).encode())
    plot(record, out / "ablation.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="checkout of ParaSpeechCLAP; without it, our forms alone")
    parser.add_argument("--open-clip", type=Path, help="checkout of open_clip with CLAP")
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 512, 2048, 8192])
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip")
    parser.add_argument("--audio", type=Path, help="folder or manifest of real clips instead of noise")
    parser.add_argument("--distinct-captions", type=float, default=0.5, help="share of a batch's captions")
    parser.add_argument("--chunk", type=int, default=64, help="clips a chunk of the gradient cache")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything")
    parser.add_argument("--only", nargs="+", help="forms whose name has one of these in it")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.batches.sort()
    print(tables(measure(arguments)))


if __name__ == "__main__":
    main()
