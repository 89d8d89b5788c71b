"""What benchmarks share: their words, the sizes of towers, the record of what was measured, the run that fills it.

The words mean the same everywhere in `bench`:

    form     one way to compute something: ours, or a peer's
    case     what is measured: a form at some sizes, as a dict that no other case of the record equals
    entry    a case, and how to measure it
    row      the figures of a case, or the reason why there are none
    lot      a share of the cases that is measured in one go (`bench.gpu.lots`)
    stage    a function that measures some of a lot's cases
    run      one execution of a lot
    record   the file with the rows of a lot on one device

A record is rewritten whole, under another name and then renamed, at every row, so whatever kills a run leaves all rows
before it:

    {"lot": ..., "device": ..., "code": hash of the files that it measures,
     "runs": [{"date", "commit", "software", "machine", ..., "status", "seconds"}],
     "rows": [{"case": {...}, "run": index, figures ...}]}

Rows of the same code stay until their case is measured again; rows of other code go when a run of the present code
begins. One process writes at a time.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import timing
from fastclap.files import write_atomic

Case = dict[str, Any]
Row = dict[str, Any]

NOT_REACHED = "not reached"  # begins the reason of a row for which no time was left
ABSENT = "not available"  # of a form whose package is not installed, or that has nothing for this machine
CONTEXT_SECONDS = 10.0  # for what is still running on the GPU after an error
CONTEXT_LOST = 77  # exit code of a stage whose GPU context an error destroyed; the case has its row

NOT_PRINTED = ("case", "run", "notes", "errors", "package", "version", "scale_gradient", "passes")


def significant(x: float) -> float:
    """Four digits, as many as a row keeps."""
    return float(f"{x:.4g}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------------------------
# sizes


@dataclass(frozen=True)
class Size:
    """Towers as transformers configurations, without the model type, and the dimension of the shared space."""

    wavlm: dict[str, Any]
    xlm_roberta: dict[str, Any]
    dim: int


# What the published checkpoints' config.json say; the reference sets layerdrop to 0.
_WAVLM = {
    "layerdrop": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.1,
    "feat_proj_dropout": 0.1,
    "hidden_dropout": 0.1,
    "mask_time_prob": 0.075,
    "mask_time_length": 10,
    "mask_time_min_masks": 2,
    "mask_feature_prob": 0.0,
    "num_buckets": 320,
    "max_bucket_distance": 800,
}
_WAVLM_BASE = {**_WAVLM, "feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False}
_WAVLM_LARGE = {
    **_WAVLM,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": False,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
}
_XLM_ROBERTA = {
    "vocab_size": 250002,
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
_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}

SIZES = {
    "large": Size(_WAVLM_LARGE, _XLM_ROBERTA, 768),
    "base": Size(_WAVLM_BASE, _XLM_ROBERTA, 768),
    "tiny": Size(
        {
            **_WAVLM_LARGE,
            **_TINY,
            "conv_dim": [32] * 7,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        {**_XLM_ROBERTA, **_TINY, "vocab_size": 1000, "max_position_embeddings": 66},
        64,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# records


def key(case: Case) -> str:
    return json.dumps(case, sort_keys=True)


def read_record(path: Path) -> dict[str, Any] | None:
    """The content of a record, None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class Record:
    """The record of one lot on one device, open for a run.

    Args:
        path: of the file; what it holds is kept as far as it belongs to the same code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reload()

    def reload(self) -> None:
        """Takes over what another process has written."""
        self.content: dict[str, Any] = read_record(self.path) or {"runs": [], "rows": []}
        self._places = {key(row["case"]): place for place, row in enumerate(self.content["rows"])}

    def begin(self, lot: str, device: str, code: str, **run: Any) -> None:
        """Adds a run; rows and runs of other code go."""
        if self.content.get("code") != code:
            self.content = {"lot": lot, "device": device, "code": code, "runs": [], "rows": []}
            self._places = {}
        self.content["runs"].append({**run, "status": "running"})
        self.write()

    def update_run(self, **fields: Any) -> None:
        self.content["runs"][-1] |= fields
        self.write()

    @property
    def run(self) -> int:
        return len(self.content["runs"]) - 1

    def add(self, case: Case, **figures: Any) -> Row:
        """Writes a row to the disk, in the place of the case's earlier one.

        A reason that says nothing about the form (there was no time, it is not installed) does not replace figures of
        an earlier run.
        """
        row = {"case": case, "run": self.run, **figures}
        at = self._places.get(key(case))
        if at is None:
            self._places[key(case)] = len(self.content["rows"])
            self.content["rows"].append(row)
        elif str(row.get("reason", "")).startswith((NOT_REACHED, ABSENT)) and "reason" not in self.content["rows"][at]:
            return self.content["rows"][at]
        else:
            self.content["rows"][at] = row
        self.write()
        return row

    def row(self, case: Case) -> Row | None:
        """This run's row of a case."""
        at = self._places.get(key(case))
        row = None if at is None else self.content["rows"][at]
        return row if row is not None and row["run"] == self.run else None

    def rows(self) -> Iterator[Row]:
        """This run's rows."""
        return (row for row in self.content["rows"] if row["run"] == self.run)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, (json.dumps(self.content, indent=1, sort_keys=False) + "\n").encode())


