"""What happens once, before the first step: resume point, demo data, model, optimizer, files that describe the run."""

from __future__ import annotations

import copy
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import fastclap
from fastclap.data import ClipDataset, Manifest
from fastclap.data.demo_voices import write_demo
from fastclap.data.tags import TagPrompts
from fastclap.errors import ConfigError
from fastclap.files import write_atomic
from fastclap.models.audio_towers import LogMelTower
from fastclap.models.clap import CLAP
from fastclap.models.tokenizer import train_tokenizer
from fastclap.train import checkpoint, distributed
from fastclap.train.averaging import WeightAverage
from fastclap.train.config import OptimizerConfig, TrainConfig
from fastclap.train.distributed import World, is_sharded

_STATISTICS_CLIPS = 512  # plenty for a mean and a deviation

# A resumed run may change these; anything else would make it another training.
_MAY_CHANGE = [
    "run_dir",
    "resume",
    "init_from",
    "steps",
    "epochs",
    "log_every",
    "valid_every",
    "save_every",
    "keep",
    "threads",
    "tensorboard",
    "wandb",
    "device",
    "max_bad_steps",
    "chunk_size",
    "compile",
    "checkpoint_activations",
    "shard",
    "profile",
    "data.workers",
    "data.prefetch",
    "data.cache_mb",
    "data.valid",
    "data.max_bad_share",
    "valid",
]


