"""A training step of CLSP at the sizes of its publication: its own code, and ours.

    python -m bench.clsp_step --icefall CHECKOUT --out bench/records/NAME [--size spear-xlarge|spear-base|tiny]
        [--seconds 30 5] [--seconds-a-batch 800] [--minutes 9]

measures both on the CPU; on a GPU they are the lot `clsp` of `python -m bench.gpu`. A step is that of the second stage:
a Zipformer, RoBERTa and its pooler, two captions a clip (a short and a long one), ScaledAdam and Eden, schedules as
after 100,000 batches, forward pass, loss, backward pass and optimizer, from a batch on the host. Weights are random.
Clips are noise of equal length, as many as make up the seconds of a batch, and no two captions are equal. Forms are
timed in turn, in blocks of consecutive steps (`bench.steady`).

The published step is put together from its own parts by `bench.icefall`; what its loader processes prepare, its
features and the tokens of all captions, is prepared outside of the step, where ours makes the features itself from
samples on the device. k2's Swoosh is stood in for by operations of torch, on a GPU fused into kernels by its compiler.
Both run under bf16 autocast on a GPU and in float32 on a CPU, in the float32 precision that their own commands set.

Memory is the highest point of a step above what lies there before it (weights, optimizer state, other forms' weights).
Model FLOPs: see `bench.model_flops`. Utilisation is their rate over that of a large product in the same run.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench import icefall, model_flops, timing
from bench.compare import matmul_rate
from bench.parity import CAPTIONS, synthetic_batch
from bench.reference_step import commit_of
from bench.run import Case, Entry, Record, Row, Run, Settings, significant
from bench.steady import Steady
from bench.tables import markdown
from bench.train_step import PRODUCT, Form, software, tokenized, work
from fastclap import CLAP
from fastclap.config import ZipformerConfig
from fastclap.data import Batch
from fastclap.features import LogMel
from fastclap.files import write_atomic
from fastclap.models.tokenizer import Tokenizer, train_tokenizer
from fastclap.train.config import TrainConfig
from fastclap.train.distributed import World
from fastclap.train.recipes import RECIPES
from fastclap.train.step import Step

OURS, PUBLISHED = "fastclap", "CLSP's code, as published"
BATCHES = 100_000.0  # that the schedules are past
SECONDS_A_BATCH = 800.0  # of audio, of one GPU
MELS = 128
SENTENCES = 5  # of a long caption, some 300 characters


# ---------------------------------------------------------------------------------------------------------------------
# what is measured


@dataclass(frozen=True)
class Size:
    """Of both towers and the shared space."""

    zipformer: ZipformerConfig
    roberta: dict[str, Any]
    dim: int = 512


ROBERTA = {  # of roberta-base, as its config.json says
    "vocab_size": 50265,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_TINY = ZipformerConfig(
    downsampling=[1, 2, 4, 2],
    layers=[1, 1, 2, 1],
    width=[64],
    unmasked_width=[48],
    feedforward=[96],
    heads=[4],
    kernel=[15, 7, 7, 15],
    channels=[2, 4, 8],
    query_width=8,
    schedule_start=BATCHES,
)
SIZES = {
    **{
        name: Size(ZipformerConfig(size=name, schedule_start=BATCHES), ROBERTA)
        for name in ("spear-xlarge", "spear-base")
    },
    "tiny": Size(
        _TINY,
        {**ROBERTA, "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        | {"num_hidden_layers": 2},
        64,
    ),
}


def train_config(size: Size, **options: Any) -> TrainConfig:
    """The recipe of the second stage for these sizes and random weights, with whole batches unless options say other.

    The mean of the weights, which both sides update every 200 steps, is left out of both.
    """
    config = RECIPES["clsp-stage2"]()
    config.model.audio.pretrained, config.model.audio.zipformer = None, size.zipformer
    config.model.text.pretrained, config.model.text.hf_config = None, {"model_type": "roberta", **size.roberta}
    config.model.head.dim = size.dim
    config.optimizer.average_every = 0
    return replace(config, **{"chunk_size": 0, "checkpoint_activations": "off", **options})


def captions(clips: int) -> list[str]:
    """A short caption of each clip, then a long one of each, no two of them equal."""
    short = [f"{CAPTIONS[i % len(CAPTIONS)]} Take {i}." for i in range(clips)]
    starts = (SENTENCES * i for i in range(clips))
    long = [" ".join(CAPTIONS[(start + j) % len(CAPTIONS)] for j in range(SENTENCES)) for start in starts]
    return [*short, *(f"{caption} Take {i}." for i, caption in enumerate(long))]


@dataclass
class HostBatch:
    """One batch on the host, as each side's loader would hand it over."""

    batch: Batch
    flops: int  # of the model in a training step
    seconds: float  # of a clip

    @property
    def clips(self) -> int:
        return self.batch.clips

    @functools.cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """What the published loader hands over: features [B, T, mels] and their frames [B]; made once."""
        made, frames = LogMel("clsp")(self.batch.audio, self.batch.lengths)
        pinned = self.batch.audio.is_pinned()
        return (made.pin_memory(), frames.pin_memory()) if pinned else (made, frames)