# ---------------------------------------------------------------------------------------------------------------------
# runs


@dataclass(frozen=True)
class Settings:
    """What all lots of a command share.

    Attributes:
        device: "cuda", or "cpu" for a dry run: the same code at tiny sizes, in float32, which says nothing about speed.
        reference: a checkout of ParaSpeechCLAP.
        open_clip: a checkout of open_clip with CLAP.
        icefall: a checkout of yfyeung/icefall, branch clsp.
    """

    device: str
    reference: Path | None = None
    open_clip: Path | None = None
    icefall: Path | None = None


@dataclass(eq=False)  # an entry equals itself alone
class Entry:
    """A case and how to measure it; `bench.compare` and `bench.steady` time several in turn.

    Attributes:
        case: of its row, with the form's name as "form".
        make: builds the form and returns the call that is timed; None where the form cannot run here.
        facts: what else the row holds.
        work: what the row says of a median in ms.
        outcome: what the row says of the result of a call.
        seconds: the most that it may take to build, to compile, to tune and to run for the first times.
        errors: relative errors against float64 by name; None where the form computes something else.
    """

    case: Case
    make: Callable[[], Callable[[], Any]] | None
    facts: Row = field(default_factory=dict)
    work: Callable[[float], Row] = lambda _: {}
    outcome: Callable[[Any], Row] = lambda _: {}
    seconds: float = 60.0
    errors: Callable[[], Mapping[str, float | None]] | None = None

    @property
    def form(self) -> str:
        return self.case["form"]


class SharedState:
    """Memory that a process shares with those it forks: the case being measured, and until when that may take."""

    SIZE = 1 << 16

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self.SIZE)
        self.set(None, 0.0)

    def set(self, case: Case | None, until: float) -> None:
        text = json.dumps(case).encode()[: self.SIZE - 12]
        self._memory[8:12] = struct.pack("I", len(text))
        self._memory[12 : 12 + len(text)] = text
        self._memory[:8] = struct.pack("d", until)

    @property
    def until(self) -> float:
        """A time of time.monotonic(); 0 between cases."""
        return struct.unpack("d", self._memory[:8])[0]

    @property
    def case(self) -> Case | None:
        (length,) = struct.unpack("I", self._memory[8:12])
        return json.loads(self._memory[12 : 12 + length])


