"""ParaSpeechCLAP's reference implementation, driven from a checkout that the user names, and our model of its shape.

Its own code runs: the model class, the loss, the optimizer set-up and `run_training_step` of `scripts/train.py`, with
gradient checkpointing and the statistics of intermediate tensors as released. Three things are changed, and no others:

- `from_pretrained` of transformers' auto classes builds the model from a configuration, with random weights, since a
  benchmark of speed and arithmetic needs no download;
- packages that the step does not use (audtorch, datasets, hydra, omegaconf, wandb) are replaced by empty ones where
  they are not installed, and what the step hands to `wandb.log` is dropped;
- `statistics=False` replaces its `debug_tensor`, which reads six numbers off the device for every tensor it gets,
  whatever the log level. The other six host reads of a step stay.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench.run import Size
from fastclap import CLAP
from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.data import Batch
from fastclap.errors import ConfigError
from fastclap.models.tokenizer import Tokenizer
from fastclap.train.config import LossConfig, OptimizerConfig

LEARNING_RATE = 1e-5
OPTIONAL_PACKAGES = ("audtorch", "datasets", "hydra", "hydra.core", "hydra.core.hydra_config", "omegaconf", "wandb")


# ---------------------------------------------------------------------------------------------------------------------
# models


def without_dropout(size: Size) -> Size:
    """The same towers without dropout and SpecAugment, so that two implementations can be compared step by step."""
    wavlm = {name: 0.0 if name.endswith("dropout") else value for name, value in size.wavlm.items()}
    text = {**size.xlm_roberta, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return Size({**wavlm, "mask_time_prob": 0.0}, text, size.dim)


def clap_config(size: Size, head_dropout: float = 0.5) -> CLAPConfig:
    """The reference's model as a fastclap configuration; parameter names and shapes are the same."""
    return CLAPConfig(
        audio=AudioTowerConfig(kind="wav2vec2", hf_config={"model_type": "wavlm", **size.wavlm}),
        text=TextTowerConfig(
            kind="hf", hf_config={"model_type": "xlm-roberta", **size.xlm_roberta}, pooling="cls", max_tokens=64
        ),
        head=HeadConfig(kind="paraspeechclap", dim=size.dim, dropout=head_dropout),
    )


def parity_loss() -> LossConfig:
    """The reference's loss: every other caption of the batch is a negative, equal ones too."""
    return LossConfig(share_equal_captions=False)


def parity_optimizer(learning_rate: float = LEARNING_RATE) -> OptimizerConfig:
    """The reference's optimizer: Adam (AdamW without decay), its default betas, no schedule and no clipping."""
    return OptimizerConfig(
        learning_rate=learning_rate,
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.999,
        warmup_steps=0,
        schedule="constant",
        clip_norm=0.0,
    )


# ---------------------------------------------------------------------------------------------------------------------
# the reference


class Reference:
    """The reference's model, loss and optimizer, built from configurations, and its training step.

    Args:
        checkout: folder of the reference's repository.
        size: the towers.
        device: where the model goes.
        head_dropout: of the projection heads, 0.5 as released.
        learning_rate: of its Adam.

    Raises:
        ConfigError: `checkout` is not a checkout of the reference.
    """

    def __init__(
        self,
        checkout: Path,
        size: Size,
        device: torch.device,
        *,
        head_dropout: float = 0.5,
        learning_rate: float = LEARNING_RATE,
    ) -> None:
        self.train = load(checkout)
        self.device = device
        with from_configuration(size), torch.device(device):  # random weights are drawn on the device
            model = self.train.CLAP("wavlm", "xlm-roberta", size.dim, head_dropout)
        self.train.set_model_parameter_requires_grad(model, rank=0)
        self.model: nn.Module = model.to(device).train()
        self.config = types.SimpleNamespace(
            hparams=types.SimpleNamespace(learning_rate=learning_rate), multitask={"enable_classification": False}
        )
        self.optimizer, self.criterion = self.train.setup_optimizer_and_criterion(self.config, model.parameters())

    def step(self, batch: dict[str, Any], *, statistics: bool = True, autocast: torch.dtype | None = None) -> float:
        """One call of its `run_training_step` on a batch made by `collated`; returns the loss.

        Args:
            batch: on the host; the step copies it to the device.
            statistics: leave its statistics of intermediate tensors on.
            autocast: run the model's forward pass under autocast to this type.
        """

        def model(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(self.device.type, dtype=autocast):
                return self.model(*args, **kwargs)

        with deterministic_cudnn(), contextlib.nullcontext() if statistics else _without_statistics():
            return self.train.run_training_step(
                model=self.model if autocast is None else model,
                batch=batch,
                device=self.device,
                criterion=self.criterion,
                optimizer=self.optimizer,
                cfg=self.config,
                global_step=1,
                epoch=1,
                rank=0,
                world_size=1,
                train_dataloader_len=1,
                num_train_batches_in_epoch_local=1,
            )


def load(checkout: Path, name: str = "train") -> types.ModuleType:
    """One of the reference's scripts, by default `scripts/train.py`, as a module.

    Raises:
        ConfigError: there is none under `checkout`.
    """
    script = checkout / "scripts" / f"{name}.py"
    if not script.is_file() or not (checkout / "paraspeechclap").is_dir():
        raise ConfigError(
            f"{checkout}: no checkout of ParaSpeechCLAP (scripts/{name}.py and paraspeechclap/ are missing)"
        )
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))
    name = f"paraspeechclap_{name}_script"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with without_packages(*OPTIONAL_PACKAGES):
        spec.loader.exec_module(module)
    logging.getLogger("paraspeechclap").setLevel(logging.WARNING)  # it describes every module that it builds
    module.wandb = _Empty("wandb")  # type: ignore[attr-defined]  # the real one wants a run
    sys.modules[name] = module
    return module


