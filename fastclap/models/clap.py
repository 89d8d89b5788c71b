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
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclap.config import FORMAT_VERSION, CLAPConfig
from fastclap.errors import ConfigError, DataError, ModelError
from fastclap.files import fsync
from fastclap.models.audio_towers import build_audio_tower
from fastclap.models.card import card_of, published_at
from fastclap.models.encoder import DualEncoder
from fastclap.models.folder import (
    _MODEL_FILES,
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    _is_hub_id,
    _read_config,
    check_weights,
    find_model,
    is_foreign,
    load_state_dict_file,
    without_initialisation,
)
from fastclap.models.heads import build_head
from fastclap.models.text_towers import build_text_tower
from fastclap.models.tokenizer import TOKENIZER_FILE, Tokenizer, as_tokenizer


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
                code (see :func:`fastclap.models.foreign.read_checkpoint`): a ParaSpeechCLAP ``.pth.tar``, a LAION-CLAP
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
            from fastclap.models.foreign import read_checkpoint

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


def _no_grad_if(frozen: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.no_grad() if frozen else contextlib.nullcontext()
