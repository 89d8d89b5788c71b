"""A training step of CLSP's second stage with SPEAR-XLarge: ours, and its published code.

The stages of the lot `clsp`. `bench.clsp_step` describes what a step takes and does; `bench.steady`, how it is timed.
Both have 800 s of audio, in clips of 30 s or of 5 s. Our step comes first and has its row before the other is built;
each of them keeps 12 GB between its steps (weights, gradients, optimizer state).
"""

from __future__ import annotations

import torch

from bench.clsp_step import SECONDS_A_BATCH, SIZES, Forms, entry, host_batch
from bench.compare import ceilings
from bench.run import ABSENT, Run
from bench.steady import Steady

NO_CHECKOUT = {"notes": "no checkout given"}


def long(run: Run) -> None:
    """Clips of 30 s, in which attention weighs most."""
    _in_turn(run, 30.0)


def short(run: Run) -> None:
    """Clips of 5 s, of which there are more captions."""
    _in_turn(run, 5.0)


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