class Run:
    """What a stage works with.

    Args:
        record: of the lot, with the run begun.
        settings: of the command.
        deadline: when the lot's time is up, by time.monotonic().
        state: what a watching process looks at (`bench.gpu.watch`), if there is one.

    Attributes:
        record: of the lot; see `add`.
        device: on which everything runs.
        tiny: whether this is a dry run.
        dtype: of the embeddings and activations that are measured: bfloat16, in a dry run float32.
        engine: what a kernel's `backend` should be for the engine that is measured: "triton", in a dry run "auto".
    """

    def __init__(self, record: Record, settings: Settings, deadline: float, state: SharedState | None = None) -> None:
        self.record, self.settings, self._deadline = record, settings, deadline
        self._state = state or SharedState()
        self.device = torch.device(settings.device)
        self.tiny = self.device.type == "cpu"
        self.dtype = torch.float32 if self.tiny else torch.bfloat16
        self.engine = "auto" if self.tiny else "triton"

    @property
    def left(self) -> float:
        """Seconds until the lot's time is up."""
        return self._deadline - time.monotonic()

    def add(self, case: Case, **figures: Any) -> Row:
        """Writes a row to the disk, and a line of it to the terminal."""
        row = self.record.add(case, **figures)
        print(f"[{self.record.content['lot']}] {describe(row)}", flush=True)
        return row

    def known(self, case: Case) -> Row | None:
        """This run's row of the case, from before the stage was started anew."""
        return self.record.row(case)

    def failed(self, case: Case) -> bool:
        """Whether the case came to no result in this run already."""
        row = self.known(case)
        return row is not None and "reason" in row

    def finished(self, case: Case) -> bool:
        """Whether this run has a row of the case that is not preliminary."""
        row = self.known(case)
        return row is not None and not row.get("preliminary")

    def measure(self, case: Case, call: Callable[[], Row], seconds: float) -> None:
        """Adds the row that a call returns, or one with the reason why there is none, unless the case has a row."""
        if self.known(case) is None:
            figures = self.attempt(case, call, seconds)
            if figures is not None:
                self.add(case, **figures)

    def attempt(self, case: Case, call: Callable[[], Any], seconds: float) -> Any:
        """The result of a call; or None, with a row that says why: what it raised, or that it took too long.

        Args:
            case: of the row.
            call: what to do. A hang that Python cannot interrupt ends the process, and the stage starts anew.
            seconds: the most it may take.
        """
        if self.failed(case):
            return None
        result, reason = self.result(case, call, seconds)
        if reason is not None:
            self.add(case, reason=reason)
        return result

    def result(self, case: Case, call: Callable[[], Any], seconds: float) -> tuple[Any, str | None]:
        """The result of a call, or None and why there is none; for a call without which the case is still worth a row.

        An error that destroys the GPU's context ends the process, with a row for the case; the stage starts anew.
        """
        seconds = min(seconds, self.left)
        if seconds <= 0:
            return None, f"{NOT_REACHED}: no time left"
        with self.watched(case, seconds):
            result, reason = timing.attempt(call, seconds)
            if reason is not None:
                self.end_if_lost(case, reason)
        if reason is not None and self.left <= 0:
            reason = f"{NOT_REACHED}: the lot's time was up"
        return result, reason

    def end_if_lost(self, case: Case, reason: str) -> None:
        """Within `watched`, after an error: ends the process, with a row for the case, if the GPU's context is gone."""
        self.blame(case, CONTEXT_SECONDS)  # a kernel that never ends would hold up whoever asks
        if not self._context_lives():
            self.add(case, reason=reason)
            sys.stdout.flush()
            os._exit(CONTEXT_LOST)

    def _context_lives(self) -> bool:
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except Exception:  # of any kind: nothing works on this GPU in this process any more
                return False
        return True

    def blame(self, case: Case, seconds: float) -> None:
        """Within `watched`: from now on this case answers for what happens to the process, for so many seconds."""
        self._state.set(case, time.monotonic() + seconds)

    @contextlib.contextmanager
    def watched(self, case: Case, seconds: float) -> Iterator[None]:
        """Inside it the case answers for whatever happens to the process, and it may take so many seconds."""
        before = (self._state.case, self._state.until)
        self.blame(case, seconds)
        try:
            yield
        finally:
            self._state.set(*before)


def describe(row: Row) -> str:
    """A row in one line."""
    case = ", ".join(str(value) for value in row["case"].values())
    if "reason" in row:
        return f"{case}: {row['reason']}"
    figures = {name: value for name, value in row.items() if name not in NOT_PRINTED and value is not None}
    times = ""
    if "median_ms" in figures:
        times = f"{figures.pop('median_ms'):.4g} ms ({figures.pop('p10_ms'):.4g}-{figures.pop('p90_ms'):.4g}), "
    return f"{case}: {times}{json.dumps(figures, default=str)[:300]}"
