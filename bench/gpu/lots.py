"""The lots, the most useful first, and the code that each measures."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Globs of files, relative to the root.
KERNELS = ("kernels/dispatch.py", "kernels/triton_tools.py")
LOSS = (*KERNELS, "kernels/contrastive/*.py", "fastclap/losses.py")
LOG_MEL = (*KERNELS, "kernels/cuda_tools.py", "kernels/csrc/*.cuh", "kernels/log_mel/*.py", "fastclap/features.py")
TOWERS = (
    *KERNELS,
    "kernels/toeplitz_attention*.py",
    "kernels/shared_attention*.py",
    "kernels/*layer_norm*.py",
    "kernels/waveform*.py",
    "kernels/feed_forward*.py",
)
ZIPFORMER = (
    *("kernels/rows.py", "kernels/swoosh*.py", "kernels/bias_norm*.py", "kernels/gated_convolution*.py"),
    "kernels/resampling*.py",
)
MODEL = (*TOWERS, *ZIPFORMER, "fastclap/models/*.py")
STEP = (*LOSS, *MODEL, "fastclap/grad_cache.py", "train/step.py", "train/distributed.py")


@dataclass(frozen=True)
class Lot:
    """A share of the measurements that fits into four minutes of an H100, from a cold cache.

    Attributes:
        name: of its record, and on the command line.
        what: it shows, in a line.
        stages: "module:function" of a `bench.run.Run`, each run in a process of its own.
        forms: how the names of the kernel forms (`bench.gpu.forms`) begin that it launches, which are compiled first.
        seconds: expected on an H100; a record knows better.
        calls: "module:function" that makes a call for `bench.gpu.rehearsal`, whose kernels are compiled first too.
        measures: globs of the files that it measures: when one of them changes, its record is out of date.
    """

    name: str
    what: str
    stages: tuple[str, ...]
    forms: tuple[str, ...]
    seconds: float
    measures: tuple[str, ...]
    calls: tuple[str, ...] = ()

    @property
    def code(self) -> str:
        """A hash over the files that it measures."""
        files = sorted({path for pattern in self.measures for path in ROOT.glob(pattern)})
        digest = hashlib.sha256()
        for path in files:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()[:16]


_TOWER_FORMS = (
    *("attention step", "feed forward step", "layer norm gelu step", "residual layer norm step"),
    *("waveform step", "waveform convolution step"),
)
_STEP_FORMS = ("loss ids", *_TOWER_FORMS)

_LOTS = (
    Lot(
        "smoke",
        "every kernel form that another lot launches, once, at odd sizes against float64; ceilings",
        ("bench.gpu.smoke:ceilings", "bench.gpu.smoke:kernels", "bench.gpu.smoke:positions"),
        ("",),
        100,
        (*LOSS, *LOG_MEL, *MODEL),
    ),
    Lot(
        "tests",
        "the tests of the kernels and of the training step, on the device",
        ("bench.gpu.device_tests:device_tests",),
        (),
        200,
        ("kernels/**/*.py", "fastclap/**/*.py", "train/*.py", "tests/kernels/**/*.py", "tests/train/*.py"),
    ),
    Lot(
        "step",
        "a training step of WavLM-Large and XLM-R: the reference as released and tuned, ours, ours compiled",
        ("bench.gpu.step:small", "bench.gpu.step:larger", "bench.gpu.step:profile"),
        _STEP_FORMS,
        235,
        STEP,
    ),
    Lot(
        "clsp",
        "a training step of CLSP with SPEAR-XLarge, 800 s of audio in clips of 30 s and of 5 s: ours, published",
        ("bench.gpu.clsp:long", "bench.gpu.clsp:short"),
        (),
        200,
        (*STEP, *LOG_MEL, "fastclap/models/zipformer/*.py", "train/scaled_adam.py", "kernels/scaled_adam*.py"),
        ("bench.gpu.clsp:rehearsal",),
    ),
    Lot(
        "loss",
        "InfoNCE and its peers at D = 768, its stages and their floors, latency as a call and as a graph",
        tuple(f"bench.gpu.loss:{stage}" for stage in ("main", "stages", "latency", "errors", "graphs")),
        ("loss plain",),
        220,
        LOSS,
    ),
    Lot(
        "towers",
        "attention, the kernels around norms and feed-forward, waveform and its convolution, their peers and floors",
        ("bench.gpu.kernels:towers", "bench.gpu.kernels:tower_graphs"),
        ("attention", "feed forward", "layer norm gelu", "residual layer norm", "waveform"),
        180,
        TOWERS,
    ),
    Lot(
        "log_mel",
        "the log-mel front-ends, their peers and floors",
        tuple(f"bench.gpu.kernels:{stage}" for stage in ("log_mel", "log_mel_gradients", "log_mel_graphs")),
        ("log-mel",),
        180,
        LOG_MEL,
    ),
    Lot(
        "sanitized",
        "compute-sanitizer's memcheck, racecheck and synccheck over the CUDA log-mel",
        ("bench.gpu.sanitized:sanitized",),
        (),
        90,
        LOG_MEL,
    ),
    Lot(
        "train",
        "fastclap-train at full size from a configuration, on packed synthetic shards",
        ("bench.gpu.train:train",),
        _STEP_FORMS,
        200,
        (*STEP, "train/*.py", "fastclap/data/*.py"),
    ),
    Lot(
        "short",
        "a training step on clips of 3 s, eager and compiled, where launches weigh most",
        ("bench.gpu.step:short",),
        _STEP_FORMS,
        120,
        STEP,
    ),
    Lot(
        "loss_more",
        "InfoNCE at D = 512 and 1024 and with the other peers, its other contrasts, SigLIP's loss, N = 1,048,576",
        tuple(f"bench.gpu.loss:{stage}" for stage in ("more", "contrasts", "sigmoid", "largest")),
        ("loss plain", "loss guide", "loss debias", "loss matryoshka", "loss queue", "sigmoid"),
        235,
        LOSS,
    ),
    Lot(
        "embed",
        "embedding clips and captions with a full-size model",
        ("bench.gpu.embed:embed",),
        _TOWER_FORMS,
        100,
        MODEL,
    ),
    Lot(
        "step_more",
        "the training step with one optimisation at a time, and open_clip's CLAP next to our log-mel tower",
        ("bench.gpu.step:ablation", "bench.gpu.step:open_clip"),
        (*_STEP_FORMS, "log-mel clap"),
        235,
        (*STEP, *LOG_MEL),
    ),
)
LOTS = {lot.name: lot for lot in _LOTS}