def find_checkpoint(config: TrainConfig, run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue from and its state, or None to begin at step 0.

    Raises:
        ConfigError: the folder holds a run and ``resume`` is off, or the configuration differs from that run's.
        ModelError: every checkpoint is damaged.
    """
    checkpoint.remove_partial(run_dir)
    if not config.resume:
        existing = checkpoint.checkpoints(run_dir)
        if existing:
            raise ConfigError(
                f"{run_dir} already holds a run (newest checkpoint {existing[-1].name}): continue it with --resume, "
                "or name another --run-dir"
            )
        return None
    newest = checkpoint.newest_checkpoint(run_dir)
    if newest is None:
        return None
    path, state, complaints = newest
    for complaint in complaints:
        print(f"warning: skipped a damaged checkpoint: {complaint}", file=sys.stderr, flush=True)
    before, now = _flat(state["config"]), _flat(config.to_dict())
    changed = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not (_may_change(name) and not (name == "init_from" and config.loss.teacher == "init"))
        and not (config.init_from and name.startswith("model."))
    ]
    if changed:
        raise ConfigError(
            f"{path} belongs to a run with another configuration: {'; '.join(changed)}. Give the same flags, "
            "or name another --run-dir"
        )
    return path, state


def make_demo_data(config: TrainConfig, run_dir: Path, world: World) -> None:
    """Fill in the manifests of a run on procedural voices, generating the clips on rank 0 if they are not there."""
    if not config.data.demo_clips or config.data.train:
        return
    folder = run_dir / "data"
    if world.is_main and not (folder / "valid.jsonl").exists():
        print(f"making {config.data.demo_clips} demo clips in {folder}", flush=True)
    if world.is_main:
        write_demo(str(folder), config.data.demo_clips, max(120, config.data.demo_clips // 8), seed=config.seed)
    distributed.barrier(world)
    config.data.train, config.data.valid = [str(folder / "train.jsonl")], [str(folder / "valid.jsonl")]


def find_tags(config: TrainConfig, manifest: Manifest, state: dict[str, Any] | None) -> TagPrompts | None:
    """The vocabulary and prompts of the tag loss, if the run has one; on resume the vocabulary must be the saved one.

    Raises:
        ConfigError: the manifest's tags are no longer those of the checkpoint.
        DataError: no clip has a tag, or the file of prompts is unusable.
    """
    if not config.loss.tag_weight or config.data.tag_column is None:
        return None
    tags = TagPrompts(manifest, config.data.tag_column, config.loss.tag_prompts, seed=config.seed)
    before = set((state or {}).get("tags") or tags.vocabulary)
    changed = sorted(before ^ set(tags.vocabulary))
    if changed:
        raise ConfigError(
            f"--data.train: the tags in {config.data.tag_column} have changed since the checkpoint "
            f"({', '.join(changed[:5])}); continue on the manifest of that run, or name another --run-dir"
        )
    return tags


def build_model(config: TrainConfig, manifest: Manifest, resume_path: Path | None) -> CLAP:
    """The model to train; with ``init_from`` (and on resume) its architecture and vocabulary come from the folder."""
    source = resume_path or config.init_from
    if source:
        model = CLAP.from_pretrained(source)
        model.card = None  # it tells of the weights that training starts from
        config.model = model.config
        return model
    tokenizer = None
    if config.model.text.kind == "small":
        captions = sorted({text for row in manifest for text in (*row.captions, *row.fine_captions)})
        tokenizer = train_tokenizer(captions, config.model.text.vocab_size)
    return CLAP(config.model, tokenizer)


def load_teacher(config: TrainConfig, model: CLAP, world: World) -> CLAP | None:
    """The frozen teacher of a self-distillation, on the device; None: there is none, or it is the moving average.

    Raises:
        ConfigError: it takes audio of another sampling rate.
    """
    source = config.init_from if config.loss.teacher == "init" else config.loss.teacher
    if source is None or source == "ema":
        return None
    teacher = CLAP.from_pretrained(source).to(world.device)
    if teacher.sampling_rate != model.sampling_rate:
        raise ConfigError(
            f"--loss.teacher {source} takes audio at {teacher.sampling_rate} Hz and the model at "
            f"{model.sampling_rate} Hz; both see the same clips, so choose a teacher of the same rate"
        )
    return frozen(teacher)


def averaged_teacher(model: CLAP, average: WeightAverage) -> CLAP:
    """A copy of the model that shares its weights with the moving average, and so follows it."""
    teacher = copy.deepcopy(model)
    teacher.load_state_dict(average.tensors, assign=True)
    return frozen(teacher)


def frozen(model: CLAP) -> CLAP:
    model.requires_grad_(False)
    return model.eval()


def fit_feature_statistics(model: CLAP, dataset: ClipDataset, world: World) -> None:
    """Set a from-scratch tower's feature normalisation from clips spread over the manifest, alike on every rank."""
    tower = model.audio_branch
    if not isinstance(tower, LogMelTower) or tower.config.feature_normalization == "clip":
        return
    if world.is_main:
        rows = list(range(0, len(dataset.manifest), max(1, len(dataset.manifest) // _STATISTICS_CLIPS)))
        batches = (dataset[(0, 0, rows[first : first + 32])] for first in range(0, len(rows), 32))
        tower.fit_feature_statistics((batch.audio, batch.lengths.to(world.device)) for batch in batches)
    distributed.broadcast_weights(tower, world)


def build_optimizer(model: CLAP, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that train; weight decay on linear and convolution matrices only.

    Each group's ``lr_scale`` is what the loop multiplies the scheduled learning rate by.
    """
    decayed_names = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
    }
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    towers = () if config.tower_lr_scale == 1.0 else ("audio_branch.", "text_branch.")
    kinds: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable:
        # The fused kernel takes tensors of one kind at a time.
        kind = (name in decayed_names, is_sharded(parameter), name.startswith(towers))
        kinds.setdefault(kind, []).append(parameter)
    groups = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "lr_scale": config.tower_lr_scale if of_tower else 1.0,
        }
        for (decayed, _, of_tower), parameters in sorted(kinds.items(), key=lambda kind: kind[0], reverse=True)
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def write_run_files(config: TrainConfig, run_dir: Path, world: World) -> None:
    """``config.yaml`` (resolved; usable as --config) and ``environment.json``."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(run_dir / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False).encode())
    write_atomic(run_dir / "environment.json", json.dumps(environment(world), indent=1).encode())


def environment(world: World) -> dict[str, Any]:
    """Versions, hardware, commit and command line of this process."""
    import tokenizers
    import transformers

    commit = subprocess.run(
        ["git", "-C", str(Path(fastclap.__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    on_gpu = world.device.type == "cuda"
    return {
        "fastclap": fastclap.__version__,
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if on_gpu else None,
        "threads": torch.get_num_threads(),
        "world_size": world.size,
        "command": sys.argv,
    }


def describe(config: TrainConfig, model: CLAP, manifest: Manifest, valid: Manifest | None, start_step: int) -> str:
    """The opening line of a run."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    start = f"resumed at step {start_step}" if start_step else "from step 0"
    held_out = f", {len(valid)} to validate" if valid is not None else ""
    return (
        f"{parameters / 1e6:.2f} M parameters, {len(manifest)} clips to train on{held_out}, "
        f"batch {config.batch_size}{f' in chunks of {config.chunk_size}' if config.chunk_size else ''}, {start}"
    )


def _may_change(name: str) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in _MAY_CHANGE)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
