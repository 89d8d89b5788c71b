"""The dual encoder: training-time encoders, embeddings for users, and a folder format that is safe to read.

``encode_audio`` and ``encode_text`` are what the training step calls: padded batches in, unnormalised embeddings out,
no host sync. ``embed_audio`` and ``embed_text`` are what a user calls: files, arrays or strings in, unit vectors out in
the order given; they sort by length so that little is computed on padding, and leave the model's mode as it was. Models
are saved as safetensors only, and torch files are read without unpickling anything but tensors and numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from fastclap.config import FORMAT_VERSION, CLAPConfig
from fastclap.errors import ConfigError, DataError, ModelError, required
from fastclap.files import fsync
from fastclap.heads import build_head
from fastclap.model_card import card_of, published_at
from fastclap.products import fast_products
from fastclap.tokenizer import TOKENIZER_FILE, Tokenizer, as_tokenizer
from fastclap.towers import as_float, build_audio_tower, build_text_tower

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
_MODEL_FILES = {CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, CARD_FILE}


class DualEncoder(nn.Module):
    """Embeddings of clips and captions for users, on top of an encoder of padded batches."""

    @property
    def sampling_rate(self) -> int:
        """Rate in Hz of the waveforms that :meth:`encode_audio` takes."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def encode_audio(
        self,
        audio: Tensor,  # int16 or float [B, T]
        lengths: Tensor | None = None,  # [B]
        mean: Tensor | None = None,  # [B]
        std: Tensor | None = None,  # [B]
        host_lengths: Sequence[int] | None = None,
    ) -> Tensor:  # [B, D]
        """Embeddings of a padded batch, not normalised."""
        raise NotImplementedError

    def embed_audio(
        self,
        audio: Sequence[Any] | np.ndarray | Tensor,
        lengths: Sequence[int] | Tensor | None = None,
        *,
        sampling_rate: int = 16000,
        batch_size: int = 32,
    ) -> Tensor:
        """Unit vectors of clips, in the order given.

        Args:
            audio: a list of paths and of 1-D arrays or tensors (int16, or float in ±1), or one padded [n, T] tensor.
            lengths: valid samples of each row, for the padded form.
            sampling_rate: of arrays and tensors, in Hz; resampled to the model's rate. Files know their own.
            batch_size: clips encoded at a time; some towers take one at a time on a CPU, which is faster there.

        Returns:
            float32 [n, D] on the model's device.

        Raises:
            DataError: nothing to embed, or a clip that is empty, not 1-D, not finite or not readable; it is named.
        """
        clips = _as_clips(audio, lengths)
        ratio = self.sampling_rate / sampling_rate
        sizes = [_num_samples(index, clip, self.sampling_rate, ratio) for index, clip in enumerate(clips)]
        order = sorted(range(len(clips)), key=sizes.__getitem__)
        chunks = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        with self._inference():
            rows: dict[int, Tensor] = {}
            for chunk in chunks:
                waves = {index: _waveform(index, clips[index], self.sampling_rate, sampling_rate) for index in chunk}
                for group in self._batches(waves):
                    batch, sizes_of_group = _pad([waves[index] for index in group], self.device)
                    host_lengths = [len(waves[index]) for index in group]
                    encoded = self.encode_audio(batch, sizes_of_group, host_lengths=host_lengths)
                    rows.update(zip(group, encoded, strict=True))
            embeddings = F.normalize(torch.stack([rows[index] for index in range(len(clips))]).float(), dim=-1)
        return embeddings.clone()  # outside of inference mode, so that the result can enter a graph

    def _batches(self, waves: Mapping[int, Tensor]) -> list[list[int]]:
        """Keys of the clips that are padded to one batch."""
        return [list(waves)]

    def embed_text(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Unit vectors of captions, in the order given: float32 [n, D] on the model's device."""
        raise NotImplementedError

    def similarity(
        self, audio: Sequence[Any] | np.ndarray | Tensor, texts: Sequence[str], *, sampling_rate: int = 16000
    ) -> Tensor:
        """Cosines [n, m] between clips and captions; arguments and errors as for the two embedding methods."""
        return self.embed_audio(audio, sampling_rate=sampling_rate) @ self.embed_text(texts).T

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            # weights that a parametrization computes, such as WavLM's positional convolution, are computed once
            with torch.inference_mode(), fast_products(self.device), parametrize.cached():
                yield
        finally:
            for module, training in modes:
                module.training = training


class CLAP(DualEncoder):
    """Contrastive language-audio model: two towers, two projection heads, a learned logit scale and maybe a bias.

    Args:
        config: architecture; copied, and completed with the transformers configuration of the towers that have one.
        tokenizer: of the text tower; by default that of ``config.text.pretrained``. Without one the model takes token
            ids only.
        load_pretrained: start the towers from ``config.*.pretrained``; False leaves them random, for weights that are
            about to be read.

    Raises:
        ConfigError: the configuration is impossible, or the tokenizer has more ids than the text tower.
        ModelError: pretrained weights cannot be read.
    """

    logit_bias: nn.Parameter | None  # added to the logits of the sigmoid loss

    def __init__(self, config: CLAPConfig, tokenizer: Tokenizer | None = None, *, load_pretrained: bool = True) -> None:
        super().__init__()
        if not 1 <= config.init_logit_scale <= config.max_logit_scale:
            raise ConfigError(
                f"init_logit_scale must lie between 1 and max_logit_scale = {config.max_logit_scale}, "
                f"not at {config.init_logit_scale}"
            )
        self.audio_branch = build_audio_tower(config.audio, load_pretrained)
        self.text_branch = build_text_tower(config.text, load_pretrained)
        self.audio_projection = build_head(config.head, self.audio_branch.width)
        self.text_projection = build_head(config.head, self.text_branch.width)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(config.init_logit_scale)))
        bias = config.init_logit_bias
        self.register_parameter("logit_bias", None if bias is None else nn.Parameter(torch.tensor(float(bias))))
        self.config = dataclasses.replace(
            config,
            audio=dataclasses.replace(config.audio, hf_config=self.audio_branch.hf_config),
            text=dataclasses.replace(config.text, hf_config=self.text_branch.hf_config),
        )
        if tokenizer is None and config.text.kind == "hf" and config.text.pretrained and load_pretrained:
            tokenizer = Tokenizer.from_pretrained(config.text.pretrained)
        if tokenizer is not None and tokenizer.vocab_size > self.text_branch.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} ids but the text tower only {self.text_branch.vocab_size}"
            )
        self.tokenizer = tokenizer
        self.card: str | None = None  # README.md that the model came with
        for branch, frozen in ((self.audio_branch, config.audio.freeze), (self.text_branch, config.text.freeze)):
            if frozen:
                branch.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> CLAP:
        """As ``nn.Module.train``, except that a frozen tower stays in evaluation mode."""
        super().train(mode)
        if self.config.audio.freeze:
            self.audio_branch.eval()
        if self.config.text.freeze:
            self.text_branch.eval()
        return self

    # -- training ------------------------------------------------------------------------------------------------------

    @property
    def sampling_rate(self) -> int:
        """Rate in Hz of the waveforms that :meth:`encode_audio` takes."""
        return self.audio_branch.sampling_rate

    @property
    def logit_scale(self) -> Tensor:
        """Multiplier of the cosines, exp(log_logit_scale); 0-d, differentiable."""
        return self.log_logit_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Clamp the multiplier to between 1 and ``config.max_logit_scale``, on the device."""
        self.log_logit_scale.clamp_(0.0, math.log(self.config.max_logit_scale))

    def encode_audio(
        self,
        audio: Tensor,  # int16 or float [B, T]
        lengths: Tensor | None = None,  # [B]
        mean: Tensor | None = None,  # [B]
        std: Tensor | None = None,  # [B]
        host_lengths: Sequence[int] | None = None,
    ) -> Tensor:  # [B, D]
        """Embeddings of a padded batch, not normalised.

        Args:
            audio: waveforms at ``sampling_rate``, full scale ±32768 (int16) or ±1 (float); padding may hold anything.
            lengths: valid samples of each clip; all when None.
            mean: whole-file mean of each clip, full scale 1. Waveform towers normalise by it; without it by the clip's.
            std: whole-file standard deviation, likewise.
            host_lengths: the numbers in ``lengths``, for the host. They change nothing but the speed: a tower that
                knows the shapes beforehand computes next to nothing on padding, without waiting for the device.

        Raises:
            ValueError: ``host_lengths`` are not those of the batch.
        """
        with _no_grad_if(self.config.audio.freeze):
            pooled = self.audio_branch(audio, lengths, mean, std, host_lengths)
        return self.audio_projection(pooled)

    def encode_text(
        self,
        input_ids: Tensor,  # int64 [B, tokens]
        attention_mask: Tensor,  # [B, tokens], 1 on tokens
        token_counts: Sequence[int] | None = None,
    ) -> Tensor:  # [B, D]
        """Embeddings of tokenized captions, not normalised.

        Args:
            input_ids: as of :meth:`tokenize`, padded on the right.
            attention_mask: likewise.
            token_counts: row sums of ``attention_mask``, for the host; as ``host_lengths`` of :meth:`encode_audio`.

        Raises:
            ValueError: ``token_counts`` are not those of the batch.
        """
        with _no_grad_if(self.config.text.freeze):
            pooled = self.text_branch(input_ids, attention_mask, token_counts)
        return self.text_projection(pooled)

    def forward(
        self,
        audio: Tensor,  # int16 or float [B, T]
        input_ids: Tensor,  # int64 [M, tokens]
        attention_mask: Tensor,  # [M, tokens]
        lengths: Tensor | None = None,  # [B]
        mean: Tensor | None = None,  # [B]
        std: Tensor | None = None,  # [B]
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, D], [M, D], 0-d
        """Both encoders and the logit scale in one call, for wrappers of ``forward`` (DistributedDataParallel)."""
        return (
            self.encode_audio(audio, lengths, mean, std),
            self.encode_text(input_ids, attention_mask),
            self.logit_scale,
        )

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (CPU, int64 [n, tokens]) of captions, cut at ``config.text.max_tokens``.

        Raises:
            ModelError: the model has no tokenizer.
            DataError: no texts, or one that is not a string.
        """
        if self.tokenizer is None:
            raise ModelError(
                f"this model has no tokenizer; pass one to CLAP(...) or add {TOKENIZER_FILE} to its folder"
            )
        return self.tokenizer(texts, self.config.text.max_tokens)

    # -- embeddings ----------------------------------------------------------------------------------------------------

    def embed_text(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Unit vectors of captions, in the order given.

        Returns:
            float32 [n, D] on the model's device.

        Raises:
            ModelError: the model has no tokenizer.
            DataError: no texts, or one that is not a string or is blank; it is named.
        """
        tokens = self.tokenize(texts)
        for index, text in enumerate(texts):
            if not text.strip():
                raise DataError(f"text {index} is blank")
        sizes = tokens["attention_mask"].sum(1)
        order = sizes.argsort(stable=True)
        with self._inference():
            rows = []
            for chunk in order.split(batch_size):
                longest = int(sizes[chunk].max())
                batch = {name: value[chunk, :longest].to(self.device) for name, value in tokens.items()}
                rows.append(self.encode_text(**batch, token_counts=sizes[chunk].tolist()))
            embeddings = F.normalize(torch.cat(rows)[order.argsort().to(self.device)].float(), dim=-1)
        return embeddings.clone()

    def _batches(self, waves: Mapping[int, Tensor]) -> list[list[int]]:
        if self.audio_branch.single_on_cpu and self.device.type == "cpu":
            return [[index] for index in waves]
        if not self.audio_branch.equal_lengths_only:
            return [list(waves)]
        groups: dict[int, list[int]] = {}
        for index, wave in waves.items():
            groups.setdefault(len(wave), []).append(index)
        return list(groups.values())

    # -- files ---------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        run: str | os.PathLike[str] | None = None,
        license: str | None = None,
    ) -> None:
        """Write ``config.json``, ``model.safetensors``, ``tokenizer.json`` and the model card ``README.md``.

        A crash leaves no half of them.

        The files are written and fsynced in a temporary folder beside ``folder`` that is then renamed to it. An earlier
        export of the same name is replaced; a folder with other files in it is not touched.

        Args:
            folder: where to.
            state_dict: the weights to write, by default the model's own (of sharded towers, the caller gathers them).
            run: run folder whose training data and figures the model card tells. Without it the card that the model was
                loaded with is kept, or one without them is written.
            license: licence of the weights for the model card, by its name on the hub, such as apache-2.0.

        Raises:
            ModelError: ``folder`` holds files that are not a model's.
            OSError: the disk is full or the place is not writable; nothing is left behind.
        """
        target = Path(folder)
        names = {item.name for item in target.iterdir()} if target.is_dir() else set()
        # without a model beside it, a README is somebody's own
        foreign = names - (_MODEL_FILES if CONFIG_FILE in names else _MODEL_FILES - {CARD_FILE})
        if foreign or (target.exists() and not target.is_dir()):
            what = f"holds other files ({', '.join(sorted(foreign)[:3])})" if foreign else "is a file"
            raise ModelError(f"{target} {what}; save the model to a folder of its own")
        target.parent.mkdir(parents=True, exist_ok=True)
        # fixed names, so that what a killed save has left behind goes with the next one
        temporary, old = (target.parent / f".{target.name.lstrip('.')}.{end}" for end in ("tmp", "old"))
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            self._write(temporary, self.state_dict() if state_dict is None else state_dict)
            (temporary / CARD_FILE).write_text(card_of(self, run, license), encoding="utf-8")
            for item in (*temporary.iterdir(), temporary):
                fsync(item)
            if target.is_dir():
                shutil.rmtree(old, ignore_errors=True)
                target.replace(old)
            temporary.replace(target)
            fsync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _write(self, folder: Path, state_dict: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        config = {"format_version": FORMAT_VERSION, **self.config.to_dict()}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        if self.tokenizer is not None:
            self.tokenizer.save(folder / TOKENIZER_FILE)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        run: str | os.PathLike[str] | None = None,
        license: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a fastclap model",
    ) -> str:
        """Upload the model's folder to the Hugging Face hub, whence :meth:`from_pretrained` reads it by ``repo_id``.

        Args:
            repo_id: ``owner/name``; made if it does not exist.
            run, license: for the model card, as for :meth:`save_pretrained`.
            private: whether a new repository is; the account's default when None.
            token: of the hub; that of ``hf auth login`` when None.
            commit_message: of the upload.

        Returns:
            Address of the commit.

        Raises:
            ModelError: ``repo_id`` is malformed, or the hub refused.
        """
        from huggingface_hub import HfApi

        if not _is_hub_id(repo_id):
            raise ModelError(f"{repo_id!r} is not a hub id; give owner/name")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            self.save_pretrained(folder, run=run, license=license)
            card = (folder / CARD_FILE).read_text(encoding="utf-8")
            (folder / CARD_FILE).write_text(published_at(card, repo_id), encoding="utf-8")
            try:
                api = HfApi(token=token)
                api.create_repo(repo_id, private=private, exist_ok=True)
                commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
            except Exception as error:  # every failure of the network, the hub or the account ends here
                raise ModelError(
                    f"{repo_id}: could not be uploaded ({error}); log in with `hf auth login` or pass a token that may "
                    "write there"
                ) from error
        return str(commit.commit_url)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    ) -> CLAP:
        """Read a model in evaluation mode.

        Args:
            path: an exported folder, a run folder (its newest checkpoint is read), a hub id, or a checkpoint of another
                code (see :func:`fastclap.checkpoints.read_checkpoint`): a ParaSpeechCLAP ``.pth.tar``, a LAION-CLAP
                ``.pt``, or the folder of a transformers ``ClapModel``.
            device: where to put it.
            dtype: of the parameters; float32 by default.
            tokenizer: folder or hub id of a tokenizer, or one that is loaded. By default the model's own; checkpoints
                of other codes hold none, and theirs comes from the hub.

        Raises:
            ModelError: there is no model, a file is damaged, or the weights are those of another architecture.
        """
        folder = find_model(path)
        if is_foreign(folder):
            from fastclap.checkpoints import read_checkpoint

            return read_checkpoint(folder, tokenizer=tokenizer).to(device=device, dtype=dtype)
        config = _read_config(folder / CONFIG_FILE)
        if tokenizer is not None:
            tokenizer = as_tokenizer(tokenizer)
        elif (folder / TOKENIZER_FILE).exists():
            tokenizer = Tokenizer.load(folder)
        weights = load_state_dict_file(folder / WEIGHTS_FILE)
        try:
            with without_initialisation():
                model = cls(config, tokenizer, load_pretrained=False)
        except ConfigError as error:
            raise ModelError(f"{folder / CONFIG_FILE}: {error}") from error
        check_weights(model, weights, folder / WEIGHTS_FILE)
        model.load_state_dict(weights)
        card = folder / CARD_FILE
        model.card = card.read_text(encoding="utf-8") if card.is_file() else None
        return model.to(device=device, dtype=dtype).eval()


@contextlib.contextmanager
def without_initialisation() -> Iterator[None]:
    """Parameters made within keep what the memory holds, until weights are read into all of them.

    Drawing 600 million random numbers to overwrite them takes ten times as long as reading the weights. What is left of
    the drawing does not advance torch's generator.
    """
    with torch.random.fork_rng(devices=[]), _WithoutInitialisation():
        yield


class _WithoutInitialisation(TorchFunctionMode):
    # by name: tensors' methods, the functions of torch.nn.init, and those that transformers puts in their place
    _DRAWS = frozenset(
        f"{name}_"
        for name in ("normal", "uniform", "trunc_normal", "kaiming_normal", "kaiming_uniform", "xavier_uniform")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(target, nn.Parameter) and getattr(func, "__name__", None) in self._DRAWS:
            return target
        return func(*args, **kwargs)


def load_state_dict_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file or of a file that ``torch.save`` wrote, on the CPU.

    A torch file is read with ``weights_only=True``: a pickle that would run code is refused, and none of it is run; of
    NumPy, plain numbers are let through, because training codes keep a loss or an epoch beside the weights. A state
    dict under the key ``state_dict``, ``model`` or ``model_state_dict`` is taken out of its wrapping.

    Raises:
        ModelError: the file is missing, damaged, not a state dict, or a pickle that does more than hold tensors.
    """
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            raise ModelError(f"{path}: truncated or damaged ({error}; {size} bytes); copy or save it again") from error
    try:
        with torch.serialization.safe_globals(_numpy_numbers()):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: refused, because it is damaged or its pickle asks to run code instead of holding tensors only; "
            "nothing of it was run. Ask its author for a safetensors file"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: not a readable torch file ({error}); copy or save it again") from error
    for wrapping in ("state_dict", "model", "model_state_dict"):
        if isinstance(data, Mapping) and isinstance(data.get(wrapping), Mapping):
            data = data[wrapping]
    if not isinstance(data, Mapping) or not all(isinstance(value, Tensor) for value in data.values()):
        raise ModelError(f"{path}: holds no state dict (a mapping from names to tensors)")
    return dict(data)


def _numpy_numbers() -> list[Any]:
    """What the unpickling of a NumPy number calls: it makes a number of bytes and nothing else."""
    scalar = np.float64(0).__reduce__()[0]  # NumPy 1 and 2 pickle it under different names
    kinds = [type(np.dtype(kind)) for kind in ("?", "i4", "i8", "f4", "f8")]
    return [np.dtype, *kinds, *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]


# ---------------------------------------------------------------------------------------------------------------------
# clips


def _as_clips(audio: Sequence[Any] | np.ndarray | Tensor, lengths: Sequence[int] | Tensor | None) -> list[Any]:
    if isinstance(audio, (str, os.PathLike)):
        raise DataError(f"embed_audio takes a list of clips; for one file write [{str(audio)!r}]")
    if isinstance(audio, (Tensor, np.ndarray)):
        if audio.ndim != 2:
            raise DataError(f"a padded batch has the shape [clips, samples], not {tuple(audio.shape)}")
        sizes = [audio.shape[1]] * len(audio) if lengths is None else [int(length) for length in lengths]
        if len(sizes) != len(audio):
            raise DataError(f"{len(sizes)} lengths for {len(audio)} clips")
        for index, size in enumerate(sizes):
            if not 0 <= size <= audio.shape[1]:
                raise DataError(f"length {index} is {size}, but the batch is {audio.shape[1]} samples long")
        clips = [row[:size] for row, size in zip(audio, sizes, strict=True)]
    elif lengths is not None:
        raise DataError("lengths go with a padded [clips, samples] batch; the clips of a list know their own")
    else:
        clips = list(audio)
    if not clips:
        raise DataError("there is no clip to embed")
    return clips


def _num_samples(index: int, clip: Any, target_rate: int, ratio: float) -> float:
    """Length at the model's rate (of a file, by its header), after the checks that need no decoding."""
    if isinstance(clip, (str, os.PathLike)):
        from fastclap.audio import audio_info

        with _naming(index):
            return audio_info(clip).duration * target_rate
    if not isinstance(clip, (Tensor, np.ndarray)):
        raise DataError(f"clip {index} is {type(clip).__name__}; give a path, an array or a tensor")
    if clip.ndim != 1:
        raise DataError(f"clip {index} has the shape {tuple(clip.shape)}; give mono 1-D audio (average the channels)")
    if len(clip) == 0:
        raise DataError(f"clip {index} is empty")
    return len(clip) * ratio


def _waveform(index: int, clip: Any, target_rate: int, sampling_rate: int) -> Tensor:
    """One clip as an int16 or float32 1-D tensor at the model's rate."""
    if isinstance(clip, (str, os.PathLike)):
        from fastclap.audio import read_audio

        with _naming(index):
            return torch.from_numpy(read_audio(clip, target_rate))
    wave = clip.detach() if isinstance(clip, Tensor) else torch.from_numpy(np.ascontiguousarray(clip))
    if wave.dtype != torch.int16:
        if not wave.is_floating_point():
            raise DataError(f"clip {index} is of type {wave.dtype}; give int16, or float in ±1")
        wave = wave.float()
        if not wave.isfinite().all():
            raise DataError(f"clip {index} has NaN or infinite samples")
    if sampling_rate != target_rate:
        soxr = required("soxr", "changing the sampling rate")
        wave = torch.from_numpy(soxr.resample(as_float(wave).cpu().numpy(), sampling_rate, target_rate))
        if len(wave) == 0:
            raise DataError(f"clip {index} is too short to resample from {sampling_rate} to {target_rate} Hz")
    return wave


@contextlib.contextmanager
def _naming(index: int) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"clip {index}: {error}") from error