def host_batch(size: Size, tokenizer: Tokenizer, clips: int, seconds: float, pin: bool = False) -> HostBatch:
    """A batch of noise for either form, and its FLOPs."""
    texts = captions(clips)
    made = replace(synthetic_batch(clips, seconds, 0, least=1.0), captions=texts, caption_ids=torch.arange(len(texts)))
    batch = tokenized(made, tokenizer, 512)
    frames = LogMel("clsp").spec.frame_lengths(torch.tensor(batch.samples)).tolist()
    flops = model_flops.clsp_training_step(size.zipformer, MELS, size.roberta, size.dim, frames, batch.tokens)
    return HostBatch(batch.pin_memory() if pin else batch, flops, seconds)


class Forms:
    """Both forms on one device; each is built when it is wanted.

    Args:
        size: the towers.
        device: where both run.
        checkout: of yfyeung/icefall, None to leave the published form out.
    """

    def __init__(self, size: Size, device: torch.device, checkout: Path | None) -> None:
        self.size, self.device, self.checkout = size, device, checkout
        self.tokenizer = train_tokenizer(CAPTIONS, 1000)
        self.bf16 = device.type == "cuda"

    def ours(self) -> Form:
        return Form(OURS, "every optimisation, eager", self._ours, "high")

    def published(self) -> Form:
        notes = f"{'bf16 autocast' if self.bf16 else 'float32'}, k2's Swoosh by torch, features made beforehand"
        return Form(PUBLISHED, notes, self._published)

    def our_step(self, **options: Any) -> Step:
        """Our step, of a model in training mode; options are those of `train_config`."""
        config = train_config(self.size, **options)
        with torch.device(self.device):
            model = CLAP(config.model, self.tokenizer)
        model = model.to(self.device).train()
        for tower in (model.audio_branch, model.text_branch):
            tower.prepare_training(checkpoint=config.checkpoint_activations == "on")
        return Step(model, config, World(0, 1, self.device, None))

    def _ours(self) -> Callable[[HostBatch], Any]:
        step = self.our_step()

        def call(batch: HostBatch) -> Any:
            return step([batch.batch.to(self.device, non_blocking=True)]).loss

        call.objective = step.objective  # type: ignore[attr-defined]
        return call

    @functools.cached_property
    def modules(self) -> SimpleNamespace:
        """Of the published code.

        Raises:
            ConfigError: the checkout is none of it.
        """
        assert self.checkout is not None
        return icefall.load(self.checkout, fused=self.device.type == "cuda")

    def published_step(self) -> icefall.Published:
        """Its step, with its schedules where ours are."""
        with torch.device(self.device):  # random weights are drawn there
            step = icefall.Published(
                self.modules, self.size.zipformer, MELS, self.size.roberta, self.size.dim, self.device
            )
        step.set_batch_count(BATCHES)
        return step

    def published_call(self, step: icefall.Published, batch: HostBatch) -> Tensor:
        """Copies what the loader hands over to the device and takes a step on it."""
        assert batch.batch.text is not None
        inputs = (*batch.features, *batch.batch.text.values())
        features, frames, *text = (x.to(self.device, non_blocking=True) for x in inputs)
        return step.step(
            features, frames, dict(zip(batch.batch.text, text, strict=True)), torch.bfloat16 if self.bf16 else None
        )

    def _published(self) -> Callable[[HostBatch], Any]:
        return functools.partial(self.published_call, self.published_step())


def entry(form: Form, batch: HostBatch, peak_tflops: float | None, seconds: float) -> Entry:
    """A form on a batch, which may take so many seconds until it is warm."""
    of_clips = work(batch.clips, batch.flops, peak_tflops)

    def figures(median_ms: float) -> Row:
        return {**of_clips(median_ms), "audio_s_per_s": significant(1e3 * batch.clips * batch.seconds / median_ms)}

    case: Case = {"form": form.name, "clips": batch.clips, "seconds": batch.seconds}
    return Entry(case, functools.partial(form.call_for, batch), {"notes": form.notes}, figures, form.outcome, seconds)


# ---------------------------------------------------------------------------------------------------------------------
# measurement on a CPU


