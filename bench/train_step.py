"""A training step of ParaSpeechCLAP's model: the reference implementation, and ours with one optimisation at a time.

    python -m bench.train_step --reference CHECKOUT --out bench/records/NAME
        [--size large|base|tiny] [--batches 16 64] [--seconds 10] [--minutes 9] [--audio FOLDER]

measures all forms on the CPU; on a GPU they are the lots `step` and `step_more` of `python -m bench.gpu`. A step is
forward pass, loss, backward pass and optimizer, from a batch on the host. Every form gets the same clips, captions and
crop, dropout and SpecAugment as configured, and random weights; all instances of our model share one set of weights
and one optimizer. Forms are timed in turn, in blocks of consecutive steps (`bench.steady`).

The reference runs from its own checkout (see `bench.reference_step`), first as released, then with its statistics off,
TF32 and bf16 autocast on. What it normalises, pads and tokenizes in loader processes is prepared outside of the step,
and so are our captions' tokens; each side then copies to the device what its own loader would hand over.

open_clip's CLAP training step (HTSAT, and the NaFlex tower of variable duration) is compared with our log-mel tower of
as many parameters, on clips of 48 kHz. The architectures differ: that compares what a parameter costs, not two
implementations of one model. NaFlex takes log-mel patches that its loader computes outside of the step.

Memory is the highest point of a step above what lies there before it (weights, optimizer state, other forms' weights).
Model FLOPs: see `bench.model_flops`. Utilisation is their rate over that of a large product in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastclap
from bench import model_flops, peers, timing
from bench.compare import matmul_rate
from bench.parity import CAPTIONS, synthetic_batch
from bench.reference_step import (
    Reference,
    build_ours,
    collated,
    commit_of,
    parity_loss,
    parity_optimizer,
    without_packages,
)
from bench.run import SIZES, Entry, Record, Row, Run, Settings, Size, significant
from bench.steady import Steady
from bench.tables import markdown
from fastclap import CLAP
from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.data import Batch, load_manifest
from fastclap.errors import ConfigError, DataError
from fastclap.files import write_atomic
from fastclap.models import audio_towers, wavlm
from fastclap.models.tokenizer import Tokenizer, train_tokenizer
from fastclap.train.config import LossConfig, TrainConfig
from fastclap.train.step import Objective, Step, build_optimizer

AUDIO_FILES = (".wav", ".flac", ".ogg", ".mp3")
PRODUCT = 1024  # rows of the product whose rate a CPU's utilisation is a share of


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
        build: makes `step` once the form is wanted.
        float32_matmul: torch's float32 matmul precision while it runs.
        least: smaller batches are not tried.
        step: takes a step on a batch and returns the loss, on the device or as a number.
    """

    name: str
    notes: str
    build: Callable[[], Callable[[Any], Any]]
    float32_matmul: str = "highest"
    least: int = 0
    step: Callable[[Any], Any] | None = field(default=None, repr=False)

    def call_for(self, batch: Any) -> Callable[[], Any]:
        """The form, built, as a call that takes a step on this batch."""
        if self.step is None:
            self.step = self.build()
        return functools.partial(self, batch)

    def __call__(self, batch: Any) -> Any:
        if self.step is None:
            self.step = self.build()
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.float32_matmul)
        try:
            return self.step(batch)
        finally:
            torch.set_float32_matmul_precision(before)

    def outcome(self, loss: Any) -> Row:
        """For a row: a step's loss, and the chunks of the gradient cache that memory allowed."""
        value = float(loss)
        found: Row = {"loss": significant(value)} if math.isfinite(value) else {"loss": None, "passed": False}
        objective = getattr(self.step, "objective", None)
        if objective is not None and objective.chunk_sizes is not None:
            found["chunk_sizes"] = list(objective.chunk_sizes)
        return found


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
            return build_ours(self.size, self.tokenizer, device=self.device)

    @functools.cached_property
    def optimizer(self) -> torch.optim.AdamW:
        return build_optimizer(self.plain, parity_optimizer())

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
        distinct_captions: bool = True,
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
            distinct_captions: equal captions are encoded once.
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
        config = TrainConfig(
            loss=LossConfig() if fused else parity_loss(),
            optimizer=parity_optimizer(),
            chunk_size=chunk,
            precision="bf16" if bf16 else "fp32",
        )
        step = Step(model, config)
        step.optimizer = self.optimizer
        objective: Any = step.objective
        if not packed:
            objective.encode_text = functools.partial(_padded, objective.encode_text)
        if not fused:
            objective.loss = functools.partial(_materialised, objective)

        def call(batch: HostBatch) -> Any:
            chosen = batch.batch if distinct_captions else batch.every_caption
            with contextlib.nullcontext() if triton else _without_triton():
                loss = step([chosen.to(self.device, non_blocking=True)]).loss
            return loss.item() if host_syncs else loss

        call.objective = objective  # type: ignore[attr-defined]  # for the chunk sizes that memory allowed
        return call

    def reference_forms(self) -> list[Form]:
        """The reference, as it is and at its best; without a checkout they cannot be built."""
        return [
            Form("reference, as released", "float32, gradient checkpointing, statistics", self._released),
            Form("reference, bf16", "statistics off, TF32, bf16 autocast", self._tuned, "high"),
        ]

    def complete(self, name: str, notes: str, **options: Any) -> Form:
        """Our step with all optimisations, and these options of `ours`."""
        return Form(name, notes, functools.partial(self.ours, **options), "high", least=options.get("chunk", 0) + 1)

    def ablation(self) -> list[Form]:
        """Ours from transformers' modules on, each with one optimisation more than the one before."""
        on_gpu = self.device.type == "cuda"
        stages: list[tuple[str, str, dict[str, Any]]] = [
            ("transformers' WavLM, float32", "our loop, SpecAugment on the host, loss read each step", {}),
            ("+ no host syncs", "SpecAugment drawn on the device", {"host_syncs": False}),
            ("+ bf16", "autocast, TF32 for what stays float32", {"bf16": True}),
            ("+ convolutions as GEMMs", "channels-last stack", {"convolutions": True}),
            ("+ fused attention", "SDPA with an additive bias", {"encoder": True}),
        ]
        if on_gpu:
            stages.append(
                ("+ Triton kernels", "attention that makes its bias in the tile, LayerNorm with GELU", {"triton": True})
            )
        stages += [
            ("+ packed captions", "without padding", {"packed": True}),
            ("+ equal captions once", "each distinct caption of the batch", {"distinct_captions": True}),
            ("+ fused loss", "no matrix of logits, equal captions are positives", {"fused": True}),
        ]
        if on_gpu:  # the last, so that one that does not compile leaves the others as they are
            stages.append(("+ compiled layers", "torch.compile of each layer", {"compiled": True}))
        options: dict[str, Any] = dict.fromkeys(
            ("convolutions", "encoder", "compiled", "bf16", "triton", "packed", "distinct_captions", "fused"), False
        )
        options["host_syncs"] = True
        found = []
        for name, notes, change in stages:
            options |= change
            precision = "high" if options["bf16"] else "highest"
            found.append(Form(name, notes, functools.partial(self.ours, **options), precision))
        return found

    def all(self) -> list[Form]:
        """In the order of the ablation; the reference's where there is a checkout."""
        cached = self.complete("+ gradient cache", f"chunks of {self.chunk}", chunk=self.chunk)
        return [*(self.reference_forms() if self.checkout is not None else []), *self.ablation(), cached]

    def _released(self) -> Callable[[HostBatch], Any]:
        reference = self.reference
        return lambda batch: reference.step(batch.reference)

    def _tuned(self) -> Callable[[HostBatch], Any]:
        reference = self.reference
        return lambda batch: reference.step(batch.reference, statistics=False, autocast=torch.bfloat16)


