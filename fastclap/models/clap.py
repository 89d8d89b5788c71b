"""`CLAP`, the dual encoder: encoders for training, embeddings for users, loading and saving.

`encode_audio` and `encode_text` are what the training step calls: padded batches in, unnormalised embeddings out, no
host sync. `embed_audio` and `embed_text` are what a user calls: files, arrays or strings in, unit vectors out in the
order given; they sort by length so that little is computed on padding, and leave the model's mode as it was. Models are
saved as safetensors only, and torch files are read without unpickling anything but tensors and numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastclap.config import AudioTowerConfig, CLAPConfig, TextTowerConfig
from fastclap.errors import ConfigError, ModelError
from fastclap.models.audio_towers import build_audio_tower
from fastclap.models.card import ModelFacts, model_card, published_at, with_license
from fastclap.models.encoder import DualEncoder, check_batch_size, checked_texts
from fastclap.models.folder import (
    SavedModel,
    check_weights,
    find_model,
    is_foreign,
    is_hub_id,
    read_model,
    upload,
    write_model,
)
from fastclap.models.foreign import read_foreign
from fastclap.models.freezing import ask_for_gradients, parameters_to_freeze
from fastclap.models.heads import build_head
from fastclap.models.layers import masked_mean
from fastclap.models.lora import add_adapters, is_adapter, merged, without_adapters
from fastclap.models.sizes import Allowance, free_memory, one_error
from fastclap.models.text_towers import build_text_tower
from fastclap.models.tokenizer import TOKENIZER_FILE, Tokenizer, check_vocabulary


class CLAP(DualEncoder):
    """Contrastive language-audio model: two towers, two projection heads, a learned logit scale and maybe a bias.

    Args:
        config: architecture; copied, and completed with the transformers configuration of the towers that have one.
        tokenizer: of the text tower; by default that of `config.text.pretrained`. Without one the model takes token
            ids only.
        load_pretrained: start the towers from `config.*.pretrained`; False leaves them random, for weights that are
            about to be read.

    Raises:
        ConfigError: the configuration is impossible, or the tokenizer has more ids than the text tower.
        ModelError: pretrained weights cannot be read.
    """

    logit_bias: nn.Parameter | None  # added to the logits of the sigmoid loss

    def __init__(self, config: CLAPConfig, tokenizer: Tokenizer | None = None, *, load_pretrained: bool = True) -> None:
        super().__init__()
        config.check()
        if not 1 <= config.init_logit_scale <= config.max_logit_scale:
            raise ConfigError(
                f"init_logit_scale must lie between 1 and max_logit_scale = {config.max_logit_scale}, "
                f"not at {config.init_logit_scale}"
            )
        with Allowance(config.to_dict(), free_memory(), "of memory are free"):
            self.audio_branch = build_audio_tower(config.audio, load_pretrained)
            self.text_branch = build_text_tower(config.text, load_pretrained)
            with one_error("projection heads"):
                self.audio_projection = build_head(config.head, self.audio_branch.width, "audio")
                self.text_projection = build_head(config.head, self.text_branch.width, "text")
        self.sampling_rate = self.audio_branch.sampling_rate
        self.equal_lengths_only = self.audio_branch.equal_lengths_only
        self.single_on_cpu = self.audio_branch.single_on_cpu
        self.beginning = None if self.audio_branch.chunk else self.audio_branch.window
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
            check_vocabulary(tokenizer, self.text_branch.vocab_size, config.text.pretrained)
        if tokenizer is not None and tokenizer.vocab_size > self.text_branch.vocab_size:
            raise ConfigError(
                f"the text tower has {self.text_branch.vocab_size} tokens, the tokenizer has {tokenizer.vocab_size}; "
                "give the one that the tower was trained with, or set config.text.vocab_size"
            )
        self.tokenizer = tokenizer
        self.card: str | None = None  # README.md that the model came with
        held: list[nn.Parameter] = []
        fixed: set[nn.Parameter] = set()
        for side, branch, tower in (
            ("audio", self.audio_branch, config.audio),
            ("text", self.text_branch, config.text),
        ):
            if tower.freeze and tower.pretrained and load_pretrained and tower.pooling in ("attention", "token"):
                raise ConfigError(
                    f"{side}.pooling {tower.pooling} is learned together with the encoder, which is frozen; use "
                    f"mean or statistics, or {side}.freeze_layers instead of {side}.freeze"
                )
            held += parameters_to_freeze(branch, tower, side)
            fixed |= set(add_adapters(branch, tower, side))
        self._held = [parameter for parameter in held if parameter not in fixed]
        self.set_frozen(True)

    def train(self, mode: bool = True) -> CLAP:
        """As `nn.Module.train`, except that a frozen tower stays in evaluation mode."""
        super().train(mode)
        if self._is_fixed(self.config.audio):
            self.audio_branch.eval()
        if self._is_fixed(self.config.text):
            self.text_branch.eval()
        return self

    def _is_fixed(self, tower: AudioTowerConfig | TextTowerConfig) -> bool:
        return tower.freeze and self._frozen

    @property
    def has_frozen_parts(self) -> bool:
        """Whether the freeze options of the configuration name anything that would train without them."""
        return bool(self._held)

    def set_frozen(self, frozen: bool) -> None:
        """Keep what the freeze options of the configuration name fixed, or let it train after all.

        The configuration stays as it is. The weights that LoRA adapts stay fixed in any case.
        """
        self._frozen = frozen
        self.audio_branch.frozen = self._is_fixed(self.config.audio)
        self.text_branch.frozen = self._is_fixed(self.config.text)
        for parameter in self._held:
            parameter.requires_grad_(not frozen)
        ask_for_gradients(self)
        self.train(self.training)

    # -- training ------------------------------------------------------------------------------------------------------

    @property
    def logit_scale(self) -> Tensor:
        """Multiplier of the cosines, exp(log_logit_scale); 0-d, differentiable."""
        return self.log_logit_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Clamp the multiplier to between 1 and `config.max_logit_scale`, on the device."""
        self.log_logit_scale.clamp_(0.0, math.log(self.config.max_logit_scale))

    def encode_audio(
        self,
        audio: Tensor | None = None,  # int16 or float [B, T]
        lengths: Tensor | None = None,  # [B]
        mean: Tensor | None = None,  # [B]
        std: Tensor | None = None,  # [B]
        host_lengths: Sequence[int] | None = None,
        *,
        summary: Tensor | None = None,  # [B, ...]
    ) -> Tensor:  # [B, D]
        """Embeddings of a padded batch, not normalised.

        Args:
            audio: waveforms at `sampling_rate`, full scale ±32768 (int16) or ±1 (float); padding may hold anything.
            lengths: valid samples of each clip; all when None.
            mean: whole-file mean of each clip, full scale 1. Waveform towers normalise by it; without it by the clip's.
            std: whole-file standard deviation, likewise.
            host_lengths: the numbers in `lengths`, for the host. They change nothing but the speed: a tower that knows
                the shapes beforehand computes next to nothing on padding, without waiting for the device.
            summary: what `audio_branch.summarize` gives of all that, which is then not needed.

        Raises:
            ValueError: `host_lengths` are not those of the batch.
        """
        if summary is not None:
            return self.audio_projection(self.audio_branch.combine(summary))
        if audio is None:
            raise TypeError("encode_audio takes audio, or a summary of it")
        chunk = self.audio_branch.chunk
        if chunk is None or audio.shape[1] <= chunk:
            return self.audio_projection(self.audio_branch(audio, lengths, mean, std, host_lengths))
        if lengths is None:
            lengths = torch.full(audio.shape[:1], audio.shape[1], device=audio.device)
        parts = F.pad(audio, (0, -audio.shape[1] % chunk)).unflatten(1, (-1, chunk))  # [B, parts, chunk]
        begins = torch.arange(0, audio.shape[1], chunk, device=audio.device)
        sizes = (lengths.to(audio.device)[:, None] - begins).clamp(0, chunk)  # [B, parts]
        vectors = self.audio_projection(self.audio_branch(parts.flatten(0, 1), sizes.flatten()))
        unit = F.normalize(vectors, dim=-1).unflatten(0, sizes.shape)
        return masked_mean(unit, (sizes > 0) | (begins == 0)).to(unit.dtype)

    def encode_text(
        self,
        input_ids: Tensor | None = None,  # int64 [B, tokens]
        attention_mask: Tensor | None = None,  # [B, tokens], 1 on tokens
        token_counts: Sequence[int] | None = None,
        *,
        summary: Tensor | None = None,  # [B, ...]
    ) -> Tensor:  # [B, D]
        """Embeddings of tokenized captions, not normalised.

        Args:
            input_ids: as from `tokenize`, padded on the right.
            attention_mask: likewise.
            token_counts: row sums of `attention_mask`, for the host; what `host_lengths` are to `encode_audio`.
            summary: what `text_branch.summarize` gives of all that, which is then not needed.

        Raises:
            ValueError: `token_counts` are not those of the batch.
        """
        if summary is not None:
            return self.text_projection(self.text_branch.combine(summary))
        if input_ids is None or attention_mask is None:
            raise TypeError("encode_text takes input_ids and attention_mask, or a summary of them")
        return self.text_projection(self.text_branch(input_ids, attention_mask, token_counts))

    def forward(
        self,
        audio: Tensor,  # int16 or float [B, T]
        input_ids: Tensor,  # int64 [M, tokens]
        attention_mask: Tensor,  # [M, tokens]
        lengths: Tensor | None = None,  # [B]
        mean: Tensor | None = None,  # [B]
        std: Tensor | None = None,  # [B]
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, D], [M, D], 0-d
        """Both encoders and the logit scale in one call, for wrappers of `forward` (DistributedDataParallel)."""
        return (
            self.encode_audio(audio, lengths, mean, std),
            self.encode_text(input_ids, attention_mask),
            self.logit_scale,
        )

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (CPU, int64 [n, tokens]) of captions, cut at `config.text.max_tokens`.

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
            ConfigError: `batch_size` is not a positive integer.
            ModelError: the model has no tokenizer.
            DataError: no texts, or one that is not a string or is blank; it is named.
        """
        check_batch_size(batch_size)
        tokens = self.tokenize(checked_texts(texts))
        sizes = tokens["attention_mask"].sum(1)
        chunks = _of_like_sizes(sizes, batch_size)
        with self._inference():
            rows = []
            for chunk in chunks:
                longest = int(sizes[chunk].max())
                batch = {name: value[chunk, :longest].to(self.device) for name, value in tokens.items()}
                rows.append(self.encode_text(**batch, token_counts=sizes[chunk].tolist()))
            embeddings = F.normalize(torch.cat(rows)[torch.cat(chunks).argsort().to(self.device)].float(), dim=-1)
        return embeddings.clone()

    def embed_summaries(self, *, audio: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """Unit vectors [n, D], float32, of what the audio tower or the text tower `summarize`s, [n, ...].

        Raises:
            TypeError: there are none, or of both.
        """
        if (audio is None) == (text is None):
            raise TypeError("embed_summaries takes summaries of audio or of text")
        with self._inference():
            encoded = self.encode_text(summary=text) if audio is None else self.encode_audio(summary=audio)
            vectors = F.normalize(encoded.float(), dim=-1)
        return vectors.clone()

    def text_batches(self, texts: Sequence[str], *, batch_size: int = 256) -> list[list[int]]:
        """Which texts `embed_text` encodes together: those with like numbers of tokens."""
        sizes = self.tokenize(texts)["attention_mask"].sum(1)
        return [chunk.tolist() for chunk in _of_like_sizes(sizes, batch_size)]

    # -- files ---------------------------------------------------------------------------------------------------------

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
                code (see `read_checkpoint`): a ParaSpeechCLAP `.pth.tar`, a LAION-CLAP or CLSP `.pt`, or the folder of
                a transformers `ClapModel`.
            device: where to put it.
            dtype: of the parameters; float32 by default.
            tokenizer: folder or hub id of a tokenizer, or one that is loaded. By default the model's own; checkpoints
                of other codes hold none, and theirs comes from the hub.

        Raises:
            ConfigError: there is no such device, or `dtype` is none of floating-point numbers.
            ModelError: there is no model, a file is damaged, or the weights are those of another architecture.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigError(f"dtype is {dtype!r}; give one of floating-point numbers, such as torch.bfloat16")
        found = find_model(path)
        saved = read_foreign(found, tokenizer) if is_foreign(found) else read_model(found, tokenizer)
        model = cls._from_saved(saved)
        try:
            return model.to(device=device, dtype=dtype)
        except (AssertionError, RuntimeError, TypeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ConfigError(f"device {device!r}: the model cannot be put there ({reason})") from error

    @classmethod
    def _from_saved(cls, saved: SavedModel) -> CLAP:
        # what is built and not kept, such as a decoder, is no larger than a few times what is
        most = 16 * sum(tensor.numel() for tensor in saved.weights.values()) + (1 << 26)
        source = f"are more than any model needs for the weights in {saved.weights_file.name}"
        try:
            with uninitialized_parameters(), Allowance(saved.config.to_dict(), most, source):
                model = cls(saved.config, saved.tokenizer, load_pretrained=False)
        except ConfigError as error:
            raise ModelError(f"{saved.config_file}: {error}") from error
        check_weights(model, saved.weights, saved.weights_file)
        model.load_state_dict(saved.weights)
        model.card = saved.card if saved.origin is None else model_card(model.facts, origin=saved.origin)
        return model.eval()

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        run: str | os.PathLike[str] | None = None,
        license: str | None = None,
    ) -> None:
        """Write `config.json`, `model.safetensors`, `tokenizer.json` and the model card `README.md`.

        LoRA's adapters are added to the weights of their layers: what is written is a plain model without any.

        The files are written and fsynced in a temporary folder next to `folder` that is then renamed to it, so a crash
        leaves no half of them. An earlier export of the same name is replaced; a folder with other files in it is not
        touched.

        Args:
            folder: where to.
            state_dict: the weights to write, by default the model's own (of sharded towers, the caller gathers them).
            run: run folder whose training data and figures go into the model card. Without it the card that the model
                was loaded with is kept, or one without them is written.
            license: licence of the weights for the model card, by its name on the hub, such as apache-2.0.

        Raises:
            ModelError: `folder` holds files that are not a model's.
            OSError: the disk is full or the place is not writable; nothing is left behind.
        """
        self._write(
            Path(folder), self.state_dict() if state_dict is None else state_dict, self._card_to_save(run, license)
        )

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
        """Upload the model's folder to the Hugging Face hub, from which `from_pretrained` reads it by `repo_id`.

        Args:
            repo_id: `owner/name`; made if it does not exist.
            run, license: for the model card, as for `save_pretrained`.
            private: whether a new repository is; the account's default when None.
            token: of the hub; that of `hf auth login` when None.
            commit_message: of the upload.

        Returns:
            Address of the commit.

        Raises:
            ModelError: `repo_id` is malformed, or the hub refused.
        """
        if not is_hub_id(repo_id):
            raise ModelError(f"{repo_id!r} is not a hub id; give owner/name")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            card = published_at(self._card_to_save(run, license), repo_id)
            self._write(folder, self.state_dict(), card)
            return upload(folder, repo_id, private=private, token=token, commit_message=commit_message)

    def _write(self, folder: Path, weights: Mapping[str, Tensor], card: str) -> None:
        write_model(folder, without_adapters(self.config), merged(weights, self.config), self.tokenizer, card)

    @property
    def facts(self) -> ModelFacts:
        """What a model card says about this model, as it is saved."""
        parameters = sum(parameter.numel() for name, parameter in self.named_parameters() if not is_adapter(name))
        return ModelFacts(self.config, self.sampling_rate, parameters, self.tokenizer is not None)

    def _card_to_save(self, run: str | os.PathLike[str] | None, license: str | None) -> str:
        """The card that the model came with, or a new one where there is none or a run to report on."""
        card = model_card(self.facts, run=run) if self.card is None or run is not None else self.card
        return card if license is None else with_license(card, license)


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    audio_config: Mapping[str, Any] | None = None,
    text_config: Mapping[str, Any] | None = None,
) -> CLAP:
    """A checkpoint of another code as a model in evaluation mode, on the CPU.

    Args:
        path: a ParaSpeechCLAP `.pth.tar`, a LAION-CLAP `.pt` (HTSAT without fusion, RoBERTa), an MS-CLAP `.pth` (2022
            or 2023), VoiceCLAP-Small's folder or weights, CLSP's folder or icefall's `.pt`, or the folder of a
            transformers `ClapModel` (without fusion), `PeAudioVideoModel` or `PeAudioModel`.
        tokenizer: folder or hub id, or a loaded one. By default that of the published text tower, from the hub; of a
            transformers folder, its own.
        audio_config: entries of the audio tower's transformers configuration that are not as published, such as
            `{"num_attention_heads": 12}`; of ParaSpeechCLAP, `model_type` where the tower is not WavLM; of CLSP, fields
            of `ZipformerConfig`, and `n_mels`.
        text_config: likewise of the text tower.

    Raises:
        ModelError: not such a checkpoint, damaged, or of another architecture; keys and shapes at fault are named.
    """
    saved = read_foreign(Path(path), tokenizer, audio_config=audio_config, text_config=text_config)
    return CLAP._from_saved(saved)


def _of_like_sizes(sizes: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """Indices of the texts of each batch, the shortest texts first."""
    return sizes.argsort(stable=True).split(batch_size)


@contextlib.contextmanager
def uninitialized_parameters() -> Iterator[None]:
    """Parameters made within keep what the memory holds, until weights are read into all of them.

    Drawing 600 million random numbers to overwrite them takes ten times as long as reading the weights. What is left of
    the drawing does not advance torch's generator.
    """
    with torch.random.fork_rng(devices=[]), _WithoutDraws():
        yield


class _WithoutDraws(TorchFunctionMode):
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
