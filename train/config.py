"""What a training run is made of, as plain dataclasses.

Every field is a flag of `fastclap-train` and a key of its YAML/TOML files; the docstring under a field is its help.
Nothing here imports torch, so that `--help` is answered at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastclap.bounds import (
    Count,
    CountOrNone,
    NotNegative,
    Positive,
    Range,
    Share,
    ShareBelowOne,
    Size,
    SizeOrNone,
    first_wrong,
)
from fastclap.config import CLAPConfig, read_dataclass
from fastclap.errors import ConfigError
from fastclap.prompts import DEFAULT_TEMPLATE
from fastclap.reading import parse_toml, parse_yaml, read_text


@dataclass
class DataConfig:
    """Where clips and captions come from."""

    train: list[str] = field(default_factory=list)
    """Training manifests: .jsonl, .json, .csv, .tsv or .parquet files, saved `datasets` folders, or hf:NAME[:SPLIT]."""
    valid: list[str] = field(default_factory=list)
    """Validation manifests, same kinds. Without one, no validation takes place."""
    demo_clips: CountOrNone = 0
    """Without a training manifest: make this many procedural demo clips under the run folder and train on them."""
    audio_root: str | None = None
    """Folder that relative audio paths start from (default: the folder of each manifest)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names of the manifests that differ, as pairs: OURS THEIRS (for example text_description caption)."""
    mix: Literal["concat", "interleave"] = "concat"
    """How several training manifests are joined."""
    probabilities: list[Annotated[float, Range(0, 1, without=(0,))]] | None = None
    """With `interleave`: the probability of each manifest (default: strict alternation until all are exhausted)."""
    balance: Literal["none", "inverse", "sqrt", "log"] = "none"
    """Draw clips with replacement, weighted by 1/n, 1/√n or 1/ln(n + 1) of the n clips that share their tags."""
    tag_column: str | None = None
    """Column of tags for `balance` and `loss.tag_weight`, such as intrinsic_tags."""
    rare_clips: SizeOrNone = 2
    """With `balance`: least number of clips in a global batch with a tag that less than 5 % of the clips have."""
    captions: Literal["global", "fine", "both", "pair", "perturbed"] = "global"
    """Which captions a clip draws one from, each epoch anew: text_description, fine_description, or either. pair: two
    captions a clip (CLSP stage 2), at batch t both fine with probability min(0.05 + 0.45 t/10000, 0.5), else a global
    and a fine one; a clip's own two are then its only positives. perturbed: a global and a fine one, and the global one
    with an attribute of the clip contradicted (CLSP stage 3), which takes part in the local loss alone."""
    fine_characters: list[CountOrNone] | None = None
    """Shortest and longest fine caption that is trained on, in characters; clips that lose all of theirs are left
    out."""
    min_seconds: NotNegative = 0.0
    """Shorter clips are left out of the training."""
    max_seconds: Annotated[float, Range(0.1)] | None = None
    """Longer clips are left out of the training instead of being cropped."""
    crop_seconds: Annotated[float, Range(0.1, 86_400)] = 10.0
    """Longest stretch of a clip that is trained on; longer clips are cropped at random."""
    pad_to_crop: bool = False
    """Pad every clip to `crop_seconds` with zeros that count as sound (how ParaSpeechCLAP was trained)."""
    bucket_by_length: bool = True
    """Batch clips of like length together, to save padding."""
    batch_seconds: Positive | None = None
    """Seconds of padded audio in a global batch: short clips then come in larger batches than long ones, of at most
    `batch_size` clips."""
    workers: Annotated[int, Range(0, 256)] = 2
    """Decoding processes (0: decode in the training process)."""
    prefetch: Annotated[int, Range(1, 1024)] = 4
    """Batches each worker prepares ahead."""
    worker_timeout: Annotated[float, Range(1, 86_400)] = 120.0
    """Seconds without progress after which a decoding process is replaced. A clip at which the next one stops too is
    left out like one that cannot be read."""
    cache_mb: CountOrNone = 0
    """Decoded audio kept in memory, in MiB, for each decoding process: small sets are then decoded once."""
    frozen_cache: str = "auto"
    """Where the pooled outputs of frozen towers are kept, to be computed once for all epochs and runs: a folder, auto
    ($FASTCLAP_CACHE, else ~/.cache/fastclap), or off, to compute them at every step."""
    frozen_crops: Annotated[int, Range(1, 1024)] = 4
    """Crops of a clip longer than `crop_seconds` that are kept of a frozen audio tower, evenly spread and the same in
    every run; each epoch takes one of them."""
    max_bad_share: Share = 0.01
    """Share of unusable clips (missing, truncated, silent, NaN) that are set aside before the run stops. One of them is
    tolerated in any set, unless this is 0."""


@dataclass
class LossConfig:
    """The contrastive objective."""

    kind: Literal["info_nce", "sigmoid"] = "info_nce"
    """Softmax over the batch (CLIP) or independent pairs (SigLIP)."""
    share_equal_captions: bool = True
    """Clips with the same caption text are positives of each other instead of false negatives."""
    label_smoothing: ShareBelowOne = 0.0
    """Target mass spread over the whole batch (info_nce only)."""
    teacher: str | None = None
    """Self-distillation (RA-CLAP): folder of the stage-1 model, which stays fixed; init, the model that training starts
    from (--init-from); or ema, the moving average of the weights under training. The teacher sees the same clips
    without dropout and augmentation."""
    teacher_weight: Share = 0.5
    """Share λ of the divergence from the teacher: (1-λ)·InfoNCE + λ·KL(teacher‖model), in each direction."""
    teacher_temperature: Positive | None = None
    """Temperature of the teacher's softmax, which multiplies its cosines by 1/temperature (unset: its own scale)."""
    guide_margin: float | None = None
    """Guide (GISTEmbed): leave out what is no positive but whose cosine, by the teacher, is above that of the positive
    less this margin, because it may be one. Needs --loss.teacher and --loss.teacher-weight 0. A negative margin leaves
    out only what is closer than the positive by so much (unset: no guide)."""
    guide_relative: bool = False
    """The margin of the guide is a share of the positive's cosine."""
    debias: ShareBelowOne = 0.0
    """Prior probability that a negative is a positive, whose part is taken off the sum over the negatives (Chuang et
    al. 2020; 0: none)."""
    queue_size: SizeOrNone = 0
    """Clips, and captions, of earlier batches that are further negatives (XBM; 0: none). Those with the caption of a
    positive are left out, as `share_equal_captions` says, or with `data.captions pair` those of the same clip."""
    queue_after: CountOrNone = 0
    """Steps before the queue is used, so that embeddings change slowly by then; it fills up meanwhile."""
    matryoshka: list[Size] = field(default_factory=list)
    """Widths of the embeddings' first columns, such as 768 384 192: the loss is summed over them, and a model can then
    be used at each. The full width counts only if it is listed. Empty: the full width alone."""
    matryoshka_weights: list[Positive] | None = None
    """Weight of each of these widths in the sum (unset: 1)."""
    tag_weight: NotNegative = 0.0
    """Weight of the multi-label tag loss, added to the contrastive one (ParaSpeechCLAP Intrinsic: 1; 0: none)."""
    tag_prompts: str | None = None
    """JSON file of synonym prompts, {"tag": ["prompt", ...]}: each step draws one for each tag. Tags that it lacks get
    "A person is speaking in a {} style."."""
    tag_scale: Positive = 1.0
    """Multiplier of the cosines in the tag loss; 1 as published."""
    local_weight: NotNegative = 0.0
    """Weight of the local loss, which tells a clip's global caption from the one that contradicts it; for
    `data.captions perturbed` (CLSP stage 3: 0.2; 0: none)."""


