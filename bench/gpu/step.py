"""A training step of WavLM-Large and XLM-R: ours, ours compiled, the reference as released and at its best.

The stages of the lots `step`, `short` and `step_more`. `bench.train_step` describes what a form is, and what a step
takes and does; `bench.steady`, how it is timed. Weights are random and drawn on the device.

Our step comes first and has its row before anything else is built. Our forms share weights and optimizer; the reference
has its own. By shapes, 64 clips without a gradient cache take 53 GB of ours, and what the reference keeps between its
steps (weights, gradients, optimizer state) 10 GB.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch

from bench import timing
from bench.compare import ceilings
from bench.gpu.profiled import Profile, labelled, profiled
from bench.parity import CAPTIONS, synthetic_batch
from bench.run import ABSENT, NOT_REACHED, SIZES, Case, Entry, Row, Run, significant
from bench.steady import Steady
from bench.train_step import OPEN_CLIP_MODELS, Form, Forms, HostBatch, OpenClipPair, host_batch, work
from fastclap.models.tokenizer import train_tokenizer
from fastclap.train.step import Step

OURS = "fastclap"
COMPILE_SECONDS = 75.0
KEPT_SECONDS = 55.0  # of the lot, for the stages after the first
ABLATION_ROWS = 16
NO_CHECKOUT = {"notes": "no checkout given"}


class Steps:
    """Forms of the step at the sizes of a run, and their entries.

    Args:
        run: of the stage.
        chunk: clips a chunk of the gradient cache.
        block_seconds: length of a block of consecutive steps.
        seconds: length of a clip.
    """

    def __init__(self, run: Run, chunk: int = 64, block_seconds: float = 1.0, seconds: float = 10.0) -> None:
        torch.manual_seed(0)
        self.run = run
        self.seconds = 0.025 * seconds if run.tiny else seconds
        self.size = SIZES["tiny" if run.tiny else "large"]
        self.peak_tflops = ceilings(run)[0]
        self.forms = Forms(self.size, run.device, run.settings.reference, train_tokenizer(CAPTIONS, 1000), chunk)
        self.steady = Steady(run, 0.02 if run.tiny else block_seconds)

    @functools.lru_cache(2)  # noqa: B019 - lives as long as the stage
    def batch(self, rows: int) -> HostBatch:
        """Clips of equal length; half of the captions are distinct, as of clips that share descriptions."""
        made = synthetic_batch(rows, self.seconds, 0, distinct=0.5, least=1.0)
        return host_batch(made, self.forms.tokenizer, self.size, pin=self.run.device.type == "cuda")

    def case(self, form: Form, rows: int) -> Case:
        return {"form": form.name, "rows": rows, "seconds": self.seconds}

    def entry(self, form: Form, rows: int, seconds: float = 40.0) -> Entry:
        """A form on a batch of so many clips; it may take so many seconds until it is warm."""
        facts = {"notes": form.notes}
        return Entry(
            self.case(form, rows),
            lambda: form.call_for(self.batch(rows)),
            facts,
            work(rows, self.batch(rows).flops, self.peak_tflops),
            form.outcome,
            seconds,
        )

    def in_turn(self, entries: Sequence[Entry], seconds: float, least: int = 3) -> None:
        self.steady.in_turn(entries, 0.0 if self.run.tiny else seconds, least=1 if self.run.tiny else least)

    def own_forms(self) -> tuple[Form, Form]:
        """Ours, eager and compiled."""
        notes = "every optimisation, torch.compile of each layer"
        compiled = self.forms.complete(f"{OURS}, compiled", notes, compiled=True)
        return self.forms.complete(OURS, "every optimisation, eager"), compiled


def small(run: Run) -> None:
    """Batches of 32 and of 64 clips: ours alone, then with the reference, then with ours compiled."""
    steps = Steps(run)
    ours, compiled = steps.own_forms()
    kept, before = 0.0 if run.tiny else KEPT_SECONDS, None
    for rows in (3, 4) if run.tiny else (32, 64):
        own = steps.entry(ours, rows)
        steps.steady.alone(own)
        theirs = [steps.entry(form, rows) for form in steps.forms.reference_forms()]
        if run.settings.reference is None:
            for entry in theirs:
                run.add(entry.case, reason=ABSENT, **NO_CHECKOUT)
            theirs = []
        steps.in_turn([own, *theirs], 10.0, least=3 if before is None else 2)
        faster = steps.entry(compiled, rows, min(COMPILE_SECONDS, run.left - kept))
        if before is not None and run.failed(before):
            run.add(faster.case, reason=f"not tried, as it failed at {before['rows']} clips")
        elif faster.seconds < 20 and not run.tiny:
            run.add(
                faster.case, reason=f"{NOT_REACHED}: no time to compile it and for the gradient cache and the profile"
            )
        torch.compiler.reset()  # a training run has one batch size, to which its graphs are compiled
        with _compiling(run):
            steps.in_turn([own, faster], 8.0)
        before = faster.case


def _compiling(run: Run) -> contextlib.AbstractContextManager[Any]:
    """On a CPU compiling takes minutes."""
    return torch.compiler.set_stance("force_eager") if run.tiny else contextlib.nullcontext()


def short(run: Run) -> None:
    """96 clips of 3 s, about the seconds of 32 of the usual ones, in as many launches as those."""
    steps = Steps(run, seconds=3.0)
    ours, compiled = (steps.entry(form, 4 if run.tiny else 96, COMPILE_SECONDS) for form in steps.own_forms())
    with _compiling(run):
        steps.in_turn([ours, compiled], 10.0)


def larger(run: Run) -> None:
    """The gradient cache: 256 clips in chunks of 64, which need the memory of 64."""
    rows, chunk = (4, 2) if run.tiny else (256, 64)
    steps = Steps(run, chunk, block_seconds=3.0)
    cached = steps.forms.complete(f"{OURS}, gradient cache", f"every optimisation, chunks of {chunk}", chunk=chunk)
    steps.in_turn([steps.entry(cached, rows)], 12.0)


def profile(run: Run) -> None:
    """Our step at 32 clips by kernel and by part: what there is to gain."""
    steps = Steps(run)
    rows = 3 if run.tiny else 32
    form = steps.forms.complete(OURS, "every optimisation, eager")
    whole = {"form": OURS, "profile": "whole step"}
    found = run.attempt(whole, lambda: _profiled(steps, form, rows), 60.0)
    if found is None:
        return
    launches = sum(calls for _, calls in found.kernels.values())
    run.add(whole, clips=rows, device_ms=significant(found.total_ms), launches=launches)
    for name, figures in found.rows(found.kernels, 20):
        run.add({"form": OURS, "kernel": name[:160]}, clips=rows, **figures)
    parts = run.attempt({"form": OURS, "part": "all"}, lambda: found.parts, 30.0)
    for name, figures in found.rows(parts or {}):
        run.add({"form": OURS, "part": name}, clips=rows, **figures)


def _profiled(steps: Steps, form: Form, rows: int) -> Profile:
    step = form.call_for(steps.batch(rows))
    for _ in range(3):
        step()
    assert form.step is not None
    objective: Any = form.step.objective  # type: ignore[attr-defined]
    base = objective.model.audio_branch.base
    modules = {"convolutions": base.feature_extractor, "positional convolution": base.encoder.pos_conv_embed}
    methods = {"loss": (objective, "loss"), "optimizer": (Step, "update")}
    with labelled(modules, methods):
        return profiled(step, steps.run.device)


def ablation(run: Run) -> None:
    """One optimisation at a time, from transformers' modules in float32 on.

    Those keep the attention weights of every layer: by shapes 44 GB at 16 clips, and 80 GB at 32.
    """
    rows = 3 if run.tiny else ABLATION_ROWS
    steps = Steps(run, block_seconds=0.7)
    entries = [steps.entry(form, rows, COMPILE_SECONDS) for form in steps.forms.ablation()]
    steps.in_turn(entries, 30.0)


def open_clip(run: Run) -> None:
    """open_clip's CLAP and our log-mel tower of as many parameters, 32 clips of 10 s at 48 kHz."""
    size = "tiny" if run.tiny else "large"
    rows, seconds = (2, 1.0) if run.tiny else (32, 10.0)
    steady = Steady(run, 0.02 if run.tiny else 1.0)
    tokenizer = train_tokenizer(CAPTIONS, 1000)
    for name in OPEN_CLIP_MODELS[size]:
        names = (f"{OURS} log-mel, as {name}", f"open_clip {name}")
        cases: list[Case] = [{"form": form, "clips": rows, "seconds": seconds, "rate": 48000} for form in names]
        if run.settings.open_clip is None:
            for case in cases:
                run.add(case, reason=ABSENT, **NO_CHECKOUT)
            continue
        pair = OpenClipPair(run.settings.open_clip, name, run.device, tokenizer, tiny_text=run.tiny)
        entries = []
        for case, build, batch, which in (
            (cases[0], pair.our_step, pair.our_batch, 1),
            (cases[1], pair.their_step, pair.their_batch, 0),
        ):
            form = Form(case["form"], "forward, loss, backward, optimizer", build, "high")

            def outcome(loss: Any, form: Form = form, which: int = which, pair: OpenClipPair = pair) -> Row:
                return {**form.outcome(loss), "audio_parameters": pair.audio_parameters[which]}

            make = functools.partial(lambda form, batch: form.call_for(batch(rows, seconds)), form, batch)
            entries.append(Entry(case, make, {"notes": form.notes}, work(rows, None, None), outcome))
        steady.in_turn(entries, 0.0 if run.tiny else 8.0, least=1 if run.tiny else 3)
        del pair, entries, form, make, outcome
        timing.release()
