"""Our training step against the reference's: the same numbers step by step, and the same learning curves.

    python -m bench.parity --reference CHECKOUT [--dtype float64] [--steps 3]
    python -m bench.parity --reference CHECKOUT --train MANIFEST --out bench/records/NAME [--steps 300] [--seeds 0 1 2]

The first form copies the reference's random weights into our model by name, gives both the same batches without dropout
and SpecAugment, and prints how far apart loss, gradients and weights are, the weights as a share of how far the
reference has moved them. Our side is configured as the reference is: every other caption a negative, Adam at 1e-5
without decay, schedule or clipping (AdamW without decay is Adam).

The second form trains scaled-down towers on real clips, with dropout and SpecAugment as both implement them, from the
same weights and on the same batches for each seed, and compares the curves over the seeds. The random masks differ, so
a curve of one seed cannot agree; their distribution must.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from bench import timing
from bench.reference_step import (
    Reference,
    build_ours,
    collated,
    commit_of,
    parity_loss,
    parity_optimizer,
    without_dropout,
)
from bench.run import SIZES, Size
from bench.tables import markdown
from fastclap.data import Batch, BatchSampler, ClipDataset, Manifest, load_manifest
from fastclap.files import write_atomic
from fastclap.kernels.waveform import normalize_waveform_reference
from fastclap.models import audio_towers
from fastclap.models.tokenizer import train_tokenizer
from fastclap.testing import relative_error
from fastclap.train.config import TrainConfig
from fastclap.train.step import Step

CAPTIONS = [
    f"A {age} {who} speaks in {tone} voice, {how}."
    for age in ("young", "middle-aged", "elderly")
    for who in ("woman", "man", "person")
    for tone in ("a calm", "an angry", "a whispering", "a sad", "a cheerful")
    for how in ("slowly", "loudly", "with a lisp", "in a large room", "barely audible", "at normal volume")
]


def synthetic_batch(
    rows: int, seconds: float, seed: int, *, distinct: float = 1.0, least: float = 0.5, rate: int = 16000
) -> Batch:
    """Clips of random noise, from `least` times `seconds` to `seconds` long; a share of their captions is distinct."""
    generator = torch.Generator().manual_seed(seed)
    size = round(seconds * rate)
    lengths = (size * (least + (1 - least) * torch.rand(rows, generator=generator))).long().clamp(1, size)
    lengths[0] = size
    made = 3000 * torch.randn(min(rows, 256), size, generator=generator)  # enough noise for any batch
    audio = made.to(torch.int16)[torch.arange(rows) % len(made)]
    audio.masked_fill_(torch.arange(size) >= lengths[:, None], 0)
    names = [f"{CAPTIONS[i % len(CAPTIONS)]} Take {i}." for i in range(max(1, round(distinct * rows)))]
    chosen = [i % len(names) for i in range(rows)]
    return Batch(
        step=0,
        epoch=0,
        audio=audio,
        lengths=lengths,
        mean=0.01 * torch.randn(rows, generator=generator),
        std=0.05 + 0.1 * torch.rand(rows, generator=generator),
        captions=[names[i] for i in chosen],
        caption_ids=torch.tensor(chosen),
        rows=list(range(rows)),
        bad=[],
    )


# ---------------------------------------------------------------------------------------------------------------------
# step by step


def step_parity(
    checkout: Path,
    size: Size,
    *,
    dtype: torch.dtype = torch.float64,
    steps: int = 3,
    rows: int = 6,
    seconds: float = 1.0,
    learning_rate: float = 1e-3,
) -> list[dict[str, float]]:
    """Relative differences after each step from common weights on common batches, without dropout.

    Args:
        checkout: of the reference.
        size: the towers; dropout and SpecAugment are taken out of them.
        dtype: of weights and arithmetic on both sides.
        steps, rows, seconds: number of steps, clips in each, and their length.
        learning_rate: of both optimizers. The recipe's 1e-5 moves float32 weights by a hundredth of their rounding in
            relative terms; a larger one leaves the update itself to be compared.

    With float64 the two operations that our towers always do in float32, normalising samples and averaging over frames,
    are done in float64 too: what is left is the difference between the algorithms. In float32 Adam magnifies rounding,
    as it divides a gradient that is nothing but rounding (that of a key bias, say) by its own size.

    Returns:
        For each step `loss` (ours), `reference_loss`, `loss_error` (relative), `gradient_error` (‖difference‖ /
        ‖reference's gradient‖) and `weight_error` (‖difference of the weights‖ / ‖change of the reference's weights
        since step 0‖), each over all parameters together.
    """
    torch.manual_seed(0)
    device, size = torch.device("cpu"), without_dropout(size)
    reference = Reference(checkout, size, device, head_dropout=0.0, learning_rate=learning_rate)
    model = build_ours(size, train_tokenizer(CAPTIONS, 1000), head_dropout=0.0)
    model.load_state_dict(reference.model.state_dict())
    reference.model.to(dtype)
    config = TrainConfig(loss=parity_loss(), optimizer=parity_optimizer(learning_rate))
    ours = Step(model.to(dtype), config)
    start = {name: p.detach().clone() for name, p in reference.model.named_parameters()}
    gradients: dict[str, Tensor] = {}
    ours.optimizer.register_step_pre_hook(lambda *_: gradients.update(_gradients(model)))
    found = []
    for step in range(steps):
        batch = synthetic_batch(rows, seconds, seed=step)
        theirs = reference.step(collated(batch, model.tokenize(batch.captions), dtype))
        with _double_precision_towers() if dtype == torch.float64 else contextlib.nullcontext():
            loss = ours([batch]).loss.item()
        expected, weights = dict(reference.model.named_parameters()), dict(model.named_parameters())
        # the reference clears gradients before the next backward pass, so they are still there
        expected_gradients = _gradients(reference.model)
        change = _flat({name: p - start[name] for name, p in expected.items()})
        found.append(
            {
                "loss": loss,
                "reference_loss": theirs,
                "loss_error": abs(loss - theirs) / abs(theirs),
                "gradient_error": relative_error(_flat(expected_gradients), _flat(gradients)),
                "weight_error": relative_error(change, _flat({name: weights[name] - start[name] for name in expected})),
            }
        )
    return found


@contextlib.contextmanager
def _double_precision_towers() -> Iterator[None]:
    def waveform(*tensors: Tensor, dtype: torch.dtype, **options: Any) -> Tensor:
        return normalize_waveform_reference(*tensors, **options)

    with mock.patch.object(audio_towers, "normalize_waveform", waveform):
        yield


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().double().flatten() for name in sorted(tensors)])


# ---------------------------------------------------------------------------------------------------------------------
# learning curves


@dataclass(frozen=True)
class Learning:
    """Settings of the learning curves."""

    steps: int = 300  # the first hundred or so pass on a plateau at the logarithm of the batch size
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    batch_size: int = 16
    crop_seconds: float = 1.0
    learning_rate: float = 5e-4
    head_dropout: float = 0.0  # half of the scaled-down towers' 64 numbers are too few to learn from
    last: int = 20  # steps at the end of a curve that are averaged


def learning_curves(checkout: Path, manifest: Manifest, settings: Learning, size: Size) -> dict[str, list[list[float]]]:
    """Losses [seed][step] of the "reference" and of "fastclap", from the same weights on the same batches."""
    captions = [caption for row in manifest for caption in row.captions]
    tokenizer = train_tokenizer(captions, size.xlm_roberta["vocab_size"])
    curves: dict[str, list[list[float]]] = {"reference": [], "fastclap": []}
    for seed in settings.seeds:
        torch.manual_seed(seed)
        options = {"head_dropout": settings.head_dropout}
        reference = Reference(checkout, size, torch.device("cpu"), learning_rate=settings.learning_rate, **options)
        model = build_ours(size, tokenizer, **options)
        model.load_state_dict(reference.model.state_dict())
        ours = Step(model, TrainConfig(loss=parity_loss(), optimizer=parity_optimizer(settings.learning_rate)))
        sampler = BatchSampler(manifest, settings.batch_size, seed=seed, max_seconds=settings.crop_seconds)
        dataset = ClipDataset(
            manifest, crop_seconds=settings.crop_seconds, seed=seed, file_statistics=True, cache_mb=1000
        )
        for name in curves:
            curves[name].append([])
        for step in range(settings.steps):
            batch = dataset[(step, *sampler.batch(step))]
            _seed_all(2 * (seed * settings.steps + step))
            curves["reference"][-1].append(reference.step(collated(batch, model.tokenize(batch.captions))))
            _seed_all(2 * (seed * settings.steps + step) + 1)
            curves["fastclap"][-1].append(ours([batch]).loss.item())
        print(f"seed {seed}: " + ", ".join(f"{name} {curve[-1][-1]:.3f}" for name, curve in curves.items()), flush=True)
    return curves


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def compare(curves: dict[str, list[list[float]]], last: int) -> dict[str, Any]:
    """How the curves compare at their end.

    Returns:
        `start` and `end`: for each form mean and standard deviation over the seeds of the first loss and of the
        mean of the `last` ones; `difference`: fastclap − reference of the means at the end; `of_spread`: it as a
        share of a seed's standard deviation (both forms pooled); `paired`: mean and standard error over the seeds
        of the difference within a seed, which had the same weights and batches.
    """
    found: dict[str, Any] = {"start": {}, "end": {}}
    ends: dict[str, list[float]] = {}
    for name, runs in curves.items():
        ends[name] = [statistics.fmean(run[-last:]) for run in runs]
        for key, values in (("start", [run[0] for run in runs]), ("end", ends[name])):
            found[key][name] = {"mean": statistics.fmean(values), "deviation": statistics.stdev(values)}
    difference = found["end"]["fastclap"]["mean"] - found["end"]["reference"]["mean"]
    spread = math.sqrt(statistics.fmean(found["end"][name]["deviation"] ** 2 for name in curves))
    within = [ours - theirs for ours, theirs in zip(ends["fastclap"], ends["reference"], strict=True)]
    error = statistics.stdev(within) / math.sqrt(len(within))
    paired = {"mean": statistics.fmean(within), "standard_error": error}
    return {**found, "difference": difference, "of_spread": difference / spread, "paired": paired}


def describe(record: dict[str, Any]) -> str:
    """The comparison in words."""
    settings, result = record["settings"], record["result"]
    start, end, paired = result["start"], result["end"], result["paired"]
    lines = [
        f"{len(settings['seeds'])} seeds, {settings['steps']} steps of {settings['batch_size']} clips of up to "
        f"{settings['crop_seconds']:g} s from {record['clips']}, Adam at {settings['learning_rate']:g}, towers of size "
        f"tiny with dropout (in the heads {settings['head_dropout']:g}) and SpecAugment; torch {record['torch']}, "
        f"{record['machine']['cpu']}.",
        "",
    ]
    header = ["loss", "first step", f"mean of the last {settings['last']} steps"]
    cells = [
        [name, *(f"{at[name]['mean']:.4f} ± {at[name]['deviation']:.4f}" for at in (start, end))]
        for name in ("reference", "fastclap")
    ]
    lines += [markdown(header, cells), ""]
    agree = abs(result["of_spread"]) < 1
    lines.append(
        f"At the end fastclap is {result['difference']:+.4f} from the reference, {result['of_spread']:+.2f} of one "
        f"seed's standard deviation: {'within' if agree else 'OUTSIDE'} the spread of the seeds. Within a seed (same "
        f"weights, same batches, other masks) it is {paired['mean']:+.4f} ± {paired['standard_error']:.4f} (standard "
        f"error), {abs(paired['mean']) / paired['standard_error']:.1f} standard errors from zero."
    )
    return "\n".join(lines) + "\n"


def plot(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Mean and standard deviation over the seeds, by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, runs in curves.items():
        values = np.array(runs)
        mean, deviation, steps = values.mean(0), values.std(0, ddof=1), np.arange(1, values.shape[1] + 1)
        (line,) = axis.plot(steps, mean, label=f"{name}, mean of {len(runs)} seeds")
        axis.fill_between(steps, mean - deviation, mean + deviation, alpha=0.2, color=line.get_color())
    axis.set(xlabel="step", ylabel="training loss", title="mean ± standard deviation over seeds")
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="checkout of ParaSpeechCLAP")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--steps", type=int, help="default 3, with --train 300")
    parser.add_argument("--train", help="manifest to draw learning curves on")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(Learning.seeds))
    parser.add_argument("--batch-size", type=int, default=Learning.batch_size)
    parser.add_argument("--crop-seconds", type=float, default=Learning.crop_seconds)
    parser.add_argument("--learning-rate", type=float, default=Learning.learning_rate)
    parser.add_argument("--head-dropout", type=float, default=Learning.head_dropout)
    parser.add_argument("--out", type=Path, help="with --train: folder for record.json, record.md and curves.png")
    arguments = parser.parse_args()
    if not arguments.train:
        steps = arguments.steps or 3
        dtype = getattr(torch, arguments.dtype)
        for row in step_parity(arguments.reference, SIZES["tiny"], dtype=dtype, steps=steps):
            print(json.dumps(row))
        return
    if arguments.out is None or len(arguments.seeds) < 2:
        parser.error("--train needs --out and at least two seeds")
    settings = Learning(
        steps=arguments.steps or Learning.steps,
        seeds=tuple(arguments.seeds),
        batch_size=arguments.batch_size,
        crop_seconds=arguments.crop_seconds,
        learning_rate=arguments.learning_rate,
        head_dropout=arguments.head_dropout,
    )
    manifest = load_manifest([arguments.train])
    curves = learning_curves(arguments.reference, manifest, settings, SIZES["tiny"])
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "commit": commit_of(Path(__file__).parent),
        "reference": commit_of(arguments.reference),
        "machine": timing.machine(torch.device("cpu")),
        "settings": asdict(settings),
        "clips": f"{len(manifest)} clips of {Path(arguments.train).name}",
        "result": compare(curves, settings.last),
        "curves": curves,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.out / "record.json", (json.dumps(record, indent=1) + "\n").encode())
    write_atomic(arguments.out / "record.md", describe(record).encode())
    plot(curves, arguments.out / "curves.png")
    print(describe(record))


if __name__ == "__main__":
    main()