@dataclass
class OptimizerConfig:
    """The optimizer and its schedule."""

    kind: Literal["adamw", "scaled-adam"] = "adamw"
    """scaled-adam is that of icefall, which CLSP is trained with: each step is a share of a parameter's own size, so
    that learning rates are higher (0.045)."""
    learning_rate: NotNegative = 1e-3
    """Peak learning rate."""
    tower_lr_scale: NotNegative = 1.0
    """Learning rate of both towers as a multiple of that of heads and logit scale."""
    layer_decay: Annotated[float, Range(0, 1, without=(0,))] = 1.0
    """Learning rate of a tower's last transformer layer as a multiple of that of what comes after it, of the layer
    before it as a multiple of its own, and so on down to embeddings or convolutions (1: all alike)."""
    weight_decay: NotNegative = 0.05
    """Decoupled weight decay of matrices (never of norms, biases, embeddings or the logit scale); of adamw only."""
    beta1: ShareBelowOne = 0.9
    """Decay of the gradient's running mean."""
    beta2: ShareBelowOne = 0.98
    """Decay of the squared gradient's running mean."""
    eps: Positive = 1e-8
    """Denominator offset."""
    warmup_steps: CountOrNone = 100
    """Steps of linear warm-up."""
    warmup_start: Share = 0.0
    """Where the warm-up begins, as a share of the learning rate (icefall: 0.5)."""
    unfreeze_step: CountOrNone = 0
    """Steps after which what the freeze options of the towers keep fixed begins to train (0: it never does)."""
    schedule: Literal["cosine", "linear", "constant", "cooldown", "eden"] = "cosine"
    """Shape of the decay after the warm-up; cooldown is constant, then 1 - √ over the last `cooldown_share`. eden is
    icefall's, which falls as 1/√ of the step and of the epoch, and knows no last step."""
    cooldown_share: Annotated[float, Range(0, 1, without=(0,))] = 0.2
    """Share of all steps over which the learning rate decays, with `cooldown`."""
    final_share: Share = 0.0
    """Learning rate at the last step, as a share of the peak."""
    eden_batches: Positive = 100_000.0
    """With `eden`: steps after which the learning rate begins to fall."""
    eden_epochs: Positive = 100.0
    """With `eden`: epochs after which the learning rate begins to fall."""
    clip_norm: NotNegative = 1.0
    """Largest gradient norm (0: no clipping); of adamw only."""
    clipping_scale: NotNegative = 2.0
    """With `scaled-adam`, which clips by itself: largest gradient norm, as a multiple of the median of the last 100
    steps, of all parameters with the same learning rate together (0: no clipping)."""
    ema_decay: ShareBelowOne = 0.0
    """Decay of the exponential moving average of the weights, which is then evaluated and exported (0: none)."""
    average_every: CountOrNone = 0
    """Steps between the weights whose mean over the whole run checkpoints hold, for `fastclap-train average` (0: none;
    CLSP: 200). Evaluated and exported are the weights themselves."""