def _pad(waves: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Zero-padded batch on the device and its lengths; float32 if any clip is."""
    lengths = torch.tensor([len(wave) for wave in waves])
    if any(wave.dtype != torch.int16 for wave in waves):
        waves = [as_float(wave) for wave in waves]
    return nn.utils.rnn.pad_sequence([wave.to(device) for wave in waves], batch_first=True), lengths.to(device)


def _no_grad_if(frozen: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.no_grad() if frozen else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# folders


def find_model(path: str | os.PathLike[str]) -> Path:
    """What holds the weights: the folder of an export or of a run's checkpoint, or a foreign checkpoint."""
    folder = Path(path)
    if not folder.exists():
        folder = _download(os.fspath(path))
    if folder.is_file() or is_foreign(folder):
        return folder
    archives = sorted(folder.glob("*.pth.tar"))
    if archives and not isinstance(_format_of(folder), int):
        if len(archives) > 1:
            raise ModelError(f"{folder}: name one of {', '.join(item.name for item in archives)}")
        return archives[0]
    if (folder / CONFIG_FILE).is_file():
        return folder
    steps = {
        int(match[1]): item
        for item in folder.glob("checkpoints/step-*")
        if (match := re.fullmatch(r"step-(\d+)", item.name)) and (item / WEIGHTS_FILE).is_file()
    }
    if not steps:
        raise ModelError(f"{folder}: neither an exported model ({CONFIG_FILE}) nor a run with a complete checkpoint")
    return steps[max(steps)]


def is_foreign(path: Path) -> bool:
    """Whether this is a checkpoint that :mod:`fastclap.checkpoints` reads: a weights file, or a transformers CLAP."""
    return path.is_file() or _format_of(path) == "clap"


def _format_of(folder: Path) -> str | int | None:
    """Format version of an export, model type of a transformers folder, None without a readable configuration."""
    try:
        data = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data.get("format_version", data.get("model_type")) if isinstance(data, dict) else None


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


# of transformers' CLAP (its tokenizer) and of ParaSpeechCLAP
_FOREIGN_FILES = {"tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "*.pth.tar"}


def _download(name: str) -> Path:
    if not _is_hub_id(name):
        raise ModelError(f"{name}: no such model folder")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=sorted(_MODEL_FILES | _FOREIGN_FILES)))
        if _format_of(folder) == "clap" and not (folder / WEIGHTS_FILE).exists():
            snapshot_download(name, allow_patterns=["pytorch_model*", "model*.safetensors*"])
        return folder
    except Exception as error:  # every failure of the network, the hub or the name ends here
        raise ModelError(f"{name}: no such folder, and it cannot be fetched from the hub ({error})") from error


def _read_config(path: Path) -> CLAPConfig:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: missing; this is not an exported model") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); export the model again") from error
    version = data.pop("format_version", None) if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{path}: format version {version}, this fastclap reads {FORMAT_VERSION}; "
            "the file is not a fastclap model or needs another release"
        )
    try:
        return CLAPConfig.from_dict(data)
    except ConfigError as error:
        raise ModelError(f"{path}: {error}") from error


def check_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Compare names and shapes, so that a checkpoint of another model says what differs."""
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not part of the model" for name in weights if name not in expected]
    problems += [
        f"{name} has the shape {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(f"{path}: not the weights of this configuration: {'; '.join(problems[:5])}{more}")