def _materialised(objective: Objective, audio: Tensor, distinct_text: Tensor) -> Tensor:
    """In place of the objective's loss: the same with the matrix of logits, row i's positive being column i."""
    targets = objective.targets
    return targets.weight * peers.materialised(audio, distinct_text[targets.text_rows], objective.model.logit_scale)


def _padded(encode: Callable[..., Tensor], token_counts: object = None, **inputs: Tensor) -> Tensor:
    """Without the counts the text tower sees a padded batch and a mask."""
    return encode(**inputs)


OPERATORS = (
    "bias_norm",
    "bypass",
    "downsample",
    "feed_forward",
    "gated_convolution",
    "gated_toeplitz_attention",
    "layer_norm_gelu",
    "normalize_waveform",
    "residual_layer_norm",
    "shared_attention",
    "swoosh",
    "swoosh_linear",
    "upsample_bypass",
    "waveform_convolution",
)


@contextlib.contextmanager
def _without_triton() -> Iterator[None]:
    """The torch engines of the towers' operators."""
    with contextlib.ExitStack() as stack:
        for module in (wavlm, audio_towers):
            for name in OPERATORS:
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
            with without_packages("ftfy"):  # of its tokenizer, which a step does not use
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


class OpenClipPair:
    """One of open_clip's CLAP models and our log-mel tower with about as many parameters; each is built when wanted.

    Args:
        checkout: of open_clip.
        name: of its model.
        device: where both run, under bf16 autocast on a GPU.
        tokenizer: of our captions.
        tiny_text: shrink the text towers.
    """

    def __init__(self, checkout: Path, name: str, device: torch.device, tokenizer: Tokenizer, tiny_text: bool) -> None:
        self.checkout, self.name, self.device = checkout, name, device
        self.tokenizer, self.tiny_text = tokenizer, tiny_text
        self.autocast = torch.bfloat16 if device.type == "cuda" else None

    @functools.cached_property
    def theirs(self) -> OpenClip:
        return OpenClip(self.checkout, self.name, self.device, self.tiny_text)

    @functools.cached_property
    def ours(self) -> Step:
        config = log_mel_config(self.theirs.audio_parameters, self.theirs.text_config, self.theirs.dim)
        model = CLAP(config, self.tokenizer).to(self.device)
        return Step(model, TrainConfig(optimizer=parity_optimizer()))

    @property
    def audio_parameters(self) -> tuple[int, int]:
        """Of their audio tower and of ours."""
        return self.theirs.audio_parameters, sum(p.numel() for p in self.ours.model.audio_branch.parameters())

    def their_step(self) -> Callable[[Any], Tensor]:
        return functools.partial(self.theirs.step, autocast=self.autocast)

    def our_step(self) -> Callable[[Any], Tensor]:
        return lambda batch: self.ours([batch.to(self.device, non_blocking=True)]).loss

    def their_batch(self, rows: int, seconds: float) -> dict[str, Any]:
        return self.theirs.batch(synthetic_batch(rows, seconds, 0, least=1.0, rate=48000).audio / 32768)

    def our_batch(self, rows: int, seconds: float) -> Batch:
        batch = synthetic_batch(rows, seconds, 0, least=1.0, rate=48000)
        return tokenized(batch, self.tokenizer, self.ours.model.config.text.max_tokens)


