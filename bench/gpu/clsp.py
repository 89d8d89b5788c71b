"""A training step of CLSP's second stage with SPEAR-XLarge: ours, and its published code.

The stages of the lot `clsp`. `bench.clsp_step` describes what a step takes and does; `bench.steady`, how it is timed.
Both have 800 s of audio, in clips of 30 s or of 5 s. Our step comes first and has its row before the other is built;
each of them keeps 12 GB between its steps (weights, gradients, optimizer state).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from bench.clsp_step import BATCHES, SECONDS_A_BATCH, SIZES, Forms, entry, host_batch
from bench.compare import ceilings
from bench.run import ABSENT, Run
from bench.steady import Steady
from fastclap.models.zipformer.limits import Training

NO_CHECKOUT = {"notes": "no checkout given"}


def long(run: Run) -> None:
    """Clips of 30 s, in which attention weighs most."""
    _in_turn(run, 30.0)


def short(run: Run) -> None:
    """Clips of 5 s, of which there are more captions."""
    _in_turn(run, 5.0)


def rehearsal() -> Callable[[], None]:
    """A call that takes our step at full width with few layers, captions and frames, on a CPU.

    It launches what the stages do: once every limit acts and once none, with schedules past their end, and at their
    beginning, where clips skip layers.
    """
    xlarge = SIZES["spear-xlarge"]
    of_stacks: dict[str, Any] = {"downsampling": [1, 2, 4, 8], "layers": [1], "kernel": [31, 31, 15, 15]}
    roberta = {**xlarge.roberta, "num_hidden_layers": 1, "vocab_size": 1000, "intermediate_size": 128}
    zipformer = replace(xlarge.zipformer, feedforward=[128], **of_stacks)
    forms = Forms(replace(xlarge, zipformer=zipformer, roberta=roberta), torch.device("cpu"), None)
    step, batch = forms.our_step(precision="bf16"), host_batch(forms.size, forms.tokenizer, 2, 0.3).batch
    form = replace(forms.ours(), step=lambda batch: step([batch]))  # in the float32 precision that the form has

    def call() -> None:
        for start, draw in ((BATCHES, 0.0), (BATCHES, 0.999), (0.0, 0.999)):
            zipformer.schedule_start = start
            with mock.patch.object(Training, "draw", lambda _, draw=draw: draw):
                form(batch)

    return call


def _in_turn(run: Run, seconds: float) -> None:
    torch.manual_seed(0)
    peak = ceilings(run)[0]
    clips = 3 if run.tiny else int(SECONDS_A_BATCH / seconds)
    size = SIZES["tiny" if run.tiny else "spear-xlarge"]
    forms = Forms(size, run.device, run.settings.icefall)
    batch = host_batch(size, forms.tokenizer, clips, 0.02 * seconds if run.tiny else seconds, not run.tiny)
    steady = Steady(run, 0.02 if run.tiny else 1.0)
    ours, published = (entry(form, batch, peak, 60.0) for form in (forms.ours(), forms.published()))
    steady.alone(ours)
    entries = [ours]
    if forms.checkout is None:
        run.add(published.case, reason=ABSENT, **NO_CHECKOUT)
    else:
        entries.append(published)
    steady.in_turn(entries, 0.0 if run.tiny else 15.0, least=1 if run.tiny else 3)