class _Nothing:
    """A class, decorator or function that does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __call__(self, function: Any) -> Any:
        return function


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


@contextlib.contextmanager
def without_packages(*names: str) -> Iterator[None]:
    """Within it, those of these packages that are not installed can be imported, and do nothing."""
    added = [name for name in names if importlib.util.find_spec(name.split(".")[0]) is None]
    sys.modules.update({name: _Empty(name) for name in added})
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


@contextlib.contextmanager
def from_configuration(size: Size) -> Iterator[None]:
    """Within it, transformers builds "wavlm" and "xlm-roberta" of this size with random weights instead of loading."""
    from transformers import AutoConfig, AutoModel

    def config(name: str) -> Any:
        return AutoConfig.for_model(name, **{"wavlm": size.wavlm, "xlm-roberta": size.xlm_roberta}[name])

    def model(name: str, config: Any = None) -> Any:
        return AutoModel.from_config(AutoConfig.from_pretrained(name) if config is None else config)

    with (
        mock.patch.object(AutoConfig, "from_pretrained", config),
        mock.patch.object(AutoModel, "from_pretrained", model),
    ):
        yield


@contextlib.contextmanager
def deterministic_cudnn(wanted: bool = True) -> Iterator[None]:
    """Whether cuDNN is kept to deterministic algorithms, as the reference's `setup_seed` asks for."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@contextlib.contextmanager
def _without_statistics() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in ("paraspeechclap.model", "paraspeechclap.loss"):
            module = importlib.import_module(name)
            stack.enter_context(mock.patch.object(module, "debug_tensor", lambda *_, **__: None))
        yield


# ---------------------------------------------------------------------------------------------------------------------
# batches


def collated(batch: Batch, tokens: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A fastclap batch as the reference's `collate_fn` hands it over.

    Args:
        batch: with the whole files' mean and std, by which the reference's feature extractor normalises before the
            crop is taken.
        tokens: of all captions.
        dtype: of the waveform.
    """
    assert batch.mean is not None and batch.std is not None
    wave = batch.audio.to(dtype) / 32768
    mean, std = batch.mean.to(dtype)[:, None], batch.std.to(dtype)[:, None]
    wave = wave.sub_(mean).div_((std.square() + 1e-7).sqrt())
    mask = torch.arange(wave.shape[1]) < batch.lengths[:, None]
    return {
        "audio": wave.masked_fill_(~mask, 0.0),
        "audio_attention_mask": mask.long(),
        "audio_lengths": batch.lengths,
        "text_tokens": tokens,
        "audio_path": [""] * len(batch.captions),
    }


def build_ours(
    size: Size, tokenizer: Tokenizer | None, *, head_dropout: float = 0.5, device: torch.device | str = "cpu"
) -> CLAP:
    """Our model of the same architecture, in training mode, with random weights drawn on the device."""
    with torch.device(device):
        model = CLAP(clap_config(size, head_dropout), tokenizer)
    return model.to(device)  # what was not made by a factory function of torch


def commit_of(folder: Path) -> str | None:
    """The commit that a file COMMIT in the folder names, which a copy has (`bench.gpu_kit`), or the one that git knows.

    git looks for a repository that has its root in or above the folder. None if it finds none or is not installed.
    """
    if (folder / "COMMIT").is_file():
        return (folder / "COMMIT").read_text().strip()
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:
        return None