OPEN_CLIP_MODELS = {  # by the size of our towers
    "large": ("CLAP-HTSAT-large", "naflexclap_mediumd"),
    "tiny": ("CLAP-HTSAT-tiny", "naflexclap_test"),
}


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
    """Clips of a folder (or of a manifest), cut to `seconds`, repeated until there are enough; made-up captions.

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
# measurement on a CPU


def work(rows: int, flops: int | None, peak_tflops: float | None) -> Callable[[float], Row]:
    """Makes a row's figures from the median in ms of a step on so many clips."""

    def figures(median_ms: float) -> Row:
        found: Row = {"clips_per_s": significant(1e3 * rows / median_ms)}
        if flops is not None:
            found["model_tflops"] = significant(1e-9 * flops / median_ms)
            if peak_tflops:
                found["mfu"] = significant(1e-9 * flops / median_ms / peak_tflops)
        return found

    return figures


def software(reference: Path | None) -> dict[str, Any]:
    import transformers

    return {
        "fastclap": fastclap.__version__,
        "commit": commit_of(Path(__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "reference": None if reference is None else commit_of(reference) or "a checkout without git",
    }


def tables(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    run = record["runs"][-1]
    machine, settings = run["machine"], run["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in run["software"].items() if version)
    parts = [
        f"{machine['device']} ({machine['cpu']}, {machine['threads']} threads), {versions}, {run['date']}.",
        f"Towers of size {settings['size']}, clips of {settings['clips']}, {settings['distinct_captions']:.0%} of the "
        "captions of a batch distinct. Milliseconds a step: median (10th to 90th percentile) of blocks of consecutive "
        f"steps, all forms in turn. Utilisation is model FLOPs over {settings['peak_tflops']:.3g} TFLOP/s, a product "
        f"of {settings['peak_product']} in the same run.",
    ]
    for rows in dict.fromkeys(row["case"]["rows"] for row in record["rows"]):
        chosen = [row for row in record["rows"] if row["case"]["rows"] == rows]
        base = {row["case"]["form"]: row.get("median_ms") for row in chosen}
        released, tuned = base.get("reference, as released"), base.get("reference, bf16")
        parts.append(f"Batch of {rows:,} clips:")
        header = ["form", "ms", "blocks", "clips/s", "utilisation", "× released", "× reference, bf16"]
        parts.append(markdown(header, [_cells(row, released, tuned) for row in chosen]))
    return "\n\n".join(parts) + "\n"


def _cells(row: Row, released: float | None, tuned: float | None) -> list[str]:
    name = row["case"]["form"]
    if "median_ms" not in row:
        return [name, row["reason"], *[""] * 5]
    spread = f"{row['median_ms']:.4g} ({row['p10_ms']:.4g} to {row['p90_ms']:.4g})"
    gains = [f"{base / row['median_ms']:.2f}" if base else "" for base in (released, tuned)]
    return [name, spread, str(row["repeats"]), f"{row['clips_per_s']:.4g}", f"{row['mfu']:.1%}", *gains]


def plot(record: dict[str, Any], path: Path) -> None:
    """Clips a second of each form, one panel a batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in record["rows"] if "median_ms" in row]
    sizes = list(dict.fromkeys(row["case"]["rows"] for row in timed))
    if not sizes:
        return
    figure, axes = pyplot.subplots(
        1, len(sizes), figsize=(5 * len(sizes) + 2, 4.5), squeeze=False, layout="constrained"
    )
    for axis, rows in zip(axes[0], sizes, strict=True):
        chosen = [row for row in timed if row["case"]["rows"] == rows][::-1]
        names = [row["case"]["form"] for row in chosen]
        bars = axis.barh(names, [row["clips_per_s"] for row in chosen])
        for bar, name in zip(bars, names, strict=True):
            bar.set_color("tab:gray" if name.startswith("reference") else "tab:blue")
        axis.bar_label(bars, fmt="%.3g", padding=2)
        axis.margins(x=0.15)
        axis.set(xlabel="clips a second", title=f"batch of {rows:,}")
    figure.suptitle(record["device"])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole record; every row is in `record.json` of `arguments.out` from the moment it exists."""
    device = torch.device("cpu")
    size = SIZES[arguments.size]
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, 1000)
    peak, _ = matmul_rate(PRODUCT, device, torch.float32, 1.0)
    settings = {
        "size": arguments.size,
        "clips": "real speech" if arguments.audio else f"{arguments.seconds:g} s of noise",
        "seconds": arguments.seconds,
        "distinct_captions": arguments.distinct_captions,
        "chunk": arguments.chunk,
        "peak_tflops": significant(peak),
        "peak_product": f"{PRODUCT}³ in float32",
    }
    record = Record(arguments.out / "record.json")
    record.content = {"runs": [], "rows": []}  # not to be continued
    record.begin(
        *("train_step", "CPU", ""),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        software=software(arguments.reference),
        machine=timing.machine(device),
        settings=settings,
    )
    run = Run(record, Settings("cpu", arguments.reference), time.monotonic() + 60 * arguments.minutes)
    steady = Steady(run, block_seconds=0.0)  # the shortest blocks: a CPU's calls wait for nothing
    forms = Forms(size, device, arguments.reference, tokenizer, arguments.chunk).all()
    if arguments.only:
        forms = [form for form in forms if any(word in form.name for word in arguments.only)]
    shares = [math.sqrt(rows) for rows in arguments.batches]
    for index, rows in enumerate(arguments.batches):
        if arguments.audio:
            batch = real_batch(arguments.audio, rows, arguments.seconds, arguments.distinct_captions)
        else:
            batch = synthetic_batch(rows, arguments.seconds, 0, distinct=arguments.distinct_captions, least=1.0)
        prepared = host_batch(batch, tokenizer, size, pin=False)
        entries = []
        for form in forms:
            case = {"form": form.name, "rows": rows, "seconds": arguments.seconds}
            if rows < form.least:
                run.add(case, reason=f"for batches from {form.least} clips")
                continue
            entries.append(
                Entry(
                    case,
                    functools.partial(form.call_for, prepared),
                    {"notes": form.notes},
                    work(rows, prepared.flops, peak),
                    form.outcome,
                    60 * arguments.minutes,
                )
            )
        # half is for what comes before the blocks in turn: making models and the first steps
        steady.in_turn(entries, 0.5 * max(0.0, run.left) * shares[index] / sum(shares[index:]))
    record.update_run(status="done")
    write_atomic(arguments.out / "record.md", tables(record.content).encode())
    plot(record.content, arguments.out / "ablation.png")
    return record.content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="checkout of ParaSpeechCLAP; without it, our forms alone")
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip")
    parser.add_argument("--audio", type=Path, help="folder or manifest of real clips instead of noise")
    parser.add_argument("--distinct-captions", type=float, default=0.5, help="share of a batch's captions")
    parser.add_argument("--chunk", type=int, default=16, help="clips a chunk of the gradient cache")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything")
    parser.add_argument("--only", nargs="+", help="forms whose name has one of these in it")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.batches.sort()
    print(tables(measure(arguments)))


if __name__ == "__main__":
    main()