@dataclass
class ValidConfig:
    """What validation measures."""

    classify: list[str] = field(default_factory=lambda: ["classification_tag"])
    """Manifest columns to classify zero-shot; classification_tag only if the validation manifest has it."""
    template: list[str] = field(default_factory=lambda: [DEFAULT_TEMPLATE])
    """Prompts of every class, averaged: {} is the class name, {a} or {A} its article (a or an)."""
    prompts: str | None = None
    """JSON file of prompts instead: {"class": ["prompt", ...]}, or one such mapping for each column."""
    batch_size: Size = 32
    """Clips embedded at a time, by each of the processes, which share the validation."""
    best: str | None = None
    """Figure by which validations are compared, such as retrieval/global/audio_to_text/R@1 or
    classification/classification_tag/uar; the model of the best one is kept as `best` in the run folder. Ranks are
    better when they are small, everything else when it is large."""
    patience: CountOrNone = 0
    """Validations without a better `best` after which the run ends (0: it takes all steps)."""


@dataclass
class TrainConfig:
    """A training run."""

    run_dir: str = "runs/run"
    """Folder that receives everything the run writes."""
    data: DataConfig = field(default_factory=DataConfig)
    model: CLAPConfig = field(default_factory=CLAPConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    valid: ValidConfig = field(default_factory=ValidConfig)
    steps: Count = 1000
    """Optimizer steps."""
    epochs: CountOrNone = 0
    """Passes over the training manifest instead of `steps`, which are then counted from it (0: as `steps` says)."""
    batch_size: Annotated[int, Range(2, 1 << 24)] = 32
    """Global batch: pairs contrasted with each other, over all processes. With `data.batch_seconds`, at most these."""
    chunk_size: SizeOrNone | Literal["auto"] = "auto"
    """Gradient caching: clips that go through the towers at once, so that the batch need not fit (0: no caching). auto
    takes what the device's memory allows, and halves the chunk, never the batch, whenever it runs out."""
    accumulate: Size = 1
    """Batches whose gradients are averaged into one step; unlike caching, each is contrasted within itself only."""
    seed: Annotated[int, Range(0, (1 << 63) - 1)] = 0
    """Seed of weights, data order, crops, captions and dropout."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast of the towers; auto is bf16 on a GPU and fp32 on a CPU."""
    matmul_precision: Literal["highest", "high"] = "high"
    """Matrix products that stay in float32 on a GPU: high is TF32, highest full precision."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the layers of the towers (torch.compile): faster steps after a start of a minute. auto does on a GPU."""
    checkpoint_activations: Literal["auto", "on", "off"] = "auto"
    """Compute the layers of the towers again in the backward pass: less memory, about a quarter more work. auto does
    on a GPU, where that costs less than the gradient caching that would be needed instead."""
    shard: bool = False
    """Split the towers' weights, gradients and optimizer state over the processes (FSDP2). During a step of several
    backward passes (gradient caching, accumulation) each process has their weights and gradients whole."""
    device: str = "auto"
    """cuda, cpu or auto."""
    threads: Annotated[int, Range(0, 1024)] = 0
    """CPU threads per process (0: as torch chooses, which is by OMP_NUM_THREADS or all cores; without a GPU less the
    cores that other processes keep busy when the run begins). Another number rounds sums in another order, so a resumed
    run keeps its number."""
    init_from: str | None = None
    """Model folder whose weights training starts from."""
    resume: bool = False
    """Continue from the newest complete checkpoint of the run folder, if there is one."""
    log_every: Count = 10
    """Steps between lines of the log."""
    valid_every: CountOrNone = 0
    """Steps between validations (0: only at the end)."""
    save_every: Count = 500
    """Steps between checkpoints; one is always written at the end."""
    keep: Count = 2
    """Newest checkpoints kept."""
    max_bad_steps: Count = 10
    """Steps in a row with a non-finite loss or gradient, each of them skipped, before the run stops."""
    profile: bool = False
    """Write a trace of three steps (the sixth to eighth of this start) to the run folder, with its longest kernels."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs tensorboard)."""
    wandb: bool = False
    """Also log to Weights & Biases (needs wandb)."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def uses_bf16(self, device_type: str) -> bool:
        """Whether the towers run under bf16 autocast on devices of this type."""
        return self.precision == "bf16" or (self.precision == "auto" and device_type == "cuda")

    def compiles(self, device_type: str) -> bool:
        """Whether the towers' layers are compiled on devices of this type."""
        return self.compile == "on" or (self.compile == "auto" and device_type == "cuda")

    def check(self, processes: int = 1) -> None:
        """Raise ConfigError on the first impossible value or combination, naming the flag.

        Args:
            processes: that the batch is shared by.
        """
        if (wrong := first_wrong(self)) is not None:
            raise ConfigError(wrong.as_flag)
        self.model.check("--model.")
        data, loss, optimizer = self.data, self.loss, self.optimizer
        teacher, fine, valid = loss.teacher, data.fine_characters, self.valid
        guide, widths, weights = loss.guide_margin, loss.matryoshka, loss.matryoshka_weights
        kinds = {"guide-margin": guide is not None, "debias": loss.debias != 0, "queue-size": loss.queue_size != 0}
        kinds["matryoshka"] = bool(widths)
        of_info_nce = [f"--loss.{name}" for name, given in kinds.items() if given]
        rules = [
            (bool(data.train) or data.demo_clips > 0, "--data.train is empty: name at least one training manifest"),
            (
                fine is None or (len(fine) == 2 and fine[0] <= fine[1]),
                f"--data.fine-characters is {fine}; give the shortest and the longest length",
            ),
            (
                bool(data.frozen_cache),
                "--data.frozen-cache is empty; name a folder, or give auto or off",
            ),
            (
                data.max_seconds is None or data.max_seconds >= data.min_seconds,
                f"--data.min-seconds is {data.min_seconds} and --data.max-seconds {data.max_seconds}; give a longest "
                "length that is not below the shortest",
            ),
            (
                data.batch_seconds is None or data.bucket_by_length,
                "--data.batch-seconds needs --data.bucket-by-length",
            ),
            (
                data.tag_column is not None or (data.balance == "none" and loss.tag_weight == 0),
                "--data.balance and --loss.tag-weight need --data.tag-column, such as intrinsic_tags",
            ),
            (
                optimizer.kind == "adamw" or not self.shard,
                "--optimizer.kind scaled-adam goes by the size of whole parameters: leave --shard out",
            ),
            (
                optimizer.schedule != "eden" or optimizer.final_share == 0,
                "--optimizer.final-share is the learning rate at the last step, which --optimizer.schedule eden does "
                "not know: leave it out",
            ),
            (
                optimizer.unfreeze_step == 0 or not self.shard,
                "--optimizer.unfreeze-step changes what trains, which sharded towers cannot: leave --shard out",
            ),
            (
                optimizer.average_every == 0 or optimizer.ema_decay == 0,
                "--optimizer.average-every and --optimizer.ema-decay are two averages of the weights: leave out one",
            ),
            (
                loss.kind == "info_nce" or loss.label_smoothing == 0,
                "--loss.label-smoothing belongs to info_nce; the sigmoid loss has none",
            ),
            (
                (loss.local_weight > 0) == (data.captions == "perturbed"),
                "--data.captions perturbed and --loss.local-weight (0.2 as published) belong together: give both, or "
                "neither",
            ),
            (
                teacher is None or loss.kind == "info_nce",
                "--loss.teacher belongs to info_nce; the sigmoid loss has no distribution to learn from",
            ),
            (
                teacher != "init" or self.init_from is not None,
                "--loss.teacher init is the model that training starts from: name it with --init-from",
            ),
            (
                teacher != "ema" or (optimizer.ema_decay > 0 and not self.shard),
                "--loss.teacher ema is the moving average of whole weights: it needs --optimizer.ema-decay, such as "
                "0.999, and no --shard",
            ),
            (
                loss.kind == "info_nce" or not of_info_nce,
                f"{' and '.join(of_info_nce)} belong to info_nce; the sigmoid loss compares every pair by itself",
            ),
            (
                guide is None or (teacher is not None and loss.teacher_weight == 0),
                "--loss.guide-margin goes by the cosines of a --loss.teacher that is not also learned from: give "
                "--loss.teacher and --loss.teacher-weight 0",
            ),
            (
                guide is None or (loss.label_smoothing == 0 and loss.debias == 0 and loss.queue_size == 0),
                "--loss.guide-margin leaves columns out, which --loss.label-smoothing and --loss.debias count on, and "
                "the teacher has not seen those of a --loss.queue-size: leave out one of them",
            ),
            (
                guide is None or not (loss.guide_relative and guide >= 1),
                f"--loss.guide-margin is {guide}; with --loss.guide-relative it must be below 1",
            ),
            (
                guide is not None or not loss.guide_relative,
                "--loss.guide-relative says how --loss.guide-margin is meant; give that too",
            ),
            (
                loss.queue_after == 0 or loss.queue_size > 0,
                f"--loss.queue-after is {loss.queue_after}; it needs --loss.queue-size",
            ),
            (
                len(set(widths)) == len(widths),
                f"--loss.matryoshka is {widths}; give each width once",
            ),
            (
                weights is None or len(weights) == len(widths),
                f"--loss.matryoshka-weights is {weights}; give a number for each of {widths}",
            ),
            (
                valid.best is None or bool(data.valid) or data.demo_clips > 0,
                "--valid.best compares validations: name a manifest for them with --data.valid",
            ),
            (
                valid.patience == 0 or (valid.best is not None and self.valid_every > 0),
                "--valid.patience needs --valid.best, the figure that has to get better, and --valid-every",
            ),
            (
                self.batch_size % processes == 0,
                f"--batch-size {self.batch_size} cannot be shared equally by {processes} processes",
            ),
        ]
        for holds, message in rules:
            if not holds:
                raise ConfigError(message)


def load_config(path: str | Path, defaults: TrainConfig) -> TrainConfig:
    """Lay a YAML or TOML file over a recipe's defaults; unknown keys and wrong types are errors that name the key."""
    text = read_text(path, ConfigError)
    toml = Path(path).suffix == ".toml"
    values = parse_toml(text, str(path), ConfigError) if toml else parse_yaml(text, str(path), ConfigError) or {}
    try:
        return read_dataclass(TrainConfig, _overlay(defaults, values))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _overlay(base: Any, values: Any) -> Any:
    """Plain data of `base` with `values` in place of its fields; a free-form mapping is replaced as a whole."""
    if not (is_dataclass(base) and isinstance(values, dict)):
        return values
    known = {member.name: getattr(base, member.name) for member in fields(base)}
    plain = {name: asdict(value) if is_dataclass(value) else value for name, value in known.items()}  # type: ignore[arg-type]
    return {**plain, **{name: _overlay(known.get(name), value) for name, value in values.items()}}