def table(rows: Sequence[Row]) -> str:
    """Of rows of one batch."""
    published = next((row.get("median_ms") for row in rows if row["case"]["form"] == PUBLISHED), None)
    header = ["form", "ms", "clips/s", "s of audio/s", "of the matmul peak", "memory", "× published"]
    return markdown(header, [_cells(row, published) for row in rows])


def _cells(row: Row, published: float | None) -> list[str]:
    name = row["case"]["form"]
    if "median_ms" not in row:
        return [name, row["reason"][:60], *[""] * 5]
    spread = f"{row['median_ms']:.4g}"
    if row["repeats"] > 1:
        spread += f" ({row['p10_ms']:.4g} to {row['p90_ms']:.4g})"
    memory = "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e9:.2f} GB"
    share = f"{row['mfu']:.1%}" if row.get("mfu") is not None else ""
    gain = f"{published / row['median_ms']:.2f}" if published else ""
    return [name, spread, f"{row['clips_per_s']:.4g}", f"{row['audio_s_per_s']:.4g}", share, memory, gain]


def tables(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    run = record["runs"][-1]
    machine, settings = run["machine"], run["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in run["software"].items() if version)
    parts = [
        f"{machine['device']} ({machine['cpu']}, {machine['threads']} threads), {versions}, {run['date']}; load "
        f"{settings['load_before']:.1f} before it began.",
        f"A training step of CLSP's second stage, size {settings['size']}, clips of noise of equal length, two "
        "captions each. Milliseconds: median (10th to 90th percentile) of blocks of consecutive steps, both in turn. "
        f"Utilisation is model FLOPs over {settings['peak_tflops']:.3g} TFLOP/s, a product of "
        f"{settings['peak_product']} in the same run.",
    ]
    for clips, seconds in dict.fromkeys((row["case"]["clips"], row["case"]["seconds"]) for row in record["rows"]):
        chosen = [r for r in record["rows"] if (r["case"]["clips"], r["case"]["seconds"]) == (clips, seconds)]
        parts += [f"{clips:,} clips of {seconds:g} s:", table(chosen)]
    return "\n\n".join(parts) + "\n"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole record; every row is in `record.json` of `arguments.out` from the moment it exists."""
    device, size = torch.device("cpu"), SIZES[arguments.size]
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    peak, _ = matmul_rate(PRODUCT, device, torch.float32, 1.0)
    versions = software(None)
    versions.pop("reference")
    record = Record(arguments.out / "record.json")
    record.content = {"runs": [], "rows": []}  # not to be continued
    record.begin(
        *("clsp_step", "CPU", ""),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        software=versions | {"icefall": commit_of(arguments.icefall) or "a checkout without git"},
        machine=timing.machine(device),
        settings={
            "size": arguments.size,
            "seconds_a_batch": arguments.seconds_a_batch,
            "peak_tflops": significant(peak),
            "peak_product": f"{PRODUCT}³ in float32",
            "load_before": load,
        },
    )
    run = Run(record, Settings("cpu"), time.monotonic() + 60 * arguments.minutes)
    steady = Steady(run, block_seconds=0.0)  # the shortest blocks: a CPU's calls wait for nothing
    forms = Forms(size, device, arguments.icefall)
    both = (forms.published(), forms.ours())
    for index, seconds in enumerate(arguments.seconds):
        batch = host_batch(size, forms.tokenizer, max(2, int(arguments.seconds_a_batch / seconds)), seconds)
        entries = [entry(form, batch, peak, 60 * arguments.minutes) for form in both]
        # half is for what comes before the blocks in turn: making models and the first steps
        steady.in_turn(entries, 0.5 * max(0.0, run.left) / (len(arguments.seconds) - index))
    record.update_run(status="done")
    write_atomic(arguments.out / "record.md", tables(record.content).encode())
    return record.content


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icefall", type=Path, required=True, help="checkout of yfyeung/icefall, branch clsp")
    parser.add_argument("--size", choices=SIZES, default="spear-xlarge")
    parser.add_argument("--seconds", type=float, nargs="+", default=[30.0, 5.0], help="lengths of clips")
    parser.add_argument("--seconds-a-batch", type=float, default=SECONDS_A_BATCH, help="of audio")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    for name, least in (("seconds_a_batch", 0.2), ("minutes", 0.0), ("seconds", 0.1)):
        value = getattr(arguments, name)
        if min(value if isinstance(value, list) else [value]) <= least:
            raise SystemExit(f"--{name.replace('_', '-')} must be above {least:g}, is {value}")
    print(tables(measure(arguments)))


if __name__ == "__main__":
    main()
